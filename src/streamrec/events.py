"""What flows: impressions, the feedback on them, labelled examples, and what could not be read.

All are frozen. Times are POSIX seconds in UTC, float64: event time, never the clock of the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Union

import msgspec

__all__ = [
    "DeadLetter",
    "Event",
    "Feedback",
    "Impression",
    "Item",
    "Labeled",
    "Position",
    "decode_event",
    "encode_event",
]

Position = Mapping[str, Any]
"""Where a source stands: what JSON can hold, so that it can be saved in a checkpoint."""


class Impression(msgspec.Struct, frozen=True, tag_field="type", tag="impression"):
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


class Feedback(msgspec.Struct, frozen=True, tag_field="type", tag="feedback"):
    """What a user did with an impression: a `"click"`, a later `"conversion"`, or a kind of your own."""

    id: str
    impression_id: str
    time: float
    kind: str = "click"
    value: float | None = None


class Labeled(msgspec.Struct, frozen=True, tag_field="type", tag="labeled"):
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


def encode_event(event: Item) -> bytes:
    """Write one event in its default JSON form; `decode_event` reads it back.

    >>> encode_event(Feedback(id="f1", impression_id="i1", time=12.5))
    b'{"type":"feedback","id":"f1","impression_id":"i1","time":12.5,"kind":"click","value":null}'
    """
    return _encoder.encode(event)
