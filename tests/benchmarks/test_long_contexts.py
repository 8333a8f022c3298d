"""Out of memory and out of time are results, and long contexts go on until a peer fails."""

import pytest

from benchmarks import (
    linear,
    linear_peers,
    longcontext,
    measure,
    peers,
    report,
)
from benchmarks.shapes import Shape


def test_out_of_memory_is_a_result():
    """Two processes that may take 160 MiB: ours goes through where the naive logits do not fit."""
    shape = Shape(1024, 16, 32768, sequences=1)
    options = {"dtype": "fp32", "head": linear.TRAINED, "limit": 160 * 2**20, "repeats": 2, "cap": 60.0}
    ours, naive = (linear.point(name, shape, **options) for name in ("linear_kto_loss, cpu", peers.NAIVE))
    assert naive == {"peak extra bytes": None, "seconds": None, "failed": "out of memory"}
    assert ours["failed"] is None and ours["seconds"] > 0 and ours["peak extra bytes"] < 160 * 2**20


def test_a_process_over_its_time_is_a_result():
    with pytest.raises(measure.Failed, match="over the cap of 0 s"):
        measure.in_fresh_process("benchmarks.linear", {}, timeout=0.01)


def test_long_contexts_go_on_until_a_peer_fails(monkeypatch):
    """A peer that ran out of memory, or would run out of time, is not run on what is longer."""
    seconds = {"linear_kto_loss, cpu": 0.01, peers.NAIVE: 0.01, linear_peers.SCORED: 0.01}
    ran = []

    def point(name, shape, *_):
        ran.append((name, shape.tokens))
        failed = "out of memory" if name == peers.NAIVE and shape.tokens > 300 else None
        took = {linear_peers.SCORED: shape.tokens / 100}.get(name, seconds[name])
        return {"peak extra bytes": 0 if failed else 8, "seconds": None if failed else took, "failed": failed}

    monkeypatch.setattr(longcontext, "point", point)
    cases = []
    longcontext.run(
        Shape(0, 16, 64), (96, 384, 1536), "fp32", 1, {"gemm flop/s": {"fp32": 1e9}}, cases.append, lambda: None,
        peers=("naive", "scored"), backends=("cpu",), cap=10.0,
    )  # fmt: skip
    failed = [[case["variants"][name]["failed"] for case in cases] for name in (peers.NAIVE, linear_peers.SCORED)]
    assert failed[0] == [None, "out of memory", "not run: failed at 384 tokens"]
    assert failed[1][:2] == [None, None] and "over the cap of 10 s" in failed[1][2]
    assert (peers.NAIVE, 1536) not in ran and ("linear_kto_loss, cpu", 1536) in ran
    for case in cases:
        plan = case["plan"]
        assert case["N"] == 2 * case["tokens"] // 3 and plan["gemm units"] >= 4
        assert plan["seconds"] == pytest.approx(plan["gemm units"] * 2 * case["N"] * 16 * 64 / 1e9)
    (title, rows), *_ = report.longcontext_tables({"cases": cases})
    assert (
        "H = 16" in title and rows[2][1:] == ["10 ms, 0.0 MiB", "out of memory", "–"] and rows[3][3] == "over the cap"
    )
