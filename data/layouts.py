r"""Text files -> documents made of sentences, line by line. A file has one of these layouts:

    lines       BERT's own: one sentence on each line, a blank line between documents;
    wikitext    " = Title = " begins a document, " = = Section = = " is dropped, any other line is
                a paragraph;
    prose       a blank line ends a paragraph, two of them or a form feed end the document. Lines
                are joined, except those of more than 120 characters: they are paragraphs already;
    paragraphs  prose in which every paragraph counts as a document.

If no layout is given, the first 64 kB of a file decide: wikitext if a line is such a title; lines
if 80% of the lines that are not blank end like a sentence and they hold at most 1.2 sentences on
average; else prose. In a .jsonl every line is a document, whose text is in one of these layouts.

Left out: markup, hyphens at the end of a line (they stay), trained splitters (Punkt).
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
LONGEST = 1 << 20  # characters after which a paragraph is cut, so that it cannot fill the memory
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
# Because of the look-behind, a long row of marks is tried once and not from each of its marks.
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
    """The sentences of a paragraph, none of them empty; white space becomes single spaces.

    A sentence ends at . ! ? or … and the quotes or brackets that close behind it, if white space
    follows and then something that can begin a sentence: no lower-case letter and no mark such as a
    comma. It does not end after the ABBREVIATIONS, after an initial ("A. M. Turing", "U.S. Navy";
    "I." is a pronoun), after "No." before a digit, or after the number or letter of a list item at
    its beginning ("1. Read this."). Chinese and Japanese full stops need no white space after them.

    Limits: a sentence that ends with an abbreviation or initial is joined with the next one ("in
    the U.S. He left."), and one that begins with a lower-case letter is joined with the one before;
    "etc." before a capital always ends a sentence. Text without such marks is one sentence,
    however long it is.
    """
    text = " ".join(text.split())
    found, start = [], 0
    for match in END.finditer(text):
        end = match.end()
        if match[0][0] not in "。！？":
            if text[end : end + 3].strip() == '"' and text.count('"', start, end) % 2:
                end += 2  # in tokenized text, such as WikiText, this quote closes
            first = text[end + 1 : end + 2]
            if first.islower() or not (first.isalnum() or first in OPENING):
                continue
            if match[0] == "." and is_abbreviation(text, start, match.start(), first):
                continue
        found.append(text[start:end].strip())
        start = end
    return [sentence for sentence in (*found, text[start:].strip()) if sentence]


def is_abbreviation(text: str, start: int, dot: int, first: str) -> bool:
    """Whether the dot at `dot` belongs to the word before it. The sentence begins at `start`, and
    `first` is the character that follows the dot and a space."""
    word = text[max(start, text.rfind(" ", start, dot) + 1) : dot].lstrip(OPENING)
    if LIST_MARK.fullmatch(text, start, dot):
        return True
    if word.lower() in ABBREVIATIONS or (word.lower() == "no" and first.isdigit()):
        return True
    return word != "I" and all(len(part) == 1 and part.isupper() for part in word.split("."))


# ---- lines -> paragraphs -> sentences ------------------------------------------------------------


def all_sentences(files: list[TextFile]) -> Iterator[tuple[str, bool]]:
    """Yields (sentence, whether it begins a document). Every file begins one; in a .jsonl, every
    line does, and nothing within a line."""
    for file in files:
        if is_jsonl(file.path):
            for text in jsonl_documents(Part(file.path)):
                document = [s for s, _ in lines_sentences(text.split("\n"), file.layout)]
                yield from mark_beginnings([document])
        else:
            yield from lines_sentences(read_lines(file.path), file.layout)


def mark_beginnings(documents: Iterable[Iterable[str]]) -> Iterator[tuple[str, bool]]:
    """Yields (sentence, whether it begins a document)."""
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
    """Paragraphs of one sentence each. Here and below, None stands between documents."""
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
    # A form feed counts as two blank lines, wherever it stands in a line.
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
    """The layout of a file, by the lines in its first HEAD characters: see the top of this file."""
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
