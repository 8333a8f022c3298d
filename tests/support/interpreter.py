"""Triton's interpreter puts functions of its own in the place of Triton's language at each call of a function that a
kernel calls, where they are already, which takes it as long as all that it computes. Here it does so once a launch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from kto_kernels.backends.triton import launch


@contextlib.contextmanager
def patched_once_a_launch() -> Iterator[None]:
    if not launch.INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    @functools.cache
    def languages(function: Callable) -> frozenset[int]:
        """Which of the two modules with the language the function sees: the interpreter patches these."""
        return frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)

    def patch_once(function: Callable) -> Any:
        if languages(function) <= patched:
            return SimpleNamespace(restore=lambda: None)
        patched.update(languages(function))
        scope = patch(function)
        if scope is not None:  # older releases put nothing back
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    with mock.patch.object(interpreter, "_patch_lang", patch_once):
        yield
