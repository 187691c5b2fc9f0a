"""model.py beside torch.nn's layers and Hugging Face's GPT-2, and by perturbation."""

import re
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import peer

from engine.hub import peers
from engine.plan import parameter_table
from engine.presets import PRESETS
from model import (
    GPT,
    Attention,
    Block,
    Dropout,
    GPTConfig,
    KVCache,
    attend,
    causal_mask,
    count_parameters,
    padding_mask,
    prefix_mask,
    tanh_gelu,
)

SMALL = GPTConfig(vocab_size=37, block_size=13, n_layer=3, n_head=4, n_embd=28, n_ff=44)


def small_gpt(**changes) -> GPT:
    """In eval mode, with weights large enough that every part matters."""
    model = GPT(GPTConfig(**{**vars(SMALL), **changes})).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def drawn(mask: torch.Tensor) -> list[str]:
    return ["".join("x" if cell else "." for cell in row) for row in mask.tolist()]


def test_masks_draw_the_matrices_of_their_docstrings():
    assert drawn(causal_mask(3, 5)) == ["xxx..", "xxxx.", "xxxxx"]
    assert drawn(causal_mask(3, 2)) == ["..", "x.", "xx"]
    assert drawn(padding_mask(torch.tensor([[1, 1, 1, 0, 0]]))[0, 0]) == ["xxx.."]
    got = prefix_mask(torch.tensor([3, 0]), 5)
    assert got.shape == (2, 1, 5, 5)
    assert drawn(got[0, 0]) == ["xxx..", "xxx..", "xxx..", "xxxx.", "xxxxx"]
    assert torch.equal(got[1, 0], causal_mask(5, 5))


@pytest.mark.parametrize("T,S", [(1, 1), (1, 7), (7, 7), (3, 7)])
def test_causal_attention_is_aligned_to_the_lower_right(T, S):
    """torch's is_causal aligns to the upper left: with a cache it would hide the cache."""
    q, k, v = torch.randn(2, 3, T, 5), torch.randn(2, 3, S, 5), torch.randn(2, 3, S, 5)
    scores = (q @ k.mT / 5**0.5).masked_fill(~causal_mask(T, S), -torch.inf)
    torch.testing.assert_close(attend(q, k, v, "causal", 0.0), scores.softmax(-1) @ v)


def test_a_row_that_sees_nothing_is_zero_and_has_finite_gradients():
    """A fully padded source once gave NaN, and NaN in one row spreads to all weights."""
    q, k, v = (torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(3))
    keep = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    y = attend(q, k, v, padding_mask(keep), 0.0)
    assert torch.equal(y[1], torch.zeros_like(y[1])) and y[0].abs().min() > 0
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    assert v.grad[1].abs().max() == 0


def test_wrong_masks_are_refused():
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match=r"torch\.float32.*torch\.bool"):
        attend(q, q, q, torch.ones(2, 2), 0.0)
    with pytest.raises(ValueError, match="'casual'"):
        attend(q, q, q, "casual", 0.0)


def test_cache_refuses_more_than_it_holds():
    cache = KVCache(3)
    cache.append(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    with pytest.raises(ValueError, match="holds 3 positions, 2 are used and 2 more"):
        cache.append(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    assert cache.length == 2


@pytest.mark.parametrize(
    "heads,width,remedy", [(5, 128, "choose 4 or 8"), (0, 6, "choose 1"), (9, 8, "choose 8")]
)
def test_heads_that_do_not_divide_the_width_get_a_remedy(heads, width, remedy):
    config = GPTConfig(n_embd=width)
    config.n_head = heads
    with pytest.raises(
        ValueError, match=f"n_head={heads} does not divide n_embd={width}.*{remedy}"
    ):
        Attention(config)


def copy_attention(ours: Attention, theirs: nn.MultiheadAttention) -> None:
    for i, name in enumerate("qkv"):
        getattr(ours, name).weight.data.copy_(theirs.in_proj_weight.data.chunk(3)[i])
        getattr(ours, name).bias.data.copy_(theirs.in_proj_bias.data.chunk(3)[i])
    ours.proj.load_state_dict(theirs.out_proj.state_dict())


def copy_layer(ours: Block, theirs: nn.Module, norms: list[str]) -> None:
    copy_attention(ours.attention, theirs.self_attn)
    ours.mlp.fc.load_state_dict(theirs.linear1.state_dict())
    ours.mlp.proj.load_state_dict(theirs.linear2.state_dict())
    for i, name in enumerate(norms, 1):
        getattr(ours, name).load_state_dict(getattr(theirs, f"norm{i}").state_dict())


def randomised(layer: nn.Module) -> nn.Module:
    for p in layer.parameters():
        nn.init.normal_(p, std=0.2)
    return layer.eval()


@pytest.mark.parametrize("pre_ln", [True, False])
@pytest.mark.parametrize("act", [F.relu, F.gelu], ids=["relu", "gelu"])
def test_block_equals_torch_encoder_layer_with_padding(pre_ln, act):
    config = GPTConfig(n_head=4, n_embd=28, n_ff=44)
    theirs = randomised(
        nn.TransformerEncoderLayer(28, 4, 44, 0.0, act, batch_first=True, norm_first=pre_ln)
    )
    ours = Block(config, pre_ln=pre_ln, act=act).eval()
    copy_layer(ours, theirs, ["attention_norm", "mlp_norm"])
    x = torch.randn(3, 7, 28)
    keep = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    with torch.no_grad():
        want, got = theirs(x, src_key_padding_mask=~keep), ours(x, padding_mask(keep))
    torch.testing.assert_close(got[keep], want[keep], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pre_ln", [True, False])
def test_block_equals_torch_decoder_layer_with_cross_attention(pre_ln):
    config = GPTConfig(n_head=4, n_embd=28, n_ff=44)
    theirs = randomised(
        nn.TransformerDecoderLayer(28, 4, 44, 0.0, "relu", batch_first=True, norm_first=pre_ln)
    )
    ours = Block(config, pre_ln=pre_ln, act=F.relu, cross=True).eval()
    copy_layer(ours, theirs, ["attention_norm", "cross_norm", "mlp_norm"])
    copy_attention(ours.cross, theirs.multihead_attn)
    x, memory = torch.randn(3, 5, 28), torch.randn(3, 7, 28)
    keep = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    with torch.no_grad():
        want = theirs(x, memory, tgt_mask=~causal_mask(5, 5), memory_key_padding_mask=~keep)
        got = ours(x, "causal", memory, padding_mask(keep))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        # Token by token, with both caches; the one of the memory is filled once.
        cache, memory_cache = KVCache(5), KVCache(7)
        steps = [
            ours(x[:, t : t + 1], "causal", memory, padding_mask(keep), cache, memory_cache)
            for t in range(5)
        ]
    torch.testing.assert_close(torch.cat(steps, 1), want, atol=1e-5, rtol=1e-5)
    assert (cache.length, memory_cache.length) == (5, 7)


def hugging_face_gpt2(config: GPTConfig):
    """(their model, {our parameter's name: (their tensor's name, slice of columns, transposed)})"""
    theirs = peers.hugging_face_gpt2(peer("transformers"), config).eval()
    C = config.n_embd
    names = {
        "token_embedding.weight": ("transformer.wte.weight", None, False),
        "position_embedding.weight": ("transformer.wpe.weight", None, False),
        "norm.weight": ("transformer.ln_f.weight", None, False),
        "norm.bias": ("transformer.ln_f.bias", None, False),
    }
    for i in range(config.n_layer):
        here, there = f"blocks.{i}.", f"transformer.h.{i}."
        for end in ("weight", "bias"):
            flip = end == "weight"  # their Conv1D keeps (in, out)
            for j, part in enumerate("qkv"):
                columns = slice(j * C, (j + 1) * C)
                names[f"{here}attention.{part}.{end}"] = (
                    f"{there}attn.c_attn.{end}",
                    columns,
                    flip,
                )
            names[f"{here}attention.proj.{end}"] = (f"{there}attn.c_proj.{end}", None, flip)
            names[f"{here}mlp.fc.{end}"] = (f"{there}mlp.c_fc.{end}", None, flip)
            names[f"{here}mlp.proj.{end}"] = (f"{there}mlp.c_proj.{end}", None, flip)
            names[f"{here}attention_norm.{end}"] = (f"{there}ln_1.{end}", None, False)
            names[f"{here}mlp_norm.{end}"] = (f"{there}ln_2.{end}", None, False)
    return theirs, names


def theirs_as_ours(tensors: dict, name: tuple) -> torch.Tensor:
    tensor, columns, flip = tensors[name[0]], name[1], name[2]
    tensor = tensor if columns is None else tensor[..., columns]
    return tensor.T if flip else tensor


def test_gpt_equals_hugging_face_gpt2_logits_and_gradients():
    ours = small_gpt()
    theirs, names = hugging_face_gpt2(SMALL)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    weights = dict(theirs.named_parameters())
    assert set(names) == {name for name, _ in ours.named_parameters()}
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(theirs_as_ours(weights, names[name]))
    tokens = torch.randint(37, (5, 13))
    logits, want = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
    ours(tokens, tokens.roll(-1, 1))["loss"].backward()
    F.cross_entropy(want.flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="sum").backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    scale = max(g.abs().max().item() for g in gradients.values())
    for name, p in ours.named_parameters():
        want = theirs_as_ours(gradients, names[name])
        torch.testing.assert_close(p.grad / scale, want / scale, atol=1e-5, rtol=0, msg=name)


def test_a_token_changes_no_earlier_logit():
    model, tokens = small_gpt(), torch.randint(37, (2, 13))
    before = model(tokens)
    for t in range(13):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 37
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t] != before[:, t]).any()


def test_prefix_mask_makes_a_prefix_language_model():
    model, tokens = small_gpt(), torch.randint(37, (2, 9))
    mask = prefix_mask(torch.tensor([4, 6]), 9)
    before = model(tokens, mask=mask)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 37
    after = model(changed, mask=mask)
    assert (after[:, 0] != before[:, 0]).any(-1).all()  # within the prefix all see all
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 37
    assert torch.equal(model(changed, mask=mask)[:, :6], before[:, :6])  # behind it, causal
    # To sample: prefill the prefix without a mask, then decode causally.
    caches = model.make_caches()
    first = model(tokens[:1, :4], mask=None, caches=caches)
    rest = model(tokens[:1, 4:], caches=caches)
    torch.testing.assert_close(torch.cat([first, rest], 1), before[:1], atol=1e-5, rtol=1e-5)


def test_cached_equals_uncached_for_every_cut():
    model, tokens = small_gpt(), torch.randint(37, (3, 13))
    want = model(tokens)
    for cut in range(1, 13):
        caches = model.make_caches()
        got = [model(tokens[:, :cut], caches=caches)]
        got += [model(tokens[:, t : t + 1], caches=caches) for t in range(cut, 13)]
        torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=1e-5)
        caches = model.make_caches()
        got = [model(tokens[:, :cut], caches=caches), model(tokens[:, cut:], caches=caches)]
        torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="14 positions are more than block_size=13"):
        model(tokens[:, :1], caches=caches)


def test_ignored_targets_change_neither_loss_nor_gradient():
    model, tokens = small_gpt(), torch.randint(37, (2, 9))
    targets = torch.randint(37, (2, 9))
    targets[:, 4:] = -100
    loss = model(tokens, targets)["loss"]
    loss.backward()
    want = F.cross_entropy(
        model(tokens)[:, :4].flatten(0, 1), targets[:, :4].flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, want)
    gradient = model.blocks[0].mlp.fc.weight.grad.clone()
    model.zero_grad()
    want.backward()
    torch.testing.assert_close(model.blocks[0].mlp.fc.weight.grad, gradient)
    model.zero_grad()
    nothing = model(tokens, torch.full_like(tokens, -100))["loss"]
    nothing.backward()
    assert nothing.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_initialisation_has_the_standard_deviations_of_its_table():
    """The residual scale is easily lost: once it looked for a name that no parameter had."""
    model = GPT(GPTConfig(vocab_size=2000, block_size=256, n_layer=8, n_head=4, n_embd=256))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / 16**0.5 if name.endswith("proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < 5 * std / p.numel() ** 0.5, name


# Exact counts, checked against Hugging Face's and OpenAI's models.
COUNTS = {
    "gpt1": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 174_604_259_328,
}


@pytest.mark.parametrize("preset", [k for k, v in PRESETS.items() if v["model"] == "gpt"])
def test_every_preset_can_be_built_and_has_its_published_size(preset):
    sizes = {k: v for k, v in PRESETS[preset].items() if k in vars(GPTConfig())}
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes))
    assert sum(n * copies for _, n, copies in parameter_table(model)) == count_parameters(model)
    assert count_parameters(model) == COUNTS.get(preset, count_parameters(model))
    assert set(COUNTS) <= set(PRESETS)


def test_parameter_table_counts_blocks_as_copies():
    table = {name: (n, copies) for name, n, copies in parameter_table(GPT(SMALL))}
    assert table["token_embedding"] == (37 * 28, 1)
    assert table["blocks.*.attention"] == (4 * (28 * 28 + 28), 3)
    assert table["blocks.*.mlp"] == (2 * 28 * 44 + 28 + 44, 3)


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"n_layer": 0}, "n_layer=0 is too small"),
        ({"n_layer": 1001}, "n_layer=1001 is too large: choose 1000 or less"),
        ({"ln_eps": 0.0}, "ln_eps=0.0 is out of range: choose 0 < ln_eps <= 1"),
        ({"ln_eps": float("nan")}, "ln_eps=nan is out of range"),
        ({"dropout": 1.0}, "dropout=1.0 is out of range"),
    ],
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GPTConfig(**wrong)


def test_post_ln_gpt_has_no_final_norm_and_uses_tanh_gelu():
    model = GPT(GPTConfig(**{**vars(SMALL), "pre_ln": False}))
    assert not any(name.startswith("norm.") for name, _ in model.named_parameters())
    x = torch.linspace(-3, 3, 50)
    want = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    torch.testing.assert_close(tanh_gelu(x), want)
    assert isinstance(tanh_gelu, partial)


def test_dropout_acts_in_training_only():
    model, tokens = small_gpt(dropout=0.5), torch.randint(37, (1, 5))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_is_the_identity_in_evaluation_and_at_zero(p):
    x, layer = torch.randn(7, 13), Dropout(p)
    assert layer.eval()(x) is x
    y = layer.train()(x)
    assert (y is x) == (p == 0)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / (1 - p))


def test_a_mask_may_attend_by_itself():
    """ALiBi, as an example (Press et al. 2022, arXiv:2108.12409): the further a key, the lower its
    score."""
    q, k, v = torch.randn(3, 2, 4, 7, 5)
    places = torch.arange(7)
    bias = -0.5 * (places[:, None] - places).abs() + causal_mask(7, 7).float().log()

    def alibi(q, k, v, dropout):
        return F.scaled_dot_product_attention(q, k, v, bias, dropout)

    got = attend(q, k, v, alibi, 0.0)
    torch.testing.assert_close(got, (q @ k.mT / 5**0.5 + bias).softmax(-1) @ v)
    block = Block(GPTConfig(n_head=4, n_embd=28, n_ff=44), pre_ln=True, act=F.relu).eval()
    x = torch.randn(2, 7, 28)
    assert (block(x, alibi) - block(x, "causal")).abs().max() > 0.01


def test_a_cache_keeps_the_dtype_of_the_keys():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        cache = KVCache(3)
        k, _ = cache.append(*torch.randn(2, 1, 1, 2, 4, dtype=dtype))
        assert k.dtype == cache.v.dtype == dtype
