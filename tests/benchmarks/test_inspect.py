"""What is known without a GPU: instructions read out of machine code, times made of them by arithmetic, and launches."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from benchmarks import inspect, launches, roofline, sass
from kto_kernels import LinearPlan

pytest.importorskip("triton")

# Machine code ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def code(*lines: str) -> list[str]:
    """Made-up machine code as nvdisasm prints it: labels begin with a dot, all other lines are instructions."""
    return [
        f"{line}:" if line.startswith(".") else f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines)
    ]


LOOP = code(
    "MOV R1, c[0x0][0x28]",
    "DADD R2, R2, R4",
    ".L_x_0",
    "LDG.E.128 R4, [R2.64]",
    "LDG.E.128 R8, [R2.64+0x10]",
    "FMNMX R0, R0, R4, !PT",
    "FFMA R4, R4, R5, R6",
    "MUFU.EX2 R4, R4",
    "FADD R7, R7, R4",
    "ISETP.NE.AND P0, PT, R1, RZ, PT",
    "@P0 BRA `(.L_x_0)",
    "DFMA R2, R2, R4, R6",
    "MUFU.RCP64H R9, R3",
    "F2F.F64.F32 R2, R4",
    "STG.E [R2.64], R7",
    "EXIT",
)


@pytest.mark.parametrize(("logit_bytes", "logits"), [(2, 16), (4, 8)])
def test_a_loop_of_known_counts(logit_bytes, logits):
    found = sass.read(LOOP, logit_bytes, counted=False)
    assert found["write"] is None
    fold = found["fold"]
    assert (fold["instructions"], fold["loads"], fold["logits"]) == (8, 2, logits)
    assert fold["a logit"] == 8 / logits
    assert fold["mix"] == {"other": 3, "ALU": 2, "FMA": 2, "MUFU": 1}


def test_fp64_is_counted_in_all_of_its_spellings():
    """An addition, a product with a sum, the start of a reciprocal, and a conversion: not the MUFU of the loop."""
    found = sass.read(LOOP, 2, counted=False)
    assert found["fp64"] == found["row"]["FP64"] == 4
    assert found["row"]["MUFU"] == 1


def test_what_comes_behind_the_counter_of_rows_is_no_row():
    lines = code(
        "DADD R2, R2, R4", "ATOMG.E.ADD R0, [R2.64], R1", "@P0 EXIT", "DADD R2, R2, R4", "DMUL R2, R2, R4", "EXIT"
    )
    assert sass.read(lines, 2, counted=True)["fp64"] == 1
    assert sass.read(lines, 2, counted=False)["fp64"] == 3


def test_a_loop_within_a_loop_is_the_one_that_counts():
    lines = code(
        ".L_x_0",
        "MOV R1, R2",
        "MOV R3, R2",
        ".L_x_1",
        "LDG.E.128 R4, [R2.64]",
        "FADD R7, R7, R4",
        "@P1 BRA `(.L_x_1)",
        "IADD3 R1, R1, 0x1, RZ",
        "@P0 BRA `(.L_x_0)",
        "EXIT",
    )
    (loop,) = sass.loops(sass.blocks_of(lines))
    assert (loop.instructions, loop.loads) == (3, 1)


def test_a_predicated_jump_over_work_makes_the_way_round_shorter_but_never_over_a_load():
    def lines(skipped: str) -> list[str]:
        return code(
            ".L_x_0",
            "LDG.E.128 R4, [R2.64]",
            "@P1 BRA `(.L_x_1)",
            skipped,
            "FADD R7, R7, R4",
            "FADD R8, R8, R4",
            ".L_x_1",
            "@P0 BRA `(.L_x_0)",
            "EXIT",
        )

    def around(skipped: str) -> tuple[int, int]:
        (loop,) = sass.loops(sass.blocks_of(lines(skipped)))
        return loop.instructions, loop.loads

    assert around("FADD R6, R6, R4") == (3, 1)
    assert around("LDG.E.128 R8, [R2.64+0x10]") == (6, 2)


def test_a_jump_without_a_predicate_is_always_taken():
    lines = code(".L_x_0", "LDG.E.128 R4, [R2.64]", "BRA `(.L_x_1)", "FADD R7, R7, R4", ".L_x_1", "@P0 BRA `(.L_x_0)")
    blocks = sass.blocks_of(lines)
    assert [i.name for n in sorted(sass.reached(blocks)) for i in blocks[n].instructions] == ["LDG.E.128", "BRA", "BRA"]


def test_of_loops_with_as_many_loads_the_shortest_counts_and_writing_ones_apart():
    def loop(label: str, *body: str) -> list[str]:
        return [label, "LDG.E.128 R4, [R2.64]", *body, f"@P0 BRA `({label})"]

    test = "ISETP.GE.AND P1, PT, R1, R2, PT"
    lines = code(
        *loop(".L_x_0", test, test, "FADD R7, R7, R4"),
        *loop(".L_x_1", "FADD R7, R7, R4"),
        *loop(".L_x_2", "FMUL R4, R4, R5", "FMUL R4, R4, R5", "STG.E.128 [R2.64], R4"),
        "EXIT",
    )
    found = sass.read(lines, 2, counted=False)
    assert (found["fold"]["instructions"], found["write"]["instructions"]) == (3, 5)
    assert (found["fold"]["stores"], found["write"]["stores"]) == (0, 1)


def test_widths_of_loads():
    lines = code("LDG.E.128 R4, [R2.64]", "LDG.E R4, [R2.64]", "LDG.E.U16 R4, [R2.64]", "STG.E.64 [R2.64], R4")
    assert sass.widths(lines, "LDG") == {"128": 1, "32": 1, "16": 1}
    assert sass.widths(lines, "STG") == {"64": 1}


# Times ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

VOCAB, H100 = 128256, roofline.H100


def work(threads=512, programs=4, row=None, **mix) -> roofline.Work:
    """A kernel that folds 32 logits in a round of the instructions in `mix`, and moves 2 bytes a logit."""
    fold = {"logits": 32, "instructions": sum(mix.values()), "mix": mix}
    return roofline.Work({"fold": fold, "write": None, "row": row or {}}, threads, programs, VOCAB, 2, 0)


CASES = {
    "memory": work(ALU=32),
    "issue": work(ALU=32 * 40),
    "MUFU": work(MUFU=32 * 4),
    "FP64": work(ALU=32, row={"FP64": 10_000}),
    "latency": work(ALU=32, threads=32, programs=1),
}


@pytest.mark.parametrize("binds", CASES)
def test_what_binds(binds):
    took = roofline.seconds_a_row(CASES[binds], H100)
    assert max(took, key=took.get) == binds


def test_seconds_are_bytes_or_instructions_over_their_rate():
    took = roofline.seconds_a_row(dataclasses.replace(work(ALU=64, MUFU=32, row={"FP64": 10}), writes=2), H100)
    assert took["memory"] == pytest.approx(VOCAB * 4 * 132 / (3.35e12 * 0.9))
    assert took["issue"] == pytest.approx((VOCAB * 3 + 512 * 10) / 128 / 1.83e9)
    assert took["MUFU"] == pytest.approx(VOCAB / 16 / 1.83e9)
    assert took["FP64"] == pytest.approx(512 * 10 / 64 / 1.83e9)


def test_a_kernel_that_memory_binds_is_faster_the_higher_the_bandwidth_until_another_thing_binds():
    chips = [dataclasses.replace(H100, bandwidth=factor * H100.bandwidth) for factor in (0.5, 1, 2, 4, 1000, 2000)]
    times = [max(roofline.seconds_a_row(CASES["memory"], chip).values()) for chip in chips]
    assert times == sorted(times, reverse=True)
    assert times[0] == pytest.approx(2 * times[1])
    assert times[-1] == times[-2]


def test_the_cache_spares_what_fits_into_it():
    small = roofline.chunk_reads(1000, H100, 1)
    assert small == pytest.approx(2 + 2 * 0.3)
    twice = H100.l2 // (2 * 132)  # rows of it take twice the cache: half of what fits is found again
    assert roofline.chunk_reads(2 * twice, H100, 1) == pytest.approx(2 + 2 * (1 - 0.7 / 2), rel=1e-4)


# The page's arithmetic ────────────────────────────────────────────────────────────────────────────────────────────────

PAGE = " ".join((Path(__file__).parents[2] / "docs/gpu.md").read_text().split())


def written(pattern: str) -> tuple[float, ...]:
    """The numbers that `pattern` finds in docs/gpu.md."""
    found = re.search(pattern, PAGE)
    assert found, pattern
    return tuple(map(float, found.groups()))


def parts(trained: bool, **options) -> dict[str, float]:
    """The parts of the loss from hidden states on an H100 in milliseconds, where memory binds `chunk`."""
    plan = LinearPlan.of([2048] * 4, VOCAB, 4096, needs_weight=trained, **options)
    row = VOCAB * (roofline.chunk_reads(1, H100, 1) + 2) * H100.processors / (H100.bandwidth * roofline.ACHIEVABLE)
    return {name: 1e3 * took for name, took in roofline.linear(plan, H100, trained, row, 10).items()}


def test_the_gemms_take_what_the_page_says():
    unit, frozen, trained = written(
        r"= ([\d.]+) ms: a frozen head's two take ([\d.]+) ms, a trained.*?take ([\d.]+) ms"
    )
    assert parts(False)["GEMMs"] == pytest.approx(frozen, abs=0.06)
    assert parts(True)["GEMMs"] == pytest.approx(trained, abs=0.06)
    assert parts(True)["GEMMs"] / 3 == pytest.approx(unit, abs=0.06)


def test_a_chunks_kernel_takes_what_the_page_says():
    (expected,) = written(r"are 4\.83 GB, or ([\d.]+) ms")
    assert parts(True)["chunk"] == pytest.approx(expected, abs=0.006)


def test_two_chunks_take_what_the_page_says():
    (sums,) = written(r"= 5\.25 GB, or ([\d.]+) ms")
    (rounding,) = written(r"3\.15 GB, or ([\d.]+) ms")
    (small,) = written(r"each is taken for (\d+) µs")
    two = parts(True, max_logits_bytes=4096 * VOCAB * 2)
    assert two["sums of dW"] == pytest.approx(sums, abs=0.006)
    assert two["rounding of dW"] == pytest.approx(rounding, abs=0.006)
    assert two["small kernels"] == pytest.approx(2 * 10 * small / 1e3)
    one = parts(True)
    assert "sums of dW" not in one and "rounding of dW" not in one


# Launches ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_loss_from_logits_is_one_kernel_forward_and_one_backward():
    """And one of PyTorch that makes the 1 to begin the backward with; none of it makes inputs or tests labels."""
    _, rows = launches.table()
    assert rows[1:3] == [["kto_loss", "forward", "1", "0", "0"], ["kto_loss", "backward", "1", "0", "1"]]


def test_operators_that_launch_nothing_are_not_counted():
    with launches.counted() as counts:
        x = torch.empty(4, 4)
        x.view(16)[:3].detach()
        assert counts == {}
        x @ x
        torch.zeros(3)
        assert counts == {"GEMM": 1, "PyTorch": 1}


def test_a_further_chunk_is_the_difference_of_two_and_one():
    head = launches.TRAINED
    rows = [["call", "part", "Triton", "GEMMs", "PyTorch"]]
    rows += [
        [f"linear_kto_loss, {head}", part, "1", "3", count] for part, count in (("forward", "7"), ("backward", "1"))
    ]
    rows += [[f"linear_kto_loss, {head}, two chunks", "forward", "2", "6", "19"]]
    assert launches.of_a_chunk(rows, head) == 12


def test_another_checkout_must_have_the_launchers(tmp_path):
    with pytest.raises(SystemExit, match=r"--old: .*kto_kernels is not there"):
        inspect.of_checkout(tmp_path, ["sm_90"], cuda=False)
    for name in ("kto_kernels", "csrc"):
        (tmp_path / name).mkdir()
    (tmp_path / "kto_kernels" / "__init__.py").write_text("")
    with pytest.raises(SystemExit, match="its launchers are not those that this file calls"):
        inspect.of_checkout(tmp_path, ["sm_90"], cuda=False)
