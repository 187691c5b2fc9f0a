"""Results of reading whole files, remembered as long as sizes and modification times stay the same.

So a start does not read a terabyte to learn that nothing changed. The results for the files of a
corpus are one JSON file in the cache: {path: [bytes, modification time in ns, result]}.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from data.download import file_sha256, replacing

SMALL = 1 << 24  # bytes; files of no more in all are read at each start, which takes 0.1 s
TICK = 2_000_000_000  # ns: the coarsest resolution of a file system's times, which is FAT's


def known_hashes(paths: Sequence[Path], cache: Path) -> list[str]:
    """The SHA-256, in hex, of the bytes of each file."""
    return remembered("sha256", file_sha256, paths, cache)


def remembered(
    what: str, examine: Callable[[Path], str], paths: Sequence[Path], cache: Path
) -> list[str]:
    """examine(path) for each file. `what` names the function and whatever else its result depends
    on. If the remembered file is damaged, it is made again.

    A file that has just changed may change again within the same tick of its clock and keep its
    size. So a result is remembered only if the file's last change was more than a tick before the
    reading, as in Git (its "racily clean" entries, Documentation/technical/racy-git).
    """
    now = time.time_ns()
    states = [path.stat() for path in paths]
    if sum(state.st_size for state in states) <= SMALL:
        return [examine(path) for path in paths]
    names = [str(path.resolve()) for path in paths]
    key = hashlib.sha256("\0".join([what, *names]).encode()).hexdigest()
    memo = cache / f"known-{key[:16]}.json"
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        known = {}
    known = known if isinstance(known, dict) else {}
    results, entries = [], {}
    bar = tqdm(paths, "reading", unit=" files", disable=None, delay=1)
    for path, name, state in zip(bar, names, states, strict=True):
        size, changed = state.st_size, state.st_mtime_ns
        match known.get(name):
            case [int(a), int(b), str(found)] if (a, b) == (size, changed):
                pass
            case _:
                found = examine(path)
        results.append(found)
        if changed + TICK < now:
            entries[name] = [size, changed, found]
    if entries != known:
        with suppress(OSError):  # a cache that cannot be written costs time but no result
            cache.mkdir(parents=True, exist_ok=True)
            with replacing(memo) as file:
                file.write(json.dumps(entries).encode())
    return results
