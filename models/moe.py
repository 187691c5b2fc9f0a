"""A mixture of experts: Mixtral's, and that of the Switch Transformer.

In each block stand n_expert MLPs instead of one, the experts. A router gives each token a
probability for each of them, and the token goes through the n_active likeliest alone. So the model
has many more weights than any token pays for:

    y = Σ g_e · expert_e(x)     over the chosen experts e

With two or more (Mixtral) the gates g are the chosen probabilities divided by their sum. With one
(Switch) g is its probability as it is: divided by itself it would be 1, and the router would learn
nothing.

Left alone, a router falls in love with a few experts, which then are the only ones that learn. So
the balance loss is added, α · E · Σ_e f_e P_e: E experts, f_e the share of the tokens that chose e,
P_e its mean probability, in a micro-batch. It is least where both are even. Only P has a gradient.

Switch also limits the tokens of an expert, to `capacity` times what an even division would give it,
so that a device has no more work than planned. Those beyond, the last of a row, pass by the expert
in the residual stream. The limit holds in training alone.

All else is Llama's. The file needs torch, model.py and models/llama.py. `python -m models.moe`
shows what the balance loss is for.

Left out: experts that all tokens share, and balance without a loss (DeepSeek), noise in the router,
its z-loss, experts on other devices than the rest, captured steps of a GPU: how many tokens an
expert gets is known only when the router has spoken.

Papers: sparsely gated experts (Shazeer et al. 2017, arXiv:1701.06538); Switch Transformers (Fedus
et al. 2021, arXiv:2101.03961), section 2; Mixtral (Jiang et al. 2024, arXiv:2401.04088).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import model
from model import MLP, KVCache, Mask
from models.llama import GatedMLP, Llama, LlamaBlock, LlamaConfig, rotation


@dataclass
class MoEConfig(LlamaConfig):
    n_expert: int = 8  # experts in each block
    n_active: int = field(default=2, metadata={"free": True})  # experts that a token goes through
    # factor α of the balance loss; 0: none
    balance: float = field(default=0.01, metadata={"free": True})
    # tokens of an expert in training, as a multiple of its even share of a row; 0: no limit
    capacity: float = field(default=0.0, metadata={"free": True})

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.n_expert <= 2**12:
            raise ValueError(f"n_expert={self.n_expert} is out of range: choose 2 to {2**12:,}")
        if not 1 <= self.n_active <= self.n_expert:
            raise ValueError(
                f"n_active={self.n_active} is out of range: choose 1 to n_expert={self.n_expert}"
            )
        for name in ("balance", "capacity"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}={value} is out of range: choose 0 or more")


# ---- router and experts --------------------------------------------------------------------------


class Router(nn.Linear):
    """A linear layer in fp32, also under autocast: in bf16 many probabilities would be equal."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


def tokens_of_each(chosen: Tensor, n: int) -> list[int]:
    """How many of the choices (N,), numbers below n, are 0, 1, …, n - 1. The host waits for it;
    engine/memory.py, for which nothing is computed, has another one."""
    return torch.bincount(chosen, minlength=n).tolist()


def plain_experts(x: Tensor, chosen: Tensor, experts: nn.ModuleList) -> Tensor:
    """x (N, C), chosen (N, k), numbers of experts or E, which is none -> (N, k, C): what each
    chosen expert makes of its token; zeros for none."""
    # All choices, sorted by expert: then the tokens of each are one stretch.
    order = chosen.flatten().argsort(stable=True)
    counts = tokens_of_each(chosen.flatten(), len(experts) + 1)
    parts = x[order // chosen.size(1)].split(counts)
    # An expert without tokens computes too, with no row: so it has a gradient, of zeros, which the
    # processes of a run wait for.
    made = [f(part) for f, part in zip((*experts, torch.zeros_like), parts, strict=True)]
    y = torch.cat([part.type_as(made[0]) for part in made])
    return y[order.argsort()].view(*chosen.shape, -1)


# Assigned by engine/kernels.py, as those of model.py are: outside of what is compiled, since the
# numbers of tokens are others in each step.
experts_kernel = plain_experts


class Experts(MLP):
    """n_expert networks, each made by `expert()`, and the router that chooses among them.

    `config` has n_embd, n_expert, n_active and capacity.
    """

    def __init__(self, config, expert: Callable[[], nn.Module]):
        nn.Module.__init__(self)
        self.n_active, self.capacity = config.n_active, config.capacity
        self.router = Router(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(config.n_expert))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> (y (B, T, C), probabilities (B, T, E) in fp32, chosen (B, T, n_active)).

        `chosen` is what the router wants, before any limit.
        """
        probabilities = self.router(x).softmax(-1)
        gates, chosen = probabilities.topk(self.n_active, -1)
        if self.n_active > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        taken = self.within_capacity(chosen) if self.training and self.capacity else chosen
        y = experts_kernel(x.flatten(0, 1), taken.flatten(0, 1), self.experts)
        y = (gates[..., None] * y.view(*chosen.shape, -1)).sum(-2)
        return y.type_as(x), probabilities, chosen

    def within_capacity(self, chosen: Tensor) -> Tensor:
        """chosen (B, T, n_active), with E, which is no expert, where an expert has its tokens
        already: each row of the batch fills it from its beginning, so no token's place depends on
        what comes later or stands in another row."""
        B, T, k = chosen.shape
        E = len(self.experts)
        most = math.ceil(self.capacity * k * T / E)
        taken = chosen.flatten(1)[..., None] == torch.arange(E, device=chosen.device)
        number = taken.cumsum(1).gather(2, chosen.flatten(1)[..., None])  # 1 for the earliest
        return chosen.masked_fill(number.view(B, T, k) > most, E)


def shares(chosen: Tensor, E: int) -> Tensor:
    """chosen (B, T, n_active) -> (E,): of all tokens, the share that chose each expert."""
    one_hot = chosen[..., None] == torch.arange(E, device=chosen.device)
    return one_hot.sum(-2).float().mean((0, 1))


class MoEBlock(LlamaBlock):
    """A block of Llama with experts in place of its MLP."""

    def __init__(self, config: MoEConfig):
        super().__init__(config)
        self.mlp = Experts(config, lambda: GatedMLP(config))

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Mask = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> what Experts returns, with the residual stream in place of y"""
        x = self.residual(x, self.attention_norm, self.attention, turn, mask, cache)
        y, *routing = self.mlp(self.mlp_norm(x))
        return x + self.dropout(y), *routing


# ---- the model -----------------------------------------------------------------------------------


class MoE(Llama):
    """Llama with experts: Mixtral with n_active=2, a decoder with Switch's layers with n_active=1
    and capacity=1.25.

    It is initialised as Llama is, `mlp.experts` as its MLP, `mlp.router` by N(0, 0.02).
    """

    Config = MoEConfig
    Block = MoEBlock

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        mask: Mask = "causal",
        caches: list[KVCache] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """tokens (B, T) -> logits (B, T, V), or, given targets (B, T), a dict of sums:

        "loss"           cross-entropy; targets of -100 do not count
        "balance_loss"   the balance loss, a mean over the blocks, times the number of targets
        "expert_0", …    the share of the tokens that chose this expert, likewise; these are
                         n_active together
        """
        features, routing = self.through_blocks(tokens, mask, caches)
        if targets is None:
            return self.head(features)
        losses = {"loss": model.cross_entropy(features, self.output_matrix, targets)[0]}
        n, E = (targets != -100).sum(), self.config.n_expert
        share = torch.stack([shares(chosen, E) for _, chosen in routing])  # (n_layer, E)
        mean = torch.stack([probabilities.mean((0, 1)) for probabilities, _ in routing])
        losses["balance_loss"] = n * self.config.balance * E * (share * mean).sum(-1).mean()
        return losses | {f"expert_{e}": n * part for e, part in enumerate(share.mean(0))}

    def features(
        self, tokens: Tensor, mask: Mask = "causal", caches: list[KVCache] | None = None
    ) -> Tensor:
        """tokens (B, T) -> features (B, T, C), as in Llama."""
        return self.through_blocks(tokens, mask, caches)[0]

    def through_blocks(
        self, tokens: Tensor, mask: Mask, caches: list[KVCache] | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """(features, the router's probabilities and choices in each block)"""
        positions = model.next_positions(tokens, caches, self.config.block_size)
        turn, routing = rotation(positions, self.config), []
        x = self.dropout(self.token_embedding(tokens))
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x, *found = block(x, turn, mask, cache)
            routing.append(found)
        return self.norm(x), routing

    def flops_per_token(self) -> int:
        """As Llama's, of the experts that a token goes through."""
        c = self.config
        experts = [block.mlp.experts for block in self.blocks]
        idle = sum(map(model.count_parameters, experts)) * (c.n_expert - c.n_active) // c.n_expert
        return super().flops_per_token() - 6 * idle


if __name__ == "__main__":  # what the balance loss is for, and a verse learnt by heart
    text = "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye"
    letters = sorted(set(text))
    tokens = torch.tensor([[letters.index(c) for c in text]])
    n = len(text) - 1
    sizes = {"n_layer": 1, "n_head": 4, "n_embd": 64, "n_expert": 4, "n_active": 1}
    for balance in (0.0, 0.1):
        torch.manual_seed(1)
        moe = MoE(MoEConfig(len(letters), block_size=n + 1, balance=balance, **sizes))
        optimizer = torch.optim.AdamW(moe.parameters(), lr=3e-3)
        print(f"balance {balance}: the share of the letters that each expert gets")
        for step in range(81):
            sums = moe(tokens[:, :-1], tokens[:, 1:])
            loss = (sums["loss"] + sums["balance_loss"]) / n
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 20 == 0:
                each = "".join(f"{sums[f'expert_{e}'].item() / n:6.0%}" for e in range(4))
                print(f"  step {step:2}   loss {sums['loss'].item() / n:.3f}  {each}")
    caches, written = moe.make_caches(), tokens[:, :5]
    new = written
    with torch.no_grad():
        while written.size(1) < len(text):
            new = moe(new, caches=caches)[:, -1:].argmax(-1)  # only the new token is read
            written = torch.cat([written, new], 1)
    print("\n" + "".join(letters[i] for i in written[0].tolist()))
