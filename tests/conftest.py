"""Sets the stage before the package is imported: where there is no GPU, Triton's interpreter and the CUDA kernels' host
emulation."""

import contextlib
import gc
import os

import pytest
import torch

from tests.support import short

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("KTO_KERNELS_CUDA_EMULATE", "1")

# `make test` draws the same examples every time, so that a red run can be run again; `make fuzz` draws new ones, and prints
# how to have a failing one again. Not every environment of tests/versions has hypothesis.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings.register_profile("test", derandomize=True, deadline=None, print_blob=True, suppress_health_check=slow)
    examples = int(os.environ.get("EXAMPLES", "1000"))
    settings.register_profile("nightly", settings.get_profile("test"), derandomize=False, max_examples=examples)
    settings.load_profile("test")

# How many faults docs/trust.md numbers.
FAULTS = 20

# Beside other test processes one thread each.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(THREADS)


def pytest_addoption(parser):
    parser.addoption("--short", action="store_true", help="one case of each test, as in `make test`")
    parser.addoption("--rest", action="store_true", help="the cases that --short leaves out")
    parser.addoption("--every-dtype", action="store_true", help="in Triton's interpreter too, where dtypes take turns")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is loaded here stays to the end: Python looks for garbage in it neither now nor when tests collect theirs."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_ignore_collect(collection_path, config):
    """To load every file takes longer than most tests that are run alone: `-m alone` loads those that name the mark."""
    if config.option.markexpr == "alone" and collection_path.suffix == ".py":
        return True if not short.names_alone(collection_path) else None


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        # A property of the report, so that it comes back from the processes of pytest-xdist.
        for marker in item.iter_markers("fault"):
            item.user_properties += [("fault", number) for number in marker.args]
    if not config.option.every_dtype:
        waiting = short.out_of_turn(items)
        _keep(config, items, lambda item: item not in waiting)
    config.stash[short.CASES] = {
        name: (cases, short.representative(name, cases)) for name, cases in short.functions(items).items()
    }
    if config.option.short or config.option.rest:
        kept = {case for _, cases in config.stash[short.CASES].values() for case in cases}
        _keep(config, items, lambda item: (item in kept) == config.option.short)


def _keep(config, items, wanted):
    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


def pytest_terminal_summary(terminalreporter, config):
    """Where the tests of faults were asked for (`make faults`): how many faults have a test that passed, and none that
    failed."""
    if config.option.markexpr != "fault":
        return
    outcomes = {number: set() for number in range(1, FAULTS + 1)}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            for name, number in getattr(report, "user_properties", ()):  # a file that fails to load has none
                if name == "fault":
                    outcomes[number].add(outcome)
    mended = [number for number, seen in outcomes.items() if seen == {"passed"}]
    terminalreporter.write_sep("=", "faults of docs/trust.md")
    for number in sorted(outcomes.keys() - set(mended)):
        terminalreporter.write_line(f"fault {number}: {', '.join(sorted(outcomes[number])) or 'no test ran'}")
    terminalreporter.write_line(f"{len(mended)}/{FAULTS}")


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter():
    from tests.support.interpreter import patched_once_a_launch

    with patched_once_a_launch():
        yield


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    # Examples and demo lower it for their process, which a processor with AMX follows.
    torch.set_float32_matmul_precision("highest")
    yield
    # Left at more, every later test of the process would have threads that wait for each other on busy cores.
    torch.set_num_threads(THREADS)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Every uninitialised buffer holds NaN: what a backend forgets to write is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
