"""The benchmark's command line, its gate and its report, on small shapes; and its ratios as a guard."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import linear, linear_peers, logits, measure, peers, report, step  # noqa: E402


def quick_run(benchmark: str, path: Path) -> dict:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", benchmark, "--quick", "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(path.read_text())
    assert {"device", "versions", "commit", "date", "cases", "threads"} <= result.keys()
    assert "naive" in run.stdout and result["device"][:10] in run.stdout
    return result


def test_quick_run_prints_and_writes(tmp_path):
    result = quick_run("logits", tmp_path / "out.json")
    assert [case["dtype"] for case in result["cases"]] == ["fp32", "bf16"]
    assert len(report.logits_table(result)) == 1 + 2 * 5  # naive, ours three times, the yardstick


def test_quick_run_from_hidden_states(tmp_path, monkeypatch):
    result = quick_run("linear", tmp_path / "linear-cpu.json")
    assert [(case["dtype"], case["head"]) for case in result["cases"]] == [("fp32", "trained"), ("bf16", "trained")]
    floor, mine = "bare GEMMs, 4G", "linear_kto_loss, cpu"
    for case in result["cases"]:
        timed, absent = set(case["seconds"]), set(case["absent"])
        assert {floor, peers.NAIVE, mine} <= timed
        assert timed | absent == {floor, mine, *linear_peers.peers()} and not timed & absent
        assert case["peak extra bytes"].keys() == timed - {floor}
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    section = report.section("linear-cpu", report.linear_contents)
    assert "LinearPlan" in section and all(f"| {name} | bf16 |" in section for name in timed)
    assert report.section("linear-cuda", report.linear_contents) == "not measured"


def test_a_frozen_head_takes_no_gradient(monkeypatch):
    monkeypatch.setattr(linear, "peers", lambda: {peers.NAIVE: linear_peers.naive})
    case = linear.run("fp32", *linear.QUICK, linear.FROZEN, 2, lambda: None)
    assert "bare GEMMs, 3G" in case["seconds"]
    assert all(errors.keys() == {"loss", "hidden gradient"} for errors in case["errors against fp64"].values())


def test_a_failed_gate_times_nothing(monkeypatch):
    monkeypatch.setattr(logits, "ours", lambda *_, **__: lambda batch, x: peers.naive(batch, x) * 1.01)
    monkeypatch.setattr(logits, "interleaved", lambda *_: pytest.fail("timed in spite of the gate"))
    with pytest.raises(SystemExit, match="gate: kto_loss"):
        logits.run("fp32", 16, 128, 2, lambda: None)


def test_a_failed_gate_from_hidden_states(monkeypatch):
    """Ours wrong: nothing is timed. A peer wrong or failing: it is left out, with the reason."""
    monkeypatch.setattr(linear, "peers", lambda: PEERS)
    case = linear.run("fp32", *linear.QUICK, linear.TRAINED, 2, lambda: None)
    assert "differs" in case["absent"]["wrong"]
    assert case["absent"] | {"wrong": ""} == {"gone": "absent: x", "broken": "fails: no memory", "wrong": ""}
    assert case["seconds"].keys() == {"bare GEMMs, 4G", "linear_kto_loss, cpu", peers.NAIVE}
    monkeypatch.setattr(linear, "ours", lambda *_: wrong)
    monkeypatch.setattr(linear, "interleaved", lambda *_: pytest.fail("timed in spite of the gate"))
    with pytest.raises(SystemExit, match="gate: linear_kto_loss"):
        linear.run("fp32", *linear.QUICK, linear.TRAINED, 2, lambda: None)


def wrong(batch: linear_peers.LinearBatch) -> torch.Tensor:
    return linear_peers.naive(batch) * 1.03


def broken(batch: linear_peers.LinearBatch) -> torch.Tensor:
    raise RuntimeError("no memory\nand more")


PEERS = {peers.NAIVE: linear_peers.naive, "wrong": wrong, "gone": "absent: x", "broken": broken}


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


def test_a_training_step(tmp_path):
    """A tiny model: the gate holds, every figure is there; its times say nothing."""
    pytest.importorskip("trl")
    case = step.run(step.LORA, 2, True, lambda: None)
    times = {"low": 0.1, "median": 0.2, "high": 0.3}
    assert set(case["seconds"]) == {step.STEP, step.LOSS} and set(case["seconds"][step.LOSS]) == {step.TRL, step.OURS}
    case["seconds"] = {part: {step.TRL: times, step.OURS: times} for part in (step.STEP, step.LOSS)}
    case["peak extra bytes"] = {part: {step.TRL: 2**21, step.OURS: 2**20} for part in (step.STEP, step.LOSS)}
    head, theirs, mine = report.step_table({"cases": [case]})
    assert theirs[:2] == [step.TRL, step.LORA] and mine[0] == step.OURS
    assert mine[head.index("/ TRL's")] == "1.00×" and mine[-1] == "1.0 MiB"
