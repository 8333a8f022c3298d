"""The one function through which TRL 1.16's fused head scores hidden states, and our replacements for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

from .. import checks, engine, reference
from ..inputs import Inputs
from ..linear.head import Adapter
from ..options import Chunking, Objective, Scale, Scoring
from ..parallel import dtensor
from ..parallel.agreement import ALONE
from .patching import load

trl_utils: ModuleType = load("trl.trainer.utils", "kto_kernels.integrations.trl", "trl")

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class ChunkedLogProbFunction:
    """Replaces TRL's function of this name: hidden states of scored tokens → what TRL's fused head returns for each."""

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
        """Scores tokens. Gradients flow through log-probabilities and entropy.

        Args:
            hidden: (N, H) floating, the hidden states of scored tokens.
            weight: (V, H) floating, the head's weight.
            bias: (V,) floating, the head's bias. None: the head has none.
            targets: (N,) integers, the tokens that are scored.
            temperature: the logits are divided by it, > 0.
            chunk_size: the width of TRL's tiles. It has no effect: a chunk of ours is some rows × the whole vocabulary
                (`LinearPlan`).
            final_logit_softcapping: the soft cap of the logits, > 0. None: there is none.
            logit_scale: the logits are multiplied by it, > 0. 1.0 leaves them as they are.
            outputs: which of the last four results are computed. The default: all of them.

        Returns:
            The token log-probabilities (N,) fp32 in nats, then `entropy`, `log_sum_sq_probs`, `mean_logits` and
                `is_top1`: (N,) each, or None where `outputs` does not ask for it.

        Raises:
            TypeError: as for `linear_token_logps`.
            ValueError: as for `linear_token_logps`.
            NotImplementedError: as for `linear_token_logps`.
        """
        weight, bias = dtensor.heads(None, weight=weight, bias=bias)
        checks.head(hidden, weight, bias)
        checks.hidden_rows(hidden, targets, None, packed=False)
        weight, bias = kept_for_backward(weight, bias)
        scale = (float(logit_scale), final_logit_softcapping, float(temperature))
        wanted = tuple(name for name in OUTPUTS if name in outputs and name != "log_sum_sq_probs")
        adapter = Adapter.of(current_adapter())
        inputs = Inputs("hidden", hidden, targets, weight=weight, bias=bias, adapter=adapter).local(None)
        if adapter is not None:
            checks.adapter_tensors(inputs.adapter.a, inputs.adapter.b, weight)
        call = engine.agree(inputs, Scoring(Scale(*scale)), Objective(), Chunking(), ALONE)
        found = call.token_logps(inputs.side(""), wanted)
        squares = None
        if "log_sum_sq_probs" in outputs:
            squares = _log_sum_sq_probs(hidden, weight, bias, inputs.adapter, scale)
        named = found | {"log_sum_sq_probs": squares}
        return found["logps"], *(named[name] if name in outputs else None for name in OUTPUTS)


def kept_for_backward(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The head for a backward that computes logits again: DeepSpeed's ZeRO-3 frees the gathered head after the forward,
    so that a copy of it is kept.

    Args:
        weight: (V, H) floating, the head's weight.
        bias: (V,) floating, the head's bias. None: the head has none.

    Returns:
        Weight and bias: copies under ZeRO-3 where gradients are enabled, else what was given.
    """
    if torch.is_grad_enabled() and hasattr(weight, "ds_id"):
        return weight.clone(), None if bias is None else bias.clone()
    return weight, bias


@torch.no_grad()
def _log_sum_sq_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter | None, scale: tuple
) -> Tensor:
    """`log Σ_v p_v²` of each row, in plain PyTorch, some rows at a time. Few trainers log it: it may cost another
    pass."""
    rows = max(1, (1 << 24) // weight.shape[0])
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    if adapter is not None:
        a, b = adapter.a.to(hidden.dtype), adapter.b.to(hidden.dtype)

    def logits(h: Tensor) -> Tensor:
        found = torch.nn.functional.linear(h, weight, bias)
        return found if adapter is None else found + adapter.scaling * (h @ a.T @ b.T)

    return torch.cat(
        [(2 * reference.scaled(logits(h), *scale).log_softmax(-1)).logsumexp(-1) for h in hidden.split(rows)]
        or [hidden.new_empty(0, dtype=torch.float32)]
    )


def compact(device: torch.device) -> bool:
    """Replaces TRL's `_use_triton`, by which the fused head decides whether to leave out tokens that no label scores.
    TRL does so where its own kernels run; here it is always done.

    Args:
        device: the device of the hidden states. It has no effect.

    Returns:
        True.
    """
    return True


# TRL gathers a head that FSDP2 has sharded, but does not reduce the head's gradient over the ranks. With no type to
# recognise it by (`DTensor`), TRL passes the head on as it is, and we gather it.
AROUND: dict[str, Any] = {"_use_triton": compact, "DTensor": ()}
_THEIRS = {name: getattr(trl_utils, name) for name in ("_ChunkedLogProbFunction", *AROUND)}


# The adapters on the heads of the models whose fused heads run now, the innermost last. TRL's fused head passes on a
# head's weight and bias alone.
_adapters: list[tuple[Tensor, Tensor, float] | None] = []


@contextlib.contextmanager
def with_adapter(adapter: tuple[Tensor, Tensor, float] | None) -> Iterator[None]:
    """Makes the scorers in the block add an adapter to the head.

    Args:
        adapter: (A, B, scaling), A (r, H) floating, B (V, r) floating. None: no adapter is on the head.
    """
    _adapters.append(adapter)
    try:
        yield
    finally:
        _adapters.pop()


def current_adapter() -> tuple[Tensor, Tensor, float] | None:
    """The adapter on the head of the model whose fused head runs now.

    Returns:
        (A, B, scaling), or None where there is none.
    """
    return _adapters[-1] if _adapters else None


class _Current:
    """The object that TRL's fused head calls inside `scored_by`. It is one object for all steps, so that a compiled
    model is compiled once, and it is not traced, as each step has a loss object of its own."""

    scorers: ClassVar[list[Any]] = []

    @staticmethod
    @torch.compiler.disable
    def apply(*args: Any) -> tuple[Tensor | None, ...]:
        return _Current.scorers[-1].apply(*args)


@contextlib.contextmanager
def scored_by(scorer: Any) -> Iterator[None]:
    """Makes TRL's fused head of every model score through `scorer.apply` in the block.

    Args:
        scorer: an object whose `apply` has the arguments of `ChunkedLogProbFunction.apply`.
    """
    _Current.scorers.append(scorer)
    try:
        with mock.patch.multiple(trl_utils, _ChunkedLogProbFunction=_Current, **AROUND):
            yield
    finally:
        _Current.scorers.pop()


def scored_by_trl() -> AbstractContextManager[Any]:
    """Makes TRL's fused head score as TRL does, even under `patch_trl`.

    Returns:
        A context manager, whose block is scored so.
    """
    return mock.patch.multiple(trl_utils, **_THEIRS)


def scores_as_trl() -> bool:
    """Whether TRL's fused head scores by TRL's own function now.

    Returns:
        True where nothing has replaced TRL's function.
    """
    return trl_utils._ChunkedLogProbFunction is _THEIRS["_ChunkedLogProbFunction"]


class InDtypeOf:
    """Scores one model in the dtype of another one: it casts hidden states, and with them the head, to the dtype of the
    hidden states that `other` has scored last.

    Args:
        other: the scorer of the other model. None, or before `other` has scored: nothing is cast.
    """

    def __init__(self, other: InDtypeOf | None = None):
        self.other = other
        self.dtype: torch.dtype | None = None  # of the hidden states scored last

    def apply(self, hidden: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        """`ChunkedLogProbFunction.apply` of the hidden states that were cast.

        Args:
            hidden: (N, H) floating, the hidden states of scored tokens.
            *args: the other arguments of `ChunkedLogProbFunction.apply`.

        Returns:
            The results of `ChunkedLogProbFunction.apply`.
        """
        self.dtype = hidden.dtype
        dtype = None if self.other is None else self.other.dtype
        return ChunkedLogProbFunction.apply(hidden if dtype is None else hidden.to(dtype), *args)
