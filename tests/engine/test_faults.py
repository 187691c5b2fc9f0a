"""What happens to long runs: killed, interrupted, hung and restarted processes, full disks, damaged
files. Nothing may be lost but the steps since the last checkpoint."""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOY
from test_train import assert_equal, losses, weights

import train
from engine import checkpoint as checkpoints
from engine.config import resolve
from engine.logs import RunLog, read_log

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc of Linux"),
]
LONG = [*TOY, "--steps=100000", "--eval_interval=50", "--log_interval=50", "--tokens_per_step=256"]


@pytest.fixture
def killed(toy_pairs, tmp_path):
    """tests/kills.py, run in a folder with toy texts."""

    def run(*arguments: str) -> dict:
        path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "kills.py"), *arguments],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            encoding="utf-8",
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bits(killed):
    """Weights, optimizer, best.pt and log. `python tests/kills.py training 100` does more of it."""
    found = killed("training", "3", "7")
    assert found["equal"] == found["trials"] == 3, found
    assert found["kills"] >= 3, found


def test_a_process_killed_while_it_saves_leaves_a_checkpoint_that_loads(killed):
    found = killed("saving", "100", "7")
    assert found["loadable"] == found["trials"] == 100, found
    assert found["saved"] > 20, found


# ---- files ---------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int):
    """A write beyond `size` fails as on a full disk, with another number."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def room_for_weights_alone(toy: Path) -> int:
    train.main([*TOY, "--steps=8", "--out=whole"])
    size = (toy / "whole" / "best.pt").stat().st_size
    assert 2 * size < (toy / "whole" / "latest.pt").stat().st_size
    return size + 20_000


def test_a_full_disk_costs_a_line_and_no_step(toy, capsys, monkeypatch):
    real, limit = train.Run.train_step, room_for_weights_alone(toy)
    with largest_file(limit) as lift:

        def roomy_from_step_five(self, *args):
            if self.step == 4:
                kept = checkpoints.load(Path("full/latest.pt"))
                assert kept["step"] == 0 and checkpoints.load(Path("full/best.pt"))["step"] == 4
                assert not list(Path("full").glob("*.part"))
                lift()
            return real(self, *args)

        monkeypatch.setattr(train.Run, "train_step", roomy_from_step_five)
        train.main([*TOY, "--steps=8", "--out=full"])
    said = capsys.readouterr().out
    assert said.count("full/latest.pt is not written (File too large): older ones are kept") == 2
    for name in ("latest.pt", "best.pt"):
        assert_equal(weights(Path("whole") / name), weights(Path("full") / name))
    assert losses("whole") == losses("full")


def test_a_best_that_was_not_written_is_not_the_best(toy, capsys, monkeypatch):
    real = checkpoints.save

    def save(path, *args):
        if path.name == "best.pt" and args[0]["step"] == 4:
            raise OSError(28, "No space left on device")
        real(path, *args)

    monkeypatch.setattr(checkpoints, "save", save)
    train.main([*TOY, "--steps=4", "--lr=0.02"])
    evaluations = losses("out/gpt", "validation")
    assert evaluations[1] < evaluations[0]
    best, latest = (checkpoints.load(Path(f"out/gpt/{n}.pt")) for n in ("best", "latest"))
    assert best["step"] == 2 and latest["step"] == 4
    assert best["best"] == latest["best"] == evaluations[0]


def test_a_run_that_ends_on_a_full_disk_says_what_is_not_saved(toy, capsys):
    limit = room_for_weights_alone(toy)
    with largest_file(limit):
        with pytest.raises(ValueError, match=r"all 4 steps are done, but the last .* not saved"):
            train.main([*TOY, "--steps=4", "--out=full"])
        with pytest.raises(ValueError, match=r"stopped after step 1, which is not saved"):
            train.main([*TOY, "--steps=4", "--out=other", "--stop_after=1"])
    train.main(["--resume", "--out=full"])
    assert checkpoints.load(Path("full/latest.pt"))["step"] == 4
    with (
        largest_file(3000),
        pytest.raises(ValueError, match="none cannot hold a checkpoint: choose another --out"),
    ):
        train.main([*TOY, "--steps=4", "--out=none", "--no-compile"])


def test_a_log_without_room_waits_for_it(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 100, 8)
    records = [{"step": i, "split": "train", "loss": i / 7, "lr": 0.1} for i in range(1, 101)]
    with largest_file(1500) as lift:
        for i, record in enumerate(records):
            if i == 70:
                assert len(read_log(tmp_path / "log.jsonl")) < 60
                lift()
            log.train(record, write=True)
    log.close()
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == list(range(1, 101))
    assert capsys.readouterr().out.count("log.jsonl cannot be written (File too large)") == 1


def test_every_flipped_bit_is_found_or_harmless(tmp_path):
    """Most bytes of a zip archive are covered by its checksums, the others are padding."""
    state = {k: kind() for k, kind in checkpoints.KEYS.items()}
    state |= {"format": checkpoints.FORMAT, "task": "gpt", "model": {"w": torch.arange(50.0)}}
    path, found = tmp_path / "latest.pt", 0
    checkpoints.save(path, state)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            got = checkpoints.load(path)
        except ValueError as error:
            assert "\n" not in str(error)
            found += 1
            continue
        assert torch.equal(got.pop("model")["w"], state["model"]["w"])
        assert got == {k: v for k, v in state.items() if k != "model"}
    assert found > 0.6 * len(whole)


def in_the_weights(path: Path) -> int:
    """Of a saved run, a place within the numbers of a tensor."""
    weight = weights(path)["token_embedding.weight"]
    return path.read_bytes().index(weight.numpy().tobytes()) + 1001


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(toy, capsys, fault):
    flags = [*TOY, "--steps=6"]
    train.main([*flags, "--out=whole"])
    train.main([*flags, "--out=parts", "--stop_after=4"])
    path = Path("parts/latest.pt")
    damaged = bytearray(path.read_bytes())
    damaged[in_the_weights(path)] ^= 4
    if fault == "truncated":
        path.write_bytes(damaged[:-700])
    elif fault == "flipped":
        path.write_bytes(damaged)
    else:  # killed between the two renamings of a save
        path.unlink()
    with pytest.raises(ValueError, match=r"truncated|checksum|there is no checkpoint"):
        checkpoints.load(path)
    train.main(["--resume", "--out=parts", "--stop_after=1"])
    assert "; going on from previous.pt, which is of step 4" in capsys.readouterr().out
    # The damaged file is not what the next save keeps.
    assert checkpoints.load(Path("parts/previous.pt"))["step"] == 4
    train.main(["--resume", "--out=parts"])
    assert_equal(weights(Path("whole/latest.pt")), weights(path))
    assert losses("whole") == losses("parts")


def test_where_both_are_damaged_the_latest_is_named(toy):
    train.main([*TOY, "--steps=2"])
    for name in ("latest.pt", "previous.pt"):
        path = Path("out/gpt") / name
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"latest\.pt is truncated"):
        train.main(["--resume"])


# ---- restarts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT"])
def test_a_repeated_command_goes_on_with_its_run(toy, monkeypatch, by):
    train.main([*TOY, "--steps=2", "--out=first"])
    flags = ["--init=first/best.pt", "--data=toy.txt", "--steps=4", "--out=run", "--device=cpu"]
    flags += ["--eval_interval=2", "--batch_size=4", "--tokens_per_step=64"]
    train.main([*flags, "--stop_after=3"])
    with pytest.raises(ValueError, match="run already holds a run: add --resume"):
        train.main(flags)
    monkeypatch.setenv(by, "1")
    train.main(flags)
    assert checkpoints.load(Path("run/latest.pt"))["step"] == 4
    train.main([*TOY, "--steps=1", "--out=new"])  # killed before it had a folder: from the start
    assert checkpoints.load(Path("new/latest.pt"))["step"] == 1


def test_repeated_commands_need_a_name_for_the_run(toy, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match=r"torchrun .--max-restarts.* run's folder with --out"):
        train.main([*TOY, "--steps=1"])
    assert resolve([*TOY, "--out=run"])[0].resume is False


# ---- signals, several processes ------------------------------------------------------------------


@contextmanager
def launched(processes: int, *flags: str, restarts: int = 0):
    """torchrun at work; it leads a process group, so that a test that fails leaves nothing."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    with subprocess.Popen(
        [*command, str(ROOT / "train.py"), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as running:
        try:
            yield running
        finally:
            for pid in (running.pid, *ranks(flags)):
                if running.poll() is None or pid != running.pid:
                    os.kill(pid, signal.SIGKILL)


def ranks(flags: tuple[str, ...]) -> list[int]:
    """Process numbers of those who train with these flags, in the order of their ranks."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode().split("\0")[:-1]
            environment = (folder / "environ").read_bytes().decode().split("\0")
        except OSError:  # it has just ended
            continue
        place = [v.removeprefix("RANK=") for v in environment if v.startswith("RANK=")]
        here = (folder / "cwd").resolve() == Path.cwd()
        if command[-len(flags) :] == list(flags) and place and here:
            found[int(place[0])] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def wait_for(running: subprocess.Popen, begin: str) -> str:
    said = ""
    for line in running.stdout:
        said += line
        if line.startswith(begin):
            return said
    raise AssertionError(f"no line {begin!r} in {said}{running.stderr.read()}")


@pytest.mark.parametrize(
    "number,to", [(signal.SIGINT, "torchrun"), (signal.SIGTERM, "one"), (signal.SIGTERM, "all")]
)
def test_interrupted_processes_save_and_leave_no_orphans(toy, number, to):
    flags = (*LONG, "--out=run")
    with launched(2, *flags) as running:
        wait_for(running, "step ")
        pids = {"torchrun": [running.pid], "one": ranks(flags)[1:], "all": ranks(flags)}[to]
        assert len(pids) == (2 if to == "all" else 1)
        for pid in pids:
            os.kill(pid, number)
        rest, error = running.communicate(timeout=60)
        assert ranks(flags) == []
    assert "and saved; go on with" in rest
    if to != "torchrun":  # which ends in a traceback of its own
        assert running.returncode == 0 and "Traceback" not in error, error
    stopped = checkpoints.load(Path("run/latest.pt"))["step"]
    train.main(["--resume", "--out=run", "--stop_after=1"])
    assert checkpoints.load(Path("run/latest.pt"))["step"] == stopped + 1


def test_a_killed_rank_is_restarted_from_the_checkpoint_with_the_same_result(toy):
    flags = [*TOY, "--steps=80", "--eval_interval=20", "--tokens_per_step=256"]
    with launched(2, *flags, "--out=whole") as running:
        running.communicate(timeout=120)
    assert running.returncode == 0
    with launched(2, *flags, "--out=killed", restarts=1) as running:
        wait_for(running, "step 40/80  validation")
        os.kill(ranks((*flags, "--out=killed"))[1], signal.SIGKILL)
        rest, error = running.communicate(timeout=120)
    assert running.returncode == 0, error
    assert re.search(r"steps  80 .*, [24]0 of them done", rest), rest
    assert "another process ended: see what it said" in error
    for name in ("latest.pt", "best.pt"):
        assert_equal(weights(Path("whole") / name), weights(Path("killed") / name))
    assert losses("whole") == losses("killed")


def test_a_stopped_rank_is_named_and_the_others_end(toy):
    flags = (*LONG, "--out=run", "--timeout=0.05")
    with launched(2, *flags) as running:
        wait_for(running, "step ")
        stopped = ranks(flags)[1]
        os.kill(stopped, signal.SIGSTOP)
        start = time.monotonic()
        for line in running.stderr:
            if line.startswith("error: "):
                break
        os.kill(stopped, signal.SIGCONT)  # torchrun would kill it, but only after half a minute
        assert "error: rank 1 of 2 gives no sign of life" in line
        assert re.search(r"rank 0 has waited 3 seconds at step [\d,]+ \([a-z ]+\)", line)
        assert "--timeout" in line and "--resume" in line
        assert time.monotonic() - start < 30
        running.communicate(timeout=60)
        assert ranks(flags) == [] and running.returncode != 0
    train.main(["--resume", "--out=run", "--stop_after=1"])


# ---- numbers -------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_by_all(toy):
    script = Path("poison.py")
    script.write_text(
        """
import os, sys
import torch
import train

real, calls = train.gradients, iter(range(100))

def gradients(model, *args):
    poisons = next(calls) == 1 and os.environ["RANK"] == "1"
    weight = next(model.parameters())
    hook = weight.register_hook(lambda g: g * float("nan") if poisons else g)
    try:
        return real(model, *args)
    finally:
        hook.remove()

train.gradients = gradients
train.closing.show_results = lambda run: None
real_fit = train.fit

def fit(run):
    done = real_fit(run)
    with torch.no_grad():
        total = sum(p.double().sum() for p in run.model.parameters())
    line = f"rank {run.group.rank} skipped {run.steps.skipped} sum {float(total):.17g}\\n"
    os.write(1, line.encode())  # in one piece
    return done

train.fit = fit
train.main(sys.argv[1:])
""",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(script), *TOY, "--steps=4"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2 skipped: its gradient is not finite") == 1
    sums = re.findall(r"rank (\d) skipped 1 sum (\S+)", done.stdout)
    assert {rank for rank, _ in sums} == {"0", "1"} and len({total for _, total in sums}) == 1
    assert math.isfinite(float(sums[0][1]))
    assert all(t.isfinite().all() for t in weights(Path("out/gpt/latest.pt")).values())
