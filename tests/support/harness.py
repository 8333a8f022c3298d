"""One problem, three answers: ours, the fp64 oracle, and plain PyTorch in the problem's own dtype.

The oracle is `kto_kernels.reference`, differentiated by autograd in fp64, outside our operators. Our error may be what
plain PyTorch's is in that dtype, times 1.5, and a unit in the last place of the largest value: no bound that a gradient
of zeros would meet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from kto_kernels import KTOOutput, kto_loss, reference
from kto_kernels.backends import BACKENDS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_IDS = ["fp32", "bf16", "fp16"]

# (backend, device): on the CPU Triton runs in its interpreter and the CUDA kernels in their emulation (where it was
# built); with a GPU, there.
_PAIRS = [("torch", "cpu"), ("cpu", "cpu")]
_GPU_PAIRS = [(name, "cuda") for name in BACKENDS if name != "cpu"] if torch.cuda.is_available() else []
if not _GPU_PAIRS:
    _PAIRS += [(name, "cpu") for name in ("triton", "cuda") if BACKENDS[name].unavailable(torch.device("cpu")) is None]


def on_gpu(pair: tuple[str, str]):
    """Marked `gpu`; skipped, with the backend's own reason, where it cannot run (a CUDA extension that nobody built)."""
    reason = BACKENDS[pair[0]].unavailable(torch.device(pair[1]))
    return [pytest.mark.gpu, *([pytest.mark.skip(reason=reason)] if reason else [])]


PLACES = [pytest.param(pair, id="-".join(pair)) for pair in _PAIRS] + [
    pytest.param(pair, id="-".join(pair), marks=on_gpu(pair)) for pair in _GPU_PAIRS
]
places = pytest.mark.parametrize("place", PLACES)
# The torch backend is plain PyTorch, the yardstick of accuracy: what only the kernels promise leaves it out.
_KERNEL_PLACES = [p for p in PLACES if p.values[0][0] != "torch"]
kernel_places = pytest.mark.parametrize("place", _KERNEL_PLACES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)


def _lengthy(cases: list) -> pytest.MarkDecorator:
    """Places for a test that takes Triton's interpreter many seconds: in `make test` other backends take the turn."""
    wide = [pytest.param(*p.values, id=p.id, marks=[*p.marks, pytest.mark.wide]) for p in cases]
    return pytest.mark.parametrize("place", [w if w.id == "triton-cpu" else p for p, w in zip(cases, wide)])


lengthy_places = _lengthy(PLACES)
# For what does not depend on the kernels, so that the interpreter would only take long.
uninterpreted_places = pytest.mark.parametrize("place", [p for p in PLACES if p.id != "triton-cpu"])
lengthy_kernel_places = _lengthy(_KERNEL_PLACES)


@dataclass
class Problem:
    """Arguments of `kto_loss`: `tensors` hold logits (any dtype), labels and offsets, `options` the rest."""

    logits: Tensor
    labels: Tensor
    desirable: Tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Problem:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype) if tensor.is_floating_point() and tensor.dim() > 1 else tensor.to(device)

        return Problem(
            move(self.logits),
            self.labels.to(device),
            self.desirable.to(device),
            {name: move(tensor) for name, tensor in self.tensors.items()},
            self.options,
        )


def problem(
    batch: int = 4,
    tokens: int = 6,
    vocab: int = 131,
    kl_batch: int = 3,
    kl_tokens: int = 4,
    *,
    packed: bool = False,
    ref: str | None = "logits",
    kl: str | None = "logits",
    ref_kl: str | None = "logits",
    ignore_index: int = -100,
    label_dtype: torch.dtype = torch.int64,
    offset_dtype: torch.dtype = torch.int32,
    spread: float = 3.0,
    **options,
) -> Problem:
    """A random problem, small enough for Triton's interpreter (some milliseconds a row). The policy stays near the reference, as in training, so that nothing saturates by chance."""

    def side(count: int, length: int):
        logits = spread * torch.randn(count, length, vocab)
        labels = torch.randint(vocab, (count, length), dtype=label_dtype)
        labels[torch.rand(count, length) < 0.3] = ignore_index
        if count > 2:
            labels[1] = ignore_index  # a sequence without a scored token
        if not packed:
            return logits, labels, None
        lengths = torch.randint(0, length + 1, (count,))
        lengths[0] = length
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(offset_dtype)
        n = int(offsets[-1])
        return logits.flatten(0, 1)[:n].contiguous(), labels.flatten(0, 1)[:n].contiguous(), offsets

    logits, labels, offsets = side(batch, tokens)
    tensors = {} if offsets is None else {"cu_seqlens": offsets}
    if ref == "logits":
        tensors["ref_logits"] = logits + 0.3 * torch.randn_like(logits)
    elif ref == "logps":
        tensors["ref_logps"] = -5.0 * tokens * torch.rand(batch)
    if "logits" in (kl, ref_kl):
        kl_logits, tensors["kl_labels"], kl_offsets = side(kl_batch, kl_tokens)
        if kl_offsets is not None:
            tensors["kl_cu_seqlens"] = kl_offsets
        if kl == "logits":
            # Sharper than its reference: a positive estimate, so that the clamp hides nothing.
            tensors["kl_logits"] = kl_logits
        if ref_kl == "logits":
            at = kl_logits.new_zeros(kl_logits.shape)
            for shift in (0, -1):  # whichever of the two scores the position
                labels_here = tensors["kl_labels"].roll(shift, -1).clamp(min=0).long()
                at.scatter_(-1, labels_here.unsqueeze(-1), 0.5)
            tensors["ref_kl_logits"] = kl_logits - at
    if kl == "logps":
        tensors["kl_logps"] = -10 * torch.rand(kl_batch, dtype=torch.float64)
    if ref_kl == "logps":
        tensors["ref_kl_logps"] = tensors["kl_logps"] - 2 if kl == "logps" else torch.full((kl_batch,), -40.0)
    if kl == "number":
        options["kl"] = 0.4
    elif kl == "tensor":
        tensors["kl"] = torch.tensor(0.4)
    if ignore_index != -100:
        options["ignore_index"] = ignore_index
    return Problem(logits, labels, torch.arange(batch) % 3 != 1, tensors, options)


class _ExactTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, ignore_index, logit_scale, softcap, temperature):
        z = reference.scaled(logits, logit_scale, softcap, temperature)
        ignored = target == ignore_index
        index = target.masked_fill(ignored, 0).long().unsqueeze(-1)
        y = z.gather(-1, index)
        impossible = y == -torch.inf
        odds = z.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True) - y  # log((1 − p_y) / p_y)
        logps = -torch.logaddexp(torch.zeros_like(odds), odds)
        logps = logps.masked_fill(impossible, -torch.inf)
        p = (z - y + logps).exp().masked_fill(z == -torch.inf, 0.0)
        p = p.where(~impossible, z.softmax(-1).masked_fill((z == -torch.inf).all(-1, keepdim=True), 0.0))
        slope = torch.full_like(z, logit_scale / temperature)
        if softcap is not None:
            slope = slope / torch.cosh(logits * logit_scale / softcap) ** 2
        direction = (-p).scatter(-1, index, -torch.expm1(logps)) * slope
        ctx.save_for_backward(direction.masked_fill(ignored.unsqueeze(-1), 0.0))
        return logps.squeeze(-1).masked_fill(ignored, 0.0)

    @staticmethod
    def backward(ctx, grad):
        (direction,) = ctx.saved_tensors
        return torch.where(grad.unsqueeze(-1) == 0, 0.0, grad.unsqueeze(-1) * direction), *(None,) * 5


def exact_token_logps(logits, target, ignore_index=-100, logit_scale=1.0, softcap=None, temperature=1.0):
    """`reference.token_logps` of fp64 logits where even fp64 would lose the digits of a near-certain label: its odds
    against all others, `log1p` and `expm1` instead of a softmax."""
    return _ExactTokenLogps.apply(logits, target, ignore_index, logit_scale, softcap, temperature)


DEFAULTS = {
    "beta": 0.1,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "loss_type": "kto",
    "shift": False,
    "ignore_index": -100,
    "temperature": 1.0,
    "average_log_prob": False,
    "reduction": "mean",
}


def sequence_sums(
    problem: Problem,
    side: str,  # "", "ref_", "kl_" or "ref_kl_"
    logits: Tensor | None,
    token_logps=reference.token_logps,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor | None:
    """Stages 1 and 2 of a side's logits; without logits its log-probabilities as given, if any."""
    given, options = problem.tensors, DEFAULTS | problem.options
    if logits is None:
        return given.get(f"{side}logps")
    labels = given["kl_labels"] if "kl" in side else problem.labels
    cu_seqlens = given.get("kl_cu_seqlens" if "kl" in side else "cu_seqlens")
    ignore_index = options["ignore_index"]
    target = reference.targets(labels, options["shift"], ignore_index, cu_seqlens)
    logps = token_logps(logits, target, ignore_index, logit_scale, softcap, options["temperature"])
    scored = target != ignore_index if options["average_log_prob"] else None
    return reference.sequence_logps(logps, scored, cu_seqlens)


def plain(problem: Problem, token_logps=reference.token_logps, **scale) -> tuple[dict[str, Tensor], Tensor]:
    """The stages of `kto_kernels.reference` on the problem as it is, with autograd's gradient of the (summed) loss."""
    options, given = DEFAULTS | problem.options, problem.tensors
    logits = problem.logits.detach().requires_grad_()
    logps = sequence_sums(problem, "", logits, token_logps, **scale)
    ref_logps, kl_logps, ref_kl_logps = (
        sequence_sums(problem, side, given.get(f"{side}logits"), token_logps, **scale)
        for side in ("ref_", "kl_", "ref_kl_")
    )
    if kl_logps is not None:
        z0 = reference.kl_reference_point(kl_logps, ref_kl_logps)
    else:
        z0 = torch.as_tensor(given.get("kl", options.get("kl", 0.0)), dtype=torch.float64, device=logits.device)
        z0 = z0.clamp(min=0)
    r = reference.log_ratio(logps, ref_logps)
    weights = (options["desirable_weight"], options["undesirable_weight"])
    losses = reference.loss(r, z0, problem.desirable, options["beta"], weights)
    loss = reference.reduce(losses, options["reduction"])
    (grad,) = torch.autograd.grad(upstream(loss), logits)
    values = {
        "loss": loss,
        "logps": logps,
        "ref_logps": torch.zeros_like(logps) if ref_logps is None else ref_logps,
        "rewards": options["beta"] * r,
        "kl": z0,
    }
    return {name: value.detach() for name, value in values.items()}, grad


def upstream(loss: Tensor) -> Tensor:
    """A scalar of the loss: with a gradient of its own for every sequence where it is not reduced."""
    return (loss * torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)).sum()


def ours(problem: Problem, backend: str, **extra) -> tuple[KTOOutput, Tensor]:
    """`kto_loss` and its gradient; the logits are no leaf, so that `inplace_backward` may be asked for."""
    logits = problem.logits.detach().clone(memory_format=torch.preserve_format).requires_grad_() * 1
    out = kto_loss(
        logits, problem.labels, problem.desirable, **problem.tensors, **problem.options, **extra, backend=backend
    )
    (grad,) = torch.autograd.grad(upstream(out.loss), logits)
    return out, grad


def assert_as_accurate(
    name: str, mine: Tensor, plain_result: Tensor, exact: Tensor, unit: float, largest: float | None = None
) -> None:
    """|mine − exact| ≤ 1.5 |plain − exact| + one unit in the last place of the `largest` value that went into it (by
    default, of the exact result) and of the smallest one that its dtype holds."""
    assert mine.shape == exact.shape, name
    smallest = torch.finfo(mine.dtype).smallest_normal * torch.finfo(mine.dtype).eps
    assert torch.isfinite(mine).all(), name
    if exact.numel() == 0:
        return
    mine, plain_result, exact = mine.double().cpu(), plain_result.double().cpu(), exact.double().cpu()
    error = (mine - exact).abs().max().item()
    largest = exact.abs().max().item() if largest is None else largest
    allowed = 1.5 * (plain_result - exact).abs().max().item() + unit * largest + smallest
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def assert_same(place: tuple[str, str], mine: Tensor, expected: Tensor, slack: float = 0.0) -> None:
    """Equal bits in another layout. The GPU kernels' tiles begin at aligned addresses, so that there another alignment
    groups the sums otherwise: equal to some units in the last place, and what those make of what comes after (`slack`,
    relative)."""
    if place[0] in ("triton", "cuda"):
        unit = 4 * torch.finfo(mine.dtype if mine.dtype.itemsize < 4 else torch.float32).eps + slack
        torch.testing.assert_close(mine, expected, rtol=unit, atol=unit * 1e-3 * expected.abs().max().item())
    else:
        assert torch.equal(mine, expected)


def check(problem: Problem, place: tuple[str, str], dtype: torch.dtype, **extra) -> KTOOutput:
    """Runs the problem on a backend and compares every output and the gradient with the oracle."""
    backend, device = place
    typed = problem.to(dtype, device)
    exact, exact_grad = plain(typed.to(torch.float64, device))
    rounded, rounded_grad = plain(typed)
    out, grad = ours(typed, backend, **extra)
    fp32 = torch.finfo(torch.float32).eps
    # Rewards, loss and kl are made of differences of log-probabilities: those are what was rounded.
    logps = max(1.0, exact["logps"].abs().max().item(), exact["ref_logps"].abs().max().item())
    beta = problem.options.get("beta", 0.1)
    largest = {"kl": logps, "rewards": beta * logps, "loss": max(1.0, beta * logps)}
    for name, value in exact.items():
        assert_as_accurate(name, getattr(out, name), rounded[name], value, fp32, largest.get(name))
    assert grad.dtype == dtype
    # In fp64 there is nothing more exact to compare with: some units in the last place instead of one.
    unit = torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)
    assert_as_accurate("gradient", grad, rounded_grad, exact_grad, unit)
    return out
