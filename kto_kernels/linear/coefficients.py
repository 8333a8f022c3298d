"""Each row's coefficient `∂loss/∂ℓ_n`: known from the start, or as soon as the row's sequence is scored."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference
from ..backends.base import Backend, raise_divisor
from ..options import Objective, Scale
from ..pairs import Judged, Preference
from ..parallel.groups import sums_over_ranks
from ..records import Closing
from ..terms import Terms
from .schedule import Chunk

# How many logits plain PyTorch differentiates at a time, which takes several times the memory of these logits.
_ENTROPY_ELEMENTS = 1 << 22


# Some rows of a chunk: the number of the sequence that closes them, which rows, and their known factors (rows,) or None.
Part: TypeAlias = "tuple[int, slice, Tensor | None]"


class Coefficients(Protocol):
    """The coefficients `∂loss/∂ℓ_n` of rows, each as soon as it is known."""

    def close(self, logps: Tensor, chunk: Chunk) -> Tensor | None:  # ()
        """Closes the chunk's sequences, all of whose rows are scored in `logps` (S,). Returns the factor by which to
        scale the gradients summed so far; None: they stay as they are."""

    def of_rows(self, chunk: Chunk) -> Tensor | None:  # (C,)
        """The coefficients of a chunk's rows; None where the rows' gradients contain them already."""

    def of_chunk(self, chunk: Chunk) -> tuple[int, int]:
        """The chunk's sequences [first, last), where the plan may take a pair for one."""

    def parts(self, logps: Tensor, chunk: Chunk) -> list[Part]:
        """The parts of a deferred chunk's rows whose gradients are kept apart, each until `of_part` knows its factor."""

    def of_part(self, sequence: int) -> Tensor:  # ()
        """The coefficient by which the gradient is multiplied that was kept apart under this sequence's number."""

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

    def of_chunk(self, chunk: Chunk) -> tuple[int, int]:
        return chunk.sequences

    def parts(self, logps: Tensor, chunk: Chunk) -> list[Part]:
        raise AssertionError("no sequence waits for a coefficient that is known")

    def of_part(self, sequence: int) -> Tensor:
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
    """Coefficients of a loss of sequence log-probabilities: one for each sequence, known when the log-probabilities of
    the sequence, or of its pair, are. A subclass says how sequences close."""

    backend: Backend
    sizes: list[int]  # scored rows of each sequence on this rank
    counts: Tensor  # (B,) int64, the same on the device
    judged: Judged
    objective: Objective
    dtype: torch.dtype  # the dtype that the GEMMs run in
    terms: Terms  # of the scored rows
    group: dist.ProcessGroup | None  # the ranks that the sequences' tokens are spread over

    def __post_init__(self) -> None:
        device = self.counts.device
        self.starts: list[int] = [0, *itertools.accumulate(self.sizes)]
        # Made on the device: a copy from the host would wait for it, and a CUDA graph could not capture the copy. All
        # that follows from them stays inside the tensors, even where the sizes are wrong that a caller has given.
        ends = self.counts.cumsum(0)
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
        raise NotImplementedError

    def close(self, logps: Tensor, chunk: Chunk) -> Tensor | None:
        return self._close(logps, *self.of_chunk(chunk))

    def exchange(self, logps: Tensor) -> Tensor | None:
        if self.group is None:
            return self._close(logps, 0, len(self.slopes))
        counts = self.counts if self.objective.average_log_prob else None
        sums = sums_over_ranks(reference.per_sequence(self.terms.values(logps), self.offsets), counts, self.group)
        return self._close(logps, 0, len(self.slopes), *sums)

    def of_chunk(self, chunk: Chunk) -> tuple[int, int]:
        return chunk.sequences

    def parts(self, logps: Tensor, chunk: Chunk) -> list[Part]:
        return [(chunk.sequences[0], slice(None), None)]

    def of_rows(self, chunk: Chunk) -> Tensor | None:
        first, last = self.of_chunk(chunk)
        if last - first == 1:
            return self._divided(self.slopes[first:last]).to(reference.compute_dtype(self.dtype)).expand(chunk.rows)
        slopes = self._divided(self.slopes).to(reference.compute_dtype(self.dtype))
        return slopes.index_select(0, self.sequences[chunk.start : chunk.stop])

    def of_part(self, sequence: int) -> Tensor:
        return self._divided(self.slopes[sequence])

    def _divided(self, slopes: Tensor) -> Tensor:
        return slopes if self.divisor is None else slopes / self.divisor


@dataclass
class KTOCoefficients(LossCoefficients):
    """Coefficients of the KTO loss, whose sequences a kernel closes."""

    def _close(
        self, logps: Tensor, first: int, last: int, sums: Tensor | None = None, counts: Tensor | None = None
    ) -> Tensor | None:
        ref_logps = self.judged.ref_logps
        closing = Closing(
            token_logps=logps,
            rows=(self.starts[first], self.starts[last]),
            offsets=self.offsets[first : last + 1],
            sums=sums,
            lengths=self.counts[first:last],
            counts=counts,
            ref_logps=None if ref_logps is None else ref_logps[first:last],
            z0=self.judged.z0,
            desirable=self.judged.desirable[first:last],
            batch=len(self.slopes),
            logps=self.logps[first:last],
            slopes=self.slopes[first:last],
            divisor=self.divisor,
        )
        return self.backend.close_sequences(closing, self.objective)


@dataclass
class PreferenceCoefficients(LossCoefficients):
    """Coefficients of any loss, by autograd at the level of the B sequences. The members of a pair that is compared
    are neighbours, and one sequence of the plan."""

    preference: Preference = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        # (S,) the derivatives of the rows' terms, where these are not the log-probabilities
        self.row_slopes: Tensor = self.logps.new_zeros(self.starts[-1] if self.terms else 0)

    def _close(
        self, logps: Tensor, first: int, last: int, sums: Tensor | None = None, counts: Tensor | None = None
    ) -> Tensor | None:
        if sums is None:
            begin, end = self.starts[first], self.starts[last]
            offsets = self.offsets[first : last + 1].clamp(begin, end) - begin
            sums = reference.per_sequence(self.terms.values(logps)[begin:end], offsets)
        if self.terms:
            self.row_slopes = self.terms.slopes(logps)
        judged, lengths = self.judged, self.judged.scored(self.logps).lengths[first:last]
        self.logps[first:last] = reference.mean_logps(sums, lengths) if judged.average else sums
        slopes = self.preference.slopes(judged, self.logps, self.objective.reduction)[first:last]
        self.slopes[first:last] = reference.mean_logps(slopes, lengths) if judged.average else slopes
        if self.divisor is None:
            return None
        return raise_divisor(self.divisor, self.slopes[first:last], self.counts[first:last])

    def of_chunk(self, chunk: Chunk) -> tuple[int, int]:
        first, last = chunk.sequences
        return (2 * first, 2 * last) if self.preference.compares else (first, last)

    def of_rows(self, chunk: Chunk) -> Tensor | None:
        slopes = super().of_rows(chunk)
        return slopes * self.row_slopes[chunk.start : chunk.stop].to(slopes.dtype) if self.terms else slopes

    def parts(self, logps: Tensor, chunk: Chunk) -> list[Part]:
        rows = slice(chunk.start, chunk.stop)
        factors = self.terms.slopes(logps)[rows] if self.terms else None
        if not self.preference.compares:
            return [(chunk.sequences[0], slice(None), factors)]
        chosen, rejected = (2 * chunk.sequences[0] + i for i in (0, 1))
        if self.preference.margin_alone:
            shares = self._shares[self.sequences[rows]]
            return [(chosen, slice(None), shares if factors is None else shares * factors)]
        edge = min(max(self.starts[rejected], chunk.start), chunk.stop) - chunk.start
        parts = ((chosen, slice(0, edge)), (rejected, slice(edge, chunk.rows)))
        return [(i, part, None if factors is None else factors[part]) for i, part in parts if part.start < part.stop]

    def of_part(self, sequence: int) -> Tensor:
        if not self.preference.margin_alone:
            return super().of_part(sequence)
        slopes, shares = (x[sequence : sequence + 2] for x in (self.slopes, self._shares))
        return self._divided((slopes * shares).index_select(0, shares.abs().argmax().view(1)).squeeze(0))

    @functools.cached_property
    def _shares(self) -> Tensor:
        """(B,) the slopes of both members as multiples of one number, where the margin alone decides them: ±1, or
        less for the longer member where the margin is between log-ratios per token; 0 for a member without tokens."""
        lengths = self.judged.scored(self.logps).lengths.view(-1, 2)
        shares = torch.where(lengths > 0, 1 / lengths, 0.0) if self.preference.per_token else torch.ones_like(lengths)
        largest = shares.amax(1, keepdim=True)
        chosen, rejected = (shares / torch.where(largest > 0, largest, 1.0)).unbind(1)
        return torch.stack([chosen, -rejected], 1).flatten()
