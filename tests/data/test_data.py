"""data/: how text is found, split, streamed, tokenized once, and kept."""

import gzip
import hashlib
import json
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import shared

import data.text
import data.tokens
from bpe import GPT2_PATTERN, GPT4_PATTERN, Tokenizer
from data.download import SHAKESPEARE, Remote, fetch
from data.shards import Origin, open_shards
from data.text import Part, open_corpus, text_pieces
from data.tokens import END_OF_TEXT, tokenize
from tasks.text import Data

POEM = "".join(f"Line {i} – ein Vers, 第{i}行 😀.\n" for i in range(400))

NOISE = np.random.default_rng(0).integers(97, 123, 300_000).astype(np.uint8).tobytes()


def flipped(raw: bytes) -> bytes:
    """A .gz with one damaged byte, far behind the first bytes that a reader sees."""
    return raw[:-50_000] + bytes([raw[-50_000] ^ 255]) + raw[-49_999:]


def joined(corpus, split: str) -> str:
    return "".join(text for text, _ in corpus.pieces(split))


def windows(path, *, block_size=8, batch_size=3, vocab_size=300, seed=0, **options):
    config = SimpleNamespace(
        data=str(path),
        cache_dir="cache",
        tokenizer=options.pop("tokenizer", ""),
        pattern="gpt2",
        batch_size=batch_size,
        seed=seed,
        eval_tokens=options.pop("eval_tokens", 0),
    )
    return Data.splits(config, {"vocab_size": vocab_size, "block_size": block_size})


# ---- finding and splitting -----------------------------------------------------------------------


def test_one_text_is_cut_at_90_percent_on_a_character(toy):
    text = "ä" * 1001  # 2,002 bytes: 90% is in the middle of a character
    (toy / "a.txt").write_text(text, encoding="utf-8")
    corpus = open_corpus("a.txt", toy)
    train, validation = joined(corpus, "train"), joined(corpus, "validation")
    assert train + validation == text
    assert len(train) == 901  # byte 1,801 is the second half of a character, so byte 1,802


def test_split_of_ascii_is_that_of_nanogpt(toy):
    text = "".join(chr(97 + i % 26) for i in range(12345))
    (toy / "a.txt").write_text(text, encoding="utf-8")
    assert joined(open_corpus("a.txt", toy), "train") == text[: int(12345 * 0.9)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_is_cut_between_documents(toy, name):
    documents = [f"document {i}\nwith two lines" for i in range(57)]
    lines = "\n".join(json.dumps({"text": d, "other": 1}) for d in documents)
    raw = lines.encode()  # and no newline at the end
    (toy / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    corpus = open_corpus(name, toy)
    train, validation = list(corpus.pieces("train")), list(corpus.pieces("validation"))
    assert [d for d, _ in train + validation] == documents
    assert all(begins for _, begins in train + validation)
    assert 3 <= len(validation) <= 6


def test_gz_reads_like_the_plain_file(toy):
    (toy / "a.txt").write_text(POEM, encoding="utf-8", newline="")
    (toy / "b.txt.gz").write_bytes(gzip.compress(POEM.encode()))
    one, two = open_corpus("a.txt", toy), open_corpus("b.txt.gz", toy)
    for split in ("train", "validation"):
        assert joined(one, split) == joined(two, split) != ""


def test_a_folder_is_split_by_whole_files_in_order_of_name(toy):
    for i in range(25):
        path = toy / "folder" / f"{i % 3}" / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {i}\n", encoding="utf-8")
    (toy / "folder" / "picture.png").write_bytes(b"\0\1")  # not a text suffix: passed over
    corpus = open_corpus("folder", toy)
    names = [p.path.relative_to("folder").as_posix() for p in corpus.validation]
    assert names == ["1/01.txt", "2/08.txt"]  # the 10th and the 20th of 0/00, 0/03, …
    assert len(corpus.train) == 23 and not set(corpus.train) & set(corpus.validation)
    assert [begins for _, begins in corpus.pieces("validation")] == [True, True]


def test_hidden_files_are_left_out_and_counted(toy):
    """A folder from a Mac was refused for ._a.txt, and a notebook's copies trained as well."""
    for name in ("a.txt", "b.txt", "c.txt", "._a.txt", ".ipynb_checkpoints/c.txt", ".git/x/y.txt"):
        path = toy / ".books" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\5\x16\7" if name.startswith(".") else name.encode() * 9)
    corpus = open_corpus(".books", toy)
    assert corpus.rule == "2 files train, 1 validate (the last); 3 hidden files left out"
    for name in ("b.txt", "c.txt", "._a.txt"):
        (toy / ".books" / name).unlink()
    assert open_corpus(".books", toy).rule.endswith("; 2 hidden files left out")
    (toy / ".books" / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"holds no text: .*; 2 hidden files left out"):
        open_corpus(".books", toy)


@pytest.mark.parametrize("name", ["d.txt", "d.txt.gz"])
def test_a_copy_of_a_validation_text_among_those_that_train_is_told(toy, name):
    (toy / "books").mkdir()
    for file in ("a.txt", "b.txt", "c.txt"):
        (toy / "books" / file).write_text(f"the text of {file}", encoding="utf-8")
    text = (toy / "books" / "b.txt").read_bytes()
    (toy / "books" / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    rule = open_corpus("books", toy).rule
    one, other = Path("books", name), Path("books", "b.txt")
    told = f"; {one} is a copy of {other}: remove one, or what trains also validates"
    assert rule == f"3 files train, 1 validate (the last){told}"
    (toy / "books" / "z.txt").write_text("", encoding="utf-8")  # empty files are no copies
    with pytest.raises(ValueError, match=r"z\.txt is empty"):
        open_corpus("books", toy)


def test_the_default_is_the_standard_library_without_its_tests(toy):
    corpus = open_corpus("stdlib", toy)
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = {p.path.relative_to(folder).as_posix() for p in corpus.train + corpus.validation}
    assert {"ast.py", "json/decoder.py"} <= names
    assert not any(name.startswith(("test/", "site-packages/")) for name in names)
    assert sum(p.path.stat().st_size for p in corpus.train) > 5e6


def test_hash_follows_content_and_not_place(toy):
    for folder in ("one", "two"):
        (toy / folder).mkdir()
        (toy / folder / "a.txt").write_text("some text", encoding="utf-8")
    first = open_corpus("one/a.txt", toy).hash
    assert open_corpus("two/a.txt", toy).hash == first
    (toy / "two" / "a.txt").write_text("some tent", encoding="utf-8")
    assert open_corpus("two/a.txt", toy).hash != first


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("missing.txt", None, "is no file or folder here, nor one of stdlib, shakespeare"),
        ("empty.txt", b"", "is empty"),
        ("binary.txt", b"abc\0def", "is binary"),
        ("wide.txt", "日本".encode("utf-16"), "or UTF-16: give a text .*iconv -f utf-16 -t utf-8"),
        ("1252.txt", "a – b".encode("cp1252"), "near byte 2: .*iconv -f cp1252 -t utf-8"),
        ("latin.txt", "Gr\xfc\xdfe".encode("latin-1"), "is not UTF-8 near byte 2"),
        ("a.txt.gz", b"no gzip", "no intact gzip file"),
        ("cut.txt.gz", gzip.compress(POEM.encode(), mtime=0)[:40], "no intact gzip file"),
        ("end.txt.gz", gzip.compress(NOISE)[:-1000], "no intact gzip file"),
        ("flip.txt.gz", flipped(gzip.compress(NOISE)), "no intact gzip file"),
        ("a.jsonl", b'{"text": "fine"}\n{"words": 1}\n', 'line 2: not a JSON object.*"text"'),
        ("b.jsonl", b'{"text": 7}\n', "line 1: not a JSON object"),
        ("c.jsonl", b"nonsense\n", "line 1: .*nonsense"),
        (
            "d.jsonl",
            b'[{"text": "a"},\n{"text": "b"}]',
            "line 1: .* but an array: write one object",
        ),
        ("e.json", b'[{"text": "a"}]', r"e\.json is a JSON array, no text: write a \.jsonl.*\.txt"),
        ("f.json", b'{"text": "a"}', r"f\.json is JSON, no text: write a \.jsonl"),
    ],
)
def test_bad_text_is_refused_in_one_sentence(toy, name, content, message):
    if content is not None:
        (toy / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        corpus = open_corpus(name, toy)
        joined(corpus, "train"), joined(corpus, "validation")
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "folder"])
def test_a_byte_order_mark_is_no_text(toy, name):
    """It was a token of its own. What is known of texts without one stays known: the same hash."""
    (toy / "folder").mkdir()
    texts = {}
    for mark in (b"", b"\xef\xbb\xbf"):
        raw = mark + POEM.encode()
        for path in (toy / "a.txt", toy / "folder" / "a.txt", toy / "folder" / "b.txt"):
            path.write_bytes(raw)
        (toy / "a.txt.gz").write_bytes(gzip.compress(raw))
        corpus = open_corpus(name, toy)
        texts[mark] = joined(corpus, "train") + joined(corpus, "validation"), corpus.hash
    (plain, one), (marked, other) = texts.values()
    assert plain == marked and one != other


def test_bad_bytes_far_inside_a_file_are_named(toy, monkeypatch):
    monkeypatch.setattr(data.text, "BLOCK", 1000)
    (toy / "a.txt").write_bytes(b"x" * 100_000 + b"\xff" + b"y" * 100_000)
    with pytest.raises(ValueError, match="not UTF-8 near byte 100,000"):
        joined(open_corpus("a.txt", toy), "train")


def test_a_cache_that_cannot_be_written_names_its_flag(toy):
    """A current folder that is read-only, for one; here a file stands in the way."""
    with pytest.raises(ValueError, match=r"^cannot write to toy\.txt.*with --cache_dir"):
        fetch(SHAKESPEARE, Path("toy.txt/cache"))
    corpus = open_corpus("toy.txt", toy)
    with pytest.raises(ValueError, match="--cache_dir"):
        tokenize(corpus, "train", Tokenizer.train(["a text"], 300), Path("toy.txt/cache"))
    assert [path.name for path in toy.iterdir() if ".part" in path.name] == []


def test_empty_folder_is_refused(toy):
    (toy / "folder").mkdir()
    with pytest.raises(ValueError, match="holds no text"):
        open_corpus("folder", toy)


# ---- streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_pieces_give_the_tokens_of_the_undivided_text(toy, monkeypatch, pattern):
    monkeypatch.setattr(data.text, "BLOCK", 256)
    random = np.random.default_rng(0)
    parts = ["word", " ", "\n", "\n\n", ".", "!\n", "  ", "\t", "12345", "'s", "ü", "😀", "\r\n"]
    text = "".join(random.choice(parts, 4000, p=[0.3, 0.2, 0.1, *[0.04] * 10]))
    (toy / "a.txt").write_bytes(text.encode())
    options = {"pattern": GPT4_PATTERN} if pattern == "gpt4" else {}
    tokenizer = Tokenizer.train([text], 350, **options)
    pieces = list(text_pieces(Part(toy / "a.txt")))
    assert "".join(pieces) == text and len(pieces) > 10
    assert [i for p in pieces for i in tokenizer.encode(p)] == tokenizer.encode(text)


def test_text_without_line_breaks_streams_too(toy, monkeypatch):
    monkeypatch.setattr(data.text, "BLOCK", 64)
    (toy / "a.txt").write_text("ab😀" * 1000, encoding="utf-8")
    pieces = list(text_pieces(Part(toy / "a.txt")))
    assert "".join(pieces) == "ab😀" * 1000 and max(map(len, pieces)) < 600


# ---- token files ---------------------------------------------------------------------------------


def test_token_file_holds_every_document_behind_its_border(toy):
    (toy / "folder").mkdir()
    for i in range(12):
        (toy / "folder" / f"{i:02}.txt").write_text(f"text {i}\n", encoding="utf-8")
    corpus = open_corpus("folder", toy)
    tokenizer = Tokenizer.train([joined(corpus, "train")], 270)
    file = tokenize(corpus, "train", tokenizer, toy)
    border = tokenizer.special_tokens[END_OF_TEXT]
    want = [[border, *tokenizer.encode(text)] for text, _ in corpus.pieces("train")]
    assert file.ids[:].tolist() == [i for document in want for i in document]
    assert file.text_bytes == len(joined(corpus, "train").encode())
    assert file.ids.dtype == np.uint16
    header = file.path.read_bytes()[:128]
    assert header.startswith(b"TOKENS\0\1") and bytes.fromhex(tokenizer.hash) in header


def test_large_vocabularies_take_four_bytes(toy):
    (toy / "a.txt").write_text(POEM, encoding="utf-8")
    ranks = {bytes([i]): i for i in range(256)}
    tokenizer = Tokenizer(ranks, GPT2_PATTERN, {END_OF_TEXT: 70_000})
    file = tokenize(open_corpus("a.txt", toy), "train", tokenizer, toy)
    assert file.ids.dtype == np.uint32 and file.ids[:1].tolist() == [70_000]


def test_tokens_are_made_once_and_again_when_anything_changes(toy, monkeypatch):
    made = []
    real = data.tokens.write_shards
    monkeypatch.setattr(data.tokens, "write_shards", lambda *a: made.append(a[0].name) or real(*a))
    windows("toy.txt")
    assert len(made) == 2
    windows("toy.txt")
    assert len(made) == 2
    windows("toy.txt", vocab_size=310)
    assert len(made) == 4
    text = (toy / "toy.txt").read_text(encoding="utf-8")
    (toy / "toy.txt").write_text("X" + text[1:], encoding="utf-8")  # same length
    windows("toy.txt")
    assert len(made) == 6


@pytest.mark.parametrize("damage", ["truncate", "foreign", "version", "tokenizer"])
def test_damaged_token_files_are_refused_and_made_again(toy, damage):
    train, _ = windows("toy.txt")
    want = train.ids[:].tolist()
    path = next((toy / "cache").glob("toy-train-*.tokens"))
    raw = bytearray(path.read_bytes())
    if damage == "truncate":
        raw = raw[:-10]
    elif damage == "foreign":
        raw[:6] = b"PICKLE"
    elif damage == "version":
        raw[8] = 99
    else:
        raw[60] ^= 1
    del train
    path.write_bytes(raw)
    corpus = open_corpus("toy.txt", toy)
    tokenizer = Tokenizer.load(next((toy / "cache").glob("*.json")))
    with pytest.raises(ValueError, match="delete it"):
        open_shards(path, Origin(tokenizer.hash, corpus.hash, "train"))
    assert windows("toy.txt")[0].ids[:].tolist() == want


def test_an_interrupted_tokenization_leaves_nothing_behind(toy, monkeypatch):
    def fails(self, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(data.tokens.CorpusEncoder, "__call__", fails)
    with pytest.raises(KeyboardInterrupt):
        windows("toy.txt")
    assert not [p for p in (toy / "cache").iterdir() if p.suffix != ".json"]


def test_the_tokenizer_is_trained_on_the_training_part_only(toy):
    text = "abab " * 900 + "xyxy " * 100
    (toy / "a.txt").write_text(text, encoding="utf-8")
    train, _ = windows("a.txt", vocab_size=262)
    assert b"abab" in train.tokenizer.ranks
    assert not any(b"x" in token for token in train.tokenizer.ranks if len(token) > 1)


# ---- downloads, from a server on this machine ----------------------------------------------------


def test_shakespeare_is_the_file_that_is_known(toy):
    raw = shared("shakespeare.txt").read_bytes()
    assert len(raw) == SHAKESPEARE.size
    assert hashlib.sha256(raw).hexdigest() == SHAKESPEARE.sha256


def remote(content: bytes, *urls: str) -> Remote:
    return Remote("a.txt", urls, len(content), hashlib.sha256(content).hexdigest())


def test_download_checks_keeps_and_repairs(toy, server):
    folder, address = server
    (folder / "good.txt").write_bytes(b"good content")
    file = remote(b"good content", f"{address}/missing.txt", f"{address}/good.txt")
    path = fetch(file, toy / "cache")
    assert path.read_bytes() == b"good content"
    (folder / "good.txt").unlink()
    assert fetch(file, toy / "cache") == path  # from the cache now
    path.write_bytes(b"good CONTENT")
    with pytest.raises(ValueError, match="cannot download"):
        fetch(file, toy / "cache")  # damaged, and the server has it no more
    (folder / "good.txt").write_bytes(b"good content")
    assert fetch(file, toy / "cache").read_bytes() == b"good content"


@pytest.mark.parametrize(
    "served,reason",
    [(b"evil content", "SHA-256"), (b"short", "5 bytes arrived"), (b"x" * 99, "more")],
)
def test_download_never_keeps_what_does_not_match(toy, server, served, reason):
    folder, address = server
    (folder / "a.txt").write_bytes(served)
    with pytest.raises(ValueError, match=f"{reason}.*put a copy of that file at"):
        fetch(remote(b"good content", f"{address}/a.txt"), toy / "cache")
    assert list((toy / "cache").iterdir()) == []


def test_shakespeare_by_name_downloads(toy, server, monkeypatch):
    folder, address = server
    raw = shared("shakespeare.txt").read_bytes()
    (folder / "input.txt").write_bytes(raw)
    here = Remote(SHAKESPEARE.name, (f"{address}/input.txt",), SHAKESPEARE.size, SHAKESPEARE.sha256)
    monkeypatch.setattr(data.text, "SHAKESPEARE", here)
    corpus = open_corpus("shakespeare", toy / "cache")
    assert joined(corpus, "train").encode() == raw[:1003854]
    assert joined(corpus, "validation").encode() == raw[1003854:]


def test_a_download_without_network_says_what_to_do(toy, monkeypatch):
    nowhere = Remote("a.txt", ("http://127.0.0.1:9/a.txt",), 1, "0" * 64)
    monkeypatch.setattr(data.text, "SHAKESPEARE", nowhere)
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9.*put a copy.*or use another --data"):
        open_corpus("shakespeare", toy)
