"""Checkpoints: when one is due, the writing of it, and what a source need not keep any more."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from streamrec.errors import ConfigError, StoreError, UnreachableError
from streamrec.events import Position
from streamrec.protocols import Source
from streamrec.storage import Archive, Store, Version
from streamrec.trainers._outage import Outage
from streamrec.trainers._saver import Cut, Saver

__all__ = ["Checkpoints"]


class Checkpoints:
    """Writes what an `OnlineTrainer` cuts, at once or behind the stream, and knows how long ago that was on `clock`.

    What is written is a version and a checkpoint, and the `archive`'s rows until then. `patience`: seconds on `clock`
    for which the store may be away.
    """

    def __init__(
        self,
        store: Store | None,
        archive: Archive | None,
        saver: Saver,
        clock: Callable[[], float],
        patience: float,
    ) -> None:
        self._store, self._archive, self._saver, self._clock = store, archive, saver, clock
        self.events = 0
        """How many events the last one knows; 0 where it is not on disk."""
        self.outage = Outage(patience, clock)
        self._begun = 0  # how many events had come when the last one was begun
        self._time = clock()
        self._whole = True  # the last one is on disk
        self._number: int | None = None  # of the newest that is
        self._source: Source | None = None  # of the positions below
        self._behind: Position | None = None  # of the checkpoint that is being written
        self._saved: deque[tuple[int, Version]] = deque(maxlen=100)  # on disk since they were asked for
        self._durable: deque[Position] = deque(maxlen=1 if store is None else store.keep)  # the newest last

    def require_store(self) -> Store:
        """The store. Raises `ConfigError` where there is none."""
        if self._store is None:
            raise ConfigError('this trainer keeps nothing: give it a store, such as store="runs/ctr"')
        return self._store

    def due(self, events: int, every: int, seconds: float) -> bool:
        """Whether the next one is, after so many events in all: `every` of them or `seconds` after the last."""
        if self._store is None:
            return False
        return self.outage.due(events - self._begun >= every or self._clock() - self._time >= seconds)

    def count_from(self, events: int) -> None:
        """The last one was cut now, after so many events."""
        self.events = self._begun = events
        self._time = self._clock()

    def resumed(self, version: Version) -> None:
        """The trainer has become this one."""
        self._number, self._whole = version.number, True

    def bear(self, error: StoreError, events: int) -> None:
        """One has failed: the next is due as if this one had not, so many events having come. Raises `error` where it
        is not to be borne, or no longer."""
        self.outage.bear(error)
        self._begun = events
        self._time = self._clock()

    def begin(self) -> bool:
        """Before one is cut. Whether the one before it is on disk. Raises `StoreError` where the store is away."""
        self._require_known(self.require_store())
        whole, self._whole = self._whole, False
        return whole

    def _require_known(self, store: Store) -> None:
        """A folder that is empty all at once is another one: what is written there is found by nobody later."""
        if self._number is not None and not store.checkpoints.has(self._number):
            raise UnreachableError(
                f"{store.uri} lacks checkpoint {self._number}, which was written there: is what it is on still mounted?"
            )

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(self, cuts: tuple[Cut, Cut], position: Position | None, events: int) -> Version:
        """Write what was cut, and wait for it. Raises `StoreError`."""
        version = self._write(self.require_store(), *cuts, events)
        self.count_from(events)
        self._note_written()
        if position is not None:
            self._durable.append(position)
        return version

    def write_behind(self, cuts: tuple[Cut, Cut], position: Position, events: int) -> None:
        """Have it written while the stream goes on."""
        store = self.require_store()
        self.count_from(events)
        self._behind = position
        self._saver.start(lambda: self._write(store, *cuts, events))

    def taken(self) -> list[tuple[int, Version]]:
        """The checkpoints that have come to be on disk since this was asked last, and how many events they know."""
        found = []
        while self._saved:
            found.append(self._saved.popleft())
        return found

    def _write(self, store: Store, published: Cut, checkpoint: Cut, events: int) -> Version:
        """Write both, and then make the stored ones shorter where there are too many changes."""
        self._require_known(store)
        # published first: a process killed between the two cuts this checkpoint again, and publishes again
        if self._archive is not None:
            self._archive.write()
        number = self._saver.write(store.versions, published).number
        version = self._saver.write(store.checkpoints, checkpoint._replace(info={**checkpoint.info, "version": number}))
        self._number = version.number
        if self._archive is not None:
            oldest = min(int(one.info.get("archive", 0)) for one in store.checkpoints.list())
            self._archive.commit(int(checkpoint.info["archive"]), oldest)
        self._saver.compact(store.versions, published=True)
        self._saver.compact(store.checkpoints, published=False)
        self._saved.append((events, version))
        return version

    @property
    def busy(self) -> bool:
        """Whether one is being written. Raises what went wrong with the last one."""
        try:
            busy = self._saver.busy
        except BaseException:
            self._lose()
            raise
        if not busy:
            self._note_durable()
        return busy

    def finish(self) -> None:
        """Wait for the one that is being written. Raises what went wrong with it."""
        try:
            self._saver.finish()
        except BaseException:
            self._lose()
            raise
        self._note_durable()

    def _lose(self) -> None:
        self.events, self._begun, self._behind = 0, 0, None  # nothing is known to be saved

    def _note_durable(self) -> None:
        if self._behind is not None:
            self._durable.append(self._behind)
            self._behind = None
            self._note_written()

    def _note_written(self) -> None:
        self._whole = True
        self.outage.end()

    # -- the source ----------------------------------------------------------------------------------------------------

    def follow(self, source: Source) -> None:
        """Positions are of this source from now on."""
        if source is not self._source:
            self._source = source
            self._durable.clear()

    def release(self) -> None:
        """Tell the source what it need not keep: what lies before the oldest of as many checkpoints as the store
        keeps."""
        source: Any = self._source
        if len(self._durable) == self._durable.maxlen and hasattr(source, "release"):
            source.release(self._durable[0])
