"""Small frozen records that backends take and return: the rows to score, sides, and the results of kernels."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .options import Objective


class Named:
    """A dataclass that is known only at the call, such as a loss of the user's own: it travels in an operator as the
    name of its class and the values of its fields, which are numbers, flags, strings, None, tuples or `Named` again."""

    classes: ClassVar[dict[str, type[Named]]] = {}
    class_name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.class_name = f"{cls.__module__}.{cls.__qualname__}"
        Named.classes[cls.class_name] = cls


# The label of a scored row whose labelled column is on another rank: `kElsewhere` of csrc/rows.h.
ELSEWHERE = -(2**62)


@dataclass(frozen=True)
class Rows:
    """One set of logits and the labels that score it.

    Padded rows have logits (B, T, V) and labels (B, T). Packed rows have logits (N, V), labels (N,) and cu_seqlens
    (B + 1,); without cu_seqlens the N rows are one sequence.

    With `shard` the logits are the columns that this rank has of the vocabulary, and a label may be ELSEWHERE, which
    counts as a logit of −inf. `kto_kernels.parallel.vocabulary` merges the statistics of all shards, and the backward
    of a shard takes the merged statistics.
    """

    logits: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    shift: bool
    ignore_index: int
    shard: bool = False

    def of_shard(self, offset: int, vocab: int) -> Rows:
        """These rows as the shard of a vocabulary of `vocab` columns that begins with column `offset`."""
        labels = self.labels.long()
        silent = (labels == self.ignore_index) | (labels < 0) | (labels >= vocab)
        local = local_labels(labels, offset, self.vocab).masked_fill(silent, -1)
        return Rows(self.logits, local, self.cu_seqlens, self.shift, ignore_index=-1, shard=True)

    @property
    def vocab(self) -> int:
        return self.logits.shape[-1]

    @property
    def n_rows(self) -> int:
        return self.labels.numel()

    @property
    def n_sequences(self) -> int:
        return n_sequences(self.labels, self.cu_seqlens)

    @property
    def tokens(self) -> int:
        """Rows per sequence of the padded layout; 0 for the packed one."""
        return 0 if self.cu_seqlens is not None else self.labels.shape[-1]

    @property
    def logits_strides(self) -> tuple[int, int]:
        return strides(self.logits, 3)

    @property
    def labels_strides(self) -> tuple[int, int]:
        return strides(self.labels, 2)


def n_sequences(labels: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences (B, T) or packed (N,) labels hold; (N,) labels without offsets hold one."""
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1
    return labels.shape[0] if labels.dim() == 2 else 1


def local_labels(labels: Tensor, offset: int, columns: int) -> Tensor:
    """int64 labels, counted from column `offset` on; ELSEWHERE where a label is not among these `columns` columns."""
    local = labels - offset
    return local.masked_fill((local < 0) | (local >= columns), ELSEWHERE)


def strides(tensor: Tensor, padded: int) -> tuple[int, int]:
    """The (batch, token) strides, in elements, of a tensor with `padded` dimensions in the padded layout. The packed
    layout has one dimension fewer, and its batch stride is 0."""
    return (tensor.stride(0), tensor.stride(1)) if tensor.dim() == padded else (0, tensor.stride(0))


@dataclass(frozen=True)
class Completions:
    """The labels of some sequences, and where the sequences begin."""

    labels: Tensor  # (B, T) or (N,)
    cu_seqlens: Tensor | None  # (B + 1,)
    prefix: Literal["", "kl_"] = ""  # of the arguments' names: "kl_" for mismatched completions
    # (B,) int64 on the CPU: how many positions of each sequence are scored; None: the labels are to be counted.
    scored_lengths: Tensor | None = None
    token_weights: Tensor | None = None  # like the labels

    @property
    def n_sequences(self) -> int:
        return n_sequences(self.labels, self.cu_seqlens)


@dataclass(frozen=True)
class Side:
    """The source of one side's sequence log-probabilities: rows to score, given log-probabilities, or neither (then
    there is no reference, and they are 0)."""

    rows: Rows | None = None
    logps: Tensor | None = None

    def __bool__(self) -> bool:
        return self.rows is not None or self.logps is not None


@dataclass(frozen=True)
class Closing:
    """n sequences of a batch, all of whose rows are scored, and the buffers for what follows from it."""

    token_logps: Tensor  # (S,) of this rank's scored rows, in their order
    rows: tuple[int, int]  # the sequences have rows [begin, end)
    offsets: Tensor  # (n + 1,) int64, where each sequence begins among the S rows: inside of [0, S]
    sums: Tensor | None  # (n,) fp64, given where ranks have summed them; None: they are those of `token_logps`
    lengths: Tensor  # (n,) int64, scored rows on this rank
    counts: Tensor | None  # (n,) fp64, scored rows on all ranks; None: `lengths`
    ref_logps: Tensor | None  # (n,)
    z0: Tensor  # ()
    desirable: Tensor  # (n,) bool
    batch: int  # sequences of the whole batch, over which a mean is taken
    logps: Tensor  # (n,) fp64, written
    slopes: Tensor  # (n,) fp64 ∂loss/∂(token log-probability), written
    divisor: Tensor | None  # () fp64, raised to the power of two below the largest slope of a sequence with rows

    @property
    def tokens(self) -> Tensor:
        """The scored rows that a mean is over."""
        return self.lengths if self.counts is None else self.counts


@dataclass(frozen=True)
class ForwardResult:
    """The results of all five stages for B sequences; fp32 (fp64 for fp64 logits) where no dtype is said."""

    loss: Tensor  # () or (B,)
    rewards: Tensor  # (B,) β·r
    kl: Tensor  # () z0
    coefficients: Tensor  # (B,) ∂loss/∂(token log-probability)
    logps: Tensor  # (B,) fp64
    ref_logps: Tensor  # (B,) fp64
    token_logps: Tensor  # labels-shaped
    statistics: Tensor  # (2, *labels.shape), each row's softmax for the same backend's backward

    @classmethod
    def empty(cls, labels: Tensor, sequences: int, objective: Objective, dtype: torch.dtype) -> ForwardResult:
        """Uninitialised buffers on the device of the labels."""
        tokens, loss = tuple(labels.shape), (sequences,) if objective.reduction == "none" else ()
        shapes = (loss, (sequences,), (), (sequences,), (sequences,), (sequences,), tokens, (2, *tokens))
        names = [field.name for field in fields(cls)]
        dtypes = [torch.float64 if name in ("logps", "ref_logps") else dtype for name in names]
        return cls(*(torch.empty(shape, dtype=kind, device=labels.device) for shape, kind in zip(shapes, dtypes)))


@dataclass(frozen=True)
class ChunkScores:
    """The results of one pass over a chunk's logits, for each row; fp32 (fp64 for fp64 logits) but for `is_top1`."""

    logps: Tensor  # (C,)
    entropy: Tensor | None = None  # (C,) −Σ_v p_v log p_v in nats
    mean_logits: Tensor | None = None  # (C,) mean over the vocabulary of z
    is_top1: Tensor | None = None  # (C,) bool, whether the label is the (first) argmax

    @classmethod
    def empty(cls, labels: Tensor, outputs: tuple[str, ...]) -> ChunkScores:
        """Uninitialised buffers for scores in fp32."""
        dtypes = {name: torch.bool if name == "is_top1" else torch.float32 for name in ("logps", *outputs)}
        return cls(**{name: torch.empty(labels.shape, dtype=dtypes[name], device=labels.device) for name in dtypes})
