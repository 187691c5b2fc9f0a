"""Byte-level byte-pair encoding (BPE): text to token ids and back.

A text is cut into chunks (roughly: words with the space before them) by a regular expression, a
chunk starts as its UTF-8 bytes, and the most frequent pair of neighbours inside chunks becomes a
new token, again and again. Because all 256 bytes are tokens, nothing is ever "unknown".

Worked example: learn three merges from the text "banana bandana", chunks "banana" and " bandana".

    count the pairs     a+n 4, n+a 3, b+a 2, others 1   merge a+n      -> id 256 "an"
    b an an a | _ b an d an a
    count again         b+an 2, an+a 2, others 1        a tie: the lower pair of ids wins;
                        (98, 256) < (256, 97)           merge b+an     -> id 257 "ban"
    ban an a | _ ban d an a
    count again         an+a 2, others 1                merge an+a     -> id 258 "ana"
    ban ana | _ ban d ana                               14 bytes have become 6 tokens:
                                                        [257, 258, 32, 257, 100, 258]

The file begins with the slow and obvious form of all this (the three `naive` functions). The fast
learning and the Tokenizer follow; tests compare them with it. `python bpe.py` shows an example.
The file needs numpy, regex, tiktoken and tqdm.

A training run does not execute everything here. encode() lets tiktoken's core, in Rust, do what
encode_python() spells out with the same result: to make a run use the readable path, let
Tokenizer._rust_can_split return False. And make_splitter and count_chunks are names to which faster
functions may be assigned when a program starts.

Two special cases need no code of their own: CHAR_PATTERN makes each character a chunk, which gives
one token per character; and a vocabulary of 256 plus the special tokens is plain bytes.

Left out: learning from normalised text (NFC, lower case), merges across chunks, WordPiece and
Unigram, dropout.

Papers: Sennrich, Haddow and Birch 2016, "Neural Machine Translation of Rare Words with Subword
Units" (arXiv:1508.07909); Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners" (GPT-2, section 2.2: bytes, and no merges across character categories).
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

# The splits of GPT-2 and GPT-4, equal to tiktoken's. `++` never gives back what it has matched, and
# `\s+(?!\S)` leaves the last space of a run to the word behind it.
GPT2_PATTERN = r"'(?:[dmst]|ll|re|ve)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT4_PATTERN = (
    r"'(?i:[dmst]|ll|re|ve)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
CHAR_PATTERN = r"(?s:.)"
PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN, "char": CHAR_PATTERN}
END_OF_TEXT = "<|endoftext|>"  # the special token between documents
FORMAT = 1  # of the JSON file
LONG_RUN = 200_000  # white-space characters; see Tokenizer._rust_can_split
CACHED_CHUNKS = 1 << 16  # chunks whose ids the Python path remembers

Pair = tuple[int, int]


# ---- the slow and obvious form -------------------------------------------------------------------


def naive_learn_merges(
    texts: Iterable[str], n_merges: int, pattern: str = GPT2_PATTERN
) -> list[Pair]:
    """The pairs of ids that become the tokens 256, 257, …; all pairs are counted anew for each."""
    chunks = [chunk for text in texts for chunk in regex.findall(pattern, text)]
    rows = [list(chunk.encode("utf-8", "surrogatepass")) for chunk in chunks]
    merges: list[Pair] = []
    while len(merges) < n_merges:
        counts = Counter(pair for row in rows for pair in pairwise(row))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        rows = [naive_merge(row, best, 256 + len(merges)) for row in rows]
        merges.append(best)
    return merges


def naive_merge(ids: list[int], pair: Pair, new: int) -> list[int]:
    """The ids with `new` in place of each occurrence of the pair, from the left."""
    out: list[int] = []
    for i in ids:
        if out and (out[-1], i) == pair:
            out[-1] = new
        else:
            out.append(i)
    return out


def naive_encode(text: str, merges: list[Pair], pattern: str = GPT2_PATTERN) -> list[int]:
    """The ids of the text: each merge, in the order learnt, is applied to each chunk."""
    out = []
    for chunk in regex.findall(pattern, text):
        ids = list(chunk.encode("utf-8", "surrogatepass"))
        for i, pair in enumerate(merges):
            ids = naive_merge(ids, pair, 256 + i)
        out += ids
    return out


# ---- learning, fast ------------------------------------------------------------------------------


def plain_splitter(pattern: str) -> Callable[[str], list[str]]:
    """The function that cuts a text into its chunks."""
    return regex.compile(pattern).findall


def plain_count_chunks(texts: Iterable[str], pattern: str) -> Counter[str]:
    """How often each chunk occurs. No chunk spans two texts; memory holds distinct chunks only."""
    return Counter(chain.from_iterable(map(make_splitter(pattern), texts)))


# Two names to which a program may assign something faster, once, when it starts. A splitter must be
# picklable: a Tokenizer keeps its own, also when it is sent to a worker process.
make_splitter = plain_splitter  # or one that uses `re`, which is three times as fast
count_chunks = plain_count_chunks  # or one that counts on all cores


def learn_merges(chunks: dict[str, int], n_merges: int, progress: bool = False) -> list[bytes]:
    """The bytes of each new token, in the order learnt; fewer than n_merges if pairs run out.

    All chunks lie end to end in flat lists, each a linked list of tokens, so that a merge costs
    time only where its pair occurs: `ids[p]` is the token that starts at p, or -1 where none does
    (inside a token, and between chunks); `following` and `before` lead to its neighbours.
    """
    ids, weight = [-1], [0]
    for chunk, n in chunks.items():
        data = chunk.encode("utf-8", "surrogatepass")
        ids += [*data, -1]
        weight += [n] * (len(data) + 1)
    # All lists share one object for each number, which saves 64 bytes a place against ranges.
    numbers = list(range(-1, len(ids) + 1))
    following, before = numbers[2:], numbers[: len(ids)]

    # A token that starts at p can only grow, so a pair gets each of its places once, in rising
    # order. Places are never taken out: a visit finds out whether one is out of date.
    places: dict[Pair, list[int]] = defaultdict(list)
    for p, pair in enumerate(pairwise(ids), 1):
        places[pair].append(numbers[p])
    count = {pair: sum([weight[p] for p in at]) for pair, at in places.items() if min(pair) >= 0}

    # A lazy heap, one entry per pair. The count of a pair can only fall, so an entry that is out of
    # date is still an upper bound; when it comes up, it goes back with the right count.
    heap = [(-n, pair) for pair, n in count.items()]
    heapify(heap)
    tokens = [bytes([i]) for i in range(256)]
    bar = tqdm(total=n_merges, desc="merges", disable=None if progress else True)
    while heap and len(tokens) < 256 + n_merges:
        n, pair = heappop(heap)
        if -n != count[pair]:
            if count[pair]:
                heappush(heap, (-count[pair], pair))
            else:
                del count[pair], places[pair]
            continue
        a, b = pair
        new = len(tokens)
        tokens.append(tokens[a] + tokens[b])
        left_places: dict[int, list[int]] = defaultdict(list)  # token before -> where it starts
        right_places: dict[int, list[int]] = defaultdict(list)  # token behind -> where `new` starts
        for p in places.pop(pair):
            q = following[p]
            if ids[p] != a or ids[q] != b:
                continue
            left, right = before[p], following[q]
            left_places[ids[left]].append(left)
            right_places[ids[right]].append(p)
            ids[p], ids[q] = new, -1
            following[p], before[right] = right, p
        # x+a has become x+new, and b+y new+y: what the new pair gains, the old one loses. The right
        # side is counted before the left: in "abab", the first ab makes new+a, the second ends it.
        gains = [((new, y), (b, y), at) for y, at in right_places.items() if y >= 0]
        gains += [((x, new), (x, a), at) for x, at in left_places.items() if x >= 0]
        for gained, lost, at in gains:
            n = sum([weight[p] for p in at])
            places[gained], count[gained] = at, n
            count[lost] -= n
            heappush(heap, (-n, gained))
        del count[pair]
        bar.update()
    bar.close()
    return tokens[256:]


# ---- encoding and decoding -----------------------------------------------------------------------


class Tokenizer:
    """Its state is five plain values; everything else follows from them.

    ranks           token bytes -> id. A token of a lower id is merged earlier, as in tiktoken. The
                    pair of a merge need not be stored: as long as no token crosses its borders, a
                    byte string goes through the same merges wherever it stands, so training
                    cannot make the same bytes from two different pairs.
    pattern         the regular expression that cuts text into chunks. It must match every
                    character: what lies between two matches is lost.
    special_tokens  text -> id; encode() produces them only where the caller allows it by name. Two
                    may share an id, as in o200k_harmony.
    foreign         whether somebody else's ids are wanted (GPT-2's, a hub's): then characters that
                    are newer than this Python's Unicode are letters where tiktoken has them so,
                    otherwise, as in learning, where the `regex` module does. And then some bytes
                    may have no token: they are left out of what is encoded, as Hugging Face's
                    library does it (SmolLM2's lacks 21 that are rare or in no valid text).
    nfc             whether text is brought into Unicode's composed form first, as Qwen's is. Then
                    decode(encode(text)) is that form of the text.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        pattern: str,
        special_tokens: dict[str, int],
        foreign: bool = False,
        nfc: bool = False,
    ):
        """Raises ValueError for a state that cannot encode every text or decode every id."""
        _check_state(ranks, pattern, special_tokens, foreign)
        for name, value in (("foreign", foreign), ("nfc", nfc)):
            if type(value) is not bool:
                raise ValueError(f"{name}={value!r} is neither True nor False")
        self.ranks, self.pattern, self.special_tokens = ranks, pattern, special_tokens
        self.foreign, self.nfc = foreign, nfc
        self.bytes_of = {i: token for token, i in ranks.items()}
        for text, i in special_tokens.items():  # of two names for one id, the first is decoded
            self.bytes_of.setdefault(i, text.encode("utf-8"))
        self.vocab_size = max(self.bytes_of) + 1  # cl100k_base, for one, has unused ids below this
        self._lost = bytes(b for b in range(256) if bytes([b]) not in ranks)
        self._split = make_splitter(pattern)
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        pattern: str = GPT2_PATTERN,
        special_tokens: Collection[str] = (END_OF_TEXT,),
        progress: bool = False,
    ) -> Tokenizer:
        """Learns vocab_size - 256 - len(special_tokens) merges; special tokens get the last ids.

        The most frequent pair is merged first; of equally frequent ones, the lowest pair of ids.
        `texts` is streamed. When no pair is left, the vocabulary stays smaller than vocab_size. The
        text of a special token inside `texts` is text like any other. Raises ValueError for
        settings that are out of range.
        """
        for name, value in (("texts", texts), ("special_tokens", special_tokens)):
            if isinstance(value, str):
                raise ValueError(f"{name} is one str, not several: pass a list of them")
        n_special = len(special_tokens)
        if len(set(special_tokens)) < n_special:
            raise ValueError(f"special_tokens={special_tokens}: name each only once")
        n_merges = count_merges(vocab_size, n_special)
        tokens = [bytes([i]) for i in range(256)]
        special = {text: 256 + n_merges + i for i, text in enumerate(special_tokens)}
        # Checked now rather than after minutes of learning.
        _check_state(dict(zip(tokens, range(256), strict=True)), pattern, special)
        if n_merges:
            quiet = None if progress else True  # None: no bar where there is no terminal
            texts = tqdm(texts, desc="splitting", unit=" texts", disable=quiet)
            tokens += learn_merges(count_chunks(texts, pattern), n_merges, progress)
        special = {text: len(tokens) + i for i, text in enumerate(special_tokens)}
        return cls({token: i for i, token in enumerate(tokens)}, pattern, special)

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Ids of `text`. decode(encode(text)) == text for every str, lone surrogates included
        (without nfc, or bytes that have no token).

        allowed_special names the special tokens whose text becomes their id ("all": all of them);
        the text of the others is encoded as ordinary text. Raises ValueError for an unknown name.
        """
        return self._encode_parts(text, allowed_special, self._encode_rust)

    def encode_python(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """The same ids as encode(), without tiktoken: read this to see how encoding works. (With
        foreign, other ids where a character is newer than this Python's Unicode.)"""
        return self._encode_parts(text, allowed_special, self._encode_chunks)

    def _encode_parts(self, text: str, allowed: Collection[str], ordinary: Callable) -> list[int]:
        """The allowed special tokens become their ids; `ordinary` encodes what is between them."""
        if isinstance(allowed, str):
            allowed = self.special_tokens if allowed == "all" else [allowed]
        for name in allowed:
            if name not in self.special_tokens:
                known = f"this tokenizer has {list(self.special_tokens)}"
                raise ValueError(f"allowed_special: {name!r} is unknown, {known}")
        if not allowed:
            return ordinary(text)
        # The longest name is tried first: otherwise "<|a|>" would hide "<|a|>b".
        names = sorted(allowed, key=len, reverse=True)
        ids = []
        for i, part in enumerate(re.split(f"({'|'.join(map(re.escape, names))})", text)):
            ids += [self.special_tokens[part]] if i % 2 else ordinary(part)
        return ids

    def encode_batch(
        self, texts: Iterable[str], allowed_special: Collection[str] = ()
    ) -> list[list[int]]:
        """encode() of each text, in threads: the Rust core works outside Python's lock."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(lambda text: self.encode(text, allowed_special), texts))

    def encode_numpy(self, text: str) -> np.ndarray:
        """Ids of `text` without special tokens, as a uint32 array that may be read-only."""
        text = self._normalized(text)
        if self._rust_can_split(text):
            return self._rust.encode_to_numpy(text, disallowed_special=())
        return np.array(self._encode_chunks(text), dtype=np.uint32)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes. decode_bytes(encode_bytes(data)) == data.

        What is valid UTF-8 is encoded as text; each run of bytes that is not makes one chunk.
        """
        ids = []
        # surrogateescape turns each invalid byte, and nothing else, into one of U+DC80..U+DCFF.
        text = data.decode("utf-8", "surrogateescape")
        for i, part in enumerate(re.split("([\udc80-\udcff]+)", text)):
            invalid = part.encode("utf-8", "surrogateescape") if i % 2 else b""
            invalid = invalid.translate(None, self._lost)
            ids += self._merge(invalid) if invalid else self.encode(part)
        return ids

    def _normalized(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def _encode_rust(self, text: str) -> list[int]:
        text = self._normalized(text)
        can = self._rust_can_split(text)
        return self._rust.encode_ordinary(text) if can else self._encode_chunks(text)

    def _rust_can_split(self, text: str) -> bool:
        r"""Whether tiktoken accepts this text and cuts it where it should be cut.

        Four kinds of text stay in Python. What has bytes without a token, of which tiktoken knows
        nothing. Lone surrogates are not UTF-8. Characters newer than
        this Python's Unicode may be letters to one engine and unassigned to the other (17,480 are,
        with regex 2026.11 and tiktoken 0.14), and what was learnt with `regex` is cut by it; but
        foreign ids are those of tiktoken, which Hugging Face's library equals here. And the
        backtracking of `\s+(?!\S)` ends in a Rust panic somewhere between 600,000 and 1,000,000
        white-space characters in a row.
        """
        if self._lost:
            data = text.encode("utf-8", "surrogatepass")
            if len(data.translate(None, self._lost)) < len(data):
                return False
        # Every run of twice LONG_RUN fills one of these slices.
        for i in range(0, len(text) - LONG_RUN, LONG_RUN):
            if text[i : i + LONG_RUN].isspace():
                return False
        if text.isascii():
            return True
        python = ("Cs",) if self.foreign else ("Cn", "Cs")
        return not any(unicodedata.category(c) in python for c in beyond_ascii(text))

    def _encode_chunks(self, text: str) -> list[int]:
        ids, cache = [], self._cache
        for chunk in self._split(self._normalized(text)):
            merged = cache.get(chunk)
            if merged is None:
                data = chunk.encode("utf-8", "surrogatepass").translate(None, self._lost)
                merged = self._merge(data)
                if len(cache) >= CACHED_CHUNKS:
                    cache.clear()
                if len(chunk) <= 64:
                    cache[chunk] = merged
            ids += merged
        return ids

    def _merge(self, data: bytes, below: float = float("inf")) -> list[int]:
        """Ids of one chunk: merges the pair of the lowest rank, the leftmost of equals, until no
        pair is a token. With `below`, only tokens of a lower rank are used.

        A heap holds every mergeable pair as (rank, start, end), and a linked list the tokens, so a
        chunk of n bytes takes O(n log n).
        """
        ranks, n = self.ranks, len(data)
        if ranks.get(data, below) < below:
            return [ranks[data]]
        following = list(range(1, n + 1))  # where the token that starts here ends; n: none starts
        before = list(range(-1, n - 1))
        ranked = [(ranks.get(data[i : i + 2], below), i, i + 2) for i in range(n - 1)]
        heap = [pair for pair in ranked if pair[0] < below]
        heapify(heap)

        def offer(start: int, end: int) -> None:
            rank = ranks.get(data[start:end], below)
            if rank < below:
                heappush(heap, (rank, start, end))

        while heap:
            _, start, end = heappop(heap)
            middle = following[start]
            if middle == n or following[middle] != end:
                continue  # one of the two has been merged with its other neighbour since
            following[start], following[middle] = end, n
            if start > 0:
                offer(before[start], end)
            if end < n:
                before[end] = start
                offer(start, following[end])
        ids, start = [], 0
        while start < n:
            ids.append(ranks[data[start : following[start]]])
            start = following[start]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; surrogates come back, and other bytes that are not UTF-8 become U+FFFD."""
        data = self.decode_bytes(ids)
        # The bytes of a surrogate occur in no valid UTF-8, so cutting there splits nothing.
        parts = re.split(rb"(\xed[\xa0-\xbf][\x80-\xbf])", data)
        how = ("replace", "surrogatepass")
        return "".join([part.decode("utf-8", how[i % 2]) for i, part in enumerate(parts)])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`, integers of any kind (Python's, numpy's, torch's). Raises ValueError for
        an unknown id."""
        try:
            return b"".join([self.bytes_of[operator.index(i)] for i in ids])
        except KeyError as e:
            raise ValueError(
                f"id {e} is no token: the vocabulary ends at {self.vocab_size - 1}; "
                "mask the ids that only pad the model's vocabulary before sampling"
            ) from None

    def ordinary_ids(self) -> list[int]:
        """The ids of all tokens but the special ones."""
        return sorted(self.ranks.values())

    def word_edges(self, i: int) -> tuple[bool, bool]:
        """Whether a word could go on before this token, and whether behind it: where the token has
        a letter, a mark, a digit or part of a character at that end."""
        text = self.bytes_of[i].decode("utf-8", "replace")  # U+FFFD for a part of a character
        return tuple(
            unicodedata.category(c)[0] in "LMN" or c == "\ufffd" for c in (text[0], text[-1])
        )

    def shown(self, i: int) -> str:
        """The token as people read it. Most words begin with their space; a token without one goes
        on with the word before it, and gets "##" in front."""
        text = self.bytes_of[i].decode("utf-8", "replace")
        word = text.strip() or "␣"
        word = word if word.isprintable() else ascii(word)[1:-1]  # half-trained models write such
        return word if text.startswith(" ") else f"##{word}"

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pair of each merge, in order: the two tokens that the bytes of the new token would be
        without it. Raises ValueError where they are not two."""
        pairs = []
        for token, rank in _by_id(self.ranks):
            if len(token) > 1:
                parts = [self.bytes_of[i] for i in self._merge(token, below=rank)]
                if len(parts) != 2:
                    raise ValueError(f"token {token!r} (id {rank}) is not a pair of earlier tokens")
                pairs.append((parts[0], parts[1]))
        return pairs

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the state: data sets and checkpoints carry it, so that none are mixed up."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The state as JSON; equal tokenizers give equal text. Bytes are Latin-1 characters."""
        state = {
            "format": FORMAT,
            "pattern": self.pattern,
            "special_tokens": dict(_by_id(self.special_tokens)),
            "ranks": {token.decode("latin-1"): i for token, i in _by_id(self.ranks)},
        }
        # Left out where they are false, so that the hash of what was learnt stays what it was.
        more = {"foreign": self.foreign, "nfc": self.nfc}
        return json.dumps(state | {name: True for name, value in more.items() if value})

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """What to_json() wrote; for anything else, a ValueError of one sentence."""
        try:
            state = json.loads(text, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"not a tokenizer: no JSON ({e})") from None
        keys = ["format", "pattern", "special_tokens", "ranks"]
        if not isinstance(state, dict) or not state.keys() >= set(keys):
            raise ValueError(f"not a tokenizer: the keys {keys} are needed")
        if state["format"] != FORMAT:
            raise ValueError(
                f"tokenizer format {state['format']!r} is not {FORMAT}, the only one known here: "
                "update the code, or train the tokenizer again"
            )
        if not isinstance(state["ranks"], dict):
            raise ValueError("not a tokenizer: ranks is no mapping of tokens to ids")
        try:
            ranks = {token.encode("latin-1"): i for token, i in state["ranks"].items()}
        except UnicodeEncodeError as e:
            raise ValueError(f"token {e.object!r} is not written as Latin-1 characters") from None
        more = (state.get(name, False) for name in ("foreign", "nfc"))
        return cls(ranks, state["pattern"], state["special_tokens"], *more)

    def save(self, path: str | Path) -> None:
        """Writes beside `path`, then renames, so that an interruption leaves the old file whole."""
        path = Path(path)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(self.to_json(), encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """What save() wrote; for any other file, a ValueError that names the path."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8-sig"))
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None

    def to_tiktoken(self) -> tiktoken.Encoding:
        return self._rust

    @cached_property
    def _rust(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            f"bpe-{self.hash[:8]}",
            pat_str=self.pattern,
            mergeable_ranks=self.ranks,
            special_tokens=self.special_tokens,
        )

    @classmethod
    def from_tiktoken(cls, encoding: tiktoken.Encoding) -> Tokenizer:
        # tiktoken has no public names for these three.
        ranks, special_tokens = encoding._mergeable_ranks, encoding._special_tokens
        return cls(dict(ranks), encoding._pat_str, dict(special_tokens), foreign=True)


def count_merges(vocab_size: int, n_special: int) -> int:
    """How many merges a vocabulary holds; ValueError where bytes and special tokens do not fit."""
    n_merges = vocab_size - 256 - n_special
    if n_merges < 0:
        raise ValueError(
            f"vocab_size={vocab_size} cannot hold 256 bytes and {n_special} special tokens: "
            f"choose at least {256 + n_special}"
        )
    return n_merges


def beyond_ascii(text: str) -> set[str]:
    """The characters of the text that are not ASCII, at eight times the speed of set(text)."""
    data = text.encode("utf-8", "surrogatepass").translate(None, bytes(range(128)))
    return set(data.decode("utf-8", "surrogatepass"))


def _by_id(ids: dict[Any, int]) -> list[tuple[Any, int]]:
    return sorted(ids.items(), key=operator.itemgetter(1))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _check_state(ranks: Any, pattern: Any, special_tokens: Any, foreign: bool = False) -> None:
    try:
        split = regex.compile(pattern)
    except (regex.error, TypeError) as e:
        raise ValueError(f"pattern={pattern!r} is not a regular expression: {e}") from None
    # findall() returns the groups where there are any, and a chunk has at least one byte.
    if not isinstance(pattern, str) or split.groups or split.fullmatch(""):
        raise ValueError(f"pattern={pattern!r} has a group, write (?:...), or matches nothing")
    if not isinstance(special_tokens, dict):
        raise ValueError(f"special_tokens={special_tokens!r} is no mapping of text to id")
    for text in special_tokens:
        if not isinstance(text, str) or not text or re.search("[\ud800-\udfff]", text):
            raise ValueError(f"special token {text!r} is empty or not text")
    ids = [*ranks.values(), *special_tokens.values()]
    for i in ids:
        if type(i) is not int or not 0 <= i < 2**32:
            raise ValueError(f"id {i!r} is not an integer from 0 to 2**32 - 1")
    twice, n = Counter([*ranks.values(), *set(special_tokens.values())]).most_common(1)[0]
    if n > 1:
        raise ValueError(f"id {twice} stands for {n} tokens: ids must differ")
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if (missing and not foreign) or b"" in ranks:
        raise ValueError(f"{len(missing)} of the 256 bytes are no tokens, or the empty string is")


if __name__ == "__main__":
    text = "the cat sat on the mat, the rat sat on the cat, and that was that"
    merges = naive_learn_merges([text], 12)
    tokenizer = Tokenizer.train([text], 256 + 12, special_tokens=())
    ranks = tokenizer.ranks
    assert merges == [(ranks[a], ranks[b]) for a, b in tokenizer.merges()]
    for i, (a, b) in enumerate(tokenizer.merges(), 256):
        print(f"merge {a.decode()!r:>6} + {b.decode()!r:<6} -> {i} {(a + b).decode()!r}")
    for word in (" the", " that", " chat", " naïve"):
        ids = tokenizer.encode(word)
        print(f"{word!r:>9} = {' '.join([str(tokenizer.bytes_of[i])[1:] for i in ids]):<40} {ids}")
        assert ids == tokenizer.encode_python(word) == naive_encode(word, merges)
    print("The slow and obvious form gives the same merges and the same ids.")
