"""processes.py: how processes join each other and leave, after success and after an error; two real
processes with gloo, in which NCCL's ways are played. test_faults.py has those of torchrun."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TOY, write_texts
from test_two_machines import free_port

from engine import processes
from engine.processes import Processes

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="without torchrun: no libuv there")

BEGIN = """
import time
import torch.distributed as dist
import train
from engine import cli, processes

"""
END = """
if __name__ == "__main__":
    with processes.leaving_at_once():
        cli.run(train.main)
"""


def two(script: str, *flags: str, patience: float = 100) -> list[tuple[int, str, str]]:
    """[(exit status, what it printed, its errors)] of two processes that run `script`."""
    Path("script.py").write_text(BEGIN + script + END, encoding="utf-8")
    port, running = str(free_port()), []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{k: str(v) for k, v in place.items()}}
        running.append(
            subprocess.Popen(
                [sys.executable, "script.py", *TOY, "--tokens_per_step=256", *flags],
                env={**environment, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
            )
        )
    end, said = time.monotonic() + patience, []
    try:
        for process in running:
            out, error = process.communicate(timeout=max(end - time.monotonic(), 1))
            said.append((process.returncode, out, error))
    finally:
        for process in running:
            process.kill()
    return said


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> list[tuple[int, str, str]]:
    """What `two` says of a run that ends well, although each process takes longer to prepare its
    data than --timeout."""
    script = """
import data.text
from data import cores
from tasks import text

data.text.BLOCK = cores.BATCH = 50
cores.os.cpu_count, executor = lambda: 2, cores.ProcessPoolExecutor
splits, destroy_group = text.Data.splits.__func__, dist.destroy_process_group

def pool(workers, context, **options):
    print("workers by", context.get_start_method(), flush=True)
    return executor(workers, context, **options)

def slow(cls, *args):
    time.sleep(9)
    return splits(cls, *args)

def destroy():
    destroy_group()
    print("destroyed", flush=True)

cores.ProcessPoolExecutor = pool
text.Data.splits = classmethod(slow)
dist.destroy_process_group = destroy
"""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("ended"))
        write_texts(Path())
        return two(script, "--steps=2", "--timeout=0.1")


@pytest.mark.slow
def test_a_run_that_ends_destroys_its_group(ended):
    for status, out, error in ended:
        assert status == 0 and out.splitlines()[-1] == "destroyed", error
    assert "go on with: python sample.py" in ended[0][1]


@pytest.mark.slow
def test_who_prepares_data_for_long_is_waited_for(ended):
    assert [status for status, _, _ in ended] == [0, 0], ended


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the default elsewhere is no fork")
def test_processes_with_a_group_tokenize_in_parallel(ended):
    """Their workers are no copies of them; see data/cores.py."""
    assert "workers by forkserver" in ended[0][1] and "workers by" not in ended[1][1]


@pytest.mark.slow
@pytest.mark.parametrize("kind,rank", [("TypeError", 1), ("ValueError", 0)])
def test_an_error_ends_all_processes_and_nothing_is_waited_for(toy, kind, rank):
    """Destroying NCCL's group waits for an operation that never comes, and so does the other
    process, in a call that does not notice."""
    begun = time.monotonic()
    said = two(
        f"""
real = train.Run.train_step

def train_step(self, *args):
    if self.step == 2 and self.group.rank == {rank}:
        raise {kind}("too large a batch")
    if self.step == 2:
        time.sleep(1000)
    return real(self, *args)

train.Run.train_step = train_step
dist.destroy_process_group = lambda: time.sleep(1000)
""",
        "--steps=8",
    )
    assert time.monotonic() - begun < 90
    (waiting, _, said_waiting), (failing, _, said_failing) = said if rank else said[::-1]
    assert waiting == failing == 1
    assert f"error: {processes.OTHER_ENDED}" in said_waiting and "Traceback" not in said_waiting
    if kind == "ValueError":
        assert said_failing.splitlines()[-1] == "error: too large a batch"
        assert "Traceback" not in said_failing
    else:
        assert "Traceback" in said_failing
        assert said_failing.splitlines()[-1] == "TypeError: too large a batch"


@pytest.mark.slow
def test_who_hangs_before_the_first_step_is_named(toy):
    said = two(
        """
def hangs(self):
    time.sleep(1000 * self.group.rank)
    return type(self).was(self)

train.Run.was, train.Run.new_optimizer = train.Run.new_optimizer, hangs
""",
        "--steps=2",
        "--timeout=0.1",
    )
    assert [status for status, _, _ in said] == [1, 1], said
    errors = said[0][2] + said[1][2]
    assert "rank 1 of 2 is still at step 1 (making the network)" in errors, errors


def test_an_error_of_one_process_alone_stays_what_it_is():
    with pytest.raises(SystemExit, match="error: no"), processes.leaving_at_once():
        sys.exit("error: no")
    alone = Processes(0, 1, torch.device("cpu"))
    with pytest.raises(KeyError), processes.leaving_at_once(), processes.failing(alone):
        raise KeyError
    with pytest.raises(ValueError, match="another process ended"), processes.failing(alone):
        raise dist.DistNetworkError("connection closed")


def test_torchs_watchdog_for_nccl_is_told_to_wait_for_ours(monkeypatch):
    names = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING")
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    found = []
    monkeypatch.setattr(processes, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "new_group", lambda **options: None)
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda backend, **options: found.append([backend, *(os.environ[n] for n in names)]),
    )
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ[names[0]] = "1"  # by torchrun
    os.environ[names[1]] = "1"  # by the user, whose word counts
    processes.start("cuda")
    assert found == [["nccl", "0", "1"]]


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_fp32_on_cuda_is_as_precise_as_torch_is_set(monkeypatch, precision):
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(processes, "find_device", lambda name: "cuda")
    try:
        torch.set_float32_matmul_precision(precision)
        assert processes.pick_device("cuda").type == "cuda"
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
