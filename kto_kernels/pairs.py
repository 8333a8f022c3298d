"""A loss of `kto_kernels.objectives` in a call: which sequences it compares, and the losses that it makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import reference, releases, scalars
from .objectives import Loss, Paired, Scored, Unpaired
from .options import Pairs
from .terms import Clip


@dataclass(frozen=True)
class Preference:
    """A loss in a call of `preference_loss`, with the order of its pairs."""

    objective: Loss
    pairs: Pairs
    humanline: Clip | None = None  # the bounds of token log-ratios

    @property
    def options(self) -> dict[str, object]:
        """What all ranks of a group must share."""
        numbers = {name: value for name, value in vars(self.objective).items() if not isinstance(value, Tensor)}
        clip = None if self.humanline is None else tuple(vars(self.humanline).values())
        return {"objective": type(self.objective).__name__, "pairs": self.pairs, "humanline": clip} | {
            f"objective.{name}": value for name, value in numbers.items()
        }

    # Facts that a walk over chunks needs ──────────────────────────────────────────────────────────────────────────────

    @property
    def compares(self) -> bool:
        """Whether a sequence's slope depends on the other member of its pair."""
        return isinstance(self.objective, Paired) and self.objective.coupling != "apart"

    @property
    def margin_alone(self) -> bool:
        """Whether one number gives the slopes of both members."""
        return self.compares and self.objective.coupling == "margin" and self.objective.nll_weight == 0

    @property
    def per_token(self) -> bool:
        """Whether the margin is between log-ratios per token."""
        return isinstance(self.objective, Paired) and self.objective.per_token

    @property
    def reordered(self) -> bool:
        """Whether the members of a pair must become neighbours."""
        return self.compares and self.pairs == "halves"

    def neighbours(self) -> Preference:
        """The same loss, of sequences whose pairs are neighbours."""
        return replace(self, pairs="interleaved")

    # The loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def losses(self, judged: Judged, logps: Tensor) -> Tensor:
        """Stages 4 and 5 up to the reduction: the losses (B,), or (B / 2,) of pairs, differentiable in the (B,)
        `logps`."""
        objective, scored = self.objective, judged.scored(logps)
        sums = scored.logps * scored.lengths if judged.average else scored.logps
        if isinstance(objective, Paired):
            chosen, rejected = members(len(logps), self.pairs)
            losses, liked = objective.loss(scored.select(chosen), scored.select(rejected)), sums[chosen]
        else:
            assert isinstance(objective, Unpaired)
            losses = objective.loss(scored, judged.desirable, judged.z0)
            liked = torch.where(judged.desirable, sums, 0.0)
        if judged.weights is not None:
            losses, liked = losses * judged.weights, liked * judged.weights
        if objective.nll_weight > 0:
            losses = losses - scalars.data(objective.nll_weight) * liked.sum() / judged.nll_tokens
        return losses

    def rewards(self, judged: Judged, logps: Tensor) -> Tensor:
        """The detached rewards (B,) in fp64."""
        return self.objective.rewards(judged.scored(logps.detach()))

    def slopes(self, judged: Judged, logps: Tensor, reduction: str) -> Tensor:
        """The reduced loss's derivative by each of the (B,) `logps`, by autograd. A sequence's slope does not depend on
        the other pairs, so it is right as soon as all `logps` of its own pair are."""
        with releases.recording():
            leaf = logps.detach().requires_grad_()
            (slopes,) = torch.autograd.grad(reference.reduce(self.losses(judged, leaf), reduction), leaf)
        return slopes


@dataclass(frozen=True)
class Judged:
    """What a loss knows of B sequences beside the policy's log-probabilities."""

    desirable: Tensor  # (B,) bool
    z0: Tensor  # ()
    ref_logps: Tensor | None  # (B,), means where `average`
    lengths: Tensor | None = None  # (B,) fp64, scored tokens on all ranks, or their weights; KTO does without
    weights: Tensor | None = None  # (B,), or (B / 2,) of pairs: the losses are multiplied by them
    nll_tokens: Tensor | None = None  # () fp64, the tokens that a negative log-likelihood is a mean over
    average: bool = False  # whether the policy's log-probabilities are means over scored tokens

    def scored(self, logps: Tensor) -> Scored:
        assert self.lengths is not None
        return Scored(logps.double(), self.ref_logps, self.lengths)

    def neighbours(self) -> Judged:
        """The same sequences with each chosen one before its rejected one, where halves were given."""
        given = {name: getattr(self, name) for name in ("ref_logps", "lengths", "desirable")}
        return replace(self, **{name: None if x is None else neighbours(x) for name, x in given.items()})


def members(count: int, pairs: str) -> tuple[slice, slice]:
    """The chosen and the rejected ones of `count` sequences."""
    if pairs == "halves":
        return slice(0, count // 2), slice(count // 2, count)
    return slice(0, count, 2), slice(1, count, 2)


def neighbours(halves: Tensor) -> Tensor:
    """(B,) values of pairs as neighbours, given as halves."""
    return halves.view(2, -1).t().flatten()


def neighbours_of(halves: list[Any]) -> list[Any]:
    """`neighbours` of a list."""
    count = len(halves) // 2
    return [value for pair in zip(halves[:count], halves[count:]) for value in pair]


def halves(neighbours: Tensor) -> Tensor:
    """(B,) values of pairs as halves, given as neighbours: no view, because they are results of an operator."""
    return torch.cat([neighbours[0::2], neighbours[1::2]])
