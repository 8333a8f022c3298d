"""`backend="cpu"`: launchers for the C++ kernels of `csrc/cpu` (`kto_kernels._cpu`)."""

from __future__ import annotations

import logging

import torch

from ..rows import OUTPUTS, ChunkScores, Rows, Scale, StageResult, strides
from .base import StagedBackend
from .native import REDUCTION, native_rows, pointer

_import_error = None
try:
    from .. import _cpu
except ImportError as error:
    _cpu, _import_error = None, str(error)

logger = logging.getLogger("kto_kernels")

# The file of torch's OpenMP runtime, whose threads do the work; empty where there is none.
_openmp = "" if _cpu is None else _cpu.find_openmp(torch._C.__file__)


def thread_team() -> str:
    """Whose threads the C++ kernels run on."""
    if _openmp:
        return f"the threads of PyTorch's OpenMP runtime, {_openmp}"
    return "threads of their own, started at every call: PyTorch has no OpenMP runtime in this process"


if _cpu is not None:
    logger.log(logging.INFO if _openmp else logging.WARNING, "the C++ kernels run on %s", thread_team())

# A buffer from here on is always fresh from the system (glibc maps it), so that the advice touches no other data.
_HUGE = 1 << 25


def instruction_sets() -> list[str]:
    """The instruction sets that this build and machine share, best first; empty without the extension."""
    return [] if _cpu is None else _cpu.instruction_sets()


def instruction_set() -> str:
    """The one in use: `KTO_KERNELS_CPU_ISA`, else the best. ValueError where that variable names none of them."""
    return _cpu.instruction_set()


def _scale(scale: Scale):
    return _cpu.Scale(**vars(scale))


class CpuBackend(StagedBackend):
    name = "cpu"

    def unavailable(self, device):
        if _cpu is None:
            return (
                f"the C++ extension kto_kernels._cpu is not there ({_import_error}). It is built where a C++ compiler is "
                "found; to learn what is missing, install again with KTO_KERNELS_CPU=1 and pip's --no-cache-dir"
            )
        if device.type != "cpu":
            return f"it runs on CPU tensors, not on {device.type}"
        return None

    def empty(self, shape, dtype, device):
        out = super().empty(shape, dtype, device)
        if out.nbytes >= _HUGE:
            _cpu.advise_huge_pages(data=pointer(out), bytes=out.nbytes)
        return out

    def token_logps(self, rows, scale):
        logps = torch.empty(rows.labels.shape, dtype=torch.float32)
        statistics = torch.empty((2, *rows.labels.shape), dtype=torch.float32)
        native, _keep = native_rows(_cpu, rows)
        _cpu.token_logps_forward(
            rows=native,
            scale=_scale(scale),
            logps=pointer(logps),
            reference=pointer(statistics[0]),
            sum=pointer(statistics[1]),
            threads=torch.get_num_threads(),
        )
        return logps, statistics

    def score_chunk(self, logits, labels, scale, gradient, outputs):
        dtypes = {"entropy": torch.float32, "mean_logits": torch.float32, "is_top1": torch.bool}
        scores = {name: torch.empty(labels.shape, dtype=dtypes[name]) for name in outputs}
        logps = torch.empty(labels.shape, dtype=torch.float32)
        native, _keep = native_rows(_cpu, Rows(logits, labels, None, shift=False, ignore_index=-1))
        _cpu.score_chunk(
            rows=native,
            scale=_scale(scale),
            logps=pointer(logps),
            **{name: pointer(scores.get(name)) for name in OUTPUTS},
            gradient=pointer(logits if gradient else None),
            threads=torch.get_num_threads(),
        )
        return ChunkScores(logps, **scores)

    def sequence_logps(self, rows, logps, average):
        sums = torch.empty(rows.n_sequences, dtype=torch.float64)
        counts = torch.empty(rows.n_sequences, dtype=torch.int64)
        native, _keep = native_rows(_cpu, rows)
        _cpu.sequence_logps(
            rows=native, logps=pointer(logps), average=average, sums=pointer(sums), counts=pointer(counts)
        )
        return sums, counts

    def sequence_stages(self, dtype, logps, counts, ref_logps, desirable, kl, kl_logps, ref_kl_logps, options):
        n = logps.numel()
        loss = torch.empty((n,) if options.reduction == "none" else (), dtype=dtype)
        rewards, coefficients = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)
        z0 = torch.empty((), dtype=dtype)
        _cpu.sequence_stages(
            n_sequences=n,
            logps=pointer(logps),
            ref_logps=pointer(ref_logps),
            desirable=pointer(desirable),
            counts=pointer(counts),
            average=options.average_log_prob,
            n_kl=0 if kl_logps is None else kl_logps.numel(),
            kl_logps=pointer(kl_logps),
            ref_kl_logps=pointer(ref_kl_logps),
            kl=float(kl),
            beta=options.beta,
            desirable_weight=options.desirable_weight,
            undesirable_weight=options.undesirable_weight,
            reduction=REDUCTION[options.reduction],
            loss=pointer(loss),
            rewards=pointer(rewards),
            kl_out=pointer(z0),
            coefficients=pointer(coefficients),
        )
        return StageResult(loss=loss, rewards=rewards, kl=z0, coefficients=coefficients)

    def logits_backward(self, rows, scale, grad, coefficients, token_logps, statistics, out):
        grad = grad.contiguous()
        out_b, out_t = strides(out.unsqueeze(0) if out.dim() == 2 else out)
        native, _keep = native_rows(_cpu, rows)
        _cpu.logits_backward(
            rows=native,
            scale=_scale(scale),
            grad=pointer(grad),
            grad_stride=0 if grad.dim() == 0 else 1,
            coefficients=pointer(coefficients),
            logps=pointer(token_logps),
            reference=pointer(statistics[0]),
            sum=pointer(statistics[1]),
            output=pointer(out),
            output_stride_b=out_b,
            output_stride_t=out_t,
            threads=torch.get_num_threads(),
        )
