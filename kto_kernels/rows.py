"""What an operator is told, as small frozen records: the rows to score, how to scale them, and the loss's options."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import reference

# A label that scores its row, but whose column of the logits is on another rank: `kElsewhere` of csrc/rows.h.
ELSEWHERE = -(2**62)


@dataclass(frozen=True)
class Rows:
    """One set of logits and the labels that score it.

    Padded: logits (B, T, V), labels (B, T). Packed: logits (N, V), labels (N,), cu_seqlens (B + 1,); without
    cu_seqlens the N rows are one sequence.

    A shard has some columns of the vocabulary; labels may be ELSEWHERE, where the logit counts as −inf. Its statistics
    are for `Columns` to put together, and those that its backward gets are of all columns.
    """

    logits: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    shift: bool
    ignore_index: int
    shard: bool = False

    @classmethod
    def of(
        cls,
        logits: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        shift: bool,
        ignore_index: int,
        offset: int = 0,
        vocab: int | None = None,
    ) -> Rows:
        """With `vocab`, a shard: its first column is number `offset` of that many."""
        if vocab is None:
            return cls(logits, labels, cu_seqlens, shift, ignore_index)
        labels = labels.long()
        silent = (labels == ignore_index) | (labels < 0) | (labels >= vocab)
        local = local_labels(labels, offset, logits.shape[-1]).masked_fill(silent, -1)
        return cls(logits, local, cu_seqlens, shift, ignore_index=-1, shard=True)

    @property
    def vocab(self) -> int:
        return self.logits.shape[-1]

    @property
    def n_rows(self) -> int:
        return self.labels.numel()

    @property
    def n_sequences(self) -> int:
        if self.cu_seqlens is not None:
            return self.cu_seqlens.shape[0] - 1
        return self.labels.shape[0] if self.labels.dim() == 2 else 1

    @property
    def tokens(self) -> int:
        """Rows per sequence of the padded layout; 0 for the packed one."""
        return 0 if self.cu_seqlens is not None else self.labels.shape[-1]

    @property
    def logits_strides(self) -> tuple[int, int]:
        """(batch, token) strides in elements; the batch stride is 0 for two-dimensional logits."""
        return strides(self.logits.unsqueeze(0) if self.logits.dim() == 2 else self.logits)

    @property
    def labels_strides(self) -> tuple[int, int]:
        return strides(self.labels.unsqueeze(0) if self.labels.dim() == 1 else self.labels)


def local_labels(labels: Tensor, offset: int, columns: int) -> Tensor:
    """int64 labels by their number among the columns from `offset` on; ELSEWHERE where they are not among them."""
    local = labels - offset
    return local.masked_fill((local < 0) | (local >= columns), ELSEWHERE)


def strides(tensor: Tensor) -> tuple[int, int]:
    """The first two strides of a (B, T, ...) tensor, in elements."""
    return tensor.stride(0), tensor.stride(1)


@dataclass(frozen=True)
class Scale:
    """`z = softcap(x · logit_scale) / temperature`."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def outer(self) -> float:
        """`z = outer · u`, where u is the logit, or tanh(logit · logit_scale / softcap)."""
        return reference.outer(**vars(self))


@dataclass(frozen=True)
class LossOptions:
    """Run-time scalars of the stages after the seam."""

    beta: float
    desirable_weight: float
    undesirable_weight: float
    average_log_prob: bool
    reduction: str

    @property
    def weights(self) -> tuple[float, float]:
        return self.desirable_weight, self.undesirable_weight


@dataclass(frozen=True)
class Sequences:
    """Where the sequence log-probabilities of one side come from: rows to score, values already summed, or neither
    (reference-free: 0)."""

    rows: Rows | None = None
    logps: Tensor | None = None

    def __bool__(self) -> bool:
        return self.rows is not None or self.logps is not None


@dataclass(frozen=True)
class StageResult:
    """The stages after the seam, for B sequences; fp32, or fp64 for fp64 logits."""

    loss: Tensor  # () or (B,)
    rewards: Tensor  # (B,) β·r
    kl: Tensor  # () z0
    coefficients: Tensor  # (B,) ∂loss/∂(token log-probability)


@dataclass(frozen=True)
class ForwardResult(StageResult):
    """All five stages."""

    logps: Tensor  # (B,) fp64
    ref_logps: Tensor  # (B,) fp64
    token_logps: Tensor  # labels-shaped
    statistics: Tensor  # (2, *labels.shape), what the same backend's backward needs of each row's softmax


# What `outputs=` may ask for beside the log-probability, per scored token.
OUTPUTS = ("entropy", "mean_logits", "is_top1")


@dataclass(frozen=True)
class ChunkScores:
    """What one pass over a chunk of logits tells of each of its rows; fp32, or fp64 for fp64 logits."""

    logps: Tensor  # (C,)
    entropy: Tensor | None = None  # (C,) −Σ_v p_v log p_v in nats
    mean_logits: Tensor | None = None  # (C,) mean over the vocabulary of z
    is_top1: Tensor | None = None  # (C,) bool, whether the label is the (first) argmax
