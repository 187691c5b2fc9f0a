"""tasks/answer.py: the best span against all spans."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tasks.answer import Span, best_span, join_windows


def all_spans(logits, first, stop, max_answer):
    """Every span that is allowed, ordered by start and then by length."""
    return [
        (start, end, float(logits[0][start]) + float(logits[1][end]))
        for start in range(first, stop)
        for end in range(start, stop)
        if end - start + 1 <= max_answer
    ]


@st.composite
def windows_of_logits(draw):
    before, inside, behind = (draw(st.integers(low, 12)) for low in (1, 1, 0))
    # Few different numbers: equal sums are frequent, and the highest are often not allowed.
    numbers = st.integers(-3, 3).map(float)
    n = before + inside + behind
    logits = np.array(draw(st.lists(numbers, min_size=2 * n, max_size=2 * n)))
    return logits.reshape(2, n).astype(np.float32), before, before + inside


@given(windows_of_logits(), st.integers(1, 14))
def test_best_span_is_the_first_of_the_best_among_all(window, max_answer):
    logits, first, stop = window
    start, end, total = max(all_spans(logits, first, stop, max_answer), key=lambda span: span[2])
    found = best_span(logits, first, stop, max_answer)
    assert found == (start, end, total, logits[0][0] + logits[1][0])


def test_best_span_has_thirty_tokens_at_most():
    logits = np.zeros((2, 50))
    logits[0, 5], logits[1, 34] = 2.0, 2.0
    assert best_span(logits, 3, 48)[:3] == (5, 34, 4.0)
    logits[1, 34], logits[1, 35] = 0.0, 2.0
    assert best_span(logits, 3, 48)[2] == 2.0


def test_best_span_adds_in_double_precision():
    """In float32, 2^24 + 1 is 2^24, and the first of such spans would win."""
    logits = np.array([[0, 2**24, 2**24], [0, 0, 1]], np.float32)
    assert best_span(logits, 1, 3)[:3] == (1, 2, 2**24 + 1)


@given(st.lists(st.tuples(*[st.integers(-4, 4).map(float)] * 2), min_size=1, max_size=6))
def test_windows_are_joined_by_the_best_score_and_the_lowest_null(pairs):
    spans = [Span(1, 2, *pair) for pair in pairs]
    best, lead = join_windows(spans)
    scores, nulls = zip(*pairs, strict=True)
    assert best == scores.index(max(scores)) and lead == min(nulls) - max(scores)


def test_one_sure_window_answers_for_all():
    """Most windows of a long text have no answer and say so; that must not outvote the one."""
    empty, full = Span(9, 9, -2.0, 12.0), Span(4, 5, 7.0, 1.0)
    assert join_windows([empty, full, empty]) == (1, -6.0)
    assert join_windows([empty, empty]) == (0, 14.0)
