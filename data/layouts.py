r"""Text files -> documents made of sentences, line by line. A file has one of these layouts:

    lines       BERT's own: a sentence a line, a blank line between documents;
    wikitext    " = Title = " begins a document, " = = Section = = " is dropped, any other line is
                a paragraph;
    prose       a blank line ends a paragraph, two of them or a form feed end the document. Lines
                are joined, except those of more than 120 characters: they are paragraphs already;
    paragraphs  prose of which every paragraph counts as a document.

Where none is given, the first 64 kB of a file decide: wikitext if a line is such a title; lines if
80% of the lines that are not blank end like a sentence and these lines hold at most 1.2 sentences
each; else prose. In a .jsonl every line is a document, of text in one of these layouts.

Left out: markup, hyphens at the end of a line (they stay), splitters that are trained (Punkt).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from data.lines import read_lines
from data.text import Part, is_jsonl, jsonl_documents

LAYOUTS = {
    "lines": "a sentence a line, a blank line between documents",
    "prose": "prose, two blank lines between documents",
    "paragraphs": "prose, every paragraph a document",
    "wikitext": "a title before each document",
}
HEAD = 1 << 16  # characters that decide the layout
ENDING_SHARE, SENTENCES_A_LINE = 0.8, 1.2
WRAPPED = 120  # characters; a longer line was not wrapped by hand
LONGEST = 1 << 20  # characters after which a paragraph is cut, so that none fills the memory
TITLE = re.compile(r"= (?!= ).*(?<! =) =")
SECTION = re.compile(r"= = .* = =")

ABBREVIATIONS = {
    *("e.g", "i.e", "cf", "vs", "viz", "al", "approx", "ca", "resp", "incl"),
    *("mr", "mrs", "ms", "dr", "prof", "st", "sr", "jr", "rev", "hon", "messrs", "mt"),
    *("gen", "col", "capt", "lt", "sgt", "gov", "sen", "rep", "fig", "figs", "eq", "vol", "pp"),
    *("sec", "ch", "chap", "ed", "eds"),
    *("jan", "feb", "aug", "sept", "oct", "nov", "dec"),
}
OPENING = "\"'“‘„«‹([{<*_`¿¡–—$#@"
CLOSING = "\"'”’»›)\\]}*_`"
# The look-behind lets a long row of marks be tried once and not from each of them.
END = re.compile(rf"(?<![.!?…])[.!?…]+[{CLOSING}]*(?= )|[。！？]+[」』”’）]*")
LIST_MARK = re.compile(r" ?\(?(?:\d{1,3}|[^\W\d_])")
LAST = re.compile(rf"[.!?…。！？][\s{CLOSING}」』）]*$")


@dataclass(frozen=True)
class TextFile:
    path: Path
    layout: str
    sha256: str


# ---- sentences -----------------------------------------------------------------------------------


def split_sentences(text: str) -> list[str]:
    """The sentences of a paragraph, white space collapsed to single spaces, none of them empty.

    A sentence ends at . ! ? or …, with what closes behind it (quotes, brackets), where white space
    follows and then what can begin one: no lower-case letter and no mark such as a comma. It does
    not end after the ABBREVIATIONS, after an initial ("A. M. Turing", "U.S. Navy"; "I." is a
    pronoun), after "No." before a digit, nor after the number or letter of a list that begins it
    ("1. Read this."). Chinese and Japanese full stops need no white space behind them.

    Limits: a sentence that ends with an abbreviation or initial is joined with the next ("in the
    U.S. He left."), one that begins with a lower-case letter with the one before; "etc." before a
    capital always ends one. Text without such marks is one sentence however long it is.
    """
    text = " ".join(text.split())
    found, start = [], 0
    for match in END.finditer(text):
        end = match.end()
        if match[0][0] not in "。！？":
            if text[end : end + 3].strip() == '"' and text.count('"', start, end) % 2:
                end += 2  # tokenized text, as WikiText is: this quote closes
            first = text[end + 1 : end + 2]
            if first.islower() or not (first.isalnum() or first in OPENING):
                continue
            if match[0] == "." and is_abbreviation(text, start, match.start(), first):
                continue
        found.append(text[start:end].strip())
        start = end
    return [sentence for sentence in (*found, text[start:].strip()) if sentence]


def is_abbreviation(text: str, start: int, dot: int, first: str) -> bool:
    """Whether the dot of the sentence from `start` on belongs to its word; `first` follows it."""
    word = text[max(start, text.rfind(" ", start, dot) + 1) : dot].lstrip(OPENING)
    if LIST_MARK.fullmatch(text, start, dot):
        return True
    if word.lower() in ABBREVIATIONS or (word.lower() == "no" and first.isdigit()):
        return True
    return word != "I" and all(len(part) == 1 and part.isupper() for part in word.split("."))


# ---- lines -> paragraphs -> sentences ------------------------------------------------------------


def all_sentences(files: list[TextFile]) -> Iterator[tuple[str, bool]]:
    """Yields (sentence, whether it begins a document). A file begins one, and so does a line of a
    .jsonl, within which nothing else does."""
    for file in files:
        if is_jsonl(file.path):
            for text in jsonl_documents(Part(file.path)):
                document = [s for s, _ in lines_sentences(text.split("\n"), file.layout)]
                yield from mark_beginnings([document])
        else:
            yield from lines_sentences(read_lines(file.path), file.layout)


def mark_beginnings(documents: Iterable[Iterable[str]]) -> Iterator[tuple[str, bool]]:
    for document in documents:
        for i, sentence in enumerate(document):
            yield sentence, i == 0


def lines_sentences(lines: Iterable[str], layout: str) -> Iterator[tuple[str, bool]]:
    begins = True
    for paragraph in PARAGRAPHS[layout](lines):
        if paragraph is None:
            begins = True
            continue
        for sentence in [paragraph] if layout == "lines" else split_sentences(paragraph):
            yield sentence, begins
            begins = False


def sentence_lines(lines: Iterable[str]) -> Iterator[str | None]:
    """Paragraphs of a sentence each. None stands between documents, here and below."""
    for line in lines:
        yield " ".join(line.split()) or None


def wikitext_paragraphs(lines: Iterable[str]) -> Iterator[str | None]:
    for line in lines:
        line = line.strip()
        if TITLE.fullmatch(line):
            yield None
        elif line and not SECTION.fullmatch(line):
            yield line


def prose_paragraphs(lines: Iterable[str]) -> Iterator[str | None]:
    held, size, blank = [], 0, 0
    # A form feed counts as two blank lines, wherever in a line it stands.
    for line in chain.from_iterable(line.replace("\f", "\n\n\n").split("\n") for line in lines):
        line = line.strip()
        blank = 0 if line else blank + 1
        if held and (not line or len(line) > WRAPPED or size > LONGEST):
            yield " ".join(held)
            held, size = [], 0
        if len(line) > WRAPPED:
            yield line
        elif line:
            held.append(line)
            size += len(line)
        elif blank == 2:
            yield None
    if held:
        yield " ".join(held)


def single_paragraphs(lines: Iterable[str]) -> Iterator[str | None]:
    for paragraph in prose_paragraphs(lines):
        if paragraph is not None:
            yield from (paragraph, None)


PARAGRAPHS = {
    "lines": sentence_lines,
    "prose": prose_paragraphs,
    "paragraphs": single_paragraphs,
    "wikitext": wikitext_paragraphs,
}


# ---- which layout --------------------------------------------------------------------------------


def layout_of(path: Path) -> str:
    """One of LAYOUTS, by the lines among the first HEAD characters: see the top of this file."""
    if is_jsonl(path):
        lines = chain.from_iterable(text.split("\n") for text in jsonl_documents(Part(path)))
    else:
        lines = read_lines(path)
    full = ending = sentences = seen = 0
    for line in lines:
        seen += len(line) + 1
        line = line.strip()
        if TITLE.fullmatch(line):
            return "wikitext"
        if line:
            full += 1
            ending += bool(LAST.search(line))
            sentences += len(split_sentences(line))
        if seen > HEAD:
            break
    one_each = ending >= ENDING_SHARE * full and sentences <= SENTENCES_A_LINE * full
    return "lines" if full and one_each else "prose"
