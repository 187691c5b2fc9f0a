"""From a checkpoint and a prompt to printed words.

    python sample.py --prompt "def "              the newest checkpoint below out/
    python sample.py --checkpoint out/gpt/best.pt --prompt "A" --prompt "Once upon" --num_samples 2

What a task does with its model, `tasks/` says of GPT's continuations and of translations, `fill.py`
of masked words and embeddings.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn as nn

import fill
import predict
from bpe import Tokenizer
from cpu import lay_out_for_decoding
from engine import checkpoint as checkpoints
from engine import cli
from engine.evaluation import print_scores
from engine.processes import pick_device, precision
from fill import FillConfig
from predict import AskConfig, PredictConfig, SimilarConfig
from tasks import complete, text, translation


def load_model(
    path: Path,
    device: torch.device,
    checkpoint: dict | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, Tokenizer, dict]:
    """(model, tokenizer, checkpoint), ready to sample from; the weights are in the model alone."""
    checkpoint = checkpoint or checkpoints.load(path)
    model, tokenizer = checkpoints.restore(path, checkpoint)
    checkpoint = {k: v for k, v in checkpoint.items() if k not in ("model", "optimizer")}
    model.to(device, dtype).eval()
    if device.type == "cpu":
        lay_out_for_decoding(model)
    return model, tokenizer, checkpoint


def by_module(module: ModuleType) -> Callable:
    """What sample.py does with a model of this task."""

    def speak(model: nn.Module, tokenizer: Tokenizer, flags, checkpoint: dict) -> None:
        module.sample(
            model, tokenizer, flags, checkpoint, lambda data: print_scores(model, data, flags.eval)
        )

    return speak


def closing(model: nn.Module, tokenizer: Tokenizer, data, folder: Path) -> list[str]:
    return translation.show(model, tokenizer, data, folder)[-1:]


# ---- the command line ----------------------------------------------------------------------------


class Task(NamedTuple):
    Config: type  # the flags
    respond: Callable  # (model, tokenizer, prompts, config) -> texts
    between: str  # what is printed between a prompt and its text
    speak: Callable  # (model, tokenizer, config, checkpoint): what the command line does
    # (model, tokenizer, data, folder of the run) -> lines that end a training run
    closing: Callable | None = None
    # A prompt that training showed -> the flags that ask for such an answer again
    flags: Callable = lambda prompt: ("--prompt", prompt) if prompt else ()


RESPOND = {
    "gpt": Task(text.SampleFlags, text.complete, "", by_module(text)),
    "bert": Task(FillConfig, fill.fill, "\n-> ", fill.speak),
    "seq2seq": Task(
        translation.SampleFlags,
        translation.translate,
        "\n-> ",
        by_module(translation),
        closing,
    ),
    "classify": Task(
        PredictConfig, predict.classify, "\n-> ", predict.speak, predict.closing_confusion
    ),
    "tag": Task(PredictConfig, predict.tag, "\n-> ", predict.speak),
    "answer": Task(
        AskConfig,
        predict.answer,
        "\n-> ",
        predict.speak_answers,
        flags=lambda prompt: ("--context", "text.txt", "--prompt", prompt.partition("\n")[0]),
    ),
    "similar": Task(
        SimilarConfig,
        predict.alike,
        "\n-> ",
        predict.speak_similar,
        flags=lambda prompt: ("--similar", "queries.txt", "lines.txt"),
    ),
    "complete": Task(
        text.SampleFlags,
        partial(text.complete, encode=complete.encode_prompt),
        "",
        by_module(complete),
    ),
}


def find_checkpoint(argv: list[str]) -> Path | None:
    """What --checkpoint names, else the newest below out/, None where there is none. Known before
    the other flags are read, because its task decides which there are."""
    parser = cli.Parser("")
    parser.add_argument("--checkpoint", default="")
    known, _ = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    if known.checkpoint:
        return Path(known.checkpoint)
    return checkpoints.newest() if any(Path("out").glob("*/*.pt")) else None


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    path = find_checkpoint(argv)
    checkpoint = checkpoints.load(path) if path else {"task": "gpt"}
    task = RESPOND[checkpoint["task"]]
    parser = cli.Parser(
        "Continue a text, translate it, or fill in its masked words, with a trained model. The\n"
        "flags are those of the checkpoint's task: name it with --checkpoint beside --help to see\n"
        "them."
    )
    cli.add_flags(parser, task.Config, f"sampling ({checkpoint['task']})")
    every = {name: (other.Config,) for name, other in RESPOND.items()}
    known = cli.owners(every, "checkpoints of")
    config = task.Config(**parser.parse(argv, known))
    if not path:
        checkpoints.newest()  # which says that there is none
    device = pick_device(config.device)
    dtype = precision(getattr(config, "dtype", "fp32"), device)  # only those that write have it
    model, tokenizer, checkpoint = load_model(path, device, checkpoint, dtype)
    print(f"{path}: {checkpoint['task']}, step {checkpoint['step']:,}", file=sys.stderr)
    task.speak(model, tokenizer, config, checkpoint)


if __name__ == "__main__":
    cli.run(main)
