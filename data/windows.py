"""GPT's data: windows of a long stream of tokens, each one predicting the token after it.

This is one of the data classes that `checkpoint.TASKS` names. What the training loop asks of each:

    Data.splits(config, sizes, tokenizer) -> (train, validation); config has the flags, sizes are
                 the model's settings. Without a tokenizer, see get_tokenizer
    .batch(i)    a pure function of (seed, split, i) -> {argument of the model's forward: tensor};
                 every tensor whose name ends in "targets" marks "no target" with -100
    .tokens_per_batch, .tokens_per_epoch for training, .n_batches of an evaluation
    .report(sums, counts) -> {name: number}, with "loss" among them, lower is better; both are of
                 a whole evaluation: losses, and whatever else the model sums, and targets
    .tokenizer, .fingerprint (a hash of the text and of its division)
    .prompts     a few inputs as a user would write them, of the validation side where that is a
                 file's: the responses to them show what a model has learnt
    .rule, .describe(): for the plan, how the text was split and how much of it there is

And where a model, in an evaluation, returns more than sums:

    .measure(predicted) -> {name: number}, the task's own figures, to join the report; predicted[i]
                 is what the model returned as "predicted" for batch i, an array, for all batches.
                 Shares are from 0 to 1 (SQuAD's scores in percent, as everywhere), to 6 digits

What a model's head must know of the data are attributes by the names in `finetune.LEARNT`:

    .labels      the names of the classes; the place of a label is its id in targets
    .pairs       whether a label belongs to a pair of texts
    .may_abstain whether a question may have no answer

They replace sizes of the same name. sizes["labels"] are a checkpoint's, and are kept, in their
order; where they are empty, the training data makes them.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bpe import PATTERNS, Tokenizer
from data.download import GPT2_MERGES, GPT2_VOCABULARY, fetch
from data.gpt2_files import read_gpt2_files
from data.shuffle import Feistel, shuffled
from data.text import Corpus, open_corpus
from data.tokens import END_OF_TEXT, AnyTokenizer, TokenFile, load_tokenizer, tokenize

SPLITS = ("train", "validation")
TOKENIZER_CHARACTERS = 100_000_000  # of training text that a new tokenizer is learnt from


class Windows:
    """Windows of T tokens from a token file.

    Training: an epoch is a seeded permutation of all windows, each of them once. The windows of
    each epoch start at another offset, so that a small text is not always cut at the same places.
    Validation: in order, from the first token on; the last window is filled up with -100. If
    max_tokens is less than the text, evenly spaced windows of it.
    """

    def __init__(
        self,
        file: TokenFile,
        corpus: Corpus,
        split: str,
        tokenizer: Tokenizer,
        *,
        block_size: int,
        batch_size: int,
        seed: int = 0,
        max_tokens: int = 0,
    ):
        self.ids, self.text_bytes, self.fingerprint = file.ids, file.text_bytes, corpus.hash
        self.tokenizer, self.prompts, self.rule = tokenizer, corpus.prompts, corpus.rule
        self.name, self.split, self.seed = corpus.name, split, seed
        self.block_size, self.batch_size = block_size, batch_size
        self.tokens_per_batch = batch_size * block_size
        n, T = len(self.ids), block_size
        if split == "train":
            if n < T + 1:
                raise ValueError(
                    f"the training text of {corpus.name} has {n:,} tokens, fewer than the "
                    f"{T + 1:,} of one window: choose --block_size {max(n - 1, 1)} or less, "
                    "or give more text"
                )
            self.max_offset = min(T - 1, n - 1 - T)
            self.n_windows = (n - 1 - self.max_offset) // T
            self.tokens_per_epoch = self.n_windows * T
        else:
            if n < 2:
                raise ValueError(f"the validation text of {corpus.name} is empty: give more text")
            self.n_windows = math.ceil((n - 1) / T)
            wanted = min(self.n_windows, max(1, max_tokens // T) if max_tokens else self.n_windows)
            self.chosen = range(wanted)
            if wanted < self.n_windows:
                self.chosen = [k * self.n_windows // wanted for k in self.chosen]
            self.n_batches = math.ceil(wanted / batch_size)
        self.permutations: dict[int, tuple[int, np.ndarray | Feistel]] = {}

    @classmethod
    def splits(cls, config, sizes: dict, tokenizer: Tokenizer | None = None):
        """(train, validation); the tokenizer is learnt from the training text unless given."""
        corpus = open_corpus(config.data, Path(config.cache_dir))
        return both_splits(cls, corpus, config, sizes, tokenizer)

    def permutation(self, epoch: int) -> tuple[int, np.ndarray | Feistel]:
        """(offset, order) of an epoch. The last two are kept: a batch may span both."""
        if epoch not in self.permutations:
            random = np.random.default_rng((self.seed, epoch))
            offset = int(random.integers(self.max_offset + 1))
            self.permutations = {k: v for k, v in self.permutations.items() if abs(k - epoch) < 2}
            self.permutations[epoch] = offset, shuffled(self.n_windows, random)
        return self.permutations[epoch]

    def starts(self, positions: np.ndarray) -> np.ndarray:
        """Where the windows at these positions of the endless sequence of epochs begin."""
        epochs, places = np.divmod(positions, self.n_windows)
        found = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            offset, order = self.permutation(epoch)
            found[epochs == epoch] = offset + order[places[epochs == epoch]] * self.block_size
        return found

    def batch(self, i: int) -> dict[str, Tensor]:
        """{"tokens": (B, T), "targets": (B, T)}; the last batch of an evaluation may be smaller."""
        T, first = self.block_size, i * self.batch_size
        if self.split == "train":
            starts = self.starts(np.arange(first, first + self.batch_size, dtype=np.int64)).tolist()
        else:
            starts = [window * T for window in self.chosen[first : first + self.batch_size]]
        ids = np.concatenate([self.ids[start : start + T + 1] for start in starts])
        rows = np.full((len(starts), T + 1), -100, dtype=np.int64)
        rows.reshape(-1)[: len(ids)] = (
            ids  # the last window of the text, the last row, may be short
        )
        windows = torch.from_numpy(rows)
        tokens, targets = windows[:, :-1], windows[:, 1:]
        return {"tokens": tokens.clamp(min=0), "targets": targets.contiguous()}

    @property
    def scored_bytes(self) -> int:
        """Bytes of text behind the evaluation's targets; <|endoftext|> stands for none."""
        if not hasattr(self, "_scored_bytes"):
            length = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
            for token, i in self.tokenizer.ranks.items():
                length[i] = len(token)
            T = self.block_size
            self._scored_bytes = sum(
                int(length[self.ids[w * T + 1 : w * T + T + 1]].sum()) for w in self.chosen
            )
        return self._scored_bytes

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """Loss in nats per token, its perplexity, and the loss in bits per byte, which no choice of
        tokenizer changes."""
        loss = sums["loss"] / max(counts["loss"], 1)
        bits = sums["loss"] / math.log(2) / max(self.scored_bytes, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": bits}

    def describe(self) -> str:
        scored = ""
        if self.split != "train" and len(self.chosen) < self.n_windows:
            scored = f", {len(self.chosen) * self.block_size:,} of them scored"
        return f"{len(self.ids):,} tokens from {self.text_bytes / 1e6:,.2f} MB{scored}"


def both_splits(
    Data,
    corpus,
    config,
    sizes: dict,
    tokenizer: AnyTokenizer | None,
    *,
    special_tokens: tuple[str, ...] = (END_OF_TEXT,),
    border: str = END_OF_TEXT,
    **more,
):
    """(train, validation) of a data class that reads token files: what there is to prepare.

    special_tokens are those that the task needs; `border` is the one before each document.
    """
    tokenizer = tokenizer or get_tokenizer(config, sizes, corpus, special_tokens)
    cache, more = Path(config.cache_dir), {**settings(config, sizes), **more}
    return tuple(
        Data(tokenize(corpus, split, tokenizer, cache, border), corpus, split, tokenizer, **more)
        for split in SPLITS
    )


def settings(config, sizes: dict, *names: str) -> dict:
    """{argument: value} of a data class, of what all take and of `names`, which are flags."""
    values = {name: getattr(config, name) for name in ("batch_size", "seed", *names)}
    return {"block_size": sizes["block_size"], "max_tokens": config.eval_tokens, **values}


def get_tokenizer(
    config, sizes: dict, corpus: Corpus, special_tokens: tuple[str, ...]
) -> AnyTokenizer:
    """GPT-2's own, one from a file, or (cached) one learnt from the training part of the corpus."""
    cache, vocab_size = Path(config.cache_dir), sizes["vocab_size"]
    if config.tokenizer:
        if config.tokenizer == "gpt2":
            files = fetch(GPT2_MERGES, cache), fetch(GPT2_VOCABULARY, cache)
            tokenizer = read_gpt2_files(*files)
        elif Path(config.tokenizer).is_file():
            tokenizer = load_tokenizer(Path(config.tokenizer))
        else:
            raise ValueError(f"--tokenizer {config.tokenizer} is no file here, and not gpt2")
        check_special(tokenizer, special_tokens, config.tokenizer)
        return tokenizer
    if config.pattern not in PATTERNS:
        raise ValueError(f"--pattern {config.pattern} is not one of {', '.join(PATTERNS)}")
    path = cache / f"{corpus.name}-{corpus.hash[:12]}-{config.pattern}-{vocab_size}.json"
    if path.is_file():
        try:
            return Tokenizer.load(path)
        except ValueError:
            path.unlink()
    tokenizer = Tokenizer.train(
        limited(corpus, TOKENIZER_CHARACTERS),
        vocab_size,
        PATTERNS[config.pattern],
        special_tokens,
        progress=True,
    )
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    return tokenizer


def check_special(tokenizer: AnyTokenizer, special_tokens: tuple[str, ...], given: str) -> None:
    """ValueError where what --tokenizer gives lacks some that the task needs."""
    lacking = [name for name in special_tokens if name not in tokenizer.special_tokens]
    if lacking:
        raise ValueError(
            f"--tokenizer {given} lacks the special token {', '.join(lacking)}: "
            "choose another, or leave the flag out to train one"
        )


def limited(corpus: Corpus, characters: int):
    for text, _ in corpus.pieces("train"):
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)
