"""Problems for what comes after the log-probabilities of tokens: `close_sequences` and `value_stages`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kto_kernels.backends.base import Backend
from kto_kernels.options import Objective
from kto_kernels.records import Closing

from . import exact
from .draws import LONG, Draw
from .exact import INF, assert_close
from .operators import DTYPES

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Sequences:
    """Some neighbours of a batch are closed, whose token log-probabilities lie among those of others."""

    ref_dtype: torch.dtype
    ref: bool = True
    given: bool = False  # the sums, as over several ranks
    average: bool = False
    divisor: bool = False  # of the slopes, as before fp16 products
    reduction: str = "mean"
    shape: str = "few"  # sequences; "long" ones, "many"

    @classmethod
    def drawn(cls, draw: Draw) -> Sequences:
        flags = (draw.random() < chance for chance in (0.7, 0.3, 0.5, 0.5))
        shape = draw.choice(["few", "few", "few", "long", "many"])
        return cls(draw.choice((*DTYPES, torch.float64)), *flags, draw.choice(["mean", "sum", "none"]), shape)

    def problem(self, draw: Draw) -> tuple[Closing, Objective]:
        count = draw.randint(130, 300) if self.shape == "many" else draw.choice([1, 1, 2, 3, 7, 20])
        longest = LONG + 99 if self.shape == "long" else draw.choice([1, 3, 9, 40])
        first = draw.randint(0, count - 1)
        last = draw.choice([count, draw.randint(first + 1, count)])
        lengths = torch.randint(longest + 1, (count,), generator=draw.torch)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        token_logps = -draw.choice([1e-3, 1.0, 30.0]) * torch.rand(int(offsets[-1]), generator=draw.torch)
        if len(token_logps) and draw.random() < 0.4:  # −inf saturates a loss; NaN stays in its sequence
            for _ in range(3):
                token_logps[draw.randrange(len(token_logps))] = draw.choice([-INF, -INF, -1e6, torch.nan])
        sums = counts = None
        if self.given:
            sums = -draw.choice([0.1, 50.0, 1e4]) * torch.rand(last - first, generator=draw.torch).double()
            counts = (lengths + torch.randint(9, lengths.shape, generator=draw.torch)).double()[first:last]
        ref = -9.0 * torch.rand(count, draw.choice([1, 2]), generator=draw.torch)[:, -1]
        if draw.random() < 0.2:
            ref[draw.randrange(count)] = -INF
        nothing = torch.full((count,), torch.nan, dtype=torch.float64)
        closing = Closing(
            token_logps=token_logps,
            rows=(int(offsets[first]), int(offsets[last])),
            offsets=offsets[first : last + 1],
            sums=sums,
            lengths=lengths[first:last],
            counts=counts,
            ref_logps=ref.to(self.ref_dtype)[first:last] if self.ref else None,
            z0=torch.tensor(draw.choice([0.0, 0.4, 3.0, 1e5]), dtype=draw.choice([torch.float32, torch.float64])),
            desirable=(torch.rand(count, draw.choice([1, 2]), generator=draw.torch)[:, -1] < 0.5)[first:last],
            batch=count,
            logps=nothing[first:last],
            slopes=nothing.clone()[first:last],
            divisor=torch.tensor(draw.choice([0.0, 2.0**-20, 0.5]), dtype=torch.float64) if self.divisor else None,
        )
        weights = (draw.choice([1.0, 0.7, 0.0]), draw.choice([1.0, 1.3]))
        return closing, Objective(draw.choice([0.1, 0.5, 0.01]), *weights, self.average, self.reduction)

    def run(self, draw: Draw, backend: Backend) -> None:
        closing, objective = self.problem(draw)
        before = None if closing.divisor is None else closing.divisor.clone()
        factor = backend.close_sequences(closing, objective)

        totals, size = sums(closing)
        tokens = closing.tokens.double().clamp(min=1) if self.average else torch.ones_like(totals)
        logps = totals / tokens
        losses, slopes, ratio = stages(closing, logps, objective)
        slopes = slopes / tokens / (closing.batch if self.reduction == "mean" else 1)
        rounding = 1e-14 * (1 + size.nan_to_num(0, 0, 0) / tokens)
        relative = 1e-12 + (4 * objective.beta * rounding).max().item()
        assert_close("logps", closing.logps, logps, 1e-14, rounding.max().item())
        assert_close("slopes", closing.slopes, slopes, relative, 1e-300)
        if before is None:
            assert factor is None
        else:
            largest = torch.where(closing.lengths > 0, closing.slopes.abs(), 0.0).amax()
            power = torch.tensor(2.0).double() ** (torch.frexp(largest)[1] - 1) if largest > TINY else TINY
            expected = before.maximum(torch.as_tensor(power if largest.isfinite() else 1.0))
            assert closing.divisor == expected, ("divisor", closing.divisor, expected)
            assert factor == before / expected, ("factor", factor, before, expected)

        found = backend.value_stages(closing.logps, closing.ref_logps, closing.z0, closing.desirable, objective)
        losses, slopes, ratio = stages(closing, closing.logps, objective)
        for name, mine, expected in zip(
            ("losses", "slopes", "rewards"), found, (losses, slopes, objective.beta * ratio)
        ):
            assert_close(name, mine, expected, 1e-12, 1e-300)


def sums(closing: Closing) -> tuple[Tensor, Tensor]:
    """The sums of the token log-probabilities of each sequence, and of their sizes."""
    if closing.sums is not None:
        return closing.sums, closing.sums.abs()
    rows = [closing.token_logps[a:b].double() for a, b in itertools.pairwise(closing.offsets.tolist())]
    return torch.stack([x.sum() for x in rows]), torch.stack([x.abs().sum() for x in rows])


def stages(closing: Closing, logps: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, slopes and log-ratios, without the reduction."""
    ratio = logps if closing.ref_logps is None else exact.difference(logps, closing.ref_logps.double())
    return (*exact.sequence_loss(ratio, closing.z0.double(), closing.desirable, objective), ratio)


def on(closing: Closing, device: str) -> Closing:
    """A copy on the device, with buffers of its own."""
    copies = {name: value.to(device, copy=True) for name, value in vars(closing).items() if isinstance(value, Tensor)}
    return replace(closing, **copies)
