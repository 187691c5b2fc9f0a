"""What torch leaves undone on a processor, and what it gains; `python -m lab.bench` shows both.

A GPT of 6 layers, width 384, takes 1.5 seconds for a training step of 2,048 tokens on two cores of
an AMD processor as torch comes, 1.3 when freed memory is kept, and 0.7 when oneDNN multiplies.
"""

import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": 0.2 s of processor time in each 0.1 s
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as in malloc.h


def prepare() -> None:
    """Settings of this process, made once, before it computes."""
    limit_threads()
    keep_memory()
    use_onednn()


def limit_threads() -> None:
    """Not more than a container may use. torch counts the cores of the machine, and threads that
    have no core wait for each other at each of a hundred thousand barriers."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    try:
        quota, period = QUOTA.read_text(encoding="utf-8").split()
        allowed = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no such system; or "max", no limit
        return
    if allowed < torch.get_num_threads():
        torch.set_num_threads(max(1, allowed))


def keep_memory() -> None:
    """Freed memory stays with the process. The C library gives it back to the system, and a step,
    which frees and asks for 300 MB, then waits for 85,000 pages to be handed out and zeroed."""
    if library := glibc():
        for threshold in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            library.mallopt(threshold, 2**31 - 1)  # bytes, as many as can be said


def glibc() -> ctypes.CDLL | None:
    """The C library, if it is the one that has these settings."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") else None


def use_onednn() -> None:
    """fp32 products by oneDNN instead of MKL, which on AMD's processors does half as much.

    torch has this as "medium" precision, because a processor with matrix units (AMX) would then
    multiply in bf16. That is not wanted: where the digits beyond bf16 get lost, all stays as it is.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    x = torch.full((128, 128), 1 + 2**-20)
    if not torch.equal(x @ torch.eye(128), x):
        torch.set_float32_matmul_precision(before)


@contextmanager
def multiply_by_mkl() -> Iterator[None]:
    """While torch computes what it cuts into products of small matrices."""
    if torch.compiler.is_compiling():  # into a graph, where a switch has no place
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def lay_out_for_decoding(model: nn.Module) -> None:
    """Stores every matrix as decoding reads it fastest: one row times each, at memory's speed.

    In fp32 column by column; shape and values stay. GPT-2 124M needs 16 ms for a token's products
    on two cores instead of 23. In bf16 in oneDNN's own order, 9 instead of 13 ms: the products are
    the same, but the linear layers have no `weight` then, for the model is there to write with.
    """
    pack = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")  # not where torch lacks oneDNN
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        if module.weight.dtype == torch.float32:
            module.weight.data = module.weight.data.t().contiguous().t()
        elif module.weight.dtype == torch.bfloat16 and pack and isinstance(module, nn.Linear):
            module.forward = packed(module.weight, module.bias)
            module.weight = None
    if pack and hasattr(model, "head") and model.token_embedding.weight.dtype == torch.bfloat16:
        # The embedding is looked up row by row, too, and stays.
        bias = getattr(model, "output_bias", None)
        model.head = packed(model.token_embedding.weight, bias)


def packed(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """F.linear with these, by the operators with which torch's compiler does it."""
    operators = torch.ops.mkldnn
    matrix = operators._reorder_linear_weight(weight.detach(), 1)
    return lambda x: operators._linear_pointwise(x, matrix, bias, "none", [], "")
