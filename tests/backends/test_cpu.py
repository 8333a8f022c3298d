"""The C++ kernels: every instruction set, any number of threads, very large logits, the extension's build."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from kto_kernels import kto_loss, reference, token_logps
from kto_kernels.backends import BACKENDS, cpu
from kto_kernels.backends.base import Backend
from kto_kernels.options import OUTPUTS, Scale
from tests.losses.test_kto_loss import CASES
from tests.support.harness import DTYPE_IDS, DTYPES, assert_as_accurate, check, ours, problem

ISAS = cpu.instruction_sets()
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("KTO_KERNELS_CPU_ISA", request.param)
    assert cpu.instruction_set() == request.param
    return request.param


def test_the_build_has_every_instruction_set_of_this_machine():
    flags = Path("/proc/cpuinfo").read_text().split() if sys.platform == "linux" else []
    expected = {"baseline"}
    expected |= {"avx2"} if {"avx2", "fma"} <= set(flags) else set()
    expected |= {"avx512"} if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= set(flags) else set()
    assert set(ISAS) == expected


def test_unknown_instruction_set_is_an_error(monkeypatch):
    monkeypatch.setenv("KTO_KERNELS_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"KTO_KERNELS_CPU_ISA=mmx: this machine and build have .*baseline"):
        token_logps(torch.randn(2, 3), torch.tensor([0, 1]), backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("case", list(CASES))
def test_every_instruction_set_equals_the_oracle(case, dtype, isa, poisoned_memory):
    check(problem(**CASES[case]), ("cpu", "cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_16_bit_number_is_read_and_written_right(dtype, isa):
    """All 65,536 bit patterns as logits; gradients over all magnitudes, rounded as PyTorch rounds them."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns[torch.isfinite(patterns)]
    # Beside a label of the same value: the log-probability is −ln 2 only if the number was read right.
    logits = torch.stack([finite, finite], -1)
    labels = torch.zeros(len(finite), dtype=torch.int64)
    torch.testing.assert_close(token_logps(logits, labels), torch.full((len(finite),), -0.6931472))
    # Beside a label of 0: the gap itself.
    logits = torch.stack([torch.zeros_like(finite), finite], -1)
    expected = -torch.logaddexp(torch.zeros((), dtype=torch.float64), finite.double())
    torch.testing.assert_close(
        token_logps(logits, labels).double(), expected, rtol=2e-7, atol=1.5e-45
    )  # fp32 ends there
    # Infinities and NaNs are read as what they are.
    special = patterns[~torch.isfinite(patterns)]
    logps = token_logps(torch.stack([torch.zeros_like(special), special], -1), labels[: len(special)])
    assert torch.equal(torch.isnan(logps), special != -torch.inf)
    assert (logps[special == -torch.inf] == 0).all()

    weights = torch.cat([10.0 ** torch.arange(-46, 5), -(10.0 ** torch.arange(-46, 5))])
    x = torch.randn(len(weights), 200).to(dtype)
    y = torch.zeros(len(weights), dtype=torch.int64)
    grads = []
    for logits in (x, x.float()):
        leaf = logits.requires_grad_()
        grads.append(torch.autograd.grad((token_logps(leaf, y) * weights).sum(), leaf)[0].double())
    # The yardstick itself against the formula: two gradients of zeros would agree with each other.
    exact = -x.double().softmax(-1)
    exact[:, 0] = -torch.expm1(x.double().log_softmax(-1)[:, 0])
    exact = exact * weights.double()[:, None]
    normal = exact.abs() > 1e-37
    assert normal.sum() > 10_000
    assert ((grads[1] - exact).abs() <= 1e-5 * exact.abs())[normal].all()
    info = torch.finfo(dtype)
    spacing = torch.clamp(
        2.0 ** torch.floor(torch.log2(grads[1].abs())) * info.eps, min=info.smallest_normal * info.eps
    )
    representable = grads[1].abs() <= info.max
    error = (grads[0] - grads[1]).abs()
    assert (error <= 0.5001 * spacing + 1e-44)[representable].all()
    assert torch.isinf(grads[0][~representable & (grads[1].abs() > info.max * 1.01)]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_thread_count_does_not_change_a_bit(dtype, isa):
    p = problem(batch=3, tokens=100, vocab=5003, kl="number", ref_kl=None, shift=True).to(dtype)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ours(p, "cpu"))
    for out, grad in results[1:]:
        assert torch.equal(grad, results[0][1]) and torch.equal(out.loss, results[0][0].loss)


def long_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of several blocks whose maximum moves at every chance: at random, always, late, from nothing, by a little."""
    x = 3 * torch.randn(6, 10_007)
    x[1] = torch.linspace(-300, 300, 10_007)
    x[2] = torch.linspace(300, -300, 10_007)
    x[3, :5_000] = -torch.inf
    x[4, :5_000] -= 40
    x[5, 9_000] = 20  # within the lag of a reference
    return x, torch.tensor([0, 10_006, 5_003, 5_001, 7, 10_000])


@pytest.mark.parametrize("scale", [Scale(), Scale(0.7, 20.0, 0.6)], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_outputs_of_long_rows(dtype, scale, isa, poisoned_memory):
    x, labels = long_rows()
    x = x.to(dtype)
    scores = BACKENDS["cpu"].score_chunk(x, labels, scale, False, OUTPUTS)
    exact = reference.outputs(x.double(), labels, OUTPUTS, **vars(scale))
    plain = reference.outputs(x, labels, OUTPUTS, **vars(scale))
    eps = torch.finfo(torch.float32).eps
    assert_as_accurate("entropy", scores.entropy, plain["entropy"], exact["entropy"], 8 * eps)
    finite = exact["mean_logits"].isfinite()
    assert torch.equal(scores.mean_logits[~finite].double(), exact["mean_logits"][~finite])
    means = (values[finite] for values in (scores.mean_logits, plain["mean_logits"], exact["mean_logits"]))
    assert_as_accurate("mean_logits", *means, eps, 300.0)
    assert torch.equal(scores.is_top1, exact["is_top1"])


@pytest.mark.parametrize("gap", [20.0, 30.0, 60.0])
@pytest.mark.parametrize("of_label", [True, False], ids=["label", "other"])
def test_entropy_near_certainty(of_label, gap, isa):
    """Where log Σ e^z − Σ p z in fp32 would be rounding errors alone. In the lanes of a maximum that is not the label's
    the rest is lost to rounding, so that a little of the sum is missing."""
    x = torch.randn(4, 5_003)
    certain = torch.tensor([0, 17, 4_999, 5_002])
    x[torch.arange(4), certain] = x.amax(-1) + gap
    labels = certain if of_label else certain.flip(0)
    entropy = BACKENDS["cpu"].score_chunk(x, labels, Scale(), False, ("entropy",)).entropy
    exact = reference.outputs(x.double(), labels, ("entropy",))["entropy"]
    torch.testing.assert_close(entropy.double(), exact, rtol=1e-5 if of_label else 1e-2, atol=0.0)


@pytest.mark.parametrize("softcap", [None, 2.0])  # under which both maxima give the same z
def test_first_argmax_wherever_the_maxima_are(softcap, isa):
    places = [0, 1, 15, 16, 63, 64, 200, 4_100, 5_002]
    pairs = torch.tensor([(label, other) for label in places for other in places])
    scale = Scale(softcap=softcap)
    for above in (0.0, 1.0):
        x = torch.zeros(len(pairs), 5_003).scatter_(1, pairs[:, 1:], 50.0 + above).scatter_(1, pairs[:, :1], 50.0)
        scores = BACKENDS["cpu"].score_chunk(x, pairs[:, 0].contiguous(), scale, False, ("is_top1",))
        label, other = pairs.unbind(1)
        assert torch.equal(scores.is_top1, label <= other if above == 0 else label == other)


def test_rows_without_a_softmax(isa):
    """A NaN, +inf, nothing but −inf: as the definition, except that a row without a softmax has no argmax."""
    x = torch.randn(5, 300)
    x[0, 200], x[1, 3], x[2, 9] = torch.nan, torch.nan, torch.inf
    x[3:] = -torch.inf
    labels = torch.tensor([5, 3, 9, 0, 1])
    exact = reference.outputs(x, labels, OUTPUTS)
    scores = BACKENDS["cpu"].score_chunk(x, labels, Scale(), True, OUTPUTS)
    assert scores.logps[:3].isnan().all() and (scores.logps[3:] == -torch.inf).all()
    torch.testing.assert_close(scores.entropy, exact["entropy"], equal_nan=True)
    torch.testing.assert_close(scores.mean_logits, exact["mean_logits"], equal_nan=True)
    assert scores.is_top1.tolist() == [False, False, False, True, False]
    assert x[:3].isnan().all() and x[3:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_a_scored_chunk_has_the_bits_of_forward_and_backward(dtype, isa):
    """Whatever `outputs` are taken along, and on any number of threads."""
    x, labels = (t.repeat(9, *[1] * (t.dim() - 1)) for t in long_rows())
    x = x.to(dtype)
    staged = x.clone()
    expected = Backend.score_chunk(BACKENDS["cpu"], staged, labels, Scale(), True, ())
    first = None
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for outputs in ((), OUTPUTS):
            gradient = x.clone()
            scores = BACKENDS["cpu"].score_chunk(gradient, labels, Scale(), True, outputs)
            assert torch.equal(scores.logps, expected.logps) and torch.equal(gradient, staged)
        first = first or scores
        assert all(torch.equal(getattr(scores, name), getattr(first, name)) for name in OUTPUTS)


def test_callers_on_many_python_threads():
    p = problem(batch=4, tokens=50, vocab=4001, kl="number", ref_kl=None)
    expected, expected_grad = ours(p, "cpu")
    failures = []

    def call():
        for _ in range(5):
            out, grad = ours(p, "cpu")
            if not (torch.equal(out.loss, expected.loss) and torch.equal(grad, expected_grad)):
                failures.append(out)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_another_python_thread_runs_during_a_call(monkeypatch):
    """Another Python thread runs during a call of the extension. No clock says so: the interpreter is told to take its
    lock from no thread, so that the other thread gets the lock only where the call gives it up."""
    logits, labels = torch.zeros(256, 50_000, dtype=torch.bfloat16), torch.zeros(256, dtype=torch.int64)
    calls, ran, seen = threading.Semaphore(0), [], []

    def other():
        while calls.acquire() and ran[-1:] != ["stop"]:
            ran.append("during a call")

    class Watched:
        def __getattr__(self, name):
            return getattr(extension, name)

        def forward(self, *arguments):
            ran.clear()
            calls.release()  # wakes the other thread, which then waits for the interpreter's lock
            extension.forward(*arguments)
            seen.append(bool(ran))

    extension = cpu._cpu
    monkeypatch.setattr(cpu, "_cpu", Watched())
    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        # On a busy machine a call may be over before the other thread has woken up, but not all of them.
        while not any(seen) and len(seen) < 500:
            token_logps(logits, labels, backend="cpu")
    finally:
        sys.setswitchinterval(interval)
        ran.append("stop")
        calls.release()
        thread.join()
    assert any(seen)


@pytest.mark.alone
def test_more_than_2_to_the_31_logits():
    """bf16, in place, within memory: offsets past 2^31 reach the right rows, and nothing of the size is allocated."""
    vocab, rows = 49_157, 43_700
    assert vocab * rows > 2**31
    # Filled row by row from a few kilobytes of randomness, so that the test itself needs no second buffer.
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16)
    pattern = (3 * torch.randn(37, vocab)).bfloat16()
    for begin in range(0, rows, 37):
        logits[begin : begin + 37] = pattern[: min(37, rows - begin)]
    labels = torch.arange(rows) % vocab
    offsets = torch.tensor([0, 10_000, rows - 5, rows])
    good = torch.tensor([True, False, True])
    ref = torch.tensor([-14.0, -15.0, -16.0])  # per token, so that 33,700 tokens do not saturate the sigmoid
    watched = [0, 9_999, 10_000, rows - 6, rows - 5, rows - 1]
    before = logits[watched].clone()

    weight = torch.ones((), requires_grad=True)
    view = _Identity.apply(logits, weight)
    resident = _resident()
    options = {"cu_seqlens": offsets, "kl": 0.0, "average_log_prob": True, "beta": 0.5, "desirable_weight": 1e4}
    out = kto_loss(view, labels, good, ref_logps=ref, inplace_backward=True, **options)
    (grad,) = torch.autograd.grad(out.loss, view)
    assert _resident() - resident < 64 * 2**20
    assert grad.data_ptr() == logits.data_ptr()

    lengths = offsets.diff()
    exact = before.double().requires_grad_()
    logps = exact.log_softmax(-1).gather(-1, labels[watched, None])
    (directions,) = torch.autograd.grad(logps.sum(), exact)
    x = 0.5 * (out.logps - ref.double())
    x = torch.where(good, x, -x)
    slopes = torch.where(good, -1e4, 1.0) * 0.5 * torch.sigmoid(x) * torch.sigmoid(-x) / 3 / lengths
    expected = slopes[[0, 0, 1, 1, 2, 2], None] * directions
    assert expected.abs().amax(-1).min() > 1e-6
    scale = expected.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(logits[watched].double() / scale, expected / scale, rtol=2**-8, atol=1e-6)


class _Identity(torch.autograd.Function):
    """Makes logits that are no leaf without copying them."""

    @staticmethod
    def forward(ctx, logits, weight):
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_without_the_extension_auto_takes_torch_and_says_so(tmp_path):
    """As after `KTO_KERNELS_CPU=0 pip install .`: nothing falls back silently, it is a warning."""
    code = """
import sys, logging
sys.modules["kto_kernels._cpu"] = None
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
import torch, kto_kernels
x, y = torch.randn(2, 3, 9), torch.zeros(2, 3, dtype=torch.int64)
kto_kernels.token_logps(x, y)
kto_kernels.token_logps(x, y)
print(kto_kernels.available_backends()["cpu"])
try:
    kto_kernels.token_logps(x, y, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert run.stdout.count("backend='torch' for float32 logits on cpu; not 'cpu'") == 1
    assert run.stdout.count("install again with KTO_KERNELS_CPU=1") == 3


def test_incremental_build_compiles_nothing_again(tmp_path):
    arguments = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    environment = os.environ | {"KTO_KERNELS_WERROR": "1", "KTO_KERNELS_CUDA": "0", "KTO_KERNELS_CUDA_EMULATION": "0"}
    for _ in range(2):
        run = subprocess.run([*arguments, "--force"], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    assert "ninja: no work to do" in run.stdout + run.stderr


def test_no_torch_in_the_native_build():
    for source in (ROOT / "csrc").rglob("*.*"):
        assert "torch/" not in source.read_text() and "ATen" not in source.read_text(), source
    linked = subprocess.run(["ldd", cpu._cpu.__file__], capture_output=True, text=True).stdout
    assert "torch" not in linked and "libc" in linked
