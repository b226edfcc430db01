"""The rows of an archive as a source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from streamrec.errors import SourceError
from streamrec.events import DeadLetter, Event, Feedback, Impression, Item, Labeled, Position

__all__ = ["ArchivedRows"]


class ArchivedRows:
    """A source over one dataset of an archive, hour by hour, each hour in the order in which its rows came."""

    def __init__(
        self,
        dataset: str,
        hours: Mapping[int, Sequence[str]],
        table: Callable[[str], Any],
        decode: Callable[[bytes], Event],
        events: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        self._dataset = dataset
        self._hours = sorted(hours.items())
        self._table = table
        self._decode = decode
        self._events = events
        self._at = 0  # the hour
        self._row = 0  # in it
        self._items: list[Item] | None = None
        self._numbers: list[int] = []

    def read(self, limit: int) -> list[Item]:
        """The next rows, at most `limit`; none at the end."""
        found: list[Item] = []
        while len(found) < limit and self._at < len(self._hours):
            items = self._loaded()
            some = items[self._row : self._row + limit - len(found)]
            found += some
            self._row += len(some)
            if self._row >= len(items):
                self._at, self._row, self._items = self._at + 1, 0, None
        return found

    def position(self) -> Position:
        """The hour, and the number of the row before the next one in it, which stay when files are put together."""
        if self._at >= len(self._hours):
            return {"hour": None, "after": 0}
        self._loaded()
        return {"hour": self._hours[self._at][0], "after": self._numbers[self._row - 1] if self._row else 0}

    def seek(self, position: Position) -> None:
        """Go to a position of this or of a later reading of the same archive. Raises `SourceError`."""
        try:
            hour, after = position["hour"], int(position["after"])
        except (KeyError, TypeError, ValueError) as error:
            raise SourceError(f"not a position in an archive: {position!r}") from error
        self._items, self._row = None, 0
        if hour is None:
            self._at = len(self._hours)
            return
        self._at = next((n for n, (one, _) in enumerate(self._hours) if one >= hour), len(self._hours))
        if self._at < len(self._hours) and self._hours[self._at][0] == hour and after:
            self._loaded()
            self._row = int(np.searchsorted(self._numbers, after, side="right"))
            if self._row >= len(self._numbers):
                self._at, self._row, self._items = self._at + 1, 0, None

    def _loaded(self) -> list[Item]:
        if self._items is None:
            hour, names = self._hours[self._at]
            rows = sorted(
                (row for name in names for row in self._table(name).to_pylist()), key=lambda row: int(row["number"])
            )
            self._numbers = [row["number"] for row in rows]
            shown: dict[str, Impression] = {}
            if self._events is not None:
                for name in self._events.get(hour, ()):
                    for row in self._table(name).to_pylist():
                        if row["type"] == "impression":
                            shown.setdefault(row["id"], _event(row))
            self._items = [self._item(row, shown) for row in rows]
        return self._items

    def _item(self, row: Mapping[str, Any], shown: Mapping[str, Impression]) -> Item:
        if self._dataset == "events":
            item: Item = _event(row)
            return item
        if self._dataset == "dead":
            position = {**msgspec.json.decode(row["position"])}
            try:
                event: Event = self._decode(row["raw"])
                return event
            except Exception:  # broad on purpose: `decode` is the user's, and this one is as dead as it was
                return DeadLetter(position, row["reason"], row["raw"])
        impression = shown.get(row["impression_id"])
        if impression is None:
            return DeadLetter({"number": row["number"]}, "no impression: its event is not in the archive")
        return Labeled(impression, row["label"], row["kind"], row["weight"])


def _event(row: Mapping[str, Any]) -> Any:
    if row["type"] == "impression":
        features = msgspec.json.decode(row["features"]) if row["features"] else {}
        return Impression(row["id"], row["time"], row["user"], row["item"], features, row["score"])
    return Feedback(row["id"], row["impression_id"], row["time"], row["kind"], row["value"])
