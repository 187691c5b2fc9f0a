"""data/cores.py beside map(), and when something goes wrong."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, alive

from data import cores
from data.cores import batched, on_all_cores


def test_batches_have_about_as_many_characters_as_they_should(monkeypatch):
    monkeypatch.setattr(cores, "BATCH", 10)
    rng = random.Random(0)
    texts = ["x" * rng.randrange(13) for _ in range(200)]
    found = list(batched(iter(texts), len))
    assert [text for batch in found for text in batch] == texts
    assert all(len("".join(batch[:-1])) < 10 <= len("".join(batch)) for batch in found[:-1])
    assert list(batched([], len)) == []


def double(n: int) -> int:
    if n == 13:
        raise ValueError("thirteen")
    return 2 * n


def with_process(n: int) -> tuple[int, int]:
    return n, os.getpid()


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 7, 12])
@pytest.mark.usefixtures("two_cores")
def test_results_come_in_order(n):
    assert list(on_all_cores(double, iter(range(n)))) == [2 * i for i in range(n)]


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="no forked workers here")
@pytest.mark.usefixtures("two_cores")
def test_processes_start_with_the_fourth_batch():
    for n, alone in ((3, True), (4, False)):
        found = list(on_all_cores(with_process, range(n)))
        assert [i for i, _ in found] == list(range(n))
        assert {process == os.getpid() for _, process in found} == {alone}


def with_parent(n: int) -> tuple[int, int, bool]:
    return n, os.getppid(), torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="no forked workers here")
@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("there", ["cuda", "group"])
def test_a_process_with_threads_of_torch_is_not_copied(monkeypatch, there):
    """A thread of gloo or CUDA may hold a lock just then, which nobody in the copy would free."""
    assert cores.start_method() == "fork"
    if there == "cuda":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    else:
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    try:
        assert cores.start_method() == "forkserver"
        found = list(on_all_cores(with_parent, range(50)))
    finally:
        if there == "group":
            torch.distributed.destroy_process_group()
    assert [n for n, *_ in found] == list(range(50))
    assert {joined for *_, joined in found} == {False}
    assert os.getpid() not in {parent for _, parent, _ in found}


@pytest.mark.usefixtures("two_cores")
def test_few_batches_are_read_ahead():
    read = []
    results = on_all_cores(double, (read.append(i) or i for i in range(20, 120)))
    assert next(results) == 40
    assert len(read) <= 6
    results.close()  # ends the workers


@pytest.mark.usefixtures("two_cores")
def test_errors_of_workers_and_of_batches_come_out():
    with pytest.raises(ValueError, match="thirteen"):
        list(on_all_cores(double, range(20)))

    def broken():
        yield from range(9)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(on_all_cores(double, broken()))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc of Linux")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_parent(tmp_path, sign, method):
    """Workers of a killed parent waited for ever; those of an interrupted one filled the screen."""
    script = tmp_path / "endless.py"
    script.write_text(
        f"import itertools, os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from data import cores\nos.cpu_count = lambda: 2\n"
        f"cores.start_method = lambda: {method!r}\n"
        "def work(i):\n    time.sleep(0.01)\n    return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    for worker in cores.on_all_cores(work, itertools.count()):\n"
        "        print(worker, flush=True)\n        time.sleep(0.05)\n",  # meanwhile, workers wait
        encoding="utf-8",
    )
    with (tmp_path / "errors").open("w", encoding="utf-8") as errors:
        command = [sys.executable, str(script)]
        started = {"stdout": subprocess.PIPE, "stderr": errors, "start_new_session": True}
        with subprocess.Popen(command, text=True, **started) as parent:
            workers = {int(parent.stdout.readline()) for _ in range(9)}
            assert parent.pid not in workers
            os.killpg(parent.pid, sign) if sign == signal.SIGINT else parent.kill()
            parent.communicate(timeout=30)
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, workers))
    assert (tmp_path / "errors").read_text(encoding="utf-8").count("Traceback") <= 1
