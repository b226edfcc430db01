"""Closing: what a source with a `close` method has with it."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType

from typing_extensions import Self

__all__ = ["ClosedAtItsEnd", "Closing"]


class Closing:
    """`with` closes it."""

    def close(self) -> None:
        """Let go of what it holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ClosedAtItsEnd(Closing):
    """And so does its end, also where `__init__` raised: for what nobody else can hold, a file or a connection."""

    def __del__(self) -> None:
        with suppress(Exception):  # at the interpreter's end there may be no thread left to ask
            self.close()
