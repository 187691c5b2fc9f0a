"""data/parallel.py and data/wmt.py: pairs found, held out, streamed, refused."""

import csv
import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from conftest import shared

import data.download
import data.parallel
import data.text
import data.wmt
from bpe import Tokenizer
from data.download import MULTI30K, Remote, fetch
from data.lines import read_lines
from data.parallel import open_pairs
from data.tokens import END_OF_TEXT, tokenize

PAIRS = [(f"sentence {i}, ein Satz 😀", f"Satz {i}, une phrase é") for i in range(250)]


def write(path: Path, lines: list[str], end: str = "\n") -> str:
    raw = "".join(line + end for line in lines).encode()
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return str(path)


def two_files(folder: Path, pairs, *, names=("train.en", "train.de"), end="\n") -> str:
    """Writes both and returns what --data would be."""
    sides = zip(*pairs, strict=True)
    return ",".join(write(folder / name, s, end) for name, s in zip(names, sides, strict=True))


def all_pairs(corpus):
    return {split: list(corpus.pairs(split)) for split in corpus.splits}


# ---- files of one's own --------------------------------------------------------------------------


def test_the_forms_of_one_text_give_the_same_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(data.text, "BLOCK", 64)  # so that blocks end inside lines and characters
    tsv = [f"{s}\t{t}" for s, t in PAIRS]
    forms = [
        two_files(tmp_path, PAIRS),
        two_files(tmp_path, PAIRS, names=("a.en.gz", "a.de.gz")),
        two_files(tmp_path, PAIRS, names=("windows.en", "windows.de"), end="\r\n"),
        write(tmp_path / "a.tsv", tsv),
        write(tmp_path / "a.tsv.gz", tsv),
    ]
    (tmp_path / "b.tsv").write_bytes("\n".join(tsv).encode())  # no newline at the end
    (tmp_path / "c.tsv").write_bytes(b"\xef\xbb\xbf" + "\n".join(tsv).encode())  # a BOM
    for form in (*forms, str(tmp_path / "b.tsv"), str(tmp_path / "c.tsv")):
        corpus = open_pairs(form, tmp_path / "cache")
        held_out = list(corpus.pairs("validation"))
        assert held_out == [PAIRS[99], PAIRS[199]], form
        assert list(corpus.pairs("train")) == [p for p in PAIRS if p not in held_out]
        assert corpus.rule == "248 pairs train, 2 pairs validate (one in 100)"
        assert corpus.prompts == [PAIRS[99][0], PAIRS[199][0]]
        assert corpus.languages == ("", "")


def test_other_separators_inside_a_line_are_text(tmp_path):
    """str.splitlines() cut a sentence at U+2028 or \\x85, and every pair after it was wrong."""
    odd = [f"one{c}two {i}" for i, c in enumerate("\u2028\u2029\x85\x0b\x0c\x1c\x1e\r")]
    write(tmp_path / "a", odd)
    assert list(read_lines(tmp_path / "a")) == odd
    corpus = open_pairs(two_files(tmp_path, [(o, "x") for o in odd]), tmp_path)
    assert [s for split in ("train", "validation") for s, _ in corpus.pairs(split)] == odd


def test_pairs_with_an_empty_side_are_left_out_and_counted(tmp_path):
    pairs = [("a", "b"), ("", "c"), ("d", " \t "), ("e", "f"), ("", ""), (" g ", "h\u3000")]
    corpus = open_pairs(two_files(tmp_path, pairs), tmp_path)
    assert all_pairs(corpus) == {"train": [("a", "b"), ("e", "f")], "validation": [("g", "h")]}
    assert corpus.rule == (
        "2 pairs train, 1 pair validate (the last one); 3 pairs with an empty side left out"
    )
    tsv = write(tmp_path / "a.tsv", ["a\tb", "\tc", "d\t", "", "e\tf"])
    assert all_pairs(open_pairs(tsv, tmp_path))["train"] == [("a", "b")]


@pytest.mark.parametrize(
    "total,every", [(2, 2), (99, 99), (100, 100), (199, 100), (1000, 100), (30_000, 100)]
)
def test_hold_out(tmp_path, total, every):
    pairs = [(f"s{i}", f"t{i}") for i in range(total)]
    corpus = open_pairs(two_files(tmp_path, pairs), tmp_path)
    assert list(corpus.pairs("validation")) == pairs[every - 1 :: every]
    assert sorted([*corpus.pairs("validation"), *corpus.pairs("train")]) == sorted(pairs)


def test_hold_out_has_an_upper_limit_and_is_spread_over_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(data.parallel, "HELD_OUT_MOST", 7)
    pairs = [(f"s{i}", f"t{i}") for i in range(1000)]
    corpus = open_pairs(two_files(tmp_path, pairs), tmp_path)
    assert list(corpus.pairs("validation")) == pairs[142::143]  # 6, up to the 858th of 1,000
    assert corpus.rule == "994 pairs train, 6 pairs validate (one in 143)"


def test_given_validation_files_are_taken_as_they_are(tmp_path):
    train = two_files(tmp_path, PAIRS[:200])
    valid = write(tmp_path / "valid.tsv", [f"{s}\t{t}" for s, t in PAIRS[200:]])
    corpus = open_pairs(train, tmp_path, valid=valid)
    assert all_pairs(corpus) == {"train": PAIRS[:200], "validation": PAIRS[200:]}
    assert corpus.rule == "200 pairs train, 50 pairs validate (the given files)"
    only = open_pairs(train, tmp_path, valid=valid, split="validation")
    assert all_pairs(only) == {"validation": PAIRS[200:]} and only.hash == corpus.hash
    whole = open_pairs(train, tmp_path, split="test")
    assert all_pairs(whole) == {"test": PAIRS[:200]}
    assert whole.rule == "200 pairs test (the given files)"


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_files_are_put_into_the_direction_that_is_asked_for(tmp_path, ending):
    given = two_files(tmp_path, PAIRS, names=("train.en" + ending, "train.de" + ending))
    valid = two_files(tmp_path, PAIRS[:3], names=("valid.de", "valid.en"))
    there = open_pairs(given, tmp_path, languages="en-de")
    back = open_pairs(given, tmp_path, languages="de-en", valid=valid)
    assert next(there.pairs("train")) == PAIRS[0] and there.languages == ("en", "de")
    assert next(back.pairs("train")) == PAIRS[0][::-1] and back.languages == ("de", "en")
    assert list(back.pairs("validation")) == PAIRS[:3]  # already in that order
    label = open_pairs(given, tmp_path, languages="fr-en")  # other names are only a label
    assert next(label.pairs("train")) == PAIRS[0] and label.hash == there.hash


def test_hash_follows_content_direction_and_division(tmp_path):
    first = open_pairs(two_files(tmp_path, PAIRS), tmp_path)
    (tmp_path / "other").mkdir()
    moved = open_pairs(two_files(tmp_path / "other", PAIRS), tmp_path)
    assert moved.hash == first.hash and len(bytes.fromhex(first.hash)) == 32
    valid = two_files(tmp_path, PAIRS[:1], names=("v.en", "v.de"))
    changed = two_files(tmp_path / "other", [*PAIRS[:-1], (PAIRS[-1][0], "anders")])
    data_ = f"{tmp_path}/train.en,{tmp_path}/train.de"
    others = [
        open_pairs(data_, tmp_path, languages="de-en"),
        open_pairs(data_, tmp_path, valid=valid),
        open_pairs(changed, tmp_path),
    ]
    assert len({first.hash, *(corpus.hash for corpus in others)}) == 4


def test_everything_is_read_once_and_remembered(tmp_path, monkeypatch):
    form = two_files(tmp_path, PAIRS)
    first = open_pairs(form, tmp_path / "cache")
    memo = next((tmp_path / "cache").glob("pairs-*.json"))
    calls = []
    real = data.parallel.read_pairs
    monkeypatch.setattr(data.parallel, "read_pairs", lambda p: calls.append(p) or real(p))
    assert open_pairs(form, tmp_path / "cache").rule == first.rule
    assert len(calls) == 1  # for the prompts
    for damage in ("", "[]", '{"train": 1}', '{"train": ["x", "y"]}'):
        memo.write_text(damage, encoding="utf-8")
        assert open_pairs(form, tmp_path / "cache").rule == first.rule


def test_token_file_alternates_source_and_target(tmp_path):
    corpus = open_pairs(two_files(tmp_path, PAIRS), tmp_path)
    text = [text for text, begins in corpus.pieces("train") if begins]
    assert text[:4] == [*PAIRS[0], *PAIRS[1]] and len(text) == 2 * 248
    tokenizer = Tokenizer.train(text, 300, special_tokens=(END_OF_TEXT,))
    ids = tokenize(corpus, "validation", tokenizer, tmp_path / "cache").ids[:].tolist()
    border = tokenizer.special_tokens[END_OF_TEXT]
    sides = [side for i in (99, 199) for side in PAIRS[i]]
    assert ids == [i for side in sides for i in (border, *tokenizer.encode(side))]


@pytest.mark.parametrize(
    "files,given,message",
    [
        (
            {"a.en": b"1\n2\n3\n", "a.de": b"1\n2"},
            "a.en,a.de",
            r"a.en has 3 lines and a.de has 2: line 3 of the latter is missing",
        ),
        (
            {"a.en": b"1\n", "a.de": b"1\n2\n3\n4"},
            "a.en,a.de",
            r"a.de has 4 lines and a.en has 1: line 2 of the latter is missing",
        ),
        ({"a.en": b"1\n"}, "a.en,a.de", r"--data a.en,a.de: a.de is no file here"),
        ({}, "a.tsv", r"--data a.tsv: a.tsv is no file here"),
        ({"a.en": b"1\n", "a.de": b""}, "a.en,a.de", r"a.de is empty"),
        ({"a.en": b"\n \n", "a.de": b"1\n2\n"}, "a.en,a.de", "no line of a.en, a.de has text on"),
        ({"a.tsv": b"1\t2\n"}, "a.tsv", "a has one pair, too few"),
        ({"a.tsv": b"1\t2\n3 4\n"}, "a.tsv", "a.tsv, line 2: 0 tabs instead of one.*: 3 4$"),
        ({"a.tsv": b"1\t2\n3\t4\t5\n"}, "a.tsv", "a.tsv, line 2: 2 tabs instead of one"),
        ({"a.tsv": b"1\t2\n\xff\t4\n"}, "a.tsv", r"a.tsv is not UTF-8 in line 2 \(byte 4\)"),
        ({"a.tsv": "1\t2\n".encode("utf-16")}, "a.tsv", "a.tsv is binary"),
        ({"a.tsv.gz": gzip.compress(b"1\t2\n" * 99)[:-9]}, "a.tsv.gz", "no intact gzip file"),
        ({"a.en": b"1\n"}, "a.en", "--data a.en is not a name .*nor two files, train.en,train.de"),
        ({}, "multi30", "--data multi30 is not a name .dates, multi30k, wmt14., nor two files"),
        ({"a.tsv": b"1\t2", "b.tsv": b"1\t2"}, "a.tsv,b.tsv", "is not a name .*or one .tsv"),
        ({}, "", "is not a name"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(tmp_path, monkeypatch, files, given, message):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_pairs(given, Path("cache"))
    assert "\n" not in str(error.value)


NAMED = [("a cat", "eine Katze"), ("one, two", 'eins "zwei"'), ("", "leer")]


def table_of(name: str, names: tuple[str, str], inside: str = "") -> str:
    file = io.StringIO()
    if name.endswith(".csv"):
        csv.writer(file).writerows([("id", *names), *(("7", *pair) for pair in NAMED)])
    for pair in NAMED if name.endswith(".jsonl") else ():
        row = dict(zip(names, pair, strict=True))
        file.write(json.dumps({inside: row} if inside else row) + "\n")
    Path(name).write_text(file.getvalue(), encoding="utf-8")
    return name


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_pairs_in_named_columns(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    turned = [pair[::-1] for pair in NAMED[:2]]
    for names, languages, want in (
        (("source", "target"), "", NAMED[:2]),
        (("target", "source"), "en-de", turned),
        (("tgt", "src"), "", turned),
        (("en", "de"), "en-de", NAMED[:2]),
        (("en", "de"), "de-en", turned),
    ):
        table = table_of(name, names)
        corpus = open_pairs(table, Path("cache"), valid=table, languages=languages)
        assert list(corpus.pairs("train")) == want, (names, languages)
        assert "2 pairs with an empty side left out" in corpus.rule
    hashes = {open_pairs(name, Path("cache"), languages=x).hash for x in ("en-de", "de-en")}
    assert len(hashes) == 2  # one file, two directions


def test_the_names_of_languages_are_no_pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("en,de\na,b\nc,d\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.csv, line 1: .* with --languages en-de: en,de"):
        open_pairs("a.csv", Path("cache"))
    table_of("a.jsonl", ("en", "de"))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: .* the source first, with --lang.*en"):
        open_pairs("a.jsonl", Path("cache"))
    Path("b.csv").write_text("a cat,eine Katze\nx y,z\n", encoding="utf-8")
    corpus = open_pairs("b.csv", Path("cache"), split="test")
    assert list(corpus.pairs("test")) == [("a cat", "eine Katze"), ("x y", "z")]
    table = table_of("c.jsonl", ("en", "de"), "translation")  # as Hugging Face writes them
    corpus = open_pairs(table, Path("cache"), split="test", languages="de-en")
    assert list(corpus.pairs("test")) == [pair[::-1] for pair in NAMED[:2]]


def test_a_path_may_have_commas_and_a_tilde(tmp_path, monkeypatch):
    """Such paths were refused as no two files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    for folder in ("My, data", "home"):
        Path(folder).mkdir()
        for name, text in (("a,b.en", "1\n2\n"), ("a,b.de", "x\ny\n"), ("p,q.tsv", "1\tx\n2\ty\n")):
            Path(folder, name).write_text(text, encoding="utf-8")
    for given in (
        "My, data/a,b.en,My, data/a,b.de",
        "My, data/a,b.en, My, data/a,b.de",
        "My, data/p,q.tsv",
        "~/a,b.en,~/a,b.de",
    ):
        corpus = open_pairs(given, Path("cache"), valid=given)
        assert list(corpus.pairs("train")) == [("1", "x"), ("2", "y")], given
    with pytest.raises(ValueError, match=r": My, data/no\.de is no file here"):
        open_pairs("My, data/a,b.en,My, data/no.de", Path("cache"))
    with pytest.raises(ValueError, match=r"is not a name .*nor two files"):
        open_pairs("no,such,files", Path("cache"))


def test_bad_bytes_far_inside_a_file_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data.text, "BLOCK", 1000)
    (tmp_path / "a.tsv").write_bytes(b"x\ty\n" * 10_000 + b"z\t\xe4\n" + b"x\ty\n" * 10_000)
    with pytest.raises(ValueError, match=r"not UTF-8 in line 10,001 \(byte 40,002\)"):
        open_pairs(str(tmp_path / "a.tsv"), tmp_path)


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("multi30k", {"languages": "en-es"}, "no language es: choose from en, de, fr, cs"),
        ("wmt14", {"languages": "fr-en"}, "wmt14 has no language fr: choose from en, de"),
        ("multi30k", {"languages": "en-en"}, "en-en names one language twice"),
        ("multi30k", {"languages": "ende"}, "ende is not of the form en-de"),
        ("multi30k", {"languages": "en-"}, "en- is not of the form en-de"),
        ("multi30k", {"valid": "a.tsv"}, "--valid a.tsv is for files of your own"),
        ("multi30k", {"split": "dev"}, "no split dev: choose one of train, validation, test"),
        ("dates", {"languages": "en-de"}, "dates knows no languages"),
    ],
)
def test_bad_options_are_refused_before_any_download(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        open_pairs(name, tmp_path, **options)


# ---- named sets ----------------------------------------------------------------------------------


def test_multi30k_is_the_files_that_are_known():
    for part in ("train", "val", "test"):
        for language in ("en", "de"):
            file = f"{part}.{language}.gz".replace("test", "test_2016_flickr")
            raw = shared(f"multi30k/{file}").read_bytes()
            remote = MULTI30K[f"{part}.{language}"]
            assert remote.size == len(raw) and remote.urls[0].endswith("/raw/" + file)
            assert remote.sha256 == hashlib.sha256(raw).hexdigest()


def test_multi30k_by_name(tmp_path):
    for name, remote in MULTI30K.items():
        if remote.sha256:
            file = shared(f"multi30k/{name.replace('test', 'test_2016_flickr')}.gz")
            (tmp_path / remote.name).write_bytes(file.read_bytes())
    corpus = open_pairs("multi30k", tmp_path)
    assert (
        corpus.rule == "29,000 pairs train, 1,014 pairs validate, 1,000 pairs test (as published)"
    )
    assert corpus.languages == ("en", "de") and corpus.name == "multi30k"
    source, target = next(corpus.pairs("train"))
    assert source == "Two young, White males are outside near many bushes."
    assert target.startswith("Zwei junge weiße Männer")
    assert corpus.prompts[0] == "A group of men are loading cotton onto a truck"
    assert [len(list(corpus.pairs(s))) for s in corpus.splits] == [29_000, 1_014, 1_000]
    back = open_pairs("multi30k", tmp_path, languages="de-en", split="test")
    assert back.hash != corpus.hash and list(back.splits) == ["test"]
    assert [p[::-1] for p in back.pairs("test")] == list(corpus.pairs("test"))
    assert back.rule == "1,000 pairs test (as published)"


def test_a_file_known_by_md5_alone_is_checked_too(tmp_path, server, monkeypatch):
    folder, address = server
    good = gzip.compress(b"une phrase\n")
    (folder / "train.fr.gz").write_bytes(good)
    md5 = hashlib.md5(good, usedforsecurity=False).hexdigest()
    remote = Remote("f.gz", (f"{address}/train.fr.gz",), 0, "", md5=md5)
    assert fetch(remote, tmp_path / "cache").read_bytes() == good
    (folder / "train.fr.gz").unlink()
    assert fetch(remote, tmp_path / "cache").read_bytes() == good  # from the cache, checked again
    (tmp_path / "cache" / "f.gz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"cannot download f\.gz"):
        fetch(remote, tmp_path / "cache")
    (folder / "train.fr.gz").write_bytes(gzip.compress(b"evil\n"))
    with pytest.raises(ValueError, match=r"MD5 .* instead of"):
        fetch(remote, tmp_path / "cache")
    monkeypatch.setattr(data.download, "UNKNOWN_SIZE", 5)
    with pytest.raises(ValueError, match="more than the expected 5 bytes"):
        fetch(remote, tmp_path / "cache")
    with pytest.raises(ValueError, match="cannot download"):  # with no sum at all: never trusted
        fetch(Remote("f.gz", remote.urls, 0, ""), tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()  # what lay there is nobody's to delete
    assert kept.read_bytes() == b"damaged"


def archive(folder: Path, address: str, name: str, members: dict[str, str]) -> Remote:
    with tarfile.open(folder / name, "w:gz") as tar:
        for member, text in members.items():
            entry = tarfile.TarInfo(member)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    raw = (folder / name).read_bytes()
    return Remote(name, (f"{address}/{name}",), len(raw), hashlib.sha256(raw).hexdigest())


@pytest.fixture
def small_wmt14(server, monkeypatch):
    """The archives of WMT 2014 at toy size, with other members before, between and behind."""
    folder, address = server
    segments = (
        '<refset><doc>\n<seg id="1"> {} &amp; Co. </seg>\n<p>\n<seg id="2">{}</seg>\n</doc>\n'
    )
    one = archive(
        folder,
        address,
        "one.tgz",
        {
            "../../climbing.txt": "no",
            "x/a.de-en.de": "eins\nzwei\n",
            "a.de-en.de": "falsch\n",
            "x/a.de-en.en": "one\ntwo\n",
            "/absolute": "no",
        },
    )
    two = archive(folder, address, "two.tgz", {"./b.en": "three\n\n", "./b.de": "drei\nvier\n"})
    dev = archive(
        folder,
        address,
        "dev.tgz",
        {
            "dev/v.de": "fünf\n",
            "dev/v.en": "five\n",
            "dev/t-src.de.sgm": segments.format("Müller", "Zwei"),
            "dev/t-ref.en.sgm": segments.format("Miller", "Two"),
        },
    )
    table = {
        "train": ((one, "x/a.de-en.de", "x/a.de-en.en"), (two, "b.de", "b.en")),
        "validation": ((dev, "dev/v.de", "dev/v.en"),),
        "test": ((dev, "dev/t-src.de.sgm", "dev/t-ref.en.sgm"),),
    }
    monkeypatch.setattr(data.wmt, "WMT14", table)
    return folder


def test_wmt14_is_unpacked_once_into_aligned_lines(tmp_path, small_wmt14):
    cache = tmp_path / "cache"
    corpus = open_pairs("wmt14", cache)
    assert all_pairs(corpus) == {
        "train": [("one", "eins"), ("three", "drei"), ("two", "zwei")],  # the files take turns
        "validation": [("five", "fünf")],
        "test": [("Miller & Co.", "Müller & Co."), ("Two", "Zwei")],
    }
    assert corpus.rule == (
        "3 pairs train, 1 pair validate, 2 pairs test (as published); "
        "1 pair with an empty side left out"
    )
    assert {p.name for p in cache.glob("*.gz")} == {
        *("wmt14-a.de-en.de.gz", "wmt14-a.de-en.en.gz", "wmt14-b.de.gz", "wmt14-b.en.gz"),
        *("wmt14-v.de.gz", "wmt14-v.en.gz", "wmt14-t-src.de.gz", "wmt14-t-ref.en.gz"),
    }
    assert {p.name for p in tmp_path.iterdir()} == {"cache", "served"}  # nothing climbed out
    assert not list(cache.glob("*.part"))
    for path in (*small_wmt14.glob("*.tgz"), *cache.glob("*.tgz")):
        path.unlink()  # the archives are not needed any more
    back = open_pairs("wmt14", cache, languages="de-en")
    assert list(back.pairs("validation")) == [("fünf", "five")]
    assert back.languages == ("de", "en") and back.hash != corpus.hash


def test_wmt14_test_alone_needs_its_own_archive_only(tmp_path, small_wmt14):
    corpus = open_pairs("wmt14", tmp_path / "cache", split="test")
    assert len(list(corpus.pairs("test"))) == 2
    assert [p.name for p in (tmp_path / "cache").glob("*.tgz")] == ["dev.tgz"]


@pytest.mark.parametrize(
    "damage,message", [("cut", "no intact .tgz"), ("member", "has no c.de in")]
)
def test_a_broken_archive_leaves_no_half_file(tmp_path, damage, message):
    text = "".join(hashlib.sha256(str(i).encode()).hexdigest() + "\n" for i in range(5000))
    archive(tmp_path, "", "a.tgz", {"a.de": text, "a.en": text})
    raw = (tmp_path / "a.tgz").read_bytes()
    if damage == "cut":
        (tmp_path / "a.tgz").write_bytes(raw[: len(raw) // 4])
    wanted = {("a.de" if damage == "cut" else "c.de"): tmp_path / "out.gz"}
    with pytest.raises(ValueError, match=message):
        data.wmt.unpack(tmp_path / "a.tgz", wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tgz"]
