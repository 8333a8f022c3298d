"""Promises of the Triton backend alone: one launch, no recompilation, the same bits whichever program comes last, rows
split over programs, vector loads at any alignment, machine code without spills. That it computes the right thing is
tested with the other backends."""

import contextlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    import triton
    import triton.language as tl
except ImportError:
    pytest.skip("Triton is not there", allow_module_level=True)
from torch.utils._python_dispatch import TorchDispatchMode

from kto_kernels import kto_loss, reference, token_logps
from kto_kernels.backends import gpu
from kto_kernels.backends.triton import compiled
from kto_kernels.backends.triton import launch as launchers
from kto_kernels.backends.triton.row import expm1, log1p, tanh
from kto_kernels.backends.triton.sequences import sum_sequences
from kto_kernels.options import OUTPUTS, Objective, Scale
from kto_kernels.records import Rows, Side
from tests.support.harness import assert_as_accurate, ours, plain, problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[2]
BACKEND = launchers.TritonBackend()

interpreted = pytest.mark.skipif(not launchers.INTERPRETED, reason="looks into Triton's interpreter")


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")(test))


@contextlib.contextmanager
def recorded_launches():
    """The (kernel, programs, arguments) of every launch, which happens all the same."""
    launches, launch = [], launchers._launch

    def record(kernel, device, programs, arguments):
        launches.append((kernel, programs, arguments))
        launch(kernel, device, programs, arguments)

    with mock.patch.object(launchers, "_launch", record):
        yield launches


@contextlib.contextmanager
def program_ids(choose):
    """In the interpreter, program x of a launch takes the place of program `choose(x)`."""
    from triton.runtime.interpreter import interpreter_builder

    def set_grid_idx(x, y, z):
        interpreter_builder.grid_idx = (choose(x), y, z)

    with mock.patch.object(interpreter_builder, "set_grid_idx", set_grid_idx):
        yield


@pytest.fixture
def split_rows(monkeypatch):
    """As on a chip with so many processors that every row is split over all of its tiles."""
    monkeypatch.setattr(gpu, "processors", lambda device: 64)


def in_fresh_process(code: str) -> str:
    """Runs `code` where Triton compiles: this process may have its interpreter on, which cannot be turned off."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loss_and_gradient(given, dtype=torch.float32, **extra):
    """Every output and the gradient, by name."""
    out, grad = ours(given.to(dtype, DEVICE), "triton", **extra)
    return {name: getattr(out, name) for name in ("loss", "logps", "ref_logps", "rewards", "kl")} | {"gradient": grad}


def assert_same_bits(results, others):
    for name, value in results.items():
        assert torch.equal(value, others[name]), name


# One launch ───────────────────────────────────────────────────────────────────────────────────────────────────────────

SOURCES = [
    (ref, kl, ref_kl)
    for ref, kl, ref_kl in itertools.product(
        (None, "logps", "logits"), (None, "number", "tensor", "logps", "logits"), (None, "logps", "logits")
    )
    if (ref_kl is not None) == (ref is not None and kl in ("logps", "logits"))
]


@pytest.mark.parametrize(("ref", "kl", "ref_kl"), SOURCES, ids=lambda source: str(source))
def test_forward_and_backward_are_one_launch_each(ref, kl, ref_kl, poisoned_memory):
    options = {"loss_type": "apo_zero_unpaired"} if kl is None else {}
    given = problem(2, 2, 5, kl_batch=2, kl_tokens=1, ref=ref, kl=kl, ref_kl=ref_kl, **options)
    with recorded_launches() as launches:
        loss_and_gradient(given)
    kernels = launchers.kernels
    assert [kernel for kernel, *_ in launches] == [kernels.forward_kernel, kernels.logits_backward_kernel]


@pytest.mark.parametrize("outputs", [(), OUTPUTS])
def test_a_chunk_is_one_launch(outputs):
    with recorded_launches() as launches:
        logits = torch.randn(3, 50, device=DEVICE)
        BACKEND.score_chunk(logits, torch.arange(3, device=DEVICE), Scale(), True, outputs)
        BACKEND.scale_(logits, torch.ones((), device=DEVICE))
        BACKEND.score_chunk(logits[:0], torch.arange(0, device=DEVICE), Scale(), True, outputs)
        BACKEND.scale_(logits[:0], torch.ones((), device=DEVICE))
    kernels = launchers.chunk_kernels
    assert [(kernel, programs) for kernel, programs, _ in launches] == [
        (kernels.chunk_kernel, 3),
        (kernels.scale_kernel, 1),
    ]


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
def test_launchers_run_no_other_kernel(packed):
    """No copy, no fill, no cast around the launch: nothing but allocations."""
    lead, vocab = ((6,) if packed else (3, 2)), 9
    logits = torch.randn(*lead, vocab, device=DEVICE)
    labels = torch.randint(vocab, lead, device=DEVICE)[..., :]
    offsets = torch.tensor([0, 2, 4, 6], device=DEVICE) if packed else None
    rows = Rows(logits, labels, offsets, True, -100)
    desirable = torch.tensor([True, False, True], device=DEVICE)
    side, options = Side(rows), Objective(0.1, 1.0, 1.0, True, "mean")
    once = torch.ones((), device=DEVICE).expand(3)  # the gradient of a sum: strides of 0
    chunk_labels = torch.zeros(6, dtype=torch.int64, device=DEVICE)

    def run():
        result = BACKEND.kto_forward(rows, Scale(), desirable, side, 0.0, side, side, options)
        out = torch.empty_like(logits)
        saved = (result.coefficients, result.token_logps, result.statistics)
        BACKEND.logits_backward(rows, Scale(), once, *saved, out)
        BACKEND.token_logps(rows, Scale())
        chunk = torch.empty(6, vocab, device=DEVICE)
        BACKEND.score_chunk(chunk, chunk_labels, Scale(), True, OUTPUTS)
        BACKEND.scale_(chunk, once[0])

    run()  # the counters are allocated once
    with _Operators() as operators:
        run()
    # The interpreter finds its way from tensors to memory by set_, and copies storages onto themselves.
    interpreter = {"set_", "copy_", "new_empty", "_to_copy"} if launchers.INTERPRETED else set()
    views = {"unsqueeze", "view", "slice", "select", "detach"}
    assert operators.names <= {"empty", "empty_like"} | views | interpreter


# No recompilation ─────────────────────────────────────────────────────────────────────────────────────────────────────

# Calls that differ in every run-time value: sizes of 1, of 16 and of neither, unaligned pointers, strides past 2^31.
_KEYS = """
import sys
from unittest import mock
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from kto_kernels.backends import gpu
from kto_kernels.backends.triton import launch as launchers
from kto_kernels.options import OUTPUTS, Objective, Scale
from kto_kernels.records import Rows, Side

gpu.processors = lambda device: 132
backend = make_backend(GPUTarget("cuda", 90, 32))
keys = {}

def record(kernel, device, programs, arguments):
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    constants = {k: v for k, v in arguments.items() if kernel.params[kernel.arg_names.index(k)].is_constexpr}
    keys.setdefault(kernel.__name__, set()).add((str(binder(**arguments)[1]), str(constants)))

launchers._launch = record
triton = launchers.TritonBackend()
for step, (b, t, k, u) in enumerate([(1, 1, 1, 1), (2, 3, 5, 7), (16, 16, 16, 16), (4, 4096, 3, 64), (3, 5, 1, 1)]):
    vocab = (16, 17, 1, 32, 50000)[step]
    def rows(b, t):
        pitch = vocab + step
        logits = torch.empty(b * t * pitch + 3)[step % 3 :].as_strided((b, t, vocab), (t * pitch, pitch, 1))
        if step == 4:
            logits = logits.as_strided((1, t, vocab), (2**33, pitch, 1)).expand(b, t, vocab)
        labels = torch.zeros(b, t + step, dtype=torch.int64)[:, step:]
        return Rows(logits, labels, None, True, -100 + step)
    policy, kl = rows(b, t), rows(k, u)
    desirable = torch.ones(b, 1 + step, dtype=torch.bool)[:, step]
    scale = Scale(1.0 + step, None, (1.0, 0.5, 2.0, 16.0, 1e-30)[step])
    options = Objective((0.1, 1.0, 16.0, 1e-50, 3.0)[step], 1.0 + step, 16.0 * step, False, "mean")
    triton.token_logps(policy, scale)
    out = triton.kto_forward(policy, scale, desirable, Side(policy), 0.0, Side(kl), Side(kl), options)
    grad = torch.ones(()).expand(b)
    triton.logits_backward(policy, scale, grad, out.coefficients, out.token_logps, out.statistics, policy.logits)
    chunk = policy.logits[0]
    triton.score_chunk(chunk, policy.labels[0, : len(chunk)], scale, True, OUTPUTS)
    if step != 1:  # contiguous from any address, more than 32 bits count
        flat = torch.empty(1 + step)[step % 2 :]
        triton.scale_(flat if step < 4 else flat[:1].expand(2**33), torch.ones(2)[step % 2])
print({name: len(found) for name, found in keys.items()})
"""


def test_one_compilation_serves_every_batch():
    """By Triton's own cache keys: the types and specialisations of the arguments, and the constants."""
    counts = in_fresh_process(_KEYS)
    names = ("token_logps", "forward", "logits_backward", "chunk", "scale")
    assert counts.strip() == str({f"{name}_kernel": 1 for name in names})


def test_block_sizes_depend_on_dtype_alone():
    calls = []
    for batch, tokens, vocab in ((1, 1, 3), (2, 4, 300)):
        with recorded_launches() as launches:
            loss_and_gradient(problem(batch, tokens, vocab, kl_batch=1, kl_tokens=1), torch.bfloat16)
        calls.append([{name: value for name, value in a.items() if name.isupper()} for _, _, a in launches])
    assert calls[0] == calls[1]


# The last program, whichever it is ────────────────────────────────────────────────────────────────────────────────────


@interpreted
@pytest.mark.parametrize("average", [False, pytest.param(True, marks=pytest.mark.wide)])
def test_the_order_of_programs_changes_no_bit(split_rows, average, poisoned_memory):
    given = problem(2, 3, 5000, kl_batch=2, kl_tokens=2, packed=True, average_log_prob=average)
    with recorded_launches() as launches:
        expected = loss_and_gradient(given)
    assert launches[0][2]["splits"] > 1
    launch = launchers._launch
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)

        def launch_shuffled(kernel, device, programs, arguments, generator=generator):
            order = torch.randperm(programs, generator=generator).tolist()
            with program_ids(order.__getitem__):
                launch(kernel, device, programs, arguments)

        with mock.patch.object(launchers, "_launch", launch_shuffled):
            assert_same_bits(expected, loss_and_gradient(given))


def test_counters_are_left_as_zeros(split_rows):
    with recorded_launches() as launches:
        loss_and_gradient(problem(2, 2, 9000, kl_batch=1, kl_tokens=2))
    arrivals = launches[0][2]["arrivals"]
    assert arrivals.count_nonzero() == 0


# Rows split over programs ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [2048, 9001, pytest.param(70000, marks=pytest.mark.wide)])
def test_split_rows_equal_whole_ones(vocab, dtype, monkeypatch, poisoned_memory):
    """Split rows sum in another order, and nothing else: as close to the oracle, and the same bits every time."""
    given = problem(1, 2, vocab, ref=None, kl="number", ref_kl=None)
    given.labels[:] = torch.tensor([vocab // 2, vocab - 1])
    whole = loss_and_gradient(given, dtype)
    monkeypatch.setattr(gpu, "processors", lambda device: 64)
    with recorded_launches() as launches:
        split = loss_and_gradient(given, dtype)
    tiles = -(-vocab // (512 * (16 // dtype.itemsize)))
    assert [arguments["splits"] for _, _, arguments in launches] == [tiles] * 2
    assert_same_bits(split, loss_and_gradient(given, dtype))
    typed = given.to(dtype, DEVICE)
    exact, exact_grad = plain(typed.to(torch.float64, DEVICE))
    rounded, rounded_grad = plain(typed)
    assert_as_accurate("logps", split["logps"], rounded["logps"], exact["logps"], 1e-7)
    assert_as_accurate("gradient", split["gradient"], rounded_grad, exact_grad, torch.finfo(dtype).eps)
    torch.testing.assert_close(split["logps"], whole["logps"], rtol=1e-6, atol=0)
    assert ((split["gradient"] != 0) == (whole["gradient"] != 0)).all()


def test_split_token_logps_with_an_edge(split_rows, poisoned_memory):
    """The elements in front of the first aligned address and behind the last whole vector belong to one share; labels
    there, at the borders of tiles and shares, and in their middle."""
    vocab = 3 * 2048 + 2051
    logits = torch.randn(1, 9, vocab + 3, device=DEVICE)[..., 1 : vocab + 1]
    at = [0, 1, 2, 3, 2046, 2047, 4100, vocab - 2, vocab - 1]
    labels = torch.tensor([at], device=DEVICE)
    logits[0, ::2] = logits[0, ::2].scatter(-1, labels[0, ::2, None], 30.0)  # near-certain: the log1p branch
    found = token_logps(logits, labels, backend="triton")
    exact = logits.double().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-14)  # where fp64's y − lse is as coarse


# The sums over tokens and sequences ───────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _sum_kernel(values, sums, divisors, cu_seqlens, n_rows, n_sequences, tokens):
    sum_sequences(values, sums, divisors, n_rows >= 0, cu_seqlens, n_rows, n_sequences, tokens)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("count", "tokens"), [(3, 700), (1, 513), (50, 70), (40, 1), (4, 0)])
def test_sums_of_sequences_long_and_short(count, tokens, packed, poisoned_memory):
    """More sequences than the summation takes at a time, and more tokens than one of its steps does."""
    lengths = torch.full((count,), tokens)
    if packed:
        lengths[::2] = lengths[::2] * 2 + 3
        lengths[-1] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = torch.randn(int(offsets[-1]))
    divisors = torch.arange(count, dtype=torch.float64)
    sums = torch.empty(count, dtype=torch.float64, device=DEVICE)
    given = (values.to(DEVICE), sums, divisors.to(DEVICE), offsets.to(DEVICE) if packed else None)
    _sum_kernel[(1,)](*given, values.numel(), count, tokens)
    exact = torch.stack([part.double().sum() for part in values.split(lengths.tolist())]) / divisors.clamp(min=1)
    torch.testing.assert_close(sums.cpu(), exact, rtol=1e-12, atol=1e-12)


def test_more_sequences_than_a_block_of_the_last_stages(poisoned_memory):
    given = problem(140, 1, 2, ref="logps", kl="logps", ref_kl="logps", kl_batch=300, reduction="none")
    found = loss_and_gradient(given)
    exact, exact_grad = plain(given.to(torch.float64, DEVICE))
    for name, value in exact.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["gradient"].double(), exact_grad, rtol=1e-5, atol=1e-9)


# Formulas that Triton has no function for ─────────────────────────────────────────────────────────────────────────────


@triton.jit
def _formula_kernel(x, log1p_out, expm1_out, tanh_out, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < count, other=0.0)
    tl.store(log1p_out + i, log1p(value, (1.0 + value).to(tl.float32)), mask=i < count)
    tl.store(expm1_out + i, expm1(-value.to(tl.float32)), mask=i < count)
    tl.store(tanh_out + i, tanh(value.to(tl.float32)), mask=i < count)
    tl.store(tanh_out + count + i, tanh(-value.to(tl.float32)), mask=i < count)


def test_formulas_near_zero_and_far_from_it():
    x = torch.cat([torch.zeros(1), torch.logspace(-40, 2, 3000, dtype=torch.float64), torch.tensor([700.0, 1e5])])
    x = x.double().to(DEVICE)
    found = torch.empty_like(x), torch.empty(len(x), device=DEVICE), torch.empty(2 * len(x), device=DEVICE)
    with np.errstate(all="ignore"):  # as the launchers have it
        _formula_kernel[(1,)](x, *found, len(x), 4096)
    eps = torch.finfo(torch.float32).eps  # both are rounded to fp32 later, or in their last step
    torch.testing.assert_close(found[0], x.log1p(), rtol=eps, atol=1e-45)
    torch.testing.assert_close(found[1].double(), (-x.float().double()).expm1(), rtol=2 * eps, atol=1e-45)
    exact = x.float().double().tanh()
    torch.testing.assert_close(found[2].double(), torch.cat([exact, -exact]), rtol=4e-7, atol=1e-45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("scale", [Scale(2.5, None, 0.7), Scale(1.5, 3.0, 1.3), Scale(1.0, 30.0, 1.0)], ids=str)
def test_scale_and_softcap_in_both_directions(scale, dtype, split_rows, poisoned_memory):
    """Only the operators take them; labels certain, unlikely and ignored; fresh and in place."""
    logits = 4 * torch.randn(2, 3, 4500, device=DEVICE).to(dtype)
    labels = torch.tensor([[0, 4499, -100], [7, 2100, 4000]], device=DEVICE)
    labels[1, 0] = logits[1, 0].argmax()
    upstream = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, 1.5]], device=DEVICE)
    rows = Rows(logits, labels, None, False, -100)
    logps, statistics = BACKEND.token_logps(rows, scale)
    grad = torch.empty_like(logits)
    BACKEND.logits_backward(rows, scale, upstream, None, logps, statistics, grad)
    results = []
    for x in (logits, logits.double()):
        results.append(
            (
                reference.token_logps(x, labels, -100, **vars(scale)),
                reference.token_logps_grad(x, labels, upstream, -100, **vars(scale)),
            )
        )
    (rounded, rounded_grad), (exact, exact_grad) = results
    assert_as_accurate("logps", logps, rounded, exact, torch.finfo(torch.float32).eps)
    assert_as_accurate("gradient", grad, rounded_grad, exact_grad, torch.finfo(dtype).eps)
    BACKEND.logits_backward(rows, scale, upstream, None, logps, statistics, logits)
    assert torch.equal(logits, grad)


# Alignment ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("vocab", [7, 1027, 4113])
def test_rows_at_any_alignment_equal_the_definition(vocab, dtype, poisoned_memory):
    """Every distance of a row from an aligned address, batch and tokens permuted, labels strided and unaligned."""
    storage = torch.randn(2 * 9 * (vocab + 1) + 3, device=DEVICE).to(dtype)
    logits = storage[3:].view(2, 9, vocab + 1)[:, :, :vocab].transpose(0, 1)[1:]  # (8, 2, vocab)
    labels = torch.randint(vocab, (8, 5), dtype=torch.int32, device=DEVICE)[:, 1:5:2]
    found = token_logps(logits, labels, backend="triton")
    exact = logits.double().log_softmax(-1).gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lead", [0, 1, 2, 3, 5, 8])
def test_gradient_where_loads_and_stores_are_aligned_differently(lead, dtype, poisoned_memory):
    vocab, labels = 4113, torch.tensor([[0, 4112, -100]], device=DEVICE)
    storage = torch.randn(3 * 4120 + lead, device=DEVICE).to(dtype)
    logits = storage[lead:].as_strided((1, 3, vocab), (3 * 4120, 4120, 1), lead)
    rows = Rows(logits, labels, None, False, -100)
    logps, statistics = BACKEND.token_logps(rows, Scale())
    upstream = torch.tensor([[0.5, -2.0, 1.0]], device=DEVICE)

    def gradient(out):
        BACKEND.logits_backward(rows, Scale(), upstream, None, logps, statistics, out)
        return out.clone()

    fresh = gradient(torch.empty((1, 3, vocab), dtype=dtype, device=DEVICE))
    beside = gradient(torch.empty(3 * 4121, dtype=dtype, device=DEVICE).as_strided((1, 3, vocab), (0, 4121, 1)))
    x = logits.double().requires_grad_()
    chosen = x.log_softmax(-1)[0, [0, 1], [0, 4112]]
    (exact,) = torch.autograd.grad((chosen * upstream[0, :2]).sum(), x)
    torch.testing.assert_close(fresh.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-9)
    in_place = gradient(logits)
    assert torch.equal(fresh, beside)
    assert torch.equal(fresh, in_place)


# A chunk of logits ────────────────────────────────────────────────────────────────────────────────────────────────────


def chunk_tile(dtype: torch.dtype) -> int:
    return math.prod(launchers.blocks(dtype, launchers.CHUNK_THREADS).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("scale", [Scale(), Scale(1.5, 4.0, 0.7)], ids=str)
@pytest.mark.parametrize("lead", [0, 3])
def test_chunk_at_any_alignment(lead, scale, dtype, poisoned_memory):
    """Rows of two tiles, one that is not full and an edge, at every distance from an aligned address; a label in each
    part of a row and at its borders; masked logits. Memory between the rows stays as it is."""
    tile = chunk_tile(dtype)
    vocab = 2 * tile + tile // 3 + 1
    at = [0, 1, 7, tile - 1, tile, tile + 8, 2 * tile + 9, vocab - 2, vocab - 1]
    storage = torch.full((len(at) * (vocab + 3) + lead,), torch.nan, dtype=dtype, device=DEVICE)
    logits = storage[lead:].view(len(at), vocab + 3)[:, :vocab]
    logits.copy_(2 * torch.randn(logits.shape))
    logits[:, 100:200] = -torch.inf
    labels = torch.tensor([at, at], device=DEVICE).t().contiguous()[:, 1]
    logits[::2] = logits[::2].scatter(-1, labels[::2, None], 12.0)
    before = logits.clone()
    scores = BACKEND.score_chunk(logits, labels, scale, True, OUTPUTS)
    exact = reference.outputs(before.double(), labels, OUTPUTS, **vars(scale))
    logps = reference.token_logps(before.double(), labels, **vars(scale))
    ones = torch.ones(len(at), dtype=torch.float64, device=DEVICE)
    grad = reference.token_logps_grad(before.double(), labels, ones, **vars(scale))
    torch.testing.assert_close(scores.logps.double(), logps, rtol=2e-6, atol=1e-14)
    torch.testing.assert_close(scores.entropy.double(), exact["entropy"], rtol=2e-6, atol=0)
    torch.testing.assert_close(scores.mean_logits.double(), exact["mean_logits"], rtol=1e-6, atol=1e-6)
    assert scores.is_top1.tolist() == [i % 2 == 0 for i in range(len(at))]
    torch.testing.assert_close(logits.double(), grad, rtol=2 * max(torch.finfo(dtype).eps, 1e-6), atol=3e-7)
    gaps = storage[lead:].view(len(at), vocab + 3)[:, vocab:]
    assert gaps.isnan().all() and storage[:lead].isnan().all()


@pytest.mark.parametrize("softcap", [None, 1.0])
def test_the_first_of_equal_logits_is_the_top(softcap, poisoned_memory):
    """Found again in a second pass, over blocks of its own; under a softcap, among logits whose tanh is 1 as well."""
    vocab = 2 * launchers.CHUNK_THREADS * 8 + 5
    at = [0, 5, 3000, vocab - 1]
    logits = torch.zeros(len(at) * 2, vocab, dtype=torch.bfloat16, device=DEVICE)
    logits[: len(at), at] = 40.0
    labels = torch.tensor(at * 2, device=DEVICE)
    logits[range(len(at), len(at) * 2), labels[len(at) :]] = 40.0
    logits[len(at) :, 77] = 39.75  # in fp32 its tanh is no less
    scores = BACKEND.score_chunk(logits, labels, Scale(softcap=softcap), False, ("is_top1",))
    assert scores.is_top1.tolist() == [True, False, False, False] + [True] * len(at)


def test_tanh_is_rounded_and_the_top_is_not(poisoned_memory):
    """Neighbours in fp32, ascending: their tanh is often the same, and on a GPU may descend by some ulp."""
    starts = torch.logspace(-2, 0.5, 20).view(torch.int32)
    logits = (starts[:, None] + torch.arange(40, dtype=torch.int32)).view(torch.float32)
    last = torch.full((20,), 39, device=DEVICE)
    for labels, top in ((last, True), (last - 1, False)):
        scores = BACKEND.score_chunk(logits.to(DEVICE), labels, Scale(softcap=1.0), False, ("is_top1",))
        assert scores.is_top1.tolist() == [top] * 20


def test_a_row_without_a_possible_token(poisoned_memory):
    logits = torch.full((2, 300), -torch.inf, device=DEVICE)
    labels = torch.tensor([0, 7], device=DEVICE)
    expected = reference.outputs(logits, labels, OUTPUTS)
    scores = BACKEND.score_chunk(logits, labels, Scale(), True, OUTPUTS)
    assert (scores.logps == -torch.inf).all()
    for name, value in expected.items():
        assert torch.equal(getattr(scores, name), value), name
    assert torch.equal(logits, torch.nn.functional.one_hot(labels, 300).float())  # as reference.token_logps_grad has it


def test_a_row_with_a_nan_has_no_top(poisoned_memory):
    logits = torch.tensor([[1.0, torch.nan, 5.0], [torch.nan, 0.0, 1.0], [1.0, torch.inf, 0.0]], device=DEVICE)
    labels = torch.tensor([2, 0, 0], device=DEVICE)
    scores = BACKEND.score_chunk(logits, labels, Scale(), False, ("is_top1",))
    assert scores.is_top1.tolist() == [False] * 3
    assert scores.logps.isnan().all()


@pytest.mark.parametrize("gradient", [False, True])
def test_a_chunk_scored_twice_gives_the_same_bits(gradient, poisoned_memory):
    logits = torch.randn(4, 20011, device=DEVICE).to(torch.bfloat16)
    labels = torch.randint(20011, (4,), device=DEVICE)
    first, second = logits.clone(), logits.clone()
    results = [vars(BACKEND.score_chunk(x, labels, Scale(), gradient, OUTPUTS)) for x in (first, second)]
    assert_same_bits(*results)
    assert torch.equal(first, second)
    assert torch.equal(first, logits) != gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("count", [1, 7, 4096, 150_001])  # the last: several tiles a program
@pytest.mark.parametrize("lead", [0, 1, 5])
def test_scaling_at_any_alignment(lead, count, dtype):
    """Rounded once, from an fp32 or fp64 factor; what lies around stays as it is."""
    storage = torch.randn(lead + count + 9, device=DEVICE).to(dtype)
    before = storage.clone()
    for factor in (0.3, -2.0):
        expected = (storage[lead : lead + count].float() * factor).to(dtype)
        given = torch.tensor(factor, dtype=torch.float64 if factor == 0.3 else torch.float32, device=DEVICE)
        BACKEND.scale_(storage[lead : lead + count], given)
        assert torch.equal(storage[lead : lead + count], expected)
    for around in (slice(0, lead), slice(lead + count, None)):
        assert torch.equal(storage[around], before[around])


@interpreted
def test_a_factor_of_one_reads_nothing_but_itself(monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    loads, load = [], interpreter_builder.create_masked_load
    monkeypatch.setattr(interpreter_builder, "create_masked_load", lambda *a: loads.append(a) or load(*a))
    tensor = torch.randn(50)
    BACKEND.scale_(tensor, torch.tensor(1.0))
    once = len(loads)
    BACKEND.scale_(tensor, torch.tensor(2.0))
    assert (once, len(loads)) == (1, 4)  # the factor; the factor, a tile and the edge


# Sizes ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@interpreted
def test_more_rows_than_a_grid_has_on_its_other_axes(poisoned_memory):
    """70,000 programs on axis 0; the interpreter runs the last three of them."""
    count = 70_000
    logits = torch.randn(count, 1, 3)
    rows = Rows(logits, torch.randint(3, (count, 1)), None, False, -100)
    logps = torch.full((count, 1), torch.nan)
    launch, grids = launchers._launch, []

    def last_programs(kernel, device, programs, arguments):
        grids.append(programs)
        launch(kernel, device, 3, arguments)

    with mock.patch.object(launchers, "_launch", last_programs), program_ids(lambda x: count - 3 + x):
        logps, statistics = BACKEND.token_logps(rows, Scale())
        out = torch.empty_like(logits)
        BACKEND.logits_backward(rows, Scale(), torch.ones(count, 1), None, logps, statistics, out)
    assert grids == [count, count]
    exact = logits.log_softmax(-1)
    torch.testing.assert_close(logps[-3:], exact.gather(-1, rows.labels.unsqueeze(-1)).squeeze(-1)[-3:])
    expected = torch.nn.functional.one_hot(rows.labels, 3) - exact.exp()
    torch.testing.assert_close(out[-3:], expected[-3:], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("rows", "vocab", "dtype", "splits"),
    [
        (8, 128256, torch.bfloat16, 32),
        (64, 128256, torch.bfloat16, 32),
        (8, 128256, torch.float32, 63),
        (8, 262144, torch.float32, 64),
        (1000, 128256, torch.bfloat16, 2),
        (8192, 128256, torch.bfloat16, 1),
        (8, 4096, torch.bfloat16, 1),
        (8, 4097, torch.bfloat16, 2),
        (0, 5, torch.float32, 1),
    ],
)
def test_rows_are_split_where_they_are_few(rows, vocab, dtype, splits):
    assert launchers.row_splits(rows, vocab, dtype, 132) == splits


def test_split_rows_have_a_counter_each():
    for rows in range(1, 5000):
        if launchers.row_splits(rows, 10**6, torch.float32, 132) > 1:
            assert 1 + rows <= 1 + gpu.PROGRAMS_PER_PROCESSOR * 132 // 2


@pytest.mark.parametrize(
    ("vocab", "processors", "cache", "threads"),
    [
        (128256, 132, 50 << 20, 1024),  # an H100
        (32000, 132, 50 << 20, 256),
        (64000, 132, 50 << 20, 512),
        (128256, 108, 40 << 20, 1024),  # an A100
        (128256, 128, 72 << 20, 1024),  # an RTX 4090: 33 MB a program on each multiprocessor
        (128256, 148, 126 << 20, 512),  # a B200
        (1 << 20, 132, 50 << 20, 1024),  # no row fits: as few rows as can be
        (8, 1, 0, 1024),  # the interpreter's device has no cache
    ],
)
def test_the_rows_under_way_in_a_chunk_fit_into_the_cache(vocab, processors, cache, threads):
    assert launchers.chunk_threads(2 * vocab, processors, cache) == threads
    programs = launchers.CHUNK_THREADS // threads
    assert programs == 1 or 2 * vocab * processors * programs <= 0.75 * cache


# Where it runs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_reasons_for_being_unavailable():
    code = "import kto_kernels; print(kto_kernels.available_backends('cpu')['triton'])"
    assert "TRITON_INTERPRET=1" in in_fresh_process(code)
    reason = in_fresh_process(f"import sys; sys.modules['triton'] = None; {code}")
    assert "Triton is not there" in reason
    assert "pip install triton" in reason


# Launches of compiled kernels ─────────────────────────────────────────────────────────────────────────────────────────


def in_stubbed_process(code: str) -> dict:
    return json.loads(
        in_fresh_process(f"import json; from tests.support import stub_driver; print(json.dumps({code}))")
    )


def test_a_launch_runs_what_triton_would_whichever_argument_changes():
    found = in_stubbed_process("stub_driver.changes()")
    assert found["wrong"] == 0 and found["launches"] > 10_000
    assert found["compilations"] < found["launches"] // 4  # all others were known


def test_a_known_launch_gives_the_driver_the_same_in_less_time():
    """With Triton itself, on a stand-in for the driver. `python -m tests.support.stub_driver` prints the times."""
    found = in_stubbed_process("stub_driver.launches('loss, float32')")
    assert found["wrong"] == 0 and found["codes"] == found["variants"] >= 1
    assert found["microseconds"]["ours"] < found["microseconds"]["Triton's"]


@pytest.mark.parametrize(("version", "known"), [("3.3.1", False), ("3.4.0", True), ("3.9.2", True), ("3.10.0", False)])
def test_another_release_of_triton_goes_its_own_way(version, known, caplog):
    caplog.set_level("INFO", "kto_kernels")
    assert compiled.known(version) is known
    assert (f"Triton {version}: launches" in caplog.text) is not known
    kernel = mock.MagicMock(pre_run_hooks=[])
    names = {"x": "", "n": "i32", "SIZE": "constexpr", "FLAG": "constexpr", "y": ""}
    kernel.params = [
        mock.Mock(is_constexpr=kind == "constexpr", annotation_type=kind.removeprefix("constexpr"))
        for kind in names.values()
    ]
    for parameter, name in zip(kernel.params, names):
        parameter.name = name
    launcher = compiled.Launcher(kernel, known)
    arguments = {"x": torch.ones(1), "n": 3, "SIZE": 4, "FLAG": True, "y": None}
    for _ in range(3):
        launcher(torch.device("cuda", 0), 2, arguments, {"num_warps": 4})
    own = kernel.__getitem__.return_value
    assert own.call_count == (1 if known else 3)
    assert own.return_value.__getitem__.call_count == (2 if known else 0)


# The machine code ─────────────────────────────────────────────────────────────────────────────────────────────────────


# Which of the dtypes of `inspect.DTYPES`, the first of which is bf16, and which of the kernels of `inspect.TABLES`.
BF16, BACKWARD = "DTYPES[:1]", "[each for each in TABLES if each[0] is _backward]"
WIDE = [("sm_90", BF16, "[each for each in TABLES if each[0] is not _backward]"), ("sm_90", "DTYPES[1:]", "TABLES")]
WIDE += [(target, "DTYPES", "TABLES") for target in ("sm_80", "sm_89", "sm_100", "sm_120", "gfx942")]


@pytest.mark.parametrize(
    ("target", "dtypes", "tables"),
    [("sm_90", BF16, BACKWARD), *(pytest.param(*case, marks=pytest.mark.wide) for case in WIDE)],
)
def test_machine_code_reads_vectors_and_spills_nothing(target, dtypes, tables):
    """By the release of Triton that is here; `make test-versions-all` compiles by others. Aligned or not: on NVIDIA all
    loads of logits are 128 bits wide but the edge's and the label's. The backward has a second path for a gradient that
    is aligned otherwise than the logits, with stores as wide."""
    targets = ((), True) if target == "gfx942" else ((target,), False)
    chosen = f"exec('DTYPES, TABLES = {dtypes}, {tables}', vars(inspect))"
    found = f"json.dumps(inspect.inspect(*{targets}))"
    machine_code = json.loads(
        in_fresh_process(f"import json; from benchmarks import inspect; {chosen}; print({found})")
    )
    assert {row["target"] for row in machine_code} == {target}
    assert [row for row in machine_code if row["spills"] > 0] == []
    for row in machine_code if target != "gfx942" else []:
        loads, stores = row["loads"], row["stores"]
        if row["kernel"] == "sequences":  # reads log-probabilities, one a thread
            continue
        vectors = (
            launchers.SHORT_UNROLL
            if re.search("(softcap|outputs).*float16|outputs.*softcap", row["variant"])
            else launchers.UNROLL
        )
        if row["kernel"] == "logits_backward":
            assert loads["128"] == vectors + 1, row
            assert stores["128"] == 2 * vectors + 2, row  # a loop for aligned rows, and one for the others
        elif row["kernel"] == "chunk":
            passes = 3 if "gradient" in row["variant"] else 2  # as the others, then once more to overwrite
            assert loads["128"] == passes * vectors + passes - 1, row
            assert stores.get("128", 0) == (passes - 2) * (vectors + 1), row
        elif row["kernel"] == "scale":
            assert loads["128"] == stores["128"] == vectors, row
        else:
            assert loads["128"] == 2 * vectors + 1, row  # a tile, the label's tile, the last one's vectors
            if "float16" in row["variant"]:
                assert loads["16"] == 2, row


@pytest.mark.skipif(not launchers.INTERPRETED, reason="the interpreter is off")
def test_inspection_says_that_the_interpreter_is_on():
    from benchmarks import inspect

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        inspect.inspect()


# On a GPU ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def gpu_problem(batch=8, tokens=16, vocab=32003, **options):
    torch.manual_seed(0)
    return problem(batch, tokens, vocab, kl_batch=batch, kl_tokens=tokens, **options)


@on_gpu
@pytest.mark.parametrize("tokens", [16, 300])  # rows split, and whole
def test_a_thousand_runs_give_the_same_bits(tokens):
    given = gpu_problem(tokens=tokens, vocab=5003).to(torch.bfloat16, DEVICE)
    first = loss_and_gradient(given, torch.bfloat16)
    for _ in range(999):
        assert_same_bits(first, loss_and_gradient(given, torch.bfloat16))


@on_gpu
def test_calls_on_several_streams_share_no_counter():
    """Calls on several streams at once share no counter."""
    given = gpu_problem().to(torch.bfloat16, DEVICE)
    expected = loss_and_gradient(given, torch.bfloat16)
    torch.cuda.synchronize()
    streams, results = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()], []
    for _ in range(30):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(loss_and_gradient(given, torch.bfloat16))
    torch.cuda.synchronize()
    for result in results:
        assert_same_bits(expected, result)


@on_gpu
def test_never_waits_for_the_device():
    given = gpu_problem(packed=True, average_log_prob=True).to(torch.bfloat16, DEVICE)
    expected = loss_and_gradient(given, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = loss_and_gradient(given, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(expected, found)


@on_gpu
@pytest.mark.parametrize("tokens", [16, 300])
def test_a_captured_call_replays_on_new_logits(tokens):
    given = gpu_problem(tokens=tokens).to(torch.bfloat16, DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss_and_gradient(given, torch.bfloat16)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradient(given, torch.bfloat16)
    for _ in range(3):
        given.logits.copy_(torch.randn_like(given.logits))
        graph.replay()
        assert_same_bits(loss_and_gradient(given, torch.bfloat16), captured)


@on_gpu
def test_a_chunk_never_waits_for_the_device():
    logits = torch.randn(500, 32003, device=DEVICE).to(torch.bfloat16)
    labels, factor = torch.randint(32003, (500,), device=DEVICE), torch.tensor(0.3, device=DEVICE)

    def step():
        x = logits.clone()
        scores = BACKEND.score_chunk(x, labels, Scale(), True, OUTPUTS)
        BACKEND.scale_(x, factor)
        return {**vars(scores), "gradient": x}

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [step() for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for results in found:
        assert_same_bits(expected, results)


@on_gpu
def test_the_profiler_sees_one_kernel_forward_and_one_backward():
    """The profiler's count: one kernel forward, one backward, nothing else."""
    given = gpu_problem().to(torch.bfloat16, DEVICE)
    tensors, options = given.tensors, given.options
    logits = given.logits.requires_grad_()
    upstream = torch.ones((), device=DEVICE)

    def step():
        loss = kto_loss(logits, given.labels, given.desirable, **tensors, **options, backend="triton").loss
        torch.autograd.grad(loss, logits, upstream)

    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(kernels) == ["forward_kernel", "logits_backward_kernel"]


@on_gpu
def test_compilations_on_the_device():
    def compiled():
        kernels = (launchers.kernels.forward_kernel, launchers.kernels.logits_backward_kernel)
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    loss_and_gradient(problem(2, 3, 100), torch.bfloat16)
    before = compiled()
    for batch, tokens, vocab, beta in ((1, 1, 16, 0.1), (16, 16, 4096, 1.0), (5, 7, 4097, 0.3), (64, 64, 999, 0.05)):
        given = problem(batch, tokens, vocab, kl_batch=tokens, kl_tokens=batch, beta=beta, temperature=beta)
        loss_and_gradient(given, torch.bfloat16)
    assert compiled() == before


@on_gpu
@pytest.mark.alone
@pytest.mark.parametrize("inplace", [False, True])
def test_more_logits_than_32_bits_count(inplace):
    """N·V > 2³¹ and N > 65,535: rows at both ends against the oracle."""
    batch, tokens, vocab = 66_000, 1, 32_768
    logits = torch.randn(batch, tokens, vocab, dtype=torch.bfloat16, device=DEVICE)
    labels = torch.randint(vocab, (batch, tokens), device=DEVICE)
    desirable = torch.arange(batch, device=DEVICE) % 2 == 0
    ends = torch.cat([torch.arange(4), torch.arange(batch - 4, batch)]).to(DEVICE)
    exact = logits[ends].double().log_softmax(-1)
    chosen = torch.nn.functional.one_hot(labels[ends], vocab)
    x = logits.requires_grad_()
    y = x.view_as(x)
    if inplace:
        y = torch.empty_like(x).copy_(x)
    out = kto_loss(y, labels, desirable, kl=0.0, beta=1.0, reduction="sum", inplace_backward=inplace, backend="triton")
    (grad,) = torch.autograd.grad(out.loss, y)
    logps = (exact * chosen).sum((-1, -2))
    torch.testing.assert_close(out.logps[ends], logps, rtol=1e-6, atol=1e-6)
    sign = torch.where(desirable[ends], -1.0, 1.0)
    slope = (sign * logps.sigmoid() * (-logps).sigmoid()).view(-1, 1, 1)
    torch.testing.assert_close(grad[ends].double(), slope * (chosen - exact.exp()), rtol=1e-2, atol=1e-14)
