"""The language model's head, and the sum that becomes the head's gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks, reference, releases
from ..backends.base import Backend
from ..options import Scale

# Rows and columns of a tile where a product is rounded to 16 bits before it is added. On a CPU the tile stays in the
# cache; elsewhere it is large enough for a GEMM, and its product takes little memory beside the sum.
_TILE, _TILE_ON_DEVICES = 1024, 8192
# The tensors of a head that may be trained, by the names that they have in records and operators.
HEAD_TENSORS = ("weight", "bias", "adapter_a", "adapter_b")


@dataclass(frozen=True)
class Adapter:
    """A product of low rank (LoRA) beside the head's weight: logits have `scaling · (h Aᵀ) Bᵀ` added."""

    a: Tensor  # (r, H)
    b: Tensor  # (V, r)
    scaling: float

    @classmethod
    def of(cls, adapter: object) -> Adapter | None:
        """The adapter that a caller gave as (A, B, scaling), or None. The tensors are checked with the other inputs."""
        return None if adapter is None else cls(*checks.adapter(adapter))

    def down(self, hidden: Tensor) -> Tensor:  # (C, r)
        """`scaling · h Aᵀ` of hidden states (C, H): `down Bᵀ` are the logits that the adapter adds."""
        return torch.mm(hidden, self.a.t()).mul_(self.scaling)

    def up(self, gradient: Tensor) -> Tensor:  # (C, r)
        """`scaling · g B` of the logits' gradient (C, V): `up A` is what the adapter adds to the hidden states' gradient,
        and `upᵀ h` is the gradient of A."""
        return torch.mm(gradient, self.b).mul_(self.scaling)


@dataclass(frozen=True)
class Head:
    """The language model's head, in the dtype that the GEMMs run in."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    scale: Scale
    adapter: Adapter | None = None

    def project(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """Logits (C, V) of hidden states (C, H), in the front of the buffer."""
        logits = buffer[: hidden.shape[0]]
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
        return logits if self.adapter is None else logits.addmm_(self.adapter.down(hidden), self.adapter.b.t())

    def hidden_gradient(self, gradient: Tensor, up: Tensor | None, out: Tensor | None = None) -> Tensor:
        """The gradient (C, H) of hidden states from that of their logits (C, V), and from `Adapter.up` of the latter."""
        found = torch.mm(gradient, self.weight, out=out)
        return found if up is None else found.addmm_(up, self.adapter.a)


@dataclass(frozen=True)
class Needs:
    """Which gradients are formed."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    adapter_a: bool = False
    adapter_b: bool = False

    @property
    def adapter(self) -> bool:
        return self.adapter_a or self.adapter_b

    @property
    def head(self) -> bool:
        return self.weight or self.bias or self.adapter


@dataclass
class HeadGradient:
    """A sum of gradients of the head, chunk by chunk. The first product makes the buffers."""

    needs: Needs
    dtype: torch.dtype  # of dW: fp32 (fp64 for fp64), or narrower where dW is one product
    weight: Tensor | None = None  # (V, H)
    bias: Tensor | None = None  # (V,)
    adapter_a: Tensor | None = None  # (r, H)
    adapter_b: Tensor | None = None  # (V, r)

    def add(
        self,
        gradient: Tensor,  # (C, V)
        hidden: Tensor,  # (C, H)
        coefficients: Tensor | None,  # (C,)
        adapter: Adapter | None = None,
        up: Tensor | None = None,  # (C, r), `Adapter.up` of the gradient
    ) -> None:
        """Adds `Σ_n c_n · gradient_n ⊗ hidden_n`; without coefficients c = 1. The coefficients scale the hidden states
        in place, whose H columns are fewer than the gradient's V."""
        if coefficients is not None and (self.needs.weight or self.needs.adapter):
            hidden.mul_(coefficients.unsqueeze(-1))
        float_dtype = reference.compute_dtype(gradient.dtype)
        if self.needs.weight:
            self.weight = add_product(self.weight, gradient.t(), hidden, self.dtype)
        if self.needs.adapter:  # A and B alike: one alone would spare next to nothing
            self.adapter_a = add_product(self.adapter_a, up.t(), hidden, float_dtype)
            self.adapter_b = add_product(self.adapter_b, gradient.t(), adapter.down(hidden), float_dtype)
        if self.needs.bias:
            row = gradient.new_ones(1, len(gradient)) if coefficients is None else coefficients.view(1, -1)
            factors = (row.to(gradient.dtype), gradient, float_dtype)
            if self.bias is None:
                self.bias = add_product(None, *factors).squeeze_(0)  # in place: an operator's result is no view
            else:
                add_product(self.bias.view(1, -1), *factors)

    def fold(self, other: HeadGradient, factor: Tensor) -> None:
        """Adds `factor · other`, and empties `other`."""
        for name, theirs in list(other.sums()):
            if (mine := getattr(self, name)) is None:
                setattr(self, name, theirs.mul_(factor))
            else:
                mine.addcmul_(theirs, factor)
            setattr(other, name, None)

    def sums(self) -> Iterator[tuple[str, Tensor]]:
        """The sums that are there, by name."""
        for name in HEAD_TENSORS:
            if (total := getattr(self, name)) is not None:
                yield name, total

    def scale_(self, factor: Tensor, backend: Backend) -> None:
        for _, total in self.sums():
            backend.scale_(total, factor)

    def result(
        self, wanted: dict[str, tuple[Sequence[int], torch.dtype]], divisor: Tensor | None, device: torch.device
    ) -> dict[str, Tensor]:
        """The gradients in the shapes and dtypes `wanted`, by name; zeros where no row was added, empty where a gradient
        is not needed."""

        def finish(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            total = getattr(self, name) if getattr(self.needs, name) else None
            if total is None:
                return torch.zeros(shape, dtype=dtype, device=device)
            return (total if divisor is None else total.mul_(divisor)).to(dtype)

        return {name: finish(name, *kind) for name, kind in wanted.items()}


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the gradient that an operator returns for a weight or bias of this dtype. An fp16 head gets an fp32
    gradient, because small values would underflow before GradScaler's factor arrives from above."""
    return torch.float32 if dtype == torch.float16 else dtype


def add_product(total: Tensor | None, a: Tensor, b: Tensor, first_dtype: torch.dtype) -> Tensor:
    """Adds `a @ b` to `total` in place; without a total, returns the product in `first_dtype`. A total is fp32 (fp64
    for fp64 factors)."""
    if total is None and first_dtype == a.dtype:
        return torch.mm(a, b)
    beta = 1
    if total is None:
        total, beta = torch.empty(a.shape[0], b.shape[1], dtype=first_dtype, device=a.device), 0
    if total.dtype == a.dtype:
        return torch.addmm(total, a, b, beta=beta, out=total)
    addition = releases.addition(a.device)
    if addition == "addmm":
        return torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    if addition == "baddbmm":
        sums = total.unsqueeze(0)  # sum and result are one object, by which PyTorch knows that nothing is to be copied
        torch.baddbmm(sums, a.unsqueeze(0), b.unsqueeze(0), out_dtype=total.dtype, beta=beta, out=sums)
        return total
    # Each product is rounded once to 16 bits, and the sum stays fp32.
    size = _TILE if a.device.type == "cpu" else _TILE_ON_DEVICES
    for rows, part in zip(a.split(size), total.split(size)):
        for columns, tile in zip(b.split(size, 1), part.split(size, 1)):
            product = torch.mm(rows, columns)
            tile.add_(product) if beta else tile.copy_(product)
    return total


# The device types that have autocast: for any other type `torch.is_autocast_enabled` raises. PyTorch is asked at
# import, because torch.compile cannot trace `torch.amp.is_autocast_available` before PyTorch 2.13.
_DEVICE_TYPES = ("cpu", "cuda", "xpu", "hpu", "mps", "mtia", "xla", torch._C._get_privateuse1_backend_name())
_WITH_AUTOCAST = tuple(filter(torch.amp.is_autocast_available, _DEVICE_TYPES))


def gemm_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which every side of a loss is scored, given the policy's hidden states: autocast's dtype where
    autocast is on (it leaves fp64 alone), else the dtype of these hidden states. Heads and the other sides' hidden
    states are cast to it. Were each side scored in a dtype of its own, the sides' log-probabilities would differ by the
    rounding of logits even where policy and reference are the same model."""
    if hidden.dtype != torch.float64 and autocasts(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def autocasts(device_type: str) -> bool:
    return device_type in _WITH_AUTOCAST and torch.is_autocast_enabled(device_type)
