"""What the three tasks of a fine-tuned encoder say: prompts, lines, files, and when a run ends."""

import inspect
import io
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from finetuning import FILES, SIZES, write_files

from tasks import answer, classify, network, tag, task
from tasks.encoders import TextFlags, pad_batch, similar_lengths

NAMES = ("classify", "tag", "answer")
EACH = pytest.mark.parametrize("name", NAMES)
RESPOND = {"classify": classify.classify, "tag": tag.tag, "answer": answer.answer}
LENGTH = 24


@pytest.fixture
def files(toy) -> Path:
    return write_files(toy)


def flags_of(name: str, **changes):
    paths = {"data": FILES[name], "valid": f"valid-{FILES[name]}", "cache_dir": "cache"}
    given = {"batch_size": 4, "tokens_per_step": 4 * LENGTH, **paths, **changes}
    return task(name).Flags(model=name, **given)


def opened(name: str, **changes) -> tuple[nn.Module, object]:
    """A network with random weights, and the data that it would validate with."""
    Model, sizes = network(name), {**SIZES, "block_size": LENGTH}
    found = {f: () for f in ("labels",) if f in Model.Config.__dataclass_fields__}
    flags = flags_of(name, **changes)
    _, data = task(name).Data.splits(flags, {**sizes, "vocab_size": 420, **found})
    fields = Model.Config.__dataclass_fields__.values()
    learnt = {f.name: getattr(data, f.name) for f in fields if f.metadata.get("from_data")}
    config = Model.Config(**{**sizes, "vocab_size": data.tokenizer.vocab_size, **learnt})
    return Model(config).eval(), data


def checkpoint_of(name: str, model: nn.Module) -> dict:
    return {"task": name, "train_config": vars(flags_of(name)), "model_config": vars(model.config)}


@EACH
def test_what_a_network_takes_from_its_data_is_no_flag(name):
    fields = network(name).Config.__dataclass_fields__.values()
    learnt = {f.name for f in fields if f.metadata.get("from_data")}
    wanted = {"classify": {"labels", "pairs"}, "tag": {"labels"}, "answer": {"may_abstain"}}
    assert learnt == wanted[name]
    assert learnt == {f.name for f in fields if not f.metadata.get("flag", True)}


@EACH
@pytest.mark.parametrize("weights", [False, True])
def test_the_shapes_for_the_plan_are_those_of_a_batch(files, name, weights):
    changes = {"class_weights": True} if weights and name == "classify" else {}
    model, _ = opened(name)
    flags = flags_of(name, **changes)
    train, _ = task(name).Data.splits(flags, {**vars(model.config), "vocab_size": 420})
    batches = [train.batch(i) for i in range(train.n_batches)]
    batch = next(b for b in batches if "keep" in b)
    shapes = task(name).batch_shapes(flags, model.config, *batch["tokens"].shape)
    if name == "classify":  # one text has no segments, but the plan does not know that yet
        batch.setdefault("segments", torch.zeros_like(batch["tokens"]))
    assert {key: tuple(x.shape) for key, x in batch.items()} == shapes
    assert shapes.keys() <= inspect.signature(model.forward).parameters.keys()


@EACH
def test_prompts_and_lines_of_stdin_get_the_same_answers(files, capsys, monkeypatch, name):
    model, data = opened(name)
    module, more = task(name), {}
    lines = ["the cat sat", "Anna ran on the old mat today " * 9, "who has the hat?"]
    if name == "answer":
        Path("text.txt").write_text("Dora has the hat today", encoding="utf-8")
        more = {"context": "text.txt"}
    got = []
    for flags in (
        module.SampleFlags(prompt=lines, **more),
        module.SampleFlags(**more),
        module.SampleFlags(batch_size=1, **more),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        module.sample(model, data.tokenizer, flags, checkpoint_of(name, model), None)
        got.append(capsys.readouterr().out)
    assert got[0] == got[1] == got[2] and got[0].count("\n") == 3
    alone = [RESPOND[name](model, data.tokenizer, [x], flags)[0] for x in lines]
    assert "\n".join(alone) + "\n" == got[0]


@EACH
def test_eval_scores_all_of_the_file_with_the_labels_of_the_checkpoint(files, name):
    model, data = opened(name)
    checkpoint, scored = checkpoint_of(name, model), []
    checkpoint["train_config"] |= {"eval_tokens": 50, "from_an_older_version": 1}
    flags = task(name).SampleFlags(eval=f"valid-{FILES[name]}")
    task(name).sample(model, data.tokenizer, flags, checkpoint, scored.append)
    (found,) = scored
    assert found.split == "validation" and len(found.chosen) == len(data.chosen) == 37
    assert found.tokenizer is data.tokenizer
    assert getattr(found, "labels", ()) == getattr(data, "labels", ())
    flags.eval = "nowhere.tsv"
    with pytest.raises(ValueError, match=r"--eval nowhere\.tsv is no file here: name one as for"):
        task(name).sample(model, data.tokenizer, flags, checkpoint, scored.append)


def test_contradicting_flags_are_refused():
    for Flags in (TextFlags, answer.SampleFlags):
        with pytest.raises(ValueError, match="--eval and --prompt are two things to do: give one"):
            Flags(prompt=["x"], eval="x.tsv")
        with pytest.raises(
            ValueError, match="--batch_size 0 is out of range: choose between 1 and"
        ):
            Flags(batch_size=0)


@EACH
def test_what_is_shown_when_a_run_ends(files, name):
    model, data = opened(name)
    blocks = task(name).show(model, data.tokenizer, data, Path())
    answers = RESPOND[name](model, data.tokenizer, data.prompts, task(name).SampleFlags())
    want = [f"{prompt}\n-> {said}" for prompt, said in zip(data.prompts, answers, strict=True)]
    assert blocks[: len(want)] == want and len(want) == 4
    closing = blocks[len(want) :]
    assert len(closing) == (name == "classify")
    if closing:
        pytest.importorskip("matplotlib")
        assert closing == [f"{data.details()}\nas a picture: confusion.png"]
        assert data.confusion.sum() == 37 and Path("confusion.png").is_file()


def test_how_to_ask_for_more():
    for module in (classify, tag):
        assert module.ask(["a b", "c"]) == ("--prompt", "a b") and module.ask([]) == ()
    want = ("--context", "text.txt", "--prompt", "who?")
    assert answer.ask(["who?\nhe, who else", "x"]) == want


def test_rows_of_one_length_need_no_mask(tokenizers):
    tokenizer = next(t for t in tokenizers.values() if "[PAD]" in t.special_tokens)
    assert pad_batch([[5, 6], [7, 8]], tokenizer).keys() == {"tokens"}
    batch = pad_batch([[5, 6], [7]], tokenizer, [[0, 1], [0]])
    assert batch["segments"].tolist() == [[0, 1], [0, 0]]
    assert torch.equal(batch["keep"], torch.tensor([[True, True], [True, False]]))


def test_rows_of_similar_length_share_a_batch():
    assert list(similar_lengths([3, 1, 2, 1], 3)) == [[1, 3, 2], [0]]
    assert list(similar_lengths([], 3)) == []
