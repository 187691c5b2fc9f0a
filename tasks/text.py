"""The language model: in training, it predicts for every token of a long text the next one; then it
continues a prompt.

Training reads windows of block_size tokens. Sampling goes from text to text in small steps: a
prompt becomes tokens (`encode_prompt`), tokens become logits (`decoding.generate`), logits become
the next token (`Pick`), and tokens become text that can be shown at once (`TextStream`).

Left out: a mask between the documents of a window, overlapping windows in an evaluation, penalties
for repetition.

Papers: GPT (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training") and
GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").
"""

import codecs
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import decoding
from bpe import END_OF_TEXT, Tokenizer
from data.chat import TEMPLATES
from data.shuffle import Feistel, shuffled
from data.tables import TableCorpus, is_table, open_tables
from data.text import NAMES, Corpus, open_corpus, whole
from data.tokens import BEGINS, ENDS, TokenFile, both_splits, opening, tokenize
from decoding import choose, distribution, generate, likeliest
from tasks.choices import print_accuracies
from tasks.flags import DEVICES, DTYPES, TrainConfig, check, choice, ranged

GOAL, LOWER_IS_BETTER = "loss", True

Flags = TrainConfig  # train.py has the common flags for this task, and no others


# ---- text -> batches -----------------------------------------------------------------------------

TURN_ENDS = ("<|im_end|>", "<|eot_id|>")  # behind what a model says in a conversation
TEXTS = [("text",), ("content",), ("sentence",), ("review",)]  # columns of a table


def open_text(data: str, cache: Path, valid: str = "") -> Corpus | TableCorpus:
    """The text that --data names, as in data/text.py; or the documents in the text column of a .csv
    or .tsv, of which one in ten validates, or those of valid."""
    if is_table(Path(data)):
        return open_tables(data, valid, TEXTS)
    return open_corpus(data, cache)


class Data:
    """Windows of T tokens from a token file.

    Training: an epoch is a seeded permutation of all windows. The windows of each epoch start at
    another offset, so that a small text is not always cut at the same places. Validation: in order,
    from the first token on; the last window is filled up with -100. If max_tokens is less than the
    text, evenly spaced windows of it.
    """

    special_tokens = (END_OF_TEXT,)
    needs_bytes = True  # what it writes, and bits per byte, are bytes of tokens

    def __init__(
        self,
        file: TokenFile,
        corpus: Corpus | TableCorpus,
        split: str,
        tokenizer: Tokenizer,
        *,
        block_size: int,
        batch_size: int,
        seed: int = 0,
        max_tokens: int = 0,
    ):
        self.ids, self.text_bytes, self.fingerprint = file.ids, file.text_bytes, corpus.hash
        self.tokenizer, self.prompts, self.rule = tokenizer, corpus.prompts, corpus.rule
        self.split, self.seed = split, seed
        self.block_size, self.batch_size = block_size, batch_size
        self.tokens_per_batch = batch_size * block_size
        n, T = len(self.ids), block_size
        if split == "train":
            if n < T + 1:
                raise ValueError(
                    f"the training text of {corpus.name} has {n:,} tokens, fewer than the "
                    f"{T + 1:,} of one window: choose --block_size {max(n - 1, 1)} or less, "
                    "or give more text"
                )
            self.max_offset = min(T - 1, n - 1 - T)
            self.n_windows = (n - 1 - self.max_offset) // T
            self.tokens_per_epoch = self.n_windows * T
        else:
            if n < 2:
                raise ValueError(f"the validation text of {corpus.name} is empty: give more text")
            self.n_windows = math.ceil((n - 1) / T)
            wanted = min(self.n_windows, max(1, max_tokens // T) if max_tokens else self.n_windows)
            self.chosen = range(wanted)
            if wanted < self.n_windows:
                self.chosen = [k * self.n_windows // wanted for k in self.chosen]
            self.n_batches = math.ceil(wanted / batch_size)
        self.permutations: dict[int, tuple[int, np.ndarray | Feistel]] = {}

    @classmethod
    def splits(cls, flags: TrainConfig, sizes: dict, tokenizer: Tokenizer | None = None):
        """(train, validation); a tokenizer is learnt from the training text unless given."""
        corpus = open_text(flags.data, Path(flags.cache_dir))
        return both_splits(cls, corpus, flags, sizes, tokenizer)

    def permutation(self, epoch: int) -> tuple[int, np.ndarray | Feistel]:
        """(offset, order) of an epoch. Two epochs are kept, since a batch may span both."""
        if epoch not in self.permutations:
            random = np.random.default_rng((self.seed, epoch))
            offset = int(random.integers(self.max_offset + 1))
            self.permutations = {k: v for k, v in self.permutations.items() if abs(k - epoch) < 2}
            self.permutations[epoch] = offset, shuffled(self.n_windows, random)
        return self.permutations[epoch]

    def starts(self, positions: np.ndarray) -> np.ndarray:
        """Where the windows at these positions begin; positions run on from epoch to epoch."""
        epochs, places = np.divmod(positions, self.n_windows)
        found = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            offset, order = self.permutation(epoch)
            found[epochs == epoch] = offset + order[places[epochs == epoch]] * self.block_size
        return found

    def batch(self, i: int) -> dict[str, Tensor]:
        """{"tokens": (B, T), "targets": (B, T)}; the last batch of an evaluation may be smaller."""
        T, first = self.block_size, i * self.batch_size
        if self.split == "train":
            starts = self.starts(np.arange(first, first + self.batch_size, dtype=np.int64)).tolist()
        else:
            starts = [window * T for window in self.chosen[first : first + self.batch_size]]
        ids = np.concatenate([self.ids[start : start + T + 1] for start in starts])
        rows = np.full((len(starts), T + 1), -100, dtype=np.int64)
        # Only the last row can be short, where it is the last window of the text.
        rows.reshape(-1)[: len(ids)] = ids
        windows = torch.from_numpy(rows)
        tokens, targets = windows[:, :-1], windows[:, 1:]
        return {"tokens": tokens.clamp(min=0), "targets": targets.contiguous()}

    @property
    def boundary(self) -> int:
        """The id between two documents, which a model that counts must know."""
        return self.tokenizer.special_tokens[opening(self.tokenizer)]

    @property
    def scored_bytes(self) -> int:
        """The number of bytes of the evaluation's targets; <|endoftext|> has none."""
        if not hasattr(self, "_scored_bytes"):
            length = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
            for i in self.tokenizer.ordinary_ids():
                length[i] = len(self.tokenizer.bytes_of[i])
            T = self.block_size
            self._scored_bytes = sum(
                int(length[self.ids[w * T + 1 : w * T + T + 1]].sum()) for w in self.chosen
            )
        return self._scored_bytes

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The loss in nats per token, its perplexity, and the loss in bits per byte, which can be
        compared between tokenizers."""
        loss = sums["loss"] / max(counts["loss"], 1)
        bits = sums["loss"] / math.log(2) / max(self.scored_bytes, 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": bits}

    def describe(self) -> str:
        scored = ""
        if self.split != "train" and len(self.chosen) < self.n_windows:
            scored = f", {len(self.chosen) * self.block_size:,} of them scored"
        return f"{len(self.ids):,} tokens from {self.text_bytes / 1e6:,.2f} MB{scored}"


def batch_shapes(flags: TrainConfig, config, B: int, T: int) -> dict[str, tuple[int, ...]]:
    return {"tokens": (B, T), "targets": (B, T)}


# ---- prompt -> tokens ----------------------------------------------------------------------------


@dataclass
class SampleFlags:
    checkpoint: str = ""  # the file to load; empty: the newest below out/
    prompt: list[str] = field(default_factory=list)  # text to continue; may be repeated
    chat: bool = False  # converse: each line of standard input gets an answer
    template: str = choice("", *TEMPLATES, "")  # --chat: how turns are written; empty: the model's
    # --chat: the system's message, "" for none, may be repeated for more lines; the model's if not
    system: list[str] = field(default_factory=list)
    max_new_tokens: int = ranged(200, 1, 1_000_000)  # tokens to write at most
    # 0 takes the likeliest token, below 1 is safer, above 1 is wilder
    temperature: float = ranged(0.8, 0)
    top_k: int = ranged(0, 0)  # keep only the k likeliest tokens; 0: all
    # keep the fewest tokens that have this probability together; 1: all
    top_p: float = ranged(0.95, 0, 1)
    # drop tokens less likely than this share of the likeliest; 0: none
    min_p: float = ranged(0.0, 0, 1)
    stop: list[str] = field(default_factory=list)  # end before this text; may be repeated
    num_samples: int = ranged(1, 1, 10_000)  # continuations of each prompt
    eval: str = ""  # score instead: stdlib, shakespeare, or a path; of complete: a file as --data
    choices: str = ""  # answer instead: a .jsonl of questions and options (tasks/choices.py)
    shots: int = ranged(0, 0, 1000)  # solved examples before each of these questions
    shots_from: str = ""  # a .jsonl that they are drawn from; empty: the other rows of --choices
    cache_dir: str = "data/cache"  # where --eval keeps downloads and token files
    batch_size: int = ranged(8, 1, 2**20)  # windows of --eval, or texts of --choices, at a time
    seed: int = 1337  # equal seeds give equal samples
    device: str = choice("auto", *DEVICES)  # auto, cpu, cuda or mps
    # bf16, fp32, or auto: bf16 on GPUs that have it, but fp32 for figures to compare
    dtype: str = choice("auto", *DTYPES)

    def __post_init__(self):
        check(self)
        if self.eval and self.prompt:
            raise ValueError("--eval and --prompt are two things to do: give one of them")
        if self.choices and (self.eval or self.prompt or self.chat):
            raise ValueError(
                "--choices is a thing to do by itself: leave out --eval, --prompt and --chat"
            )
        if (self.shots or self.shots_from) and not self.choices:
            raise ValueError("--shots and --shots_from need questions: name them with --choices")
        if self.shots_from and not self.shots:
            raise ValueError("--shots_from has no effect with --shots 0: say how many, --shots 4")
        if self.chat and (self.eval or self.num_samples > 1):
            raise ValueError("--chat goes with neither --eval nor --num_samples: leave it out")
        if not self.chat and (self.template or self.system):
            raise ValueError("--template and --system are for conversations: add --chat")


def split_space(prompt: str) -> tuple[str, str]:
    """(prompt without the space at its end, that space), or (prompt, "") where there is none. Two
    or more spaces stay, and so does one behind a line end: they may indent code, and the completion
    may go on with more of them. A prompt that is a single space stays too."""
    if len(prompt) > 1 and prompt.endswith(" ") and not prompt[:-1].endswith((" ", "\n")):
        return prompt[:-1], " "
    return prompt, ""


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> tuple[list[int], bytes]:
    """(tokens, bytes that the first new token must begin with).

    An empty prompt is the beginning of a document. A space at the end of the prompt is removed, and
    the first new token must begin with it: in training a space belongs to the word behind it, so
    the model expects anything but a word after a space alone. Raises ValueError for the name of a
    special token that the tokenizer does not have.
    """
    for name in re.findall(r"<\|[^|<>\s]+\|>", prompt):
        if name not in tokenizer.special_tokens:
            known = ", ".join(tokenizer.special_tokens) or "none"
            raise ValueError(f"the prompt's {name} is no special token here: known are {known}")
    prompt, space = split_space(prompt)
    first = tokenizer.special_tokens[opening(tokenizer)]
    ids = tokenizer.encode(prompt, allowed_special="all")
    # GPT saw one only between documents, Llama before everything that it ever read.
    if not ids or (opening(tokenizer) in BEGINS and ids[0] != first):
        ids = [first, *ids]
    return ids, space.encode()


# ---- logits -> token -----------------------------------------------------------------------------


class Pick:
    """Chooses the next tokens for `generate`, with one random stream for each row.

    Row r is sample r % num_samples of its prompt, and its stream depends only on that number and
    the seed: a prompt gets the same samples in any batch. Ids beyond the tokenizer's vocabulary
    cannot be chosen (the model's may be padded).
    """

    def __init__(self, tokenizer: Tokenizer, flags: SampleFlags, leads: list[bytes]):
        self.tokenizer, self.flags, self.leads = tokenizer, flags, list(leads)
        seeds = (flags.seed + r % flags.num_samples for r in range(len(leads)))
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor, writing: list[int]) -> Tensor:
        logits = self.follow_leads(logits.cpu(), writing)
        u = torch.zeros(len(logits), dtype=torch.double)
        for row in writing:
            u[row] = self.draw(row)
        return self.choose(logits, u)

    def choose(self, logits: Tensor, u: Tensor) -> Tensor:
        """logits (B, V), u (B,), uniform numbers -> tokens (B,), on the device of the logits."""
        f, logits = self.flags, logits[:, : self.tokenizer.vocab_size]
        if f.temperature == 0:
            return likeliest(logits)
        return choose(distribution(logits.float(), f.temperature, f.top_k, f.top_p, f.min_p), u)

    def draw(self, row: int, count: int = 1) -> Tensor:
        """The next uniform numbers of the row's stream, (count,)."""
        return torch.rand(count, generator=self.streams[row], dtype=torch.double)

    def follow_leads(self, logits: Tensor, writing: list[int]) -> Tensor:
        """The logits (B, V), changed in rows that have not written their lead yet: these can choose
        only tokens that begin with it."""
        for row in writing:
            if lead := self.leads[row]:
                t = self.tokenizer
                fits = [i for i in t.ordinary_ids() if t.bytes_of[i].startswith(lead)]
                allowed = torch.zeros_like(logits[row], dtype=torch.bool)
                allowed[fits] = True
                logits[row] = logits[row].masked_fill(~allowed, -torch.inf)
                self.leads[row] = b""
        return logits


# ---- tokens -> text ------------------------------------------------------------------------------


class TextStream:
    """Turns a row's tokens into text that can be shown at once.

    Part of a character is held back until its other bytes arrive, and so is what may be the
    beginning of a stop string. A stop string sets `done`, and so does a token that ends a text, a
    turn of a conversation, or begins another text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str]):
        self.tokenizer, self.stop = tokenizer, [s for s in stop if s]
        ids = tokenizer.special_tokens
        self.ends = {ids[name] for name in (*ENDS, *BEGINS, *TURN_ENDS) if name in ids}
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.held, self.done = "", "", False

    def feed(self, token: int) -> str:
        """The text that this token completes, perhaps empty."""
        if self.done:
            return ""
        if token in self.ends:
            return self.finish()
        return self.release(self.decoder.decode(self.tokenizer.decode_bytes([token])))

    def release(self, new: str, last: bool = False) -> str:
        """Adds text to what is held back, and returns what can be shown of it."""
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
        """The text that is still held back, when no more tokens come."""
        shown = "" if self.done else self.release(self.decoder.decode(b"", final=True), last=True)
        self.done = True
        return shown


# ---- prompts -> texts ----------------------------------------------------------------------------

Encode = Callable[[Tokenizer, str], tuple[list[int], bytes]]


def complete(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: list[str],
    flags: SampleFlags,
    write: Callable[[int, str], None] = lambda row, text: None,
    encode: Encode = encode_prompt,
) -> list[str]:
    """num_samples continuations of each prompt, in order. write(row, text) gets each part as soon
    as it is there. `encode` turns a prompt into tokens as in the model's training."""
    encoded = [encode(tokenizer, p) for p in prompts for _ in range(flags.num_samples)]
    streams = [TextStream(tokenizer, flags.stop) for _ in encoded]
    rows, leads = [ids for ids, _ in encoded], [lead for _, lead in encoded]
    pick, steps = Pick(tokenizer, flags, leads), None
    if decoding.text_steps and "positions" in signature(model.features).parameters:
        longest = max(map(len, rows)) + flags.max_new_tokens
        steps = decoding.text_steps(model, len(rows), longest, pick.choose)
    # A space that was removed from the prompt comes back with the first token: it is shown once.
    strip = [bool(lead) for lead in leads]
    for step in generate(model, rows, pick, flags.max_new_tokens, steps=steps):
        for row, token in enumerate(step):
            if token is None:
                continue
            text = streams[row].feed(token)
            if strip[row] and text:
                text, strip[row] = text.removeprefix(" "), False
            if text:
                write(row, text)
        if all(stream.done for stream in streams):
            break
    for row, stream in enumerate(streams):
        if text := stream.finish():
            write(row, text)
    return [
        stream.text.removeprefix(" ") if lead else stream.text
        for stream, lead in zip(streams, leads, strict=True)
    ]


def print_completions(
    model: nn.Module, tokenizer: Tokenizer, flags: SampleFlags, encode: Encode = encode_prompt
) -> None:
    """Prints the continuations of flags.prompt: a single one while it is written, more of them when
    all are complete. `encode` is as in `complete`."""
    prompts = flags.prompt or [""]
    longest = max(len(encode(tokenizer, p)[0]) for p in prompts) + flags.max_new_tokens
    if longest > model.config.block_size and not getattr(model, "endless", False):
        print(
            f"note: prompt and new tokens may reach {longest} tokens, the "
            f"model sees {model.config.block_size}: the oldest are dropped, half a block at a time",
            file=sys.stderr,
        )
    if len(prompts) * flags.num_samples == 1:
        write = partial(print, end="", flush=True)
        write(prompts[0])
        complete(model, tokenizer, prompts, flags, lambda _, text: write(text), encode)
        print()
        return
    texts = complete(model, tokenizer, prompts, flags, encode=encode)
    for row, text in enumerate(texts):
        prompt, number = divmod(row, flags.num_samples)
        print(f"--- prompt {prompt + 1}, sample {number + 1}\n{prompts[prompt]}{text}")


# ---- what sample.py and the end of a run print ---------------------------------------------------


def eval_data(
    model: nn.Module, tokenizer: Tokenizer, flags: SampleFlags, Data: type[Data] = Data
) -> Data:
    """The text that --eval names, in windows of block_size: the validation part of a named text, or
    all of one's own."""
    cache = Path(flags.cache_dir)
    corpus = open_text(flags.eval, cache, valid=flags.eval)
    if isinstance(corpus, Corpus) and flags.eval not in NAMES:
        corpus = whole(corpus)
    file = tokenize(corpus, "validation", tokenizer, cache)
    sizes = {"block_size": model.config.block_size, "batch_size": flags.batch_size}
    return Data(file, corpus, "validation", tokenizer, **sizes)


def sample(
    model: nn.Module,
    tokenizer: Tokenizer,
    flags: SampleFlags,
    checkpoint: dict,
    score: Callable[[Data], None],
) -> None:
    """Prints the scores of --eval or --choices, or else the continuations of the prompts."""
    if flags.choices:
        print_accuracies(model, tokenizer, flags)
    elif flags.eval:
        score(eval_data(model, tokenizer, flags))
    else:
        print_completions(model, tokenizer, flags)


def show(
    model: nn.Module,
    tokenizer: Tokenizer,
    data: Data,
    folder: Path,
    encode: Encode = encode_prompt,
) -> list[str]:
    """Each of the data's prompts with its continuation."""
    texts = complete(model, tokenizer, data.prompts, SampleFlags(), encode=encode)
    return [prompt + text for prompt, text in zip(data.prompts, texts, strict=True)]


def ask(prompts: list[str]) -> tuple[str, ...]:
    return ("--prompt", prompts[0]) if prompts and prompts[0] else ()
