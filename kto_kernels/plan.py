"""How a loss from hidden states is cut into chunks of rows, and what that costs: memory, GEMMs, and why.

One GEMM unit is `G = 2·N·H·V` FLOPs: the head once over the N scored rows. A chunk is some scored rows × the whole
vocabulary. Gradients of the head need each row's coefficient, which is known once the row's whole *sequence* is scored;
so a sequence stays inside a chunk where it fits, and a longer one is deferred or recomputed. Where a sequence's tokens
are spread over ranks (context parallel), its coefficient is known after an exchange: its rows come last before it, and
those of the last chunk wait where they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch

LONG_SEQUENCES = ("auto", "defer", "recompute")

# Machine balance: FLOPs of a GEMM in the time of one byte from memory. It steers the automatic choices and no result.
_BALANCE = {"cpu": {"half": 48, "single": 16}, "cuda": {"half": 230, "single": 20}}
# A trained head reads and writes the whole fp32 dW for every chunk: `4·balance / C` of the chunk's GEMM. With C =
# 16·balance that is a quarter of a GEMM. Without a dW only the head itself is read, so less will do. Not below the rows
# that a GEMM needs to be efficient. needs_weight → (rows per balance, least rows)
_ROWS = {True: (16, 256), False: (4, 512)}
_ROWS_MULTIPLE = 128
# Ending a deferred sequence reads and writes dW and reads the second one: 12·V·H bytes, the time of 6·balance rows of a
# GEMM.
_DEFER_ROWS_PER_BALANCE = 6


class Task(Enum):
    """What is done with a chunk."""

    SCORE = "score"  # log-probabilities alone
    CLOSE = "close"  # its sequences end here: their coefficients are known, gradients are formed
    DEFER = "defer"  # part of a sequence that ends later: its gradient of the head is kept apart, unscaled
    KEEP = "keep"  # scored; its logits stay in the buffer until the exchange, then its gradients are formed
    EXCHANGE = "exchange"  # no rows: the ranks exchange their sequences' sums
    AGAIN = "again"  # the gradients of a part that was scored before, its logits computed once more


@dataclass(frozen=True)
class Chunk:
    start: int  # [start, stop) of the scored rows, in their order
    stop: int
    task: Task
    sequences: tuple[int, int]  # [first, last) of the sequences these rows belong to

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def forms(self) -> bool:
        """Whether gradients are made of it."""
        return self.task not in (Task.SCORE, Task.EXCHANGE)


@dataclass(frozen=True)
class LinearPlan:
    """The chunks of one pass from hidden states, and their cost. `print(plan)` says it in words.

    Attributes:
        rows, vocab, hidden: N scored rows, V, H.
        chunks: in the order of their work.
        deferred, recomputed: (sequence, why) of each sequence longer than a chunk, where the head is trained; and of
            those open on other ranks for which the last chunk before the exchange has no room.
        bytes: name → bytes of each buffer; `peak_bytes` is the most that exists at once, above the inputs.
        gemm_units: GEMMs in units of `2·N·H·V` FLOPs.
        weight_gradient_dtype: what dW accumulates in: fp32, or its own dtype where it is one product.
        buffer_rows: rows of the logits' buffer: the largest chunk's, or
        kept_rows: of those that stay there until the exchange, one chunk behind the other.
    """

    rows: int
    vocab: int
    hidden: int
    dtype: torch.dtype
    chunk_rows: int
    chunks: tuple[Chunk, ...]
    deferred: tuple[tuple[int, str], ...]
    recomputed: tuple[tuple[int, str], ...]
    bytes: dict[str, int]
    peak_bytes: int
    gemm_units: float
    weight_gradient_dtype: torch.dtype
    buffer_rows: int
    kept_rows: int

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        vocab: int,
        hidden: int,
        dtype: torch.dtype = torch.bfloat16,
        *,
        needs_hidden: bool = True,
        needs_weight: bool = True,
        needs_bias: bool = False,
        known_coefficients: bool = False,
        weight_dtype: torch.dtype | None = None,
        hidden_rows: int | None = None,
        hidden_dtype: torch.dtype | None = None,
        max_logits_bytes: int | None = None,
        long_sequences: str = "auto",
        open_sequences: Sequence[bool] | None = None,
        device: torch.device | str = "cuda",
        balance: float | None = None,
        widest: int | None = None,
    ) -> LinearPlan:
        """Plans one pass of the policy.

        Args:
            lengths: scored rows of each sequence (B,), on this rank.
            vocab, hidden, dtype: V, H, and the dtype that the GEMMs run in.
            needs_hidden, needs_weight, needs_bias: which gradients are formed; none of them: a forward-only pass.
            known_coefficients: every row's coefficient is known from the start (the backward of
                `linear_token_logps`), so that no sequence is too long.
            weight_dtype, hidden_dtype: of the tensors given, where not `dtype`.
            hidden_rows: rows of hidden states, with those that nothing scores (default: the scored ones).
            max_logits_bytes: the most bytes of logits that exist at once; None: chosen by the device's balance.
            long_sequences: "defer", "recompute", or "auto" for the faster of them, for each sequence longer than a
                chunk. Of several sequences open on other ranks, "auto" defers the longest alone, "defer" (each with a
                buffer of its own until the exchange) as many as leave the others room in one chunk.
            open_sequences: (B,) which sequences have tokens on other ranks too, whose coefficients wait for an exchange;
                None: there are no other ranks.
            device: its type sets the balance, FLOPs of a GEMM per byte of memory traffic, where none is given.
            widest: where `vocab` counts the columns of one rank of a vocabulary group, the most that one of them has:
                the chunks are those that suit it, the same on every rank.

        Raises:
            ValueError: `max_logits_bytes` holds not even one row of the vocabulary.
        """
        balance = _balance(torch.device(device), dtype) if balance is None else balance
        most = vocab if widest is None else widest
        row_bytes = most * dtype.itemsize

        def cut(chunk_rows: int, vocab: int = most) -> LinearPlan:
            return _cut(
                cls,
                list(lengths),
                vocab,
                hidden,
                dtype,
                needs_hidden,
                needs_weight,
                (needs_weight or needs_bias) and not known_coefficients,
                known_coefficients,
                dtype if weight_dtype is None else weight_dtype,
                sum(lengths) if hidden_rows is None else hidden_rows,
                dtype if hidden_dtype is None else hidden_dtype,
                chunk_rows,
                _late(needs_weight, long_sequences, balance),
                open_sequences,
                widest is not None,
            )

        if max_logits_bytes is not None:
            if max_logits_bytes < row_bytes:
                raise ValueError(
                    f"max_logits_bytes: expected at least {row_bytes} (one row of the vocabulary: {most} × "
                    f"{dtype.itemsize} bytes), got {max_logits_bytes}"
                )
            return cut(max_logits_bytes // row_bytes, vocab)
        per_balance, least = _ROWS[needs_weight]
        rows = max(least, math.ceil(per_balance * balance / _ROWS_MULTIPLE) * _ROWS_MULTIPLE)
        chosen = cut(rows)
        # Larger chunks where they cost no memory: with the longest sequence inside one there is no second dW, with
        # everything inside one no fp32 dW.
        for larger in sorted({max(lengths, default=0), sum(lengths)}):
            if larger > rows and (plan := cut(larger)).peak_bytes <= chosen.peak_bytes:
                chosen = plan
        return chosen if vocab == most else cut(chosen.chunk_rows, vocab)

    @property
    def flops(self) -> int:
        return round(self.gemm_units * 2 * self.rows * self.hidden * self.vocab)

    def messages(self, *, vocab: bool = False, context: int | None = None) -> list[tuple[str, int]]:
        """What a rank puts into the collectives of this pass, as (name, bytes), whatever the number of ranks is.

        Args:
            vocab: over the ranks of a vocabulary group: of each chunk three numbers a row, gathered, and the sum of the
                hidden states' gradient.
            context: over those of a context group, the sums of so many sequences.
        """
        sent = []
        if vocab:
            number = torch.promote_types(self.dtype, torch.float32).itemsize
            sent += [("all_gather", 3 * number * chunk.rows) for chunk in self.chunks if chunk.rows]
            if "hidden gradient" in self.bytes:
                row = self.hidden * self.dtype.itemsize
                sent += [("all_reduce", row * chunk.rows) for chunk in self.chunks if chunk.forms]
        if context is not None:
            sent.append(("all_reduce", 8 * context))
        return sent

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [
            f"LinearPlan: {self.rows:,} rows × V={self.vocab:,}, H={self.hidden:,}, {dtype}: "
            f"{sum(chunk.rows > 0 for chunk in self.chunks)} chunks of up to {self.chunk_rows:,} rows, "
            f"{self.gemm_units:.2f} G, {_size(self.peak_bytes)} at most"
        ]
        lines += [f"  {_size(size):>10}  {name}" for name, size in self.bytes.items()]
        for kind in ("deferred", "recomputed"):
            lines += [f"  sequence {i} {kind}: {why}" for i, why in getattr(self, kind)]
        if self.kept_rows:
            lines.append(
                f"  {self.kept_rows:,} rows wait in the logits' buffer for what the other ranks' tokens sum to"
            )
        return "\n".join(lines)


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _balance(device: torch.device, dtype: torch.dtype) -> float:
    return _BALANCE["cpu" if device.type == "cpu" else "cuda"]["half" if dtype.itemsize == 2 else "single"]


def _cut(
    cls, lengths, vocab, hidden, dtype, needs_hidden, needs_weight, bound, known_coefficients, weight_dtype,
    hidden_rows, hidden_dtype, chunk_rows, late, open_sequences, sharded
) -> LinearPlan:  # fmt: skip
    """The plan with chunks of `chunk_rows`; `bound` where sequences must stay together."""
    deferred: list[tuple[int, str]] = []
    recomputed: list[tuple[int, str]] = []
    heads = 1  # gradients of the head at once
    if bound:
        spread = {i for i, length in enumerate(lengths) if length and open_sequences and open_sequences[i]}
        chunks = []
        if alone := _whole_sequences(lengths, spread, chunk_rows, late, deferred, recomputed):
            heads += len(deferred) > 1
        if open_sequences is not None:
            chunks = _open_sequences(lengths, spread, chunk_rows, late, deferred, recomputed)
            heads = max(heads, bool(alone) + sum(i in spread for i, _ in deferred))
        chunks = alone + chunks
    else:
        task = Task.AGAIN if known_coefficients else Task.CLOSE if needs_hidden else Task.SCORE
        chunks = _even_chunks(0, sum(lengths), chunk_rows, task, (0, len(lengths)))

    size = dtype.itemsize
    kept = sum(chunk.rows for chunk in chunks if chunk.task is Task.KEEP)
    most = max((chunk.rows for chunk in chunks), default=0)
    formed = [chunk for chunk in chunks if chunk.forms]
    # One product needs no fp32 sum. (An fp16 head's gradient stays fp32 until it is scaled up against underflow.)
    once = len(formed) == 1 and weight_dtype == dtype != torch.float16
    gradient_dtype = dtype if once else torch.promote_types(dtype, torch.float32)
    sizes = {"logits": max(kept, most) * vocab * size, "chunk of hidden": most * hidden * size}
    if weight_dtype != dtype:
        sizes["head in the GEMMs' dtype"] = vocab * hidden * size
    if needs_hidden and sharded:
        sizes["chunk of hidden gradient"] = most * hidden * size  # under way between the ranks
    if needs_hidden:
        sizes["hidden gradient"] = hidden_rows * hidden * hidden_dtype.itemsize
    if needs_weight:
        sizes["weight gradient"] = vocab * hidden * gradient_dtype.itemsize
        if heads > 1:
            sizes["deferred weight gradient"] = (heads - 1) * vocab * hidden * gradient_dtype.itemsize
    peak = sum(sizes.values())
    if needs_weight and weight_dtype != gradient_dtype:
        sizes["rounded weight gradient"] = vocab * hidden * weight_dtype.itemsize  # when the chunks' buffers are gone
        left = ("hidden gradient", "weight gradient", "rounded weight gradient")
        peak = max(peak, sum(sizes.get(name, 0) for name in left))
    rows = sum(lengths)
    products = sum(chunk.rows for chunk in chunks) + sum(chunk.rows for chunk in formed) * (needs_hidden + needs_weight)
    return cls(
        rows=rows,
        vocab=vocab,
        hidden=hidden,
        dtype=dtype,
        chunk_rows=chunk_rows,
        chunks=tuple(chunks),
        deferred=tuple(deferred),
        recomputed=tuple(recomputed),
        bytes=sizes,
        peak_bytes=peak,
        gemm_units=products / rows if rows else 0.0,
        weight_gradient_dtype=gradient_dtype,
        buffer_rows=max(kept, most),
        kept_rows=kept,
    )


def _late(needs_weight: bool, long_sequences: str, balance: float) -> Callable[..., tuple[Task, str]]:
    """(rows in front of a last chunk, gradients of the head kept apart already) → (the Task of the rows, why)."""

    def late(early: int, apart: int = 0) -> tuple[Task, str]:
        if long_sequences != "auto":
            return Task.DEFER if long_sequences == "defer" else Task.AGAIN, f"long_sequences={long_sequences!r}"
        if apart:
            return Task.AGAIN, "another is deferred, and each would take a dW of its own"
        if not needs_weight:
            return Task.DEFER, "a second bias gradient costs nothing"
        worth = round(_DEFER_ROWS_PER_BALANCE * balance)
        if early < worth:
            return Task.AGAIN, f"a pass over a second dW would cost as much as {worth:,} rows"
        return Task.DEFER, f"a pass over a second dW costs only as much as {worth:,} rows"

    return late


def _runs(lengths, chosen: set[int]) -> list[tuple[int, int, int, int]]:
    """Neighbours among the chosen sequences: (first, last, start, stop), sequences [first, last) on rows [start, stop).
    A sequence without rows parts none."""
    starts = [0, *itertools.accumulate(lengths)]
    filled = (i for i, length in enumerate(lengths) if length)
    runs = [list(run) for taken, run in itertools.groupby(filled, key=chosen.__contains__) if taken]
    return [(run[0], run[-1] + 1, starts[run[0]], starts[run[-1] + 1]) for run in runs]


def _whole_sequences(lengths, spread, chunk_rows, late, deferred, recomputed) -> list[Chunk]:
    """Chunks that end where sequences do, of those that are not spread over ranks. Deferred sequences come first, one
    after another: of the dW that is kept apart there is never more than one, and the first needs no other beside it."""
    ahead: list[Chunk] = []
    chunks: list[Chunk] = []
    for begin, end, start, _ in _runs(lengths, set(range(len(lengths))) - spread):
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
            task, why = late(length - chunk_rows)
            (deferred if task is Task.DEFER else recomputed).append(
                (i, f"{_about(length, length - chunk_rows)}; {why}")
            )
            early = _even_chunks(start, last_chunk, chunk_rows, task, (i, i + 1))
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


def _open_sequences(lengths, spread, chunk_rows, late, deferred, recomputed) -> list[Chunk]:
    """Chunks around the exchange, of the sequences that are spread over ranks. As many rows as one chunk has wait for it
    in the buffer. Those before them are deferred, by whole sequences, or recomputed."""
    before: list[Chunk] = []
    apart: set[int] = set()
    rest = sum(lengths[i] for i in spread)
    why = ""
    for i in sorted(spread, key=lambda i: -lengths[i]):
        if rest <= chunk_rows:
            break
        early = min(lengths[i], rest - chunk_rows)
        task, why = late(early, len(apart))
        if task is Task.AGAIN:
            break
        deferred.append((i, f"{_about(lengths[i], early)}, open on other ranks; {why}"))
        for first, last, start, stop in _runs(lengths, {i}):
            before += _even_chunks(start, stop, chunk_rows, Task.DEFER, (first, last))
        apart.add(i)
        rest -= lengths[i]

    early = max(0, rest - chunk_rows)
    kept, again = [], []
    for first, last, start, stop in _runs(lengths, spread - apart):
        cut = min(stop, start + early)  # from here on they wait in the buffer
        early -= cut - start
        kept += _even_chunks(cut, stop, chunk_rows, Task.KEEP, (first, last))
        again += _even_chunks(start, cut, chunk_rows, Task.AGAIN, (first, last))
        for i in range(first, last):
            if start < cut and lengths[i]:
                rows = min(lengths[i], cut - start)
                recomputed.append((i, f"{_about(lengths[i], rows)}, open on other ranks; {why}"))
            start += lengths[i]
    scored = [replace(chunk, task=Task.SCORE) for chunk in again]
    return [*before, *scored, *kept, Chunk(0, 0, Task.EXCHANGE, (0, len(lengths))), *again]


def _about(length: int, early: int) -> str:
    return f"{length:,} rows, {early:,} of them before the last chunk"


def _even_chunks(start: int, stop: int, chunk_rows: int, task: Task, sequences: tuple[int, int]) -> list[Chunk]:
    """Chunks of about equal size over rows [start, stop)."""
    count = math.ceil((stop - start) / chunk_rows)
    edges = [start + (stop - start) * k // count for k in range(count + 1)] if count else []
    return [Chunk(a, b, task, sequences) for a, b in itertools.pairwise(edges)]
