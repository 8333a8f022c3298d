"""The benchmarks' modules import one way, each benchmark is a whole record, and options are read or refused by name."""

import ast
import graphlib
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import (
    linear,
    memory,
    report,
)
from benchmarks.__main__ import BENCHMARKS, parser
from benchmarks.benchmark import jobs, settle
from benchmarks.shapes import MODELS, Shape, of_model, parse

ROOT = Path(__file__).parents[2]


def test_the_modules_import_one_way():
    imports = {}
    for path in (ROOT / "benchmarks").glob("*.py"):
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level
        ]
        imports[path.stem] = {name for node in nodes for name in ([node.module] if node.module else names_in(node))}
    assert imports["report"] >= {"plots", "logits"} and imports["plots"] >= {"environment", "logits"}
    graphlib.TopologicalSorter(imports).prepare()  # an error names the circle


def names_in(node: ast.ImportFrom) -> set[str]:
    return {alias.name for alias in node.names}


@pytest.mark.parametrize("benchmark", [*BENCHMARKS, linear.BENCHMARKS["dpo"]], ids=lambda benchmark: benchmark.name)
def test_every_benchmark_is_a_whole_record(benchmark):
    """Each device that it runs on has its defaults, and its results are shown and have a place in the documents."""
    shown = report.BENCHMARKS[benchmark.name]
    assert shown.devices == benchmark.devices
    for device in benchmark.devices:
        assert not benchmark.peers or device in benchmark.cap
        if shapes := benchmark.shapes:
            assert shapes.jobs(device) and device in shapes.base and device in shapes.scored and shapes.dtypes[device]
            assert {dtype for job in shapes.jobs(device) for dtype in job.dtypes} <= set(benchmark.dtypes)
        assert f"{benchmark.name}-{device}" in report.DOCUMENTS[report.PAGE]


# Options ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_shapes_are_parsed_from_numbers_and_model_names():
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


def test_the_objective_chooses_the_benchmark(capsys):
    """Without it, KTO as ever; with `dpo` a benchmark of that name, whose shapes, those asked for too, are pairs."""
    for options in ([], ["--objective", "kto"]):
        assert parser().parse_args(["linear", *options]).benchmark is linear.BENCHMARK
    for options in ([], ["--shapes", "smollm2", "2048,16,32"], ["--quick"]):
        args = parser().parse_args(["linear", "--objective", "dpo", "--device", "cpu", *options])
        settle(args)
        assert args.benchmark.name == "linear-dpo"
        assert {(job.shape.objective, job.shape.sequences) for job in jobs(args)} == {("dpo", 8)}
    (job,) = args.benchmark.shapes.jobs("cpu")
    assert (job.shape.scored, job.shape.completion, job.shape.model) == (2048, 256, "SmolLM2-135M")
    assert {job.shape.objective for job in linear.jobs("cpu")} == {"kto"}
    with pytest.raises(SystemExit):
        parser().parse_args(["linear", "--objective", "ipo"])
    assert "'ipo' is not known; expected kto or dpo" in capsys.readouterr().err


def test_the_plan_is_that_of_pairs():
    """A budget for the rows of one sequence: KTO closes each in a chunk, and half of a pair is projected again."""
    of_one = Shape(8, 16, 1024, sequences=2, budget=4 * 1024 * 4)
    of_pair = replace(of_one, objective="dpo")
    single, pair = (linear.plan_of(shape, "fp32", linear.TRAINED, "cpu") for shape in (of_one, of_pair))
    assert (single.rows, single.gemm_units) == (8, 3.0) and (pair.rows, pair.gemm_units) == (8, 3.5)
