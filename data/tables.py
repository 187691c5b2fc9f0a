"""Small tables of text -> rows of named columns, in memory: what fine-tuning learns from.

    .jsonl  an object a line; numbers are read as they are written, other keys are ignored
    .csv    comma-separated, as the csv module reads it: "quoted" cells may hold commas, doubled
            quotes and line ends
    .tsv    tab-separated, and nothing more: a quote is a character like any other

Each of them UTF-8, with or without a byte-order mark, lines ending in \\n or \\r\\n; also as .gz.
Blank lines are skipped. A table may begin with a header: it does if the first row names a column
that is asked for. Other columns are ignored then. Without a header the columns are those asked for,
in that order, and there are no others. White space around text is part of it.

Left out: other separators and encodings, nested JSON, Excel and Parquet, tables that do not fit
into memory, rows that occur twice (they may fall on both sides of the division).
"""

import csv
import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.parallel import read_lines

HELD_OUT_EVERY = 10  # of this many rows, one validates
Columns = dict[str, tuple[str, ...]]  # name: other names that a file may give it, best first
Row = tuple[int, dict[str, str]]  # (line that it begins in, {column: text})


@dataclass
class TableCorpus:
    """Rows in two splits. `hash` is of their contents and of how they are divided."""

    name: str
    hash: str
    rule: str  # how it was split, for the plan
    train: list[Row]
    validation: list[Row]

    def pieces(self, split: str) -> Iterator[tuple[str, bool]]:
        """What a tokenizer is learnt from: every cell is a document of its own."""
        for _, row in getattr(self, split):
            for text in row.values():
                yield text, True


def open_tables(
    data: str,
    valid: str,
    columns: Columns,
    seed: int,
    *,
    optional: Collection[str] = (),
    blank: Collection[str] = (),
) -> TableCorpus:
    """The rows of --data and --valid; without the latter, one row in ten validates, drawn with the
    seed. The other arguments are those of read_table. Raises ValueError on bad input."""
    path, more = Path(data), {"optional": optional, "blank": blank}
    rows = read_table(path, columns, **more)
    if valid:
        train, validation, divided = (
            rows,
            read_table(Path(valid), columns, **more),
            "the given files",
        )
    else:
        if len(rows) < 2:
            raise ValueError(f"{data} has one row, too few to hold one out: give more, or --valid")
        n = max(1, len(rows) // HELD_OUT_EVERY)
        held_out = set(np.random.default_rng(seed).permutation(len(rows))[:n].tolist())
        train = [row for i, row in enumerate(rows) if i not in held_out]
        validation = [row for i, row in enumerate(rows) if i in held_out]
        divided = f"one in {HELD_OUT_EVERY if n > 1 else len(rows)}, drawn with seed {seed}"
    content = json.dumps(["tables 1", *([row for _, row in part] for part in (train, validation))])
    return TableCorpus(
        path.name.partition(".")[0] or path.name,
        hashlib.sha256(content.encode()).hexdigest(),
        f"{len(train):,} rows train, {len(validation):,} validate ({divided})",
        train,
        validation,
    )


def read_table(
    path: Path,
    columns: Columns,
    *,
    optional: Collection[str] = (),
    blank: Collection[str] = (),
) -> list[Row]:
    """All rows of a file, in its order; their columns are in the order of `columns`.

    optional: columns that the file, or an object of a .jsonl, may lack, and then the row does too.
    blank: columns whose cells may be empty or white space. Without a header a row has either all
    columns or all but the optional ones. Column names match without regard to case and white space
    around them. ValueError with the line and its content for what is broken.
    """
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    if kind not in (".jsonl", ".csv", ".tsv"):
        raise ValueError(f"{path} is no table: its name must end in .csv, .tsv or .jsonl, or .gz")
    if not path.is_file():
        raise ValueError(f"{path} is no file here: give a .csv, .tsv or .jsonl, each also as .gz")
    required, rows = [name for name in columns if name not in optional], []
    if kind == ".jsonl":
        records = jsonl_records(path)
    else:
        cells = csv_cells(path) if kind == ".csv" else tsv_cells(path)
        records = named(path, cells, columns, required)
    for number, record, line in records:
        row = pick(record, columns)
        for name in required:
            if name not in row:
                raise refusal(path, number, line, f"there is no {either(name, columns)}")
        for name, text in row.items():
            if not isinstance(text, str):
                raise refusal(path, number, line, f'"{name}" is no text')
            if name not in blank and not text.strip():
                raise refusal(path, number, line, f'"{name}" is empty')
        rows.append((number, row))
    if not rows:
        raise ValueError(f"{path} has no rows: give a table with text in it")
    return rows


def pick(record: dict, columns: Columns) -> dict:
    """{column: its value}, under the first of its names that the record has."""
    found = {
        name: next((alias for alias in (name, *aliases) if alias in record), None)
        for name, aliases in columns.items()
    }
    return {name: record[alias] for name, alias in found.items() if alias is not None}


def either(name: str, columns: Columns) -> str:
    return " or ".join(f'"{alias}"' for alias in (name, *columns[name]))


def refusal(path: Path, number: int, line: str, what: str) -> ValueError:
    return ValueError(f"{path}, line {number:,}: {what}: {line.strip()[:60]}")


# ---- the three formats ---------------------------------------------------------------------------


def jsonl_records(path: Path) -> Iterator[tuple[int, dict, str]]:
    """(number of the line, object, line). A number becomes the text that stands for it."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_int=str, parse_float=str)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise refusal(path, number, line, "this is no JSON object")
        yield number, {clean(key): value for key, value in record.items()}, line


def csv_cells(path: Path) -> Iterator[tuple[int, list[str], str]]:
    """(number of the record's first line, cells, that line)"""
    lines = list(read_lines(path))
    reader, number = csv.reader((f"{line}\n" for line in lines), strict=True), 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise refusal(path, number, lines[number - 1], f"this is no CSV ({error})") from error
        if any(cell.strip() for cell in cells):
            yield number, cells, lines[number - 1]
        number = reader.line_num + 1


def tsv_cells(path: Path) -> Iterator[tuple[int, list[str], str]]:
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            yield number, line.removesuffix("\r").split("\t"), line


def named(
    path: Path, rows: Iterator[tuple[int, list[str], str]], columns: Columns, required: list[str]
) -> Iterator[tuple[int, dict, str]]:
    """Cells -> {name: cell}; the names are those of the header, or of `columns`."""
    names: list[str] = []
    for i, (number, cells, line) in enumerate(rows):
        if not i:
            names = [clean(cell) for cell in cells]
            found = pick({name: name for name in names}, columns)
            lacking = [name for name in required if name not in found]
            if len(lacking) < len(required):
                if lacking:
                    what = f"this header has no {either(lacking[0], columns)}"
                    raise refusal(path, number, line, what)
                for name in found.values():
                    if names.count(name) > 1:
                        raise refusal(path, number, line, f'this header names "{name}" twice')
                continue
            names = required if len(cells) == len(required) else list(columns)
        if len(cells) != len(names):
            what = f"{len(cells)} instead of {len(names)} columns ({', '.join(names)})"
            raise refusal(path, number, line, what)
        yield number, dict(zip(names, cells, strict=True)), line


def clean(name: str) -> str:
    return name.strip().lower()
