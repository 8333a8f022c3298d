"""`backend="triton"`: launchers for the kernels of `triton_kernels` and `triton_chunk`. One launch an operator.

A row that finds the chip half empty is split over programs; the last of them to finish puts the row together, and the
one that finishes the last row of all does the stages after the seam. Which one that is does not change a bit of the
result: every sum has one order. They find out by counters that must be zero at the start and are set back to zero by
the kernel (see `_arrivals`).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .._requirements import TRITON, older
from ..rows import OUTPUTS, ChunkScores, ForwardResult, Rows, Scale, Sequences, strides
from .base import Backend

_import_error = None
try:
    import triton

    if older(triton.__version__, TRITON):
        raise ImportError("Triton {}.{} or later is needed, found {}".format(*TRITON, triton.__version__))
    from . import triton_chunk as chunk_kernels
    from . import triton_kernels as kernels
except ImportError as error:
    triton, kernels, chunk_kernels, _import_error = None, None, None, str(error)

# TRITON_INTERPRET=1 at import: the kernels are run by NumPy, on tensors of any device.
INTERPRETED = kernels is not None and not isinstance(kernels.forward_kernel, triton.JITFunction)

THREADS = 128
# A chunk's rows are read twice: one program a multiprocessor, so that the rows under way fit into the L2 cache together
# (132 of 128,256 bf16 logits: 34 MB).
CHUNK_THREADS = 1024
UNROLL = 4  # vectors of 16 bytes that a thread loads before it uses the first
CHUNK_SOFTCAP_UNROLL = 2  # more would spill
MAX_SPLITS = 64
# Programs wanted per multiprocessor: 8 are resident, and a second round evens out what they leave.
PROGRAMS_PER_PROCESSOR = 16

# Launch parameters ────────────────────────────────────────────────────────────────────────────────────────────────────


def blocks(dtype: torch.dtype, threads: int = THREADS, unroll: int = UNROLL) -> dict[str, int]:
    """A kernel's block sizes. No shape changes them: a vector is 16 bytes."""
    return {"UNROLL": unroll, "THREADS": threads, "VECTOR": 16 // dtype.itemsize}


def options(hip: bool, warp_size: int, threads: int) -> dict[str, int]:
    """The compiler's options. 64 registers let 1024 threads live on a multiprocessor, and no kernel spills with them;
    the compiler's own choice may do neither."""
    return {"num_warps": threads // warp_size, "num_stages": 1, **({} if hip else {"maxnreg": 64})}


def row_splits(rows: int, vocab: int, dtype: torch.dtype, processors: int) -> int:
    """How many programs share a row: enough to fill the chip with few rows, one with many."""
    tiles = triton.cdiv(vocab, math.prod(blocks(dtype).values()))
    return max(1, min(PROGRAMS_PER_PROCESSOR * processors // max(1, rows), tiles, MAX_SPLITS))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _options(device: torch.device, threads: int) -> dict[str, int]:
    return options(torch.version.hip is not None, torch.cuda.get_device_properties(device).warp_size, threads)


def _launch(kernel, device: torch.device, programs: int, arguments: dict) -> None:
    if INTERPRETED:
        import numpy  # the interpreter's; infinities are ordinary values, as on a GPU

        with numpy.errstate(all="ignore"):
            kernel[(programs,)](**arguments)
        return
    with torch.cuda.device(device):
        kernel[(programs,)](**arguments, **_options(device, arguments["THREADS"]))


@functools.cache
def _default_stream_arrivals(device: torch.device, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def _arrivals(device: torch.device) -> Tensor:
    """Zeroed counters for one launch: one for all rows, and one for each where rows are split.

    Calls on the device's default stream share one buffer: they run one after another, and each leaves zeros behind.
    Other streams may run beside it, and a captured graph may be replayed anywhere at any time, so that there each call
    (each replay) zeroes its own. That also keeps the shared buffer out of the private memory pools of graphs, which
    belong to side streams.
    """
    # Rows are split only where two programs a row are not too many.
    count = 1 + PROGRAMS_PER_PROCESSOR * _processors(device) // 2
    if device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        return _default_stream_arrivals(device, count)
    return torch.zeros(count, dtype=torch.int32, device=device)


# Arguments ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _layout_arguments(rows: Rows | None, prefix: str = "", n_sequences: int = 0) -> dict:
    """Labels and sequences, shared by the logits that they score; without rows, `n_sequences` whose sums are given."""
    labels_b, labels_t = (0, 0) if rows is None else rows.labels_strides
    cu_seqlens = None if rows is None else rows.cu_seqlens
    return {
        f"{prefix}labels": None if rows is None else rows.labels,
        f"{prefix}labels_stride_b": labels_b,
        f"{prefix}labels_stride_t": labels_t,
        f"{prefix}cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
        f"{prefix}n_rows": 0 if rows is None else rows.n_rows,
        f"{prefix}n_sequences": n_sequences if rows is None else rows.n_sequences,
        f"{prefix}tokens": 0 if rows is None else rows.tokens,
    }


def _logits_arguments(rows: Rows | None, name: str = "logits") -> dict:
    stride_b, stride_t = (0, 0) if rows is None else rows.logits_strides
    return {
        name: None if rows is None else rows.logits,
        f"{name}_stride_b": stride_b,
        f"{name}_stride_t": stride_t,
    }


def _sums_arguments(name: str, values: Tensor | None) -> dict:
    return {name: values, f"{name}_stride": 0 if values is None else values.stride(0)}


def _scale_arguments(scale: Scale) -> dict:
    """z = scale·u: the score u is the logit, or tanh(inner·logit) under a softcap."""
    softcap = scale.softcap
    return {
        "inner": 1.0 if softcap is None else scale.logit_scale / softcap,
        "scale": scale.outer,
        "SOFTCAP": softcap is not None,
    }


def _scoring_arguments(rows: Rows, scale: Scale) -> dict:
    return {
        "vocab": rows.vocab,
        "ignore_index": rows.ignore_index,
        "SHIFT": rows.shift,
        **_scale_arguments(scale),
        **blocks(rows.logits.dtype),
    }


def _split_arguments(units: int, rows: Rows) -> dict:
    """`units` rows like `rows`, of all sets of logits."""
    device = rows.logits.device
    splits = row_splits(units, rows.vocab, rows.logits.dtype, _processors(device))
    return {
        "shares": torch.empty((units, splits, 2) if splits > 1 else 0, dtype=torch.float64, device=device),
        "arrivals": _arrivals(device),
        "splits": splits,
        "MAX_SPLITS": MAX_SPLITS,
    }


# Launchers ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class TritonBackend(Backend):
    name = "triton"

    def unavailable(self, device):
        if kernels is None:
            return f"Triton is not there ({_import_error}); pip install triton"
        if device.type == "cuda" or (INTERPRETED and device.type == "cpu"):
            return None
        return "it runs on CUDA tensors, or on the CPU under TRITON_INTERPRET=1"

    def token_logps(self, rows, scale):
        device = rows.logits.device
        logps = torch.empty(rows.labels.shape, dtype=torch.float32, device=device)
        statistics = torch.empty((2, *rows.labels.shape), dtype=torch.float32, device=device)
        if rows.n_rows == 0:
            return logps, statistics
        split = _split_arguments(rows.n_rows, rows)
        arguments = {
            **_logits_arguments(rows),
            **_layout_arguments(rows),
            **_scoring_arguments(rows, scale),
            **split,
            "logps": logps,
            "statistics": statistics,
        }
        _launch(kernels.token_logps_kernel, device, rows.n_rows * split["splits"], arguments)
        return logps, statistics

    def kto_forward(self, policy, scale, desirable, ref, kl, kl_policy, kl_ref, options):
        device = policy.logits.device

        def empty(shape, dtype=torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def sums(side: Sequences, filled: Tensor | None = None) -> Tensor | None:
            """Sequence log-probabilities: those given, or where the kernel puts its own."""
            if side.rows is None:
                return side.logps
            return empty(side.rows.n_sequences, torch.float64) if filled is None else filled

        count, average = policy.n_sequences, options.average_log_prob
        result = ForwardResult(
            loss=empty((count,) if options.reduction == "none" else ()),
            rewards=empty(count),
            kl=empty(()),
            coefficients=empty(count),
            logps=empty(count, torch.float64),
            ref_logps=empty(count, torch.float64),
            token_logps=empty(policy.labels.shape),
            statistics=empty((2, *policy.labels.shape)),
        )
        kl_rows = kl_policy.rows or kl_ref.rows
        kl_layout = _layout_arguments(kl_rows, "kl_", 0 if kl_policy.logps is None else kl_policy.logps.numel())
        others = sum(side.rows.n_rows for side in (ref, kl_policy, kl_ref) if side.rows)
        units = policy.n_rows + others
        split = _split_arguments(units, policy)
        arguments = {
            **_logits_arguments(policy),
            **_logits_arguments(ref.rows, "ref_logits"),
            **_layout_arguments(policy),
            **_logits_arguments(kl_policy.rows, "kl_logits"),
            **_logits_arguments(kl_ref.rows, "kl_ref_logits"),
            **kl_layout,
            **_scoring_arguments(policy, scale),
            "desirable": desirable,
            "desirable_stride": desirable.stride(0),
            **_sums_arguments("ref_sums", sums(ref, result.ref_logps)),
            **_sums_arguments("kl_sums", sums(kl_policy)),
            **_sums_arguments("kl_ref_sums", sums(kl_ref)),
            "kl": kl if isinstance(kl, Tensor) else None,
            "kl_value": 0.0 if isinstance(kl, Tensor) else kl,
            "beta": options.beta,
            "desirable_weight": options.desirable_weight,
            "undesirable_weight": options.undesirable_weight,
            "loss": result.loss,
            "logps": result.logps,
            "ref_logps": result.ref_logps,
            "rewards": result.rewards,
            "z0": result.kl,
            "coefficients": result.coefficients,
            "token_logps": result.token_logps,
            "statistics": result.statistics,
            "other_logps": empty(others) if ref.rows or kl_rows else None,
            "scored": empty(policy.n_rows + kl_layout["kl_n_rows"]) if average else None,
            "counts": empty(count, torch.float64) if average else None,
            "kl_counts": empty(kl_layout["kl_n_sequences"], torch.float64) if average and kl_rows else None,
            **split,
            "AVERAGE": average,
            "REDUCTION": options.reduction,
        }
        _launch(kernels.forward_kernel, device, max(1, units) * split["splits"], arguments)
        return result

    def logits_backward(self, rows, scale, grad, coefficients, token_logps, statistics, out):
        if rows.n_rows == 0:
            return
        device = rows.logits.device
        if coefficients is None:
            grad_b, grad_t = strides(grad.unsqueeze(0) if grad.dim() == 1 else grad)
        else:
            grad_b, grad_t = grad.stride(0) if grad.dim() == 1 else 0, 0
        out_b, out_t = strides(out.unsqueeze(0) if out.dim() == 2 else out)
        splits = row_splits(rows.n_rows, rows.vocab, rows.logits.dtype, _processors(device))
        arguments = {
            **_logits_arguments(rows),
            **_layout_arguments(rows),
            **_scoring_arguments(rows, scale),
            "grad": grad,
            "grad_stride_b": grad_b,
            "grad_stride_t": grad_t,
            "coefficients": coefficients,
            "token_logps": token_logps,
            "statistics": statistics,
            "out": out,
            "out_stride_b": out_b,
            "out_stride_t": out_t,
            "splits": splits,
            "INTERPRETED": INTERPRETED,
        }
        _launch(kernels.logits_backward_kernel, device, rows.n_rows * splits, arguments)

    def score_chunk(self, logits, labels, scale, gradient, outputs):
        device, (count, vocab) = logits.device, logits.shape
        logps = torch.empty(count, dtype=torch.float32, device=device)
        extra = {
            name: torch.empty(count, dtype=torch.bool if name == "is_top1" else torch.float32, device=device)
            for name in outputs
        }
        if count > 0:
            arguments = {
                "logits": logits,
                "logits_stride": logits.stride(0),
                "labels": labels,
                "labels_stride": labels.stride(0),
                "vocab": vocab,
                **_scale_arguments(scale),
                "logps": logps,
                **{name: extra.get(name) for name in OUTPUTS},
                "GRADIENT": gradient,
                **blocks(logits.dtype, CHUNK_THREADS, UNROLL if scale.softcap is None else CHUNK_SOFTCAP_UNROLL),
                "INTERPRETED": INTERPRETED,
            }
            _launch(chunk_kernels.chunk_kernel, device, count, arguments)
        return ChunkScores(logps, **extra)

    def scale_(self, tensor, factor):
        if tensor.numel() == 0:
            return
        device, sizes = tensor.device, blocks(tensor.dtype)
        tiles = triton.cdiv(tensor.numel(), math.prod(sizes.values()))
        arguments = {
            "tensor": tensor,
            "count": tensor.numel(),
            "factor": factor,
            **sizes,
            "INTERPRETED": INTERPRETED,
        }
        # A few programs: each reads the factor before it can end.
        programs = min(tiles, PROGRAMS_PER_PROCESSOR * _processors(device))
        _launch(chunk_kernels.scale_kernel, device, programs, arguments)
