"""All of a labelled file as the data of an evaluation, for `sample.py --eval` of a fine-tuned
model."""

from dataclasses import fields
from pathlib import Path

from data.tokens import AnyTokenizer


def whole_file(Flags: type, Data: type, tokenizer: AnyTokenizer, flags, checkpoint: dict):
    """The data in the file that --eval names, all of it, read as the checkpoint's run read its own.
    ValueError where there is no such file."""
    if not Path(flags.eval).is_file():
        raise ValueError(f"--eval {flags.eval} is no file here: name one as for --data")
    names = {f.name for f in fields(Flags)}
    known = {k: v for k, v in checkpoint["train_config"].items() if k in names}
    known |= {"data": flags.eval, "valid": flags.eval, "eval_tokens": 0}
    return Data.splits(Flags(**known), checkpoint["model_config"], tokenizer)[1]
