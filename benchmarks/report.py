"""Turns results files into tables, on the screen, in the README (a few figures) and in docs/benchmarks.md (everything): no
figure is typed by hand."""

from __future__ import annotations

import functools
import itertools
import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from . import overhead, roofline, step
from .benchmark import DEVICES
from .ceilings import COPY, GEMM, READ
from .environment import RESULTS, ROOT, provenance
from .logits import FORWARD, FRESH, INPLACE, PASSES, YARDSTICK
from .measure import DTYPES
from .peers import NAIVE

OURS = ("kto_loss", "linear_kto_loss", "linear_preference_loss", step.OURS)
Table = tuple[str, list[list[str]]]  # its title, and rows, the first of them the head


# Words for figures ────────────────────────────────────────────────────────────────────────────────────────────────────


def milliseconds(times: dict) -> str:
    return f"{1e3 * times['median']:.1f} ({1e3 * times['low']:.1f}–{1e3 * times['high']:.1f})"


def memory(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| --- |" + " ---: |" * (len(rows[0]) - 1))
    return "\n".join(lines)


def folded(title: str, paragraphs: list[str]) -> str:
    """Markdown that a page shows when its title is clicked: on GitHub, and on the site of `make docs`."""
    return "\n\n".join([f'<details markdown="1"><summary>{title}</summary>', *paragraphs, "</details>"])


# Ratios ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def mine(variant: str) -> bool:
    return variant.startswith(OURS)


def best_peer(seconds: dict[str, dict]) -> str | None:
    """The fastest of these that is not ours."""
    return min((name for name in seconds if not mine(name)), key=lambda name: seconds[name]["median"], default=None)


def logits_floor(result: dict, case: dict, mode: str) -> float | None:
    """Seconds that the passes of a mode take at this device's ceilings."""
    ceilings = result.get("ceilings")
    if ceilings is None or mode not in PASSES:
        return None
    size = case["N"] * case["V"] * DTYPES[case["dtype"]].itemsize
    return size / ceilings[READ] + (0 if mode == FORWARD else 2 * size / ceilings[COPY])


def linear_floor(result: dict, case: dict) -> float | None:
    """Seconds of the bare GEMMs' FLOPs at this device's ceiling. Scored tokens count alone."""
    rates = result.get("ceilings", {}).get(GEMM, {})
    if case["dtype"] not in rates:
        return None
    floor, *_ = case["seconds"]
    units = int(re.search(r"(\d)G$", floor)[1])
    return units * 2 * case["N"] * case["H"] * case["V"] / rates[case["dtype"]]


# Tables and notes of each benchmark ───────────────────────────────────────────────────────────────────────────────────


def ceilings_tables(result: dict) -> list[Table]:
    found = result["ceilings"]
    rows = [["copy (read and written)", "read", *(f"GEMM, {dtype}" for dtype in found[GEMM])]]
    rows.append([f"{found[name] / 1e9:.1f} GB/s" for name in (COPY, READ)])
    rows[1] += [f"{rate / 1e12:.2f} TFLOP/s" for rate in found[GEMM].values()]
    return [(f"Ceilings of the device; matrices of {found['gemm size']}²", rows)]


def logits_table(result: dict, cases: list[dict] | None = None) -> list[list[str]]:
    kind = result["device kind"]
    yardstick = YARDSTICK[kind]
    rows = [
        [
            "",
            "N",
            "dtype",
            "ms (quartiles)",
            "best peer / this",
            "of the ceiling",
            f"/ {yardstick}",
            "peak extra memory",
        ]
    ]
    for case in result["cases"] if cases is None else cases:
        seconds = case["seconds"]
        for variant, took in seconds.items():
            median = took["median"]
            mode = variant.rsplit(", ", 1)[-1]
            others = {
                name: other
                for name, other in seconds.items()
                if name.rsplit(", ", 1)[-1] in PASSES and (name.endswith(FORWARD) == (mode == FORWARD))
            }
            best = best_peer(others) if mode in PASSES else None
            floor = logits_floor(result, case, mode)
            rows.append(
                [
                    variant,
                    str(case["N"]),
                    case["dtype"],
                    milliseconds(took),
                    times(best and seconds[best]["median"] / median),
                    percent(floor and floor / median),
                    f"{median / seconds[yardstick]['median']:.1f}×",
                    memory(case.get("peak extra bytes", {}).get(variant)),
                ]
            )
    return rows


def logits_tables(result: dict) -> list[Table]:
    return [
        (f"V = {vocab}, N = {n}", logits_table(result, list(cases)))
        for (vocab, n), cases in itertools.groupby(result["cases"], lambda case: (case["V"], case["N"]))
    ]


def logits_notes(result: dict) -> list[str]:
    """Sentences under the tables: accuracy, memory per token, peers that were not there."""
    errors, launches = [], []
    for case in result["cases"]:
        plain = case["errors against fp64"][NAIVE]
        for name, error in case["errors against fp64"].items():
            if mine(name) and "in place" not in name:
                errors.append(
                    f"{case['dtype']}, N = {case['N']}, {name}: gradient {error['gradient']:.2e} "
                    f"(naive {plain['gradient']:.2e}), loss {error['loss']:.1e} (naive {plain['loss']:.1e})"
                )
        launches += [f"N = {case['N']}, {name}: {how}" for name, how in case.get("launches", {}).items()]
    lines = [
        "Error against fp64, root mean square of the gradient and absolute of the loss: " + "; ".join(errors) + "."
    ]
    if "in-place bytes per token" in result:
        per_token = result["in-place bytes per token"]
        lines.append(
            f"The in-place step's peak memory above its inputs, over N = {per_token['N']:,} tokens of a vocabulary of "
            f"{per_token['V']}: {per_token['bytes'] / per_token['N']:.0f} bytes per token; per vocabulary entry none, "
            "as the table shows."
        )
    if launches:
        lines.append("Timed as replays of a CUDA graph where that says so: " + "; ".join(launches) + ".")
    return lines + absentees(result["cases"], "absent")


def absentees(cases: list[dict], key: str) -> list[str]:
    """Who was not measured, why, and where if not everywhere."""
    where: dict[str, list[str]] = {}
    for case in cases:
        for name, why in case[key].items():
            where.setdefault(f"{name}: {why}", []).append(title_of(case))
    return [
        f"{what}." if len(titles) == len(cases) else f"{what} ({'; '.join(dict.fromkeys(titles))})."
        for what, titles in where.items()
    ]


def title_of(case: dict) -> str:
    sizes = [f"{name} = {case[name]:,}" for name in ("N", "H", "V") if case.get(name)]
    model = [case["model"]] if case.get("model") else []
    budget = [f"logits of at most {memory(case['max_logits_bytes'])}"] if case.get("max_logits_bytes") else []
    head = [f"{case['head']} head"] if "head" in case else []
    return ", ".join([*model, *sizes, *budget, *head, case["dtype"]])


def linear_table(result: dict, cases: list[dict]) -> list[list[str]]:
    rows = [
        [
            "",
            "dtype",
            "ms (quartiles)",
            "/ bare GEMMs",
            "of the GEMM ceiling",
            "/ best peer",
            "/ naive",
            "peak extra memory",
        ]
    ]
    for case in cases:
        seconds = case["seconds"]
        floor, *_ = seconds
        best = best_peer({name: took for name, took in seconds.items() if name != floor})
        for variant, took in seconds.items():
            bound = linear_floor(result, case)

            def over(other: str | None, took=took, seconds=seconds) -> float | None:
                return took["median"] / seconds[other]["median"] if other in seconds else None

            rows.append(
                [
                    variant,
                    case["dtype"],
                    milliseconds(took),
                    times(over(floor)),
                    percent(bound and bound / took["median"]),
                    times(over(best)),
                    times(over(NAIVE)),
                    memory(case["peak extra bytes"].get(variant)),
                ]
            )
    return rows


def linear_tables(result: dict) -> list[Table]:
    """One table for each shape and head; dtypes stand below each other."""
    tables = []
    keys = ("model", "N", "H", "V", "head")
    for _, group in itertools.groupby(result["cases"], lambda case: [case.get(name) for name in keys]):
        cases = list(group)
        prompts = f" (and {cases[0]['tokens'] - cases[0]['N']:,} tokens of prompts)" if "tokens" in cases[0] else ""
        tables.append((title_of(cases[0] | {"dtype": ""}).rstrip(", ") + prompts, linear_table(result, cases)))
    return tables


def linear_notes(result: dict) -> list[str]:
    """The lines under the tables: the plan beside what was measured, accuracy, peers that were not there."""
    lines = []
    for case in result["cases"]:
        plan, peaks, errors = case["plan"], case["peak extra bytes"], case["errors against fp64"]
        lines.append(f"{title_of(case)}:\n\n```\n{plan['text']}\n```")
        for name in plan["variants"]:
            measured = "not measured"
            if peaks.get(name) is not None:
                measured = f"measured {memory(peaks[name])}, {peaks[name] / plan['peak bytes']:.2f} of the plan's"
            plain = errors.get(NAIVE, {})
            against = ", ".join(
                f"{what} {error:.2e}" + (f" ({plain[what]:.2e})" if what in plain else "")
                for what, error in errors[name].items()
            )
            lines.append(f"{name}: {measured}. Error against fp64, root mean square (naive's): {against}.")
    return lines + absentees(result["cases"], "absent")


def memory_tables(result: dict) -> list[Table]:
    """For each sweep a column a shape, and a row a variant."""
    tables = []
    sizes = {"N": "N", "V": "V", "H": "H", "budget": "max_logits_bytes", "model": "model"}
    for sweep, group in itertools.groupby(result["cases"], lambda case: case["sweep"]):
        cases = list(group)
        values = [case[sizes[sweep]] for case in cases]
        named = [memory(value) if sweep == "budget" else str(value) for value in values]
        rows = [[sweep, *(f"{value}, {case['dtype']}" for value, case in zip(named, cases))]]
        for name in dict.fromkeys(name for case in cases for name in case["peak extra bytes"]):
            rows.append([name, *(peak_or_reason(case, name) for case in cases)])
        rows.append(["the plan of ours", *(memory(case["plan"]["peak bytes"]) for case in cases)])
        fixed = [f"{name} = {cases[0][name]:,}" for name in ("N", "H", "V") if name != sweep != "model"]
        tables.append((", ".join([f"Over {sweep}", *fixed, f"{cases[0]['head']} head"]), rows))
    return tables


def peak_or_reason(case: dict, name: str) -> str:
    peak = case["peak extra bytes"].get(name)
    return memory(peak) if peak is not None else case["failed"].get(name, "")


def memory_notes(result: dict) -> list[str]:
    return absentees(
        [
            case
            | {"failed": {name: why for name, why in case["failed"].items() if name not in case["peak extra bytes"]}}
            for case in result["cases"]
        ],
        "failed",
    )


def longcontext_tables(result: dict) -> list[Table]:
    """One column a length, one row a variant."""
    tables = []
    for key, group in itertools.groupby(
        result["cases"], lambda case: [case[name] for name in ("H", "V", "dtype", "head")]
    ):
        cases = list(group)
        variants = [name for name in cases[0]["variants"] if any(c["variants"][name]["seconds"] for c in cases)]
        rows = [["tokens", *(f"{case['tokens']:,}" for case in cases)]]
        rows += [[name, *(time_and_memory(case["variants"][name]) for case in cases)] for name in variants]
        plans = [case["plan"] for case in cases]
        rows.append(
            ["the plan of ours", *(f"{duration(plan['seconds'])}, {memory(plan['peak bytes'])}" for plan in plans)]
        )
        tables.append(("One sequence, H = {}, V = {}, {}, {} head".format(*key), rows))
    return tables


def time_and_memory(point: dict) -> str:
    if point["failed"] is None:
        return f"{duration(point['seconds'])}, {memory(point['peak extra bytes'])}"
    if point["failed"].startswith("not run: failed"):
        return "–"
    return "over the cap" if "over the cap" in point["failed"] else point["failed"]


def longcontext_notes(result: dict) -> list[str]:
    """The points that could not be measured: where and why."""
    cases = [
        case | {"failed": {name: point["failed"] for name, point in case["variants"].items() if point["failed"]}}
        for case in result["cases"]
    ]
    cap, limit = cases[0]["cap, s"], cases[0]["memory limit, bytes"]
    lines = []
    if cap:
        lines.append(f"A call that would take more than {cap:.0f} s is not made.")
    if limit:
        lines.append(f"A process may take {limit / 2**30:.1f} GiB, inputs and all.")
    lines.append(
        "The plan's time is that of its GEMMs at the ceiling of this device: a bound from below. A third of the tokens is a "
        "prompt, which is not scored."
    )
    return lines + [
        f"{name}: {why} ({case['tokens']:,} tokens)."
        for case in cases
        for name, why in case["failed"].items()
        if not why.startswith("not run: failed") and (case is cases[0] or why != cases[0]["failed"].get(name))
    ]


def step_table(cases: list[dict]) -> list[list[str]]:
    rows = [["", "head", "step, ms", "step, memory", "loss part, ms", "/ TRL's", "loss part, memory"]]
    for case in cases:
        seconds, peaks = case["seconds"], case["peak extra bytes"]
        for variant in (step.TRL, step.OURS):
            took = {part: seconds[part][variant] for part in (step.STEP, step.LOSS)}
            share = took[step.LOSS]["median"] / seconds[step.LOSS][step.TRL]["median"]
            rows.append(
                [
                    variant,
                    case["head"],
                    milliseconds(took[step.STEP]),
                    memory(peaks[step.STEP][variant]),
                    milliseconds(took[step.LOSS]),
                    times(share),
                    memory(peaks[step.LOSS][variant]),
                ]
            )
    return rows


def step_parts_table(cases: list[dict]) -> list[list[str]]:
    rows: list[list[str]] = []
    for case in cases:
        for variant, parts in case["parts"].items():
            rows = rows or [["", "head", *parts, "sum", "step"]]
            took = [parts[part]["median"] for part in rows[0][2:-2]]
            whole = case["seconds"][step.STEP][variant]["median"]
            rows.append([variant, case["head"], *(f"{1e3 * t:.1f}" for t in (*took, sum(took), whole))])
    return rows


def step_tables(result: dict) -> list[Table]:
    tables = []
    setup = operator.itemgetter("model", "dtype", "B")
    for key, group in itertools.groupby(result["cases"], setup):
        cases = list(group)
        tables.append(("One optimizer step, {} in {}, {} rows of feedback".format(*key), step_table(cases)))
        tables.append(("Where its time goes: medians, ms", step_parts_table(cases)))
    return tables


def inspect_tables(result: dict) -> list[Table]:
    """The worst of each kernel's variants on each target; instructions of the variants without a softcap and outputs."""
    head = ["kernel", "target", "variants", "registers, at most", "spills, bytes", "widest loads, bits"]
    rows = [[*head, "fold, instructions a logit (bf16)", "write", "FP64 a row"]]
    kernels = operator.itemgetter("kernel", "target")
    for key, group in itertools.groupby(sorted(result["cases"], key=kernels), kernels):
        cases = list(group)
        most = (max(case[name] for case in cases) for name in ("registers", "spills"))
        widest = min(max(map(int, case["loads"])) for case in cases)
        plain = [
            c for c in cases if c["variant"].endswith("bfloat16") and not re.search("softcap|output", c["variant"])
        ]
        logit = [max((c[loop]["a logit"] for c in plain if c.get(loop)), default=None) for loop in ("fold", "write")]
        fp64 = max((c["fp64"] for c in plain if "fp64" in c), default="")
        counts = ["" if count is None else f"{count:.2f}" for count in logit]
        rows.append([*key, *map(str, (len(cases), *most, widest)), *counts, str(fp64)])
    return [("The GPU kernels as machine code", rows)]


def overhead_tables(result: dict) -> list[Table]:
    """Ours and the others in microseconds, and over plain PyTorch's median of the same case."""
    rows = [["", "timed", "µs (quartiles)", "/ plain PyTorch", "at most", "met"]]
    for case in result["cases"]:
        for name, took in case["seconds"].items():
            ratio = took["median"] / case["seconds"][overhead.PLAIN]["median"]
            median, low, high = (f"{1e6 * took[quartile]:.1f}" for quartile in ("median", "low", "high"))
            rows.append([name, case["mode"], f"{median} ({low}–{high})", times(ratio), "", ""])
            if mine(name) and case["at most"] is not None:
                rows[-1][-2:] = [times(case["at most"]), "yes" if ratio <= case["at most"] else "no"]
    first = result["cases"][0]
    return [(f"A call with gradients on, N = {first['N']}, V = {first['V']}, {first['dtype']}", rows)]


def overhead_notes(result: dict) -> list[str]:
    calls = result["cases"][0]["calls"]
    return [
        f"Times are processor time; a run is the median of {calls} calls in a row. The loss from hidden states forms its gradients in the forward, "
        "so that only its forward + backward is held to a ratio."
    ]


@dataclass(frozen=True)
class Shown:
    """How the results of a benchmark are shown."""

    tables: Callable[[dict], list[Table]]
    notes: Callable[[dict], list[str]] = lambda result: []  # the lines under the tables
    devices: tuple[str, ...] = DEVICES  # a results file each; none: one that no device made


BENCHMARKS = {
    "ceilings": Shown(ceilings_tables),
    "logits": Shown(logits_tables, logits_notes),
    "linear": Shown(linear_tables, linear_notes),
    "linear-dpo": Shown(linear_tables, linear_notes),
    "memory": Shown(memory_tables, memory_notes),
    "longcontext": Shown(longcontext_tables, longcontext_notes),
    "step": Shown(step_tables),
    "overhead": Shown(overhead_tables, overhead_notes, devices=overhead.BENCHMARK.devices),
    "inspect": Shown(inspect_tables, devices=()),
}


def on_screen(result: dict) -> tuple[list[Table], list[str]]:
    shown = BENCHMARKS[result["benchmark"]]
    return shown.tables(result), shown.notes(result)


# The README ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Beside:
    """One case: ours beside the fastest peer."""

    what: str
    peer: str
    seconds: tuple[float, float]
    bytes: tuple[int | None, int | None]

    @property
    def speed(self) -> float:
        mine, theirs = self.seconds
        return theirs / mine


DTYPE = "bf16"  # of everything that the README shows


def beside(what: str, seconds: dict[str, float | None], peaks: dict[str, int | None]) -> Beside | None:
    """The fastest of ours and the fastest peer of these variants; None where one of them was not measured."""
    measured = sorted((took, name) for name, took in seconds.items() if took is not None)
    ours, peer = (next((name for _, name in measured if mine(name) == wanted), None) for wanted in (True, False))
    if ours is None or peer is None:
        return None
    return Beside(
        what, peer.removesuffix(f", {FRESH}"), (seconds[ours], seconds[peer]), (peaks.get(ours), peaks.get(peer))
    )


def medians(seconds: dict[str, dict], kept: Callable[[str], bool] = lambda name: True) -> dict[str, float | None]:
    return {name: took["median"] for name, took in seconds.items() if kept(name)}


def loaded(benchmark: str, device: str) -> dict:
    path = RESULTS / f"{benchmark}-{device}.json"
    return json.loads(path.read_text()) if path.exists() else {"cases": []}


def logits_beside(result: dict) -> list[Beside | None]:
    """The rows of the first shape: with a gradient of its own and with the gradient written over the logits."""
    case = next((case for case in result["cases"] if case["dtype"] == DTYPE), None)
    if case is None:
        return []
    what = f"from logits, {case['N']:,} tokens, vocabulary {case['V']:,}"
    rows = []
    for title, ending in ((what, FRESH), ("from logits, gradient written over the logits", INPLACE)):

        def kept(name: str, ending=ending) -> bool:
            return name.endswith(ending if mine(name) else FRESH)

        rows.append(beside(title, medians(case["seconds"], kept), case["peak extra bytes"]))
    return rows


def linear_beside(result: dict) -> list[Beside | None]:
    """The first shape, and of the others the one where ours gains least."""
    rows = []
    for case in result["cases"]:
        if case["dtype"] == DTYPE:
            floor, *_ = case["seconds"]
            seconds = medians(case["seconds"], lambda name, floor=floor: name != floor)
            model, *_ = (case["model"] or "").split(",")
            rows.append(beside(f"{model}'s head, {case['N']:,} tokens", seconds, case["peak extra bytes"]))
    rows = [row for row in rows if row]
    least = min(rows[1:], key=lambda row: row.speed, default=None)
    return [
        *rows[:1],
        least and replace(least, what=f"{least.what} ({'least gain' if least.speed >= 1 else 'slower'})"),
    ]


def longcontext_beside(result: dict) -> list[Beside | None]:
    """The longest sequence that a peer finished."""
    rows = []
    for case in result["cases"]:
        points = case["variants"].items()
        seconds, peaks = ({name: point[key] for name, point in points} for key in ("seconds", "peak extra bytes"))
        if case["dtype"] == DTYPE:
            what = f"a text of {case['tokens']:,} tokens, vocabulary {case['V']:,}"
            rows.append(beside(what, seconds, peaks))
    return [row for row in rows if row][-1:]


def step_beside(result: dict) -> list[Beside | None]:
    """A whole step with a trained head."""
    return [
        beside(
            f"a training step of {case['model']}",
            medians(case["seconds"][step.STEP]),
            case["peak extra bytes"][step.STEP],
        )
        for case in result["cases"]
        if (case["dtype"], case["head"]) == (DTYPE, step.TRAINED)
    ][:1]


# Benchmark → the rows of it that the README shows.
BESIDE = {"step": step_beside, "logits": logits_beside, "linear": linear_beside, "longcontext": longcontext_beside}


def rows_beside(benchmark: str, device: str) -> list[Beside]:
    return [row for row in BESIDE[benchmark](loaded(benchmark, device)) if row]


def size(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def headlines(device: str) -> str:
    """A line for each of three benchmarks."""
    lines = []
    for row in rows_beside("step", device):
        mine, theirs = map(duration, row.seconds)
        lines.append(f"- **{row.speed:.1f}×** the speed of TRL's trainer: {row.what} takes {mine}, under TRL {theirs}.")
    for row in rows_beside("logits", device)[:1]:
        mine, theirs = map(duration, row.seconds)
        lines.append(
            f"- **{row.speed:.1f}×** the speed of the fastest other code from logits to their gradient: {mine}, and {theirs} there."
        )
    for row in (row for row in rows_beside("longcontext", device) if None not in row.bytes):
        mine, theirs = map(size, row.bytes)
        lines.append(f"- **{mine}** of memory for {row.what}: the fastest other code ({row.peer}) takes {theirs}.")
    return "\n".join(lines) or "not measured"


def overview(device: str) -> str:
    """A table of a few rows, and where they were measured."""
    rows = [row for benchmark in BESIDE for row in rows_beside(benchmark, device)]
    if not rows:
        return "not measured"
    table = [["forward and backward", "ours", "theirs", "the fastest other code"]]
    for row in rows:
        cells = (
            duration(took) + (f", {size(count)}" if count is not None else "")
            for took, count in zip(row.seconds, row.bytes)
        )
        table.append([row.what, *cells, row.peer])
    found = [loaded(benchmark, device) for benchmark in BESIDE]
    where = sorted({f"{result['device']}, {result['date']}" for result in found if result["cases"]})
    return f"{markdown(table)}\n\nMedians in {DTYPE} on {'; '.join(where)}."


# The documents ────────────────────────────────────────────────────────────────────────────────────────────────────────


def files(*benchmarks: str) -> tuple[str, ...]:
    """The names of the results files that these benchmarks write."""
    devices = {name: BENCHMARKS[name].devices for name in benchmarks}
    return tuple(file for name in benchmarks for file in [f"{name}-{device}" for device in devices[name]] or [name])


def section(document: Path, name: str) -> str:
    """All that a results file has, as it stands in this document."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "not measured"
    result = json.loads(path.read_text())
    shown = BENCHMARKS[result["benchmark"]]
    rounds = {case["repeats"] for case in result["cases"] if "repeats" in case} or {
        result.get("ceilings", {}).get("repeats")
    }
    counts = " or ".join(map(str, sorted(rounds - {None})))
    found = [f"Medians of {counts} runs. {provenance(result)}." if counts else f"{provenance(result)}."]
    (title, rows), *others = shown.tables(result)
    found += [f"{title}:", markdown(rows), *(folded(title, [markdown(rows)]) for title, rows in others)]
    if notes := shown.notes(result):
        found.append(folded("Notes", notes))
    here = document.parent
    for picture in sorted(RESULTS.glob(f"{name}*.svg")):
        relative = Path(*[".."] * len(here.relative_to(ROOT).parts)) / picture.relative_to(ROOT)
        found.append(f"![{result['benchmark']} on {result['device']}]({relative.as_posix()})")
    return "\n\n".join(found)


def predicted(number: int) -> str:
    """A table of roofline's, or of the launches, from what `inspect` wrote."""
    result = json.loads((RESULTS / "inspect.json").read_text())
    if "launches" not in result:
        return "not measured"
    tables = [
        *roofline.tables(result["cases"], result["launches"]),
        ("Kernels that a call launches", result["launches"]),
    ]
    title, rows = tables[number]
    return f"{title}:\n\n{markdown(rows)}"


README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
GPU_PAGE = ROOT / "docs" / "gpu.md"
# Document → its sections by their names, and what writes them.
DOCUMENTS: dict[Path, dict[str, Callable[[], str]]] = {
    README: {
        "headlines-cpu": lambda: headlines("cpu"),
        "overview-cpu": lambda: overview("cpu"),
        "overview-cuda": lambda: overview("cuda"),
    },
    PAGE: {name: functools.partial(section, PAGE, name) for name in files(*BENCHMARKS)},
    GPU_PAGE: {"roofline": lambda: predicted(0), "linear": lambda: predicted(1), "launches": lambda: predicted(2)},
}


def update(check: bool = False) -> list[str]:
    """Draws the pictures and rewrites what stands between `<!-- results: NAME -->` and `<!-- end -->`; returns the
    documents (and, with `check`, which changes nothing, pictures) that were not as the results files say."""
    changed = stale_pictures() if check else []
    if not check:
        draw_all()
    for document, sections in DOCUMENTS.items():
        text = new = document.read_text()
        for name, write in sections.items():
            pattern = re.compile(rf"(<!-- results: {name} -->\n).*?(\n?<!-- end -->)", re.S)
            if not pattern.search(new):
                raise SystemExit(f"{document.name} has no place for the results {name!r}")
            written = write()
            new = pattern.sub(lambda match, written=written: f"{match[1]}{written}\n<!-- end -->", new)
        if new != text:
            changed.append(document.relative_to(ROOT).as_posix())
            if not check:
                document.write_text(new)
    return changed


def results() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def draw_all() -> None:
    from . import plots  # matplotlib is slow to load

    for result in results():
        plots.draw(result)


def stale_pictures() -> list[str]:
    """Pictures that are missing, or not of the results that are there."""
    from . import plots

    stale = []
    for result in results():
        for name in plots.figures(result):
            path = RESULTS / name
            if not path.exists() or plots.digest(result) not in path.read_text():
                stale.append(path.relative_to(ROOT).as_posix())
    return stale
