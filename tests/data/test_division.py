"""data/division.py: which rows validate. The tests of data classes show that the run's seed does
not change that."""

import re
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.division import divide, divide_by_label

LABELS = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=150)


@given(st.integers(2, 200), st.integers(2, 13))
def test_one_in_so_many_validates_and_the_order_stays(n, every):
    train, validation, rule = divide(range(n), every, "row", "x.csv")
    assert len(validation) == max(1, n // every)
    assert sorted(train + validation) == list(range(n))  # none lost, none twice
    assert train == sorted(train) and validation == sorted(validation)
    assert rule == f"{len(validation)} of {n} rows, drawn with a fixed seed, validate"
    assert divide(range(n), every, "row", "x.csv") == (train, validation, rule)


@given(LABELS, st.integers(2, 13))
def test_each_label_is_divided_by_itself(labels, every):
    rows = list(enumerate(labels))
    train, validation = divide_by_label(rows, labels, every)
    held = Counter(label for _, label in validation)
    assert held == {k: max(1, n // every) for k, n in Counter(labels).items() if n > 1}
    assert sorted(train + validation) == rows
    assert train == sorted(train) and validation == sorted(validation)
    assert divide_by_label(rows, labels, every) == (train, validation)


def test_they_are_drawn_from_everywhere_and_not_at_even_distances():
    """What was collected together often lies together, and so does every tenth of it."""
    for _, validation in (
        divide(range(500), 10, "row", "x.csv")[:2],
        divide_by_label(range(500), "a" * 300 + "b" * 200, 10),
    ):
        assert len({b - a for a, b in pairwise(validation)}) > 8
        assert min(Counter(place // 100 for place in validation).values()) >= 4


def test_one_row_cannot_be_divided():
    message = "x.json has one paragraph, too few to hold one out: give more, or --valid"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        divide(["one"], 5, "paragraph", "x.json")
    assert divide_by_label(["one"], "a", 5) == (["one"], [])
