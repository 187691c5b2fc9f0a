"""What engine/test_invariance.py has 1, 2 and 4 processes compute: gradients, evaluations, runs.

    torchrun --standalone --nproc_per_node=2 invariance_ranks.py    in a folder with the toy files

All of it in one launch, as each takes seconds. The first process writes what came out to
world-N.pt; each one writes to seen-RUN-N-RANK.json what it was shown in which step of a run.
"""

import json
from collections import defaultdict
from pathlib import Path

import torch
from conftest import TOY, TOY_BERT, TOY_PAIRS
from converting import noisy
from finetuning import TASKS as LABELLED
from finetuning import flags

import train
from engine import processes
from engine.config import resolve
from engine.evaluation import count_targets, evaluate
from engine.processes import Processes

T, MICRO, EMPTY = 16, 4, 2  # tokens of a row, micro-batches of a step, the one without any target
TOYS = {"gpt": TOY, "bert": TOY_BERT, "seq2seq": [*TOY_PAIRS, "--valid=valid-toy.tsv"]}
TASKS = (*TOYS, *LABELLED)
BATCH_SIZES = (1, 3, 8)
DROPOUT = {"gpt": ["--dropout=0.1"], "seq2seq": ["--dropout=0.1"]}
DROPOUT["bert"] = ["--dropout=0.1", "--attention_dropout=0.1"]


def alone(task: str, batch_size: int, tokens_per_step: int) -> train.Run:
    """A run as one process begins it, but with weights that no initialisation has made alike."""
    given = [*TOYS[task], "--dropout=0"] if task in TOYS else flags(task)
    if task == "similar":  # of which a step must be one batch: of 4 pairs, 12 or 32
        given += [f"--row_length={T}"]
        batch_size, tokens_per_step = 8 * batch_size, 8 * batch_size * T
    given += ["--class_weights"] * (task == "classify")
    given += [f"--block_size={T}", f"--batch_size={batch_size}"]
    config, sizes, _ = resolve([*given, f"--tokens_per_step={tokens_per_step}"])
    run = train.Run(config, sizes, None, Processes(0, 1, torch.device("cpu")))
    torch.manual_seed(0)
    noisy(run.model)
    return run


def step_batches(run: train.Run) -> list[dict[str, torch.Tensor]]:
    """The four micro-batches of a step that has padding, one of them without any target."""
    steps = ([run.data.batch(i + j) for j in range(MICRO)] for i in range(0, 99, MICRO))
    unmasked = run.config.model in ("gpt", "complete")  # what is padding there, no mask tells
    batches = next(b for b in steps if unmasked or any(k.endswith("keep") for m in b for k in m))
    for name in batches[EMPTY]:
        if name.endswith("targets"):
            batches[EMPTY][name].fill_(-100)
    return batches


def gradients(task: str, group: Processes) -> dict:
    """{parameter: the gradient of the step}, with the losses and counts of all processes."""
    run = alone(task, batch_size=4, tokens_per_step=MICRO * 4 * T)
    run.group = group
    run.model.train()
    run.prepare_forward()
    mine = step_batches(run)[group.rank :: group.world]
    sums, counts = train.gradients(run.forward, mine, group, run.autocast)
    found = {n: p.grad for n, p in run.model.named_parameters()}
    total = group.all_reduce([float(value) for value in sums.values()])
    return {"gradients": found, "sums": dict(zip(sums, total, strict=True)), "counts": counts}


def evaluations(task: str, group: Processes) -> dict:
    """{batch size: (the report, the number of batches)}"""
    found = {}
    for batch_size in BATCH_SIZES:
        run = alone(task, batch_size, tokens_per_step=24 * T)
        report = evaluate(run.model, run.validation, group, run.autocast)
        found[batch_size] = report, run.validation.n_batches
    return found


# ---- whole runs ----------------------------------------------------------------------------------


def examples(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """The rows that have targets, without their padding: what a step was about, however it was
    divided into micro-batches."""
    if not any(count_targets(batch).values()):
        return []
    rows = batch.get("source", batch["tokens"])
    keep = batch.get("source_keep", batch.get("keep", torch.ones_like(rows, dtype=torch.bool)))
    found = [row[kept].tolist() for row, kept in zip(rows, keep, strict=True)]
    if "targets" in batch:  # of a source: its translation
        more = zip(found, batch["targets"], strict=True)
        found = [row + target[target != -100].tolist() for row, target in more]
    return found


def run_and_record(name: str, given: list[str], group: Processes) -> None:
    """A run by all processes, each of which notes the examples that its model gets to see."""
    seen = defaultdict(list)
    real = train.Run.train_step

    def recording(self, *args):
        def note(model, positional, batch):
            seen[self.step].extend(examples(batch))

        hook = self.model.register_forward_pre_hook(note, with_kwargs=True)
        record = real(self, *args)
        hook.remove()
        return record

    train.Run.train_step, show = recording, train.closing.show_results
    train.closing.show_results = lambda run: None
    try:
        train.train(*resolve(given), group)
    finally:
        train.Run.train_step, train.closing.show_results = real, show
    path = Path(f"seen-{name}-{group.world}-{group.rank}.json")
    path.write_text(json.dumps(seen), encoding="utf-8")


def runs(task: str, group: Processes) -> None:
    """20 steps with dropout, and a chain: 7 steps by one process, 6 by two, the last 7 by four."""
    given = [*TOYS[task], *DROPOUT[task], f"--tokens_per_step={MICRO * 4 * T}", "--steps=20"]
    given += ["--dtype=fp32", "--eval_interval=10"]
    run_and_record(f"whole-{task}", [*given, f"--out=whole-{task}-{group.world}"], group)
    part = {1: [*given, "--stop_after=7"], 2: ["--resume", "--stop_after=6"], 4: ["--resume"]}
    run_and_record(f"chain-{task}", [*part[group.world], f"--out=chain-{task}"], group)


def compute(group: Processes) -> None:
    found = {
        "gradients": {task: gradients(task, group) for task in TASKS},
        "evaluations": {task: evaluations(task, group) for task in TASKS},
    }
    for task in TOYS:
        runs(task, group)
    if group.main:
        torch.save(found, f"world-{group.world}.pt")


if __name__ == "__main__":
    group = processes.start("cpu")
    compute(group)
    processes.stop(group)
