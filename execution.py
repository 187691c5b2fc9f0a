"""How a model is run, with what computed twice, compiled or not; how the gradient of a step is
added up."""

import zlib
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

import losses
from evaluation import count_targets, to_device
from model import Block
from processes import Processes
from sharding import silent


def digest(model: nn.Module) -> str:
    """Of its weights, on the CPU: another one for other bits."""
    total = 0
    for tensor in model.state_dict().values():
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), total)
    return str(total)


def recompute_blocks(model: nn.Module) -> None:
    """Every Block forgets its activations and computes them again when the gradient needs them."""
    for block in model.modules():
        if isinstance(block, Block):
            block.forward = partial(recomputed, block.forward, use_reentrant=False)


def compiled(model: nn.Module, batches: list[dict[str, Tensor]], autocast) -> nn.Module:
    """The compiled model, tried on batches; the model as it is, and one line, where that fails."""
    losses.use_compiler(True)
    try:
        shapes = {tuple(tensor.shape for tensor in batch.values()) for batch in batches}
        # A graph for each length of a batch would be compiled, until torch gives up.
        fast = torch.compile(model, dynamic=True if len(shapes) > 1 else None)
        for batch in batches:
            with autocast():
                sums = fast(**batch)
            sum(sums.values()).backward()
        with torch.no_grad(), autocast():  # evaluation compiles a graph of its own
            fast.eval()(**batches[0])
    except Exception as error:  # compilers fail in ways that cannot be listed
        reason = str(error).strip().partition("\n")[0][:120]
        print(f"torch.compile failed ({type(error).__name__}: {reason}): going on without it")
        losses.use_compiler(False)
        fast = model
    fast.train()
    model.zero_grad(set_to_none=True)
    return fast


def gradients(
    model: nn.Module,
    batches: list[dict],
    group: Processes,
    autocast,
    stop: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, float]] | None:
    """Adds up the gradient of one step: (summed losses of this process, counts of all).

    The step's loss is Σ losses / counts over all micro-batches of all processes, so that each
    target weighs the same; a mean of means would not. DDP averages over processes, hence the
    factor `world`. The wish to stop travels with the counts: one small message, all agree, and
    None is returned. Dropout is a function of `seed` and the number of the micro-batch: the same
    however many processes share the step, and whether the run was interrupted before it or not.
    """
    group.at("counting targets")
    names = sorted(count_targets(batches[0]))
    local = [sum(count_targets(batch)[name] for batch in batches) for name in names]
    *total, stops = group.sum([*local, int(stop)], torch.int64)
    if stops:
        return None
    counts = dict(zip(names, total, strict=True))
    sums: dict[str, Tensor] = {}
    group.at("gradients")
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        torch.manual_seed((seed * 65_537 + i * group.world + group.rank) % 2**63)
        # Gradients are exchanged once, after the last micro-batch. The switch must cover forward.
        with nullcontext() if last else silent(model):
            with autocast():
                found = model(**to_device(batch, group.device))
            if last:
                group.at("exchanging gradients")
            loss = sum(found[name] / max(counts[name], 1) for name in names) * group.world
            loss.backward()
        for name, value in found.items():
            sums[name] = sums.get(name, 0) + value.detach()
    return sums, counts
