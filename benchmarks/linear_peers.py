"""The loss from hidden states, each way behind one signature: `loss_of(batch) → Scored`, a 0-d loss, differentiable.

Where a peer stops at token log-probabilities, the reference's are computed by its own means without gradient, and the
formula on top is the one of `objective`. Prompts are in the batch, as a model's forward leaves them there: a peer that
projects them too pays for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kto_kernels import linear_kto_loss, linear_preference_loss

from .objective import BETA, DPO, KL, KTO, OBJECTIVES, Objective
from .peers import NAIVE, naive_token_logps
from .selection import Absent, Peer, Setting

IGNORED = -100


@dataclass
class LinearBatch:
    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H), requires a gradient unless the head is frozen
    ref_hidden: Tensor  # (B, T, H)
    ref_weight: Tensor  # (V, H)
    labels: Tensor  # (B, T), IGNORED where a prompt is
    desirable: Tensor  # (B,)
    softcap: float | None = None
    objective: Objective = OBJECTIVES[KTO]


class Scored(NamedTuple):
    loss: Tensor  # ()
    token_logps: Tensor | None = None  # (B, T), detached, of the policy; None where a peer keeps them to itself


LossOf = Callable[[LinearBatch], Scored]
TokenLogpsOf = Callable[[LinearBatch, Tensor, Tensor, Tensor], Tensor]  # batch, hidden, weight, labels → (B, T)


def ours(backend: str, max_logits_bytes: int | None = None) -> LossOf:
    def loss_of(batch: LinearBatch) -> Scored:
        inputs = (batch.hidden, batch.weight, batch.labels)
        given = {"ref_hidden": batch.ref_hidden, "ref_weight": batch.ref_weight, "softcap": batch.softcap}
        given |= {"max_logits_bytes": max_logits_bytes, "backend": backend}
        if batch.objective.paired:
            out = linear_preference_loss(*inputs, batch.objective.record, **given)
        else:
            out = linear_kto_loss(*inputs, batch.desirable, kl=KL, beta=BETA, **given)
        return Scored(out.loss, out.token_logps)

    return loss_of


def _from_token_logps(token_logps_of: TokenLogpsOf) -> LossOf:
    def loss_of(batch: LinearBatch) -> Scored:
        with torch.no_grad():
            ref_logps = token_logps_of(batch, batch.ref_hidden, batch.ref_weight, batch.labels).float().sum(-1)
        token_logps = token_logps_of(batch, batch.hidden, batch.weight, batch.labels)
        return Scored(batch.objective.as_written(token_logps, ref_logps, batch.desirable), token_logps.detach())

    return loss_of


def _naive(batch: LinearBatch, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    if batch.softcap is not None:
        logits = batch.softcap * torch.tanh(logits / batch.softcap)
    scored = labels != IGNORED
    return naive_token_logps(logits, labels.clamp(min=0)).masked_fill(~scored, 0.0)


def _scored(batch: LinearBatch, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    scored = labels != IGNORED
    logps = _naive(batch, hidden[scored], weight, labels[scored])
    return logps.new_zeros(labels.shape).masked_scatter(scored, logps)


naive, naive_scored = _from_token_logps(_naive), _from_token_logps(_scored)


def _compiled(setting: Setting) -> LossOf:
    torch._dynamo.reset()  # after eight shapes it would stop compiling, silently
    return torch.compile(naive)


def _trl(setting: Setting) -> LossOf:
    import trl.trainer.utils  # noqa: F401 - its backward imports it
    from trl.kernels import ChunkedLogProbFunction

    compact = setting.device == "cuda"  # TRL's fused head leaves prompts out where its Triton kernels run

    def token_logps_of(batch: LinearBatch, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        scored = labels != IGNORED
        rows = (hidden[scored], labels[scored]) if compact else (hidden.flatten(0, 1), labels.clamp(min=0).flatten())
        temperature, vocabulary_chunk, logit_scale, outputs = 1.0, 32768, 1.0, ()
        logps, *_ = ChunkedLogProbFunction.apply(
            rows[0], weight, None, rows[1], temperature, vocabulary_chunk, batch.softcap, logit_scale, outputs
        )
        if compact:
            return logps.new_zeros(labels.shape).masked_scatter(scored, logps)
        return logps.view_as(labels).masked_fill(~scored, 0.0)

    return _from_token_logps(token_logps_of)


def _no_softcap(setting: Setting) -> None:
    if setting.shape.softcap is not None:
        raise Absent("it knows no softcap of the logits")


def _liger(setting: Setting) -> LossOf:
    _no_softcap(setting)
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    torch._dynamo.reset()
    kto = LigerFusedLinearKTOLoss(beta=BETA, compiled=True, use_ref_model=True)

    def loss_of(batch: LinearBatch) -> Scored:
        loss, *_ = kto(
            batch.hidden,
            batch.weight,
            batch.labels,
            preference_labels=batch.desirable,
            ref_input=batch.ref_hidden,
            ref_weight=batch.ref_weight,
            kl=torch.tensor(KL, device=batch.hidden.device),
        )
        return Scored(loss)

    return loss_of


def _liger_dpo(setting: Setting) -> LossOf:
    _no_softcap(setting)
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    torch._dynamo.reset()
    dpo = LigerFusedLinearDPOLoss(beta=BETA, compiled=True, use_ref_model=True)

    def loss_of(batch: LinearBatch) -> Scored:
        reference = {"ref_input": batch.ref_hidden, "ref_weight": batch.ref_weight}
        loss, *_ = dpo(batch.weight, batch.hidden, batch.labels, **reference)
        return Scored(loss)

    return loss_of


def _flat(nll_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> LossOf:
    """A peer from a function of rows that returns a negative log-likelihood for each, 0 where a row is ignored."""

    def token_logps_of(batch: LinearBatch, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -nll_of(hidden.flatten(0, 1), weight, labels.flatten()).view_as(labels)

    return _from_token_logps(token_logps_of)


def _liger_scaled(setting: Setting) -> LossOf:
    _no_softcap(setting)
    setting.need_gpu((9, 0))  # elsewhere it is a loop of plain PyTorch
    setting.need(setting.dtype == torch.bfloat16, "bf16")
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return _flat(LigerFusedLinearScaledCrossEntropyFunction.apply)


def _cce(setting: Setting) -> LossOf:
    setting.need_gpu()
    from cut_cross_entropy import linear_cross_entropy

    softcap = setting.shape.softcap
    return _flat(lambda h, w, y: linear_cross_entropy(h, w, y, softcap=softcap, reduction="none", impl="cce"))


def _torch(setting: Setting) -> LossOf:
    _no_softcap(setting)
    # Its own choice is a few rows (8 of H = 576, V = 49152), for the least memory: several times slower.
    rows = TORCH_ROWS[setting.device]
    chunked = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    return _flat(
        lambda h, w, y: F.linear_cross_entropy(h, w, y, reduction="none", ignore_index=IGNORED, options=chunked)
    )


def _quack(setting: Setting) -> LossOf:
    _no_softcap(setting)
    setting.need_gpu((9, 0), (10, 0))
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return _flat(lambda h, w, y: linear_cross_entropy_func(h, w, None, y, reduction="none", inplace_backward=True))


def _quack_chunked(setting: Setting) -> LossOf:
    _no_softcap(setting)
    setting.need_gpu((9, 0), (10, 0))
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss_of(batch: LinearBatch) -> Scored:
        """It returns sums only: a call for each sequence, whose coefficient comes with the backward."""

        def sums(hidden: Tensor, weight: Tensor) -> Tensor:
            rows = zip(hidden, batch.labels)
            return torch.stack([-chunked_linear_cross_entropy(h, weight, y, reduction="sum") for h, y in rows])

        with torch.no_grad():
            ref_logps = sums(batch.ref_hidden, batch.ref_weight)
        return Scored(batch.objective.as_written(sums(batch.hidden, batch.weight)[:, None], ref_logps, batch.desirable))

    return loss_of


SCORED = f"{NAIVE}, scored rows only"
TORCH_ROWS = {"cpu": 256, "cuda": 4096}
PEERS = {
    "naive": Peer(NAIVE, lambda _: naive),
    "scored": Peer(SCORED, lambda _: naive_scored),
    "compile": Peer("torch.compile of naive", _compiled),
    "trl": Peer("TRL ChunkedLogProbFunction", _trl),
    "liger": Peer("Liger LigerFusedLinearKTOLoss, compiled", _liger),
    "liger-scaled": Peer("Liger LigerFusedLinearScaledCrossEntropyFunction", _liger_scaled),
    "cce": Peer("CCE linear_cross_entropy", _cce),
    "torch": Peer("F.linear_cross_entropy in chunks", _torch),
    "quack": Peer("quack linear_cross_entropy_func, in place", _quack),
    "quack-chunked": Peer("quack chunked_linear_cross_entropy, a call a sequence", _quack_chunked),
}
# Objective → the peers that compute it by a function of their own, in place of those of the same key.
INSTEAD = {KTO: {}, DPO: {"liger": Peer("Liger LigerFusedLinearDPOLoss, compiled", _liger_dpo)}}
