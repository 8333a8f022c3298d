"""Peak memory is counted, and ratios of times are guarded against regressions."""

import time

import pytest
import torch

from benchmarks import (
    linear,
    linear_peers,
    logits,
    measure,
    peers,
)
from benchmarks.shapes import Shape


@pytest.mark.alone
def test_peak_memory_counts_what_a_call_allocates():
    assert measure.peak_extra_bytes(lambda: torch.ones(64 * 2**18)) >= 64 * 2**20
    assert measure.peak_extra_bytes(lambda: None) < 2**20


@pytest.fixture
def cpu_seconds(monkeypatch):
    """One thread, and the time that it runs, not the time that it waits: other programs trip no guard."""
    flush = torch.empty(2**26, dtype=torch.int8)

    def clock(run):
        flush.zero_()
        start = time.process_time()
        run()
        return time.process_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for benchmark in (logits, linear):
        monkeypatch.setattr(benchmark, "clock_of", lambda _: clock)
    yield lambda case: {name: times["low"] for name, times in case["seconds"].items()}
    torch.set_num_threads(threads)


# Ratios inside one run, far below the published ones: noise does not trip them, a lost vector loop does.


@pytest.mark.alone
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_guard_against_regressions(dtype, cpu_seconds):
    seconds = cpu_seconds(logits.run(Shape(128, 0, 49152), dtype, 9, lambda: None, peers=("naive",)))
    naive = seconds[f"{peers.NAIVE}, {logits.FRESH}"]
    assert naive / seconds[f"kto_loss, cpu, {logits.INPLACE}"] > 1.5
    assert naive / seconds[f"kto_loss, cpu, {logits.FRESH}"] > 1.3
    assert naive / seconds[f"kto_loss, cpu, {logits.FORWARD}"] > 2.5


@pytest.mark.alone
def test_guard_against_regressions_from_hidden_states(cpu_seconds):
    """The time beside the GEMMs is guarded, which every variant needs: how fast a processor multiplies is no
    matter of ours. A backend without vector loops takes as long beside its GEMMs as plain PyTorch does."""
    case = linear.run(Shape(256, 16, 32768), "fp32", linear.TRAINED, 9, lambda: None, peers=("naive", "scored"))
    seconds = cpu_seconds(case)
    (gemms,) = (value for name, value in seconds.items() if name.startswith("bare GEMMs"))
    ours = seconds["linear_kto_loss, cpu"] - gemms
    assert seconds[peers.NAIVE] - gemms > 3 * ours
    assert seconds[linear_peers.SCORED] - gemms > 1.8 * ours
