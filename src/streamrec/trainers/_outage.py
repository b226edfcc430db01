"""Outage: a store that cannot be written for now, how long that is borne, and when it is tried again."""

from __future__ import annotations

import logging
from collections.abc import Callable

from streamrec.errors import StoreError, UnreachableError

__all__ = ["Outage"]

log = logging.getLogger(__name__)

_AGAIN = 5.0  # seconds between two tries at least: each cuts and packs a whole model


class Outage:
    """Begins with a checkpoint that fails and ends with one that is written.

    `patience`: seconds on `clock` that one may last. `failed`: checkpoints that could not be written, of all outages.
    """

    def __init__(self, patience: float, clock: Callable[[], float]) -> None:
        self.patience, self._clock = patience, clock
        self.failed = 0
        self._since: float | None = None
        self._tried = 0.0

    def bear(self, error: StoreError) -> None:
        """Count a checkpoint that failed. Raises `error` where it does not pass by itself, or this has lasted too
        long."""
        self.failed += 1
        now = self._clock()
        since = now if self._since is None else self._since
        if not isinstance(error, UnreachableError) or now - since >= self.patience:
            self._since = None  # whoever goes on all the same has as much patience again
            raise error
        if self._since is None:
            self._since = now
            log.warning(
                "a checkpoint could not be written; what comes is learned, and it is tried again, for %g s: %s",
                self.patience,
                error,
            )
        self._tried = now

    def end(self) -> None:
        """A checkpoint was written."""
        if self._since is not None:
            log.warning("checkpoints are written again, after %g s", self._clock() - self._since)
            self._since = None

    def due(self, otherwise: bool) -> bool:
        """Whether one is to be tried now, where it is due `otherwise` or not: not soon after one that failed, and once
        more when the patience is over."""
        if self._since is None:
            return otherwise
        now = self._clock()
        return now - self._since >= self.patience or (otherwise and now - self._tried >= _AGAIN)
