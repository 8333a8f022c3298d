"""The losses that are measured: for each the record whose formula is the truth in fp64, and the formula as trainers write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kto_kernels import objectives
from kto_kernels.objectives import Paired, Unpaired

BETA, KL = 0.1, 0.05


@dataclass(frozen=True)
class Objective:
    record: Unpaired | Paired
    function: str  # of ours, from hidden states
    as_written: Callable[[Tensor, Tensor, Tensor], Tensor]  # token_logps (B, T), ref_logps (B,), desirable (B,) → ()

    @property
    def paired(self) -> bool:
        return isinstance(self.record, Paired)

    @property
    def pairing(self) -> str | None:
        """How the members of a pair depend on each other, as `LinearPlan.of` has it."""
        return self.record.coupling if isinstance(self.record, Paired) else None

    def desirable(self, sequences: int, device: str) -> Tensor:
        """(sequences,) bool. The first half of pairs is chosen, as TRL and Liger have it."""
        index = torch.arange(sequences, device=device)
        return index < sequences // 2 if self.paired else index % 4 != 1

    def loss(self, log_ratios: Tensor, desirable: Tensor) -> Tensor:
        """The mean loss () from the sequences' log-ratios (B,) in fp64, differentiable."""
        scored = objectives.Scored(log_ratios, None, torch.ones_like(log_ratios))  # no loss here knows lengths
        if isinstance(self.record, Paired):
            return self.record.loss(scored.select(desirable), scored.select(~desirable)).mean()
        return self.record.loss(scored, desirable, log_ratios.new_tensor(KL)).mean()


def kto_from_token_logps(token_logps: Tensor, ref_logps: Tensor, desirable: Tensor) -> Tensor:
    """The loss from token log-probabilities, as trainers write it."""
    margin = BETA * (token_logps.float().sum(-1) - ref_logps - KL)
    return (1 - torch.sigmoid(torch.where(desirable, margin, -margin))).mean().float()


def dpo_from_token_logps(token_logps: Tensor, ref_logps: Tensor, _: Tensor) -> Tensor:
    """The same of DPO: the first half of the sequences is chosen."""
    chosen, rejected = (token_logps.float().sum(-1) - ref_logps).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean().float()


KTO, DPO = "kto", "dpo"
OBJECTIVES = {
    KTO: Objective(objectives.KTO(BETA), "linear_kto_loss", kto_from_token_logps),
    DPO: Objective(objectives.DPO(BETA), "linear_preference_loss", dpo_from_token_logps),
}
