"""Compiled runs of train.py one after the other in one launch of torchrun.

    torchrun --standalone --nproc_per_node=2 tests/compiled_runs.py JOB ...

Each run is named after its job. In a job "…-fails" the compiler of the last process fails, with
"…-fails-backward" only where it makes the graph of a gradient. Every process appends to
report-RANK.jsonl in the working folder what it found.
"""

import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from conftest import TOY_PAIRS
from sharded_runs import GPT_RUN, RUN
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters as counters_of_dynamo
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor

import train
from engine import processes, setup

PAIRS_RUN, DIVIDED = [*TOY_PAIRS, *RUN, "--n_layer=1"], ["--shard=model", "--compile"]
JOBS = {
    "gpt": GPT_RUN,
    "gpt-divided": [*GPT_RUN, *DIVIDED],
    "gpt-divided-fails": [*GPT_RUN, *DIVIDED],
    "gpt-divided-fails-backward": [*GPT_RUN, *DIVIDED],
    "gpt-fails": [*GPT_RUN, "--compile"],
    "bf16": [*GPT_RUN, "--dtype=bf16", "--shard=model"],
    "bf16-divided": [*GPT_RUN, "--dtype=bf16", *DIVIDED, "--recompute"],
    "seq2seq": PAIRS_RUN,
    "seq2seq-divided": [*PAIRS_RUN, *DIVIDED],
    "one": GPT_RUN,
    "one-model": [*GPT_RUN, "--shard=model"],
    "one-optimizer": [*GPT_RUN, "--shard=optimizer"],
}


def broken(graph, inputs):
    raise RuntimeError("no compiler here\nand a long story")


def forward_only(graph, inputs):
    compiler = aot_autograd(fw_compiler=lambda g, _: make_boxed_func(g.forward), bw_compiler=broken)
    return compiler(graph, inputs)


def about(run: train.Run) -> dict:
    """What the model of a run became, and what the compiler did."""
    counters = counters_of_dynamo
    return {
        "forward": type(run.forward).__name__,
        "optimizer": type(run.optimizer).__name__,
        "whole": run.network is not run.model,
        "layers": setup.layers_are_compiled(run.model),
        "graphs": counters["stats"]["unique_graphs"],
        "failed": counters["frames"]["total"] - counters["frames"]["ok"],
        "breaks": sum(counters["graph_break"].values()),
    }


def main() -> None:
    group = processes.start("cpu")
    stop, make, train_one = processes.stop, torch.compile, train.train
    processes.start, processes.stop = lambda *_: group, lambda *_: None
    train.Run.release = lambda run: None  # its network is looked at
    inductor.cpp.simdlen = 1  # C++ without vectors: half the time
    runs: list[train.Run] = []
    train.train = lambda *arguments: runs.append(train_one(*arguments))
    for job in sys.argv[1:]:
        torch._dynamo.reset()
        counters_of_dynamo.clear()
        # Graphs that nobody will use, or of which there are twenty, are not turned into C++.
        backend = "inductor" if job in ("gpt-divided", "bf16-divided") else "aot_eager"
        if "-fails" in job and group.rank == group.world - 1:
            backend = forward_only if job.endswith("backward") else broken
        torch.compile = partial(make, backend=backend)
        train.main([*JOBS[job], f"--out={job}"])
        with Path(f"report-{group.rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(about(runs.pop())) + "\n")
        group.barrier()
    stop(group)


if __name__ == "__main__":
    main()
