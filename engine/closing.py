"""What is printed at the end of a run."""

import time

import tasks
from engine.checkpoint import load_model
from engine.evaluation import goal_of
from engine.logs import clock, draw_curves


def show_results(run) -> None:
    """Draws the curves of a train.Run, prints its best figure and some output of its best model,
    and the command that asks it for more."""
    task, rule = tasks.task(run.config.model), "-" * 80
    seconds = time.perf_counter() - run.begin
    picture = draw_curves(run.out)
    goal, figure = goal_of(task, run.best)
    print(f"{clock(seconds)} minutes, best validation {goal} {figure:.4f}")
    if picture:
        print(f"curves: {picture}")
    path = run.out / "best.pt"
    model, tokenizer, _ = load_model(path, run.group.device)
    for block in task.show(model, tokenizer, run.validation, run.out):
        print(f"{rule}\n{block}")
    flags = task.ask(run.data.prompts)
    print(f"{rule}\ngo on with: {run.command('sample.py', '--checkpoint', str(path), *flags)}")
