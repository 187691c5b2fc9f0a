"""A checkpoint as the hub's opus-mt: the same function, from raw text to raw text, in and out."""

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import peer
from converting import (
    ENGLISH,
    GERMAN,
    OURS,
    H,
    L,
    T,
    assert_same_function,
    imported,
    must_end,
    random_theirs,
    save_opus,
    save_theirs,
)

import convert
import sample
import train
from data.tokens import tokenizer_from_json
from engine import checkpoint as checkpoints
from engine.hub.importing import import_model
from engine.hub.mapping import our_config, their_settings, to_ours, to_theirs
from engine.losses import linear_cross_entropy
from model import plain_cross_entropy
from seq2seq import ACTIVATIONS, Seq2Seq, Seq2SeqConfig
from tasks.translation import SampleFlags, translate_ids

TEXTS = [*ENGLISH, ">>fra<< the dog", "two", "a cat 東京", "sheep, they said: 123!"]
LIMIT = 20  # tokens that a translation may have


def all_train(theirs: nn.Module) -> nn.Module:
    """Lets them train the embedding of padding, which is the start token's, where it is read."""
    for module in theirs.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    return theirs


def opus_ids(theirs: nn.Module) -> dict[str, int]:
    """What our searches need."""
    return {"start": theirs.config.vocab_size - 1, "end": 0}


# ---- the same function ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["swish", "silu", "relu", "gelu"])
def test_an_imported_translator_is_the_same_function(activation, dtype, tmp_path):
    theirs = save_opus(tmp_path / "there", activation_function=activation)
    ours, checkpoint, lines = imported(tmp_path / "there")
    said = checkpoint["model_config"]
    assert said["activation"] == activation.replace("swish", "silu") and said["output_bias"]
    assert ours.output_bias.abs().max() > 1 and not ours.output_bias.requires_grad
    assert f"{sum(p.numel() for p in ours.parameters()):,} parameters" in lines[0]
    assert_same_function("seq2seq", ours, all_train(theirs), dtype)


@pytest.fixture
def warnings_of_theirs(caplog):
    said = peer("transformers").utils.logging
    said.enable_propagation()
    with caplog.at_level(logging.WARNING, logger="transformers"):
        yield lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    said.disable_propagation()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_out_and_in_again_is_the_same(kind, dtype, tmp_path, warnings_of_theirs):
    transformers = peer("transformers")
    random = save_opus(tmp_path / "there", kind)
    convert.main(["import", str(tmp_path / "there"), "--out", str(tmp_path / "opus.pt")])
    convert.main(["export", str(tmp_path / "opus.pt"), "--to", str(tmp_path / "again")])
    warnings_before = len(warnings_of_theirs())
    theirs, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert type(theirs).__name__ == "MarianMTModel" and not any(report.values()), report
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert len(warnings_of_theirs()) == warnings_before
    assert type(tokenizer).__name__ == "MarianTokenizer" and tokenizer.model_max_length == 37
    before = transformers.MarianTokenizer.from_pretrained(tmp_path / "there")
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == before(text)["input_ids"]
        target = tokenizer(text_target=text)["input_ids"]
        assert target == before(text_target=text)["input_ids"]
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id", "activation_function"):
        value = getattr(random.config, name)
        assert getattr(theirs.config, name) == {"swish": "silu"}.get(value, value)
    ours, checkpoint, _ = imported(tmp_path / "again")
    first = checkpoints.load(tmp_path / "opus.pt")
    for key in ("model_config", "tokenizer", "tokenizer_hash"):
        assert checkpoint[key] == first[key]
    assert checkpoint["model"].keys() == first["model"].keys()
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, checkpoint["model"][name]), name
    assert_same_function("seq2seq", ours, all_train(theirs), dtype)


@pytest.mark.parametrize("task_bias", [True, False])
def test_a_bias_of_zeros_is_none(task_bias, tmp_path):
    """It would be carried about for nothing; another shape is refused."""
    folder = tmp_path / "there"
    theirs = save_opus(folder)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    tensors["final_logits_bias"].zero_()
    if not task_bias:
        del tensors["final_logits_bias"]
    torch.save(tensors, folder / "pytorch_model.bin")
    ours, checkpoint, _ = imported(folder)
    assert checkpoint["model_config"]["output_bias"] is False and ours.output_bias is None
    assert "output_bias" not in checkpoint["model"]
    theirs.final_logits_bias.zero_()
    assert_same_function("seq2seq", ours, all_train(theirs), torch.float32)
    written = to_theirs("seq2seq", ours.config, ours.state_dict())["final_logits_bias"]
    assert written.shape == (1, ours.config.vocab_size) and not written.any()
    for wrong in (torch.ones(5), torch.ones(2, ours.config.vocab_size), torch.ones(1, 5)):
        torch.save({**tensors, "final_logits_bias": wrong}, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="wrong: final_logits_bias is not one row"):
            import_model(str(folder))


def test_settings_of_old_checkpoints_and_unknown_ones():
    """Checkpoints from before have neither of the two settings."""
    old = {
        k: v for k, v in vars(OURS["seq2seq"][1]).items() if k not in ("activation", "output_bias")
    }
    config = Seq2SeqConfig(**old)
    assert (config.activation, config.output_bias) == ("relu", False)
    model = Seq2Seq(config).eval()
    assert "output_bias" not in model.state_dict()
    for activation in ACTIVATIONS:
        config = Seq2SeqConfig(**old, activation=activation)
        assert our_config(their_settings("seq2seq", config)) == ("seq2seq", config)
        other = Seq2Seq(config).eval()
        other.load_state_dict(model.state_dict())
        tokens = torch.randint(9, (2, T))
        assert torch.equal(other(tokens, tokens), model(tokens, tokens)) == (activation == "relu")
    with pytest.raises(ValueError, match="activation=tanh is not known: choose relu, silu, gelu"):
        Seq2SeqConfig(**old, activation="tanh")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_bias_that_is_not_trained_costs_no_gradient(smoothing, monkeypatch):
    features, weight = (
        torch.randn(37, 5, requires_grad=True),
        torch.randn(13, 5, requires_grad=True),
    )
    bias, targets = torch.randn(13), torch.randint(13, (37,)).index_fill(0, torch.arange(3), -100)
    gradients = []
    for loss_of in (plain_cross_entropy, linear_cross_entropy):
        loss, nll, right = loss_of(features, weight, targets, smoothing, bias, accuracy=True)
        gradients.append([loss, nll, right, *torch.autograd.grad(loss, (features, weight))])
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got.to(want), want)
    loss = linear_cross_entropy(features, weight, targets, smoothing, bias)[0]
    assert len([saved for saved in loss.grad_fn.saved_tensors if saved is not None]) == 2


def test_the_model_computes_its_loss_with_the_bias():
    torch.manual_seed(1)
    config = Seq2SeqConfig(13, 7, 2, 2, 8, output_bias=True, activation="silu", dropout=0.0)
    model, tokens = Seq2Seq(config), torch.randint(13, (3, 7))
    with torch.no_grad():
        model.output_bias.normal_()
    logits = model(tokens, tokens)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens.flatten(), reduction="sum", label_smoothing=0.1
    )
    assert model(tokens, tokens, tokens)["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    without = Seq2Seq(Seq2SeqConfig(13, 7, 2, 2, 8, activation="silu", dropout=0.0))
    assert model.flops_per_token() == without.flops_per_token()
    without.load_state_dict({k: v for k, v in model.state_dict().items() if k != "output_bias"})
    torch.testing.assert_close(logits - model.output_bias, without(tokens, tokens))


# ---- the same translations -----------------------------------------------------------------------


def their_translations(folder: Path, beam: int, **ids) -> list[str]:
    """From raw text to raw text."""
    transformers = peer("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.MarianMTModel.from_pretrained(folder).eval()
    written = model.generate(
        **tokenizer(TEXTS, return_tensors="pt", padding=True),
        do_sample=False,
        num_beams=beam,
        length_penalty=0.0,
        early_stopping=True,  # as ours: when `beam` hypotheses are complete
        max_new_tokens=LIMIT + 1,
        forced_eos_token_id=None,
        logits_processor=[must_end(0, LIMIT + 1)],
        **ids,
    )
    return tokenizer.batch_decode(written, skip_special_tokens=True)


def our_translations(path: Path, beam: int, capsys) -> list[str]:
    capsys.readouterr()
    flags = [f"--beam={beam}", "--length_penalty=0", f"--max_new_tokens={LIMIT}", "--device=cpu"]
    prompts = [part for text in TEXTS for part in ("--prompt", text)]
    sample.main(["--checkpoint", str(path), *flags, *prompts])
    return capsys.readouterr().out.split("\n")[:-1]


@pytest.mark.parametrize("beam", [1, 4])
def test_raw_text_becomes_the_same_raw_text(beam, tmp_path, capsys):
    """The weights are random and would often write the start token if they were allowed to."""
    theirs = save_opus(tmp_path / "there")
    convert.main(["import", str(tmp_path / "there"), "--out", str(tmp_path / "opus.pt")])
    want = their_translations(
        tmp_path / "there", beam, bad_words_ids=[[theirs.config.pad_token_id]]
    )
    assert our_translations(tmp_path / "opus.pt", beam, capsys) == want
    assert len(set(want)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_import_then_train_then_export_then_the_same(kind, tmp_path, monkeypatch, capsys):
    """A few steps, with other pieces in targets than in sources, so that the outputs mean more."""
    monkeypatch.chdir(tmp_path)
    layers = ("encoder_layers", "decoder_layers", "num_hidden_layers")
    save_opus(tmp_path / "there", kind, **dict.fromkeys(layers, 1))
    convert.main(["import", "there", "--out", "out/opus.pt"])
    lines = [f"{a}\t{b}\n" for a, b in zip(ENGLISH, GERMAN, strict=True)] * 40
    Path("pairs.tsv").write_text("".join(lines), encoding="utf-8")
    flags = ["--data=pairs.tsv", "--steps=150", "--tokens_per_step=148", "--batch_size=4"]
    flags += ["--device=cpu", "--eval_interval=150", "--lr=1e-2", "--optimizer=adamw"]
    flags += ["--dropout=0", "--dtype=fp32", "--log_interval=10", "--warmup=5"]
    train.main(["--init=out/opus.pt", "--out=out/more", *flags])
    log = [json.loads(x) for x in Path("out/more/log.jsonl").read_text("utf-8").splitlines()]
    losses = [r["nll"] for r in log if r["split"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    first, last = (checkpoints.load(Path(p)) for p in ("out/opus.pt", "out/more/best.pt"))
    assert torch.equal(first["model"]["output_bias"], last["model"]["output_bias"])
    assert first["tokenizer"] == last["tokenizer"]
    last["model"]["output_bias"][-1] += 5  # it would write the start token, if it were let
    checkpoints.save(Path("out/more/best.pt"), last)
    convert.main(["export", "out/more/best.pt", "--to", "new"])
    files = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    files += ["source.spm", "target.spm", "tokenizer_config.json", "vocab.json"]
    assert sorted(p.name for p in Path("new").iterdir()) == files
    for beam in (1, 4):
        want = their_translations(Path("new"), beam)  # their own settings keep the start away
        assert our_translations(Path("out/more/best.pt"), beam, capsys) == want
        assert len(set(want)) > 5 and set(want) & set(GERMAN)


@pytest.mark.parametrize("settings", [{"beam": 1}, {"beam": 4}, {"temperature": 3.0}], ids=str)
def test_the_start_token_is_never_written(settings, tmp_path):
    save_opus(tmp_path / "there")
    ours, checkpoint, _ = imported(tmp_path / "there")
    tokenizer = tokenizer_from_json(checkpoint["tokenizer"])
    start = tokenizer.vocab_size - 1
    sources = [tokenizer.encode(text) for text in TEXTS]
    with torch.no_grad():
        ours.output_bias[start] = 9.0
        likeliest = ours(torch.tensor([[5, 0]]), torch.tensor([[start, 5, 6]])).argmax(-1)
    assert (likeliest == start).any()
    config = SampleFlags(max_new_tokens=LIMIT, **settings)
    found = translate_ids(ours, tokenizer, sources, config)
    assert any(found) and not any(start in ids for ids in found)


# ---- what differs is refused ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["decoder_start_token_id", "eos_token_id", "pad_token_id"])
def test_ids_that_the_tokenizer_has_otherwise_are_refused(name, tmp_path):
    folder = tmp_path / "there"
    save_opus(folder)
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for value in (5, None, [0, 5], said["vocab_size"]):
        (folder / "config.json").write_text(json.dumps({**said, name: value}), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"config\.json: {name}=.* the tokenizer has it as "):
            import_model(str(folder))
    left = {k: v for k, v in said.items() if k != name}  # then it is as in MarianConfig
    (folder / "config.json").write_text(json.dumps(left), encoding="utf-8")
    if name == "eos_token_id":
        import_model(str(folder))
    else:
        with pytest.raises(ValueError, match=rf"{name}=58100 is not supported"):
            import_model(str(folder))


def test_ids_are_checked_with_our_own_tokenizers_too(tmp_path, tokenizers):
    """There, the end token begins a target. Padding is masked, so any id will do."""
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
        theirs = random_theirs("seq2seq", **{name: 3})
        save_theirs(theirs, tmp_path / name, tokenizers["seq2seq"], "seq2seq")
        if name == "pad_token_id":
            import_model(str(tmp_path / name))
            continue
        with pytest.raises(ValueError, match=f"{name}=3 is not supported"):
            import_model(str(tmp_path / name))


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path):
    folder = tmp_path / "there"
    save_opus(folder)
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps({**vocab, "x y": len(vocab)}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"there: .* {len(vocab) + 1} tokens, the model only"):
        import_model(str(folder))


def test_the_tensors_of_a_bias_are_one_row_there():
    config = Seq2SeqConfig(13, 7, L, H, 8, output_bias=True)
    model = Seq2Seq(config)
    with torch.no_grad():
        model.output_bias.normal_()
    tensors = to_theirs("seq2seq", config, model.state_dict())
    assert torch.equal(tensors["final_logits_bias"], model.output_bias[None])
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    restored, state, _ = to_ours("seq2seq", config, shapes, tensors.__getitem__)
    assert restored == config and torch.equal(state["output_bias"], model.output_bias)
