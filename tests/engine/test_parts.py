"""parts.py: what a checkpoint from a stranger says of its folder. Reading and writing are tested
with the processes that need them, in test_sharding.py."""

import pytest
import torch
from conftest import TOY

import train
from engine import checkpoint as checkpoints
from engine import parts


@pytest.mark.parametrize("name", ["..", ".", "", "../other.parts", "/tmp/x.parts", "a\\b.parts", 7])
def test_the_folder_of_parts_lies_beside_its_checkpoint(tmp_path, name):
    """The pieces of the folder above could be read, and the names of files were checked alone."""
    about = {"dtype": "float32", "size": [1], "chunks": []}
    with pytest.raises(ValueError, match="and its folder do not fit together"):
        parts.Stored(tmp_path / "latest.pt", {"folder": name, "tensors": {"x": about}}, "x")


@pytest.mark.parametrize("about", [{"size": [-3]}, {"size": ["3"]}, {"dtype": "load"}])
def test_a_piece_of_an_impossible_tensor_is_refused(tmp_path, about):
    about = {"dtype": "float32", "size": [1], "chunks": [], **about}
    with pytest.raises(ValueError, match="and its folder do not fit together"):
        parts.Stored(tmp_path / "a.pt", {"folder": "of.parts", "tensors": {"x": about}}, "x")[...]


@pytest.mark.slow
@pytest.mark.parametrize("found", [None, "a.parts", {}, {"folder": "..", "tensors": {"x": {}}}])
def test_a_checkpoint_whose_parts_are_not_there_is_no_untrained_model(toy, found):
    """It was loaded with random weights where "parts" was no dict."""
    train.main([*TOY, "--steps=1", "--out=run"])
    checkpoint = checkpoints.load(toy / "run/best.pt")
    torch.save({**checkpoint, "model": {}, "parts": found}, toy / "run/best.pt")
    with pytest.raises(ValueError, match=r"damaged|do not fit together|does not fit the model"):
        checkpoints.load_model(toy / "run/best.pt", torch.device("cpu"))
