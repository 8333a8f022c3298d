"""The Triton kernels behind losses from hidden states: `chunk_kernel` scores a chunk of logits and overwrites it by its
gradient, `scale_kernel` multiplies what became of that by the gradient from above."""

# No `from __future__ import annotations`: Triton reads the parameters' annotations.
import triton
import triton.language as tl

from .triton_rows import (
    BYTES,
    LOG2E,
    aligned_head,
    edge_positions,
    kernel,
    label_logp,
    lowered,
    narrow,
    score,
    softmax_share,
    tile_lanes,
    write_gradient,
)


@triton.jit
def row_entropy(others_max, others_sum, others_moment, y, row_max, row_sum, scale):
    """`−Σ_v p_v log p_v = log s − Σ_v e^d·d / s` with d = z_v − max z, from the sums over all scores but the label's y;
    0 for a row of −inf. fp64."""
    shift = (others_max.to(tl.float64) - row_max) * scale * LOG2E
    _, moment = lowered(others_sum, others_moment, shift.to(tl.float32), True)
    d = (y.to(tl.float64) - row_max) * scale
    own = tl.where(d == float("-inf"), 0.0, tl.exp(d) * d)
    return tl.where(row_sum == 0.0, 0.0, tl.log(row_sum) - (moment / LOG2E + own) / row_sum)


@triton.jit
def is_first_argmax(row, label, vocab, BLOCK: tl.constexpr):
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
    labels,  # (C,), each in [0, V)
    labels_stride: tl.int64,
    vocab: tl.int32,
    inner: tl.float64,
    scale: tl.float64,
    logps,  # (C,)
    entropy,  # (C,) or None, like the next two
    mean_logits,
    is_top1,
    GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    EVICTION: tl.constexpr = "evict_last" if GRADIENT else "evict_first"
    n = tl.program_id(0)
    row = logits + n.to(tl.int64) * logits_stride
    label = tl.load(labels + n.to(tl.int64) * labels_stride).to(tl.int32)
    z_scale = tl.full((), scale, tl.float64)
    rate = (z_scale * LOG2E).to(tl.float32)
    u_inner = tl.full((), inner, tl.float32)
    y = score(tl.load(row + label), u_inner, SOFTCAP)
    others_max, others_sum, others_moment, total = softmax_share(
        row, vocab, label, 0, 1, u_inner, rate, entropy is not None, mean_logits is not None, EVICTION,
        SOFTCAP, UNROLL, THREADS, VECTOR
    )  # fmt: skip
    logp, row_max, row_sum = label_logp(others_max, others_sum, y, z_scale)
    tl.store(logps + n, logp.to(tl.float32))
    if entropy is not None:
        value = row_entropy(others_max, others_sum, others_moment, y, row_max, row_sum, z_scale)
        tl.store(entropy + n, value.to(tl.float32))
    if mean_logits is not None:
        tl.store(mean_logits + n, (total * z_scale / vocab).to(tl.float32))
    if is_top1 is not None:
        # Ties are looked for only where there may be one; tanh makes some, and is good to less than DOUBT.
        DOUBT: tl.constexpr = 1e-6 if SOFTCAP else 0.0
        first = y > others_max + DOUBT
        if (y >= row_max - DOUBT) & (y <= others_max + DOUBT):
            first = is_first_argmax(row, label, vocab, THREADS * VECTOR)
        tl.store(is_top1 + n, first & (logp == logp))
    if GRADIENT:
        write_gradient(
            row, row, label, 1.0, logp, row_max, row_sum, 0, 1, vocab, inner, scale,
            SOFTCAP, UNROLL, THREADS, VECTOR, INTERPRETED
        )  # fmt: skip


@kernel
def scale_kernel(
    tensor,  # (count,), multiplied in place
    count: tl.int64,
    factor,  # ()
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Known on the device alone, the factor is mostly 1: then nothing is read but itself."""
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
            tl.store(body + start + lanes, narrow(x * by, dtype, INTERPRETED), mask=inside)
        if (program == 0) & (length < count):
            v = edge_positions(head, length, VECTOR)
            x = tl.load(tensor + v, mask=v < count, other=0.0).to(tl.float32)
            tl.store(tensor + v, narrow(x * by, dtype, INTERPRETED), mask=v < count)
