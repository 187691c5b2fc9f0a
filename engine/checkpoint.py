"""The one file that holds a run: saved whole or not at all, loaded strictly.

A checkpoint is a dict of tensors and plain values: format, task, model_config, train_config,
tokenizer (its JSON text) and its hash, data (the corpus's hash), model, optimizer, step, best,
skipped. It is read with `weights_only=True`, so a file from a stranger can hold no code. The file
is the zip archive that torch writes, with a CRC-32 of each of its parts; torch does not check them,
`load` does. Where the tensors are too many for one process to write, they lie in a folder beside
the file: see `parts.py`.
"""

import os
import shutil
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from errno import EINVAL
from pathlib import Path

import torch
import torch.nn as nn

import tasks
from data.tokens import AnyTokenizer, tokenizer_from_json
from engine.cpu import lay_out_for_decoding
from finetune import adapter_rank, add_adapters, merged_state

FORMAT = 1

KEYS = {
    "task": str,
    "model_config": dict,
    "train_config": dict,
    "tokenizer": str,
    "tokenizer_hash": str,
    "data": str,
    "model": dict,
    "optimizer": dict,
    "step": int,
    "best": float,
    "skipped": int,
}


def pack(
    task: str,
    model: nn.Module,
    tokenizer: AnyTokenizer,
    *,
    train_config,
    data: str,
    weights: dict | None = None,
    merged: bool = False,
    **state,
) -> dict:
    """The dict that `save` writes. `state` is optimizer, step, best and skipped, perhaps parts and
    micro_batch, the sequences in a micro-batch.
    weights is the state of the model; if None, it is taken from the model. merged: adapters become
    part of the weights that they change."""
    weights = model.state_dict() if weights is None else weights
    return {
        "format": FORMAT,
        "task": task,
        "model_config": asdict(model.config),
        "train_config": asdict(train_config),
        "tokenizer": tokenizer.to_json(),
        "tokenizer_hash": tokenizer.hash,
        "data": data,
        "model": merged_state(weights) if merged else weights,
        **state,
    }


LATEST, PREVIOUS = "latest.pt", "previous.pt"


def save(path: Path, checkpoint: dict, previous: Path | None = None) -> None:
    """Writes the checkpoint under a temporary name, flushes it to the disk, then renames it: a
    crash or a full disk leaves the old file. `previous` is the name under which the old file is
    kept. Raises OSError if the file cannot be written."""
    temporary = path.with_name(f"{path.name}.part")
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        kept = [checkpoint.get("parts", {}).get("folder", "")]
        if kept[0]:
            flush_names(path.with_name(kept[0]))
        if previous and path.exists():
            kept += folders_of(path)
            path.replace(previous)
        temporary.replace(path)
        flush_names(path.parent)
    except RuntimeError as error:  # torch's writer raises it after an OSError
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    remove_parts(path, *kept)


def flush_names(folder: Path) -> None:
    """Flushes a folder to the disk: only then does a new name in it survive a power failure. Where
    the system cannot do that (Windows, some network disks), nothing happens."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a checkpoint, and the folder of its tensors if it has one."""
    path.unlink()
    remove_parts(path)


def folders_of(path: Path) -> list[str]:
    """[the name of the folder that the tensors of a checkpoint are in], or []."""
    if not path.is_file() or not any(path.parent.glob("*.parts")):
        return []
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return [checkpoint["parts"]["folder"]] if "parts" in checkpoint else []


def remove_parts(path: Path, *keep: str) -> None:
    """Removes the folders of former checkpoints of this name and of unfinished ones, but not those
    named in `keep`."""
    for folder in path.parent.glob(f"{path.stem}.*.parts"):
        if folder.name not in keep:
            shutil.rmtree(folder, ignore_errors=True)


class Unreadable(ValueError):
    """A checkpoint that is missing, truncated or damaged, as an accident leaves it."""


def load_newest(latest: Path) -> dict:
    """The checkpoint that a run resumes from: latest.pt, or previous.pt if latest.pt is damaged, or
    missing because of a crash between the two renamings of `save`. Then "instead" says why. Tensors
    in parts are not read yet (`parts.Stored`): each process will read only what it holds."""
    previous = latest.with_name(PREVIOUS)
    try:
        return load(latest, whole=False)
    except Unreadable as error:
        try:
            return {**load(previous, whole=False), "instead": str(error)}
        except Unreadable:
            raise error from None


def put_previous_in_place(
    path: Path, reason: str, step: int, main: bool, say: Callable[[str], None]
) -> None:
    """Renames previous.pt to latest.pt, which `load_newest` could not read for that reason;
    otherwise the next save would keep the damaged file as previous.pt. All processes may call it;
    the main one renames."""
    reason = reason.rpartition(": ")[0]  # without the remedy, which is applied here
    say(f"{reason}; going on from {PREVIOUS}, which is of step {step:,}")
    if main:
        with suppress(FileNotFoundError):
            path.replace(path.with_suffix(".damaged"))
        path.with_name(PREVIOUS).replace(path)


def check_sums(path: Path) -> None:
    """Raises Unreadable unless every part of the archive has its checksum, and OSError where the
    system could not read it: that may work another time."""
    damaged = None
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except Exception as error:  # zipfile raises half a dozen kinds for damaged files
            # A damaged table of contents points to offsets that no file has: EINVAL.
            if isinstance(error, MemoryError) or getattr(error, "errno", EINVAL) != EINVAL:
                raise
            raise Unreadable(
                f"{path} is truncated, or no checkpoint of this project: "
                "use latest.pt or best.pt of a finished or interrupted run"
            ) from error
    if damaged:
        raise Unreadable(
            f"{path} is damaged, for the checksum of its part {damaged} is wrong: use another "
            "checkpoint of the run"
        )


def load(path: Path, whole: bool = True) -> dict:
    """The checked dict of a checkpoint. Raises ValueError for a missing, truncated, damaged,
    foreign or newer file. whole=False: the tensors of a checkpoint in parts are not read yet."""
    if path.is_dir():
        # Before its first evaluation a run has no best.pt.
        name = next((n for n in ("best.pt", LATEST) if (path / n).is_file()), "best.pt")
        raise ValueError(f"{path} is a folder: name a checkpoint in it, {path / name} for one")
    if not path.is_file():
        raise Unreadable(f"there is no checkpoint {path}: train first, or name one that exists")
    check_sums(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of foreign formats; we refuse them below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for damaged files
        raise ValueError(
            f"{path} is no checkpoint of this project: use latest.pt or best.pt of a finished or "
            "interrupted run"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("format"), int):
        raise ValueError(f"{path} is no checkpoint of this project: it has no format number")
    if checkpoint["format"] != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {checkpoint['format']}, this code reads {FORMAT}: "
            "use the version of the project that wrote it"
        )
    wrong = [k for k, kind in KEYS.items() if not isinstance(checkpoint.get(k), kind)]
    if wrong:
        raise ValueError(f"{path} is damaged: {', '.join(wrong)} missing or of the wrong type")
    if checkpoint["task"] not in tasks.TABLE:
        known = ", ".join(tasks.TABLE)
        raise ValueError(f"{path} holds the task {checkpoint['task']!r}, known are {known}")
    if "parts" in checkpoint:
        from engine import parts  # which takes a second

        parts.attach_tensors(path, checkpoint, whole)
    return checkpoint


def restore(
    path: Path, checkpoint: dict, keep_adapters: bool = False
) -> tuple[nn.Module, AnyTokenizer]:
    """The model with its weights, and the tokenizer. Raises ValueError if a weight is missing or
    left over. keep_adapters: adapters of an unfinished run are not merged, but stay trainable."""
    Model = tasks.network(checkpoint["task"])
    try:
        model = Model(Model.Config(**checkpoint["model_config"]))
        rank = adapter_rank(checkpoint["model"])
        if rank:
            add_adapters(model, rank)
        if "parts" not in checkpoint:  # else sharding.load_weights does it, after the division
            model.load_state_dict(checkpoint["model"])
        if rank and not keep_adapters:
            state = merged_state(model.state_dict())
            model = Model(model.config)
            model.load_state_dict(state)
    except (TypeError, RuntimeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit the model that it names: {reason}") from error
    return model, restore_tokenizer(path, checkpoint)


def load_model(
    path: Path,
    device: torch.device,
    checkpoint: dict | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, AnyTokenizer, dict]:
    """(model, tokenizer, checkpoint), ready for sampling; the weights are in the model alone.
    checkpoint: what `load` returned for path, if it was called before."""
    checkpoint = checkpoint or load(path)
    model, tokenizer = restore(path, checkpoint)
    checkpoint = {k: v for k, v in checkpoint.items() if k not in ("model", "optimizer")}
    if next(model.parameters(), None) is None:
        dtype = torch.float32  # tables of logarithms, which bf16 would round to three digits
    model.to(device, dtype).eval()
    if device.type == "cpu":
        lay_out_for_decoding(model)
    return model, tokenizer, checkpoint


def restore_tokenizer(path: Path, checkpoint: dict) -> AnyTokenizer:
    tokenizer = tokenizer_from_json(checkpoint["tokenizer"])
    if tokenizer.hash != checkpoint["tokenizer_hash"]:
        raise ValueError(f"{path} is damaged: its tokenizer does not have the hash that it names")
    return tokenizer


def newest(folder: Path = Path("out")) -> Path:
    """The checkpoint to use of the run below `folder` that was written to last: average.pt if it is
    the newest file of all, else best.pt, else the newest file. Raises ValueError if there is
    none."""
    found = sorted(folder.glob("*/*.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError(
            f"there is no checkpoint below {folder}: run python train.py first, or pass "
            "--checkpoint PATH"
        )
    if found[-1].name == "average.pt":
        return found[-1]
    best = found[-1].with_name("best.pt")
    return best if best.is_file() else found[-1]
