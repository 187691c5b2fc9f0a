"""data/layouts.py: where sentences, paragraphs and documents end, and which layout a file has."""

import gzip
import json
from pathlib import Path

import pytest
from conftest import shared
from test_sentences import (
    WIKITEXT,
    WORDS,
    WRAPPED,
    documents,
    everything,
    in_lines,
    numbered,
    opened,
)

import data.layouts
import data.text
from data.layouts import layout_of, split_sentences
from data.sentences import open_sentences

# ---- the splitter --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sentences",
    [
        ["It rains.", "Does it?", "Yes!", "Well…", "Maybe."],
        ['He said "Stop."', "Then he left."],
        ["“Who?” she asked.", "“Me.”", "(Nobody laughed.)", "[Silence.]", "«Bien.»", "¿Qué?"],
        ["Mr. Smith met Dr. Jones vs. St. Peter, e.g. Paul, i.e. Mary.", "They left."],
        ["It was 4 A. M. when J. R. R. Tolkien joined the U.S. Navy.", "So did I.", "He too."],
        ["1. Read this.", "2. Go on.", "(3. Stop.)", "B. Go on."],
        ["a. Read this.", "It is short."],
        ["It costs 3.50 now.", "20 people paid.", "In 1984.", "Then Python 3.12 came."],
        ["See No. 5 there.", "No.", "It is Fig. 2 of vol. 3."],
        ["It has apples, pears, etc.", "The end."],
        ["Apples etc. were sold.", "They use python.org and os.path."],
        ["今天下雨。", "我在家！", "你呢？", "「好。」", "走了"],
        ["Он ушёл.", "Она осталась."],
        ["नमस्ते दुनिया.", "भारत महान है."],  # letters without case begin a sentence
        ['" It is , " he said .', '" But why ? "', "Then H. americanus left ."],  # tokenized
        ['" Go ! " he said .', "The game costs 3 @.@ 50 dollars ."],
        ["He left... she stayed.", "Why?! - no reason.", "Wait . , she said ..."],
        ["no mark at the end"],
        ["x" * 5000 + " y" * 5000],
        [],
    ],
)
def test_sentences_end_where_the_rule_says(sentences):
    text = " ".join(sentences)
    if any("\u3000" < c < "\ua000" for c in text):
        assert split_sentences("".join(sentences)) == sentences
    assert split_sentences(text) == sentences
    assert split_sentences("\n \t " + text.replace(" ", " \r\n") + "\u2028") == sentences


def test_what_the_splitter_cannot_know():
    assert len(split_sentences("He lives in the U.S. She lives here.")) == 1
    assert len(split_sentences("It works. iPhones do too.")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("text", [".", ". ", "A. ", '." ', "(. ", "。", "a.", '" . ', "\n"])
def test_a_million_equal_characters_do_not_hang(text):
    """A row of dots once took more than ten minutes, as each dot began a search of its own."""
    found = split_sentences(text * (1_000_000 // len(text)))
    assert all(s and s == s.strip() for s in found)


# ---- layouts -------------------------------------------------------------------------------------

PARAGRAPHS = "\n".join(" ".join(f"{c} walked to the river. It was cold." for c in WORDS) + " Why?"
                       for _ in range(5))  # fmt: skip


@pytest.mark.parametrize(
    "text,layout",
    [
        (in_lines(numbered(3)), "lines"),
        ("One sentence here.\nAnother one there!\n", "lines"),
        ('One ( 1 ) of them .\n\nHe said : " no " .\n', "lines"),
        ("今天下雨。\n我在家！\n", "lines"),
        ("A title\nOne.\nTwo.\nThree.\nFour.\n", "lines"),  # 80% end like a sentence
        ("A title\nOne.\nTwo.\nThree.\n", "prose"),  # 75%
        ("One. Two.\nThree.\nFour.\nFive.\nSix.\n", "lines"),  # 1.2 sentences a line
        ("One. Two.\nThree.\nFour.\nFive.\n", "prose"),  # 1.25
        (WRAPPED, "prose"),
        (PARAGRAPHS, "prose"),
        ("words without any mark\n" * 9, "prose"),
        (WIKITEXT, "wikitext"),
        (" = = Section = = \n A word . \n", "prose"),  # no title
        ("x = y =\n= = Half =\n= Half = =\n", "prose"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.md.gz", "a.jsonl"])
def test_the_layout_is_found(tmp_path, text, layout, name):
    raw = text.encode()
    if name == "a.jsonl":
        raw = json.dumps({"text": text}).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert layout_of(tmp_path / name) == layout


def test_only_the_first_64_kb_decide(tmp_path):
    prose = "word word\n" * 6554
    (tmp_path / "a.txt").write_text(prose + " = Title =\n", encoding="utf-8")
    assert layout_of(tmp_path / "a.txt") == "prose"
    (tmp_path / "a.txt").write_text(prose[:-20] + " = Title =\n", encoding="utf-8")
    assert layout_of(tmp_path / "a.txt") == "wikitext"


def test_lines(tmp_path):
    text = "\n\nOne  sentence.\r\nA second. Not divided\n \n\n\nThird\n"
    corpus = opened(tmp_path, text, layout="lines")
    assert everything(corpus) == [["One sentence.", "A second. Not divided"], ["Third"]]
    assert corpus.rule == (
        "a sentence a line, a blank line between documents; the last one of 2 documents validates"
    )


def test_prose(tmp_path):
    corpus = opened(tmp_path, WRAPPED)
    assert everything(corpus) == [
        [
            "The rain had only ceased with the gray streaks of morning at Blazing Star, and the "
            "settlement awoke to a moral sense of cleanliness.",
            "Indeed, it was recorded that Mr. Cassius had risen early.",
            "This was nearly opposite.",
            "He stopped suddenly.",
        ],
        ["CHAPTER II", "Something glittered in the road."],
        ["It was gold.", "He took it."],
    ]
    assert corpus.rule.startswith("prose, two blank lines between documents; the last one of 3")


def test_long_lines_of_prose_are_paragraphs_of_their_own(tmp_path):
    long = "A heading without a mark is followed by a paragraph, " * 3
    corpus = opened(tmp_path, f"Heading\n{long}\nShort one\nand two\n{long}\n", layout="prose")
    found = [sentence for document in everything(corpus) for sentence in document]
    assert found == ["Heading", long.strip(), "Short one and two", long.strip()]


def test_wikitext(tmp_path):
    corpus = opened(tmp_path, WIKITEXT)
    assert everything(corpus) == [
        ["Homarus gammarus is a lobster .", "It is blue .", "Females hatch eggs .", "They float ."],
        ["More text ."],
    ]


def test_given_layout_goes_before_what_the_text_looks_like(tmp_path):
    text = in_lines(numbered(25))
    assert len(everything(opened(tmp_path, text, layout="lines"))) == 25
    corpus = opened(tmp_path, text, layout="prose")  # single blank lines: one document
    assert len(everything(corpus)[0]) == 68 and len(documents(corpus, "validation")[0]) == 7


def test_shared_texts():
    lines = shared("bert-sample-text.txt")
    assert layout_of(lines) == "lines"
    corpus = open_sentences(str(lines), Path("unused"))
    assert [len(document) for document in everything(corpus)] == [3, 13, 15]
    wiki = shared("wikitext2-valid.txt")
    assert layout_of(wiki) == "wikitext"
    corpus = open_sentences(str(wiki), Path("unused"))
    found = everything(corpus)
    assert len(found) == 60 and len(documents(corpus, "validation")) == 6
    assert found[0][1] == "It is closely related to the American lobster , H. americanus ."
    assert not any(" = " in s and s.startswith("=") for document in found for s in document)
    assert layout_of(shared("shakespeare.txt")) == "prose"


# ---- streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["lines", "prose", "wikitext"])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_small_blocks_give_the_sentences_of_the_undivided_text(
    tmp_path, monkeypatch, layout, block
):
    text = {"lines": in_lines(numbered(30)), "prose": WRAPPED, "wikitext": WIKITEXT}[layout]
    text = (text + "Ünïcödé 今天。 Yes.\n\n\n") * 5
    want = opened(tmp_path, text)
    pieces = [list(want.pieces(split)) for split in want.splits]
    monkeypatch.setattr(data.text, "BLOCK", block)
    corpus = opened(tmp_path, text)
    assert [list(corpus.pieces(split)) for split in corpus.splits] == pieces
    assert corpus.hash == want.hash and corpus.rule == want.rule


def test_nothing_is_held_but_a_paragraph(tmp_path, monkeypatch):
    """Lines without marks and blank lines, such as a log, were once joined as a whole."""
    monkeypatch.setattr(data.layouts, "LONGEST", 1000)
    corpus = opened(tmp_path, "some words\n" * 5000, layout="prose")
    found = [sentence for document in everything(corpus) for sentence in document]
    assert " ".join(found) == ("some words " * 5000).strip()
    assert max(map(len, found)) < 1200
