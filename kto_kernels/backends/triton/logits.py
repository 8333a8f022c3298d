"""The Triton kernels for logits: one program scores one row, or one share of a row where rows are few.

    token_logps_kernel       logits → token log-probabilities
    forward_kernel           up to four sets of logits → the loss and every other result; the program that finishes
                             the last row sums the sequences and computes the loss
    logits_backward_kernel   logits → their gradient, which may overwrite them

The kernels are not specialised on run-time values. A tensor that is absent is None, which is known at compile time.
"""

# No `from __future__ import annotations`: Triton reads the parameters' annotations.
import triton.language as tl

from .row import (
    BYTES,
    IGNORED,
    edge_positions,
    find_row,
    kernel,
    offset,
    place,
    score_row,
    sequence_of,
    share_of_tiles,
    tile_lanes,
    widen,
    write_gradient,
)
from .sequences import reference_point, sum_models, value_and_loss

# Stage token_logps ────────────────────────────────────────────────────────────────────────────────────────────────────


@kernel
def token_logps_kernel(
    logits,  # (B, T, V) or (N, V)
    logits_stride_b: tl.int64,
    logits_stride_t: tl.int64,
    labels,  # (B, T) or (N,)
    labels_stride_b: tl.int64,
    labels_stride_t: tl.int64,
    cu_seqlens,  # (B + 1,) or None
    n_rows: tl.int32,
    n_sequences: tl.int32,
    tokens: tl.int32,
    vocab: tl.int32,
    ignore_index: tl.int64,
    inner: tl.float32,
    outer: tl.float64,
    rate: tl.float32,
    logps,  # (N,)
    statistics,  # (2, N)
    shares,  # (N, splits, 2): the statistics of each share, where rows are split
    arrivals,  # (1 + N,) counters, 0 before and after; used where rows are split
    splits: tl.int32,
    SHIFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    program = tl.program_id(0)
    n = program // splits
    row, label = find_row(
        n, logits, logits_stride_b, logits_stride_t, labels, labels_stride_b, labels_stride_t, cu_seqlens, n_sequences,
        tokens, vocab, ignore_index, SHIFT
    )  # fmt: skip
    logp, row_origin, row_sum, finished = score_row(
        row, label, n, program % splits, splits, vocab, inner, outer, rate, shares, arrivals,
        SOFTCAP, MAX_SPLITS, UNROLL, THREADS, VECTOR
    )  # fmt: skip
    if finished:
        tl.store(logps + n, logp.to(tl.float32))
        tl.store(statistics + n, row_origin)
        tl.store(statistics + n_rows + n, row_sum)


# The whole loss ───────────────────────────────────────────────────────────────────────────────────────────────────────


@kernel
def forward_kernel(
    logits,  # (B, T, V) or (N, V), as ref_logits
    logits_stride_b: tl.int64,
    logits_stride_t: tl.int64,
    ref_logits,  # None: ref_sums are given
    ref_logits_stride_b: tl.int64,
    ref_logits_stride_t: tl.int64,
    labels,  # (B, T) or (N,)
    labels_stride_b: tl.int64,
    labels_stride_t: tl.int64,
    cu_seqlens,  # (B + 1,) or None
    n_rows: tl.int32,
    n_sequences: tl.int32,
    tokens: tl.int32,
    kl_logits,  # (K, T', V) or (N', V), as ref_kl_logits; None: kl_sums are given
    kl_logits_stride_b: tl.int64,
    kl_logits_stride_t: tl.int64,
    ref_kl_logits,  # None: ref_kl_sums are given
    ref_kl_logits_stride_b: tl.int64,
    ref_kl_logits_stride_t: tl.int64,
    kl_labels,  # (K, T') or (N',)
    kl_labels_stride_b: tl.int64,
    kl_labels_stride_t: tl.int64,
    kl_cu_seqlens,  # (K + 1,) or None
    kl_n_rows: tl.int32,
    kl_n_sequences: tl.int32,
    kl_tokens: tl.int32,
    vocab: tl.int32,
    ignore_index: tl.int64,
    inner: tl.float32,
    outer: tl.float64,
    rate: tl.float32,
    desirable,  # (B,) bool
    desirable_stride: tl.int64,
    ref_sums,  # (B,) given, or written from ref_logits; None: reference-free
    ref_sums_stride: tl.int64,
    kl_sums,  # (K,) given, or written from kl_logits; None: kl or kl_value is z0
    kl_sums_stride: tl.int64,
    ref_kl_sums,  # (K,) given, or written from ref_kl_logits; or None
    ref_kl_sums_stride: tl.int64,
    kl,  # (); None: kl_value is z0
    kl_value: tl.float64,
    beta: tl.float64,
    desirable_weight: tl.float64,
    undesirable_weight: tl.float64,
    loss,  # () or (B,)
    logps,  # (B,)
    ref_logps,  # (B,)
    rewards,  # (B,)
    z0,  # ()
    coefficients,  # (B,)
    token_logps,  # (N,)
    statistics,  # (2, N)
    other_logps,  # the token log-probabilities of the other sets, one set behind the other
    scored,  # (N + N',) with AVERAGE: 1 where a label scores the row, else 0
    counts,  # (B,) with AVERAGE: scored tokens
    kl_counts,  # (K,) with AVERAGE and KL logits: scored tokens
    shares,  # (rows of all sets, splits, 2): the statistics of each share, where rows are split
    arrivals,  # (1 + rows of all sets,) counters, 0 before and after; all but the first used where rows are split
    splits: tl.int32,
    SHIFT: tl.constexpr,
    AVERAGE: tl.constexpr,
    REDUCTION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # The row's number among the rows of all sets: first the policy's, then ref_logits', kl_logits', ref_kl_logits'.
    number = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    all_rows = n_rows
    if ref_logits is not None:
        all_rows += n_rows
    first_kl = all_rows
    if kl_logits is not None:
        all_rows += kl_n_rows
    first_ref_kl = all_rows
    if ref_kl_logits is not None:
        all_rows += kl_n_rows

    row = logits
    label = number * 0 - 1
    if number < first_kl:
        n = number
        stride_b = logits_stride_b
        stride_t = logits_stride_t
        if ref_logits is not None:
            if number >= n_rows:
                row = ref_logits
                n = number - n_rows
                stride_b = ref_logits_stride_b
                stride_t = ref_logits_stride_t
        row, label = find_row(
            n, row, stride_b, stride_t, labels, labels_stride_b, labels_stride_t, cu_seqlens, n_sequences, tokens,
            vocab, ignore_index, SHIFT
        )  # fmt: skip
    if kl_logits is not None:
        if (number >= first_kl) & (number < first_ref_kl):
            row, label = find_row(
                number - first_kl, kl_logits, kl_logits_stride_b, kl_logits_stride_t, kl_labels, kl_labels_stride_b,
                kl_labels_stride_t, kl_cu_seqlens, kl_n_sequences, kl_tokens, vocab, ignore_index, SHIFT
            )  # fmt: skip
    if ref_kl_logits is not None:
        if (number >= first_ref_kl) & (number < all_rows):
            row, label = find_row(
                number - first_ref_kl, ref_kl_logits, ref_kl_logits_stride_b, ref_kl_logits_stride_t, kl_labels,
                kl_labels_stride_b, kl_labels_stride_t, kl_cu_seqlens, kl_n_sequences, kl_tokens, vocab, ignore_index,
                SHIFT
            )  # fmt: skip

    logp, row_origin, row_sum, finished = score_row(
        row, label, number, split, splits, vocab, inner, outer, rate, shares, arrivals,
        SOFTCAP, MAX_SPLITS, UNROLL, THREADS, VECTOR
    )  # fmt: skip
    if finished:
        if number < n_rows:
            tl.store(token_logps + number, logp.to(tl.float32))
            tl.store(statistics + number, row_origin)
            tl.store(statistics + n_rows + number, row_sum)
        if other_logps is not None:
            if (number >= n_rows) & (number < all_rows):
                tl.store(other_logps + (number - n_rows), logp.to(tl.float32))
        if AVERAGE:
            if number < n_rows:
                tl.store(scored + number, (label >= 0).to(tl.float32))
            elif (number >= first_kl) & (number < first_kl + kl_n_rows):
                # Where a reference scores the KL rows too, the same labels score them: one program writes it.
                tl.store(scored + n_rows + (number - first_kl), (label >= 0).to(tl.float32))
    tl.debug_barrier()  # all threads have stored their results before the counter says so
    last = finished
    if finished:
        # Without any row there is still one program, which does the stages of the (empty) sequences.
        last = tl.atomic_add(arrivals, 1, sem="acq_rel") == tl.maximum(all_rows, 1) - 1
    if last:
        tl.store(arrivals, 0)
        kl_others = other_logps
        kl_scored = scored
        if AVERAGE:
            kl_scored = scored + n_rows
        if other_logps is not None:
            kl_others = other_logps + (first_kl - n_rows)
        if ref_logits is None:
            sum_models(token_logps, logps, None, None, scored, counts, cu_seqlens, n_rows, n_sequences, tokens)
        else:
            sum_models(
                token_logps, logps, other_logps, ref_sums, scored, counts, cu_seqlens, n_rows, n_sequences, tokens
            )
        if kl_logits is not None and ref_kl_logits is not None:
            sum_models(
                kl_others, kl_sums, kl_others + kl_n_rows, ref_kl_sums, kl_scored, kl_counts, kl_cu_seqlens, kl_n_rows,
                kl_n_sequences, kl_tokens
            )  # fmt: skip
        elif kl_logits is not None:
            sum_models(
                kl_others, kl_sums, None, None, kl_scored, kl_counts, kl_cu_seqlens, kl_n_rows, kl_n_sequences,
                kl_tokens
            )  # fmt: skip
        elif ref_kl_logits is not None:
            sum_models(
                kl_others, ref_kl_sums, None, None, kl_scored, kl_counts, kl_cu_seqlens, kl_n_rows, kl_n_sequences,
                kl_tokens
            )  # fmt: skip
        if kl_sums is not None:
            point = reference_point(kl_sums, kl_sums_stride, ref_kl_sums, ref_kl_sums_stride, kl_n_sequences, 128)
        elif kl is not None:
            point = widen(tl.load(kl))
        else:
            point = tl.full((), kl_value, tl.float64)
        point = tl.where(point < 0.0, 0.0, point)  # NaN stays NaN
        tl.store(z0, point.to(tl.float32))
        value_and_loss(
            logps, ref_sums, ref_sums_stride, desirable, desirable_stride, counts, point, n_sequences,
            tl.full((), beta, tl.float64), tl.full((), desirable_weight, tl.float64),
            tl.full((), undesirable_weight, tl.float64), loss, ref_logps, rewards, coefficients,
            REDUCTION, AVERAGE, 128
        )  # fmt: skip


# The gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@kernel
def logits_backward_kernel(
    logits,  # (B, T, V) or (N, V)
    logits_stride_b: tl.int64,
    logits_stride_t: tl.int64,
    labels,  # (B, T) or (N,)
    labels_stride_b: tl.int64,
    labels_stride_t: tl.int64,
    cu_seqlens,  # (B + 1,) or None
    n_rows: tl.int32,
    n_sequences: tl.int32,
    tokens: tl.int32,
    vocab: tl.int32,
    ignore_index: tl.int64,
    inner: tl.float64,
    outer: tl.float64,
    rate: tl.float32,
    grad,  # like labels; with coefficients: (B,) or (), read as (B, 1)
    grad_stride_b: tl.int64,
    grad_stride_t: tl.int64,
    coefficients,  # (B,) or None
    token_logps,  # (N,)
    statistics,  # (2, N)
    out,  # like logits
    out_stride_b: tl.int64,
    out_stride_t: tl.int64,
    splits: tl.int32,
    SHIFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    n = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    row, label = find_row(
        n, logits, logits_stride_b, logits_stride_t, labels, labels_stride_b, labels_stride_t, cu_seqlens, n_sequences,
        tokens, vocab, ignore_index, SHIFT
    )  # fmt: skip
    b, t = place(n, cu_seqlens, tokens)
    out_row = out + offset(b, t, out_stride_b, out_stride_t)

    g = tl.full((), 0.0, tl.float64)
    if label != IGNORED:
        if coefficients is not None:
            if cu_seqlens is not None:
                b = sequence_of(n, cu_seqlens, n_sequences)
            g = tl.load(coefficients + b).to(tl.float64)
            above = tl.load(grad + offset(b, b * 0, grad_stride_b, grad_stride_t)).to(tl.float64)
            # A saturated sequence has gradient 0 whatever arrives from above.
            g = tl.where(g == 0.0, 0.0, g * above)
        else:
            g = tl.load(grad + offset(b, t, grad_stride_b, grad_stride_t)).to(tl.float64)

    if g == 0.0:
        dtype: tl.constexpr = out.dtype.element_ty
        head, length, first, _, last = share_of_tiles(out_row, vocab, split, splits, UNROLL, THREADS, VECTOR)
        out_body = tl.multiple_of(out_row + head, BYTES)
        vectors = tile_lanes(1, THREADS, VECTOR)
        zeros = tl.zeros((1, THREADS, VECTOR), dtype)
        TILE: tl.constexpr = UNROLL * THREADS * VECTOR
        for start in range(first * TILE, tl.minimum(last * TILE, length), THREADS * VECTOR):
            tl.store(out_body + start + vectors, zeros, mask=vectors // VECTOR < (length - start) // VECTOR)
        if (split == 0) & (length < vocab):
            v = edge_positions(head, length, 2 * VECTOR)
            tl.store(out_row + v, tl.zeros((2 * VECTOR,), dtype), mask=v < vocab)
    else:
        logp = tl.load(token_logps + n)
        row_origin = tl.load(statistics + n)
        row_sum = tl.load(statistics + n_rows + n)
        write_gradient(
            row, out_row, label, g, logp, row_origin, row_sum, split, splits, vocab, inner, outer, rate,
            False, "", SOFTCAP, UNROLL, THREADS, VECTOR
        )  # fmt: skip
