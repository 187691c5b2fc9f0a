"""optim.py beside torch.optim: optimisers over 100 steps, schedules over several periods."""

import copy
import math

import pytest
import torch
import torch.nn as nn

import optim
from model import GPT, GPTConfig


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5))


def train(model: nn.Module, optimizer, steps: int) -> None:
    random = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * optim.cosine(step, 60)
        x = torch.randn(9, 7, generator=random)
        loss = (model(x) - x[:, :5].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "ours,theirs,decay",
    [
        (optim.AdamW, torch.optim.AdamW, 0.3),
        (optim.AdamW, torch.optim.AdamW, 0.0),
        (optim.Adam, torch.optim.Adam, 0.3),
    ],
)
def test_adam_equals_torch_over_100_steps(ours, theirs, decay, fused):
    one = network()
    two, start = copy.deepcopy(one), copy.deepcopy(one)
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": decay}
    train(one, ours(one.parameters(), **options), 100)
    train(two, theirs(two.parameters(), **options, fused=fused), 100)
    for a, b, c in zip(one.parameters(), two.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
        assert (a - c).abs().max() > 0.05


def test_coupled_decay_is_not_decoupled_decay():
    one = network()
    two = copy.deepcopy(one)
    train(one, optim.AdamW(one.parameters(), weight_decay=0.3), 20)
    train(two, optim.Adam(two.parameters(), weight_decay=0.3), 20)
    assert (one[0].weight - two[0].weight).abs().max() > 1e-3


def test_state_of_adamw_moves_to_torch_and_back():
    one = network()
    two = copy.deepcopy(one)
    ours = optim.AdamW(one.parameters(), weight_decay=0.1)
    theirs = torch.optim.AdamW(two.parameters(), weight_decay=0.1)
    train(one, ours, 10)
    state = copy.deepcopy(ours.state_dict()["state"])
    theirs.load_state_dict({**theirs.state_dict(), "state": state})
    two.load_state_dict(one.state_dict())
    train(one, ours, 10)
    train(two, theirs, 10)
    torch.testing.assert_close(one[0].weight, two[0].weight)


def chained(params) -> optim.ChainedOptimizer:
    params = list(params)
    matrices, vectors = ([p for p in params if (p.dim() == 2) == flat] for flat in (True, False))
    return optim.ChainedOptimizer(optim.AdamW(vectors), optim.Muon(matrices))


@pytest.mark.parametrize(
    "make", [optim.AdamW, optim.Adam, chained, lambda p: optim.Muon(q for q in p if q.dim() == 2)]
)
def test_a_closure_is_called_before_the_step_and_its_loss_returned(make):
    """It was never called: no gradient, no step, and no word."""
    one, x = network(), torch.randn(9, 7)
    two, losses = copy.deepcopy(one), []
    first, second = make(one.parameters()), make(two.parameters())

    def closure():
        first.zero_grad()
        loss = one(x).square().mean()
        loss.backward()
        losses.append(loss)
        return loss

    for _ in range(3):
        assert first.step(closure) is losses[-1]
        second.zero_grad()
        two(x).square().mean().backward()
        assert second.step() is None
    assert len(losses) == 3 and losses[2] < losses[0]
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name,values",
    [
        ("lr", [-1e-3, math.nan, math.inf]),
        ("eps", [-1e-8, math.nan]),
        ("weight_decay", [-0.1, math.nan, math.inf]),
        ("betas", [(1.0, 0.9), (0.9, -0.1), (0.9, math.nan), (0.9,), (0.9, 1.5)]),
        ("momentum", [-0.1, math.nan, 1.0, 2.0]),
    ],
)
def test_impossible_settings_are_refused(name, values):
    """torch refuses them too; here lr=-1 climbed, and lr=nan made every weight NaN."""
    for kind in (optim.AdamW, optim.Adam, optim.Muon):
        if name not in kind([nn.Parameter(torch.zeros(2, 3))]).defaults:
            continue
        for value in values:
            weight = nn.Parameter(torch.zeros(2, 3))
            with pytest.raises(ValueError, match=r"out of range: choose 0|are not two numbers"):
                kind([weight], **{name: value})
            with pytest.raises(ValueError, match=r"out of range: choose 0|are not two numbers"):
                kind([{"params": [weight], name: value}])


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (16, 16), (3, 6, 20)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    g = torch.randn(shape)
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    got = torch.linalg.svdvals(optim.orthogonalize(g))
    assert s.max() / s.min() > 2  # they were not near each other before
    assert got.min() > 0.6 and got.max() < 1.3
    direction = (optim.orthogonalize(g) * (u @ vt)).sum() / (u @ vt).square().sum()
    assert direction.item() == pytest.approx(1, abs=0.2)


def test_muon_equals_torch_muon():
    theirs_class = getattr(torch.optim, "Muon", None)
    if theirs_class is None:
        pytest.skip("this torch has no Muon")
    one = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 12, bias=False))
    two, start = copy.deepcopy(one), copy.deepcopy(one)
    ours = optim.Muon(one.parameters(), weight_decay=0.1)
    theirs = theirs_class(two.parameters(), weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    x = torch.randn(40, 12)
    for _ in range(10):
        for model, optimizer in ((one, ours), (two, theirs)):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            optimizer.zero_grad()
            (model(x) - x.flip(1)).square().mean().backward()
            optimizer.step()
    # Theirs iterates in bfloat16, ours in float32 here: three digits in common.
    moved = (one[0].weight - start[0].weight).norm()
    assert (one[0].weight - two[0].weight).norm() < 0.03 * moved


def test_muon_takes_matrices_only():
    with pytest.raises(ValueError, match=r"matrices, not a parameter of shape \(13,\)"):
        optim.Muon(network().parameters())


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_groups_partition_the_parameters(name):
    model = GPT(GPTConfig(vocab_size=37, block_size=13, n_layer=2, n_head=2, n_embd=8))
    names = {id(p): n for n, p in model.named_parameters()}
    optimizer = optim.make_optimizer(model, name, lr=1e-3, weight_decay=0.1)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(names)
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.dim() == 2), names[id(p)]
    if name == "muon":
        muon = {
            names[id(p)] for group in optimizer.optimizers[1].param_groups for p in group["params"]
        }
        assert muon == {
            n
            for n in names.values()
            if n.startswith("blocks.") and n.endswith("weight") and "norm" not in n
        }


def test_together_saves_and_restores_all_states():
    model = GPT(GPTConfig(vocab_size=37, block_size=13, n_layer=1, n_head=2, n_embd=8))
    other = copy.deepcopy(model)
    tokens = torch.randint(37, (2, 13))

    def step(model, optimizer):
        model(tokens, tokens)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    one = optim.make_optimizer(model, "muon", lr=1e-3)
    step(model, one)
    two = optim.make_optimizer(other, "muon", lr=1e-3)
    other.load_state_dict(model.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    step(model, one)
    step(other, two)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="1 saved optimisers, 2 expected"):
        two.load_state_dict({"0": {}})


def torch_rates(make, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_equals_torch_past_its_period():
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR
    want = torch_rates(lambda o: annealing(o, T_max=10, eta_min=0.1), 35)
    assert [optim.cosine(t, 10, 0.1) for t in range(35)] == pytest.approx(want)
    assert optim.cosine(20, 10, 0.1) == pytest.approx(1)  # it has risen again


@pytest.mark.parametrize("growth", [1, 2])
def test_cosine_restarts_equal_torch(growth):
    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts
    want = torch_rates(lambda o: restarts(o, T_0=5, T_mult=growth, eta_min=0.1), 40)
    got = [optim.cosine_restarts(t, 5, growth, 0.1) for t in range(40)]
    assert got == pytest.approx(want)


def test_inverse_sqrt_is_the_formula_of_the_paper():
    d_model, length = 512, 4000
    peak = (d_model * length) ** -0.5
    for t in (1, 2, 3999, 4000, 4001, 100_000):
        noam = d_model**-0.5 * min(t**-0.5, t * length**-1.5)
        assert peak * optim.inverse_sqrt(t - 1, length) == pytest.approx(noam)


TABLE = [  # name, steps, warmup, cooldown, floor, {step: factor}
    ("cosine", 110, 10, 0, 0.1, {0: 0.1, 9: 1.0, 10: 1.0, 60: 0.55, 110: 0.1}),
    ("linear", 100, 4, 50, 0.0, {0: 0.25, 3: 1.0, 4: 1.0, 50: 1.0, 75: 0.5, 99: 0.02, 100: 0.0}),
    ("inverse_sqrt", 100, 16, 0, 0.0, {0: 1 / 16, 15: 1.0, 63: 0.5}),
    ("constant", 100, 2, 0, 0.0, {0: 0.5, 1: 1.0, 99: 1.0}),
    ("constant", 100, 0, 0, 0.0, {0: 1.0}),
]


@pytest.mark.parametrize("name,steps,warmup,cooldown,floor,table", TABLE)
def test_schedule_table(name, steps, warmup, cooldown, floor, table):
    for step, factor in table.items():
        got = optim.schedule(
            name, step, steps=steps, warmup_steps=warmup, cooldown_steps=cooldown, floor=floor
        )
        assert got == pytest.approx(factor), step


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_no_schedule_wastes_a_step_at_rate_zero(name):
    rates = [
        optim.schedule(name, t, steps=50, warmup_steps=5, cooldown_steps=25, floor=0.0)
        for t in range(50)
    ]
    assert min(rates) > 0 and max(rates) == pytest.approx(1) and math.isfinite(sum(rates))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="choose one of adamw, adam, muon"):
        optim.make_optimizer(network(), "sgd", lr=0.1)
    with pytest.raises(ValueError, match="choose one of cosine"):
        optim.schedule("step", 0, steps=1, warmup_steps=0, cooldown_steps=0, floor=0)
