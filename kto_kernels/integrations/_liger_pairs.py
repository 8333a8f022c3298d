"""Replacements for Liger-Kernel's DPO, CPO, ORPO and SimPO losses (0.8.5), computed by `linear_preference_loss`: the same
calls, the same results."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import checks, objectives, reference, scalars
from ..objectives import Paired, Scored
from ..pairs import members
from ..parallel import dtensor
from ..preference import linear_preference_loss
from ..stages import linear_token_logps
from ._liger_base import LigerLoss, check_policy, check_reference, check_target, logits_sums

# Losses that `kto_kernels.objectives` does not have ───────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _EXOPair(Paired):
    """EXO with preferences as the reward (arXiv 2402.00856, equation 16): the divergence of (σ(x), σ(−x)) from
    (1 − ε, ε) with the margin x and ε = `label_smoothing`."""

    beta: float = 0.1
    label_smoothing: float = 1e-3

    _POSITIVE: ClassVar[tuple[str, ...]] = ("beta", "label_smoothing")

    def loss(self, chosen: Scored, rejected: Scored) -> Tensor:
        margin = self.rewards(chosen) - self.rewards(rejected)
        epsilon = margin.new_ones(()) * scalars.data(self.label_smoothing)
        w, l = logsigmoid(margin), logsigmoid(-margin)  # noqa: E741  (the papers' names)
        return w.exp() * (w - torch.log1p(-epsilon)) + l.exp() * (l - torch.log(epsilon))


@dataclass(frozen=True)
class _DiscoPOP(Paired):
    """DiscoPOP (arXiv 2406.08414, equation 5): `−(1 − w) log σ(x) + w exp(−x)` with the margin x and w = σ(x/τ)."""

    beta: float = 0.1
    discopop_tau: float = 0.05

    _POSITIVE: ClassVar[tuple[str, ...]] = ("beta", "discopop_tau")

    def loss(self, chosen: Scored, rejected: Scored) -> Tensor:
        margin = self.rewards(chosen) - self.rewards(rejected)
        modulation = margin / scalars.data(self.discopop_tau)
        return torch.exp(logsigmoid(modulation) - margin) - logsigmoid(-modulation).exp() * logsigmoid(margin)


@dataclass(frozen=True)
class _OfMeans(Paired):
    """A loss whose log-probabilities, the reference's too, are means over scored tokens."""

    of: Paired

    def loss(self, chosen: Scored, rejected: Scored) -> Tensor:
        return self.of.loss(_means(chosen), _means(rejected))

    def rewards(self, scored: Scored) -> Tensor:
        return self.of.rewards(_means(scored))


def _means(scored: Scored) -> Scored:
    """The completions as though each had one token, with the mean log-probability."""
    ref_logps = None if scored.ref_logps is None else reference.mean_logps(scored.ref_logps, scored.lengths)
    return Scored(reference.mean_logps(scored.logps, scored.lengths), ref_logps, torch.ones_like(scored.lengths))


# The losses ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class _PairedLoss(LigerLoss):
    """A loss of pairs: the first half of the batch is chosen, the second half rejected, in the same order."""

    ignore_index: int
    beta: float
    compute_nll_loss: bool
    alpha: float = 1.0  # the options that a loss lacks count as these
    average_log_prob: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._objective()  # a wrong option is an error now and not at the first call

    def _loss(self) -> Paired:
        """The loss without its negative log-likelihood."""
        raise NotImplementedError

    def _objective(self) -> Paired:
        """The loss that the options say, which it checks."""
        checks.integer("ignore_index", self.ignore_index)
        alpha = checks.number("alpha", self.alpha, positive=False)
        weighted = checks.flag("compute_nll_loss", self.compute_nll_loss)
        return replace(self._loss(), nll_weight=alpha if weighted else 0.0)

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (B, T, H)
        target: Tensor,  # (B, T)
        bias: Tensor | None = None,  # (V,)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and what Liger returns beside it.

        Args:
            lin_weight: (V, H) bf16, fp16, fp32 or fp64: the head's weight.
            _input: (B, T, H) bf16, fp16, fp32 or fp64: hidden states, already shifted, chosen sequences first.
            target: (B, T) int32 or int64; `ignore_index` where nothing is scored.
            bias: (V,) bf16, fp16, fp32 or fp64: the head's bias. None: the head has none.

        Returns:
            loss: as for `LigerFusedLinearDPOLoss`.
            metrics: as for `LigerFusedLinearDPOLoss`.

        Raises:
            TypeError: as for `LigerFusedLinearDPOLoss`.
            ValueError: as for `LigerFusedLinearDPOLoss`.
            NotImplementedError: as for `LigerFusedLinearDPOLoss`.
            RuntimeError: as for `LigerFusedLinearDPOLoss`.
        """
        return self._run(lin_weight, _input, target, bias)

    def _run(
        self,
        weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None,
        ref: dict[str, Tensor | None] | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        objective = self._objective()
        weight, bias = dtensor.heads(None, weight=weight, bias=bias)  # the means of logits need the whole head
        check_policy(_input, weight, target, bias, self.ignore_index)
        count, tokens = target.shape
        if count % 2:
            raise ValueError(f"target: expected an even number of sequences, chosen and rejected ones, got {count}")
        if nll_target is not None:
            check_target("nll_target", nll_target, _input)
        if ref is not None:
            check_reference(**ref, weight=weight, target=target)
            ref = {"ref_hidden": ref["ref_input"], "ref_weight": ref["ref_weight"], "ref_bias": ref["ref_bias"]}
        chosen, _ = halves = members(count, "halves")
        options = {"bias": bias, "ignore_index": self.ignore_index}
        elsewhere = nll_target is not None and objective.nll_weight > 0
        scored = replace(objective, nll_weight=0.0) if elsewhere else objective
        out = linear_preference_loss(_input, weight, target, scored, **options, **(ref or {}))
        loss, nll = out.loss, torch.zeros_like(out.loss)
        if elsewhere:
            scores = linear_token_logps(_input[chosen], weight, nll_target[chosen], **options)
            nll = self._nll(scores, nll_target[chosen])
            loss = loss + nll.to(loss.dtype) * objective.nll_weight
        elif self.compute_nll_loss:
            nll = self._nll(out.token_logps[chosen], target[chosen])

        judged = Scored(out.logps, out.ref_logps, (target != self.ignore_index).sum(-1).double())
        logps = reference.mean_logps(judged.logps, judged.lengths) if self.average_log_prob else judged.logps
        logits = logits_sums(_input, weight, bias) / (max(1, count // 2) * tokens * weight.shape[0])
        metrics = [
            *(logps[half] for half in halves),
            *(logits[half].sum() for half in halves),
            nll.detach(),
            *(out.rewards[half] for half in halves),
            *self._more(*(judged.select(half) for half in halves)),
        ]
        return loss, tuple(metric.to(loss.dtype) for metric in metrics)

    def _nll(self, logps: Tensor, target: Tensor) -> Tensor:
        """The negative log-likelihood per scored token."""
        return -logps.sum(dtype=torch.float64) / (target != self.ignore_index).sum().clamp(min=1)

    def _more(self, chosen: Scored, rejected: Scored) -> tuple[Tensor, ...]:
        """What a class returns behind the rewards."""
        return ()


@dataclass(eq=False, repr=False)
class LigerFusedLinearDPOLoss(_PairedLoss):
    """Replaces `liger_kernel.chunked_loss.LigerFusedLinearDPOLoss`, with its arguments.

    The results differ from Liger's as those of `liger_fused_linear_kto` do: sequences without a scored token, half
    precision, saturated losses and `torch.no_grad()`. As in Liger, `label_smoothing` has an effect with the loss types
    "robust" and "exo_pair" alone, although Liger's docstring names conservative DPO too.

    Attributes:
        ignore_index: the target of positions that are not scored.
        beta: β, > 0, in 1/nat.
        alpha: the weight of the negative log-likelihood of the chosen sequences, per token over the batch, >= 0.
        compute_nll_loss: whether the negative log-likelihood is added to the loss and returned. False: 0 is returned.
        compiled: has no effect. In Liger it says whether the loss is compiled.
        use_ref_model: whether there is a reference; without one, the reference's log-probabilities count as 0.
        average_log_prob: whether a sequence's log-probability is the mean over its scored tokens. False: it is the sum.
        chunk_size: has no effect. How the work is cut into chunks depends on memory, and changes no result.
        loss_type: "sigmoid", "robust" (both `objectives.DPO`), "hinge" (`Hinge`), "nca_pair" (`NCA`), "bco_pair"
            (`BCOPair`), "sppo_hard" (`SPPOHard`), "apo_zero" (`APOZero`), "apo_down" (`APODown`), "exo_pair" (arXiv
            2402.00856, equation 16) or "discopop" (arXiv 2406.08414, equation 5).
        label_smoothing: ε of "robust" (0 <= ε < ½) and of "exo_pair" (0 < ε < ½): how likely a pair's preference is
            wrong.
        discopop_tau: τ of "discopop", > 0, without unit.
    """

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    compute_nll_loss: bool = False
    compiled: bool = True
    use_ref_model: bool = True
    average_log_prob: bool = False
    chunk_size: int = 1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05

    def _loss(self) -> Paired:
        makers: dict[str, Callable[[], Paired]] = {
            "sigmoid": lambda: objectives.DPO(self.beta),
            "hinge": lambda: objectives.Hinge(self.beta),
            "exo_pair": lambda: _EXOPair(self.beta, self.label_smoothing),
            "nca_pair": lambda: objectives.NCA(self.beta),
            "robust": lambda: objectives.DPO(self.beta, self.label_smoothing, robust=True),
            "bco_pair": lambda: objectives.BCOPair(self.beta),
            "sppo_hard": lambda: objectives.SPPOHard(self.beta),
            "apo_zero": lambda: objectives.APOZero(self.beta),
            "apo_down": lambda: objectives.APODown(self.beta),
            "discopop": lambda: _DiscoPOP(self.beta, self.discopop_tau),
        }
        checks.choice("loss_type", self.loss_type, tuple(makers))
        loss = makers[self.loss_type]()
        return _OfMeans(loss) if checks.flag("average_log_prob", self.average_log_prob) else loss

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (B, T, H)
        target: Tensor,  # (B, T)
        bias: Tensor | None = None,  # (V,)
        ref_input: Tensor | None = None,  # (B, T, H')
        ref_weight: Tensor | None = None,  # (V, H')
        ref_bias: Tensor | None = None,  # (V,)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and what Liger returns beside it.

        Args:
            lin_weight: (V, H) bf16, fp16, fp32 or fp64: the head's weight.
            _input: (B, T, H) bf16, fp16, fp32 or fp64: hidden states, already shifted, chosen sequences first.
            target: (B, T) int32 or int64; `ignore_index` where nothing is scored.
            bias: (V,) bf16, fp16, fp32 or fp64: the head's bias. None: the head has none.
            ref_input: (B, T, H') bf16, fp16, fp32 or fp64: the reference's hidden states, needed where `use_ref_model`.
                None: there are none.
            ref_weight: (V, H') bf16, fp16, fp32 or fp64: the reference's head, needed where `use_ref_model`. None: there
                is none.
            ref_bias: (V,) bf16, fp16, fp32 or fp64: the bias of the reference's head. None: the head has none.

        Returns:
            loss: () fp32 (fp64 for fp64 `_input`), the mean loss over the B / 2 pairs.
            metrics: `(chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards,
                rejected_rewards)` in the dtype of the loss and without gradient: log-probabilities and rewards are
                (B / 2,), the others (). Log-probabilities are sums, or means with `average_log_prob`. The means of logits are over all tokens, prompts and padding too.

        Raises:
            TypeError: an argument has a wrong type or dtype; the message names it.
            ValueError: an argument has a wrong shape, device or value, or is missing; the message names it.
            NotImplementedError: as for `linear_preference_loss`.
            RuntimeError: as for `linear_preference_loss`.
        """
        ref = {"ref_input": ref_input, "ref_weight": ref_weight, "ref_bias": ref_bias}
        return self._run(
            lin_weight, _input, target, bias, ref if checks.flag("use_ref_model", self.use_ref_model) else None
        )


@dataclass(eq=False, repr=False)
class LigerFusedLinearCPOLoss(_PairedLoss):
    """Replaces `liger_kernel.chunked_loss.LigerFusedLinearCPOLoss`, with its arguments: `objectives.CPO`.

    `LigerFusedLinearDPOLoss` says where the results differ from Liger's.

    Attributes:
        ignore_index: the target of positions that are not scored.
        beta: β, > 0, in 1/nat.
        alpha: the weight of the negative log-likelihood of the chosen sequences, per token over the batch, >= 0.
        label_smoothing: ε, how likely a pair's preference is wrong, 0 <= ε < ½.
        compute_nll_loss: whether the negative log-likelihood is added to the loss and returned. False: 0 is returned.
        compiled: has no effect.
        average_log_prob: whether a sequence's log-probability is the mean over its scored tokens. False: it is the sum.
        chunk_size: has no effect.
    """

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    average_log_prob: bool = False
    chunk_size: int = 1

    def _loss(self) -> Paired:
        loss = objectives.CPO(self.beta, self.label_smoothing)
        return _OfMeans(loss) if checks.flag("average_log_prob", self.average_log_prob) else loss


@dataclass(eq=False, repr=False)
class LigerFusedLinearSimPOLoss(_PairedLoss):
    """Replaces `liger_kernel.chunked_loss.LigerFusedLinearSimPOLoss`, with its arguments: `objectives.SimPO`.

    `LigerFusedLinearDPOLoss` says where the results differ from Liger's.

    Attributes:
        ignore_index: the target of positions that are not scored.
        beta: β, > 0, in 1/nat.
        alpha: the weight of the negative log-likelihood of the chosen sequences, per token over the batch, >= 0.
        label_smoothing: ε, how likely a pair's preference is wrong, 0 <= ε < ½.
        compute_nll_loss: whether the negative log-likelihood is added to the loss and returned, which SimPO's definition
            does not have and Liger's default does. False: 0 is returned.
        compiled: has no effect.
        gamma: γ, the margin that chosen should have over rejected, >= 0, without unit.
        chunk_size: has no effect.
    """

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    gamma: float = 0.5
    chunk_size: int = 1

    def _loss(self) -> Paired:
        return objectives.SimPO(self.beta, self.gamma, self.label_smoothing)


@dataclass(eq=False, repr=False)
class LigerFusedLinearORPOLoss(_PairedLoss):
    """Replaces `liger_kernel.chunked_loss.LigerFusedLinearORPOLoss`, with its arguments: `objectives.ORPO`.

    Behind the rewards it returns `log_odds_ratio` and `log_odds_chosen`, the means of `log σ(x)` and of x over the pairs
    with the log-odds ratio x. `LigerFusedLinearDPOLoss` says where the results differ from Liger's.

    Attributes:
        ignore_index: the target of positions that are not scored.
        beta: λ, the weight of the odds ratio, > 0, without unit.
        compute_nll_loss: whether the negative log-likelihood of the chosen sequences, per token over the batch, is added
            to the loss and returned. False: 0 is returned.
        compiled: has no effect.
        chunk_size: has no effect.
    """

    ignore_index: int = -100
    beta: float = 0.1
    compute_nll_loss: bool = True
    compiled: bool = True
    chunk_size: int = 1

    def _loss(self) -> Paired:
        return objectives.ORPO(self.beta)

    def _more(self, chosen: Scored, rejected: Scored) -> tuple[Tensor, ...]:
        ratio = objectives.ORPO(self.beta).log_odds_ratio(chosen, rejected)
        count = max(1, len(ratio))
        return logsigmoid(ratio).sum() / count, ratio.sum() / count

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (B, T, H)
        target: Tensor,  # (B, T)
        bias: Tensor | None = None,  # (V,)
        nll_target: Tensor | None = None,  # (B, T)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and what Liger returns beside it.

        Args:
            lin_weight: (V, H) bf16, fp16, fp32 or fp64: the head's weight.
            _input: (B, T, H) bf16, fp16, fp32 or fp64: hidden states, already shifted, chosen sequences first.
            target: (B, T) int32 or int64; `ignore_index` where nothing is scored.
            bias: (V,) bf16, fp16, fp32 or fp64: the head's bias. None: the head has none.
            nll_target: (B, T) int32 or int64, the targets of the negative log-likelihood, of which the chosen half
                counts; `ignore_index` where nothing is. They cost a second pass over the chosen sequences. None: they are
                `target`.

        Returns:
            loss: as for `LigerFusedLinearDPOLoss`.
            metrics: as for `LigerFusedLinearDPOLoss`, and `log_odds_ratio` and `log_odds_chosen`, () each.

        Raises:
            TypeError: as for `LigerFusedLinearDPOLoss`.
            ValueError: as for `LigerFusedLinearDPOLoss`.
            NotImplementedError: as for `LigerFusedLinearDPOLoss`.
            RuntimeError: as for `LigerFusedLinearDPOLoss`.
        """
        return self._run(lin_weight, _input, target, bias, nll_target=nll_target)


# Liger's functions ────────────────────────────────────────────────────────────────────────────────────────────────────


def _function(of: type[_PairedLoss], name: str, order: str, **defaults: Any) -> Callable[..., Any]:
    """The function that Liger has beside a class: hidden states, head, targets, and tensors and options in an order and
    with defaults of its own."""
    known = inspect.signature(of.forward).parameters | inspect.signature(of).parameters
    known = {key: p.replace(default=defaults.get(key, p.default)) for key, p in known.items()}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    needed = [inspect.Parameter(key, kind) for key in ("_input", "weight", "target")]
    signature = inspect.Signature([*needed, *(known[key] for key in order.split())])
    tensors = set(inspect.signature(of.forward).parameters)

    def function(*args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        bound = defaults | signature.bind(*args, **kwargs).arguments
        loss = of(**{key: value for key, value in bound.items() if key not in tensors | {"weight"}})
        return loss(bound["weight"], **{key: value for key, value in bound.items() if key in tensors})

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"Replaces `liger_kernel.chunked_loss.functional.{name}`: `{of.__name__}` as a function."
    function.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return function


liger_fused_linear_dpo: Callable[..., tuple[Tensor, tuple[Tensor, ...]]] = _function(
    LigerFusedLinearDPOLoss,
    "liger_fused_linear_dpo",
    "bias ref_input ref_weight ref_bias ignore_index beta compute_nll_loss compiled use_ref_model average_log_prob "
    "chunk_size loss_type label_smoothing discopop_tau alpha",
)
liger_fused_linear_cpo: Callable[..., tuple[Tensor, tuple[Tensor, ...]]] = _function(
    LigerFusedLinearCPOLoss,
    "liger_fused_linear_cpo",
    "bias ignore_index beta alpha label_smoothing compute_nll_loss compiled average_log_prob chunk_size",
)
liger_fused_linear_simpo: Callable[..., tuple[Tensor, tuple[Tensor, ...]]] = _function(
    LigerFusedLinearSimPOLoss,
    "liger_fused_linear_simpo",
    "bias ignore_index beta alpha label_smoothing compute_nll_loss compiled gamma chunk_size",
    compute_nll_loss=False,
)
liger_fused_linear_orpo: Callable[..., tuple[Tensor, tuple[Tensor, ...]]] = _function(
    LigerFusedLinearORPOLoss,
    "liger_fused_linear_orpo",
    "bias ignore_index beta compute_nll_loss nll_target compiled chunk_size",
)
