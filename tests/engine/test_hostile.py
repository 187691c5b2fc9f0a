"""Every flag of every script meets hostile values: each command does what it can do, or says in one
sentence why not. No traceback, no hang, nothing of the user's changed, nothing written elsewhere.

The flags are asked of the scripts' own parsers, so a new one is covered as it is. HOSTILE=10 tries
ten times as many values.
"""

import gzip
import hashlib
import importlib
import io
import os
import re
import shutil
import signal
import sys
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, TOY, TOY_LSTM, TOY_NGRAM, TOYS, write_labelled, write_pairs, write_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convert
import optim
import sample
import tasks
import train
from bpe import PATTERNS
from data.layouts import LAYOUTS
from engine import checkpoint as checkpoints
from engine import cli, closing
from engine.logs import draw_curves
from engine.presets import PRESETS
from engine.steps import Diverged
from lab import bench, classic, gpu, gradients, growth, ladder, lengths, sweep, variants
from lab import finetuning as bench_finetune
from lab import runs as bench_runs
from lab import sampling as bench_sampling
from tasks.masked import POOLINGS

pytestmark = pytest.mark.slow

resource = pytest.importorskip("resource")  # Windows has none, and no timer either

TRIES = int(os.environ.get("HOSTILE", "1"))
SECONDS = 20  # for one command; it takes less than one
STEPS = 12  # after which a run of sound flags has done enough
MEMORY = 8 << 30  # bytes that a command may take beside what this process has
LONGEST = 600  # characters of a sentence

# ---- hostile values ------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return text.split()


# Most of each list gets past the parser: what lies behind it is asked, too.
INTS = words("0 -1 1 2 3 5 13 24 64 257 300 65536 ٣ 1_0 -0 1e5 0x10 nan seven 1,5")
INTS += [str(n) for n in (2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**30)]
INTS += ["9" * 5000, " 4 ", ""]
FLOATS = words("0 -0.0 1 0.5 0.999999999999 1e-3 1e-30 1e-320 -1e-9 -1 3 1e3 1e6 1e30 1e38 1e39")
FLOATS += words("1e300 1e308 1e999 nan inf -inf ٣.٥ seven 0,5 --")
FLOATS += ["9" * 300, "9" * 5000, ""]
BOOLS = ["", *words("true FALSE yes No on off 1 0 2 maybe None ٣")]
FILES = words(
    """rows.txt toy.txt toy-docs.txt toy.tsv toy.csv toy.conll toy.jsonl toy-choices.jsonl toy.json
    toy-alike.csv toy-talks.jsonl toy.txt.gz toy.txt,toy-docs.txt word.txt empty.txt blank.txt
    binary.txt latin.txt wide.txt -dash.txt ünï—日本.txt tokenizer.json cut.pt cut.json cut.jsonl.gz
    notes notes.png notes.npy out/gpt out/gpt/latest.pt out/bert/best.pt out/seq2seq/best.pt
    out/classify/best.pt theirs folder folder.pt texts strange fifo fifo.pt fifo.png broken
    broken.npy broken.pt broken.png loop zero.txt new new.npy new.png new/a no/where.npy
    missing.txt . / .. ~ /dev/null /dev/zero"""
)
FILES += ["", 'it\'s "quoted".txt']
CHOICES = [
    *optim.OPTIMIZERS,
    *optim.SCHEDULES,
    *PATTERNS,
    *LAYOUTS,
    *POOLINGS,
    *tasks.TABLE,
    *PRESETS,
]
CHOICES += words("cpu bf16 fp32 embeddings 0 1 2 gelu silu de-en a-b-c dates shakespeare wikitext")
STRANGE = ["new\nline.txt", "bell\a.txt", "\x1b[31m.txt", "\udcff.txt"]  # good names of files
ODD = [*STRANGE, "a\0b", "lone\ud800", "x" * 300, "x" * 5000, "a/" * 1500, "a" * 100_000, "\t"]
ODD += words("-- -1 * $(id) %s%n {0} nan")
NAMES = [*FILES, *FILES, *CHOICES, *ODD]
PROMPTS = ["", " ", "\0", "\a\b\x1b[2J\r", "[MASK]", "a [MASK] b [MASK]", "lone \ud800", "\udcff"]
PROMPTS += ["<|endoftext|>", "<|nope|>", "x" * 100_000, "word " * 20_000, "\n" * 1000, "\t", "a\tb"]
PROMPTS += ["-dash", "--", "\u2028\u2029\x85", "日本 ünï 👍🏽", "\u200b", "a\ufeff", "e\u0301" * 50]
VALUES = {"int": INTS, "float": FLOATS, "bool": BOOLS}
VALUES |= {"name": NAMES, "text": PROMPTS, "pair": FILES}
# A cache is put where the user says, also outside of the working folder: not in this test.
VALUES["cache"] = [name for name in NAMES if name not in ("/", "..")]
ANY = [value for kind, values in VALUES.items() if kind not in ("name", "pair") for value in values]
LINES = b"3 times\n\n[MASK] x\n\7\x1b[2J\r\n1 plus 2\ta\n" + "日本 ünï\n".encode() + b"x" * 9999

# What an own run of these folders changes when it goes on.
RUN = r"work/out/[^/]+/((latest|previous|best)\.pt|step-\d+\.pt|log\.jsonl|config\.json|\w+\.png)"


class Flag(NamedTuple):
    name: str  # "" for an argument without a name
    kind: str  # a key of VALUES
    place: int = 0  # of an argument without a name

    def words(self, form: str, values: list[str]) -> list[str]:
        """The words of the command line that give it these values, two of them."""
        first, second = values
        if self.kind == "pair":
            return [self.name, first, second]
        return {
            "=": [f"{self.name}={first}"],
            "apart": [self.name, first],
            "twice": [f"{self.name}={second}", f"{self.name}={first}"],
            "bare": [self.name],
            "dashes": [f"{self.name.replace('_', '-')}={first}"],
            "no": [f"--no-{self.name.removeprefix('--')}"],
            "misspelt": [f"{self.name}e={first}"],
        }[form]


FORMS = [*["="] * 25, "apart", "twice", "bare", "dashes", "no", "misspelt"]


class Command(NamedTuple):
    main: Callable[[list[str]], None]
    argv: list[str]

    def flags(self) -> list[Flag]:
        """All that the parser has which reads this command."""
        found: list[Flag] = []

        class Asked(Exception):
            pass

        def parse(parser: cli.Parser, *_) -> None:
            kinds = {"INT": "int", "FLOAT": "float", "BOOL": "bool", "TEXT": "text"}
            for action in parser._actions:
                name = next(iter(action.option_strings), "")
                if name in ("-h", "") or name.startswith("--no-"):
                    continue
                kind = "pair" if action.nargs == 2 else kinds.get(action.metavar, "name")
                kind = "cache" if name == "--cache_dir" else kind
                found.append(Flag(name, kind))
            raise Asked

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Asked):
            patch.setattr(cli.Parser, "parse", parse)
            self.main(self.argv)
        places = [i for i, word in enumerate(self.argv) if not word.startswith("-")]
        return [*found, *(Flag("", "name", i) for i in places)]


OURS = (ValueError, checkpoints.Unreadable, Diverged)
SHORT = ["--steps=9", "--stop_after=1"]
BEGUN = [flag for flag in TOYS["classify"] if not re.match("--(vocab|block|n)_", flag)]
COMMANDS = {
    **{f"train {task}": Command(train.main, [*toy, *SHORT]) for task, toy in TOYS.items()},
    "train ngram": Command(train.main, TOY_NGRAM),
    "train variant": Command(train.main, [*TOY, *SHORT, "--model=variant"]),
    "train sparse": Command(train.main, [*TOY, *SHORT, "--model=sparse_gpt"]),
    "train lstm": Command(train.main, [*TOY_LSTM, *SHORT]),
    "train talks": Command(train.main, [*TOYS["complete"], *SHORT, "--data=toy-talks.jsonl"]),
    "train resumed": Command(train.main, ["--resume", "--out=out/gpt", "--stop_after=1"]),
    "train begun": Command(train.main, [*BEGUN, *SHORT, "--init=out/bert/best.pt"]),
    **{
        f"sample {name}": Command(sample.main, [f"--checkpoint=out/{task}/best.pt", *flags])
        for name, task, flags in (
            ("gpt", "gpt", ["--prompt=3 times", "--max_new_tokens=4"]),
            ("bert", "bert", ["--prompt=[MASK] times"]),
            ("bert lines", "bert", []),
            ("embeddings", "bert", ["--embed=toy.txt", "--out=new.npy"]),
            ("seq2seq", "seq2seq", []),
            ("attention", "seq2seq", ["--prompt=1 plus 2", "--attention=new.png"]),
            ("classify", "classify", []),
            ("tag", "tag", []),
            ("answer", "answer", ["--context=toy.txt", "--prompt=what?"]),
            ("similar", "similar", ["--similar", "toy.txt", "toy-docs.txt"]),
            ("complete", "complete", ["--prompt=cat", "--max_new_tokens=4"]),
            ("choices", "gpt", ["--choices=toy-choices.jsonl", "--shots=2"]),
            ("chat", "gpt", ["--chat", "--max_new_tokens=4"]),
        )
    },
    "import": Command(convert.main, ["import", "theirs", "--out=new/gpt.pt"]),
    "export": Command(convert.main, ["export", "out/gpt/best.pt", "--to=new"]),
    "average": Command(convert.main, ["average", "--run=out/gpt", "--last=2"]),
    "bench": Command(
        bench.main, ["--only=translate", "--checkpoint=out/seq2seq/best.pt", "--repeats=2"]
    ),
    "bench_runs": Command(bench_runs.main, ["--small", "--only=saving"]),
    "growth": Command(growth.main, ["--repeats=1"]),
    "ladder": Command(ladder.main, ["--only=ngram,cbow", "--data=toy.txt", "--steps=1"]),
    "sweep": Command(
        sweep.main, ["--rows=rows.txt", f"--base={' '.join(TOY)} --steps=1", "--seeds=1"]
    ),
    "lengths": Command(lengths.main, ["--quick", "--repeats=1"]),
    "variants": Command(
        variants.main,
        [
            *("--quick", "--only=relu", "--steps=1", "--workers=1"),
            "--flags=--data toy.txt --n_embd 8 --block_size 8 --tokens_per_step 16 --batch_size 2",
        ],
    ),
    "gradients": Command(gradients.main, ["--length=3", "--width=4"]),
    "classic": Command(classic.main, ["--data=toy.csv"]),
    "gpu": Command(gpu.main, ["--rehearse", "--only=ceilings"]),
    "bench_finetune": Command(
        bench_finetune.main, ["--init=out/bert/best.pt", "--data=toy.csv", "--repeats=2"]
    ),
}

# The flags that name what is to be written, and what is there already.
WRITES = {
    **dict.fromkeys(
        (
            "train gpt",
            "sample embeddings",
            "import",
            "bench",
            "growth",
            "lengths",
            "gradients",
            "gpu",
            "sweep",
            "variants",
        ),
        "--out",
    ),
    "sample attention": "--attention",
    "export": "--to",
}
IN_THE_WAY = words(
    """toy.txt notes notes.png notes.npy out/gpt out/gpt/latest.pt folder fifo fifo.png broken
    broken.npy broken.pt broken.png loop zero.txt . / .."""
)


# ---- the folder, and what must not happen in it --------------------------------------------------


class Hang(BaseException):
    """Not an Exception, which some code of ours is right to catch."""


class Enough(BaseException):
    """The flags are sound, and the run would take its time."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A working folder with a run of each task in it, small data, and what may be in the way. Its
    parent holds nothing else but what stands for the user's home."""
    above = tmp_path_factory.mktemp("hostile")
    work = above / "work"
    for path in ("home", *(f"work/{name}" for name in ("folder", "folder.pt", "texts", "strange"))):
        (above / path).mkdir(parents=True)
    with suppress(ImportError):  # it looks for its own folder now, and keeps a list of fonts there
        importlib.import_module("matplotlib.font_manager")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TMPDIR"):
            patch.setenv(name, str(above / "home"))
        for write in (write_texts, write_pairs, write_labelled):
            write(work)
        for task, toy in TOYS.items():
            keep = ["--eval_interval=1", "--keep=2", "--stop_after=2"]
            train.main([*toy, "--steps=9", *keep, f"--out=out/{task}"])
        convert.main(["export", "out/gpt/best.pt", "--to=theirs"])
        fill(work)
        patch.setattr(closing, "draw_curves", draw_curves)  # wherever --out leads
        patch.setattr(urllib.request.OpenerDirector, "open", no_network)
        with suppress(ImportError):  # it would read the environment, but may be imported already
            constants = importlib.import_module("huggingface_hub.constants")
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
        # A run is not to last, nor is a measurement; what they say at the end is.
        patch.setattr("engine.setup.compiled", lambda model, *_: model)
        patch.setattr(bench_sampling, "peer", lambda name: None)
        words = SimpleNamespace(pieces=lambda split: [("to be or not to be " * 99, True)])
        patch.setattr(bench_sampling, "open_corpus", lambda data, cache: words)
        quick = dict.fromkeys(bench.BENCHES, lambda config, device: [])
        patch.setattr(bench, "BENCHES", {**quick, "translate": bench_sampling.bench_translate})
        found = dict.fromkeys(
            ("one", "two", "ratio", "saves", "seconds", "of", "share", "bytes"), 1
        )
        patch.setattr(gpu.Session, "run", lambda self, parts: None)
        quick = dict.fromkeys(bench_runs.BENCHES, lambda config, folder: found)
        patch.setattr(bench_runs, "BENCHES", quick)

        def here(jobs, workers):
            return (sweep.train_job(job) for job in jobs)

        patch.setattr(sweep, "in_processes", here)
        cost = growth.Cost(1.0, 1.0)
        patch.setattr(growth, "measure", lambda sizes, *_: dict.fromkeys(sizes, cost))
        real = sweep.run_rows

        def one_run(rows, base, config):
            """All rows are planned, and one run stands for all: they would take minutes."""
            sweep.plan_jobs(rows, base, config)
            found = real(dict([next(iter(rows.items()))]), base, replace(config, seeds=1))
            return dict.fromkeys(rows, *found.values())

        patch.setattr(sweep, "run_rows", one_run)
        patch.setattr(lengths, "measure", lambda T, *_: {lengths.KERNEL: cost, "window": cost})
        yield work


def fill(work: Path) -> None:
    """What else a name may lead to."""
    text = (work / "toy.txt").read_bytes()
    latest = (work / "out/gpt/latest.pt").read_bytes()
    for name, content in {
        "empty.txt": b"",
        "binary.txt": bytes(range(256)) * 9,
        "blank.txt": b" \n\t\n" * 99,
        "latin.txt": "Größe\n".encode("latin-1") * 99,
        "wide.txt": "size\n".encode("utf-16") * 99,
        "cut.pt": latest[: len(latest) // 2],
        "cut.json": b'{"data": [{"paragraphs"',
        "cut.jsonl.gz": b"\x1f\x8b\x08\x00no gzip",
        **dict.fromkeys(("notes.png", "notes.npy", "notes", "embeddings.npy"), b"my own notes"),
        "word.txt": b"word",
        "rows.txt": b"as it is:\nfast: --lr 0.01\n",
        "toy.txt.gz": gzip.compress(text),
        "tokenizer.json": (work / "theirs/tokenizer.json").read_bytes(),
        **dict.fromkeys(("folder/config.json", "folder/writable"), b"my own notes"),
        **dict.fromkeys(("-dash.txt", "ünï—日本.txt", 'it\'s "quoted".txt', *STRANGE), text),
        **dict.fromkeys(("folder/a.txt", "texts/a.txt", "texts/b.txt"), text),
        **{f"strange/{name}": text for name in STRANGE},
    }.items():
        (work / name).write_bytes(content)
    for name in ("fifo", "fifo.pt", "fifo.png", "folder/fifo.txt"):
        os.mkfifo(work / name)
    for name in ("broken", "broken.npy", "broken.pt", "broken.png"):
        (work / name).symlink_to("nothing")
    (work / "loop").symlink_to("loop")
    (work / "zero.txt").symlink_to("/dev/zero")


def no_network(*args, **kwargs):
    raise urllib.error.URLError("no network here")


def state(folder: Path) -> dict[str, str]:
    """{path: what is there}, links not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "fifo"
    return found


@contextmanager
def limits(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time, memory, and steps of training."""
    count = 0

    def counted(function: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > STEPS:
                raise Enough
            return function(*args, **kwargs)

        return call

    def hang(number, frame):
        raise Hang

    patch.setattr(train.Run, "train_step", counted(train.Run.train_step))
    patch.setattr(bench_sampling, "translate_ids", counted(bench_sampling.translate_ids))
    patch.setattr(bench_finetune, "their_step", counted(bench_finetune.their_step))
    before = signal.signal(signal.SIGALRM, hang)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux" and not torch.cuda.is_available():  # CUDA reserves terabytes
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def said(main: Callable, argv: list[str]) -> str:
    """What ends the command, "" if nothing does: the sentence behind "error: "."""
    with pytest.MonkeyPatch.context() as patch, limits(patch):
        for name in ("stdout", "stderr"):
            # As a terminal has it: what cannot be written in UTF-8 is an error.
            patch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict"))
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES), "utf-8"))
        try:
            cli.run(lambda _: main(argv))
        except SystemExit as stop:
            if stop.code in (None, 0):
                return ""
            assert isinstance(stop.code, str) and stop.code.startswith("error: "), stop.code
            cause = stop.__context__
            if isinstance(cause, ValueError):  # ours, and no accident in a library or in a codec
                place = cause.__traceback__
                while place.tb_next:
                    place = place.tb_next
                where = Path(place.tb_frame.f_code.co_filename)
                assert where.is_relative_to(ROOT) and type(cause) in OURS, repr(cause)
            return stop.code.removeprefix("error: ")
        except Enough:
            pass
        except Hang as hang:
            raise AssertionError(f"still at work after {SECONDS} s") from hang
        return ""


def attempt(work: Path, command: Command, argv: list[str]) -> str:
    """What the command said, after a look at what became of the folder, which is then as it was."""
    above = work.parent
    copy = above.with_name(f"{above.name}-copy")
    before = state(above)
    resumes = command.main is train.main and any("resume" in word for word in argv)
    if resumes:
        shutil.copytree(work / "out", copy)
    try:
        sentence = said(command.main, argv)
        odd = {c for c in sentence if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
        assert not odd, ascii(sentence)
        assert len(sentence) <= LONGEST, sentence
    finally:
        after = state(above)
        new = sorted(after.keys() - before.keys(), key=len, reverse=True)
        for name in new:
            path = above / name
            path.rmdir() if after[name] == "folder" else path.unlink()
        if resumes:
            shutil.rmtree(work / "out")
            copy.replace(work / "out")
    own = {name for name in before if resumes and re.fullmatch(RUN, name)}
    changed = [n for n in before.keys() - own if after.get(n) != before[n]]
    assert not changed, f"changed: {', '.join(changed)}"
    places = ("work/", "home/") if any("~" in word for word in argv) else ("work/",)
    outside = [n for n in new if not n.startswith(places)]
    assert not outside, f"outside of the working folder: {', '.join(outside)}"
    return sentence


def hostile(command: Command, changes: list[tuple[Flag, str, list[str]]]) -> list[str]:
    argv = list(command.argv)
    for flag, form, values in changes:
        if flag.name:
            argv += flag.words(form, values)
        else:
            argv[flag.place] = values[0]
    return argv


# ---- the tests -----------------------------------------------------------------------------------

ALL = pytest.mark.parametrize("name", COMMANDS)
SETTINGS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def test_every_script_is_here():
    files = [*ROOT.glob("*.py"), *(ROOT / "lab").glob("*.py")]
    found = [p.relative_to(ROOT) for p in files if "cli.run(main)" in p.read_text("utf-8")]
    scripts = {".".join(path.with_suffix("").parts) for path in found}
    assert scripts == {command.main.__module__ for command in COMMANDS.values()}


@ALL
def test_what_the_hostile_commands_begin_from_works(folder, name):
    command = COMMANDS[name]
    assert attempt(folder, command, command.argv) == ""
    assert attempt(folder, command, [*command.argv, "--help"]) == ""


@ALL
def test_every_flag_alone(folder, name):
    """In the first command of its script that has it."""
    command, random = COMMANDS[name], Random(name)
    earlier = takewhile(lambda other: other is not command, COMMANDS.values())
    known = {flag for other in earlier if other.main is command.main for flag in other.flags()}
    for flag in sorted(set(command.flags()) - known):
        for value in random.sample(VALUES[flag.kind], min(TRIES, len(VALUES[flag.kind]))):
            attempt(folder, command, hostile(command, [(flag, "=", [value, "0"])]))


@pytest.mark.parametrize("name", WRITES)
def test_what_is_in_the_way_stays(folder, name):
    """Files, folders, links that lead nowhere, a pipe that would be waited for."""
    command, flag = COMMANDS[name], Flag(WRITES[name], "name")
    for value in IN_THE_WAY:
        assert os.path.lexists(value)
        attempt(folder, command, hostile(command, [(flag, "=", [value, "0"])]))


@ALL
def test_flags_together(folder, name):
    command = COMMANDS[name]
    flags = command.flags()

    @settings(max_examples=6 * TRIES, derandomize=TRIES == 1, **SETTINGS)
    @given(st.data())
    def check(data):
        changes = []
        for _ in range(data.draw(st.integers(1, 3))):
            flag = data.draw(st.sampled_from(flags))
            own = st.sampled_from(VALUES[flag.kind])
            value = st.one_of(*[own] * 9, st.sampled_from(ANY))
            form = data.draw(st.sampled_from(FORMS))
            changes.append((flag, form, [data.draw(value), data.draw(own)]))
        attempt(folder, command, hostile(command, changes))

    check()
