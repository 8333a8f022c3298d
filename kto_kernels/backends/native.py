"""Shared by the launchers of the C++ extensions: addresses, dtype codes, and records as the fields of C++ structs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..options import Objective
from ..records import ForwardResult, Rows

# The values of the C++ enums `DType` (csrc/rows.h) and `Reduction`.
DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
REDUCTION = {"none": 0, "mean": 1, "sum": 2}


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def halves(statistics: Tensor) -> tuple[int, int]:
    """The addresses of the two halves of contiguous statistics (2, ...): origins and sums."""
    address = statistics.data_ptr()
    return address, address + statistics.nbytes // 2


def objective_fields(objective: Objective) -> dict[str, float]:
    """The fields of the C++ struct `ValueOptions`."""
    return {name: getattr(objective, name) for name in ("beta", "desirable_weight", "undesirable_weight")}


def stage_fields(
    result: ForwardResult, objective: Objective, desirable: Tensor, counts: Tensor | None
) -> dict[str, Any]:
    """The fields of the C++ struct `Stages` that both extensions have."""
    return objective_fields(objective) | {
        "average": objective.average_log_prob,
        "reduction": REDUCTION[objective.reduction],
        "n_sequences": result.logps.numel(),
        "logps": pointer(result.logps),
        "counts": pointer(counts),
        "desirable": pointer(desirable),
        "loss": pointer(result.loss),
        "rewards": pointer(result.rewards),
        "kl_out": pointer(result.kl),
        "coefficients": pointer(result.coefficients),
    }


def row_fields(rows: Rows) -> tuple[dict[str, int], Tensor | None]:
    """The fields of the C++ struct `Rows` (csrc/rows.h), and the tensor that the caller must keep alive."""
    cu_seqlens = None if rows.cu_seqlens is None else rows.cu_seqlens.contiguous()
    logits_b, logits_t = rows.logits_strides
    labels_b, labels_t = rows.labels_strides
    fields = {
        "logits": pointer(rows.logits),
        "dtype": DTYPE[rows.logits.dtype],
        "n_rows": rows.n_rows,
        "n_sequences": rows.n_sequences,
        "tokens": rows.tokens,
        "vocab": rows.vocab,
        "logits_stride_b": logits_b,
        "logits_stride_t": logits_t,
        "labels": pointer(rows.labels),
        "labels_int64": rows.labels.dtype == torch.int64,
        "labels_stride_b": labels_b,
        "labels_stride_t": labels_t,
        "cu_seqlens": pointer(cu_seqlens),
        "cu_seqlens_int64": cu_seqlens is not None and cu_seqlens.dtype == torch.int64,
        "ignore_index": rows.ignore_index,
        "shift": rows.shift,
    }
    return fields, cu_seqlens
