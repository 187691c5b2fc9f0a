"""How a model is run, with what computed twice, compiled or not; how the gradient of a step is
added up, and the step made without waiting for it.

A GPU works on a queue, and idles where the host asks for a number before it queues more. So nothing
here asks: what decides (counts, the wish to stop) is known to the host, whether to skip the step is
decided on the device, and losses are read when the next step is queued.
"""

import math
import zlib
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from engine import losses
from engine.evaluation import count_targets, to_device
from engine.processes import Processes
from engine.sharding import several, silent
from model import Block

QUEUING = {"cuda"}  # devices that work while the host goes on; a test makes the CPU one of them


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
    try:
        losses.use_compiler(next(model.parameters()).device)
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
        losses.use_compiler(None)
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


def update(optimizer, norm: Tensor) -> None:
    """optimizer.step(), but all stays as it is where the gradient's norm is not finite.

    torch's Adam and AdamW, fused, decide that on the device, by the attribute that GradScaler sets.
    For others, Muon that is, the host waits for the norm, once a step.
    """
    each = several(optimizer).values()
    adams = all(isinstance(one, torch.optim.Adam | torch.optim.AdamW) for one in each)
    if adams and norm.device.type in QUEUING:
        for one in each:
            one.found_inf = norm.isfinite().logical_not().float()
        optimizer.step()
    elif math.isfinite(norm):
        optimizer.step()


class Step:
    """The numbers of an optimizer step, number `step` from 0: a GPU may still work on them.

    It copies them to the host as soon as they are there, so that reading them waits for nothing
    that was queued behind.
    """

    def __init__(
        self,
        step: int,
        lr: float,
        sums: dict[str, Tensor],
        counts: dict[str, float],
        norm: Tensor,
    ):
        self.step, self.lr, self.counts, self.copied = step, lr, counts, None
        self.sums = {name: to_host(value) for name, value in sums.items()}
        self.norm = to_host(norm)
        if norm.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self, group: Processes) -> dict:
        """A record for the log, of all processes, each of which calls it."""
        group.at("reading losses", self.step)
        if self.copied:
            self.copied.synchronize()
        sums, counts = [float(value) for value in self.sums.values()], self.counts
        total = dict(zip(self.sums, group.sum(sums), strict=True))
        # Beside the losses: mlm_accuracy is told for each of the "mlm_targets", the nll of seq2seq,
        # which has none of its own, for each of the "targets".
        mean = {
            n: s / max(counts.get(n.partition("_")[0], counts.get("loss", 0)), 1)
            for n, s in total.items()
        }
        record = {"step": self.step + 1, "split": "train", **mean}
        record["loss"] = sum(mean[n] for n in counts)
        return {**record, "lr": self.lr, "grad_norm": float(self.norm)}


def to_host(tensor: Tensor) -> Tensor:
    """From CUDA into pinned memory, in its turn; from other devices at once."""
    return tensor.to("cpu", non_blocking=tensor.is_cuda)
