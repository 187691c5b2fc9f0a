"""Pairs of texts that mean the same, for a BERT that turns texts into comparable vectors.

The class fulfils what `data/windows.py` says of every data class. In a batch of B pairs (a, b),
each a is to be found nearest to its own b; the other B - 1 are its negatives (in-batch negatives:
Henderson et al. 2017, arXiv:1705.00652, section 4.4; the loss is InfoNCE, van den Oord et al. 2018,
arXiv:1807.03748, and MultipleNegativesRankingLoss in sentence-transformers, Reimers and Gurevych
2019, arXiv:1908.10084). A pair of a text with itself is allowed: dropout makes two views of it
(SimCSE, Gao et al. 2021, arXiv:2104.08821).

Here the batch is part of the task, not of how it is computed: more pairs are more negatives, and a
larger loss, up to log B by chance. So a step is one batch. Dividing it between micro-batches or
processes would change the negatives, and is refused.

What means the same as a pair may be no negative of it. Texts that the table joins, directly or by
other pairs (a-b and b-c join a with c), are one group, and a batch has one pair of a group at most.

Left out: negatives that the table names, scores (every row means "the same": a column that says
otherwise is not looked at), negatives gathered from all processes, other losses.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.buckets import evenly_within, pad_rows
from data.encoding import CLS, PAD, SEP, SPECIAL, assemble, encode_text
from data.tables import Row, TableCorpus, open_tables
from data.tokens import SPLITS, AnyTokenizer, get_tokenizer, settings

FORMS = [("a", "b"), ("text", "text_b"), ("sentence1", "sentence2")]
SHOWN = 3  # pairs, after training
TIE = 1e-6  # cosines of float32 vectors that are closer than this count as equal
BLOCK = 1024  # rows of similarities held at a time


class SimilarPairs:
    """Batches of a fixed number of pairs: as many as fit into tokens_per_batch = batch_size ·
    block_size if all 2B texts have row_length tokens; longer ones are cut. A smaller row_length
    means more negatives. Each pair once an epoch, dealt to batches at random: sorted by length they
    would have little padding, and the same company in every epoch.

    Validation: always the same batches; if max_tokens is less than all, evenly spaced pairs.
    """

    def __init__(
        self,
        corpus: TableCorpus,
        split: str,
        tokenizer: AnyTokenizer,
        *,
        block_size: int,
        batch_size: int,
        row_length: int = 0,
        tokens_per_step: int = 0,
        seed: int = 0,
        max_tokens: int = 0,
    ):
        self.training, self.row_length = split == "train", min(row_length or block_size, block_size)
        self.tokenizer, self.split, self.seed = tokenizer, split, seed
        self.fingerprint, self.rule = corpus.hash, corpus.rule
        shown = corpus.splits["validation"][:SHOWN]
        self.prompts = [text for row in shown for text in row.texts]
        self.tokens_per_batch = batch_size * block_size
        if self.training and tokens_per_step not in (0, self.tokens_per_batch):
            raise ValueError(
                f"--tokens_per_step {tokens_per_step} is divided into micro-batches of "
                f"{self.tokens_per_batch} tokens, and pairs of different ones would be no "
                f"negatives: choose --batch_size {max(1, tokens_per_step // block_size)} and a "
                "single process"
            )
        fits = self.tokens_per_batch // (2 * self.row_length)
        if fits < 2 or self.row_length < 3:
            raise ValueError(
                f"a step of {self.tokens_per_batch} tokens has no two pairs of texts of "
                f"{self.row_length} tokens (3 at least): choose another --tokens_per_step or "
                "--row_length"
            )
        bar = tqdm(corpus.splits[split], f"tokenizing {split}", unit=" pairs", disable=None)
        pairs = [tuple(encode_text(tokenizer, text) for text in row.texts) for row in bar]
        self.n_all, room = len(pairs), self.row_length - 2  # for what is between [CLS] and [SEP]
        tokens = sum(min(len(text), room) + 2 for pair in pairs for text in pair)
        limit = 0 if self.training else max_tokens
        # One alone would have no negative.
        pairs = [pairs[i] for i in evenly_within(self.n_all, tokens, limit, least=2)]
        self.cut = sum(len(text) > room for pair in pairs for text in pair)
        ends = tokenizer.special_tokens[CLS], tokenizer.special_tokens[SEP]
        self.pairs = [
            [assemble([np.array(text[:room], dtype=np.int64)], *ends)[0] for text in pair]
            for pair in pairs
        ]
        self.n_batches = math.ceil(len(pairs) / fits)
        self.tokens_per_epoch = self.n_batches * self.tokens_per_batch
        self.group, self.b_number = groups(pairs)
        self.epochs: dict[int, np.ndarray] = {}
        self.asked = sum(int(self.has_negatives(self.rows(i)).sum()) for i in range(self.n_batches))
        if not self.asked:
            raise ValueError(
                f"none of the {len(pairs):,} pairs of {corpus.name} for {split} has a negative, a "
                "text of other meaning in its batch: give more pairs"
            )

    @classmethod
    def splits(cls, config, sizes: dict, tokenizer: AnyTokenizer | None = None):
        """(train, validation) of a table with the columns a and b (or other names in FORMS); the
        tokenizer is learnt from the training pairs unless given."""
        corpus = open_tables(config.data, config.valid, FORMS, collapse=True)
        learnt = replace(corpus, splits={"train": spaced(corpus.splits["train"])})
        tokenizer = tokenizer or get_tokenizer(config, sizes, learnt, SPECIAL)
        more = settings(config, sizes, "row_length", "tokens_per_step")
        return tuple(cls(corpus, split, tokenizer, **more) for split in SPLITS)

    def rows(self, i: int) -> np.ndarray:
        """The pairs of batch i. All pairs are put into a row, group after group, and dealt out one
        by one: two of a group meet only where it has more pairs than there are batches."""
        epoch, i = divmod(i, self.n_batches)
        if epoch not in self.epochs:
            place = np.arange(self.group.max() + 1)
            if self.training:
                place = np.random.default_rng((self.seed, epoch)).permutation(place)
            self.epochs = {k: v for k, v in self.epochs.items() if abs(k - epoch) < 2}
            self.epochs[epoch] = np.argsort(place[self.group], kind="stable")
        return self.epochs[epoch][i :: self.n_batches]

    def has_negatives(self, rows: np.ndarray) -> np.ndarray:
        """(B,) bool: whether all others in a batch are negatives of this one, and there are any."""
        return (np.bincount(self.group[rows])[self.group[rows]] == 1) & (len(rows) > 1)

    def batch(self, i: int) -> dict[str, Tensor]:
        """{"tokens": (2B, T), the a's before the b's, "targets": (B,)} and, if some texts are
        shorter than others, "keep": (2B, T), False at padding. targets[j] is j, for row B + j
        belongs to row j, and -100 where a group is there twice."""
        rows = self.rows(i)
        texts = [self.pairs[row][side] for side in (0, 1) for row in rows]
        tokens, keep = pad_rows(texts, self.tokenizer.special_tokens[PAD])
        targets = np.where(self.has_negatives(rows), np.arange(len(rows)), -100)
        batch = {"tokens": tokens, "targets": torch.from_numpy(targets)}
        return batch if keep.all() else {**batch, "keep": keep}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """Loss in nats per a, and the share of those whose nearest b in the batch is their own.
        Both depend on the number of pairs in a batch; what `measure` tells does not."""
        return {name: sums[name] / max(counts["loss"], 1) for name in ("loss", "accuracy")}

    def measure(self, predicted: dict[int, np.ndarray]) -> dict[str, float]:
        """predicted[i] (2B, C) are the vectors of batch i's texts -> {"recall_at_1": share of all
        a's whose own b has the largest cosine among the b's of the whole evaluation, "mrr": mean of
        1 / its rank}. Equal b's count once, those of the own group not at all, and those with the
        same cosine as the own one rank before it."""
        sides: list[list[np.ndarray]] = [[], []]
        for i in range(self.n_batches):
            vectors = predicted[i].astype(np.float64)
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            for side, half in zip(
                sides, np.split(vectors / np.maximum(lengths, 1e-30), 2), strict=True
            ):
                side.append(half)
        a, b = map(np.concatenate, sides)
        rows = np.concatenate([self.rows(i) for i in range(self.n_batches)])
        group = self.group[rows]
        _, first = np.unique(self.b_number[rows], return_index=True)
        own, ranks = (a * b).sum(1), np.empty(len(a))
        for start in range(0, len(a), BLOCK):
            part = slice(start, start + BLOCK)
            # What is not a number is smaller than nothing, and so ranks before.
            before = ~(a[part] @ b[first].T < own[part, None] - TIE)
            ranks[part] = 1 + (before & (group[part, None] != group[first])).sum(1)
        return {
            "recall_at_1": round(float((ranks == 1).mean()), 6),
            "mrr": round(float((1 / ranks).mean()), 6),
        }

    def describe(self) -> str:
        sizes = [len(self.rows(i)) for i in range(self.n_batches)]
        texts = [text for pair in self.pairs for text in pair]
        text = f"{len(self.pairs):,} pairs"
        if len(self.pairs) < self.n_all:
            text += f", evenly spaced among {self.n_all:,}"
        text += f", {sum(map(len, texts)):,} tokens, at most {max(sizes):,} pairs in a batch"
        if self.asked < len(self.pairs):
            text += f"; {len(self.pairs) - self.asked:,} not asked for, as others mean the same"
        if self.cut:
            text += f"; {self.cut:,} texts are cut to {self.row_length:,} tokens"
        return text


def groups(pairs: list[tuple[list[int], list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of ids -> (number of the group (n,), number of the text b (n,)). Texts are equal if
    their ids are, before they are cut; a group is what pairs join (a union-find)."""
    numbers: dict[tuple[int, ...], int] = {}
    texts = [[numbers.setdefault(tuple(ids), len(numbers)) for ids in pair] for pair in pairs]
    parent = list(range(len(numbers)))

    def root(text: int) -> int:
        while parent[text] != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    for a, b in texts:
        parent[root(a)] = root(b)
    _, group = np.unique([root(a) for a, _ in texts], return_inverse=True)
    return group, np.array([b for _, b in texts])


def spaced(rows: list[Row]) -> list[Row]:
    """The rows as `encode_text` reads them, for a tokenizer to learn from."""
    return [Row(line, tuple(f" {text}" for text in texts)) for line, texts in rows]
