"""A run of a network that counts instead of learning by steps: one pass over the text.

Such a network has `count(ids)`; models/ngram.py has one. The run ends with the same files, figures
and samples as any other, but there is nothing to resume and nothing to divide over processes.
"""

import time
from pathlib import Path

import torch

import tasks
from engine import checkpoint as checkpoints
from engine import cli, closing, plan, saving, setup
from engine.evaluation import score, to_minimise
from engine.logs import RunLog
from engine.processes import Processes
from tasks.flags import TrainConfig


def count(config: TrainConfig, sizes: dict, group: Processes) -> None:
    """The whole run: data, one pass, figures, a checkpoint, samples. Raises ValueError for several
    processes."""
    if group.world > 1:
        raise ValueError(
            f"--model {config.model} counts in one process, not {group.world}: start it without "
            "torchrun"
        )
    setup.check_sizes(config, sizes)
    begin, folder = time.perf_counter(), saving.prepare_folder(config)
    config.out = str(folder)
    try:
        with saving.locked(folder):
            run = CountingRun(config, sizes, group, folder, begin)
            print(run.describe(), flush=True)
            run.count()
        closing.show_results(run)
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()  # the run could not even start


class CountingRun:
    """The data and the network of a run, with what closing.py shows of any run."""

    def __init__(self, config: TrainConfig, sizes: dict, group: Processes, out: Path, begin: float):
        self.config, self.group, self.out, self.begin = config, group, out, begin
        self.data, self.validation = setup.open_data(
            config, sizes, config.batch_size, None, group, torch.float32, print
        )
        self.model = setup.make_network(config, sizes, None, self.data, group, torch.float32, print)

    def describe(self) -> str:
        """The plan, one line for each topic."""
        settings = ", ".join(f"{name} {value}" for name, value in vars(self.model.config).items())
        return plan.in_lines(
            {
                **plan.about_data(self),
                "model": f"{self.config.model}, {settings}",
                "steps": "none: the text is counted in one pass",
                "run": f"{self.out}: best.pt, log.jsonl, config.json",
            }
        )

    def count(self) -> None:
        """Counts the training text, and writes what that has taught to the run's folder. The model
        is let go then: what is shown is loaded from there."""
        start = time.perf_counter()
        self.model.count(self.data.ids[:])
        size = sum(buffer.nbytes for buffer in self.model.buffers())
        seconds = time.perf_counter() - start
        print(f"counted in {seconds:.1f} s; the tables have {size / 1e6:,.1f} MB", flush=True)
        report = score(self.model, self.validation, progress=True)
        self.best = to_minimise(tasks.task(self.config.model), report)
        log = RunLog(self.out, 0, 1, len(self.data.ids))
        log.evaluation(1, report, best=True)
        log.close()
        saving.write_settings(self)
        checkpoint = checkpoints.pack(
            self.config.model,
            self.model,
            self.data.tokenizer,
            train_config=self.config,
            data=self.data.fingerprint,
            optimizer={},
            step=1,
            best=self.best,
            skipped=0,
        )
        checkpoints.save(self.out / "best.pt", checkpoint)
        self.model = None

    def command(self, script: str, *flags: str) -> str:
        """The line that asks the model for more."""
        return cli.command_line("python", script, *flags)
