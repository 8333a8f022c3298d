"""Choices that follow from the release or the build of PyTorch. They all stand here, and each is tested with stubs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor

# How a product of 16-bit factors is added to an fp32 sum.
Addition: TypeAlias = Literal["addmm", "baddbmm", "parts"]


def addition(device: torch.device) -> Addition:
    """How a product of 16-bit factors is added to an fp32 sum on `device`.

    Returns:
        "addmm", `torch.addmm(out_dtype=)` into the sum, from PyTorch 2.10 on. "baddbmm" before, development versions of
        2.10 included, which may lack it: there addmm wants the
        sum in the dtype of the factors, while `torch.baddbmm(out_dtype=, out=)` takes an fp32 `out` and adds to what it
        holds. "parts", where the device has no such GEMM: a ROCm build, whose tensors also say `is_cuda`, refuses fp32
        results of 16-bit factors, and other devices lack the overloads.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return "parts"
    return "addmm" if torch.__version__ >= (2, 10) else "baddbmm"


def positions(mask: Tensor, count: int) -> Tensor:
    """The (count,) int64 positions at which the (N,) mask is True, without waiting for the device. Where the mask has
    fewer, the rest is 0. PyTorch 2.8 fails on an empty CUDA tensor, so that nothing is launched for no position."""
    if count == 0 or len(mask) == 0:
        return torch.zeros(count, dtype=torch.int64, device=mask.device)
    return torch.nonzero_static(mask, size=count, fill_value=0).squeeze(-1)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Autograd records here, in the body of an operator too: PyTorch runs that body with the autograd keys excluded
    from dispatch, and has no public way to take them back."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
