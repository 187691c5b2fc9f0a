"""Named entities as tags, one for each word: read, written, scored, and shown in a text.

An entity is (type, start, end): the words start to end - 1, as a slice has them. Four schemes write
entities as tags; with L for a location and P for a person,

    words    Ada   of   Grace   Hopper   Alan   Turing   ,   Rome
    IOB1     I-P   O    I-P     I-P      B-P    I-P      O   I-L     B only behind the same type
    IOB2     B-P   O    B-P     I-P      B-P    I-P      O   B-L     B begins every entity
    IOBES    S-P   O    B-P     E-P      B-P    E-P      O   S-L     E ends it, S is a single word
    BILOU    U-P   O    B-P     L-P      B-P    L-P      O   U-L     the same in other letters

The reader takes any mixture of them, also what a model makes up, and never fails on a sequence of
tags: an I behind another type, or behind O, begins an entity. Between two words that have tags
there is a border if their types differ, if the second has B or S, or if the first has E or S.
For B, I and O these are the chunk rules of conlleval, the script that scored the CoNLL tasks. It
knows no S, and with it a B behind an E of the same type goes on with the entity; here that begins
another, as IOBES means it.

Left out: nested and discontinuous entities, tags without a type, partial credit for a wrong border.

Papers: Ramshaw and Marcus 1995 (arXiv:cmp-lg/9505040); Tjong Kim Sang and Veenstra 1999, who name
the schemes (arXiv:cs/9907006); Tjong Kim Sang and De Meulder 2003, the CoNLL-2003 task and its
score (arXiv:cs/0306050); Ratinov and Roth 2009, BILOU (aclanthology.org/W09-1119).
"""

import re
import unicodedata
from collections.abc import Iterable
from itertools import pairwise

Entity = tuple[str, int, int]  # type, start, end

TAG = re.compile(r"O|[BIESLU]-.+")
SCHEMES = {  # what stands before the type at an entity's only, first, inner and last word
    "IOB2": "BBII",
    "IOB1": "IIII",
    "IOBES": "SBIE",
    "BILOU": "UBIL",
}
APOSTROPHES = "'’"
# In the alphabet of `shape`: a possessive; or a stretch without spaces from its first letter to its
# last, with an @ or # in front of it; or one mark, repeated.
WORD = re.compile(r"['’]s(?![sw])|[@#]?[sw](?:\S*[sw])?m*|([^\sswm])\1*m*|m+")


# ---- tags ----------------------------------------------------------------------------------------


def split_tag(tag: str) -> tuple[str, str]:
    """("B", "person") of "B-person", ("O", "") of "O"; ValueError for what is no tag."""
    if not TAG.fullmatch(tag):
        raise ValueError(f"{tag!r} is no tag: write O, or B-TYPE with one of B I E S L U in front")
    return tag[0], tag[2:]


def entities(tags: Iterable[str]) -> list[Entity]:
    """The entities of one sentence, in order. ValueError for what is no tag, never for a sequence
    of tags."""
    found, start, last, last_type = [], 0, "O", ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, type_ = split_tag(tag)
        # Outside of entities the type is "", so O needs no rule of its own.
        if type_ != last_type or prefix in "BSU" or last in "ESLU":
            if last_type:
                found.append((last_type, start, i))
            start = i
        last, last_type = prefix, type_
    return found


def spelled(found: Iterable[Entity], length: int, scheme: str = "IOB2") -> list[str]:
    """The tags, in one of SCHEMES, of a sentence of `length` words with these entities, which are
    in order and do not overlap."""
    alone, first, inner, last = SCHEMES[scheme]
    tags = ["O"] * length
    for type_, start, end in found:
        size = end - start
        prefixes = alone if size == 1 else first + inner * (size - 2) + last
        if scheme == "IOB1" and start and tags[start - 1][2:] == type_:
            prefixes = "B" + prefixes[1:]
        tags[start:end] = [f"{prefix}-{type_}" for prefix in prefixes]
    return tags


def to_iob2(tags: list[str]) -> list[str]:
    """The same entities in IOB2, whatever scheme or mixture the tags are in."""
    return spelled(entities(tags), len(tags))


def scheme_of(sentences: Iterable[list[str]]) -> str:
    """The first of SCHEMES in which all of these tags are written; "" for a mixture or a mistake.

    Where several fit, they mean the same: tags without any B- are IOB1, or the poorer "IO"."""
    fitting = list(SCHEMES)
    for tags in sentences:
        found = entities(tags)
        fitting = [scheme for scheme in fitting if spelled(found, len(tags), scheme) == tags]
    return fitting[0] if fitting else ""


# ---- scores --------------------------------------------------------------------------------------


def entity_scores(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """{"precision", "recall", "f1"}, shares from 0 to 1 over the entities of all sentences (micro).

    As conlleval counts: an entity is right if its type and both borders are; where nothing could
    be right, the share is 0. gold and predicted hold the tags of the same sentences. ValueError if
    a sentence has another number of tags in one of them.
    """
    told, found = both_placed(gold, predicted)
    return rates(told, found)


def entity_scores_by_type(
    gold: list[list[str]], predicted: list[list[str]]
) -> dict[str, dict[str, float]]:
    """The same for each type, in alphabetical order; "entities" is how many the gold tags have."""
    told, found = both_placed(gold, predicted)
    scores = {}
    for type_ in sorted({entity[0] for _, entity in told | found}):
        a, b = ({place for place in places if place[1][0] == type_} for places in (told, found))
        scores[type_] = {**rates(a, b), "entities": len(a)}
    return scores


def both_placed(gold: list[list[str]], predicted: list[list[str]]) -> list[set]:
    """[gold entities, predicted ones], each with the number of its sentence."""
    if len(gold) != len(predicted):
        raise ValueError(f"{len(predicted):,} sentences were predicted for {len(gold):,}: give all")
    for i, (a, b) in enumerate(zip(gold, predicted, strict=True)):
        if len(a) != len(b):
            raise ValueError(
                f"sentence {i:,} has {len(a):,} words and {len(b):,} predicted tags: give each one"
            )
    return [
        {(i, entity) for i, tags in enumerate(sentences) for entity in entities(tags)}
        for sentences in (gold, predicted)
    ]


def rates(told: set, found: set) -> dict[str, float]:
    right = len(told & found)
    return {
        "precision": right / max(len(found), 1),
        "recall": right / max(len(told), 1),
        "f1": 2 * right / max(len(told) + len(found), 1),
    }


# ---- text ----------------------------------------------------------------------------------------


def words_of(text: str) -> list[tuple[str, int, int]]:
    """[(word, start, end)]: the words of a raw text, each equal to text[start:end].

    Split at white space; marks at either end of such a stretch are words of their own, the same
    mark repeated is one ("...", "!!"). What stands inside stays ("don't", "3.5", "e-mail", an
    address), and so do the @ and # of tweets in front. The 's of a possessive is a word, as in the
    corpora of the CoNLL tasks. Nothing but white space is left out.

    Left out: other rules of treebanks (do n't, abbreviations that keep their dot), and words of
    text that has no spaces, such as Chinese.
    """
    words = []
    for match in WORD.finditer("".join(map(shape, text))):
        start, end = match.span()
        borders = [start, end]
        if end - start > 2 and text[end - 2] in APOSTROPHES and text[end - 1] in "sS":
            borders = [start, end - 2, end]
        words += [(text[a:b], a, b) for a, b in pairwise(borders)]
    return words


def shape(c: str) -> str:
    """A character as WORD sees it: s for that letter, w for another letter, a digit or _, m for
    what joins the character before it (an accent, the selector behind an emoji), else itself."""
    if c == "_" or c.isalnum():
        return "s" if c in "sS" else "w"
    return "m" if unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf") else c


def text_spans(tags: list[str], words: list[tuple[str, int, int]]) -> list[Entity]:
    """[(type, start, end)] in characters of the text that `words` are from: `words_of(text)`, of
    which each has a tag."""
    return [(type_, words[a][1], words[b - 1][2]) for type_, a, b in entities(tags)]


def marked(text: str, spans: Iterable[Entity]) -> str:
    """The text with these spans of characters shown: [Barack Obama]PERSON visited [Rome]PLACE.

    They do not overlap, and come in any order."""
    parts, done = [], 0
    for type_, start, end in sorted(spans, key=lambda span: span[1:]):
        parts += [text[done:start], f"[{text[start:end]}]{type_}"]
        done = end
    return "".join([*parts, text[done:]])
