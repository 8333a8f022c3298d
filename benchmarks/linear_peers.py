"""The loss from hidden states, each way behind one signature: `loss_of(batch) → 0-d loss`, differentiable.

Where a peer stops at token log-probabilities, the reference's are computed by its own means without gradient, and the
KTO formula on top is the one of `peers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kto_kernels import linear_kto_loss

from .peers import BETA, KL, NAIVE, kto_from_token_logps, naive_token_logps, present


@dataclass
class LinearBatch:
    hidden: Tensor  # (4, N / 4, H)
    weight: Tensor  # (V, H), requires a gradient unless the head is frozen
    ref_hidden: Tensor  # (4, N / 4, H)
    ref_weight: Tensor  # (V, H)
    labels: Tensor  # (4, N / 4)
    desirable: Tensor  # (4,)


LossOf = Callable[[LinearBatch], Tensor]
TokenLogpsOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, labels → (4, N / 4)


def ours(backend: str) -> LossOf:
    def loss_of(batch: LinearBatch) -> Tensor:
        return linear_kto_loss(
            batch.hidden,
            batch.weight,
            batch.labels,
            batch.desirable,
            ref_hidden=batch.ref_hidden,
            ref_weight=batch.ref_weight,
            kl=KL,
            beta=BETA,
            backend=backend,
        ).loss

    return loss_of


def _from_token_logps(token_logps_of: TokenLogpsOf) -> LossOf:
    def loss_of(batch: LinearBatch) -> Tensor:
        with torch.no_grad():
            ref_logps = token_logps_of(batch.ref_hidden, batch.ref_weight, batch.labels).float().sum(-1)
        token_logps = token_logps_of(batch.hidden, batch.weight, batch.labels)
        return kto_from_token_logps(token_logps, ref_logps, batch.desirable)

    return loss_of


@_from_token_logps
def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return naive_token_logps(F.linear(hidden, weight), labels)


def _trl() -> LossOf:
    import trl.trainer.utils  # noqa: F401 - its backward imports it
    from trl.kernels import ChunkedLogProbFunction

    def token_logps_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        temperature, vocabulary_chunk, softcap, logit_scale, outputs = 1.0, 32768, None, 1.0, ()
        flat = (hidden.flatten(0, 1), weight, None, labels.flatten())
        logps, *_ = ChunkedLogProbFunction.apply(*flat, temperature, vocabulary_chunk, softcap, logit_scale, outputs)
        return logps.view_as(labels)

    return _from_token_logps(token_logps_of)


def _liger() -> LossOf:
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    kto = LigerFusedLinearKTOLoss(beta=BETA, compiled=True, use_ref_model=True)

    def loss_of(batch: LinearBatch) -> Tensor:
        return kto(
            batch.hidden,
            batch.weight,
            batch.labels,
            preference_labels=batch.desirable,
            ref_input=batch.ref_hidden,
            ref_weight=batch.ref_weight,
            kl=torch.tensor(KL, device=batch.hidden.device),
        )[0]

    return loss_of


def _torch() -> LossOf:
    # Its own choice is a few rows (8 of H = 576, V = 49152), for the least memory: several times slower.
    chunked = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None)

    def token_logps_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        flat = (hidden.flatten(0, 1), weight, labels.flatten())
        return -F.linear_cross_entropy(*flat, reduction="none", options=chunked).view_as(labels)

    return _from_token_logps(token_logps_of)


def peers() -> dict[str, LossOf | str]:
    """Name → how it computes the loss, or why it is absent."""
    makers = {
        "TRL ChunkedLogProbFunction": _trl,
        "Liger LigerFusedLinearKTOLoss, compiled": _liger,
        "F.linear_cross_entropy, chunks of 256 rows": _torch,
    }
    return {NAIVE: naive, **present(makers)}
