"""cpu.py: settings change how fast numbers come, and nothing about the numbers."""

import ctypes
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

import model as model_file
import tasks
from engine import cpu
from model import GPT, Dropout, GPTConfig, attend, causal_mask

pytestmark = pytest.mark.usefixtures("installed")


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
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # the user's choice stays
    cpu.limit_threads()
    assert torch.get_num_threads() == 5


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone"
)
def test_freed_memory_stays():
    """Freed memory is used for later allocations in any order. It runs in a process of its own,
    whose heap no other test has used. Without the setting each of the last rounds takes 10,000
    pages or more."""
    script = """
import resource, torch
from engine import cpu
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
def test_attention_written_out_equals_torch_with_gradients(kind, dropout, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "by_onednn", True)  # as on AMD's processors
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
    assert model_file.attention_kernel is cpu.attention
    got = attend(q, k, v, mask, 0.0)
    gradients = torch.autograd.grad((got * weights).sum(), (q, k, v))
    model_file.attention_kernel = F.scaled_dot_product_attention
    want = attend(q, k, v, mask, 0.0)
    wanted = torch.autograd.grad((want * weights).sum(), (q, k, v))
    for a, b in zip((got, *gradients), (want, *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def called(monkeypatch) -> list:
    """The dtypes in which torch's own attention was called."""
    called, real = [], F.scaled_dot_product_attention

    def spy(q, *args, **kwargs):
        called.append(q.dtype)
        return real(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return called


@pytest.mark.parametrize("by_onednn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_kernel_is_chosen_by_who_multiplies(by_onednn, dtype, dropout, called, monkeypatch):
    monkeypatch.setattr(cpu, "by_onednn", by_onednn)
    for T in (9, 256):
        called.clear()
        q = torch.randn(1, 2, T, 4, dtype=dtype, requires_grad=True)
        got = cpu.attention(q, q, q, None, dropout, True)
        assert got.dtype == dtype
        if by_onednn or dropout:
            assert not called  # written out
        else:
            long = dtype == torch.bfloat16 and T == 256
            assert called == [torch.bfloat16 if long else torch.float32]
        if not dropout:
            want = F.scaled_dot_product_attention(q.float(), q.float(), q.float(), is_causal=True)
            assert (got - want).abs().max() < (1e-5 if dtype == torch.float32 else 0.03)


def test_long_rows_do_not_hold_their_scores(called, monkeypatch):
    monkeypatch.setattr(cpu, "LONG", 49)
    monkeypatch.setattr(cpu, "by_onednn", True)
    for T, calls in ((6, 0), (7, 1)):
        q = torch.randn(1, 2, T, 4, requires_grad=True)
        got = attend(q, q, q, "causal", 0.0)
        assert len(called) == calls
        scores = (q @ q.transpose(-1, -2) / 2).masked_fill(~causal_mask(T, T), -torch.inf)
        torch.testing.assert_close(got, scores.softmax(-1) @ q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_laid_out_for_decoding_computes_the_same(dtype, by_onednn):
    cpu.by_onednn = by_onednn
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
    assert all(packed) if dtype == torch.bfloat16 and by_onednn else not any(packed)
    one = model.make_caches()  # a single row, which is a vector
    with torch.no_grad():
        rows = [model(tokens[:1, i : i + 1], caches=one) for i in range(13)]
    torch.testing.assert_close(torch.cat(rows, 1), want[:1], **near)


def test_a_cache_of_bf16_keys_is_fp32_and_attention_comes_back_as_bf16():
    model = GPT(GPTConfig(101, 16, 1, 2, 32)).to(torch.bfloat16).eval()
    caches = model.make_caches()
    with torch.no_grad():
        model(torch.randint(101, (1, 3)), caches=caches)
    assert caches[0].k.dtype == torch.bfloat16  # by itself a cache keeps the dtype of the keys
    cpu.lay_out_for_decoding(model)
    caches = model.make_caches()
    with torch.no_grad():
        model(torch.randint(101, (1, 3)), caches=caches)
    assert caches[0].k.dtype == caches[0].v.dtype == torch.float32
    q = torch.randn(1, 2, 1, 16, dtype=torch.bfloat16)
    got = attend(q, caches[0].k[:, :, :3], caches[0].v[:, :, :3], "causal", 0.0)
    assert got.dtype == torch.bfloat16


# ---- dropout: 16 random bits for each element, four elements in a word of 64 ---------------------


def scale_of(p: float) -> float:
    return 65536 / (65536 - round(65536 * p))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_is_the_identity_in_evaluation_and_at_zero(p):
    x, layer = torch.randn(7, 13), Dropout(p)
    assert layer.eval()(x) is x
    assert (layer.train()(x) is x) == (p == 0)


@pytest.mark.parametrize("p", [1 / 65536, 0.1, 0.3, 0.5])
def test_dropout_zeroes_its_share_and_keeps_the_mean(p):
    """Within 4 standard deviations of a binomial over 2 million elements, and each quarter of the
    random words by itself: a bias of 16 bits cut from 64 may be in one place only."""
    n = 2_000_000
    y = Dropout(p)(torch.ones(n))
    assert (y[y != 0] == scale_of(p)).all()
    assert y.mean().item() == pytest.approx(1, abs=4 * scale_of(p) * (p * (1 - p) / n) ** 0.5)
    for lane in (y, *(y[i::4] for i in range(4))):
        share = (lane == 0).double().mean().item()
        assert share == pytest.approx(p, abs=4 * (p * (1 - p) / len(lane)) ** 0.5)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_of_one_element_says_nothing_of_its_neighbours(p):
    """Correlation of elements 1 to 8 places apart, within 4 standard deviations; also inside a
    word and between the same quarters of two words."""
    n = 2_000_000
    mask = ((Dropout(p)(torch.ones(n)) == 0).double() - p) / (p * (1 - p)) ** 0.5
    for lag in range(1, 9):
        product = mask[:-lag] * mask[lag:]
        assert abs(product.mean().item()) < 4 / len(product) ** 0.5, lag
        for lane in range(4):
            assert abs(product[lane::4].mean().item()) < 4 / len(product[lane::4]) ** 0.5


@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (7, 13), (2, 3, 5), (2, 5, 8), (0, 4)])
def test_dropout_scales_what_it_keeps_in_any_shape(shape):
    x = torch.randn(shape)
    y = Dropout(0.4)(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    kept = y != 0
    assert torch.equal(y[kept], (x * scale_of(0.4))[kept])
    assert x.numel() < 50 or 0 < kept.sum() < x.numel()


def test_dropout_follows_the_seed_and_its_gradient_its_mask():
    x, layer = torch.randn(13, 37, requires_grad=True), Dropout(0.3)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        y = layer(x)
        masks.append(y != 0)
        gradient = torch.autograd.grad(y, x, 3 * torch.ones_like(y))[0]
        assert torch.equal(gradient, masks[-1] * (3 * torch.tensor(scale_of(0.3))))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert not torch.equal(layer(x), layer(x))


def test_dropout_of_views_and_of_bf16():
    x = torch.randn(13, 37).T  # not contiguous
    torch.manual_seed(5)
    y = Dropout(0.3)(x)
    torch.manual_seed(5)
    assert torch.equal(Dropout(0.3)(x.contiguous()), y)
    torch.manual_seed(5)
    half = Dropout(0.3)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.equal(half != 0, y != 0)
    torch.testing.assert_close(half.float(), y, rtol=0.02, atol=0)


@pytest.mark.parametrize("p", [1e-6, 0.999999])
def test_dropout_near_its_limits_stays_finite(p):
    """Rounded to 16 bits these are 0 and 1; at 1 the scale would be a division by zero."""
    y = Dropout(p)(torch.ones(10_000))
    assert y.isfinite().all() and (y == 0).float().mean().item() == pytest.approx(p, abs=0.002)


@pytest.mark.parametrize("name", ["cbow", "nnlm", "cnn", "rnn", "gru", "lstm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_other_language_model_is_laid_out_too(name, dtype):
    Model = tasks.network(name)
    model = Model(Model.Config(vocab_size=101, block_size=16, n_embd=32)).to(dtype).eval()
    tokens = torch.randint(101, (3, 13))
    with torch.no_grad():
        want = model(tokens)
        cpu.lay_out_for_decoding(model)
        got = model(tokens)
    near = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(got, want, rtol=near, atol=near)
