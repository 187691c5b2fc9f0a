"""Texts that mean the same: an encoder turns each text into a vector, so that texts of the same
meaning have similar vectors. These are written to a file, or compared.

It learns from pairs. In a batch of B pairs (a, b), each a shall be nearest to its own b; the other
B - 1 are its negatives (in-batch negatives: Henderson et al. 2017, arXiv:1705.00652, section 4.4;
the loss is InfoNCE, van den Oord et al. 2018, arXiv:1807.03748, and MultipleNegativesRankingLoss in
sentence-transformers, Reimers and Gurevych 2019, arXiv:1908.10084). A pair of a text with itself is
allowed: dropout makes two views of it (SimCSE, Gao et al. 2021, arXiv:2104.08821).

Here the size of a batch belongs to the task: more pairs are more negatives and a larger loss, which
is log B by chance. So a step is one batch. Dividing it into micro-batches or between processes
would change the negatives, and is refused.

A text that means the same as a pair must not be its negative. Texts that the table joins, directly
or by other pairs (a-b and b-c join a with c), are one group. A batch has one pair of a group, if
possible; the pairs of a group that it has twice are not asked for.

Left out: negatives that the table names, graded similarity (every row means "the same": a column
that says otherwise is not looked at), negatives gathered from all processes, other losses.

Axes as in `model.py`; N counts texts.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bert import Encoder, EncoderConfig, init_bert
from data.buckets import evenly_within, pad_rows
from data.download import replacing
from data.encoding import CLS, PAD, SEP, SPECIAL, assemble, encode_text
from data.lines import lines_of, new_file
from data.tables import Row, TableCorpus, open_tables
from data.tokens import SPLITS, AnyTokenizer, get_tokenizer, settings
from tasks.encoders import pad_batch
from tasks.flags import DEVICES, FinetuneConfig, check, choice, ranged
from tasks.whole import whole_file

FORMS = [("a", "b"), ("text", "text_b"), ("sentence1", "sentence2")]
SHOWN = 3  # pairs, after training

# ---- the network ---------------------------------------------------------------------------------


class Similarity(Encoder):
    """An embedding for each text, the mean of its features. Training makes each text nearer to its
    own partner than to those of the other rows."""

    Config = EncoderConfig
    TEMPERATURE = 0.05  # the divisor of the cosines

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        init_bert(self)

    def forward(
        self, tokens: Tensor, keep: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """tokens (N, T) -> embeddings (N, C); or, given targets (B,), {"loss": summed loss,
        "accuracy": number of texts that are nearest to their partner}, and in evaluation also
        "predicted" (2B, C), the embeddings. Then N = 2B, and the partner of row j of the first half
        is row targets[j] of the second."""
        embeddings = mean_pooled(self.features(tokens, keep=keep), keep)
        if targets is None:
            return embeddings
        a, b = F.normalize(embeddings.float(), dim=-1).chunk(2)
        scores = a @ b.T / self.TEMPERATURE
        loss = F.cross_entropy(scores, targets, reduction="sum")
        sums = {"loss": loss, "accuracy": (scores.argmax(-1) == targets).sum()}
        return sums if self.training else {**sums, "predicted": embeddings}


def mean_pooled(features: Tensor, keep: Tensor | None) -> Tensor:
    """features (N, T, C), keep (N, T) -> (N, C): the mean over all positions but padding."""
    if keep is None:
        return features.mean(1)
    return (features * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)


# ---- the data ------------------------------------------------------------------------------------


@dataclass
class Flags(FinetuneConfig):
    # tokens of one optimizer step: as many pairs as fit, all negatives
    tokens_per_step: int = ranged(8192, 1, 2**26)
    # sequences in a micro-batch, at most; a step must be one
    batch_size: int = ranged(1024, 1, 2**20)
    row_length: int = ranged(64, 0)  # most tokens of a text, block_size at most; 0: that many


class Data:
    """Batches of a fixed number of pairs: as many as fit into tokens_per_batch = batch_size ·
    block_size if all 2B texts have row_length tokens; longer texts are cut. A smaller row_length
    means more negatives. Each pair comes once an epoch, in a random batch: batches of similar
    lengths would have less padding, but the same pairs together in every epoch.

    Validation: always the same batches; if max_tokens is less than all, evenly spaced pairs.
    """

    special_tokens = SPECIAL

    def __init__(
        self,
        corpus: TableCorpus,
        split: str,
        tokenizer: AnyTokenizer,
        *,
        block_size: int,
        batch_size: int,
        row_length: int = 0,
        tokens_per_step: int = 0,
        seed: int = 0,
        max_tokens: int = 0,
    ):
        self.training, self.row_length = split == "train", min(row_length or block_size, block_size)
        self.tokenizer, self.split, self.seed = tokenizer, split, seed
        self.fingerprint, self.rule = corpus.hash, corpus.rule
        shown = corpus.splits["validation"][:SHOWN]
        self.prompts = [text for row in shown for text in row.texts]
        self.tokens_per_batch = batch_size * block_size
        if self.training and tokens_per_step not in (0, self.tokens_per_batch):
            raise ValueError(
                f"--tokens_per_step {tokens_per_step} is divided into micro-batches of "
                f"{self.tokens_per_batch} tokens, and pairs of different ones would be no "
                f"negatives: choose --batch_size {max(1, tokens_per_step // block_size)} and a "
                "single process"
            )
        most_pairs = self.tokens_per_batch // (2 * self.row_length)
        if most_pairs < 2 or self.row_length < 3:
            raise ValueError(
                f"a step of {self.tokens_per_batch} tokens has no two pairs of texts of "
                f"{self.row_length} tokens (3 at least): choose another --tokens_per_step or "
                "--row_length"
            )
        bar = tqdm(corpus.splits[split], f"tokenizing {split}", unit=" pairs", disable=None)
        pairs = [tuple(encode_text(tokenizer, text) for text in row.texts) for row in bar]
        self.n_all, most = len(pairs), self.row_length - 2  # between [CLS] and [SEP]
        tokens = sum(min(len(text), most) + 2 for pair in pairs for text in pair)
        limit = 0 if self.training else max_tokens
        # A single pair would have no negatives.
        pairs = [pairs[i] for i in evenly_within(self.n_all, tokens, limit, least=2)]
        self.cut = sum(len(text) > most for pair in pairs for text in pair)
        self.pairs = [[framed_text(tokenizer, text, most) for text in pair] for pair in pairs]
        self.n_batches = math.ceil(len(pairs) / most_pairs)
        self.tokens_per_epoch = self.n_batches * self.tokens_per_batch
        self.group, self.b_number = groups(pairs)
        self.epochs: dict[int, np.ndarray] = {}
        self.asked = sum(int(self.has_negatives(self.rows(i)).sum()) for i in range(self.n_batches))
        if not self.asked:
            raise ValueError(
                f"none of the {len(pairs):,} pairs of {corpus.name} for {split} has a negative, a "
                "text of other meaning in its batch: give more pairs"
            )

    @classmethod
    def splits(cls, flags: Flags, sizes: dict, tokenizer: AnyTokenizer | None = None):
        """(train, validation) of a table with the columns a and b (or other names in FORMS); a
        tokenizer is learnt from the training pairs unless given."""
        corpus = open_tables(flags.data, flags.valid, FORMS, collapse=True)
        # With a space in front, as `encode_text` reads texts.
        spaced = [Row(line, tuple(f" {x}" for x in xs)) for line, xs in corpus.splits["train"]]
        learnt = replace(corpus, splits={"train": spaced})
        tokenizer = tokenizer or get_tokenizer(flags, sizes, learnt, cls.special_tokens)
        more = settings(flags, sizes, "row_length", "tokens_per_step")
        return tuple(cls(corpus, split, tokenizer, **more) for split in SPLITS)

    def rows(self, i: int) -> np.ndarray:
        """The indices of the pairs of batch i. All pairs are put in line, group after group, and
        dealt to the batches in turn: two of a group meet only if it has more pairs than there are
        batches."""
        epoch, i = divmod(i, self.n_batches)
        if epoch not in self.epochs:
            place = np.arange(self.group.max() + 1)
            if self.training:
                place = np.random.default_rng((self.seed, epoch)).permutation(place)
            self.epochs = {k: v for k, v in self.epochs.items() if abs(k - epoch) < 2}
            self.epochs[epoch] = np.argsort(place[self.group], kind="stable")
        return self.epochs[epoch][i :: self.n_batches]

    def has_negatives(self, rows: np.ndarray) -> np.ndarray:
        """(B,) bool: whether a pair's group is in the batch only once, with other groups."""
        return (np.bincount(self.group[rows])[self.group[rows]] == 1) & (len(rows) > 1)

    def batch(self, i: int) -> dict[str, Tensor]:
        """{"tokens": (2B, T), all a before all b, "targets": (B,)}; if some texts are shorter than
        others, also "keep": (2B, T), False at padding. targets[j] is j, since row B + j belongs to
        row j; it is -100 where the batch has a group twice."""
        rows = self.rows(i)
        texts = [self.pairs[row][side] for side in (0, 1) for row in rows]
        targets = np.where(self.has_negatives(rows), np.arange(len(rows)), -100)
        return {**pad_batch(texts, self.tokenizer), "targets": torch.from_numpy(targets)}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The loss in nats per a, and the share of them whose nearest b in the batch is their own.
        Both depend on the number of pairs in a batch; the figures of `measure` do not."""
        return {name: sums[name] / max(counts["loss"], 1) for name in ("loss", "accuracy")}

    def measure(self, predicted: dict[int, np.ndarray]) -> dict[str, float]:
        """predicted[i] (2B, C), the vectors of the texts of each batch i -> the figures of
        `retrieval` for all pairs of the evaluation."""
        halves = [np.split(predicted[i].astype(np.float64), 2) for i in range(self.n_batches)]
        a, b = (unit(np.concatenate(side)) for side in zip(*halves, strict=True))
        rows = np.concatenate([self.rows(i) for i in range(self.n_batches)])
        return retrieval(a, b, self.group[rows], self.b_number[rows])

    def describe(self) -> str:
        sizes = [len(self.rows(i)) for i in range(self.n_batches)]
        texts = [text for pair in self.pairs for text in pair]
        text = f"{len(self.pairs):,} pairs"
        if len(self.pairs) < self.n_all:
            text += f", evenly spaced among {self.n_all:,}"
        text += f", {sum(map(len, texts)):,} tokens, at most {max(sizes):,} pairs in a batch"
        if self.asked < len(self.pairs):
            text += f"; {len(self.pairs) - self.asked:,} not asked for, as others mean the same"
        if self.cut:
            text += f"; {self.cut:,} texts are cut to {self.row_length:,} tokens"
        return text


def groups(pairs: list[tuple[list[int], list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """n pairs of ids -> (index of each pair's group (n,), index of its text b (n,)). Texts are
    equal if their ids are, before they are cut. A union-find joins pairs into groups."""
    numbers: dict[tuple[int, ...], int] = {}
    texts = [[numbers.setdefault(tuple(ids), len(numbers)) for ids in pair] for pair in pairs]
    parent = list(range(len(numbers)))

    def root(text: int) -> int:
        while parent[text] != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    for a, b in texts:
        parent[root(a)] = root(b)
    _, group = np.unique([root(a) for a, _ in texts], return_inverse=True)
    return group, np.array([b for _, b in texts])


# ---- the score -----------------------------------------------------------------------------------

GOAL, LOWER_IS_BETTER = "mrr", False
TIE = 1e-6  # cosines of float32 vectors that are closer than this count as equal
BLOCK = 1024  # rows of similarities held at a time


def retrieval(
    a: np.ndarray, b: np.ndarray, group: np.ndarray, b_number: np.ndarray
) -> dict[str, float]:
    """a, b (n, C), unit vectors of n pairs; group and b_number (n,) as in `groups` ->
    {"recall_at_1": share of all a whose own b has the largest cosine of all b, "mrr": mean of
    1 / its rank}, to 6 digits. Equal b count once, others of the a's own group do not count, and
    those with the same cosine as the own b rank before it."""
    _, first = np.unique(b_number, return_index=True)
    own, ranks = (a * b).sum(1), np.empty(len(a))
    for start in range(0, len(a), BLOCK):
        part = slice(start, start + BLOCK)
        # NaN compares as False, so it ranks before the own b.
        before = ~(a[part] @ b[first].T < own[part, None] - TIE)
        ranks[part] = 1 + (before & (group[part, None] != group[first])).sum(1)
    figures = {"recall_at_1": (ranks == 1).mean(), "mrr": (1 / ranks).mean()}
    return {name: round(float(value), 6) for name, value in figures.items()}


def unit(vectors: np.ndarray) -> np.ndarray:
    """vectors (n, C), each divided by its length; zeros stay zeros."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)


# ---- texts -> rows -> features, of any encoder ---------------------------------------------------


def framed_text(tokenizer: AnyTokenizer, ids: list[int], most: int) -> np.ndarray:
    """[CLS] ids [SEP], with the ids cut to the first `most`."""
    special, part = tokenizer.special_tokens, np.array(ids[:most], dtype=np.int64)
    return assemble([part], special[CLS], special[SEP])[0]


def framed(model: nn.Module, tokenizer: AnyTokenizer, texts: list[list[int]]) -> list[np.ndarray]:
    """[CLS] ids [SEP] of each text. Texts longer than the model reads lose their ends, and a note
    on stderr says so."""
    most = model.config.block_size - 2
    long = sum(len(ids) > most for ids in texts)
    if long:
        note = f"note: {long:,} of {len(texts):,} texts have more than the {most} tokens that the"
        tqdm.write(f"{note} model reads: their ends are left out", file=sys.stderr)
    return [framed_text(tokenizer, ids, most) for ids in texts]


@torch.no_grad()
def row_features(
    model: nn.Module, rows: list[np.ndarray], pad: int, batch_size: int, bar: tqdm | None = None
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Yields (indices of B rows, tokens (B, T), keep (B, T), features (B, T, C)) until all rows are
    read. Rows of similar length share a batch, so that little of it is padding."""
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        tokens, keep = (x.to(device) for x in pad_rows([rows[i] for i in batch], pad))
        yield batch, tokens, keep, model.features(tokens, keep=None if keep.all() else keep)
        if bar is not None:
            bar.update(len(batch))


# ---- embeddings, and lines that are alike --------------------------------------------------------

SCORES = 2**22  # similarities that are held and sorted at a time


def embed(
    model: nn.Module, tokenizer: AnyTokenizer, lines: Sequence[str], pooling: str, batch_size: int
) -> np.ndarray:
    """An embedding of each line, (lines, C) float32, which does not depend on its batch. pooling:
    "mean" over [CLS], the text and [SEP], without padding; "cls", the last layer's [CLS]. An empty
    line is [CLS] [SEP]."""
    rows = framed(model, tokenizer, [encode_text(tokenizer, line) for line in lines])
    found = np.empty((len(lines), model.config.n_embd), dtype=np.float32)
    with tqdm(total=len(lines), desc="embedding", unit="line", disable=None) as bar:
        pad = tokenizer.special_tokens[PAD]
        for batch, _, keep, features in row_features(model, rows, pad, batch_size, bar):
            pooled = features[:, 0] if pooling == "cls" else mean_pooled(features, keep)
            found[batch] = pooled.float().cpu().numpy()
    return found


def similarities(queries: np.ndarray, corpus: np.ndarray, top: int) -> tuple[np.ndarray, ...]:
    """queries (Q, C), corpus (N, C) -> the highest cosine similarities (Q, k), best first, and
    their rows in the corpus (Q, k), the earlier row first among equals; k is top, but at most N."""
    queries, corpus = unit(queries), unit(corpus)
    best, lines = [], []
    block = max(1, SCORES // len(corpus))
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ corpus.T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        best.append(np.take_along_axis(scores, order, axis=1))
        lines.append(order)
    return np.concatenate(best), np.concatenate(lines)


def is_embeddings(path: Path, width: int) -> bool:
    """Whether the file is one that --embed wrote, and so may be replaced."""
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError):
        return False
    return found.dtype == np.float32 and found.ndim == 2 and found.shape[1] == width


def write_embeddings(model: nn.Module, tokenizer: AnyTokenizer, flags, pooling: str) -> None:
    """--embed: writes an embedding of each line of that file into the file that --out names."""
    path = new_file("out", flags.out, partial(is_embeddings, width=model.config.n_embd))
    lines = lines_of("embed", flags.embed)
    found = embed(model, tokenizer, lines, pooling, flags.batch_size)
    with replacing(path) as file:
        np.save(file, found)
    print(f"{len(lines):,} embeddings of {found.shape[1]} numbers: {path}")


def print_similar(model: nn.Module, tokenizer: AnyTokenizer, flags, pooling: str) -> None:
    """--similar: prints, for each line of the first file, the --top nearest lines of the second."""
    queries, corpus = (lines_of("similar", path) for path in flags.similar)
    vectors = (
        embed(model, tokenizer, lines, pooling, flags.batch_size) for lines in (queries, corpus)
    )
    for query, scores, found in zip(queries, *similarities(*vectors, flags.top), strict=True):
        print(query.strip())
        for score, i in zip(scores, found, strict=True):
            print(f" {score:6.3f}  line {i + 1}: {corpus[i].strip()}")


def most_similar(
    model: nn.Module, tokenizer: AnyTokenizer, texts: Sequence[str], batch_size: int = 32
) -> list[str]:
    """For each text "cosine  text" of the most similar one of the others."""
    vectors = embed(model, tokenizer, texts, "mean", batch_size)
    answers = []
    for i, row in enumerate(zip(*similarities(vectors, vectors, len(texts)), strict=True)):
        others = ((cosine, j) for cosine, j in zip(*row, strict=True) if j != i)
        cosine, j = next(others, (1.0, i))
        answers.append(f"{cosine:.3f}  {texts[j]}")
    return answers


# ---- sample.py -----------------------------------------------------------------------------------


@dataclass
class SampleFlags:
    checkpoint: str = ""  # the file to load; empty: the newest below out/
    embed: str = ""  # write an embedding of each line of this file
    out: str = "embeddings.npy"  # where --embed writes them: float32, (lines, n_embd)
    similar: tuple[str, str] = ()  # two files: for each line of the first, the nearest in the other
    top: int = ranged(5, 1)  # similar lines for each query
    eval: str = ""  # score a file of pairs instead, of the kind that --data of train.py takes
    batch_size: int = ranged(32, 1, 2**20)  # texts at a time
    device: str = choice("auto", *DEVICES)  # auto, cpu, cuda or mps

    def __post_init__(self):
        check(self)
        jobs = sum(map(bool, (self.embed, self.similar, self.eval)))
        if jobs != 1:
            raise ValueError(f"give one of --embed, --similar and --eval, not {jobs}")


def sample(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    flags: SampleFlags,
    checkpoint: dict,
    score: Callable[[Data], None],
) -> None:
    if flags.eval:
        score(whole_file(Flags, Data, tokenizer, flags, checkpoint))
    elif flags.embed:
        write_embeddings(model, tokenizer, flags, "mean")
    else:
        print_similar(model, tokenizer, flags, "mean")


def show(model: nn.Module, tokenizer: AnyTokenizer, data: Data, folder: Path) -> list[str]:
    answers = zip(data.prompts, most_similar(model, tokenizer, data.prompts), strict=True)
    return [f"{text}\n-> {other}" for text, other in answers]


def ask(prompts: Sequence[str]) -> tuple[str, ...]:
    return "--similar", "queries.txt", "lines.txt"


def batch_shapes(flags: Flags, config: EncoderConfig, B: int, T: int) -> dict[str, tuple[int, ...]]:
    return {"tokens": (B, T), "keep": (B, T), "targets": (B // 2,)}
