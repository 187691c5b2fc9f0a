"""Masked words: BERT's pretraining. Some words of a text are hidden, and the model predicts them;
in pairs of sentences it also predicts whether the second follows the first. A trained model finds
the word for a [MASK], says whether one sentence follows another, or gives embeddings
(`tasks/similar.py`).

The rows, pairs of sentences or packed text, come from `data/sentence_pairs.py`; here they get [CLS]
and [SEP], are masked, and become batches of similar length.

Masking is as in Devlin et al. 2019 (arXiv:1810.04805, section 3.1 and appendix A.1), and dynamic
as in RoBERTa (arXiv:1907.11692, section 4.1): other words are hidden in every epoch. It is a pure
function of (seed, epoch, row), like every other random choice here.

A trained model reads a text as in training (`encode_text`), between [CLS] and [SEP]. An embedding
is one vector for a text; the mean of the last layer serves better than [CLS] in a model that was
not fine-tuned for it (Reimers and Gurevych 2019, arXiv:1908.10084, section 4).

Left out: words of more than one token at a [MASK], and drawing the masked words one after another.

Axes as in `model.py`; N counts the masked positions of a batch.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from numpy.random import Generator
from torch import Tensor
from tqdm import tqdm

from bert import BERTConfig
from data.buckets import InBuckets, evenly_within, pad_rows
from data.encoding import CLS, MASK, PAD, SEP, SPECIAL, assemble, encode_text
from data.sentence_pairs import NEXT, PackedText, SentencePairs, truncate_pair
from data.sentences import NAMES, SentenceCorpus, open_sentences
from data.tokens import AnyTokenizer, TokenFile, both_splits, settings, tokenize
from tasks.encoders import answer_texts, answered
from tasks.flags import DEVICES, TrainConfig, check, choice, ranged
from tasks.similar import framed, print_similar, row_features, write_embeddings
from wordpiece import WordPiece

EVALUATED_RATE = 0.15  # share of tokens asked for in evaluations, so that all runs compare
# Shares of the chosen tokens that become [MASK] and a random token; the others stay.
HIDDEN, REPLACED = 0.8, 0.1

# ---- the data ------------------------------------------------------------------------------------


@dataclass
class Flags(TrainConfig):
    data: str = "pydocs"  # pydocs, wikitext, wikitext103, or a path: .txt, .jsonl, .gz or a folder
    valid: str = ""  # validation text, as for --data; empty: some of --data's documents
    layout: str = ""  # lines, prose, paragraphs or wikitext (data/layouts.py); empty: by the text
    # share of the tokens that training asks for; an evaluation: 0.15
    mlm_rate: float = ranged(EVALUATED_RATE, above=0, below=1)
    whole_words: bool = False  # hide all tokens of a word, or none
    row_length: int = ranged(0, 0)  # most tokens of a row, block_size at most; 0: that many


class Data(InBuckets):
    """Batches of masked rows of similar length; where row_length is less, a step has more rows.

    Validation: in order, always with the same rows and masks, at 15% of the tokens; if max_tokens
    is less than the text, evenly spaced rows of it.
    """

    special_tokens = SPECIAL

    def __init__(
        self,
        file: TokenFile,
        corpus: SentenceCorpus,
        split: str,
        tokenizer: AnyTokenizer,
        *,
        block_size: int,
        batch_size: int,
        nsp: bool = True,
        mlm_rate: float = EVALUATED_RATE,
        whole_words: bool = False,
        row_length: int = 0,
        tokens_per_step: int = 0,
        seed: int = 0,
        max_tokens: int = 0,
    ):
        training, T = split == "train", min(row_length or block_size, block_size)
        self.tokenizer, self.fingerprint, self.split = tokenizer, corpus.hash, split
        # Prompts that are too long for the model are left out: their [MASK] might be cut off.
        fits = [p for p in corpus.prompts if len(tokenizer.encode(p)) < block_size - 2]
        self.prompts, self.rule = fits, corpus.rule
        self.seed = seed if training else 0
        self.rate = mlm_rate if training else EVALUATED_RATE
        what = f"the {'training' if training else 'validation'} text of {corpus.name}"
        border = tokenizer.special_tokens[SEP]
        place = {"seed": self.seed, "what": what}
        if nsp:
            self.rows = SentencePairs(file.ids, border, T, **place)
        else:
            self.rows = PackedText(file.ids, border, T, training=training, **place)
        lengths, self.n_all = self.rows.lengths, len(self.rows.lengths)
        limit = 0 if training else max_tokens
        self.chosen = evenly_within(self.n_all, int(lengths.sum()), limit)
        self.make_buckets(
            lengths[self.chosen],
            split,
            block_size=block_size,
            batch_size=batch_size,
            tokens_per_step=tokens_per_step,
            seed=self.seed,
        )
        self.masking = Masking(tokenizer, whole_words and training)

    @classmethod
    def splits(cls, flags: Flags, sizes: dict, tokenizer: AnyTokenizer | None = None):
        """(train, validation); the tokenizer is learnt from the training text unless given."""
        nsp, place = sizes["nsp"], {"valid": flags.valid, "layout": flags.layout}
        corpus = open_sentences(flags.data, Path(flags.cache_dir), by_sentence=nsp, **place)
        more = settings(flags, sizes, "tokens_per_step", "mlm_rate", "whole_words", "row_length")
        more |= {"special_tokens": cls.special_tokens, "border": SEP, "nsp": nsp}
        return both_splits(cls, corpus, flags, sizes, tokenizer, **more)

    def batch(self, i: int) -> dict[str, Tensor]:
        """{"tokens": (B, T), "mlm_positions": (N,), "mlm_targets": (N,)}, the positions in the
        flattened (B·T) batch; for pairs also "segments": (B, T) and "nsp_targets": (B,); if some
        rows are shorter than others, "keep": (B, T), False at padding."""
        epoch, rows, empty = self.buckets.batch(i)
        special = self.tokenizer.special_tokens
        inputs, segments, labels, positions, targets = [], [], [], [], []
        for row in self.chosen[rows]:
            # row + 1: numpy pads seeds with zeros, and (seed, epoch) is that of the epoch's order.
            random = np.random.default_rng((self.seed, epoch, row + 1))
            parts, label = self.rows.row(epoch, row, random)
            ids, segment = assemble(parts, special[CLS], special[SEP])
            hidden, places = self.masking(ids, self.rate, random)
            inputs.append(hidden)
            segments.append(segment)
            labels.append(label)
            positions.append(places)
            targets.append(ids[places])
        tokens, keep = pad_rows(inputs, special[PAD])
        starts = np.arange(len(rows)) * tokens.size(1)
        found = np.concatenate([p + s for p, s in zip(positions, starts, strict=True)])
        batch = {
            "tokens": tokens,
            "mlm_positions": torch.from_numpy(found),
            "mlm_targets": torch.from_numpy(np.concatenate(targets)),
        }
        if labels[0] is not None:
            batch["segments"], _ = pad_rows(segments, 0)
            batch["nsp_targets"] = torch.tensor(labels)
        if not keep.all():
            batch["keep"] = keep
        if empty:
            for name in batch:
                if name.endswith("targets"):
                    batch[name].fill_(-100)
        return batch

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """Losses in nats per target, their sum, MLM's perplexity, shares of right predictions."""
        mean = {name: s / max(counts[name.partition("_")[0]], 1) for name, s in sums.items()}
        report = {"loss": mean["mlm"] + mean.get("nsp", 0.0), **mean}
        return {**report, "perplexity": math.exp(min(mean["mlm"], 700))}

    def describe(self) -> str:
        lengths = self.buckets.lengths
        text = self.rows.describe(self.chosen)
        if len(self.chosen) < self.n_all:
            text += f", evenly spaced among {self.n_all:,}"
        text += f", {lengths.sum():,} tokens, {self.rate:.0%} of them asked for"
        text += self.buckets.describe()
        return text


class Masking:
    """Hides some of a row's tokens, never a special one.

    whole_words: all tokens of a word are hidden or none. Two neighbours are of one word where it
    could go on behind the one and before the other (the tokenizer's word_edges). A word of more
    tokens than are to be hidden in its row never is. In text without spaces, such as Chinese, words
    are as long as sentences; where none fits, it is masked token by token.
    """

    def __init__(self, tokenizer: AnyTokenizer, whole_words: bool = False):
        self.mask = tokenizer.special_tokens[MASK]
        self.ordinary = np.zeros(tokenizer.vocab_size, dtype=bool)
        self.ordinary[tokenizer.ordinary_ids()] = True
        self.vocabulary = np.flatnonzero(self.ordinary)
        self.whole_words = whole_words
        if whole_words:
            self.starts, self.ends = (np.zeros(tokenizer.vocab_size, dtype=bool) for _ in "ab")
            for i in self.vocabulary:
                self.starts[i], self.ends[i] = tokenizer.word_edges(i)

    def __call__(
        self, ids: np.ndarray, rate: float, random: Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """ids (L,) -> (ids with some of them changed, the places (N,) of the chosen tokens). On
        average these are `rate` of the ordinary tokens; they are one at least."""
        places = np.flatnonzero(self.ordinary[ids])
        count = max(1, int(rate * len(places) + random.random()))
        chosen = places[np.sort(self.choose(ids[places], count, random))]
        hidden, draws = ids.copy(), random.random(len(chosen))
        hidden[chosen[draws < HIDDEN]] = self.mask
        replaced = chosen[(draws >= HIDDEN) & (draws < HIDDEN + REPLACED)]
        words = random.integers(len(self.vocabulary), size=len(replaced))  # faster than choice()
        hidden[replaced] = self.vocabulary[words]
        return hidden, chosen

    def choose(self, ids: np.ndarray, count: int, random: Generator) -> np.ndarray:
        """`count` indices into ids; with whole words, as many words as fit into that number."""
        if self.whole_words and len(ids):
            inside = np.append(False, self.ends[ids[:-1]] & self.starts[ids[1:]])
            word = np.cumsum(~inside) - 1
            size = np.bincount(word)
            order = random.permutation(np.flatnonzero(size <= count))
            taken = order[np.cumsum(size[order]) <= count]
            if len(taken):
                return np.flatnonzero(np.isin(word, taken))
        return random.permutation(len(ids))[:count]


# ---- the score -----------------------------------------------------------------------------------

GOAL, LOWER_IS_BETTER = "loss", True

# ---- sample.py: words for a [MASK], two sentences, embeddings ------------------------------------

POOLINGS = ("mean", "cls")
VERDICT = ", or give two prompts without one to hear whether the second follows the first"


@dataclass
class SampleFlags:
    checkpoint: str = ""  # the file to load; empty: the newest below out/
    prompt: list[str] = field(default_factory=list)  # with [MASK]; or two without; none: read stdin
    top: int = ranged(5, 1)  # words for each [MASK], or similar lines for each query
    embed: str = ""  # write an embedding of each line of this file, instead of filling in
    out: str = "embeddings.npy"  # where --embed writes them: float32, (lines, n_embd)
    similar: tuple[str, str] = ()  # two files: for each line of the first, the nearest in the other
    # an embedding is the mean over all tokens, or cls: that of [CLS]
    pooling: str = choice("mean", *POOLINGS)
    eval: str = ""  # score instead: pydocs, wikitext, wikitext103, or a path, scored whole
    # of the path of --eval: lines, prose, paragraphs, wikitext; empty: by the text
    layout: str = ""
    nsp: bool | None = None  # score pairs of sentences; false: packed text; auto: as in training
    cache_dir: str = "data/cache"  # where --eval keeps downloads and token files
    batch_size: int = ranged(64, 1, 2**20)  # texts at a time
    device: str = choice("auto", *DEVICES)  # auto, cpu, cuda or mps

    def __post_init__(self):
        check(self)
        jobs = [f"--{x}" for x in ("prompt", "embed", "similar", "eval") if getattr(self, x)]
        if len(jobs) > 1:
            raise ValueError(f"{' and '.join(jobs)} are {len(jobs)} things to do: give one of them")


def sample(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    flags: SampleFlags,
    checkpoint: dict,
    score: Callable[[Data], None],
) -> None:
    """Does what one of the flags asks for; without one, finds words for lines of standard input."""
    if flags.eval:
        score(eval_data(model, tokenizer, flags, checkpoint["train_config"]["row_length"]))
    elif flags.embed:
        write_embeddings(model, tokenizer, flags, flags.pooling)
    elif flags.similar:
        print_similar(model, tokenizer, flags, flags.pooling)
    elif "mlm_dense.weight" in checkpoint.get("fresh", ()):
        raise ValueError(
            "this encoder came without the head that fills in words, or judges sentences: train it "
            "with --init, or ask for --embed and --similar"
        )
    elif len(flags.prompt) == 2 and not any(MASK in prompt for prompt in flags.prompt):
        print(f"the second follows the first: {follows(model, tokenizer, *flags.prompt):.1%}")
    else:
        answer_texts(fill_mask, model, tokenizer, flags)


def eval_data(
    model: nn.Module, tokenizer: AnyTokenizer, flags: SampleFlags, row_length: int = 0
) -> Data:
    """The data that --eval names: the validation part of a named text, or all of one's own."""
    nsp = model.config.nsp if flags.nsp is None else flags.nsp
    if nsp and not model.config.nsp:
        raise ValueError(
            "--nsp asks for pairs of sentences, but this model was trained with --nsp=false and "
            "has no head for them: leave the flag out"
        )
    valid = "" if flags.eval in NAMES else flags.eval
    if valid and not Path(valid).exists():
        known = ", ".join(NAMES)
        raise ValueError(f"--eval {valid} is no file or folder here, nor one of {known}")
    cache = Path(flags.cache_dir)
    more = {"layout": flags.layout, "by_sentence": nsp}
    corpus = open_sentences(flags.eval, cache, valid=valid, **more)
    file = tokenize(corpus, "validation", tokenizer, cache, SEP)
    sizes = {"block_size": model.config.block_size, "row_length": row_length, "nsp": nsp}
    return Data(file, corpus, "validation", tokenizer, batch_size=flags.batch_size, **sizes)


def encode_prompt(tokenizer: AnyTokenizer, prompt: str) -> list[int]:
    """The ids that `encode_text` gives a prompt, but each [MASK] is that token. The space before it
    is dropped, because it belongs to the token of the hidden word."""
    if isinstance(tokenizer, WordPiece):
        return tokenizer.encode(prompt, MASK)
    *before, last = f" {' '.join(prompt.split())}".split(MASK)
    ids = []
    for part in before:
        ids += [*tokenizer.encode(part.removesuffix(" ")), tokenizer.special_tokens[MASK]]
    return ids + tokenizer.encode(last)


@torch.no_grad()
def fill_mask(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    prompts: Sequence[str],
    flags: SampleFlags,
    bar: tqdm | None = None,
    first_line: int = 0,
) -> list[str]:
    """For each prompt its likeliest words, "length 34.1%, index 12.0%, …", or such a line for each
    of its masks. The answer is the one that a prompt gets alone, whatever else is in its batch.

    Every mask is filled in by itself, while the others stay hidden. Only ordinary tokens are
    candidates, and their probabilities sum to 1. Raises ValueError for a prompt without a [MASK],
    or with one beyond what the model reads. But where the prompts are lines of standard input
    (first_line > 0 is the number of the first), such a line gets a note and an empty answer.
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
        if not first_line:
            prompt = repr(prompts[number])  # the beginning of a long one is enough
            prompt = prompt if len(prompt) < 100 else f"{prompt[:90]}…"
            raise ValueError(f"the prompt {prompt} {wrong}{VERDICT * (mask not in ids)}")
        tqdm.write(f"note: line {first_line + number:,} {wrong}", file=sys.stderr)
        texts[number] = []
    candidates = torch.tensor(tokenizer.ordinary_ids(), device=model.mlm_bias.device)
    answers = [""] * len(prompts)
    rows, pad = framed(model, tokenizer, texts), tokenizer.special_tokens[PAD]
    for batch, tokens, _, features in row_features(model, rows, pad, flags.batch_size, bar):
        logits = model.mlm_logits(features[tokens == mask])[:, candidates].float()
        shares, places = logits.softmax(-1).topk(min(flags.top, len(candidates)))
        found = zip(shares.tolist(), candidates[places].tolist(), strict=True)
        lines = iter([format_words(tokenizer, ids, p) for p, ids in found])
        for i, masks in zip(batch, (tokens == mask).sum(1).tolist(), strict=True):
            own = [next(lines) for _ in range(masks)]
            numbered = [f"{MASK} {n}: {line}" for n, line in enumerate(own, 1)]
            answers[i] = "\n".join(own if masks == 1 else numbered)
    return answers


def format_words(tokenizer: AnyTokenizer, ids: list[int], shares: list[float]) -> str:
    """Tokens and their probabilities, as people read them."""
    pairs = zip(ids, shares, strict=True)
    return ", ".join(f"{tokenizer.shown(i)} {share:.1%}" for i, share in pairs)


@torch.no_grad()
def follows(model: nn.Module, tokenizer: AnyTokenizer, first: str, second: str) -> float:
    """The probability that the second text follows the first. Texts that are too long are cut as in
    training, so that they still touch. Raises ValueError for a model without the NSP head."""
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
    row = assemble(truncate_pair(a, b, most), special[CLS], special[SEP])
    tokens, segments = (torch.from_numpy(ids)[None].to(model.mlm_bias.device) for ids in row)
    return model.nsp_logits(model.features(tokens, segments)).float().softmax(-1)[0, NEXT].item()


# ---- when a run ends, and before it begins -------------------------------------------------------


def show(model: nn.Module, tokenizer: AnyTokenizer, data: Data, folder: Path) -> list[str]:
    """Each of the data's prompts with its likeliest words."""
    return answered(fill_mask, model, tokenizer, data.prompts, SampleFlags())


def ask(prompts: Sequence[str]) -> tuple[str, ...]:
    return ("--prompt", prompts[0]) if prompts else ()


def batch_shapes(flags: Flags, config: BERTConfig, B: int, T: int) -> dict[str, tuple[int, ...]]:
    """The shapes for pairs of sentences, or for packed text, which has no padding."""
    masked = (max(1, round(flags.mlm_rate * B * T)),)
    shapes = {"tokens": (B, T), "mlm_positions": masked, "mlm_targets": masked}
    if config.nsp:
        shapes |= {"segments": (B, T), "keep": (B, T), "nsp_targets": (B,)}
    return shapes
