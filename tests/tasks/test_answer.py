"""tasks/answer.py: rows of a question and a window, once an epoch, and answers read from them."""

import json
import math
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import shared

from bert import BERT, BERTConfig
from bpe import Tokenizer
from data.encoding import CLS, PAD, SEP, encode_text
from engine.evaluation import evaluate
from engine.processes import Processes
from tasks.answer import Data, Flags, context_windows, encode_context
from wordpiece import WordPiece

T = 48
ALONE = Processes(0, 1, torch.device("cpu"))


def questions(n: int, seed: int, v2: bool = False) -> list[dict]:
    """n paragraphs of 3 to 24 words that occur once, so that a text tells where it stands, with
    questions that all differ. Every third has no answer in version 2.0."""
    random, found = Random(seed), []
    for i in range(n):
        words = [f"{chr(65 + j)}{i}é" for j in range(random.choice((3, 7, 15, 24)))]
        context, qas = " ".join(words), []
        for k in range(random.randint(1, 4)):
            first = random.randrange(len(words))
            said = " ".join(words[first : first + random.randint(1, 3)])
            answers = [{"text": said, "answer_start": context.index(said)}]
            if k == 1:
                answers.append({"text": words[0], "answer_start": 0})
            none = {"is_impossible": k == 2, "answers": [] if k == 2 else answers}
            asked = f"Where {'so ' * random.randint(0, 5)}is {seed}-{i}-{k}?"
            qas.append({"question": asked, "answers": answers, **(none if v2 else {})})
        found.append({"context": context, "qas": qas})
    return found


def write(name: str, paragraphs: list[dict]) -> list[tuple[str, dict]]:
    """(context, qa) for each question of the file."""
    Path(name).write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")
    return [(paragraph["context"], qa) for paragraph in paragraphs for qa in paragraph["qas"]]


ALPHABET = "".join(map(chr, range(33, 127))) + "é"
TOKENIZERS = {
    "bpe": Tokenizer.train(["Where is so so A1é B2é A12"], 262, special_tokens=(PAD, CLS, SEP)),
    "wordpiece": WordPiece.train([f"{c} {c}{c}" for c in ALPHABET], 400, lowercase=False),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("train.json", questions(37, 1))
    write("valid.json", questions(13, 2))
    write("v2.json", questions(13, 3, v2=True))


def splits(data="train", valid="valid", *, tokenizer="bpe", block_size=T, **settings):
    settings = {"batch_size": 3, "eval_tokens": 0, "cache_dir": "cache", **settings}
    settings.setdefault("tokens_per_step", settings["batch_size"] * block_size)
    paths = {"data": f"{data}.json", "valid": f"{valid}.json" if valid else ""}
    sizes = {"vocab_size": 270, "block_size": block_size}
    return Data.splits(Flags(**paths, **settings), sizes, TOKENIZERS.get(tokenizer))


def rows_of(data: Data, batch: dict[str, torch.Tensor]) -> list[tuple]:
    """(ids, start, end) of a batch's rows; a micro-batch that is not to be counted has none."""
    assert {*batch} - {"keep"} == {"tokens", "segments", "start_targets", "end_targets"}
    special = data.tokenizer.special_tokens
    tokens, starts, ends = (batch[k] for k in ("tokens", "start_targets", "end_targets"))
    keep = batch.get("keep", torch.ones_like(tokens, dtype=torch.bool))
    assert torch.equal(tokens == special[PAD], ~keep) and ("keep" in batch) == (not keep.all())
    assert len(tokens) == len(starts) == len(ends) and tokens.dtype == starts.dtype == torch.int64
    if len(tokens) == 1 and (starts == -100).all() and (ends == -100).all():
        return []
    for ids, segment, kept in zip(tokens, batch["segments"], keep, strict=True):
        first, second = (ids == special[SEP]).nonzero().flatten().tolist()
        assert ids[0] == special[CLS] and second == kept.sum() - 1
        want = [0] * (first + 1) + [1] * (second - first) + [0] * (len(ids) - second - 1)
        assert segment.tolist() == want
    found = zip(tokens, keep, starts.tolist(), ends.tolist(), strict=True)
    return [(tuple(ids[kept].tolist()), start, end) for ids, kept, start, end in found]


def epoch(data: Data, number: int = 0) -> list[tuple]:
    steps = range(number * data.n_batches, (number + 1) * data.n_batches)
    return [row for i in steps for row in rows_of(data, data.batch(i))]


def wanted_rows(name: str, tokenizer, T: int, none: tuple[int, int] = (0, 0)) -> list[tuple]:
    """The rows of a file made from its text, by the places of characters alone."""
    special, rows = tokenizer.special_tokens, []
    content = json.loads(Path(f"{name}.json").read_text(encoding="utf-8"))
    for paragraph in content["data"][0]["paragraphs"]:
        context = encode_context(tokenizer, paragraph["context"])
        for qa in paragraph["qas"]:
            asked = encode_text(tokenizer, qa["question"])[: min(64, (T - 3) // 2)]
            start = end = -1
            for answer in qa["answers"][:1]:
                start = answer["answer_start"]
                end = start + len(answer["text"]) - 1
            for a, b, first in context_windows(len(asked), len(context.ids), T):
                inside = range(a, b)
                found = [
                    [i for i in range(len(context.ids))
                     if context.starts[i] <= character < context.ends[i]]
                    for character in (start, end)
                ]  # fmt: skip
                place = none
                if all(found) and found[0][0] in inside and found[1][-1] in inside:
                    place = found[0][0] - a + first, found[1][-1] - a + first
                ids = [special[CLS], *asked, special[SEP], *context.ids[a:b], special[SEP]]
                rows.append((tuple(map(int, ids)), *place))
    return rows


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("data", ["train", "v2"])
def test_every_window_of_every_question_comes_once_an_epoch(folder, data, tokenizer):
    train, _ = splits(data, tokenizer=tokenizer)
    want = wanted_rows(data, train.tokenizer, T)
    assert len(want) > 2 * len(train.questions)
    epochs = [epoch(train, number) for number in range(3)]
    for rows in epochs:
        assert sorted(rows) == sorted(want)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # With and without an answer in them.
    without = sum(row[1:] == (0, 0) for row in want)
    assert 0.2 * len(want) < without < 0.9 * len(want)


def test_targets_are_the_answer(folder):
    train, _ = splits(block_size=91)  # whole questions, which tell which one it is
    end_of_part, counts = train.tokenizer.special_tokens[SEP], Counter()
    answers = {f" {question.text}": question.answers[0] for question in train.questions}
    for ids, start, end in epoch(train):
        asked = train.tokenizer.decode(ids[1 : ids.index(end_of_part)])
        if start:
            assert train.tokenizer.decode(ids[start : end + 1]) == f" {answers[asked]}"
        else:
            assert end == 0 and f"{answers[asked]} " not in train.tokenizer.decode(ids)
        counts[bool(start)] += 1
    assert counts[True] >= len(answers) and counts[False] > 9


def test_batches_are_a_pure_function_of_seed_and_index(folder):
    (train, validation), (second, _) = splits(), splits()
    n = train.n_batches
    want = {i: rows_of(train, train.batch(i)) for i in (0, 1, n - 1, n, 2 * n, 7 * n + 3)}
    for i in sorted(want, reverse=True):  # another order, another object, epochs back and forth
        assert rows_of(second, second.batch(i)) == want[i] == rows_of(train, train.batch(i))
    other, unmoved = splits(seed=7)
    assert rows_of(other, other.batch(0)) != want[0]
    assert epoch(unmoved) == epoch(validation) == epoch(validation)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_step_holds_the_same_rows_however_many_micro_batches_share_it(folder, parts):
    whole, _ = splits(batch_size=8, tokens_per_step=8 * T)
    dealt, _ = splits(batch_size=8 // parts, tokens_per_step=8 * T)
    assert dealt.n_batches == parts * whole.n_batches
    assert (
        dealt.tokens_per_epoch == dealt.n_batches * dealt.tokens_per_batch == whole.tokens_per_epoch
    )
    empty = missing = 0
    for step in range(whole.n_batches + 3):
        batches = [dealt.batch(step * parts + m) for m in range(parts)]
        found = [rows_of(dealt, batch) for batch in batches]
        assert sorted(chain.from_iterable(found)) == sorted(rows_of(whole, whole.batch(step)))
        empty += found.count([])
        missing += max(0, parts - len(whole.batch(step)["tokens"]))
        assert max(batch["tokens"].numel() for batch in batches) <= 8 // parts * T + T
    assert empty == missing and (empty > 0) == (parts > 2)


def test_row_length_makes_rows_shorter_and_steps_of_more_rows(folder):
    for row_length, longest in ((37, 37), (T, T), (500, T)):
        train, validation = splits(row_length=row_length)
        for data in (train, validation):
            assert max(len(ids) for ids, *_ in epoch(data)) == longest
        assert sorted(epoch(train)) == sorted(wanted_rows("train", train.tokenizer, longest))
        assert max(train.batch(i)["tokens"].numel() for i in range(train.n_batches)) > 2.5 * T
    with pytest.raises(ValueError, match="rows of 4 tokens have no room for a question"):
        splits(row_length=4)


# ---- validation ----------------------------------------------------------------------------------


def test_a_limited_evaluation_takes_evenly_spaced_questions_with_all_windows(folder):
    _, whole = splits()
    rows = wanted_rows("valid", whole.tokenizer, T)
    tokens, n = sum(len(row[0]) for row in rows), len(whole.questions)
    assert sorted(epoch(whole)) == sorted(rows)
    train, some = splits(eval_tokens=math.ceil(tokens / 4))
    assert some.chosen.tolist() == [k * n // (n // 4) for k in range(n // 4)]
    kept = [rows[r] for q in some.chosen for r in whole.rows_of[q]]
    assert sorted(epoch(some)) == sorted(kept) and len(kept) < len(rows) / 2
    assert len(train.chosen) == len(train.questions)
    assert f"{n // 4} questions of {n}, evenly spaced, about " in some.describe()
    assert splits(eval_tokens=1)[1].chosen.tolist() == [0]
    assert len(splits(eval_tokens=tokens)[1].chosen) == n


def perfect(data: Data) -> dict[int, np.ndarray]:
    """Logits that are highest at the targets; windows without the answer are less sure of that
    than the one with it is of the answer. What is no target is noise."""
    random, predicted = np.random.default_rng(0), {}
    for i in range(data.n_batches):
        batch = data.batch(i)
        B, length = batch["tokens"].shape
        x = random.uniform(0, 1, (B, 2, length + i % 3)).astype(np.float32)
        for side, name in enumerate(("start_targets", "end_targets")):
            for row, place in enumerate(batch[name].tolist()):
                x[row, side, max(place, 0)] = 9 if place > 0 else 5
        if "keep" in batch:
            x[:, :, :length][(~batch["keep"][:, None].expand(-1, 2, -1)).numpy()] = 99
        x[:, :, length:] = 99
        predicted[i] = x
    return predicted


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_perfect_logits_measure_100(folder, tokenizer):
    for batch_size in (1, 3, 40):
        _, validation = splits(tokenizer=tokenizer, batch_size=batch_size, block_size=91)
        assert validation.n_batches > 1 and len(validation.rows) > 1.2 * len(validation.questions)
        assert validation.measure(perfect(validation)) == {"exact_match": 100.0, "f1": 100.0}
    _, validation = splits("v2", "v2", tokenizer=tokenizer, block_size=91)
    figures = validation.measure(perfect(validation))
    assert len(figures) == 5 and set(figures.values()) == {100.0}


def test_what_is_measured_does_not_depend_on_the_batches(folder):
    """Random logits, but the same for a row in whatever batch it is."""
    for data in ("valid", "v2"):
        figures = []
        for batch_size in (1, 3, 40):
            _, validation = splits(valid=data, batch_size=batch_size, eval_tokens=3000)
            assert 5 < len(validation.chosen) < len(validation.questions)
            predicted = {}
            for i in range(validation.n_batches):
                batch = validation.batch(i)
                predicted[i] = np.zeros((len(batch["tokens"]), 2, T), np.float32)
                for x, (ids, *_) in zip(predicted[i], rows_of(validation, batch), strict=True):
                    random = np.random.default_rng(ids)
                    x[:] = random.standard_normal((2, T))
                    x[:, 0] += 2.5
            figures.append(validation.measure(predicted))
        assert figures[0] == figures[1] == figures[2]
        assert 0 < figures[0]["f1"] < 100
    assert 0 < figures[0]["unanswerable_exact_match"] < 100


def test_one_wrong_question_costs_its_share(folder):
    _, validation = splits("v2", "v2", batch_size=1, block_size=91)
    n, none = len(validation.questions), sum(not q.answers for q in validation.questions)
    candidates = zip(validation.questions, validation.rows_of, strict=True)
    question = next(q for q, rows in candidates if q.answers and len(rows) > 1)
    marked = (
        *encode_text(validation.tokenizer, question.text),
        validation.tokenizer.special_tokens[SEP],
    )
    predicted, rows = perfect(validation), 0
    for i in range(validation.n_batches):
        found = rows_of(validation, validation.batch(i))
        for x, (ids, *_) in zip(predicted[i], found, strict=True):
            if ids[1 : len(marked) + 1] == marked:
                x[:], x[:, 0], rows = 0, 9, rows + 1
    assert rows > 1
    figures = validation.measure(predicted)
    assert figures["exact_match"] == figures["f1"] == pytest.approx(100 - 100 / n, abs=1e-4)
    lost = 100 / (n - none)
    assert figures["answerable_exact_match"] == pytest.approx(100 - lost, abs=1e-4)
    assert figures["unanswerable_exact_match"] == 100.0


class Toy(nn.Module):
    """BERT with two numbers for each place, which are minus infinity at padding."""

    def __init__(self):
        super().__init__()
        self.bert = BERT(BERTConfig(270, T, n_layer=1, n_head=2, n_embd=24, dropout=0.0))
        self.head = nn.Linear(24, 2)

    def forward(self, tokens, segments, start_targets, end_targets, keep=None):
        logits = self.head(self.bert.features(tokens, segments, keep))
        if keep is not None:
            logits = logits.masked_fill(~keep[..., None], -torch.inf)
        return {
            name: F.cross_entropy(logits[..., i], targets, reduction="sum")
            for i, (name, targets) in enumerate((("start", start_targets), ("end", end_targets)))
        }


def test_the_loss_is_the_same_whatever_the_batch(folder):
    model, reports = Toy(), []
    for batch_size in (2, 40):
        _, validation = splits(batch_size=batch_size)
        reports.append(evaluate(model, validation, ALONE, torch.no_grad))
    assert reports[1] == pytest.approx(reports[0], rel=1e-5)
    assert reports[0]["loss"] == pytest.approx(reports[0]["start"] + reports[0]["end"])


def test_report_is_per_row(folder):
    _, validation = splits()
    report = validation.report({"start": 12.0, "end": 8.0}, {"start": 4, "end": 4})
    assert report == {"start": 3.0, "end": 2.0, "loss": 5.0}
    assert validation.report({"start": 0.0, "end": 0.0}, {"start": 0, "end": 0})["loss"] == 0.0


# ---- what cannot be used, descriptions -----------------------------------------------------------


def test_misplaced_answers_are_not_learnt_but_still_asked_for(folder):
    paragraphs = questions(37, 1)
    lost = paragraphs[5]["qas"][0]
    lost["answers"] = [{"text": "elsewhere", "answer_start": 1}]
    write("train.json", paragraphs)
    train, validation = splits("train", "train")
    note = "; 1 question left out, its answer is not where the file says"
    assert train.describe().endswith(note) and "left out" not in validation.describe()
    assert len(train.questions) == len(validation.questions) - 1
    marked = encode_text(train.tokenizer, lost["question"])
    rows = {True: [], False: []}
    for row in epoch(validation):
        rows[list(row[0][1 : len(marked) + 1]) == marked].append(row)
    assert all(row[1:] == (-100, -100) for row in rows[True]) and rows[True]
    assert all(min(row[1:]) >= 0 for row in rows[False])
    assert sorted(epoch(train)) == sorted(rows[False])
    figures = validation.measure(perfect(validation))
    assert 0 < 100 - figures["exact_match"] < 400 / len(validation.questions)


def test_answers_that_have_no_tokens_are_left_out(folder):
    context = "A\u00ad \u200b cat"
    asked = [
        {"question": f"{i}?", "answers": [{"text": "cat", "answer_start": 5}]} for i in range(3)
    ]
    nothing = {"question": "?", "answers": [{"text": "\u200b", "answer_start": 3}]}
    write("train.json", [{"context": context, "qas": [*asked, nothing]}])
    assert len(splits(tokenizer="wordpiece")[0].questions) == 3
    assert len(splits(tokenizer="bpe")[0].questions) == 4
    write("train.json", [{"context": context, "qas": [nothing]}])
    with pytest.raises(ValueError, match="no answer in train for train is where the file says"):
        splits(tokenizer="wordpiece")
    none = {"question": "?", "answers": [], "is_impossible": True}
    write("train.json", [{"context": "\u200b", "qas": [none]}])
    with pytest.raises(ValueError, match=r"train has a context without words in it, '.*': remove"):
        splits(tokenizer="wordpiece")


def test_describe_counts_what_is_there(folder):
    train, validation = splits("v2", "valid")
    rows, none = epoch(train), sum(not question.answers for question in train.questions)
    tokens = sum(len(row[0]) for row in rows)
    text = train.describe()
    assert text.startswith(
        f"{len(train.questions)} questions about 13 paragraphs, {none} of them without an answer, "
        f"{len(rows)} rows, {tokens:,} tokens, {train.n_batches} steps with "
    )
    cells = sum(train.batch(i)["tokens"].numel() for i in range(train.n_batches))
    assert float(re.search(r"with ([\d.]+)% padding$", text)[1]) == pytest.approx(
        100 * (1 - tokens / cells), abs=3
    )
    assert "steps" not in validation.describe() and "without" not in validation.describe()
    assert train.rule == "the given file validates" and len(train.fingerprint) == 64


def test_prompts_are_held_out_questions_with_their_contexts(folder):
    for data in splits():
        first = json.loads(Path("valid.json").read_text(encoding="utf-8"))["data"][0]["paragraphs"]
        pairs = [(p["qas"][0]["question"], p["context"]) for p in first[:4]]
        assert data.prompts == [f"{question}\n{context}" for question, context in pairs]


def test_a_tokenizer_is_learnt_from_the_training_half(folder):
    paragraph = {"context": "XYXY XYXY", "qas": [{"question": "ABAB?", "answers": []}]}
    paragraph["qas"][0]["answers"] = [{"text": "XYXY", "answer_start": 0}]
    other = {"context": "QZQZ", "qas": [{"question": "jkjk?", "answers": []}]}
    other["qas"][0]["answers"] = [{"text": "QZQZ", "answer_start": 0}]
    write("train.json", [paragraph, paragraph])
    write("valid.json", [other, other])
    train, validation = splits(tokenizer="none")
    learnt = {token for token in train.tokenizer.ranks if len(token) > 1}
    assert {b" XYXY", b"ABAB"} & learnt and not any(set(t) & set(b"QZjk") for t in learnt)
    assert {PAD, CLS, SEP} <= train.tokenizer.special_tokens.keys()
    assert validation.tokenizer is train.tokenizer


def test_real_questions_with_windows():
    config = Flags(data=str(shared("xquad.en.json")), eval_tokens=0, batch_size=8, seed=5)
    train, validation = Data.splits(config, {"block_size": 300}, TOKENIZERS["bpe"])
    assert len(train.questions) + len(validation.questions) == 1190
    assert len(validation.rows) > 2 * len(validation.questions)
    figures = validation.measure(perfect(validation))
    assert figures["exact_match"] < 100  # answers of more than 30 tokens, with byte tokens
    answers = [len(encode_text(validation.tokenizer, q.answers[0])) for q in validation.questions]
    assert figures["exact_match"] >= 100 * np.mean(np.array(answers) <= 28)
