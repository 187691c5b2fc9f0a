"""Documents -> the rows that BERT reads: pairs of sentences, or packed text.

`SentencePairs` is next-sentence prediction (Devlin et al. 2019, arXiv:1810.04805, section 3.1): in
half of the rows the second part follows the first in its document, in the other half it comes from
another document. `PackedText` is for masked words alone (RoBERTa, Liu et al. 2019,
arXiv:1907.11692, section 4.2): text cut into rows of full length, across documents, no padding.

Both read a token file in which the border token stands before each document, and for pairs also
before each sentence. What the data class (`tasks/masked.py`) asks of either class:

    .lengths                      (rows,) tokens of each row, [CLS] and [SEP] included
    .row(epoch, i, random)        -> (parts, label): the ids of one or two parts; 0 if the second
                                  part follows the first, 1 if not, None if there is one part
    .describe(chosen)             how much text these rows are, for the plan
"""

import numpy as np
from numpy.random import Generator

from data.buckets import positions_of
from data.shards import Tokens

NEXT, RANDOM = 0, 1  # the labels, as in the paper's own code
SHORT = 0.1  # share of pairs with a random smaller length, so that short inputs are learnt too


class SentencePairs:
    """Pairs of runs of sentences that together are as long as a row allows.

    Each document is cut once into chunks of sentences, which have a little more than the T tokens
    of a row; a tenth of the chunks have a random smaller length. The last chunk of a document
    begins early enough to be full too. A chunk is a row, whose length is the same in every epoch.
    What changes with the epoch is where the chunk is divided in two, whether the second part is
    replaced, and by what. Parts that are too long lose tokens at the beginning of the first or at
    the end of the second, whichever is longer, so that consecutive parts still touch.

    Only its meaning may give a replacement away. It begins with any sentence of any other document
    except that document's first, which follows nothing, or earlier where the document would end too
    soon; and it has as many sentences as fill the row. A chunk that is the whole of a short
    document loses a piece of a sentence, so that second parts end in the middle of a sentence in
    either case. Documents of a single sentence are left out. Raises ValueError for rows that are
    too short, or if fewer than two documents have two sentences.
    """

    def __init__(self, ids: Tokens, border: int, T: int, *, seed: int, what: str):
        self.ids, self.border, self.limit = ids, border, T - 3  # [CLS] and two [SEP]
        if self.limit < 2:
            raise ValueError(f"rows of {T} tokens have no room for two parts: choose 5 or more")
        borders = positions_of(ids, border)
        lengths = np.diff(np.append(borders, len(ids))) - 1
        opens = lengths == 0  # a document's border is followed by that of its first sentence
        self.begin, lengths = borders[~opens] + 1, lengths[~opens]
        self.tokens_before = np.concatenate([[0], np.cumsum(lengths)])  # before each sentence
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
        # Documents without a sentence do not count: the numbers have no gaps.
        self.document = np.repeat(np.arange(len(sizes)), sizes)
        self.inner = np.delete(np.arange(len(lengths)), self.first[:-1])  # those not first
        self.chunks = self.cut(np.random.default_rng(seed))
        self.lengths = self.chunks[:, 2] + 3

    def cut(self, random: Generator) -> np.ndarray:
        """(chunks, 3): the first sentence, the one after the last, and the tokens of the row. Each
        iteration cuts one chunk of every document; documents of a single sentence have none."""
        before, divisible = self.tokens_before, np.diff(self.first) > 1
        first, end = self.first[:-1][divisible], self.first[1:][divisible]
        chunks, at = [np.empty((0, 3), np.int64)], first
        while len(at):
            short = random.random(len(at)) < SHORT
            limit = np.where(short, random.integers(2, self.limit + 1, len(at)), self.limit)
            stop = np.clip(np.searchsorted(before, before[at] + limit), at + 2, end)
            back = np.searchsorted(before, before[end] - limit, side="right") - 1
            early = np.clip(np.minimum(back, end - 2), first, at)
            begin = np.where(stop == end, early, at)
            tokens, but_last = before[stop] - before[begin], before[stop - 1] - before[begin]
            less = random.integers(but_last + 1, tokens + 1)
            chunks.append(np.stack([begin, stop, np.where(tokens < limit, less, limit)], axis=1))
            first, at, end = (x[stop < end] for x in (first, stop, end))
        chunks = np.concatenate(chunks)
        return chunks[np.argsort(chunks[:, 0], kind="stable")]  # as in the text

    def tokens(self, first: int, stop: int) -> np.ndarray:
        """The ids of sentences first to stop - 1, without borders."""
        ends = self.tokens_before[stop] - self.tokens_before[stop - 1] + self.begin[stop - 1]
        ids = self.ids[self.begin[first] : ends]
        return ids[ids != self.border]

    def row(self, epoch: int, i: int, random: Generator) -> tuple[list[np.ndarray], int]:
        first, stop, limit = self.chunks[i]
        middle = int(random.integers(first + 1, stop))
        a = self.tokens(first, middle)
        if random.random() < 0.5:
            b, label = self.tokens(middle, stop), NEXT
        else:
            # As many sentences as fill the row, because the chunk's own end was found like that.
            b, label = self.elsewhere(first, max(1, limit - len(a)), random), RANDOM
        return list(truncate_pair(a, b, limit)), label

    def elsewhere(self, sentence: int, wanted: int, random: Generator) -> np.ndarray:
        """Whole sentences that have `wanted` tokens or a little more, from another document than
        that of `sentence`. They have fewer only if ten draws found no document with so many."""
        before, own = self.tokens_before, self.document[sentence]
        begin, end = (self.first[d] - d for d in (own, own + 1))  # its part of self.inner
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
        first, stop, limit = self.chunks[chosen].T
        tokens = self.tokens_before[stop] - self.tokens_before[first]
        lost = np.maximum(tokens - limit, 0).sum() / tokens.sum()
        return text + f" ({lost:.0%} of their tokens are beyond a row)" * bool(lost > 0.25)


def truncate_pair(a: np.ndarray, b: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The end of a and the beginning of b, together at most `limit` tokens; the longer one is cut
    first."""
    half = limit // 2
    for_b = min(len(b), max(limit - half, limit - len(a)))
    for_a = min(len(a), limit - for_b)
    return a[len(a) - for_a :], b[:for_b]


class PackedText:
    """Rows of T - 2 tokens of running text. In training, every epoch cuts at another offset and
    leaves out less than two rows in all; otherwise the rows go from the first token to the last.
    Raises ValueError if the text is shorter than one row, or a row has no place for a word."""

    def __init__(self, ids: Tokens, border: int, T: int, *, seed: int, what: str, training: bool):
        self.ids, self.seed, self.width = ids, seed, T - 2
        n = max(0, len(ids) - 1)  # without the first border
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
