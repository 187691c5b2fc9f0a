"""WMT 2014, English and German: archives of the shared task -> files of aligned lines.

Training is Europarl v7, Common Crawl and News Commentary v9 (4.5 million pairs), validation
newstest2013 (3,000 pairs), test newstest2014 (3,003), as in Vaswani et al. 2017. The archives are
1.7 GB, most of it other languages; the few members that are needed are copied out once.
"""

import gzip
import html
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data.download import (
    COMMON_CRAWL,
    EUROPARL,
    NEWS_COMMENTARY,
    NEWSTESTS,
    Remote,
    fetch,
    replacing,
)

# (archive, its German member, its English member). newstest2014 is in the archive of later dev
# sets as the same 3,003 pairs for both directions.
WMT14 = {
    "train": (
        (EUROPARL, "training/europarl-v7.de-en.de", "training/europarl-v7.de-en.en"),
        (COMMON_CRAWL, "commoncrawl.de-en.de", "commoncrawl.de-en.en"),
        (
            NEWS_COMMENTARY,
            "training/news-commentary-v9.de-en.de",
            "training/news-commentary-v9.de-en.en",
        ),
    ),
    "validation": ((NEWSTESTS, "dev/newstest2013.de", "dev/newstest2013.en"),),
    "test": ((NEWSTESTS, "dev/newstest2014-deen-src.de.sgm", "dev/newstest2014-deen-ref.en.sgm"),),
}


def wmt14_files(split: str, source: str, cache: Path) -> Iterator[tuple[tuple[Path, ...], str]]:
    """Yields ((source file, target file), what identifies their contents) of one split."""
    for remote, *members in WMT14[split]:
        if source == "en":
            members.reverse()
        yield unpacked_files(remote, members, cache), f"{remote.sha256} {' '.join(members)}"


def unpacked_files(remote: Remote, members: list[str], cache: Path) -> tuple[Path, ...]:
    """Members of a .tgz as .gz files of their lines in `cache`. Once they are there, the archive
    may be deleted."""
    names = [PurePosixPath(member).name.removesuffix(".sgm") for member in members]
    paths = tuple(cache / f"wmt14-{name}.gz" for name in names)
    missing = {m: path for m, path in zip(members, paths, strict=True) if not path.is_file()}
    if missing:
        unpack(fetch(remote, cache), missing)
    return paths


def unpack(archive: Path, members: dict[str, Path]) -> None:
    """Copies the members {member: path to write} in one pass. Nothing else in the archive is
    written, and no name in it decides where. An .sgm becomes one line for each of its segments.
    Raises ValueError for an archive that is damaged or lacks a member."""
    left = dict(members)
    bar = {"desc": f"unpacking {archive.name}", "disable": None}
    try:
        with (
            archive.open("rb") as file,
            tqdm.wrapattr(file, "read", archive.stat().st_size, **bar) as raw,
            tarfile.open(fileobj=raw, mode="r|gz") as tar,
        ):
            for entry in tar:
                name = entry.name.removeprefix("./")
                if entry.isfile() and name in left:
                    with (
                        replacing(left[name]) as into,
                        gzip.GzipFile("", "wb", 3, into, 0) as packed,
                    ):
                        lines = tar.extractfile(entry)
                        if name.endswith(".sgm"):
                            packed.writelines(segments(lines))
                        else:
                            shutil.copyfileobj(lines, packed, 1 << 20)
                    del left[name]
                    if not left:
                        return
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{archive} is no intact .tgz ({error}): delete it") from error
    raise ValueError(f"{archive} has no {' and no '.join(left)} in it: delete it")


def segments(lines: Iterable[bytes]) -> Iterator[bytes]:
    for line in lines:
        if match := re.match(rb"\s*<seg\b[^>]*>(.*)</seg>", line, re.IGNORECASE):
            yield html.unescape(match[1].decode("utf-8")).encode() + b"\n"
