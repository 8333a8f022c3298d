"""Replacing functions of another library by ours, and putting the library's own back."""

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

logger: logging.Logger = logging.getLogger("kto_kernels")

Replaced = tuple[Any, str, Any]  # the module or class, its attribute, what it held before


class Patch(AbstractContextManager["Patch"]):
    """The replacements of one call of a `patch_*` function. `repr(patch)` and `patch.replaced` name their places, and
    each is logged. As a context manager the patch ends with the block, which restores the state that the call found;
    otherwise it stays until the matching `unpatch_*`.

    Args:
        log: the replacements of all calls that are still in place.
    """

    def __init__(self, log: list[Replaced]):
        self._log = log  # the replacements of all calls that are still in place
        self._mine: list[Replaced] = []

    def replace(self, owner: Any, name: str, ours: Any) -> None:
        """Puts `ours` in place of an attribute, and remembers its value.

        Args:
            owner: the module or class that has the attribute.
            name: the name of the attribute.
            ours: the new value. Where the attribute has it already, nothing is done.
        """
        held = vars(owner)[name]  # getattr would unwrap a static method
        if held is not ours:
            setattr(owner, name, ours)
            self._mine.append((owner, name, held))
            self._log.append(self._mine[-1])
            logger.info("%s is ours now", self.replaced[-1])

    @property
    def replaced(self) -> tuple[str, ...]:
        """The full names of what this call replaced, without what an earlier call had replaced already."""
        return tuple(".".join((*_path(owner), name)) for owner, name, _ in self._mine)

    def __repr__(self) -> str:
        return f"Patch({', '.join(self.replaced) or 'nothing that was not ours already'})"

    def __exit__(self, *_: object) -> None:
        undo(self._log, self._mine)


def _path(owner: Any) -> tuple[str, ...]:
    return (owner.__name__,) if isinstance(owner, ModuleType) else (owner.__module__, owner.__qualname__)


def undo(log: list[Replaced], entries: list[Replaced] | None = None) -> None:
    """Puts back what was replaced, the last replaced first.

    Args:
        log: the replacements that are in place; what is put back is removed from it.
        entries: the entries of the log to put back. None: all of them.
    """
    for entry in reversed(list(log if entries is None else entries)):
        if entry in log:
            setattr(*entry)
            log.remove(entry)


def original(log: list[Replaced], owner: Any, name: str, caller: str) -> Any:
    """The attribute's value, or the value that it had before it was replaced.

    Args:
        log: the replacements that are in place.
        owner: the module or class that has the attribute.
        name: the name of the attribute.
        caller: who calls this function, for the message.

    Returns:
        The value.

    Raises:
        RuntimeError: there is no such attribute.
    """
    if name not in vars(owner):
        raise RuntimeError(f"{caller}: {owner.__name__} has no {name}; this version is not known")
    return next((held for o, n, held in log if o is owner and n == name), vars(owner)[name])


def holders(value: Any) -> Iterator[tuple[ModuleType, str]]:
    """Every imported module with an attribute that is `value` itself, and the attribute's name.

    Args:
        value: the value that is looked for.

    Yields:
        The module and the name of the attribute.
    """
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            yield from [(module, name) for name, held in list(vars(module).items()) if held is value]


def subclasses(cls: type) -> Iterator[type]:
    """Every class that inherits from `cls`, directly or not.

    Args:
        cls: the class.

    Yields:
        The subclass.
    """
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def load(module: str, caller: str, distribution: str) -> ModuleType:
    """Imports a module of another library.

    Args:
        module: the module's full name.
        caller: who calls this function, for the message.
        distribution: the name that the library is installed by.

    Returns:
        The module.

    Raises:
        ImportError: the library is not installed or has no such module; the message names module and library.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{caller}: needs {module} of {version(distribution)}: {error}") from error


def version(distribution: str) -> str:
    """The version of another library, for messages.

    Args:
        distribution: the name that the library is installed by.

    Returns:
        The name and the version, or that the library is not installed.
    """
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{distribution} (not installed)"


def check_call(theirs: Callable, ours: Callable, what: str, *, skip: int = 0) -> None:
    """Checks that every call of `theirs` means the same as a call of `ours`: the parameters of `theirs`, without the
    first `skip`, are the first parameters of `ours`, with the same defaults.

    Args:
        theirs: the other library's function.
        ours: the function that replaces it.
        what: the name of `theirs`, for the message.
        skip: how many of the first parameters of `theirs` do not count. 0: all count.

    Raises:
        RuntimeError: the parameters differ; the message shows both signatures.
    """
    known = [(p.name, p.default) for p in inspect.signature(ours).parameters.values()]
    found = [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()][skip:]
    if not found or found != known[: len(found)]:
        raise RuntimeError(
            f"{what}: unknown signature; expected {_shown(known)}, or its beginning; got {_shown(found)}"
        )


def _shown(parameters: list[tuple[str, Any]]) -> str:
    return f"({', '.join(n if d is inspect.Parameter.empty else f'{n}={d!r}' for n, d in parameters)})"
