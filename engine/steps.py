"""Optimizer steps that the host does not wait for.

A GPU works on a queue, and idles when the host asks for a number before it queues more work. So
nothing here asks for one: whether to skip a step is decided on the device, and its losses are read
when the next step has been queued.
"""

import math
from collections import deque

import torch
from torch import Tensor

from engine.evaluation import divisor
from engine.logs import RunLog
from engine.processes import Processes
from engine.sharding import optimizers_of
from tasks.flags import TrainConfig

QUEUING = {"cuda"}  # devices that work while the host goes on; a test makes the CPU one of them
MOST_SKIPPED = 5  # steps in a row whose gradient is not finite


class Diverged(ValueError):
    """A run whose gradients, or all of whose evaluations, are no finite numbers."""


def update(optimizer, norm: Tensor) -> None:
    """optimizer.step(), unless the gradient's norm is not finite: then nothing changes.

    torch's fused Adam and AdamW decide that on the device, by the attribute that GradScaler sets.
    For other optimizers (Muon) the host waits for the norm once a step.
    """
    each = optimizers_of(optimizer).values()
    adams = all(isinstance(one, torch.optim.Adam | torch.optim.AdamW) for one in each)
    if adams and norm.device.type in QUEUING:
        for one in each:
            one.found_inf = norm.isfinite().logical_not().float()
        optimizer.step()
    elif math.isfinite(norm):
        optimizer.step()


class Step:
    """The numbers of one optimizer step, on which a GPU may still be working. `step` counts from 0.

    The GPU copies them to the host as soon as they are there, so that reading them does not wait
    for work that was queued later.
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
        """The record for the log, over all processes. Every process must call it."""
        group.at("reading losses", self.step)
        if self.copied:
            self.copied.synchronize()
        sums, counts = [float(value) for value in self.sums.values()], self.counts
        total = dict(zip(self.sums, group.all_reduce(sums), strict=True))
        mean = {name: value / divisor(name, counts) for name, value in total.items()}
        record = {"step": self.step + 1, "split": "train", **mean}
        record["loss"] = sum(mean[n] for n in counts)
        if group.device.type == "cuda":  # the most that tensors have had, in this process
            record["peak_gb"] = torch.cuda.max_memory_allocated(group.device) / 1e9
        return {**record, "lr": self.lr, "grad_norm": float(self.norm)}


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host. From CUDA it is queued, into pinned memory; elsewhere it is made now."""
    return tensor.to("cpu", non_blocking=tensor.is_cuda)


class StepQueue:
    """The steps that are queued and not yet read. Reading a step logs it. Steps that were skipped
    because the norm of their gradient was not finite are counted: all of them in `skipped`, the
    latest consecutive ones in `in_a_row`."""

    def __init__(self, config: TrainConfig, group: Processes, skipped: int = 0):
        self.config, self.group, self.skipped = config, group, skipped
        self.queue: deque[Step] = deque()
        self.in_a_row = 0

    def add(self, step: Step, log: RunLog | None) -> None:
        """Queues a step. While a GPU works on it, the host reads the numbers of the one before."""
        self.queue.append(step)
        self.read(log, leave=int(self.group.device.type in QUEUING))

    def read(self, log: RunLog | None, leave: int = 0) -> None:
        """Waits for all queued steps but the last `leave` of them. Raises Diverged after
        MOST_SKIPPED skipped steps in a row."""
        while len(self.queue) > leave:
            record = self.queue.popleft().read(self.group)
            step, config = record["step"], self.config
            # The same in every process: the norm is that of the averaged gradient.
            bad = not math.isfinite(record["grad_norm"])
            self.skipped += bad
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if log:
                write = step % config.log_interval == 0 or step == config.steps
                log.train({**record, "skipped": self.skipped}, write=write)
                if bad:
                    log.say(f"step {step:,} skipped: its gradient is not finite")
            if self.in_a_row == MOST_SKIPPED:
                raise Diverged(
                    f"{MOST_SKIPPED} steps in a row, up to {step:,}, had gradients that are not "
                    f"finite: lower --lr (now {config.lr:g}) or use --dtype fp32; what "
                    f"{config.out} holds is from before them"
                )
