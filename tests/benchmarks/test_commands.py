"""The benchmark commands on small shapes, each run once for all the tests that ask for it: what they print, write and show."""

import contextlib
import functools
import io
import json
from dataclasses import asdict

import pytest
import torch

from benchmarks import (
    environment,
    inspect,
    logits,
    peers,
    report,
    step,
)
from benchmarks.__main__ import parser
from benchmarks.benchmark import settle


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """`python -m benchmarks NAME --quick --device cpu`, in this process, whose imports are made: name → what it wrote, and
    what it printed."""

    @functools.cache
    def quick(name: str, *options: str) -> tuple[dict, str]:
        file = tmp_path_factory.mktemp(name) / f"{name}-cpu.json"
        command = [*COMMANDS.get(name, [name]), "--quick", "--device", "cpu", "--json", str(file), *options]
        if name == "step" and not options:
            command += ["--batch", "2", "--dtype", "fp32"]
        if name in ("logits", "linear", "linear-dpo", "longcontext", "memory"):
            command += [
                "--peers",
                "naive",
                "--dtype",
                "fp32",
            ]  # bf16 is slow where a processor has no instructions for it
        args = parser().parse_args(command)
        settle(args)
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
            # The memory of a training step: four processes that each import TRL, which are the time of this file.
            patch.setattr(step, "memory", lambda variant, part, setup: step._memory(variant, part, asdict(setup)))
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # two that wait for each other take long beside whatever else runs
            try:
                args.run(args)
            finally:
                torch.set_num_threads(threads)
        return json.loads(file.read_text()), output.getvalue()

    return quick


COMMANDS = {"linear-dpo": ["linear", "--objective", "dpo"]}  # results file → its command, where that is another name
MINE = "linear_kto_loss, cpu"


@pytest.mark.parametrize(
    "benchmark",
    [
        # The step is also what test_results_of_a_training_step runs.
        pytest.param(name, marks=[pytest.mark.wide] if name == "step" else [])
        for name in report.BENCHMARKS
        if name not in ("inspect", "overhead")
    ],
)
def test_every_command_prints_and_writes(quick, benchmark):
    result, output = quick(benchmark)
    assert {"device", "driver", "versions", "commit", "date", "ceilings", "cases", "threads"} <= result.keys()
    assert result["benchmark"] == benchmark and result["device"][:10] in output
    assert result["cases"] or benchmark == "ceilings"
    rates = [result["ceilings"]["copy bytes/s"], result["ceilings"]["read bytes/s"]]
    assert all(rate > 0 for rate in (*rates, *result["ceilings"]["gemm flop/s"].values()))
    tables, _ = report.on_screen(result)
    for title, (head, *rows) in tables:
        assert rows and all(len(row) == len(head) for row in rows)
        assert title[:12] in output


def test_the_table_of_logits_shows_every_row_and_share(quick):
    head, *rows = report.logits_table(quick("logits")[0])
    assert len(rows) == 2 + 3 + 1  # naive with and without backward, ours three times, the yardstick
    shares = [row[head.index("of the ceiling")] for row in rows]
    assert all(share.endswith(" %") for share, row in zip(shares, rows) if row[0] != "logits.sum()")


@pytest.mark.parametrize("benchmark, mine", [("linear", MINE), ("linear-dpo", "linear_preference_loss, cpu")])
def test_results_from_hidden_states(quick, benchmark, mine, tmp_path, monkeypatch):
    result, _ = quick(benchmark)
    (case,) = result["cases"]
    assert (case["N"], case["tokens"], case["head"]) == (128, 192, "trained")  # a third of the tokens are prompts
    floor = "bare GEMMs, 4G"
    timed = set(case["seconds"])
    assert timed == {floor, peers.NAIVE, mine} and not case["absent"]
    assert case["peak extra bytes"].keys() == timed - {floor} and all(case["peak extra bytes"].values())
    assert report.best_peer({name: took for name, took in case["seconds"].items() if name != floor}) == peers.NAIVE
    (tmp_path / f"{benchmark}-cpu.json").write_text(json.dumps(result))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    section = report.section(report.PAGE, f"{benchmark}-cpu")
    assert "LinearPlan" in section and all(f"| {name} | fp32 |" in section for name in timed)
    assert report.section(report.PAGE, f"{benchmark}-cuda") == "not measured"


def beside(tmp_path, monkeypatch, benchmark: str, *cases: dict) -> list[list]:
    """The README's rows of these cases: what, peer, both medians, both sizes."""
    cases = [{"dtype": "bf16", "N": 8, "V": 64, "model": f"M{i}, N{i}"} | case for i, case in enumerate(cases)]
    made = {"device": "a device", "date": "today", "cases": cases}
    (tmp_path / f"{benchmark}-cpu.json").write_text(json.dumps(made))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rows = report.rows_beside(benchmark, "cpu")
    return [[row.what, row.peer, *row.seconds, *row.bytes] for row in rows]


def took(**seconds: float) -> dict:
    return {name: dict.fromkeys(("low", "median", "high"), value) for name, value in seconds.items()}


def test_the_readme_shows_the_fastest_peer_and_the_head_of_the_least_gain(tmp_path, monkeypatch):
    peaks = {"kto_loss": 10, "fast": 20}

    def case(floor, ours, *peers):
        names = ("bare GEMMs, 4G", "linear_kto_loss", "slow", "fast")
        return {"seconds": took(**dict(zip(names, (floor, ours, *peers)))), "peak extra bytes": {"fast": 20}}

    cases = [case(1, 2, 9, 8), case(1, 2, 9, 6), case(1, 4, 9, 5), case(1, 2, 9, 7)]
    other = case(1, 9, 9, 1) | {"dtype": "fp32"}  # nothing of another dtype
    rows = beside(tmp_path, monkeypatch, "linear", other, *cases)
    assert rows == [
        ["M1's head, 8 tokens", "fast", 2, 8, None, 20],
        ["M3's head, 8 tokens (least gain)", "fast", 4, 5, None, 20],
    ]
    _, slower = beside(tmp_path, monkeypatch, "linear", *cases, case(1, 6, 9, 5))
    assert slower[0] == "M4's head, 8 tokens (slower)"
    fresh = {"kto_loss, cpu, " + logits.FRESH: 3, "kto_loss, cpu, " + logits.INPLACE: 2, "fast, " + logits.FRESH: 5}
    forward = {"kto_loss, cpu, " + logits.FORWARD: 1, "fast, " + logits.FORWARD: 1, "slow, " + logits.FRESH: 6}
    case = {"seconds": took(**fresh, **forward, **{"logits.sum()": 0.5}), "peak extra bytes": peaks}
    rows = beside(tmp_path, monkeypatch, "logits", case)
    assert [row[1:4] for row in rows] == [["fast", 3, 5], ["fast", 2, 5]]


def test_the_readme_shows_the_longest_sequence_that_a_peer_finished(tmp_path, monkeypatch):
    def point(seconds, size=None):
        return {"seconds": seconds, "peak extra bytes": size}

    both = {"linear_kto_loss, cpu": point(1, 2**20), "slow": point(3, 1), "fast": point(2, 2**31)}
    failed = both | {"fast": point(None), "slow": point(4, 2**20)}
    alone = failed | {"slow": point(None)}
    cases = [{"tokens": 10**i, "variants": variants} for i, variants in enumerate((both, failed, alone), 3)]
    rows = beside(tmp_path, monkeypatch, "longcontext", *cases)
    assert rows == [["a text of 10,000 tokens, vocabulary 64", "slow", 1, 4, 2**20, 2**20]]
    beside(tmp_path, monkeypatch, "longcontext", *cases[:1])
    assert report.headlines("cpu").startswith("- **1 MiB** of memory for a text of 1,000 tokens")
    assert report.headlines("cpu").endswith("(fast) takes 2.00 GiB.")
    assert "| 1.0 s, 1 MiB | 2.0 s, 2.00 GiB | fast |\n\nMedians in bf16 on a device, today." in report.overview("cpu")


def test_the_readme_shows_a_whole_step_of_a_trained_head(tmp_path, monkeypatch):
    def case(head, *seconds):
        step_of = dict(zip((step.TRL, step.OURS), seconds))
        return {"head": head, "seconds": {step.STEP: took(**step_of)}, "peak extra bytes": {step.STEP: {step.OURS: 7}}}

    rows = beside(tmp_path, monkeypatch, "step", case(step.LORA, 9, 1), case(step.TRAINED, 6, 4))
    assert rows == [["a training step of M1, N1", step.TRL, 4, 6, 7, None]]
    assert report.headlines("cpu").startswith(
        "- **1.5×** the speed of TRL's trainer: a training step of M1, N1 takes 4.0 s"
    )


def test_what_no_results_file_has_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.headlines("cpu") == report.overview("cuda") == "not measured"
    assert beside(tmp_path, monkeypatch, "step") == []


def test_the_results_of_memory_hold_peaks_and_plan(quick):
    result, _ = quick("memory")
    (case,) = result["cases"]
    peaks = case["peak extra bytes"]
    assert peaks[peers.NAIVE] > peaks[MINE] > 0 and not case["failed"]
    assert case["plan"]["peak bytes"] > 0 and case["sweep"] == "model"
    ((_, rows),) = report.memory_tables(result)
    assert [row[0] for row in rows[1:]] == [MINE, peers.NAIVE, "the plan of ours"]


@pytest.mark.parametrize(
    "dtypes", [["fp32"], pytest.param(["fp32", "bf16"], marks=pytest.mark.wide)], ids=["fp32", "both"]
)
def test_results_of_a_training_step(quick, dtypes):
    """A tiny model: every figure is there, the parts are those of the step; its times say nothing."""
    result, _ = quick("step", *(["--batch", "2"] if len(dtypes) == 2 else []))
    cases = result["cases"]
    assert [case["dtype"] for case in cases] == dtypes
    names = {step.SCORES, step.OTHERS, step.POLICY, step.HEAD_BACKWARD, step.BACKWARD, step.OPTIMIZER}
    for case in cases:
        assert set(case["seconds"]) == {step.STEP, step.LOSS}
        assert set(case["seconds"][step.LOSS]) == {step.TRL, step.OURS}
        for variant, parts in case["parts"].items():
            assert set(parts) == names
            whole = case["seconds"][step.STEP][variant]["median"]
            # Two rounds were timed, so that a median is their mean, and means of parts add up.
            assert all(part["median"] > 0 for part in parts.values())
            assert sum(part["median"] for part in parts.values()) <= 1.001 * whole
    (title, (head, theirs, mine)), (_, (parts_head, *rows)), *of_bf16 = report.step_tables(result)
    assert "fp32" in title and len(of_bf16) == 2 * (len(dtypes) - 1) and (not of_bf16 or "bf16" in of_bf16[0][0])
    assert theirs[:2] == [step.TRL, step.LORA] and mine[0] == step.OURS
    assert theirs[head.index("/ TRL's")] == "1.00×" and mine[-1].endswith(" MiB")
    assert len(rows) == 2 and len(parts_head) == 2 + 6 + 2


def test_parts_of_a_step_share_its_time(monkeypatch):
    """By a clock that moves only in the parts: the innermost part that has begun gets the time, and nothing is lost."""
    now = [0.0]
    monkeypatch.setattr(step.time, "perf_counter", lambda: now[0])
    parts = step.Parts("cpu")

    def spend(seconds):
        now[0] += seconds

    inner = parts.wrap(lambda: "inner", spend)
    for _ in range(2):
        with parts("outer"):
            spend(1)
            inner(10)
            spend(100)
            parts.go_on_with("rest")
            spend(1000)
        spend(10_000)  # in no part
        assert parts.seconds() == {"outer": 101, "inner": 10, "rest": 1000}


@pytest.mark.parametrize(
    "dtype, apart, mine", [("fp32", True, 0.50001), ("fp32", False, 0.50001), ("bf16", False, 0.51)]
)
def test_a_step_whose_losses_differ_is_not_timed(dtype, apart, mine, monkeypatch):
    """The losses of the gate, whose reference is apart, or the losses of the run."""

    def make_step(variant, part, setup, *_):
        differs = variant == step.OURS and (setup.dtype, setup.apart) == (dtype, apart)
        return lambda: torch.tensor(mine if differs else 0.5)

    monkeypatch.setattr(step, "make_step", make_step)
    monkeypatch.setattr(step, "interleaved", lambda *_: pytest.fail("timed in spite of the gate"))
    with pytest.raises(SystemExit, match=f"gate: trained, {dtype}: losses"):
        step.run(step.Setup(step.TRAINED, dtype), 1, lambda: None)


def test_the_reference_of_the_gate_is_another():
    near, apart = (
        step.make_step(step.OURS, step.LOSS, step.Setup(step.TRAINED, quick=True, apart=apart))().item()
        for apart in (False, True)
    )
    assert near == pytest.approx(0.5, abs=1e-6) and abs(apart - 0.5) > 1e-4


@pytest.mark.parametrize("gated", [False, pytest.param(True, marks=pytest.mark.wide)], ids=["", "gated"])
def test_a_step_in_mixed_precision(gated, monkeypatch):
    """Every product with the head is one of bf16 in it, the reference's too; the gate's are in fp32."""
    dtypes = set()
    mm = torch.mm

    def watched(a, b, **out):
        dtypes.add(a.dtype)
        return mm(a, b, **out)

    monkeypatch.setattr(torch, "mm", watched)
    setup = step.Setup(step.TRAINED, "bf16", quick=True, batch=2)
    if gated:
        case = step.run(setup, 1, lambda: None)
        assert (case["dtype"], case["B"]) == ("bf16", 2) and case["seconds"][step.STEP][step.OURS]["median"] > 0
        assert dtypes == {torch.float32, torch.bfloat16}
    else:
        step.make_step(step.OURS, step.STEP, setup)()
        assert dtypes == {torch.bfloat16}


def test_what_was_compiled_is_written_and_shown(tmp_path, monkeypatch, capsys):
    """The table shows the worst variant of each kernel and target."""
    case = {"kernel": "forward", "variant": "a", "target": "sm_90", "shared": 64, "registers": 40, "spills": 0}
    case |= {"loads": {"128": 4, "16": 1}, "stores": {"32": 2}, "variant": "a, bfloat16", "fp64": 30, "threads": 128}
    fold = {"mix": {"FMA": 150, "MUFU": 50}, "instructions": 200, "logits": 32, "a logit": 6.25}
    case |= {"fold": fold, "write": None, "row": {"FMA": 900, "FP64": 30}}
    worse = case | {"variant": "b", "registers": 64, "spills": 8, "loads": {"64": 4}}
    monkeypatch.setattr(inspect, "inspect", lambda *_, **__: [case, worse])
    args = parser().parse_args(["inspect", "--no-cuda", "--json", str(tmp_path / "found.json")])
    args.run(args)
    assert "b" in capsys.readouterr().out
    result = json.loads((tmp_path / "found.json").read_text())
    assert {"versions", "commit", "date"} <= result.keys()
    ((_, (_, row)),), _ = report.on_screen(result)
    assert row == ["forward", "sm_90", "2", "64", "8", "64", "6.25", "", "30"]
    assert environment.provenance(result).startswith("compiled, not run; python")
