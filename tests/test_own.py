"""The files of docs/your-own.md, added to a copy of the repository: one file and one row each are
enough to train, to resume, to sample, to plan, and to hear from export what it does not know."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, TOY, write_texts

PAGE = (ROOT / "docs" / "your-own.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n# (\S+?\.py)([^\n]*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository with the page's files in it, and nothing else changed but the table's rows."""
    folder = tmp_path_factory.mktemp("own") / "copy"
    ignored = shutil.ignore_patterns(".*", "out", "cache", "tests", "docs", "__pycache__", "lab")
    shutil.copytree(ROOT, folder, ignore=ignored)
    table = folder / "tasks" / "__init__.py"
    for name, where, code in BLOCKS:
        if where:  # "in TABLE"
            text = table.read_text(encoding="utf-8")
            start = "TABLE = {\n"
            assert text.count(start) == 1
            table.write_text(text.replace(start, start + code), encoding="utf-8")
        else:
            assert not (folder / name).exists()
            (folder / name).write_text(code, encoding="utf-8")
    write_texts(folder)
    return folder


# Runs one command of the scripts after the other in one process, since each would take seconds to
# load torch: a line of JSON [script, *flags] becomes one of [exit status, output, errors].
SERVER = """
import contextlib, io, json, sys
import convert, sample, train
from engine import cli

mains = {"train.py": train.main, "sample.py": sample.main, "convert.py": convert.main}
for line in sys.stdin:
    (script, *flags), out, error, status = json.loads(line), io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            cli.run(lambda _: mains[script](flags))
        except SystemExit as stop:
            status = stop.code or 0
    if isinstance(status, str):  # as Python itself does it
        error.write(status + "\\n")
        status = 1
    print(json.dumps([status, out.getvalue(), error.getvalue()]), flush=True)
"""


def start(folder: Path, code: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
    )


@pytest.fixture(scope="module")
def run(copy) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """run("train.py", *flags) -> exit status, output and errors of a command in the copy."""
    with start(copy, SERVER) as server:

        def one(*words: str) -> tuple[int, str, str]:
            server.stdin.write(json.dumps(words) + "\n")
            server.stdin.flush()
            return tuple(json.loads(server.stdout.readline()))

        yield one
        server.stdin.close()


@pytest.fixture
def succeed(run) -> Callable[..., str]:
    """The same, which must succeed -> output."""

    def one(*words: str) -> str:
        status, out, error = run(*words)
        assert status == 0, error
        return out

    return one


def test_the_page_has_a_network_a_task_and_a_row_for_each():
    files = [name for name, where, _ in BLOCKS if not where]
    assert files == ["models/rotary.py", "tasks/sorting.py"]
    assert [name for name, where, _ in BLOCKS if where] == ["tasks/__init__.py"] * 2


@pytest.mark.slow
def test_a_network_of_ones_own(run, succeed):
    flags = ["--model=rotary", *TOY, "--steps=6", "--out=out/rotary"]
    assert "stopped after step 3" in succeed("train.py", *flags, "--stop_after=3")
    out = succeed("train.py", "--resume", "--out=out/rotary", "--stop_after=0")
    assert "best validation loss" in out
    checkpoint = "--checkpoint=out/rotary/best.pt"
    long = ["--max_new_tokens=40", "--device=cpu"]  # beyond the window of 16
    assert succeed("sample.py", checkpoint, "--prompt=3 times", *long).startswith("3 times")
    assert "bits_per_byte" in succeed("sample.py", checkpoint, "--eval=toy.txt")
    assert "total" in succeed("train.py", *flags, "--dry_run")
    status, _, error = run("convert.py", "export", "out/rotary/best.pt", "--to=theirs")
    assert status and error.count("\n") == 1
    assert error.startswith("error: the task 'rotary' is not known to Hugging Face")


@pytest.mark.slow
def test_a_cache_changes_nothing_for_a_network_of_ones_own(copy):
    code = """
import torch
from models.rotary import Rotary
torch.manual_seed(0)
net = Rotary(Rotary.Config(vocab_size=40, block_size=9, n_layer=2, n_head=2, n_embd=24)).eval()
x, caches = torch.randint(40, (3, 9)), net.make_caches()
parts = [net.features(x[:, a:b], caches=caches) for a, b in ((0, 4), (4, 5), (5, 9))]
torch.testing.assert_close(torch.cat(parts, 1), net.features(x))
"""
    with start(copy, code) as process:
        assert process.wait(300) == 0


@pytest.mark.slow
def test_a_task_of_ones_own(run, succeed):
    flags = ["--model=sorting", "--n_layer=1", "--n_embd=16", "--n_head=1", "--device=cpu"]
    flags += ["--steps=6", "--eval_interval=2", "--batch_size=8", "--tokens_per_step=128"]
    flags += ["--out=out/sorting"]
    assert "stopped after step 3" in succeed("train.py", *flags, "--stop_after=3")
    out = succeed("train.py", "--resume", "--out=out/sorting")
    assert "best validation accuracy" in out and "31415926 -> " in out
    checkpoint = "--checkpoint=out/sorting/best.pt"
    assert "27182818 -> " in succeed("sample.py", checkpoint, "--prompt=27182818")
    assert "accuracy" in succeed("sample.py", checkpoint, "--eval=digits")
    assert "total" in succeed("train.py", *flags, "--dry_run", "--world=2")
    _, _, error = run("sample.py", checkpoint, "--prompt=12")
    assert error.endswith("error: '12' cannot be sorted: give 8 digits, as in training\n")
    _, _, error = run("convert.py", "export", "out/sorting/best.pt", "--to=theirs")
    assert error.startswith("error: the task 'sorting' is not known to Hugging Face")
    assert "--digits" not in succeed("train.py", "--model=sorting", "--help")
