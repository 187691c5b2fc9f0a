"""tasks/text.py: windows of a text, prompts, tokens that are drawn, text that streams."""

import csv
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from test_data import windows

import decoding
import sample
import train
from bpe import END_OF_TEXT, GPT2_PATTERN, Tokenizer
from engine.graphs import TextSteps
from model import GPT, GPTConfig
from tasks import text
from tasks.text import Data, Pick, SampleFlags, TextStream, complete, encode_prompt

BYTES = Tokenizer({bytes([i]): i for i in range(256)}, GPT2_PATTERN, {END_OF_TEXT: 256})
WORDS = Tokenizer.train(["to be or not to be that is the question " * 20], 300)


def gpt(block_size=13, vocab_size=320) -> GPT:
    """Untrained, with weights large enough that its choices depend on all of the context."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 24}
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=block_size, **sizes)).eval()
    for name, p in model.named_parameters():
        if p.dim() == 2:  # the head is tied to the token embeddings: large ones repeat themselves
            nn.init.normal_(p, std=0.1 if name.startswith("token") else 0.5)
    return model


# ---- tables ------------------------------------------------------------------------------------


def test_a_table_gives_its_text_column(tmp_path, monkeypatch):
    """GPT learnt the commas and the labels, without a word."""
    monkeypatch.chdir(tmp_path)
    rows = [(f'He said "{i}",\nand left', "pos") for i in range(30)]
    with Path("a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "text", "label"), *((7, *row) for row in rows)])
    corpus = text.open_text("a.csv", tmp_path)
    found = [*corpus.pieces("train"), *corpus.pieces("validation")]
    assert sorted(found) == sorted((x, True) for x, _ in rows)
    assert corpus.rule == "3 of 30 rows, drawn with a fixed seed, validate"
    whole = text.open_text("a.csv", tmp_path, valid="a.csv")  # to be scored
    assert [x for x, _ in whole.pieces("validation")] == [x for x, _ in rows]
    Path("b.tsv").write_text("body\tlabel\na\tb\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"2 columns, and no known names: name .* \(text\): body"):
        text.open_text("b.tsv", tmp_path)
    settings = ["--vocab_size=300", "--block_size=8", "--n_layer=1", "--n_head=2", "--n_embd=8"]
    settings += ["--steps=2", "--eval_interval=2", "--tokens_per_step=32", "--device=cpu"]
    train.main(["--data=a.csv", *settings, "--out=run"])
    sample.main(["--checkpoint=run/best.pt", "--eval=a.csv"])


# ---- windows -------------------------------------------------------------------------------------


def test_an_epoch_shows_each_window_once_and_the_next_one_is_shifted():
    """Sampling with replacement would leave a third of the text unseen in an epoch."""
    ids = np.arange(1000, dtype=np.uint16)
    data_ = train_windows(ids, block_size=10, batch_size=7)
    n = data_.n_windows
    assert n == 99
    for epoch in range(3):
        starts = sorted(data_.starts(np.arange(epoch * n, epoch * n + n)))
        assert [b - a for a, b in pairwise(starts)] == [10] * (n - 1)
    assert len({data_.starts(np.arange(e * n, e * n + n)).min() for e in range(8)}) > 3


def train_windows(ids, **options):
    file = SimpleNamespace(ids=ids, text_bytes=len(ids))
    corpus = SimpleNamespace(hash="", prompts=[""], rule="", name="numbers")
    return Data(file, corpus, "train", None, **options)


def test_targets_are_the_tokens_that_follow():
    data_ = train_windows(np.arange(1000, dtype=np.uint16), block_size=10, batch_size=7)
    batch = data_.batch(3)
    assert batch["tokens"].shape == batch["targets"].shape == (7, 10)
    assert (batch["targets"] == batch["tokens"] + 1).all()


def test_batches_are_a_pure_function_of_seed_and_index():
    ids = np.random.default_rng(0).integers(0, 1000, 500).astype(np.uint16)
    one, two = (train_windows(ids, block_size=10, batch_size=7) for _ in range(2))
    [one.batch(i) for i in range(20)]  # epochs behind it and the cache full
    for i in (0, 5, 6, 7, 31):  # 7 batches of 7 are an epoch of 49: some span two
        assert (one.batch(i)["tokens"] == two.batch(i)["tokens"]).all()
    other = train_windows(ids, block_size=10, batch_size=7, seed=1)
    assert (one.batch(0)["tokens"] != other.batch(0)["tokens"]).any()


def test_batch_size_regroups_the_same_windows():
    """The windows of two batches of 4 are those of one batch of 8, so accumulation is exact."""
    ids = np.arange(1000, dtype=np.uint16)
    small = train_windows(ids, block_size=10, batch_size=4)
    large = train_windows(ids, block_size=10, batch_size=8)
    halves = [*small.batch(6)["tokens"].tolist(), *small.batch(7)["tokens"].tolist()]
    assert large.batch(3)["tokens"].tolist() == halves


@pytest.mark.parametrize("n", [9, 10, 16, 17])
def test_texts_of_about_one_window(n):
    data_ = train_windows(np.arange(n, dtype=np.uint16), block_size=8, batch_size=2)
    assert data_.batch(5)["tokens"].shape == (2, 8)
    with pytest.raises(ValueError, match=rf"has {n} tokens, fewer.*--block_size {n - 1} or less"):
        train_windows(np.arange(n, dtype=np.uint16), block_size=n, batch_size=2)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_validation_scores_every_token_once(toy, batch_size):
    _, validation = windows("toy.txt", batch_size=batch_size)
    targets = [validation.batch(i)["targets"] for i in range(validation.n_batches)]
    scored = [t for batch in targets for t in batch.flatten().tolist() if t != -100]
    assert scored == validation.ids[1:].tolist()
    text = (toy / "toy.txt").read_bytes()
    assert validation.scored_bytes == len(text) - int(len(text) * 0.9)
    report = validation.report({"loss": 7.0 * math.log(2)}, {"loss": 2})
    assert report["bits_per_byte"] == pytest.approx(7.0 / validation.scored_bytes)
    assert report["loss"] == pytest.approx(3.5 * math.log(2))
    assert report["perplexity"] == pytest.approx(2**3.5)


def test_a_limited_evaluation_is_spread_over_the_text(toy):
    _, validation = windows("toy.txt", eval_tokens=40)
    assert len(validation.chosen) == 5 and validation.chosen[0] == 0
    gaps = np.diff([*validation.chosen, validation.n_windows])
    assert gaps.max() - gaps.min() <= 1
    batches = [validation.batch(i) for i in range(validation.n_batches)]
    kept = [t for b in batches for t in b["targets"].flatten().tolist() if t != -100]
    assert validation.scored_bytes == len(validation.tokenizer.decode_bytes(kept))


# ---- prompts -> texts ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_of_a_batch_equal_one_by_one(temperature):
    # In float64: products of other sizes are rounded otherwise, and in float32 one run in thirty
    # has a token at the very border of what top_p keeps.
    model, prompts = gpt().double(), ["to be", "t", "or not to be that is", ""]
    config = SampleFlags(temperature=temperature, max_new_tokens=20, num_samples=3, top_p=0.9)
    together = complete(model, WORDS, prompts, config)
    assert together == [t for p in prompts for t in complete(model, WORDS, [p], config)]
    assert len(set(together)) == (4 if temperature == 0 else 12)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_of_a_fixed_size_take_the_place_of_growing_caches(monkeypatch, temperature):
    model, made = gpt(), []
    flags = SampleFlags(temperature=temperature, max_new_tokens=20, num_samples=2)
    want = complete(model, WORDS, ["to be ", "or"], flags)
    monkeypatch.setattr(
        decoding, "text_steps", lambda *args: made.append(TextSteps(*args)) or made[0]
    )
    assert complete(model, WORDS, ["to be ", "or"], flags) == want and len(made) == 1


def test_equal_seeds_give_equal_samples_and_others_do_not():
    model = gpt()
    one, two, three = (
        complete(model, WORDS, ["to"], SampleFlags(seed=s, max_new_tokens=20)) for s in (1, 1, 2)
    )
    assert one == two != three


def test_padded_ids_are_never_chosen():
    """The model's vocabulary may be padded; such an id once crashed the decoder."""
    model = gpt(vocab_size=320)
    with torch.no_grad():
        model.token_embedding.weight[WORDS.vocab_size :] = 5.0  # they would win every time
    for temperature in (0.0, 2.0):
        config = SampleFlags(temperature=temperature, max_new_tokens=30, top_p=1.0)
        assert complete(model, WORDS, ["to"], config)[0] != ""


# ---- tokens -> text ------------------------------------------------------------------------------


def feed(text: str, stop: list[str]) -> tuple[list[str], TextStream]:
    stream = TextStream(BYTES, stop)
    return [stream.feed(b) for b in text.encode()] + [stream.finish()], stream


def test_stream_waits_for_whole_characters():
    shown, stream = feed("aé😀b", [])
    assert shown == ["a", "", "é", "", "", "", "😀", "b", ""] and stream.text == "aé😀b"
    stream = TextStream(BYTES, [])
    assert [stream.feed(0xF0), stream.feed(0x9F), stream.finish()] == ["", "", "�"]


@pytest.mark.parametrize(
    "stop,want",
    [
        (["END"], "one EN two "),
        (["zzz"], "one EN two END three"),
        (["three", "two"], "one EN "),
        ([""], "one EN two END three"),
        (["o"], ""),
        (["e", "ne E"], "on"),
    ],
)
def test_stop_strings_end_the_text_and_are_not_shown(stop, want):
    shown, stream = feed("one EN two END three", stop)
    assert "".join(shown) == stream.text == want
    assert all(part in want for part in shown)


def test_text_held_back_as_half_a_stop_string_is_shown_in_the_end():
    shown, _ = feed("abcEN", ["END"])
    assert shown[-1] == "EN" and "".join(shown) == "abcEN"


def test_end_of_text_ends_the_text():
    stream = TextStream(BYTES, [])
    assert stream.feed(97) == "a" and stream.feed(256) == "" and stream.done
    assert stream.feed(98) == "" and stream.text == "a"


# ---- prompts -------------------------------------------------------------------------------------


def test_special_tokens_in_a_prompt():
    ids, _ = encode_prompt(WORDS, f"to{END_OF_TEXT}be")
    assert WORDS.special_tokens[END_OF_TEXT] in ids
    assert encode_prompt(WORDS, "")[0] == [WORDS.special_tokens[END_OF_TEXT]]
    with pytest.raises(ValueError, match=r"<\|im_start\|> is no special token.*<\|endoftext\|>"):
        encode_prompt(WORDS, "to <|im_start|> be")


def test_a_space_at_the_end_belongs_to_the_next_word():
    """After a lone space a model expects anything but a word: training never shows it one."""
    ids, lead = encode_prompt(WORDS, "to be ")
    assert (ids, lead) == (WORDS.encode("to be"), b" ")
    model = gpt()
    config = SampleFlags(max_new_tokens=8, num_samples=20, temperature=2.0, top_p=1.0)
    shown = {}
    texts = complete(
        model, WORDS, ["to be "], config, lambda r, t: shown.update({r: shown.get(r, "") + t})
    )
    assert [shown.get(r, "") for r in range(20)] == texts and len(set(texts)) == 20
    pick = Pick(WORDS, config, [b" "] * 20)
    first = pick(torch.randn(1, 320).expand(20, -1).clone(), list(range(20))).tolist()
    assert all(WORDS.decode_bytes([i]).startswith(b" ") for i in first) and len(set(first)) > 1
    after = pick(torch.randn(1, 320).expand(20, -1).clone(), list(range(20))).tolist()
    assert not all(WORDS.decode_bytes([i]).startswith(b" ") for i in after)
    assert encode_prompt(WORDS, "to  ")[1] == encode_prompt(WORDS, "\n ")[1] == b""


# ---- what the engine calls -----------------------------------------------------------------------


def test_eval_takes_all_of_ones_own_text_and_a_named_ones_last_part(toy, monkeypatch):
    model, tokenizer, scored = gpt(block_size=16), windows("toy.txt")[0].tokenizer, []
    flags = SampleFlags(eval="toy.txt", cache_dir="cache", batch_size=2)
    text.sample(model, tokenizer, flags, {}, scored.append)
    everything = (toy / "toy.txt").read_text(encoding="utf-8")
    want = [tokenizer.special_tokens[END_OF_TEXT], *tokenizer.encode(everything)]
    assert scored[0].ids[:].tolist() == want
    assert scored[0].batch(0)["tokens"].shape == (2, 16)
    monkeypatch.setattr(text, "NAMES", ("toy.txt",))
    text.sample(model, tokenizer, flags, {}, scored.append)
    assert scored[1].ids[:].tolist() == windows("toy.txt")[1].ids[:].tolist() != want


def test_prompts_are_printed_and_shown_with_their_continuations(capsys):
    model, flags = gpt(), {"max_new_tokens": 9, "temperature": 0}
    (one,) = complete(model, WORDS, ["to"], SampleFlags(**flags))
    text.sample(model, WORDS, SampleFlags(prompt=["to"], **flags), {}, print)
    assert capsys.readouterr().out == f"to{one}\n"
    text.sample(model, WORDS, SampleFlags(prompt=["to", "to"], **flags), {}, print)
    parts = [f"--- prompt {i}, sample 1\nto{one}\n" for i in (1, 2)]
    assert capsys.readouterr().out == "".join(parts)
    data = SimpleNamespace(prompts=["to be", ""])
    texts = complete(model, WORDS, data.prompts, SampleFlags())
    assert text.show(model, WORDS, data, None) == [f"to be{texts[0]}", texts[1]]


def test_more_of_the_kind_is_asked_for_with_the_first_prompt():
    assert text.ask(["to be", "or"]) == ("--prompt", "to be")
    assert text.ask([]) == text.ask([""]) == ()


def test_the_plan_knows_the_shapes_of_a_batch(toy):
    batch = windows("toy.txt")[0].batch(0)
    assert text.batch_shapes(None, None, 3, 8) == {k: tuple(v.shape) for k, v in batch.items()}


def test_flags_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="--eval and --prompt are two things to do: give one"):
        SampleFlags(eval="toy.txt", prompt=["to"])
    with pytest.raises(ValueError, match=r"--top_p 1.5 is out of range: choose between 0 and 1"):
        SampleFlags(top_p=1.5)
