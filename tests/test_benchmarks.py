"""The benchmark's command line, its gate and its report, on small shapes; and its ratios as a guard."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    gate,
    inspect,
    linear,
    linear_peers,
    logits,
    longcontext,
    measure,
    memory,
    peers,
    report,
    selection,
    step,
)
from benchmarks.__main__ import parser  # noqa: E402
from benchmarks.session import jobs, settle  # noqa: E402
from benchmarks.shapes import MODELS, Shape, of_model, parse  # noqa: E402

# One dry run of what is run on a GPU, for all the tests of the command line ────────────────────────────────────────────


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> dict[str, dict]:
    """benchmarks/run_gpu.sh on small shapes on the CPU: command → what it wrote, and its output under "output"."""
    out = tmp_path_factory.mktemp("run_gpu")
    settings = {"PYTHON": sys.executable, "RUN_GPU_SLOWER": "9", "RUN_GPU_PEERS": "naive"}
    run = subprocess.run(
        ["benchmarks/run_gpu.sh", str(out), "--quick", "--device", "cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # Two threads that wait for each other take long beside whatever else runs.
        env={**os.environ, "OMP_NUM_THREADS": "1", **settings},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = {path.stem.removesuffix("-cpu"): json.loads(path.read_text()) for path in out.glob("*-cpu.json")}
    return {**found, "output": run.stdout}


MINE = "linear_kto_loss, cpu"


@pytest.mark.alone
@pytest.mark.parametrize("benchmark", [name for name in report.BENCHMARKS if name != "inspect"])
def test_every_command_prints_and_writes(dry_run, benchmark):
    result = dry_run[benchmark]
    assert {"device", "driver", "versions", "commit", "date", "ceilings", "cases", "threads"} <= result.keys()
    assert result["benchmark"] == benchmark and result["device"][:10] in dry_run["output"]
    assert result["cases"] or benchmark == "ceilings"
    rates = [result["ceilings"]["copy bytes/s"], result["ceilings"]["read bytes/s"]]
    assert all(rate > 0 for rate in (*rates, *result["ceilings"]["gemm flop/s"].values()))
    tables, _ = report.on_screen(result)
    for title, (head, *rows) in tables:
        assert rows and all(len(row) == len(head) for row in rows)
        assert title[:12] in dry_run["output"]


@pytest.mark.alone
def test_the_run_for_a_gpu_is_complete_and_in_order(dry_run):
    begun = [line.split()[1].rstrip(",") for line in dry_run["output"].splitlines() if line.startswith("== ")]
    gate = ["linear", "logits"]
    assert begun == [*gate, "linear", "logits", "longcontext", "step", "memory", "ceilings"]


@pytest.mark.alone
def test_results_from_logits(dry_run):
    head, *rows = report.logits_table(dry_run["logits"])
    assert len(rows) == 2 + 3 + 1  # naive with and without backward, ours three times, the yardstick
    shares = [row[head.index("of the ceiling")] for row in rows]
    assert all(share.endswith(" %") for share, row in zip(shares, rows) if row[0] != "logits.sum()")


@pytest.mark.alone
def test_results_from_hidden_states(dry_run, tmp_path, monkeypatch):
    (case,) = dry_run["linear"]["cases"]
    assert (case["N"], case["tokens"], case["head"]) == (128, 192, "trained")  # a third of the tokens are prompts
    floor = "bare GEMMs, 4G"
    timed = set(case["seconds"])
    assert timed == {floor, peers.NAIVE, MINE} and not case["absent"]
    assert case["peak extra bytes"].keys() == timed - {floor} and all(case["peak extra bytes"].values())
    (tmp_path / "linear-cpu.json").write_text(json.dumps(dry_run["linear"]))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    section = report.section(report.ROOT / "README.md", "linear-cpu", everything=True)
    assert "LinearPlan" in section and all(f"| {name} | bf16 |" in section for name in timed)
    assert report.section(report.ROOT / "README.md", "linear-cuda", everything=True) == "not measured"


@pytest.mark.alone
def test_results_of_memory(dry_run):
    (case,) = dry_run["memory"]["cases"]
    peaks = case["peak extra bytes"]
    assert peaks[peers.NAIVE] > peaks[MINE] > 0 and not case["failed"]
    assert case["plan"]["peak bytes"] > 0 and case["sweep"] == "model"
    ((_, rows),) = report.memory_tables(dry_run["memory"])
    assert [row[0] for row in rows[1:]] == [MINE, peers.NAIVE, "the plan of ours"]


@pytest.mark.alone
def test_results_of_a_training_step(dry_run):
    """A tiny model: every figure is there, the parts are those of the step; its times say nothing."""
    cases = dry_run["step"]["cases"]
    assert [case["dtype"] for case in cases] == ["fp32", "bf16"]
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
    (title, (head, theirs, mine)), (_, (parts_head, *rows)), *of_bf16 = report.step_tables(dry_run["step"])
    assert "fp32" in title and "bf16" in of_bf16[0][0] and len(of_bf16) == 2
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
    """Those of the gate, whose reference is apart, or those of the run."""

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


def test_a_step_in_mixed_precision(monkeypatch):
    """Every product with the head is one of bf16 in it, the reference's too."""
    dtypes = set()
    mm = torch.mm

    def watched(a, b, **out):
        dtypes.add(a.dtype)
        return mm(a, b, **out)

    monkeypatch.setattr(torch, "mm", watched)
    case = step.run(step.Setup(step.TRAINED, "bf16", quick=True, batch=2), 1, lambda: None)
    assert (case["dtype"], case["B"]) == ("bf16", 2) and case["seconds"][step.STEP][step.OURS]["median"] > 0
    assert dtypes == {torch.float32, torch.bfloat16}  # the gate's in fp32
    dtypes.clear()
    step.make_step(step.OURS, step.STEP, step.Setup(step.TRAINED, "bf16", quick=True, batch=2))()
    assert dtypes == {torch.bfloat16}


def test_what_was_compiled_is_written_and_shown(tmp_path, monkeypatch, capsys):
    """Of each kernel and target the worst variant."""
    case = {"kernel": "forward", "variant": "a", "target": "sm_90", "shared": 64, "registers": 40, "spills": 0}
    case |= {"loads": {"128": 4, "16": 1}, "stores": {"32": 2}}
    worse = case | {"variant": "b", "registers": 64, "spills": 8, "loads": {"64": 4}}
    monkeypatch.setattr(inspect, "inspect", lambda *_, **__: [case, worse])
    args = parser().parse_args(["inspect", "--json", str(tmp_path / "found.json")])
    args.run(args)
    assert "b" in capsys.readouterr().out
    result = json.loads((tmp_path / "found.json").read_text())
    assert {"versions", "commit", "date"} <= result.keys()
    ((_, (_, row)),), _ = report.on_screen(result)
    assert row == ["forward", "sm_90", "2", "64", "8", "64"]
    assert report.provenance(result).startswith("compiled, not run; python")


def test_run_gpu_stops_at_the_gate(tmp_path):
    """Nothing is measured behind a gate that failed, and the exit status says so."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho gate: ours differ; exit 1\n")
    python.chmod(0o755)
    run = subprocess.run(
        ["benchmarks/run_gpu.sh", str(tmp_path / "out"), "--device", "cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": str(python)},
    )
    assert run.returncode == 1 and run.stdout.count("== linear") == 2 and "== logits" not in run.stdout


# Every peer, on a batch with prompts and one without, computes the loss; a softcap is known or refused ───────────────


@pytest.mark.parametrize(
    "key, softcap", [(key, softcap) for key in linear_peers.PEERS for softcap in (None, 2.0) if key != "compile"]
)
def test_peers_compute_the_same_or_say_why_not(key, softcap):
    shape = Shape(16, 12, 40, softcap=softcap)
    name = linear_peers.PEERS[key].name
    setting = linear.Setting("cpu", torch.float32, shape)
    variants, absent = linear.variants_of(setting, (key,), ())
    if softcap and key in ("liger", "torch"):
        assert "softcap" in absent[name]
    elif key in ("liger-scaled", "cce", "quack", "quack-chunked"):
        assert name in absent
    else:
        batch = linear.make_batch(shape, linear.TRAINED, torch.float32)
        assert (batch.labels == linear_peers.IGNORED).sum() == 8
        _, refused, _ = linear.gated(batch, variants, "fp32")
        assert not refused and not absent


def test_the_gate_sees_a_softcap_forgotten():
    batch = linear.make_batch(Shape(16, 12, 40, softcap=2.0), linear.TRAINED, torch.float32)

    def forgets(batch):
        batch = linear_peers.LinearBatch(**{**vars(batch), "softcap": None})
        return linear_peers.naive(batch)

    _, refused, _ = linear.gated(batch, {"forgets": forgets}, "fp32")
    assert "differs" in refused["forgets"]


def test_the_gate_sees_a_gradient_of_prompts():
    batch = linear.make_batch(Shape(16, 12, 40), linear.TRAINED, torch.float32)

    def scores_prompts(batch):
        loss, token_logps = linear_peers.naive(batch)
        return linear_peers.Scored(loss + 1e-3 * (batch.hidden - batch.hidden.detach()).sum(), token_logps)

    _, refused, _ = linear.gated(batch, {"scores prompts": scores_prompts}, "fp32")
    assert "hidden gradient" in refused["scores prompts"]


def test_the_truth_by_slices_is_that_of_autograd(monkeypatch):
    """fp64 autograd over everything at once against the sliced truth, with slices that do not divide the sizes."""
    monkeypatch.setattr(linear, "FP64_ROWS", 7)
    monkeypatch.setattr(linear, "FP64_WORDS", 11)
    batch = linear.make_batch(Shape(16, 12, 40, softcap=3.0), linear.TRAINED, torch.float64)
    truth = linear.Truth(batch)
    errors = truth.errors_of(linear.with_gradients(in_fp64, batch))
    assert set(errors) == {"loss", "token log-probs", "hidden gradient", "weight gradient"}
    assert all(error < 1e-12 for error in errors.values()) and all(scale > 1e-6 for scale in truth.scale.values())


def in_fp64(batch):
    def token_logps(hidden, weight):
        z = batch.softcap * torch.tanh(hidden @ weight.T / batch.softcap)
        logps = z.log_softmax(-1).gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
        return logps * (batch.labels != linear_peers.IGNORED)

    logps = token_logps(batch.hidden, batch.weight)
    margin = peers.BETA * ((logps - token_logps(batch.ref_hidden, batch.ref_weight)).sum(-1) - peers.KL)
    loss = (1 - torch.sigmoid(torch.where(batch.desirable, margin, -margin))).mean()
    return linear_peers.Scored(loss, logps.detach())


def test_a_frozen_head_takes_no_gradient():
    case = linear.run(linear.QUICK, "fp32", linear.FROZEN, 2, lambda: None, peers=("naive",))
    assert "bare GEMMs, 3G" in case["seconds"]
    assert all(
        errors.keys() == {"loss", "token log-probs", "hidden gradient"}
        for errors in case["errors against fp64"].values()
    )


def test_the_gate_knows_luck_from_error():
    """Naive PyTorch hits the loss by luck: ours may miss it by what its own token log-probabilities let one expect, and
    by no more; those themselves, and gradients, may not be worse."""
    naive = {"loss": 1e-6, "token log-probs": 1e-2, "weight gradient": 1e-3}

    def hold(what, error):
        gate.hold({"ours": naive | {what: error}}, naive, ["ours"], slack=1.2, spread=0.1)

    hold("loss", 1.9e-3)
    hold("weight gradient", 1.19e-3)
    for what, error in {"loss": 2.1e-3, "token log-probs": 1.11e-2, "weight gradient": 1.21e-3}.items():
        for wrong in (error, float("nan")):
            with pytest.raises(SystemExit, match=f"gate: ours, {what}"):
                hold(what, wrong)


def test_the_spread_of_the_loss_is_what_chance_makes_of_it():
    """Errors of either sign in every token's log-probability, drawn again and again, and the losses that they make."""
    batch = linear.make_batch(Shape(16, 12, 40, softcap=3.0), linear.TRAINED, torch.float64)
    truth = linear.Truth(batch)
    scored, size = batch.labels != linear_peers.IGNORED, 1e-4
    loss = truth.values["loss"]

    def drawn(seed):
        g = torch.Generator().manual_seed(seed)

        def sums():
            signs = 1 - 2 * torch.randint(2, scored.shape, generator=g)
            return (size * signs * scored).sum(-1)

        r = truth.log_ratios + sums() - sums()
        return gate.true_loss_and_slopes(r, batch.desirable)[0] - loss

    losses = torch.stack([drawn(seed) for seed in range(2000)])
    assert gate.rms(losses) == pytest.approx(size * truth.spread, rel=0.05)


def test_a_failed_gate_times_nothing(monkeypatch):
    monkeypatch.setattr(logits, "ours", lambda *_, **__: lambda batch, x: peers.naive(batch, x) * 1.01)
    monkeypatch.setattr(logits, "interleaved", lambda *_: pytest.fail("timed in spite of the gate"))
    with pytest.raises(SystemExit, match="gate: kto_loss"):
        logits.run(Shape(16, 0, 128), "fp32", 2, lambda: None, peers=("naive",))


def test_a_peer_that_differs_from_logits_is_left_out(monkeypatch):
    broken = selection.Peer("broken", lambda _: lambda batch, x: peers.naive(batch, x) * 1.05)
    monkeypatch.setitem(logits.PEERS, "broken", broken)
    case = logits.run(Shape(16, 0, 128), "fp32", 2, lambda: None, peers=("naive", "broken"))
    assert "differs" in case["absent"]["broken"] and not any("broken" in name for name in case["seconds"])


def test_a_failed_gate_from_hidden_states(monkeypatch):
    """Ours wrong: nothing is timed. A peer wrong, failing or too slow: it is left out, with the reason. The gate's clock
    moves in the slow peer alone, so that the others are below the cap on a busy machine too."""
    now = [0.0]
    monkeypatch.setattr(gate.time, "perf_counter", lambda: now[0])

    def slow(batch):
        now[0] += 0.6
        return linear_peers.naive(batch)

    offered = PEERS | {"slow": selection.Peer("slow", lambda _: slow)}
    monkeypatch.setattr(linear, "PEERS", offered)
    case = linear.run(linear.QUICK, "fp32", linear.TRAINED, 2, lambda: None, peers=tuple(offered), cap=0.5)
    assert "differs" in case["absent"]["wrong"] and "over the cap of 0 s" in case["absent"]["slow"]
    others = {name: why for name, why in case["absent"].items() if name not in ("wrong", "slow")}
    assert others == {
        "gone": "absent: needs a GPU",
        "broken": "fails: RuntimeError: no compiler",
        "full": "fails: out of memory",
    }
    assert case["seconds"].keys() == {"bare GEMMs, 4G", "linear_kto_loss, cpu", peers.NAIVE}
    monkeypatch.setattr(linear, "ours", lambda *_: wrong)
    monkeypatch.setattr(linear, "interleaved", lambda *_: pytest.fail("timed in spite of the gate"))
    with pytest.raises(SystemExit, match="gate: linear_kto_loss"):
        linear.run(linear.QUICK, "fp32", linear.TRAINED, 2, lambda: None, peers=())


def wrong(batch: linear_peers.LinearBatch) -> linear_peers.Scored:
    loss, token_logps = linear_peers.naive(batch)
    return linear_peers.Scored(1.03 * loss, token_logps)


def broken(batch: linear_peers.LinearBatch) -> linear_peers.Scored:
    raise RuntimeError("no compiler\nand more")


def full(batch: linear_peers.LinearBatch) -> linear_peers.Scored:
    raise torch.OutOfMemoryError("tried to allocate 1 TiB")


PEERS = {
    "naive": linear_peers.PEERS["naive"],
    "gone": selection.Peer("gone", lambda setting: setting.need_gpu()),
    **{f.__name__: selection.Peer(f.__name__, lambda _, f=f: f) for f in (wrong, broken, full)},
}


# What is asked for ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_shapes():
    assert parse("8,16,32", Shape(1, 1, 1), 1) == [Shape(8, 16, 32)]
    (gemma,) = parse("gemma-2-9b", Shape(1, 1, 1), 64)
    assert (gemma.scored, gemma.hidden, gemma.vocab, gemma.softcap) == (64, 3584, 256000, 30.0)
    assert parse("mixtral-8x7b", Shape(1, 1, 1), 64) == parse("mistral-7b", Shape(1, 1, 1), 64)
    swept = parse("sweep-v", Shape(8, 16, 32), 1)
    assert len({shape.vocab for shape in swept}) == len(swept) > 3 and {shape.hidden for shape in swept} == {16}
    for wrong in ("llama", "8", "8,0,4", "a,b,c"):
        with pytest.raises(ValueError, match=f"{wrong!r}: expected N,H,V, or one of: smollm2, "):
            parse(wrong, Shape(1, 1, 1), 1)


@pytest.mark.parametrize(
    "options, message",
    [
        (["linear", "--peers", "trl,ligre"], r"'ligre' is not known; expected all, none, or some of: naive, scored,"),
        (["logits", "--peers", "cce"], r"'cce' is not known"),
        (["linear", "--backend", "cdua"], r"'cdua' is not known; expected all, none, or some of: triton, cuda, cpu"),
        (["linear", "--device", "cpu", "--backend", "cuda"], r"'cuda' is not available: "),
        (["linear", "--dtype", "fp8"], r"'fp8' is not known; expected some of: fp32, bf16, fp16"),
        (["linear", "--shapes", "8,32"], r"'8,32': expected N,H,V"),
        (["step", "--dtype", "fp16"], r"--dtype: 'fp16' is not known; expected some of: fp32, bf16"),
        (["step", "--batch", "0"], r"--batch: expected at least 1, got 0"),
        (["memory", "--shapes", "llama"], r"'llama': expected N,H,V, or one of: smollm2"),
    ],
)
def test_what_is_not_known_is_an_error_that_names_what_is(options, message, monkeypatch):
    if "cuda" in options:
        monkeypatch.setattr("benchmarks.selection.available_backends", lambda _: {"cuda": "no GPU", "cpu": None})
    args = parser().parse_args(options)
    with pytest.raises(ValueError, match=message):
        settle(args)


def test_every_head_is_measured_by_default():
    for benchmark in (linear, memory):
        for device in ("cpu", "cuda"):
            args = parser().parse_args([benchmark.__name__.rsplit(".", 1)[1], "--device", device])
            settle(args)
            models = {job.shape.model for job in jobs(args)}
            if (benchmark, device) != (memory, "cpu"):  # there `linear` measures their memory
                assert models >= {of_model(name, 1).model for name in MODELS}


# Memory and long contexts ──────────────────────────────────────────────────────────────────────────────────────────────


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


# Measuring itself ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.alone
def test_peak_memory_is_seen():
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
    """In bf16 and with few hidden units, where a pass too many over a chunk is not lost beside the GEMMs."""
    case = linear.run(Shape(256, 64, 32768), "bf16", linear.TRAINED, 9, lambda: None, peers=("naive", "scored"))
    seconds = cpu_seconds(case)
    assert seconds[peers.NAIVE] / seconds["linear_kto_loss, cpu"] > 2.5
    assert seconds[linear_peers.SCORED] / seconds["linear_kto_loss, cpu"] > 1.7
