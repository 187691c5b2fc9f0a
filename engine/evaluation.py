"""Losses counted per target, and a model scored on all batches of some data."""

import math
from contextlib import nullcontext
from itertools import chain
from types import ModuleType

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from engine.processes import Processes


def loss_name(key: str) -> str:
    """The loss that a batch's targets belong to: "mlm" for "mlm_targets", "loss" for "targets"."""
    return key.removesuffix("targets").removesuffix("_") or "loss"


def count_targets(batch: dict[str, Tensor]) -> dict[str, int]:
    return {loss_name(k): int((v != -100).sum()) for k, v in batch.items() if k.endswith("targets")}


def divisor(name: str, counts: dict[str, float]) -> float:
    """The number of targets that a sum is divided by: that of its own loss, "mlm" for
    "mlm_accuracy", else that of "loss", which "balance_loss" and the nll of seq2seq share."""
    return max(counts.get(name.partition("_")[0], counts.get("loss", 0)), 1)


def learnt(sums: dict[str, Tensor], counts: dict[str, float]) -> list[str]:
    """The sums that a step makes smaller: the losses of the targets, and those that a network adds
    of its own accord, whose names end in "_loss"."""
    return [*counts, *(n for n in sums if n not in counts and n.endswith("_loss"))]


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    if device.type != "cuda":
        return {k: v.to(device) for k, v in batch.items()}
    return {
        k: v if v.is_cuda else v.pin_memory().to(device, non_blocking=True)
        for k, v in batch.items()
    }


@torch.no_grad()
def evaluate(
    model: nn.Module, data, group: Processes, autocast, progress: bool = False
) -> dict[str, float]:
    """The model's figures: data.report of the sums over all batches, divided over the processes.

    The sums are float64 and over fixed examples, so neither the batch size nor the number of
    processes changes the result beyond rounding. What a model returns as "predicted" is no sum:
    data.measure gets {number of a batch: array}, and its figures join the report.
    """
    training = model.training
    model.eval()
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    predicted: dict[int, Tensor] = {}
    # A process without a batch in the last round runs batch 0 without counting it: so each process
    # knows the names of the losses, and all take part in the forward of a divided model.
    rounds = math.ceil(data.n_batches / group.world)
    mine = range(group.rank, rounds * group.world, group.world)
    shown = {"desc": "scoring", "unit": "batch", "disable": None if progress else True}
    for i in tqdm(mine, **shown):
        group.at("evaluation")
        counted = i < data.n_batches
        batch = data.batch(i if counted else 0)
        with autocast():
            losses = model(**to_device(batch, group.device))
        if "predicted" in losses:
            predicted[i] = losses.pop("predicted")
        for into, found in ((sums, losses), (counts, count_targets(batch))):
            for name, value in found.items():
                into[name] = into.get(name, 0.0) + (float(value) if counted else 0.0)
    model.train(training)
    group.at("adding up the evaluation")
    total = group.all_reduce([*sums.values(), *counts.values()])
    report = data.report(
        dict(zip(sums, total, strict=False)), dict(zip(counts, total[len(sums) :], strict=True))
    )
    if predicted:
        every = {}
        for i in range(data.n_batches):
            tensor = group.broadcast_tensor(predicted.get(i), i % group.world)
            every[i] = tensor.cpu().numpy()
        report |= data.measure(every)
    return report


def to_minimise(task: ModuleType, report: dict[str, float]) -> float:
    """The figure that the best checkpoint has the least of, and that a checkpoint keeps: the task's
    goal, negated where more of it is better."""
    return report[task.GOAL] if task.LOWER_IS_BETTER else -report[task.GOAL]


def goal_of(task: ModuleType, minimised: float) -> tuple[str, float]:
    """("accuracy", 0.88) for -0.88 where accuracy is the goal; ("loss", 1.25) for 1.25."""
    return task.GOAL, minimised if task.LOWER_IS_BETTER else -minimised


def score(model: nn.Module, data, progress: bool = False) -> dict[str, float]:
    """The figures of a model outside of training, in one process and in the model's precision."""
    device = next(chain(model.parameters(), model.buffers())).device
    group = Processes(0, 1, device)
    return evaluate(model, data, group, nullcontext, progress)


def print_scores(model: nn.Module, data, name: str) -> None:
    """Prints what `sample.py --eval` shows: the data, the figures, the task's details."""
    print(f"{name}: {data.describe()} ({data.rule})", flush=True)
    report = score(model, data, progress=True)
    print("  ".join(f"{name} {value:.4f}" for name, value in report.items()))
    if hasattr(data, "details"):
        print(data.details())
