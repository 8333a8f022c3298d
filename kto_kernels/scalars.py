"""Numbers that torch.compile has found to change from call to call. They are passed to operators as data, in tensors,
and not as constants of a graph: as a constant, each value would take a graph of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def data(number: float | Tensor) -> float | Tensor:
    """A number for arithmetic on tensors: a () fp64 tensor on the CPU where torch.compile has found that the number
    changes from call to call, else the number as it is."""
    if isinstance(number, Tensor) or not torch.compiler.is_compiling():
        return number
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy, as the compiler has done

    if has_static_value(number):
        return number
    return torch.ones((), dtype=torch.float64, device="cpu") * number


def as_tensor(numbers: Sequence[float | Tensor]) -> Tensor | None:
    """The numbers as one fp64 tensor on the CPU where at least one is data; None where all are constants."""
    values = [data(number) for number in numbers]
    if not any(isinstance(value, Tensor) for value in values):
        return None
    ones = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([ones * value for value in values])
