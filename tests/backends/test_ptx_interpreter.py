"""The interpreter of PTX on kernels of a few lines: orders that PTX's memory model knows, and faults that no mutant of
the package's kernels shows."""

import pytest
import torch

from tests.support.ptx.machine import Machine, packed, parse
from tests.support.ptx.memory import Memory

HEAD = """
.visible .entry kernel(.param .u64 .ptr .global .align 1 first, .param .u64 .ptr .global .align 1 second)
.reqntid {threads}
{{
ld.param.b64 %rd1, [first]; ld.param.b64 %rd2, [second];
mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x;
"""


def run(body: str, first: torch.Tensor, second: torch.Tensor, roles=("in", "inout"), threads=1, blocks=1) -> set[str]:
    """Kinds of what is found in 20 launches, each with another order of the threads."""
    machine = Machine(strict=False)
    (program,) = parse(HEAD.format(threads=threads) + body + "\nret;\n}\n").values()
    for _ in range(20):
        memory = Memory()
        at = [memory.add(name, x, role) for name, x, role in zip(("first", "second"), (first, second), roles)]
        machine.launch(program, blocks, threads, 128, packed(program, at), memory)
    return {finding.kind.split(":")[0] for finding in machine.findings}


# Each of two blocks writes a word, counts itself, and the last one reads both.
COUNT = """
shl.b32 %r3, %r2, 2; cvt.u64.u32 %rd3, %r3; add.s64 %rd4, %rd1, %rd3;
st.global.b32 [%rd4], 7;
{before}
{atomic}.add.u32 %r4, [%rd2], 1;
{behind}
setp.eq.u32 %p1, %r4, 0;
@%p1 bra $L_end;
st.global.b32 [%rd2], 0;
ld.global.b32 %r5, [%rd1]; ld.global.b32 %r6, [%rd1+4];
$L_end:
"""


@pytest.mark.parametrize(
    ("before", "atomic", "behind", "ordered"),
    [
        ("membar.gl;", "atom.global", "membar.gl;", True),
        ("fence.acq_rel.gpu;", "atom.global.gpu.relaxed", "fence.acq_rel.gpu;", True),
        ("", "atom.global.gpu.acq_rel", "", True),
        ("membar.gl;", "atom.global", "", False),
        ("", "atom.global", "membar.gl;", False),
        ("membar.cta;", "atom.global", "membar.cta;", False),
        ("", "atom.global.gpu.release", "", False),
        ("", "atom.global.gpu.acquire", "", False),
        ("membar.gl;", "atom.global.gpu.acquire", "", True),
        ("", "atom.global.gpu.release", "membar.gl;", True),
        ("", "atom.global.cta.acq_rel", "", False),
    ],
)
def test_orders_between_blocks(before, atomic, behind, ordered):
    body = COUNT.format(before=before, atomic=atomic, behind=behind)
    found = run(
        body, torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), ("scratch", "inout"), blocks=2
    )
    assert found == (set() if ordered else {"race"})


# Each thread writes a word in shared memory and reads its neighbour's.
SHARE = """
shl.b32 %r3, %r1, 2; xor.b32 %r4, %r3, 4;
st.shared.b32 [%r3], %r1;
{between}
ld.shared.b32 %r5, [%r4];
"""


@pytest.mark.parametrize(
    ("between", "found"),
    [("bar.sync 0;", set()), ("", {"race", "read of memory that nothing has written"}), ("membar.cta;", {"race"})],
)
def test_orders_in_a_block(between, found):
    nothing = torch.zeros(1)
    assert found <= run(SHARE.format(between=between), nothing, nothing.clone(), threads=4)
    if not found:
        assert run(SHARE.format(between=between), nothing, nothing.clone(), threads=4) == set()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        pytest.param("st.global.b32 [%rd1], 0;", "write to an input", id="input"),
        pytest.param("ld.global.b32 %r3, [%rd1+2];", "misaligned", id="misaligned"),
        pytest.param("ld.global.v2.b32 {%r3, %r4}, [%rd1+12];", "misaligned", id="vector"),
        pytest.param("ld.global.b32 %r3, [%rd1+16];", "outside every tensor", id="behind"),
        pytest.param("ld.global.b32 %r3, [%rd1+-4];", "outside every tensor", id="in front"),
        pytest.param("div.u32 %r3, 1, %r1;", "division by zero", id="division"),
        pytest.param("setp.eq.u32 %p1, %r1, 0; @%p1 bra $L; bar.sync 0; $L:", "barrier", id="one thread without it"),
        pytest.param(
            "setp.eq.u32 %p1, %r1, 0; @%p1 bra $L; bar.sync 0; bra $M; $L: bar.sync 0; $M:", "barrier", id="two"
        ),
        pytest.param(
            "setp.eq.u32 %p1, %r1, 0; @%p1 bra $L; shfl.sync.idx.b32 %r3, %r1, 1, 31, 3; bra $M; $L: bar.sync 0; $M:",
            "deadlock", id="deadlock"
        ),
        pytest.param(
            "setp.eq.u32 %p1, %r1, 0; @%p1 bra $L; shfl.sync.idx.b32 %r3, %r1, 0, 31, 2; $L:", "exchange of a warp",
            id="a lane that takes no part"
        ),
        pytest.param("$L: bra $L;", "too long", id="endless"),
    ],
)  # fmt: skip
def test_faults_of_a_few_lines(body, kind, monkeypatch):
    monkeypatch.setattr(Machine, "BUDGET", 100_000)
    lines = body.replace("; ", ";\n").replace(": ", ":\n")
    found = run(lines, torch.zeros(4, dtype=torch.int32), torch.zeros(1), threads=2)
    assert kind in found


def test_an_output_that_is_not_all_written():
    found = run("st.global.b32 [%rd2], 0;", torch.zeros(1), torch.zeros(2), ("in", "out"))
    assert found == {"output that the kernel has not written"}


# One instruction of each kind whose rule C++ does not have: the operands' bits as fp32 or integers, and the result's.
@pytest.mark.parametrize(
    ("instruction", "operand", "result"),
    [
        ("cvt.rn.bf16.f32 %h1, %r3; mov.b32 %r4, {%h1, %h1};", 0x3F808000, 0x3F803F80),  # to even
        ("cvt.rn.bf16.f32 %h1, %r3; mov.b32 %r4, {%h1, %h1};", 0x3F818000, 0x3F823F82),
        ("cvt.rn.f16.f32 %h1, %r3; mov.b32 %r4, {%h1, %h1};", 0x477FF000, 0x7C007C00),  # 65520: to infinity
        ("max.f32 %r4, %r3, 0f3F800000;", 0x7FC00000, 0x3F800000),  # NaN loses
        ("min.f32 %r4, %r3, 0f00000000;", 0x80000000, 0x80000000),  # −0 is below 0
        ("ex2.approx.ftz.f32 %r4, %r3;", 0xC3000000, 0x00000000),  # 2^−128 is subnormal
        ("shr.s32 %r4, %r3, 40;", 0x80000000, 0xFFFFFFFF),
        ("shl.b32 %r4, %r3, 32;", 0x00000001, 0x00000000),
        ("cvt.rzi.s32.f32 %r4, %r3;", 0x7F800000, 0x7FFFFFFF),  # saturates
        ("mul.hi.u32 %r4, %r3, %r3;", 0xFFFFFFFF, 0xFFFFFFFE),
        ("prmt.b32 %r4, %r3, 0, 0x3210;", 0x12345678, 0x12345678),
        ("prmt.b32 %r4, %r3, 0, 0x0123;", 0x12345678, 0x78563412),
        ("bfe.u32 %r4, %r3, 8, 8;", 0x12345678, 0x00000056),
    ],
)
def test_instructions(instruction, operand, result):
    first = torch.tensor([operand], dtype=torch.int64).to(torch.int32)
    second = torch.zeros(1, dtype=torch.int32)
    body = f"ld.global.b32 %r3, [%rd1];\n{instruction}\nst.global.b32 [%rd2], %r4;"
    assert run(body, first, second, ("in", "out")) == set()
    assert second.item() & 0xFFFFFFFF == result
