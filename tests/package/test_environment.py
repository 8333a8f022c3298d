"""Surroundings that are not a laboratory's: something missing, nothing writable, forked, on many threads, under other
defaults, inside PyTorch's modes and transforms. A right answer or a clear error."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.data import DataLoader, Dataset

from kto_kernels import (
    available_backends,
    kto_loss,
    kto_loss_from_logps,
    linear_kto_loss,
    linear_token_logps,
    token_logps,
)
from tests.support.harness import PLACES, ours, problem
from tests.support.linear_harness import linear_problem, ours_linear

STEP = """
import torch, kto_kernels
torch.manual_seed(0)
hidden, weight = torch.randn(3, 40, 16, requires_grad=True), torch.randn(5003, 16, requires_grad=True)
labels, desirable = torch.randint(5003, (3, 40)), torch.tensor([True, False, True])
kto_kernels.kto_loss(hidden @ weight.T, labels, desirable, kl=0.1).loss.backward()
from_logits = [hidden.grad.clone(), weight.grad.clone()]
hidden.grad = weight.grad = None
loss = kto_kernels.linear_kto_loss(hidden, weight, labels, desirable, kl=0.1).loss
loss.backward()
assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-8) for a, b in zip(from_logits, (hidden.grad, weight.grad)))
assert hidden.grad.any() and weight.grad.any()
print(f"{loss.item():.6f} {weight.grad.abs().sum().item():.4f}")
"""


def run(code: str, timeout: int = 300, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Missing parts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_triton_extensions_compiler_driver_or_a_place_to_write(tmp_path):
    """All at once, and the loss is the same to rounding. PyTorch alone wants a folder (for its compiler, at the first
    call of any operator or optimizer), and leaves it empty."""
    missing = """
import sys
for name in ("triton", "kto_kernels._cpu", "kto_kernels._cuda", "kto_kernels._cuda_emulation"):
    sys.modules[name] = None
"""
    folder = tmp_path / "torch"
    places = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TRITON_HOME")
    nowhere = dict.fromkeys(places, "/proc/nowhere") if sys.platform == "linux" else {}
    bare = {
        **nowhere,
        "PATH": "",
        "CC": "",
        "CXX": "",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
    }
    reasons = "\nprint(kto_kernels.available_backends('cpu'))"
    everything = run(STEP, KTO_KERNELS_CUDA_EMULATE="0")
    step, backends = run(missing + STEP + reasons, **bare).splitlines()
    found, expected = ([float(number) for number in text.split()] for text in (step, everything))
    assert found == pytest.approx(expected, rel=1e-5)
    assert "'torch': None" in backends and "kto_kernels._cpu is not there" in backends
    assert "Triton is not there" in backends
    assert not list(folder.rglob("*"))


# Processes and threads ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_on_threads():
    """After its parent has: OpenMP's threads are not there any more, and PyTorch's own operators wait for them for
    ever. Ours must not."""
    code = """
import os, signal, torch
from kto_kernels import token_logps
torch.set_num_threads(2)
logits, labels = torch.randn(64, 9001, requires_grad=True), torch.randint(9001, (64,))
def step():
    logps = token_logps(logits, labels)
    return logps.detach(), torch.autograd.grad(logps.sum(), logits)[0]
expected = step()
child = os.fork()
if child == 0:
    signal.alarm(60)
    logps, gradient = step()
    torch.set_num_threads(1)  # for PyTorch's comparisons
    os._exit(0 if torch.equal(logps, expected[0]) and torch.equal(gradient, expected[1]) else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run(code) == "0\n"


class _Losses(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        p = problem(batch=2, tokens=40, vocab=5003, kl="number", ref_kl=None)
        out, grad = ours(p, "cpu")
        return index, out.loss.detach(), grad


def test_workers_of_a_dataloader():
    """Forked ones, each with one thread."""
    items = list(DataLoader(_Losses(), batch_size=None, num_workers=2, worker_init_fn=_same_seed, timeout=300))
    assert [int(index) for index, *_ in items] == [0, 1, 2, 3]
    torch.manual_seed(0)
    own = [_Losses()[i] for i in range(4)]
    # Worker k has items k, k + 2, in this order, from the seed on.
    for worker in (0, 1):
        for turn, index in enumerate((worker, worker + 2)):
            assert torch.equal(items[index][1], own[turn][1])
            assert torch.equal(items[index][2], own[turn][2])


def _same_seed(_worker):
    torch.manual_seed(0)


def test_every_entry_point_on_many_python_threads():
    p, lp = problem(batch=4, tokens=50, vocab=4001, kl="number", ref_kl=None), linear_problem()
    calls = [lambda: ours(p, "cpu"), lambda: ours_linear(lp, "cpu"), lambda: ours(p, "torch")]

    def bits(result):
        out, grads = result
        grads = grads if isinstance(grads, (tuple, list, dict)) else [grads]
        return [out.loss, *(grads.values() if isinstance(grads, dict) else grads)]

    expected = [bits(call()) for call in calls]
    wrong = []

    def work(first: int):
        for i in range(first, first + 6):
            found = bits(calls[i % 3]())
            if not all(torch.equal(a, b) for a, b in zip(found, expected[i % 3])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.fault(13)
def test_a_rank_ends_without_finalising_python(tmp_path):
    """`rank_pool.leave` says why. Here are the ingredients of the abort: something holds the group beyond its
    destruction, as a model under DDP does, the group's threads hardly get a core, and the main thread keeps the GIL.
    Of processes that end in the ordinary way a third aborts; whether Python is finalised, the last line tells."""
    code = """
import atexit, os, sys, torch, torch.distributed as dist
from tests.support.rank_pool import leave
atexit.register(print, "Python is finalised")
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
sys.setswitchinterval(10)
held = dist.group.WORLD
for thread in os.listdir("/proc/self/task") if sys.platform == "linux" else ():
    with open(f"/proc/self/task/{thread}/comm") as name:
        if "gloo" in name.read():
            os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
dist.all_reduce(torch.ones(4))
print("done")
leave()
"""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "store")],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        output, errors = rank.communicate(timeout=120)
        # Some releases of PyTorch print a line about the group before.
        assert (rank.returncode, output.splitlines()[-1]) == (0, "done"), errors


# Whose threads compute: torch's, wherever the loader has put them. On x86_64 the runtime is visible to the whole
# process, on aarch64 to torch alone; to load everything so makes the one like the other.
ALONE = """
import ctypes
load = ctypes.CDLL
ctypes.CDLL = lambda name, *_, **__: load(name)
"""
TEAM = """
import ctypes, os, torch
from kto_kernels import token_logps
from kto_kernels.backends import cpu
torch.set_num_threads(3)
threads = len(os.listdir("/proc/self/task"))
token_logps(torch.empty(64, 9001).zero_(), torch.zeros(64, dtype=torch.int64))
print(hasattr(ctypes.pythonapi, "GOMP_parallel"), len(os.listdir("/proc/self/task")) - threads, cpu.thread_team())
"""


@pytest.mark.fault(15)
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, and at the loader of Linux")
@pytest.mark.parametrize("where", ["visible to all", "visible to torch"])
def test_torchs_own_threads_compute(where):
    """A team of torch's outlives the call, and threads of our own do not: two more than before on three threads."""
    visible, more, team = run((ALONE if where == "visible to torch" else "") + TEAM).split(maxsplit=2)
    assert (visible, more) == (str(where == "visible to all"), "2")
    assert "PyTorch's OpenMP runtime" in team and "omp" in os.path.basename(team)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at the loader of Linux")
def test_threads_of_our_own_where_torch_has_none():
    """A warning says so, once, and the report."""
    code = """
import torch
torch._C.__file__ = "/nowhere"
from kto_kernels.backends import cpu
print(cpu.thread_team())
"""
    done = subprocess.run([sys.executable, "-c", ALONE + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("threads of their own")
    assert done.stderr.count("the C++ kernels run on threads of their own") == 1


# Defaults and modes ───────────────────────────────────────────────────────────────────────────────────────────────────

HERE = {"device": "cpu", "dtype": torch.float32}
on_the_cpu = pytest.mark.parametrize("backend", [p.values[0][0] for p in PLACES if p.values[0][1] == "cpu"])


def losses(backend: str, grad: bool = True) -> list[torch.Tensor]:
    """Both losses, with their gradients, and the seam, with nothing left to a default."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    logits, hidden, weight = (
        torch.randn(*shape, generator=generator, **HERE) for shape in ((3, 4, 50), (3, 4, 16), (50, 16))
    )
    labels = torch.arange(12, device="cpu").reshape(3, 4)
    desirable = torch.tensor([True, False, True], device="cpu")
    found = []
    for inputs, loss in (((logits,), kto_loss), ((hidden, weight), linear_kto_loss)):
        leaves = [x.clone().requires_grad_(grad) for x in inputs]
        out = loss(*leaves, labels, desirable, kl_logps=torch.zeros(2, **HERE), backend=backend)
        found += [out.loss.detach(), out.rewards, out.logps, torch.tensor(list(out.metrics().values()), **HERE)]
        found += torch.autograd.grad(out.loss, leaves) if grad else []
    return [*found, linear_token_logps(hidden, weight, labels, backend=backend)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


@on_the_cpu
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(default, backend):
    expected = losses(backend)
    torch.set_default_dtype(default)
    try:
        found = losses(backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(found, expected)


@on_the_cpu
def test_the_default_device_changes_nothing(backend):
    """Not even to one without memory: every buffer is where the inputs are."""
    expected = losses(backend)
    with torch.device("meta"):
        assert_same(losses(backend), expected)


@on_the_cpu
def test_inference_mode_gives_the_same_results(backend):
    expected = losses(backend, grad=False)
    with torch.inference_mode():
        assert_same(losses(backend, grad=False), expected)


def test_states_from_inference_mode_train_a_head():
    with torch.inference_mode():
        hidden = torch.randn(3, 4, 16)
    weight, labels = torch.randn(50, 16, requires_grad=True), torch.randint(50, (3, 4))
    desirable = torch.tensor([True, False, True])
    grads = [
        torch.autograd.grad(linear_kto_loss(states, weight, labels, desirable, kl=0.1).loss, weight)[0]
        for states in (hidden, hidden.clone())
    ]
    assert grads[0].any() and torch.equal(*grads)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_logits_as_they_come_and_runs_the_heads_gemm(dtype, device):
    """The loss from logits takes them as they come; the head's GEMM runs in autocast's dtype, as `F.linear` would, and
    the gradients have the parameters' own."""
    x, h, w = (torch.randn(*shape, device=device) for shape in ((3, 4, 50), (3, 4, 16), (50, 16)))
    labels, desirable = torch.randint(50, (3, 4), device=device), torch.tensor([True, False, True], device=device)
    plain = kto_loss(x, labels, desirable, kl=0.1).loss
    rounded = [t.to(dtype).requires_grad_() for t in (h, w)]
    expected = linear_kto_loss(*rounded, labels, desirable, kl=0.1).loss
    leaves = [t.clone().requires_grad_() for t in (h, w)]
    with torch.autocast(device, dtype):
        assert torch.equal(kto_loss(x, labels, desirable, kl=0.1).loss, plain)
        loss = linear_kto_loss(*leaves, labels, desirable, kl=0.1).loss
    assert torch.equal(loss, expected)
    for leaf, grad, other in zip(leaves, torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, rounded)):
        assert grad.dtype == leaf.dtype == torch.float32 and grad.any()
        torch.testing.assert_close(grad, other.float(), rtol=torch.finfo(dtype).eps, atol=1e-7)


# Transforms ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def transformable():
    """Each function of what it is differentiated by, and that."""
    labels, desirable = torch.randint(50, (3, 4)), torch.tensor([True, False, True])
    x, h, w = torch.randn(3, 4, 50), torch.randn(3, 4, 16), torch.randn(50, 16)
    return {
        "logits": (lambda x: kto_loss(x, labels, desirable, kl=0.1).loss, x),
        "token_logps": (lambda x: token_logps(x, labels).sum(), x),
        "hidden": (lambda h: linear_kto_loss(h, w, labels, desirable, kl=0.1).loss, h),
        "weight": (lambda w: linear_kto_loss(h, w, labels, desirable, kl=0.1).loss, w),
        "linear_token_logps": (lambda h: linear_token_logps(h, w, labels).sum(), h),
    }


def forward_mode(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


DERIVATIVES = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x])),
    "grad of vmap": lambda f, x: torch.func.grad(lambda xs: torch.func.vmap(f)(xs).sum())(torch.stack([x, x])),
    "forward mode": forward_mode,
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("function", transformable())
def test_derivatives_that_the_operators_do_not_know_are_an_error(function, derivative):
    """A tangent would be dropped: a gradient of zeros."""
    f, x = transformable()[function]
    argument = "weight" if function == "weight" else "hidden" if x.shape[-1] == 16 else "logits"
    with pytest.raises(NotImplementedError, match=rf"{argument}: torch.func.grad, .* are not supported"):
        DERIVATIVES[derivative](f, x)


def test_the_stages_after_the_seam_take_every_derivative():
    policy, ref = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    desirable = torch.tensor([True, False, True, False])

    def f(policy):
        return kto_loss_from_logps(policy, desirable, ref_logps=ref, kl=0.1).loss

    leaf = policy.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    _, tangent = torch.func.jvp(f, (policy,), (torch.ones_like(policy),))
    for found in (torch.func.grad(f)(policy), torch.func.jacfwd(f)(policy)):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(tangent, expected.sum())
    torch.testing.assert_close(forward_mode(f, policy), expected.sum())


@pytest.mark.parametrize("function", transformable())
def test_vmap_without_derivatives_is_a_loop(function):
    f, x = transformable()[function]
    xs = torch.stack([x, 2 * x, -x])
    assert torch.equal(torch.func.vmap(f)(xs), torch.stack([f(x) for x in xs]))


# Devices ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("backend", ["triton", "cuda", "torch"])
def test_a_device_that_is_not_the_current_one(backend):
    if (reason := available_backends("cuda")[backend]) is not None:
        pytest.skip(reason)
    p = problem(batch=3, tokens=5, vocab=3001)
    results = [ours(p.to(torch.float32, device), backend) for device in ("cuda:0", "cuda:1")]
    assert results[1][1].device == torch.device("cuda:1")
    assert torch.equal(results[0][0].loss.cpu(), results[1][0].loss.cpu())
    assert torch.equal(results[0][1].cpu(), results[1][1].cpu())
    with pytest.raises(ValueError, match=r"labels: expected device cuda:1"):
        token_logps(p.logits.to("cuda:1"), p.labels.to("cuda:0"))
