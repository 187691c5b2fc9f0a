"""What makes torch faster on a CPU; `python -m lab.bench` shows the difference.

Settings of the process, faster forms of two functions of `model.py` (`kernels.py` assigns them),
and matrices laid out for decoding. A training step of 2,048 tokens of a GPT with 6 layers of width
384 takes 1.5 seconds on two cores of an AMD processor with torch as it comes, 1.3 when freed memory
is kept, and 0.7 when oneDNN multiplies too.
"""

import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import Attention, causal_mask
from models.llama import GatedMLP, GroupedAttention
from models.recurrent import Layer

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": 0.2 s of processor time in each 0.1 s
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as in malloc.h


def prepare() -> None:
    """Makes all settings of this process; to be called before it computes."""
    limit_threads()
    keep_memory()
    use_onednn()


def limit_threads() -> None:
    """Limits torch's threads to the cores that a container may use. torch counts those of the
    machine, and threads without a core of their own wait for each other at each of a hundred
    thousand barriers."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    try:
        quota, period = QUOTA.read_text(encoding="utf-8").split()
        allowed = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # another system; or "max", which is no limit
        return
    if allowed < torch.get_num_threads():
        torch.set_num_threads(max(1, allowed))


def keep_memory() -> None:
    """Keeps freed memory in the process. By default the C library gives it back to the system; a
    step, which frees and allocates 300 MB, then waits until 85,000 pages are mapped and zeroed."""
    if library := glibc():
        for threshold in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            library.mallopt(threshold, 2**31 - 1)  # bytes: the largest value that it takes


def glibc() -> ctypes.CDLL | None:
    """The C library, if it is the one that has these settings."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") else None


def use_onednn() -> None:
    """Lets oneDNN multiply in fp32 instead of MKL, which has half its speed on AMD's processors.

    torch calls this "medium" precision, because a processor with matrix units (AMX) would then
    multiply in bf16. That is not wanted: where the digits beyond bf16 get lost, MKL stays.
    """
    global by_onednn
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    x = torch.full((128, 128), 1 + 2**-20)
    by_onednn = torch.equal(x @ torch.eye(128), x)
    if not by_onednn:
        torch.set_float32_matmul_precision(before)


by_onednn = False  # whether oneDNN multiplies in fp32


# ---- the kernels of model.py ---------------------------------------------------------------------


@contextmanager
def multiply_by_mkl() -> Iterator[None]:
    """A context for operations that torch splits into products of small matrices."""
    if torch.compiler.is_compiling():  # a compiled graph cannot hold this switch
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


LONG = 2**20  # from this many scores of a head on they are not kept, but computed twice
LONG_IN_BF16 = 2**16  # from so many on torch's kernel is good at bf16, where there is AMX


def writes_out(scores: int, dropout_p: float) -> bool:
    """Whether `attention` writes the formula out where there is a gradient, for so many scores of a
    head. torch's kernel has no dropout, and its tiles are too small for oneDNN; but not for MKL,
    which multiplies where there are matrix units (AMX). docs/speed.md has the figures."""
    return bool(dropout_p) or (by_onednn and scores < LONG)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """The same as torch's scaled_dot_product_attention, with the same shapes (B, H, T, D).

    torch's kernel for CPUs multiplies tiles that are too small for oneDNN: 16 sequences of 128
    tokens take 24 ms, forward and backward; the formula written out takes 5. Without a gradient
    torch's kernel is faster, provided that MKL multiplies; on some processors also with a gradient.

    q may be bf16 while k and v are fp32, see `lay_out_for_decoding`.
    """
    dtype, learns = q.dtype, torch.is_grad_enabled() and q.requires_grad
    count = q.size(2) * k.size(2)  # of scores of a head
    short = by_onednn or dropout_p or count < LONG_IN_BF16
    if dtype == torch.bfloat16 and ((learns and short) or k.dtype != dtype):
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), mask, dropout_p, is_causal).to(dtype)
    if learns and writes_out(count, dropout_p):
        scores = (q * q.size(-1) ** -0.5) @ k.transpose(-1, -2)
        if is_causal:
            mask = causal_mask(q.size(2), k.size(2))
        if mask is not None:
            scores = scores.masked_fill_(~mask, -torch.inf)
        return dropout(scores.softmax(-1), dropout_p) @ v
    with multiply_by_mkl():
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)


def dropout(x: Tensor, p: float) -> Tensor:
    """Zeroes each element with probability p, and scales up the others.

    torch's kernel for CPUs draws a random float for each element. 16 random bits are enough: a
    layer of 0.5M elements takes 1.0 ms instead of 5.7. They round p to a multiple of 1 / 65,536.
    """
    if p == 0:
        return x
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    uniform = words.view(torch.int16)[: x.numel()].view(x.shape)  # -32,768 to 32,767
    dropped = min(round(p * 65536), 65535)
    keep = uniform >= dropped - 32768
    return (x * keep.to(x.dtype)).mul_(65536 / (65536 - dropped))


# ---- decoding ------------------------------------------------------------------------------------


def lay_out_for_decoding(model: nn.Module) -> None:
    """Stores every matrix in the order in which decoding reads it fastest. Decoding multiplies one
    row with each matrix, at the speed of memory.

    In fp32 a matrix is stored column by column; its shape and values stay. GPT-2 124M then needs 16
    ms for a token's products on two cores instead of 23. In bf16 it is stored in oneDNN's own
    order, which takes 9 ms instead of 13. The products are the same, but the linear layers have no
    `weight` any more, so the model can only be used for sampling. With matrix units (AMX) oneDNN is
    slow at one row, and torch's product with a vector takes two thirds of its time; but for the
    output matrix, the largest.

    The products that begin an attention or a gated MLP read the same input: their matrices become
    one, since each product costs some ten microseconds beside what it reads.

    A model in bf16 gets keys and values in fp32, hence also caches in fp32: the one query of a
    decoding step takes 105 us at 1,000 cached positions instead of 616. `attention` above accepts
    that mixture, torch's own does not.
    """
    pack = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")  # whether torch has oneDNN
    half = any(p.dtype == torch.bfloat16 for p in model.parameters())
    # Their matrices are read, and not called.
    recurrent = {
        m for layer in model.modules() if isinstance(layer, Layer) for m in layer.modules()
    }
    done = set(recurrent)
    for name, module in model.named_modules():
        names = JOINED.get(type(module).forward, ()) if not name.endswith("cross") else ()
        linears = [getattr(module, part) for part in names]
        if linears and all(type(linear) is nn.Linear for linear in linears):
            module.project = joined(linears, pack, names == "qkv" and half)
            done.update(linears)
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)) or module in done:
            continue
        if module.weight.dtype == torch.float32:
            module.weight.data = module.weight.data.t().contiguous().t()
        elif module.weight.dtype == torch.bfloat16 and pack and isinstance(module, nn.Linear):
            packs = by_onednn or module.out_features >= LARGE
            module.forward = (packed if packs else by_vector)(module.weight, module.bias)
            module.weight = None if packs else module.weight
    for attention in (m for m in model.modules() if half and isinstance(m, Attention)):
        layers = {getattr(attention, name, None) for name in "kv"}  # some have no keys
        for layer in layers - done - {None}:
            layer.forward = in_fp32(layer.forward)
    tied = hasattr(model, "token_embedding") and hasattr(model, "head")
    tied &= getattr(model.config, "tied", True) and getattr(model, "head_is_product", True)
    if half and pack and tied and not isinstance(model.head, nn.Module):
        # The embedding stays as it is, because its rows are looked up too.
        bias = getattr(model, "output_bias", None)
        model.head = packed(model.token_embedding.weight, bias)


# What `project` of such a module multiplies with.
JOINED = {
    Attention.forward: "qkv",
    GroupedAttention.forward: "qkv",
    GatedMLP.forward: ("gate", "fc"),
}


def joined(linears: list[nn.Linear], pack: bool, fp32: bool) -> Callable[[Tensor], tuple]:
    """A function that gives what the linear layers give, by one product. fp32: the first result
    keeps its dtype, and the others, which are keys and values, become fp32."""
    sizes = [linear.out_features for linear in linears]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    if weight.dtype == torch.bfloat16 and pack and by_onednn:
        multiply = packed(weight, bias)
        for linear in linears:
            linear.weight = None
    else:
        weight = weight.t().contiguous().t() if weight.dtype == torch.float32 else weight
        multiply = partial(F.linear, weight=weight, bias=bias)
        if weight.dtype == torch.bfloat16:
            multiply = by_vector(weight, bias)
        for linear, part in zip(linears, weight.split(sizes), strict=True):
            linear.weight.data = part  # the same memory

    def project(x: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and linears[0].weight is not None:  # somebody wants gradients
            first, *rest = (linear(x) for linear in linears)
        else:
            first, *rest = multiply(x).split(sizes, -1)
        return first, *(part.float() if fp32 else part for part in rest)

    return project


LARGE = 2**14  # rows of a matrix that oneDNN multiplies faster in any case


def by_vector(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """F.linear with this weight and bias; a single row is multiplied as a vector."""

    def multiply(x: Tensor) -> Tensor:
        if x.numel() != weight.size(1):  # an expert may have no row
            return F.linear(x, weight, bias)
        row = x.reshape(-1)
        y = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
        return y.view(*x.shape[:-1], -1)

    return multiply


def packed(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """F.linear with this weight and bias, by the operators that torch's compiler uses for it."""
    operators = torch.ops.mkldnn
    matrix = operators._reorder_linear_weight(weight.detach(), 1)
    return lambda x: operators._linear_pointwise(x, matrix, bias, "none", [], "")


def in_fp32(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: forward(x).float()
