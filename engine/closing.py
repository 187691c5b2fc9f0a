"""What is printed at the end of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import tasks
from engine.checkpoint import load_model
from engine.evaluation import goal_of
from engine.logs import clock, draw_curves


@contextmanager
def or_else(consequence: str) -> Iterator[None]:
    """A context whose error is one line: a finished run does not fail for what it shows."""
    try:
        yield
    except BrokenPipeError:  # nobody reads any more
        raise
    except Exception as error:  # a full GPU, a font that is missing, a text without an example, …
        reason = str(error).strip().partition("\n")[0][:200] or "no reason given"
        print(f"{consequence} ({type(error).__name__}: {reason})")


def show_results(run) -> None:
    """Draws the curves of a train.Run, prints its best figure and some output of its best model,
    and the command that asks it for more. The run has ended, and its model need not be there."""
    task, rule = tasks.task(run.config.model), "-" * 80
    seconds, picture = time.perf_counter() - run.begin, None
    with or_else("curves.png is not drawn"):
        picture = draw_curves(run.out)
    goal, figure = goal_of(task, run.best)
    print(f"{clock(seconds)} minutes, best validation {goal} {figure:.4f}")
    if picture:
        print(f"curves: {picture}")
    path, flags = run.out / "best.pt", []
    with or_else("what the best model says is not shown"):
        model, tokenizer, _ = load_model(path, run.group.device)
        for block in task.show(model, tokenizer, run.validation, run.out):
            print(f"{rule}\n{block}")
    with or_else("no input is suggested"):
        flags = task.ask(run.data.prompts)
    print(f"{rule}\ngo on with: {run.command('sample.py', '--checkpoint', str(path), *flags)}")


def no_figure(run, finite: bool) -> str:
    """What is said where a train.Run has no best.pt, `finite` or not one of its evaluations was."""
    goal = tasks.task(run.config.model).GOAL
    if finite:
        return (
            f"all {run.step:,} steps are done, but best.pt could not be written to {run.out}: make "
            f"room; {run.out}/latest.pt has the weights of the last step"
        )
    return (
        f"all {run.step:,} steps are done, but no evaluation gave a finite {goal}, so there is no "
        f"best.pt: lower --lr (now {run.config.lr:g}), use --dtype fp32, and see what "
        f"{run.out}/log.jsonl says of the losses before"
    )
