"""`python -m benchmarks logits`: the loss from logits against naive PyTorch, on one batch.

Every variant computes the same thing: the KTO loss of N tokens in 4 sequences with reference log-probabilities and a KL
number, and (where it says so) the gradient to the logits. The gate compares loss and gradient with fp64 before anything
is timed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from kto_kernels import kto_loss, reference

from .measure import interleaved, peak_extra_bytes

SEQUENCES = 4
BETA, KL = 0.1, 0.05
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAIVE = "naive PyTorch"
VARIANTS = (NAIVE, "kto_loss, gradient in place", "kto_loss, fresh gradient", "kto_loss, forward only")


@dataclass
class Batch:
    logits: Tensor  # (4, N / 4, V)
    labels: Tensor
    desirable: Tensor
    ref_logps: Tensor


def make_batch(n: int, vocab: int, dtype: torch.dtype) -> Batch:
    torch.manual_seed(0)
    logits = torch.randn(SEQUENCES, n // SEQUENCES, vocab).mul_(3).to(dtype)
    labels = torch.randint(vocab, logits.shape[:-1])
    labels[:, ::2] = logits[:, ::2].argmax(-1)  # half of the tokens are the model's own choice, as in a completion
    with torch.no_grad():
        logps = kto_loss(logits, labels, torch.ones(SEQUENCES, dtype=torch.bool), kl=0.0).logps
    # The policy is near its reference, as in training: nothing saturates.
    ref_logps = logps + torch.tensor([1.0, -2.0, 3.0, 0.5])
    return Batch(logits, labels, torch.tensor([True, False, True, True]), ref_logps)


class _Producer(torch.autograd.Function):
    """Stands for the model's head: makes the logits the output of a computation without copying them."""

    @staticmethod
    def forward(ctx, logits, weight):
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, grad):
        return None, None


def produced(logits: Tensor) -> Tensor:
    return _Producer.apply(logits, torch.ones((), requires_grad=True))


def ours(batch: Batch, logits: Tensor, inplace: bool):
    return kto_loss(
        logits,
        batch.labels,
        batch.desirable,
        ref_logps=batch.ref_logps,
        kl=KL,
        beta=BETA,
        inplace_backward=inplace,
    ).loss


def naive(batch: Batch, logits: Tensor) -> Tensor:
    """What trainers write: fp32 log-softmax, gather, sum, sigmoid."""
    logps = logits.float().log_softmax(-1).gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1).sum(-1)
    margin = BETA * (logps - batch.ref_logps - KL)
    return (1 - torch.sigmoid(torch.where(batch.desirable, margin, -margin))).mean().float()


def with_gradient(loss_of, logits: Tensor) -> tuple[Tensor, Tensor]:
    loss = loss_of(logits)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def gate(batch: Batch) -> dict:
    """Errors against fp64 of ours and of naive PyTorch; raises where ours are larger.

    fp64 goes by slices of rows, so that a large batch fits.
    """
    truth_logps = torch.cat(
        [reference.token_logps(x.double(), y) for x, y in zip(batch.logits.unbind(), batch.labels.unbind())]
    ).view(batch.labels.shape)
    r = truth_logps.sum(-1) - batch.ref_logps
    arguments = (r, torch.tensor(KL, dtype=torch.float64), batch.desirable, BETA, (1.0, 1.0))
    true_loss = reference.loss(*arguments).mean()
    slopes = reference.loss_slope(*arguments) / SEQUENCES

    answers = {
        "ours": with_gradient(lambda x: ours(batch, x, False), produced(batch.logits)),
        "ours in place": with_gradient(lambda x: ours(batch, x, True), produced(batch.logits.clone())),
        "naive": with_gradient(lambda x: naive(batch, x), batch.logits.detach().requires_grad_()),
    }
    errors = {
        name: {"loss": abs(loss.double() - true_loss).item(), "gradient": 0.0} for name, (loss, _) in answers.items()
    }
    largest = 0.0
    for i, slope in enumerate(slopes):
        for begin in range(0, batch.labels.shape[1], 64):
            rows = slice(begin, begin + 64)
            truth = reference.token_logps_grad(
                batch.logits[i, rows].double(), batch.labels[i, rows], slope.expand(len(batch.labels[i, rows]))
            )
            largest = max(largest, truth.abs().max().item())
            for name, (_, grad) in answers.items():
                error = (grad[i, rows].double() - truth).square().sum().item()
                errors[name]["gradient"] += error
    for error in errors.values():
        error["gradient"] = (error["gradient"] / batch.logits.numel()) ** 0.5
    for name in ("ours", "ours in place"):
        for what, unit in (("loss", torch.finfo(torch.float32).eps), ("gradient", 0.0)):
            allowed = 1.001 * errors["naive"][what] + unit
            if not errors[name][what] <= allowed:
                raise SystemExit(
                    f"gate: {name}, {what}: error {errors[name][what]:.3e} > {allowed:.3e}; nothing was timed"
                )
    return {"rms or absolute error against fp64": errors, "largest gradient": largest}


def run(dtype: str, n: int, vocab: int, repeats: int, tick) -> dict:
    batch = make_batch(n, vocab, DTYPES[dtype])
    accuracy = gate(batch)
    scratch = batch.logits.clone()
    leaf = batch.logits.detach().requires_grad_()

    def overwritten():
        scratch.copy_(batch.logits)  # the last gradient went over it
        return produced(scratch)

    def forward_only(x):
        with torch.no_grad():
            return ours(batch, x, False)

    runs = {
        NAIVE: (lambda: leaf, lambda x: with_gradient(lambda y: naive(batch, y), x)),
        VARIANTS[1]: (overwritten, lambda x: with_gradient(lambda y: ours(batch, y, True), x)),
        VARIANTS[2]: (lambda: produced(batch.logits), lambda x: with_gradient(lambda y: ours(batch, y, False), x)),
        VARIANTS[3]: (lambda: batch.logits, forward_only),
        "logits.sum()": (lambda: batch.logits, lambda x: x.sum()),
    }
    times = interleaved(runs, repeats, tick)
    return {"dtype": dtype, "N": n, "V": vocab, "repeats": repeats, "accuracy": accuracy, "seconds": times}


def memory(variant: str, dtype: str, n: int, vocab: int) -> int:
    """Peak resident bytes of one loss step above its inputs; run in a fresh process."""
    small = make_batch(8, 64, DTYPES[dtype])
    batch = make_batch(n, vocab, DTYPES[dtype])
    steps = {
        NAIVE: lambda b: with_gradient(lambda x: naive(b, x), b.logits.detach().requires_grad_()),
        VARIANTS[1]: lambda b: with_gradient(lambda x: ours(b, x, True), produced(b.logits)),
        VARIANTS[2]: lambda b: with_gradient(lambda x: ours(b, x, False), produced(b.logits)),
    }
    steps[variant](small)  # code and thread stacks are loaded before the measurement
    return peak_extra_bytes(lambda: steps[variant](batch))


if __name__ == "__main__":
    print(memory(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
