"""Rows of settings, each trained by train.py with several seeds, compared in a table and a picture.

    python -m lab.sweep --rows rows.txt --base "--preset gpt-shakespeare --steps 300"

rows.txt has a row on each line, a name and flags of train.py; lines that begin with # are skipped:

    as it is:
    wide: --n_embd 192
    fast: --lr 1e-2 --warmup 50

Each row is compared with the first. A row's figure is that of its best.pt, the best evaluation of
the run by the goal of its task, not the last one. Does a difference exceed the spread? Take s and
s0, the standard deviations of the two rows over their seeds: were they known exactly, single runs
of two equal rows would differ by less than 2·sqrt(s² + s0²) in 95% of the cases; with those of
three seeds it is 88%. The means of three seeds differ by more in 2.6% of the cases, and in 7% where
nearly all the spread is one row's. So of fifty rows one to four say "yes" by accident, and a "no"
may be more than chance, and wants more seeds.

A run is kept in a folder named after the hash of its resolved settings, its seed and the contents
of its files. So rows with equal settings share their runs, and an interrupted sweep goes on where
it was with the same command. --workers 2 trains two at once, in processes of one thread each; then
steps/s are of machines that are shared, and comparable among themselves alone. Ctrl-C in the last
step of a run, or its evaluation, comes too late for train.py to heed: press it again.

Left out: a search for settings; runs on several machines; noticing that the program has changed
(delete --runs then).
"""

import engine.waiting  # isort: skip  # noqa: F401  (before torch is loaded)
import contextlib
import csv
import hashlib
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import statistics
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import torch

import tasks
import train
from data.cores import end_with_parent
from data.download import replacing
from data.hashes import known_hashes
from data.lines import read_lines
from engine import checkpoint as checkpoints
from engine import cli, saving, setup
from engine.checkpoint import LATEST, PREVIOUS
from engine.config import divide_step, resolve
from engine.logs import clock, read_log
from engine.steps import Diverged
from lab.ladder import spread as plus_minus
from lab.pictures import new_figure, new_picture, save
from model import count_parameters
from tasks.flags import TrainConfig, check, ranged


@dataclass
class SweepConfig:
    """What a sweep needs beside its rows. Experiments add fields of their own."""

    seeds: int = ranged(3, 1, 1000)  # runs of each row, which differ in their seed alone
    # 1: one run after the other, with all threads; more: so many at once, with a thread each
    workers: int = ranged(1, 1, 256)
    runs: str = "out/sweep"  # where the runs are kept: those that are there are not repeated
    out: str = "out/sweep.png"  # the picture; beside it the table, .md, and all figures, .csv

    def __post_init__(self):
        check(self)


@dataclass
class Record:
    """What the table needs of one run; a JSON file in its folder, written when all else is."""

    flags: list[str]  # of train.py, as the row gave them
    seed: int
    goal: str  # the figure that is compared
    lower_is_better: bool
    parameters: int
    flops_per_token: int  # of training
    tokens_per_step: int
    steps: int  # that the run was to take
    seconds: float  # of the call of train.py that ended the run, everything included
    threads: int
    steps_per_s: float | None  # the median of the log's, without evaluations; None: no step there
    diverged: bool
    evaluations: list[dict]  # {"step": …, figure: …}; a figure that is not finite is None
    curve: list[tuple[int, float]]  # steps and training losses of the log

    @property
    def points(self) -> list[tuple[int, float]]:
        """(step, goal) of each evaluation whose figure is finite."""
        found = [(r["step"], r[self.goal]) for r in self.evaluations]
        return [(step, figure) for step, figure in found if figure is not None]

    @property
    def best(self) -> dict:
        """The evaluation that best.pt is of; {} for a run that diverged."""
        if self.diverged:
            return {}
        sign = 1 if self.lower_is_better else -1
        finite = [r for r in self.evaluations if r[self.goal] is not None]
        return min(reversed(finite), key=lambda r: sign * r[self.goal])

    @property
    def final(self) -> float | None:
        return self.best.get(self.goal)

    @property
    def early(self) -> float | None:
        """The goal at the evaluation nearest to a quarter of the steps; None if that is the end."""
        before = [point for point in self.points if point[0] < self.steps]
        return min(before, key=lambda p: abs(p[0] - self.steps / 4))[1] if before else None


Results = dict[str, list[Record]]  # {row: a record for each seed}, the first row in front

# ---- rows to runs --------------------------------------------------------------------------------

# Settings that change nothing of what a run computes, or are resolved into others (preset).
NOT_HASHED = {"out", "cache_dir", "resume", "stop_after", "keep", "log_interval", "timeout"}
NOT_HASHED |= {"dry_run", "world", "preset", "seeds"}
FILES = ("data", "valid", "init", "tokenizer")  # settings that may name files or folders
OWN = {"out", "seed", "seeds", "resume", "stop_after", "dry_run", "world", "help"}  # of no row


class Job(NamedTuple):
    """A run to be made: its row, and what train.py is to be given."""

    row: str
    seed: int
    flags: list[str]
    config: TrainConfig
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"


def settings_of(flags: list[str]) -> tuple[TrainConfig, dict]:
    """(the config that train.py would make of the flags, what identifies the run). Raises
    ValueError for flags that train.py would refuse before it reads any data, or that are not for a
    row to say."""
    names = {cli.underscored(word).partition("=")[0] for word in flags}
    own = {f"--{prefix}{name}" for name in OWN for prefix in ("", "no-")} | {"-h"}
    if refused := sorted(names & own):
        raise ValueError(f"{refused[0]} is not for a row to say: leave it out")
    config, sizes, _ = resolve(flags)
    if tasks.counts(config.model):
        raise ValueError(
            f"--model {config.model} counts its text, and has neither steps nor chance to compare: "
            "choose a network that learns"
        )
    setup.check_sizes(config, sizes)
    divide_step(config, sizes["block_size"], world=1)
    settings = {k: v for k, v in {**asdict(config), **sizes}.items() if k not in NOT_HASHED}
    for name in FILES:
        paths = [Path(path) for path in settings.get(name, "").split(",") if path]
        files = [p for path in paths for p in (path, *sorted(path.rglob("*"))) if p.is_file()]
        settings[f"{name} has"] = known_hashes(files, Path(config.cache_dir))
    return config, settings


def plan_jobs(rows: dict[str, str], base: str, config: SweepConfig) -> list[Job]:
    """The runs of all rows, several of which may have one folder. Raises ValueError, with the name
    of the row, for flags that cannot be trained with or whose figure is not that of the others."""
    jobs, goals = [], {}
    for row, text in rows.items():
        try:
            flags = [*shlex.split(base), *shlex.split(text)]
            run, settings = settings_of(flags)
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from error
        goals.setdefault(tasks.task(run.model).GOAL, row)
        for seed in range(1337, 1337 + config.seeds):
            text = json.dumps({**settings, "seed": seed}, sort_keys=True)
            name = hashlib.sha256(text.encode()).hexdigest()[:16]
            jobs.append(Job(row, seed, flags, run, Path(config.runs) / name))
    if len(goals) > 1:
        (one, row), (other, that), *_ = goals.items()
        raise ValueError(
            f"row {that} is scored by {other} and row {row} by {one}, which cannot be compared: "
            "make two sweeps"
        )
    return jobs


# ---- a run ---------------------------------------------------------------------------------------

NOTE = "sweep.json"  # a run's Record


def read_record(folder: Path) -> Record | None:
    """That of a run which has ended, or None."""
    note = folder / NOTE
    return Record(**json.loads(note.read_text(encoding="utf-8"))) if note.is_file() else None


def begun(folder: Path) -> bool:
    """Whether a run can go on from what the folder holds; if not, the folder is emptied."""
    if not folder.is_dir():
        return False
    with saving.locked(folder):
        try:
            checkpoints.load_newest(folder / LATEST)
            return True
        except checkpoints.Unreadable:
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != saving.LOCK:
                    path.unlink()
    return False


def train_job(job: Job) -> Job:
    """Trains, or goes on with, the run of a job, and leaves its Record. What train.py prints goes
    to a file beside the folder, which itself has to be empty. Raises KeyboardInterrupt if the run
    was asked to stop, ValueError if it could not be made. One that diverges is a result."""
    folder, diverged, begin = job.folder, False, time.perf_counter()
    if read_record(folder):  # another sweep has been here in the meantime
        return job
    flags = [*job.flags, f"--seed={job.seed}", f"--out={folder}"]
    with contextlib.ExitStack() as stack:
        said = folder.with_suffix(".txt").open("a", encoding="utf-8", errors="replace")
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(redirect(stack.enter_context(said)))
        try:
            if begun(folder):
                flags = ["--resume", f"--out={folder}", f"--data={job.config.data}"]
                flags += [f"--cache_dir={job.config.cache_dir}"]
            train.main(flags)
        except Diverged:
            diverged = True
        except ValueError as error:
            raise ValueError(f"row {job.name}: {error}") from error
    record = make_record(job, diverged, time.perf_counter() - begin)
    with replacing(folder / NOTE) as file:
        file.write(json.dumps(asdict(record)).encode())
    for name in (LATEST, PREVIOUS):  # which have the optimizer's state
        if (folder / name).is_file():
            checkpoints.remove(folder / name)
    return job


def make_record(job: Job, diverged: bool, seconds: float) -> Record:
    """From what train.py wrote. Raises KeyboardInterrupt if that is not a whole run: train.py saves
    and returns when it is asked to stop."""
    settings = json.loads((job.folder / "config.json").read_text(encoding="utf-8"))
    log = read_log(job.folder / "log.jsonl")
    evaluations = [r for r in log if r.pop("split") == "validation"]
    learning = [r for r in log if "tokens_per_s" in r]
    if not diverged and (not evaluations or evaluations[-1]["step"] < settings["steps"]):
        raise KeyboardInterrupt
    rates = [r["tokens_per_s"] / settings["tokens_per_step"] for r in learning]
    task, Network = tasks.task(job.config.model), tasks.network(job.config.model)
    with torch.device("meta"):
        network = Network(
            Network.Config(**{f.name: settings[f.name] for f in fields(Network.Config)})
        )
    return Record(
        job.flags,
        job.seed,
        task.GOAL,
        task.LOWER_IS_BETTER,
        count_parameters(network),
        network.flops_per_token(),
        settings["tokens_per_step"],
        settings["steps"],
        seconds,
        torch.get_num_threads(),
        statistics.median(rates[1:] or rates) if rates else None,  # the start takes longer
        diverged,
        evaluations,
        [(r["step"], r["loss"]) for r in learning if r["loss"] is not None],
    )


# ---- all runs ------------------------------------------------------------------------------------


def begin_worker() -> None:
    """What a worker process does before its first job. Ctrl-C reaches it too, but the process that
    began the sweep decides what it means, and asks by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=end_with_parent, daemon=True).start()  # if that is killed, it asks nobody
    torch.set_num_threads(1)


def in_processes(jobs: list[Job], workers: int) -> Iterator[Job]:
    """Yields each job when its run has ended in one of so many processes. They are asked to stop,
    and save, when this one is or when one of them fails; they get no job before they are free."""
    others = set(multiprocessing.active_children())
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded, in the new processes
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker)
    try:
        left = iter(jobs)
        running = {pool.submit(train_job, job) for job in islice(left, workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(train_job, job) for job in islice(left, len(done))}
            for run in done:
                yield run.result()
    except BaseException as error:
        # Once is not enough: one that trains takes the first signal for a request to save, and then
        # would wait for a job for ever.
        children = set(multiprocessing.active_children()) - others
        while alive := [child for child in children if child.is_alive()]:
            for child in alive:
                child.terminate()
            time.sleep(0.2)
        if isinstance(error, BrokenProcessPool):
            raise ValueError(
                "a worker process was ended from outside, perhaps for lack of memory: begin the "
                "same command with fewer --workers, and it goes on"
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


def run_rows(rows: dict[str, str], base: str, config: SweepConfig) -> Results:
    """Trains what is not there yet of {row: flags}, all of which have the flags of `base` too: of a
    flag that is in both, the row's counts. Raises ValueError before anything is trained for a row
    that cannot be."""
    jobs = plan_jobs(rows, base, config)
    try:
        Path(config.runs).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write to --runs {config.runs} ({error.strerror}): choose another folder"
        ) from error
    every: dict[Path, Job] = {}
    for job in jobs:
        every.setdefault(job.folder, job)  # equal settings are trained once
    waiting = [job for job in every.values() if read_record(job.folder) is None]
    ended, begin = len(every) - len(waiting), time.perf_counter()
    if ended:
        print(f"{ended} of {len(every)} runs are there already", file=sys.stderr)
    runs = (train_job(job) for job in waiting)
    try:
        if config.workers > 1:  # also for a single run, so that its steps/s are comparable
            runs = in_processes(waiting, config.workers)
        with contextlib.closing(runs) as runs:
            for i, job in enumerate(runs, 1):
                record, seconds = read_record(job.folder), time.perf_counter() - begin
                figure = f"{record.goal} {record.final:.4f}" if record.best else "diverged"
                left = clock(seconds / i * (len(waiting) - i))
                said = f"{ended + i} of {len(every)}: {job.name}, {figure}, {left} left"
                print(said, file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with the sweep", file=sys.stderr)
        raise
    # Of rows with equal settings a record has the flags of one.
    found = [(job.row, replace(read_record(job.folder), flags=job.flags)) for job in jobs]
    return {row: [record for name, record in found if name == row] for row in rows}


# ---- what is shown -------------------------------------------------------------------------------

OURS = "sweep.py of this project"  # marks the files as ours, which may be written over


def finals(records: list[Record]) -> list[float]:
    """The figures of the runs that did not diverge."""
    return [record.final for record in records if record.best]


def chance(values: list[float], others: list[float]) -> float | None:
    """The spread: how far single runs of two equal rows may be apart, as explained above. None
    where a row has less than two runs."""
    if min(len(values), len(others)) < 2:
        return None
    return 2 * math.hypot(statistics.stdev(values), statistics.stdev(others))


def compare(records: list[Record], base: list[Record]) -> tuple[str, str]:
    """(difference of the means, whether it exceeds the spread), as the table has them."""
    values, others = finals(records), finals(base)
    if records is base or not values or not others:
        return "-", "-"
    difference, limit = statistics.mean(values) - statistics.mean(others), chance(values, others)
    exceeds = "-" if limit is None else "yes" if abs(difference) > limit else "no"
    return f"{difference:+.3f}", exceeds


def table(results: Results) -> str:
    """A Markdown table with a line for each row, in their order."""
    base = next(iter(results.values()))
    goal = base[0].goal
    lines = [
        f"| row | parameters | FLOPs per token | steps/s | early {goal} | {goal} | difference | "
        "exceeds the spread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, records in results.items():
        values, rates = finals(records), [r.steps_per_s for r in records if r.steps_per_s]
        early = [r.early for r in records if r.best and r.early is not None]
        figure = [plus_minus(values, 3)] if values else []
        if lost := len(records) - len(values):
            figure.append(f"{lost} of {len(records)} diverged")
        name = row.replace("|", "\\|")
        lines.append(
            f"| {name} | {records[0].parameters:,} | {records[0].flops_per_token / 1e6:.3g} M | "
            f"{f'{statistics.mean(rates):.3g}' if rates else '-'} | "
            f"{f'{statistics.mean(early):.3f}' if early else '-'} | {', '.join(figure)} | "
            f"{' | '.join(compare(records, base))} |"
        )
    return "\n".join(lines)


def write_csv(results: Results, path: Path) -> None:
    """A line for each run, with all figures of its best evaluation, in UTF-8."""
    lines = []
    for row, records in results.items():
        for r in records:
            line = {"row": row, **asdict(r), "flags": cli.command_line(*r.flags)}
            del line["evaluations"], line["curve"]
            line |= {"early": r.early, "final": r.final, "source": OURS}
            lines.append(line | {f"best {name}": value for name, value in r.best.items()})
    with path.open("w", encoding="utf-8", newline="") as file:
        names = {name: None for line in lines for name in line}  # without those that diverged
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(lines)


def usual(values: list[float]) -> tuple[float, float]:
    """The range that is drawn: all values but those far beyond the quartiles, which would leave no
    place for the others."""
    low, _, high = statistics.quantiles(values, method="inclusive")
    far = 4 * (high - low)
    near = [v for v in values if low - far <= v <= high + far]
    return min(near), max(near)


def draw(results: Results, caption: str, path: Path) -> None:
    """A line for each row, with a dot for each seed and a bar for their mean. Gray is where single
    runs of a row that equals the first would be. Triangles are of runs that are far away."""
    figure = new_figure(path, 9, 1.6 + 0.24 * len(results))
    if figure is None:
        return
    axes, base = figure.subplots(), finals(next(iter(results.values())))
    every = [value for records in results.values() for value in finals(records)]
    low, high = usual(every) if len(every) > 1 else (-math.inf, math.inf)
    if (limit := chance(base, base)) is not None:
        mean = statistics.mean(base)
        axes.axvspan(mean - limit, mean + limit, color="tab:gray", alpha=0.2, lw=0)
    for y, records in enumerate(results.values()):
        values = finals(records)
        for value in values:
            mark = "<" if value < low else ">" if value > high else "o"
            axes.plot(min(max(value, low), high), y, mark, color="tab:blue", alpha=0.6, ms=5)
        if values and low <= statistics.mean(values) <= high:
            axes.plot(statistics.mean(values), y, "|", color="black", ms=12, mew=2)
        if lost := len(records) - len(values):
            at = {"xy": (0.99, y), "xycoords": axes.get_yaxis_transform(), "ha": "right"}
            axes.annotate(f"{lost} diverged", **at, va="center", fontsize=8, color="tab:red")
    axes.set_yticks(range(len(results)), list(results), fontsize=8, parse_math=False)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlabel(next(iter(results.values()))[0].goal)
    axes.grid(alpha=0.3)
    axes.set_title("\n".join(textwrap.wrap(caption, 100)), fontsize=9, parse_math=False)
    save(figure, path, OURS)


def new_files(out: str) -> list[Path]:
    """The paths of the picture, the table and the figures. Raises ValueError if they cannot be
    written."""
    return new_picture(out, OURS, ".md", ".csv")


def show(results: Results, base: str, files: list[Path]) -> None:
    """Prints the table, and writes it, all figures and the picture into `new_files`."""
    picture, beside, numbers = files
    records = [record for row in results.values() for record in row]
    n, threads = len(next(iter(results.values()))), sorted({str(r.threads) for r in records})
    caption = (
        f"Each row with {n} seed{'s' * (n > 1)}, compared with the first; all: {base or 'no flags'}"
        ". The spread is 2·sqrt(s² + s0²) of the two rows' standard deviations. "
        f"Threads: {', '.join(threads)}."
    )
    text = "\n\n".join([f"Measured by {OURS}.", table(results), caption])
    print(text)
    beside.write_text(f"{text}\n", encoding="utf-8")
    write_csv(results, numbers)
    draw(results, caption, picture)
    print(f"\nthe same in {beside}, all figures in {numbers}, drawn in {picture}")


# ---- the command line ----------------------------------------------------------------------------


@dataclass
class RowsConfig(SweepConfig):
    rows: str = ""  # a text: on each line a row's name, a colon, its flags of train.py
    base: str = ""  # flags of all rows; a row's own win


def read_rows(name: str) -> dict[str, str]:
    """{row: flags} from the file --rows. Raises ValueError for a line that is no row."""
    how = "write a row on each line, name: flags"
    if not Path(name).is_file():
        raise ValueError(f"--rows {name} is no file here: {how}")
    rows: dict[str, str] = {}
    for number, line in enumerate(read_lines(Path(name)), 1):
        row, colon, flags = (part.strip() for part in line.partition(":"))
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not colon or not row:
            raise ValueError(f"{name}, line {number}, has no name with a colon behind it: {how}")
        if row in rows:
            raise ValueError(f"{name}, line {number}, is a second row {row}: give each its name")
        rows[row] = flags
    if not rows:
        raise ValueError(f"--rows {name} has no rows: {how}")
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Train rows of settings with several seeds each, and compare them.")
    cli.add_flags(parser, RowsConfig, "sweep")
    config = RowsConfig(**parser.parse(sys.argv[1:] if argv is None else argv))
    rows = read_rows(config.rows)
    files = new_files(config.out)
    show(run_rows(rows, config.base, config), config.base, files)


if __name__ == "__main__":
    cli.run(main)
