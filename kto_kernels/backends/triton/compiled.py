"""The launch of a kernel that is compiled already, without Triton's own search for what was compiled.

That search looks at every argument and takes longer than the launch itself. The kernels are not specialised on run-time
values and every number among their parameters has a type (`row.kernel`), so that little decides which machine code runs:
the device, the dtypes of tensors, which tensors are absent, and the constants.
"""

from __future__ import annotations

import logging
from operator import itemgetter
from typing import Any

import torch

# Triton's releases [first, last) whose compiled kernels are known to be launched as here.
KNOWN = ((3, 4), (3, 10))

_log = logging.getLogger("kto_kernels")


def known(version: str) -> bool:
    """Whether this release of Triton is one of `KNOWN`. If not, the log says that launches go Triton's own way."""
    major, minor = version.split(".")[:2]
    found = KNOWN[0] <= (int(major), int(minor)) < KNOWN[1]
    if not found:
        _log.info("Triton %s: launches are searched for by Triton, which takes longer than up to 3.9 here", version)
    return found


class Launcher:
    """The launches of one kernel of Triton."""

    def __init__(self, kernel: Any, known: bool) -> None:
        self.kernel = kernel
        self.known = known
        parameters = kernel.params
        constants = [p.name for p in parameters if p.is_constexpr]
        tensors = [p.name for p in parameters if not p.is_constexpr and not p.annotation_type]
        self._values = itemgetter(*[p.name for p in parameters])
        self._constants, self._tensors = itemgetter(*constants), itemgetter(*tensors)
        self._compiled: dict[tuple, Any] = {}

    def __call__(self, device: torch.device, programs: int, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        """Launches on the current stream of `device`, which is the current device.

        Args:
            device: the device, with an index.
            programs: how many programs to launch.
            arguments: the values of the kernel's parameters by name.
            options: the compiler's options, which follow from device and constants.
        """
        dtypes = [None if tensor is None else tensor.dtype for tensor in self._tensors(arguments)]
        key = (device, *dtypes, self._constants(arguments))
        compiled = self._compiled.get(key)
        if compiled is not None and not self.kernel.pre_run_hooks:
            compiled[(programs, 1, 1)](*self._values(arguments))
            return
        compiled = self.kernel[(programs,)](**arguments, **options)
        if self.known:
            self._compiled[key] = compiled
