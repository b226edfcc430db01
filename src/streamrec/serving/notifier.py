"""StoreNotifier: a scorer that hears of a new version, rather than looking for one."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from streamrec.errors import ConfigError, SourceError, StoreError
from streamrec.serving._beside import Beside
from streamrec.serving.scorer import Scorer
from streamrec.sources import Kafka

__all__ = ["StoreNotifier"]

log = logging.getLogger(__name__)


class StoreNotifier(Beside):
    """Refreshes `scorer` when a message comes on a Kafka topic, such as `train(..., notices=topic)` sends.

    What the message says is no matter: the store is asked for its newest version, so a message that is lost, doubled
    or late does no harm. It is asked every `every` seconds besides, and where there is no broker. A refresh that fails
    leaves the version that is served, is counted in `counts["failed"]`, logged, and tried again with the next.

    `topic`, `bootstrap_servers`, `client`: as in `streamrec.sources.Kafka`. Works on a thread of its own from `start`
    until `close`, also as a `with` block.
    """

    def __init__(
        self,
        scorer: Scorer,
        topic: str,
        bootstrap_servers: str | Sequence[str],
        *,
        every: float = 30.0,
        client: Mapping[str, Any] | None = None,
    ) -> None:
        if not every > 0:
            raise ConfigError(f"every must be > 0 seconds, got {every!r}")
        super().__init__("streamrec-notifier")
        self.scorer = scorer
        self._source = Kafka(
            topic, bootstrap_servers, follow=True, start="latest", idle=every, timeout=max(1.0, every), client=client
        )
        self._every = every
        self._counts: Counter[str] = Counter()
        self._ready = threading.Event()

    @property
    def counts(self) -> Mapping[str, int]:
        """How often so far: `notices` heard, versions `refreshed`, refreshes `failed`, brokers `unheard`."""
        return dict(self._counts)

    def start(self, wait: float | None = None) -> None:
        """Begin to listen. `wait`: at most so many seconds, until the broker has been found."""
        if self._thread is None:
            self._ready.clear()
        super().start()
        if wait is not None:
            self._ready.wait(wait)

    def _wake(self) -> None:
        self._source.close()  # again, where it was about to be opened

    def _work(self) -> None:
        while not self._ended.is_set():
            try:
                self._source.position()
                self._ready.set()
                # notices are no events, so they come as dead letters: that one came is all there is to know
                self._counts["notices"] += len(self._source.read(1000))
            except SourceError as error:
                self._counts["unheard"] += 1
                log.warning("no word of new versions, looking every %g s instead: %s", self._every, error)
                with suppress(Exception):
                    self._source.close()
                self._ended.wait(self._every)
            if self._ended.is_set():
                return
            try:
                self._counts["refreshed"] += self.scorer.refresh()
            except (StoreError, ConfigError) as error:
                self._counts["failed"] += 1
                log.warning("the version that is served stays: %s", error)
