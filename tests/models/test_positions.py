"""models/positions.py: transformers' ALiBi, T5, Shaw and rotary attentions, formulas pair by pair,
caches, masks, distances."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import peer
from torch import Tensor

from model import Attention, KVCache, Mask, attend, causal_mask, initialise
from models.positions import POSITIONS, Positions, Sinusoidal, alibi_slopes, spread
from seq2seq import sinusoids

B, C, H, T = 2, 48, 6, 40  # sizes of the peers: heads no power of 2, distances beyond Shaw's 16
ADDED = ("learned", "sinusoidal", "learned_sinusoidal")
INSIDE = ("t5", "shaw", "alibi", "rotary")


def sizes(**settings) -> SimpleNamespace:
    shape = {"n_embd": C, "n_head": H, "block_size": 64, "bias": True, "attention_dropout": 0.0}
    return SimpleNamespace(**{**shape, **settings})


def large(module: nn.Module) -> nn.Module:
    """In evaluation, with weights large enough that mistakes show."""
    for p in module.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
        else:
            nn.init.normal_(p, 1.0, 0.1)
    return module.eval()


def made(kind: str, causal: bool = True, **settings) -> Positions:
    extra = {} if causal else {"causal": False}
    return large(POSITIONS[kind](sizes(**settings), **(extra if kind == "t5" else {})))


def near(found: Tensor, want: Tensor, most: float = 1e-5) -> None:
    """Apart by no more than `most`, as a part of the largest value if that is above 1."""
    apart, largest = (found - want).abs().max().item(), want.abs().max().item()
    print(f"{apart:.1e} of {largest:.1f}")
    assert found.shape == want.shape and apart < most * max(1, largest)


def near_with_gradients(found: Tensor, want: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
    """Both are near, and so are the gradients of leaves, given as (ours, theirs)."""
    near(found, want)
    direction = torch.randn_like(want)
    ours = torch.autograd.grad((found * direction).sum(), [a for a, _ in pairs])
    theirs = torch.autograd.grad((want * direction).sum(), [b for _, b in pairs])
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-2
        near(a / b.abs().max(), b / b.abs().max())


def copy(attention: Attention, **theirs: nn.Linear) -> None:
    """The weights and biases of our layers into theirs, by our names."""
    for name, linear in theirs.items():
        ours = getattr(attention, name)
        linear.weight.data.copy_(ours.weight)
        if linear.bias is not None:
            linear.bias.data.copy_(ours.bias)


def scores_mask(causal: bool) -> Tensor:
    """What transformers adds to scores (T, T)."""
    hides = ~causal_mask(T, T) if causal else torch.zeros(T, T, dtype=torch.bool)
    return torch.zeros(T, T).masked_fill(hides, -torch.inf)


# ---- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [4, 6, 12])
def test_alibi_is_that_of_mpt(heads):
    mpt = peer("transformers.models.mpt.modeling_mpt")
    config = mpt.MptConfig(d_model=C, n_heads=heads)
    theirs = mpt.MptAttention(config, layer_idx=0).eval()
    ours = large(Attention(sizes(n_head=heads, bias=False)))
    theirs.Wqkv.weight.data.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
    copy(ours, proj=theirs.out_proj)
    x = torch.randn(B, T, C, requires_grad=True)
    found = ours(x, mask=made("alibi", n_head=heads).attending("causal"))
    bias = mpt.build_mpt_alibi_tensor(heads, T)
    want = theirs(x, position_bias=bias, attention_mask=~causal_mask(T, T))[0]
    near_with_gradients(found, want, (x, x), (ours.proj.weight, theirs.out_proj.weight))


def test_slopes_of_alibi_are_those_of_bloom():
    bloom = peer("transformers.models.bloom.modeling_bloom")
    for heads in range(1, 50):
        per_place = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
        near(alibi_slopes(heads), per_place[:, 0, 1], 1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_and_attention_are_those_of_t5(causal):
    t5 = peer("transformers.models.t5.modeling_t5")
    positions = made("t5", causal)
    offsets = torch.arange(-1000, 1001)
    want = t5.T5Attention._relative_position_bucket(offsets, bidirectional=not causal)
    assert torch.equal(positions.buckets(offsets), want)
    assert set(want.tolist()) == set(range(32)) - (set() if causal else {16})  # |0| to the right

    config = t5.T5Config(
        d_model=C, d_kv=C // H, num_heads=H, is_decoder=causal, attn_implementation="eager"
    )
    theirs = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
    ours = large(Attention(sizes(bias=False)))
    copy(ours, q=theirs.q, k=theirs.k, v=theirs.v, proj=theirs.o)
    theirs.q.weight.data /= (C // H) ** 0.5  # T5's scores are not divided
    theirs.relative_attention_bias.weight.data.copy_(positions.embedding.weight)
    x = torch.randn(B, T, C, requires_grad=True)
    found = ours(x, mask=positions.attending("causal" if causal else None))
    want = theirs(x, mask=scores_mask(causal))[0]
    table = (positions.embedding.weight, theirs.relative_attention_bias.weight)
    near_with_gradients(found, want, (x, x), table)


def test_keys_of_shaw_are_those_of_wav2vec2_bert():
    """Which has no vectors of values: ours are zero."""
    bert = peer("transformers.models.wav2vec2_bert.modeling_wav2vec2_bert")
    config = bert.Wav2Vec2BertConfig(
        hidden_size=C,
        num_attention_heads=H,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=16,
        right_max_position_embeddings=16,
        attn_implementation="eager",
    )
    theirs = bert.Wav2Vec2BertSelfAttention(config).eval()
    ours, positions = large(Attention(sizes())), made("shaw")
    copy(ours, q=theirs.linear_q, k=theirs.linear_k, v=theirs.linear_v, proj=theirs.linear_out)
    nn.init.zeros_(positions.values.weight)
    theirs.distance_embedding.weight.data.copy_(positions.keys.weight)
    x = torch.randn(B, T, C, requires_grad=True)
    for mask, added in ((None, None), ("causal", scores_mask(True))):
        found = ours(x, mask=positions.attending(mask))
        want = theirs(x, attention_mask=added)[0]
        table = (positions.keys.weight, theirs.distance_embedding.weight)
        near_with_gradients(found, want, (x, x), table)


def test_rotary_is_that_of_gpt_neox():
    neox = peer("transformers.models.gpt_neox.modeling_gpt_neox")
    config = neox.GPTNeoXConfig(
        hidden_size=C,
        num_attention_heads=H,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        },
        attn_implementation="eager",
    )
    theirs = neox.GPTNeoXAttention(config, layer_idx=0).eval()
    ours = large(Attention(sizes()))
    for kind in ("weight", "bias"):  # theirs are sorted by heads
        parts = [getattr(layer, kind).unflatten(0, (H, -1)) for layer in (ours.q, ours.k, ours.v)]
        getattr(theirs.query_key_value, kind).data.copy_(torch.cat(parts, 1).flatten(0, 1))
    copy(ours, proj=theirs.dense)
    x = torch.randn(B, T, C, requires_grad=True)
    found = ours(x, mask=made("rotary").attending("causal"))
    turn = neox.GPTNeoXRotaryEmbedding(config)(x, torch.arange(T)[None])
    want = theirs(x, attention_mask=scores_mask(True), position_embeddings=turn)[0]
    near_with_gradients(found, want, (x, x))


def test_rotary_is_that_of_roformer():
    """Which turns pairs of neighbours: its rows of q and k stand in another order."""
    roformer = peer("transformers.models.roformer.modeling_roformer")
    config = roformer.RoFormerConfig(hidden_size=C, num_attention_heads=H)
    theirs = roformer.RoFormerSelfAttention(config).eval()
    ours = large(Attention(sizes()))
    ours.proj = nn.Identity()
    copy(ours, q=theirs.query, k=theirs.key, v=theirs.value)
    for linear in (theirs.query, theirs.key):
        for p in (linear.weight, linear.bias):
            halves = p.data.unflatten(0, (H, 2, -1))  # (H, 2, D / 2, …)
            p.data = halves.transpose(1, 2).flatten(0, 2).contiguous()
    table = roformer.RoFormerSinusoidalPositionalEmbedding(T, C // H).create_weight()
    x = torch.randn(B, T, C, requires_grad=True)
    found = ours(x, mask=made("rotary").attending(None))
    near_with_gradients(found, theirs(x, sinusoidal_pos=table[None, None])[0], (x, x))


def test_sinusoids_are_those_of_the_encoder_decoder():
    zeros, places = torch.zeros(1, 64, C), torch.arange(64)
    fixed, learned = POSITIONS["sinusoidal"](sizes()), POSITIONS["learned_sinusoidal"](sizes())
    found = fixed(zeros, places)[0] / Sinusoidal.SIZE
    near(found, sinusoids(64, C))
    assert found[7, 10].item() == pytest.approx(math.sin(7 / 10000 ** (10 / C)), abs=1e-6)
    assert found[7, 11].item() == pytest.approx(math.cos(7 / 10000 ** (10 / C)), abs=1e-6)
    assert torch.equal(learned(zeros, places), fixed(zeros, places))
    assert fixed(zeros, places).square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-3)
    # fp32 angles: a place in the thousands costs three digits.
    near(
        fixed(zeros[:, :3], torch.tensor([5, 1000, 4000]))[0] / Sinusoidal.SIZE,
        sinusoids(4001, C)[[5, 1000, 4000]],
        1e-3,
    )


def test_frequencies_are_learned():
    learned = POSITIONS["learned_sinusoidal"](sizes())
    for p in learned.parameters():
        nn.init.zeros_(p)
    initialise(learned, lambda name, weight: pytest.fail(name))
    assert torch.equal(learned.scale, torch.ones(C // 2))
    wanted = Sinusoidal.SIZE * sinusoids(80, C)[::2][:30]  # as if all turned twice as fast
    loss = (learned(torch.zeros(1, 30, C), torch.arange(30))[0] - wanted).square().mean()
    loss.backward()
    assert learned.scale.grad.abs().min() > 0
    with torch.no_grad():
        learned.scale.fill_(2.0)
    near(learned(torch.zeros(1, 30, C), torch.arange(30))[0], wanted)


# ---- pair by pair --------------------------------------------------------------------------------


def bucket_of(offset: int, causal: bool) -> int:
    """Raffel et al. in whole numbers: the logarithm alone is a float."""
    n = 32 if causal else 16
    side = 0 if causal or offset <= 0 else 16
    distance = max(-offset, 0) if causal else abs(offset)
    if distance < n // 2:
        return side + distance
    grown = math.log(distance / (n // 2)) / math.log(128 / (n // 2)) * (n // 2)
    return side + min(n // 2 + int(grown + 1e-9), n - 1)


def slopes_of(heads: int) -> list[float]:
    """Press et al.: a geometric sequence, and for other numbers every second of twice as many."""
    n = 2 ** int(math.log2(heads))
    own = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    return own if n == heads else own + slopes_of(2 * n)[::2][: heads - n]


def turned(x: Tensor, place: int) -> Tensor:
    """x (B, H, D): its pairs as complex numbers, times e^(i · place · rate)."""
    half = x.size(-1) // 2
    rates = torch.tensor([10000 ** (-i / half) for i in range(half)])
    points = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * place * rates)
    return torch.cat([points.real, points.imag], -1)


def naive(kind: str, positions: Positions, causal: bool, q, k, v, allowed: Tensor) -> Tensor:
    """Query by query and key by key, from the papers' formulas."""
    heads, n_query, width = q.shape[1:]
    n_key = k.size(2)
    rows = []
    for t in range(n_query):
        place, scores, values = n_key - n_query + t, [], []
        for s in range(n_key):
            key, value, offset = k[:, :, s], v[:, :, s], s - place
            clipped = max(-16, min(16, offset)) + 16
            if kind == "shaw":
                key = key + positions.keys.weight[clipped]
                value = value + positions.values.weight[clipped]
            if kind == "rotary":
                score = (turned(q[:, :, t], place) * turned(key, s)).sum(-1) / width**0.5
            else:
                score = (q[:, :, t] * key).sum(-1) / width**0.5  # (B, H)
            if kind == "t5":
                score = score + positions.embedding.weight[bucket_of(offset, causal)]
            if kind == "alibi":
                score = score - torch.tensor(slopes_of(heads)) * abs(offset)
            scores.append(score.exp() * allowed[..., t, s])
            values.append(value)
        total = sum(scores)
        found = sum(w[..., None] * value for w, value in zip(scores, values, strict=True))
        rows.append(found / total.clamp(min=1e-30)[..., None])
    return torch.stack(rows, 2)


def masks(n_query: int, n_key: int) -> dict[str, Mask]:
    keep = torch.rand(B, n_key) < 0.6
    whole = torch.rand(B, H, n_query, n_key) < 0.5
    whole[0, :, 2] = whole[1, 3, 0] = False  # blind
    return {
        "none": None,
        "causal": "causal",
        "pairs": torch.rand(n_query, n_key) < 0.5,
        "padding": keep[:, None, None, :],
        "blind": whole,
    }


@pytest.mark.parametrize("mask", ["none", "causal", "pairs", "padding", "blind"])
@pytest.mark.parametrize("kind", INSIDE)
def test_it_is_the_formula_of_the_paper_for_every_pair(kind, mask):
    """Of 5 queries that are the last of 23 places, in both directions; with gradients."""
    n_query, n_key = 5, 23
    given = masks(n_query, n_key)[mask]
    allowed = given if isinstance(given, Tensor) else torch.ones(n_query, n_key, dtype=torch.bool)
    allowed = causal_mask(n_query, n_key) if given == "causal" else allowed
    causal = mask in ("causal", "pairs")
    positions = made(kind, causal)
    q = torch.randn(B, H, n_query, 8, requires_grad=True)
    k, v = (torch.randn(B, H, n_key, 8, requires_grad=True) for _ in range(2))
    found = attend(q, k, v, positions.attending(given), 0.0)
    want = naive(kind, positions, causal, q, k, v, allowed.expand(B, H, n_query, n_key))
    if mask == "blind":
        assert (found[0, :, 2] == 0).all() and (found[1, 3, 0] == 0).all()
    pairs = [(x, x) for x in (q, k, v, *positions.parameters())]
    near_with_gradients(found, want, *pairs)


@pytest.mark.parametrize("kind", ["none", *ADDED])
def test_what_is_added_below_leaves_masks_alone(kind):
    mask = torch.rand(3, 3) < 0.5
    assert made(kind).attending(mask) is mask
    assert made(kind).attending(attend) is attend


def test_a_value_for_each_offset_is_spread_over_queries_and_keys():
    assert spread(torch.arange(-3, 2), 4).tolist() == [[-2, -1, 0, 1], [-3, -2, -1, 0]]


# ---- in a network --------------------------------------------------------------------------------


class Layers(nn.Module):
    """Embeddings, positions, and two attentions in residual connections."""

    def __init__(self, kind: str, **settings):
        super().__init__()
        config = sizes(**settings)
        self.positions = POSITIONS[kind](config)
        self.layers = nn.ModuleList(Attention(config) for _ in range(2))
        large(self)

    def forward(self, x: Tensor, mask: Mask = "causal", caches=None) -> Tensor:
        past = caches[0].length if caches else 0
        x = self.positions(x, torch.arange(past, past + x.size(1), device=x.device))
        mask = self.positions.attending(mask)
        for layer, cache in zip(self.layers, caches or [None] * 2, strict=True):
            x = x + layer(x / x.norm(dim=-1, keepdim=True) * C**0.5, mask=mask, cache=cache)
        return x


@pytest.mark.parametrize("kernels", ["plain", "installed"])
@pytest.mark.parametrize("kind", POSITIONS)
def test_with_caches_the_outputs_are_the_same(kind, kernels, request):
    if kernels == "installed":
        request.getfixturevalue(kernels)
    network, x = Layers(kind), torch.randn(B, T, C)
    want, caches = network(x), [KVCache(T) for _ in range(2)]
    with torch.no_grad():
        parts = [network(part, caches=caches) for part in x.split([5, 4, *[1] * 28, 3], 1)]
    near(torch.cat(parts, 1), want.detach())


@pytest.mark.parametrize("kind", POSITIONS)
def test_the_past_is_seen_and_the_future_is_not(kind):
    network, x = Layers(kind), torch.randn(B, T, C)
    changed = x.clone()
    changed[:, 23] += 1.0
    apart = (network(changed) - network(x)).abs().amax((0, 2))
    assert (apart[:23] == 0).all() and (apart[23:] > 1e-4).all()
    order = torch.cat([torch.arange(30).flip(0), torch.arange(30, T)])
    moved = (network(x[:, order]) - network(x))[:, 30:].abs().max()
    # Without positions too, from the second layer on: what the first gives depends on the past.
    assert moved > 1e-3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", POSITIONS)
def test_the_same_words_further_to_the_right(kind, causal):
    """Behind 19 others, which they may not see, they give what they give alone, wherever distances
    are all that counts; and something else where places are added."""
    if kind == "t5" and not causal:
        network = Layers("none")
        network.positions = made("t5", causal=False)
    else:
        network = Layers(kind)
    x = torch.randn(B, 19 + T, C)
    mask = causal_mask(19 + T, 19 + T) if causal else torch.ones(19 + T, 19 + T, dtype=torch.bool)
    mask[:, :19] = False
    alone, behind = network(x[:, 19:], "causal" if causal else None), network(x, mask)[:, 19:]
    if kind in ADDED:
        assert (behind - alone).abs().max() > 0.1
    else:
        near(behind, alone)


def test_without_positions_nothing_but_the_past_tells_the_order():
    """A single layer that sees all gives the same sum in any order; with positions it does not."""
    x, order = torch.randn(B, T, C), torch.randperm(T)
    for kind in POSITIONS:
        network = Layers(kind)
        apart = (network(x[:, order], None) - network(x, None)[:, order]).abs().max()
        assert apart < 1e-4 if kind == "none" else apart > 0.01, kind


@pytest.mark.parametrize("kind", POSITIONS)
def test_beyond_block_size(kind):
    network, x = Layers(kind, block_size=8), torch.randn(B, 20, C)
    if kind == "learned":
        with pytest.raises(IndexError):
            network(x)
    else:
        near(network(x)[:, :8], network(x[:, :8]))


# ---- dtypes, devices, dropout, errors ------------------------------------------------------------


@pytest.mark.parametrize("mask", ["causal", "bool"])
@pytest.mark.parametrize("kind", POSITIONS)
def test_bf16_is_near_fp32(kind, mask):
    network, x = Layers(kind), torch.randn(B, T, C)
    given = "causal" if mask == "causal" else torch.rand(B, 1, T, T) < 0.5
    want = network(x, given)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x, given)
    found.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    assert all(p.grad.abs().max() > 0 for p in network.positions.parameters())
    half = network.bfloat16()(x.bfloat16(), given)
    assert half.dtype == torch.bfloat16
    for y in (found, half):
        error = ((y.float() - want).norm() / want.norm()).item()
        print(f"{error:.1e}")
        assert error < 0.03


@pytest.mark.parametrize("kind", POSITIONS)
def test_caches_in_fp32_of_a_network_in_bf16(kind, installed):
    """As `engine.cpu.lay_out_for_decoding` makes them."""
    positions = made(kind).bfloat16()
    q, k, v = (torch.randn(B, H, n, 8) for n in (1, 9, 9))
    with torch.no_grad():
        found = attend(q.bfloat16(), k, v, positions.attending("causal"), 0.0)
        want = attend(q, k, v, positions.attending("causal"), 0.0)
    assert found.dtype == torch.bfloat16
    near(found.float(), want, 0.03)


@pytest.mark.parametrize("kind", POSITIONS)
def test_every_tensor_is_made_where_the_input_is(kind):
    """A mixture of devices is refused by the device without memory too."""
    network = Layers(kind).to("meta")
    for mask in ("causal", None, torch.ones(T, T, dtype=torch.bool, device="meta")):
        assert network(torch.randn(B, T, C, device="meta"), mask).is_meta


@pytest.mark.parametrize("kernels", ["plain", "installed"])
@pytest.mark.parametrize("kind", INSIDE)
def test_dropout_drops_weights_and_keeps_the_mean(kind, kernels, request):
    if kernels == "installed":
        request.getfixturevalue(kernels)
    positions = made(kind)
    q, k, v = (torch.randn(1, H, 6, 8, requires_grad=True) for _ in range(3))
    want = attend(q, k, v, positions.attending("causal"), 0.0)
    many = [x.expand(3000, -1, -1, -1) for x in (q, k, v)]
    found = attend(*many, positions.attending("causal"), 0.25)
    assert (found[0] - found[1]).abs().max() > 0.1
    near(found.mean(0), want[0], 0.15)
    found.sum().backward()
    assert q.grad.isfinite().all() and q.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("none", {}),
        ("learned", {"embedding.weight": (64, 48)}),
        ("sinusoidal", {}),
        ("learned_sinusoidal", {"scale": (24,)}),
        ("t5", {"embedding.weight": (32, 6)}),
        ("shaw", {"keys.weight": (33, 8), "values.weight": (33, 8)}),
        ("alibi", {}),
        ("rotary", {}),
    ],
)
def test_what_a_checkpoint_holds(kind, shapes):
    positions = POSITIONS[kind](sizes())
    assert {name: tuple(p.shape) for name, p in positions.named_parameters()} == shapes
    assert positions.state_dict().keys() == shapes.keys()


@pytest.mark.parametrize("kind", INSIDE)
def test_masks_that_cannot_be_are_refused_as_in_attend(kind):
    positions = made(kind)
    q = k = v = torch.randn(B, H, 3, 8)
    for mask in ("casual", torch.ones(3, 3)):
        with pytest.raises(ValueError) as want:
            attend(q, k, v, mask, 0.0)
        with pytest.raises(ValueError) as found:
            attend(q, k, v, positions.attending(mask), 0.0)
        assert str(found.value) == str(want.value)
    with pytest.raises(ValueError, match="attends by itself knows nothing of"):
        positions.attending(attend)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("sinusoidal", {"n_embd": 37}, "n_embd=37 is odd, .*: choose n_embd=38"),
        ("learned_sinusoidal", {"n_embd": 37}, "n_embd=37 is odd, .*: choose n_embd=38"),
        ("rotary", {"n_embd": 39, "n_head": 13}, "n_embd=39 is no multiple of 26, twice n_head=13"),
        ("rotary", {"n_embd": 39, "n_head": 13}, "choose n_embd=52"),
    ],
)
def test_odd_widths_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        POSITIONS[kind](sizes(**settings))
