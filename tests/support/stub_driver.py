"""Launches of Triton's kernels without a GPU: Triton compiles them for an H100, and in the place of CUDA's driver stands
one that notes what it is given. Run in a process without Triton's interpreter."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import mangle_type

from benchmarks import inspect
from kto_kernels.backends.triton import launch as launchers
from kto_kernels.backends.triton.compiled import Launcher


class Noted:
    """The launches: (code, grid, arguments) each. The code is that of the kernel which the driver was told to run."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, tuple, tuple]] = []
        self.loaded: list[bytes] = []

    # What Triton asks a driver for ────────────────────────────────────────────────────────────────────────────────────

    device = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any):
        def run(x, y, z, stream, function, packed, launch_metadata, enter, exit_, *arguments):
            self.launches.append((function, (x, y, z), arguments))

        return run

    @property
    def utils(self) -> Noted:
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20}

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.loaded.append(code)
        return 1, len(self.loaded), 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


@contextlib.contextmanager
def stubbed() -> Iterator[Noted]:
    """A driver for the rest of this process, which has no other."""
    noted = Noted()
    triton.runtime.driver.set_active(noted)
    with (
        mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
        mock.patch.object(launchers, "_options", lambda device, threads: launchers.options(False, 32, threads)),
    ):
        yield noted


def launches(which: str = "float16") -> dict[str, Any]:
    """Every variant whose name has `which` in it, each launched by Triton's way and three times by ours, in turns with the
    others. Returns how many launches ran another machine code or had other arguments, and the least µs of each way."""
    wrong, least = 0, {"Triton's": float("inf"), "ours": float("inf")}
    variants = [case for case in inspect.variants() if which in case[0]]
    with stubbed() as noted:
        expected = []
        for _, kernel, arguments in variants:
            kernel[(7,)](**arguments, **launchers.options(False, 32, arguments["THREADS"]))
            expected.append(noted.launches[-1])
        for turn in range(3):
            for (_, kernel, arguments), right in zip(variants, expected):
                launchers._launch(kernel, torch.device("cuda", 0), 7 + turn, arguments)
                code, grid, given = noted.launches[-1]
                same = len(given) == len(right[2]) and all(a is b or a == b for a, b in zip(given, right[2]))
                wrong += not (code == right[0] and grid == (7 + turn, 1, 1) and same)
        _, kernel, arguments = max(variants, key=lambda case: len(case[2]))
        options = launchers.options(False, 32, arguments["THREADS"])
        ways = {
            "Triton's": lambda: kernel[(7,)](**arguments, **options),
            "ours": lambda: launchers._launch(kernel, torch.device("cuda", 0), 7, arguments),
        }
        for name, way in ways.items():
            for _ in range(2000):
                start = time.perf_counter()
                way()
                least[name] = min(least[name], time.perf_counter() - start)
    return {
        "variants": len(variants),
        "codes": len({code for code, *_ in expected}),
        "wrong": wrong,
        "arguments": len(arguments),
        "microseconds": {name: round(seconds * 1e6, 1) for name, seconds in least.items()},
    }


class Uncompiled:
    """Stands for a kernel: it says what Triton would compile for some arguments, and notes what ran instead."""

    def __init__(self, kernel: Any) -> None:
        self.params, self.pre_run_hooks = kernel.params, []
        self.device = 0  # the current one
        self.ran: tuple | None = None
        self.compilations = 0

    def code(self, arguments: dict[str, Any]) -> tuple:
        """What decides the machine code: the device, the constants, and the type of every other argument."""
        types = (
            arguments[p.name] if p.is_constexpr else p.annotation_type or mangle_type(arguments[p.name])
            for p in self.params
        )
        return self.device, *types

    def __getitem__(self, grid: tuple[int]):
        def run(**given):
            arguments = {p.name: given[p.name] for p in self.params}
            self.compilations += 1
            compiled = Compiled(self, self.code(arguments))
            compiled[(*grid, 1, 1)](*arguments.values())
            return compiled

        return run


@dataclass
class Compiled:
    kernel: Uncompiled
    code: tuple

    def __getitem__(self, grid: tuple[int, int, int]):
        def run(*arguments):
            self.kernel.ran = (self.code, grid, arguments)

        return run


def others(value: Any) -> list[Any]:
    """Values that an argument may have instead."""
    if isinstance(value, torch.Tensor):
        return [value.clone(), value.to(torch.float64 if value.dtype == torch.float32 else torch.float32), None]
    if isinstance(value, (bool, str)):
        return [not value] if isinstance(value, bool) else ["another"]
    return [torch.zeros(2)] if value is None else [value + 1, value + 2**20]


def changes() -> dict[str, int]:
    """After a first launch every argument of every variant is changed, one at a time. Returns how many launches there were,
    and how many ran code that Triton would not have chosen, or with other arguments."""
    count = wrong = compilations = 0
    for _, kernel, arguments in inspect.variants():
        stand_in = Uncompiled(kernel)
        launcher = Launcher(stand_in, known=True)
        for name, value in arguments.items():
            for other in others(value):
                for given in (arguments, arguments | {name: other}, arguments):
                    for device in (torch.device("cuda", 0), torch.device("cuda", 1)):
                        stand_in.device = device.index
                        launcher(device, 5, given, {})
                        values = tuple(given[p.name] for p in kernel.params)
                        code, grid, found = stand_in.ran
                        same = all(a is b for a, b in zip(found, values, strict=True))
                        wrong += not (same and grid == (5, 1, 1) and code == stand_in.code(given))
                        count += 1
        compilations += stand_in.compilations
    return {"launches": count, "wrong": wrong, "compilations": compilations}


if __name__ == "__main__":
    print(json.dumps({"changes": changes(), "launches": launches(*sys.argv[1:])}))
