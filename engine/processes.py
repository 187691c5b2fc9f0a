"""The device of this process, its rank among those that torchrun started, and its signals."""

import hashlib
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from engine import cpu, kernels
from engine.watchdog import LOOK, OTHER_ENDED, Watchdog
from tasks.flags import DEVICES, DTYPES


@dataclass
class Processes:
    """This process, number `rank` of `world`, and what it sends to the others. A process without
    others is number 0 of 1 and sends nothing. local_rank is its number on this machine."""

    rank: int
    world: int
    device: torch.device
    local_rank: int = 0
    cpu_group: dist.ProcessGroup | None = None  # gloo: for the host's numbers, and long waits
    watchdog: Watchdog | None = None  # from joining the others to leaving them

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def launcher(self) -> list[str]:
        """The words of the command that starts as many processes on as many machines."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        if self.world == 1:
            return ["python"]
        if self.world == here:
            return ["torchrun", "--standalone", f"--nproc_per_node={here}"]
        words = ["torchrun", f"--nnodes={self.world // here}", f"--nproc_per_node={here}"]
        return [*words, "--rdzv_backend=c10d", "--rdzv_endpoint=HOST:29500"]

    def at(self, place: str, step: int | None = None) -> None:
        """Notes what this process does now. All processes must pass the same places in the same
        order, see Watchdog."""
        if self.watchdog:
            self.watchdog.at(place, step)

    @contextmanager
    def busy(self, place: str, hours: float = 1.0) -> Iterator[None]:
        """A context for work at `place` that takes long and passes no other place, such as
        compiling: for so many hours no process takes the wait for this one for a hang, unless it
        gives no sign of life."""
        self.at(place)
        with self.watchdog.busy(3600 * hours) if self.watchdog else nullcontext():
            yield

    def all_reduce(self, numbers: list[float], dtype: torch.dtype = torch.float64) -> list[float]:
        """The sums over all processes, element by element; every process gets them. They go from
        host to host by gloo: NCCL would wait for all work that the GPUs have queued."""
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=dtype)
        dist.all_reduce(total, group=self.cpu_group)
        return total.tolist()

    def broadcast(self, number: float) -> float:
        """The main process's number, in every process."""
        return self.all_reduce([number if self.main else 0])[0]

    def all_equal(self, text: str) -> bool:
        """Whether all processes have the same text, as far as 52 bits of its hash tell."""
        number = int(hashlib.sha256(text.encode()).hexdigest()[:13], 16)  # exact as a float64
        return not self.all_reduce([float(number != self.broadcast(number))])[0]

    def broadcast_tensor(self, tensor: Tensor | None, owner: int) -> Tensor:
        """The tensor of process `owner`, int64 or float32 and of up to 4 dimensions, in every
        process; the others pass None."""
        if self.world == 1:
            return tensor
        mine = self.rank == owner
        header = [0] * 6  # whether it has integers, the number of dimensions, the sizes
        if mine:
            header = [int(not tensor.is_floating_point()), tensor.dim(), *tensor.shape]
            header += [0] * (6 - len(header))
        integers, n, *sizes = (int(x) for x in self.all_reduce(header))
        dtype = torch.int64 if integers else torch.float32
        found = torch.empty(sizes[:n], dtype=dtype, device=self.device)
        if mine:
            found.copy_(tensor)
        dist.broadcast(found, owner)
        return found

    def barrier(self) -> None:
        """Waits until all processes have come here. Raises ValueError if one of them has ended."""
        if self.world > 1:
            try:
                dist.barrier(group=self.cpu_group)
            except RuntimeError as error:
                raise ValueError(OTHER_ENDED) from error


def multiplies_bf16(device: str) -> bool:
    """Whether the device "cuda" or "cpu" has instructions for bf16; without them it is slow."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def find_device(name: str) -> str:
    """The type of the device; name is one of DEVICES, and auto takes a GPU if there is one. Raises
    ValueError for a device that this machine lacks."""
    if name not in DEVICES:
        raise ValueError(f"--device {name} is not known: choose {', '.join(DEVICES)}")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise ValueError(f"--device {name} cannot be used: this torch sees none here, try cpu")
    return name


def pick_device(name: str) -> torch.device:
    """The device that find_device finds, with the settings and kernels for it installed.

    On CUDA torch's precision stays as it is, by default without TF32: bf16, which is faster, is the
    default there, and who asks for fp32 wants its 24 bits, to compare with another machine or with
    another code. In a bf16 run the few products in fp32 do not show in the time.
    """
    name = find_device(name)
    if name == "cpu":
        cpu.prepare()
    device = torch.device(name)
    kernels.install(device)
    return device


def precision(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of products. The name is one of DTYPES, else ValueError is raised; auto is bf16 on
    GPUs that have it."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not known: choose {', '.join(DTYPES)}")
    if dtype == "auto":
        bf16 = device.type == "cuda" and multiplies_bf16("cuda")
        return torch.bfloat16 if bf16 else torch.float32
    return torch.bfloat16 if dtype == "bf16" else torch.float32


def start(device_name: str, minutes: float = 10.0) -> Processes:
    """Joins the group that torchrun's variables describe; without them this process is alone.
    Raises ValueError if not all processes of the group have come within so many minutes; from then
    on to `stop`, none may keep the others waiting for longer than that, unless it is `busy`."""
    device = pick_device(device_name)
    if "RANK" not in os.environ:
        return Processes(0, 1, device)
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    try:
        patience = timedelta(minutes=minutes)
        store, rank, world = next(dist.rendezvous("env://", timeout=patience))
        store = new_prefix_store(store, rank, world, minutes)
    except (dist.DistError, TimeoutError) as error:  # torchrun ends those of its own machine only
        raise ValueError(
            f"not all processes have come within {minutes:g} minutes: see what was said on the "
            "other machines, or raise --timeout"
        ) from error
    group = Processes(rank, world, device, local_rank)
    if world > 1:
        # A connection of its own: on that of the store, a call that waits would block the thread.
        connection = store.clone() if hasattr(store, "clone") else store  # not in older torch
        connection = dist.PrefixStore("watchdog", connection)
        group.watchdog = Watchdog(connection, rank, world, 60 * minutes)
        group.watchdog.begin()
        group.at("joining")
    if device.type == "cuda":
        # torch has a watchdog for NCCL too. It ends the process a minute after an error of the
        # network, or when a call of CUDA has blocked it for 8 minutes, with a trace of C++ and
        # before ours has said who is to blame. With 0 it only reports (ProcessGroupNCCL.cpp).
        # torchrun sets the first to 1 in every process that it starts.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    # The watchdog ends a wait before these hours, and says more about it.
    hours, backend = timedelta(hours=24), "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=hours)
    group.cpu_group = dist.new_group(backend="gloo", timeout=hours)
    return group


def stop(group: Processes) -> None:
    """Leaves the group when all processes are done: NCCL wants all of them to leave together. Not
    after an error: then this would wait, for hours, for an operation that another process never
    joins. See `leaving_at_once`."""
    if dist.is_initialized():
        group.at("leaving")
        group.barrier()
        dist.destroy_process_group()
    if group.watchdog:
        group.watchdog.finish()


@contextmanager
def failing(group: Processes) -> Iterator[None]:
    """A context whose error the other processes are told of; one that comes from another process's
    end is a ValueError."""
    try:
        yield
    except BaseException as error:
        if group.watchdog:
            group.watchdog.fail()
        if isinstance(error, RuntimeError) and lost_another(error):
            raise ValueError(OTHER_ENDED) from error
        raise


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """A context for a whole script. After an error in a process of a group it prints what Python
    would, and ends the process by force: Python's own way out destroys NCCL's communicators and
    thereby waits for what is queued on the GPU."""
    try:
        yield
    except BaseException as error:
        if not dist.is_initialized():
            raise
        status = 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        elif isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        else:
            status = error.code or 0
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # nobody reads it any more
                stream.flush()
        if dist.get_rank() == 0:  # it may keep the store, in which the others are yet to look
            time.sleep(2 * LOOK)
        os._exit(status)


def new_prefix_store(store: dist.Store, rank: int, world: int, minutes: float) -> dist.Store:
    """A part of the store that nobody has written to yet. Raises TimeoutError where not all
    processes have come within so many minutes.

    torchrun keeps the store when it restarts the processes (seen with 2.13), and a process that
    finds there the address of one that has ended would wait for it in vain. So each process writes
    a new name, and the prefix is rank 0's, which waits until it has read all names and all have
    read its own.
    """
    name = uuid.uuid4().hex
    store.set(f"name {rank}", name)
    prefix, names, seen = name, [], False
    end = time.monotonic() + 60 * minutes
    while not seen:
        if time.monotonic() > end:
            raise TimeoutError
        if rank == 0:
            names = [store.get(f"name {other}").decode() for other in range(world)]
            store.set("names", " ".join(names))
            seen = all(store.check([f"{name} {other}"]) for other in range(1, world))
        else:
            prefix, *names = store.get("names").decode().split()
            if seen := name in names:
                store.set(f"{prefix} {rank}", "")
        time.sleep(0 if seen else 0.05)
    return dist.PrefixStore(prefix, store)


def is_restarted() -> bool:
    """Whether this command may be a repetition, by torchrun (--max-restarts) or Slurm (--requeue).
    All processes get the same answer; a count of restarts may differ between machines."""
    return any(
        os.environ.get(name, "0") not in ("", "0")
        for name in ("TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT")
    )


def lost_another(error: RuntimeError) -> bool:
    """Whether a collective operation raises this error when another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class Interruption:
    """A context in which SIGINT and SIGTERM ask the loop to end after the current step; a second
    SIGINT ends it at once."""

    def __enter__(self) -> "Interruption":
        self.asked = False
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number: int, frame) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
