"""models/feedforward.py: what each may see, and values by the formulas, place by place."""

import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

import decoding
from models.feedforward import CBOW, NNLM, GatedCNN, last_tokens

SIZES = {"vocab_size": 37, "block_size": 29, "n_embd": 6}
MODELS = [
    (NNLM, {"context": 4, "n_hidden": 11}, 4),
    (NNLM, {"context": 3, "n_hidden": 11, "direct": True}, 3),
    (CBOW, {"context": 5}, 5),
    (GatedCNN, {"n_layer": 3, "kernel": 3}, 7),
    (GatedCNN, {"n_layer": 2, "kernel": 1}, 1),
]


def network(Model, settings):
    net = Model(Model.Config(**SIZES, **settings))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return net.eval()


@pytest.mark.parametrize("Model,settings,reach", MODELS)
def test_a_place_depends_on_just_the_tokens_in_reach(Model, settings, reach):
    net, tokens = network(Model, settings), torch.randint(37, (1, 29))
    assert net.reach == reach
    before = net(tokens)
    for place in (0, 10, 28):
        other = tokens.clone()
        other[0, place] = (other[0, place] + 1) % 37
        changed = (net(other) - before).abs().amax(-1)[0] > 1e-7
        want = torch.arange(29)
        assert torch.equal(changed, (want >= place) & (want < place + reach)), place


def test_last_tokens_in_their_order():
    x = torch.arange(1.0, 6).view(1, 5, 1)
    assert last_tokens(x, 3)[0, :, :, 0].tolist() == [
        [0, 0, 1],
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [3, 4, 5],
    ]


@pytest.mark.parametrize("direct", [False, True])
def test_nnlm_by_bengios_formula(direct):
    net = network(NNLM, {"context": 3, "n_hidden": 11, "direct": direct})
    tokens = torch.randint(37, (2, 9))
    x = torch.cat([net.token_embedding.weight[tokens[1, i]] for i in (5, 6, 7)])
    h = torch.tanh(net.hidden.weight @ x + net.hidden.bias)
    y = net.head.weight[:, :11] @ h + net.head.bias
    if direct:
        y = y + net.head.weight[:, 11:] @ x
    torch.testing.assert_close(net(tokens)[1, 7], y)


def test_an_average_does_not_know_the_order():
    net = network(CBOW, {"context": 4})
    tokens = torch.tensor([[1, 2, 3, 4], [4, 2, 1, 3]])
    torch.testing.assert_close(net(tokens)[0, 3], net(tokens)[1, 3])
    mean = net.token_embedding.weight[tokens[0, :2]].mean(0)  # at a beginning, of what is there
    torch.testing.assert_close(net(tokens)[0, 1], net.head(mean))


def test_gated_convolutions_are_torchs():
    net = network(GatedCNN, {"n_layer": 1, "kernel": 4})
    tokens, (layer,) = torch.randint(37, (2, 9)), net.layers
    x = net.token_embedding(tokens)
    normed = F.layer_norm(x, (6,), layer.norm.weight, layer.norm.bias)
    kernel = layer.conv.weight.view(12, 4, 6).transpose(1, 2)  # (out, in, places)
    y = F.conv1d(F.pad(normed.transpose(1, 2), (3, 0)), kernel, layer.conv.bias)
    a, b = y.transpose(1, 2).chunk(2, -1)
    want = net.norm(x + a * torch.sigmoid(b))
    torch.testing.assert_close(net.features(tokens), want)


@pytest.mark.parametrize("Model,settings,reach", MODELS)
def test_what_is_written_with_a_cache_is_what_is_written_without(Model, settings, reach):
    net = network(Model, settings)

    def pick(logits, rows):
        return logits.argmax(-1)

    with torch.no_grad():
        texts = [
            list(decoding.generate(net, [[1, 2, 3], [4]], pick, 40, use_cache=use_cache))
            for use_cache in (True, False)
        ]
    assert texts[0] == texts[1] and len(texts[0]) == 42


@pytest.mark.parametrize("Model,settings,reach", MODELS)
def test_loss_and_initialisation(Model, settings, reach):
    net, (tokens, targets) = network(Model, settings), torch.randint(37, (2, 3, 9))
    targets[0] = -100
    want = F.cross_entropy(net(tokens)[1:].flatten(0, 1), targets[1:].flatten(), reduction="sum")
    torch.testing.assert_close(net(tokens, targets)["loss"], want)
    fresh = Model(Model.Config(**{**SIZES, "n_embd": 128, "vocab_size": 500}, **settings))
    for name, parameter in fresh.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
        else:
            law = 0.1 if name.startswith("token") else parameter.size(1) ** -0.5
            assert parameter.std().item() == pytest.approx(law, rel=0.1), name


@pytest.mark.parametrize("Model,settings,reach", MODELS)
def test_sizes_that_cannot_be(Model, settings, reach):
    names = {*SIZES, *settings, "dropout"} & {field.name for field in fields(Model.Config)}
    for name in names - {"direct"}:
        for value in (1.0, math.nan, -0.1) if name == "dropout" else (0, -3, 2**40):
            with pytest.raises(ValueError, match=f"{name}={value} is out of range"):
                Model.Config(**{**SIZES, **settings, name: value})
