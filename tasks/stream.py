"""The language model with a state that is carried on: it reads a text in its order.

A batch has B rows. Row r reads the r-th of B equal parts of the text, window after window, and its
state goes from each window to the next; gradients do not (backpropagation through time, truncated).
An evaluation does the same with a fixed number of rows, so that its figure is the same for every
batch size. All else is as in tasks/text.py, which is also what --shuffle gives.

Left out: several micro-batches a step, of which each would need a state of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from bpe import Tokenizer
from tasks import text
from tasks.flags import TrainConfig, ranged
from tasks.text import GOAL, LOWER_IS_BETTER, SampleFlags, ask, show

__all__ = ["GOAL", "LOWER_IS_BETTER", "SampleFlags", "ask", "show"]  # as they are for any text

ROWS = 8  # of an evaluation


@dataclass
class Flags(TrainConfig):
    # tokens of one optimizer step: all of one micro-batch, because a state goes from step to step
    tokens_per_step: int = ranged(4096, 1, 2**26)
    shuffle: bool = False  # windows in any order instead, each from an empty state


class Data(text.Data):
    """Windows of T tokens in the order of the text, in B rows."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        n, T = self.n_windows, self.block_size
        if self.split != "train":
            self.batch_size, self.tokens_per_batch = ROWS, ROWS * T
            self.windows_of_row = math.ceil(n / ROWS)
            self.n_batches = math.ceil(len(self.chosen) / ROWS)
            rows = np.arange(ROWS)[:, None] * self.windows_of_row + np.arange(self.n_batches)
            self.chosen = rows[rows < n].tolist()
            return
        if n < self.batch_size:
            raise ValueError(
                f"the training text of {len(self.ids):,} tokens has {n} windows of {T} for "
                f"{self.batch_size} rows: choose a smaller --batch_size or --block_size"
            )
        self.windows_of_row = n // self.batch_size
        self.tokens_per_epoch = self.windows_of_row * self.tokens_per_batch

    @classmethod
    def splits(cls, flags: Flags, sizes: dict, tokenizer: Tokenizer | None = None):
        """(training data, validation data). Raises ValueError where a step has more than one
        micro-batch."""
        if flags.shuffle:
            return text.Data.splits(flags, sizes, tokenizer)
        whole = flags.batch_size * sizes["block_size"]
        if flags.tokens_per_step != whole:
            raise ValueError(
                f"--tokens_per_step {flags.tokens_per_step} is more than the {whole} of one "
                "micro-batch, and a state is carried from step to step: choose --tokens_per_step "
                f"{whole} or a larger --batch_size, and one process; or --shuffle"
            )
        return super().splits(flags, sizes, tokenizer)

    def batch(self, i: int) -> dict[str, Tensor]:
        """{"tokens": (B, T), "targets": (B, T), "keep": (B,)}. keep says whose state goes on: all
        rows at all times, but at the beginning of an epoch or of an evaluation none."""
        T, rows = self.block_size, np.arange(self.batch_size)
        epoch, window, offset = 0, i, 0
        if self.split == "train":
            epoch, window = divmod(i, self.windows_of_row)
            offset = int(np.random.default_rng((self.seed, epoch)).integers(self.max_offset + 1))
        found = np.full((self.batch_size, T + 1), -100, dtype=np.int64)
        starts = (rows * self.windows_of_row + window) * T + offset
        for row, start in zip(found, starts.tolist(), strict=True):
            ids = self.ids[start : start + T + 1]
            row[: len(ids)] = ids
        windows = torch.from_numpy(found)
        tokens, targets = windows[:, :-1].clamp(min=0), windows[:, 1:].contiguous()
        return {"tokens": tokens, "targets": targets, "keep": torch.full((len(found),), window > 0)}


def batch_shapes(flags: Flags, config, B: int, T: int) -> dict[str, tuple[int, ...]]:
    carried = {} if flags.shuffle else {"keep": (B,)}
    return {"tokens": (B, T), "targets": (B, T), **carried}


def sample(
    model: nn.Module,
    tokenizer: Tokenizer,
    flags: SampleFlags,
    checkpoint: dict,
    score: Callable[[text.Data], None],
) -> None:
    """Prints the scores of --eval, read as in training; all else is as for any text."""
    if flags.eval:
        shuffled = checkpoint["train_config"].get("shuffle", False)
        score(text.eval_data(model, tokenizer, flags, text.Data if shuffled else Data))
    else:
        text.sample(model, tokenizer, flags, checkpoint, score)
