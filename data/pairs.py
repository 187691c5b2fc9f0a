"""The data of the encoder-decoder: pairs of a source and a target, in batches of equal length.

The class fulfils what `data/windows.py` says of every data class. A pair is kept as two documents
of a token file, source then target, each behind its <|endoftext|>. That token ends the source, and
the target both begins and ends with it; only Marian's tokenizers have a start token of their own.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.buckets import Buckets, evenly_within, find, pad_rows
from data.parallel import ParallelCorpus, open_pairs
from data.sentencepieces import START
from data.tokens import END_OF_TEXT, AnyTokenizer, TokenFile, both_splits


class Pairs:
    """Steps of at most tokens_per_step tokens on the longer side, each dealt out to micro-batches
    of about tokens_per_batch = batch_size · block_size, by `Buckets`: each pair once an epoch.

    Validation: in order; if max_tokens is less than all, evenly spaced pairs. Pairs with a side of
    more than block_size tokens are left out, and counted.
    """

    def __init__(
        self,
        file: TokenFile,
        corpus: ParallelCorpus,
        split: str,
        tokenizer: AnyTokenizer,
        *,
        block_size: int,
        batch_size: int,
        tokens_per_step: int = 0,
        seed: int = 0,
        max_tokens: int = 0,
    ):
        self.ids, self.fingerprint, self.tokenizer = file.ids, corpus.hash, tokenizer
        self.prompts, self.rule = corpus.prompts, corpus.rule
        self.split = split
        self.start, self.end = start_and_end(tokenizer)
        self.tokens_per_batch = batch_size * block_size
        # borders[2i], borders[2i + 1], borders[2i + 2]: source i begins, target i begins, both end.
        self.borders = np.append(find(file.ids, self.end), len(file.ids))
        self.lengths = np.diff(self.borders).reshape(-1, 2)  # each with its end token
        longer = self.lengths.max(1, initial=0)
        self.chosen = np.flatnonzero(longer <= block_size)
        self.too_long, self.block_size = len(longer) - len(self.chosen), block_size
        if not len(self.chosen):
            raise ValueError(
                f"none of the {len(longer):,} pairs for {split} in {corpus.name} fits into "
                f"--block_size {block_size}: choose more, or give more text"
            )
        training, tokens = split == "train", int(longer[self.chosen].sum())
        self.n_all = len(self.chosen)
        limit = 0 if training else max_tokens
        self.chosen = self.chosen[evenly_within(self.n_all, tokens, limit)]
        lengths = longer[self.chosen]
        self.buckets = Buckets(
            lengths, self.tokens_per_batch, tokens_per_step, seed=seed, training=training
        )
        self.n_batches = self.buckets.n_batches
        self.tokens_per_epoch = self.n_batches * self.tokens_per_batch

    @classmethod
    def splits(cls, config, sizes: dict, tokenizer: AnyTokenizer | None = None):
        """(train, validation); the joint vocabulary is learnt from the training side only."""
        cache = Path(config.cache_dir)
        corpus = open_pairs(config.data, cache, languages=config.languages, valid=config.valid)
        step = {"tokens_per_step": config.tokens_per_step}
        return both_splits(cls, corpus, config, sizes, tokenizer, **step)

    def ids_of(self, pair: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, target) ids, without end tokens."""
        begin, middle, end = self.borders[2 * pair : 2 * pair + 3]
        ids = self.ids[begin:end]
        return ids[1 : middle - begin], ids[middle - begin + 1 :]

    def texts(self) -> Iterator[tuple[str, str]]:
        """(source, target) of all pairs, in the order of the text."""
        for pair in self.chosen:
            source, target = self.ids_of(pair)
            yield self.tokenizer.decode(source.tolist()), self.tokenizer.decode(target.tolist())

    def batch(self, i: int) -> dict[str, Tensor]:
        """{"source": (B, S), "tokens": (B, T), "targets": (B, T)} and, if some sources are shorter
        than others, "source_keep": (B, S), False at padding."""
        _, rows, empty = self.buckets.batch(i)
        sources, targets = zip(*map(self.ids_of, self.chosen[rows]), strict=True)
        source, keep = pad(sources, self.end)
        target, scored = pad(targets, self.end)
        scored &= not empty
        # The decoder reads the start token first, then every target but the last.
        tokens = torch.cat([torch.full_like(target[:, :1], self.start), target[:, :-1]], dim=1)
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
        lengths = self.lengths[self.chosen]
        source, target = lengths.sum(0)
        text = f"{len(self.chosen):,} pairs"
        if len(self.chosen) < self.n_all:
            text += f" of {self.n_all:,}, evenly spaced"
        text += f", {source:,} source and {target:,} target tokens"
        text += self.buckets.describe(lengths)
        if self.too_long:
            text += f"; {self.too_long:,} pairs longer than --block_size {self.block_size} left out"
        return text


def start_and_end(tokenizer: AnyTokenizer) -> tuple[int, int]:
    """The ids that a target is written behind and that it, as its source, ends with."""
    end = tokenizer.special_tokens[END_OF_TEXT]
    return tokenizer.special_tokens.get(START, end), end


def pad(rows: Sequence[Sequence[int] | np.ndarray], end: int) -> tuple[Tensor, Tensor]:
    """Behind each row its end token, then padding. ((B, L) ids, (B, L) bool, False at padding)"""
    return pad_rows(rows, end, behind=1)
