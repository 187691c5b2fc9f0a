"""lab/growth.py: known exponents and weights are recovered; its formulas against torch's counters
and the model's own; the script from end to end, with tiny models."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from engine import kernels
from lab import growth
from lab.growth import Cost, Size
from model import GPT, GPTConfig, count_parameters

TINY = (Size(16, 64, 1, 1, 37), Size(8, 64, 1, 1, 37))
CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(growth.SIZES, "cpu", TINY)
    monkeypatch.setattr(growth, "sweep", lambda *sizes: SWEEP(*sizes, doublings=2))
    return tmp_path


SWEEP = growth.sweep

# ---- exponents and weights -----------------------------------------------------------------------


@given(st.floats(-3, 3), st.floats(0.01, 100))
def test_the_exponent_of_a_power_is_found_at_all_sizes(power, factor):
    at = [3, 7, 13, 37]
    found = growth.exponents(at, [factor * x**power for x in at])
    assert found == pytest.approx([power] * 3, abs=1e-9)


def test_exponents_come_in_the_order_of_the_sizes():
    assert growth.exponents([1, 2, 4], [1, 2, 8]) == pytest.approx([1, 2])


@settings(max_examples=50)
@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_the_weights_of_a_sum_are_found_although_the_terms_differ_by_12_digits(weights):
    terms = [[1e12 * n * n, 1e3 * n, 1.0] for n in (1, 2, 4, 8, 16)]
    true = [weights[0] / 1e12, weights[1] / 1e3, weights[2]]
    measured = [sum(w * t for w, t in zip(true, row, strict=True)) for row in terms]
    assert growth.fit_weights(terms, measured) == pytest.approx(true, rel=1e-6)


def test_no_weight_is_negative_and_a_term_that_is_never_there_has_none():
    found = growth.fit_weights([[n, 1.0, 0.0] for n in (1, 2, 4)], [0.5, 1.9, 4.3])
    assert found[0] == pytest.approx((2 + 1 / 0.95 + 1 / 1.075) / (4 + 0.95**-2 + 1.075**-2))
    assert found[1:] == [0, 0]


def test_errors_count_in_proportion():
    """Twice 1 and once 1,000 of what 1 x is: the middle of the ratios, not of the numbers."""
    assert growth.fit_weights([[1.0], [1000.0]], [2.0, 1000.0])[0] == pytest.approx(1.5 / 1.25)


def synthetic() -> tuple[dict, dict[Size, Cost]]:
    sweeps = growth.sweep(Size(64, 128, 3, 5, 700), Size(64, 128, 3, 5, 700))
    found = {}
    for size in {s for sizes in sweeps.values() for s in sizes}:
        rates = zip(growth.operations(size, "cpu").values(), (1e-11, 2e-11, 5e-12), strict=True)
        seconds = sum(n * rate for n, rate in rates) + 0.003 * size.L + 0.002
        found[size] = Cost(seconds, 2 * sum(growth.stored(size, "cpu").values()) + 7e6)
    return sweeps, found


def test_a_machine_of_known_rates_is_recognised():
    _, found = synthetic()
    series, said = growth.compare("time", found, "cpu")
    assert said == (
        "Fitted time: blocks at 100 GFLOP/s, attention at 50 GFLOP/s, head at 200 GFLOP/s, "
        "3.0 ms for each layer, 2.0 ms for each step; 0% off (median), 0% at most."
    )
    assert series["fitted"] == pytest.approx(series["measured"])
    ratios = [
        series["formula"][s] / sum(growth.operations(s, "cpu").values()) for s in series["formula"]
    ]
    assert max(ratios) == pytest.approx(min(ratios)) and 5e-9 < ratios[0] < 5e-8
    series, said = growth.compare("memory", found, "cpu")
    assert said.count("2.00 x the formula's ") == 5 and "7.0 MB for each step; 0%" in said
    for size, megabytes in series["formula"].items():
        assert 2e6 * megabytes + 7e6 == pytest.approx(1e6 * series["measured"][size])


def test_the_table_has_the_first_and_the_last_exponent_of_each():
    sweeps, found = synthetic()
    series, _ = growth.compare("memory", found, "cpu")
    lines = growth.exponent_table("memory", sweeps, series).splitlines()
    assert lines[0] == "| memory: what grows | sizes | MB | measured | formula | fitted | limit |"
    row = [cell.strip() for cell in lines[2 + list(sweeps).index("V")].strip("|").split("|")]
    assert row[:2] == ["vocabulary V", "700, 1,400, 2,800, 5,600, 11,200"] and row[6] == "1"
    sizes = sweeps["V"]
    assert row[2] == ", ".join(f"{found[s].memory / 1e6:,.0f}" for s in sizes)
    low, *_, before, last = (sum(growth.stored(s, "cpu").values()) for s in sizes)
    second = sum(growth.stored(sizes[1], "cpu").values())
    assert row[4] == f"{math.log2(second / low):.2f} → {math.log2(last / before):.2f}"
    reasons = [line for line in lines if line.startswith("- ")]
    assert len(reasons) == 5 and reasons[-1].startswith("- vocabulary: a new gradient")


# ---- the formulas --------------------------------------------------------------------------------

AWKWARD = [Size(13, 128, 2, 3, 37), Size(37, 64, 3, 1, 130), Size(8, 192, 1, 5, 7)]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("size", AWKWARD)
def test_operations_are_those_that_torch_counts(size):
    step, _ = growth.make_step(size, CPU)
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == sum(growth.operations(size, "cpu").values())


@pytest.mark.parametrize("size", AWKWARD)
def test_operations_are_those_of_the_model_but_for_biases_and_norms(size):
    model = GPT(GPTConfig(size.V, size.T, size.L, size.C // 64, size.C))
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    want = size.B * size.T * (model.flops_per_token() - 6 * vectors)
    found = growth.operations(size, "cuda")
    assert sum(found.values()) == want
    assert found["attention"] == size.B * size.T * 12 * size.L * size.C * size.T
    parameters = count_parameters(model) - vectors - size.T * size.C
    stored = growth.stored(size, "cuda")
    assert stored["blocks"] + stored["embeddings"] == 8 * parameters


def kept(size: Size) -> int:
    """Bytes of what autograd keeps for backward, of each storage once, weights left out."""
    model = GPT(GPTConfig(size.V, size.T, size.L, size.C // 64, size.C))
    known = {p.data_ptr() for p in model.parameters()}
    found = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.data_ptr() not in known:
            found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model.features(torch.randint(size.V, (size.B, size.T)))
    assert result.requires_grad
    return sum(found.values())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("T", [256, 1024])
def test_activations_and_scores_are_what_autograd_keeps(T):
    """Of three layers and one, what two more keep; at 1,024 positions no scores."""
    three, one = Size(T, 128, 3, 2, 37), Size(T, 128, 1, 2, 37)
    difference = {
        k: v - growth.stored(one, "cpu")[k] for k, v in growth.stored(three, "cpu").items()
    }
    want = difference["activations"] + difference["scores"]
    assert kept(three) - kept(one) == pytest.approx(want, rel=0.02)
    assert (difference["scores"] == 0) == (T == 1024)
    assert growth.stored(three, "cuda")["scores"] == 0


def test_the_limits_are_those_of_the_formulas():
    base = growth.SIZES["cpu"][0]
    for cost, formula in growth.FORMULAS.items():
        for axis, limit in growth.LIMITS[cost].items():
            at = [2**30, 2**31]
            costs = [sum(formula(base._replace(**{axis: n}), "cpu").values()) for n in at]
            assert growth.exponents(at, costs)[0] == pytest.approx(limit, abs=0.01)


# ---- measuring -----------------------------------------------------------------------------------


def test_one_size_grows_at_a_time_and_doubles():
    base, first = growth.SIZES["cpu"]
    sweeps = growth.sweep(base, first)
    assert list(sweeps) == list("TCLBV")
    for axis, sizes in sweeps.items():
        assert [getattr(s, axis) for s in sizes] == [getattr(first, axis) << i for i in range(5)]
        assert {s._replace(**{axis: 1}) for s in sizes} == {base._replace(**{axis: 1})}
        assert base in sizes


@pytest.mark.usefixtures("installed")
def test_memory_is_that_of_a_step_that_adds_to_gradients():
    size = Size(37, 64, 2, 3, 130)
    step, held = growth.make_step(size, CPU)
    model = GPT(GPTConfig(130, 37, 2, 1, 64))
    before = 8 * count_parameters(model) + 2 * 8 * 3 * 37
    assert growth.peak_memory(lambda: None, held) == before
    junk = growth.peak_memory(lambda: torch.empty(1000).add(1), held)
    assert junk == before + 8000
    found = growth.peak_memory(step, held)
    assert found > before + 0.9 * growth.stored(size, "cpu")["activations"]


def test_time_is_a_median_and_each_size_has_its_own(monkeypatch):
    monkeypatch.setattr(growth, "make_step", lambda size, device: (size.L, [torch.ones(1)]))
    monkeypatch.setattr(growth, "peak_memory", lambda step, held: 100.0 * step)
    monkeypatch.setattr(growth, "take_turns", lambda s, *_: {k: [9, v, 0] for k, v in s.items()})
    sizes = {Size(8, 64, n, 1, 7) for n in (5, 3)}
    assert growth.measure(sizes, 3, CPU) == {s: Cost(s.L, 100 * s.L) for s in sizes}


# ---- the script ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_script_writes_a_table_and_a_picture_and_writes_them_again(tiny, capsys):
    for _ in range(2):
        growth.main(["--repeats=1", "--out=new/g.png"])
        out = capsys.readouterr().out
        text, _, last = out.rpartition("\n\n")
        assert (tiny / "new/g.md").read_text(encoding="utf-8") == text + "\n"
        assert last == "the same in new/g.md, drawn in new/g.png\n"
        assert text.count("| context T | 8, 16, 32 |") == 2 and "T 16, C 64, L 1, B 1, V 37" in text
        assert (tiny / "new/g.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_a_panel_for_each_cost_and_size(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    made = []
    real = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda self, *a, **k: made.append(self) or real(self, *a, **k)
    )
    sweeps, found = synthetic()
    costs = {cost: growth.compare(cost, found, "cpu")[0] for cost in growth.UNITS}
    assert growth.draw(sweeps, costs, tmp_path / "g.png") == tmp_path / "g.png"
    panels = made[0].axes
    assert [p.get_xlabel() for p in panels[5:]] == [f"{growth.NAMES[a]} {a}" for a in sweeps]
    points = next(line for line in panels[4].get_lines() if line.get_label() == "measured")
    assert points.get_xdata().tolist() == [s.V for s in sweeps["V"]]
    assert points.get_ydata() == pytest.approx([1e3 * found[s].time for s in sweeps["V"]])
    last = growth.exponents([1, 2], [found[s].time for s in sweeps["C"][-2:]])[0]
    assert panels[1].get_title().startswith(f"slope {last:.2f}, formula ")
    assert panels[9].get_title().endswith("limit 1") and panels[1].get_title().endswith("limit 2")
    assert all(p.get_xscale() == p.get_yscale() == "log" for p in panels)


def test_without_matplotlib_there_is_a_table_and_a_sentence(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    growth.main(["--repeats=1", "--out=g.png"])
    out = capsys.readouterr().out
    assert "g.png is not drawn: pip install matplotlib\n" in out
    assert out.endswith("the same in g.md\n") and (tiny / "g.md").is_file()
    assert not (tiny / "g.png").exists()


@pytest.mark.parametrize("name", ["g.png", "g.md"])
def test_what_is_somebodys_own_stays(tiny, name):
    (tiny / name).write_text("notes about growth.py", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"--out {name} is there already: name another file"):
        growth.main(["--out=g.png"])
    assert (tiny / name).read_text(encoding="utf-8") == "notes about growth.py"
    assert len(list(tiny.iterdir())) == 1


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--repeats=0"], "--repeats 0 is out of range: choose between 1 and 1000"),
        (["--out=g.pdf"], "--out g.pdf is no PNG picture: end it in .png"),
        (["--device=tpu"], "--device tpu is not known: choose"),
        (["--repeat=3"], "there is no flag --repeat: did you mean --repeats"),
    ],
)
def test_refusals(tiny, flags, message):
    with pytest.raises(ValueError, match=message):
        growth.main(flags)


def test_a_device_without_sizes_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(growth, "pick_device", lambda name: torch.device("mps"))
    with pytest.raises(ValueError, match="--device mps is not measured: choose cpu or cuda"):
        growth.main([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_memory_grows_as_the_formula_says():
    device = torch.device("cuda")
    kernels.install(device)
    small, large = Size(256, 512, 4, 4, 4096), Size(256, 512, 8, 8, 4096)
    found = growth.measure({small, large}, 1, device)
    want = [sum(growth.stored(s, "cuda").values()) for s in (small, large)]
    grown = found[large].memory - found[small].memory
    assert grown == pytest.approx(want[1] - want[0], rel=0.15)
