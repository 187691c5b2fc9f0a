"""What a run records and shows: log.jsonl, curves.png, and a progress bar or plain lines."""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from data.download import replacing


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class RunLog:
    """log.jsonl: one JSON object a line, {"step", "split", …}. A resumed run first drops the lines
    of steps after its checkpoint, so no step is missing and none is there twice.

    A terminal shows a progress bar; anything else, such as a log file, gets plain lines.
    """

    def __init__(self, folder: Path, first_step: int, last_step: int, tokens_per_step: int):
        self.last_step, self.tokens_per_step = last_step, tokens_per_step
        path = folder / "log.jsonl"
        kept = [r for r in read_log(path) if r["step"] <= first_step] if first_step else []
        with replacing(path) as file:  # a crash in between loses no line
            file.writelines(json.dumps(record).encode() + b"\n" for record in kept)
        self.file, self.waiting, self.full = path.open("ab", buffering=0), b"", False
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=last_step, initial=first_step, unit="step", dynamic_ncols=True)
        self.smooth_loss, self.step_seconds = math.nan, None
        self.last_time, self.last_line = time.perf_counter(), 0.0

    def train(self, record: dict, *, write: bool) -> None:
        """To be called after every step; `write` says whether its record goes into the file."""
        now = time.perf_counter()
        seconds, self.last_time = now - self.last_time, now
        self.step_seconds = mix(self.step_seconds, seconds)
        if math.isfinite(record["loss"]):  # a skipped step must not spoil all later numbers
            self.smooth_loss = mix(self.smooth_loss, record["loss"])
        rate = self.tokens_per_step / self.step_seconds
        if write:
            record = {**record, "tokens_per_s": round(self.tokens_per_step / seconds)}
            self.write(record)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {self.smooth_loss:.3f}, {rate:,.0f} tokens/s", False)
            self.bar.update()
        elif now - self.last_line > 5 or record["step"] == self.last_step:
            self.last_line = now
            left = clock((self.last_step - record["step"]) * self.step_seconds)
            self.say(
                f"step {record['step']:,}/{self.last_step:,}  loss {self.smooth_loss:.3f}  "
                f"lr {record['lr']:.2e}  {rate:,.0f} tokens/s  {left} left"
            )

    def evaluation(self, step: int, report: dict[str, float], best: bool) -> None:
        self.write({"step": step, "split": "validation", **report})
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in report.items())
        self.say(
            f"step {step:,}/{self.last_step:,}  validation  {numbers}{'  (best)' if best else ''}"
        )
        self.last_time = time.perf_counter()  # an evaluation is not part of the next step's time

    def write(self, record: dict) -> None:
        """Appends a record. JSON has no NaN and no infinity: they become null. What does not fit on
        a full disk is kept, and written when there is space."""
        plain = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        self.waiting += json.dumps(plain).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
            self.full = False
        except OSError as error:
            if not self.full:
                self.say(f"log.jsonl cannot be written ({error.strerror}): it waits for room")
            self.full = True

    def sync(self) -> None:
        """Flushes the file to the disk, because a checkpoint must not be newer than its log."""
        self.flush()
        with contextlib.suppress(OSError):
            os.fsync(self.file.fileno())

    def say(self, line: str) -> None:
        if self.bar is None:
            print(line, flush=True)
        else:
            self.bar.write(line)

    def close(self) -> None:
        self.flush()
        self.file.close()
        if self.bar is not None:
            self.bar.close()


def mix(old: float | None, new: float, share: float = 0.1) -> float:
    return new if old is None or math.isnan(old) else old + share * (new - old)


def read_log(path: Path) -> list[dict]:
    """The records of log.jsonl. A last line that a crash cut in half is skipped."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


def draw_curves(folder: Path) -> Path | None:
    """Draws curves.png from log.jsonl: the losses, the learning rate, the gradient's norm. Returns
    its path, or None if matplotlib or the records are missing: a run must not fail for a picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("curves.png is not drawn: pip install matplotlib")
        return None
    records = read_log(folder / "log.jsonl")
    train = [r for r in records if r["split"] == "train" and None not in r.values()]
    validation = [r for r in records if r["split"] == "validation"]
    if not train:
        return None
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    steps = [r["step"] for r in train]
    top.plot(steps, [r["loss"] for r in train], lw=0.8, label="training")
    if validation:
        at = [r["step"] for r in validation]
        top.plot(at, [r["loss"] for r in validation], "o-", label="validation")
    top.set_ylabel("loss (nats per target)")
    top.legend()
    rate.plot(steps, [r["lr"] for r in train])
    rate.set_ylabel("learning rate")
    norm.plot(steps, [r["grad_norm"] for r in train], lw=0.8)
    norm.set_ylabel("gradient norm")
    norm.set_xlabel("step")
    figure.savefig(folder / "curves.png", dpi=120)
    return folder / "curves.png"
