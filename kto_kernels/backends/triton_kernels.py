"""The Triton kernels: one program scores one row of logits, or one share of a row where rows are few.

    token_logps_kernel       logits → token log-probabilities
    forward_kernel           up to four sets of logits → the loss and everything else; the program that finishes the
                             last row sums the sequences and computes the loss
    logits_backward_kernel   logits → their gradient, which may overwrite them

Nothing is specialised on a run-time value; absent tensors are None, which is resolved at compile time.
"""

# No `from __future__ import annotations`: Triton reads the parameters' annotations.
import triton
import triton.language as tl

from .triton_rows import (
    BYTES,
    IGNORED,
    difference,
    edge_positions,
    find_row,
    kernel,
    offset,
    place,
    score_row,
    sequence_of,
    share_of_tiles,
    sigmoid,
    tile_lanes,
    widen,
    write_gradient,
)

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
    inner: tl.float64,
    scale: tl.float64,
    logps,  # (N,)
    statistics,  # (2, N)
    shares,  # (N, splits, 2): each program's (max, sum) where rows are split
    arrivals,  # (1 + N,) zeros, left as zeros; used where rows are split
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
    logp, row_max, row_sum, finished = score_row(
        row, label, n, program % splits, splits, vocab, inner, scale, shares, arrivals,
        SOFTCAP, MAX_SPLITS, UNROLL, THREADS, VECTOR
    )  # fmt: skip
    if finished:
        tl.store(logps + n, logp.to(tl.float32))
        tl.store(statistics + n, row_max.to(tl.float32))
        tl.store(statistics + n_rows + n, row_sum.to(tl.float32))


# The whole loss ───────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _sum_tiles(
    values, sums, divisors, divide, cu_seqlens, n_sequences, tokens, SEQUENCES: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """sum_sequences, SEQUENCES at a time and TOKENS of each at a time."""
    for start in range(0, n_sequences, SEQUENCES):
        i = start + tl.arange(0, SEQUENCES)
        exists = i < n_sequences
        if cu_seqlens is None:
            begin = i * tokens
            end = begin + tl.where(exists, tokens, 0)
        else:
            begin = tl.load(cu_seqlens + i, mask=exists, other=0).to(tl.int32)
            end = tl.load(cu_seqlens + i + 1, mask=exists, other=0).to(tl.int32)
        totals = tl.zeros((SEQUENCES, TOKENS), tl.float64)
        for step in range(0, tl.max(end - begin, axis=0), TOKENS):
            n = begin[:, None] + step + tl.arange(0, TOKENS)[None, :]
            # .cg: other programs wrote them, so never out of this processor's own cache.
            totals += tl.load(values + n, mask=n < end[:, None], other=0.0, cache_modifier=".cg").to(tl.float64)
        total = tl.sum(totals, axis=1)
        if divisors is not None:
            total = total / tl.maximum(tl.load(divisors + i, mask=exists & divide, other=1.0), 1.0)
        tl.store(sums + i, total, mask=exists)


@triton.jit
def sum_sequences(values, sums, divisors, divide, cu_seqlens, n_rows, n_sequences, tokens):
    """Sums of per-token values over each sequence, if `divide` divided by `divisors` (at least 1)."""
    if n_rows >= 256 * n_sequences:  # few long sequences
        _sum_tiles(values, sums, divisors, divide, cu_seqlens, n_sequences, tokens, 2, 256)
    else:
        _sum_tiles(values, sums, divisors, divide, cu_seqlens, n_sequences, tokens, 16, 32)


@triton.jit
def _sum_models(
    logps, sums, ref_logps, ref_sums, scored, counts, cu_seqlens, n_rows, n_sequences, tokens
):  # fmt: skip
    """Stage sequence_logps for one model or, with `ref_logps`, two that score the same tokens: sums of `logps` into
    `sums`, or with `scored` their means over those tokens, which are counted first."""
    passes = 1  # one loop over the passes, not three calls: its code is there once
    if ref_logps is not None:
        passes += 1
    if scored is not None:
        passes += 1
    for step in range(0, passes):
        values = logps
        into = sums
        if ref_logps is not None:
            if step == passes - 1:
                values = ref_logps
                into = ref_sums
        if scored is not None:
            if step == 0:
                values = scored
                into = counts
        sum_sequences(values, into, counts, step > 0, cu_seqlens, n_rows, n_sequences, tokens)
        tl.debug_barrier()


@triton.jit
def _reference_point(sums, stride, ref_sums, ref_stride, count, BLOCK: tl.constexpr):
    """Stage kl_reference_point before its clamp: the mean log-ratio of the mismatched completions, 0 where there is
    none."""
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ratio = widen(tl.load(sums + j * stride, mask=j < count, other=0.0))
        if ref_sums is not None:
            ratio = difference(ratio, widen(tl.load(ref_sums + j * ref_stride, mask=j < count, other=0.0)))
        total += tl.sum(ratio, axis=0)
    return total / tl.maximum(count, 1).to(tl.float64)


@triton.jit
def _loss(
    sums, ref_sums, ref_stride, desirable, desirable_stride, counts, z0, n_sequences, beta, desirable_weight,
    undesirable_weight, loss, ref_logps, rewards, coefficients,
    REDUCTION: tl.constexpr, AVERAGE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Stages value and loss: x = ±β(r − z0), loss = λ·σ(−x), `coefficients` its derivative by a token's logp."""
    share = tl.full((), 1.0, tl.float64)
    if REDUCTION == "mean":
        share = share / tl.maximum(n_sequences, 1).to(tl.float64)
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, n_sequences, BLOCK):
        i = start + tl.arange(0, BLOCK)
        exists = i < n_sequences
        ratio = tl.load(sums + i, mask=exists, other=0.0)
        ref = tl.zeros((BLOCK,), tl.float64)
        if ref_sums is not None:
            ref = widen(tl.load(ref_sums + i * ref_stride, mask=exists, other=0.0))
            ratio = difference(ratio, ref)
        good = tl.load(desirable + i * desirable_stride, mask=exists, other=0) != 0
        signed_beta = tl.where(good, beta, -beta)
        weight = tl.where(good, desirable_weight, undesirable_weight)
        x = signed_beta * difference(ratio, z0)
        below = sigmoid(-x)
        value_loss = weight * below
        slope = -weight * signed_beta * (sigmoid(x) * below) * share
        if AVERAGE:
            slope = slope / tl.maximum(tl.load(counts + i, mask=exists, other=1.0), 1.0)
        tl.store(ref_logps + i, ref, mask=exists)
        tl.store(rewards + i, (beta * ratio).to(tl.float32), mask=exists)
        tl.store(coefficients + i, slope.to(tl.float32), mask=exists)
        if REDUCTION == "none":
            tl.store(loss + i, value_loss.to(tl.float32), mask=exists)
        total += tl.sum(tl.where(exists, value_loss, 0.0), axis=0)
    if REDUCTION != "none":
        tl.store(loss, (total * share).to(tl.float32))


@kernel
def forward_kernel(
    logits,  # (B, T, V) or (N, V), as ref_logits
    logits_stride_b: tl.int64,
    logits_stride_t: tl.int64,
    ref_logits,  # None: ref_sums instead
    ref_logits_stride_b: tl.int64,
    ref_logits_stride_t: tl.int64,
    labels,  # (B, T) or (N,)
    labels_stride_b: tl.int64,
    labels_stride_t: tl.int64,
    cu_seqlens,  # (B + 1,) or None
    n_rows: tl.int32,
    n_sequences: tl.int32,
    tokens: tl.int32,
    kl_logits,  # (K, T', V) or (N', V), as kl_ref_logits; None: kl_sums instead
    kl_logits_stride_b: tl.int64,
    kl_logits_stride_t: tl.int64,
    kl_ref_logits,  # None: kl_ref_sums instead
    kl_ref_logits_stride_b: tl.int64,
    kl_ref_logits_stride_t: tl.int64,
    kl_labels,  # (K, T') or (N',)
    kl_labels_stride_b: tl.int64,
    kl_labels_stride_t: tl.int64,
    kl_cu_seqlens,  # (K + 1,) or None
    kl_n_rows: tl.int32,
    kl_n_sequences: tl.int32,
    kl_tokens: tl.int32,
    vocab: tl.int32,
    ignore_index: tl.int64,
    inner: tl.float64,
    scale: tl.float64,
    desirable,  # (B,) bool
    desirable_stride: tl.int64,
    ref_sums,  # (B,): filled from ref_logits, or given; None: reference-free
    ref_sums_stride: tl.int64,
    kl_sums,  # (K,): filled from kl_logits, or given; None: kl or kl_value instead
    kl_sums_stride: tl.int64,
    kl_ref_sums,  # (K,): filled from kl_ref_logits, or given, or None
    kl_ref_sums_stride: tl.int64,
    kl,  # () or None: kl_value instead
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
    other_logps,  # token log-probabilities of the other sets, one behind the other
    scored,  # (N + N',): 1 or 0, whether a label scores the row; where AVERAGE, else None
    counts,  # (B,): scored tokens; where AVERAGE, else None
    kl_counts,  # (K,), of KL logits
    shares,  # (rows of all sets, splits, 2): each program's (max, sum) where rows are split
    arrivals,  # (1 + rows of all sets,) zeros, left as zeros; but the first used where rows are split only
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
    unit = tl.program_id(0) // splits  # numbers the rows of all sets: policy, reference, KL policy, KL reference
    split = tl.program_id(0) % splits
    units = n_rows
    if ref_logits is not None:
        units += n_rows
    first_kl = units
    if kl_logits is not None:
        units += kl_n_rows
    first_kl_ref = units
    if kl_ref_logits is not None:
        units += kl_n_rows

    row = logits
    label = unit * 0 - 1
    if unit < first_kl:
        n = unit
        stride_b = logits_stride_b
        stride_t = logits_stride_t
        if ref_logits is not None:
            if unit >= n_rows:
                row = ref_logits
                n = unit - n_rows
                stride_b = ref_logits_stride_b
                stride_t = ref_logits_stride_t
        row, label = find_row(
            n, row, stride_b, stride_t, labels, labels_stride_b, labels_stride_t, cu_seqlens, n_sequences, tokens,
            vocab, ignore_index, SHIFT
        )  # fmt: skip
    if kl_logits is not None:
        if (unit >= first_kl) & (unit < first_kl_ref):
            row, label = find_row(
                unit - first_kl, kl_logits, kl_logits_stride_b, kl_logits_stride_t, kl_labels, kl_labels_stride_b,
                kl_labels_stride_t, kl_cu_seqlens, kl_n_sequences, kl_tokens, vocab, ignore_index, SHIFT
            )  # fmt: skip
    if kl_ref_logits is not None:
        if (unit >= first_kl_ref) & (unit < units):
            row, label = find_row(
                unit - first_kl_ref, kl_ref_logits, kl_ref_logits_stride_b, kl_ref_logits_stride_t, kl_labels,
                kl_labels_stride_b, kl_labels_stride_t, kl_cu_seqlens, kl_n_sequences, kl_tokens, vocab, ignore_index,
                SHIFT
            )  # fmt: skip

    logp, row_max, row_sum, finished = score_row(
        row, label, unit, split, splits, vocab, inner, scale, shares, arrivals,
        SOFTCAP, MAX_SPLITS, UNROLL, THREADS, VECTOR
    )  # fmt: skip
    if finished:
        if unit < n_rows:
            tl.store(token_logps + unit, logp.to(tl.float32))
            tl.store(statistics + unit, row_max.to(tl.float32))
            tl.store(statistics + n_rows + unit, row_sum.to(tl.float32))
        if other_logps is not None:
            if (unit >= n_rows) & (unit < units):
                tl.store(other_logps + (unit - n_rows), logp.to(tl.float32))
        if AVERAGE:
            if unit < n_rows:
                tl.store(scored + unit, (label >= 0).to(tl.float32))
            elif unit < units:
                if unit >= first_kl:
                    tl.store(scored + n_rows + (unit - first_kl) % kl_n_rows, (label >= 0).to(tl.float32))
    tl.debug_barrier()  # every thread's stores come before the counter
    last = finished
    if finished:
        # Where there is no row at all, one program comes for the sequences' sake.
        last = tl.atomic_add(arrivals, 1, sem="acq_rel") == tl.maximum(units, 1) - 1
    if last:
        tl.store(arrivals, 0)
        kl_others = other_logps
        kl_scored = scored
        if AVERAGE:
            kl_scored = scored + n_rows
        if other_logps is not None:
            kl_others = other_logps + (first_kl - n_rows)
        if ref_logits is None:
            _sum_models(token_logps, logps, None, None, scored, counts, cu_seqlens, n_rows, n_sequences, tokens)
        else:
            _sum_models(
                token_logps, logps, other_logps, ref_sums, scored, counts, cu_seqlens, n_rows, n_sequences, tokens
            )
        if kl_logits is not None and kl_ref_logits is not None:
            _sum_models(
                kl_others, kl_sums, kl_others + kl_n_rows, kl_ref_sums, kl_scored, kl_counts, kl_cu_seqlens, kl_n_rows,
                kl_n_sequences, kl_tokens
            )  # fmt: skip
        elif kl_logits is not None:
            _sum_models(
                kl_others, kl_sums, None, None, kl_scored, kl_counts, kl_cu_seqlens, kl_n_rows, kl_n_sequences,
                kl_tokens
            )  # fmt: skip
        elif kl_ref_logits is not None:
            _sum_models(
                kl_others, kl_ref_sums, None, None, kl_scored, kl_counts, kl_cu_seqlens, kl_n_rows, kl_n_sequences,
                kl_tokens
            )  # fmt: skip
        if kl_sums is not None:
            point = _reference_point(kl_sums, kl_sums_stride, kl_ref_sums, kl_ref_sums_stride, kl_n_sequences, 128)
        elif kl is not None:
            point = widen(tl.load(kl))
        else:
            point = tl.full((), kl_value, tl.float64)
        point = tl.where(point < 0.0, 0.0, point)  # NaN stays NaN
        tl.store(z0, point.to(tl.float32))
        _loss(
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
    scale: tl.float64,
    grad,  # like labels; with coefficients (B,) or (), both as (B, 1)
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
    INTERPRETED: tl.constexpr,
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
            v = edge_positions(head, length, VECTOR)
            tl.store(out_row + v, tl.zeros((2 * VECTOR,), dtype), mask=v < vocab)
    else:
        logp = tl.load(token_logps + n).to(tl.float64)
        row_max = tl.load(statistics + n)
        row_sum = tl.load(statistics + n_rows + n).to(tl.float64)
        write_gradient(
            row, out_row, label, g, logp, row_max, row_sum, split, splits, vocab, inner, scale,
            SOFTCAP, UNROLL, THREADS, VECTOR, INTERPRETED
        )  # fmt: skip
