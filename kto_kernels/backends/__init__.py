"""The backends, and the choice among them. There is no silent fallback: `auto` logs which backend it takes and why, and
a backend asked for by name either runs or raises an error that says why it cannot."""

from __future__ import annotations

import functools
import logging

import torch

from .base import Backend
from .cpu import CpuBackend
from .cuda import CudaBackend
from .pytorch import TorchBackend
from .triton import TritonBackend

logger: logging.Logger = logging.getLogger("kto_kernels")

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (TritonBackend(), CudaBackend(), CpuBackend(), TorchBackend())
}

# For each device type, the order in which `auto` tries the backends: it takes the first that can run.
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "torch"), "cuda": ("triton", "cuda", "torch")}
NAMES = ("auto", *BACKENDS)


def available_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Which backends run on a device, and why the others do not.

    Args:
        device: the device, or its name. The default asks about the CPU.

    Returns:
        The name of each backend, with None where it runs on `device`, else the reason why it does not.
    """
    return {name: backend.unavailable(torch.device(device)) for name, backend in BACKENDS.items()}


def select(name: str, device: torch.device, dtype: torch.dtype, argument: str = "logits") -> Backend:
    """The backend called `name`, or for `"auto"` the first of the device's preference that takes `dtype`.

    Raises:
        RuntimeError: the backend called `name` cannot run on `device`.
        TypeError: that backend does not take `dtype`, the dtype of the argument called `argument`.
    """
    if name == "auto":
        return _automatic(device.type, dtype)
    backend = BACKENDS[name]
    reason = backend.unavailable(device)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} is not available: {reason}")
    if dtype not in backend.dtypes:
        raise TypeError(f"{argument}: backend={name!r} takes {_names(backend.dtypes)}, got {_names([dtype])}")
    return backend


@functools.cache
def _automatic(device_type: str, dtype: torch.dtype) -> Backend:
    device, passed_over = torch.device(device_type), []
    for name in PREFERENCE.get(device_type, ("torch",)):
        backend = BACKENDS[name]
        reason = backend.unavailable(device)
        if reason is None and dtype not in backend.dtypes:
            reason = f"it does not take {_names([dtype])}"
        if reason is None:
            # A warning where PyTorch's operators take the place of kernels that take this dtype but cannot run.
            others = [BACKENDS[other] for other, _ in passed_over]
            slow = name == "torch" and any(dtype in other.dtypes and other.unavailable(device) for other in others)
            logger.log(
                logging.WARNING if slow else logging.INFO,
                "backend=%r for %s logits on %s%s",
                name,
                _names([dtype]),
                device_type,
                "".join(f"; not {other!r}: {why}" for other, why in passed_over),
            )
            return backend
        passed_over.append((name, reason))
    raise AssertionError("the torch backend runs everywhere")


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
