"""Checkpoints in, out and averaged.

    python convert.py import openai-community/gpt2 --out out/gpt2.pt    from the hub, or a folder
    python convert.py export out/gpt/best.pt --to FOLDER                for transformers
    python convert.py average --run out/seq2seq                         the mean of the last five

`import` and `export` read and write Hugging Face's files of GPT-2, Llama, BERT and Marian; names
of settings and tensors are in engine/hub/families.py. `import` reads llama.cpp's files too.
`average` needs the files that `train.py --keep 5` leaves: the mean of a run's last checkpoints is a
better model than each of them (section 6.1 of Vaswani et al. 2017). Weights from the time when the
learning rate was still high lie around a minimum, and their mean lies nearer to it. After a
schedule that ends at rate 0 there is little left to gain.

Left out: optimizer states, weights that stay quantized, TensorFlow's and Flax's files.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from engine import cli

COMMANDS = {"import": ("out",), "export": ("to",), "average": ("run", "last")}  # and their flags


@dataclass
class ConvertConfig:
    out: str = ""  # import: the checkpoint to write, out/gpt2.pt for one
    to: str = ""  # export: the folder to write, new or empty


@dataclass
class AverageConfig:
    run: str = ""  # the run's folder, with the step-*.pt that train.py --keep has left there
    last: int = 5  # how many of them, the newest

    def __post_init__(self):
        if self.last < 2:
            raise ValueError(f"--last {self.last} is no mean: choose 2 or more")


def import_command(source: str, out: Path) -> None:
    """Writes the model in a folder or on the hub into a checkpoint; ValueError if `out` exists."""
    if os.path.lexists(out):
        raise ValueError(f"{out} is there already: choose another --out")
    from engine import checkpoint as checkpoints
    from engine.hub.importing import import_model

    checkpoint, lines = import_model(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save(out, checkpoint)
    print(f"{out}: {lines[0]}", *lines[1:], sep="\n")


def export_command(source: Path, folder: Path) -> None:
    """Writes a checkpoint into a new or empty folder as the files of transformers, and says whether
    transformers, if it is installed, computes the same from them."""
    from engine.hub.exporting import export_model

    compared = export_model(source, folder)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}\n{compared}")


def average_command(config: AverageConfig) -> None:
    """Writes average.pt into the run's folder; ValueError if there are no two step-*.pt."""
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
    from engine import checkpoint as checkpoints

    checkpoints.save(folder / "average.pt", average(paths))
    print(f"{folder / 'average.pt'}: the mean of {', '.join(path.name for path in paths)}")


def average(paths: list[Path]) -> dict:
    """The last of the checkpoints, with the mean of the weights of all. Tensors suffice for it: no
    model is made. Raises ValueError if the checkpoints are not of one run."""
    from engine import checkpoint as checkpoints

    total = {}
    for path in paths:
        found = checkpoints.load(path)
        if not total:
            oldest = found
        for key in ("task", "model_config", "tokenizer_hash", "data"):
            if found[key] != oldest[key]:
                raise ValueError(f"{path} and {paths[0]} differ in {key}: average one run's only")
        for name, weight in found["model"].items():
            total[name] = total.get(name, 0) + weight.double()
    model = {n: (total[n] / len(paths)).to(w.dtype) for n, w in found["model"].items()}
    return {**found, "model": model, "optimizer": {}}


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(
        "Hugging Face's checkpoints in and out: GPT-2, Llama, Mistral, Qwen3, BERT and Marian; "
        "llama.cpp's .gguf in. Average the last checkpoints of a run into average.pt in its folder."
    )
    parser.add_argument("command", choices=tuple(COMMANDS))
    parser.add_argument(
        "source",
        nargs="?",
        default="",
        help="import: a folder, a .gguf file or owner/repo; export: a checkpoint; average: none",
    )
    cli.add_flags(parser, ConvertConfig, "where to")
    cli.add_flags(parser, AverageConfig, "averaging")
    given = parser.parse(sys.argv[1:] if argv is None else argv)
    command, source = given.pop("command"), given.pop("source")
    if command == "average" and source:
        raise ValueError(f"average takes the run as a flag: write --run {source}")
    if command != "average":
        if not source:
            parser.error("the following arguments are required: source")
        (flag,) = COMMANDS[command]
        other = "to" if flag == "out" else "out"
        if not given.get(flag) or given.get(other):
            raise ValueError(f"{command} writes to --{flag}: give that, and not --{other}")
    for flag in given:
        if flag not in COMMANDS[command]:
            owner = next(name for name, flags in COMMANDS.items() if flag in flags)
            raise ValueError(f"--{flag} is for {owner}: leave it out here")
    if command == "import":
        import_command(source, Path(given["out"]))
    elif command == "export":
        export_command(Path(source), Path(given["to"]))
    else:
        average_command(AverageConfig(**given))


if __name__ == "__main__":
    cli.run(main)
