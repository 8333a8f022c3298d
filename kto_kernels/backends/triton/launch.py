"""`backend="triton"`: launchers for the kernels of `logits.py`, `chunk.py` and `sequences.py`. Each operator is one launch.

Where there are fewer rows than the chip can work on, each row is split over several programs. The last of a row's
programs to finish merges the row's shares, and the program that finishes the last row of all does the stages after the
seam. The result has the same bits whichever program is last, as every sum has one order. Programs find out whether they
are last by counters, which must be zero at the start of a launch and which the kernel sets back to zero (`gpu.arrivals`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..._requirements import TRITON, older
from ...options import Objective, Scale
from ...records import ChunkScores, Closing, ForwardResult, Rows, Side, strides
from .. import gpu
from ..base import Backend
from .compiled import Launcher, known

_import_error: str | None = None
kernels: Any = None  # Triton's kernels have no types
chunk_kernels: Any = None
sequence_kernels: Any = None
try:
    import triton

    if older(triton.__version__, TRITON):
        raise ImportError("Triton {}.{} or later is needed, found {}".format(*TRITON, triton.__version__))
    from . import chunk as chunk_kernels
    from . import logits as kernels
    from . import sequences as sequence_kernels
except ImportError as _error:
    triton, _import_error = None, str(_error)

# Under TRITON_INTERPRET=1 at import, Triton's interpreter runs the kernels in NumPy, on tensors of any device.
INTERPRETED = kernels is not None and not isinstance(kernels.forward_kernel, triton.JITFunction)

THREADS = 128
# The chunk kernel reads its rows twice, the second time from the L2 cache where all rows under way fit into CHUNK_CACHE
# of it together: 132 rows of 128,256 bf16 logits are 34 MB of an H100's 50. A multiprocessor holds CHUNK_THREADS of
# the kernel: one program, which keeps the fewest rows under way, or up to CHUNK_PROGRAMS smaller ones, of which some
# load while others compute.
CHUNK_THREADS, CHUNK_PROGRAMS, CHUNK_CACHE = 1024, 4, 0.75
UNROLL = 4  # vectors of 16 bytes that a thread loads before it uses the first
SHORT_UNROLL = (
    2  # where a softcap, a chunk's outputs and 16-bit logits come two together: with more, registers would spill
)
MAX_SPLITS = 64

# Launch parameters ────────────────────────────────────────────────────────────────────────────────────────────────────


def blocks(dtype: torch.dtype, threads: int = THREADS, unroll: int = UNROLL) -> dict[str, int]:
    """A kernel's block sizes, which depend on no shape; VECTOR is how many elements are 16 bytes."""
    return {"UNROLL": unroll, "THREADS": threads, "VECTOR": 16 // dtype.itemsize}


def unroll(dtype: torch.dtype, scale: Scale, outputs: tuple[str, ...] = ()) -> int:
    crowded = (scale.softcap is not None) + bool(outputs) + (dtype.itemsize < 4)
    return SHORT_UNROLL if crowded > 1 else UNROLL


def options(hip: bool, warp_size: int, threads: int) -> dict[str, int]:
    """The compiler's options. It must not fuse products with sums: the kernels do where one rounding is wanted, and else
    count on two. With 64 registers 1024 threads fit on a multiprocessor, and no kernel spills; without a limit the
    compiler guarantees neither."""
    return {
        "num_warps": threads // warp_size,
        "num_stages": 1,
        "enable_fp_fusion": False,
        **({} if hip else {"maxnreg": 64}),
    }


def row_splits(n_rows: int, vocab: int, dtype: torch.dtype, processors: int) -> int:
    """How many programs share a row: one where there are many rows, with few rows enough to fill the chip."""
    tiles = triton.cdiv(vocab, math.prod(blocks(dtype).values()))
    return max(1, min(gpu.PROGRAMS_PER_PROCESSOR * processors // max(1, n_rows), tiles, MAX_SPLITS))


def chunk_threads(row_bytes: int, processors: int, cache_bytes: int) -> int:
    """The threads of a chunk program: as few as keep the rows under way in the cache."""
    programs = CHUNK_PROGRAMS
    while programs > 1 and processors * programs * row_bytes > CHUNK_CACHE * cache_bytes:
        programs //= 2
    return CHUNK_THREADS // programs


@functools.cache
def _options(device: torch.device, threads: int) -> dict[str, int]:
    return options(torch.version.hip is not None, torch.cuda.get_device_properties(device).warp_size, threads)


@functools.cache
def _launcher(kernel) -> Launcher:
    return Launcher(kernel, known(triton.__version__))


def _launch(kernel, device: torch.device, programs: int, arguments: dict) -> None:
    if INTERPRETED:
        import numpy  # which the interpreter computes with; it warns of infinities, which a GPU does not

        with numpy.errstate(all="ignore"):
            kernel[(programs,)](**arguments)
        return
    with torch.cuda.device(device):
        _launcher(kernel)(device, programs, arguments, _options(device, arguments["THREADS"]))


# Arguments ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _layout_arguments(rows: Rows | None, prefix: str = "", n_sequences: int = 0) -> dict:
    """Labels and sequences, which policy and reference share. Without rows: `n_sequences` sequences whose sums are
    given."""
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


def _vector_arguments(name: str, values: Tensor | None) -> dict:
    return {name: values, f"{name}_stride": 0 if values is None else values.stride(0)}


def _objective_arguments(objective: Objective) -> dict:
    names = ("beta", "desirable_weight", "undesirable_weight")
    return {name: getattr(objective, name) for name in names}


def _scale_arguments(scale: Scale) -> dict:
    """How logits become scores u, and scores become z = outer·u: u is the logit or, under a softcap,
    tanh(inner·logit)."""
    softcap = scale.softcap
    return {
        "inner": 1.0 if softcap is None else scale.logit_scale / softcap,
        "outer": scale.outer,
        "rate": scale.outer * math.log2(math.e),
        "SOFTCAP": softcap is not None,
    }


def _scoring_arguments(rows: Rows, scale: Scale) -> dict:
    return {
        "vocab": rows.vocab,
        "ignore_index": rows.ignore_index,
        "SHIFT": rows.shift,
        **_scale_arguments(scale),
        **blocks(rows.logits.dtype, unroll=unroll(rows.logits.dtype, scale)),
    }


def _split_arguments(n_rows: int, rows: Rows) -> dict:
    """How `n_rows` rows like those of `rows`, the rows of all sets together, are split."""
    device = rows.logits.device
    splits = row_splits(n_rows, rows.vocab, rows.logits.dtype, gpu.processors(device))
    return {
        "shares": torch.empty((n_rows, splits, 2) if splits > 1 else 0, dtype=torch.float32, device=device),
        "arrivals": gpu.arrivals(device),
        "splits": splits,
        "MAX_SPLITS": MAX_SPLITS,
    }


_OF_SEQUENCES = (
    "token_logps", "offsets", "counts", "lengths", "logps", "slopes", "losses", "rewards", "divisor", "factor"
)  # fmt: skip


def _sequences(
    sums: Tensor | None, ref_logps: Tensor | None, z0: Tensor, desirable: Tensor, objective: Objective,
    n_rows: int = 0, reduced_by: int = 1, **tensors: Tensor | None,
) -> None:  # fmt: skip
    """Launches `sequences_kernel`; tensors that are not given are None to it."""
    if len(desirable) == 0:
        return
    arguments = {
        **dict.fromkeys(_OF_SEQUENCES),
        **tensors,
        "n_rows": n_rows,
        "n_sequences": len(desirable),
        "sums": sums,
        **_vector_arguments("ref_logps", ref_logps),
        "z0": z0,
        **_vector_arguments("desirable", desirable),
        **_objective_arguments(objective),
        "reduced_by": reduced_by,
        "AVERAGE": tensors.get("counts") is not None,
        "BLOCK": 128,
        "THREADS": THREADS,
    }
    _launch(sequence_kernels.sequences_kernel, desirable.device, 1, arguments)


# Launchers ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class TritonBackend(Backend):
    name = "triton"

    def unavailable(self, device: torch.device) -> str | None:
        if kernels is None:
            return f"Triton is not there ({_import_error}); pip install triton"
        if device.type == "cuda" or (INTERPRETED and device.type == "cpu"):
            return None
        return "it runs on CUDA tensors, or on the CPU under TRITON_INTERPRET=1"

    def token_logps(self, rows: Rows, scale: Scale) -> tuple[Tensor, Tensor]:
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

    def kto_forward(
        self, policy: Rows, scale: Scale, desirable: Tensor, ref: Side, kl: Tensor | float, kl_policy: Side,
        ref_kl: Side, objective: Objective,
    ) -> ForwardResult:  # fmt: skip
        device = policy.logits.device

        def empty(shape, dtype=torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def sums(side: Side, filled: Tensor | None = None) -> Tensor | None:
            """A side's sequence log-probabilities: the given ones, or a buffer that the kernel writes them to."""
            if side.rows is None:
                return side.logps
            return empty(side.rows.n_sequences, torch.float64) if filled is None else filled

        count, average = policy.n_sequences, objective.average_log_prob
        result = ForwardResult.empty(policy.labels, count, objective, torch.float32)
        kl_rows = kl_policy.rows or ref_kl.rows
        kl_layout = _layout_arguments(kl_rows, "kl_", 0 if kl_policy.logps is None else kl_policy.logps.numel())
        others = sum(side.rows.n_rows for side in (ref, kl_policy, ref_kl) if side.rows)
        all_rows = policy.n_rows + others
        split = _split_arguments(all_rows, policy)
        arguments = {
            **_logits_arguments(policy),
            **_logits_arguments(ref.rows, "ref_logits"),
            **_layout_arguments(policy),
            **_logits_arguments(kl_policy.rows, "kl_logits"),
            **_logits_arguments(ref_kl.rows, "ref_kl_logits"),
            **kl_layout,
            **_scoring_arguments(policy, scale),
            **_vector_arguments("desirable", desirable),
            **_vector_arguments("ref_sums", sums(ref, result.ref_logps)),
            **_vector_arguments("kl_sums", sums(kl_policy)),
            **_vector_arguments("ref_kl_sums", sums(ref_kl)),
            "kl": kl if isinstance(kl, Tensor) else None,
            "kl_value": 0.0 if isinstance(kl, Tensor) else kl,
            **_objective_arguments(objective),
            **{"z0" if name == "kl" else name: value for name, value in vars(result).items()},
            "other_logps": empty(others) if ref.rows or kl_rows else None,
            "scored": empty(policy.n_rows + kl_layout["kl_n_rows"]) if average else None,
            "counts": empty(count, torch.float64) if average else None,
            "kl_counts": empty(kl_layout["kl_n_sequences"], torch.float64) if average and kl_rows else None,
            **split,
            "AVERAGE": average,
            "REDUCTION": objective.reduction,
        }
        _launch(kernels.forward_kernel, device, max(1, all_rows) * split["splits"], arguments)
        return result

    def logits_backward(
        self, rows: Rows, scale: Scale, grad: Tensor, coefficients: Tensor | None, token_logps: Tensor, statistics: Tensor,
        out: Tensor,
    ) -> None:  # fmt: skip
        if rows.n_rows == 0:
            return
        device = rows.logits.device
        if coefficients is None:
            grad_b, grad_t = strides(grad, 2)
        else:
            grad_b, grad_t = grad.stride(0) if grad.dim() == 1 else 0, 0
        out_b, out_t = strides(out, 3)
        splits = row_splits(rows.n_rows, rows.vocab, rows.logits.dtype, gpu.processors(device))
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
        }
        _launch(kernels.logits_backward_kernel, device, rows.n_rows * splits, arguments)

    def score_chunk(
        self, logits: Tensor, labels: Tensor, scale: Scale, gradient: bool, outputs: tuple[str, ...]
    ) -> ChunkScores:
        device, (count, vocab) = logits.device, logits.shape
        scores = ChunkScores.empty(labels, outputs)
        threads = chunk_threads(vocab * logits.element_size(), gpu.processors(device), gpu.cache_bytes(device))
        if count > 0:
            arguments = {
                "logits": logits,
                "logits_stride": logits.stride(0),
                "labels": labels,
                "labels_stride": labels.stride(0),
                "vocab": vocab,
                **_scale_arguments(scale),
                **vars(scores),
                "GRADIENT": gradient,
                **blocks(logits.dtype, threads, unroll(logits.dtype, scale, outputs)),
            }
            _launch(chunk_kernels.chunk_kernel, device, count, arguments)
        return scores

    def value_stages(
        self, logps: Tensor, ref_logps: Tensor | None, z0: Tensor, desirable: Tensor, objective: Objective
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses, slopes, rewards = (logps.new_empty(logps.shape) for _ in range(3))
        results = {"slopes": slopes, "losses": losses, "rewards": rewards}
        _sequences(logps.contiguous(), ref_logps, z0, desirable, objective, **results)
        return losses, slopes, rewards

    def close_sequences(self, closing: Closing, objective: Objective) -> Tensor | None:
        given, divisor = closing.sums, closing.divisor
        factor = None if divisor is None or not len(closing.slopes) else torch.empty_like(divisor)
        begin, end = closing.rows
        of_rows = {"token_logps": closing.token_logps, "offsets": closing.offsets, "n_rows": end - begin}
        _sequences(
            given, closing.ref_logps, closing.z0, closing.desirable, objective,
            **(of_rows if given is None else {}),
            counts=closing.tokens if objective.average_log_prob else None,
            lengths=None if divisor is None else closing.lengths,
            reduced_by=max(1, closing.batch) if objective.reduction == "mean" else 1,
            logps=closing.logps, slopes=closing.slopes, divisor=divisor, factor=factor,
        )  # fmt: skip
        return factor

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        if tensor.numel() == 0:
            return
        device, sizes = tensor.device, blocks(tensor.dtype)
        tiles = triton.cdiv(tensor.numel(), math.prod(sizes.values()))
        arguments = {
            "tensor": tensor,
            "count": tensor.numel(),
            "factor": factor,
            **sizes,
        }
        # Few programs, as each of them must read the factor even if that is 1.
        programs = min(tiles, gpu.PROGRAMS_PER_PROCESSOR * gpu.processors(device))
        _launch(chunk_kernels.scale_kernel, device, programs, arguments)
