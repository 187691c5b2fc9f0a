"""The files of docs/your-own.md, added to a copy of the repository: one file and one row each are
enough to train, to resume, to sample, to plan, and to hear from export what it does not know."""

import os
import re
import shutil
import subprocess
import sys
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


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def succeed(folder: Path, *words: str) -> str:
    done = run(folder, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_has_a_network_a_task_and_a_row_for_each():
    files = [name for name, where, _ in BLOCKS if not where]
    assert files == ["models/rotary.py", "tasks/sorting.py"]
    assert [name for name, where, _ in BLOCKS if where] == ["tasks/__init__.py"] * 2


@pytest.mark.slow
def test_a_network_of_ones_own(copy):
    flags = ["--model=rotary", *TOY, "--steps=6", "--out=out/rotary"]
    assert "stopped after step 3" in succeed(copy, "train.py", *flags, "--stop_after=3")
    out = succeed(copy, "train.py", "--resume", "--out=out/rotary", "--stop_after=0")
    assert "best validation loss" in out
    checkpoint = "--checkpoint=out/rotary/best.pt"
    long = ["--max_new_tokens=40", "--device=cpu"]  # beyond the window of 16
    assert succeed(copy, "sample.py", checkpoint, "--prompt=3 times", *long).startswith("3 times")
    assert "bits_per_byte" in succeed(copy, "sample.py", checkpoint, "--eval=toy.txt")
    assert "total" in succeed(copy, "train.py", *flags, "--dry_run")
    failed = run(copy, "convert.py", "export", "out/rotary/best.pt", "--to=theirs")
    assert failed.returncode and failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("error: the task 'rotary' is not known to Hugging Face")


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
    succeed(copy, "-c", code)


@pytest.mark.slow
def test_a_task_of_ones_own(copy):
    flags = ["--model=sorting", "--n_layer=1", "--n_embd=16", "--n_head=1", "--device=cpu"]
    flags += ["--steps=6", "--eval_interval=2", "--batch_size=8", "--tokens_per_step=128"]
    flags += ["--out=out/sorting"]
    assert "stopped after step 3" in succeed(copy, "train.py", *flags, "--stop_after=3")
    out = succeed(copy, "train.py", "--resume", "--out=out/sorting")
    assert "best validation accuracy" in out and "31415926 -> " in out
    checkpoint = "--checkpoint=out/sorting/best.pt"
    assert "27182818 -> " in succeed(copy, "sample.py", checkpoint, "--prompt=27182818")
    assert "accuracy" in succeed(copy, "sample.py", checkpoint, "--eval=digits")
    assert "total" in succeed(copy, "train.py", *flags, "--dry_run", "--world=2")
    failed = run(copy, "sample.py", checkpoint, "--prompt=12")
    assert failed.stderr.endswith("error: '12' cannot be sorted: give 8 digits, as in training\n")
    failed = run(copy, "convert.py", "export", "out/sorting/best.pt", "--to=theirs")
    assert failed.stderr.startswith("error: the task 'sorting' is not known to Hugging Face")
    assert "--digits" not in succeed(copy, "train.py", "--model=sorting", "--help")
