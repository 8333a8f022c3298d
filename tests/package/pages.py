"""Helpers that the tests of README.md and of the contributors' files share."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def address() -> str:
    """The repository's address on GitHub, `owner/name`, of which pyproject.toml has the one original."""
    return re.search(r'^Repository = "https://github\.com/([^"]+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def targets_that_it_names(page: str) -> set[str]:
    """In code: `make TARGET` between backquotes or at the start of a line."""
    return set(re.findall(r"(?:`|^)make ([a-z-]+)", page, re.M))


def files_that_it_links(page: str) -> list[str]:
    return re.findall(r"\]\(([\w.][^)#:]*)(?:#[^)]*)?\)", page)
