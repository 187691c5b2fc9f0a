"""The flags of train.py that tasks share, as dataclasses whose fields also say what is allowed.

A field is a flag with the same type and default; the comment behind it, or above it, is the help
text, and its range or choices are arguments of `ranged` and `choice`. Tasks derive their own flags
from the two classes here.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import optim

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "bf16", "fp32")


def ranged(default, least=None, most=None, *, above=None, below=None) -> Any:
    """A dataclass field for a number from `least` to `most`, both included, or between `above` and
    `below`, both excluded. Infinity and NaN are outside of every range."""
    limits = {"least": least, "most": most, "above": above, "below": below}
    return field(default=default, metadata={k: v for k, v in limits.items() if v is not None})


def choice(default: str, *names: str, **metadata) -> Any:
    """A dataclass field for one of these names, of which the default is one."""
    return field(default=default, metadata={"choices": names, **metadata})


def check(config: object) -> None:
    """Raises ValueError for a value of a dataclass that its field does not allow."""
    for f in fields(config):
        value, limits = getattr(config, f.name), f.metadata
        choices = limits.get("choices")
        if choices and value not in choices:
            known = ", ".join(filter(None, choices))
            raise ValueError(f"--{f.name} {value} is not known: choose {known}")
        least, most = limits.get("least"), limits.get("most")
        above, below = limits.get("above"), limits.get("below")
        if least is None and above is None:
            continue
        low = value > above if above is not None else value >= least
        high = value < math.inf and (most is None or value <= most)
        if low and high and (below is None or value < below):
            continue
        if above is not None and below is not None:
            wanted = f"more than {above}, but less than {below}"
        elif above is not None:
            wanted = f"{most:g} or less" if low else f"more than {above}"
        elif below is not None:
            wanted = f"{least} or more, but less than {below}"
        elif most is not None:
            most = f"{most:g}" if isinstance(most, float) else most
            wanted = f"between {least} and {most}"
        else:
            wanted = f"{least} or more"
        raise ValueError(f"--{f.name} {value} is out of range: choose {wanted}")


@dataclass
class TrainConfig:
    model: str = "gpt"  # what to train: one of the names above
    # a named size and recipe of engine/presets.py; empty: a first run for this machine
    preset: str = ""
    data: str = "stdlib"  # stdlib, shakespeare, or a path: .txt, .jsonl, .csv, .gz or a folder
    tokenizer: str = ""  # gpt2, a tokenizer's .json, a checkpoint's .pt; empty: a new one is learnt
    pattern: str = "gpt2"  # how a new tokenizer splits text before it merges: gpt2, gpt4 or char
    cache_dir: str = "data/cache"  # where downloads, tokenizers and token files are kept
    out: str = ""  # the run's folder; empty: out/<model>, numbered where that is taken
    init: str = ""  # a checkpoint to take weights, sizes and tokenizer from
    resume: bool = False  # go on with the run in --out (empty: the newest below out/)
    steps: int = ranged(1000, 1)  # optimizer steps of the whole run; --resume may go on to more
    # passes over the training data, instead of --steps; 0: --steps
    epochs: float = ranged(0.0, 0, 1e6)
    minutes: float = ranged(0.0, 0, 1e6)  # fit the number of steps into this time instead
    stop_after: int = ranged(0, 0)  # leave after this many steps as an interruption would
    # tokens of one optimizer step, over all processes
    tokens_per_step: int = ranged(8192, 1, 2**26)
    batch_size: int = ranged(32, 1, 2**20)  # sequences in a micro-batch of one process, at most
    # adamw, adam, or muon (with AdamW for what is no matrix)
    optimizer: str = choice("muon", *optim.OPTIMIZERS)
    lr: float = ranged(3e-3, above=0, most=1e3)  # peak learning rate
    beta1: float = ranged(0.9, 0, below=1)  # AdamW: memory of the gradient
    beta2: float = ranged(0.95, 0, below=1)  # AdamW: memory of its square
    # of matrices, scaled by the learning rate; adam, whose gradient it joins, has 0 unless asked
    weight_decay: float = ranged(0.1, 0, 1e3)
    clip: float = ranged(1.0, 0)  # largest norm of the gradient; 0: no limit
    # cosine, linear (constant, then cooldown), inverse_sqrt, constant
    schedule: str = choice("linear", *optim.SCHEDULES)
    warmup: int = ranged(20, 0)  # steps until the peak learning rate, at most a quarter of all
    cooldown: float = ranged(0.5, 0, 1)  # share of the steps that the linear cooldown takes
    floor: float = ranged(0.0, 0, 1)  # last learning rate, as a share of the peak
    # steps between evaluations, each of which also saves; 0: an epoch
    eval_interval: int = ranged(250, 0)
    # keep the weights of this many of the last evaluations, for convert.py average
    keep: int = ranged(0, 0)
    # validation tokens scored, evenly spaced over the text; 0: all
    eval_tokens: int = ranged(131072, 0)
    log_interval: int = ranged(10, 1)  # steps between records in log.jsonl
    seed: int = ranged(1337, 0)  # of the weights, the order of the data and dropout
    # minutes that a process waits for another before it says which one hangs
    timeout: float = ranged(10.0, above=0, most=1e5)
    device: str = choice("auto", *DEVICES)  # auto, cpu, cuda or mps
    # bf16, fp32, or auto: bf16 on GPUs that have it (fine-tuning: on CPUs too)
    dtype: str = choice("auto", *DTYPES)
    compile: bool | None = None  # torch.compile; auto: on for CUDA on Linux
    recompute: bool = False  # compute activations again in the backward pass, to save memory
    # divide model, or optimizer alone
    shard: str = choice("", "model", "optimizer", "", alone="model")
    # Of conversations: see data/chat.py. They have no flag, but pass from --init to the new run.
    template: str = field(default="", metadata={"flag": False, "inherited": True})
    system: str = field(default="", metadata={"flag": False, "inherited": True})
    dry_run: bool = False  # print the plan and the parameter table, allocate and train nothing
    world: int = ranged(1, 1, 10**6)  # --dry_run: the number of processes to plan for

    def __post_init__(self):
        check(self)
        if self.world > 1 and not self.dry_run:
            raise ValueError(
                f"--world {self.world} is for a plan alone: add --dry_run, or start so many "
                "processes with torchrun"
            )


@dataclass
class FinetuneConfig(TrainConfig):
    """The flags for training a pretrained model (--init) on little labelled data."""

    data: str = ""  # the labelled data: see docs/finetuning.md
    valid: str = ""  # validation data, as for --data; empty: some of --data are held out
    # passes over the training data, instead of --steps; 0: --steps
    epochs: float = ranged(3.0, 0, 1e6)
    # tokens of one optimizer step, over all processes
    tokens_per_step: int = ranged(1024, 1, 2**26)
    # adamw, adam, or muon (with AdamW for what is no matrix)
    optimizer: str = choice("adamw", *optim.OPTIMIZERS)
    lr: float = ranged(5e-5, above=0, most=1e3)  # peak learning rate
    beta2: float = ranged(0.999, 0, below=1)  # AdamW: memory of its square
    # of matrices, scaled by the learning rate; adam, whose gradient it joins, has 0 unless asked
    weight_decay: float = ranged(0.01, 0, 1e3)
    warmup: int = ranged(50, 0)  # steps until the peak learning rate, at most a quarter of all
    cooldown: float = ranged(1.0, 0, 1)  # share of the steps that the linear cooldown takes
    # steps between evaluations, each of which also saves; 0: an epoch
    eval_interval: int = ranged(0, 0)
    eval_tokens: int = ranged(0, 0)  # validation tokens scored, evenly spaced over the text; 0: all
    row_length: int = ranged(0, 0)  # most tokens of a row, block_size at most; 0: that many
    freeze: str = ""  # embeddings, or a number: embeddings and so many blocks keep their weights
    # factor of the learning rate from each block to the one below
    layer_decay: float = ranged(1.0, 0.01, 1)
    # learn low-rank changes of this rank instead of the weights; 0: weights
    lora_rank: int = ranged(0, 0, 2**16)
    seeds: int = ranged(1, 1, 1000)  # repeat the run with this many seeds, and summarise

    def __post_init__(self):
        super().__post_init__()
        if self.seeds > 1 and self.resume:
            raise ValueError(
                "--seeds repeats a run and --resume goes on with one: give one of them"
            )
