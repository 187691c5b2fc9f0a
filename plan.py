"""What a run will do, told before it does it: the plan of training, the table of a dry run."""

import json
import re
from dataclasses import asdict

import torch
import torch.nn as nn

from checkpoint import TASKS
from config import TrainConfig
from model import count_parameters

# Floating-point operations per second in bf16, without sparsity, from the data sheets.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def describe(run) -> str:
    """Of a train.Run that is about to begin or go on."""
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
    how = "eager" if run.eager_or_compiled is run.model else "compiled"
    plan = {
        "data": f"{config.data}: {data.rule}",
        "training": data.describe(),
        "validation": run.validation.describe(),
        "tokenizer": f"{data.tokenizer.vocab_size:,} tokens, {data.tokenizer.hash[:12]}",
        "model": f"{config.model}, preset {config.preset or 'none'}, "
        f"{count_parameters(run.model):,} parameters"
        + (f", of which {learning:,} learn" if learning < count_parameters(run.model) else ""),
        "step": f"{config.tokens_per_step:,} tokens = {data.tokens_per_batch:,} in a "
        f"micro-batch x {run.accumulate} accumulated x {group.world} "
        f"process{'es' * (group.world > 1)}",
        "steps": f"{config.steps:,} ({tokens / 1e6:,.1f}M tokens, {epochs:,.1f} epochs)"
        + (f", {run.step:,} of them done" if run.step else ""),
        "optimizer": f"{config.optimizer}, peak lr {config.lr:g}, {config.schedule} schedule",
        "device": f"{device.type} ({name}), {str(run.dtype).removeprefix('torch.')}, {how}",
        "run": f"{run.out}: latest.pt, best.pt, log.jsonl, curves.png, config.json",
        "next": f"evaluation and checkpoint after step {next_stop:,}",
    }
    return "\n".join(f"{title:>10}  {text}" for title, text in plan.items())


def dry_run(config: TrainConfig, sizes: dict) -> None:
    """The parameters by component and the settings; on the meta device, which takes no memory."""
    Config, Model, _ = TASKS[config.model]
    with torch.device("meta"):
        model = Model(Config(**sizes))
    print(f"{'component':<28}{'in one copy':>16}{'copies':>8}{'parameters':>20}")
    for component, count, copies in parameter_table(model):
        print(f"{component:<28}{count:>16,}{copies:>8}{count * copies:>20,}")
    print(f"{'total':<52}{count_parameters(model):>20,}")
    print(f"training takes {model.flops_per_token():.4g} floating-point operations a token")
    print(json.dumps({**asdict(config), **asdict(model.config)}, indent=1))


def parameter_table(model: nn.Module) -> list[tuple[str, int, int]]:
    """[(component, parameters in one copy, copies)]; numbered blocks are counted as copies.

    Works on the meta device too, where GPT-3's 175 billion parameters take no memory.
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
    """What that many operations take at the peak rate of a known GPU; 0 elsewhere."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops / peak for known, peak in PEAK.items() if known in name), 0.0)
