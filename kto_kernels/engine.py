"""How a call runs. Read `run`: the five stages in order, around the seam behind the token log-probabilities.

Two kinds of calls take a shorter way, on which one operator does several stages: a loss from logits without groups of
ranks, and a loss from hidden states with a trained head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import checks, reference, scalars
from .backends import select
from .inputs import Inputs, Side
from .linear.head import Needs
from .linear.rows import check_values, counted, scored_targets
from .ops import linear, logits
from .ops.schema import observed
from .options import Chunking, Objective, Output, Scoring
from .output import KTOOutput
from .pairs import Judged, Preference
from .parallel.agreement import Agreed, Ranks
from .parallel.groups import group_size, sum_over_ranks, sums_over_ranks
from .records import Completions
from .terms import Terms


@dataclass(frozen=True)
class Call:
    """A call whose arguments are checked and whose ranks agree."""

    inputs: Inputs
    scoring: Scoring
    objective: Objective
    chunking: Chunking
    ranks: Ranks
    agreed: Agreed
    inplace_backward: bool
    preference: Preference | None = None

    @property
    def vocab(self) -> int:
        """The number of columns of the whole vocabulary."""
        return self.inputs.columns if self.agreed.shard is None else self.agreed.shard.vocab

    def check_values(self) -> None:
        """Checks all values that may be read before the first product of hidden states, where each side would find its
        own. (An operator checks its rows again, because a graph calls it alone; of logits there is one operator. Labels
        that wrap other tensors are left to it, which gets them unwrapped.)"""
        inputs = self.inputs
        if inputs.kind != "hidden" or not checks.readable(inputs.labels):
            return
        backend = select(self.scoring.backend, inputs.policy.device, inputs.dtype, "hidden, weight")
        for each in (inputs.judged, inputs.mismatched):
            if each.labels is not None and checks.plain(each.labels):
                check_values(each, self.scoring, self.vocab, backend)

    def counted(self) -> Call:
        """The call with the numbers of scored positions, where operators from hidden states would read them on a device
        one by one: all are read here, in one wait. An operator that is observed reads them itself."""
        inputs = self.inputs
        if (
            inputs.kind != "hidden"
            or not checks.has_values(inputs.labels)
            or checks.readable(inputs.labels)
            or observed()
        ):
            return self
        completions = [each for each in (inputs.judged, inputs.mismatched) if each.labels is not None]
        found = [each.scored_lengths for each in counted(completions, self.scoring, self.vocab)]
        return replace(self, inputs=replace(inputs, **dict(zip(("scored_lengths", "kl_scored_lengths"), found))))

    # Stage 1 ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def token_logps(self, side: Side, outputs: tuple[Output, ...] = ()) -> dict[str, Tensor]:
        """Token log-probabilities (`logps`), and the `outputs` asked for."""
        labels, cu_seqlens = side.completions.labels, side.completions.cu_seqlens
        if side.weight is None:
            call = logits.TokenLogps(
                side.values, labels, cu_seqlens, self.scoring, self.inplace_backward, self.agreed.shard
            )
            return {"logps": logits.token_logps(call).logps}
        projected = self.projected(side, outputs)
        frozen = not Needs(**self.inputs.trains).head
        forms = torch.is_grad_enabled() and side.values.requires_grad and frozen
        found = linear.linear_token_logps(linear.LinearTokenLogps(projected, forms, inplace_backward=True))
        return {name: getattr(found, name) for name in ("logps", *outputs)}

    def projected(self, side: Side, outputs: tuple[Output, ...] = ()) -> linear.Projected:
        chunking = Chunking(self.chunking.max_logits_bytes, self.chunking.long_sequences, outputs)
        scored = side.completions
        rows = (side.values, side.weight, side.bias, scored.labels, scored.cu_seqlens)
        how = (self.scoring, chunking, self.inputs.dtype, self.agreed.shard)
        adapter = () if side.adapter is None else (side.adapter.a, side.adapter.b, side.adapter.scaling)
        return linear.Projected(*rows, *how, scored.prefix, scored.scored_lengths, *adapter)

    # Stage 2 ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def scores(self, side: Side, ref_tokens: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """A side's token log-probabilities, given or scored from the side's values, and its sequence log-probabilities,
        given or the sums of the tokens' terms; (None, None): there is no such side."""
        if side.token_logps is not None:
            tokens = torch.where(self.scored(side.completions), side.token_logps.detach(), 0.0)
        elif side.values is not None:
            tokens = self.token_logps(side)["logps"]
        else:
            return None, side.logps
        return tokens, self.sums(tokens, side.completions, ref_tokens)

    def terms(self, completions: Completions, ref_tokens: Tensor | None = None) -> Terms:
        """How token log-probabilities become terms; `ref_tokens` are those of the reference, where the policy's
        log-ratios are to be clipped."""
        clip = None if self.preference is None or ref_tokens is None else self.preference.humanline
        return Terms(self.token_weights(completions), None if clip is None else ref_tokens, clip)

    def token_weights(self, completions: Completions) -> Tensor | None:
        """The weights of the positions that score each label."""
        weights = completions.token_weights
        if weights is None or not self.scoring.shift:
            return None if weights is None else weights.detach()
        return reference.shifted(weights.detach(), 0.0, completions.cu_seqlens)

    def sums(self, tokens: Tensor, completions: Completions, ref_tokens: Tensor | None = None) -> Tensor:
        terms = self.terms(completions, ref_tokens).values(tokens)
        counted = self.counted_tokens(completions) if self.objective.average_log_prob else None
        return sequence_sums(terms, counted, completions.cu_seqlens, self.ranks)

    def judged(self, ref_logps: Tensor | None, z0: Tensor) -> Judged:
        """All that a loss knows of the judged completions beside the policy's log-probabilities."""
        completions, desirable, group = self.inputs.judged, self.inputs.desirable, self.ranks.process
        if self.preference is None:
            return Judged(desirable, z0, ref_logps)
        lengths = reference.per_sequence(self.counted_tokens(completions), completions.cu_seqlens)
        lengths = sum_over_ranks(lengths, self.ranks.context)
        tokens = None
        if self.preference.objective.nll_weight > 0:
            tokens = sum_over_ranks(torch.where(desirable, lengths, 0.0).sum(), group) / group_size(group)
            tokens = torch.where(tokens == 0, 1.0, tokens)
        weights = self.inputs.sequence_weights
        return Judged(desirable, z0, ref_logps, lengths, weights, tokens, self.objective.average_log_prob)

    def counted_tokens(self, completions: Completions) -> Tensor:
        """What each position adds to its sequence's length: 1 or its weight, 0 where nothing is scored."""
        scored, weights = self.scored(completions), self.token_weights(completions)
        return scored if weights is None else torch.where(scored, weights, 0.0)

    def scored(self, completions: Completions) -> Tensor:
        return scored_targets(completions, self.scoring, self.vocab)[1]


def agree(
    inputs: Inputs,
    scoring: Scoring,
    objective: Objective,
    chunking: Chunking,
    ranks: Ranks,
    vocab: int | None = None,
    inplace_backward: bool = False,
    preference: Preference | None = None,
) -> Call:
    """The call, after its ranks have compared what they must share; without groups there is nothing to compare."""
    if not ranks:
        return Call(inputs, scoring, objective, chunking, ranks, Agreed(), inplace_backward, preference)
    scale = scoring.scale
    options = vars(objective) | vars(scale) | ({} if preference is None else preference.options)
    options |= {
        "shift": scoring.shift,
        "ignore_index": scoring.ignore_index,
        "adapter": None if inputs.adapter is None else (inputs.adapter.a.shape[0], float(inputs.adapter.scaling)),
        "vocab": None if vocab is None else int(vocab),
    }
    ranks = ranks.sharing(options | {"outputs": chunking.outputs})
    agreed = Agreed()
    if inputs.kind != "logps":
        completions = [each for each in (inputs.judged, inputs.mismatched) if each.labels is not None]
        heads = {"weight": inputs.weight, "ref_weight": inputs.ref_weight}
        shards = inputs.by_name if inputs.kind == "logits" else heads
        counts = [each.n_sequences for each in completions]
        layout = {"dtype": inputs.dtype} | dict(zip(("sequences", "mismatched"), counts))
        steps = _steps(inputs, scoring, chunking, ranks)
        size = (inputs.columns, scoring.ignore_index)
        agreed = ranks.agree(completions, *size, steps, shards=shards, tokens=inputs.by_name, **layout)
    return Call(inputs, scoring, objective, chunking, ranks, agreed, inplace_backward, preference)


def _steps(inputs: Inputs, scoring: Scoring, chunking: Chunking, ranks: Ranks) -> dict[str, Any]:
    """Further values that the ranks of a vocabulary group must share: one backend, because the ranks' statistics are
    merged, and from hidden states the same chunks and gradients."""
    if ranks.vocab is None:
        return {}
    argument = "logits" if inputs.kind == "logits" else "hidden, weight"
    backend = select(scoring.backend, inputs.policy.device, inputs.dtype, argument).name
    scored = {name: None if values is None else tuple(values.shape) for name, values in inputs.by_name.items()}
    if inputs.kind == "logits":
        return {"backend": backend, "scored": [shape is not None for shape in scored.values()]}
    return {
        "backend": backend,
        "max_logits_bytes": chunking.max_logits_bytes,
        "long_sequences": chunking.long_sequences,
        **{
            f"{each.prefix}scored_lengths": None if each.scored_lengths is None else each.scored_lengths.tolist()
            for each in (inputs.judged, inputs.mismatched)
        },
        "hidden": (scored.pop("hidden"), inputs.policy.dtype),
        "scored": list(scored.values()),
        "weight_dtype": inputs.weight.dtype,
        "requires_grad": list(inputs.trains.values()),
    }


def run(call: Call) -> KTOOutput:
    """The loss of a call."""
    call.check_values()
    call = call.counted()
    inputs, ranks = call.inputs, call.ranks
    if inputs.kind == "logits" and not ranks and call.preference is None:
        return _fused_from_logits(call)
    with torch.no_grad():
        ref_kl_tokens, ref_kl_logps = call.scores(inputs.side("ref_kl_"))
        _, kl_logps = call.scores(inputs.side("kl_"), ref_kl_tokens)
        z0 = start_reference_point(inputs.kl_value, kl_logps, ref_kl_logps, inputs.policy, ranks)
        ref_tokens, ref_logps = call.scores(inputs.side("ref_"))  # hides the exchange of z0
    policy, outputs = inputs.side(""), call.chunking.outputs
    if inputs.kind == "logps":
        return _output(call, policy.logps, call.judged(ref_logps, z0()))
    if inputs.kind == "hidden" and Needs(**inputs.trains).head and call.objective.reduction != "none":
        return _fused_from_hidden(call, call.judged(ref_logps, z0()), call.terms(inputs.judged, ref_tokens))
    tokens = call.token_logps(policy, outputs)
    logps = call.sums(tokens["logps"], policy.completions, ref_tokens)
    return _output(call, logps, call.judged(ref_logps, z0()), **tokens)


def _fused_from_logits(call: Call) -> KTOOutput:
    """The loss from logits, all five stages in one operator."""
    inputs, objective, kl = call.inputs, call.objective, call.inputs.kl_value
    call_of = logits.KTO(
        inputs.policy, inputs.labels, inputs.cu_seqlens, inputs.desirable, inputs.ref, inputs.ref_logps,
        kl if isinstance(kl, Tensor) else None, inputs.kl, inputs.ref_kl, inputs.kl_logps, inputs.ref_kl_logps,
        inputs.kl_labels, inputs.kl_cu_seqlens, call.scoring, objective,
        0.0 if kl is None or isinstance(kl, Tensor) else float(kl), call.inplace_backward,
    )  # fmt: skip
    found = logits.kto_forward(call_of)
    values = (found.loss, found.logps, found.ref_logps, found.rewards, found.kl)
    return KTOOutput(*values, inputs.desirable, found.token_logps, reduction=objective.reduction)


def _fused_from_hidden(call: Call, judged: Judged, terms: Terms) -> KTOOutput:
    """The loss from hidden states with a trained head: the policy's stages and all gradients in one operator."""
    inputs, outputs, context = call.inputs, call.chunking.outputs, call.ranks.context
    side, needs = call.projected(inputs.side(""), outputs), Needs(**inputs.trains)
    spread = (call.agreed.open_sequences, None if context is None else context.group_name)
    of_tokens = {"token_weights": terms.weights, "ref_token_logps": terms.ref_logps}
    of_call = linear.LinearKTO(side, judged, call.objective, needs, call.preference, *spread, **of_tokens)
    found = linear.linear_kto(of_call)
    tokens = {name: getattr(found, name) for name in ("logps", *outputs)}
    return _output(call, found.sequence_logps, judged, found.loss, found.rewards, **tokens)


def sequence_sums(logps: Tensor, scored: Tensor | None, cu_seqlens: Tensor | None, ranks: Ranks) -> Tensor:
    """Stage 2 over all ranks of the context group: sums, or means over scored tokens with the mask `scored`."""
    count = None if scored is None else reference.per_sequence(scored, cu_seqlens)
    total, count = sums_over_ranks(reference.per_sequence(logps, cu_seqlens), count, ranks.context)
    return total if count is None else reference.mean_logps(total, count)


def start_reference_point(
    kl: Tensor | float | None, kl_logps: Tensor | None, ref_kl_logps: Tensor | None, like: Tensor, ranks: Ranks
) -> Callable[[], Tensor]:
    """Starts stage 3 from the KL source given, and returns a function that finishes it: z0 () fp64, 0 without a source.
    A number `kl` is not averaged over ranks, because it does not say over how many completions it was taken."""
    finish = ranks.start_reference_point(kl_logps, ref_kl_logps, like)

    def z0() -> Tensor:
        found = finish()
        if isinstance(kl, Tensor):
            return kl.detach().double().clamp(min=0)
        return found if kl is None else found.add(scalars.data(float(kl))).clamp(min=0)

    return z0


def _output(
    call: Call,
    sequence_logps: Tensor,  # (B,)
    judged: Judged,
    loss: Tensor | None = None,  # given, with the rewards, where an operator has made it
    rewards: Tensor | None = None,  # (B,)
    logps: Tensor | None = None,  # labels-shaped, as are the outputs
    **outputs: Tensor,
) -> KTOOutput:
    """Stages 4 and 5 in plain PyTorch."""
    inputs, objective = call.inputs, call.objective
    dtype = reference.compute_dtype(inputs.dtype)
    ref_logps, z0 = judged.ref_logps, judged.z0
    if loss is None and call.preference is not None:
        rewards = call.preference.rewards(judged, sequence_logps)
        loss = reference.reduce(call.preference.losses(judged, sequence_logps), objective.reduction)
    elif loss is None:
        beta, r = scalars.data(objective.beta), reference.log_ratio(sequence_logps, ref_logps)
        rewards = beta * r.detach()
        losses = reference.loss(r, z0, inputs.desirable, beta, objective.weights)
        loss = reference.reduce(losses, objective.reduction)
    detached = sequence_logps.detach().double()
    return KTOOutput(
        loss=loss.to(dtype),
        logps=detached,
        ref_logps=torch.zeros_like(detached) if ref_logps is None else ref_logps.detach().double(),
        rewards=rewards.to(dtype),
        kl=z0.to(dtype),
        desirable=inputs.desirable,
        token_logps=None if logps is None else logps.detach(),
        **{name: values.detach() for name, values in outputs.items()},
        scored=call.scored(inputs.judged) if outputs else None,
        cu_seqlens=inputs.cu_seqlens if outputs else None,
        reduction=objective.reduction,
    )
