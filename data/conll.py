r"""CoNLL files -> sentences of tagged words: what a model learns from to find named entities.

A file has one word on each line. Its columns are divided by tabs or by white space; the word is in
the first and its tag in the last. A blank line stands between sentences.

- If the first row has a tab, columns are divided at tabs alone, otherwise at spaces and tabs. Other
  white space (U+00A0, U+2028) and characters that cannot be printed are part of a word.
- All rows have the same number of columns. A line that has only tabs and spaces is blank (WNUT 2017
  has such lines between its sentences).
- A line that begins with -DOCSTART- ends a sentence and belongs to none.
- A line that begins with "# " is a comment if it is not a row and stands before a sentence; # can
  also be a word, as in tweets.

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

Left out: nested and discontinuous entities, entities in columns other than the last, words in
columns other than the first (CoNLL-U, GermEval), tags without a type, documents (their sentences
are taken one by one).

Papers: Ramshaw and Marcus 1995 (arXiv:cmp-lg/9505040); Tjong Kim Sang and Veenstra 1999, who name
the schemes (arXiv:cs/9907006); Ratinov and Roth 2009, BILOU (aclanthology.org/W09-1119).
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.division import divide
from data.lines import read_lines
from data.text import check_text, name_of

HELD_OUT = 10  # without a validation file, one sentence in so many validates
COMMENT, DOCUMENT = "# ", "-DOCSTART-"
BLANK = " \t"

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


def open_tagged(data: str, valid: str = "") -> TaggedText:
    """data and valid are CoNLL files, plain or .gz. If valid is given, all of data trains. Raises
    ValueError on bad input."""
    path = conll_file("--data", data)
    paths = {"train": path, "validation": conll_file("--valid", valid) if valid else path}
    sentences = read_conll(path)
    types = {entity[0] for sentence in sentences for entity in entities(sentence.tags)}
    if not types:
        raise ValueError(f"{path} has no entity, every tag is O: give a file with some")
    splits, rule = {"train": sentences}, f"the sentences of {paths['validation'].name} validate"
    if valid:
        splits["validation"] = read_conll(paths["validation"])
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


def read_conll(path: Path) -> list[Sentence]:
    """The sentences of a file, with its own tags; see the top of this file. Raises ValueError, with
    the line, for a row that is wrong."""
    lines = [line.removesuffix("\r") for line in read_lines(path)]
    rows = (s for s in lines if s.strip(BLANK) and not s.startswith((COMMENT, DOCUMENT)))
    first = next(rows, "")
    tabs = "\t" in first
    width = len(split_columns(first, tabs))
    sentences, words, tags = [], [], []
    for number, line in enumerate([*lines, ""], 1):
        cells = split_columns(line, tabs)
        if not line.strip(BLANK) or line.startswith(DOCUMENT):
            if words:
                sentences.append(Sentence(words, tags, number - len(words)))
            words, tags = [], []
        elif len(cells) == width > 1 and cells[0] and TAG.fullmatch(cells[-1]):
            words.append(cells[0])
            tags.append(cells[-1])
        elif words or not line.startswith(COMMENT):
            raise ValueError(f"{path}, line {number:,}: {fault(cells, width)}: {line[:60]!r}")
    if not sentences:
        raise ValueError(f"{path} has no sentence in it: give a word and its tag on each line")
    return sentences


def split_columns(line: str, tabs: bool) -> list[str]:
    if not tabs:
        return re.split(r"[ \t]+", line.strip(BLANK))
    *cells, last = line.split("\t")
    return [*cells, last.strip(BLANK)]


def fault(cells: list[str], width: int) -> str:
    """What is wrong with a row."""
    if len(cells) < 2:
        return "one column, where a word and its tag are needed"
    if len(cells) != width:
        return f"{len(cells)} columns, but the first row has {width}"
    if not cells[0]:
        return "no word before its tag"
    return f"{cells[-1][:30]!r} is no tag: write O, or B-TYPE with one of B I E S L U in front"


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
