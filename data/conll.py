r"""CoNLL files -> sentences of tagged words: what a model learns from to find named entities.

A file has one word on each line. Its columns are divided by tabs or by white space; the word is in
the first and its tag in the last, unless --columns names others. A blank line stands between
sentences.

- Columns before the word that only count, words or sentences, are seen and left out: all their
  cells are numbers, or end in numbers that go up by one (t1, t2, …), or are the same in all of a
  sentence. In GermEval's files, the tags of the outer entities are taken, those of nested ones not.
- If the first row has a tab, columns are divided at tabs alone, otherwise at spaces and tabs. Other
  white space (U+00A0, U+2028) and characters that cannot be printed are part of a word.
- All rows have the same number of columns. A line that has only tabs and spaces is blank (WNUT 2017
  has such lines between its sentences).
- A line that begins with -DOCSTART- ends a sentence and belongs to none.
- A line that begins with # and a space or a tab is a comment if it is not a row and stands before a
  sentence; # can also be a word, as in tweets.

Without a validation file, one sentence in ten validates: see `data/division.py`.

An entity is (type, start, end): the words start to end - 1, as in a slice. Four schemes write
entities as tags; with L for a location and P for a person:

    words    Ada   of   Grace   Hopper   Alan   Turing   ,   Rome
    IOB1     I-P   O    I-P     I-P      B-P    I-P      O   I-L     B only after the same type
    IOB2     B-P   O    B-P     I-P      B-P    I-P      O   B-L     B begins every entity
    IOBES    S-P   O    B-P     E-P      B-P    E-P      O   S-L     E ends it, S is a single word
    BILOU    U-P   O    B-P     L-P      B-P    L-P      O   U-L     the same in other letters

A file may be in any of them or in a mixture, and so may the predictions of a model; here they
become IOB2. No sequence of tags is an error: an I after another type, or after O, begins an entity.
Between two words that have tags there is a border if their types differ, if the second has B or S
(U), or if the first has E or S (L or U). For B, I and O these are the chunk rules of conlleval, the
script that scored the CoNLL tasks. It does not know S, and a B after an E of the same type
continues the entity there; here that B begins another entity, as IOBES means it.

Left out: nested and discontinuous entities, tags in brackets (OntoNotes' *_gold_conll) or without
a type, CoNLL-U, documents (their sentences are taken one by one).

Papers: Ramshaw and Marcus 1995 (arXiv:cmp-lg/9505040); Tjong Kim Sang and Veenstra 1999, who name
the schemes (arXiv:cs/9907006); Ratinov and Roth 2009, BILOU (aclanthology.org/W09-1119).
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

from data.division import copy_told, divide
from data.lines import read_lines
from data.text import check_text, name_of

HELD_OUT = 10  # without a validation file, one sentence in so many validates
COMMENTS, DOCUMENT = ("# ", "#\t"), "-DOCSTART-"
BLANK = " \t"
ORDINAL = re.compile(r"\d+(?:[.-]\d+)?")  # 3, and in CoNLL-U 3-4 and 3.1
COUNTED = re.compile(r"(.*?)(\d{1,18})(\D*)", re.DOTALL)  # t12: the number, and what is around it
PHRASES = {"NP", "VP", "PP"}  # types of chunks, which CoNLL-2000's and 2003's files have

Entity = tuple[str, int, int]  # type, start, end

TAG = re.compile(r"O|[BIESLU]-.+")
SCHEMES = {  # the prefixes of an entity's only, first, inner and last word
    "IOB2": "BBII",
    "IOB1": "IIII",
    "IOBES": "SBIE",
    "BILOU": "UBIL",
}


class Sentence(NamedTuple):
    words: list[str]
    tags: list[str]  # one for each word
    line: int  # the line of its first word; the others follow line by line


@dataclass
class TaggedText:
    """Tagged sentences in two splits, in IOB2. `hash` is of the words, the tags and how they are
    divided."""

    name: str
    hash: str
    rule: str  # how it was split, for the plan
    prompts: list[str]  # sentences, to show what a model has learnt
    labels: tuple[str, ...]  # "O", then "B-x" and "I-x" for each type of the training file
    splits: dict[str, list[Sentence]]
    paths: dict[str, Path]  # the file of each split
    schemes: dict[str, str]  # the scheme in which that file was written, for the plan
    columns: dict[str, str]  # which of its columns were read, for the plan

    def pieces(self, split: str) -> Iterator[tuple[str, bool]]:
        """What a tokenizer learns from: (a sentence, True), with a space before every word."""
        for sentence in self.splits[split]:
            yield "".join(f" {word}" for word in sentence.words), True

    def check(self, labels: tuple[str, ...]) -> None:
        """Raises ValueError, with its file and line, for a tag that is none of the labels."""
        known = set(labels)
        for split, sentences in self.splits.items():
            for sentence in sentences:
                for i, tag in enumerate(sentence.tags):
                    if tag not in known:
                        raise ValueError(
                            f"{self.paths[split]}, line {sentence.line + i:,}: {tag} is none of "
                            f"the labels to be told apart ({', '.join(labels)[:200]}): take its "
                            "type out of the file, or train with it from the beginning"
                        )


def open_tagged(data: str, valid: str = "", columns: str = "") -> TaggedText:
    """data and valid are CoNLL files, plain or .gz. If valid is given, all of data trains. columns:
    "2,5" if the words are in the second and their tags in the fifth; empty: what the files show.
    Raises ValueError on bad input."""
    asked = parse_columns(columns)
    path = conll_file("--data", data)
    paths = {"train": path, "validation": conll_file("--valid", valid) if valid else path}
    sentences, where = read_conll(path, asked)
    where = dict.fromkeys(paths, where)
    types = {entity[0] for sentence in sentences for entity in entities(sentence.tags)}
    if not types:
        raise ValueError(f"{path} has no entity, every tag is O: give a file with some")
    splits, rule = {"train": sentences}, f"the sentences of {paths['validation'].name} validate"
    if valid:
        splits["validation"], where["validation"] = read_conll(paths["validation"], asked)
        equal = [s[:2] for s in splits["train"]] == [s[:2] for s in splits["validation"]]
        rule += copy_told(data, valid, equal)
    # Look at the whole file: a part of it may lack the entities by which the schemes differ.
    schemes = {split: scheme_of([s.tags for s in found]) for split, found in splits.items()}
    splits = {
        split: [Sentence(words, to_iob2(tags), line) for words, tags, line in found]
        for split, found in splits.items()
    }
    if not valid:
        train, validation, rule = divide(splits["train"], HELD_OUT, "sentence", str(path))
        splits = {"train": train, "validation": validation}
        schemes["validation"] = schemes["train"]
    digest = hashlib.sha256(b"tags 1")
    for split, found in splits.items():
        digest.update(f"\0{split}".encode())
        for words, tags, _ in found:
            rows = "".join(f"\n{word}\t{tag}" for word, tag in zip(words, tags, strict=True))
            digest.update(f"\n{rows}".encode())
    return TaggedText(
        name_of(path),
        digest.hexdigest(),
        rule,
        example_sentences(splits["validation"]),
        iob2_labels(types),
        splits,
        paths,
        schemes,
        where,
    )


def iob2_labels(types: set[str]) -> tuple[str, ...]:
    return ("O", *(f"{prefix}-{type_}" for type_ in sorted(types) for prefix in "BI"))


def example_sentences(sentences: list[Sentence], number: int = 4) -> list[str]:
    """The first sentences of ordinary length that have an entity, as text; the first of all if no
    sentence is like that."""
    ordinary = [s.words for s in sentences if 4 <= len(s.words) <= 25 and set(s.tags) != {"O"}]
    return [" ".join(words) for words in (ordinary or [s.words for s in sentences])[:number]]


# ---- reading -------------------------------------------------------------------------------------


def conll_file(flag: str, name: str) -> Path:
    path = Path(name)
    if not name or not path.is_file():
        raise ValueError(
            f"{flag} {name} is no file here: give a CoNLL file, a word and its tag on each line"
        )
    check_text(path)
    return path


def parse_columns(columns: str) -> tuple[int, int] | None:
    """ "2,5" -> (1, 4), the indices of the word and of its tag; "" -> None."""
    if not columns:
        return None
    match = re.fullmatch(r" *([1-9]\d{0,3}) *, *([1-9]\d{0,3}) *", columns)
    if not match or match[1] == match[2]:
        raise ValueError(
            f"--columns {columns} are not two columns: give that of the word and that of its tag, "
            "counted from 1, as in --columns 2,5"
        )
    return int(match[1]) - 1, int(match[2]) - 1


def read_conll(path: Path, columns: tuple[int, int] | None = None) -> tuple[list[Sentence], str]:
    """(the sentences of a file, with its own tags; which columns were read, for the plan). See the
    top of this file. Raises ValueError, with the line, for a row that is wrong."""
    blocks, width = read_rows(path, columns)
    if columns and max(columns) >= width:
        raise ValueError(
            f"{path} has {width} columns, not the {max(columns) + 1} of --columns: count from 1"
        )
    word, tag = columns or choose_columns(path, blocks, width)
    where = f"word in column {word + 1}, tag in column {tag + 1}"
    where += f" of {width}" * (width > 2)
    sentences = []
    for start, rows in blocks:
        for number, cells in enumerate(rows, start):
            if not cells[word]:
                raise refusal(path, number, "no word before its tag")
            if not TAG.fullmatch(cells[tag]):
                raise refusal(path, number, no_tag(cells[tag], blocks, width))
        sentences.append(Sentence([c[word] for c in rows], [c[tag] for c in rows], start))
    return sentences, where


Rows = list[list[str]]  # of one sentence, each divided into its columns


def read_rows(path: Path, columns: tuple[int, int] | None) -> tuple[list[tuple[int, Rows]], int]:
    """([(the line of a sentence's first row, its rows)], the number of columns)"""
    lines = [line.removesuffix("\r") for line in read_lines(path)]
    full = [s for s in lines if s.strip(BLANK) and not s.startswith(DOCUMENT)]
    if any(line.startswith("#begin document") for line in full[:1]):
        raise ValueError(
            f"{path} is of OntoNotes (CoNLL-2012, *_gold_conll), which has entities in brackets, "
            "(PERSON*: write a word and its tag, B-PERSON, on each line"
        )
    first = next((s for s in full if not s.startswith(COMMENTS)), full[0] if full else "")
    tabs = "\t" in first
    width = len(split_columns(first, tabs))
    if width == 10 and tabs and ORDINAL.fullmatch(first.split("\t")[0]):
        raise ValueError(
            f"{path} is CoNLL-U, whose ten columns have no entities: write a word and its tag, O "
            "or B-PERSON, on each line"
        )
    tag = columns[1] if columns else -1
    blocks, rows = [], []
    for number, line in enumerate([*lines, ""], 1):
        cells = split_columns(line, tabs)
        if not line.strip(BLANK) or line.startswith(DOCUMENT):
            if rows:
                blocks.append((number - len(rows), rows))
            rows = []
        elif rows or not line.startswith(COMMENTS) or is_row(cells, width, tag):
            if len(cells) < 2:
                why = "one column, where a word and its tag are needed"
                raise refusal(path, number, why)
            if len(cells) != width:
                why = f"{len(cells)} columns, but the first row has {width}"
                raise refusal(path, number, why)
            rows.append(cells)
    if not blocks:
        raise ValueError(f"{path} has no sentence in it: give a word and its tag on each line")
    return blocks, width


def is_row(cells: list[str], width: int, tag: int) -> bool:
    return len(cells) == width > max(tag, 1) and bool(TAG.fullmatch(cells[tag]))


def choose_columns(path: Path, blocks: list[tuple[int, Rows]], width: int) -> tuple[int, int]:
    """The indices of the columns of the word and of its tag, by what the file shows. Raises
    ValueError where there is no column of words."""
    word = 0
    while word < width - 1 and only_counts([[c[word] for c in rows] for _, rows in blocks], width):
        word += 1
    tag = width - 1
    if word == tag:
        why = "all columns before the tag only count, there is none of words: give one, or say "
        raise refusal(path, blocks[0][0], f"{why}with --columns 1,{width} that these are words")
    if word == 1 and width == 4 and all_tags(blocks, 2) and all_tags(blocks, 3):
        # GermEval: number, word, outer entities, nested ones. Chunks have other types.
        types = {cells[2][2:] for _, rows in blocks for cells in rows}
        tag = tag if types & PHRASES else 2
    return word, tag


def only_counts(sentences: list[list[str]], width: int) -> bool:
    """Whether a column counts words or sentences: see the top of this file. If it is the only one
    before the tag, "w1 w2" are words."""
    numbers = all(ORDINAL.fullmatch(cell) for cells in sentences for cell in cells)
    if numbers or width < 3:
        return numbers
    longer = [cells for cells in sentences if len(cells) > 1]
    same = all(len(set(cells)) == 1 for cells in longer)
    return bool(longer) and (same or all(map(counts_up, longer)))


def counts_up(cells: list[str]) -> bool:
    matches = [COUNTED.fullmatch(cell) for cell in cells]
    if not all(matches) or len({(m[1], m[3]) for m in matches}) > 1:
        return False
    return all(int(b[2]) == int(a[2]) + 1 for a, b in pairwise(matches))


def all_tags(blocks: list[tuple[int, Rows]], column: int) -> bool:
    return all(TAG.fullmatch(cells[column]) for _, rows in blocks for cells in rows)


def no_tag(cell: str, blocks: list[tuple[int, Rows]], width: int) -> str:
    """What is said of a cell that is no tag; it names a column in which all are tags."""
    why = f"{cell[:30]!r} is no tag: write O, or B-TYPE with one of B I E S L U in front"
    others = [column for column in range(1, width) if all_tags(blocks, column)]
    if others:
        why += f" (column {others[0] + 1} has tags: --columns 1,{others[0] + 1} takes the words of "
        why += "column 1 and these)"
    return why


def refusal(path: Path, number: int, why: str) -> ValueError:
    """An error that quotes its line, which is read again."""
    line = next(islice(read_lines(path), number - 1, None)).removesuffix("\r")
    return ValueError(f"{path}, line {number:,}: {why}: {line[:60]!r}")


def split_columns(line: str, tabs: bool) -> list[str]:
    if not tabs:
        return re.split(r"[ \t]+", line.strip(BLANK))
    *cells, last = line.split("\t")
    return [*cells, last.strip(BLANK)]


# ---- tags ----------------------------------------------------------------------------------------


def split_tag(tag: str) -> tuple[str, str]:
    """B-person -> ("B", "person"), O -> ("O", ""). Raises ValueError for what is not a tag."""
    if not TAG.fullmatch(tag):
        raise ValueError(f"{tag!r} is no tag: write O, or B-TYPE with one of B I E S L U in front")
    return tag[0], tag[2:]


def entities(tags: Iterable[str]) -> list[Entity]:
    """The entities of one sentence, in order. Raises ValueError for what is not a tag, but never
    for an unusual sequence of tags."""
    found, start, last, last_type = [], 0, "O", ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, type_ = split_tag(tag)
        # Outside of entities the type is "", so O needs no rule of its own.
        if type_ != last_type or prefix in "BSU" or last in "ESLU":
            if last_type:
                found.append((last_type, start, i))
            start = i
        last, last_type = prefix, type_
    return found


def write_tags(found: Iterable[Entity], length: int, scheme: str = "IOB2") -> list[str]:
    """The tags of a sentence of `length` words with these entities, in one of SCHEMES. The entities
    must be in order and not overlap."""
    alone, first, inner, last = SCHEMES[scheme]
    tags = ["O"] * length
    for type_, start, end in found:
        size = end - start
        prefixes = alone if size == 1 else first + inner * (size - 2) + last
        if scheme == "IOB1" and start and tags[start - 1][2:] == type_:
            prefixes = "B" + prefixes[1:]
        tags[start:end] = [f"{prefix}-{type_}" for prefix in prefixes]
    return tags


def to_iob2(tags: list[str]) -> list[str]:
    """The same entities in IOB2, whatever scheme or mixture the tags are in."""
    return write_tags(entities(tags), len(tags))


def scheme_of(sentences: Iterable[list[str]]) -> str:
    """The first of SCHEMES in which all of these tags are written; "" for a mixture or a mistake.

    If more than one scheme fits, all of them mean the same entities: tags without any B- are IOB1,
    or the poorer "IO"."""
    fitting = list(SCHEMES)
    for tags in sentences:
        found = entities(tags)
        fitting = [scheme for scheme in fitting if write_tags(found, len(tags), scheme) == tags]
    return fitting[0] if fitting else ""
