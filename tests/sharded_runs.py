"""Runs of train.py one after the other in one launch of torchrun, which alone takes six seconds.

    torchrun --standalone --nproc_per_node=2 tests/sharded_runs.py

A job is {"flags": a command line}. With "parts" its checkpoints are in parts although they are
small; with "full": rank that process finds no space for its part. After each job, every process
appends to report-RANK.jsonl in the working folder how many bytes it held, or the error.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import finetuning
import torch
from conftest import TOY, TOY_BERT, TOY_LLAMA, TOY_PAIRS

import train
from engine import parts, processes, sharding

DIVIDES_ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # torch 2.7 and newer

# Six steps; what is saved then is saved again when the run stops.
RUN = ["--dropout=0", "--steps=12", "--stop_after=6", "--eval_interval=6", "--tokens_per_step=256"]
GPT_RUN = [*TOY, *RUN, "--dtype=fp32"]
TUNED = finetuning.flags("classify", "--steps=12", "--stop_after=6", "--eval_interval=6")
FAMILIES = {
    "gpt": GPT_RUN,
    "adamw": [*GPT_RUN, "--optimizer=adamw"],
    "llama": [*TOY_LLAMA, *RUN, "--dtype=fp32", "--n_layer=1", "--window=5", "--tied=false"],
    "moe": [*TOY, *RUN, "--model=moe", "--dtype=fp32", "--n_layer=1", "--n_expert=3"],
    "sparse": [*TOY, *RUN, "--model=sparse_gpt", "--dtype=fp32", "--n_layer=1", "--window=5"],
    "bert": [*TOY_BERT, *RUN, "--n_layer=1"],
    "seq2seq": [*TOY_PAIRS, *RUN, "--n_layer=1"],
    "lora": [*TUNED, "--lora_rank=2", "--n_layer=1"],
    "frozen": [*TUNED, "--freeze=1", "--layer_decay=0.8"],
}
HALF, ON = [*GPT_RUN, "--stop_after=3"], ["--resume", "--stop_after=3", "--keep=0"]


def jobs() -> dict[str, dict]:
    """{name: job} in the order in which they run; "NAME+…" goes on with the run NAME."""
    found = {}

    def job(name: str, *flags: str, **more) -> None:
        if DIVIDES_ON_CPU or not ("--shard" in flags or name.startswith("model")):
            found[name] = {"flags": [*flags, f"--out={name.partition('+')[0]}"], **more}

    for name, flags in FAMILIES.items():
        job(name, *flags)
        job(
            f"{name}-model",
            *flags,
            "--shard",
            *["--recompute"] * (name in ("gpt", "llama", "moe", "sparse", "bert")),
        )
    for name in ("gpt", "adamw"):
        job(f"{name}-optimizer", *FAMILIES[name], "--shard=optimizer")
    job("bf16", *GPT_RUN, "--dtype=bf16", "--stop_after=3")
    job("bf16-model", *GPT_RUN, "--dtype=bf16", "--stop_after=3", "--shard")
    job("minutes", *GPT_RUN, "--stop_after=1", "--shard", "--minutes=0.1")
    job("one-then-optimizer", *ON, "--shard=optimizer")  # the first half is that of one process
    some = "--shard=model" if DIVIDES_ON_CPU else "--shard=optimizer"
    job("parts", *HALF, some, "--eval_interval=1", "--keep=2", parts=True)
    job("parts+full", *ON, parts=True, full=1)
    job("model-then-optimizer", *HALF, "--shard", parts=True)
    job("model-then-optimizer+", *ON, "--shard=optimizer", parts=True)
    job("model-then-none", *HALF, "--shard", parts=True)
    job("model-then-none+", *ON, "--shard=")
    lora = [*FAMILIES["lora"], "--stop_after=3", "--shard=optimizer"]
    job("model-lora", *lora, parts=True)
    job("model-lora+", *ON, "--shard=model", parts=True)
    return found


def held(tensors) -> int:
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


def no_space(writer, plan, planner):
    raise OSError(28, "No space left on device")


def main() -> None:
    group = processes.start("cpu")
    stop, write, threshold, train_one = (
        processes.stop,
        parts.Writer.write_data,
        sharding.PARTS_FROM,
        train.train,
    )
    processes.start, processes.stop = lambda *_: group, lambda _: None
    runs: list[train.Run] = []
    train.train = lambda *arguments: runs.append(train_one(*arguments))
    for job in jobs().values():
        sharding.PARTS_FROM = 0 if job.get("parts") else threshold
        parts.Writer.write_data = no_space if job.get("full") == group.rank else write
        try:
            train.main(job["flags"])
        except ValueError as error:
            report = {"error": str(error)}
        else:
            run = runs.pop()
            states = [
                s for o in sharding.optimizers_of(run.optimizer).values() for s in o.state.values()
            ]
            moments = [tensor for state in states for tensor in state.values()]
            report = {"weights": held(run.model.parameters()), "moments": held(moments)}
        with Path(f"report-{group.rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")
        group.barrier()
    stop(group)


if __name__ == "__main__":
    main()
