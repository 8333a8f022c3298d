"""Turns results files into tables, on the screen and in the README: no figure is typed by hand."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable

from . import step
from .environment import ROOT
from .logits import FORWARD, FRESH, INPLACE, YARDSTICK
from .peers import NAIVE

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
# Passes over the logits that each needs at least: reads and writes.
PASSES = {FORWARD: 1, FRESH: 3, INPLACE: 3}


def provenance(result: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    return f"{result['device']}, {result['threads']} threads; {versions}; commit {result['commit']}; {result['date']}"


def logits_table(result: dict) -> list[list[str]]:
    kind = result["device kind"]
    yardstick = YARDSTICK[kind]
    last = "time / logits.sum()" if kind == "cpu" else "of the copy bandwidth"
    rows = [["", "N", "dtype", "ms (quartiles)", "naive / this", last, "peak extra memory"]]
    for case in result["cases"]:
        seconds = case["seconds"]
        one_pass = seconds[yardstick]["median"] / (1 if kind == "cpu" else 2)  # a copy reads and writes
        for variant, times in seconds.items():
            median = times["median"]
            mode = variant.rsplit(", ", 1)[-1]
            baseline = seconds.get(f"{NAIVE}, {FORWARD if mode == FORWARD else FRESH}")
            ratio = f"{baseline['median'] / median:.1f}×" if baseline and mode in PASSES else ""
            if kind == "cpu":
                share = f"{median / one_pass:.1f}×"
            else:
                share = f"{100 * PASSES.get(mode, 2) * one_pass / median:.0f} %"
            rows.append(
                [
                    variant,
                    str(case["N"]),
                    case["dtype"],
                    milliseconds(times),
                    ratio,
                    share,
                    memory(case.get("peak extra bytes", {}).get(variant)),
                ]
            )
    return rows


def milliseconds(times: dict) -> str:
    return f"{1e3 * times['median']:.1f} ({1e3 * times['low']:.1f}–{1e3 * times['high']:.1f})"


def memory(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f} MiB"


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| --- |" + " ---: |" * (len(rows[0]) - 1))
    return "\n".join(lines)


def notes(result: dict) -> list[str]:
    """Sentences under the table: accuracy, memory per token, peers that were not there."""
    errors = []
    for case in result["cases"]:
        plain = case["errors against fp64"][NAIVE]
        for name, mine in case["errors against fp64"].items():
            if name != NAIVE and "in place" not in name:
                errors.append(
                    f"{case['dtype']}, N = {case['N']}, {name}: gradient {mine['gradient']:.2e} "
                    f"(naive {plain['gradient']:.2e}), loss {mine['loss']:.1e} (naive {plain['loss']:.1e})"
                )
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
    for name, why in result["cases"][0]["absent"].items():
        lines.append(f"{name}: {why}.")
    return lines


def linear_tables(result: dict) -> list[tuple[str, list[list[str]]]]:
    """One table for each shape and head, under its heading; dtypes stand below each other."""
    tables = []
    for shape, cases in itertools.groupby(
        result["cases"], lambda case: [case[name] for name in ("N", "H", "V", "head")]
    ):
        rows = [["", "dtype", "ms (quartiles)", "time / bare GEMMs", "time / naive", "peak extra memory"]]
        for case in cases:
            seconds = case["seconds"]
            floor, *_ = seconds.values()
            for variant, times in seconds.items():
                shares = [f"{times['median'] / other['median']:.2f}×" for other in (floor, seconds[NAIVE])]
                peak = memory(case["peak extra bytes"].get(variant))
                rows.append([variant, case["dtype"], milliseconds(times), *shares, peak])
        tables.append(("N = {}, H = {}, V = {}, {} head".format(*shape), rows))
    return tables


def linear_notes(result: dict) -> list[str]:
    """What stands under the tables: the plan beside what was measured, accuracy, peers that were not there."""
    lines = []
    for case in result["cases"]:
        plan, peaks, errors = case["plan"], case["peak extra bytes"], case["errors against fp64"]
        lines.append(f"```\n{plan['text']}\n```")
        for name in plan["variants"]:
            measured = (
                f"{name}, {case['dtype']}: measured {memory(peaks[name])}, {peaks[name] / plan['peak bytes']:.2f}"
            )
            against = ", ".join(f"{what} {mine:.2e} ({errors[NAIVE][what]:.2e})" for what, mine in errors[name].items())
            lines.append(f"{measured} of the plan's. Error against fp64, root mean square (naive's): {against}.")
        lines += [f"{name}, {case['dtype']}: {why}." for name, why in case["absent"].items()]
    return lines


def step_table(result: dict) -> list[list[str]]:
    rows = [["", "head", "step, ms", "step, memory", "loss part, ms", "/ TRL's", "loss part, memory"]]
    for case in result["cases"]:
        seconds, peaks = case["seconds"], case["peak extra bytes"]
        for variant in (step.TRL, step.OURS):
            times = {part: seconds[part][variant] for part in (step.STEP, step.LOSS)}
            share = times[step.LOSS]["median"] / seconds[step.LOSS][step.TRL]["median"]
            rows.append(
                [
                    variant,
                    case["head"],
                    milliseconds(times[step.STEP]),
                    memory(peaks[step.STEP][variant]),
                    milliseconds(times[step.LOSS]),
                    f"{share:.2f}×",
                    memory(peaks[step.LOSS][variant]),
                ]
            )
    return rows


def step_contents(result: dict) -> tuple[str, list[str]]:
    return "One optimizer step, SmolLM2-135M-Instruct in fp32, 4 rows of feedback", [markdown(step_table(result))]


def section(name: str, contents: Callable[[dict], tuple[str, list[str]]]) -> str:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "not measured"
    result = json.loads(path.read_text())
    repeats = result["cases"][0]["repeats"]
    subject, parts = contents(result)
    head = f"{subject}, medians of {repeats} interleaved runs in one process. {provenance(result)}."
    return "\n\n".join([head, *parts])


def logits_contents(result: dict) -> tuple[str, list[str]]:
    return f"V = {result['cases'][0]['V']}", [markdown(logits_table(result)), *notes(result)]


def linear_contents(result: dict) -> tuple[str, list[str]]:
    tables = [part for title, rows in linear_tables(result) for part in (f"{title}:", markdown(rows))]
    return "Forward and backward", tables + linear_notes(result)


SECTIONS = {
    f"{benchmark}-{kind}": contents
    for benchmark, contents in {"logits": logits_contents, "linear": linear_contents, "step": step_contents}.items()
    for kind in ("cpu", "cuda")
}


def update_readme(check: bool = False) -> bool:
    """Rewrites what stands between `<!-- results: NAME -->` and `<!-- end -->`; returns whether anything differs."""
    text = README.read_text()
    new = text
    for name, contents in SECTIONS.items():
        pattern = re.compile(rf"(<!-- results: {name} -->\n).*?(\n?<!-- end -->)", re.S)
        if not pattern.search(new):
            raise SystemExit(f"README.md has no place for the results {name!r}")
        written = section(name, contents)
        new = pattern.sub(lambda match, written=written: f"{match[1]}{written}\n<!-- end -->", new)
    if not check and new != text:
        README.write_text(new)
    return new != text
