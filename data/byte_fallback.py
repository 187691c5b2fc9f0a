"""SentencePiece's BPE on characters with byte fallback: the tokenizer of Llama 2, Mistral 7B v0.1
and TinyLlama.

A text gets "▁" for every space and one more in front. Its characters are the first pieces; one that
is no piece becomes the bytes of its UTF-8, so that nothing is ever unknown. Then neighbours are
merged, the pair of the lowest rank first, the leftmost of equals:

    "the té"  ->  ▁ t h e ▁ t <0xC3> <0xA9>  ->  ▁t he ▁t <0xC3> <0xA9>  ->  ▁the ▁t <0xC3> <0xA9>

Hugging Face's files say in two ways where the "▁" in front goes, which differ in " a" and "<s>a":

    legacy                  before each stretch of text between special tokens
    first, always, never    before the first stretch, each, none; but never before a space or "▁"

SentencePiece itself, which finds no special tokens in a text, does as the first. Decoding makes "▁"
a space and takes the one in front away; decode_bytes() keeps it, because tokens that are decoded
one by one would lose the spaces between words.

Left out: learning, pieces that users define, NFKC, tokens that take in the spaces beside them.

Papers: Kudo and Richardson 2018, "SentencePiece" (arXiv:1808.06226); Touvron et al. 2023, "LLaMA"
(arXiv:2302.13971, section 2.1).
"""

from __future__ import annotations

import json
import operator
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from heapq import heapify, heappop, heappush
from itertools import groupby, pairwise
from reprlib import repr as short
from typing import Any

import numpy as np

from bpe import CACHED_CHUNKS, Tokenizer, unique_keys

FORMAT = 1  # of the JSON text
SPACE, UNK, BOS = "▁", "<unk>", "<s>"
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
PREPENDS = ("legacy", "first", "always", "never")
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # pieces in a tokenizer.model; 4: defined by users
METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}


class ByteFallbackBPE:
    """Its state is five plain values; everything else follows from them.

    pieces          the vocabulary: a piece's place is its id.
    merges          pairs of ids, in the order of their ranks.
    special_tokens  text -> id of pieces that no merge touches; encode() produces them only where
                    the caller allows it by name.
    prepend         where "▁" goes, one of PREPENDS; see above.
    adds_bos        whether the model wants <s> before its texts. encode() does not add it.
    """

    def __init__(
        self,
        pieces: list[str],
        merges: list[tuple[int, int]],
        special_tokens: dict[str, int],
        prepend: str = "legacy",
        adds_bos: bool = True,
    ):
        """Raises ValueError for a state that cannot encode every text, and for a damaged one."""
        _check_pieces(pieces, special_tokens)
        if prepend not in PREPENDS or type(adds_bos) is not bool:
            raise ValueError(f"prepend={short(prepend)} or adds_bos={short(adds_bos)} is unknown")
        if adds_bos and BOS not in special_tokens:
            raise ValueError(f"adds_bos is true, but there is no special token {BOS}")
        self.pieces, self.special_tokens, self.vocab_size = pieces, special_tokens, len(pieces)
        self.prepend, self.adds_bos = prepend, adds_bos
        self._ids = {piece: i for i, piece in enumerate(pieces) if piece not in special_tokens}
        self._byte_ids = [self._ids.pop(name) for name in BYTES]
        self.bytes_of = {i: piece.replace(SPACE, " ").encode() for piece, i in self._ids.items()}
        self.bytes_of |= {i: bytes([byte]) for byte, i in enumerate(self._byte_ids)}
        self.bytes_of |= {i: name.encode() for name, i in special_tokens.items()}
        self._ranked = _ranked(merges, pieces, self._ids)
        self.merges = [*self._ranked]
        # Where no merge puts "▁" behind another character, no piece goes on from one word into the
        # next one. Then words can be merged one by one, and their ids be remembered.
        made = (pieces[new].lstrip(SPACE) for _, new in self._ranked.values())
        by_word = not any(SPACE in rest for rest in made)
        self._words = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+" if by_word else "(?s:.+)").findall
        self._cache: dict[str, list[int]] = {}

    # These are bpe.py's: they need no more than bytes_of, special_tokens, vocab_size and to_json().
    _encode_parts, decode_bytes = Tokenizer._encode_parts, Tokenizer.decode_bytes
    word_edges, shown = Tokenizer.word_edges, Tokenizer.shown
    hash, save = Tokenizer.hash, Tokenizer.save

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Ids of `text`, without <s>. Every str can be encoded; lone surrogates become "?".

        allowed_special names the special tokens whose text becomes their id ("all": all of them);
        the text of the others is encoded as ordinary text. Raises ValueError for an unknown name.
        """
        text = text.encode("utf-8", "replace").decode("utf-8")
        first = iter([True])  # the parts come in their order
        return self._encode_parts(
            text, allowed_special, lambda part: self._encode_part(part, next(first, False))
        )

    def encode_behind(self, text: str) -> list[int]:
        """Ids of `text`, which stands behind a special token: encode() takes it for the first."""
        return self._encode_part(text.encode("utf-8", "replace").decode("utf-8"), False)

    def encode_batch(
        self, texts: Iterable[str], allowed_special: Collection[str] = ()
    ) -> list[list[int]]:
        """encode() of each text."""
        return [self.encode(text, allowed_special) for text in texts]

    def encode_numpy(self, text: str) -> np.ndarray:
        """Ids of `text` without special tokens, as a uint32 array."""
        return np.array(self.encode(text), dtype=np.uint32)

    def _encode_part(self, text: str, first: bool) -> list[int]:
        text, ids, cache = text.replace(" ", SPACE), [], self._cache
        wanted = self.prepend == "always" or (self.prepend == "first" and first)
        if text and (self.prepend == "legacy" or (wanted and not text.startswith(SPACE))):
            text = SPACE + text
        for word in self._words(text):
            merged = cache.get(word)
            if merged is None:
                merged = self._merge(word)
                if len(cache) >= CACHED_CHUNKS:
                    cache.clear()
                if len(word) <= 64:
                    cache[word] = merged
            ids += merged
        return ids

    def _merge(self, word: str) -> list[int]:
        """Ids of one word. A heap holds every pair that can be merged, as (rank, place), and a
        linked list the pieces, so a word of n characters takes O(n log n)."""
        ids: list[int] = []
        for c in word:
            i = self._ids.get(c)
            ids += [self._byte_ids[byte] for byte in c.encode()] if i is None else [i]
        ranked, n = self._ranked, len(ids)
        heap = [(ranked[pair][0], p) for p, pair in enumerate(pairwise(ids)) if pair in ranked]
        heapify(heap)
        ids.append(-1)  # in no merge: the end of the word and, as ids[-1], its beginning
        following, before = list(range(1, n + 2)), list(range(-1, n))
        while heap:
            rank, p = heappop(heap)
            q = following[p]
            merge = ranked.get((ids[p], ids[q]))
            if merge is None or merge[0] != rank:
                continue  # one of the two has been merged with its other neighbour since
            ids[p], ids[q] = merge[1], -1
            following[p] = q = following[q]
            before[q] = p
            for left, right in ((before[p], p), (p, q)):
                if new := ranked.get((ids[left], ids[right])):
                    heappush(heap, (new[0], left))
        return [i for i in ids if i >= 0]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, without the space in front. Where neighbouring pieces of single bytes are
        not UTF-8 together, each becomes U+FFFD, as in Hugging Face's tokenizers. Raises ValueError
        for an unknown id."""
        parts = []
        for _, run in groupby(map(operator.index, ids), set(self._byte_ids).__contains__):
            data = self.decode_bytes(run)
            try:
                parts.append(data.decode("utf-8"))
            except UnicodeDecodeError:
                parts.append("\ufffd" * len(data))
        text = "".join(parts)
        return text if self.prepend == "never" else text.removeprefix(" ")

    def ordinary_ids(self) -> list[int]:
        """The ids of all pieces but the special tokens."""
        return sorted(self.bytes_of.keys() - set(self.special_tokens.values()))

    def to_json(self) -> str:
        """The state as JSON; equal tokenizers give equal text."""
        special = dict(sorted(self.special_tokens.items(), key=operator.itemgetter(1)))
        state = {"format": FORMAT, "type": "ByteFallbackBPE", "prepend": self.prepend}
        state |= {"adds_bos": self.adds_bos, "special_tokens": special, "pieces": self.pieces}
        return json.dumps({**state, "merges": self.merges})

    @classmethod
    def from_json(cls, text: str) -> ByteFallbackBPE:
        """What to_json() wrote; for anything else, a ValueError of one sentence."""
        try:
            state = json.loads(text, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"not a tokenizer: no JSON ({e})") from None
        kind = (FORMAT, "ByteFallbackBPE")
        if not isinstance(state, dict) or (state.get("format"), state.get("type")) != kind:
            raise ValueError(f"not a ByteFallbackBPE of format {FORMAT}: {short(state)}")
        names = ("pieces", "merges", "special_tokens", "prepend", "adds_bos")
        return cls(*(state.get(name) for name in names))

    # ---- Hugging Face's tokenizer.json, SentencePiece's tokenizer.model

    def to_tokenizer_json(self) -> dict[str, Any]:
        """The content of a tokenizer.json. There, the names of special tokens in a text become
        their ids, as encode(text, "all") does it, and <s> is put in front if adds_bos."""
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        special = sorted(self.special_tokens.items(), key=operator.itemgetter(1))
        legacy, bos = self.prepend == "legacy", self.special_tokens.get(BOS)
        space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        steps = [{"type": "Prepend", "prepend": SPACE}, space]
        back = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
        back += [{"type": "ByteFallback"}, {"type": "Fuse"}]
        if self.prepend != "never":
            back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": t, **plain, "special": True} for t, i in special],
            "normalizer": {"type": "Sequence", "normalizers": steps} if legacy else None,
            "pre_tokenizer": None if legacy else {**METASPACE, "prepend_scheme": self.prepend},
            "post_processor": _template(bos) if self.adds_bos else None,
            "decoder": {"type": "Sequence", "decoders": back},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": UNK if UNK in self.special_tokens else None,
                **dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix")),
                **{"fuse_unk": True, "byte_fallback": True, "ignore_merges": False},
                "vocab": {piece: i for i, piece in enumerate(self.pieces)},
                "merges": [[self.pieces[a], self.pieces[b]] for a, b in self.merges],
            },
        }

    @classmethod
    def from_tokenizer_json(cls, state: dict[str, Any]) -> ByteFallbackBPE:
        """The tokenizer that a parsed tokenizer.json describes. Every field that changes ids or
        texts is checked: ValueError names, in one sentence, the one that is not supported. (Those
        about <unk> change nothing, because all bytes must have pieces.)"""
        model = state.get("model") if isinstance(state.get("model"), dict) else {}
        only = {"type": "BPE", "byte_fallback": True, "dropout": None}
        only |= dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"))
        for field, value in only.items():
            if (model.get(field) or None) != value:
                raise ValueError(f"{field}={short(model.get(field))} is not supported")
        legacy, way = state.get("normalizer") is not None, state.get("pre_tokenizer")
        prepend = "legacy" if legacy or not isinstance(way, dict) else way.get("prepend_scheme")
        prepend = prepend if prepend in PREPENDS else "first"  # then the comparison below fails
        special = _added_tokens(state.get("added_tokens") or [], legacy)
        pieces, pairs = _listed(model.get("vocab"), model.get("merges"), special)
        framed, nothing, bos = state.get("post_processor"), _template(None), special.get(BOS)
        if isinstance(framed, dict):  # what is done to pairs of texts does not matter here
            framed = None if framed.get("single") == nothing["single"] else framed
            framed = framed and {**framed, "pair": _template(bos)["pair"]}
        adds_bos = bos is not None and framed == _template(bos)
        tokenizer = cls(pieces, pairs, special, prepend, adds_bos)
        found, ours = {**state, "post_processor": framed}, tokenizer.to_tokenizer_json()
        metaspace = {**METASPACE, "prepend_scheme": "always" if legacy else prepend}
        if found.get("decoder") in (metaspace, {**metaspace, "split": True}):
            found["decoder"] = ours["decoder"]  # theirs would show the names of single bytes
        for field in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if found.get(field) != ours[field]:
                raise ValueError(f"{field}={short(state.get(field))} is not supported")
        if model.get("ignore_merges"):  # then a stretch of text that is a piece is not cut
            whole = SPACE if prepend in ("legacy", "always") else ""
            for i, piece in enumerate(pieces):
                if piece.startswith(whole) and tokenizer._merge(piece) != [i]:
                    raise ValueError(f"ignore_merges=true is not supported: {short(piece)} differs")
        return tokenizer

    @classmethod
    def from_sentencepiece(cls, data: bytes, prepend: str = "legacy") -> ByteFallbackBPE:
        """The tokenizer in the content of a tokenizer.model. Its pieces have scores: each way to
        make a piece of two others becomes a merge, in the order of transformers'
        generate_merges(vocab, scores): higher scores first, then longer first parts. (Its
        LlamaTokenizer 5 goes by ids, and so cuts runs of spaces otherwise than SentencePiece.)
        Raises ValueError, in one sentence, for a file that is damaged or does something else."""
        try:
            found, settings = _read_model(data)
        except (IndexError, TypeError, ValueError, struct.error) as e:
            raise ValueError(f"no model of SentencePiece, or a damaged one ({e})") from None
        for name, (value, only) in settings.items():
            if value != only:
                raise ValueError(f"{name}={short(value)} is not supported, only {only!r} is")
        for piece, score, kind in found:
            usual = kind in (NORMAL, UNKNOWN, CONTROL) and piece not in BYTES and score == score
            if not (usual or (kind == BYTE and piece in BYTES)):
                raise ValueError(f"piece {short(piece)} of the kind {kind} is not supported")
        ids = {piece: i for i, (piece, _, kind) in enumerate(found) if kind == NORMAL}
        splits = [
            (-found[i][1], -at, at - len(piece), i, (ids[piece[:at]], ids[piece[at:]]))
            for piece, i in ids.items()
            for at in range(1, len(piece))
            if piece[:at] in ids and piece[at:] in ids
        ]
        special = {p: i for i, (p, _, kind) in enumerate(found) if kind in (UNKNOWN, CONTROL)}
        pairs = [pair for *_, pair in sorted(splits)]
        return cls([piece for piece, *_ in found], pairs, special, prepend, BOS in special)


# ---- tokenizer.json ------------------------------------------------------------------------------


def _template(bos: int | None) -> dict[str, Any]:
    """The post_processor that puts <s>, with this id, before each text; of None: nothing."""
    first, second = ([{"Sequence": {"id": name, "type_id": i}}] for i, name in enumerate("AB"))
    if bos is not None:
        first, second = (
            [{"SpecialToken": {"id": BOS, "type_id": i}}, *text]
            for i, text in enumerate((first, second))
        )
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {BOS: {"id": BOS, "ids": [bos], "tokens": [BOS]}},
    }


def _added_tokens(added: Any, legacy: bool) -> dict[str, int]:
    """text -> id of the tokens that are looked for in a text before it is cut, special or not."""
    special: dict[str, int] = {}
    for token in added if isinstance(added, list) else [added]:
        name, i = (token.get(k) if isinstance(token, dict) else None for k in ("content", "id"))
        if not isinstance(name, str) or type(i) is not int or special.setdefault(name, i) != i:
            raise ValueError(f"added_tokens: {short(token)} has no text, or not one id")
        # Of a normalized one, "▁<s>" would be looked for where the normalizer is not null.
        for field in ("single_word", "lstrip", "rstrip", *["normalized"] * legacy):
            if token.get(field):
                raise ValueError(f"added_tokens: {field} of {short(name)} is not supported")
    return special


def _listed(
    vocab: Any, merges: Any, special: dict[str, int]
) -> tuple[list[str], list[tuple[int, int]]]:
    """(pieces, merges) as ByteFallbackBPE has them."""
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError("vocab is no mapping of pieces to ids, or merges is no list")
    if any(type(i) is not int for i in vocab.values()):
        raise ValueError("vocab: not every id is an integer")
    pieces = sorted(vocab, key=vocab.get)
    pieces += sorted(special.keys() - vocab.keys(), key=special.get)
    ids, pairs = {piece: i for i, piece in enumerate(pieces)}, []
    for name, i in [*vocab.items(), *special.items()]:
        if ids[name] != i:
            raise ValueError(f"{short(name)} has the id {i}, but counted from 0 it is {ids[name]}")
    for number, merge in enumerate(merges, 1):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        try:
            first, second = pair if isinstance(pair, list) else ()
            pairs.append((ids[first], ids[second]))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"merge {number:,}, {short(merge)}, is not of two pieces") from None
    return pieces, pairs


# ---- tokenizer.model -----------------------------------------------------------------------------


def _read_model(data: bytes) -> tuple[list[tuple[str, float, int]], dict[str, tuple[Any, Any]]]:
    """([(piece, score, kind), …], {setting: (its value, the supported one)}). The numbers of the
    fields are those of sentencepiece_model.proto."""
    model, pieces = _fields(data), []
    if not model[1]:
        raise ValueError("no pieces")
    for message in model[1]:
        name, score, kind = (_fields(message)[number] for number in (1, 2, 3))
        (score,) = struct.unpack("<f", score[-1])
        pieces.append((str(name[-1], "utf-8"), score, [NORMAL, *kind][-1]))
    trainer, normalizer = _fields(b"".join(model[2])), _fields(b"".join(model[3]))
    return pieces, {
        "model_type": ({1: "unigram", 2: "bpe"}.get([1, *trainer[3]][-1]), "bpe"),
        "byte_fallback": ([0, *trainer[35]][-1], 1),
        "treat_whitespace_as_suffix": ([0, *trainer[24]][-1], 0),
        "precompiled_charsmap": ([b"", *normalizer[2]][-1], b""),
        "add_dummy_prefix": ([1, *normalizer[3]][-1], 1),
        "remove_extra_whitespaces": ([1, *normalizer[4]][-1], 0),
        "escape_whitespaces": ([1, *normalizer[5]][-1], 1),
    }


def _fields(data: bytes) -> dict[int, list]:
    """number -> values of the fields of a protobuf message: integers, and all others as bytes."""
    found, at = defaultdict(list), 0

    def integer() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            value, at = value | (data[at] & 127) << shift, at + 1
            if data[at - 1] < 128:
                return value
        raise ValueError("an integer without end")

    while at < len(data):
        number, kind = divmod(integer(), 8)
        size = {1: 8, 5: 4}.get(kind) or integer()
        if kind == 0:
            found[number].append(size)
            continue
        if kind not in (1, 2, 5) or at + size > len(data):
            raise ValueError("a field without end")
        found[number].append(data[at : at + size])
        at += size
    return found


# ---- what is checked -----------------------------------------------------------------------------


def _check_pieces(pieces: Any, special_tokens: Any) -> None:
    if not isinstance(pieces, list) or not isinstance(special_tokens, dict):
        raise ValueError("pieces is no list, or special_tokens no mapping of text to id")
    for i, piece in enumerate(pieces):
        if not isinstance(piece, str) or not piece or re.search("[\ud800-\udfff]", piece):
            raise ValueError(f"piece {i} is {short(piece)}, which is empty or no text")
    twice, n = Counter(pieces).most_common(1)[0] if pieces else ("", 0)
    if n > 1:
        raise ValueError(f"piece {short(twice)} occurs {n} times: each needs one id")
    for name, i in special_tokens.items():
        if type(i) is not int or not 0 <= i < len(pieces) or pieces[i] != name:
            raise ValueError(f"special token {short(name)} is not the piece of its id, {short(i)}")
    if missing := BYTES.keys() - (set(pieces) - special_tokens.keys()):
        raise ValueError(f"of the 256 bytes, {len(missing)} have no piece, such as {min(missing)}")


def _ranked(
    merges: Any, pieces: list[str], ids: dict[str, int]
) -> dict[tuple[int, int], tuple[int, int]]:
    """pair -> (rank, id of the piece that it makes); all of them are in `ids`."""
    if not isinstance(merges, list):
        raise ValueError("merges is no list of pairs of ids")
    ranked: dict[tuple[int, int], tuple[int, int]] = {}
    ordinary = set(ids.values())
    for rank, merge in enumerate(merges):
        pair = tuple(merge) if isinstance(merge, list | tuple) else ()
        if len(pair) != 2 or any(type(i) is not int or i not in ordinary for i in pair):
            raise ValueError(f"merge {rank + 1:,}, {short(merge)}, is not of two ordinary pieces")
        a, b = (pieces[i] for i in pair)
        if a + b not in ids or pair in ranked:
            raise ValueError(f"merge {rank + 1:,}, {short((a, b))}, makes no piece or comes twice")
        ranked[pair] = (rank, ids[a + b])
    return ranked
