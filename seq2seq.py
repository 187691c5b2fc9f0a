"""The encoder-decoder Transformer of 2017, which reads one sequence and writes another.

The encoder turns the source into memory. The decoder writes the target one token at a time; each
position looks back at the tokens before it and across at the memory. As in the paper, blocks
normalise after each sublayer, positions are sinusoids, and one matrix is source embedding, target
embedding and output projection.

Left out on purpose: learned or relative positions, separate vocabularies, layers of different
sizes. Greedy decoding, beam search and sampling are in `decoding.py` and `tasks/translation.py`.
The file needs torch and `model.py`; `python seq2seq.py` learns to write digits in reverse.

Papers: Attention Is All You Need (Vaswani et al. 2017, arXiv:1706.03762); one matrix for three:
Press and Wolf 2017 (arXiv:1608.05859); label smoothing: Szegedy et al. 2016 (arXiv:1512.00567).
Axes as in `model.py`; S counts source positions, T target positions.
"""

from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import model
from model import Block, Dropout, KVCache, check_sizes, count_parameters, initialise, padding_mask

# The paper has relu; Marian's models on the hub have silu (swish) or another of these.
ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


@dataclass
class Seq2SeqConfig:
    vocab_size: int = 37000  # tokens, one vocabulary for source and target
    block_size: int = 512  # longest source or target, in tokens, its end token included
    n_layer: int = 6  # blocks in the encoder, and as many in the decoder
    n_head: int = 8  # attention heads; must divide n_embd
    n_embd: int = 512  # width of the residual stream
    n_ff: int = 0  # width inside the MLP; 0 means 4 x n_embd
    dropout: float = 0.1  # probability, in embeddings and residual branches (section 5.4)
    attention_dropout: float = 0.0  # probability that a query misses a key; the paper has none
    bias: bool = True  # biases in the linear layers and the LayerNorms
    ln_eps: float = 1e-5  # added to the variance in LayerNorm
    label_smoothing: float = 0.1  # probability that the target spreads over all tokens
    activation: str = "relu"  # inside the MLP: relu, silu or gelu
    # Adds a number to each token's logit: imported models have these, and no training changes them.
    output_bias: bool = field(default=False, metadata={"flag": False})

    def __post_init__(self):
        self.n_ff = self.n_ff or 4 * self.n_embd
        check_sizes(self, "dropout", "attention_dropout", "label_smoothing")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation} is not known: choose {', '.join(ACTIVATIONS)}"
            )
        if self.n_embd % 2:
            raise ValueError(
                f"n_embd={self.n_embd} is odd, but positions are pairs of a sine and a cosine: "
                f"choose {self.n_embd + 1}"
            )


def sinusoids(T: int, C: int) -> Tensor:
    """(T, C): sin and cos of pos / 10000^(2i/C) in the columns 2i and 2i + 1 (section 3.5)."""
    position = torch.arange(T, dtype=torch.float64)[:, None]
    angle = position / 10000 ** (torch.arange(0, C, 2, dtype=torch.float64) / C)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


class Seq2Seq(nn.Module):
    """The encoder, the decoder, and the one matrix that they share with the output."""

    Config = Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        positions = sinusoids(config.block_size, config.n_embd)
        self.register_buffer("positions", positions, persistent=False)
        bias = torch.zeros(config.vocab_size) if config.output_bias else None
        self.register_buffer("output_bias", bias)
        self.dropout, act = Dropout(config.dropout), ACTIVATIONS[config.activation]
        self.encoder = nn.ModuleList(
            Block(config, pre_ln=False, act=act) for _ in range(config.n_layer)
        )
        self.decoder = nn.ModuleList(
            Block(config, pre_ln=False, act=act, cross=True) for _ in range(config.n_layer)
        )
        init_seq2seq(self)

    def forward(
        self,
        source: Tensor,
        tokens: Tensor,
        targets: Tensor | None = None,
        source_keep: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """source (B, S), tokens (B, T) -> logits (B, T, V), or, given targets (B, T),
        {"loss": summed smoothed loss, "nll": summed negative log-likelihood of the targets}.

        tokens are the targets moved one place to the right, behind the start token: the decoder
        always reads the right words, not those that it would have written (teacher forcing).
        source_keep (B, S) is False at padding; None: there is none. Padding of the target needs no
        mask: it comes last, where no real position looks, and its targets are -100, which do not
        count.
        """
        features = self.decode(tokens, self.encode(source, source_keep), source_keep)
        if targets is None:
            return self.head(features)
        weight, smoothing = self.token_embedding.weight, self.config.label_smoothing
        loss, nll, _ = model.cross_entropy(features, weight, targets, smoothing, self.output_bias)
        return {"loss": loss, "nll": nll}

    def embed(self, tokens: Tensor, past: int = 0) -> Tensor:
        """tokens (B, T) -> (B, T, C): embeddings times sqrt(C), plus positions (sections 3.4, 3.5).

        `past` positions came before. Raises ValueError for more than block_size positions.
        """
        end, block_size = past + tokens.size(1), self.config.block_size
        if end > block_size:
            raise ValueError(
                f"{end} positions are more than block_size={block_size}: shorten the input"
            )
        x = self.token_embedding(tokens) * self.config.n_embd**0.5
        return self.dropout(x + self.positions[past:end])

    def encode(self, source: Tensor, source_keep: Tensor | None = None) -> Tensor:
        """source (B, S) -> memory (B, S, C)"""
        mask = None if source_keep is None else padding_mask(source_keep)
        x = self.embed(source)
        for block in self.encoder:
            x = block(x, mask=mask)
        return x

    def decode(
        self,
        tokens: Tensor,
        memory: Tensor,
        source_keep: Tensor | None = None,
        caches: list[tuple[KVCache, KVCache]] | None = None,
    ) -> Tensor:
        """tokens (B, T), memory (B, S, C) -> features (B, T, C), which the head turns into logits.

        With caches, one pair for each block, the tokens continue what the caches hold. tokens may
        have K times as many rows as memory: each memory then serves K consecutive rows.
        """
        mask = None if source_keep is None else padding_mask(source_keep)
        caches = caches or [(None, None)] * len(self.decoder)
        x = self.embed(tokens, caches[0][0].length if caches[0][0] else 0)
        for block, (own, across) in zip(self.decoder, caches, strict=True):
            x = block(x, "causal", memory, mask, own, across)
        return x

    def head(self, features: Tensor) -> Tensor:
        """features (..., C) -> logits (..., V): the products with all token embeddings."""
        return F.linear(features, self.token_embedding.weight, self.output_bias)

    def make_caches(self, source_len: int, target_len: int) -> list[tuple[KVCache, KVCache]]:
        """For each block of the decoder, a cache of its own keys and values and one of memory's."""
        return [(KVCache(target_len), KVCache(source_len)) for _ in self.decoder]

    def flops_per_token(self) -> int:
        """Training on one target token, with source and target of T = block_size tokens, takes 6
        for each weight that multiplies and 12·C·T for each of three attentions in L layers."""
        c = self.config
        return 6 * count_parameters(self) + 3 * 12 * c.n_layer * c.n_embd * c.block_size


def init_seq2seq(model: Seq2Seq) -> None:
    """The paper gives no law of initialisation; this is that of its code, tensor2tensor.

    tensor                          law
    token_embedding                 N(0, 1 / sqrt(C)): times sqrt(C), inputs have unit variance
    every Linear        weight      uniform in ± sqrt(6 / (inputs + outputs)) (Glorot and Bengio)
    every               bias        0
    every LayerNorm     weight      1
    """

    def matrix(name: str, weight: Tensor) -> None:
        if name == "token_embedding.weight":
            nn.init.normal_(weight, std=model.config.n_embd**-0.5)
        else:
            nn.init.xavier_uniform_(weight)

    initialise(model, matrix)


if __name__ == "__main__":  # learn to write six digits in reverse
    torch.manual_seed(1)
    START, sizes = 10, {"n_layer": 1, "n_head": 4, "n_embd": 64, "dropout": 0.0}
    reverser = Seq2Seq(Seq2SeqConfig(vocab_size=11, block_size=6, label_smoothing=0.0, **sizes))
    optimizer = torch.optim.AdamW(reverser.parameters(), lr=2e-3)
    for step in range(121):
        source = torch.randint(10, (64, 6))
        targets = source.flip(1)
        tokens = F.pad(targets[:, :-1], (1, 0), value=START)  # one place to the right
        loss = reverser(source, tokens, targets)["loss"] / targets.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:3}   loss {loss.item():.3f}")
    source, written = torch.randint(10, (3, 6)), torch.full((3, 1), START)
    with torch.no_grad():
        memory, caches = reverser.encode(source), reverser.make_caches(6, 6)
        for _ in range(6):  # the likeliest digit, which is then read
            features = reverser.decode(written[:, -1:], memory, caches=caches)
            written = torch.cat([written, reverser.head(features).argmax(-1)], 1)
    for read, wrote in zip(source.tolist(), written[:, 1:].tolist(), strict=True):
        print("".join(map(str, read)), "->", "".join(map(str, wrote)))
