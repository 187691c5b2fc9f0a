"""watchdog.py: three processes in one, of which one hangs or none; test_faults.py has real ones."""

import threading
import time
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from engine import watchdog
from engine.watchdog import Watchdog


class Ended(Exception):
    """Instead of the process, the thread of a watchdog ends."""


@pytest.fixture
def dogs(monkeypatch):
    """The watchdogs of three processes, as threads of this one; each ends only itself."""
    ended = []

    def leave(status):
        ended.append(threading.current_thread().rank)
        raise Ended

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    store = dist.HashStore()
    monkeypatch.setattr(watchdog, "GRACE", 0.3)
    return ended, [Watchdog(store, rank, 3, 0.6) for rank in range(3)]


@contextmanager
def at_work(*dogs):
    for dog in dogs:
        dog.since = time.monotonic()
        dog.start()
    try:
        yield
    finally:
        for dog in dogs:
            dog.finish()


def all_at(dogs, *places: tuple[str, int]) -> None:
    for dog in dogs:
        for place, step in places:
            dog.at(place, step)


def test_the_process_that_has_passed_the_fewest_places_is_named(dogs, capfd):
    ended, three = dogs
    all_at(three, ("reading batches", 6), ("counting targets", 6))
    all_at([three[0], three[2]], ("reading batches", 7), ("counting targets", 7))
    three[1].at("reading batches", 7)
    with at_work(*three):
        while len(ended) < 3:
            time.sleep(0.05)
    err = capfd.readouterr().err
    assert err.count("error: ") == 1
    assert "rank 1 of 3 is still at step 8 (reading batches), for which rank" in err
    assert "rank 1 of 3 hangs here:" in err and "test_watchdog.py" in err
    assert err.count("hangs here") == 1 and sorted(ended) == [0, 1, 2]


def test_a_process_that_moves_is_left_alone(dogs, capfd):
    """Also one that is at one place for long, as in an evaluation, but reports it repeatedly."""
    ended, three = dogs
    with at_work(*three):
        for _ in range(8):
            time.sleep(0.2)
            all_at(three, ("evaluation", 3))
    assert not ended and capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_process_that_said_it_is_busy_is_waited_for(dogs, capfd):
    """One that compiles or tokenizes passes no place. Once it is done, it is like all others."""
    ended, three = dogs
    all_at(three, ("preparing data", 0))
    with at_work(*three):
        with three[1].busy(60):
            all_at([three[0], three[2]], ("gradients", 0))
            time.sleep(2.5)
            assert not ended and capfd.readouterr().err == ""
        while len(ended) < 3:
            time.sleep(0.05)
    assert "rank 1 of 3 is still at step 1 (preparing data), for" in capfd.readouterr().err


def test_a_process_that_is_busy_for_too_long_is_named(dogs, capfd):
    ended, three = dogs
    all_at(three, ("compiling the model", 0))
    with at_work(*three), three[1].busy(0.5), three[1].busy(0.2):
        all_at([three[0], three[2]], ("gradients", 0))
        while len(ended) < 3:
            time.sleep(0.05)
    assert "rank 1 of 3 is still at step 1 (compiling the model)" in capfd.readouterr().err


def test_a_stopped_process_is_named_although_another_is_busy(dogs, capfd):
    ended, three = dogs
    with at_work(three[0], three[1]), three[1].busy(60):
        while len(ended) < 2:
            time.sleep(0.05)
    assert "rank 2 of 3 gives no sign of life" in capfd.readouterr().err


def test_a_process_that_fails_takes_the_others_along(dogs, capfd):
    """They may be in an operation of NCCL, which does not notice. The one that fails says why."""
    ended, three = dogs
    with at_work(*three):
        three[1].fail()
        while len(ended) < 2:
            time.sleep(0.05)
            three[1].at("closing its files", len(ended))
    assert sorted(ended) == [0, 2]
    assert capfd.readouterr().err.count(f"error: {watchdog.OTHER_ENDED}") == 2
