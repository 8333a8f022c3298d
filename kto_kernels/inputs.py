"""The tensors of a call, made local to this rank and checked, once.

A loss compares two models, the policy and the reference, on two sets of completions: judged completions, and mismatched
completions for the KL estimate. A side is one model on one set of completions. Logits give a side's sequence
log-probabilities, or hidden states and a head do, or the caller does. The losses differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import checks
from .backends import select
from .linear.head import Adapter, gemm_dtype
from .linear.plan import LinearPlan
from .options import Chunking, Objective, Scoring
from .parallel import dtensor
from .parallel.agreement import Ranks
from .records import Completions

Kind: TypeAlias = Literal["logits", "hidden", "logps"]
Name: TypeAlias = Literal["", "ref_", "kl_", "ref_kl_"]


# Arguments with a number for each label.
_BY_TOKEN = ("token_weights", "kl_token_weights", "ref_token_logps", "ref_kl_token_logps")


@dataclass(frozen=True)
class Side:
    """One model on one set of completions: values to score, sequence log-probabilities, or neither (no such side)."""

    values: Tensor | None  # logits (B, T, V) or (N, V), or hidden states (B, T, H) or (N, H)
    weight: Tensor | None  # (V, H), where the values are hidden states
    bias: Tensor | None  # (V,)
    completions: Completions
    logps: Tensor | None  # (B,)
    token_logps: Tensor | None = None  # like the labels
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call. The names "", "ref_", "kl_" and "ref_kl_" of the four sides are prefixes of arguments'
    names. `policy`, `ref`, `kl` and `ref_kl` hold the values of the sides; where `kind` is "logps", `policy` holds
    sequence log-probabilities (B,) instead."""

    kind: Kind
    policy: Tensor
    labels: Tensor | None = None  # (B, T) or (N,)
    cu_seqlens: Tensor | None = None  # (B + 1,)
    desirable: Tensor | None = None  # (B,) bool
    ref: Tensor | None = None
    ref_logps: Tensor | None = None  # (B,)
    kl: Tensor | None = None
    kl_logps: Tensor | None = None  # (K,)
    ref_kl: Tensor | None = None
    ref_kl_logps: Tensor | None = None  # (K,)
    kl_labels: Tensor | None = None  # (K, T') or (N',)
    kl_cu_seqlens: Tensor | None = None  # (K + 1,)
    kl_value: Tensor | float | None = None  # the KL estimate, where it is given as one number
    weight: Tensor | None = None  # (V, H)
    bias: Tensor | None = None  # (V,)
    ref_weight: Tensor | None = None  # (V, H')
    ref_bias: Tensor | None = None  # (V,)
    adapter: Adapter | None = None  # of the policy's head
    scored_lengths: Sequence[int] | Tensor | None = None  # (B,) scored positions, where the caller knows them
    kl_scored_lengths: Sequence[int] | Tensor | None = None  # (K,)
    sequence_weights: Tensor | None = None  # (B,), or (B / 2,) of pairs
    token_weights: Tensor | None = None  # like the labels
    kl_token_weights: Tensor | None = None  # like the labels of mismatched completions
    ref_token_logps: Tensor | None = None  # like the labels
    ref_kl_token_logps: Tensor | None = None  # like the labels of mismatched completions
    paired: bool = False  # whether the sequences are pairs

    # Questions of the engine ──────────────────────────────────────────────────────────────────────────────────────────

    def side(self, name: Name) -> Side:
        head, ref_head = (self.weight, self.bias), (self.ref_weight, self.ref_bias)
        if name == "ref_":
            return Side(self.ref, *ref_head, self.judged, self.ref_logps, self.ref_token_logps)
        if name == "kl_":
            return Side(self.kl, *head, self.mismatched, self.kl_logps, adapter=self.adapter)
        if name == "ref_kl_":
            return Side(self.ref_kl, *ref_head, self.mismatched, self.ref_kl_logps, self.ref_kl_token_logps)
        given = self.kind == "logps"
        logps = self.policy if given else None
        return Side(None if given else self.policy, *head, self.judged, logps, adapter=self.adapter)

    @property
    def judged(self) -> Completions:
        return Completions(self.labels, self.cu_seqlens, "", self.scored_lengths, self.token_weights)

    @property
    def mismatched(self) -> Completions:
        return Completions(self.kl_labels, self.kl_cu_seqlens, "kl_", self.kl_scored_lengths, self.kl_token_weights)

    @property
    def columns(self) -> int:
        """The number of columns of the vocabulary on this rank."""
        return self.policy.shape[-1] if self.weight is None else self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which every side is scored."""
        return gemm_dtype(self.policy) if self.kind == "hidden" else self.policy.dtype

    @property
    def trains(self) -> dict[str, bool]:
        """Which of the policy's tensors get a gradient, in a call from hidden states."""
        tensors = {"hidden": self.policy, "weight": self.weight, "bias": self.bias}
        if self.adapter is not None:
            tensors |= {"adapter_a": self.adapter.a, "adapter_b": self.adapter.b}
        grad = torch.is_grad_enabled()
        return {name: grad and tensor is not None and tensor.requires_grad for name, tensor in tensors.items()}

    @property
    def by_name(self) -> dict[str, Tensor | None]:
        """The values of the sides by their arguments' names."""
        values = {"": self.policy, "ref_": self.ref, "kl_": self.kl, "ref_kl_": self.ref_kl}
        return {name + self.kind: value for name, value in values.items()}

    @property
    def heads(self) -> dict[str, Tensor | None]:
        return {"weight": self.weight, "bias": self.bias, "ref_weight": self.ref_weight, "ref_bias": self.ref_bias}

    # Checks ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def checked(
        self,
        ranks: Ranks,
        scoring: Scoring,
        chunking: Chunking | None = None,
        objective: Objective | None = None,
        vocab: int | None = None,
        packed: bool = True,
    ) -> Inputs:
        """These inputs as plain tensors of this rank, after all checks.

        Args:
            ranks: the groups of the call.
            scoring: how rows are scored.
            chunking: how hidden states are cut into chunks; None: nothing is cut.
            objective: how the loss is made; None: only the policy is scored.
            vocab: the size of the whole vocabulary, to check; None: no check.
            packed: whether two-dimensional values are packed sequences, which need offsets, or else one sequence.

        Raises:
            TypeError, ValueError, NotImplementedError: an argument is not as the losses document it; the message names
                the argument.
            RuntimeError: in a call with groups, the backend is not available.
        """
        inputs = self.local(ranks.vocab)
        sharded = ranks.vocab is not None
        count = inputs._check_policy(sharded, vocab, packed)
        if objective is not None:
            checks.desirable(inputs.desirable, count, inputs.policy)
            inputs._check_reference(count, sharded)
            inputs._check_kl(objective, sharded)
            inputs._check_tokens()
            inputs._check_weights(count)
        checks.unshifted(scoring.shift, ranks.context)
        if self.kind != "logps":  # whose loss is plain PyTorch
            given = {"ref_logps": inputs.ref_logps, "kl_logps": inputs.kl_logps, "ref_kl_logps": inputs.ref_kl_logps}
            for name, value in (given | {"kl": inputs.kl_value}).items():
                if isinstance(value, Tensor):
                    checks.reverse_mode(name, value)
        inputs = inputs._with_checked_lengths(scoring.shift)
        if ranks and self.kind != "logps":
            inputs._refuse_now(scoring, chunking)
        return inputs

    def local(self, vocab_group: ProcessGroup | None) -> Inputs:
        """These inputs with this rank's part in place of each DTensor, and whole heads in place of sharded ones."""
        like_labels = ("labels", "kl_labels", *_BY_TOKEN)
        rows, heads = self.by_name | {name: getattr(self, name) for name in like_labels}, self.heads
        adapter = self.adapter
        if adapter is not None:  # A has no columns, and is whole on every rank
            (a,) = dtensor.heads(None, **{"adapter: A": adapter.a})
            (b,) = dtensor.heads(vocab_group, **{"adapter: B": adapter.b})
            adapter = replace(adapter, a=a, b=b)
        if not any(dtensor.is_elsewhere(x) for x in (*rows.values(), *heads.values()) if x is not None):
            return self if adapter is None else replace(self, adapter=adapter)
        names = {"": "policy", "ref_": "ref", "kl_": "kl", "ref_kl_": "ref_kl"}
        fields = {prefix + self.kind: field for prefix, field in names.items()}
        rows = dict(zip(rows, dtensor.rows(vocab_group, **rows)))
        heads = dict(zip(heads, dtensor.heads(vocab_group, **heads)))
        return replace(
            self, **{fields.get(name, name): tensor for name, tensor in rows.items()}, **heads, adapter=adapter
        )

    def _check_policy(self, sharded: bool, vocab: int | None, packed: bool) -> int:
        """Checks the policy's side, and returns the number of sequences."""
        if self.kind == "logps":
            checks.tensor("logps", self.policy, checks.FLOATS)
            if self.policy.dim() != 1:
                raise ValueError(f"logps: expected shape (B,), got {tuple(self.policy.shape)}")
            return self.policy.shape[0]
        if self.kind == "logits":
            count = checks.rows(self.policy, self.labels, self.cu_seqlens, packed=packed, sharded=sharded)
        else:
            checks.head(self.policy, self.weight, self.bias, sharded=sharded)
            if self.adapter is not None:
                checks.adapter_tensors(self.adapter.a, self.adapter.b, self.weight)
            count = checks.hidden_rows(self.policy, self.labels, self.cu_seqlens, packed=packed)
        checks.vocabulary_size(vocab, self.columns, sharded)
        return count

    def _check_reference(self, count: int, sharded: bool) -> None:
        name = f"ref_{self.kind}"
        given = {name: self.ref, "ref_logps": self.ref_logps, "ref_token_logps": self.ref_token_logps}
        given = [argument for argument, value in given.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{', '.join(given)}: expected one of them or neither (reference-free), got both")
        if self.ref_logps is not None:
            checks.sequences("ref_logps", self.ref_logps, count, "one per sequence", self.policy)
        if (self.ref is None and self.ref_kl is None) != (self.ref_weight is None) and self.kind == "hidden":
            raise ValueError(
                "ref_weight: goes with ref_hidden or ref_kl_hidden, and they with it; where the reference shares the "
                "policy's head, pass ref_weight=weight"
            )
        if self.ref_weight is None and self.ref_bias is not None:
            raise ValueError("ref_bias: goes with ref_weight, got none")
        if self.ref is None:
            return
        if self.kind == "logits":
            checks.vocabulary(name, self.ref, self.policy, sharded)
            checks.shape(name, self.ref, tuple(self.policy.shape), "as logits")
        else:
            checks.reference_head(self.ref, self.ref_weight, self.ref_bias, name, self.weight, sharded)
            shape = (*self.labels.shape, self.ref_weight.shape[1])
            checks.shape(name, self.ref, shape, "the labels', and ref_weight's width")

    def _check_kl(self, objective: Objective, sharded: bool) -> None:
        count = None
        rows = (self.kl_labels, self.kl_cu_seqlens)
        if self.kl is None and self.ref_kl is None and (self.kl_labels is not None or self.kl_cu_seqlens is not None):
            raise ValueError(f"kl_labels, kl_cu_seqlens: go with kl_{self.kind} or ref_kl_{self.kind}, got neither")
        if self.ref_kl_token_logps is not None:
            for argument, value in ((f"ref_kl_{self.kind}", self.ref_kl), ("ref_kl_logps", self.ref_kl_logps)):
                if value is not None:
                    raise ValueError(f"{argument}, ref_kl_token_logps: expected one of them, got both")
        for side, values, logps in (("kl", self.kl, self.kl_logps), ("ref_kl", self.ref_kl, self.ref_kl_logps)):
            if values is None:
                continue
            name = f"{side}_{self.kind}"
            if logps is not None:
                raise ValueError(f"{name}, {side}_logps: expected one of them, got both")
            if self.kl_labels is None:
                raise ValueError(f"kl_labels: needed with {name}")
            if self.kind == "logits":
                count = checks.rows(values, *rows, "kl_", name, like=self.policy, sharded=sharded)
                continue
            if side == "kl":
                checks.head(values, self.weight, self.bias, name=name, sharded=sharded)
            else:
                checks.reference_head(values, self.ref_weight, self.ref_bias, name, self.weight, sharded)
            count = checks.hidden_rows(values, *rows, "kl_", name)
        checks.kl_pair(self.kl_logps, self.ref_kl_logps, count, self.policy)
        checks.kl_source(
            objective.loss_type,
            self.kl_value,
            self.policy,
            () if self.kind == "logps" else (self.kind,),
            has_reference=any(x is not None for x in (self.ref, self.ref_logps, self.ref_token_logps)),
            has_kl=self.kl is not None or self.kl_logps is not None,
            has_ref_kl=any(x is not None for x in (self.ref_kl, self.ref_kl_logps, self.ref_kl_token_logps)),
        )

    def _check_tokens(self) -> None:
        for name in _BY_TOKEN:
            value, labels = getattr(self, name), self.kl_labels if "kl_" in name else self.labels
            if value is None:
                continue
            if labels is None:
                raise ValueError(f"{name}: goes with kl_labels, got none")
            checks.tensor(name, value, checks.FLOATS, self.policy)
            checks.shape(name, value, tuple(labels.shape), "as kl_labels" if "kl_" in name else "as labels")
            if "weights" in name:
                checks.weight_values(name, value)

    def _check_weights(self, count: int) -> None:
        if self.sequence_weights is not None:
            meaning, number = ("one per pair", count // 2) if self.paired else ("one per sequence", count)
            checks.sequences("sequence_weights", self.sequence_weights, number, meaning, self.policy)
            checks.weight_values("sequence_weights", self.sequence_weights)

    def _with_checked_lengths(self, shift: bool) -> Inputs:
        """These inputs with the given numbers of scored positions as tensors on the CPU."""
        if self.scored_lengths is None and self.kl_scored_lengths is None:
            return self
        if self.kl_labels is None and self.kl_scored_lengths is not None:
            raise ValueError("kl_scored_lengths: goes with kl_labels, got none")

        def checked(of: Completions) -> Tensor | None:
            return checks.scored_lengths(
                f"{of.prefix}scored_lengths", of.scored_lengths, of.n_sequences, of.labels, shift
            )

        of_kl = None if self.kl_labels is None else checked(self.mismatched)
        return replace(self, scored_lengths=checked(self.judged), kl_scored_lengths=of_kl)

    def _refuse_now(self, scoring: Scoring, chunking: Chunking | None) -> None:
        """Raises now the errors that operators would raise later, when other ranks wait for this one already."""
        device, dtype = self.policy.device, self.dtype
        select(scoring.backend, device, dtype, "logits" if self.kind == "logits" else "hidden, weight")
        if self.weight is not None:
            columns, width = self.weight.shape
            limit = None if chunking is None else chunking.max_logits_bytes
            LinearPlan.of((), max(1, columns), width, dtype, max_logits_bytes=limit, device=device)
