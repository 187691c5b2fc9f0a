"""The data of tasks/translation.py: each pair once an epoch, in batches with little padding,
through real files."""

import math
import re
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from conftest import gpt2_files, shared
from hypothesis import given
from hypothesis import strategies as st

from data.buckets import cut, positions_of
from data.gpt2_files import read_gpt2_files
from data.parallel import open_pairs
from data.tokens import tokenize
from engine.processes import Processes
from seq2seq import Seq2Seq, Seq2SeqConfig
from tasks import translation
from tasks.translation import Data, Flags, pad
from train import evaluate

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "naïve",
    "déjà",
    "数",
    "😀",
]


def sentences(n: int, seed: int = 0, longest: int = 9) -> list[tuple[str, str]]:
    """n pairs of different lengths, no two the same; a target has its source's words in capitals,
    backwards, and sometimes a few more."""
    random, pairs = Random(seed), []
    for i in range(n):
        words = [random.choice(WORDS) for _ in range(random.randint(0, longest))]
        more = [random.choice(WORDS) for _ in range(random.choice((0, 0, 4)))]
        pairs.append((" ".join([f"{i}", *words]), " ".join([*words[::-1], *more, f"{i}"]).upper()))
    return pairs


TRAIN, VALID = sentences(210), sentences(60, seed=1)


def write_sides(name: str, pairs: list[tuple[str, str]]) -> str:
    for side, lines in zip(("src", "tgt"), zip(*pairs, strict=True), strict=True):
        Path(f"{name}.{side}").write_text("".join(f"{x}\n" for x in lines), encoding="utf-8")
    return f"{name}.src,{name}.tgt"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sides("train", TRAIN)
    write_sides("valid", VALID)
    return tmp_path


def splits(block_size: int = 48, vocab_size: int = 300, **settings) -> tuple[Data, Data]:
    settings = {"batch_size": 3, "eval_tokens": 0, "valid": "valid.src,valid.tgt", **settings}
    settings.setdefault("tokens_per_step", settings["batch_size"] * block_size)
    config = Flags(data="train.src,train.tgt", cache_dir="cache", **settings)
    return Data.splits(config, {"vocab_size": vocab_size, "block_size": block_size})


def texts(pairs: Data, batch: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
    """What the rows of a batch say, read from source and targets."""
    keep = batch.get("source_keep", torch.ones_like(batch["source"], dtype=torch.bool))
    rows = []
    for source, kept, target in zip(batch["source"], keep, batch["targets"], strict=True):
        *words, end = source[kept].tolist()
        *wanted, last = target[target != -100].tolist()
        assert end == last == pairs.end and pairs.end not in words + wanted
        rows.append((pairs.tokenizer.decode(words), pairs.tokenizer.decode(wanted)))
    return rows


def epoch_texts(pairs: Data, number: int) -> list[tuple[str, str]]:
    n = pairs.n_batches
    return [
        row for i in range(number * n, (number + 1) * n) for row in texts(pairs, pairs.batch(i))
    ]


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# ---- epochs --------------------------------------------------------------------------------------


def test_every_pair_comes_once_an_epoch_in_another_order_each_time(folder):
    train, _ = splits()
    epochs = [epoch_texts(train, number) for number in range(3)]
    for rows in epochs:
        assert sorted(rows) == sorted(TRAIN)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # Not only the order of the batches: what comes together is another company too.
    companies = [
        {frozenset(texts(train, train.batch(number * train.n_batches + i)))
         for i in range(train.n_batches)}
        for number in range(2)
    ]  # fmt: skip
    assert len(companies[0] & companies[1]) < train.n_batches / 2


def test_short_and_long_batches_are_mixed(folder):
    """Sorted by length for little padding, but a curriculum from short to long is not meant."""
    train, _ = splits()
    lengths = [train.batch(i)["source"].size(1) for i in range(train.n_batches)]
    assert lengths != sorted(lengths)
    halves = np.array_split(lengths, 2)
    assert abs(np.mean(halves[0]) - np.mean(halves[1])) < 0.3 * np.mean(lengths)


def test_batches_are_a_pure_function_of_seed_and_index(folder):
    train, validation = splits()
    n = train.n_batches
    want = {i: train.batch(i) for i in (0, 1, n - 1, n, 2 * n, 7 * n + 3)}
    second, _ = splits()
    for i in sorted(want, reverse=True):  # another order, another object, epochs back and forth
        assert same(second.batch(i), want[i]) and same(train.batch(i), want[i])
    other, unmoved = splits(seed=7)
    assert not same(other.batch(0), want[0])
    assert all(same(unmoved.batch(i), validation.batch(i)) for i in range(validation.n_batches))


def test_the_number_of_batches_is_that_of_every_epoch(folder):
    """Steps and epochs are counted before training: a cut that moved would shift the rest."""
    train, _ = splits(batch_size=2)
    assert train.tokens_per_batch == 96
    assert train.tokens_per_epoch == train.n_batches * 96
    for number in range(4):
        rows, order = train.buckets.epoch(number)
        longer = train.buckets.lengths
        assert sorted(rows) == list(range(len(TRAIN)))
        assert sorted(order) == list(range(train.n_batches))
        assert np.array_equal(longer[rows], np.sort(longer))


# ---- one batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_a_batch_keeps_to_its_tokens_and_pads_to_its_longest_only(folder, batch_size):
    for pairs in splits(batch_size=batch_size):
        padded = 0
        for i in range(pairs.n_batches):
            batch = pairs.batch(i)
            (B, S), (_, T) = batch["source"].shape, batch["targets"].shape
            assert B * max(S, T) <= batch_size * 48
            assert all(x.dtype == torch.int64 for k, x in batch.items() if k != "source_keep")
            lengths = torch.full((B,), S)
            if "source_keep" in batch:
                keep = batch["source_keep"]
                assert keep.dtype == torch.bool and not keep.all()
                lengths = keep.sum(1)
                padded += 1
                assert torch.equal(keep, torch.arange(S) < lengths[:, None])
            assert lengths.max() == S  # else a column would be padding only
            assert (batch["targets"] != -100).sum(1).max() == T
        assert padded or batch_size == 1


def test_source_keep_is_there_only_where_something_is_padded(folder):
    """Without a mask torch takes a faster path, which a mask that is all True would prevent."""
    train, _ = splits(batch_size=1)
    batches = [train.batch(i) for i in range(train.n_batches)]
    for batch in batches:
        # A row without padding has one end token, the others have more.
        padded = ((batch["source"] == train.end).sum(1) > 1).any()
        assert ("source_keep" in batch) == bool(padded)
    assert 0 < sum("source_keep" in batch for batch in batches) < len(batches)


def test_tokens_are_the_targets_one_place_to_the_right_behind_the_end_token(folder):
    train, _ = splits()
    known = {source: target for source, target in TRAIN}
    for i in range(train.n_batches):
        batch = train.batch(i)
        rows = texts(train, batch)
        assert all(known[source] == target for source, target in rows)
        for tokens, targets, (_, text) in zip(batch["tokens"], batch["targets"], rows, strict=True):
            ids = train.tokenizer.encode(text)
            n = len(ids) + 1
            assert tokens[:n].tolist() == [train.end, *ids]
            assert targets[:n].tolist() == [*ids, train.end]
            assert (targets[n:] == -100).all() and (tokens >= 0).all()


def test_pad_by_hand():
    ids, keep = pad([[5, 6, 7], [], np.array([8], np.uint16)], 0)
    assert ids.tolist() == [[5, 6, 7, 0], [0, 0, 0, 0], [8, 0, 0, 0]]
    assert ids.dtype == torch.int64 and keep.sum(1).tolist() == [4, 1, 2]
    assert keep[2].tolist() == [True, True, False, False]


# ---- validation ----------------------------------------------------------------------------------


def test_validation_is_in_order_and_the_same_at_every_visit(folder):
    _, validation = splits()
    first = epoch_texts(validation, 0)
    assert first == epoch_texts(validation, 0) and sorted(first) == sorted(VALID)
    lengths = [
        max(b["source"].size(1), b["targets"].size(1))
        for b in map(validation.batch, range(validation.n_batches))
    ]
    assert lengths == sorted(lengths)
    assert list(validation.texts()) == VALID


def test_evaluation_is_the_same_whatever_the_batch(folder):
    """How pairs are put together decides what is padded; the mean over tokens must not notice."""
    sizes = {"vocab_size": 300, "block_size": 48, "n_layer": 2, "n_head": 2, "n_embd": 24}
    model, alone = Seq2Seq(Seq2SeqConfig(**sizes)), Processes(0, 1, torch.device("cpu"))
    reports = []
    for batch_size in (1, 3, 40):
        _, validation = splits(batch_size=batch_size)
        reports.append(evaluate(model, validation, alone, torch.no_grad))
    for report in reports[1:]:
        assert report == pytest.approx(reports[0], rel=1e-5)
    assert reports[0]["perplexity"] == pytest.approx(math.exp(reports[0]["nll"]))
    assert reports[0]["loss"] != reports[0]["nll"]


def test_report_is_per_target_token(folder):
    _, validation = splits()
    report = validation.report({"loss": 12.0, "nll": 8.0}, {"loss": 4})
    assert report == {"loss": 3.0, "nll": 2.0, "perplexity": pytest.approx(math.exp(2))}
    worst = validation.report({"loss": 1e9, "nll": 1e9}, {"loss": 1})
    assert math.isfinite(worst["perplexity"])


def test_a_limited_evaluation_takes_evenly_spaced_pairs(folder):
    whole = splits()[1]
    longer = int(whole.buckets.lengths.sum())
    train, some = splits(eval_tokens=-(-longer // 4))
    assert len(some.chosen) == 15 and len(train.chosen) == len(TRAIN)
    assert some.chosen.tolist() == [4 * k for k in range(15)]
    assert list(some.texts()) == VALID[::4]
    assert f"15 pairs of {len(VALID)}, evenly spaced" in some.describe()
    assert splits(eval_tokens=1)[1].chosen.tolist() == [0]
    assert len(splits(eval_tokens=10**9)[1].chosen) == len(VALID)
    _, odd = splits(eval_tokens=-(-longer * 7 // 60))
    gaps = np.diff([*odd.chosen, len(VALID)])
    assert len(gaps) == 7 and gaps.max() - gaps.min() <= 1


# ---- what does not fit, descriptions -------------------------------------------------------------


def test_pairs_that_are_too_long_are_left_out_and_counted(folder):
    """A side that fits exactly stays: block_size counts the end token, and nothing is cut off."""
    whole, _ = splits()
    tokenizer = whole.tokenizer
    longer = [max(len(tokenizer.encode(x)) + 1 for x in pair) for pair in TRAIN]
    block_size = sorted(longer)[150]
    short, _ = splits(block_size=block_size)
    fits = [pair for pair, n in zip(TRAIN, longer, strict=True) if n <= block_size]
    assert max(n for n in longer if n <= block_size) == block_size
    assert 150 < len(fits) < 210 and sorted(epoch_texts(short, 0)) == sorted(fits)
    left_out = f"{210 - len(fits)} pairs longer than --block_size {block_size} left out"
    assert left_out in short.describe() and f"{len(fits)} pairs, " in short.describe()
    assert "left out" not in splits(block_size=max(longer))[0].describe()


def test_where_no_pair_fits_it_says_so(folder):
    message = re.escape("none of the 210 pairs for train in train fits into --block_size 2: choose")
    with pytest.raises(ValueError, match=message):
        splits(block_size=2)


def test_describe_counts_what_is_there(folder):
    train, validation = splits()
    encoded = [[len(train.tokenizer.encode(x)) + 1 for x in pair] for pair in TRAIN]
    source, target = np.sum(encoded, 0)
    text = train.describe()
    assert text.startswith(f"210 pairs, {source:,} source and {target:,} target tokens, ")
    assert f"{train.n_batches:,} steps with" in text and "steps" not in validation.describe()
    padding = float(re.search(r"with ([\d.]+)% padding", text)[1]) / 100
    real = cells = 0
    for i in range(train.n_batches):
        batch = train.batch(i)
        (B, S), (_, T) = batch["source"].shape, batch["targets"].shape
        real += int((batch["targets"] != -100).sum())
        real += int(batch.get("source_keep", torch.ones(B, S)).sum())
        cells += B * (S + T)
    assert real == source + target and padding == pytest.approx(1 - real / cells, abs=0.03)


def test_the_vocabulary_is_learnt_from_both_sides_of_the_training_pairs(folder):
    write_sides("train", [("abab abab", "XYXY XYXY")] * 100)
    write_sides("valid", [("QZQZ QZQZ", "jkjk jkjk")] * 100)
    train, validation = splits(vocab_size=270)
    learnt = [token for token in train.tokenizer.ranks if len(token) > 1]
    assert b"abab" in learnt and b"XYXY" in learnt
    assert not any(set(token) & set(b"QZjk") for token in learnt)
    assert validation.tokenizer is train.tokenizer


@pytest.mark.slow
def test_padding_of_real_sentences_is_little(folder):
    """Multi30k with GPT-2's vocabulary: unsorted batches of 64 would be half padding."""
    names = [str(shared(f"multi30k/train.{language}.gz")) for language in ("en", "de")]
    corpus = open_pairs(",".join(names), folder)
    tokenizer = read_gpt2_files(*gpt2_files())
    file = tokenize(corpus, "train", tokenizer, folder)
    train = Data(file, corpus, "train", tokenizer, block_size=128, batch_size=32)
    real = cells = rows = 0
    for i in range(0, train.n_batches, 7):
        batch = train.batch(i)
        real += int((batch["targets"] != -100).sum())
        real += int(batch.get("source_keep", torch.ones_like(batch["source"])).sum())
        cells += batch["targets"].numel() + batch["source"].numel()
        rows += len(batch["source"])
    assert real > 0.85 * cells
    assert rows / len(range(0, train.n_batches, 7)) > 64  # and the batches are as large as meant


def rows_of(data: Data, batch: dict) -> list[tuple]:
    """The pairs of a batch that have targets, as comparable tuples without padding."""
    rows = []
    keep = batch.get("source_keep", torch.ones_like(batch["source"], dtype=torch.bool))
    for source, kept, target in zip(batch["source"], keep, batch["targets"], strict=True):
        if (target != -100).any():
            rows.append((*source[kept].tolist(), -1, *target[target != -100].tolist()))
    return rows


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_step_holds_the_same_pairs_however_many_micro_batches_share_it(folder, parts):
    """Cuts by micro-batch would give two processes other steps than one, and a run that goes on
    with more of them would see pairs twice or never."""
    whole, _ = splits(batch_size=8, tokens_per_step=8 * 48)
    shared_out, _ = splits(batch_size=8 // parts, tokens_per_step=8 * 48)
    assert shared_out.n_batches == parts * whole.n_batches
    empty = 0
    for step in range(2 * whole.n_batches + 1):
        dealt = [shared_out.batch(step * parts + m) for m in range(parts)]
        found = [row for batch in dealt for row in rows_of(shared_out, batch)]
        assert sorted(found) == sorted(rows_of(whole, whole.batch(step)))
        empty += sum(not rows_of(shared_out, batch) for batch in dealt)
        sizes = [max(b["source"].numel(), b["targets"].numel()) for b in dealt]
        assert max(sizes) <= 8 // parts * 48 + 48
    assert (empty > 0) == (parts == 8)  # a part without pairs has a batch without targets


# ---- positions_of and cut ------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 7, 100, 1 << 24])
def test_find_in_blocks_is_find_in_all(block):
    ids = np.random.default_rng(0).integers(0, 4, 99).astype(np.uint16)
    got = positions_of(ids, 3, block)
    assert got.tolist() == np.flatnonzero(ids == 3).tolist() and got.dtype == np.int64
    assert positions_of(ids[:0], 3, block).tolist() == []
    assert positions_of(ids, 9, block).tolist() == []


def test_pairs_are_found_also_where_blocks_of_the_file_end(folder, monkeypatch):
    want = [texts(p, p.batch(2)) for p in splits()]
    monkeypatch.setattr(translation, "positions_of", lambda ids, token: positions_of(ids, token, 5))
    assert [texts(p, p.batch(2)) for p in splits()] == want


@given(st.lists(st.integers(1, 30), max_size=60).map(sorted), st.integers(1, 100))
def test_cuts_are_in_order_full_and_no_fuller(lengths, tokens):
    cuts = cut(np.array(lengths, dtype=np.int64), tokens)
    assert cuts[0] == 0 and cuts[-1] == len(lengths)
    assert all(a < b for a, b in pairwise(cuts))
    for a, b in pairwise(cuts):
        assert (b - a) * lengths[b - 1] <= tokens or b == a + 1
        if b < len(lengths):  # one more row would have been too much
            assert (b + 1 - a) * lengths[b] > tokens


def test_cut_by_hand():
    assert cut(np.array([1, 1, 2, 3, 3, 9]), 6) == [0, 3, 5, 6]
    assert cut(np.array([], dtype=np.int64), 6) == [0]
