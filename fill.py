"""What a trained BERT says of text: words for a [MASK], whether one sentence follows another,
embeddings of lines and the lines that are most alike, its scores on unseen text.

All of it reads a text as training does (`encode_text`), between [CLS] and [SEP]. An embedding is
one vector for a text; the mean of the last layer serves better than [CLS] where nothing was
fine-tuned for it (Reimers and Gurevych 2019, arXiv:1908.10084, section 4). Axes as in `model.py`.

Left out: words of several tokens at one [MASK], and drawing the masked words one after another.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from data.buckets import pad_rows
from data.download import replacing
from data.encoding import CLS, MASK, PAD, SEP, assemble, encode_text
from data.lines import answer_stdin, lines_of, new_file
from data.masked import MaskedText
from data.sentence_pairs import NEXT, fit
from data.sentences import NAMES, open_sentences
from data.tokens import AnyTokenizer, tokenize
from engine import cli
from engine.evaluation import print_scores
from heads import mean_pooled
from wordpiece import WordPiece

POOLINGS = ("mean", "cls")
VERDICT = ", or give two prompts without one to hear whether the second follows the first"
SCORES = 2**22  # similarities that are held, and sorted, at a time


@dataclass
class FillConfig:
    checkpoint: str = ""  # the file to load; empty: the newest below out/
    prompt: list[str] = field(default_factory=list)  # with [MASK]; or two without; none: read stdin
    top: int = 5  # words for each [MASK], or similar lines for each query
    embed: str = ""  # write an embedding of each line of this file, instead of filling in
    out: str = "embeddings.npy"  # where --embed writes them: float32, (lines, n_embd)
    similar: tuple[str, str] = ()  # two files: for each line of the first, the nearest in the other
    pooling: str = "mean"  # an embedding is the mean over all tokens, or cls: that of [CLS]
    eval: str = ""  # score instead: pydocs, wikitext, wikitext103, or a path, scored whole
    layout: str = (
        ""  # of the path of --eval: lines, prose, paragraphs, wikitext; empty: by the text
    )
    nsp: bool | None = None  # score pairs of sentences; false: packed text; auto: as in training
    cache_dir: str = "data/cache"  # where --eval keeps downloads and token files
    batch_size: int = 64  # texts at a time
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        cli.check_ranges(self, {"top": (1, None), "batch_size": (1, 2**20)})
        if self.pooling not in POOLINGS:
            raise ValueError(f"--pooling {self.pooling} is not known: choose {', '.join(POOLINGS)}")


# ---- texts -> tokens -> features -----------------------------------------------------------------


def encode_prompt(tokenizer: AnyTokenizer, prompt: str) -> list[int]:
    """Ids of a prompt as `encode_text` has them, but each [MASK] is that token. The space before it
    is dropped, for it belongs to the token of the hidden word."""
    if isinstance(tokenizer, WordPiece):
        return tokenizer.encode(prompt, MASK)
    *before, last = f" {' '.join(prompt.split())}".split(MASK)
    ids = []
    for part in before:
        ids += [*tokenizer.encode(part.removesuffix(" ")), tokenizer.special_tokens[MASK]]
    return ids + tokenizer.encode(last)


def framed(model: nn.Module, tokenizer: AnyTokenizer, texts: list[list[int]]) -> list[np.ndarray]:
    """[CLS] ids [SEP] of each text, cut at its end to what the model reads, and that is told."""
    special, most = tokenizer.special_tokens, model.config.block_size - 2
    long = sum(len(ids) > most for ids in texts)
    if long:
        note = f"note: {long:,} of {len(texts):,} texts have more than the {most} tokens that the"
        tqdm.write(f"{note} model reads: their ends are left out", file=sys.stderr)
    parts = [np.array(ids[:most], dtype=np.int64) for ids in texts]
    return [assemble([part], special[CLS], special[SEP])[0] for part in parts]


@torch.no_grad()
def read(
    model: nn.Module, rows: list[np.ndarray], pad: int, batch_size: int, bar: tqdm | None = None
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Yields (which rows, tokens (B, T), keep (B, T), features (B, T, C)) until all are read. Rows
    of similar length share a batch, so that little of it is padding."""
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        tokens, keep = (x.to(device) for x in pad_rows([rows[i] for i in batch], pad))
        yield batch, tokens, keep, model.features(tokens, keep=None if keep.all() else keep)
        if bar is not None:
            bar.update(len(batch))


# ---- masked words --------------------------------------------------------------------------------


@torch.no_grad()
def fill(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    prompts: list[str],
    config: FillConfig,
    bar: tqdm | None = None,
    first: int = 0,
) -> list[str]:
    """For each prompt its likeliest words, "length 34.1%, index 12.0%, …", and for a prompt with
    several masks such a line for each of them; whatever the batch, what the prompt gets alone.

    Every mask is asked for by itself, with the others hidden too. Only ordinary tokens are
    candidates, and their probabilities sum to 1. Raises ValueError for a prompt without a [MASK],
    or with one beyond what the model reads. `first`: prompts are lines of a text, this is the
    number of the first of them; such a line gets a note instead, and an empty answer.
    """
    mask, most = tokenizer.special_tokens[MASK], model.config.block_size - 2
    texts = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    for number, ids in enumerate(texts):
        if mask not in ids:
            wrong = f"has no {MASK}: put it in the place of one of the words"
        elif mask in ids[most:]:
            wrong = f"has a {MASK} beyond the {most} tokens that the model reads: shorten it"
        else:
            continue
        if not first:
            prompt = repr(prompts[number])  # of which a long one is told by its beginning
            prompt = prompt if len(prompt) < 100 else f"{prompt[:90]}…"
            raise ValueError(f"the prompt {prompt} {wrong}{VERDICT * (mask not in ids)}")
        tqdm.write(f"note: line {first + number:,} {wrong}", file=sys.stderr)
        texts[number] = []
    candidates = torch.tensor(tokenizer.ordinary_ids(), device=model.mlm_bias.device)
    answers = [""] * len(prompts)
    rows, pad = framed(model, tokenizer, texts), tokenizer.special_tokens[PAD]
    for batch, tokens, _, features in read(model, rows, pad, config.batch_size, bar):
        logits = model.mlm_logits(features[tokens == mask])[:, candidates].float()
        shares, places = logits.softmax(-1).topk(min(config.top, len(candidates)))
        found = zip(shares.tolist(), candidates[places].tolist(), strict=True)
        lines = iter([words(tokenizer, ids, p) for p, ids in found])
        for i, masks in zip(batch, (tokens == mask).sum(1).tolist(), strict=True):
            own = [next(lines) for _ in range(masks)]
            numbered = [f"{MASK} {n}: {line}" for n, line in enumerate(own, 1)]
            answers[i] = "\n".join(own if masks == 1 else numbered)
    return answers


def words(tokenizer: AnyTokenizer, ids: list[int], shares: list[float]) -> str:
    """Tokens and their probabilities, as people read them."""
    pairs = zip(ids, shares, strict=True)
    return ", ".join(f"{tokenizer.shown(i)} {share:.1%}" for i, share in pairs)


# ---- two sentences -------------------------------------------------------------------------------


@torch.no_grad()
def follows(model: nn.Module, tokenizer: AnyTokenizer, first: str, second: str) -> float:
    """The probability that the second text follows the first. Over-long ones are cut as in
    training, so that they still touch. ValueError for a model without that head."""
    if not model.config.nsp:
        raise ValueError(
            "this model was trained with --nsp=false and cannot say whether one prompt follows "
            f"another: put a {MASK} into each"
        )
    special, most = tokenizer.special_tokens, model.config.block_size - 3
    a, b = (np.array(encode_text(tokenizer, text), dtype=np.int64) for text in (first, second))
    if len(a) + len(b) > most:
        note = f"note: the two have {len(a) + len(b):,} tokens, the model reads {most}: the"
        print(f"{note} first loses its beginning or the second its end", file=sys.stderr)
    row = assemble(fit(a, b, most), special[CLS], special[SEP])
    tokens, segments = (torch.from_numpy(ids)[None].to(model.mlm_bias.device) for ids in row)
    return model.nsp_logits(model.features(tokens, segments)).float().softmax(-1)[0, NEXT].item()


# ---- embeddings ----------------------------------------------------------------------------------


@torch.no_grad()
def embed(
    model: nn.Module, tokenizer: AnyTokenizer, lines: list[str], pooling: str, batch_size: int
) -> np.ndarray:
    """(lines, C) float32, whatever the batch. "mean": over [CLS], the text and [SEP], never over
    padding; "cls": the last layer's [CLS]. An empty line is [CLS] [SEP]."""
    rows = framed(model, tokenizer, [encode_text(tokenizer, line) for line in lines])
    found = np.empty((len(lines), model.config.n_embd), dtype=np.float32)
    with tqdm(total=len(lines), desc="embedding", unit="line", disable=None) as bar:
        pad = tokenizer.special_tokens[PAD]
        for batch, _, keep, features in read(model, rows, pad, batch_size, bar):
            if pooling == "cls":
                pooled = features[:, 0]
            else:
                pooled = mean_pooled(features, keep)
            found[batch] = pooled.float().cpu().numpy()
    return found


def similarities(queries: np.ndarray, corpus: np.ndarray, top: int) -> tuple[np.ndarray, ...]:
    """(Q, C), (N, C) -> cosine similarities (Q, top), best first, and rows of the corpus (Q, top),
    of equals the earlier one first; top is N at most."""
    queries, corpus = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, corpus))
    best, lines = [], []
    some = max(1, SCORES // len(corpus))
    for start in range(0, len(queries), some):
        scores = queries[start : start + some] @ corpus.T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        best.append(np.take_along_axis(scores, order, axis=1))
        lines.append(order)
    return np.concatenate(best), np.concatenate(lines)


def is_embeddings(path: Path, width: int) -> bool:
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError):
        return False
    return found.dtype == np.float32 and found.ndim == 2 and found.shape[1] == width


def write_embeddings(model: nn.Module, tokenizer: AnyTokenizer, config: FillConfig) -> None:
    path = new_file("out", config.out, partial(is_embeddings, width=model.config.n_embd))
    lines = lines_of("embed", config.embed)
    found = embed(model, tokenizer, lines, config.pooling, config.batch_size)
    with replacing(path) as file:
        np.save(file, found)
    print(f"{len(lines):,} embeddings of {found.shape[1]} numbers: {path}")


def print_similar(model: nn.Module, tokenizer: AnyTokenizer, config: FillConfig) -> None:
    queries, corpus = (lines_of("similar", path) for path in config.similar)
    vectors = (
        embed(model, tokenizer, lines, config.pooling, config.batch_size)
        for lines in (queries, corpus)
    )
    for query, scores, found in zip(queries, *similarities(*vectors, config.top), strict=True):
        print(query.strip())
        for score, i in zip(scores, found, strict=True):
            print(f" {score:6.3f}  line {i + 1}: {corpus[i].strip()}")


# ---- scores --------------------------------------------------------------------------------------


def eval_data(
    model: nn.Module, tokenizer: AnyTokenizer, config: FillConfig, row_length: int = 0
) -> MaskedText:
    """What --eval names: the validation part of a named text, or one's own, whole."""
    nsp = model.config.nsp if config.nsp is None else config.nsp
    if nsp and not model.config.nsp:
        raise ValueError(
            "--nsp asks for pairs of sentences, but this model was trained with --nsp=false and "
            "has no head for them: leave the flag out"
        )
    valid = "" if config.eval in NAMES else config.eval
    if valid and not Path(valid).exists():
        known = ", ".join(NAMES)
        raise ValueError(f"--eval {valid} is no file or folder here, nor one of {known}")
    cache = Path(config.cache_dir)
    more = {"layout": config.layout, "by_sentence": nsp}
    corpus = open_sentences(config.eval, cache, valid=valid, **more)
    file = tokenize(corpus, "validation", tokenizer, cache, SEP)
    sizes = {"block_size": model.config.block_size, "row_length": row_length, "nsp": nsp}
    return MaskedText(file, corpus, "validation", tokenizer, batch_size=config.batch_size, **sizes)


# ---- the command line ----------------------------------------------------------------------------


def speak(model: nn.Module, tokenizer: AnyTokenizer, config: FillConfig, checkpoint: dict) -> None:
    """What `sample.py` does with a BERT: one of the flags' jobs, else words for lines of stdin."""
    jobs = [f"--{name}" for name in ("prompt", "embed", "similar", "eval") if getattr(config, name)]
    if len(jobs) > 1:
        raise ValueError(f"{' and '.join(jobs)} are {len(jobs)} things to do: give one of them")
    if config.eval:
        data = eval_data(model, tokenizer, config, checkpoint["train_config"]["row_length"])
        print_scores(model, data, config.eval)
    elif config.embed:
        write_embeddings(model, tokenizer, config)
    elif config.similar:
        print_similar(model, tokenizer, config)
    elif "mlm_dense.weight" in checkpoint.get("fresh", ()):
        raise ValueError(
            "this encoder came without the head that fills in words, or judges sentences: train it "
            "with --init, or ask for --embed and --similar"
        )
    elif len(config.prompt) == 2 and not any(MASK in prompt for prompt in config.prompt):
        print(f"the second follows the first: {follows(model, tokenizer, *config.prompt):.1%}")
    elif config.prompt:
        print("\n".join(fill(model, tokenizer, config.prompt, config)))
    else:

        def answer(lines: list[str], bar: tqdm, first: int) -> list[str]:
            return fill(model, tokenizer, lines, config, bar, first)

        answer_stdin(answer, 16 * config.batch_size, "line")
