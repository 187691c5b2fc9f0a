"""Rows of known lengths -> batches of rows of similar length, so that little of them is padding."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from data.shards import Tokens


class Buckets:
    """Steps of at most tokens_per_step tokens, padding included, each dealt out to micro-batches of
    about tokens_per_batch.

    Rows are sorted by length and cut into steps that are as full as that allows. Training: every
    epoch shuffles the rows of equal length and the order of the steps, with the seed; each row
    comes once. The lengths in sorted order are the same in every epoch, and so are the cuts: the
    number of steps is fixed. How many micro-batches, and so processes, share a step changes
    nothing about what is in it. An evaluation: the same batches of tokens_per_batch each time.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        tokens_per_batch: int,
        tokens_per_step: int,
        *,
        seed: int,
        training: bool,
    ):
        self.lengths, self.seed, self.training = lengths, seed, training
        self.parts = max(1, tokens_per_step // tokens_per_batch) if training else 1
        self.order = np.argsort(lengths, kind="stable")
        self.cuts = cut(lengths[self.order], self.parts * tokens_per_batch)
        self.n_batches = (len(self.cuts) - 1) * self.parts
        self.epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows in the order that the cuts divide, order of the steps). The last two are kept."""
        if number not in self.epochs:
            random = np.random.default_rng((self.seed, number))
            shuffled = random.permutation(self.order)
            rows = shuffled[np.argsort(self.lengths[shuffled], kind="stable")]
            self.epochs = {k: v for k, v in self.epochs.items() if abs(k - number) < 2}
            self.epochs[number] = rows, random.permutation(len(self.cuts) - 1)
        return self.epochs[number]

    def batch(self, i: int) -> tuple[int, np.ndarray, bool]:
        """(epoch, rows, False) of micro-batch i. The last step of an epoch may have fewer rows
        than parts: (epoch, one row that is not to be counted, True) then."""
        rows, (i, part), number = self.order, divmod(i, self.parts), 0
        if self.training:
            number, i = divmod(i, len(self.cuts) - 1)
            rows, steps = self.epoch(number)
            i = steps[i]
        step = rows[self.cuts[i] : self.cuts[i + 1]]
        if part >= len(step):
            return number, step[:1], True
        return number, step[part :: self.parts], False

    def describe(self, sides: np.ndarray | None = None) -> str:
        """Of training: the steps of an epoch and how much of them is padding, as they are before
        any shuffling; that changes little. Of an evaluation: nothing. sides (rows, k): the lengths
        of k sequences, each padded by itself; None: rows are one each."""
        if not self.training:
            return ""
        sides = self.lengths[:, None] if sides is None else sides
        steps = [sides[self.order[a:b]] for a, b in pairwise(self.cuts)]
        filled = sum(len(step) * int(step.max(0).sum()) for step in steps)
        padding = 1 - int(sides.sum()) / filled
        return f", {len(steps):,} steps with {padding:.1%} padding"


class InBuckets:
    """A data class whose rows share batches with rows of similar length: steps of at most
    tokens_per_step tokens, padding included, each dealt out to micro-batches of about
    tokens_per_batch = batch_size · block_size; each row once an epoch."""

    def make_buckets(
        self,
        lengths: np.ndarray,
        split: str,
        *,
        block_size: int,
        batch_size: int,
        tokens_per_step: int = 0,
        seed: int = 0,
    ) -> None:
        """lengths (rows,) are those of all rows that are to be learnt from, or scored."""
        self.tokens_per_batch = batch_size * block_size
        self.buckets = Buckets(
            lengths, self.tokens_per_batch, tokens_per_step, seed=seed, training=split == "train"
        )
        self.n_batches = self.buckets.n_batches
        self.tokens_per_epoch = self.n_batches * self.tokens_per_batch


def cut(lengths: np.ndarray, tokens: int) -> list[int]:
    """Ascending lengths -> borders of steps with (number of rows) · (longest) <= tokens."""
    cuts, begin = [0], 0
    while begin < len(lengths):
        end = begin + max(1, tokens // int(lengths[begin]))
        while end > begin + 1 and (
            end > len(lengths) or (end - begin) * int(lengths[end - 1]) > tokens
        ):
            end -= 1
        cuts.append(end)
        begin = end
    return cuts


def evenly(n: int, wanted: int) -> np.ndarray:
    """`wanted` of the numbers 0 to n - 1, evenly spaced."""
    return np.arange(wanted, dtype=np.int64) * n // wanted


def evenly_within(n: int, tokens: int, max_tokens: int, least: int = 1) -> np.ndarray:
    """Which of n rows with so many tokens an evaluation scores: evenly spaced ones that have about
    max_tokens, at least so many rows; all of them if that is 0, or more than there are."""
    wanted = max(least, n * max_tokens // tokens) if max_tokens else n
    return evenly(n, min(wanted, n))


def positions_of(ids: Tokens, token: int, block: int = 1 << 24) -> np.ndarray:
    """Where `token` is, read in blocks: the ids may be a file larger than memory."""
    places = [
        np.flatnonzero(ids[start : start + block] == token) + start
        for start in range(0, len(ids), block)
    ]
    return np.concatenate([np.empty(0, np.int64), *places])


def pad_rows(
    rows: Sequence[Sequence[int] | np.ndarray], fill: int, behind: int = 0
) -> tuple[Tensor, Tensor]:
    """((B, L) ids with `fill` behind shorter rows, (B, L) bool, False at that padding, but for as
    many as `behind` each row)"""
    lengths = np.array([len(row) + behind for row in rows])
    padded = np.full((len(rows), lengths.max()), fill, dtype=np.int64)
    for into, row in zip(padded, rows, strict=True):
        into[: len(row)] = row
    return torch.from_numpy(padded), torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])
