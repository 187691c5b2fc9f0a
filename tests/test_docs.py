"""README.md and docs/: every command in their code blocks runs, at toy size; what they name exists.

What a command begins from (a trained run, an imported one) is trained once for each task. The code
of docs/your-own.md, and the commands that need it, have a test of their own: test_own.py.
"""

import ast
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from conftest import (
    LABELLED,
    ROOT,
    TOY_LLAMA,
    TOY_LSTM,
    TOY_NGRAM,
    TOYS,
    write_labelled,
    write_pairs,
    write_texts,
)

import convert
import sample
import tasks
import train
from engine.presets import PRESETS

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN = ("rotary", "sorting")  # what docs/your-own.md adds


def lines_of(page: Path) -> list[str]:
    """The command lines in a page's code blocks, and in the first column of its tables."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [
        line.partition("  #")[0].strip()
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    return lines + re.findall(r"^\| `(python [^`]+)`", text, re.MULTILINE)


COMMANDS = {part.strip() for page in PAGES for line in lines_of(page) for part in line.split("&&")}
SCRIPTS = {c for c in COMMANDS if re.match(r"(python|torchrun)\b.*\b(\w+\.py|lab\.\w+)\b", c)}
SCRIPTS = {c for c in SCRIPTS if not any(name in c for name in OWN)}
SEVERAL_MACHINES = {c for c in SCRIPTS if "--nnodes" in c}  # see test_two_machines.py
QUICK = {
    "python bpe.py",
    "python train.py",
    'python sample.py --prompt "def "',
}
FOLDERS = {"out/gpt": "gpt", "out/gpt2": "gpt", "out/bert": "bert", "out/crammed": "bert"}
FOLDERS |= {"out/lstm": "lstm", "out/ngram": "ngram", "out/variant": "variant"}
FOLDERS |= {"out/sparse_gpt": "sparse_gpt"}
FOLDERS |= dict.fromkeys(("out/llama", "out/smollm2"), "llama") | {"out/talks": "complete_llama"}
FOLDERS |= {"out/minilm": "bert", **{f"out/{task}": task for task in LABELLED}}  # else seq2seq
STAND_INS = {"multi30k": "toy.tsv", "pydocs": "toy-docs.txt", "shakespeare": "toy.txt"}
STAND_INS |= {"queries.txt": "toy-docs.txt", "lines.txt": "toy.txt"}
STAND_INS |= {"text.txt": "toy.txt", "dev.csv": "toy.csv", "my.txt": "toy.txt"}
STAND_INS |= dict.fromkeys(("questions.jsonl", "dev.jsonl", "train.jsonl"), "toy-choices.jsonl")
STAND_INS |= {"more-talks.jsonl": "toy-talks.jsonl"}
FILES = ("--data", "--valid", "--languages", "--layout", "--tokenizer", "--minutes")
SIZES = ("--vocab_size", "--block_size", "--n_layer", "--n_head", "--n_embd", "--n_ff")
LABS = {
    "lab.bench": ["--only=optim", "--repeats=2"],
    "lab.runs": ["--only=saving", "--small", "--repeats=1", "--steps=6"],
    "lab.ladder": ["--data=toy.txt", "--only=ngram,addk"],
    "lab.sweep": ["--rows=rows.txt", f"--base={shlex.join(TOYS['gpt'])} --steps=2", "--seeds=1"],
    "lab.variants": [
        *("--quick", "--only=swiglu,FNet", "--steps=2", "--workers=1"),
        "--flags=--data toy.txt --n_embd 32 --block_size 16 --tokens_per_step 64 --batch_size 4",
    ],
    "lab.gradients": ["--length=12", "--width=8"],
    "lab.classic": ["--data=toy.csv"],
    "lab.growth": ["--help"],  # runs in tests/lab/test_growth.py, with smaller sizes
    "lab.lengths": ["--help"],  # runs in tests/lab/test_lengths.py, likewise
    "lab.finetuning": [
        *("--model=classify", "--init=out/minilm/best.pt", "--repeats=2"),
        *("--data=toy.csv", "--valid=toy.csv"),
    ],
}
TOY_TALKS = [
    *TOYS["complete"],
    "--model=complete_llama",
    "--data=toy-talks.jsonl",
    "--block_size=64",
]
ALL_TOYS = {
    **TOYS,
    "complete_llama": TOY_TALKS,
    "llama": TOY_LLAMA,
    "moe": [*TOYS["gpt"], "--model=moe"],
    "variant": [*TOYS["gpt"], "--model=variant"],
    "sparse_gpt": [*TOYS["gpt"], "--model=sparse_gpt", "--window=4", "--sparse_block=4"],
    "sparse_bert": [*TOYS["bert"], "--model=sparse_bert", "--window=5", "--sparse_block=4"],
    "linformer": [*TOYS["bert"], "--model=linformer", "--n_keys=4"],
    "fnet": [f for f in TOYS["bert"] if "attention" not in f and "n_head" not in f]
    + ["--model=fnet"],
    "ngram": TOY_NGRAM,
    "lstm": TOY_LSTM,
}
MAINS = {"train.py": train.main, "sample.py": sample.main, "convert.py": convert.main}
IN_LABS = {c for c in SCRIPTS if any(name in c for name in LABS)}


# ---- every command runs --------------------------------------------------------------------------


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


def folder_of(flags: list[str], flag: str) -> str:
    """The folder of the checkpoint that the flag names; of the newest one where it is not given."""
    return Path(value(flags, flag) or "out/gpt/best.pt").parent.as_posix()


def task_of(folder: str) -> str:
    """The task of the run that the pages have in this folder."""
    return FOLDERS.get(folder, "seq2seq")


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Callable[..., Path]:
    """trained(task, *flags) -> the folder of a run of four steps, made when first asked for."""
    folder = tmp_path_factory.mktemp("docs")
    for write in (write_texts, write_pairs, write_labelled):
        write(folder)

    @cache
    def run_of(task: str, *flags: str) -> Path:
        out = folder / "out" / "-".join((task, *flags))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            length = [] if task == "ngram" else ["--steps=4", "--keep=2"]
            train.main([*ALL_TOYS[task], *length, *flags, f"--out={out}"])
        return out

    return run_of


@pytest.fixture
def have(tmp_path, monkeypatch, trained) -> Callable[..., None]:
    """have(folder, task, *flags): such a run lies in the folder, below the test's own, in which
    the files of all tasks lie too."""
    monkeypatch.chdir(tmp_path)
    for write in (write_texts, write_pairs, write_labelled):
        write(tmp_path)

    def copy(folder: str, task: str, *flags: str) -> None:
        shutil.copytree(trained(task, *flags), tmp_path / folder)

    return copy


def marked(command: str):
    return pytest.param(command, marks=[] if command in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize(
    "command", [marked(c) for c in sorted(SCRIPTS - SEVERAL_MACHINES - IN_LABS)]
)
def test_command(have, command, monkeypatch, capsys):
    """Names of data that would be downloaded become the toy text, sizes become toy sizes. All but a
    few run in this process, which has loaded torch already; of torchrun's, whose words are the same
    everywhere, those of GPT are two processes."""
    quick = command in QUICK
    command, _, redirected = command.partition(" < ")
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    name, flags = words[script], words[script + 1 :]
    prepare = {"train.py": for_training, "sample.py": for_sampling, "convert.py": for_converting}
    if name in prepare:
        flags = prepare[name](have, flags)
    launcher = []
    if words[0] == "torchrun":
        assert words[1:script] == ["--standalone", "--nproc_per_node=8"]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        launcher = launcher * ("gpt2" in command)
    lines = "3 plus 4\n" if redirected or "--chat" in flags else None
    if launcher or quick or name not in prepare:
        said = run(*launcher, str(ROOT / name), *flags, lines=lines)
    else:
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO((lines or "").encode()), "utf-8")
        )
        capsys.readouterr()
        with suppress(SystemExit):  # of --help
            MAINS[name](flags)
        said, noted = capsys.readouterr()
        if "--chat" in flags:  # at toy size a message may fill the context, which is said
            assert "> 3 plus 4" in noted and (said or "[not read: " in noted)
            return
    translates = name == "sample.py" and task_of(folder_of(flags, "--checkpoint")) == "seq2seq"
    assert said if translates else said.strip()  # an untrained translator may write empty lines


def for_training(have, flags: list[str]) -> list[str]:
    """The flags of train.py at toy size, for a few steps on toy data."""
    if "--dry_run" in flags or "--help" in flags:
        return flags
    task = value(flags, "--model") or PRESETS.get(value(flags, "--preset"), {}).get("model", "gpt")
    small = ALL_TOYS[task]
    keep = without(flags, *FILES, *(flag.partition("=")[0] for flag in small))
    if tasks.counts(task):
        return [*keep, *small]
    if "--resume" in keep:  # then there must be something to resume
        have(value(flags, "--out"), task, "--stop_after=1")
        return keep
    if "--init" in flags:
        folder = folder_of(flags, "--init")
        have(folder, task_of(folder))
        return [*keep, "--steps=2", *without(small, *SIZES)]
    return [*keep, "--steps=2", *small, "--tokenizer=", "--stop_after=2"]


def for_sampling(have, flags: list[str]) -> list[str]:
    """The flags of sample.py, with a run of toy size in the place of the one that they name."""
    folder = folder_of(flags, "--checkpoint")
    task = task_of(folder)
    have(folder, task)
    short = (
        task
        in (
            "gpt",
            "llama",
            "seq2seq",
            "complete",
            "complete_llama",
            "lstm",
            "ngram",
            "variant",
            "sparse_gpt",
        )
        and "--eval" not in flags
    )
    flags = [STAND_INS.get(flag, flag) for flag in flags]
    return [*flags, "--device=cpu", *["--max_new_tokens=5"] * short]


def for_converting(have, flags: list[str]) -> list[str]:
    """The flags of convert.py; what would be downloaded is exported first, and imported then."""
    if flags[0] != "import":
        folder = value(flags, "--run") or Path(flags[1]).parent.as_posix()
        have(folder, task_of(folder))
        return flags
    have("out/made", task_of(folder_of(flags, "--out")))
    convert.main(["export", "out/made/best.pt", "--to=theirs"])
    return [flags[0], "theirs", *flags[2:]]


@pytest.mark.slow
@pytest.mark.parametrize("name", LABS)
def test_lab(have, name):
    """Each runs once, at toy size, and knows the flags that the pages give it."""
    shown = run("-m", name, "--help")
    for command in IN_LABS:
        if name in command:
            words = [word for word in shlex.split(command) if re.fullmatch(r"--\w+", word)]
            assert all(word in shown for word in words)
    have("out/minilm", "bert")
    Path("rows.txt").write_text("gpt:\nwide: --n_ff 64\n", encoding="utf-8")
    assert run("-m", name, *LABS[name]).strip()


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


# ---- what the pages name exists, and what exists is named ----------------------------------------


def test_the_readme_has_the_two_commands_of_the_first_hour():
    lines = lines_of(ROOT / "README.md")
    assert "pip install -r requirements.txt && python train.py" in lines
    assert "pip install -r requirements-dev.txt && python -m pytest" in lines
    assert len(SCRIPTS) >= 60 and QUICK <= SCRIPTS


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_first_table_of_the_readme_has_a_line_for_each_entry_at_the_root():
    table = re.search(r"(^\|.*\n)+", README, re.MULTILINE)[0]
    named = {
        name
        for cell in re.findall(r"^\|[^|]*", table, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", cell)
    }
    folders = [p for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")]
    there = {f"{p.name}/" for p in folders if any(p.glob("*.py")) or any(p.glob("*.md"))}
    there |= {p.name for pattern in ("*.py", "*.md", "*.toml", "*.txt") for p in ROOT.glob(pattern)}
    assert named == there | {"LICENSE"}


def says_more_than_a_docstring(path: Path) -> bool:
    return len(ast.parse(path.read_text(encoding="utf-8")).body) > 1


def test_the_reading_order_names_every_file_once():
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    _, _, subjects = text.partition("## Files by subject")
    named = re.findall(r"^\| `([\w/]+\.py)` \|", subjects, re.MULTILINE)
    files = [
        *ROOT.glob("*.py"),
        *(
            p
            for d in ("models", "tasks", "data", "engine", "lab")
            for p in (ROOT / d).rglob("*.py")
        ),
    ]
    there = [p.relative_to(ROOT).as_posix() for p in files if says_more_than_a_docstring(p)]
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_names_of_files_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        assert (ROOT / name).is_file(), name


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", README))
    assert linked == {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")}


def test_the_licence_is_mit():
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
