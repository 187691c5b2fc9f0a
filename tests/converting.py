"""What the tests of convert.py share: models, tokenizers, folders as the hub has them."""

import functools
import io
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import peer

import tasks
from bert import BERT, BERTConfig
from bpe import PATTERNS, Tokenizer
from data.encoding import SPECIAL
from data.tokens import END_OF_TEXT
from engine import checkpoint as checkpoints
from engine.hub.importing import import_model
from engine.hub.mapping import their_settings, to_ours
from engine.hub.tokenizer_files import tokenizer_json
from model import GPT, GPTConfig
from seq2seq import Seq2Seq, Seq2SeqConfig

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


@functools.cache
def tokenizers() -> dict[str, Tokenizer]:
    """One for each task, as training would make it, and GPT-4's and the characters' patterns."""
    made = {
        name: Tokenizer.train(TEXT * 3, 300, PATTERNS[name], (END_OF_TEXT, "<|a|>", "<|a|>b"))
        for name in PATTERNS
    }
    made["gpt"], made["seq2seq"] = made["gpt2"], Tokenizer.train(TEXT * 3, 299)
    made["bert"] = made["masked"] = Tokenizer.train(TEXT * 3, 301, special_tokens=SPECIAL)
    return made


def foreign(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer as it comes back from the files of the hub."""
    state = (tokenizer.ranks, tokenizer.pattern, tokenizer.special_tokens)
    return Tokenizer(*state, foreign=True)


def noisy(model: nn.Module) -> nn.Module:
    """Every parameter random, norms and biases too: an initialised model hides swapped ones."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            nn.init.normal_(parameter, mean=float(is_norm), std=0.2)
    return model.eval()


def random_theirs(name: str, **changes) -> nn.Module:
    transformers = peer("transformers")
    end = tokenizers()["seq2seq"].special_tokens[END_OF_TEXT]
    ids = {"eos_token_id": end, "decoder_start_token_id": end, "forced_eos_token_id": None}
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
    checkpoint, lines = import_model(str(folder))
    model, _ = checkpoints.restore(folder, checkpoint)
    return model.eval(), checkpoint, lines


def save_ours(name: str, path: Path, tokenizer: Tokenizer, **state) -> nn.Module:
    Model, config = OURS[name]
    model, task = noisy(Model(config)), TASK[name]
    state = {"optimizer": {}, "step": 7, "best": 1.25, "skipped": 0, **state}
    kept = tasks.task(task).Flags(model=task, data="some/where/text.txt", lr=0.125)
    checkpoints.save(
        path, checkpoints.pack(task, model, tokenizer, train_config=kept, data="", **state)
    )
    return model


def batch(task: str, vocab_size: int = V) -> dict[str, torch.Tensor]:
    """By our names. The last ids are left out: Marian's padding gets no gradient there."""
    tokens = torch.randint(vocab_size - 8, (B, T))
    keep = torch.arange(T) < torch.tensor([T, 6, 9, 4, 11])[:, None]
    if task == "gpt":
        return {"tokens": tokens}
    if task == "bert":
        return {"tokens": tokens, "segments": torch.randint(2, (B, T)), "keep": keep}
    source = torch.randint(vocab_size - 8, (B, T - 2))
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
    given = batch(task, ours.config.vocab_size)
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


def must_end(end: int, length: int):
    """For their generate: behind `length` tokens, the start's included, nothing but the end, at the
    probability that it has. Ours does so; their forced_eos_token_id would make it certain."""

    def process(written: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if written.size(1) == length:
            others = torch.arange(scores.size(1)) != end
            scores = scores.masked_fill(others, -torch.inf)
        return scores

    return process


# ---- opus-mt -------------------------------------------------------------------------------------

ENGLISH = ["the cat sat on the mat", "a dog didn't see 123 things", "one apple, two pears!"]
ENGLISH += ["she sells what the others see", "they had a mat; nobody sat on it", "no dog, no cat"]
GERMAN = ["der Hund sah die Katze nicht", "das Mädchen isst einen Apfel", "1 + 2 = 3 größere Bäume"]
GERMAN += [
    "sie verkauft, was andere sehen",
    "niemand saß auf der Matte",
    "die Äpfel und die Birnen",
]
# What config.json of Helsinki-NLP/opus-mt-en-de says, but for sizes and ids.
OPUS = {
    "activation_dropout": 0.0,
    "activation_function": "swish",
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "architectures": ["MarianMTModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "classif_dropout": 0.0,
    "d_model": C,
    "decoder_attention_heads": H,
    "decoder_ffn_dim": N_FF,
    "decoder_layerdrop": 0.0,
    "decoder_layers": L,
    "dropout": 0.1,
    "encoder_attention_heads": H,
    "encoder_ffn_dim": N_FF,
    "encoder_layerdrop": 0.0,
    "encoder_layers": L,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "max_length": 512,
    "max_position_embeddings": 37,
    "model_type": "marian",
    "normalize_before": False,
    "normalize_embedding": False,
    "num_beams": 4,
    "num_hidden_layers": L,
    "scale_embedding": True,
    "share_encoder_decoder_embeddings": True,
    "static_position_embeddings": True,
    "transformers_version": "4.22.0.dev0",
    "use_cache": True,
}


@functools.cache
def spm(kind: str, text: tuple[str, ...]) -> bytes:
    """A SentencePiece model with Marian's special tokens, "unigram" or "bpe"."""
    out, more = io.BytesIO(), {"hard_vocab_limit": False} if kind == "unigram" else {}
    peer("sentencepiece").SentencePieceTrainer.train(
        sentence_iterator=iter(text * 5),
        model_writer=out,
        model_type=kind,
        vocab_size=70,
        **{"bos_id": -1, "eos_id": 0, "unk_id": 1, "minloglevel": 2, **more},
    )
    return out.getvalue()


def save_tokenizer(folder: Path, kind: str) -> list[str]:
    """The four files of opus-mt; returns the pieces of the vocabulary."""
    folder.mkdir()
    pieces = ["</s>", "<unk>", ">>fra<<"]
    for name, text in (("source.spm", ENGLISH), ("target.spm", GERMAN)):
        content = spm(kind, tuple(text))
        (folder / name).write_bytes(content)
        model = peer("sentencepiece").SentencePieceProcessor(model_proto=content)
        found = map(model.id_to_piece, range(model.get_piece_size()))
        pieces += [piece for piece in found if piece not in pieces]
    # One piece of the source's model is in no vocabulary: unknown, though the model knows it.
    pieces.remove("▁the" if "▁the" in pieces else "▁th")
    pieces.append("<pad>")
    vocab = {piece: i for i, piece in reversed([*enumerate(pieces)])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    said = {"target_lang": "de", "source_lang": "en"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    return pieces


def save_opus(folder: Path, kind: str = "unigram", **changes) -> nn.Module:
    """A translator with random weights and biases in the files of opus-mt; returns theirs."""
    transformers, pad = peer("transformers"), len(save_tokenizer(folder, kind)) - 1
    said = {**OPUS, "vocab_size": pad + 1, "decoder_vocab_size": pad + 1, "pad_token_id": pad}
    said |= {"decoder_start_token_id": pad, "bad_words_ids": [[pad]], **changes}
    theirs = noisy(transformers.MarianMTModel(transformers.MarianConfig.from_dict(said)))
    with torch.no_grad():
        theirs.final_logits_bias.normal_()
        theirs.final_logits_bias[0, [0, pad]] += torch.tensor([2.0, 4.0])  # ends, and is tempted
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    return theirs


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return peer("safetensors.torch").load_file(folder / "model.safetensors")


def put_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    peer("safetensors.torch").save_file(tensors, folder / "model.safetensors")
