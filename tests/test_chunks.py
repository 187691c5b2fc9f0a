"""chunks.py against the package `regex`, cores.py against map(), and both where it goes wrong."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import regex
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

import chunks
from chunks import PATTERNS, Splitter, ranges_hold
from data import cores
from data.cores import batched, on_all_cores

# What patterns treat in different ways: letters and numbers of all kinds, marks, white space that
# only one engine takes for such, what matches 's only without case, what is beyond U+FFFF.
AWKWARD = "ab9_ \n\r\t'sSrRLlDm!=\x1c\x1f\x85\xa0²Ⅷ①é的٣ſK😀𝐀𝟘\u0345\u0301\ud800\u3000\u200b\u0378"


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), r"\w+|\W"])
@settings(deadline=None, max_examples=200)
@example(text="1234567é12345")
@example(text="1234567 12345")
@given(text=st.text(AWKWARD, max_size=20) | st.text("a1' \n\r\t", max_size=20) | st.text())
def test_chunks_are_those_of_regex(pattern, text):
    assert Splitter(pattern)(text) == regex.findall(pattern, text)


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


def test_batches_have_about_as_many_characters_as_they_should(monkeypatch):
    monkeypatch.setattr(cores, "BATCH", 10)
    rng = random.Random(0)
    texts = ["x" * rng.randrange(13) for _ in range(200)]
    found = list(batched(iter(texts), len))
    assert [text for batch in found for text in batch] == texts
    assert all(len("".join(batch[:-1])) < 10 <= len("".join(batch)) for batch in found[:-1])
    assert list(batched([], len)) == []


def double(n: int) -> int:
    if n == 13:
        raise ValueError("thirteen")
    return 2 * n


def with_process(n: int) -> tuple[int, int]:
    return n, os.getpid()


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 7, 12])
@pytest.mark.usefixtures("two_cores")
def test_results_come_in_order(n):
    assert list(on_all_cores(double, iter(range(n)))) == [2 * i for i in range(n)]


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="no forked workers here")
@pytest.mark.usefixtures("two_cores")
def test_processes_start_with_the_fourth_batch():
    for n, alone in ((3, True), (4, False)):
        found = list(on_all_cores(with_process, range(n)))
        assert [i for i, _ in found] == list(range(n))
        assert {process == os.getpid() for _, process in found} == {alone}


@pytest.mark.usefixtures("two_cores")
def test_few_batches_are_read_ahead():
    read = []
    results = on_all_cores(double, (read.append(i) or i for i in range(20, 120)))
    assert next(results) == 40
    assert len(read) <= 6
    results.close()  # ends the workers


@pytest.mark.usefixtures("two_cores")
def test_errors_of_workers_and_of_batches_come_out():
    with pytest.raises(ValueError, match="thirteen"):
        list(on_all_cores(double, range(20)))

    def broken():
        yield from range(9)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(on_all_cores(double, broken()))


@pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc of Linux")
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_parent(tmp_path, sign):
    """Workers of a killed parent waited for ever; those of an interrupted one filled the screen."""
    script = tmp_path / "endless.py"
    script.write_text(
        f"import itertools, os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from data import cores\nos.cpu_count = lambda: 2\n"
        "def work(i):\n    time.sleep(0.01)\n    return os.getpid()\n"
        "for worker in cores.on_all_cores(work, itertools.count()):\n"
        "    print(worker, flush=True)\n    time.sleep(0.05)\n",  # meanwhile, workers wait
        encoding="utf-8",
    )
    with (tmp_path / "errors").open("w", encoding="utf-8") as errors:
        command = [sys.executable, str(script)]
        started = {"stdout": subprocess.PIPE, "stderr": errors, "start_new_session": True}
        with subprocess.Popen(command, text=True, **started) as parent:
            workers = {int(parent.stdout.readline()) for _ in range(9)}
            assert parent.pid not in workers
            os.killpg(parent.pid, sign) if sign == signal.SIGINT else parent.kill()
            parent.communicate(timeout=30)
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, workers))
    assert (tmp_path / "errors").read_text(encoding="utf-8").count("Traceback") <= 1


def alive(process: int) -> bool:
    """A zombie, whose new parent has not looked yet, is not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state.split()[0] != "Z"


def test_no_pattern_is_translated_by_guesswork():
    assert set(chunks.TRANSLATED) < set(PATTERNS.values())
    assert Splitter(r"\p{L}+|(?s:.)")("ab!é") == ["ab", "!", "é"]
