"""The problems that run the kernels: those of every commit (PROBLEMS), and random ones (`drawn`)."""

from __future__ import annotations

import torch

from kto_kernels.backends import BACKENDS
from kto_kernels.options import OUTPUTS

from .draws import Draw
from .losses import Loss
from .machine import Machine
from .operators import DTYPES, Chunk, Factor, Far, Shards, Tokens
from .sequences import Sequences

INT32 = torch.int32
# Each choice that the kernels make when they are compiled, at least once, for every dtype.
PROBLEMS = {
    f"{name}, {str(dtype).removeprefix('torch.')}": kind(dtype, **options)
    for dtype in DTYPES
    for name, kind, options in (
        ("tokens", Tokens, {}),
        ("tokens, packed, shift, softcap", Tokens, {"packed": True, "shift": True, "softcap": True}),
        ("tokens, shift, int32", Tokens, {"shift": True, "index_dtype": INT32}),
        ("tokens, packed, int32", Tokens, {"packed": True, "index_dtype": INT32}),
        ("loss", Loss, {}),
        ("loss, softcap", Loss, {"softcap": True, "shift": True, "average": True, "reduction": "sum"}),
        ("loss, reference-free", Loss, {"ref": None, "kl": "number", "ref_kl": None, "packed": True}),
        ("loss, KL tensor", Loss, {"ref": "logps", "kl": "tensor", "ref_kl": None, "reduction": "none"}),
        ("loss, KL alone", Loss, {"ref": None, "ref_kl": None, "shift": True, "average": True}),
        ("loss, log-probs", Loss, {"ref": "logps", "kl": "logps", "ref_kl": "logps", "index_dtype": INT32}),
        ("loss, long", Loss, {"packed": True, "shift": True, "average": True, "shape": "long", "index_dtype": INT32}),
        ("loss, many", Loss, {"kl": "logps", "ref_kl": "logits", "shape": "many", "given_dtype": torch.float64}),
        ("chunk, scores", Chunk, {"gradient": False}),
        ("chunk", Chunk, {}),
        ("chunk, outputs", Chunk, {"outputs": OUTPUTS}),
        ("chunk, outputs, softcap", Chunk, {"outputs": OUTPUTS, "softcap": True}),
        ("shards", Shards, {"outputs": OUTPUTS}),
        ("sequences", Sequences, {}),
        ("sequences, average, divisor", Sequences, {"average": True, "divisor": True, "shape": "long"}),
        ("sequences, given", Sequences, {"given": True, "average": True, "divisor": True, "reduction": "sum"}),
        ("sequences, many", Sequences, {"divisor": True, "shape": "many", "reduction": "none"}),
        ("factor", Factor, {}),
        ("factor, fp64", Factor, {"factor_dtype": torch.float64}),
    )
} | {"far, bfloat16": Far(torch.bfloat16)}
KINDS = (Loss, Loss, Tokens, Chunk, Shards, Loss, Tokens, Chunk, Factor, Sequences)
PROCESSORS = (64, 4, 1)  # rows split as far as they can be, a little, not at all


def target(backend: str, arch: int, rewrite=None):
    """The launches of a backend, on a machine of their own."""
    if backend == "triton":
        from .on_triton import TritonLaunches

        return TritonLaunches(Machine(), arch, rewrite)
    from .on_cuda import CudaLaunches

    return CudaLaunches(Machine(), arch, rewrite)


def run(launches, backend: str, problem, seed: int) -> None:
    """Draws the problem's tensors by the seed and runs it. A fault, or a result that is not right, raises
    AssertionError."""
    draw = Draw(seed)
    launches.install()
    launches.processors, launches.fused = PROCESSORS[seed % len(PROCESSORS)], seed % 2 == 1
    launches.machine.seed, launches.machine.approximate = 1000 * seed, seed + 1
    problem.run(draw, BACKENDS[backend])


def drawn(number: int):
    """The random problem of this number: what is compiled in."""
    return KINDS[number % len(KINDS)].drawn(Draw(number))
