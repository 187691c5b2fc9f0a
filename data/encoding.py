"""A text as an encoder reads it: its ids, between [CLS] and [SEP]."""

import numpy as np

from data.tokens import AnyTokenizer
from wordpiece import WordPiece

PAD, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")


def encode_text(tokenizer: AnyTokenizer, text: str) -> list[int]:
    """The ids of a text as BERT reads it, without [CLS] and [SEP]. For byte-level tokens, white
    space is collapsed and a space put in front, so that a word has the same ids wherever it stands;
    WordPiece does that itself. The names of special tokens are treated like any other text."""
    if isinstance(tokenizer, WordPiece):
        return tokenizer.encode(text)
    text = " ".join(text.split())
    return tokenizer.encode(f" {text}") if text else []


def assemble(parts: list[np.ndarray], cls: int, sep: int) -> tuple[np.ndarray, np.ndarray]:
    """[CLS] a [SEP], or [CLS] a [SEP] b [SEP] -> (ids, segments), both (T,)."""
    ids = np.concatenate([[cls], *(x for part in parts for x in (part, [sep]))])
    segments = np.repeat(np.arange(len(parts)), [len(part) + 1 for part in parts])
    return ids, np.concatenate([[0], segments])
