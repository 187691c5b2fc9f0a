"""Small tables of text -> rows of named columns, in memory: what fine-tuning learns from.

    .jsonl  one object on each line; numbers, true and false become text as they are written
    .csv    columns divided by commas, as the csv module reads it: "quoted" cells may hold commas,
            doubled quotes and line ends
    .tsv    columns divided by tabs, one row on each line, as in GLUE's files: a quote is text

All are UTF-8, with or without a byte-order mark, with lines that end in \\n or \\r\\n, and may be
.gz. Blank lines are skipped, and so are rows of empty cells.

A form is the names of the columns that a task needs. If there is more than one form, the first
counts whose names are all there, in the first line or in each object of a .jsonl, in any order.
Other columns are ignored. A first line without such names is a row; its columns are then those of
the first form of the same length, in that order.

A column that a task calls nested holds a list, which becomes its JSON text.

Left out: other separators and encodings, other nested JSON, Excel and Parquet, tables that do not
fit into memory, finding rows that occur twice (they may fall on both sides of the division).
"""

import csv
import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from data.division import copy_told, divide
from data.lines import read_lines
from data.text import ARRAY, name_of, plain_name

HELD_OUT = 10  # without a validation file, one row in so many validates
Form = tuple[str, ...]  # names of columns
SEPARATORS = (  # what tables are divided by, by mistake or in other countries
    (";", "';' where commas are needed", "export the table once more, with commas"),
    ("\t", "tabs", "call it .tsv"),
    ("|", "'|' where commas are needed", "export the table once more, with commas"),
    (",", "commas", "call it .csv"),
)


class Row(NamedTuple):
    line: int  # the line of its file where it begins
    texts: tuple[str, ...]  # one for each column of its form


class Table(NamedTuple):
    rows: list[Row]
    named: bool  # whether the file names its columns


@dataclass
class TableCorpus:
    """Rows in two splits. `hash` is of their contents and how they are divided."""

    name: str
    hash: str
    rule: str  # how it was split, for the plan
    splits: dict[str, list[Row]]
    prompts: list[str] = field(default_factory=lambda: [""])  # to show what a GPT has learnt

    def pieces(self, split: str) -> Iterator[tuple[str, bool]]:
        """What a tokenizer learns from: every cell is a document of its own."""
        for row in self.splits[split]:
            for text in row.texts:
                yield text, True


def open_tables(
    data: str, valid: str, forms: Sequence[Form], *, blank: Collection[str] = (), **more
) -> TableCorpus:
    """The rows of --data and --valid; without --valid, one row in HELD_OUT validates. The other
    arguments are those of read_table. Raises ValueError on bad input."""

    def read(name: str) -> list[Row]:
        table = read_table(Path(name), forms, blank=blank, **more)
        first = table.rows[0]
        known = [c for c in map(clean, first.texts) if any(c in form for form in forms)]
        if known and not table.named:
            why = f'this looks like names, and "{known[0]}" is one, but others are missing'
            raise refusal(Path(name), first.line, f"{why}: {name_them(forms)}")
        return table.rows

    if valid:
        train, validation = read(data), read(valid)
        rule = f"{len(train):,} rows train, {len(validation):,} validate (the given files)"
        equal = [row.texts for row in train] == [row.texts for row in validation]
        rule += copy_told(data, valid, equal)
    else:
        train, validation, rule = divide(read(data), HELD_OUT, "row", data)
    content = json.dumps(["tables 1", *([row.texts for row in x] for x in (train, validation))])
    return TableCorpus(
        name_of(Path(data)),
        hashlib.sha256(content.encode()).hexdigest(),
        rule,
        {"train": train, "validation": validation},
    )


# ---- one file ------------------------------------------------------------------------------------


def read_table(
    path: Path,
    forms: Sequence[Form],
    *,
    blank: Collection[str] = (),
    nested: Collection[str] = (),
    collapse: bool = False,
    remedy: str = "",
) -> Table:
    """All rows of a file, in order.

    blank: the columns whose cells may be empty or white space. nested: those whose cells in a
    .jsonl are lists, which become their JSON text. collapse: white space becomes single
    spaces and is removed at both ends; otherwise it is part of the text. Case and white space
    around the names of columns do not matter. Raises ValueError, with the line and its content, for
    what is broken, and with the remedy where a .jsonl has other names.
    """
    kind = Path(plain_name(path)).suffix
    if kind not in (".jsonl", ".csv", ".tsv"):
        raise ValueError(f"{path} is no .csv, .tsv or .jsonl (each also as .gz): convert it")
    if not path.is_file():
        raise ValueError(f"{path} is no file here: give a .csv, .tsv or .jsonl, each also as .gz")
    if kind == ".jsonl":
        named, records = True, json_records(path)
    else:
        refuse_separator(path, "," if kind == ".csv" else "\t", forms)
        cells = csv_cells(path, collapse) if kind == ".csv" else tsv_cells(path)
        named, records = named_records(path, cells, forms)
    form, rows = (), []
    for number, record in records:
        found = find_form(record, forms)
        if found is None:
            first = " and ".join(min(forms, key=len))
            raise refusal(path, number, f"it has no {first}, or no known names for them{remedy}")
        record |= {name: json.dumps(record[name]) for name in found if name in nested}
        form = form or found
        if found != form:
            names = [", ".join(names) for names in (found, form)]
            raise refusal(path, number, f"it has {names[0]} where the others have {names[1]}")
        texts = [as_text(path, number, name, record[name], name in blank) for name in form]
        if collapse:
            texts = [" ".join(text.split()) for text in texts]
        rows.append(Row(number, tuple(texts)))
    if not rows:
        raise ValueError(f"{path} has no rows: give a table with text in it")
    return Table(rows, named)


def as_text(path: Path, number: int, name: str, value: object, may_be_blank: bool) -> str:
    if isinstance(value, bool):
        return json.dumps(value)
    if not isinstance(value, str):
        raise refusal(path, number, f"its {name} is {json.dumps(value)[:20]}, which is no text")
    if not value.strip() and not may_be_blank:
        raise refusal(path, number, f"its {name} is empty")
    return value


def is_table(path: Path) -> bool:
    return plain_name(path).endswith((".csv", ".tsv"))


def find_form(names: Collection[str], forms: Sequence[Form]) -> Form | None:
    return next((form for form in forms if all(name in names for name in form)), None)


def name_them(forms: Sequence[Form]) -> str:
    """What to do if columns are not what they seem; it gives the first form of each length."""
    first = {len(form): ", ".join(form) for form in reversed(forms)}
    return f"name the columns in a first line ({' or '.join(first[n] for n in sorted(first))})"


def refusal(path: Path, number: int, why: str) -> ValueError:
    """An error that quotes its line, which is read again, as nothing else needs it as written."""
    line = next(islice(read_lines(path), number - 1, None))
    return ValueError(f"{path}, line {number:,}: {why}: {' '.join(line.split())[:60]}")


def clean(name: str) -> str:
    return name.strip().lower()


# ---- the three formats ---------------------------------------------------------------------------


def json_records(path: Path) -> Iterator[tuple[int, dict]]:
    """Yields (number of the line, object), with numbers as the text that is written there."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_int=str, parse_float=str)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            array = line.lstrip().startswith("[")
            raise refusal(path, number, f"it is no JSON object{ARRAY * array}")
        if isinstance(record.get("translation"), dict):  # Hugging Face's way to write pairs
            record |= record["translation"]
        yield number, {clean(name): value for name, value in record.items()}


def csv_cells(path: Path, skip_spaces: bool) -> Iterator[tuple[int, list[str]]]:
    """Yields (number of the row's first line, its cells). skip_spaces: spaces after a comma are
    dropped, so that a quote may follow them."""
    lines, number = (f"{line}\n" for line in read_lines(path)), 1
    csv.field_size_limit(2**31 - 1)  # which is 131,072 characters, unless set for all readers
    reader = csv.reader(lines, strict=True, skipinitialspace=skip_spaces)
    try:
        for cells in reader:
            yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        raise refusal(path, number, f"what begins here is no CSV ({error})") from error


def tsv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(read_lines(path), 1):
        yield number, line.removesuffix("\r").split("\t")


def named_records(
    path: Path, rows: Iterator[tuple[int, list[str]]], forms: Sequence[Form]
) -> tuple[bool, Iterator[tuple[int, dict[str, str]]]]:
    """(whether the first row has the names, an iterator over (line, {name: cell}) of each row)"""
    rows = ((number, cells) for number, cells in rows if any(map(str.strip, cells)))
    first, cells = next(rows, (0, []))
    if not first:
        return True, iter(())
    width, names = len(cells), [clean(cell) for cell in cells]
    form = find_form(names, forms)
    named = form is not None
    if named:
        twice = [name for name in form if names.count(name) > 1]
        if twice:
            raise refusal(path, first, f'"{twice[0]}" is the name of two columns')
    else:
        names = next((form for form in forms if len(form) == width), None)
        if not names:
            why = f"{column_count(width)}, and no known names: {name_them(forms)}"
            raise refusal(path, first, why)
        rows = chain([(first, cells)], rows)

    def records() -> Iterator[tuple[int, dict[str, str]]]:
        for number, cells in rows:
            if len(cells) != width:
                why = f"{column_count(len(cells))} where line {first:,} has {width}"
                raise refusal(path, number, why)
            yield number, dict(zip(names, cells, strict=True))

    return named, records()


def refuse_separator(path: Path, own: str, forms: Sequence[Form]) -> None:
    """Raises ValueError if the first line is not divided by `own` but by something else: where that
    shows its names, or where it has no `own` and no form has one column."""
    numbered = enumerate(read_lines(path), 1)
    number, line = next(((n, s) for n, s in numbered if s.strip()), (1, ""))
    for mark, what, remedy in SEPARATORS:
        parts = [clean(part.strip(' "')) for part in line.split(mark)]
        alone = own not in line and len(parts) > 1 and all(len(form) > 1 for form in forms)
        if mark != own and (alone or (len(parts) > 1 and find_form(parts, forms))):
            raise refusal(path, number, f"its columns are divided by {what}: {remedy}")


def column_count(n: int) -> str:
    return f"{n} column{'s' * (n != 1)}"
