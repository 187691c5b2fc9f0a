"""waiting.py: threads sleep at once where others are at work, and that is known before torch is."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from engine import waiting


@pytest.fixture
def environment(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return os.environ


@pytest.mark.parametrize("cores,chosen", [(0.0, None), (0.3, None), (0.9, "0"), (2.0, "0")])
def test_others_decide(cores, chosen, environment, monkeypatch):
    monkeypatch.setattr(waiting, "taken_by_others", lambda: cores)
    waiting.choose()
    assert environment.get("GOMP_SPINCOUNT") == chosen


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_has_chosen_stays(name, environment, monkeypatch):
    environment[name] = "17"
    monkeypatch.setattr(waiting, "taken_by_others", lambda: 8.0)
    waiting.choose()
    assert environment.get("GOMP_SPINCOUNT") == ("17" if name == "GOMP_SPINCOUNT" else None)


def test_the_time_of_others_is_all_but_ones_own(tmp_path, monkeypatch):
    """100 ticks a second: in 0.1 s of two cores at work, one of them for this process."""
    stat, rate = tmp_path / "stat", os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(
        os, "sched_getaffinity", lambda process: {0, 2}
    )  # another may do as it likes

    def write(first, second, third):
        lines = (f"cpu{i} {n} 90 30 4000 50 0 6" for i, n in enumerate((first, second, third)))
        stat.write_text("cpu  9 9 9 9\n" + "\n".join(lines) + "\nintr 17 4\n", encoding="ascii")

    write(100, 0, 50)
    monkeypatch.setattr(waiting, "STAT", stat)
    clock = iter([0.0, 0.1, 5.0, 5.1])
    monkeypatch.setattr(waiting.time, "process_time", lambda: next(clock))
    monkeypatch.setattr(waiting.time, "perf_counter", iter([0.0, 0.1, 0.0, 0.1]).__next__)

    def sleep(seconds):
        write(100 + round(0.1 * rate), 10**6, 50 + round(0.1 * rate))

    monkeypatch.setattr(waiting.time, "sleep", sleep)
    assert waiting.taken_by_others() == pytest.approx(1.0)
    monkeypatch.setattr(waiting, "STAT", tmp_path / "none")
    assert waiting.taken_by_others() == 0.0


@pytest.mark.parametrize("script", ["train", "sample"])
def test_it_comes_before_torch(script):
    both = "('torch', 'engine.waiting')"
    code = f"import sys, {script}; print(*(m for m in sys.modules if m in {both}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    assert run.stdout.split() == ["engine.waiting", "torch"]
