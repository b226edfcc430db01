"""Waiting for events that have not happened yet: without a busy loop, and never so that a process cannot end."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from streamrec.errors import ConfigError

__all__ = ["Waiting", "signalled"]

_SLICE = 0.1  # seconds after which a read that waits looks whether a signal has come


class Waiting:
    """How long a source waits: until there is something, until it is closed, or for `idle` seconds (None: for ever).

    It looks every `every` seconds, or when somebody rings.
    """

    def __init__(self, *, idle: float | None, every: float) -> None:
        if idle is not None and not idle >= 0:
            raise ConfigError(f"idle must be >= 0 seconds, or None to wait for ever, got {idle!r}")
        if not every > 0:
            raise ConfigError(f"poll must be > 0 seconds, got {every!r}")
        self.closed = False
        self._idle = idle
        self._every = every
        self._bell = threading.Event()
        self._since: float | None = None  # when the waiting began

    def ring(self) -> None:
        """Look now. From any thread."""
        self._bell.set()

    def close(self) -> None:
        """End all waiting, until `open`. From any thread."""
        self.closed = True
        self._bell.set()

    def open(self) -> None:
        """Wait again."""
        self.closed = False
        self._since = None

    def until(self, ready: Callable[[], bool], seconds: float) -> bool:
        """Wait until a read would return at once, with something or because the waiting is over; False after
        `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            self._bell.clear()
            if self.closed or ready() or self._over():
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._bell.wait(min(left, self._every, self._left()))

    def for_read(self, ready: Callable[[], bool]) -> bool:
        """Wait for as long as it takes; whether there is something. A signal ends it too, in the main thread."""
        if not self.until(ready, 0.0):
            with signalled() as stopped:
                while not self.until(ready, _SLICE):
                    if stopped():
                        return False
        self._since = None
        return not self.closed and ready()

    def _over(self) -> bool:
        if self._idle is None:
            return False
        if self._since is None:
            self._since = time.monotonic()
        return self._left() <= 0

    def _left(self) -> float:
        if self._idle is None or self._since is None:
            return self._every
        return max(0.0, self._since + self._idle - time.monotonic())


@contextmanager
def signalled() -> Iterator[Callable[[], bool]]:
    """Tells whether SIGTERM or SIGINT has come since. Outside the main thread, where Python hears none: never.

    The handlers run as they would have: this only listens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    heard: list[int] = []

    def look() -> bool:
        with suppress(BlockingIOError):
            heard.extend(ours.recv(4096))
        return signal.SIGTERM in heard or signal.SIGINT in heard

    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield look
    finally:
        signal.set_wakeup_fd(before)
        ours.close()
        theirs.close()
