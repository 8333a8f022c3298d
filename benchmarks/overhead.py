"""`python -m benchmarks overhead`: what a call of a loss costs besides its arithmetic.

Eight tokens of a vocabulary of 64 leave almost no arithmetic: the time is that of Python, of torch's dispatch and of the
checks. Ours and the same loss in plain PyTorch, as the README has it, take turns in one run on one thread, and their ratio
is what counts. Both must return the same loss and the same gradients before anything is timed. Two yardsticks stand
beside them: a custom operator that does nothing, and the plain loss on TRL's log-softmax.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kto_kernels import LinearPlan, linear_kto_loss

from . import peers
from .benchmark import Benchmark
from .logits import FORWARD, FRESH, make_batch
from .measure import Timed, interleaved
from .peers import BETA, KL, Batch
from .selection import Setting, present
from .session import Session
from .shapes import Shape

SHAPE = Shape(8, 64, 64)
REPEATS, QUICK_REPEATS = 100, 3  # rounds
CALLS = 20  # of one variant in a row, in each round
PLAIN, EMPTY = "plain PyTorch", "an empty custom operator"
FROM_LOGITS, FROM_HIDDEN = "kto_loss, cpu", "linear_kto_loss, cpu"
MODES = (FORWARD, FRESH)
# How many times plain PyTorch's time ours may take. The loss from hidden states forms its gradients in the forward, so that
# only both passes together can be compared.
AT_MOST = {(FROM_LOGITS, FORWARD): 2.5, (FROM_LOGITS, FRESH): 2.0, (FROM_HIDDEN, FRESH): 4.0}


def plain_kto(logits: Tensor, ref_logps: Tensor, labels: Tensor, desirable: Tensor, kl: float, beta: float) -> Tensor:
    """`plain_kto` of the README, with the reference's log-probabilities in the place of the reference's logits."""
    logps = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    margin = beta * ((logps * (labels != -100)).sum(-1) - ref_logps - kl)
    return (1 - torch.sigmoid(torch.where(desirable, margin, -margin))).mean()


@torch.library.custom_op("kto_kernels_benchmarks::empty", mutates_args=())
def empty(logits: Tensor) -> Tensor:
    return logits.new_empty(())


def _empty_backward(ctx, grad: Tensor) -> Tensor:
    (logits,) = ctx.saved_tensors
    return torch.empty_like(logits)


empty.register_autograd(_empty_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@dataclass
class Subject:
    """One of our losses, and what it is measured against."""

    name: str
    leaves: list[Tensor]  # what takes a gradient
    ours: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    yardsticks: dict[str, Callable[[], Tensor]]


def from_logits(batch: Batch) -> Subject:
    logits = batch.logits.requires_grad_()
    setting = Setting("cpu", logits.dtype, SHAPE)
    others, _ = present(peers.PEERS, ("trl",), setting)
    ours = peers.ours("cpu")
    yardsticks = {name: lambda loss_of=loss_of: loss_of(batch, logits) for name, loss_of in others.items()}
    return Subject(
        FROM_LOGITS,
        [logits],
        lambda: ours(batch, logits),
        lambda: plain_kto(logits, batch.ref_logps, batch.labels, batch.desirable, KL, BETA),
        {EMPTY: lambda: empty(logits)} | yardsticks,
    )


def from_hidden(batch: Batch) -> Subject:
    hidden = torch.randn(*batch.labels.shape, SHAPE.hidden, requires_grad=True)
    weight = (3 * SHAPE.hidden**-0.5 * torch.randn(SHAPE.vocab, SHAPE.hidden)).requires_grad_()
    given = {"ref_logps": batch.ref_logps, "kl": KL, "beta": BETA}
    plan = LinearPlan.of([SHAPE.completion] * SHAPE.sequences, SHAPE.vocab, SHAPE.hidden, hidden.dtype)
    assert len(plan.chunks) == 1
    return Subject(
        FROM_HIDDEN,
        [hidden, weight],
        lambda: linear_kto_loss(hidden, weight, batch.labels, batch.desirable, **given, backend="cpu").loss,
        lambda: plain_kto(hidden @ weight.T, batch.ref_logps, batch.labels, batch.desirable, KL, BETA),
        {},
    )


def with_backward(loss_of: Callable[[], Tensor], leaves: list[Tensor]) -> Tensor:
    """A training step's part of the loss, the same for every variant: the gradients of the step before are dropped."""
    for leaf in leaves:
        leaf.grad = None
    loss = loss_of()
    loss.backward()
    return loss


def gate(subject: Subject) -> None:
    """Stops the run where our loss or gradients are not plain PyTorch's."""
    found = []
    for loss_of in (subject.ours, subject.plain):
        loss = with_backward(loss_of, subject.leaves)
        found.append([loss.detach(), *(leaf.grad for leaf in subject.leaves)])
    for mine, theirs in zip(*found):
        error, scale = (mine - theirs).abs().max().item(), theirs.abs().max().item()
        if not error <= 1e-5 * scale:
            raise SystemExit(f"gate: {subject.name}: differs from plain PyTorch by {error:.1e}; nothing was timed")


def median_of_calls(run: Callable[[], object]) -> float:
    """Processor seconds of a call, which other programs hardly lengthen, without the release of its result."""
    seconds = []
    for _ in range(CALLS):
        start = time.process_time()
        result = run()
        seconds.append(time.process_time() - start)
        del result
    return statistics.median(seconds)


def run(make: Callable[[Batch], Subject], mode: str, repeats: int, tick: Callable) -> dict:
    """Times of one loss, with or without its backward: a case of the results file. Gradients are on in both."""
    subject = make(make_batch(SHAPE.scored, SHAPE.vocab, torch.float32))
    gate(subject)
    variants = {subject.name: subject.ours, PLAIN: subject.plain} | subject.yardsticks

    def timed(loss_of: Callable[[], Tensor]) -> Timed:
        if mode == FORWARD:
            return Timed(lambda: None, lambda _: loss_of())
        return Timed(lambda: None, lambda _: with_backward(loss_of, subject.leaves))

    seconds = interleaved({name: timed(f) for name, f in variants.items()}, repeats, median_of_calls, tick)
    shape = {"dtype": "fp32", "N": SHAPE.scored, "V": SHAPE.vocab, "H": SHAPE.hidden if make is from_hidden else 0}
    return {"loss": subject.name, "mode": mode, **shape, "repeats": repeats, "calls": CALLS} | {
        "at most": AT_MOST.get((subject.name, mode)),
        "seconds": seconds,
    }


# The command ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--repeats", type=int, default=REPEATS, help="rounds (default: %(default)s)")


def measure(session: Session) -> None:
    repeats = QUICK_REPEATS if session.args.quick else session.args.repeats
    for make, mode in itertools.product((from_logits, from_hidden), MODES):
        session.add(run(make, mode, repeats, session.task(f"{make.__name__}, {mode}", repeats + 1)))


BENCHMARK = Benchmark(
    "overhead",
    "what a call costs besides its arithmetic, beside plain PyTorch (CPU 30 s)",
    measure,
    options=options,
    devices=("cpu",),
    threads=1,
    ceilings=False,
)
