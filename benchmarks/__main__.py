"""`python -m benchmarks --help`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import logits, report
from .environment import ROOT, describe
from .measure import in_fresh_process

RESULTS = ROOT / "benchmarks" / "results"
console = Console(width=120)


def run_logits(args: argparse.Namespace) -> None:
    n, vocab = (64, 4096) if args.quick else args.shape
    repeats = 3 if args.quick else args.repeats
    dtypes = args.dtype or ["fp32", "bf16"]
    result = {"benchmark": "logits", **describe("cpu"), "cases": []}
    with Progress(console=console) as progress:
        for dtype in dtypes:
            task = progress.add_task(f"logits {dtype}, N={n}, V={vocab}", total=repeats + 1 + len(report.MEMORY))
            case = logits.run(dtype, n, vocab, repeats, lambda task=task: progress.advance(task))
            case["peak extra bytes"] = {}
            for variant in report.MEMORY:
                case["peak extra bytes"][variant] = in_fresh_process(
                    "benchmarks.logits", variant, dtype, str(n), str(vocab)
                )
                progress.advance(task)
            result["cases"].append(case)
    show(report.logits_table(result), result)
    path = args.json or (None if args.quick else RESULTS / "logits-cpu.json")
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written to {path}")


def run_report(args: argparse.Namespace) -> None:
    changed = report.update_readme(check=args.check)
    if args.check and changed:
        raise SystemExit("README.md does not agree with benchmarks/results; run: python -m benchmarks report")
    console.print("README.md agrees with benchmarks/results" if not changed else "README.md updated")


def show(rows: list[list[str]], result: dict) -> None:
    table = Table(title=report.provenance(result), title_justify="left")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Micro-benchmarks of kto_kernels.")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("logits", help="the loss from logits against naive PyTorch, on the CPU")
    command.add_argument(
        "--shape", type=int, nargs=2, metavar=("N", "V"), default=(1024, 49152), help="tokens, vocabulary"
    )
    command.add_argument(
        "--dtype", action="append", choices=list(logits.DTYPES), help="may be given again (default: fp32, bf16)"
    )
    command.add_argument("--repeats", type=int, default=15, help="interleaved repetitions (default: 15)")
    command.add_argument(
        "--quick", action="store_true", help="a small shape and few repetitions; writes no results file"
    )
    command.add_argument("--json", type=Path, help="where the results go (default: benchmarks/results/logits-cpu.json)")
    command.set_defaults(run=run_logits)

    command = commands.add_parser("report", help="rebuild the README's tables from benchmarks/results")
    command.add_argument("--check", action="store_true", help="change nothing; fail where README and results differ")
    command.set_defaults(run=run_report)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
