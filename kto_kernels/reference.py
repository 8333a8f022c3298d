"""The definition: the five stages of the KTO loss (arXiv 2402.01306) in plain PyTorch, up to fp64.

    token_logps  →  sequence_logps  →  kl_reference_point  →  value  →  loss

Every backend is tested against these functions in fp64, and `backend="torch"` runs them.

Shapes: logits (B, T, V) with labels (B, T); or packed, logits (N, V) with labels (N,) and cu_seqlens (B + 1,).
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for anything narrower, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """`a − b`, where two equal infinities leave −inf (a saturated sequence) instead of NaN."""
    return torch.where(torch.isinf(a) & (a == b), -torch.inf, a - b)


def targets(labels: Tensor, shift: bool, ignore_index: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """The label that scores each position: `labels`, or with `shift` the next position's of the same sequence."""
    labels = labels.long()  # an ignore_index may be wider than they are
    if not shift or labels.numel() == 0:
        return labels
    shifted = labels.roll(-1, dims=-1)
    if cu_seqlens is None:
        shifted[..., -1] = ignore_index
    else:
        # Every offset past the first ends some sequence, empty ones included (0 - 1 is the last row of all).
        shifted[cu_seqlens[1:].long() - 1] = ignore_index
    return shifted


def scaled(logits: Tensor, logit_scale: float, softcap: float | None, temperature: float) -> Tensor:
    """`z = softcap(x · logit_scale) / temperature`, in at least fp32."""
    z = logits.to(compute_dtype(logits.dtype)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def outer(logit_scale: float, softcap: float | None, temperature: float) -> float:
    """dz/du of a score u: the logit itself, or under a softcap tanh(logit · logit_scale / softcap)."""
    return (logit_scale if softcap is None else softcap) / temperature


def slope(logits: Tensor, logit_scale: float, softcap: float | None, temperature: float) -> Tensor | float:
    """`dz/dx`. Under a softcap from its tanh, not from z, whose division by the temperature rounds it once more: near
    ±1 that is all that is left."""
    straight = logit_scale / temperature
    if softcap is None:
        return straight
    return straight * (1 - torch.tanh(logits.to(compute_dtype(logits.dtype)) * logit_scale / softcap) ** 2)


# Stage 1 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def token_logps(
    logits: Tensor,  # (..., V)
    target: Tensor,  # (...)
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:  # (...)
    """`ℓ_n = z_{n,y} − log Σ_v exp z_{n,v}`; 0 where the target is `ignore_index`, −inf where its logit is −inf."""
    z = scaled(logits, logit_scale, softcap, temperature)
    ignored = target == ignore_index
    index = target.masked_fill(ignored, 0).long().unsqueeze(-1)
    impossible = z.gather(-1, index).squeeze(-1) == -torch.inf
    logps = z.log_softmax(-1).gather(-1, index).squeeze(-1)
    return logps.masked_fill(impossible, -torch.inf).masked_fill(ignored, 0.0)


def shard_logps(
    logits: Tensor,  # (..., V)
    target: Tensor,  # (...)
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # (...), (2, ...)
    """`token_logps` among some columns of a vocabulary, −inf where a negative target is in none of them; and what
    several such parts are put together by: a score u near the maximum, and `Σ_v exp(z_v − outer·u)`."""
    scale = (logit_scale, softcap, temperature)
    z = scaled(logits, *scale)
    ignored = target == ignore_index
    elsewhere = ~ignored & (target < 0)
    logps = token_logps(logits, target.masked_fill(elsewhere, ignore_index), ignore_index, *scale)
    maximum = z.amax(-1) / outer(*scale)
    total = shard_softmax(z, maximum, torch.ones_like(maximum), *scale).sum(-1)
    return logps.masked_fill(elsewhere, -torch.inf), torch.stack([maximum, total]).masked_fill(ignored, 0.0)


def shard_softmax(z: Tensor, maximum: Tensor, total: Tensor, *scale: float | None) -> Tensor:
    """`exp(z − outer·maximum) / total`; 0 in a row of −inf."""
    none = (maximum == -torch.inf) | (total == 0)
    origin = (outer(*scale) * maximum).masked_fill(none, 0.0)
    return (z - origin.unsqueeze(-1)).exp() / total.masked_fill(none, 1.0).unsqueeze(-1)


def token_logps_grad(
    logits: Tensor,  # (..., V)
    target: Tensor,  # (...)
    grad: Tensor,  # (...)
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    given: Tensor | None = None,  # (2, ...)
) -> Tensor:  # (..., V)
    """`grad_n · (1[v = y_n] − p_{n,v}) · dz/dx`, the gradient of `Σ_n grad_n ℓ_n` with respect to the logits. Where
    these are some columns only, `given` holds the statistics of all, as of `shard_logps`."""
    scale = (logit_scale, softcap, temperature)
    z = scaled(logits, *scale)
    silent = (target == ignore_index) | (grad == 0)
    if given is None:
        p = z.softmax(-1).masked_fill((z == -torch.inf).all(-1, keepdim=True), 0.0)
    else:
        p = shard_softmax(z, *given, *scale)
    here = (target != ignore_index) & (target >= 0)
    direction = -p
    direction.scatter_add_(-1, target.where(here, 0).long().unsqueeze(-1), here.to(p.dtype).unsqueeze(-1))
    out = grad.to(z.dtype).unsqueeze(-1) * direction * slope(logits, *scale)
    return out.masked_fill(silent.unsqueeze(-1), 0.0).to(logits.dtype)


def outputs(
    logits: Tensor,  # (..., V)
    target: Tensor,  # (...)
    names: tuple[str, ...],
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> dict[str, Tensor]:  # (...) each
    """By-products of a row's softmax, for logging: `entropy` (`−Σ_v p_v log p_v`, in nats), `mean_logits` (the mean of
    z over the vocabulary), `is_top1` (whether the target is the first argmax of the logits).

    The argmax is that of the logits, not of z: a softcap rises with the logit, but where it saturates, rounding makes
    different logits equal. Of equal logits it is the first, also where all are −inf; a row whose log-probability is NaN
    has none."""
    if not names:
        return {}
    z = scaled(logits, logit_scale, softcap, temperature)
    values = {}
    if "entropy" in names:
        log_p = z.log_softmax(-1)
        values["entropy"] = -torch.where(z == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)
    if "mean_logits" in names:
        values["mean_logits"] = z.mean(-1)
    if "is_top1" in names:
        undefined = token_logps(logits, target, -100, logit_scale, softcap, temperature).isnan()
        values["is_top1"] = (logits.argmax(-1) == target) & ~undefined
    return values


def entropy_grad(
    logits: Tensor,  # (..., V)
    grad: Tensor,  # (...)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:  # (..., V)
    """`−grad_n · p_v (log p_v + entropy_n) · dz/dx`, the gradient of `Σ_n grad_n entropy_n` to the logits."""
    z = scaled(logits, logit_scale, softcap, temperature)
    log_p = z.log_softmax(-1)
    p = log_p.exp().masked_fill(z == -torch.inf, 0.0)
    weighted = torch.where(z == -torch.inf, 0.0, p * log_p)
    direction = weighted.sum(-1, keepdim=True) * p - weighted
    return grad.to(z.dtype).unsqueeze(-1) * direction * slope(logits, logit_scale, softcap, temperature)


# Stage 2 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def per_sequence(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sums (B, T) or packed (N,) values over each sequence, in fp64: (B,)."""
    if cu_seqlens is None:
        return values.double().sum(-1)
    return torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens.long(), unsafe=True, initial=0.0)


def sequence_logps(logps: Tensor, scored: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """`S_i = Σ_{n∈i} ℓ_n` in fp64; the mean over the tokens of the mask `scored` where one is given."""
    total = per_sequence(logps, cu_seqlens)
    return total if scored is None else mean_logps(total, per_sequence(scored, cu_seqlens))


def mean_logps(total: Tensor, count: Tensor) -> Tensor:
    """`S_i` as a mean: 0 where nothing is scored."""
    return total / count.clamp(min=1)


# Stage 3 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def kl_reference_point(kl_logps: Tensor, ref_kl_logps: Tensor | None = None) -> Tensor:
    """`z0 = max(0, Σ_j (S^π_j − S^ref_j) / K)` over K mismatched completions; 0 where K = 0. No gradient."""
    return kl_mean(kl_sum(kl_logps, ref_kl_logps), kl_logps.numel())


def kl_sum(kl_logps: Tensor, ref_kl_logps: Tensor | None = None) -> Tensor:
    """`Σ_j (S^π_j − S^ref_j)` in fp64, without gradient."""
    kl_logps = kl_logps.detach().double()
    ref = torch.zeros_like(kl_logps) if ref_kl_logps is None else ref_kl_logps.detach().double()
    return difference(kl_logps, ref).sum()


def kl_mean(total: Tensor, count: Tensor | int) -> Tensor:
    """z0 of a sum and its count, which may be those of several ranks."""
    return (total / (count.clamp(min=1) if isinstance(count, Tensor) else max(1, count))).clamp(min=0)


# Stages 4 and 5 ───────────────────────────────────────────────────────────────────────────────────────────────────────


def log_ratio(logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    """`r_i = S^π_i − S^ref_i` in fp64; reference-free (`S^ref = 0`) without `ref_logps`."""
    logps = logps.double()
    return logps if ref_logps is None else difference(logps, ref_logps.detach().double())


Number = float | Tensor  # a Python number, or a () tensor of one


def by_class(desirable: Tensor, like: Tensor, of_desirable: Number, of_undesirable: Number) -> Tensor:
    """One number or the other for each sequence, in the precision of `like`."""
    return torch.zeros_like(like).add(of_undesirable).masked_fill(desirable, of_desirable)


def value_argument(r: Tensor, z0: Tensor, desirable: Tensor, beta: Number) -> Tensor:
    """`x_i = β(r_i − z0)` for desirable sequences, `β(z0 − r_i)` for undesirable ones."""
    return by_class(desirable, r, beta, -beta) * difference(r, z0)


def value(r: Tensor, z0: Tensor, desirable: Tensor, beta: Number, weights: tuple[Number, Number]) -> Tensor:
    """`v_i = λ_i·σ(x_i)`, with λ_D for desirable sequences and λ_U for undesirable ones: `weights` in that order."""
    return by_class(desirable, r, *weights) * torch.sigmoid(value_argument(r, z0, desirable, beta))


def loss(r: Tensor, z0: Tensor, desirable: Tensor, beta: Number, weights: tuple[Number, Number]) -> Tensor:
    """`λ_i − v_i`, as `λ_i·σ(−x_i)`: `1 − σ(x)` is 0 in fp32 from x ≈ 17. Through the logarithm, so that PyTorch's
    derivative, `λ_i·σ(x_i)·σ(−x_i)`, is exact in both tails too."""
    x = value_argument(r, z0, desirable, beta)
    return by_class(desirable, r, *weights) * torch.exp(torch.nn.functional.logsigmoid(-x))


def loss_slope(r: Tensor, z0: Tensor, desirable: Tensor, beta: Number, weights: tuple[Number, Number]) -> Tensor:
    """`∂loss_i/∂r_i = ∓λ_i·β·σ(x_i)·σ(−x_i)`."""
    x = value_argument(r, z0, desirable, beta)
    slope = by_class(desirable, r, -beta * weights[0], beta * weights[1])
    return slope * (torch.sigmoid(x) * torch.sigmoid(-x))


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """`"mean"` over the batch (0 for an empty one), `"sum"`, or `"none"`."""
    if reduction == "none":
        return losses
    return losses.sum() / (max(1, losses.numel()) if reduction == "mean" else 1)
