"""Problems for the whole loss: `kto_forward` with every source of reference and KL, then the gradient of its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kto_kernels.backends.base import Backend
from kto_kernels.options import Objective, Scale
from kto_kernels.records import Rows, Side

from . import exact
from .draws import LONG, Draw
from .exact import assert_close, assert_gradient
from .operators import DTYPES, INDEX_DTYPES

SIDES = ("logps", "logits")


@dataclass(frozen=True)
class Loss:
    dtype: torch.dtype
    ref: str | None = "logits"  # "logps", "logits"
    kl: str = "logits"  # "number", "tensor", "logps", "logits"
    ref_kl: str | None = "logits"
    packed: bool = False
    shift: bool = False
    softcap: bool = False
    average: bool = False
    reduction: str = "mean"
    index_dtype: torch.dtype = torch.int64
    given_dtype: torch.dtype = torch.float32  # of log-probabilities that are given
    shape: str = "any"  # "few" sequences, "long" ones, "many"

    @classmethod
    def drawn(cls, draw: Draw) -> Loss:
        ref = draw.choice([None, "logps", "logits", "logits"])
        kl = draw.choice(["number", "tensor", "logps", "logits", "logits"])
        return cls(
            draw.choice(DTYPES),
            ref,
            kl,
            draw.choice(SIDES) if ref and kl in SIDES else None,
            packed=draw.random() < 0.5,
            shift=draw.random() < 0.5,
            softcap=draw.random() < 0.2,
            average=draw.random() < 0.4,
            reduction=draw.choice(["mean", "sum", "none"]),
            index_dtype=draw.choice(INDEX_DTYPES),
            given_dtype=draw.choice([torch.float32, torch.float64, torch.bfloat16]),
        )

    def sizes(self, draw: Draw) -> tuple[int, tuple[int, int], tuple[int, int]]:
        """The vocabulary, and (sequences, tokens) of the policy and of KL."""
        shape = draw.choice(["few"] * 28 + ["long", "many"]) if self.shape == "any" else self.shape
        if shape == "long":
            return draw.randint(1, 9), (draw.choice([1, 2]), LONG + draw.randint(0, 99)), (1, LONG + draw.randint(0, 9))
        if shape == "many":  # more than the last stages take at a time
            return draw.randint(1, 9), (draw.randint(17, 300), draw.choice([1, 2])), (draw.randint(17, 300), 1)
        sizes = (draw.choice([1, 1, 2, 3, 5]), draw.choice([1, 2, 3, 4]))
        return draw.vocab(), sizes, (draw.choice([1, 2, 4]), draw.choice([1, 2, 3]))

    def run(self, draw: Draw, backend: Backend) -> None:
        vocab, (count, tokens), (kl_count, kl_tokens) = self.sizes(draw)
        scale = draw.scale(self.softcap)
        policy = draw.rows(self, count, tokens, vocab)
        if draw.random() < 0.3:
            draw.make_special(policy.logits, policy.labels)
        kl_rows = draw.rows(self, kl_count, kl_tokens, vocab)
        ref, ref_logps = self._side(draw, self.ref, policy, scale)
        kl_side, kl_logps = self._side(draw, self.kl if self.kl in SIDES else None, kl_rows, scale, kl_rows.logits)
        ref_kl, ref_kl_logps = self._side(draw, self.ref_kl, kl_rows, scale)
        kl: float | Tensor = draw.choice([0.0, 0.4, -1.0, 3.0])
        if self.kl == "tensor":
            kl = torch.tensor(kl, dtype=self.given_dtype)
        weights = (draw.choice([1.0, 0.7]), draw.choice([1.0, 1.3]))
        objective = Objective(draw.choice([0.1, 0.5, 0.01]), *weights, self.average, self.reduction)
        desirable = torch.rand(count, draw.choice([1, 2]), generator=draw.torch)[:, -1] < 0.5

        result = backend.kto_forward(policy, scale, desirable, ref, kl, kl_side, ref_kl, objective)

        target = exact.targets(policy)
        logp, _, _ = exact.token_logps(policy.logits, target, scale)
        logps = self._sums(policy, scale)
        z0 = torch.as_tensor(kl).double()
        if kl_logps is not None:
            ratios = kl_logps if ref_kl_logps is None else exact.difference(kl_logps, ref_kl_logps)
            z0 = ratios.mean()
        z0 = z0.clamp(min=0)
        ratio = logps if ref_logps is None else exact.difference(logps, ref_logps)
        losses, coefficients = exact.sequence_loss(ratio, z0, desirable, objective)
        loss = {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[self.reduction]

        largest = max(1.0, logp.nan_to_num(0, 0, 0).abs().max().item() if logp.numel() else 1.0)
        unit = (4e-6 * largest + exact.logp_error(scale)) * max(1, tokens)
        beta, sums = objective.beta, 20 * unit
        assert_close("token_logps", result.token_logps, logp, exact.LOGP, exact.logp_error(scale))
        assert_close("logps", result.logps, logps, 4e-6, unit)
        given = torch.zeros_like(logps) if ref_logps is None else ref_logps
        assert_close("ref_logps", result.ref_logps, given, 4e-6, 10 * unit)
        assert_close("kl", result.kl, z0, 1e-5, sums)
        assert_close("rewards", result.rewards, beta * ratio, 1e-5, beta * sums)
        assert_close("loss", result.loss, loss, 1e-5, beta * sums * count)

        above = torch.rand(count if self.reduction == "none" else (), generator=draw.torch) + 0.5
        coefficients = coefficients / (count if self.reduction == "mean" else 1)
        if self.average:
            coefficients = coefficients / exact.per_sequence(target >= 0, policy).clamp(min=1)
        coefficients = torch.where(coefficients.float() == 0, 0.0, coefficients * above.double())
        upstream = exact.over_tokens(coefficients, policy)
        gradient = exact.logits_gradient(policy.logits, target, upstream, scale)
        out = policy.logits
        if draw.random() < 0.6:
            out = draw.logits(tuple(target.shape), vocab, self.dtype)
        saved = (result.coefficients, result.token_logps, result.statistics)
        backend.logits_backward(policy, scale, above, *saved, out)
        most = coefficients.nan_to_num(0, 0, 0).abs().max().item()
        # A coefficient is off by as much as its sequence's log-ratio.
        assert_gradient(out, gradient, most, scale, beta * sums * 2)

    def _side(
        self, draw: Draw, kind: str | None, like: Rows, scale: Scale, logits: Tensor | None = None
    ) -> tuple[Side, Tensor | None]:
        """A side of rows like `like`, with `logits` or others, or of given log-probabilities, and its exact sums."""
        if kind is None:
            return Side(), None
        if kind == "logps":
            logps = -9.0 * torch.rand(like.n_sequences, generator=draw.torch).to(self.given_dtype)
            return Side(None, logps), logps.double()
        if logits is None:
            logits = draw.logits(tuple(like.labels.shape), like.vocab, self.dtype)
        rows = Rows(logits, like.labels, like.cu_seqlens, like.shift, like.ignore_index)
        return Side(rows), self._sums(rows, scale)

    def _sums(self, rows: Rows, scale: Scale) -> Tensor:
        target = exact.targets(rows)
        sums = exact.per_sequence(exact.token_logps(rows.logits, target, scale)[0], rows)
        return sums / exact.per_sequence(target >= 0, rows).clamp(min=1) if self.average else sums
