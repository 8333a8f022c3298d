"""The Triton kernels for losses from hidden states: `chunk_kernel` scores a chunk of logits and overwrites them by
their gradient; `scale_kernel` multiplies the gradients of hidden states and head by the gradient from above."""

# No `from __future__ import annotations`: Triton reads the parameters' annotations.
import triton
import triton.language as tl

from .row import (
    BYTES,
    LN2,
    aligned_head,
    edge_positions,
    kernel,
    label_logp,
    narrow,
    score,
    softmax_share,
    tile_lanes,
    write_gradient,
)


@triton.jit
def row_entropy(others_sum, others_moment, ahead, d, decayed, row_sum, log_sum):
    """The entropy in fp32, `−Σ_v p_v log p_v = log s − Σ_v 2^d·d·log 2 / s`, from the sums over all scores but the
    label's, which is `ahead` of them or not, and from what label_logp returns. No term is negative: no digits are lost.
    A row of −inf has entropy 0."""
    moment = tl.where(ahead, (others_moment + others_sum.to(tl.float32) * d) * decayed, others_moment + decayed * d)
    return tl.where(row_sum == 0.0, 0.0, log_sum - moment * LN2 / row_sum)


@triton.jit
def is_first_argmax(row, label, vocab, BLOCK: tl.constexpr):
    """Whether no logit is higher than the label's, and none in front of it as high."""
    y = tl.load(row + label).to(tl.float32)
    beaten = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < vocab, other=float("-inf")).to(tl.float32)
        beaten |= ((x > y) | ((x == y) & (v < label))).to(tl.int32)
    return tl.max(beaten, axis=0) == 0


@kernel
def chunk_kernel(
    logits,  # (C, V), overwritten with GRADIENT
    logits_stride: tl.int64,
    labels,  # (C,), each of them in [0, V)
    labels_stride: tl.int64,
    vocab: tl.int32,
    inner: tl.float64,
    outer: tl.float64,
    rate: tl.float32,
    logps,  # (C,)
    entropy,  # (C,) or None, as are mean_logits and is_top1
    mean_logits,
    is_top1,
    GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    EVICTION: tl.constexpr = "evict_last" if GRADIENT else "evict_first"
    n = tl.program_id(0)
    row = logits + n.to(tl.int64) * logits_stride
    label = tl.load(labels + n.to(tl.int64) * labels_stride).to(tl.int32)
    z_scale = tl.full((), outer, tl.float64)
    rate = tl.full((), rate, tl.float32)
    u_inner = tl.full((), inner, tl.float32)
    y = score(tl.load(row + label), u_inner, SOFTCAP)
    others_origin, others_sum, others_moment, total = softmax_share(
        row, vocab, label, 0, 1, u_inner, rate, entropy is not None, mean_logits is not None, EVICTION,
        SOFTCAP, UNROLL, THREADS, VECTOR
    )  # fmt: skip
    logp, row_origin, row_sum, log_sum, d, decayed = label_logp(others_origin, others_sum, y, z_scale)
    logp = logp.to(tl.float32)
    tl.store(logps + n, logp)
    if entropy is not None:
        value = row_entropy(others_sum, others_moment, y >= others_origin, d, decayed, row_sum, log_sum)
        tl.store(entropy + n, value)
    if mean_logits is not None:
        tl.store(mean_logits + n, total * (rate * LN2) / vocab)
    if is_top1 is not None:
        # A second pass looks for the first argmax, but only where scores tie with the label's: to within DOUBT, the
        # error of tanh, under a softcap.
        DOUBT: tl.constexpr = 1e-6 if SOFTCAP else 0.0
        first = y > others_origin + DOUBT
        if (y >= row_origin - DOUBT) & (y <= others_origin + DOUBT):
            first = is_first_argmax(row, label, vocab, THREADS * VECTOR)
        tl.store(is_top1 + n, first & (logp == logp))
    if GRADIENT:
        write_gradient(
            row, row, label, 1.0, logp, row_origin, row_sum, 0, 1, vocab, inner, outer, rate,
            True, "evict_first", SOFTCAP, UNROLL, THREADS, VECTOR
        )  # fmt: skip


@kernel
def scale_kernel(
    tensor,  # (count,), multiplied in place
    count: tl.int64,
    factor,  # ()
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Multiplies a tensor by a factor, unless the factor is 1, as it mostly is. Only the device knows it."""
    TILE: tl.constexpr = UNROLL * THREADS * VECTOR
    dtype: tl.constexpr = tensor.dtype.element_ty
    program = tl.program_id(0)
    step = tl.num_programs(0).to(tl.int64) * TILE
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        head = aligned_head(tensor, count, VECTOR)
        length = (count - head) // VECTOR * VECTOR
        body = tl.multiple_of(tensor + head, BYTES)
        lanes = tile_lanes(UNROLL, THREADS, VECTOR)
        for start in range(program.to(tl.int64) * TILE, length, step):
            inside = lanes // VECTOR < (length - start) // VECTOR
            x = tl.load(body + start + lanes, mask=inside, other=0.0).to(tl.float32)
            tl.store(body + start + lanes, narrow(x * by, dtype), mask=inside)
        if (program == 0) & (length < count):
            v = edge_positions(head, length, THREADS)
            x = tl.load(tensor + v, mask=v < count, other=0.0).to(tl.float32)
            tl.store(tensor + v, narrow(x * by, dtype), mask=v < count)
