"""Text classification before networks: naive Bayes, and a linear support-vector machine.

    python -m lab.classic --data train.tsv --valid dev.tsv        both, in a second

1. Naive Bayes: each word of a text is drawn by itself, from the words of its class, counted with
   one added to each: log p(class) + the sum of log p(word | class) decides. The multinomial model:
   a word counts as often as it occurs.
2. A linear SVM on tf-idf: a text is a vector of its words' counts, each times log((1 + n) /
   (1 + texts that have the word)) + 1, of length 1, and one 1 more, for the bias. For each class
   against the others, w minimises |w|² / 2 + C · the sum of max(0, 1 - y w·x)², by coordinate
   descent in the dual, as LIBLINEAR does: one text after the other gets its best weight alpha.

A text's words are what stands between its spaces, in lower case: in SST-2 commas stand alone. Those
that the training texts do not have are left out. The score is accuracy, ± its standard error.

Left out: pairs of words (bigrams), lists of stop words, choosing C, shrinking.

Papers: McCallum and Nigam 1998, "A Comparison of Event Models for Naive Bayes Text Classification";
Joachims 1998, "Text Categorization with Support Vector Machines"; Hsieh et al. 2008, "A Dual
Coordinate Descent Method for Large-scale Linear SVM".
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.labelled import Example, LabelledCorpus, open_labelled
from engine import cli
from tasks.flags import check, ranged

LARGEST = 2**28  # numbers in a table of words by classes


@dataclass
class ClassicConfig:
    data: str = ""  # a table of texts and labels, as for train.py --model classify
    valid: str = ""  # another one to score; empty: one in ten rows of each label is held out
    C: float = ranged(1.0, 1e-6, 1e6)  # the SVM's price of a text on the wrong side
    words: int = ranged(8, 0, 1000)  # so many telling words of each label are shown
    seed: int = ranged(0, 0)  # of the order in which the SVM sees the texts

    def __post_init__(self):
        check(self)
        if not self.data:
            raise ValueError("--data is missing: name a table of texts and labels")


# ---- texts -> counts -----------------------------------------------------------------------------


class Counts(NamedTuple):
    """Texts as sparse rows: the words of text i, and how often each occurs, stand at
    starts[i] : starts[i + 1]."""

    starts: np.ndarray  # (n + 1,)
    words: np.ndarray  # of all texts, one after the other
    values: np.ndarray

    def rows(self) -> np.ndarray:
        """The text of each entry."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def times(self, matrix: np.ndarray) -> np.ndarray:
        """(n, classes), the product with a matrix (words, classes)."""
        rows, n = self.rows(), len(self.starts) - 1
        columns = [np.bincount(rows, self.values * c[self.words], minlength=n) for c in matrix.T]
        return np.stack(columns, 1)


def words_of(example: Example) -> list[str]:
    return " ".join(example.texts).lower().split()


def count_words(examples: list[Example], vocabulary: dict[str, int]) -> Counts:
    """The words that are in the vocabulary; the others are left out."""
    texts = [Counter(w for w in words_of(x) if w in vocabulary) for x in examples]
    starts = np.cumsum([0, *map(len, texts)])
    words = np.array([vocabulary[w] for text in texts for w in text], dtype=np.int64)
    values = np.array([n for text in texts for n in text.values()], dtype=np.float64)
    return Counts(starts, words, values)


# ---- naive Bayes ---------------------------------------------------------------------------------


def naive_bayes(counts: Counts, labels: np.ndarray, V: int, K: int) -> tuple[np.ndarray, ...]:
    """labels (n,) of K classes -> (log p(word | class) (V, K), log p(class) (K,)). A class without
    texts has the prior -inf."""
    table = np.ones((V, K))
    np.add.at(table, (counts.words, labels[counts.rows()]), counts.values)
    with np.errstate(divide="ignore"):
        prior = np.log(np.bincount(labels, minlength=K) / len(labels))
    return np.log(table / table.sum(0)), prior


# ---- the support-vector machine ------------------------------------------------------------------


def tf_idf(counts: Counts, idf: np.ndarray) -> Counts:
    """Counts times idf (V,), each text of length 1, with a 1 behind them at place V."""
    values, n = counts.values * idf[counts.words], len(counts.starts) - 1
    norms = np.sqrt(np.bincount(counts.rows(), values**2, minlength=n))
    values = values / norms[counts.rows()]
    ends = counts.starts[1:]
    words = np.insert(counts.words, ends, len(idf))
    return Counts(counts.starts + np.arange(n + 1), words, np.insert(values, ends, 1.0))


def inverse_frequencies(counts: Counts, V: int) -> np.ndarray:
    n = len(counts.starts) - 1
    return np.log((1 + n) / (1 + np.bincount(counts.words, minlength=V))) + 1


def dual_descent(
    x: Counts, y: np.ndarray, size: int, C: float, seed: int = 0, tolerance=1e-3, most=1000
) -> tuple[np.ndarray, np.ndarray]:
    """y (n,) of 1 and -1 -> (w (size,), alpha (n,)), w = the sum of alpha y x.

    The dual is f(alpha) = alpha' Q alpha / 2 - the sum of alpha, alpha >= 0, where Q has y_i y_j
    x_i·x_j, and 1 / 2C more on its diagonal. Its derivative by one alpha needs w and one text. Ends
    when, in a pass over all texts, no derivative along which alpha can move exceeds the tolerance,
    or after `most` passes, which is said.
    """
    w, alpha = np.zeros(size), np.zeros(len(y))
    parts = [slice(a, b) for a, b in zip(x.starts, x.starts[1:], strict=False)]
    texts = [(x.words[part], x.values[part]) for part in parts]
    curvature = [values @ values + 0.5 / C for _, values in texts]
    random = np.random.default_rng(seed)
    for _ in range(most):
        largest = 0.0
        for i in random.permutation(len(y)).tolist():
            words, values = texts[i]
            slope = y[i] * (w[words] @ values) - 1 + alpha[i] * 0.5 / C
            if alpha[i] == 0:
                slope = min(slope, 0.0)  # it cannot become negative
            largest = max(largest, abs(slope))
            if slope:
                new = max(alpha[i] - slope / curvature[i], 0.0)
                w[words] += (new - alpha[i]) * y[i] * values
                alpha[i] = new
        if largest < tolerance:
            return w, alpha
    print(
        f"note: the SVM's best weights are not reached in {most:,} passes over the texts: choose a "
        "lower --C",
        file=sys.stderr,
    )
    return w, alpha


# ---- both, scored --------------------------------------------------------------------------------


class Fitted(NamedTuple):
    matrix: np.ndarray  # (words, classes): what a word says for each class
    right: np.ndarray  # (texts that validate,) bool
    seconds: float


class Classic:
    """Both models of one corpus. Raises ValueError for one whose tables would be too large."""

    def __init__(self, corpus: LabelledCorpus, config: ClassicConfig):
        self.corpus, self.config = corpus, config
        self.train, self.validation = corpus.splits["train"], corpus.splits["validation"]
        place = {label: i for i, label in enumerate(corpus.labels)}
        self.y, self.wanted = (
            np.array([place[x.label] for x in examples])
            for examples in (self.train, self.validation)
        )

    def read(self) -> tuple[Counts, Counts, int]:
        """(counts of the training texts, of those that validate, number of words)"""
        vocabulary: dict[str, int] = {}
        for example in self.train:
            for word in words_of(example):
                vocabulary.setdefault(word, len(vocabulary))
        V, K = len(vocabulary), len(self.corpus.labels)
        if not V:
            raise ValueError(f"{self.corpus.name} has no words: give texts with letters in them")
        if V * K > LARGEST:
            raise ValueError(
                f"{V:,} words times {K:,} labels are more than {LARGEST:,}: give fewer labels"
            )
        self.vocabulary = list(vocabulary)
        found = (count_words(examples, vocabulary) for examples in (self.train, self.validation))
        return *found, V

    def bayes(self) -> Fitted:
        start = time.perf_counter()
        train, validation, V = self.read()
        matrix, prior = naive_bayes(train, self.y, V, len(self.corpus.labels))
        best = (validation.times(matrix) + prior).argmax(1)
        return Fitted(matrix, best == self.wanted, time.perf_counter() - start)

    def svm(self) -> Fitted:
        start = time.perf_counter()
        train, validation, V = self.read()
        idf, K = inverse_frequencies(train, V), len(self.corpus.labels)
        train, validation = tf_idf(train, idf), tf_idf(validation, idf)
        # Of two classes one against the other is enough: the second is its negative.
        signs = [np.where(self.y == k, 1.0, -1.0) for k in range(1 if K == 2 else K)]
        columns = [dual_descent(train, y, V + 1, self.config.C, self.config.seed)[0] for y in signs]
        if K == 2:
            columns.append(-columns[0])
        matrix = np.stack(columns, 1)
        best = validation.times(matrix).argmax(1)
        return Fitted(matrix[:V], best == self.wanted, time.perf_counter() - start)

    def telling(self, matrix: np.ndarray) -> list[str]:
        """For each label the words that speak most for it: whose number for it exceeds that for
        the next best label by the most."""
        lines = []
        for k, label in enumerate(self.corpus.labels):
            margin = matrix[:, k] - np.delete(matrix, k, 1).max(1)
            best = np.argsort(-margin, kind="stable")[: self.config.words]
            lines.append(f"  {label[:20]}: {' '.join(self.vocabulary[i] for i in best)}")
        return lines


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Classify texts as before networks: naive Bayes, and a linear SVM.")
    cli.add_flags(parser, ClassicConfig, "classic")
    config = ClassicConfig(**parser.parse(sys.argv[1:] if argv is None else argv))
    corpus = open_labelled(config.data, valid=config.valid)
    print(corpus.rule)
    classic = Classic(corpus, config)
    models: dict[str, Callable[[], Fitted]] = {"naive Bayes": classic.bayes, "SVM": classic.svm}
    for name, fit in models.items():
        matrix, right, seconds = fit()
        p = right.mean()
        error = math.sqrt(p * (1 - p) / len(right))
        print(f"\n{name:<12} {p:.4f} ± {error:.4f}   {seconds:.2f} s")
        if config.words:
            print("\n".join(classic.telling(matrix)))


if __name__ == "__main__":
    cli.run(main)
