"""Hugging Face's checkpoints in and out: the same function, the same ids, and no trust in files."""

import json
import logging
import math
import shutil
import struct
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import gpt2_files, peer
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint as checkpoints
import convert
import sample
import tokenizer_files
import train
from bert import BERT, BERTConfig
from bpe import GPT2_PATTERN, PATTERNS, Tokenizer, byte_characters
from config import CONFIGS
from data.masked import SPECIAL
from data.tokens import END_OF_TEXT
from decoding import beam_search, write
from families import our_config, rows, their_settings, to_ours, to_theirs
from fill import encode_prompt, framed
from model import GPT, GPTConfig
from seq2seq import Seq2Seq, Seq2SeqConfig
from tokenizer_files import from_tokenizer_json, read_tokenizer, tokenizer_json
from translate import make_advance

# Sizes that are all different, so that swapped axes show; V is more than the tokenizers have.
V, T, L, H, C, N_FF, B = 307, 13, 3, 4, 28, 44, 5
SIZES = (V, T, L, H, C, N_FF)
OURS = {
    "gpt": (GPT, GPTConfig(*SIZES)),
    "bert": (BERT, BERTConfig(*SIZES)),
    "masked": (BERT, BERTConfig(*SIZES, nsp=False)),
    "seq2seq": (Seq2Seq, Seq2SeqConfig(*SIZES)),
}
TASK = {**{name: name for name in OURS}, "masked": "bert"}
AUTO = {
    "gpt": "AutoModelForCausalLM",
    "bert": "BertForPreTraining",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "MarianMTModel",
}
TEXT = [
    "the cat sat on the mat, and the dog didn't; they'll've seen 12345 things",
    "  def f(x):\n\n    return x ** 2   \n",
    "naïve café 東京 \U0001f600\U0001f468‍\U0001f469 ½ ٣\u00a0\u2028\x1c end\r\n\r\n ",
    "",
    " ",
    "\n \n\t",
    "a",
]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    """One for each task, as training would make it, and GPT-4's and the characters' patterns."""
    made = {
        name: Tokenizer.train(TEXT * 3, 300, PATTERNS[name], (END_OF_TEXT, "<|a|>", "<|a|>b"))
        for name in PATTERNS
    }
    made["gpt"], made["seq2seq"] = made["gpt2"], Tokenizer.train(TEXT * 3, 299)
    made["bert"] = made["masked"] = Tokenizer.train(TEXT * 3, 301, special_tokens=SPECIAL)
    return made


def noisy(model: nn.Module) -> nn.Module:
    """Every parameter random, norms and biases too: an initialised model hides swapped ones."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            nn.init.normal_(parameter, mean=float(is_norm), std=0.2)
    return model.eval()


def random_theirs(name: str, **changes) -> nn.Module:
    transformers = peer("transformers")
    ids = {"eos_token_id": 0, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    ids |= {"pad_token_id": V - 1}
    common = ids if name == "seq2seq" else {"pad_token_id": None, "eos_token_id": None}
    said = {**their_settings(TASK[name], OURS[name][1]), **common, **changes}
    Config = {"gpt": "GPT2Config", "seq2seq": "MarianConfig"}.get(name, "BertConfig")
    config = getattr(transformers, Config).from_dict(said)
    return noisy(getattr(transformers, said["architectures"][0])(config))


def save_theirs(theirs: nn.Module, folder: Path, tokenizer: Tokenizer, task: str, **how) -> Path:
    theirs.save_pretrained(folder, **how)
    content = json.dumps(tokenizer_json(tokenizer, task))
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    return folder


def imported(folder: Path) -> tuple[nn.Module, dict, list[str]]:
    checkpoint, lines = convert.import_model(str(folder))
    model, _ = checkpoints.restore(folder, checkpoint)
    return model.eval(), checkpoint, lines


def save_ours(name: str, path: Path, tokenizer: Tokenizer, **state) -> nn.Module:
    Model, config = OURS[name]
    model, task = noisy(Model(config)), TASK[name]
    state = {"optimizer": {}, "step": 7, "best": 1.25, "skipped": 0, **state}
    kept = CONFIGS[task](model=task, data="some/where/text.txt", lr=0.125)
    checkpoints.save(
        path, checkpoints.pack(task, model, tokenizer, train_config=kept, data="", **state)
    )
    return model


def batch(task: str) -> dict[str, torch.Tensor]:
    """By our names. The last ids are left out: Marian's padding gets no gradient there."""
    tokens = torch.randint(V - 8, (B, T))
    keep = torch.arange(T) < torch.tensor([T, 6, 9, 4, 11])[:, None]
    if task == "gpt":
        return {"tokens": tokens}
    if task == "bert":
        return {"tokens": tokens, "segments": torch.randint(2, (B, T)), "keep": keep}
    source = torch.randint(V - 8, (B, T - 2))
    return {"source": source, "tokens": tokens, "source_keep": keep[:, : T - 2]}


THEIR_NAMES = {
    "gpt": {"tokens": "input_ids"},
    "bert": {"tokens": "input_ids", "segments": "token_type_ids", "keep": "attention_mask"},
    "seq2seq": {
        "source": "input_ids",
        "tokens": "decoder_input_ids",
        "source_keep": "attention_mask",
    },
}


def both_logits(task: str, ours: nn.Module, theirs: nn.Module):
    """[(ours, theirs), …]: of the tokens, and of BERT's second head if it is there."""
    given = batch(task)
    named = {THEIR_NAMES[task][k]: v.long() for k, v in given.items()}
    got, want = ours(**given), theirs(**named)
    if task != "bert":
        return [(got, want.logits)]
    if got[1] is None:
        return [(got[0], want.logits)]
    return [(got[0], want.prediction_logits), (got[1], want.seq_relationship_logits)]


def assert_same_function(task: str, ours: nn.Module, theirs: nn.Module, dtype: torch.dtype):
    """Logits, the divergence of the distributions, and every gradient."""
    near = 1e-5 if dtype == torch.float32 else 1e-10
    ours, theirs = ours.to(dtype).eval(), theirs.to(dtype).eval()
    pairs = both_logits(task, ours, theirs)
    losses = [0, 0]
    for got, want in pairs:
        torch.testing.assert_close(got, want, atol=near, rtol=near)
        p, q = (x.detach().double().log_softmax(-1) for x in (want, got))
        assert (p.exp() * (p - q)).sum(-1).max() < 1e-10
        targets = torch.randint(got.size(-1), got.shape[:-1]).flatten()
        for i, x in enumerate((got, want)):
            losses[i] = losses[i] + F.cross_entropy(x.view(-1, x.size(-1)), targets)
    for loss in losses:
        loss.backward()
    # Marian's table of positions is a parameter there that no gradient reaches.
    found = {n: p.grad for n, p in theirs.named_parameters() if "embed_positions" not in n}
    shapes = {n: tuple(g.shape) for n, g in found.items()}
    _, wanted, absent = to_ours(task, ours.config, shapes, found.__getitem__)
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    assert gradients.keys() == wanted.keys() and not absent
    scale = max(g.abs().max().item() for g in wanted.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient / scale, wanted[name] / scale, atol=near, rtol=0, msg=name
        )


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
    convert.export_model(tmp_path / "best.pt", tmp_path / "there")
    again, checkpoint, _ = imported(tmp_path / "there")
    assert again.state_dict().keys() == ours.state_dict().keys()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    assert checkpoint["model_config"] == vars(ours.config)
    assert checkpoint["tokenizer"] == tokenizers[name].to_json()


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
    steps = sample.generate(ours, prompts.tolist(), lambda logits, _: logits.argmax(-1), 9)
    assert torch.tensor(list(steps)).T.tolist() == want[:, 4:].tolist()


@pytest.mark.parametrize("beam", [1, 4])
def test_marian_writes_the_same_tokens(beam, tmp_path, tokenizers):
    theirs = random_theirs("seq2seq")
    with torch.no_grad():
        theirs.model.shared.weight[0] *= 1.5  # some sentences end early
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
        max_new_tokens=T - 1,
        forced_eos_token_id=None,
    )
    limits, ends = [T - 1] * B, {"start": 0, "end": 0, "device": source.device}
    with torch.no_grad():
        advance = make_advance(ours, source, keep, T, V)
        if beam == 1:
            got = write(advance, limits, lambda logits, _: logits.argmax(-1), **ends)
        else:
            got = [t for _, t in beam_search(advance, limits, beam=beam, alpha=0.0, **ends)]

    def cut(row: list[int]) -> list[int]:
        return row[: row.index(0)] if 0 in row else row

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
    told = "\n".join(lines[2:])
    assert "freshly initialised: mlm_bias, mlm_dense.weight" in told
    assert ("nsp_head" in told) == pooler and ("pooler" in told) != pooler
    assert checkpoint["model_config"]["nsp"] == pooler
    assert not ours.mlm_bias.any() and (ours.mlm_norm.weight == 1).all()
    assert 0.01 < ours.mlm_dense.weight.std() < 0.02
    if pooler:
        torch.testing.assert_close(ours.pooled(features), want.pooler_output, atol=1e-5, rtol=1e-5)


def test_gpt2_without_head_and_prefix(tmp_path, tokenizers):
    theirs = random_theirs("gpt")
    save_theirs(theirs.transformer, tmp_path / "there", tokenizers["gpt"], "gpt")
    assert_same_function("gpt", imported(tmp_path / "there")[0], theirs, torch.float32)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return peer("safetensors.torch").load_file(folder / "model.safetensors")


def put_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    peer("safetensors.torch").save_file(tensors, folder / "model.safetensors")


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
    for changed in (wrong, wrong[None], torch.zeros(3)):
        put_tensors(folder, {**tensors, derived: changed})
        with pytest.raises(ValueError, match=rf"wrong: {derived} is not "):
            convert.import_model(str(folder))


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
        convert.import_model(str(folder))


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
    task, again = our_config(json.loads(json.dumps(said)))
    config = vars(config) | ({"nsp": True} if name == "masked" else {})
    assert task == TASK[name] and vars(again) == config


@pytest.mark.parametrize("name,Config", [("gpt", "GPT2"), ("bert", "Bert"), ("seq2seq", "Marian")])
def test_what_a_config_does_not_say_has_hugging_faces_default(name, Config):
    theirs = getattr(peer("transformers"), f"{Config}Config")().to_dict()
    needed = {"scale_embedding": True, "activation_function": "relu"} if name == "seq2seq" else {}
    said = {"model_type": theirs["model_type"], **needed}
    assert our_config(said) == our_config({**theirs, **needed})


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
    ("seq2seq", {"activation_function": "swish"}),
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


# ---- tokenizers ----------------------------------------------------------------------------------


def exported_tokenizer(tokenizer: Tokenizer, task: str, folder: Path, **config):
    """What AutoTokenizer makes of our files."""
    folder.mkdir()
    content = json.dumps(tokenizer_json(tokenizer, task))
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    said = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    said = their_settings(task, OURS[task][1])
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    return peer("transformers").AutoTokenizer.from_pretrained(folder)


def our_ids(tokenizer: Tokenizer, task: str, text: str) -> list[int]:
    """As sample.py, fill.py and translate.py read a text."""
    if task == "gpt":
        return tokenizer.encode(text, allowed_special="all")
    if task == "seq2seq":
        return [*tokenizer.encode(text.strip()), tokenizer.special_tokens[END_OF_TEXT]]
    model = BERT(BERTConfig(V, 10_000, 1, 1, 2, 2))
    text = " ".join(text.split())
    ids = tokenizer.encode(f" {text}") if text else []
    return framed(model, tokenizer, [ids])[0].tolist()


# Oniguruma, the regex module and str.isspace may know characters of different years.
KNOWN = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=40)
PIECES = (
    *(" ", "  ", "\n", "\r\n", "\t", "\x1c", "\x85", "\u00a0", "\u2003", "\u200b", "\ufeff"),
    *("'s", "'S", "'ll", "'LL", "'\u017f", "the", "ß", "İ", "é", "e\u0301", "K", "東京"),
    *("123", "4567", "٣٤", "½", "!?", "_", "\U0001f600", "<|a|>", "<|a|>b", "<|", END_OF_TEXT),
)
TEXTS = st.one_of(KNOWN, st.lists(st.sampled_from(PIECES), max_size=14).map("".join))


@pytest.mark.parametrize("name", ["gpt2", "gpt4", "char", "bert", "seq2seq"])
def test_auto_tokenizer_gives_the_same_ids(name, tmp_path, tokenizers):
    tokenizer, task = tokenizers[name], name if name in TASK else "gpt"
    theirs = exported_tokenizer(tokenizer, task, tmp_path / "there")

    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def check(text):
        if task != "gpt":  # they find special tokens in every text, ours only where it asks
            for special in tokenizer.special_tokens:
                text = text.replace(special, "")
        assert theirs(text)["input_ids"] == our_ids(tokenizer, task, text)

    check()
    for text in [*TEXT, "".join(TEXT), "".join(TEXT) * 40]:
        ids = theirs(text)["input_ids"]
        assert ids == our_ids(tokenizer, task, text)
        if task == "gpt":
            assert theirs.decode(ids) == text
    if task == "bert":
        for text in (
            "the [MASK] sat",
            "[MASK] sat.",
            "  the [MASK]",
            "a [MASK] [MASK]  b",
            "[MASK]",
        ):
            ids = framed(
                BERT(BERTConfig(V, T, 1, 1, 2, 2)), tokenizer, [encode_prompt(tokenizer, text)]
            )
            assert theirs(text)["input_ids"] == ids[0].tolist()
        pair = theirs("the cat", "the mat", return_token_type_ids=True)
        first, second = (our_ids(tokenizer, task, text) for text in ("the cat", "the mat"))
        assert pair["input_ids"] == first + second[1:]
        assert pair["token_type_ids"] == [0] * len(first) + [1] * (len(second) - 1)


@pytest.mark.parametrize("name", ["gpt2", "gpt4", "char", "bert", "seq2seq"])
def test_tokenizer_json_out_and_in_again(name, tmp_path, tokenizers):
    task = name if name in TASK else "gpt"
    state = json.loads(json.dumps(tokenizer_json(tokenizers[name], task)))
    path = tmp_path / "tokenizer.json"
    assert from_tokenizer_json(state, path, task).to_json() == tokenizers[name].to_json()
    state["model"]["merges"] = [" ".join(pair) for pair in state["model"]["merges"]]  # of old
    assert from_tokenizer_json(state, path, task).to_json() == tokenizers[name].to_json()


def test_gpt2s_own_tokenizer_in_the_files_of_the_hub(tmp_path):
    """vocab.json and merges.txt, and the tokenizer.json that tokenizers makes of them."""
    library = peer("tokenizers")
    merges, vocabulary = gpt2_files()
    want = Tokenizer.from_gpt2_files(merges, vocabulary)
    folder = tmp_path / "there"
    folder.mkdir()
    shutil.copy(vocabulary, folder / "vocab.json")
    shutil.copy(merges, folder / "merges.txt")
    assert read_tokenizer(folder, "gpt").to_json() == want.to_json()
    model = library.models.BPE.from_file(str(vocabulary), str(merges))
    theirs = library.Tokenizer(model)
    theirs.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = library.decoders.ByteLevel()
    theirs.post_processor = library.processors.ByteLevel(trim_offsets=False)
    theirs.add_special_tokens([END_OF_TEXT])
    theirs.save(str(folder / "tokenizer.json"))
    assert read_tokenizer(folder, "gpt").to_json() == want.to_json()
    ours = exported_tokenizer(want, "gpt", tmp_path / "again")
    for text in TEXT:
        assert ours(text)["input_ids"] == want.encode(text) == theirs.encode(text).ids


def test_the_exported_tokenizer_feeds_the_exported_model(tmp_path, tokenizers):
    """GPT-2 would add the embedding of token 0 everywhere if it were given token types."""
    transformers = peer("transformers")
    for name in ("gpt", "bert", "seq2seq"):
        folder = tmp_path / name
        ours = save_ours(name, tmp_path / "best.pt", tokenizers[name])
        convert.export_model(tmp_path / "best.pt", folder)
        theirs = getattr(transformers, AUTO[name]).from_pretrained(folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.model_max_length == T
        given = tokenizer(["the mat", "a"], return_tensors="pt", padding=True)
        assert ("token_type_ids" in given) == (name == "bert")
        ids, keep = given["input_ids"], given["attention_mask"].bool()
        if name == "gpt":
            want = ours(ids)
            got = theirs(**given).logits
            torch.testing.assert_close(got[keep], want[keep], atol=1e-5, rtol=1e-5)
            with torch.no_grad():  # half of the ids that only pad become the likeliest
                theirs.transformer.wte.weight[tokenizers[name].vocab_size :] *= 100
            written = theirs.generate(**given, do_sample=True, max_new_tokens=5)
            assert written.max() < tokenizers[name].vocab_size  # never a padded id
        elif name == "bert":
            got = theirs(**given).prediction_logits
            want = ours(ids, keep=keep)[0]
            torch.testing.assert_close(got[keep], want[keep], atol=1e-5, rtol=1e-5)
        else:
            written = theirs.generate(**given, do_sample=False, num_beams=1)
            end = tokenizers[name].special_tokens[END_OF_TEXT]
            assert written[:, 0].tolist() == [end, end]
            assert written.max() < tokenizers[name].vocab_size


def changed(state: dict, *path_and_value) -> dict:
    *path, last, value = path_and_value
    state = json.loads(json.dumps(state))
    place = state
    for key in path:
        place = place[key]
    place[last] = value
    return state


TOKENIZER_CHANGES = [
    (["normalizer", {"type": "NFC"}], "normalizer"),
    (["post_processor", {"type": "Sequence", "processors": []}], "post_processor"),
    (["pre_tokenizer", None], "pre_tokenizer"),
    (["pre_tokenizer", "pretokenizers", []], "pre_tokenizer"),
    (["pre_tokenizer", "pretokenizers", 0, "behavior", "Removed"], "pre_tokenizer"),
    (["pre_tokenizer", "pretokenizers", 0, "pattern", {"Regex": r"\w+"}], "pre_tokenizer"),
    (["pre_tokenizer", "pretokenizers", 1, "add_prefix_space", True], "pre_tokenizer"),
    (["pre_tokenizer", "pretokenizers", 1, "use_regex", True], "pre_tokenizer"),
    (["model", []], "no model"),
    (["model", "dropout", 0.1], "dropout"),
    (["model", "continuing_subword_prefix", "##"], "continuing_subword_prefix"),
    (["model", "end_of_word_suffix", "</w>"], "end_of_word_suffix"),
    (["model", "type", "WordPiece"], "WordPiece tokenizer: not supported yet"),
    (["model", "type", "Unigram"], "Unigram tokenizer: not supported yet"),
    (["model", "byte_fallback", True], "not supported yet"),
    (["model", "vocab", []], "no vocab"),
    (["model", "vocab", "zz", 999], r"by \+1"),
    (["model", "vocab", "!", "0"], "is not an integer"),
    (["model", "vocab", "!", 34], "stands for 2 tokens"),
    (["model", "merges", 3, ["q", "qq"]], "merge 4"),
    (["model", "merges", 3, ["q"]], "merge 4"),
    (["model", "merges", 3, "q q q"], "merge 4"),
    (["model", "merges", 3, [1, 2]], "merge 4"),
    (["model", "merges", 3, None], "merge 4"),
    (["added_tokens", 0, "lstrip", True], "takes its surroundings"),
    (["added_tokens", 0, "single_word", True], "takes its surroundings"),
    (["added_tokens", 0, "id", 5], "has the ids"),
    (["added_tokens", 0, "content", 5], "added token"),
]


@pytest.mark.parametrize("change,message", TOKENIZER_CHANGES, ids=str)
def test_a_tokenizer_that_ours_cannot_equal_is_refused(change, message, tmp_path, tokenizers):
    state = changed(tokenizer_json(tokenizers["gpt"], "gpt"), *change)
    with pytest.raises(ValueError, match=message):
        from_tokenizer_json(state, tmp_path / "tokenizer.json", "gpt")


def test_a_merge_out_of_order_is_refused_with_its_number(tmp_path, tokenizers):
    """Ours merges by ids: another order of the same merges would be another tokenizer."""
    state = tokenizer_json(tokenizers["gpt"], "gpt")
    merges = state["model"]["merges"]
    merges[4], merges[9] = merges[9], merges[4]
    with pytest.raises(ValueError, match=r"merge 5, .* should be .* by the ids"):
        from_tokenizer_json(state, tmp_path / "tokenizer.json", "gpt")


def test_a_text_of_merges_is_refused_with_the_number(tmp_path, tokenizers):
    folder, state = tmp_path, tokenizer_json(tokenizers["seq2seq"], "gpt")
    (folder / "vocab.json").write_text(json.dumps(state["model"]["vocab"]), encoding="utf-8")
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    good = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "merges.txt").write_text(good, encoding="utf-8")
    want = tokenizer_json(read_tokenizer(folder, "gpt"), "gpt")
    assert want["model"] == state["model"]
    (folder / "merges.txt").write_text(good.replace(merges[6], "q q"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"merges\.txt: merge 7"):
        read_tokenizer(folder, "gpt")
    (folder / "merges.txt").write_text("\n".join(merges[:-3]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"merges\.txt: .*by \+3"):
        read_tokenizer(folder, "gpt")  # and no token becomes a special one
    (folder / "merges.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"merges\.txt"):
        read_tokenizer(folder, "gpt")


def test_other_tokenizers_have_one_place(tmp_path):
    for file, kind in (("vocab.txt", "WordPiece"), ("source.spm", "SentencePiece")):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / file).touch()
        with pytest.raises(ValueError, match=f"{kind} tokenizer: not supported yet"):
            read_tokenizer(folder, "bert")
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        read_tokenizer(tmp_path, "gpt")


def test_a_tokenizer_without_the_tokens_of_the_task_is_refused(tmp_path, tokenizers):
    bare = Tokenizer({bytes([i]): i for i in range(256)}, GPT2_PATTERN, {})
    content = json.dumps(tokenizer_json(bare, "gpt"))
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    for task, token in (("gpt", r"<\|endoftext\|>"), ("bert", r"\[CLS\]")):
        with pytest.raises(ValueError, match=f"has no token .*{token}"):
            read_tokenizer(tmp_path, task)
    other = Tokenizer(bare.ranks, r"\w+|\W", {})
    with pytest.raises(ValueError, match="no known wording"):
        tokenizer_json(other, "gpt")


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_other_precisions_become_float32(name, dtype, tmp_path, tokenizers):
    theirs = random_theirs(name).to(dtype)
    save_theirs(theirs, tmp_path / "there", tokenizers[name], TASK[name])
    ours, checkpoint, lines = imported(tmp_path / "there")
    assert {t.dtype for t in checkpoint["model"].values()} == {torch.float32}
    assert str(dtype).removeprefix("torch.") in lines[0]
    theirs = type(theirs).from_pretrained(tmp_path / "there", dtype=torch.float32)
    assert_same_function(TASK[name], ours, theirs, torch.float32)


def test_shards_and_bin_files_hold_the_same(tmp_path, tokenizers):
    theirs = random_theirs("gpt")
    whole = save_theirs(theirs, tmp_path / "whole", tokenizers["gpt"], "gpt")
    want = imported(whole)[1]["model"]
    parts = save_theirs(theirs, tmp_path / "parts", tokenizers["gpt"], "gpt", max_shard_size="20KB")
    assert len(list(parts.glob("model-*.safetensors"))) > 2
    pickled = tmp_path / "bin"
    shutil.copytree(whole, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(tensors_of(whole), pickled / "pytorch_model.bin")
    old = tmp_path / "old"
    shutil.copytree(pickled, old)
    torch.save(tensors_of(whole), old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    for folder in (parts, pickled, old):
        got = imported(folder)[1]["model"]
        assert got.keys() == want.keys()
        assert all(torch.equal(got[n], want[n]) for n in want), folder


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def folder(tmp_path, tokenizers) -> Path:
    """A small GPT-2 as the hub has it, to be damaged."""
    return save_theirs(random_theirs("gpt"), tmp_path / "there", tokenizers["gpt"], "gpt")


def test_a_pickle_with_a_payload_is_not_run(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    victim = tmp_path / "made by the payload"
    for content in (Payload(victim), {"transformer.wte.weight": Payload(victim)}):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="could run code: not opened"):
            convert.import_model(str(folder))
        assert not victim.exists()
    for content in ([1, 2], {"a": 1}, {1: torch.ones(2)}):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="is no dict of tensors"):
            convert.import_model(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02garbage")
    with pytest.raises(ValueError, match="is damaged"):
        convert.import_model(str(folder))


def entry(begin: int, end: int, shape: list, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "overlap": {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])},
    "gap": {"a": entry(0, 8, [2]), "b": entry(12, 16, [1])},
    "beyond": {"a": entry(0, 32, [8])},
    "short": {"a": entry(0, 8, [2])},
    "terabyte": {"a": entry(0, 10**12, [250_000_000_000])},
    "negative": {"a": entry(-16, 0, [4])},
    "minus": {"a": entry(0, 16, [-2, -2])},
    "backward": {"a": entry(16, 0, [4])},
    "shape": {"a": entry(0, 16, [5])},
    "text": {"a": entry(0, 16, "4")},
    "fraction": {"a": entry(0, 16, [4.0])},
    "truth": {"a": entry(0, 16, [True, 4])},
    "dtype": {"a": entry(0, 16, [4], "F31")},
    "listed": {"a": entry(0, 16, [4], ["F32"])},
    "offsets": {"a": {**entry(0, 16, [4]), "data_offsets": [0, 8, 16]}},
    "null": {"a": None},
    "array": [1, 2],
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(name, folder):
    text = json.dumps(HEADERS[name]).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(16)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors.* (damaged|wrong)"):
        convert.read_header(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        convert.import_model(str(folder))


def test_a_good_header_is_read(folder):
    want = {n: ("F32", tuple(t.shape)) for n, t in tensors_of(folder).items()}
    assert convert.read_header(folder / "model.safetensors") == want


def test_a_long_header_or_json_is_not_read(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(convert, "MOST_JSON", 100)
        with pytest.raises(ValueError, match="a header of "):
            convert.import_model(str(folder))
    monkeypatch.setattr(tokenizer_files, "MOST_JSON", 10)
    with pytest.raises(ValueError, match=r"config\.json has more than 10 bytes"):
        convert.import_model(str(folder))


def test_a_truncated_file_is_refused_wherever_it_ends(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for cut in (0, 3, 8, 9, 8 + length // 2, 8 + length, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model\.safetensors is (truncated|damaged)"):
            convert.import_model(str(folder))
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="is damaged"):
        convert.import_model(str(folder))
    for claimed in (10**12, 2**64 - 1, convert.MOST_JSON + 1):
        path.write_bytes(struct.pack("<Q", claimed) + whole[8:])
        with pytest.raises(ValueError, match=f"a header of {claimed:,} bytes"):
            convert.import_model(str(folder))
    twice = b'{"a": 1, "a": 1}'
    path.write_bytes(struct.pack("<Q", len(twice)) + twice)
    with pytest.raises(ValueError, match="a key occurs twice"):
        convert.import_model(str(folder))


def test_an_index_reads_nothing_outside_the_folder(folder, tmp_path):
    outside = tmp_path / "x.safetensors"
    (folder / "model.safetensors").rename(outside)
    index = folder / "model.safetensors.index.json"
    names = list(peer("safetensors.torch").load_file(outside))
    absent = str(outside)
    climbing = ["../x.safetensors", absent, "a/../../x.safetensors", "..\\x.safetensors"]
    climbing += ["C:x.safetensors", "", 5, None, ["x"], "config.json", "x.safetensors\0"]
    for file in climbing:
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}), encoding="utf-8")
        with pytest.raises(ValueError, match="which is no file beside it"):
            convert.import_model(str(folder))
    for content, message in (
        ({"weight_map": {"a": "none.safetensors"}}, "which is not there"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({}, "has no weight_map"),
    ):
        index.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            convert.import_model(str(folder))
    shutil.copy(outside, folder / "one.safetensors")
    shutil.copy(outside, folder / "two.safetensors")
    for placed in (
        dict.fromkeys(names[1:], "one.safetensors"),
        dict.fromkeys(names, "one.safetensors") | {"more": "one.safetensors"},
        dict.fromkeys(names, "one.safetensors") | {"more": "two.safetensors"},
    ):
        index.write_text(json.dumps({"weight_map": placed}), encoding="utf-8")
        with pytest.raises(ValueError, match="does not hold the tensors that the index says"):
            convert.import_model(str(folder))


def test_absurd_sizes_are_refused_before_anything_is_allocated(folder, monkeypatch):
    monkeypatch.setattr(convert, "open_weights", lambda folder: pytest.fail("was read"))
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for change in ({"n_embd": 10**12}, {"n_layer": -1}, {"vocab_size": 0}, {"n_inner": 2**40}):
        content = json.dumps({**said, **change})
        (folder / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=f"{next(iter(change))}=.* cannot be"):
            convert.import_model(str(folder))


def test_sizes_that_the_file_does_not_have_allocate_nothing(folder):
    """Each within the limits; together 10^12 weights, more than any machine has."""
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said |= {"vocab_size": 2**24, "n_embd": 2**16, "n_inner": 2**18, "n_head": 64}
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(ValueError, match=r"misshapen: transformer\.wte\.weight"):
        convert.import_model(str(folder))


def test_damaged_json_is_refused(folder):
    for name in ("config.json", "tokenizer.json"):
        whole = (folder / name).read_bytes()
        for content in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 1}'):
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                convert.import_model(str(folder))
        (folder / name).write_bytes(whole)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        convert.import_model(str(folder))


def test_weights_that_are_no_fractions_are_refused(folder):
    tensors = tensors_of(folder)
    key = "transformer.wte.weight"
    put_tensors(folder, tensors | {key: tensors[key].long()})
    with pytest.raises(ValueError, match=r"some weights are .*int64"):
        convert.import_model(str(folder))


def test_a_tokenizer_larger_than_the_model_is_refused(folder, tmp_path):
    many = Tokenizer({bytes([i]): i for i in range(256)}, GPT2_PATTERN, {END_OF_TEXT: V})
    content = json.dumps(tokenizer_json(many, "gpt"))
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="308 tokens, the model only 307"):
        convert.import_model(str(folder))


def test_without_safetensors_one_sentence_says_so(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        convert.import_model(str(folder))


# ---- the command line, and what follows ----------------------------------------------------------


def test_import_then_sample_then_train_then_export(folder, toy, capsys):
    convert.main(["import", str(folder), "--out", "out/gpt2.pt"])
    said = capsys.readouterr().out
    assert said.startswith("out/gpt2.pt: GPT-2, ") and "fresh" not in said
    sample.main(["--checkpoint=out/gpt2.pt", "--prompt=the", "--max_new_tokens=4", "--device=cpu"])
    assert capsys.readouterr().out.startswith("the")
    flags = ["--data=toy.txt", "--steps=2", "--tokens_per_step=26", "--batch_size=2", "--seed=1"]
    flags += ["--device=cpu", "--eval_interval=2", "--preset=tiny", "--lr=1e-3"][:2]
    train.main(["--init=out/gpt2.pt", "--out=out/more", *flags])
    convert.main(["export", "out/more/best.pt", "--to", "there/new"])
    card = Path("there/new/README.md").read_text(encoding="utf-8")
    log = [json.loads(x) for x in Path("out/more/log.jsonl").read_text("utf-8").splitlines()]
    measured = [r for r in log if r["split"] == "validation"][-1]
    assert f"| loss | {measured['loss']:.6g} |" in card
    assert "toy.txt" in card and "after 2 steps" in card and "| tokens_per_step | 26 |" in card
    assert "It began with the weights of gpt2.pt." in card and f"| n_embd | {C} |" in card
    files = sorted(p.name for p in Path("there/new").iterdir())
    assert files == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert len({p.stat().st_mode for p in Path("there/new").iterdir()}) == 1
    header = Path("there/new/model.safetensors").read_bytes()[8:200]
    assert header.startswith(b'{"__metadata__":{"format":"pt"}')
    assert [p.name for p in Path("there").iterdir() if p.name.startswith("new")] == ["new"]


@pytest.mark.parametrize("name", ["bert", "masked", "seq2seq"])
def test_the_other_tasks_are_sampled_from_too(name, tmp_path, tokenizers, capsys):
    save_theirs(random_theirs(name), tmp_path / "there", tokenizers[name], TASK[name])
    out = str(tmp_path / "out" / "x.pt")
    convert.main(["import", str(tmp_path / "there"), "--out", out])
    prompt = "a [MASK]" if TASK[name] == "bert" else "a cat"
    sample.main(["--checkpoint", out, "--prompt", prompt, "--device=cpu"])
    assert capsys.readouterr().out.count("\n") >= 2


def test_an_imported_checkpoint_is_not_resumed(folder, toy):
    (toy / "run").mkdir()
    convert.main(["import", str(folder), "--out", "run/latest.pt"])
    with pytest.raises(ValueError, match="run with --init"):
        train.main(["--resume", "--out=run", "--data=toy.txt", "--device=cpu"])


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, tokenizers):
    save_ours("gpt", tmp_path / "best.pt", tokenizers["gpt"])
    there = tmp_path / "there"
    there.mkdir()
    convert.export_model(tmp_path / "best.pt", there)  # empty: taken
    before = {p.name: p.read_bytes() for p in there.iterdir()}
    for target in (there, tmp_path / "best.pt"):
        with pytest.raises(ValueError, match="not an empty folder"):
            convert.export_model(tmp_path / "best.pt", target)
    assert before == {p.name: p.read_bytes() for p in there.iterdir()}


def test_an_interrupted_export_leaves_nothing(tmp_path, tokenizers, monkeypatch):
    save_ours("gpt", tmp_path / "best.pt", tokenizers["gpt"])

    def fails(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "card", fails)
    with pytest.raises(KeyboardInterrupt):
        convert.export_model(tmp_path / "best.pt", tmp_path / "there")
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]


@pytest.mark.parametrize(
    "flags,message",
    [
        (["import", "no where", "--out=x.pt"], "neither a folder nor a repository"),
        (["import", "there"], "import writes to --out"),
        (["import", "there", "--to=x"], "import writes to --out"),
        (["export", "best.pt"], "export writes to --to"),
        (["export", "best.pt", "--to=x", "--out=y"], "and not --out"),
        (["export", "none.pt", "--to=x"], "there is no checkpoint"),
        (["import", "there", "--out=here.pt"], "is there already"),
        (["convert", "there", "--out=x.pt"], "invalid choice"),
        (["import"], "source"),
        (["import", "a", "b", "--out=x.pt"], "'b' belongs to no flag"),
    ],
    ids=str,
)
def test_wrong_commands_end_in_a_sentence(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.pt").touch()
    with pytest.raises(ValueError, match=message):
        convert.main(flags)
    assert [p.name for p in tmp_path.iterdir()] == ["here.pt"]


def test_the_card_of_a_model_that_was_never_trained(tmp_path, folder):
    checkpoint, _ = convert.import_model(str(folder))
    text = convert.card("x", checkpoint, [{"step": 7, "split": "validation", "loss": 1.0}])
    assert "not recorded" in text and "None were measured." in text and "after 0 steps" in text


def test_bytes_are_written_as_gpt2_writes_them():
    characters = byte_characters()
    assert sorted(characters.values()) == list(range(256)) and len(characters) == 256
    assert characters["Ġ"] == ord(" ") and characters["Ċ"] == ord("\n") and characters["a"] == 97
