"""Any loss of sequence log-probabilities, from logits and from hidden states, on the engine of `kto_loss`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from . import checks, engine
from .inputs import Inputs
from .linear.head import Adapter
from .objectives import KTO, APOZeroUnpaired, Paired, Unpaired
from .options import BackendName, Chunking, Group, LongSequences, Objective, Output, Pairs, Reduction, Scale, Scoring
from .output import KTOOutput
from .pairs import Preference, members
from .parallel.agreement import Ranks
from .terms import Clip


def preference_loss(
    logits: Tensor,  # (B, T, V) or (N, V)
    labels: Tensor,  # (B, T) or (N,)
    objective: Unpaired | Paired,
    *,
    desirable: Tensor | None = None,  # (B,) bool
    pairs: Pairs = "halves",
    ref_logits: Tensor | None = None,  # like logits
    ref_logps: Tensor | None = None,  # (B,)
    ref_token_logps: Tensor | None = None,  # like labels
    sequence_weights: Tensor | None = None,  # (B,) or (B / 2,)
    token_weights: Tensor | None = None,  # like labels
    humanline: tuple[float, float] | None = None,
    kl: Tensor | float | None = None,  # ()
    kl_logps: Tensor | None = None,  # (K,)
    ref_kl_logps: Tensor | None = None,  # (K,)
    ref_kl_token_logps: Tensor | None = None,  # like kl_labels
    kl_logits: Tensor | None = None,  # (K, T', V) or (N', V)
    ref_kl_logits: Tensor | None = None,  # like kl_logits
    kl_labels: Tensor | None = None,  # (K, T') or (N',)
    kl_token_weights: Tensor | None = None,  # like kl_labels
    kl_cu_seqlens: Tensor | None = None,  # (K + 1,)
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
    """The loss `objective` of sequence log-probabilities and its gradient, from logits.

    As `kto_loss` it reads every logit once in the forward, and reads it once more and writes its gradient once in the
    backward, whatever the loss is. `kto_loss` is the same with `objectives.KTO`, to the bit. The gradient goes to
    `logits` alone.

    Shapes: B sequences of T tokens, or N tokens of packed sequences; V columns of the vocabulary; K mismatched
    completions. Groups of ranks are those of `kto_loss`. Both members of a pair are on one data-parallel rank.

    Args:
        logits: (B, T, V), or packed (N, V) with `cu_seqlens`; bf16, fp16, fp32, or fp64 with backend "torch". Any
            strides but along V, so that `logits[:, :-1]` costs no copy.
        labels: (B, T) or (N,), int32 or int64: the token that each position predicts, or `ignore_index` where nothing
            is scored (prompt, padding).
        objective: the loss, a record of `kto_kernels.objectives` such as `DPO(beta=0.1)`, or a record of your own.
        desirable: (B,) bool, True for thumbs up; needed by unpaired losses and not allowed with paired ones. None: the
            loss is a paired one.
        pairs: how a paired loss finds its pairs among the B sequences: "halves", the first half is chosen and the
            second half rejected, in the same order, as TRL sends them; or "interleaved", chosen and rejected take
            turns. Unpaired losses ignore it.
        ref_logits: (B, T, V) or (N, V): the frozen reference's logits, of the shape and dtype of `logits`. None: the
            reference is given as `ref_logps`, or there is none.
        ref_logps: (B,) bf16, fp16, fp32 or fp64: the reference's sequence log-probabilities in nats, computed once
            beforehand. None without `ref_logits`: the loss is reference-free, with S^reference = 0.
        ref_token_logps: (B, T) or (N,) as `labels`, bf16, fp16, fp32 or fp64: the reference's log-probability in nats
            of each token, at the places where `token_logps` with the same `shift` puts it, in place of `ref_logps`.
            None: see `ref_logps`.
        sequence_weights: (B,), or (B / 2,) of pairs, bf16, fp16, fp32 or fp64, >= 0: each sequence's or pair's loss is
            multiplied by its weight, the negative log-likelihood's part too. "mean" stays the mean over B, or B / 2.
            None: all are 1.
        token_weights: (B, T) or (N,) as `labels`, bf16, fp16, fp32 or fp64, >= 0: the weight of each label's token. A
            sequence's log-probability is the sum of weighted token log-probabilities, and the length that means are
            taken over is the sum of weights, for policy and reference; a `ref_logps` is taken as given. A token of
            weight 0 has no part and no gradient; only a label of `ignore_index` saves its work too. None: all are 1.
        humanline: (log ε_P, log ε_R) in nats, such as (−1.0, 1.5), the default of the authors of humanline (arXiv
            2509.24207): each token's log-ratio is clipped to these bounds before it is summed, in z0 too, and has no
            gradient where it is outside. The reference must be known by token. None: nothing is clipped.
        kl: the KL estimate z0 in nats, as a number or as a () tensor of bf16, fp16, fp32 or fp64; a negative value
            counts as 0. Only KTO has a reference point z0, and takes this argument and the others called `kl_*` or
            `ref_kl_*`. None: z0 is computed from the mismatched completions in the arguments `kl_*`.
        kl_logps: (K,) bf16, fp16, fp32 or fp64: the policy's sequence log-probabilities of mismatched completions, in
            nats. None: they come from `kl_logits`, or z0 is given as `kl`.
        ref_kl_logps: (K,) bf16, fp16, fp32 or fp64: the reference's sequence log-probabilities of the same completions,
            in nats; needed with a reference and not allowed without one. None: they come from `ref_kl_logits`. One of
            the two models may be given as logits and the other one as log-probabilities.
        ref_kl_token_logps: (K, T') or (N',) as `kl_labels`, bf16, fp16, fp32 or fp64: the reference's log-probability
            of each of their tokens, in place of `ref_kl_logps`. None: see `ref_kl_logps`.
        kl_logits: (K, T', V), or packed (N', V) with `kl_cu_seqlens`, in the dtype of `logits`: the policy's logits of
            mismatched completions. None: see `kl_logps`.
        ref_kl_logits: (K, T', V) or (N', V), in the dtype of `logits`: the reference's logits of the same completions.
            None: see `ref_kl_logps`.
        kl_labels: (K, T') or (N',), int32 or int64: the labels that score `kl_logits` and `ref_kl_logits`. None: there
            are no such logits.
        kl_token_weights: (K, T') or (N',) as `kl_labels`, bf16, fp16, fp32 or fp64, >= 0: the weights of their tokens,
            as `token_weights`. None: all are 1.
        kl_cu_seqlens: (K + 1,) int32 or int64: the offsets of packed mismatched completions, from 0 to N'. None: they
            are not packed.
        reduction: "mean" over the B sequences, or the B / 2 pairs (0 for an empty batch), "sum", or "none" for the
            losses (B,) or (B / 2,).
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
        The loss with what trainers log, as a `KTOOutput`: `desirable` says which sequences are desirable or chosen,
            `rewards` are those of the objective, and `kl` is 0 for a loss without a reference point. With `reduction`
            "none" a paired loss has B / 2 entries.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names it.
        ValueError: an argument has a wrong shape, device or value, or arguments exclude or lack each other, or exclude
            the objective; the message names it.
        NotImplementedError: as for `kto_loss`; or the objective defines no `loss`.
        RuntimeError: as for `kto_loss`.

    Examples:
        >>> import torch
        >>> from kto_kernels import objectives, preference_loss
        >>> logits = torch.zeros(2, 3, 5, requires_grad=True)
        >>> labels = torch.tensor([[-100, 1, 2], [-100, 3, 4]])
        >>> ref_logps = torch.tensor([-3.0, -4.0])
        >>> out = preference_loss(logits, labels, objectives.DPO(beta=0.1), ref_logps=ref_logps)  # chosen, then rejected
        >>> out.loss.backward()
        >>> out.rewards
        tensor([-0.0219,  0.0781])
    """
    ranks = Ranks.of(process_group, vocab_group, context_group)
    with ranks.failing_together(logits):
        scoring = Scoring(Scale(temperature=temperature), shift, ignore_index, backend)
        sides = {"policy": logits, "ref": ref_logits, "kl": kl_logits, "ref_kl": ref_kl_logits}
        given = {"ref_logps": ref_logps, "kl_logps": kl_logps, "ref_kl_logps": ref_kl_logps, "kl_value": kl}
        judged = {"labels": labels, "cu_seqlens": cu_seqlens, "desirable": desirable}
        mismatched = {"kl_labels": kl_labels, "kl_cu_seqlens": kl_cu_seqlens}
        weighted = {"sequence_weights": sequence_weights, "token_weights": token_weights}
        tokens = {"ref_token_logps": ref_token_logps, "ref_kl_token_logps": ref_kl_token_logps}
        weighted |= tokens | {"kl_token_weights": kl_token_weights}
        inputs = Inputs("logits", **sides, **given, **judged, **mismatched, **weighted)
        inputs, options, preference = _judging(inputs, ranks, objective, pairs, humanline, reduction)
        inputs = inputs.checked(ranks, scoring, objective=options, vocab=vocab)
        checks.in_place(inplace_backward, logits)
    call = engine.agree(inputs, scoring, options, Chunking(), ranks, vocab, inplace_backward, preference)
    return engine.run(call)


def linear_preference_loss(
    hidden: Tensor,  # (B, T, H) or (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, T) or (N,)
    objective: Unpaired | Paired,
    *,
    desirable: Tensor | None = None,  # (B,) bool
    pairs: Pairs = "halves",
    bias: Tensor | None = None,  # (V,)
    adapter: tuple[Tensor, Tensor, float] | None = None,  # A (r, H), B (V, r), scaling
    ref_hidden: Tensor | None = None,  # (B, T, H') or (N, H')
    ref_weight: Tensor | None = None,  # (V, H')
    ref_bias: Tensor | None = None,  # (V,)
    ref_logps: Tensor | None = None,  # (B,)
    ref_token_logps: Tensor | None = None,  # like labels
    sequence_weights: Tensor | None = None,  # (B,) or (B / 2,)
    token_weights: Tensor | None = None,  # like labels
    humanline: tuple[float, float] | None = None,
    kl: Tensor | float | None = None,  # ()
    kl_logps: Tensor | None = None,  # (K,)
    ref_kl_logps: Tensor | None = None,  # (K,)
    ref_kl_token_logps: Tensor | None = None,  # like kl_labels
    kl_hidden: Tensor | None = None,  # (K, T', H) or (N', H)
    ref_kl_hidden: Tensor | None = None,  # (K, T', H') or (N', H')
    kl_labels: Tensor | None = None,  # (K, T') or (N',)
    kl_token_weights: Tensor | None = None,  # like kl_labels
    kl_cu_seqlens: Tensor | None = None,  # (K + 1,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    max_logits_bytes: int | None = None,
    long_sequences: LongSequences = "auto",
    outputs: tuple[Output, ...] = (),
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
    """`preference_loss(hidden @ weight.T + bias, labels, objective)`, never holding more than `max_logits_bytes` of
    logits.

    Only scored tokens are projected. In GEMM units `G = 2·N·H·V` FLOPs over the N scored tokens, the policy costs 3G
    with a trained head, whose gradient is formed in the forward, 2G with a frozen weight (whose adapter may be trained)
    and 1G without gradients, whatever the loss is; reference and KL cost 1G each. `linear_kto_loss` is the same with
    `objectives.KTO`, to the bit. The members of a pair that a loss compares are in one chunk where both fit; a longer
    pair is deferred or recomputed, see `LinearPlan`.

    Shapes: B sequences of T tokens, or N tokens of packed sequences; H features, and H' of the reference's; V rows of
    the head; K mismatched completions. Groups of ranks, dtypes and DTensors are those of `linear_kto_loss`. Both
    members of a pair are on one data-parallel rank.

    Args:
        hidden: (B, T, H), or packed (N, H) with `cu_seqlens`; bf16, fp16, fp32, or fp64 with backend "torch": the
            inputs of the head. Any strides, so that `hidden[:, :-1]` costs no copy.
        weight: (V, H) bf16, fp16, fp32 or fp64: the head's weight. The weight's gradient is summed in fp32 and has the
            dtype of the weight.
        labels: (B, T) or (N,), int32 or int64: the token that each position predicts, or `ignore_index` where nothing
            is scored (prompt, padding).
        objective: the loss, a record of `kto_kernels.objectives` such as `DPO(beta=0.1)`, or a record of your own.
        desirable: (B,) bool, True for thumbs up; needed by unpaired losses and not allowed with paired ones. None: the
            loss is a paired one.
        pairs: how a paired loss finds its pairs among the B sequences: "halves", the first half is chosen and the
            second half rejected, in the same order, as TRL sends them; or "interleaved", chosen and rejected take
            turns. Unpaired losses ignore it.
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
        ref_token_logps: (B, T) or (N,) as `labels`, bf16, fp16, fp32 or fp64: the reference's log-probability in nats
            of each token, at the places where `token_logps` with the same `shift` puts it, in place of `ref_logps`.
            None: see `ref_logps`.
        sequence_weights: (B,), or (B / 2,) of pairs, bf16, fp16, fp32 or fp64, >= 0: each sequence's or pair's loss is
            multiplied by its weight, the negative log-likelihood's part too. "mean" stays the mean over B, or B / 2.
            None: all are 1.
        token_weights: (B, T) or (N,) as `labels`, bf16, fp16, fp32 or fp64, >= 0: the weight of each label's token. A
            sequence's log-probability is the sum of weighted token log-probabilities, and the length that means are
            taken over is the sum of weights, for policy and reference; a `ref_logps` is taken as given. A token of
            weight 0 has no part and no gradient; only a label of `ignore_index` saves its work too. None: all are 1.
        humanline: (log ε_P, log ε_R) in nats, such as (−1.0, 1.5), the default of the authors of humanline (arXiv
            2509.24207): each token's log-ratio is clipped to these bounds before it is summed, in z0 too, and has no
            gradient where it is outside. The reference must be known by token. None: nothing is clipped.
        kl: the KL estimate z0 in nats, as a number or as a () tensor of bf16, fp16, fp32 or fp64; a negative value
            counts as 0. Only KTO has a reference point z0, and takes this argument and the others called `kl_*` or
            `ref_kl_*`. None: z0 is computed from the mismatched completions in the arguments `kl_*`.
        kl_logps: (K,) bf16, fp16, fp32 or fp64: the policy's sequence log-probabilities of mismatched completions, in
            nats. None: they come from `kl_hidden`, or z0 is given as `kl`.
        ref_kl_logps: (K,) bf16, fp16, fp32 or fp64: the reference's sequence log-probabilities of the same completions,
            in nats; needed with a reference and not allowed without one. None: they come from `ref_kl_hidden`. One of
            the two models may be given as hidden states and the other one as log-probabilities.
        ref_kl_token_logps: (K, T') or (N',) as `kl_labels`, bf16, fp16, fp32 or fp64: the reference's log-probability
            of each of their tokens, in place of `ref_kl_logps`. None: see `ref_kl_logps`.
        kl_hidden: (K, T', H), or packed (N', H) with `kl_cu_seqlens`, bf16, fp16, fp32 or fp64: the policy's hidden
            states of mismatched completions. None: see `kl_logps`.
        ref_kl_hidden: (K, T', H') or (N', H'), bf16, fp16, fp32 or fp64: the reference's hidden states of the same
            completions. None: see `ref_kl_logps`.
        kl_labels: (K, T') or (N',), int32 or int64: the labels that score `kl_hidden` and `ref_kl_hidden`. None: there
            are no such hidden states.
        kl_token_weights: (K, T') or (N',) as `kl_labels`, bf16, fp16, fp32 or fp64, >= 0: the weights of their tokens,
            as `token_weights`. None: all are 1.
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
        reduction: "mean" over the B sequences, or the B / 2 pairs (0 for an empty batch), "sum", or "none" for the
            losses (B,) or (B / 2,).
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
        The loss with what trainers log, as a `KTOOutput`: `desirable` says which sequences are desirable or chosen,
            `rewards` are those of the objective, and `kl` is 0 for a loss without a reference point. With `reduction`
            "none" a paired loss has B / 2 entries.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names it.
        ValueError: an argument has a wrong shape, device or value, or arguments exclude or lack each other, or exclude
            the objective; the message names it.
        NotImplementedError: as for `linear_kto_loss`; or the objective defines no `loss`.
        RuntimeError: as for `linear_kto_loss`.

    Examples:
        >>> import torch
        >>> from kto_kernels import linear_preference_loss, objectives
        >>> hidden, weight = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(5, 4)
        >>> labels = torch.tensor([[-100, 1, 2], [-100, 3, 4]])
        >>> out = linear_preference_loss(hidden, weight, labels, objectives.SimPO(beta=2.0, gamma=0.5))
        >>> out.loss.backward()
        >>> out.logps
        tensor([-3.2189, -3.2189], dtype=torch.float64)
    """
    ranks = Ranks.of(process_group, vocab_group, context_group)
    with ranks.failing_together(hidden):
        scoring = Scoring(Scale(logit_scale, softcap, temperature), shift, ignore_index, backend)
        chunking = Chunking(max_logits_bytes, long_sequences, outputs)
        sides = {"policy": hidden, "ref": ref_hidden, "kl": kl_hidden, "ref_kl": ref_kl_hidden}
        heads = {"weight": weight, "bias": bias, "ref_weight": ref_weight, "ref_bias": ref_bias}
        heads |= {"adapter": Adapter.of(adapter)}
        given = {"ref_logps": ref_logps, "kl_logps": kl_logps, "ref_kl_logps": ref_kl_logps, "kl_value": kl}
        judged = {"labels": labels, "cu_seqlens": cu_seqlens, "desirable": desirable}
        mismatched = {"kl_labels": kl_labels, "kl_cu_seqlens": kl_cu_seqlens}
        weighted = {"sequence_weights": sequence_weights, "token_weights": token_weights}
        tokens = {"ref_token_logps": ref_token_logps, "ref_kl_token_logps": ref_kl_token_logps}
        weighted |= tokens | {"kl_token_weights": kl_token_weights}
        lengths = {"scored_lengths": scored_lengths, "kl_scored_lengths": kl_scored_lengths}
        inputs = Inputs("hidden", **sides, **heads, **given, **judged, **mismatched, **weighted, **lengths)
        inputs, options, preference = _judging(inputs, ranks, objective, pairs, humanline, reduction)
        inputs = inputs.checked(ranks, scoring, chunking, options, vocab)
    return engine.run(engine.agree(inputs, scoring, options, chunking, ranks, vocab, preference=preference))


def checked(objective: object, pairs: object, humanline: object) -> Preference:
    """The loss of a call, checked as far as it can be without the call's tensors."""
    if not isinstance(objective, (Unpaired, Paired)):
        raise TypeError(f"objective: expected a record of kto_kernels.objectives, got {type(objective).__name__}")
    checks.choice("pairs", pairs, get_args(Pairs))
    if humanline is None:
        return Preference(objective, pairs)
    if not isinstance(humanline, (tuple, list)) or len(humanline) != 2:
        raise TypeError(f"humanline: expected two numbers (log ε_P, log ε_R), got {humanline!r}")
    for bound in humanline:
        checks.scalar("humanline", bound)
    lower, upper = map(float, humanline)
    if not lower < upper:
        raise ValueError(f"humanline: expected bounds of which the first is smaller, got ({lower}, {upper})")
    if objective.reference_free:
        name = type(objective).__name__
        raise ValueError(f"humanline: clips log-ratios to a reference, and {name} is reference-free by its definition")
    return Preference(objective, pairs, Clip(lower, upper))


def _judging(
    inputs: Inputs, ranks: Ranks, objective: Unpaired | Paired, pairs: Pairs, humanline: object, reduction: Reduction
) -> tuple[Inputs, Objective, Preference | None]:
    """Checks what a loss allows. Returns the inputs, with chosen sequences as desirable ones, the options of a KTO
    loss, and the loss, None where it is a KTO loss as `kto_loss` has it."""
    preference, name = checked(objective, pairs, humanline), type(objective).__name__
    clip = preference.humanline
    if clip is not None:
        _check_tokens(inputs)
    references = {f"ref_{inputs.kind}": inputs.ref}
    references |= {"ref_logps": inputs.ref_logps, "ref_token_logps": inputs.ref_token_logps}
    sources = {f"{side}_{what}": getattr(inputs, field) for side in ("kl", "ref_kl") for what, field in
               ((inputs.kind, side), ("logps", f"{side}_logps"))} | {"kl": inputs.kl_value}  # fmt: skip
    sources |= {name: getattr(inputs, name) for name in ("ref_kl_token_logps", "kl_token_weights")}
    for argument, value in references.items():
        if objective.reference_free and value is not None:
            raise ValueError(f"{argument}: {name} is reference-free by its definition")
    point = isinstance(objective, Unpaired) and objective.reference_point
    for argument, value in sources.items():
        if not point and value is not None:
            raise ValueError(f"{argument}: {name} has no reference point and takes no KL source")
    if isinstance(objective, Paired):
        if inputs.desirable is not None:
            raise ValueError(f"desirable: {name} compares pairs, see `pairs`, and takes no desirable")
        inputs = _with_pairs(inputs.local(ranks.vocab), pairs)
    elif inputs.desirable is None:
        raise ValueError(f"desirable: needed with {name}, which judges each sequence by itself")
    average = isinstance(objective, KTO) and objective.average_log_prob
    loss_type = "kto" if point else "apo_zero_unpaired"
    weighted = any(
        x is not None for x in (clip, inputs.sequence_weights, inputs.token_weights, inputs.kl_token_weights)
    )
    if type(objective) in (KTO, APOZeroUnpaired) and objective.nll_weight == 0 and not weighted:
        numbers = (objective.beta, objective.desirable_weight, objective.undesirable_weight)
        return inputs, Objective(*numbers, average, reduction, loss_type), None
    options = Objective(average_log_prob=average, reduction=reduction, loss_type=loss_type)
    return inputs, options, preference


def _check_tokens(inputs: Inputs) -> None:
    """Checks that the log-ratios to be clipped are known by token."""
    if inputs.ref is None and inputs.ref_token_logps is None:
        raise ValueError(f"humanline: needs the reference's tokens, in ref_{inputs.kind} or ref_token_logps")
    for argument in ("kl_logps", "ref_kl_logps"):
        if getattr(inputs, argument) is not None:
            raise ValueError(f"{argument}: is a sum, and humanline clips tokens; see kl_{inputs.kind} and kl")


def _with_pairs(inputs: Inputs, pairs: Pairs) -> Inputs:
    """The inputs with the chosen sequences as desirable ones."""
    labels, cu_seqlens = inputs.labels, inputs.cu_seqlens
    if not isinstance(labels, Tensor) or not isinstance(cu_seqlens, (Tensor, type(None))) or not labels.dim():
        count = 0  # the checks that follow name what is wrong
    else:
        count = labels.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if count % 2:
        raise ValueError(f"labels: expected an even number of sequences, chosen and rejected ones, got {count}")
    desirable = torch.zeros(max(0, count), dtype=torch.bool, device=getattr(inputs.policy, "device", None))
    desirable[members(count, pairs)[0]] = True
    return replace(inputs, desirable=desirable, paired=True)
