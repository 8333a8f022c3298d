"""START HERE. The losses, from logits and from hidden states; both run the five stages, in the order in which data flows:

    token_logps → sequence_logps → kl_reference_point → value → loss

The formulas are in `kto_kernels.reference`, the stages on their own in `kto_kernels.stages`, the operators behind these
functions in `kto_kernels.ops` (from logits) and `kto_kernels.linear_ops` (from hidden states).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, dtensor, linear_ops, ops, reference
from .distributed import Ranks
from .linear import scored_targets
from .output import KTOOutput
from .plan import LONG_SEQUENCES
from .rows import OUTPUTS
from .stages import (
    before_policy,
    common_steps,
    gemm_dtype,
    linear_scores,
    linear_steps,
    logits_scores,
    loss_options,
    loss_output,
    refuse_now,
    sequence_sums,
)


def kto_loss(
    logits: Tensor,  # (B, T, V) or (N, V)
    labels: Tensor,  # (B, T) or (N,)
    desirable: Tensor,  # (B,) bool
    *,
    ref_logits: Tensor | None = None,  # like logits
    ref_logps: Tensor | None = None,  # (B,)
    kl: Tensor | float | None = None,  # ()
    kl_logps: Tensor | None = None,  # (K,)
    ref_kl_logps: Tensor | None = None,  # (K,)
    kl_logits: Tensor | None = None,  # (K, T', V) or (N', V)
    ref_kl_logits: Tensor | None = None,  # like kl_logits
    kl_labels: Tensor | None = None,  # (K, T') or (N',)
    kl_cu_seqlens: Tensor | None = None,  # (K + 1,)
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
    average_log_prob: bool = False,
    reduction: str = "mean",
    ignore_index: int = -100,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    temperature: float = 1.0,
    inplace_backward: bool = False,
    process_group: Any = None,
    vocab_group: Any = None,
    vocab: int | None = None,
    context_group: Any = None,
    backend: str = "auto",
) -> KTOOutput:
    """The KTO loss (Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8) and its gradient from logits.

    Reads every logit once forward, and once more (with one write) backward; the extra memory is O(N). The gradient
    goes to `logits` alone: none to the reference, none through the KL estimate.

    Args:
        logits: (B, T, V), or packed (N, V) with `cu_seqlens`; bf16, fp16, fp32 (fp64: backend "torch"). Any strides
            but along V: `logits[:, :-1]` costs no copy.
        labels: (B, T) or (N,), int32 or int64; `ignore_index` where nothing is scored (prompt, padding).
        desirable: (B,) bool, True for thumbs up.
        ref_logits: the frozen reference's logits, of the same shape and dtype as `logits`; or
        ref_logps: its sequence log-probabilities (B,), computed once. Neither: reference-free, `S^ref = 0`.
        kl: the KL estimate, one number or 0-d tensor (negative values count as 0); or
        kl_logps, ref_kl_logps: sequence log-probabilities (K,) of mismatched completions; or
        kl_logits, ref_kl_logits, kl_labels, kl_cu_seqlens: their logits and labels, laid out as `logits` are. Policy
            and reference may mix the two forms. With a reference the KL needs one too; without, it must have none.
        beta: how sharply the value saturates, > 0, in 1/nat.
        desirable_weight, undesirable_weight: λ_D and λ_U, >= 0.
        loss_type: "kto", or "apo_zero_unpaired" (arXiv 2408.06266): z0 = 0, no KL source allowed.
        average_log_prob: sequence log-probabilities are means over the scored tokens instead of sums.
        reduction: "mean" over B (0 for an empty batch), "sum", or "none".
        shift: position t predicts the label of t + 1 of its sequence (the transformers convention).
        cu_seqlens: (B + 1,) int32 or int64 offsets of packed sequences, from 0 to N.
        temperature: the logits are divided by it, > 0.
        inplace_backward: the gradient overwrites `logits`, which must be neither a leaf nor a view of one (the latter
            goes unnoticed under torch.compile); one backward only. A model's output is right as it is; to try it on a
            leaf, pass `logits * 1`.
        process_group, vocab_group, context_group: torch.distributed ProcessGroups, or one-dimensional DeviceMeshes
            (`mesh["dp"]`); the ranks of a group call with the same options. With any of them the stages are separate
            operators.
            process_group: data parallel. z0 is that of all ranks' mismatched completions, however many each has (none
            included): one all-reduce, hidden behind the policy's pass. `kl` as a number is taken as it is. Ranks may
            have the same completions: z0, a mean, does not change.
            vocab_group: each rank has some columns of every logits tensor, in the order of ranks, and the same rest. As
            many as it likes, none included; of a padded vocabulary pass the real ones, `logits[..., :n]`. One gather of
            three numbers a row for each tensor; the backward exchanges nothing. Every rank returns the same bits.
            Logits that are whole on every rank go without it: with it each column counts once for every rank, which
            `vocab` finds, and KTO_KERNELS_DEBUG=1.
            context_group: each rank has some tokens of every sequence, and the same B-sized tensors; packed ranks all
            have B + 1 offsets, into their own tokens. `shift` must be False. Every rank returns the whole loss, and gets the gradient
            of its own tokens: that of a parameter is the sum over the group, so a wrapper that averages over these ranks
            too needs the loss times their number. Whole sequences on every rank count once for every rank, which
            KTO_KERNELS_DEBUG=1 finds.
        vocab: the size of the whole vocabulary, to check against the columns given, with a `vocab_group` against the sum
            of all its ranks' columns. None: it is what is given.
        backend: "auto", or a name out of `available_backends()`.

    Logits and labels may be DTensors: their rows, and the columns of the vocabulary group, are this rank's; see
    `kto_kernels.dtensor`.

    Returns:
        KTOOutput.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it. Labels and offsets on a GPU are not
            looked at (that would wait for the device) but under KTO_KERNELS_DEBUG=1, see `kto_kernels.checks`.
        RuntimeError: the backend named is not available; another rank of a group has other options or failed its
            checks; or, in backward, the gradient is differentiated again, or the logits have been overwritten.

    Under KTO_KERNELS_DEBUG=1 (on all ranks or on none) also what each rank of a `vocab_group` or `context_group` holds is
    read: a ValueError on every rank where two hold the same numbers, unless these are one number throughout.
    """
    ranks = Ranks.of(
        process_group=process_group,
        vocab_group=vocab_group,
        vocab=vocab,
        context_group=context_group,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        loss_type=loss_type,
        average_log_prob=average_log_prob,
        reduction=reduction,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
    )
    with ranks.checks(logits):
        given = logits
        logits, labels, ref_logits, kl_logits, ref_kl_logits, kl_labels = dtensor.rows(
            ranks,
            logits=logits,
            labels=labels,
            ref_logits=ref_logits,
            kl_logits=kl_logits,
            ref_kl_logits=ref_kl_logits,
            kl_labels=kl_labels,
        )
        checks.scoring(shift, ignore_index, temperature, backend)
        sharded = ranks.vocab is not None
        count = checks.rows(logits, labels, cu_seqlens, sharded=sharded)
        checks.vocabulary_size(vocab, logits.shape[-1], sharded)
        scalars = loss_options(beta, desirable_weight, undesirable_weight, loss_type, reduction)
        checks.flag("average_log_prob", average_log_prob)
        checks.flag("inplace_backward", inplace_backward)
        if inplace_backward:
            checks.in_place(given)
        checks.desirable(desirable, count, logits)

        if ref_logits is not None and ref_logps is not None:
            raise ValueError("ref_logits, ref_logps: expected one of them or neither (reference-free), got both")
        if ref_logits is not None:
            checks.vocabulary("ref_logits", ref_logits, logits, sharded)
            checks.shape("ref_logits", ref_logits, tuple(logits.shape), "as logits")
        if ref_logps is not None:
            checks.sequences("ref_logps", ref_logps, count, "one per sequence", logits)
        kl_count = None
        if kl_logits is None and ref_kl_logits is None and (kl_labels is not None or kl_cu_seqlens is not None):
            raise ValueError("kl_labels, kl_cu_seqlens: go with kl_logits or ref_kl_logits, got neither")
        for name, side, logps in (("kl", kl_logits, kl_logps), ("ref_kl", ref_kl_logits, ref_kl_logps)):
            if side is not None and logps is not None:
                raise ValueError(f"{name}_logits, {name}_logps: expected one of them, got both")
            if side is not None:
                if kl_labels is None:
                    raise ValueError(f"kl_labels: needed with {name}_logits")
                kl_count = checks.rows(
                    side, kl_labels, kl_cu_seqlens, "kl_", f"{name}_logits", like=logits, sharded=sharded
                )
        checks.kl_pair(kl_logps, ref_kl_logps, kl_count, logits)
        checks.kl_source(
            loss_type,
            kl,
            logits,
            has_reference=ref_logits is not None or ref_logps is not None,
            has_kl=kl_logits is not None or kl_logps is not None,
            has_ref_kl=ref_kl_logits is not None or ref_kl_logps is not None,
        )
        checks.unshifted(shift, ranks.context)
        refuse_now(ranks, backend, logits)
        sides = [side is not None for side in (ref_logits, kl_logits, ref_kl_logits)]
        steps = common_steps(ranks, backend, logits.device, logits.dtype, scored=sides)

    if ranks:
        layout = {"sequences": count, "mismatched": kl_count, "dtype": logits.dtype}
        offsets = (cu_seqlens, kl_cu_seqlens)
        every = {"logits": logits, "ref_logits": ref_logits, "kl_logits": kl_logits, "ref_kl_logits": ref_kl_logits}
        columns = logits.shape[-1]
        shard = ranks.agree(
            labels, kl_labels, columns, ignore_index, *offsets, steps, shards=every, tokens=every, **layout
        )
        vocab = columns if shard is None else shard.vocab

        def scores(logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, inplace: bool = False) -> Tensor:
            scoring = (shift, ignore_index, float(temperature))
            return logits_scores(logits, labels, cu_seqlens, scoring, inplace, backend, shard)

        def sums(token_logps: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
            scored = scored_targets(labels, cu_seqlens, shift, ignore_index, vocab)[1] if average_log_prob else None
            return sequence_sums(token_logps, scored, cu_seqlens, ranks)

        def forward_only(logits, labels, cu_seqlens) -> Callable[[], Tensor] | None:
            return None if logits is None else lambda: sums(scores(logits, labels, cu_seqlens), labels, cu_seqlens)

        finish_z0, ref_logps = before_policy(
            forward_only(kl_logits, kl_labels, kl_cu_seqlens),
            forward_only(ref_kl_logits, kl_labels, kl_cu_seqlens),
            forward_only(ref_logits, labels, cu_seqlens),
            (kl, kl_logps, ref_kl_logps, ref_logps),
            logits,
            ranks,
        )
        token_logps = scores(logits, labels, cu_seqlens, inplace_backward)
        logps = sums(token_logps, labels, cu_seqlens)
        beta, *weights = scalars
        dtype = reference.compute_dtype(logits.dtype)
        return loss_output(
            logps,
            ref_logps,
            finish_z0(),
            desirable,
            beta,
            tuple(weights),
            reduction,
            dtype,
            token_logps=token_logps.detach(),
        )

    kl_value = 0.0 if kl is None or isinstance(kl, Tensor) else ops.data(float(kl))
    if isinstance(kl_value, Tensor):  # on the logits' device, where the kernels read it
        kl, kl_value = torch.zeros((), dtype=torch.float64, device=logits.device) + kl_value, 0.0
    (*scale, beta, desirable_weight, undesirable_weight), numbers = ops.as_arguments(
        1.0, None, float(temperature), *scalars
    )
    loss, logps, ref, rewards, z0, _, token_logps, _ = ops.kto_forward(
        logits,
        labels,
        cu_seqlens,
        desirable,
        ref_logits,
        ref_logps,
        kl if isinstance(kl, Tensor) else None,
        kl_value,
        kl_logits,
        ref_kl_logits,
        kl_logps,
        ref_kl_logps,
        kl_labels,
        kl_cu_seqlens,
        beta,
        desirable_weight,
        undesirable_weight,
        average_log_prob,
        reduction,
        shift,
        ignore_index,
        *scale,
        inplace_backward,
        backend,
        numbers=numbers,
    )
    return KTOOutput(
        loss=loss,
        logps=logps,
        ref_logps=ref,
        rewards=rewards,
        kl=z0,
        desirable=desirable,
        token_logps=token_logps,
        reduction=reduction,
    )


def linear_kto_loss(
    hidden: Tensor,  # (B, T, H) or (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, T) or (N,)
    desirable: Tensor,  # (B,) bool
    *,
    bias: Tensor | None = None,  # (V,)
    ref_hidden: Tensor | None = None,  # (B, T, H') or (N, H')
    ref_weight: Tensor | None = None,  # (V, H')
    ref_bias: Tensor | None = None,  # (V,)
    ref_logps: Tensor | None = None,  # (B,)
    kl: Tensor | float | None = None,  # ()
    kl_logps: Tensor | None = None,  # (K,)
    ref_kl_logps: Tensor | None = None,  # (K,)
    kl_hidden: Tensor | None = None,  # (K, T', H) or (N', H)
    ref_kl_hidden: Tensor | None = None,  # (K, T', H') or (N', H')
    kl_labels: Tensor | None = None,  # (K, T') or (N',)
    kl_cu_seqlens: Tensor | None = None,  # (K + 1,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    max_logits_bytes: int | None = None,
    long_sequences: str = "auto",
    outputs: tuple[str, ...] = (),
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
    average_log_prob: bool = False,
    reduction: str = "mean",
    ignore_index: int = -100,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    process_group: Any = None,
    vocab_group: Any = None,
    vocab: int | None = None,
    context_group: Any = None,
    backend: str = "auto",
) -> KTOOutput:
    """`kto_loss(hidden @ weight.T + bias, labels, desirable)`, never holding more than `max_logits_bytes` of logits.

    Only scored tokens are projected. In GEMM units `G = 2·N·H·V` FLOPs over the N scored tokens, the policy costs 3G
    (1G the logits, 1G each gradient), 2G with a frozen head, 1G without gradients; reference and KL cost 1G each. The
    gradients are formed in the forward, where the logits are, and only those that something requires.
    `kto_kernels.plan.LinearPlan.of` says how a shape is cut and what it takes.

    Args:
        hidden: (B, T, H), or packed (N, H) with `cu_seqlens`: the inputs of the head; bf16, fp16, fp32 (fp64: backend
            "torch"), any strides: `hidden[:, :-1]` costs no copy.
        weight, bias: the head, (V, H) and (V,), of any of these dtypes. The GEMMs of every side, policy, reference and
            KL, run in one dtype: autocast's where it is on (and `hidden` is not fp64), else that of `hidden`. A head of
            another dtype is cast to it, which takes a copy of it while a side is scored. dW is summed in fp32 and has the
            dtype of `weight`.
        labels, desirable, ignore_index, shift, cu_seqlens: as for `kto_loss`.
        ref_hidden: the frozen reference's hidden states for the same labels, of any of these dtypes, with
        ref_weight, ref_bias: its head, of the same vocabulary; the policy's own tensors, where they share it; or
        ref_logps: its sequence log-probabilities (B,), computed once. Neither: reference-free, `S^ref = 0`.
        kl: the KL estimate, one number or 0-d tensor (negative values count as 0); or
        kl_logps, ref_kl_logps: sequence log-probabilities (K,) of mismatched completions; or
        kl_hidden, ref_kl_hidden, kl_labels, kl_cu_seqlens: their hidden states and labels, laid out as `hidden` is.
            Policy and reference may mix the two forms. With a reference the KL needs one too; without, it must have none.
        logit_scale, softcap, temperature: `z = softcap·tanh(logits·logit_scale/softcap)/temperature`, each > 0.
        max_logits_bytes: the most bytes of logits at once; by default what suits the device, see `LinearPlan`.
        long_sequences: a sequence whose logits exceed that is exact too: "defer" takes a second fp32 gradient of the
            head while it is open, "recompute" another GEMM for all of its chunks but the last; "auto" the faster one. With
            a context group sequences are open until the ranks' sums are exchanged, see `LinearPlan`.
        outputs: out of "entropy", "mean_logits", "is_top1": of every scored token, without gradient.
        beta, desirable_weight, undesirable_weight, loss_type, average_log_prob, reduction: as for `kto_loss`. Under
            `reduction="none"` a trained head's logits are computed once more in the backward (4G).
        process_group, vocab_group, context_group: as for `kto_loss`. With a vocabulary group each rank has some rows of
            `weight`, `bias` and their references (of a padded head pass the real ones, `weight[:n]`), and the whole
            `hidden`, whose gradient is whole on every rank. Each chunk costs a gather of three numbers a row (one more
            for each of `outputs`) and, where gradients are formed, an all-reduce of its hidden states' gradient, in the
            GEMMs' dtype. `max_logits_bytes` is what the rank with the most columns takes.
        vocab: as for `kto_loss`, against the rows of `weight`.
        backend: "auto", or a name out of `available_backends()`: what scores the chunks. The GEMMs are PyTorch's.

    Hidden states, labels and heads may be DTensors, FSDP2's parameters among them: rows are this rank's; a head is gathered
    over every dimension of its mesh but the vocabulary group, and its gradient comes back sharded, the mean over those
    dimensions; see `kto_kernels.dtensor`.

    Returns:
        KTOOutput.

    Raises:
        TypeError, ValueError: an argument is not as above, or `max_logits_bytes` holds not one row of logits; the
            message names it. Labels and offsets on a GPU as for `kto_loss`.
        RuntimeError: the backend named is not available; another rank of a group has other options or failed its
            checks; or, in backward, the gradient is differentiated again, or asked for a second time (the first
            backward hands it over).

    On a GPU the forward waits for the device once for each set of hidden states: how many tokens are scored decides
    shapes. The backward does not wait.
    """
    ranks = Ranks.of(
        process_group=process_group,
        vocab_group=vocab_group,
        vocab=vocab,
        context_group=context_group,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        loss_type=loss_type,
        average_log_prob=average_log_prob,
        reduction=reduction,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        outputs=outputs,
    )
    with ranks.checks(hidden):
        hidden, labels, ref_hidden, kl_hidden, ref_kl_hidden, kl_labels = dtensor.rows(
            ranks,
            hidden=hidden,
            labels=labels,
            ref_hidden=ref_hidden,
            kl_hidden=kl_hidden,
            ref_kl_hidden=ref_kl_hidden,
            kl_labels=kl_labels,
        )
        weight, bias, ref_weight, ref_bias = dtensor.heads(
            ranks, weight=weight, bias=bias, ref_weight=ref_weight, ref_bias=ref_bias
        )
        checks.scoring(shift, ignore_index, temperature, backend)
        checks.head_scale(logit_scale, softcap, max_logits_bytes)
        checks.choice("long_sequences", long_sequences, LONG_SEQUENCES)
        outputs = checks.outputs(outputs, OUTPUTS)
        sharded = ranks.vocab is not None
        checks.head(hidden, weight, bias, sharded=sharded)
        checks.vocabulary_size(vocab, weight.shape[0], sharded)
        count = checks.hidden_rows(hidden, labels, cu_seqlens)
        beta, *weights = loss_options(beta, desirable_weight, undesirable_weight, loss_type, reduction)
        checks.flag("average_log_prob", average_log_prob)
        checks.desirable(desirable, count, hidden)

        if ref_hidden is not None and ref_logps is not None:
            raise ValueError("ref_hidden, ref_logps: expected one of them or neither (reference-free), got both")
        if ref_logps is not None:
            checks.sequences("ref_logps", ref_logps, count, "one per sequence", hidden)
        if (ref_hidden is None and ref_kl_hidden is None) != (ref_weight is None):
            raise ValueError(
                "ref_weight: goes with ref_hidden or ref_kl_hidden, and they with it; where the reference shares the "
                "policy's head, pass ref_weight=weight"
            )
        if ref_weight is None and ref_bias is not None:
            raise ValueError("ref_bias: goes with ref_weight, got none")
        if ref_hidden is not None:
            checks.reference_head(ref_hidden, ref_weight, ref_bias, "ref_hidden", weight, sharded)
            rows = tuple(labels.shape)
            checks.shape("ref_hidden", ref_hidden, (*rows, ref_weight.shape[1]), "the labels', and ref_weight's width")
        kl_count = None
        if kl_hidden is None and ref_kl_hidden is None and (kl_labels is not None or kl_cu_seqlens is not None):
            raise ValueError("kl_labels, kl_cu_seqlens: go with kl_hidden or ref_kl_hidden, got neither")
        for name, side, logps in (("kl", kl_hidden, kl_logps), ("ref_kl", ref_kl_hidden, ref_kl_logps)):
            if side is None:
                continue
            if logps is not None:
                raise ValueError(f"{name}_hidden, {name}_logps: expected one of them, got both")
            if kl_labels is None:
                raise ValueError(f"kl_labels: needed with {name}_hidden")
            if name == "kl":
                checks.head(side, weight, bias, name="kl_hidden", sharded=sharded)
            else:
                checks.reference_head(side, ref_weight, ref_bias, "ref_kl_hidden", weight, sharded)
            kl_count = checks.hidden_rows(side, kl_labels, kl_cu_seqlens, "kl_", f"{name}_hidden")
        checks.kl_pair(kl_logps, ref_kl_logps, kl_count, hidden)
        checks.kl_source(
            loss_type,
            kl,
            hidden,
            has_reference=ref_hidden is not None or ref_logps is not None,
            has_kl=kl_hidden is not None or kl_logps is not None,
            has_ref_kl=ref_kl_hidden is not None or ref_kl_logps is not None,
        )
        checks.unshifted(shift, ranks.context)
        refuse_now(ranks, backend, hidden, weight, max_logits_bytes)
        sides = [None if side is None else tuple(side.shape) for side in (ref_hidden, kl_hidden, ref_kl_hidden)]
        more = {"long_sequences": long_sequences, "scored": sides}
        steps = linear_steps(ranks, backend, hidden, weight, bias, max_logits_bytes, **more)

    dtype = gemm_dtype(hidden)
    layout = {"sequences": count, "mismatched": kl_count, "dtype": dtype}
    offsets = (cu_seqlens, kl_cu_seqlens)
    heads = {"weight": weight, "ref_weight": ref_weight}
    states = {"hidden": hidden, "ref_hidden": ref_hidden, "kl_hidden": kl_hidden, "ref_kl_hidden": ref_kl_hidden}
    shard = ranks.agree(
        labels, kl_labels, weight.shape[0], ignore_index, *offsets, steps, shards=heads, tokens=states, **layout
    )
    scoring = (shift, ignore_index, float(logit_scale), None if softcap is None else float(softcap), float(temperature))

    vocab = weight.shape[0] if shard is None else shard.vocab

    def scores(hidden, weight, bias, labels, cu_seqlens, outputs=(), prefix: str = "") -> tuple[Tensor, ...]:
        return linear_scores(
            hidden, weight, bias, labels, cu_seqlens, scoring, max_logits_bytes, outputs, backend, prefix, dtype, shard
        )

    def sums(token_logps: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        scored = scored_targets(labels, cu_seqlens, shift, ignore_index, vocab)[1] if average_log_prob else None
        return sequence_sums(token_logps, scored, cu_seqlens, ranks)

    def forward_only(hidden, weight, bias, labels, cu_seqlens, prefix: str = "") -> Callable[[], Tensor] | None:
        if hidden is None:
            return None
        return lambda: sums(scores(hidden, weight, bias, labels, cu_seqlens, (), prefix)[0], labels, cu_seqlens)

    finish_z0, ref_logps = before_policy(
        forward_only(kl_hidden, weight, bias, kl_labels, kl_cu_seqlens, "kl_"),
        forward_only(ref_kl_hidden, ref_weight, ref_bias, kl_labels, kl_cu_seqlens, "kl_"),
        forward_only(ref_hidden, ref_weight, ref_bias, labels, cu_seqlens),
        (kl, kl_logps, ref_kl_logps, ref_logps),
        hidden,
        ranks,
    )

    grad = torch.is_grad_enabled()
    trains = [grad and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    loss = None
    if any(trains[1:]) and reduction != "none":
        z0 = finish_z0()
        options, numbers = ops.as_arguments(*scoring[2:], beta, *weights)
        loss, logps, _, token_logps, *extra, _, _, _ = linear_ops.linear_kto(
            hidden, weight, bias, labels, cu_seqlens, desirable, ref_logps, z0, *options[3:], average_log_prob,
            reduction, *scoring[:2], *options[:3], dtype, max_logits_bytes, long_sequences, ",".join(outputs), *trains,
            ranks.open_sequences, None if ranks.context is None else ranks.context.group_name, True, backend,
            *(() if shard is None else shard.arguments), numbers=numbers
        )  # fmt: skip
    else:
        token_logps, *extra = scores(hidden, weight, bias, labels, cu_seqlens, outputs)
        logps = sums(token_logps, labels, cu_seqlens)
        z0 = finish_z0()
    more = {name: values.detach() for name, values in zip(OUTPUTS, extra) if name in outputs}
    more["token_logps"] = token_logps.detach()
    if outputs:
        _, scored = scored_targets(labels, cu_seqlens, shift, ignore_index, vocab)
        more |= {"scored": scored, "cu_seqlens": cu_seqlens}
    float_dtype = reference.compute_dtype(dtype)
    return loss_output(logps, ref_logps, z0, desirable, beta, tuple(weights), reduction, float_dtype, loss, **more)
