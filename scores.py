"""Classification in figures: accuracy, precision, recall and F1 of each label, and their picture.

All of it follows from the confusion matrix, (k, k) counts: row c has the examples of label c,
column c those that were called c. What is 0 / 0, the precision of a label that is never predicted
for one, counts as 0. Macro-F1 is the mean over the labels that occur, in truth or as a prediction:
a label that neither is there nor is predicted says nothing about the model. Both as scikit-learn
does with zero_division=0.

Left out: micro averages (for one label per example they are the accuracy), curves over thresholds
(ROC), correlation (Matthews).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

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
