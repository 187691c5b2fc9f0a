"""From counting to the Transformer: every rung learns the same text for the same time.

    python -m lab.ladder --minutes 1        a table and a picture: seven trainings of a minute
    python -m lab.ladder --only lstm,gpt    some of them

Each rung is one run of train.py with a preset, on single characters. Those that count do it once,
in seconds. In the end the probabilities of the n-grams are mixed with those of GPT, with weights
found on the first half of the validation text and scored on the second, as both are alone too.
Stupid backoff is in the table, but its values are no probabilities: their sum is above 1.
"""

import json
import math
import statistics
import sys
import textwrap
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import tasks
import train
from engine import cli, presets
from engine.checkpoint import load_model
from engine.logs import mix, read_log
from lab.pictures import new_figure, new_picture, save
from model import count_parameters
from models.ngram import mixture_weights
from tasks.flags import check, ranged

# Presets: the rungs are what comes before the hyphen.
PRESETS = (
    "ngram-shakespeare",
    "addk-shakespeare",
    "backoff-shakespeare",
    "cbow-shakespeare",
    "nnlm-shakespeare",
    "rnn-shakespeare",
    "lstm-shakespeare",
    "gru-shakespeare",
    "cnn-shakespeare",
    "gpt-shakespeare",
)
RUNGS = {name.partition("-")[0]: name for name in PRESETS}
COUNTING, *_, LAST = RUNGS


@dataclass
class LadderConfig:
    data: str = "shakespeare"  # as for train.py
    # of each training, its start and its evaluations included
    minutes: float = ranged(1.0, above=0, most=1e5)
    seeds: int = ranged(1, 1, 1000)  # repeat each training with this many seeds
    only: str = ""  # some of the rungs, with commas; empty: all
    out: str = "out/ladder.png"  # the picture; the table is written beside it, as .md
    runs: str = "out/ladder"  # where the runs are kept: those that are there are not repeated
    cache_dir: str = "data/cache"  # as for train.py
    steps: int = ranged(0, 0)  # so many steps of each instead of --minutes; 0: --minutes

    def __post_init__(self):
        check(self)
        unknown = [name for name in self.rungs if name not in RUNGS]
        if unknown:
            raise ValueError(f"--only {unknown[0]} is no rung: choose {', '.join(RUNGS)}")

    @property
    def rungs(self) -> list[str]:
        return self.only.split(",") if self.only else list(RUNGS)


@dataclass
class Result:
    """What the runs of one rung came to, one number for each seed."""

    parameters: int
    seconds: list[float]
    loss: list[float]  # nats per character
    bits: list[float]  # per byte
    # of the first seed: seconds, training loss; at the end the validation loss
    curve: list[tuple[float, float]]


def counts(name: str) -> bool:
    """Whether a rung takes no steps."""
    return tasks.counts(presets.PRESETS[RUNGS[name]]["model"])


def climb(name: str, seed: int, config: LadderConfig) -> Path:
    """The folder of a run of train.py, which is made if it is not there. Raises ValueError for a
    folder with a run of other flags, or one that was interrupted."""
    folder = Path(config.runs) / f"{name}-{seed}"
    flags = [f"--preset={RUNGS[name]}", f"--data={config.data}", f"--cache_dir={config.cache_dir}"]
    flags += [f"--out={folder}", "--device=cpu", f"--seed={seed}"]
    if not counts(name):
        flags.append(f"--steps={config.steps}" if config.steps else f"--minutes={config.minutes}")
    if folder.exists():
        note = folder / NOTE
        if not note.is_file() or json.loads(note.read_text(encoding="utf-8"))["flags"] != flags:
            raise ValueError(
                f"{folder} has a run with other flags, or one that was interrupted: delete it, or "
                "choose another --runs"
            )
        return folder
    start = time.perf_counter()
    print(f"{folder}: training", file=sys.stderr)
    with redirect_stdout(sys.stderr):
        train.main(flags)
    record = {"seconds": time.perf_counter() - start, "flags": flags}
    (folder / NOTE).write_text(json.dumps(record), encoding="utf-8")
    return folder


NOTE = "ladder.json"  # in the folder of a run: how long it took, with which flags


def read_result(folders: list[Path]) -> Result:
    """The figures of one rung's runs, from their logs."""
    result = Result(0, [], [], [], [])
    for folder in folders:
        seconds = json.loads((folder / NOTE).read_text(encoding="utf-8"))["seconds"]
        records = read_log(folder / "log.jsonl")
        found = [r for r in records if r["split"] == "validation" and r["loss"] is not None]
        best = min(found, key=lambda record: record["loss"])
        result.seconds.append(seconds)
        result.loss.append(best["loss"])
        result.bits.append(best["bits_per_byte"])
        if result.curve:
            continue
        network = load_model(folder / "best.pt", torch.device("cpu"))[0]
        result.parameters = count_parameters(network) or sum(
            buffer.numel() for buffer in network.buffers() if buffer.is_floating_point()
        )
        smooth, last = math.nan, records[-1]["step"]
        for r in records:  # steps take equally long
            if r["split"] == "train" and r["loss"] is not None:
                smooth = mix(smooth, r["loss"])
                result.curve.append((seconds * r["step"] / last, smooth))
        result.curve.append((seconds, result.loss[0]))
    return result


# ---- a mixture -----------------------------------------------------------------------------------


@torch.no_grad()
def log_probs(network: nn.Module, data) -> Tensor:
    """(n,) log p of every target of the data, in order, by a network with features and head."""
    found = []
    for i in range(data.n_batches):
        batch = data.batch(i)
        tokens, targets = batch["tokens"], batch["targets"]
        log_p = network.head(network.features(tokens)).log_softmax(-1)
        log_p = log_p.gather(2, targets.clamp(min=0)[..., None])[..., 0]
        found.append(log_p[targets != -100])
    return torch.cat(found)


def mixture(counting: Path, learning: Path) -> str:
    """What the n-gram model and GPT say together, in a sentence. The weights are found on the first
    half of the validation text; all figures are of the second half."""
    network, tokenizer, checkpoint = load_model(learning / "best.pt", torch.device("cpu"))
    config = train.TrainConfig(**checkpoint["train_config"])
    data = tasks.task(config.model).Data.splits(config, checkpoint["model_config"], tokenizer)[1]
    learnt = log_probs(network, data)
    batches = [data.batch(i) for i in range(data.n_batches)]
    text = torch.cat([batch["targets"][batch["targets"] != -100] for batch in batches])
    before = torch.cat([batches[0]["tokens"][0, :1], text[:-1]])
    counted = load_model(counting / "best.pt", torch.device("cpu"))[0]
    both = torch.stack([learnt, counted.log_probs(before[None], text[None])[0]], 1)
    half = len(both) // 2
    weights = mixture_weights(both[:half])
    mixed = (both[half:] + weights.log()).logsumexp(1)
    alone, ngram = (-both[half:].mean(0)).tolist()
    return (
        f"On the second half of the validation text GPT alone has {alone:.4f} nats per character, "
        f"n-grams alone {ngram:.4f}, and the mixture of {weights[0]:.0%} and {weights[1]:.0%} "
        f"{-mixed.mean():.4f}."
    )


# ---- what is printed -----------------------------------------------------------------------------

OURS = "ladder.py of this project"  # marks both files as ours, which may be written over


def spread(values: list[float], digits: int) -> str:
    """The mean, with ± the standard deviation where there are several seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(results: dict[str, Result]) -> str:
    lines = ["| rung | parameters | seconds | nats per character | bits per byte |"]
    lines.append("|---|---|---|---|---|")
    for name, r in sorted(results.items(), key=lambda item: -statistics.mean(item[1].loss)):
        lines.append(
            f"| {name} | {r.parameters:,} | {statistics.mean(r.seconds):.1f} | "
            f"{spread(r.loss, 3)} | {spread(r.bits, 3)} |"
        )
    return "\n".join(lines)


def lesson(results: dict[str, Result]) -> str:
    """The caption of the picture: what counting reached, and who beat it in the given time."""
    counting = results.get(COUNTING)
    if counting is None or len(results) < 2:
        return "Every rung has learnt the same text for the same time."
    better = [n for n, r in results.items() if not counts(n) and r.loss[0] < counting.loss[0]]
    return (
        f"Counting takes {counting.seconds[0]:.0f} seconds for {counting.loss[0]:.3f} nats per "
        f"character. In {max(r.seconds[0] for r in results.values()):.0f} seconds "
        + (f"{', '.join(better)} got below that." if better else "no network got below that.")
    )


def draw(results: dict[str, Result], caption: str, path: Path) -> None:
    """Loss against time, and against the number of parameters."""
    figure = new_figure(path, 10, 4.5)
    if figure is None:
        return
    time_panel, size_panel = figure.subplots(1, 2, sharey=True)
    for name, r in results.items():
        (line,) = time_panel.plot(*zip(*r.curve, strict=True), "o-", markevery=[-1], label=name)
        size_panel.plot(r.parameters, r.loss[0], "o", color=line.get_color())
        size_panel.annotate(f" {name}", (r.parameters, r.loss[0]), fontsize=8)
    time_panel.set(xscale="log", xlabel="seconds", ylabel="nats per character")
    size_panel.set(xscale="log", xlabel="parameters (of n-grams: numbers)")
    time_panel.set_ylim(top=3.0)
    time_panel.legend(fontsize=8)
    time_panel.set_title("training loss, and validation loss at the end", fontsize=9)
    figure.suptitle("\n".join(textwrap.wrap(caption, 120)), fontsize=9)
    save(figure, path, OURS)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Train every rung of the ladder for the same time, and compare them.")
    cli.add_flags(parser, LadderConfig, "ladder")
    config = LadderConfig(**parser.parse(sys.argv[1:] if argv is None else argv))
    picture, beside = new_picture(config.out, OURS, ".md")
    results, folders = {}, {}
    for name in config.rungs:
        seeds = range(1 if counts(name) else config.seeds)  # there is no chance in counting
        folders[name] = [climb(name, 1337 + seed, config) for seed in seeds]
        results[name] = read_result(folders[name])
    caption = lesson(results)
    if {COUNTING, LAST} <= folders.keys():
        caption += " " + mixture(folders[COUNTING][0], folders[LAST][0])
    text = "\n\n".join([f"Measured by {OURS}.", table(results), caption])
    print(text)
    beside.write_text(f"{text}\n", encoding="utf-8")
    draw(results, caption, picture)
    print(f"\nthe same in {beside}, drawn in {picture}")


if __name__ == "__main__":
    cli.run(main)
