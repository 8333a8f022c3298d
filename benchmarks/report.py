"""Turns results files into tables, on the screen and in the README: no figure is typed by hand."""

from __future__ import annotations

import json
import re

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
                    f"{1e3 * median:.1f} ({1e3 * times['low']:.1f}–{1e3 * times['high']:.1f})",
                    ratio,
                    share,
                    memory(case.get("peak extra bytes", {}).get(variant)),
                ]
            )
    return rows


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


def logits_section(kind: str) -> str:
    path = RESULTS / f"logits-{kind}.json"
    if not path.exists():
        return "not measured"
    result = json.loads(path.read_text())
    case = result["cases"][0]
    head = f"V = {case['V']}, medians of {case['repeats']} interleaved runs in one process. {provenance(result)}."
    return "\n\n".join([head, markdown(logits_table(result)), *notes(result)])


SECTIONS = {"logits-cpu": lambda: logits_section("cpu"), "logits-cuda": lambda: logits_section("cuda")}


def update_readme(check: bool = False) -> bool:
    """Rewrites what stands between `<!-- results: NAME -->` and `<!-- end -->`; returns whether anything differs."""
    text = README.read_text()
    new = text
    for name, section in SECTIONS.items():
        pattern = re.compile(rf"(<!-- results: {name} -->\n).*?(\n?<!-- end -->)", re.S)
        if not pattern.search(new):
            raise SystemExit(f"README.md has no place for the results {name!r}")
        new = pattern.sub(lambda match, section=section: f"{match[1]}{section()}\n<!-- end -->", new)
    if not check and new != text:
        README.write_text(new)
    return new != text
