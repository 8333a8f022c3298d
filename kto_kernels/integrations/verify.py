"""Checks that a model's logits are what a fused head assumes: hidden states times the head's weight, with a bias, a
scale and a soft cap. On the first batch, the model's own forward and the fused head score the same tokens.

This module uses PyTorch only. Code that scores hidden states in place of a model's own head calls `first_batch`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference

TOKENS = 64  # the most tokens that are scored
_ROWS = 8  # tokens compared at a time, so that little memory is needed beside the logits
_COLUMNS = 1 << 13  # rows of the head's weight multiplied at a time


@dataclasses.dataclass
class Scored:
    """The inputs of a fused head for n tokens, multiplied in high precision, and the fused head's result.

    Attributes:
        products: (n, V) floating, hidden · weight, not rounded to the head's dtype.
        spread: (n, V) floating, the root of `Σ_i (h_i·w_i)²`.
        norms: (n, V) floating, `‖h‖·‖w‖`.
        bias: (V,) floating, the head's bias; 0.0 where there is none.
        scale: logit scale, soft cap and temperature.
        labels: (n,) integers.
        logps: (n,) floating, the fused head's log-probabilities in nats.
        width: H.
        dtype: the dtype of the head's product.
        dtypes: the dtypes of the hidden states and of the weight, before they were cast.
        tf32: whether the product is rounded to TF32.
        of_adapter: (n, V) floating, the sizes of what an adapter on the head has rounded besides; 0.0 without one.
    """

    products: Tensor  # (n, V), hidden · weight, not rounded to the head's dtype
    spread: Tensor  # (n, V), the root of Σ_i (h_i·w_i)²
    norms: Tensor  # (n, V), ‖h‖·‖w‖
    bias: Tensor | float  # (V,)
    scale: tuple[float, float | None, float]  # logit_scale, softcap, temperature
    labels: Tensor  # (n,)
    logps: Tensor  # (n,), the fused head's
    width: int  # H
    dtype: torch.dtype  # of the head's product
    dtypes: tuple[torch.dtype, torch.dtype]  # of the hidden states and of the weight, before they were cast
    tf32: bool
    of_adapter: Tensor | float = 0.0  # (n, V)

    @staticmethod
    @torch.no_grad()
    def of(
        hidden: Tensor,  # (n, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        labels: Tensor,  # (n,)
        scale: tuple[float, float | None, float],
        dtype: torch.dtype,
        logps: Tensor,  # (n,)
        adapter: tuple[Tensor, Tensor, float] | None = None,  # A (r, H), B (V, r), scaling
    ) -> Scored:
        """Computes the products.

        Args:
            hidden: (n, H) floating, the hidden states of the tokens.
            weight: (V, H) floating, the head's weight.
            bias: (V,) floating, the head's bias. None: the head has none.
            labels: (n,) integers, the tokens that are scored.
            scale: logit scale, soft cap and temperature.
            dtype: the dtype that the head casts hidden states and weight to before it multiplies them.
            logps: (n,) floating, the fused head's log-probabilities in nats.
            adapter: (A, B, scaling) of a LoRA adapter on the head, A (r, H) floating, B (V, r) floating. None: no adapter
                is on the head.

        Returns:
            The record.
        """
        wide = reference.compute_dtype(dtype)

        def exactly(x: Tensor) -> Tensor:
            return x.detach().to(dtype).to(wide)

        h = exactly(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            parts = [
                (h @ w.T, (h.square() @ w.square().T).sqrt(), h.norm(dim=-1, keepdim=True) * w.norm(dim=-1))
                for w in map(exactly, weight.split(_COLUMNS))
            ]
        products, spread, norms = (torch.cat(part, -1) for part in zip(*parts))
        of_adapter: Tensor | float = 0.0
        if adapter is not None:
            # The product with the weight is rounded by itself; h Aᵀ, its product with B, its scaling and the sum are too.
            a, b = map(exactly, adapter[:2])
            with torch.autocast(hidden.device.type, enabled=False):
                down = adapter[2] * (h @ a.T)
                of_adapter = products.abs() + 4 * (down.abs() @ b.abs().T)
                products = products + down @ b.T
                terms = adapter[2] * (h.abs() @ a.abs().T) @ b.abs().T
                spread, norms = spread + terms, norms + terms
        tf32 = dtype == torch.float32 and hidden.is_cuda and torch.get_float32_matmul_precision() != "highest"
        return Scored(
            products, spread, norms, 0.0 if bias is None else exactly(bias), scale, labels, logps.detach(),
            h.shape[-1], dtype, (hidden.dtype, weight.dtype), tf32,
            of_adapter,
        )  # fmt: skip


@dataclasses.dataclass
class _Worst:
    """The entry that differs most."""

    excess: float = 0.0  # the difference over what rounding explains
    token: int = 0
    own: float = 0.0
    fused: float = 0.0
    allowed: float = 0.0
    slack: float = 0.0  # the difference that is allowed for a label, on average
    scale: float = 1.0  # how many times as large the model's own logits are
    scale_allowed: float = 0.0  # how far from 1 rounding may take `scale`


def compare(own: Tensor, scored: Scored, again: Tensor | None = None) -> _Worst:
    """Compares log-probabilities from a model's own logits with a fused head's.

    Each logit. With u the unit roundoff of the head's dtype (2⁻⁹ for bf16), a logit `z = softcap(s·(h·w + b))/T` may
    differ by the sum δ of

    - u times |s·h·w| + |s·b|, and the sizes of an adapter's products (`Scored.of_adapter`), as the product is rounded when it is stored; the same again where a GPU splits the sum,
      again for a bias, and again for a scale s other than 1; under a soft cap, 3u times |z| more, for the cap's
      division, tanh and product;
    - 4·√H·2⁻²⁴ times ‖h‖·‖w‖ for the sum of H products in fp32 on either side. It is √H and not H because the H
      rounding errors have random signs;
    - 2.5u times √Σ(h·w)² where the hidden states are rounded before the product, as where a model scales them instead
      of the logits; and 2.5·2⁻¹⁰ times the same under TF32, which rounds both factors. These are at least four standard
      deviations of the sum of H independent errors.

    Each log-probability. With δ_v for token v, `z_v − log Σ exp z` may differ by δ_v + log Σ p_v·exp δ_v. All V of each
    row must be within that. Both are made in fp64 here: in fp32 this log-softmax would add an error of its own, which
    is larger than δ where the logits are small. For the labels, the fused head's log-probabilities must be within twice
    that, as its logits are rounded too, and `eps·(|z_v − log Σ exp z| + ⅔√V)` more, with the eps of the dtype that they
    are in: half an eps of each of `z_v − max z`, `log Σ exp(z − max z)` and their difference, whose sizes add up to
    twice the log-probability's, and four standard deviations of a sum of V exponentials that are added one by one.

    The scale. A wrong scale may keep every single entry within its bound, but it shows in the slope
    `Σ (z'_v − z_v)·c_v / Σ c_v²` over all rows, where c_v is z_v minus the mean of the row: the slope is the wrong
    factor minus 1. Rounding errors of one sign would make a slope of `Σ δ_v·|c_v| / Σ c_v²`. The errors have random
    signs, so that 0.3 times this is four standard deviations for 64 errors of equal weight. Where few logits outweigh
    the others (a confident model, few tokens), four standard deviations are more, namely `4/√3·√Σ(δ_v·c_v)² / Σ c_v²`
    for errors uniform in ±δ. The larger of the two is allowed, but no more than the whole sum; and u more where there
    is a scale or a cap, as the model may hold a rounded one. 64 tokens thus reveal a factor of 1.01 in bf16, also with
    a bias, and of 1.02 with a scale and a cap too, unless the mean logit is larger than the logits' deviation from it.
    With a single token a factor of 1 + 2u may go unnoticed.

    Args:
        own: (n, V) floating, logits from the model's own forward.
        scored: the same n tokens, as the fused head has scored them.
        again: (n, V) floating, `own` from a second forward; None: there was none. The difference of the two is the
            model's own noise, for instance from sums in no fixed order on a GPU; four times this noise is allowed.

    Returns:
        The entry that differs most. An `excess` above 1 in it means a difference that rounding does not explain.
    """
    logit_scale, softcap, temperature = scored.scale
    u = torch.finfo(scored.dtype).eps / 2
    sums = 4 * math.sqrt(scored.width) * torch.finfo(scored.products.dtype).eps / 2
    unit, exponentials = torch.finfo(scored.logps.dtype).eps, 2 / 3 * math.sqrt(own.shape[-1])
    roundings = 1 + own.is_cuda + (not isinstance(scored.bias, float)) + (logit_scale != 1)
    factors = 2.5 * (u * (logit_scale != 1) + 2.0**-10 * scored.tf32)
    worst, slack, slope = _Worst(), 0.0, torch.zeros(4, dtype=torch.float64, device=own.device)
    for start in range(0, own.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        products = scored.products[rows].double()
        x = (products + scored.bias) * logit_scale
        size = products.abs() + (scored.bias if isinstance(scored.bias, float) else scored.bias.abs())
        size = size + (scored.of_adapter if isinstance(scored.of_adapter, float) else scored.of_adapter[rows])
        delta = roundings * u * size + sums * scored.norms[rows] + factors * scored.spread[rows]
        delta = delta * abs(logit_scale)
        if softcap is not None:
            capped = softcap * torch.tanh(x / softcap)
            # The cap's result has at most the relative error of the cap's argument.
            delta = delta * (capped / x).abs().nan_to_num(1.0) + 3 * u * capped.abs()
            x = capped
        z, delta = x / temperature, delta / abs(temperature)
        logps, of_logit = z.log_softmax(-1), delta
        delta = delta + (logps + delta).logsumexp(-1, keepdim=True).clamp(min=0)

        def scores(logits: Tensor, like: Tensor = z) -> Tensor:
            return (logits.to(like) / temperature).log_softmax(-1)

        theirs = scores(own[rows])
        if again is not None:
            delta = delta + 4 * (theirs - scores(again[rows])).abs().nan_to_num(0.0)
        # Masked entries are not compared: a wrong one would show in the other entries, which sum to 1 with it.
        masked = ~own[rows].isfinite() | (own[rows] <= torch.finfo(own.dtype).min / 2)
        c = (z - z.mean(-1, keepdim=True)).masked_fill(masked, 0.0)
        moved = (theirs - logps).masked_fill(masked, 0.0)
        moved = moved - moved.mean(-1, keepdim=True)
        terms = (moved * c, of_logit * c.abs(), (of_logit * c).square(), c * c)
        slope += torch.stack([x.sum(dtype=torch.float64) for x in terms])
        labels = scored.labels[rows].unsqueeze(-1)
        of_labels = 2 * delta.gather(-1, labels) + unit * (logps.gather(-1, labels).abs() + exponentials)
        slack += of_labels.sum().item() / own.shape[0]
        for mine, found, allowed, columns in (
            (logps, theirs.where(~masked, logps), delta, None),
            (scored.logps[rows].unsqueeze(-1).to(z), theirs.gather(-1, labels), of_labels, labels),
        ):
            same = (mine == found) | (mine.isnan() & found.isnan())
            excess = torch.where(same, 0.0, (mine - found).abs() / allowed).nan_to_num(math.inf, posinf=math.inf)
            row, column = divmod(int(excess.argmax()), excess.shape[-1])
            if (highest := excess[row, column].item()) > worst.excess:
                token = column if columns is None else int(columns[row, column])
                numbers = (x[row, column].item() for x in (found, mine, allowed))
                worst = _Worst(highest, token, *numbers)
    worst.slack = slack
    moved, explained, squares, size = slope.tolist()
    if size > 0:
        worst.scale = 1 + moved / size
        explained = min(explained, max(0.3 * explained, 4 * math.sqrt(squares / 3)))
        worst.scale_allowed = explained / size + u * (logit_scale != 1 or softcap is not None)
        worst.excess = max(worst.excess, abs(moved / size) / worst.scale_allowed)
    return worst


def window(labels: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Cuts a short piece out of one row of a batch, so that the check costs the same at any context length: up to
    `TOKENS` + 1 tokens of the row with the most scored tokens, from the token before the row's first scored one on.

    A causal model's logits in the piece do not depend on tokens behind it, and the comparison needs no tokens before
    it. Prompts, images and padding are left out: only those `inputs` are kept that are tensors of the labels' shape,
    with or without more dimensions.

    Args:
        labels: (B, T) integers, -100 where nothing is scored.
        inputs: the model's other inputs, by name.

    Returns:
        labels: (1, w). Without a scored token in the batch, every token gets the label 0.
        inputs: the inputs that are kept, each (1, w, ...).
    """
    scored = labels != -100
    scored[:, 0] = False  # no token predicts the first one
    row = int(scored.sum(-1).argmax())
    places = scored[row].nonzero().squeeze(-1).tolist()
    if not places:
        labels, places = torch.zeros_like(labels), range(labels.shape[1])
    start = max(0, places[0] - 1)
    stop = min(places[-1] + 1, start + TOKENS + 1)
    piece = {
        name: x[row : row + 1, start:stop]
        for name, x in inputs.items()
        if isinstance(x, Tensor) and x.shape[:2] == labels.shape
    }
    if "attention_mask" in piece:
        piece["attention_mask"] = torch.ones_like(piece["attention_mask"])
    return labels[row : row + 1, start:stop], piece


@contextlib.contextmanager
def quiet(model: torch.nn.Module) -> Iterator[None]:
    """Puts every submodule in eval mode and turns gradients off. Afterwards the modes are restored, and the random
    states of the CPU and of every CUDA device.

    Args:
        model: the model, whose submodules are put in eval mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def first_batch(
    model: torch.nn.Module, own: Callable[[], Tensor], fused: Callable[[], Scored], *, caller: str
) -> float:
    """Raises an error where a model's own logits do not give the log-probabilities that a fused head gives.

    All ranks of the default process group raise it or none does, and all run the same number of forwards.

    Args:
        model: its modules are put in eval mode meanwhile, without gradients and with the random state restored.
        own: runs the model's own forward over a few tokens and returns the (n, V) logits of the scored ones.
        fused: runs the fused head over the same tokens.
        caller: the function or class whose `verify=False` turns the check off, for the message.

    Returns:
        How much rounding may change the log-probability of a token, on average, in nats.

    Raises:
        RuntimeError: on some rank the two differ by more than rounding explains, or the model's own forward fails.
    """
    name = type(model).__name__
    with quiet(model):
        scored = fused()
        mixed = contextlib.nullcontext()
        device = scored.logps.device
        if not torch.is_autocast_enabled(device.type) and scored.dtypes[0] != scored.dtypes[1]:
            # The model's own head could not multiply tensors of two dtypes either, unless autocast casts them.
            mixed = torch.autocast(device.type, min(scored.dtypes, key=lambda dtype: dtype.itemsize))
        with mixed:
            if not isinstance(mixed, contextlib.nullcontext):
                scored = fused()
            first, problem, worst = None, None, _Worst()
            for _ in range(2):  # a second time where they differ: the model may not repeat itself either
                try:
                    logits = own()
                    if logits.shape == scored.products.shape:
                        worst = compare(logits, scored, first)
                        found = logits.to(scored.logps) / scored.scale[2]
                        total = found.log_softmax(-1).gather(-1, scored.labels.unsqueeze(-1)).sum().item()
                        mine = scored.logps.sum().item()
                        problem = (
                            f"{name}: over {len(scored.labels)} tokens its own logits give log-probabilities of "
                            f"{total:.6g} in all, the fused head {mine:.6g}; for token {worst.token} of one of them "
                            f"{worst.own:.6g} and {worst.fused:.6g}, where rounding explains {worst.allowed:.2g}; its own "
                            f"logits are {worst.scale:.6g} times as large, where rounding explains a factor within "
                            f"{worst.scale_allowed:.2g} of 1. "
                            "Likely causes: a head that does more than multiply (a layer before it, a mask on its "
                            "logits, a forward of its own), a hook on the head, another scale or soft cap"
                        )
                    else:
                        worst.excess = math.inf
                        problem = (
                            f"{name}: its own logits have shape {tuple(logits.shape)}, hidden states times the head's "
                            f"weight {tuple(scored.products.shape)}"
                        )
                    first = logits
                    error = None
                except Exception as failure:  # another rank must not wait for this one
                    worst.excess, error = math.inf, failure
                    problem = f"{name}: its own forward failed on a few tokens of the first batch: {failure}"
                mine_differs = worst.excess > 1
                if not _anywhere(mine_differs, device):
                    return worst.slack
    if not mine_differs:
        problem = f"{name}: on another rank its own logits do not give the fused head's log-probabilities"
    raise RuntimeError(f"{problem}. {caller} with verify=False leaves this check out") from error


def same_loss(name: str, mine: Tensor, theirs: Tensor, allowed: float) -> None:
    """Raises an error, on all ranks or on none, where two losses of one batch differ by more than `allowed`.

    Args:
        name: the model's name, for the message.
        mine: () floating, the fused loss.
        theirs: () floating, the other trainer's.
        allowed: the difference that rounding explains.

    Raises:
        RuntimeError: the losses differ by more than that on some rank.
    """
    if _anywhere(not bool((mine - theirs).abs() <= allowed), mine.device):
        raise RuntimeError(
            f"{name}: the loss of the first batch is {mine.item():.6g}, and {theirs.item():.6g} as the trainer that it "
            f"replaces computes it (on this rank, or another's differ), where rounding explains {allowed:.2g}"
        )


def _anywhere(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on some rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)
