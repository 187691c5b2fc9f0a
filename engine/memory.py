"""How much memory a training step needs in each process, found out without having that memory.

Weights, gradients and optimizer state can be counted. The activations between forward and backward
cannot be, unless every layer is written down a second time. So a step is made with the model,
losses, optimizer and recomputation of a real run, but on fake tensors, which have a shape and a
dtype and take no memory. A ledger follows when the storage of each would be allocated and freed.
For GPT-3 that takes some seconds.

The fake tensors lie on the CPU, where autocast casts them as it does real ones. For a plan for GPUs
the named places of `model.py` get what a GPU does otherwise: attention without a matrix of scores,
and so on.

Left out: what CUDA and NCCL keep for themselves and what the allocator loses in gaps; what a kernel
allocates and frees before it returns; torch.compile and evaluation, which both need less.

Papers: flash attention, which keeps its output and one number for each query (Dao et al. 2022,
arXiv:2205.14135); what can be divided over processes (ZeRO, Rajbhandari et al. 2020,
arXiv:1910.02054, section 5; FSDP, Zhao et al. 2023, arXiv:2304.11277).
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_file
import optim
import tasks
from engine import cpu, losses
from engine.config import divide_step, padded
from engine.evaluation import learnt, loss_name
from engine.setup import recompute_blocks
from finetune import add_adapters, freeze
from model import MLP, Attention, Block
from models import moe
from tasks.flags import FinetuneConfig, TrainConfig


@dataclass
class Memory:
    """The bytes that one process has at the moment of a step when it needs the most."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # and everything else: a batch, bf16 copies of weights, temporary results

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


# ---- the ledger ----------------------------------------------------------------------------------


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that operations return, from then until they are freed.

    Storages of `known` tensors are not counted, nor are copies of `cast` tensors in another dtype.
    `share` is the part that this process holds of what is allocated from now on.
    """

    def __init__(self, known: Iterable[Tensor], cast: Iterable[Tensor]):
        super().__init__()
        self.sizes: dict[int, float] = {key_of(tensor): 0.0 for tensor in known}
        self.cast = {key_of(tensor) for tensor in cast}
        self.live, self.peak, self.share = 0.0, 0.0, 1.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, share = function(*args, **(kwargs or {})), self.share
        if function is torch.ops.aten._to_copy.default and key_of(args[0]) in self.cast:
            share = 0.0
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and key_of(tensor) not in self.sizes:
                self.take(tensor, share)
        return result

    def take(self, tensor: Tensor, share: float) -> None:
        key, storage = key_of(tensor), tensor.untyped_storage()
        weakref.finalize(storage, self.give_back, key)
        self.sizes[key] = storage.nbytes() * share
        self.live += self.sizes[key]
        self.peak = max(self.peak, self.live)

    def give_back(self, key: int) -> None:
        self.live -= self.sizes.pop(key)

    def divide(self, tensor: Tensor, share: float) -> None:
        """From now on this process holds only that share of the tensor."""
        key, held = key_of(tensor), tensor.untyped_storage().nbytes() * share
        self.live += held - self.sizes[key]
        self.sizes[key] = held


def key_of(tensor: Tensor) -> int:
    """A key of the tensor's storage: the same for all its views, and unique while it exists."""
    return id(tensor.untyped_storage())


class FlashAttention(torch.autograd.Function):
    """Allocates and keeps what attention does on a GPU, and computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v):
        B, H, T, D = q.shape
        out = q.new_empty(B, T, H, D).transpose(1, 2)
        normalizer = q.new_empty(B, H, T, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, normalizer)
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, _, normalizer = ctx.saved_tensors
        # The gradient of the queries is summed over blocks of keys in fp32.
        sums = [torch.empty_like(q, dtype=torch.float32), torch.empty_like(normalizer)]
        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        del sums
        return gradients


def attention_on_gpu(q, k, v, mask=None, dropout_p: float = 0.0, is_causal=False) -> Tensor:
    return FlashAttention.apply(q, k, v)


def dropout_on_gpu(x: Tensor, p: float) -> Tensor:
    """Dropout whose mask has a byte for each element."""
    return torch.native_dropout(x, p, True)[0]


def layer_norm_on_gpu(x: Tensor, *args) -> Tensor:
    """LayerNorm in fp32, as with CUDA's autocast; that of CPUs leaves it in bf16."""
    return layer_norm(x.float() if x.dtype == torch.bfloat16 else x, *args)


layer_norm = F.layer_norm


def evenly(chosen: Tensor, n: int) -> list[int]:
    """How many tokens each expert has, if all have as many and none is beyond the capacity."""
    each, rest = divmod(chosen.numel(), n - 1)
    return [each + (i < rest) for i in range(n - 1)] + [0]


@contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """A context in which `model.py` handles fake tensors as on that device, "cuda" or "cpu"."""
    on_gpu = device == "cuda"
    attention, dropout = cpu.attention, cpu.dropout
    if on_gpu:
        attention, dropout = attention_on_gpu, dropout_on_gpu
    names = {"attention_kernel": attention, "dropout_kernel": dropout}
    names["cross_entropy"] = losses.linear_cross_entropy
    with (
        patch.multiple(model_file, **names),
        patch.dict(losses.CHUNK, {"cpu": losses.CHUNK[device]}),
        patch.object(moe, "tokens_of_each", evenly),
        patch.object(F, "layer_norm", layer_norm_on_gpu if on_gpu else layer_norm),
    ):
        yield


# ---- a run without a run -------------------------------------------------------------------------


def make_model(config: TrainConfig, sizes: dict) -> nn.Module:
    """The model on the meta device, changed as `train.Run` changes it before it trains."""
    Model = tasks.network(config.model)
    with torch.device("meta"):
        model = Model(Model.Config(**{**sizes, "vocab_size": padded(sizes["vocab_size"])}))
    if isinstance(config, FinetuneConfig):
        if config.lora_rank:
            add_adapters(model, config.lora_rank)
        if config.freeze:
            freeze(model, config.freeze)
    if config.recompute:
        recompute_blocks(model)
    return model.train()


def to_fake(model: nn.Module) -> None:
    """Replaces the model's meta tensors by tensors of the active FakeTensorMode."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            fake = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
            module.register_parameter(name, fake)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))


def full_batch_shape(config: TrainConfig, block_size: int, batch_size: int) -> tuple[int, int]:
    """(B, T) of a full micro-batch: its sequences, all of them as long as is allowed."""
    length = min(getattr(config, "row_length", 0) or block_size, block_size)
    return batch_size * block_size // length, length


def make_batch(config: TrainConfig, model: nn.Module, B: int, T: int) -> dict[str, Tensor]:
    """{argument of the model's forward: tensor} with the shapes that the task gives for a full
    micro-batch with padding."""
    shapes = tasks.task(config.model).batch_shapes(config, model.config, B, T)
    return {name: torch.empty(shape, dtype=dtype_of(name)) for name, shape in shapes.items()}


def dtype_of(name: str) -> torch.dtype:
    """The dtype of an argument of forward, by its name."""
    if name.endswith("keep"):
        return torch.bool
    return torch.float32 if name.endswith("weights") else torch.int64


def plan_memory(
    config: TrainConfig, sizes: dict, device: str, dtype: torch.dtype, shard: str = ""
) -> Memory:
    """The memory of one of config.world processes, each on a device "cuda" or "cpu". shard: ""
    (each process has everything), "optimizer" (each parameter's state has one owner) or "model"
    (everything is divided; see below). Raises ValueError if so many processes cannot divide a step.

    With "model" the matrices of a block are gathered when they are needed, in bf16 if the products
    are, and freed afterwards, while those of the next block arrive. Their gradients exist once as
    they are computed, and once in fp32 as they are sent. The other parameters stay gathered from
    the beginning to the end of the step.
    """
    world, model = config.world, make_model(config, sizes)
    batch_size, accumulate = divide_step(config, sizes["block_size"], world)
    shape = full_batch_shape(config, sizes["block_size"], batch_size)
    shard = shard if world > 1 else ""
    share = 1 / world if shard == "model" else 1.0
    with FakeTensorMode(), kernels_of(device):
        to_fake(model)
        known = [*model.parameters(), *model.buffers()]
        learns = [p for p in model.parameters() if p.requires_grad]
        others = others_parameters(learns, world) if shard == "optimizer" else []
        blocks = [layers_of(m) for m in model.modules() if isinstance(m, Block)]
        ledger = Ledger(known, cast=chain(*blocks) if shard == "model" else [])
        for p in learns:
            p.register_post_accumulate_grad_hook(lambda p: ledger.divide(p.grad, share))
        optimizer = optim.make_optimizer(model, config.optimizer, lr=config.lr, dtype=dtype)

        def make_gradients() -> None:
            for p in learns:
                p.grad = torch.empty_like(p)
                ledger.divide(p.grad, share)

        def step() -> None:
            for p in others:
                p.grad = None
            ledger.share = share
            optimizer.step()
            ledger.share = 1.0
            optimizer.zero_grad()

        with ledger:
            make_gradients()
            step()  # makes the optimizer's state, which all later steps find there
            state = ledger.peak = ledger.live
            if accumulate > 1:
                make_gradients()  # those of the earlier micro-batches
            batch = make_batch(config, model, *shape)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                sums = model(**batch)
            counts = {loss_name(k): 1 for k in batch if k.endswith("targets")}
            sum(sums[name] for name in learnt(sums, counts)).backward()
            nn.utils.clip_grad_norm_(learns, config.clip or math.inf)
            step()
        weights, gradients = share * bytes_of(known), share * bytes_of(learns)
        rest = ledger.peak - state - gradients
        if shard == "model":
            block, item = max(map(bytes_of, blocks), default=0), dtype.itemsize / 4
            weights += bytes_of(known) - sum(map(bytes_of, blocks)) + 2 * item * block
            gradients += (item + 1) * block
        elif world > 1:
            gradients *= 2  # DDP copies them to its buckets
    return Memory(weights, gradients, state, rest)


def layers_of(block: Block) -> list[nn.Parameter]:
    """The parameters of a block's attentions and MLP, which are most of it."""
    layers = [m for m in block.children() if isinstance(m, Attention | MLP)]
    return [p for layer in layers for p in layer.parameters()]


def others_parameters(parameters: list[nn.Parameter], world: int) -> list[nn.Parameter]:
    """The parameters without state in process 0, which owns the largest. They are dealt out from
    the largest to the smallest, each to the process that has the least so far."""
    sizes, others = [0] * world, []
    for p in sorted(parameters, key=torch.numel, reverse=True):
        owner = sizes.index(min(sizes))
        sizes[owner] += p.numel()
        others += [p] * (owner > 0)
    return others


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
