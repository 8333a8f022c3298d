"""`backend="cuda"`: launchers for the CUDA C++ kernels of `csrc/cuda` (`kto_kernels._cuda`), one launch an operator.

Rows are split over blocks, and finished blocks counted, as in `triton/launch.py`: the last of a row's blocks merges the
row's shares, and the block that finishes the last row of all does the stages after the seam. The result has the same bits
whichever block is last.
"""

from __future__ import annotations

import contextlib
import os

import torch
from torch import Tensor

from ..options import OUTPUTS, Objective, Scale
from ..records import ChunkScores, Closing, ForwardResult, Rows, Side, strides
from . import gpu
from .base import Backend
from .native import DTYPE, objective_fields, pointer, row_fields, stage_fields

_import_error = None
try:
    from .. import _cuda
except ImportError as _error:
    _cuda, _import_error = None, str(_error)

# Under KTO_KERNELS_CUDA_EMULATE=1 at import, for tests, the kernels run on the host, block after block, on CPU tensors.
_emulation, _emulation_error = None, None
if os.environ.get("KTO_KERNELS_CUDA_EMULATE") == "1":
    try:
        from .. import _cuda_emulation as _emulation
    except ImportError as _error:
        _emulation_error = f"the emulation is not built with KTO_KERNELS_CUDA_EMULATION=1 ({_error})"

CAPABILITY = (8, 0)  # the oldest architecture built for
THREADS, UNROLL = 128, 4  # as in kernels.cu and kernels.cuh: one step of a block reads THREADS * UNROLL vectors
MAX_SPLITS = 32

# The type codes of Values in csrc/cuda/launch.h; 3 is kF64.
_VALUE_DTYPE = {**DTYPE, torch.float64: 3}


# Launch parameters ────────────────────────────────────────────────────────────────────────────────────────────────────


def row_splits(n_rows: int, vocab: int, dtype: torch.dtype, processors: int) -> int:
    """How many blocks share a row: one where there are many rows, with few rows enough to fill the chip."""
    steps = -(-vocab * dtype.itemsize // (UNROLL * THREADS * 16))
    return max(1, min(gpu.PROGRAMS_PER_PROCESSOR * processors // max(1, n_rows), steps, MAX_SPLITS))


def _native(device: torch.device):
    return _cuda if device.type == "cuda" else _emulation


@contextlib.contextmanager
def _target(device: torch.device):
    """Makes the device current, and yields it with the caller's stream there: the Target of csrc/cuda/launch.h."""
    if device.type != "cuda":
        yield {"device": 0, "stream": 0}
        return
    with torch.cuda.device(device):
        yield {"device": device.index, "stream": torch.cuda.current_stream(device).cuda_stream}


# Arguments ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _row_fields(rows: Rows):
    if rows.vocab >= 1 << 31:
        raise ValueError(f"logits: backend='cuda' takes a vocabulary below 2**31, got {rows.vocab}")
    return row_fields(rows)


def _row_set(
    rows: Rows,
    logps: Tensor,
    statistics: Tensor | None = None,
    sums: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[dict, Tensor | None]:
    """The fields of RowSet in csrc/cuda/launch.h, and a tensor that the caller must keep alive behind an address in
    them. A result that is None is not wanted."""
    fields, keep = _row_fields(rows)
    row_set = {
        "rows": fields,
        "logps": pointer(logps),
        "origin": 0 if statistics is None else pointer(statistics[0]),
        "sum": 0 if statistics is None else pointer(statistics[1]),
        "sums": pointer(sums),
        "counts": pointer(counts),
    }
    return row_set, keep


def _values(tensor: Tensor | None) -> dict:
    """The fields of Values in csrc/cuda/launch.h."""
    if tensor is None:
        return {"data": 0, "type": 0, "stride": 0}
    stride = tensor.stride(0) if tensor.dim() == 1 else 0
    # Address 0 means absent, but a tensor without elements may have it too.
    return {"data": pointer(tensor) or 1, "type": _VALUE_DTYPE[tensor.dtype], "stride": stride}


_OF_SEQUENCES = (
    "token_logps", "offsets", "counts", "lengths", "logps", "slopes", "losses", "rewards", "divisor", "factor"
)  # fmt: skip


def _sequences(
    sums: Tensor | None, ref_logps: Tensor | None, z0: Tensor, desirable: Tensor, objective: Objective,
    average: bool = False, reduced_by: int = 1, **tensors: Tensor | None,
) -> None:  # fmt: skip
    """Launches `sequences`; tensors that are not given are null to it."""
    if len(desirable) == 0:
        return
    arguments = {
        **{name: pointer(tensors.get(name)) for name in _OF_SEQUENCES},
        "n_sequences": len(desirable),
        "sums": pointer(sums),
        "average": average,
        "ref_logps": _values(ref_logps),
        "z0": _values(z0),
        "desirable": pointer(desirable),
        "desirable_stride": desirable.stride(0),
        **objective_fields(objective),
        "reduced_by": float(reduced_by),
    }
    with _target(desirable.device) as target:
        _native(desirable.device).sequences(arguments, target)


def _forward(policy: Rows, scale: Scale, sets: list[dict], n_rows: int, stages: dict | None) -> None:
    """Launches the forward on `sets` of rows like those of `policy`, `n_rows` of them together."""
    device = policy.logits.device
    splits = row_splits(n_rows, policy.vocab, policy.logits.dtype, gpu.processors(device))
    shares = torch.empty((n_rows, splits, 2) if splits > 1 else 0, dtype=torch.float64, device=device)
    arrivals = gpu.arrivals(device)
    arguments = {
        "scale": vars(scale),
        "splits": splits,
        "shares": pointer(shares),
        "arrivals": pointer(arrivals),
    }
    with _target(device) as target:
        _native(device).forward(sets, stages, arguments, target)


# Launchers ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class CudaBackend(Backend):
    name = "cuda"

    def unavailable(self, device: torch.device) -> str | None:
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

    def token_logps(self, rows: Rows, scale: Scale) -> tuple[Tensor, Tensor]:
        device = rows.logits.device
        logps = torch.empty(rows.labels.shape, dtype=torch.float32, device=device)
        statistics = torch.empty((2, *rows.labels.shape), dtype=torch.float32, device=device)
        if rows.n_rows == 0:
            return logps, statistics
        row_set, _keep = _row_set(rows, logps, statistics)
        _forward(rows, scale, [row_set], rows.n_rows, None)
        return logps, statistics

    def kto_forward(
        self, policy: Rows, scale: Scale, desirable: Tensor, ref: Side, kl: Tensor | float, kl_policy: Side,
        ref_kl: Side, objective: Objective,
    ) -> ForwardResult:  # fmt: skip
        device = policy.logits.device

        def empty(shape, dtype=torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        count, average = policy.n_sequences, objective.average_log_prob
        result = ForwardResult.empty(policy.labels, count, objective, torch.float32)
        counts = empty(count, torch.float64) if average else None
        keep = []  # the tensors behind addresses, until the launch

        def add_set(rows: Rows, logps: Tensor, *results: Tensor | None) -> None:
            row_set, cu_seqlens = _row_set(rows, logps, *results)
            sets.append(row_set)
            keep.extend((cu_seqlens, logps, *results))

        sets: list[dict] = []
        add_set(policy, result.token_logps, result.statistics, result.logps, counts)

        def values(tensor: Tensor | None) -> dict:
            keep.append(tensor)
            return _values(tensor)

        def side(sequences: Side, sums: Tensor | None = None) -> dict:
            """A side's sequence log-probabilities: the given ones, or a buffer that the kernel writes them to."""
            rows = sequences.rows
            if rows is None:
                return values(sequences.logps)
            sums = empty(rows.n_sequences, torch.float64) if sums is None else sums
            add_set(rows, empty(rows.n_rows), None, sums)
            return values(sums)

        n_kl = 0
        if kl_policy.rows is not None:
            n_kl = kl_policy.rows.n_sequences
        elif kl_policy.logps is not None:
            n_kl = kl_policy.logps.numel()
        n_rows = policy.n_rows + sum(s.rows.n_rows for s in (ref, kl_policy, ref_kl) if s.rows is not None)
        stages = stage_fields(result, objective, desirable, counts) | {
            "n_kl": n_kl,
            "ref_logps": side(ref, result.ref_logps),
            "kl_logps": side(kl_policy),
            "ref_kl_logps": side(ref_kl),
            "kl": values(kl if isinstance(kl, Tensor) else None),
            "kl_value": 0.0 if isinstance(kl, Tensor) else kl,
            "desirable_stride": desirable.stride(0),
            "ref_logps_out": pointer(result.ref_logps),
        }
        _forward(policy, scale, sets, n_rows, stages)
        return result

    def logits_backward(
        self, rows: Rows, scale: Scale, grad: Tensor, coefficients: Tensor | None, token_logps: Tensor, statistics: Tensor,
        out: Tensor,
    ) -> None:  # fmt: skip
        if rows.n_rows == 0:
            return
        device = rows.logits.device
        fields, _keep = _row_fields(rows)
        if any(grad.stride()):  # all strides are 0 where one value is expanded, as in the gradient of a sum
            grad = grad.contiguous()
        out_b, out_t = strides(out, 3)
        arguments = {
            "rows": fields,
            "scale": vars(scale),
            "grad": pointer(grad),
            "grad_stride": 1 if any(grad.stride()) else 0,
            "coefficients": pointer(coefficients),
            "logps": pointer(token_logps),
            "origin": pointer(statistics[0]),
            "sum": pointer(statistics[1]),
            "out": pointer(out),
            "out_stride_b": out_b,
            "out_stride_t": out_t,
            "splits": row_splits(rows.n_rows, rows.vocab, rows.logits.dtype, gpu.processors(device)),
        }
        with _target(device) as target:
            _native(device).backward(arguments, target)

    def score_chunk(
        self, logits: Tensor, labels: Tensor, scale: Scale, gradient: bool, outputs: tuple[str, ...]
    ) -> ChunkScores:
        scores = ChunkScores.empty(labels, outputs)
        if labels.numel() == 0:
            return scores
        fields, _keep = _row_fields(Rows(logits, labels, None, shift=False, ignore_index=-1))
        addresses = {name: pointer(getattr(scores, name)) for name in ("logps", *OUTPUTS)}
        arguments = {"rows": fields, "scale": vars(scale), "gradient": pointer(logits if gradient else None)}
        with _target(logits.device) as target:
            _native(logits.device).score_chunk(arguments | addresses, target)
        return scores

    def value_stages(
        self, logps: Tensor, ref_logps: Tensor | None, z0: Tensor, desirable: Tensor, objective: Objective
    ) -> tuple[Tensor, Tensor, Tensor]:
        logps = logps.contiguous()
        losses, slopes, rewards = (torch.empty_like(logps) for _ in range(3))
        results = {"slopes": slopes, "losses": losses, "rewards": rewards}
        _sequences(logps, ref_logps, z0, desirable, objective, **results)
        return losses, slopes, rewards

    def close_sequences(self, closing: Closing, objective: Objective) -> Tensor | None:
        divisor = closing.divisor
        factor = None if divisor is None or not len(closing.slopes) else torch.empty_like(divisor)
        given = closing.sums is not None
        _sequences(
            closing.sums, closing.ref_logps, closing.z0, closing.desirable, objective,
            token_logps=None if given else closing.token_logps,
            offsets=None if given else closing.offsets,
            average=objective.average_log_prob,
            counts=closing.counts,
            lengths=closing.lengths,
            reduced_by=max(1, closing.batch) if objective.reduction == "mean" else 1,
            logps=closing.logps, slopes=closing.slopes, divisor=divisor, factor=factor,
        )  # fmt: skip
        return factor

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        device, count = tensor.device, tensor.numel()
        if factor.device != device:  # the factor is on the host, where reading it waits for nothing
            return super().scale_(tensor, factor)
        if count == 0:
            return
        steps = -(-count * tensor.dtype.itemsize // (UNROLL * THREADS * 16))
        arguments = {
            "data": pointer(tensor),
            "dtype": DTYPE[tensor.dtype],
            "count": count,
            "factor": _values(factor),
            "blocks": min(steps, gpu.PROGRAMS_PER_PROCESSOR * gpu.processors(device)),
        }
        with _target(device) as target:
            _native(device).multiply(arguments, target)
