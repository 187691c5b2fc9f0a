"""The data of the encoder-decoder: pairs of a source and a target, in batches of equal length.

The class fulfils what `data/windows.py` says of every data class. A pair is kept as two documents
of a token file, source then target, each behind its <|endoftext|>. That token ends the source, and
the target both begins and ends with it.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bpe import Tokenizer
from data.parallel import ParallelCorpus, open_pairs
from data.tokens import END_OF_TEXT, TokenFile
from data.windows import both_splits


class Pairs:
    """Steps of at most tokens_per_step tokens on the longer side, each dealt out to micro-batches
    of about tokens_per_batch = batch_size · block_size.

    Pairs are sorted by the length of their longer side and cut into steps that are as full as that
    allows, so little of a batch is padding. Training: every epoch shuffles the pairs of equal
    length and the order of the steps, with the seed; each pair comes once. The lengths in sorted
    order are the same in every epoch, and so are the cuts: the number of steps is fixed. How many
    micro-batches, and so processes, share a step changes nothing about what is in it.
    Validation: cut into batches, in order; if max_tokens is less than all, evenly spaced pairs.
    Pairs with a side of more than block_size tokens are left out, and counted.
    """

    def __init__(
        self,
        file: TokenFile,
        corpus: ParallelCorpus,
        split: str,
        tokenizer: Tokenizer,
        *,
        block_size: int,
        batch_size: int,
        tokens_per_step: int = 0,
        seed: int = 0,
        max_tokens: int = 0,
    ):
        self.ids, self.fingerprint, self.tokenizer = file.ids, corpus.hash, tokenizer
        self.prompts, self.rule = corpus.prompts, corpus.rule
        self.split, self.seed = split, seed
        self.end = tokenizer.special_tokens[END_OF_TEXT]
        self.tokens_per_batch = batch_size * block_size
        # Micro-batches in a step.
        self.parts = max(1, tokens_per_step // self.tokens_per_batch) if split == "train" else 1
        # borders[2i], borders[2i + 1], borders[2i + 2]: source i begins, target i begins, both end.
        self.borders = np.append(find(file.ids, self.end), len(file.ids))
        lengths = np.diff(self.borders).reshape(-1, 2)  # each with its end token
        longer = lengths.max(1, initial=0)
        fitting = np.flatnonzero(longer <= block_size)
        self.too_long, self.block_size = len(lengths) - len(fitting), block_size
        if not len(fitting):
            raise ValueError(
                f"none of the {len(lengths):,} pairs for {split} in {corpus.name} fits into "
                f"--block_size {block_size}: choose more, or give more text"
            )
        tokens = int(longer[fitting].sum())
        self.n_all = len(fitting)
        if split != "train" and 0 < max_tokens < tokens:
            wanted = max(1, self.n_all * max_tokens // tokens)
            fitting = fitting[np.arange(wanted) * self.n_all // wanted]
        self.order = fitting[np.argsort(longer[fitting], kind="stable")]
        self.longer, self.lengths = longer, lengths
        self.cuts = cut(longer[self.order], self.parts * self.tokens_per_batch)
        self.n_batches = (len(self.cuts) - 1) * self.parts
        self.tokens_per_epoch = self.n_batches * self.tokens_per_batch
        self.epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def splits(cls, config, sizes: dict, tokenizer: Tokenizer | None = None):
        """(train, validation); the joint vocabulary is learnt from the training side only."""
        cache = Path(config.cache_dir)
        corpus = open_pairs(config.data, cache, languages=config.languages, valid=config.valid)
        step = {"tokens_per_step": config.tokens_per_step}
        return both_splits(cls, corpus, config, sizes, tokenizer, **step)

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(pairs in the order that the cuts divide, order of the steps). The last two are kept."""
        if number not in self.epochs:
            random = np.random.default_rng((self.seed, number))
            shuffled = random.permutation(self.order)
            pairs = shuffled[np.argsort(self.longer[shuffled], kind="stable")]
            self.epochs = {k: v for k, v in self.epochs.items() if abs(k - number) < 2}
            self.epochs[number] = pairs, random.permutation(len(self.cuts) - 1)
        return self.epochs[number]

    def ids_of(self, pair: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, target) ids, without end tokens."""
        begin, middle, end = self.borders[2 * pair : 2 * pair + 3]
        return self.ids[begin + 1 : middle], self.ids[middle + 1 : end]

    def texts(self) -> Iterator[tuple[str, str]]:
        """(source, target) of all pairs, in the order of the text."""
        for pair in np.sort(self.order):
            source, target = self.ids_of(pair)
            yield self.tokenizer.decode(source.tolist()), self.tokenizer.decode(target.tolist())

    def batch(self, i: int) -> dict[str, Tensor]:
        """{"source": (B, S), "tokens": (B, T), "targets": (B, T)} and, if some sources are shorter
        than others, "source_keep": (B, S), False at padding."""
        pairs, (i, part) = self.order, divmod(i, self.parts)
        if self.split == "train":
            number, i = divmod(i, len(self.cuts) - 1)
            pairs, steps = self.epoch(number)
            i = steps[i]
        step = pairs[self.cuts[i] : self.cuts[i + 1]]
        # The last step of an epoch may have fewer pairs than parts: one without targets, then.
        chosen, empty = step[part :: self.parts], part >= len(step)
        if empty:
            chosen = step[:1]
        sources, targets = zip(*map(self.ids_of, chosen), strict=True)
        source, keep = pad(sources, self.end)
        target, scored = pad(targets, self.end)
        scored &= not empty
        # The decoder reads the end token first, then every target but the last.
        tokens = torch.cat([torch.full_like(target[:, :1], self.end), target[:, :-1]], dim=1)
        batch = {"source": source, "tokens": tokens, "targets": target.masked_fill(~scored, -100)}
        return batch if keep.all() else {**batch, "source_keep": keep}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The smoothed loss that training minimises; without smoothing, per target token."""
        nll = sums["nll"] / max(counts["loss"], 1)
        return {
            "loss": sums["loss"] / max(counts["loss"], 1),
            "nll": nll,
            "perplexity": math.exp(min(nll, 700)),
        }

    def describe(self) -> str:
        source, target = self.lengths[self.order].sum(0)
        text = f"{len(self.order):,} pairs"
        if len(self.order) < self.n_all:
            text += f" of {self.n_all:,}, evenly spaced"
        text += f", {source:,} source and {target:,} target tokens"
        if self.split == "train":
            # Of the steps as they are before any shuffling; that changes little.
            sides = [self.lengths[self.order[a:b]] for a, b in pairwise(self.cuts)]
            padded = sum(len(side) * side.max(0).sum() for side in sides)
            padding = 1 - (source + target) / padded
            text += f", {len(sides):,} steps with {padding:.0%} padding"
        if self.too_long:
            text += f"; {self.too_long:,} pairs longer than --block_size {self.block_size} left out"
        return text


def find(ids: np.ndarray, token: int, block: int = 1 << 24) -> np.ndarray:
    """Where `token` is, read in blocks: the ids may be a file larger than memory."""
    places = [
        np.flatnonzero(ids[start : start + block] == token) + start
        for start in range(0, len(ids), block)
    ]
    return np.concatenate([np.empty(0, np.int64), *places])


def cut(lengths: np.ndarray, tokens: int) -> list[int]:
    """Ascending lengths -> borders of batches with (number of rows) · (longest) <= tokens."""
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


def pad(rows: Sequence[Sequence[int] | np.ndarray], end: int) -> tuple[Tensor, Tensor]:
    """Behind each row its end token, then padding. ((B, L) ids, (B, L) bool, False at padding)"""
    lengths = np.array([len(row) + 1 for row in rows])
    padded = np.full((len(rows), lengths.max()), end, dtype=np.int64)
    for into, row in zip(padded, rows, strict=True):
        into[: len(row)] = row
    return torch.from_numpy(padded), torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])
