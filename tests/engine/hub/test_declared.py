"""engine/hub/declared.py and the settings beside a tokenizer's files: what is accepted has the ids
of AutoTokenizer, the rest is refused by name."""

import json
import random
from pathlib import Path

import pytest
from conftest import peer
from converting import OURS, TASK, tokenizers

from engine.hub.importing import import_model
from engine.hub.mapping import their_settings
from engine.hub.tokenizer_files import note_on_case, read_tokenizer, tokenizer_json

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
END = "<|endoftext|>"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".[]abcdeght", "Berlin", "berlin"]
PIECES += ["##a", "##t", "##h", "##e", "##in", "[ENT]"]
N = 299  # tokens of the small GPT-2


def small(folder: Path, task: str, files: dict) -> Path:
    """A tokenizer of that task in the older files, with `files` {name: content} beside it."""
    folder.mkdir()
    config = their_settings(task, OURS[task][1])
    if task == "gpt":
        model = tokenizer_json(tokenizers()["seq2seq"], "gpt")["model"]
        files = {"vocab.json": model["vocab"], **files}
        merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
        (folder / "merges.txt").write_text(merges, encoding="utf-8")
    else:
        (folder / "vocab.txt").write_text("\n".join(PIECES), encoding="utf-8")
    for name, content in {"config.json": config, **files}.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def entry(content: str, **flags) -> dict:
    return {"content": content, **dict.fromkeys(("lstrip", "rstrip", "single_word"), False)} | flags


BERTS = {str(i): entry(name, normalized=False, special=True) for i, name in enumerate(PIECES[:5])}
ACCEPTED = [
    ("gpt", {}),
    ("gpt", {CONFIG: {"add_prefix_space": False, "add_bos_token": False, "errors": "replace"}}),
    ("gpt", {CONFIG: {"pad_token": "<pad>", "tokenizer_class": "GPT2TokenizerFast"}}),
    ("gpt", {CONFIG: {"pad_token": END, "bos_token": None}}),
    ("gpt", {ADDED: {"<pad>": N, "[ENT]": N + 1}}),
    ("gpt", {ADDED: {"[ENT]": N + 1, "<pad>": N}}),
    ("gpt", {MAP: {"pad_token": "<pad>", "bos_token": entry(END, normalized=True)}}),
    ("gpt", {MAP: {"pad_token": "<pad>", "additional_special_tokens": ["[ENT]", "<x>"]}}),
    ("gpt", {CONFIG: {"mask_token": "<m>", "pad_token": "<pad>", "eos_token": "[ENT]"}}),
    ("gpt", {CONFIG: {"extra_special_tokens": {"image": "<x>"}}, ADDED: {"<pad>": N}}),
    (
        "gpt",
        {
            CONFIG: {
                "added_tokens_decoder": {str(N): entry("<pad>", normalized=True, special=False)}
            },
            ADDED: {"[ENT]": N + 5},
            MAP: {"mask_token": "<m>"},
        },
    ),
    ("bert", {}),
    ("bert", {CONFIG: {"do_lower_case": False, "tokenizer_class": "BertTokenizerFast"}}),
    ("bert", {CONFIG: {"do_lower_case": False, "added_tokens_decoder": BERTS}, ADDED: {"<x>": 99}}),
    ("bert", {MAP: {"mask_token": "[MASK]", "unk_token": "[UNK]"}}),
    ("bert", {MAP: {"mask_token": entry("[MASK]", normalized=False)}, ADDED: {"[MASK]": 4}}),
]


@pytest.mark.parametrize("saved", [False, True], ids=["older files", "tokenizer.json"])
@pytest.mark.parametrize("task,files", ACCEPTED, ids=str)
def test_what_is_accepted_has_the_ids_of_auto_tokenizer(task, files, saved, tmp_path):
    """saved: transformers has written the tokenizer.json and its settings anew."""
    folder = small(tmp_path / "there", task, files)
    theirs = peer("transformers").AutoTokenizer.from_pretrained(folder)
    if saved:
        folder = tmp_path / "saved"
        theirs.save_pretrained(folder)
        theirs = peer("transformers").AutoTokenizer.from_pretrained(folder)
    ours = read_tokenizer(folder, task)
    assert ours.vocab_size == len(theirs)
    frame = (ours.ids["[CLS]"], ours.ids["[SEP]"]) if task == "bert" else ()
    parts = [END, "<pad>", "[ENT]", "<x>", "<m>", "[MASK]", "[mask]", "[ent]", "<", "|>", "]", "["]
    parts += ["the", "Berlin", "bert", " the", " ", "  ", "\n", "é", "\u200b", "a", "!!"]
    chosen = random.Random(0)
    for _ in range(300):
        text = "".join(chosen.choices(parts, k=chosen.randint(0, 8)))
        want = [*frame[:1], *ours.encode(text, "all"), *frame[1:]]
        assert theirs(text)["input_ids"] == want, text


LOWER = {"do_lower_case": False}
REFUSED = [
    ("gpt", {CONFIG: {"add_prefix_space": True}}, f"{CONFIG}: add_prefix_space=True"),
    ("gpt", {CONFIG: {"add_bos_token": True}}, "add_bos_token=True"),
    ("gpt", {CONFIG: {"add_eos_token": True}}, "add_eos_token=True"),
    ("gpt", {CONFIG: {"split_special_tokens": True}}, "split_special_tokens=True"),
    ("gpt", {CONFIG: {"tokenizer_class": "RobertaTokenizer"}}, "tokenizer_class=RobertaTokenizer"),
    ("gpt", {CONFIG: {"auto_map": {"AutoTokenizer": ["x.Y", None]}}}, "auto_map"),
    ("gpt", {CONFIG: {"x_token": "<x>"}}, f"{CONFIG}: x_token"),
    ("gpt", {CONFIG: {"pad_token": "!"}}, f"{CONFIG}: pad_token: '!' is an ordinary token"),
    ("gpt", {CONFIG: {"pad_token": entry("<pad>", lstrip=True)}}, "pad_token: '<pad>' takes its"),
    ("gpt", {CONFIG: dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<x>")}, END),
    ("gpt", {CONFIG: {"added_tokens_decoder": {"5000": entry("<x>")}}}, f"5000.*gives {N}"),
    (
        "gpt",
        {CONFIG: {"added_tokens_decoder": {"x": entry("<x>")}}},
        "added_tokens_decoder: the id",
    ),
    ("gpt", {CONFIG: {"added_tokens_decoder": {str(N): {}}}}, "added_tokens_decoder: the added"),
    ("gpt", {CONFIG: {"added_tokens_decoder": [1]}}, r"added_tokens_decoder=\[1\]"),
    ("gpt", {CONFIG: {"extra_special_tokens": 3}}, "extra_special_tokens=3"),
    ("gpt", {ADDED: {"<pad>": N + 1}}, rf"{ADDED}: '<pad>' has the id {N + 1}.*{N}"),
    ("gpt", {ADDED: {"<pad>": "no"}}, f"{ADDED}: the id 'no'"),
    ("gpt", {ADDED: {"<pad>": N}, CONFIG: {"pad_token": "<pad><x>"}}, "'<pad>' .* overlap"),
    ("gpt", {MAP: {"pad_token": entry("<pad>", single_word=True)}}, f"{MAP}: pad_token: '<pad>'"),
    (
        "gpt",
        {
            MAP: {"additional_special_tokens": ["<x>"]},
            CONFIG: {"additional_special_tokens": ["<y>"]},
        },
        f"{MAP}: additional_special_tokens differs",
    ),
    (
        "gpt",
        {MAP: {"additional_special_tokens": ["<x>"]}, CONFIG: {"extra_special_tokens": []}},
        f"{MAP}: additional_special_tokens differs",
    ),
    ("bert", {ADDED: {"[MASK]": 4}, CONFIG: {"eos_token": entry("[MASK]")}}, "is looked for"),
    ("bert", {ADDED: {"[ENT]": 22}, CONFIG: LOWER}, rf"{ADDED}: the added token '\[ENT\]'"),
    ("bert", {ADDED: {"<e>": 23}, CONFIG: LOWER}, f"{ADDED}: the added token '<e>'"),
    ("bert", {ADDED: {"[MASK]": 4}}, rf"{ADDED}: the added token '\[MASK\]' is looked for"),
    ("bert", {MAP: {"unk_token": "[PAD]"}}, rf"{MAP}: unk_token=\[PAD\]"),
    ("bert", {MAP: {"additional_special_tokens": ["<e>"]}}, f"{MAP}: additional_special_tokens"),
    ("bert", {CONFIG: {"clean_text": False}}, "clean_text=False"),
    ("bert", {CONFIG: {"cls_token": "[SEP]"}}, r"cls_token=\[SEP\]"),
    ("bert", {CONFIG: {"tokenizer_class": "BertJapaneseTokenizer"}}, "BertJapaneseTokenizer"),
]


@pytest.mark.parametrize("task,files,message", REFUSED, ids=str)
def test_what_changes_ids_otherwise_is_refused_by_name(task, files, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")) as error:
        read_tokenizer(small(tmp_path / "there", task, files), task)
    assert "\n" not in str(error.value)


def test_the_tokenizers_class_may_stand_in_the_models_config(tmp_path):
    folder = small(tmp_path / "there", "bert", {})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["tokenizer_class"] = "BertJapaneseTokenizer"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json: tokenizer_class=BertJapaneseTokenizer"):
        read_tokenizer(folder, "bert")


def test_a_tokenizer_json_that_its_class_would_not_use_is_refused(tmp_path, tokenizers):
    """transformers makes a GPT2Tokenizer from the vocabulary and merges of a tokenizer.json alone:
    GPT-4's splits in it would be ignored; and BertTokenizer lower-cases unless it is told."""
    for name, files in (("gpt4", {}), ("bert", {CONFIG: {"tokenizer_class": "BertTokenizer"}})):
        task = name if name in TASK else "gpt"
        folder = small(tmp_path / name, task, files)
        if task == "gpt":
            content, message = tokenizer_json(tokenizers[name], task), "PreTrainedTokenizerFast"
        else:
            cased = small(tmp_path / "cased", task, {CONFIG: LOWER})
            content, message = tokenizer_json(read_tokenizer(cased, task), task), "do_lower_case"
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_tokenizer(folder, task)
        said = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / CONFIG).write_text(json.dumps(said), encoding="utf-8")
        read_tokenizer(folder, task)


def test_a_cased_vocabulary_without_do_lower_case_is_noted(tmp_path):
    for number, (said, noted) in enumerate(
        [({}, True), (LOWER, False), ({"do_lower_case": True}, False)]
    ):
        folder = small(tmp_path / str(number), "bert", {CONFIG: said})
        note = note_on_case(folder, read_tokenizer(folder, "bert"))
        assert ("'Berlin'" in note and "do_lower_case" in note) == noted == bool(note)
    (folder / CONFIG).unlink()
    assert note_on_case(folder, read_tokenizer(folder, "bert"))
    lower = [piece.lower() if piece[0] != "[" else piece for piece in PIECES if piece != "berlin"]
    (folder / "vocab.txt").write_text("\n".join(lower), encoding="utf-8")
    assert not note_on_case(folder, read_tokenizer(folder, "bert"))


def test_import_prints_the_note(tmp_path):
    transformers = peer("transformers")
    folder = small(tmp_path / "there", "bert", {})
    said = transformers.BertConfig.from_pretrained(folder)
    transformers.BertForPreTraining(said).save_pretrained(folder)
    assert any("'Berlin'" in line for line in import_model(str(folder))[1])
