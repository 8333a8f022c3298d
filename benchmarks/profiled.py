"""`python -m benchmarks launches`: how many kernels each call of `launches` starts on a GPU, as PyTorch's profiler sees them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from kto_kernels.backends.triton import launch

from . import launches


def kernels_of(run: Callable[[], object]) -> tuple[object, dict[str, int]]:
    """What `run` returns, and name → launches of its kernels. Copies are none; memory that is filled counts."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        result = run()
        torch.cuda.synchronize()
    on_device = (event for event in profile.key_averages() if event.device_type.name == "CUDA")
    return result, dict(Counter({e.key: e.count for e in on_device if not e.key.startswith("Memcpy")}))


def measure(device: str = "cuda") -> list[dict]:
    """One dict a call and part, as the rows of `launches.table`: how many of Triton's kernels, and how many others."""
    modules = (launch.kernels, launch.chunk_kernels)
    ours = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    found = []
    for name, call in launches.calls(device).items():
        call().backward()  # compiles, and makes what stays
        loss, forward = kernels_of(call)
        _, backward = kernels_of(loss.backward)
        for part, kernels in (("forward", forward), ("backward", backward)):
            triton = sum(count for key, count in kernels.items() if key in ours)
            others = sum(kernels.values()) - triton
            found.append({"call": name, "part": part, "Triton": triton, "others": others, "kernels": kernels})
    return found


def rows(cases: list[dict]) -> list[list[str]]:
    found = [["call", "part", "Triton", "others"]]
    return found + [[case["call"], case["part"], str(case["Triton"]), str(case["others"])] for case in cases]
