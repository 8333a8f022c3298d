"""`python -m benchmarks --help`"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from types import ModuleType

import torch
from rich.table import Table

from . import ceilings, inspect, linear, logits, longcontext, memory, report, step
from .environment import versions_and_commit
from .measure import DTYPES
from .session import RESULTS, Session, console, jobs, settle, write
from .shapes import NAMES, Shape

NARROW = Shape(2**20, 0, 8)  # a shape whose O(N) memory is seen beside the rest
NOT_CHOSEN = "not run: not among the default peers of this shape (--peers all)"


def run_ceilings(args: argparse.Namespace) -> None:
    finish(Session("ceilings", args))


def run_logits(args: argparse.Namespace) -> None:
    session = Session("logits", args)
    inplace = [f"kto_loss, {backend}, {logits.INPLACE}" for backend in args.backend[:1]]
    with session.progress:
        if inplace and not (args.quick or args.shapes):
            size = logits.memory(inplace[0], NARROW, "fp32", args.device)
            session.result["in-place bytes per token"] = {"N": NARROW.scored, "V": NARROW.vocab, "bytes": size}
        for job, dtype, options, repeats, absent in plan(args):
            variants = logits.memory_variants(args.device, args.backend) if job.memory else []
            tick = session.task(f"{job.shape}, {dtype}", repeats + 1 + len(variants))
            case = logits.run(job.shape, dtype, repeats, tick, **options)
            case["absent"] |= absent
            case["peak extra bytes"] = {}
            for variant in variants:
                case["peak extra bytes"][variant] = logits.memory(variant, job.shape, dtype, args.device)
                tick()
            session.add(case)
    finish(session)


def run_linear(args: argparse.Namespace) -> None:
    session = Session("linear", args)
    heads = [linear.FROZEN] if args.frozen else linear.HEADS[args.device]
    with session.progress:
        for job, dtype, options, repeats, absent in plan(args):
            for head in heads:
                tick = session.task(f"{job.shape}, {head}, {dtype}", repeats + 2)
                case = linear.run(job.shape, dtype, head, repeats, tick, **options)
                case["absent"] |= absent
                if args.device == "cpu":
                    _, *timed = case["seconds"]
                    found = {name: linear.point(name, job.shape, dtype, head) for name in timed}
                    case["peak extra bytes"] = {name: point["peak extra bytes"] for name, point in found.items()}
                tick()
                session.add(case)
    finish(session)


def run_memory(args: argparse.Namespace) -> None:
    session = Session("memory", args)
    head = linear.FROZEN if args.frozen else linear.TRAINED
    with session.progress:
        for job, dtype, options, repeats, absent in plan(args):
            total = len(options["peers"]) + len(args.backend)
            label = f"{job.shape}" + (f", {job.shape.sweep}" if job.shape.sweep else "")
            case = memory.run(job.shape, dtype, head, repeats, session.task(f"{label}, {dtype}", total), **options)
            case["failed"] |= absent
            session.add(case)
    finish(session)


def run_longcontext(args: argparse.Namespace) -> None:
    session = Session("longcontext", args)
    head, lengths = longcontext.HEAD[args.device], longcontext.TOKENS
    if args.quick:
        head, lengths = longcontext.QUICK_HEAD, longcontext.QUICK_TOKENS
    lengths = tuple(args.tokens or lengths)
    chosen = longcontext.DEFAULT_PEERS[args.device] if args.peers is None else args.peers
    with session.progress:
        for dtype in args.dtype or (longcontext.DTYPE[args.device],):
            tick = session.task(f"{dtype}", len(lengths) * (len(chosen) + len(args.backend)))
            longcontext.run(
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
                args.cap or longcontext.CAP[args.device],
            )
    finish(session)


def run_step(args: argparse.Namespace) -> None:
    repeats = min(args.repeats, 2) if args.quick else args.repeats
    session = Session("step", args)
    dtypes = args.dtype or step.DTYPES_BY_DEFAULT[args.device]
    with session.progress:
        for dtype, head in itertools.product(dtypes, (step.LORA,) if args.quick else (step.TRAINED, step.LORA)):
            setup = step.Setup(head, dtype, args.device, args.model, args.batch, args.quick)
            tick = session.task(f"{head} head, {dtype}", 2 * (repeats + 1) + 4)
            case = step.run(setup, repeats, tick)
            for part in (step.STEP, step.LOSS):
                case["peak extra bytes"][part] = {}
                for variant in (step.TRL, step.OURS):
                    case["peak extra bytes"][part][variant] = step.memory(variant, part, setup)
                    tick()
            session.add(case)
    finish(session)


def run_inspect(args: argparse.Namespace) -> None:
    """Compiles for targets that need not be there: the results file carries their names in the place of a device's."""
    try:
        found = inspect.inspect(args.arch, amd=not args.no_amd)
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    result = {"benchmark": "inspect", **versions_and_commit(), "cases": found}
    path = args.json or RESULTS / "inspect.json"
    write(path, result)
    title, rows = inspect.table(found)
    show(rows, title)
    console.print(f"written to {path}")


def plan(args: argparse.Namespace):
    """Each shape and dtype with what its run takes: (job, dtype, options, repeats, reasons why peers are left out)."""
    benchmark = args.benchmark
    for job in jobs(args):
        known = tuple(benchmark.PEERS)
        chosen = (known if job.peers is None else job.peers) if args.peers is None else args.peers
        absent = {benchmark.PEERS[key].name: NOT_CHOSEN for key in known if args.peers is None and key not in chosen}
        cap = args.cap or benchmark.CAP[args.device]
        options = {"device": args.device, "peers": chosen, "backends": args.backend, "cap": cap}
        repeats = args.repeats or job.repeats or benchmark.REPEATS
        for dtype in args.dtype or job.dtypes:
            yield job, dtype, options, min(repeats, 3) if args.quick else repeats, absent


def finish(session: Session) -> None:
    session.write()
    result = session.result
    console.print(report.provenance(result))
    tables, notes = report.on_screen(result)
    for title, rows in tables:
        show(rows, title)
    for line in notes:
        console.print(line)
    if session.path:
        console.print(f"written to {session.path}")
    if session.args.plot:
        from . import plots  # matplotlib is slow to load

        for path in plots.draw(result, session.path.parent if session.path else Path.cwd()):
            console.print(f"drawn: {path}")


def run_report(args: argparse.Namespace) -> None:
    changed = report.update(check=args.check)
    if args.check and changed:
        raise SystemExit(f"{', '.join(changed)}: not as benchmarks/results says; run: python -m benchmarks report")
    console.print(f"updated: {', '.join(changed)}" if changed else "the tables agree with benchmarks/results")


def show(rows: list[list[str]], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def add_run(command: argparse.ArgumentParser, name: str) -> None:
    """What every command that measures has."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument("--device", choices=("cpu", "cuda"), default=default, help="default: a GPU where there is one")
    command.add_argument("--quick", action="store_true", help="small shapes, few repetitions, no results file")
    command.add_argument(
        "--json", type=Path, metavar="FILE", help=f"results file (default: benchmarks/results/{name}-DEVICE.json)"
    )
    command.add_argument("--plot", action="store_true", help="draw the picture of the results")


def add_dtype(command: argparse.ArgumentParser, known: tuple[str, ...], default: str) -> None:
    command.add_argument("--dtype", help=f"comma list of {', '.join(known)} (default: {default})")
    command.set_defaults(dtypes=known)


def add_peers(command: argparse.ArgumentParser, benchmark: ModuleType) -> None:
    command.set_defaults(benchmark=benchmark)
    add_dtype(command, tuple(DTYPES), "fp32 and bf16 where both are published")
    known = ", ".join(benchmark.PEERS)
    command.add_argument("--peers", help=f"comma list, all or none; known: {known} (default: what each shape has)")
    command.add_argument("--backend", default="all", help="ours: comma list, all (default) or none")
    command.add_argument(
        "--cap",
        type=float,
        metavar="SECONDS",
        help="a peer that takes longer for one call is left out, and that recorded (default: "
        + ", ".join(f"{cap or 'none'} on {device}" for device, cap in benchmark.CAP.items())
        + ")",
    )


def add_shapes(command: argparse.ArgumentParser, benchmark: ModuleType) -> None:
    add_peers(command, benchmark)
    command.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help=f"N,H,V (N scored tokens; N,V for logits), or of: {', '.join(NAMES)} (default: as published)",
    )
    command.add_argument(
        "--repeats", type=int, help=f"interleaved repetitions (default: {benchmark.REPEATS}, or fewer)"
    )


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Micro-benchmarks of kto_kernels beside its peers. Every command checks results against fp64 first, "
        "shows its progress, prints tables, and writes benchmarks/results/COMMAND-DEVICE.json with device, driver, versions, "
        "commit, date, shapes, medians and quartiles. Nothing changes clocks or other settings of a device. The durations "
        "below are rough: for two AVX-512 cores, and what is expected of an H100.",
    )
    commands = found.add_subparsers(required=True, metavar="command")

    def add(name: str, run, about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        return command

    command = add("ceilings", run_ceilings, "copy and read bandwidth and bare GEMM rates of this device (10 s)")
    add_run(command, "ceilings")
    add_dtype(command, tuple(DTYPES), ", ".join(ceilings.GEMM_DTYPES))
    command.add_argument("--size", type=int, help="edge of the square matrices (default: 2048 on a CPU, 8192 on a GPU)")

    command = add("logits", run_logits, "the loss from logits, N large and a sweep of N (CPU 2 min, GPU 1 min)")
    add_run(command, "logits")
    add_shapes(command, logits)

    command = add("linear", run_linear, "the loss from hidden states, heads of real models (CPU 9 min, GPU 3 min)")
    add_run(command, "linear")
    add_shapes(command, linear)
    command.add_argument("--frozen", action="store_true", help="the head takes no gradient (default on a GPU: both)")

    command = add("memory", run_memory, "peak memory over N, V, H and the budget of ours (CPU 4 min, GPU 1 min)")
    add_run(command, "memory")
    add_shapes(command, memory)
    command.add_argument("--frozen", action="store_true", help="the head takes no gradient")

    command = add("longcontext", run_longcontext, "1k to 1M tokens until a peer fails (CPU 7 min, GPU 2 min)")
    add_run(command, "longcontext")
    add_peers(command, longcontext)
    command.add_argument("--tokens", type=int, nargs="+", help="lengths, prompt and all (default: 1024 … 1048576)")
    command.add_argument("--repeats", type=int, default=longcontext.REPEATS, help="default: %(default)s")

    about = "an optimizer step of a real model under TRL's KTOTrainer and under ours (CPU 8 min, GPU 1 min)"
    command = add("step", run_step, about)
    add_run(command, "step")
    add_dtype(command, step.DTYPES, "both on a CPU, bf16, which is autocast, on a GPU")
    command.add_argument("--model", help=f"a transformers folder, a GGUF file or a hub name (default: {step.MODEL})")
    command.add_argument("--batch", type=int, default=step.BATCH, help="rows of feedback (default: %(default)s)")
    command.add_argument("--repeats", type=int, default=step.REPEATS, help="default: %(default)s")

    command = add("inspect", run_inspect, "the Triton kernels as machine code: registers, spills, load widths (2 min)")
    inspect.add_arguments(command)

    command = add("report", run_report, "rebuild tables and pictures from benchmarks/results (10 s)")
    command.add_argument(
        "--check",
        action="store_true",
        help="change nothing; fail where tables differ from results, or a picture is missing",
    )
    return found


def main() -> None:
    commands = parser()
    args = commands.parse_args()
    try:
        settle(args)
    except ValueError as error:
        commands.error(str(error))
    args.run(args)


if __name__ == "__main__":
    main()
