r"""Splitting text for byte-pair encoding three times as fast, and counting chunks on all cores.

bpe.py uses the package `regex` for letters (\p{L}) and numbers (\p{N}), because the standard
library's `re` does not know these classes; it has a third of `re`'s speed. But a class of
characters can be written as ranges, which are short for ASCII text, and then `re` does the same
work: 35 MB/s of Python source instead of 12 (25 MB/s with other characters).

use_in_bpe() assigns both to their places in bpe.py. Worker processes need not call it, because a
Tokenizer carries its splitter with it.

Left out: other patterns, as imported tokenizers have them; they are left to `regex`.

bpe.py is the definition: tests/engine/test_splitting.py compares both with its plain functions.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from itertools import chain

import bpe
from bpe import CHAR_PATTERN, GPT2_PATTERN, GPT4_PATTERN, beyond_ascii
from data.cores import batched, on_all_cores

# The patterns for `re`, where L stands for letters, N for numbers, S for white space. Nothing is
# possessive, which Python 3.10 lacks: it would change nothing, as backtracking helps none to match.
TRANSLATED = {
    GPT2_PATTERN: r"'(?:[dmst]|ll|re|ve)| ?[L]+| ?[N]+| ?[^SLN]+|[S]+(?![^S])|[S]",
    GPT4_PATTERN: r"'(?i:[dmst]|ll|re|ve)|[^\r\nLN]?[L]+|[N]{1,3}| ?[^SLN]+[\r\n]*"
    r"|[S]+\Z|[S]*[\r\n]|[S]+(?![^S])|[S]",
}
# `\s` of `re` also matches the separators U+001C to U+001F, which are no white space in Unicode.
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def use_in_bpe() -> None:
    """Assigns the splitter and the counter of this file to their places in bpe.py."""
    bpe.make_splitter, bpe.count_chunks = Splitter, count_chunks


def count_chunks(texts: Iterable[str], pattern: str) -> Counter[str]:
    """The same as bpe.plain_count_chunks(texts, pattern), on all cores."""
    counts: Counter[str] = Counter()
    for found in on_all_cores(partial(_count_batch, Splitter(pattern)), batched(texts, len)):
        counts.update(found)
    return counts


def _count_batch(split: Splitter, texts: list[str]) -> Counter[str]:
    return Counter(chain.from_iterable(map(split, texts)))


class Splitter:
    """splitter(text) equals regex.findall(pattern, text) for every str."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self._findall = bpe.plain_splitter(pattern)

    def __call__(self, text: str) -> list[str]:
        if self.pattern == CHAR_PATTERN:
            return list(text)
        if self.pattern not in TRANSLATED or not (text.isascii() or ranges_hold(text)):
            return self._findall(text)
        return translated(self.pattern, text.isascii())(text)


def ranges_hold(text: str) -> bool:
    """Whether `re` with the ranges of `classes` classes each character of the text as `regex` does.

    Characters newer than this Python's Unicode may be letters to `regex`. Letters and numbers from
    U+10000 on are not in the ranges, because `re` is slow (4 MB/s) with a class that has them.
    """
    for c in beyond_ascii(text):
        kind = unicodedata.category(c)
        if kind == "Cn" or (c > "\uffff" and kind[0] in "LN"):
            return False
    return True


@lru_cache
def translated(pattern: str, ascii_only: bool) -> Callable[[str], list[str]]:
    letters, numbers = ("A-Za-z", "0-9") if ascii_only else (classes("L"), classes("N"))
    ranges = {"L": letters, "N": numbers, "S": "\t-\r " if ascii_only else SPACE}
    return re.compile(re.sub("[LNS]", lambda m: ranges[m[0]], TRANSLATED[pattern])).findall


@lru_cache
def classes(kind: str) -> str:
    """The characters below U+10000 whose category begins with `kind`, as ranges for [...]."""
    kinds = "".join([unicodedata.category(chr(i))[0] for i in range(1 << 16)])
    runs = re.finditer(f"{kind}+", kinds)
    return "".join([f"{chr(run.start())}-{chr(run.end() - 1)}" for run in runs])
