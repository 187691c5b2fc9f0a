"""data/hashes.py: files are read once, and once more when they change."""

import gzip
import hashlib
import json
import os
import time
from pathlib import Path

import pytest

import data.hashes
import data.text
from data.hashes import known_hashes, remembered
from data.text import open_corpus


@pytest.fixture
def examined(monkeypatch) -> list[str]:
    """Names of the files that were hashed; all files count as large."""
    seen, real = [], data.hashes.file_sha256
    for module in (data.hashes, data.text):
        monkeypatch.setattr(module, "file_sha256", lambda p: seen.append(p.name) or real(p))
    monkeypatch.setattr(data.hashes, "SMALL", 0)
    return seen


NOW = time.time()


def old_file(path: Path, text: str, seconds: float = 100) -> Path:
    """Writes a file whose last change was so many seconds ago."""
    path.write_text(text, encoding="utf-8")
    os.utime(path, (NOW - seconds, NOW - seconds))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_folder_is_hashed_once_and_what_changed_again(toy, examined):
    (toy / "many").mkdir()
    for i in range(20):
        old_file(toy / "many" / f"{i:02}.txt", f"file {i:02}")
    first = open_corpus("many", toy / "cache").hash
    assert len(examined) == 20
    assert open_corpus("many", toy / "cache").hash == first and len(examined) == 20
    assert len(list((toy / "cache").iterdir())) == 1
    old_file(toy / "many" / "03.txt", "file XX", 50)  # the same size
    del examined[:]
    second = open_corpus("many", toy / "cache").hash
    assert examined == ["03.txt"] and second != first
    old_file(toy / "many" / "03.txt", "file 03 and more", 50)  # the same time
    del examined[:]
    assert open_corpus("many", toy / "cache").hash not in (first, second)
    assert examined == ["03.txt"]
    open_corpus("many", toy / "elsewhere")
    assert len(examined) == 21


def test_a_file_that_changes_twice_within_a_tick_is_read_again(toy, examined):
    """Size and modification time are then the same: Git calls such an entry racily clean."""
    path, ago = toy / "a.txt", time.time() - NOW
    for seconds, trusted in ((1.0, False), (-100.0, False), (3.0, True)):
        old_file(path, "one", seconds - ago)
        stat = path.stat()
        before = known_hashes([path], toy / f"cache{seconds}")
        path.write_text("two", encoding="utf-8")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        after = known_hashes([path], toy / f"cache{seconds}")
        assert (before == after) == trusted
        assert trusted or after == [sha256(path)]


@pytest.mark.parametrize("damage", ["", "{", "[]", "7", '{"%s": 7}', '{"%s": [1, 2]}', "null"])
def test_a_damaged_memory_is_made_again(toy, examined, damage):
    path = old_file(toy / "a.txt", "text")
    known_hashes([path], toy / "cache")
    [memo] = (toy / "cache").glob("known-*.json")
    whole = memo.read_text(encoding="utf-8")
    name = json.dumps(str(path.resolve()))[1:-1]
    memo.write_text(damage.replace("%s", name), encoding="utf-8")
    assert known_hashes([path], toy / "cache") == [sha256(path)] and len(examined) == 2
    assert memo.read_text(encoding="utf-8") == whole
    assert json.loads(whole) == {str(path.resolve()): [4, path.stat().st_mtime_ns, sha256(path)]}


def test_what_is_asked_and_of_which_files_is_told_apart(toy, examined):
    paths = [old_file(toy / f"{name}.txt", name) for name in "ab"]
    upper = remembered("upper", lambda p: p.read_text(encoding="utf-8").upper(), paths, toy / "c")
    assert upper == ["A", "B"]
    assert known_hashes(paths, toy / "c") == [sha256(path) for path in paths]
    assert known_hashes(paths[::-1], toy / "c") == [sha256(path) for path in paths[::-1]]
    assert known_hashes(paths[:1], toy / "c") == [sha256(paths[0])]


def test_small_files_are_read_at_each_start_and_a_lost_cache_is_no_fault(
    toy, examined, monkeypatch
):
    paths = [old_file(toy / f"{i}.txt", "1234567890") for i in range(3)]
    (toy / "no folder").touch()
    for _ in range(2):
        assert known_hashes(paths, toy / "no folder") == [sha256(path) for path in paths]
    monkeypatch.setattr(data.hashes, "SMALL", 30)  # bytes, of all three together
    known_hashes(paths, toy / "cache")
    known_hashes(paths, toy / "cache")
    assert len(examined) == 12 and not (toy / "cache").exists()
    monkeypatch.setattr(data.hashes, "SMALL", 29)
    known_hashes(paths, toy / "cache")
    assert len(list((toy / "cache").iterdir())) == 1


def test_a_gz_is_unpacked_at_the_first_start_only(toy, examined, monkeypatch):
    text = "".join(f"line {i}, {i * i}\n" for i in range(60_000))
    path = toy / "a.txt.gz"
    path.write_bytes(gzip.compress(text.encode()))
    os.utime(path, (1e9, 1e9))
    unpacked, real = [], gzip.GzipFile.read

    def read(self, size=-1):
        found = real(self, size)
        unpacked.append(len(found))
        return found

    monkeypatch.setattr(gzip.GzipFile, "read", read)
    first = open_corpus("a.txt.gz", toy / "cache")
    assert sum(unpacked) > len(text) and first.train[0].end == first.validation[0].start
    del unpacked[:]
    assert open_corpus("a.txt.gz", toy / "cache") == first
    assert sum(unpacked) <= 1 << 16 and examined == ["a.txt.gz"]  # it is still looked at for zeros
    assert first.train[0].end == int(len(text) * 0.9)
