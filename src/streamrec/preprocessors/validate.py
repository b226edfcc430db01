"""Validate: only events that can be used go on."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from streamrec.errors import ConfigError
from streamrec.events import DeadLetter, Decoded, Feedback, Impression, Item, Labeled, encode_event
from streamrec.protocols import State

__all__ = ["Validate"]

_YEAR_10000 = 253402300800.0
_MAX_FLOAT = sys.float_info.max
_MAX_RAW = 4096
_MAX_SHOWN = 80


class Validate:
    """Put a `DeadLetter` in the place of every event that cannot be used.

    What msgspec checks when it reads JSON, nobody checks in events built in Python; and a time in milliseconds or a
    nan is well-formed but would do harm for good. The reasons, by category:

    - "bad event", "bad id", "bad time", "bad features", "bad score", "bad value", "bad label", "bad weight": not of the
      type in `streamrec.events`, exactly (`numpy.float64` is no float: it could not be stored), or out of range.
    - "id too long": an id, user, item or kind of more than `max_id` characters.
    - "far ahead": a time more than `max_ahead` seconds after the newest accepted one, which would let every open join
      expire. Where the next usable event agrees with it within `max_ahead`, the stream did jump: that one is accepted.

    Dead letters pass. The position of new ones is empty: the trainer fills it in. `counts` is empty as well, for
    nothing is dropped here; `DeadLetters` counts by category.

    >>> event = Impression(id="i1", time=1700000000000.0, user="u1", item="p9")
    >>> Validate().push([event])[0].reason
    'bad time: 1700000000000.0 is not in [0, 253402300800); times are POSIX seconds; divide milliseconds by 1000'
    """

    def __init__(self, *, max_id: int = 1024, max_ahead: float = 7 * 86400.0) -> None:
        if max_id < 1:
            raise ConfigError(f"max_id must be >= 1 character, got {max_id!r}")
        if not max_ahead > 0:
            raise ConfigError(f"max_ahead must be > 0 seconds of event time, got {max_ahead!r}")
        self.max_id = max_id
        self.max_ahead = max_ahead
        self._newest: float | None = None  # the newest time accepted
        self._candidate: float | None = None  # the time of the event just refused as far ahead

    @property
    def counts(self) -> Mapping[str, int]:
        """Empty: what is refused goes on as a dead letter."""
        return {}

    def push(self, events: Sequence[Item]) -> list[Item]:
        """As many items as there are events, in order: the event, or a dead letter that says why not."""
        if type(events) is Decoded and self._all_usable(events):
            return Decoded(events, lines=events.lines)
        max_id = self.max_id
        checked: list[Item] = []
        event: Any
        for event in events:
            # Short cuts for good events of the usual types. `_fault` looks closer at all others and has the last word.
            kind: type[Any] | None = type(event)
            usable = False
            shown, good = event, True
            if kind is Labeled:
                shown, label, weight = event.impression, event.label, event.weight
                kind = Impression if type(shown) is Impression else None
                good = (
                    type(event.kind) is str
                    and event.kind == "click"
                    and type(label) is float
                    and 0.0 <= label <= 1.0
                    and type(weight) is float
                    and 0.0 <= weight <= _MAX_FLOAT
                )
            if kind is Impression:
                id, user, item, time, score = shown.id, shown.user, shown.item, shown.time, shown.score
                if (
                    good
                    and type(id) is str
                    and type(user) is str
                    and type(item) is str
                    and 0 < len(id) <= max_id
                    and len(user) <= max_id
                    and len(item) <= max_id
                    and id.isascii()
                    and user.isascii()
                    and item.isascii()
                    and type(time) is float
                    and 0.0 <= time < _YEAR_10000
                    and (score is None or (type(score) is float and 0.0 <= score <= 1.0))
                    and type(shown.features) is dict
                ):
                    for name in shown.features:
                        if type(name) is not str:
                            break
                    else:
                        usable = True
            elif kind is Feedback:
                id, shown_id, time = event.id, event.impression_id, event.time
                usable = (
                    type(id) is str
                    and type(shown_id) is str
                    and 0 < len(id) <= max_id
                    and 0 < len(shown_id) <= max_id
                    and id.isascii()
                    and shown_id.isascii()
                    and type(event.kind) is str
                    and event.kind == "click"
                    and type(time) is float
                    and 0.0 <= time < _YEAR_10000
                    and event.value is None
                )
            elif kind is DeadLetter:
                checked.append(event)
                continue
            if not usable:
                reason = self._fault(event)
                if reason is not None:
                    checked.append(_letter(event, reason))
                    continue
                time = event.impression.time if isinstance(event, Labeled) else event.time
            newest = self._newest
            if newest is None or time > newest:
                if newest is not None and time - newest > self.max_ahead:
                    candidate, self._candidate = self._candidate, time
                    if candidate is None or abs(time - candidate) > self.max_ahead:
                        checked.append(_letter(event, self._far_ahead(time, newest)))
                        continue
                self._newest = time
            self._candidate = None
            checked.append(event)
        return checked

    def state_dict(self) -> State:
        """The newest time accepted, and that of an event just refused as far ahead; None where there is none."""
        return {"newest": self._newest, "candidate": self._candidate}

    def load_state_dict(self, state: State) -> None:
        """Become what `state` was cut from."""
        self._newest = state["newest"]
        self._candidate = state["candidate"]

    def _all_usable(self, events: Decoded) -> bool:
        """Whether events straight from msgspec can all be used, told from whole columns; they are accepted if so.

        False too where that takes a closer look: labeled examples, and a time that may be far ahead.
        """
        shown = [event for event in events if type(event) is Impression]
        told = [event for event in events if type(event) is Feedback]
        if not events or len(shown) + len(told) < len(events):
            return False
        max_id, newest = self.max_id, self._newest
        names = [event.id for event in shown]
        names += [event.id for event in told]
        names += [event.impression_id for event in told]
        others = [event.user for event in shown]
        others += [event.item for event in shown]
        others += {event.kind for event in told}
        times = [event.time for event in shown]
        times += [event.time for event in told]
        scores = [event.score for event in shown]
        served = [] if scores.count(None) == len(scores) else [one for one in scores if one is not None]
        latest = max(times)
        if (
            not all(names)
            or max(map(len, names)) > max_id
            or max(map(len, others)) > max_id
            or not 0.0 <= min(times) <= latest < _YEAR_10000
            or latest - (min(times) if newest is None else newest) > self.max_ahead
            or (served and not 0.0 <= min(served) <= max(served) <= 1.0)
        ):
            return False
        if newest is None or latest > newest:
            self._newest = latest
        self._candidate = None
        return True

    def _far_ahead(self, time: float, newest: float) -> str:
        return (
            f"far ahead: {time!r} is {time - newest:.0f} seconds after the newest event, more than max_ahead = "
            f"{self.max_ahead!r}; check the clock of its sender"
        )

    def _fault(self, event: Any) -> str | None:
        """What is wrong with an event, taken alone; None where nothing is."""
        if isinstance(event, Impression):
            return self._impression_fault(event)
        if isinstance(event, Feedback):
            return (
                self._id_fault("id", event.id)
                or self._id_fault("impression_id", event.impression_id)
                or self._id_fault("kind", event.kind, empty=True)
                or _time_fault(event.time)
                or _number_fault("value", event.value, none=True)
            )
        if isinstance(event, Labeled):
            shown: Any = event.impression
            if not isinstance(shown, Impression):
                return f"bad event: a Labeled holds an Impression, got {_show(shown)}"
            return (
                self._impression_fault(shown)
                or self._id_fault("kind", event.kind, empty=True)
                or _number_fault("label", event.label, low=0.0, high=1.0)
                or _number_fault("weight", event.weight, low=0.0)
            )
        return f"bad event: an Impression, Feedback or Labeled is expected, got {_show(event)}"

    def _impression_fault(self, event: Impression) -> str | None:
        return (
            self._id_fault("id", event.id)
            or self._id_fault("user", event.user, empty=True)
            or self._id_fault("item", event.item, empty=True)
            or _time_fault(event.time)
            or _number_fault("score", event.score, none=True, low=0.0, high=1.0)
            or _features_fault(event.features)
        )

    def _id_fault(self, name: str, value: Any, *, empty: bool = False) -> str | None:
        if type(value) is not str:
            return f"bad id: {name} must be a str, got {_show(value)}; use str(...)"
        if not value and not empty:
            return f"bad id: {name} is empty; each event needs an id of its own"
        if len(value) > self.max_id:
            return f"id too long: {name} has {len(value)} characters, more than max_id = {self.max_id}: {_show(value)}"
        try:
            value.encode()
        except UnicodeEncodeError:  # half a surrogate pair: it can be neither hashed nor stored
            return f"bad id: {name} is not valid Unicode: {_show(value)}"
        return None


def _time_fault(time: Any) -> str | None:
    if type(time) is not float and type(time) is not int:
        return f"bad time: a float is expected, got {_show(time)}; use float(...), POSIX seconds"
    if not 0.0 <= time < _YEAR_10000:
        return (
            f"bad time: {_show(time)} is not in [0, {_YEAR_10000:.0f}); times are POSIX seconds; "
            "divide milliseconds by 1000"
        )
    return None


def _number_fault(
    name: str, value: Any, *, none: bool = False, low: float = -math.inf, high: float = math.inf
) -> str | None:
    if value is None and none:
        return None
    if type(value) is not float and type(value) is not int:
        return f"bad {name}: a float is expected, got {_show(value)}; use float(...)"
    # integers may be larger than the largest float; those are not finite either
    if not low <= value <= high or not -_MAX_FLOAT <= value <= _MAX_FLOAT:
        return f"bad {name}: {_show(value)} is not a finite number in [{low:g}, {high:g}]"
    return None


def _features_fault(features: Any) -> str | None:
    if not isinstance(features, Mapping):
        return f"bad features: a mapping of name to value is expected, got {_show(features)}"
    for name in features:
        if type(name) is not str:
            return f"bad features: a name must be a str, got {_show(name)}"
    return None


def _show(value: object) -> str:
    """A value for a message, short whatever it is; with its type where that is not plain."""
    try:
        text = repr(value[:_MAX_SHOWN] if type(value) is str else value)
    except Exception:  # broad on purpose: the value is the user's, and a message about it may not stop the stream
        text = "a value without a repr"
    if len(text) > _MAX_SHOWN:
        text = text[:_MAX_SHOWN] + "..."
    return text if type(value) in (str, float, int, bool, type(None)) else f"{type(value).__name__} {text}"


def _letter(event: Any, reason: str) -> DeadLetter:
    try:
        raw = encode_event(event)
    except Exception:  # broad on purpose: the event is known to be odd, and its letter is all that is left of it
        try:
            raw = repr(event).encode("utf-8", "replace")[:_MAX_RAW]
        except Exception:  # not even a repr
            raw = b""
    return DeadLetter(position={}, reason=reason, raw=raw)
