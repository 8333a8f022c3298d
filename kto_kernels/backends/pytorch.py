"""`backend="torch"`: the stages of `kto_kernels.reference` behind the operators' door. Any device, up to fp64."""

from __future__ import annotations

import torch

from .. import reference
from ..rows import ELSEWHERE, Rows, StageResult
from .base import StagedBackend


def _targets(rows: Rows) -> torch.Tensor:
    """Labels outside the vocabulary, which only a GPU's may be, score nothing, as in the kernels."""
    target = reference.targets(rows.labels, rows.shift, rows.ignore_index, rows.cu_seqlens)
    outside = ((target < 0) & (target != ELSEWHERE)) | (target >= rows.vocab)
    return target.masked_fill(outside, rows.ignore_index)


class TorchBackend(StagedBackend):
    name = "torch"
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

    def unavailable(self, device):
        return None

    def token_logps(self, rows, scale):
        target = _targets(rows)
        if rows.shard:
            return reference.shard_logps(rows.logits, target, rows.ignore_index, **vars(scale))
        logps = reference.token_logps(rows.logits, target, rows.ignore_index, **vars(scale))
        # The backward takes its softmax from the logits again: there is nothing to remember.
        return logps, logps.new_zeros((2, *logps.shape))

    def sequence_logps(self, rows, logps, average):
        scored = _targets(rows) != rows.ignore_index
        sums = reference.sequence_logps(logps, scored if average else None, rows.cu_seqlens)
        return sums, reference.per_sequence(scored, rows.cu_seqlens)

    def sequence_stages(self, dtype, logps, counts, ref_logps, desirable, kl, kl_logps, ref_kl_logps, options):
        if kl_logps is not None:
            z0 = reference.kl_reference_point(kl_logps, ref_kl_logps)
        else:
            # By a sum, whose number travels with the kernel: a copy from the host would wait for the device.
            z0 = torch.zeros((), dtype=torch.float64, device=logps.device).add(kl).clamp(min=0)
        r = reference.log_ratio(logps, ref_logps)
        arguments = (r, z0, desirable, options.beta, options.weights)
        slope = reference.loss_slope(*arguments)
        if options.reduction == "mean":
            slope = slope / max(1, slope.numel())
        if options.average_log_prob:
            slope = slope / counts.clamp(min=1)
        return StageResult(
            loss=reference.reduce(reference.loss(*arguments), options.reduction).to(dtype),
            rewards=(options.beta * r).to(dtype),
            kl=z0.to(dtype),
            coefficients=slope.to(dtype),
        )

    def logits_backward(self, rows, scale, grad, coefficients, token_logps, statistics, out):
        if coefficients is not None:
            # A saturated sequence has gradient 0 whatever arrives from above.
            grad = torch.where(coefficients == 0, 0.0, coefficients * grad)
            if rows.cu_seqlens is None:
                grad = grad.unsqueeze(-1).expand(rows.labels.shape)
            else:
                grad = grad.repeat_interleave(rows.cu_seqlens.diff(), output_size=rows.n_rows)
        given = statistics if rows.shard else None
        target = _targets(rows)
        out.copy_(reference.token_logps_grad(rows.logits, target, grad, rows.ignore_index, **vars(scale), given=given))
