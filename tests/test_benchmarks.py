"""The benchmark's command line, its gate and its report, on small shapes; and its ratios as a guard."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import logits, measure, peers, report  # noqa: E402


def test_quick_run_prints_and_writes(tmp_path):
    path = tmp_path / "out.json"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "logits", "--quick", "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(path.read_text())
    assert {"device", "versions", "commit", "date", "cases", "threads"} <= result.keys()
    assert [case["dtype"] for case in result["cases"]] == ["fp32", "bf16"]
    assert "naive" in run.stdout and result["device"][:10] in run.stdout
    assert len(report.logits_table(result)) == 1 + 2 * 5  # naive, ours three times, the yardstick


def test_a_failed_gate_times_nothing(monkeypatch):
    monkeypatch.setattr(logits, "ours", lambda *_, **__: lambda batch, x: peers.naive(batch, x) * 1.01)
    monkeypatch.setattr(logits, "interleaved", lambda *_: pytest.fail("timed in spite of the gate"))
    with pytest.raises(SystemExit, match="gate: kto_loss"):
        logits.run("fp32", 16, 128, 2, lambda: None)


@pytest.mark.alone
def test_peak_memory_is_seen():
    assert measure.peak_extra_bytes(lambda: torch.ones(64 * 2**18)) >= 64 * 2**20
    assert measure.peak_extra_bytes(lambda: None) < 2**20


@pytest.mark.alone
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_guard_against_regressions(dtype):
    """Ratios inside one run, far below the published ones: noise does not trip it, a lost vector loop does."""
    case = logits.run(dtype, 256, 49152, 11, lambda: None)
    seconds = {name: times["low"] for name, times in case["seconds"].items()}
    naive = seconds[f"{peers.NAIVE}, {logits.FRESH}"]
    assert naive / seconds[f"kto_loss, cpu, {logits.INPLACE}"] > 2
    assert naive / seconds[f"kto_loss, cpu, {logits.FRESH}"] > 1.3
    assert naive / seconds[f"kto_loss, cpu, {logits.FORWARD}"] > 3
