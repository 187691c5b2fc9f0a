"""Models larger than one GPU: what is divided over the processes, and how it is put together again.

    --shard (model)      weights, gradients and the optimizer's state: torch's FSDP2
    --shard optimizer    its state alone, beside DistributedDataParallel

Each process still learns from its own examples, and the numbers are those of plain data
parallelism. With "model" it keeps some rows of every matrix, gathers a block's matrices when the
block is computed, and forgets the others' rows again; use it with --recompute. With "optimizer"
each parameter has an owner, who alone keeps its moments, makes its step and tells the result.

A checkpoint is the same file whatever was divided: its state goes to the first process, tensor by
tensor. Only where that would be too much for it, each writes its own part (`parts.py`).

Left out: weights that come into being in parts (while it is built, a model is whole in the memory
of each process, though not of its GPU), division within a machine and copies between machines,
division of single products (tensor parallelism), offloading to the CPU.

Papers: ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), its stages 3 and 1; FSDP (Zhao et al.
2023, arXiv:2304.11277).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import optim
from engine.processes import Processes
from model import MLP, Attention, Block
from optim import ChainedOptimizer, separate_states

if TYPE_CHECKING:  # a second to import, which only --shard needs
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

PARTS_FROM = 32 * 2**30  # bytes of a state from which on no process gathers it


# ---- the model -----------------------------------------------------------------------------------


def divide_model(shard: str, group: Processes, model: nn.Module, dtype: torch.dtype) -> None:
    """With shard "model" and several processes, parameters become DTensors of which each has some
    rows, on its own device; every forward is then one of all processes. To be called before there
    is an optimizer.

    In bf16, autocast turns matrices into bf16 and leaves LayerNorms and embeddings as they are. So
    attention and MLP of a block are gathered together, already in bf16: the same numbers as
    without --shard, half the traffic, and no bf16 copies that wait for the backward pass. All
    else is gathered for the whole of forward and again for the whole of backward.
    """
    if shard != "model" or group.world == 1:
        return
    if group.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise ValueError(
            f"--shard model on CPUs needs torch 2.7 or newer, this is {torch.__version__}: update "
            "it, or choose --shard optimizer"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # It is a warning of what our blocks do not do: change the output of a layer in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(group.device.type, (group.world,))
    policy = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in (m for m in model.modules() if isinstance(m, Block)):
        layers = [m for m in block.children() if isinstance(m, Attention | MLP)]
        fully_shard(layers, mesh=mesh, mp_policy=policy)
    # Not FSDP2's own choice for a root: outside of a forward, parameters are always rows.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_divided(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which each process has some rows."""
    return hasattr(tensor, "full_tensor")


def parallel(model: nn.Module, group: Processes) -> nn.Module:
    """The model for training: behind DistributedDataParallel, unless it is divided or alone."""
    if group.world == 1 or any(is_divided(p) for p in model.parameters()):
        return model
    ids = [group.device] if group.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)


def no_sync(model: nn.Module) -> AbstractContextManager:
    """A micro-batch whose gradient need not be exchanged yet. A divided model exchanges it all the
    same: what waits would be a whole gradient, in every process."""
    return model.no_sync() if hasattr(model, "no_sync") else nullcontext()


def clip(model: nn.Module, limit: float) -> Tensor:
    """Scales the gradient down to that norm, 0: to none. -> its norm before, of all processes, on
    the device: nothing has waited for it."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    return norm.full_tensor() if is_divided(norm) else norm


# ---- rows ----------------------------------------------------------------------------------------


def my_rows(height: int, mesh: DeviceMesh) -> tuple[int, int]:
    """(first, number) of the rows that this process has, as FSDP2 and torch.chunk divide them: all
    have ceil(height / world), but for the last ones."""
    each = math.ceil(height / mesh.size())
    first = min(mesh.get_local_rank() * each, height)
    return first, min(each, height - first)


def as_rows(mine: Tensor, like: DTensor) -> DTensor:
    """A tensor of the shape of `like`, from the rows of it that this process has."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        mine.to(like.device, copy=True),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


# ---- optimizers ----------------------------------------------------------------------------------


class DividedMuon(optim.Muon):
    """Muon for a divided model. An orthogonal matrix cannot be found row by row, so each process
    gets a whole one, all work at the same time, and each tells the others its result."""

    def orthogonalized(self, updates: list[DTensor]) -> Iterable[DTensor]:
        mesh = updates[0].device_mesh
        first, count = my_rows(updates[0].size(0), mesh)
        rank, world, mine = mesh.get_local_rank(), mesh.size(), []
        for start in range(0, len(updates), world):
            turn = updates[start : start + world]
            for owner, update in enumerate(turn):
                whole = update.full_tensor()
                if owner == rank:
                    mine = [whole]
            if rank < len(turn):
                mine = super().orthogonalized(mine)
            for owner, update in enumerate(turn):
                whole = torch.empty(update.shape, dtype=update.dtype, device=update.device)
                if owner == rank:
                    whole.copy_(mine[0])
                dist.broadcast(whole, owner, group=mesh.get_group())
                yield as_rows(whole[first : first + count], update)


class DividedOptimizer:
    """An optimizer whose state is divided: each parameter has an owner among the processes, the
    only one that has its state and makes its step (ZeRO's stage 1)."""

    def __init__(self, optimizer: torch.optim.Optimizer | ChainedOptimizer, group: Processes):
        self.optimizer, self.group = optimizer, group
        self.owned: list[list[Tensor]] = [[] for _ in range(group.world)]  # by each process
        costs = [  # two moments of AdamW, one of Muon
            (p.numel() * (1 if isinstance(one, optim.Muon) else 2), p)
            for one in optimizers_of(optimizer).values()
            for p in parameters(one)
        ]
        sizes = [0] * group.world
        for cost, p in sorted(costs, key=lambda item: -item[0]):
            owner = sizes.index(min(sizes))
            self.owned[owner].append(p)
            sizes[owner] += cost
        self.mine = {id(p) for p in self.owned[group.rank]}

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """The others' gradients are dropped first: a parameter without one gets no state."""
        for params in self.owned[: self.group.rank] + self.owned[self.group.rank + 1 :]:
            for p in params:
                p.grad = None
        self.optimizer.step()
        for owner, params in enumerate(self.owned):
            if not params:
                continue
            message = torch.cat([p.flatten() for p in params])
            dist.broadcast(message, owner)
            if owner != self.group.rank:
                for p, new in zip(params, message.split([p.numel() for p in params]), strict=True):
                    p.copy_(new.view_as(p))

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """That of the whole, with the state of this process's parameters alone."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state)


def make_optimizer(shard: str, group: Processes, model: nn.Module, name: str, **settings):
    """optim.make_optimizer(model, name, **settings), divided as --shard says."""
    if group.world == 1:
        return optim.make_optimizer(model, name, **settings)
    muon = DividedMuon if shard == "model" else optim.Muon
    optimizer = optim.make_optimizer(model, name, muon=muon, **settings)
    return DividedOptimizer(optimizer, group) if shard == "optimizer" else optimizer


def holds(optimizer, parameter: Tensor) -> bool:
    """Whether the optimizer has, in this process, state for the parameter."""
    return not isinstance(optimizer, DividedOptimizer) or id(parameter) in optimizer.mine


def optimizers_of(optimizer) -> dict[str, torch.optim.Optimizer]:
    """The optimizers that one of any kind consists of, named as `separate_states` names them."""
    if isinstance(optimizer, DividedOptimizer):
        return optimizers_of(optimizer.optimizer)
    if isinstance(optimizer, ChainedOptimizer):
        return {str(i): one for i, one in enumerate(optimizer.optimizers)}
    return {"": optimizer}


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order in which the optimizer's state numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


# ---- checkpoints ---------------------------------------------------------------------------------


def whole_state(model: nn.Module, optimizer, group: Processes) -> tuple[dict, dict]:
    """The state of the model and of the optimizer (None: {}), as a run without --shard has them,
    what was divided on the first process's CPU; ({}, {}) for the others, which must call it all the
    same: every tensor is put together by all, one after the other."""

    def whole(tensor: Tensor) -> Tensor | None:
        if not is_divided(tensor):
            return tensor
        tensor = tensor.full_tensor()
        return tensor.cpu() if group.main else None

    weights = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    state = optimizer.state_dict() if optimizer else {}
    for one in separate_states(state).values():
        found = from_owners(one, group) if isinstance(optimizer, DividedOptimizer) else one["state"]
        one["state"] = {i: {k: whole(t) for k, t in s.items()} for i, s in found.items()}
    return (weights, state) if group.main else ({}, {})


MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # what AdamW and Muon remember


def from_owners(state: dict, group: Processes) -> dict[int, dict[str, Tensor]]:
    """{number of a parameter: its state}, of all processes; on the first one alone."""
    mine, found = state["state"], {}
    places = [(i, k) for g in state["param_groups"] for i in g["params"] for k in MOMENTS]
    owners = group.all_reduce([(group.rank + 1) * (k in mine.get(i, {})) for i, k in places])
    for (i, k), owner in zip(places, owners, strict=True):
        if owner:  # else no step was made yet, or the moment is another optimizer's
            tensor = group.broadcast_tensor(mine.get(i, {}).get(k), int(owner) - 1)
            if group.main:
                found.setdefault(i, {})[k] = tensor.cpu()
    return found


def state_to_save(path: Path, step: int, model: nn.Module, optimizer, group: Processes) -> dict:
    """{"weights": …, "optimizer": its state} for the checkpoint that the first process is to write
    at `path`; all must call it. Above PARTS_FROM the tensors are on the disk then, in a folder of
    their own, and there are "parts" in their place."""
    divided = isinstance(optimizer, DividedOptimizer)
    divided |= any(is_divided(p) for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    size *= 3 if optimizer else 1  # AdamW has two moments
    if not divided or size < PARTS_FROM:
        weights, state = whole_state(model, optimizer, group)
        return {"weights": weights, "optimizer": state}
    import parts  # which takes a second

    state = optimizer.state_dict() if optimizer else {}
    found = parts.write(path, step, parts.flat(model.state_dict(), state), group)
    return {"weights": {}, "optimizer": parts.bare(state), "parts": found}


@torch.no_grad()
def load_weights(path: Path, model: nn.Module, state: dict) -> None:
    """The weights of a checkpoint in parts into a model of any kind; each process reads what it
    holds. Raises ValueError."""
    own = model.state_dict()
    odd = sorted(own.keys() ^ state.keys())
    odd += [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
    if odd:
        raise ValueError(f"{path} does not fit the model that it names: {', '.join(odd[:5])}")
    for name, tensor in own.items():
        tensor.copy_(part_for(tensor, state[name]))


def load_optimizer(optimizer, state: dict) -> None:
    """The state of a whole optimizer, as every checkpoint has it, into one of any kind; each
    process takes (of a checkpoint in parts: reads) what it holds."""
    inner, own = optimizers_of(optimizer), {}
    for which, one in separate_states(state).items():
        mine = {i: p for i, p in enumerate(parameters(inner[which])) if holds(optimizer, p)}
        moments = {
            i: {k: part_for(mine[i], t) for k, t in found.items()}
            for i, found in one["state"].items()
            if i in mine
        }
        own[which] = {**one, "state": moments}
    optimizer.load_state_dict(own.get("", own))


def part_for(parameter: Tensor, whole) -> Tensor:
    """Of a moment (a Tensor or parts.Stored) the rows that a divided parameter needs; all of one
    without rows, the number of steps."""
    if not is_divided(parameter) or whole.shape != parameter.shape:
        return whole[...]
    first, count = my_rows(len(parameter), parameter.device_mesh)
    return as_rows(whole[first : first + count], parameter)
