"""The losses that `preference_loss` and `linear_preference_loss` take: small frozen records, each with its formula.

An unpaired loss judges each sequence by itself, as thumbs up or thumbs down. A paired loss compares a chosen sequence
with a rejected one. A loss of your own is a record with a method `loss`, in plain PyTorch:

    @dataclass(frozen=True)
    class Margin(objectives.Paired):
        margin: float = 1.0

        def loss(self, chosen, rejected):
            return torch.relu(self.margin - (chosen.log_ratio - rejected.log_ratio))

Autograd differentiates `loss` with respect to the sequence log-probabilities, which are B numbers: what a loss costs
does not depend on its formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from . import checks, reference, scalars
from .options import Group
from .parallel.groups import resolve, sum_over_ranks
from .records import Named

# How the slopes of a pair's members depend on each other: not at all ("apart"), as c and −c of one number that both
# members decide ("margin"), or in any other way ("both").
Coupling: TypeAlias = Literal["apart", "margin", "both"]


@dataclass(frozen=True)
class Scored:
    """Completions as a loss sees them.

    Attributes:
        logps: (n,) fp64, the policy's sequence log-probabilities in nats, differentiable.
        ref_logps: (n,) floating, the reference's sequence log-probabilities in nats; None: there is no reference.
        lengths: (n,) fp64, how many tokens of each completion are scored.
    """

    logps: Tensor
    ref_logps: Tensor | None
    lengths: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """(n,) fp64: `logps − ref_logps` in nats, or `logps` without a reference."""
        return reference.log_ratio(self.logps, self.ref_logps)

    @property
    def mean_log_ratio(self) -> Tensor:
        """(n,) fp64: `log_ratio` per scored token; 0 where no token is scored."""
        return reference.mean_logps(self.log_ratio, self.lengths)

    def ratio(self, mean: bool) -> Tensor:
        """The log-ratios, per scored token or as they are.

        Args:
            mean: whether to return `mean_log_ratio` and not `log_ratio`.

        Returns:
            The log-ratios (n,) in fp64, in nats.
        """
        return self.mean_log_ratio if mean else self.log_ratio

    def select(self, which: Tensor | slice) -> Scored:
        """Some of the completions.

        Args:
            which: (m,) int64 or (n,) bool indices, or a slice.

        Returns:
            Those completions.
        """
        ref_logps = None if self.ref_logps is None else self.ref_logps[which]
        return Scored(self.logps[which], ref_logps, self.lengths[which])


@dataclass(frozen=True)
class Loss(Named):
    """What every loss has.

    Attributes:
        nll_weight: the weight of the negative log-likelihood of the desirable or chosen completions, per token over the
            batch, which is added to the loss; >= 0.
    """

    nll_weight: float = field(default=0.0, kw_only=True)

    # Whether the loss compares with a reference: it may, or by its definition it does not.
    reference_free: ClassVar[bool] = False
    # The numbers that are > 0, and those that are < ½; every number is at least 0.
    _POSITIVE: ClassVar[tuple[str, ...]] = ("beta",)
    _BELOW_HALF: ClassVar[tuple[str, ...]] = ("label_smoothing",)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type in ("bool", bool):
                object.__setattr__(self, each.name, checks.flag(each.name, value))
            elif each.type in ("float", float):
                checked = checks.number(each.name, value, positive=each.name in self._POSITIVE)
                if each.name in self._BELOW_HALF and not checked < 0.5:
                    raise ValueError(f"{each.name}: expected a number >= 0 and < 0.5, got {checked}")
                object.__setattr__(self, each.name, checked)

    def rewards(self, scored: Scored) -> Tensor:
        """The rewards that trainers log.

        Args:
            scored: n completions.

        Returns:
            The rewards (n,) in fp64: `beta · log_ratio`, or the log-ratio itself where the loss has no `beta`.
        """
        return scalars.data(getattr(self, "beta", 1.0)) * scored.log_ratio


@dataclass(frozen=True)
class Unpaired(Loss):
    """A loss that judges each sequence by itself. A subclass defines `loss`."""

    # Whether the loss has a KL reference point z0.
    reference_point: ClassVar[bool] = False

    def loss(self, scored: Scored, desirable: Tensor, z0: Tensor) -> Tensor:
        """The loss of each sequence.

        Args:
            scored: the B sequences.
            desirable: (B,) bool, True for thumbs up.
            z0: () fp64, the KL reference point in nats; 0 for a loss that has none.

        Returns:
            The losses (B,) in fp64, differentiable in `scored.logps`.

        Raises:
            NotImplementedError: a subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no loss(scored, desirable, z0)")


@dataclass(frozen=True)
class Paired(Loss):
    """A loss that compares a chosen sequence with a rejected one. A subclass defines `loss`."""

    # "both" is right for every loss; the other two save work where they are right.
    coupling: ClassVar[Coupling] = "both"

    @property
    def per_token(self) -> bool:
        """Whether the margin is between log-ratios per token: the slopes are then c and −c, each over the member's
        number of tokens."""
        return False

    def loss(self, chosen: Scored, rejected: Scored) -> Tensor:
        """The loss of each pair.

        Args:
            chosen: the chosen sequences of P pairs.
            rejected: the rejected sequences of these pairs, in the same order.

        Returns:
            The losses (P,) in fp64, differentiable in the `logps` of both.

        Raises:
            NotImplementedError: a subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no loss(chosen, rejected)")


def _sigmoid(x: Tensor) -> Tensor:
    """σ(x) through its logarithm, so that PyTorch's derivative is exact in both tails."""
    return logsigmoid(x).exp()


def _softplus_loss(x: Tensor) -> Tensor:
    """−log σ(x)."""
    return -logsigmoid(x)


def _smoothed_loss(margin: Tensor, smoothing: float) -> Tensor:
    """`−(1−ε) log σ(x) − ε log σ(−x)` of the margin x, where a pair's preference is wrong with the probability ε."""
    if smoothing == 0:  # times which the loss of an infinite margin is not a number
        return _softplus_loss(margin)
    epsilon = scalars.data(smoothing)
    return (1 - epsilon) * _softplus_loss(margin) + epsilon * _softplus_loss(-margin)


# Unpaired ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class KTO(Unpaired):
    """Kahneman-Tversky Optimization (arXiv 2402.01306, equations 7 and 8), as `kto_loss` has it.

    `λ_D·σ(−β(r − z0))` for a desirable sequence with the log-ratio r, `λ_U·σ(−β(z0 − r))` for an undesirable one.

    Attributes:
        beta: β, how sharply the loss saturates, > 0, in 1/nat.
        desirable_weight: λ_D, >= 0.
        undesirable_weight: λ_U, >= 0.
        average_log_prob: whether a sequence's log-probability is the mean over its scored tokens.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    average_log_prob: bool = False

    reference_point: ClassVar[bool] = True

    def loss(self, scored: Scored, desirable: Tensor, z0: Tensor) -> Tensor:
        weights = scalars.data(self.desirable_weight), scalars.data(self.undesirable_weight)
        return reference.loss(scored.log_ratio, z0, desirable, scalars.data(self.beta), weights)


@dataclass(frozen=True)
class APOZeroUnpaired(KTO):
    """APO-zero on single sequences (arXiv 2408.06266, equation 7): `KTO` with z0 = 0."""

    reference_point: ClassVar[bool] = False


@dataclass(frozen=True)
class BCO(Unpaired):
    """Binary classifier optimization on single sequences (arXiv 2404.04656).

    `−log σ(βr − δ)` for a desirable sequence with the log-ratio r, `−log σ(δ − βr)` for an undesirable one. The paper's
    reward shift δ is a running mean of rewards: `RewardShift` keeps it, and is one batch behind.

    Attributes:
        beta: β, > 0, in 1/nat.
        reward_shift: δ, the reward shift, without unit: a number, or a () tensor of bf16, fp16, fp32 or fp64.
    """

    beta: float = 0.1
    reward_shift: float | Tensor = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.scalar("reward_shift", self.reward_shift)

    def loss(self, scored: Scored, desirable: Tensor, z0: Tensor) -> Tensor:
        logits = self.rewards(scored) - scalars.data(self.reward_shift)
        return _softplus_loss(torch.where(desirable, logits, -logits))


class RewardShift(nn.Module):
    """The running mean of rewards that `BCO` takes as its reward shift, over all batches and ranks so far. The shift of
    a batch does not know the batch's own rewards: it is one batch behind. The state is in `state_dict`.

    Examples:
        >>> import torch
        >>> from kto_kernels.objectives import BCO, RewardShift
        >>> shift = RewardShift()
        >>> objective = BCO(beta=0.1, reward_shift=shift.value)  # of the first batch: 0
        >>> shift.update(torch.tensor([0.5, -0.1]))  # `rewards` of the output
        >>> shift.value
        tensor(0.2000, dtype=torch.float64)
    """

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float64))  # of rewards, and their number

    @property
    def value(self) -> Tensor:
        """() fp64, the mean of all rewards so far; 0 where there are none."""
        return self.sums[0] / self.sums[1].clamp(min=1)

    def update(self, rewards: Tensor, process_group: Group | None = None) -> None:
        """Adds the rewards of a batch.

        Args:
            rewards: (B,) floating, the `rewards` of a loss's output.
            process_group: a ProcessGroup or one-dimensional DeviceMesh, the rewards of whose ranks are added in one
                all-reduce. None: this rank's alone.

        Raises:
            TypeError: the group is neither a ProcessGroup nor a DeviceMesh.
            ValueError: a DeviceMesh has several dimensions, or this rank is not in the group.
            RuntimeError: torch.distributed is not initialised.
        """
        batch = torch.stack([rewards.detach().double().sum(), rewards.new_tensor(rewards.numel()).double()])
        self.sums = self.sums.to(rewards.device) + sum_over_ranks(batch, resolve("process_group", process_group))


# Paired, each member by itself ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class APOZero(Paired):
    """APO-zero (arXiv 2408.06266, equation 7): `σ(−βr_w) + σ(βr_l)` with the log-ratios r of chosen and rejected.

    Attributes:
        beta: β, > 0, in 1/nat.
    """

    beta: float = 0.1

    coupling: ClassVar[Coupling] = "apart"

    def loss(self, chosen: Scored, rejected: Scored) -> Tensor:
        return _sigmoid(-self.rewards(chosen)) + _sigmoid(self.rewards(rejected))


@dataclass(frozen=True)
class NCA(Paired):
    """Noise contrastive alignment on pairs (arXiv 2402.05369, the NCA loss of pairwise data):
    `−log σ(βr_w) − ½ log σ(−βr_w) − ½ log σ(−βr_l)`.

    Attributes:
        beta: β, > 0, in 1/nat.
    """

    beta: float = 0.1

    coupling: ClassVar[Coupling] = "apart"

    def loss(self, chosen: Scored, rejected: Scored) -> Tensor:
        w, l = self.rewards(chosen), self.rewards(rejected)  # noqa: E741  (the papers' names)
        return _softplus_loss(w) + (_softplus_loss(-w) + _softplus_loss(-l)) / 2


@dataclass(frozen=True)
class SPPOHard(Paired):
    """Self-play preference optimization (arXiv 2405.00675, equation 4.7) with a winning probability of 1 for the
    chosen sequence and 0 for the rejected one: `(r_w − 1/(2β))² + (r_l + 1/(2β))²`.

    Attributes:
        beta: β, > 0, in 1/nat: the paper's 1/η.
    """

    beta: float = 0.1

    coupling: ClassVar[Coupling] = "apart"

    def loss(self, chosen: Scored, rejected: Scored) -> Tensor:
        half = 0.5 / scalars.data(self.beta)
        return (chosen.log_ratio - half) ** 2 + (rejected.log_ratio + half) ** 2


@dataclass(frozen=True)
class BCOPair(Paired):
    """Binary classifier optimization on pairs (arXiv 2404.04656), as TRL's DPO trainer has it, without a reward shift:
    `−log σ(βr_w) − log σ(−βr_l)`.

    Attributes:
        beta: β, > 0, in 1/nat.
    """

    beta: float = 0.1

    coupling: ClassVar[Coupling] = "apart"

    def loss(self, chosen: Scored, rejected: Scored) -> Tensor:
        return _softplus_loss(self.rewards(chosen)) + _softplus_loss(-self.rewards(rejected))


# Paired, through the margin ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class DPO(Paired):
    """Direct preference optimization (arXiv 2305.18290, equation 7): `−log σ(β(r_w − r_l))`.

    With ε = `label_smoothing` it is conservative DPO, `−(1−ε) log σ(x) − ε log σ(−x)` of the margin x (Mitchell, "A note
    on DPO with noisy preferences", 2023), or with `robust` the unbiased `(−(1−ε) log σ(x) + ε log σ(−x)) / (1 − 2ε)`
    (arXiv 2403.00409).

    Attributes:
        beta: β, > 0, in 1/nat.
        label_smoothing: ε, how likely a pair's preference is wrong, 0 <= ε < ½.
        robust: whether the loss is the unbiased one.
        length_normalised: whether the log-ratios are means over scored tokens.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    robust: bool = False
    length_normalised: bool = False

    coupling: ClassVar[Coupling] = "margin"

    @property
    def per_token(self) -> bool:
        return self.length_normalised

    def loss(self, chosen: Scored, rejected: Scored) -> Tensor:
        w, l = (each.ratio(self.per_token) for each in (chosen, rejected))  # noqa: E741  (the papers' names)
        margin = scalars.data(self.beta) * (w - l)
        if not self.robust:
            return _smoothed_loss(margin, self.label_smoothing)
        epsilon = scalars.data(self.label_smoothing)
        return ((1 - epsilon) * _softplus_loss(margin) - epsilon * _softplus_loss(-margin)) / (1 - 2 * epsilon)


@dataclass(frozen=True)
class IPO(Paired):
    """Identity preference optimization (arXiv 2310.12036, equation 17): `(r_w − r_l − 1/(2β))²`.

    Attributes:
        beta: β, the paper's τ, > 0, in 1/nat.
        length_normalised: whether the log-ratios are means over scored tokens, as in TRL.
    """

    beta: float = 0.1
    length_normalised: bool = False

    coupling: ClassVar[Coupling] = "margin"

    @property
    def per_token(self) -> bool:
        return self.length_normalised

    def loss(self, chosen: Scored, rejected: Scored) -> Tensor:
        w, l = (each.ratio(self.per_token) for each in (chosen, rejected))  # noqa: E741  (the papers' names)
        return (w - l - 0.5 / scalars.data(self.beta)) ** 2


@dataclass(frozen=True)
class Hinge(Paired):
    """The hinge loss of SLiC (arXiv 2305.10425) on log-ratios (arXiv 2309.06657): `max(0, 1 − β(r_w − r_l))`.

    Attributes:
        beta: β, > 0, in 1/nat.
    """

    beta: float = 0.1

    coupling: ClassVar[Coupling] = "margin"

    def loss(self, chosen: Scored, rejected: Scored) -> Tensor:
        return torch.relu(1 - (self.rewards(chosen) - self.rewards(rejected)))


@dataclass(frozen=True)
class APODown(Paired):
    """APO-down (arXiv 2408.06266, equation 8): `σ(βr_w) + σ(−β(r_w − r_l))`.

    Attributes:
        beta: β, > 0, in 1/nat.
    """

    beta: float = 0.1

    def loss(self, chosen: Scored, rejected: Scored) -> Tensor:
        w = self.rewards(chosen)
        return _sigmoid(w) + _sigmoid(self.rewards(rejected) - w)


@dataclass(frozen=True)
class SimPO(Paired):
    """Simple preference optimization (arXiv 2405.14734, equation 6): `−log σ(β(m_w − m_l) − γ)` with the mean
    log-probabilities m of the scored tokens, without a reference.

    Attributes:
        beta: β, > 0, in 1/nat.
        gamma: γ, the margin that chosen should have over rejected, >= 0, without unit.
        label_smoothing: ε, how likely a pair's preference is wrong, 0 <= ε < ½, as for `DPO`.
    """

    beta: float = 2.0
    gamma: float = 0.5
    label_smoothing: float = 0.0

    coupling: ClassVar[Coupling] = "margin"
    reference_free: ClassVar[bool] = True

    @property
    def per_token(self) -> bool:
        return True

    def rewards(self, scored: Scored) -> Tensor:
        return scalars.data(self.beta) * scored.mean_log_ratio

    def loss(self, chosen: Scored, rejected: Scored) -> Tensor:
        margin = self.rewards(chosen) - self.rewards(rejected) - scalars.data(self.gamma)
        return _smoothed_loss(margin, self.label_smoothing)


@dataclass(frozen=True)
class CPO(Paired):
    """Contrastive preference optimization (arXiv 2401.08417): `−log σ(β(S_w − S_l))` with the
    log-probabilities S, without a reference, plus the negative log-likelihood of the chosen sequences.

    Attributes:
        beta: β, > 0, in 1/nat.
        label_smoothing: ε, how likely a pair's preference is wrong, 0 <= ε < ½, as for `DPO`.
        nll_weight: as for `Loss`; 1.0 by the definition.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_weight: float = field(default=1.0, kw_only=True)

    reference_free: ClassVar[bool] = True

    def loss(self, chosen: Scored, rejected: Scored) -> Tensor:
        return _smoothed_loss(self.rewards(chosen) - self.rewards(rejected), self.label_smoothing)


@dataclass(frozen=True)
class ORPO(Paired):
    """Odds ratio preference optimization (arXiv 2403.07691, equations 6 and 7): `−λ log σ(odds_w − odds_l)` with the
    log-odds `m − log(1 − exp m)` of the mean log-probabilities m, without a reference, plus the negative
    log-likelihood of the chosen sequences.

    Attributes:
        beta: λ, the weight of the odds ratio, > 0, without unit.
        nll_weight: as for `Loss`; 1.0 by the definition.
    """

    beta: float = 0.1
    nll_weight: float = field(default=1.0, kw_only=True)

    reference_free: ClassVar[bool] = True

    def rewards(self, scored: Scored) -> Tensor:
        return scalars.data(self.beta) * scored.mean_log_ratio

    def log_odds_ratio(self, chosen: Scored, rejected: Scored) -> Tensor:
        """`odds_w − odds_l`.

        Args:
            chosen: the chosen sequences of P pairs.
            rejected: the rejected sequences of these pairs, in the same order.

        Returns:
            The differences (P,) in fp64, without unit.
        """
        return _log_odds(chosen) - _log_odds(rejected)

    def loss(self, chosen: Scored, rejected: Scored) -> Tensor:
        return scalars.data(self.beta) * _softplus_loss(self.log_odds_ratio(chosen, rejected))


def _log_odds(scored: Scored) -> Tensor:
    """`log(p / (1 − p))` of mean log-probabilities: +inf where p is 1, and 0, the odds of nothing known, where no token
    is scored."""
    logps = torch.where(scored.lengths == 0, -math.log(2), scored.mean_log_ratio)
    return logps - torch.log(-torch.expm1(logps))
