"""Speed compared with the peers that are installed, in one interleaved run.

    python -m lab.bench                    everything, four minutes on two cores
    python -m lab.bench --device cuda      eight minutes on one GPU: larger models, bf16, compiled
    python -m lab.bench --only train       one comparison; --only ? lists them

training.py, sampling.py and tokenizing.py say what is compared, turns.py how. runs.py measures the
costs of long runs, finetuning.py those of fine-tuning, growth.py those of growth. What was tried
and rejected is in docs/speed.md.
"""

import importlib.metadata
import json
import platform
import sys
import time
from pathlib import Path

import torch

from data.lines import new_file
from engine import cli
from engine.processes import pick_device
from lab.sampling import bench_llama, bench_sample, bench_translate
from lab.tokenizing import bench_bpe, bench_corpus, bench_encode
from lab.training import (
    bench_bert,
    bench_ceilings,
    bench_optim,
    bench_recurrent,
    bench_seq2seq,
    bench_train,
)
from lab.turns import BenchConfig

BENCHES = {
    bench.__name__.removeprefix("bench_"): bench
    for bench in (
        *(bench_ceilings, bench_train, bench_sample, bench_llama, bench_bert, bench_seq2seq),
        *(bench_translate, bench_recurrent, bench_optim, bench_bpe, bench_encode, bench_corpus),
    )
}
TOKENIZERS = ("bpe", "encode", "corpus")  # a GPU makes no difference to them


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "tokenizers", "tiktoken", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Measure speed beside the peers that are installed.")
    cli.add_flags(parser, BenchConfig, "benchmark")
    config = BenchConfig(**parser.parse(sys.argv[1:] if argv is None else argv))
    if config.only and config.only not in BENCHES:
        raise ValueError(f"--only {config.only} is not known: choose {', '.join(BENCHES)}")
    if (path := Path(config.out)).parent.is_dir():  # else it is made at the end
        new_file("out", config.out, lambda p: p.read_bytes().startswith(b'{\n "versions": {'))
    device, begin = pick_device(config.device), time.perf_counter()
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = torch.get_num_threads()
    print(*(f"{package} {version}" for package, version in versions().items()), sep=", ")
    print(f"{name}, {threads} threads, fp32 products by {multiplier(device)}")
    keys = [key for key in BENCHES if device.type != "cuda" or key not in TOKENIZERS]
    keys = [config.only] if config.only else keys
    results = [result for key in keys for result in BENCHES[key](config, device)]
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"versions": versions(), "device": name, "threads": threads, "results": results}
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    minutes = (time.perf_counter() - begin) / 60
    print(f"\n{minutes:.1f} minutes; the same as JSON: {path}")


def multiplier(device: torch.device) -> str:
    """The library that multiplies matrices in fp32, after `cpu.py` has chosen one."""
    if device.type != "cpu":
        return "its own library"
    return "oneDNN" if torch.get_float32_matmul_precision() == "medium" else "MKL or BLAS"


if __name__ == "__main__":
    cli.run(main)
