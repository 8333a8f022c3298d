"""Which cases run. A test function is a promise: `--short` (`make test`) keeps one case of each, and `--rest` leaves this
case out. Which one it is follows from the function's name, so that backends, dtypes and layouts take turns over the
functions. A case that is marked `wide` is never the one.

Triton's interpreter is much slower than the other backends. Without `--every-dtype` the dtypes take turns over the
interpreter's cases of a function too. The compiled kernels run in every dtype in test_ptx.py."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest

# Test function → its cases, and the one of them that `--short` keeps.
CASES = pytest.StashKey[dict[str, tuple[list[pytest.Item], list[pytest.Item]]]]()

_ALONE = re.compile(r"pytest\.mark\.alone|^pytestmark = distributed$", re.MULTILINE)
_DTYPE = re.compile(r"\b(fp32|bf16|fp16)\b")


def names_alone(file: Path) -> bool:
    """Whether a file of tests gives one the mark `alone`, itself or with `distributed` of rank_pool.py."""
    return _ALONE.search(file.read_text()) is not None


def out_of_turn(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """The cases that wait without `--every-dtype`: of cases for the interpreter that differ in the dtype alone, one runs."""
    alike: dict[str, list[pytest.Item]] = {}
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("place") == ("triton", "cpu"):
            alike.setdefault(_DTYPE.sub("", item.nodeid), []).append(item)
    return {case for name, cases in alike.items() for case in cases if case is not _one_of(name, cases)}


def _one_of(name: str, cases: list[pytest.Item]) -> pytest.Item:
    return cases[zlib.crc32(name.encode()) % len(cases)]


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
    return [_one_of(name, candidates)] if candidates else []
