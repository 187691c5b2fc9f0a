"""tasks/classify.py: the figures of a confusion matrix beside their definitions, and how they are
shown."""

import sys
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.classify import (
    LARGEST_MATRIX,
    accuracy,
    confusion_matrix,
    confusion_table,
    draw_confusion,
    macro_f1,
    per_label,
)

ANSWERS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60)


def matrix(pairs: list[tuple[int, int]], k: int = 7) -> np.ndarray:
    gold, predicted = (np.array(side, np.int64) for side in zip(*pairs, strict=True))
    return confusion_matrix(gold, predicted, k)


@given(ANSWERS.filter(bool))
def test_rows_are_gold_and_columns_predicted(pairs):
    confusion, counts = matrix(pairs), Counter(pairs)
    assert confusion.shape == (7, 7) and confusion.sum() == len(pairs)
    assert all(confusion[pair] == count for pair, count in counts.items())


@given(ANSWERS.filter(bool))
def test_figures_are_their_definitions(pairs):
    """Counted from the answers one by one, as the textbook has it; 0 where nothing is counted."""
    confusion, f1s = matrix(pairs), []
    figures = list(zip(*per_label(confusion), strict=True))
    for c in range(7):
        found = [gold == c for gold, predicted in pairs if predicted == c]
        asked = [predicted == c for gold, predicted in pairs if gold == c]
        precision, recall = (sum(x) / len(x) if x else 0.0 for x in (found, asked))
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        assert figures[c] == pytest.approx((precision, recall, f1))
        if found or asked:
            f1s.append(f1)
    assert macro_f1(confusion) == pytest.approx(sum(f1s) / len(f1s))
    assert accuracy(confusion) == pytest.approx(sum(g == p for g, p in pairs) / len(pairs))


@pytest.mark.parametrize(
    ("gold", "predicted", "k", "right", "macro"),
    [  # scikit-learn 1.9's accuracy_score and f1_score(average="macro", zero_division=0)
        ("0001122", "0110122", 3, 0.5714285714285714, 0.6),
        ("000000000000000000011", "0" * 21, 2, 0.9047619047619048, 0.475),
        ("0011", "0033", 4, 0.5, 0.3333333333333333),  # label 2 does not occur at all
        ("5", "3", 7, 0.0, 0.0),
    ],
)
def test_figures_equal_those_of_scikit_learn(gold, predicted, k, right, macro):
    confusion = matrix([(int(g), int(p)) for g, p in zip(gold, predicted, strict=True)], k)
    assert accuracy(confusion) == pytest.approx(right)
    assert macro_f1(confusion) == pytest.approx(macro)


def test_nothing_evaluated_is_0_and_no_nan():
    nothing = np.zeros((3, 3), np.int64)
    assert accuracy(nothing) == macro_f1(nothing) == 0.0
    assert not np.concatenate(per_label(nothing)).any()


def test_the_table_by_hand():
    confusion = np.array([[382, 46, 0], [37, 1207, 1], [0, 0, 0]])
    assert confusion_table(confusion, ["bad", "good", "数"]).split("\n") == [
        "accuracy 0.950, macro-F1 0.623",
        "",
        "   precision  recall     F1   true  label",
        "a      0.912   0.893  0.902    428  bad",
        "b      0.963   0.969  0.966   1245  good",
        "c      0.000   0.000  0.000      0  数",
        "",
        "true label in rows, predicted in columns",
        "      a    b    c",
        "a   382   46    ·",
        "b    37 1207    1",
        "c     ·    ·    ·",
    ]


@pytest.mark.parametrize("k", [2, 13, LARGEST_MATRIX])
@pytest.mark.parametrize("most", [1, 10, 1000])
def test_the_table_is_readable_whatever_the_names(k, most):
    """Every count stands below the letter of its label, and no line is wider than a terminal."""
    confusion = np.random.default_rng(k).integers(0, most, (k, k))
    labels = [f"{'very ' * 30 * (i % 3)}long {i}" for i in range(k)]
    figures, rows = confusion_table(confusion, labels).split("\n\n")[1:]
    assert max(map(len, (figures + "\n" + rows).split("\n"))) <= 100
    for line, label in zip(figures.split("\n")[1:], labels, strict=True):
        assert line.endswith(label if len(label) <= 60 else f"  {label[:59]}…")
    _, head, *body = rows.split("\n")
    ends = [i for i in range(1, len(head) + 1) if (head + " ")[i] == " " != head[i - 1]]
    assert len(ends) == k and [line.split()[0] for line in body] == [chr(97 + i) for i in range(k)]
    for line, row in zip(body, confusion, strict=True):
        starts = [3, *ends]
        cells = [line[a:b].strip() for a, b in zip(starts, ends, strict=False)]
        assert cells == [str(n) if n else "·" for n in row] and len(line) == len(head)


def test_the_matrix_of_many_labels_is_left_out_of_the_table():
    k = LARGEST_MATRIX + 1
    table = confusion_table(np.eye(k, dtype=np.int64), [f"name {i}" for i in range(k)])
    assert "predicted in columns" not in table and f"{k} labels is too wide" in table
    assert all(f"name {i}" in table for i in range(k))


# ---- the picture ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, LARGEST_MATRIX + 1])
def test_the_picture_shows_counts_and_names(tmp_path, monkeypatch, k):
    """Matplotlib once read a label such as "$a_$" as a formula, which was wrong and raised."""
    figure = pytest.importorskip("matplotlib.figure")
    kept = []
    monkeypatch.setattr(figure.Figure, "savefig", keep_axes(figure.Figure.savefig, kept))
    confusion = np.random.default_rng(0).integers(0, 9, (k, k))
    confusion[1] = 0  # no division by zero
    labels = ["$a_$", *(f"{'x' * 40} {i}" for i in range(k - 1))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = draw_confusion(confusion, labels, tmp_path / "confusion.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = kept
    names = ["$a_$", *["x" * 23 + "…"] * (k - 1)]
    assert [t.get_text() for t in axes.get_xticklabels()] == names
    assert [t.get_text() for t in axes.get_yticklabels()] == names
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted label", "true label")
    # In an image the row is y. Beyond LARGEST_MATRIX numbers would be a blur.
    shown = {t.get_position()[::-1]: int(t.get_text()) for t in axes.texts}
    assert shown == ({p: int(n) for p, n in np.ndenumerate(confusion)} if k == 2 else {})
    shares = np.asarray(axes.images[0].get_array())
    assert shares[0] == pytest.approx(confusion[0] / confusion[0].sum()) and not shares[1].any()


def keep_axes(savefig, kept: list):
    def keeping(figure, *args, **kwargs):
        kept.append(figure.axes[0])
        return savefig(figure, *args, **kwargs)

    return keeping


def test_without_matplotlib_there_is_a_sentence_and_no_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_confusion(np.eye(2, dtype=np.int64), ["a", "b"], tmp_path / "c.png") is None
    assert capsys.readouterr().out == "c.png is not drawn: pip install matplotlib\n"
    assert not (tmp_path / "c.png").exists()


def test_a_lone_surrogate_in_a_label_is_drawn_as_a_question_mark(tmp_path):
    pytest.importorskip("matplotlib")
    labels = ["good", "bad\ud83d"]
    assert "bad?" in confusion_table(np.eye(2, dtype=np.int64), labels)
    assert draw_confusion(np.eye(2, dtype=np.int64), labels, tmp_path / "c.png").is_file()
