"""Turns results files into tables, on the screen and in the README: no figure is typed by hand."""

from __future__ import annotations

import json
import re

from .environment import ROOT
from .logits import NAIVE, VARIANTS

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MEMORY = VARIANTS[:3]


def provenance(result: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    return f"{result['device']}, {result['threads']} threads; {versions}; commit {result['commit']}; {result['date']}"


def logits_table(result: dict) -> list[list[str]]:
    rows = [["", "dtype", "time (quartiles)", "naive / this", "this / logits.sum()", "peak extra memory"]]
    for case in result["cases"]:
        seconds = case["seconds"]
        naive, total = seconds[NAIVE]["median"], seconds["logits.sum()"]["median"]
        for variant, times in seconds.items():
            extra = case["peak extra bytes"].get(variant)
            rows.append(
                [
                    variant,
                    case["dtype"],
                    f"{1e3 * times['median']:.1f} ms ({1e3 * times['low']:.1f}–{1e3 * times['high']:.1f})",
                    f"{naive / times['median']:.1f}×" if variant in VARIANTS[:3] else "",
                    f"{times['median'] / total:.1f}×",
                    "" if extra is None else memory(extra, case["N"]),
                ]
            )
    return rows


def memory(size: int, n: int) -> str:
    return f"{size / 2**20:.1f} MiB ({size / n:,.0f} bytes per token)"


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| --- |" + " ---: |" * (len(rows[0]) - 1))
    return "\n".join(lines)


def accuracy_line(result: dict) -> str:
    parts = []
    for case in result["cases"]:
        errors = case["accuracy"]["rms or absolute error against fp64"]
        parts.append(
            f"{case['dtype']} gradient {errors['ours']['gradient']:.2e} (naive {errors['naive']['gradient']:.2e}), "
            f"loss {errors['ours']['loss']:.1e} (naive {errors['naive']['loss']:.1e})"
        )
    return "Error against fp64, root mean square of the gradient and absolute of the loss: " + "; ".join(parts) + "."


def logits_section() -> str:
    result = json.loads((RESULTS / "logits-cpu.json").read_text())
    case = result["cases"][0]
    head = f"N = {case['N']} tokens, V = {case['V']}, medians of {case['repeats']} interleaved runs in one process. "
    return f"{head}{provenance(result)}.\n\n{markdown(logits_table(result))}\n\n{accuracy_line(result)}"


SECTIONS = {"logits-cpu": logits_section}


def update_readme(check: bool = False) -> bool:
    """Rewrites what stands between `<!-- results: NAME -->` and `<!-- end -->`; returns whether anything differs."""
    text = README.read_text()
    new = text
    for name, section in SECTIONS.items():
        pattern = re.compile(rf"(<!-- results: {name} -->\n).*?(\n<!-- end -->)", re.S)
        if not pattern.search(new):
            raise SystemExit(f"README.md has no place for the results {name!r}")
        new = pattern.sub(lambda match, section=section: match[1] + section() + match[2], new)
    if not check and new != text:
        README.write_text(new)
    return new != text
