"""The loss from logits, each way behind one signature: `loss_of(batch, logits) → 0-d loss`, differentiable.

What surrounds the token log-probabilities is the same for all: sequence sums, the KTO formula, the mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kto_kernels import available_backends, kto_loss

BETA, KL = 0.1, 0.05


@dataclass
class Batch:
    logits: Tensor  # (4, N / 4, V)
    labels: Tensor  # (4, N / 4)
    desirable: Tensor  # (4,)
    ref_logps: Tensor  # (4,)


LossOf = Callable[[Batch, Tensor], Tensor]
NAIVE = "naive PyTorch"


def kto_from_token_logps(token_logps: Tensor, ref_logps: Tensor, desirable: Tensor) -> Tensor:
    """What trainers write after the seam."""
    margin = BETA * (token_logps.float().sum(-1) - ref_logps - KL)
    return (1 - torch.sigmoid(torch.where(desirable, margin, -margin))).mean().float()


def naive_token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _from_token_logps(token_logps_of: Callable[[Tensor, Tensor], Tensor | tuple]) -> LossOf:
    def loss_of(batch: Batch, logits: Tensor) -> Tensor:
        logps = token_logps_of(logits, batch.labels)
        return kto_from_token_logps(logps[0] if isinstance(logps, tuple) else logps, batch.ref_logps, batch.desirable)

    return loss_of


naive = _from_token_logps(naive_token_logps)


def ours(backend: str, inplace: bool = False) -> LossOf:
    def loss_of(batch: Batch, logits: Tensor) -> Tensor:
        return kto_loss(
            logits,
            batch.labels,
            batch.desirable,
            ref_logps=batch.ref_logps,
            kl=KL,
            beta=BETA,
            inplace_backward=inplace,
            backend=backend,
        ).loss

    return loss_of


def _trl(name: str) -> LossOf:
    from trl.trainer import utils

    return _from_token_logps(getattr(utils, name))


def present(makers: dict[str, Callable[[], Callable]]) -> dict[str, Callable | str]:
    """Name → what its maker makes, or why it is absent."""
    found: dict[str, Callable | str] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except (ImportError, AttributeError) as error:
            found[name] = f"absent: {error}"
    return found


def peers(device: str) -> dict[str, LossOf | str]:
    """Name → how it computes the loss, or why it is absent."""
    found: dict[str, LossOf | str] = {NAIVE: naive}
    if device == "cpu":
        return found
    found["torch.compile of naive"] = torch.compile(naive)
    names = ("selective_log_softmax", "selective_log_softmax_and_entropy")
    return found | present({f"TRL {name}": functools.partial(_trl, name) for name in names})


def backends(device: str) -> list[str]:
    """Ours that are worth timing on a device: those that run there, but plain PyTorch and what only emulates a GPU."""
    slow = {"torch"} | ({"triton", "cuda"} if device == "cpu" else set())
    return [name for name, reason in available_backends(device).items() if reason is None and name not in slow]
