"""What the three Transformer families share, and GPT.

From the bottom up: masks, scaled dot-product attention, the MLP, the residual block, then GPT, the
causal decoder that is built from them; the key-value cache is in `caches.py`. BERT and the
encoder-decoder import the first four and write only what is their own.

Left out on purpose: rotary positions, RMSNorm, gated MLPs, grouped heads. A variant that needs
them writes its own block, in its own file, from `Attention` and `MLP`.

Papers: Attention Is All You Need (Vaswani et al. 2017, arXiv:1706.03762); Improving Language
Understanding by Generative Pre-Training (Radford et al. 2018); Language Models are Unsupervised
Multitask Learners (Radford et al. 2019); Language Models are Few-Shot Learners (Brown et al. 2020,
arXiv:2005.14165); prefix language models: Raffel et al. 2020 (arXiv:1910.10683), section 3.2.

Axes, in all files: B batch, T query positions, S key positions, C width, H heads, D head width,
V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from caches import KVCache, StaticCache
from cpu import multiply_by_mkl
from losses import linear_cross_entropy

# ---- masks: bool tensors that broadcast to (B, H, T, S), True = may look -------------------------


def causal_mask(T: int, S: int, device: torch.device | str | None = None) -> Tensor:
    """(T, S) bool: query t is the t-th of the LAST T positions, and sees itself and all before it.

    causal_mask(3, 5), three new positions behind two cached ones (x = may look):

        x x x . .
        x x x x .
        x x x x x
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def padding_mask(keep: Tensor) -> Tensor:
    """(B, S), nonzero = a real token  ->  (B, 1, 1, S) bool, the same for all heads and queries.

    keep = [[1, 1, 1, 0, 0]] gives every query the row

        x x x . .
    """
    return keep.bool()[:, None, None, :]


def prefix_mask(prefix_len: Tensor, T: int) -> Tensor:
    """(B,) prefix lengths -> (B, 1, T, T) bool: causal, but all see the first prefix_len positions.

    prefix_mask(tensor([3]), 5):

        x x x . .
        x x x . .
        x x x . .
        x x x x .
        x x x x x

    Passed to GPT it makes the prefix language model; no other change is needed.
    """
    in_prefix = torch.arange(T, device=prefix_len.device) < prefix_len[:, None]  # (B, T)
    return causal_mask(T, T, prefix_len.device) | in_prefix[:, None, None, :]


class AdditiveMask(NamedTuple):
    """A mask as the numbers that are added to the scores: 0 = may look, -inf = may not.

    Torch makes it of a bool mask, in every layer anew; a captured step (`graphs.py`) makes it once.
    It has a type of its own because a 0/1 tensor must never be taken for one. Each query must see
    something, and the numbers have the type of the queries.
    """

    scores: Tensor


Mask = Tensor | str | AdditiveMask | None  # a str is "causal"; None: all may look at all

# ---- attention, MLP, block -----------------------------------------------------------------------


def drop(x: Tensor, p: float) -> Tensor:
    """Zeroes each element with probability p, and scales up the others.

    torch's kernel for CPUs draws a random float for each element; 16 random bits do, and a layer
    of 0.5M elements takes 1.0 ms instead of 5.7. p is thereby rounded to a multiple of 1 / 65,536.
    """
    if p == 0:
        return x
    if not x.is_cpu:
        return F.dropout(x, p)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    uniform = words.view(torch.int16)[: x.numel()].view(x.shape)  # -32,768 to 32,767
    dropped = min(round(p * 65536), 65535)
    keep = uniform >= dropped - 32768
    return (x * keep.to(x.dtype)).mul_(65536 / (65536 - dropped))


class Dropout(nn.Module):
    """`drop`, while training."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training else x


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v for q (B, H, T, D), k and v (B, H, S, D); section 3.2.1 of 2017.

    The one place where a mask becomes an argument of torch's attention, which has three traps: its
    `is_causal` aligns the mask to the upper left, so that a cache would be hidden; it takes
    `is_causal` beside a mask without a word; and it adds a 0/1 float mask to the scores. A query
    that may look at nothing yields zeros (softmax of an empty set would be NaN).
    """
    T, S = q.size(2), k.size(2)
    kernel = on_cpu if q.is_cpu else F.scaled_dot_product_attention
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f'mask={mask!r} is not known: pass None, "causal" or a bool tensor')
        if T == S:
            return kernel(q, k, v, is_causal=True, dropout_p=dropout)
        # A single new position sees all that is cached: no mask, and so the fast path.
        mask = None if T == 1 else causal_mask(T, S, q.device)
        return kernel(q, k, v, mask, dropout_p=dropout)
    if mask is None or isinstance(mask, AdditiveMask):
        return kernel(q, k, v, None if mask is None else mask.scores, dropout_p=dropout)
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask is {mask.dtype}, but must be torch.bool with True = may look")
    blind = ~mask.any(-1, keepdim=True)
    # Blind rows look at everything and are zeroed afterwards: their gradient stays finite too.
    return kernel(q, k, v, mask | blind, dropout_p=dropout).masked_fill(blind, 0.0)


LONG = 2**20  # scores of a head: from here on they are not held, but computed twice


def on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """As torch's scaled_dot_product_attention, whose kernel for CPUs multiplies tiles too small for
    oneDNN (see `cpu.py`): there, 16 sequences of 128 tokens take 24 ms, forward and backward, and
    the formula written out takes 5. Without a gradient it is the faster one if MKL multiplies.

    In bf16 it is slower than in fp32: the one query of a decoding step takes 616 us at 1,000 cached
    positions instead of 105, in which type a cache therefore holds them.
    """
    dtype, learns = q.dtype, torch.is_grad_enabled() and q.requires_grad
    if dtype == torch.bfloat16 and (learns or k.dtype != dtype):
        with torch.autocast("cpu", enabled=False):
            return on_cpu(q.float(), k.float(), v.float(), mask, dropout_p, is_causal).to(dtype)
    if learns and (q.size(2) * k.size(2) < LONG or dropout_p):
        scores = (q * q.size(-1) ** -0.5) @ k.transpose(-1, -2)
        if is_causal:
            mask = causal_mask(q.size(2), k.size(2))
        if mask is not None:
            scores = scores.masked_fill_(~mask, -torch.inf)
        return drop(scores.softmax(-1), dropout_p) @ v
    with multiply_by_mkl():
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)


class Attention(nn.Module):
    """Multi-head attention (section 3.2.2).

    `config` has n_embd, n_head, bias and attention_dropout, the probability with which a query
    misses a key.
    """

    def __init__(self, config):
        super().__init__()
        if config.n_head < 1 or config.n_embd % config.n_head:
            fits = [h for h in range(1, config.n_embd + 1) if config.n_embd % h == 0]
            near = [h for h in fits if h < config.n_head][-1:]
            near += [h for h in fits if h > config.n_head][:1]
            raise ValueError(
                f"n_head={config.n_head} does not divide n_embd={config.n_embd}: "
                f"choose {' or '.join(map(str, near))}"
            )
        self.n_head = config.n_head
        self.dropout = config.attention_dropout
        self.q = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.k = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.v = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def split(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, H, T, D)"""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask = None,
        cache: KVCache | StaticCache | None = None,
    ) -> Tensor:
        """x (B, T, C) attends to itself, or to memory (B, S, C) when that is given.

        A cache of self-attention grows with every call. A cache of cross-attention is filled by
        the first call and reused, because the memory does not change while one output is written.
        x may have K times as many rows as memory: K consecutive rows, the hypotheses of a beam
        search, then share one and are to it as K queries of one row, so nothing is copied K times.
        """
        shape = x.shape
        if memory is not None and len(x) != len(memory):
            x = x.reshape(len(memory), -1, x.size(-1))
        q = self.split(self.q(x))
        if memory is not None and cache is not None and cache.length:
            k, v = cache.filled()
        else:
            source = x if memory is None else memory
            k, v = self.split(self.k(source)), self.split(self.v(source))
            if cache is not None:
                k, v = cache.append(k, v)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).flatten(2)).view(shape)  # (B, H, T, D) -> (B, T, C)


class MLP(nn.Module):
    """The position-wise feed-forward layer (section 3.3). `config` has n_embd, n_ff and bias."""

    def __init__(self, config, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.n_ff, bias=config.bias)
        self.act = act
        self.proj = nn.Linear(config.n_ff, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.act(self.fc(x)))


class Block(nn.Module):
    """Self-attention, cross-attention if asked for, MLP; each inside a residual connection.

    pre_ln=True normalises what enters a sublayer, x + f(norm(x)), as GPT-2 does; False normalises
    what leaves it, norm(x + f(x)), as the 2017 model and BERT do. `config` has, beside what
    Attention and MLP need, ln_eps.
    """

    def __init__(self, config, *, pre_ln: bool, act: Callable[[Tensor], Tensor], cross=False):
        super().__init__()
        self.pre_ln = pre_ln
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.n_embd, config.ln_eps, bias=config.bias)
        if cross:
            self.cross = Attention(config)
            self.cross_norm = nn.LayerNorm(config.n_embd, config.ln_eps, bias=config.bias)
        self.mlp = MLP(config, act)
        self.mlp_norm = nn.LayerNorm(config.n_embd, config.ln_eps, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def residual(self, x: Tensor, norm: nn.LayerNorm, sublayer: Callable[..., Tensor], *args):
        if self.pre_ln:
            return x + self.dropout(sublayer(norm(x), *args))
        return norm(x + self.dropout(sublayer(x, *args)))

    def forward(
        self,
        x: Tensor,
        mask: Mask = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: KVCache | StaticCache | None = None,
        memory_cache: KVCache | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C); memory (B, S, C) is what cross-attention looks at."""
        x = self.residual(x, self.attention_norm, self.attention, None, mask, cache)
        if memory is not None:
            x = self.residual(x, self.cross_norm, self.cross, memory, memory_mask, memory_cache)
        return self.residual(x, self.mlp_norm, self.mlp)


# Some ten times what anybody has trained. Beyond, already the description of a model takes minutes.
LARGEST = {"vocab_size": 2**24, "block_size": 2**24, "n_layer": 1000}
LARGEST |= {"n_head": 2**16, "n_embd": 2**18, "n_ff": 2**20}


def check_sizes(config, *rates: str) -> None:
    """ValueError for a size that is not 1 to LARGEST, a rate that is none, or a wrong ln_eps."""
    for name, most in LARGEST.items():
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"{name}={value} is too small: it must be 1 or more")
        if value > most:
            raise ValueError(f"{name}={value} is too large: choose {most} or less")
    if not 0 < config.ln_eps <= 1:
        raise ValueError(f"ln_eps={config.ln_eps} is out of range: choose 0 < ln_eps <= 1")
    for name in rates:
        if not 0 <= (value := getattr(config, name)) < 1:
            raise ValueError(f"{name}={value} is out of range: choose 0 <= {name} < 1")


# ---- GPT -----------------------------------------------------------------------------------------

# GPT-2 was trained with the tanh approximation of GELU (Hendrycks and Gimpel, arXiv:1606.08415).
tanh_gelu = partial(F.gelu, approximate="tanh")


@dataclass
class GPTConfig:
    vocab_size: int = 50257  # tokens that the model can read and write
    block_size: int = 1024  # positions it can look back, itself included
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads; must divide n_embd
    n_embd: int = 768  # width of the residual stream
    n_ff: int = 0  # width inside the MLP; 0 means 4 x n_embd
    dropout: float = 0.0  # probability, in embeddings, attention and residual branches
    bias: bool = True  # biases in the linear layers and the LayerNorms
    ln_eps: float = 1e-5  # added to the variance in LayerNorm
    pre_ln: bool = True  # LayerNorm before each sublayer (GPT-2 and 3); false: after it (GPT-1)

    def __post_init__(self):
        self.n_ff = self.n_ff or 4 * self.n_embd
        check_sizes(self, "dropout")

    @property
    def attention_dropout(self) -> float:
        return self.dropout


class GPT(nn.Module):
    """The causal decoder of GPT-2 and GPT-3 (of GPT-1 with pre_ln=False): learned positions, tied
    input and output embeddings."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config, pre_ln=config.pre_ln, act=tanh_gelu) for _ in range(config.n_layer)
        )
        # A pre-LN stack ends without a norm of its own; post-LN blocks have already normalised.
        self.norm = (
            nn.LayerNorm(config.n_embd, config.ln_eps, bias=config.bias)
            if config.pre_ln
            else nn.Identity()
        )
        init_gpt(self)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | str | None = "causal",
        caches: list[KVCache] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """tokens (B, T) -> logits (B, T, V), or, given targets (B, T), {"loss": summed loss}.

        Targets of -100 do not count.
        """
        features = self.features(tokens, mask, caches)
        if targets is None:
            return self.head(features)
        return {"loss": linear_cross_entropy(features, self.token_embedding.weight, targets)[0]}

    def features(
        self,
        tokens: Tensor,
        mask: Tensor | str | None = "causal",
        caches: list[KVCache] | None = None,
    ) -> Tensor:
        """tokens (B, T) -> (B, T, C), what the head turns into logits.

        With caches, one per block, the tokens continue what the caches hold. Raises ValueError
        beyond block_size positions.
        """
        T = tokens.size(1)
        past = caches[0].length if caches else 0
        if past + T > self.config.block_size:
            raise ValueError(
                f"{past + T} positions are more than block_size={self.config.block_size}: "
                "shorten the input"
            )
        positions = torch.arange(past, past + T, device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, mask=mask, cache=cache)
        return self.norm(x)

    def head(self, features: Tensor) -> Tensor:
        """(..., C) -> (..., V) logits: the products with all token embeddings."""
        return F.linear(features, self.token_embedding.weight)

    def make_caches(self) -> list[KVCache]:
        return [KVCache(self.config.block_size) for _ in self.blocks]

    def flops_per_token(self) -> int:
        """Of training: 6 for each weight that multiplies, 12·L·C·T for the attention scores.

        Kaplan et al. 2020 (arXiv:2001.08361), section 2.1, with the full context of T positions.
        """
        c = self.config
        weights = count_parameters(self) - self.position_embedding.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size


def init_gpt(model: GPT) -> None:
    """GPT-2's initialisation (section 2.3 of its paper; n is the number of residual branches).

    tensor                                          law
    token_embedding, position_embedding             N(0, 0.02)
    attention.q, .k, .v, mlp.fc          weight     N(0, 0.02)
    attention.proj, mlp.proj             weight     N(0, 0.02 / sqrt(n)),  n = 2 · n_layer
    every                                bias       0
    every LayerNorm                      weight     1
    """
    n = 2 * model.config.n_layer

    def matrix(name: str, weight: Tensor) -> None:
        nn.init.normal_(weight, std=0.02 / n**0.5 if name.endswith("proj.weight") else 0.02)

    initialise(model, matrix)


def initialise(model: nn.Module, matrix: Callable[[str, Tensor], None]) -> None:
    """Biases 0, the weights of LayerNorms 1, and `matrix(name, weight)` for all others."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            matrix(name, parameter)


# ---- counting ------------------------------------------------------------------------------------


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
