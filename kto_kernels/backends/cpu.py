"""`backend="cpu"`: launchers for the C++ kernels of `csrc/cpu` (`kto_kernels._cpu`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import Rows, Scale, StageResult, strides
from .base import StagedBackend

_import_error = None
try:
    from .. import _cpu
except ImportError as error:
    _cpu, _import_error = None, str(error)

# A buffer from here on is always fresh from the system (glibc maps it), so that the advice touches no other data.
_HUGE = 1 << 25

_DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_REDUCTION = {"none": 0, "mean": 1, "sum": 2}


def instruction_sets() -> list[str]:
    """The instruction sets that this build and machine share, best first; empty without the extension."""
    return [] if _cpu is None else _cpu.instruction_sets()


def instruction_set() -> str:
    """The one in use: `KTO_KERNELS_CPU_ISA`, else the best. ValueError where that variable names none of them."""
    return _cpu.instruction_set()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(rows: Rows):
    cu_seqlens = None if rows.cu_seqlens is None else rows.cu_seqlens.contiguous()
    logits_b, logits_t = rows.logits_strides
    labels_b, labels_t = rows.labels_strides
    native = _cpu.Rows(
        logits=_pointer(rows.logits),
        dtype=_DTYPE[rows.logits.dtype],
        n_rows=rows.n_rows,
        n_sequences=rows.n_sequences,
        tokens=rows.tokens,
        vocab=rows.vocab,
        logits_stride_b=logits_b,
        logits_stride_t=logits_t,
        labels=_pointer(rows.labels),
        labels_int64=rows.labels.dtype == torch.int64,
        labels_stride_b=labels_b,
        labels_stride_t=labels_t,
        cu_seqlens=_pointer(cu_seqlens),
        cu_seqlens_int64=cu_seqlens is not None and cu_seqlens.dtype == torch.int64,
        ignore_index=rows.ignore_index,
        shift=rows.shift,
    )
    return native, cu_seqlens  # the caller keeps the tensor behind the pointer alive


def _scale(scale: Scale):
    return _cpu.Scale(**vars(scale))


class CpuBackend(StagedBackend):
    name = "cpu"

    def unavailable(self, device):
        if _cpu is None:
            return f"the C++ extension kto_kernels._cpu is not there ({_import_error}); build without KTO_KERNELS_CPU=0"
        if device.type != "cpu":
            return f"it runs on CPU tensors, not on {device.type}"
        return None

    def new_gradient(self, logits):
        out = super().new_gradient(logits)
        if out.nbytes >= _HUGE:
            _cpu.advise_huge_pages(data=_pointer(out), bytes=out.nbytes)
        return out

    def token_logps(self, rows, scale):
        logps = torch.empty(rows.labels.shape, dtype=torch.float32)
        statistics = torch.empty((2, *rows.labels.shape), dtype=torch.float32)
        native, _keep = _rows(rows)
        _cpu.token_logps_forward(
            rows=native,
            scale=_scale(scale),
            logps=_pointer(logps),
            reference=_pointer(statistics[0]),
            sum=_pointer(statistics[1]),
            threads=torch.get_num_threads(),
        )
        return logps, statistics

    def sequence_logps(self, rows, logps, average):
        sums = torch.empty(rows.n_sequences, dtype=torch.float64)
        counts = torch.empty(rows.n_sequences, dtype=torch.int64)
        native, _keep = _rows(rows)
        _cpu.sequence_logps(
            rows=native, logps=_pointer(logps), average=average, sums=_pointer(sums), counts=_pointer(counts)
        )
        return sums, counts

    def sequence_stages(self, dtype, logps, counts, ref_logps, desirable, kl, kl_logps, ref_kl_logps, options):
        n = logps.numel()
        loss = torch.empty((n,) if options.reduction == "none" else (), dtype=dtype)
        rewards, coefficients = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)
        z0 = torch.empty((), dtype=dtype)
        _cpu.sequence_stages(
            n_sequences=n,
            logps=_pointer(logps),
            ref_logps=_pointer(ref_logps),
            desirable=_pointer(desirable),
            counts=_pointer(counts),
            average=options.average_log_prob,
            n_kl=0 if kl_logps is None else kl_logps.numel(),
            kl_logps=_pointer(kl_logps),
            ref_kl_logps=_pointer(ref_kl_logps),
            kl=float(kl),
            beta=options.beta,
            desirable_weight=options.desirable_weight,
            undesirable_weight=options.undesirable_weight,
            reduction=_REDUCTION[options.reduction],
            loss=_pointer(loss),
            rewards=_pointer(rewards),
            kl_out=_pointer(z0),
            coefficients=_pointer(coefficients),
        )
        return StageResult(loss=loss, rewards=rewards, kl=z0, coefficients=coefficients)

    def logits_backward(self, rows, scale, grad, coefficients, token_logps, statistics, out):
        grad = grad.contiguous()
        out_b, out_t = strides(out.unsqueeze(0) if out.dim() == 2 else out)
        native, _keep = _rows(rows)
        _cpu.logits_backward(
            rows=native,
            scale=_scale(scale),
            grad=_pointer(grad),
            grad_stride=0 if grad.dim() == 0 else 1,
            coefficients=_pointer(coefficients),
            logps=_pointer(token_logps),
            reference=_pointer(statistics[0]),
            sum=_pointer(statistics[1]),
            output=_pointer(out),
            output_stride_b=out_b,
            output_stride_t=out_t,
            threads=torch.get_num_threads(),
        )
