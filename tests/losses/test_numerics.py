"""The numerics that the contract includes: tails, infinities, near-certain tokens, accuracy against fp64."""

import math

import pytest
import torch

from kto_kernels import kto_loss, reference, token_logps
from tests.support.harness import assert_as_accurate, dtypes, kernel_places, lengthy_kernel_places, places

INF = math.inf


def logps_and_grad(logits, labels, backend, **options):
    x = logits.clone().requires_grad_()
    out = token_logps(x, labels, backend=backend, **options)
    (grad,) = torch.autograd.grad(out.sum(), x)
    return out.detach(), grad


def exact(logits, labels, **options):
    x = logits.double().requires_grad_()
    out = reference.token_logps(x, labels, **options)
    (grad,) = torch.autograd.grad(out.sum(), x)
    return out.detach(), grad


# 1: a lone element; 15..17, 63..65: around vectors and unrolled steps; 1003: tails everywhere; 8192: whole blocks only.
@places
@dtypes
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 63, 64, 65, 1003, 8192])
def test_token_logps_are_accurate_at_any_width(vocab, dtype, place):
    backend, device = place
    logits = (4 * torch.randn(6, vocab)).to(device, dtype)
    labels = torch.tensor([0, vocab - 1, vocab // 2, -100, min(1, vocab - 1), vocab - 1], device=device)
    mine, grad = logps_and_grad(logits, labels, backend)
    truth, true_grad = exact(logits, labels)
    plain = reference.token_logps(logits, labels)
    assert_as_accurate("logps", mine, plain, truth, torch.finfo(torch.float32).eps)
    assert mine[3] == 0 and not grad[3].any()
    plain_grad = reference.token_logps_grad(logits, labels, torch.ones_like(plain))
    assert_as_accurate("gradient", grad, plain_grad, true_grad, torch.finfo(dtype).eps)


@places
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4])
def test_logits_of_any_magnitude_stay_accurate(scale, place):
    backend, device = place
    logits = (scale * torch.randn(4, 500)).to(device)
    labels = torch.tensor([0, 7, 499, 100], device=device)
    labels[3] = logits[3].argmax()
    mine, grad = logps_and_grad(logits, labels, backend)
    truth, true_grad = exact(logits, labels)
    torch.testing.assert_close(mine.double(), truth, rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(grad.double(), true_grad, rtol=3e-6, atol=2e-7)


@places
@pytest.mark.parametrize("constant", [-1e4, 1e4])
def test_logits_far_from_zero_stay_accurate(constant, place):
    backend, device = place
    logits = (constant + torch.randn(3, 300)).to(device)
    labels = torch.tensor([1, 2, 3], device=device)
    mine, grad = logps_and_grad(logits, labels, backend)
    truth, true_grad = exact(logits, labels)
    torch.testing.assert_close(mine.double(), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=2e-6, atol=1e-9)


@kernel_places
@pytest.mark.parametrize("gap", [10.0, 16.0, 18.0, 30.0, 60.0])
def test_near_certain_tokens_keep_their_digits(gap, place):
    """Naive fp32 says exactly 0 from a gap of about 17; over thousands of tokens that is a wrong reward."""
    backend, device = place
    logits = torch.zeros(2, 50, device=device)
    logits[0, 17] = gap
    logits[1, 17] = gap
    logits[1, 3] = gap - 2  # a rival that shares what is left
    labels = torch.tensor([17, 17], device=device)
    mine, grad = logps_and_grad(logits, labels, backend)
    truth, true_grad = exact_near_certain(logits, labels)
    torch.testing.assert_close(mine.double(), truth, rtol=3e-6, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=5e-6, atol=0)


def exact_near_certain(logits, labels):
    """fp64 log_softmax itself rounds away gaps past 36: log1p and expm1 written out."""
    z = logits.double()
    rest = (z - z.gather(-1, labels[:, None])).exp()
    rest.scatter_(-1, labels[:, None], 0.0)
    logps = -torch.log1p(rest.sum(-1))
    grad = -rest * logps.exp()[:, None]
    grad.scatter_(-1, labels[:, None], -torch.expm1(logps)[:, None])
    return logps, grad


@lengthy_kernel_places
def test_a_long_sum_of_near_certain_tokens(place):
    """100,000 tokens: at least ten times closer to the truth than naive fp32 (the promise for long completions)."""
    backend, device = place
    n = 100_000 if backend == "cpu" or device == "cuda" else 200  # the interpreter runs one row at a time
    logits = torch.randn(n, 8, device=device)
    labels = torch.randint(8, (n,), device=device)
    logits.scatter_(1, labels[:, None], 14.0)
    offsets = torch.tensor([0, n], device=device)
    out = kto_loss(
        logits, labels, torch.ones(1, dtype=torch.bool, device=device), cu_seqlens=offsets, kl=0.0, backend=backend
    )
    truth = exact_near_certain(logits, labels)[0].sum().item()
    naive = logits.log_softmax(-1).gather(-1, labels[:, None]).sum().item()
    assert abs(out.logps.item() - truth) < 0.1 * abs(naive - truth)


@places
@dtypes
def test_minus_infinity_is_an_ordinary_logit(dtype, place):
    backend, device = place
    logits = torch.randn(6, 70)
    logits[0, 10:60] = -INF  # masked vocabulary
    logits[1] = -INF
    logits[1, 5] = 2.0  # one finite logit, the label's
    logits[2] = -INF
    logits[2, 6] = 2.0  # one finite logit, not the label's
    logits[3] = -INF  # nothing at all
    logits[4, 64:] = -INF  # padded vocabulary: must not count as exp(0)
    logits[5, :64] = -INF  # only the tail
    labels = torch.tensor([3, 5, 5, 5, 5, 66])
    logits, labels = logits.to(device, dtype), labels.to(device)
    mine, grad = logps_and_grad(logits, labels, backend)
    truth, _ = exact(logits, labels)
    torch.testing.assert_close(mine.double(), truth, rtol=1e-6, atol=1e-6)
    assert mine[1] == 0 and mine[2] == -INF and mine[3] == -INF
    assert not torch.isnan(grad).any()
    assert not grad[0, 10:60].any() and not grad[4, 64:].any() and not grad[5, :64].any()
    assert grad[0].abs().sum() > 0.1 and grad[5].abs().sum() > 0.1


@kernel_places
@dtypes
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_masks_of_the_lowest_finite_number(temperature, dtype, place):
    """As many models mask. Divided by the temperature it may be more than fp32 holds; that is one token far away from
    the others, or −inf as the label's log-probability, and NaN nowhere."""
    backend, device = place
    low = torch.finfo(dtype).min
    logits = torch.randn(8, 40)
    logits[0, :20] = logits[1, 20:] = logits[2, 3] = logits[4, 3] = low
    logits[3], logits[5, 1:] = low, -1e30 if low < -1e30 else low
    logits[6, ::2], logits[6, 1::2] = -1e30 if low < -1e30 else low, low / 2
    logits[7, :4] = low / 3
    labels = torch.tensor([30, 3, 5, 3, 3, 0, 2, 3], device=device)
    logits = logits.to(device, dtype)
    logps, grad = logps_and_grad(logits, labels, backend, temperature=temperature)
    true_logps, true_grad = exact(logits, labels, temperature=temperature)
    torch.testing.assert_close(logps, true_logps.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, true_grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@places
@pytest.mark.parametrize("good", [True, False])
def test_an_impossible_label_saturates_its_sequence(good, place):
    """S = −inf: loss λ for a desirable sequence, 0 for an undesirable one, gradient 0, no NaN anywhere."""
    backend, device = place
    logits = torch.randn(3, 4, 20, device=device)
    labels = torch.randint(20, (3, 4), device=device)
    logits[1, 2, labels[1, 2]] = -INF
    ref = torch.randn(3, 4, 20, device=device)
    for masked_reference in (False, True):
        if masked_reference:
            ref[1, 2, labels[1, 2]] = -INF
        x = logits.clone().requires_grad_()
        out = kto_loss(
            x,
            labels,
            torch.full((3,), good, device=device),
            ref_logits=ref,
            kl=0.1,
            desirable_weight=1.25,
            reduction="none",
            backend=backend,
        )
        (grad,) = torch.autograd.grad(out.loss.sum(), x)
        assert out.loss[1] == (1.25 if good else 0.0)
        assert torch.isfinite(out.loss).all() and torch.isfinite(grad).all()
        assert not grad[1].any() and grad[0].any() and grad[2].any()


@places
def test_impossible_kl_completions_make_no_nan(place):
    """S^π = −inf among the mismatched completions: the estimate clamps to 0; S^ref = −inf alone: it is +inf, and every
    sequence saturates. Never a NaN."""
    backend, device = place
    logits = torch.randn(2, 3, 9, device=device)
    labels = torch.randint(9, (2, 3), device=device)
    good = torch.tensor([True, False], device=device)
    minus = torch.tensor([-INF, -3.0], device=device)
    plain = torch.tensor([-4.0, -3.0], device=device)
    for kl_logps, ref_kl_logps, z0 in ((minus, plain, 0.0), (minus, minus, 0.0), (plain, minus, INF)):
        x = logits.clone().requires_grad_()
        out = kto_loss(
            x,
            labels,
            good,
            ref_logps=torch.tensor([-INF, -5.0], device=device),
            kl_logps=kl_logps,
            ref_kl_logps=ref_kl_logps,
            backend=backend,
        )
        out.loss.backward()
        assert out.kl == z0
        assert torch.isfinite(out.loss) and not torch.isnan(x.grad).any()


@places
@pytest.mark.parametrize("poison", [math.nan, INF])
def test_nan_and_inf_stay_in_their_sequence(poison, place):
    backend, device = place
    logits = torch.randn(3, 4, 150, device=device)
    labels = torch.randint(150, (3, 4), device=device)
    labels[1, 1] = 17
    logits[1, 2, 40] = poison
    options = {"kl": 0.0, "reduction": "none", "backend": backend}
    good = torch.ones(3, dtype=torch.bool, device=device)
    x = logits.clone().requires_grad_()
    out = kto_loss(x, labels, good, **options)
    (grad,) = torch.autograd.grad(out.loss.sum(), x)
    assert torch.isnan(out.loss).tolist() == [False, True, False]
    assert torch.isfinite(grad[0]).all() and torch.isfinite(grad[2]).all() and torch.isnan(grad[1]).any()
    # In an ignored row it is not even read into a result.
    labels[1, 2] = -100
    x = logits.clone().requires_grad_()
    out = kto_loss(x, labels, good, **options)
    (grad,) = torch.autograd.grad(out.loss.sum(), x)
    assert torch.isfinite(out.loss).all() and torch.isfinite(grad).all()
    # The label's own logit too.
    logits[1, 2], logits[1, 1, 17] = 0.0, poison
    assert torch.isnan(kto_loss(logits, labels, good, **options).loss).tolist() == [False, True, False]


@places
def test_duplicated_maxima_stay_accurate(place):
    backend, device = place
    logits = torch.full((3, 40), 2.0, device=device)
    logits[1, 5:] = -1.0
    labels = torch.tensor([0, 4, 20], device=device)
    mine, grad = logps_and_grad(logits, labels, backend)
    truth, true_grad = exact(logits, labels)
    torch.testing.assert_close(mine.double(), truth, rtol=2e-7, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=2e-6, atol=1e-9)


@places
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_a_maximum_that_keeps_moving(order, place):
    """Sorted logits over a wide range: the running reference is rescaled again and again, or never."""
    backend, device = place
    logits = torch.linspace(-300, 300, 3000, device=device).repeat(2, 1)
    if order == "falling":
        logits = logits.flip(-1)
    labels = torch.tensor([0, 2999], device=device)
    mine, grad = logps_and_grad(logits, labels, backend)
    truth, true_grad = exact(logits, labels)
    torch.testing.assert_close(mine.double(), truth, rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(grad.double(), true_grad, rtol=2e-6, atol=1e-9)


@places
@pytest.mark.parametrize("margin", [17.0, 60.0, 85.0])
@pytest.mark.parametrize("side", [1, -1])
def test_saturated_losses_keep_loss_and_gradient(margin, side, place):
    """`1 − σ(x)` would be 0 from x ≈ 17 in fp32; λ·σ(−x) and its gradient live to the smallest fp32 number."""
    backend, device = place
    logits = torch.zeros(1, 1, 4, device=device, requires_grad=True)
    labels = torch.zeros(1, 1, dtype=torch.int64, device=device)
    ref = torch.tensor([math.log(0.25) - side * margin], device=device, dtype=torch.float64)
    out = kto_loss(
        logits, labels, torch.ones(1, dtype=torch.bool, device=device), ref_logps=ref, kl=0.0, beta=1.0, backend=backend
    )
    out.loss.backward()
    x = side * margin
    loss = 1 / (1 + math.exp(x))
    slope = loss / (1 + math.exp(-x))
    # fp32 cannot tell 1 − e^-margin from 1, but the tail itself must be there.
    assert out.loss.item() == pytest.approx(loss, rel=1e-6, abs=0)
    assert logits.grad[0, 0].tolist() == pytest.approx([-0.75 * slope] + [0.25 * slope] * 3, rel=1e-6, abs=0)


@kernel_places
def test_error_is_at_most_that_of_naive_pytorch(place):
    """Against fp64 on a realistic width: the README's first promise."""
    backend, device = place
    n, vocab = 512 if backend == "cpu" or device == "cuda" else 8, 49152
    logits = 3 * torch.randn(n, vocab, device=device)
    labels = torch.randint(vocab, (n,), device=device)
    labels[::2] = logits[::2].argmax(-1)  # half of them the model's own choice, as in a good completion
    mine, grad = logps_and_grad(logits, labels, backend)
    truth, true_grad = exact(logits, labels)
    x = logits.clone().requires_grad_()
    naive = x.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    (naive_grad,) = torch.autograd.grad(naive.sum(), x)

    def rms(a, b):
        return (a.double() - b).square().mean().sqrt().item()

    assert rms(mine, truth) <= rms(naive.detach(), truth)
    assert rms(grad, true_grad) <= rms(naive_grad, true_grad)
