"""WordPiece's tokenizer.json: there and back, and what is refused."""

import json

import pytest
from conftest import peer
from test_wordpiece import TOKENIZERS, both, rust

from engine.hub.wordpiece_json import wordpiece_from_json, wordpiece_to_json
from wordpiece import WordPiece


@both
def test_there_and_back_through_the_tokenizers_library(lowercase):
    tok = TOKENIZERS[lowercase]
    theirs = json.loads(rust(lowercase).to_str())
    assert theirs == wordpiece_to_json(tok)
    back = wordpiece_from_json(theirs)
    assert (back.tokens, back.lowercase, back.hash) == (tok.tokens, lowercase, tok.hash)


def test_the_template_frames_one_text_or_two():
    pair = rust(True).encode("the", "string if")
    tok = TOKENIZERS[True]
    a, b = tok.encode("the"), tok.encode("string if")
    cls, sep = tok.ids["[CLS]"], tok.ids["[SEP]"]
    assert pair.ids == [cls, *a, sep, *b, sep]
    assert pair.type_ids == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert rust(True).encode("the").ids == [cls, *a, sep]


def test_without_cls_and_sep_there_is_no_template():
    tok = WordPiece(["[UNK]", "a", "[SEP]"])
    theirs = peer("tokenizers").Tokenizer.from_str(json.dumps(wordpiece_to_json(tok)))
    assert theirs.encode("a [SEP] b").ids == [1, 2, 0]
    assert wordpiece_from_json(json.loads(theirs.to_str())).hash == tok.hash


def small() -> dict:
    return wordpiece_to_json(WordPiece(["[UNK]", "a", "[CLS]", "[SEP]"]))


HARMLESS = {
    "truncation": lambda t: t.update(truncation={"max_length": 128, "stride": 0}),
    "padding": lambda t: t.update(padding={"strategy": {"Fixed": 128}, "pad_id": 0}),
    "no template": lambda t: t.update(post_processor=None),
    "no decoder": lambda t: t.pop("decoder"),
    "no clean-up": lambda t: t["decoder"].update(cleanup=False),
    "accents said": lambda t: t["normalizer"].update(strip_accents=True),
    "model of 2020": lambda t: t["model"].pop("type"),
    "template of 2020": lambda t: t.update(
        post_processor={"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    ),
    "fewer listed": lambda t: t["added_tokens"].pop(),
    "key order": lambda t: t["model"].update(vocab=dict(reversed(t["model"]["vocab"].items()))),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_settings_that_change_no_id_are_accepted(name):
    content = small()
    HARMLESS[name](content)
    before = json.dumps(content)
    assert wordpiece_from_json(content).tokens == ["[UNK]", "a", "[CLS]", "[SEP]"]
    assert json.dumps(content) == before


FOREIGN = {
    "version": (lambda t: t.update(version="2.0"), "version is '2.0'.*'1.0'"),
    "surplus": (lambda t: t.update(surprise=1), "surprise is 1"),
    "no model": (lambda t: t.pop("model"), "model is None"),
    "model list": (lambda t: t.update(model=[1]), "model is"),
    "bpe": (lambda t: t["model"].update(type="BPE"), "model: type is 'BPE'"),
    "unk": (lambda t: t["model"].update(unk_token="<unk>"), "unk_token is '<unk>'"),
    "no unk": (lambda t: t["model"].pop("unk_token"), "unk_token is None"),
    "prefix": (lambda t: t["model"].update(continuing_subword_prefix="@@"), "'@@'"),
    "longest": (lambda t: t["model"].update(max_input_chars_per_word=200), "200.*100"),
    "longest float": (lambda t: t["model"].update(max_input_chars_per_word=100.0), "100.0"),
    "model surplus": (lambda t: t["model"].update(dropout=0.1), "dropout is 0.1"),
    "vocab list": (lambda t: t["model"].update(vocab=["a"]), "no mapping"),
    "id text": (lambda t: t["model"]["vocab"].update(a="1"), "no mapping"),
    "id bool": (lambda t: t["model"]["vocab"].update(a=True), "no mapping"),
    "id twice": (lambda t: t["model"]["vocab"].update(b=1), "ids of 5 tokens do not count"),
    "id gap": (lambda t: t["model"]["vocab"].update(b=10**12), "ids of 5 tokens do not count"),
    "id negative": (lambda t: t["model"]["vocab"].update(b=-1), "ids of 5 tokens do not count"),
    "no [UNK]": (lambda t: t["model"].update(vocab={"a": 0}), r"no \[UNK\]"),
    "empty token": (lambda t: t["model"]["vocab"].update({"": 4}), "token 4"),
    "no normalizer": (lambda t: t.update(normalizer=None), "normalizer is None"),
    "normalizer": (lambda t: t["normalizer"].update(type="NFC"), "type is 'NFC'"),
    "lowercase": (lambda t: t["normalizer"].update(lowercase=1), "lowercase=1"),
    "clean": (lambda t: t["normalizer"].update(clean_text=False), "clean_text is False"),
    "chinese": (
        lambda t: t["normalizer"].update(handle_chinese_chars=False),
        "handle_chinese_chars is False",
    ),
    "accents": (lambda t: t["normalizer"].update(strip_accents=False), "strip_accents is False"),
    "split": (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "'Whitespace'"),
    "no split": (lambda t: t.pop("pre_tokenizer"), "pre_tokenizer is None"),
    "template": (lambda t: t["post_processor"]["single"].pop(), "single is"),
    "template ids": (
        lambda t: t.update(
            post_processor={"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 2]}
        ),
        "post_processor",
    ),
    "decoder": (lambda t: t["decoder"].update(prefix="@"), "decoder: prefix is '@'"),
    "added": (lambda t: t["added_tokens"][0].update(content="<s>"), "added token .* none of BERT"),
    "added id": (lambda t: t["added_tokens"][0].update(id=9), "added token .* none of BERT"),
    "added strips": (
        lambda t: t["added_tokens"][0].update(lstrip=True),
        "added token .* none of BERT",
    ),
    "added none": (lambda t: t.pop("added_tokens"), "added_tokens is None"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_settings_are_refused_in_one_sentence(name):
    change, message = FOREIGN[name]
    content = small()
    change(content)
    with pytest.raises(ValueError, match=message) as e:
        wordpiece_from_json(content)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize("content", [None, [], "text", {}, {"model": {}}])
def test_what_is_no_tokenizer_json_is_refused(content):
    with pytest.raises(ValueError, match=r"^tokenizer\.json"):
        wordpiece_from_json(content)
