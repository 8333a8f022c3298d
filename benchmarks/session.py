"""One run of a command: what is to be measured, the progress bar, and the results file, written as soon as there is
something to write."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from . import ceilings
from .environment import ROOT, describe
from .selection import chosen_backends, chosen_peers
from .shapes import Job, parse

RESULTS = ROOT / "benchmarks" / "results"
console = Console(width=140)


class Session:
    def __init__(self, name: str, args: argparse.Namespace):
        self.args, self.device = args, args.device
        self.path: Path | None = args.json or (None if args.quick else RESULTS / f"{name}-{args.device}.json")
        self.progress = Progress(console=console)
        with console.status("ceilings of the device"):
            dtypes = tuple(dict.fromkeys((*ceilings.GEMM_DTYPES, *(args.dtype or ()))))
            found = ceilings.measure(args.device, args.quick, dtypes, getattr(args, "size", None))
        self.result = {"benchmark": name, "device kind": args.device, **describe(args.device), "ceilings": found}
        self.result["cases"] = []

    def task(self, label: str, total: int):
        """Adds a line to the progress bar; returns what moves it on by one."""
        task = self.progress.add_task(label, total=total)
        return lambda: self.progress.advance(task)

    def add(self, case: dict) -> None:
        """A case, written at once: a run that is cut off leaves what it has measured."""
        self.result["cases"].append(case)
        self.write()

    def write(self) -> None:
        if self.path:
            write(self.path, self.result)


def write(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def jobs(args: argparse.Namespace) -> list[Job]:
    """The shapes to measure: those asked for, or the benchmark's own."""
    benchmark = args.benchmark
    if args.quick:
        found = [Job(benchmark.QUICK, benchmark.DTYPES_BY_DEFAULT[args.device][-1:])]
    elif args.shapes:
        base, scored = benchmark.BASE[args.device], benchmark.SCORED[args.device]
        shapes = [shape for text in args.shapes for shape in parse(text, base, scored)]
        found = [Job(shape, benchmark.DTYPES_BY_DEFAULT[args.device]) for shape in dict.fromkeys(shapes)]
    else:
        found = benchmark.jobs(args.device)
    return found


def settle(args: argparse.Namespace) -> None:
    """Checks what was asked for before any work, and puts it in place of the text.

    Raises:
        ValueError: a shape, peer, backend or dtype that is not known.
    """
    if getattr(args, "dtype", None) is not None:
        args.dtype = tuple(args.dtype.split(","))
        for dtype in args.dtype:
            if dtype not in args.dtypes:
                raise ValueError(f"--dtype: {dtype!r} is not known; expected some of: {', '.join(args.dtypes)}")
    for name in ("batch", "size", "repeats"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}")
    if not hasattr(args, "benchmark"):
        return
    args.peers = None if args.peers is None else chosen_peers(args.peers, args.benchmark.PEERS)
    args.backend = chosen_backends(args.backend, args.device)
    if hasattr(args, "shapes"):
        for job in jobs(args):
            if job.shape.hidden == 0 and args.benchmark.__name__ != "benchmarks.logits":
                raise ValueError(f"'{job.shape.scored},{job.shape.vocab}': expected N,H,V")
