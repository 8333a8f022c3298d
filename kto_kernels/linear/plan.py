"""How a loss from hidden states is cut into chunks of rows, and what the chunks cost in memory and GEMMs.

One GEMM unit is `G = 2·N·H·V` FLOPs: the head once over the N scored rows. A chunk is some scored rows × the whole
vocabulary. Gradients of the head need each row's coefficient `∂loss/∂ℓ_n`, which is known once the row's whole
*sequence* is scored. A sequence therefore stays inside a chunk where it fits. A longer sequence is deferred (an
unscaled gradient of the head is kept apart until the coefficient is known) or recomputed (the sequence's logits are
computed once more when the coefficient is known). A sequence is open where some of its tokens are on other ranks
(context parallel): its coefficient is known after the ranks exchange their sums. The rows of open sequences are scored
last before this exchange, and one chunk of their logits is kept until the exchange is over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from . import schedule
from .schedule import Chunk, Task

# How the coefficients of a pair's members depend on each other, see `LinearPlan.of`.
Pairing: TypeAlias = Literal["margin", "both"]

# Machine balance: FLOPs of a GEMM in the time of one byte from memory. It steers the automatic choices and changes no
# result.
_BALANCE = {"cpu": {"half": 48, "single": 16}, "cuda": {"half": 230, "single": 20}}
# With a trained head every chunk of C rows reads and writes the whole fp32 dW, which takes `4·balance / C` of the
# chunk's GEMM: 0.22 with C = 17.8·balance, which is 4096 rows in bf16 on a GPU. Without a dW only the head is read, and
# fewer rows will do. A GEMM needs the least rows to be efficient. needs_weight → (rows per balance, least rows)
_ROWS = {True: (17.8, 256), False: (4, 512)}
# On a GPU a trained head's chunks grow to this many rows per column of the hidden states, at most to twice the rows
# above: in bf16 their logits are then as large as the fp32 dW, and the sums of dW cost half as much.
_ROWS_PER_HIDDEN = 2
# How much more memory a plan may take for having fewer chunks: their sums of dW are read and written less often.
_GROWTH = 1.1
_ROWS_MULTIPLE = 128


@dataclass(frozen=True)
class LinearPlan:
    """The chunks of one pass from hidden states, and their cost. `print(plan)` says it in words.

    Attributes:
        rows: N, the scored rows.
        vocab: V, the columns of the head on this rank.
        hidden: H, the width of the hidden states.
        dtype: the dtype that the GEMMs run in.
        chunk_rows: the most rows that a chunk has.
        chunks: the chunks, in the order of their work.
        deferred: (sequence, why) of each sequence that is deferred.
        recomputed: (sequence, why) of each sequence that is recomputed, wholly or in part.
        bytes: name → bytes of each buffer.
        peak_bytes: the most bytes of buffers that exist at once, beside the inputs.
        gemm_units: GEMMs in units of `2·N·H·V` FLOPs.
        weight_gradient_dtype: the dtype in which dW is summed: fp32, or the head's dtype where dW is one product.
        buffer_rows: rows of the logits' buffer, which holds the largest chunk, or all kept rows.
        kept_rows: rows whose logits stay in the buffer until the exchange.
        pairs: as given to `LinearPlan.of`. Where it is not None, a pair counts as one sequence in `chunks`, `deferred`
            and `recomputed`.
        adapter_rank: r, the rank of the adapter on the head; 0: there is none.
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
    pairs: Pairing | None = None
    adapter_rank: int = 0

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
        pairs: Pairing | None = None,
        device: torch.device | str = "cuda",
        balance: float | None = None,
        widest: int | None = None,
        adapter_rank: int = 0,
        needs_adapter: bool = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> LinearPlan:
        """Plans one pass of the policy.

        Args:
            lengths: scored rows of each of the B sequences, on this rank.
            vocab: V, the columns of the head on this rank.
            hidden: H, the width of the hidden states.
            dtype: the dtype that the GEMMs run in. bfloat16 is the usual one.
            needs_hidden: whether the gradient of the hidden states is formed.
            needs_weight: whether the gradient of the head's weight is formed.
            needs_bias: whether the gradient of the head's bias is formed. A pass without any gradient only scores.
            known_coefficients: whether every row's coefficient is known from the start, as in the backward of
                `linear_token_logps`; then no sequence is too long. False: a coefficient is known when its sequence is
                scored.
            weight_dtype: the dtype of the weight given. None: `dtype`.
            hidden_rows: rows of the hidden states given, unscored ones included. None: the scored rows.
            hidden_dtype: the dtype of the hidden states given. None: `dtype`.
            max_logits_bytes: the most bytes of logits that exist at once. None: the balance decides.
            long_sequences: "defer", "recompute", or "auto" for the faster of the two, for each sequence longer than a
                chunk. If the open sequences do not all fit into one chunk, "defer" defers as many as leave the others
                room in one chunk; each has a buffer of its own. "auto" does the same where the weight's gradient is not
                formed, as the buffers are small then, and otherwise defers at most the longest of them.
            open_sequences: for each of the B sequences, whether it has tokens on other ranks too. None: there are no
                other ranks.
            pairs: how the members of a pair depend on each other, where neighbours among the B sequences are pairs
                whose log-probabilities must be known together; the plan then takes each pair for one sequence.
                "margin": one number gives the coefficients of both members, so a deferred pair takes one buffer, as in
                DPO; "both": two numbers, so it takes a buffer for each member that has deferred rows, as with a negative
                log-likelihood. None: each sequence has a coefficient of its own.
            device: the device, whose type sets the balance where none is given.
            balance: FLOPs of a GEMM in the time of one byte from memory. None: a typical number for the device type.
            widest: the most columns that a rank of the vocabulary group has. Chunks are cut for this rank, so that they
                are the same on every rank. None: there is no vocabulary group.
            adapter_rank: r, the rank of an adapter (LoRA) on the head. 0: there is none.
            needs_adapter: whether the gradients of the adapter's A and B are formed. Without an adapter it says nothing.
            adapter_dtype: the dtype of A and B as they are given. None: `dtype`.

        Returns:
            The plan. It depends on nothing but these arguments: no device is touched.

        Raises:
            ValueError: `max_logits_bytes` does not hold even one row of the vocabulary.

        Examples:
            >>> from kto_kernels import LinearPlan
            >>> plan = LinearPlan.of([100, 300, 200], vocab=32000, hidden=4096, max_logits_bytes=2**26)
            >>> plan.rows, plan.chunk_rows, plan.gemm_units
            (600, 1048, 3.0)
        """
        device = torch.device(device)
        balance = _balance(device, dtype) if balance is None else balance
        if pairs is not None and len(lengths) % 2:
            raise ValueError(f"lengths: expected an even number of sequences with pairs={pairs!r}, got {len(lengths)}")
        lengths, chosen_lengths = list(lengths), None
        if pairs is not None:
            chosen_lengths = lengths[::2] if pairs == "both" else None
            lengths = [sum(pair) for pair in zip(lengths[::2], lengths[1::2])]
            if open_sequences is not None:
                open_sequences = [any(pair) for pair in zip(open_sequences[::2], open_sequences[1::2])]
        most = vocab if widest is None else widest
        row_bytes = most * dtype.itemsize
        adapter = (adapter_rank, bool(adapter_rank and needs_adapter), adapter_dtype or dtype)

        def cut(chunk_rows: int, vocab: int = most) -> LinearPlan:
            return _cut(
                cls, lengths, pairs, chosen_lengths, vocab, hidden, dtype, needs_hidden, needs_weight,
                (needs_weight or needs_bias or adapter[1]) and not known_coefficients, known_coefficients,
                dtype if weight_dtype is None else weight_dtype, sum(lengths) if hidden_rows is None else hidden_rows,
                dtype if hidden_dtype is None else hidden_dtype, chunk_rows,
                schedule.late(needs_weight, long_sequences, balance), open_sequences, widest is not None,
                *adapter,
            )  # fmt: skip

        if max_logits_bytes is not None:
            if max_logits_bytes < row_bytes:
                raise ValueError(
                    f"max_logits_bytes: expected at least {row_bytes} (one row of the vocabulary: {most} × "
                    f"{dtype.itemsize} bytes), got {max_logits_bytes}"
                )
            return cut(max_logits_bytes // row_bytes, vocab)
        per_balance, least = _ROWS[needs_weight]
        rows = max(least, math.ceil(per_balance * balance / _ROWS_MULTIPLE) * _ROWS_MULTIPLE)
        if needs_weight and device.type != "cpu":
            rows = max(rows, min(_ROWS_PER_HIDDEN * hidden, 2 * rows))
        chosen = cut(rows)
        # Larger chunks are taken where they cost little memory: where a chunk holds the longest sequence there is no
        # second dW, and where one chunk holds all rows there is no fp32 dW.
        most_bytes = chosen.peak_bytes * (_GROWTH if needs_weight else 1)
        for larger in sorted({max(lengths, default=0), sum(lengths)}):
            if larger > rows and (plan := cut(larger)).peak_bytes <= most_bytes:
                chosen = plan
        return chosen if vocab == most else cut(chosen.chunk_rows, vocab)

    @property
    def flops(self) -> int:
        """The FLOPs of all GEMMs: `gemm_units · 2·N·H·V`."""
        return round(self.gemm_units * 2 * self.rows * self.hidden * self.vocab)

    def messages(self, *, vocab: bool = False, context: int | None = None) -> list[tuple[str, int]]:
        """The (name, bytes) of each message that a rank puts into the collectives of this pass. They do not depend on
        the number of ranks.

        Args:
            vocab: whether to list the messages in a vocabulary group: for each chunk three numbers a row, gathered, and
                the hidden states' gradient, summed; for a trained adapter the gradient of A besides, summed once. False:
                there is no such group.
            context: the number of sequences whose sums are exchanged in a context group. None: there is no such group.

        Returns:
            The messages in the order in which they are sent, each with the name of its collective.
        """
        sent = []
        if vocab:
            number = torch.promote_types(self.dtype, torch.float32).itemsize
            sent += [("all_gather", 3 * number * chunk.rows) for chunk in self.chunks if chunk.rows]
            if "hidden gradient" in self.bytes:
                row = self.hidden * self.dtype.itemsize
                sent += [("all_reduce", row * chunk.rows) for chunk in self.chunks if chunk.forms]
            if "adapter gradient" in self.bytes and self.rows:
                sent.append(("all_reduce", number * self.adapter_rank * self.hidden))
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
        unit = "sequence" if self.pairs is None else "pair"
        for kind in ("deferred", "recomputed"):
            lines += [f"  {unit} {i} {kind}: {why}" for i, why in getattr(self, kind)]
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
    cls, lengths, pairs, chosen_lengths, vocab, hidden, dtype, needs_hidden, needs_weight, bound, known_coefficients,
    weight_dtype, hidden_rows, hidden_dtype, chunk_rows, late, open_sequences, sharded, rank, needs_adapter,
    adapter_dtype
) -> LinearPlan:  # fmt: skip
    """The plan with chunks of `chunk_rows`; `bound` says that rows wait for their sequence's coefficient, and
    `chosen_lengths` are given where a sequence is a pair whose members have coefficients of their own."""
    deferred: list[tuple[int, str]] = []
    recomputed: list[tuple[int, str]] = []
    heads = 1  # gradients of the head at once

    def buffers(i: int, early: int) -> int:
        if chosen_lengths is None:
            return 1
        return (min(early, chosen_lengths[i]) > 0) + (early > chosen_lengths[i])

    if bound:
        opened = {i for i, length in enumerate(lengths) if length and open_sequences and open_sequences[i]}
        chunks = []
        how = (lengths, opened, chunk_rows, late, buffers, deferred, recomputed)
        alone = schedule.around_whole_sequences(*how)
        # The gradient kept apart of the first deferred sequence becomes the sum.
        heads = max([1, *(buffers(i, lengths[i] - chunk_rows) + (k > 0) for k, (i, _) in enumerate(deferred))])
        if open_sequences is not None:
            chunks = schedule.around_the_exchange(*how)
            heads = max(heads, bool(alone) + sum(buffers(i, lengths[i]) for i, _ in deferred if i in opened))
        chunks = alone + chunks
    else:
        task = Task.RECOMPUTE if known_coefficients else Task.CLOSE if needs_hidden else Task.SCORE
        chunks = schedule.even_chunks(0, sum(lengths), chunk_rows, task, (0, len(lengths)))

    size = dtype.itemsize
    kept = sum(chunk.rows for chunk in chunks if chunk.task is Task.KEEP)
    most = max((chunk.rows for chunk in chunks), default=0)
    formed = [chunk for chunk in chunks if chunk.forms]
    # One product needs no fp32 sum. (An fp16 head's gradient stays fp32 until GradScaler's factor has multiplied it.)
    once = len(formed) == 1 and weight_dtype == dtype != torch.float16
    gradient_dtype = dtype if once else torch.promote_types(dtype, torch.float32)
    sizes = {"logits": max(kept, most) * vocab * size, "chunk of hidden": most * hidden * size}
    if weight_dtype != dtype:
        sizes["head in the GEMMs' dtype"] = vocab * hidden * size
    if rank:
        sizes["chunk of adapter products"] = (1 + needs_adapter) * most * rank * size
        if adapter_dtype != dtype:
            sizes["adapter in the GEMMs' dtype"] = rank * (hidden + vocab) * size
    if needs_hidden and sharded:
        sizes["chunk of hidden gradient"] = most * hidden * size  # under way between the ranks
    if needs_hidden:
        sizes["hidden gradient"] = hidden_rows * hidden * hidden_dtype.itemsize
    if needs_weight:
        sizes["weight gradient"] = vocab * hidden * gradient_dtype.itemsize
        if heads > 1:
            sizes["deferred weight gradient"] = (heads - 1) * vocab * hidden * gradient_dtype.itemsize
    if needs_adapter:
        sums = rank * (hidden + vocab) * torch.promote_types(dtype, torch.float32).itemsize
        sizes["adapter gradient"] = sums
        if heads > 1:
            sizes["deferred adapter gradient"] = (heads - 1) * sums
    peak = sum(sizes.values())
    if needs_weight and weight_dtype != gradient_dtype:
        sizes["rounded weight gradient"] = vocab * hidden * weight_dtype.itemsize  # when the chunks' buffers are gone
        left = ("hidden gradient", "weight gradient", "rounded weight gradient")
        peak = max(peak, sum(sizes.get(name, 0) for name in left))
    rows = sum(lengths)
    scored_rows, formed_rows = (sum(chunk.rows for chunk in some) for some in (chunks, formed))
    products = scored_rows + formed_rows * (needs_hidden + needs_weight)
    if rank:  # products with A have H columns, and those with B have V
        with_a = scored_rows + formed_rows * (needs_hidden + 2 * needs_adapter)
        with_b = scored_rows + formed_rows * ((needs_hidden or needs_adapter) + needs_adapter)
        products += rank * (with_a / max(1, vocab) + with_b / hidden)
    return cls(
        rows=rows, vocab=vocab, hidden=hidden, dtype=dtype, chunk_rows=chunk_rows, chunks=tuple(chunks),
        deferred=tuple(deferred), recomputed=tuple(recomputed), bytes=sizes, peak_bytes=peak,
        gemm_units=products / rows if rows else 0.0, weight_gradient_dtype=gradient_dtype, buffer_rows=max(kept, most),
        kept_rows=kept, pairs=pairs, adapter_rank=rank,
    )  # fmt: skip
