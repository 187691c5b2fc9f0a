"""closing.py: what fails after the last step takes no result with it, and holds no memory."""

import math
import weakref
from pathlib import Path

import pytest
import torch
from conftest import TOY

import train
from engine import checkpoint as checkpoints
from engine import closing, saving
from engine.checkpoint import LATEST
from engine.evaluation import evaluate
from engine.logs import read_log
from engine.steps import Diverged
from tasks import text


@pytest.mark.parametrize("figure", [math.nan, math.inf])
def test_a_run_without_a_finite_evaluation_says_so(toy, monkeypatch, figure):
    """It said that there is no checkpoint best.pt: train first."""
    monkeypatch.setattr(train, "evaluate", lambda *args: {**evaluate(*args), "loss": figure})
    with pytest.raises(Diverged, match=r"no evaluation gave a finite loss.*lower --lr") as error:
        train.main([*TOY, "--steps=4"])
    assert "\n" not in str(error.value)
    assert not Path("out/gpt/best.pt").exists()
    assert checkpoints.load(Path("out/gpt/latest.pt"))["step"] == 4
    monkeypatch.undo()
    monkeypatch.chdir(toy)
    with pytest.raises(ValueError, match="no evaluation gave a finite loss"):
        train.main(["--resume"])  # which has no step left


def test_one_finite_evaluation_is_enough(toy, monkeypatch, capsys):
    figures = iter((math.nan, 5.0, math.nan))
    real = evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a: {**real(*a), "loss": next(figures)})
    train.main([*TOY, "--steps=6"])
    assert "best validation loss 5.0000" in capsys.readouterr().out
    assert checkpoints.load(Path("out/gpt/best.pt"))["step"] == 4
    found = [r["loss"] for r in read_log(Path("out/gpt/log.jsonl")) if r["split"] == "validation"]
    assert found == [None, 5.0, None]


def test_a_run_whose_best_cannot_be_written_says_so(toy, monkeypatch):
    real = saving.save_run
    monkeypatch.setattr(saving, "save_run", lambda run, name: name == LATEST and real(run, name))
    with pytest.raises(ValueError, match=r"2 steps are done, but best\.pt could not be written"):
        train.main([*TOY, "--steps=2", "--out=run"])
    assert Path("run/latest.pt").is_file()


@pytest.mark.parametrize(
    "owner,name,line",
    [
        (closing, "draw_curves", "curves.png is not drawn (RuntimeError: CUDA error: too late)"),
        (closing, "load_model", "what the best model says is not shown (RuntimeError: CUDA"),
        (text, "show", "what the best model says is not shown (RuntimeError: CUDA error"),
        (text, "ask", "no input is suggested (RuntimeError: CUDA error: too late)"),
    ],
)
def test_what_cannot_be_shown_costs_a_line(toy, monkeypatch, capsys, owner, name, line):
    def broken(*args):
        raise RuntimeError("CUDA error: too late\nand a long story")

    monkeypatch.setattr(owner, name, broken)
    train.main([*TOY, "--steps=2"])
    out = capsys.readouterr().out
    assert out.count(line) == 1 and "best validation loss" in out
    assert out.splitlines()[-1].startswith("go on with: python sample.py --checkpoint out/gpt/best")


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--no-compile", "--compile"])
def test_the_trained_network_is_gone_before_another_is_loaded(toy, monkeypatch, flag):
    """On a GPU the two, with the optimizer and the compiled graphs, might not fit."""
    real, compile_it, held, graphs = closing.load_model, torch.compile, [], []

    def eager(graph, inputs):
        graphs.append(0)
        return graph

    monkeypatch.setattr(
        torch, "compile", lambda model, dynamic: compile_it(model, dynamic=dynamic, backend=eager)
    )

    class Run(train.Run):
        def release(self):
            moments = [t for s in self.optimizer.state.values() for t in s.values()]
            tensors = [*self.model.parameters(), *moments]
            held.extend(weakref.ref(x) for x in (self.model, self.optimizer, self.batch, *tensors))
            assert len(tensors) > 20
            del moments, tensors
            super().release()

    def load_model(*args):
        assert held and not [x() for x in held if x() is not None]
        return real(*args)

    monkeypatch.setattr(train, "Run", Run)
    monkeypatch.setattr(closing, "load_model", load_model)
    config, sizes, checkpoint = train.resolve([*TOY, "--steps=2", "--optimizer=adamw", flag])
    group = train.processes.start("cpu")
    run = train.train(config, sizes, checkpoint, group)
    assert run.step == 2 and run.best < 10 and run.data.fingerprint
    assert bool(graphs) == (flag == "--compile")
