"""A compiler is told of every operator what the operator does: the outputs' dtypes, shapes and strides, for every
dtype and subset of gradients, and whether it reads values on the host. No output is a view: autograd allows no change in
place of a view that was made inside an operator."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kto_kernels.backends import BACKENDS
from tests.support.harness import PLACES
from tests.support.operator_cases import DTYPES, LAYOUTS, SCORINGS, labels_of, linear_cases, logits_cases, operators

CPU_DTYPES = DTYPES[:3]
PAIRS = [("torch", dtype) for dtype in DTYPES] + [("cpu", dtype) for dtype in CPU_DTYPES]


def described(result) -> list[tuple]:
    outputs = () if result is None else (result,) if isinstance(result, torch.Tensor) else result
    assert not any(x._is_view() for x in outputs)
    return [(x.dtype, tuple(x.shape), x.stride(), x.device) for x in outputs]


def check(cases) -> None:
    mode = FakeTensorMode()
    for operator, arguments in cases:
        overload = operator._opoverload
        fakes = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments]
        with mode:
            fake = described(overload(*fakes))
        where = (overload, [x.dtype if isinstance(x, torch.Tensor) else x for x in arguments])
        assert fake == described(overload(*arguments)), where


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_from_logits_equal_their_fakes(layout):
    for (backend, dtype), scoring in zip(PAIRS, itertools.cycle(SCORINGS)):
        check(logits_cases(layout, dtype, backend, scoring))


@pytest.mark.parametrize("place", [place for place in PLACES if place.values[0][0] in ("triton", "cuda")])
def test_fakes_of_the_gpu_kernels(place):
    backend, device = place
    for operator, arguments in logits_cases("packed", torch.float16, backend):
        moved = (x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments)
        check([(operator, tuple(moved))])


@pytest.mark.fault(7)
def test_fakes_of_an_fp16_head_whose_gradient_is_not_needed():
    check(linear_cases("padded", (torch.float16,) * 3, torch.float16, "cpu"))


@pytest.mark.parametrize("hidden_dtype", DTYPES)
def test_fakes_from_hidden_states_of_every_dtype(hidden_dtype):
    for k, weight_dtype in itertools.product(range(3), DTYPES):
        bias_dtype = None if k == 0 else DTYPES[(DTYPES.index(weight_dtype) + k) % len(DTYPES)]
        gemm_dtype = torch.promote_types(hidden_dtype, weight_dtype)
        backend = "torch" if gemm_dtype == torch.float64 else "cpu"
        check(linear_cases("padded", (hidden_dtype, weight_dtype, bias_dtype), gemm_dtype, backend))
        if bias_dtype is None:  # under autocast
            check(linear_cases("padded", (hidden_dtype, weight_dtype, bias_dtype), torch.bfloat16, "torch"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_from_hidden_states_of_every_layout(layout):
    for backend, dtype in PAIRS:
        check(linear_cases(layout, (dtype, dtype, dtype), dtype, backend))


def test_the_cases_hold_every_operator():
    cases = [*logits_cases("padded", torch.float32, "torch")]
    cases += linear_cases("padded", (torch.float32,) * 3, torch.float32, "torch")
    assert {operator._opoverload.name() for operator, *_ in cases} == set(operators())


# Calls that a CUDA graph must not capture ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.fault(18)
@pytest.mark.parametrize("layout", ["padded", "packed", "one sequence"])
def test_operators_that_read_on_the_host_say_so(layout):
    """The operators' own functions, on tensors that have no values: what needs one fails. A GPU's values are there, but
    reading one waits, which a graph cannot capture, and a replay would repeat what was read."""
    cases = [*logits_cases(layout, torch.float32, "torch")]
    cases += linear_cases(layout, (torch.float32,) * 3, torch.float32, "torch")
    for operator, arguments in cases:
        arguments = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
        try:
            operator._init_fn(*arguments)
            reads = False
        except (NotImplementedError, RuntimeError):
            reads = True
        overload = operator._opoverload
        assert reads == (torch.Tag.cudagraph_unsafe in overload.tags), overload


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_operators_that_do_not_read_do_not_wait(backend):
    if BACKENDS[backend].unavailable(torch.device("cuda")):
        pytest.skip("not available")
    for operator, arguments in logits_cases("packed", torch.float32, backend):
        if torch.Tag.cudagraph_unsafe in operator._opoverload.tags:
            continue
        arguments = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]
        operator._opoverload(*arguments)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            operator._opoverload(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_under_debug_every_operator_that_checks_values_reads():
    """KTO_KERNELS_DEBUG=1 looks at labels and offsets on the device."""
    script = (
        "import torch; from kto_kernels.ops.logits import token_logps, kto_forward\n"
        "assert all(torch.Tag.cudagraph_unsafe in x.constant._opoverload.tags for x in (token_logps, kto_forward))"
    )
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"KTO_KERNELS_DEBUG": "1"}, check=True)


def test_the_layouts_of_the_cases_differ():
    """The cases are what their names say."""
    strides = {layout: labels_of(layout)[0].stride() for layout in ("padded", "strided", "sliced")}
    assert len(set(strides.values())) == 3
