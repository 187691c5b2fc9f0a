"""Hugging Face's checkpoints in and out: the same function, with all accounted for."""

import json
import logging
import math

import pytest
import torch
from conftest import peer
from converting import (
    AUTO,
    OURS,
    SIZES,
    TASK,
    THEIR_NAMES,
    B,
    C,
    L,
    T,
    V,
    assert_same_function,
    batch,
    foreign,
    imported,
    must_end,
    noisy,
    put_tensors,
    random_theirs,
    save_ours,
    save_theirs,
    tensors_of,
)

import convert
from bert import BERT, BERTConfig
from data.tokens import END_OF_TEXT
from decoding import beam_search, generate, generate_targets
from engine.hub.exporting import export_model
from engine.hub.importing import import_model
from engine.hub.mapping import our_config, rows, their_settings, to_ours, to_theirs
from model import GPTConfig
from seq2seq import Seq2SeqConfig
from tasks.translation import make_advance

# ---- the same function ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_an_imported_model_is_the_same_function(name, dtype, tmp_path, tokenizers):
    theirs = random_theirs(name)
    save_theirs(theirs, tmp_path / "there", tokenizers[name], TASK[name])
    ours, checkpoint, lines = imported(tmp_path / "there")
    assert checkpoint["model_config"] == {**vars(OURS[name][1])}
    count = sum(p.numel() for p in ours.parameters())
    assert f"{count:,} parameters, float32" in lines[0] and f"n_layer={L}" in lines[1]
    assert_same_function(TASK[name], ours, theirs, dtype)


@pytest.fixture
def warnings_of_theirs(caplog):
    """What transformers says while it loads; its own handler would swallow it."""
    said = peer("transformers").utils.logging
    said.enable_propagation()
    said.set_verbosity_info()
    with caplog.at_level(logging.WARNING, logger="transformers"):
        yield lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    said.set_verbosity_warning()
    said.disable_propagation()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_an_exported_model_is_the_same_function(
    name, dtype, tmp_path, tokenizers, warnings_of_theirs
):
    transformers, path = peer("transformers"), tmp_path / "best.pt"
    ours = save_ours(name, path, tokenizers[name])
    convert.main(["export", str(path), "--to", str(tmp_path / "there")])
    Auto = getattr(transformers, AUTO[name])
    theirs, report = Auto.from_pretrained(tmp_path / "there", output_loading_info=True)
    assert all(not found for found in report.values()), report
    assert warnings_of_theirs() == []
    if name == "seq2seq":  # their padding is the end token, whose embedding they would not train
        theirs.model.shared.padding_idx = None
    assert_same_function(TASK[name], ours, theirs, dtype)


@pytest.mark.parametrize("name", OURS)
def test_out_and_in_again_changes_no_bit(name, tmp_path, tokenizers):
    ours = save_ours(name, tmp_path / "best.pt", tokenizers[name])
    export_model(tmp_path / "best.pt", tmp_path / "there")
    copy, checkpoint, _ = imported(tmp_path / "there")
    assert copy.state_dict().keys() == ours.state_dict().keys()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, copy.state_dict()[key]), key
    assert checkpoint["model_config"] == vars(ours.config)
    assert checkpoint["tokenizer"] == foreign(tokenizers[name]).to_json()


def test_greedy_gpt_writes_the_same_tokens(tmp_path, tokenizers):
    theirs = random_theirs("gpt")
    ours, _, _ = imported(save_theirs(theirs, tmp_path / "there", tokenizers["gpt"], "gpt"))
    prompts = torch.randint(V, (B, 4))
    want = theirs.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=9,
        eos_token_id=None,
        pad_token_id=0,
    )
    steps = generate(ours, prompts.tolist(), lambda logits, _: logits.argmax(-1), 9)
    assert torch.tensor(list(steps)).T.tolist() == want[:, 4:].tolist()


@pytest.mark.parametrize("beam", [1, 4])
def test_marian_writes_the_same_tokens(beam, tmp_path, tokenizers):
    theirs, end = random_theirs("seq2seq"), tokenizers["seq2seq"].special_tokens[END_OF_TEXT]
    with torch.no_grad():
        theirs.model.shared.weight[end] *= 1.5  # some sentences end early
    ours, _, _ = imported(save_theirs(theirs, tmp_path / "there", tokenizers["seq2seq"], "seq2seq"))
    given = batch("seq2seq")
    source, keep = given["source"], given["source_keep"]
    want = theirs.generate(
        source,
        attention_mask=keep.long(),
        do_sample=False,
        num_beams=beam,
        length_penalty=0.0,
        early_stopping="never",
        max_new_tokens=T,
        forced_eos_token_id=None,
        logits_processor=[must_end(end, T)],
    )
    limits, ends = [T - 1] * B, {"start": end, "end": end, "device": source.device}
    with torch.no_grad():
        advance = make_advance(ours, source, keep, T, V)
        if beam == 1:
            got = generate_targets(advance, limits, lambda logits, _: logits.argmax(-1), **ends)
        else:
            got = [t for _, t in beam_search(advance, limits, beam=beam, alpha=0.0, **ends)]

    def cut(row: list[int]) -> list[int]:
        return row[: row.index(end)] if end in row else row

    padded = [[i for i in row[1:] if i != V - 1] for row in want.tolist()]
    assert got == [cut(row) for row in padded]


# ---- files that lack something, or have it twice -------------------------------------------------


@pytest.mark.parametrize("pooler", [True, False])
def test_an_encoder_without_heads_keeps_its_features(pooler, tmp_path, tokenizers):
    """MiniLM and its kind: no prefix in the names, no heads, often no pooler."""
    transformers = peer("transformers")
    config = random_theirs("bert").config
    theirs = noisy(transformers.BertModel(config, add_pooling_layer=pooler))
    save_theirs(theirs, tmp_path / "there", tokenizers["bert"], "bert")
    ours, checkpoint, lines = imported(tmp_path / "there")
    given = batch("bert")
    named = {THEIR_NAMES["bert"][k]: v.long() for k, v in given.items()}
    features = ours.features(**given)
    want = theirs(**named)
    torch.testing.assert_close(features, want.last_hidden_state, atol=1e-5, rtol=1e-5)
    printed = "\n".join(lines[2:])
    assert "freshly initialised: mlm_bias, mlm_dense.weight" in printed
    assert ("nsp_head" in printed) == pooler and ("pooler" in printed) != pooler
    assert checkpoint["model_config"]["nsp"] == pooler
    assert not ours.mlm_bias.any() and (ours.mlm_norm.weight == 1).all()
    assert 0.01 < ours.mlm_dense.weight.std() < 0.02
    if pooler:
        torch.testing.assert_close(ours.pooled(features), want.pooler_output, atol=1e-5, rtol=1e-5)


def test_gpt2_without_head_and_prefix(tmp_path, tokenizers):
    theirs = random_theirs("gpt")
    save_theirs(theirs.transformer, tmp_path / "there", tokenizers["gpt"], "gpt")
    assert_same_function("gpt", imported(tmp_path / "there")[0], theirs, torch.float32)


def sinusoids_of_theirs(config) -> torch.Tensor:
    angles = torch.arange(T, dtype=torch.float64)[:, None]
    angles = angles / 10000 ** (torch.arange(0, C, 2, dtype=torch.float64) / C)
    return torch.cat([angles.sin(), angles.cos()], 1).float()


# Tensors that old files have beside the rest, from those.
DERIVED = {
    "gpt": {
        "lm_head.weight": lambda t: t["transformer.wte.weight"],
        "transformer.h.1.attn.bias": lambda t: torch.ones(1, 1, T, T).tril().bool(),
        "transformer.h.2.attn.masked_bias": lambda t: torch.tensor(-1e4),
    },
    "bert": {
        "bert.embeddings.position_ids": lambda t: torch.arange(T)[None],
        "cls.predictions.decoder.weight": lambda t: t["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": lambda t: t["cls.predictions.bias"],
    },
    "seq2seq": {
        "lm_head.weight": lambda t: t["model.shared.weight"],
        "model.encoder.embed_tokens.weight": lambda t: t["model.shared.weight"],
        "model.decoder.embed_tokens.weight": lambda t: t["model.shared.weight"],
        "model.encoder.embed_positions.weight": sinusoids_of_theirs,
        "model.decoder.embed_positions.weight": sinusoids_of_theirs,
        "final_logits_bias": lambda t: torch.zeros(1, V),
    },
}


@pytest.mark.parametrize("name,derived", [(n, d) for n in DERIVED for d in DERIVED[n]])
def test_what_is_derived_may_be_there_and_must_be_right(name, derived, tmp_path, tokenizers):
    theirs, folder = random_theirs(name), tmp_path / "there"
    save_theirs(theirs, folder, tokenizers[name], name)
    tensors = tensors_of(folder)
    tensors = tensors | {derived: DERIVED[name][derived](tensors)}
    put_tensors(folder, tensors)
    state = imported(folder)[1]["model"]
    wanted = to_ours(name, OURS[name][1], *described(tensors))[1]
    assert all(torch.equal(state[n], wanted[n]) for n in wanted)
    wrong = tensors[derived].clone()
    wrong.view(-1)[-1] = 1 - wrong.view(-1)[-1].float()
    more = [] if derived == "final_logits_bias" else [wrong]  # which may have any numbers
    for changed in (*more, wrong[None], torch.zeros(3)):
        put_tensors(folder, {**tensors, derived: changed})
        with pytest.raises(ValueError, match=rf"wrong: {derived} is not "):
            import_model(str(folder))


def described(tensors: dict[str, torch.Tensor]):
    return {n: tuple(t.shape) for n, t in tensors.items()}, tensors.__getitem__


def test_norms_of_the_oldest_bert_files_are_gamma_and_beta(tmp_path, tokenizers):
    theirs, folder = random_theirs("bert"), tmp_path / "there"
    save_theirs(theirs, folder, tokenizers["bert"], "bert")
    tensors = tensors_of(folder)
    renamed = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for n, t in tensors.items()
    }
    assert sum(n.endswith("gamma") for n in renamed) == 2 + 2 * L
    put_tensors(folder, renamed)
    assert_same_function("bert", imported(folder)[0], theirs, torch.float32)
    norm = "bert.embeddings.LayerNorm"
    put_tensors(folder, renamed | {f"{norm}.weight": tensors[f"{norm}.weight"]})
    with pytest.raises(ValueError, match=r"double: .*LayerNorm"):
        import_model(str(folder))


@pytest.mark.parametrize("name", OURS)
def test_every_missing_surplus_and_misshapen_tensor_is_listed_at_once(name):
    config = OURS[name][1]
    tensors = to_theirs(TASK[name], config, noisy(OURS[name][0](config)).state_dict())
    first, second, third, *_ = [row.theirs for row in rows(TASK[name], config)]
    tensors["classifier.weight"], tensors[third] = torch.zeros(2), torch.zeros(3, 2)
    del tensors[first], tensors[second]
    with pytest.raises(ValueError) as error:
        to_ours(TASK[name], config, *described(tensors))
    said = str(error.value)
    assert f"missing: {first}, {second};" in said
    assert "surplus: classifier.weight;" in said
    assert f"misshapen: {third} (3, 2) instead of (" in said


@pytest.mark.parametrize(
    "prefix,reason",
    [
        ("_orig_mod.", ", which torch.compile adds"),
        ("module.", ", which DistributedDataParallel adds"),
        ("net.inner.", ""),
    ],
)
@pytest.mark.parametrize("name", OURS)
def test_tensors_behind_a_prefix_are_named_as_they_stand_in_the_file(name, prefix, reason):
    """What torch.compile saved was listed as transformer._orig_mod.transformer…, which is nowhere
    in the file, and nothing said why."""
    config = OURS[name][1]
    tensors = to_theirs(TASK[name], config, OURS[name][0](config).state_dict())
    wrapped = {prefix + n: t for n, t in tensors.items()}
    first = next(iter(wrapped))
    for more in ({}, {"loss.weight": torch.zeros(2)}):
        with pytest.raises(ValueError) as error:
            to_ours(TASK[name], config, *described(wrapped | more))
        assert f" begin with {prefix!r} here ({first}){reason}: save" in str(error.value)


def test_names_without_the_familys_prefix_are_listed_without_it():
    config = OURS["masked"][1]
    tensors = to_theirs("bert", config, OURS["masked"][0](config).state_dict())
    bare = {n.removeprefix("bert."): t for n, t in tensors.items()}
    bare["head.weight"], bare["embeddings.LayerNorm.bias"] = torch.zeros(2), torch.zeros(3)
    del bare["embeddings.word_embeddings.weight"]
    with pytest.raises(ValueError) as error:
        to_ours("bert", config, *described(bare))
    said = str(error.value)
    assert "missing: embeddings.word_embeddings.weight;" in said
    assert "surplus: head.weight;" in said
    assert "misshapen: embeddings.LayerNorm.bias (3,) instead" in said


def test_half_a_head_is_an_error(tmp_path):
    config = OURS["bert"][1]
    tensors = to_theirs("bert", config, BERT(config).state_dict())
    for name in ("cls.predictions.bias", "cls.seq_relationship.bias", "bert.pooler.dense.weight"):
        rest = {n: t for n, t in tensors.items() if n != name}
        with pytest.raises(ValueError, match=f"missing: {name}$"):
            to_ours("bert", config, *described(rest))


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_settings_are_the_same_both_ways(name):
    config = OURS[name][1]
    said = their_settings(TASK[name], config)
    task, copy = our_config(json.loads(json.dumps(said)))
    config = vars(config) | ({"nsp": True} if name == "masked" else {})
    assert task == TASK[name] and vars(copy) == config


@pytest.mark.parametrize("name,Config", [("gpt", "GPT2"), ("bert", "Bert"), ("seq2seq", "Marian")])
def test_what_a_config_does_not_say_has_hugging_faces_default(name, Config):
    theirs = getattr(peer("transformers"), f"{Config}Config")().to_dict()
    needed = {"scale_embedding": True} if name == "seq2seq" else {}
    said = {"model_type": theirs["model_type"], **needed}
    assert our_config(said) == our_config({**theirs, **needed})


@pytest.mark.parametrize("name", OURS)
def test_a_config_without_model_type_is_known_by_its_class(name):
    said = their_settings(TASK[name], OURS[name][1])
    want = our_config(said)
    del said["model_type"]
    assert our_config(said) == want
    del said["architectures"]
    if name == "seq2seq":
        with pytest.raises(ValueError, match=r'no model_type: add it, .*"marian"'):
            our_config(said)
    else:
        assert our_config(said) == want


def test_berts_own_config_of_2018_is_read():
    """As bert_config.json of Google's files has it, and SciBERT's."""
    said = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1}
    said |= {"hidden_size": 28, "initializer_range": 0.02, "intermediate_size": 44}
    said |= {"max_position_embeddings": 13, "num_attention_heads": 4, "num_hidden_layers": 3}
    said |= {"type_vocab_size": 2, "vocab_size": 307}
    task, config = our_config(said)
    assert task == "bert" and config == BERTConfig(*SIZES)


@pytest.mark.parametrize("said", [{}, {"architectures": ["T5Model"]}, {"architectures": 3}])
def test_a_config_of_no_known_family_is_told_what_to_add(said):
    with pytest.raises(ValueError, match='no model_type: add it, for example "model_type": "gpt2"'):
        our_config(said)


WRONG = [
    ("gpt", {"activation_function": "gelu"}),
    ("gpt", {"activation_function": "relu"}),
    ("gpt", {"scale_attn_weights": False}),
    ("gpt", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt", {"reorder_and_upcast_attn": True}),
    ("gpt", {"add_cross_attention": True}),
    ("gpt", {"tie_word_embeddings": False}),
    ("gpt", {"attn_pdrop": 0.5}),
    ("gpt", {"n_ctx": 12}),
    ("gpt", {"n_layer": 0}),
    ("gpt", {"n_embd": -28}),
    ("gpt", {"n_embd": 10**9}),
    ("gpt", {"n_positions": 10**12}),
    ("gpt", {"vocab_size": True}),
    ("gpt", {"vocab_size": "307"}),
    ("gpt", {"vocab_size": 307.0}),
    ("gpt", {"n_layer": 10**6}),
    ("gpt", {"n_head": 10**6}),
    ("gpt", {"n_inner": 10**12}),
    ("gpt", {"layer_norm_epsilon": 0}),
    ("gpt", {"layer_norm_epsilon": math.nan}),
    ("gpt", {"layer_norm_epsilon": "1e-5"}),
    ("gpt", {"embd_pdrop": 1.5, "attn_pdrop": 1.5, "resid_pdrop": 1.5}),
    ("gpt", {"model_type": "gpt_neox"}),
    ("gpt", {"model_type": ["gpt2"]}),
    ("bert", {"hidden_act": "gelu_new"}),
    ("bert", {"type_vocab_size": 1}),
    ("bert", {"position_embedding_type": "relative_key"}),
    ("bert", {"is_decoder": True}),
    ("bert", {"add_cross_attention": True}),
    ("bert", {"tie_word_embeddings": False}),
    ("bert", {"intermediate_size": 0}),
    ("seq2seq", {"activation_function": "gelu_new"}),
    ("seq2seq", {"activation_function": ["relu"]}),
    ("seq2seq", {"activation_dropout": 0.1}),
    ("seq2seq", {"encoder_layerdrop": 0.1}),
    ("seq2seq", {"decoder_layerdrop": 0.1}),
    ("seq2seq", {"scale_embedding": False}),
    ("seq2seq", {"normalize_before": True}),
    ("seq2seq", {"normalize_embedding": True}),
    ("seq2seq", {"add_final_layer_norm": True}),
    ("seq2seq", {"static_position_embeddings": False}),
    ("seq2seq", {"share_encoder_decoder_embeddings": False}),
    ("seq2seq", {"tie_word_embeddings": False}),
    ("seq2seq", {"is_encoder_decoder": False}),
    ("seq2seq", {"decoder_layers": L + 1}),
    ("seq2seq", {"decoder_ffn_dim": 45}),
    ("seq2seq", {"decoder_attention_heads": 7}),
    ("seq2seq", {"decoder_vocab_size": V + 1}),
]


@pytest.mark.parametrize("name,change", WRONG, ids=str)
def test_a_setting_that_is_not_ours_is_named(name, change):
    said = {**their_settings(name, OURS[name][1]), **change}
    with pytest.raises(ValueError, match=next(iter(change))):
        our_config(said)


def test_a_model_that_they_do_not_have_is_not_exported(tmp_path, tokenizers):
    for Config, task in ((GPTConfig, "gpt"), (BERTConfig, "bert"), (Seq2SeqConfig, "seq2seq")):
        for changes in ({"bias": False}, {"pre_ln": task == "bert"}, {"ln_eps": 1e-6}):
            name = next(iter(changes))
            if name == ("pre_ln" if task == "seq2seq" else "ln_eps"):
                continue
            with pytest.raises(ValueError, match=rf"Hugging Face has no .*{name}="):
                their_settings(task, Config(*SIZES, **changes))
