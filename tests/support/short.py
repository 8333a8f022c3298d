"""Which cases `--short` keeps (`make test`), and `--rest` leaves out. A test function is a promise: one case of each stays.
Which one it is follows from the function's name, so that backends, dtypes and layouts take turns over the functions. A case
that is marked `wide` is never the one."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import pytest

# Test function → its cases, and the one of them that `--short` keeps.
CASES = pytest.StashKey[dict[str, tuple[list[pytest.Item], list[pytest.Item]]]]()


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
