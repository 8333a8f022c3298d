"""`backend="cpu"`: launchers for the C++ kernels of `csrc/cpu` (`kto_kernels._cpu`)."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from ..options import OUTPUTS, Objective, Scale
from ..records import ChunkScores, ForwardResult, Rows, Side, strides
from .base import Backend
from .native import halves, pointer, row_fields, stage_fields

_import_error: str | None = None
try:
    from .. import _cpu
except ImportError as _error:
    _cpu, _import_error = None, str(_error)

logger: logging.Logger = logging.getLogger("kto_kernels")

# The file of PyTorch's OpenMP runtime, whose threads run the kernels; empty where PyTorch has no such runtime.
_openmp = "" if _cpu is None else _cpu.find_openmp(torch._C.__file__)


def thread_team() -> str:
    """The threads that the C++ kernels run on, in words."""
    if _openmp:
        return f"the threads of PyTorch's OpenMP runtime, {_openmp}"
    return "threads of their own, started at every call: PyTorch has no OpenMP runtime in this process"


if _cpu is not None:
    logger.log(logging.INFO if _openmp else logging.WARNING, "the C++ kernels run on %s", thread_team())

# The bytes from which on a buffer is advised to lie in huge pages. glibc maps such a buffer on its own, so that the
# advice concerns no other data.
_HUGE = 1 << 25


def instruction_sets() -> list[str]:
    """The instruction sets that this build and machine share, best first; empty without the extension."""
    return [] if _cpu is None else _cpu.instruction_sets()


def instruction_set() -> str:
    """The instruction set in use: the one that the environment variable KTO_KERNELS_CPU_ISA names, else the best.

    Raises:
        ValueError: the variable names an instruction set that this build or machine does not have.
    """
    return _cpu.instruction_set()


class CpuBackend(Backend):
    name = "cpu"

    def unavailable(self, device: torch.device) -> str | None:
        if _cpu is None:
            return (
                f"the C++ extension kto_kernels._cpu is not there ({_import_error}). It is built where a C++ compiler is "
                "found; to learn what is missing, install again with KTO_KERNELS_CPU=1 and pip's --no-cache-dir"
            )
        if device.type != "cpu":
            return f"it runs on CPU tensors, not on {device.type}"
        return None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        out = super().empty(shape, dtype, device)
        if out.nbytes >= _HUGE:
            _cpu.advise_huge_pages(pointer(out), out.nbytes)
        return out

    def may_be_outside(self, labels: Tensor, vocab: int, ignore_index: int) -> bool:
        is_int64, size = labels.dtype == torch.int64, (labels.numel(), labels.shape[-1])
        return _cpu.has_outside_label(pointer(labels), is_int64, *size, *strides(labels, 2), vocab, ignore_index)

    def token_logps(self, rows: Rows, scale: Scale) -> tuple[Tensor, Tensor]:
        logps = torch.empty(rows.labels.shape, dtype=torch.float32, device="cpu")
        statistics = logps.new_empty((2, *rows.labels.shape))
        row_set, _keep = _row_set(rows, logps, statistics)
        _cpu.forward([row_set], vars(scale), None, torch.get_num_threads())
        return logps, statistics

    def score_chunk(
        self, logits: Tensor, labels: Tensor, scale: Scale, gradient: bool, outputs: tuple[str, ...]
    ) -> ChunkScores:
        scores = ChunkScores.empty(labels, outputs)
        fields, _keep = row_fields(Rows(logits, labels, None, shift=False, ignore_index=-1))
        addresses = {name: pointer(getattr(scores, name)) for name in ("logps", *OUTPUTS)}
        arguments = {"rows": fields, "scale": vars(scale), "gradient": pointer(logits if gradient else None)}
        _cpu.score_chunk(arguments | addresses, torch.get_num_threads())
        return scores

    def kto_forward(
        self, policy: Rows, scale: Scale, desirable: Tensor, ref: Side, kl: Tensor | float, kl_policy: Side,
        ref_kl: Side, objective: Objective,
    ) -> ForwardResult:  # fmt: skip
        count, empty = policy.n_sequences, functools.partial(torch.empty, device="cpu")
        result = ForwardResult.empty(policy.labels, count, objective, torch.float32)
        if not ref:
            result.ref_logps.zero_()
        keep: list = [desirable := desirable.contiguous()]  # keeps the tensors behind addresses alive until the call
        counts = empty(count, dtype=torch.int64)
        row_set, cu_seqlens = _row_set(policy, result.token_logps, result.statistics, result.logps, counts)
        keep.append(cu_seqlens)
        sets = [row_set]

        def sums(side: Side, out: Tensor | None = None) -> Tensor | None:
            """A side's sequence log-probabilities: the given ones, or a buffer that the kernel fills from the rows."""
            if side.rows is None and side.logps is not None:
                given = side.logps.to(torch.float64, memory_format=torch.contiguous_format)
                return given if out is None else out.copy_(given)
            if side.rows is None:
                return None
            n, rows = side.rows.n_sequences, side.rows.n_rows
            scratch, out, counts = (
                empty((3, rows), dtype=torch.float32),
                empty(n, dtype=torch.float64) if out is None else out,
                empty(n, dtype=torch.int64),
            )
            row_set, cu_seqlens = _row_set(side.rows, scratch[0], scratch[1:], out, counts)
            sets.append(row_set)
            keep.extend((scratch, counts, cu_seqlens, out))
            return out

        ref_logps, kl_logps, ref_kl_logps = sums(ref, result.ref_logps), sums(kl_policy), sums(ref_kl)
        stages = stage_fields(result, objective, desirable, counts) | {
            "n_kl": 0 if kl_logps is None else kl_logps.numel(),
            "ref_logps": pointer(ref_logps),
            "kl_logps": pointer(kl_logps),
            "ref_kl_logps": pointer(ref_kl_logps),
            "kl": float(kl),
        }
        _cpu.forward(sets, vars(scale), stages, torch.get_num_threads())
        return result

    def value_stages(
        self, logps: Tensor, ref_logps: Tensor | None, z0: Tensor, desirable: Tensor, objective: Objective
    ) -> tuple[Tensor, Tensor, Tensor]:
        logps, desirable = logps.contiguous(), desirable.contiguous()
        if ref_logps is not None:
            ref_logps = ref_logps.to(torch.float64).contiguous()
        losses, slopes, rewards = (torch.empty_like(logps) for _ in range(3))
        sequences = (logps.numel(), pointer(logps), pointer(ref_logps), pointer(desirable))
        options = (objective.beta, objective.desirable_weight, objective.undesirable_weight)
        _cpu.value_stages(*sequences, z0.item(), *options, pointer(losses), pointer(slopes), pointer(rewards))
        return losses, slopes, rewards

    def logits_backward(
        self, rows: Rows, scale: Scale, grad: Tensor, coefficients: Tensor | None, token_logps: Tensor, statistics: Tensor,
        out: Tensor,
    ) -> None:  # fmt: skip
        grad = grad.contiguous()
        out_b, out_t = strides(out, 3)
        fields, _keep = row_fields(rows)
        origin, total = halves(statistics)
        arguments = {
            "rows": fields,
            "scale": vars(scale),
            "grad": pointer(grad),
            "grad_stride": 0 if grad.dim() == 0 else 1,
            "coefficients": pointer(coefficients),
            "logps": pointer(token_logps),
            "origin": origin,
            "sum": total,
            "out": pointer(out),
            "out_stride_b": out_b,
            "out_stride_t": out_t,
        }
        _cpu.logits_backward(arguments, torch.get_num_threads())


def _row_set(
    rows: Rows, logps: Tensor, statistics: Tensor, sums: Tensor | None = None, counts: Tensor | None = None
) -> tuple[dict, Tensor | None]:
    """A set of rows with the addresses for their results, and the tensor that the caller must keep alive."""
    fields, keep = row_fields(rows)
    origin, total = halves(statistics)
    return {
        "rows": fields,
        "logps": pointer(logps),
        "origin": origin,
        "sum": total,
        "sums": pointer(sums),
        "counts": pointer(counts),
    }, keep
