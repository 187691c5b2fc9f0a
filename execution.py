"""How a model is run: in which precision, with what computed twice, compiled or not."""

from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from losses import leave_uncompiled
from model import Block
from processes import multiplies_bf16


def precision(dtype: str, device: torch.device) -> torch.dtype:
    """dtype: bf16, fp32, or auto, which is bf16 on GPUs that have it."""
    if dtype == "auto":
        bf16 = device.type == "cuda" and multiplies_bf16("cuda")
        return torch.bfloat16 if bf16 else torch.float32
    return torch.bfloat16 if dtype == "bf16" else torch.float32


def recompute_blocks(model: nn.Module) -> None:
    """Every Block forgets its activations and computes them again when the gradient needs them."""
    for block in model.modules():
        if isinstance(block, Block):
            block.forward = partial(recomputed, block.forward, use_reentrant=False)


def compiled(model: nn.Module, batches: list[dict[str, Tensor]], autocast) -> nn.Module:
    """The compiled model, tried on batches; the model as it is, and one line, where that fails."""
    leave_uncompiled()
    try:
        shapes = {tuple(tensor.shape for tensor in batch.values()) for batch in batches}
        # A graph for each length of a batch would be compiled, until torch gives up.
        fast = torch.compile(model, dynamic=True if len(shapes) > 1 else None)
        for batch in batches:
            with autocast():
                losses = fast(**batch)
            sum(losses.values()).backward()
        with torch.no_grad(), autocast():  # evaluation compiles a graph of its own
            fast.eval()(**batches[0])
    except Exception as error:  # compilers fail in ways that cannot be listed
        reason = str(error).strip().partition("\n")[0][:120]
        print(f"torch.compile failed ({type(error).__name__}: {reason}): going on without it")
        fast = model
    fast.train()
    model.zero_grad(set_to_none=True)
    return fast
