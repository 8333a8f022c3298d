"""Training does not notice: the parameters end no farther from plain PyTorch's than runs of plain PyTorch that differ by
rounding are from each other. `python -m benchmarks.training` is the long form, with the picture."""

import json

import pytest

from benchmarks import training
from benchmarks.plots import digest

STEPS = 15


def farther(case: dict) -> list[str]:
    """The losses of ours under which the parameters end too far away."""
    *_, apart = case["distances"][training.PLAIN]
    return [name for name in training.OURS if case["distances"][name][-1] > apart]


@pytest.mark.parametrize("dtype", training.DTYPES)
def test_our_parameters_are_within_plain_pytorch_s_own_rounding(dtype):
    case = training.run(dtype, STEPS)
    assert len(case["losses"][training.PLAIN]) == STEPS
    losses = case["losses"][training.PLAIN]
    assert losses[-1] < 0.95 * losses[0]  # it learns
    assert all(0 < most < 0.01 for most in case["distances"][training.PLAIN])  # runs that differ, by little
    assert farther(case) == []


@pytest.mark.parametrize("dtype", training.DTYPES)
def test_gradients_one_percent_too_large_are_noticed(dtype):
    assert farther(training.run(dtype, 5, seeds=1, error=1.01)) == list(training.OURS)


def test_the_results_that_the_documentation_shows():
    result = json.loads(training.RESULTS.read_text())
    assert [case["dtype"] for case in result["cases"]] == list(training.DTYPES)
    for case in result["cases"]:
        assert case["steps"] == 200 and farther(case) == []
    assert digest(result) in training.RESULTS.with_suffix(".svg").read_text()
