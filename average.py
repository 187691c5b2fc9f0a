"""The mean of a run's last checkpoints, a better model than each of them (section 6.1 of 2017).

    python train.py --preset transformer-base --keep 5
    python average.py --run out/seq2seq

Weights that were taken while the learning rate was still high lie around a minimum; their mean
lies nearer to it. After a schedule that ends at rate 0 there is little left to gain.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from engine import checkpoint as checkpoints
from engine import cli


@dataclass
class AverageConfig:
    run: str = ""  # the run's folder, with the step-*.pt that train.py --keep has left there
    last: int = 5  # how many of them, the newest

    def __post_init__(self):
        if self.last < 2:
            raise ValueError(f"--last {self.last} is no mean: choose 2 or more")


def average(paths: list[Path]) -> dict:
    """The newest checkpoint, with the mean of all the weights. Raises ValueError where they are
    not of one run."""
    total: dict[str, torch.Tensor] = {}
    for path in paths:
        found = checkpoints.load(path)
        if not total:
            first = found
        for key in ("task", "model_config", "tokenizer_hash", "data"):
            if found[key] != first[key]:
                raise ValueError(f"{path} and {paths[0]} differ in {key}: average one run's only")
        for name, weight in found["model"].items():
            total[name] = total.get(name, 0) + weight.double()
    model = {n: (total[n] / len(paths)).to(w.dtype) for n, w in found["model"].items()}
    return {**found, "model": model, "optimizer": {}}


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Average the last checkpoints of a run into average.pt in its folder.")
    cli.add_flags(parser, AverageConfig, "averaging")
    config = AverageConfig(**parser.parse(sys.argv[1:] if argv is None else argv))
    if not config.run:
        raise ValueError("which run? name its folder with --run, out/seq2seq for one")
    folder = Path(config.run)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: name that of a run")
    paths = sorted(folder.glob("step-*.pt"))[-config.last :]
    if len(paths) < 2:
        raise ValueError(
            f"{folder} holds {len(paths)} files step-*.pt, a mean needs 2: train with --keep 5"
        )
    checkpoints.save(folder / "average.pt", average(paths))
    print(f"{folder / 'average.pt'}: the mean of {', '.join(p.name for p in paths)}")


if __name__ == "__main__":
    cli.run(main)
