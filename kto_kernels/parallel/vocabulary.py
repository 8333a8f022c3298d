"""Stage token_logps where each rank of a vocabulary group has some columns of the logits, and all have the same rows.

Take the columns of one rank as one event. The chain rule then splits the log-probability of a label y:

    log p(y) = log p(y | the columns of y's rank) + log P(the columns of y's rank)

A kernel computes the first term from the columns of one rank alone, and the second term follows from the statistics of
every rank. Both terms are sums over everything *beside* the label, so that near-certain tokens stay exact. The ranks
exchange three numbers for each row: the origin, the sum, and the first term, which is −inf on every rank but the
label's. All ranks compute the same bits from these numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..backends.base import Backend
from ..options import Scale
from ..records import ELSEWHERE, ChunkScores, Rows
from .groups import VocabShard, gather


@dataclass(frozen=True)
class _Ranks:
    """Every rank's part of each row, in fp64: (R, ...) each."""

    origin: Tensor
    sums: Tensor  # Σ exp(z − outer·origin) over the rank's columns
    logps: Tensor  # the label's among these columns; −inf where the label is not among them
    outputs: Tensor  # (R, E, ...) the E outputs that were asked for


def token_logps(shard: VocabShard, backend: Backend, rows: Rows, scale: Scale) -> tuple[Tensor, Tensor]:
    """`Backend.token_logps` over the columns of all ranks: one gather of three numbers a row."""
    logps, statistics, _ = _combined(*_exchanged(shard, backend, rows, scale), scale)
    return logps, statistics


def score_chunk(
    shard: VocabShard,
    backend: Backend,
    logits: Tensor,  # (C, V of this rank)
    labels: Tensor,  # (C,) int64, of this rank's columns or ELSEWHERE
    scale: Scale,
    gradient: bool,
    outputs: tuple[str, ...],
) -> ChunkScores:
    """`Backend.score_chunk` over the columns of all ranks; a second pass over this rank's columns writes the `gradient`."""
    rows = Rows(logits, labels, None, shift=False, ignore_index=-1, shard=True)
    local = _local_outputs(backend, logits, labels, shard.offset, scale, outputs)
    ranks, dtype = _exchanged(shard, backend, rows, scale, local)
    logps, statistics, probability = _combined(ranks, dtype, scale)
    if gradient and logits.numel() > 0:
        backend.logits_backward(rows, scale, torch.ones_like(logps), None, logps, statistics, logits)
    combined = {
        name: _OUTPUTS[name](ranks.outputs[:, i], ranks.logps, probability, shard.vocab)
        for i, name in enumerate(outputs)
    }
    return ChunkScores(
        logps, **{name: value if value.dtype == torch.bool else value.to(dtype) for name, value in combined.items()}
    )


def _exchanged(
    shard: VocabShard, backend: Backend, rows: Rows, scale: Scale, outputs: list[Tensor] | None = None
) -> tuple[_Ranks, torch.dtype]:
    dtype = reference.compute_dtype(rows.logits.dtype)
    if rows.vocab > 0:
        logps, statistics = backend.token_logps(rows, scale)
    else:  # a rank without columns sends what columns of −inf would give
        logps = torch.full(rows.labels.shape, -torch.inf, dtype=dtype, device=rows.labels.device)
        statistics = torch.stack([logps, torch.zeros_like(logps)])
    message = torch.stack([*statistics, logps, *(value.to(dtype) for value in outputs or ())])
    gathered = gather(message, shard.group).double()
    return _Ranks(gathered[:, 0], gathered[:, 1], gathered[:, 2], gathered[:, 3:]), dtype


def _combined(ranks: _Ranks, dtype: torch.dtype, scale: Scale) -> tuple[Tensor, Tensor, Tensor]:
    """(logps, statistics) over all ranks, and the probability (R, ...) of each rank's columns."""
    origin = ranks.origin.amax(0)
    gap = (ranks.origin - origin) * scale.outer
    empty = ranks.sums == 0
    raised = torch.where(empty, 0.0, ranks.sums * gap.exp())
    total = raised.sum(0)
    # The label's rank. Where the label's logit is −inf, and where the row is ignored, any rank will do.
    logps, its_rank = ranks.logps.max(0, keepdim=True)
    own = raised.gather(0, its_rank)
    beside = raised.scatter(0, its_rank, 0.0).sum(0, keepdim=True)  # not total − own, which would cancel
    # Far below the common origin `own` may underflow, but not the logarithm of `own`.
    far = gap.gather(0, its_rank) + (ranks.sums.gather(0, its_rank) / total).log()
    outer_logps = torch.where(own >= beside, -torch.log1p(beside / own), far)
    logps = torch.where(empty.gather(0, its_rank) & ~total.isnan(), logps, logps + outer_logps).squeeze_(0)
    probability = raised / total.masked_fill(total == 0, 1.0)
    return logps.to(dtype), torch.stack([origin, total]).to(dtype), probability


# Outputs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _local_outputs(
    backend: Backend, logits: Tensor, labels: Tensor, offset: int, scale: Scale, outputs: tuple[str, ...]
) -> list[Tensor]:
    """A rank's part of the outputs: the entropy of the rank's columns alone, the sum of their logits z, and for "is_top1"
    the highest of their logits. Where the label is among these columns and is known not to be the first argmax of the
    whole row, NaN stands in the place of the highest logit."""
    if not outputs:
        return []
    if logits.shape[1] == 0:
        nothing = {"entropy": 0.0, "mean_logits": 0.0, "is_top1": -torch.inf}
        return [torch.full(labels.shape, nothing[name], device=logits.device) for name in outputs]
    # Entropy and mean do not depend on the label.
    scores = backend.score_chunk(logits, labels.clamp(min=0), scale, False, outputs)
    values = {"entropy": scores.entropy}
    if "mean_logits" in outputs:
        values["mean_logits"] = scores.mean_logits * logits.shape[1]
    if "is_top1" in outputs:
        highest = logits.amax(-1).to(scores.logps.dtype)
        beaten = ~scores.is_top1 | ((highest == -torch.inf) & (offset > 0))
        values["is_top1"] = highest.masked_fill((labels != ELSEWHERE) & beaten, torch.nan)
    return [values[name] for name in outputs]


def _entropy(theirs: Tensor, logps: Tensor, probability: Tensor, vocab: int) -> Tensor:
    """The chain rule again: the mean of the ranks' own entropies, and the entropy of the choice among ranks."""
    return torch.where(probability == 0, 0.0, probability * (theirs - probability.log())).sum(0)


def _mean_logits(theirs: Tensor, logps: Tensor, probability: Tensor, vocab: int) -> Tensor:
    return theirs.sum(0) / vocab


def _is_top1(theirs: Tensor, logps: Tensor, probability: Tensor, vocab: int) -> Tensor:
    """Whether the label is the first argmax: higher than all before it, no rank after it higher."""
    its_rank = logps.argmax(0, keepdim=True)
    # Where the label is impossible, logps are −inf on all ranks, and argmax takes the first rank. That is right: unless the
    # label's own rank has said that it is beaten, its column is the first of all, and the first rank's logits are all −inf.
    label = theirs.gather(0, its_rank)
    before = torch.arange(len(theirs), device=theirs.device).unsqueeze(-1) < its_rank
    beaten = torch.where(before, theirs >= label, theirs > label) | theirs.isnan()
    return ~beaten.any(0) & ~probability.isnan().any(0)


_OUTPUTS = {"entropy": _entropy, "mean_logits": _mean_logits, "is_top1": _is_top1}
