"""What the launchers of the C++ extensions share: addresses, dtype codes, and rows as the extensions know them."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..rows import Rows

# Codes of `DType` (csrc/rows.h), and of `Reduction`.
DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
REDUCTION = {"none": 0, "mean": 1, "sum": 2}


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def native_rows(extension: ModuleType, rows: Rows):
    """`rows` as `extension.Rows`, and the tensor that the caller must keep alive behind a pointer in it."""
    cu_seqlens = None if rows.cu_seqlens is None else rows.cu_seqlens.contiguous()
    logits_b, logits_t = rows.logits_strides
    labels_b, labels_t = rows.labels_strides
    native = extension.Rows(
        logits=pointer(rows.logits),
        dtype=DTYPE[rows.logits.dtype],
        n_rows=rows.n_rows,
        n_sequences=rows.n_sequences,
        tokens=rows.tokens,
        vocab=rows.vocab,
        logits_stride_b=logits_b,
        logits_stride_t=logits_t,
        labels=pointer(rows.labels),
        labels_int64=rows.labels.dtype == torch.int64,
        labels_stride_b=labels_b,
        labels_stride_t=labels_t,
        cu_seqlens=pointer(cu_seqlens),
        cu_seqlens_int64=cu_seqlens is not None and cu_seqlens.dtype == torch.int64,
        ignore_index=rows.ignore_index,
        shift=rows.shift,
    )
    return native, cu_seqlens
