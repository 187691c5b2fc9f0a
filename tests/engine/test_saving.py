"""saving.py: the folder of a run belongs to one process at a time."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TOY

import train
from engine import saving

pytestmark = pytest.mark.skipif(saving.fcntl is None, reason="no locks here")
REFUSED = "run holds a run that is still training: wait for it or end it, or choose another --out"


def test_a_run_that_is_training_is_not_resumed(toy, monkeypatch):
    """Two processes wrote their checkpoints and their logs over each other's."""
    real, tried = train.Run.train_step, []

    def train_step(self, *args):
        if self.step == 3 and not tried:
            for flags in (["--resume", "--out=run"], [*TOY, "--out=run"]):
                with pytest.raises(ValueError, match=r"run (holds a run that is still|already)"):
                    tried.append(1) or train.main(flags)
        return real(self, *args)

    monkeypatch.setattr(train.Run, "train_step", train_step)
    train.main([*TOY, "--steps=4", "--out=run"])
    assert len(tried) == 2 and not Path("run", saving.LOCK).exists()
    train.main(["--resume", "--out=run"])


def test_two_runs_that_begin_in_one_folder_at_once_are_one(toy):
    Path("run").mkdir()
    with (
        saving.locked(Path("run")),
        pytest.raises(ValueError, match=REFUSED),
    ):
        train.main([*TOY, "--steps=1", "--out=run"])
    train.main([*TOY, "--steps=1", "--out=run"])


@pytest.mark.slow
def test_a_killed_process_frees_its_run(toy):
    Path("run").mkdir()
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from engine import saving
with saving.locked(Path("run")):
    print("locked", flush=True)
    time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match=REFUSED):
            train.main([*TOY, "--steps=1", "--out=run"])
        other.send_signal(signal.SIGKILL)
    assert [p.name for p in Path("run").iterdir()] == [saving.LOCK]
    train.main([*TOY, "--steps=1", "--out=run"])


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), None])
def test_where_there_are_no_locks_a_run_trains_all_the_same(toy, monkeypatch, error):
    def flock(*args):
        raise error

    if error:
        monkeypatch.setattr(saving.fcntl, "flock", flock)
    else:
        monkeypatch.setattr(saving, "fcntl", None)
    train.main([*TOY, "--steps=1", "--out=run"])
    assert Path("run/best.pt").is_file() and not Path("run", saving.LOCK).exists()
