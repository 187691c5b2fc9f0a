"""The tokenizer against naive versions of itself, against tiktoken, and against odd input."""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import torch
from conftest import ROOT, gpt2_files, peer
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
from bpe import (
    CHAR_PATTERN,
    END_OF_TEXT,
    GPT2_PATTERN,
    GPT4_PATTERN,
    PATTERNS,
    Tokenizer,
    naive_encode,
    naive_learn_merges,
)
from data.download import GPT2_MERGES, GPT2_VOCABULARY
from data.gpt2_files import byte_characters, read_gpt2_files

ALPHABETS = {
    "few": "ab",
    "ascii": "".join(map(chr, range(32, 127))),
    "greek": "αβγδε ζηθ ς",
    "cjk": "的一是不了人我在有他 。中国",
    "emoji": "😀👍🏽👨‍👩‍👧❤️ 🇬🇷",
    "combining": "e\u0301a\u0300o\u0302n\u0303 x",
    "space": "a  \t\n\r\u00a0\u3000\u2028b",
    "mixed": "aé的😀 \n'sll12!\x00",
}
ENGLISH = (
    "It's the tokenizer's job: we'll split 12345 words, they'd said.\n\n  The end,  isn't it?  "
)


def random_text(rng: random.Random, alphabet: str, n: int) -> str:
    """Half fresh characters, half copies of earlier stretches, so that there is much to merge."""
    text = ""
    while len(text) < n:
        if text and rng.random() < 0.5:
            start = rng.randrange(len(text))
            text += text[start : start + rng.randrange(1, 9)]
        else:
            text += rng.choice(alphabet)
    return text[:n]


def merges_as_ids(tok: Tokenizer) -> list[tuple[int, int]]:
    return [(tok.ranks[a], tok.ranks[b]) for a, b in tok.merges()]


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    rng = random.Random(0)
    texts = [random_text(rng, alphabet, 600) for alphabet in ALPHABETS.values()] + [ENGLISH * 3]
    return Tokenizer.train(texts, 900, special_tokens=("<|endoftext|>", "<|pad|>"))


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return read_gpt2_files(*gpt2_files())


# ---- training


def test_worked_example_of_the_docstring():
    tok = Tokenizer.train(["banana bandana"], 256 + 3, special_tokens=())
    assert tok.merges() == [(b"a", b"n"), (b"b", b"an"), (b"an", b"a")]
    assert tok.encode("banana bandana") == [257, 258, 32, 257, 100, 258]


@pytest.mark.parametrize("pattern", [*PATTERNS, "whole"])
@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_training_and_encoding_equal_the_naive_versions(alphabet, pattern):
    pattern = PATTERNS.get(pattern, r"(?s:.+)")
    rng = random.Random(f"{alphabet} {pattern}")
    for n in (0, 1, 7, 37, 300):
        texts = [random_text(rng, ALPHABETS[alphabet], n), random_text(rng, ALPHABETS[alphabet], n)]
        n_merges = rng.randrange(120)
        expected = naive_learn_merges(texts, n_merges, pattern)
        tok = Tokenizer.train(texts, 256 + n_merges, pattern, special_tokens=())
        assert merges_as_ids(tok) == expected
        assert tok.vocab_size == 256 + len(expected)
        for text in (texts[0], random_text(rng, ALPHABETS[alphabet], 100)):
            ids = naive_encode(text, expected, pattern)
            assert tok.encode_python(text) == ids
            assert tok.encode(text) == ids


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text("ab", max_size=30), max_size=4), st.integers(0, 30))
def test_overlapping_pairs(texts, n_merges):
    """In "aaaa" and "abab" a merge changes the count of the pairs that it has itself made."""
    pattern = r"(?s:.+)"
    tok = Tokenizer.train(texts, 256 + n_merges, pattern, special_tokens=())
    assert merges_as_ids(tok) == naive_learn_merges(texts, n_merges, pattern)


def test_ties_go_to_the_lowest_pair_of_ids():
    tok = Tokenizer.train(["zy zx ab"], 258, pattern=r"\w+", special_tokens=())
    assert tok.merges() == [(b"a", b"b"), (b"z", b"x")]


def test_training_stops_when_no_pair_is_left():
    tok = Tokenizer.train(["ab"], 1000)
    assert tok.merges() == [(b"a", b"b")]
    assert tok.special_tokens == {"<|endoftext|>": 257}
    assert tok.vocab_size == 258
    assert Tokenizer.train([], 1000).vocab_size == 257


def test_bytes_only_and_characters_only():
    text = "naïve 的 😀😀\n"
    in_bytes = Tokenizer.train([text], 256, special_tokens=())
    assert in_bytes.encode(text) == list(text.encode())
    in_chars = Tokenizer.train([text], 1000, CHAR_PATTERN)
    ids = in_chars.encode(text)
    assert [in_chars.decode([i]) for i in ids] == list(text)


def test_texts_are_streamed_and_chunks_do_not_span_them():
    tok = Tokenizer.train((t for t in ["a", "b"]), 300)
    assert tok.merges() == []


def test_special_text_in_the_training_text_is_text():
    tok = Tokenizer.train(["<|endoftext|>" * 9], 300, r"(?s:.+)")
    assert b"<|endoftext|>" in tok.ranks
    assert tok.encode("<|endoftext|>") == [tok.ranks[b"<|endoftext|>"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "one str"}, "texts is one str"),
        ({"vocab_size": 256}, "vocab_size=256 .* at least 257"),
        ({"special_tokens": ("a", "a")}, "only once"),
        ({"special_tokens": ("",)}, "empty"),
        ({"special_tokens": "<|end|>"}, "special_tokens is one str"),
        ({"pattern": "("}, "not a regular expression"),
        ({"pattern": "(a)|b"}, "group"),
        ({"pattern": "a*"}, "matches nothing"),
    ],
)
def test_training_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(**{"texts": ["a text"], "vocab_size": 300} | arguments)


# ---- encoding and decoding


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(
    text=st.text()
    | st.text("ab \n'sé的😀1")
    | st.text(st.characters(categories=["Zs", "Cs", "Cn", "L"]))
)
def test_both_paths_agree_and_round_trip(tok, text):
    ids = tok.encode(text)
    assert ids == tok.encode_python(text) == tok.encode_numpy(text).tolist()
    assert tok.decode(ids) == text


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_code_point(tok, pattern):
    """Rust's Unicode tables are older than those of `regex`; neither may show in the ids.

    Each character stands between letters, digits and spaces, so that it matters how it is classed.
    """
    around = [f"a{chr(c)}a {chr(c)}1" for c in range(0x110000)]
    trained = Tokenizer.train([ENGLISH, "".join(around[:0x800])], 3000, PATTERNS[pattern])
    # A block that has characters of doubtful class takes the Python path, so check blocks of 256.
    for start in range(0, 0x110000, 256):
        if start % 0x1000 and start >= 0x20000:
            continue  # beyond plane 1 all is alike in long stretches: one block in 16
        text = "".join(around[start : start + 256])
        ids = trained.encode(text)
        assert ids == trained.encode_python(text)
        assert trained.decode(ids) == text


@settings(deadline=None, max_examples=200)
@given(
    data=st.binary()
    | st.lists(st.sampled_from(["é".encode(), b"\xed\xb2\x80", b"\xff", b"\xf0\x9f", b"a "])).map(
        b"".join
    )
)
def test_raw_bytes_round_trip(tok, data):
    ids = tok.encode_bytes(data)
    assert tok.decode_bytes(ids) == data
    assert isinstance(tok.decode(ids), str)


def test_encode_bytes_is_encode_where_the_bytes_are_text(tok):
    assert tok.encode_bytes(ENGLISH.encode()) == tok.encode(ENGLISH)


def test_decode_replaces_what_is_not_utf8(tok):
    ids = tok.encode_bytes(b"a\xff\xe2\x82 b")
    assert tok.decode(ids) == "a\ufffd\ufffd b"
    assert tok.decode(tok.encode("\ud800 é \ude00")) == "\ud800 é \ude00"
    assert tok.decode(tok.encode_bytes(b"\xe2\xed\xa0\x80\x80")) == "\ufffd\ud800\ufffd"


MILLION = 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["a" * MILLION, " " * MILLION, "\n" * MILLION], ids=["a", "space", "newline"]
)
def test_a_million_equal_characters(text):
    """A merge that looks at all pairs each time would take hours."""
    tok = Tokenizer.train(["a" * 40, " " * 40, "\n" * 40], 270)
    ids = tok.encode_python(text)
    assert len(ids) < len(text) / 4
    assert tok.decode_bytes(ids) == text.encode()
    assert tok.to_tiktoken().encode_ordinary(text) == ids
    if text[0] == "a":  # white space of this length goes the Python way in encode() too
        assert tok.encode(text) == ids


@pytest.mark.slow
def test_a_million_spaces_before_a_word():
    """Here tiktoken itself panics: "called `Result::unwrap()` on an `Err` value: StackOverflow"."""
    tok = Tokenizer.train([" " * 40], 258, GPT4_PATTERN)
    assert tok.decode(tok.encode(" " * MILLION + "x")) == " " * MILLION + "x"


def test_long_runs_of_white_space_do_not_reach_rust(tok, monkeypatch):
    monkeypatch.setattr(bpe, "LONG_RUN", 50)
    for before in range(50):
        assert not tok._rust_can_split("x" * before + " " * 101 + "x" * 51)
    assert tok._rust_can_split("x " * 500)


def test_a_run_can_be_made_to_use_the_readable_path(tok, monkeypatch):
    """As the head of bpe.py says."""
    monkeypatch.setattr(Tokenizer, "_rust_can_split", lambda self, text: False)
    readable = Tokenizer(tok.ranks, tok.pattern, tok.special_tokens)
    assert readable.encode(ENGLISH) == readable.encode_numpy(ENGLISH).tolist()
    assert "_rust" not in vars(readable)
    monkeypatch.undo()
    assert readable.encode(ENGLISH) == readable.encode_python(ENGLISH)
    assert "_rust" in vars(readable)


def test_batch(tok):
    texts = [ENGLISH, "", "\ud800", "<|pad|>"] * 3
    assert tok.encode_batch(texts) == [tok.encode_python(t) for t in texts]
    assert tok.encode_batch(["<|pad|>"], {"<|pad|>"}) == [[tok.special_tokens["<|pad|>"]]]


def test_the_cache_is_bounded(tok, monkeypatch):
    monkeypatch.setattr(bpe, "CACHED_CHUNKS", 5)
    fresh = Tokenizer(tok.ranks, tok.pattern, {})
    text = "one two three four five six seven " + "e" * 100
    assert fresh.encode_python(text) == fresh.encode(text)
    assert 0 < len(fresh._cache) <= 5
    assert max(map(len, fresh._cache)) < 100


@pytest.mark.parametrize("ids", [[902], [-1], [10**9]])
def test_unknown_ids_are_refused(tok, ids):
    assert tok.vocab_size == 900
    with pytest.raises(ValueError, match=rf"id {ids[0]} is no token: .* 899"):
        tok.decode([65, *ids])


def test_ids_of_numpy_and_torch_decode(tok):
    ids = tok.encode(ENGLISH)
    assert tok.decode(np.array(ids)) == tok.decode(torch.tensor(ids)) == ENGLISH
    assert tok.encode_numpy(ENGLISH).dtype == np.uint32


# ---- special tokens


@settings(deadline=None)
@given(
    text=st.lists(
        st.sampled_from(["<|endoftext|>", "<|pad|>", "<|", "|>", "a ", "\n", "\ud800"])
    ).map("".join)
)
def test_special_tokens_only_where_allowed(tok, text):
    end, pad = tok.special_tokens["<|endoftext|>"], tok.special_tokens["<|pad|>"]
    for encode in (tok.encode, tok.encode_python):
        assert not {end, pad} & {*encode(text)}
        ids = encode(text, {"<|pad|>"})
        assert end not in ids
        assert ids.count(pad) == text.count("<|pad|>")
        ids = encode(text, "all")
        assert (ids.count(end), ids.count(pad)) == (
            text.count("<|endoftext|>"),
            text.count("<|pad|>"),
        )
        assert tok.decode(ids) == text
    assert not {end, pad} & {*tok.encode_numpy(text).tolist()}


def test_special_tokens_agree_with_tiktoken(tok):
    text = "one<|pad|> two <|endoftext|><|endoftext|>\n"
    assert tok.encode(text, "all") == tok.to_tiktoken().encode(text, allowed_special="all")


def test_the_longest_special_token_wins():
    tok = Tokenizer.train([], 258, special_tokens=("<a>", "<a>b"))
    assert tok.encode("<a>b<a>", "all") == tok.encode_python("<a>b<a>", "all") == [257, 256]


@pytest.mark.parametrize("allowed", [{"<|nope|>"}, "<|nope|>"])
def test_unknown_special_tokens_are_refused(tok, allowed):
    with pytest.raises(ValueError, match=r"'<\|nope\|>' is unknown.*<\|pad\|>"):
        tok.encode("text", allowed)


# ---- files


@pytest.mark.parametrize("pattern", PATTERNS)
def test_save_and_load(tmp_path, pattern):
    tok = Tokenizer.train([ENGLISH], 300, PATTERNS[pattern], ("<|x|>", "é"))
    tok.save(tmp_path / "tok.json")
    loaded = Tokenizer.load(tmp_path / "tok.json")
    for name in ("ranks", "pattern", "special_tokens", "vocab_size", "hash"):
        assert getattr(loaded, name) == getattr(tok, name)
    assert loaded.encode("é" + ENGLISH, "all") == tok.encode("é" + ENGLISH, "all")
    assert [p.name for p in tmp_path.iterdir()] == ["tok.json"]


def test_the_hash_depends_on_the_state_alone(tok):
    def reverse(ids):
        return dict(reversed(ids.items()))

    shuffled = Tokenizer(reverse(tok.ranks), tok.pattern, reverse(tok.special_tokens))
    assert shuffled.hash == tok.hash
    others = [
        Tokenizer(tok.ranks, GPT4_PATTERN, tok.special_tokens),
        Tokenizer(tok.ranks, tok.pattern, {}),
        Tokenizer(tok.ranks | {b"qqqq": 5000}, tok.pattern, tok.special_tokens),
    ]
    assert len({tok.hash, *(other.hash for other in others)}) == 4


def test_a_failed_save_leaves_the_old_file(tmp_path, tok, monkeypatch):
    path = tmp_path / "tok.json"
    tok.save(path)

    def interrupted(self, target):
        raise OSError("interrupted")

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(OSError, match="interrupted"):
        Tokenizer.train(["other"], 258).save(path)
    assert Tokenizer.load(path).hash == tok.hash
    assert [p.name for p in tmp_path.iterdir()] == ["tok.json"]


def corrupt(change):
    state = json.loads(Tokenizer.train(["abab"], 258).to_json())
    change(state)
    return json.dumps(state).encode()


BYTE_MISSING = "1 of the 256 bytes"
CORRUPT = {
    "empty": (b"", "no JSON"),
    "binary": (b"\x80\x04\xff\x00", "utf-8"),
    "truncated": (corrupt(lambda s: None)[:-9], "no JSON"),
    "deep": (b"[" * 100_000, "no JSON"),
    "list": (b"[]", "keys"),
    "missing key": (corrupt(lambda s: s.pop("ranks")), "keys"),
    "twice": (corrupt(lambda s: None).replace(b'"a": 97', b'"a": 97, "a": 97'), "twice"),
    "newer": (corrupt(lambda s: s.update(format=2)), "format 2"),
    "format": (corrupt(lambda s: s.update(format="1")), "format '1'"),
    "ranks": (corrupt(lambda s: s.update(ranks=[1])), "mapping"),
    "special": (corrupt(lambda s: s.update(special_tokens=["a"])), "mapping"),
    "special empty": (corrupt(lambda s: s.update(special_tokens={"": 999})), "empty"),
    "special surrogate": (corrupt(lambda s: s.update(special_tokens={"\ud800": 999})), "not text"),
    "id type": (corrupt(lambda s: s["ranks"].update(ab="256")), "'256' is not an integer"),
    "id bool": (corrupt(lambda s: s["ranks"].update(zz=True)), "True is not an integer"),
    "id negative": (corrupt(lambda s: s["ranks"].update(zz=-1)), "-1 is not"),
    "id list": (corrupt(lambda s: s["ranks"].update(zz=[1])), "not an integer"),
    "id too large": (corrupt(lambda s: s["ranks"].update(zz=2**32)), "not an integer"),
    "same id": (corrupt(lambda s: s["ranks"].update(zz=97)), "id 97 stands for 2"),
    "special id": (corrupt(lambda s: s["special_tokens"].update(zz=97)), "id 97 stands for 2"),
    "byte missing": (corrupt(lambda s: s["ranks"].pop("a")), BYTE_MISSING),
    "empty token": (corrupt(lambda s: s["ranks"].update({"": 999})), "empty string"),
    "not latin": (corrupt(lambda s: s["ranks"].update({"的": 999})), "Latin-1"),
    "pattern": (corrupt(lambda s: s.update(pattern="(")), "regular expression"),
    "pattern type": (corrupt(lambda s: s.update(pattern=7)), "pattern=7"),
    "pattern list": (corrupt(lambda s: s.update(pattern=["a"])), "pattern="),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_files_are_refused_in_one_sentence(tmp_path, name):
    content, message = CORRUPT[name]
    path = tmp_path / "tok.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as e:
        Tokenizer.load(path)
    assert str(e.value).startswith(str(path))
    assert "\n" not in str(e.value)


# ---- tiktoken and GPT-2


def test_there_and_back_through_tiktoken(tok):
    back = Tokenizer.from_tiktoken(tok.to_tiktoken())
    assert (back.ranks, back.pattern) == (tok.ranks, tok.pattern)
    assert back.special_tokens == tok.special_tokens and back.foreign
    assert tok.to_tiktoken().n_vocab == tok.vocab_size


def test_two_special_tokens_may_share_an_id():
    """o200k_harmony has <|endofprompt|> and <|reserved_200018|> as 200018."""
    ranks = {bytes([i]): i for i in range(256)}
    special = {END_OF_TEXT: 256, "<|endofprompt|>": 258, "<|reserved|>": 258}
    theirs = tiktoken.Encoding(
        "harmony", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    ours = Tokenizer.from_tiktoken(theirs)
    text = "a<|reserved|>b<|endofprompt|>"
    ids = theirs.encode(text, allowed_special="all")
    assert ours.encode(text, "all") == ours.encode_python(text, "all") == ids == [97, 258, 98, 258]
    assert ours.decode([258]) == "<|endofprompt|>" and ours.vocab_size == 259
    again = Tokenizer.from_json(ours.to_json())
    assert again.hash == ours.hash and again.decode([258]) == "<|endofprompt|>"
    with pytest.raises(ValueError, match="id 97 stands for 2"):
        Tokenizer(ranks, GPT2_PATTERN, {"<|a|>": 97})


@pytest.mark.slow
def test_somebody_elses_ids_are_those_of_tiktoken_whatever_this_python_knows(tok):
    """GPT-2 had other ids where U+058C stood before 's: it is newer than Python's Unicode, so the
    text was left to the `regex` module, which knows it as a letter, and tiktoken does not."""
    theirs = Tokenizer(tok.ranks, tok.pattern, tok.special_tokens, foreign=True)
    newer = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) == "Cn"]
    letters = [c for c in newer if regex.match(r"\p{L}|\p{N}", c)]
    assert letters
    for c in ["\u058c", *random.Random(0).sample(newer + letters, 2000)]:
        text = f"the{c}'s {c}1 {c} {c}{c}ll"
        assert theirs.encode(text) == tok.to_tiktoken().encode_ordinary(text), hex(ord(c))
        assert theirs.encode_numpy(text).tolist() == theirs.encode(text)
        assert tok.encode(text) == tok.encode_python(text)
        assert theirs.decode(theirs.encode(text)) == text


def test_whose_ids_are_wanted_is_kept(tok, tmp_path):
    theirs = Tokenizer(tok.ranks, tok.pattern, tok.special_tokens, foreign=True)
    theirs.save(tmp_path / "theirs.json")
    back = Tokenizer.load(tmp_path / "theirs.json")
    assert back.foreign and back.hash == theirs.hash != tok.hash
    assert not Tokenizer.from_json(tok.to_json()).foreign
    with pytest.raises(ValueError, match="foreign=1 is neither"):
        Tokenizer.from_json(theirs.to_json().replace('"foreign": true', '"foreign": 1'))


@settings(deadline=None, max_examples=300)
@given(
    st.text("abé的😀1٣ \t\n\r'sSTLVREdm!_/.-\u00a0\u3000\u0301ſ", max_size=40)
    | st.text(max_size=40)
)
def test_patterns_split_as_those_of_tiktoken(text):
    source = peer("tiktoken_ext.openai_public")
    with pytest.MonkeyPatch.context() as patch:  # only the patterns: no file, no network
        patch.setattr(source, "load_tiktoken_bpe", lambda *a, **k: {})
        patch.setattr(source, "data_gym_to_mergeable_bpe_ranks", lambda *a, **k: {})
        theirs = source.gpt2()["pat_str"], source.cl100k_base()["pat_str"]
    for pattern, other in zip((GPT2_PATTERN, GPT4_PATTERN), theirs, strict=True):
        chunks = regex.findall(pattern, text)
        assert chunks == regex.findall(other, text)
        assert "".join(chunks) == text


def test_gpt2_files_give_the_ids_of_tiktoken(gpt2, tmp_path, monkeypatch):
    for path, remote in zip(gpt2_files(), (GPT2_MERGES, GPT2_VOCABULARY), strict=True):
        shutil.copy(path, tmp_path / hashlib.sha1(remote.urls[0].encode()).hexdigest())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    theirs = tiktoken.get_encoding("gpt2")
    assert gpt2.ranks == theirs._mergeable_ranks
    assert gpt2.special_tokens == theirs._special_tokens
    assert gpt2.vocab_size == theirs.n_vocab == 50257
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    ids = theirs.encode_ordinary(source)
    assert gpt2.encode(source) == gpt2.encode_python(source) == ids
    assert gpt2.decode(ids) == source
    rng = random.Random(2)
    for _ in range(300):
        text = random_text(rng, rng.choice([*ALPHABETS.values()]), rng.randrange(60))
        assert gpt2.encode(text) == gpt2.encode_python(text) == theirs.encode_ordinary(text)
    assert gpt2.encode("<|endoftext|>", "all") == [50256]


def test_gpt2_merges_are_those_of_its_file(gpt2):
    lines = gpt2_files()[0].read_text(encoding="utf-8").split("\n")[1:-1]
    merges = gpt2.merges()
    assert len(merges) == len(lines) == 50_000
    ascii_only = [
        (m, line) for m, line in zip(merges, lines, strict=True) if (m[0] + m[1]).isalnum()
    ]
    assert len(ascii_only) > 10_000
    for (a, b), line in ascii_only:
        assert f"{a.decode()} {b.decode()}" == line


def test_gpt2_files_may_be_written_on_windows(tmp_path):
    characters = [*byte_characters()]
    names = [*characters, "th", "the", END_OF_TEXT]
    merges, ids = tmp_path / "vocab.bpe", tmp_path / "encoder.json"
    merges.write_bytes("\ufeff#version: 0.2\r\nt h\r\nth e\r\n".encode())
    vocabulary = json.dumps({name: i for i, name in enumerate(names)}, indent=1)
    ids.write_bytes("\ufeff".encode() + vocabulary.replace("\n", "\r\n").encode())
    tok = read_gpt2_files(merges, ids)
    assert tok.encode("the") == [257] and tok.special_tokens == {END_OF_TEXT: 258}
    tok.save(tmp_path / "tokenizer.json")
    again = tmp_path / "again.json"
    again.write_text("\ufeff" + tok.to_json(), encoding="utf-8")
    assert Tokenizer.load(again).hash == Tokenizer.load(tmp_path / "tokenizer.json").hash


def test_gpt2_files_that_do_not_belong_together_are_refused(tmp_path):
    vocab, ids = gpt2_files()
    lines = vocab.read_text(encoding="utf-8").split("\n")
    lines[5], lines[6] = lines[6], lines[5]
    swapped = tmp_path / "vocab.bpe"
    swapped.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match="do not belong together"):
        read_gpt2_files(swapped, ids)
    with pytest.raises(ValueError, match="not GPT-2's files"):
        read_gpt2_files(ids, vocab)


def test_merges_refuses_a_vocabulary_that_is_not_bpe():
    ranks = {bytes([i]): i for i in range(256)}
    tok = Tokenizer(ranks | {b"abc": 256}, GPT2_PATTERN, {})
    with pytest.raises(ValueError, match="not a pair"):
        tok.merges()
    assert tok.encode("abc abc") == tok.encode_python("abc abc")


# ---- the file by itself


def test_the_file_alone_runs(tmp_path):
    shutil.copy(ROOT / "bpe.py", tmp_path)
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "bpe.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=alone, capture_output=True, encoding="utf-8", timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["merge", "'a'", "+", "'t'", "->", "256", "'at'"]
    assert [line.split()[0] for line in lines[:12]] == ["merge"] * 12
    assert "' chat' = ' c' 'h' 'at'" in lines[14]
    assert lines[-1] == "The slow and obvious form gives the same merges and the same ids."
