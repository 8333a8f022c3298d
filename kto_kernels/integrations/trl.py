"""For TRL 1.16: `FusedKTOTrainer`, a KTOTrainer whose loss is computed from hidden states, and `patch_trl()`, which
makes every trainer of TRL use our token log-probabilities. Importing this module imports TRL.

TRL's fused head runs inside the model's (wrapped) forward and scores hidden states through one function, which ours
replaces. Everything around that function stays TRL's: models, adapters, sharding, metrics.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .. import checks
from ..loss import linear_kto_loss
from .patching import Patch, check_call, holders, load, original, undo, version

trl_utils: ModuleType = load("trl.trainer.utils", "kto_kernels.integrations.trl", "trl")
trl_kernels: ModuleType = load("trl.kernels", "kto_kernels.integrations.trl", "trl")

from trl import KTOTrainer  # noqa: E402 - after `load`, whose error says what is missing
from trl.models.utils import disable_gradient_checkpointing  # noqa: E402
from trl.trainer import kto_trainer  # noqa: E402
from trl.trainer.utils import use_adapter  # noqa: E402

from . import verify as verification  # noqa: E402
from .trl_head import add_fused_lm_head, add_unverified, rounding  # noqa: E402
from .trl_scoring import (  # noqa: E402
    AROUND,
    OUTPUTS,
    ChunkedLogProbFunction,
    InDtypeOf,
    current_adapter,
    scored_by,
    scored_by_trl,
)

_KNOWN = "1.16"
_log: list = []


# Under every trainer ───────────────────────────────────────────────────────────────────────────────────────────────────


def _check_trl(caller: str) -> None:
    found = version("trl")
    if not found.startswith(f"trl {_KNOWN}."):
        raise RuntimeError(f"{caller}: written for TRL {_KNOWN}, found {found}")


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
    _check_trl("patch_trl")
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


# KTO, its loss inside the forward ──────────────────────────────────────────────────────────────────────────────────────


class _Request:
    """The data that the policy's forward computes the loss from. It is no dataclass: wrappers that move or cast a forward's
    tensors look into dataclasses, and would round the reference's log-probabilities."""

    def __init__(
        self, trainer: FusedKTOTrainer, labels: Tensor, desirable: Tensor, ref_logps: Tensor, kl: Tensor | None
    ):
        counts = (labels[:, 1:] != -100).sum(-1)
        self.cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.desirable, self.ref_logps, self.kl = desirable, ref_logps, kl
        self.options = {
            "beta": trainer.beta,
            "desirable_weight": trainer.desirable_weight,
            "undesirable_weight": trainer.undesirable_weight,
            "loss_type": trainer.loss_type,
        }
        self.loss: Tensor | None = None

    def apply(
        self, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
    ) -> tuple[Tensor | None, ...]:
        """Replaces `ChunkedLogProbFunction.apply`: computes the loss and the gradients of it where the logits are. The
        returned log-probabilities carry the loss through the model's outputs (`_Carry`)."""
        out = linear_kto_loss(
            hidden,
            weight,
            targets,
            self.desirable,
            bias=bias,
            adapter=current_adapter(),
            cu_seqlens=self.cu_seqlens,
            ref_logps=self.ref_logps,
            kl=self.kl,
            logit_scale=float(logit_scale),
            softcap=final_logit_softcapping,
            temperature=float(temperature),
            outputs=tuple(name for name in OUTPUTS if name in outputs),
            **self.options,
        )
        self.loss = out.loss
        return _Carry.apply(out.token_logps, out.loss), out.entropy, None, out.mean_logits, out.is_top1


class _Carry(torch.autograd.Function):
    """Returns the log-probabilities, and passes the gradient that arrives at the first of them on to the loss. The loss
    thus depends on the outputs that DDP and FSDP attach their hooks to, however the model's forward is wrapped."""

    @staticmethod
    def forward(ctx, logps: Tensor, loss: Tensor) -> Tensor:
        return logps.detach().view_as(logps)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad[:1].sum()  # 0 where no token is scored


class _Carried(torch.autograd.Function):
    """Returns 0. The gradient of this 0 goes to the log-probabilities, and through `_Carry` to the loss."""

    @staticmethod
    def forward(ctx, logps: Tensor) -> Tensor:
        ctx.shape = logps.shape
        return logps.new_zeros(())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.expand(ctx.shape)


class _Policy:
    """Stands for the model in one call of TRL's `_compute_loss`, which calls it with the completions."""

    def __init__(self, model: torch.nn.Module, request: _Request):
        self.model, self.request = model, request
        self.carried: Tensor | None = None

    def __call__(self, **inputs: Any) -> Any:
        if not inputs.get("fused_lm_head"):
            return self.model(**inputs)
        with scored_by(self.request):
            outputs = self.model(**inputs)
        if self.request.loss is None:
            raise RuntimeError(
                "FusedKTOTrainer: the policy's forward returned without scoring a token through TRL's fused head; "
                "something has replaced the model's forward since the trainer was made"
            )
        self.carried = _Carried.apply(outputs.log_probs)  # the wrappers' hooks are attached to these
        outputs.log_probs = outputs.log_probs.detach()  # TRL computes only metrics from them
        return outputs


class FusedKTOTrainer(KTOTrainer):
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
            each, once. "full": in addition, the loss of the first batch is compared with the one that TRL computes.
            False: nothing is compared.
        **kwargs: the keyword arguments of KTOTrainer.

    Raises:
        RuntimeError: the installed TRL is not of a known version. On the first batch, on all ranks: what `verify`
            compares differs by more than rounding explains (see `verify.compare`), for instance because the head does
            more than multiply.
        ValueError: TRL's own checks fail; or the head is no matrix of floats: it is quantized, or has several layers; or
            an adapter is on the head that a fused head cannot apply: one with dropout, on a head that is tied to the
            input embeddings, or of another kind than LoRA; or `verify` is "full" with an adapter on the head.
    """

    def __init__(self, *args: Any, verify: bool | str = True, **kwargs: Any):
        _check_trl("FusedKTOTrainer")
        if verify not in (True, False, "full"):
            raise ValueError(f"verify: expected True, False or 'full', got {verify!r}")
        self._full_check_is_due = verify == "full"
        self._policy_scores, self._dtype_known_for = InDtypeOf(), None
        self._known_kl_logps: tuple[Any, Tensor | None] | None = None
        head = functools.partial(add_fused_lm_head, verify=bool(verify), caller="FusedKTOTrainer")
        # TRL asks with `isinstance` whether an adapter is on the head, and refuses it.
        ours = {"add_fused_lm_head": head, "BaseTunerLayer": ()}
        with mock.patch.multiple(kto_trainer, create=True, **ours):
            super().__init__(*args, **kwargs)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """The reference's log-probabilities of a batch. TRL calls it for `precompute_ref_log_probs`, also in its
        constructor.

        Args:
            model: the model that scores the batch, as TRL passes it.
            inputs: TRL's batch: tensors (B, T) by name.

        Returns:
            The result of TRL's method of this name, scored in the policy's dtype.
        """
        if self.ref_model is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            # Not under DeepSpeed and FSDP: they cast the policy only later, and cast the reference in the same way.
            with self.accelerator.autocast():
                self._learn_the_policys_dtype(self.model, inputs)
        with scored_by(InDtypeOf(self._policy_scores)):
            return super().compute_ref_log_probs(model, inputs)

    def _learn_the_policys_dtype(self, model: Any, batch: dict) -> None:
        """Learns the dtype of the policy's hidden states from a forward over a few tokens, where no other forward
        precedes the reference's. It does so on the first batch and whenever training and evaluation alternate, as
        autocast may be on in one of them alone."""
        if self._dtype_known_for != self.model.training:
            self._dtype_known_for = self.model.training
            labels, some = verification.window(_labels(batch), _model_inputs(batch))
            with verification.quiet(self.model), scored_by(self._policy_scores):
                model(**some, use_cache=False, labels=labels, fused_lm_head=True)

    def _compute_kl_logps(self, model: Any, batch: dict) -> Tensor | None:
        if self._known_kl_logps is not None and model is self._known_kl_logps[0]:
            return self._known_kl_logps[1]
        return super()._compute_kl_logps(model, batch)

    def _reference(self, batch: dict, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The reference's sequence log-probabilities: (B,) of the completions and (K,) of the mismatched ones."""
        if self.precompute_ref_logps:
            return batch["ref_logps"], batch["ref_KL_logps"] if self.calculate_KL else None
        model, adapter = self.ref_model, contextlib.nullcontext()
        if model is None:  # the policy without its adapter, or with the one called ref
            model = self.model
            unwrapped = self.accelerator.unwrap_model(model)
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            adapter,
            scored_by(InDtypeOf(self._policy_scores)),
        ):
            kl_logps = self._compute_kl_logps(model, batch)
            outputs = model(**_model_inputs(batch), use_cache=False, labels=labels, fused_lm_head=True)
        # Prompt-learning adapters put virtual tokens in front.
        return outputs.log_probs[:, 1 - labels.shape[1] :].sum(-1), kl_logps

    def _compute_loss(self, model: Any, inputs: dict, return_outputs: bool) -> Any:
        if self._full_check_is_due:
            self._full_check_is_due = False
            self._compare_with_trl(model, inputs)
        return self._fused_loss(model, inputs, return_outputs)

    def _fused_loss(self, model: Any, inputs: dict, return_outputs: bool) -> Any:
        device = self.accelerator.device
        batch = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        labels = _labels(batch)
        with scored_by(self._policy_scores):
            kl_logps = super()._compute_kl_logps(model, batch)
        if not self.calculate_KL and not self.precompute_ref_logps:
            self._learn_the_policys_dtype(model, batch)
        ref_logps, ref_kl_logps = self._reference(batch, labels)
        kl = None
        if self.calculate_KL:
            kl = self.accelerator.gather_for_metrics((kl_logps - ref_kl_logps).mean().detach()).mean()

        desirable = torch.as_tensor(batch["label"], dtype=torch.bool, device=device)
        policy = _Policy(model, _Request(self, labels, desirable, ref_logps, kl))
        # From here on TRL's own step computes metrics and auxiliary losses, with the log-probabilities computed above.
        batch |= {"ref_logps": ref_logps, "ref_KL_logps": ref_kl_logps}
        self._known_kl_logps = (policy, kl_logps)
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            result = super()._compute_loss(policy, batch, return_outputs)
        finally:
            self.precompute_ref_logps, self._known_kl_logps = precomputed, None
        loss, *rest = result if return_outputs else (result,)
        loss = loss + policy.carried  # adds 0: the value is TRL's to the bit, the gradient ours
        return (loss, *rest) if return_outputs else loss

    def _compare_with_trl(self, model: Any, inputs: dict) -> None:
        """Compares the loss of a batch with the one that TRL's trainer computes by TRL's own functions."""
        metrics, tokens = copy.deepcopy(self._metrics), self._total_train_tokens
        with verification.quiet(self.model):
            with scored_by_trl():
                theirs = super()._compute_loss(model, inputs, False)
            mine = self._fused_loss(model, inputs, False)
        self._metrics, self._total_train_tokens = metrics, tokens
        # A loss changes by at most λβ/4 for each nat of a log-ratio or of the KL. Either is a difference of two sums
        # over at most `longest` tokens, whose rounding errors have random signs.
        longest = max(int(inputs[name].sum(-1).max()) for name in inputs if name.endswith("completion_mask"))
        slope = max(self.desirable_weight, self.undesirable_weight) * self.beta / 4
        models = [model for model in (self.model, self.ref_model) if model is not None]
        allowed = slope * 4 * 4 * math.sqrt(longest) * max(map(rounding, models))
        verification.same_loss(type(self.model).__name__, mine.detach(), theirs.detach(), allowed + 1e-6)


def _labels(batch: dict) -> Tensor:
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)


def _model_inputs(batch: dict) -> dict:
    """The part of TRL's batch that the model takes."""
    return {
        name: x
        for name, x in batch.items()
        if name not in ("completion_mask", "label") and not name.startswith(("KL_", "ref_"))
    }
