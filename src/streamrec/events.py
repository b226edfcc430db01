"""What flows: impressions, the feedback on them, labelled examples, and what could not be read.

All are frozen. Python's garbage collector does not look at them, which would be for nothing: only features that hold
their own impression make a cycle. Times are POSIX seconds in UTC, float64: event time, never the clock of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any, Union

import msgspec

__all__ = [
    "DeadLetter",
    "Decoded",
    "Event",
    "Feedback",
    "Impression",
    "Item",
    "Labeled",
    "Placed",
    "Position",
    "decode_event",
    "decode_lines",
    "encode_event",
    "encode_lines",
    "lines_of",
    "piece_of",
    "place_of",
]

Position = Mapping[str, Any]
"""Where a source stands: what JSON can hold, so that it can be saved in a checkpoint."""


class Impression(msgspec.Struct, frozen=True, tag_field="type", tag="impression", gc=False):
    """An item shown to a user.

    `features`: what else was known at that moment, by name: strings, numbers, lists of strings, or
    mappings of string to weight. `score`: the click probability it was served with, if a service has
    scored it already; the metrics then judge that score.

    >>> Impression(id="i1", time=0.0, user="u1", item="p9").features
    {}
    """

    id: str
    time: float
    user: str
    item: str
    features: Mapping[str, Any] = {}
    score: float | None = None


class Feedback(msgspec.Struct, frozen=True, tag_field="type", tag="feedback", gc=False):
    """What a user did with an impression: a `"click"`, a later `"conversion"`, or a kind of your own."""

    id: str
    impression_id: str
    time: float
    kind: str = "click"
    value: float | None = None


class Labeled(msgspec.Struct, frozen=True, tag_field="type", tag="labeled", gc=False):
    """An impression whose label of one `kind` is known: 1.0 where the feedback came in time, 0.0 where not.

    `label` may be any probability in [0, 1]; `weight` scales the example's part in learning and metrics.
    """

    impression: Impression
    label: float
    kind: str = "click"
    weight: float = 1.0


class DeadLetter(msgspec.Struct, frozen=True, tag_field="type", tag="dead_letter"):
    """Something in the stream that could not be used: where it stood, why, and its bytes."""

    position: Position
    reason: str
    raw: bytes = b""


Event = Union[Impression, Feedback, Labeled]
Item = Union[Impression, Feedback, Labeled, DeadLetter]


class Placed(list[Item]):
    """Items that know where each one stood in its source: what a source's `read` may return instead of a plain list.

    `place(index)`: the position of the item with this index. What is refused later, because it cannot be used, is kept
    with it; without, by its number in the stream.

    >>> click = Feedback(id="f1", impression_id="i1", time=12.5)
    >>> place_of(Placed([click], place=lambda index: {"topic": "clicks", "offset": 40 + index}), 0)
    {'topic': 'clicks', 'offset': 40}
    """

    def __init__(self, items: Iterable[Item] = (), place: Callable[[int], Position] | None = None) -> None:
        super().__init__(items)
        self.place = place


def place_of(items: Sequence[Item], index: int) -> Position | None:
    """Where the item with this index stood in its source; None where the source has not said."""
    place = getattr(items, "place", None)
    return None if place is None else place(index)


def piece_of(items: Sequence[Item], begin: int, end: int) -> Sequence[Item]:
    """Those from `begin` to `end` (excluded), which know where they stood where these do."""
    if not isinstance(items, Placed):
        return items[begin:end]
    place = items.place
    there = None if place is None else lambda index: place(begin + index)
    if isinstance(items, Decoded):
        return type(items)(items[begin:end], there, None if items.lines is None else items.lines[begin:end])
    return type(items)(items[begin:end], there)


class Decoded(Placed):
    """Events of the default JSON form as msgspec has read them, no dead letter among them.

    So every field is of the very type declared, strings are valid Unicode, and numbers finite: `Validate` need not look
    again. `lines`: what each was read from, where that was JSON: an archive stores what was read, instead of making
    JSON of it again. Raises `ValueError` where there is not one for each.
    """

    def __init__(
        self,
        items: Iterable[Item] = (),
        place: Callable[[int], Position] | None = None,
        lines: Sequence[bytes] | None = None,
    ) -> None:
        super().__init__(items, place)
        if lines is not None and len(lines) != len(self):
            raise ValueError(f"there must be a line for each item, got {len(lines)} for {len(self)}")
        self.lines = lines


def lines_of(items: Sequence[Item], kept: Sequence[Item]) -> Sequence[bytes] | None:
    """What each of `kept` was read from, which are some of these, in their order; None where that is not known, or one
    is not the very object that was read.

    >>> shown = [Impression(id=f"i{n}", time=0.0, user="u1", item="p9") for n in range(3)]
    >>> lines = [encode_event(one) for one in shown]
    >>> lines_of(Decoded(shown, lines=lines), shown[1:]) == lines[1:]
    True
    """
    lines = getattr(items, "lines", None)
    if lines is None or (len(kept) == len(items) and all(map(is_, kept, items))):
        return lines
    left = zip(items, lines, strict=True)
    found = [next((line for one, line in left if one is event), None) for event in kept]
    return None if None in found else found  # type: ignore[return-value]


_decoder = msgspec.json.Decoder(Event)
_encoder = msgspec.json.Encoder()


def decode_event(line: bytes) -> Event:
    """Read one event from its default JSON form.

    Raises a `ValueError`: `msgspec.DecodeError` for what is not JSON, its subclass `msgspec.ValidationError` for what
    is not an event, `UnicodeDecodeError` for what is not UTF-8; and `RecursionError` for lists nested a thousand deep.

    >>> decode_event(b'{"type":"feedback","id":"f1","impression_id":"i1","time":12.5}').kind
    'click'
    """
    event: Event = _decoder.decode(line)
    return event


def decode_lines(lines: Sequence[bytes]) -> list[Event] | None:
    """What `decode_event` gives for each line, where all are events; None where not.

    >>> decode_lines([b'{"type":"feedback","id":"f1","impression_id":"i1","time":12.5}', b"{"]) is None
    True
    """
    try:
        # not msgspec's own decode_lines: it takes two events on a line, and one over two, and is no faster
        return [*map(_decoder.decode, lines)]
    except (ValueError, RecursionError):
        return None


def encode_event(event: Item) -> bytes:
    """Write one event in its default JSON form; `decode_event` reads it back.

    >>> encode_event(Feedback(id="f1", impression_id="i1", time=12.5))
    b'{"type":"feedback","id":"f1","impression_id":"i1","time":12.5,"kind":"click","value":null}'
    """
    return _encoder.encode(event)


def encode_lines(events: Sequence[Item]) -> bytes:
    """Write events in their default JSON form, each with a newline behind it."""
    return _encoder.encode_lines(events)
