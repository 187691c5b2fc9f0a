"""Documents -> the rows that BERT reads: pairs of sentences, or packed text.

`SentencePairs` is next-sentence prediction (Devlin et al. 2019, arXiv:1810.04805, section 3.1): in
half of the rows the second part follows the first in its document, in the other half it comes from
another document. `PackedText` is for masked words alone (RoBERTa, Liu et al. 2019,
arXiv:1907.11692, section 4.2): text cut into rows of full length, across documents, no padding.

Both read a token file in which the border token stands before each document, and for pairs also
before each sentence. What the data class (`tasks/masked.py`) asks of either:

    .lengths                      (rows,) tokens of each row, [CLS] and [SEP] included
    .row(epoch, i, random)        -> (parts, label): the ids of one part or of two, and 0 for a
                                  second part that follows, 1 for one that does not, None for none
    .describe(chosen)             how much text these rows are, for the plan
"""

import numpy as np
from numpy.random import Generator

from data.buckets import positions_of
from data.shards import Tokens

NEXT, RANDOM = 0, 1  # the labels, as in the paper's own code
SHORT = 0.1  # share of pairs with a random smaller length, so that short inputs are known too


class SentencePairs:
    """Pairs of runs of sentences, as long together as a row allows.

    Each document is cut into chunks of sentences, once: a little more than the T tokens of a row
    each, and a tenth of them of a random smaller length; the last chunk of a document begins early
    enough to be full too. A chunk is a row, of a length that is the same in every epoch. What
    changes with the epoch: where the chunk is divided in two; whether the second part is replaced,
    and by what. What is too long loses the beginning of the first part or the end of the second,
    whichever part is longer, so that the two still touch where they are consecutive.

    Nothing but its sense may give a replacement away. It begins with any sentence of any other
    document but the first one, which follows nothing, or earlier where that document would end too
    soon; and it has as many sentences as fill the row. A chunk that is all of a short document
    loses a piece of a sentence, so that second parts end in the middle of one in either case.
    Documents of a single sentence are left out.
    """

    def __init__(self, ids: Tokens, border: int, T: int, *, seed: int, what: str):
        self.ids, self.border, self.room = ids, border, T - 3  # [CLS] and two [SEP]
        if self.room < 2:
            raise ValueError(f"rows of {T} tokens have no room for two parts: choose 5 or more")
        borders = positions_of(ids, border)
        lengths = np.diff(np.append(borders, len(ids))) - 1
        opens = lengths == 0  # the border of a document has the one of its first sentence behind it
        self.begin, lengths = borders[~opens] + 1, lengths[~opens]
        self.tokens_before = np.concatenate([[0], np.cumsum(lengths)])  # of each sentence
        self.document = (np.cumsum(opens) - 1)[~opens]
        # document d has the sentences first[d] to first[d + 1] - 1
        self.first = np.append(np.flatnonzero(np.diff(self.document, prepend=-1)), len(lengths))
        sizes = np.diff(self.first)
        if (sizes > 1).sum() < 2:
            raise ValueError(
                "next-sentence prediction needs two documents of two sentences or more, and "
                f"{what} has {(sizes > 1).sum()}: give more, another --layout (paragraphs, for "
                "prose without two blank lines), or --nsp=false"
            )
        # Numbered as they come here, whatever documents of no sentence lie between.
        self.document = np.repeat(np.arange(len(sizes)), sizes)
        self.inner = np.delete(np.arange(len(lengths)), self.first[:-1])  # they follow another one
        self.chunks = self.cut(np.random.default_rng(seed))
        self.lengths = self.chunks[:, 2] + 3

    def cut(self, random: Generator) -> np.ndarray:
        """(chunks, 3): first sentence, the one behind the last, tokens of the row. All documents
        at once, one chunk of each in a turn; documents of a single sentence have none."""
        before, several = self.tokens_before, np.diff(self.first) > 1
        first, end = self.first[:-1][several], self.first[1:][several]
        chunks, at = [np.empty((0, 3), np.int64)], first
        while len(at):
            short = random.random(len(at)) < SHORT
            room = np.where(short, random.integers(2, self.room + 1, len(at)), self.room)
            stop = np.clip(np.searchsorted(before, before[at] + room), at + 2, end)
            back = np.searchsorted(before, before[end] - room, side="right") - 1
            early = np.clip(np.minimum(back, end - 2), first, at)
            begin = np.where(stop == end, early, at)
            tokens, but_last = before[stop] - before[begin], before[stop - 1] - before[begin]
            less = random.integers(but_last + 1, tokens + 1)
            chunks.append(np.stack([begin, stop, np.where(tokens < room, less, room)], axis=1))
            first, at, end = (x[stop < end] for x in (first, stop, end))
        chunks = np.concatenate(chunks)
        return chunks[np.argsort(chunks[:, 0], kind="stable")]  # as in the text

    def tokens(self, first: int, stop: int) -> np.ndarray:
        """The ids of sentences first to stop - 1, without borders."""
        ends = self.tokens_before[stop] - self.tokens_before[stop - 1] + self.begin[stop - 1]
        ids = self.ids[self.begin[first] : ends]
        return ids[ids != self.border]

    def row(self, epoch: int, i: int, random: Generator) -> tuple[list[np.ndarray], int]:
        first, stop, room = self.chunks[i]
        middle = int(random.integers(first + 1, stop))
        a = self.tokens(first, middle)
        if random.random() < 0.5:
            b, label = self.tokens(middle, stop), NEXT
        else:
            # As many sentences as fill the row, which is how the chunk itself came to its end.
            b, label = self.elsewhere(first, max(1, room - len(a)), random), RANDOM
        return list(truncate_pair(a, b, room)), label

    def elsewhere(self, sentence: int, wanted: int, random: Generator) -> np.ndarray:
        """Whole sentences of `wanted` tokens or a little more, from another document than this
        one's, and less only where ten draws found none that has as many."""
        before, own = self.tokens_before, self.document[sentence]
        begin, end = (self.first[d] - d for d in (own, own + 1))  # of its part of self.inner
        for _ in range(10):
            place = int(random.integers(len(self.inner) - (end - begin)))
            start = self.inner[place + (end - begin) * (place >= begin)]
            other = self.document[start]
            first, last = self.first[other] + 1, self.first[other + 1]
            if before[last] - before[first] >= wanted:
                break
        stop = min(np.searchsorted(before, before[start] + wanted), last)
        if before[stop] - before[start] < wanted:
            start = max(np.searchsorted(before, before[stop] - wanted, side="right") - 1, first)
        return self.tokens(start, stop)

    def describe(self, chosen: np.ndarray) -> str:
        documents = len(np.unique(self.document[self.chunks[chosen, 0]]))
        text = f"{len(chosen):,} pairs of runs of sentences from {documents:,} documents"
        first, stop, room = self.chunks[chosen].T
        tokens = self.tokens_before[stop] - self.tokens_before[first]
        lost = np.maximum(tokens - room, 0).sum() / tokens.sum()
        return text + f" ({lost:.0%} of their tokens are beyond a row)" * bool(lost > 0.25)


def truncate_pair(a: np.ndarray, b: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """The end of a and the beginning of b, at most `room` together; the longer one is cut first."""
    half = room // 2
    for_b = min(len(b), max(room - half, room - len(a)))
    for_a = min(len(a), room - for_b)
    return a[len(a) - for_a :], b[:for_b]


class PackedText:
    """Rows of T - 2 tokens of running text. Training: every epoch cuts at another offset, and
    leaves out less than two rows in all; otherwise from the first token to the last."""

    def __init__(self, ids: Tokens, border: int, T: int, *, seed: int, what: str, training: bool):
        self.ids, self.seed, self.width = ids, seed, T - 2
        n = max(0, len(ids) - 1)  # the first border is before all
        if self.width < 1:
            raise ValueError(f"rows of {T} tokens have no room for a word: choose 3 or more")
        if n < (self.width if training else 1):
            raise ValueError(
                f"{what} has {n:,} tokens, fewer than the {self.width:,} of one row: choose rows "
                f"of {max(n, 1) + 2} (--block_size or --row_length) or less, or give more text"
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
        start = 1 + offset + i * self.width
        return [self.ids[start : start + self.width]], None

    def describe(self, chosen: np.ndarray) -> str:
        return f"{len(chosen):,} rows of running text"
