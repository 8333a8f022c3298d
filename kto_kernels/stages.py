"""The stages on their own, for any other loss. They meet every other library at the seam behind `token_logps`:

token_logps, linear_token_logps → sequence_logps → kl_reference_point → value → loss
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, dtensor, linear_ops, ops, reference
from .backends import select
from .distributed import Ranks, fingerprints, sums_over_ranks
from .output import KTOOutput
from .plan import LinearPlan

LOSS_TYPES = ("kto", "apo_zero_unpaired")
REDUCTIONS = ("mean", "sum", "none")


def token_logps(
    logits: Tensor,  # (B, T, V) or (N, V)
    labels: Tensor,  # (B, T) or (N,)
    *,
    shift: bool = False,
    ignore_index: int = -100,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    vocab_group: Any = None,
    vocab: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Stage 1, the seam: `ℓ_n = log softmax(logits_n / temperature)[label_n]`, differentiable, in nats.

    Args: as for `kto_loss`; (N, V) logits are one sequence.

    Returns:
        Labels-shaped, fp32 (fp64 for fp64 logits); 0 at ignored positions, and with `shift` at the last one. A label
        whose logit is −inf gives −inf.

    Raises: as `kto_loss`.
    """
    ranks = Ranks.of(
        vocab_group=vocab_group, vocab=vocab, shift=shift, ignore_index=ignore_index, temperature=temperature
    )
    with ranks.checks(logits):
        given = logits
        logits, labels = dtensor.rows(ranks, logits=logits, labels=labels)
        checks.scoring(shift, ignore_index, temperature, backend)
        checks.rows(logits, labels, None, packed=False, sharded=ranks.vocab is not None)
        checks.vocabulary_size(vocab, logits.shape[-1], ranks.vocab is not None)
        checks.flag("inplace_backward", inplace_backward)
        if inplace_backward:
            checks.in_place(given)
        refuse_now(ranks, backend, logits)
        steps = common_steps(ranks, backend, logits.device, logits.dtype)
    shard = ranks.agree(
        labels, None, logits.shape[-1], ignore_index, steps=steps, shards={"logits": logits}, dtype=logits.dtype
    )
    return logits_scores(
        logits, labels, None, (shift, ignore_index, float(temperature)), inplace_backward, backend, shard
    )


def linear_token_logps(
    hidden: Tensor,  # (B, T, H) or (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, T) or (N,)
    *,
    bias: Tensor | None = None,  # (V,)
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    max_logits_bytes: int | None = None,
    vocab_group: Any = None,
    vocab: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Stage 1 from hidden states: `token_logps(hidden @ weight.T + bias, labels)`, differentiable in all three, without
    ever holding more than `max_logits_bytes` of logits.

    Where the head is frozen, the forward forms the hidden states' gradient too, which the backward only scales by rows:
    2G for any loss on top, one GEMM unit being `G = 2·N·H·V` FLOPs over the N scored tokens. A trained head (`weight`
    or `bias` requires grad) has its logits computed again in the backward: 4G. Without gradients: 1G.

    Args: as for `linear_kto_loss`; (N, H) hidden states are one sequence. The GEMMs run in autocast's dtype where it is
        on, else in that of `hidden`: a loss that compares two models gives the hidden states of both in one dtype.

    Returns:
        Labels-shaped, fp32 (fp64 for fp64 `hidden`); 0 at ignored positions, and with `shift` at the last one.

    Raises: as `linear_kto_loss`.
    """
    ranks = Ranks.of(
        vocab_group=vocab_group,
        vocab=vocab,
        shift=shift,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
    )
    with ranks.checks(hidden):
        hidden, labels = dtensor.rows(ranks, hidden=hidden, labels=labels)
        weight, bias = dtensor.heads(ranks, weight=weight, bias=bias)
        checks.scoring(shift, ignore_index, temperature, backend)
        checks.head_scale(logit_scale, softcap, max_logits_bytes)
        checks.head(hidden, weight, bias, sharded=ranks.vocab is not None)
        checks.vocabulary_size(vocab, weight.shape[0], ranks.vocab is not None)
        checks.hidden_rows(hidden, labels, None, packed=False)
        refuse_now(ranks, backend, hidden, weight, max_logits_bytes)
        dtype = gemm_dtype(hidden)
        steps = linear_steps(ranks, backend, hidden, weight, bias, max_logits_bytes)
    shard = ranks.agree(
        labels, None, weight.shape[0], ignore_index, steps=steps, shards={"weight": weight}, dtype=dtype
    )
    logps, *_ = linear_scores(
        hidden, weight, bias, labels, None, (shift, ignore_index, float(logit_scale), softcap, float(temperature)),
        max_logits_bytes, (), backend, shard=shard
    )  # fmt: skip
    return logps


def logits_scores(logits, labels, cu_seqlens, scoring, inplace_backward, backend, shard=None) -> Tensor:
    """The operator behind `token_logps`, of checked arguments."""
    shift, ignore_index, temperature = scoring
    scale, numbers = ops.as_arguments(1.0, None, temperature)
    logps, _ = ops.token_logps(
        logits, labels, cu_seqlens, shift, ignore_index, *scale, inplace_backward, backend,
        *(() if shard is None else shard.arguments), numbers=numbers
    )  # fmt: skip
    return logps


def refuse_now(
    ranks: Ranks, backend: str, values: Tensor, weight: Tensor | None = None, max_logits_bytes: int | None = None
) -> None:
    """What the operators would refuse later, when other ranks wait for this one already."""
    if not ranks:
        return
    if weight is None:
        select(backend, values.device, values.dtype)
    else:
        dtype = gemm_dtype(values)
        select(backend, values.device, dtype, "hidden, weight")
        columns, width = weight.shape
        LinearPlan.of((), max(1, columns), width, dtype, max_logits_bytes=max_logits_bytes, device=values.device)


def common_steps(
    ranks: Ranks, backend: str, device: torch.device, dtype: torch.dtype, argument: str = "logits", **more: Any
) -> dict[str, Any]:
    """What the ranks of a vocabulary group must do alike, for `Ranks.agree`: their backends' statistics meet."""
    return {} if ranks.vocab is None else {"backend": select(backend, device, dtype, argument).name, **more}


def linear_steps(
    ranks: Ranks, backend: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, max_logits_bytes: int | None,
    **more: Any
) -> dict[str, Any]:  # fmt: skip
    """Theirs from hidden states: the same chunks, and the same gradients."""
    grad = torch.is_grad_enabled()
    return common_steps(
        ranks,
        backend,
        hidden.device,
        gemm_dtype(hidden),
        "hidden, weight",
        max_logits_bytes=max_logits_bytes,
        hidden=(tuple(hidden.shape), hidden.dtype),
        weight_dtype=weight.dtype,
        requires_grad=[tensor is not None and grad and tensor.requires_grad for tensor in (hidden, weight, bias)],
        **more,
    )


# The device types that have autocast, of which alone PyTorch says whether it is on. They are asked for at import: before
# PyTorch 2.13 torch.compile cannot trace `torch.amp.is_autocast_available`.
_DEVICE_TYPES = ("cpu", "cuda", "xpu", "hpu", "mps", "mtia", "xla", torch._C._get_privateuse1_backend_name())
_WITH_AUTOCAST = tuple(filter(torch.amp.is_autocast_available, _DEVICE_TYPES))


def gemm_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which every side of a loss is scored, policy, reference and KL, given the policy's hidden states:
    autocast's where it is on, which leaves fp64 alone, else that of these hidden states. Heads and the other sides'
    hidden states are cast to it. Were each side scored in a dtype of its own, their log-probabilities would be apart by
    the rounding of logits, also where policy and reference are the same model."""
    device_type = hidden.device.type
    if hidden.dtype != torch.float64 and device_type in _WITH_AUTOCAST and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def linear_scores(
    hidden, weight, bias, labels, cu_seqlens, scoring, max_logits_bytes, outputs, backend, prefix="", dtype=None,
    shard=None,
):  # fmt: skip
    """The operator behind `linear_token_logps`, of checked arguments: (logps, entropy, mean_logits, is_top1), the last
    three empty where `outputs` has no such name. `dtype` is that of the policy's GEMMs where these hidden states are
    not the policy's."""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    shift, ignore_index, *scale = scoring
    scale, numbers = ops.as_arguments(*scale)
    logps, entropy, mean_logits, is_top1, _ = linear_ops.linear_token_logps(
        hidden,
        weight,
        bias,
        labels,
        cu_seqlens,
        shift,
        ignore_index,
        *scale,
        gemm_dtype(hidden) if dtype is None else dtype,
        max_logits_bytes,
        ",".join(outputs),
        torch.is_grad_enabled() and hidden.requires_grad and not trained,
        True,  # inplace_backward: the gradient stays here
        backend,
        prefix,
        *(() if shard is None else shard.arguments),
        numbers=numbers,
    )
    return logps, entropy, mean_logits, is_top1


def sequence_logps(
    logps: Tensor,  # (B, T) or (N,)
    *,
    labels: Tensor | None = None,  # like logps
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    average_log_prob: bool = False,
    ignore_index: int = -100,
    shift: bool = False,
    context_group: Any = None,
) -> Tensor:
    """Stage 2: the sum over each sequence of its token log-probabilities, or their mean over scored tokens.

    Args:
        logps: (B, T), or packed (N,) with `cu_seqlens`; floating, 0 where nothing is scored (as `token_logps` gives).
        labels: needed for `average_log_prob`, which counts the labels that are not `ignore_index` (and, with `shift`,
            are some position's next).
        context_group: each rank has some of every sequence's tokens; the sums are over all of them, on every rank, and
            each rank gets the gradient of its own tokens. `shift` must be False.

    Returns:
        (B,) fp64, differentiable: long sequences lose digits in fp32 that the difference to the reference needs.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    ranks = Ranks.of(context_group=context_group, average_log_prob=average_log_prob)
    with ranks.checks(logps):
        checks.tensor("logps", logps, checks.FLOATS)
        checks.flag("average_log_prob", average_log_prob)
        checks.flag("shift", shift)
        checks.integer("ignore_index", ignore_index)
        if logps.dim() != (2 if cu_seqlens is None else 1):
            raise ValueError(f"logps: expected (B, T), or (N,) with cu_seqlens; got shape {tuple(logps.shape)}")
        if cu_seqlens is not None:
            checks.offsets("cu_seqlens", cu_seqlens, logps)
            checks.offset_values("cu_seqlens", cu_seqlens, logps.shape[0])
        if labels is not None:
            checks.tensor("labels", labels, checks.INTEGERS, logps)
            checks.shape("labels", labels, tuple(logps.shape), "as logps")
        if average_log_prob and labels is None:
            raise ValueError("labels: needed with average_log_prob=True, to count the scored tokens")
        checks.unshifted(shift, ranks.context)
    if ranks:
        count = len(logps) if cu_seqlens is None else len(cu_seqlens) - 1
        ranks.agree_on(logps.device, parts=fingerprints(logps=logps.unsqueeze(-1)), sequences=count)
    scored = None
    if average_log_prob:
        scored = reference.targets(labels, shift, ignore_index, cu_seqlens) != ignore_index
    return sequence_sums(logps, scored, cu_seqlens, ranks)


def sequence_sums(logps: Tensor, scored: Tensor | None, cu_seqlens: Tensor | None, ranks: Ranks) -> Tensor:
    """Stage 2 over the ranks of the context group."""
    count = None if scored is None else reference.per_sequence(scored, cu_seqlens)
    total, count = sums_over_ranks(reference.per_sequence(logps, cu_seqlens), count, ranks.context)
    return total if count is None else reference.mean_logps(total, count)


def kl_reference_point(
    kl_logps: Tensor,  # (K,)
    ref_kl_logps: Tensor | None = None,  # (K,)
    *,
    process_group: Any = None,
) -> Tensor:
    """Stage 3: `z0 = max(0, mean_j(S^π_j − S^ref_j))` over mismatched completions, in nats; () fp64, no gradient.

    Without `ref_kl_logps` the reference counts as 0. An empty batch gives 0. With a `process_group` (a ProcessGroup, or
    a one-dimensional DeviceMesh) j runs over the completions of all its ranks: their sums and counts are added before
    the division and the clamp, by one all-reduce.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        RuntimeError: another rank's arguments are not; or torch.distributed is not initialised.
    """
    ranks = Ranks.of(process_group=process_group)
    with ranks.checks(kl_logps):
        checks.tensor("kl_logps", kl_logps, checks.FLOATS)
        checks.kl_pair(kl_logps, ref_kl_logps, None, kl_logps)
    return ranks.start_kl(kl_logps, ref_kl_logps, kl_logps)()


def kto_loss_from_logps(
    logps: Tensor,  # (B,)
    desirable: Tensor,  # (B,) bool
    *,
    ref_logps: Tensor | None = None,  # (B,)
    kl: Tensor | float | None = None,  # ()
    kl_logps: Tensor | None = None,  # (K,)
    ref_kl_logps: Tensor | None = None,  # (K,)
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
    reduction: str = "mean",
    process_group: Any = None,
) -> KTOOutput:
    """Stages 3 to 5: the loss from sequence log-probabilities, in plain PyTorch, differentiable in `logps`.

    Args and errors as for `kto_loss`; `logps` is (B,) floating, and the loss has its dtype (at least fp32).
    """
    ranks = Ranks.of(
        process_group=process_group,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        loss_type=loss_type,
        reduction=reduction,
    )
    with ranks.checks(logps):
        checks.tensor("logps", logps, checks.FLOATS)
        if logps.dim() != 1:
            raise ValueError(f"logps: expected shape (B,), got {tuple(logps.shape)}")
        beta, *weights = loss_options(beta, desirable_weight, undesirable_weight, loss_type, reduction)
        checks.desirable(desirable, logps.shape[0], logps)
        if ref_logps is not None:
            checks.sequences("ref_logps", ref_logps, logps.shape[0], "one per sequence", logps)
        checks.kl_pair(kl_logps, ref_kl_logps, None, logps)
        checks.kl_source(
            loss_type,
            kl,
            logps,
            has_reference=ref_logps is not None,
            has_kl=kl_logps is not None,
            has_ref_kl=ref_kl_logps is not None,
        )
    z0 = reference_point(kl, kl_logps, ref_kl_logps, logps, ranks)()
    return loss_output(
        logps, ref_logps, z0, desirable, beta, tuple(weights), reduction, reference.compute_dtype(logps.dtype)
    )


def before_policy(
    kl_pass: Callable[[], Tensor] | None,
    ref_kl_pass: Callable[[], Tensor] | None,
    ref_pass: Callable[[], Tensor] | None,
    given: tuple,
    like: Tensor,
    ranks: Ranks,
) -> tuple[Callable[[], Tensor], Tensor | None]:
    """What the policy's coefficients need, in an order that hides the reduction of z0 behind the reference's pass. Each
    pass computes sequence log-probabilities that are not among the given (kl, kl_logps, ref_kl_logps, ref_logps).

    Returns: what gives z0, and ref_logps (B,).
    """
    kl, kl_logps, ref_kl_logps, ref_logps = given
    with torch.no_grad():
        kl_logps = kl_logps if kl_pass is None else kl_pass()
        ref_kl_logps = ref_kl_logps if ref_kl_pass is None else ref_kl_pass()
        z0 = reference_point(kl, kl_logps, ref_kl_logps, like, ranks)
        return z0, ref_logps if ref_pass is None else ref_pass()


def reference_point(
    kl: Tensor | float | None, kl_logps: Tensor | None, ref_kl_logps: Tensor | None, like: Tensor, ranks: Ranks
) -> Callable[[], Tensor]:
    """Starts stage 3 on whichever KL source there is; what is returned gives z0 () fp64, 0 where there is none. A number
    is taken as it is: it does not say of how many completions it is the mean."""
    finish = ranks.start_kl(kl_logps, ref_kl_logps, like)
    if kl is None:
        return finish

    def given() -> Tensor:
        finish()
        if isinstance(kl, Tensor):
            return kl.detach().double().clamp(min=0)
        return torch.zeros((), dtype=torch.float64, device=like.device).add(ops.data(float(kl))).clamp(min=0)

    return given


def loss_output(
    logps: Tensor,  # (B,)
    ref_logps: Tensor | None,  # (B,)
    z0: Tensor,  # ()
    desirable: Tensor,  # (B,)
    beta: float | Tensor,
    weights: tuple[float | Tensor, float | Tensor],
    reduction: str,
    dtype: torch.dtype,
    loss: Tensor | None = None,  # where it is there already, with its own gradient
    **more,
) -> KTOOutput:
    """Stages 4 and 5 in plain PyTorch."""
    r = reference.log_ratio(logps, ref_logps)
    if loss is None:
        loss = reference.reduce(reference.loss(r, z0, desirable, beta, weights), reduction)
    detached = logps.detach().double()
    return KTOOutput(
        loss=loss.to(dtype),
        logps=detached,
        ref_logps=torch.zeros_like(detached) if ref_logps is None else ref_logps.detach().double(),
        rewards=(beta * r.detach()).to(dtype),
        kl=z0.to(dtype),
        desirable=desirable,
        reduction=reduction,
        **more,
    )


# Options that the losses share ────────────────────────────────────────────────────────────────────────────────────────


def loss_options(beta, desirable_weight, undesirable_weight, loss_type, reduction):
    """Checks the options of the stages after the seam; returns β, λ_D, λ_U (see `ops.data`)."""
    checks.choice("loss_type", loss_type, LOSS_TYPES)
    checks.choice("reduction", reduction, REDUCTIONS)
    return (
        ops.data(checks.number("beta", beta, positive=True)),
        ops.data(checks.number("desirable_weight", desirable_weight, positive=False)),
        ops.data(checks.number("undesirable_weight", undesirable_weight, positive=False)),
    )
