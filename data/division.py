"""Which rows of a file validate when there is no validation file: always the same ones.

They are drawn at random, because what was collected together often lies together, but never with
the run's seed: runs with different seeds are compared on the same rows, and a run that starts from
another's weights must not be scored on rows that these have learnt.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

SEED = 0

T = TypeVar("T")


def divide(rows: Sequence[T], every: int, what: str, where: str) -> tuple[list[T], list[T], str]:
    """(training rows, validation rows, the rule in words), both in their order. One row in `every`
    validates, at least one. Raises ValueError if there is only one; it calls a row `what` and its
    file `where`."""
    n = len(rows)
    if n < 2:
        raise ValueError(f"{where} has one {what}, too few to hold one out: give more, or --valid")
    drawn = np.random.default_rng(SEED).permutation(n)[: max(1, n // every)].tolist()
    rule = f"{len(drawn):,} of {n:,} {what}s, drawn with a fixed seed, validate"
    return *separate(rows, drawn), rule


def divide_by_label(
    rows: Sequence[T], labels: Sequence[str], every: int
) -> tuple[list[T], list[T]]:
    """(training rows, validation rows), both in their order. Of the rows of each label, one in
    `every` validates, at least one, but none if the label occurs only once."""
    places, drawn = defaultdict(list), []
    for i, label in enumerate(labels):
        places[label].append(i)
    random = np.random.default_rng(SEED)
    for _, own in sorted(places.items()):
        if len(own) > 1:
            drawn += random.choice(own, max(1, len(own) // every), replace=False).tolist()
    return separate(rows, drawn)


def copy_told(data: str, valid: str, equal: bool) -> str:
    """What the plan says of a validation file whose rows are those of the training file. Nothing
    where one file is given for both, to be scored whole."""
    if not equal or Path(data).resolve() == Path(valid).resolve():
        return ""
    return f"; {valid} is a copy of {data}: hold out rows that do not train"


def separate(rows: Sequence[T], drawn: Sequence[int]) -> tuple[list[T], list[T]]:
    """(the other rows, the rows at the places `drawn`), both in their order."""
    held_out = set(drawn)
    sides = ([], [])
    for i, row in enumerate(rows):
        sides[i in held_out].append(row)
    return sides
