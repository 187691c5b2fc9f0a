"""One function applied to many batches of text, on all cores, with the results in order.

Processes, not threads: much of the work on text is done in Python, under its global lock.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from itertools import chain, islice
from threading import Thread
from typing import Any, TypeVar

BATCH = 1_000_000  # characters of text sent to a worker process at a time
MOST_WORKERS = 16  # one process feeds them all, and each has its own copy of what it remembers

Item, Batch, Result = TypeVar("Item"), TypeVar("Batch"), TypeVar("Result")


def batched(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Lists of items. Each ends with the item by which its total size reaches BATCH."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= BATCH:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def start_method() -> str:
    """How worker processes are started. "fork" is the quickest, but the copy of a process lacks its
    threads and keeps the locks that they held. CUDA and process groups (gloo's sockets, NCCL, the
    watchdog) have such threads: once they are there, workers are forked by a server process, which
    has none."""
    method, torch = multiprocessing.get_start_method(), sys.modules.get("torch")
    if method != "fork" or not torch:
        return method
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return "forkserver" if joined or torch.cuda.is_initialized() else method


def on_all_cores(work: Callable[[Batch], Result], batches: Iterable[Batch]) -> Iterator[Result]:
    """Yields work(batch) for each batch, in order. Few batches are under way at a time, so memory
    stays flat.

    The worker pool starts when there are at least 4 batches, or 40 where the workers are no copies
    of this process and import torch anew; `work` and its results must then be picklable. If no
    worker can be started, or if the workers die because the calling script lacks `if __name__ ==
    "__main__"`, this process does the work itself. Errors of `work` and of `batches` are raised
    here.
    """
    batches = iter(batches)
    method = start_method()
    enough = 4 if method == "fork" else 40
    head = list(islice(batches, enough))
    batches = chain(head, batches)
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    # A daemonic process (a DataLoader's worker, say) is not allowed to have children.
    if len(head) < enough or workers == 1 or multiprocessing.current_process().daemon:
        yield from map(work, batches)
        return

    waiting: deque[tuple[Batch, Any]] = deque()

    def oldest() -> Result:
        batch, future = waiting.popleft()
        try:
            return future.result() if future else work(batch)
        except BrokenExecutor:
            return work(batch)

    options = {"initializer": start_worker, "initargs": (work,)}
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, context, **options) as pool:
        for batch in batches:
            try:
                waiting.append((batch, pool.submit(work_in_worker, batch)))
            except (BrokenExecutor, OSError):
                waiting.append((batch, None))
            if len(waiting) > 2 * workers:
                yield oldest()
        while waiting:
            yield oldest()


# In a worker. `work` is sent once, not with each batch, because it may hold a whole tokenizer.
_work: list[Callable] = []


def start_worker(work: Callable) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends the workers
    Thread(target=end_with_parent, daemon=True).start()
    _work[:] = [work]


def end_with_parent() -> None:
    """Ends this worker when its parent has ended. Otherwise the workers of a killed parent, which
    cannot send them anything, would wait for a batch forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work_in_worker(batch: Any) -> Any:
    return _work[0](batch)
