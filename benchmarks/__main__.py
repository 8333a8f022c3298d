"""`python -m benchmarks --help`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import inspect, logits, report
from .environment import ROOT, describe
from .measure import in_fresh_process

RESULTS = ROOT / "benchmarks" / "results"
SHAPES = {"cpu": [(1024, 49152)], "cuda": [(8192, 128256), (64, 128256), (8, 128256)]}
NARROW = (2**20, 8)  # a shape whose O(N) memory is seen beside the rest
console = Console(width=140)


def run_logits(args: argparse.Namespace) -> None:
    device = args.device
    shapes = [(64, 4096)] if args.quick else [tuple(args.shape)] if args.shape else SHAPES[device]
    repeats = 3 if args.quick else args.repeats
    result = {"benchmark": "logits", "device kind": device, **describe(device), "cases": []}
    path = args.json or (None if args.quick else RESULTS / f"logits-{device}.json")
    variants = logits.memory_variants(device)
    with Progress(console=console) as progress:
        for n, vocab in shapes:
            for dtype in args.dtype or ["fp32", "bf16"]:
                task = progress.add_task(f"N={n}, V={vocab}, {dtype}", total=repeats + 1 + len(variants))

                def tick(task=task):
                    progress.advance(task)

                case = logits.run(dtype, n, vocab, repeats, tick, device)
                case["peak extra bytes"] = {}
                for variant in variants:
                    case["peak extra bytes"][variant] = memory(variant, dtype, n, vocab, device)
                    tick()
                result["cases"].append(case)
                write(result, path)  # as soon as it exists: a run cut off leaves its results
    if not args.quick:
        inplace = next(name for name in variants if name.endswith(logits.INPLACE))
        size = memory(inplace, "fp32", *NARROW, device)
        result["in-place bytes per token"] = {"N": NARROW[0], "V": NARROW[1], "bytes": size}
        write(result, path)
    show(report.logits_table(result), report.provenance(result))
    for line in report.notes(result):
        console.print(line)
    if path:
        console.print(f"written to {path}")


def memory(variant: str, dtype: str, n: int, vocab: int, device: str) -> int:
    if device == "cuda":
        return logits.memory(variant, dtype, n, vocab, device)
    return in_fresh_process("benchmarks.logits", variant, dtype, str(n), str(vocab), device)


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Micro-benchmarks of kto_kernels.")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("logits", help="the loss from logits against the peers")
    command.add_argument(
        "--device", choices=list(SHAPES), default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU"
    )
    command.add_argument("--shape", type=int, nargs=2, metavar=("N", "V"), help="tokens and vocabulary")
    command.add_argument(
        "--dtype", action="append", choices=list(logits.DTYPES), help="may be given again (default: fp32, bf16)"
    )
    command.add_argument("--repeats", type=int, default=15, help="interleaved repetitions (default: 15)")
    command.add_argument("--quick", action="store_true", help="a small shape, few repetitions, no results file")
    command.add_argument("--json", type=Path, help="results file (default: benchmarks/results/logits-DEVICE.json)")
    command.set_defaults(run=run_logits)

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
