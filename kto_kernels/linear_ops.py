"""The operators from hidden states, `torch.ops.kto_kernels.linear_*`: schema, fake, autograd, FLOP formulas.

    linear_token_logps   hidden states → token log-probabilities; with a frozen head also their gradient, of which the
                         backward scales the rows (2G)
    linear_backward      the gradients of the former where the head is trained: the logits once more (4G in all)
    linear_kto           the whole loss and the gradients of a trained head, formed in the forward (3G)
    scale_, scale_rows_  what upstream gradients are applied with, in place

One GEMM unit G and the plan of the chunks: `kto_kernels.plan`. Each operator is one opaque node to torch.compile: its
loop depends on how many tokens are scored.
"""

# No `from __future__ import annotations`: torch.library reads the schemas from the annotations.
from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import custom_op, register_autograd
from torch.utils.flop_counter import register_flop_formula

from . import checks, ops, reference
from .backends import select
from .distributed import VocabShard, by_name
from .linear import (
    BothCoefficients,
    Head,
    KnownCoefficients,
    LossCoefficients,
    Needs,
    ScoredRows,
    gradient_dtype,
    power_of_two_below,
    scored_lengths,
    scored_targets,
    walk,
)
from .plan import LinearPlan
from .rows import OUTPUTS, LossOptions, Scale

# What they share ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _frame(hidden, weight, bias, labels, cu_seqlens, shift, ignore_index, scale, dtype, backend, shard, prefix=""):
    """(backend, scored rows, head) of checked arguments; `prefix` is that of the labels, for messages."""
    chosen = select(backend, hidden.device, dtype, "hidden, weight")
    columns = weight.shape[0]
    checks.row_values(labels, cu_seqlens, columns if shard is None else shard.vocab, ignore_index, prefix)
    rows = ScoredRows.of(hidden, labels, cu_seqlens, shift, ignore_index, columns, shard)
    return chosen, rows, Head(weight.to(dtype), None if bias is None else bias.to(dtype), Scale(*scale))


def _plan(lengths, hidden, weight, dtype, needs, max_logits_bytes, widest=None, **options) -> LinearPlan:
    return LinearPlan.of(
        lengths,
        *weight.shape,
        dtype,
        needs_hidden=needs.hidden,
        needs_weight=needs.weight,
        needs_bias=needs.bias,
        weight_dtype=weight.dtype,
        hidden_rows=hidden.shape[:-1].numel(),
        hidden_dtype=hidden.dtype,
        max_logits_bytes=max_logits_bytes,
        device=hidden.device,
        widest=widest,
        **options,
    )


def _operator(name: str):
    """Registers an operator that reads on the host how many rows are scored."""
    return custom_op(f"{ops.NAMESPACE}::{name}", mutates_args=(), tags=ops.READS_ON_THE_HOST)


def _names(outputs: str) -> tuple[str, ...]:
    """Schemas know no lists of strings."""
    return tuple(filter(None, outputs.split(",")))


def _token_outputs(walked, rows, outputs: str) -> list[Tensor]:
    """Labels-shaped, in the order of OUTPUTS; empty where not asked for."""
    wanted = _names(outputs)
    return [rows.spread(walked.outputs[name]) if name in wanted else walked.logps.new_empty(0) for name in OUTPUTS]


def _fake_token_outputs(labels, outputs: str, dtype: torch.dtype) -> list[Tensor]:
    wanted = _names(outputs)
    return [
        torch.empty(
            labels.shape if name in wanted else 0,
            dtype=torch.bool if name == "is_top1" and name in wanted else dtype,
            device=labels.device,
        )
        for name in OUTPUTS
    ]


def _fake_gradients(hidden, weight, bias, needs_hidden, needs_weight, needs_bias) -> tuple[Tensor, Tensor, Tensor]:
    def empty(needed, shape, dtype):
        return torch.empty(shape if needed else 0, dtype=dtype, device=hidden.device)

    return (
        empty(needs_hidden, hidden.shape, hidden.dtype),
        empty(needs_weight, weight.shape, gradient_dtype(weight.dtype)),
        empty(needs_bias, weight.shape[:1], gradient_dtype((weight if bias is None else bias).dtype)),
    )


# Token log-probabilities ──────────────────────────────────────────────────────────────────────────────────────────────


@_operator("linear_token_logps")
def linear_token_logps(
    hidden: Tensor,  # (B, T, H) or (N, H)
    weight: Tensor,  # (V, H)
    bias: Optional[Tensor],  # (V,)
    labels: Tensor,  # (B, T) or (N,)
    cu_seqlens: Optional[Tensor],  # (B + 1,)
    shift: bool,
    ignore_index: int,
    logit_scale: float,
    softcap: Optional[float],
    temperature: float,
    dtype: torch.dtype,  # of the GEMMs
    max_logits_bytes: Optional[int],
    outputs: str,
    gradient: bool,  # whether the hidden states' is formed
    inplace_backward: bool,  # the caller keeps no gradient that this returns: the backward may scale it where it lies
    backend: str,
    prefix: str,  # of the labels' and offsets' names in messages
    group: Optional[str] = None,  # of ranks that share the vocabulary, as in `kto_kernels.ops`
    offset: int = 0,
    vocab: Optional[int] = None,
    widest: int = 0,
    numbers: Optional[Tensor] = None,  # logit_scale, softcap, temperature, where they are data
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scale = ops.read(numbers, logit_scale, softcap, temperature)
    with torch.autocast(hidden.device.type, enabled=False):
        chosen, rows, head = _frame(
            hidden, weight, bias, labels, cu_seqlens, shift, ignore_index, scale, dtype,
            backend, VocabShard.of(group, offset, vocab, widest), prefix
        )  # fmt: skip
        needs = Needs(hidden=gradient)
        plan = _plan(rows.lengths, hidden, weight, dtype, needs, max_logits_bytes, widest or None)
        walked = walk(rows, head, plan, chosen, needs, _names(outputs))
        return rows.spread(walked.logps), *_token_outputs(walked, rows, outputs), walked.hidden


@linear_token_logps.register_fake
def _(
    hidden, weight, bias, labels, cu_seqlens, shift, ignore_index, logit_scale, softcap, temperature, dtype,
    max_logits_bytes, outputs, gradient, inplace_backward, backend, prefix, *_, **__,
):  # fmt: skip
    float_dtype = reference.compute_dtype(dtype)
    return (
        torch.empty(labels.shape, dtype=float_dtype, device=labels.device),
        *_fake_token_outputs(labels, outputs, float_dtype),
        torch.empty(hidden.shape if gradient else 0, dtype=hidden.dtype, device=hidden.device),
    )


def _token_logps_context(ctx, inputs, output):
    hidden, weight, bias, labels, cu_seqlens, *options, _, ctx.formed, ctx.inplace, backend, _ = inputs[:17]
    *ctx.shard, numbers = inputs[17:]
    ctx.spent = []
    _, entropy, *extra, dhidden = output
    # Over ranks the entropy is for logging only.
    ctx.has_entropy = "entropy" in _names(inputs[12]) and ctx.shard[0] is None
    ctx.mark_non_differentiable(*extra, dhidden, *(() if ctx.has_entropy else (entropy,)))
    ctx.set_materialize_grads(False)
    ctx.options, ctx.backend = options, backend
    # The entropy's gradient, which few ask for, is made in the backward from the logits.
    inputs = (None,) * 3 if ctx.formed and not ctx.has_entropy else (hidden, weight, bias)
    ctx.save_for_backward(dhidden if ctx.formed else None, *inputs, labels, cu_seqlens, numbers)


@ops.once
def _token_logps_backward(ctx, grad, entropy_grad, *_):
    if grad is None and entropy_grad is None:
        return (None,) * 22
    ops.check_unspent(ctx, _HANDED_OVER)
    dhidden, hidden, weight, bias, labels, cu_seqlens, numbers = ctx.saved_tensors
    if ctx.formed and entropy_grad is None:
        shift, ignore_index = ctx.options[:2]
        scored = reference.targets(labels, shift, ignore_index, cu_seqlens) != ignore_index
        dhidden = _own(ctx, dhidden)
        scale_rows_(dhidden, torch.where(scored, grad, 0.0))
        return dhidden, *(None,) * 21
    needs = ctx.needs_input_grad[:3]
    gradients = linear_backward(
        torch.zeros_like(entropy_grad) if grad is None else grad,
        entropy_grad,
        hidden,
        weight,
        bias,
        labels,
        cu_seqlens,
        *ctx.options,
        *needs,
        ctx.backend,
        *ctx.shard,
        numbers=numbers,
    )
    return *_wanted(gradients, needs, _dtypes(hidden, weight, bias)), *(None,) * 19


_HANDED_OVER = (
    "kto_kernels: the gradients of linear_* are formed in the forward and handed over by the first backward; for a second "
    "one call it again"
)


def _own(ctx, gradient: Tensor) -> Tensor:
    """A gradient that the forward formed, as what may be scaled in place and handed over, so that there is no second
    copy. A traced graph must not change what its forward returned: its compiler decides where a copy is needed."""
    if not (ctx.inplace and type(gradient) is Tensor):
        return gradient.clone()
    ctx.spent.append(True)
    return gradient


def _dtypes(*tensors: Tensor | None) -> list[torch.dtype | None]:
    return [None if tensor is None else tensor.dtype for tensor in tensors]


def _wanted(gradients, needs, dtypes) -> tuple[Tensor | None, ...]:
    return tuple(gradient.to(dtype) if needed else None for gradient, needed, dtype in zip(gradients, needs, dtypes))


@_operator("linear_backward")
def linear_backward(
    grad: Tensor,  # labels-shaped
    entropy_grad: Optional[Tensor],  # labels-shaped
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    labels: Tensor,
    cu_seqlens: Optional[Tensor],
    shift: bool,
    ignore_index: int,
    logit_scale: float,
    softcap: Optional[float],
    temperature: float,
    dtype: torch.dtype,
    max_logits_bytes: Optional[int],
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
    group: Optional[str] = None,  # of ranks that share the vocabulary, as in `kto_kernels.ops`
    offset: int = 0,
    vocab: Optional[int] = None,
    widest: int = 0,
    numbers: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor]:
    scale = ops.read(numbers, logit_scale, softcap, temperature)
    with torch.autocast(hidden.device.type, enabled=False):
        chosen, rows, head = _frame(
            hidden, weight, bias, labels, cu_seqlens, shift, ignore_index, scale, dtype,
            backend, VocabShard.of(group, offset, vocab, widest)
        )  # fmt: skip
        needs = Needs(needs_hidden, needs_weight, needs_bias)
        plan = _plan(
            rows.lengths, hidden, weight, dtype, needs, max_logits_bytes, widest or None, known_coefficients=True
        )
        grads = [None if g is None else g.flatten()[rows.positions] for g in (grad, entropy_grad)]
        unit = None
        if dtype == torch.float16:  # coefficients near 1, so that products with them do not underflow
            largest = torch.stack([g.abs().amax() for g in grads if g is not None and len(g)] or [grad.new_ones(())])
            unit = power_of_two_below(largest.amax())
            grads = [None if g is None else g / unit for g in grads]
        coefficients = KnownCoefficients(grads[0]) if entropy_grad is None else BothCoefficients(*grads)
        walked = walk(rows, head, plan, chosen, needs, coefficients=coefficients)
        if needs.hidden:
            # With the entropy's the rows carry their coefficients already.
            factors = grads[0] if entropy_grad is None else torch.ones_like(grads[0])
            _scale_rows_(walked.hidden, rows.spread(factors if unit is None else factors * unit))
        return walked.hidden, *walked.head.result(weight, bias, unit)


@linear_backward.register_fake
def _(
    grad, entropy_grad, hidden, weight, bias, labels, cu_seqlens, shift, ignore_index, logit_scale, softcap,
    temperature, dtype, max_logits_bytes, needs_hidden, needs_weight, needs_bias, *_, **__,
):  # fmt: skip
    return _fake_gradients(hidden, weight, bias, needs_hidden, needs_weight, needs_bias)


# The whole loss ───────────────────────────────────────────────────────────────────────────────────────────────────────


@_operator("linear_kto")
def linear_kto(
    hidden: Tensor,  # (B, T, H) or (N, H)
    weight: Tensor,  # (V, H)
    bias: Optional[Tensor],  # (V,)
    labels: Tensor,  # (B, T) or (N,)
    cu_seqlens: Optional[Tensor],  # (B + 1,)
    desirable: Tensor,  # (B,) bool
    ref_logps: Optional[Tensor],  # (B,)
    z0: Tensor,  # ()
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    average_log_prob: bool,
    reduction: str,  # "mean" or "sum"
    shift: bool,
    ignore_index: int,
    logit_scale: float,
    softcap: Optional[float],
    temperature: float,
    dtype: torch.dtype,  # of the GEMMs
    max_logits_bytes: Optional[int],
    long_sequences: str,
    outputs: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    open_sequences: Optional[Sequence[bool]],  # (B,) which have tokens on other ranks too, of the
    context_group: Optional[str],
    inplace_backward: bool,  # as above
    backend: str,
    group: Optional[str] = None,  # of ranks that share the vocabulary, as in `kto_kernels.ops`
    offset: int = 0,
    vocab: Optional[int] = None,
    widest: int = 0,
    numbers: Optional[Tensor] = None,  # as above, and beta, desirable_weight, undesirable_weight
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *scale, beta, desirable_weight, undesirable_weight = ops.read(
        numbers, logit_scale, softcap, temperature, beta, desirable_weight, undesirable_weight
    )
    with torch.autocast(hidden.device.type, enabled=False):
        chosen, rows, head = _frame(
            hidden, weight, bias, labels, cu_seqlens, shift, ignore_index, scale, dtype,
            backend, VocabShard.of(group, offset, vocab, widest)
        )  # fmt: skip
        needs = Needs(needs_hidden, needs_weight, needs_bias)
        plan = _plan(
            rows.lengths, hidden, weight, dtype, needs, max_logits_bytes, widest or None,
            long_sequences=long_sequences, open_sequences=open_sequences
        )  # fmt: skip
        options = LossOptions(beta, desirable_weight, undesirable_weight, average_log_prob, reduction)
        coefficients = LossCoefficients(rows.lengths, ref_logps, z0, desirable, options, dtype, by_name(context_group))
        walked = walk(rows, head, plan, chosen, needs, _names(outputs), coefficients)
        r = reference.log_ratio(coefficients.logps, ref_logps)
        losses = reference.loss(r, z0, desirable, beta, options.weights)
        return (
            reference.reduce(losses, reduction).to(reference.compute_dtype(dtype)),
            coefficients.logps,
            coefficients.slopes,
            rows.spread(walked.logps),
            *_token_outputs(walked, rows, outputs),
            walked.hidden,
            *walked.head.result(weight, bias, coefficients.unit),
        )


@linear_kto.register_fake
def _(
    hidden, weight, bias, labels, cu_seqlens, desirable, ref_logps, z0, beta, desirable_weight, undesirable_weight,
    average_log_prob, reduction, shift, ignore_index, logit_scale, softcap, temperature, dtype, max_logits_bytes,
    long_sequences, outputs, needs_hidden, needs_weight, needs_bias, open_sequences, context_group, inplace_backward,
    backend, *_, **__,
):  # fmt: skip
    float_dtype = reference.compute_dtype(dtype)
    per_sequence = torch.empty(desirable.shape, dtype=torch.float64, device=hidden.device)
    return (
        torch.empty((), dtype=float_dtype, device=hidden.device),
        per_sequence,
        torch.empty_like(per_sequence),
        torch.empty(labels.shape, dtype=float_dtype, device=hidden.device),
        *_fake_token_outputs(labels, outputs, float_dtype),
        *_fake_gradients(hidden, weight, bias, needs_hidden, needs_weight, needs_bias),
    )


def _kto_context(ctx, inputs, output):
    hidden, weight, bias, labels, cu_seqlens = inputs[:5]
    _, _, slopes, *_, dhidden, dweight, dbias = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.inplace, ctx.backend = inputs[27:29]
    ctx.spent = []
    ctx.dtypes = _dtypes(hidden, weight, bias)
    ctx.save_for_backward(labels, cu_seqlens, slopes, dhidden, dweight, dbias)


@ops.once
def _kto_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 34
    ops.check_unspent(ctx, _HANDED_OVER)
    labels, cu_seqlens, slopes, *gradients = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = [_own(ctx, gradient) for gradient in gradients]
    if needs[0]:
        # A saturated sequence has gradient 0 whatever arrives from above.
        slopes = torch.where(slopes == 0, 0.0, slopes * grad)
        if cu_seqlens is None:
            rows = slopes.unsqueeze(-1).expand(labels.shape)
        else:
            rows = slopes.repeat_interleave(cu_seqlens.diff(), output_size=labels.numel())
        scale_rows_(gradients[0], rows)
    for gradient, needed in zip(gradients[1:], needs[1:]):
        if needed:
            scale_(gradient, grad, ctx.backend)
    return *_wanted(gradients, needs, ctx.dtypes), *(None,) * 31


# Upstream gradients, in place ─────────────────────────────────────────────────────────────────────────────────────────


@custom_op(f"{ops.NAMESPACE}::scale_", mutates_args=("tensor",))
def scale_(
    tensor: Tensor,  # contiguous
    factor: Tensor,  # ()
    backend: str,
) -> None:
    select(backend, tensor.device, tensor.dtype).scale_(tensor, factor)


@scale_.register_fake
def _(tensor, factor, backend):
    return None


@custom_op(f"{ops.NAMESPACE}::scale_rows_", mutates_args=("tensor",))
def scale_rows_(
    tensor: Tensor,  # (..., H), contiguous
    factors: Tensor,  # (...)
) -> None:
    _scale_rows_(tensor, factors)


@scale_rows_.register_fake
def _(tensor, factors):
    return None


def _scale_rows_(tensor: Tensor, factors: Tensor) -> None:
    # In parts: where dtypes differ, PyTorch copies on the CPU.
    parts = (tensor.view(-1, tensor.shape[-1]).split(4096), factors.reshape(-1, 1).split(4096))
    for part, factor in zip(*parts):
        part.mul_(factor)


register_autograd(linear_token_logps, _token_logps_backward, setup_context=_token_logps_context)
register_autograd(linear_kto, _kto_backward, setup_context=_kto_context)

_registered = getattr(torch.ops, ops.NAMESPACE)

# What FlopCounterMode counts: the GEMMs of the plan, over the scored rows ─────────────────────────────────────────────────


def _flops(
    hidden, weight, labels, cu_seqlens, shift, ignore_index, dtype, needs, max_logits_bytes, vocab, widest, **options
) -> int:  # fmt: skip
    if isinstance(labels, FakeTensor):  # no values to look at: every row counts
        lengths = [labels.numel()]
    else:
        _, scored = scored_targets(labels, cu_seqlens, shift, ignore_index, weight.shape[0] if vocab is None else vocab)
        lengths = scored_lengths(scored, cu_seqlens)
    return _plan(lengths, hidden, weight, dtype, needs, max_logits_bytes, widest or None, **options).flops


@register_flop_formula(_registered.linear_token_logps, get_raw=True)
def _(
    hidden, weight, bias, labels, cu_seqlens, shift, ignore_index, logit_scale, softcap, temperature, dtype,
    max_logits_bytes, outputs, gradient, inplace_backward, backend, prefix, group=None, offset=0, vocab=None, widest=0,
    numbers=None, out_val=None,
):  # fmt: skip
    needs = Needs(hidden=gradient)
    return _flops(
        hidden, weight, labels, cu_seqlens, shift, ignore_index, dtype, needs, max_logits_bytes, vocab, widest
    )


@register_flop_formula(_registered.linear_backward, get_raw=True)
def _(
    grad, entropy_grad, hidden, weight, bias, labels, cu_seqlens, shift, ignore_index, logit_scale, softcap,
    temperature, dtype, max_logits_bytes, needs_hidden, needs_weight, needs_bias, backend, group=None, offset=0,
    vocab=None, widest=0, numbers=None, out_val=None,
):  # fmt: skip
    needs = Needs(needs_hidden, needs_weight, needs_bias)
    return _flops(
        hidden, weight, labels, cu_seqlens, shift, ignore_index, dtype, needs, max_logits_bytes, vocab, widest,
        known_coefficients=True
    )  # fmt: skip


@register_flop_formula(_registered.linear_kto, get_raw=True)
def _(
    hidden, weight, bias, labels, cu_seqlens, desirable, ref_logps, z0, beta, desirable_weight, undesirable_weight,
    average_log_prob, reduction, shift, ignore_index, logit_scale, softcap, temperature, dtype, max_logits_bytes,
    long_sequences, outputs, needs_hidden, needs_weight, needs_bias, open_sequences, context_group, inplace_backward,
    backend, group=None, offset=0, vocab=None, widest=0, numbers=None, out_val=None,
):  # fmt: skip
    needs = Needs(needs_hidden, needs_weight, needs_bias)
    return _flops(
        hidden, weight, labels, cu_seqlens, shift, ignore_index, dtype, needs, max_logits_bytes, vocab, widest,
        long_sequences=long_sequences, open_sequences=open_sequences
    )  # fmt: skip
