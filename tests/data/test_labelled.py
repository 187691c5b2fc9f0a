"""data/labelled.py: which columns are texts and labels, what is refused, and the two splits."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.labelled import open_labelled, read_examples

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


# ---- columns -------------------------------------------------------------------------------------


def test_labels_of_any_kind_become_their_text():
    values = ["a", " 1 ", 1, -2, 0.5, True, False, "True", "two \n words"]
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


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.tsv", "a\tb\tc\td\n", r"line 1: 4 columns, and no known .*text_b, label\): a b c d$"),
        (
            "x.csv",
            "a;1\nb;0\n",
            r"line 1: its columns are divided by ';' where commas are needed: export",
        ),
        ("x.tsv", "index\tsentence\n0\ta\n1\tb\n", r"line 1: its label 'sentence' comes nowhere"),
        ("x.tsv", "news\ttopic\na\t1\nb\t0\n", r"line 1: its label 'topic' comes nowhere .*topic$"),
        ("x.tsv", "1\ta\n0\tb\n1\tc\n", r"line 1: the first column has 2 different .* last 3, as"),
        ("x.csv", "3,a,b\n4,a,c\n3,d,e", r"first column has 2 .* last 3.*order of the file: 3,a,b"),
        ("x.tsv", "text\tlabel\na\t1\nb\t\n", r"x.tsv, line 3: its label is empty: b$"),
        ("x.jsonl", '{"text": "a"}', r"line 1: it has no text and label, or no known names"),
        (
            "x.jsonl",
            '{"text": "a", "label": 1}\n\n{"text": "a", "text_b": "b", "label": 1}',
            r"line 3: it has text, text_b, label where the others have text, label: {",
        ),
    ],
)
def test_what_is_no_text_with_a_label_is_told_with_its_line(name, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read(name, text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


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
    numbers = f"{len(train)} examples train, {len(validation)} validate (one in 10 of each label"
    assert corpus.rule.startswith(numbers) and corpus.labels == tuple(sorted(counts))
    assert corpus.rule.endswith(", drawn with a fixed seed)")


def test_one_number_is_one_label(tmp_path, monkeypatch):
    """1, 1.0 and "1" were two classes: pandas writes whole numbers as 1.0 beside an empty cell."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"t{i}", "label": x} for i, x in enumerate((1, "1", 1.0, 0, "0.0", "0") * 2)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Path("a.jsonl").write_text(lines, encoding="utf-8")
    Path("floats.csv").write_text("text,label\na,1.0\nb,0.0\n", encoding="utf-8")
    corpus = open_labelled("a.jsonl", valid="floats.csv")
    assert corpus.labels == ("0", "1")
    assert [x.label for x in corpus.splits["train"]] == ["1", "1", "1", "0", "0", "0"] * 2
    assert [x.label for x in corpus.splits["validation"]] == ["1", "0"]
    corpus = open_labelled("a.jsonl", valid="a.jsonl", labels=("1.0", "0.0"))  # a checkpoint's
    assert {x.label for x in corpus.splits["train"]} == {"1.0", "0.0"}
    assert open_labelled("floats.csv", valid="floats.csv").labels == ("0.0", "1.0")
    Path("b.csv").write_text("text,label\na,1.5\nb,1.50\nc,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"the labels '1\.5' and '1\.50', which are one number"):
        open_labelled("b.csv", valid="floats.csv")


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
