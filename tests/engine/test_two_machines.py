"""One run on two machines, by the lines of docs/distributed.md: two agents of torchrun, each in its
own folder as on its own disk, then also in its own network namespace; a Slurm script; what is
refused.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TOY
from test_docs import SEVERAL_MACHINES
from test_invariance import NOISE
from test_train import losses, weights

import train
from bpe import Tokenizer
from engine import checkpoint as checkpoints
from engine import processes
from engine.config import resolve
from engine.processes import Processes

pytestmark = pytest.mark.slow

# All of these runs leave after step 6, without the curves and samples of one that has ended.
FLAGS = [*TOY, "--tokens_per_step=256", "--steps=7", "--eval_interval=3", "--dropout=0.1"]
TO_STEP_6 = [*FLAGS, "--stop_after=6"]
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
SLURM = next(b for b in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S) if "#SBATCH" in b)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="bash and namespaces of Linux")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def readme_line(host: str, *more: str, flags: list[str]) -> list[str]:
    """What the README says to run on each machine, with one process and at toy size."""
    (line,) = SEVERAL_MACHINES
    words = shlex.split(line.replace("HOST:29500", host).replace("_node=8", "_node=1"))
    assert words[0] == "torchrun" and "train.py" in words
    options = words[1 : words.index("train.py")]
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, *more]
    return [*launcher, str(ROOT / "train.py"), *flags]


def on_both(commands: list[list[str]], folders: list[Path], **environment: str) -> list[str]:
    """What the two machines print; both must succeed."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    running = [
        subprocess.Popen(command, cwd=folder, env={**ENVIRONMENT, **environment}, **options)
        for command, folder in zip(commands, folders, strict=True)
    ]
    try:
        said = [machine.communicate(timeout=100) for machine in running]
    finally:
        for machine in running:
            machine.kill()
    for machine, (_, error) in zip(running, said, strict=True):
        assert machine.returncode == 0, error
    return [out for out, _ in said]


@pytest.fixture
def disks(toy) -> list[Path]:
    """Two folders with the same text and nothing else, no cache either."""
    folders = [toy / "one", toy / "two"]
    for folder in folders:
        folder.mkdir()
        shutil.copy("toy.txt", folder)
    return folders


def assert_same_run(one: Path, other: Path) -> None:
    for split in ("train", "validation"):
        assert losses(one, split) == pytest.approx(losses(other, split), abs=1e-4)
    assert len(losses(one)) == 6
    want, found = weights(one / "latest.pt"), weights(other / "latest.pt")
    for name in (n for n in want if not n.endswith(NOISE)):
        torch.testing.assert_close(found[name], want[name], atol=1e-4, rtol=1e-4, msg=name)


# ---- runs ----------------------------------------------------------------------------------------


def test_two_machines_with_disks_of_their_own_train_like_one(disks):
    """Process 0 alone writes, and its machine alone can go on with the run."""
    command = readme_line(f"127.0.0.1:{free_port()}", flags=[*FLAGS, "--out=run", "--stop_after=4"])
    said = on_both([command, command], disks)
    assert "x 2 accumulated x 2 processes" in "".join(said)
    (writer,) = (folder for folder in disks if (folder / "run").exists())
    assert (disks[0] / "data/cache").is_dir() and (disks[1] / "data/cache").is_dir()
    assert checkpoints.load(writer / "run" / "latest.pt")["step"] == 4
    train.main(["--resume", f"--out={writer / 'run'}", "--stop_after=2"])
    train.main([*TO_STEP_6, "--out=whole"])
    assert_same_run(Path("whole"), writer / "run")


@contextmanager
def two_hosts(hosts: Path):
    """Two network namespaces, joined by a cable, their own loopback aside: [the words before a
    command that runs there], [the ends of the cable]. `hosts` names them alpha and beta."""
    names = [f"two-machines-{os.getpid()}-{letter}" for letter in "ab"]
    ends = [f"h{os.getpid()}{letter}" for letter in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)

    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for i, (name, end) in enumerate(zip(names, ends, strict=True)):
                ip("link", "set", end, "netns", name)
                ip("-n", name, "address", "add", f"10.213.7.{i + 1}/24", "dev", end)
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", end, "up")
        except (OSError, subprocess.SubprocessError) as error:
            why = getattr(error, "stderr", None) or error
            pytest.skip(f"no network namespaces here: {why}")
        hosts.write_text("127.0.0.1 localhost\n10.213.7.1 alpha\n10.213.7.2 beta\n", "utf-8")
        script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        shell = ["unshare", "--uts", "--mount", "sh", "-c", script]
        inside = [
            ["ip", "netns", "exec", name, *shell, host, str(hosts)]
            for name, host in zip(names, ("alpha", "beta"), strict=True)
        ]
        yield inside, ends
    finally:
        for name in made:
            ip("netns", "del", name)  # and what is in it


@LINUX
@pytest.mark.parametrize("by", ["name", "address"])
def test_two_machines_that_share_nothing_but_a_cable_train_like_one(disks, tmp_path, by):
    """By the README's line alone where names lead to the machines; else with what it says then."""
    flags = [*TO_STEP_6, "--out=run"]
    with two_hosts(tmp_path / "hosts") as (inside, ends):
        if by == "name":
            commands = [[*words, *readme_line("beta:29500", flags=flags)] for words in inside]
        else:
            (tmp_path / "hosts").write_text("127.0.0.1 localhost alpha beta\n", encoding="utf-8")
            commands = []
            for i, (words, end) in enumerate(zip(inside, ends, strict=True)):
                more = [f"--local_addr=10.213.7.{i + 1}", *["--rdzv_conf=is_host=1"] * (i == 0)]
                line = readme_line("10.213.7.1:29500", *more, flags=flags)
                commands.append([*words, "env", f"GLOO_SOCKET_IFNAME={end}", *line])
        on_both(commands, disks)
    train.main([*TO_STEP_6, "--out=whole"])
    assert (disks[0] / "run").exists() and not (disks[1] / "run").exists()  # alpha, not beta
    assert_same_run(Path("whole"), disks[0] / "run")


@LINUX
def test_the_slurm_script_goes_on_with_a_requeued_job(toy):
    """Slurm itself is played: `srun` runs its command twice, as on two nodes, `scontrol` tells
    their names, `torchrun` is this Python's, with a free port and toy sizes."""
    assert subprocess.run(["bash", "-n"], input=SLURM, encoding="utf-8").returncode == 0
    assert SLURM.startswith("#!/bin/bash\n#SBATCH ") and "--requeue" in SLURM
    train.main([*FLAGS, "--out=out/gpt2", "--stop_after=2"])
    fakes, port = toy / "fakes", free_port()
    fakes.mkdir()
    launch = f"{sys.executable} -m torch.distributed.run"
    for name, script in {
        "scontrol": '[ "$*" = "show hostnames n[1-2]" ] && printf "localhost\\nother\\n"',
        "srun": '"$@" & first=$!; "$@"; second=$?; wait "$first" && exit "$second"',
        "torchrun": f'exec {launch} "$@"',
    }.items():
        (fakes / name).write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        (fakes / name).chmod(0o755)
    small = shlex.join([*FLAGS, "--stop_after=4"])
    script = SLURM.replace("--preset gpt2 --data my_folder", small).replace("29500", str(port))
    script = script.replace(" train.py", f" {ROOT / 'train.py'}").replace("_node=8", "_node=1")
    done = subprocess.run(
        ["bash", "-u"],
        input=script,
        env=ENVIRONMENT
        | {"PATH": f"{fakes}{os.pathsep}{os.environ['PATH']}", "SLURM_RESTART_COUNT": "1"}
        | {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"},
        capture_output=True,
        encoding="utf-8",
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"steps  7 .*, 2 of them done", done.stdout)
    assert "2 accumulated x 2 processes" in done.stdout
    train.main([*TO_STEP_6, "--out=whole"])
    assert_same_run(Path("whole"), toy / "out/gpt2")


# ---- what is refused -----------------------------------------------------------------------------


class Threads(Processes):
    """Processes that are threads of this one."""

    def __init__(self, rank: int, meeting: threading.Barrier, numbers: list):
        super().__init__(rank, meeting.parties, torch.device("cpu"))
        self.meeting, self.numbers = meeting, numbers

    def all_reduce(self, numbers, dtype=torch.float64):
        self.numbers[self.rank] = torch.tensor(numbers, dtype=dtype)
        self.meeting.wait(20)
        total = sum(self.numbers).tolist()
        self.meeting.wait(20)
        return total

    def barrier(self):
        self.meeting.wait(20)


def together(world: int, work) -> list:
    """[work(group) of each rank, or the error that it ended with]"""
    meeting, numbers, found = threading.Barrier(world), [None] * world, [None] * world

    def one(rank: int) -> None:
        try:
            found[rank] = work(Threads(rank, meeting, numbers))
        except ValueError as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_all_notice_one_who_has_something_else(world):
    assert together(world, lambda group: group.all_equal("the same")) == [True] * world
    for odd in range(world if world > 1 else 0):
        found = together(world, lambda group, odd=odd: group.all_equal(str(group.rank == odd)))
        assert found == [False] * world
    if world > 2:  # more than two opinions, whose mean may be one of them
        assert together(world, lambda group: group.all_equal(str(group.rank))) == [False] * world


@pytest.mark.parametrize(
    "what,more",
    [
        ("text in --data", ["--data=two/toy.txt"]),
        ("flags", ["--lr=0.5"]),
        ("flags", ["--n_layer=1"]),
        ("checkpoint to go on with", ["--resume", "--out=run"]),
        ("tokenizer", ["--tokenizer=other.json"]),
    ],
)
def test_machines_that_differ_are_refused(disks, monkeypatch, what, more):
    """They would train on, each on its own text or at its own rate, and never say so."""
    (disks[1] / "toy.txt").write_text("another text. " * 500, encoding="utf-8")
    for name, text in (("own", "some text"), ("other", "other words")):
        Tokenizer.train([text], 260).save(f"{name}.json")
    flags = [f for f in FLAGS if not f.startswith("--vocab_size")] + ["--tokenizer=own.json"]
    train.main([*flags, "--out=run", "--stop_after=2"])
    monkeypatch.setattr(train.Run, "prepare_forward", lambda self: None)

    other = more if "--resume" in more else [*flags, *more]
    for given, differ in (([flags, flags], False), ([flags, other], True)):
        begun = [resolve([*f, f"--cache_dir=cache-{rank}"]) for rank, f in enumerate(given)]
        for found in together(2, lambda group, begun=begun: train.Run(*begun[group.rank], group)):
            assert isinstance(found, ValueError if differ else train.Run), found
            if differ:
                want = rf"the machines do not have the same {what}[^\n]*"
                assert re.fullmatch(want, str(found))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_does_not_come_is_not_waited_for_in_vain(monkeypatch, rank):
    """The other had refused its flags: this one waited for 12 hours."""
    place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": free_port()}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"not all processes have come within 0\.02 minutes"):
        processes.start("cpu", 0.02)
    assert time.monotonic() - begin < 10


def test_one_who_died_is_not_taken_for_one_who_comes():
    store = dist.HashStore()
    store.set("name 1", "of a process that was killed")
    with pytest.raises(TimeoutError):
        processes.new_prefix_store(store, 0, 2, 0.005)
