"""The pass over a chunk of logits behind `linear_*`: scores, `outputs` and, in place, the gradient of each row's
log-probability."""

import pytest
import torch

from kto_kernels import reference
from kto_kernels.backends import BACKENDS
from kto_kernels.options import OUTPUTS, Scale
from tests.support.harness import assert_as_accurate, dtypes, places

# Scales one by one away from their defaults. V: one vector less than, equal to and past a tile, odd, one.
SCALES = [Scale(), Scale(logit_scale=0.3), Scale(softcap=5.0), Scale(temperature=1.7), Scale(0.5, 4.0, 0.6)]


def chunk(rows: int, vocab: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with a row stride of their own, NaN behind each row; a label that is the maximum, tied or not, and one
    that is nearly impossible."""
    buffer = torch.full((rows, vocab + 3), torch.nan)
    logits = buffer[:, :vocab].copy_(3 * torch.randn(rows, vocab))
    labels = torch.randint(vocab, (rows,))
    if rows > 3 and vocab > 2:
        labels[0] = logits[0].argmax()
        logits[1, labels[1]] = 20.0
        logits[2, labels[2]] = -60.0
        logits[3, :] = 1.0  # all tied
        labels[3] = 0
    return buffer.to(device, dtype)[:, :vocab], labels.to(device)


def run(place, logits, labels, scale, gradient=True, outputs=OUTPUTS):
    backend, _ = place
    buffer = logits.clone() if logits.is_contiguous() else logits._base.clone()[:, : logits.shape[1]]
    return BACKENDS[backend].score_chunk(buffer, labels, scale, gradient, outputs), buffer


@places
@dtypes
@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 300])
def test_scores_and_gradient_equal_the_definition(place, dtype, scale, vocab):
    logits, labels = chunk(6, vocab, dtype, place[1])
    scores, gradient = run(place, logits, labels, scale)

    def definition(x):
        ones = torch.ones(labels.shape, device=x.device, dtype=reference.compute_dtype(x.dtype))
        return (
            reference.token_logps(x, labels, **vars(scale)),
            reference.outputs(x, labels, OUTPUTS, **vars(scale)),
            reference.token_logps_grad(x, labels, ones, **vars(scale)),
        )

    logps, extra, grad = definition(logits)
    exact_logps, exact_extra, exact_grad = definition(logits.double())
    fp32 = torch.finfo(torch.float32).eps
    assert_as_accurate("logps", scores.logps, logps, exact_logps, fp32)
    # The entropy is a difference of sums: of log V and less.
    assert_as_accurate("entropy", scores.entropy, extra["entropy"], exact_extra["entropy"], 4 * fp32, 8.0)
    assert_as_accurate("mean", scores.mean_logits, extra["mean_logits"], exact_extra["mean_logits"], 4 * fp32, 3.0)
    assert torch.equal(scores.is_top1, exact_extra["is_top1"])
    assert_as_accurate("gradient", gradient, grad, exact_grad, torch.finfo(dtype).eps)


@places
def test_nothing_but_what_was_asked_for(place):
    logits, labels = chunk(5, 70, torch.float32, place[1])
    scores, after = run(place, logits, labels, Scale(), gradient=False, outputs=())
    assert scores.entropy is None and scores.mean_logits is None and scores.is_top1 is None
    assert torch.equal(after, logits)
    alone, _ = run(place, logits, labels, Scale(), gradient=True, outputs=("mean_logits",))
    assert alone.entropy is None and alone.mean_logits is not None
    assert torch.equal(alone.logps, scores.logps)


@places
def test_masked_vocabulary_and_ties(place):
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [-torch.inf, -torch.inf, 2.0], [2.0, 2.0, 1.0], [2.0, 2.0, 1.0]])
    labels = torch.tensor([1, 2, 0, 1])
    scores, gradient = run(place, logits.to(place[1]), labels.to(place[1]), Scale())
    assert scores.logps[0] == -torch.inf and scores.logps[1] == 0
    torch.testing.assert_close(scores.entropy[:2].cpu(), torch.tensor([0.58220309, 0.0]))
    assert (scores.mean_logits[:2] == -torch.inf).all()
    assert scores.is_top1.tolist() == [False, True, True, False]
    assert torch.isfinite(gradient).all()
    assert (gradient[1] == 0).all()


@places
def test_a_nan_stays_in_its_row(place):
    logits, labels = chunk(5, 70, torch.float32, place[1])
    logits[2, 5] = torch.nan
    scores, gradient = run(place, logits, labels, Scale())
    assert scores.logps[2].isnan() and scores.entropy[2].isnan() and scores.mean_logits[2].isnan()
    assert gradient[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.isfinite(scores.logps[others]).all() and torch.isfinite(gradient[others]).all()


@places
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_scaling_in_place_rounds_once(place, dtype, factor):
    values = torch.randn(37, 5, device=place[1]).to(dtype)
    tensor = values.clone()
    BACKENDS[place[0]].scale_(tensor, torch.tensor(factor, device=place[1]))
    assert torch.equal(tensor, (values.float() * factor).to(dtype))


@places
@dtypes
def test_a_row_of_many_tiles_equals_the_definition(place, dtype):
    """More than any kernel takes at once, and an odd rest; the maximum moves along the row."""
    vocab = 9001
    logits = torch.linspace(-8, 8, vocab).expand(3, vocab).contiguous()
    logits[1] = logits[0].flip(0)
    logits[2] = 3 * torch.randn(vocab)
    logits, labels = logits.to(place[1], dtype), torch.tensor([vocab - 1, vocab // 2, 5], device=place[1])
    scores, gradient = run(place, logits, labels, Scale())
    exact = reference.outputs(logits.double(), labels, OUTPUTS)
    torch.testing.assert_close(scores.logps.double(), reference.token_logps(logits.double(), labels), rtol=1e-6, atol=0)
    torch.testing.assert_close(scores.entropy.double(), exact["entropy"], rtol=1e-5, atol=0)
    torch.testing.assert_close(scores.mean_logits.double(), exact["mean_logits"], rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.is_top1, exact["is_top1"])
    # The torch backend is the definition in the logits' dtype, and PyTorch's softmax is off by 3e-6 where vectors have
    # eight lanes: each lane adds its exponentials one by one, and to falling ones rounding does the same again and again.
    wide = logits if place[0] == "torch" else logits.double()
    expected = reference.token_logps_grad(wide, labels, torch.ones(3, device=place[1], dtype=wide.dtype))
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), expected.double(), rtol=max(unit, 2e-6), atol=unit * 1e-4)


@places
def test_a_row_without_a_finite_logit(place):
    logits = torch.full((2, 70), -torch.inf, device=place[1])
    logits[1] = 0.0
    scores, gradient = run(place, logits, torch.tensor([3, 3], device=place[1]), Scale())
    assert scores.logps[0] == -torch.inf and scores.entropy[0] == 0 and not scores.is_top1[0]
    assert torch.isfinite(gradient).all() and torch.isfinite(scores.logps[1])


@places
def test_a_chunk_of_no_rows_gives_empty_scores(place):
    scores, _ = run(
        place, torch.empty(0, 9, device=place[1]), torch.empty(0, dtype=torch.int64, device=place[1]), Scale()
    )
    assert all(getattr(scores, name).shape == (0,) for name in ("logps", *OUTPUTS))
