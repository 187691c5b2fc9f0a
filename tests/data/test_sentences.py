"""data/sentences.py: documents made of sentences are found, split, streamed, named by a hash."""

import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import pytest

import data.layouts
import data.lines
import data.sentences
import data.text
from data.download import Remote
from data.sentences import open_sentences

WORDS = ["red", "orange", "yellow", "green", "blue", "indigo", "violet"]


def documents(corpus, split: str) -> list[list[str]]:
    found = []
    for text, border in corpus.pieces(split):
        assert border and (text == "" or (text[0] == " " and text[1] != " "))
        if not text:
            found.append([])
        else:
            found[-1].append(text[1:])
    return found


def numbered(number: int, each: int = 3) -> list[list[str]]:
    return [[f"Document {i} says the word {WORDS[j]}." for j in range(each)] for i in range(number)]


def in_lines(documents: list[list[str]]) -> str:
    return "\n\n".join("\n".join(document) for document in documents) + "\n"


def opened(folder: Path, text: str, name: str = "a.txt", **options):
    raw = text.encode()
    path = folder / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return open_sentences(str(path), folder / "cache", **options)


def everything(corpus) -> list[list[str]]:
    return documents(corpus, "train") + documents(corpus, "validation")


WRAPPED = """\
The rain had only ceased with the gray streaks of
morning at Blazing Star, and the settlement awoke to
a moral sense of cleanliness. Indeed, it was recorded
that Mr. Cassius had risen early.

This was nearly opposite. He
stopped suddenly.


CHAPTER II

Something glittered   in the road.
\fIt was gold. He took it.
"""
WIKITEXT = """\

 = Homarus gammarus =

 Homarus gammarus is a lobster . It is blue .

 = = Life cycle = =

 Females hatch eggs .
 = = = Eggs = = =
 They float .
 = Second title : x = y =
 More text .
"""


# ---- files, folders, streaming -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl", "a.jsonl.gz", "A.TXT"])
def test_forms_of_a_file_give_the_same_documents(tmp_path, name):
    want = numbered(25)
    plain = opened(tmp_path, in_lines(want))
    text = in_lines(want)
    if "jsonl" in name:
        text = "".join(json.dumps({"text": "\n\n".join(d), "id": 1}) + "\n" for d in want)
    corpus = opened(tmp_path, text, name)
    for split in ("train", "validation"):
        assert documents(corpus, split) == documents(plain, split)
    assert corpus.name.lower() == "a"


def test_a_document_of_jsonl_is_one_whatever_is_in_it(tmp_path):
    texts = [WRAPPED, "", "  \n", "Second one. It is short."]
    corpus = opened(tmp_path, "\n".join(json.dumps({"text": t}) for t in texts), "a.jsonl")
    assert [len(document) for document in everything(corpus)] == [8, 2]


def test_a_folder_is_its_files_in_order(tmp_path):
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text(in_lines(numbered(2)), encoding="utf-8")
    (folder / "b" / "c.md").write_text(WRAPPED, encoding="utf-8")
    (folder / "b.jsonl").write_text('{"text": "First. Last."}\n', encoding="utf-8")
    (folder / "z.txt.gz").write_bytes(gzip.compress(WIKITEXT.encode()))
    (folder / "code.py").write_text("pass\n", encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\0")
    corpus = open_sentences(str(folder), tmp_path)
    found = everything(corpus)
    assert [document[-1] for document in found] == [
        *("Document 0 says the word yellow.", "Document 1 says the word yellow.", "Last."),
        *("He stopped suddenly.", "Something glittered in the road.", "He took it."),
        *("They float .", "More text ."),
    ]
    assert documents(corpus, "validation") == found[-2:]
    assert corpus.name == "folder" and corpus.rule == (
        "a sentence a line, a blank line between documents or prose, two blank lines between "
        "documents or a title before each document; the last two of 8 documents validate"
    )


def test_a_large_text_is_opened_by_its_first_twenty_documents(tmp_path, monkeypatch):
    text = in_lines(numbered(10_000))
    monkeypatch.setattr(data.text, "BLOCK", 1000)
    monkeypatch.setattr(data.layouts, "HEAD", 1000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    read = 0
    real = data.text.blocks

    def counted(part):
        nonlocal read
        for block in real(part):
            read += len(block)
            yield block

    monkeypatch.setattr(data.text, "blocks", counted)
    monkeypatch.setattr(data.lines, "blocks", counted)
    corpus = open_sentences(str(tmp_path / "a.txt"), tmp_path)
    assert 0 < read < 10_000 < len(text)
    assert len(documents(corpus, "validation")) == 1000


# ---- pieces --------------------------------------------------------------------------------------


def test_whole_documents_have_one_border_each(tmp_path, monkeypatch):
    want = numbered(25, each=7)
    apart = opened(tmp_path, in_lines(want))
    whole = opened(tmp_path, in_lines(want), by_sentence=False)
    for split in ("train", "validation"):
        texts = [("".join(f" {s}" for s in document), True) for document in documents(apart, split)]
        assert list(whole.pieces(split)) == texts
    monkeypatch.setattr(data.sentences, "BLOCK", 50)
    pieces = list(whole.pieces("train"))
    assert max(len(text) for text, _ in pieces) < 100 and len(pieces) > 50
    assert sum(border for _, border in pieces) == 23
    assert "".join(f"|{text}" if border else text for text, border in pieces) == "".join(
        f"|{''.join(f' {s}' for s in document)}" for document in documents(apart, "train")
    )


# ---- split ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number,validates,rule",
    [
        (2, [1], "the last one of 2 documents validates"),
        (3, [2], "the last one of 3 documents validates"),
        (4, [2, 3], "the last two of 4 documents validate"),
        (10, [8, 9], "the last two of 10 documents validate"),
        (19, [17, 18], "the last two of 19 documents validate"),
        (20, [9, 19], "every tenth document validates"),
        (25, [9, 19], "every tenth document validates"),
    ],
)
def test_whole_documents_validate(tmp_path, number, validates, rule):
    want = numbered(number)
    corpus = opened(tmp_path, in_lines(want))
    assert documents(corpus, "validation") == [want[i] for i in validates]
    assert documents(corpus, "train") == [d for i, d in enumerate(want) if i not in validates]
    assert corpus.rule.endswith("; " + rule)


@pytest.mark.parametrize("number,held", [(2, 1), (7, 1), (19, 1), (20, 2), (35, 3)])
def test_of_a_single_document_its_last_tenth_validates(tmp_path, number, held):
    sentences = [f"Number {i}." for i in range(number)]
    for by_sentence in (True, False):
        corpus = opened(tmp_path, "\n".join(sentences), by_sentence=by_sentence)
        text = {split: "".join(t for t, _ in corpus.pieces(split)) for split in corpus.splits}
        assert text["train"] == "".join(f" {s}" for s in sentences[:-held])
        assert text["validation"] == "".join(f" {s}" for s in sentences[-held:])
        assert all(next(corpus.pieces(split))[1] for split in corpus.splits)
    assert f"{held} of {number} sentences, the last of the one document" in corpus.rule


def test_paragraphs_of_a_single_document_of_prose_make_pairs(tmp_path):
    """A text with only single blank lines would be one document, too few for pairs of sentences."""
    blocks = [f"Here begins part {i},\nwrapped. {i} goes on there. It ends." for i in range(30)]
    one = "\n\n".join(blocks)
    parts = [
        [f"Here begins part {i}, wrapped.", f"{i} goes on there.", "It ends."] for i in range(30)
    ]
    corpus = opened(tmp_path, one)
    assert documents(corpus, "validation") == parts[9::10] and "every paragraph" in corpus.rule
    assert len(documents(corpus, "train")) == 27
    second = opened(tmp_path, one, valid=str(tmp_path / "a.txt"))
    assert documents(second, "train") == documents(second, "validation") == parts
    # Running text stays whole; so does what has a border of documents, or a layout that was given.
    whole = opened(tmp_path, one, by_sentence=False)
    assert sum(border for _, border in whole.pieces("train")) == 1
    assert len(everything(opened(tmp_path, one, layout="prose"))) == 2  # divided to validate
    assert len(everything(opened(tmp_path, f"{one}\n\n\n{one}"))) == 2
    (tmp_path / "b.txt").write_text("More. Text.", encoding="utf-8")
    folder = open_sentences(str(tmp_path), tmp_path / "cache")
    assert "every paragraph" not in folder.rule


def test_given_validation_text_is_all_that_validates(tmp_path):
    (tmp_path / "v.txt").write_text(WRAPPED, encoding="utf-8")
    want = numbered(25)
    corpus = opened(tmp_path, in_lines(want), valid=str(tmp_path / "v.txt"))
    assert documents(corpus, "train") == want
    assert [len(document) for document in documents(corpus, "validation")] == [4, 2, 2]
    assert corpus.rule.endswith("; the given files validate")
    same = opened(tmp_path, in_lines(want), valid=str(tmp_path / "a.txt"))
    assert documents(same, "train") == documents(same, "validation") == want


# ---- hash and prompts ----------------------------------------------------------------------------


def test_hash_follows_content_layout_and_division_alone(tmp_path):
    text = in_lines(numbered(5))
    first = opened(tmp_path, text)
    assert len(bytes.fromhex(first.hash)) == 32
    (tmp_path / "other").mkdir()
    for same in (
        opened(tmp_path, text),
        opened(tmp_path / "other", text, "b.md"),
        opened(tmp_path, text, layout="lines"),
    ):
        assert same.hash == first.hash
    others = [
        opened(tmp_path, text, layout="prose"),
        opened(tmp_path, text, by_sentence=False),
        opened(tmp_path, text, valid=str(tmp_path / "a.txt")),
        opened(tmp_path, text, valid=str(tmp_path / "a.txt"), by_sentence=False),
        opened(tmp_path, text.replace("Document 4", "Document 5")),
        opened(tmp_path, text.replace("\n\n", "\n", 1)),
    ]
    assert len({first.hash, *(corpus.hash for corpus in others)}) == 7


@pytest.mark.parametrize(
    "text", [in_lines(numbered(25)), "Yes. No.", "今天下雨。我在家！", "1 2. 3 4"]
)
def test_prompts_have_one_mask_each(tmp_path, text):
    prompts = opened(tmp_path, text).prompts
    assert prompts and all(prompt.count("[MASK]") == 1 for prompt in prompts)
    assert opened(tmp_path, text).prompts == prompts


def test_prompts_hide_a_word_of_the_validation_text(tmp_path):
    text = in_lines([["The cat sat on the mat.", "Too short."], ["The dog [MASK] in the sun.",
                     "The dog lay in the sun."]])  # fmt: skip
    assert opened(tmp_path, text).prompts == ["The dog lay [MASK] the sun."]


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,content,options,message",
    [
        ("missing.txt", None, {}, "is no file or folder here, nor one of pydocs, wikitext, wiki"),
        ("a.txt", b"One. Two.", {"valid": "no.txt"}, "--valid no.txt is no file or folder here$"),
        ("empty.txt", b"", {}, "is empty"),
        ("blank.txt", b" \n\n", {}, "has no sentence in it: give a text with words"),
        ("head.txt", b" = Title = \n = = Section = = \n", {}, "has no sentence in it"),
        ("a.txt", b"One. Two.", {"valid": "blank.txt"}, "blank.txt has no sentence in it"),
        ("one.txt", b"Just one sentence.\n", {}, "has one sentence, too few to hold one out"),
        ("binary.txt", b"abc\0def", {}, "is binary"),
        ("a.json", b'[{"text": "a"}]', {}, r"a\.json is a JSON array, no text"),
        (
            "a.csv",
            b"text,label\na,b\n",
            {},
            r"a\.csv is a table, no text: write its texts",
        ),
        ("mac.txt", b"One.\rTwo.\r", {}, r"mac\.txt has old Mac line ends"),
        ("latin.txt", "Gr\xfc\xdfe".encode("latin-1"), {}, "is not UTF-8 near byte 2"),
        ("a.txt.gz", b"no gzip", {}, "no intact gzip file"),
        ("a.jsonl", b'{"text": "One. Two."}\n{"words": 1}\n', {}, "line 2: not a JSON object"),
        ("a.txt", b"One. Two.", {"layout": "verse"}, "no layout verse: choose one of lines, prose"),
        ("", None, {}, "--data is empty: name a file"),
        ("pydocs", None, {"valid": "a.txt"}, "--valid a.txt is for files of your own: pydocs has"),
        ("wikitext", None, {"layout": "lines"}, "--layout lines is for files of your own"),
    ],
)
def test_bad_text_is_refused_in_one_sentence(
    tmp_path, monkeypatch, name, content, options, message
):
    monkeypatch.chdir(tmp_path)
    Path("blank.txt").write_text("\n\n", encoding="utf-8")
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        everything(open_sentences(name, Path("cache"), **options))
    assert "\n" not in str(error.value)


def test_empty_folder_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("pass", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds no text: a file must end in \.txt, \.md, \.rst, "):
        open_sentences(str(tmp_path), tmp_path)


def test_bad_bytes_far_inside_a_file_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"Good words.\n\n" * 200_000 + b"\xff\n")
    corpus = open_sentences(str(tmp_path / "a.txt"), tmp_path)
    with pytest.raises(ValueError, match=r"not UTF-8 in line 400,001 \(byte 2,600,000\)"):
        everything(corpus)


# ---- WikiText ------------------------------------------------------------------------------------


def zipped(path: Path, members: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path.read_bytes()


@pytest.fixture
def small_wikitext(server, monkeypatch):
    """WikiText-2's archive at toy size, with members that want to be written elsewhere."""
    folder, address = server
    raw = zipped(
        folder / "w.zip",
        {
            "../../climbing.txt": b"no",
            "wikitext-2-raw/": b"",
            "wikitext-2-raw/wiki.test.raw": b"not needed",
            "wikitext-2-raw/wiki.train.raw": WIKITEXT.encode() * 20,
            "wikitext-2-raw/wiki.valid.raw": WIKITEXT.replace("lobster", "crab").encode(),
        },
    )
    remote = Remote("w.zip", (f"{address}/w.zip",), len(raw), hashlib.sha256(raw).hexdigest())
    row = (remote, "wikitext-2-raw", 1 << 20)
    monkeypatch.setitem(data.sentences.WIKITEXT, "wikitext", row)
    return folder


def test_wikitext_is_downloaded_and_unpacked_once(tmp_path, small_wikitext):
    cache = tmp_path / "cache"
    corpus = open_sentences("wikitext", cache)
    train, validation = documents(corpus, "train"), documents(corpus, "validation")
    assert len(train) == 40 and train[0][0] == "Homarus gammarus is a lobster ."
    assert len(validation) == 2 and validation[0][0] == "Homarus gammarus is a crab ."
    assert corpus.name == "wikitext" and corpus.rule.endswith("; split as published")
    assert all(prompt.count("[MASK]") == 1 for prompt in corpus.prompts)
    texts = {"wikitext-2-raw-train.txt", "wikitext-2-raw-valid.txt"}
    assert {p.name for p in cache.iterdir()} == {"w.zip", *texts}
    assert {p.name for p in tmp_path.iterdir()} == {"cache", "served"}  # nothing climbed out
    for path in (cache / "w.zip", small_wikitext / "w.zip"):
        path.unlink()  # the archive is not needed any more
    second = open_sentences("wikitext", cache, by_sentence=False)
    assert second.hash != corpus.hash and len(list(second.pieces("train"))) == 40


def test_wikitext_with_a_wrong_checksum_is_refused(tmp_path, small_wikitext):
    raw = bytearray((small_wikitext / "w.zip").read_bytes())
    raw[100] ^= 1
    (small_wikitext / "w.zip").write_bytes(raw)
    with pytest.raises(ValueError, match=r"cannot download w\.zip .*SHA-256"):
        open_sentences("wikitext", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


NOISE = b"".join(hashlib.sha256(bytes([i % 256, i // 256])).digest() for i in range(5000))


@pytest.mark.parametrize(
    "damage,message",
    [
        ("none", ""),
        ("cut", "is no intact .zip"),
        ("byte", "is no intact .zip"),
        ("missing", r"has no x/b in it: delete it$"),
        ("large", r"x/a in .*w\.zip has 160,000 bytes, more than 150,000: delete it$"),
        ("nonsense", "is no intact .zip"),
    ],
)
def test_a_broken_zip_leaves_no_half_file(tmp_path, damage, message):
    path = tmp_path / "w.zip"
    raw = bytearray(zipped(path, {"x/a": NOISE}))
    if damage == "cut":
        raw = raw[:-100]
    elif damage == "byte":
        raw[len(raw) // 2] ^= 255
    elif damage == "nonsense":
        raw = bytearray(NOISE)
    path.write_bytes(raw)
    wanted = {"x/b" if damage == "missing" else "x/a": tmp_path / "out.txt"}
    most = 150_000 if damage == "large" else 160_000
    if damage == "none":
        data.sentences.unzip(path, wanted, most)
        assert (tmp_path / "out.txt").read_bytes() == NOISE
        return
    with pytest.raises(ValueError, match=message) as error:
        data.sentences.unzip(path, wanted, most)
    assert "\n" not in str(error.value) and [p.name for p in tmp_path.iterdir()] == ["w.zip"]


def test_hidden_files_and_copies_are_told(tmp_path):
    text = "One sentence. Another one.\n\n\nA third. A fourth."
    for name in ("a.txt", "b.txt", ".hidden.txt"):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / name).write_text(text, encoding="utf-8")
    (tmp_path / "v.txt").write_text(text, encoding="utf-8")
    a, b, v, x = (str(tmp_path / name) for name in ("x/a.txt", "x/b.txt", "v.txt", "x"))
    hidden, remove = "; 1 hidden file left out", ": remove one, or what trains also validates"
    assert open_sentences(x, tmp_path).rule.endswith(f"{hidden}; {b} is a copy of {a}{remove}")
    told = open_sentences(x, tmp_path, valid=v).rule
    assert told.endswith(f"; the given files validate{hidden}; {v} is a copy of {a}{remove}")
    assert open_sentences(x, tmp_path, valid=a).rule.endswith(f"; {a} is given twice{remove}")
    assert open_sentences(x, tmp_path, valid=x).rule.endswith(f"validate{hidden}")  # scored whole
