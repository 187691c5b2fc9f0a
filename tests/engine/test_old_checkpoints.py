"""Checkpoints that older code wrote: they load, answer as they did, and go on to the same numbers.

old_checkpoints/ has, of every task, the latest.pt of a run that was interrupted after 4 of its 8
steps (packed by xz) and its data; expected.json says what the code that wrote them answered, and
what it logged where the run was not interrupted. With the same torch on the same kind of processor
the numbers are equal to the last bit; elsewhere, sums are rounded in another order.
"""

import json
import lzma
import math
from pathlib import Path

import pytest
import torch

import sample
import train

FOLDER = Path(__file__).parent / "old_checkpoints"
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
MADE_WITH = EXPECTED.pop("made_with")
ALL = pytest.mark.parametrize("name", EXPECTED)


def here() -> list:
    """What the last bit of a sum depends on: threads, torch, and the processor."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.is_file() else []
    kind = torch.backends.cpu.get_cpu_capability()
    return [torch.get_num_threads(), torch.__version__, kind, *lines[1:6]]


def assert_same(found: dict, wanted: dict) -> None:
    tolerance = 0.0 if here() == MADE_WITH else 1e-5
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert math.isclose(found[key], value, rel_tol=tolerance), (key, found[key], value)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run's name -> its folder, in a working folder that has the data."""
    monkeypatch.chdir(tmp_path)
    for path in FOLDER.iterdir():
        if path.suffix != ".xz":  # Git may have changed its line ends, which the data's hash sees
            (tmp_path / path.name).write_bytes(path.read_bytes().replace(b"\r\n", b"\n"))

    def unpack(name: str) -> Path:
        folder = Path("out") / name
        folder.mkdir(parents=True)
        packed = (FOLDER / f"{name}.pt.xz").read_bytes()
        (folder / "latest.pt").write_bytes(lzma.decompress(packed))
        return folder

    return unpack


def test_every_task_is_there():
    tasks = "gpt bert seq2seq classify tag answer similar complete"
    assert {expected["task"] for expected in EXPECTED.values()} == {*tasks.split()}
    assert {path.name.partition(".")[0] for path in FOLDER.glob("*.xz")} == {*EXPECTED}


@ALL
def test_an_old_checkpoint_answers_as_it_did(run, capsys, name):
    folder, wanted = run(name), EXPECTED[name]["sample"]
    sample.main(["--checkpoint", str(folder / "latest.pt"), *wanted["flags"]])
    assert capsys.readouterr().out == wanted["stdout"]


@pytest.mark.slow
@ALL
def test_an_old_run_is_resumed_to_the_same_end(run, name):
    folder, expected = run(name), EXPECTED[name]
    train.main(expected["resume"])
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = {"train": {}, "validation": {}}
    for record in map(json.loads, lines):
        record.pop("tokens_per_s", None)
        records[record.pop("split")][record.pop("step")] = record
    assert [*records["train"]] == [5, 6, 7, 8] and [*records["validation"]] == [8]
    for step, wanted in expected["losses"].items():
        assert_same(records["train"][int(step)], wanted)
    assert_same(records["validation"][8], expected["validation"])
    end = torch.load(folder / "latest.pt", weights_only=True)
    assert end["task"] == expected["task"] and end["step"] == 8
    assert_same({"best": end["best"]}, {"best": expected["best"]})
    assert (folder / "best.pt").is_file()
