"""data/shuffle.py: permutations without a table, and the orders that must stay as they are."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.shuffle
from data.shuffle import Feistel, shuffled
from tasks.text import Data


def train_windows(n: int, seed: int = 0) -> Data:
    file = SimpleNamespace(ids=np.zeros(n, np.uint16), text_bytes=n)
    corpus = SimpleNamespace(hash="", prompts=[""], rule="", name="numbers")
    return Data(file, corpus, "train", None, block_size=10, batch_size=7, seed=seed)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 1 << 30))
def test_every_number_stands_in_one_place(n, seed):
    order = Feistel(n, np.random.default_rng(seed))
    assert sorted(order[np.arange(n)].tolist()) == list(range(n))
    places = np.random.default_rng(1).integers(0, n, 37)
    alone = [order[places[i : i + 1]].item() for i in range(37)]
    assert order[places].tolist() == alone and order[places].dtype == np.int64


@pytest.mark.parametrize("n", [2**20 + 1, 1_048_583, 1025**2 - 1, 1025**2, 1025**2 + 1])
def test_orders_without_a_table_look_random(n):
    order = shuffled(n, np.random.default_rng((7, n)))
    assert isinstance(order, Feistel)
    found = order[np.arange(n)]
    assert (np.bincount(found, minlength=n) == 1).all()
    # Place and number in 64 x 64 boxes: chi-square of 63² degrees of freedom, at 5 sigma.
    boxes = np.bincount(np.arange(n) * 64 // n * 64 + found * 64 // n, minlength=64 * 64)
    assert abs(chi_square(boxes) - 63**2) < 5 * math.sqrt(2 * 63**2)
    # From one place to the next, modulo n, any distance is as likely.
    steps = np.bincount(np.diff(found) % n * 256 // n, minlength=256)
    assert abs(chi_square(steps) - 255) < 5 * math.sqrt(2 * 255)
    for lag in (1, 2, 1024, 1025):  # 1,024 or 1,025 places are a row of the network
        correlation = np.corrcoef(found[:-lag], found[lag:])[0, 1]
        assert abs(correlation) < 5 / math.sqrt(n)
        assert abs(np.abs(found[:-lag] - found[lag:]).mean() / n - 1 / 3) < 0.002
    assert np.count_nonzero(found == np.arange(n)) < 12  # one, on average, stays where it is


def chi_square(counts: np.ndarray) -> float:
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


def test_orders_differ_by_seed_and_epoch_and_by_nothing_else():
    n, places = 40_000_003, np.arange(1000)
    orders = {
        key: shuffled(n, np.random.default_rng(key))[places].tobytes()
        for key in [(s, e) for s in range(4) for e in range(5)]
    }
    assert len(set(orders.values())) == 20
    assert shuffled(n, np.random.default_rng((2, 3)))[places].tobytes() == orders[2, 3]
    one, two = (np.frombuffer(orders[key], np.int64) for key in ((0, 0), (0, 1)))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.2 and not (one == two).any()


def test_every_key_counts():
    order, places = Feistel(1000, np.random.default_rng(0)), np.arange(1000)
    seen = {order[places].tobytes()}
    for i in range(len(order.keys)):
        order.keys[i] ^= np.uint64(1)
        seen.add(order[places].tobytes())
    assert len(seen) == len(order.keys) + 1 == 7


def test_orders_reach_beyond_two_to_the_31():
    n = (1 << 40) + 13
    order = shuffled(n, np.random.default_rng(0))
    found = order[np.arange(n - 5000, n)]
    assert found.min() >= 0 and (1 << 39) < found.max() < n and len(set(found.tolist())) == 5000


def test_small_texts_keep_the_order_that_published_figures_have():
    """These numbers were recorded when tables were the only order."""
    for seed, epoch in ((0, 0), (1337, 2)):
        windows = train_windows(1000, seed)
        random = np.random.default_rng((seed, epoch))
        offset, order = int(random.integers(10)), random.permutation(99)
        want = (offset + order * 10).tolist()
        assert windows.starts(np.arange(99 * epoch, 99 * epoch + 99)).tolist() == want
    assert want[:7] == PINNED
    assert isinstance(shuffled(1 << 20, np.random.default_rng(0)), np.ndarray)


PINNED = [583, 303, 533, 263, 153, 3, 283]  # by the code before


def test_an_epoch_without_a_table_shows_each_window_once(monkeypatch):
    monkeypatch.setattr(data.shuffle, "TABLE", 0)
    windows = train_windows(1000)
    n, offsets = windows.n_windows, set()
    for epoch in range(4):
        starts = windows.starts(np.arange(epoch * n, epoch * n + n))
        assert (np.diff(np.sort(starts)) == 10).all() and (np.diff(starts) != 10).any()
        offsets.add(int(starts.min()))
    assert len(offsets) > 1
    span = windows.starts(np.arange(n - 3, 2 * n + 3))  # three epochs at once
    assert span.tolist() == [int(windows.starts(np.array([i]))[0]) for i in range(n - 3, 2 * n + 3)]
