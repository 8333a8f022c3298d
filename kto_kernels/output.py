"""What a loss returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .distributed import group_size, resolve, sum_over_ranks


@dataclass(frozen=True)
class KTOOutput:
    """What a loss returns. Everything but `loss` is detached.

    Attributes:
        loss: () for `reduction="mean"` and `"sum"`, (B,) for `"none"`; fp32 (fp64 for fp64 logits).
        logps: (B,) fp64, policy log-probability of each sequence in nats (per token with `average_log_prob`).
        ref_logps: (B,) fp64, the reference's; zeros when reference-free.
        rewards: (B,) `β · (logps − ref_logps)`.
        kl: () the reference point z0 in nats, at least 0.
        desirable: (B,) bool, as given.
        token_logps: labels-shaped, the policy's log-probability of each scored token, 0 elsewhere; None from
            `kto_loss_from_logps`.
        entropy, mean_logits, is_top1: labels-shaped, of each scored token, where asked for (`outputs=`); see
            `kto_kernels.reference.outputs`. 0 or False elsewhere.
        scored: labels-shaped bool, the tokens that these are of; and
        cu_seqlens: their packed layout, as given.
        reduction: the loss's, as given.
    """

    loss: Tensor
    logps: Tensor
    ref_logps: Tensor
    rewards: Tensor
    kl: Tensor
    desirable: Tensor
    token_logps: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    scored: Tensor | None = None
    cu_seqlens: Tensor | None = None
    reduction: str = "mean"

    def metrics(self, process_group: Any = None, context_group: Any = None) -> dict[str, float]:
        """Plain floats under TRL's names: `loss` (the mean over sequences under `"none"`), `kl`, and for each class
        that the batch holds `rewards/chosen`, `rewards/rejected`, `logps/chosen`, `logps/rejected`; `rewards/margins`
        where both are there. Where asked for, means over the scored tokens: `entropy`, `logits/chosen`,
        `logits/rejected`, `mean_token_accuracy`. What nothing was counted for has no entry, never a NaN. Waits for the
        device once.

        With a `process_group` (a ProcessGroup, or a one-dimensional DeviceMesh) sums and counts are added over its ranks
        first, by one all-reduce: means over all of their sequences and tokens, however many each has. With the loss's
        `context_group` the means over tokens, where asked for, are over those of all its ranks, by one more."""
        group, context = resolve("process_group", process_group), resolve("context_group", context_group)
        everything = torch.ones_like(self.desirable)
        classes = {"chosen": self.desirable, "rejected": ~self.desirable}
        one = torch.ones((), dtype=torch.float64, device=self.logps.device)
        loss = self.loss.detach().double()
        if self.reduction == "sum":  # adds up over ranks
            loss = (loss, one / group_size(group))
        else:
            sequences = one * self.logps.numel()
            loss = (loss * sequences if self.reduction == "mean" else loss.sum(), sequences)
        # name → (sum, count)
        means = {"loss": loss, "kl": (self.kl.double(), one)}

        def add(name: str, values: Tensor, counts: Tensor, mask: Tensor) -> None:
            means[name] = (torch.where(mask, values.double(), 0.0).sum(), torch.where(mask, counts, 0).sum())

        for side, mask in classes.items():
            add(f"rewards/{side}", self.rewards, everything, mask)
            add(f"logps/{side}", self.logps, everything, mask)
        if self.scored is not None:
            asked = {"tokens": self.scored, "entropy": self.entropy, "top1": self.is_top1, "logits": self.mean_logits}
            asked = {name: values for name, values in asked.items() if values is not None}
            sums = torch.stack([reference.per_sequence(values, self.cu_seqlens) for values in asked.values()])
            of = dict(zip(asked, sum_over_ranks(sums, context), strict=True))
            if "entropy" in of:
                add("entropy", of["entropy"], of["tokens"], everything)
            if "top1" in of:
                add("mean_token_accuracy", of["top1"], of["tokens"], everything)
            if "logits" in of:
                for side, mask in classes.items():
                    add(f"logits/{side}", of["logits"], of["tokens"], mask)
        sums, counts = (torch.stack([pair[k].double() for pair in means.values()]) for k in (0, 1))
        pairs = zip(means, *sum_over_ranks(torch.stack([sums, counts]), group).tolist(), strict=True)
        metrics = {"loss": 0.0} | {name: total / count for name, total, count in pairs if count > 0}
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics
