"""data/squad.py: the metrics beside a second way to count."""

import math
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.squad import exact_match, f1, normalise, squad_scores


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("The  U.S. Navy's \t(old) anthem, An A-team!", "us navys old anthem ateam"),
        ("a theory of the other an", "theory of other"),
        ("the the-a 'The'", "thea"),
        ("“The” Émigré — 6½ €5", "“ ” émigré — 6½ €5"),  # only ASCII punctuation goes
        ("A.", ""),
        ("  ", ""),
    ],
)
def test_normalise_by_hand(text, want):
    assert normalise(text) == want


def words_of(text):
    """The same as normalise(text).split(), one character at a time."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    pieces = re.split(r"(\w+)", kept)  # every second one is a word
    kept = "".join(" " if i % 2 and x in ("a", "an", "the") else x for i, x in enumerate(pieces))
    return kept.split()


def overlap(prediction, answer):
    """Computes F1 by taking words away one at a time."""
    said, wanted = words_of(prediction), words_of(answer)
    if not said or not wanted:
        return 1.0 if said == wanted else 0.0
    left, right = list(wanted), 0
    for word in said:
        if word in left:
            left.remove(word)
            right += 1
    if not right:
        return 0.0
    precision, recall = right / len(said), right / len(wanted)
    return 2 * precision * recall / (precision + recall)


WORDS = ["a", "an", "the", "A", "The.", "cat", "Cat,", "dog", "cat-dog", "“the”", "½", "a.b", "'"]
TEXTS = st.one_of(
    st.lists(st.sampled_from(WORDS)).map(" ".join),
    st.text(max_size=12),
)


@given(TEXTS, TEXTS)
def test_metrics_equal_a_second_way_to_count(prediction, answer):
    assert normalise(prediction).split() == words_of(prediction)
    assert exact_match(prediction, answer) == (words_of(prediction) == words_of(answer))
    assert f1(prediction, answer) == pytest.approx(overlap(prediction, answer))
    assert f1(prediction, answer) == f1(answer, prediction)


def test_f1_counts_a_word_as_often_as_it_occurs():
    assert f1("cat cat", "the cat") == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert f1("cat cat dog", "cat cat cat") == pytest.approx(2 / 3)
    assert f1("dog", "cat") == 0.0 == f1("", "cat") == f1("The", "cat") and f1("a", "") == 1.0


def test_the_best_of_the_answers_counts_and_questions_weigh_the_same():
    said = ["the cat", "black dog", "x"]
    golds = [["dog", "Cat!"], ["dog", "white dog"], ["cat"]]
    # F1 of "black dog": 2/3 with "dog", 1/2 with "white dog".
    assert squad_scores(said, golds) == {
        "exact_match": round(100 / 3, 6),
        "f1": round(100 * (1 + 2 / 3) / 3, 6),
    }


def test_questions_without_an_answer_are_right_with_an_empty_one():
    golds = [[], [], ["cat"], ["a cat", "dog"], ["bird"]]
    report = squad_scores(["", "cat", "", "cat dog", "bird"], golds)
    assert report == {
        "exact_match": 40.0,
        "f1": round(100 * (1 + 0 + 0 + 2 / 3 + 1) / 5, 6),
        "answerable_exact_match": round(100 / 3, 6),
        "answerable_f1": round(100 * (2 / 3 + 1) / 3, 6),
        "unanswerable_exact_match": 50.0,
    }
    assert all(type(value) is float and math.isfinite(value) for value in report.values())
    assert squad_scores([""], [[]]) == {"exact_match": 100.0, "f1": 100.0}


def test_an_answer_of_articles_alone_is_none_beside_another():
    """As in SQuAD 2.0; otherwise "the" would be right wherever someone marked an article."""
    assert squad_scores(["the"], [["a", "cat"]])["exact_match"] == 0.0
    assert squad_scores(["the"], [["a"]]) == {"exact_match": 100.0, "f1": 100.0}


def test_as_many_predictions_as_questions():
    with pytest.raises(ValueError, match="zip"):
        squad_scores(["x"], [["x"], ["y"]])
