"""Kills processes at random moments, and looks at what is left; test_faults.py runs it.

    python tests/kills.py training 100          runs that are killed and resumed to their end
    python tests/kills.py saving 200            processes that do nothing but save

Works in the folder that it is started in. A new process that imports torch takes seconds; these are
forked from one that has imported it, and what optimizers import, and has used nothing yet, so that
there is nothing to inherit.
"""

import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401
from conftest import TOY, TOY_BERT, TOY_PAIRS

import train
from engine import checkpoint as checkpoints
from engine.logs import read_log

# Steps enough for each to see the border of an epoch.
RUNS = {
    f"{task}-{optimizer}": [*flags, "--steps=24", "--eval_interval=5", f"--optimizer={optimizer}"]
    for task, flags in (("gpt", TOY), ("seq2seq", TOY_PAIRS), ("bert", TOY_BERT))
    for optimizer in ("muon", "adamw", "adam")
}


def forked(work: Callable[[], None], patience: float | None) -> bool:
    """Whether the work was done within so many seconds. If not, it was killed in the middle."""
    child = os.fork()
    if not child:
        status = 1
        try:
            with Path("said.txt").open("a", encoding="utf-8") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if patience is not None:
        time.sleep(patience)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status not in (0, signal.SIGKILL):
        raise SystemExit(f"a run has failed: {Path('said.txt').read_text(encoding='utf-8')}")
    return status == 0


def plain(value):
    """The same with every tensor as the list of its numbers, for ==."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k != "train_config"}
    return value.tolist() if isinstance(value, torch.Tensor) else value


def left_by(folder: Path) -> tuple:
    """Of a finished run: its two checkpoints, without the flags, and what its log says."""
    files = (plain(checkpoints.load(folder / name)) for name in ("latest.pt", "best.pt"))
    records = read_log(folder / "log.jsonl")
    return *files, [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in records]


def kill_training(trials: int) -> dict:
    """Each trial is one run, killed up to three times and then left to end."""
    wanted, seconds, equal, kills, refused = {}, {}, 0, 0, []
    for trial in range(trials):
        name = list(RUNS)[trial * 4 % len(RUNS)]  # three trials see each task and each optimizer
        flags = [*RUNS[name], "--dropout=0.1"]
        if name not in wanted:
            start = time.perf_counter()
            forked(lambda: train.main([*flags, f"--out={name}"]), None)  # noqa: B023
            seconds[name] = time.perf_counter() - start
            wanted[name] = left_by(Path(name))
        out, killed, done = Path(f"{name}-{trial}"), 0, False
        while not done:
            begun = any((out / file).exists() for file in ("latest.pt", "previous.pt"))
            argv = [f"--out={out}", "--resume"] if begun else [*flags, f"--out={out}"]
            patience = random.uniform(0, seconds[name]) if killed < 3 else None
            done = forked(lambda: train.main(argv), patience)  # noqa: B023
            killed += not done
        kills += killed
        if left_by(out) == wanted[name]:
            equal += 1
        else:
            refused.append(str(out))
    return {"trials": trials, "kills": kills, "equal": equal, "unequal": refused}


def kill_saving(trials: int) -> dict:
    """A process writes one checkpoint after the other, each of them whole in itself."""
    latest, loadable, instead, begun = Path("saved/latest.pt"), 0, 0, time.perf_counter()
    latest.parent.mkdir()
    plain_values = {"task": "gpt", "tokenizer": "", "tokenizer_hash": "", "data": "", "best": 1.0}
    plain_values |= {"model_config": {}, "train_config": {}, "optimizer": {}, "skipped": 0}

    def save(step: int) -> None:
        weights = {str(i): torch.full((100, 100), float(step)) for i in range(7)}
        state = {"format": checkpoints.FORMAT, **plain_values, "step": step, "model": weights}
        checkpoints.save(latest, state, latest.with_name("previous.pt"))

    def save_for_ever(step: int) -> None:
        while True:
            save(step := step + 1)

    forked(lambda: save(0), None)
    last, steps = 0, []
    for _ in range(trials):
        forked(lambda: save_for_ever(last), random.uniform(0.003, 0.05))  # noqa: B023
        state = checkpoints.load_newest(latest)
        whole = all((t == state["step"]).all() for t in state["model"].values())
        loadable += whole and state["step"] >= last
        instead += "instead" in state
        last = state["step"]
        steps.append(last)
    return {
        "trials": trials,
        "loadable": loadable,
        "saved": last,
        "previous": instead,
        "seconds": round(time.perf_counter() - begun, 1),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # a run looks for garbage at its end: not in what has been imported
    kind, count, *seed = sys.argv[1:]
    random.seed(int(seed[0]) if seed else None)
    print(json.dumps({"training": kill_training, "saving": kill_saving}[kind](int(count))))
