"""data/tables.py: .csv, .tsv and .jsonl -> rows, broken lines told by number and content."""

import csv
import gzip
import json
import re
from pathlib import Path

import pytest
from conftest import shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.tables import open_tables, read_table

PAIR = {"a": ("text", "sentence1"), "b": ("text_b",)}
LABELLED = {"text": ("sentence",), "text_b": (), "label": ("class",)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str | bytes) -> Path:
    content = text if isinstance(text, bytes) else text.encode("utf-8")
    path = Path(name)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def read(name: str, text: str | bytes, columns=PAIR, **more) -> list:
    return read_table(write(name, text), columns, **more)


# ---- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("header", [True, False])
def test_three_formats_say_the_same(gz, end, mark, header):
    want = [{"a": "to be", "b": "x, y"}, {"a": 'a "quote"', "b": " 42 "}]
    lines = {
        ".csv": ["a,b"] * header + ['to be,"x, y"', '"a ""quote""", 42 '],
        ".tsv": ["a\tb"] * header + ["to be\tx, y", 'a "quote"\t 42 '],
        ".jsonl": [json.dumps(row) for row in want],
    }
    for kind, rows in lines.items():
        # The last line may have no end; a blank one is skipped and yet counted.
        got = read(f"t{kind}{gz}", mark + end.join([*rows[:-1], "", rows[-1]]))
        last = len(rows) + 1
        assert got == [(last - 2, want[0]), (last, want[1])]


def test_columns_are_found_by_name_in_any_order_and_others_ignored():
    want = [(2, {"a": "x", "b": "y"})]
    assert read("t.csv", "id, TEXT_B ,sentence1\n1,y,x\n") == want
    assert read("T.CSV", "b,a\ny,x\n") == want  # a file's name may be in capitals
    assert read("t.tsv", "Text\tscore\tB\nx\t0.5\ty\n") == want
    assert read("t.jsonl", '\n{"score": null, "B": "y", "Text": "x"}\n') == want
    # The column's own name comes before the others, and these in their order.
    assert read("t.csv", "sentence1,text,text_b,b\n1,2,3,4\n") == [(2, {"a": "2", "b": "4"})]
    assert list(read("t.jsonl", '{"b": "y", "a": "x"}')[0][1]) == ["a", "b"]


def test_without_a_header_all_columns_or_the_required_ones():
    more = {"columns": LABELLED, "optional": ("text_b",)}
    assert read("t.tsv", "x\t1\n", **more) == [(1, {"text": "x", "label": "1"})]
    assert read("t.tsv", "x\ty\t1\n", **more) == [(1, {"text": "x", "text_b": "y", "label": "1"})]
    assert read("t.csv", "label,sentence\n1,x\n", **more) == [(2, {"text": "x", "label": "1"})]
    lines = '{"text": "x", "label": 1}\n{"text": "x", "text_b": "y", "class": -2.50}\n'
    assert read("t.jsonl", lines, **more) == [
        (1, {"text": "x", "label": "1"}),
        (2, {"text": "x", "text_b": "y", "label": "-2.50"}),  # as it is written
    ]


def test_line_ends_inside_quotes_belong_to_the_cell_and_the_next_line_is_known():
    text = 'a,b\r\n"one\r\ntwo",x\r\n\r\n"three\n\nfour",y\r\n"",z\r\n'
    rows = read("t.csv", text, blank=("a",))
    assert [number for number, _ in rows] == [2, 5, 8]
    assert [row["a"] for _, row in rows] == ["one\r\ntwo", "three\n\nfour", ""]


def test_a_tsv_knows_no_quotes_and_other_separators_are_text():
    rows = read("t.tsv", 'say "no\tx\u2028y\x85z\r\n"yes"\tx,\r y\n')
    assert [row for _, row in rows] == [
        {"a": 'say "no', "b": "x\u2028y\x85z"},
        {"a": '"yes"', "b": "x,\r y"},
    ]


CELL = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=9)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5))
def test_what_the_csv_module_and_json_write_is_read_back(pairs):
    filled = [(f"a{a}", f"b{b}") for a, b in pairs]
    with Path("t.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("b", "a"), *((b, a) for a, b in filled)])
    lines = (json.dumps({"b": b, "a": a}, ensure_ascii=len(a) > 3) for a, b in filled)
    write("t.jsonl", "\n".join(lines))
    for name in ("t.csv", "t.jsonl"):
        assert [tuple(row.values()) for _, row in read_table(Path(name), PAIR)] == filled


def test_real_rows():
    rows = read_table(shared("sst2/dev.tsv"), LABELLED, optional=("text_b",))
    assert len(rows) == 872 and {row["label"] for _, row in rows} == {"0", "1"}
    assert all(row.keys() == {"text", "label"} for _, row in rows)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "x", "t.txt is no table: its name must end in .csv, .tsv or .jsonl"),
        ("t.csv", "", "t.csv has no rows: give a table"),
        ("t.csv", "a,b\n\n", "t.csv has no rows: give a table"),
        ("t.csv", "a,b\n1,2\n\n3\n", "t.csv, line 4: 1 instead of 2 columns (a, b): 3"),
        ("t.csv", "1,2\n3,4,5\n", "t.csv, line 2: 3 instead of 2 columns (a, b): 3,4,5"),
        ("t.tsv", "1\t2\n3 4\n", "t.tsv, line 2: 1 instead of 2 columns (a, b): 3 4"),
        ("t.csv", "A,x\n1,2\n", 't.csv, line 1: this header has no "b" or "text_b": A,x'),
        ("t.csv", "a,b,A\n1,2,3\n", 't.csv, line 1: this header names "a" twice: a,b,A'),
        ("t.csv", 'a,b\n"1\n2",3\n"x"y,4\n', "t.csv, line 4: this is no CSV ("),
        ("t.csv", 'a,b\n1,2\n3,"4\n5,6\n', "t.csv, line 3: this is no CSV (unexpected end"),
        ("t.csv", "a,b\n1,\n", 't.csv, line 2: "b" is empty: 1,'),
        ("t.jsonl", "\n[1]\n", "t.jsonl, line 2: this is no JSON object: [1]"),
        ("t.jsonl", '{"a": "1"', 't.jsonl, line 1: this is no JSON object: {"a": "1"'),
        ("t.jsonl", "[" * 9999, "t.jsonl, line 1: this is no JSON object: [[["),
        ("t.jsonl", '{"b": "1"}', 't.jsonl, line 1: there is no "a" or "text" or "sentence1": {'),
        ("t.jsonl", '{"a": "1", "b": null}', 't.jsonl, line 1: "b" is no text: {"a"'),
        ("t.jsonl", '{"a": "1", "b": NaN}', 't.jsonl, line 1: "b" is no text: {"a"'),
        ("t.jsonl", '{"a": " ", "b": "x"}', 't.jsonl, line 1: "a" is empty: {"a"'),
        ("t.tsv", b"a\tb\n1\t2\n\xe9\t3\n", "t.tsv is not UTF-8 in line 3"),
    ],
)  # fmt: skip
def test_broken_tables(name, text, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        read(name, text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 150


def test_a_missing_file():
    with pytest.raises(ValueError, match=r"no such.csv is no file here: give"):
        read_table(Path("no such.csv"), PAIR)


# ---- two splits ----------------------------------------------------------------------------------


def table(name: str, n: int, more: str = "") -> str:
    write(name, "a,b\n" + "".join(f"left {i},right {i}{more}\n" for i in range(n)))
    return name


def test_one_row_in_ten_is_held_out_by_the_seed():
    data = table("x.y.csv", 73)
    corpus = open_tables(data, "", PAIR, 5)
    assert (len(corpus.train), len(corpus.validation)) == (66, 7) and corpus.name == "x"
    assert corpus.rule == "66 rows train, 7 validate (one in 10, drawn with seed 5)"
    both = corpus.train + corpus.validation
    assert sorted(both) == read_table(Path(data), PAIR) != both
    assert corpus.train == sorted(corpus.train) and corpus.validation == sorted(corpus.validation)
    again, other = open_tables(data, "", PAIR, 5), open_tables(data, "", PAIR, 6)
    assert again == corpus and other.validation != corpus.validation
    assert other.hash != corpus.hash


def test_given_files_are_taken_whole():
    corpus = open_tables(table("t.csv", 3), table("v.csv", 4, "!"), PAIR, 5)
    assert [row["b"] for _, row in corpus.validation] == [f"right {i}!" for i in range(4)]
    assert corpus.rule == "3 rows train, 4 validate (the given files)"
    assert [text for text, begins in corpus.pieces("train") if begins] == [
        f"{side} {i}" for i in range(3) for side in ("left", "right")
    ]


def test_the_hash_is_of_what_is_read_and_of_nothing_else():
    one = open_tables(table("t.csv", 9), table("v.csv", 4), PAIR, 5).hash
    lines = "".join(f'{{"b": "right {i}", "n": 1, "a": "left {i}"}}\n' for i in range(9))
    write("same.jsonl.gz", lines)
    assert open_tables("same.jsonl.gz", "v.csv", PAIR, 6).hash == one and len(one) == 64
    assert open_tables("t.csv", table("w.csv", 4, "!"), PAIR, 5).hash != one
    assert open_tables(table("u.csv", 9, "."), "v.csv", PAIR, 5).hash != one
    # What lies on the other side of the division is another division.
    assert open_tables("v.csv", "t.csv", PAIR, 5).hash != one


def test_small_tables():
    assert open_tables(table("two.csv", 2), "", PAIR, 1).rule.startswith("1 rows train, 1 validate")
    assert "(one in 19, drawn" in open_tables(table("t.csv", 19), "", PAIR, 1).rule
    with pytest.raises(ValueError, match=r"one.csv has one row, too few to hold one out: give"):
        open_tables(table("one.csv", 1), "", PAIR, 1)
    assert len(open_tables("one.csv", "two.csv", PAIR, 1).train) == 1
