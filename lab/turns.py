"""Contestants that take turns, and the table of their times.

All are warmed up, then they take turns, so that other work of the machine slows all of them alike.
The table shows medians, the range of the middle half, and ratios to the last contestant, the one to
compare with.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from engine import cpu
from tasks.flags import check, choice, ranged


@dataclass
class BenchConfig:
    only: str = ""  # one of the comparisons (a wrong name lists them); empty: all
    checkpoint: str = ""  # a trained seq2seq for translate; empty: random weights
    repeats: int = ranged(5, 2, 1000)  # turns of each contestant
    device: str = "cpu"  # cpu, cuda or mps
    # fp32 or bf16; empty: bf16 on CUDA, else fp32, and for sampling both
    dtype: str = choice("", "fp32", "bf16", "")
    compile: bool | None = None  # torch.compile ours and the peer's training step; auto: on CUDA
    small: bool = False  # models of no size at all, to see whether everything works
    out: str = "out/bench.json"  # where the figures go, beside the table
    cache_dir: str = "data/cache"  # where downloads are kept, and the text of the standard library

    def __post_init__(self):
        check(self)


def take_turns(
    contestants: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """{name: seconds of each turn}, after one untimed round. A contestant that returns a float has
    measured its time itself. On a CPU, contestants whose name ends in AS_IT_COMES run without the
    settings of `cpu.py`."""
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


def time_copies(size: int, repeats: int, device: torch.device) -> tuple[list[float], int]:
    """(seconds of each copy of `size` fp32 numbers within the device's memory, the bytes that one
    reads and writes)"""
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    return take_turns({"": lambda: target.copy_(source)}, repeats, device)[""], 2 * source.nbytes


AS_IT_COMES = ", as it comes"


def peer_turns(name: str, run: Callable[[], object], device: torch.device) -> dict[str, Callable]:
    """{contestant: run} of a peer, which on a CPU runs both with the settings of `cpu.py` and
    without them, and on a GPU without those of `kernels.py`."""
    if device.type == "cuda":
        return {name: partial(with_all_attention, run)}
    cpu_names = [f"{name}, with our cpu.py", name + AS_IT_COMES]
    return dict.fromkeys(cpu_names if device.type == "cpu" else [name], run)


def with_all_attention(run: Callable[[], object]) -> object:
    """run(), with all the attention kernels that torch chooses from by itself."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        return run()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def as_it_comes() -> None:
    """Undoes the settings of `cpu.py`: MKL multiplies, and freed memory goes back to the system.
    (glibc adapts its thresholds; these are the highest that it reaches by itself.)"""
    torch.set_float32_matmul_precision("highest")
    if library := cpu.glibc():
        library.mallopt(cpu.MMAP_THRESHOLD, 32 * 2**20)
        library.mallopt(cpu.TRIM_THRESHOLD, 64 * 2**20)
        library.malloc_trim(0)


def print_table(
    title: str, times: dict[str, list[float]], work: float, unit: str, least=0.0, share="MFU"
) -> dict:
    """Prints the table and returns its figures. A turn does `work` units (`unit` is their name).
    `least` is the seconds that no device of this kind can do without, 0 where that is not known,
    and `share` the name of least / seconds: MFU where they are those of its peak rate."""
    print(f"\n{title}")
    names = list(times)
    base = statistics.median(times[names[-1]])
    width, figures = max(26, *map(len, names)) + 2, {}
    for name in names:
        middle = statistics.median(times[name])
        low, _, high = statistics.quantiles(times[name], n=4)
        figures[name] = {"seconds": middle, "middle_half": [low, high]}
        figures[name] |= {"rate": work / middle, "ratio": base / middle}
        figures[name] |= {share: least / middle} if least else {}
        print(
            f"  {name:<{width}}{middle:>9.4f} s  ({low:.4f} to {high:.4f}){work / middle:>14,.1f} "
            f"{unit}/s{base / middle:>8.2f} x" + f"{least / middle:>8.1%} {share}" * (least > 0),
            flush=True,
        )
    return {"title": title, "unit": unit, "contestants": figures}
