"""splitting.py against the plain functions of bpe.py, and where it goes wrong."""

import os
import pickle
import random
import subprocess
import sys

import pytest
import regex
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bpe
from bpe import GPT2_PATTERN, PATTERNS, Tokenizer, plain_count_chunks, plain_splitter
from data import cores
from engine import splitting
from engine.processes import pick_device
from engine.splitting import Splitter, count_chunks, ranges_hold

# What patterns treat in different ways: letters and numbers of all kinds, marks, white space that
# only one engine takes for such, what matches 's only without case, what is beyond U+FFFF.
AWKWARD = "ab9_ \n\r\t'sSrRLlDm!=\x1c\x1f\x85\xa0²Ⅷ①é的٣ſK😀𝐀𝟘\u0345\u0301\ud800\u3000\u200b\u0378"
TEXT = "It's the tokenizer's job: we'll split 12345 words.\n\n  The end,  isn't it?  é的😀 \ud800"


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), r"\w+|\W"])
@settings(deadline=None, max_examples=200)
@example(text="1234567é12345")
@example(text="1234567 12345")
@given(text=st.text(AWKWARD, max_size=20) | st.text("a1' \n\r\t", max_size=20) | st.text())
def test_chunks_are_those_of_regex(pattern, text):
    assert Splitter(pattern)(text) == plain_splitter(pattern)(text) == regex.findall(pattern, text)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS.values())
def test_every_character_in_many_places(pattern):
    """Of those that the ranges hold: one that they do not would send its whole text to `regex`.
    In ASCII by themselves, too, where the ranges are others."""
    split = Splitter(pattern)
    held = [c for c in map(chr, range(0x20000)) if ranges_hold(c)]
    assert len(held) > 60_000
    around = [f"a{c}a {c}1{c}\n{c}  {c}='{c}" for c in held]
    for part in (
        around[:64],
        around[64:128],
        *(around[i : i + 999] for i in range(0, 99_999, 999)),
    ):
        text = "".join(part)
        assert split(text) == regex.findall(pattern, text)


def test_what_the_ranges_cannot_hold():
    assert ranges_hold("aé的😀٣²\ud800 \u0301")  # astral symbols are in no range, and need none
    assert not any(map(ranges_hold, ("a𝐀", "a𝟘", "a\u0378")))  # a letter, a number, nothing yet


@pytest.mark.parametrize("text", ["=_" * 500_000, " " * 1_000_000 + "x", "\n é" * 99_999])
@pytest.mark.parametrize("name", ["gpt2", "gpt4"])
def test_a_million_characters_of_a_kind(name, text):
    """Backtracking over a long run would take hours, or gigabytes."""
    split = Splitter(PATTERNS[name])(text)
    assert "".join(split) == text
    assert split[:3] == regex.findall(PATTERNS[name], text)[:3]


def test_no_pattern_is_translated_by_guesswork():
    assert set(splitting.TRANSLATED) < set(PATTERNS.values())
    assert Splitter(r"\p{L}+|(?s:.)")("ab!é") == ["ab", "!", "é"]


def test_worker_processes_count_the_same(monkeypatch):
    rng = random.Random(1)
    texts = ["".join(rng.choices("aé的😀 \n'sll12!\x00", k=5000)) for _ in range(20)]
    expected = plain_count_chunks(texts, GPT2_PATTERN)
    monkeypatch.setattr(cores, "BATCH", 9_000)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    started = []

    class Pool(cores.ProcessPoolExecutor):
        def __init__(self, workers, *context, **options):
            started.append(workers)
            super().__init__(workers, *context, **options)

    monkeypatch.setattr(cores, "ProcessPoolExecutor", Pool)
    assert count_chunks(iter(texts), GPT2_PATTERN) == expected
    assert started == [2]


def test_workers_that_die_lose_nothing(tmp_path):
    """Spawned children of a script without a main guard die at once; its counts must be whole."""
    script = tmp_path / "unguarded.py"
    script.write_text(
        f"import multiprocessing, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import bpe\nfrom data import cores\nfrom engine import splitting\n"
        "multiprocessing.set_start_method('spawn', force=True)\n"
        "cores.BATCH, cores.os.cpu_count = 1000, lambda: 2\n"
        "print(splitting.count_chunks(['word ' * 300] * 99, bpe.GPT2_PATTERN)[' word'])\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(99 * 299)]


def test_an_error_in_the_texts_is_not_swallowed(monkeypatch):
    """An OSError while reading must not pass for a worker that cannot be started."""

    def texts():
        yield from ["some words " * 200] * 9
        raise OSError("disk")

    monkeypatch.setattr(cores, "BATCH", 1000)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(OSError, match="disk"):
        count_chunks(texts(), GPT2_PATTERN)


# ---- in their places -----------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch):
    """bpe.py as it is by itself, until use_in_bpe(); afterwards as it was."""
    monkeypatch.setattr(bpe, "make_splitter", plain_splitter)
    monkeypatch.setattr(bpe, "count_chunks", plain_count_chunks)


@pytest.mark.usefixtures("plain")
def test_a_run_uses_them(monkeypatch):
    plain = Tokenizer.train([TEXT], 300)
    for _ in range(2):  # twice is as good as once
        pick_device("cpu")
        assert bpe.make_splitter is Splitter and bpe.count_chunks is count_chunks
    calls = []
    monkeypatch.setattr(bpe, "count_chunks", lambda *given: calls.append(1) or count_chunks(*given))
    fast = Tokenizer.train([TEXT], 300)
    assert calls and isinstance(fast._split, Splitter)
    assert fast.hash == plain.hash
    assert fast.encode_python(TEXT) == plain.encode_python(TEXT) == plain.encode(TEXT)


@pytest.mark.usefixtures("plain")
def test_a_tokenizer_keeps_its_splitter_on_the_way_to_another_process():
    """One under `spawn` or of another program, where nothing was installed."""
    plain = Tokenizer.train([TEXT], 300)
    splitting.use_in_bpe()
    fast = Tokenizer.train([TEXT], 300)
    bpe.make_splitter = plain_splitter
    for tokenizer, kind in ((plain, type(plain._split)), (fast, Splitter)):
        back = pickle.loads(pickle.dumps(tokenizer))
        assert isinstance(back._split, kind)
        assert back.encode_python(TEXT) == back.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.slow
def test_spawned_workers_count_and_encode_the_same(tmp_path):
    script = tmp_path / "guarded.py"
    script.write_text(
        f"import multiprocessing, os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import bpe\nfrom data import cores\nfrom engine import splitting\n"
        "class Work:\n"
        "    def __init__(self, encode): self.encode = encode\n"
        "    def __call__(self, text): return self.encode(text), os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn', force=True)\n"
        "    cores.BATCH, os.cpu_count = 1000, lambda: 2\n"
        "    texts = [f'word{i % 7} the 12 ' * 60 for i in range(99)]\n"
        "    plain = bpe.Tokenizer.train(texts, 290)\n"
        "    splitting.use_in_bpe()\n"
        "    fast = bpe.Tokenizer.train(texts, 290)\n"
        "    assert fast.hash == plain.hash\n"
        "    for tok in (plain, fast):\n"
        "        for encode in (tok.encode_python, tok.encode):\n"
        "            found, processes = zip(*cores.on_all_cores(Work(encode), texts))\n"
        "            assert list(found) == [plain.encode_python(t) for t in texts]\n"
        "            assert os.getpid() not in processes\n"
        "    print('equal')\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["equal"], done.stderr
