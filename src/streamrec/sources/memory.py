"""Memory: events that are already there."""

from __future__ import annotations

from collections.abc import Iterable

from streamrec.errors import ConfigError, SourceError
from streamrec.events import Item, Position

__all__ = ["Memory"]


class Memory:
    """A source over events in memory. A position is `{"index": n}`: n items have been read.

    Keeps a list of its own of the items, so later changes of `events` change nothing.

    >>> from streamrec.events import Feedback
    >>> source = Memory([Feedback(id="f1", impression_id="i1", time=1.0)])
    >>> len(source.read(10)), source.position()
    (1, {'index': 1})
    """

    def __init__(self, events: Iterable[Item]) -> None:
        self._items = list(events)
        self._index = 0

    def __len__(self) -> int:
        return len(self._items)

    def read(self, limit: int) -> list[Item]:
        """The next items, at most `limit`; an empty list at the end."""
        if limit < 1:
            raise ConfigError(f"limit must be >= 1, got {limit!r}")
        items = self._items[self._index : self._index + limit]
        self._index += len(items)
        return items

    def position(self) -> Position:
        """`{"index": n}`: n items have been read."""
        return {"index": self._index}

    def seek(self, position: Position) -> None:
        """Go to a position. Raises `SourceError` if it is none, or behind the last item."""
        index = position.get("index")
        if type(index) is not int or not 0 <= index <= len(self._items):
            raise SourceError(
                f"no position {dict(position)!r} in {len(self._items)} events in memory: "
                "seek only to what position() of a source over the same events gave"
            )
        self._index = index

    def fraction(self) -> float | None:
        """The share of the items read so far, in [0, 1]; None where there are no items."""
        return self._index / len(self._items) if self._items else None
