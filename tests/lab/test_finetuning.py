"""lab/finetuning.py: Hugging Face's class behind our names gives what ours gives, and the peer's
loop learns."""

import re

import pytest
import torch
from conftest import peer
from finetuning import FILES, batch_of, flags, losses_in, model_of, write_files

import train
from engine.hub.peers import hugging_face_encoder
from lab.finetuning import Theirs, main, random_batches

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("task", ["classify", "tag", "answer"])
def test_their_class_gives_our_sums(task):
    ours, batch = model_of(task).eval(), batch_of(task)
    theirs = Theirs(hugging_face_encoder(peer("transformers"), ours, task)).eval()
    if task == "answer":  # -100 would be a place to them; here it is ours that decides
        batch |= {name: batch[name].clamp(min=0) for name in ("start_targets", "end_targets")}
    want, got = ours(**batch), theirs(**batch)
    assert got.keys() == want.keys()
    torch.testing.assert_close(losses_in(got), losses_in(want), atol=1e-4, rtol=1e-5)
    keep = batch["keep"] if task == "tag" else torch.ones(len(batch["tokens"]), dtype=torch.bool)
    torch.testing.assert_close(got["predicted"][keep], want["predicted"][keep], atol=1e-5, rtol=0)


def test_random_batches_hold_every_row_once_an_epoch():
    rows = [{"tokens": torch.full((n,), n), "targets": torch.tensor(n)} for n in range(1, 14)]
    batches = random_batches(rows, 5, pad=0)
    seen = []
    for size in (5, 5, 3):
        batch = next(batches)
        assert len(batch["tokens"]) == size
        assert torch.equal(batch["keep"], batch["tokens"] != 0)
        assert torch.equal(batch["keep"].sum(1), batch["targets"])
        seen += batch["targets"].tolist()
    assert sorted(seen) == list(range(1, 14))


def test_both_are_timed_and_theirs_is_trained(toy, capsys):
    peer("transformers")
    write_files(toy)
    train.main([*flags("classify", "--steps=2"), "--out=base"])
    capsys.readouterr()
    said = ["--init=base/best.pt", f"--data={FILES['classify']}", "--repeats=2", "--minutes=0.05"]
    main([*said, f"--valid=valid-{FILES['classify']}", "--lr=3e-3"])
    out = capsys.readouterr().out
    times = re.findall(r"(ours|theirs) +([\d.]+) s an epoch of 150 rows", out)
    assert [name for name, _ in times] == ["ours", "theirs"]
    ratio = float(re.search(r"ratio +([\d.]+)", out)[1])
    assert ratio == pytest.approx(float(times[0][1]) / float(times[1][1]), abs=0.02)
    losses = [float(x) for x in re.findall(r"step [\d,]+: loss ([\d.]+)", out)]
    assert len(losses) >= 2 and losses[-1] < losses[0]


def test_what_it_cannot_compare_is_refused():
    with pytest.raises(ValueError, match="--model similar is not known: choose classify, tag"):
        main(["--model=similar"])
    with pytest.raises(ValueError, match=r"--repeats 1 is out of range: choose between 2"):
        main(["--repeats=1"])
