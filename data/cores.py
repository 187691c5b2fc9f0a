"""One function for many batches of text, on all cores, the results in order.

Processes, not threads: much of what is done to text here is done in Python, under its lock.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from itertools import chain, islice
from threading import Thread
from typing import Any, TypeVar

BATCH = 1_000_000  # characters of text handed to a worker process at a time
MOST_WORKERS = 16  # all are fed by one process, and each has its own copy of what it remembers

Item, Batch, Result = TypeVar("Item"), TypeVar("Batch"), TypeVar("Result")


def batched(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Lists of items that together have BATCH characters, or more by less than the last item."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= BATCH:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def on_all_cores(work: Callable[[Batch], Result], batches: Iterable[Batch]) -> Iterator[Result]:
    """work(batch) of each batch, in order. Few are under way at a time: memory stays flat.

    Worker processes start when there are 4 batches, or 40 where they cannot be forked and each
    imports torch anew: `work` and its results must then be picklable. What a worker cannot do,
    because none can be started or because the calling script kills it for want of
    `if __name__ == "__main__"`, is done here. An error of `work` or of `batches` is raised here.
    """
    batches = iter(batches)
    enough = 4 if multiprocessing.get_start_method() == "fork" else 40
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

    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(work,)) as pool:
        for batch in batches:
            try:
                waiting.append((batch, pool.submit(work_in_worker, batch)))
            except (BrokenExecutor, OSError):
                waiting.append((batch, None))
            if len(waiting) > 2 * workers:
                yield oldest()
        while waiting:
            yield oldest()


# In a worker: `work` is sent once, not with each batch, for it may hold a whole tokenizer.
_work: list[Callable] = []


def start_worker(work: Callable) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends the workers
    Thread(target=end_with_parent, daemon=True).start()
    _work[:] = [work]


def end_with_parent() -> None:
    """A killed parent tells its workers nothing: they would wait for a batch for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work_in_worker(batch: Any) -> Any:
    return _work[0](batch)
