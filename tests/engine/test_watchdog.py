"""watchdog.py: three processes in one, of which one hangs or none; test_faults.py has real ones."""

import threading
import time

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
    monkeypatch.setattr(Watchdog, "__enter__", lambda self: self.start() or self)  # no time-outs
    return ended, [Watchdog(store, rank, 3, 0.6) for rank in range(3)]


def all_at(dogs, *places: tuple[str, int]) -> None:
    for dog in dogs:
        for place, step in places:
            dog.at(place, step)


def test_the_process_that_has_passed_the_fewest_places_is_named(dogs, capfd):
    ended, three = dogs
    all_at(three, ("reading batches", 6), ("counting targets", 6))
    all_at([three[0], three[2]], ("reading batches", 7), ("counting targets", 7))
    three[1].at("reading batches", 7)
    with three[0], three[1], three[2]:
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
    with three[0], three[1], three[2]:
        for _ in range(8):
            time.sleep(0.2)
            all_at(three, ("evaluation", 3))
    assert not ended and capfd.readouterr().err == ""
