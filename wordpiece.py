"""WordPiece, the tokenizer of BERT: text to token ids and, spaces aside, back.

A text is cleaned and split at white space and around every punctuation mark and Chinese character.
Each word is then cut from left to right into the longest pieces that the vocabulary has. A piece
inside a word is written with "##" before it. A word that cannot be cut becomes one [UNK].

    "Élan, unhugged"  ->  elan , unhugged  ->  el ##an , un ##hug ##ged      (lowercase)

Training starts from characters and joins the two neighbours that occur together most often in
relation to how often each occurs at all: score = count(ab) / (count(a) · count(b)). For each time
that it occurs, the pair with the highest score raises the likelihood of the text the most. Four
steps for "pit pits spit bat bats", min_frequency 1:

    pieces      p 2   b 2   s 1   ##i 3   ##t 5   ##s 2   ##p 1   ##a 2
    pairs       s ##p 1/(1·1)   b ##a 2/(2·2)   p ##i 2/(2·3)   ##p ##i 1/(1·3)   ##i ##t 3/(3·5)
                ##a ##t 2/(2·5)   ##t ##s 2/(5·2)
    join        s ##p -> sp, then b ##a -> ba, then of equal scores (1/3) the lower pair of ids:
                p ##i -> pi, and sp ##i, now 1/(1·1), -> spi

naive_learn() is the slow and obvious form; tests compare the fast learn() with it.
`python wordpiece.py` shows both, and how words are cut. The file needs numpy and tqdm alone.

Left out: restoring the original text (decode() cannot know its spaces and accents), dropout, and
lower case that keeps accents (strip_accents as a setting of its own).

Papers: Schuster and Nakajima 2012, "Japanese and Korean Voice Search" (the training); Wu et al.
2016, "Google's Neural Machine Translation System" (arXiv:1609.08144, section 4.1); Devlin et al.
2019, "BERT" (arXiv:1810.04805), whose released code set what counts as a word.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from fractions import Fraction
from functools import cached_property, lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
from tqdm import tqdm

Pair = tuple[int, int]
FORMAT = 1  # of the JSON text
INSIDE = "##"  # before a piece that does not begin a word
UNK = "[UNK]"
SPECIAL = ("[PAD]", UNK, "[CLS]", "[SEP]", "[MASK]")
LONGEST_WORD = 100  # characters; a longer word becomes [UNK]
MAX_TOKENS = 1 << 22  # eight times the largest BERT vocabulary in use (LaBSE's 501,153)
MAX_BYTES = 1 << 27  # of a vocab.txt
CACHED_CHUNKS = 1 << 16  # stretches of text without a space whose ids are remembered
# What Hugging Face's clean-up puts directly behind a word.
CLINGING = (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re")

# Chinese characters as BERT's code lists them: no Hangul, no kana, no later extensions.
IDEOGRAPH = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)


# ---- text -> words -------------------------------------------------------------------------------


def split_words(text: str, lowercase: bool) -> list[str]:
    """The words of `text`: each punctuation mark, each Chinese character, and what stands between
    these and white space. `lowercase` also removes accents.

    The words are those of Hugging Face's Rust library, which looks at every character alone: a
    capital sigma becomes σ at the end of a word too (ς in BERT's own code). The exceptions are
    characters that Unicode has added or reclassified since version 8, where the library stays, and
    the Chinese characters U+2B820 to U+2B91F, which it leaves out.
    """
    text = "".join(map(_clean, text))
    if lowercase:
        text = "".join(map(_plain, unicodedata.normalize("NFD", text)))
    # After the decomposition, which turns some signs into punctuation (U+2260 into "=" and a mark).
    return "".join(map(_apart, text)).split()


@lru_cache(1 << 16)
def _clean(c: str) -> str:
    if c in "\t\n\r":
        return " "
    if c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs"):
        return ""
    if IDEOGRAPH.match(c):
        return f" {c} "
    return " " if c.isspace() else c


@lru_cache(1 << 16)
def _plain(c: str) -> str:
    return "" if unicodedata.category(c) == "Mn" else c.lower()


@lru_cache(1 << 16)
def _apart(c: str) -> str:
    """All printable ASCII signs count as punctuation, also the symbols $+<=>^`|~."""
    sign = "!" <= c <= "~" and not c.isalnum()
    return f" {c} " if sign or unicodedata.category(c).startswith("P") else c


def _chunks(text: str) -> list[str]:
    """The text cut at spaces and line ends: no rule above looks across these."""
    return text.replace("\n", " ").split(" ")


# ---- learning the pieces: slow and obvious, then fast --------------------------------------------


def naive_learn(words: dict[str, int], limit: int, min_frequency: int) -> list[str]:
    """The pieces that learn() gives, from exact fractions; all is counted anew for each piece."""
    rows = {word: [word[0], *(INSIDE + c for c in word[1:])] for word in words}
    pieces = sorted({piece for row in rows.values() for piece in row})
    while len(pieces) < limit:
        count, together = Counter(), Counter()
        for word, row in rows.items():
            for piece in row:
                count[piece] += words[word]
            for pair in pairwise(row):
                together[pair] += words[word]
        scores = {
            (a, b): Fraction(n, count[a] * count[b])
            for (a, b), n in together.items()
            if n >= min_frequency
        }
        if not scores:
            break
        a, b = min(scores, key=lambda pair: (-scores[pair], *map(pieces.index, pair)))
        pieces.append(a + b.removeprefix(INSIDE))
        rows = {word: join(row, (a, b), pieces[-1]) for word, row in rows.items()}
    return pieces


def learn(
    words: dict[str, int], limit: int, min_frequency: int, progress: bool = False
) -> list[str]:
    """At most `limit` pieces for these words and their counts, in the order learnt: characters
    come first. Raises ValueError if the characters alone are too many.

    A join visits only the words with its pair. But it makes both of its pieces rarer, which raises
    the score of every pair that has one of them: the heap gets all of those pairs again.
    """
    spelled = [[word[0], *(INSIDE + c for c in word[1:])] for word in words]
    pieces = sorted({piece for row in spelled for piece in row})
    if len(pieces) > limit:
        raise ValueError(
            f"vocab_size leaves room for {max(limit, 0)} pieces, but the texts have {len(pieces)} "
            f"different characters: choose a vocab_size {len(pieces) - limit} higher"
        )
    id_of = {piece: i for i, piece in enumerate(pieces)}
    rows, weight = [[id_of[p] for p in row] for row in spelled], [*words.values()]
    count: Counter[int] = Counter()  # how often each piece occurs
    together: Counter[Pair] = Counter()  # how often each pair occurs
    places: dict[Pair, set[int]] = {}  # the rows that have, or had, a pair
    pairs_of: dict[int, set[Pair]] = defaultdict(set)  # the pairs that have a piece

    def add(row: int, sign: int) -> None:
        n = sign * weight[row]
        for piece in rows[row]:
            count[piece] += n
        for pair in pairwise(rows[row]):
            together[pair] += n
            if pair not in places:
                places[pair] = set()
                pairs_of[pair[0]].add(pair)
                pairs_of[pair[1]].add(pair)
            places[pair].add(row)

    def score(pair: Pair) -> float:
        return together[pair] / (count[pair[0]] * count[pair[1]])

    for row in range(len(rows)):
        add(row, 1)
    heap: list[tuple[float, Pair]] = []
    most = -1  # with more entries than this, some out of date, the heap is made anew
    bar = tqdm(total=limit, initial=len(pieces), desc="pieces", disable=None if progress else True)
    while len(pieces) < limit:
        if len(heap) > most:
            heap = [(-score(pair), pair) for pair, n in together.items() if n >= min_frequency]
            heapify(heap)
            most = 4 * len(heap) + 1000
        if not heap:
            break
        found, pair = heappop(heap)
        if together[pair] < min_frequency or -found != score(pair):
            continue  # out of date; the present score is in the heap too
        a, b = pair
        new = len(pieces)
        pieces.append(pieces[a] + pieces[b].removeprefix(INSIDE))
        for row in places.pop(pair):
            add(row, -1)
            rows[row] = join(rows[row], pair, new)
            add(row, 1)
        for other in pairs_of[a] | pairs_of[b] | pairs_of[new]:
            if together[other] >= min_frequency:
                heappush(heap, (-score(other), other))
            else:  # gone for good: counts of pairs never rise
                del together[other]
                for piece in other:
                    pairs_of[piece].discard(other)
        bar.update()
    bar.close()
    return pieces


def join(row: list[int], pair: Pair, new: int) -> list[int]:
    """The row with `new` in place of each occurrence of the pair, from the left."""
    out: list[int] = []
    for piece in row:
        if out and (out[-1], piece) == pair:
            out[-1] = new
        else:
            out.append(piece)
    return out


# ---- the tokenizer -------------------------------------------------------------------------------


class WordPiece:
    """Its state is two plain values; everything else follows from them.

    tokens          the vocabulary: a token's place is its id.
    lowercase       whether capitals and accents are removed first ("uncased").
    special_tokens  name -> id of those of SPECIAL that are among the tokens. encode() produces
                    them only where the caller allows it by name; [UNK] also where a word needs it.
    """

    def __init__(self, tokens: list[str], lowercase: bool = True):
        """Raises ValueError for a vocabulary without [UNK], or one that vocab.txt cannot hold."""
        _check_state(tokens, lowercase)
        self.tokens, self.lowercase, self.vocab_size = tokens, lowercase, len(tokens)
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.special_tokens = {name: self.ids[name] for name in SPECIAL if name in self.ids}
        self._longest = max(map(len, tokens))
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        lowercase: bool = True,
        special_tokens: Collection[str] = SPECIAL,
        min_frequency: int = 2,
        progress: bool = False,
    ) -> WordPiece:
        """Special tokens get the first ids; all characters follow, sorted, then joined pairs.

        A pair that occurs fewer than min_frequency times is not joined; when no pair is left, the
        vocabulary stays smaller than vocab_size. `texts` is streamed, and names of special tokens
        in it are text. Raises ValueError for settings that are out of range.

        The score prefers what is rare: with min_frequency 2 much of a small vocabulary goes to
        names; a higher one shortens the encoded text. Hugging Face's WordPieceTrainer, despite its
        name, does not use the score: it joins the most frequent pair, as BPE does.
        """
        for name, value in (("texts", texts), ("special_tokens", special_tokens)):
            if isinstance(value, str):
                raise ValueError(f"{name} is one str, not several: pass a list of them")
        if not set(special_tokens) <= set(SPECIAL) or UNK not in special_tokens:
            raise ValueError(
                f"special_tokens={short(special_tokens)}: take {UNK} and others of {list(SPECIAL)}"
            )
        if not 0 < vocab_size <= MAX_TOKENS:
            raise ValueError(f"vocab_size={vocab_size} is not between 1 and {MAX_TOKENS:,}")
        if min_frequency < 1:
            raise ValueError(f"min_frequency={min_frequency} is less than 1, which keeps all")
        _check_state(list(special_tokens), lowercase)  # before minutes of learning
        quiet = None if progress else True  # None: no bar where there is no terminal
        chunks: Counter[str] = Counter()
        for text in tqdm(texts, desc="splitting", unit=" texts", disable=quiet):
            chunks.update(_chunks(text))
        words: Counter[str] = Counter()
        for chunk, n in chunks.items():
            for word in split_words(chunk, lowercase):
                if len(word) <= LONGEST_WORD:
                    words[word] += n
        n_pieces = vocab_size - len(special_tokens)
        return cls([*special_tokens, *learn(words, n_pieces, min_frequency, progress)], lowercase)

    def words(self, text: str) -> list[str]:
        """The words that encode() cuts into pieces."""
        return split_words(text, self.lowercase)

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Ids of `text`, any str, without [CLS] and [SEP] around them.

        allowed_special names the special tokens whose text becomes their id ("all": all of them);
        the text of the others is encoded as ordinary text. Raises ValueError for an unknown name.
        """
        allowed = allowed_special
        if isinstance(allowed, str):
            allowed = self.special_tokens if allowed == "all" else [allowed]
        for name in allowed:
            if name not in self.special_tokens:
                known = f"this tokenizer has {list(self.special_tokens)}"
                raise ValueError(f"allowed_special: {name!r} is unknown, {known}")
        if not allowed:
            return self._encode(text)
        ids = []
        for i, part in enumerate(re.split(f"({'|'.join(map(re.escape, allowed))})", text)):
            ids += [self.special_tokens[part]] if i % 2 else self._encode(part)
        return ids

    def encode_numpy(self, text: str) -> np.ndarray:
        """Ids of `text` without special tokens, as a uint32 array."""
        return np.array(self._encode(text), dtype=np.uint32)

    def _encode(self, text: str) -> list[int]:
        ids, cache = [], self._cache
        for chunk in _chunks(text):
            found = cache.get(chunk)
            if found is None:
                found = [i for word in self.words(chunk) for i in self._pieces(word)]
                if len(chunk) <= 64:
                    if len(cache) >= CACHED_CHUNKS:
                        cache.clear()
                    cache[chunk] = found
            ids += found
        return ids

    def _pieces(self, word: str) -> list[int]:
        """Ids of a word: greedily the longest piece at each place; [UNK] where none fits."""
        start, ids = 0, []
        while start < len(word) <= LONGEST_WORD:
            before = INSIDE if start else ""
            for end in range(min(len(word), start + self._longest), start, -1):
                found = self.ids.get(before + word[start:end])
                if found is not None:
                    break
            else:
                return [self.ids[UNK]]
            ids.append(found)
            start = end
        return ids or [self.ids[UNK]]

    def decode(self, ids: Iterable[int], clean_up: bool = False) -> str:
        """The text of the tokens, with a space before each that begins a word.

        clean_up leaves out the space before CLINGING, as Hugging Face's decoder does. ids are
        integers of any kind (Python's, numpy's, torch's). Raises ValueError for an unknown id.
        """
        parts = []
        for i in map(operator.index, ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(
                    f"id {i} is no token: the vocabulary ends at {self.vocab_size - 1}; "
                    "mask the ids that only pad the model's vocabulary before sampling"
                )
            text = self.tokens[i]
            if parts and text.startswith(INSIDE):
                text = text.removeprefix(INSIDE)
            elif parts and not (clean_up and text.startswith(CLINGING)):
                text = f" {text}"
            parts.append(text)
        return "".join(parts)

    def ordinary_ids(self) -> list[int]:
        """The ids of all tokens but the special ones."""
        special = set(self.special_tokens.values())
        return [i for i in range(self.vocab_size) if i not in special]

    def word_edges(self, i: int) -> tuple[bool, bool]:
        """Whether a word could go on before this token, and whether behind it."""
        return self.tokens[i].startswith(INSIDE), True

    def shown(self, i: int) -> str:
        """The token as people read it: with "##" where it goes on with the word before it."""
        return self.tokens[i]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the state: data sets and checkpoints carry it, so that none are mixed up."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    # ---- files

    def to_json(self) -> str:
        """The state as JSON; equal tokenizers give equal text."""
        state = {"format": FORMAT, "type": "WordPiece", "lowercase": self.lowercase}
        return json.dumps({**state, "tokens": self.tokens})

    @classmethod
    def from_json(cls, text: str) -> WordPiece:
        """What to_json() wrote; for anything else, a ValueError of one sentence."""
        try:
            state = json.loads(text, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"not a tokenizer: no JSON ({e})") from None
        keys = ("format", "type", "lowercase", "tokens")
        if not isinstance(state, dict) or [state.get(k) for k in keys[:2]] != [FORMAT, "WordPiece"]:
            raise ValueError(f"not a WordPiece tokenizer of format {FORMAT}: {keys} are needed")
        return cls(state.get("tokens"), state.get("lowercase"))

    def save(self, path: str | Path) -> None:
        """Writes BERT's vocab.txt, one token a line, which does not say whether it is lowercase.
        Writes beside `path`, then renames, so that an interruption leaves the old file whole."""
        path = Path(path)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            temporary.write_bytes("".join(f"{token}\n" for token in self.tokens).encode("utf-8"))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def from_vocab(cls, path: str | Path, *, lowercase: bool) -> WordPiece:
        """What save() wrote, or BERT's own vocab.txt; else a ValueError that names the path."""
        path = Path(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES:,} bytes: this is no vocab.txt")
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # "\r\n" has become "\n"
            return cls(lines if lines[-1] else lines[:-1], lowercase)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _check_state(tokens: Any, lowercase: Any) -> None:
    if not isinstance(lowercase, bool):
        raise ValueError(f"lowercase={short(lowercase)} is neither True nor False")
    if not isinstance(tokens, list) or len(tokens) > MAX_TOKENS:
        raise ValueError(f"the vocabulary is no list of at most {MAX_TOKENS:,} tokens")
    for i, token in enumerate(tokens):
        if not isinstance(token, str) or not token or re.search("[\n\r\ud800-\udfff]", token):
            raise ValueError(f"token {i} is {short(token)}: empty, or not one line of text")
    if tokens and tokens[0].startswith("\ufeff"):
        raise ValueError("the vocabulary starts with a byte-order mark: save it as UTF-8 without")
    twice, n = Counter(tokens).most_common(1)[0] if tokens else (None, 0)
    if n > 1:
        raise ValueError(f"token {short(twice)} occurs {n} times: each needs one id")
    if UNK not in tokens:
        raise ValueError(f"the {len(tokens)} tokens have no {UNK}, which unknown words need")


if __name__ == "__main__":
    text = "pit pits spit bat bats tap taps"
    tokenizer = WordPiece.train([text], 24, min_frequency=1)
    pieces = tokenizer.tokens[len(SPECIAL) :]
    assert pieces == naive_learn(Counter(text.split()), len(pieces), 1)
    letters = [piece for piece in pieces if len(piece.removeprefix(INSIDE)) == 1]
    print("letters:", *letters, "| joined, in this order:", *pieces[len(letters) :])
    for word in tokenizer.words("Bats spat: TÁPAS, pitta cat"):
        ids = tokenizer.encode(word)
        print(f"{word:>6} = {' '.join([tokenizer.tokens[i] for i in ids]):<16} {ids}")
    print("The slow and obvious learning gives the same pieces.")
