"""The operators from hidden states, `torch.ops.kto_kernels.linear_*`.

    linear_token_logps   hidden states → token log-probabilities; with a frozen head also the hidden states' gradient,
                         whose rows the backward only scales (2G)
    linear_backward      the gradients of token log-probabilities where the head is trained, from logits computed once
                         more (4G in all; 3G where the head's adapter is trained and the weight is frozen)
    linear_kto           the whole loss and the gradients of a trained head, formed in the forward (3G; 2G where only
                         bias and adapter are trained)
    scale_, scale_rows_  multiply a gradient that the forward formed by the upstream gradient, in place

`kto_kernels.linear.plan` explains the GEMM unit G and the chunks. Each operator is one opaque node to torch.compile,
because the number of chunks depends on how many tokens are scored.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import reference
from ..backends import Backend, select
from ..backends.base import power_of_two_below
from ..linear.coefficients import KnownCoefficients, KTOCoefficients, LogpAndEntropyCoefficients, PreferenceCoefficients
from ..linear.head import HEAD_TENSORS, Adapter, Head, Needs, autocasts, gradient_dtype
from ..linear.plan import LinearPlan
from ..linear.rows import ScoredRows, scored_counts, scored_targets
from ..linear.walk import Walk, walk
from ..options import OUTPUTS, Chunking, Objective, Scoring
from ..pairs import Judged, Preference, halves, neighbours_of
from ..parallel.groups import VocabShard, by_name
from ..records import Completions
from ..terms import Terms
from .schema import Backward, Operator

# Shared by all operators ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Projected:
    """Hidden states, the head that makes logits of them, and the labels that score the logits."""

    hidden: Tensor  # (B, T, H) or (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (B, T) or (N,)
    cu_seqlens: Tensor | None  # (B + 1,)
    scoring: Scoring
    chunking: Chunking
    dtype: torch.dtype  # the dtype that the GEMMs run in
    shard: VocabShard | None = None
    prefix: Literal["", "kl_"] = ""  # of the names of labels and offsets in error messages
    scored_lengths: Tensor | None = None  # as in Completions
    adapter_a: Tensor | None = None  # (r, H)
    adapter_b: Tensor | None = None  # (V, r), where `adapter_a` is
    adapter_scaling: float = 1.0

    @property
    def vocab(self) -> int:
        """The number of columns of the whole vocabulary."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocab

    def backend(self) -> Backend:
        return select(self.scoring.backend, self.hidden.device, self.dtype, "hidden, weight")

    @property
    def completions(self) -> Completions:
        return Completions(self.labels, self.cu_seqlens, self.prefix, self.scored_lengths)

    def rows(self, backend: Backend) -> ScoredRows:
        backend.check_values(self.completions, self.vocab, self.scoring.ignore_index)
        return ScoredRows.of(self.hidden, self.completions, self.scoring, self.weight.shape[0], self.shard)

    def head(self) -> Head:
        weight, bias, a, b = (None if x is None else x.to(self.dtype) for x in self.trainable)
        return Head(weight, bias, self.scoring.scale, None if a is None else Adapter(a, b, self.adapter_scaling))

    @property
    def trainable(self) -> list[Tensor | None]:
        """The tensors of the head that may be trained."""
        return [getattr(self, name) for name in HEAD_TENSORS]

    def plan(self, lengths: list[int], needs: Needs, **options: Any) -> LinearPlan:
        return LinearPlan.of(
            lengths, *self.weight.shape, self.dtype, needs_hidden=needs.hidden, needs_weight=needs.weight,
            needs_bias=needs.bias, weight_dtype=self.weight.dtype, hidden_rows=self.hidden.shape[:-1].numel(),
            hidden_dtype=self.hidden.dtype, max_logits_bytes=self.chunking.max_logits_bytes, device=self.hidden.device,
            widest=None if self.shard is None else self.shard.widest, needs_adapter=needs.adapter,
            adapter_rank=0 if self.adapter_a is None else self.adapter_a.shape[0],
            adapter_dtype=None if self.adapter_a is None else self.adapter_a.dtype, **options,
        )  # fmt: skip

    def flops(self, needs: Needs, reordered: bool = False, **options: Any) -> int:
        """The FLOPs of the plan's GEMMs; `reordered` as in LinearKTO."""
        if isinstance(self.labels, FakeTensor):  # no values to look at: every row counts
            return self.plan([self.labels.numel()], needs, **options | {"pairs": None}).flops
        _, scored = scored_targets(self.completions, self.scoring, self.vocab)
        lengths = scored_counts(scored, self.cu_seqlens).tolist()
        return self.plan(neighbours_of(lengths) if reordered else lengths, needs, **options).flops

    # Results ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def tokens(self, walked: Walk, rows: ScoredRows) -> dict[str, Tensor]:
        """Labels-shaped log-probabilities and outputs; an output that was not asked for is empty."""
        found = {name: rows.scatter(values) for name, values in walked.outputs.items()}
        missing = {name: walked.logps.new_empty(0) for name in OUTPUTS if name not in found}
        return {"logps": rows.scatter(walked.logps)} | found | missing

    def fake_tokens(self) -> dict[str, Tensor]:
        dtype, asked = reference.compute_dtype(self.dtype), self.chunking.outputs
        values = {name: torch.bool if name == "is_top1" and name in asked else dtype for name in OUTPUTS}
        empty = functools.partial(torch.empty, device=self.hidden.device)
        found = {name: empty(self.labels.shape if name in asked else 0, dtype=values[name]) for name in OUTPUTS}
        return {"logps": empty(self.labels.shape, dtype=dtype)} | found

    def gradients(self, walked: Walk, divisor: Tensor | None) -> Gradients:
        head = walked.head.result(self._gradient_kinds(walked.head.needs), divisor, self.hidden.device)
        return Gradients(walked.hidden, **head)

    def fake_gradients(self, needs: Needs) -> Gradients:
        empty = functools.partial(torch.empty, device=self.hidden.device)
        kinds = self._gradient_kinds(needs).items()
        hidden = empty(self.hidden.shape if needs.hidden else 0, dtype=self.hidden.dtype)
        return Gradients(hidden, **{name: empty(shape, dtype=dtype) for name, (shape, dtype) in kinds})

    def _gradient_kinds(self, needs: Needs) -> dict[str, tuple[Sequence[int], torch.dtype]]:
        """The shape and the dtype of the gradient of each tensor of the head."""
        vocab, width = self.weight.shape
        rank = 0 if self.adapter_a is None else self.adapter_a.shape[0]
        kinds = zip(HEAD_TENSORS, ((vocab, width), (vocab,), (rank, width), (vocab, rank)), self.trainable)
        return {
            name: (shape if getattr(needs, name) else (0,), gradient_dtype((self.weight if x is None else x).dtype))
            for name, shape, x in kinds
        }


@dataclass(frozen=True)
class Gradients:
    """The gradients of hidden states and head, each empty where it is not needed. The head's have `gradient_dtype`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    adapter_a: Tensor
    adapter_b: Tensor

    def as_results(self) -> dict[str, Tensor]:
        """The gradients by the names that they have in `LinearLoss`."""
        return {f"{name}_gradient": gradient for name, gradient in vars(self).items()}

    def wanted(self, needs: dict[str, bool], dtypes: dict[str, torch.dtype]) -> dict[str, Tensor | None]:
        """The needed gradients by name, each in the dtype of its tensor."""
        return {name: gradient.to(dtypes[name]) for name, gradient in vars(self).items() if needs[name]}


def _without_autocast(function):
    """The function with autocast off, so that GEMMs run in the dtype of the call."""

    @functools.wraps(function)
    def run(call):
        if not autocasts(call.side.hidden.device.type):
            return function(call)
        with torch.autocast(call.side.hidden.device.type, enabled=False):
            return function(call)

    return run


_HANDED_OVER = (
    "kto_kernels: the gradients of linear_* are formed in the forward and handed over by the first backward; for a second "
    "one call it again"
)


def _own(backward: Backward, gradient: Tensor, upstream: Tensor) -> Tensor:
    """A gradient that the forward formed, for the backward to scale in place and return: the saved tensor itself, so
    that memory holds one copy. A graph must not change what its forward returned: it gets a clone, which the compiler
    drops where it can."""
    if not (backward.kept["inplace_backward"] and type(gradient) is Tensor):
        return gradient.clone()
    backward.spend(upstream)
    return gradient


# Token log-probabilities ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class LinearTokenLogps:
    """A call of `linear_token_logps`."""

    side: Projected
    gradient: bool  # whether the hidden states' gradient is formed
    inplace_backward: bool  # whether the backward may scale the gradient formed here in place: no caller holds it


@dataclass(frozen=True)
class LinearTokens:
    logps: Tensor  # labels-shaped, as are the outputs that follow
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    hidden_gradient: Tensor  # like hidden, without coefficients; empty where no gradient is formed


@functools.partial(Operator, reads_on_the_host=True)
@_without_autocast
def linear_token_logps(call: LinearTokenLogps) -> LinearTokens:
    side, needs = call.side, Needs(hidden=call.gradient)
    backend = side.backend()
    rows = side.rows(backend)
    walked = walk(rows, side.head(), side.plan(rows.lengths, needs), backend, needs, side.chunking.outputs)
    return LinearTokens(**side.tokens(walked, rows), hidden_gradient=walked.hidden)


@linear_token_logps.fake
def _(call: LinearTokenLogps) -> LinearTokens:
    hidden = call.side.fake_gradients(Needs(hidden=call.gradient)).hidden
    return LinearTokens(**call.side.fake_tokens(), hidden_gradient=hidden)


@linear_token_logps.flops
def _(call: LinearTokenLogps) -> int:
    return call.side.flops(Needs(hidden=call.gradient))


@dataclass(frozen=True)
class LinearBackward:
    """A call of `linear_backward`."""

    grad: Tensor  # labels-shaped
    entropy_grad: Tensor | None  # labels-shaped
    side: Projected
    needs: Needs


@functools.partial(Operator, reads_on_the_host=True)
@_without_autocast
def linear_backward(call: LinearBackward) -> Gradients:
    side, needs = call.side, call.needs
    backend = side.backend()
    rows = side.rows(backend)
    plan = side.plan(rows.lengths, needs, known_coefficients=True)
    grads = [None if grad is None else grad.flatten()[rows.positions] for grad in (call.grad, call.entropy_grad)]
    divisor = None
    if side.dtype == torch.float16:  # makes coefficients near 1, so that products with them do not underflow
        largest = [grad.abs().amax() for grad in grads if grad is not None and len(grad)]
        divisor = power_of_two_below(torch.stack(largest or [call.grad.new_ones(())]).amax())
        grads = [None if grad is None else grad / divisor for grad in grads]
    of_logps, of_entropies = grads
    if of_entropies is None:
        coefficients = KnownCoefficients(of_logps)
    else:
        coefficients = LogpAndEntropyCoefficients(of_logps, of_entropies)
    walked = walk(rows, side.head(), plan, backend, needs, coefficients=coefficients)
    if needs.hidden:
        # With gradients of entropies, the rows' gradients contain their coefficients already.
        factors = of_logps if of_entropies is None else torch.ones_like(of_logps)
        _scale_rows_(walked.hidden, rows.scatter(factors if divisor is None else factors * divisor))
    return side.gradients(walked, divisor)


@linear_backward.fake
def _(call: LinearBackward) -> Gradients:
    return call.side.fake_gradients(call.needs)


@linear_backward.flops
def _(call: LinearBackward) -> int:
    return call.side.flops(call.needs, known_coefficients=True)


def _save_tokens(call: LinearTokenLogps, result: LinearTokens) -> dict[str, Any]:
    side = call.side
    # The entropy's gradient, which few ask for, is made in the backward, from logits computed once more.
    again = not call.gradient or "entropy" in _through(call)
    return {
        "formed": result.hidden_gradient if call.gradient else None,
        "hidden": side.hidden if again else None,
        **{name: x if again else None for name, x in zip(HEAD_TENSORS, side.trainable)},
        "labels": side.labels,
        "cu_seqlens": side.cu_seqlens,
        "scored_lengths": side.scored_lengths if again else None,
        "options": {
            "scoring": side.scoring,
            "chunking": replace(side.chunking, outputs=()),
            "dtype": side.dtype,
            "shard": side.shard,
            "adapter_scaling": side.adapter_scaling,
        },
        "inplace_backward": call.inplace_backward,
    }


def _tokens_gradient(backward: Backward, grads: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    backward.unspent(_HANDED_OVER)
    saved, numbers = backward.saved()
    grad, entropy_grad, options = grads["logps"], grads.get("entropy"), saved["options"]
    if saved["formed"] is not None and entropy_grad is None:
        scoring, labels = options["scoring"], saved["labels"]
        targets = reference.targets(labels, scoring.shift, scoring.ignore_index, saved["cu_seqlens"])
        formed = _own(backward, saved["formed"], grad)
        scale_rows_(ScaleRows(formed, torch.where(targets != scoring.ignore_index, grad, 0.0)))
        return {"hidden": formed}
    if grad is None:
        grad = torch.zeros_like(entropy_grad)
    tensors = ("hidden", *HEAD_TENSORS, "labels", "cu_seqlens", "scored_lengths")
    side = Projected(**{name: saved[name] for name in tensors}, **options)
    needs = Needs(**{name: backward.needs[name] for name in _OF})
    gradients = linear_backward(LinearBackward(grad, entropy_grad, side, needs), numbers)
    return gradients.wanted(backward.needs, _dtypes(side))


def _dtypes(side: Projected) -> dict[str, torch.dtype]:
    tensors = zip(_OF, (side.hidden, *side.trainable))
    return {name: tensor.dtype for name, tensor in tensors if tensor is not None}


# The whole loss ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class LinearKTO:
    """A call of `linear_kto`."""

    side: Projected
    judged: Judged
    objective: Objective  # whose reduction is "mean" or "sum"
    needs: Needs
    preference: Preference | None = None  # the loss, where it is not the KTO loss of `objective`
    open_sequences: list[bool] | None = None  # (B,) which sequences have tokens on other ranks too
    context_group: str | None = None  # the group of these ranks, by name
    token_weights: Tensor | None = None  # labels-shaped, of the rows that score each label
    ref_token_logps: Tensor | None = None  # labels-shaped, with a preference's `humanline`
    inplace_backward: bool = True  # as in LinearTokenLogps

    @property
    def terms(self) -> Terms:
        return Terms(
            self.token_weights, self.ref_token_logps, None if self.preference is None else self.preference.humanline
        )

    @property
    def reordered(self) -> bool:
        """Whether the walk takes the members of a pair one after the other, which are given in two halves."""
        return self.preference is not None and self.preference.reordered

    @property
    def planned(self) -> dict[str, Any]:
        """How the plan deals with sequences."""
        opened, pairs = self.open_sequences, None
        if self.preference is not None and self.preference.compares:
            pairs = "margin" if self.preference.margin_alone else "both"
        if opened is not None and self.reordered:
            opened = neighbours_of(opened)
        return {"long_sequences": self.side.chunking.long_sequences, "open_sequences": opened, "pairs": pairs}


@dataclass(frozen=True)
class LinearLoss:
    loss: Tensor  # ()
    sequence_logps: Tensor  # (B,)
    rewards: Tensor  # (B,) fp64
    slopes: Tensor  # (B,) ∂loss/∂(term of a token)
    row_slopes: Tensor  # labels-shaped ∂(term)/∂(token log-probability); empty where terms are log-probabilities
    logps: Tensor  # labels-shaped, as are the outputs that follow
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    hidden_gradient: Tensor
    weight_gradient: Tensor
    bias_gradient: Tensor
    adapter_a_gradient: Tensor
    adapter_b_gradient: Tensor


@functools.partial(Operator, reads_on_the_host=True)
@_without_autocast
def linear_kto(call: LinearKTO) -> LinearLoss:
    side, needs, objective = call.side, call.needs, call.objective
    backend = side.backend()
    rows, judged, preference = side.rows(backend), call.judged, call.preference
    if call.reordered:
        rows, judged, preference = (x.neighbours() for x in (rows, judged, preference))
    plan = side.plan(rows.lengths, needs, **call.planned)
    group = None if call.context_group is None else by_name(call.context_group)
    how = (backend, rows.lengths, rows.counts, judged, objective, side.dtype, call.terms.at(rows.positions), group)
    coefficients = KTOCoefficients(*how) if preference is None else PreferenceCoefficients(*how, preference=preference)
    walked = walk(rows, side.head(), plan, backend, needs, side.chunking.outputs, coefficients)
    logps = coefficients.logps
    if preference is None:
        of_loss = (judged.ref_logps, judged.z0, judged.desirable, objective)
        losses, _, rewards = backend.value_stages(logps, *of_loss)
    else:
        losses, rewards = preference.losses(judged, logps), preference.rewards(judged, logps)
    # A sequence without rows has no coefficient, whatever its loss makes of nothing.
    slopes = torch.where(rows.counts == 0, 0.0, coefficients.slopes)
    by_sequence = {"sequence_logps": logps, "rewards": rewards, "slopes": slopes}
    if call.reordered:
        by_sequence = {name: halves(values) for name, values in by_sequence.items()}
    return LinearLoss(
        loss=reference.reduce(losses, objective.reduction).to(reference.compute_dtype(side.dtype)),
        **by_sequence,
        row_slopes=rows.scatter(coefficients.row_slopes) if call.terms else logps.new_empty(0),
        **side.tokens(walked, rows),
        **side.gradients(walked, coefficients.divisor).as_results(),
    )


@linear_kto.fake
def _(call: LinearKTO) -> LinearLoss:
    side, empty = call.side, functools.partial(torch.empty, device=call.side.hidden.device)
    return LinearLoss(
        loss=empty((), dtype=reference.compute_dtype(side.dtype)),
        sequence_logps=empty(call.judged.desirable.shape, dtype=torch.float64),
        rewards=empty(call.judged.desirable.shape, dtype=torch.float64),
        slopes=empty(call.judged.desirable.shape, dtype=torch.float64),
        row_slopes=empty(side.labels.shape if call.terms else 0, dtype=torch.float64),
        **side.fake_tokens(),
        **side.fake_gradients(call.needs).as_results(),
    )


@linear_kto.flops
def _(call: LinearKTO) -> int:
    return call.side.flops(call.needs, call.reordered, **call.planned)


def _save_loss(call: LinearKTO, result: LinearLoss) -> dict[str, Any]:
    return {
        "cu_seqlens": call.side.cu_seqlens,
        "slopes": result.slopes,
        "row_slopes": result.row_slopes if call.terms else None,
        **{name: getattr(result, f"{name}_gradient") for name in _OF},
        "dtypes": _dtypes(call.side),
        "backend": call.side.scoring.backend,
        "inplace_backward": call.inplace_backward,
    }


def _loss_gradient(backward: Backward, grads: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    backward.unspent(_HANDED_OVER)
    saved, _ = backward.saved()
    grad, needs, cu_seqlens = grads["loss"], backward.needs, saved["cu_seqlens"]
    gradients = Gradients(**{name: _own(backward, saved[name], grad) for name in _OF})
    if needs["hidden"]:
        # A saturated sequence (slope 0) has gradient 0, even where the upstream gradient is not finite.
        slopes, rows = torch.where(saved["slopes"] == 0, 0.0, saved["slopes"] * grad), gradients.hidden.shape[:-1]
        if cu_seqlens is None:
            factors = slopes.unsqueeze(-1).expand(rows)
        else:
            factors = slopes.repeat_interleave(cu_seqlens.diff(), output_size=rows.numel())
        if saved["row_slopes"] is not None:
            factors = torch.where(saved["row_slopes"] == 0, 0.0, factors * saved["row_slopes"])
        scale_rows_(ScaleRows(gradients.hidden, factors))
    for name in HEAD_TENSORS:
        if needs[name]:
            scale_(Scaling(getattr(gradients, name), grad, saved["backend"]))
    return gradients.wanted(needs, saved["dtypes"])


# Scaling by upstream gradients ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Scaling:
    """A call of `scale_`."""

    tensor: Tensor  # contiguous
    factor: Tensor  # ()
    backend: str


@functools.partial(Operator, mutates="tensor")
def scale_(call: Scaling) -> None:
    select(call.backend, call.tensor.device, call.tensor.dtype).scale_(call.tensor, call.factor)


@dataclass(frozen=True)
class ScaleRows:
    """A call of `scale_rows_`."""

    tensor: Tensor  # (..., H), contiguous
    factors: Tensor  # (...)


@functools.partial(Operator, mutates="tensor")
def scale_rows_(call: ScaleRows) -> None:
    _scale_rows_(call.tensor, call.factors)


def _scale_rows_(tensor: Tensor, factors: Tensor) -> None:
    # In parts: where dtypes differ, PyTorch copies on the CPU.
    parts = (tensor.view(-1, tensor.shape[-1]).split(4096), factors.reshape(-1, 1).split(4096))
    for part, factor in zip(*parts):
        part.mul_(factor)


scale_.fake(lambda call: None)
scale_rows_.fake(lambda call: None)


def _through(call: LinearTokenLogps) -> tuple[str, ...]:
    """The differentiable results. In a vocabulary group the entropy is for logging only."""
    entropy = "entropy" in call.side.chunking.outputs and call.side.shard is None
    return ("logps", "entropy") if entropy else ("logps",)


_OF = ("hidden", *HEAD_TENSORS)
linear_token_logps.autograd(of=_OF, through=_through, save=_save_tokens, backward=_tokens_gradient)
linear_kto.autograd(of=_OF, through=lambda call: ("loss",), save=_save_loss, backward=_loss_gradient)
