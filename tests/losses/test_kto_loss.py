"""Every option of `kto_loss` away from its default, on every backend and dtype, against the fp64 oracle."""

import pytest
import torch

from tests.support.harness import check, dtypes, ours, places, problem, uninterpreted_places

# One option (or one combination that shares code) a row; the defaults of `problem` give reference and KL as logits.
CASES = {
    "all from logits": {},
    "reference log-probs": {"ref": "logps", "ref_kl": "logps"},
    "reference-free": {"ref": None, "ref_kl": None},
    "reference-free, KL log-probs": {"ref": None, "kl": "logps", "ref_kl": None},
    "KL number": {"kl": "number", "ref_kl": None},
    "KL tensor": {"kl": "tensor", "ref_kl": None},
    "KL log-probs": {"kl": "logps", "ref_kl": "logps"},
    "KL policy logits, reference log-probs": {"kl": "logits", "ref_kl": "logps"},
    "KL policy log-probs, reference logits": {"kl": "logps", "ref_kl": "logits"},
    "apo_zero_unpaired": {"kl": None, "ref_kl": None, "loss_type": "apo_zero_unpaired"},
    "beta and weights": {"beta": 0.03, "desirable_weight": 1.7, "undesirable_weight": 0.6},
    "weight zero": {"undesirable_weight": 0.0},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "average": {"average_log_prob": True, "beta": 1.0},
    "average, shift": {"average_log_prob": True, "beta": 1.0, "shift": True},
    "shift": {"shift": True},
    "temperature": {"temperature": 0.7},
    "temperature high": {"temperature": 3.0, "shift": True},
    "ignore_index": {"ignore_index": 3},
    "int32 labels": {"label_dtype": torch.int32},
    "packed": {"packed": True},
    "packed int64": {"packed": True, "offset_dtype": torch.int64, "label_dtype": torch.int32},
    "packed, shift": {"packed": True, "shift": True},
    "packed, shift, average, none": {
        "packed": True,
        "shift": True,
        "average_log_prob": True,
        "reduction": "none",
        "beta": 1.0,
    },
    "packed, apo": {"packed": True, "kl": None, "ref_kl": None, "loss_type": "apo_zero_unpaired", "reduction": "sum"},
    "one sequence of one token": {"batch": 1, "tokens": 1, "kl_batch": 1, "kl_tokens": 1},
    "one-token vocabulary": {"vocab": 1},
    "two-token vocabulary": {"vocab": 2, "shift": True},
    "vocabulary of a power of two": {"vocab": 256},
    "vocabulary past one block": {"vocab": 4099, "batch": 3, "tokens": 4, "kl_batch": 2, "kl_tokens": 3},
}
cases = pytest.mark.parametrize("case", list(CASES), ids=[name.replace(" ", "-") for name in CASES])


@places
@dtypes
@cases
def test_every_option_equals_the_oracle(case, dtype, place, poisoned_memory):
    out = check(problem(**CASES[case]), place, dtype)
    if case == "all from logits":
        assert out.kl > 0.1  # the clamp must not hide the KL stages from this grid


@places
@dtypes
@pytest.mark.parametrize("case", ["all from logits", "packed, shift", "none"])
def test_in_place_backward_gives_the_same_bits(case, dtype, place):
    p = problem(**CASES[case]).to(dtype, place[1])
    _, fresh = ours(p, place[0])
    _, inplace = ours(p, place[0], inplace_backward=True)
    assert torch.equal(fresh, inplace)


@uninterpreted_places  # the interpreter has no races to find
@cases
def test_the_same_input_gives_the_same_bits(case, place):
    p = problem(**CASES[case]).to(torch.float32, place[1])
    first, first_grad = ours(p, place[0])
    for _ in range(3):
        again, again_grad = ours(p, place[0])
        assert torch.equal(again_grad, first_grad)
        for name in ("loss", "logps", "ref_logps", "rewards", "kl"):
            assert torch.equal(getattr(again, name), getattr(first, name)), name


def test_fp64_on_the_torch_backend():
    p = problem(shift=True, temperature=0.9)
    out = check(p, ("torch", "cpu"), torch.float64)
    assert out.loss.dtype == torch.float64
    auto, _ = ours(p.to(torch.float64), "auto")
    assert torch.equal(auto.loss, out.loss)


@places
def test_a_batch_of_one_class_equals_the_oracle(place):
    for side in (True, False):
        p = problem()
        p.desirable = torch.full_like(p.desirable, side)
        out = check(p, place, torch.float32)
        metrics = out.metrics()
        absent = "rejected" if side else "chosen"
        assert not any(absent in name for name in metrics)
        assert "rewards/margins" not in metrics
        assert all(value == value for value in metrics.values())


@places
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch_is_a_differentiable_zero(packed, reduction, place):
    backend, device = place
    shape = (0, 11) if packed else (0, 4, 11)
    p = problem(kl="number", ref_kl=None, ref=None, reduction=reduction)
    p.logits = torch.zeros(shape, device=device)
    p.labels = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
    p.desirable = torch.zeros(0, dtype=torch.bool, device=device)
    if packed:
        p.tensors["cu_seqlens"] = torch.zeros(1, dtype=torch.int32, device=device)
    out, grad = ours(p, backend)
    assert out.loss.sum() == 0 and grad.shape == shape
    assert out.metrics()["loss"] == 0


@places
def test_sequences_without_tokens(place):
    """T = 0: every sequence scores 0."""
    backend, device = place
    p = problem(kl="number", ref_kl=None, ref=None).to(torch.float32, device)
    p.logits, p.labels = p.logits[:, :0], p.labels[:, :0]
    out, grad = ours(p, backend)
    assert torch.equal(out.logps, torch.zeros_like(out.logps)) and grad.numel() == 0
    assert torch.isfinite(out.loss)


@places
def test_a_batch_without_scored_tokens_equals_the_oracle(place):
    p = problem()
    p.labels = torch.full_like(p.labels, -100)
    out = check(p, place, torch.float32)
    assert torch.equal(out.logps, torch.zeros_like(out.logps))
    _, grad = ours(p.to(torch.float32, place[1]), place[0])
    assert torch.equal(grad, torch.zeros_like(grad))


@places
def test_without_mismatched_completions_z0_is_0(place):
    """K = 0, as on a rank that drew none: z0 is 0."""
    p = problem(kl="logps", ref_kl="logps", kl_batch=0)
    assert check(p, place, torch.float32).kl == 0


@places
def test_kl_is_clamped_at_zero(place):
    p = problem(kl="logps", ref_kl="logps")
    p.tensors["kl_logps"], p.tensors["ref_kl_logps"] = p.tensors["ref_kl_logps"], p.tensors["kl_logps"]
    assert check(p, place, torch.float32).kl == 0
    p = problem(kl="number", ref_kl=None)
    p.options["kl"] = -3.0
    assert ours(p.to(torch.float32, place[1]), place[0])[0].kl == 0


@places
def test_no_gradient_to_reference_or_kl(place):
    p = problem().to(torch.float32, place[1])
    for name, tensor in p.tensors.items():
        if tensor.is_floating_point():
            p.tensors[name] = tensor.requires_grad_()
    logits = p.logits.clone().requires_grad_()
    from kto_kernels import kto_loss

    out = kto_loss(logits, p.labels, p.desirable, **p.tensors, backend=place[0])
    out.loss.backward()
    assert logits.grad is not None
    assert all(tensor.grad is None for tensor in p.tensors.values())
    assert not any(getattr(out, name).requires_grad for name in ("logps", "ref_logps", "rewards", "kl"))
