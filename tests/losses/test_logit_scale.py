"""`logit_scale`, `softcap` and temperature inside the operators, forward and backward."""

import pytest
import torch

from kto_kernels import reference
from kto_kernels.ops.logits import TokenLogps, token_logps
from kto_kernels.options import Scale, Scoring
from tests.support.harness import assert_as_accurate, dtypes, places


# Gemma-2's cap, one that saturates most logits, and Cohere's scale.
@places
@dtypes
@pytest.mark.parametrize(
    ("logit_scale", "softcap", "temperature"),
    [(1.0, 30.0, 1.0), (0.7, 2.0, 1.3), (0.0625, None, 1.0), (3.0, None, 0.5), (2.0, 0.5, 2.0)],
)
def test_scaled_and_capped_logits_equal_the_definition(logit_scale, softcap, temperature, dtype, place):
    backend, device = place
    # 203: whole vectors, and a tail whose missing lanes a softcap would make finite.
    logits = (6 * torch.randn(3, 4, 203)).to(device, dtype)
    logits[0, 0, 1] = 1e-6  # tanh must not lose small numbers
    labels = torch.randint(203, (3, 4), device=device)
    labels[1, 2] = -100
    labels[0, 0] = 1
    grad = torch.randn(3, 4, device=device)
    scaling = {"logit_scale": logit_scale, "softcap": softcap, "temperature": temperature}

    x = logits.clone().requires_grad_()
    logps = token_logps(TokenLogps(x, labels, None, Scoring(Scale(**scaling), backend=backend))).logps
    (dx,) = torch.autograd.grad((logps * grad).sum(), x)

    answers = []
    for type_ in (torch.float64, dtype):
        z = logits.to(type_).requires_grad_()
        stage = reference.token_logps(z, labels, **scaling)
        answers.append((stage.detach(), torch.autograd.grad((stage * grad).sum(), z)[0]))
    (truth, true_grad), (plain, plain_grad) = answers
    assert_as_accurate("logps", logps.detach(), plain, truth, torch.finfo(torch.float32).eps)
    assert_as_accurate("gradient", dx, plain_grad, true_grad, torch.finfo(dtype).eps)
    assert not dx[1, 2].any()


@places
def test_softcap_keeps_minus_infinity_finite(place):
    """tanh(−inf) = −1: a capped −inf is the least of the finite logits, as the formula says."""
    backend, device = place
    logits = torch.randn(2, 50, device=device)
    logits[0, 3:20] = -torch.inf
    labels = torch.tensor([1, 2], device=device)
    scoring = Scoring(Scale(softcap=4.0), backend=backend)
    logps = token_logps(TokenLogps(logits, labels, None, scoring)).logps
    truth = reference.token_logps(logits.double(), labels, softcap=4.0)
    torch.testing.assert_close(logps.double(), truth, rtol=1e-6, atol=0)
