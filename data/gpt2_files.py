"""GPT-2's own two files, vocab.bpe and encoder.json, and the characters in which they write bytes.

Hugging Face's files of byte-level tokenizers use the same characters.
"""

import json
from pathlib import Path

from bpe import END_OF_TEXT, GPT2_PATTERN, Tokenizer


def read_gpt2_files(vocab_bpe: str | Path, encoder_json: str | Path) -> Tokenizer:
    """The tokenizer of the two files; its ids are tiktoken's. Raises ValueError if the files are
    damaged or do not belong together.

    vocab.bpe lists the merges in order, encoder.json the ids; both write bytes as the characters of
    `byte_characters`.
    """
    byte_of = byte_characters()
    try:
        lines = Path(vocab_bpe).read_text(encoding="utf-8-sig").split("\n")[1:]  # no version
        names = [*byte_of, *(line.replace(" ", "") for line in lines if line)]
        ranks = {bytes([byte_of[c] for c in name]): i for i, name in enumerate(names)}
        ids = json.loads(Path(encoder_json).read_text(encoding="utf-8-sig"))
    except (KeyError, ValueError) as e:
        raise ValueError(f"{vocab_bpe}, {encoder_json}: not GPT-2's files ({e!r})") from None
    special_tokens = {END_OF_TEXT: len(names)}
    if ids != {name: i for i, name in enumerate(names)} | special_tokens:
        raise ValueError(f"{vocab_bpe} and {encoder_json} do not belong together: ids differ")
    return Tokenizer(ranks, GPT2_PATTERN, special_tokens, foreign=True)


def byte_characters() -> dict[str, int]:
    """{character: byte} in the order of the bytes' ids. A byte that is printable in Latin-1 is
    written as itself, the others as U+0100 and up."""
    byte_of = {chr(b): b for b in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]}
    n_printable = len(byte_of)
    for b in sorted(set(range(256)) - set(byte_of.values())):
        byte_of[chr(256 + len(byte_of) - n_printable)] = b
    return byte_of
