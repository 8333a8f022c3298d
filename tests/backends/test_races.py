"""The reduction by the last program, under every disturbance at hand: programs in any order and interleaved at every
access to memory (Triton's interpreter), blocks and threads in any order (the CUDA kernels' emulation), load beside it.
The same bits each time. tests/native/run.sh looks for races in the C++ itself."""

import contextlib
import inspect
import random
import threading
from unittest import mock

import pytest
import torch

from kto_kernels.backends import cuda, gpu
from kto_kernels.backends.triton import launch as launchers
from tests.support.harness import kernel_places, ours, problem

interpreted = pytest.mark.skipif(not launchers.INTERPRETED, reason="TRITON_INTERPRET=1 is not set")


def bits(given, backend):
    out, grad = ours(given, backend)
    return [out.loss, out.logps, out.ref_logps, out.rewards, out.kl, out.token_logps, grad]


def same(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Triton's interpreter ─────────────────────────────────────────────────────────────────────────────────────────────────

ACCESSES = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")


class Interleaving:
    """Runs the programs of a launch on a thread each, one at a time: before each access to memory the next is drawn."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.switches = 0

    def run(self, builder, programs: int, body) -> None:
        import numpy

        self.builder, self.alive, self.error = builder, list(range(programs)), None
        self.turns = [threading.Semaphore(0) for _ in range(programs)]
        self.mine, done = threading.local(), threading.Semaphore(0)

        def work(index: int) -> None:
            self.mine.index = index
            self._resume(index)
            try:
                with numpy.errstate(all="ignore"):
                    body()
            except Exception as error:
                self.error = error
            self.alive.remove(index)
            (self.turns[self.random.choice(self.alive)] if self.alive else done).release()

        threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(programs)]
        for thread in threads:
            thread.start()
        self.turns[self.random.choice(self.alive)].release()
        done.acquire()
        if self.error is not None:
            raise self.error

    def _resume(self, index: int) -> None:
        self.turns[index].acquire()
        self.builder.grid_idx = (index, 0, 0)

    def switch(self) -> None:
        chosen, own = self.random.choice(self.alive), self.mine.index
        if chosen != own:
            self.switches += 1
            self.turns[chosen].release()
            self._resume(own)


@contextlib.contextmanager
def interleaved(seed: int):
    """Triton's interpreter, but for its loop over the grid."""
    from triton.runtime import interpreter

    builder, interleaving = interpreter.interpreter_builder, Interleaving(seed)

    def launch(self, **arguments):
        known = inspect.getfullargspec(self.fn).args
        arguments = inspect.getcallargs(self.fn, **{k: v for k, v in arguments.items() if k in known})
        scope = interpreter._patch_lang(self.fn)
        try:
            values = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in arguments.items()}
            builder.set_grid_dim(self.grid[0], 1, 1)
            interleaving.run(builder, self.grid[0], lambda: self.fn(**values))
        finally:
            scope.restore()

    def access(original):
        def switching(*args, **kwargs):
            interleaving.switch()
            return original(*args, **kwargs)

        return switching

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", launch))
        for name in ACCESSES:
            stack.enter_context(mock.patch.object(builder, name, access(getattr(builder, name))))
        yield interleaving


@interpreted
@pytest.mark.parametrize("processors", [1, 64], ids=["whole rows", "split rows"])
@pytest.mark.parametrize("options", [{}, {"packed": True, "average_log_prob": True}], ids=["padded", "packed"])
def test_programs_interleaved_at_every_access(options, processors, monkeypatch, poisoned_memory):
    """A program that raised its counter before its result was there would be found out."""
    monkeypatch.setattr(gpu, "processors", lambda device: processors)
    given = problem(2, 2, 5000, kl_batch=2, kl_tokens=1, **options)
    expected = bits(given, "triton")
    for seed in range(5):
        with interleaved(seed) as interleaving:
            assert same(bits(given, "triton"), expected)
        assert interleaving.switches > 50


@interpreted
@pytest.mark.parametrize("seeds", [range(10), pytest.param(range(10, 20), marks=pytest.mark.wide)], ids=["10", "20"])
def test_many_tiny_grids_interleaved(seeds, poisoned_memory):
    """One program, a few, none; the counters are zero after each, or the next would go wrong."""
    switches = 0
    for seed in seeds:
        torch.manual_seed(seed)
        shape = random.Random(seed)
        batch, tokens, vocab = shape.randrange(4), shape.randrange(4), shape.choice([1, 2, 7, 40])
        options = {"packed": bool(batch and seed % 2), "reduction": shape.choice(["mean", "sum", "none"])}
        given = problem(batch, tokens, vocab, kl_batch=shape.randrange(1, 3), kl_tokens=shape.randrange(3), **options)
        expected = bits(given, "triton")
        with interleaved(seed) as interleaving:
            assert same(bits(given, "triton"), expected), (seed, batch, tokens, vocab, options)
        switches += interleaving.switches
    assert switches > 250


# The CUDA kernels' emulation ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(cuda._emulation is None, reason="KTO_KERNELS_CUDA_EMULATE=1 is not set, or not built")
def test_many_grids_in_any_order_of_blocks_and_threads(monkeypatch, poisoned_memory):
    monkeypatch.setattr(gpu, "processors", lambda _: 64)
    try:
        for seed in range(1, 301):
            shape = random.Random(seed)
            splits = shape.choice([1, 2, 5])
            monkeypatch.setattr(cuda, "row_splits", lambda *_, splits=splits: splits)
            options = {"average_log_prob": shape.random() < 0.5, "shift": shape.random() < 0.5}
            given = problem(shape.randrange(1, 4), shape.randrange(1, 5), shape.choice([1, 9, 130, 700]), **options)
            cuda._emulation.set_order(0)
            expected = bits(given, "cuda")
            cuda._emulation.set_order(seed)
            assert same(bits(given, "cuda"), expected), (seed, splits, options)
    finally:
        cuda._emulation.set_order(0)


# Load ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_hundreds_of_runs_beside_others_on_the_cpu():
    """More threads than cores, PyTorch's operators among them."""
    given = problem(batch=3, tokens=30, vocab=4001, shift=True)
    expected = bits(given, "cpu")
    stop = threading.Event()

    def load() -> None:
        a = torch.randn(200, 200)
        while not stop.is_set():
            a @ a

    others = [threading.Thread(target=load) for _ in range(2)]
    for thread in others:
        thread.start()
    before = torch.get_num_threads()
    try:
        for i in range(200):
            torch.set_num_threads(1 + i % 5)
            assert same(bits(given, "cpu"), expected), i
    finally:
        torch.set_num_threads(before)
        stop.set()
        for thread in others:
            thread.join()


@pytest.mark.gpu
@pytest.mark.parametrize("place", [p for p in kernel_places.args[1] if p.values[0][1] == "cuda"])
@pytest.mark.parametrize(
    ("batch", "tokens", "vocab"), [(1, 1, 128_256), (8, 64, 50_257), (64, 3, 1000)], ids=["split", "whole", "tiny"]
)
def test_a_thousand_runs_under_load_on_a_gpu(batch, tokens, vocab, place):
    given = problem(batch, tokens, vocab, ref="logps", kl="logps", ref_kl="logps").to(torch.bfloat16, "cuda")
    expected = bits(given, place[0])
    a, stream = torch.randn(1024, 1024, device="cuda"), torch.cuda.Stream()
    for i in range(1000):
        with torch.cuda.stream(stream):
            a @ a
        assert same(bits(given, place[0]), expected), i
