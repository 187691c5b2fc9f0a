"""One training loop for every task, on one processor or many.

    python train.py                                   a small GPT on Python's own source
    python train.py --data my.txt --n_layer 6         anybody's text, another size
    python train.py --resume                          go on with an interrupted run
    torchrun --standalone --nproc_per_node=8 train.py --preset gpt2 --data folder

The loop knows of a task only what `checkpoint.TASKS` names: data whose batches are arguments of
the model's forward, and a model that returns one summed loss for each "…targets" among them (and
perhaps other sums, which are reported). Fine-tuning adds what may stay as it is (`finetune.py`).
Micro-batch number (step · accumulation + micro) · world + rank is a pure function of the seed, so
any number of processes sees the same examples and resuming needs the step alone.

Left out: fp16 with loss scaling (bf16 needs none), learning-rate search.
"""

import json
import math
import statistics
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

import optim
import sample
from bert import Encoder
from bpe import count_merges
from data.masked import SPECIAL
from data.tokens import END_OF_TEXT
from data.windows import check_special
from engine import checkpoint as checkpoints
from engine import cli, execution, plan, processes, sharding
from engine.checkpoint import LATEST, PREVIOUS
from engine.config import (
    FINETUNED,
    TASKS,
    TrainConfig,
    divide_step,
    padded,
    prepare_folder,
    resolve,
)
from engine.evaluation import badness, best_figure, evaluate, to_device
from engine.execution import Step, compiled, digest, gradients, recompute_blocks, update
from engine.logs import RunLog, clock, draw_curves
from engine.prefetch import Prefetch
from engine.processes import Interruption, Processes, precision
from finetune import limit_what_learns, rate_scale, take_weights
from heads import LEARNT

# ---- the run -------------------------------------------------------------------------------------


class Run:
    """Data, model, optimizer and their state: from a config, or gone on with from a checkpoint."""

    def __init__(self, config: TrainConfig, sizes: dict, checkpoint: dict | None, group: Processes):
        self.begin = time.perf_counter()
        self.config, self.group, self.out = config, group, Path(config.out)
        self.dtype = precision(config.dtype, group.device)
        self.log: RunLog | None = None
        Config, Model, Data = TASKS[config.model]
        same_task = bool(checkpoint) and checkpoint["task"] == config.model

        with torch.device("meta"):
            Model(Config(**sizes))  # impossible sizes are refused before hours of tokenizing
        config.batch_size, self.accumulate = divide_step(config, sizes["block_size"], group.world)
        tokenizer = None
        needed = SPECIAL if issubclass(Model, Encoder) else (END_OF_TEXT,)
        if checkpoint:
            path = self.out / LATEST if config.resume else Path(config.init)
            tokenizer = checkpoints.restore_tokenizer(path, checkpoint)
        elif config.tokenizer.endswith(".pt"):
            path = Path(config.tokenizer)
            tokenizer = checkpoints.restore_tokenizer(path, checkpoints.load(path))
            check_special(tokenizer, needed, config.tokenizer)
        elif not config.tokenizer:
            count_merges(sizes["vocab_size"], len(needed))  # refused before the data is read
        self.say(f"preparing {config.data}")
        # One process of each machine prepares the data, the others find all of it in the cache.
        if group.local_rank > 0:
            group.wait()
        self.data, self.validation = Data.splits(config, sizes, tokenizer)
        if group.local_rank == 0:
            group.wait()
        self.compare_machines(sizes, checkpoint["step"] if config.resume else 0)
        if config.resume and self.data.fingerprint != checkpoint["data"]:
            raise ValueError(
                f"the text of --data {config.data} is not the one that {self.out} was trained on: "
                "restore it, or begin a new run with --init"
            )

        torch.manual_seed(config.seed)
        # What a head must know of the data: its labels, whether its texts are pairs, …
        sizes = {k: getattr(self.data, k) if k in LEARNT else v for k, v in sizes.items()}
        if same_task:
            saved = {**checkpoint, "model_config": sizes}
            self.model, _ = checkpoints.restore(path, saved, keep_adapters=config.resume)
        elif checkpoint:
            self.model = Model(Config(**sizes))
            other, _ = checkpoints.restore(path, checkpoint)
            fresh = take_weights(self.model, other.state_dict())
            self.say(f"from {path}; freshly initialised: {', '.join(fresh) or 'nothing'}")
        else:
            vocab_size = padded(self.data.tokenizer.vocab_size)
            self.model = Model(Config(**{**sizes, "vocab_size": vocab_size}))
        if group.world > 1 and checkpoint and not group.agree(digest(self.model)):
            raise ValueError(f"the machines do not have the same {path}: give each the same files")
        if config.model in FINETUNED:
            limit_what_learns(self.model, config.lora_rank, config.freeze)
        if config.recompute:
            recompute_blocks(self.model)
        sharding.divide_model(config.shard, group, self.model, self.dtype)
        self.model.to(group.device).train()
        self.steps_of_epoch = max(1, round(self.data.tokens_per_epoch / config.tokens_per_step))
        if config.epochs and not config.resume:
            config.steps = max(1, round(config.epochs * self.steps_of_epoch))

        ahead = self.accumulate if group.device.type in execution.QUEUING else 0
        self.batch = Prefetch(self.data.batch, group.world, ahead, group.device)
        self.queued: deque[Step] = deque()  # whose numbers nobody has read yet
        self.step, self.best, self.skipped, self.in_a_row = 0, math.inf, 0, 0
        self.optimizer = self.new_optimizer()
        if config.resume:
            if not checkpoint["optimizer"]:
                raise ValueError(
                    f"{path} has no optimizer state, as every best.pt: use it with --init, or "
                    "resume from a latest.pt"
                )
            if "parts" in checkpoint:
                sharding.load_weights(path, self.model, checkpoint["model"])
            sharding.load_optimizer(self.optimizer, checkpoint["optimizer"])
            self.step, self.best = checkpoint["step"], checkpoint["best"]
            self.skipped = checkpoint["skipped"]
            if why := checkpoint.get("instead"):
                why = why.rpartition(": ")[0]  # without the remedy, for here it is
                self.say(f"{why}; going on from {PREVIOUS}, which is of step {self.step:,}")
                if group.main:  # else the next save would keep the damaged one in its place
                    with suppress(FileNotFoundError):
                        path.replace(path.with_suffix(".damaged"))
                    (self.out / PREVIOUS).replace(path)
        self.prepare_forward()

    def compare_machines(self, sizes: dict, step: int) -> None:
        """Each has its own files and was given its own command: refused where they differ."""
        paths = {"out", "cache_dir", "data", "valid", "init", "tokenizer"}
        settings = {k: v for k, v in asdict(self.config).items() if k not in paths}
        for what, value in (
            ("checkpoint to go on with", step),
            ("flags", {**settings, **sizes, "dtype": self.dtype}),
            (f"text in --data {self.config.data}", self.data.fingerprint),
            ("tokenizer", self.data.tokenizer.hash),
        ):
            if not self.group.agree(str(value)):
                raise ValueError(
                    f"the machines do not have the same {what}: give each the same files and flags"
                )

    def new_optimizer(self):
        config, scale = self.config, {}
        if config.model in FINETUNED:
            scale = {"rate_scale": rate_scale(self.model, config.layer_decay)}
        return sharding.make_optimizer(
            config.shard,
            self.group,
            self.model,
            config.optimizer,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            dtype=self.dtype,
            **scale,
        )

    def prepare_forward(self) -> None:
        """self.eager_or_compiled evaluates; self.forward, the same behind DDP, trains."""
        config, device = self.config, self.group.device
        enabled = self.dtype == torch.bfloat16
        self.autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=enabled)
        want = config.compile
        if want is None:
            want = device.type == "cuda" and sys.platform == "linux"
        self.eager_or_compiled = self.model
        if want:
            self.say("compiling the model; that takes a minute")
            # If they have unlike shapes, with padding or without, the compiler allows for any.
            batches = [to_device(self.data.batch(i), device) for i in range(8)]
            self.eager_or_compiled = compiled(self.model, batches, self.autocast)
        self.forward = sharding.parallel(self.eager_or_compiled, self.group)

    def say(self, line: str) -> None:
        if self.log:
            self.log.say(line)
        elif self.group.main:
            print(line, flush=True)

    def command(self, script: str, *flags: str) -> str:
        """The line that goes on with this run, for as many processes as it had."""
        launcher = self.group.launcher if script == "train.py" else ["python"]
        return cli.command_line(*launcher, script, *flags)

    @property
    def eval_interval(self) -> int:
        return self.config.eval_interval or self.steps_of_epoch

    def factor(self, step: int) -> float:
        """Of the peak learning rate."""
        config = self.config
        return optim.schedule(
            config.schedule,
            step,
            steps=config.steps,
            warmup_steps=min(config.warmup, config.steps // 4),
            cooldown_steps=round(config.cooldown * config.steps),
            floor=config.floor,
        )

    def train_step(self, factor: float, stop: bool = False) -> Step | None:
        """One optimizer step at `factor` of the peak rate, perhaps not done yet; None to stop."""
        config, group, step = self.config, self.group, self.step
        group.at("reading batches", step)
        micro = (step * self.accumulate + m for m in range(self.accumulate))
        batches = [self.batch(m * group.world + group.rank) for m in micro]
        seed = config.seed * 1_000_003 + step
        result = gradients(self.forward, batches, group, self.autocast, stop, seed)
        if result is None:
            return None
        sums, counts = result
        group.at("update")
        norm = sharding.clip(self.model, config.clip)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = config.lr * factor * parameters.get("lr_scale", 1.0)
        update(self.optimizer, norm)
        self.optimizer.zero_grad(set_to_none=True)
        return Step(step, config.lr * factor, sums, counts, norm)

    def account(self, but: int = 0) -> None:
        """Waits for the queued steps, `but` for so many: they are logged, counted and judged."""
        while len(self.queued) > but:
            record = self.queued.popleft().read(self.group)
            step, config = record["step"], self.config
            # The same in every process: the norm is that of the averaged gradient.
            bad = not math.isfinite(record["grad_norm"])
            self.skipped += bad
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if self.log:
                write = step % config.log_interval == 0 or step == config.steps
                self.log.train({**record, "skipped": self.skipped}, write=write)
            if bad:
                self.say(f"step {step:,} skipped: its gradient is not finite")
            if self.in_a_row == 5:
                raise ValueError(
                    f"5 steps in a row, up to {step:,}, had gradients that are not finite: lower "
                    f"--lr (now {config.lr:g}) or use --dtype fp32; what {self.out} holds is from "
                    "before them"
                )

    def evaluate(self) -> dict[str, float]:
        return evaluate(self.eager_or_compiled, self.validation, self.group, self.autocast)

    def save(self, name: str) -> bool:
        """Into the run's folder; every process calls it. best.pt is for use, not for resuming: no
        optimizer state. False, and a line that says so, where the disk refuses it."""
        resumable, path, saved = name == LATEST, self.out / name, True
        optimizer = self.optimizer if resumable else None
        self.group.at("saving")
        try:
            found = sharding.state_to_save(path, self.step, self.model, optimizer, self.group)
            if self.log:
                self.log.sync()
            if self.group.main:
                self.write(path, found, resumable)
        except OSError as error:
            self.say(f"{path} is not written ({error.strerror}): older ones are kept")
            saved = False
        self.group.at("saved")
        return bool(self.group.first(saved))

    def write(self, path: Path, found: dict, resumable: bool) -> None:
        state = checkpoints.pack(
            self.config.model,
            self.model,
            self.data.tokenizer,
            train_config=self.config,
            data=self.data.fingerprint,
            step=self.step,
            best=self.best,
            skipped=self.skipped,
            merged=not resumable,
            **found,
        )
        checkpoints.save(path, state, self.out / PREVIOUS if resumable else None)

    def keep_last(self, count: int) -> None:
        """One more file for average.py, and not more than `count` of them."""
        if self.save(f"step-{self.step:07}.pt") and self.group.main:
            for old in sorted(self.out.glob("step-*.pt"))[:-count]:
                checkpoints.remove(old)

    def fit(self) -> bool:
        """Trains to the end, True, or until interrupted, False; saves either way."""
        config, group = self.config, self.group
        # First of all: from its first step on a run can be resumed, and the disk has room for it.
        if not self.step and not self.save(LATEST):
            raise ValueError(f"{self.out} cannot hold a checkpoint: choose another --out")
        if group.main:
            settings = json.dumps({**asdict(config), **asdict(self.model.config)}, indent=1)
            (self.out / "config.json").write_text(settings, encoding="utf-8")
            self.log = RunLog(self.out, self.step, config.steps, config.tokens_per_step)
        try:
            with Interruption() as interruption, group.watched(config.timeout):
                return self.loop(interruption)
        except RuntimeError as error:
            if not processes.lost_another(error):
                raise
            raise ValueError(f"step {self.step + 1:,}: {processes.OTHER_ENDED}") from error
        finally:
            self.batch.close()
            if self.log:
                self.log.close()
                self.log = None

    def loop(self, interruption: Interruption) -> bool:
        config, group = self.config, self.group
        first, saved = self.step, True
        # While a GPU works on a step, the host reads the numbers of the one before.
        late = int(group.device.type in execution.QUEUING)
        go_on = self.command("train.py", "--resume", "--out", str(self.out))
        if self.step >= config.steps:
            self.say(f"this run has done all of its {config.steps:,} steps")
        while self.step < config.steps:
            enough = bool(config.stop_after) and self.step - first >= config.stop_after
            queued = self.train_step(self.factor(self.step), interruption.asked or enough)
            if queued is None:
                self.account()
                if not self.save(LATEST):
                    raise ValueError(
                        f"stopped after step {self.step:,}, which is not saved: make room, and go "
                        f"on from the checkpoint before it with: {go_on}"
                    )
                self.say(f"stopped after step {self.step:,} and saved; go on with: {go_on}")
                return False
            self.step += 1
            self.queued.append(queued)
            self.account(but=late)
            if self.step % self.eval_interval == 0 or self.step == config.steps:
                self.account()
                report = self.evaluate()
                found = badness(config.model, report)
                # Of equals the later one. All processes save, or none.
                best, better = self.best, bool(group.first(found <= self.best))
                self.best = min(best, found)
                if group.main:
                    self.log.evaluation(self.step, report, better)
                # latest.pt comes last: a run that is killed before it does all of this again.
                if better and not self.save("best.pt"):
                    self.best = best
                if config.keep:
                    self.keep_last(config.keep)
                saved = self.save(LATEST)
        if not saved:
            raise ValueError(
                f"all {self.step:,} steps are done, but the last ones not saved: make room, and "
                f"repeat them with: {go_on}"
            )
        return True

    def show(self) -> None:
        """After the run: its curves, a few outputs of its best model, how to ask for more."""
        seconds = time.perf_counter() - self.begin
        picture = draw_curves(self.out)
        goal, figure = best_figure(self.config.model, self.best)
        print(f"{clock(seconds)} minutes, best validation {goal} {figure:.4f}")
        if picture:
            print(f"curves: {picture}")
        path = self.out / "best.pt"
        model, tokenizer, _ = sample.load_model(path, self.group.device)
        task, prompts = sample.RESPOND[self.config.model], self.data.prompts
        texts = task.respond(model, tokenizer, prompts, task.Config())
        for prompt, text in zip(prompts, texts, strict=True):
            print(f"{'-' * 80}\n{prompt}{task.between}{text}")
        if task.closing:
            lines = task.closing(model, tokenizer, self.validation, self.out)
            print("-" * 80, *lines, sep="\n")
        flags = task.flags(next(iter(prompts), ""))
        command = self.command("sample.py", "--checkpoint", str(path), *flags)
        print(f"{'-' * 80}\ngo on with: {command}")


def train(config: TrainConfig, sizes: dict, checkpoint: dict | None, group: Processes) -> Run:
    """One run, to its end or its interruption."""
    folder = None
    try:
        if group.main:
            folder = prepare_folder(config)
            config.out = str(folder)
        run = Run(config, sizes, checkpoint, group)
        if checkpoint:
            checkpoint.clear()  # a second copy of weights and optimizer state
        if config.minutes and not config.resume:
            plan.fit_steps(run)
        if group.main:
            run.say(plan.describe(run))
        if run.fit() and group.main:
            run.show()
        return run
    finally:
        if folder and not any(folder.iterdir()):
            folder.rmdir()  # the run could not even start


def train_seeds(config: TrainConfig, sizes: dict, checkpoint: dict | None, group: Processes):
    """--seeds runs that differ in their seed alone, each in its own folder, and their summary."""
    folder, best = config.out or f"out/{config.model}", []
    for seed in range(config.seed, config.seed + config.seeds):
        one = replace(config, seed=seed, seeds=1, out=f"{folder}-seed-{seed}")
        run = train(one, sizes, dict(checkpoint) if checkpoint else None, group)
        if run.step < one.steps:
            return  # interrupted
        goal, figure = best_figure(config.model, run.best)
        best.append(figure)
        del run  # the next one needs its memory
    if group.main:
        each = ", ".join(f"{value:.4f}" for value in best)
        mean, spread = statistics.mean(best), statistics.stdev(best)
        print(f"{len(best)} seeds: best validation {goal} {mean:.4f} ± {spread:.4f} ({each})")


def main(argv: list[str] | None = None) -> None:
    config, sizes, checkpoint = resolve(sys.argv[1:] if argv is None else argv)
    if config.dry_run:
        plan.dry_run(config, sizes)
        return
    group = processes.start(config.device, config.timeout)
    try:
        if config.model in FINETUNED and config.seeds > 1:
            train_seeds(config, sizes, checkpoint, group)
        else:
            train(config, sizes, checkpoint, group)
    except RuntimeError as error:
        if not processes.lost_another(error):
            raise
        raise ValueError(processes.OTHER_ENDED) from error
    finally:
        processes.stop()


if __name__ == "__main__":
    cli.run(main)
