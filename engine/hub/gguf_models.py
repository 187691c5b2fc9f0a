"""What a GGUF file says of a model, as Hugging Face's files say it: config.json, the names of the
tensors, tokenizer.json and tokenizer_config.json.

What would compute something else than our Llama, or is not known here, is refused by name.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.hub.gguf import field, printable, read_gguf
from engine.hub.tokenizer_files import (
    BYTE_LEVEL,
    DIGITS_PATTERN,
    LLAMA3_PATTERN,
    QWEN_PATTERN,
    pre_tokenizer,
)

# ---- settings and names --------------------------------------------------------------------------

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Hugging Face's setting: what stands behind "llama." in the key
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
READ = {*SIZES.values(), "attention.head_count_kv", "attention.key_length", "vocab_size"}
READ |= {"attention.layer_norm_rms_epsilon", "rope.freq_base"}
# Other keys, with what they say of a model that we compute. All that are not here are refused.
FIXED = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scale_linear": (0, 1),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.finetuned": (False, True),
    "rope.scaling.type": ("none",),
    "tensor_data_layout": ("Meta AI original pth",),
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
LAYER |= {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"} | {"attn_output": "self_attn.o_proj"}
LAYER |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
QK_NORMS = {f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"}


def settings_of(metadata: dict, shapes: dict, rope_freqs: Tensor | None = None) -> dict:
    """The content of config.json. rope_freqs is the tensor rope_freqs.weight of a file that has it.
    Raises ValueError, with the key, for what our Llama does not compute."""
    arch = field(metadata, "general.architecture", str)
    for key, allowed in (
        ("general.architecture", tuple(ARCHITECTURES)),
        ("general.type", ("model",)),
        ("split.count", (1, 0)),  # of files
    ):
        if (value := metadata.get(key, allowed[0])) not in allowed:
            only = " and ".join(map(str, allowed))
            raise ValueError(f"{key}={str(value)[:80]} is not supported, only {only}")

    def size(key: str, default: int | None = None) -> int:
        value = field(metadata, f"{arch}.{key}", int, default)
        if value < 1:
            raise ValueError(f"{arch}.{key}={value} cannot be: it must be 1 or more")
        return value

    def decimal(key: str, default: float | None = None) -> float:
        """The shortest number that is this float32: 1e-05, not 9.999999747378752e-06"""
        return float(str(np.float32(field(metadata, f"{arch}.{key}", float, default))))

    settings: dict[str, Any] = {"architectures": [ARCHITECTURES[arch]], "model_type": arch}
    settings |= {theirs: size(key) for theirs, key in SIZES.items()}
    heads, width = settings["num_attention_heads"], settings["hidden_size"]
    settings |= {
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": (head_dim := size("attention.key_length", width // heads)),
        "rms_norm_eps": decimal("attention.layer_norm_rms_epsilon"),
        "rope_theta": (theta := decimal("rope.freq_base", 10000.0)),
        "vocab_size": size("vocab_size", len(field(metadata, "tokenizer.ggml.tokens", list, []))),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    fixed = FIXED | {"attention.sliding_window": (0, settings["max_position_embeddings"])}
    fixed |= dict.fromkeys(("rope.dimension_count", "attention.value_length"), (head_dim,))
    for key, value in metadata.items():
        start, _, rest = key.partition(".")
        if start == arch and rest not in READ and value not in fixed.get(rest, ()):
            raise ValueError(f"{key}={str(value)[:80]} is not supported")
    if "rope_freqs.weight" in shapes:
        settings["rope_scaling"] = rope_scaling(rope_freqs, theta, head_dim)
    return settings


def rope_scaling(rope_freqs: Tensor | None, theta: float, head_dim: int) -> dict:
    """rope_freqs.weight (D/2,), by which the rates of the pairs of channels are divided, as Hugging
    Face writes it. Raises ValueError if it is not what Llama 3.1 has, with whatever factor."""
    if rope_freqs is not None and rope_freqs.shape == (head_dim // 2,):
        pairs, factor = torch.arange(head_dim // 2) * 2, rope_freqs.max().item()
        turns = 8192 / (2 * math.pi) / theta ** (pairs / head_dim)  # of each in 8192 positions
        kept = ((turns - 1) / 3).clamp(0, 1)
        if torch.allclose(rope_freqs, 1 / ((1 - kept) / factor + kept), rtol=1e-5, atol=0):
            found = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
            return found | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    raise ValueError("rope_freqs.weight is not that of Llama 3.1, which alone is supported")


def their_names(metadata: dict, shapes: dict) -> dict[str, str]:
    """{name in the file: Hugging Face's name}. A name that is not known stays as it is."""
    layer = LAYER | (QK_NORMS if metadata.get("general.architecture") == "qwen3" else {})
    names = {name: name for name in shapes}
    for name in shapes:
        if found := re.fullmatch(r"(?:blk\.([0-9]+)\.)?(\w+)\.weight", name):
            number, part = found.groups()
            if number is None and part in WHOLE:
                names[name] = f"{WHOLE[part]}.weight"
            elif number is not None and part in layer:
                names[name] = f"model.layers.{number}.{layer[part]}.weight"
    return names


def open_gguf(
    path: Path,
) -> tuple[dict, dict[str, tuple[int, ...]], Callable[[str], Tensor], dict, dict]:
    """(content of config.json, shapes by Hugging Face's names, the function that reads a tensor by
    such a name, content of tokenizer.json, content of tokenizer_config.json)"""
    metadata, shapes, read = read_gguf(path)
    try:
        rope_freqs = read("rope_freqs.weight") if "rope_freqs.weight" in shapes else None
        settings = settings_of(metadata, shapes, rope_freqs)
        tokenizer, tokenizer_settings = tokenizer_of(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {printable(error)}") from None
    shapes = {name: shape for name, shape in shapes.items() if name != "rope_freqs.weight"}
    names = {theirs: name for name, theirs in their_names(metadata, shapes).items()}
    if len(names) < len(shapes):
        raise ValueError(f"{path} has a tensor under two names")

    def get(name: str) -> Tensor:
        tensor = read(names[name])
        if settings["model_type"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            return halves(tensor, settings["head_dim"], f"{path}: {name}")
        return tensor

    shapes = {theirs: shapes[name] for theirs, name in names.items()}
    return settings, shapes, get, tokenizer, tokenizer_settings


def halves(tensor: Tensor, head_dim: int, name: str) -> Tensor:
    """The rows (H · D, ...) of q or k in Hugging Face's order. Rotary positions turn pairs of rows:
    i and i + D/2 of a head there, 2i and 2i + 1 in a file of the architecture "llama"."""
    if head_dim % 2 or len(tensor) % head_dim:
        raise ValueError(f"{name} has {len(tensor):,} rows, which are no heads of {head_dim}")
    pairs = tensor.unflatten(0, (-1, head_dim // 2, 2))  # (H, D/2, 2, ...)
    return pairs.transpose(1, 2).reshape(tensor.shape)


# ---- the tokenizer -------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)  # kinds of tokens
MOST_LETTERS = 1000  # of one of SentencePiece's, because all its splits are tried
GPT2_SPLIT = {**BYTE_LEVEL, "use_regex": True}
# tokenizer.ggml.pre: the pre_tokenizer of the tokenizer.json that such models have
SPLITS = {
    "gpt-2": GPT2_SPLIT,
    "llama-bpe": pre_tokenizer(LLAMA3_PATTERN),
    "qwen2": pre_tokenizer(QWEN_PATTERN),
    "smollm": pre_tokenizer(DIGITS_PATTERN),
}


def tokenizer_of(metadata: dict) -> tuple[dict, dict]:
    """(content of tokenizer.json, content of tokenizer_config.json) of byte-level BPE, which GGUF
    calls "gpt2", or SentencePiece's BPE, which it calls "llama"."""

    def get(key: str, kind: type, default: Any = None) -> Any:
        return field(metadata, f"tokenizer.ggml.{key}", kind, default)

    def column(key: str, kind: type, length: int | None = None) -> list:
        found = get(key, list)
        if len(found) != (length or len(found)) or any(type(item) is not kind for item in found):
            raise ValueError(f"tokenizer.ggml.{key} has another type or length than is needed")
        return found

    model, tokens = get("model", str), column("tokens", str)
    kinds = column("token_type", int, len(tokens))
    if len({*tokens}) < len(tokens):
        raise ValueError("tokenizer.ggml.tokens has a token twice")
    if model == "gpt2":
        pre, usual = get("pre", str), {}
        content = byte_level(pre, column("merges", str))
        if get("add_space_prefix", bool, False):
            raise ValueError("tokenizer.ggml.add_space_prefix=True is not supported beside gpt2")
    elif model == "llama":
        pre, usual = "", {"unknown": 0, "bos": 1, "eos": 2}
        scores = zip(tokens, column("scores", float, len(tokens)), kinds, strict=True)
        normal = {token: score for token, score, kind in scores if kind == NORMAL}
        content = sentence_pieces(normal, get("add_space_prefix", bool, True))
    else:
        raise ValueError(f"tokenizer.ggml.model={model[:80]} is not supported, gpt2 and llama are")

    def named(name: str) -> str | None:
        i = get(f"{name}_token_id", int, usual.get(name, -1))
        if i >= len(tokens):
            raise ValueError(f"tokenizer.ggml.{name}_token_id={i} is no token")
        return tokens[i] if i >= 0 else None

    bos, adds_bos = named("bos"), get("add_bos_token", bool, pre in ("", "llama-bpe"))
    if (adds_bos and bos is None) or get("add_eos_token", bool, False):
        raise ValueError(
            "tokenizer.ggml: add_bos_token without bos_token_id, or add_eos_token=True"
        )
    content["post_processor"] = beginning(bos, tokens.index(bos)) if adds_bos else None
    content["model"] |= {
        "type": "BPE",
        "unk_token": named("unknown") if model == "llama" else None,
        **dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix")),
        "vocab": {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED},
    }
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [
        {"id": i, "content": tokens[i], **plain, "special": kind != USER_DEFINED}
        for i, kind in enumerate(kinds)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": named("unknown")}
    settings |= {"bos_token": bos, "eos_token": named("eos")}
    settings |= {"add_bos_token": adds_bos, "add_eos_token": False}
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = field(metadata, "tokenizer.chat_template", str)
    return {"version": "1.0", "truncation": None, "padding": None, **content}, settings


def beginning(token: str, i: int) -> dict:
    """The post_processor that puts this token before each text."""

    def place(text: str, segment: int) -> list[dict]:
        row = (("SpecialToken", token), ("Sequence", text))
        return [{kind: {"id": name, "type_id": segment}} for kind, name in row]

    ids = {token: {"id": token, "ids": [i], "tokens": [token]}}
    found = {"type": "TemplateProcessing", "single": place("A", 0), "special_tokens": ids}
    return {**found, "pair": place("A", 0) + place("B", 1)}


def byte_level(pre: str, merges: list[str]) -> dict:
    """What a tokenizer.json says of byte-level BPE alone."""
    if pre not in SPLITS:
        known = ", ".join(SPLITS)
        raise ValueError(f"tokenizer.ggml.pre={pre[:80]} is not supported, only {known} are")
    pairs = [merge.split(" ") for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("tokenizer.ggml.merges has one that is not of two tokens")
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": pre == "llama-bpe"}
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": SPLITS[pre],
        "decoder": {**BYTE_LEVEL, "use_regex": True},
        "model": {**flags, "merges": pairs},
    }


def sentence_pieces(scores: dict[str, float], prefix: bool) -> dict:
    """What a tokenizer.json says of SentencePiece's BPE alone. prefix: "▁" goes before a text.

    scores has the pieces that can be merged. The file has no merges: each way to split a piece in
    two others is one, that of the highest score first, as in transformers' generate_merges.
    """
    if any(len(piece) > MOST_LETTERS for piece in scores):
        raise ValueError(f"tokenizer.ggml.tokens has one of more than {MOST_LETTERS:,} characters")
    found = [
        (score, i, len(piece) - i, piece)
        for piece, score in scores.items()
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    found.sort(key=lambda row: row[:3], reverse=True)
    # All scores are the same where llama.cpp's converter was not given a tokenizer.model.
    made, ranks = {row[3] for row in found}, {row[0] for row in found}
    if not all(map(math.isfinite, ranks)) or len(made) > len(ranks) == 1:
        raise ValueError("tokenizer.ggml.scores do not say in which order pieces are merged")
    there = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, there]
    never = {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": "never"}
    back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    back += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    flags = {"fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if prefix else None,
        "pre_tokenizer": None if prefix else never,
        "decoder": {"type": "Sequence", "decoders": back + strip if prefix else back},
        "model": {**flags, "merges": [[piece[:i], piece[i:]] for _, i, _, piece in found]},
    }
