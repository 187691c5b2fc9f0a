"""GGUF, llama.cpp's format: the pairs and the tensors of one file. `gguf_models.py` says what they
mean.

    header      "GGUF", a version, the number of tensors, the number of pairs
    pairs       key, type of the value, value: general.…, llama.…, tokenizer.ggml.…
    tensors     name, dimensions (the one that varies fastest comes first), type, offset
    data        the tensors in this order, each beginning at a multiple of 32 bytes

Weights are mostly quantised: 32 neighbours in a row share a scale, and each takes 4 to 8 bits more.
Here they become float32. A stranger's file is not trusted: lengths are compared with the file
before memory is taken, and what is damaged is refused.

Left out: types with blocks of 256 weights (Q4_K, Q6_K, …), models in several files, big-endian.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# ---- the file ------------------------------------------------------------------------------------

# Types of values, by their numbers, in the letters of `struct`; TEXT and ARRAY have lengths.
VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY, BOOL = 8, 9, 7
MOST_ITEMS = 2**24  # of an array; the largest vocabularies have 300,000 tokens
# Types of tensors, by their numbers: (name, weights in a block, layout of a block). A weight is
# scale · q + least, or scale · (q - middle). `nibbles` has 4 bits of each q, those of the first 16
# weights in the low halves of the bytes; `fifth` has the fifth bits.
SCALE, LEAST = ("scale", "<f2"), ("least", "<f2")
FIFTH, NIBBLES = ("fifth", "u1", 4), ("nibbles", "u1", 16)
TYPES = {
    0: ("F32", 1, np.dtype("<f4")),
    1: ("F16", 1, np.dtype("<f2")),
    2: ("Q4_0", 32, np.dtype([SCALE, NIBBLES])),
    3: ("Q4_1", 32, np.dtype([SCALE, LEAST, NIBBLES])),
    6: ("Q5_0", 32, np.dtype([SCALE, FIFTH, NIBBLES])),
    7: ("Q5_1", 32, np.dtype([SCALE, LEAST, FIFTH, NIBBLES])),
    8: ("Q8_0", 32, np.dtype([SCALE, ("q", "i1", 32)])),
    30: ("BF16", 1, np.dtype("<u2")),
}
OTHERS = {9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"}
OTHERS |= {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S"}
OTHERS |= {22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
OTHERS |= {29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"}


class Gguf(NamedTuple):
    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]  # in torch's order: the one that varies fastest comes last
    get: Callable[[str], Tensor]  # a tensor by its name, read from the file when asked for, float32


def read_gguf(path: Path) -> Gguf:
    """Raises ValueError for a file that is damaged or of a kind that is not supported."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    data = np.memmap(path, np.uint8, mode="r")
    try:
        metadata, tensors = read_header(memoryview(data))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not supported: {printable(error)}") from None

    def get(name: str) -> Tensor:
        shape, layout, start, end = tensors[name]
        return torch.from_numpy(dequantise(data[start:end].view(layout)).reshape(shape))

    return Gguf(metadata, {name: shape for name, (shape, *_) in tensors.items()}, get)


def printable(error: ValueError) -> str:
    """Its message, in one line: what it quotes from a file could be anything."""
    return "".join(c if c.isprintable() else "?" for c in str(error))


class Cursor:
    """What comes next in the bytes of a file."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def take(self, size: int) -> memoryview:
        self.at += size
        if self.at > len(self.data):
            raise ValueError("it ends too early, or a length in it is wrong")
        return self.data[self.at - size : self.at]

    def number(self, letter: str) -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def text(self) -> str:
        return str(self.take(self.number("Q")), "utf-8")  # UnicodeDecodeError is a ValueError

    def value(self) -> Any:
        kind = self.number("I")
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.items(kind, 1)[0]
        kind, n = self.number("I"), self.number("Q")
        if kind == ARRAY or n > MOST_ITEMS:
            raise ValueError("it has an array of arrays, or one of more than 2**24 items")
        return [self.text() for _ in range(n)] if kind == TEXT else self.items(kind, n)

    def items(self, kind: int, n: int) -> list:
        if kind not in VALUES:
            raise ValueError(f"it has a value of the unknown type {kind}")
        found = np.frombuffer(self.take(n * struct.calcsize("<" + VALUES[kind])), np.uint8)
        if kind == BOOL and (found > 1).any():
            raise ValueError("it has a truth value that is neither 0 nor 1")
        return found.view("<" + VALUES[kind]).tolist()


def read_header(data: memoryview) -> tuple[dict[str, Any], dict[str, tuple]]:
    """(metadata, {tensor: (shape, layout of a block, where it starts, where it ends)})"""
    file = Cursor(data)
    if bytes(file.take(4)) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := file.number("I")) not in (2, 3):
        raise ValueError(f"its version is {version}, and only 2 and 3, little-endian, are known")
    n_tensors, n_pairs = file.number("Q"), file.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_pairs):  # a wrong number of them leads behind the end of the file
        if (key := file.text()) in metadata:
            raise ValueError(f"it has the key {key[:80]!r} twice")
        metadata[key] = file.value()
    tensors: dict[str, tuple] = {}
    expected = 0  # the offset of the next tensor: llama.cpp refuses gaps too
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment={str(alignment)[:80]} is no power of two")
    for _ in range(n_tensors):
        name, n_dims = file.text(), file.number("I")
        if name in tensors:
            raise ValueError(f"it has the tensor {name[:80]!r} twice")
        if not 1 <= n_dims <= 4:
            raise ValueError(f"{name[:80]!r} has {n_dims} dimensions, which must be 1 to 4")
        dims = [file.number("Q") for _ in range(n_dims)]
        kind, offset = file.number("I"), file.number("Q")
        if kind not in TYPES:
            raise ValueError(
                f"{OTHERS.get(kind, f'type {kind}')} is not supported: {name[:80]!r} is of it, and "
                f"only {', '.join(known for known, *_ in TYPES.values())} are"
            )
        _, block, layout = TYPES[kind]
        if dims[0] % block or not all(dims):
            raise ValueError(f"{name[:80]!r} cannot have the dimensions {dims}")
        if offset != expected:
            raise ValueError(f"{name[:80]!r} is at the offset {offset}, instead of {expected}")
        size = math.prod(dims) // block * layout.itemsize
        expected = -(-(offset + size) // alignment) * alignment
        tensors[name] = tuple(dims[::-1]), layout, offset, offset + size
    base = -(-file.at // alignment) * alignment
    for name, (shape, layout, start, end) in tensors.items():
        if base + end > len(data):
            raise ValueError(f"{name[:80]!r} of shape {shape} reaches behind its end")
        tensors[name] = shape, layout, base + start, base + end
    return metadata, tensors


def dequantise(blocks: np.ndarray) -> np.ndarray:
    """Blocks (n,) of one of the layouts of TYPES -> their weights, float32, in memory of its own"""
    parts = blocks.dtype.names
    if blocks.dtype.kind == "u":  # BF16 is the upper half of a float32
        return (blocks.astype(np.uint32) << 16).view(np.float32)
    if not parts:
        return blocks.astype(np.float32)
    if "q" in parts:
        q, middle = blocks["q"], 0
    else:
        q, middle = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1), 8
    if "fifth" in parts:
        q, middle = q | np.unpackbits(blocks["fifth"], axis=1, bitorder="little") << 4, 16
    weights = q.astype(np.float32)  # (n, 32)
    with np.errstate(all="ignore"):  # a scale may be infinite
        if "least" not in parts:
            weights -= middle
        weights *= blocks["scale"].astype(np.float32)[:, None]
        if "least" in parts:
            weights += blocks["least"].astype(np.float32)[:, None]
    return weights


def field(metadata: dict, key: str, kind: type, default: Any = None) -> Any:
    """The value of a key. Raises ValueError if it is of another type, or missing without default"""
    value = metadata.get(key, default)
    if value is None:
        raise ValueError(f"{key} is missing")
    if type(value) is not kind:
        raise ValueError(f"{key}={str(value)[:80]} is not of the type {kind.__name__}")
    return value
