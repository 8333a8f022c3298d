"""Turns results files into tables, on the screen, in the README (the headlines) and in docs/benchmarks.md (everything): no
figure is typed by hand."""

from __future__ import annotations

import itertools
import json
import operator
import re
from collections.abc import Callable
from pathlib import Path

from . import step
from .ceilings import COPY, GEMM, READ
from .environment import ROOT
from .logits import FORWARD, FRESH, INPLACE, YARDSTICK
from .measure import DTYPES
from .peers import NAIVE

RESULTS = ROOT / "benchmarks" / "results"
DEVICES = ("cpu", "cuda")
# Passes over the logits that each needs at least: reads and writes.
PASSES = {FORWARD: 1, FRESH: 3, INPLACE: 3}
OURS = ("kto_loss", "linear_kto_loss", step.OURS)
Table = tuple[str, list[list[str]]]  # its title, and rows, the first of them the head


# Words for figures ────────────────────────────────────────────────────────────────────────────────────────────────────


def provenance(result: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    where = "compiled, not run"
    if "device" in result:
        driver = f", driver {result['driver']}" if result.get("driver") else ""
        where = f"{result['device']}{driver}, {result['threads']} threads"
    return f"{where}; {versions}; commit {result['commit']}; {result['date']}"


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
    """What stands under the tables: the plan beside what was measured, accuracy, peers that were not there."""
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


def linear_summary(result: dict) -> list[Table]:
    """A row for each case but those of the first shape, which has a table of its own."""
    rows = [
        [
            "head",
            "N",
            "H",
            "V",
            "dtype",
            "ours, ms",
            "/ bare GEMMs",
            "best peer",
            "its ms",
            "ours, memory",
            "its memory",
        ]
    ]
    first = result["cases"][0]
    for case in result["cases"]:
        seconds, peaks = case["seconds"], case["peak extra bytes"]
        floor, *rest = seconds
        ours = [name for name in rest if mine(name)]
        best = best_peer({name: seconds[name] for name in rest})
        if (case["N"], case["H"], case["V"]) == (first["N"], first["H"], first["V"]) or not ours or best is None:
            continue
        fastest = min(ours, key=lambda name: seconds[name]["median"])
        rows.append(
            [
                f"{case.get('model') or ''}, {case['head']}".lstrip(", "),
                *(str(case[name]) for name in ("N", "H", "V", "dtype")),
                milliseconds(seconds[fastest]),
                times(seconds[fastest]["median"] / seconds[floor]["median"]),
                best,
                milliseconds(seconds[best]),
                memory(peaks.get(fastest)),
                memory(peaks.get(best)),
            ]
        )
    return [("Heads of other models", rows)] if len(rows) > 1 else []


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
    """What could not be measured: where and why."""
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
    """The worst of each kernel's variants on each target."""
    rows = [["kernel", "target", "variants", "registers, at most", "spills, bytes", "widest loads, bits"]]
    kernels = operator.itemgetter("kernel", "target")
    for key, group in itertools.groupby(sorted(result["cases"], key=kernels), kernels):
        cases = list(group)
        most = (max(case[name] for case in cases) for name in ("registers", "spills"))
        widest = min(max(map(int, case["loads"])) for case in cases)
        rows.append([*key, *map(str, (len(cases), *most, widest))])
    return [("The Triton kernels as machine code", rows)]


# name → (tables, notes, tables of the README)
BENCHMARKS: dict[str, tuple[Callable, Callable, Callable]] = {
    "ceilings": (ceilings_tables, lambda _: [], ceilings_tables),
    "logits": (logits_tables, logits_notes, lambda result: logits_tables(result)[:1]),
    "linear": (linear_tables, linear_notes, lambda result: linear_tables(result)[:1] + linear_summary(result)),
    "memory": (memory_tables, memory_notes, memory_tables),
    "longcontext": (longcontext_tables, longcontext_notes, longcontext_tables),
    "step": (step_tables, lambda _: [], lambda result: step_tables(result)[::2]),
    "inspect": (inspect_tables, lambda _: [], inspect_tables),
}


def on_screen(result: dict) -> tuple[list[Table], list[str]]:
    tables, notes, _ = BENCHMARKS[result["benchmark"]]
    return tables(result), notes(result)


# The documents ────────────────────────────────────────────────────────────────────────────────────────────────────────


def measured(*benchmarks: str) -> tuple[str, ...]:
    return tuple(f"{benchmark}-{device}" for benchmark in benchmarks for device in DEVICES)


# Document → the results that it shows, by the names of their files, and whether all of them.
DOCUMENTS = {
    ROOT / "README.md": (measured("logits", "linear", "longcontext", "step"), False),
    ROOT / "docs" / "benchmarks.md": (
        (*measured(*(name for name in BENCHMARKS if name != "inspect")), "inspect"),
        True,
    ),
}


def section(document: Path, name: str, everything: bool) -> str:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "not measured"
    result = json.loads(path.read_text())
    tables, notes, headlines = BENCHMARKS[result["benchmark"]]
    rounds = {case["repeats"] for case in result["cases"] if "repeats" in case} or {
        result.get("ceilings", {}).get("repeats")
    }
    counts = " or ".join(map(str, sorted(rounds - {None})))
    found = [f"Medians of {counts} runs. {provenance(result)}." if counts else f"{provenance(result)}."]
    for title, rows in (tables if everything else headlines)(result):
        found += [f"{title}:", markdown(rows)]
    if everything:
        found += notes(result)
    here = document.parent
    for picture in sorted(RESULTS.glob(f"{name}*.svg")):
        relative = Path(*[".."] * len(here.relative_to(ROOT).parts)) / picture.relative_to(ROOT)
        found.append(f"![{result['benchmark']} on {result['device']}]({relative.as_posix()})")
    return "\n\n".join(found)


def update(check: bool = False) -> list[str]:
    """Draws the pictures and rewrites what stands between `<!-- results: NAME -->` and `<!-- end -->`; returns the
    documents (and, with `check`, which changes nothing, pictures) that were not as the results files say."""
    changed = stale_pictures() if check else []
    if not check:
        draw_all()
    for document, (names, everything) in DOCUMENTS.items():
        text = new = document.read_text()
        for name in names:
            pattern = re.compile(rf"(<!-- results: {name} -->\n).*?(\n?<!-- end -->)", re.S)
            if not pattern.search(new):
                raise SystemExit(f"{document.name} has no place for the results {name!r}")
            written = section(document, name, everything)
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
