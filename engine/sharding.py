"""Models larger than one GPU: weights, gradients and optimizer state divided over the processes.

    --shard (model)      weights, gradients and the optimizer's state, by torch's FSDP2
    --shard optimizer    the optimizer's state alone, beside DistributedDataParallel

Each process still learns from its own examples, and the numbers are those of plain data
parallelism. With "model" a process keeps some rows of every matrix, gathers a block's matrices when
it computes the block, and then frees the other processes' rows; use it with --recompute. With
"optimizer" each parameter has an owner, which alone keeps its moments and makes its step, and
broadcasts the result.

A checkpoint is the same file whatever was divided: the main process gathers the state, tensor by
tensor. Only if that would be too much for it, each process writes its own part (`parts.py`).

Left out: building a model in parts (while it is built, it is whole in the memory of each process,
though not of its GPU), division within a machine and copies between machines, division of single
products (tensor parallelism), offloading to the CPU.

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

PARTS_FROM = 32 * 2**30  # bytes of a state; a larger one is not gathered but written in parts


# ---- the model -----------------------------------------------------------------------------------


def divide_model(shard: str, group: Processes, model: nn.Module, dtype: torch.dtype) -> None:
    """With shard "model" and a group, turns the parameters into DTensors, of which each process has
    some rows on its own device. Then all processes must take part in every forward. To be called
    before there is an optimizer. Raises ValueError on CPUs with torch 2.6.

    In bf16, autocast turns matrices into bf16 and leaves LayerNorms and embeddings as they are. So
    attention and MLP of a block are gathered together, already in bf16: that gives the same numbers
    as without --shard, half the traffic, and no bf16 copies kept for the backward pass. Everything
    else is gathered for the whole forward pass, and once more for the whole backward pass.
    """
    if shard != "model" or is_alone(group):
        return
    if group.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise ValueError(
            f"--shard model on CPUs needs torch 2.7 or newer, this is {torch.__version__}: update "
            "it, or choose --shard optimizer"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # The warning is about changing a layer's output in place, which our blocks do not do.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(group.device.type, (group.world,))
    policy = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for layers in layers_of_blocks(model):
        fully_shard(layers, mesh=mesh, mp_policy=policy)
    # FSDP2 would not do so for the root, but outside of forward all parameters are to be rows.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def layers_of_blocks(model: nn.Module) -> list[list[nn.Module]]:
    """Attention and MLP of each block: what a divided model gathers together."""
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    return [[m for m in block.children() if isinstance(m, Attention | MLP)] for block in blocks]


def is_alone(group: Processes) -> bool:
    """Whether this process is in no group. In a group of one everything is done as in a larger one,
    so that one GPU can try the code of many."""
    return group.cpu_group is None


def is_divided(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which each process has some rows."""
    return hasattr(tensor, "full_tensor")


def parallel(model: nn.Module, group: Processes) -> nn.Module:
    """The model for training: wrapped in DistributedDataParallel, unless it is divided or this
    process is alone."""
    if is_alone(group) or any(is_divided(p) for p in model.parameters()):
        return model
    ids = [group.device] if group.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)


def no_sync(model: nn.Module) -> AbstractContextManager:
    """A context for a micro-batch whose gradient need not be exchanged yet. A divided model
    exchanges it nevertheless: otherwise every process would keep a whole gradient."""
    return model.no_sync() if hasattr(model, "no_sync") else nullcontext()


def clip(model: nn.Module, limit: float) -> Tensor:
    """Scales the gradient down to a norm of `limit` (0: no limit). Returns its norm before, that of
    all processes, as a tensor on the device: the host has not waited for it."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    return norm.full_tensor() if is_divided(norm) else norm


# ---- rows ----------------------------------------------------------------------------------------


def my_rows(height: int, mesh: DeviceMesh) -> tuple[int, int]:
    """(first row, number of rows) that this process has, as FSDP2 and torch.chunk divide them: each
    has ceil(height / world) rows, but the last ones may have fewer or none."""
    each = math.ceil(height / mesh.size())
    first = min(mesh.get_local_rank() * each, height)
    return first, min(each, height - first)


def as_rows(mine: Tensor, like: DTensor) -> DTensor:
    """A DTensor in the shape of `like`, from the rows of it that this process has."""
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
    """Muon for a divided model. A matrix cannot be orthogonalized row by row, so each process
    gathers a whole one, all work at the same time, and each broadcasts its result."""

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
    """An optimizer whose state is divided (ZeRO's stage 1): each parameter has an owner among the
    processes, which alone has its state and makes its step."""

    def __init__(self, optimizer: torch.optim.Optimizer | ChainedOptimizer, group: Processes):
        self.optimizer, self.group = optimizer, group
        self.owned: list[list[Tensor]] = [[] for _ in range(group.world)]  # of each process
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
        """Makes the steps of this process's parameters and exchanges the results. The gradients of
        the others are dropped before, because a parameter without gradient gets no state."""
        for params in self.owned[: self.group.rank] + self.owned[self.group.rank + 1 :]:
            for p in params:
                p.grad = None
        self.optimizer.step()
        for owner, params in enumerate(self.owned):
            if not params:
                continue
            values = torch.cat([p.flatten() for p in params])
            dist.broadcast(values, owner)
            if owner != self.group.rank:
                for p, new in zip(params, values.split([p.numel() for p in params]), strict=True):
                    p.copy_(new.view_as(p))

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """The state dict of the whole optimizer, with the moments of this process's parameters."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state)


def make_sharded_optimizer(shard: str, group: Processes, model: nn.Module, name: str, **settings):
    """The optimizer of optim.make_optimizer(model, name, **settings), divided as --shard says."""
    if is_alone(group):
        return optim.make_optimizer(model, name, **settings)
    muon = DividedMuon if shard == "model" else optim.Muon
    optimizer = optim.make_optimizer(model, name, muon=muon, **settings)
    return DividedOptimizer(optimizer, group) if shard == "optimizer" else optimizer


def holds(optimizer, parameter: Tensor) -> bool:
    """Whether this process has the optimizer's state of the parameter."""
    return not isinstance(optimizer, DividedOptimizer) or id(parameter) in optimizer.mine


def optimizers_of(optimizer) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of torch that this one consists of, named as `separate_states` has them."""
    if isinstance(optimizer, DividedOptimizer):
        return optimizers_of(optimizer.optimizer)
    if isinstance(optimizer, ChainedOptimizer):
        return {str(i): one for i, one in enumerate(optimizer.optimizers)}
    return {"": optimizer}


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters in the order in which the optimizer's state numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


# ---- checkpoints ---------------------------------------------------------------------------------


def whole_state(model: nn.Module, optimizer, group: Processes) -> tuple[dict, dict]:
    """(the model's state, the optimizer's state, {} without one) as a run without --shard has them;
    tensors that were divided are on the main process's CPU. The other processes get ({}, {}), but
    must call it too: all of them take part in gathering each tensor."""

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


MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # the state of AdamW and Muon


def from_owners(state: dict, group: Processes) -> dict[int, dict[str, Tensor]]:
    """{number of a parameter: its state} of all parameters, from their owners; {} in all processes
    but the main one."""
    mine, found = state["state"], {}
    places = [(i, k) for g in state["param_groups"] for i in g["params"] for k in MOMENTS]
    owners = group.all_reduce([(group.rank + 1) * (k in mine.get(i, {})) for i, k in places])
    for (i, k), owner in zip(places, owners, strict=True):
        if owner:  # 0: no step was made yet, or this optimizer has no such moment
            tensor = group.broadcast_tensor(mine.get(i, {}).get(k), int(owner) - 1)
            if group.main:
                found.setdefault(i, {})[k] = tensor.cpu()
    return found


def state_to_save(path: Path, step: int, model: nn.Module, optimizer, group: Processes) -> dict:
    """{"weights": …, "optimizer": its state} for the checkpoint that the main process will write to
    `path`; all processes must call it. A state above PARTS_FROM bytes is written to the disk here,
    in a folder of its own, and "parts" replaces the tensors. Raises OSError if that fails."""
    divided = isinstance(optimizer, DividedOptimizer)
    divided |= any(is_divided(p) for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    size *= 3 if optimizer else 1  # AdamW has two moments
    if not divided or size < PARTS_FROM:
        weights, state = whole_state(model, optimizer, group)
        return {"weights": weights, "optimizer": state}
    from engine import parts  # which takes a second

    state = optimizer.state_dict() if optimizer else {}
    found = parts.write_parts(path, step, parts.flatten(model.state_dict(), state), group)
    return {"weights": {}, "optimizer": parts.without_tensors(state), "parts": found}


@torch.no_grad()
def load_weights(path: Path, model: nn.Module, state: dict) -> None:
    """Loads the weights of a checkpoint in parts into a model, divided or not; each process reads
    what it holds. Raises ValueError if they do not fit or are damaged."""
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys())
    wrong += [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
    if wrong:
        raise ValueError(f"{path} does not fit the model that it names: {', '.join(wrong[:5])}")
    for name, tensor in own.items():
        tensor.copy_(part_for(tensor, state[name]))


def load_optimizer(optimizer, state: dict) -> None:
    """Loads the state of a whole optimizer, as every checkpoint has it, into an optimizer, divided
    or not; each process takes what it holds, or reads it from a checkpoint in parts. Only the
    moments are state: the settings, of which `fused` depends on the device, stay as they are."""
    inner, own = optimizers_of(optimizer), {}
    for which, one in separate_states(state).items():
        mine = {i: p for i, p in enumerate(parameters(inner[which])) if holds(optimizer, p)}
        moments = {
            i: {k: part_for(mine[i], t) for k, t in found.items()}
            for i, found in one["state"].items()
            if i in mine
        }
        groups = one["param_groups"]
        if len(groups) == len(inner[which].param_groups):  # else torch says so
            pairs = zip(inner[which].param_groups, groups, strict=True)
            groups = [{**now, "params": before["params"]} for now, before in pairs]
        own[which] = {"state": moments, "param_groups": groups}
    optimizer.load_state_dict(own.get("", own))


def part_for(parameter: Tensor, whole) -> Tensor:
    """The rows of a moment or weight (a Tensor or parts.Stored) that this process needs for a
    divided parameter; all of it if the parameter is not divided, or for the number of steps."""
    if not is_divided(parameter) or whole.shape != parameter.shape:
        return whole[...]
    first, count = my_rows(len(parameter), parameter.device_mesh)
    return as_rows(whole[first : first + count], parameter)
