"""tasks/tag.py: scores of entities by hand, words and marks in a text."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_conll import slow_entities, tags

from tasks.tag import entity_scores, entity_scores_by_type, mark_entities, text_spans, words_of

# ---- scores --------------------------------------------------------------------------------------


def test_scores_by_hand():
    """2 of 4 entities are found with 5 guesses: a wrong type, a wrong border and an invented entity
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
    total = sum(scores["recall"] * scores["entities"] for scores in by_type.values())
    assert total == pytest.approx(right)


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
    """Marks at both ends of a stretch are words of their own. What has a letter or digit begins
    with one, with an @ or a #, or is a possessive; and it ends with one, or with what joins it."""
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
    assert mark_entities(text, spans) == mark_entities(text, spans[::-1]) == want
    assert (
        mark_entities(text, []) == text
        and mark_entities("ab", [("X", 1, 2), ("Y", 0, 1)]) == "[a]Y[b]X"
    )


@given(LETTERS, st.data())
def test_without_its_marks_a_marked_text_is_the_text(text, data):
    words = words_of(text)
    tags = [data.draw(st.sampled_from(["O", "B-T", "I-T"])) for _ in words]
    spans = text_spans(tags, words)
    shown = mark_entities(text, [("\0", a, b) for _, a, b in spans])
    assert len(shown) == len(text) + 3 * len(spans)
    for _, a, b in spans:
        assert f"[{text[a:b]}]\0" in shown
    if not any(c in text for c in "[]\0"):
        assert re.sub("[][\0]", "", shown) == text
