"""entities.py: tags against a table of their rules, scores by hand, words and marks in a text."""

import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from entities import (
    SCHEMES,
    entities,
    entity_scores,
    entity_scores_by_type,
    marked,
    scheme_of,
    spelled,
    split_tag,
    text_spans,
    to_iob2,
    words_of,
)

TYPES = ("P", "creative-work", "x")
# Two tags of one type: the second ones before which an entity ends and another begins.
BORDERS = {"B": "BSU", "I": "BSU", "E": "BIESLU", "S": "BIESLU", "L": "BIESLU", "U": "BIESLU"}
ROWS = {  # the table at the top of entities.py
    "IOB1": "I-P O I-P I-P B-P I-P O I-L",
    "IOB2": "B-P O B-P I-P B-P I-P O B-L",
    "IOBES": "S-P O B-P E-P B-P E-P O S-L",
    "BILOU": "U-P O B-P L-P B-P L-P O U-L",
}
FOUND = [("P", 0, 1), ("P", 2, 4), ("P", 4, 6), ("L", 7, 8)]

tags = st.sampled_from(["O", "O", *(f"{prefix}-{type_}" for prefix in BORDERS for type_ in TYPES)])
sequences = st.lists(tags, max_size=12)


@st.composite
def sentences(draw, longest: int = 5):
    """(entities, length): apart, or side by side."""
    found, at = [], 0
    for _ in range(draw(st.integers(0, 4))):
        start = at + draw(st.integers(0, 2))
        at = start + draw(st.integers(1, longest))
        found.append((draw(st.sampled_from(TYPES)), start, at))
    return found, at + draw(st.integers(0, 2))


def slow_entities(tags: list[str]) -> list[tuple[str, int, int]]:
    """Every span is tried: no O in it, no border inside, one at either end."""

    def border(i: int) -> bool:  # between the words i - 1 and i
        a, b = (tags[k] if 0 <= k < len(tags) else "O" for k in (i - 1, i))
        if a == "O" or b == "O":
            return True
        return a.split("-", 1)[1] != b.split("-", 1)[1] or b[0] in BORDERS[a[0]]

    return [
        (tags[a].split("-", 1)[1], a, b)
        for a in range(len(tags))
        for b in range(a + 1, len(tags) + 1)
        if "O" not in tags[a:b] and [k for k in range(a, b + 1) if border(k)] == [a, b]
    ]


# ---- tags ----------------------------------------------------------------------------------------


@given(sequences)
@example(["I-P", "I-x", "O", "E-P", "I-P", "S-P", "E-P", "B-P", "E-P", "B-P", "I-P", "E-P", "I-P"])
def test_entities_are_those_of_the_table_of_rules(tags):
    assert entities(tags) == slow_entities(tags)


def test_every_pair_of_tags_by_itself():
    """All 19 · 19 of them, so that none is left to chance."""
    known = ["O", *(f"{prefix}-{type_}" for prefix in BORDERS for type_ in TYPES)]
    for a in known:
        for b in known:
            assert entities([a, b]) == slow_entities([a, b]), (a, b)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_by_hand(scheme):
    row = ROWS[scheme].split()
    assert entities(row) == FOUND and spelled(FOUND, 8, scheme) == row
    assert scheme_of([row]) == scheme and scheme_of([["O"], row, []]) == scheme
    assert to_iob2(row) == ROWS["IOB2"].split()


@given(sentences())
def test_what_a_scheme_writes_is_read_again(sentence):
    found, length = sentence
    for scheme in SCHEMES:
        tags = spelled(found, length, scheme)
        assert (
            len(tags) == length and entities(tags) == found and to_iob2(tags) == spelled(*sentence)
        )
        fitting = scheme_of([tags])
        assert spelled(found, length, fitting) == tags


def test_iob1_has_a_b_only_between_neighbours_of_one_type():
    found = [("x", 0, 2), ("P", 2, 3), ("P", 3, 5), ("P", 6, 7)]
    assert spelled(found, 7, "IOB1") == ["I-x", "I-x", "I-P", "B-P", "I-P", "O", "I-P"]
    # A type that ends like another is another.
    assert spelled([("work", 0, 1), ("k", 1, 2)], 2, "IOB1") == ["I-work", "I-k"]


@given(sequences)
def test_iob2_of_any_mixture_keeps_its_entities(tags):
    once = to_iob2(tags)
    assert entities(once) == entities(tags) and to_iob2(once) == once
    assert [tag == "O" for tag in once] == [tag == "O" for tag in tags]


def test_a_mixture_or_a_mistake_is_no_scheme():
    iob1, iob2, iobes = (ROWS[name].split() for name in ("IOB1", "IOB2", "IOBES"))
    assert scheme_of([iob1, iob2]) == scheme_of([iob2, iobes]) == ""
    assert scheme_of([["B-P", "I-x"]]) == scheme_of([["O", "E-P"]]) == ""
    assert scheme_of([["I-P", "I-P", "O"]]) == "IOB1" and scheme_of([["O"]]) == "IOB2"


@pytest.mark.parametrize("tag", ["", "o", "B", "B-", "-P", "b-P", "BP", "B_P", "M-P", "O-P", " O"])
def test_what_is_no_tag_is_refused(tag):
    with pytest.raises(ValueError, match=f"{re.escape(repr(tag))} is no tag: write O"):
        entities(["O", tag])
    assert split_tag("B-a-b c") == ("B", "a-b c") and split_tag("O") == ("O", "")


# ---- scores --------------------------------------------------------------------------------------


def test_scores_by_hand():
    """Of 4 entities 2 are found, with 5 guesses: a wrong type, a wrong border and an invented one
    do not count."""
    gold = [["B-P", "I-P", "O", "B-x"], ["I-P", "O"], ["B-x", "O", "O"]]
    guess = [["B-P", "I-P", "O", "B-P"], ["S-P", "O"], ["B-x", "I-x", "S-P"]]
    scores = {"precision": 2 / 5, "recall": 2 / 4, "f1": 2 * 0.4 * 0.5 / 0.9}
    assert entity_scores(gold, guess) == pytest.approx(scores)
    assert list(entity_scores(gold, guess)) == ["precision", "recall", "f1"]
    by_type = entity_scores_by_type(gold, guess)
    assert list(by_type) == ["P", "x"]
    assert by_type["P"] == pytest.approx(
        {"precision": 2 / 4, "recall": 1, "f1": 2 / 3, "entities": 2}
    )
    assert by_type["x"] == {"precision": 0, "recall": 0, "f1": 0, "entities": 2}
    assert entity_scores_by_type([["O"]], [["B-z"]])["z"]["entities"] == 0  # only invented


def test_no_entity_spans_two_sentences():
    gold, guess = [["O", "B-P"], ["I-P", "O"]], [["O", "B-P"], ["O", "O"]]
    assert entity_scores(gold, guess) == pytest.approx({"precision": 1, "recall": 0.5, "f1": 2 / 3})


@pytest.mark.parametrize("gold,guess", [(["O"], ["O"]), (["B-P"], ["O"]), (["O"], ["B-P"])])
def test_where_nothing_could_be_right_the_score_is_zero(gold, guess):
    assert set(entity_scores([gold], [guess]).values()) == {0}
    assert entity_scores([], []) == {"precision": 0, "recall": 0, "f1": 0}


@given(st.lists(st.lists(st.tuples(tags, tags), min_size=1, max_size=6), max_size=5))
def test_scores_against_counting_one_by_one(pairs):
    gold, guess = ([[pair[side] for pair in row] for row in pairs] for side in (0, 1))
    right = asked = given = 0
    for a, b in zip(gold, guess, strict=True):
        right += sum(entity in slow_entities(b) for entity in slow_entities(a))
        asked, given = asked + len(slow_entities(a)), given + len(slow_entities(b))
    scores = entity_scores(gold, guess)
    assert scores["precision"] * given == pytest.approx(right)
    assert scores["recall"] * asked == pytest.approx(right)
    p, r = scores["precision"], scores["recall"]
    assert scores["f1"] == pytest.approx(2 * p * r / (p + r) if right else 0)
    by_type = entity_scores_by_type(gold, guess)
    assert sum(scores["entities"] for scores in by_type.values()) == asked
    told = sum(scores["recall"] * scores["entities"] for scores in by_type.values())
    assert told == pytest.approx(right)


def test_tags_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="1 sentences were predicted for 2: give all"):
        entity_scores([["O"], ["O"]], [["O"]])
    with pytest.raises(ValueError, match="sentence 1 has 2 words and 1 predicted tags"):
        entity_scores_by_type([["O"], ["O", "O"]], [["O"], ["O"]])


# ---- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,words",
    [
        ("Barack Obama visited Paris.", "Barack|Obama|visited|Paris|."),
        ('  "Rome," (she\tsaid)...\n', '"|Rome|,|"|(|she|said|)|...'),
        ("Obama's wife, James’s aunt's", "Obama|'s|wife|,|James|’s|aunt|'s"),
        ("it 's 'so 'S' s 's.", "it|'s|'|so|'S|'|s|'s|."),
        ("don't pay 3.50 e-mail a.b@c.de", "don't|pay|3.50|e-mail|a.b@c.de"),
        ("U.S. rock'n'roll.", "U.S|.|rock'n'roll|."),
        ("@you #yes @ # $5 @@ #!", "@you|#yes|@|#|$|5|@@|#|!"),
        ("so 😀😀!!?! ❤️ cafe\u0301! nai\u0308ve", "so|😀😀|!!|?|!|❤️|cafe\u0301|!|nai\u0308ve"),
        ("a\u00a0b\u2003c\u200bd \u200b x_ _", "a|b|c\u200bd|\u200b|x_|_"),
        ("a\u200b. \u200b.", "a\u200b|.|\u200b|."),
        ("München, Ωμέγα؟ हिन्दी।", "München|,|Ωμέγα|؟|हिन्दी|।"),
        ("", ""),
        (" \n\u00a0", ""),
    ],
)
def test_words_by_hand(text, words):
    assert [word for word, _, _ in words_of(text)] == (words.split("|") if words else [])


ODD = st.sampled_from("aSs1_é\u0301\u200b'’.,@#😀\ufe0f \u00a0\n-")
LETTERS = st.text(ODD | st.characters(), max_size=20)


@given(LETTERS)
def test_no_character_is_lost_and_each_word_is_where_it_says(text):
    words, end = words_of(text), 0
    for word, a, b in words:
        assert word == text[a:b] and a < b and not text[end:a].strip()
        assert not any(c.isspace() for c in word)
        end = b
    assert not text[end:].strip()


@given(LETTERS)
def test_a_letter_is_never_the_border_of_a_mark(text):
    """Marks are apart at both ends of a stretch: what has a letter or digit begins with one, an @,
    a #, or is a possessive; and ends with one, or with what joins it."""
    for word, _, _ in words_of(text):
        if any(c.isalnum() for c in word):
            first = word[1:] if word[0] in "@#" or word.lower() in ("'s", "’s") else word
            assert first[0].isalnum() or first[0] == "_"
            base = [c for c in word if not unicodedata.category(c).startswith(("M", "Cf"))]
            assert base[-1].isalnum() or base[-1] == "_"


def test_labels_of_words_mark_the_text():
    text = "Yesterday  Barack\nObama's wife visited New York."
    words = words_of(text)
    tags = ["O", "B-PERSON", "I-PERSON", "O", "O", "O", "I-PLACE", "I-PLACE", "O"]
    spans = text_spans(tags, words)
    assert [(kind, text[a:b]) for kind, a, b in spans] == [
        ("PERSON", "Barack\nObama"),
        ("PLACE", "New York"),
    ]
    want = "Yesterday  [Barack\nObama]PERSON's wife visited [New York]PLACE."
    assert marked(text, spans) == marked(text, spans[::-1]) == want
    assert marked(text, []) == text and marked("ab", [("X", 1, 2), ("Y", 0, 1)]) == "[a]Y[b]X"


@given(LETTERS, st.data())
def test_without_its_marks_a_marked_text_is_the_text(text, data):
    words = words_of(text)
    tags = [data.draw(st.sampled_from(["O", "B-T", "I-T"])) for _ in words]
    spans = text_spans(tags, words)
    shown = marked(text, [("\0", a, b) for _, a, b in spans])
    assert len(shown) == len(text) + 3 * len(spans)
    for _, a, b in spans:
        assert f"[{text[a:b]}]\0" in shown
    if not any(c in text for c in "[]\0"):
        assert re.sub("[][\0]", "", shown) == text
