"""What is printed before a run: its plan; or, for a dry run, the table of parameters, the memory of
each process, and the least time of a step."""

import re
import time
from typing import NamedTuple

import torch
import torch.nn as nn

import tasks
from engine import cpu, setup
from engine.config import divide_step
from engine.memory import Memory, bytes_of, full_batch_shape, make_model, plan_memory
from engine.processes import precision
from model import count_parameters
from tasks.flags import TrainConfig


class GPU(NamedTuple):
    """A GPU, by NVIDIA's data sheets of it and of the DGX machine that it is built into."""

    chip: str
    memory: float  # bytes; 80 GB are 80 GiB, of which CUDA, NCCL and gaps may have 7%
    peak: float  # floating-point operations per second in bf16, without sparsity
    nvlink: float  # bytes/s from one GPU to the others of its machine
    network: float  # bytes/s of a machine's 8 adapters together, each of which serves one ring


GPUS = (
    GPU("H200", 141e9, 989e12, 450e9, 8 * 50e9),
    GPU("H100", 80e9, 989e12, 450e9, 8 * 50e9),
    GPU("A100", 80e9, 312e12, 300e9, 8 * 25e9),
    GPU("A100", 40e9, 312e12, 300e9, 8 * 25e9),
)
MACHINE = 8  # GPUs that NVLink joins


def describe_run(run) -> str:
    """The plan of a train.Run that is about to begin or to go on, one line for each topic."""
    config, data, group = run.config, run.data, run.group
    tokens = config.tokens_per_step * config.steps
    epochs = tokens / data.tokens_per_epoch
    interval = run.eval_interval
    next_stop = min(config.steps, (run.step // interval + 1) * interval)
    device = group.device
    name = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    learning = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    whole, layers = run.network is not run.model, setup.layers_are_compiled(run.model)
    how = "compiled" if whole or layers else "eager"
    if config.shard and group.world > 1:
        how += f", {config.shard} divided into {group.world} parts"
    cut = run.warmup_steps < config.warmup
    plan = {
        **about_data(run),
        "model": f"{config.model}, preset {config.preset or 'none'}, "
        f"{count_parameters(run.model):,} parameters"
        + (f", of which {learning:,} learn" if learning < count_parameters(run.model) else ""),
        "step": f"{config.tokens_per_step:,} tokens = {data.tokens_per_batch:,} in a "
        f"micro-batch x {run.accumulate} accumulated x {group.world} "
        f"process{'es' * (group.world > 1)}",
        "steps": f"{config.steps:,} ({tokens / 1e6:,.1f}M tokens, {epochs:,.1f} epochs)"
        + (f", {run.step:,} of them done" if run.step else ""),
        "optimizer": f"{config.optimizer}, peak lr {config.lr:g}, {config.schedule} schedule, "
        f"warmup {run.warmup_steps:,}"
        + (f" (a quarter of the steps, not {config.warmup:,})" if cut else ""),
        "device": f"{device.type} ({name}), {str(run.dtype).removeprefix('torch.')}, {how}",
        "run": f"{run.out}: latest.pt, best.pt, log.jsonl, curves.png, config.json",
        "next": f"evaluation and checkpoint after step {next_stop:,}",
    }
    return in_lines(plan)


def about_data(run) -> dict[str, str]:
    """{title: text} of what any run says of its data."""
    data = run.data
    return {
        "data": f"{run.config.data}: {data.rule}",
        "training": data.describe(),
        "validation": run.validation.describe(),
        "tokenizer": f"{data.tokenizer.vocab_size:,} tokens, {data.tokenizer.hash[:12]}",
    }


def in_lines(plan: dict[str, str]) -> str:
    return "\n".join(f"{title:>10}  {text}" for title, text in plan.items())


def dry_run(config: TrainConfig, sizes: dict) -> None:
    """Prints the parameters of each component, and the memory and the time that training needs. The
    model is made on the meta device, which takes no memory. The settings are those that --help
    shows beside the same flags."""
    Model = tasks.network(config.model)
    with torch.device("meta"):
        model = Model(Model.Config(**sizes))
    print(f"{'component':<28}{'in one copy':>16}{'copies':>8}{'parameters':>20}")
    for component, count, copies in parameter_table(model):
        print(f"{component:<28}{count:>16,}{copies:>8}{count * copies:>20,}")
    print(f"{'total':<52}{count_parameters(model):>20,}")
    print(f"training takes {model.flops_per_token():.4g} floating-point operations a token")
    print(describe_memory(config, sizes))


def bytes_sent(config: TrainConfig, learns: int, dtype: torch.dtype, accumulate: int) -> float:
    """Bytes that each of n processes sends in a step; learns: the bytes of all gradients. A ring
    sends (n - 1) / n of them to add them up, and as many to hand out the sums. With --shard model
    each micro-batch adds up the gradients, and gathers the weights for forward and for backward
    (Rajbhandari et al. 2020, arXiv:1910.02054, section 7)."""
    passes = 2.0
    if getattr(config, "shard", "") == "model":
        passes = accumulate * (1 + 2 * dtype.itemsize / 4)
    return passes * learns * (config.world - 1) / config.world


def remedy(config: TrainConfig, memory: Memory, batch_size: int) -> str:
    """The flag to try next: the first one that makes the largest part smaller and is not set."""
    if memory.activations > memory.total / 2 and not config.recompute:
        return "--recompute"
    if memory.activations > memory.total / 2:
        return f"--batch_size {batch_size // 2}" if batch_size > 1 else "a smaller --block_size"
    if getattr(config, "shard", "") != "model":
        return "--shard model" + f" --world {MACHINE}" * (config.world == 1)
    return f"--world {2 * config.world}"


def describe_memory(config: TrainConfig, sizes: dict) -> str:
    """The memory of a process and the least time of a step, for GPUs in bf16 unless --device cpu or
    --dtype fp32 say otherwise. Arithmetic and sending may overlap, and no run reaches the peak
    rate of either."""
    device, dtype = "cuda", torch.float32 if config.dtype == "fp32" else torch.bfloat16
    if config.device == "cpu":
        cpu.use_onednn()  # who multiplies decides what attention keeps
        device, dtype = "cpu", precision(config.dtype, torch.device("cpu"))
    world = config.world
    shard = getattr(config, "shard", "") if world > 1 else ""
    memory, model = plan_memory(config, sizes, device, dtype, shard), make_model(config, sizes)
    batch_size, accumulate = divide_step(config, sizes["block_size"], world)
    B, T = full_batch_shape(config, sizes["block_size"], batch_size)
    notes = {"activations": ", with all else that the peak needs"}
    if shard == "model":
        notes |= {name: ", with those of blocks in use" for name in ("weights", "gradients")}
    elif world > 1:
        notes["gradients"] = ", half of them in DDP's buckets"
    lines = [
        f"memory of {f'each of {world:,} processes' if world > 1 else 'the process'}, {device}, "
        f"{str(dtype).removeprefix('torch.')}, eager, for {accumulate:,} micro-batch"
        f"{'es' * (accumulate > 1)} of {B:,} x {T:,} tokens, none of them padding:"
    ]
    for name, size in {**vars(memory), "total": memory.total}.items():
        lines.append(f"{name:>12}{size / 1e9:>10,.3f} GB{notes.get(name, '')}")
    # Recomputation repeats the forward pass, a third of the arithmetic.
    flops = model.flops_per_token() * config.tokens_per_step * (4 / 3 if config.recompute else 1)
    learns = bytes_of(p for p in model.parameters() if p.requires_grad)
    sent = bytes_sent(config, learns, dtype, accumulate)
    for gpu in GPUS if device == "cuda" else ():
        fits = "fits"
        if memory.total > gpu.memory:
            fits = f"does not fit, try {remedy(config, memory, batch_size)}"
        seconds = sent / (gpu.nvlink if world <= MACHINE else gpu.network)
        lines.append(
            f"{gpu.chip} with {gpu.memory / 1e9:.0f} GB: {fits}; a step takes at least "
            f"{flops / world / gpu.peak:.2g} s of arithmetic"
            + (f" and {seconds:.2g} s of sending" if world > 1 else "")
        )
    return "\n".join(lines)


def parameter_table(model: nn.Module) -> list[tuple[str, int, int]]:
    """[(component, parameters in one copy, copies)]; numbered blocks are counted as copies.

    It works on the meta device too, where GPT-3's 175 billion parameters take no memory.
    """
    counts: dict[str, int] = {}
    copies: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        component = re.sub(r"\.\d+\.", ".*.", module or name)
        # Inside a block, the sublayer is the component: q, k, v and proj are one attention.
        component = ".".join(component.split(".")[:3]) if ".*." in component else component
        number = re.search(r"\.(\d+)\.", module)
        counts[component] = counts.get(component, 0) + parameter.numel()
        copies.setdefault(component, set()).add(number[1] if number else "")
    return [(c, n // len(copies[c]), len(copies[c])) for c, n in counts.items()]


def least_seconds(flops: float, device: torch.device) -> float:
    """The seconds that so many operations take at the peak rate of a known GPU; 0 elsewhere."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops / gpu.peak for gpu in GPUS if gpu.chip in name), 0.0)


def fit_steps(run) -> None:
    """Sets the number of steps of a train.Run to what fits into --minutes, of which some are spent.

    It times steps at learning rate 0, which leave the weights as they are; then it makes a new
    optimizer, so that `--steps N` with the printed number repeats the run exactly. Raises
    ValueError where the time is too short for a single step.
    """
    budget, interval = 60 * run.config.minutes, run.eval_interval
    run.train_step(0.0).read(run.group)  # warms up
    start, count, done = time.perf_counter(), 0, False
    while not done:
        run.step = count + 1  # other batches, because they differ in cost
        run.train_step(0.0).read(run.group)
        count, spent = count + 1, time.perf_counter() - start
        done = bool(run.group.broadcast(count >= 3 and spent >= 0.02 * budget))
    step_seconds = spent / count
    start = time.perf_counter()
    run.evaluate()
    eval_seconds = time.perf_counter() - start
    left = budget - (time.perf_counter() - run.begin) - eval_seconds
    steps = int(run.group.broadcast(left // (step_seconds + eval_seconds / interval)))
    if steps < 1:
        raise ValueError(
            f"--minutes {run.config.minutes:g} is too short: the preparation took "
            f"{budget - left:.0f} s and a step takes {step_seconds:.2f} s"
        )
    run.config.steps = steps
    run.optimizer, run.step = run.new_optimizer(), 0
    run.say(f"{step_seconds * 1000:.0f} ms a step: --steps {steps} fit into the time")
