"""The kernels as they are compiled, without a GPU: the PTX that Triton makes of them for sm_80 and sm_90, and nvcc for
sm_90, interpreted by `tests/support/ptx`. Every access to memory is checked, and every result. That the interpreter
finds faults is tested in test_ptx_faults.py; `make fuzz` runs thousands of random problems."""

import importlib.util

import pytest

from tests.support.ptx import build, process
from tests.support.ptx.problems import PROBLEMS

TRITON = [(arch, name) for arch in (90, 80) for name in PROBLEMS]


def run(*arguments):
    counts = process.run(process.check, *arguments)
    assert counts["launches"] > 0
    assert counts["findings"] == 0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not there")
@pytest.mark.parametrize(("arch", "problem"), TRITON, ids=lambda value: f"sm_{value}" if value in (80, 90) else value)
def test_triton_as_compiled(arch, problem):
    run("triton", arch, problem, range(3))


@pytest.mark.skipif(build.nvcc() is None, reason="nvcc is not there, which makes PTX of csrc/cuda")
@pytest.mark.parametrize("problem", PROBLEMS)
def test_cuda_as_compiled(problem):
    run("cuda", 90, problem, range(3))
