"""START HERE. The public functions, in the order in which data flows:

    token_logps → sequence_logps → kl_reference_point → value → loss

`kto_loss` runs all five from logits, in one operator. The stages on their own meet every other library at the seam
behind `token_logps`. The formulas are in `kto_kernels.reference`; the operators behind these functions in
`kto_kernels.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks, ops, reference

LOSS_TYPES = ("kto", "apo_zero_unpaired")
REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class KTOOutput:
    """What a loss returns. Everything but `loss` is detached.

    Attributes:
        loss: () for `reduction="mean"` and `"sum"`, (B,) for `"none"`; fp32 (fp64 for fp64 logits).
        logps: (B,) fp64, policy log-probability of each sequence in nats (per token with `average_log_prob`).
        ref_logps: (B,) fp64, the reference's; zeros when reference-free.
        rewards: (B,) `β · (logps − ref_logps)`.
        kl: () the reference point z0 in nats, at least 0.
        desirable: (B,) bool, as given.
        entropy: mean entropy of the scored tokens' distributions, where asked for.
        mean_logits: mean logit of the scored tokens, where asked for.
    """

    loss: Tensor
    logps: Tensor
    ref_logps: Tensor
    rewards: Tensor
    kl: Tensor
    desirable: Tensor
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None

    def metrics(self) -> dict[str, float]:
        """Plain floats under TRL's names: `loss` (the mean over sequences under `"none"`), `kl`, and for each class
        that the batch holds `rewards/chosen`, `rewards/rejected`, `logps/chosen`, `logps/rejected`; `rewards/margins`
        where both are there. A class without a sequence has no entry, never a NaN. Waits for the device once."""
        classes = {"chosen": self.desirable, "rejected": ~self.desirable}
        columns = {"rewards": self.rewards.double(), "logps": self.logps.double()}
        zero = torch.zeros((), dtype=torch.float64, device=self.logps.device)
        named = {"loss": reference.reduce(self.loss.detach().double().flatten(), "mean"), "kl": self.kl.double()}
        for side, mask in classes.items():
            named[side] = mask.sum().double()
            for column, values in columns.items():
                named[f"{column}/{side}"] = torch.where(mask, values, zero).sum() / named[side]
        for name in ("entropy", "mean_logits"):
            if getattr(self, name) is not None:
                named[name] = getattr(self, name).double()
        metrics = dict(zip(named, torch.stack(list(named.values())).tolist(), strict=True))
        present = [side for side in classes if metrics.pop(side) > 0]
        for side in set(classes) - set(present):
            for column in columns:
                del metrics[f"{column}/{side}"]
        if len(present) == 2:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics


# From logits, in one operator ─────────────────────────────────────────────────────────────────────────────────────────


def kto_loss(
    logits: Tensor,  # (B, T, V) or (N, V)
    labels: Tensor,  # (B, T) or (N,)
    desirable: Tensor,  # (B,) bool
    *,
    ref_logits: Tensor | None = None,  # like logits
    ref_logps: Tensor | None = None,  # (B,)
    kl: Tensor | float | None = None,  # ()
    kl_logps: Tensor | None = None,  # (K,)
    ref_kl_logps: Tensor | None = None,  # (K,)
    kl_logits: Tensor | None = None,  # (K, T', V) or (N', V)
    ref_kl_logits: Tensor | None = None,  # like kl_logits
    kl_labels: Tensor | None = None,  # (K, T') or (N',)
    kl_cu_seqlens: Tensor | None = None,  # (K + 1,)
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
    average_log_prob: bool = False,
    reduction: str = "mean",
    ignore_index: int = -100,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    temperature: float = 1.0,
    inplace_backward: bool = False,
    process_group: Any = None,
    backend: str = "auto",
) -> KTOOutput:
    """The KTO loss (Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8) and its gradient from logits.

    Reads every logit once forward, and once more (with one write) backward; the extra memory is O(N). The gradient
    goes to `logits` alone: none to the reference, none through the KL estimate.

    Args:
        logits: (B, T, V), or packed (N, V) with `cu_seqlens`; bf16, fp16, fp32 (fp64: backend "torch"). Any strides
            but along V: `logits[:, :-1]` costs no copy.
        labels: (B, T) or (N,), int32 or int64; `ignore_index` where nothing is scored (prompt, padding).
        desirable: (B,) bool, True for thumbs up.
        ref_logits: the frozen reference's logits, of the same shape and dtype as `logits`; or
        ref_logps: its sequence log-probabilities (B,), computed once. Neither: reference-free, `S^ref = 0`.
        kl: the KL estimate, one number or 0-d tensor (negative values count as 0); or
        kl_logps, ref_kl_logps: sequence log-probabilities (K,) of mismatched completions; or
        kl_logits, ref_kl_logits, kl_labels, kl_cu_seqlens: their logits and labels, laid out as `logits` are. Policy
            and reference may mix the two forms. With a reference the KL needs one too; without, it must have none.
        beta: how sharply the value saturates, > 0, in 1/nat.
        desirable_weight, undesirable_weight: λ_D and λ_U, >= 0.
        loss_type: "kto", or "apo_zero_unpaired" (arXiv 2408.06266): z0 = 0, no KL source allowed.
        average_log_prob: sequence log-probabilities are means over the scored tokens instead of sums.
        reduction: "mean" over B (0 for an empty batch), "sum", or "none".
        shift: position t predicts the label of t + 1 of its sequence (the transformers convention).
        cu_seqlens: (B + 1,) int32 or int64 offsets of packed sequences, from 0 to N.
        temperature: the logits are divided by it, > 0.
        inplace_backward: the gradient overwrites `logits`, which must be neither a leaf nor a view of one (the latter
            goes unnoticed under torch.compile); one backward only. A model's output is right as it is; to try it on a
            leaf, pass `logits * 1`.
        process_group: not supported yet.
        backend: "auto", or a name out of `available_backends()`.

    Returns:
        KTOOutput.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it. Labels and offsets on a GPU are not
            looked at (that would wait for the device).
        RuntimeError: the backend named is not available; or, in backward, the gradient is differentiated again, or the
            logits have been overwritten.
        NotImplementedError: `process_group` is given.
    """
    checks.scoring(shift, ignore_index, temperature, backend)
    count = checks.rows(logits, labels, cu_seqlens)
    scalars = _loss_options(beta, desirable_weight, undesirable_weight, loss_type, reduction, process_group)
    checks.flag("average_log_prob", average_log_prob)
    checks.flag("inplace_backward", inplace_backward)
    if inplace_backward:
        checks.in_place(logits)
    checks.desirable(desirable, count, logits)

    if ref_logits is not None and ref_logps is not None:
        raise ValueError("ref_logits, ref_logps: expected one of them or neither (reference-free), got both")
    if ref_logits is not None:
        checks.vocabulary("ref_logits", ref_logits, logits)
        checks.shape("ref_logits", ref_logits, tuple(logits.shape), "as logits")
    if ref_logps is not None:
        checks.sequences("ref_logps", ref_logps, count, "one per sequence", logits)
    kl_count = None
    if kl_logits is None and ref_kl_logits is None and (kl_labels is not None or kl_cu_seqlens is not None):
        raise ValueError("kl_labels, kl_cu_seqlens: go with kl_logits or ref_kl_logits, got neither")
    for name, side, logps in (("kl", kl_logits, kl_logps), ("ref_kl", ref_kl_logits, ref_kl_logps)):
        if side is not None and logps is not None:
            raise ValueError(f"{name}_logits, {name}_logps: expected one of them, got both")
        if side is not None:
            if kl_labels is None:
                raise ValueError(f"kl_labels: needed with {name}_logits")
            kl_count = checks.rows(side, kl_labels, kl_cu_seqlens, "kl_", f"{name}_logits", like=logits)
    checks.kl_pair(kl_logps, ref_kl_logps, kl_count, logits)
    checks.kl_source(
        loss_type,
        kl,
        logits,
        has_reference=ref_logits is not None or ref_logps is not None,
        has_kl=kl_logits is not None or kl_logps is not None,
        has_ref_kl=ref_kl_logits is not None or ref_kl_logps is not None,
    )

    loss, logps, ref, rewards, z0, *_ = ops.kto_forward(
        logits,
        labels,
        cu_seqlens,
        desirable,
        ref_logits,
        ref_logps,
        kl if isinstance(kl, Tensor) else None,
        0.0 if kl is None or isinstance(kl, Tensor) else float(kl),
        kl_logits,
        ref_kl_logits,
        kl_logps,
        ref_kl_logps,
        kl_labels,
        kl_cu_seqlens,
        *scalars,
        average_log_prob,
        reduction,
        shift,
        ignore_index,
        1.0,  # logit_scale
        None,  # softcap
        float(temperature),
        inplace_backward,
        backend,
    )
    return KTOOutput(loss=loss, logps=logps, ref_logps=ref, rewards=rewards, kl=z0, desirable=desirable)


def _loss_options(beta, desirable_weight, undesirable_weight, loss_type, reduction, process_group):
    """Checks the options of the stages after the seam; returns β, λ_D, λ_U as floats."""
    checks.choice("loss_type", loss_type, LOSS_TYPES)
    checks.choice("reduction", reduction, REDUCTIONS)
    _no_process_group(process_group)
    return (
        checks.number("beta", beta, positive=True),
        checks.number("desirable_weight", desirable_weight, positive=False),
        checks.number("undesirable_weight", undesirable_weight, positive=False),
    )


def _no_process_group(process_group: Any) -> None:
    if process_group is not None:
        raise NotImplementedError(
            "process_group: reducing the KL estimate over ranks is not supported yet; all-reduce the sum and count of "
            "the mismatched completions' log-ratios yourself and pass kl=max(0, sum / count)"
        )


# The stages on their own ──────────────────────────────────────────────────────────────────────────────────────────────


def token_logps(
    logits: Tensor,  # (B, T, V) or (N, V)
    labels: Tensor,  # (B, T) or (N,)
    *,
    shift: bool = False,
    ignore_index: int = -100,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Stage 1, the seam: `ℓ_n = log softmax(logits_n / temperature)[label_n]`, differentiable, in nats.

    Args: as for `kto_loss`; (N, V) logits are one sequence.

    Returns:
        Labels-shaped, fp32 (fp64 for fp64 logits); 0 at ignored positions, and with `shift` at the last one. A label
        whose logit is −inf gives −inf.

    Raises: as `kto_loss`.
    """
    checks.scoring(shift, ignore_index, temperature, backend)
    checks.rows(logits, labels, None, packed=False)
    checks.flag("inplace_backward", inplace_backward)
    if inplace_backward:
        checks.in_place(logits)
    logps, _ = ops.token_logps(
        logits, labels, None, shift, ignore_index, 1.0, None, float(temperature), inplace_backward, backend
    )
    return logps


def sequence_logps(
    logps: Tensor,  # (B, T) or (N,)
    *,
    labels: Tensor | None = None,  # like logps
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    average_log_prob: bool = False,
    ignore_index: int = -100,
    shift: bool = False,
) -> Tensor:
    """Stage 2: the sum over each sequence of its token log-probabilities, or their mean over scored tokens.

    Args:
        logps: (B, T), or packed (N,) with `cu_seqlens`; floating, 0 where nothing is scored (as `token_logps` gives).
        labels: needed for `average_log_prob`, which counts the labels that are not `ignore_index` (and, with `shift`,
            are some position's next).

    Returns:
        (B,) fp64, differentiable: long sequences lose digits in fp32 that the difference to the reference needs.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    checks.tensor("logps", logps, checks.FLOATS)
    checks.flag("average_log_prob", average_log_prob)
    checks.flag("shift", shift)
    checks.integer("ignore_index", ignore_index)
    if logps.dim() != (2 if cu_seqlens is None else 1):
        raise ValueError(f"logps: expected (B, T), or (N,) with cu_seqlens; got shape {tuple(logps.shape)}")
    if cu_seqlens is not None:
        checks.offsets("cu_seqlens", cu_seqlens, logps)
        checks.offset_values("cu_seqlens", cu_seqlens, logps.shape[0])
    scored = None
    if labels is not None:
        checks.tensor("labels", labels, checks.INTEGERS, logps)
        checks.shape("labels", labels, tuple(logps.shape), "as logps")
    if average_log_prob:
        if labels is None:
            raise ValueError("labels: needed with average_log_prob=True, to count the scored tokens")
        scored = reference.targets(labels, shift, ignore_index, cu_seqlens) != ignore_index
    return reference.sequence_logps(logps, scored, cu_seqlens)


def kl_reference_point(
    kl_logps: Tensor,  # (K,)
    ref_kl_logps: Tensor | None = None,  # (K,)
    *,
    process_group: Any = None,
) -> Tensor:
    """Stage 3: `z0 = max(0, mean_j(S^π_j − S^ref_j))` over mismatched completions, in nats; () fp64, no gradient.

    Without `ref_kl_logps` the reference counts as 0. An empty batch gives 0.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        NotImplementedError: `process_group` is given.
    """
    _no_process_group(process_group)
    checks.tensor("kl_logps", kl_logps, checks.FLOATS)
    checks.kl_pair(kl_logps, ref_kl_logps, None, kl_logps)
    return reference.kl_reference_point(kl_logps, ref_kl_logps)


def kto_loss_from_logps(
    logps: Tensor,  # (B,)
    desirable: Tensor,  # (B,) bool
    *,
    ref_logps: Tensor | None = None,  # (B,)
    kl: Tensor | float | None = None,  # ()
    kl_logps: Tensor | None = None,  # (K,)
    ref_kl_logps: Tensor | None = None,  # (K,)
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
    reduction: str = "mean",
    process_group: Any = None,
) -> KTOOutput:
    """Stages 3 to 5: the loss from sequence log-probabilities, in plain PyTorch, differentiable in `logps`.

    Args and errors as for `kto_loss`; `logps` is (B,) floating, and the loss has its dtype (at least fp32).
    """
    checks.tensor("logps", logps, checks.FLOATS)
    if logps.dim() != 1:
        raise ValueError(f"logps: expected shape (B,), got {tuple(logps.shape)}")
    beta, *weights = _loss_options(beta, desirable_weight, undesirable_weight, loss_type, reduction, process_group)
    checks.desirable(desirable, logps.shape[0], logps)
    if ref_logps is not None:
        checks.sequences("ref_logps", ref_logps, logps.shape[0], "one per sequence", logps)
    checks.kl_pair(kl_logps, ref_kl_logps, None, logps)
    checks.kl_source(
        loss_type,
        kl,
        logps,
        has_reference=ref_logps is not None,
        has_kl=kl_logps is not None,
        has_ref_kl=ref_kl_logps is not None,
    )
    if kl_logps is not None:
        z0 = reference.kl_reference_point(kl_logps, ref_kl_logps)
    else:
        z0 = torch.as_tensor(0.0 if kl is None else kl, dtype=torch.float64, device=logps.device).detach().clamp(min=0)
    dtype = reference.compute_dtype(logps.dtype)
    r = reference.log_ratio(logps, ref_logps)
    losses = reference.loss(r, z0, desirable, beta, tuple(weights))
    detached = logps.detach().double()
    return KTOOutput(
        loss=reference.reduce(losses, reduction).to(dtype),
        logps=detached,
        ref_logps=torch.zeros_like(detached) if ref_logps is None else ref_logps.detach().double(),
        rewards=(beta * r.detach()).to(dtype),
        kl=z0.to(dtype),
        desirable=desirable,
    )
