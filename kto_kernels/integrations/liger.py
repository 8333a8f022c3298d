"""A replacement for Liger-Kernel's KTO loss (0.8.5), computed by `linear_kto_loss`: the same calls, the same results.
The replacements for its paired losses are imported from here too, and the patch replaces all."""

from __future__ import annotations

import itertools
import sys
import warnings
from dataclasses import dataclass, field
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

import torch
from torch import Tensor

from .. import checks, reference
from ..loss import linear_kto_loss
from ..parallel import dtensor
from ..stages import linear_token_logps, sequence_logps
from ._liger_base import LigerLoss, check_policy, check_reference, logits_sums
from ._liger_pairs import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
    liger_fused_linear_cpo,
    liger_fused_linear_dpo,
    liger_fused_linear_orpo,
    liger_fused_linear_simpo,
)
from .patching import Patch, Replaced, check_call, holders, load, original, undo, version

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
    "liger_fused_linear_cpo",
    "liger_fused_linear_dpo",
    "liger_fused_linear_kto",
    "liger_fused_linear_orpo",
    "liger_fused_linear_simpo",
    "patch_liger",
    "unpatch_liger",
]


def liger_fused_linear_kto(
    _input: Tensor,  # (B, T, H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (B, T)
    preference_labels: Tensor,  # (B,) bool
    bias: Tensor | None = None,  # (V,)
    ref_input: Tensor | None = None,  # (B, T, H')
    ref_weight: Tensor | None = None,  # (V, H')
    ref_bias: Tensor | None = None,  # (V,)
    kl: Tensor | float | None = None,  # (), (1,) or (B,)
    ignore_index: int = -100,
    beta: float = 0.1,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
    *,
    count_ignored: bool = True,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Replaces `liger_kernel.chunked_loss.functional.liger_fused_linear_kto`, with its arguments in their order.

    The results differ from Liger's in these points:

    - `kl` of shape (B,): with its default `chunk_size=1` Liger adds up the losses of every sequence at every sequence's
      reference point, and with most other sizes it stops with an error.
    - A sequence without a scored token: Liger's mean log-probability is NaN, and so are the loss and every gradient;
      here the mean is 0.
    - In bf16 and fp16 the sums of logits are sums of the exact logits; Liger adds up rounded logits.
    - `1 − σ(x)`, which is 0 from x ≈ 17 in fp32, is computed without that loss of digits, and the gradient of the head
      is summed in fp32 whatever the head's dtype.
    - Under `torch.no_grad()` no gradient is computed.

    Args:
        _input: (B, T, H) hidden states, already shifted: each predicts the target at its own position. bf16, fp16, fp32
            (fp64: slowly), any strides: `hidden[:, :-1]` costs no copy.
        weight: (V, H) bf16, fp16, fp32 or fp64: the head's weight.
        target: (B, T) int32 or int64; `ignore_index` where nothing is scored.
        preference_labels: (B,) bool, True for chosen.
        bias: (V,) bf16, fp16, fp32 or fp64: the head's bias. None: the head has none.
        ref_input: (B, T, H') bf16, fp16, fp32 or fp64: the reference's hidden states, needed where `use_ref_model`.
            None: there are none.
        ref_weight: (V, H') bf16, fp16, fp32 or fp64: the reference's head, needed where `use_ref_model`. None: there is
            none.
        ref_bias: (V,) bf16, fp16, fp32 or fp64: the bias of the reference's head. None: the head has none.
        kl: the reference point in nats, without gradient: a number or a () or (1,) tensor, or a (B,) tensor with one
            for each sequence. None: 0. It is not clamped at 0: a caller who wants that clamps it before.
        ignore_index: the target of positions that are not scored.
        beta: β, how sharply the loss saturates, > 0, in 1/nat (arXiv 2402.01306, equations 7 and 8).
        compiled: has no effect. In Liger it says whether the loss is compiled.
        use_ref_model: whether there is a reference; without one, the reference's log-probabilities count as 0.
        average_log_prob: whether a sequence's log-probability is the mean over its scored tokens. False: it is the sum.
        chunk_size: has no effect. How the work is cut into chunks depends on memory, and changes no result.
        count_ignored: whether the sums of logits include the tokens that no target scores (prompts and padding), as
            Liger's do. False: they are sums over the scored tokens alone, as the log-probabilities are. Liger has no
            such argument.

    Returns:
        loss: () fp32 (fp64 for fp64 `_input`), the mean loss over the B sequences.
        sums: `(chosen_logps_sum, rejected_logps_sum, chosen_logits_sum, rejected_logits_sum, chosen_rewards_sum,
            rejected_rewards_sum)`, each () in the dtype of the loss and without gradient: sums over the chosen and over
            the rejected sequences of log-probabilities, of all V logits of every token (with `count_ignored=False` of
            every scored token), and of rewards `beta · (logps − ref_logps)`.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names it.
        ValueError: an argument has a wrong shape, device or value, or is missing; the message names it.
        NotImplementedError: `torch.func` or forward-mode differentiation is applied to the call.
        RuntimeError: in the backward, the gradient is differentiated or asked for a second time.
    """
    weight, bias = dtensor.heads(None, weight=weight, bias=bias)  # the sums of logits need the whole head
    check_policy(_input, weight, target, bias, ignore_index)
    count = _input.shape[0]
    checks.tensor("preference_labels", preference_labels, (torch.bool,), like=_input)
    checks.shape("preference_labels", preference_labels, (count,), "one per sequence")
    checks.flag("use_ref_model", use_ref_model)
    checks.flag("average_log_prob", average_log_prob)
    checks.flag("count_ignored", count_ignored)

    ref_logps = torch.zeros(count, dtype=torch.float64, device=_input.device)
    if use_ref_model:
        check_reference(ref_input, ref_weight, ref_bias, weight, target)
        with torch.no_grad():
            ref_input = ref_input.to(_input.dtype)  # as `linear_kto_loss` does: it scores in the policy's dtype
            tokens = linear_token_logps(ref_input, ref_weight, target, bias=ref_bias, ignore_index=ignore_index)
            ref_logps = sequence_logps(
                tokens, labels=target, average_log_prob=average_log_prob, ignore_index=ignore_index
            )

    # r − z0 = S^π − (S^ref + z0): a reference point for each sequence is added to the sequence's reference.
    out = linear_kto_loss(
        _input,
        weight,
        target,
        preference_labels,
        bias=bias,
        ref_logps=ref_logps + _reference_points(kl, _input),
        kl=0.0,
        beta=beta,
        average_log_prob=average_log_prob,
        ignore_index=ignore_index,
    )
    rewards = beta * reference.log_ratio(out.logps, ref_logps)
    logits = logits_sums(_input, weight, bias, None if count_ignored else target != ignore_index)
    sums = [
        torch.where(side, values, 0.0).sum().to(out.loss.dtype)
        for values in (out.logps, logits, rewards)
        for side in (preference_labels, ~preference_labels)
    ]
    return out.loss, tuple(sums)


def _reference_points(kl: Tensor | float | None, hidden: Tensor) -> Tensor | float:
    """The reference point, or one for each of the B sequences, in fp64."""
    if kl is None:
        return 0.0
    if isinstance(kl, (int, float)) and not isinstance(kl, bool):
        return float(kl)
    checks.tensor("kl", kl, checks.FLOATS, like=hidden)
    if kl.dim() > 1 or kl.numel() not in (1, hidden.shape[0]):
        raise ValueError(f"kl: expected shape (), (1,) or ({hidden.shape[0]},), got {tuple(kl.shape)}")
    return kl.detach().double()


@dataclass(eq=False, repr=False)
class LigerFusedLinearKTOLoss(LigerLoss):
    """Replaces `liger_kernel.chunked_loss.LigerFusedLinearKTOLoss`, with its arguments.

    `liger_fused_linear_kto` says where the results differ from Liger's.

    Attributes:
        ignore_index: the target of positions that are not scored.
        beta: β, how sharply the loss saturates, > 0, in 1/nat (arXiv 2402.01306, equations 7 and 8).
        compiled: has no effect.
        use_ref_model: whether there is a reference; without one, the reference's log-probabilities count as 0.
        average_log_prob: whether a sequence's log-probability is the mean over its scored tokens. False: it is the sum.
        chunk_size: has no effect.
        count_ignored: whether the sums of logits include the tokens that no target scores, as Liger's do.
    """

    ignore_index: int = -100
    beta: float = 0.1
    compiled: bool = True
    use_ref_model: bool = False
    average_log_prob: bool = False
    chunk_size: int = 1
    count_ignored: bool = field(default=True, kw_only=True)

    def forward(
        self,
        _input: Tensor,  # (B, T, H)
        lin_weight: Tensor,  # (V, H)
        target: Tensor,  # (B, T)
        bias: Tensor | None = None,  # (V,)
        preference_labels: Tensor | None = None,  # (B,) bool; required, although Liger's default is None
        ref_input: Tensor | None = None,  # (B, T, H')
        ref_weight: Tensor | None = None,  # (V, H')
        ref_bias: Tensor | None = None,  # (V,)
        kl: Tensor | float | None = None,  # (), (1,) or (B,)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Calls `liger_fused_linear_kto` with the options of this module.

        Args:
            _input: (B, T, H) bf16, fp16, fp32 or fp64: hidden states, already shifted.
            lin_weight: (V, H) bf16, fp16, fp32 or fp64: the head's weight.
            target: (B, T) int32 or int64; `ignore_index` where nothing is scored.
            bias: (V,) bf16, fp16, fp32 or fp64: the head's bias. None: the head has none.
            preference_labels: (B,) bool, True for chosen; required, although Liger's default is None.
            ref_input: (B, T, H') bf16, fp16, fp32 or fp64: the reference's hidden states. None: there are none.
            ref_weight: (V, H') bf16, fp16, fp32 or fp64: the reference's head. None: there is none.
            ref_bias: (V,) bf16, fp16, fp32 or fp64: the bias of the reference's head. None: the head has none.
            kl: the reference point in nats, a number or a tensor (), (1,) or (B,). None: 0.

        Returns:
            loss: () the mean loss over the B sequences.
            sums: the six sums that `liger_fused_linear_kto` returns.

        Raises:
            TypeError: as for `liger_fused_linear_kto`.
            ValueError: as for `liger_fused_linear_kto`.
            NotImplementedError: as for `liger_fused_linear_kto`.
            RuntimeError: as for `liger_fused_linear_kto`.
        """
        return liger_fused_linear_kto(
            _input, lin_weight, target, preference_labels, bias, ref_input, ref_weight, ref_bias, kl, self.ignore_index,
            self.beta, self.compiled, self.use_ref_model, self.average_log_prob, self.chunk_size,
            count_ignored=self.count_ignored,
        )  # fmt: skip


_REPLACED: list[Replaced] = []
# What Liger calls its losses, and our classes and functions for them.
_LOSSES = {
    "KTO": (LigerFusedLinearKTOLoss, liger_fused_linear_kto),
    "DPO": (LigerFusedLinearDPOLoss, liger_fused_linear_dpo),
    "CPO": (LigerFusedLinearCPOLoss, liger_fused_linear_cpo),
    "ORPO": (LigerFusedLinearORPOLoss, liger_fused_linear_orpo),
    "SimPO": (LigerFusedLinearSimPOLoss, liger_fused_linear_simpo),
}
# TRL's trainers that call one of them, and from which release of TRL; they did up to 1.12.
_TRL_TRAINERS = {"trl.trainer.kto_trainer": ("KTO", "0.17"), "trl.trainer.dpo_trainer": ("DPO", "0.19")}


def patch_liger() -> Patch:
    """Replaces Liger's KTO, DPO, CPO, ORPO and SimPO losses by ours in every imported module that has them, the classes
    (`LigerFusedLinearKTOLoss`, …) and the functions (`liger_fused_linear_kto`, …): `liger_kernel.chunked_loss`, the
    submodules of it, and trainers that have imported them (TRL's KTO trainer of 0.17 to 1.12 and DPO trainer of 0.19 to
    1.12 with `use_liger_kernel=True`, Liger's own ORPO trainer). `print(patch_liger())` lists the places.

    Call it before the trainer is made, as a trainer keeps the loss that it was made with. A second call also replaces
    Liger's functions in modules imported since the first. A module that imports the names while they are replaced keeps
    ours after `unpatch_liger()`.

    Returns:
        The patch. Used as a context manager it ends with the block, otherwise by `unpatch_liger()`.

    Warns:
        UserWarning: the patch has no effect on TRL's KTO or DPO trainer. That trainer is imported, before the call or
            while the patch is in place; it is of a version that does not call Liger's loss (1.13 and later, and the
            early ones); and no other module has imported one of these losses.

    Raises:
        ImportError: liger_kernel is not installed, or has no `chunked_loss`.
        RuntimeError: a loss of Liger's has other parameters than that of 0.8.5.
    """
    library, functional = (
        load(f"liger_kernel.chunked_loss{name}", "patch_liger", "liger-kernel") for name in ("", ".functional")
    )
    replacements = []
    for name, (ours, our_function) in _LOSSES.items():
        lower, title = name.lower(), f"LigerFusedLinear{name}"
        module = load(f"liger_kernel.chunked_loss.{lower}_loss", "patch_liger", "liger-kernel")
        theirs = original(_REPLACED, library, f"{title}Loss", "patch_liger")
        their_function = original(_REPLACED, functional, f"liger_fused_linear_{lower}", "patch_liger")
        apply = original(_REPLACED, module, f"{title}Function", "patch_liger").forward
        what = f"patch_liger: {version('liger-kernel')}: {title}"
        check_call(theirs, ours, f"{what}Loss")
        check_call(theirs.forward, ours.forward, f"{what}Loss.forward")
        check_call(apply, our_function, f"{what}Function.forward", skip=1)  # ctx
        replacements += [(theirs, ours), (their_function, our_function)]
    patch = Patch(_REPLACED)
    for peer, ours in replacements:
        for holder, name in list(holders(peer)):
            patch.replace(holder, name, ours)
    for trainer in _TRL_TRAINERS:
        if trainer in sys.modules:
            _warn_without_effect(trainer, getattr(sys.modules[trainer], "__spec__", None))
    if _WATCH not in sys.meta_path:
        sys.meta_path.insert(0, _WATCH)
    return patch


def unpatch_liger() -> None:
    """Puts Liger's own classes and functions back. Without a patch in place it does nothing."""
    undo(_REPLACED)


class _Watch(MetaPathFinder):
    """Notices when a trainer of TRL's is imported after a call of `patch_liger`. The other finders do the import."""

    def find_spec(self, name, path, target=None):
        if name in _TRL_TRAINERS and _REPLACED:
            _warn_without_effect(name, PathFinder.find_spec(name, path))
        return None


_WATCH = _Watch()


def _warn_without_effect(name: str, trainer: ModuleSpec | None) -> None:
    """Warns where nothing calls the functions that `patch_liger` has put in place: the source of TRL's trainer does not
    name Liger's loss, and no module has imported one of Liger's losses but Liger's own and ours."""
    loss, since = _TRL_TRAINERS[name]
    loader = getattr(trainer, "loader", None)
    source = loader.get_source(trainer.name) if isinstance(loader, InspectLoader) else None
    # From TRL 0.27 to 1.5 the KTO trainer is defined in trl.experimental.kto, where it calls Liger's loss.
    if source is None or f"LigerFusedLinear{loss}" in source or f"experimental.{loss.lower()}" in source:
        return
    for ours in itertools.chain.from_iterable(_LOSSES.values()):
        if any(module.__name__.split(".")[0] not in ("liger_kernel", "kto_kernels") for module, _ in holders(ours)):
            return
    earlier = ", and under TRL 0.8 to 1.5 with kto_kernels.integrations.logps.patch_trl_kto()" if loss == "KTO" else ""
    warnings.warn(
        f"patch_liger: without effect on TRL's {loss}Trainer: that of {version('trl')} does not call Liger's loss (those "
        f"of TRL {since} to 1.12 do, with use_liger_kernel=True). Our loss is under TRL 1.16 with Fused{loss}Trainer or "
        f"patch_trl() of kto_kernels.integrations.trl{earlier}.",
        stacklevel=1,
    )
