"""The interface of backends, which score rows of logits."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .. import checks, reference
from ..options import Objective, Scale
from ..records import ChunkScores, Closing, Completions, ForwardResult, Rows, Side


class Backend(ABC):
    name: str
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)

    @abstractmethod
    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on tensors of `device`; None where it can."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised buffer, which may be large."""
        return torch.empty(shape, dtype=dtype, device=device)

    def check_values(self, completions: Completions, vocab: int, ignore_index: int) -> None:
        """Checks the values of labels and offsets where they may be read, as `checks.row_values` does."""
        if checks.readable(completions.labels) and self.may_be_outside(completions.labels, vocab, ignore_index):
            checks.label_values(completions.labels, vocab, ignore_index, completions.prefix)
        if completions.cu_seqlens is not None:
            name = f"{completions.prefix}cu_seqlens"
            checks.offset_values(name, completions.cu_seqlens, completions.labels.numel())

    def may_be_outside(self, labels: Tensor, vocab: int, ignore_index: int) -> bool:
        """Whether some label may be neither `ignore_index` nor in [0, vocab). True by default, for want of a fast check."""
        return True

    def new_gradient(self, logits: Tensor) -> Tensor:
        """An uninitialised, contiguous buffer for the gradient of `logits`."""
        return self.empty(logits.shape, logits.dtype, logits.device)

    @abstractmethod
    def token_logps(self, rows: Rows, scale: Scale) -> tuple[Tensor, Tensor]:
        """Token log-probabilities, labels-shaped, and each row's statistics (2, *labels.shape) for the backward: the
        origin, a score u near the maximum, and `Σ_v exp(z_v − outer·u)`. All are 0 where nothing is scored. (The
        backend "torch" gives statistics for shards only.)"""

    @abstractmethod
    def kto_forward(
        self,
        policy: Rows,
        scale: Scale,
        desirable: Tensor,  # (B,) bool
        ref: Side,  # B sequences
        kl: Tensor | float,  # used where kl_policy is empty
        kl_policy: Side,  # K sequences
        ref_kl: Side,  # K sequences
        objective: Objective,
    ) -> ForwardResult:
        """All five stages."""

    @abstractmethod
    def logits_backward(
        self,
        rows: Rows,
        scale: Scale,
        grad: Tensor,  # of the log-probabilities, labels-shaped; with coefficients of the loss, (B,) or ()
        coefficients: Tensor | None,  # (B,)
        token_logps: Tensor,
        statistics: Tensor,
        out: Tensor,  # logits-shaped, may be the logits
    ) -> None:
        """Writes `g_n · ∂ℓ_n/∂logits` for every row into `out`, where g_n is `grad` times the coefficient of row n's
        sequence; zeros where the row is not scored or g_n is 0."""

    def score_chunk(
        self,
        logits: Tensor,  # (C, V), rows of stride 1
        labels: Tensor,  # (C,) int64, each in [0, V)
        scale: Scale,
        gradient: bool,
        outputs: tuple[str, ...],  # out of options.OUTPUTS
    ) -> ChunkScores:
        """Scores the rows of a chunk, and with `gradient` overwrites the logits by `∂ℓ_n/∂logits`."""
        rows = Rows(logits, labels, None, shift=False, ignore_index=-1)
        logps, statistics = self.token_logps(rows, scale)
        extra = reference.outputs(logits, labels, outputs, **vars(scale))
        if gradient:
            ones = torch.ones_like(logps)
            self.logits_backward(rows, scale, ones, None, logps, statistics, logits)
        return ChunkScores(logps, **extra)

    def value_stages(
        self,
        logps: Tensor,  # (B,) fp64
        ref_logps: Tensor | None,  # (B,)
        z0: Tensor,  # ()
        desirable: Tensor,  # (B,) bool
        objective: Objective,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stages 4 and 5 of each sequence without the reduction: fp64 losses, slopes `∂loss_i/∂logps_i`, rewards."""
        r = reference.log_ratio(logps, ref_logps)
        arguments = (r, z0, desirable, objective.beta, objective.weights)
        return reference.loss(*arguments), reference.loss_slope(*arguments), objective.beta * r

    def close_sequences(self, closing: Closing, objective: Objective) -> Tensor | None:
        """Stages 2, 4 and 5 of sequences whose rows are scored, into the buffers of `closing`, without waiting for the
        device. Returns the factor () by which the divisor of the slopes fell; None without a divisor."""
        begin, end = closing.rows
        average, logps = objective.average_log_prob, closing.sums
        if logps is None:
            offsets = closing.offsets.clamp(begin, end) - begin
            logps = reference.per_sequence(closing.token_logps[begin:end], offsets)
        if average:
            logps = reference.mean_logps(logps, closing.tokens)
        sequences = (closing.ref_logps, closing.z0, closing.desirable)
        _, slopes, _ = self.value_stages(logps, *sequences, objective)
        if objective.reduction == "mean":
            slopes = slopes / max(1, closing.batch)
        if average:
            slopes = reference.mean_logps(slopes, closing.tokens)
        closing.logps.copy_(logps)
        closing.slopes.copy_(slopes)
        return None if closing.divisor is None else raise_divisor(closing.divisor, slopes, closing.lengths)

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """Multiplies `tensor` in place by the () fp32 or fp64 `factor`, without waiting for the device."""
        if factor.device.type == "cpu":
            if factor != 1:
                tensor.mul_(factor.item())
        else:
            tensor.mul_(factor.reshape(1))  # one-dimensional, so that the factor is not rounded to the tensor's dtype


def raise_divisor(divisor: Tensor, slopes: Tensor, lengths: Tensor) -> Tensor | None:
    """Raises the divisor () of slopes to the power of two below the largest of these (n,) slopes whose sequence has
    rows. Returns the factor () by which divided slopes fell; None without slopes."""
    if not len(slopes):
        return None
    largest = torch.where(lengths > 0, slopes.abs(), 0.0).amax()
    before = divisor.clone()
    divisor.copy_(before.maximum(power_of_two_below(largest)))
    return before / divisor


def power_of_two_below(largest: Tensor) -> Tensor:  # ()
    """The largest power of two that is not above `largest`: at least the smallest normal fp32 number, and 1 where
    `largest` is not finite."""
    power = torch.exp2(largest.log2().floor()).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(power.isfinite(), power, 1.0)
