"""What comes after the log-probabilities of tokens, on every backend: `close_sequences` and `value_stages`. That a chunk
takes one kernel for it, and that a graph can capture it."""

import importlib.util
from unittest import mock

import pytest
import torch

from benchmarks import launches
from kto_kernels.backends import BACKENDS, cuda
from kto_kernels.backends.base import Backend
from tests.support.harness import kernel_places, places
from tests.support.ptx.draws import Draw
from tests.support.ptx.sequences import Sequences, on

with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not there")
# Each choice of the kernels, alone or with others.
KINDS = [
    Sequences(torch.float32),
    Sequences(torch.bfloat16, average=True, divisor=True, shape="long"),
    Sequences(torch.float64, given=True, average=True, divisor=True, reduction="sum"),
    Sequences(torch.float16, divisor=True, shape="many", reduction="none"),
    Sequences(torch.float32, ref=False, average=True),
    Sequences(torch.float32, ref=False, given=True, divisor=True, reduction="none"),
]
NAMES = ["sums", "means, long", "given", "many", "reference-free", "reference-free, given"]
kinds = pytest.mark.parametrize("kind", KINDS, ids=NAMES)


@places
@kinds
def test_sequences_against_formulas(kind, place):
    for seed in range(6):
        if place[1] == "cpu":
            kind.run(Draw(seed), BACKENDS[place[0]])


@kernel_places
@kinds
def test_sequences_equal_the_default_in_pytorch(kind, place):
    """To the rounding of fp64: sums are added in another order."""
    backend = BACKENDS[place[0]]
    for seed in range(6, 12):
        given, objective = kind.problem(Draw(seed))
        mine, default = on(given, place[1]), on(given, place[1])
        found = backend.close_sequences(mine, objective)
        expected = Backend.close_sequences(BACKENDS["torch"], default, objective)
        largest = default.logps.nan_to_num(0, 0, 0).abs().max().item() * (LENGTHS if kind.average else 1)
        error = 1e-13 * (1 + largest)
        torch.testing.assert_close(mine.logps, default.logps, rtol=1e-14, atol=error, equal_nan=True)
        torch.testing.assert_close(mine.slopes, default.slopes, rtol=1e-12 + error, atol=1e-300, equal_nan=True)
        assert (found is None) == (expected is None) == (given.divisor is None)
        if found is not None:
            assert torch.equal(found, expected) and torch.equal(mine.divisor, default.divisor)


LENGTHS = 400  # more than any sequence has: a mean's error is that of its sum
BUFFERS = ("logps", "slopes")


@places
def test_sequences_have_the_same_bits_each_time(place):
    given, objective = KINDS[1].problem(Draw(1))
    found = []
    for _ in range(3):
        mine = on(given, place[1])
        BACKENDS[place[0]].close_sequences(mine, objective)
        found.append([getattr(mine, name) for name in BUFFERS])
    assert all(torch.equal(a, b) for again in found for a, b in zip(found[0], again))


@places
def test_no_sequences(place):
    given, objective = Sequences(torch.float32, divisor=True).problem(Draw(0))
    nothing = {name: getattr(given, name)[:0] for name in ("lengths", "ref_logps", "desirable", *BUFFERS)}
    given = type(given)(**vars(given) | nothing | {"offsets": given.offsets[:1], "rows": (0, 0)})
    mine = on(given, place[1])
    assert BACKENDS[place[0]].close_sequences(mine, objective) is None
    assert torch.equal(mine.divisor.cpu(), given.divisor)
    values = (mine.logps, mine.ref_logps, mine.z0, mine.desirable)
    assert [len(x) for x in BACKENDS[place[0]].value_stages(*values, objective)] == [0, 0, 0]


@with_triton
@kinds
def test_closing_is_one_kernel_and_waits_for_nothing(kind):
    """On meta tensors, which have no values to read."""
    given, objective = kind.problem(Draw(0))
    meta = on(given, "meta")
    values = (meta.logps, meta.ref_logps, meta.z0, meta.desirable)
    with launches.counted() as counts:
        BACKENDS["triton"].close_sequences(meta, objective)
        assert counts == {"Triton": 1}
        BACKENDS["triton"].value_stages(*values, objective)
        assert counts == {"Triton": 2}
    native = mock.Mock()
    with mock.patch.object(cuda, "_native", lambda device: native), launches.counted() as counts:
        BACKENDS["cuda"].close_sequences(meta, objective)
        assert native.sequences.call_count == 1
        BACKENDS["cuda"].value_stages(*values, objective)
        assert native.sequences.call_count == len(native.method_calls) == 2 and not counts


@with_triton
def test_a_chunk_takes_one_kernel_for_its_coefficients():
    """A further chunk of a trained head: its scores, its coefficients, and what moves rows and rounds."""
    found = {}
    for name, call in launches.calls().items():
        with launches.counted() as counts:
            call()
        found[name] = dict(counts)
    one, two = (found[f"linear_kto_loss, {launches.TRAINED}{chunks}"] for chunks in ("", ", two chunks"))
    assert two["Triton"] - one["Triton"] == 2
    assert two["PyTorch"] - one["PyTorch"] <= 7
