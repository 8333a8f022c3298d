"""How many kernels a call launches on a GPU, counted on the CPU with Triton's backend: the launcher of Triton's kernels is
stopped short of the launch, and an operator of PyTorch counts as one kernel where its result is new memory. (On a GPU
some operators launch two.) What the CPU does beside is left out: it tests the values of labels, as GPUs do not."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kto_kernels import checks, kto_loss, linear_kto_loss
from kto_kernels.backends.triton import launch
from kto_kernels.ops import schema

# Operators that launch nothing: views, memory that nobody fills, questions about dtypes.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "set_", "record_stream", "_local_scalar_dense"}
_FREE |= {"promote_types"}
_GEMMS = {"mm", "addmm", "bmm", "baddbmm"}


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in _FREE and not func.is_view:
            self.counts["GEMM" if name in _GEMMS else "PyTorch"] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Counts "Triton", "GEMM" and "PyTorch" kernels of the calls with backend "triton" inside."""
    counts: Counter = Counter()

    def launched(*_) -> None:
        counts["Triton"] += 1

    there = mock.patch.object(launch.TritonBackend, "unavailable", lambda self, device: None)
    straight = mock.patch.object(schema, "observed", lambda: False)  # operators hide what they call from the mode
    as_on_a_gpu = mock.patch.object(checks, "readable", lambda tensor: False)
    with there, straight, as_on_a_gpu, mock.patch.object(launch, "_launch", launched), _Counting(counts):
        yield counts


def calls(device: str = "cpu") -> dict[str, Callable[[], torch.Tensor]]:
    """Name → a call that returns a loss to differentiate: two sequences, in one chunk if not said otherwise. The inputs are
    there already, and have no gradient yet that a backward would add to."""
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]], device=device)
    desirable = torch.tensor([True, False], device=device)
    all_logits, all_hidden, head = (
        torch.zeros(shape, dtype=torch.bfloat16, device=device) for shape in ((2, 3, 8), (2, 3, 4), (8, 4))
    )

    def of_logits() -> torch.Tensor:
        logits = all_logits.detach().requires_grad_()
        return kto_loss(logits, labels, desirable, kl=0.0, backend="triton").loss

    def of_hidden(trained: bool, **options) -> torch.Tensor:
        hidden = all_hidden.detach().requires_grad_()
        weight = head.detach().requires_grad_(trained)
        return linear_kto_loss(hidden, weight, labels, desirable, kl=0.0, backend="triton", **options).loss

    return {
        "kto_loss": of_logits,
        f"linear_kto_loss, {TRAINED}": lambda: of_hidden(True),
        f"linear_kto_loss, {TRAINED}, two chunks": lambda: of_hidden(True, max_logits_bytes=3 * 8 * 2),
        f"linear_kto_loss, {FROZEN}": lambda: of_hidden(False),
        f"linear_kto_loss, {FROZEN}, two chunks": lambda: of_hidden(False, max_logits_bytes=3 * 8 * 2),
    }


TRAINED, FROZEN = "trained head", "frozen head"


def of_a_chunk(rows: list[list[str]], head: str) -> int:
    """How many small kernels a further chunk takes, out of the table's rows: all but the GEMMs and the chunk's scores."""
    forward = {row[0]: int(row[2]) + int(row[4]) for row in rows if row[1] == "forward"}
    scores = 1
    return forward[f"linear_kto_loss, {head}, two chunks"] - forward[f"linear_kto_loss, {head}"] - scores


def table() -> tuple[str, list[list[str]]]:
    rows = [["call", "part", "Triton", "GEMMs", "PyTorch"]]
    for name, call in calls().items():
        with counted() as counts:
            call().backward()  # makes what stays
            counts.clear()
            loss = call()
            forward = Counter(counts)
            loss.backward()
            backward = counts - forward
        for part, found in (("forward", forward), ("backward", backward)):
            rows.append([name, part, *(str(found[kind]) for kind in ("Triton", "GEMM", "PyTorch"))])
    return "Kernels that a call launches", rows
