"""Fine-tuning a decoder with prompts and what is to be written behind them. A row is

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

A row of a .jsonl may be a conversation instead, "messages". It is put into the words of a template
(data/chat.py), and the targets are what the assistant says, in all its turns, with the token that
ends each. A conversation that is too long loses its end: what remains is what a model sees that has
talked for so long.

Left out: packing rows together, weights of single rows, a loss on the prompt.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from bpe import END_OF_TEXT, Tokenizer
from data.buckets import InBuckets, evenly_within, pad_rows
from data.chat import (
    TEMPLATES,
    Message,
    choose_template,
    parse_messages,
    render,
    texts_of,
    with_system,
)
from data.tables import Row, TableCorpus, open_tables
from data.tokens import SPLITS, ending, get_tokenizer, opening, settings
from tasks import text
from tasks.flags import FinetuneConfig, choice
from tasks.text import SampleFlags, split_space
from tasks.whole import whole_file

GOAL, LOWER_IS_BETTER = "loss", True
FORMS = [("prompt", "completion")]
MESSAGES = ("messages",)  # the column of a .jsonl of conversations
SHOWN = 4  # prompts, after training


@dataclass
class Flags(FinetuneConfig):
    # how conversations are written; empty: as the model has learnt them, or by its tokenizer
    template: str = choice("", *TEMPLATES, "", inherited=True)


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
    by itself loses its end. So does a conversation, which is left out where nothing of an answer
    remains. All are counted.
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
        template: str = "",
        system: str = "",
        **buckets,
    ):
        """template, system: of conversations, "": see data/chat.py; none. buckets: see
        InBuckets.make_buckets. Raises ValueError where no row has anything to learn."""
        self.row_length = min(row_length or block_size, block_size)
        self.tokenizer, self.fingerprint, self.rule = tokenizer, corpus.hash, corpus.rule
        self.template, self.system = template, system
        self.end = tokenizer.special_tokens[ending(tokenizer)]
        self.rows: list[np.ndarray] = []
        self.asked: list[np.ndarray] = []  # which tokens of each row are targets
        self.shortened = self.cut = 0  # prompts without their beginning, completions without an end
        self.ended = self.left_out = 0  # conversations without their end, without an answer
        for row in tqdm(corpus.splits[split], f"tokenizing {split}", unit=" rows", disable=None):
            if is_conversation(row):
                self.add_conversation(parse_messages(row.texts[0]))
            else:
                self.add(*row.texts)
        if not self.rows:
            raise ValueError(
                f"no conversation of {corpus.name} that is to {split} has an answer within its "
                f"{self.row_length + 1:,} tokens: choose a longer --row_length, or other data"
            )
        self.prompts = questions(corpus.splits["validation"], system)
        lengths, self.n_all = np.array([len(row) - 1 for row in self.rows]), len(self.rows)
        limit = 0 if split == "train" else max_tokens
        self.chosen = evenly_within(self.n_all, int(lengths.sum()), limit)
        self.make_buckets(lengths[self.chosen], split, block_size=block_size, **buckets)

    @classmethod
    def splits(cls, flags: Flags, sizes: dict, tokenizer: Tokenizer | None = None):
        """(train, validation) of a table with the columns "prompt" and "completion", or with
        "messages"; a tokenizer is learnt from the training rows unless given."""
        jsonl = any(".jsonl" in Path(name).name.lower() for name in (flags.data, flags.valid))
        forms = [*FORMS, MESSAGES] if jsonl else FORMS
        remedy = ": call them prompt and completion, or messages"
        corpus = open_tables(
            flags.data, flags.valid, forms, blank=("prompt",), nested=MESSAGES, remedy=remedy
        )
        check_conversations(flags, corpus)
        if tokenizer is None:
            learnt = replace(corpus, splits={"train": to_learn_from(corpus.splits["train"])})
            tokenizer = get_tokenizer(flags, sizes, learnt, cls.special_tokens)
        more = settings(flags, sizes, "row_length", "tokens_per_step")
        if any(map(is_conversation, chain(*corpus.splits.values()))):
            more["template"] = choose_template(tokenizer, getattr(flags, "template", ""))
            more["system"] = getattr(flags, "system", "")
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
        self.asked.append(np.arange(len(self.rows[-1])) >= len(context))

    def add_conversation(self, messages: list[Message]) -> None:
        """Adds a row, without what is behind row_length + 1 tokens."""
        messages = with_system(messages, self.system)
        ids, own = render(self.template, self.tokenizer, messages)
        self.ended += len(ids) > self.row_length + 1
        ids, own = ids[: self.row_length + 1], own[: self.row_length + 1]
        if not any(own[1:]):
            self.left_out += 1
            return
        self.rows.append(np.array(ids, dtype=np.int32))
        self.asked.append(np.array(own))

    def batch(self, i: int) -> dict[str, Tensor]:
        """{"tokens": (B, T), "targets": (B, T)}; targets are -100 where nothing is asked for, and
        at padding. That comes last, where no position of a causal model looks: it needs no mask."""
        _, rows, empty = self.buckets.batch(i)
        tokens, targets = [], []
        for row in self.chosen[rows]:
            ids, wanted = self.rows[row], self.rows[row][1:].copy()
            wanted[~self.asked[row][1:]] = -100
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
        asked = sum(int(self.asked[row][1:].sum()) for row in self.chosen)
        line = f"{len(self.chosen):,} rows"
        if len(self.chosen) < self.n_all:
            line += f", evenly spaced among {self.n_all:,}"
        line += f", {self.buckets.lengths.sum():,} tokens, {asked:,} of them asked for"
        line += self.buckets.describe()
        if self.shortened:
            line += f"; {self.shortened:,} prompts are cut at their beginning"
        if self.cut:
            line += f"; {self.cut:,} completions of {self.row_length:,} tokens or more are cut"
        if self.ended:
            line += f"; {self.ended:,} conversations are cut at their end"
        if self.left_out:
            line += f"; {self.left_out:,} without an answer are left out"
        if self.template:
            line += f"; template {self.template}"
        return line


def is_conversation(row: Row) -> bool:
    return len(row.texts) == len(MESSAGES)


def check_conversations(flags: Flags, corpus: TableCorpus) -> None:
    """Raises ValueError, with the file and the line, for messages that are no conversation."""
    for split, rows in corpus.splits.items():
        for row in filter(is_conversation, rows):
            try:
                messages = parse_messages(row.texts[0])
                if all(message["role"] != "assistant" for message in messages):
                    raise ValueError("no message is of the assistant, so there is nothing to learn")
                if not all(message["content"].strip() for message in messages):
                    raise ValueError("one of its messages is empty")
            except ValueError as error:
                name = flags.valid if split != "train" and flags.valid else flags.data
                raise ValueError(f"{name}, line {row.line:,}: {error}") from None


def to_learn_from(rows: list[Row]) -> list[Row]:
    """The rows for a tokenizer to learn from: prompts and completions with spaces moved as in
    encoding, conversations as the plain template has them."""
    made = []
    for row in rows:
        if is_conversation(row):
            parts = texts_of(parse_messages(row.texts[0]))
        else:
            prompt, space = split_space(row.texts[0])
            parts = (prompt, space + row.texts[1])
        made.append(Row(row.line, tuple(parts)))
    return made


def questions(rows: list[Row], system: str) -> list[str | list[Message]]:
    """A few different prompts, and the beginnings of conversations up to the first question."""
    found: dict[str, str | list[Message]] = {}
    for row in rows:
        if len(found) == SHOWN:
            break
        prompt: str | list[Message] = row.texts[0]
        if is_conversation(row):
            messages = parse_messages(row.texts[0])
            end = 1 + [message["role"] for message in messages].index("user")
            prompt = with_system(messages[:end], system)
        found.setdefault(json.dumps(prompt), prompt)
    return list(found.values())


# ---- what sample.py and the end of a run print ---------------------------------------------------


def sample(
    model: nn.Module,
    tokenizer: Tokenizer,
    flags: SampleFlags,
    checkpoint: dict,
    score: Callable[[Data], None],
) -> None:
    """Prints the scores of --eval, or the completions of the prompts, read as in training;
    --choices is as for any text."""
    if flags.choices:
        text.sample(model, tokenizer, flags, checkpoint, score)
    elif flags.eval:
        score(whole_file(Flags, Data, tokenizer, flags, checkpoint))
    else:
        text.print_completions(model, tokenizer, flags, encode_prompt)


def show(model: nn.Module, tokenizer: Tokenizer, data: Data, folder: Path) -> list[str]:
    """Each of the data's prompts with its completion, or questions with their answers."""
    shown = []
    prompts = [prompt for prompt in data.prompts if isinstance(prompt, str)]
    if prompts:
        some = SimpleNamespace(prompts=prompts)
        shown += text.show(model, tokenizer, some, folder, encode=encode_prompt)
    for messages in (prompt for prompt in data.prompts if not isinstance(prompt, str)):
        ids, _ = render(data.template, tokenizer, messages, answers=True)
        encode = partial(lambda ids, *_: (ids, b""), ids)
        (answer,) = text.complete(model, tokenizer, [""], SampleFlags(), encode=encode)
        shown.append(f"user: {messages[-1]['content']}\nassistant: {answer.strip()}")
    return shown


def ask(prompts: list[str | list[Message]]) -> tuple[str, ...]:
    """The flags for more: of conversations, those with which sample.py begins one."""
    if prompts and not isinstance(prompts[0], str):
        return ("--chat", "--prompt", prompts[0][-1]["content"])
    return text.ask(prompts)


batch_shapes = text.batch_shapes
