"""Hugging Face's tokenizer.json of a WordPiece tokenizer, in and out."""

import operator
from reprlib import repr as short
from typing import Any

from wordpiece import INSIDE, LONGEST_WORD, UNK, WordPiece


def wordpiece_to_json(tokenizer: WordPiece) -> dict[str, Any]:
    """The content of Hugging Face's tokenizer.json. There, the names of special tokens in a text
    become their ids, as our encode(text, "all") does it. If the vocabulary has [CLS] and [SEP],
    texts are framed: [CLS] A [SEP], and a second text is B [SEP] in segment 1."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = sorted(tokenizer.special_tokens.items(), key=operator.itemgetter(1))
    frame = [name for name in ("[CLS]", "[SEP]") if name in tokenizer.ids]
    cls, sep, end = (
        {"SpecialToken": {"id": name, "type_id": segment}}
        for name, segment in (("[CLS]", 0), ("[SEP]", 0), ("[SEP]", 1))
    )
    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [cls, a, sep],
        "pair": [cls, a, sep, b, end],
        "special_tokens": {t: {"id": t, "ids": [tokenizer.ids[t]], "tokens": [t]} for t in frame},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": t, **plain, "special": True} for t, i in added],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,  # the same as lowercase
            "lowercase": tokenizer.lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": template if len(frame) == 2 else None,
        "decoder": {"type": "WordPiece", "prefix": INSIDE, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": UNK,
            "continuing_subword_prefix": INSIDE,
            "max_input_chars_per_word": LONGEST_WORD,
            "vocab": dict(tokenizer.ids),
        },
    }


def wordpiece_from_json(content: dict[str, Any]) -> WordPiece:
    """The tokenizer that a parsed tokenizer.json describes. Raises ValueError, in one sentence, for
    every setting that wordpiece_to_json() would not have written, except those that change no id:
    truncation, padding, how the decoder cleans up, and which special tokens are listed.
    """
    if not isinstance(content, dict):
        raise ValueError(f"tokenizer.json: {short(content)} is no object with settings")
    content = dict(content, truncation=None, padding=None)
    for key in ("model", "normalizer"):
        if not isinstance(content.get(key), dict):
            raise ValueError(f"tokenizer.json: {key} is {short(content.get(key))}, no settings")
    model, normalizer = content["model"], content["normalizer"]
    vocab, lowercase = model.get("vocab"), normalizer.get("lowercase")
    if not isinstance(vocab, dict) or any(type(i) is not int for i in vocab.values()):
        raise ValueError("tokenizer.json: model.vocab is no mapping of tokens to ids")
    tokens = sorted(vocab, key=vocab.get)
    if any(vocab[token] != i for i, token in enumerate(tokens)):
        raise ValueError(f"tokenizer.json: the ids of {len(vocab)} tokens do not count from 0")
    new = WordPiece(tokens, lowercase)
    ours = wordpiece_to_json(new)
    content["model"] = {"type": "WordPiece", **model}  # files of 2020 leave the type out
    if normalizer.get("strip_accents") is lowercase:
        content["normalizer"] = {**normalizer, "strip_accents": None}
    sep, cls_ = ([name, new.ids.get(name)] for name in ("[SEP]", "[CLS]"))
    # The second is how files of 2020 write our template.
    if content.get("post_processor") in (
        None,
        {"type": "BertProcessing", "sep": sep, "cls": cls_},
    ):
        content["post_processor"] = ours["post_processor"]
    if content.get("decoder") in (None, {**ours["decoder"], "cleanup": False}):
        content["decoder"] = ours["decoder"]
    if isinstance(content.get("added_tokens"), list):
        for entry in content["added_tokens"]:
            if entry not in ours["added_tokens"]:
                raise ValueError(
                    f"tokenizer.json: added token {short(entry)} is none of BERT's, or set up "
                    "otherwise: only those of BERT are known here"
                )
        content["added_tokens"] = ours["added_tokens"]
    _check_same("tokenizer.json", content, ours)
    return new


def _check_same(where: str, found: Any, ours: Any) -> None:
    if isinstance(found, dict) and isinstance(ours, dict):
        for key in sorted(found.keys() | ours.keys()):  # a missing key counts as null
            _check_same(f"{where}: {key}", found.get(key), ours.get(key))
    elif type(found) is not type(ours) or found != ours:
        raise ValueError(f"{where} is {short(found)}, but only {short(ours)} is known here")
