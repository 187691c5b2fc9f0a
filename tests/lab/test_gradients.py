"""lab/gradients.py: derivatives by hand equal to autograd's, and the shape of the curves."""

import math
import re

import pytest
import torch

from lab import gradients
from lab.gradients import EXAMPLES, GradientsConfig, Node, norm, products, rnn_states, with_radius


@pytest.mark.parametrize("title", EXAMPLES)
def test_every_node_has_autograds_gradient(title):
    function, values = EXAMPLES[title]
    leaves = {name: torch.tensor(x, requires_grad=True) for name, x in values.items()}
    if "sigmoid" in title:
        v = leaves
        torch.sigmoid(v["w0"] * v["x0"] + v["w1"] * v["x1"] + v["w2"]).backward()
    else:
        ((leaves["x"] + leaves["y"]) * leaves["z"]).backward()
    order = function(*(Node(x, name) for name, x in values.items())).backward()
    found = {node.name: node.grad for node in order}
    for name, leaf in leaves.items():
        assert found[name] == pytest.approx(leaf.grad.item(), abs=1e-6), name


def test_a_node_that_is_used_twice_adds_up():
    x = Node(3.0, "x")
    (x * x + x).backward()
    assert x.grad == 7.0
    y = Node(2.0, "y")
    square = y * y
    (square * square).backward()  # y^4, through a node that is shared
    assert y.grad == 32.0


def test_the_product_of_steps_is_autograds_derivative():
    torch.manual_seed(0)
    U = torch.randn(5, 5, dtype=torch.double)
    inputs, start = torch.randn(7, 5, dtype=torch.double), torch.zeros(5, dtype=torch.double)
    h = rnn_states(U, inputs)

    def last(state, steps):
        for x in inputs[len(inputs) - steps :]:
            state = torch.tanh(U @ state + x)
        return state

    for steps, product in enumerate(products(U, h)):
        want = torch.autograd.functional.jacobian(lambda s, n=steps: last(s, n), h[-1 - steps])
        torch.testing.assert_close(product, want)
    assert torch.equal(h[0], start)


def test_without_tanh_the_radius_decides():
    torch.manual_seed(0)
    for radius in (0.5, 1.0, 2.0):
        U = with_radius(torch.randn(16, 16, dtype=torch.double), radius)
        still = torch.zeros(201, 16, dtype=torch.double)  # tanh's slope is 1 there
        found = [norm(product) for product in products(U, still)]
        rate = (found[200] / found[100]) ** (1 / 100)
        assert rate == pytest.approx(radius, rel=0.02)


def test_the_curves_show_what_the_text_says():
    curves = gradients.all_curves(GradientsConfig(length=60, width=24))
    assert all(len(curve) == 61 for curve in curves.values())
    assert curves["RNN, radius 0.5"][60] < 1e-15 < curves["RNN, radius 0.9"][60] < 0.1
    assert curves["RNN, radius 2.0"][60] > 10  # it explodes, in spite of tanh
    # What is kept: most of it in the LSTM, whose f begins near 0.73; next to nothing in the RNN.
    assert curves["RNN"][30] < curves["GRU"][30] < 1
    assert curves["RNN"][30] < curves["LSTM"][30] < 1
    transformer = curves["Transformer"]
    assert 0.3 < transformer[60] / transformer[1] < 3  # distance makes no difference
    assert transformer[0] > 10 * transformer[1]  # the residual stream


def test_units_that_do_not_learn():
    saturated = [gradients.saturated_sigmoids(scale, 0) for scale in gradients.SCALES]
    assert saturated[0] == 0 and saturated[-1] > 0.5 and saturated == sorted(saturated)
    dead = [gradients.dead_relus(bias, 0) for bias in gradients.BIASES]
    assert dead[0] < 0.1 and dead[-1] == 1 and dead == sorted(dead)


def test_what_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gradients.main(["--length=12", "--width=8", "--out=new/g.png"])
    said = capsys.readouterr().out
    assert re.search(r"-12.000 / +1.000 +\(x \+ y\)·z\n", said)
    assert f"{1 / (1 + math.exp(-1)):.3f} /   1.000" in said
    assert "Transformer" in said and said.endswith("picture: new/g.png\n")
    assert (tmp_path / "new/g.png").read_bytes().startswith(b"\x89PNG")
    gradients.main(["--length=12", "--width=8", "--out=new/g.png"])  # its own may be written over
    (tmp_path / "mine.png").write_bytes(b"not a picture of ours")
    with pytest.raises(ValueError, match="is there already"):
        gradients.main(["--length=12", "--width=8", "--out=mine.png"])
