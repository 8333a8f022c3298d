"""`backend="torch"`: the stages of `kto_kernels.reference` as a backend, on any device and up to fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..options import Objective, Scale
from ..records import ELSEWHERE, ForwardResult, Rows, Side
from .base import Backend


def _targets(rows: Rows) -> Tensor:
    """The label that scores each position. As in the kernels, a label outside the vocabulary scores nothing: on a GPU
    no check has refused such labels."""
    target = reference.targets(rows.labels, rows.shift, rows.ignore_index, rows.cu_seqlens)
    outside = ((target < 0) & (target != ELSEWHERE)) | (target >= rows.vocab)
    return target.masked_fill(outside, rows.ignore_index)


class TorchBackend(Backend):
    name = "torch"
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def token_logps(self, rows: Rows, scale: Scale) -> tuple[Tensor, Tensor]:
        target = _targets(rows)
        if rows.shard:
            return reference.shard_logps(rows.logits, target, rows.ignore_index, **vars(scale))
        logps = reference.token_logps(rows.logits, target, rows.ignore_index, **vars(scale))
        # The backward computes the softmax once more: it needs no statistics.
        return logps, logps.new_zeros((2, *logps.shape))

    def kto_forward(
        self, policy: Rows, scale: Scale, desirable: Tensor, ref: Side, kl: Tensor | float, kl_policy: Side,
        ref_kl: Side, objective: Objective,
    ) -> ForwardResult:  # fmt: skip
        def sums(side: Side) -> Tensor | None:
            if side.rows is None:
                # A copy: operators must not return their inputs.
                return (
                    None
                    if side.logps is None
                    else side.logps.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
                )
            return sequence_logps(side.rows, self.token_logps(side.rows, scale)[0])

        def sequence_logps(rows: Rows, logps: Tensor) -> Tensor:
            scored = _targets(rows) != rows.ignore_index if objective.average_log_prob else None
            return reference.sequence_logps(logps, scored, rows.cu_seqlens)

        token_logps, statistics = self.token_logps(policy, scale)
        logps, ref_logps = sequence_logps(policy, token_logps), sums(ref)
        if kl_policy:
            z0 = reference.kl_reference_point(sums(kl_policy), sums(ref_kl))
        else:
            # The sum's kernel takes the number along: a copy from the host would wait for the device.
            z0 = torch.zeros((), dtype=torch.float64, device=logps.device).add(kl).clamp(min=0)
        r = reference.log_ratio(logps, ref_logps)
        arguments = (r, z0, desirable, objective.beta, objective.weights)
        slope = reference.loss_slope(*arguments)
        if objective.reduction == "mean":
            slope = slope / max(1, slope.numel())
        if objective.average_log_prob:
            scored = reference.per_sequence(_targets(policy) != policy.ignore_index, policy.cu_seqlens)
            slope = reference.mean_logps(slope, scored)
        dtype = reference.compute_dtype(policy.logits.dtype)
        return ForwardResult(
            loss=reference.reduce(reference.loss(*arguments), objective.reduction).to(dtype),
            rewards=(objective.beta * r).to(dtype),
            kl=z0.to(dtype),
            coefficients=slope.to(dtype),
            logps=logps,
            ref_logps=torch.zeros_like(logps) if ref_logps is None else ref_logps,
            token_logps=token_logps,
            statistics=statistics,
        )

    def logits_backward(
        self, rows: Rows, scale: Scale, grad: Tensor, coefficients: Tensor | None, token_logps: Tensor, statistics: Tensor,
        out: Tensor,
    ) -> None:  # fmt: skip
        if coefficients is not None:
            # A saturated sequence (coefficient 0) has gradient 0, even where the upstream gradient is not finite.
            grad = torch.where(coefficients == 0, 0.0, coefficients * grad)
            if rows.cu_seqlens is None:
                grad = grad.unsqueeze(-1).expand(rows.labels.shape)
            else:
                grad = grad.repeat_interleave(rows.cu_seqlens.diff(), output_size=rows.n_rows)
        given = statistics if rows.shard else None
        target = _targets(rows)
        out.copy_(reference.token_logps_grad(rows.logits, target, grad, rows.ignore_index, **vars(scale), given=given))
