"""Backpropagation by hand, and what becomes of a gradient on its way back through time and depth.

    python -m lab.gradients                 four tables and a picture, half a minute

1. The smallest examples, node by node: f = (x + y) · z, and a neuron with a sigmoid. The numbers
   behind the slash are the gradients of the last node; autograd confirms them.
2. An RNN's gradient as a product of matrices: dh_T/dh_t is the product of diag(1 - h²) U over the
   steps between, so its norm falls or rises like a power of U's largest eigenvalue; tanh, where it
   saturates, makes it smaller. The picture shows that norm against the distance T - t, beside those
   of GRU, LSTM and a pre-LN Transformer, all at their initialisation.
3. Units that do not learn: sigmoids that are saturated, by the size of the initial weights, and
   ReLUs that are never on, by that of the biases.

Left out: clipping, and what training does to all this.

Papers: Rumelhart, Hinton and Williams 1986; Bengio, Simard and Frasconi 1994, "Learning Long-Term
Dependencies with Gradient Descent is Difficult"; Pascanu et al. 2013 (arXiv:1211.5063); Glorot and
Bengio 2010; He et al. 2015 (arXiv:1502.01852).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine import cli
from lab.pictures import new_figure, new_picture, save
from model import GPT, GPTConfig
from models.recurrent import GRU, LSTM, RNN, RecurrentConfig
from tasks.flags import check, ranged


@dataclass
class GradientsConfig:
    length: int = ranged(100, 2, 10_000)  # steps back in time
    width: int = ranged(64, 4, 4096)  # of the states
    seed: int = ranged(0, 0)  # of the weights and inputs
    out: str = "out/gradients.png"  # the picture

    def __post_init__(self):
        check(self)
        if self.width % 4:
            raise ValueError(f"--width {self.width} cannot be divided by 4 heads: choose another")


# ---- node by node --------------------------------------------------------------------------------


class Node:
    """A number that knows what it was made of, and the derivative of itself by each of that."""

    def __init__(self, value: float, name: str, parts: tuple[tuple[Node, float], ...] = ()):
        self.value, self.name, self.parts, self.grad = value, name, parts, 0.0

    def __add__(self, other: Node) -> Node:
        name = f"({self.name} + {other.name})"
        return Node(self.value + other.value, name, ((self, 1.0), (other, 1.0)))

    def __mul__(self, other: Node) -> Node:
        name = f"{self.name}·{other.name}"
        return Node(self.value * other.value, name, ((self, other.value), (other, self.value)))

    def sigmoid(self) -> Node:
        s = 1 / (1 + math.exp(-self.value))
        return Node(s, f"sigmoid{self.name}", ((self, s * (1 - s)),))

    def backward(self) -> list[Node]:
        """Sets grad of all nodes to the derivative of this one by them, from here to the leaves; a
        node that is used twice adds up both. Returns them in that order."""
        order: list[Node] = []

        def visit(node: Node) -> None:
            if node not in order:
                for part, _ in node.parts:
                    visit(part)
                order.append(node)

        visit(self)
        self.grad = 1.0
        for node in reversed(order):
            for part, derivative in node.parts:
                part.grad += derivative * node.grad  # the chain rule
        return order[::-1]


def product_of_sum(x: Node, y: Node, z: Node) -> Node:
    return (x + y) * z


def neuron(w0: Node, x0: Node, w1: Node, x1: Node, w2: Node) -> Node:
    return (w0 * x0 + w1 * x1 + w2).sigmoid()


EXAMPLES = {
    "f = (x + y)·z": (product_of_sum, {"x": -2.0, "y": 5.0, "z": -4.0}),
    "f = sigmoid(w0·x0 + w1·x1 + w2)": (
        neuron,
        {"w0": 2.0, "x0": -1.0, "w1": -3.0, "x1": -2.0, "w2": -3.0},
    ),
}


def show_example(title: str, function: Callable[..., Node], values: dict[str, float]) -> str:
    """All nodes of an example from the result back to the inputs: value / gradient."""
    nodes = function(*(Node(value, name) for name, value in values.items())).backward()
    lines = [f"{node.value:8.3f} / {node.grad:7.3f}   {node.name}" for node in nodes]
    return "\n".join([title, *lines])


# ---- back through time ---------------------------------------------------------------------------


def rnn_states(U: Tensor, inputs: Tensor) -> Tensor:
    """U (C, C), inputs (T, C) -> h (T + 1, C), from h_0 = 0 on: h_t = tanh(U h_{t-1} + input_t)."""
    h = [torch.zeros(len(U), dtype=U.dtype)]
    for x in inputs:
        h.append(torch.tanh(U @ h[-1] + x))
    return torch.stack(h)


def products(U: Tensor, h: Tensor) -> list[Tensor]:
    """dh_T/dh_t for t = T, T - 1, …, 0: each is the one before, times diag(1 - h²) U."""
    found = [torch.eye(len(U), dtype=U.dtype)]
    for state in h[1:].flip(0):
        found.append(found[-1] @ ((1 - state**2)[:, None] * U))
    return found


def with_radius(U: Tensor, radius: float) -> Tensor:
    """U, scaled so that its largest eigenvalue has this absolute value."""
    return U * (radius / torch.linalg.eigvals(U).abs().max())


def norm(jacobian: Tensor) -> float:
    """The root mean square of what a unit vector becomes: 1 for the identity."""
    return (jacobian.norm() / math.sqrt(len(jacobian))).item()


def rnn_curve(radius: float, config: GradientsConfig) -> list[float]:
    """Norms of dh_T/dh_t against T - t, for an RNN without weights for its inputs."""
    torch.manual_seed(config.seed)
    C = config.width
    U = with_radius(torch.randn(C, C, dtype=torch.double), radius)
    inputs = 0.1 * torch.randn(config.length, C, dtype=torch.double)
    return [norm(product) for product in products(U, rnn_states(U, inputs))]


def recurrent_curve(Model: type, config: GradientsConfig) -> list[float]:
    """Norms of the last state's derivative by each earlier state, whole states (an LSTM's h and c),
    of models/recurrent.py with one layer."""
    torch.manual_seed(config.seed)
    C, T = config.width, config.length
    network = Model(RecurrentConfig(vocab_size=64, block_size=T, n_layer=1, n_embd=C)).double()
    state, states = network.empty_state(1), []
    for token in torch.randint(64, (T,)):
        states.append(state.requires_grad_())
        state = network.read(token.view(1, 1), state)[1]
    last = state.flatten()
    rows = [torch.autograd.grad(x, states, retain_graph=True) for x in last]
    jacobians = [torch.stack([row[t].flatten() for row in rows]) for t in range(T)]
    return [1.0, *(norm(jacobian) for jacobian in reversed(jacobians))]


def transformer_curve(config: GradientsConfig) -> list[float]:
    """Norms of the last place's features by the embedding at each place, of a pre-LN GPT of four
    blocks. Distance 0 is the place itself, which the residual stream reaches directly."""
    torch.manual_seed(config.seed)
    C, T = config.width, config.length
    network = GPT(GPTConfig(64, T + 1, n_layer=4, n_head=4, n_embd=C)).double().eval()
    x = network.token_embedding(torch.randint(64, (1, T + 1)))
    x = (x + network.position_embedding.weight).detach().requires_grad_()
    y = x
    for block in network.blocks:
        y = block(y, mask="causal")
    rows = [torch.autograd.grad(out, x, retain_graph=True)[0][0] for out in y[0, -1]]
    jacobians = torch.stack(rows, 1)  # (T + 1, C of the features, C of the embedding)
    return [norm(jacobian) for jacobian in jacobians.flip(0)]


RADII = (0.5, 0.9, 1.0, 1.5, 2.0)


def all_curves(config: GradientsConfig) -> dict[str, list[float]]:
    curves = {f"RNN, radius {radius}": rnn_curve(radius, config) for radius in RADII}
    curves |= {M.__name__: recurrent_curve(M, config) for M in (RNN, GRU, LSTM)}
    return {**curves, "Transformer": transformer_curve(config)}


def show_curves(curves: dict[str, list[float]]) -> str:
    length = len(next(iter(curves.values()))) - 1
    marks = sorted({1, 10, length // 2, length} & set(range(length + 1)))
    rows = [f"{'norm of the derivative at distance':<36}" + "".join(f"{d:>11}" for d in marks)]
    rows += [f"{n:<36}" + "".join(f"{c[d]:>11.2g}" for d in marks) for n, c in curves.items()]
    return "\n".join(rows)


OURS = "gradients.py of this project"  # marks the picture, which may be written over


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Draws all curves on a logarithmic scale: a factor for each step is a straight line."""
    figure = new_figure(path, 8, 5)
    if figure is None:
        return
    axes = figure.subplots()
    for name, curve in curves.items():
        style = {"ls": "--", "lw": 1} if name.startswith("RNN,") else {"lw": 2}
        axes.semilogy([max(value, 1e-16) for value in curve], label=name, **style)
    axes.set_xlabel("steps back from the last")
    axes.set_ylabel("size of the derivative of the last state")
    axes.set_title("What is left of a gradient, before any training")
    axes.set_ylim(1e-9, 1e9)
    axes.legend(fontsize=8)
    save(figure, path, OURS)
    print(f"picture: {path}")


# ---- units that do not learn ---------------------------------------------------------------------

SCALES = (0.1, 1.0, 2.0, 5.0, 20.0)  # of weights, in units of 1 / sqrt(inputs)
BIASES = (0.0, -0.25, -0.5, -1.0, -2.0)
INPUTS, LAYERS = 256, 5


def saturated_sigmoids(scale: float, seed: int) -> float:
    """The share of units in the last of some layers whose slope is below a hundredth of the largest
    that a sigmoid has, for weights of this scale."""
    torch.manual_seed(seed)
    x = torch.randn(INPUTS, INPUTS)
    for _ in range(LAYERS):
        x = torch.sigmoid(x @ torch.randn(INPUTS, INPUTS) * scale / math.sqrt(INPUTS))
    return (x * (1 - x) < 0.25 / 100).float().mean().item()


def dead_relus(bias: float, seed: int) -> float:
    """The share of units in the last of some layers that are on for none of 256 inputs, for weights
    as of He et al. and this bias everywhere."""
    torch.manual_seed(seed)
    x = torch.randn(256, INPUTS)
    for _ in range(LAYERS):
        x = torch.relu(x @ torch.randn(INPUTS, INPUTS) * math.sqrt(2 / INPUTS) + bias)
    return (x == 0).all(0).float().mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Show how gradients are made, vanish and explode.")
    cli.add_flags(parser, GradientsConfig, "gradients")
    config = GradientsConfig(**parser.parse(sys.argv[1:] if argv is None else argv))
    (picture,) = new_picture(config.out, OURS)
    for title, (function, values) in EXAMPLES.items():
        print(show_example(title, function, values), end="\n\n")
    curves = all_curves(config)
    print(show_curves(curves), end="\n\n")
    print(f"{'weights · sqrt(inputs)':<24}{'sigmoids saturated':>20}")
    for scale in SCALES:
        print(f"{scale:<24}{saturated_sigmoids(scale, config.seed):>20.1%}")
    print(f"\n{'bias':<24}{'ReLUs never on':>20}")
    for bias in BIASES:
        print(f"{bias:<24}{dead_relus(bias, config.seed):>20.1%}")
    print()
    draw(curves, picture)


if __name__ == "__main__":
    cli.run(main)
