"""Files of texts, or pairs of texts, with a label each -> examples in two splits.

A file is .csv, .tsv or .jsonl, in UTF-8, also as .gz:

    .csv     columns divided by commas; what has commas, quotes or line breaks in it is in quotes
    .tsv     columns divided by tabs, a line an example, as GLUE's files are: a quote is text
    .jsonl   an object a line; a label is a string, a number, true or false

The columns are found by their names in the first line (in a .jsonl, in each): those of the texts
are a row of TEXTS, that of the label is one of LABELS, others are passed over. A first line without
such names is an example, and the columns are text and label, or text, text_b and label. Another
order is not guessed, but refused where it shows: see `check_order`.

Left out: several labels for a text, numbers to be predicted (regression), downloads, a search for
texts that are in both splits.
"""

import csv
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.parallel import read_lines

# The first row counts whose names are all there, so that a pair is not read as one text.
TEXTS = (
    *(("text", "text_b"), ("text_a", "text_b"), ("sentence1", "sentence2")),
    *(("question1", "question2"), ("premise", "hypothesis")),
    *(("question", "sentence"), ("question", "passage")),
    *(("text",), ("sentence",), ("question",), ("review",)),
)
LABELS = ("label", "gold_label", "is_duplicate", "class", "sentiment")
WITHOUT_NAMES = {2: ("text", "label"), 3: ("text", "text_b", "label")}
NAME_THEM = "name the columns in a first line, text and label, or text, text_b and label"
HELD_OUT = 10  # one in so many of each label validates where no file does
# Not the run's: a run that begins from another's weights must not be scored on what these learnt.
SPLIT_SEED = 0


# ---- reading -------------------------------------------------------------------------------------


class Example(NamedTuple):
    line: int  # of its file, where it begins
    texts: tuple[str, ...]  # one or two, white space collapsed
    label: str


@dataclass(frozen=True)
class Lines:
    """A file's lines, to be told from when something is wrong with one of them."""

    path: Path
    lines: list[str]

    def error(self, number: int, why: str) -> ValueError:
        content = " ".join(self.lines[number - 1].split())
        return ValueError(f"{self.path}, line {number:,}: {why}: {content[:60]}")


def read_examples(path: Path, known: Collection[str] = ()) -> list[Example]:
    """All of a file, in order. `known`: labels for which no order of columns is doubted. Raises
    ValueError, which names the line, where one is broken."""
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind not in ("csv", "tsv", "jsonl"):
        raise ValueError(f"{path} is no .csv, .tsv or .jsonl (each also as .gz): convert it")
    if not path.is_file():
        raise ValueError(f"{path} is no file here: name one with labelled texts")
    source, columns, examples = Lines(path, list(read_lines(path))), None, []
    records = json_records(source) if kind == "jsonl" else table(source, kind, known)
    for number, record in records:
        found = find_columns(record)
        if found is None:
            raise source.error(number, "it has no text and label, or no known names for them")
        columns = columns or found
        if found != columns:
            names = [", ".join(row) for row in (found, columns)]
            raise source.error(number, f"it has {names[0]} where the others have {names[1]}")
        texts = tuple(as_text(source, number, name, record[name]) for name in columns[:-1])
        label = record[columns[-1]]
        if isinstance(label, int | float):
            label = json.dumps(label)  # true, 1, 0.5
        examples.append(Example(number, texts, as_text(source, number, columns[-1], label)))
    if not examples:
        raise ValueError(f"{path} has no example in it: give texts with a label each")
    return examples


def find_columns(names: Collection[str]) -> tuple[str, ...] | None:
    """Those of the texts and, last, that of the label."""
    texts = next((row for row in TEXTS if all(name in names for name in row)), None)
    label = next((name for name in LABELS if name in names), None)
    return (*texts, label) if texts and label else None


def as_text(source: Lines, number: int, name: str, value: object) -> str:
    """White space collapsed, as a BERT reads text."""
    if not isinstance(value, str):
        raise source.error(number, f"its {name} is {json.dumps(value)[:20]}, which is no text")
    if not value.strip():
        raise source.error(number, f"its {name} is empty")
    return " ".join(value.split())


def json_records(source: Lines) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(source.lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise source.error(number, "it is no JSON object")
        yield number, {name.strip().lower(): value for name, value in record.items()}


def table(source: Lines, kind: str, known: Collection[str]) -> list[tuple[int, dict[str, str]]]:
    """Numbered records of a .csv or .tsv, whose columns have a name each, given or not."""
    if kind == "csv":
        rows = csv_rows(source)
    else:
        rows = ((number, line.split("\t")) for number, line in enumerate(source.lines, 1))
    # A blank line has no cell, or one without text.
    rows = [(number, cells) for number, cells in rows if len(cells) > 1 or "".join(cells).strip()]
    if not rows:
        return []
    first, names = rows[0][0], [cell.strip().lower() for cell in rows[0][1]]
    named = find_columns(names) is not None
    if not named and len(names) not in WITHOUT_NAMES:
        columns = f"{len(names)} column" + "s" * (len(names) > 1)
        raise source.error(first, f"{columns}, and no names that are known here: {NAME_THEM}")
    names = names if named else WITHOUT_NAMES[len(names)]
    for number, cells in rows:
        if len(cells) != len(names):
            raise source.error(
                number, f"{len(cells)} columns where line {first:,} has {len(names)}"
            )
    if not named:
        check_order(source, rows, known)
    return [(number, dict(zip(names, cells, strict=True))) for number, cells in rows[named:]]


def csv_rows(source: Lines) -> Iterator[tuple[int, list[str]]]:
    lines, number = (f"{line}\n" for line in source.lines), 1
    reader = csv.reader(lines, strict=True, skipinitialspace=True)
    try:
        for cells in reader:
            yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        raise source.error(number, f"what begins here is no CSV ({error})") from error


def check_order(source: Lines, rows: list[tuple[int, list[str]]], known: Collection[str]) -> None:
    """Refuses columns without names where they show that they are not what they would be taken
    for: labels come first (the first column has fewer values than the last), or the first line is
    names that are not known here (what would be its label comes nowhere else). Labels that are
    known already are doubted in neither case."""
    first, last = (Counter(cells[i].strip() for _, cells in rows) for i in (0, -1))
    unknown, number, label = last.keys() - set(known), rows[0][0], rows[0][1][-1].strip()
    if len(first) < len(last) and unknown:
        raise source.error(
            number,
            f"the first column has {len(first):,} different values and the last {len(last):,}, as "
            f"if the label came first: {NAME_THEM}, in the order of the file",
        )
    if len(rows) > 2 and last[label] == 1 and label in unknown:
        raise source.error(
            number,
            f"its label {label[:40]!r} comes nowhere else, as if the line were names that are not "
            f"known here: {NAME_THEM}",
        )


# ---- splitting -----------------------------------------------------------------------------------


@dataclass
class LabelledCorpus:
    """Examples in two splits. `hash` is of their contents, division and labels."""

    name: str
    hash: str
    rule: str  # how it was split, for the plan
    prompts: list[str]  # to show what a model has learnt; the texts of a pair have a tab between
    labels: tuple[str, ...]
    splits: dict[str, list[Example]]

    def pieces(self, split: str) -> Iterator[tuple[str, bool]]:
        """What a new tokenizer learns from: every text, as `encode_text` shows it."""
        for example in self.splits[split]:
            for text in example.texts:
                yield f" {text}", True


def open_labelled(data: str, *, valid: str = "", labels: Sequence[str] = ()) -> LabelledCorpus:
    """data and valid are files. Where valid is empty, one in HELD_OUT of each label validates.

    labels: those that a checkpoint has, in its order; empty: those of data, by number where all
    are whole numbers, else sorted. Raises ValueError on bad input.
    """
    train = read_examples(Path(data), labels)
    found = sorted({example.label for example in train})
    if len(found) < 2:
        raise ValueError(f"all examples of {data} have the label {found[0]}: give some of another")
    whose = "the checkpoint's" if labels else f"those of {data}"
    if labels:
        refuse_others(data, train, labels, whose)
    else:
        with suppress(ValueError):  # else they stay in the order of their spelling
            found.sort(key=int)
        labels = found
    if valid:
        validation = read_examples(Path(valid), labels)
        refuse_others(valid, validation, labels, whose)
        if len(train[0].texts) != len(validation[0].texts):
            raise ValueError(
                f"{data} has {len(train[0].texts)} and {valid} {len(validation[0].texts)} texts "
                "for a label: give both in one form"
            )
        divided = "the given files"
    else:
        held_out = stratified([example.label for example in train])
        if not held_out:
            raise ValueError(f"no label of {data} comes twice, none can be held out: give --valid")
        validation = [train[i] for i in sorted(held_out)]
        train = [example for i, example in enumerate(train) if i not in held_out]
        divided = f"one in {HELD_OUT} of each label that comes twice, at least one"
    splits = {"train": train, "validation": validation}
    content = [[[*x.texts, x.label] for x in examples] for examples in splits.values()]
    digest = hashlib.sha256(json.dumps(["labelled 1", list(labels), content]).encode()).hexdigest()
    rule = f"{len(train):,} examples train, {len(validation):,} validate ({divided})"
    name = Path(data).name.partition(".")[0] or Path(data).name
    return LabelledCorpus(name, digest, rule, shown(validation), tuple(labels), splits)


def refuse_others(data: str, examples: list[Example], known: Sequence[str], whose: str) -> None:
    for example in examples:
        if example.label not in known:
            more = ", …" * (len(known) > 10)
            raise ValueError(
                f"{data}, line {example.line:,}: the label {example.label!r} is none of {whose} "
                f"({', '.join(known[:10])}{more}): correct it, or leave the line out"
            )


def stratified(labels: list[str]) -> set[int]:
    """Places that validate: drawn from those of each label by itself, always the same ones."""
    places, held_out = defaultdict(list), set()
    for i, label in enumerate(labels):
        places[label].append(i)
    random = np.random.default_rng(SPLIT_SEED)
    for _, own in sorted(places.items()):
        if len(own) > 1:
            wanted = max(1, len(own) // HELD_OUT)
            held_out.update(random.choice(own, wanted, replace=False).tolist())
    return held_out


def shown(examples: list[Example], number: int = 4) -> list[str]:
    """The first of each label, then the second, and so on."""
    before, ranked = Counter(), []
    for example in examples:
        ranked.append((before[example.label], "\t".join(example.texts)))
        before[example.label] += 1
    return [text for _, text in sorted(ranked, key=lambda x: x[0])[:number]]
