"""In place of Liger-Kernel's KTO loss (0.8.5): the same calls and the same results, by `linear_kto_loss`."""

from __future__ import annotations

import sys
import warnings
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

import torch
from torch import Tensor, nn

from .. import checks, dtensor, reference
from ..distributed import Ranks
from ..loss import linear_kto_loss
from ..stages import linear_token_logps, sequence_logps
from .patching import Patch, Replaced, check_call, holders, load, original, undo, version


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
    """In place of `liger_kernel.chunked_loss.functional.liger_fused_linear_kto`, in its order of arguments.

    Args:
        _input: (B, T, H) hidden states, each predicting the target at its own position (already shifted); bf16, fp16,
            fp32 (fp64: slowly), any strides: `hidden[:, :-1]` costs no copy.
        weight, bias: the head, (V, H) and (V,).
        target: (B, T) int32 or int64; `ignore_index` where nothing is scored.
        preference_labels: (B,) bool, True for chosen.
        ref_input, ref_weight, ref_bias: the reference's hidden states and head; used where `use_ref_model`.
        kl: the reference point in nats: one number, or (B,), one for each sequence; None is 0. Taken as it is: the
            caller has clamped it at 0, or wants it negative. No gradient.
        beta: > 0.
        use_ref_model: with a reference; without, its log-probabilities count as 0.
        average_log_prob: sequence log-probabilities are means over the scored tokens instead of sums.
        compiled, chunk_size: have no effect; how the work is cut follows from the memory it takes, and changes no result.
        count_ignored: whether the logits sums take in the tokens that no target scores, prompts and padding, as Liger's
            do. Liger has no such argument. False leaves these tokens out: the sums are of the scored tokens alone, as
            the log-probabilities are.

    Returns:
        `(loss, (chosen_logps_sum, rejected_logps_sum, chosen_logits_sum, rejected_logits_sum, chosen_rewards_sum,
        rejected_rewards_sum))`, all () fp32 (fp64 for fp64 `_input`): the mean loss over the B sequences, and sums over
        those of each class, without gradient: of log-probabilities, of all V logits of every token (of every scored
        token with `count_ignored=False`), and of rewards `beta · (logps − ref_logps)`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        RuntimeError: in backward, the gradient is differentiated or asked for a second time.

    Where the results are not Liger's:
        - `kl` of shape (B,): Liger, at its default `chunk_size=1`, adds up the losses of every sequence at every
          sequence's reference point, and stops with an error at most other sizes.
        - A sequence without a scored token: Liger's mean log-probability, and with it the loss and every gradient, is
          NaN; here it is 0.
        - The logits sums of bf16 and fp16 are those of the exact logits; Liger adds up logits that were rounded.
        - `1 − σ(x)`, which is 0 from x ≈ 17 in fp32, is computed without that loss of digits, and the gradient of the
          head is summed in fp32 whatever its dtype.
        - Under `torch.no_grad()` no gradient is computed.
    """
    weight, bias = dtensor.heads(Ranks(), weight=weight, bias=bias)  # the logits sums need a head that is whole
    checks.head(_input, weight, bias, name="_input")
    if _input.dim() != 3:
        raise ValueError(f"_input: expected (B, T, H), got shape {tuple(_input.shape)}")
    checks.tensor("target", target, checks.INTEGERS, like=_input)
    checks.shape("target", target, tuple(_input.shape[:2]), "_input without its last dimension")
    count = _input.shape[0]
    checks.tensor("preference_labels", preference_labels, (torch.bool,), like=_input)
    checks.shape("preference_labels", preference_labels, (count,), "one per sequence")
    checks.integer("ignore_index", ignore_index)
    checks.flag("use_ref_model", use_ref_model)
    checks.flag("average_log_prob", average_log_prob)
    checks.flag("count_ignored", count_ignored)

    ref_logps = torch.zeros(count, dtype=torch.float64, device=_input.device)
    if use_ref_model:
        for name, tensor in (("ref_input", ref_input), ("ref_weight", ref_weight)):
            if tensor is None:
                raise ValueError(f"{name}: needed with use_ref_model=True, got None")
        checks.reference_head(ref_input, ref_weight, ref_bias, "ref_input", weight)
        checks.shape("ref_input", ref_input, (*target.shape, ref_input.shape[-1]), "as _input")
        with torch.no_grad():
            ref_input = ref_input.to(_input.dtype)  # as `linear_kto_loss`: both sides are scored in the policy's dtype
            tokens = linear_token_logps(ref_input, ref_weight, target, bias=ref_bias, ignore_index=ignore_index)
            ref_logps = sequence_logps(
                tokens, labels=target, average_log_prob=average_log_prob, ignore_index=ignore_index
            )

    # r − z0 = S^π − (S^ref + z0): a reference point for each sequence is a shift of its reference.
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
    logits = _logits_sums(_input, weight, bias, None if count_ignored else target != ignore_index)
    sums = [
        torch.where(side, values, 0.0).sum().to(out.loss.dtype)
        for values in (out.logps, logits, rewards)
        for side in (preference_labels, ~preference_labels)
    ]
    return out.loss, tuple(sums)


@torch.no_grad()
def _logits_sums(
    hidden: Tensor,  # (B, T, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    counted: Tensor | None,  # (B, T) bool; None: every token
) -> Tensor:  # (B,)
    """The sums over each sequence's tokens and over the vocabulary of `h·W_v + b_v`, in fp64. They need no logits: they are
    `(Σ_t h_t)·(Σ_v W_v) + T·Σ_v b_v`, which costs one pass over the hidden states and one over the head."""
    tokens = hidden.new_full(hidden.shape[:1], hidden.shape[1], dtype=torch.float64)
    if counted is not None:
        hidden, tokens = hidden.masked_fill(~counted.unsqueeze(-1), 0.0), counted.sum(-1).double()
    of_hidden = hidden.sum(1, dtype=reference.compute_dtype(hidden.dtype)).double()
    of_weight = weight.sum(0, dtype=reference.compute_dtype(weight.dtype)).double()
    sums = (of_hidden * of_weight).sum(-1)
    if bias is None:
        return sums
    return sums + torch.where(tokens == 0, 0.0, tokens * bias.sum(dtype=torch.float64))  # a bias may be -inf


def _reference_points(kl: Tensor | float | None, hidden: Tensor) -> Tensor | float:
    """What broadcasts to one reference point for each of the B sequences, fp64."""
    if kl is None:
        return 0.0
    if isinstance(kl, (int, float)) and not isinstance(kl, bool):
        return float(kl)
    checks.tensor("kl", kl, checks.FLOATS, like=hidden)
    if kl.dim() > 1 or kl.numel() not in (1, hidden.shape[0]):
        raise ValueError(f"kl: expected shape (), (1,) or ({hidden.shape[0]},), got {tuple(kl.shape)}")
    return kl.detach().double()


class LigerFusedLinearKTOLoss(nn.Module):
    """In place of `liger_kernel.chunked_loss.LigerFusedLinearKTOLoss`, with its arguments; see `liger_fused_linear_kto`
    for what they mean, what comes back, and where Liger's results are others."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        count_ignored: bool = True,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.count_ignored = count_ignored

    def forward(
        self,
        _input: Tensor,  # (B, T, H)
        lin_weight: Tensor,  # (V, H)
        target: Tensor,  # (B, T)
        bias: Tensor | None = None,  # (V,)
        preference_labels: Tensor | None = None,  # (B,) bool; never None, whatever the default
        ref_input: Tensor | None = None,  # (B, T, H')
        ref_weight: Tensor | None = None,  # (V, H')
        ref_bias: Tensor | None = None,  # (V,)
        kl: Tensor | float | None = None,  # (), (1,) or (B,)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`(loss, sums)`, as `liger_fused_linear_kto`; `lin_weight` is its `weight`."""
        return liger_fused_linear_kto(
            _input,
            lin_weight,
            target,
            preference_labels,
            bias=bias,
            ref_input=ref_input,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            kl=kl,
            ignore_index=self.ignore_index,
            beta=self.beta,
            compiled=self.compiled,
            use_ref_model=self.use_ref_model,
            average_log_prob=self.average_log_prob,
            chunk_size=self.chunk_size,
            count_ignored=self.count_ignored,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, beta={self.beta}, use_ref_model={self.use_ref_model}, "
            f"average_log_prob={self.average_log_prob}"
        )


_REPLACED: list[Replaced] = []
_TRL_TRAINER = "trl.trainer.kto_trainer"


def patch_liger() -> Patch:
    """Puts our `LigerFusedLinearKTOLoss` and `liger_fused_linear_kto` wherever an imported module holds Liger's:
    `liger_kernel.chunked_loss`, its submodules, and trainers that have imported them (TRL 0.17 to 1.12 with
    `use_liger_kernel=True`). The result lists the places: `print(patch_liger())`.

    Call it before the trainer is made, which keeps the loss it was made with; or use it as a context manager, which
    leaves what it found. A second call replaces what has appeared since. A module that imports the names while they are
    replaced keeps ours after `unpatch_liger()`.

    Warns:
        UserWarning: TRL's KTO trainer is imported, before the call or while the patch is in place, and is of a version
            that does not call Liger's loss (1.13 and later, and before 0.17), and no other module holds that loss: the
            patch has no effect on the trainer.

    Raises:
        ImportError: liger_kernel is not installed, or has no `chunked_loss`.
        RuntimeError: its KTO loss is called otherwise than 0.8.5's.
    """
    library, functional, module = (
        load(f"liger_kernel.chunked_loss{name}", "patch_liger", "liger-kernel")
        for name in ("", ".functional", ".kto_loss")
    )
    theirs = original(_REPLACED, library, "LigerFusedLinearKTOLoss", "patch_liger")
    their_function = original(_REPLACED, functional, "liger_fused_linear_kto", "patch_liger")
    apply = original(_REPLACED, module, "LigerFusedLinearKTOFunction", "patch_liger").forward
    what = f"patch_liger: {version('liger-kernel')}: LigerFusedLinearKTO"
    check_call(theirs, LigerFusedLinearKTOLoss, f"{what}Loss")
    check_call(theirs.forward, LigerFusedLinearKTOLoss.forward, f"{what}Loss.forward")
    check_call(apply, liger_fused_linear_kto, f"{what}Function.forward", skip=1)  # ctx
    patch = Patch(_REPLACED)
    for peer, ours in ((theirs, LigerFusedLinearKTOLoss), (their_function, liger_fused_linear_kto)):
        for holder, name in list(holders(peer)):
            patch.replace(holder, name, ours)
    if _TRL_TRAINER in sys.modules:
        _warn_without_effect(getattr(sys.modules[_TRL_TRAINER], "__spec__", None))
    elif _WATCH not in sys.meta_path:
        sys.meta_path.insert(0, _WATCH)
    return patch


def unpatch_liger() -> None:
    """Puts Liger's own class and function back; nothing where they are in place."""
    undo(_REPLACED)


class _Watch(MetaPathFinder):
    """Sees the import of TRL's KTO trainer behind a call of `patch_liger`, and leaves it to the other finders."""

    def find_spec(self, name, path, target=None):
        if name == _TRL_TRAINER:
            sys.meta_path.remove(self)
            if _REPLACED:
                _warn_without_effect(PathFinder.find_spec(name, path))
        return None


_WATCH = _Watch()


def _warn_without_effect(trainer: ModuleSpec | None) -> None:
    """Warns where nobody would call what `patch_liger` has put in place: TRL's KTO trainer does not name Liger's loss in
    its source, and no module beside Liger's own and ours holds it."""
    loader = getattr(trainer, "loader", None)
    source = loader.get_source(trainer.name) if isinstance(loader, InspectLoader) else None
    # From TRL 0.27 to 1.5 the trainer is defined in trl.experimental.kto, where it calls Liger's loss.
    if source is None or "LigerFusedLinearKTO" in source or "experimental.kto" in source:
        return
    for ours in (LigerFusedLinearKTOLoss, liger_fused_linear_kto):
        if any(module.__name__.split(".")[0] not in ("liger_kernel", "kto_kernels") for module, _ in holders(ours)):
            return
    warnings.warn(
        f"patch_liger: without effect on TRL's KTOTrainer: that of {version('trl')} does not call Liger's loss (those of "
        "TRL 0.17 to 1.12 do, with use_liger_kernel=True). Our loss is under TRL 1.16 with FusedKTOTrainer or patch_trl() "
        "of kto_kernels.integrations.trl, and under TRL 0.8 to 1.5 with kto_kernels.integrations.logps.patch_trl_kto().",
        stacklevel=1,
    )
