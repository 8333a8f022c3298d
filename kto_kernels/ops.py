"""The operators `torch.ops.kto_kernels.*`: schema, fake, autograd. Every backend is reached through them.

    token_logps        logits → token log-probabilities
    kto_forward        all five stages; its gradient is one scalar per sequence times the rows' softmax
    logits_backward    the gradient of either, into a new tensor or (logits_backward_) over the logits

Each is registered a second time, as `…_host`, for numbers that are data (see `Operator`).

Arguments are validated by `kto_kernels.checks` before they come here; what depends on the *values* of CPU tensors is
checked here, inside the operator, so that it breaks no graph.
"""

# No `from __future__ import annotations`: torch.library reads the schemas from the annotations.
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.library import custom_op

from . import shards
from .backends import select
from .checks import row_values
from .distributed import VocabShard
from .rows import LossOptions, Rows, Scale, Sequences

# How they are registered ──────────────────────────────────────────────────────────────────────────────────────────────


def _free_namespace() -> str:
    """`kto_kernels`, unless another copy of the package in this process has its operators there (two revisions, or one
    that is imported again): then the first free one of kto_kernels_2, kto_kernels_3, and so on. PyTorch would destroy
    the operators of the other copy, which goes on calling them."""
    names = itertools.chain(["kto_kernels"], (f"kto_kernels_{number}" for number in itertools.count(2)))
    return next(name for name in names if not hasattr(getattr(torch.ops, name), "token_logps"))


NAMESPACE = _free_namespace()

# The tags of operators that read values on the host: the number of scored rows, or numbers that are data. A CUDA graph
# would repeat what was read when it was captured, and a capture cannot wait for the device.
READS_ON_THE_HOST = (torch.Tag.cudagraph_unsafe,)


class Operator:
    """One function as two operators. NAME takes its numbers (floats, such as a temperature) as constants, and a CUDA
    graph may capture it. NAME_host takes those that are data as one tensor on the host, `numbers`, and reads it there.

    With KTO_KERNELS_DEBUG=1 at import NAME counts as reading too, because it looks at labels and offsets on the device.
    """

    def __init__(self, function: Callable, mutates_args: tuple[str, ...] = ()) -> None:
        name = f"{NAMESPACE}::{function.__name__}"
        tags = READS_ON_THE_HOST if os.environ.get("KTO_KERNELS_DEBUG") == "1" else ()
        self.constant = custom_op(name, function, mutates_args=mutates_args, tags=tags)
        self.host = custom_op(f"{name}_host", function, mutates_args=mutates_args, tags=READS_ON_THE_HOST)

    def __call__(self, *arguments: Any, numbers: Optional[Tensor] = None) -> Any:
        return (self.constant if numbers is None else self.host)(*arguments, numbers=numbers)

    def register_fake(self, fake: Callable) -> None:
        for operator in (self.constant, self.host):
            operator.register_fake(fake)

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        for operator in (self.constant, self.host):
            operator.register_autograd(backward, setup_context=setup_context)


# Numbers: constants, or data ──────────────────────────────────────────────────────────────────────────────────────────


def data(number: Optional[float]) -> Any:
    """A number as arithmetic on tensors takes it: itself, or where torch.compile has found that it changes from call to
    call, a () fp64 tensor on the CPU. As an operator's number it would be a constant of the graph, and each value would
    take a graph of its own."""
    if number is None or isinstance(number, Tensor) or not torch.compiler.is_compiling() or has_static_value(number):
        return number
    return torch.ones((), dtype=torch.float64, device="cpu") * number


def as_arguments(*values: Any) -> tuple[list[Optional[float]], Optional[Tensor]]:
    """Numbers as an operator takes them: (constants, `numbers`). Where one of them is data, all are in the tensor, and a
    constant only says whether there is a number at all."""
    values = [data(value) for value in values]
    if not any(isinstance(value, Tensor) for value in values):
        return values, None
    constants = [None if value is None else 1.0 for value in values]
    ones = torch.ones((), dtype=torch.float64, device="cpu")
    return constants, torch.stack([ones * (0.0 if value is None else value) for value in values])


def read(numbers: Optional[Tensor], *constants: Optional[float]) -> tuple[Optional[float], ...]:
    """The inverse, inside the operator. A backward is given the numbers of its forward, and reads the first of them."""
    if numbers is None:
        return constants
    return tuple(
        None if constant is None else number for constant, number in zip(constants, numbers.tolist(), strict=False)
    )


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


def check_unspent(ctx, message: str) -> None:
    """RuntimeError where an earlier backward of the same call has overwritten what the forward saved. A backward that
    does notes it in `ctx.spent` (a list, which the stand-in that compiled autograd has for `ctx` shares). Version
    counters do not tell under saved-tensor hooks, such as those of `save_on_cpu` or of a profiler."""
    if ctx.spent:
        raise RuntimeError(message)


# Token log-probabilities ──────────────────────────────────────────────────────────────────────────────────────────────


@Operator
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
    numbers: Optional[Tensor] = None,  # logit_scale, softcap, temperature, where they are data
) -> tuple[Tensor, Tensor]:
    shard = VocabShard.of(group, offset, vocab, widest)
    scale = Scale(*read(numbers, logit_scale, softcap, temperature))
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
    logits, labels, cu_seqlens, *ctx.options, ctx.inplace, ctx.backend, _, offset, vocab, _, numbers = inputs
    ctx.columns, ctx.spent = (offset, vocab), []
    logps, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, cu_seqlens, None, logps, statistics, numbers)


@once
def _token_logps_backward(ctx, grad, _statistics):
    return _logits_grad(ctx, grad), *(None,) * 14


# The whole loss ───────────────────────────────────────────────────────────────────────────────────────────────────────


@Operator
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
    numbers: Optional[Tensor] = None,  # as above, and beta, desirable_weight, undesirable_weight
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def rows(logits, labels, cu_seqlens):
        return None if logits is None else Rows(logits, labels, cu_seqlens, shift, ignore_index)

    *scale, beta, desirable_weight, undesirable_weight = read(
        numbers, logit_scale, softcap, temperature, beta, desirable_weight, undesirable_weight
    )
    chosen = select(backend, logits.device, logits.dtype)
    policy = rows(logits, labels, cu_seqlens)
    row_values(labels, cu_seqlens, policy.vocab, ignore_index)
    if kl_labels is not None:
        row_values(kl_labels, kl_cu_seqlens, policy.vocab, ignore_index, "kl_")
    result = chosen.kto_forward(
        policy,
        Scale(*scale),
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
    shift, ignore_index, logit_scale, softcap, temperature, inplace_backward, backend, numbers=None,
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
    *ctx.options, ctx.inplace, ctx.backend, numbers = inputs[19:]
    ctx.columns, ctx.spent = (), []
    _, *rest = output
    *_, coefficients, logps, statistics = rest
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, cu_seqlens, coefficients, logps, statistics, numbers)


@once
def _kto_backward(ctx, grad, *_):
    return _logits_grad(ctx, grad), *(None,) * 26


# Their gradient ───────────────────────────────────────────────────────────────────────────────────────────────────────


@Operator
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
    numbers: Optional[Tensor] = None,
) -> Tensor:
    chosen = select(backend, logits.device, logits.dtype)
    out = chosen.new_gradient(logits)
    rows = Rows.of(logits, labels, cu_seqlens, shift, ignore_index, offset, vocab)
    if rows.vocab > 0:
        scale = Scale(*read(numbers, logit_scale, softcap, temperature))
        chosen.logits_backward(rows, scale, grad, coefficients, token_logps, statistics, out)
    return out


@logits_backward.register_fake
def _(grad, coefficients, logits, *_, **__):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@functools.partial(Operator, mutates_args=("logits",))
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
    numbers: Optional[Tensor] = None,
) -> None:
    rows = Rows.of(logits, labels, cu_seqlens, shift, ignore_index, offset, vocab)
    if rows.vocab > 0:
        scale = Scale(*read(numbers, logit_scale, softcap, temperature))
        chosen = select(backend, logits.device, logits.dtype)
        chosen.logits_backward(rows, scale, grad, coefficients, token_logps, statistics, logits)


@logits_backward_.register_fake
def _(*_, **__):
    return None


_OVERWRITTEN = (
    "inplace_backward=True: the logits have been overwritten since the forward, by an earlier backward or by other code, "
    "so their gradient can no longer be computed"
)


def _logits_grad(ctx, grad: Optional[Tensor]) -> Optional[Tensor]:
    if grad is None or not ctx.needs_input_grad[0]:
        return None
    check_unspent(ctx, _OVERWRITTEN)
    try:
        logits, labels, cu_seqlens, coefficients, logps, statistics, numbers = ctx.saved_tensors
    except RuntimeError as error:
        if ctx.inplace and "modified by an inplace operation" in str(error):
            raise RuntimeError(_OVERWRITTEN) from error
        raise
    saved = (coefficients, logits, labels, cu_seqlens, logps, statistics)
    arguments = (grad, *saved, *ctx.options, ctx.backend, *ctx.columns)
    if not ctx.inplace:
        return logits_backward(*arguments, numbers=numbers)
    ctx.spent.append(True)
    logits_backward_(*arguments, numbers=numbers)
    return logits.detach()


token_logps.register_autograd(_token_logps_backward, _token_logps_context)
kto_forward.register_autograd(_kto_backward, _kto_context)
