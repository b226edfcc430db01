"""What an archive has taken and not written: strings one behind the other, numbers in arrays, and columns of them.

Events are taken apart when they come, while they are in the processor's cache, and not kept: a thousand kept events
make the stream decode the next into fresh memory. What is left is bytes, from which a thread makes Arrow columns
without Python's lock. Where the lines are known that events were read from, those are the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import compress, groupby
from operator import itemgetter
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamrec.events import DeadLetter, Event, Feedback, Impression
from streamrec.storage._archive_arrow import Reals, Strings, Words, arrow, between, strings_of
from streamrec.storage._archive_json import json_lines, sound
from streamrec.storage._archive_lines import NUMBERS, TEXTS, found_in

__all__ = ["DATASETS", "PLAIN", "DeadRows", "EventRows", "LabelRows", "Rows", "of_dataset"]

PLAIN = {Impression, Feedback}
_BLOCK = 1 << 20  # bytes of lines from which columns are made at once


@cache
def _schema(dataset: str) -> Any:
    pa = arrow()
    text, real, whole = pa.string(), pa.float64(), pa.int64()
    columns = {
        "events": [
            *(("type", text), ("id", text), ("time", real), ("user", text), ("item", text), ("features", text)),
            *(("score", real), ("impression_id", text), ("kind", text), ("value", real), ("number", whole)),
        ],
        "labels": [
            *(("impression_id", text), ("time", real), ("kind", text), ("label", pa.float32())),
            *(("weight", pa.float32()), ("score", pa.float32()), ("corrects", pa.bool_()), ("number", whole)),
        ],
        "dead": [("position", text), ("reason", text), ("raw", pa.binary()), ("number", whole)],
    }
    return pa.schema(columns[dataset])


class Rows(Protocol):
    """Rows of one dataset, numbered on from `first`."""

    dataset: str
    size: int
    """Bytes of text in them, about."""

    def __len__(self) -> int: ...

    def hours(self) -> NDArray[np.int64]:
        """int64 `(rows,)`: the hours since 1970 of their event time; dead letters have none, 0."""
        ...

    def table(self) -> Any:
        """Their columns."""
        ...


class Told:
    """Events that were taken apart: what is in them but for their times."""

    def __init__(self) -> None:
        self._shown = bytearray()  # of each, whether it is an impression
        self._ids, self._users, self._items, self._impressions = Strings(), Strings(), Strings(), Strings()
        self._features: list[bytes] = []
        self._kinds = Words()
        self._scores, self._values = Reals(), Reals()

    def add(self, events: Sequence[Impression | Feedback]) -> int:
        """Take these, behind those before; return how many bytes, about."""
        if not PLAIN.issuperset(map(type, events)):  # kinds of them have anything else beside
            events = [_plain_event(event) for event in events]
        is_shown = [type(event) is Impression for event in events]
        self._shown += bytes(is_shown)
        self._ids.add([event.id for event in events])
        shown: Any = [*compress(events, is_shown)]
        features = b""
        if shown:
            self._users.add([event.user for event in shown])
            self._items.add([event.item for event in shown])
            self._scores.add([event.score for event in shown])
            features = json_lines([event.features for event in shown])
            self._features.append(features)
        if len(shown) < len(events):
            told: Any = [event for event in events if type(event) is Feedback]
            self._impressions.add([event.impression_id for event in told])
            self._kinds.add([event.kind for event in told])
            self._values.add([event.value for event in told])
        return len(features)

    def columns(self) -> Iterator[dict[str, Any]]:
        """Arrow arrays."""
        shown = np.frombuffer(self._shown, dtype=np.bool_)
        told = ~shown
        yield {
            "type": _types(shown),
            "id": self._ids.column(),
            "user": self._users.column(shown),
            "item": self._items.column(shown),
            "features": between(b"".join(self._features), ord("\n"), shown),
            "score": self._scores.column(shown),
            "impression_id": self._impressions.column(told),
            "kind": self._kinds.column(told),
            "value": self._values.column(told),
        }


class Read:
    """The same in the lines that events were read from."""

    def __init__(self) -> None:
        self._parts: list[tuple[bytes, NDArray[np.int64]]] = []  # lines one behind the other, and their lengths

    def add(self, lines: Sequence[bytes]) -> int:
        """Take these, behind those before; return how many bytes."""
        whole = b"".join(lines)
        self._parts.append((whole, np.fromiter(map(len, lines), dtype=np.int64, count=len(lines))))
        return len(whole)

    def columns(self) -> Iterator[dict[str, Any]]:
        """Arrow arrays, of a block after the other."""
        pa = arrow()
        ends = np.cumsum([len(whole) for whole, _ in self._parts]) // _BLOCK
        for _, block in groupby(zip(ends.tolist(), self._parts, strict=True), key=itemgetter(0)):
            wholes, lengths = zip(*(part for _, part in block), strict=True)
            shown, texts, numbers = found_in(wholes, np.concatenate(lengths), json_lines)
            theirs = {"id": None, "impression_id": ~shown, "kind": ~shown}
            yield {
                "type": _types(shown),
                **{name: strings_of(*text, theirs.get(name, shown)) for name, text in zip(TEXTS, texts, strict=True)},
                **{name: pa.array(one, from_pandas=True) for name, one in zip(NUMBERS, numbers, strict=True)},
            }


def _types(shown: NDArray[np.bool_]) -> Any:
    pa = arrow()
    types = pa.DictionaryArray.from_arrays((~shown).astype(np.int32), ["impression", "feedback"])
    return types.cast(pa.string())


class EventRows:
    """Impressions and feedback."""

    dataset = "events"

    def __init__(self, first: int) -> None:
        self.size = 0
        self._first = first
        self._count = 0
        self._times: list[NDArray[np.float64]] = []
        self._parts: list[Told | Read] = []  # rows of the one behind those of the other

    def __len__(self) -> int:
        return self._count

    def add(self, events: Sequence[Impression | Feedback], lines: Sequence[bytes] | None = None) -> None:
        """Take these, in order. `lines`: what each was read from, in the default JSON form."""
        self._count += len(events)
        self._times.append(np.array([event.time for event in events], dtype=np.float64))
        self.size += self._behind(Told).add(events) if lines is None else self._behind(Read).add(lines)

    def _behind(self, kind: type[Any]) -> Any:
        if not self._parts or type(self._parts[-1]) is not kind:
            self._parts.append(kind())
        return self._parts[-1]

    def hours(self) -> NDArray[np.int64]:
        return _hours(self._times)

    def table(self) -> Any:
        pa = arrow()
        schema = _schema(self.dataset)
        blocks = [block for part in self._parts for block in part.columns()]
        columns = {
            name: pa.chunked_array([block[name].cast(schema.field(name).type) for block in blocks])
            for name in blocks[0]
        }
        columns["time"] = pa.chunked_array([np.concatenate(self._times)])
        columns["number"] = pa.chunked_array([np.arange(self._first, self._first + self._count)])
        return pa.table({name: columns[name] for name in schema.names}, schema=schema)


class LabelRows:
    """Labels."""

    dataset = "labels"

    def __init__(self, first: int) -> None:
        self.size = 0
        self._first = first
        self._count = 0
        self._times: list[NDArray[np.float64]] = []
        self._ids, self._kinds = Strings(), Words()
        self._numbers: list[tuple[NDArray[Any], ...]] = []

    def __len__(self) -> int:
        return self._count

    def add(
        self,
        ids: list[str | None],
        times: NDArray[np.float64],
        kinds: list[str] | str,
        labels: NDArray[np.float32],
        weights: NDArray[np.float32],
        scores: NDArray[Any],
        corrects: NDArray[np.bool_],
    ) -> None:
        """Take these, in order; None for an impression that is not known, nan for no score. `kinds`: or that of all."""
        self._count += len(ids)
        self._ids.add(ids)
        if isinstance(kinds, str):
            self._kinds.add_one(kinds, len(ids))
        else:
            self._kinds.add(kinds)
        self._times.append(times)
        self._numbers.append((labels, weights, scores, corrects))

    def hours(self) -> NDArray[np.int64]:
        return _hours(self._times)

    def table(self) -> Any:
        labels, weights, scores, corrects = map(np.concatenate, zip(*self._numbers, strict=True))
        columns = {
            "impression_id": self._ids.column(),
            "time": np.concatenate(self._times),
            "kind": self._kinds.column(),
            "label": labels,
            "weight": weights,
            "score": arrow().array(scores, from_pandas=True),
            "corrects": corrects,
            "number": np.arange(self._first, self._first + self._count),
        }
        return arrow().table(columns).cast(_schema(self.dataset))


class DeadRows:
    """Dead letters."""

    dataset = "dead"

    def __init__(self, first: int) -> None:
        self.size = 0
        self._first = first
        self._letters: list[tuple[str, str, bytes]] = []

    def __len__(self) -> int:
        return len(self._letters)

    def add(self, letter: DeadLetter, raw: bool) -> None:
        """Take one; without `raw`, without what quotes what came."""
        position = msgspec.json.encode(letter.position).decode()
        reason = sound(letter.reason)
        self._letters.append((position, reason, letter.raw) if raw else (position, reason.partition(":")[0], b""))
        self.size += sum(map(len, self._letters[-1]))

    def hours(self) -> NDArray[np.int64]:
        return np.zeros(len(self), dtype=np.int64)

    def table(self) -> Any:
        positions, reasons, raws = map(list, zip(*self._letters, strict=True))
        numbers = np.arange(self._first, self._first + len(self))
        columns = {"position": positions, "reason": reasons, "raw": raws, "number": numbers}
        return arrow().table(columns, schema=_schema(self.dataset))


_KINDS = {kind.dataset: kind for kind in (EventRows, LabelRows, DeadRows)}
DATASETS = tuple(_KINDS)


def of_dataset(dataset: str, first: int) -> Any:
    """No rows of a dataset yet; the first will have this number."""
    return _KINDS[dataset](first)


def _hours(times: list[NDArray[np.float64]]) -> NDArray[np.int64]:
    return (np.concatenate([np.empty(0), *times]) // 3600).astype(np.int64)


def _plain_event(event: Event) -> Impression | Feedback:
    if isinstance(event, Impression):
        return Impression(event.id, event.time, event.user, event.item, event.features, event.score)
    told: Any = event
    return Feedback(told.id, told.impression_id, told.time, told.kind, told.value)
