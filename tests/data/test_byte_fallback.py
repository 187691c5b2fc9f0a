"""data/byte_fallback.py: the ids and texts of tokenizers, transformers and sentencepiece; files."""

import functools
import io
import json
import pickle
import random
import time

import numpy as np
import pytest
from conftest import peer
from hypothesis import given, settings
from hypothesis import strategies as st

from data.byte_fallback import BYTES, PREPENDS, ByteFallbackBPE
from data.tokens import load_tokenizer, tokenizer_from_json

LINES = (
    "the cat sat on the mat",
    "a dog ran  to the   cat",
    "def f(x):\n    return x",
    "the the the cat cat",
    "        if the cat sat:",
    "naïve café, the mat",
    "bab ba ab cab bab ab",
)
KINDS = {  # one with no merge across words, one with them, one with runs of spaces
    "words": {},
    "phrases": {"split_by_whitespace": False},
    "runs": {"allow_whitespace_only_pieces": True},
}
PARTS = [" ", "  ", "     ", "\t", "\n", "\r\n", "▁", "▁▁", "the", "cat", " the", "naïve", "a", "t"]
PARTS += ["é", "e\u0301", "東京", "\U0001f600", "\0", "\u2028", "\ufffd", "<0x0A>", "<s", ">"]
NAMES = ["<unk>", "<s>", "</s>"]
TEXTS = st.one_of(
    st.text(max_size=30), st.lists(st.sampled_from([*PARTS, *NAMES]), max_size=14).map("".join)
)


@functools.cache
def spm(kind: str = "words", **changes) -> bytes:
    """The tokenizer.model of a few hundred pieces."""
    out = io.BytesIO()
    flags = {
        "model_type": "bpe",
        "vocab_size": 319,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "num_threads": 1,
        "minloglevel": 2,
    }
    peer("sentencepiece").SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3), model_writer=out, **{**flags, **KINDS[kind], **changes}
    )
    return out.getvalue()


def of(kind: str = "words", prepend: str = "legacy") -> ByteFallbackBPE:
    return ByteFallbackBPE.from_sentencepiece(spm(kind), prepend)


def theirs_of(state: dict):
    return peer("tokenizers").Tokenizer.from_str(json.dumps(state))


def checked(check, examples: int = 100) -> None:
    settings(max_examples=examples, deadline=None)(given(TEXTS)(check))()


def by_hand(pieces=("▁", "t", "h", "e", "he", "▁t", "▁the"), merges=None) -> dict:
    """The tokenizer.json of Llama 2, with other pieces."""
    merges = ["▁ t", "h e", "▁t he"] if merges is None else merges
    tokenizer = ByteFallbackBPE([*NAMES, *BYTES, *pieces], [], {n: i for i, n in enumerate(NAMES)})
    state = tokenizer.to_tokenizer_json()
    state["model"]["merges"] = merges
    return state


# ---- the same ids --------------------------------------------------------------------------------


def test_the_example_of_the_first_lines():
    state = by_hand()
    tokenizer = ByteFallbackBPE.from_tokenizer_json(state)
    ids = tokenizer.encode("the té")
    assert [tokenizer.pieces[i] for i in ids] == ["▁the", "▁t", "<0xC3>", "<0xA9>"]
    assert ids == theirs_of(state).encode("the té", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == "the té"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_sentencepieces(kind):
    ours, theirs = of(kind), peer("sentencepiece").SentencePieceProcessor(model_proto=spm(kind))
    assert ours.pieces == [theirs.id_to_piece(i) for i in range(theirs.get_piece_size())]

    def check(text):
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)

    checked(check)
    for text in (*LINES, "", " ", " " * 50, "\n".join(LINES * 20)):
        check(text)


@pytest.mark.parametrize("prepend", PREPENDS)
@pytest.mark.parametrize("kind", ["words", "phrases"])
def test_ids_and_texts_are_those_of_hugging_face(kind, prepend):
    ours = of(kind, prepend)
    theirs = theirs_of(ours.to_tokenizer_json())

    def check(text):
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids = ours.encode(text, "all")
        assert [1, *ids] == theirs.encode(text).ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)

    checked(check)
    for text in (" a", "▁a", "<s>a", "<s> a", " <s>a</s>", "a<s><s>a <s>  a", "<s>", "a</s> "):
        check(text)


def test_ids_are_those_of_transformers_class():
    """LlamaTokenizer puts "▁" before the first stretch of a text, whatever the file says."""
    ours, transformers = of("runs", "first"), peer("transformers")
    state = ours.to_tokenizer_json()["model"]
    theirs = transformers.LlamaTokenizer(state["vocab"], [tuple(m) for m in state["merges"]])

    def check(text):
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids = ours.encode(text, "all")
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)

    checked(check, 60)


@pytest.mark.parametrize("kind", KINDS)
def test_merges_are_those_of_transformers_by_score(kind):
    base = peer("transformers").tokenization_utils_base
    ours = of(kind)
    model = peer("sentencepiece").SentencePieceProcessor(model_proto=spm(kind))
    scores = {piece: model.get_score(i) for i, piece in enumerate(ours.pieces)}
    wanted = base.generate_merges({piece: i for i, piece in enumerate(ours.pieces)}, scores)
    assert wanted.index(("▁a", "b")) + 1 == wanted.index(("▁", "ab"))  # two ways to one piece
    assert [(ours.pieces[a], ours.pieces[b]) for a, b in ours.merges] == wanted


def test_any_merges_in_any_order_give_the_ids_of_hugging_face():
    """Also those that no learning would find: across words, late parts of early pieces."""
    random.seed(0)
    for _ in range(40):
        pieces, merges = ["▁", "a", "b"], []
        while len(merges) < 12:
            a, b = random.choice(pieces), random.choice(pieces)
            if [a, b] not in merges and len(a + b) < 9:
                merges.append([a, b])
                pieces += [a + b] * (a + b not in pieces)
        random.shuffle(merges)
        state = by_hand(pieces, merges)
        ours, theirs = ByteFallbackBPE.from_tokenizer_json(state), theirs_of(state)
        for _ in range(20):
            text = "".join(random.choices(" ab▁é", (3, 4, 4, 1, 0.2), k=random.randrange(40)))
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_words_are_merged_one_by_one_only_where_that_is_right():
    assert of("words")._words(" ▁▁the▁cat") == [" ", "▁▁the", "▁cat"]
    assert of("phrases")._words("▁the▁cat\n▁sat") == ["▁the▁cat\n▁sat"]
    phrase = of("phrases").encode("the cat")
    assert [of("phrases").pieces[i] for i in phrase] == ["▁the▁cat"]


def test_what_is_remembered_of_words_has_an_end(monkeypatch):
    monkeypatch.setattr("data.byte_fallback.CACHED_CHUNKS", 2)
    ours, text = of(), f"{LINES[0]} {'x' * 99}"
    assert ours.encode(text) == ours.encode(text)
    assert len(ours._cache) <= 2 and all(len(word) <= 64 for word in ours._cache)


def test_a_text_without_spaces_takes_seconds_and_not_hours():
    letters = "".join(random.Random(0).choices("theca", k=200_000))
    for kind, text in (("words", letters), ("phrases", letters[:50_000]), ("runs", " " * 50_000)):
        ours, start = of(kind), time.perf_counter()
        ids = ours.encode(text)
        assert time.perf_counter() - start < 20  # a second or two; squared it would be an hour
        assert ids == theirs_of(ours.to_tokenizer_json()).encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text


# ---- the interface of bpe.Tokenizer --------------------------------------------------------------


def test_special_tokens_are_made_only_where_they_are_allowed():
    ours = of()
    assert ours.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2} and ours.adds_bos
    assert not {0, 1, 2} & set(ours.encode("<s>the</s><unk>"))
    assert ours.decode(ours.encode("<s>the</s>")) == "<s>the</s>"
    the = ours.encode("the")
    assert ours.encode("<s>the", "all") == [1, *the] == ours.encode("<s>the", ["<s>"])
    assert ours.encode("<s>the</s>", "<s>") == [1, *ours.encode("the</s>")]
    assert of(prepend="first").encode("<s>the", "all") != [1, *the]
    assert of(prepend="always").encode("<s> the", "all") == [1, *the]
    with pytest.raises(ValueError, match=r"allowed_special: '<\|x\|>' is unknown, .*<unk>"):
        ours.encode("the", ["<|x|>"])


def test_the_other_ways_to_encode():
    ours = of("runs")
    texts = ["the cat", "", "<s>"]
    assert ours.encode_batch(texts, "all") == [ours.encode(text, "all") for text in texts]
    found = ours.encode_numpy(LINES[1])
    assert found.dtype == np.uint32 and found.tolist() == ours.encode(LINES[1])
    assert ours.encode("a\ud800\udfffb") == ours.encode("a??b")  # each half of a character
    assert pickle.loads(pickle.dumps(ours)).encode(LINES[1]) == ours.encode(LINES[1])


def test_what_ids_stand_for():
    ours = of("runs")
    assert ours.vocab_size == len(ours.pieces) == len(ours.bytes_of) == 319
    assert ours.ordinary_ids() == list(range(3, 319))
    place = ours.pieces.index
    assert ours.bytes_of[1] == b"<s>" and ours.bytes_of[place("<0xE9>")] == b"\xe9"
    assert ours.bytes_of[place("▁the")] == b" the" and ours.bytes_of[place("▁▁")] == b"  "
    assert ours.word_edges(place("▁the")) == (False, True)
    assert ours.word_edges(place("<0xE9>")) == (True, True)
    assert ours.word_edges(place("):")) == (False, False)
    assert ours.shown(place("▁the")) == "the" and ours.shown(place("at")) == "##at"
    assert ours.shown(place("▁")) == "␣"


def test_tokens_one_by_one_keep_the_spaces_between_words():
    ours = of()
    for text in (*LINES, "  two  ", "東京 café\n", "", " "):
        ids = ours.encode(text)
        joined = b"".join(ours.decode_bytes([i]) for i in ids).decode("utf-8")
        assert joined.removeprefix(" ") == ours.decode(ids) == text
    ids = ours.encode("the cat")
    assert "".join(ours.decode([i]) for i in ids) == "thecat"  # what TextStream must not do


def test_bytes_that_are_no_text_become_as_many_marks_as_in_hugging_face():
    ours = of()
    theirs = theirs_of(ours.to_tokenizer_json())
    a, e = ours.encode("a")[0], [3 + byte for byte in "é".encode()]
    assert ours.decode([a, *e, a]) == "aé a"
    assert ours.decode([*e, 3 + 255]) == "\ufffd" * 3  # one bad byte spoils its neighbours
    assert ours.decode([*e, a, 3 + 255]) == "é a\ufffd"
    assert ours.decode_bytes([*e, 3 + 255]) == b"\xc3\xa9\xff"
    random.seed(0)
    for _ in range(300):
        ids = random.choices(range(3, 259), k=random.randrange(4)) + random.choices(range(319), k=3)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.decode(np.array(ours.encode("the cat"))) == "the cat"
    for i in (-1, 319):
        with pytest.raises(ValueError, match=f"id {i} is no token: the vocabulary ends at 318"):
            ours.decode([a, i])


# ---- our files -----------------------------------------------------------------------------------


def test_json_out_and_in_again(tmp_path):
    ours = of("phrases", "first")
    for restored in (
        tokenizer_from_json(ours.to_json()),
        ByteFallbackBPE.from_tokenizer_json(json.loads(json.dumps(ours.to_tokenizer_json()))),
    ):
        assert type(restored) is ByteFallbackBPE and restored.to_json() == ours.to_json()
        assert restored.hash == ours.hash and restored.encode(LINES[0]) == ours.encode(LINES[0])
    ours.save(tmp_path / "t.json")
    assert load_tokenizer(tmp_path / "t.json").hash == ours.hash
    state = (ours.pieces, ours.merges, ours.special_tokens)
    changed = [
        ByteFallbackBPE(*state, "always"),
        ByteFallbackBPE(*state, "first", False),
        ByteFallbackBPE(ours.pieces, ours.merges[:-1], ours.special_tokens, "first"),
        ByteFallbackBPE([*ours.pieces, "x x"], ours.merges, ours.special_tokens, "first"),
    ]
    assert len({ours.hash, *(tokenizer.hash for tokenizer in changed)}) == 5


@pytest.mark.parametrize(
    "change,message",
    [
        ({"format": 2}, "not a ByteFallbackBPE of format 1"),
        ({"pieces": None}, "pieces is no list"),
        ({"pieces": []}, "special token '<unk>' is not the piece of its id, 0"),
        ({"pieces": [*NAMES, *BYTES, 5]}, "piece 259 is 5, which is empty or no text"),
        ({"pieces": [*NAMES, *BYTES, ""]}, "piece 259 is '', which is empty or no text"),
        ({"pieces": [*NAMES, *BYTES, "\udc00"]}, "piece 259 is .* no text"),
        ({"pieces": [*NAMES, *BYTES, "a", "a"]}, "piece 'a' occurs 2 times"),
        ({"pieces": [*NAMES, *list(BYTES)[1:]]}, "of the 256 bytes, 1 have no piece.*<0x00>"),
        ({"special_tokens": None}, "special_tokens no mapping"),
        ({"special_tokens": {"<s>": 0}}, "special token '<s>' is not the piece of its id, 0"),
        ({"special_tokens": {"<s>": True}}, "not the piece of its id, True"),
        ({"special_tokens": {"<s>": 10**9}}, "not the piece of its id"),
        ({"special_tokens": {"<s>": 1, "<0x00>": 3}}, "of the 256 bytes, 1 have no piece"),
        ({"special_tokens": {}}, "adds_bos is true, but there is no special token <s>"),
        ({"merges": None}, "merges is no list"),
        ({"merges": ["ab"]}, "merge 1, 'ab', is not of two ordinary pieces"),
        ({"merges": [[259, 260, 261]]}, "merge 1, .* is not of two ordinary pieces"),
        ({"merges": [[259, 999]]}, r"merge 1, \[259, 999\], is not of two ordinary pieces"),
        ({"merges": [[259, -1]]}, "merge 1, .* is not of two ordinary pieces"),
        ({"merges": [[259, 260.0]]}, "merge 1, .* is not of two ordinary pieces"),
        ({"merges": [[259, [260]]]}, "merge 1, .* is not of two ordinary pieces"),
        ({"merges": [[259, 1]]}, "merge 1, .* is not of two ordinary pieces"),
        ({"merges": [[3, 4]]}, "merge 1, .* is not of two ordinary pieces"),
        ({"merges": [[259, 260], [261, 261]]}, "merge 2, .* makes no piece or comes twice"),
        ({"merges": [[259, 260], [259, 260]]}, "merge 2, .* makes no piece or comes twice"),
        ({"prepend": "last"}, "prepend='last'"),
        ({"prepend": ["first"]}, r"prepend=\['first'\]"),
        ({"adds_bos": 1}, "adds_bos=1"),
    ],
    ids=str,
)
def test_a_state_that_was_not_written_is_refused(change, message):
    state = json.loads(ByteFallbackBPE.from_tokenizer_json(by_hand()).to_json())
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer_from_json(json.dumps({**state, **change}))
    assert "\n" not in str(caught.value)
    for text in ("", "[]", "[" * 100_000, '{"a": 1, "a": 1}', json.dumps({**state, "type": "BPE"})):
        with pytest.raises(ValueError, match="not a "):
            ByteFallbackBPE.from_json(text)
    with pytest.raises(ValueError, match="prepend=None"):
        ByteFallbackBPE.from_json(json.dumps({k: v for k, v in state.items() if k != "prepend"}))


# ---- tokenizer.json ------------------------------------------------------------------------------

A, B = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
FRAME = {"type": "TemplateProcessing", "single": [A], "pair": [A, B], "special_tokens": {}}


def changed(path: str, value) -> dict:
    """by_hand() with another value at a path such as model.dropout."""
    state = by_hand()
    *folders, name = path.split(".")
    functools.reduce(lambda at, folder: at[folder], folders, state)[name] = value
    return state


@pytest.mark.parametrize(
    "path,value",
    [
        ("decoder", METASPACE),
        ("decoder", {**METASPACE, "split": False}),
        ("model.dropout", 0.0),
        ("model.continuing_subword_prefix", ""),
        ("model.fuse_unk", False),
        ("model.unk_token", None),
        ("model.merges", [["▁", "t"], ["h", "e"], ["▁t", "he"]]),
        ("model.ignore_merges", True),
        ("truncation", {"max_length": 9}),
    ],
    ids=str,
)
def test_what_changes_no_id_is_accepted(path, value):
    found = ByteFallbackBPE.from_tokenizer_json(changed(path, value))
    assert found.to_json() == ByteFallbackBPE.from_tokenizer_json(by_hand()).to_json()


def test_what_the_post_processor_says_of_bos():
    assert ByteFallbackBPE.from_tokenizer_json(by_hand()).adds_bos
    bos, ids = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"id": "<s>", "ids": [1]}
    ids = {"<s>": {**ids, "tokens": ["<s>"]}}
    frame = {**FRAME, "single": [bos, A], "pair": [bos, A, B], "special_tokens": ids}
    assert ByteFallbackBPE.from_tokenizer_json(changed("post_processor", frame)).adds_bos
    for frame in (None, FRAME):
        assert not ByteFallbackBPE.from_tokenizer_json(changed("post_processor", frame)).adds_bos


def test_added_tokens_are_special_whether_the_file_calls_them_so_or_not():
    state = by_hand()
    state["added_tokens"].append({"id": 266, "content": "<|user|>", "special": False})
    ours = ByteFallbackBPE.from_tokenizer_json(state)
    assert ours.special_tokens["<|user|>"] == 266 == ours.vocab_size - 1
    assert ours.pieces[266] == "<|user|>"
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    state["added_tokens"][-1] |= plain
    text = "the<|user|>the <|user|>"
    assert [1, *ours.encode(text, "all")] == theirs_of(state).encode(text).ids
    again = ByteFallbackBPE.from_tokenizer_json(ours.to_tokenizer_json())
    assert again.to_json() == ours.to_json()


@pytest.mark.parametrize(
    "path,value,message",
    [
        ("model", None, "type=None is not supported"),
        ("model.type", "Unigram", "type='Unigram' is not supported"),
        ("model.byte_fallback", False, "byte_fallback=False is not supported"),
        ("model.dropout", 0.1, "dropout=0.1 is not supported"),
        ("model.continuing_subword_prefix", "##", "continuing_subword_prefix='##' is not"),
        ("model.end_of_word_suffix", "</w>", "end_of_word_suffix='</w>' is not"),
        ("model.vocab", [], "vocab is no mapping"),
        ("model.vocab", {"a": "0"}, "vocab: not every id is an integer"),
        ("model.vocab.t", 999, "'t' has the id 999, but counted from 0 it is 265"),
        ("model.vocab.t", 3, "has the id .*, but counted from 0"),
        ("model.vocab", {"<unk>": 0, "<s>": 1, "</s>": 2}, "merge 1, '▁ t', is not of two pieces"),
        ("model.merges", None, "merges is no list"),
        ("model.merges", ["▁ t", "h  e"], "merge 2, 'h  e', is not of two pieces"),
        ("model.merges", ["▁ x"], "merge 1, '▁ x', is not of two pieces"),
        ("model.merges", [["▁", ["t"]]], "merge 1, .* is not of two pieces"),
        ("model.merges", [5], "merge 1, 5, is not of two pieces"),
        ("model.merges", ["e h"], r"merge 1, \('e', 'h'\), makes no piece"),
        ("normalizer", {"type": "NFKC"}, "normalizer={'type': 'NFKC'} is not supported"),
        ("normalizer", None, "normalizer=None is not supported"),
        ("pre_tokenizer", METASPACE, "pre_tokenizer={.*Metaspace.* is not supported"),
        ("decoder", None, "decoder=None is not supported"),
        ("decoder", {"type": "ByteLevel"}, "decoder={'type': 'ByteLevel'} is not supported"),
        ("decoder", {**METASPACE, "prepend_scheme": "never"}, "decoder={"),
        ("post_processor", {**FRAME, "single": [A, A]}, "post_processor={.* is not supported"),
        ("post_processor", {"type": "ByteLevel"}, "post_processor={'type': 'ByteLevel'}"),
        ("post_processor", "x", "post_processor='x' is not supported"),
        ("added_tokens", {}, "post_processor={"),
        ("added_tokens", [5], "added_tokens: 5 has no text"),
        ("added_tokens", [{"content": "<s>"}], "added_tokens: .* not one id"),
        ("added_tokens", [{"content": "<s>", "id": 2}], "'<s>' has the id .*, but counted from 0"),
        ("added_tokens", [{"content": "<x>", "id": 270}], "'<x>' has the id 270, but .* is 266"),
        ("added_tokens", [{"content": "", "id": 266}], "piece 266 is '', which is empty"),
        ("added_tokens", [{"content": "▁the", "id": 265}], "makes no piece"),
        *(
            ("added_tokens", [{"content": "<s>", "id": 1, field: True}], f"{field} of '<s>' is not")
            for field in ("single_word", "lstrip", "rstrip", "normalized")
        ),
    ],
    ids=str,
)
def test_a_tokenizer_json_that_is_not_ours_is_refused(path, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        ByteFallbackBPE.from_tokenizer_json(changed(path, value))
    assert "\n" not in str(caught.value)


def test_a_metaspace_that_splits_is_refused_and_so_is_one_with_another_decoder():
    state = of(prepend="first").to_tokenizer_json()
    state["pre_tokenizer"]["split"] = True
    with pytest.raises(ValueError, match=r"pre_tokenizer={.* is not supported"):
        ByteFallbackBPE.from_tokenizer_json(state)
    state = of(prepend="never").to_tokenizer_json()
    state["decoder"] = of(prepend="first").to_tokenizer_json()["decoder"]
    with pytest.raises(ValueError, match=r"decoder={.* is not supported"):
        ByteFallbackBPE.from_tokenizer_json(state)


def test_ignore_merges_is_refused_where_it_changes_ids():
    state = by_hand(merges=["▁ t"])  # "▁the" is a piece, but no merge makes it
    state["model"]["ignore_merges"] = True
    assert len(theirs_of(state).encode("the").ids) == 2
    with pytest.raises(ValueError, match="ignore_merges=true is not supported: '▁the' differs"):
        ByteFallbackBPE.from_tokenizer_json(state)
    state["model"]["ignore_merges"] = False
    assert len(ByteFallbackBPE.from_tokenizer_json(state).encode("the")) == 3


# ---- tokenizer.model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,message",
    [
        ({"model_type": "unigram", "hard_vocab_limit": False}, "model_type='unigram' is not"),
        ({"byte_fallback": False, "vocab_size": 50}, "byte_fallback=0 is not supported"),
        ({"normalization_rule_name": "nmt_nfkc"}, "precompiled_charsmap=b.* is not supported"),
        ({"add_dummy_prefix": False}, "add_dummy_prefix=0 is not supported"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces=1 is not supported"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix=1 is not supported"),
        ({"user_defined_symbols": "<mask>"}, "piece '<mask>' of the kind 4 is not supported"),
    ],
    ids=str,
)
def test_a_model_that_does_something_else_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ByteFallbackBPE.from_sentencepiece(spm(**change))


def test_control_pieces_are_special():
    ours = ByteFallbackBPE.from_sentencepiece(spm(control_symbols="[INST]", bos_id=-1))
    assert sorted(ours.special_tokens) == ["</s>", "<unk>", "[INST]"] and not ours.adds_bos


def test_a_damaged_model_is_refused():
    whole = spm()
    for data in (b"", b"\0", b"{}", b"\xff" * 99, whole[:-1], whole[1:], b"\x0a\xff" + whole):
        with pytest.raises(ValueError, match=r"damaged one|not supported|of the 256 bytes"):
            ByteFallbackBPE.from_sentencepiece(data)
    at = whole.index("▁the\x15".encode()) + 7  # of its score
    byte = b"<0x41>\x15\0\0\0\0\x18"
    for data, message in (
        (whole + b"\x0a\x05ab", "a field without end"),
        (whole + b"\x08" + b"\x80" * 11, "an integer without end"),
        (whole.replace(byte + b"\6", byte + b"\1"), "piece '<0x41>' of the kind 1 is not"),
        (whole.replace(byte + b"\6", byte + b"\5"), "piece '<0x41>' of the kind 5 is not"),
        (whole[:at] + b"\0\0\xc0\x7f" + whole[at + 4 :], "piece '▁the' of the kind 1 is not"),
        (b"", "no pieces"),
    ):
        with pytest.raises(ValueError, match=message):
            ByteFallbackBPE.from_sentencepiece(data)
    random.seed(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(random.randrange(1, 4)):
            data[random.randrange(len(data))] = random.randrange(256)
        try:
            ByteFallbackBPE.from_sentencepiece(bytes(data))
        except ValueError as error:
            assert "\n" not in str(error)
