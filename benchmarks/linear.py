"""`python -m benchmarks linear`: the loss from hidden states, ours against the peers, on one batch.

Every variant computes the KTO loss of N tokens in 4 sequences from policy and reference hidden states and a KL number,
and the gradients of the policy's hidden states and (unless it is frozen) of its head. The gate compares loss and
gradients with fp64 before anything is timed. The floor is the GEMMs alone, unchunked, into buffers that are there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kto_kernels import reference
from kto_kernels.plan import LinearPlan

from . import gate
from .linear_peers import LinearBatch, LossOf, ours, peers
from .measure import DTYPES, SEQUENCES, Timed, clock_of, interleaved, peak_extra_bytes
from .peers import NAIVE, backends

SHAPES = {"cpu": [(1024, 576, 49152)], "cuda": [(8192, 4096, 128256), (8192, 4096, 151936)]}  # N, H, V
QUICK = (128, 128, 8192)
DEFAULT_DTYPES = {"cpu": ["fp32", "bf16"], "cuda": ["bf16"]}
REPEATS = 5
TRAINED, FROZEN = "trained", "frozen"
HEADS = {"cpu": [TRAINED], "cuda": [TRAINED, FROZEN]}
# A sequence's coefficient is known only when its logits have become gradients: it goes over 16-bit hidden states and
# over 16-bit products, which rounds once more than autograd does. Another blocking of a GEMM rounds otherwise, too.
SLACK = {"fp32": 1.001, "bf16": 1.15, "fp16": 1.15}
DIFFERS = 1e-2  # of the truth, on top of naive PyTorch's own error: a peer beyond that computes something else
FP64_ROWS = 256


def make_batch(n: int, hidden: int, vocab: int, head: str, dtype: torch.dtype, device: str = "cpu") -> LinearBatch:
    torch.manual_seed(0)
    tokens = max(1, n // SEQUENCES)
    states = torch.randn(SEQUENCES, tokens, hidden, device=device)
    weight = torch.randn(vocab, hidden, device=device) * (3 * hidden**-0.5)  # logits of standard deviation 3

    def near(x: Tensor) -> Tensor:  # the policy is near its reference, as in training: nothing saturates
        return (x + 0.03 * x.std() * torch.randn_like(x)).to(dtype)

    ref_hidden, ref_weight = near(states), near(weight)
    states, weight = states.to(dtype), weight.to(dtype)
    labels = torch.randint(vocab, (SEQUENCES, tokens), device=device)
    for x, y in zip(states, labels):  # half of the tokens are the model's own choice, as in a completion
        y[::2] = F.linear(x[::2], weight).argmax(-1)
    desirable = torch.tensor([True, False, True, True], device=device)
    return LinearBatch(
        states.requires_grad_(), weight.requires_grad_(head == TRAINED), ref_hidden, ref_weight, labels, desirable
    )


def trained(batch: LinearBatch) -> dict[str, Tensor]:
    leaves = {"hidden": batch.hidden, "weight": batch.weight}
    return {f"{name} gradient": leaf for name, leaf in leaves.items() if leaf.requires_grad}


def with_gradients(loss_of: LossOf, batch: LinearBatch) -> tuple[Tensor, ...]:
    loss = loss_of(batch)
    return loss.detach(), *torch.autograd.grad(loss, list(trained(batch).values()))


@torch.no_grad()
def truth(batch: LinearBatch) -> dict[str, Tensor]:
    """Loss and gradients in fp64, by slices of rows, so that a large batch fits."""

    def slices(*tensors: Tensor):
        return zip(*(tensor.split(FP64_ROWS) for tensor in tensors))

    def sums(hidden: Tensor, head: Tensor) -> Tensor:
        return torch.stack(
            [
                sum(reference.token_logps(F.linear(x.double(), head), y).sum() for x, y in slices(*sequence))
                for sequence in zip(hidden, batch.labels)
            ]
        )

    head = batch.weight.double()
    log_ratios = sums(batch.hidden, head) - sums(batch.ref_hidden, batch.ref_weight.double())
    loss, slopes = gate.true_loss_and_slopes(log_ratios, batch.desirable)
    found = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in trained(batch).items()}
    for *sequence, slope in zip(batch.hidden, batch.labels, found["hidden gradient"], slopes):
        for x, y, grad in slices(*sequence):
            of_logits = reference.token_logps_grad(F.linear(x.double(), head), y, slope.expand(len(y)))
            grad.copy_(of_logits @ head)
            if "weight gradient" in found:
                found["weight gradient"].addmm_(of_logits.T, x.double())
    return {"loss": loss, **found}


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def bare_gemms(batch: LinearBatch) -> tuple[str, Callable[[object], None]]:
    """The floor: every product at its full size, once."""
    hidden, ref_hidden = batch.hidden.detach().flatten(0, 1), batch.ref_hidden.flatten(0, 1)
    weight = batch.weight.detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    grads = {name: torch.empty_like(leaf) for name, leaf in trained(batch).items()}

    def run(_: object) -> None:
        torch.mm(ref_hidden, batch.ref_weight.T, out=logits)
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=grads["hidden gradient"].view_as(hidden))
        if "weight gradient" in grads:
            torch.mm(logits.T, hidden, out=grads["weight gradient"])

    return f"bare GEMMs, {2 + len(grads)}G", run


def memory_variants(device: str) -> dict[str, LossOf]:
    """What the memory of one step is measured of: all that is there."""
    mine = {f"linear_kto_loss, {backend}": ours(backend) for backend in backends(device)}
    return mine | {name: loss_of for name, loss_of in peers().items() if not isinstance(loss_of, str)}


def run(
    dtype: str, n: int, hidden: int, vocab: int, head: str, repeats: int, tick: Callable, device: str = "cpu"
) -> dict:
    batch = make_batch(n, hidden, vocab, head, DTYPES[dtype], device)
    absent = {name: why for name, why in peers().items() if isinstance(why, str)}
    variants = memory_variants(device)
    mine = [name for name in variants if name.startswith("linear_kto_loss")]

    true = truth(batch)
    errors = {}
    for name, loss_of in variants.items():
        try:
            found = with_gradients(loss_of, batch)
        except RuntimeError as error:  # no compiler, no memory
            if name in (*mine, NAIVE):
                raise
            absent[name] = f"fails: {str(error).splitlines()[0]}"
            continue
        errors[name] = {what: rms(x.double() - right) for (what, right), x in zip(true.items(), found)}
        del found
    gate.hold(errors, mine, SLACK[dtype])
    scale = {what: rms(right) for what, right in true.items()}
    del true
    for name in errors.keys() - {*mine, NAIVE}:
        for what, error in errors[name].items():
            if not error <= DIFFERS * scale[what] + 2 * errors[NAIVE][what]:
                absent[name] = f"differs from fp64: {what} by {error:.1e} of {scale[what]:.1e}"
    variants = {name: loss_of for name, loss_of in variants.items() if name not in absent}

    name, floor = bare_gemms(batch)
    runs = {name: Timed(lambda: None, floor)}
    for name, loss_of in variants.items():
        runs[name] = Timed(lambda: None, lambda _, loss_of=loss_of: with_gradients(loss_of, batch))
    seconds = interleaved(runs, repeats, clock_of(device), tick)
    tokens = batch.labels.shape[1]
    plan = LinearPlan.of(
        [tokens] * SEQUENCES, vocab, hidden, DTYPES[dtype], needs_weight=head == TRAINED, device=device
    )
    case = {"dtype": dtype, "N": batch.labels.numel(), "H": hidden, "V": vocab, "head": head, "repeats": repeats}
    return case | {
        "plan": {"text": repr(plan), "peak bytes": plan.peak_bytes, "variants": mine},
        "fp64": scale,
        "errors against fp64": errors,
        "seconds": seconds,
        "absent": absent,
    }


def memory(variant: str, dtype: str, n: int, hidden: int, vocab: int, head: str, device: str = "cpu") -> int:
    """Peak bytes of one step above its inputs; on the CPU, to be run in a fresh process."""
    loss_of = memory_variants(device)[variant]
    # Code and thread stacks are loaded before the measurement; with the second shape, code compiled for any shape.
    for small in ((32, 24, 64), (64, 48, 128)):
        with_gradients(loss_of, make_batch(*small, head, DTYPES[dtype], device))
    batch = make_batch(n, hidden, vocab, head, DTYPES[dtype], device)
    return peak_extra_bytes(lambda: with_gradients(loss_of, batch), device)


if __name__ == "__main__":
    variant, dtype, n, hidden, vocab, head, device = sys.argv[1:]
    print(memory(variant, dtype, int(n), int(hidden), int(vocab), head, device))
