"""data/shards.py and the data classes at scale: what is read, what is held, what grows."""

import gc
import math
import os
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TOY, TOY_BERT, TOY_PAIRS
from hypothesis import given, settings
from hypothesis import strategies as st

import data.shards
import tasks
from bpe import END_OF_TEXT, Tokenizer
from data.buckets import evenly
from data.shards import LAYOUT, MAGIC, Origin, Tokens, open_shards, path_of, write_shards
from data.text import open_corpus
from data.tokens import tokenize
from engine.config import resolve
from tasks.text import Data

ORIGIN = Origin("11" * 32, "22" * 32, "train")
CORPUS = SimpleNamespace(hash="", prompts=[""], rule="", name="numbers")
FILES = Path("/proc/self/fd")
SPARSE = pytest.mark.skipif(sys.platform == "win32", reason="NTFS would fill the disk with zeros")


def written(path: Path, ids: np.ndarray, sizes: list[int] | None = None) -> Tokens:
    """Writes the ids as a stream, in pieces of these sizes."""
    cuts = np.cumsum(sizes or [len(ids)])[:-1]
    pieces = [(part.astype("<u2").tobytes(), 1) for part in np.split(ids, cuts)]
    write_shards(path, ORIGIN, 2, iter(pieces))
    return open_shards(path, ORIGIN).ids


def sparse(path: Path, total: int, shard: int, marks: dict[int, int]) -> Tokens:
    """Makes a stream of zeros that takes no space on the disk, with ids at some places of it."""
    files = math.ceil(total / shard)
    for number in range(files):
        count = min(shard, total - number * shard)
        about = MAGIC, 2, 2, number, files, count, total, 3 * total, *ORIGIN.packed()
        with path_of(path, number).open("wb") as file:
            file.write(LAYOUT.pack(*about))
            file.truncate(128 + 2 * count)
            for place, value in marks.items():
                if place // shard == number:
                    file.seek(128 + 2 * (place - number * shard))
                    file.write(value.to_bytes(2, "little"))
    return open_shards(path, ORIGIN).ids


def train_windows(ids, **options) -> Data:
    file = SimpleNamespace(ids=ids, text_bytes=len(ids))
    return Data(file, CORPUS, "train", None, **options)


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, int, int]]:
    """A growing list of (name of the file, offset, size), one for every read of ids."""
    seen, real = [], data.shards.ShardFile.read

    def read(self, offset, size):
        seen.append((self.path.name, offset, size))
        return real(self, offset, size)

    monkeypatch.setattr(data.shards.ShardFile, "read", read)
    return seen


# ---- shards --------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.data(), st.lists(st.integers(0, 15), max_size=5), st.integers(1, 13))
def test_slices_of_shards_are_those_of_the_array(tmp_path_factory, draw, sizes, shard):
    ids = np.random.default_rng(sum(sizes)).integers(0, 1 << 16, sum(sizes)).astype(np.uint16)
    path, before = tmp_path_factory.mktemp("shards") / "a.b-1.tokens", data.shards.SHARD
    data.shards.SHARD = shard
    try:
        tokens = written(path, ids, sizes)
    finally:
        data.shards.SHARD = before
    assert len(tokens) == len(ids) and tokens.dtype == np.uint16
    names = {path_of(path, k).name for k in range(max(1, math.ceil(len(ids) / shard)))}
    assert {p.name for p in path.parent.iterdir()} == names
    place = st.none() | st.integers(-len(ids) - 3, len(ids) + 3)
    for _ in range(10):
        part = slice(draw.draw(place), draw.draw(place))
        assert tokens[part].dtype == np.uint16 and tokens[part].tolist() == ids[part].tolist()


def test_the_names_and_headers_are_what_the_file_says(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shards, "SHARD", 5)
    path = tmp_path / "a.tokens"
    written(path, np.arange(12), [4, 8])
    for number, (name, count) in enumerate((("a", 5), ("a.1", 5), ("a.2", 2))):
        raw = (tmp_path / f"{name}.tokens").read_bytes()
        assert raw[:8] == b"TOKENS\0\1" and len(raw) == 128 + 2 * count
        four = [int.from_bytes(raw[i : i + 4], "little") for i in range(8, 24, 4)]
        eight = [int.from_bytes(raw[i : i + 8], "little") for i in range(24, 48, 8)]
        assert four == [2, 2, number, 3] and eight == [count, 12, 2]
        assert raw[48:112] == b"\x11" * 32 + b"\x22" * 32 and raw[112:128] == b"train" + bytes(11)
        assert np.frombuffer(raw[128:], "<u2").tolist() == list(range(5 * number, 12))[:count]


def damaged(path: Path, how: str) -> None:
    one, two = path_of(path, 1), path_of(path, 2)
    if how == "missing":
        one.unlink()
    elif how == "truncated":
        two.write_bytes(two.read_bytes()[:-2])
    elif how == "longer":
        one.write_bytes(one.read_bytes() + b"\0\0")
    elif how == "interchanged":
        one.rename(path.with_name("x")), two.rename(one), path.with_name("x").rename(two)
    elif how == "foreign":
        raw = bytearray(one.read_bytes())
        raw[100] ^= 1  # of the hash of the corpus
        one.write_bytes(raw)
    elif how == "other split":
        other = first_of(path.parent, "validation")
        for number in range(3):
            path_of(path, number).write_bytes(path_of(other, number).read_bytes())
    elif how == "count":
        raw = bytearray(path.read_bytes())
        raw[20] = 1  # number of files
        path.write_bytes(raw)
    elif how == "version 1":
        path.write_bytes(MAGIC + (1).to_bytes(4, "little") + path.read_bytes()[12:])


@pytest.mark.parametrize(
    "how,message",
    [
        ("missing", r"toy-train-.*\.1\.tokens is missing, one of \d+ files"),
        ("truncated", r"\.2\.tokens is truncated or damaged"),
        ("longer", r"\.1\.tokens is truncated or damaged"),
        ("interchanged", r"\.1\.tokens is not file 1 of those of"),
        ("foreign", r"\.1\.tokens is not file 1 of those of"),
        ("other split", "was made from another text or tokenizer"),
        ("count", "has a damaged header"),
        ("version 1", "has version 1, this code reads 2"),
    ],
)
def test_a_damaged_set_of_shards_is_refused_and_made_again(toy, capfd, monkeypatch, how, message):
    monkeypatch.setattr(data.shards, "SHARD", 100)
    corpus = open_corpus("toy.txt", toy)
    tokenizer = toy_tokenizer()
    tokenize(corpus, "validation", tokenizer, toy)
    file = tokenize(corpus, "train", tokenizer, toy)
    want = file.ids[:].tolist()
    del file  # Windows replaces no open file
    path = first_of(toy)
    damaged(path, how)
    with pytest.raises(ValueError, match=message) as error:
        open_shards(path, Origin(tokenizer.hash, corpus.hash, "train"))
    assert "delete" in str(error.value) and "\n" not in str(error.value)
    assert tokenize(corpus, "train", tokenizer, toy).ids[:].tolist() == want
    assert "making the tokens again" in "".join(capfd.readouterr())


def first_of(folder: Path, split: str = "train") -> Path:
    return next(p for p in folder.glob(f"toy-{split}-*.tokens") if p.name.count(".") == 1)


def toy_tokenizer() -> Tokenizer:
    text = Path("toy.txt").read_text(encoding="utf-8")
    return Tokenizer.train([text], 280, special_tokens=(END_OF_TEXT,))


@pytest.mark.parametrize("step", range(5))
def test_a_kill_between_the_renames_leaves_nothing_that_looks_whole(tmp_path, monkeypatch, step):
    """Also where there were files of the same names: what is found is either whole or refused."""
    monkeypatch.setattr(data.shards, "SHARD", 5)
    path, old, real, done = tmp_path / "a.tokens", tmp_path / "old", Path.replace, []
    old.mkdir()
    written(old / path.name, np.arange(21))

    def replace(self, target):
        if len(done) == step:
            raise KeyboardInterrupt
        done.append(target)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    for folder in (tmp_path, old):
        del done[:]
        with pytest.raises(KeyboardInterrupt):
            written(folder / path.name, np.arange(100, 122))
        assert len(done) == step and not list(folder.glob("*.part"))
    assert not path.exists()
    if step:
        with pytest.raises(ValueError, match=r"is not file \d of"):
            open_shards(old / path.name, ORIGIN)
    else:
        assert open_shards(old / path.name, ORIGIN).ids[:].tolist() == list(range(21))


def test_what_a_killed_process_left_goes_after_a_day(tmp_path):
    path = tmp_path / "a.tokens"
    others = [tmp_path / name for name in ("a.tokens.1.part", "a.tokens.2.part", "b.tokens.1.part")]
    for folder in others:
        folder.mkdir()
        (folder / "a.tokens").write_bytes(b"half")
    for folder in others[1:]:
        os.utime(folder, (1, 1))
    written(path, np.arange(5))
    assert [folder.exists() for folder in others] == [True, False, True]


@pytest.mark.parametrize("shard,seek", [(1000, False), (1000, True), (10_000, True)])
def test_threads_share_few_open_files(tmp_path, monkeypatch, shard, seek):
    """A file that must close so that another can be opened may still be read by another thread."""
    if seek:
        monkeypatch.setattr(data.shards, "PREAD", data.shards.seek_and_read)
    monkeypatch.setattr(data.shards, "SHARD", shard)
    monkeypatch.setattr(data.shards, "OPEN", 2)
    ids = np.random.default_rng(0).integers(0, 1 << 16, 20_000).astype(np.uint16)
    tokens = written(tmp_path / "a.tokens", ids)

    def right(seed: int) -> bool:
        starts = np.random.default_rng(seed).integers(0, len(ids) - 50, 1500)
        return all((tokens[s : s + 50] == ids[s : s + 50]).all() for s in starts.tolist())

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(right, range(4)))
    finally:
        sys.setswitchinterval(before)
    if FILES.exists():
        assert 1 <= open_shard_files(tmp_path) <= 2


def open_files() -> list[str]:
    """The names of the files that this process has open."""
    found = []
    for path in FILES.iterdir():
        with suppress(OSError):  # the folder itself, which is closed by now
            found.append(str(path.readlink()))
    return found


def open_shard_files(folder: Path) -> int:
    """The open files of this test: streams of earlier tests may still await garbage collection."""
    return sum(name.startswith(str(folder)) and name.endswith(".tokens") for name in open_files())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_processes_share_open_files(tmp_path):
    ids = np.random.default_rng(0).integers(0, 1 << 16, 50_000).astype(np.uint16)
    tokens = written(tmp_path / "a.tokens", ids)

    def right(seed: int) -> bool:
        starts = np.random.default_rng(seed).integers(0, len(ids) - 50, 20_000)
        return all((tokens[s : s + 50] == ids[s : s + 50]).all() for s in starts.tolist())

    assert right(0)  # opens the file
    child = os.fork()
    if not child:
        os._exit(0 if right(1) else 1)
    mine = right(2)
    assert os.waitpid(child, 0)[1] == 0 and mine


def test_short_reads_go_on_and_lost_files_end_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shards, "MOST", 7)  # an odd number of bytes, in the middle of an id
    path = tmp_path / "a.tokens"
    tokens, sizes, real = written(path, np.arange(100)), [], data.shards.PREAD
    monkeypatch.setattr(data.shards, "PREAD", lambda f, n, at: sizes.append(n) or real(f, n, at))
    assert tokens[3:90].tolist() == list(range(3, 90))
    assert sizes == [7] * 24 + [6]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.tokens became shorter: start again"):
        tokens[:]
    assert tokens[:90].tolist() == list(range(90))
    fresh = Tokens(tmp_path / "b.tokens", 10, 10, tokens.dtype)
    with pytest.raises(ValueError, match=r"b\.tokens can no longer be read \(No such file"):
        fresh[:1]


# ---- ten billion tokens --------------------------------------------------------------------------


@SPARSE
def test_ten_billion_tokens_are_opened_and_read_in_slices(tmp_path, reads):
    """20 GB that take no space on the disk; a table of the windows would have 312 MB."""
    total, T, B = 10_000_000_000, 256, 32
    marks = {0: 7, 2**31: 8, 2**32 + 1: 9, 2**28 * 20 - 1: 10, 2**28 * 20: 11, total - 1: 12}
    sparse(tmp_path / "a.tokens", total, 1 << 28, marks)
    for number in range(38):
        assert 512 * path_of(tmp_path / "a.tokens", number).stat().st_blocks < 1e6
    tracemalloc.start()
    try:
        ids = open_shards(tmp_path / "a.tokens", ORIGIN).ids
        windows = train_windows(ids, block_size=T, batch_size=B)
        batches = [windows.batch(i) for i in range(10)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20e6
    assert sum(size for _, _, size in reads) == 10 * B * (T + 1) * 2
    assert all(batch["tokens"].shape == (B, T) for batch in batches)
    assert len({name for name, _, _ in reads}) == 38  # from all over the text
    assert len(ids) == total and windows.n_windows == (total - 1 - 255) // T
    for place, value in marks.items():
        around = ids[max(0, place - 3) : place + 4].tolist()
        want = [marks.get(p, 0) for p in range(max(0, place - 3), min(total, place + 4))]
        assert around == want and value in around
    assert evenly(total, 7).tolist() == [k * total // 7 for k in range(7)]
    last = windows.starts(np.arange(windows.n_windows - 100, windows.n_windows))
    assert last.max() > 2**31 and last.max() + T < total


@SPARSE
def test_every_rank_reads_its_own_slices_and_together_those_of_one(tmp_path, reads):
    ids = sparse(tmp_path / "a.tokens", 3_000_000_000, 1 << 28, {})
    one, four = (train_windows(ids, block_size=128, batch_size=b) for b in (24, 6))
    for step in (0, 5, 40_000):
        del reads[:]
        one.batch(step)
        whole, own = sorted(reads), []
        for rank in range(4):
            del reads[:]
            four.batch(step * 4 + rank)
            own.append(list(reads))
        assert all(len(mine) == 6 for mine in own) and len(set(whole)) == 24
        assert sorted(read for mine in own for read in mine) == whole
        ends = [(name, offset, offset + size - 2) for name, offset, size in whole]  # T + 1 tokens
        for (name, _, end), (other, begin, _) in pairwise(ends):
            assert name != other or end <= begin


@SPARSE
@pytest.mark.skipif(not FILES.exists(), reason="no /proc here")
def test_open_files_and_memory_stay_flat_over_a_long_run(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shards, "OPEN", 6)
    ids = sparse(tmp_path / "a.tokens", 1 << 24, 1 << 21, {})  # 32 MB in 8 files
    windows = train_windows(ids, block_size=256, batch_size=32)
    for i in range(100):
        windows.batch(i)
    before, files = resident(), len(open_files())
    for i in range(100, 2148):  # an epoch
        windows.batch(i)
    assert resident() - before < 8e6
    assert len(open_files()) <= files and 1 <= open_shard_files(tmp_path) <= 6
    assert ids.file.cache_info().misses > 1000  # files were closed and opened again


def resident() -> int:
    """The bytes of this process that are in memory, including those of mapped files."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.parametrize("small", [TOY, TOY_PAIRS, TOY_BERT, [*TOY_BERT, "--nsp=false"]])
@pytest.mark.usefixtures("toy_pairs")
def test_no_data_grows_with_the_epochs(small):
    config, sizes, _ = resolve(small)
    train, _ = tasks.task(config.model).Data.splits(config, sizes)
    n, held = train.tokens_per_epoch // train.tokens_per_batch, []
    tracemalloc.start()
    try:
        for epoch in range(41):
            for i in (0, n // 2, n - 1):
                train.batch(epoch * n + i)
            if epoch % 20 == 0:
                gc.collect()  # empties CPython's lists of free tuples, too
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[2] - held[1] < 10_000  # an epoch's order has 2,000 or more
