"""The chunks of a plan, in the order of their work, and the task of each chunk."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias

# Closing a deferred sequence reads and writes dW and reads the second dW: 12·V·H bytes, which take as long as 6·balance
# rows of a GEMM.
_DEFER_ROWS_PER_BALANCE = 6


# (rows before a sequence's last chunk, buffers that deferring would take, gradients of the head kept apart already) →
# (the task of these rows, why)
Late: TypeAlias = Callable[..., "tuple[Task, str]"]
# (sequence, how many of the sequence's first rows are deferred) → buffers for their gradients
Buffers: TypeAlias = Callable[[int, int], int]
Told: TypeAlias = tuple[int, str]  # (sequence, why it is deferred or recomputed)


class Task(Enum):
    """The work that is done with a chunk."""

    SCORE = "score"  # log-probabilities alone
    CLOSE = "close"  # the chunk's sequences end here: their coefficients are known, gradients are formed
    DEFER = "defer"  # the chunk's sequence ends later: the chunk's gradient of the head is kept apart, unscaled
    KEEP = "keep"  # the chunk's logits stay in the buffer until the exchange, then gradients are formed
    EXCHANGE = "exchange"  # the chunk has no rows: the ranks exchange their sequences' sums
    RECOMPUTE = "recompute"  # the chunk was scored before; its logits are computed once more for its gradients


@dataclass(frozen=True)
class Chunk:
    start: int  # the chunk has scored rows [start, stop), in their order
    stop: int
    task: Task
    sequences: tuple[int, int]  # the rows belong to sequences [first, last)

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def forms(self) -> bool:
        """Whether gradients are formed from this chunk's logits."""
        return self.task not in (Task.SCORE, Task.EXCHANGE)


def late(needs_weight: bool, long_sequences: str, balance: float) -> Late:
    """The function that chooses between deferring and recomputing, for one plan."""

    def choose(early: int, buffers: int, apart: int = 0) -> tuple[Task, str]:
        if long_sequences != "auto":
            return Task.DEFER if long_sequences == "defer" else Task.RECOMPUTE, f"long_sequences={long_sequences!r}"
        if not needs_weight:
            return Task.DEFER, "second gradients of bias and adapter are small"
        if apart:
            return Task.RECOMPUTE, "another is deferred, and each would take a dW of its own"
        worth = round(_DEFER_ROWS_PER_BALANCE * balance) * buffers
        passes, cost = "a pass over a second dW", "costs"
        if buffers > 1:
            passes, cost = "passes over two further dW, one for each member,", "cost"
        if early < worth:
            return Task.RECOMPUTE, f"{passes} would cost as much as {worth:,} rows"
        return Task.DEFER, f"{passes} {cost} only as much as {worth:,} rows"

    return choose


def _runs(lengths: list[int], chosen: set[int]) -> list[tuple[int, int, int, int]]:
    """Runs of neighbours among the chosen sequences: (first, last, start, stop), with sequences [first, last) on rows
    [start, stop). A sequence without rows does not end a run."""
    starts = [0, *itertools.accumulate(lengths)]
    filled = (i for i, length in enumerate(lengths) if length)
    runs = [list(run) for taken, run in itertools.groupby(filled, key=chosen.__contains__) if taken]
    return [(run[0], run[-1] + 1, starts[run[0]], starts[run[-1] + 1]) for run in runs]


def around_whole_sequences(
    lengths: list[int],
    opened: set[int],
    chunk_rows: int,
    late: Late,
    buffers: Buffers,
    deferred: list[Told],
    recomputed: list[Told],
) -> list[Chunk]:
    """Chunks that end where sequences end, of the sequences that are not open. Deferred sequences come first, one after
    another, so that at most one dW is kept apart at a time."""
    ahead: list[Chunk] = []
    chunks: list[Chunk] = []
    for begin, end, start, _ in _runs(lengths, set(range(len(lengths))) - opened):
        first, stop = begin, start  # the chunk in the making: sequences [first, i), rows [start, stop)
        for i in range(begin, end):
            length = lengths[i]
            if start < stop and stop + length - start > chunk_rows:
                chunks.append(Chunk(start, stop, Task.CLOSE, (first, i)))
                first, start = i, stop
            stop += length
            if length <= chunk_rows:
                continue
            last_chunk = stop - chunk_rows
            task, why = late(length - chunk_rows, buffers(i, length - chunk_rows))
            (deferred if task is Task.DEFER else recomputed).append(
                (i, f"{_about(length, length - chunk_rows)}; {why}")
            )
            early = even_chunks(start, last_chunk, chunk_rows, task, (i, i + 1))
            last = [Chunk(last_chunk, stop, Task.CLOSE, (i, i + 1))]
            if task is Task.DEFER:
                ahead += early + last
            else:
                scored = [replace(chunk, task=Task.SCORE) for chunk in early]
                chunks += scored + last + early
            first, start = i + 1, stop
        if start < stop:
            chunks.append(Chunk(start, stop, Task.CLOSE, (first, end)))
    return ahead + chunks


def around_the_exchange(
    lengths: list[int],
    opened: set[int],
    chunk_rows: int,
    late: Late,
    buffers: Buffers,
    deferred: list[Told],
    recomputed: list[Told],
) -> list[Chunk]:
    """Chunks of the open sequences, before and after the exchange. One chunk's number of rows is kept in the buffer
    until the exchange. The rows before them are deferred, by whole sequences, or recomputed."""
    before: list[Chunk] = []
    apart: set[int] = set()
    rest = sum(lengths[i] for i in opened)
    why = ""
    for i in sorted(opened, key=lambda i: -lengths[i]):
        if rest <= chunk_rows:
            break
        early = min(lengths[i], rest - chunk_rows)
        task, why = late(early, buffers(i, lengths[i]), len(apart))
        if task is Task.RECOMPUTE:
            break
        deferred.append((i, f"{_about(lengths[i], early)}, open on other ranks; {why}"))
        for first, last, start, stop in _runs(lengths, {i}):
            before += even_chunks(start, stop, chunk_rows, Task.DEFER, (first, last))
        apart.add(i)
        rest -= lengths[i]

    early = max(0, rest - chunk_rows)
    kept, again = [], []
    for first, last, start, stop in _runs(lengths, opened - apart):
        cut = min(stop, start + early)  # rows from here on are kept in the buffer
        early -= cut - start
        kept += even_chunks(cut, stop, chunk_rows, Task.KEEP, (first, last))
        again += even_chunks(start, cut, chunk_rows, Task.RECOMPUTE, (first, last))
        for i in range(first, last):
            if start < cut and lengths[i]:
                rows = min(lengths[i], cut - start)
                recomputed.append((i, f"{_about(lengths[i], rows)}, open on other ranks; {why}"))
            start += lengths[i]
    scored = [replace(chunk, task=Task.SCORE) for chunk in again]
    return [*before, *scored, *kept, Chunk(0, 0, Task.EXCHANGE, (0, len(lengths))), *again]


def _about(length: int, early: int) -> str:
    return f"{length:,} rows, {early:,} of them before the last chunk"


def even_chunks(start: int, stop: int, chunk_rows: int, task: Task, sequences: tuple[int, int]) -> list[Chunk]:
    """Chunks of about equal size, of rows [start, stop)."""
    count = math.ceil((stop - start) / chunk_rows)
    edges = [start + (stop - start) * k // count for k in range(count + 1)] if count else []
    return [Chunk(a, b, task, sequences) for a, b in itertools.pairwise(edges)]
