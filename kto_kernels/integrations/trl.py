"""TRL 1.16: `FusedKTOTrainer`, a KTOTrainer whose loss is computed from hidden states, and `patch_trl()`, which puts our
token log-probabilities under every trainer of TRL. Importing this module imports TRL.

TRL's fused head runs inside the model's (wrapped) forward and scores hidden states through one function; ours takes
that function's place. Everything around it stays TRL's: models, adapters, sharding, metrics.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .. import checks, dtensor, reference
from ..distributed import Ranks
from ..loss import linear_kto_loss
from ..stages import autocast_dtype, linear_scores
from .patching import Patch, check_call, holders, load, original, undo, version

trl_utils = load("trl.trainer.utils", "kto_kernels.integrations.trl", "trl")
trl_kernels = load("trl.kernels", "kto_kernels.integrations.trl", "trl")

from trl import KTOTrainer  # noqa: E402 - after the check that names what is missing
from trl.models.utils import disable_gradient_checkpointing  # noqa: E402
from trl.trainer.utils import use_adapter  # noqa: E402

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_KNOWN = "1.16"
_log: list = []


# Under every trainer ───────────────────────────────────────────────────────────────────────────────────────────────────


class ChunkedLogProbFunction:
    """TRL's function of this name by ours: hidden states of scored tokens → what TRL's fused head returns for each."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """Token log-probabilities (N,) fp32, then those of `entropy`, `log_sum_sq_probs`, `mean_logits` and `is_top1`
        that `outputs` asks for, (N,) each, None for the rest; gradients flow through the first two.

        `chunk_size`, the width of TRL's tiles, does not matter: ours are rows × the whole vocabulary (`LinearPlan`).

        Raises:
            TypeError, ValueError: as `linear_token_logps`.
        """
        weight, bias = dtensor.heads(Ranks(), weight=weight, bias=bias)
        checks.head(hidden, weight, bias)
        checks.hidden_rows(hidden, targets, None, packed=False)
        if torch.is_grad_enabled() and hasattr(weight, "ds_id"):
            # DeepSpeed's ZeRO-3 takes the gathered one back behind the forward; the backward computes logits again.
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        scale = (float(logit_scale), final_logit_softcapping, float(temperature))
        wanted = tuple(name for name in OUTPUTS if name in outputs and name != "log_sum_sq_probs")
        dtype = autocast_dtype(hidden, hidden.dtype)
        logps, *extra = linear_scores(
            hidden, weight, bias, targets, None, (False, -100, *scale), None, wanted, "auto", dtype=dtype
        )
        found = dict(zip(("entropy", "mean_logits", "is_top1"), extra))
        squares = None
        if "log_sum_sq_probs" in outputs:
            squares = _log_sum_sq_probs(hidden, weight, bias, scale)
        named = found | {"log_sum_sq_probs": squares}
        return logps, *(named[name] if name in outputs else None for name in OUTPUTS)


@torch.no_grad()
def _log_sum_sq_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: tuple) -> Tensor:
    """`log Σ_v p_v²` of each row, in plain PyTorch, some rows at a time: a pass of its own, as few trainers log it."""
    rows = max(1, (1 << 24) // weight.shape[0])
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    return torch.cat(
        [
            (2 * reference.scaled(torch.nn.functional.linear(h, weight, bias), *scale).log_softmax(-1)).logsumexp(-1)
            for h in hidden.split(rows)
        ]
        or [hidden.new_empty(0, dtype=torch.float32)]
    )


def _check_trl(caller: str) -> None:
    found = version("trl")
    if not found.startswith(f"trl {_KNOWN}."):
        raise RuntimeError(f"{caller}: written for TRL {_KNOWN}, found {found}")


def patch_trl() -> Patch:
    """Puts our token log-probabilities under every trainer of TRL 1.16 that scores tokens through its fused head (SFT,
    DPO, KTO, GRPO, RLOO, …). Prompts and padding are left out on every device. May be called again; as a context
    manager it ends with the block.

    Raises:
        RuntimeError: the TRL that is installed is not a version that this knows.
    """
    _check_trl("patch_trl")
    theirs = original(_log, trl_kernels, "ChunkedLogProbFunction", "patch_trl")
    check_call(theirs.forward, ChunkedLogProbFunction.apply, "trl.kernels.ChunkedLogProbFunction", skip=1)
    patch = Patch(_log)
    for module, name in list(holders(theirs)):
        if module.__name__.startswith("trl.") and not module.__name__.endswith("chunked_logprob"):
            patch.replace(module, name, ChunkedLogProbFunction)
    for name, ours in _AROUND.items():
        patch.replace(trl_utils, name, ours)
    return patch


def unpatch_trl() -> None:
    """Takes back what `patch_trl` put in place."""
    undo(_log)


def _compact(device: torch.device) -> bool:
    """Whether TRL's fused head leaves out the tokens that no label scores: it does where its own kernels run."""
    return True


# TRL gathers a sharded head (FSDP2, outside of its unsharded window) without reducing its gradient over the ranks: to us
# it comes as it is.
_AROUND = {"_use_triton": _compact, "DTensor": ()}


# KTO, its loss inside the forward ──────────────────────────────────────────────────────────────────────────────────────


class _Request:
    """What the policy's forward needs for the loss. No dataclass: wrappers that move or cast a forward's tensors look
    into those, and would round the reference's log-probabilities."""

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
        """In the place of `ChunkedLogProbFunction.apply`: forms the loss and its gradients here, where the logits are.
        What it returns has no gradient: TRL makes its metrics of it."""
        out = linear_kto_loss(
            hidden,
            weight,
            targets,
            self.desirable,
            bias=bias,
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
        return out.token_logps, out.entropy, None, out.mean_logits, out.is_top1


class _Policy:
    """The model for one step of TRL's `_compute_loss`, which calls it with the completions."""

    def __init__(self, model: torch.nn.Module, request: _Request):
        self.model, self.request = model, request
        self.loss: Tensor | None = None

    def __call__(self, **inputs: Any) -> Any:
        if not inputs.get("fused_lm_head"):
            return self.model(**inputs)
        outputs = self.model(**inputs, kto=self.request)
        self.loss = outputs.loss  # as it came through the wrappers, with their hooks
        return outputs


@contextlib.contextmanager
def _scored_by(function: Any) -> Iterator[None]:
    with mock.patch.multiple(trl_utils, _ChunkedLogProbFunction=function, **_AROUND):
        yield


def _take_over(model: torch.nn.Module) -> None:
    """Has TRL's fused head of this model score through ours: with `kto=` the policy's loss, else log-probabilities."""
    theirs = model.forward

    # The signature stays: `generate` checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(self, *args, kto: _Request | None = None, fused_lm_head: bool = False, **kwargs):
        if not fused_lm_head:
            return theirs(*args, **kwargs)
        with _scored_by(ChunkedLogProbFunction if kto is None else kto):
            outputs = theirs(*args, fused_lm_head=True, **kwargs)
        if kto is not None:
            outputs.loss = kto.loss  # an output of the forward, so that DDP's and FSDP's hooks fire
        return outputs

    model.forward = types.MethodType(forward, model)


class FusedKTOTrainer(KTOTrainer):
    """`trl.KTOTrainer` 1.16 with another place for its loss: inside the wrapped model's forward, from hidden states,
    through `linear_kto_loss` (3G with a trained head, 2G with a frozen one, reference and KL 1G each). Arguments, data,
    metrics and their values are TRL's.

    The reference's and the KL's log-probabilities come before the policy's forward instead of after it, and only the
    completions' tokens are projected, on a CPU too.

    Raises:
        RuntimeError: TRL is not a version that this knows.
        ValueError: TRL's own checks; an adapter on the head itself, for instance, which a fused head would not see.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        _check_trl("FusedKTOTrainer")
        super().__init__(*args, **kwargs)
        policy = self.accelerator.unwrap_model(self.model)
        policy = policy.get_base_model() if hasattr(policy, "peft_config") else policy
        _take_over(policy)
        if self.ref_model is not None:
            _take_over(self.accelerator.unwrap_model(self.ref_model))
        self._known_kl_logps: tuple[Any, Tensor | None] | None = None

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        with _scored_by(ChunkedLogProbFunction):  # TRL calls this in its constructor too, before the take-over
            return super()._precompute_ref_logps(*args, **kwargs)

    def _compute_kl_logps(self, model: Any, batch: dict) -> Tensor | None:
        if self._known_kl_logps is not None and model is self._known_kl_logps[0]:
            return self._known_kl_logps[1]
        return super()._compute_kl_logps(model, batch)

    def _reference(self, batch: dict, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sequence log-probabilities (B,) of the reference, of completions and of mismatched ones."""
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
        ):
            kl_logps = self._compute_kl_logps(model, batch)
            outputs = model(**_model_inputs(batch), use_cache=False, labels=labels, fused_lm_head=True)
        # Prompt-learning adapters put virtual tokens in front.
        return outputs.log_probs[:, 1 - labels.shape[1] :].sum(-1), kl_logps

    def _compute_loss(self, model: Any, inputs: dict, return_outputs: bool) -> Any:
        device = self.accelerator.device
        batch = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        kl_logps = super()._compute_kl_logps(model, batch)
        ref_logps, ref_kl_logps = self._reference(batch, labels)
        kl = None
        if self.calculate_KL:
            kl = self.accelerator.gather_for_metrics((kl_logps - ref_kl_logps).mean().detach()).mean()

        desirable = torch.as_tensor(batch["label"], dtype=torch.bool, device=device)
        policy = _Policy(model, _Request(self, labels, desirable, ref_logps, kl))
        # TRL's own step from here on, for metrics and auxiliary losses: what it would compute again is there already.
        batch |= {"ref_logps": ref_logps, "ref_KL_logps": ref_kl_logps}
        self._known_kl_logps = (policy, kl_logps)
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            result = super()._compute_loss(policy, batch, return_outputs)
        finally:
            self.precompute_ref_logps, self._known_kl_logps = precomputed, None
        loss, *rest = result if return_outputs else (result,)
        # Its value is TRL's, to the bit; its gradient ours, as the log-probabilities carried none.
        if policy.loss.requires_grad:
            loss = loss + (policy.loss - policy.loss.detach())
        return (loss, *rest) if return_outputs else loss


def _model_inputs(batch: dict) -> dict:
    """What of TRL's batch the model takes."""
    return {
        name: x
        for name, x in batch.items()
        if name not in ("completion_mask", "label") and not name.startswith(("KL_", "ref_"))
    }
