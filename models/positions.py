"""How a Transformer knows where a token stands: eight ways.

Attention alone sees a set. What tells the order is either added to the embeddings, at the bottom,

    learned              a vector for each place (GPT)
    sinusoidal           sines and cosines of the place, with frequencies that fall geometrically
    learned_sinusoidal   the same, but the frequencies are learned

or enters each attention, by how far the key stands from the query,

    t5                   a number for each head and each range of distances is added to the score
    shaw                 a vector for each distance is added to the key, and another to the value
    alibi                the score falls with the distance, in each head at a slope of its own
    rotary               queries and keys are turned by an angle that grows with their place (RoPE)

or, in a causal model, nothing tells it:

    none                 a token that sees n others may learn to count them

What enters attention makes no difference between the same words here and further to the right. All
but learned can be computed for any place; that does not mean that they were learnt for it.

A model calls forward(x, positions) on its embeddings, and gives attending(mask) as the mask to
every self-attention: `model.Attention` stays as it is, and caches hold keys as they were projected.
The T queries are the last T of the S places of the keys, so decoding with a cache is exact. The
file needs torch, model.py and models/llama.py. `python -m models.positions` shows the scores.

Left out: the ways of Transformer-XL and DeBERTa, other forms of bias (KERPLE, FIRE), stretched RoPE
(models/llama.py has Llama's), positions in cross-attention.

Papers: learned: Radford et al. 2018; sinusoidal: Vaswani et al. 2017 (arXiv:1706.03762), section
3.5; learned_sinusoidal: Wang et al., On Position Embeddings in BERT, ICLR 2021; t5: Raffel et al.
2020 (arXiv:1910.10683), section 2.1; alibi: Press et al. 2021 (arXiv:2108.12409); shaw: Shaw et al.
2018 (arXiv:1803.02155); rotary: Su et al. 2021 (arXiv:2104.09864); none: Haviv et al. 2022
(arXiv:2203.16634).
"""

import math
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import model
from model import Mask, attend, causal_mask
from models.llama import LlamaConfig, rotate, rotation, rotation_rates


class Positions(nn.Module):
    """No positions at all: what the others change. `config` has n_embd, n_head and block_size."""

    def __init__(self, config):
        super().__init__()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, T, C), embeddings of tokens at positions (T,) -> (B, T, C)"""
        return x

    def attending(self, mask: Mask) -> Mask:
        """What an attention gets as its mask in place of this one."""
        return mask


# ---- added to embeddings -------------------------------------------------------------------------


class Learned(Positions):
    """A vector for each of block_size places; there are no more."""

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.block_size, config.n_embd)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.embedding(positions)


class Sinusoidal(Positions):
    """sin and cos of place · 10000^(-2i/C) in the channels 2i and 2i + 1, in fp32.

    They are added SIZE times as large. In 2017 the embeddings begin with a deviation of about 1,
    in GPT with 0.02, and sinusoids that are 35 times as large would hide the tokens. Raises
    ValueError where n_embd is odd.
    """

    SIZE = 0.02 * 2**0.5  # the deviation of a sine is 2^-0.5

    def __init__(self, config):
        super().__init__(config)
        if config.n_embd % 2:
            raise ValueError(
                f"n_embd={config.n_embd} is odd, but sinusoidal positions are pairs of a sine and "
                f"a cosine: choose n_embd={config.n_embd + 1}"
            )
        # RoPE turns its pairs by the same rates: with a single head they are those of 2017.
        self.sizes = LlamaConfig(n_head=1, n_embd=config.n_embd)

    def frequencies(self, device: torch.device) -> Tensor:
        """(C / 2,) fp32: radians from each place to the next"""
        return rotation_rates(self.sizes, device)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, None].float() * self.frequencies(x.device)  # (T, C / 2)
        return x + self.SIZE * torch.stack([angles.sin(), angles.cos()], -1).flatten(1).type_as(x)


class LearnedSinusoidal(Sinusoidal):
    """Sinusoids whose frequencies are learned, as multiples `scale` of those of 2017."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(config.n_embd // 2))

    def frequencies(self, device: torch.device) -> Tensor:
        return self.scale.float() * super().frequencies(device)


# ---- inside attention ----------------------------------------------------------------------------


class InAttention(Positions):
    """What enters every self-attention: a method `attend`, with the shapes of `model.attend`.

    All layers share its parameters. Of an encoder-decoder, each side has positions of its own.
    """

    def attending(self, mask: Mask) -> Mask:
        """A callable for `model.Attention`, which keeps to the mask: None, "causal" or a bool
        tensor. Raises ValueError for a callable, which would attend without these positions."""
        if callable(mask):
            raise ValueError(
                f"a mask that attends by itself knows nothing of {type(self).__name__} positions: "
                'give None, "causal" or a bool tensor'
            )
        return partial(self.attend, mask=mask)


def may_look(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """The mask as a bool tensor that broadcasts to (B, H, T, S), and the blind rows (..., T, 1).

    As in `model.attend`, a query that may look at nothing looks at everything, and what it finds is
    zeroed afterwards. Raises the same ValueErrors.
    """
    T, S = q.size(2), k.size(2)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device)
    elif isinstance(mask, str) and mask == "causal":
        mask = causal_mask(T, S, q.device)
    elif not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        attend(q, k, v, mask, 0.0)  # raises, and says what is wrong with it
    blind = ~mask.any(-1, keepdim=True)
    return mask | blind, blind


def attend_biased(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Mask, bias: Tensor
) -> Tensor:
    """`model.attend` with bias, which broadcasts to (B, H, T, S), added to the scores."""
    looks, blind = may_look(q, k, v, mask)
    # Where q is bf16, caches may be fp32 (engine/cpu.py). A bias in bf16 is off by up to 1 / 256
    # of itself: where that is much, ALiBi leaves next to no weight.
    bias = bias.type_as(k).masked_fill(~looks, -torch.inf)
    # Not model.attention_kernel, which may know bool masks only.
    y = F.scaled_dot_product_attention(q.type_as(k), k, v, bias, dropout)
    return y.masked_fill(blind, 0.0).type_as(q)


def offsets(q: Tensor, k: Tensor) -> Tensor:
    """(S + T - 1,): how far right of a query a key may stand, from 1 - S to T - 1."""
    return torch.arange(1 - k.size(2), q.size(2), device=q.device)


def spread(values: Tensor, S: int) -> Tensor:
    """(..., S + T - 1), a value for each of the `offsets` -> (..., T, S), for each query and key.

    The offsets themselves, of 2 queries and 4 keys, become

        -2 -1  0  1
        -3 -2 -1  0

    So a table is looked up S + T - 1 times instead of S · T.
    """
    return values.unfold(-1, S, 1).flip(-2)


class T5(InAttention):
    """A learned number for each head and each of 32 buckets of offsets, added to the score.

    Half the buckets hold one distance each; those of the rest grow geometrically up to 128, and the
    last has all beyond. With causal=False half of all buckets are for keys on the right; else these
    count as distance 0. T5 itself does not divide scores by sqrt(D): here they are divided.
    """

    BUCKETS, FARTHEST = 32, 128

    def __init__(self, config, *, causal: bool = True):
        super().__init__(config)
        self.embedding = nn.Embedding(self.BUCKETS, config.n_head)
        self.sides = 1 if causal else 2
        half = self.BUCKETS // self.sides // 2
        growing = [half * (self.FARTHEST / half) ** (i / half) for i in range(half)]
        begins = [*range(1, half), *map(math.ceil, growing)]  # the least distance of each but 0
        self.register_buffer("begins", torch.tensor(begins), persistent=False)

    def buckets(self, offsets: Tensor) -> Tensor:
        """The bucket, 0 to 31, of each offset: place of the key minus place of the query."""
        distances = offsets.abs() if self.sides == 2 else (-offsets).clamp(min=0)
        bucket = torch.bucketize(distances, self.begins, right=True)
        return bucket + (offsets > 0) * (self.BUCKETS // 2) if self.sides == 2 else bucket

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Mask) -> Tensor:
        bias = self.embedding(self.buckets(offsets(q, k))).t()  # (H, S + T - 1)
        return attend_biased(q, k, v, dropout, mask, spread(bias, k.size(2)))


def alibi_slopes(H: int, device: torch.device | str | None = None) -> Tensor:
    """(H,) fp32: 2^(-8 i / H) for i = 1 to H. Where H is no power of 2, those of the power n below
    it, and then such as lie between them: of i = 0.5, 1.5, …"""
    n = 2 ** (H.bit_length() - 1)
    between = torch.arange(H - n, device=device) + 0.5
    return torch.exp2(torch.cat([torch.arange(1, n + 1, device=device), between]) * (-8 / n))


class ALiBi(InAttention):
    """A score falls by slope · distance; nothing is learned. A key on the right counts as one on
    the left; the paper has none there."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Mask) -> Tensor:
        bias = -alibi_slopes(q.size(1), q.device)[:, None] * offsets(q, k).abs()
        return attend_biased(q, k, v, dropout, mask, spread(bias, k.size(2)))


class Shaw(InAttention):
    """Vectors of relative positions: a score is q · (k + a) / sqrt(D), and what is found is the
    mean of v + b, where a and b belong to the offset, which is clipped to 16 either way.

    All heads share them, and all layers; in the paper each layer has its own. A query meets only 33
    different a, and its weights fall on 33 different b: hence no tensor (T, S, D) is needed.
    """

    CLIP = 16

    def __init__(self, config):
        super().__init__(config)
        self.keys = nn.Embedding(2 * self.CLIP + 1, config.n_embd // config.n_head)
        self.values = nn.Embedding(2 * self.CLIP + 1, config.n_embd // config.n_head)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Mask) -> Tensor:
        looks, blind = may_look(q, k, v, mask)
        (B, H, T, D), S = q.shape, k.size(2)
        row = offsets(q, k).clamp(-self.CLIP, self.CLIP) + self.CLIP  # rows of the two tables
        index = spread(row, S).expand(B, H, T, S)
        scaled = q.type_as(k) * D**-0.5
        by_vector = scaled @ self.keys.weight.type_as(k).t()  # (B, H, T, 33)
        scores = scaled @ k.transpose(-1, -2) + by_vector.gather(-1, index)
        weights = scores.masked_fill(~looks, -torch.inf).softmax(-1)
        weights = model.dropout_kernel(weights, dropout)
        shares = torch.zeros_like(by_vector, dtype=weights.dtype).scatter_add(-1, index, weights)
        y = weights @ v + shares @ self.values.weight.type_as(k)
        return y.masked_fill(blind, 0.0).type_as(q)


class Rotary(InAttention):
    """RoPE, in the layout of models/llama.py. Llama's caches hold keys as they were turned; here
    every call turns all S of them, which is little work beside attending to them.

    Raises ValueError where the width of a head is odd.
    """

    def __init__(self, config):
        super().__init__(config)
        C, H = config.n_embd, config.n_head
        if C % (2 * H):
            raise ValueError(
                f"n_embd={C} is no multiple of {2 * H}, twice n_head={H}, but rotary positions "
                f"turn pairs of a head's channels: choose n_embd={-(-C // (2 * H)) * 2 * H}"
            )
        self.sizes = LlamaConfig(n_head=H, n_embd=C)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Mask) -> Tensor:
        cos, sin = rotation(torch.arange(k.size(2), device=k.device), self.sizes)  # (S, D)
        T = q.size(2)
        return attend(rotate(q, cos[-T:], sin[-T:]), rotate(k, cos, sin), v, mask, dropout)


POSITIONS: dict[str, type[Positions]] = {
    "none": Positions,
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "learned_sinusoidal": LearnedSinusoidal,
    "t5": T5,
    "shaw": Shaw,
    "alibi": ALiBi,
    "rotary": Rotary,
}


if __name__ == "__main__":  # the score of a key, as it falls and rises with the distance
    distances = (0, 1, 2, 5, 10, 20)
    sizes = SimpleNamespace(n_embd=64, n_head=4, block_size=64)
    print("The same token at every place. How much more a query scores a key so many places behind")
    print("than itself, in the head on the left:\n")
    print(f"{'':20}query at{''.join(f'{d:8}' for d in distances)}")
    for name, kind in POSITIONS.items():
        torch.manual_seed(1)
        positions, token = kind(sizes), 0.02 * torch.randn(64)
        if name == "learned":
            nn.init.normal_(positions.embedding.weight, std=0.02)  # GPT's law
        x = positions(token.expand(1, 64, 64), torch.arange(64)).detach()
        x = F.layer_norm(x, (64,))  # as GPT's blocks do
        x = x.unflatten(-1, (4, 16)).transpose(1, 2)  # queries, keys and values: (1, 4, 64, 16)
        for query in (30, 60):
            v = x.clone().requires_grad_()
            y = model.attend(x, x, v, positions.attending("causal"), 0.0)
            # A weight is the derivative of what is found with respect to the value.
            weights = torch.autograd.grad(y[0, 0, query, 0], v)[0][0, 0, :, 0]
            scores = [(weights[query - d] / weights[query]).log().item() for d in distances]
            print(f"{name:20}{query:8}{''.join(f'{score + 0.0:8.3f}' for score in scores)}")
