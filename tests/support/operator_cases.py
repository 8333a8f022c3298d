"""Arguments for every operator of the package, over layouts, dtypes, options and subsets of gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.library import CustomOpDef

from kto_kernels.linear.head import Needs
from kto_kernels.linear.rows import counted
from kto_kernels.objectives import BCO, DPO
from kto_kernels.ops import linear, logits
from kto_kernels.ops.schema import Operator
from kto_kernels.options import OUTPUTS, Chunking, Objective, Scale, Scoring
from kto_kernels.pairs import Judged, Preference

VOCAB, WIDTH = 11, 6
LAYOUTS = (
    "padded", "strided", "sliced", "no sequence", "no token", "nothing scored", "packed", "packed, no sequence",
    "packed, no token", "one sequence",
)  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Without and with a softcap.
SCORINGS = (Scoring(Scale()), Scoring(Scale(0.5, 3.0, 1.2), shift=True))
# (operator, arguments)
Case = tuple[CustomOpDef, tuple]


def operators() -> dict[str, CustomOpDef]:
    """Every operator by its name, those of an `Operator` one by one."""
    declared = [x for module in (logits, linear) for x in vars(module).values() if isinstance(x, Operator)]
    return {found._opoverload.name(): found for each in declared for found in each.operators}


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
            return tokens[0, :7], torch.tensor([0, 3, 3, 5, 7], dtype=torch.int32), 4
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


def both(operator: Operator, call) -> Iterator[Case]:
    """A call with constants, and with numbers that are data where it has numbers."""
    arguments, _ = operator.pack(call)
    yield operator.constant, arguments
    if operator.host is not None:
        floats = arguments[operator.arguments.index("floats")]
        arguments, _ = operator.pack(call, torch.tensor(floats, dtype=torch.float64))
        yield operator.host, arguments


def logits_cases(layout: str, dtype: torch.dtype, backend: str, scoring: Scoring = SCORINGS[1]) -> Iterator[Case]:
    """The operators from logits, each with constants and with numbers that are data."""
    scoring = replace(scoring, backend=backend)
    labels, cu_seqlens, count = labels_of(layout)
    x = rows_of(labels, VOCAB, layout, dtype)
    values = torch.promote_types(dtype, torch.float32)
    logps, statistics = torch.randn(labels.shape, dtype=values), torch.rand(2, *labels.shape).to(values)
    yield from both(logits.token_logps, logits.TokenLogps(x, labels, cu_seqlens, scoring))
    of_tokens = (x, labels, cu_seqlens, logps, statistics, scoring)
    for operator in (logits.logits_backward, logits.logits_backward_):
        yield from both(operator, logits.LogitsBackward(torch.randn(labels.shape, dtype=values), None, *of_tokens))
    if labels.dim() == 1 and cu_seqlens is None:
        return
    column, desirable = torch.randn(count, 2)[:, 0], torch.arange(count) % 2 == 0
    sources = (
        ("mean", False, {"ref_logits": x, "kl": torch.tensor(0.3)}),
        ("sum", True, {"ref_logps": column, "kl_logits": x, "ref_kl_logits": x, "kl_labels": labels, "kl_cu_seqlens": cu_seqlens}),
        ("none", True, {}),
    )  # fmt: skip
    names = [field.name for field in fields(logits.KTO)][4:13]
    for reduction, average, given in sources:
        objective = Objective(0.1, 1.0, 1.2, average, reduction)
        given = {name: given.get(name) for name in names}
        call = logits.KTO(x, labels, cu_seqlens, desirable, **given, scoring=scoring, objective=objective)
        yield from both(logits.kto_forward, call)
        grad = torch.ones(count if reduction == "none" else (), dtype=values)
        call = logits.LogitsBackward(grad, torch.randn(count, dtype=values), *of_tokens)
        yield from both(logits.logits_backward, call)


def linear_cases(
    layout: str,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],  # of hidden states, weight, bias
    gemm_dtype: torch.dtype,
    backend: str,
    scoring: Scoring = SCORINGS[1],
) -> Iterator[Case]:
    """The operators from hidden states, over every subset of gradients."""
    labels, cu_seqlens, count = labels_of(layout)
    hidden = rows_of(labels, WIDTH, layout, dtypes[0])
    weight = torch.randn(WIDTH, VOCAB).to(dtypes[1]).t()
    weight = weight if layout == "strided" else weight.contiguous()
    bias = None if dtypes[2] is None else torch.randn(VOCAB).to(dtypes[2])
    scoring = replace(scoring, backend=backend)

    def side(*outputs: str) -> linear.Projected:
        chunking = Chunking(outputs=tuple(name for name in OUTPUTS if name in outputs))
        projected = linear.Projected(hidden, weight, bias, labels, cu_seqlens, scoring, chunking, gemm_dtype)
        if layout not in ("packed", "strided"):
            return projected
        (known,) = counted([projected.completions], scoring, VOCAB)  # two layouts with numbers that the caller knows
        return replace(projected, scored_lengths=known.scored_lengths)

    for outputs, gradient in (((), False), (("entropy", "is_top1"), True), (("mean_logits",), True)):
        yield from both(linear.linear_token_logps, linear.LinearTokenLogps(side(*outputs), gradient, False))
    values = torch.promote_types(gemm_dtype, torch.float32)
    grad = torch.randn(labels.shape, dtype=values)
    for k, flags in enumerate(itertools.product((False, True), repeat=3)):
        entropy_grad, needs = torch.randn(labels.shape, dtype=values) if k % 3 == 2 else None, Needs(*flags)
        yield from both(linear.linear_backward, linear.LinearBackward(grad, entropy_grad, side(), needs))
        if labels.dim() == 2 or cu_seqlens is not None:
            lengths, tokens = torch.full((count,), 2.0, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
            z0 = torch.tensor(0.3, dtype=torch.float64)
            judged = Judged(torch.arange(count) % 2 == 0, z0, None, lengths, nll_tokens=tokens)
            preference = None
            if k >= 5:
                preference = Preference(BCO(nll_weight=0.5) if count % 2 else DPO(robust=k == 6), "halves")
            asked = side("entropy") if k % 2 else side()
            objective = Objective(0.1, 1.0, 1.2)
            call = linear.LinearKTO(asked, judged, objective, needs, preference, inplace_backward=False)
            yield from both(linear.linear_kto, call)
    contiguous = torch.randn(*labels.shape, WIDTH).to(dtypes[0])
    yield from both(linear.scale_, linear.Scaling(contiguous, torch.tensor(2.0, dtype=values), backend))
    yield from both(linear.scale_rows_, linear.ScaleRows(contiguous, grad))
