"""losses.py: the chunked loss beside the plain one, and both beside torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from engine import losses
from engine.losses import linear_cross_entropy
from model import plain_cross_entropy

SMOOTHINGS = [0.0, 0.1]


def problem(V: int, N: int, C: int, dtype=torch.float32):
    """Features (N, C) and weight (V, C) with gradients, targets (N,); some of these are -100."""
    features = torch.randn(N, C, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, C, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (N,))
    targets[1::4] = -100
    return features, weight, targets


def values_and_gradients(function, features, weight, targets, smoothing, bias=None):
    """(loss, nll, gradient of features, of weight, and of bias) of 3 · loss: a factor may get
    lost."""
    loss, nll, _ = function(features, weight, targets, smoothing, bias)
    inputs = (features, weight) if bias is None else (features, weight, bias)
    return loss.detach(), nll, *torch.autograd.grad(3 * loss, inputs)


def assert_same(got, want) -> None:
    """Numbers to 1e-6, gradients to 1e-5 of the largest element."""
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    for a, b in zip(got[2:], want[2:], strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("V,N,C", [(37, 13, 7), (7, 37, 13), (101, 1, 5), (2, 64, 3), (13, 8, 1)])
@pytest.mark.parametrize("rows", [None, 1, 5, 8])
def test_a_chunk_at_a_time_is_the_same(monkeypatch, V, N, C, rows, smoothing):
    """The chunks divide neither the rows nor the vocabulary; the smallest is a single row."""
    if rows:
        monkeypatch.setitem(losses.CHUNK, "cpu", rows * V + V - 1)
    case = *problem(V, N, C), smoothing
    got = values_and_gradients(linear_cross_entropy, *case)
    assert_same(got, values_and_gradients(plain_cross_entropy, *case))


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_a_bias_of_the_words_is_the_same(monkeypatch, smoothing):
    monkeypatch.setitem(losses.CHUNK, "cpu", 5 * 37)
    case = *problem(37, 13, 7), smoothing, torch.randn(37, requires_grad=True)
    got = values_and_gradients(linear_cross_entropy, *case)
    want = values_and_gradients(plain_cross_entropy, *case)
    assert len(got) == 5 and got[4].abs().min() > 0
    assert_same(got, want)
    # The bias changes something: without it the loss is another one.
    assert abs(values_and_gradients(plain_cross_entropy, *case[:-1])[0] - want[0]) > 0.1


@pytest.mark.parametrize("function", [linear_cross_entropy, plain_cross_entropy])
def test_the_number_of_right_words_is_that_of_the_highest_logits(monkeypatch, function):
    monkeypatch.setitem(losses.CHUNK, "cpu", 5 * 7)
    features, weight, targets = problem(7, 64, 13)
    with torch.no_grad():
        weight[1::2] = weight[:-1:2]  # of equal logits, which bf16 often has, the first one counts
    best = (features @ weight.T).argmax(-1)
    targets[:32], targets[32:40] = best[:32], (best[32:40] + 1) % 7
    targets[::4] = -100
    kept = [i for i in range(64) if targets[i] != -100]
    want = sum(int(best[i]) == int(targets[i]) for i in kept)
    assert 24 <= want < len(kept)
    assert function(features, weight, targets, accuracy=True)[2].item() == want
    assert function(features, weight, targets)[2].item() == 0


def test_a_vocabulary_wider_than_a_chunk_goes_row_by_row(monkeypatch):
    monkeypatch.setitem(losses.CHUNK, "cpu", 10)
    case = *problem(37, 13, 7), 0.1
    got = values_and_gradients(linear_cross_entropy, *case)
    assert_same(got, values_and_gradients(plain_cross_entropy, *case))


def test_the_chunks_are_as_small_as_they_claim(monkeypatch):
    """Holding all logits at once would give the right numbers too, but save nothing."""
    largest = []
    real = torch.Tensor.log_softmax
    monkeypatch.setitem(losses.CHUNK, "cpu", 4 * 37)
    monkeypatch.setattr(
        torch.Tensor, "log_softmax", lambda x, d: largest.append(x.numel()) or real(x, d)
    )
    linear_cross_entropy(*problem(37, 13, 7), 0.1)
    assert largest == [4 * 37, 4 * 37, 4 * 37, 1 * 37]


@pytest.mark.parametrize("function", [linear_cross_entropy, plain_cross_entropy])
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_leading_axes_and_torch_as_the_oracle(monkeypatch, function, smoothing):
    """(B, T, C) with (B, T) targets; values and gradients are those of F.cross_entropy."""
    monkeypatch.setitem(losses.CHUNK, "cpu", 100)
    features, weight, targets = problem(37, 3 * 13, 7)
    shaped = features.view(3, 13, 7)
    loss, nll, _ = function(shaped, weight, targets.view(3, 13), smoothing)
    logits = features @ weight.T
    want = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    plain = F.cross_entropy(logits, targets, reduction="sum").detach()
    wanted = want.detach(), plain, *torch.autograd.grad(want, (features, weight))
    assert_same((loss.detach(), nll, *torch.autograd.grad(loss, (features, weight))), wanted)
    assert loss.shape == nll.shape == () and loss.dtype == nll.dtype == torch.float32


def test_smoothing_is_the_formula_of_the_docstring():
    features, weight, targets = problem(37, 13, 7)
    log_p = (features @ weight.T).log_softmax(-1)
    wanted = torch.zeros(13, 37)
    for row, target in enumerate(targets.tolist()):
        if target != -100:
            wanted[row] = 0.2 / 37
            wanted[row, target] += 0.8
    loss, nll, _ = linear_cross_entropy(features, weight, targets, 0.2)
    torch.testing.assert_close(loss, -(wanted * log_p).sum())
    kept = targets != -100
    torch.testing.assert_close(nll, -log_p[kept, targets[kept]].sum().detach())


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_without_targets_loss_and_gradient_are_zero(smoothing):
    """A micro-batch of padding only once gave 0 / 0, and NaN stays for good."""
    features, weight, targets = problem(37, 13, 7)
    got = values_and_gradients(
        linear_cross_entropy, features, weight, torch.full_like(targets, -100), smoothing
    )
    assert all(torch.equal(x, torch.zeros_like(x)) for x in got)


def test_features_of_ignored_targets_count_for_nothing(monkeypatch):
    monkeypatch.setitem(losses.CHUNK, "cpu", 100)
    features, weight, targets = problem(37, 13, 7)
    want = values_and_gradients(linear_cross_entropy, features, weight, targets, 0.1)
    ignored = targets == -100
    other = features.detach().clone()
    other[ignored] += 5
    other.requires_grad_()
    got = values_and_gradients(linear_cross_entropy, other, weight, targets, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (got[2][ignored] == 0).all() and (got[2][~ignored] != 0).all()


def test_without_gradient_there_is_no_gradient_work():
    """Evaluation would otherwise pay for three products instead of one."""
    features, weight, targets = problem(37, 13, 7)
    one_product = 2 * 37 * 13 * 7
    with FlopCounterMode(display=False) as counter:
        loss, nll, right = linear_cross_entropy(features, weight, targets, 0.1, accuracy=True)
    assert loss.requires_grad and counter.get_total_flops() == 3 * one_product
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        quiet = linear_cross_entropy(features, weight, targets, 0.1, accuracy=True)
    assert counter.get_total_flops() == one_product
    assert all(x.grad_fn is None and not x.requires_grad for x in quiet)
    assert all(torch.equal(a, b) for a, b in zip(quiet, (loss, nll, right), strict=True))


def test_the_second_number_has_no_gradient():
    for function in (linear_cross_entropy, plain_cross_entropy):
        _, nll, _ = function(*problem(37, 13, 7), 0.1)
        assert not nll.requires_grad
        with pytest.raises(RuntimeError, match="does not require grad"):
            nll.backward()


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_gradients_equal_finite_differences(smoothing):
    """Logits are rounded to float32, hence the large step and the tolerance."""
    features, weight, targets = problem(7, 5, 3, torch.double)
    assert torch.autograd.gradcheck(
        lambda f, w: linear_cross_entropy(f, w, targets, smoothing)[0].double(),
        (features, weight),
        eps=1e-2,
        atol=1e-3,
        rtol=1e-3,
    )


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_under_autocast_it_stays_near_float32(monkeypatch, smoothing):
    """bf16 products with a float32 softmax and sums; gradients in the types of their inputs."""
    monkeypatch.setitem(losses.CHUNK, "cpu", 1000)
    case = *problem(37, 50, 13), smoothing
    want = values_and_gradients(linear_cross_entropy, *case)
    with torch.autocast("cpu", torch.bfloat16):
        got = values_and_gradients(linear_cross_entropy, *case)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in got)
    assert not torch.equal(got[2], want[2])  # that autocast was heeded
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_gives_what_the_processor_gives(monkeypatch):
    features, weight, targets = problem(101, 64, 24)
    want = values_and_gradients(plain_cross_entropy, features, weight, targets, 0.1)
    monkeypatch.setitem(losses.CHUNK, "cuda", 101 * 10)
    there = (x.detach().cuda().requires_grad_(x.requires_grad) for x in (features, weight, targets))
    got = values_and_gradients(linear_cross_entropy, *there, 0.1)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)
