"""How things are measured: interleaved repetitions for time, peak above the inputs for memory."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .environment import ROOT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Timed:
    """`run(setup())` is what is timed, without the setup."""

    setup: Callable[[], object]
    run: Callable[[object], object]


def interleaved(runs: dict[str, Timed], repeats: int, clock: Callable[[Callable], float], tick: Callable) -> dict:
    """Times each in turn, A B C A B C …, so that all see the same drift of the machine. One round is a warm-up.

    Returns name → {"low", "median", "high"} in seconds; low and high are the quartiles. A variant that runs out of memory
    is left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-1, repeats):
        for name in list(seconds):
            timed = runs[name]
            try:
                argument = timed.setup()
                elapsed = clock(lambda timed=timed, argument=argument: timed.run(argument))
            except torch.OutOfMemoryError:
                del seconds[name]
                continue
            finally:
                argument = None
            if repeat >= 0:
                seconds[name].append(elapsed)
        tick()
    return {name: quartiles(values) for name, values in seconds.items()}


def quartiles(values: list[float]) -> dict:
    found = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return dict(zip(("low", "median", "high"), found))


class CpuClock:
    """Wall time, or what `now` says instead. Overwriting a buffer larger than the caches first empties them."""

    now = staticmethod(time.perf_counter)

    def __init__(self, flush: bool = True) -> None:
        self.flush = torch.empty(2**28 if flush else 0, dtype=torch.int8)

    def __call__(self, run: Callable[[], object]) -> float:
        self.flush.zero_()
        start = self.now()
        result = run()
        elapsed = self.now() - start
        del result
        return elapsed


class CudaClock:
    """Seconds on the device between two events. Overwriting a buffer larger than the L2 cache first empties the cache
    and keeps the device busy while Python gets the launches ready."""

    def __init__(self, flush: bool = True) -> None:
        self.flush = torch.empty(2**30 if flush else 0, dtype=torch.int8, device="cuda")

    def __call__(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(4):
            self.flush.zero_()
        start.record()
        result = run()
        end.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end) / 1e3


def clock_of(device: str, flush: bool = True) -> Callable[[Callable], float]:
    return (CpuClock if device == "cpu" else CudaClock)(flush)


def as_graph(timed: Timed) -> Timed:
    """The same launches recorded once as a CUDA graph, of which the replay is timed: for launches so short that Python
    cannot get them ready in time. Every setup must put its data into the same memory.

    Raises:
        RuntimeError: something in it cannot be recorded.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or allocated at the first calls is no part of the graph
        for _ in range(3):
            timed.run(timed.setup())
    torch.cuda.current_stream().wait_stream(side)
    graph, argument = torch.cuda.CUDAGraph(), timed.setup()
    with torch.cuda.graph(graph):
        result = timed.run(argument)
    kept = (argument, result)  # the memory that the graph works on

    def replay(_: object, kept=kept) -> None:
        graph.replay()

    return Timed(timed.setup, replay)


class Failed(Exception):
    """A measurement that could not be made; its text is the reason."""


def reason(error: BaseException) -> str:
    """The words of a results file for an error: its kind where the text does not say it, and the first line."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return "out of memory"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200]


def in_fresh_process(module: str, call: dict, timeout: float | None = None, root: Path = ROOT) -> dict:
    """Runs `python -m module CALL` in the checkout `root`, the call as JSON, and reads the value that it prints last.

    Raises:
        Failed: the process ended otherwise, or took longer than `timeout` seconds.
    """
    command = [sys.executable, "-m", module, json.dumps(call)]
    try:
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Failed(f"over the cap of {timeout:.0f} s") from None
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        killed = f"killed by signal {-run.returncode}: " if run.returncode < 0 else ""
        raise Failed(killed + last[:200])
    return json.loads(run.stdout.splitlines()[-1])


def limit_memory(extra: int) -> None:
    """From here on this process may take `extra` bytes more; beyond that an allocation fails, in place of the machine."""
    status = Path("/proc/self/status").read_text()
    data = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + extra, data + extra))


def available_memory() -> int:
    """Bytes that this machine could still give to a process."""
    info = Path("/proc/meminfo").read_text()
    return next(int(line.split()[1]) * 1024 for line in info.splitlines() if line.startswith("MemAvailable"))


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
