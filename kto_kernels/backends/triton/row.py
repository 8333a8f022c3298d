"""The Triton functions for one row of logits or one share of a row: find the row and its label, compute the row's
softmax, write the row's gradient.

Each thread reads the logits in tiles of UNROLL vectors of 16 bytes, and loads all of them before it uses the first. A
row may start at any address: the tiles begin at the row's first aligned address, and the few elements in front of it
and behind the last whole vector (the edge) are read apart. Values for each logit and the gradient's factors are fp32. A
row's sum and its log-probability are fp64, which is slow on many GPUs and so kept to 40 instructions a row.
"""

# No `from __future__ import annotations`: Triton reads the parameters' annotations.
import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from ... import records

ELSEWHERE = tl.constexpr(records.ELSEWHERE)
# find_row returns these for rows without a label here: IGNORED where nothing scores the row, ABSENT where the label's
# column is on another rank, so that its logit counts as −inf.
IGNORED = tl.constexpr(-1)
ABSENT = tl.constexpr(-2)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # where a running origin starts: from −inf, −inf − (−inf) would be NaN
FLOOR = tl.constexpr(-200.0)  # the lowest exponent d in terms 2^d·d: 2^FLOOR is 0 in fp32, and 2^−inf · −inf is NaN
FAR = tl.constexpr(1073741824.0)  # 2^30: a higher |origin·rate| would leave no bits to its rounding error, see `line`
BYTES = tl.constexpr(16)  # of one vector
# Whether the interpreter runs the functions, whose products and sums round twice and whose conversions truncate.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def kernel(fn: Callable[..., Any]) -> Any:
    """`triton.jit` without specialisation on run-time values, so that a new β, batch or alignment compiles nothing."""
    parameters = inspect.signature(fn).parameters.values()
    run_time = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(fn, do_not_specialize=run_time)


# Formulas ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def widen(x):
    """Converts to fp64, from bf16 by way of fp32: the interpreter knows no other conversion from bf16."""
    return x.to(tl.float32).to(tl.float64) if x.dtype == tl.bfloat16 else x.to(tl.float64)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Rounds fp32 `x` to `dtype`, to nearest even; for bf16 by hand in the interpreter, which would truncate."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def multiply_add(a, b, c):
    """a·b + c in fp32, rounded once. The compiler makes none of its own out of products and sums (`launch.options`)."""
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def line(origin, rate):
    """(slope, shift) of the exponents `d = slope·u + shift` of scores u, one instruction each: d is (u − origin)·rate
    plus `offset`, the rounding error of the shift, the same for all scores.

    Where |origin·rate| is so high that this error would leave fp32's exponents, two scores differ by more exponents
    than fp32 has, or not at all: there the slope is a power of two, which rounds nothing."""
    bits = origin.to(tl.uint32, bitcast=True) & 0x7F800000
    steep = ((285 << 23) - bits).to(tl.float32, bitcast=True)  # 2^31 over the origin's own power of two
    slope = tl.where(tl.abs(origin * rate) > FAR, steep, rate)
    return slope, origin * slope * -1.0  # a unary minus would be 0 − x, an instruction of its own


@triton.jit
def offset_of(origin, rate):
    """What the exponents of `line` are too high by, exactly, for a finite origin: 2^-24 of origin·rate at most."""
    slope, shift = line(origin, rate)
    return multiply_add(origin, slope, shift)


@triton.jit
def power_of_offset(offset):
    """2^offset in fp32. exp2 is exact to 2^-22 only: near 0, where most offsets are, a series is better."""
    x = offset * LN2
    return tl.where(tl.abs(x) < 1e-3, multiply_add(x, 1.0 + 0.5 * x, 1.0), tl.exp2(offset))


@triton.jit
def difference(a, b):
    """`a − b`, but −inf (a saturated log-ratio) instead of NaN where both are the same infinity."""
    return tl.where((a == b) & (tl.abs(a) == float("inf")), float("-inf"), a - b)


@triton.jit
def log1p(x, near):
    """log(1 + x) for fp64 x >= 0, to about 2^-26 of it, where `near` is 1 + x in fp32, m·2^k with m around 1: fp32 knows
    the logarithm of m well, and the rest of 1 + x is small."""
    rest = (x - (near - 1.0).to(tl.float64)).to(tl.float32)
    k = (near.to(tl.int32, bitcast=True) - 0x3F3504F3) >> 23  # 0x3F3504F3 is 1/√2
    m = (near.to(tl.int32, bitcast=True) - (k << 23)).to(tl.float32, bitcast=True)
    f = m - 1.0
    s = f / (m + 1.0)
    z = s * s
    series = z * (((0.2222222222 * z + 0.2857142857) * z + 0.4) * z + 0.6666666667)
    log_m = f - (s * (f - series) - rest / near)  # 2·artanh(s) with its first term 2s written as f − s·f
    return tl.fma(k.to(tl.float64), tl.full((), LN2, tl.float64), log_m.to(tl.float64))


@triton.jit
def expm1(x):
    """exp(x) − 1 in fp32 for x <= 0: a series near 0, where the difference would lose its digits."""
    series = 1.0 + x * (0.2 + x * (0.03333333333 + x * (0.004761904762 + x * 0.0005952380952)))
    near = x + x * x * (0.5 + x * (0.1666666667 + x * (0.04166666667 * series)))
    return tl.where(x > -0.5, near, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


@triton.jit
def tanh(x):
    """tanh in fp32 to a few ulp, near 0 too: a polynomial (Cephes' tanhf) below 0.625, an exponential above. The quotient
    1 / (1 + e^2a) is the square of rsqrt, one instruction where a division is eight."""
    a = tl.abs(x)
    root = tl.rsqrt(tl.exp2(a * (2.0 * LOG2E)) + 1.0)
    far = multiply_add(-2.0 * root, root, 1.0)
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    far = (far.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    z = x * x
    series = multiply_add(z, -5.70498872745e-3, 2.06390887954e-2)
    series = multiply_add(series, z, -5.37397155531e-2)
    series = multiply_add(series, z, 1.33314422036e-1)
    series = multiply_add(series, z, -3.33332819422e-1)
    near = multiply_add(x * z, series, x)
    return tl.where(a < 0.625, near, far)


@triton.jit
def score(x, inner, SOFTCAP: tl.constexpr):
    """The score u of a logit, in fp32: the logit or, under a softcap, tanh(inner·logit); z = outer·u."""
    u = x.to(tl.float32)
    if SOFTCAP:
        u = tanh(u * inner)
    return u


@triton.jit
def label_logp(others_origin, others_sum, y, outer):
    """Stage token_logps: the log-probability (fp64) of the label with score y, given the statistics of all *other*
    scores (fp32, fp64). In fp32: the statistics (origin, sum) of all scores; the logarithm of this sum; and the exponent d
    <= 0 of the lower of the label and the others at the higher one's origin, with 2^d. log1p of the others is exact where the label is
    the maximum, as it is for most tokens of a good completion."""
    others_origin = tl.where(others_sum.to(tl.float32) == 0.0, float("-inf"), others_origin)
    ahead = y >= others_origin
    gap = (y.to(tl.float64) - others_origin.to(tl.float64)) * outer
    # 2^d, with d to 48 bits, is what the lower of both decays to at the higher one's origin.
    d = tl.where(ahead, -gap, gap) * LOG2E
    near = tl.maximum(d.to(tl.float32), FLOOR)
    rest = (d - near.to(tl.float64)).to(tl.float32)
    decayed = tl.where(near > FLOOR, tl.exp2(near) * (1.0 + rest * LN2), 0.0)
    # At the higher one's origin: 1, and beside it what the lower one decayed to, or all but 1 of the others.
    kept = tl.where(ahead, decayed, 1.0).to(tl.float64)
    beside = tl.fma(others_sum, kept, tl.where(ahead, 0.0, decayed - 1.0).to(tl.float64))
    all_sum = (1.0 + beside).to(tl.float32)
    log_sum = log1p(beside, all_sum)
    logp = tl.where(ahead, 0.0, gap) - log_sum
    hidden = y == float("-inf")
    logp = tl.where(hidden, float("-inf"), logp)
    others_sum = others_sum.to(tl.float32)
    undefined = (others_sum != others_sum) | (y != y) | (y == float("inf"))
    logp = tl.where(undefined, float("nan"), logp)
    all_sum = tl.where(hidden, others_sum, all_sum)
    all_sum = tl.where(undefined, float("nan"), all_sum)
    return logp, tl.maximum(others_origin, y), all_sum, log_sum.to(tl.float32), near, decayed


# Rows and sequences ───────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def sequence_of(n, cu_seqlens, n_sequences):
    """The i with cu_seqlens[i] <= n < cu_seqlens[i + 1]."""
    low = n * 0
    high = low + n_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) <= n:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def place(n, cu_seqlens, tokens):
    """The (batch, token) index of row n; (0, n) in the packed layout."""
    if cu_seqlens is None:
        return n // tokens, n % tokens
    else:
        return n * 0, n


@triton.jit
def offset(b, t, stride_b, stride_t):
    return b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t


@triton.jit
def find_row(
    n, logits, logits_stride_b, logits_stride_t, labels, labels_stride_b, labels_stride_t, cu_seqlens, n_sequences,
    tokens, vocab, ignore_index, SHIFT: tl.constexpr
):  # fmt: skip
    """The address where row n begins, and the row's label, or IGNORED or ABSENT."""
    b, t = place(n, cu_seqlens, tokens)
    row = logits + offset(b, t, logits_stride_b, logits_stride_t)
    inside = n >= 0
    if SHIFT:
        t += 1
        if cu_seqlens is None:
            inside = t < tokens
        else:
            inside = t < tl.load(cu_seqlens + sequence_of(n, cu_seqlens, n_sequences) + 1)
    label = tl.load(labels + offset(b, t, labels_stride_b, labels_stride_t), mask=inside, other=-1).to(tl.int64)
    counts = inside & (label != ignore_index)
    other = tl.where(counts & (label == ELSEWHERE), ABSENT, IGNORED)
    return row, tl.where(counts & (label >= 0) & (label < vocab), label, other).to(tl.int32)


@triton.jit
def aligned_head(row, vocab, VECTOR: tl.constexpr):
    """How many elements lie in front of the row's first aligned address."""
    return tl.minimum((-(row.to(tl.int64) // (BYTES // VECTOR))) & (VECTOR - 1), vocab).to(tl.int32)


@triton.jit
def tile_lanes(UNROLL: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """The element offsets (UNROLL, THREADS, VECTOR) of a tile: axis 1 counts the threads, and each thread holds all of
    the other two."""
    unroll = tl.arange(0, UNROLL)[:, None, None]
    thread = tl.arange(0, THREADS)[None, :, None]
    return (unroll * THREADS + thread) * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def share_of_tiles(row, vocab, split, splits, UNROLL: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """How many elements of a row lie in front of its tiles and in its tiles, and which tiles share `split` has:
    [first, last), of which [first, whole) are full."""
    TILE: tl.constexpr = UNROLL * THREADS * VECTOR
    head = aligned_head(row, vocab, VECTOR)
    length = (vocab - head) // VECTOR * VECTOR
    tiles = tl.cdiv(length, TILE)
    first = split * tiles // splits
    last = (split + 1) * tiles // splits
    return head, length, first, tl.minimum(last, length // TILE), last


@triton.jit
def edge_positions(head, length, COUNT: tl.constexpr):
    """The positions of the elements in front of a row's tiles and behind them, fewer than 2·VECTOR. Callers mask
    positions past the row's end.

    COUNT is 2·VECTOR where the elements are only read, and the number of THREADS where they are overwritten in place:
    of fewer elements than threads each is loaded by several threads, but stored by one of them, which need not wait for
    the others."""
    i = tl.arange(0, COUNT)
    return i + tl.where(i < head, 0, length)


# Stage token_logps ────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def tile_sum(values):
    return tl.sum(tl.sum(values, axis=2), axis=0)


@triton.jit
def _add_products(sum_1, a_1, b_1, sum_2, a_2, b_2):
    """sum_1 + a_1·b_1 + sum_2 + a_2·b_2, as another sum and product."""
    return tl.fma(a_2, b_2, sum_1 + sum_2), a_1, b_1


@triton.jit
def tile_sum_of_products(a, b):
    """`tile_sum(a * b)` with one instruction an element, where a product and a sum are two."""
    if INTERPRETED:
        return tile_sum(a * b)
    else:
        # Adding −0 changes no number, not even −0, and costs no instruction. (`tl.full` would make 0 of −0.)
        nothing = tl.full(a.shape, 0x80000000, tl.uint32).to(tl.float32, bitcast=True)
        sums, a, b = tl.reduce((nothing, a, b), 2, _add_products)
        sums, a, b = tl.reduce((sums, a, b), 0, _add_products)
        return multiply_add(a, b, sums)


@triton.jit
def raise_of(low, high, rate):
    """By how much (<= 0) exponents change where the origin rises from `low` to `high`, with the errors of both shifts in
    `line`. Where the slopes differ, the origins are so far apart that 2^FLOOR is as good."""
    from_slope, from_shift = line(low, rate)
    to_slope, to_shift = line(high, rate)
    return tl.where(from_slope == to_slope, to_shift - from_shift, FLOOR)


@triton.jit
def raised(sums, moments, step, ENTROPY: tl.constexpr):
    """Raises the origin: every exponent d changes by `step` <= 0 (finite with ENTROPY), and so do the sums of 2^d and, with ENTROPY, the
    moments, which are sums of 2^d·d."""
    kept = tl.exp2(step).to(sums.dtype)
    if ENTROPY:
        moments = multiply_add(sums, step, moments) * kept
    return sums * kept, moments


@triton.jit
def fold(u, running_origin, running_sum, running_moment, rate, ENTROPY: tl.constexpr):
    """Folds a tile of scores into each thread's running softmax. Only NaN or +inf among them can make it NaN, as the
    origin is finite."""
    tile_max = tl.max(tl.max(u, axis=2), axis=0)
    origin = tl.maximum(running_origin, tile_max)
    step = raise_of(running_origin, origin, rate)
    running_sum, running_moment = raised(running_sum, running_moment, step, ENTROPY)
    slope, shift = line(origin, rate)
    d = multiply_add(u, slope[None, :, None], shift[None, :, None])
    terms = tl.exp2(d)
    if ENTROPY:
        running_moment += tile_sum_of_products(terms, tl.maximum(d, FLOOR))
    return origin, running_sum + tile_sum(terms), running_moment


@triton.jit
def vectors_at(start, UNROLL: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """The addresses (UNROLL, THREADS, VECTOR) of vectors, the first of them at `start`: a thread's first vector, and then
    constants, which loads and stores take without an instruction."""
    thread = start + (tl.arange(0, THREADS)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :])
    return thread + tl.arange(0, UNROLL)[:, None, None] * (THREADS * VECTOR)


@triton.jit
def load_vectors(start, inside, EVICTION: tl.constexpr, UNROLL: tl.constexpr, THREADS: tl.constexpr,
                 VECTOR: tl.constexpr):  # fmt: skip
    """The logits (UNROLL, THREADS, VECTOR) from the aligned address `start`, in fp32; 0 where `inside`, a mask
    (1, THREADS, 1) or None, says no. A bf16 number is the upper half of an fp32 one: taken out of a word of two, it
    needs one instruction."""
    if start.dtype.element_ty == tl.bfloat16:
        words = tl.multiple_of(start.to(tl.pointer_type(tl.int32)), BYTES)
        at = vectors_at(words, UNROLL, THREADS, VECTOR // 2)
        if inside is None:
            pairs = tl.load(at, eviction_policy=EVICTION)
        else:
            pairs = tl.load(at, mask=inside, other=0, eviction_policy=EVICTION)
        low = (pairs << 16).to(tl.float32, bitcast=True)
        high = (pairs & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(low, high), (UNROLL, THREADS, VECTOR))
    else:
        at = vectors_at(tl.multiple_of(start, BYTES), UNROLL, THREADS, VECTOR)
        if inside is None:
            return tl.load(at, eviction_policy=EVICTION).to(tl.float32)
        else:
            return tl.load(at, mask=inside, other=0.0, eviction_policy=EVICTION).to(tl.float32)


@triton.jit
def softmax_share(
    row, vocab, label, split, splits, inner, rate, ENTROPY: tl.constexpr, MEAN: tl.constexpr, EVICTION: tl.constexpr,
    SOFTCAP: tl.constexpr, UNROLL: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """The softmax of share `split` of a row, without the label: (origin, sum, moment, total).

    With d = (score − origin)·rate, the sum is that of 2^d and the moment, computed with ENTROPY, that of 2^d·d. The
    total, computed with MEAN, is the sum of the share's scores, with the label's. The origin is LOWEST where there is
    no other score. The sum is fp64, the others are fp32.
    """
    TILE: tl.constexpr = UNROLL * THREADS * VECTOR
    head, length, first, whole, last = share_of_tiles(row, vocab, split, splits, UNROLL, THREADS, VECTOR)
    body = tl.multiple_of(row + head, BYTES)
    at = label - head
    label_tile = tl.where(at >= 0, at // TILE, -1)
    running_origin = tl.full((THREADS,), LOWEST, tl.float32)
    running_sum = tl.zeros((THREADS,), tl.float32)
    running_moment = tl.zeros((THREADS,), tl.float32)
    running_total = tl.zeros((THREADS,), tl.float32)
    lanes = tile_lanes(UNROLL, THREADS, VECTOR)
    if (split == 0) & (length < vocab):
        v = edge_positions(head, length, THREADS)[None, :, None]
        u = score(tl.load(row + v, mask=v < vocab, other=0.0), inner, SOFTCAP)
        if MEAN:
            running_total += tile_sum(u)
        u = tl.where((v < vocab) & (v != label), u, float("-inf"))
        running_origin, running_sum, running_moment = fold(
            u, running_origin, running_sum, running_moment, rate, ENTROPY
        )
    if (label_tile >= first) & (label_tile < whole):
        start = label_tile * TILE
        u = score(load_vectors(body + start, None, EVICTION, UNROLL, THREADS, VECTOR), inner, SOFTCAP)
        if MEAN:
            running_total += tile_sum(u)
        u = tl.where(lanes == at - start, float("-inf"), u)
        running_origin, running_sum, running_moment = fold(
            u, running_origin, running_sum, running_moment, rate, ENTROPY
        )
    for tile in range(first, whole):
        if tile != label_tile:
            u = score(load_vectors(body + tile * TILE, None, EVICTION, UNROLL, THREADS, VECTOR), inner, SOFTCAP)
            if MEAN:
                running_total += tile_sum(u)
            running_origin, running_sum, running_moment = fold(
                u, running_origin, running_sum, running_moment, rate, ENTROPY
            )
    # The last tile, where it is not full, one vector a thread at a time: a mask for a whole tile would cost registers.
    vectors = tile_lanes(1, THREADS, VECTOR)
    for start in range(whole * TILE, tl.minimum(last * TILE, length), THREADS * VECTOR):
        # The mask is one of whole vectors, so that Triton loads whole vectors.
        inside = tl.arange(0, THREADS)[None, :, None] < (length - start) // VECTOR
        u = score(load_vectors(body + start, inside, EVICTION, 1, THREADS, VECTOR), inner, SOFTCAP)
        if MEAN:
            running_total += tile_sum(u)
        u = tl.where(inside & (vectors != at - start), u, float("-inf"))
        running_origin, running_sum, running_moment = fold(
            u, running_origin, running_sum, running_moment, rate, ENTROPY
        )
    share_origin = tl.max(running_origin, axis=0)
    sums, moments = raised(running_sum, running_moment, raise_of(running_origin, share_origin, rate), ENTROPY)
    # Where there is no other score there is no sum, whatever the offset of LOWEST is.
    offset = offset_of(share_origin, rate)
    back = power_of_offset(-offset)
    share_sum = tl.sum((sums * back).to(tl.float64), axis=0)
    share_moment = tl.sum((moments - offset * sums) * back, axis=0)
    return share_origin, share_sum, share_moment, tl.sum(running_total, axis=0)


@triton.jit
def merge(shares, splits, rate, MAX_SPLITS: tl.constexpr):
    """The statistics (origin, sum) of a row, merged from its shares' statistics in the order of the shares."""
    i = tl.arange(0, MAX_SPLITS)
    # .cg: other programs have written the shares, so that this processor's own cache may be stale.
    share_origin = tl.load(shares + 2 * i, mask=i < splits, other=LOWEST, cache_modifier=".cg")
    share_sum = tl.load(shares + 2 * i + 1, mask=i < splits, other=0.0, cache_modifier=".cg")
    row_origin = tl.max(share_origin, axis=0)
    sums, _ = raised(share_sum, share_sum, (share_origin - row_origin) * rate, False)
    return row_origin, tl.sum(sums.to(tl.float64), axis=0)


@triton.jit
def score_row(
    row, label, number, split, splits, vocab, inner, outer, rate, shares, arrivals,
    SOFTCAP: tl.constexpr, MAX_SPLITS: tl.constexpr, UNROLL: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """Scores a row, or this program's share of it. Returns the label's log-probability, the row's statistics (origin,
    sum), and whether this program is the last of the row's programs: only then are the other three valid. `number` is
    the row's number among the rows of all sets."""
    outer = tl.full((), outer, tl.float64)
    rate = tl.full((), rate, tl.float32)
    inner = tl.full((), inner, tl.float32)
    finished = split == 0  # an ignored row costs no pass over its logits
    logp = tl.full((), 0.0, tl.float64)
    all_origin = tl.full((), 0.0, tl.float32)
    all_sum = all_origin
    if label != IGNORED:
        row_origin, row_sum, _, _ = softmax_share(
            row, vocab, label, split, splits, inner, rate, False, False, "evict_first", SOFTCAP, UNROLL, THREADS, VECTOR
        )
        if splits > 1:
            share = shares + 2 * (number * splits + split)
            tl.store(share, row_origin)
            tl.store(share + 1, row_sum.to(tl.float32))
            tl.debug_barrier()
            finished = tl.atomic_add(arrivals + 1 + number, 1, sem="acq_rel") == splits - 1
            if finished:
                tl.store(arrivals + 1 + number, 0)
                row_origin, row_sum = merge(shares + 2 * number * splits, splits, rate, MAX_SPLITS)
        if finished:
            y = score(tl.load(row + tl.maximum(label, 0)), inner, SOFTCAP)
            y = tl.where(label < 0, float("-inf"), y)
            logp, all_origin, all_sum, _, _, _ = label_logp(row_origin, row_sum, y, outer)
    return logp, all_origin, all_sum, finished


# The gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def gradient_of(x, slope, shift, factor, inner, SOFTCAP: tl.constexpr):
    """−g·p·dz/dx, the gradient at logits that are not the label's."""
    u = score(x, inner, SOFTCAP)
    gradient = tl.exp2(multiply_add(u, slope, shift)) * factor
    if SOFTCAP:
        gradient = gradient * multiply_add(-u, u, 1.0)
    return gradient


@triton.jit
def write_gradient(
    row, out_row, label, upstream, logp, row_origin, row_sum, split, splits, vocab, inner, outer, rate,
    IN_PLACE: tl.constexpr, EVICTION: tl.constexpr, SOFTCAP: tl.constexpr, UNROLL: tl.constexpr, THREADS: tl.constexpr,
    VECTOR: tl.constexpr
):  # fmt: skip
    """Writes `upstream · ∂ℓ/∂logits` of a row or of a share of it, computed from the label's log-probability and the
    row's statistics (origin, sum), in fp32. `upstream` is fp64. `out_row` may be the row itself, as with IN_PLACE it
    is known to be: then no loop of unaligned loads is compiled, whose registers would spill beside the others."""
    TILE: tl.constexpr = UNROLL * THREADS * VECTOR
    dtype: tl.constexpr = out_row.dtype.element_ty
    # Stores are aligned. Loads are too where the row begins at as aligned an address, as it does in place.
    head, length, first, whole, last = share_of_tiles(out_row, vocab, split, splits, UNROLL, THREADS, VECTOR)
    out_body = tl.multiple_of(out_row + head, BYTES)
    body = row + head
    aligned_body = tl.multiple_of(row + head, BYTES)
    if IN_PLACE:
        aligned: tl.constexpr = True
    else:
        aligned = (body.to(tl.int64) & (BYTES - 1)) == 0
    lanes = tile_lanes(UNROLL, THREADS, VECTOR)
    vectors = tile_lanes(1, THREADS, VECTOR)
    has_edge = (split == 0) & (length < vocab)
    label_at = label - head
    in_tiles = (label_at >= first * TILE) & (label_at < tl.minimum(last * TILE, length))
    mine = (label >= 0) & (
        in_tiles | (has_edge & ((label_at < 0) | (label_at >= length)))
    )  # the label's element is in this share

    # dz/dx, times 1 − u² under a softcap; rounded only after all factors, so that no product of some of them vanishes.
    upstream = (upstream * tl.full((), outer, tl.float64) * inner).to(tl.float32)
    rate = tl.full((), rate, tl.float32)
    inner = tl.full((), inner, tl.float32)
    origin = tl.where(row_origin == float("-inf"), 0.0, row_origin)
    slope, shift = line(origin, rate)
    factor = -upstream / tl.where(row_sum == 0.0, 1.0, row_sum) * power_of_offset(-offset_of(origin, rate))
    # 1 − p is computed from the log-probability: rounding p first would lose its digits for near-certain tokens.
    entry = upstream * -expm1(logp)
    if SOFTCAP:
        # In place, the program that has the label overwrites its logit: no other may read it.
        y = score(tl.load(row + label, mask=mine, other=0.0), inner, SOFTCAP)
        entry = entry * ((1.0 - y) * (1.0 + y))
    tl.debug_barrier()  # in place, a thread may overwrite the label's logit: all have read it by now
    # From the row's end to its beginning: what was read last is the most likely to be in the cache still.
    if has_edge:
        v = edge_positions(head, length, THREADS)
        x = tl.load(row + v, mask=v < vocab, other=0.0)
        gradient = gradient_of(x, slope, shift, factor, inner, SOFTCAP)
        tl.store(out_row + v, narrow(gradient, dtype), mask=v < vocab)
    for start in range(whole * TILE, tl.minimum(last * TILE, length), THREADS * VECTOR):
        inside = tl.arange(0, THREADS)[None, :, None] < (length - start) // VECTOR
        if aligned:
            # With another policy than below: else the compiler joins the two loads into one that is as narrow as that.
            x = load_vectors(aligned_body + start, inside, "evict_first", 1, THREADS, VECTOR)
        else:
            x = tl.load(body + start + vectors, mask=inside, other=0.0).to(tl.float32)
        gradient = gradient_of(x, slope, shift, factor, inner, SOFTCAP)
        tl.store(out_body + start + vectors, narrow(gradient, dtype), mask=inside)
    if aligned:
        for tile in range(first, whole):
            start = (first + whole - 1 - tile) * TILE
            x = load_vectors(aligned_body + start, None, EVICTION, UNROLL, THREADS, VECTOR)
            gradient = gradient_of(x, slope, shift, factor, inner, SOFTCAP)
            at = vectors_at(tl.multiple_of(out_body + start, BYTES), UNROLL, THREADS, VECTOR)
            tl.store(at, narrow(gradient, dtype))
    else:
        for tile in range(first, whole):
            start = (first + whole - 1 - tile) * TILE
            x = tl.load(body + start + lanes)
            gradient = gradient_of(x, slope, shift, factor, inner, SOFTCAP)
            at = vectors_at(tl.multiple_of(out_body + start, BYTES), UNROLL, THREADS, VECTOR)
            tl.store(at, narrow(gradient, dtype))
    if mine:
        tl.debug_barrier()  # after −g·p, which this program has written there
        tl.store(out_row + label, narrow(entry, dtype))
