"""The options of a call, as small frozen records that check their fields when they are made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union, get_args

from torch import Tensor

from . import checks, reference, scalars

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup

Group: TypeAlias = Union["ProcessGroup", "DeviceMesh"]

LossType = Literal["kto", "apo_zero_unpaired"]
Reduction = Literal["mean", "sum", "none"]
LongSequences = Literal["auto", "defer", "recompute"]
Output = Literal["entropy", "mean_logits", "is_top1"]
Pairs = Literal["halves", "interleaved"]
BackendName = Literal["auto", "triton", "cuda", "cpu", "torch"]

OUTPUTS: tuple[Output, ...] = get_args(Output)


def _keep(record: object, **values: Any) -> None:
    """Sets fields of a frozen record to what their checks returned: Python's numbers, where NumPy's were given."""
    for name, value in values.items():
        object.__setattr__(record, name, value)


@dataclass(frozen=True)
class Scale:
    """How a logit x is scaled to the z that the softmax is taken of.

    `z = softcap·tanh(x·logit_scale/softcap)/temperature`, without a softcap `z = x·logit_scale/temperature`.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _keep(
            self,
            logit_scale=checks.number("logit_scale", self.logit_scale, positive=True),
            softcap=None if self.softcap is None else checks.number("softcap", self.softcap, positive=True),
            temperature=checks.number("temperature", self.temperature, positive=True),
        )

    @property
    def outer(self) -> float:
        """`z = outer · u`, where the score u is the logit, or `tanh(logit · logit_scale / softcap)`."""
        return reference.outer(**vars(self))


@dataclass(frozen=True)
class Scoring:
    """How token log-probabilities are computed from logits and labels, and by which backend."""

    scale: Scale
    shift: bool = False
    ignore_index: int = -100
    backend: BackendName = "auto"

    def __post_init__(self) -> None:
        shift, ignore_index = checks.flag("shift", self.shift), checks.integer("ignore_index", self.ignore_index)
        _keep(self, shift=shift, ignore_index=ignore_index)
        checks.choice("backend", self.backend, get_args(BackendName))


@dataclass(frozen=True)
class Objective:
    """How the loss is computed from sequence log-probabilities."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    average_log_prob: bool = False
    reduction: Reduction = "mean"
    loss_type: LossType = "kto"

    def __post_init__(self) -> None:
        checks.choice("loss_type", self.loss_type, get_args(LossType))
        checks.choice("reduction", self.reduction, get_args(Reduction))
        _keep(
            self,
            beta=checks.number("beta", self.beta, positive=True),
            desirable_weight=checks.number("desirable_weight", self.desirable_weight, positive=False),
            undesirable_weight=checks.number("undesirable_weight", self.undesirable_weight, positive=False),
            average_log_prob=checks.flag("average_log_prob", self.average_log_prob),
        )

    @property
    def weights(self) -> tuple[float | Tensor, float | Tensor]:
        """λ_D and λ_U, as arithmetic on tensors takes them (see `kto_kernels.scalars.data`)."""
        return scalars.data(self.desirable_weight), scalars.data(self.undesirable_weight)


@dataclass(frozen=True)
class Chunking:
    """How the rows of hidden states are cut into chunks, and which outputs are computed besides log-probabilities."""

    max_logits_bytes: int | None = None
    long_sequences: LongSequences = "auto"
    outputs: tuple[Output, ...] = ()

    def __post_init__(self) -> None:
        if self.max_logits_bytes is not None:
            _keep(self, max_logits_bytes=checks.integer("max_logits_bytes", self.max_logits_bytes))
            if self.max_logits_bytes <= 0:
                raise ValueError(
                    f"max_logits_bytes: expected a number of bytes > 0 or None, got {self.max_logits_bytes}"
                )
        checks.choice("long_sequences", self.long_sequences, get_args(LongSequences))
        _keep(self, outputs=checks.outputs(self.outputs, OUTPUTS))


def check(*, vocab: object, inplace_backward: object = False, **options: Any) -> None:
    """Checks the options of a loss, by making their records. Groups and, against the tensors, `vocab` are checked when
    the loss is called."""

    def made(record: type, **more: Any) -> Any:
        return record(**{field.name: options[field.name] for field in fields(record) if field.name in options}, **more)

    made(Scoring, scale=made(Scale))
    made(Objective)
    made(Chunking)
    checks.vocabulary_size(vocab, 0, sharded=True)
    checks.flag("inplace_backward", inplace_backward)
