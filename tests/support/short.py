"""Which cases run. `--short` keeps one of each test (`make test`), and `--rest` leaves it out. A test function is a promise: one case of each stays.
Which one it is follows from the function's name, so that backends, dtypes and layouts take turns over the functions. A case
that is marked `wide` is never the one.

In Triton's interpreter, which is a hundred times as slow as the other backends, dtypes take turns over the cases of a
function too, without `--every-dtype`. As they are compiled, test_ptx.py runs the kernels in every dtype."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

import pytest

# Test function → its cases, and the one of them that `--short` keeps.
CASES = pytest.StashKey[dict[str, tuple[list[pytest.Item], list[pytest.Item]]]]()

_DTYPE = re.compile(r"\b(fp32|bf16|fp16)\b")


def in_turn(case: pytest.Item) -> bool:
    """Whether a case runs without `--every-dtype`: of cases for the interpreter that differ in the dtype alone, one."""
    found = _DTYPE.findall(case.callspec.id) if hasattr(case, "callspec") else []
    if len(found) != 1 or case.callspec.params.get("place") != ("triton", "cpu"):
        return True
    turn = zlib.crc32(_DTYPE.sub("", case.nodeid).encode()) % 3
    return ("fp32", "bf16", "fp16")[turn] == found[0]


def functions(items: Iterable[pytest.Item]) -> dict[str, list[pytest.Item]]:
    """Name → the cases of each test function."""
    found: dict[str, list[pytest.Item]] = {}
    for item in items:
        found.setdefault(item.nodeid.split("[")[0], []).append(item)
    return found


def representative(name: str, cases: list[pytest.Item]) -> list[pytest.Item]:
    """One case of a test function; none where all are marked `wide`."""
    cases = [case for case in cases if not case.get_closest_marker("wide")]
    # A case that is skipped shows nothing.
    candidates = [case for case in cases if not case.get_closest_marker("skip")] or cases
    return candidates[zlib.crc32(name.encode()) % len(candidates) :][:1] if candidates else []
