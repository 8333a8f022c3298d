"""`make test` leaves out cases, and no promise. Each test here speaks of all tests that its run has collected,
which are all there are in `make test` and `make test-all`."""

from pathlib import Path

from kto_kernels.backends import BACKENDS
from tests.support import harness
from tests.support.short import CASES, names_alone


def test_the_short_run_has_a_case_of_every_test(request):
    """Or of the test beside it that the mark `wide` names."""
    collected = request.config.stash[CASES]
    for name, (cases, kept) in collected.items():
        if not kept:
            (sibling,) = cases[0].get_closest_marker("wide").args
            assert collected[f"{name.split('::')[0]}::{sibling}"][1], name


def test_files_with_tests_that_run_alone_name_the_mark(request):
    """`-m alone` loads no others."""
    collected = request.config.stash[CASES].values()
    files = {case.path for cases, _ in collected for case in cases if case.get_closest_marker("alone")}
    assert all(map(names_alone, files)), [file for file in files if not names_alone(file)]
    assert not names_alone(Path(__file__).parent / "test_docs.py")


def test_a_backend_that_cannot_run_on_the_gpu_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.setattr(BACKENDS["cuda"], "unavailable", lambda device: f"nobody built it for {device}")
    monkeypatch.setattr(BACKENDS["torch"], "unavailable", lambda device: None)
    gpu, skip = harness.on_gpu(("cuda", "cuda"))
    assert (gpu.name, skip.name, skip.kwargs) == ("gpu", "skip", {"reason": "nobody built it for cuda"})
    assert [mark.name for mark in harness.on_gpu(("torch", "cuda"))] == ["gpu"]
