"""Questions with options, answered by a language model that was never trained to: which option is
the likeliest text behind the question? Perhaps with solved examples before it, "shots".

A row of the .jsonl has the text that is scored, question + choice, exactly as it stands. So the
file decides about spaces and words such as "Answer:", and a space belongs before a choice's word:

    {"question": "Review: a gripping film\\nSentiment:", "choices": [" bad", " good"], "answer": 1}

An example is a question with its right choice; blank lines join examples and question. They are
drawn anew for each row: never the row itself, nor one with the same question.

Question and choice are encoded together, as the model knows text. The tokens of the joint encoding
that reach beyond the question's last byte are scored, also one that crosses the border:

    score       the sum of their log-probabilities                  prefers short choices
    per token   that, divided by their number                       depends on the tokenizer
    per character   that, divided by the choice's characters        does not

Left out: options that are named by letters (write "A. … B. …" into the question), the score of a
choice behind an empty question taken off (Brown et al.'s third way), a template for conversations.

Papers: GPT-2 (Radford et al. 2019) for none, GPT-3 (Brown et al. 2020, arXiv:2005.14165, section
2.4) for a few examples; lm-evaluation-harness (Gao et al. 2021) for scores by length.
"""

import math
import re
import sys
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from bpe import Tokenizer
from data.buckets import pad_rows
from data.tables import json_records, refusal
from data.text import plain_name
from data.tokens import opening
from decoding import NAN_LOGITS

BETWEEN = "\n\n"  # examples, and the last of them and the question
WAYS = ("summed", "per token", "per character")


class Question(NamedTuple):
    line: int  # of its file
    text: str
    choices: tuple[str, ...]
    answer: int  # the place of the right choice

    @property
    def solved(self) -> str:
        return self.text + self.choices[self.answer]


class Sequence(NamedTuple):
    ids: list[int]
    start: int  # ids[start:] are scored, those before are given: at least one


# ---- file -> questions -> prompts ----------------------------------------------------------------


def read_questions(flag: str, path: Path) -> list[Question]:
    """The rows of the .jsonl (or .jsonl.gz) that the flag names. Raises ValueError, with the line,
    for what is broken."""
    if Path(plain_name(path)).suffix != ".jsonl" or not path.is_file():
        raise ValueError(
            f"--{flag} {path} is no .jsonl here: give a file with a question, its choices and the "
            "number of the right one, counted from 0, in each line"
        )
    rows = []
    for line, record in json_records(path):
        text, choices, answer = map(record.get, ("question", "choices", "answer"))
        if not isinstance(text, str):
            raise refusal(path, line, "its question is missing, or no text")
        if not isinstance(choices, list) or len(choices) < 2:
            raise refusal(path, line, "its choices are no list of two or more")
        if not all(isinstance(choice, str) and choice for choice in choices):
            raise refusal(path, line, "one of its choices is empty, or no text")
        # Numbers are read as they are written.
        if not isinstance(answer, str) or not re.fullmatch("[0-9]{1,9}", answer):
            raise refusal(path, line, "its answer is no whole number, counted from 0")
        if int(answer) >= len(choices):
            raise refusal(path, line, f"its answer {answer} is none of 0 to {len(choices) - 1}")
        rows.append(Question(line, text, tuple(choices), int(answer)))
    if not rows:
        raise ValueError(f"--{flag} {path} has no rows: give one question or more")
    return rows


def draw_shots(
    pool: list[Question], row: int, question: str, *, alike: int, shots: int, seed: int
) -> list[Question]:
    """`shots` examples of the pool for the row of this number, none with its question, which
    `alike` of the pool have: a pure function of seed and row."""
    random = np.random.default_rng((seed % 2**64, row))
    # With so many, enough are left when those that must not be there are not.
    drawn = random.choice(len(pool), shots + alike, replace=False).tolist()
    return [pool[i] for i in drawn if pool[i].text != question][:shots]


class Prompts:
    """The sequences of all choices of all rows, in order; and what did not fit into block_size.

    Examples that do not fit are left out, the farthest from the question first, for all choices of
    a row alike. A question that does not fit alone loses its beginning. Both are counted. Raises
    ValueError for a choice that leaves no place for a token before it, or has no tokens, and for
    too few examples.
    """

    def __init__(
        self,
        rows: list[Question],
        pool: list[Question],
        tokenizer: Tokenizer,
        *,
        shots: int,
        block_size: int,
        seed: int,
    ):
        self.tokenizer, self.limit = tokenizer, block_size + 1  # the last token is only predicted
        self.left_out = self.cut = 0  # examples, questions
        self.last: list[int] = []  # the answer of the example before each question
        self.sequences: list[Sequence] = []
        alike = Counter(example.text for example in pool)
        for number, row in enumerate(tqdm(rows, "tokenizing", unit=" rows", disable=None)):
            there = len(pool) - alike[row.text]
            if there < shots:
                raise ValueError(
                    f"--shots {shots} is too many for line {row.line:,}: there are {there:,} "
                    "examples with another question; choose fewer, or name more with --shots_from"
                )
            some = {"alike": alike[row.text], "shots": shots, "seed": seed}
            examples = draw_shots(pool, number, row.text, **some) if shots else []
            self.last += [example.answer for example in examples[-1:]]
            self.sequences += self.fitting(row, [example.solved for example in examples])

    def fitting(self, row: Question, examples: list[str]) -> list[Sequence]:
        """The sequences of a row, with as many of its examples as fit."""

        def fits(dropped: int) -> bool:
            return max(len(ids) for ids, _ in self.encode(row, examples[dropped:])) <= self.limit

        dropped = 0 if fits(0) else bisect_left(range(len(examples)), True, key=fits)
        self.left_out += dropped
        found = self.encode(row, examples[dropped:])
        # All lose as many tokens as the longest must, so that all choices follow the same text.
        over = max(0, max(len(ids) for ids, _ in found) - self.limit)
        self.cut += over > 0
        for choice, (ids, start) in zip(row.choices, found, strict=True):
            if not over < start < len(ids):
                why = f"has {len(ids) - start:,} tokens, and the model sees {self.limit - 1:,}"
                if start == len(ids):
                    why = "has no tokens, since the tokenizer leaves all of it out"
                raise ValueError(
                    f"line {row.line:,}: the choice {choice[:40]!r} {why}: change it, or leave the "
                    "line out"
                )
        return [Sequence(ids[over:], start - over) for ids, start in found]

    def encode(self, row: Question, examples: list[str]) -> list[Sequence]:
        """One sequence for each choice. Names of special tokens in them are text."""
        tokenizer = self.tokenizer
        begin, size = tokenizer.special_tokens[opening(tokenizer)], tokenizer.bytes_of
        context = BETWEEN.join([*examples, row.text])
        # Its bytes as its tokens have them: with a space that the tokenizer puts in front, in its
        # normal form, without bytes that have no token.
        border, found = len(tokenizer.decode_bytes(tokenizer.encode(context))), []
        for choice in row.choices:
            ids = tokenizer.encode(context + choice)
            ends = np.cumsum([len(size[i]) for i in ids])
            start = int(np.searchsorted(ends, border, side="right"))
            found.append(Sequence([begin, *ids], 1 + start))
        return found

    def note(self) -> str:
        """What was left out, in a sentence, or nothing."""
        parts = []
        if self.left_out:
            parts.append(f"examples left out: {self.left_out:,}")
        if self.cut:
            parts.append(f"questions without their beginning: {self.cut:,}")
        return f"{', '.join(parts)} (the model sees {self.limit - 1:,} tokens)" if parts else ""


# ---- sequences -> scores -------------------------------------------------------------------------


@torch.no_grad()
def log_probabilities(
    model: nn.Module, sequences: list[Sequence], batch_size: int = 8
) -> list[float]:
    """The sum of the log-probabilities of each sequence's scored tokens, in nats.

    What the model reads is all but the last token. Sequences that are equal so far share one pass,
    so that choices of one token cost no more than one of them. Batches are of similar lengths, the
    longest first; padding comes last, where no place of a causal model looks. The model has
    features and head, as in tasks/__init__.py. Raises ValueError for logits that are NaN.
    """
    device = next(chain(model.parameters(), model.buffers())).device  # some models only count
    sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (ids, _) in enumerate(sequences):
        sharing[tuple(ids[:-1])].append(number)
    inputs = sorted(sharing, key=len, reverse=True)
    sums = [0.0] * len(sequences)
    with tqdm(total=sum(map(len, inputs)), desc="scoring", unit=" tokens", disable=None) as bar:
        for at in range(0, len(inputs), batch_size):
            batch = inputs[at : at + batch_size]
            x = model.features(pad_rows(batch, 0)[0].to(device))
            # Only places whose next token is scored go through the head.
            starts = [min(sequences[number].start for number in sharing[row]) for row in batch]
            parts = [
                x[i, start - 1 : len(row)]
                for i, (start, row) in enumerate(zip(starts, batch, strict=True))
            ]
            log_p = model.head(torch.cat(parts)).float().log_softmax(-1)
            for part, start, row in zip(
                log_p.split([len(part) for part in parts]), starts, batch, strict=True
            ):
                for number in sharing[row]:
                    sums[number] = scored(part, sequences[number], start)
            bar.update(sum(map(len, batch)))
    if any(math.isnan(total) for total in sums):
        raise ValueError(NAN_LOGITS)
    return sums


def scored(log_p: Tensor, sequence: Sequence, start: int) -> float:
    """The sum over a sequence's scored tokens; log_p (n, V) begins with that of token `start`."""
    targets = torch.tensor(sequence.ids[sequence.start :], device=log_p.device)
    return log_p[sequence.start - start :].gather(1, targets[:, None]).double().sum().item()


# ---- scores -> what is printed -------------------------------------------------------------------


def by_row(rows: list[Question], values: list) -> Iterator[list]:
    """Of values, one for each choice of all rows, those of each row."""
    left = iter(values)
    return (list(islice(left, len(row.choices))) for row in rows)


def accuracies(
    rows: list[Question], sequences: list[Sequence], sums: list[float]
) -> dict[str, tuple[float, float]]:
    """{way to score: (share of rows whose best choice is the right one, its standard error)}. Of
    equal scores the first choice counts."""
    right = dict.fromkeys(WAYS, 0)
    counts = [len(ids) - start for ids, start in sequences]
    for row, found, lengths in zip(rows, by_row(rows, sums), by_row(rows, counts), strict=True):
        divisors = ([1] * len(found), lengths, [len(choice) for choice in row.choices])
        for way, divisor in zip(WAYS, divisors, strict=True):
            scores = [total / n for total, n in zip(found, divisor, strict=True)]
            right[way] += scores.index(max(scores)) == row.answer
    shares = {way: n / len(rows) for way, n in right.items()}
    return {way: (p, math.sqrt(p * (1 - p) / len(rows))) for way, p in shares.items()}


def repeated(rows: list[Question], last: list[int], sums: list[float]) -> int:
    """In how many rows the choice of the highest sum stands where the right one of the example
    before the question stood, `last`: of models that only repeat, in all."""
    scores = zip(by_row(rows, sums), last, strict=True)
    return sum(found.index(max(found)) == before for found, before in scores)


def print_accuracies(model: nn.Module, tokenizer: Tokenizer, flags) -> None:
    """Prints how many of the questions in the file flags.choices the model answers right, behind
    flags.shots examples each."""
    rows = read_questions("choices", Path(flags.choices))
    pool = read_questions("shots_from", Path(flags.shots_from)) if flags.shots_from else rows
    endless = getattr(model, "endless", False)
    block_size = sys.maxsize - 1 if endless else model.config.block_size
    prompts = Prompts(
        rows, pool, tokenizer, shots=flags.shots, block_size=block_size, seed=flags.seed
    )
    if note := prompts.note():
        print(f"note: {note}", file=sys.stderr)
    sums = log_probabilities(model, prompts.sequences, flags.batch_size)
    chance = sum(1 / len(row.choices) for row in rows) / len(rows)
    answer, n = Counter(row.answer for row in rows).most_common(1)[0]
    print(
        f"{len(rows):,} rows, {flags.shots} shots; chance has {chance:.4f}, and answer {answer}, "
        f"the commonest, {n / len(rows):.4f}"
    )
    if prompts.last:
        n = repeated(rows, prompts.last, sums)
        print(f"the answer of the example before the question is given in {n / len(rows):.4f}")
    for way, (share, error) in accuracies(rows, prompts.sequences, sums).items():
        print(f"{way:<14} {share:.4f} ± {error:.4f}")
