"""One run of a command: what is to be measured, the progress bar, and the results file, written as soon as there is
something to write."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from . import ceilings
from .environment import RESULTS, describe

console = Console(width=140)


class Session:
    def __init__(self, name: str, args: argparse.Namespace, ceilings_too: bool = True):
        self.args, self.device = args, args.device
        self.path: Path | None = args.json or (None if args.quick else RESULTS / f"{name}-{args.device}.json")
        self.progress = Progress(console=console)
        self.result = {"benchmark": name, "device kind": args.device, **describe(args.device)}
        if ceilings_too:
            with console.status("ceilings of the device"):
                dtypes = tuple(dict.fromkeys((*ceilings.GEMM_DTYPES, *(args.dtype or ()))))
                found = ceilings.measure(args.device, args.quick, dtypes, getattr(args, "size", None))
            self.result["ceilings"] = found
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
