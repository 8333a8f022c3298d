"""For TRL 1.16: `FusedKTOTrainer` and `FusedDPOTrainer`, trainers whose loss is computed from hidden states, and
`patch_trl()`, which makes every trainer of TRL use our token log-probabilities. Importing this module imports TRL.

TRL's fused head runs inside the model's (wrapped) forward and scores hidden states through one function, which ours
replaces. Everything around that function stays TRL's: models, adapters, sharding, metrics.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..loss import linear_kto_loss
from .patching import Patch, check_call, holders, load, original, undo

trl_utils: ModuleType = load("trl.trainer.utils", "kto_kernels.integrations.trl", "trl")
trl_kernels: ModuleType = load("trl.kernels", "kto_kernels.integrations.trl", "trl")

from trl import KTOTrainer  # noqa: E402 - after `load`, whose error says what is missing
from trl.trainer import kto_trainer  # noqa: E402

from ._trl_dpo import FusedDPOTrainer as FusedDPOTrainer  # noqa: E402
from ._trl_trainer import FusedTrainer, Policy, check_trl, labels_of  # noqa: E402
from .trl_head import add_fused_lm_head, add_unverified  # noqa: E402
from .trl_scoring import AROUND, ChunkedLogProbFunction  # noqa: E402

_log: list = []


# Under every trainer ───────────────────────────────────────────────────────────────────────────────────────────────────


def patch_trl(verify: bool = True) -> Patch:
    """Makes every trainer of TRL 1.16 that scores tokens through a fused head (SFT, DPO, KTO, GRPO, RLOO, …) use our
    token log-probabilities. Prompts and padding are left out on every device. A second call is allowed.

    Args:
        verify: whether the first batch of each model that a trainer is given from now on is compared with the model's
            own forward: two small forwards of at most 64 tokens, once. Where they differ, a RuntimeError says by how
            much.

    Returns:
        The patch. Used as a context manager it ends with the block, otherwise by `unpatch_trl()`.

    Raises:
        RuntimeError: the installed TRL is not of a known version.
        TypeError: `verify` is no bool.
    """
    checks.flag("verify", verify)
    check_trl("patch_trl")
    theirs = original(_log, trl_kernels, "ChunkedLogProbFunction", "patch_trl")
    check_call(theirs.forward, ChunkedLogProbFunction.apply, "trl.kernels.ChunkedLogProbFunction", skip=1)
    patch = Patch(_log)
    for module, name in list(holders(theirs)):
        if module.__name__.startswith("trl.") and not module.__name__.endswith("chunked_logprob"):
            patch.replace(module, name, ChunkedLogProbFunction)
    theirs = original(_log, trl_utils, "add_fused_lm_head", "patch_trl")
    check_call(theirs, add_fused_lm_head, "trl.trainer.utils.add_fused_lm_head")
    for held in (theirs, add_fused_lm_head, add_unverified):
        for module, name in list(holders(held)):
            if module.__name__.startswith("trl."):
                patch.replace(module, name, add_fused_lm_head if verify else add_unverified)
    for name, ours in AROUND.items():
        patch.replace(trl_utils, name, ours)
    return patch


def unpatch_trl() -> None:
    """Puts TRL's own functions back."""
    undo(_log)


# KTO ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class FusedKTOTrainer(FusedTrainer, KTOTrainer):
    """`trl.KTOTrainer` 1.16, but the loss is computed from hidden states inside the wrapped model's forward, by
    `linear_kto_loss`. In units of G, one product of the scored hidden states with the head, that costs 3G with a
    trained head, 2G with a frozen one, and 1G each for reference and KL. Arguments, data, metrics and their values
    are TRL's.

    The log-probabilities of reference and KL are computed before the policy's forward instead of after it, and the head
    multiplies only the completions' tokens, on a CPU too.

    A LoRA adapter may be on the head (`lm_head` among its `target_modules`), which TRL refuses: its matrices are trained
    at the cost of a frozen head. Its dropout must be 0.

    Reference and KL are scored in the same dtype as the policy, whatever dtype a reference model has: in autocast's
    dtype where autocast is on, else in the dtype of the policy's hidden states.

    Args:
        *args: the positional arguments of KTOTrainer.
        verify: True: on the first batch, log-probabilities from the logits of the model's own forward are compared with
            the fused head's, for at most 64 tokens, for the policy and for a reference model: two small forwards of
            each, once. And the loss whose gradient is taken is compared with TRL's formula, which is logged, on the
            same log-probabilities. "full": in addition, the loss of the first batch is compared with the one that TRL
            computes by TRL's own functions. False: nothing is compared.
        **kwargs: the keyword arguments of KTOTrainer.

    Raises:
        RuntimeError: the installed TRL is not of a known version. On the first batch, on all ranks: what `verify`
            compares differs by more than rounding explains (see `verify.compare`), for instance because the head does
            more than multiply.
        ValueError: TRL's own checks fail; or the head is no matrix of floats: it is quantized, or has several layers; or
            an adapter is on the head that a fused head cannot apply: one with dropout, on a head that is tied to the
            input embeddings, or of another kind than LoRA; or `verify` is "full" with an adapter on the head.
    """

    _CALLER: ClassVar[str] = "FusedKTOTrainer"
    _THEIRS: ClassVar[ModuleType] = kto_trainer

    def __init__(self, *args: Any, verify: bool | str = True, **kwargs: Any):
        super().__init__(*args, verify=verify, **kwargs)

    def _compute_kl_logps(self, model: Any, batch: dict) -> Tensor | None:
        return model.kl_logps if isinstance(model, Policy) else super()._compute_kl_logps(model, batch)

    def _reference(self, batch: dict, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The reference's sequence log-probabilities: (B,) of the completions and (K,) of the mismatched ones."""
        if self.precompute_ref_logps:
            return batch["ref_logps"], batch["ref_KL_logps"] if self.calculate_KL else None
        with self._reference_model() as model:
            kl_logps = self._compute_kl_logps(model, batch)
            return self._sequence_logps(model, batch, labels), kl_logps

    def _prepared(self, model: Any, inputs: dict) -> tuple[Policy, dict]:
        device = self.accelerator.device
        batch = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        labels = labels_of(batch)
        with self._policy_scored():
            kl_logps = self._compute_kl_logps(model, batch)
        if not self.calculate_KL and not self.precompute_ref_logps:
            self._learn_the_policys_dtype(model, batch)
        ref_logps, ref_kl_logps = self._reference(batch, labels)
        kl = None
        if self.calculate_KL:
            kl = self.accelerator.gather_for_metrics((kl_logps - ref_kl_logps).mean().detach()).mean()

        loss = functools.partial(
            linear_kto_loss,
            desirable=torch.as_tensor(batch["label"], dtype=torch.bool, device=device),
            ref_logps=ref_logps,
            kl=kl,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            loss_type=self.loss_type,
        )
        batch |= {"ref_logps": ref_logps, "ref_KL_logps": ref_kl_logps}
        return Policy(model, labels, loss, kl_logps), batch

    def _ref_logps(self, batch: dict) -> Tensor:
        return batch["ref_logps"]

    def _rounding_of_the_loss(self, policy: Policy, batch: dict, delta: float) -> float:
        # A loss changes by at most λβ/4 for each nat of a log-ratio or of the KL. Either is a difference of two sums.
        return 4 * delta * max(self.desirable_weight, self.undesirable_weight) * self.beta / 4
