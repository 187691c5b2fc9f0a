"""BERT's data: rows of text in which some words are hidden, and asked for.

The class fulfils what `data/windows.py` says of every data class. The rows themselves, pairs of
sentences or packed text, come from `data/sentence_pairs.py`; here they get [CLS] and [SEP], are
masked, and become batches of similar length.

Masking is as in Devlin et al. 2019 (arXiv:1810.04805, section 3.1 and appendix A.1), and dynamic
as in RoBERTa (arXiv:1907.11692, section 4.1): another choice in every epoch. It is a pure function
of (seed, epoch, row), like everything else that is drawn here.
"""

import math
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from data.buckets import Buckets, evenly_within, pad_rows
from data.encoding import CLS, MASK, PAD, SEP, SPECIAL, assemble
from data.sentence_pairs import PackedText, SentencePairs
from data.sentences import SentenceCorpus, open_sentences
from data.tokens import AnyTokenizer, TokenFile, both_splits

EVALUATED_RATE = 0.15  # of tokens in an evaluation, however training masks: so that runs compare
HIDDEN, REPLACED = 0.8, 0.1  # of the chosen tokens: by [MASK], by a random token; the rest stays


class MaskedText:
    """Steps of at most tokens_per_step tokens, padding included, each dealt out to micro-batches
    of about tokens_per_batch = batch_size · block_size, by `Buckets`: each row once an epoch.
    Rows of fewer tokens (row_length) make a step of more rows.

    Validation: in order, always with the same rows and masks, 15% of the tokens; if max_tokens is
    less than the text, evenly spaced rows of it.
    """

    def __init__(
        self,
        file: TokenFile,
        corpus: SentenceCorpus,
        split: str,
        tokenizer: AnyTokenizer,
        *,
        block_size: int,
        batch_size: int,
        nsp: bool = True,
        mlm_rate: float = EVALUATED_RATE,
        whole_words: bool = False,
        row_length: int = 0,
        tokens_per_step: int = 0,
        seed: int = 0,
        max_tokens: int = 0,
    ):
        training, T = split == "train", min(row_length or block_size, block_size)
        self.tokenizer, self.fingerprint, self.split = tokenizer, corpus.hash, split
        # What is too long for the model is not shown; its [MASK] would be among what is cut off.
        fits = [p for p in corpus.prompts if len(tokenizer.encode(p)) < block_size - 2]
        self.prompts, self.rule = fits, corpus.rule
        self.seed = seed if training else 0
        self.rate = mlm_rate if training else EVALUATED_RATE
        self.tokens_per_batch = batch_size * block_size
        what = f"the {'training' if training else 'validation'} text of {corpus.name}"
        border = tokenizer.special_tokens[SEP]
        place = {"seed": self.seed, "what": what}
        if nsp:
            self.rows = SentencePairs(file.ids, border, T, **place)
        else:
            self.rows = PackedText(file.ids, border, T, training=training, **place)
        lengths, self.n_all = self.rows.lengths, len(self.rows.lengths)
        limit = 0 if training else max_tokens
        self.chosen = evenly_within(self.n_all, int(lengths.sum()), limit)
        lengths = lengths[self.chosen]
        self.buckets = Buckets(
            lengths, self.tokens_per_batch, tokens_per_step, seed=self.seed, training=training
        )
        self.n_batches = self.buckets.n_batches
        self.tokens_per_epoch = self.n_batches * self.tokens_per_batch
        self.masking = Masking(tokenizer, whole_words and training)

    @classmethod
    def splits(cls, config, sizes: dict, tokenizer: AnyTokenizer | None = None):
        """(train, validation); the vocabulary is learnt from the training text only."""
        corpus = open_sentences(
            config.data,
            Path(config.cache_dir),
            valid=config.valid,
            layout=config.layout,
            by_sentence=sizes["nsp"],
        )
        names = ("tokens_per_step", "mlm_rate", "whole_words", "row_length")
        more = {"nsp": sizes["nsp"], **{name: getattr(config, name) for name in names}}
        return both_splits(
            cls, corpus, config, sizes, tokenizer, special_tokens=SPECIAL, border=SEP, **more
        )

    def batch(self, i: int) -> dict[str, Tensor]:
        """{"tokens": (B, T), "mlm_positions": (N,), "mlm_targets": (N,)}, the positions in the
        flattened (B·T) batch; for pairs also "segments": (B, T) and "nsp_targets": (B,); if some
        rows are shorter than others, "keep": (B, T), False at padding."""
        epoch, rows, empty = self.buckets.batch(i)
        special = self.tokenizer.special_tokens
        inputs, segments, labels, positions, targets = [], [], [], [], []
        for row in self.chosen[rows]:
            # Not row 0: numpy pads a seed with zeros, and the order of the epoch has (seed, epoch).
            random = np.random.default_rng((self.seed, epoch, row + 1))
            parts, label = self.rows.row(epoch, row, random)
            ids, segment = assemble(parts, special[CLS], special[SEP])
            hidden, places = self.masking(ids, self.rate, random)
            inputs.append(hidden)
            segments.append(segment)
            labels.append(label)
            positions.append(places)
            targets.append(ids[places])
        tokens, keep = pad_rows(inputs, special[PAD])
        starts = np.arange(len(rows)) * tokens.size(1)
        found = np.concatenate([p + s for p, s in zip(positions, starts, strict=True)])
        batch = {
            "tokens": tokens,
            "mlm_positions": torch.from_numpy(found),
            "mlm_targets": torch.from_numpy(np.concatenate(targets)),
        }
        if labels[0] is not None:
            batch["segments"], _ = pad_rows(segments, 0)
            batch["nsp_targets"] = torch.tensor(labels)
        if not keep.all():
            batch["keep"] = keep
        if empty:
            for name in batch:
                if name.endswith("targets"):
                    batch[name].fill_(-100)
        return batch

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """Losses per target, their sum, MLM's perplexity, and the shares of right answers."""
        mean = {name: s / max(counts[name.partition("_")[0]], 1) for name, s in sums.items()}
        report = {"loss": mean["mlm"] + mean.get("nsp", 0.0), **mean}
        return {**report, "perplexity": math.exp(min(mean["mlm"], 700))}

    def describe(self) -> str:
        lengths = self.buckets.lengths
        text = self.rows.describe(self.chosen)
        if len(self.chosen) < self.n_all:
            text += f", evenly spaced among {self.n_all:,}"
        text += f", {lengths.sum():,} tokens, {self.rate:.0%} of them asked for"
        text += self.buckets.describe()
        return text


class Masking:
    """Hides some of a row's tokens, never a special one.

    whole_words: all tokens of a word or none. A word goes on where it could behind the one token
    and before the other (the tokenizer's word_edges). A word of more tokens than are to be chosen
    in the row never is; text without spaces, as Chinese is, has words as long as its
    sentences, and is masked token by token where none fits.
    """

    def __init__(self, tokenizer: AnyTokenizer, whole_words: bool = False):
        self.mask = tokenizer.special_tokens[MASK]
        self.ordinary = np.zeros(tokenizer.vocab_size, dtype=bool)
        self.ordinary[tokenizer.ordinary_ids()] = True
        self.vocabulary = np.flatnonzero(self.ordinary)
        self.whole_words = whole_words
        if whole_words:
            self.starts, self.ends = (np.zeros(tokenizer.vocab_size, dtype=bool) for _ in "ab")
            for i in self.vocabulary:
                self.starts[i], self.ends[i] = tokenizer.word_edges(i)

    def __call__(
        self, ids: np.ndarray, rate: float, random: Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids with some of them changed, the places (N,) of those to be told). On average `rate`
        of the ordinary tokens are chosen, one at least."""
        places = np.flatnonzero(self.ordinary[ids])
        count = max(1, int(rate * len(places) + random.random()))
        chosen = places[np.sort(self.choose(ids[places], count, random))]
        hidden, draws = ids.copy(), random.random(len(chosen))
        hidden[chosen[draws < HIDDEN]] = self.mask
        replaced = chosen[(draws >= HIDDEN) & (draws < HIDDEN + REPLACED)]
        words = random.integers(len(self.vocabulary), size=len(replaced))  # faster than choice
        hidden[replaced] = self.vocabulary[words]
        return hidden, chosen

    def choose(self, ids: np.ndarray, count: int, random: Generator) -> np.ndarray:
        """`count` of the indices of ids; of whole words, as many as fit into the count."""
        if self.whole_words and len(ids):
            inside = np.append(False, self.ends[ids[:-1]] & self.starts[ids[1:]])
            word = np.cumsum(~inside) - 1
            size = np.bincount(word)
            order = random.permutation(np.flatnonzero(size <= count))
            taken = order[np.cumsum(size[order]) <= count]
            if len(taken):
                return np.flatnonzero(np.isin(word, taken))
        return random.permutation(len(ids))[:count]
