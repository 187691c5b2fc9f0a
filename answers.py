"""Answers that are spans of a text: which span a model means, and how right it is.

A model gives every position of a row two numbers, for an answer that starts there and for one that
ends there. The best span is the pair with the highest sum, an end not before its start. A long text
is read in several windows; position 0, [CLS], stands for "the answer is not in this one".

Left out: answers put together from several spans, a threshold tuned on the validation set, and the
preference for the window in which a token has the most context on both sides (BERT's own code).

Papers: BERT (Devlin et al. 2019, arXiv:1810.04805, sections 4.2 and 4.3); SQuAD 1.1 (Rajpurkar et
al. 2016, arXiv:1606.05250, section 6.1: both metrics); SQuAD 2.0 (Rajpurkar et al. 2018,
arXiv:1806.03822: questions without an answer).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

MAX_ANSWER = 30  # tokens of the longest span that is considered
THRESHOLD = 0.0  # by how much "no answer" must beat the best span

ARTICLE = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


# ---- which span ----------------------------------------------------------------------------------


class Span(NamedTuple):
    """The best span of one window: the places of its first and last token in the row, the sum of
    their two logits, and `null`, the same sum for "no answer", which is position 0 twice."""

    start: int
    end: int
    score: float
    null: float


def best_span(logits: np.ndarray, first: int, stop: int, max_answer: int = MAX_ANSWER) -> Span:
    """logits (2, T): of starts and of ends. Both ends of the span lie in first to stop - 1, where
    the text is; it has at most max_answer tokens. Of equal spans the one that starts first, and of
    these the shortest."""
    starts, ends = logits[:, first:stop].astype(np.float64)
    # Row i holds the ends i, i + 1, ... of spans that start at i; behind the text nothing ends.
    reach = min(max_answer, len(ends))
    padded = np.pad(ends, (0, reach - 1), constant_values=-np.inf)
    sums = starts[:, None] + sliding_window_view(padded, reach)
    start, length = np.unravel_index(sums.argmax(), sums.shape)
    null = float(logits[0, 0]) + float(logits[1, 0])
    return Span(int(first + start), int(first + start + length), float(sums[start, length]), null)


def join_windows(spans: Sequence[Span]) -> tuple[int, float]:
    """The best spans of all windows of one question -> (the window of the best of them, by how
    much "no answer" beats it). A question has no answer if no window has one, so the window that
    is least sure of that decides: the lowest null score."""
    best = max(range(len(spans)), key=lambda window: spans[window].score)
    return best, min(span.null for span in spans) - spans[best].score


# ---- how right it is -----------------------------------------------------------------------------


def normalise(text: str) -> str:
    """What the metrics compare: lower case, without ASCII punctuation, then without the words a,
    an and the, with single spaces."""
    return " ".join(ARTICLE.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    return float(normalise(prediction) == normalise(answer))


def f1(prediction: str, answer: str) -> float:
    """The harmonic mean of precision and recall over words, each counted as often as it occurs.
    Where one side has no words, 1 if the other has none either."""
    a, b = normalise(prediction).split(), normalise(answer).split()
    if not a or not b:
        return float(a == b)
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))


def score(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """{"exact_match", "f1"}: means over the questions, in percent, each question with the best of
    its answers. No answers, or only such as normalise to nothing, mean that "" is right. Figures
    of the questions with and without an answer follow where there are both kinds; for the latter,
    F1 is the exact match.
    """
    golds = [[a for a in given if normalise(a)] or [""] for given in answers]
    pairs = list(zip(predictions, golds, strict=True))
    exact = np.array([max(exact_match(p, gold) for gold in given) for p, given in pairs])
    overlap = np.array([max(f1(p, gold) for gold in given) for p, given in pairs])
    has = np.array([bool(given) for given in answers])
    report = {"exact_match": percent(exact), "f1": percent(overlap)}
    if has.any() and not has.all():
        report["answerable_exact_match"] = percent(exact[has])
        report["answerable_f1"] = percent(overlap[has])
        report["unanswerable_exact_match"] = percent(exact[~has])
    return report


def percent(values: np.ndarray) -> float:
    return round(100 * float(values.mean()), 6)
