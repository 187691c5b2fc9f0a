"""Fine-tuning beside the same encoder in Hugging Face's class, trained by a plain loop.

    python -m lab.finetuning --model classify --init out/minilm.pt --data train.tsv --valid dev.tsv
    python -m lab.finetuning --model tag --minutes 10 …    and what their loop reaches in that time

First, both take turns, and the seconds of an epoch are measured. Their loop is the usual one: rows
in random order, --rows of them in a batch, each batch padded to its longest row, AdamW, a linear
schedule. Their model begins with the same weights, reads the same rows and is scored by the same
code. Our loop makes the step of train.py.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import optim
import tasks
from data.encoding import PAD
from engine import checkpoint as checkpoints
from engine import cli, kernels
from engine.config import divide_step, from_data, sizes_of
from engine.evaluation import score
from engine.hub.families import WITH_HEAD
from engine.hub.peers import hugging_face_encoder, peer
from engine.processes import Processes
from finetune import take_weights
from tasks.answer import span_sums
from tasks.encoders import label_sums
from tasks.flags import check, choice, ranged
from train import gradients


@dataclass
class ComparisonConfig:
    model: str = choice(WITH_HEAD[0], *WITH_HEAD)  # classify, tag or answer
    init: str = ""  # the pretrained encoder, from convert.py
    data: str = ""  # as for train.py
    valid: str = ""  # as for train.py
    # train theirs for so long, evaluations not counted; 0: speed alone
    minutes: float = ranged(0.0, 0, 1e6)
    rows: int = ranged(32, 1, 2**20)  # of theirs in a batch
    lr: float = ranged(5e-5, 0, 1e3)  # peak learning rate of theirs
    row_length: int = ranged(0, 0)  # most tokens of a row; 0: as many as the encoder reads
    repeats: int = ranged(7, 2, 1000)  # turns of each
    dtype: str = choice("fp32", "fp32", "bf16")  # fp32 or bf16 (autocast), of both
    seed: int = ranged(1337, 0)  # of the head's weights and the order of rows

    def __post_init__(self):
        check(self)


class Theirs(nn.Module):
    """Their class with the arguments and results of ours, so that one evaluation serves both."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        keep: Tensor | None = None,
        **targets: Tensor,
    ) -> dict[str, Tensor]:
        keep = torch.ones_like(tokens) if keep is None else keep.long()
        out = self.model(input_ids=tokens, token_type_ids=segments, attention_mask=keep)
        if "targets" in targets:
            logits, wanted = out.logits.float(), targets["targets"]
            loss = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="sum")
            return label_sums(loss, logits, wanted, self.training)
        logits = torch.stack([out.start_logits, out.end_logits], 1).float()
        logits = logits.masked_fill(keep[:, None] == 0, -torch.inf)
        return span_sums(
            logits, *(targets[f"{end}_targets"] for end in ("start", "end")), self.training
        )


def single_rows(data) -> list[dict[str, Tensor]]:
    """The rows of an epoch, each by itself and without padding."""
    rows = []
    for batch in map(data.batch, range(data.n_batches)):
        keep = batch.pop("keep", torch.ones_like(batch["tokens"], dtype=torch.bool))
        for i, length in enumerate(keep.sum(1).tolist()):
            rows.append({k: v[i, :length] if v.dim() > 1 else v[i] for k, v in batch.items()})
    return rows


def random_batches(rows: list[dict], size: int, pad: int) -> Iterator[dict[str, Tensor]]:
    """Batches of `size` rows in random order, epoch after epoch, each padded to its longest row."""
    fills = {"tokens": pad, "segments": 0, "targets": -100}
    while True:
        for chosen in torch.randperm(len(rows)).split(size):
            some = [rows[i] for i in chosen]
            lengths = torch.tensor([len(row["tokens"]) for row in some])
            batch = {"keep": torch.arange(int(lengths.max())) < lengths[:, None]}
            for name, example in some[0].items():
                parts = [row[name] for row in some]
                batch[name] = (
                    pad_sequence(parts, batch_first=True, padding_value=fills[name])
                    if example.dim()
                    else torch.stack(parts)
                )
            yield batch


def their_step(model: nn.Module, batch: dict, optimizer, autocast) -> None:
    with autocast():
        losses = model(**batch)
    count = sum(int((v != -100).sum()) for k, v in batch.items() if k.endswith("targets"))
    names = ("start", "end") if "start" in losses else ("loss",)
    (sum(losses[name] for name in names) / count).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def load_both(config: ComparisonConfig) -> tuple[nn.Module, Theirs, object, object, int]:
    """(our model, theirs with the same weights, training data, validation data, the padding id).
    Raises ValueError if transformers is not installed."""
    transformers = peer("transformers")
    if not transformers:
        raise ValueError("there is nothing to compare with: pip install transformers")
    task, Model = tasks.task(config.model), tasks.network(config.model)
    checkpoint = checkpoints.load(Path(config.init))
    tokenizer = checkpoints.restore_tokenizer(Path(config.init), checkpoint)
    said = {"data": config.data, "valid": config.valid, "row_length": config.row_length}
    settings = task.Flags(**said, seed=config.seed)
    sizes = sizes_of(Model.Config, config.model, checkpoint)
    unit = sizes["block_size"]  # a step is a multiple of it
    settings.tokens_per_step = max(1, settings.tokens_per_step // unit) * unit
    settings.batch_size, _ = divide_step(settings, unit, 1)
    train, valid = task.Data.splits(settings, sizes, tokenizer)
    sizes |= {name: getattr(train, name) for name in from_data(Model.Config)}
    torch.manual_seed(config.seed)
    ours = Model(Model.Config(**sizes))
    take_weights(ours, checkpoint["model"])
    theirs = Theirs(hugging_face_encoder(transformers, ours, config.model))
    return ours.train(), theirs.train(), train, valid, tokenizer.special_tokens[PAD]


def compare_speed(
    ours: nn.Module,
    theirs: Theirs,
    train,
    batches: Iterator[dict],
    autocast,
    config: ComparisonConfig,
) -> float:
    """Prints the seconds that an epoch takes with ours and with theirs, and returns theirs. Both
    take turns, each a part of an epoch, at a learning rate so small that no weight moves."""
    fast = optim.make_optimizer(ours, "adamw", lr=1e-12)
    slow = torch.optim.AdamW(theirs.parameters(), lr=1e-12, weight_decay=0.01)
    group, step, n = Processes(0, 1, torch.device("cpu")), 0, len(single_rows(train))
    share = max(1, min(640, n // 10))
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(config.repeats + 1):
        begin, done = time.perf_counter(), 0
        while done < share:
            batch = train.batch(step)
            gradients(ours, [batch], group, autocast)
            nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
            fast.step()
            fast.zero_grad(set_to_none=True)
            done, step = done + len(batch["tokens"]), step + 1
        middle, count = time.perf_counter(), 0
        while count < share:
            batch = next(batches)
            their_step(theirs, batch, slow, autocast)
            count += len(batch["tokens"])
        if turn:  # turn 0 warms up
            seconds["ours"].append((middle - begin) / done * n)
            seconds["theirs"].append((time.perf_counter() - middle) / count * n)
    for name, each in seconds.items():
        low, mid, high = statistics.quantiles(each, n=4)
        print(f"{name:>7}  {mid:7.3g} s an epoch of {n:,} rows ({low:.3g} to {high:.3g})")
    mine, other = map(statistics.median, seconds.values())
    print(f"  ratio  {mine / other:.2f}", flush=True)
    return other


def train_their_model(
    theirs: Theirs,
    batches: Iterator[dict],
    valid,
    autocast,
    config: ComparisonConfig,
    steps: int,
    n: int,
) -> None:
    """Trains their model for so many steps, and prints its figures after every epoch of n rows."""
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=config.lr, weight_decay=0.01)
    warm = max(1, steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, (steps - i) / max(1, steps - warm))
    )
    print(f"theirs, {steps:,} steps of {config.rows} rows, peak lr {config.lr:g}", flush=True)
    spent = 0.0
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        their_step(theirs, next(batches), optimizer, autocast)
        rate.step()
        spent += time.perf_counter() - begin
        if step % max(1, n // config.rows) == 0 or step == steps:
            figures = "  ".join(f"{k} {v:.4f}" for k, v in score(theirs, valid).items())
            print(f"{spent:6.0f} s, step {step:,}: {figures}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Fine-tuning beside the same encoder in Hugging Face's class.")
    cli.add_flags(parser, ComparisonConfig, "comparison")
    config = ComparisonConfig(**parser.parse(sys.argv[1:] if argv is None else argv))
    kernels.install(torch.device("cpu"))
    ours, theirs, train, valid, pad = load_both(config)
    rows = single_rows(train)
    batches = random_batches(rows, config.rows, pad)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=config.dtype == "bf16")
    epoch = compare_speed(ours, theirs, train, batches, autocast, config)
    if config.minutes:
        steps = max(1, round(60 * config.minutes / epoch * len(rows) / config.rows))
        train_their_model(theirs, batches, valid, autocast, config, steps, len(rows))


if __name__ == "__main__":
    cli.run(main)
