"""Fine-tuning beside the same encoder in Hugging Face's class, trained by a plain loop.

    python bench_finetune.py --model classify --init out/minilm.pt --data train.tsv --valid dev.tsv
    python bench_finetune.py --model tag --minutes 10 …    and what their loop reaches in that time

First, in turns: the seconds that an epoch takes. Their loop is the usual one: rows in random order,
--rows of them in a batch, each batch padded to its longest row, AdamW, a linear schedule. Their
model begins with the same weights, reads the same rows and is scored by the same code. Ours is the
step of train.py.
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

import checkpoint as checkpoints
import cli
import finetune
import optim
from checkpoint import TASKS
from config import CONFIGS
from data.masked import PAD
from evaluation import scores
from finetune import Answerer, Classifier
from peers import hugging_face_encoder, peer
from processes import Processes
from train import gradients


@dataclass
class BenchConfig:
    model: str = "classify"  # classify, tag or answer
    init: str = ""  # the pretrained encoder, from convert.py
    data: str = ""  # as for train.py
    valid: str = ""  # as for train.py
    minutes: float = 0.0  # train theirs for so long, evaluations not counted; 0: speed alone
    rows: int = 32  # of theirs in a batch
    lr: float = 5e-5  # peak learning rate of theirs
    row_length: int = 0  # most tokens of a row; 0: as many as the encoder reads
    repeats: int = 7  # turns of each, of 640 rows
    dtype: str = "fp32"  # fp32 or bf16 (autocast), of both
    seed: int = 1337  # of the head's weights and the order of rows


class Theirs(nn.Module):
    """Their class behind our names, so that one evaluation serves both."""

    def __init__(self, model: nn.Module, task: str):
        super().__init__()
        self.model, self.task = model, task

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        keep: Tensor | None = None,
        **targets: Tensor,
    ) -> dict[str, Tensor]:
        keep = torch.ones_like(tokens) if keep is None else keep.long()
        out = self.model(input_ids=tokens, token_type_ids=segments, attention_mask=keep)
        if self.task != "answer":
            logits, wanted = out.logits.float(), targets["targets"]
            loss = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="sum")
            return Classifier.scored(self, loss, logits, wanted)
        logits = torch.stack([out.start_logits, out.end_logits], 1).float()
        logits = logits.masked_fill(keep[:, None] == 0, -torch.inf)
        return Answerer.scored(self, logits, targets["start_targets"], targets["end_targets"])


def rows_of(data) -> list[dict[str, Tensor]]:
    """Every row of an epoch by itself, without padding."""
    rows = []
    for batch in map(data.batch, range(data.n_batches)):
        keep = batch.pop("keep", torch.ones_like(batch["tokens"], dtype=torch.bool))
        for i, length in enumerate(keep.sum(1).tolist()):
            rows.append({k: v[i, :length] if v.dim() > 1 else v[i] for k, v in batch.items()})
    return rows


def random_batches(rows: list[dict], size: int, pad: int) -> Iterator[dict[str, Tensor]]:
    """Epoch after epoch, each batch padded to its longest row."""
    fills = {"tokens": pad, "segments": 0, "targets": -100}
    while True:
        for chosen in torch.randperm(len(rows)).split(size):
            some = [rows[i] for i in chosen]
            lengths = torch.tensor([len(row["tokens"]) for row in some])
            batch = {"keep": torch.arange(int(lengths.max())) < lengths[:, None]}
            for name in some[0]:
                parts = [row[name] for row in some]
                pile = partial(nn.utils.rnn.pad_sequence, batch_first=True)
                whole = parts[0].dim() == 0
                padded = torch.stack(parts) if whole else pile(parts, padding_value=fills[name])
                batch[name] = padded
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


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__.partition("\n")[0])
    cli.add_flags(parser, BenchConfig, "comparison")
    config = BenchConfig(**parser.parse(sys.argv[1:] if argv is None else argv))
    if config.model not in ("classify", "tag", "answer"):
        raise ValueError(f"--model {config.model} is not known: choose classify, tag, answer")
    transformers = peer("transformers")
    Config, Model, Data = TASKS[config.model]
    checkpoint = checkpoints.load(Path(config.init))
    tokenizer = checkpoints.restore_tokenizer(Path(config.init), checkpoint)
    settings = CONFIGS[config.model](
        data=config.data, valid=config.valid, row_length=config.row_length, seed=config.seed
    )
    sizes = {k: v for k, v in checkpoint["model_config"].items() if k in vars(Config())}
    settings.batch_size = settings.tokens_per_step // sizes["block_size"]
    train, valid = Data.splits(settings, {"labels": (), **sizes}, tokenizer)
    sizes |= {k: getattr(train, k) for k in finetune.LEARNT if k in vars(Config())}
    torch.manual_seed(config.seed)
    ours = Model(Config(**sizes))
    finetune.take_weights(ours, checkpoint["model"])
    theirs = Theirs(hugging_face_encoder(transformers, ours, config.model), config.model).train()
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=config.dtype == "bf16")

    rows = rows_of(train)
    order = random_batches(rows, config.rows, tokenizer.special_tokens[PAD])
    ours.train()
    optimizer = optim.make_optimizer(ours, "adamw", lr=1e-9)
    group, seconds, step = Processes(0, 1, torch.device("cpu")), {"ours": [], "theirs": []}, 0
    slow = torch.optim.AdamW(theirs.parameters(), lr=1e-9, weight_decay=0.01)
    for turn in range(config.repeats + 1):
        begin, done = time.perf_counter(), 0
        while done < 640:
            batch = train.batch(step)
            done, step = done + len(batch["tokens"]), step + 1
            gradients(ours, [batch], group, autocast)
            nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        middle = time.perf_counter()
        for _ in range(640 // config.rows):
            their_step(theirs, next(order), slow, autocast)
        if turn:  # the first one warms up
            seconds["ours"].append((middle - begin) / done * len(rows))
            count = 640 // config.rows * config.rows
            seconds["theirs"].append((time.perf_counter() - middle) / count * len(rows))
    for name, each in seconds.items():
        low, mid, high = statistics.quantiles(each, n=4)
        print(f"{name:>7}  {mid:7.1f} s an epoch of {len(rows):,} rows ({low:.1f} to {high:.1f})")
    ratio = statistics.median(seconds["ours"]) / statistics.median(seconds["theirs"])
    print(f"  ratio  {ratio:.2f}", flush=True)
    if config.minutes:
        train_theirs(theirs, order, valid, config, statistics.median(seconds["theirs"]), len(rows))


def train_theirs(
    model: nn.Module, batches: Iterator[dict], valid, config: BenchConfig, epoch: float, n: int
) -> None:
    """From the weights as they were: the steps of the warming up had a rate of nearly nothing."""
    steps = round(60 * config.minutes / epoch * n / config.rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
    warm = max(1, steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, (steps - i) / max(1, steps - warm))
    )
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=config.dtype == "bf16")
    print(f"theirs, {steps:,} steps of {config.rows} rows, peak lr {config.lr:g}", flush=True)
    spent = 0.0
    for step in range(steps):
        begin = time.perf_counter()
        their_step(model, next(batches), optimizer, autocast)
        rate.step()
        spent += time.perf_counter() - begin
        if (step + 1) % max(1, n // config.rows) == 0 or step + 1 == steps:
            figures = "  ".join(f"{k} {v:.4f}" for k, v in scores(model, valid).items())
            model.train()
            print(f"{spent:6.0f} s, step {step + 1:,}: {figures}", flush=True)


if __name__ == "__main__":
    cli.run(main)
