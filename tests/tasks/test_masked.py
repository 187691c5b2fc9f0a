"""tasks/masked.py, data/sentence_pairs.py, data/buckets.py: what BERT reads, through real files."""

import math
import re
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bert import BERT, BERTConfig
from bpe import Tokenizer
from data.buckets import evenly, evenly_within, pad_rows
from data.encoding import CLS, MASK, PAD, SEP
from data.sentence_pairs import NEXT, RANDOM, truncate_pair
from engine.processes import Processes
from tasks.masked import Data, Flags, Masking, batch_shapes
from train import evaluate, gradients

ALONE = Processes(0, 1, torch.device("cpu"))
T = 24  # of most tests: 21 tokens of text in a pair, 22 in a packed row
WORDS = "sun moon star naïve déjà 7 42 x2 über-fast don't [MASK] [SEP] (see) internationalisation"
BOTH = pytest.mark.parametrize("nsp", [True, False])


def write(name: str, documents: list[list[str]]) -> None:
    text = "\n".join("".join(f"{sentence}\n" for sentence in d) for d in documents)
    Path(name).write_text(text, encoding="utf-8")


def words(n: int, seed: int = 0, longest: int = 12) -> list[list[str]]:
    """n documents of 2 to `longest` sentences."""
    random = Random(seed)
    return [
        [" ".join([*random.choices(WORDS.split(), k=random.randint(2, 8)), f"{i}."])
         for i in range(random.randint(2, longest))]
        for _ in range(n)
    ]  # fmt: skip


def letters() -> list[list[str]]:
    """Documents in which no letter occurs twice, so that a row shows where each token is from: with
    --pattern char, each letter is one token, and so is the space."""
    random, documents = Random(0), []
    alphabet = [chr(0x4E00 + i) for i in range(1400)]
    while len(alphabet) > 200:
        n = random.choice((1, 1, 2, 2, 3, 4, 6, 9, 14))
        lengths = [random.randint(1, 11) for _ in range(n)]
        documents.append(["".join(alphabet.pop() for _ in range(k)) for k in lengths])
    return documents


LETTERS = letters()
STREAMS = ["".join(f" {sentence}" for sentence in document) for document in LETTERS]
DOCUMENT = {c: d for d, stream in enumerate(STREAMS) for c in stream if c != " "}
SENTENCES = [f" {sentence}" for document in LETTERS for sentence in document]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("letters.txt", LETTERS)
    write("words.txt", words(90))
    write("valid.txt", words(12, seed=1))


def splits(data="words", valid="valid", *, nsp=True, block_size=T, vocab_size=300, **settings):
    settings = {"batch_size": 4, "eval_tokens": 0, "layout": "lines", **settings}
    settings.setdefault("tokens_per_step", settings["batch_size"] * block_size)
    paths = {"data": f"{data}.txt", "valid": f"{valid}.txt", "cache_dir": "cache"}
    sizes = {"vocab_size": vocab_size, "block_size": block_size, "nsp": nsp}
    return Data.splits(Flags(**paths, **settings), sizes)


def lettered() -> Data:
    return splits("letters", pattern="char", vocab_size=4096)[0]


class Row(NamedTuple):
    shown: tuple[int, ...]  # what the model reads, without padding
    ids: tuple[int, ...]  # the same with what was hidden put back
    chosen: tuple[int, ...]  # places that are asked for
    label: int | None


def kept(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch.get("keep", torch.ones_like(batch["tokens"], dtype=torch.bool))


def rows_of(data: Data, batch: dict[str, torch.Tensor]) -> list[Row]:
    """The rows of a batch; a micro-batch that is not to be counted has none. Checks what holds for
    all rows."""
    special, keep = data.tokenizer.special_tokens, kept(batch)
    tokens, positions, targets = (batch[k] for k in ("tokens", "mlm_positions", "mlm_targets"))
    assert torch.equal(tokens == special[PAD], ~keep) and ("keep" in batch) == (not keep.all())
    if (targets == -100).all():
        assert (batch.get("nsp_targets", targets) == -100).all()
        return []
    ids, chosen = tokens.clone(), torch.zeros_like(keep)
    ids.view(-1)[positions], chosen.view(-1)[positions] = targets, True
    assert chosen.sum() == len(positions) == len(targets)  # none is asked for twice
    pairs, rows = "nsp_targets" in batch, []
    labels = batch["nsp_targets"].tolist() if pairs else [None] * len(tokens)
    for r, n in enumerate(keep.sum(1).tolist()):
        shown, whole = (tuple(x[r, :n].tolist()) for x in (tokens, ids))
        assert (whole[0], whole[-1]) == (special[CLS], special[SEP])
        if pairs:  # 0 for [CLS] a [SEP], 1 for b [SEP], 0 for padding
            first, second = np.flatnonzero(ids[r] == special[SEP])
            want = [0] * (first + 1) + [1] * (second - first) + [0] * (tokens.size(1) - n)
            assert batch["segments"][r].tolist() == want and first > 1 and second > first + 1
        rows.append(Row(shown, whole, tuple(np.flatnonzero(chosen[r]).tolist()), labels[r]))
    return rows


def epochs(data: Data, number: int = 1, first: int = 0) -> list[Row]:
    steps = range(first * data.n_batches, (first + number) * data.n_batches)
    return [row for i in steps for row in rows_of(data, data.batch(i))]


def parts(data: Data, row: Row) -> tuple[str, str]:
    end = row.ids.index(data.rows.border)
    return tuple(data.tokenizer.decode(list(x)) for x in (row.ids[1:end], row.ids[end + 1 : -1]))


def chunks_of(data: Data, number: int = 1, first: int = 0) -> list[int]:
    """Which chunk each of the rows of `epochs` is."""
    steps = range(first * data.n_batches, (first + number) * data.n_batches)
    found = [data.buckets.batch(i) for i in steps]
    return [int(row) for _, rows, empty in found for row in data.chosen[rows] if not empty]


def assert_share(k: int, n: int, p: float) -> None:
    """k of n draws of probability p, within 4.5 standard deviations: by chance once in 150,000."""
    assert abs(k - n * p) <= 4.5 * math.sqrt(n * p * (1 - p)), f"{k} of {n} are {k / n}, not {p}"


@pytest.mark.parametrize(("nsp", "rate"), [(True, 0.15), (False, 0.15), (False, 0.4)])
def test_masking_statistics(folder, nsp, rate):
    train, validation = splits(nsp=nsp, mlm_rate=rate, vocab_size=260, block_size=96)
    special = train.tokenizer.special_tokens
    for data, wanted, times in ((train, rate, 8), (validation, 0.15, 1)):
        rows = epochs(data, times)
        maskable = sum(i < 256 for row in rows for i in row.ids)
        chosen = [(row.ids[p], row.shown[p]) for row in rows for p in row.chosen]
        # Each row rounds rate · length up or down by chance: less spread than a coin a token.
        n = len(chosen)
        assert abs(n - wanted * maskable) < 4.5 * math.sqrt(len(rows) / 4)
        assert all(row.chosen for row in rows) and all(original < 256 for original, _ in chosen)
        replaced = [new for old, new in chosen if new not in (old, special[MASK])]
        assert_share(sum(new == special[MASK] for _, new in chosen), n, 0.8)
        assert_share(len(replaced), n, 0.1 * 255 / 256)  # by itself, once in 256
        assert max(replaced) < 256
        if data is train:  # each of the 256 bytes as often as the others
            counts, mean = np.bincount(replaced, minlength=256), len(replaced) / 256
            assert abs(((counts - mean) ** 2 / mean).sum() - 255) < 4.5 * math.sqrt(2 * 255)


def test_marks_are_no_part_of_words():
    text = "“law”, law—well… the naïve über-fast x2 2x it’s don't a_b हिन्दी" * 9
    tokenizer = Tokenizer.train([text], 600, special_tokens=(PAD, CLS, SEP, MASK))
    masking = Masking(tokenizer, whole_words=True)
    assert {"“", "law", "—", "…", "’"} <= {tokenizer.decode([i]) for i in tokenizer.encode(text)}
    words = {"law", "x2", "2x", "it", " über", " ह"}
    for token in ("“", "—", "…", "’", "-", "_", ",", *words):
        ids = tokenizer.encode(token)
        assert masking.starts[ids[0]] == (token in words and token[0] != " ")
        assert masking.ends[ids[-1]] == (token in words)


def test_where_no_word_fits_tokens_are_hidden(folder):
    write("long.txt", [["x" * 5000]])
    train, _ = splits("long", nsp=False, whole_words=True, vocab_size=260)
    rows = epochs(train)
    assert {len(row.chosen) for row in rows} == {3, 4}  # 15% of 22
    assert len({place for row in rows for place in row.chosen}) == 22


def test_short_rows_have_one_masked_token_or_word_at_least(folder):
    write("tiny.txt", [["a", "b"]] * 40)
    write("long.txt", [["internationalisation", "Gesamtwiderständler"]] * 40)  # of 20 bytes both
    for name, whole in (("tiny", False), ("tiny", True), ("long", True)):
        train, _ = splits(name, whole_words=whole, vocab_size=260, block_size=48)
        sizes = {len(row.chosen) for row in epochs(train, 5)}
        assert sizes == ({1} if name == "tiny" else {1, 2})  # the spaces: words of 20 do not fit


@BOTH
def test_the_names_of_special_tokens_in_the_text_are_text(folder, nsp):
    train, found = splits(nsp=nsp, block_size=64)[0], Counter()
    for row in epochs(train):
        assert row.ids.count(train.tokenizer.special_tokens[CLS]) == 1
        text = train.tokenizer.decode([i for i in row.ids if i < 296])
        found.update(re.findall(r"\[MASK\]|\[SEP\]", text))
    assert len(found) == 2 and min(found.values()) > 50


@BOTH
def test_batches_are_a_pure_function_of_seed_and_index(folder, nsp):
    (train, validation), (second, _) = splits(nsp=nsp), splits(nsp=nsp)
    numbers = [k * train.n_batches + i for k in (0, 1, 7) for i in (-1, 0, 3) if k + i >= 0]
    want = {i: rows_of(train, train.batch(i)) for i in numbers}
    for i in sorted(want, reverse=True):  # another order, another object, epochs back and forth
        assert rows_of(second, second.batch(i)) == want[i] == rows_of(train, train.batch(i))
    # Validation is the same whatever the settings of training are, so that runs compare.
    other, unmoved = splits(nsp=nsp, seed=7, mlm_rate=0.3, whole_words=True)
    assert rows_of(other, other.batch(0)) != want[0]
    assert epochs(unmoved) == epochs(validation) == epochs(validation)


def test_every_epoch_and_seed_masks_divides_and_labels_anew(folder):
    write("one.txt", [["abcdefghijklmnopqrst" * 3]])  # a single row, cut in one way only
    sizes = {"nsp": False, "vocab_size": 260, "block_size": 63}
    found = [row for seed in (0, 1) for row in epochs(splits("one", seed=seed, **sizes)[0], 10)]
    assert len({row.ids for row in found}) == 1 and len({row.chosen for row in found}) == 20
    train = lettered()
    one, two = (dict(zip(chunks_of(train, 1, e), epochs(train, 1, e), strict=True)) for e in (0, 1))
    assert_share(sum(one[c].label == two[c].label for c in one), len(one), 0.5)
    assert sum(one[c].chosen == two[c].chosen for c in one) < 0.3 * len(one)
    # Where it is divided; a row of two sentences has no choice.
    assert sum(parts(train, one[c])[0] == parts(train, two[c])[0] for c in one) < 0.7 * len(one)


def word_of_each(data: Data, ids: tuple[int, ...]) -> list[tuple[int, int] | int]:
    """For each token, the run of letters and digits (in the bytes of the row) that it is part of,
    or its own place if it is part of none."""
    text = [data.tokenizer.bytes_of[i] if i < 286 else b"\n" for i in ids]
    inside = [m.span() for m in re.finditer(rb"[A-Za-z0-9\x80-\xff]+", b"".join(text))]
    return [
        next(((a, b) for a, b in inside if a < end and start < b), start)
        for start, end in pairwise(np.cumsum([0, *map(len, text)]).tolist())
    ]


@BOTH
def test_whole_words_are_hidden_or_none_of_them(folder, nsp):
    share, lengths, broken = {}, Counter(), Counter()
    for whole in (True, False):
        data, _ = splits(whole_words=whole, nsp=nsp, vocab_size=290, block_size=256)
        rows = epochs(data, 2)
        for row in rows:
            words = word_of_each(data, row.ids)
            taken = Counter(words[p] for p in row.chosen)
            broken[whole] += any(words.count(word) != k for word, k in taken.items())
            lengths.update(taken.values() if whole else ())
        maskable = sum(i < 286 for row in rows for i in row.ids)
        share[whole] = sum(len(row.chosen) for row in rows) / maskable
    assert broken[True] == 0 and broken[False] > 0.9 * len(rows)
    assert {1, 2, 3, 4} < lengths.keys() and max(lengths) > 9
    # Words are taken as long as they fit, so a little less than 15%.
    assert 0.12 < share[True] < 0.15 == pytest.approx(share[False], abs=0.003)


def test_half_of_the_pairs_are_consecutive_the_others_from_two_documents(folder):
    train = lettered()
    rows, begun, firsts = epochs(train, 40), Counter(), {sentence[1] for sentence in SENTENCES}
    assert_share(sum(row.label == NEXT for row in rows), len(rows), 0.5)
    for row in rows:
        a, b = parts(train, row)
        if b == " ":  # the sentence lost all else
            continue
        (own,), (other,) = ({DOCUMENT[c] for c in part if c != " "} for part in (a, b))
        assert a in STREAMS[own] and b in STREAMS[other]
        assert b[0] == " " and b[1] in firsts  # where a sentence begins
        if row.label == NEXT:
            assert a + b in STREAMS[own]
        else:
            assert row.label == RANDOM and own != other
            begun[b[1]] += 1
    opening = {document[0][0] for document in LETTERS}  # nothing comes before these
    assert not opening & begun.keys()
    assert len(begun) > 0.9 * len(firsts - opening) and max(begun.values()) < 0.1 * begun.total()


def test_every_sentence_is_in_a_chunk_and_every_chunk_once_an_epoch(folder):
    train, at, lost = lettered(), 0, Counter()
    chunks = train.rows.chunks.tolist()
    for document in LETTERS:
        end = at + len(document)
        mine = [(a, b) for a, b, _ in chunks if at <= a < end]
        assert all(b - a > 1 and b <= end for a, b in mine)
        assert sorted({i for a, b in mine for i in range(a, b)}) == (
            list(range(at, end)) if end - at > 1 else []
        )
        borders = list(pairwise(mine))
        assert all(b == c for (_, b), (c, _) in borders[:-1])
        assert all(b >= c for (_, b), (c, _) in borders[-1:])  # the last one begins early
        at = end
    for number in range(6):
        found = dict(zip(chunks_of(train, 1, number), epochs(train, 1, number), strict=True))
        assert sorted(found) == list(range(len(chunks)))
        for chunk, row in found.items():
            (a, b), planned = parts(train, row), train.rows.lengths[chunk]
            assert len(row.ids) == len(a) + len(b) + 3 <= planned <= T
            if row.label == NEXT:  # as long as planned; what is too long loses its outer ends
                first, stop, limit = chunks[chunk]
                text, but_last = ("".join(SENTENCES[first:end]) for end in (stop, stop - 1))
                assert a + b in text and len(row.ids) == planned == limit + 3
                full = len(text) >= limit and len("".join(SENTENCES[first + 1 : stop])) < limit
                assert full or len(but_last) < limit or stop - first == 2
                lost.update([(text.startswith(a), text.endswith(b))])
    assert len(lost) == 4 and min(lost.values()) > 5


def test_rows_are_full_but_for_a_tenth(folder):
    write("large.txt", [*words(30, longest=300), *words(30, longest=4)])
    rows = splits("large", block_size=128)[0].rows
    tokens = rows.tokens_before[rows.first]
    long = np.diff(tokens)[rows.document[rows.chunks[:, 0]]] >= 125  # tokens of the document
    lengths = rows.lengths[long]
    assert len(lengths) > 300 and rows.lengths.max() == 128 and lengths.mean() > 0.92 * 128
    assert 0.05 < (lengths < 128).mean() < 0.15
    assert min(np.histogram(lengths[lengths < 128], 4)[0]) > 0  # of any length
    # Documents shorter than a row: all of it but a piece of the last sentence.
    assert (rows.lengths[~long] > 3).all() and (~long).any()


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [24, 96, 400])
@pytest.mark.parametrize("longest", [4, 40])
def test_neither_lengths_nor_ends_give_the_label_away(folder, longest, block_size):
    """Replacements that were cut to the length of what they replaced ended in the middle of a
    sentence twice as often as true second parts, which gave away the label of 61% of the rows of
    real text."""
    write("unlike.txt", [*words(120, longest=longest), *words(60, seed=3, longest=4)])
    train, _ = splits("unlike", block_size=block_size)
    (stop,), border = train.tokenizer.encode("."), train.rows.border
    seen = {NEXT: [], RANDOM: []}
    for row in epochs(train, 12):
        seen[row.label].append((len(row.ids), row.ids.index(border), row.ids[-2] == stop))
    consecutive, replaced = (np.mean(x, axis=0) for x in seen.values())
    assert consecutive[:2] == pytest.approx(replaced[:2], rel=0.05)
    assert consecutive[2] == pytest.approx(replaced[2], abs=0.08) and 0.1 < consecutive[2] < 0.9


def test_sentences_longer_than_a_row_are_told(folder):
    write("longer.txt", [[" ".join([*["sun"] * 90, f"{i}."])] * 3 for i in range(30)])
    text = splits("longer")[0].describe()
    assert int(re.search(r"\((\d+)% of their tokens are beyond a row\)", text)[1]) > 80
    assert "beyond a row" not in splits("words", block_size=128)[0].describe()


@BOTH
def test_rows_may_be_shorter_than_the_model_allows(folder, nsp):
    """The paper's first steps have rows of 128: the same tokens in a step, in more rows."""
    short, long, same = (
        splits(nsp=nsp, block_size=96, row_length=n)[0] for n in (T, 0, 97)
    )  # fmt: skip
    assert short.rows.lengths.max() == T and long.rows.lengths.max() == 96
    assert rows_of(long, long.batch(1)) == rows_of(same, same.batch(1))
    batches = [short.batch(i)["tokens"] for i in range(short.n_batches)]
    full = [len(tokens) for tokens in batches if tokens.size(1) == T]
    assert max(full) == 4 * 96 // T and max(tokens.numel() for tokens in batches) <= 4 * 96


@given(st.integers(1, 12), st.integers(1, 12), st.integers(2, 16))
def test_truncate_pair_takes_one_token_after_the_other_from_the_longer_part(n, m, limit):
    a, b = list(range(n)), list(range(100, 100 + m))
    got = [x.tolist() for x in truncate_pair(np.array(a), np.array(b), limit)]
    while len(a) + len(b) > limit:
        a, b = (a[1:], b) if len(a) >= len(b) else (a, b[:-1])
    assert got == [a, b] and a and b


def test_packed_rows_have_every_token_once(folder):
    train, validation = splits(nsp=False, block_size=40)
    texts, offsets, border = [], set(), train.tokenizer.special_tokens[SEP]
    for name in ("words.txt", "valid.txt"):
        documents = Path(name).read_text(encoding="utf-8")[:-1].split("\n\n")
        ids = [[border, *train.tokenizer.encode(" " + d.replace("\n", " "))] for d in documents]
        texts.append([i for document in ids for i in document][1:])
    ids, n = texts[0], len(epochs(train))
    assert 0 <= len(ids) - n * 38 < 2 * 38
    cuts = {o: sorted(tuple(ids[i : i + 38]) for i in range(o, o + n * 38, 38)) for o in range(76)}
    for number in range(8):  # in training, no padding and another offset each time
        rows = sorted(row.ids[1:-1] for row in epochs(train, 1, number))
        (offset,) = (offset for offset, want in cuts.items() if want == rows)
        assert offset < 38 and "keep" not in train.batch(number)
        offsets.add(offset)
    assert len(offsets) > 5
    # The last row of validation is shorter, so it comes first where rows are sorted by length.
    last, *rows = (row.ids[1:-1] for row in epochs(validation))
    assert {len(row) for row in rows} == {38} != len(last) and "keep" in validation.batch(0)
    assert [i for row in (*rows, last) for i in row] == texts[1]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_rows_of_similar_length_share_a_batch_in_every_epoch(folder, batch_size):
    train, _ = splits(batch_size=batch_size, block_size=160)
    n, limit, seen = train.n_batches, batch_size * 160, []
    assert train.tokens_per_batch == limit and train.tokens_per_epoch == n * limit
    for number in range(3):
        batches = [train.batch(number * n + i) for i in range(n)]
        assert sum(len(batch["tokens"]) for batch in batches) == len(train.rows.chunks)
        assert all(batch["tokens"].numel() <= limit for batch in batches)
        widths = [batch["tokens"].size(1) for batch in batches]
        assert widths not in (sorted(widths), *seen)  # no curriculum, another order each time
        seen.append(widths)
        lengths = torch.cat([kept(batch).sum(1) for batch in batches]).numpy()
        cells = sum(batch["tokens"].numel() for batch in batches)
        groups = np.array_split(np.random.default_rng(number).permutation(lengths), n)
        by_chance = sum(len(group) * group.max() for group in groups)
        padding = 1 - lengths.sum() / cells
        assert batch_size == 1 or padding < 0.5 * (1 - lengths.sum() / by_chance)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@BOTH
def test_a_step_holds_the_same_rows_however_many_micro_batches_share_it(folder, nsp, batch_size):
    whole, _ = splits(nsp=nsp, batch_size=8)
    shared, _ = splits(nsp=nsp, batch_size=batch_size, tokens_per_step=8 * T)
    n, empty = 8 // batch_size, 0
    assert shared.n_batches == n * whole.n_batches
    for step in range(2 * whole.n_batches + 1):
        dealt = [rows_of(shared, shared.batch(step * n + m)) for m in range(n)]
        assert sorted(chain(*dealt)) == sorted(rows_of(whole, whole.batch(step)))
        empty += dealt.count([])
    assert empty or n < 8  # a part without rows has a batch without targets
    larger, _ = splits(nsp=nsp, batch_size=batch_size, tokens_per_step=16 * T)
    assert sorted(epochs(larger, 1, 3)) == sorted(epochs(whole, 1, 3))  # only the order changes


@given(st.integers(1, 60), st.integers(0, 900), st.integers(1, 3))
def test_a_limit_of_tokens_is_one_of_rows(n, limit, least):
    chosen = evenly_within(n, 13 * n, limit, least)
    assert len(chosen) == (min(n, max(least, limit // 13)) if limit else n)
    assert chosen.tolist() == evenly(n, len(chosen)).tolist() == sorted(set(chosen.tolist()))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(0, 100))
def test_evenly_and_pad_rows(lengths, more):  # cut: see test_translation_data.py
    n, chosen = len(lengths), evenly(len(lengths) + more, len(lengths))
    gaps = np.diff([*chosen, n + more])
    assert len(gaps) == n and chosen[0] == 0 < max(gaps) <= min(gaps) + 1
    rows = [list(range(k)) for k in lengths]
    ids, keep = pad_rows([np.array(row, np.int64) for row in rows], -7)
    assert ids.shape == keep.shape == (n, max(lengths)) and (ids[~keep] == -7).all()
    assert [x[k].tolist() for x, k in zip(ids, keep, strict=True)] == rows


@BOTH
def test_neither_micro_batches_nor_the_batch_size_of_an_evaluation_change_a_sum(folder, nsp):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 24, "dropout": 0.0, "attention_dropout": 0.0}
    model = BERT(BERTConfig(vocab_size=300, block_size=64, nsp=nsp, **sizes))
    for parameter in model.parameters():  # larger than a new model's, so that answers differ
        torch.nn.init.normal_(parameter, std=0.1)
    found, reports, seen = {}, [], Counter()
    write("short.txt", words(52, longest=3))
    for batch_size in (8, 2, 1):
        n, more = 8 // batch_size, {"block_size": 64, "tokens_per_step": 8 * 64}
        train, validation = splits("short", nsp=nsp, batch_size=batch_size, **more)
        for step in range(train.n_batches // n):
            batches = [train.batch(step * n + m) for m in range(n)]
            seen["padded"] += any("keep" in batch for batch in batches)
            seen["empty"] += any(not rows_of(train, batch) for batch in batches)
            model.zero_grad()
            sums, counts = gradients(model, batches, ALONE, torch.enable_grad)
            grads = torch.cat([p.grad.flatten() for p in model.parameters()])
            want_sums, want_counts, want = found.setdefault(step, (sums, counts, grads))
            assert counts == want_counts and (grads - want).abs().max() < 1e-5 * want.abs().max()
            assert sums == {k: pytest.approx(float(v), rel=1e-5) for k, v in want_sums.items()}
        reports.append(evaluate(model, validation, ALONE, torch.no_grad))
        assert reports[-1] == pytest.approx(reports[0], rel=1e-5)
    assert not nsp or min(seen["padded"], seen["empty"]) > 0
    sums = {"mlm": 12.0, "mlm_accuracy": 2.0, "nsp": 3.0, "nsp_accuracy": 4.0}
    want = {"mlm": 1.5, "mlm_accuracy": 0.25, "nsp": 0.6, "nsp_accuracy": 0.8}
    want |= {"loss": pytest.approx(2.1), "perplexity": pytest.approx(math.exp(1.5))}
    assert train.report(sums, {"mlm": 8, "nsp": 5}) == want
    alone = train.report({"mlm": 1e9, "mlm_accuracy": 0.0}, {"mlm": 1})
    assert alone["loss"] == alone["mlm"] == 1e9 and math.isfinite(alone["perplexity"])


@pytest.mark.parametrize(
    ("documents", "valid", "settings", "message"),
    [
        (
            [["a b", "c d"], ["e"]],
            3,
            {},
            "two documents .* the training text of own has 1: .*nsp=f",
        ),
        (3, [["a b", "c d"]], {}, "two documents .* the validation text of own has 1: .*nsp=false"),
        ([["a b"], ["c d"]], 3, {}, "two sentences or more, and the training text of own has 0: "),
        (3, 3, {"block_size": 4}, "rows of 4 tokens have no room for two parts: choose 5 or more"),
        (3, 3, {"row_length": 2, "nsp": False}, "rows of 2 tokens have no room .* 3 or more"),
        ([["abc"]], 3, {"nsp": False}, "has 4 tokens, fewer than the 22 of .* choose rows of 6 "),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_remedy(folder, documents, valid, settings, message):
    for name, what in (("own.txt", documents), ("valid.txt", valid)):
        write(name, words(what) if isinstance(what, int) else what)
    with pytest.raises(ValueError, match=message):
        splits("own", vocab_size=260, **settings)


@BOTH
def test_describe_counts_what_is_there_and_a_limited_evaluation_is_evenly_spaced(folder, nsp):
    train, whole = splits(nsp=nsp, block_size=96)
    kind = "pairs of runs of sentences from {} documents, " if nsp else "rows of running text, "
    for data, documents in ((train, 90), (whole, 12)):
        rows, tokens = epochs(data), int(data.buckets.lengths.sum())
        text = f"{len(rows):,} {kind.format(documents)}{tokens:,} tokens, 15% of them asked for"
        real = sum(len(row.ids) for row in rows)  # some replacements are shorter than planned
        assert 0.97 * tokens < real <= tokens and (nsp or real == tokens)
        if data is train:
            cells = sum(data.batch(i)["tokens"].numel() for i in range(data.n_batches))
            padding = float(re.search(r"([\d.]+)% padding", data.describe())[1])
            assert padding / 100 == pytest.approx(1 - tokens / cells, abs=0.02)
            text += f", {data.n_batches} steps with {padding}% padding"
        assert data.describe() == text
    for limit in (tokens // 4, tokens // 3, 1, tokens, 10**9):
        limited, some = splits(nsp=nsp, block_size=96, eval_tokens=limit)
        wanted, n = max(1, min(len(rows), len(rows) * limit // tokens)), len(rows)
        assert some.chosen.tolist() == [k * n // wanted for k in range(wanted)]
        assert len(epochs(some)) == wanted and set(epochs(some)) <= set(rows)
        assert some.describe().startswith(f"{wanted} ") and limited.describe() == train.describe()
        assert (f", evenly spaced among {n}, " in some.describe()) == (wanted < n)


@BOTH
def test_the_shapes_of_the_plan_are_those_of_batches(folder, nsp):
    train, config = splits(nsp=nsp)[0], BERTConfig(vocab_size=300, block_size=T, nsp=nsp)
    for batch in map(train.batch, range(train.n_batches)):
        (B, length), keep = batch["tokens"].shape, {"keep": kept(batch)} if nsp else {}
        found = {name: tuple(tensor.shape) for name, tensor in {**batch, **keep}.items()}
        shapes = batch_shapes(Flags(), config, B, length)
        # Special tokens and padding are never asked for, and each row rounds up by one at most.
        (asked,), (most,) = found.pop("mlm_targets"), shapes.pop("mlm_targets")
        assert found.pop("mlm_positions") == (asked,) and shapes.pop("mlm_positions") == (most,)
        assert 0.5 * most <= asked <= most + B and most == max(1, round(0.15 * B * length))
        assert found == shapes


@pytest.mark.parametrize("rate", [0.0, 1.0, math.nan])
def test_a_share_of_the_tokens_is_less_than_all_and_more_than_none(rate):
    message = f"--mlm_rate {rate} is out of range: choose more than 0, but less than 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        Flags(mlm_rate=rate)
