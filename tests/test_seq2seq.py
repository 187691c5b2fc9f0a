"""seq2seq.py beside torch.nn and Hugging Face's Marian, by perturbation, and cached."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import peer

from decoding import generate_targets
from engine.hub.mapping import to_ours
from engine.hub.peers import hugging_face_marian
from engine.plan import parameter_table
from engine.presets import PRESETS
from model import attend, causal_mask, count_parameters
from optim import make_optimizer
from seq2seq import Seq2Seq, Seq2SeqConfig, sinusoids
from tasks.translation import make_advance

SMALL = Seq2SeqConfig(
    vocab_size=37, block_size=17, n_layer=3, n_head=4, n_embd=28, n_ff=44, dropout=0.0
)
B, S, T, V = 3, 13, 7, 37
LENGTHS = torch.tensor([13, 4, 9])  # of the sources
TARGET_LENGTHS = torch.tensor([3, 7, 5])


def small(**changes) -> Seq2Seq:
    """In eval mode, with weights such that every part matters. (Norms with small weights would
    hide what lies before them, and an error in it.)"""
    model = Seq2Seq(Seq2SeqConfig(**{**vars(SMALL), **changes})).eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm.weight" in name), std=0.3)
    return model


def batch() -> dict[str, torch.Tensor]:
    """Sources and targets of unlike lengths; what stands at padding is as random as the rest."""
    target = torch.randint(V - 1, (B, T + 1))
    padding = torch.arange(T) >= TARGET_LENGTHS[:, None]
    return {
        "source": torch.randint(V - 1, (B, S)),
        "tokens": target[:, :-1],
        "targets": target[:, 1:].masked_fill(padding, -100),
        "source_keep": torch.arange(S) < LENGTHS[:, None],
    }


def without(fields: dict, *names: str) -> dict:
    return {k: v for k, v in fields.items() if k not in names}


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_near(got: dict, want: dict, atol: float = 1e-5) -> None:
    """Element by element, relative to the largest element of all."""
    assert got.keys() == want.keys()
    scale = max(g.abs().max().item() for g in want.values())
    for name in want:
        torch.testing.assert_close(got[name] / scale, want[name] / scale, atol=atol, rtol=0)


# ---- peers ---------------------------------------------------------------------------------------

# What their names are called here, part by part; the norms are those of the decoder.
TORCH_NAMES = {
    "attention.proj": "self_attn.out_proj",
    "cross.proj": "multihead_attn.out_proj",
    "mlp.fc": "linear1",
    "mlp.proj": "linear2",
    "attention_norm": "norm1",
    "cross_norm": "norm2",
    "mlp_norm": "norm3",
}


def as_torch(name: str, tensors: dict) -> torch.Tensor:
    """Our parameter's counterpart among tensors of torch.nn's encoder and decoder."""
    side, layer, rest = name.split(".", 2)
    sublayer, kind = rest.rsplit(".", 1)
    place = f"{side}.layers.{layer}."
    if sublayer in TORCH_NAMES:
        there = TORCH_NAMES[sublayer]
        if side == "encoder" and there == "norm3":
            there = "norm2"  # without cross-attention there are two
        return tensors[f"{place}{there}.{kind}"]
    sublayer, part = sublayer.split(".")
    module = {"attention": "self_attn", "cross": "multihead_attn"}[sublayer]
    return tensors[f"{place}{module}.in_proj_{kind}"].chunk(3)["qkv".index(part)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_torch_nn_features_and_gradients(smoothing):
    """nn.TransformerEncoder and -Decoder without the final norms that the paper does not have."""
    sizes = {"dropout": 0.0, "activation": F.relu, "batch_first": True}
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(28, 4, 44, **sizes), 3, norm=None, enable_nested_tensor=False
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(28, 4, 44, **sizes), 3, norm=None)
    theirs = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    ours, given = small(label_smoothing=smoothing), batch()
    tensors = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name != "token_embedding.weight":
                as_torch(name, tensors).copy_(p)

    def their_features(embed):
        hidden = ~given["source_keep"]
        memory = encoder(embed(given["source"]), src_key_padding_mask=hidden)
        x, mask = embed(given["tokens"]), ~causal_mask(T, T)
        return decoder(x, memory, tgt_mask=mask, memory_key_padding_mask=hidden), memory

    want, their_memory = their_features(ours.embed)
    memory = ours.encode(given["source"], given["source_keep"])
    got = ours.decode(given["tokens"], memory, given["source_keep"])
    real = given["source_keep"]
    torch.testing.assert_close(memory[real], their_memory[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    logits, targets = ours.head(want).flatten(0, 1), given["targets"].flatten()
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    losses = ours(**given)
    torch.testing.assert_close(losses["loss"], loss, rtol=1e-5, atol=0)
    tensors["embedding"] = ours.token_embedding.weight
    found = torch.autograd.grad(loss, list(tensors.values()))
    found = dict(zip(tensors, found, strict=True))
    embedding = {"token_embedding.weight": found["embedding"]}
    rest = [n for n, _ in ours.named_parameters() if n not in embedding]
    wanted = embedding | {name: as_torch(name, found) for name in rest}
    assert_near(gradients(ours, losses["loss"]), wanted)


@pytest.mark.parametrize("V,n_head", [(37, 4), (53, 7)])
def test_equals_hugging_face_marian_logits_loss_and_gradients(V, n_head):
    """Theirs has a table of positions with all sines in front of all cosines: its whole residual
    stream is ours in that order."""
    transformers = peer("transformers")
    ours, given = small(vocab_size=V, n_head=n_head, label_smoothing=0.0), batch()
    # The padding token's embedding gets no gradient there: the batch does not use it.
    theirs = hugging_face_marian(transformers, ours, start=0, end=0).eval()
    tensors = dict(theirs.named_parameters())
    frozen = {n for n, p in tensors.items() if not p.requires_grad}
    assert frozen == {f"model.{x}coder.embed_positions.weight" for x in ("en", "de")}
    assert len(tensors) - len(frozen) == len(list(ours.parameters()))
    assert not theirs.final_logits_bias.any()
    want = theirs(
        input_ids=given["source"],
        attention_mask=given["source_keep"].long(),
        decoder_input_ids=given["tokens"],
    ).logits
    got = ours(**without(given, "targets"))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    loss = F.cross_entropy(want.flatten(0, 1), given["targets"].flatten(), reduction="sum")
    losses = ours(**given)
    torch.testing.assert_close(losses["loss"], loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["nll"], loss.detach(), rtol=1e-5, atol=0)
    trained = [n for n in tensors if n not in frozen]
    found = dict(
        zip(trained, torch.autograd.grad(loss, [tensors[n] for n in trained]), strict=True)
    )
    shapes = {name: tuple(gradient.shape) for name, gradient in found.items()}
    _, wanted, _ = to_ours("seq2seq", ours.config, shapes, found.__getitem__)
    assert_near(gradients(ours, losses["loss"]), wanted)


def test_positions_are_marians_in_another_order():
    transformers = peer("transformers")
    config = transformers.MarianConfig(d_model=32, max_position_embeddings=17, pad_token_id=0)
    table = transformers.MarianMTModel(config).model.encoder.embed_positions.weight
    ours = sinusoids(17, 32)
    torch.testing.assert_close(table, torch.cat([ours[:, 0::2], ours[:, 1::2]], dim=1))


# ---- sizes, positions, initialisation ------------------------------------------------------------


@pytest.mark.parametrize("length,width", [(1, 2), (13, 28), (300, 6)])
def test_sinusoids_are_the_formula(length, width):
    got = sinusoids(length, width)
    assert got.shape == (length, width) and got.dtype == torch.float32
    for pos in range(length):
        for i in range(width // 2):
            angle = pos / 10000 ** (2 * i / width)
            assert got[pos, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-7)
            assert got[pos, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-7)


def by_hand(V: int, L: int, C: int, F: int) -> int:
    attention, mlp, norm = 4 * (C * C + C), C * F + F + F * C + C, 2 * C
    encoder = attention + mlp + 2 * norm
    return V * C + L * (encoder + encoder + attention + norm)


# The paper's table 3 says 65 and 213 million, of vocabularies that it gives as "about 37000".
COUNTS = {"transformer-base": 63_082_496, "transformer-big": 214_245_376}


@pytest.mark.parametrize("preset", [k for k, v in PRESETS.items() if v.get("model") == "seq2seq"])
def test_every_preset_can_be_built_and_has_its_size(preset):
    sizes = {k: v for k, v in PRESETS[preset].items() if k in vars(Seq2SeqConfig())}
    with torch.device("meta"):
        model = Seq2Seq(Seq2SeqConfig(**sizes))
    c, n = model.config, count_parameters(model)
    assert n == by_hand(c.vocab_size, c.n_layer, c.n_embd, c.n_ff)
    assert n == sum(one * copies for _, one, copies in parameter_table(model))
    assert set(COUNTS) < set(PRESETS) and n == COUNTS.get(preset, n)


def test_the_default_is_the_papers_base_model():
    with torch.device("meta"):
        assert count_parameters(Seq2Seq(Seq2SeqConfig())) == COUNTS["transformer-base"]


def test_parameter_table_counts_encoder_and_decoder_blocks():
    table = {name: (n, copies) for name, n, copies in parameter_table(Seq2Seq(SMALL))}
    attention = (4 * (28 * 28 + 28), 3)
    assert table["encoder.*.attention"] == table["decoder.*.attention"] == attention
    assert table["decoder.*.cross"] == attention and "encoder.*.cross" not in table
    assert table["token_embedding"] == (37 * 28, 1)


def test_initialisation_follows_the_laws_of_its_table():
    C, n_ff = 96, 160
    model = Seq2Seq(Seq2SeqConfig(vocab_size=1000, n_layer=2, n_head=4, n_embd=C, n_ff=n_ff))
    kinds = set()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif name == "token_embedding.weight":
            assert p.std().item() == pytest.approx(C**-0.5, rel=0.02)
            assert p.abs().max() > 3 * C**-0.5  # normal, not uniform
        else:
            kinds.add(sum(p.shape))
            bound = (6 / (C + n_ff if ".mlp." in name else 2 * C)) ** 0.5
            assert 0.999 * bound < p.abs().max().item() <= bound, name
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.03), name
        if p.dim() > 1:
            assert abs(p.mean().item()) < 5 * p.std().item() / p.numel() ** 0.5, name
    assert kinds == {2 * C, C + n_ff}
    embedded = model.token_embedding(torch.arange(1000)) * C**0.5
    assert embedded.std().item() == pytest.approx(1, rel=0.02)


def test_positions_are_no_weights():
    """They are computed, so a checkpoint neither holds nor asks for them."""
    assert not [k for k in small().state_dict() if "position" in k]


def test_dropout_is_in_embeddings_and_branches_but_not_in_attention():
    """Section 5.4; attention_dropout asks for the third place."""
    plain, dropped, forgetful = (
        small(**changes).train() for changes in ({}, {"dropout": 0.5}, {"attention_dropout": 0.5})
    )
    given = without(batch(), "targets")
    assert torch.equal(plain(**given), plain.eval()(**given))
    assert dropped.encoder[0].attention.dropout == 0
    share = (dropped.embed(given["source"]) == 0).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.08)
    assert (dropped.embed(given["source"]) == 0).any()
    assert not (forgetful.embed(given["source"]) == 0).any()
    for model in (dropped, forgetful):
        assert not torch.equal(model(**given), model(**given))
        model.eval()
        assert torch.equal(model(**given), model(**given))


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"n_embd": 27}, r"n_embd=27 is odd, .*: choose 28"),
        ({"n_head": 5}, r"n_head=5 does not divide n_embd=28: choose 4 or 7"),
        ({"n_layer": 0}, r"n_layer=0 is too small: it must be 1 or more"),
        ({"dropout": 1.0}, r"dropout=1\.0 is out of range: choose 0 <= dropout < 1"),
        ({"attention_dropout": -0.1}, r"attention_dropout=-0\.1 is out of range"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1\.0 is out of range: choose 0 <= label_smoo"),
        ({"label_smoothing": -0.1}, r"label_smoothing=-0\.1 is out of range"),
    ],
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        small(**wrong)


def test_too_long_inputs_are_refused():
    model, message = small(), r"18 positions are more than block_size=17: shorten the input"
    short, long = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 18, dtype=torch.long)
    for source, tokens in ((long, short), (short, long)):
        with pytest.raises(ValueError, match=message):
            model(source, tokens)
    caches, memory = model.make_caches(2, 20), model.encode(short)
    model.decode(long[:, :17], memory, caches=caches)
    with pytest.raises(ValueError, match=message):
        model.decode(long[:, :1], memory, caches=caches)
    caches = model.make_caches(2, 3)
    with pytest.raises(ValueError, match=r"holds 3 positions, 0 are used and 17 more"):
        model.decode(long[:, :17], memory, caches=caches)


# ---- loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_torchs_over_the_logits(smoothing):
    model, given = small(label_smoothing=smoothing), batch()
    logits = model(**without(given, "targets")).flatten(0, 1)
    options = {"reduction": "sum", "ignore_index": -100}
    want = F.cross_entropy(logits, given["targets"].flatten(), label_smoothing=smoothing, **options)
    plain = F.cross_entropy(logits, given["targets"].flatten(), **options)
    got = model(**given)
    assert set(got) == {"loss", "nll"} and not got["nll"].requires_grad
    torch.testing.assert_close(got["loss"], want, rtol=1e-5, atol=0)
    torch.testing.assert_close(got["nll"], plain.detach(), rtol=1e-5, atol=0)
    nothing = model(**{**given, "targets": torch.full((B, T), -100)})
    assert nothing["loss"] == nothing["nll"] == 0
    assert all((g == 0).all() for g in gradients(model, nothing["loss"]).values())


@pytest.mark.parametrize("cut", [1, 2])
def test_batches_of_parts_add_up_to_the_whole(cut):
    """Each part is padded to its own longest only. So accumulation is exact."""
    model, given = small(), batch()
    whole = model(**given)
    wanted = gradients(model, whole["loss"])
    sums, total = (
        {"loss": 0.0, "nll": 0.0},
        {name: torch.zeros_like(g) for name, g in wanted.items()},
    )
    for part in (slice(0, cut), slice(cut, B)):
        s, t = LENGTHS[part].max(), TARGET_LENGTHS[part].max()
        lengths = {"source": s, "source_keep": s, "tokens": t, "targets": t}
        losses = model(**{k: v[part, : lengths[k]] for k, v in given.items()})
        for name, value in losses.items():
            sums[name] += value.detach()
        for name, gradient in gradients(model, losses["loss"]).items():
            total[name] += gradient
    for name, value in whole.items():
        torch.testing.assert_close(sums[name], value.detach(), rtol=1e-5, atol=0)
    assert_near(total, wanted)


def test_bf16_on_a_cpu_stays_near_float32():
    """Autocast rounds the products; attention, where bf16 is slow backward, goes by float32."""
    model, given = Seq2Seq(SMALL), batch()
    want = gradients(model, model(**given)["loss"])
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(**given)
    got = gradients(model, losses["loss"])
    assert losses["loss"].dtype == torch.float32
    for name in want:
        assert got[name].isfinite().all() and got[name].dtype == torch.float32
    flat = [torch.cat([g.flatten() for g in gs.values()]) for gs in (got, want)]
    assert 0 < (flat[0] - flat[1]).norm() < 0.15 * flat[1].norm()  # 0.01 to 0.07


@pytest.mark.usefixtures("installed")
def test_attention_in_bf16_that_trains_is_float32s_rounded():
    keep = torch.rand(2, 1, 7, 13) < 0.7
    for mask, S in ((None, 13), ("causal", 7), ("causal", 13), (keep, 13)):
        shapes = [(2, 3, n, 5) for n in (7, S, S)]
        q, k, v = (torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
        with torch.autocast("cpu", torch.bfloat16):
            got = attend(q, k, v, mask, 0.0)
        exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
        want = attend(*exact, mask, 0.0)
        assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())
        up = torch.randn_like(got)
        for a, b in zip(
            torch.autograd.grad(got, (q, k, v), up),
            torch.autograd.grad(want, exact, up.float()),
            strict=True,
        ):
            assert torch.equal(a, b.bfloat16())


# ---- learning ------------------------------------------------------------------------------------


def reversals(n: int, random: torch.Generator) -> dict[str, torch.Tensor]:
    """n rows of 1 to 5 digits (1 to 9) and the end (0); the target is the digits reversed."""
    lengths = torch.randint(1, 6, (n, 1), generator=random)
    place = torch.arange(6)
    source = torch.randint(1, 10, (n, 6), generator=random).masked_fill(place >= lengths, 0)
    target = source.gather(1, (lengths - 1 - place).clamp(min=0)).masked_fill(place >= lengths, 0)
    tokens = torch.cat([torch.zeros_like(target[:, :1]), target[:, :-1]], 1)
    targets = target.masked_fill(place > lengths, -100)
    return {"source": source, "tokens": tokens, "targets": targets, "source_keep": place <= lengths}


@pytest.mark.slow
def test_it_learns_to_reverse_what_it_reads():
    """All parts at once, from the loss to greedy decoding with caches; unseen rows, all correct."""
    random = torch.Generator().manual_seed(0)
    model = Seq2Seq(
        Seq2SeqConfig(vocab_size=10, block_size=8, n_layer=2, n_head=4, n_embd=32, dropout=0.0)
    )
    optimizer = make_optimizer(model, "muon", lr=1e-2, weight_decay=0.0)
    steps = 300
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, (step + 1) / 20, 2 * (steps - step) / steps)
        given = reversals(64, random)
        (model(**given)["loss"] / (given["targets"] != -100).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    given = reversals(200, random)
    with torch.no_grad():
        advance = make_advance(model, given["source"], given["source_keep"], 8, 10)
        written = generate_targets(
            advance, [7] * 200, lambda logits, _: logits.argmax(-1), start=0, end=0
        )
    rows = [
        row[keep].tolist()[:-1]
        for row, keep in zip(given["source"], given["source_keep"], strict=True)
    ]
    right = [w == row[::-1] for w, row in zip(written, rows, strict=True)]
    assert sum(right) == 200
