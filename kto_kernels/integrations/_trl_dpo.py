"""`FusedDPOTrainer` for TRL 1.16: a DPOTrainer whose loss is computed from hidden states."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from .. import checks, scalars
from ..objectives import DPO, IPO, NCA, APODown, APOZero, BCOPair, Hinge, Paired, Scored, SPPOHard
from ..pairs import Judged, Preference
from ..preference import linear_preference_loss
from ._trl_trainer import FusedTrainer, Policy, labels_of

_PAIRS = "halves"  # chosen completions, then rejected ones: as TRL's collator has them

# TRL's loss types, each as TRL defines it, from beta and label smoothing, which TRL reads for "robust" alone. "sft" is
# the `nll_weight` of a record.
_LOSSES: dict[str, Callable[[float, float], Paired]] = {
    "sigmoid": lambda beta, _: DPO(beta),
    "sigmoid_norm": lambda beta, _: DPO(beta, length_normalised=True),
    "hinge": lambda beta, _: Hinge(beta),
    "ipo": lambda beta, _: IPO(beta, length_normalised=True),
    "robust": lambda beta, smoothing: DPO(beta, label_smoothing=smoothing, robust=True),
    "bco_pair": lambda beta, _: BCOPair(beta),
    "nca_pair": lambda beta, _: NCA(beta),
    "sppo_hard": lambda beta, _: SPPOHard(beta),
    "apo_zero": lambda beta, _: APOZero(beta),
    "apo_down": lambda beta, _: APODown(beta),
}
_NORMALISED = {"sigmoid_norm", "ipo"}


@dataclass(frozen=True)
class _Sum(Paired):
    """A weighted sum of paired losses."""

    terms: tuple[tuple[float, Paired], ...] = ()

    def loss(self, chosen: Scored, rejected: Scored) -> Tensor:
        total = torch.zeros_like(chosen.logps)
        for weight, term in self.terms:
            total = total + scalars.data(weight) * term.loss(chosen, rejected)
        return total


def objective_of(
    loss_types: Sequence[str], loss_weights: Sequence[float], beta: float, label_smoothing: float
) -> Paired:
    """The loss that TRL's DPO trainer computes with these options, as one record.

    Args:
        loss_types: TRL's names of losses.
        loss_weights: the weight of each of them.
        beta: β of each of them, > 0, in 1/nat.
        label_smoothing: how likely a pair's preference is wrong, which "robust" alone reads; 0 <= ε < ½ there.

    Returns:
        The record of a single loss of weight 1; else a record with a weighted sum of losses.

    Raises:
        ValueError: a loss is not among those that are computed from hidden states, or a number is out of range; the
            message names it.
        TypeError: a number is none.
    """
    terms, nll_weight = [], 0.0
    for name, weight in zip(loss_types, loss_weights, strict=True):
        checks.scalar("loss_weights", weight)
        if name == "sft":
            nll_weight += checks.number("loss_weights: of 'sft'", weight, positive=False)
        elif name in _LOSSES:
            terms.append((weight, _LOSSES[name](beta, label_smoothing)))
        else:
            raise ValueError(
                f"loss_type: expected one of {[*_LOSSES, 'sft']}, got {name!r}; trl.DPOTrainer may have it"
            )
    if nll_weight == 0 and len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    return _Sum(tuple(terms), nll_weight=nll_weight)


def _check_options(args: Any) -> None:
    """Refuses options of TRL's `DPOConfig` that would change the loss in a way that is not computed here."""
    for name, expected in (("f_divergence_type", "reverse_kl"), ("ld_alpha", None), ("use_weighting", False)):
        if (found := getattr(args, name)) != expected:
            raise ValueError(f"{name}: expected {expected!r}, got {found!r}; trl.DPOTrainer has this option")
    weights = args.loss_weights or [1.0] * len(args.loss_type)
    objective_of(args.loss_type, weights, args.beta, args.label_smoothing)


def _check_dataset(dataset: Any) -> None:
    columns = getattr(dataset, "column_names", None) or next(iter(dataset), ())
    if images := {"image", "images"}.intersection(columns):
        raise ValueError(
            f"train_dataset: expected texts, got a column {min(images)!r}; trl.DPOTrainer trains on images"
        )


class FusedDPOTrainer(FusedTrainer, DPOTrainer):
    """`trl.DPOTrainer` 1.16, but the loss is computed from hidden states inside the wrapped model's forward, by
    `linear_preference_loss`. Arguments, data, metrics and their values are TRL's. In units of G, one product of the
    scored hidden states with the head, it costs what `linear_preference_loss` does, and 1G for the reference.

    The losses are TRL's `loss_type`s "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "bco_pair", "nca_pair",
    "sppo_hard", "apo_zero", "apo_down" and "sft", alone or as a list with `loss_weights`, and each is what TRL defines
    under this name. TRL's definitions differ from the records of `kto_kernels.objectives` with their default options in
    this: "ipo" is length-normalised; "sigmoid" has no label smoothing, as TRL reads `label_smoothing` for "robust"
    alone; "sft" is the mean over the chosen completions' tokens of this rank's batch.

    TRL divides "ipo" and "sigmoid_norm" by all tokens of a completion. Where a completion has no prompt before it, the
    completion's first token counts although nothing predicts it. TRL's own formula computes the loss of such a batch,
    on our log-probabilities.

    The log-probabilities of the reference are computed before the policy's forward instead of after it, and the head
    multiplies only the completions' tokens, on a CPU too. The reference is scored in the same dtype as the policy,
    whatever dtype a reference model has: in autocast's dtype where autocast is on, else in the dtype of the policy's
    hidden states.

    Args:
        *args: the positional arguments of DPOTrainer.
        verify: as for `FusedKTOTrainer`.
        **kwargs: the keyword arguments of DPOTrainer.

    Raises:
        RuntimeError: as for `FusedKTOTrainer`.
        ValueError: as for `FusedKTOTrainer`. Or an option would change the loss in a way that is not computed here: a
            `loss_type` that is not in the list above, an `f_divergence_type` other than "reverse_kl", `ld_alpha`,
            `use_weighting`, a `label_smoothing` outside of [0, ½) for "robust", a negative weight of "sft", `beta` <= 0;
            or the data set has images. The message names it.
    """

    _CALLER: ClassVar[str] = "FusedDPOTrainer"
    _THEIRS: ClassVar[ModuleType] = dpo_trainer

    def __init__(self, *args: Any, verify: bool | str = True, **kwargs: Any):
        super().__init__(*args, verify=verify, **kwargs)

    def _check_arguments(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(DPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        if given.get("args") is not None:
            _check_options(given["args"])
        if given.get("train_dataset") is not None:
            _check_dataset(given["train_dataset"])

    def _objective(self) -> Paired:
        return objective_of(self.loss_types, self.loss_weights, self.beta, self.label_smoothing)

    def _prepared(self, model: Any, inputs: dict) -> tuple[Policy, dict]:
        labels, batch = labels_of(inputs), inputs
        if not self.precompute_ref_logps:
            self._learn_the_policys_dtype(model, inputs)
            with self._reference_model() as reference:
                chosen, rejected = self._sequence_logps(reference, inputs, labels).chunk(2)
            batch = inputs | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        given = {"objective": self._objective(), "pairs": _PAIRS, "ref_logps": self._ref_logps(batch)}
        loss = functools.partial(linear_preference_loss, **given)
        if _NORMALISED.intersection(self.loss_types) and bool((labels[:, 0] != -100).any()):
            loss = None
        return Policy(model, labels, loss), batch

    def _ref_logps(self, batch: dict) -> Tensor:
        return torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])

    def _rounding_of_the_loss(self, policy: Policy, batch: dict, delta: float) -> float:
        logps, lengths, ref_logps = policy.logps.double(), policy.lengths.double(), self._ref_logps(batch)
        chosen = torch.arange(len(logps), device=logps.device) < len(logps) // 2
        preference, tokens = Preference(self._objective(), _PAIRS), lengths[chosen].sum().clamp(min=1)
        judged = Judged(chosen, logps.new_zeros(()), ref_logps, lengths, nll_tokens=tokens)

        def losses(of_chosen: float, of_rejected: float) -> Tensor:
            moved = logps + torch.where(chosen, of_chosen, of_rejected)
            return preference.losses(judged, moved)

        # A log-ratio is a difference of two sums. In each log-ratio a loss rises, falls or is convex: it moves the most
        # at the corners of what rounding allows.
        corners = [losses(*corner) for corner in itertools.product((-2 * delta, 2 * delta), repeat=2)]
        return (torch.stack(corners) - losses(0.0, 0.0)).abs().amax(0).mean().item()
