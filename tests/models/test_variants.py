"""models/variants.py beside transformers' networks, model.GPT, and formulas written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY, peer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sample
import train
from engine import cpu, kernels
from model import GPT, GPTConfig, count_parameters
from models.variants import (
    ACTIVATIONS,
    CHOICES,
    GATES,
    MIXERS,
    RESIDUALS,
    Variant,
    VariantConfig,
)

SIZES = {"vocab_size": 13, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}

# One change at a time, and some together.
CHANGES = [
    {name: value}
    for name, values in CHOICES.items()
    for value in values
    if (name, value) != ("shared", "universal")
] + [
    {"shared": "universal", "positions": "none"},
    {"order": "fsffs"},
    {"order": "ssss"},
    {"order": "fff"},
    {"embedding_width": 8},
    {"embedding_width": 8, "tied": False, "n_softmax": 2},
    {"tied": False},
    {"n_softmax": 3},
    {"bias": False, "norm": "rms", "act": "swiglu", "positions": "rotary"},
    {"shared": "all", "order": "ssff", "residual": "deepnorm"},
]
NAMES = [",".join(f"{k}={v}" for k, v in change.items()) for change in CHANGES]
every_change = pytest.mark.parametrize("change", CHANGES, ids=NAMES)


def make(**settings) -> Variant:
    """A network in evaluation whose weights are all random, so that none hides a fault by being 0
    or small."""
    network = Variant(VariantConfig(**{**SIZES, **settings})).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p) / p.size(-1) ** 0.5)
    return network


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], shape)


# ---- what holds for all --------------------------------------------------------------------------


@every_change
@torch.no_grad()
def test_cached_steps_give_what_one_pass_gives(change):
    network, tokens = make(**change), random_tokens(2, 11)
    caches = network.make_caches()
    parts = [network(tokens[:, :4], caches=caches)]
    parts += [network(tokens[:, i : i + 1], caches=caches) for i in range(4, 11)]
    torch.testing.assert_close(torch.cat(parts, 1), network(tokens), atol=2e-5, rtol=1e-5)


@every_change
@torch.no_grad()
def test_no_place_sees_what_comes_later(change):
    network, tokens = make(**change), random_tokens(2, 11)
    other = tokens.clone()
    other[:, 6] = (other[:, 6] + 1) % SIZES["vocab_size"]
    before, after = network(tokens), network(other)
    torch.testing.assert_close(before[:, :6], after[:, :6], atol=1e-6, rtol=1e-6)
    assert (before[:, 6] - after[:, 6]).abs().max() > 1e-3


@every_change
def test_every_weight_learns(change):
    network, tokens = make(**change).train(), random_tokens(3, 16)
    network(tokens, tokens.roll(1, 1))["loss"].backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@every_change
def test_the_loss_is_that_of_the_logits(change):
    network, tokens, targets = make(**change), random_tokens(2, 9), random_tokens(2, 9)
    targets[0, 3] = -100
    logits = network(tokens).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(network(tokens, targets)["loss"], expected)


@pytest.mark.parametrize(
    "change",
    [
        *({"mixing": name} for name in MIXERS),
        {"act": "swiglu"},
        {"shared": "all"},
        {"order": "sssfff"},
        {"embedding_width": 32},
        {"tied": False},
        {"n_softmax": 3},
    ],
    ids=str,
)
def test_flops_are_those_that_torch_counts(change):
    sizes = {"vocab_size": 64, "block_size": 64, "n_layer": 3, "n_head": 2, "n_embd": 128}
    network, tokens = Variant(VariantConfig(**{**sizes, **change})), torch.randint(64, (2, 64))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(tokens, tokens)["loss"].backward()
    assert network.flops_per_token() == pytest.approx(counter.get_total_flops() / 128, rel=0.02)


@every_change
@torch.no_grad()
def test_decoding_in_bf16_is_near_fp32(change):
    """With the matrices laid out as sample.py has them on a CPU."""
    network, tokens = make(**change), random_tokens(1, 9)
    expected = network(tokens).log_softmax(-1)
    network.to(torch.bfloat16)
    cpu.lay_out_for_decoding(network)
    caches = network.make_caches()
    kernels.install(torch.device("cpu"))
    parts = [network(tokens[:, i : i + 1], caches=caches) for i in range(9)]
    found = torch.cat(parts, 1).float().log_softmax(-1)
    assert (found - expected).norm() / expected.norm() < 0.05


# ---- beside others -------------------------------------------------------------------------------


@torch.no_grad()
def set_weights(network: Variant, pairs: dict[str, torch.Tensor]) -> None:
    """Sets all parameters of the network: {name: what it gets}."""
    own = dict(network.named_parameters())
    assert pairs.keys() == own.keys()
    for name, value in pairs.items():
        own[name].copy_(value)


def test_with_its_defaults_it_is_gpt():
    gpt = GPT(GPTConfig(**SIZES))
    network, tokens = make(), random_tokens(2, 16)
    given = {
        "token_embedding.weight": gpt.token_embedding.weight,
        "norm.weight": gpt.norm.weight,
        "norm.bias": gpt.norm.bias,
    }
    for name, p in network.position.named_parameters():
        given[f"position.{name}"] = gpt.position_embedding.weight.view_as(p)
    for i, block in enumerate(gpt.blocks):
        for j, (part, norm) in enumerate(
            ((block.attention, block.attention_norm), (block.mlp, block.mlp_norm))
        ):
            at = f"blocks.{2 * i + j}"
            given |= {f"{at}.sublayer.{name}": p for name, p in part.named_parameters()}
            given |= {f"{at}.norm.{name}": p for name, p in norm.named_parameters()}
    set_weights(network, given)
    torch.testing.assert_close(network(tokens), gpt(tokens))


def test_mpt():
    """Without biases, pre-LN, ALiBi, exact GELU."""
    transformers = peer("transformers")
    config = transformers.MptConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=13, max_seq_len=16, expansion_ratio=4
    )
    theirs = transformers.MptForCausalLM(config).eval()
    network = make(n_head=4, bias=False, positions="alibi")
    given = {
        "token_embedding.weight": theirs.transformer.wte.weight,
        "norm.weight": theirs.transformer.norm_f.weight,
    }
    for i, block in enumerate(theirs.transformer.blocks):
        s, f = f"blocks.{2 * i}", f"blocks.{2 * i + 1}"
        q, k, v = block.attn.Wqkv.weight.chunk(3)
        given |= {f"{s}.sublayer.q.weight": q, f"{s}.sublayer.k.weight": k}
        given |= {f"{s}.sublayer.v.weight": v}
        given[f"{s}.sublayer.proj.weight"] = block.attn.out_proj.weight
        given[f"{s}.norm.weight"] = block.norm_1.weight
        given[f"{f}.sublayer.fc.weight"] = block.ffn.up_proj.weight
        given[f"{f}.sublayer.proj.weight"] = block.ffn.down_proj.weight
        given[f"{f}.norm.weight"] = block.norm_2.weight
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
    set_weights(network, given)
    for block in network.blocks[1::2]:
        block.sublayer.act = F.gelu  # ours has the approximation that GPT-2 was trained with
    tokens = random_tokens(2, 16)
    torch.testing.assert_close(network(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_gpt_neox():
    """Rotary positions, an output matrix of its own."""
    transformers = peer("transformers")
    config = transformers.GPTNeoXConfig(
        vocab_size=13,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        hidden_act="gelu_new",
        use_parallel_residual=False,
        max_position_embeddings=16,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        },
    )
    theirs = transformers.GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
    network = make(positions="rotary", tied=False)
    given = {
        "token_embedding.weight": theirs.gpt_neox.embed_in.weight,
        "norm.weight": theirs.gpt_neox.final_layer_norm.weight,
        "norm.bias": theirs.gpt_neox.final_layer_norm.bias,
        "lm_head.weight": theirs.get_output_embeddings().weight,
    }
    for i, layer in enumerate(theirs.gpt_neox.layers):
        s, f = f"blocks.{2 * i}", f"blocks.{2 * i + 1}"
        for kind in ("weight", "bias"):
            # Rows of one head after the other: its queries, keys and values.
            mixed = getattr(layer.attention.query_key_value, kind).unflatten(0, (2, 3, 16))
            for j, part in enumerate("qkv"):
                given[f"{s}.sublayer.{part}.{kind}"] = mixed[:, j].flatten(0, 1)
            given[f"{s}.sublayer.proj.{kind}"] = getattr(layer.attention.dense, kind)
            given[f"{s}.norm.{kind}"] = getattr(layer.input_layernorm, kind)
            given[f"{f}.sublayer.fc.{kind}"] = getattr(layer.mlp.dense_h_to_4h, kind)
            given[f"{f}.sublayer.proj.{kind}"] = getattr(layer.mlp.dense_4h_to_h, kind)
            given[f"{f}.norm.{kind}"] = getattr(layer.post_attention_layernorm, kind)
    set_weights(network, given)
    tokens = random_tokens(2, 16)
    torch.testing.assert_close(network(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_t5():
    """Its decoder: RMSNorm, ReLU, buckets of distances. It has no factor 1/sqrt(D)."""
    transformers = peer("transformers")
    from transformers.models.t5.modeling_t5 import T5Stack

    config = transformers.T5Config(
        vocab_size=13, d_model=32, d_kv=16, d_ff=128, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    config.is_decoder, config.use_cache = True, False
    theirs = T5Stack(config).eval()
    theirs.set_input_embeddings(torch.nn.Embedding(13, 32))
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
    network = make(positions="t5", norm="rms", act="relu", bias=False, ln_eps=1e-6)
    attention = theirs.block[0].layer[0].SelfAttention
    given = {
        "token_embedding.weight": theirs.embed_tokens.weight,
        "norm.weight": theirs.final_layer_norm.weight,
    }
    for name, _ in network.position.named_parameters():
        given[f"position.{name}"] = attention.relative_attention_bias.weight
    for i, block in enumerate(theirs.block):
        s, f, attention = f"blocks.{2 * i}", f"blocks.{2 * i + 1}", block.layer[0].SelfAttention
        given[f"{s}.sublayer.q.weight"] = attention.q.weight * 4.0
        given[f"{s}.sublayer.k.weight"] = attention.k.weight
        given[f"{s}.sublayer.v.weight"] = attention.v.weight
        given[f"{s}.sublayer.proj.weight"] = attention.o.weight
        given[f"{s}.norm.weight"] = block.layer[0].layer_norm.weight
        given[f"{f}.sublayer.fc.weight"] = block.layer[-1].DenseReluDense.wi.weight
        given[f"{f}.sublayer.proj.weight"] = block.layer[-1].DenseReluDense.wo.weight
        given[f"{f}.norm.weight"] = block.layer[-1].layer_norm.weight
    set_weights(network, given)
    tokens = random_tokens(2, 16)
    expected = theirs(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(network.features(tokens), expected, atol=1e-4, rtol=1e-4)


def test_albert():
    """Shared sublayers behind factorised embeddings, post-LN, every place sees every other. What
    Albert has in front of them, a norm and segments, is not ours: both begin with the same vectors.
    """
    transformers = peer("transformers")
    from transformers.models.albert.modeling_albert import AlbertTransformer

    config = transformers.AlbertConfig(
        vocab_size=13,
        embedding_size=8,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
        layer_norm_eps=1e-5,
    )
    theirs = AlbertTransformer(config).eval()
    network = make(n_layer=3, shared="all", residual="post_ln", embedding_width=8, positions="none")
    layer = theirs.albert_layer_groups[0].albert_layers[0]
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
        theirs.embedding_hidden_mapping_in.bias.zero_()
    # The letters of the blocks are in alphabetical order: f, then s.
    given = {
        "token_embedding.weight": network.token_embedding.weight,
        "down.weight": network.down.weight,
        "up.weight": theirs.embedding_hidden_mapping_in.weight,
    }
    own = dict(layer.attention.named_parameters())
    for kind in ("weight", "bias"):
        for ours, name in {"q": "query", "k": "key", "v": "value", "proj": "dense"}.items():
            given[f"blocks.1.sublayer.{ours}.{kind}"] = own[f"{name}.{kind}"]
        given[f"blocks.1.norm.{kind}"] = own[f"LayerNorm.{kind}"]
        given[f"blocks.0.sublayer.fc.{kind}"] = getattr(layer.ffn, kind)
        given[f"blocks.0.sublayer.proj.{kind}"] = getattr(layer.ffn_output, kind)
        given[f"blocks.0.norm.{kind}"] = getattr(layer.full_layer_layer_norm, kind)
    set_weights(network, given)
    tokens = random_tokens(2, 11)
    expected = theirs(network.token_embedding(tokens), attention_mask=None)
    expected = getattr(expected, "last_hidden_state", expected)
    torch.testing.assert_close(network.features(tokens, mask=None), expected, atol=1e-4, rtol=1e-4)


# ---- the parts -----------------------------------------------------------------------------------


def tanh_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


FORMULAS = {
    "gelu": tanh_gelu,
    "relu": lambda x: max(x, 0.0),
    "swish": lambda x: x * sigmoid(x),
    "elu": lambda x: x if x > 0 else math.exp(x) - 1,
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * math.expm1(x)),
    "sigmoid": sigmoid,
    "softplus": lambda x: math.log1p(math.exp(x)),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "glu": sigmoid,
    "reglu": lambda x: max(x, 0.0),
    "geglu": tanh_gelu,
    "swiglu": lambda x: x * sigmoid(x),
    "bilinear": lambda x: x,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_activations_by_their_formulas(name):
    x = torch.linspace(-4, 4, 33)
    y = {**ACTIVATIONS, **GATES}[name](x)
    torch.testing.assert_close(y, torch.tensor([FORMULAS[name](v) for v in x.tolist()]))


def test_every_activation_has_a_formula():
    assert {*ACTIVATIONS, *GATES} - FORMULAS.keys() == {"softmax"}
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(ACTIVATIONS["softmax"](x), x.softmax(2))


def test_a_gate_multiplies():
    network, x = make(act="reglu"), torch.randn(3, 32)
    mlp = network.blocks[1].sublayer
    gate, up = mlp.gate(x).clamp(min=0), mlp.fc(x)
    torch.testing.assert_close(mlp(x), mlp.proj(gate * up))
    assert mlp.fc.out_features == 96  # 8/3 · 32, in steps of 32: about the weights of 4 · 32


def synthesized(attention, scores, x):
    """(B, T, C), place by place, from scores[b][h][t] of the places up to t"""
    v = attention.v(x).unflatten(-1, (2, 16))
    rows = []
    for b in range(len(x)):
        for t in range(x.size(1)):
            heads = []
            for h in range(2):
                weights = scores(b, h, t)[: t + 1].softmax(0)
                heads.append(sum(w * v[b, s, h] for s, w in enumerate(weights)))
            rows.append(torch.cat(heads))
    return attention.proj(torch.stack(rows).view(x.shape))


def test_synthesizers_by_loops():
    x = torch.randn(2, 7, 32)
    dense = make(mixing="dense").blocks[0].sublayer

    def from_the_query(b, h, t):
        return dense.scores(dense.hidden(x[b, t]).clamp(min=0)).view(2, 16)[h]

    torch.testing.assert_close(dense(x, None, "causal"), synthesized(dense, from_the_query, x))
    fixed = make(mixing="random").blocks[0].sublayer
    expected = synthesized(fixed, lambda b, h, t: fixed.scores[h, t], x)
    torch.testing.assert_close(fixed(x, None, "causal"), expected)
    allowed = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(fixed(x, None, allowed), expected)
    allowed[3] = False  # what may look at nothing finds zeros
    found = fixed(x, None, allowed)
    torch.testing.assert_close(found[:, 3], fixed.proj.bias.expand(2, -1))
    with pytest.raises(ValueError, match="'casual' is not known"):
        fixed(x, None, "casual")


@pytest.mark.parametrize("name", RESIDUALS)
def test_residual_connections_by_their_formulas(name):
    block, x = make(residual=name).blocks[1], torch.randn(3, 32)
    f, norm = block.sublayer, block.norm
    expected = {
        "pre_ln": lambda: x + f(norm(x)),
        "post_ln": lambda: norm(x + f(x)),
        "deepnorm": lambda: norm((2 * 2) ** 0.25 * x + f(x)),
        "rezero": lambda: x + block.alpha * f(x),
        "fixup": lambda: x + block.scale * f(x + block.bias) + block.last_bias,
        "none": lambda: f(norm(x)),
    }[name]()
    torch.testing.assert_close(block(x), expected)


def test_rezero_and_fixup_begin_as_the_identity():
    tokens = random_tokens(2, 9)
    for name in ("rezero", "fixup"):
        network = Variant(VariantConfig(**SIZES, residual=name)).eval()
        x = network.position(network.token_embedding(tokens), torch.arange(9))
        assert torch.equal(network.features(tokens), x)
    network = Variant(VariantConfig(**SIZES, residual="pre_ln")).eval()
    assert not torch.equal(network.features(tokens), network.norm(x))


def test_the_laws_of_the_first_weights():
    sizes = {**SIZES, "n_embd": 256, "n_layer": 8}

    def deviations(**settings):
        network = Variant(VariantConfig(**sizes, **settings))
        s, f = network.blocks[0].sublayer, network.blocks[1].sublayer
        layers = {"q": s.q, "v": s.v, "s.proj": s.proj, "fc": f.fc, "f.proj": f.proj}
        return {name: layer.weight.std().item() for name, layer in layers.items()}

    def near(**expected):
        return {name.replace("_", "."): pytest.approx(v, rel=0.03) for name, v in expected.items()}

    inner, n = 0.02 / 16**0.5, 16
    plain = near(q=0.02, v=0.02, s_proj=inner, fc=0.02, f_proj=inner)
    assert deviations() == plain
    assert deviations(residual="rezero") == plain
    assert deviations(residual="fixup") == near(
        q=0.02, v=0.02 / n**0.5, s_proj=0.0, fc=0.02 / n**0.5, f_proj=0.0
    )
    square, wide = (2 / 512) ** 0.5, (2 / (256 + 1024)) ** 0.5  # Xavier's
    beta = (8 * 8) ** -0.25
    assert deviations(residual="deepnorm") == near(
        q=square, v=beta * square, s_proj=beta * square, fc=beta * wide, f_proj=beta * wide
    )


def test_orders_are_built_as_they_are_written():
    # One of the lecture's: the sandwich of 16 and 16 with six of each outside.
    sandwich = "s" * 6 + "sf" * 10 + "f" * 6
    network = Variant(VariantConfig(**SIZES, order=sandwich))
    kinds = ["s" if hasattr(block.sublayer, "q") else "f" for block in network.blocks]
    assert "".join(kinds) == sandwich and network.config.n_layer == 16
    assert count_parameters(network) == count_parameters(
        Variant(VariantConfig(**{**SIZES, "n_layer": 16}))
    )


def test_shared_sublayers_are_one_of_each():
    network = make(shared="all", n_layer=5)
    assert len(network.blocks) == 2 and len(network.make_caches()) == 10
    assert count_parameters(network) < count_parameters(make(n_layer=2))


@torch.no_grad()
def test_universal_adds_place_and_depth_before_each_layer():
    network, tokens = make(shared="universal", positions="none"), random_tokens(2, 9)
    f, s = network.blocks
    x = network.token_embedding(tokens)

    def sinusoid(position):
        angles = [position / 10000 ** (i / 32) for i in range(0, 32, 2)]
        return torch.tensor([g(a) for a in angles for g in (math.sin, math.cos)])

    for depth in range(2):
        places = torch.stack([sinusoid(t) + sinusoid(depth) for t in range(9)])
        x = f(s(x + 0.02 * 2**0.5 * places, "causal"))
    torch.testing.assert_close(network.features(tokens), network.norm(x), atol=1e-5, rtol=1e-5)


def test_a_mixture_of_softmaxes_is_one_and_has_a_higher_rank():
    """One softmax of 8 channels makes log-probabilities of rank 9 at most (that of the products,
    and the constant of each place): the bottleneck of the paper."""
    with torch.no_grad():
        ranks = []
        for K in (1, 4):
            network = make(vocab_size=40, n_embd=8, n_head=2, n_softmax=K)
            tokens = torch.randint(40, (8, 16))
            log_p = network(tokens).log_softmax(-1)
            ranks.append(torch.linalg.matrix_rank(log_p.flatten(0, 1).double(), rtol=1e-5).item())
        assert ranks[0] <= 9 < ranks[1]
        torch.testing.assert_close(network(tokens).exp().sum(-1), torch.ones(8, 16))
        features = network.features(tokens)
        prior = network.prior(features).softmax(-1)
        each = network.contexts(features).tanh().split(8, -1)
        p = sum(
            prior[..., k, None] * F.linear(x, network.output_matrix).softmax(-1)
            for k, x in enumerate(each)
        )
        torch.testing.assert_close(network(tokens).exp(), p)


def test_depth_and_width_at_equal_parameters():
    blocks = [
        count_parameters(make(n_layer=n, n_embd=C, n_head=4).blocks)
        for n, C in ((1, 256), (4, 128), (16, 64))
    ]
    assert max(blocks) < 1.02 * min(blocks)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"act": "gellu"}, "act=gellu is not known: choose gelu, relu, "),
        ({"residual": "mid_ln"}, "residual=mid_ln is not known: choose pre_ln, "),
        ({"order": "sfx"}, "order=sfx has other letters than s"),
        ({"embedding_width": 64}, "embedding_width=64 is out of range: choose 1 to n_embd=32"),
        ({"n_softmax": 0}, "n_softmax=0 is out of range: choose 1 to 1000"),
        (
            {"positions": "rotary", "mixing": "random"},
            "positions=rotary has no effect, since nothing compares queries and keys: choose none, "
            "learned, sinusoidal, learned_sinusoidal",
        ),
        ({"positions": "t5", "order": "ff"}, "positions=t5 has no effect"),
        (
            {"mixing": "dense", "order": "ff"},
            "mixing=dense has no effect, since the order has no s",
        ),
        ({"act": "relu", "order": "ss"}, "act=relu has no effect, since the order has no f"),
        ({"norm": "rms", "residual": "fixup"}, "norm=rms has no effect, since fixup has none"),
        ({"shared": "universal", "order": "ff", "positions": "none"}, "shared=universal has no"),
        ({"shared": "universal"}, "positions=learned come twice"),
    ],
)
def test_errors(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        VariantConfig(**SIZES, **wrong)


# ---- runs ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--order=sff", "--residual=rezero", "--positions=alibi"],
        ["--order=ff", "--optimizer=adamw"],
        ["--shared=universal", "--positions=none", "--n_layer=3", "--recompute"],
        ["--mixing=random", "--act=geglu", "--n_ff=0"],
        ["--n_softmax=2", "--embedding_width=16", "--tied=false", "--dtype=bf16"],
        ["--positions=t5", "--norm=rms", "--dropout=0.1"],
    ],
    ids=" ".join,
)
def test_runs_resume_and_write(toy, capsys, flags):
    train.main([*TOY, "--model=variant", "--out=v", *flags, "--steps=4", "--stop_after=2"])
    train.main(["--resume", "--out=v"])
    capsys.readouterr()
    asked = ["--checkpoint=v/best.pt", "--prompt=2 times", "--max_new_tokens=40"]
    sample.main([*asked, "--temperature=0"])
    written = capsys.readouterr().out
    assert written.startswith("2 times") and len(written) > len("2 times") + 5
    sample.main([*asked, "--temperature=0"])
    assert capsys.readouterr().out == written
