"""Formulas in fp64, which share nothing with the package, and comparisons with them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kto_kernels.options import Objective, Scale
from kto_kernels.records import ELSEWHERE, Rows

INF = torch.inf
IGNORED, ABSENT = -1, -2  # targets without a label here: ignored; among another rank's columns


def scaled(x: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
    """z and dz/dx."""
    x = x.double() * scale.logit_scale
    if scale.softcap is None:
        return x / scale.temperature, torch.full_like(x, scale.logit_scale / scale.temperature)
    t = torch.tanh(x / scale.softcap)
    return scale.softcap * t / scale.temperature, (1 - t * t) * scale.logit_scale / scale.temperature


def token_logps(x: Tensor, target: Tensor, scale: Scale) -> tuple[Tensor, Tensor, Tensor]:
    """log p of each target (0 where ignored, −inf where absent), p, and dz/dx."""
    z, slope = scaled(x, scale)
    top = z.amax(-1, keepdim=True)
    e = torch.exp(z - torch.where(top == -INF, 0.0, top))
    total = e.sum(-1, keepdim=True)
    p = torch.where(total == 0, 0.0, e / total)
    at = target.clamp(min=0).unsqueeze(-1)
    y = z.gather(-1, at)
    others = e.scatter(-1, at, 0.0).sum(-1, keepdim=True)
    certain = -torch.log1p(others / torch.exp(y - top))
    logp = torch.where(y == top, certain, (y - top) - torch.log(total))
    impossible = torch.where(p.isnan().any(-1, keepdim=True), torch.nan, -INF)
    logp = torch.where(y == -INF, impossible, logp).squeeze(-1)
    logp = torch.where(target == ABSENT, -INF, logp)
    return torch.where(target == IGNORED, 0.0, logp), p, slope


def logits_gradient(x: Tensor, target: Tensor, upstream: Tensor, scale: Scale) -> Tensor:
    logp, p, slope = token_logps(x, target, scale)
    label = -torch.expm1(logp).unsqueeze(-1)
    direction = torch.where((target < 0).unsqueeze(-1), -p, (-p).scatter(-1, target.clamp(min=0).unsqueeze(-1), label))
    gradient = upstream.double().unsqueeze(-1) * direction * slope
    return torch.where(((target == IGNORED) | (upstream == 0)).unsqueeze(-1), 0.0, gradient)


def targets(rows: Rows) -> Tensor:
    """The label that scores each row, IGNORED or ABSENT."""
    labels, offsets = rows.labels.long(), rows.cu_seqlens
    if rows.shift:
        moved = torch.full_like(labels, rows.ignore_index)
        if offsets is None:
            moved[..., :-1] = labels[..., 1:]
        else:
            for begin, end in itertools.pairwise(offsets.tolist()):
                moved[begin : max(begin, end - 1)] = labels[begin + 1 : max(begin + 1, end)]
        labels = moved
    silent = (labels == rows.ignore_index) | (labels < 0) | (labels >= rows.vocab)
    return torch.where(labels == ELSEWHERE, ABSENT, torch.where(silent, IGNORED, labels))


def per_sequence(values: Tensor, rows: Rows) -> Tensor:
    """Sums over the tokens of each sequence."""
    if rows.cu_seqlens is None:
        return values.double().sum(-1)
    offsets = rows.cu_seqlens.tolist()
    return torch.stack([values[begin:end].double().sum() for begin, end in itertools.pairwise(offsets)])


def over_tokens(values: Tensor, rows: Rows) -> Tensor:
    """Each sequence's value for each of its tokens."""
    if rows.cu_seqlens is None:
        return values.unsqueeze(-1).expand(rows.labels.shape)
    return values.repeat_interleave(rows.cu_seqlens.long().diff())


def difference(a: Tensor, b: Tensor) -> Tensor:
    """a − b, but −inf where both are the same infinity."""
    return torch.where((a == b) & a.isinf(), -INF, a - b)


def sequence_loss(ratio: Tensor, z0: Tensor, desirable: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Each sequence's loss, and its slope ∂loss/∂ratio."""
    sign = torch.where(desirable, 1.0, -1.0).double()
    weights = torch.tensor([objective.undesirable_weight, objective.desirable_weight], dtype=torch.float64)
    signed_beta, weight = objective.beta * sign, weights[desirable.long()]
    x = signed_beta * difference(ratio, z0)
    return weight * torch.sigmoid(-x), -weight * signed_beta * torch.sigmoid(x) * torch.sigmoid(-x)


def is_first_argmax(x: Tensor, labels: Tensor) -> Tensor:
    y, column = x.gather(-1, labels[:, None]), torch.arange(x.shape[-1])
    return ~((x > y) | ((x == y) & (column < labels[:, None]))).any(-1)


# Comparison ───────────────────────────────────────────────────────────────────────────────────────────────────────────

SMALLEST = {torch.float16: 6e-8, torch.bfloat16: 1e-37, torch.float32: 1e-37}  # of a gradient
LOGP = 4e-6  # relative


def assert_close(name: str, found: Tensor, exact: Tensor, relative: float, absolute: float) -> None:
    found, exact = found.detach().double(), exact.double()
    assert found.shape == exact.shape, (name, found.shape, exact.shape)
    same = (found == exact) | (found.isnan() & exact.isnan())
    bad = ~same & ~((found - exact).abs() <= relative * exact.abs() + absolute)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        message = f"{name}{list(at)}: {found[at].item()!r}, exact {exact[at].item()!r} ({int(bad.sum())} such)"
        raise AssertionError(message)


def logp_error(scale: Scale) -> float:
    """Absolute. Under a softcap a score is right to some units in the softcap's last place."""
    return 1e-12 if scale.softcap is None else 3e-6 * scale.softcap


def assert_gradient(found: Tensor, exact: Tensor, largest: float, scale: Scale, coefficient_error: float = 0.0) -> None:
    """`largest` of the gradients from above, and the relative error of what they were multiplied by."""
    slope = scale.logit_scale / scale.temperature
    relative = torch.finfo(found.dtype).eps * 0.51 + 1e-5 + coefficient_error
    absolute = SMALLEST[found.dtype] + 2e-8 * largest
    if scale.softcap is not None:
        relative += 12e-6 * scale.softcap * slope
        absolute += 1e-6 * slope * largest
    assert_close("gradient", found, exact, relative, absolute)
