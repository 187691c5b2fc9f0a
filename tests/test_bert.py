"""bert.py beside torch.nn and Hugging Face's BERT, by perturbation, and until it knows a batch."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import peer
from test_seq2seq import as_torch, assert_near, gradients, without
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bert import BERT, BERTConfig, init_bert
from engine.hub.mapping import rows, to_ours
from engine.hub.peers import hugging_face_encoder
from engine.plan import parameter_table
from engine.presets import PRESETS
from model import count_parameters

SMALL = BERTConfig(
    vocab_size=37,
    block_size=17,
    n_layer=3,
    n_head=4,
    n_embd=28,
    n_ff=44,
    dropout=0.0,
    attention_dropout=0.0,
)
B, T, C, V, N = 3, 13, 28, 37, 7
LENGTHS = torch.tensor([13, 4, 9])
FIRST_PARTS = torch.tensor([6, 2, 7])  # with [CLS] and [SEP]
INPUT = "tokens", "segments", "keep"


def small(**changes) -> BERT:
    """In eval mode, with weights such that every part matters. (Norms with small weights would
    hide what lies before them, and an error in it.)"""
    model = BERT(BERTConfig(**{**vars(SMALL), **changes})).eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm.weight" in name), std=0.3)
    return model


def batch() -> dict[str, torch.Tensor]:
    """Rows of unlike lengths; N real places are asked for, at least one in each row. What stands
    at padding is as random as the rest."""
    keep = torch.arange(T) < LENGTHS[:, None]
    firsts = torch.arange(B) * T  # [CLS] is asked for too: the model does not know better
    others = keep.flatten().nonzero()[:, 0]
    others = others[~torch.isin(others, firsts)]
    chosen = torch.cat([firsts, others[torch.randperm(len(others))[: N - B]]]).sort().values
    return {
        "tokens": torch.randint(V, (B, T)),
        "segments": (torch.arange(T) >= FIRST_PARTS[:, None]).long(),
        "keep": keep,
        "mlm_positions": chosen,
        "mlm_targets": torch.randint(V, (N,)),
        "nsp_targets": torch.tensor([0, 1, 0]),
    }


def inputs(given: dict) -> dict[str, torch.Tensor]:
    return {name: given[name] for name in INPUT}


def other(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens + 1) % V


def embedded(model: BERT, tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """Section 3 of the paper, figure 2; normalised, as in the paper's code."""
    x = model.token_embedding.weight[tokens] + model.segment_embedding.weight[segments]
    x = x + model.position_embedding.weight[torch.arange(tokens.size(1))]
    norm = model.embedding_norm
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-12)


# ---- peers ---------------------------------------------------------------------------------------


def as_theirs(given: dict) -> dict[str, torch.Tensor]:
    """The same batch by Hugging Face's names; labels are -100 except at the chosen places."""
    labels = torch.full((B * T,), -100)
    labels[given["mlm_positions"]] = given["mlm_targets"]
    named = {
        "input_ids": given["tokens"],
        "token_type_ids": given["segments"],
        "attention_mask": given["keep"].long(),
        "labels": labels.view(B, T),
    }
    return named | ({"next_sentence_label": given["nsp_targets"]} if "nsp_targets" in given else {})


# In fp64 only the chunked loss is fp32 here: the logits agree to 1e-10, and that is enough to tell
# an epsilon of 1e-12 from one of 1e-5.
@pytest.mark.slow
@pytest.mark.parametrize("dtype,atol", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("nsp", [True, False], ids=["nsp", "mlm alone"])
def test_equals_hugging_face_logits_losses_and_gradients(nsp, dtype, atol):
    ours = small(nsp=nsp).to(dtype)
    given = batch() if nsp else without(batch(), "nsp_targets")
    theirs = hugging_face_encoder(peer("transformers"), ours).eval().to(dtype)
    tensors = dict(theirs.named_parameters())
    assert set(tensors) == {row.theirs for row in rows("bert", ours.config)}
    embedding = tensors["bert.embeddings.word_embeddings.weight"]
    assert theirs.get_output_embeddings().weight is embedding
    want = theirs(**as_theirs(given))
    mlm, following = ours(**inputs(given))
    chosen = (want.prediction_logits if nsp else want.logits).flatten(0, 1)
    near = {"atol": atol, "rtol": atol}
    torch.testing.assert_close(mlm.flatten(0, 1), chosen, **near)
    losses = ours(**given)
    chosen = chosen[given["mlm_positions"]].float()
    loss = F.cross_entropy(chosen, given["mlm_targets"], reduction="sum")
    torch.testing.assert_close(losses["mlm"], loss, rtol=1e-5, atol=0)
    total = losses["mlm"] / N
    if nsp:
        torch.testing.assert_close(following, want.seq_relationship_logits, **near)
        logits = want.seq_relationship_logits.float()
        loss = F.cross_entropy(logits, given["nsp_targets"], reduction="sum")
        torch.testing.assert_close(losses["nsp"], loss, rtol=1e-5, atol=0)
        total = total + losses["nsp"] / B
    else:
        assert following is None and set(losses) == {"mlm", "mlm_accuracy"}
    torch.testing.assert_close(total.to(dtype), want.loss, rtol=1e-5, atol=0)
    found = dict(zip(tensors, torch.autograd.grad(want.loss, tensors.values()), strict=True))
    shapes = {name: tuple(gradient.shape) for name, gradient in found.items()}
    _, wanted, _ = to_ours("bert", ours.config, shapes, found.__getitem__)
    got = gradients(ours, total)
    assert_near(got, wanted)
    for name in wanted if dtype == torch.float64 else []:
        if not name.endswith("k.bias"):  # without effect, so its gradient is what rounding leaves
            assert_near({name: got[name]}, {name: wanted[name]}, 2e-6)


def test_hugging_faces_bert_drops_what_ours_drops():
    transformers = peer("transformers")
    theirs = hugging_face_encoder(transformers, small(dropout=0.2, attention_dropout=0.3))
    rates = {name: m.p for name, m in theirs.named_modules() if isinstance(m, nn.Dropout)}
    assert len(rates) == 1 + 3 * 3
    for name, p in rates.items():
        assert p == (0.3 if name.endswith("attention.self.dropout") else 0.2), name
    for changes in ({"pre_ln": True}, {"bias": False}):
        with pytest.raises(ValueError, match=r"Hugging Face has no BERT with pre_ln="):
            hugging_face_encoder(transformers, small(**changes))


@pytest.mark.parametrize("pre_ln", [True, False])
def test_encoder_equals_torch_nn_features_and_gradients(pre_ln):
    """nn.TransformerEncoder with the exact GELU, on embeddings that are added up here."""
    ours, given = small(pre_ln=pre_ln, nsp=False).double(), batch()
    sizes = {"dropout": 0.0, "activation": F.gelu, "layer_norm_eps": 1e-12, "batch_first": True}
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(C, 4, 44, norm_first=pre_ln, **sizes),
        3,
        norm=nn.LayerNorm(C, 1e-12) if pre_ln else None,
        enable_nested_tensor=False,
    )
    theirs = nn.ModuleDict({"encoder": encoder}).double()
    tensors = dict(theirs.named_parameters())

    def counterpart(name: str, tensors: dict) -> torch.Tensor:
        if name.startswith("norm."):
            return tensors[f"encoder.{name}"]
        return as_torch(name.replace("blocks", "encoder"), tensors)

    names = [n for n, _ in ours.named_parameters() if n.startswith(("blocks.", "norm."))]
    assert sum(p.numel() for p in theirs.parameters()) == sum(
        counterpart(name, tensors).numel() for name in names
    )
    parameters = dict(ours.named_parameters())
    with torch.no_grad():
        for name in names:
            counterpart(name, tensors).copy_(parameters[name])
    keep = given["keep"]
    want = encoder(embedded(ours, given["tokens"], given["segments"]), src_key_padding_mask=~keep)
    got = ours.features(**inputs(given))
    torch.testing.assert_close(got[keep], want[keep], atol=1e-10, rtol=1e-10)
    up = torch.randn_like(want) * keep[..., None]
    embeddings = [n for n in parameters if "embedding" in n]
    found = torch.autograd.grad((want * up).sum(), list(tensors.values()), retain_graph=True)
    wanted = {n: counterpart(n, dict(zip(tensors, found, strict=True))) for n in names}
    found = torch.autograd.grad((want * up).sum(), [parameters[n] for n in embeddings])
    wanted |= dict(zip(embeddings, found, strict=True))
    got = torch.autograd.grad((got * up).sum(), [parameters[n] for n in wanted])
    assert_near(dict(zip(wanted, got, strict=True)), wanted, 1e-10)


def test_heads_are_the_formulas_of_the_papers_code():
    model, given = small().double(), batch()
    x = model.features(**inputs(given))
    y = x @ model.mlm_dense.weight.T + model.mlm_dense.bias
    y = y * (1 + torch.erf(y / 2**0.5)) / 2
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-12) ** 0.5
    y = y * model.mlm_norm.weight + model.mlm_norm.bias
    mlm, nsp = model(**inputs(given))
    torch.testing.assert_close(mlm, y @ model.token_embedding.weight.T + model.mlm_bias)
    pooled = torch.tanh(x[:, 0] @ model.pooler.weight.T + model.pooler.bias)
    torch.testing.assert_close(nsp, pooled @ model.nsp_head.weight.T + model.nsp_head.bias)
    assert mlm.shape == (B, T, V) and nsp.shape == (B, 2)


# ---- sizes, initialisation -----------------------------------------------------------------------


def by_hand(V: int, T: int, L: int, C: int, F: int) -> tuple[int, int]:
    """(with the pooler, but without the two heads, as such counts are published; with both)"""
    attention, mlp, norm = 4 * (C * C + C), C * F + F + F * C + C, 2 * C
    body = (V + T + 2) * C + norm + L * (attention + mlp + 2 * norm) + C * C + C
    return body, body + C * C + C + norm + V + 2 * C + 2


# Checked against Hugging Face's models: BertModel and BertForPreTraining.
COUNTS = {
    "bert-base": (109_482_240, 110_106_428),
    "bert-large": (335_141_888, 336_226_108),
    "bert-tiny": (4_385_920, 4_433_468),
    "bert-mini": (11_170_560, 11_267_900),
    "bert-small": (28_763_648, 29_058_876),
    "bert-medium": (41_373_184, 41_668_412),
}
# Layers, width, heads: Devlin et al. 2019, section 3; Turc et al. 2019, table 1.
SIZES = {
    "bert-base": (12, 768, 12),
    "bert-large": (24, 1024, 16),
    "bert-tiny": (2, 128, 2),
    "bert-mini": (4, 256, 4),
    "bert-small": (4, 512, 8),
    "bert-medium": (8, 512, 8),
}


@pytest.mark.parametrize("preset", [k for k, v in PRESETS.items() if v["model"] == "bert"])
def test_every_preset_can_be_built_and_has_its_published_size(preset):
    sizes = {k: v for k, v in PRESETS[preset].items() if k in vars(BERTConfig())}
    with torch.device("meta"):
        model = BERT(BERTConfig(**sizes))
    c, n = model.config, count_parameters(model)
    assert (c.n_layer, c.n_embd, c.n_head) == SIZES.get(preset, (c.n_layer, c.n_embd, c.n_head))
    heads = sum(p.numel() for k, p in model.named_parameters() if k.startswith(("mlm", "nsp")))
    base, both = by_hand(c.vocab_size, c.block_size, c.n_layer, c.n_embd, c.n_ff)
    if not c.nsp:  # no pooler and no head of two classes
        pooler = c.n_embd * (c.n_embd + 1)
        base, both = base - pooler, both - pooler - 2 * (c.n_embd + 1)
    if c.pre_ln:  # one LayerNorm more, at the end of the stack
        base, both = base + 2 * c.n_embd, both + 2 * c.n_embd
    assert (n - heads, n) == (base, both) == COUNTS.get(preset, (base, both))
    assert n == sum(one * copies for _, one, copies in parameter_table(model))
    assert set(COUNTS) == set(SIZES) < set(PRESETS)


def test_the_default_is_bert_base():
    with torch.device("meta"):
        assert count_parameters(BERT(BERTConfig())) == COUNTS["bert-base"][1]


def test_parameter_table_counts_blocks_as_copies():
    table = {name: (n, copies) for name, n, copies in parameter_table(BERT(SMALL))}
    assert table["blocks.*.attention"] == (4 * (C * C + C), 3)
    assert table["blocks.*.mlp"] == (2 * C * 44 + 44 + C, 3)
    assert table["segment_embedding"] == (2 * C, 1)
    assert table["pooler"] == table["mlm_dense"] == (C * C + C, 1)


@pytest.mark.parametrize("pre_ln", [True, False])
def test_initialisation_follows_the_laws_of_its_table(pre_ln):
    """Cut off at two deviations, a normal distribution keeps 0.88 of its deviation."""
    sizes = {"vocab_size": 1000, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 96}
    first, second = (BERT(BERTConfig(**sizes, pre_ln=pre_ln)) for _ in range(2))
    for p in second.parameters():
        nn.init.constant_(p, 5.0)
    init_bert(second)  # so that what it forgets stays 5
    density = math.exp(-2) / (2 * math.pi) ** 0.5
    std = 0.02 * (1 - 4 * density / math.erf(2**0.5)) ** 0.5
    assert std == pytest.approx(0.88 * 0.02, rel=1e-3)
    for model in (first, second):
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                assert (p == 0).all(), name
            elif "norm" in name:
                assert (p == 1).all(), name
            else:
                n = p.numel()
                assert p.std().item() == pytest.approx(std, rel=3 / n**0.5), name
                assert abs(p.mean().item()) < 4 * std / n**0.5, name
                assert (1 - 60 / n) * 0.04 < p.abs().max().item() <= 0.04, name


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"n_head": 5}, r"n_head=5 does not divide n_embd=28: choose 4 or 7"),
        ({"vocab_size": 0}, r"vocab_size=0 is too small: it must be 1 or more"),
        ({"dropout": 1.0}, r"dropout=1\.0 is out of range: choose 0 <= dropout < 1"),
        ({"attention_dropout": -0.1}, r"attention_dropout=-0\.1 is out of range"),
    ],
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        small(**wrong)


def test_too_long_inputs_are_refused():
    model = small()
    assert model.features(torch.zeros(1, 17, dtype=torch.long)).shape == (1, 17, C)
    message = r"18 positions are more than block_size=17: shorten the input"
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 18, dtype=torch.long))


def test_operations_per_token_are_those_of_a_step():
    """Full rows, 15% of them asked for; what is left out (pooler, NSP) is small."""
    model = BERT(BERTConfig(vocab_size=300, block_size=40, n_layer=2, n_head=4, n_embd=96))
    chosen = torch.randperm(5 * 40)[: 15 * 2]
    tokens = torch.randint(300, (5, 40))
    # The plain backend is two products, which can be counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, mlm_positions=chosen, mlm_targets=tokens.flatten()[chosen])["mlm"].backward()
    per_token = counter.get_total_flops() / tokens.numel()
    assert per_token == pytest.approx(model.flops_per_token(), rel=0.02)


# ---- what each position sees ---------------------------------------------------------------------


@pytest.mark.parametrize("pre_ln", [True, False])
def test_padding_changes_nothing(pre_ln):
    """Whatever stands there, and however much of it there is."""
    model, given = small(pre_ln=pre_ln), batch()
    keep = given["keep"]
    before, sums = model.features(**inputs(given)), model(**given)
    wanted = gradients(model, sums["mlm"] + sums["nsp"])
    changed = {
        **given,
        "tokens": torch.where(keep, given["tokens"], other(given["tokens"])),
        "segments": torch.where(keep, given["segments"], 1 - given["segments"]),
    }
    assert torch.equal(model.features(**inputs(changed))[keep], before[keep])
    after = model(**changed)
    assert all(torch.equal(after[name], value) for name, value in sums.items())
    assert_near(gradients(model, after["mlm"] + after["nsp"]), wanted, 1e-6)
    row, place = given["mlm_positions"] // T, given["mlm_positions"] % T
    longer = {name: F.pad(given[name], (0, 4)) for name in INPUT}
    longer["tokens"][:, T:] = torch.randint(V, (B, 4))
    after = model(**{**given, **longer, "mlm_positions": row * (T + 4) + place})
    for name, value in sums.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=0)
    assert_near(gradients(model, after["mlm"] + after["nsp"]), wanted)


def test_a_batch_is_its_rows_one_by_one():
    """Each without any padding, so with no mask at all. So accumulation is exact, too."""
    model, given = small(), batch()
    mlm, nsp = model(**inputs(given))
    whole = model(**given)
    wanted = gradients(model, whole["mlm"] + whole["nsp"])
    sums = {name: torch.zeros_like(value) for name, value in whole.items()}
    total = {name: torch.zeros_like(g) for name, g in wanted.items()}
    for b, length in enumerate(LENGTHS.tolist()):
        own = given["mlm_positions"] // T == b
        row = {name: given[name][b : b + 1, :length] for name in ("tokens", "segments")}
        got = model(**row)
        torch.testing.assert_close(got[0][0], mlm[b, :length], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[1][0], nsp[b], atol=1e-5, rtol=1e-5)
        row["mlm_positions"] = given["mlm_positions"][own] - b * T
        row["mlm_targets"] = given["mlm_targets"][own]
        losses = model(**row, nsp_targets=given["nsp_targets"][b : b + 1])
        for name in sums:
            sums[name] += losses[name].detach()
        for name, gradient in gradients(model, losses["mlm"] + losses["nsp"]).items():
            total[name] += gradient
    for name, value in whole.items():
        torch.testing.assert_close(sums[name], value.detach(), rtol=1e-5, atol=0)
    assert_near(total, wanted)


def test_a_row_of_padding_only_stays_finite():
    """The softmax of nothing is NaN, and NaN in one row of a batch spreads to all weights."""
    model, given = small(), batch()
    given["keep"][1] = False
    losses = model(**given)
    assert all(value.isfinite() for value in losses.values())
    found = gradients(model, losses["mlm"] + losses["nsp"])
    assert all(g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("what", ["tokens", "segments"])
def test_every_position_sees_the_token_and_the_segment_of_every_other(what):
    model, given = small(), inputs(batch())
    keep, before = given["keep"], model.features(**given)
    for t in range(T):
        changed = given[what].clone()
        changed[:, t] = other(changed[:, t]) if what == "tokens" else 1 - changed[:, t]
        moved = (model.features(**{**given, what: changed}) != before).any(-1)  # (B, T)
        seen = keep[:, t, None].expand(B, T)
        assert torch.equal(moved[keep], seen[keep])


def test_the_order_of_the_tokens_matters_by_the_positions_only():
    model, tokens = small(), torch.randint(V, (B, T))
    order = torch.randperm(T)
    moved = model.features(tokens[:, order]) - model.features(tokens)[:, order]
    assert moved.abs().max() > 0.1
    nn.init.zeros_(model.position_embedding.weight)
    moved = model.features(tokens[:, order]) - model.features(tokens)[:, order]
    assert moved.abs().max() < 1e-4


def test_no_segments_are_the_first_and_no_keep_keeps_all():
    model, given = small(), batch()
    tokens, zeros = given["tokens"], torch.zeros(B, T, dtype=torch.long)
    want = model.features(tokens)
    assert torch.equal(model.features(tokens, zeros), want)
    everything = torch.ones(B, T, dtype=torch.bool)
    torch.testing.assert_close(model.features(tokens, keep=everything), want)
    assert not torch.allclose(model.features(tokens, zeros + 1), want, atol=0.1)


# ---- losses --------------------------------------------------------------------------------------


def test_losses_are_torchs_over_the_logits():
    model, given = small(), batch()
    mlm, nsp = model(**inputs(given))
    chosen = mlm.flatten(0, 1)[given["mlm_positions"]]
    losses = model(**given)
    want = F.cross_entropy(chosen, given["mlm_targets"], reduction="sum")
    torch.testing.assert_close(losses["mlm"], want, rtol=1e-5, atol=0)
    want = -nsp.log_softmax(-1)[range(B), given["nsp_targets"]].sum()
    torch.testing.assert_close(losses["nsp"], want, rtol=1e-5, atol=0)
    assert losses["mlm"].requires_grad and losses["nsp"].requires_grad
    assert set(losses) == {"mlm", "mlm_accuracy", "nsp", "nsp_accuracy"}
    assert set(model(**without(given, "nsp_targets"))) == {"mlm", "mlm_accuracy"}


def test_logits_are_computed_at_the_chosen_places_only():
    """All of them would be nearly seven times as many, and at V = 30,522 most of the memory."""
    model, given, rows = small(), batch(), []
    model.mlm_dense.register_forward_hook(lambda module, args, y: rows.append(args[0]))

    def flops(fields: dict) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**fields)
        return counter.get_total_flops()

    per_row = 2 * C * C + 2 * C * V
    few = {k: v[:2] if k.startswith("mlm") else v for k, v in given.items()}
    counts = flops(inputs(given)), flops(given), flops(few)
    assert counts[0] - counts[1] == (B * T - N) * per_row
    assert counts[1] - counts[2] == (N - 2) * per_row
    assert [x.shape for x in rows] == [(B, T, C), (N, C), (2, C)]
    assert torch.equal(rows[1], rows[0].flatten(0, 1)[given["mlm_positions"]])


@pytest.mark.parametrize("ignored", [range(1), range(2, 6), range(N)], ids=str)
def test_targets_of_minus_100_count_for_nothing(ignored):
    """As if these places had not been asked for. With none left the loss is 0, not 0 / 0."""
    model, given = small(), batch()
    some = torch.tensor([i not in ignored for i in range(N)])
    left = {k: v[some] if k.startswith("mlm") else v for k, v in given.items()}
    given["mlm_targets"][~some] = -100
    got, want = model(**given), model(**left)
    torch.testing.assert_close(got["mlm"], want["mlm"], rtol=1e-6, atol=0)
    assert got["mlm_accuracy"] == want["mlm_accuracy"]
    found = gradients(model, got["mlm"] + got["nsp"])
    assert_near(found, gradients(model, want["mlm"] + want["nsp"]), 1e-6)
    if not some.any():
        assert got["mlm"] == 0 and got["mlm_accuracy"] == 0
        given["nsp_targets"][:] = -100
        nothing = model(**given)
        assert nothing["nsp"] == 0 and nothing["nsp_accuracy"] == 0
        found = gradients(model, nothing["mlm"] + nothing["nsp"])
        assert all((g == 0).all() for g in found.values())


def test_targets_teach_nothing_at_other_places():
    """The gradient enters the encoder at the chosen places alone, and NSP's at the first."""
    model, given = small(), batch()
    kept = []
    model.norm.register_forward_hook(lambda module, args, y: kept.append(y))
    losses = model(**given)
    for loss, places in (("mlm", given["mlm_positions"]), ("nsp", torch.arange(B) * T)):
        (gradient,) = torch.autograd.grad(losses[loss], kept, retain_graph=True)
        taught = (gradient.flatten(0, 1) != 0).any(-1).nonzero()[:, 0]
        assert torch.equal(taught, places)


def test_class_0_counts_like_class_1():
    """An ignore_index of 0 once dropped the pairs that do follow each other: half of the data."""
    model, given = small(), batch()
    logits = model(**inputs(given))[1]
    for row in range(B):
        for label in (0, 1):
            targets = torch.full((B,), -100)
            targets[row] = label
            losses = model(**{**given, "nsp_targets": targets})
            want = logits[row].logsumexp(0) - logits[row, label]
            torch.testing.assert_close(losses["nsp"], want)
            assert losses["nsp_accuracy"] == int(logits[row, label] > logits[row, 1 - label])
            found = torch.autograd.grad(losses["nsp"], model.nsp_head.bias)[0]
            wanted = logits[row].softmax(0) - F.one_hot(torch.tensor(label), 2)
            torch.testing.assert_close(found, wanted)


def test_accuracies_are_counts_of_right_answers():
    model, rows = small(), 11
    tokens = torch.randint(V, (rows, T))
    margins = model(tokens)[1].detach().diff()[:, 0].sort().values
    model.nsp_head.bias.data[1] -= (margins[4] + margins[5]) / 2  # 5 rows say 0 and 6 say 1
    mlm, nsp = model(tokens)
    positions = torch.randperm(rows * T)[:41]
    best = mlm.flatten(0, 1)[positions].argmax(-1)
    targets = torch.where(torch.arange(41) < 17, best, other(best))
    targets[::4] = -100  # 5 of the 17
    answers = nsp.argmax(-1)
    assert answers.sum() == 6
    follows = torch.where(torch.arange(rows) < 7, answers, 1 - answers)
    follows[2::5] = -100  # the third row, and of the wrong ones another
    sums = model(tokens, mlm_positions=positions, mlm_targets=targets, nsp_targets=follows)
    assert sums["mlm_accuracy"] == 12 and sums["nsp_accuracy"] == 6
    assert not sums["mlm_accuracy"].requires_grad and not sums["nsp_accuracy"].requires_grad


@pytest.mark.parametrize("pre_ln", [True, False])
@pytest.mark.parametrize("nsp", [True, False], ids=["nsp", "mlm alone"])
def test_every_parameter_gets_a_gradient(nsp, pre_ln):
    """One that gets none would let DistributedDataParallel wait for it for ever. `gradients` raises
    if a parameter is not part of the loss."""
    model, given = small(nsp=nsp, pre_ln=pre_ln), batch()
    if not nsp:
        given = without(given, "nsp_targets", "segments")
        assert not [name for name, _ in model.named_parameters() if name.startswith(("nsp", "poo"))]
        assert not hasattr(model, "pooler") and not hasattr(model, "nsp_head")
    losses = model(**given)
    found = gradients(model, losses["mlm"] + losses.get("nsp", 0.0))
    for name, g in found.items():
        if not name.endswith("k.bias"):  # without effect
            assert g.abs().max() > 1e-6, name
    assert found["segment_embedding.weight"].any(-1).tolist() == [True, nsp]
    seen = found["position_embedding.weight"].any(-1)
    assert seen[:T].all() and not seen[T:].any()


# ---- training ------------------------------------------------------------------------------------


def test_dropout_is_in_embeddings_branches_and_attention():
    plain, dropped, forgetful = (
        small(**changes).train() for changes in ({}, {"dropout": 0.5}, {"attention_dropout": 0.5})
    )
    given, zeros = inputs(batch()), []
    assert torch.equal(plain.features(**given), plain.eval().features(**given))
    for model in (dropped, forgetful):
        model.dropout.register_forward_hook(lambda module, args, y: zeros.append((y == 0).float()))
        assert not torch.equal(model.features(**given), model.features(**given))
        model.eval()
        assert torch.equal(model.features(**given), model.features(**given))
    assert zeros[0].mean().item() == pytest.approx(0.5, abs=0.08)
    assert not any(z.any() for z in zeros[2:])
    assert all(block.attention.dropout == 0 for block in dropped.blocks)
    assert all(block.dropout.p == 0.5 for block in dropped.blocks)
    default = BERTConfig()
    assert default.dropout == default.attention_dropout == 0.1  # appendix A.2


@pytest.mark.parametrize("pre_ln", [True, False])
def test_bf16_on_a_cpu_stays_near_float32(pre_ln):
    model, given = small(pre_ln=pre_ln), batch()
    exact = model(**given)
    want = gradients(model, exact["mlm"] + exact["nsp"])
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(**given)
    for name in ("mlm", "nsp"):
        assert losses[name].dtype == torch.float32
        assert 0 < abs(losses[name] - exact[name]) < 0.03 * exact[name]
    got = gradients(model, losses["mlm"] + losses["nsp"])
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in got.values())
    flat = [torch.cat([g.flatten() for g in gs.values()]) for gs in (got, want)]
    assert 0 < (flat[0] - flat[1]).norm() < 0.15 * flat[1].norm()


@pytest.mark.slow
@pytest.mark.parametrize("pre_ln", [True, False])
def test_it_learns_a_batch_by_heart(pre_ln):
    """With plain AdamW, from the weights that a model begins with. Each row shares its first part
    with a neighbour whose label is the other one: NSP has to read the second."""
    config = {**vars(SMALL), "n_layer": 2, "pre_ln": pre_ln}
    model = BERT(BERTConfig(**config))
    rows, places, masked = 8, torch.tensor([3, 8]), 36
    tokens = torch.randint(V - 1, (rows, T))
    tokens[1::2, :6] = tokens[::2, :6]
    at = (torch.arange(rows)[:, None] * T + places).flatten()
    targets = tokens.flatten()[at]
    tokens[:, places] = masked
    given = {
        "tokens": tokens,
        "segments": (torch.arange(T) > 5).long().expand(rows, T),
        "mlm_positions": at,
        "mlm_targets": targets,
        "nsp_targets": torch.arange(rows) % 2,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(180):
        losses = model(**given)
        (losses["mlm"] / len(at) + losses["nsp"] / rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    sums = model.eval()(**given)
    assert sums["mlm_accuracy"] == len(at) and sums["nsp_accuracy"] == rows
    assert sums["mlm"] / len(at) < 0.1 and sums["nsp"] / rows < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("pre_ln", [True, False])
def test_gpu_gives_what_the_processor_gives(pre_ln):
    model, given = small(pre_ln=pre_ln), batch()
    want = model(**given)
    wanted = gradients(model, want["mlm"] + want["nsp"])
    model, given = model.cuda(), {name: value.cuda() for name, value in given.items()}
    got = model(**given)
    for name, value in want.items():
        torch.testing.assert_close(got[name].cpu(), value, rtol=1e-4, atol=0)
    found = gradients(model, got["mlm"] + got["nsp"])
    assert_near({name: g.cpu() for name, g in found.items()}, wanted, 1e-4)
