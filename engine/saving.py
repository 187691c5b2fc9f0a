"""The folder of a run, and what is written there."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from engine import checkpoint as checkpoints
from engine import sharding
from engine.checkpoint import LATEST, PREVIOUS
from tasks.flags import TrainConfig

try:
    import fcntl
except ImportError:  # Windows, where nothing stops two processes from training one run
    fcntl = None

LOCK = "run.lock"  # in the folder of a run, while it trains


def prepare_folder(config: TrainConfig) -> Path:
    """Makes the folder of the run and tries to write to it. Raises ValueError where it cannot, and
    where the folder holds another run or other files."""
    folder, number = Path(config.out or f"out/{config.model}"), 1
    # Leftovers of a run that was killed before its first checkpoint do not count.
    found = folder.iterdir() if folder.is_dir() else ()
    kept = (p for p in found if not p.match("*.part*") and p.name != LOCK)
    if config.out and not config.resume and any(kept):
        if any(folder.glob("*.pt")):
            raise ValueError(f"{folder} already holds a run: add --resume, or choose another --out")
        raise ValueError(
            f"{folder} is not empty, and a run writes nothing over: choose another --out"
        )
    try:
        while not config.out:  # a folder belongs to the run that makes it: two may start at once
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                number += 1
                folder = Path(f"out/{config.model}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # fails now rather than at the first checkpoint
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose --out") from error
    return folder


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """A context in which no other process can train the run in `folder`; None: this process writes
    nothing. Raises ValueError if another one does: each would write over what the other saves. The
    system frees the lock when the process ends, even if it is killed."""
    if not folder or not fcntl:
        yield
        return
    path = folder / LOCK
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino
        except BlockingIOError:
            taken = True
        except OSError:  # a network disk without locks
            taken = False
        if taken:  # or was, until a moment ago, and its file is gone
            raise ValueError(
                f"{folder} holds a run that is still training: wait for it or end it, or choose "
                "another --out"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def save_run(run, name: str) -> bool:
    """Writes a checkpoint of a train.Run to its folder; every process must call it. Only latest.pt
    has the optimizer's state; best.pt and others are for use, not for resuming. Returns whether it
    was written; where it was not, because the disk is full for example, a line says so."""
    resumable, path, saved = name == LATEST, run.out / name, True
    optimizer = run.optimizer if resumable else None
    run.group.at("saving")
    try:
        state = sharding.state_to_save(path, run.step, run.model, optimizer, run.group)
        if run.log:
            run.log.sync()
        if run.group.main:
            with run.group.busy("saving"):  # flushing to a slow disk passes no other place
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
        micro_batch=run.micro_batch,
        merged=not resumable,
        **state,
    )
    checkpoints.save(path, checkpoint, run.out / PREVIOUS if resumable else None)


def keep_last(run, count: int) -> None:
    """Saves step-N.pt for `convert.py average`, and removes all but the newest `count` of them."""
    if save_run(run, f"step-{run.step:07}.pt") and run.group.main:
        for old in sorted(run.out.glob("step-*.pt"))[:-count]:
            checkpoints.remove(old)


def write_settings(run) -> None:
    settings = json.dumps({**asdict(run.config), **asdict(run.model.config)}, indent=1)
    (run.out / "config.json").write_text(settings, encoding="utf-8")
