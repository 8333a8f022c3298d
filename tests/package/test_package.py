"""The package as a user meets it: the report, the versions, the typing marker, what an import pulls in."""

import importlib.metadata
import inspect
import logging
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import kto_kernels
from kto_kernels import available_backends, token_logps
from kto_kernels.backends import _automatic

ROOT = Path(__file__).parents[2]


def test_report_names_versions_devices_and_backends():
    """Without Triton's interpreter, which a user does not ask for and which takes the self-test longest."""
    command, environment = [sys.executable, "-m", "kto_kernels"], os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/", env=environment)
    assert f"kto_kernels {kto_kernels.__version__}" in run.stdout
    assert f"torch {torch.__version__}" in run.stdout
    for name in available_backends():
        assert f"  {name}: " in run.stdout
    assert "instruction sets" in run.stdout
    assert run.stdout.splitlines()[-1].startswith("self-test: passed on ")


def test_the_version_is_written_in_one_place():
    assert importlib.metadata.version("kto-kernels") == kto_kernels.__version__
    hits = [p for p in ("pyproject.toml", "setup.py") if kto_kernels.__version__ in (ROOT / p).read_text()]
    assert not hits


def test_the_package_says_that_it_is_typed():
    assert (Path(kto_kernels.__file__).parent / "py.typed").exists()


def test_available_backends_says_which_and_why_not():
    assert available_backends()["cpu"] is None and available_backends()["torch"] is None
    assert "CPU tensors" in available_backends("cuda")["cpu"]


def test_auto_says_once_what_it_picked(caplog):
    _automatic.cache_clear()
    with caplog.at_level(logging.INFO, logger="kto_kernels"):
        for _ in range(3):
            token_logps(torch.randn(2, 5), torch.tensor([1, 2]))
            token_logps(torch.randn(2, 5).double(), torch.tensor([1, 2]))
    assert [record.getMessage() for record in caplog.records] == [
        "backend='cpu' for float32 logits on cpu",
        "backend='torch' for float64 logits on cpu; not 'cpu': it does not take float64",
    ]


def test_import_needs_no_optional_package():
    code = """
import sys
for name in ("triton", "transformers", "numpy", "rich", "trl", "liger_kernel"):
    sys.modules[name] = None
import kto_kernels, torch
kto_kernels.token_logps(torch.randn(2, 5), torch.tensor([1, 2]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_public_docstrings_say_what_they_raise():
    for name in ("kto_loss", "token_logps", "sequence_logps", "kl_reference_point", "kto_loss_from_logps"):
        doc = getattr(kto_kernels, name).__doc__
        assert doc and ("Raises" in doc or "errors as for" in doc), name


@pytest.mark.parametrize("name", ["kto_loss", "KTOLoss"])
def test_signatures_of_the_contract(name):
    """Names and defaults that trainers write down; a change here is a break."""
    parameters = inspect.signature(getattr(kto_kernels, name)).parameters
    expected = {
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "loss_type": "kto",
        "average_log_prob": False,
        "reduction": "mean",
        "ignore_index": -100,
        "shift": False,
        "temperature": 1.0,
        "inplace_backward": False,
        "process_group": None,
        "vocab_group": None,
        "vocab": None,
        "context_group": None,
        "backend": "auto",
    }
    for option, default in expected.items():
        assert parameters[option].default == default
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY


MODULES = {
    "KTOLoss": "kto_loss",
    "LinearKTOLoss": "linear_kto_loss",
    "PreferenceLoss": "preference_loss",
    "LinearPreferenceLoss": "linear_preference_loss",
}


@pytest.mark.parametrize("module, function", MODULES.items())
def test_a_module_takes_what_its_function_takes(module, function):
    """Each parameter once, with its default: an option at construction, a tensor at call, where it arrives."""
    from kto_kernels import modules

    cls = getattr(kto_kernels, module)
    sides = [list(inspect.signature(f).parameters.values())[1:] for f in (cls.__init__, cls.forward)]
    expected = list(inspect.signature(getattr(kto_kernels, function)).parameters.values())
    assert sorted(map(str, sides[0] + sides[1])) == sorted(map(str, expected))
    tensors = {p.name: object() for p in sides[1]}
    loss = cls(kto_kernels.objectives.DPO()) if "Preference" in module else cls()
    with mock.patch.object(modules, function, autospec=True) as called:
        loss(**tensors)
    arguments = inspect.signature(called).bind(*called.call_args.args, **called.call_args.kwargs).arguments
    assert arguments == tensors | loss.options


def test_the_grid_leaves_no_backend_out():
    """A backend that cannot run here would drop out of every parametrised test without a word."""
    from tests.support.harness import PLACES

    assert {place.values[0][0] for place in PLACES} == set(available_backends()), (
        "missing: install Triton, and the package with KTO_KERNELS_CUDA_EMULATION=1"
    )
