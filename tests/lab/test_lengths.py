"""lab/lengths.py: its contestants are the attentions that they are called, the exponents and
verdicts of known costs, the quick run from end to end."""

import re

import pytest
import torch

from lab import lengths
from lab.growth import Cost
from lab.lengths import KERNEL, WRITTEN_OUT
from model import attend, causal_mask

CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lengths, "LENGTHS", [64, 128, 256])
    monkeypatch.setattr(lengths, "QUICK", [64, 128])
    return tmp_path


def test_the_contestants_are_full_attention_and_patterns_within_it():
    T = 200
    q, k, v = torch.randn(3, 1, 4, T, 64)
    made = {name: f(q, k, v) for name, f in lengths.contestants(T, CPU).items()}
    want = attend(q, k, v, causal_mask(T, T), 0.0)
    torch.testing.assert_close(made.pop(WRITTEN_OUT), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.pop(KERNEL), want, atol=1e-5, rtol=1e-5)
    assert made.keys() == {"window", "dilated window", "BigBird", "Linformer"}
    for name, y in made.items():
        # Up to here a window sees everything; Linformer, and a window with holes, do not.
        same = torch.allclose(y[:, :, :128], want[:, :, :128], atol=1e-5)
        assert same == (name in ("window", "BigBird")), name
        assert name == "BigBird" or not torch.allclose(y, want, atol=1e-3), name


def test_what_needs_too_much_memory_is_not_run(monkeypatch):
    monkeypatch.setattr(lengths, "MOST", lengths.needed(WRITTEN_OUT, 32))
    monkeypatch.setattr(lengths, "make_step", lambda attention, T, device: (T, [torch.ones(1)]))
    monkeypatch.setattr(lengths, "peak_memory", lambda step, held: 100.0 * step)
    monkeypatch.setattr(lengths, "take_turns", lambda s, *_: {n: [9, T, 0] for n, T in s.items()})
    few, all_of_them = (lengths.measure(T, 3, CPU) for T in (64, 32))
    assert all_of_them.keys() - few.keys() == {WRITTEN_OUT}
    assert few[KERNEL] == Cost(9, 6400)


def known() -> lengths.Found:
    """The written-out form and the kernel grow with the square, a window and Linformer do not."""
    found = {}
    for T in (512, 1024, 2048, 4096):
        found[T] = {
            WRITTEN_OUT: Cost(2e-6 * T * T, 4.0 * T * T),
            KERNEL: Cost(1e-6 * T * T, 4.0 * T),
        }
        found[T] |= {"window": Cost(1.5e-3 * T, 8.0 * T), "BigBird": Cost(9e-3 * T, 8.0 * T)}
    del found[4096][WRITTEN_OUT]
    return found


def test_exponents_and_what_was_left_out_are_in_the_table():
    found = known()
    time, memory = (lengths.table(cost, found).splitlines() for cost in lengths.UNITS)
    last = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip(" |") for line in time[2:]
    }
    assert last == {WRITTEN_OUT: "2.00", KERNEL: "2.00", "window": "1.00", "BigBird": "1.00"}
    assert time[2] == f"| {WRITTEN_OUT} | 524.3 | 2,097.2 | 8,388.6 | over 6 GB | 2.00 |"
    assert memory[3].endswith("| 1.00 |")


def test_it_pays_from_the_length_from_which_on_it_is_always_faster():
    found = known()
    assert lengths.pays_from(found, "window", KERNEL) == 2048
    assert lengths.pays_from(found, "BigBird", KERNEL) is None
    assert lengths.pays_from(found, KERNEL, WRITTEN_OUT) == 512
    found[1024]["window"] = Cost(0.0, 1.0)  # once by chance
    found[2048]["window"] = Cost(99.0, 1.0)
    assert lengths.pays_from(found, "window", KERNEL) == 4096
    assert lengths.verdicts(known()) == [
        "- window: faster than the kernel from 2,048 positions on, 2.7 times as fast at 4,096.",
        "- BigBird: not faster than the kernel up to 4,096 positions.",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--quick"], []])
def test_the_script_writes_a_table_and_a_picture_and_writes_them_again(tiny, capsys, flags):
    for _ in range(2):
        lengths.main([*flags, "--repeats=1", "--out=new/l.png"])
        out = capsys.readouterr().out
        text = (tiny / "new/l.md").read_text(encoding="utf-8")
        assert text in out and re.search(r"cpu, \d+ threads?\.", text)
        last = "128" if flags else "256"
        assert f" | {last} | exponent |" in text and text.count("\n- ") == 4
    pytest.importorskip("matplotlib.figure")
    assert (tiny / "new/l.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--repeats=0"], "--repeats 0 is out of range: choose between 1 and 1000"),
        (["--out=l.pdf"], "--out l.pdf is no PNG picture: end it in .png"),
        (["--fast"], "there is no flag --fast"),
    ],
)
def test_refusals(tiny, flags, message):
    with pytest.raises(ValueError, match=message):
        lengths.main(flags)
