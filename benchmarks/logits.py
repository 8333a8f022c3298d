"""`python -m benchmarks logits`: the loss from logits, ours against the peers, on one batch.

Every variant computes the same thing: the KTO loss of N tokens, all of them scored, in 4 sequences with reference
log-probabilities and a KL number, and (where it says so) the gradient to the logits. The gate compares loss and gradient
with fp64 before anything is timed. On a GPU the few-row shapes are timed as replays of a CUDA graph.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from kto_kernels import kto_loss, reference

from . import gate
from .benchmark import Benchmark, Shapes, plan
from .measure import DTYPES, Failed, Timed, as_graph, clock_of, in_fresh_process, interleaved, peak_extra_bytes, reason
from .peers import NAIVE, PEERS, Batch, LossOf, naive, ours
from .selection import Setting, present, worth_timing
from .session import Session
from .shapes import SEQUENCES, Job, Shape, sweep

DTYPES_BY_DEFAULT = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16")}
BASE = {"cpu": Shape(1024, 0, 49152), "cuda": Shape(8192, 0, 128256)}
SCORED = {"cpu": 256, "cuda": 8192}  # tokens of a shape that is named by its model
SWEEP = {"cpu": (8, 32, 128, 512, 2048), "cuda": (8, 32, 64, 256, 1024, 4096)}


def jobs(device: str) -> list[Job]:
    """Without `--shapes`: one large batch and all the peers; then fewer rows and more, for the picture, without those
    that are compiled anew for every shape."""
    both = DTYPES_BY_DEFAULT[device]
    some = {"cpu": ("naive",), "cuda": ("naive", "trl", "quack")}[device]
    rest = sweep("sweep-n", BASE[device], SWEEP[device])
    return [Job(BASE[device], both)] + [Job(shape, both, some, memory=False) for shape in rest]


QUICK = Shape(64, 0, 4096)
REPEATS = 15
CAP = {"cpu": 20.0, "cuda": None}
GRAPH_ROWS = 64  # up to here a call is shorter than the time that Python takes to launch it
# The yardstick of a pass reads the logits once and does nothing else.
YARDSTICK = {"cpu": "logits.sum()", "cuda": "copy"}
FORWARD, FRESH, INPLACE = "forward only", "forward + backward", "forward + in-place backward"
# Passes over the logits that each needs at least: reads and writes.
PASSES = {FORWARD: 1, FRESH: 3, INPLACE: 3}


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


def gated(batch: Batch, variants: dict[str, LossOf], mine: list[str], cap: float | None) -> tuple[dict, dict]:
    """Errors against fp64, and why which peers are out; fp64 goes by slices of rows, so that a large batch fits."""
    sequences = list(zip(batch.logits.unbind(), batch.labels.unbind()))
    slices = [slice(begin, begin + 64) for begin in range(0, batch.labels.shape[1], 64)]
    r = torch.stack(
        [sum(reference.token_logps(x[rows].double(), y[rows]).sum() for rows in slices) for x, y in sequences]
    )
    true_loss, slopes = gate.true_loss_and_slopes(r - batch.ref_logps, batch.desirable)

    def truths():
        for i, (x, y) in enumerate(sequences):
            for rows in slices:
                yield i, rows, reference.token_logps_grad(x[rows].double(), y[rows], slopes[i].expand(len(y[rows])))

    def mean(squares: float) -> float:
        return (squares / batch.logits.numel()) ** 0.5

    def errors_of(result: tuple[Tensor, Tensor]) -> dict[str, float]:
        loss, grad = result
        squares = sum((grad[i, rows].double() - truth).square().sum().item() for i, rows, truth in truths())
        return {"loss": abs(loss.double() - true_loss).item(), "gradient": mean(squares)}

    scale = {"loss": true_loss.item(), "gradient": mean(sum(t.square().sum().item() for *_, t in truths()))}
    return gate.admit(
        variants, mine, lambda f: with_gradient(f, batch, produced(batch.logits.clone())), errors_of, scale, cap=cap
    )


def run(
    shape: Shape,
    dtype: str,
    repeats: int,
    tick: Callable,
    device: str = "cpu",
    peers: tuple[str, ...] = tuple(PEERS),
    backends: tuple[str, ...] | None = None,
    cap: float | None = None,
) -> dict:
    """Times of one shape and dtype: a case of the results file."""
    backends = worth_timing(device) if backends is None else backends
    batch = make_batch(shape.scored, shape.vocab, DTYPES[dtype], device)
    theirs, absent = present(PEERS, peers, Setting(device, DTYPES[dtype], shape))
    names = {backend: f"kto_loss, {backend}" for backend in backends}
    mine = {name: ours(backend) for backend, name in names.items()}
    mine |= {f"{name}, in place": ours(backend, inplace=True) for backend, name in names.items()}
    errors, refused = gated(batch, {NAIVE: naive} | theirs | mine, list(mine), cap)
    absent |= {name: why for name, why in refused.items() if name in theirs}

    scratch = batch.logits.clone()
    leaf = batch.logits.detach().requires_grad_()

    def overwritten() -> Tensor:
        scratch.copy_(batch.logits)  # the last gradient went over it
        return produced(scratch)

    def timed(loss_of: LossOf, step: Callable, setup: Callable[[], Tensor]) -> Timed:
        return Timed(setup, lambda x: step(loss_of, batch, x))

    runs = {}
    inplace = {peer.name for peer in PEERS.values() if peer.inplace}
    for name, loss_of in theirs.items():
        if name in refused:
            continue
        if name in inplace:
            runs[f"{name}, {INPLACE}"] = timed(loss_of, with_gradient, overwritten)
        else:
            runs[f"{name}, {FRESH}"] = timed(loss_of, with_gradient, lambda: leaf)
        runs[f"{name}, {FORWARD}"] = timed(loss_of, forward_only, lambda: batch.logits)
    for backend, name in names.items():
        runs[f"{name}, {INPLACE}"] = timed(ours(backend, inplace=True), with_gradient, overwritten)
        runs[f"{name}, {FRESH}"] = timed(ours(backend), with_gradient, lambda: leaf)
        runs[f"{name}, {FORWARD}"] = timed(ours(backend), forward_only, lambda: batch.logits)
    if device == "cpu":
        runs[YARDSTICK[device]] = Timed(lambda: batch.logits, lambda x: x.sum())
    else:
        runs[YARDSTICK[device]] = Timed(lambda: batch.logits, scratch.copy_)
    launches = {}
    if device == "cuda" and shape.scored <= GRAPH_ROWS:
        for name, plain in runs.items():
            try:
                runs[name], launches[name] = as_graph(plain), "CUDA graph"
            except Exception as error:  # what cannot be recorded is timed as it is
                launches[name] = f"no CUDA graph: {reason(error)}"
    seconds = interleaved(runs, repeats, clock_of(device), tick)
    absent |= dict.fromkeys(runs.keys() - seconds.keys(), "fails: out of memory while it was timed")
    case = {"dtype": dtype, "N": batch.labels.numel(), "V": shape.vocab, "model": shape.model, "repeats": repeats}
    return case | {"errors against fp64": errors, "seconds": seconds, "launches": launches, "absent": absent}


def memory_variants(device: str, backends: tuple[str, ...] | None = None) -> list[str]:
    """The variants whose memory is measured, over one step."""
    backends = worth_timing(device) if backends is None else backends
    mine = [f"kto_loss, {backend}, {mode}" for backend in backends for mode in (INPLACE, FRESH)]
    return [f"{NAIVE}, {FRESH}", *mine]


def memory(variant: str, shape: Shape, dtype: str, device: str = "cpu") -> int | None:
    """Peak bytes of one loss step above its inputs, on the CPU in a fresh process; None where it does not fit."""
    call = {"variant": variant, "n": shape.scored, "vocab": shape.vocab, "dtype": dtype, "device": device}
    try:
        return in_fresh_process("benchmarks.logits", call) if device == "cpu" else _memory(**call)
    except (Failed, torch.OutOfMemoryError):
        return None


def _memory(variant: str, n: int, vocab: int, dtype: str, device: str) -> int:
    name, mode = variant.rsplit(", ", 1)
    loss_of = naive if name == NAIVE else ours(name.rsplit(", ", 1)[1], inplace=mode == INPLACE)
    small = make_batch(8, 64, DTYPES[dtype], device)
    batch = make_batch(n, vocab, DTYPES[dtype], device)
    with_gradient(loss_of, small, produced(small.logits))  # code and thread stacks are loaded before the measurement
    logits = produced(batch.logits)
    return peak_extra_bytes(lambda: with_gradient(loss_of, batch, logits), device)


# The command ──────────────────────────────────────────────────────────────────────────────────────────────────────────

NARROW = Shape(2**20, 0, 8)  # a shape whose O(N) memory is seen beside the rest


def measure(session: Session) -> None:
    args = session.args
    inplace = [f"kto_loss, {backend}, {INPLACE}" for backend in args.backend[:1]]
    if inplace and not (args.quick or args.shapes):
        size = memory(inplace[0], NARROW, "fp32", args.device)
        session.result["in-place bytes per token"] = {"N": NARROW.scored, "V": NARROW.vocab, "bytes": size}
    for job, dtype, options, repeats, absent in plan(args):
        variants = memory_variants(args.device, args.backend) if job.memory else []
        tick = session.task(f"{job.shape}, {dtype}", repeats + 1 + len(variants))
        case = run(job.shape, dtype, repeats, tick, **options)
        case["absent"] |= absent
        case["peak extra bytes"] = {}
        for variant in variants:
            case["peak extra bytes"][variant] = memory(variant, job.shape, dtype, args.device)
            tick()
        session.add(case)


BENCHMARK = Benchmark(
    "logits",
    "the loss from logits, N large and a sweep of N (CPU 2 min, GPU 1 min)",
    measure,
    dtypes=tuple(DTYPES),
    peers=PEERS,
    cap=CAP,
    shapes=Shapes(jobs, QUICK, DTYPES_BY_DEFAULT, BASE, SCORED, REPEATS, hidden=False),
)


if __name__ == "__main__":
    print(json.dumps(_memory(**json.loads(sys.argv[1]))))
