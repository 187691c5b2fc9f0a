"""What a training step needs of each process's memory, found out without having it.

Weights, gradients and optimizer state can be counted. What lies between forward and backward could
not without writing down every layer a second time. So a step is made, with the model, losses,
optimizer and recomputation of a real run, but on fake tensors, which have a shape and a type and
take no memory; a ledger follows when the storage of each would be taken and given back. For GPT-3
that takes some seconds.

The fake tensors lie on the CPU, where autocast casts them as it does real ones. A plan for GPUs
puts what a GPU does otherwise in the named places of `model.py`: attention without a matrix of
scores, and so on.

Left out: what CUDA and NCCL keep for themselves and the allocator loses in gaps; what a kernel
takes and gives back before it returns; torch.compile, which needs less; evaluation, which does too.

Papers: flash attention keeps its output and one number for each query (Dao et al. 2022,
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
from engine.evaluation import loss_name
from engine.setup import recompute_blocks
from finetune import add_adapters, freeze
from model import MLP, Attention, Block
from tasks.flags import FinetuneConfig, TrainConfig


@dataclass
class Memory:
    """Bytes of one process when it needs the most, over a whole step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # and all else: a batch, bf16 copies of weights, what an operation returns

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


# ---- the ledger ----------------------------------------------------------------------------------


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that operations return, from then until they are freed.

    Those of `known` tensors are not among them, nor copies of `cast` tensors in another type.
    `share` is the part of what is taken from now on that this process has to hold.
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
        """From now on, this process holds that share of it."""
        key, held = key_of(tensor), tensor.untyped_storage().nbytes() * share
        self.live += held - self.sizes[key]
        self.sizes[key] = held


def key_of(tensor: Tensor) -> int:
    """The same for all views of a storage, and its own as long as it lives."""
    return id(tensor.untyped_storage())


class FlashAttention(torch.autograd.Function):
    """What attention takes and keeps on a GPU. It computes nothing."""

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
        # The gradient of the queries is summed up over blocks of keys, in fp32.
        sums = [torch.empty_like(q, dtype=torch.float32), torch.empty_like(normalizer)]
        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        del sums
        return gradients


def attention_on_gpu(q, k, v, mask=None, dropout_p: float = 0.0, is_causal=False) -> Tensor:
    return FlashAttention.apply(q, k, v)


def dropout_on_gpu(x: Tensor, p: float) -> Tensor:
    """Its mask has a byte for each element."""
    return torch.native_dropout(x, p, True)[0]


def layer_norm_on_gpu(x: Tensor, *args) -> Tensor:
    """CUDA's autocast gives it fp32, that of CPUs does not."""
    return layer_norm(x.float() if x.dtype == torch.bfloat16 else x, *args)


layer_norm = F.layer_norm


@contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """Meanwhile, `model.py` computes as on that device, "cuda" or "cpu", with fake tensors."""
    on_gpu = device == "cuda"
    attention, dropout = cpu.attention, cpu.dropout
    if on_gpu:
        attention, dropout = attention_on_gpu, dropout_on_gpu
    names = {"attention_kernel": attention, "dropout_kernel": dropout}
    names["cross_entropy"] = losses.linear_cross_entropy
    with (
        patch.multiple(model_file, **names),
        patch.dict(losses.CHUNK, {"cpu": losses.CHUNK[device]}),
        patch.object(F, "layer_norm", layer_norm_on_gpu if on_gpu else layer_norm),
    ):
        yield


# ---- a run without a run -------------------------------------------------------------------------


def make_model(config: TrainConfig, sizes: dict) -> nn.Module:
    """On the meta device, with what `train.Run` does to the model before it trains."""
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
    """From the meta device into the FakeTensorMode that is on."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            fake = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
            module.register_parameter(name, fake)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))


def full_batch_shape(config: TrainConfig, block_size: int, batch_size: int) -> tuple[int, int]:
    """(sequences, their tokens) of a full micro-batch, all as long as they may be."""
    length = min(getattr(config, "row_length", 0) or block_size, block_size)
    return batch_size * block_size // length, length


def make_batch(config: TrainConfig, model: nn.Module, B: int, T: int) -> dict[str, Tensor]:
    """{argument of the model's forward: tensor} in the shapes of a full micro-batch with padding,
    as the task names them."""
    shapes = tasks.task(config.model).batch_shapes(config, model.config, B, T)
    return {name: torch.empty(shape, dtype=kind_of(name)) for name, shape in shapes.items()}


def kind_of(name: str) -> torch.dtype:
    """By the name of an argument of forward."""
    if name.endswith("keep"):
        return torch.bool
    return torch.float32 if name.endswith("weights") else torch.int64


def plan_memory(
    config: TrainConfig, sizes: dict, device: str, dtype: torch.dtype, shard: str = ""
) -> Memory:
    """Of one of config.world processes, each with a "cuda" or a "cpu". shard: "" (each has all),
    "optimizer" (each parameter's state has one owner) or "model" (all is divided; see below).
    Raises ValueError where so many processes cannot divide a step.

    "model": the matrices of a block are gathered, in bf16 where that is computed in, when they are
    needed and then forgotten, while those of the next block arrive; their gradients exist once as
    they arise and once in fp32 as they are sent. All else is gathered from begin to end.
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
            step()  # makes the state that all later steps find there
            state = ledger.peak = ledger.live
            if accumulate > 1:
                make_gradients()  # those of the micro-batches before
            batch = make_batch(config, model, *shape)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                sums = model(**batch)
            sum(sums[loss_name(k)] for k in batch if k.endswith("targets")).backward()
            nn.utils.clip_grad_norm_(learns, config.clip or math.inf)
            step()
        weights, gradients = share * bytes_of(known), share * bytes_of(learns)
        rest = ledger.peak - state - gradients
        if shard == "model":
            block, item = max(map(bytes_of, blocks)), dtype.itemsize / 4
            weights += bytes_of(known) - sum(map(bytes_of, blocks)) + 2 * item * block
            gradients += (item + 1) * block
        elif world > 1:
            gradients *= 2  # DDP has buckets of its own, to which it copies them
    return Memory(weights, gradients, state, rest)


def layers_of(block: Block) -> list[nn.Parameter]:
    """Of its attentions and MLP, which are most of it."""
    layers = [m for m in block.children() if isinstance(m, Attention | MLP)]
    return [p for layer in layers for p in layer.parameters()]


def others_parameters(parameters: list[nn.Parameter], world: int) -> list[nn.Parameter]:
    """Those without state in the first process, which owns the largest: largest first, each goes
    to the process that has the least."""
    sizes, others = [0] * world, []
    for p in sorted(parameters, key=torch.numel, reverse=True):
        owner = sizes.index(min(sizes))
        sizes[owner] += p.numel()
        others += [p] * (owner > 0)
    return others


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
