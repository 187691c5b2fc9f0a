"""Recurrent language models: RNN, GRU and LSTM, cell by cell.

One token after the other changes a state of fixed size, which is all that the model knows of the
text so far. With the token's embedding x and the state h, and biases in both products:

    RNN     h = tanh(W x + U h)
    GRU     r, z = sigmoid(W x + U h)         n = tanh(W x + r · (U h))
            h = (1 - z) · n + z · h
    LSTM    i, f, o = sigmoid(W x + U h)      g = tanh(W x + U h)
            c = f · c + i · g                 h = o · tanh(c)

In the RNN a gradient passes through tanh and U at every step, and so vanishes or explodes; in the
others there is a way along which it is only multiplied by z or f (lab/gradients.py shows both).

A state can be carried from one window of a text to the next, in the order of the text. Gradients
end at the window's beginning: backpropagation through time, truncated. `tasks/stream.py` has such
batches. A sampled text carries its state likewise, where a Transformer has a cache.

Regularisation is that of AWD-LSTM: a dropout that is the same at all places of a window, and a
dropout on U, new for every window. `python -m models.recurrent` lets the three learn a verse.

Left out: peepholes, projections, both directions, layers of different widths.

Papers: Elman 1990; Hochreiter and Schmidhuber 1997, Gers et al. 2000 (LSTM, and its forget gate);
Cho et al. 2014 (GRU, arXiv:1406.1078); Gal and Ghahramani 2016 (locked dropout, arXiv:1512.05287);
Merity et al. 2018 (AWD-LSTM, arXiv:1708.02182); Press and Wolf 2017 (tied embeddings,
arXiv:1608.05859).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import model

LARGEST = 2**24  # of each size: beyond that, even describing a network takes minutes


@dataclass
class RecurrentConfig:
    vocab_size: int = 8192  # tokens to learn (GPT-2's: 50257)
    block_size: int = 128  # tokens of a window, through which gradients go back
    n_layer: int = 2  # layers, each of which reads the states of the one below
    n_embd: int = 384  # width of embeddings and states
    dropout: float = 0.0  # of embeddings and states, the same at all places of a window
    weight_dropout: float = 0.0  # of the matrices from state to state, new for each window
    # let the embeddings be the output matrix too. The embedding of a token that is hardly ever seen
    # then becomes large, because it is never right, and where it is read it spoils the state
    tied: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_embd"):
            if not 1 <= (value := getattr(self, name)) <= LARGEST:
                raise ValueError(f"{name}={value} is out of range: choose 1 to {LARGEST:,}")
        for name in ("dropout", "weight_dropout"):
            if not 0 <= getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(f"{name}={value} is out of range: choose 0 or more, less than 1")


# ---- cells ---------------------------------------------------------------------------------------
# Each takes W x + b and U h + b' of one token, (B, gates · C), and the state, a tuple of (B, C)
# that begins with h; and returns the new state. The order of the gates is torch.nn's.

State = tuple[Tensor, ...]


def rnn_cell(wx: Tensor, uh: Tensor, state: State) -> State:
    return (torch.tanh(wx + uh),)


def gru_cell(wx: Tensor, uh: Tensor, state: State) -> State:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = wx.chunk(3, -1), uh.chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)  # the reset comes after the product with U, as in cuDNN
    return ((1 - z) * n + z * state[0],)


def lstm_cell(wx: Tensor, uh: Tensor, state: State) -> State:
    i, f, g, o = (wx + uh).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


Cell = Callable[[Tensor, Tensor, State], State]


def plain_layer(
    cell: Cell, x: Tensor, state: State, W: Tensor, U: Tensor, b_w: Tensor, b_u: Tensor
) -> tuple[Tensor, State]:
    """x (B, T, C), state of (B, C), W and U (gates · C, C) -> (all h (B, T, C), the last state)."""
    wx, found = F.linear(x, W, b_w), []  # the inputs of all places at once
    for t in range(x.size(1)):
        state = cell(wx[:, t], F.linear(state[0], U, b_u), state)
        found.append(state[0])
    return torch.stack(found, 1), state


# engine/kernels.py assigns torch's own form, whose loop is not in Python, to this name.
layer_kernel = plain_layer


# ---- layers and model ----------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, cell: Cell, gates: int, width: int, weight_dropout: float):
        super().__init__()
        self.cell, self.weight_dropout = cell, weight_dropout
        self.input = nn.Linear(width, gates * width)
        self.recurrent = nn.Linear(width, gates * width)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x (B, T, C) -> (states (B, T, C), the last state)"""
        U = self.recurrent.weight
        if self.training and self.weight_dropout:
            # A new matrix each time. To write it into the parameter, as was often done, may leave
            # torch with the old one, and the dropout without effect.
            U = F.dropout(U, self.weight_dropout)
        W, b_w, b_u = self.input.weight, self.input.bias, self.recurrent.bias
        return layer_kernel(self.cell, x, state, W, U, b_w, b_u)


class Recurrent(nn.Module):
    """Embeddings, layers of one kind of cell, and a linear layer to logits."""

    Config = RecurrentConfig
    cell: Cell
    gates: int  # of the cell
    parts: int  # of its state
    endless = True  # generation goes on with its state: nothing is dropped at block_size

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(
            Layer(self.cell, self.gates, config.n_embd, config.weight_dropout)
            for _ in range(config.n_layer)
        )
        self.head = nn.Linear(config.n_embd, config.vocab_size)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        # What is carried from window to window in training, and in an evaluation. The first is part
        # of a checkpoint: a resumed run goes on with it.
        self.register_buffer("state", self.empty_state(0))
        self.register_buffer("scoring_state", self.empty_state(0), persistent=False)
        init_recurrent(self)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        keep: Tensor | None = None,
        caches: list[Tensor] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """tokens (B, T) -> logits (B, T, V), or, given targets (B, T), {"loss": summed loss}.

        Targets of -100 do not count. keep (B,) says which rows go on where the same row of the last
        call ended; without it all begin with an empty state, and nothing is carried.
        """
        if keep is None:
            features = self.features(tokens, caches)
        else:
            name = "state" if self.training else "scoring_state"
            state = getattr(self, name)
            if state.size(2) != len(keep):
                state = self.empty_state(len(keep))
            features, state = self.read(tokens, state.masked_fill(~keep[:, None], 0.0))
            setattr(self, name, state.detach())
        if targets is None:
            return self.head(features)
        weight, bias = self.head.weight, self.head.bias
        return {"loss": model.cross_entropy(features, weight, targets, bias=bias)[0]}

    def empty_state(self, B: int) -> Tensor:
        """(parts of a cell's state, layers, B, C), zeros"""
        c = self.config
        return self.token_embedding.weight.new_zeros(self.parts, c.n_layer, B, c.n_embd)

    def read(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, T) -> (features (B, T, C), the state behind them)"""
        x, last = self.drop(self.token_embedding(tokens)), []
        for layer, before in zip(self.layers, state.to(x.dtype).unbind(1), strict=True):
            x, after = layer(x, before.unbind(0))
            x = self.drop(x)
            last.append(torch.stack(after))
        return x, torch.stack(last, 1)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of x (B, T, C) with one mask (B, 1, C) for all places."""
        if not (self.training and self.config.dropout):
            return x
        return x * F.dropout(torch.ones_like(x[:, :1]), self.config.dropout)

    def features(self, tokens: Tensor, caches: list[Tensor] | None = None) -> Tensor:
        """tokens (B, T) -> features (B, T, C). With caches, they continue what was read before."""
        features, state = self.read(tokens, caches[0] if caches else self.empty_state(len(tokens)))
        if caches is not None:
            caches[:] = [state]
        return features

    def make_caches(self) -> list[Tensor]:
        return []

    def flops_per_token(self) -> int:
        """Of training: 6 for each weight that multiplies, which embeddings do not."""
        embeddings = 0 if self.config.tied else self.token_embedding.weight.numel()
        return 6 * (model.count_parameters(self) - embeddings)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        """Makes room for a state that was carried: its rows are those of the batch."""
        if (saved := state_dict.get(f"{prefix}state")) is not None and saved.dim() == 4:
            self.state = self.empty_state(saved.size(2))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class RNN(Recurrent):
    cell, gates, parts = staticmethod(rnn_cell), 1, 1


class GRU(Recurrent):
    cell, gates, parts = staticmethod(gru_cell), 3, 1


class LSTM(Recurrent):
    cell, gates, parts = staticmethod(lstm_cell), 4, 2


def init_recurrent(network: Recurrent) -> None:
    """Sets all weights.

    tensor                        law
    token_embedding, head weight  uniform, -0.1 to 0.1
    input, recurrent     weight   uniform, ± 1 / sqrt(C)
    every                bias     0; 1 for the LSTM's f, so that it remembers at first (Jozefowicz
                                  et al. 2015, section 2.2)
    """
    C = network.config.n_embd
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            bound = 0.1 if name.startswith(("token", "head")) else C**-0.5
            nn.init.uniform_(parameter, -bound, bound)
    if network.cell is lstm_cell:
        for layer in network.layers:
            nn.init.ones_(layer.input.bias[C : 2 * C])


if __name__ == "__main__":  # the three learn a verse by heart, then recite it from its first word
    text = "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye"
    letters = sorted(set(text))
    tokens = torch.tensor([[letters.index(c) for c in text]])
    for Model in (RNN, GRU, LSTM):
        torch.manual_seed(1)
        net = Model(RecurrentConfig(len(letters), len(text), n_layer=1, n_embd=64))
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
        print(f"{Model.__name__:4}  " + "  ".join(f"loss {loss:.3f}" for loss in losses[::20]))
        print(repr("".join(letters[i] for i in written[0].tolist())))
