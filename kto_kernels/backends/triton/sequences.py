"""What comes after the log-probabilities of tokens, in Triton: the sums over sequences, the reference point, the loss and
the coefficients. `forward_kernel` (logits.py) ends with it; from hidden states it is a kernel of its own, which one
program runs:

    sequences_kernel         token log-probabilities, or sums of them → sequence log-probabilities, losses, slopes
"""

# No `from __future__ import annotations`: Triton reads the parameters' annotations.
import triton
import triton.language as tl

from .row import difference, kernel, sigmoid, widen

# Formulas ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def mean(total, count):
    """`total` divided by max(1, `count`) in fp64, to an ulp: times a reciprocal that two steps of Newton's method refine. A
    division in fp64 would hold more registers than there are."""
    count = tl.maximum(count.to(tl.float64), 1.0)
    one = tl.full(count.shape, 1.0, tl.float64)
    share = (1.0 / count.to(tl.float32)).to(tl.float64)
    share = tl.fma(share, tl.fma(-count, share, one), share)
    share = tl.fma(share, tl.fma(-count, share, one), share)
    return total * share


@triton.jit
def sequence_loss(ratio, z0, good, beta, desirable_weight, undesirable_weight):
    """Stages value and loss of sequences: with x = ±β(r − z0), the loss λ·σ(−x) and its slope ∂loss/∂r."""
    signed_beta = tl.where(good, beta, -beta)
    weight = tl.where(good, desirable_weight, undesirable_weight)
    x = signed_beta * difference(ratio, z0)
    below = sigmoid(-x)
    return weight * below, -weight * signed_beta * (sigmoid(x) * below)


@triton.jit
def power_of_two_below(largest):
    """The largest power of two that is not above `largest` >= 0: at least the smallest normal fp32 number, and 1 where
    `largest` is not finite. It has the exponent of `largest`, and no mantissa."""
    power = (largest.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    return tl.where(power == float("inf"), 1.0, tl.maximum(power, 1.1754943508222875e-38))


# Stages ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _sum_tiles(
    values, sums, divisors, divide, cu_seqlens, n_sequences, tokens, SEQUENCES: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """sum_sequences in tiles: SEQUENCES sequences at a time, and TOKENS tokens of each at a time."""
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
            # .cg: other programs have written the values, so that this processor's own cache may be stale.
            totals += tl.load(values + n, mask=n < end[:, None], other=0.0, cache_modifier=".cg").to(tl.float64)
        total = tl.sum(totals, axis=1)
        if divisors is not None:
            total = mean(total, tl.load(divisors + i, mask=exists & divide, other=1.0))
        tl.store(sums + i, total, mask=exists)


@triton.jit
def sum_sequences(values, sums, divisors, divide, cu_seqlens, n_rows, n_sequences, tokens):
    """Writes to `sums` the sum of `values` over the tokens of each sequence; where `divide` is set, divided by
    max(1, `divisors`)."""
    if n_rows >= 256 * n_sequences:  # few long sequences
        _sum_tiles(values, sums, divisors, divide, cu_seqlens, n_sequences, tokens, 1, 512)
    else:
        _sum_tiles(values, sums, divisors, divide, cu_seqlens, n_sequences, tokens, 16, 32)


@triton.jit
def sum_models(
    logps, sums, ref_logps, ref_sums, scored, counts, cu_seqlens, n_rows, n_sequences, tokens
):  # fmt: skip
    """Stage sequence_logps for one model or, with `ref_logps`, for two that score the same tokens.

    Writes the sums of `logps` to `sums` or, with `scored`, writes the means over the scored tokens, whose `counts` it
    sums first.
    """
    passes = 1  # a loop over the passes, instead of up to three calls, compiles the sum once
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
def reference_point(sums, stride, ref_sums, ref_stride, count, BLOCK: tl.constexpr):
    """Stage kl_reference_point without the clamp: the mean log-ratio of the mismatched completions, or 0 without
    any."""
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ratio = widen(tl.load(sums + j * stride, mask=j < count, other=0.0))
        if ref_sums is not None:
            ratio = difference(ratio, widen(tl.load(ref_sums + j * ref_stride, mask=j < count, other=0.0)))
        total += tl.sum(ratio, axis=0)
    return total / tl.maximum(count, 1).to(tl.float64)


@triton.jit
def value_and_loss(
    sums, ref_sums, ref_stride, desirable, desirable_stride, counts, z0, n_sequences, beta, desirable_weight,
    undesirable_weight, loss, ref_logps, rewards, coefficients,
    REDUCTION: tl.constexpr, AVERAGE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Stages value and loss. The `coefficients` are ∂loss/∂ℓ, the same for every token of a sequence."""
    factor = tl.full((), 1.0, tl.float64)
    if REDUCTION == "mean":
        factor = factor / tl.maximum(n_sequences, 1).to(tl.float64)
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
        value_loss, slope = sequence_loss(ratio, z0, good, beta, desirable_weight, undesirable_weight)
        slope = slope * factor
        if AVERAGE:
            slope = mean(slope, tl.load(counts + i, mask=exists, other=1.0))
        tl.store(ref_logps + i, ref, mask=exists)
        tl.store(rewards + i, (beta * ratio).to(tl.float32), mask=exists)
        tl.store(coefficients + i, slope.to(tl.float32), mask=exists)
        if REDUCTION == "none":
            tl.store(loss + i, value_loss.to(tl.float32), mask=exists)
        total += tl.sum(tl.where(exists, value_loss, 0.0), axis=0)
    if REDUCTION != "none":
        tl.store(loss, (total * factor).to(tl.float32))


# From hidden states ───────────────────────────────────────────────────────────────────────────────────────────────────


@kernel
def sequences_kernel(
    token_logps,  # (S,), of which the sequences have n_rows in all; None: `sums` are given
    offsets,  # (B + 1,) int64
    n_rows: tl.int32,
    n_sequences: tl.int32,
    sums,  # (B,) fp64; None: they are those of token_logps
    counts,  # (B,) with AVERAGE: scored tokens
    lengths,  # (B,) with `divisor`: scored tokens of this rank
    ref_logps,  # (B,); None: reference-free
    ref_logps_stride: tl.int64,
    z0,  # ()
    desirable,  # (B,) bool
    desirable_stride: tl.int64,
    beta: tl.float64,
    desirable_weight: tl.float64,
    undesirable_weight: tl.float64,
    reduced_by: tl.float64,  # the slopes are divided by it
    logps,  # (B,) fp64: sums, with AVERAGE means; None where the sums are given and nobody asks for them
    slopes,  # (B,) fp64 ∂loss/∂ℓ
    losses,  # (B,) fp64 without the reduction, as are the rewards; or None
    rewards,
    divisor,  # () fp64, raised to the power of two below the largest slope; or None
    factor,  # () fp64: the divisor before, over the divisor now
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):
    if token_logps is not None:
        sums = logps
        sum_sequences(token_logps, sums, None, False, offsets, n_rows, n_sequences, 0)
        tl.debug_barrier()  # other threads have stored the sums
    point = widen(tl.load(z0))
    beta = tl.full((), beta, tl.float64)
    desirable_weight = tl.full((), desirable_weight, tl.float64)
    undesirable_weight = tl.full((), undesirable_weight, tl.float64)
    reduced_by = tl.full((), reduced_by, tl.float64)
    largest = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n_sequences, BLOCK):
        i = start + tl.arange(0, BLOCK)
        exists = i < n_sequences
        ratio = tl.load(sums + i, mask=exists, other=0.0)
        if AVERAGE:
            count = tl.load(counts + i, mask=exists, other=1)
            ratio = mean(ratio, count)
        if logps is not None:
            tl.store(logps + i, ratio, mask=exists)
        if ref_logps is not None:
            ratio = difference(ratio, widen(tl.load(ref_logps + i * ref_logps_stride, mask=exists, other=0.0)))
        good = tl.load(desirable + i * desirable_stride, mask=exists, other=0) != 0
        value_loss, slope = sequence_loss(ratio, point, good, beta, desirable_weight, undesirable_weight)
        slope = slope / reduced_by
        if AVERAGE:
            slope = mean(slope, count)
        tl.store(slopes + i, slope, mask=exists)
        if losses is not None:
            tl.store(losses + i, value_loss, mask=exists)
            tl.store(rewards + i, beta * ratio, mask=exists)
        if divisor is not None:
            scored = tl.load(lengths + i, mask=exists, other=0) > 0
            size = tl.where(slope == slope, tl.abs(slope), float("inf"))  # a maximum may leave NaN out
            largest = tl.maximum(largest, tl.where(scored, size, 0.0))
    if divisor is not None:
        before = tl.load(divisor)
        now = tl.maximum(before, power_of_two_below(tl.max(largest, axis=0)))
        tl.store(divisor, now)
        tl.store(factor, before / now)
