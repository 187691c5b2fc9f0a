"""lab/lengths.py: all contestants are attention, what it says about made-up costs, a quick run."""

import re

import pytest
import torch

from lab import lengths
from lab.growth import Cost
from model import causal_mask


def test_full_attention_is_the_same_either_way_and_the_sparse_ones_are_masks():
    T, device = 256, torch.device("cpu")
    kinds = lengths.contestants(T, device)
    q, k, v = torch.randn(3, 1, lengths.HEADS, T, lengths.WIDTH).unbind(0)
    full = kinds[lengths.WRITTEN_OUT](q, k, v)
    torch.testing.assert_close(kinds[lengths.KERNEL](q, k, v), full, atol=1e-5, rtol=1e-4)
    scores = (q @ k.transpose(-1, -2) / lengths.WIDTH**0.5).masked_fill(
        ~causal_mask(T, T).triu(-lengths.KEYS + 1), -torch.inf
    )
    torch.testing.assert_close(kinds["window"](q, k, v), scores.softmax(-1) @ v)
    for name in ("window", "dilated window", "BigBird"):  # causal, and not full
        changed = v.clone()
        changed[:, :, 200] += 1
        before, after = kinds[name](q, k, v), kinds[name](q, k, changed)
        assert torch.equal(before[:, :, :200], after[:, :, :200]), name
        assert not torch.allclose(before, full), name


def test_memory_grows_as_the_docstring_says():
    found = {T: lengths.measure(T, 1, torch.device("cpu")) for T in (1024, 2048)}
    growth = {name: found[2048][name].memory / found[1024][name].memory for name in found[1024]}
    assert growth[lengths.WRITTEN_OUT] > 3.3
    for name in ("window", "dilated window", "Linformer"):
        assert growth[name] < 2.3, name


def made_up(window: list[float]) -> lengths.Found:
    full = [1e-3, 4e-3, 16e-3]
    return {
        512 << i: {lengths.KERNEL: Cost(t, 1e6), "window": Cost(w, 1e6 * 2**i)}
        for i, (t, w) in enumerate(zip(full, window, strict=True))
    }


def test_what_it_says():
    found = made_up([2e-3, 3.9e-3, 8e-3])
    assert lengths.pays_from(found, "window", lengths.KERNEL) == 1024
    said = lengths.verdicts(found)
    assert said == [
        "- window: faster than the kernel from 1,024 positions on, 2.0 times as fast at 2,048."
    ]
    rows = {
        row[1].strip(): row
        for row in map(lambda r: r.split("|"), lengths.table("time", found).splitlines())
    }
    assert rows[lengths.KERNEL][-2].strip() == "2.00" and rows["window"][-2].strip() == "1.00"
    never = lengths.verdicts(made_up([2e-3, 3e-3, 17e-3]))
    assert never == ["- window: not faster than the kernel up to 2,048 positions."]


def test_what_would_take_too_much_is_not_run(monkeypatch):
    monkeypatch.setattr(lengths, "MOST", 2e6)
    found = {T: lengths.measure(T, 1, torch.device("cpu")) for T in (128, 256)}
    assert lengths.WRITTEN_OUT in found[128] and lengths.WRITTEN_OUT not in found[256]


@pytest.mark.slow
def test_a_quick_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lengths, "QUICK", [128, 256])
    lengths.main(["--quick", "--repeats=1"])
    said = capsys.readouterr().out
    assert len(re.findall(r"^\| (?:full|window|dilated|BigBird|Linformer).*\|$", said, re.M)) == 12
    assert said.count("- ") >= 4 and "thread" in said
    assert (tmp_path / "out/lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "BigBird" in (tmp_path / "out/lengths.md").read_text(encoding="utf-8")
