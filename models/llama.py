"""Llama: the decoder that people use today, and its relatives Mistral and Qwen3.

Against GPT, of model.py, five things are changed:

    positions     queries and keys are turned by an angle that grows with their place, so that a
                  score depends on how far apart two tokens are (rotary positions, RoPE)
    norm          x / sqrt(mean(x²) + ε), without a mean that is subtracted (RMSNorm)
    MLP           silu(x G) · (x U), then the projection: one product gates the other (SwiGLU)
    heads         groups of query heads share a head of keys and values, so that caches are small
    no biases     and, in large models, an output matrix of its own

Mistral adds a window: a token sees the last `window` tokens, itself included, in each layer. Qwen3
adds norms of queries and keys, and heads whose width is not n_embd / n_head.

Norms and angles are computed in fp32 whatever the dtype, as the published models were trained.
The file needs torch and model.py. `python -m models.llama` shows what rotary positions are about.

Left out: layers that differ from each other (full and windowed in turn, experts), biases of q, k
and v (Qwen2), the other ways of stretching RoPE (YaRN, dynamic NTK).

Papers: RoPE (Su et al. 2021, arXiv:2104.09864); RMSNorm (Zhang and Sennrich 2019,
arXiv:1910.07467); SwiGLU (Shazeer 2020, arXiv:2002.05202); grouped heads (Ainslie et al. 2023,
arXiv:2305.13245); Llama (Touvron et al. 2023, arXiv:2302.13971 and 2307.09288; 3: Grattafiori et
al. 2024, arXiv:2407.21783); Mistral (Jiang et al. 2023, arXiv:2310.06825); Qwen3 (Yang et al. 2025,
arXiv:2505.09388).
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import model
from model import MLP, Attention, Block, Dropout, KVCache, Mask, attend, causal_mask


@dataclass
class LlamaConfig:
    vocab_size: int = 32000  # tokens that the model can read and write
    # positions it can look back, itself included; no weight depends on it, so --init may change it
    block_size: int = field(default=2048, metadata={"free": True})
    n_layer: int = 12  # blocks
    n_head: int = 12  # heads of queries
    n_kv_head: int = 0  # heads of keys and values; must divide n_head; 0: as many
    n_embd: int = 768  # width of the residual stream
    head_dim: int = 0  # width of a head, even; 0: n_embd / n_head
    n_ff: int = 0  # width inside the MLP; 0: 8/3 x n_embd, rounded up to a multiple of 32
    dropout: float = 0.0  # probability, in embeddings, attention and residual branches
    ln_eps: float = 1e-5  # added to the mean of squares in RMSNorm
    tied: bool = True  # let the embeddings be the output matrix too, as small models do
    window: int = 0  # tokens that each sees in a layer, itself included (Mistral); 0: all
    qk_norm: bool = False  # RMSNorm of each head's queries and keys (Qwen3)
    rope_theta: float = 10000.0  # base of the angles by which queries and keys are turned
    # Llama 3.1's stretching: slow pairs turn so many times more slowly; 1: none
    rope_factor: float = field(default=1.0, metadata={"flag": False})
    # positions that a model was trained with before it was stretched
    rope_original: int = field(default=8192, metadata={"flag": False})

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_ff = self.n_ff or math.ceil(8 * self.n_embd / 3 / 32) * 32
        model.check_sizes(self, "dropout")
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}: choose one of "
                f"{', '.join(str(n) for n in range(1, self.n_head + 1) if self.n_head % n == 0)}"
            )
        if not self.head_dim:
            if self.n_embd % (2 * self.n_head):
                raise ValueError(
                    f"n_embd={self.n_embd} is no multiple of {2 * self.n_head}, twice "
                    f"n_head={self.n_head}, since a head has an even width: choose one, or give "
                    "head_dim"
                )
            self.head_dim = self.n_embd // self.n_head
        if self.head_dim < 2 or self.head_dim % 2 or self.head_dim > 2**16:
            raise ValueError(
                f"head_dim={self.head_dim} is no even number from 2 to {2**16:,}: rotary "
                "positions turn pairs of channels"
            )
        if self.window < 0:
            raise ValueError(f"window={self.window} is too small: choose 1 or more, or 0 for none")
        for name, least in (("rope_theta", 1), ("rope_factor", 1), ("rope_original", 1)):
            if not least <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={value} is out of range: choose {least} or more")

    @property
    def attention_dropout(self) -> float:
        return self.dropout


# ---- rotary positions ----------------------------------------------------------------------------


def rotation_rates(config: LlamaConfig, device: torch.device | str | None = None) -> Tensor:
    """(D / 2,) fp32: θ^(-2i/D), the angle by which pair i of the channels turns from each place to
    the next. With rope_factor f, a pair that turns less than once within the rope_original
    positions turns f times more slowly, one that turns more than 4 times stays as it is, and those
    between are mixed (Llama 3.1)."""
    pairs = torch.arange(0, config.head_dim, 2, device=device).float()
    rates = 1.0 / config.rope_theta ** (pairs / config.head_dim)
    if config.rope_factor != 1:
        turns = rates * (config.rope_original / (2 * math.pi))
        kept = ((turns - 1) / 3).clamp(0, 1)
        rates = (1 - kept) * rates / config.rope_factor + kept * rates
    return rates


def rotation(positions: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """positions (T,) -> cosines and sines for `rotate`, each (T, D), in fp32."""
    angles = positions[:, None].float() * rotation_rates(config, positions.device)  # (T, D / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D), turned. Channels i and i + D/2 are a point (a, b) in the plane, and become
    (a cos - b sin, b cos + a sin).

    This is the layout of Hugging Face's files. Meta's own have pairs of neighbours, 2i and 2i + 1:
    the same model with the rows of q and k in another order. With the wrong one a model writes
    text that looks like text, and is far worse.
    """
    y = x.float()
    return (y * cos + y.roll(x.size(-1) // 2, -1) * sin).type_as(x)


# ---- attention, MLP, block -----------------------------------------------------------------------


def window_mask(T: int, S: int, window: int, device: torch.device | str | None = None) -> Tensor:
    """(T, S) bool, causal, but a query sees only the last `window` keys, its own included.

    window_mask(3, 5, 3):

        x x x . .
        . x x x .
        . . x x x
    """
    return causal_mask(T, S, device).triu(S - T - window + 1)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        mean = y.square().sum(-1, keepdim=True) / y.size(-1)  # half the time of torch's mean
        return ((y * torch.rsqrt(mean + self.eps)).type_as(x) * self.weight).type_as(x)


class GroupedAttention(Attention):
    """Attention with rotary positions, where H / n_kv_head heads of queries share one of keys."""

    def __init__(self, config: LlamaConfig):
        nn.Module.__init__(self)
        c = config
        self.head_dim, self.window, self.dropout = c.head_dim, c.window, c.attention_dropout
        self.q = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=False)
        self.k = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=False)
        self.v = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=False)
        self.proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.ln_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.ln_eps) if c.qk_norm else nn.Identity()

    def split(self, x: Tensor) -> Tensor:
        """(B, T, H · D) -> (B, H, T, D), for as many heads as there are"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Mask = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C); turn is the `rotation` of its T positions."""
        q, k, v = map(self.split, self.project(x))
        q, k = rotate(self.q_norm(q), *turn), rotate(self.k_norm(k), *turn)
        if cache is not None:  # keys are kept as they were turned
            k, v = cache.append(k, v)
        y = self.attend_in_groups(q, k, v, mask)
        return self.proj(y.transpose(1, 2).flatten(2))

    def attend_in_groups(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """q (B, H, T, D), k and v (B, n_kv_head, S, D) -> (B, H, T, D)"""
        dropout = self.dropout if self.training else 0.0
        T, S, group = q.size(2), k.size(2), q.size(1) // k.size(1)
        hides = 0 < self.window < S
        if T == 1 and not isinstance(mask, Tensor):
            if mask == "causal":  # the last position sees all, or its window
                mask = None
                if hides:
                    k, v = k[:, :, -self.window :], v[:, :, -self.window :]
            # The queries of a group become queries of one head, so that no key is copied.
            grouped = attend(q.reshape(len(q), -1, group, self.head_dim), k, v, mask, dropout)
            return grouped.reshape(q.shape)
        if hides and (isinstance(mask, Tensor) or mask == "causal"):
            allowed = window_mask(T, S, self.window, q.device)
            mask = allowed & mask if isinstance(mask, Tensor) else allowed
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return attend(q, k, v, mask, dropout)


class GatedMLP(MLP):
    """silu(x G) · (x U), projected."""

    def __init__(self, config: LlamaConfig):
        nn.Module.__init__(self)
        self.gate = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.fc = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.proj = nn.Linear(config.n_ff, config.n_embd, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C) -> what gates and what is gated, each (B, T, n_ff)"""
        return self.gate(x), self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x)
        return self.proj(F.silu(gate) * up)


class LlamaBlock(Block):
    def __init__(self, config: LlamaConfig):
        nn.Module.__init__(self)
        self.pre_ln = True
        self.attention = GroupedAttention(config)
        self.attention_norm = RMSNorm(config.n_embd, config.ln_eps)
        self.mlp = GatedMLP(config)
        self.mlp_norm = RMSNorm(config.n_embd, config.ln_eps)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Mask = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        x = self.residual(x, self.attention_norm, self.attention, turn, mask, cache)
        return self.residual(x, self.mlp_norm, self.mlp)


# ---- the model -----------------------------------------------------------------------------------


class Llama(nn.Module):
    """The causal decoder of Llama, Mistral and Qwen3."""

    Config = LlamaConfig
    Block = LlamaBlock

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(self.Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.ln_eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        init_llama(self)

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
        return {"loss": model.cross_entropy(features, self.output_matrix, targets)[0]}

    @property
    def output_matrix(self) -> Tensor:
        """(V, C)"""
        return self.token_embedding.weight if self.config.tied else self.lm_head.weight

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
            positions = model.next_positions(tokens, caches, self.config.block_size)
        turn = rotation(positions, self.config)
        x = self.dropout(self.token_embedding(tokens))
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, turn, mask, cache)
        return self.norm(x)

    def head(self, features: Tensor) -> Tensor:
        """features (..., C) -> logits (..., V)"""
        if self.config.tied:
            return F.linear(features, self.token_embedding.weight)
        return self.lm_head(features)

    def make_caches(self) -> list[KVCache]:
        return [KVCache(self.config.block_size) for _ in self.blocks]

    def flops_per_token(self) -> int:
        """Of training: 6 for each weight that multiplies, and 12·L·H·D for each position that a
        token may see; as in model.py."""
        c = self.config
        weights = model.count_parameters(self)
        if not c.tied:
            weights -= self.token_embedding.weight.numel()
        seen = min(c.window or c.block_size, c.block_size)
        return 6 * weights + 12 * c.n_layer * c.n_head * c.head_dim * seen


def init_llama(network: Llama) -> None:
    """GPT-2's laws, which published trainings of small Llamas use too.

    tensor                                               law
    token_embedding, lm_head                  weight     N(0, 0.02)
    attention.q, .k, .v, mlp.gate, mlp.fc     weight     N(0, 0.02)
    attention.proj, mlp.proj                  weight     N(0, 0.02 / sqrt(n)), n = 2 · n_layer
    every RMSNorm                             weight     1
    """
    n = 2 * network.config.n_layer

    def matrix(name: str, weight: Tensor) -> None:
        nn.init.normal_(weight, std=0.02 / n**0.5 if name.endswith("proj.weight") else 0.02)

    model.initialise(network, matrix)


if __name__ == "__main__":  # what RoPE is about, and a verse learnt by heart
    torch.manual_seed(1)
    small = LlamaConfig(64, block_size=64, n_layer=1, n_head=1, n_embd=16)
    q, k = torch.randn(2, 1, 1, 1, small.head_dim)
    print("the score of one query and one key, turned to their places:")
    for at in (0, 5, 40):
        row = []
        for distance in (0, 1, 2, 5, 10):
            turned = [
                rotate(x, *rotation(torch.tensor([place]), small))
                for x, place in ((q, at + distance), (k, at))
            ]
            row.append(f"{(turned[0] * turned[1]).sum().item():8.4f}")
        print(f"  key at {at:2}, query 0, 1, 2, 5, 10 places behind it: {''.join(row)}")
    text = "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye"
    letters = sorted(set(text))
    tokens = torch.tensor([[letters.index(c) for c in text]])
    sizes = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
    llama = Llama(LlamaConfig(len(letters), block_size=len(text), **sizes))
    optimizer = torch.optim.AdamW(llama.parameters(), lr=3e-3)
    for step in range(61):
        loss = llama(tokens[:, :-1], tokens[:, 1:])["loss"] / (len(text) - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2}   loss {loss.item():.3f}")
    caches, written = llama.make_caches(), tokens[:, :5]
    new = written
    with torch.no_grad():
        while written.size(1) < len(text):
            new = llama(new, caches=caches)[:, -1:].argmax(-1)  # only the new token is read
            written = torch.cat([written, new], 1)
    print("\n" + "".join(letters[i] for i in written[0].tolist()))
