"""This process among the others that torchrun started, and the device that it has."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from sample import pick_device


@dataclass
class Processes:
    """rank of world; alone it is 0 of 1, and nothing is sent."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, numbers: list[float], dtype: torch.dtype = torch.float64) -> list[float]:
        """Element by element over all processes, which all get the same result."""
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def first(self, number: float) -> float:
        """The first process's number, for all."""
        return self.sum([number if self.main else 0])[0]

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


def start(device_name: str) -> Processes:
    """Joins the group that torchrun's variables describe; without them this process is alone."""
    device = pick_device(device_name)
    if "RANK" not in os.environ:
        return Processes(0, 1, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The first process tokenizes while the others wait, which may take hours for a large text.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
