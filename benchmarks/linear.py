"""`python -m benchmarks linear`: the loss from hidden states, ours against the peers, on one batch.

Every variant computes the KTO loss of N scored tokens in 4 sequences, behind prompts half as long, from policy and
reference hidden states and a KL number, and the gradients of the policy's hidden states and (unless it is frozen) of its
head. With `--objective dpo` it is the DPO loss of 4 pairs, without a KL number. The gate compares token log-probabilities, loss and gradients with fp64 before anything is timed. The floor is the GEMMs of the scored tokens
alone, unchunked, into buffers that are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kto_kernels import LinearPlan, reference

from . import gate
from .benchmark import Benchmark, Shapes, plan
from .linear_peers import IGNORED, INSTEAD, PEERS, LinearBatch, LossOf, naive, naive_scored, ours
from .linear_peers import SCORED as NAIVE_SCORED
from .measure import (
    DTYPES,
    Failed,
    Timed,
    clock_of,
    in_fresh_process,
    interleaved,
    limit_memory,
    peak_extra_bytes,
    reason,
)
from .objective import DPO, KTO, OBJECTIVES
from .peers import NAIVE
from .selection import Peer, Setting, present, worth_timing
from .session import Session
from .shapes import MODELS, Job, Shape, of_model

DTYPES_BY_DEFAULT = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
BASE = {"cpu": of_model("smollm2", 1024), "cuda": of_model("llama-3-8b", 8192)}
SCORED = {"cpu": 128, "cuda": 8192}  # tokens of a shape that is named by its model
TRAINED, FROZEN = "trained", "frozen"
HEADS = {"cpu": (TRAINED,), "cuda": (TRAINED, FROZEN)}


def jobs(device: str) -> list[Job]:
    """Without `--shapes`: one head and all the peers; then the other real heads, on a CPU with few tokens and the
    fastest peers only."""
    others = [of_model(name, SCORED[device]) for name in MODELS]
    others = [shape for shape in others if shape.model != BASE[device].model]
    if device == "cuda":
        return [Job(shape, ("bf16",)) for shape in (BASE[device], *others)]
    fast = ("scored", "liger")
    return [Job(BASE[device], ("fp32", "bf16"))] + [Job(shape, ("bf16",), fast, repeats=3) for shape in others]


PAIRS = {"objective": DPO, "sequences": 8}  # of a shape
PAIRED_BASE = {"cpu": replace(of_model("smollm2", 2048), **PAIRS), "cuda": replace(BASE["cuda"], **PAIRS)}


def paired_jobs(device: str) -> list[Job]:
    """The same of pairs: one head, and the peers that users of pairs have."""
    return [Job(PAIRED_BASE[device], DTYPES_BY_DEFAULT[device], ("naive", "scored", "trl", "liger"))]


LOGPS = gate.LOGPS
QUICK = Shape(128, 128, 8192)
REPEATS = 5
CAP = {"cpu": 20.0, "cuda": None}
# How much larger our gradients' errors may be than naive PyTorch's. In 16 bits autograd rounds the logits' gradient and the product. Ours also rounds the hidden states
# that a sequence's coefficient went over (or the product before it): three roundings instead of two.
SLACK = {"fp32": 1.001, "bf16": 1.5**0.5, "fp16": 1.5**0.5}
FP64_ROWS, FP64_WORDS = 256, 8192  # at a time
AGAIN = 5.0  # a call of more seconds on a CPU is not made again: noise is little of it
GATED_WORDS = 1024  # rows of the head's gradient that the gate looks at, and those of as many labels


def make_batch(shape: Shape, head: str, dtype: torch.dtype, device: str = "cpu") -> LinearBatch:
    torch.manual_seed(0)
    b, t = shape.sequences, shape.prompt + shape.completion

    def normal(*sizes: int, std: float = 1.0) -> Tensor:
        return torch.empty(*sizes, dtype=dtype, device=device).normal_(std=std)

    def near(x: Tensor) -> Tensor:  # the policy is near its reference: nothing saturates
        return torch.add(x, x.roll(1, -2), alpha=0.03)  # another row's numbers are as good as new ones

    scale = 3 * shape.hidden**-0.5  # logits of standard deviation 3
    ref_hidden, ref_weight = normal(b, t, shape.hidden), normal(shape.vocab, shape.hidden, std=scale)
    states, weight = near(ref_hidden), near(ref_weight)
    labels = torch.randint(shape.vocab, (b, t), device=device)
    for x, y in zip(states, labels):  # half of the tokens are the model's own choice, as in a completion
        for rows, words in zip(x[::2].split(FP64_ROWS), y[::2].split(FP64_ROWS)):
            words.copy_(F.linear(rows, weight).argmax(-1))
    labels[:, : shape.prompt] = IGNORED
    objective = OBJECTIVES[shape.objective]
    return LinearBatch(
        states.requires_grad_(),
        weight.requires_grad_(head == TRAINED),
        ref_hidden,
        ref_weight,
        labels,
        objective.desirable(b, device),
        shape.softcap,
        objective,
    )


def trained(batch: LinearBatch) -> dict[str, Tensor]:
    leaves = {"hidden": batch.hidden, "weight": batch.weight}
    return {f"{name} gradient": leaf for name, leaf in leaves.items() if leaf.requires_grad}


def with_gradients(loss_of: LossOf, batch: LinearBatch) -> dict[str, Tensor]:
    leaves = trained(batch)
    loss, token_logps = loss_of(batch)
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
    return found | {"loss": loss.detach()} | ({} if token_logps is None else {LOGPS: token_logps})


class Truth:
    """Loss and gradients in fp64: slices of rows and of the vocabulary at a time, so that a large head fits; of the
    head's gradient, the rows of `words`."""

    @torch.no_grad()
    def __init__(self, batch: LinearBatch):
        scored = batch.labels != IGNORED
        labels, sequence = batch.labels[scored], scored.nonzero()[:, 0]
        softcap, vocab = batch.softcap, len(batch.weight)
        self.rows = scored
        self.words = torch.cat(
            [labels[:GATED_WORDS], torch.arange(0, vocab, -(-vocab // GATED_WORDS)).to(labels)]
        ).unique()

        def logits(hidden: Tensor, head: Tensor) -> Tensor:
            return torch.cat([F.linear(hidden.double(), w.double()) for w in head.split(FP64_WORDS)], -1)

        def token_logps(hidden: Tensor, head: Tensor) -> Tensor:
            slices = zip(hidden[scored].split(FP64_ROWS), labels.split(FP64_ROWS))
            return torch.cat([reference.token_logps(logits(x, head), y, softcap=softcap) for x, y in slices])

        logps, ref_logps = token_logps(batch.hidden, batch.weight), token_logps(batch.ref_hidden, batch.ref_weight)
        self.log_ratios = logps.new_zeros(len(scored)).index_add_(0, sequence, logps - ref_logps)
        loss, slopes = gate.true_loss_and_slopes(self.log_ratios, batch.desirable, batch.objective)
        # The spread of the loss where the errors of all tokens' log-probabilities, the reference's too, are 1 of either sign.
        self.spread = (2 * slopes[sequence].square().sum()).sqrt().item()
        hidden = batch.hidden[scored]
        of_hidden = torch.zeros_like(hidden, dtype=torch.float64)
        of_words = of_hidden.new_zeros(len(self.words), hidden.shape[1])
        for x, y, slope, grad in zip(*(t.split(FP64_ROWS) for t in (hidden, labels, slopes[sequence], of_hidden))):
            of_logits = reference.token_logps_grad(logits(x, batch.weight), y, slope, softcap=softcap)
            for part, w in zip(of_logits.split(FP64_WORDS, 1), batch.weight.split(FP64_WORDS)):
                grad += part @ w.double()
            of_words += of_logits[:, self.words].T @ x.double()
        self.values = {"loss": loss, LOGPS: logps, "hidden gradient": of_hidden}
        if batch.weight.requires_grad:
            self.values["weight gradient"] = of_words

    def errors_of(self, found: dict[str, Tensor]) -> gate.Errors:
        errors = {}
        for what, x in found.items():
            if what == "hidden gradient":  # a prompt's is 0
                prompts = x[~self.rows].abs().max().item() if not self.rows.all() else 0.0
                errors[what] = max(gate.rms(x[self.rows].double() - self.values[what]), prompts)
            else:
                part = {LOGPS: self.rows, "weight gradient": self.words}.get(what, ...)
                errors[what] = gate.rms(x[part].double() - self.values[what])
        return errors

    @property
    def scale(self) -> gate.Errors:
        return {what: gate.rms(true) for what, true in self.values.items()}


def bare_gemms(batch: LinearBatch) -> tuple[str, Callable[[object], None]]:
    """The floor: every product of the scored rows at its full size, once."""
    scored = batch.labels != IGNORED
    hidden, ref_hidden = batch.hidden.detach()[scored], batch.ref_hidden[scored]
    weight = batch.weight.detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    of_hidden = torch.empty_like(hidden)
    of_weight = torch.empty_like(weight) if batch.weight.requires_grad else None

    def run(_: object) -> None:
        torch.mm(ref_hidden, batch.ref_weight.T, out=logits)
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=of_hidden)
        if of_weight is not None:
            torch.mm(logits.T, hidden, out=of_weight)

    return f"bare GEMMs, {gemm_units(batch.weight.requires_grad)}G", run


def gemm_units(trained_head: bool) -> int:
    """Reference and policy, and a product for each gradient."""
    return 4 if trained_head else 3


def name_of(backend: str, objective: str = KTO) -> str:
    return f"{OBJECTIVES[objective].function}, {backend}"


def peers_of(objective: str) -> Mapping[str, Peer]:
    return PEERS | INSTEAD[objective]


def variants_of(
    setting: Setting, peers: tuple[str, ...], backends: tuple[str, ...]
) -> tuple[dict[str, LossOf], dict[str, str]]:
    """Ours and the peers that are there, by name; and why the others are not."""
    shape = setting.shape
    theirs, absent = present(peers_of(shape.objective), peers, setting)
    return {name_of(backend, shape.objective): ours(backend, shape.budget) for backend in backends} | theirs, absent


def plan_of(shape: Shape, dtype: str, head: str, device: str) -> LinearPlan:
    return LinearPlan.of(
        [shape.completion] * shape.sequences,
        shape.vocab,
        shape.hidden,
        DTYPES[dtype],
        needs_weight=head == TRAINED,
        hidden_rows=shape.tokens,
        max_logits_bytes=shape.budget,
        pairs=OBJECTIVES[shape.objective].pairing,
        device=device,
    )


def gated(
    batch: LinearBatch, variants: dict[str, LossOf], dtype: str, cap: float | None = None
) -> tuple[dict[str, gate.Errors], dict[str, str], gate.Errors]:
    """Errors against fp64, why which peers are out, and the size of the true values."""
    truth = Truth(batch)
    mine = [name for name in variants if name.startswith(batch.objective.function)]
    everyone = {NAIVE: naive, NAIVE_SCORED: naive_scored} | variants
    found = gate.admit(
        everyone,
        mine,
        lambda f: with_gradients(f, batch),
        truth.errors_of,
        truth.scale,
        SLACK[dtype],
        cap,
        truth.spread,
    )
    return *found, truth.scale


def run(
    shape: Shape,
    dtype: str,
    head: str,
    repeats: int,
    tick: Callable,
    device: str = "cpu",
    peers: tuple[str, ...] = tuple(PEERS),
    backends: tuple[str, ...] | None = None,
    cap: float | None = None,
) -> dict:
    """Times of one shape, dtype and head: a case of the results file."""
    backends = worth_timing(device) if backends is None else backends
    batch = make_batch(shape, head, DTYPES[dtype], device)
    variants, absent = variants_of(Setting(device, DTYPES[dtype], shape), peers, backends)
    errors, refused, scale = gated(batch, variants, dtype, cap)
    absent |= {name: why for name, why in refused.items() if name in variants}

    floor_name, floor = bare_gemms(batch)
    runs = {floor_name: Timed(lambda: None, floor)}
    for name, loss_of in variants.items():
        if name not in refused:
            runs[name] = Timed(lambda: None, lambda _, loss_of=loss_of: with_gradients(loss_of, batch))
    seconds = interleaved(runs, repeats, clock_of(device), tick)
    absent |= dict.fromkeys(runs.keys() - seconds.keys(), "fails: out of memory while it was timed")
    peaks = {}
    for name in seconds.keys() - {floor_name} if device == "cuda" else ():
        peaks[name] = peak_extra_bytes(lambda name=name: runs[name].run(None), device)
    plan = plan_of(shape, dtype, head, device)
    mine = [name_of(backend, shape.objective) for backend in backends]
    return {"dtype": dtype, **shape.key, "head": head, "repeats": repeats} | {
        "plan": {"text": repr(plan), "peak bytes": plan.peak_bytes, "variants": mine},
        "fp64": scale,
        "errors against fp64": errors,
        "seconds": seconds,
        "peak extra bytes": peaks,
        "absent": absent,
    }


# One variant on its own ───────────────────────────────────────────────────────────────────────────────────────────────


def point(
    variant: str,
    shape: Shape,
    dtype: str,
    head: str,
    device: str = "cpu",
    repeats: int = 0,
    limit: int | None = None,
    cap: float | None = None,
) -> dict:
    """Peak bytes of one step above its inputs, and with `repeats` the median of its seconds (of the one call, if it is long); on the CPU in a fresh
    process, where it may take `limit` bytes, inputs and all, and `cap` seconds. `failed`: why there is none, or None."""
    call = {"variant": variant, "shape": asdict(shape), "dtype": dtype, "head": head, "device": device}
    call |= {"repeats": repeats, "limit": limit, "cap": cap}
    if device == "cpu":
        try:
            # Its own start takes seconds too.
            return in_fresh_process("benchmarks.linear", call, None if cap is None else cap * (repeats + 1) + 60)
        except Failed as failed:
            return {"peak extra bytes": None, "seconds": None, "failed": str(failed)}
    torch.cuda.empty_cache()
    found = _point(**call)
    torch.cuda.empty_cache()
    return found


def _point(
    variant: str, shape: dict, dtype: str, head: str, device: str, repeats: int, limit: int | None, cap: float | None
) -> dict:
    shape = Shape(**shape)
    setting = Setting(device, DTYPES[dtype], shape)
    try:
        loss_of = _by_name(variant, setting)
        if device == "cpu":
            # Code and thread stacks are loaded before the measurement; with the second shape, code compiled for any.
            for scored, hidden, vocab in ((32, 24, 64), (64, 48, 128)):
                small = Shape(scored, hidden, vocab, sequences=shape.sequences, objective=shape.objective)
                with_gradients(loss_of, make_batch(small, head, DTYPES[dtype], device))
            if limit is not None:
                limit_memory(limit)
        batch = make_batch(shape, head, DTYPES[dtype], device)
        if device == "cuda":
            with_gradients(loss_of, batch)  # workspaces and compiled code stay
        seconds = []

        def step() -> object:
            start = time.perf_counter()
            result = with_gradients(loss_of, batch)
            seconds.append(time.perf_counter() - start)
            return result

        peak = peak_extra_bytes(step, device)
        if repeats and (device == "cuda" or seconds[0] < AGAIN):
            clock = clock_of(device, flush=False)
            seconds = [clock(lambda: with_gradients(loss_of, batch)) for _ in range(repeats)]
        return {"peak extra bytes": peak, "seconds": statistics.median(seconds) if repeats else None, "failed": None}
    except Exception as error:  # out of memory, too large for a kernel's index, …: a result like any other
        return {"peak extra bytes": None, "seconds": None, "failed": reason(error)}


def _by_name(variant: str, setting: Setting) -> LossOf:
    shape = setting.shape
    for peer in peers_of(shape.objective).values():
        if peer.name == variant:
            return peer.make(setting)
    return ours(variant.removeprefix(name_of("", shape.objective)), shape.budget)


# The command ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--frozen", action="store_true", help="the head takes no gradient (default on a GPU: both)")
    about = "kto (default), or dpo, of pairs, with a results file of its own: linear-dpo-DEVICE.json"
    command.add_argument("--objective", dest="benchmark", type=benchmark_of, metavar="LOSS", help=about)


def benchmark_of(objective: str) -> Benchmark:
    """The benchmark that `--objective` names."""
    if objective not in BENCHMARKS:
        raise argparse.ArgumentTypeError(f"{objective!r} is not known; expected {' or '.join(BENCHMARKS)}")
    return BENCHMARKS[objective]


def measure(session: Session) -> None:
    args = session.args
    heads = [FROZEN] if args.frozen else HEADS[args.device]
    for job, dtype, options, repeats, absent in plan(args):
        for head in heads:
            tick = session.task(f"{job.shape}, {head}, {dtype}", repeats + 2)
            case = run(job.shape, dtype, head, repeats, tick, **options)
            case["absent"] |= absent
            if args.device == "cpu":
                _, *timed = case["seconds"]
                found = {name: point(name, job.shape, dtype, head) for name in timed}
                case["peak extra bytes"] = {name: point["peak extra bytes"] for name, point in found.items()}
            tick()
            session.add(case)


BENCHMARK = Benchmark(
    "linear",
    "the loss from hidden states, heads of real models (CPU 9 min, GPU 3 min)",
    measure,
    dtypes=tuple(DTYPES),
    peers=PEERS,
    cap=CAP,
    shapes=Shapes(jobs, QUICK, DTYPES_BY_DEFAULT, BASE, SCORED, REPEATS),
    options=options,
)
BENCHMARKS = {  # of each objective
    KTO: BENCHMARK,
    DPO: replace(
        BENCHMARK,
        name="linear-dpo",
        about="the DPO loss of pairs from hidden states (CPU 5 min, GPU 1 min)",
        peers=peers_of(DPO),
        shapes=Shapes(paired_jobs, replace(QUICK, **PAIRS), DTYPES_BY_DEFAULT, PAIRED_BASE, SCORED, REPEATS),
    ),
}


if __name__ == "__main__":
    print(json.dumps(_point(**json.loads(sys.argv[1]))))
