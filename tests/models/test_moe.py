"""models/moe.py: Mixtral and Switch's layer of transformers, the balance loss, the capacity."""

import contextlib
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TOY, check_resumed, peer
from torch import Tensor

import decoding
import sample
import train
from engine import cpu
from engine.hub.mapping import our_config, their_settings
from engine.hub.peers import hugging_face_llama
from engine.logs import read_log
from engine.memory import plan_memory
from engine.presets import PRESETS
from engine.processes import Processes
from model import MLP, count_parameters
from models.moe import Experts, MoE, MoEConfig
from tasks.flags import TrainConfig

SIZES = {"vocab_size": 131, "block_size": 37, "n_layer": 3, "n_head": 6, "n_embd": 36, "n_ff": 52}
SIZES |= {"n_expert": 5}
KINDS = {
    "mixtral": {"n_kv_head": 2, "tied": False},
    "three": {"n_active": 3, "window": 7},
    "switch": {"n_active": 1, "capacity": 1.25},
}


def network(**settings) -> MoE:
    """In evaluation, with weights large enough that mistakes show."""
    model = MoE(MoEConfig(**{**SIZES, **settings})).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3 if p.dim() > 1 else 1.0)
    return model


def tokens_of(*shape: int) -> Tensor:
    return torch.randint(131, shape)


# ---- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "three"])
def test_logits_and_gradients_are_those_of_mixtral(kind):
    ours = network(**KINDS[kind])
    theirs = hugging_face_llama(peer("transformers"), ours, "moe").eval()
    tokens = tokens_of(3, 37)
    found, want = ours(tokens), theirs(tokens).logits
    assert want.abs().max() > 3
    torch.testing.assert_close(found, want, atol=2e-5, rtol=0)
    direction = torch.randn_like(found)
    (found * direction).sum().backward()
    (want * direction).sum().backward()
    for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
        near = {"atol": 1e-3, "rtol": 1e-4}
        router = layer.mlp.gate.weight.grad
        torch.testing.assert_close(block.mlp.router.weight.grad, router, **near)
        for name, gradient in (
            ("gate", layer.mlp.experts.gate_up_proj.grad.chunk(2, 1)[0]),
            ("fc", layer.mlp.experts.gate_up_proj.grad.chunk(2, 1)[1]),
            ("proj", layer.mlp.experts.down_proj.grad),
        ):
            own = torch.stack([getattr(e, name).weight.grad for e in block.mlp.experts])
            torch.testing.assert_close(own, gradient, **near)


@pytest.mark.parametrize("k", [1, 2])
def test_the_balance_loss_is_that_of_transformers(k):
    """Of one layer, since theirs puts all layers together before it multiplies: then each could
    lean on an expert of its own and none would be told."""
    mixtral = peer("transformers.models.mixtral.modeling_mixtral")
    ours, tokens = network(n_layer=1, n_active=k, balance=0.3), tokens_of(3, 37)
    logits = []
    ours.blocks[0].mlp.router.register_forward_hook(lambda *a: logits.append(a[2]))
    found = ours(tokens, tokens)["balance_loss"] / tokens.numel()
    want = 0.3 * mixtral.load_balancing_loss_func((logits[0].flatten(0, 1),), 5, k)
    torch.testing.assert_close(found, want)
    gradients = [torch.autograd.grad(x, logits[0], retain_graph=True)[0] for x in (found, want)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 1e-6


def switch_pair(capacity: int, B: int = 2, T: int = 30) -> tuple[Experts, nn.Module, Tensor]:
    """Our layer, that of transformers with the same weights, and an input."""
    switch = peer("transformers.models.switch_transformers.modeling_switch_transformers")
    config = switch.SwitchTransformersConfig(
        d_model=36, d_ff=52, num_experts=5, expert_capacity=capacity, dropout_rate=0.0
    )
    config.router_jitter_noise = 0.0
    theirs = switch.SwitchTransformersSparseMLP(config)
    c = MoEConfig(**SIZES, n_active=1, capacity=capacity * 5 / T)
    small = type("Sizes", (), {"n_embd": 36, "n_ff": 52, "bias": False})
    ours = Experts(c, lambda: MLP(small, F.relu))
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    theirs.router.classifier.weight.data.copy_(ours.router.weight)
    for i, expert in enumerate(ours.experts):
        theirs.experts[f"expert_{i}"].wi.weight.data.copy_(expert.fc.weight)
        theirs.experts[f"expert_{i}"].wo.weight.data.copy_(expert.proj.weight)
    return ours, theirs, torch.randn(B, T, 36)


@pytest.mark.parametrize("capacity", [2, 7, 30])
def test_the_layer_of_switch_is_that_of_transformers(capacity):
    ours, theirs, x = switch_pair(capacity)
    found, want = ours(x)[0], theirs(x)
    torch.testing.assert_close(found, want)
    dropped = (want == 0).all(-1)
    assert dropped.any() if capacity < 30 else not dropped.any()
    direction = torch.randn_like(found)
    (found * direction).sum().backward()
    (want * direction).sum().backward()
    gradient = ours.router.weight.grad
    torch.testing.assert_close(gradient, theirs.router.classifier.weight.grad)
    assert gradient.abs().max() > 1e-3  # with one expert too: its gate is its probability


def test_a_gate_that_balances_too_is_caught(monkeypatch):
    """What the comparison with Mixtral must see: the experts are chosen rightly, but what is to
    balance them reaches the gates, which are even in part."""
    ours = network(**KINDS["mixtral"])
    theirs = hugging_face_llama(peer("transformers"), ours, "moe").eval()
    tokens, topk = tokens_of(3, 37), Tensor.topk

    def balanced(probabilities: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
        chosen = topk(probabilities, k, dim).indices
        return (0.9 * probabilities + 0.1 / 5).gather(-1, chosen), chosen

    monkeypatch.setattr(Tensor, "topk", balanced)
    found = ours(tokens)
    monkeypatch.undo()
    assert (found - theirs(tokens).logits).abs().max() > 1e-2


def test_the_balance_changes_no_logit():
    model, tokens = network(balance=0.0), tokens_of(2, 20)
    want = model(tokens)
    model.config.balance = 5.0
    assert torch.equal(model(tokens), want)
    losses = model(tokens, tokens)
    assert losses["balance_loss"] > 5 * 40 * 1.5  # at least about n_active where all are even
    torch.testing.assert_close(
        losses["loss"], F.cross_entropy(want.flatten(0, 1), tokens.flatten(), reduction="sum")
    )


# ---- router, capacity ----------------------------------------------------------------------------


def test_all_experts_active_are_a_mixture_by_the_softmax():
    layer, x = network(n_active=5).blocks[0].mlp, torch.randn(2, 9, 36)
    weights = layer.router(x).softmax(-1)
    want = sum(weights[..., e, None] * expert(x) for e, expert in enumerate(layer.experts))
    torch.testing.assert_close(layer(x)[0], want)


def test_even_and_lopsided_routers_have_the_balance_loss_of_the_paper():
    """1 where all is even, E where one expert gets all with probability 1."""
    model, tokens = network(n_layer=1, n_active=1, balance=1.0), tokens_of(1, 35)
    router = model.blocks[0].mlp.router
    router.forward = lambda x: torch.eye(5).repeat(7, 1)[None] * 50  # each expert in turn
    sums = model(tokens, tokens)
    assert sums["balance_loss"].item() / 35 == pytest.approx(1)
    assert [sums[f"expert_{e}"].item() / 35 for e in range(5)] == pytest.approx([0.2] * 5)
    router.forward = lambda x: torch.tensor([[50.0, 0, 0, 0, 0]]).expand(1, 35, 5)
    sums = model(tokens, tokens)
    assert sums["balance_loss"].item() / 35 == pytest.approx(5)
    assert [sums[f"expert_{e}"].item() / 35 for e in range(5)] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("k", [1, 2])
def test_capacity_leaves_out_the_last_of_a_row(k):
    layer, x = network(n_active=k, capacity=0.5).blocks[0].mlp.train(), torch.randn(3, 20, 36)
    chosen = layer(x)[2]
    taken, most = layer.within_capacity(chosen), math.ceil(0.5 * k * 20 / 5)
    for row, wanted in zip(taken.flatten(1).tolist(), chosen.flatten(1).tolist(), strict=True):
        used = [0] * 5
        for found, asked in zip(row, wanted, strict=True):
            assert found == (asked if used[asked] < most else 5)
            used[asked] += 1
    assert (taken == 5).any()
    y = layer(x)[0]
    assert (y[(taken == 5).all(-1)] == 0).all()
    # What comes later, or stands in another row, changes nothing.
    changed = x.clone()
    changed[0, 12:], changed[1] = torch.randn(8, 36), torch.randn(20, 36)
    assert torch.equal(layer.within_capacity(layer(changed)[2])[0, :12], taken[0, :12])
    torch.testing.assert_close(layer(changed)[0][2], y[2])
    assert (layer.eval()(x)[0].abs().sum(-1) > 0).all()  # no limit in evaluation


def test_an_expert_without_tokens_has_a_gradient_of_zeros():
    model, tokens = network(n_active=1).train(), tokens_of(1, 3)
    losses = model(tokens, tokens)
    (losses["loss"] + losses["balance_loss"]).backward()
    unused = [e for e in model.blocks[0].mlp.experts if not e.fc.weight.grad.any()]
    assert len(unused) >= 2
    assert all(p.grad is not None for p in model.parameters())


# ---- caches, decoding ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_with_caches_the_logits_are_the_same(kind):
    model, tokens = network(**KINDS[kind]), tokens_of(2, 37)
    want, caches = model(tokens), model.make_caches()
    parts = [model(part, caches=caches) for part in tokens.split([5, 4, *[1] * 25, 3], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=0)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    written = [
        list(decoding.generate(model, prompts, lambda x, _: x.argmax(-1), 12, use_cache=cached))
        for cached in (True, False)
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize("by_onednn", [True, False])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_laid_out_for_decoding_it_writes_the_same(dtype, near, by_onednn, installed, monkeypatch):
    """Token by token, where most experts have no row."""
    monkeypatch.setattr(cpu, "by_onednn", by_onednn)
    model, tokens = network(), tokens_of(1, 30)
    model.to(dtype)
    with torch.no_grad():
        want, caches = model(tokens).float(), model.make_caches()
        cpu.lay_out_for_decoding(model)
        parts = [
            model.head(model.features(part, caches=caches))
            for part in tokens.split([9, *[1] * 21], 1)
        ]
    # In bf16 a near tie may choose another expert: most places are the same.
    apart = (torch.cat(parts, 1).float() - want).norm(dim=-1) / want.norm(dim=-1)
    assert apart.median() < near


# ---- sizes ---------------------------------------------------------------------------------------


def test_mixtral_has_the_published_number_of_parameters():
    """46.7 billion, of which 12.9 billion compute (section 1 of its paper: 47 and 13)."""
    fields = MoEConfig.__dataclass_fields__
    sizes = {k: v for k, v in PRESETS["mixtral-8x7b"].items() if k in fields}
    with torch.device("meta"):
        model = MoE(MoEConfig(**sizes))
    assert count_parameters(model) == 46_702_792_704
    c = model.config
    attention = 12 * c.n_layer * c.n_head * c.head_dim * c.block_size
    active = (model.flops_per_token() - attention) // 6 + model.token_embedding.weight.numel()
    assert active == 12_879_925_248


def test_flops_are_those_of_products():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    for kind in ("mixtral", "switch"):
        model = network(**{**KINDS[kind], "capacity": 0})
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(tokens_of(1, 37), tokens_of(1, 37))["loss"].backward()
        assert abs(counter.get_total_flops() / 37 / model.flops_per_token() - 1) < 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_expert": 1}, "n_expert=1 is out of range: choose 2 to 4,096"),
        ({"n_active": 0}, "n_active=0 is out of range: choose 1 to n_expert=5"),
        ({"n_active": 6}, "n_active=6 is out of range"),
        ({"balance": -1.0}, "balance=-1.0 is out of range: choose 0 or more"),
        ({"capacity": math.nan}, "capacity=nan is out of range"),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{**SIZES, **settings})


def test_a_mixtral_with_one_active_expert_is_refused_both_ways():
    with pytest.raises(ValueError, match=r"num_experts_per_tok=1 .* is not supported"):
        their_settings("moe", network(n_active=1).config)
    settings = their_settings("moe", network().config)
    with pytest.raises(ValueError, match=r"num_experts_per_tok=1 .* is not supported"):
        our_config({**settings, "num_experts_per_tok": 1})
    assert our_config({**settings, "router_aux_loss_coef": 2.0})[1].balance == 2
    with pytest.raises(ValueError, match="router_aux_loss_coef=-1 cannot be"):
        our_config({**settings, "router_aux_loss_coef": -1})
    with pytest.raises(ValueError, match=r"router_jitter_noise=0\.1 is not supported"):
        our_config({**settings, "router_jitter_noise": 0.1})


def test_every_tensor_has_its_law():
    torch.manual_seed(0)
    model = MoE(MoEConfig(1000, n_layer=8, n_head=8, n_embd=256, n_expert=4, tied=False))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            want = 0.02 / 4 if name.endswith("proj.weight") else 0.02
            assert abs(p.std().item() / want - 1) < 0.08, name


def test_the_router_computes_in_fp32():
    layer, x = network().blocks[0].mlp, torch.randn(2, 9, 36)
    want = layer(x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x)[1], want)


# ---- in the loop ---------------------------------------------------------------------------------

RUN = [*TOY, "--model=moe", "--n_expert=4", "--balance=5", "--steps=4"]


def test_it_is_trained_resumed_and_sampled_by_the_same_commands(toy, capsys):
    check_resumed(RUN)
    for record in read_log(Path("whole/log.jsonl")):
        if record["split"] == "train":
            assert sum(record[f"expert_{e}"] for e in range(4)) == pytest.approx(2)
            assert record["balance_loss"] >= 0.99 * 2 * 5
            assert record["loss"] < 7  # to which it is not added
    capsys.readouterr()
    sample.main(["--checkpoint=whole/best.pt", "--prompt=3 times", "--max_new_tokens=30"])
    assert capsys.readouterr().out.startswith("3 times")
    with pytest.raises(ValueError, match="--model llama cannot begin from the moe of"):
        train.main(["--model=llama", "--init=whole/best.pt", "--data=toy.txt"])
    other = ["--data=toy.txt", "--n_active=1", "--tokens_per_step=128", "--device=cpu"]
    train.main([*other, "--init=whole/best.pt", "--steps=1", "--out=single"])


def test_a_step_has_the_gradient_of_both_losses():
    """Accumulated over two micro-batches, and divided by the targets of both."""
    model = network(balance=3.0).train()
    batches = [{"tokens": tokens_of(2, 9), "targets": tokens_of(2, 9)} for _ in range(2)]
    batches[1]["targets"][0, 2:] = -100
    group = Processes(0, 1, torch.device("cpu"))
    sums, counts = train.gradients(model, batches, group, contextlib.nullcontext)
    assert counts == {"loss": 29}
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = 0
    for batch in batches:
        losses = model(**batch)
        total = total + (losses["loss"] + losses["balance_loss"]) / 29
    total.backward()
    for p, gradient in zip(model.parameters(), got, strict=True):
        torch.testing.assert_close(gradient, p.grad, atol=1e-5, rtol=1e-4)
    assert sums["balance_loss"].item() > 29 * 3  # and so it matters


def test_the_balance_loss_evens_the_experts_out():
    """Taught alone, since what else a router learns may be uneven."""
    model, tokens = network(n_layer=1, n_active=1, balance=1.0), tokens_of(4, 37)
    optimizer = torch.optim.AdamW(model.blocks[0].mlp.router.parameters(), lr=1e-2)
    found = []
    for _ in range(100):
        sums = model(tokens, tokens)
        found.append(max(sums[f"expert_{e}"].item() / 148 for e in range(5)))
        optimizer.zero_grad()
        (sums["balance_loss"] / 148).backward()
        optimizer.step()
    assert found[-1] < 0.25 < 0.3 < found[0]


def test_recomputed_blocks_have_the_same_gradients():
    from engine.setup import recompute_blocks

    model, tokens = network(**KINDS["switch"]), tokens_of(2, 20)
    found = []
    for again in (False, True):
        model.train().zero_grad()
        if again:
            recompute_blocks(model)
        losses = model(tokens, tokens)
        (losses["loss"] + losses["balance_loss"]).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_the_memory_of_a_plan_shares_the_tokens_evenly():
    """More active experts keep more activations, more idle ones only more weights."""
    config = TrainConfig(model="moe", tokens_per_step=148, batch_size=4, dry_run=True)
    needed = {
        kind: plan_memory(config, {**SIZES, **dict(settings)}, "cpu", torch.float32)
        for kind, settings in (
            ("plain", {"n_active": 1}),
            ("active", {"n_active": 4}),
            ("idle", {"n_active": 1, "n_expert": 10}),
        )
    }
    assert needed["active"].weights == needed["plain"].weights < needed["idle"].weights
    assert needed["active"].activations > 1.3 * needed["plain"].activations


@pytest.mark.slow
def test_it_is_compiled_once_whatever_the_experts_get(toy, capsys):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    compiled = []
    for steps in (2, 12):
        counters.clear()
        train.main([*RUN, f"--steps={steps}", "--compile", f"--out=compiled-{steps}"])
        compiled.append(counters["stats"]["unique_graphs"])
        torch._dynamo.reset()
    assert "torch.compile failed" not in capsys.readouterr().out
    assert compiled[0] == compiled[1] > 0
