"""How things are measured: interleaved repetitions for time, a fresh process for memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .environment import ROOT


def interleaved(runs: dict[str, tuple[Callable[[], object], Callable[[object], object]]], repeats: int, tick) -> dict:
    """Times `run(setup())` for each name in turn, A B C A B C …, so that all see the same drift of the machine.

    Returns name → {"median", "low", "high"} in seconds; low and high are the quartiles. One round is a warm-up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-1, repeats):
        for name, (setup, run) in runs.items():
            argument = setup()
            start = time.perf_counter()
            result = run(argument)
            elapsed = time.perf_counter() - start
            del result, argument
            if repeat >= 0:
                seconds[name].append(elapsed)
        tick()
    return {
        name: dict(zip(("low", "median", "high"), statistics.quantiles(values, n=4)))
        for name, values in seconds.items()
    }


def in_fresh_process(module: str, *arguments: str) -> dict:
    """Runs `python -m module arguments` and reads the JSON object it prints."""
    run = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """Highest resident memory while `run` runs, above that at its start. Linux: the high-water mark is reset first."""
    Path("/proc/self/clear_refs").write_text("5")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    result = run()
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    del result
    return max(0, peak - before)
