"""Does training notice which loss it runs on? `python -m benchmarks.training` writes docs/training.json and its picture.

A small model is trained from one seed with plain PyTorch's loss, with that loss in other orders of summation (a
permuted batch, vocabulary or hidden width) or under a loss scale, which is the same but for rounding, and with ours. Our
parameters may be no farther from plain PyTorch's than two such runs of plain PyTorch are from each other.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from kto_kernels import kto_loss, linear_kto_loss

from .environment import ROOT, describe

VOCAB, WIDTH, BATCH, TOKENS = 257, 32, 8, 24
BETA, WEIGHTS = 0.1, (1.0, 1.5)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of states, head and logits; the parameters are fp32
ORDERS = ("batch", "vocabulary", "width")
PLAIN, WRONG = "plain PyTorch", "gradients 1 % too large"
RESULTS = ROOT / "docs" / "training.json"


class Model(torch.nn.Module):
    """A token, and the mean of those before it, through one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, WIDTH)
        self.mix = torch.nn.Linear(2 * WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        context = x.cumsum(1) / torch.arange(1, tokens.shape[1] + 1).unsqueeze(-1)
        return torch.tanh(self.mix(torch.cat([x, context], -1)))


def batches(steps: int):
    """Tokens and their labels, some of them prompt; thumbs up where each label is the token after its own."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(VOCAB, (BATCH, TOKENS), generator=generator)
        desirable = torch.rand(BATCH, generator=generator) < 0.5
        other = torch.randint(VOCAB, tokens.shape, generator=generator)
        labels = torch.where(desirable.unsqueeze(-1), (tokens + 1) % VOCAB, other)
        labels[:, : TOKENS // 4] = -100
        yield tokens, labels, desirable


def plain_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, desirable: Tensor, ref: tuple, kl_labels: Tensor
) -> Tensor:
    """Equations 7 and 8 of arXiv 2402.01306, as a trainer would write them."""

    def sums(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logps = linear(hidden, weight).float().log_softmax(-1)
        logps = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (logps * (labels != -100)).sum(-1)

    with torch.no_grad():
        reference = sums(*ref, labels)
        z0 = (sums(hidden, weight, kl_labels) - sums(*ref, kl_labels)).mean().clamp(min=0)
    r = sums(hidden, weight, labels) - reference
    x = torch.where(desirable, r - z0, z0 - r) * BETA
    return (torch.where(desirable, *WEIGHTS) * logsigmoid(-x).exp()).mean()


def in_order(order: str, generator: torch.Generator) -> Callable:
    """`plain_loss`, its sums in another order."""

    def loss(hidden, weight, labels, desirable, ref, kl_labels):
        size = {"batch": BATCH, "vocabulary": VOCAB, "width": WIDTH}[order]
        p = torch.randperm(size, generator=generator)
        if order == "batch":
            ref = (ref[0][p], ref[1])
            return plain_loss(hidden[p], weight, labels[p], desirable[p], ref, kl_labels[p])
        if order == "width":
            return plain_loss(hidden[..., p], weight[:, p], labels, desirable, tuple(t[..., p] for t in ref), kl_labels)
        place = torch.empty_like(p)
        place[p] = torch.arange(VOCAB)
        labels, kl_labels = (torch.where(t < 0, t, place[t]) for t in (labels, kl_labels))
        return plain_loss(hidden, weight[p], labels, desirable, (ref[0], ref[1][p]), kl_labels)

    return loss


def our_loss(hidden, weight, labels, desirable, ref, kl_labels) -> Tensor:
    logits, ref_logits = linear(hidden, weight), linear(*ref)
    kl = {"kl_logits": logits.detach(), "ref_kl_logits": ref_logits, "kl_labels": kl_labels}
    weights = {"desirable_weight": WEIGHTS[0], "undesirable_weight": WEIGHTS[1]}
    return kto_loss(logits, labels, desirable, ref_logits=ref_logits, **kl, beta=BETA, **weights).loss


def our_linear_loss(hidden, weight, labels, desirable, ref, kl_labels) -> Tensor:
    kl = {"kl_hidden": hidden.detach(), "ref_kl_hidden": ref[0], "kl_labels": kl_labels}
    weights = {"desirable_weight": WEIGHTS[0], "undesirable_weight": WEIGHTS[1]}
    return linear_kto_loss(
        hidden, weight, labels, desirable, ref_hidden=ref[0], ref_weight=ref[1], **kl, beta=BETA, **weights
    ).loss


OURS = {"kto_loss": our_loss, "linear_kto_loss": our_linear_loss}


def train(loss: Callable, dtype: torch.dtype, steps: int, scale: float = 1.0, error: float = 1.0):
    """The loss of each step, and the parameters before and after each, (1 + steps, P). The loss is multiplied by `scale` and its
    gradient divided by it; `error` stays in the gradient."""
    torch.manual_seed(0)
    model, reference = Model(), Model()
    reference.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    start, losses, path = parameters(model), [], []
    for tokens, labels, desirable in batches(steps):
        with torch.no_grad():
            ref = reference(tokens).to(dtype), reference.head.weight.to(dtype)
        value = loss(model(tokens).to(dtype), model.head.weight.to(dtype), labels, desirable, ref, labels.roll(1, 0))
        optimizer.zero_grad()
        (scale * error * value).backward()
        for parameter in model.parameters():
            parameter.grad /= scale
        optimizer.step()
        losses.append(value.item())
        path.append(parameters(model))
    return losses, torch.stack([start, *path])


def parameters(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distances(path: Tensor, other: Tensor) -> Tensor:
    return (path.double() - other.double()).norm(dim=1)


def run(dtype: str, steps: int, seeds: int = 2, error: float = 1.0, tick: Callable = lambda: None) -> dict:
    """Losses; how far from plain PyTorch's parameters ours are after each step; and how far apart at most any two runs of
    plain PyTorch are: both as shares of the way from the start. `error` multiplies our gradients."""

    def trained(*arguments):
        result = train(arguments[0], DTYPES[dtype], steps, *arguments[1:])
        tick()
        return result

    losses, path = trained(plain_loss)
    plain = [path]
    for seed in range(seeds):
        plain += [trained(in_order(order, torch.Generator().manual_seed(seed)))[1] for order in ORDERS]
        plain.append(trained(plain_loss, 3.0 + seed)[1])
    spread = torch.stack([distances(a, b) for a, b in itertools.combinations(plain, 2)]).amax(0)
    case = {"dtype": dtype, "steps": steps, "plain runs": len(plain)}
    case["losses"], case["distances"] = {PLAIN: losses}, {}
    travelled = distances(path, path[:1])
    case["distances"][PLAIN] = (spread / travelled)[1:].tolist()
    _, other = trained(plain_loss, 1.0, 1.01)
    case["distances"][WRONG] = (distances(other, path) / travelled)[1:].tolist()
    for name, loss in OURS.items():
        case["losses"][name], other = trained(loss, 1.0, error)
        case["distances"][name] = (distances(other, path) / travelled)[1:].tolist()
    return case


def runs(seeds: int = 2) -> int:
    return 2 + seeds * (len(ORDERS) + 1) + len(OURS)


def figure(result: dict):
    """For each dtype the losses, and the distances."""
    from .plots import BLUE, INK, MUTED, EndName, Picture

    case = result["cases"][0]
    apart = "apart at most"
    picture = Picture(
        "Training does not notice",
        f"{case['steps']} steps of a small model under SGD with momentum, from one seed. Grey: how far {case['plain runs']} runs "
        "of plain PyTorch are apart that differ by rounding alone (order of summation, loss scale). Blue: how far our "
        "runs are from plain PyTorch's. Dotted: plain PyTorch with gradients 1 % too large.",
        result,
        panels=2 * len(result["cases"]),
        columns=2,
    )
    looks = {
        PLAIN: (MUTED, "-", 1.2),
        "kto_loss": (BLUE, "--", 1.6),
        "linear_kto_loss": (BLUE, "-", 2.0),
        WRONG: (INK, ":", 1.0),
    }
    for case, left, right in zip(result["cases"], picture.panels[::2], picture.panels[1::2]):
        steps = range(1, case["steps"] + 1)
        for axes, values in ((left, case["losses"]), (right, case["distances"])):
            for name, series in values.items():
                color, dashes, width = looks[name]
                axes.plot(steps, series, color=color, linestyle=dashes, linewidth=width)
                text = f"{name}, {apart}" if axes is right and name == PLAIN else name
                EndName(axes, (steps[-1], series[-1]), text, color=color)
            axes.set_xlim(0, case["steps"])
            axes.set_xlabel("step")
            axes.grid(axis="y")
        left.set_title(f"{case['dtype']}: loss", color=INK)
        left.set_ylim(0)
        right.set_title(f"{case['dtype']}: distance of the parameters, as a share of the way from the start", color=INK)
        right.set_yscale("log")
        right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # exponents of mathtext are too small to read
    return picture.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--draw-only", action="store_true", help="the picture of the results that are there")
    args = parser.parse_args()
    if not args.draw_only:
        with Progress() as progress:
            task = progress.add_task("runs", total=len(DTYPES) * runs())
            cases = [run(dtype, args.steps, tick=lambda: progress.advance(task)) for dtype in DTYPES]
        result = {"benchmark": "training", "device kind": "cpu", **describe("cpu"), "cases": cases}
        RESULTS.write_text(json.dumps(result) + "\n")
    import matplotlib

    from .plots import STYLE, digest

    result = json.loads(RESULTS.read_text())
    with matplotlib.rc_context(STYLE):
        metadata = {"Date": None, "Creator": None, "Identifier": digest(result)}
        figure(result).savefig(RESULTS.with_suffix(".svg"), metadata=metadata)


if __name__ == "__main__":
    main()
