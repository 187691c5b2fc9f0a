"""A watchdog: it finds the process for which all others wait.

A collective operation returns when all processes have reached it. A process that never comes,
because its disk, its GPU or its machine is stuck, blocks all others without a message, in a call
that nothing can interrupt. So a thread of every process watches how long the process has been at
the same place, and compares that with the others by the key-value store through which they have
found each other.

Some work takes long and passes no place: reading and tokenizing text, compiling, writing a large
file. A process says so beforehand, and then nobody takes the wait for it for a hang, as long as its
own thread reports and the time that it has asked for is not over.

Left out: any repair. The process ends, and torchrun (--max-restarts) or the user goes on from the
checkpoint.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

OTHER_ENDED = "another process ended: see what it said, and go on with --resume"
LOOK = 2.0  # seconds between two looks, at most
GRACE = 5.0  # seconds in which a process may find out by itself that another has failed


class Watchdog(threading.Thread):
    """Ends this process when nothing has moved for `patience` seconds, with a sentence that names
    the process for which the others wait.

    All processes pass the same places in the same order, so the others wait for the one that has
    passed the fewest places; or for one whose watchdog does not report any more, because it was
    stopped or its machine is gone. While a process is busy, see there, only the latter counts.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, patience: float):
        super().__init__(daemon=True)
        self.store, self.rank, self.world, self.patience = store, rank, world, patience
        self.period = min(patience / 40, LOOK)
        self.looks, self.passed, self.step, self.place = 0, 0, 0, "starting"
        self.since, self.ended = time.monotonic(), threading.Event()
        self.busy_until, self.failed = 0.0, False

    def at(self, place: str, step: int | None = None) -> None:
        """Notes that this process is at `place` of `step`; the same place once more is progress."""
        step = self.step if step is None else step
        if (step, place) != (self.step, self.place):
            self.passed, self.step, self.place = self.passed + 1, step, place
        self.since = time.monotonic()

    @contextmanager
    def busy(self, seconds: float) -> Iterator[None]:
        """A context in which this process may work for so long without passing a place."""
        before, self.busy_until = self.busy_until, time.monotonic() + seconds
        try:
            yield
        finally:
            self.busy_until, self.since = before, time.monotonic()

    def fail(self) -> None:
        """Tells the other watchdogs that this process is about to end with an error. Theirs may be
        in a call that would not return for that: NCCL does not notice, nor does a GPU."""
        self.failed = True
        with suppress(RuntimeError):  # the store is gone
            self.store.set("failed", str(self.rank))

    def run(self) -> None:
        while not self.ended.wait(self.period):
            try:
                self.report()
                if self.store.check(["verdict"]):
                    self.end()
                elif self.store.check(["failed"]) and not self.failed:
                    self.follow()
                elif time.monotonic() - self.since > self.patience:
                    self.judge()
            except RuntimeError:  # the store is gone, and with it the process that keeps it
                if time.monotonic() - self.since > self.patience:
                    self.say("the process that keeps the addresses of all is gone")
                    os._exit(1)

    def report(self) -> None:
        self.looks += 1
        busy = time.monotonic() < self.busy_until
        state = [self.looks, self.passed, self.step, self.place, busy]
        self.store.set(str(self.rank), json.dumps(state))

    def states(self) -> dict[int, list]:
        """{rank: [looks, passed, step, place, busy]} of all processes that have ever reported."""
        ranks = [rank for rank in range(self.world) if self.store.check([str(rank)])]
        return {rank: json.loads(self.store.get(str(rank))) for rank in ranks}

    def judge(self) -> None:
        """Finds the culprits, unless the run has moved meanwhile, and names them if no other
        process has done so."""
        before, since = self.states(), self.since
        for _ in range(4):  # long enough for every living process to report something new
            if self.ended.wait(self.period):
                return
            self.report()
        after = self.states()
        if self.since != since:
            return
        alive = [rank for rank in after if after[rank] != before.get(rank)]
        culprits = [rank for rank in range(self.world) if rank not in alive]
        doing = "gives no sign of life (stopped, or its machine is gone)"
        if not culprits:
            if any(busy for *_, busy in after.values()):
                self.since = time.monotonic()
                return
            least = min(passed for _, passed, *_ in after.values())
            culprits = [rank for rank in after if after[rank][1] == least]
            _, _, step, place, _ = after[culprits[0]]
            doing = f"is still at step {step + 1:,} ({place})"
        verdict = json.dumps([self.rank, culprits])
        if self.store.compare_set("verdict", "", verdict).decode() == verdict:
            names = ", ".join(map(str, culprits))
            self.say(f"rank {names} of {self.world} {doing}")
        self.end()

    def follow(self) -> None:
        """Ends this process after another has failed, unless it finds that out by itself."""
        if not self.ended.wait(GRACE) and not self.failed:
            print(f"error: {OTHER_ENDED}", file=sys.stderr, flush=True)
            os._exit(1)

    def say(self, found: str) -> None:
        print(
            f"error: {found}, for which rank {self.rank} has waited {self.patience:g} seconds at "
            f"step {self.step + 1:,} ({self.place}): look at that process and its machine (GPU, "
            "disk, network; NCCL_DEBUG=INFO tells more), then go on with --resume, with a longer "
            "--timeout if it was only slow",
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        """Ends the process after the verdict, by force: the main thread is in a call that nothing
        interrupts."""
        _, culprits = json.loads(self.store.get("verdict"))
        if self.rank in culprits:
            print(f"rank {self.rank} of {self.world} hangs here:", file=sys.stderr)
            faulthandler.dump_traceback(file=sys.stderr)
        os._exit(1)

    def begin(self) -> None:
        self.store.set_timeout(timedelta(seconds=max(self.patience, 5)))
        self.since = time.monotonic()
        self.start()

    def finish(self) -> None:
        self.ended.set()
        self.join()
