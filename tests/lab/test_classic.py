"""lab/classic.py: naive Bayes by hand and by formula, the SVM beside scikit-learn and duality."""

import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import peer, shared

from data.labelled import open_labelled
from lab import classic
from lab.classic import (
    Classic,
    ClassicConfig,
    Counts,
    count_words,
    dual_descent,
    inverse_frequencies,
    naive_bayes,
    tf_idf,
)

TEXTS = [
    *(("Chinese Beijing Chinese", "c"), ("chinese chinese Shanghai", "c")),
    *(("Chinese Macao", "c"), ("Tokyo Japan Chinese", "j")),
]


def corpus(folder: Path, train, valid):
    for name, rows in (("train.csv", train), ("valid.csv", valid)):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    return open_labelled(str(folder / "train.csv"), valid=str(folder / "valid.csv"))


def random_rows(n: int, labels: str, seed: int) -> list[tuple[str, str]]:
    """Texts whose words depend on the label, but not always."""
    random, rows = np.random.default_rng(seed), []
    for i in range(n):
        k = i % len(labels)
        words = (random.poisson(6, 1 + i % 9) + 2 * k).tolist()
        rows.append((" ".join(f"w{word}" for word in words), labels[k]))
    return rows


def dense(counts: Counts, V: int) -> np.ndarray:
    table = np.zeros((len(counts.starts) - 1, V))
    table[counts.rows(), counts.words] = counts.values
    return table


# ---- naive Bayes ---------------------------------------------------------------------------------


def test_the_textbooks_example(tmp_path):
    """Manning, Raghavan and Schütze 2008, example 13.1: 8 words of class c, 3 of j, 6 in all."""
    made = corpus(tmp_path, TEXTS, [("chinese chinese chinese tokyo japan nowhere", "c")])
    model = Classic(made, ClassicConfig(data="-"))
    train, _, V = model.read()
    matrix, prior = naive_bayes(train, model.y, V, 2)
    assert V == 6 and np.exp(prior).tolist() == pytest.approx([3 / 4, 1 / 4])
    at = model.vocabulary.index
    assert np.exp(matrix[at("chinese")]).tolist() == pytest.approx([6 / 14, 2 / 9])
    assert np.exp(matrix[at("tokyo")]).tolist() == pytest.approx([1 / 14, 2 / 9])
    fitted = model.bayes()
    assert fitted.right.tolist() == [True]  # 0.0003 against 0.0001
    config = ClassicConfig(data="-", words=2)
    assert Classic.telling(model, fitted.matrix)[0].startswith("  c: chinese ")
    model.config = config
    assert model.telling(fitted.matrix)[1] == "  j: tokyo japan"


def test_naive_bayes_equals_its_formula(tmp_path):
    train, valid = random_rows(61, "abc", 1), random_rows(37, "abc", 2)
    found = Classic(corpus(tmp_path, train, valid), ClassicConfig(data="-")).bayes()
    words = {word for text, _ in train for word in text.split()}
    want = []
    for text, label in valid:
        scores = {}
        for k in "abc":
            own = [word for other, name in train if name == k for word in other.split()]
            scores[k] = math.log(sum(name == k for _, name in train) / len(train))
            for word in text.split():
                if word in words:
                    scores[k] += math.log((own.count(word) + 1) / (len(own) + len(words)))
        want.append(max(scores, key=scores.get) == label)
    assert found.right.tolist() == want and 0.4 < found.right.mean() < 1


def test_words_that_were_never_seen_leave_the_prior(tmp_path):
    made = corpus(tmp_path, TEXTS, [("nowhere", "j"), ("nothing", "c")])
    model = Classic(made, ClassicConfig(data="-"))
    assert model.bayes().right.tolist() == [False, True]
    assert model.svm().right.tolist() == [False, True]  # by the bias alone


# ---- the support-vector machine ------------------------------------------------------------------


def prepared(folder: Path, C: float, labels="ab"):
    made = corpus(folder, random_rows(61, labels, 1), random_rows(37, labels, 2))
    model = Classic(made, ClassicConfig(data="-", C=C))
    train, validation, V = model.read()
    return model, train, validation, V


@pytest.mark.parametrize("C", [0.1, 1.0, 30.0])
def test_the_dual_equals_the_primal(tmp_path, C):
    """At the optimum, and nowhere else, the primal's value is minus the dual's."""
    model, train, _, V = prepared(tmp_path, C)
    x = tf_idf(train, inverse_frequencies(train, V))
    y = np.where(model.y == 0, 1.0, -1.0)
    w, alpha = dual_descent(x, y, V + 1, C, tolerance=1e-6, most=10_000)
    X = dense(x, V + 1)
    assert (X**2).sum(1).tolist() == pytest.approx([2] * 61)  # length 1, and the bias
    assert w.tolist() == pytest.approx(((alpha * y) @ X).tolist())
    primal = w @ w / 2 + C * (np.maximum(0, 1 - y * (X @ w)) ** 2).sum()
    dual = w @ w / 2 + (alpha**2).sum() / (4 * C) - alpha.sum()
    assert primal == pytest.approx(-dual, rel=1e-5) and (alpha >= 0).all() and primal > 0
    assert 0 < (alpha == 0).sum() < 61 or C < 1


@pytest.mark.parametrize("labels", ["ab", "abc"])
def test_the_svm_equals_scikit_learns(tmp_path, labels):
    text, svm = peer("sklearn.feature_extraction.text"), peer("sklearn.svm")
    model, *_ = prepared(tmp_path, 1.0, labels)
    vectors = text.TfidfVectorizer(analyzer=str.split)
    train, valid = (
        [example.texts[0] for example in model.corpus.splits[split]]
        for split in ("train", "validation")
    )
    theirs = svm.LinearSVC(tol=1e-8, max_iter=100_000).fit(vectors.fit_transform(train), model.y)
    ours = model.svm()
    assert (theirs.predict(vectors.transform(valid)) == model.wanted).tolist() == (
        ours.right.tolist()
    )
    columns = [vectors.vocabulary_[word] for word in model.vocabulary]
    want = theirs.coef_[:, columns].T
    matrix = ours.matrix[:, 1:] if labels == "ab" else ours.matrix
    np.testing.assert_allclose(matrix, want, atol=3e-3)
    assert np.abs(want).max() > 0.3


def test_the_weights_of_words_are_their_formula(tmp_path):
    model, *_ = prepared(tmp_path, 1.0)
    counts = count_words(model.train, {word: i for i, word in enumerate(model.vocabulary)})
    table = dense(counts, len(model.vocabulary))
    idf = inverse_frequencies(counts, len(model.vocabulary))
    want = [math.log(62 / (1 + (column > 0).sum())) + 1 for column in table.T]
    assert idf.tolist() == pytest.approx(want) and len(set(want)) > 5


# ---- the command ---------------------------------------------------------------------------------


def test_both_models_are_printed_with_their_telling_words(tmp_path, capsys):
    train, valid = random_rows(61, "ab", 1), random_rows(37, "ab", 2)
    corpus(tmp_path, train, valid)
    files = [f"--data={tmp_path / 'train.csv'}", f"--valid={tmp_path / 'valid.csv'}"]
    classic.main(files)
    said = capsys.readouterr().out
    for name in ("naive Bayes", "SVM"):
        assert re.search(rf"^{name} +0\.\d{{4}} ± 0\.0\d{{3}} +\d\.\d\d s$", said, re.M)
    assert len(re.findall("^  [ab]:( w[0-9]+){8}$", said, re.M)) == 4
    classic.main([*files, "--words=0"])
    assert "  a:" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="--data is missing"):
        classic.main([])


@pytest.mark.slow
def test_the_figures_of_the_page(capsys):
    data, valid = shared("sst2/train.tsv"), shared("sst2/dev.tsv")
    classic.main([f"--data={data}", f"--valid={valid}"])
    said = capsys.readouterr().out
    assert "naive Bayes  0.8096 ± 0.0133" in said and "SVM          0.7890" in said
