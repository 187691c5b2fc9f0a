"""data/tables.py: .csv, .tsv and .jsonl -> rows; errors give a broken line's number and content."""

import csv
import gzip
import io
import json
import re
from pathlib import Path

import pytest
from conftest import shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.tables import Row, open_tables, read_table

PAIR = [("a", "b"), ("text", "text_b"), ("sentence1", "text_b")]
LABELLED = [("text", "text_b", "label"), ("text", "label"), ("text", "class")]
# Whatever can be in a text, among it line separators that are no line ends, and what CSV quotes.
CHARACTERS = st.sampled_from("ab é数😀,;'\"\t\r\n\u2028\x85\xa0#|\\") | st.characters(
    codec="utf-8", exclude_characters="\0"
)
TEXT = st.text(CHARACTERS, max_size=12).map(lambda text: text + "x")
ROWS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8)
IN_A_FOLDER = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str | bytes) -> Path:
    content = text if isinstance(text, bytes) else text.encode("utf-8")
    path = Path(name)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def read(name: str, text: str | bytes, forms=PAIR, **more) -> list[tuple]:
    return read_table(write(name, text), forms, **more).rows


def texts(name: str, text: str | bytes, forms=PAIR, **more) -> list[tuple]:
    return [row.texts for row in read(name, text, forms, **more)]


def collapsed(rows: list[tuple]) -> list[tuple]:
    return [tuple(" ".join(cell.split()) for cell in row) for row in rows]


# ---- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("header", [True, False])
def test_three_formats_say_the_same(gz, end, mark, header):
    want = [("to be", "x, y"), ('a "quote"', " 42 ")]
    lines = {
        ".csv": ["a,b"] * header + ['to be,"x, y"', '"a ""quote""", 42 '],
        ".tsv": ["a\tb"] * header + ["to be\tx, y", 'a "quote"\t 42 '],
        ".jsonl": [json.dumps(dict(zip("ab", row, strict=True))) for row in want],
    }
    for kind, rows in lines.items():
        # The last line may have no end; a blank one is skipped and yet counted.
        table = read_table(write(f"t{kind}{gz}", mark + end.join([*rows[:-1], "", rows[-1]])), PAIR)
        last = len(rows) + 1
        assert table.rows == [(last - 2, want[0]), (last, want[1])]
        assert table.named == (header or kind == ".jsonl")


@pytest.mark.parametrize("collapse", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["x.csv", "x.CSV.gz"])
@given(rows=ROWS, quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
@IN_A_FOLDER
def test_what_csv_writes_is_read(name, end, collapse, rows, quoting):
    # csv alone leaves a "\r" bare where lines end in "\n".
    rows = [tuple(cell.replace("\r", "\n") for cell in row) for row in rows]
    into = io.StringIO(newline="")
    writer = csv.writer(into, lineterminator=end, quoting=quoting)
    writer.writerows([["B ", "A"], *((b, a) for a, b in rows)])
    got = texts(name, b"\xef\xbb\xbf" + into.getvalue().encode(), collapse=collapse)
    assert got == (collapsed(rows) if collapse else rows)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@given(rows=ROWS)
@IN_A_FOLDER
def test_a_tsv_has_no_quotes_and_other_separators_are_text(end, rows):
    """GLUE's files have lone quotes; read as CSV, one of them swallows hundreds of lines."""
    rows = [tuple(re.sub("[\t\n]", " ", cell) for cell in row) for row in rows]
    lines = "".join("\t".join(row) + end for row in [["a", "b"], *rows])
    assert texts("x.tsv", lines) == texts("x.tsv.gz", lines.removesuffix(end)) == rows
    assert texts("x.tsv", lines, collapse=True) == collapsed(rows)


@given(rows=ROWS, ascii=st.booleans())
@IN_A_FOLDER
def test_jsonl_is_read_with_any_white_space(rows, ascii):
    objects = [{"id": 3, " Text": a, "TEXT_B": b} for a, b in rows]
    lines = "\r\n\n \n".join(json.dumps(x, ensure_ascii=ascii) for x in objects)
    assert texts("x.jsonl", "\ufeff" + lines) == texts("x.jsonl.gz", lines) == rows
    assert texts("x.jsonl", lines, collapse=True) == collapsed(rows)


def test_columns_are_found_by_name_in_any_order_and_others_ignored():
    want = [(2, ("x", "y"))]
    assert read("t.csv", "id, TEXT_B ,sentence1\n1,y,x\n") == want
    assert read("T.CSV", "b,a\ny,x\n") == want  # a file's name may be in capitals
    assert read("t.tsv", "Text\tscore\tTEXT_B\nx\t0.5\ty\n") == want
    assert read("t.tsv", "\t\ta\tb\n1\t\tx\ty\n") == want  # names that nobody asks for may be equal
    assert read("t.jsonl", '\n{"score": null, "B": "y", "A": "x"}\n') == want
    # Of several forms the first counts that is there as a whole.
    assert texts("t.csv", "sentence1,text,text_b,b\n1,2,3,4\n") == [("2", "3")]
    assert texts("t.csv", "text,class,label\n1,2,3\n", LABELLED) == [("1", "3")]


def test_without_names_the_columns_are_those_of_the_first_form_of_as_many():
    assert texts("t.tsv", "x\t1\n", LABELLED) == [("x", "1")]
    assert texts("t.tsv", "x\ty\t1\n", LABELLED) == [("x", "y", "1")]
    with pytest.raises(ValueError, match=r"line 1: its text_b is empty"):
        read("t.tsv", "x\t\t1\n", LABELLED)


def test_what_json_has_beside_text_is_read_as_it_is_written():
    lines = ['{"text": 1, "label": -2.50}', '{"text": 1e999, "label": true}']
    lines += ['{"text": "x", "label": false}', f'{{"text": "x", "label": {"9" * 5000}}}']
    want = [("1", "-2.50"), ("1e999", "true"), ("x", "false"), ("x", "9" * 5000)]
    assert texts("t.jsonl", "\n".join(lines), LABELLED) == want


def test_line_ends_inside_quotes_belong_to_the_cell_and_the_next_line_is_known():
    text = 'a,b\r\n"one\r\ntwo",x\r\n\r\n"three\n\nfour",y\r\n"",z\r\n'
    rows = read("t.csv", text, blank=("a",))
    assert [row.line for row in rows] == [2, 5, 8]
    assert [row.texts[0] for row in rows] == ["one\r\ntwo", "three\n\nfour", ""]


def test_a_cell_may_be_long():
    """The csv module stops at 131,072 characters, unless it is told otherwise."""
    rows = [("x" * 200_000, "a"), ("y, " * 100_000 + "z", "b")]
    text = "text,label\n" + "".join(f'"{one}",{two}\n' for one, two in rows)
    table = read_table(write("long.csv", text), [("text", "label")])
    assert [row.texts for row in table.rows] == rows


def test_rows_of_empty_cells_are_skipped():
    """Spreadsheets write such rows below a table."""
    assert read("t.csv", "\n,\na,b\n,\nx,y\n , \n,\n") == [(5, ("x", "y"))]
    assert read("t.tsv", "\t\nx\ty\n \t\t\n", blank=("a", "b")) == [(2, ("x", "y"))]


def test_where_white_space_counts_a_quote_behind_it_is_text():
    text = 'x, "y ",1\nx "y",z,2\n'
    assert texts("t.csv", text, LABELLED, collapse=True) == [("x", "y", "1"), ('x "y"', "z", "2")]
    assert texts("t.csv", text, LABELLED) == [("x", ' "y "', "1"), ('x "y"', "z", "2")]


def test_real_rows():
    table = read_table(shared("sst2/dev.tsv"), LABELLED)
    assert len(table.rows) == 872 and {texts[-1] for _, texts in table.rows} == {"0", "1"}
    assert all(len(texts) == 2 for _, texts in table.rows) and not table.named


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "x", "t.txt is no .csv, .tsv or .jsonl (each also as .gz): convert it"),
        ("t.tsv.zip", "x\ty", "t.tsv.zip is no .csv, .tsv or .jsonl"),
        ("t.csv", "", "t.csv has no rows: give a table"),
        ("t.jsonl", "\n \n", "t.jsonl has no rows: give a table"),
        ("t.csv", "a,b\n\n", "t.csv has no rows: give a table"),
        ("t.csv", "a,b\n1,2\n\n3\n", "t.csv, line 4: 1 column where line 1 has 2: 3"),
        ("t.csv", "\n1,2\n3,4,5\n", "t.csv, line 3: 3 columns where line 2 has 2: 3,4,5"),
        ("t.tsv", "1\t2\n3 4\n", "t.tsv, line 2: 1 column where line 1 has 2: 3 4"),
        ("t.csv", 'a,b\n"a\nb",1\n\n"c\nd"\n', 't.csv, line 5: 1 column where line 1 has 2: "c'),
        ("t.csv", "1,2,3\n", "t.csv, line 1: 3 columns, and no known names: name the columns in a "
         "first line (a, b): 1,2,3"),
        ("t.csv", "a,b,A\n1,2,3\n", 't.csv, line 1: "a" is the name of two columns: a,b,A'),
        ("t.csv", 'a,b\n"1\n2",3\n"x"y,4\n', "t.csv, line 4: what begins here is no CSV ("),
        ("t.csv", 'a,b\n1,2\n3,"4\n5,6\n', "t.csv, line 3: what begins here is no CSV (unexpected"),
        ("t.csv", "a,b\r1,2\r3,4\r", r"t.csv has old Mac line ends, \r alone: convert them first"),
        ("t.tsv", "a\tb\r1\t2", r"t.tsv has old Mac line ends, \r alone: convert them first"),
        ("t.csv", "a;b\n1;2\n", "t.csv, line 1: its columns are divided by ';' where commas are "
         "needed: export the table once more, with commas: a;b"),
        ("t.csv", '"text";"text_b"\n1;2\n', "t.csv, line 1: its columns are divided by ';'"),
        ("t.csv", "id;a;b\n1;2;3, 4\n", "t.csv, line 1: its columns are divided by ';'"),
        ("t.csv", "x;y\n1;2\n", "t.csv, line 1: its columns are divided by ';'"),
        ("t.csv", "a|b\n1|2\n", "t.csv, line 1: its columns are divided by '|'"),
        ("t.csv", "a\tb\n1\t2\n", "t.csv, line 1: its columns are divided by tabs: call it .tsv"),
        ("t.tsv", "a,b\n1,2\n", "t.tsv, line 1: its columns are divided by commas: call it .csv"),
        ("t.csv", "a,b\n1,\n", "t.csv, line 2: its b is empty: 1,"),
        ("t.tsv", "a\tb\n \t1\n", "t.tsv, line 2: its a is empty: 1"),
        ("t.jsonl", "\n[1]\n", "t.jsonl, line 2: it is no JSON object but an array: write one "
         "object on each line (for example with jq -c '.[]'): [1]"),
        ("t.jsonl", '{"a": "1"', 't.jsonl, line 1: it is no JSON object: {"a": "1"'),
        ("t.jsonl", "[" * 99_999, "t.jsonl, line 1: it is no JSON object but an array"),
        ("t.jsonl", '{"b": "1"}', "t.jsonl, line 1: it has no a and b, or no known names"),
        ("t.jsonl", '{"a": "1", "b": "2"}\n{"text": "1", "text_b": "2"}', "t.jsonl, line 2: it has "
         "text, text_b where the others have a, b: {"),
        ("t.jsonl", '{"a": "1", "b": null}', 't.jsonl, line 1: its b is null, which is no text: {'),
        ("t.jsonl", '{"a": "1", "b": NaN}', "t.jsonl, line 1: its b is NaN, which is no text: {"),
        ("t.jsonl", '{"a": ["x"], "b": "1"}', 't.jsonl, line 1: its a is ["x"], which is no text'),
        ("t.jsonl", '{"a": " ", "b": "x"}', 't.jsonl, line 1: its a is empty: {"a"'),
        ("t.tsv", b"a\tb\n1\t2\n\xe9\t3\n", "t.tsv is not UTF-8 in line 3"),
        ("t.tsv", b"a\x00\tb\n", "t.tsv is binary"),
    ],
)  # fmt: skip
def test_broken_tables(name, text, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        read(name, text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 180


def test_a_missing_or_broken_file():
    for name in ("no such.csv", "folder.csv"):
        Path("folder.csv").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=rf"{name} is no file here: give"):
            read_table(Path(name), PAIR)
    write("x.tsv.gz", "a\tb\n")
    Path("x.tsv.gz").write_bytes(Path("x.tsv.gz").read_bytes()[:20])
    with pytest.raises(ValueError, match="no intact gzip"):
        read_table(Path("x.tsv.gz"), PAIR)


def test_a_first_line_with_some_of_the_names_is_no_row():
    for text in ("A,x\n1,2\n", "x,text_b\n1,2\n"):
        with pytest.raises(
            ValueError, match=r"t.csv, line 1: this looks like names, and \"(a|text_b)"
        ):
            open_tables(str(write("t.csv", text)), "", PAIR)
        with pytest.raises(ValueError, match=r"others are missing: name .* \(a, b\): "):
            open_tables(table("good.csv", 3), "t.csv", PAIR)
    # A .jsonl has names: what it says under them is text.
    write("t.jsonl", '{"a": "a", "b": "text"}\n' * 2)
    assert open_tables("t.jsonl", "", PAIR).splits["train"] == [Row(2, ("a", "text"))]


# ---- two splits ----------------------------------------------------------------------------------


def table(name: str, n: int, more: str = "") -> str:
    write(name, "a,b\n" + "".join(f"left {i},right {i}{more}\n" for i in range(n)))
    return name


def test_one_row_in_ten_is_held_out():
    data = table("x.y.csv", 73)
    corpus = open_tables(data, "", PAIR)
    train, validation = corpus.splits["train"], corpus.splits["validation"]
    assert (len(train), len(validation), corpus.name) == (66, 7, "x")
    assert corpus.rule == "7 of 73 rows, drawn with a fixed seed, validate"
    assert sorted(train + validation) == read_table(Path(data), PAIR).rows != train + validation
    assert open_tables(data, "", PAIR) == corpus
    with pytest.raises(ValueError, match=r"one.csv has one row, too few to hold one out: give"):
        open_tables(table("one.csv", 1), "", PAIR)
    assert len(open_tables("one.csv", data, PAIR).splits["train"]) == 1


def test_given_files_are_taken_whole():
    corpus = open_tables(table("t.csv", 3), table("v.csv", 4, "!"), PAIR)
    assert [row.texts[1] for row in corpus.splits["validation"]] == [
        f"right {i}!" for i in range(4)
    ]
    assert corpus.rule == "3 rows train, 4 validate (the given files)"
    assert [text for text, begins in corpus.pieces("train") if begins] == [
        f"{side} {i}" for i in range(3) for side in ("left", "right")
    ]


def test_the_hash_is_of_what_is_read_and_of_nothing_else():
    one = open_tables(table("t.csv", 9), table("v.csv", 4), PAIR).hash
    lines = "".join(f'{{"b": "right {i}", "n": 1, "a": "left {i}"}}\n' for i in range(9))
    write("same.jsonl.gz", lines)
    assert open_tables("same.jsonl.gz", "v.csv", PAIR).hash == one and len(one) == 64
    assert open_tables("t.csv", table("w.csv", 4, "!"), PAIR).hash != one
    assert open_tables(table("u.csv", 9, "."), "v.csv", PAIR).hash != one
    # What lies on the other side of the division, or in the other column, is another table.
    assert open_tables("v.csv", "t.csv", PAIR).hash != one
    write("swapped.csv", Path("t.csv").read_text(encoding="utf-8").replace("a,b", "b,a"))
    assert open_tables("swapped.csv", "v.csv", PAIR).hash != one
