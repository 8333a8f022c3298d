"""Each row's coefficient `∂loss/∂ℓ_n`: known from the start, or as soon as the row's sequence is scored."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference
from ..backends.base import Backend
from ..options import Objective, Scale
from ..parallel.groups import sums_over_ranks
from ..records import Closing
from .schedule import Chunk

# How many logits plain PyTorch differentiates at a time, which takes several times the memory of these logits.
_ENTROPY_ELEMENTS = 1 << 22


class Coefficients(Protocol):
    """The coefficients `∂loss/∂ℓ_n` of rows, each as soon as it is known."""

    def close(self, logps: Tensor, chunk: Chunk) -> Tensor | None:  # ()
        """Closes the chunk's sequences, all of whose rows are scored in `logps` (S,). Returns the factor by which to
        scale the gradients summed so far; None: they stay as they are."""

    def of_rows(self, chunk: Chunk) -> Tensor | None:  # (C,)
        """The coefficients of a chunk's rows; None where the rows' gradients contain them already."""

    def of_sequence(self, sequence: int) -> Tensor:  # ()
        """The coefficient that every row of a sequence has."""

    def exchange(self, logps: Tensor) -> Tensor | None:  # ()
        """Adds the ranks' sums of every sequence, now that all rows of this rank are scored, and closes the sequences.
        Returns the same factor as `close`."""


@dataclass
class KnownCoefficients:
    """Coefficients given from the start: the backward of any loss on top of the token log-probabilities."""

    values: Tensor  # (S,)

    def close(self, logps: Tensor, chunk: Chunk) -> Tensor | None:
        return None

    def of_rows(self, chunk: Chunk) -> Tensor | None:
        return self.values[chunk.start : chunk.stop]

    def of_sequence(self, sequence: int) -> Tensor:
        raise AssertionError("no sequence waits for a coefficient that is known")

    def exchange(self, logps: Tensor) -> Tensor | None:
        return None


@dataclass
class LogpAndEntropyCoefficients(KnownCoefficients):
    """Known coefficients of log-probabilities and of entropies. They are rarely asked for, so plain PyTorch makes the
    gradient, some rows at a time."""

    entropy: Tensor  # (S,) ∂loss/∂(entropy of row n)

    def gradient_(self, logits: Tensor, labels: Tensor, chunk: Chunk, scale: Scale) -> None:
        """Overwrites the logits by their gradient, multiplied by the coefficients."""
        scored = slice(chunk.start, chunk.stop)
        rows = max(1, _ENTROPY_ELEMENTS // logits.shape[1])
        for x, y, g, e in zip(*(t.split(rows) for t in (logits, labels, self.values[scored], self.entropy[scored]))):
            of_logps = reference.token_logps_grad(x.to(g.dtype), y, g, **vars(scale))
            x.copy_(of_logps + reference.entropy_grad(x.to(g.dtype), e, **vars(scale)))

    def of_rows(self, chunk: Chunk) -> Tensor | None:
        return None


@dataclass
class LossCoefficients:
    """Coefficients of the KTO loss: one for each sequence, known when the sequence's log-probability is."""

    backend: Backend
    sizes: list[int]  # scored rows of each sequence on this rank
    lengths: Tensor  # (B,) int64, the same on the device
    ref_logps: Tensor | None  # (B,)
    z0: Tensor  # ()
    desirable: Tensor  # (B,) bool
    objective: Objective
    dtype: torch.dtype  # the dtype that the GEMMs run in
    group: dist.ProcessGroup | None = None  # the ranks that the sequences' tokens are spread over

    def __post_init__(self) -> None:
        device = self.desirable.device
        self.starts: list[int] = [0, *itertools.accumulate(self.sizes)]
        # Made on the device: a copy from the host would wait for it, and a CUDA graph could not capture the copy. All
        # that follows from them stays inside the tensors, even where the sizes are wrong that a caller has given.
        ends = self.lengths.cumsum(0)
        self.offsets: Tensor = torch.nn.functional.pad(ends, (1, 0)).clamp(max=self.starts[-1])
        rows = torch.arange(self.starts[-1], device=device)
        self.sequences: Tensor = torch.searchsorted(ends, rows, right=True).clamp(max=max(0, len(ends) - 1))
        # A sequence without a scored row may be in no chunk: its log-probability and its coefficient are 0.
        self.logps: Tensor = torch.zeros(len(self.sizes), dtype=torch.float64, device=device)
        self.slopes: Tensor = torch.zeros_like(self.logps)
        # Before fp16 products the coefficients are divided by this power of two, which follows the largest coefficient
        # so far: the products do not underflow.
        self.divisor: Tensor | None = self.logps.new_zeros(()) if self.dtype == torch.float16 else None

    def _close(
        self, logps: Tensor, first: int, last: int, sums: Tensor | None = None, counts: Tensor | None = None
    ) -> Tensor | None:
        """Stages 2 to 5 of sequences [first, last); over several ranks with the sums and the counts of all of them."""
        closing = Closing(
            token_logps=logps,
            rows=(self.starts[first], self.starts[last]),
            offsets=self.offsets[first : last + 1],
            sums=sums,
            lengths=self.lengths[first:last],
            counts=counts,
            ref_logps=None if self.ref_logps is None else self.ref_logps[first:last],
            z0=self.z0,
            desirable=self.desirable[first:last],
            batch=len(self.slopes),
            logps=self.logps[first:last],
            slopes=self.slopes[first:last],
            divisor=self.divisor,
        )
        return self.backend.close_sequences(closing, self.objective)

    def close(self, logps: Tensor, chunk: Chunk) -> Tensor | None:
        return self._close(logps, *chunk.sequences)

    def exchange(self, logps: Tensor) -> Tensor | None:
        if self.group is None:
            return self._close(logps, 0, len(self.slopes))
        counts = self.lengths if self.objective.average_log_prob else None
        sums = sums_over_ranks(reference.per_sequence(logps, self.offsets), counts, self.group)
        return self._close(logps, 0, len(self.slopes), *sums)

    def of_rows(self, chunk: Chunk) -> Tensor | None:
        first, last = chunk.sequences
        if last - first == 1:
            return self._divided(self.slopes[first:last]).to(reference.compute_dtype(self.dtype)).expand(chunk.rows)
        slopes = self._divided(self.slopes).to(reference.compute_dtype(self.dtype))
        return slopes.index_select(0, self.sequences[chunk.start : chunk.stop])

    def of_sequence(self, sequence: int) -> Tensor:
        return self._divided(self.slopes[sequence])

    def _divided(self, slopes: Tensor) -> Tensor:
        return slopes if self.divisor is None else slopes / self.divisor
