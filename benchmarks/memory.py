"""`python -m benchmarks memory`: peak memory above the inputs of the loss from hidden states, forward and backward, over N,
V, H and the budget of ours, beside what the plan says.

On a CPU every measurement is a fresh process, which may take the memory that the machine has to spare; what does not fit
is a result. The gate is that of `linear`, on a small shape.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

from .benchmark import Benchmark, Shapes, plan
from .linear import FROZEN, QUICK, TRAINED, gated, make_batch, plan_of, point, variants_of
from .linear_peers import PEERS
from .measure import DTYPES, available_memory
from .selection import Setting, worth_timing
from .session import Session
from .shapes import MODELS, Job, Shape, of_model, sweep

DTYPES_BY_DEFAULT = {"cpu": ("bf16",), "cuda": ("bf16",)}
BASE = {"cpu": of_model("smollm2", 1024), "cuda": of_model("llama-3-8b", 8192)}
SCORED = {"cpu": 256, "cuda": 8192}
REPEATS = 1
CAP = {"cpu": 30.0, "cuda": None}
ON_CPU = ("naive", "trl", "liger", "scored", "torch")  # a start of a process each: the first three over V and H
VALUES = {
    "cpu": {"sweep-n": (256, 1024, 4096), "sweep-v": (16384, 131072), "sweep-h": (256, 1024)},
    "cuda": {
        "sweep-n": (512, 2048, 8192, 32768, 131072),
        "sweep-v": (32000, 64000, 256000),
        "sweep-h": (1024, 2048, 8192),
    },
}


def jobs(device: str) -> list[Job]:
    """Without `--shapes`: sweeps around one head, and on a GPU the other real heads."""
    dtypes, base = DTYPES_BY_DEFAULT[device], BASE[device]
    over_n, some = (ON_CPU, ON_CPU[:3]) if device == "cpu" else (None, None)
    found = [
        Job(shape, dtypes, over_n if name == "sweep-n" else some)
        for name, values in VALUES[device].items()
        for shape in sweep(name, base, values)
    ]
    found += [Job(shape, dtypes, ()) for shape in sweep("sweep-budget", base)]
    if device == "cuda":
        models = [of_model(name, SCORED[device]) for name in MODELS]
        found += [Job(shape, dtypes) for shape in models if shape.model != base.model]
    return found


@functools.cache
def gate(dtype: str, device: str, peers: tuple[str, ...], backends: tuple[str, ...]) -> dict[str, str]:
    """Stops the run where ours are wrong on a small shape; why which peers are out."""
    batch = make_batch(QUICK, TRAINED, DTYPES[dtype], device)
    variants, absent = variants_of(Setting(device, DTYPES[dtype], QUICK), peers, backends)
    _, refused, _ = gated(batch, variants, dtype)
    return absent | {name: why for name, why in refused.items() if name in variants}


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
    """Peak memory of one shape: a case of the results file. `repeats` does not matter."""
    backends = worth_timing(device) if backends is None else backends
    peaks, failed = {}, dict(gate(dtype, device, peers, backends))
    variants, absent = variants_of(Setting(device, DTYPES[dtype], shape), peers, backends)
    failed |= absent
    for _ in failed:
        tick()
    limit = int(0.8 * available_memory()) if device == "cpu" else None
    for name in variants:
        if name not in failed:
            found = point(name, shape, dtype, head, device, limit=limit, cap=cap)
            peaks[name] = found["peak extra bytes"]
            if found["failed"]:
                failed[name] = found["failed"]
            tick()
    plan = plan_of(shape, dtype, head, device)
    return {"dtype": dtype, **shape.key, "head": head, "sweep": shape.sweep or "model"} | {
        "max_logits_bytes": shape.budget,
        "memory limit, bytes": limit,
        "peak extra bytes": peaks,
        "failed": failed,
        "plan": {"text": repr(plan), "peak bytes": plan.peak_bytes},
    }


# The command ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--frozen", action="store_true", help="the head takes no gradient")


def measure(session: Session) -> None:
    args = session.args
    head = FROZEN if args.frozen else TRAINED
    for job, dtype, options, repeats, absent in plan(args):
        total = len(options["peers"]) + len(args.backend)
        label = f"{job.shape}" + (f", {job.shape.sweep}" if job.shape.sweep else "")
        case = run(job.shape, dtype, head, repeats, session.task(f"{label}, {dtype}", total), **options)
        case["failed"] |= absent
        session.add(case)


BENCHMARK = Benchmark(
    "memory",
    "peak memory over N, V, H and the budget of ours (CPU 4 min, GPU 1 min)",
    measure,
    dtypes=tuple(DTYPES),
    peers=PEERS,
    cap=CAP,
    shapes=Shapes(jobs, QUICK, DTYPES_BY_DEFAULT, BASE, SCORED, REPEATS),
    options=options,
)
