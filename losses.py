"""Cross-entropy over a vocabulary: what is left of the logits is a number and a gradient.

`plain_cross_entropy` says what is meant; `linear_cross_entropy` gives the same without ever
holding all the logits. At 16,384 tokens and 50,257 words those alone would fill 3.3 GB, and as much
again for their gradient.

Label smoothing: Szegedy et al. 2016 (arXiv:1512.00567), section 7. The target distribution is
(1 - ε) · one-hot + ε / V, as in torch's `label_smoothing`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = {"cpu": 2**20, "cuda": 2**28}  # logits held at a time: on a CPU, what its cache can keep


def plain_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    smoothing: float = 0.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """features (..., C), weight (V, C), targets (...), bias (V,) -> (summed smoothed loss, summed
    negative log-likelihood, number of targets that are the likeliest word, of equal ones the
    first); targets of -100 do not count, and only the first has a gradient."""
    logits, targets = F.linear(features, weight, bias).flatten(0, -2).float(), targets.flatten()
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    logits = logits.detach()
    nll = F.cross_entropy(logits, targets, reduction="sum")
    return loss, nll, (logits.argmax(-1) == targets).sum()


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    smoothing: float = 0.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as plain_cross_entropy, a chunk of logits at a time."""
    rows = max(1, CHUNK.get(features.device.type, 2**24) // weight.size(0))
    features, targets = features.flatten(0, -2), targets.flatten()
    return in_chunks(features, weight, bias, targets, smoothing, rows, torch.is_grad_enabled())


def eager(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return LinearCrossEntropy.apply(*arguments)


in_chunks = eager


def leave_uncompiled() -> None:
    """Before torch.compile: batches of many lengths would compile the loop below again and again.
    As a decorator, `disable` would cost every script the two seconds of the compiler's import."""
    global in_chunks
    in_chunks = torch.compiler.disable(eager)


class LinearCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk's logits is known as soon as they are (softmax minus target), so
    forward turns it at once into the gradients of features, weight and bias, and the chunk is
    forgotten.
    """

    @staticmethod
    def forward(ctx, features, weight, bias, targets, smoothing, rows, wants_gradient):
        device, V, dtype = features.device.type, len(weight), features.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        w, keep = weight.to(dtype), targets != -100
        loss = features.new_zeros((), dtype=torch.float32)
        nll, right = torch.zeros_like(loss), torch.zeros_like(loss, dtype=torch.long)
        if wants_gradient:
            d_features = torch.empty_like(features)
            d_weight = torch.zeros_like(weight) if weight.requires_grad else None
            learns_bias = bias is not None and bias.requires_grad  # a buffer does not
            d_bias = torch.zeros_like(bias) if learns_bias else None
        for start in range(0, len(features), rows):
            part = slice(start, start + rows)
            x, kept = features[part].to(dtype), keep[part]
            target = targets[part].clamp(min=0)[:, None]
            logits = (x @ w.t()).float()
            if bias is not None:
                logits += bias
            right += (logits.argmax(-1) == targets[part]).sum()
            log_p = logits.log_softmax(-1)
            chunk_nll = -(log_p.gather(1, target)[:, 0] * kept).sum()
            nll += chunk_nll
            loss += (1 - smoothing) * chunk_nll
            if smoothing:
                loss -= smoothing * (log_p.mean(-1) * kept).sum()
            if wants_gradient:
                d_logits = log_p.exp_()
                d_logits.scatter_add_(1, target, d_logits.new_full(target.shape, smoothing - 1))
                if smoothing:
                    d_logits -= smoothing / V
                d_logits = d_logits.mul_(kept[:, None])
                if learns_bias:
                    d_bias += d_logits.sum(0)
                d_logits = d_logits.to(dtype)
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
        return *known, None, None, None, None
