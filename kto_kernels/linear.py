"""The walk from hidden states over the chunks of a plan: one GEMM fills a chunk with logits, one pass scores it and
turns it into `1[v = y] − p` in place, two GEMMs make gradients of it. Algorithm: `kto_kernels.plan`.

Everything here is exact and runs outside autograd; the operators around it are in `kto_kernels.linear_ops`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from . import reference, shards
from .backends.base import Backend
from .distributed import VocabShard, sums_over_ranks
from .plan import Chunk, LinearPlan, Task
from .rows import ChunkScores, LossOptions, Scale, local_labels

# Rows and columns at a time where a product is rounded to 16 bits before it is added: the tile stays in the cache.
_TILE = 1024
# Logits at a time where a gradient is made by plain PyTorch, which takes several times their memory.
_ENTROPY_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class ScoredRows:
    """The rows of the hidden states that a label scores, in their order; prompts and padding are left out here."""

    hidden: Tensor  # (B, T, H) or (N, H), any strides
    positions: Tensor  # (S,) int64, row numbers in B·T or N
    labels: Tensor  # (S,) int64; of a shard's columns, or ELSEWHERE
    lengths: list[int]  # of each sequence
    shard: VocabShard | None = None

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        shift: bool,
        ignore_index: int,
        columns: int,
        shard: VocabShard | None = None,
    ) -> ScoredRows:
        """Waits for the device once: how many rows there are decides shapes. `columns` are those of this rank."""
        vocab = columns if shard is None else shard.vocab
        target, scored = scored_targets(labels, cu_seqlens, shift, ignore_index, vocab)
        lengths = scored_lengths(scored, cu_seqlens)
        # The count is known now, so that nothing waits again.
        positions = scored.flatten().nonzero_static(size=sum(lengths)).squeeze(-1)
        target = target.flatten()[positions].long()
        return cls(
            hidden,
            positions,
            target if shard is None else local_labels(target, shard.offset, columns),
            lengths,
            shard,
        )

    def take(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:  # (C, H)
        rows = self.positions[chunk.start : chunk.stop]
        if self.hidden.dim() == 2:
            taken = self.hidden.index_select(0, rows)
        elif self.hidden.is_contiguous():
            taken = self.hidden.flatten(0, 1).index_select(0, rows)
        else:  # flattening would copy
            tokens = self.hidden.shape[1]
            taken = self.hidden[rows // tokens, rows % tokens]
        return taken.to(dtype)

    def score(
        self,
        backend: Backend,
        logits: Tensor,  # (C, V), overwritten by their gradient if that `forms`
        chunk: Chunk,
        scale: Scale,
        forms: bool,
        outputs: tuple[str, ...],
    ) -> ChunkScores:
        labels = self.labels[chunk.start : chunk.stop]
        if self.shard is None:
            return backend.score_chunk(logits, labels, scale, forms, outputs)
        return shards.score_chunk(self.shard, backend, logits, labels, scale, forms, outputs)

    def spread(self, values: Tensor) -> Tensor:
        """(S,) values in the labels' shape; zeros where nothing is scored."""
        shape = self.hidden.shape[:-1]
        out = values.new_zeros(shape.numel())
        out[self.positions] = values
        return out.view(shape)


def scored_targets(
    labels: Tensor, cu_seqlens: Tensor | None, shift: bool, ignore_index: int, vocab: int
) -> tuple[Tensor, Tensor]:
    """Each position's target, and whether it is scored: it is not `ignore_index`, nor (on a GPU, where no error says
    so) outside the vocabulary."""
    target = reference.targets(labels, shift, ignore_index, cu_seqlens)
    return target, (target != ignore_index) & (target >= 0) & (target < vocab)


def scored_lengths(scored: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """Scored rows of each sequence; (N,) without `cu_seqlens` is one sequence."""
    if scored.dim() == 1 and cu_seqlens is None:
        return [int(scored.sum())]
    return reference.per_sequence(scored, cu_seqlens).long().tolist()


@dataclass(frozen=True)
class Head:
    """The language model's head, in the dtype that the GEMMs run in."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    scale: Scale

    def project(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """Logits (C, V) of hidden states (C, H), in the front of the buffer."""
        logits = buffer[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=logits)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=logits)


@dataclass(frozen=True)
class Needs:
    """Which gradients are formed."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @property
    def head(self) -> bool:
        return self.weight or self.bias


@dataclass
class HeadGradient:
    """A gradient of the head in the making. Buffers are made when the first product comes."""

    needs: Needs
    dtype: torch.dtype  # of dW: fp32 (fp64 for fp64), or narrower where it is one product
    weight: Tensor | None = None  # (V, H)
    bias: Tensor | None = None  # (V,)

    def add(self, gradient: Tensor, hidden: Tensor, coefficients: Tensor | None) -> None:
        """Adds `Σ_n c_n · gradient_n ⊗ hidden_n`; without coefficients c = 1. Overwrites the hidden states: their few
        columns are scaled, not the V of the gradient."""
        if self.needs.weight:
            if coefficients is not None:
                hidden.mul_(coefficients.unsqueeze(-1))
            self.weight = add_product(self.weight, gradient.t(), hidden, self.dtype)
        if self.needs.bias:
            row = gradient.new_ones(1, len(gradient)) if coefficients is None else coefficients.view(1, -1)
            bias = None if self.bias is None else self.bias.view(1, -1)
            total_dtype = reference.compute_dtype(gradient.dtype)
            self.bias = add_product(bias, row.to(gradient.dtype), gradient, total_dtype).view(-1)

    def fold(self, other: HeadGradient, factor: Tensor) -> None:
        """Adds `factor · other`, which is over then."""
        for name in ("weight", "bias"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if theirs is None:
                continue
            if mine is None:
                setattr(self, name, theirs.mul_(factor))
            else:
                mine.addcmul_(theirs, factor)
            setattr(other, name, None)

    def scale_(self, factor: Tensor, backend: Backend) -> None:
        for total in (self.weight, self.bias):
            if total is not None:
                backend.scale_(total, factor)

    def result(self, weight: Tensor, bias: Tensor | None, unit: Tensor | None) -> tuple[Tensor, Tensor]:
        """(dW, db) in `gradient_dtype` of the head as it was given; zeros where no row came, empty where not needed."""

        def finish(needed: bool, total: Tensor | None, like: Tensor) -> Tensor:
            dtype = gradient_dtype(like.dtype)
            if not needed or total is None:
                return torch.zeros(like.shape if needed else 0, dtype=dtype, device=like.device)
            return (total if unit is None else total.mul_(unit)).to(dtype)

        bias = weight if bias is None else bias
        return finish(self.needs.weight, self.weight, weight), finish(self.needs.bias, self.bias, bias)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the gradient that an operator returns of a part of the head. That of an fp16 head stays fp32: what scales it up
    against underflow comes later."""
    return torch.float32 if dtype == torch.float16 else dtype


def add_product(total: Tensor | None, a: Tensor, b: Tensor, first_dtype: torch.dtype) -> Tensor:
    """`total + a @ b` in place; without a total the product, which may be `first_dtype` of its own factors. A sum is in
    fp32 (fp64 for fp64) whatever its factors are."""
    if total is None and first_dtype == a.dtype:
        return torch.mm(a, b)
    beta = 1
    if total is None:
        total, beta = torch.empty(a.shape[0], b.shape[1], dtype=first_dtype, device=a.device), 0
    if total.dtype == a.dtype:
        return torch.addmm(total, a, b, beta=beta, out=total)
    if a.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        return torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    # No GEMM here adds 16-bit factors to fp32: each product is rounded once on its way, not the sum.
    for rows, part in zip(a.split(_TILE), total.split(_TILE)):
        for columns, tile in zip(b.split(_TILE, 1), part.split(_TILE, 1)):
            product = torch.mm(rows, columns)
            tile.add_(product) if beta else tile.copy_(product)
    return total


def power_of_two_below(largest: Tensor) -> Tensor:  # ()
    """A unit to divide numbers by, of which `largest` is the largest; not 0, and 1 where that is not finite."""
    unit = torch.exp2(largest.log2().floor()).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(unit.isfinite(), unit, 1.0)


@dataclass
class Walk:
    """What a walk leaves behind. Token values are (S,), in the order of the scored rows."""

    logps: Tensor
    outputs: dict[str, Tensor]
    hidden: Tensor  # like the hidden states given: ∂ℓ_n/∂h_n, *without* coefficients; or empty
    head: HeadGradient


class Coefficients(Protocol):
    """`∂loss/∂ℓ_n` of rows, as soon as it is known."""

    def close(self, logps: Tensor, chunk: Chunk) -> Tensor | None:  # ()
        """The chunk's sequences are scored: `logps` (S,) holds all of their rows. Returns what the sums made so far are
        to be scaled by, if at all."""

    def of_rows(self, chunk: Chunk) -> Tensor | None:  # (C,)
        """Of a chunk's rows; None: their gradient has them in it."""

    def of_sequence(self, sequence: int) -> Tensor:  # ()
        """Of every row of a sequence."""

    def exchange(self, logps: Tensor) -> Tensor | None:  # ()
        """Every row of this rank is scored, and every sequence is closed when the other ranks have said what theirs sum
        to. Returns what `close` does."""


@dataclass
class KnownCoefficients:
    """Given from the start: the backward of any loss on top of the token log-probabilities."""

    values: Tensor  # (S,)

    def close(self, logps, chunk):
        pass

    def of_rows(self, chunk):
        return self.values[chunk.start : chunk.stop]

    def of_sequence(self, sequence):
        raise AssertionError("no sequence waits for a coefficient that is known")

    exchange = of_sequence


@dataclass
class BothCoefficients(KnownCoefficients):
    """Those of the rows' entropies beside them. Rarely asked for: plain PyTorch, some rows at a time."""

    entropy: Tensor  # (S,) ∂loss/∂(entropy of row n)

    def gradient_(self, logits: Tensor, labels: Tensor, chunk: Chunk, scale: Scale) -> None:
        """Overwrites the logits by their gradient, coefficients and all."""
        scored = slice(chunk.start, chunk.stop)
        rows = max(1, _ENTROPY_ELEMENTS // logits.shape[1])
        for x, y, g, e in zip(*(t.split(rows) for t in (logits, labels, self.values[scored], self.entropy[scored]))):
            of_logps = reference.token_logps_grad(x.to(g.dtype), y, g, **vars(scale))
            x.copy_(of_logps + reference.entropy_grad(x.to(g.dtype), e, **vars(scale)))

    def of_rows(self, chunk):
        return None


class LossCoefficients:
    """Of the KTO loss: one for each sequence, known when its log-probability is."""

    def __init__(
        self,
        lengths: list[int],  # on this rank
        ref_logps: Tensor | None,  # (B,)
        z0: Tensor,  # ()
        desirable: Tensor,  # (B,) bool
        options: LossOptions,
        dtype: torch.dtype,  # of the GEMMs
        group: dist.ProcessGroup | None = None,  # the ranks that the sequences' tokens are spread over
    ) -> None:
        device = desirable.device
        self.starts = [0, *itertools.accumulate(lengths)]
        self.offsets = torch.tensor(self.starts, device=device)
        self.lengths = self.offsets.diff()
        self.ref_logps, self.z0, self.desirable, self.options = ref_logps, z0, desirable, options
        self.dtype, self.group = reference.compute_dtype(dtype), group
        # What they are divided by. For fp16 products it follows the largest one so far, so that they do not underflow.
        self.unit = torch.zeros((), dtype=torch.float64, device=device) if dtype == torch.float16 else None
        self.logps, self.slopes = (torch.zeros(len(lengths), dtype=torch.float64, device=device) for _ in range(2))

    def _sums(self, logps: Tensor, first: int, last: int) -> Tensor:
        begin, end = self.starts[first], self.starts[last]
        return reference.per_sequence(logps[begin:end], self.offsets[first : last + 1] - begin)

    def _close(self, first: int, last: int, total: Tensor, lengths: Tensor) -> Tensor | None:
        """Stages 2 to 5 of sequences [first, last): their sums and lengths are known."""
        average = self.options.average_log_prob
        logps = reference.mean_logps(total, lengths) if average else total
        r = reference.log_ratio(logps, None if self.ref_logps is None else self.ref_logps[first:last])
        slopes = reference.loss_slope(r, self.z0, self.desirable[first:last], self.options.beta, self.options.weights)
        if self.options.reduction == "mean":
            slopes = slopes / max(1, len(self.slopes))
        self.logps[first:last] = logps
        self.slopes[first:last] = reference.mean_logps(slopes, lengths) if average else slopes
        if self.unit is None or first == last:
            return None
        largest = torch.where(self.lengths[first:last] > 0, self.slopes[first:last].abs(), 0.0).amax()
        before, self.unit = self.unit, self.unit.maximum(power_of_two_below(largest))
        return before / self.unit

    def close(self, logps, chunk):
        first, last = chunk.sequences
        return self._close(first, last, self._sums(logps, first, last), self.lengths[first:last])

    def exchange(self, logps):
        count = len(self.slopes)
        lengths = self.lengths if self.options.average_log_prob else None
        return self._close(0, count, *sums_over_ranks(self._sums(logps, 0, count), lengths, self.group))

    def of_rows(self, chunk):
        first, last = chunk.sequences
        slopes = self._in_units(self.slopes[first:last]).to(self.dtype)
        if last - first == 1:
            return slopes.expand(chunk.rows)
        rows = self.offsets[first : last + 1].clamp(chunk.start, chunk.stop).diff()
        return slopes.repeat_interleave(rows, output_size=chunk.rows)

    def of_sequence(self, sequence):
        return self._in_units(self.slopes[sequence])

    def _in_units(self, slopes: Tensor) -> Tensor:
        return slopes if self.unit is None else slopes / self.unit


class _Sum:
    """The gradient of a chunk's hidden states, on its way to be the sum over all ranks' columns."""

    def __init__(self, chunk: Chunk, gradient: Tensor, group: dist.ProcessGroup) -> None:
        self.result = chunk, gradient
        self.work = dist.all_reduce(gradient, group=group, async_op=True)

    def wait(self) -> tuple[Chunk, Tensor]:
        self.work.wait()
        return self.result


def walk(
    rows: ScoredRows,
    head: Head,
    plan: LinearPlan,
    backend: Backend,
    needs: Needs,
    outputs: tuple[str, ...] = (),
    coefficients: Coefficients | None = None,
) -> Walk:
    """Runs the chunks of the plan. `coefficients` where the head is trained.

    Where ranks share the vocabulary, each chunk costs one gather (see `kto_kernels.shards`), and one all-reduce of the
    hidden states' gradient, which is under way during the chunk's other product and the next chunk's first.
    """
    device, dtype = rows.hidden.device, head.weight.dtype
    total_rows = len(rows.positions)
    float_dtype = reference.compute_dtype(dtype)
    logps = torch.zeros(total_rows, dtype=float_dtype, device=device)
    extra = {
        name: torch.zeros(total_rows, dtype=torch.bool if name == "is_top1" else float_dtype, device=device)
        for name in outputs
    }
    hidden = torch.zeros(rows.hidden.shape if needs.hidden else 0, dtype=rows.hidden.dtype, device=device)
    flat = hidden.view(-1, hidden.shape[-1]) if needs.hidden else hidden
    total = HeadGradient(needs, plan.weight_gradient_dtype)
    apart: dict[int, HeadGradient] = {}  # of sequences that are still open, unscaled
    kept: list[tuple[Chunk, Tensor]] = []  # chunks whose gradients wait in the buffer, one behind the other
    buffer = backend.empty((plan.buffer_rows, head.weight.shape[0]), dtype, device)
    on_its_way: list[_Sum] = []  # one at most

    def put(chunk: Chunk, gradient: Tensor) -> None:
        flat.index_copy_(0, rows.positions[chunk.start : chunk.stop], gradient.to(flat.dtype))

    def settle() -> None:
        while on_its_way:
            put(*on_its_way.pop().wait())

    def rescale(factor: Tensor | None) -> None:
        if factor is not None:
            total.scale_(factor, backend)

    def form(chunk: Chunk, gradient: Tensor, h: Tensor) -> None:
        if needs.hidden and rows.shard is not None:
            settle()
            on_its_way.append(_Sum(chunk, torch.mm(gradient, head.weight), rows.shard.group))
        if needs.head:
            sequence = chunk.sequences[0]
            if chunk.task is Task.DEFER:
                apart.setdefault(sequence, HeadGradient(needs, float_dtype)).add(gradient, h, None)
            else:
                if chunk.task is Task.CLOSE:
                    rescale(coefficients.close(logps, chunk))
                    if sequence in apart:
                        total.fold(apart.pop(sequence), coefficients.of_sequence(sequence))
                total.add(gradient, h, coefficients.of_rows(chunk))
        if needs.hidden and rows.shard is None:
            # The chunk's hidden states have done their work: their gradient takes their place.
            put(chunk, torch.mm(gradient, head.weight, out=h))

    for chunk in plan.chunks:
        if chunk.task is Task.EXCHANGE:
            rescale(coefficients.exchange(logps))
            # The first of those apart becomes the sum, where there is none yet.
            for sequence in list(apart):
                total.fold(apart.pop(sequence), coefficients.of_sequence(sequence))
            for waiting, gradient in kept:
                form(waiting, gradient, rows.take(waiting, dtype))
            kept.clear()
            continue
        h = rows.take(chunk, dtype)
        gradient = head.project(h, buffer[sum(waiting.rows for waiting, _ in kept) :])
        settle()
        forms = chunk.task is not Task.SCORE
        scored = slice(chunk.start, chunk.stop)
        if forms and isinstance(coefficients, BothCoefficients):
            coefficients.gradient_(gradient, rows.labels[scored], chunk, head.scale)
        else:
            scores = rows.score(backend, gradient, chunk, head.scale, forms, outputs)
            logps[scored] = scores.logps
            for name, values in extra.items():
                values[scored] = getattr(scores, name)
        if chunk.task is Task.KEEP:
            kept.append((chunk, gradient))
        elif forms:
            form(chunk, gradient, h)
    settle()
    return Walk(logps, extra, hidden, total)
