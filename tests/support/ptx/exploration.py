"""Random problems by their numbers, and what came of them."""

from __future__ import annotations

import time
from collections import Counter

from . import problems

TOGETHER = 25  # problems with the same options, as compiling the kernels for them takes seconds


def explore(backend: str, arch: int, numbers: range, seed: int) -> tuple[str, list[str]]:
    """In a process where Triton compiles: runs the cases of these numbers. Returns counts and failures."""
    launches = problems.target(backend, arch)
    launches.machine.strict = False
    kinds: Counter[str] = Counter()
    failed, start = [], time.time()
    for number in numbers:
        found = len(launches.machine.findings)
        problem = problems.drawn(seed * 1_000_000 + number // TOGETHER)
        kinds[type(problem).__name__] += 1
        faults = []
        try:
            problems.run(launches, backend, problem, seed * 1_000_000 + number)
        except AssertionError as error:
            faults.append(str(error))
        if faults := faults + [str(finding) for finding in launches.machine.findings[found:]]:
            failed.append(f"FAILED {backend} sm_{arch} case {number}: {problem}\n" + "\n".join(faults[:8]))
    counts = launches.machine.counts()
    return (
        f"{backend} sm_{arch}, cases {numbers.start} to {numbers.stop - 1}: {len(numbers)} executed, "
        f"{len(failed)} failed, {counts['findings']} findings ({counts['exceptions']} of the named exception); {dict(kinds)}; "
        f"{counts['launches']} launches, {counts['instructions']:,} instructions, {time.time() - start:.0f} s"
    ), failed
