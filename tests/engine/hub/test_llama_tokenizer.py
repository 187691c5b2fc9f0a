"""engine/hub/llama_tokenizer.py: ids equal to those of tokenizer.json, and what is refused."""

import copy
import json
import random
from pathlib import Path

import pytest
from conftest import peer

from data.tokens import ending, opening, tokenizer_from_json
from engine.hub.llama_tokenizer import read_llama_tokenizer
from engine.hub.tokenizer_files import (
    DIGITS_PATTERN,
    LLAMA3_PATTERN,
    QWEN_PATTERN,
    pre_tokenizer,
    tokenizer_json,
)
from tasks.text import TextStream, encode_prompt

LEARNT_FROM = [
    "The year 2024 had 366 days; 12 months, 3 of them over 31 days. It's what they'd've said.\n",
    "def f(x):\n    return x ** 2   # naïve café\r\n\r\n",
    "Das Übermaß der Öfen, äußerst schön. Привет, мир! 東京 🙂\n\n\n",
]
PARTS = [" ", "  ", "\n", "\r\n", "\t", "the", " The", "'s", "'LL", "year", "1", "23", " 2024", "x"]
PARTS += [
    "é",
    "e\u0301",
    "Å",
    "\u212b",
    "東京",
    "🙂",
    "½",
    "Ⅷ",
    "٣٤",
    "\u00a0",
    "\u2028",
    "\x04",
    "¡",
    "Ω",
]
PARTS += ["\u0344", "!", "...", " #", "ß", "и\u0306", "가", "\u1100\u1161", "<|endoftext|>", "</s>"]


def texts(count: int = 300) -> list[str]:
    choose = random.Random(7)
    made = ["".join(choose.choices(PARTS, k=choose.randrange(1, 12))) for _ in range(count)]
    return [*LEARNT_FROM, "", " ", "a  1", "a   12  ", *made]


def learnt(pattern: str, special: list[str], alphabet: bool = True, nfc: bool = False):
    """Hugging Face's tokenizer, learnt from LEARNT_FROM, as the content of its file."""
    library = peer("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    steps = pre_tokenizer(pattern)["pretokenizers"]
    made = []
    for step in steps:
        if step["type"] == "Split":
            made.append(
                library.pre_tokenizers.Split(library.Regex(step["pattern"]["Regex"]), "isolated")
            )
        elif step["type"] == "Digits":
            made.append(library.pre_tokenizers.Digits(individual_digits=True))
        else:
            made.append(
                library.pre_tokenizers.ByteLevel(
                    add_prefix_space=False, use_regex=step["use_regex"]
                )
            )
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(made)
    tokenizer.decoder = library.decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = library.normalizers.NFC()
    bytes_ = library.pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = library.trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=bytes_, show_progress=False
    )
    tokenizer.train_from_iterator(LEARNT_FROM * 3, trainer)
    return json.loads(tokenizer.to_str())


def smollm() -> tuple[dict, dict]:
    """Without an initial alphabet, so that bytes that were not seen have no token."""
    state = learnt(DIGITS_PATTERN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], alphabet=False)
    return state, {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}


def qwen() -> tuple[dict, dict]:
    state = learnt(QWEN_PATTERN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], nfc=True)
    return state, {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False}


def llama3() -> tuple[dict, dict]:
    """As tiktoken's file of ids was converted: all pairs that make a token, sorted by its id, and
    the special tokens behind the vocabulary, the first of which stands before each text."""
    state = learnt(LLAMA3_PATTERN, [])
    vocab = state["model"]["vocab"]
    merges = []
    for token in sorted(vocab, key=vocab.get):
        pairs = [(token[:k], token[k:]) for k in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": len(vocab) + i, "content": name, **plain, "special": True}
        for i, name in enumerate([begin, end, "<|eot_id|>"])
    ]
    first = {"SpecialToken": {"id": begin, "type_id": 0}}
    frame = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, *({"Sequence": {"id": name, "type_id": 0}} for name in "AB")],
        "special_tokens": {begin: {"id": begin, "ids": [len(vocab)], "tokens": [begin]}},
    }
    level = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    state["post_processor"] = {"type": "Sequence", "processors": [level, frame]}
    state["model"] |= {"merges": merges, "ignore_merges": True}
    return {**state, "added_tokens": added}, {"tokenizer_class": "PreTrainedTokenizerFast"}


KINDS = {"smollm": smollm, "qwen": qwen, "llama3": llama3}


def written(folder: Path, state: dict, settings: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_the_file(kind, tmp_path):
    state, settings = KINDS[kind]()
    theirs = peer("tokenizers").Tokenizer.from_str(json.dumps(state))
    ours = read_llama_tokenizer(written(tmp_path, state, settings))
    again = tokenizer_from_json(ours.to_json())
    assert ours.vocab_size == theirs.get_vocab_size()
    for text in texts():
        want = theirs.encode(text).ids
        first = [ours.special_tokens[opening(ours)]] * (kind == "llama3")
        assert [*first, *ours.encode(text, "all")] == want, text
        assert [*first, *ours.encode_python(text, "all")] == want, text
        assert again.encode(text, "all") == ours.encode(text, "all")
        assert ours.decode(want) == theirs.decode(want, skip_special_tokens=False)
        if "<" not in text:
            assert [*first, *ours.encode_numpy(text).tolist()] == want


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_transformers_too(kind, tmp_path):
    """SmolLM2's settings name GPT2Tokenizer, with which version 5 splits as GPT-2 does: without
    that name it follows the file, as version 4 did in any case."""
    transformers = peer("transformers")
    state, settings = KINDS[kind]()
    if kind == "smollm":
        settings = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = written(tmp_path, state, settings)
    model_type = {"qwen": "qwen3"}.get(kind, "llama")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = read_llama_tokenizer(folder)
    for text in texts(100):
        # As sample.py reads a prompt; a space at its end is moved, unknown names are refused.
        if text and not text.endswith(" ") and not ("<|" in text and kind == "llama3"):
            want = theirs(text)["input_ids"] or [ours.special_tokens[opening(ours)]]
            assert encode_prompt(ours, text)[0] == want, text


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again(kind, tmp_path):
    ours = read_llama_tokenizer(written(tmp_path, *KINDS[kind]()))
    state = tokenizer_json(ours, "llama")
    theirs = peer("tokenizers").Tokenizer.from_str(json.dumps(state))
    if kind == "llama3":  # its merges are those that the ids imply, once each
        assert len(state["model"]["merges"]) == ours.vocab_size - 256 - 3
    again = read_llama_tokenizer(written(tmp_path / "again", state, {}))
    assert again.to_json() == ours.to_json()
    for text in texts(50):
        assert theirs.encode(text).ids[kind == "llama3" :] == ours.encode(text, "all")


def test_the_first_token_and_the_ends_are_known(tmp_path):
    for kind, names in {
        "smollm": ("<|endoftext|>", "<|endoftext|>"),
        "llama3": ("<|begin_of_text|>", "<|end_of_text|>"),
    }.items():
        ours = read_llama_tokenizer(written(tmp_path / kind, *KINDS[kind]()))
        assert (opening(ours), ending(ours)) == names
        first = ours.special_tokens[names[0]]
        assert encode_prompt(ours, "")[0] == [first]
        ids = encode_prompt(ours, "the year")[0]
        assert (ids[0] == first) == (kind == "llama3")
        assert encode_prompt(ours, f"{names[0]}the year")[0].count(first) == 1
        for name in (names[1], "<|im_end|>" if kind == "smollm" else "<|eot_id|>"):
            stream = TextStream(ours, [])
            shown = stream.feed(ours.encode("x")[0])
            assert (shown, stream.done) == ("x", False)
            assert (stream.feed(ours.special_tokens[name]), stream.done) == ("", True)


def test_bytes_without_a_token_are_left_out(tmp_path):
    ours = read_llama_tokenizer(written(tmp_path, *smollm()))
    assert len([t for t in ours.ranks if len(t) == 1]) < 256
    assert ours.decode(ours.encode("the\x04 year\x04")) == "the year"
    assert ours.encode("\x04") == [] == ours.encode_bytes(b"\xff")


CHANGES = {
    "no rule for the pre_tokenizer": ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer="),
    "lower case": ("normalizer", {"type": "Lowercase"}, "normalizer="),
    "an end token": ("post_processor", "end", "post_processor="),
    "a token with its surroundings": ("added_tokens", "lstrip", "takes its surroundings"),
    "dropout": ("model", {"dropout": 0.1}, "dropout=0.1 is not supported"),
    "merges in another order": ("model", "swapped", "merge"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_exact_is_refused_by_name(kind, change, tmp_path):
    state, settings = KINDS[kind]()
    field, value, message = CHANGES[change]
    state = copy.deepcopy(state)
    if value == "end":
        name = state["added_tokens"][-1]["content"]
        id_ = state["added_tokens"][-1]["id"]
        last = {"SpecialToken": {"id": name, "type_id": 0}}
        single = [{"Sequence": {"id": "A", "type_id": 0}}, last]
        known = {name: {"id": name, "ids": [id_], "tokens": [name]}}
        value = {"type": "TemplateProcessing", "single": single, "pair": single}
        state[field] = {**value, "special_tokens": known}
    elif value == "lstrip":
        state[field][0]["lstrip"] = True
    elif value == "swapped":
        merges = state["model"]["merges"]
        merges[3], merges[-1] = merges[-1], merges[3]
    elif field == "model":
        state[field] |= value
    else:
        state[field] = value
    with pytest.raises(ValueError, match=message) as refusal:
        read_llama_tokenizer(written(tmp_path, state, settings))
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("qwen", {"add_bos_token": True}, "add_bos_token=True is not supported, only False is"),
        ("llama3", {"add_bos_token": False}, "add_bos_token=False is not supported"),
        ("smollm", {"add_prefix_space": True}, "add_prefix_space=True is not supported"),
        ("smollm", {"tokenizer_class": "Qwen2Tokenizer"}, "otherwise than Qwen2Tokenizer does"),
        ("smollm", {"tokenizer_class": "BertTokenizer"}, "tokenizer_class=BertTokenizer"),
        ("smollm", {"auto_map": {"AutoTokenizer": ["a.b", None]}}, "is code, which is not run"),
        (
            "smollm",
            {"additional_special_tokens": ["<|new|>"]},
            "'<|new|>' is not in tokenizer.json",
        ),
    ],
)
def test_settings_that_say_otherwise_are_refused(kind, settings, message, tmp_path):
    state, usual = KINDS[kind]()
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        read_llama_tokenizer(written(tmp_path, state, {**usual, **settings}))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither tokenizer.json nor tokenizer.model"):
        read_llama_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x03abc")
    with pytest.raises(ValueError, match=r"tokenizer\.model: "):
        read_llama_tokenizer(tmp_path)
    state, settings = llama3()
    state["post_processor"] = None
    with pytest.raises(ValueError, match=r"post_processor=None is not supported"):
        read_llama_tokenizer(written(tmp_path, state, settings))
