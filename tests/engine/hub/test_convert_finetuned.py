"""What was fine-tuned, out to Hugging Face's classes and in again."""

import json

import pytest
import torch
from conftest import peer
from converting import SIZES, TEXT, batch, noisy, put_tensors, tensors_of
from test_convert_bert import wordpiece

import convert
import sample
import tasks
from bert import EncoderConfig
from engine import checkpoint as checkpoints
from engine.hub.importing import import_model
from engine.hub.mapping import our_config, their_settings
from tasks.answer import AnswerConfig
from tasks.classify import LabelConfig
from tasks.tag import TagConfig

LABELS = ("very bad", "so so", "good")
OURS = {
    "classify": LabelConfig(*SIZES, labels=LABELS, pairs=True),
    "tag": TagConfig(*SIZES, labels=("O", "B-x", "I-x")),
    "answer": AnswerConfig(*SIZES, may_abstain=True),
    "similar": EncoderConfig(*SIZES),
}
AUTO = {
    "classify": "AutoModelForSequenceClassification",
    "tag": "AutoModelForTokenClassification",
    "answer": "AutoModelForQuestionAnswering",
    "similar": "AutoModel",
}


def saved(task: str, path):
    """A checkpoint as train.py writes it, of a model with random weights."""
    model = noisy(tasks.network(task)(OURS[task]))
    kept = tasks.task(task).Flags(model=task, data="some/where/reviews.csv")
    state = {"optimizer": {}, "step": 7, "best": -0.875, "skipped": 0}
    packed = checkpoints.pack(task, model, wordpiece(), train_config=kept, data="", **state)
    checkpoints.save(path, packed)
    return model


def their_logits(task: str, theirs, given: dict) -> torch.Tensor:
    names = {"tokens": "input_ids", "segments": "token_type_ids", "keep": "attention_mask"}
    out = theirs(**{names[k]: v.long() for k, v in given.items()})
    if task == "answer":
        logits = torch.stack([out.start_logits, out.end_logits], 1)
        return logits.masked_fill(~given["keep"][:, None], -torch.inf)
    if task == "similar":
        keep = given["keep"][..., None]
        return (out.last_hidden_state * keep).sum(1) / keep.sum(1)
    return out.logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("task", OURS)
@torch.no_grad()
def test_exported_heads_are_the_same_function(task, dtype, tmp_path):
    ours = saved(task, tmp_path / "best.pt")
    convert.main(["export", str(tmp_path / "best.pt"), "--to", str(tmp_path / "there")])
    transformers = peer("transformers")
    more = {"add_pooling_layer": False} if task == "similar" else {}
    theirs, info = getattr(transformers, AUTO[task]).from_pretrained(
        tmp_path / "there", output_loading_info=True, dtype=dtype, **more
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    given = batch("bert")
    if task in ("tag", "similar"):
        del given["segments"]
    near = 1e-5 if dtype == torch.float32 else 1e-10
    got, want = ours.to(dtype)(**given), their_logits(task, theirs.eval(), given)
    got, want = (x[given["keep"]] if task == "tag" else x for x in (got, want))
    torch.testing.assert_close(got.to(dtype), want, atol=near, rtol=near)
    if hasattr(ours.config, "labels"):
        assert tuple(theirs.config.id2label.values()) == ours.config.labels
        assert theirs.config.label2id == {x: i for i, x in enumerate(ours.config.labels)}
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "there")
    for text in TEXT:
        assert reader(text)["input_ids"][1:-1] == wordpiece().encode(text)
    card = (tmp_path / "there" / "README.md").read_text(encoding="utf-8")
    assert "reviews.csv" in card and "some/where" not in card


@pytest.mark.parametrize("task", ["classify", "tag", "answer"])
def test_fine_tuned_classes_come_in_again(task, tmp_path, capsys):
    ours = saved(task, tmp_path / "best.pt")
    convert.main(["export", str(tmp_path / "best.pt"), "--to", str(tmp_path / "there")])
    convert.main(["import", str(tmp_path / "there"), "--out", str(tmp_path / "again.pt")])
    found = checkpoints.load(tmp_path / "again.pt")
    assert found["task"] == task and found["model_config"] == vars(OURS[task])
    assert found["model"].keys() == ours.state_dict().keys()
    assert all(torch.equal(found["model"][n], t) for n, t in ours.state_dict().items())
    flags = ["--checkpoint", str(tmp_path / "again.pt"), "--prompt=the\tcat", "--device=cpu"]
    if task == "answer":
        (tmp_path / "text.txt").write_text("the cat sat on the mat", encoding="utf-8")
        flags += ["--context", str(tmp_path / "text.txt")]
    capsys.readouterr()
    sample.main(flags)
    assert capsys.readouterr().out.strip()


def test_labels_are_in_the_order_of_their_numbers(tmp_path):
    """A program that sorts keys as texts writes "10" before "2"."""
    names = {str(i): f"name {i}" for i in range(12)}
    said = their_settings("classify", LabelConfig(*SIZES, labels=tuple(names.values())))
    said["id2label"] = {key: names[key] for key in sorted(names)}
    assert list(said["id2label"])[:3] == ["0", "1", "10"]
    assert our_config(said)[1].labels == tuple(names.values())


def test_a_tagger_of_an_old_version_has_a_pooler_that_nothing_uses(tmp_path):
    ours = saved("tag", tmp_path / "best.pt")
    there = tmp_path / "there"
    convert.main(["export", str(tmp_path / "best.pt"), "--to", str(there)])
    tensors, C = tensors_of(there), SIZES[4]
    pooler = {"bert.pooler.dense.weight": torch.ones(C, C), "bert.pooler.dense.bias": torch.ones(C)}
    put_tensors(there, tensors | pooler)
    found, _ = import_model(str(there))
    assert found["model"].keys() == ours.state_dict().keys()
    put_tensors(there, tensors | {"bert.pooler.dense.weight": torch.ones(C, C + 1)})
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.weight is not a pooler"):
        import_model(str(there))


def test_a_tagger_whose_labels_are_no_tags_is_refused(tmp_path):
    saved("tag", tmp_path / "best.pt")
    convert.main(["export", str(tmp_path / "best.pt"), "--to", str(tmp_path / "there")])
    path = tmp_path / "there" / "config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    said["id2label"] = {"0": "O", "1": "NOUN", "2": "VERB"}
    path.write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json: 'NOUN' is no tag"):
        import_model(str(tmp_path / "there"))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"id2label": {"0": "a", "2": "b"}}, "does not name the labels 0, 1, 2"),
        ({"id2label": {"0": "a", "1": "a"}}, "has a name twice"),
        ({"id2label": ["a", "b"]}, "does not name the labels"),
        ({"id2label": {"0": "a", "1": "b"}}, r"misshapen: classifier\.weight"),
        ({"problem_type": "multi_label_classification"}, "problem_type='multi_label"),
        ({"id2label": {"0": "LABEL_0"}}, "a single label is a regression"),
    ],
    ids=str,
)
def test_wrong_labels_are_refused(change, message, tmp_path):
    saved("classify", tmp_path / "best.pt")
    convert.main(["export", str(tmp_path / "best.pt"), "--to", str(tmp_path / "there")])
    path = tmp_path / "there" / "config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(said | change), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        import_model(str(tmp_path / "there"))
