"""Sets the stage before the package is imported: where there is no GPU, Triton's interpreter and the CUDA kernels' host
emulation."""

import contextlib
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("KTO_KERNELS_CUDA_EMULATE", "1")

# `make test` draws the same examples every time, so that a red run can be run again; `make fuzz` draws new ones, and prints
# how to have a failing one again. The environments of tests/versions have no hypothesis.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings.register_profile("test", derandomize=True, deadline=None, print_blob=True, suppress_health_check=slow)
    settings.register_profile("nightly", settings.get_profile("test"), derandomize=False, max_examples=1000)
    settings.load_profile("test")

# Beside other test processes one thread each; the tests of threading ask for theirs.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Every uninitialised buffer holds NaN: what a backend forgets to write is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
