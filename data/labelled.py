"""Tables of labelled texts -> examples in two splits: what a classifier learns from.

A row is a text, or two, and a label. The files are those of data/tables.py: .csv, .tsv or .jsonl,
each also as .gz. The columns are found by their names: the texts have those of a row of TEXTS, the
label has one of LABELS. Without names, the columns are text and label, or text, text_b and label;
another order is not guessed, but refused where it shows (`check_order`). Labels that are one whole
number, 1 and 1.0, are one label; other ways to write a number twice are refused.

Left out: more than one label for a text, numbers to predict, a search for texts in both splits.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.division import copy_told, divide_by_label
from data.tables import HELD_OUT, Row, name_them, read_table, refusal
from data.text import name_of

# A pair comes before a single text, so that it is not read as one.
TEXTS = (
    *(("text", "text_b"), ("text_a", "text_b"), ("sentence1", "sentence2")),
    *(("question1", "question2"), ("premise", "hypothesis")),
    *(("question", "sentence"), ("question", "passage")),
    *(("text",), ("sentence",), ("question",), ("review",)),
)
LABELS = ("label", "gold_label", "is_duplicate", "class", "sentiment")
WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
FORMS = [(*texts, label) for texts in TEXTS for label in LABELS]


class Example(NamedTuple):
    line: int  # of its file, where it begins
    texts: tuple[str, ...]  # one or two; white space is collapsed
    label: str


@dataclass
class LabelledCorpus:
    """Examples in two splits. `hash` is that of their contents, division and labels."""

    name: str
    hash: str
    rule: str  # how it was split, for the plan
    prompts: list[str]  # to show what a model has learnt; the texts of a pair have a tab between
    labels: tuple[str, ...]
    splits: dict[str, list[Example]]

    def pieces(self, split: str) -> Iterator[tuple[str, bool]]:
        """What a new tokenizer learns from: every text, as `encode_text` reads it."""
        for example in self.splits[split]:
            for text in example.texts:
                yield f" {text}", True


def open_labelled(data: str, *, valid: str = "", labels: Sequence[str] = ()) -> LabelledCorpus:
    """The examples of two files. Where valid is empty, one in HELD_OUT examples of each label
    validates, drawn with a fixed seed.

    labels: those of a checkpoint, in its order; where empty, those of data, in the order of numbers
    if all are whole numbers, else sorted. Raises ValueError on bad input.
    """
    train = read_examples(Path(data), labels)
    names = spellings(data, [*labels, *sorted({x.label for x in train}, key=len)])
    train = spelled(train, names)
    found = sorted({example.label for example in train})
    if len(found) < 2 and not labels:
        raise ValueError(f"all examples of {data} have the label {found[0]}: give some of another")
    whose = "the checkpoint's" if labels else f"those of {data}"
    if labels:
        refuse_others(data, train, labels, whose)
    else:
        with suppress(ValueError):  # not all are numbers: they stay sorted by spelling
            found.sort(key=int)
        labels = found
    if valid:
        validation = spelled(read_examples(Path(valid), labels), names)
        refuse_others(valid, validation, labels, whose)
        if len(train[0].texts) != len(validation[0].texts):
            raise ValueError(
                f"{data} has {len(train[0].texts)} and {valid} {len(validation[0].texts)} texts "
                "for a label: give both in one form"
            )
        divided = "the given files"
        equal = [row[1:] for row in train] == [row[1:] for row in validation]
        copy = copy_told(data, valid, equal)
    else:
        train, validation = divide_by_label(train, [example.label for example in train], HELD_OUT)
        if not validation:
            raise ValueError(f"no label of {data} comes twice, none can be held out: give --valid")
        copy = ""
        divided = f"one in {HELD_OUT} of each label that comes twice, drawn with a fixed seed"
    splits = {"train": train, "validation": validation}
    content = [[[*x.texts, x.label] for x in examples] for examples in splits.values()]
    digest = hashlib.sha256(json.dumps(["labelled 1", list(labels), content]).encode()).hexdigest()
    rule = f"{len(train):,} examples train, {len(validation):,} validate ({divided}){copy}"
    name, prompts = name_of(Path(data)), some_of_each_label(validation)
    return LabelledCorpus(name, digest, rule, prompts, tuple(labels), splits)


def spellings(data: str, labels: Sequence[str]) -> dict[str, str]:
    """{a whole number, written in the plain way: the first of the labels that mean it}. Raises
    ValueError for two labels that mean another number ("1.5", "1.50"): they would be two classes.
    """
    names, values = {}, {}
    for label in labels:
        name = names.setdefault(plain(label), label)
        if name == label and NUMBER.fullmatch(label):
            other = values.setdefault(float(label), label)
            if other != label:
                raise ValueError(
                    f"{data} has the labels {other!r} and {label!r}, which are one number: write "
                    "them alike, or with a letter in front if they are two"
                )
    return names


def spelled(examples: list[Example], names: dict[str, str]) -> list[Example]:
    return [x._replace(label=names.get(plain(x.label), x.label)) for x in examples]


def plain(label: str) -> str:
    """1.0 -> 1, as spreadsheets and pandas write whole numbers in some of their columns."""
    match = WHOLE.fullmatch(label)
    return match[1] if match else label


def refuse_others(data: str, examples: list[Example], known: Sequence[str], whose: str) -> None:
    for example in examples:
        if example.label not in known:
            more = ", …" * (len(known) > 10)
            raise ValueError(
                f"{data}, line {example.line:,}: the label {example.label!r} is none of {whose} "
                f"({', '.join(known[:10])}{more}): correct it, or leave the line out"
            )


def some_of_each_label(examples: list[Example], number: int = 4) -> list[str]:
    """The first text of each label, then the second of each, and so on, `number` in all."""
    before, ranked = Counter(), []
    for example in examples:
        ranked.append((before[example.label], "\t".join(example.texts)))
        before[example.label] += 1
    return [text for _, text in sorted(ranked, key=lambda x: x[0])[:number]]


# ---- one file ------------------------------------------------------------------------------------


def read_examples(path: Path, known: Collection[str] = ()) -> list[Example]:
    """All examples of a file, in its order. `known`: labels that cast no doubt on the order of the
    columns. Raises ValueError, which names the line, where one is broken."""
    table = read_table(path, FORMS, collapse=True)
    if not table.named:
        check_order(path, table.rows, known)
    return [Example(line, texts[:-1], texts[-1]) for line, texts in table.rows]


def check_order(path: Path, rows: list[Row], known: Collection[str]) -> None:
    """Raises ValueError where columns without names show that they are not text and label: the
    label comes first (the first column has fewer values than the last), or the first line has names
    that are not known here (what would be its label comes nowhere else). Known labels cast no
    doubt in either case."""
    first, last = (Counter(texts[i] for _, texts in rows) for i in (0, -1))
    unknown, (number, texts) = last.keys() - set(known), rows[0]
    if len(first) < len(last) and unknown:
        why = f"the first column has {len(first):,} different values and the last {len(last):,}, as"
        why += f" if the label came first: {name_them(FORMS)}, in the order of the file"
        raise refusal(path, number, why)
    if len(rows) > 2 and last[texts[-1]] == 1 and texts[-1] in unknown:
        why = f"its label {texts[-1][:40]!r} comes nowhere else, as if the line were names that are"
        raise refusal(path, number, f"{why} not known here: {name_them(FORMS)}")
