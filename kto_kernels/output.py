"""The record that a loss returns, and the metrics that trainers log."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .options import Group
from .parallel.groups import group_size, resolve, sum_over_ranks


@dataclass(frozen=True)
class KTOOutput:
    """The results of a loss. All tensors but `loss` are detached.

    Attributes:
        loss: () for `reduction="mean"` and `"sum"`, (B,) for `"none"`, or (B / 2,) of a paired loss; fp32 (fp64 for fp64
            logits).
        logps: (B,) fp64, the policy's sequence log-probabilities in nats (per token with `average_log_prob`).
        ref_logps: (B,) fp64, the reference's sequence log-probabilities in nats; zeros without a reference.
        rewards: (B,), in the dtype of `loss`: `β · (logps − ref_logps)`, without unit; of `preference_loss` those of the
            objective.
        kl: (), in the dtype of `loss`: the reference point z0 in nats, at least 0.
        desirable: (B,) bool, as given; which sequences are chosen where the loss is a paired one.
        token_logps: (B, T) or (N,), fp32 (fp64 for fp64 logits): the policy's log-probability of each scored token in
            nats, 0 elsewhere; None from `kto_loss_from_logps`.
        entropy: (B, T) or (N,), fp32 or fp64: the entropy in nats of each scored token's softmax, 0 elsewhere; None
            where `outputs=` did not ask for it.
        mean_logits: (B, T) or (N,), fp32 or fp64: each scored token's mean scaled logit, 0 elsewhere; None where not
            asked for.
        is_top1: (B, T) or (N,) bool, whether a scored token's label has the largest logit; None where not asked for.
        scored: (B, T) or (N,) bool, whether each token is scored; None where no output is asked for.
        cu_seqlens: (B + 1,) int32 or int64, the offsets of packed labels, as given; None where the labels are not
            packed, or no output is asked for.
        reduction: the reduction of `loss`, as given: "mean", "sum" or "none".
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

    def metrics(self, process_group: Group | None = None, context_group: Group | None = None) -> dict[str, float]:
        """Plain floats under TRL's names, for logging. The call waits for the device once.

        The entries are `loss` (the mean over sequences with `reduction="none"`), `kl`, and means over the sequences of
        each class that the batch holds: `rewards/chosen`, `rewards/rejected`, `logps/chosen`, `logps/rejected`.
        `rewards/margins` is there if the batch holds both classes. `outputs=` adds means over the scored tokens:
        `entropy`, `logits/chosen`, `logits/rejected`, `mean_token_accuracy`. A mean over nothing has no entry, so that
        no value is NaN.

        Args:
            process_group: a ProcessGroup or one-dimensional DeviceMesh, over whose ranks one all-reduce adds the sums
                and counts. The means are over all ranks' sequences and tokens. None: over this rank's.
            context_group: the loss's context group, over whose ranks one more all-reduce adds the sums over tokens.
                None: there is no such group.

        Returns:
            The value of each entry by its name.

        Raises:
            TypeError: a group is neither a ProcessGroup nor a DeviceMesh.
            ValueError: a DeviceMesh has several dimensions, or this rank is not in the group.
            RuntimeError: torch.distributed is not initialised.
        """
        group, context = resolve("process_group", process_group), resolve("context_group", context_group)
        everything = torch.ones_like(self.desirable)
        classes = {"chosen": self.desirable, "rejected": ~self.desirable}
        one = torch.ones((), dtype=torch.float64, device=self.logps.device)
        loss = self.loss.detach().double()
        if self.reduction == "sum":  # the ranks' losses add up
            loss = (loss, one / group_size(group))
        else:
            count = one * (self.logps if self.reduction == "mean" else loss).numel()
            loss = (loss * count if self.reduction == "mean" else loss.sum(), count)
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
