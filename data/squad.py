"""SQuAD: paragraphs of text, questions about them, answers that are pieces of the text, and its
metrics.

A file is JSON (also .gz), {"data": [{"paragraphs": [{"context", "qas"}]}]}; each of the "qas" has
a "question" and "answers" [{"text", "answer_start"}], the start in characters of the context. In
version 2.0, a question whose "is_impossible" is true has no answer.

Left out: the titles of the articles, the plausible answers of version 2.0, downloads.

Papers: SQuAD 1.1 (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1: both metrics), SQuAD 2.0
(Rajpurkar et al. 2018, arXiv:1806.03822: questions without an answer).
"""

import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from data.division import copy_told, divide
from data.text import CONVERT, Part, blocks, check_text, name_of

HELD_OUT = 5  # without a validation file, one paragraph in so many validates
MOST_MISPLACED = 0.1  # share of the answered questions; above it, the file is refused

ARTICLE = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Question:
    """`answers` are all that count as right; there are none if the context has none. `span` is the
    (start, end), in characters, of the first answer that is where the file says, or None; then
    `there` is what stands in the context in the place of the first answer."""

    text: str
    answers: tuple[str, ...]
    span: tuple[int, int] | None
    there: str = ""


Paragraphs = dict[str, list[Question]]  # context -> its questions


@dataclass
class SquadCorpus:
    """Paragraphs in two splits. `hash` is of the files' contents and how they are divided."""

    name: str
    hash: str
    rule: str  # how it was split, for the plan
    splits: dict[str, Paragraphs]
    may_abstain: dict[str, bool]  # whether questions of a split can have no answer

    def pieces(self, split: str) -> Iterator[tuple[str, bool]]:
        """What a tokenizer learns from: every context and question is a document of its own."""
        for context, questions in self.splits[split].items():
            yield f" {context}", True
            for question in questions:
                yield f" {question.text}", True


# ---- files ---------------------------------------------------------------------------------------


def open_squad(data: str, *, valid: str = "") -> SquadCorpus:
    """data and valid are files; without valid, one in HELD_OUT paragraphs of data validates, with
    all of its questions. Raises ValueError on bad input."""
    raw = read_bytes("--data", data)
    train, abstains = parse(raw, data)
    digest = hashlib.sha256(b"squad 1" + hashlib.sha256(raw).digest())
    if valid:
        raw = read_bytes("--valid", valid)
        validation, also = parse(raw, valid)
        may_abstain = {"train": abstains, "validation": also}
        digest.update(b"given" + hashlib.sha256(raw).digest())
        rule = f"the given file validates{copy_told(data, valid, train == validation)}"
    else:
        items, held_out, rule = divide(list(train.items()), HELD_OUT, "paragraph", data)
        train, validation = dict(items), dict(held_out)
        may_abstain = {"train": abstains, "validation": abstains}
        digest.update(f"drawn {HELD_OUT}".encode())
    splits = {"train": train, "validation": validation}
    return SquadCorpus(name_of(Path(data)), digest.hexdigest(), rule, splits, may_abstain)


def read_bytes(flag: str, name: str) -> bytes:
    path = Path(name)
    if not name or not path.is_file():
        raise ValueError(f"{flag} {name} is no file here: name one in SQuAD's format (.json)")
    check_text(path)
    return b"".join(blocks(Part(path)))


def parse(raw: bytes, name: str) -> tuple[Paragraphs, bool]:
    """(paragraphs that have questions, with those of equal context joined; whether the file is of
    version 2.0, where questions say if they have an answer). Raises ValueError for other files."""
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 near byte {error.start:,}: {CONVERT}") from None
    except (ValueError, RecursionError) as error:
        if b'"context"' in raw.partition(b"\n")[0] and b'"question"' in raw.partition(b"\n")[0]:
            raise ValueError(flat_rows(name)) from None
        raise ValueError(f"{name} is no JSON in UTF-8 ({error}): give SQuAD's format") from None
    rows = content if isinstance(content, list) else [content]
    if rows and isinstance(rows[0], dict) and {"context", "question"} <= rows[0].keys():
        raise ValueError(flat_rows(name))
    paragraphs: Paragraphs = {}
    abstains = False
    for a, article in enumerate(member(content, "data", list, name), 1):
        where = f"{name}, article {a}"
        for p, paragraph in enumerate(member(article, "paragraphs", list, where), 1):
            place = f"{where}, paragraph {p}"
            context = member(paragraph, "context", str, place)
            for q, qa in enumerate(member(paragraph, "qas", list, place), 1):
                question = parse_question(qa, context, f"{place}, question {q}")
                paragraphs.setdefault(context, []).append(question)
                abstains |= "is_impossible" in qa
    check_places(paragraphs, name)
    return paragraphs, abstains


def flat_rows(name: str) -> str:
    return (
        f"{name} has a row for each question, as Hugging Face's datasets write SQuAD: write its "
        'own format, {"data": [{"paragraphs": [{"context": …, "qas": [{"question": …, '
        '"answers": [{"text": …, "answer_start": …}]}]}]}]}'
    )


def parse_question(qa: Any, context: str, place: str) -> Question:
    text = member(qa, "question", str, place)
    answers, span, there = [], None, ""
    for answer in member(qa, "answers", list, place):
        words = member(answer, "text", str, place)
        start = member(answer, "answer_start", int, place)
        there = there if answers else context[max(0, start) : max(0, start) + len(words)]
        answers.append(words)
        if span is None and words.strip() and start >= 0 and context.startswith(words, start):
            span = start, start + len(words)
    impossible = qa.get("is_impossible", False)
    if impossible is not (not answers):
        raise ValueError(
            f"{place} has the answers {short(answers)} and is_impossible {short(impossible)}: a "
            f"question has an answer, or is_impossible true: {short(text)}"
        )
    return Question(text, tuple(answers), span, "" if span else there)


def member(content: Any, key: str, kind: type, place: str) -> Any:
    names = {list: "list", str: "text", int: "whole number"}
    if not isinstance(content, dict) or type(content.get(key)) is not kind:
        raise ValueError(f"{place} has no {key} that is a {names[kind]}: {short(content)}")
    return content[key]


def check_places(paragraphs: Paragraphs, name: str) -> None:
    """A few answers that are not where the file says can be left out. If there are many, there is a
    common cause: raises ValueError, and also if there is no question."""
    questions = [question for asked in paragraphs.values() for question in asked]
    if not questions:
        raise ValueError(f"{name} has no question in it: give SQuAD's format")
    answered = [question for question in questions if question.answers]
    wrong = [question for question in answered if question.span is None]
    if len(wrong) > MOST_MISPLACED * len(answered):
        raise ValueError(
            f"{name}: {len(wrong):,} of {len(answered):,} answers are not where answer_start says, "
            f"which counts characters of the context from 0; where {short(wrong[0].answers[0])} "
            f"should stand, there is {short(wrong[0].there)}, asked for by {short(wrong[0].text)}"
        )


# ---- metrics -------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """What the metrics compare: lower case, without ASCII punctuation, then without the words a,
    an and the, with single spaces."""
    return " ".join(ARTICLE.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    return float(normalise(prediction) == normalise(answer))


def f1(prediction: str, answer: str) -> float:
    """The harmonic mean of precision and recall over words, each counted as often as it occurs. If
    one side has no words, it is 1 if the other has none either, and else 0."""
    a, b = normalise(prediction).split(), normalise(answer).split()
    if not a or not b:
        return float(a == b)
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))


def squad_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """{"exact_match", "f1"}: means over the questions, in percent; each question counts with the
    best of its answers. If it has no answers, or only some that normalise to nothing, "" is right.
    If there are questions with and without an answer, figures for each kind follow; for those
    without, F1 is the exact match.
    """
    golds = [[a for a in given if normalise(a)] or [""] for given in answers]
    pairs = list(zip(predictions, golds, strict=True))
    exact = np.array([max(exact_match(p, gold) for gold in given) for p, given in pairs])
    overlap = np.array([max(f1(p, gold) for gold in given) for p, given in pairs])
    has = np.array([bool(given) for given in answers])
    report = {"exact_match": percent(exact), "f1": percent(overlap)}
    if has.any() and not has.all():
        report["answerable_exact_match"] = percent(exact[has])
        report["answerable_f1"] = percent(overlap[has])
        report["unanswerable_exact_match"] = percent(exact[~has])
    return report


def percent(values: np.ndarray) -> float:
    return round(100 * float(values.mean()), 6)
