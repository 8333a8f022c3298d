"""A loss of `kto_kernels.objectives` in a call: which sequences it compares, and the losses that it makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import scalars
from .objectives import Paired, Scored, Unpaired
from .parallel.groups import group_size, sum_over_ranks


@dataclass(frozen=True)
class Preference:
    """A loss in a call of `preference_loss`, with the order of its pairs."""

    objective: Unpaired | Paired
    pairs: str

    @property
    def options(self) -> dict[str, object]:
        """What all ranks of a group must share."""
        numbers = {name: value for name, value in vars(self.objective).items() if not isinstance(value, Tensor)}
        return {"objective": type(self.objective).__name__, "pairs": self.pairs} | {
            f"objective.{name}": value for name, value in numbers.items()
        }

    def losses(
        self,
        logps: Tensor,  # (B,), means with `average`
        ref_logps: Tensor | None,  # (B,), means with `average`
        lengths: Tensor,  # (B,)
        z0: Tensor,  # ()
        desirable: Tensor,  # (B,) bool
        average: bool,
        process_group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        """Stages 4 and 5 up to the reduction: the losses (B,), or (B / 2,) of pairs, and the detached rewards (B,)."""
        objective, scored = self.objective, Scored(logps.double(), ref_logps, lengths)
        if isinstance(objective, Paired):
            losses = objective.loss(*[scored.select(which) for which in members(len(logps), self.pairs)])
        else:
            losses = objective.loss(scored, desirable, z0)
        if objective.nll_weight > 0:
            sums = scored.logps * lengths if average else scored.logps
            count = sum_over_ranks(torch.where(desirable, lengths, 0.0).sum(), process_group) / group_size(
                process_group
            )
            nll = -torch.where(desirable, sums, 0.0).sum() / torch.where(count == 0, 1.0, count)
            losses = losses + scalars.data(objective.nll_weight) * nll
        return losses, objective.rewards(scored).detach()


def members(count: int, pairs: str) -> tuple[slice, slice]:
    """The chosen and the rejected ones of `count` sequences."""
    if pairs == "halves":
        return slice(0, count // 2), slice(count // 2, count)
    return slice(0, count, 2), slice(1, count, 2)
