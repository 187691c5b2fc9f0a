"""tasks/answer.py: from a question and its context to rows, and back to the text's characters."""

import json
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import gpt2_files, shared
from hypothesis import given
from hypothesis import strategies as st

from bpe import Tokenizer
from data.encoding import CLS, PAD, SEP, encode_text
from data.gpt2_files import read_gpt2_files
from data.squad import exact_match
from tasks.answer import (
    Answer,
    Window,
    context_windows,
    encode_context,
    encode_question,
    question_rows,
    read_answer,
)
from tasks.encoders import collate
from wordpiece import WordPiece

TEXT = (
    "Über 6½ km² (2,700 sq mi); €5 or £3–4?  A   naïve user's x2... don't! 数学 a\u00adb \u200b.\n"
)
BPE = Tokenizer.train([TEXT * 3], 300, special_tokens=(PAD, CLS, SEP))
PIECES = {low: WordPiece.train([TEXT * 3], 90, low) for low in (True, False)}
# Characters newer than this Python's Unicode may be punctuation to one library alone.
KNOWN = st.characters(exclude_categories=("Cn", "Cs"))
TRICKY = st.sampled_from([*TEXT, "\x1c", "\x85", "\v", "\u0301", "≠", "İ", "Σ", "\ufffd", "々"])
ANY = st.lists(st.one_of(KNOWN, TRICKY), max_size=30).map("".join)


@pytest.fixture(scope="module")
def xquad():
    content = json.loads(shared("xquad.en.json").read_text(encoding="utf-8"))
    return [p for article in content["data"] for p in article["paragraphs"]]


# ---- tokens and characters -----------------------------------------------------------------------


@given(ANY, st.booleans())
def test_units_of_wordpiece_have_the_ids_of_the_whole(text, lowercase):
    tokenizer, spaced = PIECES[lowercase], " ".join(text.split())  # U+0085 divides words here
    assert encode_context(tokenizer, text).ids.tolist() == encode_text(tokenizer, spaced)


@pytest.mark.parametrize("lowercase", [True, False])
def test_units_of_wordpiece_have_the_ids_of_the_whole_in_real_text(xquad, lowercase):
    texts = [paragraph["context"] for paragraph in xquad]
    tokenizer = WordPiece.train(texts[::3], 3000, lowercase, min_frequency=20)
    for text in texts:
        assert encode_context(tokenizer, text).ids.tolist() == encode_text(tokenizer, text)


@given(ANY)
def test_bytes_of_bpe_are_the_text_with_a_space_where_white_space_stood(text):
    context = encode_context(BPE, text)
    assert BPE.decode(context.ids) == "".join(f" {part}" for part in text.split())


def test_bpe_gets_most_real_text_as_it_would_whole(xquad):
    tokenizer = read_gpt2_files(*gpt2_files())
    n = same = 0
    for paragraph in xquad[::4]:
        whole = encode_text(tokenizer, paragraph["context"])
        units = encode_context(tokenizer, paragraph["context"]).ids
        n, same = n + len(whole), same + len(set(units.tolist()) & set(whole)) / len(set(whole))
        assert len(whole) <= len(units) <= 1.1 * len(whole)
    assert same > 0.97 * len(xquad[::4])


@given(ANY)
def test_each_visible_character_is_in_one_unit(text):
    context = encode_context(BPE, text)
    units = sorted(set(zip(context.starts.tolist(), context.ends.tolist(), strict=True)))
    inside = [i for start, end in units for i in range(start, end)]
    assert inside == [i for i, c in enumerate(text) if not c.isspace()]
    assert (np.diff(context.starts) >= 0).all()
    for start, end in units:
        marks = [unicodedata.category(c).startswith("P") for c in text[start:end]]
        assert not any(marks) or len(marks) == 1


def test_units_by_hand():
    context = encode_context(BPE, "Don't—(x2) 数学 €5 a\u200bb  ½. ~5$6^7")
    units = dict(zip(context.starts.tolist(), context.ends.tolist(), strict=True))
    assert [context.text[a:b] for a, b in units.items()] == (
        [
            "Don",
            "'",
            "t",
            "—",
            "(",
            "x2",
            ")",
            "数",
            "学",
            "€5",
            "a\u200bb",
            "½",
            ".",
            "~",
            "5",
            "$",
            "6",
            "^",
            "7",
        ]
    )


@given(ANY.filter(len), st.data())
def test_an_answer_is_the_tokens_whose_units_it_overlaps(text, data):
    tokenizer = PIECES[True]
    context = encode_context(tokenizer, text)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    shared_with = [
        i
        for i, (a, b) in enumerate(zip(context.starts, context.ends, strict=True))
        if set(range(a, b)) & set(range(start, end))
    ]
    found = context.tokens(start, end)
    assert found == ((shared_with[0], shared_with[-1]) if shared_with else None)
    if found:
        a, b = context.characters(*found)
        lost = text[start:a] + text[b:end]  # nothing but what has no tokens
        assert not encode_text(tokenizer, lost)


def test_gold_answers_come_back_from_their_tokens(xquad):
    """One of 1,190 does not: the file cuts "(2,700" to "(2,70"."""
    tokenizer, lost, n = WordPiece.train([p["context"] for p in xquad[::3]], 2000), [], 0
    for paragraph in xquad:
        context = encode_context(tokenizer, paragraph["context"])
        for answer in (answer for qa in paragraph["qas"] for answer in qa["answers"]):
            start = answer["answer_start"]
            tokens = context.tokens(start, start + len(answer["text"]))
            a, b = context.characters(*tokens)
            n += 1
            if not exact_match(context.text[a:b], answer["text"]):
                lost.append((answer["text"].split()[-1], context.text[a:b].split()[-1]))
    assert n == 1190 and lost == [("(2,70", "(2,700")]


# ---- windows and rows ----------------------------------------------------------------------------


@given(st.integers(0, 30), st.integers(1, 400), st.integers(1, 300))
def test_windows_cover_the_context_with_the_overlap(n_question, n_context, n_free):
    T = n_free + n_question + 3
    found, overlap = context_windows(n_question, n_context, T), min(128, n_free // 2)
    assert found[0].start == 0 and found[-1].stop == n_context
    assert all(w.first == n_question + 2 and 0 < w.stop - w.start <= n_free for w in found)
    assert all(w.length == n_question + w.stop - w.start + 3 <= T for w in found)
    for one, two in pairwise(found):
        assert one.stop - one.start == n_free and one.stop - two.start == overlap
        assert two.stop > one.stop  # none is part of another
    # What is no longer than the overlap, and one more, is whole in one of them.
    for start in range(n_context - overlap):
        assert any(w.start <= start and start + overlap < w.stop for w in found)


def test_windows_by_hand():
    assert context_windows(3, 10, 16) == [Window(0, 10, 5)]
    assert context_windows(3, 11, 16) == [Window(0, 10, 5), Window(5, 11, 5)]
    found = context_windows(10, 800, 313)
    assert [w[:2] for w in found] == [(0, 300), (172, 472), (344, 644), (516, 800)]


def test_places_of_an_answer_are_those_of_its_window_or_cls():
    window = Window(10, 20, 5)
    assert window.places((10, 19)) == (5, 14) and window.places((12, 12)) == (7, 7)
    assert window.places((9, 12)) == window.places((15, 20)) == window.places(None) == (0, 0)
    assert window.places((20, 22)) == window.places((2, 9)) == (0, 0)


def test_questions_are_cut_to_64_tokens_and_half_of_the_room():
    long = "x " * 100
    assert [len(encode_question(BPE, long, T)) for T in (512, 131, 130, 37, 5)] == (
        [64, 64, 63, 17, 1]
    )
    assert encode_question(BPE, "Don't  ask", 64).tolist() == BPE.encode(" Don't ask")
    with pytest.raises(ValueError, match="rows of 4 tokens have no room for a question: choose 5"):
        encode_question(BPE, "x", 4)


@pytest.mark.parametrize("question", ["Why\tso?", ""])
def test_a_row_is_cls_question_sep_window_sep(question):
    context, found, rows = question_rows(BPE, question, TEXT, 37)
    special, asked = BPE.special_tokens, encode_text(BPE, question)
    assert len(found) > 1 and context.text == TEXT
    for window, parts in zip(found, rows, strict=True):
        batch = collate([parts], BPE)
        (ids,), (segments,) = batch["tokens"], batch["segments"]
        inside = context.ids[window.start : window.stop].tolist()
        want = [special[CLS], *asked, special[SEP], *inside, special[SEP]]
        assert ids.tolist() == want and ids.dtype == torch.int64 and len(ids) == window.length <= 37
        assert segments.tolist() == [0] * (len(asked) + 2) + [1] * (len(inside) + 1)
        assert ids[window.first] == inside[0]


def test_a_context_without_words_is_refused():
    with pytest.raises(ValueError, match=r"the context ' \\n' has no words in it"):
        question_rows(BPE, "why?", " \n", 37)


# ---- logits -> text ------------------------------------------------------------------------------


def quiet(found, T, noise=0.0, seed=0):
    """Logits for each window with `noise`, and very high ones where no answer can be: in the
    question, at [SEP], and behind the row."""
    random, logits = np.random.default_rng(seed), []
    for window in found:
        x = noise * random.standard_normal((2, T)).astype(np.float32)
        x[:, 1 : window.first] = 12
        x[:, window.length - 1 :] = 12
        logits.append(x)
    return logits


@pytest.mark.parametrize("tokenizer", [BPE, PIECES[True], PIECES[False]])
@pytest.mark.parametrize("said", ["Über 6½", "(2,700 sq mi)", "x2... don't!", "naïve", "a\u00adb"])
def test_the_answer_is_the_text_of_the_best_window(tokenizer, said):
    context, found, rows = question_rows(tokenizer, "what?", TEXT, 45)
    start = TEXT.index(said)
    tokens = context.tokens(start, start + len(said))
    inside = [i for i, window in enumerate(found) if window.places(tokens) != (0, 0)]
    logits = quiet(found, 60, noise=0.5)
    a, b = found[inside[-1]].places(tokens)
    logits[inside[-1]][0, a] += 9
    logits[inside[-1]][1, b] += 9
    answer = read_answer(context, found, logits, may_abstain=True)
    assert answer[:3] == (said, start, start + len(said))
    row = collate([rows[inside[-1]]], tokenizer)["tokens"][0]
    window = torch.tensor(logits[inside[-1]][:, : len(row)]).double()
    want = window[0].softmax(0)[a] * window[1].softmax(0)[b]
    assert answer.probability == pytest.approx(want.item(), rel=1e-6, abs=0)


def test_no_answer_where_every_window_says_so():
    context, found, _ = question_rows(BPE, "what?", TEXT, 45)
    assert len(found) > 2
    logits = quiet(found, 45)
    for i, x in enumerate(logits):
        x[:, 0] = 3 + i
    logits[1][0, found[1].first + 2] = 5.5  # and the end 0: less than the lowest null, which is 6
    answer = read_answer(context, found, logits, may_abstain=True)
    x = torch.tensor(logits[0][:, : found[0].length]).double().softmax(1)
    assert answer == Answer("", 0, 0, pytest.approx((x[0, 0] * x[1, 0]).item(), rel=1e-6, abs=0))
    assert read_answer(context, found, logits, may_abstain=False).text
    logits[1][0, found[1].first + 2] = 6.0  # not more than the best span: an answer
    assert read_answer(context, found, logits, may_abstain=True).text


def test_a_row_has_the_tokens_of_its_window_only():
    context = encode_context(BPE, TEXT)
    row = Window(4, 9, 3).row(np.array([7]), context)
    ids = collate([row], BPE)["tokens"][0]
    assert ids[3:-1].tolist() == context.ids[4:9].tolist() and len(ids) == 9
