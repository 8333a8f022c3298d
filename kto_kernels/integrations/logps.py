"""Log-probabilities and loss under the names by which trainers call them: TRL's `selective_log_softmax`, the
`get_batch_logps` of TRL (up to 1.5) and LLaMA-Factory, and the `kto_loss` of TRL's trainer (up to 1.5)."""

from __future__ import annotations

import warnings
from inspect import getattr_static
from typing import Any

import torch
from torch import Tensor

from .. import checks, reference
from ..stages import kto_loss_from_logps, sequence_logps, token_logps
from .patching import Patch, Replaced, check_call, load, original, subclasses, undo, version


def selective_log_softmax(
    logits: Tensor,  # (..., V)
    index: Tensor,  # (...) or (..., K)
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # like index
) -> Tensor:
    """Replaces `trl.trainer.utils.selective_log_softmax`, which ms-swift and others import: the log-probabilities of
    chosen tokens, `log_softmax(logits / temperature)` gathered at `index`. It reads the logits once.

    Args:
        logits: (..., V); bf16, fp16, fp32 (fp64: slowly), contiguous along V.
        index: (...) for one token of each row, or (..., K) for several, K >= 1; int32 or int64, each in [0, V).
        temperature: the logits are divided by it, > 0. 1.0 leaves them as they are.
        row_mask: (...) or (..., K) like `index`, of any dtype; where it is 0 or False, result and gradient are 0 and
            nothing is computed. None: every row is scored.

    Returns:
        Log-probabilities in nats, of the shape of `index`, fp32 (fp64 for fp64 logits), differentiable. TRL's kernel
            returns fp32 too; TRL's PyTorch path returns bf16 for bf16 logits.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names it.
        ValueError: an argument has a wrong shape, device or value; the message names it. Indices on a GPU are not
            checked.
        NotImplementedError: `torch.func` or forward-mode differentiation is applied to the call.
    """
    checks.number("temperature", temperature, positive=True)
    checks.tensor("logits", logits, checks.FLOATS)
    checks.tensor("index", index, checks.INTEGERS, like=logits)
    if logits.dim() == 0 or index.shape[: logits.dim() - 1] != logits.shape[:-1] or index.dim() > logits.dim():
        raise ValueError(
            f"index: expected shape {tuple(logits.shape[:-1])}, or that and K, for logits of shape "
            f"{tuple(logits.shape)}; got {tuple(index.shape)}"
        )
    if row_mask is not None:
        if not isinstance(row_mask, Tensor):
            raise TypeError(f"row_mask: expected a tensor, got {type(row_mask).__name__}")
        checks.shape("row_mask", row_mask, tuple(index.shape), "as index")
        row_mask = row_mask != 0
    if index.device.type == "cpu":
        outside = (index < 0) | (index >= logits.shape[-1])
        outside = outside if row_mask is None else outside & row_mask
        if outside.any():
            raise ValueError(f"index: expected 0 <= index < {logits.shape[-1]}, got {index[outside][0].item()}")
    if index.dim() < logits.dim():
        return _one_each(logits, index, temperature, row_mask)
    if index.shape[-1] == 0:
        raise ValueError(f"index: expected K >= 1, got shape {tuple(index.shape)}")

    # The softmax is computed for the most probable of the K tokens. Each other one's log-probability is less by the
    # difference of the two logits. Both terms are at most 0, so that nothing cancels.
    dtype = reference.compute_dtype(logits.dtype)
    chosen = index.long() if row_mask is None else torch.where(row_mask, index, 0).long()
    chosen = logits.gather(-1, chosen).to(dtype)
    if row_mask is not None:
        chosen = torch.where(row_mask, chosen, -torch.inf)
    top = chosen.detach().argmax(-1, keepdim=True)
    highest = chosen.gather(-1, top)
    scored = None if row_mask is None else row_mask.any(-1)
    logps = _one_each(logits, index.gather(-1, top).squeeze(-1), temperature, scored).unsqueeze(-1)
    below = torch.where(highest == -torch.inf, 0.0, chosen - highest) / temperature
    logps = logps + below
    return logps if row_mask is None else torch.where(row_mask, logps, 0.0)


def _one_each(logits: Tensor, index: Tensor, temperature: float, scored: Tensor | None) -> Tensor:
    """`token_logps` for any number of leading dimensions."""
    ignored = torch.iinfo(index.dtype).min  # no valid index has this value
    labels = index if scored is None else torch.where(scored, index, ignored)
    if logits.dim() == 1:
        rows, labels = logits.unsqueeze(0), labels.unsqueeze(0)
    elif logits.dim() > 3:
        rows, labels = logits.flatten(0, -3), labels.flatten(0, -2)
    else:
        rows = logits
    logps = token_logps(rows, labels, ignore_index=ignored, temperature=float(temperature))
    return logps.reshape(index.shape).clone()  # a copy: callers may write into it, and the backward needs the values


def get_batch_logps(
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T)
    average_log_prob: bool = False,
    label_pad_token_id: int = -100,
    is_encoder_decoder: bool = False,
) -> Tensor:
    """Replaces `KTOTrainer.get_batch_logps` of TRL 0.8 to 1.5: each sequence's log-probability.

    Args:
        logits: (B, T, V); bf16, fp16, fp32 (fp64: slowly).
        labels: (B, T) int32 or int64, not shifted; `label_pad_token_id` where nothing is scored.
        average_log_prob: whether to return the mean over the scored tokens, which is 0 without a scored token (TRL's is
            NaN). False: the sum.
        label_pad_token_id: the label of positions that are not scored. The default is PyTorch's.
        is_encoder_decoder: whether each position predicts the label at the same position. False: the next one.

    Returns:
        (B,) in nats, fp32 (fp64 for fp64 logits), differentiable, summed in fp64. TRL's result has the dtype of the
            logits.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names it.
        ValueError: an argument has a wrong shape, device or value; the message names it.
        NotImplementedError: `torch.func` or forward-mode differentiation is applied to the call.
    """
    if isinstance(logits, Tensor) and logits.dim() != 3:
        raise ValueError(f"logits: expected (B, T, V), got shape {tuple(logits.shape)}")
    checks.flag("is_encoder_decoder", is_encoder_decoder)
    checks.flag("average_log_prob", average_log_prob)
    checks.integer("label_pad_token_id", label_pad_token_id)
    options = {"shift": not is_encoder_decoder, "ignore_index": label_pad_token_id}
    tokens = token_logps(logits, labels, **options)
    return sequence_logps(tokens, labels=labels, average_log_prob=average_log_prob, **options).to(tokens.dtype)


def get_batch_logps_and_lengths(
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T)
    label_pad_token_id: int = -100,
    ld_alpha: None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces `llamafactory.train.trainer_utils.get_batch_logps`: each sequence's log-probability and length.

    Args:
        logits: (B, T, V); bf16, fp16, fp32 (fp64: slowly).
        labels: (B, T) int32 or int64, not shifted: position t predicts label t + 1; `label_pad_token_id` where nothing
            is scored.
        label_pad_token_id: the label of positions that are not scored. The default is PyTorch's.
        ld_alpha: must be None: it belongs to LD-DPO, a loss on pairs, and not to KTO.

    Returns:
        logps: (B,) in nats, as from `get_batch_logps`.
        lengths: (B,) int64, the counts of scored tokens.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names it.
        ValueError: an argument has a wrong shape, device or value; the message names it.
        NotImplementedError: `torch.func` or forward-mode differentiation is applied to the call.
    """
    if ld_alpha is not None:
        raise ValueError(f"ld_alpha: expected None (it is LD-DPO's, not KTO's), got {ld_alpha!r}")
    logps = get_batch_logps(logits, labels, label_pad_token_id=label_pad_token_id)
    return logps, (labels[:, 1:] != label_pad_token_id).sum(-1)


def kto_loss(
    self: Any,
    policy_chosen_logps: Tensor,  # (B_D,)
    policy_rejected_logps: Tensor,  # (B_U,)
    policy_KL_logps: Tensor | None,  # (K,)
    reference_chosen_logps: Tensor,  # (B_D,)
    reference_rejected_logps: Tensor,  # (B_U,)
    reference_KL_logps: Tensor | None,  # (K,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replaces the method `KTOTrainer.kto_loss` of TRL 0.8 to 1.5, which LLaMA-Factory's and ms-swift's trainers
    inherit.

    There may be no desirable sequence, or no undesirable one.

    Args:
        self: the trainer, whose `beta`, `desirable_weight`, `undesirable_weight`, `accelerator` and `loss_type` are
            used ("kto" where a trainer has no `loss_type`, as before TRL 0.9.3).
        policy_chosen_logps: (B_D,) floating, the policy's sequence log-probabilities of desirable sequences, in nats.
        policy_rejected_logps: (B_U,) floating, the same of undesirable sequences.
        policy_KL_logps: (K,) floating, the same of mismatched sequences, which "apo_zero_unpaired" does not use; then
            None will do.
        reference_chosen_logps: (B_D,) floating, the reference's sequence log-probabilities of desirable sequences, in
            nats.
        reference_rejected_logps: (B_U,) floating, the same of undesirable sequences.
        reference_KL_logps: (K,) floating, the same of mismatched sequences; None as for `policy_KL_logps`.

    Returns:
        losses: (B_D + B_U,) the weighted losses, those of desirable sequences first; fp32 (fp64 for fp64
            log-probabilities), as all results.
        chosen_rewards: (B_D,) detached.
        rejected_rewards: (B_U,) detached.
        kl: () the reference point in nats, the mean of the processes' means, clamped at 0.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: a tensor has a wrong shape, or the trainer's `loss_type` is another.
    """
    loss_type = getattr(self, "loss_type", "kto")
    policy = torch.cat([policy_chosen_logps, policy_rejected_logps])
    n_chosen = policy_chosen_logps.shape[0]
    kl = None
    if loss_type == "kto":
        for name, logps in (("policy_KL_logps", policy_KL_logps), ("reference_KL_logps", reference_KL_logps)):
            checks.tensor(name, logps, checks.FLOATS)
        checks.shape("reference_KL_logps", reference_KL_logps, tuple(policy_KL_logps.shape), "as policy_KL_logps")
        mean = reference.log_ratio(policy_KL_logps, reference_KL_logps).mean().detach()
        kl = self.accelerator.gather_for_metrics(mean).mean()
    out = kto_loss_from_logps(
        policy,
        torch.arange(policy.shape[0], device=policy.device) < n_chosen,
        ref_logps=torch.cat([reference_chosen_logps, reference_rejected_logps]),
        kl=kl,
        beta=self.beta,
        desirable_weight=self.desirable_weight,
        undesirable_weight=self.undesirable_weight,
        loss_type=loss_type,
        reduction="none",
    )
    return out.loss, out.rewards[:n_chosen], out.rewards[n_chosen:], out.kl


_TRL: list[Replaced] = []
_LLAMAFACTORY: list[Replaced] = []
_STATIC = staticmethod(get_batch_logps)  # one object, so that a second patch finds it in place


def patch_trl_kto() -> Patch:
    """Replaces `get_batch_logps` and `kto_loss` in the class of TRL (0.8 to 1.5) that defines them for
    `trl.KTOTrainer`. Trainers that inherit the two methods use ours too, also trainers that exist already.

    A second call changes nothing. A trainer with `use_liger_kernel=True` calls neither method:
    `kto_kernels.integrations.liger.patch_liger` is the patch for it.

    Returns:
        The patch. Used as a context manager it ends with the block, otherwise by `unpatch_trl_kto()`.

    Warns:
        UserWarning: an imported trainer inherits from the class, but overrides both methods.

    Raises:
        ImportError: TRL is not installed, or `trl.KTOTrainer` cannot be imported.
        RuntimeError: TRL's trainer has no such methods (1.6 and later), or has them with other parameters.
    """
    trl = load("trl", "patch_trl_kto", "trl")
    what = f"patch_trl_kto: {version('trl')}"
    try:
        trainer = trl.KTOTrainer  # imported on demand
    except (AttributeError, ImportError, RuntimeError) as error:
        raise ImportError(f"{what}: cannot import trl.KTOTrainer: {error}") from error
    owner = next((cls for cls in trainer.__mro__ if "kto_loss" in vars(cls)), None)
    if owner is None:
        raise RuntimeError(f"{what}: its KTOTrainer has no method kto_loss; this patch is for TRL 0.8 to 1.5")
    logps = original(_TRL, owner, "get_batch_logps", what)
    check_call(getattr(logps, "__func__", logps), get_batch_logps, f"{what}: {owner.__name__}.get_batch_logps")
    check_call(original(_TRL, owner, "kto_loss", what), kto_loss, f"{what}: {owner.__name__}.kto_loss")
    patch = Patch(_TRL)
    patch.replace(owner, "get_batch_logps", _STATIC)
    patch.replace(owner, "kto_loss", kto_loss)
    for cls in subclasses(owner):
        if getattr_static(cls, "get_batch_logps") is not _STATIC and getattr_static(cls, "kto_loss") is not kto_loss:
            warnings.warn(
                f"{what}: without effect on {cls.__module__}.{cls.__qualname__}, which has a get_batch_logps and a kto_loss "
                "of its own",
                stacklevel=1,
            )
    return patch


def unpatch_trl_kto() -> None:
    """Puts TRL's own methods back. Without a patch in place it does nothing."""
    undo(_TRL)


def patch_llamafactory() -> Patch:
    """Replaces the `get_batch_logps` that LLaMA-Factory's KTO trainer calls; the DPO trainer still calls the original.
    The KTO trainer inherits its loss from TRL: `patch_trl_kto` replaces that. A second call changes nothing.

    Returns:
        The patch. Used as a context manager it ends with the block, otherwise by `unpatch_llamafactory()`.

    Raises:
        ImportError: LLaMA-Factory is not installed, or its KTO trainer cannot be imported.
        RuntimeError: the trainer's module has no such function, or has it with other parameters.
    """
    module = load("llamafactory.train.kto.trainer", "patch_llamafactory", "llamafactory")
    what = f"patch_llamafactory: {version('llamafactory')}"
    theirs = original(_LLAMAFACTORY, module, "get_batch_logps", what)
    check_call(theirs, get_batch_logps_and_lengths, f"{what}: get_batch_logps")
    patch = Patch(_LLAMAFACTORY)
    patch.replace(module, "get_batch_logps", get_batch_logps_and_lengths)
    return patch


def unpatch_llamafactory() -> None:
    """Puts LLaMA-Factory's own function back. Without a patch in place it does nothing."""
    undo(_LLAMAFACTORY)
