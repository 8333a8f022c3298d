"""The stages as functions on their own, for any other loss:

    token_logps or linear_token_logps → sequence_logps → kl_reference_point → value → loss

The seam behind stage 1 is where other libraries join: they can give or take the token log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import checks, engine, reference
from .inputs import Inputs
from .linear.head import Adapter
from .options import BackendName, Chunking, Group, LossType, Objective, Reduction, Scale, Scoring
from .output import KTOOutput
from .parallel.agreement import Ranks, fingerprints


def token_logps(
    logits: Tensor,  # (B, T, V) or (N, V)
    labels: Tensor,  # (B, T) or (N,)
    *,
    shift: bool = False,
    ignore_index: int = -100,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    vocab_group: Group | None = None,
    vocab: int | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """Stage 1, the seam: `ℓ_n = log softmax(logits_n / temperature)[label_n]`, differentiable, in nats.

    Args:
        logits: (B, T, V), or (N, V), which is one sequence; bf16, fp16, fp32, or fp64 with backend "torch". Any strides
            but along V. DTensors as for `kto_loss`.
        labels: (B, T) or (N,), int32 or int64; `ignore_index` where nothing is scored.
        shift: whether position t predicts the label of t + 1 in its sequence. False: position t predicts the label of
            t.
        ignore_index: the label of positions that are not scored. The default is PyTorch's.
        temperature: the logits are divided by it, > 0. 1.0 leaves them as they are.
        inplace_backward: whether the gradient overwrites `logits`, which must be neither a leaf nor a view of one. Only
            one backward is possible then.
        vocab_group: a ProcessGroup or one-dimensional DeviceMesh, each of whose ranks has some columns of `logits`, in
            the order of ranks. None: the logits are whole.
        vocab: the size of the whole vocabulary, checked against the columns given, or with a `vocab_group` against the
            sum of all ranks' columns. None: it is not checked.
        backend: "auto", which takes the first in the device's order of preference that can run, or a name out of
            `available_backends()`.

    Returns:
        The log-probabilities, of the shape of `labels`, fp32 (fp64 for fp64 logits); 0 at ignored positions, and with
            `shift` at each sequence's last position. A label whose logit is −inf gives −inf.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names it.
        ValueError: an argument has a wrong shape, device or value; the message names it. The values of labels on a GPU
            are not looked at but under KTO_KERNELS_DEBUG=1.
        NotImplementedError: `torch.func` or forward-mode differentiation is applied to the call.
        RuntimeError: the backend named is not available; another rank of the group has other options or failed its
            checks; or, in the backward, the gradient is differentiated again, or the logits have been overwritten.

    Examples:
        >>> import torch
        >>> from kto_kernels import token_logps
        >>> logits = torch.zeros(1, 3, 5, requires_grad=True)
        >>> logps = token_logps(logits, torch.tensor([[-100, 1, 2]]))
        >>> logps.sum().backward()
        >>> logps.detach()
        tensor([[ 0.0000, -1.6094, -1.6094]])
    """
    ranks = Ranks.of(vocab_group=vocab_group)
    with ranks.failing_together(logits):
        scoring = Scoring(Scale(temperature=temperature), shift, ignore_index, backend)
        inputs = Inputs("logits", logits, labels).checked(ranks, scoring, vocab=vocab, packed=False)
        checks.in_place(inplace_backward, logits)
    call = engine.agree(inputs, scoring, Objective(), Chunking(), ranks, vocab, inplace_backward)
    return call.token_logps(call.inputs.side(""))["logps"]


def linear_token_logps(
    hidden: Tensor,  # (B, T, H) or (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, T) or (N,)
    *,
    bias: Tensor | None = None,  # (V,)
    adapter: tuple[Tensor, Tensor, float] | None = None,  # A (r, H), B (V, r), scaling
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    max_logits_bytes: int | None = None,
    scored_lengths: Sequence[int] | Tensor | None = None,  # (B,), or one of (N,)
    vocab_group: Group | None = None,
    vocab: int | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """Stage 1 from hidden states: `token_logps(hidden @ weight.T + bias, labels)`, differentiable in `hidden`,
    `weight`, `bias` and `adapter`. At most `max_logits_bytes` of logits exist at a time.

    One GEMM unit is `G = 2·N·H·V` FLOPs over the N scored tokens. Without gradients the call costs 1G. With a frozen
    head the forward forms the hidden states' gradient too, and the backward of any loss on top only scales the rows of
    this gradient: 2G in all. With a trained head (`weight`, `bias` or `adapter` requires grad) the backward computes the
    logits once more: 4G in all, or 3G where `weight` is frozen.

    The GEMMs run in autocast's dtype where autocast is on and `hidden` is not fp64, else in the dtype of `hidden`. A
    loss that compares two models needs the hidden states of both in one dtype.

    Args:
        hidden: (B, T, H), or (N, H), which is one sequence; bf16, fp16, fp32, or fp64 with backend "torch". Any
            strides. Hidden states and head may be DTensors as for `linear_kto_loss`.
        weight: (V, H) bf16, fp16, fp32 or fp64: the head's weight.
        labels: (B, T) or (N,), int32 or int64; `ignore_index` where nothing is scored.
        bias: (V,) bf16, fp16, fp32 or fp64: the head's bias. None: the head has none.
        adapter: (A, B, scaling), a LoRA adapter on the head, A (r, H) and B (V, r) bf16, fp16, fp32 or fp64 and
            the scaling a number >= 0: the logits have `scaling · (h Aᵀ) Bᵀ` added, without dropout. None: no adapter is
            on the head.
        shift: whether position t predicts the label of t + 1 in its sequence. False: position t predicts the label of
            t.
        ignore_index: the label of positions that are not scored. The default is PyTorch's.
        logit_scale: the logits x are multiplied by it, > 0: the softmax is taken of
            `z = softcap·tanh(x·logit_scale/softcap)/temperature`. 1.0 leaves them as they are.
        softcap: the bound that the tanh in `z` keeps scaled logits within, > 0. None: there is no tanh.
        temperature: the capped logits are divided by it, > 0. 1.0 leaves them as they are.
        max_logits_bytes: the most bytes of logits that exist at once. None: what suits the device, see `LinearPlan`.
        scored_lengths: how many positions of each of the B sequences, or of the one of (N,), have a label that scores
            them: ints, or (B,) int32 or int64 on the CPU, as for `linear_kto_loss`. With them nothing waits for the
            device, in the backward neither. None: they are read from the device.
        vocab_group: a ProcessGroup or one-dimensional DeviceMesh, each of whose ranks has some rows of `weight`,
            `bias` and the adapter's B, in the order of ranks, and the whole `hidden` and A. None: the head is whole.
        vocab: the size of the whole vocabulary, checked against the rows of `weight`, or with a `vocab_group` against
            the sum of all ranks' rows. None: it is not checked.
        backend: "auto", which takes the first in the device's order of preference that can run, or a name out of
            `available_backends()`. The backend scores the chunks; the GEMMs are PyTorch's.

    Returns:
        The log-probabilities in nats, of the shape of `labels`, fp32 (fp64 for fp64 `hidden`); 0 at ignored positions,
            and with `shift` at each sequence's last position.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names it.
        ValueError: an argument has a wrong shape, device or value, or `max_logits_bytes` holds not one row of logits;
            the message names the argument. The values of labels on a GPU are not looked at but under
            KTO_KERNELS_DEBUG=1.
        NotImplementedError: `torch.func` or forward-mode differentiation is applied to the call.
        RuntimeError: the backend named is not available; another rank of the group has other options or failed its
            checks; or, in the backward, the gradient is differentiated again, or asked for a second time.

    Examples:
        >>> import torch
        >>> from kto_kernels import linear_token_logps
        >>> hidden = torch.ones(4, 8, requires_grad=True)
        >>> logps = linear_token_logps(hidden, torch.zeros(5, 8), torch.tensor([1, 2, 3, -100]))
        >>> logps.sum().backward()
        >>> logps.detach()
        tensor([-1.6094, -1.6094, -1.6094,  0.0000])
    """
    ranks = Ranks.of(vocab_group=vocab_group)
    with ranks.failing_together(hidden):
        scoring = Scoring(Scale(logit_scale, softcap, temperature), shift, ignore_index, backend)
        chunking = Chunking(max_logits_bytes)
        head = {"weight": weight, "bias": bias, "adapter": Adapter.of(adapter)}
        inputs = Inputs("hidden", hidden, labels, **head, scored_lengths=scored_lengths)
        inputs = inputs.checked(ranks, scoring, chunking, vocab=vocab, packed=False)
    call = engine.agree(inputs, scoring, Objective(), chunking, ranks, vocab)
    return call.token_logps(call.inputs.side(""))["logps"]


def sequence_logps(
    logps: Tensor,  # (B, T) or (N,)
    *,
    labels: Tensor | None = None,  # like logps
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    average_log_prob: bool = False,
    ignore_index: int = -100,
    shift: bool = False,
    context_group: Group | None = None,
) -> Tensor:
    """Stage 2: the sum of each sequence's token log-probabilities, or the mean over the scored tokens.

    Args:
        logps: (B, T), or packed (N,) with `cu_seqlens`, bf16, fp16, fp32 or fp64: token log-probabilities in nats, 0
            where nothing is scored, as `token_logps` gives them.
        labels: (B, T) or (N,), int32 or int64: the labels of the tokens, needed with `average_log_prob` to count the
            scored ones. None: they are not counted.
        cu_seqlens: (B + 1,) int32 or int64: the offsets of packed sequences, from 0 to N. None: the sequences are
            padded.
        average_log_prob: whether to give means over the scored tokens. False: sums.
        ignore_index: the label of positions that are not scored. The default is PyTorch's.
        shift: whether position t has the label of t + 1 in its sequence, as for `token_logps`. False: it has the label
            of t.
        context_group: a ProcessGroup or one-dimensional DeviceMesh, each of whose ranks has some tokens of every
            sequence. Every rank returns the sums over all tokens, and gets the gradient of its own tokens. `shift` must
            be False. None: the sequences are whole.

    Returns:
        (B,) fp64 in nats, differentiable. In fp32 long sequences would lose digits that the difference to the reference
            needs.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names it.
        ValueError: an argument has a wrong shape, device or value, or `labels` are missing; the message names the
            argument.
        RuntimeError: another rank of the group has other options or failed its checks, or torch.distributed is not
            initialised.

    Examples:
        >>> import torch
        >>> from kto_kernels import sequence_logps
        >>> sequence_logps(torch.tensor([[0.0, -1.0, -2.0], [0.0, -0.5, 0.0]]))
        tensor([-3.0000, -0.5000], dtype=torch.float64)
        >>> sequence_logps(torch.tensor([-1.0, -2.0, -0.5]), cu_seqlens=torch.tensor([0, 2, 3]))
        tensor([-3.0000, -0.5000], dtype=torch.float64)
    """
    ranks = Ranks.of(context_group=context_group)
    with ranks.failing_together(logps):
        checks.tensor("logps", logps, checks.FLOATS)
        average_log_prob = checks.flag("average_log_prob", average_log_prob)
        shift, ignore_index = checks.flag("shift", shift), checks.integer("ignore_index", ignore_index)
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
        ranks = ranks.sharing({"average_log_prob": average_log_prob})
        ranks.agree_on(logps.device, parts=fingerprints(logps=logps.unsqueeze(-1)), sequences=count)
    scored = None
    if average_log_prob:
        scored = reference.targets(labels, shift, ignore_index, cu_seqlens) != ignore_index
    return engine.sequence_sums(logps, scored, cu_seqlens, ranks)


def kl_reference_point(
    kl_logps: Tensor,  # (K,)
    ref_kl_logps: Tensor | None = None,  # (K,)
    *,
    process_group: Group | None = None,
) -> Tensor:
    """Stage 3: the KL estimate `z0 = max(0, mean_j(S^policy_j − S^reference_j))` over K mismatched completions.

    Args:
        kl_logps: (K,) bf16, fp16, fp32 or fp64: the policy's sequence log-probabilities of mismatched completions, in
            nats.
        ref_kl_logps: (K,) bf16, fp16, fp32 or fp64: the reference's sequence log-probabilities of the same completions,
            in nats. None: they count as 0.
        process_group: a ProcessGroup or one-dimensional DeviceMesh. The mean is over the completions of all ranks: one
            all-reduce adds the ranks' sums and counts before the division and the clamp. None: this rank's completions
            alone.

    Returns:
        z0 in nats, () fp64, without gradient (arXiv 2402.01306, equations 7 and 8). An empty batch gives 0.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names it.
        ValueError: an argument has a wrong shape or device; the message names it.
        RuntimeError: another rank's checks failed, or torch.distributed is not initialised.

    Examples:
        >>> import torch
        >>> from kto_kernels import kl_reference_point
        >>> kl_reference_point(torch.tensor([-3.0, -4.0]), torch.tensor([-4.0, -4.5]))
        tensor(0.7500, dtype=torch.float64)
        >>> kl_reference_point(torch.tensor([-5.0]), torch.tensor([-4.0]))
        tensor(0., dtype=torch.float64)
    """
    ranks = Ranks.of(process_group)
    with ranks.failing_together(kl_logps):
        checks.tensor("kl_logps", kl_logps, checks.FLOATS)
        checks.kl_pair(kl_logps, ref_kl_logps, None, kl_logps)
    return ranks.start_reference_point(kl_logps, ref_kl_logps, kl_logps)()


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
    loss_type: LossType = "kto",
    reduction: Reduction = "mean",
    process_group: Group | None = None,
) -> KTOOutput:
    """Stages 3 to 5: the loss from sequence log-probabilities, in plain PyTorch, differentiable in `logps`.

    Args:
        logps: (B,) bf16, fp16, fp32 or fp64: the policy's sequence log-probabilities in nats.
        desirable: (B,) bool, True for thumbs up.
        ref_logps: (B,) bf16, fp16, fp32 or fp64: the reference's sequence log-probabilities in nats. None: the loss is
            reference-free, with S^reference = 0.
        kl: the KL estimate z0 in nats, as a number or as a () tensor of bf16, fp16, fp32 or fp64; a negative value
            counts as 0. None: z0 is computed from `kl_logps`.
        kl_logps: (K,) bf16, fp16, fp32 or fp64: the policy's sequence log-probabilities of mismatched completions, in
            nats. None: z0 is given as `kl`.
        ref_kl_logps: (K,) bf16, fp16, fp32 or fp64: the reference's sequence log-probabilities of the same completions,
            in nats; needed with a reference. None: there is no reference, or z0 is given as `kl`.
        beta: β, how sharply the loss saturates, > 0, in 1/nat (arXiv 2402.01306, equations 7 and 8).
        desirable_weight: λ_D, the weight of desirable sequences, >= 0. 1.0 leaves them as they are.
        undesirable_weight: λ_U, the weight of undesirable sequences, >= 0. 1.0 leaves them as they are.
        loss_type: "kto", or "apo_zero_unpaired" (arXiv 2408.06266), which is the same with z0 = 0 and allows no KL
            source.
        reduction: "mean" over the B sequences (0 for an empty batch), "sum", or "none" for the (B,) losses.
        process_group: a ProcessGroup or one-dimensional DeviceMesh, over all of whose ranks' mismatched completions z0
            is the mean. None: this rank's completions alone.

    Returns:
        The loss with what trainers log, as a `KTOOutput`. The loss has the dtype of `logps`, at least fp32.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names it.
        ValueError: an argument has a wrong shape, device or value, or arguments exclude or lack each other; the message
            names it.
        RuntimeError: another rank of the group has other options or failed its checks, or torch.distributed is not
            initialised.

    Examples:
        >>> import torch
        >>> from kto_kernels import kto_loss_from_logps
        >>> logps = torch.tensor([-3.0, -5.0], requires_grad=True)
        >>> out = kto_loss_from_logps(logps, torch.tensor([True, False]), ref_logps=torch.tensor([-3.0, -5.0]), kl=0.0)
        >>> out.loss.backward()
        >>> out.loss.item(), logps.grad
        (0.5, tensor([-0.0125,  0.0125]))
    """
    ranks = Ranks.of(process_group)
    with ranks.failing_together(logps):
        scoring = Scoring(Scale())
        objective = Objective(beta, desirable_weight, undesirable_weight, False, reduction, loss_type)
        given = {"ref_logps": ref_logps, "kl_logps": kl_logps, "ref_kl_logps": ref_kl_logps, "kl_value": kl}
        inputs = Inputs("logps", logps, desirable=desirable, **given).checked(ranks, scoring, objective=objective)
    return engine.run(engine.agree(inputs, scoring, objective, Chunking(), ranks))
