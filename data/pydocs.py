"""The English of Python's own documentation, which every installation has: BERT's default data.

A document is a module of the standard library (its docstrings, in the order of the source) or a
help topic (what help("LAMBDAS") shows). Rules of thumb leave out doctests, code, tables, headings
and signatures, and then every sentence that does not look like English. A sentence that occurred
before is left out too, because validation text should not occur in training. Some code slips
through, and some good sentences are lost.
"""

import ast
import re
from collections.abc import Iterator

from data.layouts import split_sentences
from data.text import stdlib_files

PROMPTS = [
    "Return the [MASK] of the list.",
    "If the file does not exist, an exception is [MASK].",
    "The default [MASK] is None.",
    "This method is called [MASK] the object is created.",
    "The first argument must be a [MASK].",
]

BULLET = re.compile(r"(?:[-*•o+]|\(?\d{1,2}[.)]|:\w+[^:\n]*:)\s+")  # also ":param name:"
TERM = re.compile(r"['\"]?[\w.]+['\"]?(?:\([^()]*\))?\s+--?\s+")  # "name(x) -- what it does"
RULED = re.compile(r"([-=*~^#+.\"'_`])\1{2,}")  # underlines a heading
SIGNATURE = re.compile(r"[\w.]+\(.*\)\s*(->.*)?[:.]?")
ROLE = re.compile(r":[\w:+-]+:`[~!]?([^`<]*)[^`]*`")
QUOTED = re.compile(r"`(\w+)'")  # how names were quoted before reStructuredText
EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}(\w[^*\n]*)(?<! )\*{1,2}(?![\w*])")
CODE = re.compile(r"[={}<>|\\^~]|::|\w\([\w'\"]|\.\.\.|https?:|\[\w*\]|%\w|@\w|[;,]$|\$")
WORD = re.compile(r"[\"'(“‘]*[A-Za-z]+(?:['’/-][A-Za-z]+)*[\"')”’]*[,.:;!?]?[\"')”’]*")
COMMON = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at be been by can do does for from has have if in is it may must no not
        of on or return returns should so than that the then there these this to used was when
        which will with you""",
    )
)
FEWEST, ENGLISH_SHARE = 3, 0.75  # words
ENDINGS = (".", "!", "?", '."', ".)")


def pydocs() -> list[list[str]]:
    """Documents of at least two sentences, the same for every run with the same Python."""
    seen: set[str] = set()
    found = []
    for texts in documents():
        document = []
        for text in texts:
            for paragraph in paragraphs(text):
                for sentence in split_sentences(paragraph):
                    if is_english(sentence) and sentence not in seen:
                        seen.add(sentence)
                        document.append(sentence)
        if len(document) > 1:
            found.append(document)
    return found


def documents() -> Iterator[list[str]]:
    """The docstrings of each module, by the path of its file, then each help topic, by name."""
    for path in stdlib_files()[1]:
        try:
            module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates, and files for other versions of Python
            continue
        yield [text for text in docstrings(module) if text]
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems have it in another package
        return
    for name in sorted(topics):
        yield [topics[name]]


def docstrings(node: ast.AST) -> Iterator[str | None]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from docstrings(child)


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a text, which blank lines divide, without code: blocks that are indented
    deeper than a paragraph before them that ends with "::"."""
    announced = None  # the indentation of that paragraph
    for block in re.split(r"\n\s*?\n", text.expandtabs()):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines or (announced is not None and indentation(lines[0]) > announced):
            continue
        announced = indentation(lines[0]) if lines[-1].endswith("::") else None
        yield from items(lines)


def items(lines: list[str]) -> Iterator[str]:
    """Joins lines that belong together by their indentation; the second line of a list item is
    indented deeper than the first. Headings, signatures and doctests are left out."""
    held: list[str] = []
    last = 0
    for line in lines:
        body = line.strip()
        if body.startswith(">>>"):
            break
        if RULED.fullmatch(body):
            held = held[:-1]
            continue
        hangs = len(held) == 1 and indentation(line) > last and is_item(held[0])
        if is_item(body) or SIGNATURE.fullmatch(body) or not (hangs or indentation(line) == last):
            yield plain(held)
            held = []
        if not SIGNATURE.fullmatch(body):
            held.append(body)
        last = indentation(line)
    yield plain(held)


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def is_item(body: str) -> bool:
    return bool(BULLET.match(body) or TERM.match(body))


def plain(lines: list[str]) -> str:
    """The joined lines, without the marks of lists and of reStructuredText."""
    text = " ".join(lines)
    for marks in (BULLET, TERM):
        if match := marks.match(text):
            text = text[match.end() :]
    text = ROLE.sub(r"\1", QUOTED.sub(r"'\1'", text)).replace("`", "")
    return EMPHASIS.sub(r"\1", text)


def is_english(sentence: str) -> bool:
    """Whether a sentence consists mostly of words, begins with a capital and ends like a sentence.
    If only one of the last two is true, it needs six words or more, at least two of them COMMON."""
    words = sentence.split()
    if CODE.search(sentence) or len(words) < FEWEST:
        return False
    if sum(bool(WORD.fullmatch(word)) for word in words) < ENGLISH_SHARE * len(words):
        return False
    begins, ends = sentence.lstrip("\"'(“")[:1].isupper(), sentence.endswith(ENDINGS)
    many = len(words) >= 6 and sum(word in COMMON for word in sentence.lower().split()) >= 2
    return (begins and ends) or (many and (begins or ends))
