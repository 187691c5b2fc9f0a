"""The labelled file that `sample.py --eval FILE` scores, as a task's validation data."""

from dataclasses import fields
from pathlib import Path

from data.tokens import AnyTokenizer


def whole_file(Flags: type, Data: type, tokenizer: AnyTokenizer, flags, checkpoint: dict):
    """All of the file flags.eval as a task's validation data, read as in the run that wrote the
    checkpoint. Flags and Data are the task's. Raises ValueError where there is no such file."""
    if not Path(flags.eval).is_file():
        raise ValueError(f"--eval {flags.eval} is no file here: name one as for --data")
    names = {f.name for f in fields(Flags)}
    settings = {k: v for k, v in checkpoint["train_config"].items() if k in names}
    settings |= {"data": flags.eval, "valid": flags.eval, "eval_tokens": 0}
    # Where texts of one batch are each other's negatives, its size matters. Older checkpoints have
    # the size itself as their batch_size.
    if "micro_batch" in checkpoint:
        settings["batch_size"] = checkpoint["micro_batch"]
    return Data.splits(Flags(**settings), checkpoint["model_config"], tokenizer)[1]
