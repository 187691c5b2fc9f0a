"""tasks/stream.py: rows that go on from window to window, in training and in evaluations."""

from dataclasses import replace

import pytest
import torch
from conftest import TOY_LSTM

import train
from engine import checkpoint as checkpoints
from engine.evaluation import score
from tasks.stream import ROWS, Data, Flags
from tasks.text import Data as Windows

SIZES = {"vocab_size": 300, "block_size": 16, "n_layer": 1, "n_embd": 8}


def splits(**settings):
    flags = {"data": "toy.txt", "batch_size": 4, "tokens_per_step": 64, "eval_tokens": 0}
    return Data.splits(Flags(**{**flags, **settings}), SIZES)


def test_each_row_goes_on_where_it_ended(toy):
    data, _ = splits()
    last = None
    for i in range(data.windows_of_row):
        batch = data.batch(i)
        assert batch["tokens"].shape == (4, 16) and batch["keep"].tolist() == [i > 0] * 4
        assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
        if last is not None:
            assert torch.equal(batch["tokens"][:, 0], last)
        last = batch["targets"][:, -1]
    anew = data.batch(data.windows_of_row)  # the next epoch begins elsewhere
    assert not anew["keep"].any()
    offsets = {data.batch(e * data.windows_of_row)["tokens"].numpy().tobytes() for e in range(5)}
    assert len(offsets) > 1
    again, _ = splits()
    for i in (7, 3, 1000):
        assert torch.equal(again.batch(i)["tokens"], data.batch(i)["tokens"])


def test_an_evaluation_reads_all_of_the_text_once_whatever_the_batch(toy):
    for batch_size in (1, 4):
        _, validation = splits(batch_size=batch_size, tokens_per_step=16 * batch_size)
        batches = [validation.batch(i) for i in range(validation.n_batches)]
        found = torch.cat([batch["targets"] for batch in batches], 1)
        assert found.size(0) == ROWS
        ids = torch.from_numpy(validation.ids[:].astype("int64"))
        assert torch.equal(found.flatten()[found.flatten() != -100], ids[1:])
        assert [batch["keep"].any().item() for batch in batches] == [False] + [True] * (
            len(batches) - 1
        )
        plain = Windows.splits(
            Flags(data="toy.txt", batch_size=4, tokens_per_step=64, eval_tokens=0), SIZES
        )[1]
        assert validation.scored_bytes == plain.scored_bytes
    _, some = splits(eval_tokens=16 * ROWS)
    every = range(0, some.n_windows, some.windows_of_row)  # the first window of each row
    assert some.n_batches == 1 and some.chosen == list(every)


def test_a_step_of_several_micro_batches_is_refused(toy):
    with pytest.raises(ValueError, match=r"--tokens_per_step 128 .* --tokens_per_step 64 or"):
        splits(tokens_per_step=128)
    with pytest.raises(ValueError, match="choose a smaller --batch_size"):
        splits(batch_size=4096, tokens_per_step=4096 * 16)
    data, _ = splits(tokens_per_step=128, shuffle=True)
    assert type(data) is Windows and "keep" not in data.batch(0)


RUN = [*TOY_LSTM, "--eval_tokens=0", "--dropout=0.1"]


def weights(path):
    return checkpoints.load(path)["model"]


def test_a_resumed_run_goes_on_with_its_state(toy):
    train.main([*RUN, "--steps=6", "--out=whole"])
    train.main([*RUN, "--steps=6", "--stop_after=3", "--out=part"])
    train.main(["--resume", "--out=part"])
    whole, part = weights(toy / "whole/latest.pt"), weights(toy / "part/latest.pt")
    assert whole["state"].shape == (2, 2, 4, 24) and whole["state"].abs().sum() > 0
    for name, tensor in whole.items():
        assert torch.equal(tensor, part[name]), name


def test_sample_scores_as_training_did(toy, capsys):
    import sample

    for shuffle in ([], ["--shuffle"]):
        out = f"out/{len(shuffle)}"
        train.main([*RUN, *shuffle, "--steps=2", f"--out={out}"])
        path = toy / out / "best.pt"
        model, tokenizer, checkpoint = checkpoints.load_model(path, torch.device("cpu"))
        config = Flags(**checkpoint["train_config"])
        validation = Data.splits(replace(config, batch_size=4), SIZES, tokenizer)[1]
        assert score(model, validation)["loss"] == pytest.approx(checkpoint["best"], rel=1e-5)
        capsys.readouterr()
        sample.main([f"--checkpoint={path}", "--prompt=the ", "--max_new_tokens=40"])
        assert capsys.readouterr().out.startswith("the ")
