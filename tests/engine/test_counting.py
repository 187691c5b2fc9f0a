"""counting.py: a run without steps, from the command line to a sample, and what it refuses."""

import math

import pytest
import torch
from conftest import TOY_NGRAM as RUN

import sample
import train
from engine import checkpoint as checkpoints


def test_a_run_is_scored_saved_shown_and_sampled(toy, capsys):
    train.main([*RUN, "--order=3", "--eval_tokens=0", "--out=out/n"])
    said = capsys.readouterr().out
    assert "none: the text is counted in one pass" in said and "MB\n" in said
    assert {p.name for p in (toy / "out/n").iterdir()} == {"best.pt", "log.jsonl", "config.json"}
    model, tokenizer, checkpoint = checkpoints.load_model(
        toy / "out/n/best.pt", torch.device("cpu"), dtype=torch.bfloat16
    )
    assert model.config.vocab_size == tokenizer.vocab_size  # not padded
    assert model.config.boundary == tokenizer.special_tokens["<|endoftext|>"]
    assert model.log_p_2.dtype == torch.float32
    p = model(torch.tensor([[model.config.boundary]]))[0, -1].exp()
    assert p[model.config.boundary] < 0.01  # no document of the text is empty
    assert f"best validation loss {checkpoint['best']:.4f}" in said
    assert checkpoint["best"] < math.log(300)
    sample.main(["--checkpoint=out/n/best.pt", "--prompt=the ", "--max_new_tokens=30"])
    assert len(capsys.readouterr().out) > 20
    sample.main(["--checkpoint=out/n/best.pt", "--eval=toy.txt"])
    assert "bits_per_byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag",
    ["steps=5", "lr=1", "minutes=1", "epochs=2", "optimizer=adam", "resume", "init=a.pt", "keep=2"],
)
def test_flags_about_steps_have_no_effect_and_are_refused(toy, flag):
    name = flag.partition("=")[0]
    with pytest.raises(
        ValueError, match=f"--{name} has no effect with --model ngram, which counts"
    ):
        train.main([*RUN, f"--{flag}"])
    with pytest.raises(ValueError, match=f"--{name} has no effect with --model ngram"):
        train.main(["--preset=ngram-shakespeare", f"--{flag}"])


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--order=0"], "order=0 is out of range: choose 1 to 100"),
        (["--block_size=0"], "block_size=0 is out of range"),
        (["--block_size=100000"], "choose --block_size [0-9]+ or less"),
        (["--smoothing=laplace"], "laplace is not known: choose kneser_ney, add_k"),
        (["--smoothing=add_k", "--added=0"], "added=0.0 is out of range"),
    ],
)
def test_what_cannot_be_counted_leaves_no_folder(toy, flags, message):
    with pytest.raises(ValueError, match=message):
        train.main([*RUN, *flags])
    assert not list(toy.glob("out/*"))


def test_several_processes_are_refused(toy):
    from engine import counting
    from engine.processes import Processes

    with pytest.raises(ValueError, match="counts in one process, not 2: start it without torchrun"):
        counting.count(train.TrainConfig(model="ngram"), {}, Processes(0, 2, torch.device("cpu")))
