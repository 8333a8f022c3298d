"""That the interpreter of PTX finds faults: kernels without a barrier, with a relaxed order, a wrong hint of alignment
or a mask that is off by one (`tests/support/ptx/mutants.py`)."""

import importlib.util

import pytest

from tests.support.ptx import build, mutants, process

with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not there")
with_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="nvcc is not there, which makes PTX of csrc/cuda")


def named(*names: str) -> list:
    found = {mutant.what: mutant for mutant in mutants.TRITON}
    return [pytest.param(found[name], id=name) for name in names]


@with_triton
@pytest.mark.parametrize(
    "mutant",
    named(
        "no barrier before the label's entry",
        "a row's counter relaxed",
        "the rows' counter relaxed",
        "a row's counter of a block",
        "a hint that all rows are aligned",
        "a vector too many",
        "the edge of the gradient one too far",
        "a label behind the last token",
        "statistics one too far",
        "all programs load the label's logit",
        "all threads load the edge",
    ),
)
def test_a_fault_in_triton_is_found(mutant):
    found = process.run(mutants.findings, mutant)
    assert mutants.caught(mutant, found), found


@with_triton
def test_every_mutant_changes_the_sources():
    assert process.run(mutants.stale) == []


@with_nvcc
@pytest.mark.parametrize(
    ("kernel", "pattern", "number", "found_as"),
    [
        pytest.param("forward", mutants.BARRIER, 0, mutants.RACE, id="barrier"),
        pytest.param("forward", mutants.FENCE, 0, mutants.BETWEEN, id="fence in front of the counter"),
        pytest.param("forward", mutants.FENCE, 1, mutants.BETWEEN, id="fence behind the counter"),
        pytest.param("backward", mutants.BARRIER, 0, mutants.RACE, id="barrier before the label's entry"),
    ],
)
def test_a_fault_in_cuda_is_found(kernel, pattern, number, found_as):
    """In its PTX, as nvcc takes long."""
    arguments = ("cuda", "tokens, float32", f"{kernel}_kernel", pattern, number, found_as)
    found = process.run(mutants.without, *arguments)
    assert any(found_as in kind for kind in found), found
