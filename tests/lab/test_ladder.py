"""lab/ladder.py: all rungs at toy size, the table, the mixture, runs that are not repeated."""

import re

import pytest
import torch

import tasks
from engine.checkpoint import load_model
from engine.presets import PRESETS
from lab import ladder

TOY = ["--data=toy.txt", "--steps=2", "--out=new/l.png", "--runs=new/runs"]


def test_the_rungs_are_presets_of_all_networks_before_the_transformer():
    models = {PRESETS[name]["model"] for name in ladder.RUNGS.values()}
    names = {name for name in tasks.TABLE if tasks.TABLE[name][0].startswith("models.")}
    later = {"llama", "moe", "complete_llama", "complete_moe"}
    assert names - models == later | {"variant", "fnet", "sparse_gpt", "sparse_bert", "linformer"}
    assert [name for name in ladder.RUNGS if ladder.counts(name)] == ["ngram", "addk", "backoff"]


@pytest.mark.slow
def test_every_rung(toy, capsys):
    ladder.main([*TOY, "--seeds=2"])
    said = capsys.readouterr().out
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| [\d.]+ \| ([\d.]+)( ± [\d.]+)? \|", said, re.M)
    assert {row[0] for row in rows} == set(ladder.RUNGS)
    assert all(bool(spread) != ladder.counts(name) for name, _, _, spread in rows)
    losses = [float(row[2]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    alone, ngram, mixed = map(
        float, re.search(r"alone has ([\d.]+) .* alone ([\d.]+), .* ([\d.]+)\.\n", said).groups()
    )
    assert mixed <= min(alone, ngram) + 0.02  # weights are of the other half
    assert (toy / "new/l.png").read_bytes().startswith(b"\x89PNG")
    assert "| nnlm |" in (toy / "new/l.md").read_text(encoding="utf-8")
    capsys.readouterr()
    with pytest.raises(ValueError, match="cbow-1337 has a run with other flags"):
        ladder.main([*TOY, "--steps=3"])
    ladder.main([*TOY, "--seeds=2"])  # all is there, and nothing trained once more
    assert "training" not in capsys.readouterr().err


def test_log_probs_are_the_loss_of_each_place(toy):
    ladder.main([*TOY, "--only=gpt"])
    network, tokenizer, checkpoint = load_model(
        toy / "new/runs/gpt-1337/best.pt", torch.device("cpu")
    )
    config = tasks.task(checkpoint["task"]).Flags(**checkpoint["train_config"])
    Data = tasks.task(checkpoint["task"]).Data
    data = Data.splits(config, checkpoint["model_config"], tokenizer)[1]
    assert -ladder.log_probs(network, data).mean().item() == pytest.approx(checkpoint["best"])


def test_what_is_no_rung_is_refused():
    with pytest.raises(ValueError, match="--only elmo is no rung: choose ngram, addk"):
        ladder.main(["--only=elmo"])
