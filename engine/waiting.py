"""How torch's threads wait for each other. To be imported before torch: with it comes OpenMP's
library, which reads the environment only then.

A thread that has done its share of an operation waits for the others by looking again and again,
for milliseconds: on an idle machine nothing is faster. Where another program has taken a core, it
also takes that time from the very thread that it waits for. Then it is better to sleep at once.
Which of the two it is, is seen by looking at the machine for a tenth of a second. The results of a
run do not depend on it.

Left out: other systems than Linux, and programs that begin to work later.
"""

import os
import sys
import time
from pathlib import Path

STAT = Path("/proc/stat")  # a line for each core: "cpu0 user nice system idle …", in ticks
SECONDS = 0.1  # that the machine is looked at
BUSY = 0.5  # cores that others must take


def busy_ticks() -> int:
    """The ticks that the cores of this process have worked since the machine was started, but not
    for programs of low priority: `nice` ones make room by themselves."""
    ticks, cores = 0, {f"cpu{n}" for n in os.sched_getaffinity(0)}
    for line in STAT.read_text(encoding="ascii").splitlines():
        name, *numbers = line.split()
        if name in cores:
            user, _, system, *_ = map(int, numbers)
            ticks += user + system
    return ticks


def taken_by_others(seconds: float = SECONDS) -> float:
    """How many cores' time other processes take, seen over so many seconds; 0 where it cannot be
    seen."""
    try:
        before, own, start = busy_ticks(), time.process_time(), time.perf_counter()
        time.sleep(seconds)
        ticks, own = busy_ticks() - before, time.process_time() - own
        return max(0.0, ticks / os.sysconf("SC_CLK_TCK") - own) / (time.perf_counter() - start)
    except (OSError, ValueError, AttributeError):  # another system
        return 0.0


def choose() -> None:
    """Lets threads sleep at once where others are at work. What the user has chosen stays."""
    chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if not chosen and taken_by_others() >= BUSY:
        os.environ["GOMP_SPINCOUNT"] = "0"


if "torch" not in sys.modules:  # else, in a benchmark or a test, it would wait in vain
    choose()
