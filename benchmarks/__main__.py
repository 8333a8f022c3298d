"""`python -m benchmarks --help`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import inspect, linear, logits, peers, report, step
from .environment import ROOT, describe
from .measure import DTYPES, in_fresh_process

RESULTS = ROOT / "benchmarks" / "results"
NARROW = (2**20, 8)  # a shape whose O(N) memory is seen beside the rest
console = Console(width=140)


def shapes(args: argparse.Namespace) -> list[tuple]:
    if args.quick:
        return [args.benchmark.QUICK]
    return [tuple(args.shape)] if args.shape else args.benchmark.SHAPES[args.device]


def run_logits(args: argparse.Namespace) -> None:
    result, path = measure_cases(args, shapes(args))
    if not args.quick:
        inplace = f"kto_loss, {peers.backends(args.device)[0]}, {logits.INPLACE}"
        size = memory(logits, inplace, ("fp32", *NARROW), args.device)
        result["in-place bytes per token"] = {"N": NARROW[0], "V": NARROW[1], "bytes": size}
    finish(result, path, [(report.provenance(result), report.logits_table(result))], report.notes(result))


def run_linear(args: argparse.Namespace) -> None:
    heads = [linear.FROZEN] if args.frozen else linear.HEADS[args.device]
    result, path = measure_cases(args, [(*shape, head) for shape in shapes(args) for head in heads])
    console.print(report.provenance(result))
    finish(result, path, report.linear_tables(result), report.linear_notes(result))


def run_step(args: argparse.Namespace) -> None:
    repeats = 2 if args.quick else args.repeats
    result = {"benchmark": "step", "device kind": args.device, **describe(args.device), "cases": []}
    path = args.json or (None if args.quick else RESULTS / f"step-{args.device}.json")
    with Progress(console=console) as progress:
        for head in (step.TRAINED, step.LORA):
            task = progress.add_task(f"{head} head", total=2 * (repeats + 1) + 4)

            def tick(task=task):
                progress.advance(task)

            case = step.run(head, repeats, args.quick, tick, args.device)
            for part in (step.STEP, step.LOSS):
                case["peak extra bytes"][part] = {}
                for variant in (step.TRL, step.OURS):
                    measured = memory(step, variant, (head, part, args.quick), args.device)
                    case["peak extra bytes"][part][variant] = measured
                    tick()
            result["cases"].append(case)
            write(result, path)
    finish(result, path, [(report.provenance(result), report.step_table(result))], [])


def measure_cases(args: argparse.Namespace, shapes: list[tuple]) -> tuple[dict, Path | None]:
    """Time and memory of every shape in every dtype, and where they are written."""
    benchmark, device = args.benchmark, args.device
    name = benchmark.__name__.rsplit(".", 1)[-1]
    repeats = 3 if args.quick else args.repeats
    result = {"benchmark": name, "device kind": device, **describe(device), "cases": []}
    path = args.json or (None if args.quick else RESULTS / f"{name}-{device}.json")
    variants = benchmark.memory_variants(device)
    with Progress(console=console) as progress:
        for shape in shapes:
            for dtype in args.dtype or benchmark.DEFAULT_DTYPES[device]:
                label = ", ".join(map(str, (*shape, dtype)))
                task = progress.add_task(label, total=repeats + 1 + len(variants))

                def tick(task=task):
                    progress.advance(task)

                case = benchmark.run(dtype, *shape, repeats, tick, device)
                case["peak extra bytes"] = {}
                for variant in variants:
                    if variant in case["seconds"]:  # what failed the gate is not measured
                        case["peak extra bytes"][variant] = memory(benchmark, variant, (dtype, *shape), device)
                    tick()
                result["cases"].append(case)
                write(result, path)  # as soon as it exists: a run cut off leaves its results
    return result, path


def memory(benchmark: ModuleType, variant: str, case: tuple, device: str) -> int:
    if device == "cuda":
        return benchmark.memory(variant, *case, device)
    return in_fresh_process(benchmark.__name__, variant, *map(str, case), device)


def finish(result: dict, path: Path | None, tables: list[tuple[str, list]], notes: list[str]) -> None:
    write(result, path)
    for title, rows in tables:
        show(rows, title)
    for line in notes:
        console.print(line)
    if path:
        console.print(f"written to {path}")


def write(result: dict, path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def run_report(args: argparse.Namespace) -> None:
    changed = report.update_readme(check=args.check)
    if args.check and changed:
        raise SystemExit("README.md does not agree with benchmarks/results; run: python -m benchmarks report")
    console.print("README.md updated" if changed else "README.md agrees with benchmarks/results")


def show(rows: list[list[str]], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def add_arguments(command: argparse.ArgumentParser, benchmark: ModuleType, shape: tuple[str, ...]) -> None:
    command.set_defaults(benchmark=benchmark)
    command.add_argument(
        "--device",
        choices=list(benchmark.SHAPES),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: a GPU",
    )
    command.add_argument("--shape", type=int, nargs=len(shape), metavar=shape, help="tokens, …, vocabulary")
    command.add_argument(
        "--dtype", action="append", choices=list(DTYPES), help="may be given again (default: as published)"
    )
    command.add_argument(
        "--repeats", type=int, default=benchmark.REPEATS, help="interleaved repetitions (default: %(default)s)"
    )
    command.add_argument("--quick", action="store_true", help="a small shape, few repetitions, no results file")
    command.add_argument("--json", type=Path, help="results file (default: benchmarks/results/BENCHMARK-DEVICE.json)")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Micro-benchmarks of kto_kernels.")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("logits", help="the loss from logits against the peers")
    add_arguments(command, logits, ("N", "V"))
    command.set_defaults(run=run_logits)

    command = commands.add_parser("linear", help="the loss from hidden states against the peers")
    add_arguments(command, linear, ("N", "H", "V"))
    command.add_argument("--frozen", action="store_true", help="the head takes no gradient (default on a GPU: both)")
    command.set_defaults(run=run_linear)

    command = commands.add_parser(
        "step", help="an optimizer step of a real model under TRL's KTOTrainer and under ours"
    )
    command.add_argument("--device", choices=step.DEVICES, default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--repeats", type=int, default=step.REPEATS, help="default: %(default)s")
    command.add_argument("--quick", action="store_true", help="a tiny model, few repetitions, no results file")
    command.add_argument("--json", type=Path, help="results file (default: benchmarks/results/step-DEVICE.json)")
    command.set_defaults(run=run_step)

    command = commands.add_parser("inspect", help="the Triton kernels as machine code: registers, spills, load widths")
    inspect.add_arguments(command)
    command.set_defaults(run=inspect.run)

    command = commands.add_parser("report", help="rebuild the README's tables from benchmarks/results")
    command.add_argument("--check", action="store_true", help="change nothing; fail where README and results differ")
    command.set_defaults(run=run_report)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
