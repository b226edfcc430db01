"""Beside: work on a thread of its own, from `start` until `close`, or in a `with` block."""

from __future__ import annotations

import threading
from types import TracebackType

from typing_extensions import Self

__all__ = ["Beside"]

_AGAIN = 0.2  # seconds between two tries to wake what is to end


class Beside:
    """What has begun goes on until `_ended` is set; it can begin again."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def _work(self) -> None:
        """Until `_ended` is set."""
        raise NotImplementedError

    def _wake(self) -> None:
        """Make what `_work` waits for end; called until it has ended."""

    def start(self) -> None:
        """Begin; what has begun goes on."""
        if self._thread is None:
            self._ended.clear()
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop, when what is under way has ended."""
        self._ended.set()
        thread, self._thread = self._thread, None
        while thread is not None and thread.is_alive():
            self._wake()
            thread.join(_AGAIN)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
