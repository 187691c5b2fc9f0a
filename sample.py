"""From a checkpoint and a prompt to printed words.

    python sample.py --prompt "def "              the newest checkpoint below out/
    python sample.py --checkpoint out/gpt/best.pt --prompt "A" --prompt "Once upon" --num_samples 2
    python sample.py --checkpoint out/smollm2/best.pt --chat        a conversation: tasks/chat.py

A checkpoint knows its task, the task's file has the flags and says what is made of a prompt:

    prompt  -> tokens                  the tokenizer of the checkpoint (bpe.py, wordpiece.py)
    tokens  -> logits -> a token       decoding.py asks the network, which keeps a key-value cache,
                                       again and again; temperature, top-k, top-p or a beam choose
    tokens  -> text                    the task's `sample`: tasks/text.py for a GPT,
                                       tasks/translation.py, tasks/masked.py, …
"""

import engine.waiting  # isort: skip  # noqa: F401  (before torch is loaded)
import sys
from functools import partial
from pathlib import Path

import torch

import decoding
import tasks
from engine import checkpoint as checkpoints
from engine import cli
from engine.evaluation import print_scores
from engine.processes import pick_device, precision
from tasks.flags import TrainConfig


def find_checkpoint(argv: list[str]) -> Path | None:
    """What --checkpoint names, else the newest below out/, None where there is none. Known before
    the other flags are read, because its task decides which there are."""
    parser = cli.Parser("")
    parser.add_argument("--checkpoint", type=cli.name, default="")
    known, _ = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    if known.checkpoint:
        return Path(known.checkpoint)
    return checkpoints.newest() if any(Path("out").glob("*/*.pt")) else None


def flags_of_others() -> dict[str, str]:
    """{flag: the checkpoints that it is for}, of all tasks."""
    classes = {name: (tasks.task(name).SampleFlags,) for name in tasks.TABLE}
    return cli.owners(classes, "checkpoints of")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    path = find_checkpoint(argv)
    checkpoint = checkpoints.load(path) if path else {"task": TrainConfig.model}
    task = tasks.task(checkpoint["task"])
    parser = cli.Parser(
        "Continue a text, translate it, or fill in its masked words, with a trained model. The\n"
        "flags are those of the checkpoint's task: name it with --checkpoint beside --help to see\n"
        "them."
    )
    cli.add_flags(parser, task.SampleFlags, f"sampling ({checkpoint['task']})")
    flags = task.SampleFlags(**parser.parse(argv, flags_of_others))
    if not path:
        checkpoints.newest()  # which says that there is none
    device = pick_device(flags.device)
    asked, scored = getattr(flags, "dtype", "fp32"), getattr(flags, "eval", "")
    # A figure is to be the same on every device: its weights stay in fp32, and its products too,
    # unless bf16 is asked for.
    figures = bool(scored or getattr(flags, "choices", ""))
    mixed = figures and asked == "bf16"
    dtype = torch.float32 if figures else precision(asked, device)
    if mixed:
        decoding.pair_steps = None  # their caches have the dtype of the weights
    model, tokenizer, checkpoint = checkpoints.load_model(path, device, checkpoint, dtype)
    print(f"{path}: {checkpoint['task']}, step {checkpoint['step']:,}", file=sys.stderr)
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        if getattr(flags, "chat", False):  # which any network that continues texts can
            from tasks.chat import talk

            talk(model, tokenizer, flags, checkpoint)
        else:
            score = partial(print_scores, model, name=scored)
            task.sample(model, tokenizer, flags, checkpoint, score)


if __name__ == "__main__":
    cli.run(main)
