"""Thousands of random problems: python -m tests.support.ptx [--backend triton] [--arch 90] [--cases 1000] [--seed 1]

A case that fails is printed with its number, and `--case NUMBER` of the same seed runs it alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time

from . import build, process
from .exploration import TOGETHER, explore

TARGETS = (("triton", 90), ("triton", 80), ("cuda", 90))


def absent(backend: str) -> str | None:
    """Why a backend's kernels cannot be compiled here."""
    if backend == "cuda":
        return None if build.nvcc() else "nvcc is not there"
    return None if importlib.util.find_spec("triton") else "Triton is not there"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.ptx")
    parser.add_argument("--backend", choices=["triton", "cuda"])
    parser.add_argument("--arch", type=int)
    parser.add_argument("--cases", type=int, default=1000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=None, help="of all cases (default: another one each time)")
    parser.add_argument("--case", type=int, default=None, help="this one alone")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    seed = int(time.time()) % 1_000_000 if given.seed is None else given.seed
    chosen = [(b, a) for b, a in TARGETS if given.backend in (None, b) and given.arch in (None, a)]
    print(f"seed {seed}")
    parts, size = [], TOGETHER * 4
    for i, (backend, arch) in enumerate(chosen):
        if reason := absent(backend):
            print(f"{backend} sm_{arch}: skipped, {reason}")
        elif given.case is not None:
            parts.append((backend, arch, range(given.case, given.case + 1)))
        else:
            ends = range(given.cases * i // len(chosen), given.cases * (i + 1) // len(chosen))
            parts += [(backend, arch, ends[at : at + size]) for at in range(0, len(ends), size)]
    executed = failures = 0
    with process.started(given.processes) as pool:
        for part, done in [(part, pool.submit(explore, *part, seed)) for part in parts]:
            counts, failed = done.result()
            print("\n".join([counts, *failed]), flush=True)
            executed += len(part[-1])
            failures += len(failed)
    print(f"{executed} executed, {failures} failed")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
