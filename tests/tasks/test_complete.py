"""tasks/complete.py: what a GPT is asked for, by hand, by perturbation, and when it samples."""

import gzip
import io
import json
import math
import re
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from conftest import TOY_LLAMA, peer, write_texts
from hypothesis import given, settings
from hypothesis import strategies as st

import convert
import sample
import train
from bpe import GPT2_PATTERN, PATTERNS, Tokenizer
from data.tables import Row, TableCorpus
from data.tokens import END_OF_TEXT
from engine import checkpoint as checkpoints
from engine.config import for_network
from engine.processes import Processes
from model import GPT, GPTConfig
from models.llama import Llama
from tasks import complete, text
from tasks.complete import Data, encode_prompt, split_space
from train import evaluate

BYTES = Tokenizer({bytes([i]): i for i in range(256)}, GPT2_PATTERN, {END_OF_TEXT: 256})
END = 256
WORDS = [
    "How",
    "much",
    "is",
    "7",
    "42",
    "?",
    "naïve",
    "déjà",
    "数",
    END_OF_TEXT,
    "it's\n\tso",
    ":",
    "",
]


def rows(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """n pairs of different lengths, no two the same; every third prompt ends with a space."""
    random, made = Random(seed), []
    for i in range(n):
        prompt = " ".join([str(i), *random.choices(WORDS, k=random.randint(0, 6))])
        answer = " ".join([*random.choices(WORDS, k=random.randint(0, 3)), f"{i}."])
        made.append((prompt.rstrip(" ") + " " * (i % 3 == 0), answer))
    return made


TRAIN, VALID = rows(150), rows(41, seed=1)
LEARNT = {
    name: Tokenizer.train([a + b for a, b in TRAIN] * 3, 400, pattern)
    for name, pattern in PATTERNS.items()
}


def write(name: str, pairs: list[tuple[str, str]]) -> str:
    lines = [json.dumps({"prompt": a, "completion": b, "id": 7}) + "\n" for a, b in pairs]
    Path(name).write_text("".join(lines), encoding="utf-8")
    return name


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("train.jsonl", TRAIN)
    write("valid.jsonl", VALID)


def splits(pairs=None, tokenizer=BYTES, block_size=96, **flags) -> tuple[Data, Data]:
    if pairs:
        write("train.jsonl", pairs)
    flags = {"data": "train.jsonl", "valid": "valid.jsonl", "batch_size": 3, **flags}
    flags.setdefault("tokens_per_step", flags["batch_size"] * block_size)
    base = {"seed": 1, "eval_tokens": 0, "row_length": 0, "cache_dir": "cache", "tokenizer": ""}
    config = SimpleNamespace(**{**base, "pattern": "gpt2", **flags})
    return Data.splits(config, {"vocab_size": 300, "block_size": block_size}, tokenizer)


def texts(data: Data, batch: dict) -> list[tuple[str, str]]:
    """(all before the completion, completion) of the rows that have targets, read from a batch."""
    found = []
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        asked = (targets != -100).nonzero()[:, 0]
        if not len(asked):
            continue
        first, last = int(asked[0]), int(asked[-1])
        assert len(asked) == last + 1 - first  # without a gap
        assert torch.equal(tokens[first + 1 : last + 1], targets[first:last])  # shifted by one
        before = tokens[: first + 1].tolist()
        found.append(tuple(map(data.tokenizer.decode, (before, targets[asked].tolist()))))
    return found


def epoch(data: Data, number: int = 0) -> list[tuple[str, str]]:
    steps = range(number * data.n_batches, (number + 1) * data.n_batches)
    return [row for i in steps for row in texts(data, data.batch(i))]


def wanted(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """What texts() should find: a space at the prompt's end belongs to the completion."""
    cut = [(a[:-1], " " + b) if a[-1:] == " " else (a, b) for a, b in pairs]
    return [(f"{END_OF_TEXT}{a}", f"{b}{END_OF_TEXT}") for a, b in cut]


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# ---- rows and batches ----------------------------------------------------------------------------


def test_rows_by_hand():
    data, _ = splits([("ab", "cd"), ("x", "yz!"), ("", "w")], batch_size=9)
    batch = data.batch(0)
    rows = {
        (tuple(tokens), tuple(targets))
        for tokens, targets in zip(*(batch[k].tolist() for k in ("tokens", "targets")), strict=True)
    }
    a, b, c, d, w, x, y, z, no = *b"abcdwxyz", -100
    assert rows == {
        ((END, a, b, c, d), (no, no, c, d, END)),
        ((END, x, y, z, ord("!")), (no, y, z, ord("!"), END)),
        ((END, w, END, END, END), (w, END, no, no, no)),
    }


@pytest.mark.parametrize("tokenizer", [BYTES, *LEARNT.values()], ids=["bytes", *LEARNT])
def test_every_row_comes_once_an_epoch_in_another_order_each_time(tokenizer):
    train, validation = splits(tokenizer=tokenizer)
    epochs = [epoch(train, number) for number in range(3)]
    assert all(sorted(found) == sorted(wanted(TRAIN)) for found in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sorted(epoch(validation)) == sorted(wanted(VALID))
    assert all(same(validation.batch(i), validation.batch(i)) for i in range(validation.n_batches))


def test_batches_are_a_pure_function_of_seed_and_index():
    train, validation = splits()
    n = train.n_batches
    want = {i: train.batch(i) for i in (0, n - 1, n, 5 * n + 3)}
    second, (other, still) = splits()[0], splits(seed=2)
    assert all(same(still.batch(i), validation.batch(i)) for i in range(still.n_batches))
    assert all(same(second.batch(i), want[i]) for i in sorted(want, reverse=True))
    assert not same(other.batch(0), want[0]) and other.fingerprint == train.fingerprint
    train.batch(0)["targets"].fill_(5)  # nobody's batch is anybody else's
    assert same(train.batch(0), want[0])


def test_a_batch_keeps_to_its_tokens_and_to_int64():
    for data in splits(batch_size=2):
        for i in range(data.n_batches):
            batch = data.batch(i)
            assert batch["tokens"].shape == batch["targets"].shape
            assert batch["tokens"].numel() <= data.tokens_per_batch == 2 * 96
            assert all(x.dtype == torch.int64 for x in batch.values())
            assert (batch["targets"][:, -1] != -100).any()  # no column is padding only
    assert data.tokens_per_epoch == data.n_batches * 2 * 96


@pytest.mark.parametrize("parts", [2, 5])
def test_a_step_holds_the_same_rows_however_many_micro_batches_share_it(parts):
    whole = splits(batch_size=10, tokens_per_step=960)[0]
    dealt = splits(batch_size=10 // parts, tokens_per_step=960)[0]
    assert dealt.n_batches == parts * whole.n_batches
    for step in range(whole.n_batches):
        together = [dealt.batch(step * parts + part) for part in range(parts)]
        assert sorted(texts(whole, whole.batch(step))) == sorted(
            row for batch in together for row in texts(dealt, batch)
        )
    few = splits(TRAIN[:3], batch_size=2, tokens_per_step=960)[0]  # fewer rows than it has parts
    counts = [len(texts(few, few.batch(i))) for i in range(few.n_batches)]
    assert sum(counts) == 3 and 0 in counts and len(few.batch(counts.index(0))["tokens"]) == 1


def test_limited_validation_is_evenly_spaced():
    whole = splits()[1]
    train, some = splits(eval_tokens=int(whole.buckets.lengths.sum()) // 4 + 1)
    assert some.chosen.tolist() == [k * 41 // 10 for k in range(10)]
    assert sorted(epoch(some)) == sorted(wanted([VALID[k] for k in some.chosen]))
    assert "10 rows, evenly spaced among 41, " in some.describe()
    assert len(train.chosen) == 150 and len(splits(eval_tokens=10**9)[1].chosen) == 41
    assert splits(eval_tokens=1)[1].chosen.tolist() == [0]


# ---- what is too long ----------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 3, 5, 7])
def test_a_prompt_loses_its_beginning_and_only_then_a_completion_its_end(T):
    pairs = [("qwertyu"[:p], "abcdefg"[:c]) for p in range(8) for c in range(1, 8)]
    data, _ = splits(pairs, row_length=T, batch_size=1)
    found, shortened, cut = [], 0, 0
    for prompt, completion in pairs:
        answer = completion + "$"
        cut += len(answer) > T
        answer = answer[:T]
        before = "^" + prompt
        while len(before) > 1 and len(before) + len(answer) > T + 1:
            before = before[1:]
        shortened += before[0] != "^" or len(before + answer) > T + 1
        assert len(before + answer) <= T + 1
        found.append(tuple(x.replace("^", END_OF_TEXT).replace("$", END_OF_TEXT)
                           for x in (before, answer)))  # fmt: skip
    assert sorted(epoch(data)) == sorted(found)
    assert (data.shortened, data.cut) == (shortened, cut)
    assert f"; {cut} completions of {T} tokens or more are cut" in data.describe()
    assert f"; {shortened} prompts are cut at their beginning" in data.describe()
    assert max(data.batch(i)["tokens"].size(1) for i in range(data.n_batches)) == T
    assert "cut" not in splits()[0].describe()


def test_rows_are_no_longer_than_the_model():
    assert splits(row_length=500)[0].row_length == splits()[0].row_length == 96
    assert splits(row_length=7)[0].row_length == 7


# ---- the border, in training and in sampling -----------------------------------------------------

TEXT = st.one_of(
    st.text(max_size=12), st.lists(st.sampled_from([*WORDS, " ", "  ", "\n"])).map("".join)
)


@pytest.mark.parametrize("name", LEARNT)
@settings(max_examples=150)
@given(prompt=TEXT, completion=TEXT)
def test_sampling_reads_a_prompt_as_training_did(name, prompt, completion):
    """A model that has learnt " 4" behind "=" is not asked what follows "= "."""
    tokenizer = LEARNT[name]
    ids, lead = encode_prompt(tokenizer, prompt)
    assert tokenizer.decode_bytes(ids[1:]) + lead == prompt.encode("utf-8", "surrogatepass")
    if not re.search(r"<\|[^|<>\s]+\|>", prompt):  # which sampling takes for commands
        assert text.encode_prompt(tokenizer, f"{END_OF_TEXT}{prompt}") == (
            ids,
            lead,
        ) or prompt in (" ",)
    completion = completion + "."
    rows = [Row(1, (prompt, completion))]
    corpus = TableCorpus("x", "", "", {"train": rows, "validation": rows})
    data = Data(corpus, "train", tokenizer, block_size=10_000, batch_size=1)
    row, border = data.rows[0].tolist(), int(data.asked[0].argmax())
    assert row[:border] == ids and row[-1] == tokenizer.special_tokens[END_OF_TEXT]
    assert tokenizer.decode_bytes(row[border:-1]).startswith(lead)
    # What sampling demands of the first new token holds for the one that training asks for.
    assert tokenizer.bytes_of[row[border]].startswith(lead)
    whole = END_OF_TEXT + prompt + completion + END_OF_TEXT
    assert tokenizer.decode_bytes(row) == whole.encode("utf-8", "surrogatepass")


def test_sampling_gives_the_model_the_ids_of_the_training_row(monkeypatch):
    tokenizer, given = LEARNT["gpt2"], []
    monkeypatch.setattr(
        text, "generate", lambda _, prompts, *rest, **more: given.extend(prompts) or []
    )
    prompts = [a for a, _ in TRAIN]
    config = text.SampleFlags(num_samples=1)
    model = SimpleNamespace(token_embedding=torch.nn.Embedding(1, 1))  # on a CPU: all that is asked
    text.complete(model, tokenizer, prompts, config, encode=encode_prompt)
    data, _ = splits(tokenizer=tokenizer, block_size=200)
    assert given == [row[~own].tolist() for row, own in zip(data.rows, data.asked, strict=True)]
    assert any(a.endswith(" ") for a in prompts) and any(END_OF_TEXT in a for a in prompts)


def test_the_space_goes_to_the_word_behind_it():
    assert split_space("a ") == ("a", " ") and split_space("<x> ") == ("<x>", " ")
    for prompt in ("", " ", "a", "a  ", "a\n ", "a\t", "a\u00a0", " a"):
        assert split_space(prompt) == (prompt, "")
    data, _ = splits([("2 and 3 is ", "much more"), ("2 and 3 is", " much more")] * 40, None)
    tokenizer = data.tokenizer
    assert b" much" in tokenizer.ranks and b" m" in tokenizer.ranks
    assert {tuple(row) for row in map(tuple, data.rows)} == {
        (data.end, *tokenizer.encode("2 and 3 is"), *tokenizer.encode(" much more"), data.end)
    }


# ---- the loss ------------------------------------------------------------------------------------


def gpt(**sizes) -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 26, "block_size": 96, **sizes}
    model = GPT(GPTConfig(vocab_size=257, **sizes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@torch.no_grad()
def test_the_loss_is_the_mean_over_completion_tokens():
    """Row by row, without padding and without targets, from the probabilities alone."""
    model, total, count = gpt(), 0.0, 0
    for before, after in wanted(VALID):
        ids, wants = [END, *before.removeprefix(END_OF_TEXT).encode()], [*after[:-13].encode(), END]
        logits = model(torch.tensor([ids + wants[:-1]]))[0].double()
        for place, token in enumerate(wants, len(ids) - 1):
            total -= logits[place].log_softmax(0)[token].item()
        count += len(wants)
    for batch_size in (1, 3, 40):  # and the way rows are put together changes nothing
        _, validation = splits(batch_size=batch_size)
        report = evaluate(model, validation, Processes(0, 1, torch.device("cpu")), torch.no_grad)
        assert report["loss"] == pytest.approx(total / count, rel=1e-5)
        assert report["perplexity"] == pytest.approx(math.exp(report["loss"]))


@torch.no_grad()
def test_what_a_prompt_says_is_never_asked_for():
    """A model that looks at only one token shows what it is asked for: its blocks add nothing, and
    its positions are all the same."""
    model = gpt()
    model.position_embedding.weight.zero_()
    for block in model.blocks:
        for p in (*block.attention.proj.parameters(), *block.mlp.proj.parameters()):
            p.zero_()

    def loss(pairs: list[tuple[str, str]]) -> float:
        return model(**splits(pairs, batch_size=9)[0].batch(0))["loss"].item()

    one = loss([("abcdeX", "fgh"), ("XYZ", "ijklm")])
    assert loss([("utvwxX", "fgh"), ("YXZ", "ijklm")]) == pytest.approx(one, rel=1e-5)
    assert loss([("X", "fgh"), ("many moreZ", "ijklm")]) == pytest.approx(one, rel=1e-5)
    for other in ("Fgh", "fGh", "fgH", "fg", "fghh"):
        assert abs(loss([("abcdeX", other), ("XYZ", "ijklm")]) - one) > 1e-3
    assert abs(loss([("abcdeY", "fgh"), ("XYZ", "ijklm")]) - one) > 1e-3  # predicts the first


def test_no_gradient_comes_through_what_is_not_asked_for():
    model, (data, _) = gpt(), splits(batch_size=4)
    held = []
    model.norm.register_forward_hook(lambda module, args, out: held.append(out))
    for i in range(4):
        batch = data.batch(i)
        (gradient,) = torch.autograd.grad(model(**batch)["loss"], held[-1])
        reached = gradient.abs().sum(-1) > 0
        assert torch.equal(reached, batch["targets"] != -100) and not reached.all()


# ---- conversations -------------------------------------------------------------------------------


def turns(*contents: str, system: str = "") -> list[dict]:
    """user, assistant, user, … in turns."""
    roles = ("user", "assistant")
    made = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *made] if system else made


def write_messages(name: str, rows: list[list[dict]]) -> str:
    lines = [json.dumps({"id": 7, "messages": messages}) + "\n" for messages in rows]
    Path(name).write_text("".join(lines), encoding="utf-8")
    return name


def talks(*rows: list[dict], block_size: int = 300, tokenizer=BYTES, **flags) -> Data:
    name = write_messages("talks.jsonl", list(rows))
    flags = {"data": name, "valid": name, "batch_size": len(rows), **flags}
    return splits(tokenizer=tokenizer, block_size=block_size, **flags)[0]


TALKS = [
    turns("ab", "cd", "e", "fgh", system="s"),
    turns("x", "yz"),
    turns("many more words", "w", "v"),
]


def test_conversations_by_hand():
    """Every turn of the assistant is asked for, with its end token, and nothing else."""
    data = talks(turns("ab", "cd", "e", "f"))
    batch = data.batch(0)
    ids = [END, *b"User: ab\n\nAssistant: cd", END, *b"\n\nUser: e\n\nAssistant: f", END, *b"\n\n"]
    assert batch["tokens"][0].tolist() == ids[:-1]
    own = [i for i, place in enumerate(ids) if place == END and i]
    asked = {own[0] - 3, own[0] - 2, own[0] - 1, own[0], own[1] - 2, own[1] - 1, own[1]}
    want = [token if i in asked else -100 for i, token in enumerate(ids)][1:]
    assert batch["targets"][0].tolist() == want


def test_every_conversation_comes_once_an_epoch_with_its_mask():
    data = talks(*TALKS, batch_size=1)
    found = []
    for i in range(data.n_batches):
        batch = data.batch(i)
        for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
            if (targets != -100).any():
                found.append(BYTES.decode_bytes(targets[targets != -100].tolist()).decode())
                same = targets[:-1] == tokens[1:]
                assert (same | (targets[:-1] == -100)).all()
    end = END_OF_TEXT
    assert sorted(found) == sorted([f" cd{end} fgh{end}", f" yz{end}", f" w{end}"])
    assert data.describe().endswith("; template plain") and "3 rows, " in data.describe()


@torch.no_grad()
def test_only_what_the_assistant_says_is_in_the_loss():
    """A model that looks at only one token: a change of what the others say, but for the token
    before an answer, which is the template's, changes nothing, and each letter of an answer does.
    """
    model = gpt(block_size=300)
    model.position_embedding.weight.zero_()
    for block in model.blocks:
        for p in (*block.attention.proj.parameters(), *block.mlp.proj.parameters()):
            p.zero_()

    def loss(*contents: str, **system) -> float:
        return model(**talks(turns(*contents, **system)).batch(0))["loss"].item()

    one = loss("ab", "cd", "e", "fg")
    for others in (("xy", "cd", "e", "fg"), ("ab", "cd", "long words", "fg")):
        assert loss(*others) == pytest.approx(one, rel=1e-6)
    assert loss("ab", "cd", "e", "fg", system="s") == pytest.approx(one, rel=1e-6)
    assert loss("ab", "cd", "e", "fg", "unanswered") == pytest.approx(one, rel=1e-6)
    for others in (("Cd", "fg"), ("cD", "fg"), ("cd", "Fg"), ("cd", "fG"), ("cdd", "fg")):
        assert abs(loss("ab", others[0], "e", others[1]) - one) > 1e-3


def test_no_gradient_comes_through_what_others_say():
    model, data = gpt(block_size=300), talks(*TALKS)
    held = []
    model.norm.register_forward_hook(lambda module, args, out: held.append(out))
    batch = data.batch(0)
    (gradient,) = torch.autograd.grad(model(**batch)["loss"], held[-1])
    assert torch.equal(gradient.abs().sum(-1) > 0, batch["targets"] != -100)


def test_a_conversation_that_is_too_long_loses_its_end():
    whole = talks(TALKS[0])
    ids, own = whole.rows[0], whole.asked[0]
    places = own.nonzero()[0]
    for T in (places[0], places[2], places[-1], len(ids) - 2):
        data = talks(TALKS[0], row_length=int(T))
        assert data.rows[0].tolist() == ids[: T + 1].tolist()
        assert data.asked[0].tolist() == own[: T + 1].tolist() and data.ended == 1
        assert "; 1 conversations are cut at their end" in data.describe()
    some = talks(TALKS[0], TALKS[1], TALKS[2], row_length=int(places[0]) - 1)
    assert some.left_out == 2 and "; 2 without an answer are left out" in some.describe()
    with pytest.raises(ValueError, match="no conversation of talks that is to train has an answer"):
        talks(TALKS[0], row_length=int(places[0]) - 1)


CHAT = {name: 256 + i for i, name in enumerate([END_OF_TEXT, "<|im_start|>", "<|im_end|>"])}
CHATML = Tokenizer({bytes([i]): i for i in range(256)}, GPT2_PATTERN, CHAT)


def test_the_template_and_the_system_are_those_of_the_run():
    assert talks(TALKS[1], tokenizer=CHATML).template == "chatml"
    assert talks(TALKS[1], tokenizer=CHATML, template="plain").template == "plain"
    data = talks(TALKS[0], TALKS[1], tokenizer=CHATML, system="Be kind.")
    begin = b"Be kind.", b"system\ns"
    assert [
        text in CHATML.decode_bytes(row) for text, row in zip(begin, data.rows[::-1], strict=True)
    ] == [1, 1]
    with pytest.raises(ValueError, match="--template chatml needs the token"):
        talks(TALKS[1], template="chatml")
    assert splits()[0].template == ""


@pytest.mark.parametrize(
    "line,message",
    [
        ('{"messages": "hello"}', "line 2: its messages are no list"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: no message is of the assis"),
        ('{"messages": [{"role": "x", "content": "a"}]}', "line 2: its message 1 has the role 'x'"),
        (
            json.dumps({"messages": [TALKS[1][0], {"role": "assistant", "content": " "}]}),
            "line 2: one of its messages is empty",
        ),
        ('{"question": "a"}', "line 2: it has no .*call them prompt and completion, or messages"),
        ('{"prompt": "a", "completion": "b"}', "it has prompt, completion where the others have m"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(line, message):
    write_messages("bad.jsonl", [TALKS[1]])
    with Path("bad.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=f"bad.jsonl.*{message}"):
        splits(data="bad.jsonl", valid="")


def test_a_tokenizer_learns_from_the_words_of_conversations():
    data = talks(*[turns("abab", "XYXY")] * 50, tokenizer=None)
    assert b" XYXY" in data.tokenizer.ranks and b"User" in data.tokenizer.ranks
    assert b"messages" not in data.tokenizer.ranks


def test_questions_and_answers_are_shown_at_the_end(monkeypatch):
    data, given, generate = talks(*TALKS, *TALKS, system="Be kind."), [], text.generate
    monkeypatch.setattr(
        text, "generate", lambda *args, **more: given.extend(args[1]) or generate(*args, **more)
    )
    shown = complete.show(gpt(block_size=300), BYTES, data, None)
    assert [block.split("\nassistant: ")[0] for block in shown] == [
        "user: ab",
        "user: x",
        "user: many more words",
    ]
    begin = BYTES.decode_bytes(given[1]).decode()
    assert begin == f"{END_OF_TEXT}Be kind.\n\nUser: x\n\nAssistant:"
    assert complete.ask(data.prompts) == ("--chat", "--prompt", "ab")


def test_llama_learns_a_conversation_goes_on_and_talks(monkeypatch, capsys):
    """From --init, by the name of the task alone; then out to transformers' files and in."""
    write_texts(Path())
    train.main([*TOY_LLAMA, "--block_size=64", "--steps=2", "--out=llama"])
    rows = [turns(f"{i}?", f"{i}!", "and?", "no") for i in range(20)]
    data = f"--data={write_messages('talks.jsonl', rows)}"
    flags = ["--model=complete", "--device=cpu", "--dtype=fp32", "--tokens_per_step=128"]
    begin = [*flags, data, "--init=llama/best.pt", "--batch_size=2", "--epochs=2", "--lr=1e-2"]
    train.main([*begin, "--out=whole"])
    said = capsys.readouterr().out
    assert "user: " in said and "--chat --prompt" in said
    train.main([*begin, "--out=parts", "--stop_after=3"])
    train.main(["--resume", "--out=parts", "--model=complete"])
    one, two = (checkpoints.load(Path(name) / "latest.pt") for name in ("whole", "parts"))
    assert one["task"] == two["task"] == one["train_config"]["model"] == "complete_llama"
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"3?\n"), "utf-8"))
    sample.main(["--checkpoint=whole/best.pt", "--chat", "--max_new_tokens=4", "--device=cpu"])
    assert "template: plain" in capsys.readouterr().err
    sample.main(["--checkpoint=whole/best.pt", "--eval=talks.jsonl", "--device=cpu"])
    assert "perplexity" in capsys.readouterr().out
    peer("transformers")
    convert.main(["export", "whole/best.pt", "--to=theirs"])
    assert "outputs differ by at most" in capsys.readouterr().out
    convert.main(["import", "theirs", "--out=again.pt"])
    back = checkpoints.load(Path("again.pt"))
    best = checkpoints.load(Path("whole/best.pt"))["model"]
    assert back["task"] == "llama"
    assert all(torch.equal(best[name], back["model"][name]) for name in best)


def test_a_name_leads_to_the_row_of_the_checkpoints_network():
    assert for_network("complete", Llama) == "complete_llama"
    assert for_network("complete_llama", GPT) == for_network("complete", GPT) == "complete"
    assert for_network("gpt", Llama) == "gpt"  # which is then refused
    assert for_network("complete", type("MoE", (Llama,), {})) == "complete"


# ---- tables, the tokenizer, messages -------------------------------------------------------------


def test_the_tokenizer_is_learnt_from_the_training_rows():
    write("valid.jsonl", [("QZQZ ", "jkjk")] * 50)
    train, validation = splits([("abab: ", "XYXY")] * 50, None)
    assert train.tokenizer is validation.tokenizer and END_OF_TEXT in train.tokenizer.special_tokens
    assert b" XYXY" in train.tokenizer.ranks and b"abab" in train.tokenizer.ranks
    assert not any(set(token) & set(b"QZjk") for token in train.tokenizer.ranks if len(token) > 1)
    assert len(list(Path("cache").glob("train-*.json"))) == 1


def test_a_tenth_is_held_out_where_no_file_is_given():
    train, validation = splits(valid="")
    assert sorted(epoch(train) + epoch(validation)) == sorted(wanted(TRAIN))
    assert validation.n_all == 15 and train.rule == validation.rule
    assert train.rule == "15 of 150 rows, drawn with a fixed seed, validate"
    other = splits(valid="", seed=2)  # or two seeds would be compared on different rows
    assert epoch(other[1]) == epoch(validation) and other[0].fingerprint == train.fingerprint


def test_a_csv_a_tsv_and_a_gz_are_read_too():
    want = epoch(splits([("a ", "b"), ("c", " d")])[0])
    Path("t.csv").write_text('completion,x,prompt\nb,1,a \n" d",2,c\n', encoding="utf-8")
    Path("t.tsv").write_text("a \tb\nc\t d\n", encoding="utf-8")
    Path("t.jsonl.gz").write_bytes(gzip.compress(Path("train.jsonl").read_bytes()))
    for name in ("t.csv", "t.tsv", "t.jsonl.gz"):
        assert sorted(epoch(splits(data=name)[0])) == sorted(want)


def test_an_empty_completion_is_refused_and_an_empty_prompt_is_not():
    with pytest.raises(
        ValueError, match=r'train.jsonl, line 2: its completion is empty: {"prompt"'
    ):
        splits([("a", "b"), ("c", " \n")])
    write("train.jsonl", TRAIN)
    with pytest.raises(ValueError, match=r'bad.jsonl, line 1: its completion is empty: {"prompt"'):
        splits(valid=write("bad.jsonl", [("c", "")]))
    assert epoch(splits([("", "b")])[0]) == [(END_OF_TEXT, f"b{END_OF_TEXT}")]


def test_what_is_told():
    train, validation = splits()
    asked = sum(len(b.encode()) for _, b in wanted(TRAIN)) - 12 * 150  # an end is one token
    tokens = asked + sum(len(a.encode()) for a, _ in wanted(TRAIN)) - 13 * 150
    assert train.describe().startswith(
        f"150 rows, {tokens:,} tokens, {asked:,} of them asked for, "
    )
    assert re.search(rf", {train.n_batches} steps with [\d.]+% padding$", train.describe())
    assert validation.describe().endswith("of them asked for")
    assert train.prompts == validation.prompts == [a for a, _ in VALID[:4]]
    write("valid.jsonl", [("a ", "b"), ("a ", "c"), ("d", "e")])
    assert splits()[0].prompts == ["a ", "d"]
    report = train.report({"loss": 12.0}, {"loss": 4})
    assert report == {"loss": 3.0, "perplexity": pytest.approx(math.exp(3))}
    assert math.isfinite(train.report({"loss": 1e9}, {"loss": 1})["perplexity"])
    lengths = [len(row) for row in train.rows]
    assert any(a > b for a, b in pairwise(lengths))  # the rows stay in the order of the file


# ---- what the engine calls -----------------------------------------------------------------------


def test_eval_takes_all_rows_of_a_file_as_in_training():
    model, scored = gpt(), []
    trained = {"data": "train.jsonl", "valid": "", "row_length": 7, "eval_tokens": 20}
    checkpoint = {
        "train_config": {**trained, "model": "complete"},
        "model_config": asdict(model.config),
    }
    flags = text.SampleFlags(eval="valid.jsonl")
    complete.sample(model, BYTES, flags, checkpoint, scored.append)
    assert len(scored[0].chosen) == 41 and scored[0].row_length == 7
    assert scored[0].rule == "41 rows train, 41 validate (the given files)"
    with pytest.raises(ValueError, match=r"--eval none.csv is no file here: name one as"):
        complete.sample(model, BYTES, text.SampleFlags(eval="none.csv"), checkpoint, print)


def test_prompts_are_printed_and_shown_as_training_read_them(monkeypatch, capsys):
    model, given, generate = gpt(), [], text.generate
    monkeypatch.setattr(
        text, "generate", lambda *args, **more: given.append(args[1]) or generate(*args, **more)
    )
    flags = text.SampleFlags(prompt=["a "], max_new_tokens=4)
    complete.sample(model, BYTES, flags, {}, print)
    data = SimpleNamespace(prompts=["a ", f"b{END_OF_TEXT}"])
    shown = complete.show(model, BYTES, data, None)
    assert capsys.readouterr().out.startswith("a ")
    assert given == [[[END, *b"a"]], [[END, *b"a"], [END, *b"b", *END_OF_TEXT.encode()]]]
    pairs = zip(shown, data.prompts, strict=True)
    assert all(block.startswith(prompt) for block, prompt in pairs)
    assert complete.ask(data.prompts) == ("--prompt", "a ")


def test_the_plan_knows_the_shapes_of_a_batch():
    batch = splits()[0].batch(0)
    want = complete.batch_shapes(None, None, *batch["tokens"].shape)
    assert want == {k: tuple(v.shape) for k, v in batch.items()}
