"""A name, a file or a folder -> training and validation text, streamed in pieces of about 1 MB.

The split is by a stated rule, never by chance:
- one text (.txt, .gz, any other UTF-8 file): its first 90% train, its last 10% validate, as in
  nanoGPT; the cut is by bytes and moved to the next character;
- one .jsonl file (or .jsonl.gz; one object a line, its text under "text"): the same cut, moved to
  the next line, so that a document is never divided;
- a folder: whole files. Sorted by name, every tenth one validates; with fewer than ten, the last.
  Hidden files (._a.txt, .ipynb_checkpoints/a.txt) are left out and counted, and files that validate
  but are copies of some that train are named;
- stdlib, the default: the source files of Python's own standard library, as a folder.

Left out: HTML, PDF and other formats that need a parser; cleaning and deduplication.
"""

import codecs
import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from data.download import SHAKESPEARE, fetch, file_sha256
from data.hashes import known_hashes, remembered

BLOCK = 1 << 20  # bytes read at a time, and about the size of a piece
TRAIN_SHARE = 0.9
HEAD = 1 << 16  # bytes that are checked before any work is done
CONVERT = "convert it first (for example with iconv -f cp1252 -t utf-8)"
SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")  # what a folder is searched for, also with .gz
STDLIB_SKIPS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
NAMES = ("stdlib", "shakespeare")
ARRAY = " but an array: write one object on each line (for example with jq -c '.[]')"


@dataclass(frozen=True)
class Part:
    """The bytes from start to end of one (decompressed) file; None is the end of the file."""

    path: Path
    start: int = 0
    end: int | None = None


@dataclass
class Corpus:
    """Named text in two splits. `hash` is of the files' contents and how they are divided."""

    name: str
    hash: str
    rule: str  # how it was split, for the plan
    train: list[Part]
    validation: list[Part]
    prompts: list[str] = field(default_factory=lambda: [""])  # to show what a model has learnt

    def pieces(self, split: str) -> Iterator[tuple[str, bool]]:
        """Yields (text, whether a document begins here) for split "train" or "validation"."""
        for part in getattr(self, split):
            if is_jsonl(part.path):
                for document in jsonl_documents(part):
                    yield document, True
            else:
                for i, text in enumerate(text_pieces(part)):
                    yield text, i == 0


def open_corpus(data: str, cache: Path) -> Corpus:
    """data is one of NAMES or a path; downloads go to `cache`. Raises ValueError on bad input."""
    if data == "stdlib":
        folder, files = stdlib_files()
        return folder_corpus("stdlib", folder, files, cache, ["def ", "class ", "import os"])
    if data == "shakespeare":
        path = fetch(SHAKESPEARE, cache)
        return file_corpus("shakespeare", path, cache, ["ROMEO:", "KING RICHARD III:", "O, "])
    if not data:
        raise ValueError(f"--data is empty: name a file, a folder, or one of {', '.join(NAMES)}")
    path = Path(data)
    if path.is_dir():
        name, (files, hidden) = path.resolve().name, texts_below(path, SUFFIXES)
        if len(files) == 1:
            corpus = file_corpus(name, files[0], cache)
        else:
            corpus = folder_corpus(name, path, files, cache)
        return replace(corpus, rule=corpus.rule + hidden)
    if not path.is_file():
        raise ValueError(f"{data} is no file or folder here, nor one of {', '.join(NAMES)}")
    refuse_tables(path)
    return file_corpus(name_of(path), path, cache)


def name_of(path: Path) -> str:
    """The name of a file without its endings; what is made from the file is called after it."""
    return path.name.partition(".")[0] or path.name


def whole(corpus: Corpus) -> Corpus:
    """The same files, all of which validate, to score the user's own text as a whole."""
    paths = sorted({part.path for part in (*corpus.train, *corpus.validation)})
    digest = hashlib.sha256(f"whole {corpus.hash}".encode()).hexdigest()
    parts = [Part(path) for path in paths]
    return replace(corpus, hash=digest, rule="scored whole", train=[], validation=parts)


def stdlib_files() -> tuple[Path, list[Path]]:
    """The folder of Python's standard library and its source files, without its tests."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    inside = ((p, p.relative_to(folder).parts[:-1]) for p in folder.rglob("*.py"))
    files = [p for p, parts in inside if not STDLIB_SKIPS.intersection(parts)]
    if not files:
        raise ValueError(f"Python's standard library has no source at {folder}: pass --data")
    return folder, sorted_files(folder, files)


def texts_below(folder: Path, suffixes: Sequence[str]) -> tuple[list[Path], str]:
    """(the texts of a folder, sorted; what is said of hidden files, which are left out: editors and
    systems keep copies and notes of their own in them). Raises ValueError if there is no text."""
    endings = (*suffixes, *(s + ".gz" for s in suffixes))
    found = [p for p in folder.rglob("*") if p.is_file() and p.name.lower().endswith(endings)]
    texts = [p for p in found if not any(s[0] == "." for s in p.relative_to(folder).parts)]
    hidden, note = len(found) - len(texts), ""
    if hidden:
        note = f"; {hidden:,} hidden file{'s' * (hidden > 1)} left out"
    if not texts:
        raise ValueError(f"{folder} holds no text: a file must end in {', '.join(endings)}{note}")
    return sorted_files(folder, texts), note


def sorted_files(folder: Path, files: list[Path]) -> list[Path]:
    """The files sorted by relative name, with / on every system, so that every machine splits a
    folder in the same way."""
    return sorted(files, key=lambda p: p.relative_to(folder).as_posix())


def folder_corpus(
    name: str, folder: Path, files: list[Path], cache: Path, prompts: list[str] | None = None
) -> Corpus:
    validation = files[9::10] or files[-1:]
    held_out = set(validation)
    train = [path for path in files if path not in held_out]
    marked = [check_text(path) for path in files]
    digest, hashes = hashlib.sha256(b"folder 1"), known_hashes(files, cache)
    for path, sha256, is_marked in zip(files, hashes, marked, strict=True):
        mark = "\0mark" * is_marked
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256}{mark}".encode())
    contents = dict(zip(files, content_hashes(files, hashes, cache), strict=True))
    trains = {contents[path]: path for path in reversed(train)}
    copies = [(path, trains[contents[path]]) for path in validation if contents[path] in trains]
    return Corpus(
        name,
        digest.hexdigest(),
        f"{len(train)} files train, {len(validation)} validate "
        f"({'every tenth' if len(files) >= 10 else 'the last'}){copies_told(copies)}",
        [Part(path) for path in train],
        [Part(path) for path in validation],
        prompts or [""],
    )


def content_hashes(files: Sequence[Path], hashes: Sequence[str], cache: Path) -> list[str]:
    """What is equal for files of equal text, given their SHA-256: a .gz is unpacked if there are
    others beside it. A file without text has its name, as it is nobody's copy."""
    packed = [path for path in files if path.name.lower().endswith(".gz")]
    inside = dict.fromkeys(packed, "")
    if len(packed) < len(files):
        found = remembered("sha256 of the text", text_sha256, packed, cache)
        inside = dict(zip(packed, found, strict=True))
    contents = [inside.get(path) or sha256 for path, sha256 in zip(files, hashes, strict=True)]
    nothing = hashlib.sha256().hexdigest()
    return [str(path) if x == nothing else x for path, x in zip(files, contents, strict=True)]


def text_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for block in blocks(Part(path)):
        digest.update(block)
    return digest.hexdigest()


def copies_told(copies: Sequence[tuple[Path, Path]]) -> str:
    """What the plan says of validation files, each with the training file that it is a copy of."""
    if not copies:
        return ""
    one, other = copies[0]
    more = f" ({len(copies) - 1:,} more are copies, too)" * (len(copies) > 1)
    what = "given twice" if one.resolve() == other.resolve() else f"a copy of {other}"
    return f"; {one} is {what}{more}: remove one, or what trains also validates"


def file_corpus(name: str, path: Path, cache: Path, prompts: list[str] | None = None) -> Corpus:
    mark = " mark" * check_text(path)
    [found] = remembered(f"cut {TRAIN_SHARE} and sha256", cut_and_sha256, [path], cache)
    cut = int(found.split()[0])
    return Corpus(
        name,
        hashlib.sha256(f"file 1 {found}{mark}".encode()).hexdigest(),
        "the first 90% train, the last 10% validate",
        [Part(path, 0, cut)],
        [Part(path, cut)],
        prompts or [""],
    )


def cut_and_sha256(path: Path) -> str:
    """Where a text is divided, in bytes, and its hash. For a .gz, both take reading all of it."""
    cut = next_border(path, int(text_size(path) * TRAIN_SHARE), b"\n" if is_jsonl(path) else None)
    return f"{cut} {file_sha256(path)}"


# ---- reading -------------------------------------------------------------------------------------


def plain_name(path: Path) -> str:
    """The name of a file, or of what a .gz holds, in small letters: its end says the kind."""
    return path.name.lower().removesuffix(".gz")


def is_jsonl(path: Path) -> bool:
    return plain_name(path).endswith(".jsonl")


def open_bytes(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def check_text(path: Path) -> bool:
    """Raises ValueError for a file that is empty, binary or not UTF-8, before any work is done.
    Returns whether it begins with a byte-order mark, which editors on Windows write and which is no
    part of the text. (Where lines are JSON, the parser leaves it out: False.)"""
    head = next(blocks(Part(path, 0, HEAD)), b"")
    if not head and path.name != "__init__.py":
        raise ValueError(f"{path} is empty: give a file with text in it")
    refuse_binary(path, head)
    decode(codecs.getincrementaldecoder("utf-8")(), head, False, path, 0)
    return head.startswith(codecs.BOM_UTF8) and not is_jsonl(path)


def refuse_tables(path: Path) -> None:
    """Raises ValueError for a table or one JSON value: its commas and brackets would be learnt."""
    if plain_name(path).endswith((".csv", ".tsv")):
        raise ValueError(
            f'{path} is a table, no text: write its texts as .jsonl, one object with a "text" on '
            "each line, or call it .txt if its separators are to be learnt"
        )
    if plain_name(path).endswith(".json"):
        head = next(blocks(Part(path, 0, HEAD)), b"").removeprefix(codecs.BOM_UTF8).lstrip()
        found = "a JSON array" if head.startswith(b"[") else "JSON"
        raise ValueError(
            f'{path} is {found}, no text: write a .jsonl, one object with a "text" on each line '
            "(for example with jq -c '.[]'), or call it .txt if its brackets are to be learnt"
        )


def refuse_binary(path: Path, head: bytes) -> None:
    if b"\0" in head or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(
            f"{path} is binary, or UTF-16: give a text in UTF-8 (iconv -f utf-16 -t utf-8 converts "
            "UTF-16)"
        )


def decode(decoder, block: bytes, final: bool, path: Path, offset: int) -> str:
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 near byte {offset + error.start:,}: {CONVERT}"
        ) from error


def next_border(path: Path, cut: int, border: bytes | None) -> int:
    """The first place from `cut` on where a character (or, given b"\\n", a line) begins."""
    for block in blocks(Part(path, cut)):
        for i, byte in enumerate(block):
            if border is None and byte & 0xC0 != 0x80:  # 10xxxxxx continues a character
                return cut + i
            if border is not None and byte == border[0]:
                return cut + i + 1
        cut += len(block)
    return cut


def text_size(path: Path) -> int:
    """Bytes of the text; for a .gz, they are known only after reading all of it."""
    if not path.name.lower().endswith(".gz"):
        return path.stat().st_size
    return sum(map(len, blocks(Part(path))))


def blocks(part: Part) -> Iterator[bytes]:
    """The bytes of a part, at most BLOCK at a time. Every read of a text goes through here."""
    left = None if part.end is None else part.end - part.start
    try:
        with open_bytes(part.path) as file:
            file.seek(part.start)  # gzip reads up to there by itself
            while block := file.read(BLOCK if left is None else min(BLOCK, left)):
                left = None if left is None else left - len(block)
                yield block
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{part.path} is no intact gzip file ({error}): get it again") from error


def text_pieces(part: Part) -> Iterator[str]:
    r"""The text of a part in pieces that a tokenizer may take one by one.

    A piece ends after a line break that has no white space on either side. No split pattern joins
    what such a border separates, so the tokens are those of the undivided text. If 4 MB have no
    such place (lines that end in \r\n, for example), they are cut anywhere, which costs a token or
    two but no text. A byte-order mark at the beginning of the file is left out.
    """
    encoding = "utf-8" if part.start else "utf-8-sig"
    decoder, offset, rest = codecs.getincrementaldecoder(encoding)(), part.start, ""
    for block in blocks(part):
        rest += decode(decoder, block, False, part.path, offset)
        offset += len(block)
        end = len(rest) - 1
        while (end := rest.rfind("\n", 1, max(end, 1))) > 0:
            if not rest[end - 1].isspace() and not rest[end + 1].isspace():
                break
        if end > 0 or len(rest) > 4 * BLOCK:
            end = end + 1 if end > 0 else len(rest)
            yield rest[:end]
            rest = rest[end:]
    rest += decode(decoder, b"", True, part.path, offset)
    if rest:
        yield rest


def jsonl_documents(part: Part) -> Iterator[str]:
    number, rest = 0, b""
    for block in chain(blocks(part), [None]):
        lines = (rest + (block or b"")).split(b"\n")
        rest = lines.pop() if block is not None else b""
        for line in lines:
            number += 1
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError) as error:
                where = f"line {number}" + (f" from byte {part.start:,}" if part.start else "")
                start = line[:60].decode("utf-8", "replace")
                array = line.lstrip().startswith(b"[")
                raise ValueError(
                    f'{part.path}, {where}: not a JSON object with a string under "text"'
                    f"{ARRAY * array}: {start}"
                ) from error
            yield text
