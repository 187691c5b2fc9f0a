"""models/recurrent.py: cells equal to torch.nn's, AWD-LSTM's dropout, a state that is carried."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import decoding
from engine import kernels
from models import recurrent
from models.recurrent import GRU, LSTM, RNN, RecurrentConfig

MODELS = [RNN, GRU, LSTM]
SIZES = {"vocab_size": 37, "block_size": 13, "n_layer": 2, "n_embd": 7}


def network(Model, **settings):
    return Model(RecurrentConfig(**{**SIZES, **settings}))


def theirs(ours) -> nn.Module:
    """torch.nn's module with the same weights."""
    module = getattr(nn, type(ours).__name__)(7, 7, num_layers=2, batch_first=True).double()
    for i, layer in enumerate(ours.layers):
        for theirs, name in (("ih", "input"), ("hh", "recurrent")):
            for kind in ("weight", "bias"):
                parameter = getattr(module, f"{kind}_{theirs}_l{i}")
                parameter.data.copy_(getattr(getattr(layer, name), kind))
    return module


def randomise(net: nn.Module) -> None:
    for parameter in net.parameters():  # biases too: at zero, mistakes would not show
        nn.init.normal_(parameter, std=0.4)


@pytest.mark.parametrize("kernel", [recurrent.plain_layer, kernels.layer_by_torch])
@pytest.mark.parametrize("Model", MODELS)
def test_values_and_gradients_are_those_of_torch(Model, kernel, monkeypatch):
    monkeypatch.setattr(recurrent, "layer_kernel", kernel)
    ours = network(Model).double()
    randomise(ours)
    peer = theirs(ours)
    x = torch.randint(37, (3, 13))
    state = torch.randn(ours.empty_state(3).shape, dtype=torch.double)
    embedded = ours.token_embedding(x)
    want, last = peer(embedded, tuple(state) if Model is LSTM else state[0])
    last = torch.stack(last) if Model is LSTM else last[None]
    found, after = ours.read(x, state)
    torch.testing.assert_close(found, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(after, last, atol=1e-12, rtol=0)
    direction = torch.randn_like(want)
    want = torch.autograd.grad((want * direction).sum() + last.sum(), peer.parameters())
    mine = [
        getattr(getattr(layer, name), kind)
        for layer in ours.layers
        for kind in ("weight", "bias")  # torch.nn's order
        for name in ("input", "recurrent")
    ]
    gradients = torch.autograd.grad((found * direction).sum() + after.sum(), mine)
    for ours_, theirs_ in zip(gradients, want, strict=True):
        torch.testing.assert_close(ours_, theirs_, atol=1e-11, rtol=0)


@pytest.mark.parametrize("kernel", [recurrent.plain_layer, kernels.layer_by_torch])
@pytest.mark.parametrize("Model", MODELS)
def test_in_bf16_the_states_are_nearly_those_of_fp32(Model, kernel, monkeypatch):
    monkeypatch.setattr(recurrent, "layer_kernel", kernel)
    net, tokens = network(Model), torch.randint(37, (2, 13))
    randomise(net)
    found = []
    for enabled in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features = net.features(tokens)
        features.float().square().sum().backward()
        found.append((features.float(), net.layers[0].recurrent.weight.grad))
    (want, gradient), (got, rounded) = found
    assert 0 < (got - want).abs().max() < 0.05
    assert (rounded - gradient).norm() < 0.05 * gradient.norm()


def test_a_cell_of_ones_own_is_computed_as_it_says():
    class Own(recurrent.Recurrent):
        cell, gates, parts = staticmethod(lambda wx, uh, state: (wx.sin() + uh,)), 1, 1

    net, tokens = network(Own), torch.randint(37, (2, 13))
    want = net(tokens)
    recurrent.layer_kernel = kernels.layer_by_torch
    assert torch.equal(net(tokens), want)


def test_the_gru_resets_inside_of_the_product():
    """h is reset after U, not before: the other order, of Cho et al. 2014, is another network."""
    net = network(GRU, n_layer=1)
    randomise(net)
    layer, x, h = net.layers[0], torch.randn(1, 7), torch.randn(1, 7)
    (w_r, _, w_n), (u_r, _, u_n) = layer.input.weight.chunk(3), layer.recurrent.weight.chunk(3)
    (b_r, _, b_n), (c_r, _, c_n) = layer.input.bias.chunk(3), layer.recurrent.bias.chunk(3)
    r = torch.sigmoid(F.linear(x, w_r, b_r) + F.linear(h, u_r, c_r))
    inside = torch.tanh(F.linear(x, w_n, b_n) + r * F.linear(h, u_n, c_n))
    before = torch.tanh(F.linear(x, w_n, b_n) + F.linear(r * h, u_n, c_n))
    wx = F.linear(x, layer.input.weight, layer.input.bias)
    uh = F.linear(h, layer.recurrent.weight, layer.recurrent.bias)
    (new,) = recurrent.gru_cell(wx, uh, (h,))
    z = torch.sigmoid(wx + uh).chunk(3, -1)[1]
    torch.testing.assert_close(new, (1 - z) * inside + z * h)
    assert (new - ((1 - z) * before + z * h)).abs().max() > 0.01


# ---- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [recurrent.plain_layer, kernels.layer_by_torch])
def test_weight_dropout_is_new_in_each_step_and_absent_in_evaluation(kernel, monkeypatch):
    used = []

    def spy(cell, x, state, W, U, b_w, b_u):
        used.append(U.detach().clone())
        return kernel(cell, x, state, W, U, b_w, b_u)

    monkeypatch.setattr(recurrent, "layer_kernel", spy)
    net, tokens = network(LSTM, n_layer=1, n_embd=32, weight_dropout=0.5), torch.randint(37, (2, 9))
    weight = net.layers[0].recurrent.weight
    outputs = [net(tokens) for _ in range(2)]
    assert not torch.equal(used[0], used[1]) and not torch.equal(*outputs)
    for U in used[:2]:
        share = (U == 0).float().mean().item()
        assert 0.45 < share < 0.55
        assert torch.equal(U[U != 0], 2 * weight[U != 0])
    net(tokens, tokens)["loss"].backward()  # a gradient reaches exactly what was kept
    assert torch.equal(weight.grad == 0, used[-1] == 0)
    net.eval()
    assert torch.equal(net(tokens), net(tokens)) and torch.equal(used[-1], weight)


def test_locked_dropout_is_the_same_at_all_places():
    net = network(RNN, dropout=0.5)
    dropped = net.drop(torch.ones(4, 9, 200))
    assert (dropped == dropped[:, :1]).all() and set(dropped.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(dropped[0], dropped[1])
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    assert torch.equal(net.eval().drop(dropped), dropped)


# ---- the state -----------------------------------------------------------------------------------


@pytest.mark.parametrize("Model", MODELS)
def test_a_carried_state_makes_windows_one_text(Model):
    net, text = network(Model).eval(), torch.randint(37, (3, 26))
    whole = net(text)
    yes, no = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    halves = [net(text[:, :13], keep=no), net(text[:, 13:], keep=yes)]
    torch.testing.assert_close(torch.cat(halves, 1), whole)
    anew = net(text[:, 13:], keep=torch.tensor([True, False, True]))  # behind the end of the text
    torch.testing.assert_close(anew[1], net(text[1:2, 13:])[0])
    assert (anew[0] - halves[1][0]).abs().max() > 1e-4


def test_a_state_that_is_not_finite_is_gone_with_the_next_beginning():
    net, text, no = network(LSTM), torch.randint(37, (3, 13)), torch.zeros(3, dtype=torch.bool)
    net(text, keep=no)
    want = net(text, keep=no)
    net.state.fill_(torch.nan)
    assert torch.equal(net(text, keep=no), want)


def test_the_states_of_training_and_of_an_evaluation_are_two():
    net, text, yes = network(LSTM), torch.randint(37, (3, 13)), torch.ones(3, dtype=torch.bool)
    net(text, text, keep=yes)["loss"].backward()
    kept = net.state.clone()
    assert kept.shape == (2, 2, 3, 7) and kept.abs().sum() > 0 and not net.state.requires_grad
    net.eval()(text[:2], keep=yes[:2])
    assert torch.equal(net.state, kept) and net.scoring_state.size(2) == 2
    other = network(LSTM)
    other.load_state_dict(net.state_dict())  # whose buffers are empty before
    assert torch.equal(other.state, kept) and "scoring_state" not in net.state_dict()
    net.train()(text, text, keep=yes)["loss"].backward()  # the graph of the last window is gone


@pytest.mark.parametrize("Model", MODELS)
def test_generation_carries_the_state_past_any_window(Model):
    net = network(Model).eval()

    def pick(logits, rows):
        return logits.argmax(-1)

    prompts, count = [[1, 2, 3], [4]], 40  # more than block_size
    with torch.no_grad():
        cached = list(decoding.generate(net, prompts, pick, count))
        plain = list(decoding.generate(net, prompts, pick, count, use_cache=False))
    assert cached == plain and len(cached) == count + 2


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("Model", MODELS)
def test_initialisation(Model):
    net = network(Model, vocab_size=500, n_embd=64)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            want = torch.zeros_like(parameter)
            if Model is LSTM and "input" in name:
                want[64:128] = 1.0
            assert torch.equal(parameter, want), name
        else:
            bound = 0.1 if name.startswith(("token", "head")) else 1 / 8
            assert parameter.abs().max() <= bound and parameter.abs().max() > 0.99 * bound, name
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.02), name
    every = sum(p.numel() for p in net.parameters())
    assert net.flops_per_token() == 6 * (every - 500 * 64)
    tied = network(Model, vocab_size=500, n_embd=64, tied=True)
    assert sum(p.numel() for p in tied.parameters()) == every - 500 * 64
    assert tied.flops_per_token() == net.flops_per_token()
    assert tied.head.weight is tied.token_embedding.weight


@pytest.mark.parametrize(
    "settings,message",
    [({"n_layer": 0}, "n_layer=0"), ({"dropout": 1.0}, "less than 1"), ({"n_embd": -1}, "n_embd")],
)
def test_sizes_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        network(RNN, **settings)
