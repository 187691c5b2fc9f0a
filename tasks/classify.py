"""Classification: one label for a text, or for a pair of texts.

A row is [CLS] text [SEP], or [CLS] text [SEP] text_b [SEP] with the second part in segment 1, and
the head is one matrix behind the pooled [CLS] (Devlin et al. 2019, arXiv:1810.04805, section 4.1).

The files are those of `data/tables.py`: .csv, .tsv or .jsonl, each also as .gz. The columns are
found by their names: those of the texts are a row of TEXTS, that of the label is one of LABELS.
Without names, the columns are text and label, or text, text_b and label. Another order is not
guessed, but refused where it shows: see `check_order`.

All figures follow from the confusion matrix, (k, k) counts: row c has the examples of label c,
column c those that were called c. What is 0 / 0, such as the precision of a label that is never
predicted, counts as 0. Macro-F1 is the mean over the labels that occur, in truth or as a
prediction: a label that does neither says nothing about the model. Both as scikit-learn does with
zero_division=0.

Left out: several labels for a text, numbers to be predicted (regression), windows over texts longer
than a row, which are cut instead, a search for texts that are in both splits, micro averages (for
one label per example they are the accuracy), curves over thresholds (ROC), correlation (Matthews).
Axes as in `model.py`; k counts labels.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bert import Encoder, EncoderConfig, init_bert
from data.buckets import InBuckets, evenly_within
from data.division import divide_by_label
from data.encoding import CLS, SEP, SPECIAL, assemble, encode_text
from data.tables import HELD_OUT, Row, name_them, read_table, refusal
from data.text import name_of
from data.tokens import SPLITS, AnyTokenizer, get_tokenizer, settings
from tasks import encoders
from tasks.encoders import TextFlags, label_sums, outputs, similar_lengths
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
        """tokens (B, T) -> logits (B, k); or, given targets (B,), {"loss": summed loss, each times
        its row's weight, "accuracy": number right}, and in evaluation "predicted" (B,)."""
        features = self.features(tokens, segments, keep)
        logits = self.head(self.dropout(self.pooled(features)))
        if targets is None:
            return logits
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        if weights is not None:
            losses = losses * weights
        return label_sums(losses.sum(), logits, targets, self.training)


# ---- examples ------------------------------------------------------------------------------------

# A pair comes before a single text, so that it is not read as one.
TEXTS = (
    *(("text", "text_b"), ("text_a", "text_b"), ("sentence1", "sentence2")),
    *(("question1", "question2"), ("premise", "hypothesis")),
    *(("question", "sentence"), ("question", "passage")),
    *(("text",), ("sentence",), ("question",), ("review",)),
)
LABELS = ("label", "gold_label", "is_duplicate", "class", "sentiment")
FORMS = [(*texts, label) for texts in TEXTS for label in LABELS]


class Example(NamedTuple):
    line: int  # of its file, where it begins
    texts: tuple[str, ...]  # one or two, white space collapsed
    label: str


def read_examples(path: Path, known: Collection[str] = ()) -> list[Example]:
    """All of a file, in order. `known`: labels for which no order of columns is doubted. Raises
    ValueError, which names the line, where one is broken."""
    table = read_table(path, FORMS, collapse=True)
    if not table.named:
        check_order(path, table.rows, known)
    return [Example(line, texts[:-1], texts[-1]) for line, texts in table.rows]


def check_order(path: Path, rows: list[Row], known: Collection[str]) -> None:
    """Refuses columns without names where they show that they are not what they would be taken
    for: labels come first (the first column has fewer values than the last), or the first line is
    names that are not known here (what would be its label comes nowhere else). Labels that are
    known already are doubted in neither case."""
    first, last = (Counter(texts[i] for _, texts in rows) for i in (0, -1))
    unknown, (number, texts) = last.keys() - set(known), rows[0]
    if len(first) < len(last) and unknown:
        why = f"the first column has {len(first):,} different values and the last {len(last):,}, as"
        why += f" if the label came first: {name_them(FORMS)}, in the order of the file"
        raise refusal(path, number, why)
    if len(rows) > 2 and last[texts[-1]] == 1 and texts[-1] in unknown:
        why = f"its label {texts[-1][:40]!r} comes nowhere else, as if the line were names that are"
        raise refusal(path, number, f"{why} not known here: {name_them(FORMS)}")


@dataclass
class LabelledCorpus:
    """Examples in two splits. `hash` is of their contents, division and labels."""

    name: str
    hash: str
    rule: str  # how it was split, for the plan
    prompts: list[str]  # to show what a model has learnt; the texts of a pair have a tab between
    labels: tuple[str, ...]
    splits: dict[str, list[Example]]

    def pieces(self, split: str) -> Iterator[tuple[str, bool]]:
        """What a new tokenizer learns from: every text, as `encode_text` shows it."""
        for example in self.splits[split]:
            for text in example.texts:
                yield f" {text}", True


def open_labelled(data: str, *, valid: str = "", labels: Sequence[str] = ()) -> LabelledCorpus:
    """data and valid are files. Where valid is empty, one in HELD_OUT of each label validates,
    drawn with a fixed seed.

    labels: those that a checkpoint has, in its order; empty: those of data, by number where all
    are whole numbers, else sorted. Raises ValueError on bad input.
    """
    train = read_examples(Path(data), labels)
    found = sorted({example.label for example in train})
    if len(found) < 2 and not labels:
        raise ValueError(f"all examples of {data} have the label {found[0]}: give some of another")
    whose = "the checkpoint's" if labels else f"those of {data}"
    if labels:
        refuse_others(data, train, labels, whose)
    else:
        with suppress(ValueError):  # else they stay in the order of their spelling
            found.sort(key=int)
        labels = found
    if valid:
        validation = read_examples(Path(valid), labels)
        refuse_others(valid, validation, labels, whose)
        if len(train[0].texts) != len(validation[0].texts):
            raise ValueError(
                f"{data} has {len(train[0].texts)} and {valid} {len(validation[0].texts)} texts "
                "for a label: give both in one form"
            )
        divided = "the given files"
    else:
        train, validation = divide_by_label(train, [example.label for example in train], HELD_OUT)
        if not validation:
            raise ValueError(f"no label of {data} comes twice, none can be held out: give --valid")
        divided = f"one in {HELD_OUT} of each label that comes twice, drawn with a fixed seed"
    splits = {"train": train, "validation": validation}
    content = [[[*x.texts, x.label] for x in examples] for examples in splits.values()]
    digest = hashlib.sha256(json.dumps(["labelled 1", list(labels), content]).encode()).hexdigest()
    rule = f"{len(train):,} examples train, {len(validation):,} validate ({divided})"
    name, prompts = name_of(Path(data)), some_of_each_label(validation)
    return LabelledCorpus(name, digest, rule, prompts, tuple(labels), splits)


def refuse_others(data: str, examples: list[Example], known: Sequence[str], whose: str) -> None:
    for example in examples:
        if example.label not in known:
            more = ", …" * (len(known) > 10)
            raise ValueError(
                f"{data}, line {example.line:,}: the label {example.label!r} is none of {whose} "
                f"({', '.join(known[:10])}{more}): correct it, or leave the line out"
            )


def some_of_each_label(examples: list[Example], number: int = 4) -> list[str]:
    """The first text of each label, then the second, and so on."""
    before, ranked = Counter(), []
    for example in examples:
        ranked.append((before[example.label], "\t".join(example.texts)))
        before[example.label] += 1
    return [text for _, text in sorted(ranked, key=lambda x: x[0])[:number]]


# ---- rows and batches ----------------------------------------------------------------------------


def encode_parts(
    tokenizer: AnyTokenizer, texts: Sequence[str], length: int
) -> tuple[list[np.ndarray], bool]:
    """One text or two -> (their ids, whether they were cut to fit, with [CLS] and a [SEP] each,
    into `length` tokens). The longer text loses its end first; of equal ones, the second."""
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


def collate(rows: Sequence[list[np.ndarray]], tokenizer: AnyTokenizer) -> dict[str, Tensor]:
    """Rows of one text, or all of two, as `encoders.collate` has them; pairs have segments."""
    special = tokenizer.special_tokens
    ids, segments = zip(*(assemble(r, special[CLS], special[SEP]) for r in rows), strict=True)
    return encoders.collate(ids, tokenizer, segments if len(rows[0]) > 1 else None)


@dataclass
class Flags(FinetuneConfig):
    class_weights: bool = False  # a rare label counts for more: all of them the same in sum


class Data(InBuckets):
    """Labelled texts.

    class_weights: a training batch weighs a row by n / (k · its label's rows), so that each of the
    k labels that occur has the same weight in all, and a row the weight 1 on average.
    Validation: in order, never weighted; if max_tokens is less than the text, evenly spaced rows.
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
        """(train, validation); a vocabulary, if none is given, is learnt from the training text."""
        corpus = open_labelled(flags.data, valid=flags.valid, labels=sizes["labels"])
        tokenizer = tokenizer or get_tokenizer(flags, sizes, corpus, cls.special_tokens)
        more = settings(flags, sizes, "row_length", "tokens_per_step", "class_weights")
        return tuple(cls(corpus, split, tokenizer, **more) for split in SPLITS)

    def batch(self, i: int) -> dict[str, Tensor]:
        """What `collate` makes and {"targets": (B,)}, indices into labels; with class_weights in
        training also "weights": (B,)."""
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
        """Loss in nats and share of right answers, per text."""
        return {name: sums[name] / max(counts["loss"], 1) for name in ("loss", "accuracy")}

    def measure(self, predicted: dict[int, np.ndarray]) -> dict[str, float]:
        """predicted[i] (B,) are the class indices that the model gave the rows of batch i."""
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

LARGEST_MATRIX = 20  # labels of which the terminal shows all pairs


def confusion_matrix(gold: np.ndarray, predicted: np.ndarray, k: int) -> np.ndarray:
    """(N,) and (N,) class indices below k -> (k, k) counts."""
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
    """Lines for the terminal: the figures of each label, then the matrix, in which the labels are
    letters (numbers may be their names) and 0 is a dot. Names come last, so that no length or
    script of theirs moves a column."""
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
    """The matrix as a picture; a row's colours are shares of it, so that rare labels show too.

    None where matplotlib is missing: a run does not fail for want of a picture.
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
    return label if len(label) <= most else f"{label[: most - 1]}…"


# ---- sample.py -----------------------------------------------------------------------------------

SampleFlags = TextFlags


def classify(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    prompts: list[str],
    flags: TextFlags,
    bar: tqdm | None = None,
    first: int = 0,
) -> list[str]:
    """For each text "positive 97.1%, negative 2.9%", the five likeliest labels at most; of a text
    without words, nothing. A tab divides the two texts of a model that labels pairs: ValueError if
    it is not there. But where the prompts are lines of standard input (first > 0), such a line
    gets a note on stderr and an empty answer."""
    rows, answers, n_cut = {}, [""] * len(prompts), 0
    for number, prompt in enumerate(prompts):
        parts = prompt.split("\t", 1) if model.config.pairs else [prompt]
        if not prompt.strip():
            continue
        if model.config.pairs and len(parts) < 2:
            wrong = "is one text, but this model labels pairs: put a tab between the two"
            if not first:
                raise ValueError(f"the prompt {prompt[:60]!r} {wrong}")
            tqdm.write(f"note: line {first + number:,} {wrong}", file=sys.stderr)
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
        encoders.answer_texts(classify, model, tokenizer, flags)


def show(model: nn.Module, tokenizer: AnyTokenizer, data: Data, folder: Path) -> list[str]:
    """A few texts with their labels; then all confusions, as a table and as a picture."""
    shown = encoders.answered(classify, model, tokenizer, data.prompts, SampleFlags())
    batches = range(data.n_batches)
    data.measure({i: outputs(model, data.batch(i))["predicted"].cpu().numpy() for i in batches})
    table = data.details()
    picture = draw_confusion(data.confusion, data.labels, folder / "confusion.png")
    return [*shown, f"{table}\nas a picture: {picture}" if picture else table]


def ask(prompts: list[str]) -> tuple[str, ...]:
    return ("--prompt", prompts[0]) if prompts and prompts[0] else ()
