"""Follower: a thread that keeps a scorer at the version that is to be served."""

from __future__ import annotations

import logging
from collections.abc import Callable

from streamrec.errors import ConfigError, StoreError
from streamrec.serving._beside import Beside
from streamrec.serving.scorer import Scorer, Status

__all__ = ["Follower"]

log = logging.getLogger(__name__)


class Follower(Beside):
    """Refreshes a scorer every `every` seconds, off the request path, from `start` until `close`; also a `with` block.

    `scorer`: a `Scorer`, or what makes one, such as `lambda: Scorer("runs/ctr")`: then it is made on the thread, and
    tried again until something is published, so that a service can start before its trainer. What makes it may also set
    the catalogue. A refresh that fails leaves the version that is served, is logged, shows in `status()`, and is tried
    again. `stale_after`: seconds without an answer of the store after which the service is `ready` no more; None: it
    is ready once there is a version, for an old one is better than none.

    >>> from streamrec import FM, Id, OnlineTrainer, Schema
    >>> trainer = OnlineTrainer(model=FM(Schema(Id("user"), Id("item"))), store="memory://follower-doctest")
    >>> _ = trainer.publish()
    >>> with Follower(Scorer("memory://follower-doctest"), every=0.5) as follower:
    ...     follower.ready, follower.scorer.version.number
    (True, 1)
    """

    def __init__(
        self, scorer: Scorer | Callable[[], Scorer], *, every: float = 1.0, stale_after: float | None = None
    ) -> None:
        if not every > 0:
            raise ConfigError(f"every must be > 0 seconds, got {every!r}")
        if stale_after is not None and not stale_after > every:
            raise ConfigError(f"stale_after must be longer than every={every!r} seconds, got {stale_after!r}")
        super().__init__("streamrec-follower")
        self.every = every
        self.stale_after = stale_after
        self._make = scorer
        self._scorer: Scorer | None = scorer if isinstance(scorer, Scorer) else None
        self._error: BaseException | None = None  # of making it

    @property
    def scorer(self) -> Scorer:
        """What answers requests. Raises `StoreError` where there is no version to serve yet."""
        if self._scorer is None:
            told = f": {self._error}" if self._error is not None else ""
            raise StoreError(f"there is no version to serve yet{told}; ask again when ready")
        return self._scorer

    @property
    def ready(self) -> bool:
        """Whether requests can be answered, and by a version that is fresh enough."""
        scorer = self._scorer
        return scorer is not None and (self.stale_after is None or scorer.status().looked <= self.stale_after)

    def status(self) -> Status | None:
        """That of the scorer; None where there is none yet."""
        return None if self._scorer is None else self._scorer.status()

    def _work(self) -> None:
        while not self._ended.is_set():
            try:
                if self._scorer is not None:
                    self._scorer.refresh()
                elif not isinstance(self._make, Scorer):
                    self._scorer = self._make()
            except Exception as error:  # also what the store's file system raises: the thread must outlive it
                if self._scorer is None:
                    self._error = error
                    log.warning("there is no version to serve yet: %s", error)
                else:
                    log.warning("the version that is served stays: %s", error)
            self._ended.wait(self.every)
