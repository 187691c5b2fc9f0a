"""Documents -> the rows that BERT reads: pairs of sentences, or packed text.

`SentencePairs` is next-sentence prediction (Devlin et al. 2019, arXiv:1810.04805, section 3.1): in
half of the rows the second part follows the first in its document, in the other half it comes from
another document. `PackedText` is for masked words alone (RoBERTa, Liu et al. 2019,
arXiv:1907.11692, section 4.2): text cut into rows of full length, across documents, no padding.

Both read a token file in which the border token stands before each document, and for pairs also
before each sentence. What the data class (`data/masked.py`) asks of either:

    .lengths                      (rows,) tokens of each row, [CLS] and [SEP] included
    .row(epoch, i, random)        -> (parts, label): the ids of one part or of two, and 0 for a
                                  second part that follows, 1 for one that does not, None for none
    .describe(chosen)             how much text these rows are, for the plan
"""

import numpy as np
from numpy.random import Generator

from data.buckets import find

NEXT, RANDOM = 0, 1  # the labels, as in the paper's own code
SHORT = 0.1  # share of pairs with a random smaller length, so that short inputs are known too


class SentencePairs:
    """Pairs of runs of sentences, as long together as a row allows.

    Each document is cut into chunks of sentences, once: about T tokens each, and a tenth of them
    of a random smaller length. A chunk is a row, so a row's length is known and is the same in
    every epoch. What changes with the epoch: where the chunk is divided in two; whether the second
    part is replaced, and by what. Over-long pairs lose the beginning of the first part or the end
    of the second, whichever part is longer, so that the two still touch where they are consecutive.

    The replacement begins with any sentence of any other document, each as likely as the other,
    and is as long as what it replaces (it begins earlier where its document would end too soon):
    neither its length nor the kind of its document may give it away.
    """

    def __init__(self, ids: np.ndarray, border: int, T: int, *, seed: int, what: str):
        self.ids, self.border, self.room = ids, border, T - 3  # [CLS] and two [SEP]
        if self.room < 2:
            raise ValueError(f"--block_size {T} has no room for two parts: choose 5 or more")
        borders = find(ids, border)
        lengths = np.diff(np.append(borders, len(ids))) - 1
        opens = lengths == 0  # the border of a document has the one of its first sentence behind it
        self.begin, lengths = borders[~opens] + 1, lengths[~opens]
        self.tokens_before = np.concatenate([[0], np.cumsum(lengths)])  # of each sentence
        self.document = (np.cumsum(opens) - 1)[~opens]
        # document d has the sentences first[d] to first[d + 1] - 1
        self.first = np.append(np.flatnonzero(np.diff(self.document, prepend=-1)), len(lengths))
        documents = len(self.first) - 1
        if documents < 2:
            raise ValueError(
                f"next-sentence prediction needs two documents, and {what} has {documents}: give "
                "more (blank lines between them, or a folder of files), or train with --nsp=false"
            )
        # Numbered as they come here, whatever documents of no sentence lie between.
        self.document = np.repeat(np.arange(documents), np.diff(self.first))
        self.chunks = self.cut(np.random.default_rng(seed))
        if not len(self.chunks):
            raise ValueError(
                f"no document of {what} has two sentences: give other text, name its --layout, or "
                "train with --nsp=false"
            )
        begin, end = self.tokens_before[self.chunks].T
        self.lengths = np.minimum(end - begin, self.room) + 3

    def cut(self, random: Generator) -> np.ndarray:
        """(chunks, 2): first sentence, and the one behind the last. All documents at once, one
        chunk of each in a turn; documents of a single sentence have none."""
        at, end = self.first[:-1], self.first[1:]
        at, end = at[end - at > 1], end[end - at > 1]
        chunks = [np.empty((0, 2), np.int64)]
        while len(at):
            short = random.random(len(at)) < SHORT
            wanted = np.where(short, random.integers(2, self.room + 1, len(at)), self.room)
            stop = np.searchsorted(self.tokens_before, self.tokens_before[at] + wanted)
            stop = np.clip(stop, at + 2, end)
            chunks.append(np.stack([at, stop], axis=1))
            # A sentence that is left alone at the end takes the one before it along once more.
            at = np.where(end - stop == 1, stop - 1, stop)
            at, end = at[stop < end], end[stop < end]
        chunks = np.concatenate(chunks)
        return chunks[np.argsort(chunks[:, 0], kind="stable")]  # as in the text

    def tokens(self, first: int, stop: int) -> np.ndarray:
        """The ids of sentences first to stop - 1, without borders."""
        ends = self.tokens_before[stop] - self.tokens_before[stop - 1] + self.begin[stop - 1]
        ids = self.ids[self.begin[first] : ends]
        return ids[ids != self.border]

    def row(self, epoch: int, i: int, random: Generator) -> tuple[list[np.ndarray], int]:
        first, stop = self.chunks[i]
        room = int(self.lengths[i]) - 3
        middle = int(random.integers(first + 1, stop))
        a = self.tokens(first, middle)
        if random.random() < 0.5:
            b, label = self.tokens(middle, stop), NEXT
        else:
            wanted = self.tokens_before[stop] - self.tokens_before[middle]
            b, label = self.elsewhere(first, min(int(wanted), room), random), RANDOM
        return list(fit(a, b, room)), label

    def elsewhere(self, sentence: int, wanted: int, random: Generator) -> np.ndarray:
        """Sentences of `wanted` tokens or a little more, from another document than this one's."""
        own = self.document[sentence]
        begin, end = self.first[own], self.first[own + 1]
        start = int(random.integers(len(self.begin) - (end - begin)))
        start += (end - begin) * (start >= begin)
        before, other = self.tokens_before, self.document[start]
        stop = min(np.searchsorted(before, before[start] + wanted), self.first[other + 1])
        if before[stop] - before[start] < wanted:
            start = np.searchsorted(before, before[stop] - wanted, side="right") - 1
            start = max(start, self.first[other])
        return self.tokens(start, stop)

    def describe(self, chosen: np.ndarray) -> str:
        documents = len(np.unique(self.document[self.chunks[chosen, 0]]))
        return f"{len(chosen):,} pairs of runs of sentences from {documents:,} documents"


def fit(a: np.ndarray, b: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """The end of a and the beginning of b, at most `room` together; the longer one is cut first."""
    half = room // 2
    for_b = min(len(b), max(room - half, room - len(a)))
    for_a = min(len(a), room - for_b)
    return a[len(a) - for_a :], b[:for_b]


class PackedText:
    """Rows of T - 2 tokens of running text. Training: every epoch cuts at another offset, and
    leaves out less than two rows in all; otherwise from the first token to the last."""

    def __init__(
        self, ids: np.ndarray, border: int, T: int, *, seed: int, what: str, training: bool
    ):
        self.ids, self.seed, self.width = ids[1:], seed, T - 2  # the first border is before all
        n = len(self.ids)
        if self.width < 1:
            raise ValueError(f"--block_size {T} has no room for a token: choose 3 or more")
        if n < (self.width if training else 1):
            raise ValueError(
                f"{what} has {n:,} tokens, fewer than the {self.width:,} of one row: choose "
                f"--block_size {max(n, 1) + 2} or less, or give more text"
            )
        self.max_offset = min(self.width - 1, n - self.width) if training else 0
        starts = np.arange(0, n - self.max_offset, self.width)
        self.lengths = np.minimum(n - self.max_offset - starts, self.width) + 2
        if training:
            self.lengths = self.lengths[self.lengths == T]

    def row(self, epoch: int, i: int, random: Generator) -> tuple[list[np.ndarray], None]:
        offset = 0
        if self.max_offset:
            offset = int(np.random.default_rng((self.seed, epoch)).integers(self.max_offset + 1))
        start = offset + i * self.width
        return [self.ids[start : start + self.width]], None

    def describe(self, chosen: np.ndarray) -> str:
        return f"{len(chosen):,} rows of running text"
