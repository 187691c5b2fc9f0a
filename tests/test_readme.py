"""Every command in the README's code blocks runs, at toy size."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TOY

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(?:sh|bash)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [
    line.partition("  #")[0].strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
LINES += re.findall(r"^\| `(python [^`]+)`", README, re.MULTILINE)  # the table of results
COMMANDS = [part.strip() for line in LINES for part in line.split("&&")]
SCRIPTS = {c for c in COMMANDS if re.match(r"(python|torchrun)\b.*\b\w+\.py\b", c)}
SMALL = ["--steps=2", *TOY[1:], "--stop_after=2"]


def without(words: list[str], *flags: str) -> list[str]:
    """The words without these flags and their values."""
    kept, skip = [], False
    for word in words:
        if not skip and word.partition("=")[0] not in flags:
            kept.append(word)
        skip = word in flags and "=" not in word
    return kept


def test_the_readme_has_the_two_commands_of_the_first_hour():
    assert "pip install -r requirements.txt && python train.py" in LINES
    assert "pip install -r requirements-dev.txt && python -m pytest" in LINES
    assert len(SCRIPTS) >= 10


def test_the_readme_names_every_file_that_a_reader_will_see():
    files = {p.name for p in ROOT.glob("*.py")} | {
        f"data/{p.name}" for p in (ROOT / "data").glob("*.py")
    }
    missing = {f for f in files - {"data/__init__.py"} if f"`{f}`" not in README}
    assert not missing


@pytest.mark.parametrize("command", sorted(SCRIPTS))
def test_command(toy, command):
    """Names of data that would be downloaded become the toy text, sizes become toy sizes."""
    if "nnodes" in command:
        pytest.skip("needs a second machine")
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    name, flags = words[script], words[script + 1 :]
    if name == "bench.py":
        flags = ["--only=optim", "--repeats=2"]
    elif name == "train.py" and "--dry_run" not in flags:
        own = {f.partition("=")[0] for f in SMALL}
        keep = without(flags, "--data", "--tokenizer", "--minutes", *own)
        if "--resume" in keep:  # then there must be something to resume
            run(str(ROOT / name), "--steps=4", "--stop_after=1", *TOY, "--out=out/gpt")
            flags = keep
        elif "--init" in keep:
            run(str(ROOT / name), "--steps=1", *TOY, "--out=out/gpt")
            flags = [
                *keep,
                *without(SMALL, "--vocab_size", "--block_size", "--n_layer", "--n_head"),
            ]
            flags = [f for f in flags if not f.startswith("--n_embd")] + ["--data=toy.txt"]
        else:
            flags = [*keep, *SMALL, "--data=toy.txt", "--tokenizer="]
    elif name == "sample.py":
        run(str(ROOT / "train.py"), "--steps=2", *TOY, "--out=out/gpt")
        flags = [*flags, "--max_new_tokens=5", "--device=cpu"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert run(*launcher * (words[0] == "torchrun"), str(ROOT / name), *flags).strip()


def run(*words: str) -> str:
    """The output of `python words…`, which must succeed."""
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    assert Path(ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
