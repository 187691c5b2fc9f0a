"""data/sentencepieces.py: MarianTokenizer's ids and texts, its files, and data made with it."""

import json
import sys

import numpy as np
import pytest
from conftest import TOYS, peer, write_labelled, write_texts
from converting import ENGLISH, GERMAN, save_tokenizer, spm
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from bpe import END_OF_TEXT
from data.sentencepieces import FILES, SPECIAL_PIECES, START, SentencePieces
from data.tokens import load_tokenizer, tokenizer_from_json
from engine.hub.tokenizer_files import read_tokenizer
from tasks import translation

TEXT = [*ENGLISH, *GERMAN, "", " ", "\n \n\t", "a</s", ">>fra<< the cat", ">>deu<< the cat", ">> a"]
TEXT += [
    ">>fra<<>>fra<< x",
    ">>a\nb<< the",
    " >>fra<< a",
    ">><<<",
    "naïve café 東京 \U0001f600",
    "the cat " * 200,
]
PARTS = (
    ">>fra<<",
    ">>",
    "<<",
    ">>x y<<",
    "▁",
    "\0",
    " ",
    "  ",
    "\n",
    "\u2028",
    "\x1c",
    "the",
    "se",
)
PARTS += (
    "ﬁ",
    "é",
    "e\u0301",
    "東京",
    "\U0001f600",
    "</s",
    "s>",
    "pad>",
    "ö",
    "123",
    "Kat",
    "sat on",
)
TEXTS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PARTS), max_size=12).map("".join))


@pytest.fixture(params=["unigram", "bpe"])
def folder(request, tmp_path):
    """The files of opus-mt, without a model."""
    save_tokenizer(tmp_path / "there", request.param)
    return tmp_path / "there"


def theirs_of(folder):
    return peer("transformers").MarianTokenizer.from_pretrained(folder)


def pieces_of(folder) -> list[str]:
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    return sorted(vocab, key=vocab.get)


# ---- the same ids and texts ----------------------------------------------------------------------


@pytest.mark.slow
def test_the_ids_of_sources_and_targets_are_marians(folder):
    ours, theirs = read_tokenizer(folder, "seq2seq"), theirs_of(folder)

    def check(text):
        # Of their own names they would make special tokens, even in the middle of a text.
        while any(name in text for name in SPECIAL_PIECES):
            for name in SPECIAL_PIECES:
                text = text.replace(name, "")
        source, target = theirs(text)["input_ids"], theirs(text_target=text)["input_ids"]
        assert [*ours.encode(text), 0] == source
        assert [*ours.encode_target(text).tolist(), 0] == target
        found = ours.encode_numpy(text)
        assert found.dtype == np.uint32 and found.tolist() == source[:-1]

    for text in TEXT:
        check(text)
    settings(max_examples=300, deadline=None)(given(TEXTS)(check))()
    assert ours.encode(">>fra<< cat")[0] == 2 and ours.encode(">>deu<< cat")[0] == 1
    assert 1 in ours.encode("the")  # a piece that the vocabulary lacks
    assert ours.encode(GERMAN[0]) != ours.encode_target(GERMAN[0]).tolist()


def test_the_texts_of_ids_are_marians(folder):
    ours, theirs = read_tokenizer(folder, "seq2seq"), theirs_of(folder)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.integers(0, ours.vocab_size - 1), max_size=12))
    def check(ids):
        want = theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == want
        assert ours.decode_bytes(ids).decode("utf-8") == want

    check()
    for text in GERMAN:
        ids = ours.encode_target(text)
        assert ours.decode(ids) == text == theirs.decode(ids.tolist(), skip_special_tokens=True)
    for i in (-1, ours.vocab_size):
        with pytest.raises(
            ValueError, match=f"id {i} is no piece: .* ends at {ours.vocab_size - 1}"
        ):
            ours.decode([3, i])


def test_no_text_becomes_the_end_or_the_start(folder):
    """To the models, their names are letters, and a model returns unknown letters as they are; so
    they would be found in the vocabulary by name."""
    pieces = pieces_of(folder)
    ours = read_tokenizer(folder, "seq2seq")
    assert ours.special_tokens == {END_OF_TEXT: 0, START: len(pieces) - 1}
    assert ours.vocab_size == len(pieces) and ours.pieces == pieces
    bare = spm("unigram", ("0 1 01 10",))  # which knows none of the letters
    assert "</s>" in peer("sentencepiece").SentencePieceProcessor(model_proto=bare).encode(
        "0 </s>", out_type=str
    )
    for tokenizer in (ours, SentencePieces(bare, bare, pieces)):
        for name in (*SPECIAL_PIECES, END_OF_TEXT, START):
            for text in (name, f"a {name} b", f">>fra<<{name}"):
                special = {*tokenizer.special_tokens.values()}
                found = {*tokenizer.encode(text), *tokenizer.encode_target(text).tolist()}
                assert not special & found
    assert ours.encode("a \ud800 b") == ours.encode("a ? b")  # half a character


# ---- files ---------------------------------------------------------------------------------------


def test_json_out_and_in_again(folder, tmp_path):
    ours = read_tokenizer(folder, "seq2seq")
    restored = tokenizer_from_json(ours.to_json())
    assert type(restored) is SentencePieces and restored.to_json() == ours.to_json()
    assert (restored.source, restored.target) == (ours.source, ours.target)
    assert restored.pieces == ours.pieces
    assert restored.hash == ours.hash and restored.encode(TEXT[0]) == ours.encode(TEXT[0])
    changed = [
        SentencePieces(ours.target, ours.target, ours.pieces),
        SentencePieces(ours.source, ours.source, ours.pieces),
        SentencePieces(ours.source, ours.target, ours.pieces[::-1]),
    ]
    assert len({ours.hash, *(tokenizer.hash for tokenizer in changed)}) == 4
    (tmp_path / "t.json").write_text(ours.to_json(), encoding="utf-8")
    assert load_tokenizer(tmp_path / "t.json").hash == ours.hash


def test_saved_files_are_what_was_read(folder, tmp_path):
    ours = read_tokenizer(folder, "seq2seq")
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == sorted(FILES)
    for name in FILES[:2]:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert pieces_of(tmp_path / "again") == pieces_of(folder)
    assert read_tokenizer(tmp_path / "again", "seq2seq").hash == ours.hash
    saved = tmp_path / "theirs"  # what transformers makes of them has more settings
    theirs_of(folder).save_pretrained(saved)
    assert read_tokenizer(saved, "seq2seq").hash == ours.hash


@pytest.fixture
def state(tmp_path) -> dict:
    save_tokenizer(tmp_path / "there", "unigram")
    return json.loads(read_tokenizer(tmp_path / "there", "seq2seq").to_json())


@pytest.mark.parametrize(
    "change,message",
    [
        ({"format": 2}, "not a SentencePiece tokenizer of format 1"),
        ({"source": 5}, "no models in base64"),
        ({"source": None}, "no models in base64"),
        ({"target": "%%%"}, "no models in base64"),
        ({"target": "é"}, "no models in base64"),
        ({"target": ""}, r"target\.spm is damaged"),
        ({"source": "AAAA"}, r"source\.spm is damaged"),
        ({"pieces": None}, "is no list"),
        ({"pieces": {}}, "is no list"),
        ({"pieces": []}, "the 0 pieces have no </s>, <unk>, <pad>"),
        ({"pieces": ["</s>", "a", "<pad>"]}, "the 3 pieces have no <unk>"),
        ({"pieces": [*SPECIAL_PIECES, "a", "a"]}, "piece 'a' occurs 2 times"),
        ({"pieces": [*SPECIAL_PIECES, 5]}, "piece 3 is 5, no text"),
        ({"pieces": [*SPECIAL_PIECES, "\udcff"]}, "piece 3 is .* no text"),
    ],
    ids=str,
)
def test_a_state_that_was_not_written_is_refused(change, message, state):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_json(json.dumps({**state, **change}))
    with pytest.raises(ValueError, match="not a SentencePiece tokenizer"):
        SentencePieces.from_json(json.dumps({**state, "type": "WordPiece"}))
    for text in ("", "[]", "[" * 100_000, '{"a": 1, "a": 1}'):
        with pytest.raises(ValueError, match="not a "):
            SentencePieces.from_json(text)


def test_a_vocabulary_without_end_is_refused(monkeypatch, state):
    monkeypatch.setattr("data.sentencepieces.MAX_TOKENS", 5)
    with pytest.raises(ValueError, match="no list of at most 5 pieces"):
        SentencePieces.from_json(json.dumps(state))


def test_without_the_package_one_sentence_says_so(state, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="pip install sentencepiece"):
        SentencePieces.from_json(json.dumps(state))


def write_json(path, content) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def test_damaged_files_are_named(folder):
    for name in FILES[:2]:
        whole = (folder / name).read_bytes()
        for content in (b"", b"\0", whole[:1], whole[: len(whole) // 2], whole[:-1], b"x" * 99):
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"there: {name} is damaged"):
                read_tokenizer(folder, "seq2seq")
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"there is no .*{name}"):
            read_tokenizer(folder, "seq2seq")
        (folder / name).write_bytes(whole)
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    for change, message in (
        ({"x": len(vocab) + 1}, r"vocab\.json: the ids of \d+ pieces do not count from 0"),
        ({"x": 5}, r"vocab\.json: the ids of"),
        ({"x": str(len(vocab))}, r"vocab\.json: the ids of"),
        ({"x": [5]}, r"vocab\.json: the ids of"),
        ({"</s>": True, "<unk>": 0}, r"vocab\.json: the ids of"),
    ):
        write_json(folder / "vocab.json", {**vocab, **change})
        with pytest.raises(ValueError, match=message):
            read_tokenizer(folder, "seq2seq")
    for name in SPECIAL_PIECES:
        write_json(folder / "vocab.json", {{name: "x"}.get(p, p): i for p, i in vocab.items()})
        with pytest.raises(ValueError, match=rf"there: the {len(vocab)} pieces have no {name}"):
            read_tokenizer(folder, "seq2seq")
    (folder / "vocab.json").unlink()
    with pytest.raises(ValueError, match=r"there is no .*vocab\.json"):
        read_tokenizer(folder, "seq2seq")


@pytest.mark.parametrize(
    "settings",
    [
        {"separate_vocabs": True},
        {"sp_model_kwargs": {"enable_sampling": True}},
        {"eos_token": "<eos>"},
        {"unk_token": {"content": "[UNK]"}},
        {"pad_token": "<blank>"},
        {"additional_special_tokens": ["<eop>"]},
        {"extra_special_tokens": ["<eop>"]},
        {"added_tokens_decoder": {"3": {"content": ">>fra<<"}}},
        {"added_tokens_decoder": {"3": ">>fra<<"}},
        {"added_tokens_decoder": [">>fra<<"]},
    ],
    ids=str,
)
def test_a_setting_that_ours_does_not_have_is_refused(settings, tmp_path):
    save_tokenizer(tmp_path / "there", "bpe")
    write_json(tmp_path / "there" / "tokenizer_config.json", settings)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: .* is not supported"):
        read_tokenizer(tmp_path / "there", "seq2seq")


# ---- data ----------------------------------------------------------------------------------------


def test_pairs_have_source_pieces_then_target_pieces_behind_the_start(folder, monkeypatch):
    monkeypatch.chdir(folder)
    pairs = [*zip(ENGLISH, GERMAN, strict=True), (">>fra<< no", "1 + 3"), ("東京", "Straße")]
    lines = "".join(f"{source}\t{target}\n" for source, target in pairs * 20)
    (folder / "pairs.tsv").write_text(lines, encoding="utf-8")
    tokenizer = read_tokenizer(folder, "seq2seq")
    config = translation.Flags(
        data="pairs.tsv", cache_dir="cache", batch_size=3, tokens_per_step=120
    )
    sizes = {"vocab_size": tokenizer.vocab_size, "block_size": 40}
    train, valid = translation.Data.splits(config, sizes, tokenizer)
    found, start = set(), tokenizer.vocab_size - 1
    for part in (train, valid):
        for i in range(part.n_batches):
            batch = part.batch(i)
            keep = batch.get("source_keep", batch["source"] >= 0)
            for source, kept, tokens, targets in zip(
                batch["source"], keep, batch["tokens"], batch["targets"], strict=True
            ):
                source, target = source[kept].tolist(), targets[targets != -100].tolist()
                assert tokens[: len(target)].tolist() == [start, *target[:-1]]
                assert source[-1] == target[-1] == 0
                found.add((tuple(source[:-1]), tuple(target[:-1])))
    assert found == {
        (tuple(tokenizer.encode(source)), tuple(tokenizer.encode_target(target).tolist()))
        for source, target in pairs
    }
    assert len(found) == len(pairs)
    assert (GERMAN[0] in {target for _, target in train.texts()}) and train.start == start


@pytest.mark.parametrize("task", ["gpt", "complete"])
def test_a_task_that_needs_bytes_refuses_pieces_before_it_trains(tmp_path, monkeypatch, task):
    """The first evaluation failed, after the steps before it: pieces have no bytes."""
    save_tokenizer(tmp_path / "there", "unigram")
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    write_labelled(tmp_path)
    pieces = read_tokenizer(tmp_path / "there", "seq2seq").to_json()
    (tmp_path / "pieces.json").write_text(pieces, encoding="utf-8")
    flags = [flag for flag in TOYS[task] if not flag.startswith("--vocab_size")]
    with pytest.raises(ValueError, match=r"whose tokens are bytes, and that of pieces\.json"):
        train.main([*flags, "--tokenizer=pieces.json", "--steps=3"])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.pt"))
