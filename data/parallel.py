"""A name or files -> parallel text: pairs of a source and its target, streamed.

- dates, multi30k, wmt14: named sets with training, validation and test pairs;
- two files, "train.en,train.de": line i of one belongs to line i of the other, source first;
- one .tsv: source<TAB>target on every line;
- one .csv or .jsonl (data/tables.py) with source and target, or src and tgt, or the names of the
  two languages if --languages gives them. In a .jsonl they may be inside of "translation".

Files are UTF-8, each also as .gz. Lines end at \\n alone: other separators are part of the text.
Both sides are stripped, and a pair with an empty side is left out and counted. Without validation
files, evenly spaced pairs are held out: every 100th, or fewer, so that they are at most 2,000.

Left out: aligning sentences, cleaning by length ratio or language, deduplication, TMX and XML.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path

from tqdm import tqdm

from data.dates import COUNTS, dates, dates_hash, prompts
from data.division import copy_told
from data.download import MULTI30K, fetch, prepare_cache
from data.hashes import known_hashes
from data.lines import read_lines
from data.tables import Form, read_table, refusal
from data.text import name_of, plain_name
from data.wmt import wmt14_files

NAMES = ("dates", "multi30k", "wmt14")
HELD_OUT_EVERY, HELD_OUT_MOST = 100, 2_000
FORMS = (
    "two files, train.en,train.de (source first, line by line), or one .tsv (source<TAB>target), "
    ".csv or .jsonl (with source and target)"
)
NAMED = [("source", "target"), ("src", "tgt")]  # the columns of a .csv or .jsonl
LANGUAGE = re.compile(r"[a-z]{2,3}([-_][a-z]{2,4})?", re.IGNORECASE)
PUBLISHED = "as published"
VERBS = {"train": "train", "validation": "validate", "test": "test"}
MULTI30K_PARTS = {"train": "train", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Aligned:
    """Two files that belong together line by line, or one .tsv, .csv or .jsonl. `key` identifies
    the contents."""

    paths: tuple[Path, ...]
    key: str
    languages: tuple[str, str] = ("", "")  # of source and target, for the columns of a table


@dataclass
class ParallelCorpus:
    """Named pairs in one to three splits. `hash` is of the contents, how they are divided, and the
    direction."""

    name: str
    hash: str
    rule: str  # how it was split and what was left out, for the plan
    prompts: list[str]  # sources, to show what a model has learnt
    languages: tuple[str, str]  # of source and target; empty where unknown
    splits: dict[str, Callable[[], Iterator[tuple[str, str]]]]

    def pairs(self, split: str) -> Iterator[tuple[str, str]]:
        """Yields (source, target), neither of them empty."""
        if split not in self.splits:
            raise ValueError(
                f"{self.name} has no split {split} here: choose one of {', '.join(self.splits)}"
            )
        return self.splits[split]()

    def pieces(self, split: str) -> Iterator[tuple[str, bool]]:
        """What data/tokens.py reads: every source and every target is a document of its own."""
        for source, target in self.pairs(split):
            yield source, True
            yield target, True


def open_pairs(
    data: str, cache: Path, *, languages: str = "", valid: str = "", split: str = ""
) -> ParallelCorpus:
    """data is one of NAMES, two files or a .tsv; downloads go to `cache`.

    languages: "en-de" means from English to German. Files whose suffixes are the two languages are
    put into that order. valid: validation files, in the same forms as data. split: read (and
    download) only that split; of the user's own files, all pairs are "test". Raises ValueError on
    bad input.
    """
    source, target = parse_languages(languages)
    if split and split not in VERBS:
        raise ValueError(f"there is no split {split}: choose one of {', '.join(VERBS)}")
    if data in NAMES and valid:
        raise ValueError(f"--valid {valid} is for files of your own: {data} has validation pairs")
    if data == "dates":
        if languages:
            raise ValueError(f"dates knows no languages, not {languages}: leave them out")
        corpus = dates_corpus()
    elif data == "multi30k":
        pair = named_languages(data, source, target, ("en", "de", "fr", "cs"))
        corpus = files_corpus(data, pair, multi30k_files(pair, split, cache), cache, PUBLISHED)
    elif data == "wmt14":
        pair = named_languages(data, source, target, ("en", "de"))
        files = {
            part: [Aligned(*found) for found in wmt14_files(part, pair[0], cache)]
            for part in ([split] if split else VERBS)
        }
        corpus = files_corpus(data, pair, files, cache, PUBLISHED)
    else:
        flag = "--eval" if split == "test" else "--data"
        first = aligned_files(flag, data, source, target, cache)
        files = {"test" if split == "test" else "train": [first]}
        if valid:
            files["validation"] = [aligned_files("--valid", valid, source, target, cache)]
        divided = "the given files" if valid or split == "test" else ""
        name = name_of(first.paths[0])
        corpus = files_corpus(name, (source, target), files, cache, divided)
        if valid:
            corpus.rule += copy_told(data, valid, first.key == files["validation"][0].key)
    if split:
        corpus.pairs(split)  # raises ValueError, which lists the splits, if this one is missing
        corpus.splits = {split: corpus.splits[split]}
    return corpus


def parse_languages(languages: str) -> tuple[str, str]:
    if not languages:
        return "", ""
    source, _, target = languages.partition("-")
    if not source or not target or "-" in target:
        raise ValueError(f"--languages {languages} is not of the form en-de (from-to)")
    if source == target:
        raise ValueError(f"--languages {languages} names one language twice: choose two")
    return source, target


def named_languages(name: str, source: str, target: str, known: tuple[str, ...]) -> tuple[str, str]:
    for language in (source, target):
        if language and language not in known:
            raise ValueError(f"{name} has no language {language}: choose from {', '.join(known)}")
    return (source, target) if source else (known[0], known[1])


def dates_corpus() -> ParallelCorpus:
    return ParallelCorpus(
        "dates",
        dates_hash(),
        f"{split_counts(COUNTS)} (no date in two of them)",
        prompts(),
        ("", ""),
        {split: partial(dates, split) for split in COUNTS},
    )


def files_corpus(
    name: str,
    languages: tuple[str, str],
    files: dict[str, list[Aligned]],
    cache: Path,
    divided: str = "",
) -> ParallelCorpus:
    """`divided` says how the files are already divided; if it is empty, pairs are held out."""
    digest = hashlib.sha256(b"pairs 1")
    for split, parts in files.items():
        digest.update(f"\0{split}\0".encode() + "\0".join(part.key for part in parts).encode())
    key = digest.hexdigest()
    counts = known_counts(name, key, files, cache)
    for split, (number, _) in counts.items():
        if not number:
            where = ", ".join(str(path) for part in files[split] for path in part.paths)
            raise ValueError(f"no line of {where} has text on both sides: give more text")
    splits = {split: partial(full_pairs, parts) for split, parts in files.items()}
    numbers = {split: number for split, (number, _) in counts.items()}
    if not divided:
        total = numbers["train"]
        if total < 2:
            raise ValueError(f"{name} has one pair, too few to hold one out: give more, or --valid")
        every = min(total, max(HELD_OUT_EVERY, -(-total // HELD_OUT_MOST)))
        numbers = {"train": total - total // every, "validation": total // every}
        splits = {
            "train": partial(select_pairs, splits["train"], every, False),
            "validation": partial(select_pairs, splits["train"], every, True),
        }
        divided = "the last one" if every == total else f"one in {every}"
    rule = f"{split_counts(numbers)} ({divided})"
    if empty := sum(empty for _, empty in counts.values()):
        rule += f"; {pair_count(empty)} with an empty side left out"
    examples = splits.get("validation") or next(iter(splits.values()))
    return ParallelCorpus(name, key, rule, [s for s, _ in islice(examples(), 4)], languages, splits)


def split_counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{pair_count(number)} {VERBS[split]}" for split, number in numbers.items())


def pair_count(number: int) -> str:
    return f"{number:,} pair{'s' * (number != 1)}"


def known_counts(
    name: str, key: str, files: dict[str, list[Aligned]], cache: Path
) -> dict[str, tuple[int, int]]:
    """{split: (pairs, pairs left out)}. Everything is read once, which also finds what is wrong in
    it; then the counts are kept in `cache` for the next start (wmt14 has 4.5 million pairs)."""
    memo = cache / f"pairs-{key[:16]}.json"
    try:
        counts = json.loads(memo.read_text(encoding="utf-8"))
        return {split: (int(counts[split][0]), int(counts[split][1])) for split in files}
    except (OSError, ValueError, TypeError, LookupError):
        pass
    prepare_cache(cache)
    counts = {}
    for split, parts in files.items():
        number = full = 0
        pairs = chain.from_iterable(map(read_part, parts))
        bar = tqdm(pairs, f"counting {name}", unit=" pairs", unit_scale=True, disable=None, delay=1)
        for source, target in bar:
            number += 1
            full += bool(source and target)
        counts[split] = full, number - full
    memo.write_text(json.dumps(counts), encoding="utf-8")
    return counts


# ---- finding files -------------------------------------------------------------------------------


def is_tsv(path: Path) -> bool:
    return plain_name(path).endswith(".tsv")


def is_named(path: Path) -> bool:
    return plain_name(path).endswith((".csv", ".jsonl"))


def divide_names(data: str) -> tuple[Path, ...]:
    """The files of "a,b". A name may have a comma itself: of all commas, that one counts which has
    a file on both sides, or else on one. ~ is the home folder on both sides."""
    if Path(data).is_file() or "," not in data:
        return (Path(data),)
    commas = [i for i, character in enumerate(data) if character == ","]
    splits = [(home(data[:i]), home(data[i + 1 :])) for i in commas]
    for enough in (all, any):
        for split in splits:
            if enough(path.is_file() for path in split):
                return split
    return splits[0] if len(splits) == 1 else tuple(map(Path, data.split(",")))


def home(name: str) -> Path:
    return Path(os.path.expanduser(name.strip()))  # noqa: PTH111 (no error where there is no home)


def aligned_files(flag: str, data: str, source: str, target: str, cache: Path) -> Aligned:
    """The user's own files, source first. Raises ValueError for other forms and missing files."""
    paths = divide_names(data)
    single = [is_tsv(path) or is_named(path) for path in paths]
    if single not in ([True], [False, False]):
        names = f"a name ({', '.join(NAMES)}), nor " if flag != "--valid" else ""
        raise ValueError(f"{flag} {data} is not {names}{FORMS}")
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{flag} {data}: {path} is no file here")
        if not path.stat().st_size:
            raise ValueError(f"{flag} {data}: {path} is empty, give a file with text in it")
    suffixes = [Path(plain_name(path)).suffix for path in paths]
    if source and suffixes == [f".{target}", f".{source}"]:
        paths = paths[::-1]
    key = " ".join(known_hashes(paths, cache))
    if is_named(paths[0]):  # whose columns the languages choose
        return Aligned(paths, f"{key} {source} {target}", (source, target))
    return Aligned(paths, key)


def multi30k_files(pair: tuple[str, str], split: str, cache: Path) -> dict[str, list[Aligned]]:
    files = {}
    for part in [split] if split else MULTI30K_PARTS:
        remotes = [MULTI30K[f"{MULTI30K_PARTS[part]}.{language}"] for language in pair]
        paths = tuple(fetch(remote, cache) for remote in remotes)
        files[part] = [Aligned(paths, " ".join(r.sha256 or r.md5 for r in remotes))]
    return files


# ---- reading -------------------------------------------------------------------------------------


def full_pairs(parts: list[Aligned]) -> Iterator[tuple[str, str]]:
    """Yields the pairs that have text on both sides. The parts take turns, because a tokenizer
    learns from the beginning, which should be a sample of them all."""
    readers = [read_part(part) for part in parts]
    while readers:
        for reader in list(readers):
            pair = next(reader, None)
            if pair is None:
                readers.remove(reader)
            elif all(pair):
                yield pair


def select_pairs(pairs: Callable, every: int, held_out: bool) -> Iterator[tuple[str, str]]:
    """If held_out, the last of every `every` pairs; otherwise all the others."""
    for i, pair in enumerate(pairs()):
        if (i % every == every - 1) == held_out:
            yield pair


def read_part(part: Aligned) -> Iterator[tuple[str, str]]:
    """Yields every pair, stripped; sides may be empty."""
    if not is_named(part.paths[0]):
        return read_pairs(part.paths)
    return named_pairs(part.paths[0], [part.languages, *NAMED] if all(part.languages) else NAMED)


def named_pairs(path: Path, forms: Sequence[Form]) -> Iterator[tuple[str, str]]:
    """Yields the pairs of a table. Raises ValueError if its columns have names that do not say
    which is the source."""
    sides = {name for form in forms for name in form}
    remedy = "; name them, the source first, with --languages"
    table = read_table(path, forms, blank=sides, remedy=remedy)
    line, names = table.rows[0]
    if not table.named and all(LANGUAGE.fullmatch(name.strip()) for name in names):
        why = "these look like names of columns: say which is the source with --languages"
        raise refusal(path, line, f"{why} {'-'.join(name.strip() for name in names)}")
    for _, (source, target) in table.rows:
        yield source.strip(), target.strip()


def read_pairs(paths: tuple[Path, ...]) -> Iterator[tuple[str, str]]:
    """Yields every pair, stripped; sides may be empty. Raises ValueError, with the line, if a row
    of a .tsv does not have one tab or one file has more lines than the other."""
    if len(paths) == 1:
        for number, line in enumerate(read_lines(paths[0]), 1):
            cells = [cell.strip() for cell in line.split("\t")]
            if len(cells) != 2 and line.strip():
                raise ValueError(
                    f"{paths[0]}, line {number:,}: {len(cells) - 1} tabs instead of one between "
                    f"source and target: {line.strip()[:60]}"
                )
            yield cells[0], cells[-1]
        return
    sides = [read_lines(path) for path in paths]
    for number, (source, target) in enumerate(zip_longest(*sides), 1):
        if source is None or target is None:
            short, long = (0, 1) if source is None else (1, 0)
            total = number + sum(1 for _ in sides[long])
            raise ValueError(
                f"{paths[long]} has {total:,} lines and {paths[short]} has {number - 1:,}: line "
                f"{number:,} of the latter is missing, and line i of both must belong together"
            )
        yield source.strip(), target.strip()
