"""`python -m benchmarks --help`"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import Progress
from rich.table import Table

from . import (
    ceilings,
    compare,
    inspect,
    launches,
    linear,
    logits,
    longcontext,
    memory,
    nvcc,
    overhead,
    predictions,
    profiled,
    report,
    roofline,
    step,
)
from .benchmark import Benchmark, settle
from .environment import RESULTS, describe, provenance, versions_and_commit
from .measure import DTYPES
from .session import Session, console, write
from .shapes import NAMES


def size_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", type=int, help="edge of the square matrices (default: 2048 on a CPU, 8192 on a GPU)")


CEILINGS = Benchmark(  # every session begins with them: this one measures nothing else
    "ceilings",
    "copy and read bandwidth and bare GEMM rates of this device (10 s)",
    lambda session: None,
    dtypes=tuple(DTYPES),
    default_dtypes=", ".join(ceilings.GEMM_DTYPES),
    options=size_option,
)
BENCHMARKS = (CEILINGS, *(module.BENCHMARK for module in (logits, linear, memory, longcontext, step, overhead)))


def run_benchmark(args: argparse.Namespace) -> None:
    benchmark: Benchmark = args.benchmark
    threads = torch.get_num_threads()
    torch.set_num_threads(benchmark.threads or threads)
    try:
        session = Session(benchmark.name, args, benchmark.ceilings)
        with session.progress:
            benchmark.measure(session)
    finally:
        torch.set_num_threads(threads)
    finish(session)


def run_inspect(args: argparse.Namespace) -> None:
    """Compiles for targets that need not be there: the results file carries their names in the place of a device's."""
    try:
        found = inspect.inspect(args.arch, amd=not args.no_amd)
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    if not args.no_cuda:
        found += nvcc.inspect(args.arch)
    counted = launches.table()
    launched = counted[1]
    result = {"benchmark": "inspect", **versions_and_commit(), "cases": found, "launches": launched}
    path = args.json or RESULTS / "inspect.json"
    write(path, result)
    old = inspect.of_checkout(args.old, args.arch, not args.no_cuda) if args.old else None
    for title, rows in (inspect.table(found, old), counted, *roofline.tables(found, launched)):
        show(rows, title)
    if old:
        for title, rows in roofline.tables(old, launched):
            show(rows, f"{args.old}: {title}")
    console.print(f"written to {path}")


def run_launches(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("launches: needs a GPU; `inspect` counts them without one")
    result = {"benchmark": "launches", "device kind": "cuda", **describe("cuda"), "cases": profiled.measure()}
    path = args.json or RESULTS / "launches-cuda.json"
    write(path, result)
    show(profiled.rows(result["cases"]), "Kernels that a call launches, as PyTorch's profiler sees them")
    console.print(f"written to {path}")


def run_predictions(args: argparse.Namespace) -> None:
    if not args.results.is_dir():
        raise SystemExit(f"--results: expected a folder, got {args.results}")
    run = predictions.Run.of(args.results, args.device)
    path = args.page or args.results / f"predictions-{args.device}.md"
    path.write_text(predictions.page(run))
    for line in predictions.about(run):
        console.print(line)
    for title, rows in predictions.tables(run):
        show(rows, title)
    console.print(f"written to {path}")


def run_compare(args: argparse.Namespace) -> None:
    if args.rounds < 2 or args.repeats < 1:
        raise SystemExit("--rounds: expected at least 2, --repeats: at least 1")
    with Progress(console=console) as progress:
        task = progress.add_task("processes", total=2 * args.rounds * len(args.names))
        rows = compare.compare(args.old, args.names, args.rounds, args.repeats, lambda: progress.advance(task))
    show(rows, provenance(describe("cpu") | {"threads": 1}))


def finish(session: Session) -> None:
    session.write()
    result = session.result
    console.print(provenance(result))
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


def add_benchmark(command: argparse.ArgumentParser, benchmark: Benchmark) -> None:
    """The options of a command that measures."""
    command.set_defaults(run=run_benchmark, benchmark=benchmark, dtype=None)
    if len(benchmark.devices) > 1:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        about = "default: a GPU where there is one"
        command.add_argument("--device", choices=benchmark.devices, default=default, help=about)
    else:
        command.set_defaults(device=benchmark.devices[0])
    command.add_argument("--quick", action="store_true", help="small shapes, few repetitions, no results file")
    where = f"results file (default: benchmarks/results/{benchmark.name}-DEVICE.json)"
    command.add_argument("--json", type=Path, metavar="FILE", help=where)
    command.add_argument("--plot", action="store_true", help="draw the picture of the results")
    if benchmark.dtypes:
        about = f"comma list of {', '.join(benchmark.dtypes)} (default: {benchmark.default_dtypes})"
        command.add_argument("--dtype", help=about)
    if benchmark.peers:
        add_peers(command, benchmark)
    if benchmark.shapes:
        command.add_argument(
            "--shapes",
            nargs="+",
            metavar="SHAPE",
            help=f"N,H,V (N scored tokens; N,V for logits), or of: {', '.join(NAMES)} (default: as published)",
        )
        about = f"interleaved repetitions (default: {benchmark.shapes.repeats}, or fewer)"
        command.add_argument("--repeats", type=int, help=about)
    benchmark.options(command)


def add_peers(command: argparse.ArgumentParser, benchmark: Benchmark) -> None:
    known = ", ".join(benchmark.peers)
    command.add_argument("--peers", help=f"comma list, all or none; known: {known} (default: what each shape has)")
    command.add_argument("--backend", default="all", help="ours: comma list, all (default) or none")
    caps = ", ".join(f"{cap or 'none'} on {device}" for device, cap in benchmark.cap.items())
    about = f"a peer that takes longer for one call is left out, and that recorded (default: {caps})"
    command.add_argument("--cap", type=float, metavar="SECONDS", help=about)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Micro-benchmarks of kto_kernels beside its peers. Every command checks results against fp64 first, "
        "shows its progress, prints tables, and writes benchmarks/results/COMMAND-DEVICE.json with device, driver, versions, "
        "commit, date, shapes, medians and quartiles. Nothing changes clocks or other settings of a device. The durations "
        "below are rough: for two AVX-512 cores, and what is expected of an H100.",
    )
    commands = found.add_subparsers(required=True, metavar="command")

    def add(name: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=about, description=about)

    for benchmark in BENCHMARKS:
        add_benchmark(add(benchmark.name, benchmark.about), benchmark)

    command = add(
        "inspect",
        "the GPU kernels as machine code, and what it must cost: instructions, registers, launches, roofline (5 min)",
    )
    command.set_defaults(run=run_inspect)
    inspect.add_arguments(command)

    command = add("launches", "the kernels of each call on a GPU, as PyTorch's profiler sees them (20 s)")
    command.set_defaults(run=run_launches)
    where = "results file (default: benchmarks/results/launches-cuda.json)"
    command.add_argument("--json", type=Path, metavar="FILE", help=where)

    command = add("predictions", "results of a GPU beside what was predicted for its chip (5 s)")
    command.set_defaults(run=run_predictions)
    predictions.add_arguments(command)

    command = add("compare", "this checkout and an older one in turn: is anything slower? (CPU 10 min)")
    command.set_defaults(run=run_compare)
    compare.add_arguments(command)

    command = add("report", "rebuild tables and pictures from benchmarks/results (10 s)")
    command.set_defaults(run=run_report)
    command.add_argument(
        "--check",
        action="store_true",
        help="change nothing; fail where tables differ from results, or a picture is missing",
    )
    return found


def main() -> None:
    commands = parser()
    args = commands.parse_args()
    if hasattr(args, "benchmark"):
        try:
            settle(args)
        except ValueError as error:
            commands.error(str(error))
    args.run(args)


if __name__ == "__main__":
    main()
