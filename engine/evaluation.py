"""Losses counted per target, and a model scored on all batches of some data."""

import math
from contextlib import nullcontext
from types import ModuleType

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from engine.processes import Processes


def loss_name(key: str) -> str:
    """The batch's "mlm_targets" belong to the loss "mlm", plain "targets" to "loss"."""
    return key.removesuffix("targets").removesuffix("_") or "loss"


def count_targets(batch: dict[str, Tensor]) -> dict[str, int]:
    return {loss_name(k): int((v != -100).sum()) for k, v in batch.items() if k.endswith("targets")}


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
    """data.report of the sums over the whole evaluation, of which each process does a slice.

    Float64 sums over fixed examples: neither the batch size nor the number of processes changes
    the result beyond rounding. What a model returns as "predicted" is no sum: data.measure gets it
    of every batch, and its figures join the report.
    """
    training = model.training
    model.eval()
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    predicted: dict[int, Tensor] = {}
    # A process without a batch in the last round runs the first one, and does not count it: all
    # learn the names, and a divided model's forward is one of all processes.
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
    """What the best checkpoint has the least of, and what is kept of it: the task's goal, with the
    other sign where more of it is better."""
    return report[task.GOAL] if task.LOWER_IS_BETTER else -report[task.GOAL]


def goal_of(task: ModuleType, minimised: float) -> tuple[str, float]:
    """("accuracy", 0.88) where -0.88 is what was minimised, ("loss", 1.25) where 1.25 was."""
    return task.GOAL, minimised if task.LOWER_IS_BETTER else -minimised


def score(model: nn.Module, data, progress: bool = False) -> dict[str, float]:
    """The figures of a model outside of training, in one process, in the precision it has."""
    group = Processes(0, 1, next(model.parameters()).device)
    return evaluate(model, data, group, nullcontext, progress)


def print_scores(model: nn.Module, data, name: str) -> None:
    """What `sample.py --eval` says: of what, and the figures."""
    print(f"{name}: {data.describe()} ({data.rule})", flush=True)
    report = score(model, data, progress=True)
    print("  ".join(f"{name} {value:.4f}" for name, value in report.items()))
    if hasattr(data, "details"):
        print(data.details())
