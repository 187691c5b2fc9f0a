"""Every command in the README's code blocks runs, at toy size."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LABELLED, ROOT, TOYS, write_labelled

from engine.presets import PRESETS

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
SCRIPTS = {c for c in COMMANDS if re.match(r"(python|torchrun)\b.*\b(\w+\.py|lab\.\w+)\b", c)}
SEVERAL_MACHINES = {c for c in SCRIPTS if "--nnodes" in c}  # see test_two_machines.py
FOLDERS = {"out/gpt": "gpt", "out/gpt2": "gpt", "out/bert": "bert", "out/crammed": "bert"}
FOLDERS |= {"out/minilm": "bert", **{f"out/{task}": task for task in LABELLED}}  # else seq2seq
STAND_INS = {"multi30k": "toy.tsv", "pydocs": "toy-docs.txt"}
STAND_INS |= {"queries.txt": "toy-docs.txt", "lines.txt": "toy.txt"}
STAND_INS |= {"text.txt": "toy.txt", "dev.csv": "toy.csv", "my.txt": "toy.txt"}
FILES = ("--data", "--valid", "--languages", "--layout", "--tokenizer", "--minutes")


def value(words: list[str], flag: str) -> str:
    """What follows the flag, or nothing."""
    return words[words.index(flag) + 1] if flag in words else ""


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


@pytest.fixture
def labelled(toy_pairs) -> Path:
    """The toy folder, with a small file for each task of fine-tuning."""
    write_labelled(toy_pairs)
    return toy_pairs


@pytest.mark.parametrize("command", sorted(SCRIPTS - SEVERAL_MACHINES))
def test_command(labelled, command):
    """Names of data that would be downloaded become the toy text, sizes become toy sizes."""
    command, _, redirected = command.partition(" < ")
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if re.search(r"\.py$|^lab\.", word))
    name, flags = words[script], words[script + 1 :]
    task = value(flags, "--model") or PRESETS.get(value(flags, "--preset"), {}).get("model", "gpt")
    folder = next(iter(re.findall(r"out/[\w-]+", command)), f"out/{task}")
    if name != "train.py":
        task = FOLDERS.get(folder, "seq2seq")
    small = TOYS[task]
    trained = [str(ROOT / "train.py"), "--steps=4", *small, "--out", folder, "--keep=2"]
    if name == "lab.bench":
        flags = ["--only=optim", "--repeats=2"]
    elif name == "train.py" and "--dry_run" not in flags:
        own = {f.partition("=")[0] for f in small}
        keep = without(flags, *FILES, *own)
        if "--resume" in keep:  # then there must be something to resume
            run(*trained, "--stop_after=1")
            flags = keep
        elif "--init" in keep:
            base = TOYS[FOLDERS.get(folder, "seq2seq")]
            run(str(ROOT / "train.py"), "--steps=4", *base, "--out", folder)
            sizes = ("--vocab_size", "--block_size", "--n_layer", "--n_head", "--n_embd", "--n_ff")
            flags = [*keep, "--steps=2", *without(small, *sizes)]
        else:
            flags = [*keep, "--steps=2", *small, "--tokenizer=", "--stop_after=2"]
    elif name == "sample.py":
        run(*trained)
        flags = [STAND_INS.get(f, f) for f in flags] + ["--device=cpu"]
        flags += ["--max_new_tokens=5"] * (
            task in ("gpt", "seq2seq", "complete") and "--eval" not in flags
        )
    elif name == "average.py":
        run(*trained)
    elif name == "convert.py":
        task = FOLDERS.get(folder, "seq2seq")
        small, made = TOYS[task], f"out/{task}-made" if flags[0] == "import" else folder
        run(str(ROOT / "train.py"), "--steps=4", *small, "--out", made)
        if flags[0] == "import":  # what would be downloaded is exported instead
            run(str(ROOT / name), "export", f"{made}/best.pt", "--to=theirs")
            flags[1] = "theirs"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    lines = "3 plus 4\n" if redirected else None
    start = ["-m", name] if name.startswith("lab.") else [str(ROOT / name)]
    told = run(*launcher * (words[0] == "torchrun"), *start, *flags, lines=lines)
    assert told if task == "seq2seq" else told.strip()  # an untrained translator may write nothing


def run(*words: str, lines: str | None = None) -> str:
    """The output of `python words…`, which must succeed."""
    done = subprocess.run(
        [sys.executable, *words],
        input=lines,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "USE_LIBUV": "0", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    assert Path(ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
