"""The definition itself: against the textbook formulas, finite differences and its own derivatives."""

import mpmath
import pytest
import torch
from torch.autograd import gradcheck

from kto_kernels import kl_reference_point, kto_loss, kto_loss_from_logps, reference, sequence_logps, token_logps
from tests.support.harness import plain, problem


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shift", [False, True])
def test_gradcheck_of_token_logps(softcap, shift):
    logits = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(7, (2, 4))
    labels[0, 2] = -100
    target = reference.targets(labels, shift, -100)

    def stage(x):
        return reference.token_logps(x, target, logit_scale=0.7, softcap=softcap, temperature=1.3)

    assert gradcheck(stage, (logits,))
    grad = torch.randn(2, 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad((stage(logits) * grad).sum(), logits)
    mine = reference.token_logps_grad(logits.detach(), target, grad, logit_scale=0.7, softcap=softcap, temperature=1.3)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_of_the_public_functions(packed, reduction):
    p = problem(batch=3, tokens=4, vocab=6, packed=packed, reduction=reduction, shift=True).to(torch.float64)
    logits = p.logits.requires_grad_()

    def whole(x):
        return kto_loss(x, p.labels, p.desirable, **p.tensors, **p.options).loss

    assert gradcheck(whole, (logits,))
    if not packed:
        assert gradcheck(lambda x: token_logps(x, p.labels, shift=True), (logits,))


def test_gradcheck_of_the_stages_after_the_seam():
    logps = (-5 * torch.rand(4, 6, dtype=torch.float64)).requires_grad_()
    desirable = torch.tensor([True, False, True, False])
    labels = torch.randint(2, (4, 6)) - 100
    ref = -15 * torch.rand(4, dtype=torch.float64)

    def stages(x, average):
        sums = sequence_logps(x, labels=labels, average_log_prob=average)
        return kto_loss_from_logps(sums, desirable, ref_logps=ref, kl=0.2, reduction="none").loss

    assert gradcheck(lambda x: stages(x, False), (logps,))
    assert gradcheck(lambda x: stages(x, True), (logps,))
    packed = torch.tensor([0, 5, 5, 17, 24], dtype=torch.int32)
    assert gradcheck(lambda x: sequence_logps(x, cu_seqlens=packed), (logps.detach().flatten().requires_grad_(),))


def test_the_definition_is_the_papers_formulas():
    """loss = λ − v with v and z0 written out as in the paper, on one small batch."""
    p = problem(beta=0.2, desirable_weight=1.1, undesirable_weight=0.9).to(torch.float64)
    values, _ = plain(p)

    def logps(logits, labels):
        log_p = torch.log(torch.softmax(logits, -1))
        return sum_rows([[log_p[i, t, y] for t, y in enumerate(row) if y != -100] for i, row in enumerate(labels)])

    def sum_rows(rows):
        return torch.stack([torch.stack(row).sum() if row else torch.zeros((), dtype=torch.float64) for row in rows])

    s, s_ref = logps(p.logits, p.labels), logps(p.tensors["ref_logits"], p.labels)
    kl = logps(p.tensors["kl_logits"], p.tensors["kl_labels"]) - logps(
        p.tensors["ref_kl_logits"], p.tensors["kl_labels"]
    )
    z0 = max(0.0, kl.mean().item())
    losses = []
    for r, good in zip(s - s_ref, p.desirable):
        v = 1.1 * torch.sigmoid(0.2 * (r - z0)) if good else 0.9 * torch.sigmoid(0.2 * (z0 - r))
        losses.append((1.1 if good else 0.9) - v)
    torch.testing.assert_close(values["loss"], torch.stack(losses).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(values["kl"].item(), z0, rtol=1e-12, atol=0)
    v = reference.value(s - s_ref, torch.tensor(z0), p.desirable, 0.2, (1.1, 0.9))
    lam = torch.where(p.desirable, 1.1, 0.9)
    torch.testing.assert_close((lam - v).mean(), values["loss"], rtol=1e-7, atol=0)


@pytest.mark.parametrize("x", [0.0, 1e-6, 17.0, 40.0, 200.0, 700.0])
def test_loss_and_slope_hold_in_both_tails(x):
    """`1 − σ(x)` is 0 from x ≈ 37 in fp64; λ·σ(−x) and its slope keep their digits down to the smallest number."""
    for sign in (1, -1):
        for good in (True, False):
            r = torch.tensor([sign * x], dtype=torch.float64, requires_grad=True)
            args = (r, torch.zeros((), dtype=torch.float64), torch.tensor([good]), 1.0, (1.5, 0.5))
            loss, slope = reference.loss(*args), reference.loss_slope(*args)
            (autograd_slope,) = torch.autograd.grad(loss.sum(), r)
            weight, turn = (1.5, 1) if good else (0.5, -1)
            z = mpmath.mpf(turn * sign * x)
            exact = weight / (1 + mpmath.exp(z))
            exact_slope = -turn * weight / (1 + mpmath.exp(z)) / (1 + mpmath.exp(-z))
            for mine, truth in ((loss, exact), (slope, exact_slope), (autograd_slope, exact_slope)):
                assert mine.item() == pytest.approx(float(truth), rel=1e-12, abs=0)
                assert mine.item() != 0


def test_targets_stay_inside_their_sequence():
    labels = torch.arange(10)
    packed = torch.tensor([0, 4, 4, 5, 10])
    assert reference.targets(labels, True, -1, packed).tolist() == [1, 2, 3, -1, -1, 6, 7, 8, 9, -1]
    assert reference.targets(labels.view(2, 5), True, -1).tolist() == [[1, 2, 3, 4, -1], [6, 7, 8, 9, -1]]
    assert reference.targets(labels, False, -1) is labels
    assert labels.tolist() == list(range(10))


def test_the_stages_compose_to_the_whole():
    p = problem(average_log_prob=True, shift=True, beta=0.7)
    whole = kto_loss(p.logits, p.labels, p.desirable, **p.tensors, **p.options)

    def side(logits, labels):
        logps = token_logps(logits, labels, shift=True)
        return sequence_logps(logps, labels=labels, shift=True, average_log_prob=True)

    t = p.tensors
    z0 = kl_reference_point(side(t["kl_logits"], t["kl_labels"]), side(t["ref_kl_logits"], t["kl_labels"]))
    staged = kto_loss_from_logps(
        side(p.logits, p.labels), p.desirable, ref_logps=side(t["ref_logits"], p.labels), kl=z0, beta=0.7
    )
    for name in ("logps", "ref_logps", "rewards", "kl", "loss"):
        torch.testing.assert_close(getattr(staged, name).float(), getattr(whole, name).float(), rtol=1e-6, atol=1e-7)


def test_metrics_on_a_known_batch():
    out = kto_loss_from_logps(
        torch.tensor([-1.0, -2.0, -4.0]),
        torch.tensor([True, False, True]),
        ref_logps=torch.tensor([-2.0, -1.0, -2.0]),
        kl=0.25,
        beta=0.5,
    )
    metrics = out.metrics()
    expected = {
        "loss": out.loss.item(),
        "kl": 0.25,
        "rewards/chosen": -0.25,
        "rewards/rejected": -0.5,
        "rewards/margins": 0.25,
        "logps/chosen": -2.5,
        "logps/rejected": -2.0,
    }
    assert metrics == pytest.approx(expected)
    assert all(type(value) is float for value in metrics.values())
