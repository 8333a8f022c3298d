"""The definition: the five stages of the KTO loss (arXiv 2402.01306) in plain PyTorch, up to fp64.

    token_logps  →  sequence_logps  →  kl_reference_point  →  value  →  loss

Every backend is tested against these functions in fp64, and `backend="torch"` runs them.

Shapes: logits (B, T, V) with labels (B, T); or packed, logits (N, V) with labels (N,) and cu_seqlens (B + 1,).
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor is computed in.

    Args:
        dtype: the dtype of the tensor.

    Returns:
        fp32 for anything narrower than fp32, fp64 for fp64.
    """
    return torch.promote_types(dtype, torch.float32)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """`a − b`, where two equal infinities leave −inf (a saturated sequence) instead of NaN.

    Args:
        a: (...) floating.
        b: (...) floating, of the shape of `a`.

    Returns:
        The differences (...).
    """
    return torch.where(torch.isinf(a) & (a == b), -torch.inf, a - b)


def targets(labels: Tensor, shift: bool, ignore_index: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """The label that scores each position: `labels`, or with `shift` the label of the sequence's next position.

    Args:
        labels: (B, T) or packed (N,), integers.
        shift: whether position t predicts the label of t + 1.
        ignore_index: the label that each sequence's last position gets under `shift`.
        cu_seqlens: (B + 1,) integers, the offsets of packed sequences. None: the sequences are padded.

    Returns:
        The labels of the shape of `labels`, int64.
    """
    # (an ignore_index may need more bits than the labels have)
    return shifted(labels.long(), ignore_index, cu_seqlens) if shift else labels.long()


def shifted(values: Tensor, last: float, cu_seqlens: Tensor | None = None) -> Tensor:
    """The value of each sequence's next position.

    Args:
        values: (B, T) or packed (N,).
        last: the value that each sequence's last position gets.
        cu_seqlens: (B + 1,) integers, the offsets of packed sequences. None: the sequences are padded.

    Returns:
        The values of the same shape.
    """
    if values.numel() == 0:
        return values
    moved = values.roll(-1, dims=-1)
    if cu_seqlens is None:
        moved[..., -1] = last
    else:
        # Every offset past the first ends some sequence, which may be empty (0 - 1 is the last row of all).
        moved[cu_seqlens[1:].long() - 1] = last
    return moved


def scaled(logits: Tensor, logit_scale: float, softcap: float | None, temperature: float) -> Tensor:
    """`z = softcap(x · logit_scale) / temperature`, in at least fp32.

    Args:
        logits: (..., V) floating, the logits x.
        logit_scale: the logits are multiplied by it.
        softcap: the bound c of `softcap(x) = c·tanh(x / c)`. None: there is none.
        temperature: the capped logits are divided by it.

    Returns:
        The scaled logits z (..., V).
    """
    z = logits.to(compute_dtype(logits.dtype)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def outer(logit_scale: float, softcap: float | None, temperature: float) -> float:
    """`dz/du` of a score u: the logit itself, or under a softcap `tanh(logit · logit_scale / softcap)`.

    Args:
        logit_scale: as for `scaled`.
        softcap: as for `scaled`. None: there is none.
        temperature: as for `scaled`.

    Returns:
        The factor in `z = outer · u`.
    """
    return (logit_scale if softcap is None else softcap) / temperature


def slope(logits: Tensor, logit_scale: float, softcap: float | None, temperature: float) -> Tensor | float:
    """`dz/dx`. Under a softcap it is computed from the tanh, not from z: the division by the temperature has rounded z
    once more, and near a tanh of ±1 this error would be as large as the slope.

    Args:
        logits: (..., V) floating, the logits x.
        logit_scale: as for `scaled`.
        softcap: as for `scaled`. None: there is none.
        temperature: as for `scaled`.

    Returns:
        The slopes (..., V); without a softcap the one number that they all are.
    """
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
    """`ℓ_n = z_{n,y} − log Σ_v exp z_{n,v}`, in nats.

    Args:
        logits: (..., V) floating.
        target: (...) integers, the label that scores each row, see `targets`.
        ignore_index: the target of rows that are not scored.
        logit_scale: as for `scaled`.
        softcap: as for `scaled`. None: there is none.
        temperature: as for `scaled`.

    Returns:
        The log-probabilities (...), in at least fp32; 0 where the target is `ignore_index`, −inf where its logit is
            −inf.
    """
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
    """`token_logps` over the columns of a shard, and the statistics by which shards are merged.

    Args:
        logits: (..., V) floating, the columns of the shard.
        target: (...) integers: the column of each row's label, negative where the label is in no column of this shard.
        ignore_index: the target of rows that are not scored.
        logit_scale: as for `scaled`.
        softcap: as for `scaled`. None: there is none.
        temperature: as for `scaled`.

    Returns:
        logps: (...), −inf where the target is negative.
        statistics: (2, ...): the origin, a score u near the maximum, and `Σ_v exp(z_v − outer·u)`.
    """
    scale = (logit_scale, softcap, temperature)
    z = scaled(logits, *scale)
    ignored = target == ignore_index
    elsewhere = ~ignored & (target < 0)
    logps = token_logps(logits, target.masked_fill(elsewhere, ignore_index), ignore_index, *scale)
    maximum = z.amax(-1) / outer(*scale)
    total = shard_softmax(z, maximum, torch.ones_like(maximum), *scale).sum(-1)
    return logps.masked_fill(elsewhere, -torch.inf), torch.stack([maximum, total]).masked_fill(ignored, 0.0)


def shard_softmax(z: Tensor, maximum: Tensor, total: Tensor, *scale: float | None) -> Tensor:
    """`exp(z − outer·maximum) / total`; 0 in a row of −inf.

    Args:
        z: (..., V) floating, scaled logits.
        maximum: (...) floating, the score u that the exponentials are taken from.
        total: (...) floating, the sum of the exponentials over the whole vocabulary.
        *scale: logit scale, softcap and temperature, as for `scaled`.

    Returns:
        The probabilities (..., V).
    """
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
    """`grad_n · (1[v = y_n] − p_{n,v}) · dz/dx`, the gradient of `Σ_n grad_n ℓ_n` with respect to the logits.

    Args:
        logits: (..., V) floating.
        target: (...) integers, as for `token_logps`; for a shard as for `shard_logps`.
        grad: (...) floating, the gradient that arrives at each log-probability.
        ignore_index: the target of rows that are not scored.
        logit_scale: as for `scaled`.
        softcap: as for `scaled`. None: there is none.
        temperature: as for `scaled`.
        given: (2, ...) floating, the merged statistics of all shards (see `shard_logps`) where the logits are a shard.
            None: they are whole.

    Returns:
        The gradient (..., V), in the dtype of `logits`; 0 in rows that are not scored, and where `grad` is 0.
    """
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
    """Numbers for logging that a row's logits give.

    The argmax is over the logits, not over z: where a softcap saturates, rounding makes the z of different logits
    equal. Equal logits have the first of them as their argmax, also where all are −inf. A row whose log-probability is
    NaN has no argmax.

    Args:
        logits: (..., V) floating.
        target: (...) integers, the label that scores each row, see `targets`.
        names: which of the numbers to compute.
        logit_scale: as for `scaled`.
        softcap: as for `scaled`. None: there is none.
        temperature: as for `scaled`.

    Returns:
        By name: `entropy` (`−Σ_v p_v log p_v`, in nats), `mean_logits` (the mean of z over the vocabulary), `is_top1`
            (whether the target is the first argmax of the logits), (...) each.
    """
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
    """`−grad_n · p_v (log p_v + entropy_n) · dz/dx`, the gradient of `Σ_n grad_n entropy_n` with respect to the logits.

    Args:
        logits: (..., V) floating.
        grad: (...) floating, the gradient that arrives at each entropy.
        logit_scale: as for `scaled`.
        softcap: as for `scaled`. None: there is none.
        temperature: as for `scaled`.

    Returns:
        The gradient (..., V), in at least fp32.
    """
    z = scaled(logits, logit_scale, softcap, temperature)
    log_p = z.log_softmax(-1)
    p = log_p.exp().masked_fill(z == -torch.inf, 0.0)
    weighted = torch.where(z == -torch.inf, 0.0, p * log_p)
    direction = weighted.sum(-1, keepdim=True) * p - weighted
    return grad.to(z.dtype).unsqueeze(-1) * direction * slope(logits, logit_scale, softcap, temperature)


# Stage 2 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def per_sequence(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sums of values over each sequence.

    Args:
        values: (B, T), or packed (N,) with `cu_seqlens`.
        cu_seqlens: (B + 1,) integers, the offsets of packed sequences. None: the sequences are padded.

    Returns:
        The sums (B,) in fp64.
    """
    if cu_seqlens is None:
        return values.double().sum(-1)
    return torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens.long(), unsafe=True, initial=0.0)


def sequence_logps(logps: Tensor, scored: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """`S_i = Σ_{n∈i} ℓ_n` in fp64, or the mean over the scored tokens.

    Args:
        logps: (B, T), or packed (N,) with `cu_seqlens`: token log-probabilities in nats, 0 where nothing is scored.
        scored: (B, T) or (N,) bool, the tokens that a mean is over. None: the sum.
        cu_seqlens: (B + 1,) integers, the offsets of packed sequences. None: the sequences are padded.

    Returns:
        The sequence log-probabilities (B,) in fp64.
    """
    total = per_sequence(logps, cu_seqlens)
    return total if scored is None else mean_logps(total, per_sequence(scored, cu_seqlens))


def mean_logps(total: Tensor, count: Tensor) -> Tensor:
    """`S_i` as a mean: 0 where nothing is scored.

    Args:
        total: (B,) floating, the sums.
        count: (B,) numbers of scored tokens.

    Returns:
        The means (B,).
    """
    return total / torch.where(count == 0, 1, count)


# Stage 3 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def kl_reference_point(kl_logps: Tensor, ref_kl_logps: Tensor | None = None) -> Tensor:
    """`z0 = max(0, Σ_j (S^π_j − S^ref_j) / K)` over K mismatched completions (arXiv 2402.01306, equations 7 and 8).

    Args:
        kl_logps: (K,) floating, the policy's sequence log-probabilities S^π in nats.
        ref_kl_logps: (K,) floating, the reference's sequence log-probabilities S^ref in nats. None: they count as 0.

    Returns:
        z0 () in nats, fp64, without gradient; 0 where K = 0.
    """
    return kl_mean(kl_sum(kl_logps, ref_kl_logps), kl_logps.numel())


def kl_sum(kl_logps: Tensor, ref_kl_logps: Tensor | None = None) -> Tensor:
    """`Σ_j (S^π_j − S^ref_j)` in fp64, without gradient.

    Args:
        kl_logps: (K,) floating, as for `kl_reference_point`.
        ref_kl_logps: (K,) floating, as for `kl_reference_point`. None: they count as 0.

    Returns:
        The sum () in nats.
    """
    kl_logps = kl_logps.detach().double()
    ref = torch.zeros_like(kl_logps) if ref_kl_logps is None else ref_kl_logps.detach().double()
    return difference(kl_logps, ref).sum()


def kl_mean(total: Tensor, count: Tensor | int) -> Tensor:
    """z0 from the sum of log-ratios and their count, each of which may be added up over ranks.

    Args:
        total: () fp64, the sum of log-ratios in nats.
        count: K, as a number or a () tensor.

    Returns:
        z0 () in nats; 0 where K = 0.
    """
    return (total / (count.clamp(min=1) if isinstance(count, Tensor) else max(1, count))).clamp(min=0)


# Stages 4 and 5 ───────────────────────────────────────────────────────────────────────────────────────────────────────


def log_ratio(logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    """`r_i = S^π_i − S^ref_i` in fp64, in nats.

    Args:
        logps: (B,) floating, the policy's sequence log-probabilities S^π in nats.
        ref_logps: (B,) floating, the reference's S^ref in nats, which gets no gradient. None: reference-free,
            `S^ref = 0`.

    Returns:
        The log-ratios (B,).
    """
    logps = logps.double()
    return logps if ref_logps is None else difference(logps, ref_logps.detach().double())


def by_class(desirable: Tensor, like: Tensor, of_desirable: float | Tensor, of_undesirable: float | Tensor) -> Tensor:
    """One number or the other for each sequence, in the precision of `like`.

    Args:
        desirable: (B,) bool.
        like: (B,) floating, of which only shape, dtype and device count.
        of_desirable: the number of desirable sequences, a float or a () tensor.
        of_undesirable: the number of undesirable sequences, a float or a () tensor.

    Returns:
        The numbers (B,).
    """
    return torch.zeros_like(like).add(of_undesirable).masked_fill(desirable, of_desirable)


def value_argument(r: Tensor, z0: Tensor, desirable: Tensor, beta: float | Tensor) -> Tensor:
    """`x_i = β(r_i − z0)` for desirable sequences, `β(z0 − r_i)` for undesirable ones.

    Args:
        r: (B,) floating, the log-ratios in nats.
        z0: () floating, the reference point in nats.
        desirable: (B,) bool.
        beta: β in 1/nat, a float or a () tensor.

    Returns:
        The arguments x (B,) of the sigmoid.
    """
    return by_class(desirable, r, beta, -beta) * difference(r, z0)


def value(
    r: Tensor, z0: Tensor, desirable: Tensor, beta: float | Tensor, weights: tuple[float | Tensor, float | Tensor]
) -> Tensor:
    """`v_i = λ_i·σ(x_i)`, with λ_D for desirable sequences and λ_U for undesirable ones (arXiv 2402.01306, equations 7
    and 8).

    Args:
        r: (B,) floating, the log-ratios in nats.
        z0: () floating, the reference point in nats.
        desirable: (B,) bool.
        beta: β in 1/nat, a float or a () tensor.
        weights: λ_D and λ_U, each a float or a () tensor.

    Returns:
        The values v (B,).
    """
    return by_class(desirable, r, *weights) * torch.sigmoid(value_argument(r, z0, desirable, beta))


def loss(
    r: Tensor, z0: Tensor, desirable: Tensor, beta: float | Tensor, weights: tuple[float | Tensor, float | Tensor]
) -> Tensor:
    """`λ_i − v_i`, computed as `λ_i·σ(−x_i)`, because `1 − σ(x)` is 0 in fp32 from x ≈ 17. The sigmoid goes through its
    logarithm, so that PyTorch's derivative `λ_i·σ(x_i)·σ(−x_i)` is exact in both tails too.

    Args:
        r: (B,) floating, the log-ratios in nats.
        z0: () floating, the reference point in nats.
        desirable: (B,) bool.
        beta: β in 1/nat, a float or a () tensor.
        weights: λ_D and λ_U, each a float or a () tensor.

    Returns:
        The losses (B,).
    """
    x = value_argument(r, z0, desirable, beta)
    return by_class(desirable, r, *weights) * torch.exp(torch.nn.functional.logsigmoid(-x))


def loss_slope(
    r: Tensor, z0: Tensor, desirable: Tensor, beta: float | Tensor, weights: tuple[float | Tensor, float | Tensor]
) -> Tensor:
    """`∂loss_i/∂r_i = ∓λ_i·β·σ(x_i)·σ(−x_i)`.

    Args:
        r: (B,) floating, the log-ratios in nats.
        z0: () floating, the reference point in nats.
        desirable: (B,) bool.
        beta: β in 1/nat, a float or a () tensor.
        weights: λ_D and λ_U, each a float or a () tensor.

    Returns:
        The slopes (B,).
    """
    x = value_argument(r, z0, desirable, beta)
    slope = by_class(desirable, r, -beta * weights[0], beta * weights[1])
    return slope * (torch.sigmoid(x) * torch.sigmoid(-x))


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """The losses reduced over the batch.

    Args:
        losses: (B,) floating.
        reduction: "mean" (0 for an empty batch), "sum", or "none" to leave the losses as they are.

    Returns:
        The loss (), or (B,) with "none".
    """
    if reduction == "none":
        return losses
    return losses.sum() / (max(1, losses.numel()) if reduction == "mean" else 1)
