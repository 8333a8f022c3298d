"""`python -m benchmarks logits`: the loss from logits, ours against the peers, on one batch.

Every variant computes the same thing: the KTO loss of N tokens in 4 sequences with reference log-probabilities and a KL
number, and (where it says so) the gradient to the logits. The gate compares loss and gradient with fp64 before anything
is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from kto_kernels import kto_loss, reference

from . import gate
from .measure import DTYPES, SEQUENCES, Timed, clock_of, interleaved, peak_extra_bytes
from .peers import NAIVE, Batch, LossOf, backends, naive, ours, peers

SHAPES = {"cpu": [(1024, 49152)], "cuda": [(8192, 128256), (64, 128256), (8, 128256)]}  # N, V
QUICK = (64, 4096)
DEFAULT_DTYPES = {"cpu": ["fp32", "bf16"], "cuda": ["fp32", "bf16"]}
REPEATS = 15
# What reads the logits once and does nothing else: the yardstick of a pass.
YARDSTICK = {"cpu": "logits.sum()", "cuda": "copy"}
FORWARD, FRESH, INPLACE = "forward only", "forward + backward", "forward + in-place backward"


def make_batch(n: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> Batch:
    torch.manual_seed(0)
    tokens = max(1, n // SEQUENCES)
    logits = torch.empty(SEQUENCES, tokens, vocab, dtype=dtype, device=device)
    for sequence in logits:
        sequence.copy_(3 * torch.randn(tokens, vocab, device=device))
    labels = torch.randint(vocab, logits.shape[:-1], device=device)
    labels[:, ::2] = logits[:, ::2].argmax(-1)  # half of the tokens are the model's own choice, as in a completion
    with torch.no_grad():
        logps = kto_loss(logits, labels, torch.ones(SEQUENCES, dtype=torch.bool, device=device), kl=0.0).logps
    # The policy is near its reference, as in training: nothing saturates.
    ref_logps = logps + torch.tensor([1.0, -2.0, 3.0, 0.5], device=device)
    return Batch(logits, labels, torch.tensor([True, False, True, True], device=device), ref_logps)


class _Producer(torch.autograd.Function):
    """Stands for the model's head: makes the logits the output of a computation without copying them."""

    @staticmethod
    def forward(ctx, logits, weight):
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, grad):
        return None, None


def produced(logits: Tensor) -> Tensor:
    return _Producer.apply(logits, torch.ones((), device=logits.device, requires_grad=True))


def with_gradient(loss_of: LossOf, batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
    loss = loss_of(batch, logits)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def forward_only(loss_of: LossOf, batch: Batch, logits: Tensor) -> Tensor:
    with torch.no_grad():
        return loss_of(batch, logits)


def errors_of(batch: Batch, mine: dict[str, LossOf]) -> dict:
    """Errors against fp64 of ours and of naive PyTorch; raises where ours are larger.

    fp64 goes by slices of rows, so that a large batch fits.
    """
    sequences = list(zip(batch.logits.unbind(), batch.labels.unbind()))
    slices = [slice(begin, begin + 64) for begin in range(0, batch.labels.shape[1], 64)]
    r = torch.stack(
        [sum(reference.token_logps(x[rows].double(), y[rows]).sum() for rows in slices) for x, y in sequences]
    )
    true_loss, slopes = gate.true_loss_and_slopes(r - batch.ref_logps, batch.desirable)

    errors = {}
    for name, loss_of in {NAIVE: naive, **mine}.items():
        loss, grad = with_gradient(loss_of, batch, produced(batch.logits.clone()))
        squares = 0.0
        for i, (x, y) in enumerate(sequences):
            for rows in slices:
                truth = reference.token_logps_grad(x[rows].double(), y[rows], slopes[i].expand(len(y[rows])))
                squares += (grad[i, rows].double() - truth).square().sum().item()
        errors[name] = {
            "loss": abs(loss.double() - true_loss).item(),
            "gradient": (squares / batch.logits.numel()) ** 0.5,
        }
        del loss, grad
    gate.hold(errors, mine)
    return errors


def run(dtype: str, n: int, vocab: int, repeats: int, tick: Callable, device: str = "cpu") -> dict:
    batch = make_batch(n, vocab, DTYPES[dtype], device)
    found = peers(device)
    absent = {name: why for name, why in found.items() if isinstance(why, str)}
    theirs = {name: loss_of for name, loss_of in found.items() if name not in absent}
    names = {backend: f"kto_loss, {backend}" for backend in backends(device)}
    errors = errors_of(
        batch,
        {name: ours(backend) for backend, name in names.items()}
        | {f"{name}, in place": ours(backend, inplace=True) for backend, name in names.items()},
    )

    scratch = batch.logits.clone()
    leaf = batch.logits.detach().requires_grad_()

    def overwritten() -> Tensor:
        scratch.copy_(batch.logits)  # the last gradient went over it
        return produced(scratch)

    def timed(loss_of: LossOf, step: Callable, setup: Callable[[], Tensor]) -> Timed:
        return Timed(setup, lambda x: step(loss_of, batch, x))

    runs = {}
    for name, loss_of in theirs.items():
        runs[f"{name}, {FRESH}"] = timed(loss_of, with_gradient, lambda: leaf)
        if device == "cuda":
            runs[f"{name}, {FORWARD}"] = timed(loss_of, forward_only, lambda: batch.logits)
    for backend, name in names.items():
        runs[f"{name}, {INPLACE}"] = timed(ours(backend, inplace=True), with_gradient, overwritten)
        runs[f"{name}, {FRESH}"] = timed(ours(backend), with_gradient, lambda: leaf)
        runs[f"{name}, {FORWARD}"] = timed(ours(backend), forward_only, lambda: batch.logits)
    if device == "cpu":
        runs[YARDSTICK[device]] = Timed(lambda: batch.logits, lambda x: x.sum())
    else:
        runs[YARDSTICK[device]] = Timed(lambda: batch.logits, scratch.copy_)
    seconds = interleaved(runs, repeats, clock_of(device), tick)
    case = {"dtype": dtype, "N": batch.labels.numel(), "V": vocab, "repeats": repeats}
    return case | {"errors against fp64": errors, "seconds": seconds, "absent": absent}


def memory_variants(device: str) -> dict[str, LossOf]:
    """What the memory of one step is measured of."""
    variants: dict[str, LossOf] = {f"{NAIVE}, {FRESH}": naive}
    for backend in backends(device):
        variants[f"kto_loss, {backend}, {INPLACE}"] = ours(backend, inplace=True)
        variants[f"kto_loss, {backend}, {FRESH}"] = ours(backend)
    return variants


def memory(variant: str, dtype: str, n: int, vocab: int, device: str = "cpu") -> int:
    """Peak bytes of one loss step above its inputs; on the CPU, to be run in a fresh process."""
    loss_of = memory_variants(device)[variant]
    small = make_batch(8, 64, DTYPES[dtype], device)
    batch = make_batch(n, vocab, DTYPES[dtype], device)
    with_gradient(loss_of, small, produced(small.logits))  # code and thread stacks are loaded before the measurement
    logits = produced(batch.logits)
    return peak_extra_bytes(lambda: with_gradient(loss_of, batch, logits), device)


if __name__ == "__main__":
    variant, dtype, n, vocab, device = sys.argv[1:]
    print(memory(variant, dtype, int(n), int(vocab), device))
