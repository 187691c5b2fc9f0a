r"""Cutting text into the chunks that byte-pair encoding never merges across, three times as fast.

The patterns are those of GPT-2 and GPT-4. They ask for letters (\p{L}) and numbers (\p{N}), which
the standard library's `re` does not know and the package `regex` does, at a third of `re`'s speed.
But a class of characters can be written as ranges, short ones for text in ASCII, and then `re` does
the same work: 35 MB/s of Python source instead of 12 (25 MB/s where there are other characters).

Left out: the same for other patterns; those of imported tokenizers stay with `regex`.

The package `regex` decides what is right: tests/test_chunks.py holds both against each other.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

import regex

# The splits of GPT-2 and GPT-4, equal to tiktoken's. `++` never gives back what it took, and
# `\s+(?!\S)` leaves the last space of a run to the word behind it.
GPT2_PATTERN = r"'(?:[dmst]|ll|re|ve)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT4_PATTERN = (
    r"'(?i:[dmst]|ll|re|ve)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
CHAR_PATTERN = r"(?s:.)"
PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN, "char": CHAR_PATTERN}

# The same for `re`, with L for the letters, N for the numbers and S for the white space. Nothing is
# possessive, which Python 3.10 lacks: giving characters back would help none of these to match.
TRANSLATED = {
    GPT2_PATTERN: r"'(?:[dmst]|ll|re|ve)| ?[L]+| ?[N]+| ?[^SLN]+|[S]+(?![^S])|[S]",
    GPT4_PATTERN: r"'(?i:[dmst]|ll|re|ve)|[^\r\nLN]?[L]+|[N]{1,3}| ?[^SLN]+[\r\n]*"
    r"|[S]+\Z|[S]*[\r\n]|[S]+(?![^S])|[S]",
}
# `\s` of `re` would also take the separators U+001C to U+001F, which are no white space in Unicode.
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


class Splitter:
    """splitter(text) is regex.findall(pattern, text), for every str."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self._findall = regex.compile(pattern).findall

    def __call__(self, text: str) -> list[str]:
        if self.pattern == CHAR_PATTERN:
            return list(text)
        if self.pattern not in TRANSLATED or not (text.isascii() or ranges_hold(text)):
            return self._findall(text)
        return translated(self.pattern, text.isascii())(text)


def ranges_hold(text: str) -> bool:
    """Whether `re` with the ranges of `classes` sees each character of the text as `regex` does.

    Characters newer than this Python's Unicode may be letters to `regex`. Letters and numbers from
    U+10000 on are not in the ranges: `re` is slow (4 MB/s) with a class that goes beyond.
    """
    for c in beyond_ascii(text):
        kind = unicodedata.category(c)
        if kind == "Cn" or (c > "\uffff" and kind[0] in "LN"):
            return False
    return True


def beyond_ascii(text: str) -> set[str]:
    """The characters of the text that are not ASCII, at eight times the speed of set(text)."""
    data = text.encode("utf-8", "surrogatepass").translate(None, bytes(range(128)))
    return set(data.decode("utf-8", "surrogatepass"))


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
