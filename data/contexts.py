"""A question and its context -> rows for BERT, and back from places in a row to the context's text.

    [CLS] question [SEP] window of the context [SEP]
      0      0       0             1             1        segments

An answer is a piece of the original text, with its capitals, accents and spaces. So the context is
cut into units of which the characters are known, and each is encoded by itself: a unit is a run of
characters without white space, punctuation or Chinese characters, or one of the latter two. These
are the borders of WordPiece too, and its ids are those of the whole text (but for U+000B, U+0085
and the like, white space that it drops without dividing a word). Byte-level BPE gets a space before
a unit where white space stood in the text; it encodes units of several punctuation marks ("...") or
an apostrophe with its letters ("n't") otherwise than it would the whole.

Left out: answers that begin or end inside a unit ("1990" of "1990s"); they get the whole of it.

A context of more tokens than a row has room for is read in overlapping windows (Devlin et al. 2019,
arXiv:1810.04805; the sliding window is that of its released code).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import regex

from answers import THRESHOLD, best_span, join_windows
from data.encoding import CLS, SEP, assemble, encode_text
from data.tokens import AnyTokenizer
from wordpiece import IDEOGRAPH

MAX_QUESTION = 64  # tokens; the rest of a longer question is not read
OVERLAP = 128  # tokens that two neighbouring windows share, half of a smaller window

# str.isspace counts U+001C to U+001F as white space, \s of `regex` does not.
SPACE = r"\s\x1c-\x1f"
ALONE = r"\p{P}$+<=>^`|~" + IDEOGRAPH.pattern.strip("[]")  # \p{P} lacks these ASCII signs
UNIT = regex.compile(rf"[^{SPACE}{ALONE}]+|[^{SPACE}]")


class Context(NamedTuple):
    """A text and its n tokens: ids (n,), and where in the text the unit of each starts and ends,
    both (n,). Units that the tokenizer drops, such as U+200B, have no tokens."""

    text: str
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def tokens(self, start: int, end: int) -> tuple[int, int] | None:
        """The first and the last token whose unit overlaps text[start:end], which must not be
        empty; None if no unit does."""
        found = np.flatnonzero((self.ends > start) & (self.starts < end))
        return (int(found[0]), int(found[-1])) if len(found) else None

    def characters(self, first: int, last: int) -> tuple[int, int]:
        """(start, end) of the text that tokens first to last stand for."""
        return int(self.starts[first]), int(self.ends[last])


class Window(NamedTuple):
    """Tokens start to stop - 1 of a context, which stand in the row from place `first` on."""

    start: int
    stop: int
    first: int

    @property
    def length(self) -> int:
        """Tokens of the row, [SEP] behind the window included."""
        return self.first + self.stop - self.start + 1

    def places(self, answer: tuple[int, int] | None) -> tuple[int, int]:
        """Where in the row an answer's first and last token are; (0, 0), which is [CLS], when it
        is not wholly in this window, or there is none."""
        if answer is None or answer[0] < self.start or answer[1] >= self.stop:
            return 0, 0
        return answer[0] - self.start + self.first, answer[1] - self.start + self.first


class Answer(NamedTuple):
    """text is context[start:end]; all three are empty for "no answer". `probability` is that of
    its start times that of its end, each among all places of its row."""

    text: str
    start: int
    end: int
    probability: float


# ---- text -> rows --------------------------------------------------------------------------------


def encode_context(tokenizer: AnyTokenizer, text: str) -> Context:
    ids, starts, ends = [], [], []
    for unit in UNIT.finditer(text):
        start, end = unit.span()
        spaced = start == 0 or text[start - 1].isspace()
        found = tokenizer.encode(f" {unit[0]}" if spaced else unit[0])
        ids += found
        starts += [start] * len(found)
        ends += [end] * len(found)
    return Context(text, *(np.array(x, dtype=np.int64) for x in (ids, starts, ends)))


def encode_question(tokenizer: AnyTokenizer, text: str, T: int) -> np.ndarray:
    """Ids of at most MAX_QUESTION tokens, and half of what a row of T has room for."""
    if T < 5:
        raise ValueError(f"rows of {T} tokens have no room for a question: choose 5 or more")
    return np.array(encode_text(tokenizer, text), dtype=np.int64)[: min(MAX_QUESTION, (T - 3) // 2)]


def windows(n_question: int, n_context: int, T: int) -> list[Window]:
    """All that a context of n_context tokens needs in rows of at most T tokens: one where it fits,
    else full windows with OVERLAP, the last of them perhaps shorter."""
    room, first, found = T - 3 - n_question, n_question + 2, []
    step = room - min(OVERLAP, room // 2)
    for start in range(0, n_context, step):
        found.append(Window(start, min(start + room, n_context), first))
        if start + room >= n_context:
            break
    return found


def make_row(
    tokenizer: AnyTokenizer, question: np.ndarray, context: Context, window: Window
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, segments), both (window.length,)."""
    special = tokenizer.special_tokens
    ids = context.ids[window.start : window.stop]
    return assemble([question, ids], special[CLS], special[SEP])


def ask(
    tokenizer: AnyTokenizer, question: str, context: str, T: int
) -> tuple[Context, list[Window], list[tuple[np.ndarray, np.ndarray]]]:
    """One question: its context, its windows, and a row (ids, segments) of at most T tokens for
    each of them. ValueError where the context has no token in it."""
    encoded, asked = encode_context(tokenizer, context), encode_question(tokenizer, question, T)
    if not len(encoded.ids):
        raise ValueError(f"the context {context[:60]!r} has no words in it: give a text")
    found = windows(len(asked), len(encoded.ids), T)
    return encoded, found, [make_row(tokenizer, asked, encoded, window) for window in found]


# ---- logits -> text ------------------------------------------------------------------------------


def read_answer(
    context: Context, found: Sequence[Window], logits: Sequence[np.ndarray], may_abstain: bool
) -> Answer:
    """The answer that a model means by the logits of each window, (2, T) with T of at least its
    row's length; what lies beyond, padding, is not looked at. may_abstain: "no answer" is one."""
    rows = [x[:, : window.length] for x, window in zip(logits, found, strict=True)]
    spans = [best_span(x, w.first, w.length - 1) for x, w in zip(rows, found, strict=True)]
    best, lead = join_windows(spans)
    if may_abstain and lead > THRESHOLD:
        least = min(range(len(spans)), key=lambda window: spans[window].null)
        return Answer("", 0, 0, probability(rows[least], 0, 0))
    span, window = spans[best], found[best]
    offset = window.start - window.first
    start, end = context.characters(span.start + offset, span.end + offset)
    return Answer(
        context.text[start:end], start, end, probability(rows[best], span.start, span.end)
    )


def probability(logits: np.ndarray, start: int, end: int) -> float:
    """Of `start` among all places of the row (2, T), times that of `end`."""
    logits = logits.astype(np.float64)
    logits = logits - logits.max(1, keepdims=True)
    chosen = logits[0, start] + logits[1, end]
    return float(np.exp(chosen - np.log(np.exp(logits).sum(1)).sum()))
