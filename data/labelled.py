"""A classifier's data: texts, or pairs of texts, and the label of each.

The class fulfils what `data/windows.py` says of every data class; beside that it has `labels`, and
`measure` for what only all predictions together tell. What is read and how it is split is in
`data/examples.py`.

A row is [CLS] text [SEP], or [CLS] text [SEP] text_b [SEP] with the second part in segment 1
(Devlin et al. 2019, arXiv:1810.04805, section 4.1). Left out: windows over texts longer than a row,
which are cut instead.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.buckets import Buckets, evenly_within, pad_rows
from data.encoding import CLS, PAD, SEP, SPECIAL, assemble, encode_text
from data.examples import LabelledCorpus, open_labelled
from data.tokens import SPLITS, AnyTokenizer, get_tokenizer, settings
from scores import accuracy, confusion_matrix, macro_f1


def encode_parts(
    tokenizer: AnyTokenizer, texts: Sequence[str], length: int
) -> tuple[list[np.ndarray], bool]:
    """One text or two -> (their ids, whether they were cut to fit, with [CLS] and a [SEP] each,
    into `length` tokens). The longer text loses its end first; of equal ones, the second."""
    n, parts = len(texts), [np.array(encode_text(tokenizer, text), np.int32) for text in texts]
    room = length - 1 - n
    if room < n:
        raise ValueError(
            f"rows of {length} tokens have no room for {n} text{'s' * (n > 1)}: choose "
            f"{1 + 2 * n} or more (--block_size or --row_length)"
        )
    cut = sum(map(len, parts)) > room
    if cut:
        most = max(room - room // 2, room - len(parts[1])) if n > 1 else room
        parts[0] = parts[0][:most]
        parts[1:] = [part[: room - len(parts[0])] for part in parts[1:]]
    return parts, cut


def collate(rows: Sequence[list[np.ndarray]], tokenizer: AnyTokenizer) -> dict[str, Tensor]:
    """Rows of one text, or all of two -> {"tokens": (B, T)}; for pairs also "segments": (B, T);
    if some rows are shorter than others, "keep": (B, T), False at padding."""
    special = tokenizer.special_tokens
    ids, segments = zip(*(assemble(r, special[CLS], special[SEP]) for r in rows), strict=True)
    tokens, keep = pad_rows(ids, special[PAD])
    batch = {"tokens": tokens}
    if len(rows[0]) > 1:
        batch["segments"], _ = pad_rows(segments, 0)
    return batch if keep.all() else {**batch, "keep": keep}


class LabelledTexts:
    """Steps of at most tokens_per_step tokens, padding included, each dealt out to micro-batches
    of about tokens_per_batch = batch_size · block_size, by `Buckets`: each row once an epoch.

    class_weights: a training batch weighs a row by n / (k · its label's rows), so that each of the
    k labels that occur has the same weight in all, and a row the weight 1 on average.
    Validation: in order, never weighted; if max_tokens is less than the text, evenly spaced rows.
    """

    def __init__(
        self,
        corpus: LabelledCorpus,
        split: str,
        tokenizer: AnyTokenizer,
        *,
        block_size: int,
        batch_size: int,
        row_length: int = 0,
        class_weights: bool = False,
        tokens_per_step: int = 0,
        seed: int = 0,
        max_tokens: int = 0,
    ):
        training = split == "train"
        self.tokenizer, self.split, self.fingerprint = tokenizer, split, corpus.hash
        self.rule, self.prompts, self.labels = corpus.rule, corpus.prompts, corpus.labels
        self.tokens_per_batch = batch_size * block_size
        self.row_length = min(row_length or block_size, block_size)
        examples, index = corpus.splits[split], {x: i for i, x in enumerate(self.labels)}
        bar = tqdm(examples, f"tokenizing {split}", unit=" texts", disable=None)
        found = [encode_parts(tokenizer, x.texts, self.row_length) for x in bar]
        self.rows, cut = zip(*found, strict=True)
        self.pairs = len(self.rows[0]) > 1
        self.n_cut = sum(cut)
        self.targets = np.array([index[example.label] for example in examples], np.int64)
        lengths = np.array([1 + sum(len(part) + 1 for part in parts) for parts in self.rows])
        limit = 0 if training else max_tokens
        self.chosen = evenly_within(len(lengths), int(lengths.sum()), limit)
        self.weights = None
        if class_weights and training:
            counts = np.bincount(self.targets)
            each = len(lengths) / (np.count_nonzero(counts) * counts[self.targets])
            self.weights = each.astype(np.float32)
        lengths = lengths[self.chosen]
        self.buckets = Buckets(
            lengths, self.tokens_per_batch, tokens_per_step, seed=seed, training=training
        )
        self.n_batches = self.buckets.n_batches
        self.tokens_per_epoch = self.n_batches * self.tokens_per_batch
        self.confusion: np.ndarray | None = None  # (k, k), of the last evaluation

    @classmethod
    def splits(cls, config, sizes: dict, tokenizer: AnyTokenizer | None = None):
        """(train, validation); a vocabulary, if none is given, is learnt from the training text."""
        corpus = open_labelled(config.data, valid=config.valid, labels=sizes["labels"])
        tokenizer = tokenizer or get_tokenizer(config, sizes, corpus, SPECIAL)
        more = settings(config, sizes, "row_length", "tokens_per_step", "class_weights")
        return tuple(cls(corpus, split, tokenizer, **more) for split in SPLITS)

    def batch(self, i: int) -> dict[str, Tensor]:
        """What `collate` makes and {"targets": (B,)}, indices into labels; with class_weights in
        training also "weights": (B,)."""
        _, rows, empty = self.buckets.batch(i)
        rows = self.chosen[rows]
        batch = collate([self.rows[row] for row in rows], self.tokenizer)
        batch["targets"] = torch.from_numpy(self.targets[rows])
        if empty:
            batch["targets"].fill_(-100)
        if self.weights is not None:
            batch["weights"] = torch.from_numpy(self.weights[rows])
        return batch

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """Loss in nats and share of right answers, per text."""
        return {name: sums[name] / max(counts["loss"], 1) for name in ("loss", "accuracy")}

    def measure(self, predicted: dict[int, np.ndarray]) -> dict[str, float]:
        """predicted[i] (B,) are the class indices that the model gave the rows of batch i."""
        k = len(self.labels)
        self.confusion = np.zeros((k, k), np.int64)
        for i, classes in predicted.items():
            gold = self.targets[self.chosen[self.buckets.batch(i)[1]]]
            self.confusion += confusion_matrix(gold, classes, k)
        figures = {"accuracy": accuracy(self.confusion), "macro_f1": macro_f1(self.confusion)}
        return {name: round(value, 6) for name, value in figures.items()}

    def describe(self) -> str:
        lengths, counts = self.buckets.lengths, np.bincount(self.targets[self.chosen])
        counts = counts[counts > 0]
        text = f"{len(self.chosen):,} {'pairs of texts' if self.pairs else 'texts'}"
        if len(self.chosen) < len(self.rows):
            text += f", evenly spaced among {len(self.rows):,}"
        text += f", {len(counts)} label{'s' * (len(counts) > 1)} with {counts.min():,} to "
        text += f"{counts.max():,} each, {lengths.sum():,} tokens"
        text += self.buckets.describe()
        if self.n_cut:
            text += f"; {self.n_cut:,} cut to {self.row_length} tokens"
        return text
