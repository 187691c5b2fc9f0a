"""Cross-entropy over a vocabulary, without ever holding all the logits.

`plain_cross_entropy` in `model.py` is the definition, and `linear_cross_entropy` gives the same. At
16,384 tokens and a vocabulary of 50,257 the logits alone would take 3.3 GB, and their gradient as
much.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = {"cpu": 2**22, "cuda": 2**28}  # logits held at one time: 16 MB and 1 GB in fp32


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    smoothing: float = 0.0,
    bias: Tensor | None = None,
    accuracy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as model.plain_cross_entropy, a chunk of logits at a time."""
    rows = max(1, CHUNK.get(features.device.type, 2**24) // weight.size(0))
    rows = 1 << rows.bit_length() - 1  # so that the chunks of most batches are of equal size
    features, targets = features.flatten(0, -2), targets.flatten()
    how = smoothing, accuracy, rows, torch.is_grad_enabled()
    return in_chunks(features, weight, bias, targets, *how)


def of_chunk(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    smoothing: float,
    accuracy: bool,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """logits (N, V), targets (N,) -> (loss, nll, number right, gradient of the logits).

    The gradient is the softmax minus the target distribution, in the dtype of the logits and, where
    possible, in their memory; None if it is not wanted.
    """
    dtype, V = logits.dtype, logits.size(-1)
    kept, target = targets != -100, targets.clamp(min=0)[:, None]
    logits = logits.float()
    if bias is not None:
        logits += bias
    right = ((logits.argmax(-1) == targets) if accuracy else torch.zeros_like(kept)).sum()
    log_p = logits.log_softmax(-1)
    target_log_p = log_p.gather(1, target)[:, 0]
    nll = -(target_log_p * kept).sum()
    loss = (1 - smoothing) * nll
    if smoothing:
        loss = loss - smoothing * (log_p.mean(-1) * kept).sum()
    if not wants_gradient:
        return loss, nll, right, None
    d_target = (target_log_p.exp() - smoothing / V + smoothing - 1) * kept
    d_logits = log_p.exp_()
    if smoothing:
        d_logits -= smoothing / V
    d_logits = d_logits.mul_(kept[:, None]).to(dtype)
    # Computed in fp32 and put there: in bf16 a probability near 1, minus 1, would be just 0.
    return loss, nll, right, d_logits.scatter_(1, target, d_target.to(dtype)[:, None])


def eager(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return LinearCrossEntropy.apply(*arguments)


in_chunks, chunk_function = eager, of_chunk


def use_compiler(device: torch.device | None) -> None:
    """To be called before torch.compile of a model. The loop over the chunks is not compiled, since
    batches of many lengths would compile it each time. On a GPU the work on a chunk is: it becomes
    a kernel or two instead of eight passes over memory. With None nothing is compiled. (Decorators
    would cost every script the seconds of the compiler's import.)"""
    global in_chunks, chunk_function
    in_chunks = torch.compiler.disable(eager) if device else eager
    fuse = device is not None and device.type == "cuda"
    chunk_function = torch.compile(of_chunk) if fuse else of_chunk


class LinearCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk's logits is known as soon as the logits are. So forward turns it into
    the gradients of features, weight and bias at once, and the chunk is freed."""

    @staticmethod
    def forward(ctx, features, weight, bias, targets, smoothing, accuracy, rows, wants_gradient):
        device, dtype = features.device.type, features.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        w = weight.to(dtype)
        loss = features.new_zeros((), dtype=torch.float32)
        nll, right = torch.zeros_like(loss), torch.zeros_like(loss, dtype=torch.long)
        if wants_gradient:
            d_features = torch.empty_like(features)
            d_weight = torch.zeros_like(weight) if weight.requires_grad else None
            learns_bias = bias is not None and bias.requires_grad  # it may be a buffer
            d_bias = torch.zeros_like(bias) if learns_bias else None
        for start in range(0, len(features), rows):
            part = slice(start, start + rows)
            x = features[part].to(dtype)
            *sums, d_logits = chunk_function(
                x @ w.t(), bias, targets[part], smoothing, accuracy, wants_gradient
            )
            loss, nll, right = (a + b for a, b in zip((loss, nll, right), sums, strict=True))
            if wants_gradient:
                if learns_bias:
                    d_bias += d_logits.sum(0, dtype=d_bias.dtype)
                d_features[part] = d_logits @ w
                if d_weight is not None:
                    d_weight += d_logits.t() @ x
        if wants_gradient:
            ctx.save_for_backward(d_features, d_weight, d_bias)
        ctx.mark_non_differentiable(nll, right)
        return loss, nll, right

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        known = (None if d is None else d * d_loss for d in ctx.saved_tensors)
        return *known, None, None, None, None, None
