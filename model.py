"""What the three Transformer families share, and GPT.

From the bottom up: masks, the key-value cache, three functions that may be replaced by faster ones,
scaled dot-product attention, the MLP, the residual block, and GPT, the causal decoder built from
them. BERT and the encoder-decoder import these parts and add only what is their own. The file needs
torch and nothing else: copy it. `python model.py` teaches a small GPT a verse by heart.

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

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- masks: bool tensors that broadcast to (B, H, T, S), True = may look -------------------------


def causal_mask(T: int, S: int, device: torch.device | str | None = None) -> Tensor:
    """(T, S) bool: query t is the t-th of the LAST T positions; it sees itself and all before it.

    causal_mask(3, 5), three new positions behind two cached ones (x = may look):

        x x x . .
        x x x x .
        x x x x x
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def padding_mask(keep: Tensor) -> Tensor:
    """(B, S), nonzero at real tokens -> (B, 1, 1, S) bool, the same for all heads and queries.

    keep = [[1, 1, 1, 0, 0]] gives every query the row

        x x x . .
    """
    return keep.bool()[:, None, None, :]


def prefix_mask(prefix_len: Tensor, T: int) -> Tensor:
    """(B,) lengths -> (B, 1, T, T) bool: causal, but all see the first prefix_len positions.

    prefix_mask(tensor([3]), 5):

        x x x . .
        x x x . .
        x x x . .
        x x x x .
        x x x x x

    As the mask of a GPT it makes a prefix language model; no other change is needed.
    """
    in_prefix = torch.arange(T, device=prefix_len.device) < prefix_len[:, None]  # (B, T)
    return causal_mask(T, T, prefix_len.device) | in_prefix[:, None, None, :]


# A mask is a bool tensor, the string "causal", or None, with which every query sees every key. A
# callable (q, k, v, dropout) attends by itself: the place for biases (ALiBi, T5) or sparse windows.
Mask = Tensor | str | Callable[..., Tensor] | None

# ---- the key-value cache -------------------------------------------------------------------------


class KVCache:
    """Keys and values of the positions seen so far, for one attention layer.

    It is made outside the model and passed in, so that the model has no state. Its memory, in the
    dtype of the keys, doubles when it is full, up to `max_len` positions: growing by concatenation
    would copy everything at every token.
    """

    def __init__(self, max_len: int):
        self.max_len, self.length = max_len, 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values (B, H, T, D); returns all so far, each (B, H, length, D).

        Raises ValueError when there would be more than max_len positions.
        """
        B, H, T, D = k.shape
        if self.length + T > self.max_len:
            raise ValueError(
                f"the cache holds {self.max_len} positions, {self.length} are used and {T} more "
                "were given: make a longer cache or start a new one"
            )
        end = self.length + T
        if self.k is None or end > self.k.size(2):
            before, size = self.filled() if self.length else None, min(self.max_len, 2 * end)
            self.k, self.v = (x.new_empty(B, H, size, D) for x in (k, v))
            if before:
                self.k[:, :, : self.length], self.v[:, :, : self.length] = before
        self.k[:, :, self.length : self.length + T] = k
        self.v[:, :, self.length : self.length + T] = v
        self.length += T
        return self.filled()

    def select(self, rows: Tensor) -> None:
        """Row i takes what row rows[i] holds; rows may be repeated or left out."""
        if self.length == 0:
            return
        k, v = (x[:, :, : self.length].index_select(0, rows) for x in (self.k, self.v))
        if len(rows) > len(self.k):
            shape = (len(rows), *self.k.shape[1:])
            self.k, self.v = self.k.new_empty(shape), self.v.new_empty(shape)
        self.k, self.v = self.k[: len(rows)], self.v[: len(rows)]
        self.k[:, :, : self.length], self.v[:, :, : self.length] = k, v

    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the positions seen so far, each (B, H, length, D)."""
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


# ---- three functions that may be replaced --------------------------------------------------------
# The plain forms below are the definition, and all that a copy of this file needs. Where a machine
# has a faster form with the same result, `engine/kernels.py` assigns it to one of these names once,
# before a run begins; every model calls whatever the name stands for.


def plain_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    smoothing: float = 0.0,
    bias: Tensor | None = None,
    accuracy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the logits features · weightᵀ + bias, summed over all targets.

    features (..., C), weight (V, C), targets (...), bias (V,) -> (summed smoothed loss, summed
    negative log-likelihood, number of targets that are the argmax of their logits, which is 0
    without `accuracy`). Targets of -100 do not count. Only the loss has a gradient. smoothing ε
    makes the target distribution (1 - ε) · one-hot + ε / V (Szegedy et al. 2016, arXiv:1512.00567,
    section 7).
    """
    logits, targets = F.linear(features, weight, bias).flatten(0, -2).float(), targets.flatten()
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    logits = logits.detach()
    nll = F.cross_entropy(logits, targets, reduction="sum")
    right = logits.argmax(-1) == targets if accuracy else torch.zeros_like(targets)
    return loss, nll, right.sum()


attention_kernel = F.scaled_dot_product_attention  # (q, k, v, mask, dropout_p, is_causal)
dropout_kernel = F.dropout  # (x, p)
cross_entropy = plain_cross_entropy  # the faster form never holds all logits at once

# ---- attention, MLP, block -----------------------------------------------------------------------


class Dropout(nn.Module):
    """In training, zeroes elements with probability p and multiplies the rest by 1 / (1 - p)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout_kernel(x, self.p) if self.training and self.p else x


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v for q (B, H, T, D), k and v (B, H, S, D); section 3.2.1 of 2017.

    This is the one place where a mask becomes an argument of torch's attention, which has three
    traps: its `is_causal` aligns the mask to the upper left, which would hide a cache; it accepts
    `is_causal` together with a mask and gives no error; and it adds a 0/1 float mask to the scores.
    A query that may look at nothing yields zeros (softmax of an empty set would be NaN). Raises
    ValueError for an unknown string or a mask that is not bool.
    """
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f'mask={mask!r} is not known: pass None, "causal" or a bool tensor')
        T, S = q.size(2), k.size(2)
        if T == S:
            return attention_kernel(q, k, v, is_causal=True, dropout_p=dropout)
        # A single new position sees all that is cached: it needs no mask, and so is faster.
        mask = None if T == 1 else causal_mask(T, S, q.device)
        return attention_kernel(q, k, v, mask, dropout_p=dropout)
    if mask is None:
        return attention_kernel(q, k, v, dropout_p=dropout)
    if not isinstance(mask, Tensor):
        return mask(q, k, v, dropout)
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask is {mask.dtype}, but must be torch.bool with True = may look")
    blind = ~mask.any(-1, keepdim=True)
    # Blind rows look at everything and are zeroed afterwards, so that their gradient is finite too.
    y = attention_kernel(q, k, v, mask | blind, dropout_p=dropout)
    return y.masked_fill(blind, 0.0)


class Attention(nn.Module):
    """Multi-head attention (section 3.2.2).

    `config` has n_embd, n_head, bias and attention_dropout, the probability that a query misses a
    key. Raises ValueError where n_head does not divide n_embd.
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

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) -> queries, keys and values of self-attention, each (B, T, C)"""
        return self.q(x), self.k(x), self.v(x)

    def split(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, H, T, D)"""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x (B, T, C) attends to itself, or to memory (B, S, C) where that is given; -> (B, T, C).

        A cache of self-attention grows with every call. A cache of cross-attention is filled by
        the first call and reused, because the memory does not change while one output is written.
        x may have K times as many rows as memory: K consecutive rows, the hypotheses of a beam
        search, then share one row of memory. They become K times as many queries of that row, so
        that no memory is copied.
        """
        shape = x.shape
        if memory is None:
            q, k, v = map(self.split, self.project(x))
            if cache is not None:
                k, v = cache.append(k, v)
        else:
            if len(x) != len(memory):
                x = x.reshape(len(memory), -1, x.size(-1))
            q = self.split(self.q(x))
            if cache is not None and cache.length:
                k, v = cache.filled()
            else:
                k, v = self.split(self.k(memory)), self.split(self.v(memory))
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
    """Self-attention, cross-attention where cross=True, and MLP, each in a residual connection.

    pre_ln=True normalises what enters a sublayer, x + f(norm(x)), as GPT-2 does; False normalises
    what leaves it, norm(x + f(x)), as the 2017 model and BERT do. `config` has what Attention and
    MLP need, and ln_eps.
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
        memory_mask: Mask = None,
        cache: KVCache | None = None,
        memory_cache: KVCache | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C); cross-attention looks at memory (B, S, C)."""
        x = self.residual(x, self.attention_norm, self.attention, None, mask, cache)
        if memory is not None:
            x = self.residual(x, self.cross_norm, self.cross, memory, memory_mask, memory_cache)
        return self.residual(x, self.mlp_norm, self.mlp)


def next_positions(tokens: Tensor, caches: list[KVCache] | None, block_size: int) -> Tensor:
    """The positions (T,) of tokens (B, T) behind what the caches hold. Raises ValueError where they
    reach beyond block_size."""
    past = caches[0].length if caches else 0
    end = past + tokens.size(1)
    if end > block_size:
        raise ValueError(
            f"{end} positions are more than block_size={block_size}: shorten the input"
        )
    return torch.arange(past, end, device=tokens.device)


# About ten times what anybody has trained. Beyond that, even describing a model takes minutes.
LARGEST = {"vocab_size": 2**24, "block_size": 2**24, "n_layer": 1000}
LARGEST |= {"n_head": 2**16, "n_embd": 2**18, "n_ff": 2**20}


def check_sizes(config, *rates: str) -> None:
    """Raises ValueError unless sizes are 1 to LARGEST, 0 < ln_eps <= 1 and 0 <= each rate < 1."""
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
    """The causal decoder of GPT-2 and GPT-3 (with pre_ln=False that of GPT-1): positions are
    learned, and the input embedding is also the output matrix."""

    Config = GPTConfig

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
        norm = nn.LayerNorm(config.n_embd, config.ln_eps, bias=config.bias)
        self.norm = norm if config.pre_ln else nn.Identity()
        init_gpt(self)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        mask: Mask = "causal",
        caches: list[KVCache] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """tokens (B, T) -> logits (B, T, V), or, given targets (B, T), {"loss": summed loss}.

        Targets of -100 do not count.
        """
        features = self.features(tokens, mask, caches)
        if targets is None:
            return self.head(features)
        return {"loss": self.loss(features, targets)}

    def loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """features (B, T, C), targets (B, T) -> the cross-entropy, summed"""
        return cross_entropy(features, self.token_embedding.weight, targets)[0]

    def features(
        self,
        tokens: Tensor,
        mask: Mask = "causal",
        caches: list[KVCache] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) -> features (B, T, C), which the head turns into logits.

        With caches, one per block, the tokens continue what the caches hold. positions (T,), where
        they are given, say where the tokens stand. Raises ValueError for more than block_size
        positions.
        """
        if positions is None:
            positions = next_positions(tokens, caches, self.config.block_size)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, mask=mask, cache=cache)
        return self.norm(x)

    def head(self, features: Tensor) -> Tensor:
        """features (..., C) -> logits (..., V): the products with all token embeddings."""
        return F.linear(features, self.token_embedding.weight)

    def make_caches(self) -> list[KVCache]:
        return [KVCache(self.config.block_size) for _ in self.blocks]

    def flops_per_token(self) -> int:
        """Training takes 6 for each weight that multiplies and 12·L·C·T for the attention scores
        (Kaplan et al. 2020, arXiv:2001.08361, section 2.1; with the full context of T positions).
        """
        c = self.config
        weights = count_parameters(self) - self.position_embedding.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size


def init_gpt(model: GPT) -> None:
    """GPT-2's initialisation (section 2.3 of its paper).

    tensor                                          law
    token_embedding, position_embedding             N(0, 0.02)
    attention.q, .k, .v, mlp.fc          weight     N(0, 0.02)
    attention.proj, mlp.proj             weight     N(0, 0.02 / sqrt(n)), n = 2 · n_layer branches
    every                                bias       0
    every LayerNorm                      weight     1
    """
    n = 2 * model.config.n_layer

    def matrix(name: str, weight: Tensor) -> None:
        nn.init.normal_(weight, std=0.02 / n**0.5 if name.endswith("proj.weight") else 0.02)

    initialise(model, matrix)


def initialise(model: nn.Module, matrix: Callable[[str, Tensor], None]) -> None:
    """Sets biases to 0 and weights of LayerNorms to 1; matrix(name, weight) sets the others."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            matrix(name, parameter)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":  # learn a verse by heart, then recite it from its first word
    torch.manual_seed(1)
    text = "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye"
    letters = sorted(set(text))
    tokens = torch.tensor([[letters.index(c) for c in text]])
    gpt = GPT(GPTConfig(len(letters), block_size=len(text), n_layer=2, n_head=4, n_embd=64))
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    for step in range(61):
        loss = gpt(tokens[:, :-1], tokens[:, 1:])["loss"] / (len(text) - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2}   loss {loss.item():.3f}")
    caches, written = gpt.make_caches(), tokens[:, :5]
    new = written
    with torch.no_grad():
        while written.size(1) < len(text):
            new = gpt(new, caches=caches)[:, -1:].argmax(-1)  # only the new token is read
            written = torch.cat([written, new], 1)
    print("\n" + "".join(letters[i] for i in written[0].tolist()))
