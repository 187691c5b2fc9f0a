"""tasks/classify.py: rows of labelled texts, each once an epoch, with the label that it has."""

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
from conftest import peer
from hypothesis import given
from hypothesis import strategies as st

from engine.hub.wordpiece_json import wordpiece_to_json
from tasks.classify import Data, Flags, encode_parts
from tasks.encoders import collate
from wordpiece import WordPiece

T = 24
SPECIAL = {"[PAD]": 7, "[CLS]": 5, "[SEP]": 6}
LABELS = {"red": 150, "green": 41, "blue": 9}  # of training; blue, green, red in their order
BOTH = pytest.mark.parametrize("pairs", [False, True])


def examples(pairs: bool, counts: dict[str, int], seed: int = 0) -> list[tuple[str, ...]]:
    """No text comes twice, and each names its label: so a row tells what its target must be."""
    random, rows = Random(seed), []
    for label, n in counts.items():
        for i in range(n):
            a, b = (
                " ".join([label[0], str(i), *random.choices("xyz", k=random.randint(0, 11))])
                for _ in "ab"
            )
            rows.append((a, b.upper(), label) if pairs else (a, label))
    random.shuffle(rows)
    return rows


def write(name: str, rows: list[tuple[str, ...]]) -> str:
    names = ["text", "text_b", "label"] if len(rows[0]) == 3 else ["text", "label"]
    Path(name).write_text("\n".join("\t".join(row) for row in [names, *rows]), encoding="utf-8")
    return name


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train_rows(pairs: bool) -> list[tuple[str, ...]]:
    return examples(pairs, LABELS)


def valid_rows(pairs: bool) -> list[tuple[str, ...]]:
    return examples(pairs, {"red": 37, "blue": 13}, seed=1)


def splits(pairs=False, *, block_size=64, labels=(), tokenizer=None, **settings):
    settings = {"batch_size": 4, "eval_tokens": 0, "pattern": "char", **settings}
    settings.setdefault("tokens_per_step", settings["batch_size"] * block_size)
    data, valid = write("train.tsv", train_rows(pairs)), write("valid.tsv", valid_rows(pairs))
    flags = Flags(data=data, valid=valid, cache_dir="cache", **settings)
    sizes = {"vocab_size": 300, "block_size": block_size, "labels": labels}
    return Data.splits(flags, sizes, tokenizer)


def rows_of(data: Data, batch: dict[str, torch.Tensor]) -> list[tuple]:
    """(text, …, label) of a batch's rows, read from the tensors; a batch that is not to be counted
    has none. Checks what holds for all rows."""
    special, tokens, targets = data.tokenizer.special_tokens, batch["tokens"], batch["targets"]
    keep = batch.get("keep", torch.ones_like(tokens, dtype=torch.bool))
    assert torch.equal(tokens == special["[PAD]"], ~keep) and ("keep" in batch) == (not keep.all())
    assert tokens.dtype == targets.dtype == torch.int64 and targets.shape == tokens[:, 0].shape
    assert keep.any(0).all() and tokens.size(1) <= data.row_length
    if (targets == -100).all():
        return []
    rows = []
    for r, n in enumerate(keep.sum(1).tolist()):
        ids, segments = tokens[r, :n].tolist(), [0] * tokens.size(1)
        assert ids[0] == special["[CLS]"] and ids[-1] == special["[SEP]"]
        ends = [i for i, x in enumerate(ids) if x == special["[SEP]"]]
        if "segments" in batch:  # 0 for [CLS] a [SEP], 1 for b [SEP], 0 for padding
            segments[ends[0] + 1 : n] = [1] * (n - ends[0] - 1)
            assert batch["segments"][r].tolist() == segments
        assert len(ends) == 1 + ("segments" in batch)
        starts = [1, *(end + 1 for end in ends)]
        parts = [data.tokenizer.decode(ids[a:b]) for a, b in zip(starts, ends, strict=False)]
        assert all(part.startswith(" ") for part in parts)
        rows.append((*(part[1:] for part in parts), data.labels[targets[r]]))
    return rows


def epoch(data: Data, number: int = 0) -> list[tuple]:
    n = data.n_batches
    return [row for i in range(number * n, number * n + n) for row in rows_of(data, data.batch(i))]


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# ---- rows and batches ----------------------------------------------------------------------------


@BOTH
def test_every_text_comes_once_an_epoch_with_its_own_label(pairs):
    train, validation = splits(pairs)
    assert train.labels == validation.labels == ("blue", "green", "red")
    orders = [epoch(train, number) for number in range(3)]
    assert all(sorted(rows) == sorted(train_rows(pairs)) for rows in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert sorted(epoch(validation)) == sorted(valid_rows(pairs))
    assert all(("segments" in train.batch(i)) == pairs for i in range(9))


@BOTH
def test_batches_are_a_pure_function_of_seed_and_index(pairs):
    train, validation = splits(pairs, class_weights=True)
    n = train.n_batches
    want = {i: train.batch(i) for i in (0, n - 1, n, 7 * n + 3)}
    second, _ = splits(pairs, class_weights=True)
    for i in sorted(want, reverse=True):
        assert same(second.batch(i), want[i]) and same(train.batch(i), want[i])
    other, unmoved = splits(pairs, class_weights=True, seed=7)
    assert not same(other.batch(0), want[0]) and other.fingerprint == train.fingerprint
    assert all(same(unmoved.batch(i), validation.batch(i)) for i in range(validation.n_batches))


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_batches_are_of_similar_lengths_and_no_larger_than_asked(batch_size):
    for data in splits(batch_size=batch_size):
        cells = real = 0
        for batch in map(data.batch, range(data.n_batches)):
            assert batch["tokens"].numel() <= batch_size * 64 == data.tokens_per_batch
            cells += batch["tokens"].numel()
            real += int(batch.get("keep", torch.ones_like(batch["tokens"])).sum())
        assert real > (0.8 if batch_size < 40 else 0.4) * cells
        assert data.tokens_per_epoch == data.n_batches * data.tokens_per_batch


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@BOTH
def test_a_step_holds_the_same_rows_however_many_micro_batches_share_it(pairs, batch_size):
    whole, _ = splits(pairs, batch_size=8)
    shared, validation = splits(pairs, batch_size=batch_size, tokens_per_step=8 * 64)
    n, sizes = 8 // batch_size, Counter()
    assert shared.n_batches == n * whole.n_batches
    for step in range(2 * whole.n_batches):
        dealt = [rows_of(shared, shared.batch(step * n + m)) for m in range(n)]
        assert sorted(chain(*dealt)) == sorted(rows_of(whole, whole.batch(step)))
        sizes.update(map(len, dealt))
    assert 0 not in sizes or n == 8
    assert sorted(epoch(validation)) == sorted(valid_rows(pairs))


def test_a_micro_batch_without_rows_has_no_target():
    train, validation = splits(batch_size=1, tokens_per_step=2000 * 64)  # one step, 2,000 of them
    counts = [int((train.batch(i)["targets"] != -100).sum()) for i in range(train.n_batches)]
    assert counts == [1] * 200 + [0] * 1800
    for batch in map(validation.batch, range(validation.n_batches)):
        assert (batch["targets"] >= 0).all()  # what is measured has no such batch


# ---- texts that are too long ---------------------------------------------------------------------


def pop_the_longer(a: list[int], b: list[int], limit: int) -> None:
    """Shortens two texts as BERT's own code does: at their ends, one token after the other."""
    while len(a) + len(b) > limit:
        (a if len(a) > len(b) else b).pop()


DIGITS = SimpleNamespace(encode=lambda text: [int(x) for x in text.split()], special_tokens=SPECIAL)
IDS = st.lists(st.integers(10, 99), max_size=14)


@given(IDS, IDS, st.integers(5, 33), st.booleans())
def test_the_longer_text_loses_its_end_first(a, b, length, pair):
    texts = [" ".join(map(str, ids)) for ids in ((a, b) if pair else (a,))]
    parts, cut = encode_parts(DIGITS, texts, length)
    b = b if pair else []
    n, limit = len(a) + len(b), length - 2 - pair
    pop_the_longer(a, b, limit)
    assert [part.tolist() for part in parts] == [a, b][: len(texts)]
    assert cut == (n > limit) and len(a) + len(b) == min(n, limit)
    tokens = collate([parts], DIGITS)["tokens"]
    assert tokens.tolist() == [[5, *a, 6, *b, 6][: None if pair else -1]]


def test_padding_is_behind_and_of_segment_0():
    rows = [encode_parts(DIGITS, texts, 40)[0] for texts in (["10 11", "12"], ["13", "14 15 16"])]
    batch = {name: x.tolist() for name, x in collate(rows, DIGITS).items()}
    assert batch == {
        "tokens": [[5, 10, 11, 6, 12, 6, 7], [5, 13, 6, 14, 15, 16, 6]],
        "segments": [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]],
        "keep": [[True] * 6 + [False], [True] * 7],
    }


@BOTH
def test_rows_are_those_of_the_tokenizers_library(pairs):
    """An outside reading of the same vocab: frame, segments, cut and padding."""
    library = peer("tokenizers")
    rows = train_rows(pairs)
    tokenizer = WordPiece.train([" ".join(row) for row in rows], 90)
    theirs = library.Tokenizer.from_str(json.dumps(wordpiece_to_json(tokenizer)))
    length = 10 + pairs  # room for 8: an odd one is shared otherwise there
    theirs.enable_truncation(length, strategy="longest_first")
    theirs.enable_padding(pad_id=tokenizer.special_tokens["[PAD]"])
    texts = [row[:-1] if pairs else row[0] for row in rows[:37]]
    want = theirs.encode_batch(texts)
    made = [encode_parts(tokenizer, row[:-1], length) for row in rows[:37]]
    got = collate([parts for parts, _ in made], tokenizer)
    assert got["tokens"].tolist() == [x.ids for x in want]
    assert got["keep"].long().tolist() == [x.attention_mask for x in want]
    if pairs:
        assert got["segments"].tolist() == [x.type_ids for x in want]
    assert [cut for _, cut in made] == [bool(x.overflowing) for x in want]
    assert 5 < sum(cut for _, cut in made) < 37


@BOTH
def test_what_is_cut_is_counted_and_told(pairs):
    whole, _ = splits(pairs)
    for settings in ({"block_size": T}, {"row_length": T}, {"block_size": T, "row_length": 99}):
        train, validation = splits(pairs, **settings)
        longer = [len(" ".join(row[:-1])) + 1 + 2 + pairs > T for row in train_rows(pairs)]
        assert train.n_cut == sum(longer) > 20
        assert f"; {train.n_cut} cut to {T} tokens" in train.describe()
        assert f"; {validation.n_cut} cut to {T} tokens" in validation.describe()
        assert max(len(x) for x in train.batch(0)["tokens"]) <= T
        lengths = {row[:-1]: len("".join(row[:-1])) for row in epoch(train)}
        assert max(lengths.values()) == T - 3 - 2 * pairs  # a space stands before each text
    assert whole.n_cut == 0 and "cut" not in whole.describe()
    for length, choose in ((2 + 2 * pairs, 3 + 2 * pairs), (1, 3 + 2 * pairs)):
        with pytest.raises(ValueError, match=rf"rows of {length} tokens .* choose {choose} or mo"):
            splits(pairs, row_length=length)
    splits(pairs, row_length=choose)


def test_a_text_of_which_no_token_is_left_is_a_row_all_the_same():
    tokenizer = WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"])
    rows = [encode_parts(tokenizer, texts, 9)[0] for texts in (["\u200b", "a"], ["a", "\u200b"])]
    assert collate(rows, tokenizer)["tokens"].tolist() == [[2, 3, 4, 3], [2, 4, 3, 3]]


# ---- weights, figures, descriptions --------------------------------------------------------------


def test_class_weights_make_labels_equal_and_1_on_average():
    train, validation = splits(class_weights=True, tokens_per_step=8 * 4 * 64)
    sums, n = np.zeros(3), 0
    for batch in map(train.batch, range(train.n_batches)):
        weights, targets = batch["weights"], batch["targets"]
        assert weights.dtype == torch.float32 and weights.shape == targets.shape
        for weight, target in zip(weights.tolist(), targets.tolist(), strict=True):
            if target != -100:
                sums[target] += weight
                n += 1
    assert n == 200 and sums == pytest.approx([200 / 3] * 3)
    assert "weights" not in validation.batch(0) and "weights" not in splits()[0].batch(0)
    # A label of the checkpoint that this text has not counts for nothing.
    more, _ = splits(class_weights=True, labels=("pink", "red", "green", "blue", "white"))
    assert more.weights.mean() == pytest.approx(1) and more.labels[0] == "pink"


@pytest.mark.parametrize("batch_size", [1, 7])
def test_what_was_predicted_is_measured(batch_size):
    random, (train, validation) = np.random.default_rng(0), splits(batch_size=batch_size)
    answers, predicted = [], {}
    for i in reversed(range(validation.n_batches)):  # as several processes may hand them over
        rows = rows_of(validation, validation.batch(i))
        predicted[i] = random.integers(0, 3, len(rows))
        answers += [
            (row[-1], validation.labels[p]) for row, p in zip(rows, predicted[i], strict=True)
        ]
    got, counts = validation.measure(predicted), Counter(answers)
    right = sum(gold == answer for gold, answer in answers)
    assert got["accuracy"] == pytest.approx(right / 50, abs=1e-6) and len(answers) == 50
    for g, gold in enumerate(validation.labels):
        for p, answer in enumerate(validation.labels):
            assert validation.confusion[g, p] == counts[gold, answer]
    assert all(type(x) is float for x in got.values()) and set(got) == {"accuracy", "macro_f1"}
    # The next evaluation begins at nothing. Green is neither there nor predicted: not in the mean.
    gold = {i: validation.batch(i)["targets"].numpy() for i in range(validation.n_batches)}
    assert validation.measure(gold) == {"accuracy": 1.0, "macro_f1": 1.0}
    assert validation.confusion.tolist() == [[13, 0, 0], [0, 0, 0], [0, 0, 37]]
    always = {i: np.full_like(x, 2) for i, x in gold.items()}
    assert validation.measure(always) == {"accuracy": 0.74, "macro_f1": round(74 / 87 / 2, 6)}
    assert train.confusion is None


def test_report_is_per_text():
    report = splits()[1].report({"loss": 12.0, "accuracy": 6.0}, {"loss": 8})
    assert report == {"loss": 1.5, "accuracy": 0.75}


@BOTH
def test_a_limited_evaluation_is_of_evenly_spaced_rows(pairs):
    train, whole = splits(pairs)
    tokens = int(whole.buckets.lengths.sum())
    limited, some = splits(pairs, eval_tokens=-(-tokens * 13 // 50))
    assert sorted(epoch(some)) == sorted(valid_rows(pairs)[k * 50 // 13] for k in range(13))
    counts = sorted(Counter(row[-1] for row in epoch(some)).values())
    note = f"evenly spaced among 50, 2 labels with {counts[0]} to {counts[1]} each"
    assert some.describe().startswith("13 ") and note in some.describe()
    assert limited.describe() == train.describe() and "evenly" not in whole.describe()
    gold = {i: some.batch(i)["targets"].numpy() for i in range(some.n_batches)}
    assert some.measure(gold)["accuracy"] == 1 and some.confusion.sum() == 13
    assert [len(splits(pairs, eval_tokens=n)[1].chosen) for n in (1, tokens)] == [1, 50]


@BOTH
def test_the_plan_tells_how_much_there_is(pairs):
    train, validation = splits(pairs)
    kind = "pairs of texts" if pairs else "texts"
    cells = sum(train.batch(i)["tokens"].numel() for i in range(train.n_batches))
    tokens = sum(len("".join(row[:-1])) + 3 + 2 * pairs for row in train_rows(pairs))
    assert train.describe().startswith(
        f"200 {kind}, 3 labels with 9 to 150 each, {tokens:,} tokens, {train.n_batches} steps with "
    )
    padding = float(re.search(r"([\d.]+)% padding", train.describe())[1]) / 100
    assert padding == pytest.approx(1 - tokens / cells, abs=0.02)
    assert validation.describe().startswith(f"50 {kind}, 2 labels with 13 to 37 each, ")
    assert train.rule == "200 examples train, 50 validate (the given files)"
    assert train.prompts == validation.prompts and len(train.prompts) == 4
    assert set(train.prompts) <= {"\t".join(row[:-1]) for row in valid_rows(pairs)}


# ---- the tokenizer -------------------------------------------------------------------------------


def test_a_vocabulary_is_learnt_from_the_training_texts_only():
    train, validation = splits(True, pattern="gpt2")
    learnt = {token.decode() for token in train.tokenizer.ranks if len(token) > 1}
    assert {" x", " X", " z"} <= learnt  # of both parts
    assert validation.tokenizer is train.tokenizer
    assert {"[PAD]", "[CLS]", "[SEP]", "[MASK]"} == set(train.tokenizer.special_tokens)
    write("valid.tsv", [(f"{row[0]} q q qq", *row[1:]) for row in valid_rows(True)])
    flags = Flags(data="train.tsv", valid="valid.tsv", cache_dir="elsewhere")
    sizes = {"vocab_size": 300, "block_size": 64, "labels": ()}
    other, _ = Data.splits(flags, sizes)
    assert other.tokenizer.ranks == train.tokenizer.ranks


def test_a_given_tokenizer_is_used_and_names_of_special_tokens_are_text():
    tokenizer = WordPiece.train(["red green [SEP] blue"] * 9, 60)
    train, validation = splits(tokenizer=tokenizer)
    assert train.tokenizer is validation.tokenizer is tokenizer and not Path("cache").exists()
    (part,), _ = encode_parts(tokenizer, ["a [SEP] [CLS]"], 40)
    assert not {tokenizer.special_tokens["[SEP]"], tokenizer.special_tokens["[CLS]"]} & set(part)
