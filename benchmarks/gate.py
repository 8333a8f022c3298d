"""The gate in front of every benchmark: loss and gradients against fp64, ours held to naive PyTorch's errors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kto_kernels import reference

from .peers import BETA, KL, NAIVE


def true_loss_and_slopes(log_ratios: Tensor, desirable: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss, and its derivative with respect to each sequence's log-ratio (B,), in fp64."""
    z0 = torch.tensor(KL, dtype=torch.float64, device=log_ratios.device)
    arguments = (log_ratios, z0, desirable, BETA, (1.0, 1.0))
    return reference.loss(*arguments).mean(), reference.loss_slope(*arguments) / len(log_ratios)


def hold(errors: dict[str, dict[str, float]], mine: Iterable[str], slack: float = 1.001) -> None:
    """Stops the run where an error of one of `mine` is larger than naive PyTorch's times `slack`."""
    for name in mine:
        for what, error in errors[name].items():
            # The loss is one number: by luck naive PyTorch may hit it.
            allowed = slack * errors[NAIVE][what] + (torch.finfo(torch.float32).eps if what == "loss" else 0.0)
            if not error <= allowed:
                raise SystemExit(f"gate: {name}, {what}: error {error:.3e} > {allowed:.3e}; nothing was timed")
