"""How the cost of a GPT grows with context, width, depth, batch and vocabulary, as measured and as
the formulas say.

    python -m lab.growth                   a table and a picture, less than a minute on two cores

It measures the forward and backward pass of a micro-batch in fp32, which adds to the gradients of
an earlier one. One of the five sizes grows at a time. Two questions are asked for each: with what
exponent does the cost grow at these sizes, and which exponent does it approach?

Left out: the optimizer's step, which takes 8 more bytes and a few reads and writes for each
parameter, independent of context and batch; bf16, torch.compile, more than one process.

Papers: operations of a training step, Kaplan et al. 2020 (arXiv:2001.08361), section 2.1; what is
kept for the backward pass, Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1 (there in 16
bits and with dropout).
"""

import math
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine import cli
from engine.cpu import writes_out
from engine.losses import CHUNK
from engine.memory import Ledger, bytes_of
from engine.processes import Processes, pick_device
from lab.pictures import new_figure, new_picture, save
from lab.turns import take_turns
from model import GPT, GPTConfig
from tasks.flags import check, ranged
from train import gradients


@dataclass
class GrowthConfig:
    device: str = "cpu"  # cpu or cuda
    repeats: int = ranged(5, 1, 1000)  # turns of each size, of which the median counts
    out: str = "out/growth.png"  # the picture; the table is written beside it, as .md

    def __post_init__(self):
        check(self)


HEAD = 64  # the width of a head: more width is more heads, as in GPT-2 and GPT-3


class Size(NamedTuple):
    T: int  # context length
    C: int  # width
    L: int  # depth
    B: int  # sequences of a batch
    V: int  # vocabulary


# {device: (the sizes that do not grow, the smallest of five sizes for each that does)}
SIZES = {
    "cpu": (Size(256, 128, 4, 2, 4096), Size(256, 64, 1, 1, 4096)),
    "cuda": (Size(1024, 512, 8, 8, 16384), Size(256, 128, 2, 2, 8192)),
}
NAMES = {"T": "context", "C": "width", "L": "depth", "B": "batch", "V": "vocabulary"}
# The exponent that each cost approaches as that size alone grows.
LIMITS = {
    "time": {"T": 2, "C": 2, "L": 1, "B": 1, "V": 1},
    "memory": {"T": 1, "C": 2, "L": 1, "B": 1, "V": 1},
}
# Why the measured cost differs from the formula.
STAYS = "a chunk of logits and more than 8 bytes a weight of the embeddings stay"
WHY = {
    "time": {
        "T": "kernels that skip what the causal mask hides do half of the scores",
        "C": "small matrices are multiplied at a lower rate, so the square shows late",
        "L": "each layer has its own overhead, which the formula does not know",
        "B": "a small batch leaves the processor waiting for the start of each operation",
        "V": "the head runs at a lower rate than the blocks, so it counts earlier",
    },
    "memory": {
        "T": "logits are held up to a limit of 16 MB, and beyond it do not grow",
        "C": "parameters are a square; all else grows slower, and is most of it at first",
        "L": STAYS,
        "B": STAYS,
        "V": "a new gradient of the embeddings exists twice before it is added: 16 bytes, not 8",
    },
}


# ---- the formulas --------------------------------------------------------------------------------


def operations(size: Size, device: str) -> dict[str, float]:
    """FLOPs of a step: 6 for each token and each weight of a matrix, 2 forward and 4 backward. In
    attention, each query likewise has T keys and T values of C numbers in place of weights."""
    T, C, L, B, V = size
    return {
        "blocks": 6 * B * T * L * 12 * C * C,
        "attention": 6 * B * T * L * 2 * C * T,
        "head": 6 * B * T * V * C,
    }


def stored(size: Size, device: str) -> dict[str, float]:
    """Bytes of a step. A parameter and its gradient take 4 + 4. For each token and channel a block
    keeps 16 numbers: the inputs of two LayerNorms and of what follows them (4), q, k, v, the output
    of attention (4), and 4 + 4 inside the MLP. Where attention is written out, it keeps each head's
    T weights for each token too. The loss holds a chunk of logits and of log-probabilities."""
    T, C, L, B, V = size
    written_out = device == "cpu" and writes_out(T * T, 0.0)
    return {
        "blocks": 8 * L * 12 * C * C,
        "embeddings": 8 * V * C,
        "activations": 4 * B * T * L * 16 * C,
        "scores": 4 * B * T * L * (C // HEAD) * T * written_out,
        "logits": 8 * min(B * T * V, CHUNK[device]),
    }


FORMULAS = {"time": operations, "memory": stored}
UNITS = {"time": ("ms", 1e3), "memory": ("MB", 1e-6)}


# ---- measuring -----------------------------------------------------------------------------------


class Cost(NamedTuple):
    time: float  # seconds
    memory: float  # bytes


def make_step(size: Size, device: torch.device) -> tuple[Callable[[], object], list[torch.Tensor]]:
    """(a step, the tensors that exist before it: batch, weights, gradients)."""
    T, C, L, B, V = size
    model = GPT(GPTConfig(V, T, L, C // HEAD, C)).to(device)
    tokens, targets = torch.randint(V, (2, B, T), device=device)
    batch, group = {"tokens": tokens, "targets": targets}, Processes(0, 1, device)

    def step() -> None:
        gradients(model, [batch], group, nullcontext)

    step()
    learns = list(model.parameters())
    return step, [tokens, targets, *learns, *(p.grad for p in learns)]


def peak_memory(step: Callable[[], object], held: list[torch.Tensor]) -> float:
    """The most bytes that a step has at one time. On a GPU torch's allocator knows them. Elsewhere
    a Ledger counts the tensors that the step's operations return, for as long as they live."""
    if held[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return bytes_of(held) + torch.cuda.max_memory_allocated() - before
    with Ledger(held, cast=[]) as ledger:
        step()
    return bytes_of(held) + ledger.peak


def sweep(base: Size, first: Size, doublings: int = 4) -> dict[str, list[Size]]:
    """{axis: sizes}; along an axis only the size of that name changes, and doubles each time."""
    return {
        axis: [base._replace(**{axis: getattr(first, axis) << i}) for i in range(doublings + 1)]
        for axis in Size._fields
    }


def measure(sizes: set[Size], repeats: int, device: torch.device) -> dict[Size, Cost]:
    """{size: cost}. All sizes take turns, so that other work of the machine slows all alike."""
    steps, memory = {}, {}
    for size in sorted(sizes):
        steps[str(size)], held = make_step(size, device)
        memory[size] = peak_memory(steps[str(size)], held)
    times = take_turns(steps, repeats, device)
    return {s: Cost(statistics.median(times[str(s)]), memory[s]) for s in memory}


# ---- exponents -----------------------------------------------------------------------------------


def exponents(at: list[float], costs: list[float]) -> list[float]:
    """d log(cost) / d log(size), from each size to the next."""
    steps = pairwise(zip(at, costs, strict=True))
    return [math.log(after / before) / math.log(y / x) for (x, before), (y, after) in steps]


def fit_weights(terms: list[list[float]], measured: list[float]) -> list[float]:
    """The non-negative weights with which the terms add up to the measured costs, by least squares
    of relative errors. terms has a row for each measurement and a column for each weight."""
    ratios = np.array(terms) / np.array(measured)[:, None]
    scales = ratios.max(0)  # terms differ by orders of magnitude: FLOPs, and 1 for a step
    kept, weights = np.flatnonzero(scales), np.zeros(len(scales))
    while True:
        found = np.linalg.lstsq(ratios[:, kept] / scales[kept], np.ones(len(ratios)), rcond=None)[0]
        if found.min() >= 0:
            weights[kept] = found / scales[kept]
            return weights.tolist()
        kept = np.delete(kept, found.argmin())


Series = dict[str, dict[Size, float]]  # measured, formula, fitted: {size: ms or MB}


def compare(cost: str, found: dict[Size, Cost], device: str) -> tuple[Series, str]:
    """(series, a sentence with the fitted weights). The series are the measured cost; the formula,
    for time at the one rate that fits all sizes best; and the formula with a fitted weight for each
    of its terms and for what it leaves out, the overhead of each layer and of each step."""
    unit, scale = UNITS[cost]
    measured = {s: scale * getattr(c, cost) for s, c in found.items()}
    terms = {s: FORMULAS[cost](s, device) for s in found}
    totals = {s: sum(of_size.values()) for s, of_size in terms.items()}
    rate = scale
    if cost == "time":
        rate = fit_weights([[total] for total in totals.values()], list(measured.values()))[0]
    formula = {s: rate * total for s, total in totals.items()}
    for s, of_size in terms.items():
        of_size |= {"layer": s.L, "step": 1} if cost == "time" else {"step": 1}
    weights = fit_weights([list(x.values()) for x in terms.values()], list(measured.values()))
    fitted = {s: float(np.dot(weights, list(x.values()))) for s, x in terms.items()}
    said = []
    for name, weight in zip(next(iter(terms.values())), weights, strict=True):
        if not weight:
            continue
        if name in ("layer", "step"):
            said.append(f"{weight:.1f} {unit} for each {name}")
        elif cost == "memory":
            said.append(f"{weight / scale:.2f} x the formula's {name}")
        else:
            said.append(f"{name} at {1e-6 / weight:,.0f} GFLOP/s")
    off = [abs(fitted[s] / measured[s] - 1) for s in found]
    errors = f"{statistics.median(off):.0%} off (median), {max(off):.0%} at most"
    series = {"measured": measured, "formula": formula, "fitted": fitted}
    return series, f"Fitted {cost}: {', '.join(said)}; {errors}."


# ---- tables and pictures -------------------------------------------------------------------------


def exponent_table(cost: str, sweeps: dict[str, list[Size]], series: Series) -> str:
    """A Markdown table with the first and the last exponent of each size, and the reasons below."""
    lines = [f"| {cost}: what grows | sizes | {UNITS[cost][0]} | {' | '.join(series)} | limit |"]
    lines.append("|---|---|---|---|---|---|---|")
    measured = series["measured"]
    for axis, sizes in sweeps.items():
        at = [getattr(s, axis) for s in sizes]
        slopes = [exponents(at, [values[s] for s in sizes]) for values in series.values()]
        lines.append(
            f"| {NAMES[axis]} {axis} | {', '.join(f'{n:,}' for n in at)} "
            f"| {', '.join(f'{measured[s]:,.0f}' for s in sizes)} "
            f"| {' | '.join(f'{s[0]:.2f} → {s[-1]:.2f}' for s in slopes)} "
            f"| {LIMITS[cost][axis]} |"
        )
    reasons = [f"- {NAMES[axis]}: {WHY[cost][axis]}." for axis in sweeps]
    return "\n".join([*lines, "", *reasons])


def draw(sweeps: dict[str, list[Size]], costs: dict[str, Series], path: Path) -> Path | None:
    """Draws a panel for each axis and cost, with logarithmic scales: an exponent is a slope there.
    Returns the path, or None if matplotlib is missing: the table must not fail for a picture."""
    figure = new_figure(path, 13, 6.2)
    if figure is None:
        return None
    panels = figure.subplots(len(costs), len(sweeps), sharey="row")
    styles = {"formula": ("--", "tab:gray"), "fitted": ("-", "tab:orange")}
    styles["measured"] = ("o", "tab:blue")  # above the lines
    for row, (cost, series) in zip(panels, costs.items(), strict=True):
        row[0].set_ylabel(f"{cost} of a step, {UNITS[cost][0]}")
        for axes, (axis, sizes) in zip(row, sweeps.items(), strict=True):
            at, last = [getattr(s, axis) for s in sizes], {}
            for name, (style, color) in styles.items():
                values = [series[name][s] for s in sizes]
                last[name] = exponents(at, values)[-1]
                axes.plot(at, values, style, color=color, label=name)
            axes.set_title(
                f"slope {last['measured']:.2f}, formula {last['formula']:.2f}, "
                f"limit {LIMITS[cost][axis]}",
                fontsize=9,
            )
            axes.set(xscale="log", yscale="log", xlabel=f"{NAMES[axis]} {axis}")
            axes.set_xticks(at, [f"{n:,}" for n in at], fontsize=8)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8, loc="upper left")
    save(figure, path, OURS)
    return path


# ---- the command line ----------------------------------------------------------------------------

OURS = "growth.py of this project"  # marks both files as ours, which may be overwritten


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Measure how the cost of a GPT grows with each of its sizes.")
    cli.add_flags(parser, GrowthConfig, "growth")
    config = GrowthConfig(**parser.parse(sys.argv[1:] if argv is None else argv))
    device = pick_device(config.device)
    if device.type not in SIZES:
        raise ValueError(f"--device {device.type} is not measured: choose {' or '.join(SIZES)}")
    picture, beside = new_picture(config.out, OURS, ".md")
    torch.manual_seed(0)
    base, first = SIZES[device.type]
    sweeps = sweep(base, first)
    found = measure({s for sizes in sweeps.values() for s in sizes}, config.repeats, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rest = ", ".join(f"{axis} {n:,}" for axis, n in base._asdict().items())
    parts = [
        f"Measured by {OURS}: torch {torch.__version__}, {name}, {torch.get_num_threads()} "
        f"threads. What does not grow: {rest}. Exponents of the first and of the last doubling:"
    ]
    costs = {}
    for cost in UNITS:
        costs[cost], sentence = compare(cost, found, device.type)
        parts += [exponent_table(cost, sweeps, costs[cost]), sentence]
    text = "\n\n".join(parts)
    print(text)
    beside.write_text(f"{text}\n", encoding="utf-8")
    drawn = draw(sweeps, costs, picture)
    print(f"\nthe same in {beside}" + f", drawn in {picture}" * (drawn is not None))


if __name__ == "__main__":
    cli.run(main)
