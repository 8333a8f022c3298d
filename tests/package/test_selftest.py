"""`python -m kto_kernels` answers "does it work on my machine?": every backend that runs here is tried, a fault fails."""

import dataclasses
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch

from kto_kernels import available_backends, selftest
from kto_kernels.backends import BACKENDS
from kto_kernels.backends.base import Backend

FUNCTIONS = ("kto_loss", "linear_kto_loss")
HERE = [name for name, reason in available_backends().items() if reason is None]
# A broken backend changes the gradient, and puts it off by so much.
BREAKS = {"zeros": (lambda gradient: gradient.zero_(), 1), "a factor of 1.001": (lambda g: g.mul_(1.001), 1e-3)}


def spoil(monkeypatch, name: str, spoil_gradient) -> None:
    """Makes the gradients of a backend wrong: of logits, and of the logits of a chunk."""
    backend = BACKENDS[name]
    backward, score = backend.logits_backward, backend.score_chunk

    def logits_backward(*args):
        backward(*args)
        spoil_gradient(args[-1])

    def score_chunk(logits, labels, scale, gradient, outputs):
        scores = score(logits, labels, scale, gradient, outputs)
        if gradient:
            spoil_gradient(logits)
        return scores

    monkeypatch.setattr(backend, "logits_backward", logits_backward)
    if type(backend).score_chunk is not Backend.score_chunk:  # that one calls the other
        monkeypatch.setattr(backend, "score_chunk", score_chunk)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The backends of the processor alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(selftest, "available_backends", lambda device: {"cpu": None, "torch": None})


def run_main(monkeypatch, capsys) -> tuple[int, list[str]]:
    """Exit status and lines of `python -m kto_kernels`, in this process."""
    monkeypatch.delitem(sys.modules, "kto_kernels.__main__", raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("kto_kernels", run_name="__main__")
    return stopped.value.code or 0, capsys.readouterr().out.splitlines()


def test_it_passes_here_on_every_backend_in_less_than_five_seconds():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "kto_kernels"], capture_output=True, text=True, cwd="/", env=environment
    )
    assert run.returncode == 0, run.stderr
    *report, line = run.stdout.splitlines()
    found = re.fullmatch(r"self-test: passed on (.*) \((\d+\.\d) s\)", line)
    assert found and float(found[2]) < 5
    runs = [said[1] for said in (re.fullmatch(r"  (\w+): available", part) for part in report) if said]
    assert set(re.findall(r"\w+", found[1])) - {"on", "a", "GPU"} == set(runs) >= {"cpu", "torch"}


def test_the_interpreter_is_tried_where_it_was_asked_for():
    if "triton" not in HERE:
        pytest.skip("Triton's interpreter does not run here")
    passed, line = selftest.self_test()
    assert passed and "triton" in line


@pytest.mark.parametrize("spoiled", BREAKS.values(), ids=BREAKS)
@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_a_wrong_gradient_fails_and_is_named(name, spoiled, on_the_cpu, monkeypatch, capsys):
    spoil_gradient, off = spoiled
    spoil(monkeypatch, name, spoil_gradient)
    status, (*_, line) = run_main(monkeypatch, capsys)
    assert status == 1 and line.startswith("self-test: FAILED: ")
    for function, leaf in (("kto_loss", "logits"), ("linear_kto_loss", "hidden"), ("linear_kto_loss", "weight")):
        (said,) = re.findall(rf"backend '{name}' on cpu, {function}, float32: ([^;]*)", line)
        assert f"the gradient of {leaf} is off by {off:g} of its largest value" in said
        assert "loss is off" not in said
    assert line.count("backend ") == line.count(f"backend '{name}'")


@pytest.mark.parametrize("value", [0.0, 1.001, float("nan")])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_wrong_loss_fails_and_is_named(function, value, on_the_cpu, monkeypatch):
    right = getattr(selftest, function)

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        return dataclasses.replace(out, loss=out.loss * value) if kwargs["backend"] == "torch" else out

    monkeypatch.setattr(selftest, function, wrong)
    passed, line = selftest.self_test()
    assert not passed and f"backend 'torch' on cpu, {function}, float32: loss is off by" in line
    assert line.count("backend ") == line.count(f"backend 'torch' on cpu, {function}")


def test_a_backend_that_raises_fails_and_says_why(on_the_cpu, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(BACKENDS["torch"], "kto_forward", broken)
    status, (*_, line) = run_main(monkeypatch, capsys)
    said = "backend 'torch' on cpu, kto_loss, float32: RuntimeError: no kernel image for this device"
    assert status == 1 and said in line


def test_no_result_is_so_small_that_zeros_would_pass():
    for dtype, tolerance in selftest.TOLERANCES.items():
        given = {
            name: tensor.double() if tensor.is_floating_point() else tensor
            for name, tensor in selftest.inputs(dtype).items()
        }
        for function in FUNCTIONS:
            found = selftest.exact(function, given)
            assert all(tensor.abs().max() > 1e-3 for tensor in found.values()) and tolerance < 0.05


def test_the_package_does_not_load_it():
    code = "import sys, kto_kernels; sys.exit('kto_kernels.selftest' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
