"""The settings of a run: from flags, a preset and perhaps a checkpoint to one resolved TrainConfig.

A flag given by hand wins over the preset, the preset over the defaults. With --resume and --init
the model's sizes are the checkpoint's.
"""

import math
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bert import Encoder
from engine import checkpoint as checkpoints
from engine import cli
from engine.checkpoint import LATEST, PREVIOUS
from engine.presets import PRESETS, first_hour
from engine.processes import multiplies_bf16, pick_device, repeats
from finetune import LEARNT
from tasks import translation
from tasks.flags import FinetuneConfig, TrainConfig

TASKS = checkpoints.TASKS


@dataclass
class MaskedConfig(TrainConfig):
    """What BERT's data asks beside that."""

    data: str = "pydocs"  # pydocs, wikitext, wikitext103, or a path: .txt, .jsonl, .gz or a folder
    valid: str = ""  # validation text, as for --data; empty: some of --data's documents
    layout: str = ""  # lines, prose, paragraphs or wikitext (data/layouts.py); empty: by the text
    mlm_rate: float = 0.15  # share of the tokens that training asks for; an evaluation: 0.15
    whole_words: bool = False  # hide all tokens of a word, or none
    row_length: int = 0  # most tokens of a row, block_size at most; 0: that many

    def __post_init__(self):
        super().__post_init__()
        if self.row_length < 0:
            raise ValueError(f"--row_length {self.row_length} is out of range: choose 0 or more")
        if not 0 < self.mlm_rate < 1:
            raise ValueError(
                f"--mlm_rate {self.mlm_rate} is out of range: choose more than 0, but less than 1"
            )


@dataclass
class ClassifyConfig(FinetuneConfig):
    class_weights: bool = False  # a rare label counts for more: all of them the same in sum


@dataclass
class SimilarPairsConfig(FinetuneConfig):
    tokens_per_step: int = 8192  # tokens of one optimizer step: as many pairs as fit, all negatives
    batch_size: int = 1024  # sequences in a micro-batch, at most; a step must be one
    row_length: int = 64  # most tokens of a text, block_size at most; 0: that many


# The flags of each task, beside those of its model.
CONFIGS = {
    "gpt": TrainConfig,
    "bert": MaskedConfig,
    "seq2seq": translation.Flags,
    "classify": ClassifyConfig,
    "tag": FinetuneConfig,
    "answer": FinetuneConfig,
    "similar": SimilarPairsConfig,
    "complete": FinetuneConfig,
}

FINETUNED = {task for task, Config in CONFIGS.items() if issubclass(Config, FinetuneConfig)}

# What a resumed run may change: how and where it computes, not what.
FREE_ON_RESUME = {
    *("out", "resume", "stop_after", "keep", "batch_size", "eval_interval", "log_interval"),
    *("cache_dir", "data", "valid", "device", "dtype", "compile", "recompute", "timeout", "shard"),
}

# Of a model's settings, those that no weight's shape depends on: --init may change them.
RATES = {"dropout", "attention_dropout", "label_smoothing"}


def resolve(argv: list[str]) -> tuple[TrainConfig, dict, dict | None]:
    """Flags -> (config, the model's sizes, the checkpoint to start from or None)."""
    argv = again(argv)
    given = peek(argv)
    preset = given.get("preset", "")
    if preset and preset not in PRESETS:
        raise ValueError(f"--preset {preset} is not known: choose {', '.join(PRESETS)}")
    path = start_from(given)
    load = checkpoints.load_newest if given.get("resume") else checkpoints.load
    checkpoint = load(path) if path else None
    task = checkpoint["task"] if checkpoint else given.get("model", preset_task(preset))
    if path:
        found, task = task, given.get("model", task)
        if task in TASKS and (found != task if given.get("resume") else kin(task) != kin(found)):
            raise ValueError(
                f"--model {task} cannot begin from the {found} of {path}: leave one out"
            )
    if task not in TASKS:
        raise ValueError(f"--model {task} is not known: choose {', '.join(TASKS)}")

    Config, Settings = TASKS[task][0], CONFIGS[task]
    parser = cli.Parser(
        "Train a Transformer. Every flag has a default. A preset (see presets.py) replaces some\n"
        "of the defaults below; without --preset, that of a first run on this machine does.\n"
        "The flags are those of a task: add --model bert, seq2seq, classify, tag, answer, similar\n"
        "or complete to see theirs."
    )
    cli.add_flags(parser, Settings, "training")
    cli.add_flags(parser, Config, f"sizes of the model ({task})")
    every = {name: (TASKS[name][0], CONFIGS[name]) for name in TASKS}
    given = parser.parse(argv, cli.owners(every, "--model"))

    if given.get("resume"):
        base = {**checkpoint["train_config"], "out": str(path.parent), "stop_after": 0}
        refuse_changes(given, {**base, **checkpoint["model_config"]}, FREE_ON_RESUME, path)
    else:
        device = pick_device(given.get("device", "auto")).type
        preset = preset or first_hour(task, device, given.get("data", ""))
        if preset and preset_task(preset) != task:
            raise ValueError(f"--preset {preset} is for --model {preset_task(preset)}, not {task}")
        base = {"model": task, "preset": preset, **PRESETS.get(preset, {})}
        if task in FINETUNED:
            base["dtype"] = "bf16"
        if not multiplies_bf16(device):
            base.pop("dtype", None)  # fp32 is faster then, and on mps what can be trusted
        tokenizer = path or {**base, **given}.get("tokenizer")
        ignored = ("vocab_size", "pattern", "tokenizer") if path else ("vocab_size", "pattern")
        for name in ignored if tokenizer else ():
            if name in given:
                raise ValueError(
                    f"--{name} has no effect, because the tokenizer is that of {tokenizer}: leave "
                    "it out" + ("" if path else ", or add --tokenizer= to train a new one")
                )
    wanted = {**base, **given}
    if lengths := sorted({"steps", "minutes"} & given.keys()):
        if given.get("epochs"):
            raise ValueError(f"--epochs and --{lengths[0]} both say how long: give one of them")
        wanted["epochs"] = 0.0
    names = {field.name for field in fields(Settings)}
    config = Settings(**{k: v for k, v in wanted.items() if k in names})
    if repeats() and getattr(config, "seeds", 1) > 1:
        raise ValueError(
            f"--seeds {config.seeds} makes several runs, which a command that torchrun or Slurm "
            "repeats does not find again: leave it out"
        )
    if task in FINETUNED and not (config.data or config.dry_run):
        raise ValueError(f"--model {task} learns from labelled examples: name them with --data")

    sizes = asdict(Config())
    if checkpoint:  # perhaps another task's, whose labels are not this one's
        kept = sizes.keys() - (set() if found == task else LEARNT)
        sizes |= {k: v for k, v in checkpoint["model_config"].items() if k in kept}
    if checkpoint:
        refuse_changes(given, sizes, {*RATES, *names}, path)
        wanted = {name: given[name] for name in RATES & given.keys()}
    else:
        sizes["n_ff"] = 0  # 4 x n_embd, whatever n_embd will be
    return config, {k: wanted.get(k, v) for k, v in sizes.items()}, checkpoint


def kin(task: str) -> type:
    """Tasks whose models are the same one but for their heads have the same kin."""
    Model = TASKS[task][1]
    return Encoder if issubclass(Model, Encoder) else Model


def peek(argv: list[str]) -> dict:
    """The flags that decide which others exist, read before the full parser can be made."""
    parser = cli.Parser("")
    cli.add_flags(parser, TrainConfig, "")
    argv = [cli.underscored(a) for a in argv if a not in ("-h", "--help")]
    return vars(parser.parse_known_args(argv)[0])


def preset_task(preset: str) -> str:
    return PRESETS.get(preset, {}).get("model", "gpt")


def again(argv: list[str]) -> list[str]:
    """The flags; with --resume where torchrun or Slurm repeats them and their run has begun."""
    if not repeats():
        return argv
    given = peek(argv)
    if not given.get("out"):
        raise ValueError(
            "a command that torchrun (--max-restarts) or Slurm repeats must find its run again: "
            "name the run's folder with --out"
        )
    begun = any((Path(given["out"]) / name).is_file() for name in (LATEST, PREVIOUS))
    return [*argv, "--resume"] if begun else argv


def start_from(given: dict) -> Path | None:
    """The checkpoint that --resume or --init names."""
    if given.get("resume") and given.get("init") and not repeats():
        raise ValueError("--resume goes on with a run, --init begins a new one: give one of them")
    if not given.get("resume"):
        return Path(given["init"]) if given.get("init") else None
    if given.get("out"):
        return Path(given["out"]) / LATEST
    found = [path for name in (LATEST, PREVIOUS) for path in Path("out").glob(f"*/{name}")]
    if not found:
        raise ValueError("there is no run below out/ to resume: name its folder with --out")
    return max(found, key=lambda p: p.stat().st_mtime).with_name(LATEST)


def refuse_changes(given: dict, saved: dict, free: set[str], path: Path) -> None:
    for name, value in given.items():
        value = padded(value) if name == "vocab_size" else value
        if name not in free and value != saved.get(name):
            raise ValueError(
                f"--{name} {value} differs from the {saved.get(name)} of {path}: leave the flag "
                "out, or begin a new run"
            )


def padded(vocab_size: int) -> int:
    """The next multiple of 64: GPUs multiply such matrices faster. Padded ids are never sampled."""
    return math.ceil(vocab_size / 64) * 64


def prepare_folder(config: TrainConfig) -> Path:
    """Makes the folder of the run and tries to write there. Never one that holds another run."""
    folder, number = Path(config.out or f"out/{config.model}"), 1
    # What a run that was killed before its first checkpoint has left is in nobody's way.
    kept = (p for p in folder.iterdir() if not p.match("*.part*")) if folder.is_dir() else ()
    if config.out and not config.resume and any(kept):
        if any(folder.glob("*.pt")):
            raise ValueError(f"{folder} already holds a run: add --resume, or choose another --out")
        raise ValueError(
            f"{folder} is not empty, and a run writes nothing over: choose another --out"
        )
    try:
        while not config.out:  # taken by whoever makes it, also when two runs start at once
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                number += 1
                folder = Path(f"out/{config.model}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # to hear of it now
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose --out") from error
    return folder


def divide_step(config: TrainConfig, block_size: int, world: int) -> tuple[int, int]:
    """(sequences in a micro-batch, micro-batches of each process in a step).

    As many sequences as divide the step evenly, --batch_size at most: so one command means the
    same training on any number of processes that divides the step at all.
    """
    sequences, rest = divmod(config.tokens_per_step, block_size * world)
    if rest or not sequences:
        unit = block_size * world
        near = max(1, round(config.tokens_per_step / unit)) * unit
        raise ValueError(
            f"--tokens_per_step {config.tokens_per_step} is no multiple of {unit}, the tokens of "
            f"one sequence for each of {world} process{'es' * (world > 1)}: choose {near}"
        )
    fits = range(min(config.batch_size, sequences), 0, -1)
    batch_size = next(b for b in fits if sequences % b == 0)
    return batch_size, sequences // batch_size
