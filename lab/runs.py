"""What it costs to run on several processes, to save, and to resume: train.py from outside.

    python -m lab.runs                      all three measurements, ten minutes on two cores
    python -m lab.runs --only scaling       two processes of one thread each against one

Times come from the runs' own logs and from the lines that they print, so they include everything
that a user waits for: the exchange of gradients, the evaluation between two checkpoints, imports.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import train
from engine import cli, saving
from engine.logs import read_log
from tasks.flags import check, ranged

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class RunsConfig:
    only: str = ""  # scaling, saving or resuming; empty: all of them
    repeats: int = ranged(3, 1)  # turns of each contestant
    steps: int = ranged(14, 6)  # of a turn of scaling, of which the first four do not count
    small: bool = False  # models of no size at all, to see whether everything works

    def __post_init__(self):
        check(self)


SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--vocab_size=300"]
# The size with which docs/speed.md compares the speed of training.
MIDDLE = ["--n_layer=6", "--n_head=6", "--n_embd=384", "--block_size=256", "--batch_size=8"]
GPT2 = ["--n_layer=12", "--n_head=12", "--n_embd=768", "--block_size=64", "--vocab_size=50257"]


def launch(folder: Path, processes: int, *flags: str) -> subprocess.Popen:
    """Starts train.py with so many processes of one thread each. Its caches are the usual ones."""
    script = str(ROOT / "train.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [
            sys.executable,
            *launcher * (processes > 1),
            script,
            f"--out={folder}",
            "--device=cpu",
            *flags,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )


def finish(run: subprocess.Popen) -> str:
    """Waits for the run and returns what it printed. Raises ValueError if it failed."""
    said = run.communicate()[0]
    if run.returncode:
        raise ValueError(f"{' '.join(run.args)} ended with status {run.returncode}: {said[-500:]}")
    return said


def scaling(config: RunsConfig, folder: Path) -> dict:
    """Tokens per second of one process, and of two that share the same steps, in turns."""
    sizes = SMALL if config.small else MIDDLE
    rates: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(config.repeats):
        for processes, found in rates.items():
            out = folder / f"{processes}-{turn}"
            flags = ("--tokens_per_step=4096", f"--steps={config.steps}", "--eval_tokens=1")
            flags += ("--optimizer=adamw", "--log_interval=1")
            finish(launch(out, processes, *sizes, *flags))
            log = [r for r in read_log(out / "log.jsonl") if r["split"] == "train"]
            found.append(statistics.median(r["tokens_per_s"] for r in log[4:]))
    one, two = (statistics.median(found) for found in rates.values())
    return {"one": one, "two": two, "ratio": two / one, "all": list(rates.values())}


def time_saves(config: RunsConfig, folder: Path) -> dict:
    """The share of the default run's time that its checkpoints take."""
    real, spent = saving.save_run, []

    def timed(run, name: str) -> bool:
        start = time.perf_counter()
        done = real(run, name)
        spent.append(time.perf_counter() - start)
        return done

    saving.save_run = timed
    start = time.perf_counter()
    try:
        small = [*SMALL, "--steps=20", "--eval_interval=10"] if config.small else []
        with redirect_stdout(sys.stderr):
            train.main([f"--out={folder / 'saving'}", "--device=cpu", *small])
    finally:
        saving.save_run = real
    whole = time.perf_counter() - start
    return {"saves": len(spent), "seconds": sum(spent), "of": whole, "share": sum(spent) / whole}


def resuming(config: RunsConfig, folder: Path) -> dict:
    """Seconds from the command to the first step when a run of a large model is resumed."""
    out = folder / "resuming"
    sizes = SMALL if config.small else GPT2
    flags = ("--tokens_per_step=64", "--optimizer=adamw", "--steps=99", "--stop_after=1")
    finish(launch(out, 1, *sizes, *flags))
    found = []
    for _ in range(config.repeats):
        start = time.perf_counter()
        run = launch(out, 1, "--resume", "--stop_after=1")
        for line in run.stdout:
            if line.startswith("step "):
                found.append(time.perf_counter() - start)
                break
        finish(run)
    size = (out / "latest.pt").stat().st_size
    return {"seconds": statistics.median(found), "all": found, "bytes": size}


BENCHES = {"scaling": scaling, "saving": time_saves, "resuming": resuming}
SENTENCES = {
    "scaling": "two processes {two:,.0f} tokens/s, one {one:,.0f}: {ratio:.2f} x",
    "saving": "{saves} files saved in {seconds:.2f} s of {of:.1f} s: {share:.2%}",
    "resuming": "{seconds:.1f} s to the first step, from a checkpoint of {bytes:,} bytes",
}


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Time runs on several processes, their checkpoints and their resumption.")
    cli.add_flags(parser, RunsConfig, "bench")
    config = RunsConfig(**parser.parse(sys.argv[1:] if argv is None else argv))
    if config.only and config.only not in BENCHES:
        raise ValueError(f"--only {config.only} is not known: choose {', '.join(BENCHES)}")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in [config.only] if config.only else BENCHES:
            found[name] = BENCHES[name](config, Path(folder))
    for name, result in found.items():
        print(SENTENCES[name].format(**result))
    print(json.dumps(found))


if __name__ == "__main__":
    cli.run(main)
