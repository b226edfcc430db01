"""Numba's `njit`, typed, cached on disk where there is a place to write."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

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
            options["inline"] = "always"
        if made_of is not None:
            # symbols and files are named by it: what two processes have compiled must not be taken for each other
            function.__qualname__ += "".join(f"_{int(number)}" for number in made_of)
        try:
            made = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # numba's way to say that no cache directory is writable
            return cast(F, numba.njit(**options)(function))
        if made_of is not None:
            _give_key(made, made_of)
        return cast(F, made)

    return wrap


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
