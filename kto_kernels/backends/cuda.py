"""`backend="cuda"`: launchers for the CUDA C++ kernels of `csrc/cuda` (`kto_kernels._cuda`). One launch an operator.

Rows are split over blocks, and the blocks counted, as in `triton.py`: the last block of a row puts it together, and the
one that finishes the last row of all does the stages after the seam. Which ones those are does not change a bit of the
result.
"""

from __future__ import annotations

import contextlib
import functools
import os

import torch
from torch import Tensor

from ..rows import OUTPUTS, ChunkScores, ForwardResult, Rows, Scale, Sequences, strides
from .base import Backend
from .native import DTYPE, REDUCTION, native_rows, pointer

_import_error = None
try:
    from .. import _cuda
except ImportError as error:
    _cuda, _import_error = None, str(error)

# KTO_KERNELS_CUDA_EMULATE=1 at import: the kernels run on the host, block after block, on CPU tensors. For tests.
_emulation, _emulation_error = None, None
if os.environ.get("KTO_KERNELS_CUDA_EMULATE") == "1":
    try:
        from .. import _cuda_emulation as _emulation
    except ImportError as error:
        _emulation_error = f"the emulation is not built with KTO_KERNELS_CUDA_EMULATION=1 ({error})"

CAPABILITY = (8, 0)  # the oldest architecture built for
THREADS, UNROLL = 128, 4  # of kernels.cu and kernels.cuh: what one step of a block reads
MAX_SPLITS = 32
# Blocks wanted per multiprocessor: 8 are resident, and a second round evens out what they leave.
BLOCKS_PER_PROCESSOR = 16

# Of values given in any type; 3 is kF64 of csrc/cuda/launch.h.
_VALUE_DTYPE = {**DTYPE, torch.float64: 3}


# Launch parameters ────────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def row_splits(rows: int, vocab: int, dtype: torch.dtype, processors: int) -> int:
    """How many blocks share a row: enough to fill the chip with few rows, one with many."""
    steps = -(-vocab * dtype.itemsize // (UNROLL * THREADS * 16))
    return max(1, min(BLOCKS_PER_PROCESSOR * processors // max(1, rows), steps, MAX_SPLITS))


@functools.cache
def _default_stream_arrivals(device: torch.device, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def _arrivals(device: torch.device) -> Tensor:
    """Zeroed counters for one launch: one for all rows, and one for each where rows are split.

    Calls on the default stream share one buffer: they run one after another, and each leaves zeros behind. Other streams
    may run beside it, and a captured graph may be replayed anywhere, so that there each call zeroes its own.
    """
    # Rows are split only where two blocks a row are not too many.
    count = 1 + BLOCKS_PER_PROCESSOR * _processors(device) // 2
    if device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        return _default_stream_arrivals(device, count)
    return torch.zeros(count, dtype=torch.int32, device=device)


def _native(device: torch.device):
    return _cuda if device.type == "cuda" else _emulation


@contextlib.contextmanager
def _target(device: torch.device):
    """Where to launch: the device, made current, and the caller's stream there."""
    if device.type != "cuda":
        yield {"device": 0, "stream": 0}
        return
    with torch.cuda.device(device):
        yield {"device": device.index, "stream": torch.cuda.current_stream(device).cuda_stream}


# Arguments ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rows(rows: Rows):
    if rows.vocab >= 1 << 31:
        raise ValueError(f"logits: backend='cuda' takes a vocabulary below 2**31, got {rows.vocab}")
    return native_rows(_native(rows.logits.device), rows)


def _forward(policy: Rows, scale: Scale, sets: list, n_rows: int, stages) -> None:
    """`sets` hold `n_rows` rows like those of `policy`."""
    device = policy.logits.device
    native = _native(device)
    splits = row_splits(n_rows, policy.vocab, policy.logits.dtype, _processors(device))
    shares = torch.empty((n_rows, splits, 2) if splits > 1 else 0, dtype=torch.float64, device=device)
    arrivals = _arrivals(device)
    arguments = {
        "sets": sets,
        "scale": native.Scale(**vars(scale)),
        "splits": splits,
        "shares": pointer(shares),
        "arrivals": pointer(arrivals),
        "stages": stages,
    }
    with _target(device) as target:
        native.forward(**arguments, **target)


# Launchers ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class CudaBackend(Backend):
    name = "cuda"

    def unavailable(self, device):
        if device.type == "cpu" and (_emulation is not None or _emulation_error is not None):
            return _emulation_error
        if _cuda is None:
            return f"not built ({_import_error}; it is where nvcc is found, or see KTO_KERNELS_CUDA=1 in setup.py)"
        if not torch.cuda.is_available():
            return "built, no device"
        if device.type != "cuda":
            return f"it runs on CUDA tensors, not on {device.type}"
        if torch.version.hip is not None:
            return "it runs on NVIDIA devices"
        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY:
            return "built for compute capability {}.{} and later, the device has {}.{}".format(*CAPABILITY, *capability)
        return None

    def token_logps(self, rows, scale):
        device = rows.logits.device
        logps = torch.empty(rows.labels.shape, dtype=torch.float32, device=device)
        statistics = torch.empty((2, *rows.labels.shape), dtype=torch.float32, device=device)
        if rows.n_rows == 0:
            return logps, statistics
        native, _keep = _rows(rows)
        row_set = _native(device).RowSet(
            rows=native, logps=pointer(logps), maximum=pointer(statistics[0]), sum=pointer(statistics[1])
        )
        _forward(rows, scale, [row_set], rows.n_rows, None)
        return logps, statistics

    def kto_forward(self, policy, scale, desirable, ref, kl, kl_policy, kl_ref, options):
        device = policy.logits.device
        native = _native(device)

        def empty(shape, dtype=torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

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
        counts = empty(count, torch.float64) if average else None
        keep = []  # the tensors behind pointers, until the launch

        def row_set(rows: Rows, sums: Tensor, logps: Tensor, **pointers: int):
            native_rows, cu_seqlens = _rows(rows)
            keep.extend((cu_seqlens, sums, logps))
            return native.RowSet(rows=native_rows, logps=pointer(logps), sums=pointer(sums), **pointers)

        sets = [
            row_set(
                policy,
                result.logps,
                result.token_logps,
                maximum=pointer(result.statistics[0]),
                sum=pointer(result.statistics[1]),
                counts=pointer(counts),
            )
        ]

        def values(tensor: Tensor | None):
            if tensor is None:
                return native.Values(data=0, type=0, stride=0)
            keep.append(tensor)
            stride = tensor.stride(0) if tensor.dim() == 1 else 0
            # A tensor without elements may have no address, and is not absent.
            return native.Values(data=pointer(tensor) or 1, type=_VALUE_DTYPE[tensor.dtype], stride=stride)

        def side(sequences: Sequences, sums: Tensor | None = None):
            """Sequence log-probabilities: those given, or where the kernel puts its own."""
            rows = sequences.rows
            if rows is None:
                return values(sequences.logps)
            sums = empty(rows.n_sequences, torch.float64) if sums is None else sums
            sets.append(row_set(rows, sums, empty(rows.n_rows)))
            return values(sums)

        n_kl = 0
        if kl_policy.rows is not None:
            n_kl = kl_policy.rows.n_sequences
        elif kl_policy.logps is not None:
            n_kl = kl_policy.logps.numel()
        n_rows = policy.n_rows + sum(s.rows.n_rows for s in (ref, kl_policy, kl_ref) if s.rows is not None)
        stages = native.Stages(
            average=average,
            reduction=REDUCTION[options.reduction],
            n_sequences=count,
            n_kl=n_kl,
            logps=pointer(result.logps),
            counts=pointer(counts),
            ref_logps=side(ref, result.ref_logps),
            kl_logps=side(kl_policy),
            kl_ref_logps=side(kl_ref),
            kl=values(kl if isinstance(kl, Tensor) else None),
            kl_value=0.0 if isinstance(kl, Tensor) else kl,
            desirable=pointer(desirable),
            desirable_stride=desirable.stride(0),
            beta=options.beta,
            desirable_weight=options.desirable_weight,
            undesirable_weight=options.undesirable_weight,
            loss=pointer(result.loss),
            ref_logps_out=pointer(result.ref_logps),
            rewards=pointer(result.rewards),
            kl_out=pointer(result.kl),
            coefficients=pointer(result.coefficients),
        )
        _forward(policy, scale, sets, n_rows, stages)
        return result

    def logits_backward(self, rows, scale, grad, coefficients, token_logps, statistics, out):
        if rows.n_rows == 0:
            return
        device = rows.logits.device
        native = _native(device)
        native_rows, _keep = _rows(rows)
        if any(grad.stride()):  # else one value for all, as a sum's gradient comes
            grad = grad.contiguous()
        out_b, out_t = strides(out.unsqueeze(0) if out.dim() == 2 else out)
        arguments = {
            "rows": native_rows,
            "scale": native.Scale(**vars(scale)),
            "grad": pointer(grad),
            "grad_stride": 1 if any(grad.stride()) else 0,
            "coefficients": pointer(coefficients),
            "logps": pointer(token_logps),
            "maximum": pointer(statistics[0]),
            "sum": pointer(statistics[1]),
            "out": pointer(out),
            "out_stride_b": out_b,
            "out_stride_t": out_t,
            "splits": row_splits(rows.n_rows, rows.vocab, rows.logits.dtype, _processors(device)),
        }
        with _target(device) as target:
            native.backward(**arguments, **target)

    def score_chunk(self, logits, labels, scale, gradient, outputs):
        device = logits.device
        native = _native(device)

        def empty(dtype=torch.float32) -> Tensor:
            return torch.empty(labels.shape, dtype=dtype, device=device)

        scores = ChunkScores(
            logps=empty(), **{name: empty(torch.bool if name == "is_top1" else torch.float32) for name in outputs}
        )
        if labels.numel() == 0:
            return scores
        native_rows, _keep = _rows(Rows(logits, labels, None, shift=False, ignore_index=-1))
        arguments = {
            "rows": native_rows,
            "scale": native.Scale(**vars(scale)),
            "gradient": pointer(logits if gradient else None),
            "logps": pointer(scores.logps),
            **{name: pointer(getattr(scores, name)) for name in OUTPUTS},
        }
        with _target(device) as target:
            native.score_chunk(**arguments, **target)
        return scores

    def scale_(self, tensor, factor):
        device, count = tensor.device, tensor.numel()
        if factor.device != device:  # on the host, where it costs no wait to read it
            return super().scale_(tensor, factor)
        if count == 0:
            return
        native = _native(device)
        steps = -(-count * tensor.dtype.itemsize // (UNROLL * THREADS * 16))
        arguments = {
            "data": pointer(tensor),
            "dtype": DTYPE[tensor.dtype],
            "count": count,
            "factor": native.Values(data=pointer(factor), type=_VALUE_DTYPE[factor.dtype], stride=0),
            "blocks": min(steps, BLOCKS_PER_PROCESSOR * _processors(device)),
        }
        with _target(device) as target:
            native.multiply(**arguments, **target)
