"""models/sparse.py: attention by blocks against the matrix of its mask, Longformer, BigBird, LongT5
and Mistral of transformers, windows that stay windows in every mode, Linformer."""

import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import TOY, TOY_BERT, check_resumed, peer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import convert
import decoding
import model
import sample
import train
from bert import BERT
from engine.checkpoint import load_model
from engine.memory import Ledger, plan_memory
from engine.setup import recompute_blocks
from model import GPT, GPTConfig, attend
from models import sparse
from models.sparse import (
    BlockAttention,
    Linformer,
    LinformerConfig,
    SparseBERT,
    SparseBERTConfig,
    SparseGPT,
    SparseGPTConfig,
    and_masks,
    causal,
    dilated,
    draw,
    global_tokens,
    matrix,
    or_masks,
    random_blocks,
    random_table,
    window,
)
from tasks.flags import TrainConfig

MASKS = {
    "causal": causal,
    "window": window(4, 4),
    "causal window": window(9, 0),
    "dilated": dilated(3, 3, 3),
    "global": or_masks(window(2, 2), global_tokens(3)),
    "random": or_masks(window(3, 3), random_blocks(random_table(20, 2, 1, causal=False), 8)),
    "BigBird, causal": and_masks(
        causal,
        or_masks(
            window(5, 0), global_tokens(2), random_blocks(random_table(20, 2, 1, causal=True), 8)
        ),
    ),
    "sometimes nothing": lambda t, s: s > t + 3,
}
CPU = torch.device("cpu")


def inputs(T: int, S: int, B: int = 2, H: int = 3, D: int = 8, dtype=torch.double) -> list[Tensor]:
    """q, k, v"""
    return [torch.randn(B, H, n, D, dtype=dtype, requires_grad=True) for n in (T, S, S)]


# ---- masks ---------------------------------------------------------------------------------------


SHOWN = {
    "causal": (causal, 4),
    "window": (window(2, 1), 6),
    "dilated": (dilated(2, 0, 3), 8),
    "global_tokens": (global_tokens(1), 4),
    "random_blocks": (random_blocks(np.array([[2], [0], [1]]), 2), 6),
    "and_masks": (and_masks(causal, window(1, 1)), 4),
    "or_masks": (or_masks(global_tokens(1), window(1, 1)), 6),
}


@pytest.mark.parametrize("name", SHOWN)
def test_each_docstring_shows_what_is_drawn(name):
    lines = [line.strip() for line in getattr(sparse, name).__doc__.splitlines()]
    assert [line for line in lines if re.fullmatch("[x.]( [x.])+", line)] == draw(
        *SHOWN[name]
    ).splitlines()


def test_the_matrix_is_that_of_model_py():
    assert torch.equal(matrix(causal, 3, 7), model.causal_mask(3, 7))
    assert matrix(window(2, 0), 1, 9)[0].nonzero()[:, 0].tolist() == [6, 7, 8]


@pytest.mark.parametrize("is_causal", [True, False])
def test_random_blocks_are_far_and_each_is_drawn(is_causal):
    table = random_table(30, 3, 2, causal=is_causal)
    for i, row in enumerate(table.tolist()):
        drawn = [j for j in row if j != i]
        far = max(0, i - 2) + (0 if is_causal else max(0, 27 - i))
        assert len(set(drawn)) == len(drawn) == min(3, far)
        assert all(abs(j - i) > 2 and (j < i or not is_causal) for j in drawn)
    assert len(np.unique(table)) > 15
    if is_causal:  # a longer text adds rows, and changes none
        assert (random_table(50, 3, 2, causal=True)[:30] == table).all()


# ---- attention by blocks -------------------------------------------------------------------------

SHAPES = [(13, 13), (37, 37), (130, 130), (16, 16), (5, 37), (20, 130), (1, 37), (2, 2)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_blocks_are_the_matrix(name, padded):
    """Values and gradients, at awkward lengths, behind a cache, with padding, one query alone."""
    attention = BlockAttention(MASKS[name], 8)
    for T, S in SHAPES:
        q, k, v = inputs(T, S)
        keep, allowed = None, matrix(MASKS[name], T, S)
        if padded:
            keep = torch.arange(S) < torch.tensor([[S], [max(1, S - 6)]])
            allowed = allowed & keep[:, None, None]
        found, want = attention(q, k, v, keep=keep), attend(q, k, v, allowed, 0.0)
        torch.testing.assert_close(found, want)
        direction = torch.randn_like(want)
        gradients = [
            torch.autograd.grad((y * direction).sum(), (q, k, v), materialize_grads=True)
            for y in (found, want)
        ]
        torch.testing.assert_close(*gradients)


def test_with_the_kernels_of_a_run_and_in_bf16(installed):
    attention = BlockAttention(MASKS["global"], 16)
    q, k, v = inputs(70, 70, dtype=torch.float32)
    want = attend(q, k, v, matrix(MASKS["global"], 70, 70), 0.0)
    torch.testing.assert_close(attention(q, k, v), want, atol=1e-5, rtol=1e-5)
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    found = attention(*half)
    assert found.dtype == torch.bfloat16
    assert (found.float() - want).norm() < 0.02 * want.norm()
    found.sum().backward()
    assert half[0].grad.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(attention(q, k, v), want, atol=1e-5, rtol=1e-5)


def test_dropout_drops_weights_and_keeps_the_mean():
    q, k, _ = inputs(128, 128, H=4)
    y = BlockAttention(window(9, 9), 16)(q, k, torch.ones_like(q), 0.5)
    assert y.mean().item() == pytest.approx(1, abs=0.05) and y.std() > 0.1


@pytest.mark.slow
def test_memory_grows_with_the_length_and_not_with_its_square():
    """Twice the length, twice the bytes, of what a step computes and of the kept layout; the matrix
    takes four times as many."""
    far = random_blocks(random_table(128, 2, 1, causal=True), 32)
    bigbird, found = and_masks(causal, or_masks(window(31, 0), global_tokens(2), far)), {}
    for name in ("blocks", "matrix"):
        for T in (1024, 2048, 4096):
            x = [y.detach().float().requires_grad_() for y in inputs(T, T, B=1, H=1)]
            attention = BlockAttention(bigbird, 32)
            if name == "matrix":
                attention = partial(attend, mask=matrix(causal, T, T), dropout=0.0)
            attention(*x)  # the layout is made once
            with Ledger(x, cast=[]) as ledger:
                attention(*x).sum().backward()
            found[name, T] = ledger.peak
    for T in (1024, 2048):
        assert found["blocks", 2 * T] < 2.25 * found["blocks", T]
        assert found["matrix", 2 * T] > 3.9 * found["matrix", T]
    layouts = [BlockAttention(bigbird, 32).layout(T, T, CPU)[0] for T in (1024, 2048, 4096)]
    kept = [sum(x.nbytes for group in layout for x in group) for layout in layouts]
    assert kept[2] < 2.25 * kept[1] < 2.25**2 * kept[0]


def test_a_window_computes_few_blocks_of_scores():
    """Three key blocks for each block of 64 queries with a window of 128."""
    layout, _ = BlockAttention(window(127, 0), 64).layout(1024, 1024, CPU)
    assert sorted(len(keys) for _, keys, _ in layout) == [1, 2, 3 * 14]


# ---- parity --------------------------------------------------------------------------------------


def heads(x: Tensor, n: int) -> Tensor:
    """(B, T, C) -> (B, H, T, D)"""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def longformer(w: int = 8) -> nn.Module:
    """Their attention with the projections of global tokens equal to the others."""
    theirs = peer("transformers.models.longformer.modeling_longformer")
    config = theirs.LongformerConfig(
        hidden_size=24,
        num_attention_heads=2,
        attention_window=[w],
        num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )
    layer = theirs.LongformerSelfAttention(config, 0).eval()
    for name in ("query", "key", "value"):
        part = getattr(layer, name)
        nn.init.normal_(part.weight, std=0.3)
        getattr(layer, f"{name}_global").load_state_dict(part.state_dict())
    return layer


def run_longformer(layer: nn.Module, x: Tensor, n_global: int, padding: int) -> Tensor:
    flags = torch.zeros(x.shape[:2])  # 0 local, 1 global, -1 padding
    flags[:, :n_global], flags[1:, x.size(1) - padding :] = 1, -1
    return layer(
        x,
        attention_mask=10_000 * flags,
        is_index_masked=flags < 0,
        is_index_global_attn=flags > 0,
        is_global_attn=n_global > 0,
    )[0]


@pytest.mark.parametrize(("n_global", "padding"), [(0, 0), (0, 11), (3, 0), (3, 11)])
def test_longformer_is_a_window_and_global_tokens(n_global, padding):
    layer, x = longformer(8), torch.randn(2, 40, 24, requires_grad=True)
    want = run_longformer(layer, x, n_global, padding)
    q, k, v = (heads(part(x), 2) for part in (layer.query, layer.key, layer.value))
    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[1:, 40 - padding :] = False
    mask = or_masks(window(4, 4), global_tokens(n_global))
    found = BlockAttention(mask, 16)(q, k, v, keep=keep).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found[keep], want[keep], atol=1e-5, rtol=0)
    direction = torch.randn_like(want) * keep[..., None]
    found, want = (torch.autograd.grad((y * direction).sum(), x)[0] for y in (found, want))
    torch.testing.assert_close(found, want, atol=1e-4, rtol=0)
    assert want.abs().max() > 0.1


@pytest.mark.parametrize("H", [1, 2])
def test_bigbird_is_blocks_with_the_random_ones_that_it_drew(H, monkeypatch):
    """In training; in evaluation their port looks at block 0 in place of the random blocks, once
    more for each of them."""
    theirs = peer("transformers.models.big_bird.modeling_big_bird")
    config = theirs.BigBirdConfig(
        hidden_size=24, num_attention_heads=H, block_size=4, num_random_blocks=2
    )
    layer = theirs.BigBirdBlockSparseAttention(config, seed=3).train()
    for part in (layer.query, layer.key, layer.value):
        nn.init.normal_(part.weight, std=0.3)
    drawn, real = [], layer._bigbird_block_rand_mask_with_head

    def one_for_all_heads(**arguments) -> list[np.ndarray]:
        drawn.append(real(**arguments)[0])
        return drawn[-1:] * H

    monkeypatch.setattr(layer, "_bigbird_block_rand_mask_with_head", one_for_all_heads)
    B, T, b = 2, 64, 4
    x, keep = torch.randn(B, T, 24), torch.ones(B, T)
    masks = theirs.BigBirdModel.create_masks_for_block_sparse_attn(keep, b)
    names = ("from_blocked_mask", "to_blocked_mask")
    given = dict(zip((names[1], "band_mask", "from_mask", "to_mask"), masks, strict=True))
    want = layer(x, **given, from_blocked_mask=given[names[1]])[0]
    table = np.concatenate([drawn[0][:1], drawn[0], drawn[0][-1:]])  # the first and last see all
    mask = or_masks(
        lambda t, s: abs(t // b - s // b) <= 1,
        lambda t, s: (t < b) | (s < b) | (t >= T - b) | (s >= T - b),
        random_blocks(table, b),
    )
    q, k, v = (heads(part(x), H) for part in (layer.query, layer.key, layer.value))
    found = BlockAttention(mask, b)(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    layer.eval()
    broken = layer(x, **given, from_blocked_mask=given[names[1]])[0]
    assert (drawn[-1] == 0).all() and (broken - want).abs().max() > 0.1


def seen(network: Callable[[Tensor], Tensor], T: int, width: int) -> Tensor:
    """(T, T) bool: on which inputs (1, T, width) each output depends, by gradients."""
    x = torch.randn(1, T, width, requires_grad=True)
    y = network(x)[0] @ torch.randn(width)
    rows = [torch.autograd.grad(y[t], x, retain_graph=True)[0][0].any(-1) for t in range(T)]
    return torch.stack(rows)


def test_a_window_of_w_is_w_keys_in_mistral():
    theirs = peer("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 8, "vocab_size": 3, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 5}
    mistral = theirs.MistralModel(theirs.MistralConfig(**sizes)).eval()
    found = seen(lambda x: mistral(inputs_embeds=x).last_hidden_state, 20, 24)
    assert torch.equal(found, matrix(window(5 - 1, 0), 20, 20))
    assert found.sum(-1).max() == 5


def test_a_window_of_w_is_w_plus_1_keys_in_longformer():
    layer = longformer(8)
    found = seen(lambda x: run_longformer(layer, x, 0, 0), 32, 24)
    assert torch.equal(found, matrix(window(8 // 2, 8 // 2), 32, 32))
    assert found.sum(-1).max() == 8 + 1


def test_a_radius_of_r_is_2r_plus_1_keys_in_longt5():
    theirs = peer("transformers")
    sizes = {"d_model": 24, "d_kv": 12, "d_ff": 8, "num_heads": 2, "num_layers": 1}
    sizes |= {"local_radius": 3, "vocab_size": 3, "encoder_attention_type": "local"}
    encoder = theirs.LongT5EncoderModel(theirs.LongT5Config(**sizes)).eval()
    found = seen(lambda x: encoder(inputs_embeds=x).last_hidden_state, 23, 24)
    assert torch.equal(found, matrix(window(3, 3), 23, 23))
    assert found.sum(-1).max() == 2 * 3 + 1


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_window_of_w_is_w_keys_here(mode):
    gpt = getattr(network(n_layer=1, window=5), mode)()
    bert = getattr(encoder(n_layer=1, window=5), mode)()
    for sees, want in ((gpt, window(4, 0)), (bert, window(2, 2))):
        layer = sees.blocks[0]
        mask = gpt.sparse if sees is gpt else bert.attention_mask(None)
        assert torch.equal(seen(lambda x: layer(x, mask), 20, 36), matrix(want, 20, 20))  # noqa: B023


# ---- SparseGPT -----------------------------------------------------------------------------------

SIZES = {"vocab_size": 131, "block_size": 37, "n_layer": 3, "n_head": 6, "n_embd": 36, "n_ff": 52}
WITHOUT = dict(SIZES)
SIZES |= {"sparse_block": 8}
KINDS = {
    "window": {"window": 4},
    "dilated": {"window": 3, "dilation": 3},
    "BigBird": {"window": 3, "n_global": 1, "n_random": 1, "sparse_block": 4},
}


def enlarge(network: nn.Module) -> nn.Module:
    """In evaluation, with weights large enough that mistakes show."""
    for p in network.parameters():
        nn.init.normal_(p, std=0.3 if p.dim() > 1 else 1.0)
    return network.eval()


def network(**settings) -> SparseGPT:
    return enlarge(SparseGPT(SparseGPTConfig(**{**SIZES, **settings})))


RATES = {"dropout": 0.0, "attention_dropout": 0.0}


def encoder(**settings) -> SparseBERT:
    sizes = {**SIZES, **RATES, "window": 5, **settings}
    return enlarge(SparseBERT(SparseBERTConfig(**sizes)))


def linformer(**settings) -> Linformer:
    return enlarge(Linformer(LinformerConfig(**{**WITHOUT, **RATES, **settings})))


def tokens_of(*shape: int) -> Tensor:
    return torch.randint(131, shape)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_gpt_with_the_matrix_as_its_mask(kind):
    ours, tokens = network(**KINDS[kind]), tokens_of(2, 37)
    gpt = GPT(GPTConfig(**WITHOUT)).eval()
    gpt.load_state_dict(ours.state_dict())
    found, want = ours(tokens), gpt(tokens, mask=matrix(ours.sparse.mask, 37, 37))
    torch.testing.assert_close(found, want, atol=1e-4, rtol=0)
    assert (found - gpt(tokens)).abs().max() > 1
    shorter = ours(tokens[:, :11])  # with the same random blocks
    torch.testing.assert_close(shorter, want[:, :11], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_with_caches_the_logits_are_the_same(kind):
    model, tokens = network(**KINDS[kind]), tokens_of(2, 37)
    want, caches = model(tokens), model.make_caches()
    parts = [model(part, caches=caches) for part in tokens.split([5, 4, *[1] * 25, 3], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=0)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    written = [
        list(decoding.generate(model, prompts, lambda x, _: x.argmax(-1), 50, use_cache=cached))
        for cached in (True, False)
    ]
    assert written[0] == written[1] and len(written[0]) >= 50  # beyond block_size, too


def decoded(model: SparseGPT, tokens: Tensor) -> Tensor:
    caches = model.make_caches()
    return torch.cat([model(part, caches=caches) for part in tokens.split([3, 1, 1, 9, 1], 1)], 1)


def modes() -> dict[str, Callable[[SparseGPT, Tensor], Tensor]]:
    return {
        "training": lambda model, tokens: model.train()(tokens),
        "evaluation": lambda model, tokens: model.eval()(tokens),
        "without a gradient": torch.no_grad()(lambda model, tokens: model.eval()(tokens)),
        "decoding": torch.no_grad()(lambda model, tokens: decoded(model.eval(), tokens)),
    }


def check_reach(model: SparseGPT, reach: int, T: int = 15) -> None:
    """The last position depends on the last `reach` tokens and on none before, in every mode, also
    after short batches. In the port of BigBird to transformers a short batch once turned the sparse
    attention into full attention, for all that came later."""
    tokens = torch.randint(model.config.vocab_size, (2, T))
    far, near = tokens.clone(), tokens.clone()
    far[:, : T - reach] = (far[:, : T - reach] + 1) % model.config.vocab_size
    near[:, T - reach] = (near[:, T - reach] + 1) % model.config.vocab_size
    for when in ("at first", "after short batches"):
        for mode, logits in modes().items():
            want = logits(model, tokens)[:, -1]
            same = logits(model, far)[:, -1]
            torch.testing.assert_close(same, want, atol=1e-5, rtol=1e-5, msg=f"{mode}, {when}")
            assert not torch.equal(logits(model, near)[:, -1], want), (mode, when)
        for short in (1, 2, reach - 1, T - 1):
            model.train()(tokens[:, :short], tokens[:, :short])["loss"].backward()
            model.eval()(tokens[:1, :short])


def test_what_is_out_of_reach_changes_nothing_in_any_mode():
    check_reach(network(window=4), 3 * 3 + 1)


def test_the_first_tokens_are_seen_from_everywhere():
    model, tokens = network(window=2, n_layer=1, n_global=2), tokens_of(1, 30)
    want = model(tokens)[0, -1]
    for at, sees in ((0, True), (1, True), (2, False), (27, False), (28, True)):
        other = tokens.clone()
        other[0, at] = (other[0, at] + 1) % 131
        assert torch.equal(model(other)[0, -1], want) != sees, at


def test_a_mask_is_never_replaced_by_full_attention():
    model, tokens = network(window=4), tokens_of(2, 20)
    prefix = model_mask = torch.zeros(20, 20, dtype=torch.bool)
    model_mask[:, ::2] = True
    torch.testing.assert_close(
        model.features(tokens, prefix),
        GPT.features(model, tokens, prefix & matrix(window(3, 0), 20, 20)),
    )
    for mask in (None, "full", lambda q, k, v, dropout: v):
        with pytest.raises(ValueError, match="does not go with a sparse pattern"):
            model(tokens, mask=mask)


def test_gradients_of_recomputed_blocks_are_the_same():
    model, tokens, found = network(**KINDS["BigBird"]), tokens_of(2, 20), []
    for again in (False, True):
        model.train().zero_grad()
        if again:
            recompute_blocks(model)
        model(tokens, tokens)["loss"].backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_count_the_keys_that_are_looked_at(kind):
    model = network(**KINDS[kind])
    full, allowed = GPT.flops_per_token(model), matrix(model.sparse.mask, 37, 37).sum().item() / 37
    assert full - model.flops_per_token() == pytest.approx(12 * 3 * 36 * (37 - allowed), abs=1)


def test_flops_of_a_long_text_are_estimated():
    model = network(window=100, block_size=4000)
    seen = (100 * 3900 + 100 * 101 / 2) / 4000
    found = (GPT.flops_per_token(model) - model.flops_per_token()) / (12 * 3 * 36)
    assert 4000 - found == pytest.approx(seen, rel=0.01)


@pytest.mark.slow
def test_the_plan_needs_less_memory_than_that_of_gpt():
    sizes = {**SIZES, "block_size": 512, "window": 16, "sparse_block": 16}
    config = {"tokens_per_step": 2048, "batch_size": 4, "dry_run": True}
    need = [
        plan_memory(TrainConfig(model=name, **config), s, "cpu", torch.float32).activations
        for name, s in (
            ("sparse_gpt", sizes),
            ("gpt", {k: v for k, v in sizes.items() if k not in ("window", "sparse_block")}),
        )
    ]
    assert need[0] < 0.5 * need[1]


# ---- SparseBERT, Linformer -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [encoder, linformer])
@pytest.mark.parametrize("settings", [{"n_global": 1}, {"n_random": 1}])
def test_padding_changes_nothing(make, settings):
    model = encoder(**settings) if make is encoder else linformer(n_keys=7)
    tokens, keep = tokens_of(2, 23), torch.ones(2, 23, dtype=torch.bool)
    keep[1, 14:] = False
    found = model.features(tokens, keep=keep)
    for row, length in ((0, 23), (1, 14)):
        alone = model.features(tokens[row : row + 1, :length])
        torch.testing.assert_close(found[row, :length], alone[0], atol=1e-4, rtol=1e-4)


def test_linformer_is_its_formula():
    model = linformer(n_keys=7)
    q, k, v = inputs(23, 23)
    E, D = model.projection.double(), q.size(-1)
    keep = torch.arange(23) < torch.tensor([[23], [14]])
    zeroed = [torch.einsum("bhsd,bs->bhsd", x, keep.double()) for x in (k, v)]
    keys, values = (torch.einsum("ks,bhsd->bhkd", E[:, :23], x) for x in zeroed)
    weights = (torch.einsum("bhtd,bhkd->bhtk", q, keys) / D**0.5).softmax(-1)
    want = torch.einsum("bhtk,bhkd->bhtd", weights, values)
    found = attend(q, k, v, model.attention_mask(keep), 0.0)
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)
    assert model.projection.shape == (7, 37)


def test_linformer_sees_what_comes_later_in_every_key():
    """Why it cannot be causal."""
    layer, model = lambda x: model.blocks[0](x, model.attention_mask(None)), linformer(n_keys=2)
    assert seen(layer, 12, 36).all()


def test_the_law_of_the_projection():
    sizes = {"vocab_size": 9, "block_size": 400, "n_layer": 1, "n_head": 1, "n_embd": 8}
    model = Linformer(LinformerConfig(**sizes, n_keys=100))
    assert model.projection.std().item() == pytest.approx(0.05, rel=0.05)
    k = torch.randn(1, 1, 400, 8)
    assert (model.projection @ k).std().item() == pytest.approx(1, rel=0.2)


def test_flops_of_linformer_are_those_of_products():
    """2 forward and 4 backward for each number of E k, E v, the scores and the output."""
    model, (q, k, v) = linformer(n_keys=9), inputs(37, 37, B=1, H=6, D=6, dtype=torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attend(q, k, v, model.attention_mask(None), 0.0).sum().backward()
    others = BERT.flops_per_token(model) - 12 * 3 * 36 * 37
    assert counter.get_total_flops() * 3 == 37 * (model.flops_per_token() - others)


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (SparseGPTConfig, {"window": 0}, "window=0 is out of range: choose 1 to 65,536"),
        (SparseGPTConfig, {"dilation": 0}, "dilation=0 is out of range: choose 1"),
        (SparseGPTConfig, {"n_global": -1}, "n_global=-1 is out of range: choose 0"),
        (SparseGPTConfig, {"n_random": -1}, "n_random=-1 is out of range: choose 0"),
        (SparseGPTConfig, {"sparse_block": 0}, "sparse_block=0 is out of range: choose 1 to 1,024"),
        (SparseGPTConfig, {"block_size": 2**20}, "block_size=1048576 is too large for masks"),
        (SparseBERTConfig, {"window": 8}, "window=8 is even.* choose 7 or 9"),
        (LinformerConfig, {"n_keys": 0}, "n_keys=0 is out of range: choose 1 to block_size=37"),
        (LinformerConfig, {"n_keys": 38}, "n_keys=38 is out of range: choose 1 to block_size=37"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**{**WITHOUT, **settings})


# ---- in the loop ---------------------------------------------------------------------------------

RUN = [*TOY, "--model=sparse_gpt", "--window=3", "--sparse_block=4", "--steps=4"]


@pytest.mark.slow
def test_a_run_trains_resumes_evaluates_and_samples_with_windows(toy, capsys):
    check_resumed(RUN)
    capsys.readouterr()
    sample.main(["--checkpoint=whole/best.pt", "--prompt=3 times", "--max_new_tokens=30"])
    assert capsys.readouterr().out.startswith("3 times")
    sample.main(["--checkpoint=whole/best.pt", "--eval=toy.txt"])
    loaded, _, _ = load_model(toy / "whole/best.pt", CPU)
    assert type(loaded) is SparseGPT and loaded.config.window == 3
    check_reach(loaded, 2 * 2 + 1)
    with pytest.raises(ValueError, match="is not known to Hugging Face's formats"):
        convert.main(["export", "whole/best.pt", "--to=new"])


def test_a_gpt_goes_on_as_a_sparse_one_and_not_back(toy):
    train.main([*TOY, "--steps=2", "--out=full"])
    on = ["--data=toy.txt", "--steps=1", "--tokens_per_step=128", "--device=cpu"]
    train.main([*on, "--model=sparse_gpt", "--init=full/best.pt", "--window=5", "--out=sparse"])
    assert load_model(toy / "sparse/best.pt", CPU)[0].config.window == 5
    for name in ("gpt", "complete", "llama"):
        with pytest.raises(ValueError, match=f"{name}.* cannot begin from the sparse_gpt"):
            train.main([*on, f"--model={name}", "--init=sparse/best.pt", "--out=x"])


BERT_RUN = [*TOY_BERT, "--model=sparse_bert", "--sparse_block=4", "--steps=2"]


def test_an_encoder_is_trained_with_pairs_and_padding(toy):
    train.main([*BERT_RUN, "--window=5", "--n_global=1", "--out=pattern"])
    model, _, _ = load_model(toy / "pattern/best.pt", CPU)
    assert type(model) is SparseBERT and model.config.n_global == 1
    with pytest.raises(ValueError, match="classify cannot begin from the sparse_bert"):
        train.main(["--model=classify", "--init=pattern/best.pt", "--data=toy.txt", "--out=x"])


def test_linformer_is_trained(toy):
    run = [*TOY_BERT, "--model=linformer", "--n_keys=4", "--steps=2"]
    train.main([*run, "--out=linformer", "--optimizer=muon"])
    projection = load_model(toy / "linformer/best.pt", CPU)[0].projection
    assert projection.shape == (4, 16)
    for name in ("classify", "bert", "sparse_bert"):
        with pytest.raises(ValueError, match=f"{name} cannot begin from the linformer"):
            train.main([f"--model={name}", "--init=linformer/best.pt", "--data=toy.txt"])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [RUN, [*BERT_RUN, "--window=5"]], ids=["gpt", "bert"])
def test_a_compiled_run_is_the_same(toy, capsys, flags):
    torch._dynamo.reset()
    train.main([*flags, "--dtype=fp32", "--out=plain"])
    train.main([*flags, "--dtype=fp32", "--compile", "--out=compiled"])
    assert "torch.compile failed" not in capsys.readouterr().out
    plain, compiled = (
        torch.load(f"{name}/latest.pt", weights_only=True)["model"]
        for name in ("plain", "compiled")
    )
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, atol=1e-4, rtol=1e-3)
