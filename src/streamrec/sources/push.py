"""Push: events that a service hands in, from threads or asyncio."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from streamrec.errors import ConfigError, FullError, SourceError
from streamrec.events import DeadLetter, Event, Feedback, Impression, Item, Labeled, Position
from streamrec.sources._closing import Closing
from streamrec.sources._lines import letter
from streamrec.sources._segments import Segments
from streamrec.sources._waiting import Waiting

__all__ = ["Push"]

_KINDS = {Impression, Feedback, Labeled}
_POLICIES = ("wait", "refuse", "drop_oldest")


class Push(Closing):
    """A source of events that a service hands in with `put`, or `await aput`, from as many threads and tasks as it has.

    At most `capacity` events wait to be read. `full`: what happens to a batch for which there is no room. `"wait"`: it
    waits, for `timeout` seconds at most; `"refuse"`: a `FullError` at once, which is a 503 or a 429 over HTTP;
    `"drop_oldest"`: as many of the oldest are dropped, counted, and a dead letter of category "dropped" stands in their
    place. A batch is accepted whole or not at all. `counts` says how many were accepted, dropped and refused.

    `log`: a folder in which every event is written down before `put` returns, and read from there: what was accepted
    outlives a SIGKILL, and the source goes on at any position. `sync`: it outlives the machine, too; each batch then
    waits for the disk. Files of about `segment` bytes are removed when checkpoints no longer need them. One process at
    a time may write to a log. An event comes out of it as its default JSON form says it.

    Without a `log`, what waits is lost with the process, at most `capacity` events; a position is only a count then,
    and a new source goes on counting there. What was handed in must be handed in again by whoever has not heard that it
    was learned.

    A `read` waits until there is something; it ends, with an empty list, when `close` was called and all is read, after
    `idle` seconds without an event (None: never), or when SIGTERM or SIGINT comes (in the main thread).

    >>> clicks = Push(capacity=1_000)
    >>> clicks.put([Feedback("f1", "i1", 1.0), Feedback("f2", "i1", 2.0)])
    >>> clicks.close()
    >>> len(clicks.read(10)), clicks.position(), clicks.read(10)
    (2, {'index': 2}, [])
    """

    # what __del__ needs, also where __init__ raised
    _log: Segments | None = None

    def __init__(
        self,
        *,
        capacity: int = 100_000,
        full: str = "wait",
        log: str | os.PathLike[str] | None = None,
        sync: bool = False,
        segment: int = 64 << 20,
        idle: float | None = None,
    ) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity must be >= 1 event, got {capacity!r}")
        if full not in _POLICIES:
            raise ConfigError(f"full must be one of {', '.join(map(repr, _POLICIES))}, got {full!r}")
        if segment < 1:
            raise ConfigError(f"segment must be >= 1 byte, got {segment!r}")
        if sync and log is None:
            raise ConfigError("sync=True is for a log: say where it is, log=...")
        self.capacity = capacity
        self.full = full
        self._waiting = Waiting(idle=idle, every=3600.0)
        self._room = threading.Condition()  # its lock holds for all below
        self._sleepers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._sync = sync
        self._ended = False
        self._queue: deque[Event] = deque()
        self._index = 0  # of the next unread event, without a log
        self._skip = 0  # events to be dropped that have not been passed yet
        self._counts = {"accepted": 0, "dropped": 0, "refused": 0}
        self._log = None if log is None else Segments(os.fspath(log), size=segment, sync=sync)

    def __repr__(self) -> str:
        return f"Push(capacity={self.capacity}, full={self.full!r})"

    def __len__(self) -> int:
        """How many events wait to be read."""
        with self._room:
            return self._held()

    def __del__(self) -> None:
        if self._log is not None:
            self._log.close()

    def close(self) -> None:
        """Accept no more: a `put` raises `SourceError`, also one that waits. What was accepted can still be read."""
        with self._room:
            self._ended = True
            if self._log is not None:
                self._log.stop_writing()
            self._wake()
        self._waiting.ring()

    @property
    def counts(self) -> Mapping[str, int]:
        """How many events were accepted, dropped and refused, by this object."""
        with self._room:
            return dict(self._counts)

    # -- handing in ----------------------------------------------------------------------------------------------------

    def put(self, events: Event | Sequence[Event], timeout: float | None = None) -> None:
        """Hand in one event or a batch; when it returns, they are accepted.

        Raises `FullError` where there is no room, after `timeout` seconds of waiting (None: for ever) where `full` is
        `"wait"`; `SourceError` where the source is closed or the log cannot be written; `ConfigError` where one is no
        event, cannot be written as JSON in the log, or there are more than `capacity`. Nothing was accepted then.
        """
        batch = self._batch(events)
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._room:
            while not self._accept(batch):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise self._refusal(batch)
                self._room.wait(left)
        self._waiting.ring()

    async def aput(self, events: Event | Sequence[Event], timeout: float | None = None) -> None:
        """As `put`, for asyncio: the loop goes on while it waits."""
        if self._sync:
            await asyncio.to_thread(self.put, events, timeout)  # the disk may take its time
            return
        batch = self._batch(events)
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while True:
            with self._room:
                if self._accept(batch):
                    break
                sleeper = loop.create_future()
                self._sleepers.append((loop, sleeper))
            try:
                await asyncio.wait_for(sleeper, None if deadline is None else max(0.0, deadline - loop.time()))
            except asyncio.TimeoutError:
                with self._room:
                    raise self._refusal(batch) from None
            finally:
                with self._room:
                    self._sleepers = [one for one in self._sleepers if one[1] is not sleeper]
        self._waiting.ring()

    def _batch(self, events: Event | Sequence[Event]) -> Sequence[Event]:
        batch: Sequence[Any] = [events] if type(events) in _KINDS else list(events)  # type: ignore[arg-type]
        if not _KINDS.issuperset(map(type, batch)):
            odd = next(one for one in batch if type(one) not in _KINDS)
            raise ConfigError(
                f"an Impression, a Feedback or a Labeled is handed in, got a {type(odd).__name__}: {odd!r:.80}"
            )
        if len(batch) > self.capacity:
            raise ConfigError(f"{len(batch)} events at once are more than capacity = {self.capacity}: hand in fewer")
        return batch

    def _accept(self, batch: Sequence[Event]) -> bool:
        """Take them in; False where that has to wait."""
        if self._ended:
            raise SourceError("events are handed in to a source that is closed")
        over = self._held() + len(batch) - self.capacity
        if over > 0:
            if self.full == "refuse":
                raise self._refusal(batch)
            if self.full == "wait":
                return False
        if self._log is None:
            self._queue.extend(batch)
        elif batch:
            try:
                self._log.append(batch)
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigError(f"an event cannot be written as JSON: {error}; nothing was accepted") from error
        self._counts["accepted"] += len(batch)
        if over > 0:
            self._counts["dropped"] += over
            self._skip += over
            if self._log is None:
                for _ in range(over):
                    self._queue.popleft()
        return True

    def _refusal(self, batch: Sequence[Event]) -> FullError:
        self._counts["refused"] += len(batch)
        return FullError(
            f"{self._held()} events wait to be read, there is no room for {len(batch)} more of capacity = "
            f"{self.capacity}: try again later"
        )

    def _held(self) -> int:
        if self._log is None:
            return len(self._queue)
        return self._log.accepted - self._log.index - self._skip

    def _wake(self) -> None:
        self._room.notify_all()
        for loop, sleeper in self._sleepers:
            loop.call_soon_threadsafe(_done, sleeper)
        self._sleepers.clear()

    # -- a source ------------------------------------------------------------------------------------------------------

    def wait(self, seconds: float) -> bool:
        """Wait until the next `read` returns at once; False where that has not come in so many seconds."""
        return self._waiting.until(self._ready, seconds)

    def read(self, limit: int) -> list[Item]:
        """The next events, at most `limit`; waits until there are some. An empty list when it is closed and all is
        read, after `idle` seconds, or at a signal."""
        if limit < 1:
            raise ConfigError(f"limit must be >= 1, got {limit!r}")
        if not self._waiting.for_read(self._ready):
            return []
        with self._room:
            items = self._take(limit)
            if items:
                self._wake()
        return items

    def _take(self, limit: int) -> list[Item]:
        items: list[Item] = []
        if self._log is not None and self._log.lost is not None:
            items.append(self._log.lost)
            self._log.lost = None
        if self._skip and len(items) < limit:
            items.append(self._dropped())
        left = limit - len(items)
        if self._log is None:
            count = min(left, len(self._queue))
            items += [self._queue.popleft() for _ in range(count)]
            self._index += count
            return items
        if self._ended and not self._held():
            self._log.close()
            return items
        read = self._log.read(left)
        return [*items, *read] if items else read

    def _dropped(self) -> DeadLetter:
        """Pass over what has been dropped; the letter says how many that are."""
        skipped, self._skip = self._skip, 0
        first = self._index if self._log is None else self._log.index
        if self._log is None:
            self._index += skipped
        else:
            left = skipped
            while left and (passed := self._log.read(min(left, 10_000))):
                left -= len(passed)
        reason = f"dropped: {skipped} events, from number {first} on, for which the queue had no room"
        return letter({"index": first}, reason)

    def position(self) -> Position:
        """`{"index": n}`: n events were read or dropped; of a log, also where the next one stands in it."""
        with self._room:
            return {"index": self._index} if self._log is None else self._log.position()

    def seek(self, position: Position) -> None:
        """Go to a position. Without a log a source that has given nothing yet can only begin to count there.

        Raises `SourceError` where that cannot be. Where a log begins behind it, a dead letter of category "gap" says
        what is gone.
        """
        with self._room:
            if self._log is not None:
                self._log.seek(position)
                return
            index = position.get("index")
            if type(index) is not int or index < 0:
                raise SourceError(f"no position {dict(position)!r}: seek to what position() gave")
            if self._index not in (0, index):
                raise SourceError(
                    f"without a log there is no way from event {self._index} to event {index}: what was read is gone. "
                    "Push(log=...) keeps it"
                )
            self._index = index

    def release(self, position: Position) -> None:
        """Remove the files of the log that end before a position: nobody will seek to where they are any more.

        What is handed in from now on goes to another file, so that all that was read goes with a later release.
        """
        with self._room:
            if self._log is not None:
                self._log.release(position)

    def _ready(self) -> bool:
        with self._room:
            lost = self._log is not None and self._log.lost is not None
            return self._ended or self._held() > 0 or self._skip > 0 or lost


def _done(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)
