"""Does transformers compute from the files of an export what our model computes?

The tables of families.py describe the networks of this project as they are. Whoever has changed
model.py (other positions, another activation) would export files that load without a word and mean
another network: only numbers show that.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from engine.hub.families import family_of

ROWS, LENGTH = 3, 128  # of the texts that are compared; shorter if the model's block is
# Two ways to the same float32 logits differ by 1e-6 of the largest, in 48 layers by 1e-5.
NEAR = 1e-4
NAMES = {
    "tokens": "input_ids",
    "segments": "token_type_ids",
    "keep": "attention_mask",
}
MARIAN_NAMES = {
    "source": "input_ids",
    "source_keep": "attention_mask",
    "tokens": "decoder_input_ids",
}


def random_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Texts of random tokens, by the names of forward's arguments; all but the first are padded
    where the model takes padding."""
    config, takes = model.config, inspect.signature(model.forward).parameters
    T, random = min(config.block_size, LENGTH), torch.Generator().manual_seed(0)
    lengths = torch.tensor([T - i * T // (ROWS + 1) for i in range(ROWS)])
    made = {
        name: torch.randint(config.vocab_size, (ROWS, T), generator=random)
        for name in ("tokens", "source")
    }
    made["segments"] = torch.randint(2, (ROWS, T), generator=random)
    made["keep"] = made["source_keep"] = torch.arange(T) < lengths[:, None]
    return {name: tensor for name, tensor in made.items() if name in takes}


@torch.no_grad()
def our_logits(model: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    """What the model, in evaluation, gives for these inputs, one tensor for each of its heads."""
    found = model.eval()(**given)
    return [head for head in found if head is not None] if isinstance(found, tuple) else [found]


@torch.no_grad()
def their_logits(task: str, theirs: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    """The same, of the class of transformers that belongs to the task."""
    names = MARIAN_NAMES if "source" in given else NAMES
    out = theirs.eval()(**{names[name]: tensor.long() for name, tensor in given.items()})
    if task == "answer":
        logits = torch.stack([out.start_logits, out.end_logits], 1)
        return [logits.masked_fill(~given["keep"][:, None], -torch.inf)]
    if task == "similar":
        keep = given["keep"][..., None]
        return [(out.last_hidden_state * keep).sum(1) / keep.sum(1)]
    if "seq_relationship_logits" in out:
        return [out.prediction_logits, out.seq_relationship_logits]
    return [out.logits]


def compare(task: str, architecture: str, folder: Path, given: dict, ours: list[Tensor]) -> str:
    """Loads the folder by transformers and says how far its logits are from `ours`, which a model
    of ours gave for the inputs `given`; or that there is nothing to compare with. Raises ValueError
    if they are not the same."""
    try:
        import transformers

        with quiet(transformers):
            more = {"add_pooling_layer": False} if task == "similar" else {}
            Class = getattr(transformers, architecture)
            theirs = Class.from_pretrained(folder, local_files_only=True, **more).float()
    except ImportError as error:
        reason = "is not installed" if error.name == "transformers" else f"fails ({error})"
        return f"transformers {' '.join(reason.split())[:200]}: nothing was compared with it"
    except Exception as error:  # whatever the library raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"transformers cannot load what was to be exported ({reason})") from error
    apart, largest = 0.0, 0.0
    for got, want in zip(ours, their_logits(task, theirs, given), strict=True):
        same = got == want  # -inf at padding
        # torch's max keeps a NaN, Python's does not.
        differences = torch.where(same, 0.0, (got - want).abs())
        apart = torch.stack([torch.as_tensor(apart), differences.max()]).max().item()
        largest = max(largest, torch.where(want.isfinite(), want.abs(), 0.0).max().item())
    if not apart <= NEAR * largest:
        raise ValueError(
            f"{architecture} of transformers is not this model: its logits differ by {apart:.3g} "
            f"(the largest is {largest:.3g}). Nothing was exported; undo what was changed in the "
            f"network of our {family_of(task).title}, or share the checkpoint with its code"
        )
    rows = " x ".join(map(str, given["tokens"].shape))
    return (
        f"loaded by transformers and compared: over {rows} tokens the outputs differ by at most "
        f"{apart:.2g} (the largest is {largest:.2g})"
    )


@contextmanager
def quiet(transformers) -> Iterator[None]:
    """Without the library's progress bars and its words on what it loads."""
    said = transformers.utils.logging
    level, bars = said.get_verbosity(), said.is_progress_bar_enabled()
    said.set_verbosity_error()
    said.disable_progress_bar()
    try:
        yield
    finally:
        said.set_verbosity(level)
        if bars:
            said.enable_progress_bar()
