"""Fine-tuning GPT with prompts and what is to be written behind them. A row is

    <|endoftext|> prompt completion <|endoftext|>

and only the completion and its end are targets: the model learns to answer, not to ask (Radford et
al. 2018, "Improving Language Understanding by Generative Pre-Training", section 3.2; InstructGPT's
supervised step has the loss on the answer alone, Ouyang et al. 2022, arXiv:2203.02155).

Prompt and completion are encoded separately, so that no token crosses their border, as in sampling.
The table decides what is between them, a space, a line end or a word such as "Answer:", with one
exception: in byte-level BPE a space belongs to the word behind it, so a space that ends the prompt
is moved to the completion (`split_space`, which sampling uses too).

A prompt may be empty. A completion may not: in a table that is nearly always a hole, and where the
answer is nothing, a word can say so ("none").

Left out: conversations of more than one turn and their templates, packing rows together, weights of
single rows, a loss on the prompt.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from bpe import END_OF_TEXT, Tokenizer
from data.buckets import InBuckets, evenly_within, pad_rows
from data.tables import Row, TableCorpus, open_tables
from data.tokens import SPLITS, ending, get_tokenizer, opening, settings
from tasks import text
from tasks.choices import print_accuracies
from tasks.flags import FinetuneConfig
from tasks.text import SampleFlags, split_space
from tasks.whole import whole_file

GOAL, LOWER_IS_BETTER = "loss", True
FORMS = [("prompt", "completion")]
SHOWN = 4  # prompts, after training

Flags = FinetuneConfig


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> tuple[list[int], bytes]:
    """(tokens, bytes that the completion must begin with), as text.encode_prompt returns them, but
    the tokens begin with <|endoftext|>, and names of special tokens in a prompt are text."""
    prompt, space = split_space(prompt)
    return [tokenizer.special_tokens[opening(tokenizer)], *tokenizer.encode(prompt)], space.encode()


# ---- rows -> batches -----------------------------------------------------------------------------


class Data(InBuckets):
    """Batches of rows of similar length: see InBuckets.

    Validation: always the same rows; if max_tokens is less than all, evenly spaced ones. A row of
    more than row_length + 1 tokens loses the beginning of its prompt; a completion that is too long
    by itself loses its end. Both are counted.
    """

    special_tokens = (END_OF_TEXT,)
    needs_bytes = True  # what it writes, and bits per byte, are bytes of tokens

    def __init__(
        self,
        corpus: TableCorpus,
        split: str,
        tokenizer: Tokenizer,
        *,
        block_size: int,
        row_length: int = 0,
        max_tokens: int = 0,
        **buckets,
    ):
        """buckets: see InBuckets.make_buckets."""
        self.row_length = min(row_length or block_size, block_size)
        self.tokenizer, self.fingerprint, self.rule = tokenizer, corpus.hash, corpus.rule
        prompts = dict.fromkeys(row.texts[0] for row in corpus.splits["validation"])
        self.prompts = list(prompts)[:SHOWN]
        self.end = tokenizer.special_tokens[ending(tokenizer)]
        self.rows: list[np.ndarray] = []
        self.borders: list[int] = []  # where the completion of each row begins
        self.shortened = self.cut = 0  # prompts without their beginning, completions without an end
        for row in tqdm(corpus.splits[split], f"tokenizing {split}", unit=" rows", disable=None):
            self.add(*row.texts)
        lengths, self.n_all = np.array([len(row) - 1 for row in self.rows]), len(self.rows)
        limit = 0 if split == "train" else max_tokens
        self.chosen = evenly_within(self.n_all, int(lengths.sum()), limit)
        self.make_buckets(lengths[self.chosen], split, block_size=block_size, **buckets)

    @classmethod
    def splits(cls, flags: FinetuneConfig, sizes: dict, tokenizer: Tokenizer | None = None):
        """(train, validation) of a table with the columns "prompt" and "completion"; a tokenizer is
        learnt from the training rows unless given."""
        corpus = open_tables(flags.data, flags.valid, FORMS, blank=("prompt",))
        learnt = replace(corpus, splits={"train": space_moved(corpus.splits["train"])})
        tokenizer = tokenizer or get_tokenizer(flags, sizes, learnt, cls.special_tokens)
        more = settings(flags, sizes, "row_length", "tokens_per_step")
        return tuple(cls(corpus, split, tokenizer, **more) for split in SPLITS)

    def add(self, prompt: str, completion: str) -> None:
        """Adds a row. A prompt that is cut loses its <|endoftext|> first, since no document begins
        at the cut. At least one token stays before the completion, to predict it from."""
        context, lead = encode_prompt(self.tokenizer, prompt)
        answer = [*self.tokenizer.encode(lead.decode() + completion), self.end]
        self.cut += len(answer) > self.row_length
        answer = answer[: self.row_length]
        space_left = self.row_length + 1 - len(answer)
        self.shortened += len(context) > space_left
        context = context[-space_left:]
        self.rows.append(np.array([*context, *answer], dtype=np.int32))
        self.borders.append(len(context))

    def batch(self, i: int) -> dict[str, Tensor]:
        """{"tokens": (B, T), "targets": (B, T)}; targets are -100 in the prompt and at padding.
        Padding comes last, where no position of a causal model looks: it needs no mask."""
        _, rows, empty = self.buckets.batch(i)
        tokens, targets = [], []
        for row in self.chosen[rows]:
            ids, wanted = self.rows[row], self.rows[row][1:].copy()
            wanted[: self.borders[row] - 1] = -100
            tokens.append(ids[:-1])
            targets.append(wanted)
        batch = {"tokens": pad_rows(tokens, self.end)[0], "targets": pad_rows(targets, -100)[0]}
        if empty:
            batch["targets"].fill_(-100)
        return batch

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The loss in nats per token of the completions, with their end tokens, and perplexity."""
        loss = sums["loss"] / max(counts["loss"], 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700))}

    def describe(self) -> str:
        asked = sum(len(self.rows[row]) - self.borders[row] for row in self.chosen)
        line = f"{len(self.chosen):,} rows"
        if len(self.chosen) < self.n_all:
            line += f", evenly spaced among {self.n_all:,}"
        line += f", {self.buckets.lengths.sum():,} tokens, {asked:,} of them asked for"
        line += self.buckets.describe()
        if self.shortened:
            line += f"; {self.shortened:,} prompts are cut at their beginning"
        if self.cut:
            line += f"; {self.cut:,} completions of {self.row_length:,} tokens or more are cut"
        return line


def space_moved(rows: list[Row]) -> list[Row]:
    """The rows for a tokenizer to learn from, with spaces moved as in encoding."""
    split = ((line, *split_space(prompt), text) for line, (prompt, text) in rows)
    return [Row(line, (prompt, space + text)) for line, prompt, space, text in split]


# ---- what sample.py and the end of a run print ---------------------------------------------------


def sample(
    model: nn.Module,
    tokenizer: Tokenizer,
    flags: SampleFlags,
    checkpoint: dict,
    score: Callable[[Data], None],
) -> None:
    """Prints the scores of --eval or --choices, or else the completions of the prompts, read as in
    training."""
    if flags.choices:
        print_accuracies(model, tokenizer, flags)
    elif flags.eval:
        score(whole_file(Flags, Data, tokenizer, flags, checkpoint))
    else:
        text.print_completions(model, tokenizer, flags, encode_prompt)


# All else is as for any text, except that prompts are read as in training.
show = partial(text.show, encode=encode_prompt)
ask, batch_shapes = text.ask, text.batch_shapes
