"""models/llama.py: transformers' Llama, Mistral and Qwen3; caches, windows, groups of heads."""

import math

import pytest
import torch
import torch.nn as nn
from conftest import TOY, check_resumed, peer
from torch import Tensor

import decoding
import sample
from engine import cpu, kernels
from engine.graphs import TextSteps
from engine.hub.peers import hugging_face_llama
from engine.presets import PRESETS
from model import causal_mask, count_parameters, prefix_mask
from models.llama import (
    Llama,
    LlamaConfig,
    RMSNorm,
    rotate,
    rotation,
    rotation_rates,
    window_mask,
)

SIZES = {"vocab_size": 131, "block_size": 37, "n_layer": 3, "n_head": 6, "n_embd": 36, "n_ff": 50}
KINDS = {
    "llama": {"tied": False},
    "grouped": {"n_kv_head": 2},
    "one_head": {"n_kv_head": 1},
    "stretched": {"rope_theta": 500.0, "rope_factor": 8.0, "rope_original": 16},
    "mistral": {"n_kv_head": 3, "window": 7, "tied": False},
    "qwen3": {"n_kv_head": 2, "qk_norm": True, "head_dim": 10},
}


def network(**settings) -> Llama:
    """In evaluation, with weights large enough that mistakes show."""
    model = Llama(LlamaConfig(**{**SIZES, **settings})).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3 if p.dim() > 1 else 1.0)
    return model


def tokens_of(*shape: int) -> Tensor:
    return torch.randint(131, shape)


# ---- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_transformers(kind):
    transformers = peer("transformers")
    ours = network(**KINDS[kind])
    theirs = hugging_face_llama(transformers, ours).eval()
    tokens = tokens_of(3, 37)
    found, want = ours(tokens), theirs(tokens).logits
    assert want.abs().max() > 3
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    direction = torch.randn_like(found)
    (found * direction).sum().backward()
    (want * direction).sum().backward()
    got = [p.grad for p in ours.parameters()]
    wanted = {p.shape: [] for p in ours.parameters()}
    for p in theirs.parameters():
        wanted[p.shape].append(p.grad)
    for gradient in got:  # names differ: each has its partner among those of its shape
        near = min(
            (gradient - other).abs().max() / other.abs().max() for other in wanted[gradient.shape]
        )
        assert near < 2e-5


def test_the_other_layout_of_rotary_positions_is_another_model():
    """Meta's files pair neighbouring channels. Taken for ours, they change logits by more than 1,
    and with the rows in our order they change nothing."""
    model, tokens = network(), tokens_of(2, 30)
    want = model(tokens)
    for order, same in (("wrong", False), ("right", True)):
        for block in model.blocks:
            for linear in (block.attention.q, block.attention.k):
                heads = linear.weight.data.unflatten(0, (6, 6))
                if order == "wrong":  # to neighbours
                    heads = heads.unflatten(1, (2, 3)).transpose(1, 2)
                else:
                    heads = heads.unflatten(1, (3, 2)).transpose(1, 2)
                linear.weight.data = heads.reshape(36, 36)
        apart = (model(tokens) - want).abs().max()
        assert apart < 1e-5 if same else apart > 1


def test_a_score_depends_on_the_distance_alone():
    config = LlamaConfig(**{**SIZES, "head_dim": 10})
    q, k = torch.randn(2, 1, 1, 1, 10).double()

    def score(i: int, j: int) -> Tensor:
        a, b = (rotate(x, *rotation(torch.tensor([p]), config)) for x, p in ((q, i), (k, j)))
        return (a * b).sum()

    torch.testing.assert_close(score(9, 4), score(35, 30), atol=1e-5, rtol=0)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3
    torch.testing.assert_close(score(7, 7), (q * k).sum(), atol=1e-5, rtol=0)


def test_pairs_turn_by_the_angles_of_the_paper():
    """Written out with complex numbers, in float64."""
    config = LlamaConfig(**{**SIZES, "head_dim": 10})
    x, places = torch.randn(1, 1, 37, 10), torch.arange(37)
    pairs = torch.complex(*x.double().chunk(2, -1))
    angles = places[:, None].double() * 10000.0 ** (-torch.arange(5).double() / 5)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    want = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(
        rotate(x, *rotation(places, config)).double(), want, atol=1e-5, rtol=0
    )


def test_llama_3_stretches_slow_pairs_and_leaves_fast_ones():
    """Factor 8 of 3.1 and 32 of 3.2, with the formula as Meta's code has it, by wavelengths."""
    for factor in (8.0, 32.0):
        sizes = {**SIZES, "head_dim": 128, "rope_theta": 500000.0}
        plain = rotation_rates(LlamaConfig(**sizes))
        found = rotation_rates(LlamaConfig(**sizes, rope_factor=factor))
        want = []
        for rate in plain.double().tolist():
            wavelength = 2 * math.pi / rate
            if wavelength < 8192 / 4:
                want.append(rate)
            elif wavelength > 8192:
                want.append(rate / factor)
            else:
                smooth = (8192 / wavelength - 1) / 3
                want.append((1 - smooth) * rate / factor + smooth * rate)
        torch.testing.assert_close(found.double(), torch.tensor(want).double(), rtol=1e-5, atol=0)
        assert 0 < (found == plain).sum() < 64 < 64 + (found < plain / 2).sum()


def test_norms_and_angles_are_fp32_in_bf16():
    config = LlamaConfig(**SIZES, qk_norm=True)
    norm, x = RMSNorm(36, 1e-5), 100 * torch.randn(5, 36)
    nn.init.normal_(norm.weight)
    half = x.bfloat16()
    want = norm(half.float())
    torch.testing.assert_close(norm(half).float(), want, rtol=2**-7, atol=0)  # rounded twice
    places = torch.tensor([4000, 4001])
    cos, sin = rotation(places, config)
    assert cos.dtype == sin.dtype == torch.float32
    assert (cos[0] - cos[1]).abs().max() > 0.1  # in bf16 the two places would be one
    y = torch.randn(1, 2, 2, 6).bfloat16()
    assert torch.equal(rotate(y, cos, sin), rotate(y.float(), cos, sin).bfloat16())
    model = network(qk_norm=True)
    tokens = tokens_of(2, 37)
    want, got = model(tokens), model.bfloat16()(tokens)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.05 * want.norm()


# ---- caches, windows, masks ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [1, 5, 20])
def test_with_caches_the_logits_are_the_same(kind, first):
    """Past the window of 7 too, in parts of several tokens and of one."""
    model, tokens = network(**KINDS[kind]), tokens_of(2, 37)
    want, caches = model(tokens), model.make_caches()
    parts, sizes = [], [first, 4, *[1] * (37 - first - 4 - 3), 3]
    for part in tokens.split(sizes, 1):
        parts.append(model(part, caches=caches))
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="38 positions are more than block_size=37"):
        model(tokens[:, :1], caches=caches)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_does_not_depend_on_the_cache(kind):
    """Beyond block_size, where half a block is dropped and read again."""
    model, prompts = network(**KINDS[kind], block_size=13), [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3]]

    def pick(logits: Tensor, rows: list[int]) -> Tensor:
        return logits.argmax(-1)

    want = list(decoding.generate(model, prompts, pick, 30, use_cache=False))
    assert list(decoding.generate(model, prompts, pick, 30)) == want
    steps = TextSteps(model, 2, 13, lambda logits, u: logits.argmax(-1))
    steps_pick = type(
        "Pick", (), {"draw": lambda self, row, n: torch.zeros(n), "leads": [b"", b""]}
    )
    assert list(decoding.generate(model, prompts, steps_pick(), 30, steps=steps)) == want


def test_a_token_sees_as_many_keys_as_the_window_says():
    """Of one layer: w keys, itself included, as in Mistral; elsewhere w may mean one more."""
    model = network(n_layer=1, window=7)
    tokens = tokens_of(1, 37)
    want = model(tokens)
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 131
    apart = (model(changed) - want).abs().amax(-1)[0]
    assert (apart[10:17] > 1e-4).all()
    assert (apart[:10] == 0).all()
    assert (apart[17:] < 1e-5).all()


def test_window_masks():
    assert window_mask(3, 5, 3).int().tolist() == [
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert torch.equal(window_mask(4, 6, 9), causal_mask(4, 6))
    model, tokens = network(window=7), tokens_of(2, 20)
    want = model(tokens)
    torch.testing.assert_close(model(tokens, mask=window_mask(20, 20, 7)), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(tokens, mask=causal_mask(20, 20)), want, atol=1e-5, rtol=0)
    wide = network(window=20)
    wide.load_state_dict(model.state_dict())
    assert (wide(tokens) - want).abs().max() > 0.1


def test_other_masks_mean_what_they_do_in_gpt():
    model, tokens = network(n_kv_head=2), tokens_of(1, 12)
    prefix = prefix_mask(torch.tensor([5]), 12)
    want = model(tokens, mask=prefix)
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 131
    assert (model(changed, mask=prefix) - want)[0, 0].abs().max() > 1e-3  # the prefix is seen
    assert torch.equal(model(changed)[0, :4], model(tokens)[0, :4])  # and else the future is not
    with pytest.raises(ValueError, match="mask='nonsense' is not known"):
        model(tokens, mask="nonsense")
    with pytest.raises(ValueError, match="mask='nonsense' is not known"):
        model(tokens[:, :1], mask="nonsense")


def test_targets_of_minus_100_do_not_count():
    model, tokens = network(tied=False), tokens_of(2, 20)
    targets = tokens_of(2, 20)
    targets[0, 3:] = -100
    logits = model(tokens)
    want = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, targets)["loss"], want)


@pytest.mark.parametrize("kind", ["grouped", "mistral", "qwen3"])
def test_laid_out_for_decoding_it_writes_the_same(kind, installed):
    model, tokens = network(**KINDS[kind]), tokens_of(2, 30)
    want = model(tokens)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.06)):
        laid_out = Llama(model.config).eval()
        laid_out.load_state_dict(model.state_dict())
        laid_out.to(dtype)
        cpu.lay_out_for_decoding(laid_out)
        caches = laid_out.make_caches()
        with torch.no_grad():
            parts = [
                laid_out.head(laid_out.features(part, caches=caches))
                for part in tokens.split([9, *[1] * 21], 1)
            ]
        got = torch.cat(parts, 1).float()
        assert (got - want).norm() < near * want.norm()


# ---- sizes and initialisation --------------------------------------------------------------------


def test_every_tensor_has_its_law():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=1000, n_layer=8, n_head=8, n_embd=256, tied=False))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all()
            continue
        want = 0.02 / 4 if name.endswith("proj.weight") else 0.02
        assert abs(p.std().item() / want - 1) < 0.02, name
        assert abs(p.mean().item()) < want / 50


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama-15m", 15_191_712),
        ("llama-110m", 109_529_856),
        ("smollm2-135m", 134_515_008),
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama2-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, count):
    fields = LlamaConfig.__dataclass_fields__
    with torch.device("meta"):
        model = Llama(LlamaConfig(**{k: v for k, v in PRESETS[preset].items() if k in fields}))
    assert count_parameters(model) == count


def test_flops_are_those_of_products():
    """Counted by torch over a training step, whose attention here is the whole square."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    for settings in (KINDS["grouped"], KINDS["qwen3"], {"tied": False}):
        model = network(**settings)
        # Products of the plain formula: those inside of other kernels are not seen.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(tokens_of(1, 37), tokens_of(1, 37))["loss"].backward()
        assert abs(counter.get_total_flops() / 37 / model.flops_per_token() - 1) < 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_kv_head": 4}, "n_kv_head=4 does not divide n_head=6: choose one of 1, 2, 3, 6"),
        ({"n_kv_head": -1}, "n_kv_head=-1 does not divide"),
        ({"n_head": 5}, "n_embd=36 is no multiple of 10, twice n_head=5"),
        ({"n_head": 4}, "n_embd=36 is no multiple of 8"),
        ({"head_dim": 7}, "head_dim=7 is no even number"),
        ({"window": -1}, "window=-1 is too small"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 is out of range: choose 1 or more"),
        ({"rope_theta": math.nan}, "rope_theta=nan is out of range"),
        ({"n_head": 0}, "n_head=0 is too small"),
        ({"dropout": 1.0}, "dropout=1.0 is out of range"),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**{**SIZES, **settings})


# ---- in the loop ---------------------------------------------------------------------------------

RUN = [*TOY, "--model=llama", "--n_kv_head=1", "--window=5", "--tied=false", "--steps=4"]


def test_it_is_trained_resumed_and_sampled_by_the_same_commands(toy, capsys):
    check_resumed(RUN)
    capsys.readouterr()
    sample.main(["--checkpoint=whole/best.pt", "--prompt=3 times", "--max_new_tokens=30"])
    assert capsys.readouterr().out.startswith("3 times")


def test_recomputed_blocks_have_the_same_gradients():
    from engine.setup import recompute_blocks

    model, tokens = network(**KINDS["mistral"]), tokens_of(2, 20)
    model.train()
    model(tokens, tokens)["loss"].backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    recompute_blocks(model)
    model(tokens, tokens)["loss"].backward()
    for p, gradient in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_a_run_installs_kernels_that_give_the_same():
    model, tokens = network(**KINDS["grouped"]), tokens_of(2, 20)
    want = model(tokens, tokens)["loss"]
    kernels.install(torch.device("cpu"))
    torch.testing.assert_close(model(tokens, tokens)["loss"], want)
