"""Batches made ahead, by a thread, while the device works on those before.

They are pure functions of their numbers, so nothing depends on who makes them or when. One thread
is enough: 30,000 tokens take BERT's data 5 to 20 ms (whole words the longest), pairs 13, windows
0.2. Nobody else makes training batches then, so no data class needs locks. A second thread would
mostly wait for Python's own.

Left out: several workers in processes of their own, as torch's DataLoader has them.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Batch = dict[str, Tensor]


class Prefetch:
    """Called with i it returns make(i), and makes i + stride, … i + ahead · stride meanwhile, which
    is what a process asks for next; asked for another one, it begins there.

    An error of make(i) is raised for who asks for i, not before. For CUDA the batches lie in pinned
    memory, from where they are copied without holding up the host. ahead 0: no thread, nothing is
    made before it is asked for. That is best for CPUs, where a thread takes the model's time.
    """

    def __init__(self, make: Callable[[int], Batch], stride: int, ahead: int, device: torch.device):
        self.make, self.stride, self.ahead, self.device = make, stride, ahead, device
        self.pool = ThreadPoolExecutor(1, "prefetch")  # its thread begins with the first batch
        self.made: dict[int, Future] = {}

    def __call__(self, i: int) -> Batch:
        if not self.ahead:
            return self.make(i)
        wanted = range(i, i + self.ahead * self.stride + 1, self.stride)
        for j in self.made.keys() - set(wanted):
            self.made.pop(j).cancel()
        for j in wanted:
            if j not in self.made:
                self.made[j] = self.pool.submit(self.prepare, j)
        return self.made.pop(i).result()

    def prepare(self, i: int) -> Batch:
        batch = self.make(i)
        if self.device.type != "cuda":
            return batch
        with torch.cuda.device(self.device):  # or a thread's memory is pinned by way of GPU 0
            return {name: tensor.pin_memory() for name, tensor in batch.items()}

    def close(self) -> None:
        """Ends the thread, when the batch that it is at is made."""
        self.pool.shutdown(cancel_futures=True)
