"""data/squad.py: what is read from SQuAD's files, how they are divided, and what is refused."""

import gzip
import json
import re
from pathlib import Path

import pytest
from conftest import shared

from data.squad import Question, open_squad


def qa(question="Who?", *answers: tuple[str, int], **more) -> dict:
    found = [{"text": text, "answer_start": start} for text, start in answers]
    return {"question": question, "answers": found, "id": "x", **more}


def write(name: str, *paragraphs: tuple[str, list[dict]]) -> str:
    """Two articles: one has the first paragraph, the other all the rest."""
    found = [{"context": context, "qas": qas} for context, qas in paragraphs]
    articles = [{"title": "t", "paragraphs": part} for part in (found[:1], found[1:])]
    Path(name).write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")
    return name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def many(n: int, **more) -> list[tuple[str, list[dict]]]:
    return [(f"ñ{i} cat", [qa(f"{i} {k}?", ("cat", len(f"ñ{i} ")), **more) for k in range(3)])
            for i in range(n)]  # fmt: skip


# ---- what is read --------------------------------------------------------------------------------


def test_questions_with_their_answers_by_paragraph(folder):
    write(
        "a.json",
        ("Ünal saw a cat.", [qa("Who?", ("Ünal", 0)), qa("What?", ("a cat", 9), ("cat", 11))]),
        ("Nobody.", []),  # no question, no paragraph
        ("A dog.", [qa("Which?", ("dog", 2))]),
        ("Ünal saw a cat.", [qa("Whom?", ("cat", 11))]),
    )
    write("b.json", ("A bird.", [qa("What flies?", ("A bird", 0))]))
    corpus = open_squad("a.json", valid="b.json")
    assert corpus.splits == {
        "train": {
            "Ünal saw a cat.": [
                Question("Who?", ("Ünal",), (0, 4)),
                Question("What?", ("a cat", "cat"), (9, 14)),
                Question("Whom?", ("cat",), (11, 14)),
            ],
            "A dog.": [Question("Which?", ("dog",), (2, 5))],
        },
        "validation": {"A bird.": [Question("What flies?", ("A bird",), (0, 6))]},
    }
    assert corpus.name == "a" and corpus.rule == "the given file validates"
    assert corpus.may_abstain == {"train": False, "validation": False}
    assert list(corpus.pieces("train"))[:2] == [(" Ünal saw a cat.", True), (" Who?", True)]
    assert len(list(corpus.pieces("train"))) == 6


def test_version_2_has_questions_without_an_answer(folder):
    none = qa("Where?", is_impossible=True, plausible_answers=[{"text": "x", "answer_start": 0}])
    write("b.json", ("A cat.", [qa("What?", ("cat", 2), is_impossible=False), none]))
    write("a.json", *many(3))
    corpus = open_squad("a.json", valid="b.json")
    assert corpus.splits["validation"]["A cat."][1] == Question("Where?", (), None)
    assert corpus.may_abstain == {"train": False, "validation": True}
    assert open_squad("b.json", valid="a.json").may_abstain["train"]
    # A file of version 2.0 is one also where no question of a half is impossible.
    write("c.json", *many(4, is_impossible=False))
    assert open_squad("c.json").may_abstain == {"train": True, "validation": True}


def test_of_several_answers_the_first_that_is_in_its_place_is_learnt(folder):
    answers = [("cat", 5), ("", 3), (" ", 1), ("cat", -4), ("cat", 99), ("cat", 2), ("A cat", 0)]
    write("a.json", ("A cat.", [qa("What?", *answers)]))
    question = open_squad("a.json", valid="a.json").splits["train"]["A cat."][0]
    assert question.span == (2, 5) and question.answers == tuple(text for text, _ in answers)


def test_real_questions():
    corpus = open_squad(str(shared("xquad.en.json")))
    counts = {split: (len(p), sum(map(len, p.values()))) for split, p in corpus.splits.items()}
    assert counts["train"][0] == 192 and counts["validation"][0] == 48
    assert counts["train"][1] + counts["validation"][1] == 1190
    for paragraphs in corpus.splits.values():
        for context, questions in paragraphs.items():
            assert all(context[slice(*q.span)] == q.answers[0] for q in questions)


def test_files_may_be_packed_and_begin_with_a_mark(folder):
    write("a.json", *many(3))
    text = Path("a.json").read_bytes()
    Path("b.json.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text))
    assert open_squad("b.json.gz").splits == open_squad("a.json").splits
    assert open_squad("b.json.gz").name == "b"


# ---- division ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "held_out"), [(2, 1), (9, 1), (10, 2), (37, 7)])
def test_one_in_five_paragraphs_validates_with_all_of_its_questions(folder, n, held_out):
    write("a.json", *many(n))
    corpus = open_squad("a.json")
    train, validation = corpus.splits["train"], corpus.splits["validation"]
    assert len(validation) == held_out and len(train) == n - held_out
    assert corpus.rule == f"{held_out} of {n} paragraphs, drawn with a fixed seed, validate"
    assert {**train, **validation} == open_squad("a.json", valid="a.json").splits["train"]
    assert all(len(questions) == 3 for questions in {**train, **validation}.values())


def test_the_hash_is_of_contents_and_division(folder):
    write("a.json", *many(9))
    write("b.json", *many(8))
    Path("same.json").write_bytes(Path("a.json").read_bytes())
    hashes = [
        open_squad("a.json").hash,
        open_squad("b.json").hash,
        open_squad("a.json", valid="a.json").hash,
        open_squad("a.json", valid="b.json").hash,
        open_squad("b.json", valid="a.json").hash,
    ]
    assert len(set(hashes)) == 5 and all(re.fullmatch("[0-9a-f]{64}", x) for x in hashes)
    assert open_squad("same.json").hash == hashes[0]
    assert open_squad("same.json", valid="b.json").hash == hashes[3]


# ---- what is refused -----------------------------------------------------------------------------


def refused(content, message: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    Path("bad.json").write_text(text, encoding="utf-8")
    write("good.json", *many(3))
    with pytest.raises(ValueError, match=re.escape(message)) as first:
        open_squad("bad.json")
    assert "\n" not in str(first.value) and len(str(first.value)) < 300
    with pytest.raises(ValueError, match=re.escape(message)):
        open_squad("good.json", valid="bad.json")


def file_with(question: dict, context: object = "A cat.") -> dict:
    good = {"context": "A dog.", "qas": [qa("Which?", ("dog", 2))]}
    bad = {"context": context, "qas": [question]}
    return {"data": [{"paragraphs": [good]}, {"paragraphs": [good, bad]}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [', "bad.json is no JSON in UTF-8 (Expecting value"),
        ("", "bad.json is empty"),
        ("[" * 200_000, "bad.json is no JSON in UTF-8"),
        ([], "bad.json has no data that is a list: []"),
        ({"data": {}}, "bad.json has no data that is a list: {'data': {}}"),
        ({"data": []}, "bad.json has no question in it"),
        ({"data": ["x"]}, "bad.json, article 1 has no paragraphs that is a list: 'x'"),
        (
            file_with(qa(), None),
            "bad.json, article 2, paragraph 2 has no context that is a text",
        ),
        (
            file_with({"answers": []}),
            "article 2, paragraph 2, question 1 has no question that is a text: {'answers': []}",
        ),
        (file_with({"question": "Who?"}), "question 1 has no answers that is a list"),
        (
            file_with(qa("Who?", ("cat", "2"))),
            "question 1 has no answer_start that is a whole number: {'answer_start': '2'",
        ),
        (file_with(qa("Who?", ("cat", True))), "no answer_start that is a whole number"),
        (file_with(qa("Who?", (None, 2))), "question 1 has no text that is a text"),
        (
            file_with(qa("Who?")),
            "paragraph 2, question 1 has the answers [] and is_impossible False: a question has an "
            "answer, or is_impossible true: 'Who?'",
        ),
        (
            file_with(qa("Who?", ("cat", 2), is_impossible=True)),
            "has the answers ['cat'] and is_impossible True",
        ),
        (file_with(qa("Who?", ("cat", 2), is_impossible="no")), "and is_impossible 'no'"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(folder, content, message):
    refused(content, message)


def test_what_is_no_file_or_no_utf_8_is_refused(folder):
    write("a.json", *many(3))
    for given, message in (
        ({"data": "none.json"}, "--data none.json is no file here: name one"),
        ({"data": ""}, "--data  is no file here"),
        ({"data": "."}, "--data . is no file here"),
        ({"data": "a.json", "valid": "none.json"}, "--valid none.json is no file here"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            open_squad(**given)
    Path("bad.json").write_bytes('{"data": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"bad\.json is not UTF-8 near byte 10"):
        open_squad("bad.json")


def test_one_paragraph_cannot_be_divided(folder):
    write("a.json", *many(1), *many(1))
    with pytest.raises(ValueError, match=r"a\.json has one paragraph, too few"):
        open_squad("a.json")
    assert open_squad("a.json", valid="a.json").splits["train"].keys() == {"ñ0 cat"}


def test_a_few_misplaced_answers_are_kept_many_refused(folder):
    """For example, offsets in bytes are right only if no accent stands before the answer."""
    context = "Ñandú, a bird"
    wrong, right = qa("Wrong?", ("bird", 11)), qa("Right?", ("bird", 9))
    none = qa("None?", is_impossible=True)
    write("a.json", (context, [wrong, *[right] * 9]))
    questions = open_squad("a.json", valid="a.json").splits["train"][context]
    assert [q.span for q in questions] == [None, *[(9, 13)] * 9]
    for others in ([right] * 8, [right] * 8 + [none] * 9, []):
        write("a.json", (context, [wrong, *others]))
        n = 1 + others.count(right)
        message = f"1 of {n} answers are not where answer_start says"
        with pytest.raises(ValueError, match=f"{message}.*where 'bird' should .* there is 'rd'"):
            open_squad("a.json", valid="a.json")
    write("b.json", ("Claus\u00a0Koepcke", [qa("Who?", ("Claus Koepcke", 0))]))
    with pytest.raises(ValueError, match=r"where 'Claus Koepcke' should .* 'Claus\\xa0Koepcke'"):
        open_squad("b.json")


@pytest.mark.parametrize("form", ["{}\n", "[{}]", "[\n{},\n{}\n]"])
def test_rows_of_hugging_face_are_named(folder, form):
    answers = {"text": ["cat"], "answer_start": [2]}
    row = json.dumps({"id": "1", "context": "A cat.", "question": "Who?", "answers": answers})
    refused(form.replace("{}", row), "has a row for each question, as Hugging Face's datasets")
    refused(f"{row}\n{row}\n", "has a row for each question, as Hugging Face's datasets")
