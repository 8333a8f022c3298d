"""The walk over the chunks of a plan (`kto_kernels.linear.plan`): for each chunk one GEMM makes the logits from hidden
states, one pass scores the logits and overwrites them by their gradient, and two GEMMs form the others from it.

The walk is exact and runs outside autograd; `kto_kernels.ops.linear` makes operators of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference
from ..backends.base import Backend
from .coefficients import Coefficients, LogpAndEntropyCoefficients
from .head import Head, HeadGradient, Needs
from .plan import LinearPlan
from .rows import ScoredRows
from .schedule import Chunk, Task


@dataclass
class Walk:
    """The results of a walk."""

    logps: Tensor  # (S,), in the order of the scored rows
    outputs: dict[str, Tensor]  # (S,) each
    hidden: Tensor  # like the hidden states given: ∂ℓ_n/∂h_n, *without* coefficients; or empty
    head: HeadGradient


class _Sum:
    """The gradient of a chunk's hidden states, while an all-reduce sums it over the ranks of the vocabulary group."""

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
    """Runs the chunks of the plan. A trained head needs `coefficients`.

    In a vocabulary group each chunk costs one gather (see `kto_kernels.parallel.vocabulary`), and one all-reduce of the
    hidden states' gradient, which runs during the chunk's other product and the next chunk's first. The gradient of an
    adapter's A, which is whole on every rank, costs one all-reduce at the end.
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
    apart: dict[int, HeadGradient] = {}  # deferred sequence → the gradient kept apart, without its coefficient
    kept: list[tuple[Chunk, Tensor]] = []  # kept chunks, whose logits' gradients lie in the buffer
    buffer = backend.empty((plan.buffer_rows, head.weight.shape[0]), dtype, device)
    on_its_way: list[_Sum] = []  # at most one sum

    def put(chunk: Chunk, gradient: Tensor) -> None:
        flat.index_copy_(0, rows.positions[chunk.start : chunk.stop], gradient.to(flat.dtype))

    def settle() -> None:
        while on_its_way:
            put(*on_its_way.pop().wait())

    def rescale(factor: Tensor | None) -> None:
        if factor is not None:
            total.scale_(factor, backend)

    def fold(first: int, last: int) -> None:
        for sequence in sorted(apart):
            if first <= sequence < last:
                total.fold(apart.pop(sequence), coefficients.of_part(sequence))

    def form(chunk: Chunk, gradient: Tensor, h: Tensor) -> None:
        up = head.adapter.up(gradient) if head.adapter is not None and (needs.hidden or needs.adapter) else None
        if needs.hidden and rows.shard is not None:
            settle()
            on_its_way.append(_Sum(chunk, head.hidden_gradient(gradient, up), rows.shard.group))
        if needs.head:
            if chunk.task is Task.DEFER:
                for sequence, part, factors in coefficients.parts(logps, chunk):
                    kept_apart = apart.setdefault(sequence, HeadGradient(needs, float_dtype))
                    of_part = None if up is None else up[part]
                    kept_apart.add(gradient[part], h[part], factors, head.adapter, of_part)
            else:
                if chunk.task is Task.CLOSE:
                    rescale(coefficients.close(logps, chunk))
                    fold(*coefficients.of_chunk(chunk))
                total.add(gradient, h, coefficients.of_rows(chunk), head.adapter, up)
        if needs.hidden and rows.shard is None:
            # The chunk's hidden states are no longer needed: their gradient overwrites them.
            put(chunk, head.hidden_gradient(gradient, up, out=h))

    for chunk in plan.chunks:
        if chunk.task is Task.EXCHANGE:
            rescale(coefficients.exchange(logps))
            # Without a sum so far, the first gradient kept apart becomes the sum.
            fold(0, len(rows.lengths))
            for waiting, gradient in kept:
                form(waiting, gradient, rows.take(waiting, dtype))
            kept.clear()
            continue
        h = rows.take(chunk, dtype)
        gradient = head.project(h, buffer[sum(waiting.rows for waiting, _ in kept) :])
        settle()
        forms = chunk.task is not Task.SCORE
        scored = slice(chunk.start, chunk.stop)
        if forms and isinstance(coefficients, LogpAndEntropyCoefficients):
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
    if total.adapter_a is not None and rows.shard is not None:  # so far of this rank's columns
        dist.all_reduce(total.adapter_a, group=rows.shard.group)
    return Walk(logps, extra, hidden, total)
