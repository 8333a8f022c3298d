"""The operators from logits, each of which selects a backend and calls it.

    token_logps        logits → token log-probabilities
    kto_forward        all five stages, and each sequence's coefficient for the backward
    logits_backward    the gradient of either; logits_backward_ writes it over the logits

`kto_kernels.inputs` has validated the arguments. The *values* of labels and offsets are checked inside the operators,
where the check breaks no graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, select
from ..options import Objective, Scoring
from ..parallel import vocabulary
from ..parallel.groups import VocabShard
from ..records import Completions, ForwardResult, Rows, Side
from ..reference import compute_dtype
from .schema import Backward, Operator

# Token log-probabilities ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class TokenLogps:
    """A call of `token_logps`."""

    logits: Tensor  # (B, T, V) or (N, V)
    labels: Tensor  # (B, T) or (N,)
    cu_seqlens: Tensor | None  # (B + 1,)
    scoring: Scoring
    inplace_backward: bool = False
    shard: VocabShard | None = None


@dataclass(frozen=True)
class ScoredTokens:
    logps: Tensor  # labels-shaped
    statistics: Tensor  # (2, *labels.shape), see `Backend.token_logps`


@Operator
def token_logps(call: TokenLogps) -> ScoredTokens:
    scoring, shard = call.scoring, call.shard
    backend = select(scoring.backend, call.logits.device, call.logits.dtype)
    rows = Rows(call.logits, call.labels, call.cu_seqlens, scoring.shift, scoring.ignore_index)
    vocab = rows.vocab if shard is None else shard.vocab
    backend.check_values(Completions(call.labels, call.cu_seqlens), vocab, scoring.ignore_index)
    if shard is None:
        return ScoredTokens(*backend.token_logps(rows, scoring.scale))
    return ScoredTokens(*vocabulary.token_logps(shard, backend, rows.of_shard(shard.offset, vocab), scoring.scale))


@token_logps.fake
def _(call: TokenLogps) -> ScoredTokens:
    logps = torch.empty(call.labels.shape, dtype=compute_dtype(call.logits.dtype), device=call.logits.device)
    return ScoredTokens(logps, logps.new_empty((2, *logps.shape)))


# The whole loss ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class KTO:
    """A call of `kto_forward`."""

    logits: Tensor  # (B, T, V) or (N, V)
    labels: Tensor  # (B, T) or (N,)
    cu_seqlens: Tensor | None  # (B + 1,)
    desirable: Tensor  # (B,) bool
    ref_logits: Tensor | None  # like logits
    ref_logps: Tensor | None  # (B,)
    kl: Tensor | None  # ()
    kl_logits: Tensor | None  # (K, T', V) or (N', V)
    ref_kl_logits: Tensor | None  # like kl_logits
    kl_logps: Tensor | None  # (K,)
    ref_kl_logps: Tensor | None  # (K,)
    kl_labels: Tensor | None  # (K, T') or (N',)
    kl_cu_seqlens: Tensor | None  # (K + 1,)
    scoring: Scoring
    objective: Objective
    kl_value: float = 0.0  # used where neither kl nor kl_* is given
    inplace_backward: bool = False


@Operator
def kto_forward(call: KTO) -> ForwardResult:
    scoring = call.scoring

    def rows(logits: Tensor | None, labels: Tensor | None, cu_seqlens: Tensor | None) -> Rows | None:
        if logits is None or labels is None:
            return None
        return Rows(logits, labels, cu_seqlens, scoring.shift, scoring.ignore_index)

    backend = select(scoring.backend, call.logits.device, call.logits.dtype)
    policy = Rows(call.logits, call.labels, call.cu_seqlens, scoring.shift, scoring.ignore_index)
    kl = rows(call.kl_logits, call.kl_labels, call.kl_cu_seqlens)
    ref_kl = rows(call.ref_kl_logits, call.kl_labels, call.kl_cu_seqlens)
    backend.check_values(Completions(call.labels, call.cu_seqlens), policy.vocab, scoring.ignore_index)
    if call.kl_labels is not None:
        mismatched = Completions(call.kl_labels, call.kl_cu_seqlens, "kl_")
        backend.check_values(mismatched, policy.vocab, scoring.ignore_index)
    return backend.kto_forward(
        policy,
        scoring.scale,
        call.desirable,
        Side(rows(call.ref_logits, call.labels, call.cu_seqlens), call.ref_logps),
        call.kl_value if call.kl is None else call.kl,
        Side(kl, call.kl_logps),
        Side(ref_kl, call.ref_kl_logps),
        call.objective,
    )


@kto_forward.fake
def _(call: KTO) -> ForwardResult:
    dtype = compute_dtype(call.logits.dtype)
    return ForwardResult.empty(call.labels, call.desirable.shape[0], call.objective, dtype)


# The gradient of both ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class LogitsBackward:
    """A call of `logits_backward` or `logits_backward_`."""

    grad: Tensor  # of the log-probabilities, labels-shaped; with coefficients of the loss, () or (B,)
    coefficients: Tensor | None  # (B,)
    logits: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    token_logps: Tensor
    statistics: Tensor  # of whole rows, also where a rank has a shard of the columns
    scoring: Scoring
    shard: VocabShard | None = None

    def write(self, backend: Backend, out: Tensor) -> None:
        scoring, shard = self.scoring, self.shard
        rows = Rows(self.logits, self.labels, self.cu_seqlens, scoring.shift, scoring.ignore_index)
        if shard is not None:
            rows = rows.of_shard(shard.offset, shard.vocab)
        if rows.vocab > 0:
            backend.logits_backward(
                rows, scoring.scale, self.grad, self.coefficients, self.token_logps, self.statistics, out
            )


@dataclass(frozen=True)
class LogitsGradient:
    logits: Tensor


@Operator
def logits_backward(call: LogitsBackward) -> LogitsGradient:
    backend = select(call.scoring.backend, call.logits.device, call.logits.dtype)
    out = backend.new_gradient(call.logits)
    call.write(backend, out)
    return LogitsGradient(out)


@logits_backward.fake
def _(call: LogitsBackward) -> LogitsGradient:
    return LogitsGradient(torch.empty(call.logits.shape, dtype=call.logits.dtype, device=call.logits.device))


def _over_the_logits(call: LogitsBackward) -> None:
    call.write(select(call.scoring.backend, call.logits.device, call.logits.dtype), call.logits)


_over_the_logits.__name__ = "logits_backward_"
logits_backward_: Operator = Operator(_over_the_logits, mutates="logits")
logits_backward_.fake(lambda call: None)

_OVERWRITTEN = (
    "inplace_backward=True: the logits have been overwritten since the forward, by an earlier backward or by other code, "
    "so their gradient can no longer be computed"
)


def _saved(call: TokenLogps | KTO) -> dict[str, Any]:
    names = ("logits", "labels", "cu_seqlens", "scoring", "inplace_backward")
    return {name: getattr(call, name) for name in names}


def _save_tokens(call: TokenLogps, result: ScoredTokens) -> dict[str, Any]:
    found = {"coefficients": None, "token_logps": result.logps, "statistics": result.statistics}
    return _saved(call) | found | {"shard": call.shard}


def _save_loss(call: KTO, result: ForwardResult) -> dict[str, Any]:
    names = ("coefficients", "token_logps", "statistics")
    return _saved(call) | {name: getattr(result, name) for name in names}


def _gradient(backward: Backward, grads: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    if not backward.needs["logits"]:
        return {}
    (grad,) = grads.values()
    backward.unspent(_OVERWRITTEN)
    try:
        saved, numbers = backward.saved()
    except RuntimeError as error:
        if backward.kept["inplace_backward"] and "modified by an inplace operation" in str(error):
            raise RuntimeError(_OVERWRITTEN) from error
        raise
    in_place = saved.pop("inplace_backward")
    call = LogitsBackward(grad=grad, **saved)
    if not in_place:
        return {"logits": logits_backward(call, numbers).logits}
    backward.spend(grad)
    logits_backward_(call, numbers)
    return {"logits": call.logits.detach()}


token_logps.autograd(of=("logits",), through=lambda call: ("logps",), save=_save_tokens, backward=_gradient)
kto_forward.autograd(of=("logits",), through=lambda call: ("loss",), save=_save_loss, backward=_gradient)
