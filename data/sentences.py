r"""A name, a file or a folder -> documents made of sentences, streamed: what BERT learns from.

- pydocs, the default: the English of Python's own documentation (data/pydocs.py);
- wikitext, wikitext103: WikiText-2 and WikiText-103, raw, split as published;
- a text file, a .jsonl (one document on each line, under "text"), or a folder of .txt, .md, .rst
  and .jsonl, each also as .gz, all in UTF-8 and in one of the layouts of data/layouts.py: one
  sentence on each line, prose, or WikiText. If a file of prose is a single document and no layout
  is given, every paragraph counts as a document, so that pairs of sentences can be made.

The split is by whole documents, counted over all files in order, and never by chance. Every tenth
document validates; of 4 to 19 the last two, of 2 or 3 the last; of a single document the last tenth
of its sentences.

Left out: Wikipedia's dumps, HTML and other markup; cleaning and deduplication. Only a line (in a
.jsonl: a document) is held in memory, never a whole text.
"""

import hashlib
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from data.download import WIKITEXT2, WIKITEXT103, fetch, replacing
from data.hashes import known_hashes
from data.layouts import LAYOUTS, TextFile, all_sentences, layout_of, mark_beginnings
from data.pydocs import PROMPTS, pydocs
from data.text import (
    BLOCK,
    SUFFIXES,
    check_text,
    content_hashes,
    copies_told,
    is_jsonl,
    name_of,
    refuse_tables,
    texts_below,
)

NAMES = ("pydocs", "wikitext", "wikitext103")
WIKITEXT = {  # name: (archive, its folder, the most bytes of a member; the largest has 540 MB)
    "wikitext": (WIKITEXT2, "wikitext-2-raw", 1 << 24),
    "wikitext103": (WIKITEXT103, "wikitext-103-raw", 1 << 30),
}
WIKITEXT_PROMPTS = [
    "The film was released in the United [MASK] .",
    "He was born in [MASK] and went to school there .",
    "The song was written by the band 's lead [MASK] .",
    "The river flows into the [MASK] .",
    "During the Second World [MASK] , the ship was sunk .",
]
RULES = "sentences 1"  # counts up when the same text would be divided in another way
Sentences = Callable[[], Iterator[tuple[str, bool]]]  # (sentence, whether it begins a document)


@dataclass
class SentenceCorpus:
    """Named documents in two splits. `hash` is of the contents, how they are divided, and
    by_sentence."""

    name: str
    hash: str
    rule: str  # how documents and sentences were found and how they were split, for the plan
    prompts: list[str]  # sentences with one [MASK] each, to show what a model has learnt
    splits: dict[str, Sentences]
    by_sentence: bool = True

    def pieces(self, split: str) -> Iterator[tuple[str, bool]]:
        """What data/tokens.py reads: (text, whether a border comes before it).

        by_sentence: ("", True) for each document, then (" " + sentence, True) for each of its
        sentences. Otherwise a document is its sentences, with a space before each, in pieces of
        about 1 MB; the first piece has the border. The space in front makes a word the same token
        wherever it stands.
        """
        sentences = self.splits[split]()
        if self.by_sentence:
            for sentence, begins in sentences:
                if begins:
                    yield "", True
                yield f" {sentence}", True
            return
        held, size, border = [], 0, True
        for sentence, begins in sentences:
            if held and (begins or size > BLOCK):
                yield "".join(held), border
                held, size, border = [], 0, begins
            held.append(f" {sentence}")
            size += len(sentence)
        if held:
            yield "".join(held), border


def open_sentences(
    data: str, cache: Path, *, valid: str = "", layout: str = "", by_sentence: bool = True
) -> SentenceCorpus:
    """data is one of NAMES or a path; downloads go to `cache`.

    valid: a file or folder that validates, possibly the same as data; then all of data trains.
    layout: one of LAYOUTS; if it is empty, the text decides. Raises ValueError on bad input.
    """
    if layout and layout not in LAYOUTS:
        raise ValueError(f"there is no layout {layout}: choose one of {', '.join(LAYOUTS)}")
    if data in NAMES and (valid or layout):
        flag, value, has = (
            ("--valid", valid, "validation text") if valid else ("--layout", layout, "a layout")
        )
        raise ValueError(f"{flag} {value} is for files of your own: {data} has {has}")
    if data == "pydocs":
        return pydocs_corpus(by_sentence)
    if data in WIKITEXT:
        files = {
            split: [TextFile(path, "wikitext", *known_hashes([path], cache))]
            for split, path in wikitext_files(data, cache).items()
        }
        name, divided, prompts = data, "split as published", list(WIKITEXT_PROMPTS)
        notes = ""
    else:
        parts, left_out = text_files("--data", data, layout, cache)
        files = {"train": parts}
        if valid:
            parts, more = text_files("--valid", valid, layout, cache)
            files["validation"], left_out = parts, left_out or more
        notes = left_out + equal_files(files, cache)
        if by_sentence and not layout:
            files = {split: with_paragraphs(parts) for split, parts in files.items()}
        path = Path(data)
        name = path.resolve().name if path.is_dir() else name_of(path)
        divided, prompts = "the given files validate", []
    digest = hashlib.sha256(f"{RULES} {by_sentence}".encode())
    for split, parts in files.items():
        keys = (f"\0{is_jsonl(file.path)} {file.layout} {file.sha256}" for file in parts)
        digest.update((split + "".join(keys)).encode())
    splits = {split: partial(all_sentences, parts) for split, parts in files.items()}
    for split, sentences in splits.items():
        if next(sentences(), None) is None:
            where = data if split == "train" else valid
            raise ValueError(f"{where} has no sentence in it: give a text with words")
    if "validation" not in splits:
        splits, divided = held_out(data, splits["train"])
    used = sorted({file.layout for parts in files.values() for file in parts})
    rule = f"{' or '.join(LAYOUTS[layout] for layout in used)}; {divided}{notes}"
    prompts = prompts or masked_prompts(splits["validation"]())
    return SentenceCorpus(name, digest.hexdigest(), rule, prompts, splits, by_sentence)


def pydocs_corpus(by_sentence: bool) -> SentenceCorpus:
    """The corpus of data/pydocs.py, whose 1.4 MB are held in memory."""
    documents = pydocs()
    digest = hashlib.sha256(f"{RULES} {by_sentence}".encode())
    digest.update("\0\0".join("\0".join(document) for document in documents).encode())
    splits, divided = held_out("pydocs", lambda: mark_beginnings(documents))
    rule = f"docstrings and help topics of Python's own documentation; {divided}"
    return SentenceCorpus("pydocs", digest.hexdigest(), rule, list(PROMPTS), splits, by_sentence)


# ---- splitting into training and validation ------------------------------------------------------


def held_out(data: str, sentences: Sentences) -> tuple[dict[str, Sentences], str]:
    """({split: its sentences}, the rule), by the number of documents. Reads no further than the
    twentieth document; if there are fewer, the text is read to its end. Raises ValueError if it has
    a single sentence."""
    documents = count = 0
    for _, begins in sentences():
        documents += begins
        count += 1
        if documents == 20:
            break
    if documents >= 20:
        validates, rule = lambda n: n % 10 == 9, "every tenth document validates"
    elif documents > 1:
        last = 2 if documents > 3 else 1
        rule = f"the last {'two' if last == 2 else 'one'} of {documents} documents validate"
        rule += "s" * (last == 1)
        validates = partial((documents - last).__le__)
    elif count > 1:
        cut = count - max(1, count // 10)
        return {
            "train": lambda: islice(sentences(), cut),
            "validation": lambda: mark_beginnings([(s for s, _ in islice(sentences(), cut, None))]),
        }, f"{count - cut:,} of {count:,} sentences, the last of the one document, validate"
    else:
        raise ValueError(f"{data} has one sentence, too few to hold one out: give more, or --valid")
    return {
        "train": lambda: select_documents(sentences(), lambda n: not validates(n)),
        "validation": lambda: select_documents(sentences(), validates),
    }, rule


def select_documents(
    sentences: Iterator[tuple[str, bool]], wanted: Callable[[int], bool]
) -> Iterator[tuple[str, bool]]:
    """The sentences of those documents whose number, from 0, is wanted."""
    number = -1
    for sentence, begins in sentences:
        number += begins
        if wanted(number):
            yield sentence, begins


def masked_prompts(sentences: Iterable[tuple[str, bool]], number: int = 4) -> list[str]:
    """The first sentences of ordinary length, with [MASK] for their middle word. If there are none,
    the beginning of the first sentence, with [MASK] after it."""
    found, first = [], ""
    for sentence, _ in islice(sentences, 1000):
        words = list(re.finditer(r"[^\W\d_]+", sentence))
        if "[MASK]" in sentence:
            continue
        first = first or sentence[:200]
        if 5 <= len(words) <= 25:
            start, end = words[len(words) // 2].span()
            found.append(f"{sentence[:start]}[MASK]{sentence[end:]}")
            if len(found) == number:
                break
    return found or [f"{first} [MASK]".strip()]


# ---- finding files -------------------------------------------------------------------------------


def text_files(flag: str, data: str, layout: str, cache: Path) -> tuple[list[TextFile], str]:
    """(the user's own files, in order, each with its layout and hash; what is said of those that
    are left out). Raises ValueError if there is no text."""
    if not data:
        raise ValueError(f"{flag} is empty: name a file, a folder, or one of {', '.join(NAMES)}")
    path = Path(data)
    paths, hidden = [path], ""
    if path.is_dir():
        paths, hidden = texts_below(path, [suffix for suffix in SUFFIXES if suffix != ".py"])
    elif not path.is_file():
        names = f", nor one of {', '.join(NAMES)}" if flag == "--data" else ""
        raise ValueError(f"{flag} {data} is no file or folder here{names}")
    else:
        refuse_tables(path)
    for path in paths:
        check_text(path)
    hashes = known_hashes(paths, cache)
    found = zip(paths, hashes, strict=True)
    return [TextFile(path, layout or layout_of(path), sha256) for path, sha256 in found], hidden


def equal_files(files: dict[str, list[TextFile]], cache: Path) -> str:
    """What is said of copies: files of both splits or, where documents are drawn from all files,
    any two. Nothing where a text is given for both splits, to be scored whole."""
    train, valid = files["train"], files.get("validation", [])
    if train == valid:
        return ""
    every = [*train, *valid]
    contents = content_hashes([f.path for f in every], [f.sha256 for f in every], cache)
    found = list(zip(every, contents, strict=True))
    first = {content: file.path for file, content in reversed(found[: len(train)])}
    if valid:
        copies = [(file.path, first[x]) for file, x in found[len(train) :] if x in first]
    else:
        copies = [(file.path, first[x]) for file, x in found if file.path != first[x]]
    return copies_told(copies)


def with_paragraphs(files: list[TextFile]) -> list[TextFile]:
    """The same files; but a single file that is one document of prose is given the layout in which
    every paragraph is a document."""
    begun = (begins for _, begins in all_sentences(files) if begins)
    if len(files) == 1 and files[0].layout == "prose" and len(list(islice(begun, 2))) < 2:
        return [replace(files[0], layout="paragraphs")]
    return files


def wikitext_files(name: str, cache: Path) -> dict[str, Path]:
    """{split: its text in `cache`}. Once the texts are there, the archive may be deleted."""
    remote, folder, most = WIKITEXT[name]
    paths = {part: cache / f"{folder}-{part}.txt" for part in ("train", "valid")}
    missing = {f"{folder}/wiki.{p}.raw": path for p, path in paths.items() if not path.is_file()}
    if missing:
        unzip(fetch(remote, cache), missing, most)
    return {"train": paths["train"], "validation": paths["valid"]}


def unzip(archive: Path, members: dict[str, Path], most: int) -> None:
    """Copies the members {member: path to write}, each of at most `most` bytes. Nothing else in the
    archive is read, and no name in it decides where something is written. Raises ValueError for a
    damaged archive, and for a member that is missing or too large."""
    try:
        with zipfile.ZipFile(archive) as packed:
            for member, path in members.items():
                if member not in packed.namelist():
                    raise ValueError(f"{archive} has no {member} in it: delete it")
                size = packed.getinfo(member).file_size  # no more than that is ever read
                if size > most:
                    raise ValueError(
                        f"{member} in {archive} has {size:,} bytes, more than {most:,}: delete it"
                    )
                bar = {"desc": f"unpacking {member}", "disable": None}
                with (
                    packed.open(member) as source,
                    tqdm.wrapattr(source, "read", size, **bar) as file,
                    replacing(path) as into,
                ):
                    shutil.copyfileobj(file, into, BLOCK)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # the last: encrypted
        raise ValueError(f"{archive} is no intact .zip ({error}): delete it") from error
