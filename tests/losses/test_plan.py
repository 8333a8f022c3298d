"""The plan of the chunks: what every plan must hold, and why each decision falls as it does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kto_kernels import LinearPlan
from kto_kernels.linear.schedule import Task

V, H = 1000, 8
ROW = 4 * V  # bytes of a row of fp32 logits


def plan(lengths, rows=None, dtype=torch.float32, **options):
    """In fp32 chunks of `rows`, or automatic."""
    budget = None if rows is None else rows * dtype.itemsize * options.get("vocab", V)
    vocab, hidden = options.pop("vocab", V), options.pop("hidden", H)
    return LinearPlan.of(lengths, vocab, hidden, dtype, max_logits_bytes=budget, device="cpu", **options)


sequences = st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=12)


@settings(max_examples=500, deadline=None)
@given(
    sequences=sequences,
    ranks=st.booleans(),
    rows=st.integers(1, 60),
    long_sequences=st.sampled_from(["auto", "defer", "recompute"]),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    known=st.booleans(),
)
def test_every_plan_covers_each_row_once_within_its_budget(sequences, ranks, rows, long_sequences, needs, known):
    """`sequences`: (length, whether it has tokens on other ranks, if there are any)."""
    hidden, weight, bias, adapter = needs
    known = known and any(needs)
    bound = (weight or bias or adapter) and not known
    lengths = [length for length, _ in sequences]
    elsewhere = {i for i, (length, is_open) in enumerate(sequences) if ranks and is_open and length}
    p = plan(
        lengths, rows, needs_hidden=hidden, needs_weight=weight, needs_bias=bias, known_coefficients=known,
        adapter_rank=int(adapter), long_sequences=long_sequences, balance=2, open_sequences=[i in elsewhere for i in range(len(lengths))] if ranks else None,
    )  # fmt: skip
    total, ends = sum(lengths), [sum(lengths[: i + 1]) for i in range(len(lengths))]
    scored, formed = [0] * total, [0] * total
    apart = set()  # sequences with rows in a dW of their own
    exchanged, in_buffer, heads, closed = False, 0, 1, False
    for chunk in p.chunks:
        if chunk.task is Task.EXCHANGE:
            assert bound and ranks and not exchanged
            assert all(scored)  # the sums are whole
            exchanged, in_buffer = True, 0
            heads = max(heads, closed + len(apart))
            assert apart <= elsewhere
            apart.clear()
            continue
        in_buffer += chunk.rows
        assert chunk.rows > 0 and in_buffer <= min(rows, p.buffer_rows)
        first, last = chunk.sequences
        assert first < last <= len(lengths)
        # The rows are of the sequences that the chunk says.
        begin = ends[first] - lengths[first]
        assert begin <= chunk.start and chunk.stop <= ends[last - 1]
        rows_of = {i: (ends[i] - lengths[i], ends[i]) for i in range(first, last) if lengths[i]}
        here = {i for i, (start, stop) in rows_of.items() if stop > chunk.start and start < chunk.stop}
        for n in range(chunk.start, chunk.stop):
            scored[n] += chunk.task is not Task.RECOMPUTE or known
            formed[n] += chunk.task is not Task.SCORE
        if bound:
            # Gradients of what is open on other ranks wait for the exchange, and nothing else does.
            if chunk.task is Task.KEEP or exchanged:
                assert here <= elsewhere
            if chunk.task is Task.CLOSE:
                assert not here & elsewhere
            assert (chunk.task is Task.RECOMPUTE) or not exchanged
        if chunk.task is Task.DEFER:
            assert last == first + 1
            apart.add(first)
            assert len(apart - elsewhere) <= 1  # one open sequence at a time
            heads = max(heads, closed + len(apart))
        if chunk.task is Task.CLOSE and bound:
            # The coefficients of all of its rows are known: every row of these sequences is scored by now.
            assert chunk.stop == ends[last - 1]
            assert all(scored[n] for n in range(begin, ends[last - 1]))
            assert apart <= {first}
            apart.clear()
            closed = True
        if chunk.task is Task.RECOMPUTE and not known:
            assert all(scored[n] for n in range(begin, ends[last - 1]))
        if chunk.task is not Task.KEEP:
            in_buffer -= chunk.rows
    assert not apart
    assert exchanged == (bound and ranks)
    assert all(count == 1 for count in scored)
    assert all(count == int(any(needs)) for count in formed if any(needs))
    extra = sum(chunk.rows for chunk in p.chunks) - total
    if not adapter:
        assert p.gemm_units * total == pytest.approx(total * (1 + hidden + weight) + extra)
    spread = sum(lengths[i] for i in elsewhere)
    if long_sequences == "defer" or not bound or (long_sequences == "auto" and not weight):
        assert extra == 0
    else:
        alone = sum(max(0, length - rows) for i, length in enumerate(lengths) if i not in elsewhere)
        assert extra <= alone + max(0, spread - rows)
    if adapter:
        sums = p.bytes["adapter gradient"] + p.bytes.get("deferred adapter gradient", 0)
        assert sums == heads * 4 * (V + H)
    if weight:
        assert p.bytes["weight gradient"] + p.bytes.get("deferred weight gradient", 0) == heads * 4 * V * H
    late = [i for i, _ in p.deferred] + [i for i, _ in p.recomputed]
    assert len(late) == len(set(late))
    assert set(late) - elsewhere == (
        {i for i, length in enumerate(lengths) if length > rows and i not in elsewhere} if bound else set()
    )
    if not bound or spread <= rows:
        assert not set(late) & elsewhere
    if long_sequences == "auto" and weight:
        assert len({i for i, _ in p.deferred} & elsewhere) <= 1


def test_a_budget_that_holds_no_row_says_how_much_it_takes():
    with pytest.raises(ValueError, match=r"max_logits_bytes: expected at least 4000 .*1000 × 4 bytes.*got 3999"):
        LinearPlan.of([3], V, H, torch.float32, max_logits_bytes=ROW - 1, device="cpu")
    assert LinearPlan.of([3], V, H, torch.float32, max_logits_bytes=ROW, device="cpu").chunk_rows == 1


def test_the_faster_way_for_a_long_sequence():
    # A pass over a second dW costs 6·balance = 60 rows of a GEMM.
    p = plan([159, 161, 99, 1], 100, balance=10)
    assert [i for i, _ in p.recomputed] == [0] and [i for i, _ in p.deferred] == [1]
    assert "59 of them before the last chunk" in p.recomputed[0][1] and "60 rows" in p.recomputed[0][1]
    # A second bias gradient costs nothing.
    p = plan([159, 161], 100, balance=10, needs_weight=False, needs_bias=True)
    assert len(p.deferred) == 2
    # A forced one is forced.
    assert len(plan([159, 161], 100, balance=10, long_sequences="defer").deferred) == 2
    assert len(plan([159, 161], 100, balance=10, long_sequences="recompute").recomputed) == 2


def test_a_second_dw_only_for_a_second_deferred_sequence():
    one = plan([500, 20, 30], 100, long_sequences="defer")
    two = plan([500, 20, 300], 100, long_sequences="defer")
    assert "deferred weight gradient" not in one.bytes
    assert two.bytes["deferred weight gradient"] == 4 * V * H


def test_sequences_open_on_other_ranks():
    """One chunk of their rows waits; beyond that the longest is deferred, where a pass over its dW is cheaper than the
    rows that would be recomputed, and the others are recomputed."""
    everywhere = {"open_sequences": [True] * 3, "balance": 10}  # a pass costs 60 rows
    small = plan([40, 30, 30], 100, **everywhere)
    assert [chunk.task for chunk in small.chunks] == [Task.KEEP, Task.EXCHANGE] and small.gemm_units == 3
    one = plan([500, 0, 0], 100, **everywhere)
    assert [i for i, _ in one.deferred] == [0] and one.gemm_units == 3
    assert "deferred weight gradient" not in one.bytes and one.kept_rows == 0
    more = plan([90, 500, 300], 100, **everywhere)
    assert [i for i, _ in more.deferred] == [1] and [i for i, _ in more.recomputed] == [0, 2]
    assert more.gemm_units == pytest.approx(3 + 290 / 890) and more.kept_rows == 100
    assert "deferred weight gradient" not in more.bytes
    assert "300 rows, 200 of them before the last chunk, open on other ranks" in dict(more.recomputed)[2]
    cheap = plan([40, 40, 79], 100, **everywhere)  # 59 rows
    assert not cheap.deferred and cheap.gemm_units == pytest.approx(3 + 59 / 159)
    every = plan([90, 500, 300], 100, long_sequences="defer", **everywhere)
    assert [i for i, _ in every.deferred] == [1, 2] and every.gemm_units == 3 and every.kept_rows == 90
    assert every.bytes["deferred weight gradient"] == 4 * V * H
    none = plan([90, 500, 300], 100, long_sequences="recompute", **everywhere)
    assert not none.deferred and none.gemm_units == pytest.approx(3 + 790 / 890)
    # A cut through packed sequences opens two of them: the others end here as ever.
    cut = plan([70, 30, 60, 40, 20], 100, open_sequences=[True, False, False, False, True])
    assert [(chunk.task, chunk.start, chunk.stop) for chunk in cut.chunks] == [
        (Task.CLOSE, 70, 160),
        (Task.CLOSE, 160, 200),
        (Task.KEEP, 0, 70),
        (Task.KEEP, 200, 220),
        (Task.EXCHANGE, 0, 0),
    ]
    assert cut.buffer_rows == 90 and cut.gemm_units == 3
    # A rank without a token takes part.
    assert [chunk.task for chunk in plan([0, 0], 100, open_sequences=[False, False]).chunks] == [Task.EXCHANGE]


def test_chunks_grow_where_that_takes_no_memory():
    wide = {"vocab": 16000, "hidden": 4096}
    base = plan([100] * 100, dtype=torch.bfloat16, balance=20, **wide).chunk_rows
    assert base == 384  # 16·balance, in multiples of 128
    # One bf16 dW in one piece instead of an fp32 sum and its rounding: everything at once takes less memory.
    everything = plan([100] * 20, dtype=torch.bfloat16, balance=20, **wide)
    assert everything.chunk_rows == 2000 and len(everything.chunks) == 1
    assert everything.weight_gradient_dtype == torch.bfloat16
    # A narrow head: the logits of everything would be more than they save.
    assert plan([100] * 20, dtype=torch.bfloat16, balance=20, hidden=64).chunk_rows == 384
    # The longest sequence inside a chunk instead of a second dW.
    assert plan([1000, 1000] + [10] * 1000, balance=20, **wide).chunk_rows == 1000


def test_the_bytes_are_what_the_buffers_hold():
    p = plan([60, 40], 50, hidden=16, hidden_rows=200, needs_bias=True, long_sequences="defer")
    assert p.bytes == {
        "logits": 50 * V * 4,
        "chunk of hidden": 50 * 16 * 4,
        "hidden gradient": 200 * 16 * 4,
        "weight gradient": V * 16 * 4,
    }
    assert p.peak_bytes == sum(p.bytes.values())
    half = plan([60, 40], 50, torch.bfloat16, hidden=16)
    assert half.bytes["weight gradient"] == V * 16 * 4 and half.bytes["rounded weight gradient"] == V * 16 * 2
    mixed = plan([60], 100, torch.bfloat16, hidden=16, weight_dtype=torch.float32, hidden_dtype=torch.float32)
    assert mixed.bytes["head in the GEMMs' dtype"] == V * 16 * 2
    assert mixed.bytes["hidden gradient"] == 60 * 16 * 4 and "rounded weight gradient" not in mixed.bytes


def test_a_plan_says_itself_in_words():
    text = repr(plan([300, 40], 100, long_sequences="defer"))
    assert "340 rows × V=1,000, H=8, float32" in text and "3.00 G" in text
    assert "sequence 0 deferred: 300 rows, 200 of them before the last chunk" in text
    assert "logits" in text and "KiB" in text
    text = repr(plan([300, 140], 100, open_sequences=[True, True], long_sequences="defer"))
    assert "440 rows × V=1,000, H=8, float32: 5 chunks" in text and "3.00 G" in text
    assert "sequence 1 deferred: 140 rows, 40 of them before the last chunk, open on other ranks" in text
    text = repr(plan([30, 14], 100, open_sequences=[True, False]))
    assert "30 rows wait in the logits' buffer" in text
