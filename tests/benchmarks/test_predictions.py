"""The table of predicted and measured figures, from results files that are made up: no GPU wrote one."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import inspect, launches, linear, logits, memory, predictions, profiled, roofline
from benchmarks.__main__ import parser
from benchmarks.predictions import Row, Run

H100 = "NVIDIA H100 80GB HBM3"
SAID = {"device": H100, "driver": "1", "threads": 1, "versions": {"torch": "2"}, "commit": "c", "date": "today"}


def loop(logits_a_round: int, instructions: int, **mix: int) -> dict:
    return {
        "logits": logits_a_round,
        "instructions": instructions,
        "mix": mix,
        "a logit": instructions / logits_a_round,
    }


def kernel(name: str, variant: str, write: bool) -> dict:
    """A kernel that memory binds, as `inspect` says of one."""
    fold = loop(32, 200, FMA=150, MUFU=32, ALU=18)
    case = {"kernel": name, "variant": variant, "target": "sm_90", "threads": 512, "registers": 40, "row": {"ALU": 300}}
    return case | {"fold": fold, "write": fold if write else None}


def named(kernels: dict) -> list[dict]:
    return [kernel(name, variant, writes > 0) for name, variant, writes in kernels.values()]


KERNELS = named(roofline.KERNELS | {"scores": roofline.SCORES})
LAUNCHES = [
    ["call", "part", "Triton", "GEMMs", "PyTorch"],
    *(
        [f"linear_kto_loss, {head}{more}", "forward", chunks, "3", count]
        for head in (launches.TRAINED, launches.FROZEN)
        for more, chunks, count in (("", "1", "10"), (", two chunks", "2", "30"))
    ),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "RESULTS", tmp_path / "none")  # nothing but what a test writes
    write(tmp_path, "inspect", cases=KERNELS, launches=LAUNCHES)
    return tmp_path


def write(folder, name: str, **content) -> None:
    (folder / f"{name}-cuda.json").write_text(json.dumps({"benchmark": name} | SAID | content))


def rows(folder, title: str) -> list[Row]:
    return list(predictions.COMPARISONS[title](Run.of(folder, "cuda")))


def predicted(folder, title: str) -> list[float]:
    """What is predicted for the benchmarks' own shapes, on an H100."""
    write(folder, "step", cases=[])  # names the device, and measures nothing
    return [row.predicted for row in rows(folder, title)]


def logits_case(forward: float, both: float, tokens: int = logits.BASE["cuda"].scored) -> dict:
    seconds = {
        f"kto_loss, triton, {mode}": {"median": took}
        for mode, took in ((logits.FORWARD, forward), (logits.FRESH, both))
    }
    return {"dtype": "bf16", "N": tokens, "V": logits.BASE["cuda"].vocab, "seconds": seconds}


def linear_case(ratio: float, head: str, peak: int | None = None, **changes) -> dict:
    shape = linear.BASE["cuda"]
    plan = linear.plan_of(shape, "bf16", head, "cuda")
    case = {"dtype": "bf16", **shape.key, "head": head, "plan": {"text": repr(plan), "peak bytes": plan.peak_bytes}}
    seconds = {"bare GEMMs, 4G": {"median": 2.0}, "linear_kto_loss, triton": {"median": 2.0 * ratio}}
    return case | {"seconds": seconds, "peak extra bytes": {"linear_kto_loss, triton": peak}} | changes


# More than 15 per cent ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "off, says",
    [(1.14, ""), (1.16, "differs by +16%"), (0.86, ""), (0.84, "differs by -16%")],
    ids=["slower, near", "slower, apart", "faster, near", "faster, apart"],
)
@pytest.mark.parametrize("what", ["forward", "backward", "linear", "memory", "bandwidth"])
def test_a_difference_of_more_than_15_per_cent_is_said(folder, what, off, says):
    if what in ("forward", "backward"):
        forward, backward = predicted(folder, "From logits")
        took = (forward * off, backward) if what == "forward" else (forward, backward * off)
        write(folder, "logits", cases=[logits_case(took[0], sum(took))])
        title, number = "From logits", 0 if what == "forward" else 1
    elif what == "linear":
        trained, frozen = predicted(folder, "From hidden states")
        assert 1 < frozen < 1.3 and 1 < trained < 1.3
        write(folder, "linear", cases=[linear_case(trained, "trained"), linear_case(frozen * off, "frozen")])
        title, number = "From hidden states", 1
    elif what == "memory":
        peak = linear.plan_of(memory.BASE["cuda"], "bf16", "trained", "cuda").peak_bytes
        write(folder, "memory", cases=[linear_case(1, "trained", round(peak * off))])
        title, number = "Peak memory", 1
    else:
        write(folder, "ceilings", ceilings={"read bytes/s": roofline.H100.bandwidth * roofline.ACHIEVABLE * off})
        title, number = "Ceilings", 1
    cells = [row.cells() for row in rows(folder, title)]
    assert cells[number][3:] == [f"{off:.2f}", says]
    assert [row[4] for i, row in enumerate(cells) if i != number] == [""] * (len(cells) - 1)
    count = sum(
        row.ratio is not None for compare in predictions.COMPARISONS.values() for row in compare(Run.of(folder, "cuda"))
    )
    assert f"{count} figures were compared; {int(bool(says))} are more than 15%" in predictions.page(
        Run.of(folder, "cuda")
    )


def test_times_from_logits_show_their_bandwidth(folder):
    """Twice as fast as the bytes allow is 200 % of the bandwidth, of a forward that reads 2 bytes a logit and a backward
    that reads and writes them."""
    shape = logits.BASE["cuda"]
    least = 2 * shape.scored * shape.vocab / (roofline.H100.bandwidth * roofline.ACHIEVABLE)
    write(folder, "logits", cases=[logits_case(least, least + 4 * least)])
    forward, backward = rows(folder, "From logits")
    assert forward.cells()[2] == f"{1e3 * least:.3f} ms, 100% of the bandwidth"
    assert backward.cells()[2] == f"{4e3 * least:.3f} ms, 50% of the bandwidth"
    # Memory binds these kernels, and the model says so of both.
    assert all(row.cells()[1].endswith("ms, 100% of the bandwidth") for row in (forward, backward))


def test_the_prediction_from_hidden_states_has_the_references_pass(folder):
    """By hand: four GEMM units and the kernels' bytes, on a plan of one chunk."""
    chip, shape = roofline.H100, linear.BASE["cuda"]
    trained, _ = predicted(folder, "From hidden states")
    plan = linear.plan_of(shape, "bf16", "trained", "cuda")
    unit = 2 * shape.scored * shape.hidden * shape.vocab
    bandwidth = chip.bandwidth * roofline.ACHIEVABLE
    work = roofline.work_of(KERNELS, chip, roofline.KERNELS["chunk"], shape.vocab)
    bytes_moved = shape.scored * shape.vocab * (2 + work.reads + work.writes)
    if len(plan.chunks) > 1:
        elements = shape.vocab * shape.hidden
        bytes_moved += elements * (4 * (2 * len(plan.chunks) - 1) - 2 + 6)
    small = len(plan.chunks) * 20 * roofline.SMALL_KERNEL
    gemms = 4 * unit / (chip.bf16 * roofline.GEMM)
    assert trained == pytest.approx(1 + (bytes_moved / bandwidth + small) / gemms, rel=1e-3)


# Missing predictions and missing measurements ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name, chip",
    [
        (H100, "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA B200", "B200"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD EPYC, 2 logical processors, avx512", None),
    ],
)
def test_a_chip_is_known_by_its_whole_name(name, chip):
    found = predictions.chip_of(name)
    assert (found and found.name) == chip


def test_every_chip_of_the_model_has_a_name():
    assert predictions.DEVICE_NAMES.keys() == {chip.name for chip in roofline.CHIPS}


def test_an_unknown_chip_is_said_to_be_unknown_and_gets_no_time(folder):
    device = "NVIDIA H100 PCIe"
    write(folder, "logits", device=device, cases=[logits_case(1e-3, 3e-3)])
    write(folder, "linear", device=device, cases=[linear_case(1.5, "trained", 10)])
    write(folder, "ceilings", device=device, ceilings={"read bytes/s": 1e12})
    text = predictions.page(Run.of(folder, "cuda"))
    assert f"The device {device!r} is unknown" in text and "H200" in text
    for title in ("Ceilings", "From logits", "From hidden states"):
        found = rows(folder, title)
        assert found and all(row.predicted is None for row in found) and any(row.measured for row in found)
    assert rows(folder, "From logits")[1].cells()[1:] == ["no prediction", "2.000 ms", "", ""]
    # The plan's memory is of any device.
    assert rows(folder, "Peak memory")[0].differs


def test_a_missing_or_broken_file_is_not_measured(folder):
    write(folder, "logits", cases=[logits_case(1e-3, 3e-3)])
    (folder / "linear-cuda.json").write_text('{"cases": [')  # a write that was cut off
    write(folder, "memory", cases=[])
    for title in ("From hidden states", "Peak memory", "A training step"):
        found = rows(folder, title)
        assert found and all(row.cells()[2] == "not measured" and not row.differs for row in found)
    assert all(row.predicted for row in rows(folder, "From hidden states") + rows(folder, "Peak memory"))


def test_a_variant_that_is_absent_is_not_measured(folder):
    case = linear_case(1.1, "trained")
    del case["seconds"]["linear_kto_loss, triton"]
    write(folder, "linear", cases=[case])
    write(folder, "logits", cases=[logits_case(1, 2) | {"seconds": {}}, logits_case(1, 2) | {"dtype": "fp32"}])
    assert [row.cells()[2] for row in rows(folder, "From hidden states")] == ["not measured"]
    assert [row.cells()[2] for row in rows(folder, "From logits")] == ["not measured"] * 2


def test_an_empty_folder_has_a_page_too(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "RESULTS", tmp_path / "none")
    text = predictions.page(Run.of(tmp_path, "cuda"))
    assert "Nothing was measured" in text and "0 figures were compared" in text and "No test's result" in text


def test_few_rows_have_no_prediction(folder):
    """The model speaks of a chip that rows fill."""
    write(folder, "logits", cases=[logits_case(1e-4, 3e-4, tokens=64), logits_case(1, 2)])
    assert [row.predicted is None for row in rows(folder, "From logits")] == [True, True, False, False]


@pytest.mark.parametrize(
    "change", [{"softcap": 30.0}, {"plan": {"text": "another", "peak bytes": 1}}], ids=["softcap", "another plan"]
)
def test_what_the_model_does_not_know_has_no_prediction(folder, change):
    """Kernels with a softcap were not counted; a plan of another version is not the one that ran."""
    write(folder, "linear", cases=[linear_case(1.1, "trained", **change)])
    (row,) = rows(folder, "From hidden states")
    assert row.predicted is None and row.measured


def test_without_machine_code_no_kernels_time_is_predicted(folder):
    write(folder, "inspect", cases=[case | {"target": "sm_80"} for case in KERNELS], launches=LAUNCHES)
    write(folder, "logits", cases=[logits_case(1, 2)])
    assert all(row.predicted is None for row in rows(folder, "From logits") + rows(folder, "From hidden states"))
    assert "No kernel was compiled for sm_90" in predictions.page(Run.of(folder, "cuda"))
    assert rows(folder, "Ceilings")[0].predicted


@pytest.mark.parametrize("counted", [LAUNCHES[:3], LAUNCHES[:1], []], ids=["one head", "nothing", "no table"])
def test_calls_that_were_not_counted_have_no_prediction(folder, counted):
    """As in a file that an earlier version wrote."""
    write(folder, "inspect", cases=KERNELS, launches=counted)
    write(folder, "linear", cases=[linear_case(1.1, "trained"), linear_case(1.1, "frozen")])
    found = rows(folder, "From hidden states")
    assert [row.predicted is None for row in found] == [len(counted) < 3, True] and all(row.measured for row in found)


def test_results_of_two_devices_are_refused(folder):
    write(folder, "logits", cases=[])
    write(folder, "linear", device="NVIDIA H200", cases=[])
    with pytest.raises(SystemExit, match="several devices: NVIDIA H100 80GB HBM3, NVIDIA H200"):
        Run.of(folder, "cuda")


def test_launches_beside_those_that_the_profiler_saw(folder):
    """A kernel more of ours in five is said; where none was counted, one is."""
    call = "linear_kto_loss, trained head"
    counted = [LAUNCHES[0], [call, "forward", "5", "3", "10"], [call, "backward", "0", "0", "2"]]
    write(folder, "inspect", cases=KERNELS, launches=counted)
    seen = [
        {"call": call, "part": "forward", "Triton": 6, "others": 14},
        {"call": call, "part": "backward", "Triton": 1},
    ]
    write(folder, "launches", cases=seen)
    cells = [row.cells() for row in rows(folder, "Launches of a call")]
    assert cells == [
        [f"{call}, forward: kernels of ours", "5", "6", "1.20", "differs by +20%"],
        [f"{call}, forward: others", "13", "14", "1.08", ""],
        [f"{call}, backward: kernels of ours", "0", "1", "inf", "differs by +inf%"],
        [f"{call}, backward: others", "2", "not measured", "", ""],
    ]


class _Profile:
    """PyTorch's profiler of a GPU, which sees the same kernels at every call."""

    def __init__(self, **_): ...
    def __enter__(self):
        return self

    def __exit__(self, *_): ...
    def key_averages(self):
        seen = [("forward_kernel", 1), ("chunk_kernel", 2), ("void at::native::fill", 3), ("Memcpy HtoD", 5)]
        events = [
            SimpleNamespace(key=key, count=count, device_type=SimpleNamespace(name="CUDA")) for key, count in seen
        ]
        return [*events, SimpleNamespace(key="aten::add", count=7, device_type=SimpleNamespace(name="CPU"))]


def test_the_profilers_kernels_are_ours_or_others(monkeypatch):
    monkeypatch.setattr(torch.profiler, "profile", _Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(launches, "calls", lambda device: {"a call": lambda: torch.ones((), requires_grad=True) * 2})
    found = profiled.measure("cpu")
    assert [(case["call"], case["part"], case["Triton"], case["others"]) for case in found] == [
        ("a call", "forward", 3, 3),
        ("a call", "backward", 3, 3),
    ]
    assert found[0]["kernels"] == {"forward_kernel": 1, "chunk_kernel": 2, "void at::native::fill": 3}
    assert profiled.rows(found)[1] == ["a call", "forward", "3", "3"]


def test_launches_are_counted_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = parser().parse_args(["launches"])
    with pytest.raises(SystemExit, match="needs a GPU"):
        args.run(args)


# The page ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_prints_and_writes_the_page(folder, capsys):
    write(folder, "logits", cases=[logits_case(1e-3, 3e-3)])
    args = parser().parse_args(["predictions", "--results", str(folder)])
    args.run(args)
    text = (folder / "predictions-cuda.md").read_text()
    assert H100 in text and "differs by +" in text and "| no prediction |" in text and "| not measured |" in text
    printed = capsys.readouterr().out
    assert H100 in printed and "differs by +" in printed and "From hidden states" in printed


def test_what_pytest_and_the_script_wrote_is_shown(folder):
    case = '<testcase classname="tests.a" name="test_{0}">{1}</testcase>'
    cases = case.format("good", "") + case.format("bad", '<failure message="x"/>') + case.format("left", "<skipped/>")
    suite = f'<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">{cases}</testsuite></testsuites>'
    (folder / "tests-triton.xml").write_text(suite)
    (folder / "tests-cuda.xml").write_text("<testsuites><tests")  # a write that was cut off
    (folder / "tests.log").write_text("== tests-triton, at most 9 s\nF\n== tests-triton: failed after 7 s\n")
    run = Run.of(folder, "cuda")
    assert predictions.tests(folder)[1:] == [["triton", "1", "1", "1", "tests.a::test_bad"]]
    assert predictions.steps(folder) == ["tests-triton: failed after 7 s"]
    text = predictions.page(run)
    assert "| triton | 1 | 1 | 1 | tests.a::test_bad |" in text and "- tests-triton: failed after 7 s" in text


def test_the_kernels_of_the_model_are_among_those_that_are_compiled():
    compiled = {f"{name}, bfloat16" for _, table in inspect.TABLES for name in table}
    assert {variant for _, variant, _ in (*roofline.KERNELS.values(), roofline.SCORES)} <= compiled


def test_a_folder_that_is_not_there_is_named(tmp_path):
    args = parser().parse_args(["predictions", "--results", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"^--results: expected a folder, got .*none"):
        args.run(args)
