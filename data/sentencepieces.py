"""The two SentencePiece models and the one vocabulary of a Marian translator (opus-mt on the hub).

The package `sentencepiece` cuts a text into pieces by the model of its language, BPE or unigram;
"▁" in a piece stands for a space. The vocabulary, which both languages share, gives the ids of the
pieces: the ids inside the models mean nothing here. A piece that is not in the vocabulary is <unk>.
A text may begin with the language that it is to be translated into:

    ">>fra<< the cat"  ->  >>fra<<  ▁the  ▁c  at      >>…<< is one piece, or <unk>

Left out: training (the package's spm_train does it), separate vocabularies for the two languages,
sampled segmentations, and normalising texts, which the models do (NFKC, spaces).

Papers: Kudo and Richardson 2018, "SentencePiece" (arXiv:1808.06226); Kudo 2018, unigram
(arXiv:1804.10959); Tiedemann and Thottingal 2020, "OPUS-MT", whose files these are.
"""

from __future__ import annotations

import base64
import hashlib
import json
import operator
import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from bpe import END_OF_TEXT, unique_keys

FORMAT = 1  # of the JSON text
# The token before a target. Our own tokenizers have no such token: their end token serves.
START = "<|startoftext|>"
END_PIECE, UNK_PIECE, START_PIECE = "</s>", "<unk>", "<pad>"  # as the files call them
SPECIAL_PIECES = (END_PIECE, UNK_PIECE, START_PIECE)
MAX_TOKENS = 1 << 22
FILES = ("source.spm", "target.spm", "vocab.json")


class SentencePieces:
    """A tokenizer whose state is three plain values; everything else follows from them.

    source, target  the bytes of the models that cut sources and targets; they may be the same.
    pieces          the vocabulary: a piece's place is its id.
    special_tokens  the ids of </s> as END_OF_TEXT and of <pad> as START: Marian's decoder begins
                    with its padding. No text is encoded as one of these, not even their own names.
    """

    def __init__(self, source: bytes, target: bytes, pieces: list[str]):
        """Raises ValueError if a model is damaged, if the vocabulary lacks </s>, <unk> or <pad>, or
        if the package is missing."""
        _check_pieces(pieces)
        self.source, self.target, self.pieces, self.vocab_size = source, target, pieces, len(pieces)
        self._cut_source, self._cut_target = _load(source, FILES[0]), _load(target, FILES[1])
        ids = {piece: i for i, piece in enumerate(pieces)}
        self.special_tokens = {END_OF_TEXT: ids.pop(END_PIECE), START: ids.pop(START_PIECE)}
        self._ids, self._unknown = ids, ids[UNK_PIECE]

    def encode(self, text: str) -> list[int]:
        """Ids of a source, without </s>. Every str can be encoded."""
        return self._encode(text, self._cut_source)

    def encode_numpy(self, text: str) -> np.ndarray:
        """Ids of a source as a uint32 array."""
        return np.array(self.encode(text), dtype=np.uint32)

    def encode_target(self, text: str) -> np.ndarray:
        """Ids of a target as a uint32 array."""
        return np.array(self._encode(text, self._cut_target), dtype=np.uint32)

    def _encode(self, text: str, model: Any) -> list[int]:
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates become "?"
        code = re.match(">>.*?<<", text, re.DOTALL)
        pieces = [code[0]] if code else []
        pieces += model.encode(text[code.end() :] if code else text, out_type=str)
        return [self._ids.get(piece, self._unknown) for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a target, without </s>, <unk> and <pad>. Integers of any kind will do, also
        numpy's and torch's. Raises ValueError for an id that is not in the vocabulary."""
        skipped, pieces = {*self.special_tokens.values(), self._unknown}, []
        for i in map(operator.index, ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(
                    f"id {i} is no piece: the vocabulary ends at {self.vocab_size - 1}; "
                    "mask the ids that only pad the model's vocabulary before sampling"
                )
            if i not in skipped:
                pieces.append(self.pieces[i])
        # The model leaves "▁" in pieces that only the other language's model has.
        return self._cut_target.decode_pieces(pieces).replace("▁", " ").strip()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """decode(ids) in UTF-8."""
        return self.decode(ids).encode("utf-8")

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the state; data sets and checkpoints carry it, so that none are mixed up."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    # ---- files

    def to_json(self) -> str:
        """The state as JSON, with the models in base64. Equal tokenizers give equal text."""
        models = {"source": self.source, "target": self.target}
        state = {name: base64.b64encode(model).decode("ascii") for name, model in models.items()}
        state = {"format": FORMAT, "type": "SentencePiece", **state, "pieces": self.pieces}
        return json.dumps(state)

    @classmethod
    def from_json(cls, text: str) -> SentencePieces:
        """The tokenizer that to_json() wrote. Raises ValueError, in one sentence, for text that
        to_json() cannot have written."""
        try:
            state = json.loads(text, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"not a tokenizer: no JSON ({e})") from None
        kind = (FORMAT, "SentencePiece")
        if not isinstance(state, dict) or (state.get("format"), state.get("type")) != kind:
            raise ValueError(f"not a SentencePiece tokenizer of format {FORMAT}: {short(state)}")
        try:
            models = [base64.b64decode(state[name], validate=True) for name in ("source", "target")]
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"not a SentencePiece tokenizer: no models in base64 ({e})") from None
        return cls(*models, state.get("pieces"))

    def save(self, folder: Path) -> None:
        """Writes the three FILES of opus-mt."""
        vocab = json.dumps({piece: i for i, piece in enumerate(self.pieces)}, indent=2)
        for name, content in zip(FILES, (self.source, self.target, vocab.encode()), strict=True):
            (folder / name).write_bytes(content)


def _load(model: bytes, name: str) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError("this tokenizer needs sentencepiece: pip install sentencepiece") from error
    try:
        if not model:
            raise RuntimeError("it is empty")  # the package would complain only later
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"{name} is damaged: no model of SentencePiece ({error})") from None


def _check_pieces(pieces: Any) -> None:
    if not isinstance(pieces, list) or len(pieces) > MAX_TOKENS:
        raise ValueError(f"the vocabulary is no list of at most {MAX_TOKENS:,} pieces")
    for i, piece in enumerate(pieces):
        if not isinstance(piece, str) or re.search("[\ud800-\udfff]", piece):
            raise ValueError(f"piece {i} is {short(piece)}, no text")
    twice, n = Counter(pieces).most_common(1)[0] if pieces else (None, 0)
    if n > 1:
        raise ValueError(f"piece {short(twice)} occurs {n} times: each needs one id")
    if lacking := [name for name in SPECIAL_PIECES if name not in pieces]:
        raise ValueError(f"the {len(pieces):,} pieces have no {', '.join(lacking)}")
