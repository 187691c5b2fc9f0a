"""engine/prefetch.py: the same batches whoever makes them, a thread that ends, errors that show."""

import threading
import time
import traceback

import pytest
import torch
from conftest import TOY
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import losses

import train
from engine.prefetch import Prefetch
from tasks.text import Data

CPU = torch.device("cpu")


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def wait_until(true) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.001)


def batch_of(i: int) -> dict[str, torch.Tensor]:
    return {"tokens": torch.tensor([i, 7 * i])}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), min_size=1, max_size=4),
)
def test_what_is_asked_for_is_what_comes(stride, ahead, runs):
    """Also when it is asked for other numbers than the next one, and for earlier ones once more."""
    prefetch = Prefetch(batch_of, stride, ahead, CPU)
    for start, length in runs:
        for i in range(start, start + length * stride, stride):
            assert prefetch(i)["tokens"].tolist() == [i, 7 * i]
            assert len(prefetch.made) <= ahead
    prefetch.close()


def test_the_next_batches_are_made_before_they_are_asked_for_and_no_others():
    made = []
    prefetch = Prefetch(lambda i: made.append(i) or batch_of(i), 3, 4, CPU)
    prefetch(2)
    wait_until(lambda: len(made) == 5)
    assert made == [2, 5, 8, 11, 14]
    assert prefetch(5)["tokens"][0] == 5
    wait_until(lambda: len(made) == 6)
    time.sleep(0.01)
    assert made == [2, 5, 8, 11, 14, 17]  # none twice, none beyond
    prefetch.close()


def test_one_other_thread_makes_them():
    """Epochs' permutations are kept without locks."""
    seen = set()
    prefetch = Prefetch(lambda i: seen.add(threading.current_thread()) or batch_of(i), 1, 3, CPU)
    for i in range(50):
        prefetch(i)
    assert seen == set(threads()) and len(seen) == 1 and threading.main_thread() not in seen
    prefetch.close()


def test_without_ahead_there_is_no_thread():
    prefetch = Prefetch(lambda i: threading.current_thread(), 1, 0, CPU)
    assert prefetch(3) is threading.main_thread() and not threads()
    prefetch.close()


def held_at_the_second() -> tuple[Prefetch, list[int]]:
    """(one that has given batch 0 and needs a moment for batch 1, the numbers of those begun)"""
    made, goes_on = [], threading.Event()

    def slow(i: int) -> dict:
        made.append(i)
        if i == 1:
            goes_on.wait(10)
        return batch_of(i)

    prefetch = Prefetch(slow, 1, 5, CPU)
    prefetch(0)
    wait_until(lambda: 1 in made)
    threading.Timer(0.02, goes_on.set).start()
    return prefetch, made


def test_closing_waits_for_one_batch_and_for_no_more():
    prefetch, made = held_at_the_second()
    prefetch.close()
    assert made == [0, 1] and not threads()
    prefetch.close()


def test_after_a_jump_the_old_batches_are_not_made():
    prefetch, made = held_at_the_second()
    assert prefetch(100)["tokens"][0] == 100
    prefetch.close()
    assert not {2, 3, 4, 5} & set(made)


def test_an_error_is_raised_as_itself_for_who_asks_for_its_batch():
    class Broken(Exception):
        pass

    def make(i: int) -> dict:
        if i == 3:
            raise Broken(i)
        return batch_of(i)

    prefetch = Prefetch(make, 1, 5, CPU)
    for i in (0, 1, 2):
        prefetch(i)
    for _ in range(2):  # each call that asks for it raises it
        with pytest.raises(Broken) as found:
            prefetch(3)
        names = [frame.name for frame in traceback.extract_tb(found.value.__traceback__)]
        assert names[0].startswith("test_an_error") and names[-1] == "make"
    assert prefetch(4)["tokens"][0] == 4
    prefetch.close()


# ---- in a run ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr("engine.closing.show_results", lambda run: None)


@pytest.fixture
def queuing(monkeypatch):
    monkeypatch.setattr("engine.steps.QUEUING", {"cpu"})


def test_a_run_asks_for_each_batch_once_and_its_thread_ends(toy, queuing, monkeypatch):
    real, made = Data.batch, []

    def batch(self, i: int) -> dict:
        if self.split == "train":
            made.append((i, threading.current_thread().name.split("_")[0]))
        return real(self, i)

    monkeypatch.setattr(Data, "batch", batch)
    train.main([*TOY, "--steps=5"])  # of two micro-batches each
    assert made[:10] == [(i, "prefetch") for i in range(10)]
    assert made[10:] in ([(10, "prefetch")], [(10, "prefetch"), (11, "prefetch")])
    assert not threads()


def test_on_a_cpu_nothing_is_made_ahead(toy, monkeypatch):
    real, made = Data.batch, []

    def batch(self, i: int) -> dict:
        if self.split == "train":
            made.append((i, threading.current_thread()))
        return real(self, i)

    monkeypatch.setattr(Data, "batch", batch)
    train.main([*TOY, "--steps=2"])
    assert made == [(i, threading.main_thread()) for i in range(4)]


@pytest.mark.parametrize("error", [ValueError("the file is gone"), KeyboardInterrupt()])
def test_a_run_whose_data_fail_ends_with_that_error_and_no_thread(toy, queuing, monkeypatch, error):
    real = Data.batch

    def batch(self, i: int) -> dict:
        if self.split == "train" and i == 5:
            raise error
        return real(self, i)

    monkeypatch.setattr(Data, "batch", batch)
    with pytest.raises(type(error)) as found:
        train.main([*TOY, "--steps=9", "--eval_interval=1"])
    assert found.value is error and not threads()
    assert len(losses("out/gpt")) == 2  # the third step is the one that needs batch 5


def test_a_second_interrupt_ends_the_thread_too(toy, queuing, monkeypatch):
    real = train.Run.train_step

    def interrupted(self, *args):
        if self.step == 2:
            assert threads()
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(train.Run, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main([*TOY, "--steps=9"])
    assert not threads()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_batches_lie_in_pinned_memory():
    prefetch = Prefetch(batch_of, 1, 2, torch.device("cuda"))
    for i in range(5):
        tokens = prefetch(i)["tokens"]
        assert tokens.is_pinned() and tokens.tolist() == [i, 7 * i]
    prefetch.close()
