"""Token ids on disk: written once as a stream, read by slices, however many there are.

The ids of `name.tokens` are in the files name.tokens, name.1.tokens, name.2.tokens, …: SHARD of
them in each but the last, little-endian, 2 bytes each where the vocabulary allows it, else 4. Each
file begins with a header of 128 bytes, whose numbers are little-endian too:

    8 bytes   magic "TOKENS\\0\\1"      8 bytes   ids in this file
    4 bytes   version                 8 bytes   ids in all files
    4 bytes   bytes per id            8 bytes   bytes of the text
    4 bytes   number of this file     32 bytes  SHA-256 of the tokenizer
    4 bytes   number of files         32 bytes  SHA-256 of the corpus
                                      16 bytes  split, filled up with zeros

Reads are plain reads at an offset. Memory-mapped files would take less code, but the pages that a
run has touched count as its memory, which would grow until the run has seen all of them.
"""

import os
import shutil
import struct
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import BinaryIO, NamedTuple

import numpy as np

MAGIC = b"TOKENS\0\1"
VERSION = 2
LAYOUT = struct.Struct("<8s4I3Q32s32s16s")
HEADER_SIZE = LAYOUT.size  # 128
SHARD = 1 << 28  # ids in a file: 512 MB or 1 GB, which file systems and copying handle well
OPEN = 64  # files of a stream that a process keeps open at once, of the 256 that macOS allows
MOST = 1 << 30  # bytes of one read: Linux gives at most 2 GiB, macOS refuses more
STALE = 86_400  # seconds without a new file after which an unfinished stream counts as abandoned


class Header(NamedTuple):
    magic: bytes
    version: int
    width: int
    number: int
    files: int
    count: int
    total: int
    text_bytes: int
    tokenizer: bytes
    corpus: bytes
    split: bytes


class Origin(NamedTuple):
    """What ids were made from: hashes in hex, and "train" or "validation"."""

    tokenizer: str
    corpus: str
    split: str

    def packed(self) -> tuple[bytes, bytes, bytes]:
        split = self.split.encode().ljust(16, b"\0")
        return bytes.fromhex(self.tokenizer), bytes.fromhex(self.corpus), split


def path_of(first: Path, number: int) -> Path:
    """name.tokens, 3 -> name.3.tokens; 0 is name.tokens itself."""
    return first.with_name(f"{first.stem}.{number}{first.suffix}") if number else first


# ---- reading -------------------------------------------------------------------------------------


class Tokens:
    """The ids of a stream. Nothing is held in memory: tokens[a:b] reads from disk.

    Threads and forked processes may share an instance.
    """

    def __init__(self, first: Path, count: int, shard: int, dtype: np.dtype):
        self.count, self.shard, self.dtype = count, shard, dtype
        # A file that falls out of the cache is closed when its last read has ended.
        self.file = lru_cache(OPEN)(lambda number: ShardFile(path_of(first, number)))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        """A new, read-only array. Raises ValueError if a file is gone or became shorter."""
        start, stop, step = part.indices(self.count)
        assert step == 1, "ids are read in their order"
        if start >= stop:
            return np.empty(0, self.dtype)
        number, last = start // self.shard, (stop - 1) // self.shard
        if number < last:
            borders = [start, *range((number + 1) * self.shard, stop, self.shard), stop]
            return np.concatenate([self[a:b] for a, b in pairwise(borders)])
        place, width = start - number * self.shard, self.dtype.itemsize
        raw = self.file(number).read(HEADER_SIZE + place * width, (stop - start) * width)
        return np.frombuffer(raw, self.dtype)


class ShardFile:
    """An open file that is read at offsets; its own position is never relied on."""

    def __init__(self, path: Path):
        self.path = path
        try:  # O_BINARY is for Windows
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise ValueError(
                f"{path} can no longer be read ({error.strerror}): start again, with --resume"
            ) from error
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on. Raises ValueError if the file became shorter."""
        found = PREAD(self.descriptor, min(size, MOST), offset)
        while len(found) < size:
            more = PREAD(self.descriptor, min(size - len(found), MOST), offset + len(found))
            if not more:
                raise ValueError(f"{self.path} became shorter: start again, with --resume")
            found += more
        return found


def seek_and_read(descriptor: int, size: int, offset: int) -> bytes:
    """os.pread for Windows, which lacks it: at most `size` bytes, none at the end of the file."""
    with LOCK:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)


PREAD = getattr(os, "pread", seek_and_read)
LOCK = Lock()


@dataclass
class TokenFile:
    path: Path  # the first file
    ids: Tokens
    text_bytes: int


def open_shards(path: Path, origin: Origin) -> TokenFile:
    """Opens a stream by its first file. Raises ValueError if a file is missing, truncated, not one
    of ours, in another file's place, or made from another text or tokenizer."""
    first = read_header(path)
    if first[-3:] != origin.packed():
        raise ValueError(f"{path} was made from another text or tokenizer: delete it")
    if first.width not in (2, 4) or first.files * first.count < first.total:
        raise ValueError(f"{path} has a damaged header: delete it")
    for number in range(max(1, first.files)):
        other = path_of(path, number)
        if not other.is_file():
            raise ValueError(f"{other} is missing, one of {first.files} files: delete {path}")
        count = min(first.count, first.total - number * first.count)
        if read_header(other) != first._replace(number=number, count=count):
            raise ValueError(f"{other} is not file {number} of those of {path}: delete it")
        size = other.stat().st_size
        if size != HEADER_SIZE + count * first.width:
            raise ValueError(f"{other} is truncated or damaged ({size:,} bytes): delete it")
    ids = Tokens(path, first.total, first.count, np.dtype(f"<u{first.width}"))
    return TokenFile(path, ids, first.text_bytes)


def read_header(path: Path) -> Header:
    with path.open("rb") as file:
        raw = file.read(HEADER_SIZE)
    if len(raw) < HEADER_SIZE or not raw.startswith(MAGIC):
        raise ValueError(f"{path} is no token file of this project: delete it")
    header = Header(*LAYOUT.unpack(raw))
    if header.version != VERSION:
        raise ValueError(
            f"{path} has version {header.version}, this code reads {VERSION}: delete it"
        )
    return header


# ---- writing -------------------------------------------------------------------------------------


def write_shards(
    path: Path, origin: Origin, width: int, pieces: Iterable[tuple[bytes, int]]
) -> None:
    """Writes a stream. pieces: (ids, `width` bytes each; how many bytes of text they are).

    The files get their names when all are complete. The first file comes last, because its header
    says which others there are; so an interruption leaves nothing that looks whole. And a process
    that is reading the same ids from files of these names never finds one missing.
    """
    with unfinished(path) as folder:
        made, total, text_bytes, number = folder / path.name, 0, 0, 0
        file = create_shard(made)
        try:
            for ids, size in pieces:
                text_bytes += size
                while ids:
                    if total // SHARD > number:
                        file.close()
                        number += 1
                        file = create_shard(path_of(made, number))
                    taken = ids[: (SHARD - total % SHARD) * width]
                    file.write(taken)
                    ids, total = ids[len(taken) :], total + len(taken) // width
        finally:
            file.close()
        files = range(number + 1)
        for number in files:
            count = min(SHARD, total - number * SHARD)
            about = MAGIC, VERSION, width, number, len(files), count, total, text_bytes
            with path_of(made, number).open("r+b") as file:
                file.write(LAYOUT.pack(*about, *origin.packed()))
                file.flush()
                os.fsync(file.fileno())
        for number in reversed(files):
            path_of(made, number).replace(path_of(path, number))


def create_shard(path: Path) -> BinaryIO:
    file = path.open("wb")
    file.write(bytes(HEADER_SIZE))
    return file


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` for the files that will get its name; it is deleted at the
    end. Killed processes leave theirs behind. Another machine or container cannot see which process
    is alive, so folders that have had no new file for a day are deleted."""
    for old in path.parent.iterdir():
        if old.name.startswith(f"{path.name}.") and old.suffix == ".part":
            with suppress(OSError):  # another process was faster
                if time.time() - old.stat().st_mtime > STALE:
                    shutil.rmtree(old)
    folder = Path(tempfile.mkdtemp(".part", f"{path.name}.", path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
