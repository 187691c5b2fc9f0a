"""cpu.py: settings change how fast numbers come, and nothing about the numbers."""

import ctypes
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

import cpu
import model as model_file
from model import GPT, GPTConfig, attend, causal_mask


@pytest.fixture(autouse=True)
def as_before():
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.set_num_threads(before[1])


def test_products_keep_all_digits_of_fp32():
    cpu.use_onednn()
    a, b = torch.randn(150, 370), torch.randn(370, 130)
    want = (a.double() @ b.double()).float()
    assert (a @ b - want).abs().max() < 1e-4  # in bf16 it would be 0.1


def test_a_processor_that_would_round_to_bf16_keeps_its_precision(monkeypatch):
    torch.set_float32_matmul_precision("high")
    real = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: real(a.bfloat16().float(), b.bfloat16().float())
    )
    cpu.use_onednn()
    assert torch.get_float32_matmul_precision() == "high"


def test_the_switch_to_mkl_ends_with_its_block():
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(KeyError), cpu.multiply_by_mkl():
        assert torch.get_float32_matmul_precision() == "highest"
        raise KeyError
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize(
    "quota,threads",
    [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 5), ("900000 100000", 5), (None, 5)],
)
def test_threads_are_no_more_than_a_container_may_use(tmp_path, monkeypatch, quota, threads):
    path = tmp_path / "cpu.max"
    if quota:
        path.write_text(quota + "\n", encoding="utf-8")
    monkeypatch.setattr(cpu, "QUOTA", path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(5)
    cpu.limit_threads()
    assert torch.get_num_threads() == threads
    torch.set_num_threads(5)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # who says so knows better
    cpu.limit_threads()
    assert torch.get_num_threads() == 5


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone"
)
def test_freed_memory_stays():
    """Once taken it is not taken again, whatever the order: in a process of its own, whose heap no
    other test has used. Without the setting each of the last rounds takes 10,000 pages or more."""
    script = """
import resource, torch, cpu
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(n) for n in (9_000_000, 3_000_000, 11_000_000, 5_000_000)]
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
cpu.keep_memory()
print(*[faults() for _ in range(14)])
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    first, *later = map(int, run.stdout.split())
    assert first > 27_000 and sum(later[-8:]) < 40_000


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["none", "causal", "bool"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_written_out_equals_torch_with_gradients(monkeypatch, kind, dropout, dtype):
    q, k, v = (torch.randn(2, 3, n, 5, dtype=dtype, requires_grad=True) for n in (7, 7, 7))
    mask = {"none": None, "causal": "causal", "bool": torch.rand(2, 1, 7, 7) < 0.6}[kind]
    if kind == "bool":
        mask[0, 0, 2] = False  # a query that sees nothing
    weights = torch.randn(2, 3, 7, 5, dtype=dtype)
    if dropout:  # torch draws others: the mean of many is the same, and what is kept is scaled
        with torch.no_grad():
            want = attend(q, k, v, mask, 0.0)
        mean = sum(attend(q, k, v, mask, dropout).detach() for _ in range(800)) / 800
        assert (mean - want).abs().mean() < 0.05
        assert not torch.equal(attend(q, k, v, mask, dropout), want)
        return
    got = attend(q, k, v, mask, 0.0)
    gradients = torch.autograd.grad((got * weights).sum(), (q, k, v))
    monkeypatch.setattr(model_file, "on_cpu", F.scaled_dot_product_attention)
    want = attend(q, k, v, mask, 0.0)
    wanted = torch.autograd.grad((want * weights).sum(), (q, k, v))
    for a, b in zip((got, *gradients), (want, *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_long_rows_do_not_hold_their_scores(monkeypatch):
    monkeypatch.setattr(model_file, "LONG", 49)
    called = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or real(*a, **k)
    )
    for T, calls in ((6, 0), (7, 1)):
        q = torch.randn(1, 2, T, 4, requires_grad=True)
        got = attend(q, q, q, "causal", 0.0)
        assert len(called) == calls
        scores = (q @ q.transpose(-1, -2) / 2).masked_fill(~causal_mask(T, T), -torch.inf)
        torch.testing.assert_close(got, scores.softmax(-1) @ q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_laid_out_for_decoding_computes_the_same(dtype):
    config = GPTConfig(vocab_size=101, block_size=16, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config).to(dtype).eval()
    tokens = torch.randint(101, (3, 13))
    with torch.no_grad():
        want = model(tokens)
        cpu.lay_out_for_decoding(model)
        got = model(tokens)
        caches = model.make_caches()
        steps = [model(tokens[:, i : i + 1], caches=caches) for i in range(13)]
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(got, want, **near)
    torch.testing.assert_close(torch.cat(steps, 1), want, **near)
    packed = [m.weight is None for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(packed) if dtype == torch.bfloat16 else not any(packed)


def test_a_cache_of_bf16_keys_is_fp32_and_attention_comes_back_as_bf16():
    model = GPT(GPTConfig(101, 16, 1, 2, 32)).to(torch.bfloat16).eval()
    caches = model.make_caches()
    with torch.no_grad():
        model(torch.randint(101, (1, 3)), caches=caches)
    assert caches[0].k.dtype == caches[0].v.dtype == torch.float32
    q = torch.randn(1, 2, 1, 16, dtype=torch.bfloat16)
    got = attend(q, caches[0].k[:, :, :3], caches[0].v[:, :, :3], "causal", 0.0)
    assert got.dtype == torch.bfloat16
