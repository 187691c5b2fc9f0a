"""engine/hub/tokenizer_files.py: tokenizers out and in, with the same ids as Hugging Face's."""

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import gpt2_files, peer
from converting import (
    AUTO,
    OURS,
    TASK,
    TEXT,
    T,
    V,
    foreign,
    save_ours,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from bert import BERT, BERTConfig
from bpe import GPT2_PATTERN, Tokenizer
from data.gpt2_files import read_gpt2_files
from data.tokens import END_OF_TEXT
from engine.hub.exporting import export_model
from engine.hub.mapping import their_settings
from engine.hub.tokenizer_files import from_tokenizer_json, read_tokenizer, tokenizer_json
from tasks.masked import encode_prompt
from tasks.similar import framed


def exported_tokenizer(tokenizer: Tokenizer, task: str, folder: Path, **config):
    """What AutoTokenizer makes of our files."""
    folder.mkdir()
    content = json.dumps(tokenizer_json(tokenizer, task))
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    said = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    said = their_settings(task, OURS[task][1])
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    return peer("transformers").AutoTokenizer.from_pretrained(folder)


def our_ids(tokenizer: Tokenizer, task: str, text: str) -> list[int]:
    """As sample.py reads a text for each family of models."""
    if task == "gpt":
        return tokenizer.encode(text, allowed_special="all")
    if task == "seq2seq":
        return [*tokenizer.encode(text.strip()), tokenizer.special_tokens[END_OF_TEXT]]
    model = BERT(BERTConfig(V, 10_000, 1, 1, 2, 2))
    text = " ".join(text.split())
    ids = tokenizer.encode(f" {text}") if text else []
    return framed(model, tokenizer, [ids])[0].tolist()


# Oniguruma, the regex module and str.isspace may know characters of different years.
KNOWN = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=40)
PIECES = (
    *(" ", "  ", "\n", "\r\n", "\t", "\x1c", "\x85", "\u00a0", "\u2003", "\u200b", "\ufeff"),
    *("'s", "'S", "'ll", "'LL", "'\u017f", "the", "ß", "İ", "é", "e\u0301", "K", "東京"),
    *("123", "4567", "٣٤", "½", "!?", "_", "\U0001f600", "<|a|>", "<|a|>b", "<|", END_OF_TEXT),
)
TEXTS = st.one_of(KNOWN, st.lists(st.sampled_from(PIECES), max_size=14).map("".join))


@pytest.mark.parametrize("name", ["gpt2", "gpt4", "char", "bert", "seq2seq"])
def test_auto_tokenizer_gives_the_same_ids(name, tmp_path, tokenizers):
    tokenizer, task = tokenizers[name], name if name in TASK else "gpt"
    theirs = exported_tokenizer(tokenizer, task, tmp_path / "there")

    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def check(text):
        if task != "gpt":  # they find special tokens in every text, ours only where it asks
            for special in tokenizer.special_tokens:
                text = text.replace(special, "")
        assert theirs(text)["input_ids"] == our_ids(tokenizer, task, text)

    check()
    for text in [*TEXT, "".join(TEXT), "".join(TEXT) * 40]:
        ids = theirs(text)["input_ids"]
        assert ids == our_ids(tokenizer, task, text)
        if task == "gpt":
            assert theirs.decode(ids) == text
    if task == "bert":
        for text in (
            "the [MASK] sat",
            "[MASK] sat.",
            "  the [MASK]",
            "a [MASK] [MASK]  b",
            "[MASK]",
        ):
            ids = framed(
                BERT(BERTConfig(V, T, 1, 1, 2, 2)), tokenizer, [encode_prompt(tokenizer, text)]
            )
            assert theirs(text)["input_ids"] == ids[0].tolist()
        pair = theirs("the cat", "the mat", return_token_type_ids=True)
        first, second = (our_ids(tokenizer, task, text) for text in ("the cat", "the mat"))
        assert pair["input_ids"] == first + second[1:]
        assert pair["token_type_ids"] == [0] * len(first) + [1] * (len(second) - 1)


@pytest.mark.parametrize("name", ["gpt2", "gpt4", "char", "bert", "seq2seq"])
def test_tokenizer_json_out_and_in_again(name, tmp_path, tokenizers):
    task = name if name in TASK else "gpt"
    state = json.loads(json.dumps(tokenizer_json(tokenizers[name], task)))
    path, want = tmp_path / "tokenizer.json", foreign(tokenizers[name]).to_json()
    assert from_tokenizer_json(state, path, task).to_json() == want
    state["model"]["merges"] = [" ".join(pair) for pair in state["model"]["merges"]]  # of old
    assert from_tokenizer_json(state, path, task).to_json() == want


def test_newer_characters_have_the_ids_of_auto_tokenizer(tmp_path, tokenizers):
    """The `regex` module knows letters that Hugging Face's library does not, or the other way
    round: what comes from the hub is cut as there, U+058C before 's for example."""
    theirs = exported_tokenizer(tokenizers["gpt"], "gpt", tmp_path / "there")
    ours = read_tokenizer(tmp_path / "there", "gpt")
    newer = [c for c in map(chr, range(0x30000)) if unicodedata.category(c) == "Cn"]
    for c in ["\u058c", "\u0558", "\U00011de0", *random.Random(0).sample(newer, 400)]:
        for text in (f"the{c}'s", f" {c} {c}1{c}ll"):
            assert theirs(text)["input_ids"] == ours.encode(text), hex(ord(c))


@pytest.mark.slow
def test_gpt2s_own_tokenizer_in_the_files_of_the_hub(tmp_path):
    """vocab.json and merges.txt, and the tokenizer.json that tokenizers makes of them."""
    library = peer("tokenizers")
    merges, vocabulary = gpt2_files()
    want = read_gpt2_files(merges, vocabulary)
    folder = tmp_path / "there"
    folder.mkdir()
    shutil.copy(vocabulary, folder / "vocab.json")
    shutil.copy(merges, folder / "merges.txt")
    assert read_tokenizer(folder, "gpt").to_json() == want.to_json()
    model = library.models.BPE.from_file(str(vocabulary), str(merges))
    theirs = library.Tokenizer(model)
    theirs.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = library.decoders.ByteLevel()
    theirs.post_processor = library.processors.ByteLevel(trim_offsets=False)
    theirs.add_special_tokens([END_OF_TEXT])
    theirs.save(str(folder / "tokenizer.json"))
    assert read_tokenizer(folder, "gpt").to_json() == want.to_json()
    ours = exported_tokenizer(want, "gpt", tmp_path / "again")
    for text in TEXT:
        assert ours(text)["input_ids"] == want.encode(text) == theirs.encode(text).ids


def test_the_exported_tokenizer_feeds_the_exported_model(tmp_path, tokenizers):
    """GPT-2 would add the embedding of token 0 everywhere if it were given token types."""
    transformers = peer("transformers")
    for name in ("gpt", "bert", "seq2seq"):
        folder = tmp_path / name
        ours = save_ours(name, tmp_path / "best.pt", tokenizers[name])
        export_model(tmp_path / "best.pt", folder)
        theirs = getattr(transformers, AUTO[name]).from_pretrained(folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.model_max_length == T
        given = tokenizer(["the mat", "a"], return_tensors="pt", padding=True)
        assert ("token_type_ids" in given) == (name == "bert")
        ids, keep = given["input_ids"], given["attention_mask"].bool()
        if name == "gpt":
            want = ours(ids)
            got = theirs(**given).logits
            torch.testing.assert_close(got[keep], want[keep], atol=1e-5, rtol=1e-5)
            with torch.no_grad():  # half of the ids that only pad become the likeliest
                theirs.transformer.wte.weight[tokenizers[name].vocab_size :] *= 100
            written = theirs.generate(**given, do_sample=True, max_new_tokens=5)
            assert written.max() < tokenizers[name].vocab_size  # never a padded id
        elif name == "bert":
            got = theirs(**given).prediction_logits
            want = ours(ids, keep=keep)[0]
            torch.testing.assert_close(got[keep], want[keep], atol=1e-5, rtol=1e-5)
        else:
            written = theirs.generate(**given, do_sample=False, num_beams=1)
            end = tokenizers[name].special_tokens[END_OF_TEXT]
            assert written[:, 0].tolist() == [end, end]
            assert written.max() < tokenizers[name].vocab_size


def changed(state: dict, *path_and_value) -> dict:
    *path, last, value = path_and_value
    state = json.loads(json.dumps(state))
    place = state
    for key in path:
        place = place[key]
    place[last] = value
    return state


TOKENIZER_CHANGES = [
    (["normalizer", {"type": "NFC"}], "normalizer"),
    (["post_processor", {"type": "Sequence", "processors": []}], "post_processor"),
    (["pre_tokenizer", None], "pre_tokenizer"),
    (["pre_tokenizer", "pretokenizers", []], "pre_tokenizer"),
    (["pre_tokenizer", "pretokenizers", 0, "behavior", "Removed"], "pre_tokenizer"),
    (["pre_tokenizer", "pretokenizers", 0, "pattern", {"Regex": r"\w+"}], "pre_tokenizer"),
    (["pre_tokenizer", "pretokenizers", 1, "add_prefix_space", True], "pre_tokenizer"),
    (["pre_tokenizer", "pretokenizers", 1, "use_regex", True], "pre_tokenizer"),
    (["model", []], "no model"),
    (["model", "dropout", 0.1], "dropout"),
    (["model", "continuing_subword_prefix", "##"], "continuing_subword_prefix"),
    (["model", "end_of_word_suffix", "</w>"], "end_of_word_suffix"),
    (["model", "type", "WordPiece"], "WordPiece tokenizer: not supported"),
    (["model", "type", "Unigram"], "Unigram tokenizer: not supported"),
    (["model", "byte_fallback", True], "BPE tokenizer: not supported"),
    (["model", "vocab", []], "no vocab"),
    (["model", "vocab", "zz", 999], r"by \+1"),
    (["model", "vocab", "!", "0"], "is not an integer"),
    (["model", "vocab", "!", 34], "stands for 2 tokens"),
    (["model", "merges", 3, ["q", "qq"]], "merge 4"),
    (["model", "merges", 3, ["q"]], "merge 4"),
    (["model", "merges", 3, "q q q"], "merge 4"),
    (["model", "merges", 3, [1, 2]], "merge 4"),
    (["model", "merges", 3, None], "merge 4"),
    (["added_tokens", 0, "lstrip", True], "takes its surroundings"),
    (["added_tokens", 0, "single_word", True], "takes its surroundings"),
    (["added_tokens", 0, "id", 5], "has the ids"),
    (["added_tokens", 0, "content", 5], "added token"),
    (["added_tokens", 0, "content", "<x>"], "the id 297, but transformers gives it 300"),
    (["added_tokens", [{"content": c, "id": 300} for c in ("<x>", "<y>")]], "have the same id"),
    (["model", "vocab", "<|a|>", 297], "has the ids 297 and 298"),
]


@pytest.mark.parametrize("change,message", TOKENIZER_CHANGES, ids=str)
def test_a_tokenizer_that_ours_cannot_equal_is_refused(change, message, tmp_path, tokenizers):
    state = changed(tokenizer_json(tokenizers["gpt"], "gpt"), *change)
    with pytest.raises(ValueError, match=message):
        from_tokenizer_json(state, tmp_path / "tokenizer.json", "gpt")


def test_a_merge_out_of_order_is_refused_with_its_number(tmp_path, tokenizers):
    """Ours merges by ids: another order of the same merges would be another tokenizer."""
    state = tokenizer_json(tokenizers["gpt"], "gpt")
    merges = state["model"]["merges"]
    merges[4], merges[9] = merges[9], merges[4]
    with pytest.raises(ValueError, match=r"merge 5, .* should be .* by the ids"):
        from_tokenizer_json(state, tmp_path / "tokenizer.json", "gpt")


def test_a_text_of_merges_is_refused_with_the_number(tmp_path, tokenizers):
    folder, state = tmp_path, tokenizer_json(tokenizers["seq2seq"], "gpt")
    (folder / "vocab.json").write_text(json.dumps(state["model"]["vocab"]), encoding="utf-8")
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    good = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "merges.txt").write_text(good, encoding="utf-8")
    want = tokenizer_json(read_tokenizer(folder, "gpt"), "gpt")
    assert want["model"] == state["model"]
    windows = "\ufeff" + good.replace("\n", "\r\n")  # as git and editors of Windows write it
    (folder / "merges.txt").write_bytes(windows.encode("utf-8"))
    assert tokenizer_json(read_tokenizer(folder, "gpt"), "gpt")["model"] == state["model"]
    (folder / "merges.txt").write_text(good.replace(merges[6], "q q"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"merges\.txt: merge 7"):
        read_tokenizer(folder, "gpt")
    (folder / "merges.txt").write_text("\n".join(merges[:-3]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"merges\.txt: .*by \+3"):
        read_tokenizer(folder, "gpt")  # and no token becomes a special one
    (folder / "merges.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"merges\.txt"):
        read_tokenizer(folder, "gpt")


@pytest.mark.parametrize("task", ["gpt", "bert", "seq2seq"])
def test_a_folder_without_a_tokenizer_of_ours_is_refused(task, tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        read_tokenizer(tmp_path, task)
    for file in ("spiece.model", "source.spm")[: 1 if task == "seq2seq" else 2]:
        (tmp_path / file).touch()
        with pytest.raises(ValueError, match=r"SentencePiece tokenizer: only a translator's"):
            read_tokenizer(tmp_path, task)
        (tmp_path / file).unlink()


def test_a_tokenizer_without_the_tokens_of_the_task_is_refused(tmp_path, tokenizers):
    bare = Tokenizer({bytes([i]): i for i in range(256)}, GPT2_PATTERN, {})
    content = json.dumps(tokenizer_json(bare, "gpt"))
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    for task, token in (("gpt", r"<\|endoftext\|>"), ("bert", r"\[CLS\]")):
        with pytest.raises(ValueError, match=f"has no token .*{token}"):
            read_tokenizer(tmp_path, task)
    other = Tokenizer(bare.ranks, r"\w+|\W", {})
    with pytest.raises(ValueError, match="no known wording"):
        tokenizer_json(other, "gpt")
