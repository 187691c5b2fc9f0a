"""The heads in tasks/ beside Hugging Face's classes, by perturbation; every way to learn less."""

import json
from contextlib import nullcontext
from pathlib import Path

import finetuning
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import peer, torchrun
from converting import noisy
from finetuning import (
    LENGTHS,
    N_FF,
    B,
    C,
    H,
    K,
    L,
    T,
    V,
    batch_of,
    gradients,
    inputs,
    losses_in,
    model_of,
)

import tasks
from bpe import Tokenizer
from data.buckets import pad_rows
from data.encoding import SPECIAL
from engine.config import from_data, resolve
from engine.evaluation import evaluate
from engine.processes import Processes
from tasks import similar
from tasks.similar import mean_pooled

ALONE = Processes(0, 1, torch.device("cpu"))
HEADS = pytest.mark.parametrize("task", ["classify", "tag", "answer"])

# ---- Hugging Face --------------------------------------------------------------------------------

THEIR_MODEL = {
    "classify": "BertForSequenceClassification",
    "tag": "BertForTokenClassification",
    "answer": "BertForQuestionAnswering",
}
EMBEDDINGS = "bert.embeddings."
PARTS = {
    "token_embedding": EMBEDDINGS + "word_embeddings",
    "position_embedding": EMBEDDINGS + "position_embeddings",
    "segment_embedding": EMBEDDINGS + "token_type_embeddings",
    "embedding_norm": EMBEDDINGS + "LayerNorm",
    "pooler": "bert.pooler.dense",
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.fc": "intermediate.dense",
    "mlp.proj": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def their_name(name: str, task: str) -> str:
    part, _, kind = name.rpartition(".")
    if part == "head":
        return f"{'qa_outputs' if task == 'answer' else 'classifier'}.{kind}"
    if not part.startswith("blocks."):
        return f"{PARTS[part]}.{kind}"
    _, number, part = part.split(".", 2)
    return f"bert.encoder.layer.{number}.{PARTS[part]}.{kind}"


def theirs_like(ours: nn.Module, task: str) -> nn.Module:
    transformers = peer("transformers")
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=C,
        num_hidden_layers=L,
        num_attention_heads=H,
        intermediate_size=N_FF,
        max_position_embeddings=T + 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2 if task == "answer" else K,
        pad_token_id=None,
    )
    theirs = getattr(transformers, THEIR_MODEL[task])(config).eval()
    theirs.load_state_dict({their_name(n, task): t for n, t in ours.state_dict().items()})
    return theirs


@HEADS
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole rows"])
@pytest.mark.parametrize("dtype,near", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_equals_hugging_face_logits_loss_and_gradients(task, padded, dtype, near, monkeypatch):
    if dtype == torch.float64:  # heads give fp32, which is there for bf16: not here
        monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    ours, batch = model_of(task).to(dtype), batch_of(task)
    theirs = theirs_like(ours, task).to(dtype)
    if not padded:
        del batch["keep"]
    named = {"input_ids": batch["tokens"], "token_type_ids": batch.get("segments")}
    named["attention_mask"] = batch["keep"].long() if padded else None
    if task == "answer":
        ends = {f"{x}_positions": batch[f"{x}_targets"] for x in ("start", "end")}
        given = {name: x.where(x >= 0, T) for name, x in ends.items()}  # theirs makes 0 of -100
    else:
        given = {"labels": batch["targets"]}
    answer = theirs(**named, **{k: v.clone() for k, v in given.items()})
    got, loss = ours(**inputs(batch)), answer.loss
    keep = batch.get("keep", torch.ones(B, T, dtype=torch.bool))
    if task == "answer":
        want = torch.stack([answer.start_logits, answer.end_logits], 1)
        # Theirs may answer with padding, and its loss knows of it: there is no -inf.
        masked = want.masked_fill(~keep[:, None], -torch.inf)
        both = zip(masked.unbind(1), ends.values(), strict=True)
        loss = 2 * loss if not padded else sum(F.cross_entropy(x, y) for x, y in both)
        assert (got[~keep[:, None].expand_as(got)] == -torch.inf).all()
        at = keep[:, None].expand_as(got)
    else:
        want, at = answer.logits, keep if task == "tag" else ...
    torch.testing.assert_close(got[at], want[at], atol=near, rtol=near)
    sums = ours(**batch)
    count = (next(v for k, v in batch.items() if k.endswith("targets")) != -100).sum()
    torch.testing.assert_close(losses_in(sums) / count, loss, atol=near, rtol=near)
    found, wanted = gradients(ours, losses_in(sums) / count), gradients(theirs, loss)
    scale = max(g.abs().max().item() for g in wanted.values())
    for name, gradient in found.items():
        want = wanted.pop(their_name(name, task))
        torch.testing.assert_close(gradient / scale, want / scale, atol=near, rtol=0, msg=name)
    assert not wanted


# ---- heads ---------------------------------------------------------------------------------------


def test_similarity_is_info_nce_written_out():
    """Each cosine by itself; the row without a target is still a negative of the others."""
    model, batch = model_of("similar").double(), batch_of("similar")
    vectors, loss, right = model(**inputs(batch)), 0.0, 0
    for j in range(B):
        if batch["targets"][j] == -100:
            continue
        scores = [F.cosine_similarity(vectors[j], vectors[B + i], dim=0) / 0.05 for i in range(B)]
        loss = loss - scores[j] + torch.stack(scores).logsumexp(0)
        right += max(range(B), key=scores.__getitem__) == j
    sums = model(**batch)
    assert sums["loss"].item() == pytest.approx(loss.item(), rel=1e-5) and loss > 1
    assert sums["accuracy"] == right
    assert torch.equal(sums["predicted"], vectors)


def test_embeddings_are_those_that_fill_writes():
    tokenizer = Tokenizer.train(["the cat sat on the mat"] * 3, 300, special_tokens=SPECIAL)
    model = model_of("similar", vocab_size=320)
    lines = ["the cat", "sat on the mat the cat", "", "mat"]
    rows = similar.framed(model, tokenizer, [tokenizer.encode(f" {x}") if x else [] for x in lines])
    tokens, keep = pad_rows(rows, tokenizer.special_tokens["[PAD]"])
    assert not keep.all()
    want = similar.embed(model, tokenizer, lines, "mean", 2)
    np.testing.assert_allclose(model(tokens, keep).detach().numpy(), want, atol=1e-5)


def test_the_mean_leaves_padding_out():
    features, keep = torch.randn(B, T, C), torch.arange(T) < LENGTHS[:, None]
    changed = features.where(keep[..., None], 1e6)
    assert torch.equal(mean_pooled(features, keep), mean_pooled(changed, keep))
    want = torch.stack([x[:n].mean(0) for x, n in zip(features, LENGTHS.tolist(), strict=True)])
    torch.testing.assert_close(mean_pooled(features, keep), want)
    torch.testing.assert_close(mean_pooled(features, None), features.mean(1))


@pytest.mark.parametrize("task", ["classify", "tag", "answer", "similar"])
def test_rows_alone_and_in_a_padded_batch_agree(task):
    model, batch = model_of(task), batch_of(task)
    padding = ~batch["keep"]
    other = {**batch, "tokens": batch["tokens"].where(~padding, V - 1)}
    got = model(**inputs(batch))
    changed = model(**inputs(other))
    for i, n in enumerate(batch["keep"].sum(1).tolist()):
        row = {k: x[i : i + 1, :n] for k, x in inputs(batch).items() if k != "keep"}
        alone = model(**row)[0]
        here = (i, slice(n)) if task == "tag" else (i, ..., slice(n)) if task == "answer" else i
        part = got[here]
        assert torch.equal(part, changed[here])
        torch.testing.assert_close(alone, part, atol=1e-5, rtol=1e-5)
    if task == "answer":
        shares = got.softmax(-1)
        assert (shares[padding[:, None].expand_as(shares)] == 0).all()
        assert (got[batch["keep"][:, None].expand_as(got)] > -torch.inf).all()


@pytest.mark.parametrize("task", ["classify", "tag", "answer", "similar"])
def test_what_has_no_target_does_not_count(task):
    model, batch = model_of(task), batch_of(task)
    sums = model(**batch)
    names = [name for name in batch if name.endswith("targets")]
    assert all((batch[name] == -100).any() for name in names)
    if task != "similar":  # there the row stays, as a negative
        kept = torch.tensor([0, 1, 3, 4])
        fewer = model(**{name: tensor[kept] for name, tensor in batch.items()})
        for name in sums.keys() - {"predicted"}:
            torch.testing.assert_close(sums[name], fewer[name], atol=1e-4, rtol=1e-5)
    none = model(**{k: v.clone().fill_(-100) if k in names else v for k, v in batch.items()})
    assert losses_in(none) == 0 and none.get("accuracy", 0) == 0 and losses_in(sums) > 0


@pytest.mark.parametrize("task", ["classify", "tag", "answer", "similar"])
def test_predictions_come_in_evaluation_alone(task):
    model, batch = model_of(task), batch_of(task)
    predicted, logits = model(**batch)["predicted"], model(**inputs(batch))
    choice = task in ("classify", "tag")
    assert torch.equal(predicted, logits.argmax(-1) if choice else logits)
    if choice:
        targets = batch["targets"]
        assert model(**batch)["accuracy"] == ((predicted == targets) & (targets >= 0)).sum()
    assert set(model.train()(**batch)) == set(model.eval()(**batch)) - {"predicted"}


def test_weighted_rows_sum_up_with_their_weights():
    model, batch = model_of("classify"), batch_of("classify")
    weights = torch.tensor([0.5, 2.0, 7.0, 0.0, 1.25])
    got = model(**batch, weights=weights)
    rows = [
        model(**{name: tensor[i : i + 1] for name, tensor in batch.items()})["loss"]
        for i in range(B)
    ]
    loss = sum(w * row for w, row in zip(weights, rows, strict=True))
    torch.testing.assert_close(got["loss"], loss)
    found, wanted = gradients(model, got["loss"]), gradients(model, loss)
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-4)
    assert got["accuracy"] == model(**batch)["accuracy"]


# ---- evaluation, of two processes too ------------------------------------------------------------


def reports(group: Processes, batch_size: int) -> dict[str, dict[str, float]]:
    """What an evaluation says of random models, on the files of finetuning.py."""
    found = {}
    for task in ("classify", "tag", "answer", "similar"):
        flags = finetuning.flags(task, f"--batch_size={batch_size}", "--tokens_per_step=1536")
        config, sizes, _ = resolve(flags)
        if task == "similar":  # there a step is one batch, and an evaluation has such batches too
            config.tokens_per_step = 24 * batch_size
        Model = tasks.network(task)
        _, data = tasks.task(task).Data.splits(config, sizes)
        torch.manual_seed(1)
        sizes |= {name: getattr(data, name) for name in from_data(Model.Config)}
        model = noisy(Model(Model.Config(**{**sizes, "vocab_size": 448})))
        found[task] = evaluate(model, data, group, nullcontext)
    return found


@pytest.fixture
def files(toy) -> Path:
    return finetuning.write_files(toy)


SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from engine import processes
from test_finetune import reports

group = processes.start("cpu")
tensors = [torch.arange(n).view(shape) for n, shape in ((0, (0, 3)), (1, ()), (24, (2, 3, 4)))]
for tensor in (*tensors, torch.randn(5, generator=torch.manual_seed(2)), torch.rand(1, 2, 3, 1)):
    for owner in (0, 1):
        got = group.broadcast_tensor(tensor + owner if group.rank == owner else None, owner)
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        torch.testing.assert_close(got, tensor + owner, atol=0, rtol=0, equal_nan=True)
found = {n: reports(group, n) for n in (64, 8)}
if group.main:
    print(json.dumps(found))
processes.stop(group)
"""


@pytest.mark.slow
def test_an_evaluation_does_not_depend_on_how_it_is_divided(files):
    """Into batches of 64, 32 and 8 rows, and between two processes."""
    (files / "two.py").write_text(SCRIPT, encoding="utf-8")
    alone = {n: reports(ALONE, n) for n in (64, 32, 8)}
    done = torchrun(2, script=str(files / "two.py"))
    assert done.returncode == 0, done.stderr
    two = {int(n): found for n, found in json.loads(done.stdout).items()}
    assert {"f1", "recall"} < set(alone[64]["tag"]) and 0 < alone[64]["answer"]["f1"] < 100
    for n, found in [*alone.items(), *two.items()]:
        for task, report in found.items():
            want = dict(alone[64][task])
            if task == "similar":  # loss and accuracy are those among the pairs of a batch
                want |= {name: alone[n][task][name] for name in ("loss", "accuracy")}
            assert report == pytest.approx(want, rel=1e-5), (n, task)
