"""tasks/similar.py: no false negatives in a batch, and retrieval beside a search by hand."""

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bert import BERT, BERTConfig, EncoderConfig
from bpe import Tokenizer
from data.encoding import CLS, PAD, SEP, SPECIAL
from data.tables import Row, TableCorpus
from tasks import similar
from tasks.similar import Data, SampleFlags, Similarity
from wordpiece import WordPiece

WORDS = "sun moon star naïve déjà 7 42 x2 über-fast don't [SEP] (see) Ahoy".split(" ")  # noqa: SIM905
BPE = Tokenizer.train([f" {word}" for word in WORDS] * 9, 380, special_tokens=SPECIAL)
T = 13  # so that some texts are cut
Pair = tuple[str, str]


def pairs(n: int, seed: int = 0) -> list[Pair]:
    """n pairs of texts that occur once."""
    random = Random(seed)
    more = (random.choices(WORDS, k=random.randint(0, 5)) for _ in range(2 * n))
    sides = [" ".join([f"{seed}{'ab'[i % 2]}{i // 2}", *words]) for i, words in enumerate(more)]
    return list(zip(sides[::2], sides[1::2], strict=True))


TRAIN, VALID = pairs(50), pairs(23, seed=1)
# Texts in many pairs: a star of five, a chain of four, a pair with itself, one that occurs twice.
JOINED = [("hub", f"spoke {i}") for i in range(5)] + [
    (f"link {i}", f"link {i + 1}") for i in range(4)
]
JOINED += [("echo", "echo"), ("again", "once more"), ("again", "once  more"), *pairs(19, seed=2)]


def write(name: str, rows: list[Pair]) -> str:
    lines = [json.dumps({"text": a, "text_b": b, "label": 0}) + "\n" for a, b in rows]
    Path(name).write_text("".join(lines), encoding="utf-8")
    return name


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("train.jsonl", TRAIN)
    write("valid.jsonl", VALID)


def splits(rows=None, valid=None, tokenizer=BPE, block_size=T, **flags) -> tuple:
    """7 pairs fit into a batch by default. valid="" means that there is no such file."""
    write("train.jsonl", rows or TRAIN)
    write("valid.jsonl", valid or VALID)
    flags = {"batch_size": 14, **flags}
    flags.setdefault("tokens_per_step", flags["batch_size"] * block_size)
    base = {"seed": 1, "eval_tokens": 0, "row_length": 0, "cache_dir": "cache", "tokenizer": ""}
    base |= {"data": "train.jsonl", "valid": "" if valid == "" else "valid.jsonl"}
    config = SimpleNamespace(**{**base, "pattern": "gpt2", **flags})
    return Data.splits(config, {"vocab_size": 330, "block_size": block_size}, tokenizer)


def direct(rows: list[Pair], split: str = "train", batch_size: int = 14, **more) -> Data:
    """Without files."""
    return Data(corpus(rows), split, BPE, block_size=T, batch_size=batch_size, **more)


def corpus(rows: list[Pair]) -> TableCorpus:
    table = [Row(line, pair) for line, pair in enumerate(rows, 1)]
    return TableCorpus("x", "", "", {"train": table, "validation": table})


def ids_of(data: Data, text: str, limit: int = T) -> tuple[int, ...]:
    special, text = data.tokenizer.special_tokens, " ".join(text.split())
    return (special[CLS], *data.tokenizer.encode(f" {text}")[: limit - 2], special[SEP])


def read(data: Data, batch: dict) -> list[tuple[tuple, tuple, bool]]:
    """(ids of a, ids of b, whether it is asked for) of the rows of a batch."""
    B = len(batch["targets"])
    keep = batch.get("keep", torch.ones_like(batch["tokens"], dtype=torch.bool))
    assert ("keep" in batch) == (not keep.all()) and len(batch["tokens"]) == 2 * B
    assert torch.equal(batch["tokens"] == data.tokenizer.special_tokens[PAD], ~keep)
    assert keep.sum(1).max() == batch["tokens"].size(1) and keep[:, 0].all()
    assert all(w in (-100, j) for j, w in enumerate(batch["targets"].tolist()))
    rows = [tuple(row[kept].tolist()) for row, kept in zip(batch["tokens"], keep, strict=True)]
    return list(zip(rows[:B], rows[B:], (batch["targets"] != -100).tolist(), strict=True))


def epoch(data: Data, number: int = 0) -> list[list[tuple]]:
    steps = range(number * data.n_batches, (number + 1) * data.n_batches)
    return [read(data, data.batch(i)) for i in steps]


def expected(data: Data, rows: list[Pair]) -> Counter:
    return Counter((ids_of(data, a), ids_of(data, b)) for a, b in rows)


def pair_counts(batches: list[list[tuple]]) -> Counter:
    return Counter((a, b) for a, b, _ in chain.from_iterable(batches))


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# ---- batches -------------------------------------------------------------------------------------


def test_a_batch_by_hand():
    data, _ = splits([("sun", "moon star"), ("7", "42")])
    batch = data.batch(0)
    want = [ids_of(data, text) for text in ("sun", "7", "moon star", "42")]
    longest, pad = max(map(len, want)), BPE.special_tokens[PAD]
    rows = [[*ids, *[pad] * (longest - len(ids))] for ids in want]
    flipped = [rows[i] for i in (1, 0, 3, 2)]
    assert batch["tokens"].tolist() in (rows, flipped)
    assert batch["targets"].tolist() == [0, 1] and "segments" not in batch
    assert batch["keep"].sum(1).tolist() in (
        [len(x) for x in want],
        [len(want[i]) for i in (1, 0, 3, 2)],
    )
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64


def test_every_pair_comes_once_an_epoch_in_other_company_each_time():
    train, validation = splits()
    epochs = [epoch(train, number) for number in range(3)]
    for batches in epochs:
        assert pair_counts(batches) == expected(train, TRAIN) and len(batches) == 8
        assert sorted(map(len, batches)) == [6] * 6 + [7] * 2  # no small one at the end
        assert all(asked for _, _, asked in chain.from_iterable(batches))
    companies = [{frozenset(a for a, _, _ in batch) for batch in batches} for batches in epochs]
    assert not companies[0] & companies[1] and not companies[1] & companies[2]
    assert pair_counts(epoch(validation)) == expected(validation, VALID)


def test_batches_are_a_pure_function_of_seed_and_index():
    train, validation = splits(JOINED)
    n = train.n_batches
    want = {i: train.batch(i) for i in (0, n - 1, n, 5 * n + 3)}
    second, unmoved = splits(JOINED)
    other, still = splits(JOINED, seed=2)
    for i in sorted(want, reverse=True):
        assert same(second.batch(i), want[i]) and same(train.batch(i), want[i])
    assert not same(other.batch(0), want[0])
    for i in range(validation.n_batches):
        assert same(validation.batch(i), unmoved.batch(i)) and same(
            still.batch(i), unmoved.batch(i)
        )


@pytest.mark.parametrize(("batch_size", "row_length", "most"), [(14, 0, 7), (14, 5, 18), (5, 0, 2)])
def test_as_many_pairs_as_fit_into_the_step(batch_size, row_length, most):
    for data in splits(batch_size=batch_size, row_length=row_length):
        n, limit = data.n_all, row_length or T
        batches = epoch(data)
        assert len(batches) == data.n_batches == -(-n // most)
        assert (
            max(map(len, batches)) <= most and max(map(len, batches)) - min(map(len, batches)) < 2
        )
        assert all(data.batch(i)["tokens"].numel() <= batch_size * T for i in range(len(batches)))
        assert (
            data.tokens_per_epoch
            == data.n_batches * data.tokens_per_batch
            == len(batches) * 13 * batch_size
        )
        rows = TRAIN if data.split == "train" else VALID
        cut = sum(len(ids_of(data, x, 99)) > limit for x in chain.from_iterable(rows))
        assert pair_counts(batches) == Counter(
            (ids_of(data, a, limit), ids_of(data, b, limit)) for a, b in rows
        )
        assert cut and f"; {cut} texts are cut to {limit} tokens" in data.describe()


def test_a_divided_step_is_refused():
    """Two micro-batches would not be negatives of each other, which is not what the flags mean."""
    message = f"--tokens_per_step {28 * T} is divided into micro-batches of {14 * T} tokens"
    with pytest.raises(ValueError, match=re.escape(message) + ".* choose --batch_size 28 and"):
        splits(tokens_per_step=28 * T)
    assert splits(batch_size=28)[0].n_batches == 4


# ---- what means the same -------------------------------------------------------------------------


def naive_groups(rows: list[tuple]) -> list[set]:
    """Sets of texts, joined as long as two of them share one."""
    found = [set(row[:2]) for row in rows]
    while True:
        for i, one in enumerate(found):
            j = next((j for j in range(i) if found[j] & one), None)
            if j is not None:
                found[j] |= found.pop(i)
                break
        else:
            return found


def check(data: Data, number: int = 0) -> int:
    """The number of rows of an epoch that are not asked for; wrong ones fail."""
    batches = epoch(data, number)
    sets = naive_groups(list(chain.from_iterable(batches)))
    sizes = Counter(next(k for k, s in enumerate(sets) if a in s)
                    for a, _, _ in chain.from_iterable(batches))  # fmt: skip
    unasked = 0
    for batch in batches:
        group = [next(k for k, s in enumerate(sets) if a in s) for a, _, _ in batch]
        for (a, b, asked), k in zip(batch, group, strict=True):
            others = [x for x, kk in zip(batch, group, strict=True) if kk != k]
            assert asked == (group.count(k) == 1 and bool(others))
            if asked:
                assert all({a, b}.isdisjoint(x[:2]) for x in others)
            if sizes[k] <= len(batches):
                assert group.count(k) == 1
            unasked += not asked
    return unasked


def test_no_text_comes_twice_in_a_batch():
    for data in (direct(JOINED), direct(JOINED, "validation")):
        assert data.n_batches == 5 and [check(data, number) for number in range(3)] == [0] * 3
        assert data.asked == len(JOINED) and "not asked" not in data.describe()
        assert pair_counts(epoch(data)) == expected(data, JOINED)


def test_what_cannot_be_parted_is_not_asked_for():
    rows = [("hub", f"spoke {i}") for i in range(9)] + pairs(18)
    data = direct(rows)  # 27 pairs in 4 batches: the nine meet
    for number in range(4):
        assert check(data, number) == 9
    assert data.asked == 18 and "; 9 not asked for, as others mean the same" in data.describe()
    some = direct(rows[3:])  # 24 pairs in 4 batches: six of a group, two batches with two of them
    assert some.asked == 20 and check(some) == check(some, 1) == 4


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 30).map(lambda n: f"t{n}")] * 2), min_size=2, max_size=40),
    st.sampled_from([4, 6, 14]),
    st.sampled_from(["train", "validation"]),
)
def test_groups_and_dealing_beside_the_naive_way(rows, batch_size, split):
    try:
        data = direct(rows, split, batch_size)
    except ValueError as error:
        assert "has a negative" in str(error)
        return
    assert pair_counts(epoch(data)) == expected(data, rows)
    assert check(data) == check(data, 3) == len(rows) - data.asked


def test_without_any_negative_it_says_so():
    for rows in ([("a", "b")], [("a", "b"), ("c", "b"), ("c", "d")], [("a", "b"), ("a  ", "b")]):
        message = f"none of the {len(rows)} pairs of x for train has a negative, a text of other"
        with pytest.raises(ValueError, match=message):
            direct(rows)
    with pytest.raises(ValueError, match="a step of 39 tokens has no two pairs of texts of 13"):
        direct(TRAIN, batch_size=3)
    with pytest.raises(ValueError, match="has no two pairs of texts of 2 tokens"):
        direct(TRAIN, row_length=2)
    assert direct(TRAIN, row_length=3).pairs[0][0].shape == (3,)


# ---- validation ----------------------------------------------------------------------------------


def search(data: Data, vectors: dict) -> tuple[float, float]:
    """Recall and MRR with Python's loops: vectors maps what a text is to its vector."""
    found = [row for batch in epoch(data) for row in batch]
    sets = naive_groups(found)
    hits = reciprocal = 0.0
    for a, b, _ in found:
        mine = next(s for s in sets if a in s)

        def cosine(other, a=a):
            x, y = vectors[a, 0], vectors[other, 1]
            return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y) or 1))

        rank = 1 + sum(
            cosine(o) >= cosine(b) - 1e-9 for o in {x[1] for x in found} if o not in mine
        )
        hits += rank == 1
        reciprocal += 1 / rank
    return hits / len(found), reciprocal / len(found)


def predictions(data: Data, vectors: dict, scale=None) -> dict:
    out = {}
    for i, batch in enumerate(epoch(data)):
        texts = [(a, 0) for a, _, _ in batch] + [(b, 1) for _, b, _ in batch]
        out[i] = np.stack([vectors[text] for text in texts]).astype(np.float32)
        if scale is not None:
            out[i] *= scale.uniform(0.1, 9, (len(texts), 1)).astype(np.float32)
    return out


def drawn(data: Data, draw, noise: float = 0.0, seed: int = 0) -> dict:
    """{(text, side): vector}: `draw` of what it means, and some noise."""
    random, found = np.random.default_rng(seed), [row for batch in epoch(data) for row in batch]
    vectors = {}
    for texts in naive_groups(found):
        meaning = draw(random)
        for key in ((text, side) for text in sorted(texts) for side in (0, 1)):
            vectors[key] = meaning + noise * random.normal(size=len(meaning))
    return vectors


@pytest.mark.parametrize("rows", [VALID, JOINED], ids=["apart", "joined"])
@pytest.mark.parametrize("block", [5, 1024])
def test_retrieval_over_the_whole_validation_set_beside_a_search_by_hand(rows, block, monkeypatch):
    monkeypatch.setattr(similar, "BLOCK", block)
    data = direct(rows, "validation")
    assert data.n_batches > 3
    for vectors in (
        drawn(data, lambda random: random.normal(size=4), 0.6),
        drawn(data, lambda random: random.integers(-2, 3, 3)),  # full of ties, and with zeros
        drawn(data, lambda random: np.array([9.0, random.normal(), 0]), 0.05),  # all of them alike
    ):
        recall, mrr = search(data, vectors)
        assert 0 < recall < mrr < 1
        want = pytest.approx({"recall_at_1": recall, "mrr": mrr}, abs=1e-6)
        assert data.measure(predictions(data, vectors)) == want
        scale = np.random.default_rng(1)  # the length of a vector says nothing
        assert data.measure(predictions(data, vectors, scale)) == want


def test_retrieval_at_its_ends():
    data = direct(JOINED, "validation")
    vectors = drawn(data, lambda random: random.normal(size=9))
    assert data.measure(predictions(data, vectors)) == {"recall_at_1": 1.0, "mrr": 1.0}
    # A model that has collapsed, or is broken, finds nothing.
    for broken in (np.full(9, 0.37), np.zeros(9), np.full(9, np.nan)):
        worst = data.measure(predictions(data, dict.fromkeys(vectors, broken)))
        assert worst["recall_at_1"] == 0 and 0 < worst["mrr"] < 0.04
    assert all(type(x) is float for x in worst.values())


def test_limited_validation_is_evenly_spaced():
    whole = direct(VALID, "validation")
    tokens = sum(len(x) for pair in whole.pairs for x in pair)
    some = direct(VALID, "validation", max_tokens=tokens // 4 + 1)
    chosen = [VALID[k * 23 // 5] for k in range(5)]
    assert pair_counts(epoch(some)) == expected(some, chosen)
    assert some.describe().startswith("5 pairs, evenly spaced among 23, ")
    assert len(direct(VALID, "validation", max_tokens=1).pairs) == 2
    assert len(direct(VALID, max_tokens=1).pairs) == len(VALID)
    vectors = drawn(some, lambda random: random.normal(size=9))
    assert some.measure(predictions(some, vectors)) == {"recall_at_1": 1.0, "mrr": 1.0}


def test_what_is_told():
    train, validation = splits()
    tokens = sum(len(x) for pair in train.pairs for x in pair)
    assert train.describe().startswith(f"50 pairs, {tokens:,} tokens, at most 7 pairs in a batch")
    assert train.rule == validation.rule == "50 rows train, 23 validate (the given files)"
    assert train.prompts == [" ".join(x.split()) for pair in VALID[:3] for x in pair]
    report = train.report({"loss": 12.0, "accuracy": 3}, {"loss": 4})
    assert report == {"loss": 3.0, "accuracy": 0.75}
    assert train.report({"loss": 0.0, "accuracy": 0.0}, {"loss": 0}) == {"loss": 0, "accuracy": 0}
    tenth, held = splits(valid="")
    assert (tenth.n_all, held.n_all) == (45, 5) and tenth.rule.startswith(
        "5 of 50 rows, drawn with a fixed seed"
    )
    assert splits(valid="", seed=2)[1].pairs[0][0].tolist() == held.pairs[0][0].tolist()
    assert tenth.fingerprint == held.fingerprint != train.fingerprint


# ---- tokenizers and the model --------------------------------------------------------------------


def test_the_tokenizer_is_learnt_from_the_training_pairs():
    rows = [(f"abab abab {i}", "XYXY") for i in range(9)] + [(f"{i}", f"n{i}") for i in range(9)]
    others = [(f"QZQZ {i}", f"jkjk {i}") for i in range(9)]
    train, validation = splits(rows, others, None)
    ranks = train.tokenizer.ranks
    assert train.tokenizer is validation.tokenizer
    assert set(SPECIAL) == set(train.tokenizer.special_tokens)
    assert b" abab" in ranks and b" XYXY" in ranks  # as words stand in a text
    assert not any(set(token) & set(b"QZjk") for token in ranks if len(token) > 1)


def test_texts_are_equal_if_the_model_reads_the_same():
    """This vocabulary ignores capitals. Two texts differ even if only what is cut off differs;
    otherwise a common beginning would make all texts one group."""
    uncased = WordPiece.train(["one two three four five six"] * 3, 60, min_frequency=1)
    rows = [("One", "two"), ("one", "three"), ("four", "TWO "), ("five", "six")]
    data = Data(corpus(rows), "train", uncased, block_size=T, batch_size=4)
    assert len(set(data.group[:3])) == 1 and len(set(data.group)) == 2
    rows = [("\u200b", "six"), ("one", "five")]  # the first is nothing to it
    empty = Data(corpus(rows), "train", uncased, block_size=T, batch_size=4)
    assert len(empty.pairs[0][0]) == 2 and empty.pairs[0][0].dtype == np.int64
    cut = direct([("sun moon star", "x2"), ("sun moon 7", "42"), ("moon", "7")], row_length=4)
    assert len(set(cut.group)) == 3 and (cut.pairs[0][0] == cut.pairs[1][0]).all()


def test_a_bert_reads_the_batches():
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 26, "block_size": T, "nsp": False}
    model, (train, _) = BERT(BERTConfig(BPE.vocab_size, **sizes)).eval(), splits()
    batch = train.batch(0)
    with torch.no_grad():
        together = model.features(batch["tokens"], keep=batch["keep"])
        for row, (tokens, keep) in enumerate(zip(batch["tokens"], batch["keep"], strict=True)):
            alone = model.features(tokens[keep][None])[0]
            torch.testing.assert_close(together[row][keep], alone, rtol=1e-4, atol=1e-5)


# ---- sample.py -----------------------------------------------------------------------------------


def network() -> Similarity:
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 26, "block_size": T}
    model = Similarity(EncoderConfig(BPE.vocab_size, **sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def naive_nearest(model: Similarity, texts: list[str]) -> list[tuple[float, str]]:
    rows = [[BPE.special_tokens[x] for x in (CLS, SEP)] for _ in texts]
    for row, text in zip(rows, texts, strict=True):
        row[1:1] = BPE.encode(f" {text}")[: T - 2]
    with torch.no_grad():
        vectors = [model(torch.tensor([row]))[0] for row in rows]
    found = []
    for i, a in enumerate(vectors):
        others = [j for j in range(len(texts)) if j != i]
        cosines = {j: float(torch.cosine_similarity(a, vectors[j], dim=0)) for j in others}
        best = max(others, key=cosines.__getitem__)
        found.append((cosines[best], texts[best]))
    return found


def test_a_run_shows_the_nearest_other_text_of_each(capsys):
    model, data = network(), splits()[1]
    blocks = similar.show(model, BPE, data, Path())
    assert len(blocks) == 6
    for text, block, (cosine, other) in zip(
        data.prompts, blocks, naive_nearest(model, data.prompts), strict=True
    ):
        shown = re.fullmatch(r"(.*)\n-> (-?\d\.\d{3})  (.*)", block)
        assert (shown[1], shown[3]) == (text, other)
        assert float(shown[2]) == pytest.approx(cosine, abs=6e-4)
    assert similar.most_similar(model, BPE, ["one"]) == ["1.000  one"]
    assert similar.ask(data.prompts) == ("--similar", "queries.txt", "lines.txt")


def test_sample_scores_embeds_or_compares(capsys):
    model = network()
    flags = {"row_length": 5, "batch_size": 14, "tokens_per_step": 14 * T, "gone": "a later flag"}
    checkpoint = {"train_config": flags, "model_config": {"block_size": T}}
    scored = []
    run = {"checkpoint": checkpoint, "score": scored.append}
    similar.sample(model, BPE, SampleFlags(eval="valid.jsonl"), **run)
    (data,) = scored
    want = splits(TRAIN, VALID, row_length=5)[1]
    assert same(data.batch(0), want.batch(0)) and len(data.pairs) == len(VALID)
    with pytest.raises(
        ValueError, match=r"^--eval x\.tsv is no file here: name one as for --data$"
    ):
        similar.sample(model, BPE, SampleFlags(eval="x.tsv"), **run)
    Path("a.txt").write_text("sun moon\nstar\n", encoding="utf-8")
    similar.sample(model, BPE, SampleFlags(embed="a.txt", out="a.npy"), **run)
    assert capsys.readouterr().out == "2 embeddings of 26 numbers: a.npy\n"
    np.testing.assert_allclose(
        np.load("a.npy"), similar.embed(model, BPE, ["sun moon", "star"], "mean", 1), atol=1e-5
    )
    similar.sample(model, BPE, SampleFlags(similar=("a.txt", "a.txt"), top=1), **run)
    assert capsys.readouterr().out.splitlines() == [
        *("sun moon", "  1.000  line 1: sun moon", "star", "  1.000  line 2: star")
    ]
    assert len(scored) == 1


@pytest.mark.parametrize("given", [{}, {"embed": "a", "eval": "b"}])
def test_one_thing_is_asked_of_sample(given):
    message = f"give one of --embed, --similar and --eval, not {len(given)}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        SampleFlags(**given)


def test_the_shapes_of_the_plan_are_those_of_a_batch():
    batch = splits()[0].batch(0)
    shapes = similar.batch_shapes(None, None, *batch["tokens"].shape)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == shapes
