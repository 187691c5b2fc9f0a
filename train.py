"""One training loop for every task, on one processor or many.

    python train.py                                   a small GPT on Python's own source
    python train.py --data my.txt --n_layer 6         anybody's text, another size
    python train.py --resume                          go on with an interrupted run
    torchrun --standalone --nproc_per_node=8 train.py --preset gpt2 --data folder

The whole story is here; what each part is made of lies one import away.

    flags        -> config, the network's sizes         engine/config.py
    text         -> batches                             the task's Data (tasks/)
    batches      -> losses                              the network (model.py, bert.py, …)
    losses       -> gradients -> an optimizer step      `gradients` and `Run.train_step` below
    every so often: an evaluation, a checkpoint         `loop`

The loop knows of a task only what tasks/__init__.py says: data whose batches are arguments of the
network's forward, and a network that returns one summed loss for each "…targets" among them.

Left out: fp16 with loss scaling (bf16 needs none), learning-rate search.
"""

import engine.waiting  # isort: skip  # noqa: F401  (before torch is loaded)
import gc
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import optim
import tasks
from engine import (
    cli,
    closing,
    counting,
    kernels,
    plan,
    processes,
    saving,
    seeds,
    setup,
    sharding,
    steps,
)
from engine.checkpoint import LATEST
from engine.config import divide_step, resolve
from engine.evaluation import (
    count_targets,
    divisor,
    evaluate,
    learnt,
    to_device,
    to_minimise,
)
from engine.logs import RunLog
from engine.prefetch import Prefetch
from engine.processes import Interruption, Processes, precision
from engine.steps import Step, StepQueue
from tasks.flags import TrainConfig

# ---- one step ------------------------------------------------------------------------------------


def gradients(
    forward: nn.Module,
    batches: list[dict],
    group: Processes,
    autocast,
    stop: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, float]] | None:
    """Adds up the gradient of one step: (summed losses of this process, counts of all).

    The step's batch may be too large to be held at once, and is shared by all processes: each goes
    through some micro-batches of it, one after the other, and their gradients add up. The step's
    loss is

        Σ losses / counts      over all micro-batches of all processes,

    so that each target weighs the same; losses that the network adds of its own accord, such as
    "balance_loss" of models/moe.py, are divided by the number of targets too. (A mean of the
    micro-batches' means would not do that: where one has many targets and another few, those of the
    second would weigh more.) Hence the targets are counted first, by all processes together. DDP
    averages gradients over processes instead of adding them: the factor `world` makes up for that.

    Whether any process is asked to stop is sent with the counts, in one small message: then all of
    them return None. Dropout is a function of `seed` and the number of the micro-batch, so it is
    the same however many processes share the step, and whether the run was interrupted or not.
    """
    group.at("counting targets")  # for the watchdog: where this process is, if the others wait
    names = sorted(count_targets(batches[0]))
    local = [sum(count_targets(batch)[name] for batch in batches) for name in names]
    *total, stops = group.all_reduce([*local, int(stop)], torch.int64)
    if stops:
        return None
    counts = dict(zip(names, total, strict=True))
    sums: dict[str, Tensor] = {}
    group.at("gradients")
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        # Distinct for each micro-batch: a step has fewer of them than this prime.
        torch.manual_seed((seed * 65_537 + i * group.world + group.rank) % 2**63)
        # Gradients are exchanged once, after the last micro-batch. The switch must cover forward.
        with nullcontext() if last else sharding.no_sync(forward):
            with autocast():
                losses = forward(**to_device(batch, group.device))
            if last:
                group.at("exchanging gradients")
            each = [losses[name] / divisor(name, counts) for name in learnt(losses, counts)]
            loss = sum(each) * group.world
            loss.backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach()
    return sums, counts


# ---- the run -------------------------------------------------------------------------------------


class Run:
    """Data, network, optimizer and how far they have come: new, or from a checkpoint."""

    def __init__(self, config: TrainConfig, sizes: dict, checkpoint: dict | None, group: Processes):
        self.begin, self.log = time.perf_counter(), None
        self.config, self.group, self.out = config, group, Path(config.out)
        self.dtype = precision(config.dtype, group.device)
        setup.check_sizes(config, sizes)
        # The batch is given in tokens per optimizer step. How many micro-batches that makes, and in
        # which process, follows: so one command is the same training on any number of processes,
        # as long as they can have micro-batches of one size. The flag keeps its value.
        self.micro_batch, self.accumulate = divide_step(config, sizes["block_size"], group.world)
        # One process of each machine tokenizes while the others wait: hours, for a large text.
        with group.busy("preparing data", hours=12):
            self.data, self.validation = setup.open_data(
                config, sizes, self.micro_batch, checkpoint, group, self.dtype, self.say
            )
        with group.busy("making the network"):
            self.model = setup.make_network(
                config, sizes, checkpoint, self.data, group, self.dtype, self.say
            )
        self.steps_of_epoch = max(1, round(self.data.tokens_per_epoch / config.tokens_per_step))
        if config.epochs and not config.resume:
            config.steps = max(1, round(config.epochs * self.steps_of_epoch))
        # While a GPU works, the next batches are made.
        ahead = self.accumulate if group.device.type in steps.QUEUING else 0
        self.batch = Prefetch(self.data.batch, group.world, ahead, group.device)
        self.optimizer = self.new_optimizer()
        self.step, self.best = 0, float("inf")
        if config.resume:
            with group.busy("reading the optimizer's state"):
                setup.restore_training(
                    config, checkpoint, self.model, self.optimizer, group, say=self.say
                )
            self.step, self.best = checkpoint["step"], checkpoint["best"]
            setup.compare_micro_batches(checkpoint, self.micro_batch, self.say)
            self.say_new_length(checkpoint["train_config"].get("steps", config.steps))
        self.steps = StepQueue(config, group, checkpoint["skipped"] if config.resume else 0)
        self.prepare_forward()

    def prepare_forward(self) -> None:
        """`network`, compiled or not, is what an evaluation calls. `forward`, which training calls,
        is the same behind DDP, which exchanges gradients between processes."""
        device = self.group.device
        self.autocast = setup.autocast_for(device, self.dtype)
        self.network, batches = self.model, []
        if device.type == "cuda" or setup.wants_compiler(self.config, device):
            batches = [to_device(self.data.batch(i), device) for i in range(8)]
        if device.type == "cuda":
            kernels.prefer_cudnn(self.model, batches)
        if setup.wants_compiler(self.config, device):
            self.say("compiling the model; that takes a minute")
            # If they have unlike shapes, with padding or without, the compiler allows for any.
            with self.group.busy("compiling the model"):
                self.network = setup.compiled(self.model, batches, self.autocast, self.group)
        self.group.at("joining the networks")
        self.forward = sharding.parallel(self.network, self.group)

    def new_optimizer(self):
        return setup.optimizer_for(self.config, self.model, self.group, self.dtype)

    @property
    def eval_interval(self) -> int:
        return self.config.eval_interval or self.steps_of_epoch

    @property
    def warmup_steps(self) -> int:
        return min(self.config.warmup, self.config.steps // 4)

    def say_new_length(self, before: int) -> None:
        """Says what another number of steps than `before` does to the rate of a resumed run."""
        config, now = self.config, self.rate_factor()
        if before == config.steps:
            return
        steps, config.steps = config.steps, before
        then, config.steps = self.rate_factor(), steps
        self.say(
            f"--steps {steps:,} instead of {before:,}: the {config.schedule} schedule is drawn "
            f"anew for all of them, and the next step has the rate {config.lr * now:.2e}"
            + (f", not {config.lr * then:.2e}" if then != now else ", as before")
        )

    def rate_factor(self) -> float:
        """Of the peak learning rate, at this step: a pure function of the step, nothing to save."""
        config = self.config
        return optim.schedule(
            config.schedule,
            self.step,
            steps=config.steps,
            warmup_steps=self.warmup_steps,
            cooldown_steps=round(config.cooldown * config.steps),
            floor=config.floor,
        )

    def train_step(self, factor: float, stop: bool = False) -> Step | None:
        """One optimizer step at `factor` of the peak rate, perhaps still under way on the device;
        None where a process is asked to stop.

        Micro-batch number (step · accumulate + micro) · world + rank is a pure function of the
        seed: any number of processes sees the same examples, and resuming needs the step alone.
        """
        config, group, step = self.config, self.group, self.step
        group.at("reading batches", step)
        micro = (step * self.accumulate + m for m in range(self.accumulate))
        batches = [self.batch(m * group.world + group.rank) for m in micro]
        seed = config.seed * 1_000_003 + step
        summed = gradients(self.forward, batches, group, self.autocast, stop, seed)
        if summed is None:
            return None
        sums, counts = summed
        group.at("update")
        # One long gradient, from an odd batch, could undo a thousand steps: it is shortened. One
        # that is not finite is no gradient at all: `update` leaves everything as it is then.
        norm = sharding.clip(self.model, config.clip)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = config.lr * factor * parameters.get("lr_scale", 1.0)
        steps.update(self.optimizer, norm)
        self.optimizer.zero_grad(set_to_none=True)
        return Step(step, config.lr * factor, sums, counts, norm)

    def evaluate(self) -> dict[str, float]:
        return evaluate(self.network, self.validation, self.group, self.autocast)

    def release(self) -> None:
        """Lets go of the network and of all that training needs: two networks might not fit on the
        GPU when the best one is loaded to be shown. The data and the figures stay."""
        if self.network is not self.model or setup.layers_are_compiled(self.model):
            torch.compiler.reset()  # its graphs, and their count: after a few networks torch stops
        self.model = self.network = self.forward = self.optimizer = self.batch = None
        gc.collect()  # hooks and wrappers refer to each other
        if self.group.device.type == "cuda":
            torch.cuda.empty_cache()
            kernels.install(self.group.device)  # without what suited the batches

    def say(self, line: str) -> None:
        if self.log:
            self.log.say(line)
        elif self.group.main:
            print(line, flush=True)

    def command(self, script: str, *flags: str) -> str:
        """The line that goes on with this run, for as many processes as it had."""
        launcher = self.group.launcher if script == "train.py" else ["python"]
        return cli.command_line(*launcher, script, *flags)


def fit(run: Run) -> bool:
    """Trains to the end, True, or until it is interrupted, False; saves either way."""
    config, group = run.config, run.group
    # Before its first step: from then on a run can be resumed, and the disk has room for it.
    if not run.step and not saving.save_run(run, LATEST):
        raise ValueError(f"{run.out} cannot hold a checkpoint: choose another --out")
    if group.main:
        saving.write_settings(run)
        run.log = RunLog(run.out, run.step, config.steps, config.tokens_per_step)
    try:
        with Interruption() as interruption:
            return loop(run, interruption)
    except RuntimeError as error:
        if not processes.lost_another(error):
            raise
        raise ValueError(f"step {run.step + 1:,}: {processes.OTHER_ENDED}") from error
    finally:
        run.batch.close()
        if run.log:
            run.log.close()
            run.log = None


def loop(run: Run, interruption: Interruption) -> bool:
    """Steps, and every eval_interval of them an evaluation and a checkpoint."""
    config, group, start, saved = run.config, run.group, run.step, True
    finite = math.isfinite(run.best)  # whether any evaluation was
    go_on = run.command("train.py", "--resume", "--out", str(run.out))
    if run.step >= config.steps:
        run.say(f"this run has done all of its {config.steps:,} steps")
    while run.step < config.steps:
        enough = bool(config.stop_after) and run.step - start >= config.stop_after
        step = run.train_step(run.rate_factor(), interruption.asked or enough)
        if step is None:
            run.steps.read(run.log)
            if not saving.save_run(run, LATEST):
                raise ValueError(
                    f"stopped after step {run.step:,}, which is not saved: make room, and go "
                    f"on from the checkpoint before it with: {go_on}"
                )
            run.say(f"stopped after step {run.step:,} and saved; go on with: {go_on}")
            return False
        run.step += 1
        run.steps.add(step, run.log)
        if run.step % run.eval_interval and run.step < config.steps:
            continue
        run.steps.read(run.log)
        report = run.evaluate()
        found, best = to_minimise(tasks.task(config.model), report), run.best
        finite |= math.isfinite(found)
        # Of two equally good ones the later is kept. All processes save, or none.
        better = bool(group.broadcast(math.isfinite(found) and found <= best))
        run.best = found if better else best
        if group.main:
            run.log.evaluation(run.step, report, better)
        # best.pt is written where the evaluation is the best so far, latest.pt always: a run goes
        # on from it. It comes last: a run that is killed before does all of this once more.
        if better and not saving.save_run(run, "best.pt"):
            run.best = best
        if config.keep:
            saving.keep_last(run, config.keep)
        saved = saving.save_run(run, LATEST)
    if not saved:
        raise ValueError(
            f"all {run.step:,} steps are done, but the last ones not saved: make room, and "
            f"repeat them with: {go_on}"
        )
    if not math.isfinite(run.best):
        raise (ValueError if finite else steps.Diverged)(closing.no_figure(run, finite))
    return True


# ---- the command line ----------------------------------------------------------------------------


def train(config: TrainConfig, sizes: dict, checkpoint: dict | None, group: Processes) -> Run:
    """One run, to its end or its interruption. One that has ended has shown its results, and let go
    of its network and its optimizer; what it reached stays (step, best, …)."""
    folder = None
    try:
        if group.main:
            folder = saving.prepare_folder(config)
            config.out = str(folder)
        with saving.locked(folder):
            run = Run(config, sizes, checkpoint, group)
            if checkpoint:
                checkpoint.clear()  # a second copy of weights and optimizer state
            if config.minutes and not config.resume:
                plan.fit_steps(run)
            if group.main:
                run.say(plan.describe_run(run))
            if fit(run):
                with group.busy("showing results"):
                    run.release()
                    if group.main:
                        closing.show_results(run)
            return run
    finally:
        if folder and not any(folder.iterdir()):
            folder.rmdir()  # the run could not even start


def main(argv: list[str] | None = None) -> None:
    config, sizes, checkpoint = resolve(sys.argv[1:] if argv is None else argv)
    if config.dry_run:
        plan.dry_run(config, sizes)
        return
    group = processes.start(config.device, config.timeout)
    with processes.failing(group):
        if tasks.counts(config.model):
            counting.count(config, sizes, group)
        elif getattr(config, "seeds", 1) > 1:
            seeds.repeat(train, config, sizes, checkpoint, group)
        else:
            train(config, sizes, checkpoint, group)
        processes.stop(group)


if __name__ == "__main__":
    with processes.leaving_at_once():
        cli.run(main)
