"""Everything that only a GPU can show, in one command of at most eight minutes.

    bash lab/gpu.sh                            all parts
    bash lab/gpu.sh --rehearse                 the same at toy size on a CPU, so that no typing
                                               error wastes a card: CI does it
    bash lab/gpu.sh --only tests,train         some of them
    bash lab/gpu.sh --fill out/gpu/gpu.json    writes what was measured into docs/gpu.md

Each part is a few commands of the project, in processes of their own that are stopped when the
part's time is over, so that none takes the others with it. Parts that prove something run together,
and may disturb each other; those that measure run alone. What the commands say is in gpu.log, what
was found in gpu.json, both written as it comes: a machine that is taken away leaves what it has
told. docs/gpu.md has the figures.
"""

import contextlib
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch

from engine import cli
from engine.logs import read_log
from engine.memory import plan_memory
from engine.plan import least_seconds
from engine.processes import precision
from lab.bench import BENCHES, TOKENIZERS, versions
from model import GPT, GPTConfig
from tasks.flags import TrainConfig, check, ranged

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gpu.md"


@dataclass
class GPUConfig:
    rehearse: bool = False  # toy sizes on a CPU
    only: str = ""  # names of parts, with commas between; a wrong name lists them; empty: all
    # a folder with shakespeare.txt and multi30k/; empty: Python's own source, and generated dates
    data: str = ""
    minutes: float = ranged(8.0, 0.1)  # the time for all parts; what does not fit is left out
    # the folder of gpu.log, gpu.json and the runs; empty: out/gpu or out/gpu-rehearsal, numbered
    out: str = ""
    fill: str = ""  # a gpu.json whose figures go into docs/gpu.md, instead of measuring

    def __post_init__(self):
        check(self)
        for path in filter(None, (self.data, self.fill)):
            if not Path(path).exists():
                raise ValueError(f"{path} does not exist: give what is there, or leave it out")


@dataclass
class Part:
    """commands: arguments of Python. read(folder, what the commands said) -> rows of the table,
    each {"what", "measured", "bound", "beside"}."""

    name: str
    seconds: int
    commands: list[list[str]]
    read: Callable[[Path, str], list[dict]]
    alone: bool = True


def row(what: str, measured: str, bound: str = "", beside: str = "") -> dict[str, str]:
    return {"what": what, "measured": measured, "bound": bound, "beside": beside}


# ---- the parts -----------------------------------------------------------------------------------

# GPT-2's sizes and batch on Python's own source, with a vocabulary of GPT-2's size learnt from it.
GPT2 = ["--preset=gpt2", "--tokenizer=", "--data=stdlib", "--batch_size=64", "--eval_tokens=65536"]
GPT2 += ["--log_interval=1", "--warmup=5"]
SMALLER = [*GPT2, "--n_layer=4", "--tokens_per_step=65536", "--steps=12"]
TOY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--vocab_size=320"]
TOY += ["--batch_size=4", "--tokens_per_step=128", "--steps=6", "--log_interval=1", "--device=cpu"]


def write_toys(folder: Path) -> None:
    """The text and the pairs that toys learn from."""
    times = (f"{n} times {m} is {n * m}.\n" for n in range(60) for m in range(20))
    plus = (f"{n} plus {m}\t{n + m}\n" for n in range(40) for m in range(20))
    for name, lines in (("toy.txt", times), ("toy.tsv", plus)):
        (folder / name).write_text("".join(lines), encoding="utf-8")


def parts_of(config: GPUConfig, folder: Path) -> list[Part]:
    """All parts, in the order in which they tell most."""
    toy, text, pairs = config.rehearse, "stdlib", "dates"
    if toy:
        text, pairs = str(folder / "toy.txt"), str(folder / "toy.tsv")
    elif config.data:
        data = Path(config.data).absolute()
        text, pairs = str(data / "shakespeare.txt"), str(data / "multi30k")
    small = [*TOY, f"--data={text}"]

    def train(name: str, full: list[str], *more: str, tiny: list[str] = small) -> list[str]:
        return ["train.py", f"--out={folder / name}", *(tiny if toy else full), *more]

    def sample(name: str, *flags: str) -> list[str]:
        return ["sample.py", f"--checkpoint={folder / name / 'best.pt'}", *flags]

    def bench(name: str) -> list[str]:
        size = ["--small", "--repeats=2"] if toy else ["--device=cuda"]
        return ["-m", "lab.bench", f"--only={name}", f"--out={folder / name}.json", *size]

    spread = ["-n12", "--dist=worksteal"] if importlib.util.find_spec("xdist") and not toy else []
    one = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    first, loop = ["--steps=200", "--eval_interval=100"], [*GPT2, "--steps=24"]
    recipe = ["--preset=shakespeare-10min", f"--data={text}", "--minutes=0.7"]
    translate = ["--preset=multi30k-gpu", f"--data={pairs}", "--minutes=1"]
    tiny_pairs = [*TOY, "--model=seq2seq", f"--data={pairs}"]
    return [
        Part(
            "tests",
            180,
            [["-m", "pytest", "-m", "gpu", "-v", "-rfs", "--tb=short", *spread]],
            read_tests,
            alone=False,
        ),
        Part(
            "first",
            180,
            [train("first", first, "--compile"), sample("first", "--prompt=def ")],
            read_run("first", "the first run, its first 200 steps"),
            alone=False,
        ),
        Part(
            "shard",
            180,
            [
                train("plain", SMALLER, "--no-compile"),
                one + train("divided", SMALLER, "--shard=model", "--compile"),
                one + train("owned", SMALLER, "--shard=optimizer", "--no-compile"),
            ],
            read_shard,
            alone=False,
        ),
        Part(
            "loop",
            110,
            [
                train("loop", loop, "--compile", "--stop_after=3"),
                ["train.py", f"--out={folder / 'loop'}", "--resume"],
            ],
            read_loop,
        ),
        *(Part(n, 100, [bench(n)], read_bench(n)) for n in BENCHES if n not in TOKENIZERS),
        Part(
            "shakespeare",
            80,
            [train("shakespeare", recipe)],
            read_run("shakespeare", f"shakespeare-10min for 42 seconds, {Path(text).name}"),
        ),
        Part(
            "pairs",
            120,
            [train("pairs", translate, tiny=tiny_pairs), sample("pairs", f"--eval={pairs}")],
            read_run("pairs", f"multi30k-gpu for a minute, {Path(pairs).name}"),
        ),
    ]


# ---- what the parts have found -------------------------------------------------------------------


def read_tests(folder: Path, said: str) -> list[dict]:
    counts = re.findall(r"(\d+ (?:passed|failed|skipped|errors?))", said.splitlines()[-1])
    return [row("python -m pytest -m gpu", ", ".join(counts))]


def read_bench(name: str) -> Callable[[Path, str], list[dict]]:
    """The tables of lab/bench.py: what is ours, beside the fastest of the others."""

    def read(folder: Path, said: str) -> list[dict]:
        results = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["results"]
        return [row_of(result) for result in results]

    return read


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def row_of(result: dict) -> dict[str, str]:
    """Measured is what the project does by itself; beside it, other ways and the fastest peer."""
    found = result["contestants"]
    (_, first), *rest = found.items()
    peers = [(n, f) for n, f in rest if not n.startswith(("ours", "the bare"))]
    said = [f"{n} {number(f['rate'])}" for n, f in rest if n.startswith("ours")]
    if peers:
        name, other = max(peers, key=lambda peer: peer[1]["rate"])
        said.insert(0, f"{first['rate'] / other['rate']:.2f} x {name} ({number(other['rate'])})")
    known = ("seconds", "middle_half", "rate", "ratio")
    bound = "".join(f"{share:.1%} {name}" for name, share in first.items() if name not in known)
    measured = f"{number(first['rate'])} {result['unit']}/s"
    return row(result["title"], measured, bound, "; ".join(said))


def rates(records: list[dict]) -> float:
    """The median of tokens per second, without the first steps, in which much is made ready."""
    found = [r["tokens_per_s"] for r in records if r["split"] == "train"]
    return statistics.median(found[2:] or found)


def read_run(name: str, what: str) -> Callable[[Path, str], list[dict]]:
    """A run of train.py: its speed, its last validation, and what sample.py --eval says of it."""

    def read(folder: Path, said: str) -> list[dict]:
        records = read_log(folder / name / "log.jsonl")
        last = [r for r in records if r["split"] == "validation"][-1]
        figures = [f"{k} {v:.4f}" for k, v in last.items() if isinstance(v, float)]
        scores = dict(re.findall(r"^(exact match|BLEU|chrF2) ([\d.]+%?)", said, re.M))
        figures += [f"{name} {score}" for name, score in scores.items()]
        measured = f"{last['step']:,} steps, {rates(records):,.0f} tokens/s"
        return [row(what, measured, beside="; ".join(figures))]

    return read


def read_shard(folder: Path, said: str) -> list[dict]:
    """How far the losses of divided runs are from those of a plain one."""
    rows = []
    plain = [r["loss"] for r in read_log(folder / "plain" / "log.jsonl")]
    for name, flags in (("divided", "--shard model, compiled"), ("owned", "--shard optimizer")):
        losses = [r["loss"] for r in read_log(folder / name / "log.jsonl")]
        apart = max(abs(a - b) for a, b in zip(plain, losses, strict=True))
        rows.append(row(f"{flags}, one rank", f"losses differ by {apart:.1e} at most"))
    return rows


def read_loop(folder: Path, said: str) -> list[dict]:
    """train.py itself, interrupted and resumed: its speed, and its memory beside the plan's."""
    records = read_log(folder / "loop" / "log.jsonl")
    trained = json.loads((folder / "loop" / "config.json").read_text(encoding="utf-8"))
    sizes = {k: v for k, v in trained.items() if k in GPTConfig.__dataclass_fields__}
    config = TrainConfig(**{k: v for k, v in trained.items() if k not in sizes})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    planned = plan_memory(config, sizes, device.type, precision(config.dtype, device)).total / 1e9
    with torch.device("meta"):
        flops = GPT(GPTConfig(**sizes)).flops_per_token()
    share = least_seconds(flops * rates(records), device)
    steps = [r["step"] for r in records if r["split"] == "train"]
    done = "each step once" if steps == list(range(1, len(steps) + 1)) else f"steps {steps}"
    used = max((r.get("peak_gb", 0) for r in records), default=0)
    return [
        row(
            f"train.py, GPT {sizes['n_layer']} layers, T {sizes['block_size']}, with a stop",
            f"{rates(records):,.0f} tokens/s",
            f"{share:.1%} MFU" if share else "",
            f"{done}; {used:.1f} GB at its peak, planned {planned:.1f} GB",
        )
    ]


# ---- running them --------------------------------------------------------------------------------


# Processes that share a machine: each would start a compiler for every core.
SHARED = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}


def kill_all(leader: int) -> None:
    """Kills a process and all that it has started, and that these have started: torchrun's workers
    and pytest's are in groups and sessions of their own (Linux; elsewhere the process alone)."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
    found = [leader]
    for pid in found:  # which grows
        found += [child for child, parent in parents.items() if parent == pid]
    for pid in found:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


class Session:
    """The parts under way, and what they have told so far."""

    def __init__(self, folder: Path, minutes: float, rehearsal: bool = False):
        self.folder, self.end = folder, time.monotonic() + 60 * minutes
        self.found: dict[str, dict] = {}
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        self.record = {"rehearsal": rehearsal, "card": name, "date": time.strftime("%Y-%m-%d")}
        self.record["versions"] = versions()

    def run(self, parts: list[Part]) -> None:
        """Runs the parts at the same time; each as long as it may."""
        begin, together = time.monotonic(), len(parts) > 1
        waiting = [(part, self.commands_of(part, begin, together)) for part in parts]
        try:
            while waiting:
                for part, steps in list(waiting):
                    if next(steps, "done"):
                        waiting.remove((part, steps))
                time.sleep(0.05)
        finally:
            for _, steps in waiting:
                steps.close()

    def commands_of(self, part: Part, begin: float, together: bool) -> Iterator[None]:
        """Yields while a command of the part runs; then notes what was found."""
        limit = min(begin + part.seconds, self.end) - begin
        log, status = self.folder / f"{part.name}.log", "ran"
        with log.open("w", encoding="utf-8") as file:
            for command in part.commands if limit > 5 else ():
                file.write(f"$ python {' '.join(command)}\n")
                file.flush()
                process = subprocess.Popen(
                    [sys.executable, *command],
                    cwd=ROOT,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"} | (SHARED if together else {}),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                try:
                    while process.poll() is None and time.monotonic() - begin < limit:
                        yield
                    if process.poll() is None:
                        status = f"stopped after {limit:.0f} s"
                    elif process.returncode:
                        status = f"failed with status {process.returncode}: {' '.join(command)}"
                finally:  # its time is over, or that of the whole script
                    if process.poll() is None:
                        kill_all(process.pid)
                        process.wait()
                if status != "ran":
                    break
            else:
                status = status if limit > 5 else "no time was left"
        said = log.read_text(encoding="utf-8", errors="replace")
        self.note(part, status, said, time.monotonic() - begin)

    def note(self, part: Part, status: str, said: str, seconds: float) -> None:
        try:
            rows = part.read(self.folder, said)
        except (OSError, ValueError, LookupError, TypeError) as error:  # it has not come so far
            rows, reason = [], f"{type(error).__name__}: {error}"
            status += f"; nothing to read ({reason})" if status == "ran" else ""
        self.found[part.name] = {"status": status, "seconds": round(seconds, 1), "rows": rows}
        with (self.folder / "gpu.log").open("a", encoding="utf-8") as file:
            file.write(f"{'=' * 100}\n{part.name}: {status}, {seconds:.0f} s\n{said}\n")
        found = json.dumps({**self.record, "parts": self.found}, indent=1)
        (self.folder / "gpu.json").write_text(found, encoding="utf-8")
        print(f"{part.name}: {status}, {seconds:.0f} s", flush=True)
        for each in rows:
            print("   ", "  |  ".join(value for value in each.values() if value), flush=True)


# ---- the page ------------------------------------------------------------------------------------


def fill(found: dict, page: str) -> str:
    """The page with the figures of a gpu.json in its first table: a row that begins with the same
    words gets the new ones, others are added at its end."""
    lines = page.splitlines()
    for each in (row for part in found["parts"].values() for row in part["rows"]):
        cells = [*each.values(), f"{found['card']}, torch {found['versions']['torch']}"]
        new = f"| {' | '.join([*cells, found['date']])} |"
        begin = next(i for i, line in enumerate(lines) if line.startswith("|"))
        end = lines.index("", begin)
        old = [i for i in range(begin, end) if lines[i].startswith(f"| {each['what']} |")][:1]
        at = old[0] if old else end
        lines[at : at + len(old)] = [new]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Run everything that only a GPU can show.")
    cli.add_flags(parser, GPUConfig, "gpu")
    config = GPUConfig(**parser.parse(sys.argv[1:] if argv is None else argv))
    if config.fill:
        try:
            found = json.loads(Path(config.fill).read_text(encoding="utf-8"))
            rehearsal, page = found["rehearsal"], fill(found, PAGE.read_text(encoding="utf-8"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{config.fill} is no gpu.json that this script wrote") from None
        if rehearsal:
            raise ValueError(f"{config.fill} is of a rehearsal: the page has figures of a card")
        PAGE.write_text(page, encoding="utf-8")
        return
    if not config.rehearse and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here: add --rehearse for toy sizes on a CPU")
    name = "out/gpu-rehearsal" if config.rehearse else "out/gpu"
    numbered = (Path(name + f"-{n}" * (n > 1)) for n in count(1))
    folder = Path(config.out) if config.out else next(p for p in numbered if not p.exists())
    folder = folder.absolute()
    patience = 4 if config.rehearse else 1  # a CPU compiles slowly
    parts = [replace(part, seconds=patience * part.seconds) for part in parts_of(config, folder)]
    names = [part.name for part in parts]
    if unknown := [name for name in config.only.split(",") if name and name not in names]:
        raise ValueError(f"--only {unknown[0]} is not known: choose from {', '.join(names)}")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and nothing is written over: choose --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose --out") from None
    if config.rehearse:
        write_toys(folder)
    chosen = [part for part in parts if part.name in (config.only or ",".join(names)).split(",")]
    session = Session(folder, patience * config.minutes, config.rehearse)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and what is under way ends, too
    session.run([part for part in chosen if not part.alone])
    for part in (part for part in chosen if part.alone):
        session.run([part])
    failed = {n: f["status"] for n, f in session.found.items() if f["status"] != "ran"}
    for name, status in failed.items():
        print(f"{name} is not whole: {status}")
    left_out = [name for name in names if name not in session.found]
    print(f"left out: {', '.join(left_out) or 'nothing'}; all of it: {folder / 'gpu.log'}")
    if config.rehearse:
        print("a rehearsal on a CPU: what needs a card (the gpu tests, graphs, NCCL) has not run")
    if failed:
        raise ValueError(f"{len(failed)} of {len(chosen)} parts are not whole: see above")


if __name__ == "__main__":
    cli.run(main)
