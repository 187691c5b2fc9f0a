"""data/examples.py: labelled texts in all the forms that files have; what is refused, and how."""

import csv
import gzip
import io
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.examples import open_labelled, read_examples

# Whatever can be in a text, among it line separators that are no line ends, and what CSV quotes.
CHARACTERS = st.sampled_from("ab é数😀,;'\"\t\r\n\u2028\x85\xa0#|\\") | st.characters(
    codec="utf-8", exclude_characters="\0"
)
TEXT = st.text(CHARACTERS, max_size=12).map(lambda text: text + "x")
ROWS = st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=8)
IN_A_FOLDER = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str | bytes) -> Path:
    content = text.encode("utf-8") if isinstance(text, str) else text
    Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return Path(name)


def read(name: str, text: str | bytes) -> list[tuple]:
    return [(*example.texts, example.label) for example in read_examples(write(name, text))]


def collapsed(rows) -> list[tuple]:
    return [tuple(" ".join(cell.split()) for cell in row) for row in rows]


# ---- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["x.csv", "x.CSV.gz"])
@given(rows=ROWS, quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
@IN_A_FOLDER
def test_what_csv_writes_is_read(name, end, rows, quoting):
    # csv alone leaves a "\r" bare where lines end in "\n".
    rows = [[cell.replace("\r", "\n") for cell in row] for row in rows]
    into = io.StringIO(newline="")
    writer = csv.writer(into, lineterminator=end, quoting=quoting)
    writer.writerows([["Label ", "text_B", "text"], *rows])
    got = read(name, b"\xef\xbb\xbf" + into.getvalue().encode())
    assert got == collapsed((text, text_b, label) for label, text_b, text in rows)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@given(rows=ROWS)
@IN_A_FOLDER
def test_a_tsv_has_no_quotes(end, rows):
    """GLUE's files have lone quotes; read as CSV, one of them swallows hundreds of lines."""
    rows = [[re.sub("[\t\n]", " ", cell) for cell in row] for row in rows]
    lines = "".join("\t".join(row) + end for row in [["text", "text_b", "label"], *rows])
    assert read("x.tsv", lines) == read("x.tsv.gz", lines.removesuffix(end)) == collapsed(rows)


@given(rows=ROWS, ascii=st.booleans())
@IN_A_FOLDER
def test_jsonl_is_read_with_any_white_space(rows, ascii):
    names = ("Text", " text_b", "LABEL")
    objects = [{"id": 3, **dict(zip(names, row, strict=True))} for row in rows]
    lines = "\r\n\n \n".join(json.dumps(x, ensure_ascii=ascii) for x in objects)
    assert read("x.jsonl", "\ufeff" + lines) == read("x.jsonl.gz", lines) == collapsed(rows)


def test_labels_of_any_kind_become_their_text():
    values = ["a", " 1 ", 1, -2, 0.5, True, False, "True", "two  words"]
    lines = "\n".join(json.dumps({"text": "x", "label": value}) for value in values)
    labels = [label for _, label in read("x.jsonl", lines)]
    assert labels == ["a", "1", "1", "-2", "0.5", "true", "false", "True", "two words"]


@pytest.mark.parametrize(
    ("names", "want"),
    [
        ("text,label", "ab"),
        ("LABEL, Sentence", "ba"),
        ("idx,sentence1,sentence2,label", "bcd"),
        ("id,qid1,qid2,question1,question2,is_duplicate", "def"),
        ("gold_label,premise,hypothesis", "bca"),
        ("index,question,sentence,label", "bcd"),  # QNLI: the question first, though "sentence"
        ("label,passage,question", "cba"),
        ("question,class", "ab"),
        ("review,sentiment", "ab"),
        ("text,question,label", "ac"),
        (",text,label,label_text", "bc"),  # as pandas numbers rows
    ],
)
def test_columns_are_found_by_name(names, want):
    cells = "abcdef"[: names.count(",") + 1]
    assert read("x.csv", f"\n{names}\n\n{','.join(cells)}\n") == [tuple(want)]
    assert read("x.tsv", f"{names}\n{','.join(cells)}".replace(",", "\t")) == [tuple(want)]


def test_without_names_the_label_is_last():
    assert read("x.tsv", "b\t1\n\na\t1\na \t0") == [("b", "1"), ("a", "1"), ("a", "0")]
    assert read("x.csv", 'a,b,1\n"c, ""d""", e,1') == [("a", "b", "1"), ('c, "d"', "e", "1")]
    assert read("x.csv", 'a, "b ",1\na "c",d,1') == [("a", "b", "1"), ('a "c"', "d", "1")]
    # "question" is a label here, and no name: a line of names has both kinds.
    assert read("x.tsv", "who\tquestion\nwhat\tquestion\n") == [
        ("who", "question"),
        ("what", "question"),
    ]
    assert read("x.tsv", "yes\tok\nno\tbad\n") == [("yes", "ok"), ("no", "bad")]


def test_sst2_is_read_as_it_is_published():
    corpus = open_labelled(str(shared("sst2/train.tsv")), valid=str(shared("sst2/dev.tsv")))
    train, validation = corpus.splits["train"], corpus.splits["validation"]
    assert (len(train), len(validation), corpus.labels) == (6920, 872, ("0", "1"))
    assert Counter(x.label for x in train) == {"0": 3310, "1": 3610}
    last = shared("sst2/train.tsv").read_text(encoding="utf-8").rpartition("\n")[2]
    assert train[-1].texts == (last.removesuffix("\t1"),) and train[-1].line == 6920


# ---- what is refused -----------------------------------------------------------------------------

TWO = "text\tlabel\na b\t1\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.tsv", TWO + "c\td\t0\n", r"x.tsv, line 3: 3 columns where line 1 has 2: c d 0$"),
        ("x.tsv", "a\t1\n\nb\n", r"line 3: 1 columns where line 1 has 2: b$"),
        ("x.csv", 'text,label\n"a\nb",1\n\n"c\nd"\n', r"x.csv, line 5: 1 col.* line 1 has 2: \"c$"),
        ("x.csv", 'text,label\na,1\n"b,0\nc,1\n', r"line 3: what begins here is no CSV .*: \"b,0$"),
        ("x.csv", 'text,label\n"a" b,1\n', r"line 2: what begins here is no CSV .*: \"a\" b,1$"),
        ("x.csv", "text,label\ra,1\rb,1", r"line 1: what begins here is no CSV \(new-line"),
        ("x.csv", "text,label\na,1\n" + "b" * 200_000 + ",1", r"3: .*limit.*: b{60}$"),
        ("x.tsv", TWO + " \t1\n", r"line 3: its text is empty: 1$"),
        ("x.tsv", TWO + "c\t\n", r"line 3: its label is empty: c$"),
        ("x.csv", "premise,hypothesis,label\na,,1\n", r"line 2: its hypothesis is empty: a,,1$"),
        ("x.tsv", "a\tb\tc\td\n", r"line 1: 4 columns, and no names .*text_b and label: a b c d$"),
        ("x.csv", "a;1\nb;0\n", r"line 1: 1 column, and no names"),
        ("x.tsv", "index\tsentence\n0\ta\n1\tb\n", r"line 1: its label 'sentence' comes nowhere"),
        ("x.tsv", "news\ttopic\na\t1\nb\t0\n", r"line 1: its label 'topic' comes nowhere .*topic$"),
        ("x.tsv", "1\ta\n0\tb\n1\tc\n", r"line 1: the first column has 2 different .* last 3, as"),
        ("x.csv", "3,a,b\n4,a,c\n3,d,e", r"first column has 2 .* last 3.*order of the file: 3,a,b"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"a": \n', r'line 2: it is no JSON object: {"a":$'),
        ("x.jsonl", "[1]\n", r"line 1: it is no JSON object: \[1\]$"),
        ("x.jsonl", "[" * 100_000, r"line 1: it is no JSON object: \[{60}$"),
        ("x.jsonl", '{"text": "a"}', r"line 1: it has no text and label, or no known names"),
        ("x.jsonl", '{"text": "a", "label": null}', r"line 1: its label is null, which is no text"),
        (
            "x.jsonl",
            '{"text": ["a"], "label": 1}',
            r'line 1: its text is \["a"\], which is no text',
        ),
        (
            "x.jsonl",
            '{"text": "a", "label": 1}\n\n{"text": "a", "text_b": "b", "label": 1}',
            r"line 3: it has text, text_b, label where the others have text, label: {",
        ),
        ("x.tsv", "", r"x.tsv has no example in it"),
        ("x.csv", "\n \n", r"x.csv has no example in it"),
        ("x.tsv", "text\tlabel\n", r"x.tsv has no example in it"),
        ("x.tsv", b"\xff\t1\n", r"x.tsv is not UTF-8 in line 1"),
        ("x.tsv", b"a\x00\t1\n", r"x.tsv is binary"),
        ("x.txt", "a\t1\n", r"x.txt is no .csv, .tsv or .jsonl"),
        ("x.tsv.zip", "a\t1\n", r"x.tsv.zip is no .csv, .tsv or .jsonl"),
    ],
)
def test_what_is_broken_is_told_with_its_line(name, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read(name, text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_file_that_is_not_there_is_told():
    for name in ("no.tsv", "."):
        with pytest.raises(ValueError, match=r"no \.csv, .tsv or .jsonl|no.tsv is no file here"):
            read_examples(Path(name))
    write("x.tsv.gz", TWO)
    Path("x.tsv.gz").write_bytes(Path("x.tsv.gz").read_bytes()[:20])
    with pytest.raises(ValueError, match="no intact gzip"):
        read_examples(Path("x.tsv.gz"))


# ---- splits and labels ---------------------------------------------------------------------------


def lines(counts: dict[str, int]) -> str:
    rows = [f"{label} text {i}\t{label}" for label, n in counts.items() for i in range(n)]
    return "text\tlabel\n" + "\n".join(rows)


@given(st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 45), min_size=2))
@IN_A_FOLDER
def test_one_in_ten_of_each_label_is_held_out(counts):
    if max(counts.values()) == 1:
        counts["a"] = 2
    corpus = open_labelled(str(write("x.tsv", lines(counts))))
    train, validation = (corpus.splits[split] for split in ("train", "validation"))
    held = Counter(x.label for x in validation)
    assert held == {k: max(1, n // 10) for k, n in counts.items() if n > 1}
    assert sorted(train + validation) == read_examples(Path("x.tsv"))  # none lost, none twice
    assert train == sorted(train) and validation == sorted(validation)
    numbers = f"{len(train)} examples train, {len(validation)} validate (one in 10 of each label"
    assert corpus.rule.startswith(numbers) and corpus.labels == tuple(sorted(counts))


def test_what_is_held_out_is_drawn_from_all_of_a_label_and_always_the_same():
    corpus = open_labelled(str(write("x.tsv", lines({"a": 300, "b": 200}))))
    places = [x.line - 2 for x in corpus.splits["validation"]]
    assert places == [x.line - 2 for x in open_labelled("x.tsv").splits["validation"]]
    gaps = {b - a for a, b in pairwise(places)}
    assert len(gaps) > 8  # not every tenth: what was collected together often lies so
    assert min(Counter(place // 100 for place in places).values()) >= 4


@pytest.mark.parametrize(
    ("spellings", "want"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["1", "01", "0"], ("0", "01", "1")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["1.5", "10", "9"], ("1.5", "10", "9")),
        (["b", "B", "ä", "a"], ("B", "a", "b", "ä")),
    ],
)
def test_labels_are_in_the_order_of_numbers_or_of_spelling(spellings, want):
    assert open_labelled(str(write("x.tsv", lines(dict.fromkeys(spellings, 3))))).labels == want


def test_labels_of_a_checkpoint_are_kept_and_others_refused():
    write("x.tsv", lines({"a": 3, "b": 3}))
    assert open_labelled("x.tsv", labels=["c", "b", "a"]).labels == ("c", "b", "a")
    with pytest.raises(ValueError, match=r"x.tsv, line 5: the label 'b' is none of the checkpoint"):
        open_labelled("x.tsv", labels=["a", "c"])
    # A first line without names may well have a label that comes once, where it is known.
    write("v.tsv", "v w\tc\nx\ta\ny\tb")
    found = open_labelled("x.tsv", valid="v.tsv", labels=["c", "b", "a"]).splits["validation"]
    assert [x.label for x in found] == ["c", "a", "b"]
    for text in ("v w\tb\nx\ta\ny\ta", "x\ta\nx\tb"):  # one text with two labels is no label
        validation = open_labelled("x.tsv", valid=str(write("v.tsv", text))).splits["validation"]
        assert len(validation) == text.count("\t")


def test_given_files_validate():
    write("x.tsv", lines({"a": 30, "b": 1}))
    write("v.jsonl", '{"text": "c", "label": "a"}')
    corpus = open_labelled("x.tsv", valid="v.jsonl")
    assert [len(x) for x in corpus.splits.values()] == [31, 1]
    assert corpus.rule == "31 examples train, 1 validate (the given files)"


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [
        ({"a": 5}, None, "all examples of x.tsv have the label a: "),
        ({"a": 1, "b": 1}, None, "no label of x.tsv comes twice, none can be held out: give --v"),
        (
            {"a": 5, "b": 5},
            "a\ta\nb\tc",
            r"v.tsv, line 2: the label 'c' is none of those of x.tsv \(a, b\): ",
        ),
        (dict.fromkeys("abcdefghijkl", 2), "a\ta\nb\tz", r"\(a, b, c, d, e, f, g, h, i, j, …\)"),
        ({"a": 5, "b": 5}, "q\tr\ta", "x.tsv has 1 and v.tsv 2 texts for a label: give both"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(train, valid, message):
    write("x.tsv", lines(train))
    with pytest.raises(ValueError, match=message):
        open_labelled("x.tsv", valid=str(write("v.tsv", valid)) if valid else "")


def test_the_hash_is_of_contents_division_and_labels():
    text = lines({"a": 20, "b": 20})
    want = open_labelled(str(write("x.tsv", text))).hash
    same = ["x.tsv", "y.tsv.gz"]
    assert all(open_labelled(str(write(name, text))).hash == want for name in same)
    assert open_labelled(str(write("x.tsv", text.replace("\n", "\r\n")))).hash == want
    assert open_labelled("x.tsv", labels=["a", "b"]).hash == want
    others = [
        open_labelled("x.tsv", labels=["b", "a"]),
        open_labelled("x.tsv", valid="x.tsv"),
        open_labelled(str(write("x.tsv", text.replace("a text 7", "a text 77")))),
        open_labelled(str(write("x.tsv", text + "\na\tb"))),
        open_labelled(str(write("x.tsv", text.replace("b text 7\tb", "b text 7\ta")))),
    ]
    assert len({want, *(corpus.hash for corpus in others)}) == 6
    # What is text and what is text_b makes a difference too.
    pairs = ["text\ttext_b\tlabel\n" + "p q\tr\ta\ns\tt\tb\n" * 2, None]
    pairs[1] = pairs[0].replace("p q\tr", "p\tq r")
    one, two = (open_labelled(str(write("p.tsv", p)), valid="p.tsv") for p in pairs)
    assert one.hash != two.hash and re.fullmatch("[0-9a-f]{64}", one.hash)


def test_prompts_are_of_every_label_and_pieces_are_all_texts_of_training():
    corpus = open_labelled(str(write("x.tsv", lines({"a": 90, "b": 40, "c": 1, "d": 10}))))
    assert [p[0] for p in corpus.prompts] == ["a", "b", "d", "a"]
    assert set(corpus.prompts) <= {x.texts[0] for x in corpus.splits["validation"]}
    write("p.tsv", "text\ttext_b\tlabel\np  q\tr\ta\ns\tt\tb\n")
    corpus = open_labelled("p.tsv", valid="p.tsv")
    assert corpus.prompts == ["p q\tr", "s\tt"] and corpus.name == "p"
    assert list(corpus.pieces("train")) == [(f" {x}", True) for x in ("p q", "r", "s", "t")]
