"""One run, repeated with several seeds: how far do its figures spread?"""

import statistics
from collections.abc import Callable
from dataclasses import replace

import tasks
from engine.evaluation import goal_of
from engine.processes import Processes
from tasks.flags import FinetuneConfig


def repeat(
    train: Callable, config: FinetuneConfig, sizes: dict, checkpoint: dict | None, group: Processes
) -> None:
    """Calls train.train for each of --seeds runs that differ in their seed alone, each in its own
    folder, and prints the mean and the standard deviation of their goals."""
    folder, best = config.out or f"out/{config.model}", []
    for seed in range(config.seed, config.seed + config.seeds):
        one = replace(config, seed=seed, seeds=1, out=f"{folder}-seed-{seed}")
        run = train(one, sizes, dict(checkpoint) if checkpoint else None, group)
        if run.step < one.steps:
            return  # interrupted
        goal, figure = goal_of(tasks.task(config.model), run.best)
        best.append(figure)
        del run  # the next one needs its memory
    if group.main:
        each = ", ".join(f"{value:.4f}" for value in best)
        mean, spread = statistics.mean(best), statistics.stdev(best)
        print(f"{len(best)} seeds: best validation {goal} {mean:.4f} ± {spread:.4f} ({each})")
