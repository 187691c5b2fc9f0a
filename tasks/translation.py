"""Translation, or any other way from one sentence to another, with the encoder-decoder of 2017.

A pair is kept as two documents of a token file, source then target, each behind its <|endoftext|>.
The model reads that token at the end of a source, and at the beginning and the end of a target;
only Marian's tokenizers have a start token of their own. The search for the likeliest target is in
`decoding.py`; here are its batches, its caches and its limits, BLEU and chrF of the result, and a
picture of where the decoder looks.

Left out: back-translation, packing pairs into one row, ensembles, coverage penalties.

Papers: Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762). BLEU and chrF are
sacrebleu's (Post 2018, arXiv:1804.08771), on detokenized text.
"""

import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

import decoding
from bpe import END_OF_TEXT
from data.buckets import InBuckets, evenly_within, pad_rows, positions_of
from data.lines import answer_stdin, new_file
from data.parallel import ParallelCorpus, is_named, open_pairs
from data.sentencepieces import START
from data.tokens import AnyTokenizer, TokenFile, both_splits, ending, opening
from decoding import (
    Advance,
    beam_search,
    choose,
    distribution,
    generate_targets,
    likeliest,
)
from model import Attention
from tasks.flags import DEVICES, DTYPES, TrainConfig, check, choice, ranged

GOAL, LOWER_IS_BETTER = "loss", True
PICTURES = (".png", ".svg", ".pdf")


@dataclass
class Flags(TrainConfig):
    data: str = "dates"  # dates, multi30k, wmt14, two files (a.en,a.de), a .tsv, .csv or .jsonl
    valid: str = ""  # validation pairs in files, as for --data; empty: some of --data are held out
    languages: str = ""  # from-to, en-de for one; empty: the set's own, or files as they are given


# ---- pairs -> batches ----------------------------------------------------------------------------


class Data(InBuckets):
    """Batches of pairs whose longer sides have similar lengths: see InBuckets.

    Validation: in order; if max_tokens is less than all, evenly spaced pairs. Pairs with a side of
    more than block_size tokens are left out, and counted.
    """

    special_tokens = (END_OF_TEXT,)

    def __init__(
        self,
        file: TokenFile,
        corpus: ParallelCorpus,
        split: str,
        tokenizer: AnyTokenizer,
        *,
        block_size: int,
        max_tokens: int = 0,
        **buckets,
    ):
        """buckets: see InBuckets.make_buckets."""
        self.ids, self.fingerprint, self.tokenizer = file.ids, corpus.hash, tokenizer
        self.prompts, self.rule = corpus.prompts, corpus.rule
        self.start, self.end = start_and_end(tokenizer)
        # Source i begins at borders[2i], target i at borders[2i + 1] and ends at borders[2i + 2].
        border = tokenizer.special_tokens[opening(tokenizer)]
        self.borders = np.append(positions_of(file.ids, border), len(file.ids))
        self.lengths = np.diff(self.borders).reshape(-1, 2)  # each with its end token
        longer = self.lengths.max(1, initial=0)
        self.chosen = np.flatnonzero(longer <= block_size)
        self.n_all, self.block_size = len(self.chosen), block_size
        self.too_long = len(longer) - self.n_all
        if not self.n_all:
            raise ValueError(
                f"none of the {len(longer):,} pairs for {split} in {corpus.name} fits into "
                f"--block_size {block_size}: choose more, or give more text"
            )
        tokens, limit = int(longer[self.chosen].sum()), 0 if split == "train" else max_tokens
        self.chosen = self.chosen[evenly_within(self.n_all, tokens, limit)]
        self.make_buckets(longer[self.chosen], split, block_size=block_size, **buckets)

    @classmethod
    def splits(cls, flags: Flags, sizes: dict, tokenizer: AnyTokenizer | None = None):
        """(train, validation); a joint tokenizer is learnt from the training pairs unless given."""
        cache = Path(flags.cache_dir)
        corpus = open_pairs(flags.data, cache, languages=flags.languages, valid=flags.valid)
        step = {"tokens_per_step": flags.tokens_per_step}
        return both_splits(cls, corpus, flags, sizes, tokenizer, **step)

    def ids_of(self, pair: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of (source, target), without end tokens."""
        begin, middle, end = self.borders[2 * pair : 2 * pair + 3]
        ids = self.ids[begin:end]
        return ids[1 : middle - begin], ids[middle - begin + 1 :]

    def texts(self) -> Iterator[tuple[str, str]]:
        """(source, target) of all pairs, in the order of the text."""
        for pair in self.chosen:
            source, target = self.ids_of(pair)
            yield self.tokenizer.decode(source.tolist()), self.tokenizer.decode(target.tolist())

    def batch(self, i: int) -> dict[str, Tensor]:
        """{"source": (B, S), "tokens": (B, T), "targets": (B, T)}; if some sources are shorter than
        others, also "source_keep": (B, S), False at padding."""
        _, rows, empty = self.buckets.batch(i)
        sources, targets = zip(*map(self.ids_of, self.chosen[rows]), strict=True)
        source, keep = pad(sources, self.end)
        target, scored = pad(targets, self.end)
        scored &= not empty
        # The decoder reads the start token first, then every target but the last.
        tokens = torch.cat([torch.full_like(target[:, :1], self.start), target[:, :-1]], dim=1)
        batch = {"source": source, "tokens": tokens, "targets": target.masked_fill(~scored, -100)}
        return batch if keep.all() else {**batch, "source_keep": keep}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """Per target token: the smoothed loss that training minimises, and the loss ("nll") and the
        perplexity without smoothing."""
        nll = sums["nll"] / max(counts["loss"], 1)
        return {
            "loss": sums["loss"] / max(counts["loss"], 1),
            "nll": nll,
            "perplexity": math.exp(min(nll, 700)),
        }

    def describe(self) -> str:
        lengths = self.lengths[self.chosen]
        source, target = lengths.sum(0)
        text = f"{len(self.chosen):,} pairs"
        if len(self.chosen) < self.n_all:
            text += f" of {self.n_all:,}, evenly spaced"
        text += f", {source:,} source and {target:,} target tokens"
        text += self.buckets.describe(lengths)
        if self.too_long:
            text += f"; {self.too_long:,} pairs longer than --block_size {self.block_size} left out"
        return text


def batch_shapes(flags: Flags, config, B: int, T: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("source", "source_keep", "tokens", "targets"), (B, T))


def start_and_end(tokenizer: AnyTokenizer) -> tuple[int, int]:
    """(id that a target begins with, id that source and target end with)."""
    end = tokenizer.special_tokens[ending(tokenizer)]
    return tokenizer.special_tokens.get(START, end), end


def pad(rows: Sequence[Sequence[int] | np.ndarray], end: int) -> tuple[Tensor, Tensor]:
    """Rows, an end token behind each, then padding -> (ids (B, L), keep (B, L)); keep is False at
    padding."""
    return pad_rows(rows, end, behind=1)


# ---- the flags of sample.py ----------------------------------------------------------------------


@dataclass
class SampleFlags:
    checkpoint: str = ""  # the file to load; empty: the newest below out/
    prompt: list[str] = field(default_factory=list)  # a sentence; may be repeated; none: read stdin
    eval: str = ""  # score instead: multi30k, wmt14, dates, or files as in --data of train.py
    languages: str = ""  # from-to of what --eval names; empty: as in training
    attention: str = ""  # also draw the cross-attention of the first --prompt into this picture
    beam: int = ranged(5, 1, 1000)  # hypotheses that are followed; 1: greedy
    # exponent; 0 favours short translations, 1 long ones
    length_penalty: float = ranged(0.6, 0, 100)
    # above 0: draw each token, instead of searching for the likeliest
    temperature: float = ranged(0.0, 0)
    top_k: int = ranged(0, 0)  # when drawing, keep only the k likeliest tokens; 0: all
    # keep the fewest tokens that have this probability together; 1: all
    top_p: float = ranged(1.0, 0, 1)
    max_new_tokens: int = ranged(0, 0)  # tokens to write at most; 0: 50 more than the source has
    batch_size: int = ranged(64, 1, 2**20)  # sentences at a time
    seed: int = 1337  # of the draws
    cache_dir: str = "data/cache"  # where --eval keeps downloads
    device: str = choice("auto", *DEVICES)  # auto, cpu, cuda or mps
    # bf16, fp32, or auto: bf16 on GPUs that have it, but fp32 for --eval, a figure to compare
    dtype: str = choice("auto", *DTYPES)

    def __post_init__(self):
        check(self)
        if self.attention:
            if not self.prompt:
                raise ValueError(f"--attention {self.attention} draws a sentence: add --prompt")
            path = new_file("attention", self.attention)
            if path.suffix.lower() not in PICTURES:
                known = ", ".join(PICTURES)
                raise ValueError(f"--attention {path} is no picture: end it in {known}")
        if self.eval and self.prompt:
            raise ValueError("--eval and --prompt are two things to do: give one of them")

    @property
    def search(self) -> str:
        if self.temperature > 0:
            return f"drawn at temperature {self.temperature:g}"
        if self.beam == 1:
            return "greedy"
        return f"beam {self.beam}, length penalty {self.length_penalty:g}"


# ---- sentences -> sentences ----------------------------------------------------------------------


def make_advance(
    model: nn.Module, source: Tensor, source_keep: Tensor, target_len: int, vocab_size: int
) -> Advance:
    """The function that `decoding.py` calls for the next logits. source (B, S) is read once; each
    call reorders the caches as the rows are, and decodes one token for every row."""
    if source_keep.all():
        source_keep = None
    memory = model.encode(source, source_keep)
    caches = model.make_caches(source.size(1), target_len)

    def advance(tokens: Tensor, rows: Tensor, sentences: list[int]) -> Tensor:
        nonlocal memory, source_keep
        if len(sentences) < len(memory):
            memory = memory[sentences]
            source_keep = None if source_keep is None else source_keep[sentences]
            for _, across in caches:
                across.select(torch.tensor(sentences, device=source.device))
        for own, _ in caches:
            own.select(rows)
        x = model.decode(tokens[:, None], memory, source_keep, caches)
        # Ids beyond the tokenizer's vocabulary (the model's may be padded) cannot be chosen.
        return model.head(x[:, -1])[:, :vocab_size].float()

    return advance


@torch.no_grad()
def translate_ids(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    sources: list[list[int]],
    flags: SampleFlags,
    static: Callable[[Tensor, Tensor, int], Advance] | None = None,
) -> list[list[int]]:
    """The ids of a batch of sources -> those of the targets, all without start and end tokens.
    `static` is what decoding.pair_steps returns."""
    device, block_size = next(model.parameters()).device, model.config.block_size
    start, end = start_and_end(tokenizer)
    wanted = [flags.max_new_tokens or len(ids) + 50 for ids in sources]  # 50: section 6.1 of 2017
    limits = [min(n, block_size - 1) for n in wanted]
    source, keep = (x.to(device) for x in pad(sources, end))
    if static is not None:
        advance = static(source, keep, max(limits) + 1)
    else:
        advance = make_advance(model, source, keep, max(limits) + 1, tokenizer.vocab_size)
    ends = {"start": start, "end": end, "device": device}
    if flags.temperature == 0 and flags.beam > 1:
        found = beam_search(advance, limits, beam=flags.beam, alpha=flags.length_penalty, **ends)
        return [tokens for _, tokens in found]
    # Each sentence has a random stream, so its draws do not depend on its neighbours.
    streams = [torch.Generator().manual_seed(flags.seed) for _ in sources]

    def pick(logits: Tensor, alive: list[int]) -> Tensor:
        if flags.temperature == 0:
            return likeliest(logits)
        p = distribution(logits.cpu(), flags.temperature, flags.top_k, flags.top_p)
        u = [torch.rand((), generator=streams[i], dtype=torch.double) for i in alive]
        return choose(p, torch.stack(u))

    return generate_targets(advance, limits, pick, **ends)


def translate(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    lines: list[str],
    flags: SampleFlags,
    bar: tqdm | None = None,
    first_line: int = 1,
) -> list[str]:
    """The translations of the lines, in order. A line gets the translation that it gets alone;
    sentences of similar length share a batch. An empty line stays empty. Of a line that is longer
    than the model reads, the beginning is translated, and a note gives its number (that of lines[0]
    is first_line)."""
    ids, most = [tokenizer.encode(line.strip()) for line in lines], model.config.block_size - 1
    for number, tokens in enumerate(ids, first_line):
        if len(tokens) > most:
            warning = f"note: line {number:,} has {len(tokens):,} tokens, the model reads {most}:"
            tqdm.write(f"{warning} the rest is left out", file=sys.stderr)
            del tokens[most:]
    order = sorted((i for i, tokens in enumerate(ids) if tokens), key=lambda i: len(ids[i]))
    texts, static = [""] * len(lines), None
    if decoding.pair_steps:
        rows = flags.beam if flags.temperature == 0 else 1
        static = decoding.pair_steps(model, rows, tokenizer.vocab_size)
    for start in range(0, len(order), flags.batch_size):
        batch = order[start : start + flags.batch_size]
        found = translate_ids(model, tokenizer, [ids[i] for i in batch], flags, static)
        for i, tokens in zip(batch, found, strict=True):
            text = tokenizer.decode_bytes(tokens).decode("utf-8", "replace")
            texts[i] = re.sub(r"[\r\n]+", " ", text).strip()  # one line in, one line out
        if bar is not None:
            bar.update(len(batch))
    if bar is not None:
        bar.update(len(lines) - len(order))
    return texts


# ---- scores --------------------------------------------------------------------------------------


def figures(hypotheses: list[str], references: list[str]) -> list[str]:
    """Lines to print: exact match, then BLEU (13a, cased) and chrF with their signatures."""
    same = sum(h == r.strip() for h, r in zip(hypotheses, references, strict=True))
    lines = [f"exact match {same / len(references):.2%} of {len(references):,}"]
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        return [*lines, "no BLEU and chrF: pip install sacrebleu"]
    for metric in (BLEU(tokenize="13a"), CHRF()):
        score = metric.corpus_score(hypotheses, [references])
        lines.append(f"{score.name} {score.score:.2f}  ({metric.get_signature()})")
    return lines


def score_translations(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    pairs: list[tuple[str, str]],
    flags: SampleFlags,
) -> list[str]:
    """The lines of `figures` for the translations of all pairs, and the speed in sentences/s."""
    begin = time.perf_counter()
    with tqdm(total=len(pairs), unit="sentence", disable=None) as bar:
        hypotheses = translate(model, tokenizer, [source for source, _ in pairs], flags, bar)
    seconds = time.perf_counter() - begin
    return [
        *figures(hypotheses, [target for _, target in pairs]),
        f"{len(pairs) / seconds:,.1f} sentences/s",
    ]


def eval_pairs(flags: SampleFlags, train_config: dict) -> ParallelCorpus:
    """The pairs that --eval names: the test part of a named set, or all of one's own files. The
    languages are those of --languages, or else those of the training."""
    languages = flags.languages
    if not languages and (flags.eval in ("multi30k", "wmt14") or is_named(Path(flags.eval))):
        languages = train_config.get("languages", "")
    return open_pairs(flags.eval, Path(flags.cache_dir), languages=languages, split="test")


# ---- where the decoder looks ---------------------------------------------------------------------


@torch.no_grad()
def cross_attention(model: nn.Module, source: Tensor, tokens: Tensor) -> Tensor:
    """source (1, S), tokens (1, T) -> weights (L, H, T, S): how much each written position looks at
    each source position, by layer and head. torch's attention does not return its weights, so they
    are computed once more here."""
    weights: list[Tensor] = []

    def watch(attention: Attention, inputs: tuple, output: Tensor) -> None:
        x, memory = inputs[:2]
        q, k = attention.split(attention.q(x)), attention.split(attention.k(memory))
        scores = q.float() @ k.float().transpose(-2, -1) * q.size(-1) ** -0.5
        weights.append(scores.softmax(-1)[0])

    hooks = [block.cross.register_forward_hook(watch) for block in model.decoder]
    try:
        model.decode(tokens, model.encode(source))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(weights)


def draw_attention(
    model: nn.Module, tokenizer: AnyTokenizer, line: str, flags: SampleFlags, path: Path
) -> None:
    """Translates the line and draws its cross-attention, the mean over layers and heads: source
    tokens across, written tokens down."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--attention needs matplotlib: pip install matplotlib") from error
    device, (start, end) = next(model.parameters()).device, start_and_end(tokenizer)
    source = tokenizer.encode(line.strip())[: model.config.block_size - 1]
    target = translate_ids(model, tokenizer, [source], flags)[0]
    weights = cross_attention(
        model,
        torch.tensor([[*source, end]], device=device),
        torch.tensor([[start, *target]], device=device),
    ).mean((0, 1))
    names = [[tokenizer.decode([i]).strip() or "␣" for i in ids] for ids in (source, target)]
    across, down = [*names[0], "(end)"], [*names[1], "(end)"]
    figure = Figure(figsize=(2 + 0.42 * len(across), 1.5 + 0.32 * len(down)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(weights.float().cpu().numpy(), cmap="Blues", vmin=0, aspect="auto")
    axes.set_xticks(range(len(across)), across, rotation=45, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(down)), down)
    axes.set_ylabel("written, from top to bottom")
    figure.colorbar(image, label="attention, mean over layers and heads")
    figure.savefig(path, dpi=120)


# ---- what sample.py and the end of a run print ---------------------------------------------------


def sample(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    flags: SampleFlags,
    checkpoint: dict,
    score: Callable[[Data], None],
) -> None:
    """Prints the scores of --eval, or translations of the prompts or else of the lines of stdin."""
    if flags.eval:
        corpus = eval_pairs(flags, checkpoint["train_config"])
        print(f"{flags.eval}: {corpus.rule}; {flags.search}", flush=True)
        print("\n".join(score_translations(model, tokenizer, list(corpus.pairs("test")), flags)))
    elif flags.prompt:
        print("\n".join(translate(model, tokenizer, flags.prompt, flags)))
        if flags.attention:
            draw_attention(model, tokenizer, flags.prompt[0], flags, Path(flags.attention))
            print(f"cross-attention of {flags.prompt[0]!r}: {flags.attention}", file=sys.stderr)
    else:

        def answer(lines: list[str], bar: tqdm, first_line: int) -> list[str]:
            return translate(model, tokenizer, lines, flags, bar, first_line)

        answer_stdin(answer, 16 * flags.batch_size, "sentence")


def show(model: nn.Module, tokenizer: AnyTokenizer, data: Data, folder: Path) -> list[str]:
    """Each of the data's prompts with its translation; then the scores of greedy translations of at
    most 2000 validation pairs."""
    texts = translate(model, tokenizer, data.prompts, SampleFlags())
    blocks = [f"{prompt}\n-> {text}" for prompt, text in zip(data.prompts, texts, strict=True)]
    pairs = list(islice(data.texts(), 2000))
    lines = score_translations(model, tokenizer, pairs, SampleFlags(beam=1))
    return [*blocks, "\n".join([f"{len(pairs):,} validation pairs, greedy:", *lines])]


def ask(prompts: list[str]) -> tuple[str, ...]:
    return ("--prompt", prompts[0]) if prompts and prompts[0] else ()
