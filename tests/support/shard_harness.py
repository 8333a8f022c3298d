"""A whole problem, and the part of it that a rank is given: some sequences, some columns of the vocabulary, or some
tokens of every sequence. A call is a dictionary of arguments, of `kto_loss` or (with `hidden`) of `linear_kto_loss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kto_kernels import KTOOutput, kto_loss, linear_kto_loss, reference
from tests.support.harness import Problem, upstream
from tests.support.linear_harness import LinearProblem
from tests.support.rank_pool import device

Arguments = dict[str, Any]

# Tensors with a row for each token of the policy's sequences and of the mismatched ones.
ROWS = {
    "": ("logits", "hidden", "labels", "ref_logits", "ref_hidden"),
    "kl_": ("kl_logits", "kl_hidden", "kl_labels", "ref_kl_logits", "ref_kl_hidden"),
}
SEQUENCES = {"": ("desirable", "ref_logps"), "kl_": ("kl_logps", "ref_kl_logps")}
HEADS = ("weight", "bias", "ref_weight", "ref_bias")
LEAVES = ("logits", "hidden", "weight", "bias")


def arguments(problem: Problem | LinearProblem) -> Arguments:
    first = {"logits": problem.logits} if isinstance(problem, Problem) else {}
    if isinstance(problem, LinearProblem):
        first = {"hidden": problem.hidden, "weight": problem.weight}
    return first | {"labels": problem.labels, "desirable": problem.desirable} | problem.tensors | problem.options


def _offsets(given: Arguments, prefix: str) -> Tensor | None:
    return given.get(f"{prefix}cu_seqlens")


def some_sequences(given: Arguments, sequences: slice, mismatched: slice) -> Arguments:
    """A data-parallel rank's part."""
    part = dict(given)
    for prefix, kept in (("", sequences), ("kl_", mismatched)):
        offsets = _offsets(given, prefix)
        rows = kept
        if offsets is not None:
            first, last, _ = kept.indices(len(offsets) - 1)
            rows = slice(int(offsets[first]), int(offsets[max(first, last)]))
            part[f"{prefix}cu_seqlens"] = offsets[first : max(first, last) + 1] - offsets[first]
        for names, where in ((ROWS[prefix], rows), (SEQUENCES[prefix], kept)):
            part |= {name: given[name][where] for name in names if name in given}
    return part


def some_columns(given: Arguments, columns: slice) -> Arguments:
    """A vocabulary-parallel rank's part."""
    part = dict(given)
    for name, value in given.items():
        if name.endswith("logits"):
            part[name] = value[..., columns]
        elif name in HEADS:
            part[name] = value[columns]
    return part


Mine = Callable[[int], Tensor]  # of how many tokens → (tokens,) bool, which of them are this rank's


def some_tokens(given: Arguments, mine: Mine) -> Arguments:
    """A context-parallel rank's part: of the padded layout these of every sequence's tokens, of the packed one these of
    all tokens, wherever sequences end."""
    part = dict(given)
    for prefix in ROWS:
        names = [name for name in ROWS[prefix] if name in given]
        if not names:
            continue
        offsets = _offsets(given, prefix)
        rows = mine(given[names[0]].shape[1 if offsets is None else 0])
        for name in names:
            part[name] = given[name][:, rows] if offsets is None else given[name][rows]
        if offsets is not None:
            before = torch.cat([torch.zeros(1, dtype=torch.int64), rows.cumsum(0)])  # of this rank's, in front of each
            part[f"{prefix}cu_seqlens"] = before[offsets.long()].to(offsets.dtype)
    return part


def known_lengths(given: Arguments) -> Arguments:
    """The numbers of scored positions of this rank, as a collator knows them."""
    found = {}
    for prefix in ("", "kl_"):
        if (labels := given.get(f"{prefix}labels")) is not None and "hidden" in given:
            offsets, ignored = _offsets(given, prefix), given.get("ignore_index", -100)
            scored = reference.targets(labels, given.get("shift", False), ignored, offsets) != ignored
            found[f"{prefix}scored_lengths"] = reference.per_sequence(scored, offsets).long().tolist()
    return found


def run(given: Arguments, trained: tuple[str, ...] = LEAVES, **options: Any) -> tuple[KTOOutput, dict[str, Tensor]]:
    """The loss and the gradients of the leaves among `trained`, on the rank's device. Logits are no leaf, so that they
    may be overwritten."""
    call = {name: value.to(device()) if isinstance(value, Tensor) else value for name, value in given.items()}
    leaves = {name: call.pop(name).detach().clone().requires_grad_(name in trained) for name in LEAVES if name in given}
    labels, desirable = call.pop("labels"), call.pop("desirable")
    if "logits" in leaves:
        out = kto_loss(leaves["logits"] * 1, labels, desirable, **call, **options)
    else:
        first = leaves["hidden"], leaves["weight"], labels, desirable
        out = linear_kto_loss(*first, bias=leaves.get("bias"), **call, **options)
    wanted = [name for name in leaves if name in trained]
    found = torch.autograd.grad(upstream(out.loss), [leaves[name] for name in wanted]) if wanted else ()
    return out, dict(zip(wanted, found))


def assert_near(name: str, mine: Tensor, whole: Tensor, ulps: float = 64, largest: float = 0.0) -> None:
    """Equal but for rounding: `ulps` units in the last place of the largest value, or of the `largest` that went into
    it; never finer than fp32's."""
    unit = torch.finfo(mine.dtype if mine.dtype.itemsize < 8 else torch.float32).eps
    scale = max(largest, whole.abs().max().item() if whole.numel() else 0.0)
    assert mine.shape == whole.shape, f"{name}: {tuple(mine.shape)} instead of {tuple(whole.shape)}"
    worst = (mine.double() - whole.double()).abs().max().item() if whole.numel() else 0.0
    assert worst <= ulps * unit * scale, f"{name}: off by {worst:.3e}, {worst / (unit * scale or 1):.1f} units"


def assert_same_sequences(
    mine: KTOOutput, whole: KTOOutput, sequences: slice = slice(None), beta: float = 0.1, ulps: float = 64
) -> None:
    """Rewards and kl are differences of log-probabilities: those are what was rounded."""
    largest = max(
        (values.abs().max().item() for values in (whole.logps, whole.ref_logps) if values.numel()), default=0.0
    )
    for name, scale in (("logps", 0.0), ("ref_logps", 0.0), ("rewards", beta * largest)):
        assert_near(name, getattr(mine, name), getattr(whole, name)[sequences], ulps, scale)
    assert_near("kl", mine.kl, whole.kl, ulps, largest)
