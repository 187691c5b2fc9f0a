"""The folder of a run, and what is written there.

Each function here takes the train.Run that it is about.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from engine import checkpoint as checkpoints
from engine import sharding
from engine.checkpoint import LATEST, PREVIOUS
from tasks.flags import TrainConfig


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


def save_run(run, name: str) -> bool:
    """A checkpoint in the run's folder; every process calls it. best.pt is for use, not for
    resuming: it has no optimizer state. False, after a line that says so, where the disk is full or
    refuses it for another reason."""
    resumable, path, saved = name == LATEST, run.out / name, True
    optimizer = run.optimizer if resumable else None
    run.group.at("saving")
    try:
        state = sharding.state_to_save(path, run.step, run.model, optimizer, run.group)
        if run.log:
            run.log.sync()
        if run.group.main:
            write_checkpoint(run, path, state, resumable)
    except OSError as error:
        run.say(f"{path} is not written ({error.strerror}): older ones are kept")
        saved = False
    run.group.at("saved")
    return bool(run.group.broadcast(saved))


def write_checkpoint(run, path: Path, state: dict, resumable: bool) -> None:
    checkpoint = checkpoints.pack(
        run.config.model,
        run.model,
        run.data.tokenizer,
        train_config=run.config,
        data=run.data.fingerprint,
        step=run.step,
        best=run.best,
        skipped=run.steps.skipped,
        merged=not resumable,
        **state,
    )
    checkpoints.save(path, checkpoint, run.out / PREVIOUS if resumable else None)


def keep_last(run, count: int) -> None:
    """One more file for `convert.py average`, and not more than `count` of them."""
    if save_run(run, f"step-{run.step:07}.pt") and run.group.main:
        for old in sorted(run.out.glob("step-*.pt"))[:-count]:
            checkpoints.remove(old)


def write_settings(run) -> None:
    settings = json.dumps({**asdict(run.config), **asdict(run.model.config)}, indent=1)
    (run.out / "config.json").write_text(settings, encoding="utf-8")
