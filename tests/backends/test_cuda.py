"""The CUDA C++ kernels without a GPU: their bodies on the host's emulation of a block, over the same grid of cases; what
the compiler makes of them; the extension on a machine without a driver. With a GPU, the grid there too."""

import importlib
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kto_kernels import kto_loss, reference, token_logps
from kto_kernels.backends import cuda, gpu
from kto_kernels.options import OUTPUTS, Scale
from kto_kernels.records import Rows
from tests.losses import test_numerics
from tests.losses.test_kto_loss import CASES
from tests.support.harness import assert_as_accurate, check, dtypes, ours, problem
from tests.support.ptx import build

ROOT = Path(__file__).parents[2]


@pytest.fixture
def emulation(monkeypatch):
    """`backend="cuda"` on CPU tensors; the emulation."""
    try:
        module = importlib.import_module("kto_kernels._cuda_emulation")
    except ImportError:
        pytest.fail("kto_kernels._cuda_emulation is not built: install with KTO_KERNELS_CUDA_EMULATION=1")
    monkeypatch.setattr(cuda, "_emulation", module)
    monkeypatch.setattr(cuda, "_emulation_error", None)
    yield module
    module.set_order(0)


@pytest.fixture
def splits(monkeypatch):
    """Sets how many blocks share a row, however short it is: some may be left without a vector."""

    def force(count):
        monkeypatch.setattr(cuda, "row_splits", lambda *_: count)
        monkeypatch.setattr(gpu, "processors", lambda _: 64)  # counters enough

    return force


# The kernels' bodies ──────────────────────────────────────────────────────────────────────────────────────────────────


# 7: more blocks than a row has vectors, or as many as it has steps.
@pytest.mark.parametrize("count", [2, 7, 32])
@pytest.mark.parametrize(
    "case", ["all from logits", "packed, shift", "vocabulary past one block", "one-token vocabulary"]
)
@dtypes
def test_rows_split_over_blocks_equal_the_definition(case, count, dtype, emulation, splits, poisoned_memory):
    splits(count)
    check(problem(**CASES[case]), ("cuda", "cpu"), dtype)


def test_there_is_a_counter_for_every_row_that_is_split():
    """Two blocks a row need a counter a row: `gpu.arrivals` has them for every number of rows that is split."""
    for rows in range(1, 1200):
        for processors in (1, 80, 132):
            count = cuda.row_splits(rows, 128_000, torch.bfloat16, processors)
            assert 1 <= count <= cuda.MAX_SPLITS
            assert count == 1 or rows <= gpu.PROGRAMS_PER_PROCESSOR * processors // 2
    assert cuda.row_splits(1, 128_000, torch.bfloat16, 132) == 32
    assert cuda.row_splits(100_000, 128_000, torch.bfloat16, 132) == 1
    assert cuda.row_splits(1, 100, torch.bfloat16, 132) == 1


# Which block is last changes no bit; nor does the order of the threads between two barriers.
@pytest.mark.parametrize("case", ["all from logits", "packed, shift, average, none", "vocabulary past one block"])
def test_any_order_of_blocks_gives_the_same_bits(case, emulation, splits):
    splits(3)
    p = problem(**CASES[case]).to(torch.bfloat16)
    results = []
    for seed in range(5):
        emulation.set_order(seed)
        out, grad = ours(p, "cuda")
        results.append([out.loss, out.logps, out.ref_logps, out.rewards, out.kl, grad])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0]))


def test_counters_are_left_at_zero(emulation, splits):
    splits(3)
    for case in ("all from logits", "packed", "KL number"):
        ours(problem(**CASES[case]).to(torch.float32), "cuda")
    assert not gpu.arrivals(torch.device("cpu")).any()


# Every alignment of a row to 16 bytes, the gradient aligned otherwise; 300: vectors in the middle, 5: none at all.
@dtypes
@pytest.mark.parametrize("vocab", [5, 300, 2111])
def test_rows_at_any_alignment_equal_the_definition(vocab, dtype, emulation):
    labels = torch.tensor([0, vocab - 1, vocab // 2, 3, -100])
    for offset in range(16 // dtype.itemsize):
        wide = torch.full((5 * (vocab + 1) + offset,), 99.0).to(dtype)
        logits = wide[offset:].view(5, vocab + 1)[:, :vocab]
        logits.copy_(3 * torch.randn(5, vocab))
        before = wide.clone()
        x = logits.clone().requires_grad_()
        y = logits.requires_grad_()
        mine = token_logps(y, labels, backend="cuda")
        (grad,) = torch.autograd.grad(mine.sum(), y)
        truth = reference.token_logps(x.double(), labels)
        (true_grad,) = torch.autograd.grad(truth.sum(), x)
        torch.testing.assert_close(mine.double(), truth, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(grad, true_grad, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(wide, before)
        base = wide.requires_grad_() * 1
        view = base[offset:].view(5, vocab + 1)[:, :vocab]
        (inplace,) = torch.autograd.grad(token_logps(view, labels, backend="cuda", inplace_backward=True).sum(), view)
        torch.testing.assert_close(inplace, grad, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        assert not grad[4].any() and not inplace[4].any()
        assert (base.detach()[offset:].view(5, vocab + 1)[:, vocab] == 99).all()


# z = softcap(x · logit_scale) / temperature.
@dtypes
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_scaled_logits_equal_the_definition(softcap, count, dtype, emulation, splits):
    splits(count)
    scale = Scale(logit_scale=0.7, softcap=softcap, temperature=1.3)
    x = (6 * torch.randn(5, 1003)).to(dtype)
    labels = torch.tensor([0, 1002, 500, -100, 7])
    rows = Rows(x, labels, None, False, -100)
    backend = cuda.CudaBackend()
    logps, statistics = backend.token_logps(rows, scale)
    weights = torch.rand(5)
    grad = torch.full_like(x, math.nan)
    backend.logits_backward(rows, scale, weights, None, logps, statistics, grad)

    def plain(dtype):
        z = x.to(dtype, copy=True).requires_grad_()
        exact = reference.token_logps(z, labels, -100, scale.logit_scale, scale.softcap, scale.temperature)
        return exact.detach(), torch.autograd.grad((exact * weights).sum(), z)[0]

    (exact, exact_grad), (rounded, rounded_grad) = plain(torch.float64), plain(dtype)
    # One ulp more than PyTorch: the arithmetic is fp32 whatever the logits' type.
    assert_as_accurate("logps", logps, rounded, exact, 4 * torch.finfo(torch.float32).eps)
    assert_as_accurate("gradient", grad, rounded_grad, exact_grad, torch.finfo(dtype).eps)
    backend.logits_backward(rows, scale, weights, None, logps, statistics, x)
    assert torch.equal(x, grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_given_log_probs_of_any_type_and_stride(dtype, emulation):
    p = problem(ref="logps", kl="logps", ref_kl="logps")
    given = {name: t.to(dtype) for name, t in p.tensors.items()}
    strided = {name: t.repeat_interleave(2)[::2] for name, t in given.items()}
    wide = {name: t.double() for name, t in given.items()}
    flags = p.desirable.repeat_interleave(3)[::3]
    results = [
        kto_loss(p.logits, p.labels, flags, **tensors, backend="cuda").loss for tensors in (given, strided, wide)
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@dtypes
def test_infinities_and_nans_in_split_rows(dtype, emulation, splits):
    splits(3)
    test_numerics.test_minus_infinity_is_an_ordinary_logit(dtype, ("cuda", "cpu"))
    for poison in (math.nan, math.inf):
        test_numerics.test_nan_and_inf_stay_in_their_sequence(poison, ("cuda", "cpu"))


# A chunk ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def score(logits, labels, scale=None, gradient=True, outputs=OUTPUTS):
    return cuda.CudaBackend().score_chunk(logits, labels, scale or Scale(), gradient, outputs)


def same_scores(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("logps", *OUTPUTS))


# Every alignment; the label in front of a row's vectors, in them and behind.
@dtypes
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("vocab", [5, 300, 2111])
def test_a_chunk_is_the_forward_and_the_backward(vocab, softcap, dtype, emulation, splits):
    splits(1)
    backend, scale = cuda.CudaBackend(), Scale(0.7, softcap, 1.3)
    labels = torch.tensor([0, vocab - 1, vocab // 2, 3, 1])
    rows = 3 * torch.randn(5, vocab)
    for offset in range(16 // dtype.itemsize):
        wide = torch.full((5 * (vocab + 1) + offset,), 99.0).to(dtype)
        logits = wide[offset:].view(5, vocab + 1)[:, :vocab]
        logits.copy_(rows)
        set_of_rows = Rows(logits, labels, None, False, -1)
        logps, statistics = backend.token_logps(set_of_rows, scale)
        exact = reference.outputs(logits.double(), labels, OUTPUTS, **vars(scale))
        expected = wide.clone()
        grad = expected[offset:].view(5, vocab + 1)[:, :vocab]
        backend.logits_backward(set_of_rows, scale, torch.ones(5), None, logps, statistics, grad)
        before = wide.clone()
        alone = score(logits, labels, scale, gradient=False)
        assert torch.equal(wide, before)
        scores = score(logits, labels, scale)
        assert torch.equal(wide, expected)  # and nothing around the rows is written
        assert same_scores(scores, alone)
        assert torch.equal(scores.logps, logps)
        torch.testing.assert_close(scores.entropy.double(), exact["entropy"], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(scores.mean_logits.double(), exact["mean_logits"], rtol=2e-6, atol=2e-6)
        assert torch.equal(scores.is_top1, exact["is_top1"])


@dtypes
def test_top1_is_the_first_of_equals(dtype, emulation):
    for offset in range(5):
        logits = torch.randint(3, (200, 77 + offset)).to(dtype)[:, offset:]
        logits[:20, -1] = 3.0
        logits[20:40] = -torch.inf
        first = logits.argmax(-1)
        labels = torch.where(torch.rand(200) < 0.5, first, torch.randint(77, (200,)))
        labels[20] = 0
        labels[:20:2] = 76
        is_top1 = score(logits, labels, gradient=False, outputs=("is_top1",)).is_top1
        assert torch.equal(is_top1, labels == first)


# The running maximum moves at every step, or never; what is masked vanishes, whatever it is masked by.
@dtypes
@pytest.mark.parametrize("mask", [None, -math.inf, "lowest"])
@pytest.mark.parametrize("span", [(-40, 40), (40, -40), (0, 0), (-3000, 3000)], ids=str)
def test_entropy_of_rows_in_order(span, mask, dtype, emulation):
    logits = torch.linspace(*span, 9001).repeat(3, 1).to(dtype)
    if mask is not None:
        logits[:, ::7] = torch.finfo(dtype).min if mask == "lowest" else mask
    labels = torch.tensor([0, 4000, 9000])
    for scale in (Scale(), Scale(temperature=3.0)):
        exact = reference.outputs(logits.double(), labels, ("entropy",), **vars(scale))["entropy"]
        entropy = score(logits.clone(), labels, scale, outputs=("entropy",)).entropy
        torch.testing.assert_close(entropy.double(), exact, rtol=3e-6, atol=3e-6)


def test_a_row_without_a_possible_token(emulation):
    logits = torch.full((2, 300), -torch.inf)
    scores = score(logits, torch.tensor([0, 299]))
    assert (scores.logps == -torch.inf).all() and (scores.entropy == 0).all()
    assert scores.is_top1.tolist() == [True, False]
    assert torch.isfinite(logits).all()


def test_a_chunk_of_no_rows_gives_empty_scores(emulation):
    scores = score(torch.empty(0, 7), torch.empty(0, dtype=torch.int64))
    assert scores.logps.shape == scores.is_top1.shape == (0,)


def test_any_order_of_threads_scores_a_chunk_to_the_same_bits(emulation):
    logits, labels = 3 * torch.randn(4, 5003), torch.tensor([0, 5002, 77, 2500])
    results = []
    for seed in range(5):
        emulation.set_order(seed)
        buffer = logits.to(torch.bfloat16)
        results.append((score(buffer, labels, Scale(softcap=9.0)), buffer))
    for scores, gradient in results[1:]:
        assert same_scores(scores, results[0][0]) and torch.equal(gradient, results[0][1])


# 40_000: every block has several turns.
@dtypes
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 300, 40_000])
def test_scaling_in_place_at_any_alignment_equals_torchs(count, factor_dtype, dtype, emulation):
    factor = torch.tensor(-0.3, dtype=factor_dtype)
    for offset in range(16 // dtype.itemsize):
        wide = torch.randn(offset + count + 1).to(dtype)
        expected = wide.clone()
        inside = expected[offset : offset + count]
        inside.copy_(inside.float() * factor.float())
        cuda.CudaBackend().scale_(wide[offset : offset + count], factor)
        assert torch.equal(wide, expected)


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float64])
def test_scaling_by_one_touches_nothing(factor_dtype, emulation):
    """Arithmetic would make this signalling NaN a quiet one."""
    tensor = torch.full((300,), 0x7F81, dtype=torch.int16).view(torch.bfloat16)
    cuda.CudaBackend().scale_(tensor, torch.ones((), dtype=factor_dtype))
    assert (tensor.view(torch.int16) == 0x7F81).all()


# Compiled kernels ────────────────────────────────────────────────────────────────────────────────────────────────────

needs_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="nvcc is not there: nothing compiled")
architectures = pytest.mark.parametrize(
    "arch", [pytest.param(80, marks=pytest.mark.wide), 90, pytest.param(100, marks=pytest.mark.wide)]
)
# 3 types; forward, backward, and a chunk with and without outputs, each with and without a softcap; multiply. The sums of
# sequences have one.
KERNELS = 3 * (4 * 2 + 1) + 1


@needs_nvcc
@architectures
def test_no_kernel_spills_or_uses_local_memory(arch):
    _, report = build.cubin(ROOT / "csrc", arch)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) == report.count("Compiling entry function") == KERNELS
    assert set(frames) == {("0", "0", "0")}, report
    assert "lmem" not in report and "cumulative stack" not in report
    # 8 blocks of 128 threads on a multiprocessor's 65536 registers, 6 under a softcap; 2 of a chunk's 384.
    registers = re.findall(r"entry function '(\S+)'(?:.|\n)*?Used (\d+) registers", report)
    assert len(registers) == KERNELS
    for name, count in registers:
        roomy = "chunk" in name or re.search(r"(for|back)ward_kernel\S*ELb1E", name)
        assert int(count) <= (80 if roomy else 64), (name, count)


def _disassembler():
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


@needs_nvcc
@architectures
def test_bf16_kernels_move_vectors_of_16_bytes(arch):
    disassembler = _disassembler()
    if disassembler is None:
        pytest.skip("cuobjdump is not there: machine code not read")
    cubin, _ = build.cubin(ROOT / "csrc", arch)
    sass = subprocess.run([disassembler, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    functions = dict(part.split("\n", 1) for part in sass.split("Function : ")[1:])
    bf16 = {name: body for name, body in functions.items() if "5DTypeE2E" in name}
    assert len(bf16) == KERNELS // 3
    for name, body in bf16.items():
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;/]+);", body)
        lines = [i for i, instruction in enumerate(instructions) if re.search(r"LDG\.E\.\S*128", instruction)]
        assert len(lines) >= cuda.UNROLL + 1, name  # the unrolled step's, and the single one
        # In flight together: the step's loads stand near each other, not each before its own arithmetic.
        closest = min(b - a for a, b in zip(lines, lines[cuda.UNROLL - 1 :]))
        assert closest <= 120, (name, closest)
        if "forward" not in name:
            assert re.search(r"STG\.E\.\S*128", body), name
        assert not re.search(r"\b(LDL|STL)\b", body), name
        # Numbers that are read again must not be the first that L2 drops: evict-first (EF) are last reads only.
        last = [i for i in instructions if re.search(r"LDG\.E\.EF\.128", i)]
        assert len(last) >= cuda.UNROLL + 1, name
        assert len(lines) - len(last) >= (cuda.UNROLL + 1 if "chunk" in name else 0), name


# The extension ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unavailable_backend_says_why(monkeypatch):
    backend = cuda.CudaBackend()
    cpu = torch.device("cpu")
    monkeypatch.setattr(cuda, "_emulation", None)
    monkeypatch.setattr(cuda, "_emulation_error", None)
    if cuda._cuda is not None:
        if torch.cuda.is_available():
            assert "not on cpu" in backend.unavailable(cpu)
            assert backend.unavailable(torch.device("cuda")) is None
        else:
            assert backend.unavailable(cpu) == backend.unavailable(torch.device("cuda")) == "built, no device"
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "_import_error", "No module named 'kto_kernels._cuda'")
    assert backend.unavailable(cpu).startswith("not built (No module named")


def test_imports_without_a_driver_and_links_no_cuda_library():
    if cuda._cuda is None:
        assert cuda._import_error  # with the reason
        pytest.skip(f"kto_kernels._cuda is not built: {cuda._import_error}")
    # From its file alone, without the package and so without torch.
    code = """
import sys
from importlib import machinery, util
spec = util.spec_from_file_location("_cuda", sys.argv[1], loader=machinery.ExtensionFileLoader("_cuda", sys.argv[1]))
module = util.module_from_spec(spec)
spec.loader.exec_module(module)
print(hasattr(module, "forward"), "torch" in sys.modules)
"""
    command = [sys.executable, "-c", code, cuda._cuda.__file__]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout == "True False\n", run.stderr
    if sys.platform == "linux" and shutil.which("ldd"):
        linked = subprocess.run(["ldd", cuda._cuda.__file__], capture_output=True, text=True).stdout
        assert not re.search(r"libcuda|libcudart|libtorch|libc10", linked), linked


@pytest.mark.skipif(cuda._cuda is None, reason="kto_kernels._cuda is not built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_launch_that_fails_names_its_kernel():
    """No driver, so that the first call of the runtime fails."""
    native = cuda._cuda
    names = (
        "logits dtype n_rows n_sequences tokens vocab logits_stride_b logits_stride_t labels labels_int64 "
        "labels_stride_b labels_stride_t cu_seqlens cu_seqlens_int64 ignore_index shift"
    )
    rows = dict.fromkeys(names.split(), 1) | dict.fromkeys(("logits", "labels", "cu_seqlens"), 0)
    scale = {"logit_scale": 1.0, "softcap": None, "temperature": 1.0}
    row_set = {"rows": rows, **dict.fromkeys(("logps", "origin", "sum", "sums", "counts"), 0)}
    target = {"device": 0, "stream": 0}

    def arguments(names: str) -> dict:
        return dict.fromkeys(names.split(), 0)

    with pytest.raises(RuntimeError, match=r"CUDA kernel forward: \w+"):
        native.forward([row_set], None, {"scale": scale, "splits": 1, "shares": 0, "arrivals": 0}, target)
    with pytest.raises(RuntimeError, match=r"CUDA kernel backward: \w+"):
        names = "grad grad_stride coefficients logps origin sum out out_stride_b out_stride_t splits"
        native.backward({**arguments(names), "rows": rows, "scale": scale, "splits": 1}, target)
    with pytest.raises(RuntimeError, match=r"CUDA kernel chunk: \w+"):
        names = "gradient logps entropy mean_logits is_top1"
        native.score_chunk({**arguments(names), "rows": rows, "scale": scale}, target)
    with pytest.raises(RuntimeError, match=r"CUDA kernel multiply: \w+"):
        factor = arguments("data type stride")
        native.multiply({**arguments("data dtype"), "count": 1, "factor": factor, "blocks": 1}, target)


def test_a_struct_takes_every_field_and_no_other(emulation):
    target = {"device": 0, "stream": 0}
    factor = {"data": 0, "type": 0, "stride": 0}
    arguments = {"data": 0, "dtype": 0, "count": 0, "factor": factor, "blocks": 1}
    multiply = emulation.multiply
    for message, wrong in {
        "count is missing": {name: value for name, value in arguments.items() if name != "count"},
        "unknown fields: .*'scale'": {**arguments, "scale": 1},
        "count: ": {**arguments, "count": 0.5},
        "stride is missing": {**arguments, "factor": {"data": 0, "type": 0}},
        "factor: ": {**arguments, "factor": 1.0},
    }.items():
        with pytest.raises(TypeError, match=message):
            multiply(wrong, target)


# On a GPU ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
# `benchmarks/run_gpu.sh tests` runs all of `-m gpu`, and the CUDA kernels under compute-sanitizer.


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_gpu
@pytest.mark.gpu
def test_repeats_bitwise_on_a_gpu():
    p = problem(vocab=50_257, batch=8, tokens=16).to(torch.bfloat16, "cuda")
    first, first_grad = ours(p, "cuda")
    for _ in range(5):
        again, again_grad = ours(p, "cuda")
        assert torch.equal(again.loss, first.loss) and torch.equal(again_grad, first_grad)


@needs_gpu
@pytest.mark.gpu
def test_one_launch_an_operation():
    p = problem().to(torch.bfloat16, "cuda")
    ours(p, "cuda")
    torch.cuda.synchronize()
    logits, labels = torch.randn(5, 300, device="cuda"), torch.arange(5, device="cuda")
    factor = torch.tensor(0.3, device="cuda")
    operations = {
        "forward": lambda: kto_loss(p.logits, p.labels, p.desirable, **p.tensors, **p.options, backend="cuda"),
        "chunk": lambda: score(logits, labels),
        "multiply": lambda: cuda.CudaBackend().scale_(logits, factor),
    }
    for name, operation in operations.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            operation()
            torch.cuda.synchronize()
        kernels = [event.key for event in profile.key_averages() if event.device_type.name == "CUDA"]
        assert len(kernels) == 1 and f"{name}_kernel" in kernels[0], kernels


@needs_gpu
@pytest.mark.gpu
def test_scaling_does_not_wait_for_the_device():
    tensor, factor = torch.randn(300, device="cuda"), torch.tensor(0.3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda.CudaBackend().scale_(tensor, factor)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.gpu
def test_a_captured_graph_replays_the_loss():
    p = problem().to(torch.float32, "cuda")
    expected = kto_loss(p.logits, p.labels, p.desirable, **p.tensors, **p.options, backend="cuda").loss
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = kto_loss(p.logits, p.labels, p.desirable, **p.tensors, **p.options, backend="cuda").loss
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
