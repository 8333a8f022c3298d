"""The backends, and the choice among them. Nothing falls back silently: `auto` logs what it picked and why, and a
backend asked for by name either runs or says why it cannot."""

from __future__ import annotations

import functools
import logging

import torch

from .base import Backend
from .cpu import CpuBackend
from .cuda import CudaBackend
from .pytorch import TorchBackend
from .triton import TritonBackend

logger = logging.getLogger("kto_kernels")

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (TritonBackend(), CudaBackend(), CpuBackend(), TorchBackend())
}

# `auto`, by device type: the first that can run.
PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("triton", "cuda", "torch")}
NAMES = ("auto", *BACKENDS)


def available_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Backend name → None where it runs on `device`, else the reason why it does not."""
    return {name: backend.unavailable(torch.device(device)) for name, backend in BACKENDS.items()}


def select(name: str, device: torch.device, dtype: torch.dtype, argument: str = "logits") -> Backend:
    """The backend called `name`, or for `"auto"` the first of the device's preference that takes `dtype`.

    Raises:
        RuntimeError: a backend named explicitly cannot run on `device`.
        TypeError: it does not take `dtype`, which `argument` has.
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
            # PyTorch's operators in place of kernels that would take these logits, if they were there: a warning.
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
