"""Language models that read a fixed number of tokens: the neural network of Bengio et al. 2003, an
average of words, and a gated causal convolution.

    NNLM      the embeddings of the last n tokens, one after the other, are the input of one hidden
              layer; where a token stands decides which weights it meets
    CBOW      the mean of those embeddings: the order of the tokens is lost. (The model of that name
              also looks to the right, which a language model cannot)
    GatedCNN  every layer sees a few tokens back, k of them, and hence n layers n · (k - 1): the
              context grows with depth, as it does for pixels. Layers are residual, and half of the
              channels of each decide by a sigmoid how much of the others passes

All three compute every place of a window at once. Before the beginning of a window there are zeros.
`python -m models.feedforward` lets them learn a verse.

Left out: hierarchical and sampled softmax, which large vocabularies needed in their time.

Papers: Bengio et al. 2003, "A Neural Probabilistic Language Model" (JMLR 3); Mikolov et al. 2013
(CBOW, arXiv:1301.3781); Dauphin et al. 2017, "Language Modeling with Gated Convolutional Networks"
(arXiv:1612.08083).
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import model

LARGEST = 2**24  # of each size: beyond that, even describing a network takes minutes


@dataclass
class FeedforwardConfig:
    vocab_size: int = 8192  # tokens to learn (GPT-2's: 50257)
    block_size: int = 128  # tokens of a window; contexts are shorter at its beginning
    n_embd: int = 128  # width of an embedding

    def __post_init__(self):
        for name, value in vars(self).items():
            if name == "dropout" and not 0 <= value < 1:
                raise ValueError(f"{name}={value} is out of range: choose 0 or more, less than 1")
            if name not in ("dropout", "direct") and not 1 <= value <= LARGEST:
                raise ValueError(f"{name}={value} is out of range: choose 1 to {LARGEST:,}")


@dataclass
class NNLMConfig(FeedforwardConfig):
    context: int = 16  # tokens that are seen
    n_hidden: int = 512  # width of the hidden layer
    direct: bool = False  # connections from the embeddings to the output, past the hidden layer
    dropout: float = 0.0  # of the hidden layer


@dataclass
class CBOWConfig(FeedforwardConfig):
    context: int = 8  # tokens that are averaged


@dataclass
class GatedCNNConfig(FeedforwardConfig):
    n_embd: int = 256  # width of embeddings and layers
    n_layer: int = 8  # layers, of one convolution each
    kernel: int = 4  # tokens that a layer sees, its own among them
    dropout: float = 0.0  # of what each layer adds


# ---- what the three share ------------------------------------------------------------------------


class Feedforward(nn.Module):
    """A network whose features at a place depend on `reach` tokens, the last of which is there.

    Subclasses make `features_of`, and `head`, the linear layer from features (..., C) to logits.
    """

    reach: int

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, caches: list[Tensor] | None = None
    ) -> Tensor | dict[str, Tensor]:
        """tokens (B, T) -> logits (B, T, V), or, given targets (B, T), {"loss": summed loss}.
        Targets of -100 do not count."""
        features = self.features(tokens, caches)
        if targets is None:
            return self.head(features)
        weight, bias = self.head.weight, self.head.bias
        return {"loss": model.cross_entropy(features, weight, targets, bias=bias)[0]}

    def features(self, tokens: Tensor, caches: list[Tensor] | None = None) -> Tensor:
        """tokens (B, T) -> features (B, T, C). With caches, they continue the tokens before."""
        T = tokens.size(1)
        if caches is not None:  # as many earlier tokens as the first new one depends on
            tokens = torch.cat([*caches, tokens], 1)
            caches[:] = [tokens[:, max(0, tokens.size(1) - self.reach + 1) :]]
        return self.features_of(tokens)[:, -T:]

    def make_caches(self) -> list[Tensor]:
        return []

    def flops_per_token(self) -> int:
        """Of training: 6 for each weight that multiplies, which embeddings do not."""
        return 6 * (model.count_parameters(self) - self.token_embedding.weight.numel())


def last_tokens(x: Tensor, n: int) -> Tensor:
    """x (B, T, C) -> (B, T, n, C): for each place the n places that end there, zeros before the
    first."""
    return F.pad(x, (0, 0, n - 1, 0)).unfold(1, n, 1).transpose(2, 3)


# ---- the three -----------------------------------------------------------------------------------


class NNLM(Feedforward):
    """y = U tanh(H x) + W x + biases; x: the context's embeddings side by side; W if `direct`."""

    Config = NNLMConfig

    def __init__(self, config: NNLMConfig):
        super().__init__()
        self.config, self.reach = config, config.context
        inputs = config.context * config.n_embd
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.hidden = nn.Linear(inputs, config.n_hidden)
        self.dropout = model.Dropout(config.dropout)
        self.head = nn.Linear(config.n_hidden + inputs * config.direct, config.vocab_size)
        init_feedforward(self)

    def features_of(self, tokens: Tensor) -> Tensor:
        x = last_tokens(self.token_embedding(tokens), self.config.context).flatten(2)
        h = self.dropout(torch.tanh(self.hidden(x)))
        return torch.cat([h, x.to(h.dtype)], -1) if self.config.direct else h


class CBOW(Feedforward):
    """The mean of the context's embeddings, and an output matrix."""

    Config = CBOWConfig

    def __init__(self, config: CBOWConfig):
        super().__init__()
        self.config, self.reach = config, config.context
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)
        init_feedforward(self)

    def features_of(self, tokens: Tensor) -> Tensor:
        n = self.config.context
        places = torch.arange(1, tokens.size(1) + 1, device=tokens.device).clamp(max=n)
        return last_tokens(self.token_embedding(tokens), n).sum(2) / places[:, None]


class GatedConvolution(nn.Module):
    """x + (A * x) · sigmoid(B * x), where * is a convolution that sees no later place."""

    def __init__(self, width: int, kernel: int, dropout: float):
        super().__init__()
        self.kernel = kernel
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Linear(kernel * width, 2 * width)
        self.dropout = model.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        seen = last_tokens(self.norm(x), self.kernel).flatten(2)  # one product for all places
        return x + self.dropout(F.glu(self.conv(seen), -1))


class GatedCNN(Feedforward):
    """Gated convolutions on top of each other; normalised first, as in a pre-LN Transformer."""

    Config = GatedCNNConfig

    def __init__(self, config: GatedCNNConfig):
        super().__init__()
        self.config, self.reach = config, 1 + config.n_layer * (config.kernel - 1)
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(
            GatedConvolution(config.n_embd, config.kernel, config.dropout)
            for _ in range(config.n_layer)
        )
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)
        init_feedforward(self)

    def features_of(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def init_feedforward(network: Feedforward) -> None:
    """Sets all weights.

    tensor              law
    token_embedding     N(0, 0.1)
    every matrix        N(0, 1 / sqrt(its inputs)), so that outputs are as large as inputs
    every bias          0; every norm's weight 1
    """

    def matrix(name: str, weight: Tensor) -> None:
        nn.init.normal_(weight, std=0.1 if name.startswith("token") else weight.size(1) ** -0.5)

    model.initialise(network, matrix)


if __name__ == "__main__":  # the three learn a verse by heart, as far as they can
    text = "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye"
    letters = sorted(set(text))
    tokens = torch.tensor([[letters.index(c) for c in text]])
    for Model in (CBOW, NNLM, GatedCNN):
        torch.manual_seed(1)
        net = Model(Model.Config(len(letters), len(text), n_embd=32))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        losses = []
        for _ in range(81):
            loss = net(tokens[:, :-1], tokens[:, 1:])["loss"] / (len(text) - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        caches, written = net.make_caches(), tokens[:, :5]
        new = written
        with torch.no_grad():
            while written.size(1) < len(text):
                new = net(new, caches=caches)[:, -1:].argmax(-1)
                written = torch.cat([written, new], 1)
        print(f"{Model.__name__:9}" + "  ".join(f"loss {loss:.3f}" for loss in losses[::20]))
        print(repr("".join(letters[i] for i in written[0].tolist())))
