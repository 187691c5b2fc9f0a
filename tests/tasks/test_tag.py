"""tasks/tag.py: every word is asked for once, and its label is found at the same place."""

import re
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import shared
from hypothesis import given
from hypothesis import strategies as st

from bpe import Tokenizer
from data.conll import open_tagged
from data.encoding import CLS, MASK, PAD, SEP, SPECIAL, encode_text
from tasks.tag import Data, entity_scores, join_rows, sentence_rows, word_windows
from wordpiece import UNK, WordPiece

TYPES = ("person", "place", "x")
# A letter begins a word and a digit goes on with it: "a123" is four sub-tokens.
DIGITS = WordPiece([PAD, UNK, CLS, SEP, MASK, *"abc.", *(f"##{i}" for i in range(10))])
T = 13


def sentences(n: int, longest: int = 20, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """n tagged sentences in IOB2; no word comes twice in all of them."""
    random, number, found = Random(seed), 50_000 * seed, []
    for _ in range(n):
        words, tags = [], []
        for _ in range(random.randint(1, longest)):
            number += random.choice((1, 1, 1, 90))
            words.append(f"{random.choice('abc')}{number}")
            inside = tags and tags[-1] != "O" and random.random() < 0.6
            begun = random.choice(("O", *(f"B-{type_}" for type_ in TYPES)))
            tags.append(f"I-{tags[-1][2:]}" if inside else begun)
        found.append((words, tags))
    return found


TRAIN, VALID = sentences(150), sentences(40, seed=1)
LABEL = {w: tag for rows in (TRAIN, VALID) for row in rows for w, tag in zip(*row, strict=True)}


def write(name: str, rows: list[tuple[list[str], list[str]]]) -> str:
    text = ["".join(f"{w}\t{tag}\n" for w, tag in zip(*row, strict=True)) for row in rows]
    Path(name).write_text("\n".join(text), encoding="utf-8")
    return name


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("train.conll", TRAIN)
    write("valid.conll", VALID)
    return tmp_path


def splits(data="train", valid="valid", tokenizer=DIGITS, *, block_size=T, labels=(), **settings):
    settings = {"batch_size": 4, "eval_tokens": 0, "row_length": 0, "seed": 5, **settings}
    settings.setdefault("tokens_per_step", settings["batch_size"] * block_size)
    paths = {"data": f"{data}.conll", "valid": valid and f"{valid}.conll", "cache_dir": "cache"}
    settings = {"tokenizer": "", "pattern": "gpt2", "columns": "", **settings}
    config = SimpleNamespace(**paths, **settings)
    sizes = {"vocab_size": 300, "block_size": block_size, "labels": labels}
    return Data.splits(config, sizes, tokenizer)


def read_rows(data: Data, batch: dict) -> list[list[tuple[str, str | None]]]:
    """[(word, label asked for or None)] of each row, from the tensors alone."""
    keep = batch.get("keep", torch.ones_like(batch["tokens"], dtype=torch.bool))
    assert ("keep" in batch) == (not keep.all()) and batch["tokens"].dtype == torch.int64
    assert torch.equal(keep, batch["tokens"] != DIGITS.special_tokens[PAD])
    assert set(batch) <= {"tokens", "targets", "keep"} and batch["targets"].dtype == torch.int64
    assert batch["tokens"].shape == batch["targets"].shape
    rows = []
    for tokens, targets, n in zip(batch["tokens"], batch["targets"], keep.sum(1), strict=True):
        names = [DIGITS.tokens[i] for i in tokens[:n]]
        assert (names[0], names[-1]) == (CLS, SEP) and (targets[n:] == -100).all()
        row = []
        for name, target in zip(names[1:-1], targets[1 : n - 1].tolist(), strict=True):
            label = None if target == -100 else data.labels[target]
            if name.startswith("##"):
                assert label is None  # only the first sub-token is asked
                row[-1] = row[-1][0] + name[2:], row[-1][1]
            else:
                row.append((name, label))
        assert targets[0] == targets[n - 1] == -100
        rows.append(row)
    return rows


def epoch(data: Data, number: int = 0) -> list[list[tuple[str, str | None]]]:
    numbers = range(number * data.n_batches, (number + 1) * data.n_batches)
    batches = [data.batch(i) for i in numbers]
    return [row for b in batches if (b["targets"] != -100).any() for row in read_rows(data, b)]


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size,row_length", [(13, 0), (37, 13), (37, 0), (200, 0), (9, 40)])
def test_every_word_is_asked_for_once_an_epoch_with_its_own_label(folder, block_size, row_length):
    longest = min(block_size, row_length or block_size)
    for data, rows in zip(
        splits(block_size=block_size, row_length=row_length), (TRAIN, VALID), strict=True
    ):
        for number in (0, 3) if data.split == "train" else (0,):
            found = epoch(data, number)
            asked = [word for row in found for word, label in row if label]
            assert sorted(asked) == sorted(word for words, _ in rows for word in words)
            assert all(label in (None, LABEL[word]) for row in found for word, label in row)
            assert max(2 + sum(map(len, dict(row))) for row in found) <= longest
            sentence = {word: i for i, (words, _) in enumerate(rows) for word in words}
            for row in found:  # consecutive words of one sentence, and so are those asked for
                words, _ = rows[sentence[row[0][0]]]
                shown, labelled = [w for w, _ in row], [w for w, label in row if label]
                for part in (shown, labelled):
                    at = words.index(part[0])
                    assert words[at : at + len(part)] == part
        assert (len(data.rows) == len(rows)) == (block_size == 200)
        assert data.tokens_per_epoch == data.n_batches * data.tokens_per_batch


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(9, 30))
def test_windows_fit_follow_each_other_and_ask_once(sizes, limit):
    found, n = word_windows(sizes, limit), len(sizes)
    assert [i for _, _, a, b in found for i in range(a, b)] == list(range(n))
    for start, end, first, behind in found:
        assert start <= first < behind <= end and sum(sizes[start:end]) <= limit
        assert end == n or sum(sizes[start : end + 1]) > limit  # as full as can be
    for (_, end, _, behind), (start, then, first, _) in pairwise(found):
        assert sum(sizes[start:end]) <= limit // 2 and start <= end and then > end
        assert behind == first == (start + end) // 2
    assert (len(found) == 1) == (sum(sizes) <= limit)


@given(st.integers(1, 99), st.integers(1, 40))
def test_a_word_at_a_border_has_context_on_both_sides(n, limit):
    """A quarter of the row, if words have one sub-token each."""
    for start, end, first, behind in word_windows([1] * n, limit):
        assert first == 0 or first - start >= limit // 4
        assert behind == n or end - behind >= limit // 4


def test_windows_by_hand():
    assert word_windows([1] * 8, 8) == [(0, 8, 0, 8)] and word_windows([3], 3) == [(0, 1, 0, 1)]
    assert word_windows([1] * 20, 8) == [
        (0, 8, 0, 6),
        (4, 12, 6, 10),
        (8, 16, 10, 14),
        (12, 20, 14, 20),
    ]
    assert word_windows([4, 4, 4], 4) == [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 3)]
    assert word_windows([1, 1, 8, 1], 8) == [(0, 2, 0, 2), (2, 3, 2, 3), (3, 4, 3, 4)]
    assert word_windows([], 8) == []
    with pytest.raises(AssertionError, match="a word does not fit"):
        word_windows([1, 9], 8)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_words_are_encoded_one_by_one_and_found_again(kind):
    texts = ["Élan vital, naïve déjà-vu x\u00a0y 😀 internationalisation [SEP] (see)", "a b"] * 9
    train = {"bpe": Tokenizer.train, "wordpiece": WordPiece.train}[kind]
    tokenizer = train(texts, 300, special_tokens=(*SPECIAL, UNK) if kind != "bpe" else SPECIAL)
    words = [text.split(" ") for text in texts[:2]]
    rows = sentence_rows(words, tokenizer, 200)
    special = tokenizer.special_tokens
    for row, sentence in zip(rows, words, strict=True):
        pieces = [encode_text(tokenizer, word) for word in sentence]
        want = [special[CLS], *(i for ids in pieces for i in ids), special[SEP]]
        assert row.ids.tolist() == want
        assert row.places.tolist() == [*accumulate([1, *map(len, pieces)])][:-1]
    assert [row.sentence for row in rows] == [0, 1]


def test_a_word_of_which_nothing_is_left_still_has_a_place(folder):
    """A zero-width space, or an emoji's selector, shifted the labels of all words behind it."""
    words = ["a1", "\u200b", "b2", "\ufe0f", "\u00a0", "c3"]
    tags = ["O", "B-x", "O", "B-person", "I-person", "B-place"]
    write("odd.conll", [(words, tags)] * 3)
    bpe = Tokenizer.train(["a1 b2 c3"], 260, special_tokens=SPECIAL)
    for tokenizer, name, nothing in ((DIGITS, UNK, [1, 3, 4]), (bpe, MASK, [4])):
        data = splits("odd", "odd", tokenizer, block_size=64)[1]
        row, special = data.rows[0], tokenizer.special_tokens
        assert [k for k in range(6) if row.ids[row.places[k]] == special[name]] == nothing
        batch = data.batch(0)
        targets = batch["targets"][0]
        assert [data.labels[k] for k in targets[targets >= 0]] == tags
        right = {i: data.batch(i)["targets"].numpy() for i in range(data.n_batches)}
        assert data.measure(right) == {"precision": 1, "recall": 1, "f1": 1}
    plain = WordPiece([UNK, CLS, SEP, PAD, "a"])
    assert sentence_rows([["\u200b", "a"]], plain, 9)[0].ids.tolist() == [1, 0, 4, 2]


def test_a_word_longer_than_a_row_shows_what_fits():
    rows = sentence_rows([["a1", "b123456789", "c2"]], DIGITS, 7)
    assert [DIGITS.decode(row.ids.tolist()) for row in rows] == [
        "[CLS] a1 [SEP]", "[CLS] b1234 [SEP]", "[CLS] c2 [SEP]"
    ]  # fmt: skip
    assert [row.places.tolist() for row in rows] == [[1]] * 3
    assert len(sentence_rows([["a", "b12"], [], ["c"]], DIGITS, 3)) == 3  # none of no words
    with pytest.raises(ValueError, match=r"rows of 2 tokens hold no word .*: choose 3 or more"):
        sentence_rows([["a"]], DIGITS, 2)


def test_tags_have_no_say_in_how_sentences_are_cut(folder):
    write("other.conll", [(words, ["B-x", *["O"] * (len(words) - 1)]) for words, _ in VALID])
    one, other = splits()[1], splits(valid="other")[1]
    for i in range(one.n_batches):
        assert torch.equal(one.batch(i)["tokens"], other.batch(i)["tokens"])
        assert torch.equal(one.batch(i)["targets"] == -100, other.batch(i)["targets"] == -100)


# ---- batches -------------------------------------------------------------------------------------


def test_batches_are_a_pure_function_of_seed_and_index(folder):
    (train, validation), (second, _) = splits(), splits()
    numbers = [0, 3, train.n_batches, 5 * train.n_batches + 2, 1]
    want = {i: read_rows(train, train.batch(i)) for i in numbers}
    for i in sorted(want, reverse=True):
        assert read_rows(second, second.batch(i)) == want[i]
    other, unmoved = splits(seed=6)
    assert epoch(other) != epoch(train) != epoch(train, 1)
    assert epoch(unmoved) == epoch(validation) == epoch(validation)
    lengths = [validation.batch(i)["tokens"].size(1) for i in range(validation.n_batches)]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_step_holds_the_same_rows_however_many_micro_batches_share_it(folder, parts):
    whole, _ = splits(batch_size=8, tokens_per_step=8 * T)
    dealt, _ = splits(batch_size=8 // parts, tokens_per_step=8 * T)
    assert dealt.n_batches == parts * whole.n_batches
    empty = 0
    for step in range(whole.n_batches + 1):
        batches = [dealt.batch(step * parts + m) for m in range(parts)]
        full = [b for b in batches if (b["targets"] != -100).any()]
        found = [row for batch in full for row in read_rows(dealt, batch)]
        assert sorted(found, key=str) == sorted(read_rows(whole, whole.batch(step)), key=str)
        assert all(b["tokens"].numel() <= 8 // parts * T + T for b in batches)
        empty += len(batches) - len(full)
    assert empty  # the last step of the epoch has one row


def test_report_is_per_word(folder):
    report = splits()[1].report({"loss": 12.0, "accuracy": 6.0}, {"loss": 8})
    assert report == {"loss": 1.5, "accuracy": 0.75}
    assert splits()[1].report({"loss": 0.0, "accuracy": 0.0}, {"loss": 0})["loss"] == 0


# ---- what is measured ----------------------------------------------------------------------------


def guesses(data: Data, label_of: dict[str, str], seed: int = 0) -> dict:
    """The prediction of a model that gives each word this label, with noise at all other places."""
    random, index = np.random.default_rng(seed), {x: i for i, x in enumerate(data.labels)}
    found = {}
    for i in range(data.n_batches):
        batch = data.batch(i)
        found[i] = random.integers(0, len(data.labels), batch["tokens"].shape)
        for r, row in enumerate(read_rows(data, batch)):
            at = np.flatnonzero(batch["targets"][r] != -100)
            found[i][r, at] = [index[label_of[word]] for word, asked in row if asked]
    return found


@pytest.mark.parametrize("block_size", [9, 13, 37, 200])
def test_entities_are_counted_over_sentences_and_never_over_rows(folder, block_size):
    """An entity that two rows divide was once scored as two, of which one was wrong."""
    data = splits(block_size=block_size)[1]
    assert data.measure(guesses(data, LABEL)) == {"precision": 1, "recall": 1, "f1": 1}
    random = Random(block_size)
    wrong = {
        w: random.choice(data.labels) if random.random() < 0.3 else x for w, x in LABEL.items()
    }
    want = entity_scores([tags for _, tags in VALID], [[wrong[w] for w in s] for s, _ in VALID])
    measured = data.measure(guesses(data, wrong))
    assert measured == {name: round(value, 6) for name, value in want.items()}
    assert 0.3 < measured["f1"] < 0.9 and len({*measured.values()}) == 3
    nothing = data.measure(guesses(data, dict.fromkeys(LABEL, "O")))
    assert nothing == {"precision": 0, "recall": 0, "f1": 0}


def test_a_limited_evaluation_takes_evenly_spaced_whole_sentences(folder):
    whole = splits()[1]
    tokens = sum(len(row.ids) for row in whole.rows)
    data = splits(eval_tokens=-(-tokens // 4))[1]
    assert data.chosen.tolist() == list(range(0, 40, 4))
    words = [w for k in range(0, 40, 4) for w in VALID[k][0]]
    assert sorted(w for row in epoch(data) for w, label in row if label) == sorted(words)
    assert data.measure(guesses(data, LABEL))["f1"] == 1
    assert data.describe().startswith(f"10 sentences, evenly spaced among 40, {len(words):,} words")
    assert splits(eval_tokens=1)[1].chosen.tolist() == [0]
    for enough in (tokens, 10**9):
        assert len(splits(eval_tokens=enough)[1].chosen) == 40
    assert len(splits(eval_tokens=1)[0].chosen) == 150  # training is whole


def test_rows_are_joined_in_the_order_of_the_words():
    words = [[f"a{i}" for i in range(30)], ["b1"], [f"c{i}" for i in range(9)]]
    rows = sentence_rows(words, DIGITS, T)
    place, answers = {}, []
    for row in rows:
        answers.append(np.full(T + 4, -7))
        for k, at in enumerate(row.places):
            place[row.sentence, row.first_word + k] = len(place)
            answers[-1][at] = len(place) - 1
    order = Random(0).sample(range(len(rows)), len(rows))
    found = join_rows([rows[k] for k in order], [answers[k] for k in order])
    assert found == {s: [place[s, k] for k in range(len(words[s]))] for s in range(3)}


# ---- labels, tokenizer, descriptions -------------------------------------------------------------


def test_labels_are_the_types_in_order_or_those_of_the_checkpoint(folder):
    train, validation = splits()
    want = ("O", "B-person", "I-person", "B-place", "I-place", "B-x", "I-x")
    assert train.labels == validation.labels == want
    for labels in (["I-x", "B-x", "O", "B-y", "I-y", *want[1:5]], tuple(reversed(want))):
        data = splits(labels=labels)[1]
        assert data.labels == tuple(labels)
        assert data.measure(guesses(data, LABEL))["f1"] == 1
        assert all(x in (None, LABEL[w]) for row in epoch(data) for w, x in row)
    with pytest.raises(ValueError, match=r"train\.conll, line \d+: B-x is none of the labels"):
        splits(labels=want[:5])


def test_without_a_tokenizer_one_is_learnt_from_the_training_words_only(folder):
    write("english.conll", [(["abab", "abab"], ["B-x", "O"])] * 60)
    write("other.conll", [(["QZQZ", "QZQZ"], ["B-x", "O"])] * 60)
    train, validation = splits("english", "other", None)
    assert set(SPECIAL) == set(train.tokenizer.special_tokens)
    assert train.tokenizer is validation.tokenizer
    learnt = [token for token in train.tokenizer.ranks if len(token) > 1]
    assert b" abab" in learnt and not any(set(token) & set(b"QZ") for token in learnt)
    assert train.batch(0)["tokens"].tolist()[0][1:3] == train.tokenizer.encode(" abab") * 2


def test_what_the_plan_tells(folder):
    train, validation = splits()
    words, tags = (sum(len(row[k]) for row in TRAIN) for k in (0, 1))
    begun = sum(tag.startswith("B-") for _, row in TRAIN for tag in row)
    text = train.describe()
    want = f"150 sentences, {words:,} words, {begun:,} entities of 3 types (in IOB2, "
    want += "word in column 1, tag in column 2), "
    assert words == tags and text.startswith(f"{want}{len(train.rows):,} rows, ")
    assert f", {train.n_batches:,} steps with " in text and "steps" not in validation.describe()
    cells = sum(train.batch(i)["tokens"].numel() for i in range(train.n_batches))
    real = sum(len(row.ids) for row in train.rows)
    padding = float(re.search(r"with ([\d.]+)% padding", text)[1]) / 100
    assert padding == pytest.approx(1 - real / cells, abs=0.01)
    assert train.rule == "the sentences of valid.conll validate" and train.split == "train"
    text = open_tagged("train.conll", "valid.conll")
    assert train.fingerprint == validation.fingerprint == text.hash
    assert train.prompts == text.prompts
    write("mixed.conll", [(["a1", "b1"], ["B-x", "I-person"])])
    assert "in no single scheme, read as conlleval does" in splits(valid="mixed")[1].describe()


def test_real_tweets_keep_their_words_and_labels():
    files = [str(shared(f"wnut17/{name}.conll")) for name in ("train", "dev")]
    text = open_tagged(*files)
    tokenizer = WordPiece.train((t for t, _ in text.pieces("train")), 1000)
    for T in (24, 128):
        sizes = {"block_size": T, "batch_size": 8, "tokens_per_step": 32 * T}
        data = Data(text, "validation", tokenizer, text.labels, **sizes)
        batches = [data.batch(i) for i in range(data.n_batches)]
        assert sum(int((b["targets"] != -100).sum()) for b in batches) == 15733
        assert max(b["tokens"].size(1) for b in batches) == T
        right = {i: b["targets"].clamp(min=0).numpy() for i, b in enumerate(batches)}
        assert data.measure(right) == {"precision": 1, "recall": 1, "f1": 1}
