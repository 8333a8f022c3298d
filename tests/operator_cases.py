"""Arguments for every operator of the package, over layouts, dtypes, options and subsets of gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.library import CustomOpDef

from kto_kernels import linear_ops, ops

VOCAB, WIDTH = 11, 6
LAYOUTS = (
    "padded", "strided", "sliced", "no sequence", "no token", "nothing scored", "packed", "packed, no sequence",
    "packed, no token", "one sequence",
)  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Without and with a softcap. The rows of (shift, ignore_index, logit_scale, softcap, temperature).
SCORINGS = ((False, -100, 1.0, None, 1.0), (True, -100, 0.5, 3.0, 1.2))
# (operator, arguments, keywords)
Case = tuple[CustomOpDef, tuple, dict]


def operators() -> dict[str, CustomOpDef]:
    """Every operator by its name, those of an `ops.Operator` one by one."""
    values = [value for module in (ops, linear_ops) for value in vars(module).values()]
    twins = [value for value in values if isinstance(value, ops.Operator)]
    found = [value for value in values if isinstance(value, CustomOpDef)]
    found += [operator for twin in twins for operator in (twin.constant, twin.host)]
    return {operator._opoverload.name(): operator for operator in found}


def labels_of(layout: str) -> tuple[Tensor, Tensor | None, int]:
    """(labels, cu_seqlens, number of sequences)."""
    tokens = torch.randint(VOCAB, (3, 9))
    match layout:
        case "padded":
            return tokens[:, :4].contiguous(), None, 3
        case "strided":
            return tokens[:, :4].t().contiguous().t(), None, 3
        case "sliced":
            return tokens[:, 1::2], None, 3
        case "no sequence":
            return tokens[:0], None, 0
        case "no token":
            return tokens[:, :0].contiguous(), None, 3
        case "nothing scored":
            return torch.full((3, 4), -100), None, 3
        case "packed":
            return tokens[0, :7], torch.tensor([0, 3, 3, 7], dtype=torch.int32), 3
        case "packed, no sequence":
            return tokens[0, :0], torch.tensor([0]), 0
        case "packed, no token":
            return tokens[0, :0], torch.tensor([0, 0]), 1
        case "one sequence":
            return tokens[0], None, 1
    raise ValueError(layout)


def rows_of(labels: Tensor, width: int, layout: str, dtype: torch.dtype) -> Tensor:
    """Logits or hidden states of the labels, with strides as the layout's name says."""
    rows = torch.randn(*labels.shape, width).to(dtype)
    if layout == "strided":
        return rows.transpose(0, 1).contiguous().transpose(0, 1)
    return torch.cat([rows, rows], -1)[..., :width] if layout == "sliced" else rows


def logits_cases(layout: str, dtype: torch.dtype, backend: str, scoring: tuple = SCORINGS[1]) -> Iterator[Case]:
    """The operators from logits, each with constants and with numbers that are data."""
    labels, cu_seqlens, count = labels_of(layout)
    logits = rows_of(labels, VOCAB, layout, dtype)
    values = torch.promote_types(dtype, torch.float32)
    logps, statistics = torch.randn(labels.shape, dtype=values), torch.rand(2, *labels.shape).to(values)
    for operator, more in both(ops.token_logps, scoring[2:]):
        yield operator, (logits, labels, cu_seqlens, *scoring, False, backend), more
    backward = (logits, labels, cu_seqlens, logps, statistics, *scoring, backend)
    for twin in (ops.logits_backward, ops.logits_backward_):
        for operator, more in both(twin, scoring[2:]):
            yield operator, (torch.randn(labels.shape, dtype=values), None, *backward), more
    if labels.dim() == 1 and cu_seqlens is None:
        return
    column = torch.randn(count, 2)[:, 0]
    sources = (
        ("mean", False, logits, None, torch.tensor(0.3), None, None, None, None),
        ("sum", True, None, column, None, logits, logits, labels, cu_seqlens),
        ("none", True, None, None, None, None, None, None, None),
    )
    for reduction, average, ref_logits, ref_logps, kl, kl_logits, ref_kl_logits, kl_labels, kl_offsets in sources:
        for operator, more in both(ops.kto_forward, (*scoring[2:], 0.1, 1.0, 1.2)):
            yield operator, (
                logits, labels, cu_seqlens, torch.arange(count) % 2 == 0, ref_logits, ref_logps, kl, 0.0, kl_logits,
                ref_kl_logits, None, None, kl_labels, kl_offsets, 0.1, 1.0, 1.2, average, reduction, *scoring, False,
                backend,
            ), more  # fmt: skip
        grad = torch.ones(count if reduction == "none" else (), dtype=values)
        yield ops.logits_backward.constant, (grad, torch.randn(count, dtype=values), *backward), {}


def both(twin: ops.Operator, numbers: tuple) -> Iterator[tuple[CustomOpDef, dict]]:
    data = torch.tensor([number or 0.0 for number in numbers], dtype=torch.float64)
    yield twin.constant, {}
    yield twin.host, {"numbers": data}


def linear_cases(
    layout: str,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],  # of hidden states, weight, bias
    gemm_dtype: torch.dtype,
    backend: str,
    scoring: tuple = SCORINGS[1],
) -> Iterator[Case]:
    """The operators from hidden states, over every subset of gradients."""
    labels, cu_seqlens, count = labels_of(layout)
    hidden = rows_of(labels, WIDTH, layout, dtypes[0])
    weight = torch.randn(WIDTH, VOCAB).to(dtypes[1]).t()
    weight = weight if layout == "strided" else weight.contiguous()
    bias = None if dtypes[2] is None else torch.randn(VOCAB).to(dtypes[2])
    frame = (hidden, weight, bias, labels, cu_seqlens)
    options = (*scoring, gemm_dtype, None)
    for outputs, gradient in (("", False), ("entropy,is_top1", True), ("mean_logits", True)):
        yield linear_ops.linear_token_logps, (*frame, *options, outputs, gradient, False, backend, ""), {}
    values = torch.promote_types(gemm_dtype, torch.float32)
    grad = torch.randn(labels.shape, dtype=values)
    for k, needs in enumerate(itertools.product((False, True), repeat=3)):
        entropy_grad = torch.randn(labels.shape, dtype=values) if k % 3 == 2 else None
        yield linear_ops.linear_backward, (grad, entropy_grad, *frame, *options, *needs, backend), {}
        if labels.dim() == 2 or cu_seqlens is not None:
            loss = (torch.arange(count) % 2 == 0, None, torch.tensor(0.3, dtype=torch.float64), 0.1, 1.0, 1.2)
            how = ("mean", *options, "auto", "entropy" if k % 2 else "")
            yield linear_ops.linear_kto, (*frame, *loss, False, *how, *needs, None, None, False, backend), {}
    factor = torch.tensor(2.0, dtype=values)
    contiguous = torch.randn(*labels.shape, WIDTH).to(dtypes[0])
    yield linear_ops.scale_, (contiguous, factor, backend), {}
    yield linear_ops.scale_rows_, (contiguous, grad), {}
