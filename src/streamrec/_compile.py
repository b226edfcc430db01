"""Numba's `njit`, typed, cached on disk where there is a place to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

__all__ = ["compiled"]

F = TypeVar("F", bound=Callable[..., Any])


def compiled(*, fastmath: set[str] | bool = False, inline: bool = False) -> Callable[[F], F]:
    """Compile a function on its first call, without the GIL.

    The result is cached on disk; where no cache directory can be written, it is compiled once a process.
    `inline` is for small functions called from other compiled ones.
    """

    def wrap(function: F) -> F:
        options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
        if inline:
            options["inline"] = "always"
        try:
            return cast(F, numba.njit(cache=True, **options)(function))
        except RuntimeError:  # numba's way to say that no cache directory is writable
            return cast(F, numba.njit(**options)(function))

    return wrap
