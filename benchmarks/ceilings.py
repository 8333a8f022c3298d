"""`python -m benchmarks ceilings`: what the device can do at best, which every other figure is held against.

Copying and reading go over buffers larger than any cache, GEMMs over square matrices. Every other command measures these
too, in its own run.
"""

from __future__ import annotations

import torch

from .measure import DTYPES, Timed, clock_of, interleaved

BYTES = {"cpu": 2**28, "cuda": 2**32}  # of the buffer that is read or copied
SIZE = {"cpu": 2048, "cuda": 8192}  # of the matrices
GEMM_DTYPES = ("fp32", "bf16")
REPEATS = 7
COPY, READ, GEMM = "copy bytes/s", "read bytes/s", "gemm flop/s"


def measure(device: str, quick: bool = False, dtypes: tuple[str, ...] = GEMM_DTYPES, edge: int | None = None) -> dict:
    """{COPY: bytes read and written a second, READ: bytes/s, GEMM: {dtype: FLOP/s}, "seconds": the times behind them}."""
    size = 2**22 if quick else BYTES[device]
    edge = edge or (256 if quick else SIZE[device])
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    runs = {
        COPY: Timed(lambda: None, lambda _: target.copy_(source)),
        READ: Timed(lambda: None, lambda _: source.sum()),
    }
    for dtype in dtypes:
        a, b, c = torch.randn(3, edge, edge, device=device).to(DTYPES[dtype]).unbind()
        runs[f"{GEMM}, {dtype}"] = Timed(lambda: None, lambda _, a=a, b=b, c=c: torch.mm(a, b, out=c))
    seconds = interleaved(runs, REPEATS, clock_of(device), lambda: None)
    median = {name: times["median"] for name, times in seconds.items()}
    return {
        COPY: 2 * size / median[COPY],
        READ: size / median[READ],
        GEMM: {dtype: 2 * edge**3 / median[f"{GEMM}, {dtype}"] for dtype in dtypes},
        "gemm size": edge,
        "repeats": REPEATS,
        "seconds": seconds,
    }
