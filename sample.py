"""From a checkpoint and a prompt to printed words.

    python sample.py --prompt "def "              the newest checkpoint below out/
    python sample.py --checkpoint out/gpt/best.pt --prompt "A" --prompt "Once upon" --num_samples 2

Told in small steps: tokens -> logits -> distribution -> token (`decoding.py`), tokens -> text
(`TextStream`). What is said here of GPT's continuations, `translate.py` says of translations,
`fill.py` of masked words and embeddings.
"""

import codecs
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

import decoding
import fill
import predict
import translate
from bpe import Tokenizer
from data import completions
from data.completions import split_space
from data.text import NAMES, open_corpus, whole
from data.tokens import END_OF_TEXT, tokenize
from data.windows import Windows
from decoding import choose, distribution, generate
from engine import checkpoint as checkpoints
from engine import cli
from engine.cpu import lay_out_for_decoding
from engine.evaluation import print_scores
from engine.processes import pick_device, precision
from fill import FillConfig
from predict import AskConfig, PredictConfig, SimilarConfig
from translate import TranslateConfig


@dataclass
class SampleConfig:
    checkpoint: str = ""  # the file to load; empty: the newest below out/
    prompt: list[str] = field(default_factory=list)  # text to continue; may be repeated
    max_new_tokens: int = 200  # tokens to write at most
    temperature: float = 0.8  # 0 takes the likeliest token, below 1 is safer, above 1 is wilder
    top_k: int = 0  # keep only the k likeliest tokens; 0: all
    top_p: float = 0.95  # keep the fewest tokens that have this probability together; 1: all
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest; 0: none
    stop: list[str] = field(default_factory=list)  # end before this text; may be repeated
    num_samples: int = 1  # continuations of each prompt
    eval: str = ""  # score instead: stdlib, shakespeare, or a path; of complete: a file as --data
    cache_dir: str = "data/cache"  # where --eval keeps downloads and token files
    batch_size: int = 8  # windows of that text at a time
    seed: int = 1337  # equal seeds give equal samples
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # of the weights: bf16, fp32, or auto, which is bf16 on GPUs that have it

    def __post_init__(self):
        limits = {
            "max_new_tokens": (1, 1_000_000),
            "temperature": (0, None),
            "top_k": (0, None),
            "top_p": (0, 1),
            "min_p": (0, 1),
            "num_samples": (1, 10_000),
            "batch_size": (1, 2**20),
        }
        cli.check_ranges(self, limits)


# ---- tokens -> text ------------------------------------------------------------------------------


class TextStream:
    """Turns a row's tokens into text that can be shown at once.

    Half a character stays back until its other bytes arrive, and so does what may turn out to be
    the beginning of a stop string. `done` is set by a stop string or by <|endoftext|>.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str]):
        self.tokenizer, self.stop = tokenizer, [s for s in stop if s]
        self.end = tokenizer.special_tokens.get(END_OF_TEXT)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.held, self.done = "", "", False

    def feed(self, token: int) -> str:
        if self.done:
            return ""
        if token == self.end:
            return self.finish()
        return self.release(self.decoder.decode(self.tokenizer.decode_bytes([token])))

    def release(self, new: str, last: bool = False) -> str:
        self.held += new
        found = [at for at in (self.held.find(s) for s in self.stop) if at >= 0]
        keep = 0
        if found:
            self.held, self.done = self.held[: min(found)], True
        elif not last:
            ends = (k for s in self.stop for k in range(1, len(s)) if self.held.endswith(s[:k]))
            keep = max(ends, default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.text += shown
        return shown

    def finish(self) -> str:
        """What was still held back, when no more tokens come."""
        shown = "" if self.done else self.release(self.decoder.decode(b"", final=True), last=True)
        self.done = True
        return shown


# ---- GPT: continue a text ------------------------------------------------------------------------


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> tuple[list[int], bytes]:
    """(tokens, bytes that the first new token must begin with).

    An empty prompt is the beginning of a document. A space at the end of the prompt is taken off
    and asked of the first new token instead: in training a space belongs to the word behind it, so
    after a lone one the model would expect anything but a word.
    """
    for name in re.findall(r"<\|[^|<>\s]+\|>", prompt):
        if name not in tokenizer.special_tokens:
            known = ", ".join(tokenizer.special_tokens) or "none"
            raise ValueError(f"the prompt's {name} is no special token here: known are {known}")
    prompt, space = split_space(prompt)
    return tokenizer.encode(prompt or END_OF_TEXT, allowed_special="all"), space.encode()


class Pick:
    """What `generate` asks for tokens: one random stream for each row.

    Row r is sample r % num_samples of its prompt, and its stream depends on that number and the
    seed alone: a prompt gets the same samples in any batch. Ids beyond the tokenizer's vocabulary
    (the model's may be padded) cannot be chosen.
    """

    def __init__(self, tokenizer: Tokenizer, config: SampleConfig, leads: list[bytes]):
        self.tokenizer, self.config, self.leads = tokenizer, config, list(leads)
        seeds = (config.seed + r % config.num_samples for r in range(len(leads)))
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor, writing: list[int]) -> Tensor:
        logits = self.follow_leads(logits.cpu(), writing)
        u = torch.zeros(len(logits), dtype=torch.double)
        for row in writing:
            u[row] = self.draw(row)
        return self.choose(logits, u)

    def choose(self, logits: Tensor, u: Tensor) -> Tensor:
        """(B, V) logits, a uniform number for each row -> (B,) tokens, on the same device."""
        c, logits = self.config, logits[:, : self.tokenizer.vocab_size]
        if c.temperature == 0:
            return logits.argmax(-1)
        return choose(distribution(logits.float(), c.temperature, c.top_k, c.top_p, c.min_p), u)

    def draw(self, row: int, count: int = 1) -> Tensor:
        """(count,): the next uniform numbers of the row's stream."""
        return torch.rand(count, generator=self.streams[row], dtype=torch.double)

    def follow_leads(self, logits: Tensor, writing: list[int]) -> Tensor:
        """(B, V) logits, in which a row that still waits for a token that begins as its lead says
        has nothing else to choose from."""
        for row in writing:
            if lead := self.leads[row]:
                fits = [i for token, i in self.tokenizer.ranks.items() if token.startswith(lead)]
                allowed = torch.zeros_like(logits[row], dtype=torch.bool)
                allowed[fits] = True
                logits[row] = logits[row].masked_fill(~allowed, -torch.inf)
                self.leads[row] = b""
        return logits


def complete(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: list[str],
    config: SampleConfig,
    show: Callable[[int, str], None] = lambda row, text: None,
    encode: Callable[[Tokenizer, str], tuple[list[int], bytes]] = encode_prompt,
) -> list[str]:
    """num_samples continuations of each prompt, in order; show(row, text) as they are written.
    `encode` is how the model was taught to read a prompt."""
    encoded = [encode(tokenizer, p) for p in prompts for _ in range(config.num_samples)]
    streams = [TextStream(tokenizer, config.stop) for _ in encoded]
    pick, rows = Pick(tokenizer, config, [lead for _, lead in encoded]), [ids for ids, _ in encoded]
    steps = None
    if decoding.text_steps:
        longest = max(map(len, rows)) + config.max_new_tokens
        steps = decoding.text_steps(model, len(rows), longest, pick.choose)
    # A space that was taken off the prompt comes back with the first token: do not show it twice.
    strip = [bool(lead) for _, lead in encoded]
    for step in generate(model, rows, pick, config.max_new_tokens, steps=steps):
        for row, token in enumerate(step):
            if token is None:
                continue
            text = streams[row].feed(token)
            if strip[row] and text:
                text, strip[row] = text.removeprefix(" "), False
            if text:
                show(row, text)
        if all(stream.done for stream in streams):
            break
    for row, stream in enumerate(streams):
        if text := stream.finish():
            show(row, text)
    return [
        stream.text.removeprefix(" ") if lead else stream.text
        for stream, (_, lead) in zip(streams, encoded, strict=True)
    ]


def load_model(
    path: Path,
    device: torch.device,
    checkpoint: dict | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, Tokenizer, dict]:
    """(model, tokenizer, checkpoint), ready to sample from; the weights are in the model alone."""
    checkpoint = checkpoint or checkpoints.load(path)
    model, tokenizer = checkpoints.restore(path, checkpoint)
    checkpoint = {k: v for k, v in checkpoint.items() if k not in ("model", "optimizer")}
    model.to(device, dtype).eval()
    if device.type == "cpu":
        lay_out_for_decoding(model)
    return model, tokenizer, checkpoint


def score(model: nn.Module, tokenizer: Tokenizer, config: SampleConfig) -> None:
    """Prints loss, perplexity and bits per byte of what --eval names, in windows of block_size: a
    named text's validation part, one's own text whole."""
    corpus, cache = open_corpus(config.eval, Path(config.cache_dir)), Path(config.cache_dir)
    corpus = corpus if config.eval in NAMES else whole(corpus)
    file = tokenize(corpus, "validation", tokenizer, cache)
    sizes = {"block_size": model.config.block_size, "batch_size": config.batch_size}
    data = Windows(file, corpus, "validation", tokenizer, **sizes)
    print_scores(model, data, config.eval)


def speak(
    model: nn.Module,
    tokenizer: Tokenizer,
    config: SampleConfig,
    checkpoint: dict,
    encode: Callable[[Tokenizer, str], tuple[list[int], bytes]] = encode_prompt,
) -> None:
    """The scores of --eval; else the continuations of config.prompt, a single one as it is
    written. `encode` as in `complete`."""
    if config.eval:
        if config.prompt:
            raise ValueError("--eval and --prompt are two things to do: give one of them")
        if checkpoint["task"] == "gpt":
            score(model, tokenizer, config)
        else:
            print_scores(model, predict.eval_data(checkpoint, tokenizer, config), config.eval)
        return
    prompts = config.prompt or [""]
    longest = max(len(encode(tokenizer, p)[0]) for p in prompts)
    if longest + config.max_new_tokens > model.config.block_size:
        print(
            f"note: prompt and new tokens may reach {longest + config.max_new_tokens} tokens, the "
            f"model sees {model.config.block_size}: the oldest are dropped, half a block at a time",
            file=sys.stderr,
        )
    if len(prompts) * config.num_samples == 1:
        print(prompts[0], end="", flush=True)
        write = partial(print, end="", flush=True)
        complete(model, tokenizer, prompts, config, lambda _, text: write(text), encode)
        print()
        return
    texts = complete(model, tokenizer, prompts, config, encode=encode)
    for row, text in enumerate(texts):
        prompt, number = divmod(row, config.num_samples)
        print(f"--- prompt {prompt + 1}, sample {number + 1}\n{prompts[prompt]}{text}")


# ---- the command line ----------------------------------------------------------------------------


class Task(NamedTuple):
    Config: type  # the flags
    respond: Callable  # (model, tokenizer, prompts, config) -> texts
    between: str  # what is printed between a prompt and its text
    speak: Callable  # (model, tokenizer, config, checkpoint): what the command line does
    # (model, tokenizer, data, folder of the run) -> lines that end a training run
    closing: Callable | None = None
    # A prompt that training showed -> the flags that ask for such an answer again
    flags: Callable = lambda prompt: ("--prompt", prompt) if prompt else ()


# A GPT that was taught by prompts and completions reads a prompt as it did then.
taught = {"encode": completions.encode_prompt}

RESPOND = {
    "gpt": Task(SampleConfig, complete, "", speak),
    "bert": Task(FillConfig, fill.fill, "\n-> ", fill.speak),
    "seq2seq": Task(
        TranslateConfig, translate.translate, "\n-> ", translate.speak, translate.closing
    ),
    "classify": Task(
        PredictConfig, predict.classify, "\n-> ", predict.speak, predict.closing_confusion
    ),
    "tag": Task(PredictConfig, predict.tag, "\n-> ", predict.speak),
    "answer": Task(
        AskConfig,
        predict.answer,
        "\n-> ",
        predict.speak_answers,
        flags=lambda prompt: ("--context", "text.txt", "--prompt", prompt.partition("\n")[0]),
    ),
    "similar": Task(
        SimilarConfig,
        predict.alike,
        "\n-> ",
        predict.speak_similar,
        flags=lambda prompt: ("--similar", "queries.txt", "lines.txt"),
    ),
    "complete": Task(SampleConfig, partial(complete, **taught), "", partial(speak, **taught)),
}


def find_checkpoint(argv: list[str]) -> Path | None:
    """What --checkpoint names, else the newest below out/, None where there is none. Known before
    the other flags are read, because its task decides which there are."""
    parser = cli.Parser("")
    parser.add_argument("--checkpoint", default="")
    known, _ = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    if known.checkpoint:
        return Path(known.checkpoint)
    return checkpoints.newest() if any(Path("out").glob("*/*.pt")) else None


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    path = find_checkpoint(argv)
    checkpoint = checkpoints.load(path) if path else {"task": "gpt"}
    task = RESPOND[checkpoint["task"]]
    parser = cli.Parser(
        "Continue a text, translate it, or fill in its masked words, with a trained model. The\n"
        "flags are those of the checkpoint's task: name it with --checkpoint beside --help to see\n"
        "them."
    )
    cli.add_flags(parser, task.Config, f"sampling ({checkpoint['task']})")
    every = {name: (other.Config,) for name, other in RESPOND.items()}
    known = cli.owners(every, "checkpoints of")
    config = task.Config(**parser.parse(argv, known))
    if not path:
        checkpoints.newest()  # which says that there is none
    device = pick_device(config.device)
    dtype = precision(getattr(config, "dtype", "fp32"), device)  # only those that write have it
    model, tokenizer, checkpoint = load_model(path, device, checkpoint, dtype)
    print(f"{path}: {checkpoint['task']}, step {checkpoint['step']:,}", file=sys.stderr)
    task.speak(model, tokenizer, config, checkpoint)


if __name__ == "__main__":
    cli.run(main)
