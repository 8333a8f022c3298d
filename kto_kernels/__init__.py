"""kto_kernels: fused KTO (Kahneman-Tversky Optimization) losses for PyTorch. Start reading at `kto_kernels.loss`."""

from . import (
    _requirements,  # noqa: F401  (first: it stops an older PyTorch with a plain word)
    objectives,
)
from ._version import __version__
from .backends import available_backends
from .linear.plan import LinearPlan
from .loss import kto_loss, linear_kto_loss
from .modules import KTOLoss, LinearKTOLoss, LinearPreferenceLoss, PreferenceLoss
from .output import KTOOutput
from .preference import linear_preference_loss, preference_loss
from .stages import kl_reference_point, kto_loss_from_logps, linear_token_logps, sequence_logps, token_logps

__all__ = [
    "KTOLoss",
    "KTOOutput",
    "LinearKTOLoss",
    "LinearPlan",
    "LinearPreferenceLoss",
    "PreferenceLoss",
    "__version__",
    "available_backends",
    "kl_reference_point",
    "kto_loss",
    "kto_loss_from_logps",
    "linear_kto_loss",
    "linear_preference_loss",
    "linear_token_logps",
    "objectives",
    "preference_loss",
    "sequence_logps",
    "token_logps",
]
