"""The one function through which TRL 1.16's fused head scores hidden states, and what takes its place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

from .. import checks, dtensor, reference
from ..distributed import Ranks
from ..stages import linear_scores
from .patching import load

trl_utils = load("trl.trainer.utils", "kto_kernels.integrations.trl", "trl")

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


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
        logps, *extra = linear_scores(hidden, weight, bias, targets, None, (False, -100, *scale), None, wanted, "auto")
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


def compact(device: torch.device) -> bool:
    """Whether TRL's fused head leaves out the tokens that no label scores: it does where its own kernels run."""
    return True


# TRL gathers a sharded head (FSDP2, outside of its unsharded window) without reducing its gradient over the ranks: to us
# it comes as it is.
AROUND = {"_use_triton": compact, "DTensor": ()}
_THEIRS = {name: getattr(trl_utils, name) for name in ("_ChunkedLogProbFunction", *AROUND)}


class _Current:
    """What TRL's fused head calls inside `scored_by`: always this, so that a compiled model is compiled once, and not
    traced, as the losses of two steps are two objects."""

    scorers: ClassVar[list[Any]] = []

    @staticmethod
    @torch.compiler.disable
    def apply(*args: Any) -> tuple[Tensor | None, ...]:
        return _Current.scorers[-1].apply(*args)


@contextlib.contextmanager
def scored_by(scorer: Any) -> Iterator[None]:
    """TRL's fused head of every model scores through `scorer.apply`, which takes what `ChunkedLogProbFunction.apply`
    does."""
    _Current.scorers.append(scorer)
    try:
        with mock.patch.multiple(trl_utils, _ChunkedLogProbFunction=_Current, **AROUND):
            yield
    finally:
        _Current.scorers.pop()


def scored_by_trl() -> AbstractContextManager:
    """TRL's fused head scores as TRL does, under `patch_trl` too."""
    return mock.patch.multiple(trl_utils, **_THEIRS)


def scores_as_trl() -> bool:
    return trl_utils._ChunkedLogProbFunction is _THEIRS["_ChunkedLogProbFunction"]


class InDtypeOf:
    """Scores one model as another: with its hidden states cast to the dtype that the other's last had, and so its head
    too. Without another, or before that one has scored, as usual."""

    def __init__(self, other: InDtypeOf | None = None):
        self.other = other
        self.dtype: torch.dtype | None = None  # of the hidden states that came last

    def apply(self, hidden: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        self.dtype = hidden.dtype
        dtype = None if self.other is None else self.other.dtype
        return ChunkedLogProbFunction.apply(hidden if dtype is None else hidden.to(dtype), *args)
