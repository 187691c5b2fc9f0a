"""Full and sparse attention against the length of a text: time, memory, and the exponents of both.

    python -m lab.lengths           512 to 16,384 positions, a few minutes on two cores
    python -m lab.lengths --quick   512 to 2,048

One attention of 4 heads of width 64, forward and backward, in fp32, one text. Each length is twice
the one before, so that an exponent is the logarithm to base 2 of the growth. Full attention
compares all pairs, exponent 2; blocks and Linformer should have exponent 1.

Left out: the layers around the attention, which are linear in the length; what a mask costs once
for each length (models/sparse.py), since all contestants are warmed up; bf16.
"""

import engine.waiting  # isort: skip  # noqa: F401  (before torch is loaded)

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine import cli, cpu, kernels
from engine.processes import pick_device
from lab.growth import Cost, exponents, peak_memory
from lab.pictures import new_figure, new_picture, save
from lab.turns import take_turns
from model import attend, causal_mask
from models.sparse import (
    BlockAttention,
    and_masks,
    causal,
    dilated,
    global_tokens,
    or_masks,
    project_keys,
    random_blocks,
    random_table,
    window,
)
from tasks.flags import check, ranged


@dataclass
class LengthsConfig:
    device: str = "cpu"  # cpu or cuda
    repeats: int = ranged(3, 1, 1000)  # turns of each contestant, of which the median counts
    quick: bool = False  # lengths up to 2,048 only
    out: str = "out/lengths.png"  # the picture; the table is written beside it, as .md

    def __post_init__(self):
        check(self)


LENGTHS = [512 << i for i in range(6)]
QUICK = LENGTHS[:3]
HEADS, WIDTH, BLOCK, KEYS = 4, 64, 64, 128
MOST = 6e9  # bytes: what would take more is not run
WRITTEN_OUT, KERNEL = "full, written out", "full, by the kernel"


# ---- contestants ---------------------------------------------------------------------------------


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula of the textbook, which has all T · T scores of a head at one time."""
    scores = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5
    hidden = ~causal_mask(q.size(2), k.size(2), q.device)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def contestants(
    T: int, device: torch.device
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """{name: attention of T positions}. All but Linformer are causal."""
    by_blocks = partial(BlockAttention, block=BLOCK)
    near = window(KEYS - 1, 0)
    # Random blocks are drawn beyond the three of which the window sees a part.
    far = random_blocks(random_table(-(-T // BLOCK), 2, KEYS // BLOCK, causal=True), BLOCK)
    projection = torch.randn(KEYS, T, device=device) * T**-0.5
    return {
        WRITTEN_OUT: written_out,
        KERNEL: lambda q, k, v: attend(q, k, v, "causal", 0.0),
        "window": by_blocks(near),
        "dilated window": by_blocks(dilated(KEYS - 1, 0, 2)),
        "BigBird": by_blocks(and_masks(causal, or_masks(near, global_tokens(BLOCK), far))),
        "Linformer": lambda q, k, v: project_keys(projection, None, q, k, v, 0.0),
    }


def needed(name: str, T: int) -> float:
    """Bytes that a contestant needs at the least: written out, the scores, what softmax makes of
    them, and the gradients of both."""
    return 4 * HEADS * T * T * 4 if name == WRITTEN_OUT else 0.0


def make_step(attention: Callable, T: int, device: torch.device) -> tuple[Callable, list[Tensor]]:
    """(a forward and backward pass, the tensors that exist before it: q, k, v, their gradients)"""
    inputs = [torch.randn(1, T, HEADS, WIDTH, device=device) for _ in "qkv"]
    inputs = [x.transpose(1, 2).requires_grad_() for x in inputs]

    def step() -> None:
        attention(*inputs).sum().backward()

    step()
    return step, [*inputs, *(x.grad for x in inputs)]


def measure(T: int, repeats: int, device: torch.device) -> dict[str, Cost]:
    """{contestant: cost} at this length; those that take turns are all that fit into MOST bytes."""
    steps, memory = {}, {}
    for name, attention in contestants(T, device).items():
        if needed(name, T) > MOST:
            continue
        steps[name], held = make_step(attention, T, device)
        memory[name] = peak_memory(steps[name], held)
    times = take_turns(steps, repeats, device)
    return {name: Cost(statistics.median(times[name]), memory[name]) for name in steps}


# ---- what it says --------------------------------------------------------------------------------

Found = dict[int, dict[str, Cost]]  # {length: {contestant: cost}}
UNITS = {"time": ("ms", 1e3), "memory": ("MB", 1e-6)}


def curve(found: Found, name: str, cost: str) -> tuple[list[int], list[float]]:
    """The lengths at which the contestant ran, and its cost at each."""
    lengths = [T for T, costs in found.items() if name in costs]
    return lengths, [getattr(found[T][name], cost) for T in lengths]


def names_of(found: Found) -> list[str]:
    return list(dict.fromkeys(name for costs in found.values() for name in costs))


def table(cost: str, found: Found) -> str:
    """A Markdown table: a row for each contestant, with the exponent of its last two doublings."""
    unit, scale = UNITS[cost]
    lines = [f"| {cost}, {unit} | {' | '.join(f'{T:,}' for T in found)} | exponent |"]
    lines.append("|---" * (len(found) + 2) + "|")
    for name in names_of(found):
        lengths, costs = curve(found, name, cost)
        cells = [
            f"{scale * getattr(of[name], cost):,.1f}" if name in of else f"over {MOST / 1e9:.0f} GB"
            for of in found.values()
        ]
        last = exponents([lengths[-3:][0], lengths[-1]], [costs[-3:][0], costs[-1]])[0]
        lines.append(f"| {name} | {' | '.join(cells)} | {last:.2f} |")
    return "\n".join(lines)


def pays_from(found: Found, name: str, other: str) -> int | None:
    """The length from which on the contestant is faster than the other at all lengths at which both
    ran; None if it is not at the longest."""
    both = [T for T, costs in found.items() if name in costs and other in costs]
    wins = [T for T in both if found[T][name].time < found[T][other].time]
    losses = [T for T in both if T not in wins]
    return next((T for T in wins if not losses or losses[-1] < T), None)


def verdicts(found: Found) -> list[str]:
    """A sentence for each kind of sparse attention: from where on it pays."""
    said = []
    for name in names_of(found):
        if name in (WRITTEN_OUT, KERNEL):
            continue
        T, longest = pays_from(found, name, KERNEL), max(found)
        times = found[longest][KERNEL].time / found[longest][name].time
        if T is None:
            said.append(f"- {name}: not faster than the kernel up to {longest:,} positions.")
        else:
            said.append(
                f"- {name}: faster than the kernel from {T:,} positions on, {times:.1f} times as "
                f"fast at {longest:,}."
            )
    return said


def draw(found: Found, path: Path) -> Path | None:
    """Draws time and memory against length, with logarithmic scales. Returns the path, or None if
    matplotlib is missing."""
    figure = new_figure(path, 11, 4.5)
    if figure is None:
        return None
    lengths = list(found)
    for axes, (cost, (unit, scale)) in zip(figure.subplots(1, 2), UNITS.items(), strict=True):
        for name in names_of(found):
            at, costs = curve(found, name, cost)
            axes.plot(at, [scale * x for x in costs], "o-", markersize=4, label=name)
        axes.set(xscale="log", yscale="log", xlabel="positions", ylabel=f"{cost}, {unit}")
        axes.set_xticks(lengths, [f"{T:,}" for T in lengths], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path, OURS)
    return path


# ---- the command line ----------------------------------------------------------------------------

OURS = "lengths.py of this project"  # marks both files as ours, which may be overwritten


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Measure full and sparse attention against the length of a text.")
    cli.add_flags(parser, LengthsConfig, "lengths")
    config = LengthsConfig(**parser.parse(sys.argv[1:] if argv is None else argv))
    device = pick_device(config.device)
    picture, beside = new_picture(config.out, OURS, ".md")
    if device.type == "cpu":
        cpu.prepare()
    kernels.install(device)
    torch.manual_seed(0)
    found = {}
    for T in QUICK if config.quick else LENGTHS:
        found[T] = measure(T, config.repeats, device)
        print(f"{T:,} positions: {sum(c.time for c in found[T].values()):.2f} s a turn", flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    threads = torch.get_num_threads()
    text = "\n\n".join(
        [
            f"Measured by {OURS}: torch {torch.__version__}, {name}, {threads} "
            f"thread{'s' * (threads > 1)}. {HEADS} heads of width {WIDTH}, one text, fp32, forward "
            f"and backward; {KEYS} keys in a window, blocks of {BLOCK}, and as many keys for "
            "Linformer. Exponents of the last two doublings:",
            *(table(cost, found) for cost in UNITS),
            "\n".join(verdicts(found)),
        ]
    )
    print(f"\n{text}")
    beside.write_text(f"{text}\n", encoding="utf-8")
    drawn = draw(found, picture)
    print(f"\nthe same in {beside}" + f", drawn in {picture}" * (drawn is not None))


if __name__ == "__main__":
    cli.run(main)
