"""tasks/choices.py: questions with options beside an oracle of one forward each, and by hand."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, TOY_LLAMA, TOY_LSTM, TOY_NGRAM, TOYS, peer, write_labelled

import sample
import train
from bpe import END_OF_TEXT, GPT2_PATTERN, Tokenizer
from data.byte_fallback import BYTES as BYTE_PIECES
from data.byte_fallback import ByteFallbackBPE
from engine.hub.peers import hugging_face_gpt2, hugging_face_llama, with_our_weights
from model import GPT, GPTConfig
from models.llama import Llama, LlamaConfig
from tasks import complete, stream, text
from tasks.choices import (
    Prompts,
    Question,
    Sequence,
    accuracies,
    draw_shots,
    log_probabilities,
    print_accuracies,
    read_questions,
    repeated,
)
from tasks.text import SampleFlags

BYTES = Tokenizer({bytes([i]): i for i in range(256)}, GPT2_PATTERN, {END_OF_TEXT: 256})
WORDS = Tokenizer.train(["to be or not to be that is the question " * 20], 300)
ROWS = [
    Question(1, "to be or", (" not to be", " not", " that is the question"), 0),
    Question(2, "that is", (" the question", " to be"), 1),
    Question(3, "to", (" be", " or"), 0),
    Question(4, "is that", (" the", " a question", " not", " or"), 2),
]


def network(kind: str) -> nn.Module:
    """Untrained, with weights large enough that all of the context matters; the vocabulary is
    padded."""
    sizes = {"vocab_size": 320, "block_size": 37, "n_layer": 2, "n_head": 2, "n_embd": 24}
    made = {"gpt": lambda: GPT(GPTConfig(**sizes)), "llama": lambda: Llama(LlamaConfig(**sizes))}
    model = made[kind]().eval()
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.4)
    return model


def prompts(rows=ROWS, tokenizer=WORDS, *, pool=None, shots=0, block_size=37, seed=0) -> Prompts:
    some = {"shots": shots, "block_size": block_size, "seed": seed}
    return Prompts(rows, pool or rows, tokenizer, **some)


def one_by_one(forward, sequences: list[Sequence]) -> list[float]:
    """No batch, no padding, nothing shared, probabilities of all tokens."""
    found = []
    for ids, start in sequences:
        log_p = forward(torch.tensor([ids])).log_softmax(-1)[0]
        found.append(sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids))))
    return found


# ---- probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("shots", [0, 1])
def test_scores_equal_those_of_transformers_one_by_one(kind, shots):
    transformers, model = peer("transformers"), network(kind)
    if kind == "gpt":
        theirs = with_our_weights(hugging_face_gpt2(transformers, model.config), "gpt", model)
    else:
        theirs = hugging_face_llama(transformers, model)
    sequences = prompts(shots=shots).sequences
    with torch.no_grad():
        want = one_by_one(lambda tokens: theirs.eval()(tokens).logits, sequences)
    assert len(sequences) == 11 and len({round(total, 3) for total in want}) == 11
    assert log_probabilities(model, sequences) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_batches_change_nothing(kind):
    model, sequences = network(kind).double(), prompts(shots=2).sequences
    want = one_by_one(lambda tokens: model(tokens), sequences)
    for size in (1, 7, 1000):
        assert log_probabilities(model, sequences, size) == pytest.approx(want, rel=1e-5)
    turned = log_probabilities(model, sequences[::-1], 7)[::-1]
    assert turned == pytest.approx(want, rel=1e-5)


def test_choices_of_one_token_share_a_pass(monkeypatch):
    """With equal inputs but other scored places: the longer stretch serves both."""
    model, seen, heads = network("gpt"), [], []
    sequences = [Sequence([1, 2, 3, 4], 3), Sequence([1, 2, 3, 5], 2), Sequence([1, 2, 9], 1)]
    with torch.no_grad():
        want = one_by_one(model, sequences)
    features, head = model.features, model.head
    monkeypatch.setattr(model, "features", lambda x: seen.append(x.tolist()) or features(x))
    monkeypatch.setattr(model, "head", lambda x: heads.append(len(x)) or head(x))
    found = log_probabilities(model, sequences)
    assert seen == [[[1, 2, 3], [1, 2, 0]]] and heads == [2 + 2]
    assert found == pytest.approx(want, rel=1e-5)


def test_nan_is_refused():
    model = network("gpt")
    with torch.no_grad():
        model.token_embedding.weight[5] = math.nan
    with pytest.raises(ValueError, match="the model's logits are not numbers"):
        log_probabilities(model, [Sequence([1, 5, 3], 1)])


# ---- borders -------------------------------------------------------------------------------------


def test_question_and_choice_are_encoded_together():
    """A token that crosses the border is scored; cut there, they would be other tokens."""
    whole = WORDS.encode("to be")
    assert [WORDS.decode([i]) for i in whole] == ["to", " be"]
    for question, choice, start in (("to", " be", 2), ("to ", "be", 2), ("t", "o be", 1)):
        found = prompts([Question(1, question, (choice, "x"), 0)]).sequences[0]
        assert found == ([WORDS.special_tokens[END_OF_TEXT], *whole], start)
    everything = prompts([Question(1, "", ("to be", "to"), 0)]).sequences
    assert [start for _, start in everything] == [1, 1]


def test_names_of_special_tokens_are_text():
    rows = [Question(1, f"a{END_OF_TEXT}", (END_OF_TEXT, "b"), 0)]
    ids, start = prompts(rows, BYTES).sequences[0]
    assert ids == [256, *f"a{END_OF_TEXT * 2}".encode()] and start == 2 + len(END_OF_TEXT)


@pytest.mark.parametrize("prepend", ["legacy", "first", "always", "never"])
def test_the_space_in_front_that_sentencepiece_adds(prepend):
    names = {"<unk>": 0, "<s>": 1, "</s>": 2}
    pieces = [*names, *BYTE_PIECES, "▁", "a", "b", "▁a", "▁b"]
    at = {piece: i for i, piece in enumerate(pieces)}
    merges = [(at["▁"], at["a"]), (at["▁"], at["b"])]
    tokenizer = ByteFallbackBPE(pieces, merges, names, prepend)
    lead = "a" if prepend == "never" else "▁a"
    for question, choice in (("a", " b"), ("a ", "b")):
        (found, _) = prompts([Question(1, question, (choice, "é"), 0)], tokenizer).sequences
        assert found == ([1, at[lead], at["▁b"]], 2)
    (_, found) = prompts([Question(1, "a", (" b", "é"), 0)], tokenizer).sequences
    assert found == ([1, at[lead], at["<0xC3>"], at["<0xA9>"]], 2)
    (found, _) = prompts([Question(1, "", ("a", "b"), 0)], tokenizer).sequences
    assert found == ([1, at[lead]], 1)


def test_a_normal_form_that_joins_letters_across_the_border():
    state = ({bytes([i]): i for i in range(256)}, GPT2_PATTERN, {END_OF_TEXT: 256})
    tokenizer = Tokenizer(*state, nfc=True)
    ids, start = prompts([Question(1, "xe", ("\u0301!", "?"), 0)], tokenizer).sequences[0]
    assert ids == [256, *"xé!".encode()] and start == 3  # the byte 0xC3 stands where e stood


# ---- examples ------------------------------------------------------------------------------------


def test_a_prompt_is_examples_and_the_question_with_blank_lines_between():
    rows = [Question(1, "a", ("b", "c"), 1), Question(2, "d", ("e", "f"), 0)]
    found = prompts(rows, BYTES, shots=1).sequences
    assert [BYTES.decode(ids[1:]) for ids, _ in found] == [
        *("de\n\nab", "de\n\nac"),
        *("ac\n\nde", "ac\n\ndf"),
    ]
    assert [start for _, start in found] == [6] * 4


def test_examples_are_never_the_row_itself_nor_its_question():
    pool = [Question(i, f"q{i // 2}", ("a", "b"), i % 2) for i in range(12)]
    for row, question in enumerate(pool):
        some = {"alike": 2, "shots": 10, "seed": 3}
        found = draw_shots(pool, row, question.text, **some)
        assert len({example.line for example in found}) == 10
        assert question.text not in {example.text for example in found}


def test_examples_are_a_pure_function_of_seed_and_row():
    pool = [Question(i, f"q{i}", ("a", "b"), 0) for i in range(40)]

    def drawn(row: int, seed: int) -> list[int]:
        some = {"alike": 1, "shots": 4, "seed": seed}
        return [example.line for example in draw_shots(pool, row, "q0", **some)]

    assert drawn(5, 1) == drawn(5, 1)
    assert len({tuple(drawn(row, seed)) for row in range(5) for seed in (-1, 1, 10**30)}) == 15
    often = [line for row in range(2000) for line in drawn(row, 1)]
    counts = [often.count(i) for i in range(40)]
    assert counts[0] == 0 and min(counts[1:]) > 150 and max(counts) < 260  # 205 are expected


def test_too_few_examples_are_refused():
    with pytest.raises(ValueError, match=r"--shots 4 is too many for line 1: there are 3 examples"):
        prompts(shots=4)
    pool = [Question(9, "to be or", ("a", "b"), 0)] * 5
    with pytest.raises(ValueError, match=r"line 1: there are 0 examples with another question"):
        prompts(pool=pool, shots=1)
    assert len(prompts(shots=0).sequences) == 11


def test_examples_that_do_not_fit_are_left_out_from_the_front_and_counted():
    rows = [Question(i, c * 4, ("1", "22"), 0) for i, c in enumerate("abcd")]
    whole = prompts(rows, BYTES, shots=3, block_size=99)
    assert whole.note() == "" and len(whole.sequences[1].ids) == 1 + 3 * 7 + 4 + 2
    fits = prompts(rows, BYTES, shots=3, block_size=27)
    assert fits.note() == "" and fits.sequences == whole.sequences
    short = prompts(rows, BYTES, shots=3, block_size=26)
    assert short.note() == "examples left out: 4 (the model sees 26 tokens)"
    for ours, theirs in zip(short.sequences, whole.sequences, strict=True):
        assert ours == ([256, *theirs.ids[8:]], theirs.start - 7)


def test_a_question_that_does_not_fit_loses_its_beginning():
    rows = [Question(1, "abcdef", ("1", "22"), 0), Question(2, "ab", ("1", "22"), 0)]
    found = prompts(rows, BYTES, shots=1, block_size=5)
    assert found.note() == (
        "examples left out: 2, questions without their beginning: 1 (the model sees 5 tokens)"
    )
    assert found.sequences == [
        (list(b"cdef1"), 4),  # of both choices the same text is left
        (list(b"cdef22"), 4),
        ([256, *b"ab1"], 3),
        ([256, *b"ab22"], 3),
    ]
    with pytest.raises(
        ValueError, match=r"line 7: the choice 'abcdef' has 6 tokens, and the model sees 5:"
    ):
        prompts([Question(7, "x", ("abcdef", "1"), 0)], BYTES, block_size=5)
    assert prompts([Question(7, "x", ("abcde", "1"), 0)], BYTES, block_size=5).cut == 1


def test_a_choice_without_tokens_is_refused():
    """SmolLM2's vocabulary lacks some bytes, which are left out of a text."""
    state = ({bytes([i]): i for i in range(1, 256)}, GPT2_PATTERN, {END_OF_TEXT: 256})
    tokenizer = Tokenizer(*state, foreign=True)
    with pytest.raises(ValueError, match=r"line 1: the choice .* has no tokens"):
        prompts([Question(1, "a\0", ("\0", "b"), 0)], tokenizer)
    assert prompts([Question(1, "a\0", ("b\0", "c"), 0)], tokenizer).sequences[0][1] == 2


# ---- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,said",
    [
        ({"question": None}, "its question is missing, or no text"),
        ({"choices": "ab"}, "its choices are no list of two or more"),
        ({"choices": ["a"]}, "its choices are no list of two or more"),
        ({"choices": ["a", ""]}, "one of its choices is empty, or no text"),
        ({"choices": ["a", None]}, "one of its choices is empty, or no text"),
        ({"answer": 2}, "its answer 2 is none of 0 to 1"),
        ({"answer": -1}, "its answer is no whole number"),
        ({"answer": 0.0}, "its answer is no whole number"),
        ({"answer": True}, "its answer is no whole number"),
        ({"answer": "A"}, "its answer is no whole number"),
    ],
)
def test_broken_rows_are_refused_with_their_line(tmp_path, change, said):
    row = {"question": "a", "choices": [" b", " c"], "answer": 1}
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(row)}\n\n{json.dumps(row | change)}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"line 3: {said}"):
        read_questions("choices", path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n", encoding="utf-8")
    for name, said in (("a.csv", "no .jsonl here"), ("b.jsonl", "no .jsonl here"), ("a.jsonl", "")):
        with pytest.raises(ValueError, match=rf"--shots_from .*{name} .*{said or 'no rows'}"):
            read_questions("shots_from", tmp_path / name)


def test_flags_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="--shots and --shots_from need questions"):
        SampleFlags(shots=1)
    with pytest.raises(ValueError, match="--shots and --shots_from need questions"):
        SampleFlags(shots_from="a.jsonl")
    for other in ({"prompt": ["a"]}, {"eval": "a.txt"}):
        with pytest.raises(ValueError, match="--choices is a thing to do by itself"):
            SampleFlags(choices="a.jsonl", **other)


# ---- what is printed -----------------------------------------------------------------------------


def test_accuracies_by_hand():
    """Each way has another winner in the first row; the second is a tie, which its first choice
    wins; the third has the right answer each time."""
    rows = [
        Question(1, "", ("ab", "abcdef", "abc"), 0),
        Question(2, "", ("a", "b"), 1),
        Question(3, "", ("a", "b"), 1),
    ]
    sequences = [Sequence([0] * (2 + n), 2) for n in (1, 2, 5, 1, 1, 1, 1)]
    sums = [-4.0, -6.0, -5.0, -1.0, -1.0, -2.0, -1.0]  # per token 4, 3, 1; per character 2, 1, 5/3
    found = accuracies(rows, sequences, sums)
    assert found["summed"] == pytest.approx((2 / 3, math.sqrt(2 / 27)))
    assert found["per token"] == found["per character"] == pytest.approx((1 / 3, (2 / 27) ** 0.5))
    assert repeated(rows, [0, 0, 0], sums) == 2 and repeated(rows, [1, 1, 1], sums) == 1
    rows[0] = rows[0]._replace(answer=2)
    assert {way: share for way, (share, _) in accuracies(rows, sequences, sums).items()} == (
        pytest.approx({"summed": 1 / 3, "per token": 2 / 3, "per character": 1 / 3})
    )


@pytest.fixture
def toy_choices(tmp_path, monkeypatch) -> SimpleNamespace:
    """Flags for a file in which the right choice follows from the question's last letter."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"question": f"{i} {'ab'[i % 2]}", "choices": [" to", " be", " or"], "answer": i % 2}
        for i in range(20)
    ]
    Path("q.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return SampleFlags(choices="q.jsonl", batch_size=3)


def test_a_model_that_knows_is_always_right(toy_choices, capsys):
    """One that answers by what was read last, and one that says the same to everything."""
    ids = [WORDS.encode(f" {word}")[0] for word in ("to", "be", "or")]
    a, b = (WORDS.encode(f"1 {letter}")[-1] for letter in "ab")

    class Knows(nn.Module):
        config = SimpleNamespace(block_size=64)

        def __init__(self, known: bool):
            super().__init__()
            table = torch.zeros(WORDS.vocab_size, WORDS.vocab_size)
            table[a, ids[0]] = table[b, ids[known]] = 9.0
            self.table = nn.Parameter(table)

        def features(self, tokens):
            return tokens

        def head(self, x):
            return self.table[x]

    print_accuracies(Knows(True), WORDS, toy_choices)
    assert capsys.readouterr().out == (
        "20 rows, 0 shots; chance has 0.3333, and answer 0, the commonest, 0.5000\n"
        "summed         1.0000 ± 0.0000\n"
        "per token      1.0000 ± 0.0000\n"
        "per character  1.0000 ± 0.0000\n"
    )
    print_accuracies(Knows(False), WORDS, toy_choices)
    assert "summed         0.5000 ± 0.1118\n" in capsys.readouterr().out
    toy_choices.shots = 1  # drawn evenly from both
    print_accuracies(Knows(False), WORDS, toy_choices)
    said = capsys.readouterr().out
    share = re.search(r"the answer of the example before the question is given in ([0-9.]+)", said)
    assert 0.2 < float(share[1]) < 0.8


@pytest.mark.parametrize("task", [text, complete, stream])
def test_every_task_of_texts_answers_and_says_what_it_left_out(toy_choices, task, capsys):
    model, said = network("gpt"), []
    for batch_size in (1, 7):
        flags = SampleFlags(choices="q.jsonl", shots=6, batch_size=batch_size)
        task.sample(model, WORDS, flags, {}, None)
        out, err = capsys.readouterr()
        assert re.search(r"note: examples left out: \d+ \(the model sees 37 tokens\)\n", err)
        said.append(out)
    assert said[0] == said[1] and said[0].startswith("20 rows, 6 shots")


NETWORKS = {"llama": TOY_LLAMA, "lstm": TOY_LSTM, "ngram": TOY_NGRAM, "complete": TOYS["complete"]}


@pytest.mark.slow
@pytest.mark.parametrize("task", NETWORKS)
def test_sample_answers_with_every_kind_of_network(toy, task, capsys):
    write_labelled(toy)
    train.main([*NETWORKS[task], *["--steps=2"] * (task != "ngram"), "--out=run"])
    capsys.readouterr()
    flags = ["--checkpoint=run/best.pt", "--choices=toy-choices.jsonl", "--shots=1"]
    sample.main(flags)
    assert re.search(r"^per character  0\.\d{4} ± 0\.\d{4}$", capsys.readouterr().out, re.M)


def test_the_page_makes_the_files_of_its_commands(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "incontext.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("sst2").mkdir()
    for name in ("train", "dev"):
        Path(f"sst2/{name}.tsv").write_text('a "b" c\t1\nd\t0\n', encoding="utf-8")
    subprocess.run([sys.executable, "-c", code], check=True)
    found = read_questions("choices", Path("dev.jsonl"))
    assert found == read_questions("choices", Path("train.jsonl"))
    assert found[0] == (1, 'Review: a "b" c\nSentiment:', (" negative", " positive"), 1)
    assert [row.answer for row in found] == [1, 0]
