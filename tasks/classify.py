"""Classification: one label for a text, or for a pair of texts.

A row is [CLS] text [SEP], or [CLS] text [SEP] text_b [SEP] with the second part in segment 1, and
the head is one matrix behind the pooled [CLS] (Devlin et al. 2019, arXiv:1810.04805, section 4.1).
The files: `data/labelled.py`.

All figures follow from the confusion matrix, (k, k) counts: row c has the examples of label c,
column c those that were predicted as c. 0 / 0, such as the precision of a label that is never
predicted, counts as 0. Macro-F1 is the mean over the labels that occur, in truth or as a
prediction: other labels say nothing about the model. scikit-learn with zero_division=0 does the
same.

Left out: several labels for a text, numbers to predict (regression), windows over texts longer than
a row, which are cut instead, micro averages (for one label per example they are the accuracy),
curves over thresholds (ROC), correlation (Matthews). Axes as in `model.py`; k counts labels.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bert import Encoder, EncoderConfig, init_bert
from data.buckets import InBuckets, evenly_within
from data.encoding import SPECIAL, encode_text
from data.labelled import LabelledCorpus, open_labelled
from data.tokens import SPLITS, AnyTokenizer, get_tokenizer, settings
from tasks.encoders import (
    TextFlags,
    answer_texts,
    answered,
    collate,
    label_sums,
    outputs,
    similar_lengths,
)
from tasks.flags import FinetuneConfig
from tasks.whole import whole_file

GOAL, LOWER_IS_BETTER = "accuracy", False

# ---- the network ---------------------------------------------------------------------------------

OF_DATA = {"flag": False, "from_data": True}


@dataclass
class LabelConfig(EncoderConfig):
    labels: tuple[str, ...] = field(default=(), metadata=OF_DATA)  # a label's place is its id
    pairs: bool = field(default=False, metadata=OF_DATA)  # a label is for two texts


class Classifier(Encoder):
    """One of the labels for a text, or for a pair of texts."""

    Config = LabelConfig

    def __init__(self, config: LabelConfig):
        super().__init__(config)
        self.pooler = nn.Linear(config.n_embd, config.n_embd)
        self.head = nn.Linear(config.n_embd, max(1, len(config.labels)))
        init_bert(self)

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        keep: Tensor | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """tokens (B, T) -> logits (B, k); or, given targets (B,) and perhaps weights (B,) of rows,
        {"loss": summed loss, weighted, "accuracy": number of right labels}, and in evaluation also
        "predicted" (B,)."""
        features = self.features(tokens, segments, keep)
        logits = self.head(self.dropout(self.pooled(features)))
        if targets is None:
            return logits
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        if weights is not None:
            losses = losses * weights
        return label_sums(losses.sum(), logits, targets, self.training)


# ---- rows and batches ----------------------------------------------------------------------------


def encode_parts(
    tokenizer: AnyTokenizer, texts: Sequence[str], length: int
) -> tuple[list[np.ndarray], bool]:
    """One text or two -> (the ids of each, whether they were cut so that they fit into `length`
    tokens with [CLS] and a [SEP] each). The longer text loses its end first; of two equally long
    ones, the second does. Raises ValueError where `length` is too small."""
    n, parts = len(texts), [np.array(encode_text(tokenizer, text), np.int32) for text in texts]
    space = length - 1 - n
    if space < n:
        raise ValueError(
            f"rows of {length} tokens have no room for {n} text{'s' * (n > 1)}: choose "
            f"{1 + 2 * n} or more (--block_size or --row_length)"
        )
    cut = sum(map(len, parts)) > space
    if cut:
        most = max(space - space // 2, space - len(parts[1])) if n > 1 else space
        parts[0] = parts[0][:most]
        parts[1:] = [part[: space - len(parts[0])] for part in parts[1:]]
    return parts, cut


@dataclass
class Flags(FinetuneConfig):
    class_weights: bool = False  # a rare label counts for more: all of them the same in sum


class Data(InBuckets):
    """Labelled texts.

    class_weights: in training, the weight of a row is n / (k · number of rows of its label), where
    n counts rows and k the labels that occur: all labels have the same weight in sum, and a row has
    the weight 1 on average. Validation: in order, never weighted; if max_tokens is less than the
    text, evenly spaced rows.
    """

    special_tokens = SPECIAL

    def __init__(
        self,
        corpus: LabelledCorpus,
        split: str,
        tokenizer: AnyTokenizer,
        *,
        block_size: int,
        row_length: int = 0,
        class_weights: bool = False,
        max_tokens: int = 0,
        **buckets,
    ):
        """buckets: see InBuckets.make_buckets."""
        training = split == "train"
        self.tokenizer, self.split, self.fingerprint = tokenizer, split, corpus.hash
        self.rule, self.prompts, self.labels = corpus.rule, corpus.prompts, corpus.labels
        self.row_length = min(row_length or block_size, block_size)
        examples, index = corpus.splits[split], {x: i for i, x in enumerate(self.labels)}
        bar = tqdm(examples, f"tokenizing {split}", unit=" texts", disable=None)
        found = [encode_parts(tokenizer, x.texts, self.row_length) for x in bar]
        self.rows, cut = zip(*found, strict=True)
        self.pairs = len(self.rows[0]) > 1
        self.n_cut = sum(cut)
        self.targets = np.array([index[example.label] for example in examples], np.int64)
        lengths = np.array([1 + sum(len(part) + 1 for part in parts) for parts in self.rows])
        limit = 0 if training else max_tokens
        self.chosen = evenly_within(len(lengths), int(lengths.sum()), limit)
        self.weights = None
        if class_weights and training:
            counts = np.bincount(self.targets)
            each = len(lengths) / (np.count_nonzero(counts) * counts[self.targets])
            self.weights = each.astype(np.float32)
        self.make_buckets(lengths[self.chosen], split, block_size=block_size, **buckets)
        self.confusion: np.ndarray | None = None  # (k, k), of the last evaluation

    @classmethod
    def splits(cls, flags: Flags, sizes: dict, tokenizer: AnyTokenizer | None = None):
        """(train, validation); a tokenizer is learnt from the training texts unless given."""
        corpus = open_labelled(flags.data, valid=flags.valid, labels=sizes["labels"])
        tokenizer = tokenizer or get_tokenizer(flags, sizes, corpus, cls.special_tokens)
        more = settings(flags, sizes, "row_length", "tokens_per_step", "class_weights")
        return tuple(cls(corpus, split, tokenizer, **more) for split in SPLITS)

    def batch(self, i: int) -> dict[str, Tensor]:
        """The batch that `collate` makes and {"targets": (B,)}, indices of labels; in training with
        class_weights also "weights": (B,)."""
        _, rows, empty = self.buckets.batch(i)
        rows = self.chosen[rows]
        batch = collate([self.rows[row] for row in rows], self.tokenizer)
        batch["targets"] = torch.from_numpy(self.targets[rows])
        if empty:
            batch["targets"].fill_(-100)
        if self.weights is not None:
            batch["weights"] = torch.from_numpy(self.weights[rows])
        return batch

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The loss in nats per text, and the share of right labels."""
        return {name: sums[name] / max(counts["loss"], 1) for name in ("loss", "accuracy")}

    def measure(self, predicted: dict[int, np.ndarray]) -> dict[str, float]:
        """{"accuracy", "macro_f1"}, to 6 digits. predicted[i] (B,) are the indices of the labels
        that the model predicts for the rows of batch i."""
        k = len(self.labels)
        self.confusion = np.zeros((k, k), np.int64)
        for i, classes in predicted.items():
            gold = self.targets[self.chosen[self.buckets.batch(i)[1]]]
            self.confusion += confusion_matrix(gold, classes, k)
        figures = {"accuracy": accuracy(self.confusion), "macro_f1": macro_f1(self.confusion)}
        return {name: round(value, 6) for name, value in figures.items()}

    def details(self) -> str:
        return confusion_table(self.confusion, self.labels)

    def describe(self) -> str:
        lengths, counts = self.buckets.lengths, np.bincount(self.targets[self.chosen])
        counts = counts[counts > 0]
        text = f"{len(self.chosen):,} {'pairs of texts' if self.pairs else 'texts'}"
        if len(self.chosen) < len(self.rows):
            text += f", evenly spaced among {len(self.rows):,}"
        text += f", {len(counts)} label{'s' * (len(counts) > 1)} with {counts.min():,} to "
        text += f"{counts.max():,} each, {lengths.sum():,} tokens"
        text += self.buckets.describe()
        if self.n_cut:
            text += f"; {self.n_cut:,} cut to {self.row_length} tokens"
        return text


def batch_shapes(flags: Flags, config: LabelConfig, B: int, T: int) -> dict[str, tuple[int, ...]]:
    shapes = {name: (B, T) for name in ("tokens", "segments", "keep")} | {"targets": (B,)}
    return shapes | ({"weights": (B,)} if flags.class_weights else {})


# ---- figures -------------------------------------------------------------------------------------

LARGEST_MATRIX = 20  # with more labels, the terminal does not show the matrix


def confusion_matrix(gold: np.ndarray, predicted: np.ndarray, k: int) -> np.ndarray:
    """gold (N,) and predicted (N,), indices of labels below k -> counts (k, k)."""
    return np.bincount(gold * k + predicted, minlength=k * k).reshape(k, k)


def accuracy(confusion: np.ndarray) -> float:
    return float(confusion.trace() / max(confusion.sum(), 1))


def per_label(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(precision, recall, F1), each (k,)."""
    right, gold, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    both = gold + predicted  # F1 = 2 / (1 / precision + 1 / recall)
    return (
        right / np.maximum(predicted, 1),
        right / np.maximum(gold, 1),
        2 * right / np.maximum(both, 1),
    )


def macro_f1(confusion: np.ndarray) -> float:
    occurs = (confusion.sum(0) + confusion.sum(1)) > 0
    return float(per_label(confusion)[2][occurs].mean()) if occurs.any() else 0.0


def confusion_table(confusion: np.ndarray, labels: Sequence[str]) -> str:
    """Lines for the terminal: the figures of each label, then the matrix, in which labels are
    letters (their names may be numbers) and 0 is a dot. Names come last, so that their length and
    script move no column."""
    letters = len(labels) <= LARGEST_MATRIX
    signs = [chr(97 + i) if letters else str(i + 1) for i in range(len(labels))]
    lines = [f"accuracy {accuracy(confusion):.3f}, macro-F1 {macro_f1(confusion):.3f}", ""]
    side, width = len(signs[-1]), max(5, len(str(confusion.sum())))
    lines.append(f"{'':{side}}  precision  recall     F1  {'true':>{width}}  label")
    figures = zip(labels, *per_label(confusion), confusion.sum(1), strict=True)
    for sign, (label, precision, recall, f1, count) in zip(signs, figures, strict=True):
        lines.append(
            f"{sign:>{side}}  {precision:9.3f}  {recall:6.3f}  {f1:5.3f}  {count:{width}}  "
            f"{shorten(label, 60)}"
        )
    if len(labels) > LARGEST_MATRIX:
        return "\n".join([*lines, "", f"(the matrix of {len(labels)} labels is too wide to show)"])
    width = max(side, len(str(confusion.max())))
    cells = [[n or "·" for n in row] for row in confusion.tolist()]
    rows = [("", signs), *zip(signs, cells, strict=True)]
    lines += ["", "true label in rows, predicted in columns"]
    lines += [f"{i:>{side}}  " + " ".join(f"{cell:>{width}}" for cell in row) for i, row in rows]
    return "\n".join(lines)


def draw_confusion(confusion: np.ndarray, labels: Sequence[str], path: Path) -> Path | None:
    """Draws the matrix into `path`; colours are shares of a row, so that rare labels show too.

    Returns None where matplotlib is missing: no run fails because it has no picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} is not drawn: pip install matplotlib")
        return None
    k = len(labels)
    inches = 3 + 0.45 * min(k, 40)
    figure = Figure(figsize=(inches + 1, inches), layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true label")
    # A "$" in a label is no formula.
    names = {"labels": [shorten(label, 24) for label in labels], "parse_math": False}
    axes.set_xticks(range(k), rotation=90, **names)
    axes.set_yticks(range(k), **names)
    axes.set_xlabel("predicted label")
    axes.set_ylabel("true label")
    if k <= LARGEST_MATRIX:
        for (row, column), count in np.ndenumerate(confusion):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path, dpi=120)
    return path


def shorten(label: str, most: int) -> str:
    label = label.encode("utf-8", "replace").decode("utf-8")  # fonts have no lone surrogates
    return label if len(label) <= most else f"{label[: most - 1]}…"


# ---- sample.py -----------------------------------------------------------------------------------

SampleFlags = TextFlags


def classify(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    prompts: list[str],
    flags: TextFlags,
    bar: tqdm | None = None,
    first_line: int = 0,
) -> list[str]:
    """For each text at most its five likeliest labels, "positive 97.1%, negative 2.9%"; for a text
    without words, nothing. A tab divides the two texts of a model that labels pairs. Raises
    ValueError where it is missing; but a line of standard input (first_line > 0) then gets a note
    on stderr and an empty answer."""
    rows, answers, n_cut = {}, [""] * len(prompts), 0
    for number, prompt in enumerate(prompts):
        parts = prompt.split("\t", 1) if model.config.pairs else [prompt]
        if not prompt.strip():
            continue
        if model.config.pairs and len(parts) < 2:
            wrong = "is one text, but this model labels pairs: put a tab between the two"
            if not first_line:
                raise ValueError(f"the prompt {prompt[:60]!r} {wrong}")
            tqdm.write(f"note: line {first_line + number:,} {wrong}", file=sys.stderr)
            continue
        rows[number], was_cut = encode_parts(tokenizer, parts, model.config.block_size)
        n_cut += was_cut
    if n_cut:
        most = model.config.block_size
        note = f"note: {n_cut:,} of {len(rows):,} texts are longer than the {most} tokens that the"
        tqdm.write(f"{note} model reads: their ends are left out", file=sys.stderr)
    numbers, labels = list(rows), model.config.labels
    lengths = [sum(map(len, parts)) for parts in rows.values()]
    for batch in similar_lengths(lengths, flags.batch_size, bar):
        logits = outputs(model, collate([rows[numbers[i]] for i in batch], tokenizer))
        for i, shares in zip(batch, logits.softmax(-1), strict=True):
            best = shares.topk(min(5, len(labels)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            answers[numbers[i]] = ", ".join(f"{labels[k]} {share:.1%}" for k, share in pairs)
    if bar is not None:
        bar.update(len(prompts) - len(rows))
    return answers


def sample(model: nn.Module, tokenizer: AnyTokenizer, flags: TextFlags, checkpoint: dict, score):
    if flags.eval:
        score(whole_file(Flags, Data, tokenizer, flags, checkpoint))
    else:
        answer_texts(classify, model, tokenizer, flags)


def show(model: nn.Module, tokenizer: AnyTokenizer, data: Data, folder: Path) -> list[str]:
    """A few texts with their labels; then the confusion matrix, as a table and as a picture."""
    shown = answered(classify, model, tokenizer, data.prompts, SampleFlags())
    batches = range(data.n_batches)
    data.measure({i: outputs(model, data.batch(i))["predicted"].cpu().numpy() for i in batches})
    table = data.details()
    picture = draw_confusion(data.confusion, data.labels, folder / "confusion.png")
    return [*shown, f"{table}\nas a picture: {picture}" if picture else table]


def ask(prompts: list[str]) -> tuple[str, ...]:
    return ("--prompt", prompts[0]) if prompts and prompts[0] else ()
