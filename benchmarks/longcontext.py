"""`python -m benchmarks longcontext`: one sequence of a thousand tokens, of four thousand, … of a million, before one head:
time and memory of each peer until it fails, with the plan's prediction beside them.

Out of memory is a result, and so is a variant that would take longer than the cap: both are recorded, and the variant is
not run on anything longer; ours is whatever it takes. On a CPU every point is a fresh process that may take 80 % of the memory that the machine has to
spare. The gate is that of `linear`, on the shortest sequence.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from .benchmark import Benchmark
from .ceilings import GEMM
from .linear import TRAINED, gated, make_batch, name_of, plan_of, point, variants_of
from .linear_peers import PEERS
from .measure import DTYPES, available_memory
from .selection import Setting, worth_timing
from .session import Session
from .shapes import Shape

HEAD = {"cpu": Shape(0, 64, 32768), "cuda": Shape(0, 4096, 128256)}  # H and V
DTYPE = {"cpu": "bf16", "cuda": "bf16"}
TOKENS = tuple(4**k * 1024 for k in range(6))  # 1k … 1M
QUICK_HEAD, QUICK_TOKENS = Shape(0, 32, 1024), (256, 1024)
REPEATS = 3
CAP = {"cpu": 60.0, "cuda": 60.0}
GROWTH = 0.9  # of what more tokens would cost if time were proportional to them, to be skipped for the cap
DEFAULT_PEERS = {"cpu": ("naive", "scored", "trl", "liger", "torch"), "cuda": tuple(PEERS)}


def of_tokens(head: Shape, tokens: int) -> Shape:
    """One sequence of about `tokens` tokens, prompt and all."""
    return Shape(2 * tokens // 3, head.hidden, head.vocab, head.model, head.softcap, sequences=1)


def run(
    head: Shape,
    lengths: tuple[int, ...],
    dtype: str,
    repeats: int,
    ceilings: dict,
    done: Callable[[dict], None],
    tick: Callable,
    device: str = "cpu",
    peers: tuple[str, ...] | None = None,
    backends: tuple[str, ...] | None = None,
    cap: float | None = None,
) -> None:
    """Calls `done` with the case of each length, when it is measured."""
    peers = DEFAULT_PEERS[device] if peers is None else peers
    backends = worth_timing(device) if backends is None else backends
    shortest = of_tokens(head, lengths[0])
    setting = Setting(device, DTYPES[dtype], shortest)
    variants, out = variants_of(setting, peers, backends)
    _, refused, _ = gated(make_batch(shortest, TRAINED, DTYPES[dtype], device), variants, dtype)
    out |= {name: why for name, why in refused.items() if name in variants}
    limit = int(0.8 * available_memory()) if device == "cpu" else None
    last: dict[str, float] = {}
    for tokens, before in zip(lengths, (None, *lengths)):
        shape = of_tokens(head, tokens)
        found = {}
        for name in [*variants, *(absent for absent in out if absent not in variants)]:
            why = out.get(name)
            mine = name in (name_of(backend) for backend in backends)
            if why is None and cap is not None and before is not None and not mine:
                expected = last[name] * tokens / before
                if GROWTH * expected > cap:
                    why = out[name] = f"not run: about {expected:.0f} s expected, over the cap of {cap:.0f} s"
            if why is not None:
                found[name] = {"seconds": None, "peak extra bytes": None, "failed": why}
            else:
                found[name] = point(name, shape, dtype, TRAINED, device, repeats, limit, None if mine else cap)
                if found[name]["failed"]:
                    out[name] = f"not run: failed at {tokens:,} tokens"
                else:
                    last[name] = found[name]["seconds"]
            tick()
        plan = plan_of(shape, dtype, TRAINED, device)
        units = plan.gemm_units + 1  # the reference's log-probabilities
        flops = units * 2 * plan.rows * shape.hidden * shape.vocab
        done(
            {"tokens": tokens, **{name: size for name, size in shape.key.items() if name != "tokens"}}
            | {"dtype": dtype, "head": TRAINED, "repeats": repeats, "memory limit, bytes": limit, "cap, s": cap}
            | {"variants": found}
            | {
                "plan": {
                    "peak bytes": plan.peak_bytes,
                    "gemm units": units,
                    "seconds": flops / ceilings[GEMM][dtype],
                    "text": repr(plan),
                }
            }
        )


# The command ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tokens", type=int, nargs="+", help="lengths, prompt and all (default: 1024 … 1048576)")
    command.add_argument("--repeats", type=int, default=REPEATS, help="default: %(default)s")


def measure(session: Session) -> None:
    args = session.args
    head, lengths = (QUICK_HEAD, QUICK_TOKENS) if args.quick else (HEAD[args.device], TOKENS)
    lengths = tuple(args.tokens or lengths)
    chosen = DEFAULT_PEERS[args.device] if args.peers is None else args.peers
    for dtype in args.dtype or (DTYPE[args.device],):
        tick = session.task(f"{dtype}", len(lengths) * (len(chosen) + len(args.backend)))
        run(
            head,
            lengths,
            dtype,
            args.repeats,
            session.result["ceilings"],
            session.add,
            tick,
            args.device,
            chosen,
            args.backend,
            args.cap or CAP[args.device],
        )


BENCHMARK = Benchmark(
    "longcontext",
    "1k to 1M tokens until a peer fails (CPU 7 min, GPU 2 min)",
    measure,
    dtypes=tuple(DTYPES),
    peers=PEERS,
    cap=CAP,
    options=options,
)
