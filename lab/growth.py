"""How the cost of a GPT grows with context, width, depth, batch and vocabulary: measured, and
beside it what the formulas say.

    python -m lab.growth                   a table and a picture, less than a minute on two cores

What is measured is the forward and backward pass of a micro-batch in fp32, with the gradients of an
earlier one there, to which it adds. One of the five sizes grows at a time. Two questions are asked
of each: with what exponent does the cost grow at these sizes, and which does it approach?

Left out: the optimizer's step, which takes 8 more bytes and a few reads and writes for each
parameter, whatever the context and the batch; bf16, torch.compile, several processes.

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

from data.lines import new_file
from engine import cli
from engine.cpu import LONG
from engine.losses import CHUNK
from engine.memory import Ledger, bytes_of
from engine.processes import Processes, pick_device
from lab.turns import take_turns
from model import GPT, GPTConfig
from train import gradients


@dataclass
class GrowthConfig:
    device: str = "cpu"  # cpu or cuda
    repeats: int = 5  # turns of each size, of which the median counts
    out: str = "out/growth.png"  # the picture; the table is written beside it, as .md

    def __post_init__(self):
        cli.check_ranges(self, {"repeats": (1, 1000)})


HEAD = 64  # the width of a head: more width is more heads, as in GPT-2 and GPT-3


class Size(NamedTuple):
    T: int  # context length
    C: int  # width
    L: int  # depth
    B: int  # sequences of a batch
    V: int  # vocabulary


# {device: (the sizes of all but the one that grows, the first of five sizes of that one)}
SIZES = {
    "cpu": (Size(256, 128, 4, 2, 4096), Size(256, 64, 1, 1, 4096)),
    "cuda": (Size(1024, 512, 8, 8, 16384), Size(256, 128, 2, 2, 8192)),
}
NAMES = {"T": "context", "C": "width", "L": "depth", "B": "batch", "V": "vocabulary"}
# What each exponent approaches as that size alone grows.
LIMITS = {
    "time": {"T": 2, "C": 2, "L": 1, "B": 1, "V": 1},
    "memory": {"T": 1, "C": 2, "L": 1, "B": 1, "V": 1},
}
# Why what is measured is not what the formula says.
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
    """FLOPs of a step: 6 for each token and weight that multiplies, 2 forward and 4 backward; as
    many for each product of attention, which has T weights of its own for each query."""
    T, C, L, B, V = size
    return {
        "blocks": 6 * B * T * L * 12 * C * C,
        "attention": 6 * B * T * L * 2 * C * T,
        "head": 6 * B * T * V * C,
    }


def stored(size: Size, device: str) -> dict[str, float]:
    """Bytes. A parameter has its gradient, 4 + 4. A block keeps, for each token, 16 numbers for
    each channel (two inputs of LayerNorms and two of what follows, q, k, v, what attention gives,
    and 4 + 4 inside the MLP) and, where attention is written out, each head's row of T weights.
    The loss holds a chunk of logits and of log-probabilities."""
    T, C, L, B, V = size
    written_out = device == "cpu" and T * T < LONG
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
    """(a step, the tensors that are there before it: batch, weights, gradients)."""
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
    """Bytes when a step has the most. On a GPU torch's allocator knows. Elsewhere the step is
    watched: the tensors that its operations return are counted for as long as they live."""
    if held[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return bytes_of(held) + torch.cuda.max_memory_allocated() - before
    with Ledger(held, cast=[]) as ledger:
        step()
    return bytes_of(held) + ledger.peak


def sweep(base: Size, first: Size, doublings: int = 4) -> dict[str, list[Size]]:
    """{axis: sizes}, of which that one doubles from one to the next."""
    return {
        axis: [base._replace(**{axis: getattr(first, axis) << i}) for i in range(doublings + 1)]
        for axis in Size._fields
    }


def measure(sizes: set[Size], repeats: int, device: torch.device) -> dict[Size, Cost]:
    """All of them take turns, so that what else the machine does hits all of them."""
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
    """The weights, none below zero, with which the terms add up to what is measured: least squares
    of relative errors. terms has a row for each measurement."""
    ratios = np.array(terms) / np.array(measured)[:, None]
    scales = ratios.max(0)  # FLOPs stand beside ones
    kept, weights = np.flatnonzero(scales), np.zeros(len(scales))
    while True:
        found = np.linalg.lstsq(ratios[:, kept] / scales[kept], np.ones(len(ratios)), rcond=None)[0]
        if found.min() >= 0:
            weights[kept] = found / scales[kept]
            return weights.tolist()
        kept = np.delete(kept, found.argmin())


Series = dict[str, dict[Size, float]]  # measured, formula, fitted: {size: ms or MB}


def compare(cost: str, found: dict[Size, Cost], device: str) -> tuple[Series, str]:
    """What is measured; the formula, of time at the one rate that suits all sizes best; the formula
    with a weight for each of its terms, and for what it leaves out: each layer's and each step's
    own. And a sentence with these weights."""
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


# ---- what is told --------------------------------------------------------------------------------


def exponent_table(cost: str, sweeps: dict[str, list[Size]], series: Series) -> str:
    """A table in Markdown, of each exponent the first and the last, and the reasons."""
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
    """A panel for each axis and cost, both scales logarithmic: an exponent is a slope.

    None where matplotlib is missing: the table does not fail for want of a picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} is not drawn: pip install matplotlib")
        return None
    figure = Figure(figsize=(13, 6.2), layout="constrained")
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
    figure.savefig(path, dpi=90, metadata={"Software": OURS})
    return path


# ---- the command line ----------------------------------------------------------------------------

OURS = "growth.py of this project"  # in both files, which may then be written again


def files(out: str) -> list[Path]:
    """[picture, table], which can be written. Raises ValueError."""
    picture = Path(out)
    if picture.suffix.lower() != ".png":
        raise ValueError(f"--out {out} is no PNG picture: end it in .png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    names = (out, str(picture.with_suffix(".md")))
    return [new_file("out", name, lambda p: OURS.encode() in p.read_bytes()) for name in names]


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Measure how the cost of a GPT grows with each of its sizes.")
    cli.add_flags(parser, GrowthConfig, "growth")
    config = GrowthConfig(**parser.parse(sys.argv[1:] if argv is None else argv))
    device = pick_device(config.device)
    if device.type not in SIZES:
        raise ValueError(f"--device {device.type} is not measured: choose {' or '.join(SIZES)}")
    picture, beside = files(config.out)
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
