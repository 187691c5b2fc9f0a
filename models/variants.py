"""GPT with exchangeable parts: what if it had another activation, norm, order, or no attention?

Each part of a decoder is chosen by a name, and a table says which names there are and where they
come from:

    ACTIVATIONS, GATES   what is inside the feed-forward layer
    MIXERS               how a place learns from the others: attention, or one of two Synthesizers
    NORMS                LayerNorm or RMSNorm
    RESIDUALS            what connects a sublayer with the stream: the blocks of this file
    POSITIONS            how it knows where a token stands, in models/positions.py

Further settings are the order of the sublayers, written as a string of s (self-attention) and f
(feed-forward), whether all of them share their weights, factorised or untied embeddings, and a
mixture of softmaxes as output. With the defaults it is GPT.

The file needs torch, model.py, models/positions.py and models/llama.py. `python -m models.variants`
lets some variants learn a verse; `python -m lab.variants` compares them all.

Left out: halting of the Universal Transformer, mixtures of Synthesizers, encoders. Experts are in
models/moe.py, sparse attention in models/sparse.py, the decoder of today in models/llama.py.

Papers: the comparison that this follows is Do Transformer Modifications Transfer Across
Implementations and Applications? (Narang et al. 2021, arXiv:2102.11972); orders: Press et al. 2019,
arXiv:1911.03864; factorised embeddings: Lan et al. 2019, arXiv:1909.11942; tied ones: Press and
Wolf 2016, arXiv:1608.05859; mixtures of softmaxes: Yang et al. 2017, arXiv:1711.03953. Those of the
parts stand beside them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import model
from model import GPT, MLP, Attention, Block, Dropout, GPTConfig, KVCache, Mask, tanh_gelu
from models.llama import RMSNorm
from models.positions import POSITIONS, Positions, Sinusoidal, may_look

# ---- feed-forward --------------------------------------------------------------------------------


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": tanh_gelu,  # Hendrycks and Gimpel 2016, arXiv:1606.08415
    "relu": F.relu,  # Nair and Hinton 2010; in the Transformer of 2017
    "swish": F.silu,  # Ramachandran et al. 2017, arXiv:1710.05941
    "elu": F.elu,  # Clevert et al. 2015, arXiv:1511.07289
    "selu": F.selu,  # Klambauer et al. 2017, arXiv:1706.02515
    "sigmoid": torch.sigmoid,  # the oldest one
    "softplus": F.softplus,  # Dugas et al. 2000; Glorot et al. 2011
    "softmax": partial(torch.softmax, dim=-1),  # over the hidden units: a memory's keys compete
    "relu2": squared_relu,  # So et al. 2021 (Primer), arXiv:2109.08668
}

# The function of the gate in act(x G) · (x U).
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "glu": torch.sigmoid,  # Dauphin et al. 2016, arXiv:1612.08083
    "reglu": F.relu,  # this one and the others: Shazeer 2020, arXiv:2002.05202
    "geglu": tanh_gelu,
    "swiglu": F.silu,
    "bilinear": identity,
}


class GLU(MLP):
    """act(x G) · (x U), projected. `config` as for MLP."""

    def __init__(self, config, act: Callable[[Tensor], Tensor]):
        super().__init__(config, act)
        self.gate = nn.Linear(config.n_embd, config.n_ff, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.act(self.gate(x)) * self.fc(x))


def feed_forward(config) -> MLP:
    if config.act in GATES:
        return GLU(config, GATES[config.act])
    return MLP(config, ACTIVATIONS[config.act])


# ---- attention without queries and keys ----------------------------------------------------------


class Synthesizer(Attention):
    """softmax(f(x)) v: a small network f makes the scores of a query from the query alone, and no
    two tokens are ever compared (Tay et al. 2020, arXiv:2005.00743, Dense).

    f gives a score for each of block_size places, so that it reads no further.
    """

    def __init__(self, config):
        super().__init__(config)
        del self.q, self.k
        self.make_scores(config)

    def make_scores(self, config) -> None:
        self.hidden = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.scores = nn.Linear(config.n_embd, config.n_head * config.block_size, bias=config.bias)

    def score(self, x: Tensor, S: int) -> Tensor:
        """x (B, T, C), the last T of S places -> (B, H, T, S)"""
        scores = self.scores(F.relu(self.hidden(x)))
        return scores.unflatten(-1, (self.n_head, -1))[..., :S].transpose(1, 2)

    def forward(
        self, x: Tensor, memory: None = None, mask: Mask = None, cache: KVCache | None = None
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C). The mask is None, "causal" or bool, as that of `attend`."""
        v = self.split(self.v(x))
        if cache is not None:  # which has a place for keys, too
            v = cache.append(v, v)[1]
        looks, blind = may_look(self.split(x), v, v, mask)
        scores = self.score(x, v.size(2)).float().masked_fill(~looks, -torch.inf)
        weights = scores.softmax(-1).type_as(v)
        if self.training and self.dropout:
            weights = model.dropout_kernel(weights, self.dropout)
        y = (weights @ v).masked_fill(blind, 0.0).type_as(x)
        return self.proj(y.transpose(1, 2).flatten(2))


class RandomSynthesizer(Synthesizer):
    """The scores are parameters, the same for all texts (Random, in that paper)."""

    def make_scores(self, config) -> None:
        T = config.block_size
        self.scores = nn.Parameter(torch.zeros(config.n_head, T, T))

    def score(self, x: Tensor, S: int) -> Tensor:
        return self.scores[:, S - x.size(1) : S, :S]


MIXERS: dict[str, type[Attention]] = {
    "attention": Attention,
    "dense": Synthesizer,
    "random": RandomSynthesizer,
}

# ---- norms, residual connections -----------------------------------------------------------------


def layer_norm(config) -> nn.LayerNorm:
    return nn.LayerNorm(config.n_embd, config.ln_eps, bias=config.bias)


def rms_norm(config) -> RMSNorm:
    return RMSNorm(config.n_embd, config.ln_eps)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "layer": layer_norm,  # Ba et al. 2016, arXiv:1607.06450
    "rms": rms_norm,  # Zhang and Sennrich 2019, arXiv:1910.07467
}


class Sublayer(Block):
    """An Attention or an MLP in a residual connection, which the subclasses write out."""

    normalises = True  # whether it has a norm
    ends_with_norm = False

    def __init__(self, config, sublayer: Attention | MLP):
        nn.Module.__init__(self)
        self.sublayer, self.dropout = sublayer, Dropout(config.dropout)
        self.norm = NORMS[config.norm](config) if self.normalises else nn.Identity()
        self.n = len(config.sublayers)

    def initialise(self) -> None:
        """Changes what init_variant has drawn, where this connection has laws of its own."""

    def f(self, x: Tensor, mask: Mask, cache: KVCache | None) -> Tensor:
        if isinstance(self.sublayer, Attention):
            return self.dropout(self.sublayer(x, None, mask, cache))
        if cache is not None:  # an MLP keeps nothing, but counts the positions
            nothing = x.new_empty(len(x), 1, x.size(1), 0)
            cache.append(nothing, nothing)
        return self.dropout(self.sublayer(x))

    def forward(self, x: Tensor, mask: Mask = None, cache: KVCache | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        raise NotImplementedError


class PreLN(Sublayer):
    """x + f(norm(x))"""

    def forward(self, x: Tensor, mask: Mask = None, cache: KVCache | None = None) -> Tensor:
        return x + self.f(self.norm(x), mask, cache)


class PostLN(Sublayer):
    """norm(x + f(x))"""

    ends_with_norm = True

    def forward(self, x: Tensor, mask: Mask = None, cache: KVCache | None = None) -> Tensor:
        return self.norm(x + self.f(x, mask, cache))


class DeepNorm(PostLN):
    """norm(α x + f(x)) with α = (2N)^(1/4) for N layers of two sublayers, and weights that are the
    smaller the deeper the network is."""

    def initialise(self) -> None:
        for name, weight in self.sublayer.named_parameters():
            if weight.dim() == 2:
                gain = 1.0 if name in ("q.weight", "k.weight") else (4 * self.n) ** -0.25
                nn.init.xavier_normal_(weight, gain)

    def forward(self, x: Tensor, mask: Mask = None, cache: KVCache | None = None) -> Tensor:
        return self.norm(self.n**0.25 * x + self.f(x, mask, cache))


class ReZero(Sublayer):
    """x + α f(x): α is learnt, and 0 at first, so that the network begins as the identity."""

    normalises = False

    def __init__(self, config, sublayer: Attention | MLP):
        super().__init__(config, sublayer)
        self.alpha = nn.Parameter(torch.zeros(1))

    def initialise(self) -> None:
        nn.init.zeros_(self.alpha)

    def forward(self, x: Tensor, mask: Mask = None, cache: KVCache | None = None) -> Tensor:
        return x + self.alpha * self.f(x, mask, cache)


class Fixup(Sublayer):
    """x + s · f(x + b) + c with three numbers that are learnt. The last matrix of a sublayer begins
    as 0, the one before it is divided by the root of the number of sublayers.

    The paper has such a b before each layer and each activation, where our layers have biases
    already, and an output matrix that begins as 0, which tied embeddings cannot.
    """

    normalises = False

    def __init__(self, config, sublayer: Attention | MLP):
        super().__init__(config, sublayer)
        self.scale = nn.Parameter(torch.ones(1))
        self.bias, self.last_bias = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    @torch.no_grad()
    def initialise(self) -> None:
        nn.init.zeros_(self.sublayer.proj.weight)
        for name in ("v", "fc", "gate"):
            if layer := getattr(self.sublayer, name, None):
                layer.weight.mul_(self.n**-0.5)

    def forward(self, x: Tensor, mask: Mask = None, cache: KVCache | None = None) -> Tensor:
        return x + self.scale * self.f(x + self.bias, mask, cache) + self.last_bias


class NoSkip(Sublayer):
    """f(norm(x)): nothing passes by."""

    def forward(self, x: Tensor, mask: Mask = None, cache: KVCache | None = None) -> Tensor:
        return self.f(self.norm(x), mask, cache)


RESIDUALS: dict[str, type[Sublayer]] = {
    "pre_ln": PreLN,  # Radford et al. 2019; Xiong et al. 2020, arXiv:2002.04745
    "post_ln": PostLN,  # Vaswani et al. 2017, arXiv:1706.03762
    "deepnorm": DeepNorm,  # Wang et al. 2022, arXiv:2203.00555
    "rezero": ReZero,  # Bachlechner et al. 2020, arXiv:2003.04887; here α for each sublayer
    "fixup": Fixup,  # Zhang et al. 2019, arXiv:1901.09321
    "none": NoSkip,  # Dong et al. 2021, arXiv:2103.03404: then attention loses rank
}

# ---- the model -----------------------------------------------------------------------------------

SHARED = (
    "no",  # each sublayer has its own weights
    "all",  # every s is the same, and every f: ALBERT (Lan et al. 2019, arXiv:1909.11942)
    # The Universal Transformer (Dehghani et al. 2018, arXiv:1807.03819): likewise, and before each
    # s it adds the place and the depth, as sinusoids.
    "universal",
)
CHOICES = {
    "act": (*ACTIVATIONS, *GATES),
    "mixing": (*MIXERS,),
    "norm": (*NORMS,),
    "residual": (*RESIDUALS,),
    "positions": (*POSITIONS,),
    "shared": SHARED,
}


def one_of(name: str, default: str):
    return field(default=default, metadata={"choices": CHOICES[name]})


@dataclass
class VariantConfig(GPTConfig):
    pre_ln: bool = field(default=True, metadata={"flag": False})  # here it is `residual` that says
    # gelu, relu, swish, elu, selu, sigmoid, softplus, softmax, relu2; glu and others, see GATES
    act: str = one_of("act", "gelu")
    mixing: str = one_of("mixing", "attention")  # attention, or a Synthesizer: dense, random
    norm: str = one_of("norm", "layer")  # layer or rms
    residual: str = one_of("residual", "pre_ln")  # pre_ln, post_ln, deepnorm, rezero, fixup, none
    # none, learned, sinusoidal, learned_sinusoidal, t5, shaw, alibi, rotary
    positions: str = one_of("positions", "learned")
    # sublayers from below, s (self-attention) and f (feed-forward); empty: sf, n_layer times
    order: str = ""
    shared: str = one_of("shared", "no")  # weights: no, all (ALBERT), universal
    embedding_width: int = 0  # of the tokens' vectors, which a matrix makes n_embd wide; 0: n_embd
    tied: bool = True  # let the embeddings be the output matrix too
    n_softmax: int = 1  # output: a mixture of so many softmaxes, all of whose logits are held

    def __post_init__(self):
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value} is not known: choose {', '.join(known)}")
        if set(self.order) - set("sf"):
            raise ValueError(
                f"order={self.order} has other letters than s (self-attention) and f "
                "(feed-forward): leave those out"
            )
        if self.act in GATES:
            self.n_ff = self.n_ff or math.ceil(8 * self.n_embd / 3 / 32) * 32
        if self.order:
            self.n_layer = math.ceil(len(self.order) / 2)
        super().__post_init__()
        if self.embedding_width < 0 or self.embedding_width > self.n_embd:
            raise ValueError(
                f"embedding_width={self.embedding_width} is out of range: choose 1 to "
                f"n_embd={self.n_embd}, or 0"
            )
        if not 1 <= self.n_softmax <= 1000:
            raise ValueError(f"n_softmax={self.n_softmax} is out of range: choose 1 to 1000")
        s, f = "s" in self.sublayers, "f" in self.sublayers
        added = [name for name, kind in POSITIONS.items() if kind.attending is Positions.attending]
        for setting, idle, why, choice in (
            ("mixing", not s, "the order has no s", "attention"),
            ("act", not f, "the order has no f", "gelu"),
            ("shared", self.shared == "universal" and not s, "the order has no s", "all"),
            ("norm", not RESIDUALS[self.residual].normalises, self.residual + " has none", "layer"),
            (
                "positions",
                self.positions not in added and (not s or self.mixing != "attention"),
                "nothing compares queries and keys",
                ", ".join(added),
            ),
        ):
            if idle and (value := getattr(self, setting)) != choice:
                raise ValueError(f"{setting}={value} has no effect, since {why}: choose {choice}")
        if self.shared == "universal" and self.positions != "none":
            raise ValueError(
                f"positions={self.positions} come twice, since shared=universal adds places of its "
                "own: choose none"
            )

    @property
    def sublayers(self) -> str:
        return self.order or "sf" * self.n_layer


class Variant(GPT):
    """GPT, with other parts where its config says so."""

    Config = VariantConfig
    Block = Sublayer
    head_is_product = False  # of features and embeddings: engine/cpu.py leaves it as it is

    def __init__(self, config: VariantConfig):
        nn.Module.__init__(self)
        self.config, c = config, config
        width = c.embedding_width or c.n_embd
        self.token_embedding = nn.Embedding(c.vocab_size, width)
        self.up = nn.Linear(width, c.n_embd, bias=False) if c.embedding_width else nn.Identity()
        self.position = POSITIONS[c.positions](c)
        self.dropout = Dropout(c.dropout)
        kinds = "".join(sorted(set(c.sublayers))) if c.shared != "no" else c.sublayers
        Residual, make = RESIDUALS[c.residual], {"s": MIXERS[c.mixing], "f": feed_forward}
        self.blocks = nn.ModuleList(Residual(c, make[kind](c)) for kind in kinds)
        # The block of each sublayer: the same one many times where they share their weights.
        self.path = [*map(kinds.index, c.sublayers)] if c.shared != "no" else range(len(kinds))
        if c.shared == "universal":
            self.coordinates = Sinusoidal(c)
        ends = Residual.ends_with_norm or not Residual.normalises
        self.norm = nn.Identity() if ends else NORMS[c.norm](c)
        if c.n_softmax > 1:
            self.prior = nn.Linear(c.n_embd, c.n_softmax)
            self.contexts = nn.Linear(c.n_embd, c.n_softmax * width)
        elif c.embedding_width:
            self.down = nn.Linear(c.n_embd, width, bias=False)
        else:
            self.down = nn.Identity()
        if not c.tied:
            self.lm_head = nn.Linear(width, c.vocab_size, bias=False)
        init_variant(self)

    def loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """features (B, T, C), targets (B, T) -> the cross-entropy, summed"""
        if self.config.n_softmax > 1:
            log_p, targets = self.head(features).flatten(0, -2), targets.flatten()
            return F.nll_loss(log_p, targets, reduction="sum")
        return model.cross_entropy(self.down(features), self.output_matrix, targets)[0]

    @property
    def output_matrix(self) -> Tensor:
        """(V, embedding_width)"""
        return self.token_embedding.weight if self.config.tied else self.lm_head.weight

    def features(
        self, tokens: Tensor, mask: Mask = "causal", caches: list[KVCache] | None = None
    ) -> Tensor:
        """tokens (B, T) -> features (B, T, C), as in GPT. There is a cache for each sublayer."""
        positions = model.next_positions(tokens, caches, self.config.block_size)
        x = self.dropout(self.position(self.up(self.token_embedding(tokens)), positions))
        mask, steps, depth = self.position.attending(mask), self.config.sublayers, 0
        for kind, i, cache in zip(steps, self.path, caches or [None] * len(steps), strict=True):
            if self.config.shared == "universal" and kind == "s":
                x = self.coordinates(self.coordinates(x, positions), positions.new_tensor([depth]))
                depth += 1
            x = self.blocks[i](x, mask, cache)
        return self.norm(x)

    def head(self, features: Tensor) -> Tensor:
        """features (..., C) -> logits (..., V). Those of a mixture of softmaxes are log p: the sum
        of K distributions, each with a weight that depends on the context (arXiv:1711.03953)."""
        K = self.config.n_softmax
        if K == 1:
            return self.products(self.down(features))
        contexts = self.contexts(features).tanh().unflatten(-1, (K, -1))
        log_p = self.products(contexts).float().log_softmax(-1)  # (..., K, V)
        prior = self.prior(features).float().log_softmax(-1)
        return (log_p + prior[..., None]).logsumexp(-2)

    def products(self, x: Tensor) -> Tensor:
        """x (..., embedding_width) -> (..., V)"""
        return F.linear(x, self.token_embedding.weight) if self.config.tied else self.lm_head(x)

    def make_caches(self) -> list[KVCache]:
        return [KVCache(self.config.block_size) for _ in self.path]

    def flops_per_token(self) -> int:
        """As GPT's; a block counts as often as a token goes through it."""
        c, count = self.config, model.count_parameters
        width, K = self.token_embedding.embedding_dim, c.n_softmax
        # A Synthesizer makes no products of queries and keys: it has only those with the values.
        seen = (12 if c.mixing == "attention" else 6) * c.n_embd * c.block_size
        weights = K * c.vocab_size * width + count(self.up) + count(self.norm)
        weights += count(self.prior) + count(self.contexts) if K > 1 else count(self.down)
        weights += sum(count(self.blocks[i]) for i in self.path)
        if c.mixing == "random":
            weights -= c.sublayers.count("s") * c.n_head * c.block_size**2
        return 6 * weights + seen * c.sublayers.count("s")


def init_variant(network: Variant) -> None:
    """GPT's laws, and then those of the residual connection.

    tensor                                               law
    every matrix, table and Synthesizer's scores         N(0, 0.02)
    sublayer.proj                             weight     N(0, 0.02 / sqrt(n)), n sublayers
    every                                     bias       0
    every norm, frequencies, Fixup's scale               1

    deepnorm: sublayer.q, sublayer.k          weight     N(0, sqrt(2 / (inputs + outputs)))
    deepnorm: the other matrices of sublayers weight     the same, times (4 n)^(-1/4)
    fixup: sublayer.v, .fc, .gate             weight     N(0, 0.02 / sqrt(n))
    fixup: sublayer.proj                      weight     0
    rezero: alpha                                        0
    """
    n = len(network.config.sublayers)

    def matrix(name: str, weight: Tensor) -> None:
        nn.init.normal_(weight, std=0.02 / n**0.5 if name.endswith("proj.weight") else 0.02)

    model.initialise(network, matrix)
    for block in network.blocks:
        block.initialise()


if __name__ == "__main__":  # a verse learnt by heart, by some variants
    text = "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye"
    letters = sorted(set(text))
    tokens = torch.tensor([[letters.index(c) for c in text]])
    for settings in (
        {},
        {"act": "swiglu", "norm": "rms", "positions": "rotary"},
        {"residual": "rezero"},
        {"order": "ssff", "shared": "all"},
        {"mixing": "random"},
        {"order": "ffff", "positions": "none"},
    ):
        torch.manual_seed(1)
        sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": len(text)}
        network = Variant(VariantConfig(len(letters), **sizes, **settings))
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        for _step in range(61):
            loss = network(tokens[:, :-1], tokens[:, 1:])["loss"] / (len(text) - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        named = ", ".join(f"{k} {v}" for k, v in settings.items()) or "GPT"
        print(f"{named:<42} loss {loss.item():.3f}")
