"""How things are measured: interleaved repetitions for time, peak above the inputs for memory."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .environment import ROOT

SEQUENCES = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Timed:
    """`run(setup())` is what is timed, without the setup."""

    setup: Callable[[], object]
    run: Callable[[object], object]


def interleaved(runs: dict[str, Timed], repeats: int, clock: Callable[[Callable], float], tick: Callable) -> dict:
    """Times each in turn, A B C A B C …, so that all see the same drift of the machine. One round is a warm-up.

    Returns name → {"low", "median", "high"} in seconds; low and high are the quartiles.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-1, repeats):
        for name, timed in runs.items():
            argument = timed.setup()
            elapsed = clock(lambda timed=timed, argument=argument: timed.run(argument))
            del argument
            if repeat >= 0:
                seconds[name].append(elapsed)
        tick()
    return {
        name: dict(zip(("low", "median", "high"), statistics.quantiles(values, n=4)))
        for name, values in seconds.items()
    }


def cpu_clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


class CudaClock:
    """Seconds on the device between two events. Overwriting a buffer larger than the L2 cache first empties the cache
    and keeps the device busy while Python gets the launches ready."""

    def __init__(self, runway: int = 4) -> None:
        self.flush = torch.empty(2**30, dtype=torch.int8, device="cuda")
        self.runway = runway

    def __call__(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(self.runway):
            self.flush.zero_()
        start.record()
        result = run()
        end.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end) / 1e3


def clock_of(device: str) -> Callable[[Callable], float]:
    return cpu_clock if device == "cpu" else CudaClock()


def in_fresh_process(module: str, *arguments: str) -> dict | int:
    """Runs `python -m module arguments` and reads the JSON value that it prints last."""
    run = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def peak_extra_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """Highest memory while `run` runs, above that at its start: resident on the CPU (Linux: the high-water mark is
    reset first; run it in a fresh process), allocated on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc: what is free but still resident goes back first,
    if trim is not None:  # or taking it again would cost nothing
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    result = run()
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    del result
    return max(0, peak - before)
