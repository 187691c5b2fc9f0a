"""lab/runs.py: each of its measures, with a tiny model."""

import json

import pytest

from lab import runs

pytestmark = pytest.mark.slow


def test_every_measure_is_taken(toy, capsys, monkeypatch):
    monkeypatch.setattr(runs, "SMALL", [*runs.SMALL, "--data=toy.txt"])
    runs.main(["--small", "--repeats=1", "--steps=6"])
    *sentences, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert sentences[-3].startswith("two processes ") and sentences[-1].endswith(" bytes")
    one, two = found["scaling"]["one"], found["scaling"]["two"]
    assert found["scaling"]["ratio"] == pytest.approx(two / one) and one > 0
    # At the start; then twice, best.pt and latest.pt.
    assert found["saving"]["saves"] == 5 and 0 < found["saving"]["share"] < 1
    assert found["resuming"]["bytes"] > 10_000 and 0 < found["resuming"]["seconds"] < 120


def test_a_measure_that_does_not_exist_is_refused(toy):
    with pytest.raises(ValueError, match=r"--only speed is not known: choose scaling, saving"):
        runs.main(["--only=speed"])
