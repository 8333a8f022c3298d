"""A process in which Triton compiles: tests have its interpreter on, which cannot be turned off once Triton is there.

This module imports neither the package nor Triton, as its functions run before they may be imported."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

_launches: dict[tuple[str, int], Any] = {}  # in the process, which compiles each kernel once


def _start() -> None:
    import torch

    torch.set_num_threads(1)


def started(processes: int = 1) -> ProcessPoolExecutor:
    environment = {"TRITON_INTERPRET": "0", "KTO_KERNELS_CUDA_EMULATE": "0"}
    context = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, environment):
        pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start)
        for started in [pool.submit(int) for _ in range(processes)]:  # they start at the first calls
            started.result()
    return pool


@functools.cache
def _shared() -> ProcessPoolExecutor:
    return started()


def run(function: Callable, *arguments: Any) -> Any:
    """Calls a function there, in the one process that the tests of this process share."""
    return _shared().submit(function, *arguments).result()


def check(backend: str, arch: int, name: str, seeds: range) -> dict[str, int]:
    """In the process: runs the problem of this name in problems.py, with each seed. Returns what was counted."""
    from . import problems

    if (backend, arch) not in _launches:
        _launches[backend, arch] = problems.target(backend, arch)
    launches = _launches[backend, arch]
    before = launches.machine.counts()
    for seed in seeds:
        problems.run(launches, backend, problems.PROBLEMS[name], seed)
    return {name: value - before[name] for name, value in launches.machine.counts().items()}
