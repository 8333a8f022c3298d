"""The parts that `FusedKTOTrainer` and `FusedDPOTrainer` share: a loss that is computed inside of the policy's forward,
a reference that is scored in the policy's dtype, and the checks of a first batch."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ..output import KTOOutput
from . import verify as verification
from .patching import version
from .trl_head import add_fused_lm_head, rounding
from .trl_scoring import OUTPUTS, InDtypeOf, current_adapter, scored_by, scored_by_trl

_KNOWN = "1.16"
_Trainer: Any = object  # TRL's trainer, as far as types go


def check_trl(caller: str) -> None:
    """Checks the installed version of TRL.

    Args:
        caller: who calls this function, for the message.

    Raises:
        RuntimeError: the version is not a known one.
    """
    found = version("trl")
    if not found.startswith(f"trl {_KNOWN}."):
        raise RuntimeError(f"{caller}: written for TRL {_KNOWN}, found {found}")


# The loss inside the forward ───────────────────────────────────────────────────────────────────────────────────────────


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


class Policy:
    """Stands for the model in one call of TRL's `_compute_loss`, which calls it with the completions, and computes the
    loss where the model's forward scores hidden states.

    Args:
        model: the model, wrapped as it is trained.
        labels: (B, T) integers, -100 where nothing is scored.
        loss: computes the loss from hidden states, head, and targets of packed scored tokens, given as the first three
            arguments, and takes the options of the head by name. None: TRL's formula is differentiated.
        kl_logps: (K,) floating, the policy's log-probabilities of KTO's mismatched completions. None: there are none.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        labels: Tensor,
        loss: Callable[..., KTOOutput] | None,
        kl_logps: Tensor | None = None,
    ):
        self.model = model
        self.labels = labels
        self.compute = loss
        self.kl_logps = kl_logps
        # Results of the forward: the loss, the model's outputs that TRL's loss takes, a 0 that carries the gradient.
        self.loss: Tensor | None = None
        self.logps: Tensor | None = None  # (B,)
        self.aux_loss: Tensor | None = None
        self.carried: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: how many tokens of each completion are scored."""
        return (self.labels[:, 1:] != -100).sum(-1)

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """Replaces `ChunkedLogProbFunction.apply`, whose arguments it has: computes the loss and the gradients of it
        where the logits are.

        Args:
            hidden: (N, H) floating.
            weight: (V, H) floating.
            bias: (V,) floating. None: the head has none.
            targets: (N,) integers.
            temperature: the logits are divided by it.
            chunk_size: it has no effect.
            final_logit_softcapping: the soft cap of the logits. None: there is none.
            logit_scale: the logits are multiplied by it.
            outputs: which of the last four results are computed.

        Returns:
            The results of `ChunkedLogProbFunction.apply`. The log-probabilities carry the loss through the model's
                outputs (`_Carry`).
        """
        lengths = self.lengths
        out = self.compute(
            hidden,
            weight,
            targets,
            bias=bias,
            adapter=current_adapter(),
            cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            logit_scale=float(logit_scale),
            softcap=final_logit_softcapping,
            temperature=float(temperature),
            outputs=tuple(name for name in OUTPUTS if name in outputs),
        )
        self.loss = out.loss
        return _Carry.apply(out.token_logps, out.loss), out.entropy, None, out.mean_logits, out.is_top1

    def __call__(self, **inputs: Any) -> Any:
        if not inputs.get("fused_lm_head"):
            return self.model(**inputs)
        with scored_by(self) if self.compute else contextlib.nullcontext():
            outputs = self.model(**inputs)
        if self.compute is not None:
            if self.loss is None:
                raise RuntimeError(
                    "the policy's forward returned without scoring a token through TRL's fused head; something has "
                    "replaced the model's forward since the trainer was made"
                )
            self.carried = _Carried.apply(outputs.log_probs)  # the wrappers' hooks are attached to these
            outputs.log_probs = outputs.log_probs.detach()  # TRL computes only metrics from them
        self.logps, self.aux_loss = sequence_sums(outputs.log_probs.detach(), self.labels), outputs.aux_loss
        return outputs


# Around TRL's trainers ─────────────────────────────────────────────────────────────────────────────────────────────────


class FusedTrainer(_Trainer):
    """The first base of a fused trainer; the second one is TRL's trainer. A subclass defines the members
    that raise NotImplementedError here, `_CALLER` and `_THEIRS`.

    Args:
        *args: the positional arguments of TRL's trainer.
        verify: as for `FusedKTOTrainer`.
        **kwargs: the keyword arguments of TRL's trainer.

    Raises:
        RuntimeError: the installed TRL is not of a known version.
        ValueError: as for `FusedKTOTrainer`.
    """

    _CALLER: ClassVar[str]  # the trainer's name, for messages
    _THEIRS: ClassVar[ModuleType]  # the module of TRL's trainer
    precompute_ref_logps: bool  # TRL's: whether the data has the reference's log-probabilities

    def __init__(self, *args: Any, verify: bool | str = True, **kwargs: Any):
        check_trl(self._CALLER)
        if verify not in (True, False, "full"):
            raise ValueError(f"verify: expected True, False or 'full', got {verify!r}")
        self._check_arguments(*args, **kwargs)
        self._formula_check_is_due, self._full_check_is_due = bool(verify), verify == "full"
        self._policy_scores, self._dtype_known_for = InDtypeOf(), None
        head = functools.partial(add_fused_lm_head, verify=bool(verify), caller=self._CALLER)
        # TRL asks with `isinstance` whether an adapter is on the head, and refuses it.
        ours = {"add_fused_lm_head": head, "BaseTunerLayer": ()}
        with mock.patch.multiple(self._THEIRS, create=True, **ours):
            super().__init__(*args, **kwargs)

    def _check_arguments(self, *args: Any, **kwargs: Any) -> None:
        """Refuses arguments of TRL's trainer that cannot be honoured, before any work."""

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
            labels, some = verification.window(labels_of(batch), _model_inputs(batch))
            with verification.quiet(self.model), self._policy_scored():
                model(**some, use_cache=False, labels=labels, fused_lm_head=True)

    def _policy_scored(self) -> AbstractContextManager[None]:
        """Scores the policy in the block by our function, without a loss."""
        return scored_by(self._policy_scores)

    @contextlib.contextmanager
    def _reference_model(self) -> Iterator[Any]:
        """The reference, which is scored in the policy's dtype in the block."""
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
            yield model

    def _sequence_logps(self, model: Any, batch: dict, labels: Tensor) -> Tensor:
        """A model's log-probabilities (B,) of the completions."""
        outputs = model(**_model_inputs(batch), use_cache=False, labels=labels, fused_lm_head=True)
        return sequence_sums(outputs.log_probs, labels)

    def _compute_loss(self, model: Any, inputs: dict, return_outputs: bool) -> Any:
        if self._full_check_is_due:
            self._full_check_is_due = False
            self._compare_with_trl(model, inputs)
        return self._trls_step(*self._prepared(model, inputs), return_outputs)

    def _prepared(self, model: Any, inputs: dict) -> tuple[Policy, dict]:
        """The policy with its loss, and the batch with the reference's log-probabilities under TRL's names."""
        raise NotImplementedError

    def _trls_step(self, policy: Policy, batch: dict, return_outputs: bool) -> Any:
        """TRL's own step, which computes metrics and auxiliary losses."""
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            with self._policy_scored():
                result = super()._compute_loss(policy, batch, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        loss, *rest = result if return_outputs else (result,)
        if self._formula_check_is_due:
            self._formula_check_is_due = False
            self._compare_formulas(policy, batch, loss)
        if policy.carried is not None:
            loss = loss + policy.carried  # adds 0: the value is TRL's to the bit, the gradient ours
        return (loss, *rest) if return_outputs else loss

    @torch.no_grad()
    def _compare_formulas(self, policy: Policy, batch: dict, theirs: Tensor) -> None:
        """Compares the loss whose gradient is taken with TRL's, which is logged: both are of the same log-probabilities."""
        mine = theirs if policy.loss is None else policy.loss
        if policy.loss is not None and self.aux_loss_enabled:
            mine = mine + self.router_aux_loss_coef * policy.aux_loss
        # TRL's sums and formulas are in fp32. A sum of L numbers is off by some units in its last place.
        unit = 8 * torch.finfo(torch.float32).eps
        delta = unit * max(policy.logps.abs().max().item(), self._ref_logps(batch).abs().max().item())
        allowed = self._rounding_of_the_loss(policy, batch, delta) + unit * max(1.0, abs(theirs.item()))
        verification.same_loss(type(self.model).__name__, mine, theirs.detach(), allowed)

    def _compare_with_trl(self, model: Any, inputs: dict) -> None:
        """Compares the loss of a batch with the one that TRL's trainer computes by TRL's own functions."""
        metrics, tokens = copy.deepcopy(self._metrics), self._total_train_tokens
        with verification.quiet(self.model):
            with scored_by_trl():
                theirs = super()._compute_loss(model, inputs, False)
            policy, batch = self._prepared(model, inputs)
            mine = self._trls_step(policy, batch, False)
        self._metrics, self._total_train_tokens = metrics, tokens
        # Four standard deviations of a sum over at most `longest` tokens, whose rounding errors have random signs.
        longest = max(int(inputs[name].sum(-1).max()) for name in inputs if name.endswith("completion_mask"))
        models = [each for each in (self.model, self.ref_model) if each is not None]
        allowed = self._rounding_of_the_loss(policy, batch, 4 * math.sqrt(longest) * max(map(rounding, models)))
        verification.same_loss(type(self.model).__name__, mine.detach(), theirs.detach(), allowed + 1e-6)

    def _ref_logps(self, batch: dict) -> Tensor:
        """The reference's log-probabilities (B,) in a batch that has them."""
        raise NotImplementedError

    def _rounding_of_the_loss(self, policy: Policy, batch: dict, delta: float) -> float:
        """How much rounding may change the loss of a batch, where it may change a sequence's log-probability by
        `delta`."""
        raise NotImplementedError


def sequence_sums(log_probs: Tensor, labels: Tensor) -> Tensor:
    """The sums of log-probabilities, as TRL takes them.

    Args:
        log_probs: (B, T - 1) floating, 0 where nothing is scored; or longer, as prompt-learning adapters put virtual
            tokens in front.
        labels: (B, T) integers.

    Returns:
        The sums (B,).
    """
    return log_probs[:, 1 - labels.shape[1] :].sum(-1)


def labels_of(batch: dict[str, Any]) -> Tensor:
    """The labels of TRL's batch.

    Args:
        batch: tensors (B, T) by name.

    Returns:
        (B, T) integers, -100 outside of the completions.
    """
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)


def _model_inputs(batch: dict) -> dict:
    """The part of TRL's batch that the model takes."""
    return {
        name: x
        for name, x in batch.items()
        if name not in ("completion_mask", "label") and not name.startswith(("KL_", "ref_"))
    }
