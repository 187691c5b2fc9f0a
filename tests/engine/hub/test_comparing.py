"""An export is compared with what transformers computes from it: a changed network is found."""

import sys
from dataclasses import dataclass

import pytest
import torch
from conftest import peer
from converting import OURS, SIZES, save_ours
from test_convert_finetuned import OURS as FINE_TUNED
from test_convert_finetuned import saved

import convert
import model
from bert import BERTConfig
from engine import checkpoint as checkpoints
from engine.hub.exporting import export_model
from engine.hub.mapping import their_settings, to_theirs
from model import GPT, GPTConfig
from seq2seq import Seq2SeqConfig
from tasks.classify import LabelConfig

NAMES = [*OURS, *FINE_TUNED]
AROUND = (" by at most ", " (the largest is ")


def save(name, path, tokenizers):
    return save_ours(name, path, tokenizers[name]) if name in OURS else saved(name, path)


@pytest.mark.parametrize("name", NAMES)
def test_export_says_the_largest_difference(name, tmp_path, tokenizers, capsys):
    peer("transformers")
    save(name, tmp_path / "best.pt", tokenizers)
    convert.main(["export", str(tmp_path / "best.pt"), "--to", str(tmp_path / "there")])
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("loaded by transformers and compared: over 3 x 13 tokens")
    apart, largest = (float(line.split(before)[1].split()[0].rstrip(")")) for before in AROUND)
    assert 0 <= apart < 1e-5 and largest > 0.1


def squared_relu(monkeypatch):
    monkeypatch.setattr(model.MLP, "forward", lambda self, x: self.proj(self.fc(x).relu() ** 2))


def turned_by_position(monkeypatch):
    """Rotary positions: q and k are turned by an angle that grows with the position."""
    plain = model.attention_kernel

    def turned(x):
        angles = torch.arange(x.size(-2), dtype=x.dtype)[:, None] / 10
        a, b, rest = x.split([3, 3, 1], -1)  # the 7 numbers of a head
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)

    def kernel(q, k, v, *rest, **more):
        return plain(turned(q), turned(k), v, *rest, **more)

    monkeypatch.setattr(model, "attention_kernel", kernel)


@pytest.mark.parametrize("change", [squared_relu, turned_by_position])
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_network_is_not_exported(name, change, tmp_path, tokenizers, monkeypatch):
    """With the same sizes and tensors, nothing but the numbers tells that it is another network."""
    peer("transformers")
    save(name, tmp_path / "best.pt", tokenizers)
    change(monkeypatch)
    with pytest.raises(ValueError, match=r"is not this model: its logits differ by \d") as error:
        export_model(tmp_path / "best.pt", tmp_path / "there")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_weights_that_are_no_numbers_are_not_exported(tmp_path, tokenizers):
    peer("transformers")
    save("gpt", tmp_path / "best.pt", tokenizers)
    checkpoint = checkpoints.load(tmp_path / "best.pt")
    checkpoint["model"]["norm.bias"][3] = torch.nan
    checkpoints.save(tmp_path / "nan.pt", checkpoint)
    with pytest.raises(ValueError, match="differ by nan"):
        export_model(tmp_path / "nan.pt", tmp_path / "there")


def test_without_transformers_it_says_that_nothing_was_compared(
    tmp_path, tokenizers, monkeypatch, capsys
):
    save("gpt", tmp_path / "best.pt", tokenizers)
    monkeypatch.setitem(sys.modules, "transformers", None)
    convert.main(["export", str(tmp_path / "best.pt"), "--to", str(tmp_path / "there")])
    out = capsys.readouterr().out
    assert out.endswith("transformers is not installed: nothing was compared with it\n")


def test_files_that_transformers_cannot_load_are_an_error(tmp_path, tokenizers, monkeypatch):
    transformers = peer("transformers")

    def fails(*given, **more):
        raise RuntimeError("no such\nlayer")

    save("gpt", tmp_path / "best.pt", tokenizers)
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", fails)
    with pytest.raises(ValueError, match=r"cannot load .* \(RuntimeError: no such layer\)"):
        export_model(tmp_path / "best.pt", tmp_path / "there")


CONFIGS = {"gpt": GPTConfig, "bert": BERTConfig, "seq2seq": Seq2SeqConfig, "classify": LabelConfig}


@pytest.mark.parametrize("task,Config", CONFIGS.items())
def test_a_field_that_the_tables_do_not_have_is_refused_by_name(task, Config):
    @dataclass
    class Changed(Config):
        rotary: bool = False
        n_kv_head: int = 2

    with pytest.raises(ValueError, match="with rotary=False, n_kv_head=2: only what"):
        their_settings(task, Changed(*SIZES))


def test_tensors_that_the_tables_do_not_have_are_refused_by_name():
    config = OURS["gpt"][1]
    state = GPT(config).state_dict()
    with pytest.raises(ValueError, match=r"surplus: gate\.weight"):
        to_theirs("gpt", config, state | {"gate.weight": torch.zeros(2)})
    del state["position_embedding.weight"]
    with pytest.raises(ValueError, match=r"missing: position_embedding\.weight"):
        to_theirs("gpt", config, state)
