"""Putting our functions in the place of another library's, and taking them back."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

logger = logging.getLogger("kto_kernels")

Replaced = tuple[Any, str, Any]  # the module or class, its attribute, what it held before


class Patch(AbstractContextManager):
    """What one call of a `patch_*` function replaced: its `repr` and `replaced` name the places, and each is logged. As a
    context manager it ends with the state that the call found; otherwise the replacement stays until the matching
    `unpatch_*`."""

    def __init__(self, log: list[Replaced]):
        self._log = log  # of all calls that still hold
        self._mine: list[Replaced] = []

    def replace(self, owner: Any, name: str, ours: Any) -> None:
        held = vars(owner)[name]  # not getattr: a static method stays one
        if held is not ours:
            setattr(owner, name, ours)
            self._mine.append((owner, name, held))
            self._log.append(self._mine[-1])
            logger.info("%s is ours now", self.replaced[-1])

    @property
    def replaced(self) -> tuple[str, ...]:
        """The full names of what this call replaced; none where an earlier call had done it."""
        return tuple(".".join((*_path(owner), name)) for owner, name, _ in self._mine)

    def __repr__(self) -> str:
        return f"Patch({', '.join(self.replaced) or 'nothing that was not ours already'})"

    def __exit__(self, *_) -> None:
        undo(self._log, self._mine)


def _path(owner: Any) -> tuple[str, ...]:
    return (owner.__name__,) if isinstance(owner, ModuleType) else (owner.__module__, owner.__qualname__)


def undo(log: list[Replaced], entries: list[Replaced] | None = None) -> None:
    """Puts back `entries` of the log (all of them by default), the last replaced first."""
    for entry in reversed(list(log if entries is None else entries)):
        if entry in log:
            setattr(*entry)
            log.remove(entry)


def original(log: list[Replaced], owner: Any, name: str, caller: str) -> Any:
    """What the attribute holds, or held before it was replaced.

    Raises:
        RuntimeError: there is no such attribute.
    """
    if name not in vars(owner):
        raise RuntimeError(f"{caller}: {owner.__name__} has no {name}; this version is not known")
    return next((held for o, n, held in log if o is owner and n == name), vars(owner)[name])


def holders(value: Any) -> Iterator[tuple[ModuleType, str]]:
    """Every imported module that holds the very object, under whichever name."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            yield from [(module, name) for name, held in list(vars(module).items()) if held is value]


def subclasses(cls: type) -> Iterator[type]:
    """Every class that inherits from the class, directly or not."""
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def load(module: str, caller: str, distribution: str) -> ModuleType:
    """The module of another library.

    Raises:
        ImportError: the library is not installed, or has no such module; the message names both.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{caller}: needs {module} of {version(distribution)}: {error}") from error


def version(distribution: str) -> str:
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{distribution} (not installed)"


def check_call(theirs: Callable, ours: Callable, what: str, *, skip: int = 0) -> None:
    """Whatever calls theirs may call ours and means the same: their parameters, `skip` left out, are the first of ours,
    with the same defaults.

    Raises:
        RuntimeError: they are not; the message says what differs.
    """
    known = [(p.name, p.default) for p in inspect.signature(ours).parameters.values()]
    found = [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()][skip:]
    if not found or found != known[: len(found)]:
        raise RuntimeError(
            f"{what}: unknown signature; expected {_shown(known)}, or its beginning; got {_shown(found)}"
        )


def _shown(parameters: list[tuple[str, Any]]) -> str:
    return f"({', '.join(n if d is inspect.Parameter.empty else f'{n}={d!r}' for n, d in parameters)})"
