"""Rows of known lengths -> batches of rows of similar length, so that little of them is padding."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from data.shards import Tokens


class Buckets:
    """Steps of at most tokens_per_step tokens, padding included. Each step is divided into
    micro-batches of about tokens_per_batch tokens.

    Rows are sorted by length and cut into steps that are as full as that allows. In training, every
    epoch shuffles the rows of equal length and the order of the steps, with the seed; each row
    comes once. The sorted lengths are the same in every epoch, and so are the cuts and the number
    of steps. What is in a step does not depend on how many micro-batches, and so processes, share
    it. An evaluation has the same batches of tokens_per_batch tokens each time.
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
        """(rows in the order that the cuts divide, order of the steps). An epoch's neighbour stays
        in memory beside it."""
        if number not in self.epochs:
            random = np.random.default_rng((self.seed, number))
            shuffled = random.permutation(self.order)
            rows = shuffled[np.argsort(self.lengths[shuffled], kind="stable")]
            self.epochs = {k: v for k, v in self.epochs.items() if abs(k - number) < 2}
            self.epochs[number] = rows, random.permutation(len(self.cuts) - 1)
        return self.epochs[number]

    def batch(self, i: int) -> tuple[int, np.ndarray, bool]:
        """(epoch, rows, False) of micro-batch i. A step may have fewer rows than micro-batches: for
        one without a row of its own, (epoch, one row that must not be counted, True)."""
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
        """For training, how many steps an epoch has and how much of them is padding, as they are
        before any shuffling, which changes little; for an evaluation, nothing. sides (rows, k): the
        lengths of the k sequences of each row, which are padded separately; None: a row is one."""
        if not self.training:
            return ""
        sides = self.lengths[:, None] if sides is None else sides
        steps = [sides[self.order[a:b]] for a, b in pairwise(self.cuts)]
        filled = sum(len(step) * int(step.max(0).sum()) for step in steps)
        padding = 1 - int(sides.sum()) / filled
        return f", {len(steps):,} steps with {padding:.1%} padding"


class InBuckets:
    """A data class whose rows share batches with rows of similar length. Steps have at most
    tokens_per_step tokens, padding included, and are divided into micro-batches of about
    tokens_per_batch = batch_size · block_size tokens; each row comes once an epoch."""

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
        """lengths (rows,): the tokens of each row that is trained on, or scored."""
        self.tokens_per_batch = batch_size * block_size
        self.buckets = Buckets(
            lengths, self.tokens_per_batch, tokens_per_step, seed=seed, training=split == "train"
        )
        self.n_batches = self.buckets.n_batches
        self.tokens_per_epoch = self.n_batches * self.tokens_per_batch


def cut(lengths: np.ndarray, tokens: int) -> list[int]:
    """Ascending lengths -> borders of steps with (number of rows) · (longest) <= tokens. A row
    that is longer than `tokens` is a step by itself."""
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
    """Which of n rows, with `tokens` tokens in all, an evaluation scores: evenly spaced ones that
    have about max_tokens, but not fewer than `least` rows; all n rows if max_tokens is 0 or more
    than there are."""
    wanted = max(least, n * max_tokens // tokens) if max_tokens else n
    return evenly(n, min(wanted, n))


def positions_of(ids: Tokens, token: int, block: int = 1 << 24) -> np.ndarray:
    """The places of `token` in the ids, which are read in blocks, as they may be a file larger than
    memory."""
    places = [
        np.flatnonzero(ids[start : start + block] == token) + start
        for start in range(0, len(ids), block)
    ]
    return np.concatenate([np.empty(0, np.int64), *places])


def pad_rows(
    rows: Sequence[Sequence[int] | np.ndarray], fill: int, behind: int = 0
) -> tuple[Tensor, Tensor]:
    """((B, L) ids, shorter rows filled up with `fill`; (B, L) bool, False at the padding). The
    first `behind` places of `fill` after a row count as part of it: they are True."""
    lengths = np.array([len(row) + behind for row in rows])
    padded = np.full((len(rows), lengths.max()), fill, dtype=np.int64)
    for into, row in zip(padded, rows, strict=True):
        into[: len(row)] = row
    return torch.from_numpy(padded), torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])
