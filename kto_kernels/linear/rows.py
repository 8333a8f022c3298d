"""The rows of hidden states that a label scores."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import checks, reference, releases
from ..backends.base import Backend
from ..options import Scale, Scoring
from ..pairs import neighbours, neighbours_of
from ..parallel import vocabulary
from ..parallel.groups import VocabShard
from ..records import ChunkScores, Completions, local_labels
from .schedule import Chunk


@dataclass(frozen=True)
class ScoredRows:
    """The rows of the hidden states that a label scores, in their order; prompts and padding are left out here."""

    hidden: Tensor  # (B, T, H) or (N, H), any strides
    positions: Tensor  # (S,) int64, numbers of the rows among B·T or N
    labels: Tensor  # (S,) int64; with a shard, numbers among the columns of this rank, or ELSEWHERE
    lengths: list[int]  # scored rows of each sequence
    counts: Tensor  # (B,) int64, the same on the device
    shard: VocabShard | None = None

    @classmethod
    def of(
        cls, hidden: Tensor, completions: Completions, scoring: Scoring, columns: int, shard: VocabShard | None = None
    ) -> ScoredRows:
        """Waits for the device once, because the number of scored rows decides shapes, unless the completions say how
        many rows are scored; then these numbers are compared with the labels, where they may be read. `columns` is the
        number of columns on this rank."""
        vocab = columns if shard is None else shard.vocab
        target, scored = scored_targets(completions, scoring, vocab)
        counts = scored_counts(scored, completions.cu_seqlens)
        given = completions.scored_lengths
        lengths = (counts.cpu() if given is None else given).tolist()
        if given is not None:
            checks.scored_length_values(lengths, counts, completions.labels, scoring.shift, completions.prefix)
        # The count is known now, so that nothing waits again.
        positions = releases.positions(scored.flatten(), sum(lengths))
        target = target.flatten().index_select(0, positions)
        if given is not None:  # if they are wrong, rows are among these that have no such label
            target = target.clamp(0, vocab - 1)
        local = target if shard is None else local_labels(target, shard.offset, columns)
        return cls(hidden, positions, local, lengths, counts, shard)

    def neighbours(self) -> ScoredRows:
        """The same rows in another order: each chosen sequence before its rejected one, where halves are given."""
        ends, pairs = self.counts.cumsum(0), len(self.lengths) // 2
        rows = torch.arange(len(self.positions), device=ends.device)
        sequences = torch.searchsorted(ends, rows, right=True).clamp(max=max(0, len(ends) - 1))
        places = torch.where(sequences < pairs, 2 * sequences, 2 * (sequences - pairs) + 1)
        order = places.argsort(stable=True)
        lengths = neighbours_of(self.lengths)
        positions, labels = self.positions.index_select(0, order), self.labels.index_select(0, order)
        return replace(self, positions=positions, labels=labels, lengths=lengths, counts=neighbours(self.counts))

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
        logits: Tensor,  # (C, V), overwritten by their gradient with `forms`
        chunk: Chunk,
        scale: Scale,
        forms: bool,
        outputs: tuple[str, ...],
    ) -> ChunkScores:
        labels = self.labels[chunk.start : chunk.stop]
        if self.shard is None:
            return backend.score_chunk(logits, labels, scale, forms, outputs)
        return vocabulary.score_chunk(self.shard, backend, logits, labels, scale, forms, outputs)

    def scatter(self, values: Tensor) -> Tensor:
        """The (S,) values in the labels' shape, with zeros where no label scores the row."""
        out = values.new_zeros(self.hidden.shape[:-1])
        out.view(-1).index_copy_(0, self.positions, values)
        return out


def scored_targets(completions: Completions, scoring: Scoring, vocab: int) -> tuple[Tensor, Tensor]:
    """Each position's target, and whether the position is scored: its target is not `ignore_index`, and not outside the
    vocabulary. (On the CPU a label outside raises an error earlier.)"""
    target = reference.targets(completions.labels, scoring.shift, scoring.ignore_index, completions.cu_seqlens)
    scored = target != scoring.ignore_index
    return target, scored if checks.readable(target) else scored & (target >= 0) & (target < vocab)


def scored_counts(scored: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B,) int64 scored rows of each sequence; (N,) without `cu_seqlens` is one sequence."""
    if scored.dim() == 1 and cu_seqlens is None:
        return scored.sum().view(1)
    return reference.per_sequence(scored, cu_seqlens).long()


def check_values(completions: Completions, scoring: Scoring, vocab: int, backend: Backend) -> None:
    """Checks the values of labels, offsets and `scored_lengths`, where they may be read."""
    backend.check_values(completions, vocab, scoring.ignore_index)
    given = completions.scored_lengths
    if given is not None:
        counts = scored_counts(scored_targets(completions, scoring, vocab)[1], completions.cu_seqlens)
        checks.scored_length_values(given.tolist(), counts, completions.labels, scoring.shift, completions.prefix)


def counted(completions: list[Completions], scoring: Scoring, vocab: int) -> list[Completions]:
    """The completions with their `scored_lengths`. Lengths that are not known are read together: one wait."""
    counts = [
        None
        if each.scored_lengths is not None
        else scored_counts(scored_targets(each, scoring, vocab)[1], each.cu_seqlens)
        for each in completions
    ]
    missing = [count for count in counts if count is not None]
    read = iter(torch.cat(missing).cpu().split([len(count) for count in missing]) if missing else [])
    return [
        each if count is None else replace(each, scored_lengths=next(read)) for each, count in zip(completions, counts)
    ]
