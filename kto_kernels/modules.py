"""The losses as modules: options at construction, tensors at call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .loss import kto_loss, linear_kto_loss
from .output import KTOOutput


class KTOLoss(nn.Module):
    """`kto_loss` with its options fixed; see there for arguments, returns and errors.

    >>> loss = KTOLoss(beta=0.1, desirable_weight=1.2, shift=True)
    >>> loss(logits, labels, desirable, ref_logps=ref_logps, kl=0.0).loss.backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        loss_type: str = "kto",
        average_log_prob: bool = False,
        reduction: str = "mean",
        ignore_index: int = -100,
        shift: bool = False,
        temperature: float = 1.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        vocab_group: Any = None,
        vocab: int | None = None,
        context_group: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.options = {
            "beta": beta,
            "desirable_weight": desirable_weight,
            "undesirable_weight": undesirable_weight,
            "loss_type": loss_type,
            "average_log_prob": average_log_prob,
            "reduction": reduction,
            "ignore_index": ignore_index,
            "shift": shift,
            "temperature": temperature,
            "inplace_backward": inplace_backward,
            "process_group": process_group,
            "vocab_group": vocab_group,
            "vocab": vocab,
            "context_group": context_group,
            "backend": backend,
        }

    def forward(
        self,
        logits: Tensor,  # (B, T, V) or (N, V)
        labels: Tensor,  # (B, T) or (N,)
        desirable: Tensor,  # (B,) bool
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

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearKTOLoss(nn.Module):
    """`linear_kto_loss` with its options fixed; see there for arguments, returns and errors.

    >>> loss = LinearKTOLoss(beta=0.1, shift=True)
    >>> loss(hidden, model.lm_head.weight, labels, desirable, kl=0.0).loss.backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        max_logits_bytes: int | None = None,
        long_sequences: str = "auto",
        outputs: tuple[str, ...] = (),
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        loss_type: str = "kto",
        average_log_prob: bool = False,
        reduction: str = "mean",
        ignore_index: int = -100,
        shift: bool = False,
        process_group: Any = None,
        vocab_group: Any = None,
        vocab: int | None = None,
        context_group: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.options = {
            "logit_scale": logit_scale,
            "softcap": softcap,
            "temperature": temperature,
            "max_logits_bytes": max_logits_bytes,
            "long_sequences": long_sequences,
            "outputs": outputs,
            "beta": beta,
            "desirable_weight": desirable_weight,
            "undesirable_weight": undesirable_weight,
            "loss_type": loss_type,
            "average_log_prob": average_log_prob,
            "reduction": reduction,
            "ignore_index": ignore_index,
            "shift": shift,
            "process_group": process_group,
            "vocab_group": vocab_group,
            "vocab": vocab,
            "context_group": context_group,
            "backend": backend,
        }

    def forward(
        self,
        hidden: Tensor,  # (B, T, H) or (N, H)
        weight: Tensor,  # (V, H)
        labels: Tensor,  # (B, T) or (N,)
        desirable: Tensor,  # (B,) bool
        *,
        bias: Tensor | None = None,
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
    ) -> KTOOutput:
        return linear_kto_loss(
            hidden,
            weight,
            labels,
            desirable,
            bias=bias,
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
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
