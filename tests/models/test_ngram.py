"""models/ngram.py: equal to the definition written out, and to KenLM's numbers."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from conftest import SHARED

import decoding
from models.ngram import (
    FALLBACK,
    SMOOTHINGS,
    NGram,
    NGramConfig,
    count_ngrams,
    discounts,
    mixture_weights,
    read_arpa,
    write_arpa,
)

V, BOUNDARY = 7, 6


def documents(seed: int, count: int = 12, longest: int = 40) -> list[list[int]]:
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, V)
    weights /= weights.sum()
    lengths = random.integers(1, longest, count)
    return [random.choice(BOUNDARY, length, p=weights).tolist() for length in lengths]


def stream(docs: list[list[int]]) -> np.ndarray:
    return np.concatenate([[*doc, BOUNDARY] for doc in docs])


def counted(docs: list[list[int]], order: int, **settings) -> NGram:
    model = NGram(NGramConfig(V, order=order, boundary=BOUNDARY, **settings))
    model.count(stream(docs))
    return model


def kneser_ney(docs: list[list[int]], order: int):
    """p(token | context) by the formulas, with dictionaries, document by document."""
    raw, left = Counter(), defaultdict(set)
    for doc in docs:
        doc = [BOUNDARY, *doc, BOUNDARY]
        for i in range(1, len(doc)):
            for n in range(1, min(order, i + 1) + 1):
                gram = tuple(doc[i - n + 1 : i + 1])
                raw[gram] += 1
                if n > 1:
                    left[gram[1:]].add(gram[0])
    adjusted = {
        gram: count if len(gram) == order or gram not in left else len(left[gram])
        for gram, count in raw.items()
    }
    of_length = {n: [c for g, c in adjusted.items() if len(g) == n] for n in range(1, order + 1)}
    D = {n: (0.0, *discounts(np.array(counts))) for n, counts in of_length.items()}
    follow = defaultdict(dict)
    for gram, count in adjusted.items():
        follow[gram[:-1]][gram[-1]] = count

    def p(token: int, context: tuple[int, ...]) -> float:
        below = p(token, context[1:]) if context else 1 / V
        counts = follow.get(context)
        if counts is None:
            return below
        d, total = D[len(context) + 1], sum(counts.values())
        given_up = sum(d[min(c, 3)] for c in counts.values())
        mine = counts.get(token, 0)
        return (mine - d[min(mine, 3)]) / total + given_up / total * below

    return p


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_of_the_definition(order):
    for seed in range(5):
        docs = documents(seed)
        model, p = counted(docs, order), kneser_ney(docs, order)
        for doc in documents(seed + 100, count=4):
            text = [BOUNDARY, *doc, BOUNDARY]
            found = model.log_probs(torch.tensor([text[:-1]]), torch.tensor([text[1:]]))[0]
            for i, log_p in enumerate(found.tolist()):
                context = tuple(text[max(0, i - order + 2) : i + 1]) if order > 1 else ()
                assert log_p == pytest.approx(math.log(p(text[i + 1], context)), abs=2e-6)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("order", [1, 4])
def test_the_distribution_is_what_each_token_has(smoothing, order):
    model = counted(documents(3), order, smoothing=smoothing)
    for context in documents(7, count=6, longest=9):
        x = torch.tensor([context])
        row = model(x)[0, -1]
        for token in range(V):
            targets = torch.full_like(x, token)
            assert model.log_probs(x, targets)[0, -1] == pytest.approx(row[token].item(), abs=1e-6)
        total = row.exp().sum().item()
        if smoothing != "stupid_backoff":
            assert total == pytest.approx(1, abs=1e-5)
    assert torch.isfinite(row).all()  # no token is impossible, seen or not


def test_add_k_and_stupid_backoff_by_hand():
    docs = [[0, 1, 0, 1, 0, 2]]
    added = counted(docs, 2, smoothing="add_k", added=0.5)
    p = added(torch.tensor([[0]]))[0, -1].exp()
    # 0 is followed by 1 twice and by 2 once.
    assert p[1].item() == pytest.approx((2 + 0.5) / (3 + 0.5 * V))
    assert p[3].item() == pytest.approx(0.5 / (3 + 0.5 * V))
    stupid = counted(docs, 3, smoothing="stupid_backoff")
    s = stupid(torch.tensor([[1, 0]]))[0, -1].exp()
    assert s[1].item() == pytest.approx(1 / 2) and s[2].item() == pytest.approx(1 / 2)
    assert s[0].item() == pytest.approx(0.4 * 0.4 * 3 / 7)  # of 7 tokens, with the boundary
    assert s[3].item() == pytest.approx(0.4**3 / V)


def test_discounts_out_of_range_fall_back():
    many = np.repeat([1, 2, 3, 4], [100, 40, 20, 10])
    y = 100 / 180
    want = 1 - 2 * y * 0.4, 2 - 3 * y * 0.5, 3 - 4 * y * 0.5
    assert discounts(many) == pytest.approx(want)
    assert discounts(np.array([1, 1, 2, 9])) == FALLBACK  # none is counted three times
    assert discounts(np.repeat([1, 2, 3, 4], [10, 1, 90, 10])) == FALLBACK  # 2 - 3·y·90 < 0


def test_boundaries_and_a_text_without_them():
    levels = count_ngrams(np.array([0, 1, BOUNDARY, 0, 1, BOUNDARY]), 3, V, BOUNDARY)
    bigrams = {(k // V, k % V): c for k, c in zip(*levels[1][:2], strict=True)}
    assert bigrams == {(0, 1): 2, (1, BOUNDARY): 2, (BOUNDARY, 0): 2}  # of 5 neighbours, 2 · 3
    assert len(levels[2].keys) == 2  # "boundary 0 1" and "0 1 boundary"
    assert (levels[1].adjusted == [1, 1, 2]).all()  # the last begins its documents: its count
    levels = count_ngrams(np.array([0, 1, BOUNDARY, 0, 1]), 3, V)
    assert len(levels[1].keys) == 3 and len(levels[2].keys) == 3
    with pytest.raises(ValueError, match="without tokens"):
        count_ngrams(np.array([], dtype=int), 3, V)


def test_token_files_begin_their_documents_with_a_boundary():
    behind = count_ngrams(np.array([0, 1, BOUNDARY, 2, 0, BOUNDARY]), 3, V, BOUNDARY)
    before = count_ngrams(np.array([BOUNDARY, 0, 1, BOUNDARY, 2, 0]), 3, V, BOUNDARY)
    for one, other in zip(behind, before, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_was_counted_before_is_forgotten():
    model = counted(documents(0), 5)
    model.count(stream([[0], [1]]))
    fresh = counted([[0], [1]], 5)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(fresh.named_buffers())[name]), name


def test_documents_shorter_than_the_order():
    model = counted([[0], [1], [0]], 9)
    text = torch.tensor([[BOUNDARY, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    assert torch.isfinite(model(text, text)["loss"])
    assert model(text).exp().sum(-1).sub(1).abs().max() < 1e-5


def test_what_is_written_with_a_cache_is_what_is_written_without():
    model = counted(documents(1), 4)

    def written(use_cache: bool) -> list:
        torch.manual_seed(0)
        return list(decoding.generate(model, [[0, 1], [2]], pick, 20, use_cache=use_cache))

    def pick(logits, rows):
        return logits.softmax(-1).multinomial(1)[:, 0]

    assert written(True) == written(False) and len(written(True)) == 21


def test_targets_of_minus_100_do_not_count_and_weights_come_back():
    model = counted(documents(2), 3)
    tokens, targets = torch.randint(0, V, (2, 3, 11))
    whole = -model.log_probs(tokens, targets)
    targets[1:] = -100
    assert model(tokens, targets)["loss"] == pytest.approx(whole[0].sum().item(), rel=1e-6)
    fresh = NGram(model.config)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(tokens, targets)["loss"], model(tokens, targets)["loss"])
    with pytest.raises(RuntimeError, match="keys_4"):
        fresh.load_state_dict(counted(documents(2), 4).state_dict())


def test_mixture_weights_are_the_likeliest():
    log_p = torch.randn(500, 2, generator=torch.Generator().manual_seed(1)) - 2
    log_p[:, 0] += 0.3
    weights = mixture_weights(log_p, 500)
    grid = torch.linspace(0.001, 0.999, 999).double()
    likelihood = (grid[:, None] * log_p[:, 0].exp() + (1 - grid[:, None]) * log_p[:, 1].exp()).log()
    assert weights[0].item() == pytest.approx(grid[likelihood.sum(1).argmax()].item(), abs=1e-3)
    assert weights.sum() == pytest.approx(1)


# ---- ARPA ----------------------------------------------------------------------------------------

WORDS = [*"abcdef", "."]


def test_arpa_there_and_back(tmp_path):
    model = counted(documents(4), 4)
    write_arpa(model, tmp_path / "a", WORDS)
    other, words = read_arpa(tmp_path / "a")
    assert words == [*"abcdef", "</s>"] and other.config.boundary == BOUNDARY
    tokens, targets = torch.randint(0, V, (2, 5, 30))
    torch.testing.assert_close(
        other.log_probs(tokens, targets), model.log_probs(tokens, targets), atol=5e-6, rtol=0
    )
    write_arpa(other, tmp_path / "b", WORDS)
    rows = [(tmp_path / name).read_text(encoding="utf-8").count("\n") for name in "ab"]
    assert rows[0] == rows[1] > 300


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "has no n-grams"),
        ("1-grams:\n-1 b\n", "line 2: this is no probability with 1"),
        ("1-grams:\n-1\ta\n\n\\2-grams:\n-1\ta c\n", "line 5: this is no probability with 2"),
        ("1-grams:\nx\ta\n", "line 2: .*: x"),
        ("1-grams:\n-1\ta\n-1\ta\n", "names a word twice"),
        ("1-grams:\n-1\ta\n-99\t<s>\t-1\n", "<s> without </s>"),
        ("1-grams:\n-1\ta\n\\2-grams:\n\\3-grams:\n-1\ta a a\n", "has a context that is none"),
        ("1-grams:\n-1\ta", "ends before"),
    ],
)
def test_what_is_no_arpa_file_is_refused(tmp_path, text, message):
    whole = f"\\{text}" + "\\end\\\n" * text.endswith("\n")
    (tmp_path / "a.arpa").write_text(whole, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_arpa(tmp_path / "a.arpa")


@pytest.mark.parametrize("words", [["a b", *"cdefgh"], ["", *"cdefgh"], [*"aacdef", "."], [*"ab"]])
def test_names_that_arpa_cannot_hold_are_refused(tmp_path, words):
    with pytest.raises(ValueError, match="give"):
        write_arpa(counted(documents(0), 2), tmp_path / "a.arpa", words)


def test_kenlm_scores_our_file_alike(tmp_path):
    kenlm = pytest.importorskip("kenlm")  # not required: it takes more than a minute to build
    docs = documents(5, count=200)
    for order in (2, 3, 5):
        model = counted(docs, order)
        write_arpa(model, tmp_path / "a.arpa", WORDS)
        reader = kenlm.Model(str(tmp_path / "a.arpa"))
        for doc in documents(6, count=50):
            text = torch.tensor([[BOUNDARY, *doc, BOUNDARY]])
            ours = model.log_probs(text[:, :-1], text[:, 1:]).sum().item() / math.log(10)
            theirs = reader.score(" ".join(WORDS[i] for i in doc), bos=True, eos=True)
            assert ours == pytest.approx(theirs, abs=1e-5 * len(doc))


# ---- KenLM's numbers on a text -------------------------------------------------------------------

SHAKESPEARE = SHARED / "shakespeare.txt"


def shakespeare(separate: bool, order: int) -> tuple[float, int, int]:
    """(nats of the last tenth, its characters, its lines), learnt from the rest. Lines are
    documents, if they are separate. The vocabulary has one word more: KenLM's "unknown"."""
    text = SHAKESPEARE.read_text(encoding="utf-8")
    parts = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    letters = sorted(set(text) - ({"\n"} if separate else set()))
    end = len(letters)
    ids = {letter: i for i, letter in enumerate(letters)} | ({"\n": end} if separate else {})
    train, rest = (np.array([ids[c] for c in part] + [end]) for part in parts)
    model = NGram(NGramConfig(end + 2, order=order, boundary=end))
    model.count(train)
    text = torch.from_numpy(np.concatenate([[end], rest]))[None]
    loss = model(text[:, :-1], text[:, 1:])["loss"].item()
    return loss, len(parts[1]), len(rest)


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="no Tiny Shakespeare here")
@pytest.mark.parametrize(
    "order,nats", [pytest.param(5, 1.5613, marks=pytest.mark.slow), (7, 1.5167)]
)
def test_kenlms_loss_on_one_stream_of_characters(order, nats):
    loss, characters, _ = shakespeare(False, order)
    assert loss / characters == pytest.approx(nats, abs=6e-5)  # KenLM's, in four digits


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="no Tiny Shakespeare here")
@pytest.mark.parametrize(
    "order,perplexity", [(4, 5.753490), pytest.param(6, 4.678999, marks=pytest.mark.slow)]
)
def test_kenlms_perplexity_of_lines(order, perplexity):
    loss, _, targets = shakespeare(True, order)
    assert math.exp(loss / targets) == pytest.approx(perplexity, rel=2e-6)
