"""--compile: every task, several processes, a compiler that fails in one of them.

Runs on two processes, or on one that is a group, are those of one launch (tests/compiled_runs.py).
"""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compiled_runs import JOBS
from conftest import TOYS, torchrun, write_labelled, write_pairs, write_texts
from sharded_runs import DIVIDES_ON_CPU
from test_train import losses, no_autocast
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

import train
from engine import kernels, processes
from engine import losses as losses_file
from engine.processes import Processes
from engine.setup import compiled
from model import GPT, GPTConfig

divides = pytest.mark.skipif(not DIVIDES_ON_CPU, reason="--shard model needs torch 2.7 on CPUs")


# ---- one process ---------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """torch's own attention and dropout, and a loss in several chunks, the work on which is
    compiled: what a run on a GPU compiles, for a CPU."""
    pick, use = processes.pick_device, losses_file.use_compiler

    def pick_device(name: str) -> torch.device:
        device = pick(name)
        kernels.install(torch.device("mps"))
        return device

    def use_compiler(device: torch.device | None) -> None:
        use(device)
        losses_file.chunk_function = losses_file.of_chunk
        if device:
            losses_file.chunk_function = torch.compile(losses_file.of_chunk)

    monkeypatch.setattr(processes, "pick_device", pick_device)
    monkeypatch.setattr(losses_file, "use_compiler", use_compiler)
    monkeypatch.setitem(losses_file.CHUNK, "cpu", 28 * 320)
    torch._dynamo.reset()
    counters.clear()
    with inductor.patch({"cpp.simdlen": 1}):  # C++ without vectors: half the time
        yield
    use(None)


@pytest.mark.slow
@pytest.mark.parametrize("task", TOYS)
def test_every_task_trains_compiled(toy_pairs, capsys, monkeypatch, as_on_a_gpu, task):
    """A last batch of other size and evaluations included; those of pretraining are resumed too,
    and have dropout in bf16, where the graphs are made, but not turned into C++."""
    write_labelled(toy_pairs)
    pretraining = task in ("gpt", "bert", "seq2seq")
    if not pretraining:  # an encoder or decoder, as that of bert or gpt: the graphs alone
        backend = "aot_eager" if task in ("tag", "complete") else "eager"
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    flags = [*TOYS[task], "--dropout=0", "--n_layer=1", "--steps=6", "--dtype=fp32"]
    if task in ("classify", "tag", "answer", "similar"):
        flags.append("--attention_dropout=0")
    if task == "bert":  # 16 targets in a first batch of rows of 16 would be a graph of their own
        flags.append("--mlm_rate=0.25")
    train.main([*flags, "--no-compile", "--out=eager"])
    train.main([*flags, "--compile", "--out=fast", *["--stop_after=3"] * pretraining])
    if pretraining:
        train.main(["--resume", "--out=fast"])
    for split in ("train", "validation"):
        assert losses("fast", split)[-3:] == pytest.approx(losses("eager", split)[-3:], abs=1e-5)
    if pretraining:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        torch._dynamo.reset()
        train.main([*flags, "--dtype=bf16", "--dropout=0.1", "--compile", "--out=bf16"])
        assert losses("bf16") == pytest.approx(losses("eager"), rel=0.2)
    out = capsys.readouterr().out
    assert "going on without it" not in out
    assert out.count(", compiled\n") == (3 if pretraining else 1)
    # Nothing was too much for the compiler, later on either. One gap in the graph is meant: the
    # loop over the chunks of the loss.
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    assert all("torch.compiler.disable" in reason for reason in counters["graph_break"])


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_processes_agree_whether_they_compile(capsys, monkeypatch, failing):
    """One process, number 0 of two; the other one is played by its group."""

    class Group(Processes):
        def all_reduce(self, numbers, dtype=torch.float64):
            return [numbers[0], float(failing == 1)]

    def backend(graph, inputs):
        if failing == 0:
            raise RuntimeError("no compiler here\nand a long story")
        return graph

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: real(model, backend=backend))
    torch._dynamo.reset()
    model = GPT(GPTConfig(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=8))
    tokens = torch.zeros(2, 8, dtype=torch.long)
    batches = [{"tokens": tokens, "targets": tokens}]
    fast = compiled(model, batches, no_autocast, Group(0, 2, torch.device("cpu")))
    assert (fast is model) == (failing is not None)
    assert model.training and all(p.grad is None for p in model.parameters())
    line = "torch.compile failed (RuntimeError: no compiler here): going on without it\n"
    assert capsys.readouterr().out == (line if failing == 0 else "")  # one process says it


def test_a_later_graph_that_fails_ends_no_run(monkeypatch):
    """A batch of another length, hours after the trial."""
    seen = []

    def backend(graph, inputs):
        if seen and seen[-1] == "late":
            raise RuntimeError("no compiler here")
        seen.append("early")
        return graph

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: real(model, backend=backend))
    torch._dynamo.reset()
    model = GPT(GPTConfig(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=8))
    tokens = torch.randint(0, 20, (2, 8))
    fast = compiled(model, [{"tokens": tokens, "targets": tokens}], no_autocast)
    assert fast is not model and seen
    seen.append("late")
    found = fast(tokens[:, :5], targets=tokens[:, 1:6])["loss"]
    assert torch.equal(found, model(tokens[:, :5], targets=tokens[:, 1:6])["loss"])
    torch._dynamo.reset()  # in the trial of the next network errors count again
    assert compiled(model, [{"tokens": tokens, "targets": tokens}], no_autocast) is model


# ---- a group -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> SimpleNamespace:
    """.folder of the runs, .reports {job: what each process reported}, .out what was printed."""
    folder, reports, out = tmp_path_factory.mktemp("launched"), {}, ""
    write_texts(folder)
    write_pairs(folder)
    for world in (2, 1):
        jobs = [job for job in JOBS if job.startswith("one") == (world == 1)]
        if not DIVIDES_ON_CPU:
            jobs = [job for job in jobs if "--shard=model" not in JOBS[job]]
        done = torchrun(world, *jobs, script="tests/compiled_runs.py", timeout=600, cwd=folder)
        assert done.returncode == 0, done.stderr
        out += done.stdout
        files = [folder / f"report-{i}.jsonl" for i in range(world)]
        lines = [[json.loads(x) for x in f.read_text("utf-8").splitlines()] for f in files]
        for file in files:
            file.unlink()
        reports |= dict(zip(jobs, zip(*lines, strict=True), strict=True))
    return SimpleNamespace(folder=folder, reports=reports, out=out)


@pytest.fixture
def runs(launched, monkeypatch) -> SimpleNamespace:
    monkeypatch.chdir(launched.folder)
    return launched


def assert_same_losses(one: str, other: str, near: float = 1e-5) -> None:
    for split in ("train", "validation"):
        assert losses(one, split) == pytest.approx(losses(other, split), abs=near)


@pytest.mark.slow
@divides
@pytest.mark.parametrize("plain,graphs", [("gpt", 4), ("bf16", 4), ("seq2seq", 20)])
def test_the_layers_of_a_divided_model_are_compiled(runs, plain, graphs):
    """All blocks share the graphs of attention and MLP, in training and evaluation. bf16 computes
    the blocks again in the backward pass."""
    assert_same_losses(plain, f"{plain}-divided", 1e-3 if plain == "bf16" else 1e-5)
    for report in runs.reports[f"{plain}-divided"]:
        assert not report["whole"] and report["layers"]
        assert not report["breaks"] and not report["failed"] and report["graphs"] <= graphs


@pytest.mark.slow
@pytest.mark.parametrize("job", ["gpt-fails", "gpt-divided-fails", "gpt-divided-fails-backward"])
def test_a_compiler_that_fails_in_one_process_stops_no_other(runs, job):
    """The other process waited for the rest of a trial that the failing one had left."""
    if job not in runs.reports:
        pytest.skip("--shard model needs torch 2.7 on CPUs")
    assert_same_losses("gpt", job)
    for report in runs.reports[job]:
        assert not report["whole"] and not report["layers"]
    line = "torch.compile failed (RuntimeError: no compiler here): going on without it"
    assert runs.out.count(line) == sum(name in runs.reports for name in JOBS if "-fails" in name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "job,forward,optimizer",
    [
        ("one", "DistributedDataParallel", "ChainedOptimizer"),
        ("one-optimizer", "DistributedDataParallel", "DividedOptimizer"),
        ("one-model", "FSDPGPT", "ChainedOptimizer"),
    ],
)
def test_a_group_of_one_does_what_a_larger_one_does(runs, job, forward, optimizer):
    """So that one GPU can try it. The numbers are those of a process that is in no group."""
    if job not in runs.reports:
        pytest.skip("--shard model needs torch 2.7 on CPUs")
    (report,) = runs.reports[job]
    assert (report["forward"], report["optimizer"]) == (forward, optimizer)
    if not Path("alone").exists():
        train.main([*JOBS["one"], "--out=alone"])
    assert_same_losses("alone", job, 1e-6)
