"""`python -m kto_kernels`: versions, devices, backends, and the reason for each backend that is missing;
then `kto_kernels.selftest`, whose failure is the exit status."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from . import __version__
from .backends import BACKENDS, PREFERENCE, available_backends, cpu
from .selftest import self_test


def report() -> str:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    lines = [
        f"kto_kernels {__version__}",
        f"python {platform.python_version()} on {platform.platform()}",
        f"torch {torch.__version__}, triton {version('triton')}",
        f"cpu: {os.cpu_count()} logical processors, torch uses {torch.get_num_threads()} threads",
    ]
    if cpu.instruction_sets():
        lines[-1] += f"; instruction sets {', '.join(cpu.instruction_sets())}, in use {cpu.instruction_set()}"
        lines.append(f"cpu: the C++ kernels run on {cpu.thread_team()}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines.append(f"cuda:{index}: {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    else:
        lines.append("cuda: no device")
    for device in devices:
        reasons = available_backends(device)
        chosen = next(name for name in PREFERENCE[device] if reasons[name] is None)
        lines.append(f"backends on {device} (auto: {chosen})")
        lines += [f"  {name}: {'available' if reasons[name] is None else reasons[name]}" for name in BACKENDS]
    return "\n".join(lines)


def main() -> int:
    print(report(), flush=True)
    passed, line = self_test()
    print(line)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
