"""Contestants that take turns, and the table of their times.

All are warmed up, then each has its turn again and again, so that what else the machine does hits
all of them. The table: medians, the middle half, ratios to the last, the one to compare with.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine import cpu


@dataclass
class BenchConfig:
    only: str = ""  # one of the comparisons (a wrong name lists them); empty: all
    checkpoint: str = ""  # a trained seq2seq for translate; empty: random weights
    repeats: int = 5  # turns of each contestant
    device: str = "cpu"  # cpu, cuda or mps
    dtype: str = ""  # fp32 or bf16; empty: bf16 on CUDA, else fp32, and for sampling both
    compile: bool | None = None  # torch.compile ours and the peer's training step; auto: on CUDA
    out: str = "out/bench.json"  # where the figures go, beside the table
    cache_dir: str = "data/cache"  # where downloads are kept, and the text of the standard library


def take_turns(
    contestants: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """{name: seconds of each turn}; one untimed round first. What returns a float has measured
    itself. On a CPU, contestants whose name ends in AS_IT_COMES run without what `cpu.py` sets."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, run in contestants.items():
            if device.type == "cpu":
                (as_it_comes if name.endswith(AS_IT_COMES) else cpu.prepare)()
            start = time.perf_counter()
            seconds = run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                whole = time.perf_counter() - start
                times[name].append(seconds if isinstance(seconds, float) else whole)
    if device.type == "cpu":
        cpu.prepare()
    return times


AS_IT_COMES = ", as it comes"


def peer_turns(name: str, run: Callable[[], object], device: torch.device) -> dict[str, Callable]:
    """{contestant: run}: a peer, which on a CPU runs with what `cpu.py` sets, and without."""
    cpu_names = [f"{name}, with our cpu.py", name + AS_IT_COMES]
    return dict.fromkeys(cpu_names if device.type == "cpu" else [name], run)


def as_it_comes() -> None:
    """torch without `cpu.py`: MKL, and memory that is given back. (glibc's own thresholds move;
    these are the highest that it comes to by itself.)"""
    torch.set_float32_matmul_precision("highest")
    if library := cpu.glibc():
        library.mallopt(cpu.MMAP_THRESHOLD, 32 * 2**20)
        library.mallopt(cpu.TRIM_THRESHOLD, 64 * 2**20)
        library.malloc_trim(0)


def print_table(
    title: str, times: dict[str, list[float]], work: float, unit: str, least=0.0
) -> dict:
    """Prints the table; `work` is how many `unit` one turn does, and `least` how long that takes at
    the GPU's peak rate, the share of which is the MFU. Returns the figures."""
    print(f"\n{title}")
    names = list(times)
    base = statistics.median(times[names[-1]])
    width, figures = max(26, *map(len, names)) + 2, {}
    for name in names:
        middle = statistics.median(times[name])
        low, _, high = statistics.quantiles(times[name], n=4)
        figures[name] = {"seconds": middle, "middle_half": [low, high]}
        figures[name] |= {"rate": work / middle, "ratio": base / middle}
        figures[name] |= {"mfu": least / middle} if least else {}
        print(
            f"  {name:<{width}}{middle:>9.4f} s  ({low:.4f} to {high:.4f}){work / middle:>14,.1f} "
            f"{unit}/s{base / middle:>8.2f} x" + f"{least / middle:>8.1%} MFU" * (least > 0),
            flush=True,
        )
    return {"title": title, "unit": unit, "contestants": figures}
