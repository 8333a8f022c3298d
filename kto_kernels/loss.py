"""START HERE. The losses, from logits and from hidden states; both run the five stages, in the order in which data flows:

    token_logps → sequence_logps → kl_reference_point → value → loss

A loss puts its arguments into records: how logits are scored (`Scoring`), what is made of the log-probabilities
(`Objective`), and the tensors (`Inputs`), which are checked there. Then `kto_kernels.engine` runs the stages. The formulas
are in `kto_kernels.reference`, the stages on their own in `kto_kernels.stages`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import checks, engine
from .inputs import Inputs
from .linear.head import Adapter
from .options import (
    BackendName,
    Chunking,
    Group,
    LongSequences,
    LossType,
    Objective,
    Output,
    Reduction,
    Scale,
    Scoring,
)
from .output import KTOOutput
from .parallel.agreement import Ranks


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
    loss_type: LossType = "kto",
    average_log_prob: bool = False,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    temperature: float = 1.0,
    inplace_backward: bool = False,
    process_group: Group | None = None,
    vocab_group: Group | None = None,
    vocab: int | None = None,
    context_group: Group | None = None,
    backend: BackendName = "auto",
) -> KTOOutput:
    """The KTO loss (Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8) and its gradient, from logits.

    With S the log-probability of a whole sequence, a sequence's log-ratio is `r = S^policy − S^reference`. The loss of
    a desirable sequence is `λ_D·σ(β(z0 − r))`, the loss of an undesirable one is `λ_U·σ(β(r − z0))`. The reference
    point z0 is an estimate of the KL divergence between policy and reference, at least 0.

    The loss reads every logit once in the forward, and reads it once more and writes its gradient once in the backward.
    The extra memory is O(N) for N tokens. The gradient goes to `logits` alone: none goes to the reference, and none
    through the KL estimate.

    Shapes: B sequences of T tokens, or N tokens of packed sequences; V columns of the vocabulary; K mismatched
    completions.

    The three groups are torch.distributed ProcessGroups, or one-dimensional DeviceMeshes (`mesh["dp"]`). All ranks of a
    group call with the same options. With any group the five stages run as separate operators. Logits and labels may be
    DTensors: their rows, and the columns of the vocabulary group, are this rank's; see `kto_kernels.parallel.dtensor`.

    Under KTO_KERNELS_DEBUG=1 (set it on all ranks or on none) the values of labels and offsets on a GPU are checked
    too, and the parts that the ranks of a `vocab_group` or `context_group` hold are compared: every rank raises a
    ValueError where two ranks hold the same numbers, unless these are one number throughout.

    Args:
        logits: (B, T, V), or packed (N, V) with `cu_seqlens`; bf16, fp16, fp32, or fp64 with backend "torch". Any
            strides but along V, so that `logits[:, :-1]` costs no copy.
        labels: (B, T) or (N,), int32 or int64: the token that each position predicts, or `ignore_index` where nothing
            is scored (prompt, padding).
        desirable: (B,) bool, True for thumbs up.
        ref_logits: (B, T, V) or (N, V): the frozen reference's logits, of the shape and dtype of `logits`. None: the
            reference is given as `ref_logps`, or there is none.
        ref_logps: (B,) bf16, fp16, fp32 or fp64: the reference's sequence log-probabilities in nats, computed once
            beforehand. None without `ref_logits`: the loss is reference-free, with S^reference = 0.
        kl: the KL estimate z0 in nats, as a number or as a () tensor of bf16, fp16, fp32 or fp64; a negative value
            counts as 0. None: z0 is computed from the mismatched completions in the arguments `kl_*`.
        kl_logps: (K,) bf16, fp16, fp32 or fp64: the policy's sequence log-probabilities of mismatched completions, in
            nats. None: they come from `kl_logits`, or z0 is given as `kl`.
        ref_kl_logps: (K,) bf16, fp16, fp32 or fp64: the reference's sequence log-probabilities of the same completions,
            in nats; needed with a reference and not allowed without one. None: they come from `ref_kl_logits`. One of
            the two models may be given as logits and the other one as log-probabilities.
        kl_logits: (K, T', V), or packed (N', V) with `kl_cu_seqlens`, in the dtype of `logits`: the policy's logits of
            mismatched completions. None: see `kl_logps`.
        ref_kl_logits: (K, T', V) or (N', V), in the dtype of `logits`: the reference's logits of the same completions.
            None: see `ref_kl_logps`.
        kl_labels: (K, T') or (N',), int32 or int64: the labels that score `kl_logits` and `ref_kl_logits`. None: there
            are no such logits.
        kl_cu_seqlens: (K + 1,) int32 or int64: the offsets of packed mismatched completions, from 0 to N'. None: they
            are not packed.
        beta: β, how sharply the loss saturates, > 0, in 1/nat (equations 7 and 8).
        desirable_weight: λ_D, the weight of desirable sequences, >= 0 (equations 7 and 8). 1.0 leaves them as they are.
        undesirable_weight: λ_U, the weight of undesirable sequences, >= 0 (equations 7 and 8). 1.0 leaves them as they
            are.
        loss_type: "kto", or "apo_zero_unpaired" (arXiv 2408.06266), which is the same with z0 = 0 and allows no KL
            source.
        average_log_prob: whether a sequence's log-probability is the mean over its scored tokens. False: it is the sum.
        reduction: "mean" over the B sequences (0 for an empty batch), "sum", or "none" for the (B,) losses.
        ignore_index: the label of positions that are not scored. The default is PyTorch's.
        shift: whether position t predicts the label of t + 1 in its sequence, the convention of transformers. False:
            labels are shifted already, and position t predicts the label of t.
        cu_seqlens: (B + 1,) int32 or int64: the offsets of packed sequences, from 0 to N. None: the sequences are
            padded.
        temperature: the logits are divided by it, > 0. 1.0 leaves them as they are.
        inplace_backward: whether the gradient overwrites `logits`, so that no second tensor of this size exists. Only
            one backward is possible then. The logits must be neither a leaf nor a view of one (a view goes unnoticed
            under torch.compile). A model's output is right as it is; to try the option on a leaf, pass `logits * 1`.
        process_group: data parallel: each rank has sequences of its own. z0 is the mean over the mismatched completions
            of all ranks, however many each rank has (none included): one all-reduce, hidden behind the policy's pass.
            `kl` as a number is taken as it is. Ranks may have the same completions, as z0, a mean, does not change.
            None: this rank's completions alone.
        vocab_group: vocabulary parallel: each rank has some columns of every logits tensor, in the order of ranks, and
            the same other arguments. A rank may have as many columns as it likes, none included; of a padded vocabulary
            pass the real columns, `logits[..., :n]`. Each logits tensor costs one gather of three numbers a row, the
            backward exchanges nothing, and every rank returns the same bits. Logits that are whole on every rank go
            without this group: with it each column counts once for every rank, which `vocab` and KTO_KERNELS_DEBUG=1
            find. None: the logits are whole.
        vocab: the size of the whole vocabulary, checked against the columns given, or with a `vocab_group` against the
            sum of all ranks' columns. None: it is not checked.
        context_group: context parallel: each rank has some tokens of every sequence, and the same B-sized tensors.
            Packed ranks all have B + 1 offsets, into the tokens of their own. `shift` must be False. Every rank returns
            the whole loss, and gets the gradient of its own tokens: a parameter's gradient is the sum over the group,
            so a wrapper that averages over these ranks too needs the loss times their number. Sequences that are whole
            on every rank count once for every rank, which KTO_KERNELS_DEBUG=1 finds. None: the sequences are whole.
        backend: "auto", which takes the first in the device's order of preference that can run, or a name out of
            `available_backends()`.

    Returns:
        The loss with what trainers log, as a `KTOOutput`.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names it.
        ValueError: an argument has a wrong shape, device or value, or arguments exclude or lack each other; the message
            names it. The values of labels and offsets on a GPU are not looked at (this would wait for the device) but
            under KTO_KERNELS_DEBUG=1, see `kto_kernels.checks`.
        NotImplementedError: `torch.func` or forward-mode differentiation is applied to the call; or, with
            `inplace_backward`, the backward gets many upstream gradients at once.
        RuntimeError: the backend named is not available; another rank of a group has other options or failed its
            checks; or, in the backward, the gradient is differentiated again, or the logits have been overwritten.

    Examples:
        Two sequences of three tokens over a vocabulary of five, the first token of each a prompt:

        >>> import torch
        >>> from kto_kernels import kto_loss
        >>> logits = torch.zeros(2, 3, 5, requires_grad=True)
        >>> labels = torch.tensor([[-100, 1, 2], [-100, 3, 4]])
        >>> desirable = torch.tensor([True, False])
        >>> out = kto_loss(logits, labels, desirable, ref_logps=torch.tensor([-3.0, -4.0]), kl=0.0)
        >>> out.loss.backward()
        >>> out.logps
        tensor([-3.2189, -3.2189], dtype=torch.float64)
        >>> logits.grad.shape
        torch.Size([2, 3, 5])
    """
    ranks = Ranks.of(process_group, vocab_group, context_group)
    with ranks.failing_together(logits):
        scoring = Scoring(Scale(temperature=temperature), shift, ignore_index, backend)
        objective = Objective(beta, desirable_weight, undesirable_weight, average_log_prob, reduction, loss_type)
        sides = {"policy": logits, "ref": ref_logits, "kl": kl_logits, "ref_kl": ref_kl_logits}
        given = {"ref_logps": ref_logps, "kl_logps": kl_logps, "ref_kl_logps": ref_kl_logps, "kl_value": kl}
        judged = {"labels": labels, "cu_seqlens": cu_seqlens, "desirable": desirable}
        mismatched = {"kl_labels": kl_labels, "kl_cu_seqlens": kl_cu_seqlens}
        inputs = Inputs("logits", **sides, **given, **judged, **mismatched)
        inputs = inputs.checked(ranks, scoring, objective=objective, vocab=vocab)
        checks.in_place(inplace_backward, logits)
    return engine.run(engine.agree(inputs, scoring, objective, Chunking(), ranks, vocab, inplace_backward))


def linear_kto_loss(
    hidden: Tensor,  # (B, T, H) or (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, T) or (N,)
    desirable: Tensor,  # (B,) bool
    *,
    bias: Tensor | None = None,  # (V,)
    adapter: tuple[Tensor, Tensor, float] | None = None,  # A (r, H), B (V, r), scaling
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
    long_sequences: LongSequences = "auto",
    outputs: tuple[Output, ...] = (),
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: LossType = "kto",
    average_log_prob: bool = False,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    scored_lengths: Sequence[int] | Tensor | None = None,  # (B,)
    kl_scored_lengths: Sequence[int] | Tensor | None = None,  # (K,)
    process_group: Group | None = None,
    vocab_group: Group | None = None,
    vocab: int | None = None,
    context_group: Group | None = None,
    backend: BackendName = "auto",
) -> KTOOutput:
    """`kto_loss(hidden @ weight.T + bias, labels, desirable)`, never holding more than `max_logits_bytes` of logits.

    Only scored tokens are projected. In GEMM units `G = 2·N·H·V` FLOPs over the N scored tokens, the policy costs 3G
    (1G for the logits, 1G for each gradient), 2G with a frozen head, 1G without gradients; reference and KL cost 1G
    each. An adapter of rank r on a frozen weight leaves it at 2G, and a few products that cost r/H or r/V of a unit; no
    gradient of the shape (V, H) is formed. The gradients are formed in the forward, where the logits are, and only the gradients that something requires.
    `LinearPlan.of` says how a shape is cut and what it takes. On a GPU the forward waits for the device once, to
    read how many tokens of every sequence are scored, which decides shapes; `scored_lengths` (and `kl_scored_lengths`)
    spare it the wait. Ranks of a group wait besides, to compare their arguments. The backward does not wait.

    Shapes: B sequences of T tokens, or N tokens of packed sequences; H features, and H' of the reference's; V rows of
    the head, one for each token of the vocabulary; K mismatched completions. `kto_loss` gives the formula of the loss.

    The GEMMs of every side (policy, reference and KL) run in one dtype: autocast's where it is on and `hidden` is not
    fp64, else that of `hidden`. A head of another dtype is cast to it, which takes a copy of the head while a side is
    scored.

    The three groups are torch.distributed ProcessGroups, or one-dimensional DeviceMeshes (`mesh["dp"]`). All ranks of a
    group call with the same options. Hidden states, labels and heads may be DTensors, FSDP2's parameters among them:
    rows are this rank's; a head is gathered over every dimension of its mesh but the vocabulary group, and the head's
    gradient comes back sharded, the mean over the gathered dimensions; see `kto_kernels.parallel.dtensor`.

    Args:
        hidden: (B, T, H), or packed (N, H) with `cu_seqlens`; bf16, fp16, fp32, or fp64 with backend "torch": the
            inputs of the head. Any strides, so that `hidden[:, :-1]` costs no copy.
        weight: (V, H) bf16, fp16, fp32 or fp64: the head's weight. The weight's gradient is summed in fp32 and has the
            dtype of the weight.
        labels: (B, T) or (N,), int32 or int64: the token that each position predicts, or `ignore_index` where nothing
            is scored (prompt, padding).
        desirable: (B,) bool, True for thumbs up.
        bias: (V,) bf16, fp16, fp32 or fp64: the head's bias. None: the head has none.
        adapter: (A, B, scaling), a LoRA adapter on the policy's head, A (r, H) and B (V, r) bf16, fp16, fp32 or fp64 and
            the scaling a number >= 0: the logits have `scaling · (h Aᵀ) Bᵀ` added, without dropout. The reference has
            none. None: no adapter is on the head.
        ref_hidden: (B, T, H') or (N, H'), bf16, fp16, fp32 or fp64: the frozen reference's hidden states for the same
            labels. None: the reference is given as `ref_logps`, or there is none.
        ref_weight: (V, H') bf16, fp16, fp32 or fp64: the reference's head, needed with `ref_hidden` or `ref_kl_hidden`.
            Where the reference shares the policy's head, pass `weight`. None: there are no such hidden states.
        ref_bias: (V,) bf16, fp16, fp32 or fp64: the bias of `ref_weight`. None: the reference's head has none.
        ref_logps: (B,) bf16, fp16, fp32 or fp64: the reference's sequence log-probabilities in nats, computed once
            beforehand. None without `ref_hidden`: the loss is reference-free, with S^reference = 0.
        kl: the KL estimate z0 in nats, as a number or as a () tensor of bf16, fp16, fp32 or fp64; a negative value
            counts as 0. None: z0 is computed from the mismatched completions in the arguments `kl_*`.
        kl_logps: (K,) bf16, fp16, fp32 or fp64: the policy's sequence log-probabilities of mismatched completions, in
            nats. None: they come from `kl_hidden`, or z0 is given as `kl`.
        ref_kl_logps: (K,) bf16, fp16, fp32 or fp64: the reference's sequence log-probabilities of the same completions,
            in nats; needed with a reference and not allowed without one. None: they come from `ref_kl_hidden`. One of
            the two models may be given as hidden states and the other one as log-probabilities.
        kl_hidden: (K, T', H), or packed (N', H) with `kl_cu_seqlens`, bf16, fp16, fp32 or fp64: the policy's hidden
            states of mismatched completions. None: see `kl_logps`.
        ref_kl_hidden: (K, T', H') or (N', H'), bf16, fp16, fp32 or fp64: the reference's hidden states of the same
            completions. None: see `ref_kl_logps`.
        kl_labels: (K, T') or (N',), int32 or int64: the labels that score `kl_hidden` and `ref_kl_hidden`. None: there
            are no such hidden states.
        kl_cu_seqlens: (K + 1,) int32 or int64: the offsets of packed mismatched completions, from 0 to N'. None: they
            are not packed.
        logit_scale: the logits x are multiplied by it, > 0: the softmax is taken of
            `z = softcap·tanh(x·logit_scale/softcap)/temperature`. 1.0 leaves them as they are.
        softcap: the bound that the tanh in `z` keeps scaled logits within, > 0. None: there is no tanh.
        temperature: the capped logits are divided by it, > 0. 1.0 leaves them as they are.
        max_logits_bytes: the most bytes of logits that exist at once. None: what suits the device, see `LinearPlan`.
            With a `vocab_group` it is the bytes on the rank with the most columns.
        long_sequences: how the gradient of a sequence whose logits exceed `max_logits_bytes` is formed, exactly in each
            way: "defer" takes a second fp32 gradient of the head while the sequence is open, "recompute" another GEMM
            for all of its chunks but the last, "auto" takes the faster one. With a context group sequences are open
            until the ranks have exchanged their sums, see `LinearPlan`.
        outputs: which numbers to compute for every scored token besides, without gradient, out of "entropy",
            "mean_logits" and "is_top1". (): none.
        beta: β, how sharply the loss saturates, > 0, in 1/nat (arXiv 2402.01306, equations 7 and 8).
        desirable_weight: λ_D, the weight of desirable sequences, >= 0 (arXiv 2402.01306, equations 7 and 8). 1.0 leaves
            them as they are.
        undesirable_weight: λ_U, the weight of undesirable sequences, >= 0 (arXiv 2402.01306, equations 7 and 8). 1.0
            leaves them as they are.
        loss_type: "kto", or "apo_zero_unpaired" (arXiv 2408.06266), which is the same with z0 = 0 and allows no KL
            source.
        average_log_prob: whether a sequence's log-probability is the mean over its scored tokens. False: it is the sum.
        reduction: "mean" over the B sequences (0 for an empty batch), "sum", or "none" for the (B,) losses. With "none"
            a trained head's logits are computed once more in the backward (4G).
        ignore_index: the label of positions that are not scored. The default is PyTorch's.
        shift: whether position t predicts the label of t + 1 in its sequence, the convention of transformers. False:
            labels are shifted already, and position t predicts the label of t.
        cu_seqlens: (B + 1,) int32 or int64: the offsets of packed sequences, from 0 to N. None: the sequences are
            padded.
        scored_lengths: B ints, or (B,) int32 or int64 on the CPU: how many positions of each sequence have a label that
            scores them (not `ignore_index`; with `shift` no sequence's first label scores), on this rank. A collator
            knows them while the labels are on the CPU. With them nothing waits for the device, and a CUDA graph can
            capture the call. None: they are read from the device. Wrong ones give wrong results, which only the CPU and
            KTO_KERNELS_DEBUG=1 find; nothing outside of a tensor is read.
        kl_scored_lengths: K ints, or (K,) int32 or int64 on the CPU, as `scored_lengths` of `kl_labels`. None: they are
            read from the device, together with those of the other sequences if these are not given either.
        process_group: data parallel: each rank has sequences of its own, and z0 is the mean over the mismatched
            completions of all ranks, as for `kto_loss`. None: this rank's completions alone.
        vocab_group: vocabulary parallel: each rank has some rows of `weight`, `bias`, `ref_weight`, `ref_bias` and the
            adapter's B, in the order of ranks (of a padded head pass the real ones, `weight[:n]`), and the whole
            `hidden` and A, whose gradients are whole on every rank. Each chunk costs a gather of three numbers a row (one
            more for each of `outputs`) and, where gradients are formed, an all-reduce of the gradient of its hidden
            states, in the GEMMs' dtype. None: the head is whole.
        vocab: the size of the whole vocabulary, checked against the rows of `weight`, or with a `vocab_group` against
            the sum of all ranks' rows. None: it is not checked.
        context_group: context parallel: each rank has some tokens of every sequence, and `shift` must be False. Every
            rank returns the whole loss and gets the gradient of its own tokens, as for `kto_loss`. None: the sequences
            are whole.
        backend: "auto", which takes the first in the device's order of preference that can run, or a name out of
            `available_backends()`. The backend scores the chunks; the GEMMs are PyTorch's.

    Returns:
        The loss with what trainers log, as a `KTOOutput`.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names it.
        ValueError: an argument has a wrong shape, device or value, arguments exclude or lack each other, or
            `max_logits_bytes` holds not one row of logits; the message names the argument. The values of labels and
            offsets on a GPU are not looked at (this would wait for the device) but under KTO_KERNELS_DEBUG=1.
        NotImplementedError: `torch.func` or forward-mode differentiation is applied to the call; or the backward gets
            many upstream gradients at once (`is_grads_batched=True`) where the forward formed the gradients.
        RuntimeError: the backend named is not available; another rank of a group has other options or failed its
            checks; or, in the backward, the gradient is differentiated again, or asked for a second time (the first
            backward hands it over).

    Examples:
        Two sequences of three tokens, eight features, and a vocabulary of five:

        >>> import torch
        >>> from kto_kernels import linear_kto_loss
        >>> hidden = torch.ones(2, 3, 8, requires_grad=True)
        >>> weight = torch.zeros(5, 8, requires_grad=True)
        >>> labels = torch.tensor([[-100, 1, 2], [-100, 3, 4]])
        >>> desirable = torch.tensor([True, False])
        >>> out = linear_kto_loss(hidden, weight, labels, desirable, ref_logps=torch.tensor([-3.0, -4.0]), kl=0.0)
        >>> out.loss.backward()
        >>> out.logps
        tensor([-3.2189, -3.2189], dtype=torch.float64)
        >>> hidden.grad.shape, weight.grad.shape
        (torch.Size([2, 3, 8]), torch.Size([5, 8]))
    """
    ranks = Ranks.of(process_group, vocab_group, context_group)
    with ranks.failing_together(hidden):
        scoring = Scoring(Scale(logit_scale, softcap, temperature), shift, ignore_index, backend)
        objective = Objective(beta, desirable_weight, undesirable_weight, average_log_prob, reduction, loss_type)
        chunking = Chunking(max_logits_bytes, long_sequences, outputs)
        sides = {"policy": hidden, "ref": ref_hidden, "kl": kl_hidden, "ref_kl": ref_kl_hidden}
        heads = {"weight": weight, "bias": bias, "ref_weight": ref_weight, "ref_bias": ref_bias}
        heads |= {"adapter": Adapter.of(adapter)}
        given = {"ref_logps": ref_logps, "kl_logps": kl_logps, "ref_kl_logps": ref_kl_logps, "kl_value": kl}
        judged = {"labels": labels, "cu_seqlens": cu_seqlens, "desirable": desirable}
        mismatched = {"kl_labels": kl_labels, "kl_cu_seqlens": kl_cu_seqlens}
        lengths = {"scored_lengths": scored_lengths, "kl_scored_lengths": kl_scored_lengths}
        inputs = Inputs("hidden", **sides, **heads, **given, **judged, **mismatched, **lengths)
        inputs = inputs.checked(ranks, scoring, chunking, objective, vocab)
    return engine.run(engine.agree(inputs, scoring, objective, chunking, ranks, vocab))
