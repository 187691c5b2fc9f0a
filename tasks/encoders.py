"""What the tasks of a fine-tuned encoder share: how rows become a batch, the flags of sample.py,
and how texts are answered there.

A task's respond(model, tokenizer, texts, flags, bar=None, first_line=0) returns an answer to each
text. It is the answer that the text gets alone, whatever else is in its batch. Where the texts are
lines of standard input, `bar` counts those that are done, and the first of them has the number
first_line.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from data.buckets import pad_rows
from data.encoding import CLS, PAD, SEP, assemble
from data.lines import answer_stdin
from data.tokens import AnyTokenizer
from tasks.flags import DEVICES, check, choice, ranged

Respond = Callable[..., list[str]]


@dataclass
class TextFlags:
    """The flags of sample.py for a model that answers texts."""

    checkpoint: str = ""  # the file to load; empty: the newest below out/
    prompt: list[str] = field(default_factory=list)  # a text; may be repeated; none: read stdin
    eval: str = ""  # score a labelled file instead, of the kind that --data of train.py takes
    batch_size: int = ranged(32, 1, 2**20)  # texts at a time; --eval: as in training
    device: str = choice("auto", *DEVICES)  # auto, cpu, cuda or mps

    def __post_init__(self):
        check(self)
        if self.eval and self.prompt:
            raise ValueError("--eval and --prompt are two things to do: give one of them")


def label_sums(loss: Tensor, logits: Tensor, targets: Tensor, training: bool) -> dict[str, Tensor]:
    """logits (..., k), targets (...) -> {"loss": loss, "accuracy": number of right labels}, and in
    evaluation also "predicted" (...), the likeliest labels."""
    predicted = logits.argmax(-1)
    sums = {"loss": loss, "accuracy": (predicted == targets).sum()}
    return sums if training else {**sums, "predicted": predicted}


# ---- batches -------------------------------------------------------------------------------------


def collate(rows: Sequence[Sequence[np.ndarray]], tokenizer: AnyTokenizer) -> dict[str, Tensor]:
    """Rows of one part, or all of two -> a batch, as pad_batch makes it, of [CLS] part [SEP] or
    [CLS] part [SEP] part [SEP]; the latter has "segments"."""
    special = tokenizer.special_tokens
    ids, segments = zip(*(assemble(row, special[CLS], special[SEP]) for row in rows), strict=True)
    return pad_batch(ids, tokenizer, segments if len(rows[0]) > 1 else None)


def pad_batch(
    ids: Sequence[np.ndarray],
    tokenizer: AnyTokenizer,
    segments: Sequence[np.ndarray] | None = None,
) -> dict[str, Tensor]:
    """The ids of B rows -> {"tokens": (B, T)}; given their segments, also "segments": (B, T); if
    some rows are shorter than others, also "keep": (B, T), False at padding."""
    tokens, keep = pad_rows(ids, tokenizer.special_tokens[PAD])
    batch = {"tokens": tokens}
    if segments is not None:
        batch["segments"], _ = pad_rows(segments, 0)
    return batch if keep.all() else {**batch, "keep": keep}


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
    """The outputs of the model, on whatever device it is, for a batch on the CPU."""
    device = next(model.parameters()).device
    return model(**{name: tensor.to(device) for name, tensor in batch.items()})


def similar_lengths(
    lengths: Sequence[int], batch_size: int, bar: tqdm | None = None
) -> Iterator[list[int]]:
    """Yields batches of the indices of rows, the shortest rows first, so that little of a batch is
    padding. The bar moves on when the next batch is taken."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        yield (batch := order[start : start + batch_size])
        if bar is not None:
            bar.update(len(batch))


# ---- what is printed -----------------------------------------------------------------------------


def answer_texts(
    respond: Respond, model: nn.Module, tokenizer: AnyTokenizer, flags: TextFlags
) -> None:
    """Prints the answers to --prompt or, where there is none, to the lines of standard input."""
    if flags.prompt:
        print("\n".join(respond(model, tokenizer, flags.prompt, flags)))
        return

    def answer(lines: list[str], bar: tqdm, first_line: int) -> list[str]:
        return respond(model, tokenizer, lines, flags, bar, first_line)

    answer_stdin(answer, 16 * flags.batch_size, "line")


def answered(
    respond: Respond, model: nn.Module, tokenizer: AnyTokenizer, prompts: list[str], flags
) -> list[str]:
    """Each prompt with its answer below it, to show when a run ends."""
    answers = respond(model, tokenizer, prompts, flags)
    return [f"{prompt}\n-> {answer}" for prompt, answer in zip(prompts, answers, strict=True)]
