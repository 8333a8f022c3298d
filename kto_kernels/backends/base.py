"""What a backend is: three operators on rows. `StagedBackend` builds the loss from one function a stage."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .. import reference
from ..rows import ChunkScores, ForwardResult, LossOptions, Rows, Scale, Sequences, StageResult


class Backend(ABC):
    name: str
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)

    @abstractmethod
    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on tensors of `device`; None where it can."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A large buffer, not initialised."""
        return torch.empty(shape, dtype=dtype, device=device)

    def new_gradient(self, logits: Tensor) -> Tensor:
        """A buffer for the gradient of `logits`, contiguous and not initialised."""
        return self.empty(logits.shape, logits.dtype, logits.device)

    @abstractmethod
    def token_logps(self, rows: Rows, scale: Scale) -> tuple[Tensor, Tensor]:
        """Token log-probabilities, labels-shaped, and the row statistics (2, *labels.shape) for the backward: u near
        its maximum, and `Σ_v exp(z_v − outer·u)`, both 0 where nothing is scored. (Those of "torch" are for shards.)"""

    @abstractmethod
    def kto_forward(
        self,
        policy: Rows,
        scale: Scale,
        desirable: Tensor,  # (B,) bool
        ref: Sequences,  # B sequences
        kl: Tensor | float,  # used where kl_policy is empty
        kl_policy: Sequences,  # K sequences
        kl_ref: Sequences,  # K sequences
        options: LossOptions,
    ) -> ForwardResult:
        """All five stages."""

    @abstractmethod
    def logits_backward(
        self,
        rows: Rows,
        scale: Scale,
        grad: Tensor,  # labels-shaped; with coefficients (B,) or ()
        coefficients: Tensor | None,  # (B,)
        token_logps: Tensor,
        statistics: Tensor,
        out: Tensor,  # logits-shaped, may be the logits
    ) -> None:
        """Writes `g_n · ∂ℓ_n/∂logits` for every row; zeros where the row is ignored or `g_n` is 0."""

    def score_chunk(
        self,
        logits: Tensor,  # (C, V), rows of stride 1
        labels: Tensor,  # (C,) int64, each in [0, V)
        scale: Scale,
        gradient: bool,
        outputs: tuple[str, ...],  # out of rows.OUTPUTS
    ) -> ChunkScores:
        """Scores the rows of a chunk; with `gradient`, overwrites the logits by `∂ℓ_n/∂logits`."""
        rows = Rows(logits, labels, None, shift=False, ignore_index=-1)
        logps, statistics = self.token_logps(rows, scale)
        extra = reference.outputs(logits, labels, outputs, **vars(scale))
        if gradient:
            ones = torch.ones_like(logps)
            self.logits_backward(rows, scale, ones, None, logps, statistics, logits)
        return ChunkScores(logps, **extra)

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """Multiplies by the () fp32 or fp64 `factor` where that is not 1, without waiting for the device."""
        if factor.device.type == "cpu":
            if factor != 1:
                tensor.mul_(factor.item())
        else:
            tensor.mul_(factor.reshape(1))  # one-dimensional, so that it is not rounded to the tensor's dtype


class StagedBackend(Backend):
    """A backend whose stages are separate calls."""

    @abstractmethod
    def sequence_logps(self, rows: Rows, logps: Tensor, average: bool) -> tuple[Tensor, Tensor]:
        """Sequence log-probabilities (B,) fp64 and the count of scored tokens (B,)."""

    @abstractmethod
    def sequence_stages(
        self,
        dtype: torch.dtype,
        logps: Tensor,  # (B,) fp64, like ref_logps
        counts: Tensor,  # (B,)
        ref_logps: Tensor | None,
        desirable: Tensor,
        kl: Tensor | float,
        kl_logps: Tensor | None,  # (K,) fp64, like ref_kl_logps
        ref_kl_logps: Tensor | None,
        options: LossOptions,
    ) -> StageResult:
        """Stages kl_reference_point, value and loss."""

    def kto_forward(self, policy, scale, desirable, ref, kl, kl_policy, kl_ref, options):
        policy_token_logps, statistics = self.token_logps(policy, scale)
        logps, counts = self.sequence_logps(policy, policy_token_logps, options.average_log_prob)

        def sums(side: Sequences) -> Tensor | None:
            if side.rows is not None:
                token_logps, _ = self.token_logps(side.rows, scale)
                return self.sequence_logps(side.rows, token_logps, options.average_log_prob)[0]
            if side.logps is None:
                return None
            # A copy: operators must not return their inputs.
            return side.logps.to(torch.float64, copy=True, memory_format=torch.contiguous_format)

        ref_logps = sums(ref)
        stages = self.sequence_stages(
            torch.promote_types(policy.logits.dtype, torch.float32),
            logps,
            counts,
            ref_logps,
            desirable.contiguous(),
            kl,
            sums(kl_policy),
            sums(kl_ref),
            options,
        )
        return ForwardResult(
            logps=logps,
            ref_logps=torch.zeros_like(logps) if ref_logps is None else ref_logps,
            token_logps=policy_token_logps,
            statistics=statistics,
            **vars(stages),
        )
