"""data/conll.py: files as one finds them, what is refused in them, and tags beside a table of
their rules."""

import gzip
import re
from itertools import cycle
from pathlib import Path

import pytest
from conftest import shared
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import data.text
from data.conll import (
    SCHEMES,
    entities,
    open_tagged,
    read_conll,
    scheme_of,
    split_tag,
    to_iob2,
    write_tags,
)

SENTENCES = [
    (["Ada", "met", "Grace", "Hopper", "."], ["B-P", "O", "B-P", "I-P", "O"]),
    (["Rome"], ["B-L"]),
    (["New", "York", "Rome", "#", "😀"], ["B-L", "I-L", "B-L", "O", "O"]),
]


def text_of(sentences, between="\t", end="\n", blank="", more=()) -> str:
    rows = [
        [between.join([word, *more, tag]) for word, tag in zip(words, tags, strict=True)]
        for words, tags in sentences
    ]
    return f"{end}{blank}{end}".join(end.join(row) for row in rows) + end


def write(path: Path, text: str) -> Path:
    raw = text.encode("utf-8")
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return path


def read(path: Path, text: str) -> list[tuple[list[str], list[str]]]:
    return [(words, tags) for words, tags, _ in read_conll(write(path, text))[0]]


# ---- the forms of a file -------------------------------------------------------------------------


def test_the_forms_of_one_text_give_the_same_sentences(tmp_path, monkeypatch):
    monkeypatch.setattr(data.text, "BLOCK", 32)  # so that blocks end inside lines and characters
    plain = text_of(SENTENCES)
    forms = {
        "plain": plain,
        "no-newline": plain.removesuffix("\n"),
        "windows": text_of(SENTENCES, end="\r\n"),
        "bom": f"\ufeff{plain}",
        "packed.gz": plain,
        "blanks": f"\n\n{plain}\n \n\t\n",
        "wnut": text_of(SENTENCES, blank="\t"),
        "spaces": text_of(SENTENCES, between=" "),
        "many-spaces": text_of(SENTENCES, between="   ").replace("Ada", " Ada"),
        "trailing": text_of(SENTENCES, between=" ").replace("\n", " \n"),
        "conll2003": text_of(SENTENCES, between=" ", more=("NNP", "B-NP")),
        "columns": text_of(SENTENCES, more=("", "B-NP")),
        "padded-tag": text_of(SENTENCES).replace("O\n", "O \n"),
        "documents": f"-DOCSTART- -X- O\n\n{plain}-DOCSTART-\tO\n",
        "comments": f"# id 1\td=x\n{plain}".replace("\n\nRome", "\n\n# a\n# b\nRome"),
        "spaced-comments": "# id 1\td=x\n\n# a b\n" + text_of(SENTENCES, between=" "),
    }  # fmt: skip
    for name, text in forms.items():
        assert read(tmp_path / name, text) == SENTENCES, name


def test_a_document_ends_a_sentence_also_without_a_blank_line(tmp_path):
    found = read(tmp_path / "a", "-DOCSTART- O\na O\n-DOCSTART- O\nb O\n")
    assert found == [(["a"], ["O"]), (["b"], ["O"])]


def test_a_hash_is_a_word_where_it_has_a_tag(tmp_path):
    """Tweets have # as a word. Taken for a comment, it once shifted all words after it."""
    text = "# no row\n# O\n# B-x\na O\n\n# id = 5\n# O\n"
    assert read(tmp_path / "a", text) == [(["#", "#", "a"], ["O", "B-x", "O"]), (["#"], ["O"])]
    assert read(tmp_path / "b", "a\tO\n#\tO\n# b\tO\n") == [(["a", "#", "# b"], ["O"] * 3)]
    with pytest.raises(ValueError, match="line 2: 3 columns, but the first row has 2: '# no row'"):
        read(tmp_path / "c", "a O\n# no row\n")


def test_lines_are_those_of_the_file(tmp_path):
    text = "\n# one\n-DOCSTART- O\n\na O\nb O\n\n\n# two\nc O\n-DOCSTART- O\nd O"
    assert [s.line for s in read_conll(write(tmp_path / "a", text))[0]] == [5, 10, 12]


def test_odd_white_space_is_part_of_a_word(tmp_path):
    """str.split() cut a word at U+00A0, and its tag was read from the wrong column."""
    odd = [
        "a\u00a0b",
        "\u00a0",
        "\ufe0f",
        "\u200b",
        "c\u2028d",
        "\x85",
        "e\rf",
        "\x1c",
        "\x07",
        "𝒳\ufeff",
    ]
    row = [(["x", *odd], ["O"] * 11)]
    assert read(tmp_path / "tabs", text_of(row)) == row
    assert read(tmp_path / "spaces", text_of(row, between=" ")) == row
    spaced = [(["x", "a b", " ", "c  ", "-", "\\t"], ["O", "B-a b", "I-a b", "O", "O", "O"])]
    assert read(tmp_path / "tabs", text_of(spaced)) == spaced


word = st.text(st.characters(exclude_characters="\n\t\0 ", exclude_categories=("Cs",)), min_size=1)
word = word.filter(lambda w: not w.startswith("-DOCSTART-"))
sentence = st.lists(st.tuples(word, st.sampled_from(["O", "B-x", "I-x", "S-é z"])), min_size=1)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(sentence, max_size=4), st.booleans())
def test_what_is_written_is_read(tmp_path, sentences, tabs):
    rows = [[("x", "O")], *sentences]  # the first word may not begin with a BOM
    if not tabs:
        rows = [[(w, tag.split()[0]) for w, tag in row] for row in rows]
    want = [tuple(map(list, zip(*row, strict=True))) for row in rows]
    assert read(tmp_path / "a", text_of(want, "\t" if tabs else " ")) == want


# ---- which columns ------------------------------------------------------------------------------


def numbered_rows(sentences, count, behind=()) -> str:
    """A file with what count(sentence, word) says in front, and more columns behind the word."""
    blocks = []
    for i, (words, tags) in enumerate(sentences):
        rows = zip(words, tags, strict=True)
        blocks.append([[count(i, k), w, *behind, t] for k, (w, t) in enumerate(rows, 1)])
    return "\n\n".join("\n".join("\t".join(row) for row in rows) for rows in blocks) + "\n"


@pytest.mark.parametrize(
    "count",
    [
        lambda i, k: str(k),
        lambda i, k: str(k - 1),
        lambda i, k: str(10 * i + k),
        lambda i, k: str(i),
        lambda i, k: f"t{k}",
        lambda i, k: f"{i}-{k}",
        lambda i, k: f"Sentence: {i}",
        lambda i, k: f"train.conll_{i}",
        lambda i, k: f"{i}\t{k}",
    ],
)
def test_a_column_that_only_counts_is_left_out(tmp_path, count):
    """The numbers were learnt as words, and entities such as [1]PER came out."""
    path = write(tmp_path / "a", numbered_rows(SENTENCES, count, ("NNP", "I-NP")))
    sentences, where = read_conll(path)
    assert [(words, tags) for words, tags, _ in sentences] == SENTENCES
    width = 5 + count(0, 1).count("\t")
    assert where == f"word in column {width - 3}, tag in column {width} of {width}"


def test_germeval_has_outer_entities_in_its_third_column(tmp_path):
    rows = ["1\tder\tO\tO", "2\tBerliner\tB-ORG\tB-LOC", "3\tBär\tI-ORG\tO", "4\t.\tO\tO"]
    path = write(tmp_path / "a", "\n".join(["#\thttp://de.wikipedia.org/x [2009-10-17]", *rows]))
    [(words, tags, line)], where = read_conll(path)
    assert (words, tags) == (["der", "Berliner", "Bär", "."], ["O", "B-ORG", "I-ORG", "O"])
    assert line == 2 and where == "word in column 2, tag in column 3 of 4"
    assert read_conll(path, (1, 3))[0][0].tags == ["O", "B-LOC", "O", "O"]
    path = write(tmp_path / "chunks", "1 Anna B-NP B-PER\n2 sleeps B-VP O\n")
    assert read_conll(path)[0][0].tags == ["B-PER", "O"]


def test_columns_are_those_that_are_asked_for(tmp_path):
    path = str(write(tmp_path / "a", "NNP Rome B-x 7\nNNP Oslo O 8\n\nV is O 9\n"))
    text = open_tagged(path, path, "2,3")
    assert text.splits["train"][0][:2] == (["Rome", "Oslo"], ["B-x", "O"])
    assert text.columns == dict.fromkeys(text.splits, "word in column 2, tag in column 3 of 4")
    with pytest.raises(ValueError, match=r"'7' is no tag.*column 3 has tags: --columns 1,3"):
        open_tagged(path)
    with pytest.raises(ValueError, match="has 4 columns, not the 5 of --columns"):
        open_tagged(path, "", "1,5")
    for columns in ("2", "2,2", "0,1", "a,b", "1,2,3", "-1,2"):
        with pytest.raises(ValueError, match=f"--columns {columns} are not two columns"):
            open_tagged(path, "", columns)


def test_numbers_alone_are_words_only_if_that_is_said(tmp_path):
    path = write(tmp_path / "a", "1 B-x\n2 O\n")
    with pytest.raises(ValueError, match="none of words: give one, or say with --columns 1,2"):
        read_conll(path)
    assert read_conll(path, (0, 1))[0][0].words == ["1", "2"]
    assert read(tmp_path / "b", "w1 B-x\nw2 O\n") == [(["w1", "w2"], ["B-x", "O"])]


def test_ontonotes_and_conllu_are_named(tmp_path):
    begin = "#begin document (bc/cctv/00/cctv_0000); part 000\n"
    row = "bc/cctv/00/cctv_0000   0   0   In   IN  (TOP(S(PP*   -   -   -   Speaker#1   *   -\n"
    with pytest.raises(ValueError, match=r"OntoNotes.*_gold_conll.*brackets"):
        read_conll(write(tmp_path / "a.v4_gold_conll", begin + row))
    row = "1\tThey\tthey\tPRON\tPRP\tCase=Nom\t2\tnsubj\t2:nsubj\t_\n"
    with pytest.raises(ValueError, match="is CoNLL-U, whose ten columns have no entities"):
        read_conll(write(tmp_path / "b", f"# sent_id = 1\n# text = They\n{row}"))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,message",
    [
        ("a\tO\nb\n", "line 2: one column, where a word and its tag are needed: 'b'"),
        ("a\tO\nb O\n", "line 2: one column, where a word and its tag are needed: 'b O'"),
        ("a O\n\n\nb c O\n", "line 4: 3 columns, but the first row has 2: 'b c O'"),
        ("a x O\nb O\n", "line 2: 2 columns, but the first row has 3: 'b O'"),
        ("a\tO\n\tO\n", r"line 2: no word before its tag: '\tO'"),
        ("a O\nb b-x\n", "line 2: 'b-x' is no tag: write O, or B-TYPE"),
        ("a O\nb B\n", "line 2: 'B' is no tag"),
        ("a\tO\nb\tO\t\n", "line 2: 3 columns"),
        ("a\tO\nb\t\n", "line 2: '' is no tag"),
        ("a O\n# \n", "line 2: one column"),
        ("a O\n # b c\n", "line 2: 3 columns"),
        ("a\tO\n\u00a0\nb\tO\n", "line 2: one column"),  # no blank line
        ("O\nO\n", "line 1: one column"),
        ("a\nb\n", "line 1: one column, where a word and its tag are needed: 'a'"),
        (f"a O\n{'b' * 99} c O", "line 2: 3 columns, but the first row has 2: '" + "b" * 60 + "'"),
        ("# only\n\n-DOCSTART- O\n", "has no sentence in it"),
    ],
)
def test_broken_lines_are_refused_by_number_and_content(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"name\.conll.*{re.escape(message)}") as caught:
        read(tmp_path / "name.conll", text)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path):
    good = str(write(tmp_path / "good", text_of(SENTENCES)))
    for flag, args in (("--data", ("no/such",)), ("--valid", (good, "no/such"))):
        with pytest.raises(ValueError, match=f"{flag} no/such is no file here: give a CoNLL file"):
            open_tagged(*args)
    with pytest.raises(ValueError, match="--data  is no file"):
        open_tagged("")
    for name, raw, message in (
        ("empty", b"", "is empty"),
        ("binary", b"a\tO\0", "is binary"),
        ("latin", b"a\tO\n\xe9\tO", "is not UTF-8"),
    ):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=f"{name} {message}"):
            open_tagged(str(tmp_path / name))
    with pytest.raises(ValueError, match="has no entity, every tag is O"):
        open_tagged(str(write(tmp_path / "o", "a O\n\nb O\n")))
    with pytest.raises(ValueError, match="has one sentence, too few to hold one out"):
        open_tagged(str(write(tmp_path / "one", "a B-x\n")))


# ---- what is made of it --------------------------------------------------------------------------


def numbered(n: int, types: str = "xy") -> list[tuple[list[str], list[str]]]:
    """n sentences without a word in common, each with an entity of two words."""
    return [
        ([f"a{i}", f"b{i}", f"c{i}", "."], ["O", f"B-{type_}", f"I-{type_}", "O"])
        for i, type_ in zip(range(n), cycle(types), strict=False)
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_becomes_iob2_and_is_told(tmp_path, scheme):
    rows = [(w, write_tags(entities(tags), len(tags), scheme)) for w, tags in SENTENCES]
    path = str(write(tmp_path / "a", text_of(rows)))
    text = open_tagged(path, path)
    assert text.schemes == {"train": scheme, "validation": scheme}
    assert [(s.words, s.tags) for s in text.splits["train"]] == SENTENCES
    plain = str(write(tmp_path / "b", text_of(SENTENCES, end="\r\n")))
    assert text.hash == open_tagged(plain, plain).hash  # it says the same


def test_a_mixture_is_read_as_conlleval_does(tmp_path):
    path = str(write(tmp_path / "a", "a I-x\nb B-x\nc I-y\nd O\ne E-y\n"))
    text = open_tagged(path, path)
    assert text.schemes["train"] == "" and text.labels == ("O", "B-x", "I-x", "B-y", "I-y")
    assert text.splits["train"][0].tags == ["B-x", "B-x", "B-y", "O", "B-y"]


@pytest.mark.parametrize("total,count", [(2, 1), (19, 1), (20, 2), (137, 13)])
def test_one_sentence_in_ten_is_held_out(tmp_path, total, count):
    path = write(tmp_path / "a.conll", text_of(numbered(total)))
    text = open_tagged(str(path))
    train, held = ([s.words[0] for s in text.splits[k]] for k in ("train", "validation"))
    assert len(held) == count and sorted([*train, *held]) == sorted(f"a{i}" for i in range(total))
    assert [*held] == sorted(held, key=lambda w: int(w[1:]))  # in the order of the file
    assert text.rule == f"{count} of {total} sentences, drawn with a fixed seed, validate"
    assert open_tagged(str(path)).splits == text.splits
    assert text.name == "a" and text.paths == {"train": path, "validation": path}
    assert set(text.schemes.values()) == {"IOB2"}
    if total == 137:  # drawn from all of them, and not every tenth
        numbers = [int(w[1:]) for w in held]
        assert len({n % 10 for n in numbers}) > 3 and numbers[0] < 60 and numbers[-1] > 77


def test_a_given_file_validates_and_all_of_the_other_trains(tmp_path):
    train = str(write(tmp_path / "a", text_of(numbered(7))))
    valid = str(write(tmp_path / "b.conll", text_of(numbered(3, "y"), " ")))
    text = open_tagged(train, valid)
    assert [len(text.splits[k]) for k in ("train", "validation")] == [7, 3]
    assert text.rule == "the sentences of b.conll validate"
    assert text.prompts == ["a0 b0 c0 .", "a1 b1 c1 .", "a2 b2 c2 ."]
    assert list(text.pieces("validation"))[1] == (" a1 b1 c1 .", True)


def test_prompts_are_ordinary_sentences_with_an_entity(tmp_path):
    rows = [
        *numbered(2),
        (["plain"] * 9, ["O"] * 9),
        (["long"] * 26, ["B-x"] * 26),
        *numbered(9)[2:],
    ]
    path = str(write(tmp_path / "a", text_of(rows)))
    assert open_tagged(path, path).prompts == [f"a{i} b{i} c{i} ." for i in range(4)]
    short = str(write(tmp_path / "b", "Rome B-x\n"))
    assert open_tagged(path, short).prompts == ["Rome"]


def test_the_hash_is_of_words_tags_and_division(tmp_path):
    rows, texts = numbered(30), {}
    for name, change in {
        "same": None,
        "word": lambda r: r[3][0].__setitem__(0, "z"),
        "tag": lambda r: r[3][1].__setitem__(0, "B-x"),
        "order": lambda r: r.reverse(),
        "joined": lambda r: (r[0][0].extend(r[1][0]), r[0][1].extend(r.pop(1)[1])),
    }.items():
        mine = [(list(w), list(t)) for w, t in rows]
        if change:
            change(mine)
        path = str(write(tmp_path / name, text_of(mine)))
        texts[name] = open_tagged(path).hash
        texts[f"{name} valid"] = open_tagged(path, path).hash
    assert len(set(texts.values())) == 10 and all(len(h) == 64 for h in texts.values())
    halves = [str(write(tmp_path / f"{a}-{b}", text_of(rows[a:b]))) for a, b in
              ((0, 10), (10, 30), (0, 20), (20, 30))]  # fmt: skip
    assert open_tagged(*halves[:2]).hash != open_tagged(*halves[2:]).hash
    same = str(write(tmp_path / "again", text_of(rows, " ", more=("_",))))
    assert open_tagged(same).hash == texts["same"]


def test_a_type_that_the_labels_lack_is_refused_by_line(tmp_path):
    train = str(write(tmp_path / "a", text_of(numbered(4, "x"))))
    valid = str(write(tmp_path / "b", text_of(numbered(4, "xxy"))))
    text = open_tagged(train, valid)
    assert text.labels == ("O", "B-x", "I-x")
    message = r"b, line 12: B-y is none of the labels to be told apart \(O, B-x, I-x\): take"
    with pytest.raises(ValueError, match=message):
        text.check(text.labels)
    text.check(("B-y", "I-y", "O", "I-x", "B-x", "B-unused"))
    with pytest.raises(ValueError, match="a, line 1: O is none of the labels"):
        text.check(("B-x", "I-x", "B-y", "I-y"))


def test_wnut17():
    """Lines with one tab divide its sentences, some words are invisible, and # is a word."""
    train, dev = shared("wnut17/train.conll"), shared("wnut17/dev.conll")
    text = open_tagged(str(train), str(dev))
    found = {k: (len(v), sum(len(s.words) for s in v)) for k, v in text.splits.items()}
    assert found == {"train": (3394, 62730), "validation": (1009, 15733)}
    assert text.schemes == {"train": "IOB2", "validation": "IOB2"}
    types = ("corporation", "creative-work", "group", "location", "person", "product")
    assert text.labels == ("O", *(f"{p}-{t}" for t in types for p in "BI"))
    text.check(text.labels)
    for split, path in text.paths.items():
        begun = re.findall(r"\tB-", path.read_text(encoding="utf-8"))
        assert sum(len(entities(s.tags)) for s in text.splits[split]) == len(begun)
        lines = path.read_text(encoding="utf-8").split("\n")
        for words, tags, line in text.splits[split]:
            got = [f"{word}\t{tag}" for word, tag in zip(words, tags, strict=True)]
            assert lines[line - 1 : line - 1 + len(got)] == got
    words = {word for s in text.splits["validation"] for word in s.words}
    assert {"#", "watched\u200bwas", "Dubbz\ufeff"} <= words


# ---- tags ----------------------------------------------------------------------------------------

TYPES = ("P", "creative-work", "x")
# Two tags of one type: the second ones before which an entity ends and another begins.
BORDERS = {"B": "BSU", "I": "BSU", "E": "BIESLU", "S": "BIESLU", "L": "BIESLU", "U": "BIESLU"}
ROWS = {  # the table at the top of data/conll.py
    "IOB1": "I-P O I-P I-P B-P I-P O I-L",
    "IOB2": "B-P O B-P I-P B-P I-P O B-L",
    "IOBES": "S-P O B-P E-P B-P E-P O S-L",
    "BILOU": "U-P O B-P L-P B-P L-P O U-L",
}
FOUND = [("P", 0, 1), ("P", 2, 4), ("P", 4, 6), ("L", 7, 8)]

tags = st.sampled_from(["O", "O", *(f"{prefix}-{type_}" for prefix in BORDERS for type_ in TYPES)])
sequences = st.lists(tags, max_size=12)


@st.composite
def sentences(draw, longest: int = 5):
    """(entities, length), with entities side by side or with words between them."""
    found, at = [], 0
    for _ in range(draw(st.integers(0, 4))):
        start = at + draw(st.integers(0, 2))
        at = start + draw(st.integers(1, longest))
        found.append((draw(st.sampled_from(TYPES)), start, at))
    return found, at + draw(st.integers(0, 2))


def slow_entities(tags: list[str]) -> list[tuple[str, int, int]]:
    """Tries every span: it has no O and no border inside, and a border at either end."""

    def border(i: int) -> bool:  # between the words i - 1 and i
        a, b = (tags[k] if 0 <= k < len(tags) else "O" for k in (i - 1, i))
        if a == "O" or b == "O":
            return True
        return a.split("-", 1)[1] != b.split("-", 1)[1] or b[0] in BORDERS[a[0]]

    return [
        (tags[a].split("-", 1)[1], a, b)
        for a in range(len(tags))
        for b in range(a + 1, len(tags) + 1)
        if "O" not in tags[a:b] and [k for k in range(a, b + 1) if border(k)] == [a, b]
    ]


@given(sequences)
@example(["I-P", "I-x", "O", "E-P", "I-P", "S-P", "E-P", "B-P", "E-P", "B-P", "I-P", "E-P", "I-P"])
def test_entities_are_those_of_the_table_of_rules(tags):
    assert entities(tags) == slow_entities(tags)


def test_every_pair_of_tags_by_itself():
    """All 19 · 19 of them, so that none is left to chance."""
    known = ["O", *(f"{prefix}-{type_}" for prefix in BORDERS for type_ in TYPES)]
    for a in known:
        for b in known:
            assert entities([a, b]) == slow_entities([a, b]), (a, b)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_by_hand(scheme):
    row = ROWS[scheme].split()
    assert entities(row) == FOUND and write_tags(FOUND, 8, scheme) == row
    assert scheme_of([row]) == scheme and scheme_of([["O"], row, []]) == scheme
    assert to_iob2(row) == ROWS["IOB2"].split()


@given(sentences())
def test_what_a_scheme_writes_is_read_again(sentence):
    found, length = sentence
    for scheme in SCHEMES:
        tags = write_tags(found, length, scheme)
        assert (
            len(tags) == length
            and entities(tags) == found
            and to_iob2(tags) == write_tags(*sentence)
        )
        fitting = scheme_of([tags])
        assert write_tags(found, length, fitting) == tags


def test_iob1_has_a_b_only_between_neighbours_of_one_type():
    found = [("x", 0, 2), ("P", 2, 3), ("P", 3, 5), ("P", 6, 7)]
    assert write_tags(found, 7, "IOB1") == ["I-x", "I-x", "I-P", "B-P", "I-P", "O", "I-P"]
    # A type that ends like another is another.
    assert write_tags([("work", 0, 1), ("k", 1, 2)], 2, "IOB1") == ["I-work", "I-k"]


@given(sequences)
def test_iob2_of_any_mixture_keeps_its_entities(tags):
    once = to_iob2(tags)
    assert entities(once) == entities(tags) and to_iob2(once) == once
    assert [tag == "O" for tag in once] == [tag == "O" for tag in tags]


def test_a_mixture_or_a_mistake_is_no_scheme():
    iob1, iob2, iobes = (ROWS[name].split() for name in ("IOB1", "IOB2", "IOBES"))
    assert scheme_of([iob1, iob2]) == scheme_of([iob2, iobes]) == ""
    assert scheme_of([["B-P", "I-x"]]) == scheme_of([["O", "E-P"]]) == ""
    assert scheme_of([["I-P", "I-P", "O"]]) == "IOB1" and scheme_of([["O"]]) == "IOB2"


@pytest.mark.parametrize("tag", ["", "o", "B", "B-", "-P", "b-P", "BP", "B_P", "M-P", "O-P", " O"])
def test_what_is_no_tag_is_refused(tag):
    with pytest.raises(ValueError, match=f"{re.escape(repr(tag))} is no tag: write O"):
        entities(["O", tag])
    assert split_tag("B-a-b c") == ("B", "a-b c") and split_tag("O") == ("O", "")
