"""`python -m benchmarks predictions`: what was measured beside what had been predicted.

The results files of `benchmarks/run_gpu.sh` say what a device took. The time that it had to take is what `roofline` says of a chip that it
knows, from the machine code that `inspect` compiled; the peak of memory, `LinearPlan` says of any device. Nothing here
needs the device: the results files name it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kto_kernels import LinearPlan

from . import launches, linear, logits, memory, roofline, step
from .benchmark import DEVICES
from .ceilings import COPY, GEMM, READ
from .environment import RESULTS, provenance
from .report import Table, folded, markdown, title_of
from .roofline import Chip
from .shapes import Shape

TOLERANCE = 0.15
MEASURED = ("ceilings", "logits", "linear", "memory", "step", "launches")
OURS = {"cuda": "triton", "cpu": "cpu"}  # the backend that is held against the prediction, on each kind of device
DTYPE = "bf16"  # of every prediction

# Chip of `roofline` → what `torch.cuda.get_device_name` calls it, whole: another board of the same name (PCIe, NVL, a
# laptop's, a slice) has other rates.
DEVICE_NAMES = {
    "A100-80": r"NVIDIA A100-SXM4-80GB",
    "H100": r"NVIDIA H100 80GB HBM3",
    "H200": r"NVIDIA H200",
    "L40S": r"NVIDIA L40S",
    "RTX 4090": r"NVIDIA GeForce RTX 4090",
    "RTX 5090": r"NVIDIA GeForce RTX 5090",
    "B200": r"NVIDIA B200",
    "MI300X": r"AMD Instinct MI300X( OAM)?",
}


def chip_of(device: str) -> Chip | None:
    """The chip of a device's name; None where its figures are not known."""
    return next((chip for chip in roofline.CHIPS if re.fullmatch(DEVICE_NAMES[chip.name], device)), None)


@dataclass(frozen=True)
class Row:
    what: str
    predicted: float | None
    measured: float | None
    shown: Callable[[float], str]

    @property
    def ratio(self) -> float | None:
        if self.predicted is None or self.measured is None:
            return None
        if self.predicted == 0:
            return 1.0 if self.measured == 0 else math.inf
        return self.measured / self.predicted

    @property
    def differs(self) -> bool:
        return self.ratio is not None and abs(self.ratio - 1) > TOLERANCE

    def cells(self) -> list[str]:
        return [
            self.what,
            "no prediction" if self.predicted is None else self.shown(self.predicted),
            "not measured" if self.measured is None else self.shown(self.measured),
            "" if self.ratio is None else f"{self.ratio:.2f}",
            f"differs by {self.ratio - 1:+.0%}" if self.differs else "",
        ]


@dataclass(frozen=True)
class Run:
    """The results files of a folder, the chip that they name, and what `inspect` says of the kernels."""

    folder: Path
    device: str  # the kind
    results: dict[str, dict]
    chip: Chip | None
    kernels: list[dict]
    launched: list[list[str]]  # rows of `launches.table`

    @classmethod
    def of(cls, folder: Path, device: str) -> Run:
        """Reads a folder. A file that is missing, or that a run was cut off in, counts as not measured."""
        found = {name: _read(folder / f"{name}-{device}.json") for name in MEASURED}
        results = {name: result for name, result in found.items() if result}
        compiled = _read(folder / f"inspect-{device}.json") or _read(RESULTS / "inspect.json") or {}
        names = {result["device"] for result in results.values()}
        if len(names) > 1:
            raise SystemExit(f"{folder}: results of several devices: {', '.join(sorted(names))}")
        chip = chip_of(names.pop()) if names else None
        return cls(folder, device, results, chip, compiled.get("cases", []), compiled.get("launches", []))

    @property
    def backend(self) -> str:
        return OURS[self.device]

    def cases(self, benchmark: str, base: dict) -> list[dict]:
        """The measured cases in the dtype of the predictions; if there are none, `base`, without a figure."""
        cases = self.results.get(benchmark, {}).get("cases", [])
        return [case for case in cases if case["dtype"] == DTYPE] or [base | {"dtype": DTYPE}]

    def row_seconds(self, named: tuple[str, str, int], vocab: int) -> float | None:
        """What a multiprocessor takes for a row of a kernel."""
        work = self.chip and roofline.work_of(self.kernels, self.chip, named, vocab)
        return max(roofline.seconds_a_row(work, self.chip).values()) if work else None

    def fills(self, named: tuple[str, str, int], rows: int, vocab: int) -> bool:
        """Whether so many rows occupy the whole chip, for which alone `roofline` speaks."""
        work = self.chip and roofline.work_of(self.kernels, self.chip, named, vocab)
        return bool(work) and rows >= self.chip.processors * work.programs


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _median(case: dict, name: str) -> float | None:
    return case.get("seconds", {}).get(name, {}).get("median")


# The comparisons ──────────────────────────────────────────────────────────────────────────────────────────────────────


def of_ceilings(run: Run) -> Iterator[Row]:
    chip, found = run.chip, run.results.get("ceilings", {}).get("ceilings", {})
    for what, name in (("copying", COPY), ("reading", READ)):
        predicted = chip and chip.bandwidth * roofline.ACHIEVABLE
        yield Row(f"{what}, any code", predicted, found.get(name), lambda x: f"{x / 1e9:,.0f} GB/s")
    predicted = chip and chip.bf16 * roofline.GEMM
    yield Row(f"a square GEMM, {DTYPE}", predicted, found.get(GEMM, {}).get(DTYPE), lambda x: f"{x / 1e12:.3g} TFLOP/s")


def of_logits(run: Run) -> Iterator[Row]:
    """The forward is timed alone and with the backward, so that the backward is a difference of two medians."""
    base = logits.BASE[run.device]
    for case in run.cases("logits", {"N": base.scored, "V": base.vocab}):
        rows, vocab, name = case["N"], case["V"], f"kto_loss, {run.backend}"
        forward, both = (_median(case, f"{name}, {mode}") for mode in (logits.FORWARD, logits.FRESH))
        backward = both - forward if both is not None and forward is not None else None
        predicted = [None, None]
        kernels = roofline.KERNELS["forward"], roofline.KERNELS["logits_backward"]
        if all(run.fills(kernel, rows, vocab) for kernel in kernels):
            predicted = [run.row_seconds(kernel, vocab) * rows / run.chip.processors for kernel in kernels]
        passes = (("forward", 2, predicted[0], forward), ("backward", 4, predicted[1], backward))
        for what, bytes_a_logit, must, took in passes:

            def shown(seconds: float, size: int = bytes_a_logit * rows * vocab) -> str:
                text = f"{1e3 * seconds:.3f} ms"
                if run.chip and seconds > 0:
                    text += f", {size / seconds / (run.chip.bandwidth * roofline.ACHIEVABLE):.0%} of the bandwidth"
                return text

            yield Row(f"{what}: {title_of(case)}", must, took, shown)


def of_linear(run: Run) -> Iterator[Row]:
    """As a multiple of the bare GEMMs of the same run, the reference's pass among them."""
    bases = [linear.BASE[run.device].key | {"head": head} for head in linear.HEADS[run.device]]
    cases = run.cases("linear", bases[0])
    for case in cases if "seconds" in cases[0] else [base | {"dtype": DTYPE} for base in bases]:
        floor = _median(case, next(iter(case.get("seconds", {"": {}}))))
        took = _median(case, linear.name_of(run.backend))
        measured = took / floor if took is not None and floor is not None else None
        yield Row(title_of(case), _multiple(run, case), measured, "{:.3f} × bare GEMMs".format)


def _multiple(run: Run, case: dict) -> float | None:
    vocab, head = case["V"], case["head"]
    scoring, writing = (run.row_seconds(kernel, vocab) for kernel in (roofline.SCORES, roofline.KERNELS["chunk"]))
    if scoring is None or writing is None or case.get("softcap"):
        return None
    plan = linear.plan_of(_shape(case), DTYPE, head, run.device)
    if "plan" in case and case["plan"]["text"] != repr(plan):
        return None  # another version of the package, or another device's plan
    reference = LinearPlan.of([plan.rows], vocab, case["H"], needs_hidden=False, needs_weight=False)
    trained = head == linear.TRAINED
    try:
        small = launches.of_a_chunk(run.launched, launches.TRAINED if trained else launches.FROZEN)
    except KeyError:
        return None  # an earlier version counted other calls
    parts = roofline.linear(plan, run.chip, trained, writing, small)
    more = roofline.linear(reference, run.chip, False, scoring, 0)
    return sum([*parts.values(), *more.values()]) / (parts["GEMMs"] + more["GEMMs"])


def _shape(case: dict) -> Shape:
    return Shape(case["N"], case["H"], case["V"], case.get("model"), case.get("softcap"))


def of_memory(run: Run) -> Iterator[Row]:
    """The plan of each case stands in its results file: any device has a prediction."""
    base = memory.BASE[run.device].key | {"head": linear.TRAINED}
    for benchmark in ("linear", "memory"):
        for case in run.cases(benchmark, base):
            planned = case.get("plan") or {
                "peak bytes": linear.plan_of(_shape(case), DTYPE, case["head"], run.device).peak_bytes
            }
            peak = case.get("peak extra bytes", {}).get(linear.name_of(run.backend))
            what = f"{title_of(case)} (`{benchmark}`)"
            yield Row(what, planned["peak bytes"], peak, lambda x: f"{x / 2**20:,.0f} MiB")


def of_step(run: Run) -> Iterator[Row]:
    """A whole step has no prediction: the model is most of it."""
    cases = run.results.get("step", {}).get("cases") or [{"head": step.TRAINED, "dtype": DTYPE}]
    for case in cases:
        took = _median({"seconds": case.get("seconds", {}).get(step.STEP, {})}, step.OURS)
        yield Row(title_of(case), None, took, lambda x: f"{1e3 * x:.0f} ms")


def of_launches(run: Run) -> Iterator[Row]:
    """Counted on the CPU beside counted by the profiler, for Triton's backend."""
    measured = {(case["call"], case["part"]): case for case in run.results.get("launches", {}).get("cases", [])}
    counted = {
        (call, part): (int(triton), int(gemms) + int(pytorch))
        for call, part, triton, gemms, pytorch in run.launched[1:]
    }
    for key in dict.fromkeys([*counted, *measured]):
        predicted, found = counted.get(key, (None, None)), measured.get(key, {})
        for must, kind in zip(predicted, ("Triton", "others")):
            yield Row(
                f"{', '.join(key)}: {'kernels of ours' if kind == 'Triton' else 'others'}", must, found.get(kind), str
            )


COMPARISONS = {
    "Ceilings": of_ceilings,
    "From logits": of_logits,
    "From hidden states": of_linear,
    "Peak memory": of_memory,
    "Launches of a call": of_launches,
    "A training step": of_step,
}


# Runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def tests(folder: Path) -> list[list[str]]:
    """One row a file that pytest wrote, the first row the head. Nothing where there is none."""
    rows = [["tests", "passed", "failed", "skipped", "first failure"]]
    for path in sorted(folder.glob("tests-*.xml")):
        try:
            suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
        except ElementTree.ParseError:
            continue
        count = {
            name: sum(int(suite.get(name, 0)) for suite in suites)
            for name in ("tests", "failures", "errors", "skipped")
        }
        failed = count["failures"] + count["errors"]
        bad = [
            case for suite in suites for case in suite.iter("testcase") if {x.tag for x in case} & {"failure", "error"}
        ]
        first = f"{bad[0].get('classname')}::{bad[0].get('name')}" if bad else ""
        passed = count["tests"] - failed - count["skipped"]
        rows.append([path.stem.removeprefix("tests-"), *map(str, (passed, failed, count["skipped"])), first])
    return rows if len(rows) > 1 else []


def steps(folder: Path) -> list[str]:
    """How each step of the run ended, as run_gpu.sh says in its logs."""
    logs = (
        path.read_text(errors="replace")
        for part in ("tests", "benchmarks", "table")
        for path in folder.glob(f"{part}.log")
    )
    return [f"{part}: {end}" for log in logs for part, end in re.findall(r"^== (\S+): (.+)$", log, re.M)]


# The page ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def tables(run: Run) -> list[Table]:
    head = ["", "prediction", "measured", "ratio", f"more than {TOLERANCE:.0%} apart"]
    found = [(title, [head, *(row.cells() for row in compare(run))]) for title, compare in COMPARISONS.items()]
    counted = tests(run.folder)
    return ([("Tests", counted)] if counted else []) + found


def about(run: Run) -> list[str]:
    """Sentences above the tables: where, whether the chip is known, how much differs."""
    lines = list(dict.fromkeys(f"{provenance(result)}." for result in run.results.values()))
    if not run.results:
        lines.append(f"Nothing was measured: {run.folder} has no results file of a {run.device} device.")
    elif run.chip is None:
        device = next(iter(run.results.values()))["device"]
        known = ", ".join(chip.name for chip in roofline.CHIPS)
        lines.append(f"The device {device!r} is unknown: no time is predicted. Known chips: {known}.")
    elif not any(case["target"] == run.chip.code for case in run.kernels):
        lines.append(f"No kernel was compiled for {run.chip.code}, so that no kernel's time is predicted.")
    rows = [row for compare in COMPARISONS.values() for row in compare(run)]
    compared = [row for row in rows if row.ratio is not None]
    apart = [row for row in compared if row.differs]
    lines.append(
        f"{len(compared)} figures were compared; {len(apart)} are more than {TOLERANCE:.0%} from the prediction."
    )
    if not tests(run.folder):
        lines.append("No test's result is here.")
    return lines


def page(run: Run) -> str:
    parts = ["# Predicted and measured", *about(run)]
    for title, rows in tables(run):
        parts += [f"## {title}", markdown(rows)]
    if ended := steps(run.folder):
        parts.append(folded("How each step ended", ["\n".join(f"- {line}" for line in ended)]))
    return "\n\n".join(parts) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="folder (default: benchmarks/results)"
    )
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="default: %(default)s")
    about = "the page to write (default: predictions-DEVICE.md in that folder)"
    parser.add_argument("--page", type=Path, metavar="FILE", help=about)
