"""engine/steps.py: steps that are queued, and read when the next one is queued, so that the host
does not wait for a GPU in between. Here the CPU is treated like a GPU: results must be equal."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from conftest import TOY, TOYS, write_labelled
from test_train import ALL_TASKS, assert_equal, losses, poisoned, weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import optim
import train
from engine import checkpoint as checkpoints
from engine import kernels, plan, sharding, steps
from engine.config import resolve
from engine.logs import read_log
from engine.processes import Processes

ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def queuing(monkeypatch):
    """A switch: from then on the CPU is a device that works while the host goes on."""
    monkeypatch.setattr("engine.closing.show_results", lambda run: None)
    return lambda: monkeypatch.setattr("engine.steps.QUEUING", {"cpu"})


def records(folder: str) -> list[dict]:
    found = read_log(Path(folder) / "log.jsonl")
    return [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in found]


def tensors(state: dict) -> dict:
    """All tensors of an optimizer's state, however deep."""
    found = {}
    for key, value in state.items():
        below = tensors(value) if isinstance(value, dict) else {"": value}
        found |= {f"{key}.{k}": v for k, v in below.items() if isinstance(v, torch.Tensor)}
    return found


def assert_same_run(one: str, two: str) -> None:
    assert records(one) == records(two)
    for name in ("latest.pt", "best.pt"):
        a, b = (checkpoints.load(Path(folder) / name) for folder in (one, two))
        assert_equal(a["model"], b["model"])
        assert_equal(tensors(a["optimizer"]), tensors(b["optimizer"]))
        assert [a[k] for k in ("step", "best", "skipped")] == [
            b[k] for k in ("step", "best", "skipped")
        ]


def new_run(*flags: str) -> train.Run:
    config, sizes, _ = resolve([*flags, "--out=run"])
    return train.Run(config, sizes, None, Processes(0, 1, torch.device("cpu")))


# ---- the same run --------------------------------------------------------------------------------


@pytest.mark.slow
@ALL_TASKS
def test_what_is_read_later_is_the_same(toy_pairs, queuing, small):
    flags = [*small, "--steps=7", "--eval_interval=3", "--optimizer=adamw"]
    train.main([*flags, "--out=now"])
    queuing()
    train.main([*flags, "--out=later"])
    assert_same_run("now", "later")
    assert [r["step"] for r in records("later") if r["split"] == "train"] == list(range(1, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adam", "muon"])
def test_bad_steps_are_skipped_and_counted_all_the_same(toy, queuing, capsys, monkeypatch, name):
    """In the middle, before an evaluation, several in a row, and the last one."""
    said, flags = [], [*TOY, "--steps=11", "--eval_interval=4", f"--optimizer={name}"]
    for out in ("now", "later"):
        with monkeypatch.context() as patch:
            poisoned(patch, {1, 3, 5, 6, 7, 8, 10})
            train.main([*flags, f"--out={out}"])
        said.append([s for s in capsys.readouterr().out.splitlines() if "skipped" in s])
        queuing()
    assert_same_run("now", "later")
    assert said[0] == said[1] and len(said[0]) == 7
    assert "step 9 skipped: its gradient is not finite" in said[1]
    assert [r["skipped"] for r in records("later") if r["split"] == "train"][-1] == 7
    assert checkpoints.load(Path("later/latest.pt"))["skipped"] == 7
    assert all(t.isfinite().all() for t in weights(Path("later/latest.pt")).values())


@pytest.mark.parametrize("first,last,kept", [(4, 9, 8), (2, 7, 4)])
def test_five_bad_steps_in_a_row_end_the_run(toy, queuing, monkeypatch, first, last, kept):
    queuing()
    poisoned(monkeypatch, range(first, 100))
    with pytest.raises(ValueError, match=rf"5 steps in a row, up to {last},.*lower --lr"):
        train.main([*TOY, "--steps=50", "--eval_interval=4"])
    found = [r["skipped"] for r in records("out/gpt") if r["split"] == "train"]
    assert found == [0] * first + [1, 2, 3, 4, 5]
    state = checkpoints.load(Path("out/gpt/latest.pt"))
    assert state["step"] == kept
    assert all(t.isfinite().all() for t in state["model"].values())


def test_a_stop_reads_what_is_queued_before_it_saves(toy, queuing, monkeypatch):
    flags = [*TOY, "--steps=9", "--eval_interval=100", "--optimizer=adamw"]
    with monkeypatch.context() as patch:
        poisoned(patch, {2})
        train.main([*flags, "--out=whole"])
    queuing()
    with monkeypatch.context() as patch:
        poisoned(patch, {2})
        train.main([*flags, "--out=parts", "--stop_after=3"])
    assert len(losses("parts")) == 3
    assert checkpoints.load(Path("parts/latest.pt"))["skipped"] == 1
    train.main(["--resume", "--out=parts", "--stop_after=1"])
    train.main(["--resume", "--out=parts"])
    assert_same_run("whole", "parts")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adam", "muon"])
def test_the_state_of_an_optimizer_that_was_not_fused_goes_on(toy, queuing, name):
    """From a Mac, say. torch took its `fused` for ours, and met found_inf with an assertion."""
    flags = [*TOY, "--steps=4", f"--optimizer={name}", "--eval_interval=100"]
    queuing()
    train.main([*flags, "--out=whole"])
    train.main([*flags, "--out=parts", "--stop_after=2"])
    path = Path("parts/latest.pt")
    checkpoint = torch.load(path, weights_only=True)
    for one in optim.separate_states(checkpoint["optimizer"]).values():
        for group in one["param_groups"]:
            group |= {"fused": None, "lr": 7.0, "foreach": True} if "fused" in group else {}
            group.pop("decoupled_weight_decay", None)  # which torch 2.6 has not
    torch.save(checkpoint, path)
    train.main(["--resume", "--out=parts"])
    assert_same_run("whole", "parts")


@pytest.mark.parametrize("later", [False, True])
def test_a_step_is_read_when_the_next_is_queued(toy, queuing, monkeypatch, later):
    events, real = [], (train.Run.train_step, steps.Step.read, train.Run.evaluate)

    def train_step(self, *args):
        queued = real[0](self, *args)
        events.append(f"queue {self.step}")
        return queued

    def read(self, group):
        events.append(f"read {self.step}")
        return real[1](self, group)

    def evaluate(self):
        events.append("evaluate")
        return real[2](self)

    monkeypatch.setattr(train.Run, "train_step", train_step)
    monkeypatch.setattr(steps.Step, "read", read)
    monkeypatch.setattr(train.Run, "evaluate", evaluate)
    if later:
        queuing()
    train.main([*TOY, "--steps=5", "--eval_interval=3"])
    want = "queue 0, read 0, queue 1, read 1, queue 2, read 2, evaluate, queue 3, read 3, queue 4, "
    want += "read 4, evaluate"
    if later:
        want = "queue 0, queue 1, read 0, queue 2, read 1, read 2, evaluate, queue 3, queue 4, "
        want += "read 3, read 4, evaluate"
    assert ", ".join(events) == want


def test_measured_steps_are_waited_for(toy, queuing, monkeypatch):
    """--minutes would take the time of queuing for that of a step; and the run begins anew."""
    queuing()
    taken, reads, real = [], [], (train.Run.train_step, steps.Step.read)
    monkeypatch.setattr(
        train.Run, "train_step", lambda self, *a: taken.append(self.step) or real[0](self, *a)
    )
    monkeypatch.setattr(
        steps.Step, "read", lambda self, group: reads.append(self.step) or real[1](self, group)
    )
    run = new_run(*TOY, "--minutes=0.05")
    plan.fit_steps(run)
    assert reads == taken and len(taken) >= 4
    assert run.step == run.steps.skipped == 0 and not run.steps.queue
    assert all(torch.equal(v, run.data.batch(0)[k]) for k, v in run.batch(0).items())
    run.batch.close()


# ---- nobody waits --------------------------------------------------------------------------------

# What has to know a tensor's numbers before it can go on: on a GPU the host waits for them.
ASKS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique2"}
ASKS |= {"_unique2", "unique_consecutive", "unique_dim", "bincount", "repeat_interleave.Tensor"}


class Asked(TorchDispatchMode):
    """Notes such operations, and indices of bools, which are a nonzero."""

    def __init__(self):
        super().__init__()
        self.found, self.of_host_numbers = [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        bools = False
        if name.startswith(("index.", "index_put", "_index_put", "_unsafe_index")):
            bools = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        known = name in ASKS or name.rpartition(".")[0] in ASKS
        if (bools or known) and not self.of_host_numbers:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def asked_in_a_step(run: train.Run, monkeypatch) -> list[str]:
    real = train.count_targets

    def count_targets(batch: dict) -> dict:  # batches are the host's own
        asked.of_host_numbers = True
        found = real(batch)
        asked.of_host_numbers = False
        return found

    def batch(i: int) -> dict:
        asked.of_host_numbers = True
        found = run.data.batch(i)
        asked.of_host_numbers = False
        return found

    monkeypatch.setattr(train, "count_targets", count_targets)
    monkeypatch.setattr(run, "batch", batch)
    for step in range(3):
        run.step = step
        with Asked() as asked:
            run.train_step(0.1)
    return asked.found


@pytest.mark.parametrize("small", TOYS.values(), ids=TOYS)
def test_no_step_asks_for_a_number(toy_pairs, queuing, monkeypatch, small):
    """Of none of the tasks, with padding, dropout and a clipped gradient."""
    write_labelled(toy_pairs)
    queuing()
    run = new_run(*small, "--dropout=0.1", "--optimizer=adamw", "--clip=0.5")
    assert asked_in_a_step(run, monkeypatch) == []


def test_the_watch_sees_who_asks(toy, queuing, monkeypatch):
    """The test above must be able to fail: Muon waits for the norm, and all do without a queue."""
    assert asked_in_a_step(new_run(*TOY, "--optimizer=adamw"), monkeypatch)
    queuing()
    assert asked_in_a_step(new_run(*TOY, "--optimizer=muon"), monkeypatch)
    x = torch.arange(5)
    for ask in (
        lambda: x[x > 2],
        lambda: bool(x.all()),
        lambda: x.tolist()[0] if x[0] else x[1].item(),
        lambda: torch.equal(x, x),
        lambda: x.masked_select(x > 2),
        lambda: x.unique(),
        lambda: x.clone().__setitem__(x > 2, x[:2]),
    ):
        with Asked() as asked:
            ask()
        assert asked.found


def test_numbers_of_the_host_are_added_up_without_the_gpu(monkeypatch):
    sent = []

    def all_reduce(tensor, group):
        sent.append((tensor.device.type, tensor.dtype, group))
        tensor.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    group = Processes(0, 2, torch.device("cuda"), cpu_group="gloo's")
    assert group.all_reduce([1.5, 2]) == [3.0, 4.0]
    assert group.all_reduce([2**53 + 1], torch.int64) == [2 * (2**53 + 1)]
    assert sent == [("cpu", torch.float64, "gloo's"), ("cpu", torch.int64, "gloo's")]


# ---- a step that is not made ---------------------------------------------------------------------


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.Linear(13, 5))


def with_gradient(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        whole = torch.randn(p.shape)
        if sharding.is_divided(p):
            whole = sharding.as_rows(whole, p)
        p.grad = whole


@pytest.fixture
def alone_in_a_group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Processes(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("shard", ["", "optimizer", "model"])
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_skipped_step_leaves_no_trace(alone_in_a_group, queuing, name, shard, queued):
    """Neither in weights nor moments, nor in the number of steps that Adam's early means are
    divided by; and of whatever kind the norm is that is not finite."""
    if queued:
        queuing()
    found = []
    for norms in ([1.0, 2.0, 0.0], [math.nan, 1.0, math.inf, 2.0, -math.inf, 0.0]):
        model = two_layers()
        if shard == "model":
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        muon = sharding.DividedMuon if shard == "model" else optim.Muon
        optimizer = optim.make_optimizer(model, name, lr=0.1, muon=muon)
        if shard == "optimizer":
            optimizer = sharding.DividedOptimizer(optimizer, alone_in_a_group)
        done = 0
        for norm in norms:
            with_gradient(model, done)
            if not math.isfinite(norm):
                next(model.parameters()).grad.mul_(math.nan)
            steps.update(optimizer, torch.tensor(norm))
            done += math.isfinite(norm)
        state = optimizer.state_dict()
        found.append({**tensors(state), **model.state_dict()})
        found[-1] = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in found[-1].items()}
    assert_equal(*found)
    assert all(t.isfinite().all() for t in found[0].values())
    assert not torch.equal(found[0]["0.weight"], two_layers()[0].weight)


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.fixture
def no_waiting():
    """Within it torch raises an error where the host waits for the GPU, as far as torch knows."""
    assert torch.cuda.is_available()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("task,compiled", [("gpt", 0), ("bert", 0), ("seq2seq", 0), ("gpt", 1)])
def test_no_step_waits_for_the_gpu(toy_pairs, no_waiting, task, compiled):
    flags = [f for f in TOYS[task] if f != "--device=cpu"]
    flags += ["--optimizer=adamw", "--dropout=0.1", "--out=run", "--dtype=bf16"]
    config, sizes, _ = resolve([*flags, "--device=cuda", f"--compile={bool(compiled)}"])
    kernels.install(torch.device("cuda"))
    run = train.Run(config, sizes, None, Processes(0, 1, torch.device("cuda")))
    queued = [run.train_step(0.1) for run.step in range(6)]
    torch.cuda.synchronize()
    no_waiting()
    for run.step in range(6, 14):
        queued.append(run.train_step(0.1))
        assert math.isfinite(queued[-2].read(run.group)["loss"])
    run.batch.close()


@pytest.mark.parametrize("task", ["gpt", "bert", "seq2seq"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, ON_A_GPU])])
def test_a_gpu_logs_what_a_cpu_does(toy_pairs, queuing, monkeypatch, task, device):
    """And so does a CPU whose steps are queued, as those of a GPU are."""
    flags = [*TOYS[task], "--steps=9", "--eval_interval=4", "--dtype=fp32", "--optimizer=adamw"]
    flags += ["--no-compile", *["--preset=toy"] * (task == "gpt")]  # a GPU's own is another
    for name, place in (("one", "cpu"), ("two", device)):
        with monkeypatch.context() as patch:
            poisoned(patch, {2, 7})
            train.main([*flags, f"--device={place}", f"--out={name}"])
        torch.set_float32_matmul_precision("highest")  # `cpu.prepare` may have changed it
        if device == "cpu":
            queuing()
    one, two = records("one"), records("two")
    assert [(r["step"], r["split"], r.get("skipped")) for r in one] == [
        (r["step"], r["split"], r.get("skipped")) for r in two
    ]
    for split in ("train", "validation"):
        good = [i for i, loss in enumerate(losses("one", split)) if loss is not None]
        a, b = ([losses(name, split)[i] for i in good] for name in ("one", "two"))
        assert a == pytest.approx(b, abs=2e-3)
