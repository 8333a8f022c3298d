"""kto_kernels: fused KTO (Kahneman-Tversky Optimization) losses for PyTorch. Start reading at `kto_kernels.loss`."""

from ._version import __version__
from .backends import available_backends
from .loss import (
    KTOOutput,
    kl_reference_point,
    kto_loss,
    kto_loss_from_logps,
    sequence_logps,
    token_logps,
)
from .modules import KTOLoss

__all__ = [
    "KTOLoss",
    "KTOOutput",
    "__version__",
    "available_backends",
    "kl_reference_point",
    "kto_loss",
    "kto_loss_from_logps",
    "sequence_logps",
    "token_logps",
]
