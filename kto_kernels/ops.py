"""The operators `torch.ops.kto_kernels.*`: schema, fake, autograd. Every backend is reached through them.

    token_logps        logits → token log-probabilities
    kto_forward        all five stages; its gradient is one scalar per sequence times the rows' softmax
    logits_backward    the gradient of either, into a new tensor or (logits_backward_) over the logits

Arguments are validated by `kto_kernels.checks` before they come here; what depends on the *values* of CPU tensors is
checked here, inside the operator, so that it breaks no graph.
"""

# No `from __future__ import annotations`: torch.library reads the schemas from the annotations.
import functools
from typing import Optional

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from . import shards
from .backends import select
from .checks import row_values
from .distributed import VocabShard
from .rows import LossOptions, Rows, Scale, Sequences

# Gradients are made once ──────────────────────────────────────────────────────────────────────────────────────────────


class _NotTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient, anchor):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "kto_kernels: differentiating twice is not supported; the stages of kto_kernels.reference are plain "
            "PyTorch and allow it"
        )


def once(backward):
    """Whoever differentiates through the gradients that `backward` returns gets an error, not zeros."""

    @functools.wraps(backward)
    def guarded(ctx, *grads):
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return gradients
        anchor = torch.zeros((), requires_grad=True)
        return tuple(None if gradient is None else _NotTwice.apply(gradient, anchor) for gradient in gradients)

    return guarded


# Token log-probabilities ──────────────────────────────────────────────────────────────────────────────────────────────


@custom_op("kto_kernels::token_logps", mutates_args=())
def token_logps(
    logits: Tensor,  # (B, T, V) or (N, V)
    labels: Tensor,  # (B, T) or (N,)
    cu_seqlens: Optional[Tensor],  # (B + 1,)
    shift: bool,
    ignore_index: int,
    logit_scale: float,
    softcap: Optional[float],
    temperature: float,
    inplace_backward: bool,
    backend: str,
    group: Optional[str] = None,  # of ranks that have the other columns; then also
    offset: int = 0,  # this rank's first column,
    vocab: Optional[int] = None,  # the columns of all ranks,
    widest: int = 0,  # and the most that one has
) -> tuple[Tensor, Tensor]:
    shard, scale = VocabShard.of(group, offset, vocab, widest), Scale(logit_scale, softcap, temperature)
    chosen = select(backend, logits.device, logits.dtype)
    row_values(labels, cu_seqlens, logits.shape[-1] if vocab is None else vocab, ignore_index)
    rows = Rows.of(logits, labels, cu_seqlens, shift, ignore_index, offset, vocab)
    return chosen.token_logps(rows, scale) if shard is None else shards.token_logps(shard, chosen, rows, scale)


@token_logps.register_fake
def _(logits, labels, *_, **__):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logps = torch.empty(labels.shape, dtype=dtype, device=logits.device)
    return logps, logps.new_empty((2, *labels.shape))


def _token_logps_context(ctx, inputs, output):
    logits, labels, cu_seqlens, *ctx.options, ctx.inplace, ctx.backend, _, offset, vocab, _ = inputs
    ctx.columns = offset, vocab
    logps, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, cu_seqlens, None, logps, statistics)


@once
def _token_logps_backward(ctx, grad, _statistics):
    return _logits_grad(ctx, grad), *(None,) * 13


# The whole loss ───────────────────────────────────────────────────────────────────────────────────────────────────────


@custom_op("kto_kernels::kto_forward", mutates_args=())
def kto_forward(
    logits: Tensor,  # (B, T, V) or (N, V)
    labels: Tensor,  # (B, T) or (N,)
    cu_seqlens: Optional[Tensor],  # (B + 1,)
    desirable: Tensor,  # (B,) bool
    ref_logits: Optional[Tensor],  # like logits
    ref_logps: Optional[Tensor],  # (B,)
    kl: Optional[Tensor],  # ()
    kl_value: float,  # used where neither kl nor kl_* is given
    kl_logits: Optional[Tensor],  # (K, T', V) or (N', V)
    ref_kl_logits: Optional[Tensor],
    kl_logps: Optional[Tensor],  # (K,)
    ref_kl_logps: Optional[Tensor],
    kl_labels: Optional[Tensor],
    kl_cu_seqlens: Optional[Tensor],
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    average_log_prob: bool,
    reduction: str,
    shift: bool,
    ignore_index: int,
    logit_scale: float,
    softcap: Optional[float],
    temperature: float,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def rows(logits, labels, cu_seqlens):
        return None if logits is None else Rows(logits, labels, cu_seqlens, shift, ignore_index)

    chosen = select(backend, logits.device, logits.dtype)
    policy = rows(logits, labels, cu_seqlens)
    row_values(labels, cu_seqlens, policy.vocab, ignore_index)
    if kl_labels is not None:
        row_values(kl_labels, kl_cu_seqlens, policy.vocab, ignore_index, "kl_")
    result = chosen.kto_forward(
        policy,
        Scale(logit_scale, softcap, temperature),
        desirable,
        Sequences(rows(ref_logits, labels, cu_seqlens), ref_logps),
        kl_value if kl is None else kl,
        Sequences(rows(kl_logits, kl_labels, kl_cu_seqlens), kl_logps),
        Sequences(rows(ref_kl_logits, kl_labels, kl_cu_seqlens), ref_kl_logps),
        LossOptions(beta, desirable_weight, undesirable_weight, average_log_prob, reduction),
    )
    return (
        result.loss,
        result.logps,
        result.ref_logps,
        result.rewards,
        result.kl,
        result.coefficients,
        result.token_logps,
        result.statistics,
    )


@kto_forward.register_fake
def _(
    logits, labels, cu_seqlens, desirable, ref_logits, ref_logps, kl, kl_value, kl_logits, ref_kl_logits, kl_logps,
    ref_kl_logps, kl_labels, kl_cu_seqlens, beta, desirable_weight, undesirable_weight, average_log_prob, reduction,
    shift, ignore_index, logit_scale, softcap, temperature, inplace_backward, backend,
):  # fmt: skip
    dtype = torch.promote_types(logits.dtype, torch.float32)
    per_sequence = torch.empty(desirable.shape, dtype=dtype, device=logits.device)
    logps = torch.empty(desirable.shape, dtype=torch.float64, device=logits.device)
    scalar = per_sequence.new_empty(())
    tokens = torch.empty(labels.shape, dtype=dtype, device=logits.device)
    return (
        torch.empty_like(per_sequence) if reduction == "none" else torch.empty_like(scalar),
        logps,
        torch.empty_like(logps),
        per_sequence,
        scalar,
        torch.empty_like(per_sequence),
        tokens,
        tokens.new_empty((2, *labels.shape)),
    )


def _kto_context(ctx, inputs, output):
    logits, labels, cu_seqlens = inputs[:3]
    *ctx.options, ctx.inplace, ctx.backend = inputs[19:]
    ctx.columns = ()
    _, *rest = output
    *_, coefficients, logps, statistics = rest
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, cu_seqlens, coefficients, logps, statistics)


@once
def _kto_backward(ctx, grad, *_):
    return _logits_grad(ctx, grad), *(None,) * 25


# Their gradient ───────────────────────────────────────────────────────────────────────────────────────────────────────


@custom_op("kto_kernels::logits_backward", mutates_args=())
def logits_backward(
    grad: Tensor,  # labels-shaped; with coefficients () or (B,)
    coefficients: Optional[Tensor],  # (B,)
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Optional[Tensor],
    token_logps: Tensor,
    statistics: Tensor,
    shift: bool,
    ignore_index: int,
    logit_scale: float,
    softcap: Optional[float],
    temperature: float,
    backend: str,
    offset: int = 0,  # as for token_logps: the statistics are those of all ranks
    vocab: Optional[int] = None,
) -> Tensor:
    chosen = select(backend, logits.device, logits.dtype)
    out = chosen.new_gradient(logits)
    rows = Rows.of(logits, labels, cu_seqlens, shift, ignore_index, offset, vocab)
    if rows.vocab > 0:
        scale = Scale(logit_scale, softcap, temperature)
        chosen.logits_backward(rows, scale, grad, coefficients, token_logps, statistics, out)
    return out


@logits_backward.register_fake
def _(grad, coefficients, logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@custom_op("kto_kernels::logits_backward_", mutates_args=("logits",))
def logits_backward_(
    grad: Tensor,
    coefficients: Optional[Tensor],
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Optional[Tensor],
    token_logps: Tensor,
    statistics: Tensor,
    shift: bool,
    ignore_index: int,
    logit_scale: float,
    softcap: Optional[float],
    temperature: float,
    backend: str,
    offset: int = 0,
    vocab: Optional[int] = None,
) -> None:
    rows = Rows.of(logits, labels, cu_seqlens, shift, ignore_index, offset, vocab)
    if rows.vocab > 0:
        scale, chosen = Scale(logit_scale, softcap, temperature), select(backend, logits.device, logits.dtype)
        chosen.logits_backward(rows, scale, grad, coefficients, token_logps, statistics, logits)


@logits_backward_.register_fake
def _(*_):
    return None


def _logits_grad(ctx, grad: Optional[Tensor]) -> Optional[Tensor]:
    if grad is None or not ctx.needs_input_grad[0]:
        return None
    try:
        logits, labels, cu_seqlens, coefficients, logps, statistics = ctx.saved_tensors
    except RuntimeError as error:
        if ctx.inplace and "modified by an inplace operation" in str(error):
            raise RuntimeError(
                "inplace_backward=True: the logits have been overwritten since the forward, by an earlier backward or "
                "by other code, so their gradient can no longer be computed"
            ) from error
        raise
    saved = (coefficients, logits, labels, cu_seqlens, logps, statistics)
    arguments = (grad, *saved, *ctx.options, ctx.backend, *ctx.columns)
    if not ctx.inplace:
        return logits_backward(*arguments)
    logits_backward_(*arguments)
    return logits.detach()


register_autograd(token_logps, _token_logps_backward, setup_context=_token_logps_context)
register_autograd(kto_forward, _kto_backward, setup_context=_kto_context)
