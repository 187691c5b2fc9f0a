"""The settings of a run, resolved from flags, a preset and perhaps a checkpoint.

A flag given by hand wins over the preset, the preset over the defaults. With --resume and --init
the network's sizes are the checkpoint's.
"""

import difflib
import math
import sys
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path

import torch.nn as nn

import optim
import tasks
from engine import checkpoint as checkpoints
from engine import cli
from engine.checkpoint import LATEST, PREVIOUS
from engine.presets import PRESETS, first_hour
from engine.processes import find_device, is_restarted, multiplies_bf16
from tasks.flags import FinetuneConfig, TrainConfig

# The flags that a resumed run may change: how long, how and where it computes, not what.
FREE_ON_RESUME = {
    *("out", "resume", "steps", "stop_after", "keep", "batch_size", "eval_interval"),
    *("log_interval", "cache_dir", "data", "valid", "device", "dtype", "compile", "recompute"),
    *("timeout", "shard"),
}

# The flags that a network that counts (engine/counting.py) heeds, beside its sizes.
HEEDED_IN_COUNTING = {
    *("model", "data", "tokenizer", "pattern", "cache_dir", "out", "batch_size", "eval_tokens"),
    *("preset", "seed", "device"),
}

# The settings of a network on which no weight's shape depends: --init may change them, and those
# that have the metadata free=True.
RATES = {"dropout", "attention_dropout", "label_smoothing"}

DESCRIPTION = """\
Train a Transformer. Every flag has a default. Those shown are of the run that the other flags on
this command line would start: with --preset NAME that preset's (see engine/presets.py), else those
of a first run on this machine. Each task has flags of its own: add --model NAME to see them, of
"""


def resolve(argv: list[str]) -> tuple[TrainConfig, dict, dict | None]:
    """Flags -> (config, the network's sizes, the checkpoint to start from or None). Raises
    ValueError for flags that do not go together. --help ends the program."""
    asks_help = any(argument in ("-h", "--help") for argument in argv)
    argv = [argument for argument in argv if argument not in ("-h", "--help")]
    given = peek(argv)
    preset = given.get("preset", "")
    if preset and preset not in PRESETS:
        near = nearest(preset, PRESETS)
        near = f"did you mean {near}? There are" if near else "choose"
        raise ValueError(f"--preset {preset} is not known: {near} {', '.join(PRESETS)}")
    new = given.get("model") or preset_task(preset)
    if new in tasks.TABLE and tasks.counts(new):
        refuse_steps(new, given.keys() & {"resume", "init"}, set())
    path = start_from(given)
    load = checkpoints.load_newest if given.get("resume") else checkpoints.load
    checkpoint = load(path) if path else None
    name = choose_task(given, checkpoint, path)
    Flags, Config = tasks.task(name).Flags, tasks.network(name).Config
    finetunes = issubclass(Flags, FinetuneConfig)

    parser = cli.Parser("")
    cli.add_flags(parser, Flags, "")
    cli.add_flags(parser, Config, "")
    given |= parser.parse(argv, flags_of_others)
    if "model" in given:
        given["model"] = name
    if tasks.counts(name):
        refuse_steps(name, given.keys(), {field.name for field in fields(Config)})

    if given.get("resume"):
        base = {**checkpoint["train_config"], "out": str(path.parent), "stop_after": 0}
        refuse_changes(given, {**base, **checkpoint["model_config"]}, FREE_ON_RESUME, path)
        steps, done = given.get("steps"), checkpoint["step"]
        if steps not in (None, base.get("steps")) and steps <= done:
            raise ValueError(
                f"--steps {steps} are no more than the {done:,} that {path} has done: choose more, "
                "or leave the flag out"
            )
    else:
        base = recipe(name, given, preset, Flags)
        kept = {f.name for f in fields(Flags) if f.metadata.get("inherited")}
        trained = checkpoint["train_config"] if checkpoint else {}
        base |= {flag: trained[flag] for flag in kept & trained.keys()}
        refuse_ignored(given, base, path)
    wanted = {**base, **given}
    refuse_unheeded(given, wanted.get("schedule", Flags.schedule))
    if lengths := sorted({"steps", "minutes"} & given.keys()):
        if given.get("epochs"):
            raise ValueError(f"--epochs and --{lengths[0]} both say how long: give one of them")
        wanted["epochs"] = 0.0
    sizes, flags = sizes_of(Config, name, checkpoint), {field.name for field in fields(Flags)}
    if checkpoint:
        free = {f.name for f in fields(Config) if f.name in RATES or f.metadata.get("free")}
        free &= set() if given.get("resume") else free
        refuse_changes(given, sizes, {*RATES, *free, *flags}, path)
        sizes |= {name: given[name] for name in (RATES | free) & given.keys()}
    else:
        sizes |= {size: wanted[size] for size in sizes.keys() & wanted.keys()}
    if asks_help:
        parser = cli.Parser(f"{DESCRIPTION}{', '.join(tasks.TABLE)}.")
        cli.add_flags(parser, Flags, "training", wanted)
        cli.add_flags(parser, Config, f"sizes of the model ({name})", sizes)
        parser.print_help()
        sys.exit()
    config = Flags(**{k: v for k, v in wanted.items() if k in flags})
    if is_restarted() and getattr(config, "seeds", 1) > 1:
        raise ValueError(
            f"--seeds {config.seeds} makes several runs, which a command that torchrun or Slurm "
            "repeats does not find again: leave it out"
        )
    if finetunes and not (config.data or config.dry_run):
        raise ValueError(f"--model {name} learns from labelled examples: name them with --data")
    return config, sizes, checkpoint


def peek(argv: list[str]) -> dict:
    """The flags that decide which other flags exist, read before the full parser can be made. Where
    torchrun or Slurm repeats a command whose run has begun, "resume" is among them."""
    parser = cli.Parser("")
    cli.add_flags(parser, TrainConfig, "")
    given = vars(parser.parse_known_args([cli.underscored(a) for a in argv])[0])
    if not is_restarted():
        return given
    if not given.get("out"):
        raise ValueError(
            "a command that torchrun (--max-restarts) or Slurm repeats must find its run again: "
            "name the run's folder with --out"
        )
    begun = any((Path(given["out"]) / name).is_file() for name in (LATEST, PREVIOUS))
    return {**given, "resume": True} if begun else given


def start_from(given: dict) -> Path | None:
    """The checkpoint that --resume or --init names."""
    if given.get("resume") and given.get("init") and not is_restarted():
        raise ValueError("--resume goes on with a run, --init begins a new one: give one of them")
    if not given.get("resume"):
        return Path(given["init"]) if given.get("init") else None
    if given.get("out"):
        return Path(given["out"]) / LATEST
    found = [path for name in (LATEST, PREVIOUS) for path in Path("out").glob(f"*/{name}")]
    if not found:
        raise ValueError("there is no run below out/ to resume: name its folder with --out")
    return max(found, key=lambda p: p.stat().st_mtime).with_name(LATEST)


def choose_task(given: dict, checkpoint: dict | None, path: Path | None) -> str:
    """The task's name in tasks.TABLE, from --model, the preset or the checkpoint. A run can begin
    from a checkpoint of its own task, or of a task whose network differs only in its head. Raises
    ValueError for any other."""
    asked = given.get("model", "")
    if asked and asked not in tasks.TABLE:
        hint = f"choose {', '.join(tasks.TABLE)}"
        if size := nearest(asked, PRESETS):
            hint += f"; a size has the name of a preset, --preset {size}"
        raise ValueError(f"--model {asked} is not known: {hint}")
    if not checkpoint:
        return asked or preset_task(given.get("preset", ""))
    found = checkpoint["task"]
    name = for_network(asked, tasks.network(found)) if asked else found
    fits = found == name
    if not fits and not given.get("resume"):
        new, old = tasks.network(name), tasks.network(found)
        fits = base_of(new) == base_of(old) or old in getattr(new, "begins_from", ())
    if not fits:
        raise ValueError(f"--model {name} cannot begin from the {found} of {path}: leave one out")
    return name


def for_network(name: str, network: type) -> str:
    """The row for a network of exactly this class of the task that `name` is a row of, if that is
    one of fine-tuning; where there is none, the name itself."""
    if not issubclass(tasks.task(name).Flags, FinetuneConfig) or tasks.network(name) is network:
        return name
    rows = (row for row, (_, task) in tasks.TABLE.items() if task == tasks.TABLE[name][1])
    return next((row for row in rows if tasks.network(row) is network), name)


def nearest(name: str, presets: dict) -> str:
    """The preset whose name is most like this one, "" where none is. Paths and capital letters do
    not count, and a name that a preset's begins or goes on with is nearer than any misspelling."""
    name = name.rpartition("/")[2].lower()
    begin = sorted((p for p in presets if name.startswith(p)), key=len, reverse=True)
    begin += [p for p in presets if name and p.startswith(name)]
    return next(iter(begin or difflib.get_close_matches(name, presets, n=1)), "")


def base_of(network: type) -> tuple:
    """The direct subclass of nn.Module that a network is built on, its blocks where these are not
    that one's, and what else it may begin from: the same for all networks that differ only in their
    heads."""
    base = network.__mro__[network.__mro__.index(nn.Module) - 1]
    return base, getattr(network, "Block", None), getattr(network, "begins_from", None)


def preset_task(preset: str) -> str:
    return PRESETS.get(preset, {}).get("model", TrainConfig.model)


def recipe(name: str, given: dict, preset: str, Flags: type[TrainConfig]) -> dict:
    """{flag: value} of a new run before the flags given by hand: those of the preset, or of a first
    run on this machine. They ask for bf16 only where the processor multiplies it fast. A value that
    was chosen for another optimizer or width than the one given is left out."""
    device = find_device(given.get("device", "auto"))
    preset = preset or first_hour(name, device, given.get("data", ""))
    if preset and preset_task(preset) != name:
        raise ValueError(f"--preset {preset} is for --model {preset_task(preset)}, not {name}")
    base = {"model": name, "preset": preset, **PRESETS.get(preset, {})}
    if issubclass(Flags, FinetuneConfig):
        base["dtype"] = "bf16"
    if not multiplies_bf16(device):
        base.pop("dtype", None)  # fp32 is faster then, and on mps it is what can be trusted
    chosen_for = base.get("optimizer", Flags.optimizer)
    optimizer = given.get("optimizer", chosen_for)
    if (optimizer == "adam") != (chosen_for == "adam"):
        # Adam adds the decay to the gradient, where it does not decay weights but spoils steps.
        base["weight_decay"] = 0.0 if optimizer == "adam" else Flags.weight_decay
    if chosen_for == "muon" != optimizer:
        base.pop("lr", None)  # Muon's is too large for others: 4.54 nats instead of 4.23
    if "n_embd" in given:
        base.pop("n_ff", None)  # which by default is 4 x n_embd
    return base


def refuse_ignored(given: dict, base: dict, path: Path | None) -> None:
    """Raises ValueError for a flag about a new tokenizer where there is one already."""
    tokenizer = path or {**base, **given}.get("tokenizer")
    ignored = ("vocab_size", "pattern", "tokenizer") if path else ("vocab_size", "pattern")
    for name in ignored if tokenizer else ():
        if name in given:
            raise ValueError(
                f"--{name} has no effect, because the tokenizer is that of {tokenizer}: leave "
                "it out" + ("" if path else ", or add --tokenizer= to train a new one")
            )


def refuse_unheeded(given: dict, schedule: str) -> None:
    """Raises ValueError for a flag that the schedule, or another flag of it, leaves no effect."""
    for name in ("warmup", "cooldown", "floor"):
        heeded = optim.SCHEDULES.get(schedule, (name,))  # of an unknown one, others say so
        if name in given and name not in heeded:
            others = " or ".join(other for other, heeds in optim.SCHEDULES.items() if name in heeds)
            raise ValueError(
                f"--{name} has no effect with the schedule {schedule}: leave it out, or choose "
                f"--schedule {others}"
            )
    if given.get("floor") and not given.get("cooldown", True):
        raise ValueError(
            f"--floor {given['floor']} has no effect with --cooldown 0, which keeps the rate: "
            "leave it out"
        )


def refuse_steps(name: str, given: Iterable[str], sizes: set[str]) -> None:
    """Raises ValueError for a given flag about steps, which a network that counts does not take."""
    for flag in sorted(set(given) - HEEDED_IN_COUNTING - sizes):
        raise ValueError(
            f"--{flag} has no effect with --model {name}, which counts its text in one pass "
            "instead of learning by steps: leave it out"
        )


def default_of(field: Field):
    return field.default if field.default is not MISSING else field.default_factory()


def sizes_of(Config: type, name: str, checkpoint: dict | None) -> dict:
    """{size: value} of a network: the checkpoint's, else the defaults. From another task's
    checkpoint, what a run takes from its data (labels, for example) is not taken."""
    sizes = {field.name: default_of(field) for field in fields(Config)}
    if checkpoint:
        own = checkpoint["task"] == name
        kept = sizes.keys() - (set() if own else set(from_data(Config)))
        sizes |= {k: v for k, v in checkpoint["model_config"].items() if k in kept}
    return sizes


def from_data(Config: type) -> list[str]:
    """The settings of a network that a run takes from its data."""
    return [field.name for field in fields(Config) if field.metadata.get("from_data")]


def flags_of_others() -> dict[str, str]:
    """{flag: the names of --model that have it}, of all tasks."""
    classes = {n: (tasks.network(n).Config, tasks.task(n).Flags) for n in tasks.TABLE}
    return cli.owners(classes, "--model")


def refuse_changes(given: dict, saved: dict, free: set[str], path: Path) -> None:
    """Raises ValueError for a given flag that is not free and differs from the saved value."""
    for name, value in given.items():
        value = padded(value) if name == "vocab_size" else value
        if name not in free and value != saved.get(name):
            raise ValueError(
                f"--{name} {value} differs from the {saved.get(name)} of {path}: leave the flag "
                "out, or begin a new run"
            )


def padded(vocab_size: int) -> int:
    """The next multiple of 64, because GPUs multiply such matrices faster. The ids that this adds
    are never sampled."""
    return math.ceil(vocab_size / 64) * 64


def divide_step(config: TrainConfig, block_size: int, world: int) -> tuple[int, int]:
    """(sequences in a micro-batch, micro-batches of each process in a step).

    A micro-batch has the largest number of sequences, up to --batch_size, that divides the step
    evenly: so one command means the same training on any number of processes, as long as each can
    have that many. Raises ValueError if the processes cannot divide the step evenly.
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
