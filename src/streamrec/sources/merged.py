"""Merged: several sources as one, in event time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamrec.errors import ConfigError, SourceError
from streamrec.events import DeadLetter, Decoded, Item, Labeled, Position
from streamrec.protocols import Source
from streamrec.sources._closing import Closing
from streamrec.sources._lines import Taken
from streamrec.sources._waiting import Waiting

__all__ = ["Merged"]

_LOOK = 0.02  # seconds between two looks at sources that have nothing
_AHEAD = 256  # items read ahead of each source


class Merged(Closing):
    """Several sources as one, in event time, resumable at every event.

    `sources`: by name. Of each, the watermark is the newest event time it has given; the next event comes from the
    source whose next event, or watermark where that is later, is the earliest, of equal ones from the first. So the
    order within a source stays, and an event that is late in its own source is not held up by the others. A dead letter
    comes at the watermark of its source.

    **A source that has nothing now**, and has `wait` to tell so, holds the others up for `stall` seconds of `clock`;
    then it is idle, and they go on without it until it has something. What it gives then comes at once, late as it may
    be: give the trainer's `LabelJoin` a `lateness`. Nobody waits for it with what is older than its watermark. A source
    without `wait` whose `read` waits holds everything up.

    The order depends on nothing but what the sources give, as long as none is idle: not on limits, speed or restarts.
    Where one was idle it depends on when that was. A position holds those of the sources; each must give after a `seek`
    what it would have given, as `check_source` demands. Of one that cannot, which says so by `repeatable = False`, as
    `Kafka` of several partitions does, one item is read at a time. At most 256 items of each are read ahead.

    >>> from streamrec import Feedback, Memory
    >>> clicks = Memory([Feedback("c1", "i1", 1.0), Feedback("c2", "i2", 5.0)])
    >>> buys = Memory([Feedback("b1", "i1", 3.0)])
    >>> [event.id for event in Merged({"clicks": clicks, "buys": buys}).read(10)]
    ['c1', 'b1', 'c2']
    """

    def __init__(
        self, sources: Mapping[str, Source], *, stall: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not sources:
            raise ConfigError("sources must be a mapping of name to source with one at least, got none")
        for name, source in sources.items():
            if not isinstance(name, str) or not isinstance(source, Source):
                raise ConfigError(f"sources must be a mapping of name to source, got {name!r}: {source!r:.80}")
        if not stall >= 0:
            raise ConfigError(f"stall must be >= 0 seconds, got {stall!r}")
        self._lanes = [_Lane(name, source) for name, source in sources.items()]
        self._stall = stall
        self._clock = clock
        self._waiting = Waiting(idle=None, every=_LOOK)

    def __repr__(self) -> str:
        return f"Merged({[lane.name for lane in self._lanes]!r})"

    def close(self) -> None:
        """Close those of the sources that can be closed. Ends a `read` that waits."""
        self._waiting.close()
        for lane in self._lanes:
            close = getattr(lane.source, "close", None)
            if close is not None:
                close()

    @property
    def watermarks(self) -> Mapping[str, float | None]:
        """Of each source, the newest event time it has given; None where it has given none."""
        return {lane.name: lane.watermark for lane in self._lanes}

    @property
    def idle(self) -> Sequence[str]:
        """The sources that the others do not wait for."""
        return [lane.name for lane in self._lanes if lane.idle]

    def fraction(self) -> float | None:
        """The mean of the shares of the sources read so far; None where one does not know."""
        shares: list[Any] = [getattr(lane.source, "fraction", lambda: None)() for lane in self._lanes]
        return None if None in shares else float(sum(shares)) / len(shares)

    def wait(self, seconds: float) -> bool:
        """Wait until the next `read` returns at once; False where that has not come in so many seconds."""
        return self._waiting.until(self._ready, seconds)

    def read(self, limit: int) -> list[Item]:
        """The next events, at most `limit`; an empty list where all sources gave one. Waits where a source waits."""
        if limit < 1:
            raise ConfigError(f"limit must be >= 1, got {limit!r}")
        if not self._waiting.for_read(self._ready):
            return []
        items = Taken()
        while len(items) < limit and (lane := self._next()) is not None:
            lane.take(items)
        if not items:
            for lane in self._lanes:
                lane.ended = False  # one that is followed may have more at the next read
        return items.given()

    def position(self) -> Position:
        """Of each source, by name: where the items read ahead begin, `at`, how many of them were given, `skip`, and its
        `watermark`."""
        return {lane.name: lane.position() for lane in self._lanes}

    def seek(self, position: Position) -> None:
        """Go to a position. A source that it does not name stays where it is: it is new.

        Raises `SourceError` where it is none, or names a source that is not here, and what the sources raise.
        """
        names = {lane.name for lane in self._lanes}
        for name, one in position.items():
            if name not in names:
                raise SourceError(f"the position names the source {name!r}, there are {', '.join(sorted(names))}")
            skip = one.get("skip") if isinstance(one, Mapping) else None
            if type(skip) is not int or skip < 0 or not isinstance(one.get("at"), Mapping):
                raise SourceError(f"no position {dict(position)!r}: seek to what position() gave")
        for lane in self._lanes:
            if lane.name in position:
                lane.seek(position[lane.name])
        self._waiting.open()

    def release(self, position: Position) -> None:
        """Tell the sources that keep events what they need not keep."""
        for lane in self._lanes:
            release = getattr(lane.source, "release", None)
            if release is not None and lane.name in position:
                release(position[lane.name]["at"])

    def _ready(self) -> bool:
        return self._next() is not None or all(lane.ended for lane in self._lanes)

    def _next(self) -> _Lane | None:
        """The source that has the next item; None where there is none yet, or one has to be waited for."""
        best: tuple[float, int, _Lane] | None = None
        awaited: list[tuple[float, int]] = []  # before these, nothing more can come
        now = self._clock()
        for number, lane in enumerate(self._lanes):
            if lane.fill(now):
                if best is None or lane.key < best[0]:
                    best = lane.key, number, lane
            elif not lane.ended:
                lane.idle |= now - lane.since >= self._stall
                if not lane.idle:
                    awaited.append((float("-inf") if lane.watermark is None else lane.watermark, number))
        if best is None or any(best[:2] > one for one in awaited):
            return None
        return best[2]


class _Lane:
    """One of the sources: what was read ahead of it, and by what it is placed among the others."""

    def __init__(self, name: str, source: Source) -> None:
        self.name = name
        self.source = source
        self.watermark: float | None = None
        self.key = float("-inf")  # by what the next item is placed
        self.idle = False
        self.ended = False
        self.since = 0.0  # when it began to have nothing
        self._short = False
        self._ahead: list[Item] = []
        self._next = 0
        self._at: Position | None = None  # where what was read ahead begins
        self._after: Position | None = None  # and where it ends
        self._skip = 0

    def fill(self, now: float) -> bool:
        """Whether there is an item; reads ahead where that does not have to wait."""
        if self._next < len(self._ahead):
            return True
        if self.ended:
            return False
        wait = getattr(self.source, "wait", None)
        if wait is not None and not wait(0.0):
            if not self._short:
                self._short, self.since = True, now
            return False
        self._short, self.idle = False, False
        at = self.source.position()
        limit = _AHEAD if getattr(self.source, "repeatable", True) else 1
        items = self.source.read(limit)
        self._at, self._ahead, self._next = at, items, 0
        if not items:
            self.ended = True
            return False
        self._place()
        return True

    def take(self, items: Taken) -> None:
        """Add the next item, which there is."""
        item = self._ahead[self._next]
        items.append(item)
        items.sound &= type(self._ahead) is Decoded
        lines = getattr(self._ahead, "lines", None)
        if lines is not None:
            items.lines.append(lines[self._next])
        self._next += 1
        if not isinstance(item, DeadLetter):
            self.watermark = self.key
        if self._next < len(self._ahead):
            self._place()

    def _place(self) -> None:
        item: Any = self._ahead[self._next]
        before = float("-inf") if self.watermark is None else self.watermark
        if isinstance(item, DeadLetter):
            self.key = before
        else:
            told = item.impression.time if isinstance(item, Labeled) else item.time
            self.key = told if told > before else before  # a nan is not later

    def position(self) -> Position:
        if self._at is None or self._next == len(self._ahead):
            return {"at": dict(self.source.position()), "skip": 0, "watermark": self.watermark}
        return {"at": dict(self._at), "skip": self._next, "watermark": self.watermark}

    def seek(self, position: Mapping[str, Any]) -> None:
        self.source.seek(position["at"])
        self._ahead, self._next, self._at = [], 0, None
        self.ended = self.idle = self._short = False
        left = position["skip"]
        while left:
            passed = self.source.read(left)
            if not passed:
                raise SourceError(
                    f"the source {self.name!r} gave fewer items than before: it has lost some, or is another"
                )
            left -= len(passed)
        self.watermark = position["watermark"]
        self.key = float("-inf") if self.watermark is None else self.watermark
