"""How token log-probabilities become the terms of a sequence's sum: as they are, weighted, or with clipped log-ratios."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """The bounds that token log-ratios are clipped to."""

    lower: float
    upper: float


@dataclass(frozen=True)
class Terms:
    """The terms of some tokens: `w · ℓ`, or `w · (ℓ_ref + clip(ℓ − ℓ_ref))`, so that the sum of a sequence's terms less
    the reference's weighted sum is the sum of weighted and clipped log-ratios."""

    weights: Tensor | None = None  # (...), fp32 or fp64; None: all are 1
    ref_logps: Tensor | None = None  # (...), given with `clip`
    clip: Clip | None = None

    def __bool__(self) -> bool:
        return self.weights is not None or self.clip is not None

    def at(self, rows: Tensor) -> Terms:
        """The terms of some tokens out of all, by their numbers."""
        tensors = {"weights": self.weights, "ref_logps": self.ref_logps}
        return replace(
            self, **{k: None if x is None else x.flatten().index_select(0, rows) for k, x in tensors.items()}
        )

    def values(self, logps: Tensor) -> Tensor:
        """The terms (...) of token log-probabilities (...), differentiable."""
        if self.clip is not None:
            assert self.ref_logps is not None
            ref_logps = self.ref_logps.double()
            logps = ref_logps + (logps - ref_logps).clamp(self.clip.lower, self.clip.upper)
        return logps if self.weights is None else logps * self.weights

    def slopes(self, logps: Tensor) -> Tensor:
        """The derivatives (...) in fp64 of the terms by the token log-probabilities: 0 where a log-ratio is clipped."""
        slopes = torch.ones_like(logps, dtype=torch.float64) if self.weights is None else self.weights.double()
        if self.clip is None:
            return slopes
        assert self.ref_logps is not None
        ratios = logps - self.ref_logps.double()
        return torch.where((ratios >= self.clip.lower) & (ratios <= self.clip.upper), slopes, 0.0)
