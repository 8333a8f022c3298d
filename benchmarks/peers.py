"""The loss from logits, each way behind one signature: `loss_of(batch, logits) → 0-d loss`, differentiable.

Around the token log-probabilities everything is the same for all: sequence sums, the KTO formula, the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kto_kernels import kto_loss

from .objective import BETA, KL, kto_from_token_logps
from .selection import Peer, Setting


@dataclass
class Batch:
    logits: Tensor  # (4, N / 4, V)
    labels: Tensor  # (4, N / 4)
    desirable: Tensor  # (4,)
    ref_logps: Tensor  # (4,)


LossOf = Callable[[Batch, Tensor], Tensor]
NAIVE = "naive PyTorch"


def naive_token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _from_token_logps(token_logps_of: Callable[[Tensor, Tensor], Tensor | tuple]) -> LossOf:
    def loss_of(batch: Batch, logits: Tensor) -> Tensor:
        logps = token_logps_of(logits, batch.labels)
        return kto_from_token_logps(logps[0] if isinstance(logps, tuple) else logps, batch.ref_logps, batch.desirable)

    return loss_of


naive = _from_token_logps(naive_token_logps)


def ours(backend: str, inplace: bool = False) -> LossOf:
    def loss_of(batch: Batch, logits: Tensor) -> Tensor:
        return kto_loss(
            logits,
            batch.labels,
            batch.desirable,
            ref_logps=batch.ref_logps,
            kl=KL,
            beta=BETA,
            inplace_backward=inplace,
            backend=backend,
        ).loss

    return loss_of


def _compiled(setting: Setting) -> LossOf:
    torch._dynamo.reset()  # after eight shapes it would stop compiling, silently
    return torch.compile(naive)


def _trl(_: Setting) -> LossOf:
    from trl.trainer.utils import selective_log_softmax  # on a GPU its own kernel

    return _from_token_logps(selective_log_softmax)


def _quack(setting: Setting) -> LossOf:
    setting.need_gpu((9, 0), (10, 0))
    from quack.cross_entropy import cross_entropy

    def token_logps_of(logits: Tensor, labels: Tensor) -> Tensor:
        flat = (logits.flatten(0, 1), labels.flatten())
        return -cross_entropy(*flat, reduction="none", inplace_backward=True).view_as(labels)

    return _from_token_logps(token_logps_of)


PEERS = {
    "naive": Peer(NAIVE, lambda _: naive),
    "compile": Peer("torch.compile of naive", _compiled),
    "trl": Peer("TRL selective_log_softmax", _trl),
    "quack": Peer("quack cross_entropy", _quack, inplace=True),
}
