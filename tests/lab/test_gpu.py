"""lab/gpu.py: a rehearsal of all its parts, what stops a part, and the page that it fills."""

import importlib.util
import json
import re
import subprocess
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import config as inductor

import sample
import train
from lab import bench, gpu

CARD = {"rehearsal": False, "card": "A card", "date": "2026-01-02", "versions": {"torch": "2.11"}}


def found_of(*rows: dict) -> dict:
    return {**CARD, "parts": {"one": {"status": "ran", "seconds": 1.0, "rows": list(rows)}}}


MAINS = {"train.py": train.main, "sample.py": sample.main, "lab.bench": bench.main}


def start(command: list[str], stdout, **options):
    """A process, or what looks like one that has ended: most commands run here, where torch is
    loaded already. Graphs of training are not turned into C++ then: test_compile.py does that."""
    script, *words = [word for word in command[1:] if word != "-m"]
    if script not in MAINS:
        return subprocess.Popen(command, stdout=stdout, **options)
    with (
        pytest.MonkeyPatch.context() as patch,
        inductor.patch({"cpp.simdlen": 1}),
        redirect_stdout(stdout),
        redirect_stderr(stdout),
    ):
        if script == "train.py":
            patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        MAINS[script](words)
    return SimpleNamespace(poll=lambda: 0, returncode=0)


@pytest.mark.slow
def test_a_rehearsal_runs_every_part(tmp_path, monkeypatch, capsys):
    """Of the GPU's tests it finds those of one file: .ci/run collects them all."""
    monkeypatch.chdir(gpu.ROOT)
    monkeypatch.setenv("PYTEST_ADDOPTS", "tests/test_train.py")
    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(Popen=start, STDOUT=subprocess.STDOUT))
    gpu.main(["--rehearse", f"--out={tmp_path / 'gpu'}"])
    said = capsys.readouterr().out
    assert "left out: nothing" in said and "has not run" in said
    found = json.loads((tmp_path / "gpu" / "gpu.json").read_text(encoding="utf-8"))["parts"]
    assert {part["status"] for part in found.values()} == {"ran"}
    rows = {row["what"]: row for part in found.values() for row in part["rows"]}
    assert all(row["measured"] for row in rows.values())
    for name in ("--shard model, compiled, one rank", "--shard optimizer, one rank"):
        assert float(re.search(r"by (\S+)", rows[name]["measured"])[1]) < 1e-5
    assert rows["train.py, GPT 2 layers, T 32, with a stop"]["beside"].startswith("each step once")
    pairs = found["pairs"]["rows"][0]["beside"]
    scores = ["exact match", *["BLEU", "chrF2"] * bool(importlib.util.find_spec("sacrebleu"))]
    assert all(pairs.count(f"; {name} ") == 1 for name in scores)
    log = (tmp_path / "gpu" / "gpu.log").read_text(encoding="utf-8")
    assert "going on without it" not in log and log.count("$ python ") >= len(found)


STUCK = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
print(subprocess.Popen(sleep, start_new_session=True).pid, flush=True)  # as torchrun does it
time.sleep(60)
"""


def runs(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def has_ended(pid: str) -> bool:
    """After ten seconds at most."""
    end = time.monotonic() + 10
    while runs(pid) and time.monotonic() < end:
        time.sleep(0.1)
    return not runs(pid)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc: not Linux")
def test_a_part_is_stopped_with_all_that_it_started_and_the_others_go_on(tmp_path):
    def read(folder, said):
        return [gpu.row("what", said.splitlines()[-1])]

    wrong, right = [["-c", "raise SystemExit(3)"], ["-c", "print(1)"]], [["-c", "print(42)"]]
    parts = [("stuck", 6, [["-c", STUCK]]), ("wrong", 9, wrong), ("right", 9, right)]
    session = gpu.Session(tmp_path, 1.0)
    session.run([gpu.Part(*part, read, alone=False) for part in parts])
    assert session.found["right"]["rows"] == [gpu.row("what", "42")]
    assert session.found["wrong"]["status"].startswith("failed with status 3: -c raise")
    assert session.found["stuck"]["status"] == "stopped after 6 s"
    assert has_ended(session.found["stuck"]["rows"][0]["measured"])
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert written["parts"] == session.found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc: not Linux")
def test_what_is_under_way_ends_with_the_script(tmp_path):
    session = gpu.Session(tmp_path, 1.0)
    steps = session.commands_of(
        gpu.Part("stuck", 60, [["-c", STUCK]], lambda *_: []), time.monotonic(), False
    )
    next(steps)
    while not (pid := (tmp_path / "stuck.log").read_text(encoding="utf-8").split()[-1]).isdigit():
        next(steps)
        time.sleep(0.1)
    assert runs(pid)
    steps.close()
    assert has_ended(pid)


def test_without_time_a_part_does_not_begin(tmp_path):
    session = gpu.Session(tmp_path, 0.01)
    session.run([gpu.Part("late", 9, [["-c", "print(1)"]], lambda *_: [])])
    assert session.found["late"]["status"] == "no time was left"


def test_a_row_has_ours_its_bound_and_the_fastest_peer():
    def figures(rate, **more):
        return {"seconds": 1 / rate, "middle_half": [0, 1], "rate": rate, "ratio": 1.0, **more}

    contestants = {
        "ours": figures(3000.0, MFU=0.456),
        "ours, otherwise": figures(2000.0),
        "the bare products": figures(9000.0),
        "Hugging Face": figures(1000.0),
        "Hugging Face, static": figures(1500.0),
    }
    row = gpu.row_of({"title": "a step", "unit": "tokens", "contestants": contestants})
    assert row == gpu.row(
        "a step",
        "3,000 tokens/s",
        "45.6% MFU",
        "2.00 x Hugging Face, static (1,500); ours, otherwise 2,000",
    )


def test_the_page_takes_new_figures_and_keeps_the_others():
    page = "text\n\n| what | measured |\n|---|---|\n| a | open |\n| b | 7 |\n\n| c | other |\n"
    filled = gpu.fill(found_of(gpu.row("a", "5", "", "x"), gpu.row("c", "6")), page)
    assert filled.splitlines()[4:8] == [
        "| a | 5 |  | x | A card, torch 2.11 | 2026-01-02 |",
        "| b | 7 |",
        "| c | 6 |  |  | A card, torch 2.11 | 2026-01-02 |",
        "",
    ]
    assert gpu.fill(found_of(gpu.row("a", "5", "", "x")), filled) == filled


def test_the_page_has_rows_of_every_part():
    page = gpu.PAGE.read_text(encoding="utf-8")
    begin = page.index("| what | measured")
    rows = page[begin : page.index("\n\n", begin)]
    for words in ("pytest", "first run", "--shard model", "product", "train.py, GPT", "copy of"):
        assert f"{words}" in rows
    for words in ("step, GPT", "prefill", "decoding", "step, BERT", "encoder-decoder"):
        assert words in rows
    for words in ("translating", "optimizer step", "shakespeare-10min", "multi30k-gpu"):
        assert words in rows


def test_a_rehearsal_does_not_fill_the_page(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({**found_of(), "rehearsal": True}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"is of a rehearsal: the page has figures of a card"):
        gpu.main([f"--fill={path}"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_cannot_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="torch sees no GPU here: add --rehearse"):
        gpu.main([f"--out={tmp_path / 'new'}"])
    with pytest.raises(ValueError, match="--only speed is not known: choose from tests, first"):
        gpu.main(["--rehearse", "--only=tests,speed", f"--out={tmp_path / 'new'}"])
    with pytest.raises(ValueError, match="nowhere does not exist: give what is there"):
        gpu.main(["--rehearse", "--data=nowhere"])
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="is not empty, and nothing is written over"):
        gpu.main(["--rehearse", f"--out={tmp_path}"])
