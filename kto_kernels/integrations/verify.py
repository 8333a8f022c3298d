"""Whether a model's logits are what a fused head takes them for: the hidden states times the head's weight, with a bias,
a scale and a soft cap. The first batch tells: the model's own forward and the fused head score the same tokens.

Knows PyTorch only. Whoever scores hidden states in the place of a model's own head calls `first_batch`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference

TOKENS = 64  # scored at most
_ROWS = 8  # compared at a time, to hold little beside the logits
_COLUMNS = 1 << 13  # of the head, multiplied at a time


@dataclasses.dataclass
class Scored:
    """What a fused head was given for n tokens, and what it made of them."""

    products: Tensor  # (n, V), hidden · weight, not rounded to the head's dtype
    spread: Tensor  # (n, V), the root of Σ_i (h_i·w_i)²
    norms: Tensor  # (n, V), ‖h‖·‖w‖
    bias: Tensor | float  # (V,)
    scale: tuple[float, float | None, float]  # logit_scale, softcap, temperature
    labels: Tensor  # (n,)
    logps: Tensor  # (n,), the fused head's
    width: int  # H
    dtype: torch.dtype  # of the head's product
    dtypes: tuple[torch.dtype, torch.dtype]  # of the hidden states and of the weight, as they came
    tf32: bool

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
    ) -> Scored:
        """Args: `dtype` is that of the head's product, to which hidden states and weight are cast; `scale` is
        (logit_scale, softcap, temperature); `logps` are the fused head's log-probabilities of `labels`."""
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
        tf32 = dtype == torch.float32 and hidden.is_cuda and torch.get_float32_matmul_precision() != "highest"
        return Scored(
            products, spread, norms, 0.0 if bias is None else exactly(bias), scale, labels, logps.detach(),
            h.shape[-1], dtype, (hidden.dtype, weight.dtype), tf32
        )  # fmt: skip


@dataclasses.dataclass
class _Worst:
    """The entry that differs most, and by how much, in units of what rounding explains."""

    excess: float = 0.0
    token: int = 0
    own: float = 0.0
    fused: float = 0.0
    allowed: float = 0.0
    slack: float = 0.0  # what is allowed for a label, on average
    scale: float = 1.0  # by which the model's own logits are larger
    scale_allowed: float = 0.0  # how far from 1 rounding may take it


def compare(own: Tensor, scored: Scored, again: Tensor | None = None) -> _Worst:
    """The largest difference between log-probabilities from a model's own logits and those of a fused head, over what
    rounding explains: more than 1 is a difference that rounding does not explain.

    With u the unit roundoff of the head's dtype (2⁻⁹ for bf16), a logit `z = softcap(s·(h·w + b))/T` may differ by

    - u of |s·h·w| + |s·b|: the product is rounded when it is stored; u more where a GPU splits its sum, for a bias, and
      for a scale other than 1 each; under a soft cap 3u of |z|, for its division, tanh and product;
    - what the sum of H products in fp32 makes, on both sides: 4·√H·2⁻²⁴ of ‖h‖·‖w‖, the square root as its H roundings
      have either sign;
    - where the hidden states are rounded before the product (a model may scale them instead of its logits; TF32 rounds
      both factors): 2.5 such units of √Σ(h·w)², at least four standard deviations of H independent roundings.

    Call that δ_v for token v. Then its log-probability `z_v − log Σ exp z` differs by at most δ_v + log Σ p_v·exp δ_v.
    All V of each row are held to it. For the labels, the fused head's own log-probabilities are held to twice that: they
    are rounded too.

    Another scale shows where every entry for itself lies within that: in the slope `Σ (z'_v − z_v)·c_v / Σ c_v²` over
    all rows, c_v = z_v less its row's mean, which is the factor less 1. Roundings of one sign would add up to
    `Σ δ_v·|c_v| / Σ c_v²`. They have either sign, and 0.3 of that is four standard deviations where 64 of them weigh the
    same. Where a few logits outweigh the others (a confident model, and few tokens), four standard deviations are more:
    `4/√3·√Σ(δ_v·c_v)² / Σ c_v²`, as a rounding is spread evenly over ±δ. The larger of the two is allowed, the whole sum
    at most; and u where there is a scale or a cap, which the model may hold rounded. So 64 tokens show a factor of 1.01
    in bf16, with a bias too, and one of 1.02 with a scale and a cap as well, unless the mean logit is larger than the
    deviation of the logits from it. One token may hide a factor of 1 + 2u.

    Args:
        own: (n, V) logits as the model's own forward gives them.
        scored: the same n tokens, as the fused head scored them.
        again: `own` once more, of a second forward. The difference between the two is the model's own noise, as of sums
            in no fixed order on a GPU, and is allowed four times.
    """
    logit_scale, softcap, temperature = scored.scale
    u = torch.finfo(scored.dtype).eps / 2
    sums = 4 * math.sqrt(scored.width) * torch.finfo(scored.products.dtype).eps / 2
    roundings = 1 + own.is_cuda + (not isinstance(scored.bias, float)) + (logit_scale != 1)
    factors = 2.5 * (u * (logit_scale != 1) + 2.0**-10 * scored.tf32)
    worst, slack, slope = _Worst(), 0.0, torch.zeros(4, dtype=torch.float64, device=own.device)
    for start in range(0, own.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        x = (scored.products[rows] + scored.bias) * logit_scale
        size = scored.products[rows].abs() + (scored.bias if isinstance(scored.bias, float) else scored.bias.abs())
        delta = roundings * u * size + sums * scored.norms[rows] + factors * scored.spread[rows]
        delta = delta * abs(logit_scale)
        if softcap is not None:
            capped = softcap * torch.tanh(x / softcap)
            # A cap lets no more through of a relative error than it has.
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
        # A masked entry changes the others by its probability, which they show.
        masked = ~own[rows].isfinite() | (own[rows] <= torch.finfo(own.dtype).min / 2)
        c = (z - z.mean(-1, keepdim=True)).masked_fill(masked, 0.0)
        moved = (theirs - logps).masked_fill(masked, 0.0)
        moved = moved - moved.mean(-1, keepdim=True)
        terms = (moved * c, of_logit * c.abs(), (of_logit * c).square(), c * c)
        slope += torch.stack([x.sum(dtype=torch.float64) for x in terms])
        labels = scored.labels[rows].unsqueeze(-1)
        slack += 2 * delta.gather(-1, labels).sum().item() / own.shape[0]
        for mine, found, allowed, columns in (
            (logps, theirs.where(~masked, logps), delta, None),
            (scored.logps[rows].unsqueeze(-1).to(z), theirs.gather(-1, labels), 2 * delta.gather(-1, labels), labels),
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


def window(labels: Tensor, inputs: dict) -> tuple[Tensor, dict]:
    """A piece of one row of a batch, which costs the same at any context length: of the row with most scored tokens,
    from the token before its first scored one on, `TOKENS` + 1 of them.

    A causal model's logits there depend on nothing behind the piece, and the comparison not on what came before it.
    Prompts stay outside, with images and padding: of `inputs` only tensors of a row for each of the labels' rows, and a
    column for each of their columns, are taken.

    Returns:
        labels: (1, w), and the inputs. Without a scored token in the batch, token 0 counts as the label of every one.
    """
    scored = labels != -100
    scored[:, 0] = False  # nothing predicts it
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
    """Every submodule in eval mode, no gradients; the modes, and the random states of the CPU and of every CUDA device,
    are put back."""
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
    """Raises where a model's own logits do not give the log-probabilities that a fused head gives.

    On all ranks of the default process group alike: each runs the same number of forwards, whatever it finds.

    Args:
        model: whose modules are put in eval mode for it, without gradients and with the random state put back.
        own: runs the model's own forward over a few tokens; → (n, V) logits of the scored ones.
        fused: runs the fused head over the same tokens.
        caller: what to turn the check off of, for the message.

    Returns:
        By how much rounding may change the log-probability of a token, on average, in nats.

    Raises:
        RuntimeError: the two differ, by more than rounding explains, on some rank; or the model's own forward fails.
    """
    name = type(model).__name__
    with quiet(model):
        scored = fused()
        mixed = contextlib.nullcontext()
        device = scored.logps.device
        if not torch.is_autocast_enabled(device.type) and scored.dtypes[0] != scored.dtypes[1]:
            # Its own head cannot multiply the two either, unless autocast casts them.
            mixed = torch.autocast(device.type, min(scored.dtypes, key=lambda dtype: dtype.itemsize))
        with mixed:
            if not isinstance(mixed, contextlib.nullcontext):
                scored = fused()
            first, problem, worst = None, None, _Worst()
            for _ in range(2):  # once more where they differ: the model may not repeat itself either
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
    """Raises, on all ranks alike, where two losses () of one batch differ by more than `allowed`.

    Raises:
        RuntimeError: they differ on some rank.
    """
    if _anywhere(not bool((mine - theirs).abs() <= allowed), mine.device):
        raise RuntimeError(
            f"{name}: the loss of the first batch is {mine.item():.6g}, and {theirs.item():.6g} as the trainer that it "
            f"replaces computes it (on this rank, or another's differ), where rounding explains {allowed:.2g}"
        )


def _anywhere(flag: bool, device: torch.device) -> bool:
    """Whether it is true on some rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)
