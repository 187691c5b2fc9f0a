"""data/tokens.py: a corpus tokenized on all cores, training's memory; what lab/tokenizing.py
compares."""

import json
import os
import random
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from conftest import peer

from bpe import END_OF_TEXT, Tokenizer, learn_merges
from data import cores
from data.text import open_corpus
from data.tokens import load_tokenizer, number_documents, tokenize
from lab import tokenizing
from lab.tokenizing import plenty, run_measured, source_files, written_corpus
from wordpiece import WordPiece

WORDS = [
    "the",
    "cat",
    "sat",
    "naïve",
    "東京",
    "😀",
    "1234",
    "  ",
    "\n",
    "don't",
    "end.\nThe",
    "x" * 40,
]


def short_texts(n: int) -> list[str]:
    rng = random.Random(n)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(12))) for _ in range(n)]


TOKENIZERS = {
    "bpe": Tokenizer.train(short_texts(300), 400),
    "wordpiece": WordPiece.train(short_texts(300), 200),
}
BORDERS = {"bpe": END_OF_TEXT, "wordpiece": "[SEP]"}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_byte_order_mark_is_no_part_of_a_tokenizers_file(tmp_path, kind):
    text = "\ufeff" + TOKENIZERS[kind].to_json()
    (tmp_path / "t.json").write_text(text, encoding="utf-8")
    assert load_tokenizer(tmp_path / "t.json").hash == TOKENIZERS[kind].hash


@pytest.mark.parametrize("in_lines", [True, False])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_give_what_documents_give_one_by_one(
    tmp_path, monkeypatch, kind, in_lines, workers
):
    """Documents stay in order, each after its border, also empty ones, wherever batches end."""
    monkeypatch.setattr(cores, "BATCH", 777)
    monkeypatch.setattr(os, "cpu_count", lambda: workers)
    tokenizer, border, texts = TOKENIZERS[kind], BORDERS[kind], short_texts(137)
    assert "" in texts
    (tmp_path / "texts").mkdir()
    corpus = written_corpus(tmp_path / "texts", texts, in_lines)
    file = tokenize(corpus, "train", tokenizer, tmp_path, border)
    if not in_lines:  # and one with a line that may end a piece has two
        assert {begins for _, begins in corpus.pieces("train")} == {True, False}
        texts = list(filter(None, texts))  # an empty file has no piece
    want = [
        i for text in texts for i in (tokenizer.special_tokens[border], *tokenizer.encode(text))
    ]
    assert file.ids[:].tolist() == want
    assert file.text_bytes == len("".join(texts).encode())


def test_pieces_that_begin_no_document_have_the_number_of_theirs():
    pieces = [("a", True), ("b", False), ("c", True), ("d", False), ("e", False)]
    assert [number for _, _, number in number_documents(pieces)] == [0, 0, 1, 1, 1]


def test_lone_surrogates_of_a_json_line_are_tokenized(tmp_path):
    """UTF-8 cannot encode lone surrogates: computing their size raised UnicodeEncodeError."""
    rows = [json.dumps({"text": f"a {c} b"}) for c in ("\ud800", "é") * 9]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    tokenizer = TOKENIZERS["bpe"]
    file = tokenize(open_corpus(str(tmp_path / "a.jsonl"), tmp_path), "train", tokenizer, tmp_path)
    ids = file.ids[:].tolist()
    assert ids.count(tokenizer.special_tokens[END_OF_TEXT]) > 9
    assert tokenizer.decode(ids).startswith(f"{END_OF_TEXT}a \ud800 b{END_OF_TEXT}a é b")


def test_memory_of_training_per_byte_of_distinct_chunks():
    """Python's numbers are objects of 32 bytes: a place has one of them, not one in every list."""
    rng = random.Random(0)
    chunks = Counter({"".join(rng.choices("abcdefgh", k=9)): 2 for _ in range(20_000)})
    size = sum(map(len, chunks))
    tracemalloc.start()
    try:
        assert len(learn_merges(chunks, 5)) == 5
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 115 * size, peak / size


# ---- the text of the benchmark -------------------------------------------------------------------


def test_source_files_are_distinct_and_the_same_each_time(tmp_path, monkeypatch):
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    paths = {"stdlib": str(library), "purelib": str(packages), "platlib": str(packages)}
    monkeypatch.setattr(tokenizing.sysconfig, "get_paths", lambda: paths)
    files = {"b.py": "bé", "a.py": "a", "test/c.py": "c", "again.py": "a", "none.py": ""}
    files |= {
        "t.txt": "t",
        "site-packages/d.py": "d",
        "site-packages/e/f.py": "c",
        "site-packages/e/g.py": "g",
    }
    for name, text in files.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(text, encoding="utf-8")
    (library / "binary.py").write_bytes(b"a\0")
    (library / "latin.py").write_bytes(b"\xe9")
    found = [*("standard library " + text for text in ("a", "bé", "c")), "packages d", "packages g"]
    assert [f"{kind} {text}" for kind, text in source_files()] == found
    assert tokenizing.shares(3) == "0 MB standard library"


def test_plenty_stops_when_it_has_enough_and_makes_up_what_is_lacking():
    found = [("packages", "é = 1\nb = 2\n" * 30), ("packages", "c\n" * 90)]
    assert list(plenty(1, iter(found))) == found[:1]
    assert list(plenty(400, iter(found))) == found  # 390 bytes were not enough: é has two
    made = list(plenty(20_000, iter(found)))
    assert made[:2] == found and made == list(plenty(20_000, iter(found)))
    assert {kind for kind, _ in made[2:]} == {"generated"}
    texts = [text for _, text in made[2:]]
    assert len(set(texts)) == len(texts) > 10
    assert set("".join(texts).splitlines()) == {"é = 1", "b = 2", "c"}
    sizes = [len(text.encode()) for _, text in made]
    assert sum(sizes[:-1]) < 20_000 <= sum(sizes)
    with pytest.raises(ValueError, match="no Python source"):
        list(plenty(1, iter([])))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no PSS here")
def test_the_memory_of_children_is_counted():
    filled = "import time; x = b'x' * 30_000_000; time.sleep(.3)"
    _, one = run_measured([sys.executable, "-c", filled])
    seconds, two = run_measured([sys.executable, "-c", f"import os; os.fork(); {filled}"])
    assert 30e6 < one < 55e6 and 60e6 < two < 90e6 and seconds > 0.3
    with pytest.raises(ValueError, match="ended with 3"):
        run_measured([sys.executable, "-c", "raise SystemExit(3)"])


def test_both_trainers_take_the_same_text():
    made = list(plenty(9_000, iter([("packages", "import this\n")])))
    for train in tokenizing.TRAINERS.values():
        if train is tokenizing.train_theirs:
            peer("tokenizers")
        train((text for _, text in made), 300)
