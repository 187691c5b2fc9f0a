"""Sentences through a trained encoder-decoder: translate, score, and draw where it looked.

The search itself is in `decoding.py`; here are its batches, its caches and its limits. BLEU and
chrF are sacrebleu's (Post 2018, arXiv:1804.08771), on detokenized text.
"""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

import decoding
from data.lines import answer_stdin, new_file
from data.pairs import Pairs, pad, start_and_end
from data.parallel import ParallelCorpus, open_pairs
from data.tokens import AnyTokenizer
from decoding import Advance, beam_search, choose, distribution, write
from engine import cli
from model import Attention

PICTURES = (".png", ".svg", ".pdf")


@dataclass
class TranslateConfig:
    checkpoint: str = ""  # the file to load; empty: the newest below out/
    prompt: list[str] = field(default_factory=list)  # a sentence; may be repeated; none: read stdin
    eval: str = ""  # score instead: multi30k, wmt14, dates, or files as in --data of train.py
    languages: str = ""  # from-to of what --eval names; empty: as in training
    attention: str = ""  # also draw the cross-attention of the first --prompt into this picture
    beam: int = 5  # hypotheses that are followed; 1: greedy
    length_penalty: float = 0.6  # exponent; 0 favours short translations, 1 long ones
    temperature: float = 0.0  # above 0: draw each token, instead of searching for the likeliest
    top_k: int = 0  # when drawing, keep only the k likeliest tokens; 0: all
    top_p: float = 1.0  # keep the fewest tokens that have this probability together; 1: all
    max_new_tokens: int = 0  # tokens to write at most; 0: 50 more than the source has
    batch_size: int = 64  # sentences at a time
    seed: int = 1337  # of the draws
    cache_dir: str = "data/cache"  # where --eval keeps downloads
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # of the weights: bf16, fp32, or auto, which is bf16 on GPUs that have it

    def __post_init__(self):
        limits = {
            "beam": (1, 1000),
            "length_penalty": (0, 100),
            "temperature": (0, None),
            "top_k": (0, None),
            "top_p": (0, 1),
            "max_new_tokens": (0, None),
            "batch_size": (1, 2**20),
        }
        cli.check_ranges(self, limits)

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
    """What `decoding.py` asks for the next logits. source (B, S) is read once; each call moves the
    caches to where the rows went, and decodes one token for every row."""
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
    config: TranslateConfig,
    static: Callable[[Tensor, Tensor, int], Advance] | None = None,
) -> list[list[int]]:
    """One batch: source ids -> target ids, both without start and end token. `static` decodes them
    on a GPU."""
    device, block_size = next(model.parameters()).device, model.config.block_size
    start, end = start_and_end(tokenizer)
    wanted = [config.max_new_tokens or len(ids) + 50 for ids in sources]  # 50: section 6.1 of 2017
    limits = [min(n, block_size - 1) for n in wanted]
    source, keep = (x.to(device) for x in pad(sources, end))
    if static is not None:
        advance = static(source, keep, max(limits) + 1)
    else:
        advance = make_advance(model, source, keep, max(limits) + 1, tokenizer.vocab_size)
    ends = {"start": start, "end": end, "device": device}
    if config.temperature == 0 and config.beam > 1:
        found = beam_search(advance, limits, beam=config.beam, alpha=config.length_penalty, **ends)
        return [tokens for _, tokens in found]
    # One random stream for each sentence: its draws do not depend on its neighbours.
    streams = [torch.Generator().manual_seed(config.seed) for _ in sources]

    def pick(logits: Tensor, alive: list[int]) -> Tensor:
        if config.temperature == 0:
            return logits.argmax(-1)
        p = distribution(logits.cpu(), config.temperature, config.top_k, config.top_p)
        u = [torch.rand((), generator=streams[i], dtype=torch.double) for i in alive]
        return choose(p, torch.stack(u))

    return write(advance, limits, pick, **ends)


def translate(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    lines: list[str],
    config: TranslateConfig,
    bar: tqdm | None = None,
    first: int = 1,
) -> list[str]:
    """The translations, in order: one for each line, and whatever the batch, that of the line
    alone. Sentences of similar length share a batch. An empty line stays empty; of a line that is
    longer than the model reads, the beginning is translated, and its number told (`first` is that
    of lines[0])."""
    ids, most = [tokenizer.encode(line.strip()) for line in lines], model.config.block_size - 1
    for number, tokens in enumerate(ids, first):
        if len(tokens) > most:
            warning = f"note: line {number:,} has {len(tokens):,} tokens, the model reads {most}:"
            tqdm.write(f"{warning} the rest is left out", file=sys.stderr)
            del tokens[most:]
    order = sorted((i for i, tokens in enumerate(ids) if tokens), key=lambda i: len(ids[i]))
    texts, static = [""] * len(lines), None
    if decoding.pair_steps:
        rows = config.beam if config.temperature == 0 else 1
        static = decoding.pair_steps(model, rows, tokenizer.vocab_size)
    for start in range(0, len(order), config.batch_size):
        batch = order[start : start + config.batch_size]
        found = translate_ids(model, tokenizer, [ids[i] for i in batch], config, static)
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
    """Lines to print: exact match; BLEU (13a, cased) and chrF with their signatures."""
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


def evaluate(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    pairs: list[tuple[str, str]],
    config: TranslateConfig,
) -> list[str]:
    """What `figures` says of the translations of all the pairs, and how long they took."""
    begin = time.perf_counter()
    with tqdm(total=len(pairs), unit="sentence", disable=None) as bar:
        hypotheses = translate(model, tokenizer, [source for source, _ in pairs], config, bar)
    seconds = time.perf_counter() - begin
    return [
        *figures(hypotheses, [target for _, target in pairs]),
        f"{len(pairs) / seconds:,.1f} sentences/s",
    ]


def eval_pairs(config: TranslateConfig, train_config: dict) -> ParallelCorpus:
    """What --eval names: a named set, of which "test" is asked for, or one's own files, whole.
    The languages are those of --languages, else those of the training."""
    languages = config.languages
    if not languages and config.eval in ("multi30k", "wmt14"):
        languages = train_config.get("languages", "")
    return open_pairs(config.eval, Path(config.cache_dir), languages=languages, split="test")


def closing(model: nn.Module, tokenizer: AnyTokenizer, data: Pairs, folder: Path) -> list[str]:
    """What a training run ends with: the scores of greedy translations of unseen pairs."""
    pairs = list(islice(data.texts(), 2000))
    lines = evaluate(model, tokenizer, pairs, TranslateConfig(beam=1))
    return [f"{len(pairs):,} validation pairs, greedy:", *lines]


# ---- where the decoder looks ---------------------------------------------------------------------


@torch.no_grad()
def cross_attention(model: nn.Module, source: Tensor, tokens: Tensor) -> Tensor:
    """source (1, S), tokens (1, T) -> (L, H, T, S): how much each written position of each layer
    and head looks at each source position. Computed beside torch's attention, which keeps none."""
    weights: list[Tensor] = []

    def watch(attention: Attention, inputs: tuple, output: Tensor) -> None:
        x, memory = inputs[:2]
        q, k = attention.split(attention.q(x)), attention.split(attention.k(memory))
        weights.append((q @ k.transpose(-2, -1) * q.size(-1) ** -0.5).softmax(-1)[0])

    hooks = [block.cross.register_forward_hook(watch) for block in model.decoder]
    try:
        model.decode(tokens, model.encode(source))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(weights)


def draw_attention(
    model: nn.Module, tokenizer: AnyTokenizer, line: str, config: TranslateConfig, path: Path
) -> None:
    """Translates the line and draws the mean over layers and heads: source tokens across, written
    tokens down."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--attention needs matplotlib: pip install matplotlib") from error
    device, (start, end) = next(model.parameters()).device, start_and_end(tokenizer)
    source = tokenizer.encode(line.strip())[: model.config.block_size - 1]
    target = translate_ids(model, tokenizer, [source], config)[0]
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


# ---- the command line ----------------------------------------------------------------------------


def speak(
    model: nn.Module, tokenizer: AnyTokenizer, config: TranslateConfig, checkpoint: dict
) -> None:
    """What `sample.py` does with a translator: score, translate prompts, or translate stdin."""
    if config.attention and not config.prompt:
        raise ValueError(f"--attention {config.attention} draws a sentence: add --prompt")
    if config.attention:
        path = new_file("attention", config.attention)
        if path.suffix.lower() not in PICTURES:
            raise ValueError(f"--attention {path} is no picture: end it in {', '.join(PICTURES)}")
    if config.eval and config.prompt:
        raise ValueError("--eval and --prompt are two things to do: give one of them")
    if config.eval:
        corpus = eval_pairs(config, checkpoint["train_config"])
        print(f"{config.eval}: {corpus.rule}; {config.search}", flush=True)
        print("\n".join(evaluate(model, tokenizer, list(corpus.pairs("test")), config)))
    elif config.prompt:
        print("\n".join(translate(model, tokenizer, config.prompt, config)))
        if config.attention:
            path = Path(config.attention)
            draw_attention(model, tokenizer, config.prompt[0], config, path)
            print(f"cross-attention of {config.prompt[0]!r}: {path}", file=sys.stderr)
    else:

        def answer(lines: list[str], bar: tqdm, first: int) -> list[str]:
            return translate(model, tokenizer, lines, config, bar, first)

        answer_stdin(answer, 16 * config.batch_size, "sentence")
