"""Numba's `njit`, typed, cached on disk where there is a place to write."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import types

__all__ = ["compiled"]

F = TypeVar("F", bound=Callable[..., Any])


def compiled(*, inline: bool = False, made_of: tuple[int, ...] | None = None) -> Callable[[F], F]:
    """Compile a function on its first call, without the GIL.

    The result is cached on disk; where no cache directory can be written, it is compiled once a process.
    `inline` is for small functions called from other compiled ones. `made_of`: of a function that is defined in
    another, the numbers that make the difference between it and others of its name.
    """

    def wrap(function: F) -> F:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
        if inline:
            # by LLVM: numba's own inlining copies the source into every caller, and types and lowers it each time
            options["forceinline"] = True
        if made_of is not None:
            # symbols and files are named by it: what two processes have compiled must not be taken for each other
            function.__qualname__ += "".join(f"_{int(number)}" for number in made_of)
        known_by_name = made_of is not None or "<locals>" not in function.__qualname__
        try:
            made = numba.njit(cache=known_by_name, **options)(function)
            if made_of is not None:
                _give_key(made, made_of)
        except RuntimeError:  # numba's way to say that no cache directory is writable
            made = numba.njit(**options)(function)
        _forget_constants(made)
        return cast(F, made)

    return wrap


_plain: Callable[[Any], Any] = types.unliteral  # not typed where it comes from


def _forget_constants(dispatcher: Any) -> None:
    """Let callers that pass a constant share what is compiled for others of its type.

    Numba would compile the function once more for each constant, and for a variable's first value too, which is one as
    long as it is not known that it changes: the FM's loop twice, for seconds, since one caller begins at 0.
    """
    found = dispatcher.get_call_template

    def template(args: Any, kws: Any) -> Any:
        return found(tuple(map(_plain, args)), {name: _plain(kind) for name, kind in kws.items()})

    dispatcher.get_call_template = template


def _give_key(dispatcher: Any, made_of: tuple[int, ...]) -> None:
    """Let numba find the function again that another process has compiled.

    Its own key for a function defined in another is a hash of all that it refers to, other compiled functions among
    them, which are never the same in two processes: it would compile each time, for seconds, and fill the directory.
    """
    sources = _sources(Path(dispatcher.py_func.__code__.co_filename).parent)

    def key(signature: Any, codegen: Any) -> Any:
        return signature, codegen.magic_tuple(), (sources, made_of)

    dispatcher._cache._index_key = key


@cache
def _sources(folder: Path) -> str:
    """What changes when the code does that a function in this folder may be compiled from."""
    found = hashlib.sha256()
    for file in (*sorted(folder.glob("*.py")), *sorted(Path(__file__).parent.glob("_*.py"))):
        found.update(file.read_bytes())
    return found.hexdigest()
