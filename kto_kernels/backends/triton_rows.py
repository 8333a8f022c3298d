"""What the Triton kernels do to one row of logits or to a share of it: find it and its label, take its softmax, write
its gradient.

The logits are read in tiles of UNROLL vectors of 16 bytes a thread, all loaded before the first is used. A row may
start anywhere: tiles begin at its first aligned address, and the few elements in front of it and behind the last whole
vector (the edge) are read apart. Everything vocabulary-sized is fp32, everything per token fp64.
"""

# No `from __future__ import annotations`: Triton reads the parameters' annotations.
import inspect

import triton
import triton.language as tl

from .. import rows

ELSEWHERE = tl.constexpr(rows.ELSEWHERE)
IGNORED = tl.constexpr(-1)  # what find_row says instead of a label: nothing scores the row
ABSENT = tl.constexpr(-2)  # its label is elsewhere, so that its logit counts as −inf here
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a running maximum's start: finite, so that −inf − maximum is no NaN
FLOOR = tl.constexpr(-200.0)  # 2^FLOOR is 0 in fp32, and unlike 2^−inf · −inf it stays so times its exponent
BYTES = tl.constexpr(16)  # of one vector load


def kernel(fn):
    """`triton.jit` without specialisation: no other β, batch or alignment compiles anything anew."""
    parameters = inspect.signature(fn).parameters.values()
    run_time = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(fn, do_not_specialize=run_time)


# Formulas ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def widen(x):
    """fp64; bf16 by way of fp32, the only conversion the interpreter knows from it."""
    return x.to(tl.float32).to(tl.float64) if x.dtype == tl.bfloat16 else x.to(tl.float64)


@triton.jit
def narrow(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 `x` in `dtype`, rounded to nearest even; by hand for bf16 in the interpreter, which would truncate."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def difference(a, b):
    """`a − b`, where two equal infinities leave −inf (saturated) instead of NaN."""
    return tl.where((a == b) & (tl.abs(a) == float("inf")), float("-inf"), a - b)


@triton.jit
def log1p(x):
    """fp64, x >= 0: the rounding of 1 + x is given back."""
    u = 1.0 + x
    return tl.log(u) + (x - (u - 1.0)) / u


@triton.jit
def expm1(x):
    """fp64, x <= 0: `(u − 1)·x / log u` for u = exp(x) rounds as u did."""
    u = tl.exp(x)
    ratio = (u - 1.0) * (x / tl.where((u == 1.0) | (u == 0.0), -1.0, tl.log(u)))
    return tl.where(u == 1.0, x, tl.where(x < -1.0, u - 1.0, ratio))


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


@triton.jit
def tanh(x):
    """fp32, to a few ulp near 0 too: a polynomial below 0.625 (Cephes' tanhf), an exponential above."""
    a = tl.abs(x)
    outer = 1.0 - 2.0 / (tl.exp2(a * (2.0 * LOG2E)) + 1.0)
    z = x * x
    series = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    inner = x + x * z * (series - 3.33332819422e-1)
    return tl.where(a < 0.625, inner, tl.where(x < 0, -outer, outer))


@triton.jit
def score(x, inner, SOFTCAP: tl.constexpr):
    """The score u of a logit, in fp32; z = scale·u."""
    u = x.to(tl.float32)
    if SOFTCAP:
        u = tanh(u * inner)
    return u


@triton.jit
def decay(u, maximum, scale):
    """exp(scale·(u − maximum)) for u <= maximum; 0 for u = −inf even where the maximum is −inf too."""
    return tl.where(u == float("-inf"), 0.0, tl.exp(scale * (u - maximum)))


@triton.jit
def label_logp(others_max, others_sum, y, scale):
    """Stage token_logps: log-probability of the label with score y, given the softmax of all *other* scores, and the
    (max, sum) of all. Leaving the label out keeps log1p exact where the label is the maximum, which is most tokens of
    a good completion. fp64."""
    y = y.to(tl.float64)
    others_max = tl.where(others_sum == 0.0, float("-inf"), others_max.to(tl.float64))
    top = tl.maximum(others_max, y)
    others = others_sum * decay(others_max, top, scale)
    own = decay(y, top, scale)
    beside = tl.where(y >= others_max, others, others + (own - 1.0))
    logp = (y - top) * scale - log1p(beside)
    logp = tl.where(y == float("-inf"), float("-inf"), logp)
    undefined = (others_sum != others_sum) | (y != y) | (y == float("inf"))
    return tl.where(undefined, float("nan"), logp), top, others + own


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
    """Row n's (batch, token) index: (0, n) in the packed layout."""
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
    """Where row n begins, and its label, IGNORED or ABSENT."""
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
    """A tile's element offsets (UNROLL, THREADS, VECTOR): axis 1 is spread over threads, the others stay inside one."""
    unroll = tl.arange(0, UNROLL)[:, None, None]
    thread = tl.arange(0, THREADS)[None, :, None]
    return (unroll * THREADS + thread) * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def share_of_tiles(row, vocab, split, splits, UNROLL: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """How many elements lie in front of a row's tiles and in them, and share `split` of the tiles: the full ones are
    [first, whole), and where whole < last one more follows."""
    TILE: tl.constexpr = UNROLL * THREADS * VECTOR
    head = aligned_head(row, vocab, VECTOR)
    length = (vocab - head) // VECTOR * VECTOR
    tiles = tl.cdiv(length, TILE)
    first = split * tiles // splits
    last = (split + 1) * tiles // splits
    return head, length, first, tl.minimum(last, length // TILE), last


@triton.jit
def edge_positions(head, length, VECTOR: tl.constexpr):
    """Positions of the elements in front of the tiles and behind them; those past the row's end are masked off."""
    i = tl.arange(0, 2 * VECTOR)
    return i + tl.where(i < head, 0, length)


# Stage token_logps ────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def tile_sum(values):
    return tl.sum(tl.sum(values, axis=2), axis=0)


@triton.jit
def lowered(sums, moments, shift, ENTROPY: tl.constexpr):
    """Sums of 2^d, and with ENTROPY of 2^d·d, once every d has grown by `shift` <= 0."""
    kept = tl.exp2(shift).to(sums.dtype)
    if ENTROPY:
        moments = (moments + sums * tl.maximum(shift, FLOOR)) * kept
    return sums * kept, moments


@triton.jit
def fold(u, running_max, running_sum, running_moment, rate, ENTROPY: tl.constexpr):
    """Adds a tile of scores to each thread's running softmax. No NaN but from NaN or +inf: the maximum is finite."""
    tile_max = tl.max(tl.max(u, axis=2), axis=0)
    new_max = tl.maximum(running_max, tile_max)
    d = (u - new_max[None, :, None]) * rate
    terms = tl.exp2(d)
    kept_sum, running_moment = lowered(running_sum, running_moment, (running_max - new_max) * rate, ENTROPY)
    if ENTROPY:
        running_moment += tile_sum(terms * tl.maximum(d, FLOOR))
    return new_max, kept_sum + tile_sum(terms), running_moment


@triton.jit
def softmax_share(
    row, vocab, label, split, splits, inner, rate, ENTROPY: tl.constexpr, MEAN: tl.constexpr, EVICTION: tl.constexpr,
    SOFTCAP: tl.constexpr, UNROLL: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """(max, sum, moment) over share `split` of the row's scores but the label's, (LOWEST, 0, 0) where there is none:
    with d = (score − max)·rate, the sum of 2^d and, for ENTROPY, of 2^d·d. Last, for MEAN, the sum of all its scores.
    fp64 but for the maximum."""
    TILE: tl.constexpr = UNROLL * THREADS * VECTOR
    head, length, first, whole, last = share_of_tiles(row, vocab, split, splits, UNROLL, THREADS, VECTOR)
    body = tl.multiple_of(row + head, BYTES)
    at = label - head
    label_tile = tl.where(at >= 0, at // TILE, -1)
    running_max = tl.full((THREADS,), LOWEST, tl.float32)
    running_sum = tl.zeros((THREADS,), tl.float32)
    running_moment = tl.zeros((THREADS,), tl.float32)
    running_total = tl.zeros((THREADS,), tl.float32)
    lanes = tile_lanes(UNROLL, THREADS, VECTOR)
    if (label_tile >= first) & (label_tile < whole):
        start = label_tile * TILE
        u = score(tl.load(body + start + lanes, eviction_policy=EVICTION), inner, SOFTCAP)
        if MEAN:
            running_total += tile_sum(u)
        u = tl.where(lanes == at - start, float("-inf"), u)
        running_max, running_sum, running_moment = fold(u, running_max, running_sum, running_moment, rate, ENTROPY)
    for tile in range(first, whole):
        if tile != label_tile:
            u = score(tl.load(body + tile * TILE + lanes, eviction_policy=EVICTION), inner, SOFTCAP)
            if MEAN:
                running_total += tile_sum(u)
            running_max, running_sum, running_moment = fold(u, running_max, running_sum, running_moment, rate, ENTROPY)
    # The last tile where it is not full, one vector a thread at a time: masks cost registers.
    vectors = tile_lanes(1, THREADS, VECTOR)
    for start in range(whole * TILE, tl.minimum(last * TILE, length), THREADS * VECTOR):
        # The mask in whole vectors, so that the loads stay vectors.
        inside = vectors // VECTOR < (length - start) // VECTOR
        u = score(tl.load(body + start + vectors, mask=inside, other=0.0, eviction_policy=EVICTION), inner, SOFTCAP)
        if MEAN:
            running_total += tile_sum(u)
        u = tl.where(inside & (vectors != at - start), u, float("-inf"))
        running_max, running_sum, running_moment = fold(u, running_max, running_sum, running_moment, rate, ENTROPY)
    share_max = tl.max(running_max, axis=0)
    shift = (running_max - share_max) * rate
    sums, moments = lowered(running_sum.to(tl.float64), running_moment.to(tl.float64), shift, ENTROPY)
    share_sum, share_moment = tl.sum(sums, axis=0), tl.sum(moments, axis=0)
    share_total = tl.sum(running_total.to(tl.float64), axis=0)
    if (split == 0) & (length < vocab):
        v = edge_positions(head, length, VECTOR)
        u = score(tl.load(row + v, mask=v < vocab, other=0.0), inner, SOFTCAP)
        if MEAN:
            share_total += tl.sum(u.to(tl.float64), axis=0)
        u = tl.where((v < vocab) & (v != label), u, float("-inf"))
        top = tl.maximum(share_max, tl.max(u, axis=0))
        d = (u - top) * rate
        terms = tl.exp2(d).to(tl.float64)
        share_sum, share_moment = lowered(share_sum, share_moment, (share_max - top) * rate, ENTROPY)
        share_sum += tl.sum(terms, axis=0)
        if ENTROPY:
            share_moment += tl.sum(terms * tl.maximum(d, FLOOR), axis=0)
        share_max = top
    return share_max, share_sum, share_moment, share_total


@triton.jit
def merge_shares(shares, splits, rate, MAX_SPLITS: tl.constexpr):
    """(max, sum) of a row from those of its shares, in their order."""
    i = tl.arange(0, MAX_SPLITS)
    # .cg: other programs wrote them, so never out of this processor's own cache.
    share_max = tl.load(shares + 2 * i, mask=i < splits, other=LOWEST, cache_modifier=".cg").to(tl.float32)
    share_sum = tl.load(shares + 2 * i + 1, mask=i < splits, other=0.0, cache_modifier=".cg")
    row_max = tl.max(share_max, axis=0)
    sums, _ = lowered(share_sum, share_sum, (share_max - row_max) * rate, False)
    return row_max, tl.sum(sums, axis=0)


@triton.jit
def score_row(
    row, label, unit, split, splits, vocab, inner, scale, shares, arrivals,
    SOFTCAP: tl.constexpr, MAX_SPLITS: tl.constexpr, UNROLL: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """Scores a row, or this program's share of it: the label's log-probability, (max, sum) of the row's softmax, and
    whether this program is the row's last, which alone knows them. `unit` numbers rows over all sets."""
    scale = tl.full((), scale, tl.float64)
    rate = (scale * LOG2E).to(tl.float32)
    inner = tl.full((), inner, tl.float32)
    finished = split == 0  # an ignored row costs no pass over its logits
    logp = tl.full((), 0.0, tl.float64)
    all_max = logp
    all_sum = logp
    if label != IGNORED:
        row_max, row_sum, _, _ = softmax_share(
            row, vocab, label, split, splits, inner, rate, False, False, "evict_first", SOFTCAP, UNROLL, THREADS, VECTOR
        )
        if splits > 1:
            share = shares + 2 * (unit * splits + split)
            tl.store(share, row_max.to(tl.float64))
            tl.store(share + 1, row_sum)
            tl.debug_barrier()
            finished = tl.atomic_add(arrivals + 1 + unit, 1, sem="acq_rel") == splits - 1
            if finished:
                tl.store(arrivals + 1 + unit, 0)
                row_max, row_sum = merge_shares(shares + 2 * unit * splits, splits, rate, MAX_SPLITS)
        if finished:
            y = score(tl.load(row + tl.maximum(label, 0)), inner, SOFTCAP)
            y = tl.where(label < 0, float("-inf"), y)
            logp, all_max, all_sum = label_logp(row_max, row_sum, y, scale)
    return logp, all_max, all_sum, finished


# The gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def gradient_of(x, reference, factor, inner, rate, SOFTCAP: tl.constexpr):
    """−g·p·dz/dx of some logits; the label's is another."""
    u = score(x, inner, SOFTCAP)
    gradient = tl.exp2((u - reference) * rate) * factor
    if SOFTCAP:
        gradient = gradient * (1.0 - u * u)
    return gradient


@triton.jit
def write_gradient(
    row, out_row, label, upstream, logp, row_max, row_sum, split, splits, vocab, inner, scale,
    SOFTCAP: tl.constexpr, UNROLL: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """`upstream · ∂ℓ/∂logits` of a row or of a share of it, from the label's log-probability and the softmax's (max,
    sum); `out_row` may be the row itself."""
    TILE: tl.constexpr = UNROLL * THREADS * VECTOR
    dtype: tl.constexpr = out_row.dtype.element_ty
    # Stores are aligned; loads too where the gradient lies as the logits do, which it does in place.
    head, length, first, whole, last = share_of_tiles(out_row, vocab, split, splits, UNROLL, THREADS, VECTOR)
    out_body = tl.multiple_of(out_row + head, BYTES)
    body = row + head
    aligned_body = tl.multiple_of(row + head, BYTES)
    aligned = (body.to(tl.int64) & (BYTES - 1)) == 0
    lanes = tile_lanes(UNROLL, THREADS, VECTOR)
    vectors = tile_lanes(1, THREADS, VECTOR)
    has_edge = (split == 0) & (length < vocab)

    z_scale = tl.full((), scale, tl.float64)
    rate = (z_scale * LOG2E).to(tl.float32)
    u_inner = tl.full((), inner, tl.float32)
    reference = tl.where(row_max == float("-inf"), 0.0, row_max.to(tl.float32))
    upstream = upstream * z_scale * inner  # dz/dx, times 1 − u² under a softcap
    factor = (-upstream / tl.where(row_sum == 0.0, 1.0, row_sum)).to(tl.float32)
    # 1 − p from the log-probability: rounding p first would lose every near-certain token.
    entry = upstream * -expm1(logp)
    if SOFTCAP:
        y = score(tl.load(row + tl.maximum(label, 0)), u_inner, SOFTCAP).to(tl.float64)
        entry = entry * (1.0 - y * y)
    tl.debug_barrier()  # in place: every thread has read what it must of the logits before one overwrites them
    # From the end to the beginning: what was read last is the likeliest to be in the cache still.
    if has_edge:
        v = edge_positions(head, length, VECTOR)
        x = tl.load(row + v, mask=v < vocab, other=0.0)
        gradient = gradient_of(x, reference, factor, u_inner, rate, SOFTCAP)
        tl.store(out_row + v, narrow(gradient, dtype, INTERPRETED), mask=v < vocab)
    for start in range(whole * TILE, tl.minimum(last * TILE, length), THREADS * VECTOR):
        inside = vectors // VECTOR < (length - start) // VECTOR
        if aligned:
            x = tl.load(aligned_body + start + vectors, mask=inside, other=0.0, eviction_policy="evict_first")
        else:
            x = tl.load(body + start + vectors, mask=inside, other=0.0)
        gradient = gradient_of(x, reference, factor, u_inner, rate, SOFTCAP)
        tl.store(out_body + start + vectors, narrow(gradient, dtype, INTERPRETED), mask=inside)
    for tile in range(first, whole):
        start = (first + whole - 1 - tile) * TILE
        if aligned:
            x = tl.load(aligned_body + start + lanes, eviction_policy="evict_first")
        else:
            x = tl.load(body + start + lanes)
        gradient = gradient_of(x, reference, factor, u_inner, rate, SOFTCAP)
        tl.store(out_body + start + lanes, narrow(gradient, dtype, INTERPRETED))
    at = label - head
    in_tiles = (at >= first * TILE) & (at < tl.minimum(last * TILE, length))
    if (label >= 0) & (in_tiles | (has_edge & ((at < 0) | (at >= length)))):  # the program that wrote −g·p there
        tl.debug_barrier()
        tl.store(out_row + label, narrow(entry.to(tl.float32), dtype, INTERPRETED))
