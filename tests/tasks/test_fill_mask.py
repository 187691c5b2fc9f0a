"""What a BERT says (tasks/masked.py, tasks/similar.py): batched beside one by one, against forwards
without padding, and the command line."""

import io
import re
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import sample
from bert import BERT, BERTConfig
from bpe import GPT2_PATTERN, Tokenizer
from data import sentences
from data.encoding import SPECIAL, encode_text
from data.sentences import open_sentences
from data.tokens import tokenize
from engine import checkpoint as checkpoints
from engine.evaluation import evaluate
from engine.processes import Processes
from tasks import masked, similar
from tasks.masked import Data, Flags, SampleFlags, encode_prompt, fill_mask, follows
from tasks.similar import embed, similarities

TEXT = "the cat sat on the mat and the dog ran to the house while the rain was falling down " * 20
WORDS = Tokenizer.train([TEXT], 320, GPT2_PATTERN, SPECIAL)
PAD, CLS, SEP, MASK = (WORDS.special_tokens[name] for name in SPECIAL)
PROMPTS = [
    "the [MASK] sat on the mat",
    "[MASK]",
    "the dog ran to the [MASK] while the rain was [MASK] down",
    "[MASK] cat",
    "the cat sat on [MASK] and the dog",
    "the dog ran[MASK]",
]
LINES = ["the cat sat", "", "the dog ran to the house while the rain was falling", "the", "a  b"]


def bert(block_size=40, vocab_size=384, **settings) -> BERT:
    """An untrained model whose weights make its answers depend on all of the input."""
    torch.manual_seed(3)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 24, "n_ff": 37, **settings}
    model = BERT(BERTConfig(vocab_size=vocab_size, block_size=block_size, **sizes)).eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm.weight" in name), std=0.3)
    return model


def save(folder, model: BERT, **flags) -> str:
    """A checkpoint file, as train.py writes it."""
    (folder / "out/bert").mkdir(parents=True, exist_ok=True)
    path = folder / "out/bert/best.pt"
    state = {"optimizer": {}, "step": 7, "best": 1.0, "skipped": 0}
    config = Flags(model="bert", **flags)
    settings = {"train_config": config, "data": "0" * 64, **state}
    checkpoints.save(path, checkpoints.pack("bert", model, WORDS, **settings))
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with a checkpoint in it."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path, bert())
    return tmp_path


def run(capsys, *flags: str) -> str:
    sample.main(["--device=cpu", *flags])
    return capsys.readouterr().out


def visible(word: str) -> str:
    return word if word.isprintable() else word.encode("unicode_escape").decode("ascii")


def shares(answer: str) -> list[tuple[str, float]]:
    """ "length 34.1%, index 12.0%" -> [("length", 34.1), ("index", 12.0)]"""
    return [(word, float(share)) for word, share in re.findall(r"(\S+) ([\d.]+)%", answer)]


# ---- encoding ------------------------------------------------------------------------------------


def test_a_sentence_is_read_as_in_training():
    assert encode_text(WORDS, "  the\t cat \n") == WORDS.encode(" the cat")
    assert encode_text(WORDS, " \n") == []
    assert encode_text(WORDS, "the")[0] == encode_text(WORDS, "sat the")[-1]


@pytest.mark.parametrize(
    "prompt,parts",
    [
        ("the [MASK] sat", [" the", MASK, " sat"]),
        ("[MASK] cat", [MASK, " cat"]),
        ("  [MASK]", [MASK]),
        ("the cat [MASK].", [" the cat", MASK, "."]),
        ("the [MASK] [MASK][MASK] sat", [" the", MASK, MASK, MASK, " sat"]),
        ("un[MASK]able", [" un", MASK, "able"]),
        ("the  [SEP] [MASK] <b>[PAD]", [" the [SEP]", MASK, " <b>[PAD]"]),
    ],
)
def test_the_space_before_a_mask_belongs_to_the_hidden_word(prompt, parts):
    ids = [i for p in parts for i in ([p] if isinstance(p, int) else WORDS.encode(p))]
    assert encode_prompt(WORDS, prompt) == ids


def test_a_hidden_word_leaves_the_tokens_around_it_as_they_were():
    """Otherwise the model would read what it has never seen in training."""
    whole, hidden = encode_text(WORDS, "the cat sat on"), encode_prompt(WORDS, "the [MASK] sat on")
    assert [a == b for a, b in zip(whole, hidden, strict=True)] == [True, False, True, True]


# ---- masked words --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 4, 64])
def test_any_batch_gives_what_each_prompt_gives_alone(batch_size):
    model = bert()
    together = fill_mask(model, WORDS, PROMPTS, SampleFlags(batch_size=batch_size))
    assert together == [fill_mask(model, WORDS, [p], SampleFlags())[0] for p in PROMPTS]
    assert len(set(together)) == len(PROMPTS)


@torch.no_grad()
def test_candidates_are_the_ordinary_tokens_and_share_all_of_the_probability():
    """Here, special tokens and the ids that only pad the model's vocabulary would win."""
    model, n = bert(), len(WORDS.ranks)
    for bias in (0.0, 30.0):
        model.mlm_bias[n:] = bias
        (answer,) = fill_mask(model, WORDS, ["the [MASK] sat"], SampleFlags(top=n))
        ids = [CLS, *WORDS.encode(" the"), MASK, *WORDS.encode(" sat"), SEP]
        logits, _ = model(torch.tensor([ids]))
        p, order = logits[0, ids.index(MASK), :n].softmax(-1).sort(descending=True)
        found = re.split(r"(?<=%), ", answer)
        assert len(found) == n and not re.search(r"PAD|CLS|SEP|MASK", answer)
        texts = [WORDS.decode_bytes([i]).decode("utf-8", "replace") for i in order.tolist()]
        expected = [
            f"{'' if text[0] == ' ' else '##'}{visible(text.strip() or '␣')} {share:.1%}"
            for text, share in zip(texts, p.tolist(), strict=True)
        ]
        assert found == expected


@torch.no_grad()
def test_a_token_without_a_space_goes_on_with_the_word_before_it():
    model, names = bert(), [" cat", "at", " ", "\n", "\x1b"]
    for bias, name in zip((40.0, 39.0, 38.0, 37.0, 36.0), names, strict=True):
        model.mlm_bias[WORDS.ranks[name.encode()]] += 10 * bias
    (answer,) = fill_mask(model, WORDS, ["the [MASK]"], SampleFlags(top=5))
    assert answer == "cat 100.0%, ##at 0.0%, ␣ 0.0%, ##␣ 0.0%, ##\\x1b 0.0%"


@torch.no_grad()
def test_several_masks_are_numbered_and_in_order():
    model, config = bert(), SampleFlags(top=3)
    prompts = ["[MASK] cat [MASK][MASK]", "the [MASK]"]
    many, one = fill_mask(model, WORDS, prompts, config)
    logits, _ = model(torch.tensor([[CLS, MASK, *WORDS.encode(" cat"), MASK, MASK, SEP]]))
    lines = many.split("\n")
    assert [line.partition(": ")[0] for line in lines] == ["[MASK] 1", "[MASK] 2", "[MASK] 3"]
    assert len(set(lines)) == 3 and "\n" not in one and ":" not in one
    at = [1, logits.size(1) - 3, logits.size(1) - 2]
    for line, place in zip(lines, at, strict=True):
        best = logits[0, place, : len(WORDS.ranks)].softmax(-1).topk(3).values * 100
        assert [p for _, p in shares(line)] == pytest.approx(best.tolist(), abs=0.051)


def test_top_is_the_number_of_words():
    answers = fill_mask(bert(), WORDS, PROMPTS[:2], SampleFlags(top=2))
    assert [len(shares(answer)) for answer in answers] == [2, 2]


def test_what_is_too_long_is_cut_at_its_end_and_told(capsys):
    model = bert(block_size=9)
    short, long = (f"the [MASK]{' the' * n}" for n in (5, 9))
    assert fill_mask(model, WORDS, [short], SampleFlags()) == fill_mask(
        model, WORDS, [long], SampleFlags()
    )
    note = "note: 1 of 1 texts have more than the 7 tokens that the model reads: their ends are"
    assert capsys.readouterr().err == f"{note} left out\n"
    with pytest.raises(ValueError, match=r"has a \[MASK\] beyond the 7 tokens .*: shorten it"):
        fill_mask(model, WORDS, ["the cat", f"{'the ' * 7}[MASK]"][1:], SampleFlags())
    assert fill_mask(model, WORDS, [f"{'the ' * 6}[MASK]"], SampleFlags())


# ---- two sentences -------------------------------------------------------------------------------


@torch.no_grad()
def test_the_verdict_is_the_softmax_of_the_head():
    model = bert()
    found = follows(model, WORDS, "the cat  sat", "on the mat")
    a, b = WORDS.encode(" the cat sat"), WORDS.encode(" on the mat")
    segments = [0] * (len(a) + 2) + [1] * (len(b) + 1)
    _, logits = model(torch.tensor([[CLS, *a, SEP, *b, SEP]]), torch.tensor([segments]))
    assert found == pytest.approx(logits.softmax(-1)[0, 0].item(), abs=1e-6)
    assert abs(found - follows(model, WORDS, "on the mat", "the cat sat")) > 1e-3


def test_a_pair_that_is_too_long_still_touches(capsys):
    model = bert(block_size=9)
    cut = follows(model, WORDS, "the cat the cat sat", "on the mat and the dog")
    assert "note: the two have 11 tokens, the model reads 6" in capsys.readouterr().err
    assert cut == follows(model, WORDS, "the cat sat", "on the mat")
    assert capsys.readouterr().err == ""


# ---- embeddings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
@torch.no_grad()
def test_an_embedding_is_that_of_the_line_without_padding(pooling, batch_size):
    model = bert()
    found = embed(model, WORDS, LINES, pooling, batch_size)
    assert found.shape == (5, 24) and found.dtype == np.float32
    for line, vector in zip(LINES, found, strict=True):
        text = WORDS.encode(" " + " ".join(line.split())) if line else []
        features = model.features(torch.tensor([[CLS, *text, SEP]]))[0]
        expected = features.mean(0) if pooling == "mean" else features[0]
        torch.testing.assert_close(torch.from_numpy(vector), expected)
    assert np.abs(np.diff(found, axis=0)).max(1).min() > 1e-2  # no two lines are alike


def test_padding_reaches_no_embedding():
    model = bert()
    before = embed(model, WORDS, LINES, "mean", 64)
    with torch.no_grad():
        model.token_embedding.weight[PAD] = 50.0
    np.testing.assert_array_equal(embed(model, WORDS, LINES, "mean", 64), before)


def test_names_of_special_tokens_in_a_line_are_text():
    found = embed(bert(), WORDS, ["the [MASK]", "the [PAD]", "the"], "mean", 64)
    ids = WORDS.encode(" the [MASK]")
    assert not {PAD, CLS, SEP, MASK} & set(ids)
    with torch.no_grad():
        expected = bert().features(torch.tensor([[CLS, *ids, SEP]]))[0].mean(0)
    torch.testing.assert_close(torch.from_numpy(found[0]), expected)


def test_similarities_are_those_of_torch_and_of_equals_the_earlier_comes_first(monkeypatch):
    monkeypatch.setattr(similar, "SCORES", 30)  # so that the queries need three turns
    queries, corpus = torch.randn(5, 7), torch.randn(13, 7)
    corpus[11] = corpus[2]
    scores, lines = similarities(queries.numpy(), corpus.numpy(), 13)
    expected = F.cosine_similarity(queries[:, None], corpus[None], dim=-1)
    torch.testing.assert_close(torch.from_numpy(scores), expected.sort(1, True).values)
    torch.testing.assert_close(torch.from_numpy(scores), expected.gather(1, torch.tensor(lines)))
    for row in lines.tolist():
        assert row.index(11) == row.index(2) + 1
    best, first = similarities(queries.numpy(), corpus.numpy(), 3)
    assert (best == scores[:, :3]).all() and (first == lines[:, :3]).all()


# ---- the command line ----------------------------------------------------------------------------


def test_prompts_and_lines_give_the_same_answers(folder, capsys, monkeypatch):
    expected = "".join(
        f"{answer}\n" for answer in fill_mask(bert(), WORDS, PROMPTS, SampleFlags(top=3))
    )
    found = run(capsys, "--top=3", *(f"--prompt={prompt}" for prompt in PROMPTS))
    assert found == expected
    lines = "\r\n".join(PROMPTS).replace(" sat", "\rsat")  # a \r alone ends no line
    for size in (1, 64):
        stdin = io.TextIOWrapper(io.BytesIO(lines.encode()), "utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run(capsys, "--top=3", f"--batch_size={size}") == expected


def test_somebody_who_types_gets_each_answer_at_once(folder, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

        def __next__(self):
            seen.append(capsys.readouterr().out)
            return super().__next__()

    seen: list[str] = []
    monkeypatch.setattr(sys, "stdin", Terminal("the [MASK]\n[MASK] cat\n"))
    sample.main(["--device=cpu"])
    answers = fill_mask(bert(), WORDS, ["the [MASK]", "[MASK] cat"], SampleFlags())
    assert seen == ["", *(f"{answer}\n" for answer in answers)]


def test_a_line_without_a_mask_is_named_by_its_number_and_the_next_is_answered(
    folder, capsys, monkeypatch
):
    lines = ["the [MASK]\n"] * 20 + ["the cat\n", "\n", "cat " * 60 + "[MASK]\n", "the [MASK]\n"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(lines)))
    sample.main(["--device=cpu", "--batch_size=1"])  # chunks of 16 lines
    captured = capsys.readouterr()
    first, *answers = captured.out.splitlines()
    assert first and answers == [first] * 19 + ["", "", "", first]
    assert "note: line 21 has no [MASK]: put it in the place of" in captured.err
    assert "note: line 22 has no" in captured.err
    assert "note: line 23 has a [MASK] beyond the 38 tokens" in captured.err


def test_two_prompts_without_a_mask_are_a_pair(folder, capsys):
    found = run(capsys, "--prompt=the cat", "--prompt=sat on the mat")
    share = follows(bert(), WORDS, "the cat", "sat on the mat")
    assert found == f"the second follows the first: {share:.1%}\n"


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_of_a_file_replace_the_last_ones_at_once(folder, capsys, monkeypatch, pooling):
    (folder / "lines.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    np.save(folder / "old.npy", np.zeros((2, 24), dtype=np.float32))
    old = (folder / "old.npy").read_bytes()
    (folder / "old.npy").rename(folder / "vectors")
    flags = ["--embed=lines.txt", "--out=vectors", f"--pooling={pooling}"]

    def fails(*args):
        args[0].write(b"half of it")
        raise OSError("the disk is full")

    with monkeypatch.context() as broken, pytest.raises(OSError, match="full"):
        broken.setattr(np, "save", fails)
        run(capsys, *flags)
    assert (folder / "vectors").read_bytes() == old
    assert "5 embeddings of 24 numbers: vectors" in run(capsys, *flags)
    found, expected = np.load(folder / "vectors"), embed(bert(), WORDS, LINES, pooling, 64)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert {p.name for p in folder.iterdir()} == {"lines.txt", "out", "vectors"}
    run(capsys, "--embed=lines.txt")
    assert np.load(folder / "embeddings.npy").shape == (5, 24)


@pytest.mark.parametrize("shape", [(), (24,), (2, 23)])
def test_embeddings_replace_nothing_else(folder, capsys, shape):
    (folder / "lines.txt").write_text("a line\n", encoding="utf-8")
    if shape:
        np.save(folder / "my.npy", np.zeros(shape, dtype=np.float32))
    else:
        (folder / "my.npy").write_text("my own notes", encoding="utf-8")
    before = (folder / "my.npy").read_bytes()
    with pytest.raises(ValueError, match=r"--out my\.npy is there already: name another file"):
        run(capsys, "--embed=lines.txt", "--out=my.npy")
    assert (folder / "my.npy").read_bytes() == before


def test_the_identical_line_is_the_most_similar(folder, capsys):
    (folder / "query.txt").write_text(" the  dog ran \nthe\n", encoding="utf-8")
    (folder / "corpus.txt").write_text("\n".join([*LINES, "the dog ran"]), encoding="utf-8")
    lines = run(capsys, "--similar", "query.txt", "corpus.txt", "--top=2").splitlines()
    assert len(lines) == 6 and lines[0] == "the  dog ran" and lines[3] == "the"
    assert lines[1] == "  1.000  line 6: the dog ran" and lines[4] == "  1.000  line 4: the"
    for line in (lines[2], lines[5]):
        score, number, text = re.fullmatch(r" ([ -]0\.\d{3})  line (\d): (.*)", line).groups()
        assert float(score) < 1 and [*LINES, "the dog ran"][int(number) - 1] == text
    every = run(capsys, "--similar", "query.txt", "corpus.txt", "--top=99").splitlines()
    assert len(every) == 2 * 7


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--prompt=the cat"], "the prompt 'the cat' has no [MASK]: put it in the place of one"),
        (["--prompt=a", "--prompt=[MASK]"], "the prompt 'a' has no [MASK]"),
        (["--prompt=a", "--prompt=b", "--prompt=c"], "the prompt 'a' has no [MASK]"),
        ([f"--prompt={'the ' * 38}[MASK]"], "has a [MASK] beyond the 38 tokens"),
        (["--top=0"], "--top 0 is out of range: choose 1 or more"),
        (["--batch_size=0"], "--batch_size 0 is out of range: choose between 1 and"),
        (["--pooling=max"], "--pooling max is not known: choose mean, cls"),
        (["--embed=a.txt"], "--embed a.txt is no file here: name a text"),
        (["--embed=empty.txt"], "--embed empty.txt is empty: give a text of one line or more"),
        (["--embed=a.txt", "--out=out"], "--out out is a folder, or lies in none"),
        (["--embed=a.txt", "--out=no/a.npy"], "is a folder, or lies in none: name a file"),
        (["--similar", "empty.txt", "a.txt"], "--similar empty.txt is empty"),
        (["--similar", "a.txt"], "argument --similar: expected 2 arguments"),
        (["--embed=a", "--prompt=b"], "--prompt and --embed are 2 things to do: give one of them"),
        (["--eval=a.txt"], "--eval a.txt is no file or folder here, nor one of pydocs, wikitext"),
        (["--eval=pydocs", "--layout=prose"], "--layout prose is for files of your own"),
        (["--max_new_tokens=4"], "--max_new_tokens is for checkpoints of gpt, "),
    ],
)
def test_bad_input_is_one_sentence(folder, flags, message):
    (folder / "empty.txt").touch()
    with pytest.raises(ValueError) as error:
        sample.main(["--device=cpu", *flags])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_model_without_the_head_for_pairs_says_so(folder, capsys):
    save(folder, bert(nsp=False))
    (folder / "text.txt").write_text(text_of_documents(), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^this model was trained with --nsp=false and cannot"):
        run(capsys, "--prompt=the cat", "--prompt=sat")
    with pytest.raises(ValueError, match=r"^--nsp asks for pairs of sentences, but this model"):
        run(capsys, "--eval=text.txt", "--nsp")
    assert run(capsys, "--prompt=the [MASK]").count("%") == 5
    assert "nsp" not in run(capsys, "--eval=text.txt")


def test_help_names_the_flags_of_the_task(folder, capsys):
    with pytest.raises(SystemExit):
        sample.main(["--checkpoint=out/bert/best.pt", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "sampling (bert)" in text and "--max_new_tokens" not in text
    assert "--similar TEXT TEXT two files: for each line of the first, the nearest in the" in text
    assert "(default: ())" not in text


# ---- a run's end ---------------------------------------------------------------------------------


def test_what_a_run_shows_and_how_to_ask_for_more():
    model, data = bert(), SimpleNamespace(prompts=PROMPTS)
    blocks = masked.show(model, WORDS, data, Path())
    answers = fill_mask(model, WORDS, PROMPTS, SampleFlags())
    assert blocks == [f"{p}\n-> {answer}" for p, answer in zip(PROMPTS, answers, strict=True)]
    assert masked.ask(PROMPTS) == ("--prompt", PROMPTS[0]) and masked.ask([]) == ()


# ---- scores --------------------------------------------------------------------------------------


def text_of_documents() -> str:
    """Eight documents of five sentences of different lengths, one sentence on each line."""
    words = TEXT.split()[:18]
    documents = [
        [" ".join(words[(7 * d + s) % 9 :][: 3 + (d * s) % 7]) + "." for s in range(5)]
        for d in range(8)
    ]
    return "\n\n".join("\n".join(document) for document in documents)


def data_of(model: BERT, nsp: bool, row_length: int) -> Data:
    corpus = open_sentences("text.txt", Path("cache"), valid="text.txt", by_sentence=nsp)
    file = tokenize(corpus, "validation", WORDS, Path("cache"), "[SEP]")
    sizes = {"block_size": model.config.block_size, "row_length": row_length, "nsp": nsp}
    return Data(file, corpus, "validation", WORDS, batch_size=2, **sizes)


@pytest.mark.parametrize("nsp,row_length", [(True, 0), (False, 0), (True, 20)])
@torch.no_grad()
def test_the_scores_are_those_of_an_independent_sum(folder, capsys, nsp, row_length):
    """Row by row, without padding, from the logits; rows as long as those of the training."""
    (folder / "text.txt").write_text(text_of_documents(), encoding="utf-8")
    model = bert()
    model.mlm_bias[WORDS.ranks[b" the"]] += 4  # so that some answers are right
    save(folder, model, row_length=row_length)
    data = data_of(model, nsp, row_length)
    n, sums = Counter(), Counter()
    for i in range(data.n_batches):
        batch = data.batch(i)
        T = batch["tokens"].size(1)
        for row, ids in enumerate(batch["tokens"]):
            length = int((ids != PAD).sum())
            segments = batch["segments"][row, :length][None] if nsp else None
            mlm, follow = model(ids[None, :length], segments)
            places = batch["mlm_positions"] // T == row
            targets = batch["mlm_targets"][places]
            p = mlm[0, batch["mlm_positions"][places] % T].log_softmax(-1)
            n["mlm"] += len(targets)
            sums["mlm"] -= p[range(len(targets)), targets].sum().item()
            sums["mlm_accuracy"] += int((p.argmax(-1) == targets).sum())
            if nsp:
                label = int(batch["nsp_targets"][row])
                n["nsp"] += 1
                sums["nsp"] -= follow[0].log_softmax(-1)[label].item()
                sums["nsp_accuracy"] += int(follow[0].argmax()) == label
    mean = {name: value / n[name.partition("_")[0]] for name, value in sums.items()}
    expected = {"loss": mean["mlm"] + mean.get("nsp", 0), **mean}
    expected["perplexity"] = np.exp(mean["mlm"])
    assert data.n_batches > 2 and n["mlm"] > 20 and 0 < mean["mlm_accuracy"] < 1
    found = evaluate(model, data, Processes(0, 1, torch.device("cpu")), nullcontext)
    assert found == pytest.approx(expected, rel=1e-4)

    printed = run(capsys, "--eval=text.txt", f"--nsp={nsp}", "--batch_size=5", "--cache_dir=c")
    head, scores = printed.splitlines()
    assert head.startswith("text.txt: ") and "the given files validate" in head
    found = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+)", scores)}
    assert found == pytest.approx(expected, rel=1e-3, abs=6e-5)
    if nsp:  # how the model was trained is how it is scored, if nothing else is said
        assert run(capsys, "--eval=text.txt", "--batch_size=5", "--cache_dir=c") == printed


def test_the_validation_part_of_a_named_text_is_scored(folder, capsys, monkeypatch):
    blocks = text_of_documents().strip().split("\n\n")
    documents = [block.split("\n") for block in blocks] * 3
    monkeypatch.setattr(sentences, "pydocs", lambda: documents)
    text = "\n\n".join("\n".join(document) for document in documents[9::10])
    (folder / "held.txt").write_text(text, encoding="utf-8")
    for nsp in ("--nsp", "--no-nsp"):
        named, own = (run(capsys, f"--eval={x}", nsp) for x in ("pydocs", "held.txt"))
        assert named.startswith("pydocs: ") and named.splitlines()[1] == own.splitlines()[1]
