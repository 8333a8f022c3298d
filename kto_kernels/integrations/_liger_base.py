"""What all replacements for Liger's losses share: options as fields, the checks of tensors, and the sums of logits."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor, nn

from .. import checks, reference


class LigerLoss(nn.Module):
    """A module whose options are the fields of a dataclass: a subclass is a dataclass with Liger's options in their
    order."""

    def __post_init__(self) -> None:
        super().__init__()

    def extra_repr(self) -> str:
        """The options, for `repr`.

        Returns:
            The options by name, without those that have no effect.
        """
        names = [each.name for each in fields(self) if each.name not in ("compiled", "chunk_size")]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def check_policy(
    _input: Tensor,  # (B, T, H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (B, T)
    bias: Tensor | None,  # (V,)
    ignore_index: int,
) -> None:
    """Checks the policy's hidden states and head, and the targets.

    Args:
        _input: (B, T, H) bf16, fp16, fp32 or fp64: hidden states.
        weight: (V, H) bf16, fp16, fp32 or fp64: the head's weight.
        target: (B, T) int32 or int64: the targets.
        bias: (V,) bf16, fp16, fp32 or fp64: the head's bias. None: the head has none.
        ignore_index: the target of positions that are not scored.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names it.
        ValueError: an argument has a wrong shape or device; the message names it.
    """
    checks.head(_input, weight, bias, name="_input")
    if _input.dim() != 3:
        raise ValueError(f"_input: expected (B, T, H), got shape {tuple(_input.shape)}")
    check_target("target", target, _input)
    checks.integer("ignore_index", ignore_index)


def check_target(name: str, target: Tensor, _input: Tensor) -> None:
    """Checks targets.

    Args:
        name: the name of the argument, for messages.
        target: (B, T) int32 or int64: the targets.
        _input: (B, T, H) bf16, fp16, fp32 or fp64: the hidden states, which are checked already.

    Raises:
        TypeError: the targets have a wrong type or dtype.
        ValueError: the targets have a wrong shape or device.
    """
    checks.tensor(name, target, checks.INTEGERS, like=_input)
    checks.shape(name, target, tuple(_input.shape[:2]), "_input without its last dimension")


def check_reference(
    ref_input: Tensor | None,  # (B, T, H')
    ref_weight: Tensor | None,  # (V, H')
    ref_bias: Tensor | None,  # (V,)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (B, T)
) -> None:
    """Checks that there are the reference's hidden states and head, and what they are.

    Args:
        ref_input: (B, T, H') bf16, fp16, fp32 or fp64: the reference's hidden states. None is an error.
        ref_weight: (V, H') bf16, fp16, fp32 or fp64: the reference's head. None is an error.
        ref_bias: (V,) bf16, fp16, fp32 or fp64: the bias of the reference's head. None: the head has none.
        weight: (V, H) bf16, fp16, fp32 or fp64: the policy's head, which is checked already.
        target: (B, T) int32 or int64: the targets, which are checked already.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names it.
        ValueError: an argument is missing or has a wrong shape or device; the message names it.
    """
    for name, tensor in (("ref_input", ref_input), ("ref_weight", ref_weight)):
        if tensor is None:
            raise ValueError(f"{name}: needed with use_ref_model=True, got None")
    checks.reference_head(ref_input, ref_weight, ref_bias, "ref_input", weight)
    checks.shape("ref_input", ref_input, (*target.shape, ref_input.shape[-1]), "as _input")


@torch.no_grad()
def logits_sums(
    hidden: Tensor,  # (B, T, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    counted: Tensor | None = None,  # (B, T) bool
) -> Tensor:  # (B,)
    """The sums of the logits `h·W_v + b_v` over each sequence's tokens and over the vocabulary. They are computed without
    logits, as `(Σ_t h_t)·(Σ_v W_v) + T·Σ_v b_v`: one pass over the hidden states and one over the head.

    Args:
        hidden: (B, T, H) bf16, fp16, fp32 or fp64: hidden states.
        weight: (V, H) bf16, fp16, fp32 or fp64: the head's weight.
        bias: (V,) bf16, fp16, fp32 or fp64: the head's bias. None: the head has none.
        counted: (B, T) bool: which tokens are summed. None: every token.

    Returns:
        The sums (B,) in fp64.
    """
    tokens = hidden.new_full(hidden.shape[:1], hidden.shape[1], dtype=torch.float64)
    if counted is not None:
        hidden, tokens = hidden.masked_fill(~counted.unsqueeze(-1), 0.0), counted.sum(-1).double()
    of_hidden = hidden.sum(1, dtype=reference.compute_dtype(hidden.dtype)).double()
    of_weight = weight.sum(0, dtype=reference.compute_dtype(weight.dtype)).double()
    sums = (of_hidden * of_weight).sum(-1)
    if bias is None:
        return sums
    return sums + torch.where(tokens == 0, 0.0, tokens * bias.sum(dtype=torch.float64))  # a bias may be -inf
