"""The losses as modules: options at construction, tensors at call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .loss import kto_loss, linear_kto_loss
from .objectives import Paired, Unpaired
from .options import BackendName, Group, LongSequences, LossType, Output, Pairs, Reduction, check
from .output import KTOOutput
from .preference import checked, linear_preference_loss, preference_loss


class _WithOptions(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        if "objective" in options:
            checked(options["objective"], options["pairs"], options["humanline"])
        check(**options)
        self.options: dict[str, Any] = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class KTOLoss(_WithOptions):
    """`kto_loss` as a module: options at construction, tensors at call. `kto_loss` gives the formula, and says more
    about each group of ranks.

    Args:
        beta: β, how sharply the loss saturates, > 0, in 1/nat (arXiv 2402.01306, equations 7 and 8).
        desirable_weight: λ_D, the weight of desirable sequences, >= 0. 1.0 leaves them as they are.
        undesirable_weight: λ_U, the weight of undesirable sequences, >= 0. 1.0 leaves them as they are.
        loss_type: "kto", or "apo_zero_unpaired" (arXiv 2408.06266), which is the same with z0 = 0 and allows no KL
            source.
        average_log_prob: whether a sequence's log-probability is the mean over its scored tokens. False: it is the sum.
        reduction: "mean" over the B sequences (0 for an empty batch), "sum", or "none" for the (B,) losses.
        ignore_index: the label of positions that are not scored. The default is PyTorch's.
        shift: whether position t predicts the label of t + 1 in its sequence. False: labels are shifted already.
        temperature: the logits are divided by it, > 0. 1.0 leaves them as they are.
        inplace_backward: whether the gradient overwrites the logits, which must be neither a leaf nor a view of one.
            Only one backward is possible then.
        process_group: the data-parallel ranks, over whose mismatched completions z0 is the mean. None: this rank's
            alone.
        vocab_group: the ranks each of which has some columns of the logits. None: the logits are whole.
        vocab: the size of the whole vocabulary, checked against the columns given. None: it is not checked.
        context_group: the ranks each of which has some tokens of every sequence. None: the sequences are whole.
        backend: "auto", which takes the first in the device's order of preference that can run, or a name out of
            `available_backends()`.

    Examples:
        >>> import torch
        >>> from kto_kernels import KTOLoss
        >>> loss = KTOLoss(beta=0.1, desirable_weight=1.2, shift=True)
        >>> logits = torch.zeros(2, 3, 5, requires_grad=True)
        >>> labels = torch.tensor([[-100, 1, 2], [-100, 3, 4]])
        >>> out = loss(logits, labels, torch.tensor([True, False]), ref_logps=torch.tensor([-3.0, -4.0]), kl=0.0)
        >>> out.loss.backward()
        >>> out.rewards
        tensor([-0.0219,  0.0781])
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        loss_type: LossType = "kto",
        average_log_prob: bool = False,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        shift: bool = False,
        temperature: float = 1.0,
        inplace_backward: bool = False,
        process_group: Group | None = None,
        vocab_group: Group | None = None,
        vocab: int | None = None,
        context_group: Group | None = None,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__(**{name: value for name, value in locals().items() if name not in ("self", "__class__")})

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        desirable: Tensor,
        *,
        ref_logits: Tensor | None = None,
        ref_logps: Tensor | None = None,
        kl: Tensor | float | None = None,
        kl_logps: Tensor | None = None,
        ref_kl_logps: Tensor | None = None,
        kl_logits: Tensor | None = None,
        ref_kl_logits: Tensor | None = None,
        kl_labels: Tensor | None = None,
        kl_cu_seqlens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> KTOOutput:
        """Calls `kto_loss` with the options of this module.

        Args:
            logits: (B, T, V), or packed (N, V) with `cu_seqlens`; bf16, fp16, fp32, or fp64 with backend "torch".
            labels: (B, T) or (N,), int32 or int64; `ignore_index` where nothing is scored.
            desirable: (B,) bool, True for thumbs up.
            ref_logits: (B, T, V) or (N, V), the reference's logits, in the dtype of `logits`. None: the reference is
                given as `ref_logps`, or there is none.
            ref_logps: (B,) floating, the reference's sequence log-probabilities in nats. None without `ref_logits`: the
                loss is reference-free.
            kl: a number or a () floating tensor, the KL estimate z0 in nats. None: z0 is computed from the other
                `kl_*`.
            kl_logps: (K,) floating, the policy's sequence log-probabilities of mismatched completions, in nats. None:
                they come from `kl_logits`.
            ref_kl_logps: (K,) floating, the reference's sequence log-probabilities of the same completions, in nats.
                None: they come from `ref_kl_logits`.
            kl_logits: (K, T', V) or (N', V), the policy's logits of mismatched completions, in the dtype of `logits`.
                None: see `kl_logps`.
            ref_kl_logits: (K, T', V) or (N', V), the reference's logits of the same completions, in the dtype of
                `logits`. None: see `ref_kl_logps`.
            kl_labels: (K, T') or (N',), int32 or int64, the labels of these logits. None: there are no such logits.
            kl_cu_seqlens: (K + 1,) int32 or int64, the offsets of packed mismatched completions. None: they are not
                packed.
            cu_seqlens: (B + 1,) int32 or int64, the offsets of packed sequences. None: the sequences are padded.

        Returns:
            The loss with what trainers log, as a `KTOOutput`.

        Raises:
            TypeError: as for `kto_loss`.
            ValueError: as for `kto_loss`.
            NotImplementedError: as for `kto_loss`.
            RuntimeError: as for `kto_loss`.
        """
        return kto_loss(
            logits,
            labels,
            desirable,
            ref_logits=ref_logits,
            ref_logps=ref_logps,
            kl=kl,
            kl_logps=kl_logps,
            ref_kl_logps=ref_kl_logps,
            kl_logits=kl_logits,
            ref_kl_logits=ref_kl_logits,
            kl_labels=kl_labels,
            kl_cu_seqlens=kl_cu_seqlens,
            cu_seqlens=cu_seqlens,
            **self.options,
        )


class LinearKTOLoss(_WithOptions):
    """`linear_kto_loss` as a module: options at construction, tensors at call. `linear_kto_loss` says what the loss
    costs, and more about each group of ranks.

    Args:
        logit_scale: the logits x are multiplied by it, > 0: the softmax is taken of
            `z = softcap·tanh(x·logit_scale/softcap)/temperature`. 1.0 leaves them as they are.
        softcap: the bound that the tanh in `z` keeps scaled logits within, > 0. None: there is no tanh.
        temperature: the capped logits are divided by it, > 0. 1.0 leaves them as they are.
        max_logits_bytes: the most bytes of logits that exist at once. None: what suits the device, see `LinearPlan`.
        long_sequences: how the gradient of a sequence whose logits exceed `max_logits_bytes` is formed: "defer" takes a
            second gradient of the head, "recompute" more GEMMs, "auto" the faster way. The result is exact in each way.
        outputs: which numbers to compute for every scored token besides, without gradient, out of "entropy",
            "mean_logits" and "is_top1". (): none.
        beta: β, how sharply the loss saturates, > 0, in 1/nat (arXiv 2402.01306, equations 7 and 8).
        desirable_weight: λ_D, the weight of desirable sequences, >= 0. 1.0 leaves them as they are.
        undesirable_weight: λ_U, the weight of undesirable sequences, >= 0. 1.0 leaves them as they are.
        loss_type: "kto", or "apo_zero_unpaired" (arXiv 2408.06266), which is the same with z0 = 0 and allows no KL
            source.
        average_log_prob: whether a sequence's log-probability is the mean over its scored tokens. False: it is the sum.
        reduction: "mean" over the B sequences (0 for an empty batch), "sum", or "none" for the (B,) losses.
        ignore_index: the label of positions that are not scored. The default is PyTorch's.
        shift: whether position t predicts the label of t + 1 in its sequence. False: labels are shifted already.
        process_group: the data-parallel ranks, over whose mismatched completions z0 is the mean. None: this rank's
            alone.
        vocab_group: the ranks each of which has some rows of the head. None: the head is whole.
        vocab: the size of the whole vocabulary, checked against the rows of the head. None: it is not checked.
        context_group: the ranks each of which has some tokens of every sequence. None: the sequences are whole.
        backend: "auto", which takes the first in the device's order of preference that can run, or a name out of
            `available_backends()`.

    Examples:
        >>> import torch
        >>> from kto_kernels import LinearKTOLoss
        >>> loss = LinearKTOLoss(beta=0.1, shift=True)
        >>> head = torch.nn.Linear(8, 5, bias=False)
        >>> hidden = torch.zeros(2, 3, 8)
        >>> labels = torch.tensor([[-100, 1, 2], [-100, 3, 4]])
        >>> out = loss(hidden, head.weight, labels, torch.tensor([True, False]), kl=0.0)
        >>> out.loss.backward()
        >>> out.logps
        tensor([-3.2189, -3.2189], dtype=torch.float64)
    """

    def __init__(
        self,
        *,
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
        process_group: Group | None = None,
        vocab_group: Group | None = None,
        vocab: int | None = None,
        context_group: Group | None = None,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__(**{name: value for name, value in locals().items() if name not in ("self", "__class__")})

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        desirable: Tensor,
        *,
        bias: Tensor | None = None,
        adapter: tuple[Tensor, Tensor, float] | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        kl: Tensor | float | None = None,
        kl_logps: Tensor | None = None,
        ref_kl_logps: Tensor | None = None,
        kl_hidden: Tensor | None = None,
        ref_kl_hidden: Tensor | None = None,
        kl_labels: Tensor | None = None,
        kl_cu_seqlens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        scored_lengths: Sequence[int] | Tensor | None = None,
        kl_scored_lengths: Sequence[int] | Tensor | None = None,
    ) -> KTOOutput:
        """Calls `linear_kto_loss` with the options of this module.

        Args:
            hidden: (B, T, H), or packed (N, H) with `cu_seqlens`; bf16, fp16, fp32, or fp64 with backend "torch".
            weight: (V, H) bf16, fp16, fp32 or fp64, the head's weight.
            labels: (B, T) or (N,), int32 or int64; `ignore_index` where nothing is scored.
            desirable: (B,) bool, True for thumbs up.
            bias: (V,) floating, the head's bias. None: the head has none.
            adapter: (A, B, scaling), a LoRA adapter on the policy's head: A (r, H) floating, B (V, r) floating, and a
                number. None: no adapter is on the head.
            ref_hidden: (B, T, H') or (N, H') floating, the reference's hidden states. None: the reference is given as
                `ref_logps`, or there is none.
            ref_weight: (V, H') floating, the reference's head; `weight` where policy and reference share it. None:
                there is no `ref_hidden`.
            ref_bias: (V,) floating, the bias of the reference's head. None: the reference's head has none.
            ref_logps: (B,) floating, the reference's sequence log-probabilities in nats. None without `ref_hidden`: the
                loss is reference-free.
            kl: a number or a () floating tensor, the KL estimate z0 in nats. None: z0 is computed from the other
                `kl_*`.
            kl_logps: (K,) floating, the policy's sequence log-probabilities of mismatched completions, in nats. None:
                they come from `kl_hidden`.
            ref_kl_logps: (K,) floating, the reference's sequence log-probabilities of the same completions, in nats.
                None: they come from `ref_kl_hidden`.
            kl_hidden: (K, T', H) or (N', H) floating, the policy's hidden states of mismatched completions. None: see
                `kl_logps`.
            ref_kl_hidden: (K, T', H') or (N', H') floating, the reference's hidden states of the same completions.
                None: see `ref_kl_logps`.
            kl_labels: (K, T') or (N',), int32 or int64, the labels of these hidden states. None: there are no such
                hidden states.
            kl_cu_seqlens: (K + 1,) int32 or int64, the offsets of packed mismatched completions. None: they are not
                packed.
            cu_seqlens: (B + 1,) int32 or int64, the offsets of packed sequences. None: the sequences are padded.
            scored_lengths: B ints, or (B,) int32 or int64 on the CPU: how many positions of each sequence have a label
                that scores them, on this rank. With them nothing waits for the device. None: they are read from the
                device.
            kl_scored_lengths: K ints, or (K,) int32 or int64 on the CPU, as `scored_lengths` of `kl_labels`. None: they
                are read from the device.

        Returns:
            The loss with what trainers log, as a `KTOOutput`.

        Raises:
            TypeError: as for `linear_kto_loss`.
            ValueError: as for `linear_kto_loss`.
            NotImplementedError: as for `linear_kto_loss`.
            RuntimeError: as for `linear_kto_loss`.
        """
        return linear_kto_loss(
            hidden,
            weight,
            labels,
            desirable,
            bias=bias,
            adapter=adapter,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            ref_logps=ref_logps,
            kl=kl,
            kl_logps=kl_logps,
            ref_kl_logps=ref_kl_logps,
            kl_hidden=kl_hidden,
            ref_kl_hidden=ref_kl_hidden,
            kl_labels=kl_labels,
            kl_cu_seqlens=kl_cu_seqlens,
            cu_seqlens=cu_seqlens,
            scored_lengths=scored_lengths,
            kl_scored_lengths=kl_scored_lengths,
            **self.options,
        )


class PreferenceLoss(_WithOptions):
    """`preference_loss` as a module: options at construction, tensors at call. `preference_loss` says more about each
    of them.

    Args:
        objective: the loss, a record of `kto_kernels.objectives` such as `DPO(beta=0.1)`, or a record of your own.
        pairs: how a paired loss finds its pairs: "halves", the first half of the batch is chosen and the second half
            rejected, or "interleaved", chosen and rejected take turns. Unpaired losses ignore it.
        humanline: (log ε_P, log ε_R) in nats, the bounds that token log-ratios are clipped to (arXiv 2509.24207). None:
            nothing is clipped.
        reduction: "mean" over the B sequences, or the B / 2 pairs (0 for an empty batch), "sum", or "none" for the
            losses (B,) or (B / 2,).
        ignore_index: the label of positions that are not scored. The default is PyTorch's.
        shift: whether position t predicts the label of t + 1 in its sequence. False: labels are shifted already.
        temperature: the logits are divided by it, > 0. 1.0 leaves them as they are.
        inplace_backward: whether the gradient overwrites the logits, which must be neither a leaf nor a view of one.
            Only one backward is possible then.
        process_group: the data-parallel ranks, over whose mismatched completions z0 is the mean, and over whose tokens a
            negative log-likelihood is. None: this rank's alone.
        vocab_group: the ranks each of which has some columns of the logits. None: the logits are whole.
        vocab: the size of the whole vocabulary, checked against the columns given. None: it is not checked.
        context_group: the ranks each of which has some tokens of every sequence. None: the sequences are whole.
        backend: "auto", which takes the first in the device's order of preference that can run, or a name out of
            `available_backends()`.

    Examples:
        >>> import torch
        >>> from kto_kernels import PreferenceLoss, objectives
        >>> loss = PreferenceLoss(objectives.DPO(beta=0.1))
        >>> logits = torch.zeros(2, 3, 5, requires_grad=True)
        >>> labels = torch.tensor([[-100, 1, 2], [-100, 3, 4]])
        >>> out = loss(logits, labels, ref_logps=torch.tensor([-3.0, -4.0]))
        >>> out.loss.backward()
        >>> out.rewards
        tensor([-0.0219,  0.0781])
    """

    def __init__(
        self,
        objective: Unpaired | Paired,
        *,
        pairs: Pairs = "halves",
        humanline: tuple[float, float] | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        shift: bool = False,
        temperature: float = 1.0,
        inplace_backward: bool = False,
        process_group: Group | None = None,
        vocab_group: Group | None = None,
        vocab: int | None = None,
        context_group: Group | None = None,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__(**{name: value for name, value in locals().items() if name not in ("self", "__class__")})

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        desirable: Tensor | None = None,
        ref_logits: Tensor | None = None,
        ref_logps: Tensor | None = None,
        ref_token_logps: Tensor | None = None,
        sequence_weights: Tensor | None = None,
        token_weights: Tensor | None = None,
        kl: Tensor | float | None = None,
        kl_logps: Tensor | None = None,
        ref_kl_logps: Tensor | None = None,
        ref_kl_token_logps: Tensor | None = None,
        kl_logits: Tensor | None = None,
        ref_kl_logits: Tensor | None = None,
        kl_labels: Tensor | None = None,
        kl_token_weights: Tensor | None = None,
        kl_cu_seqlens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> KTOOutput:
        """Calls `preference_loss` with the options of this module.

        Args:
            logits: (B, T, V), or packed (N, V) with `cu_seqlens`; bf16, fp16, fp32, or fp64 with backend "torch".
            labels: (B, T) or (N,), int32 or int64; `ignore_index` where nothing is scored.
            desirable: (B,) bool, True for thumbs up; needed by unpaired losses. None: the loss is a paired one.
            ref_logits: (B, T, V) or (N, V), the reference's logits, in the dtype of `logits`. None: the reference is
                given as `ref_logps`, or there is none.
            ref_logps: (B,) floating, the reference's sequence log-probabilities in nats. None without `ref_logits`: the
                loss is reference-free.
            ref_token_logps: (B, T) or (N,) floating, the reference's log-probability of each token, in nats. None: see
                `ref_logps`.
            sequence_weights: (B,), or (B / 2,) of pairs, floating, by which the losses are multiplied. None: all are 1.
            token_weights: (B, T) or (N,) floating, by which token log-probabilities are multiplied. None: all are 1.
            kl: a number or a () floating tensor, the KL estimate z0 in nats. None: z0 is computed from the other
                `kl_*`.
            kl_logps: (K,) floating, the policy's sequence log-probabilities of mismatched completions, in nats. None:
                they come from `kl_logits`.
            ref_kl_logps: (K,) floating, the reference's sequence log-probabilities of the same completions, in nats.
                None: they come from `ref_kl_logits`.
            ref_kl_token_logps: (K, T') or (N',) floating, the reference's log-probability of each token of mismatched
                completions, in nats. None: see `ref_kl_logps`.
            kl_logits: (K, T', V) or (N', V), the policy's logits of mismatched completions, in the dtype of `logits`.
                None: see `kl_logps`.
            ref_kl_logits: (K, T', V) or (N', V), the reference's logits of the same completions, in the dtype of
                `logits`. None: see `ref_kl_logps`.
            kl_labels: (K, T') or (N',), int32 or int64, the labels of these logits. None: there are no such logits.
            kl_token_weights: (K, T') or (N',) floating, by which the token log-probabilities of mismatched completions
                are multiplied. None: all are 1.
            kl_cu_seqlens: (K + 1,) int32 or int64, the offsets of packed mismatched completions. None: they are not
                packed.
            cu_seqlens: (B + 1,) int32 or int64, the offsets of packed sequences. None: the sequences are padded.

        Returns:
            The loss with what trainers log, as a `KTOOutput`.

        Raises:
            TypeError: as for `preference_loss`.
            ValueError: as for `preference_loss`.
            NotImplementedError: as for `preference_loss`.
            RuntimeError: as for `preference_loss`.
        """
        return preference_loss(
            logits,
            labels,
            desirable=desirable,
            ref_logits=ref_logits,
            ref_logps=ref_logps,
            ref_token_logps=ref_token_logps,
            sequence_weights=sequence_weights,
            token_weights=token_weights,
            kl=kl,
            kl_logps=kl_logps,
            ref_kl_logps=ref_kl_logps,
            ref_kl_token_logps=ref_kl_token_logps,
            kl_logits=kl_logits,
            ref_kl_logits=ref_kl_logits,
            kl_labels=kl_labels,
            kl_token_weights=kl_token_weights,
            kl_cu_seqlens=kl_cu_seqlens,
            cu_seqlens=cu_seqlens,
            **self.options,
        )


class LinearPreferenceLoss(_WithOptions):
    """`linear_preference_loss` as a module: options at construction, tensors at call. `linear_preference_loss` says
    more about each of them.

    Args:
        objective: the loss, a record of `kto_kernels.objectives` such as `DPO(beta=0.1)`, or a record of your own.
        pairs: how a paired loss finds its pairs: "halves", the first half of the batch is chosen and the second half
            rejected, or "interleaved", chosen and rejected take turns. Unpaired losses ignore it.
        humanline: (log ε_P, log ε_R) in nats, the bounds that token log-ratios are clipped to (arXiv 2509.24207). None:
            nothing is clipped.
        logit_scale: the logits x are multiplied by it, > 0: the softmax is taken of `z =
            softcap·tanh(x·logit_scale/softcap)/temperature`. 1.0 leaves them as they are.
        softcap: the bound that the tanh in `z` keeps scaled logits within, > 0. None: there is no tanh.
        temperature: the capped logits are divided by it, > 0. 1.0 leaves them as they are.
        max_logits_bytes: the most bytes of logits that exist at once. None: what suits the device, see `LinearPlan`.
        long_sequences: how the gradient of a sequence whose logits exceed `max_logits_bytes` is formed: "defer" takes a
            second gradient of the head, "recompute" more GEMMs, "auto" the faster way. The result is exact in each way.
        outputs: which numbers to compute for every scored token besides, without gradient, out of "entropy",
            "mean_logits" and "is_top1". (): none.
        reduction: "mean" over the B sequences, or the B / 2 pairs (0 for an empty batch), "sum", or "none" for the
            losses (B,) or (B / 2,).
        ignore_index: the label of positions that are not scored. The default is PyTorch's.
        shift: whether position t predicts the label of t + 1 in its sequence. False: labels are shifted already.
        process_group: the data-parallel ranks, over whose mismatched completions z0 is the mean, and over whose tokens a
            negative log-likelihood is. None: this rank's alone.
        vocab_group: the ranks each of which has some rows of the head. None: the head is whole.
        vocab: the size of the whole vocabulary, checked against the rows of the head. None: it is not checked.
        context_group: the ranks each of which has some tokens of every sequence. None: the sequences are whole.
        backend: "auto", which takes the first in the device's order of preference that can run, or a name out of
            `available_backends()`.

    Examples:
        >>> import torch
        >>> from kto_kernels import LinearPreferenceLoss, objectives
        >>> loss = LinearPreferenceLoss(objectives.SimPO(beta=2.0, gamma=0.5))
        >>> head = torch.nn.Linear(8, 5, bias=False)
        >>> labels = torch.tensor([[-100, 1, 2], [-100, 3, 4]])
        >>> out = loss(torch.zeros(2, 3, 8), head.weight, labels)
        >>> out.loss.backward()
        >>> out.logps
        tensor([-3.2189, -3.2189], dtype=torch.float64)
    """

    def __init__(
        self,
        objective: Unpaired | Paired,
        *,
        pairs: Pairs = "halves",
        humanline: tuple[float, float] | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        max_logits_bytes: int | None = None,
        long_sequences: LongSequences = "auto",
        outputs: tuple[Output, ...] = (),
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        shift: bool = False,
        process_group: Group | None = None,
        vocab_group: Group | None = None,
        vocab: int | None = None,
        context_group: Group | None = None,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__(**{name: value for name, value in locals().items() if name not in ("self", "__class__")})

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        desirable: Tensor | None = None,
        bias: Tensor | None = None,
        adapter: tuple[Tensor, Tensor, float] | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        ref_token_logps: Tensor | None = None,
        sequence_weights: Tensor | None = None,
        token_weights: Tensor | None = None,
        kl: Tensor | float | None = None,
        kl_logps: Tensor | None = None,
        ref_kl_logps: Tensor | None = None,
        ref_kl_token_logps: Tensor | None = None,
        kl_hidden: Tensor | None = None,
        ref_kl_hidden: Tensor | None = None,
        kl_labels: Tensor | None = None,
        kl_token_weights: Tensor | None = None,
        kl_cu_seqlens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        scored_lengths: Sequence[int] | Tensor | None = None,
        kl_scored_lengths: Sequence[int] | Tensor | None = None,
    ) -> KTOOutput:
        """Calls `linear_preference_loss` with the options of this module.

        Args:
            hidden: (B, T, H), or packed (N, H) with `cu_seqlens`; bf16, fp16, fp32, or fp64 with backend "torch".
            weight: (V, H) bf16, fp16, fp32 or fp64, the head's weight.
            labels: (B, T) or (N,), int32 or int64; `ignore_index` where nothing is scored.
            desirable: (B,) bool, True for thumbs up; needed by unpaired losses. None: the loss is a paired one.
            bias: (V,) floating, the head's bias. None: the head has none.
            adapter: (A, B, scaling), a LoRA adapter on the policy's head: A (r, H) floating, B (V, r) floating, and a
                number. None: no adapter is on the head.
            ref_hidden: (B, T, H') or (N, H') floating, the reference's hidden states. None: the reference is given as
                `ref_logps`, or there is none.
            ref_weight: (V, H') floating, the reference's head; `weight` where policy and reference share it. None:
                there is no `ref_hidden`.
            ref_bias: (V,) floating, the bias of the reference's head. None: the reference's head has none.
            ref_logps: (B,) floating, the reference's sequence log-probabilities in nats. None without `ref_hidden`: the
                loss is reference-free.
            ref_token_logps: (B, T) or (N,) floating, the reference's log-probability of each token, in nats. None: see
                `ref_logps`.
            sequence_weights: (B,), or (B / 2,) of pairs, floating, by which the losses are multiplied. None: all are 1.
            token_weights: (B, T) or (N,) floating, by which token log-probabilities are multiplied. None: all are 1.
            kl: a number or a () floating tensor, the KL estimate z0 in nats. None: z0 is computed from the other
                `kl_*`.
            kl_logps: (K,) floating, the policy's sequence log-probabilities of mismatched completions, in nats. None:
                they come from `kl_hidden`.
            ref_kl_logps: (K,) floating, the reference's sequence log-probabilities of the same completions, in nats.
                None: they come from `ref_kl_hidden`.
            ref_kl_token_logps: (K, T') or (N',) floating, the reference's log-probability of each token of mismatched
                completions, in nats. None: see `ref_kl_logps`.
            kl_hidden: (K, T', H) or (N', H) floating, the policy's hidden states of mismatched completions. None: see
                `kl_logps`.
            ref_kl_hidden: (K, T', H') or (N', H') floating, the reference's hidden states of the same completions.
                None: see `ref_kl_logps`.
            kl_labels: (K, T') or (N',), int32 or int64, the labels of these hidden states. None: there are no such
                hidden states.
            kl_token_weights: (K, T') or (N',) floating, by which the token log-probabilities of mismatched completions
                are multiplied. None: all are 1.
            kl_cu_seqlens: (K + 1,) int32 or int64, the offsets of packed mismatched completions. None: they are not
                packed.
            cu_seqlens: (B + 1,) int32 or int64, the offsets of packed sequences. None: the sequences are padded.
            scored_lengths: B ints, or (B,) int32 or int64 on the CPU: how many positions of each sequence have a label
                that scores them, on this rank. With them nothing waits for the device. None: they are read from the
                device.
            kl_scored_lengths: K ints, or (K,) int32 or int64 on the CPU, as `scored_lengths` of `kl_labels`. None: they
                are read from the device.

        Returns:
            The loss with what trainers log, as a `KTOOutput`.

        Raises:
            TypeError: as for `linear_preference_loss`.
            ValueError: as for `linear_preference_loss`.
            NotImplementedError: as for `linear_preference_loss`.
            RuntimeError: as for `linear_preference_loss`.
        """
        return linear_preference_loss(
            hidden,
            weight,
            labels,
            desirable=desirable,
            bias=bias,
            adapter=adapter,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            ref_logps=ref_logps,
            ref_token_logps=ref_token_logps,
            sequence_weights=sequence_weights,
            token_weights=token_weights,
            kl=kl,
            kl_logps=kl_logps,
            ref_kl_logps=ref_kl_logps,
            ref_kl_token_logps=ref_kl_token_logps,
            kl_hidden=kl_hidden,
            ref_kl_hidden=ref_kl_hidden,
            kl_labels=kl_labels,
            kl_token_weights=kl_token_weights,
            kl_cu_seqlens=kl_cu_seqlens,
            cu_seqlens=cu_seqlens,
            scored_lengths=scored_lengths,
            kl_scored_lengths=kl_scored_lengths,
            **self.options,
        )
