"""Tokenizers beside Hugging Face's and OpenAI's, both in Rust: three comparisons of lab/bench.py.

The text is Python source that every machine has: the standard library with its tests, then the
installed packages, no file twice. If that is not enough, the rest is generated from its lines.

The memory measured is that of a fresh process and its workers together, where each page is divided
by the number of processes that share it (PSS). It is read 20 times a second, on Linux only.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bpe import Tokenizer
from data.download import GPT2_MERGES, GPT2_VOCABULARY, SHAKESPEARE, fetch
from data.gpt2_files import read_gpt2_files
from data.text import Corpus, Part, open_corpus
from data.tokens import tokenize
from engine import splitting
from engine.hub.peers import peer
from lab.turns import print_table, take_turns

ROOT = Path(__file__).resolve().parents[1]

if TYPE_CHECKING:
    from lab.turns import BenchConfig

LARGE = 100_000_000  # bytes
VOCABULARY = 32768
KEPT_LINES = 100_000  # to generate text from; if all were kept, training would seem to need them


# ---- text ----------------------------------------------------------------------------------------


def source_files() -> Iterator[tuple[str, str]]:
    """("standard library" or "packages", text) of each distinct file, always in the same order on
    the same machine. Files that are empty, not UTF-8 or not text are left out."""
    paths = sysconfig.get_paths()
    library, installed = Path(paths["stdlib"]), {Path(paths[k]) for k in ("purelib", "platlib")}
    inside = {"site-packages", "dist-packages"}
    found = sorted(library.rglob("*.py"))
    found = [path for path in found if not inside & {*path.relative_to(library).parts}]
    kinds = [("standard library", path) for path in found]
    for folder in sorted(installed):
        kinds += [("packages", path) for path in sorted(folder.rglob("*.py"))]
    seen: set[bytes] = set()
    for kind, path in kinds:
        data = path.read_bytes()
        digest = hashlib.sha256(data).digest()
        if data and digest not in seen and b"\0" not in data:
            seen.add(digest)
            try:
                yield kind, data.decode("utf-8")
            except UnicodeDecodeError:
                continue


def plenty(size: int, found: Iterator[tuple[str, str]] | None = None) -> Iterator[tuple[str, str]]:
    """Like source_files(), until `size` bytes are reached. The rest is "generated": documents of
    200 lines drawn from the lines before, the same each time. Raises ValueError if there is no
    source at all."""
    lines, total = [], 0
    for kind, text in source_files() if found is None else found:
        yield kind, text
        if len(lines) < KEPT_LINES:
            lines += text.splitlines(keepends=True)
        total += len(text.encode("utf-8"))
        if total >= size:
            return
    if not lines:
        raise ValueError("there is no Python source here to make text from: install one package")
    rng = random.Random(0)
    while total < size:
        text = "".join(rng.choices(lines, k=200))
        yield "generated", text
        total += len(text.encode("utf-8"))


def shares(size: int) -> str:
    """How many MB of plenty(size) are of which kind."""
    bytes_of: dict[str, int] = {}
    for kind, text in plenty(size):
        bytes_of[kind] = bytes_of.get(kind, 0) + len(text.encode("utf-8"))
    return ", ".join([f"{n / 1e6:.0f} MB {kind}" for kind, n in bytes_of.items()])


# ---- training ------------------------------------------------------------------------------------


def train_ours(texts: Iterator[str], vocab_size: int) -> None:
    Tokenizer.train(texts, vocab_size)


def train_theirs(texts: Iterator[str], vocab_size: int) -> None:
    import tokenizers

    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainer)


TRAINERS = {"ours (Python)": train_ours, "tokenizers (Rust)": train_theirs}


def contestants() -> list[str]:
    return list(TRAINERS) if peer("tokenizers") else list(TRAINERS)[:1]


def bench_bpe(config: BenchConfig, device: torch.device) -> list[dict]:
    results = []
    library = [text for text, _ in open_corpus("stdlib", Path(config.cache_dir)).pieces("train")]
    works = [("Python source", library, VOCABULARY)]
    try:
        path = fetch(SHAKESPEARE, Path(config.cache_dir))
        works.insert(0, ("Shakespeare", [path.read_text(encoding="utf-8")], 1024))
    except ValueError as error:
        print(f"(no Shakespeare: {error})")
    for name, texts, vocab_size in works:
        megabytes = sum(len(t.encode("utf-8")) for t in texts) / 1e6
        runs = {
            who: lambda who=who, texts=texts, size=vocab_size: TRAINERS[who](iter(texts), size)
            for who in contestants()
        }
        times = take_turns(runs, min(config.repeats, 5), device)
        title = f"BPE training, {megabytes:.1f} MB of {name} to {vocab_size:,} tokens"
        results.append(print_table(title, times, megabytes, "MB"))
    if config.only and Path("/proc/self/smaps_rollup").exists():  # half a minute
        results.append(bench_memory(LARGE))
    return results


def bench_memory(size: int) -> dict:
    """The memory of training on much text, each contestant once, in a process of its own."""
    title = f"BPE training, {shares(size)}, to {VOCABULARY:,} tokens, in a fresh process"
    print(f"\n{title}")
    figures = {}
    for who in contestants():
        seconds, memory = run_measured([sys.executable, "-m", "lab.tokenizing", who, str(size)])
        figures[who] = {"seconds": seconds, "megabytes": memory / 1e6}
        print(f"  {who:<28}{seconds:>9.1f} s{memory / 1e6:>9.0f} MB at most")
    return {"title": title, "unit": "MB of memory", "contestants": figures}


def run_measured(command: list[str]) -> tuple[float, int]:
    """(seconds, peak memory in bytes) of a command and all processes that it starts. Raises
    ValueError if it fails."""
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(command, cwd=ROOT) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(memory_of, family(process.pid))))
            time.sleep(0.05)
    if process.returncode:
        raise ValueError(f"{' '.join(command)} ended with {process.returncode}: see above")
    return time.perf_counter() - start, peak


def family(process: int) -> list[int]:
    """The numbers of a process, its children, their children, …"""
    found = [process]
    for parent in found:
        for thread in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, thread.read_text(encoding="ascii").split())
            except OSError:  # it has just ended
                continue
    return found


def memory_of(process: int) -> int:
    """The PSS of a process in bytes; 0 if it has ended."""
    try:
        rows = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(int(row.split()[1]) * 1024 for row in rows if row.startswith("Pss:"))


# ---- encoding ------------------------------------------------------------------------------------


def bench_encode(config: BenchConfig, device: torch.device) -> list[dict]:
    """Encoding on one core."""
    import tiktoken

    texts = [text for text, _ in open_corpus("stdlib", Path(config.cache_dir)).pieces("train")]
    text = "".join(texts)[:4_000_000]
    ours = Tokenizer.train(texts, VOCABULARY)
    runs = {
        "ours, Python": lambda: ours.encode_python(text),
        "ours, tiktoken's core": lambda: ours.encode(text),
    }
    try:
        cache = Path(config.cache_dir)
        gpt2 = read_gpt2_files(fetch(GPT2_MERGES, cache), fetch(GPT2_VOCABULARY, cache))
    except ValueError as error:
        print(f"(no GPT-2 vocabulary to compare with: {error})")
    else:
        theirs = tiktoken.Encoding(
            "gpt2",
            pat_str=gpt2.pattern,
            mergeable_ranks=gpt2.ranks,
            special_tokens=gpt2.special_tokens,
        )
        runs["tiktoken, gpt2"] = lambda: theirs.encode_ordinary(text)
    times = take_turns(runs, config.repeats, device)
    return [print_table("encoding Python source", times, len(text.encode("utf-8")) / 1e6, "MB")]


def bench_corpus(config: BenchConfig, device: torch.device) -> list[dict]:
    """Tokenizing a corpus on all cores: ours from files to a token file, tiktoken's batches from
    texts in memory to lists, with as many threads. Once with large files, once with a .jsonl of
    short documents."""
    size = LARGE if config.only else LARGE // 5
    large = [text for _, text in plenty(size)]
    tenth = [text for _, text in plenty(size // 10)]
    short = [text[i : i + 200] for text in tenth for i in range(0, len(text), 200)]
    tokenizer = Tokenizer.train(tenth, VOCABULARY)
    theirs, threads, results = tokenizer.to_tiktoken(), os.cpu_count() or 1, []
    for name, texts in ((f"files ({shares(size)})", large), ("lines of 200 characters", short)):
        with tempfile.TemporaryDirectory() as folder:
            corpus = written_corpus(Path(folder), texts, texts is short)

            def ours(corpus=corpus, folder=folder):
                for old in Path(folder).glob("*.tokens"):
                    old.unlink()
                tokenize(corpus, "train", tokenizer, Path(folder))

            def batches(texts=texts):
                theirs.encode_ordinary_batch(texts, num_threads=threads)

            runs = {"ours, files to token file": ours, "tiktoken, batch in memory": batches}
            times = take_turns(runs, min(config.repeats, 5), device)
        megabytes = sum(len(text.encode("utf-8")) for text in texts) / 1e6
        title = f"tokenizing {megabytes:.0f} MB on {threads} cores, {len(texts):,} {name}"
        results.append(print_table(title, times, megabytes, "MB"))
    return results


def written_corpus(folder: Path, texts: list[str], in_lines: bool) -> Corpus:
    """A corpus of the texts, all for training: each in a file, or each in a line of one .jsonl."""
    if in_lines:
        parts = [Part(folder / "texts.jsonl")]
        rows = "".join([json.dumps({"text": text}) + "\n" for text in texts])
        parts[0].path.write_text(rows, encoding="utf-8")
    else:
        parts = [Part(folder / f"{i:07}.txt") for i in range(len(texts))]
        for part, text in zip(parts, texts, strict=True):
            part.path.write_bytes(text.encode("utf-8"))
    return Corpus("bench", "00" * 32, "", parts, [])


if __name__ == "__main__":  # as bench_memory() calls it
    splitting.use_in_bpe()
    TRAINERS[sys.argv[1]]((text for _, text in plenty(int(sys.argv[2]))), VOCABULARY)
