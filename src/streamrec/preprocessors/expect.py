"""Expect: values in the ranges and sets that they should be in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from streamrec.errors import ConfigError
from streamrec.events import Event, Feedback, Impression, Labeled
from streamrec.protocols import State

__all__ = ["Expect"]


class Expect:
    """Drop impressions with values that cannot be right, counted by field and reason.

    `ranges`: by name, the least and the largest number, both allowed; what is no number is out of range. `allowed`: by
    name, the values there are; of a list, each must be one. `required`: names that must have a value; elsewhere one
    that is absent or None is fine. Names are `"user"`, `"item"` and those of features. `otherwise`: `"drop"` the
    impression, or take the value as `"unknown"` and let it go on. An impression is counted under the first reason in
    that order, values taken as unknown each. Feedback passes; a labeled example is taken as its impression.

    >>> expect = Expect(ranges={"price": (0.0, 1e5)}, allowed={"country": ["de", "fr"]})
    >>> shown = [Impression(f"i{n}", 0.0, "u", "p", {"price": 10.0 - 8 * n, "country": "de"}) for n in range(3)]
    >>> [one.id for one in expect.push(shown)], expect.counts
    (['i0', 'i1'], {'price_out_of_range': 1, 'country_not_allowed': 0})
    """

    def __init__(
        self,
        *,
        ranges: Mapping[str, tuple[float, float]] = {},
        allowed: Mapping[str, Collection[Any]] = {},
        required: Collection[str] = (),
        otherwise: str = "drop",
    ) -> None:
        for name, (low, high) in ranges.items():
            if not low <= high:
                raise ConfigError(f"the range of {name!r} must be from low to high, got {(low, high)!r}")
        if isinstance(required, str) or any(isinstance(values, str) for values in allowed.values()):
            raise ConfigError("required and allowed take several values: pass a list, not one text")
        if otherwise not in ("drop", "unknown"):
            raise ConfigError(f'otherwise must be "drop" or "unknown", got {otherwise!r}')
        if otherwise == "unknown" and ({"user", "item"} & {*ranges, *allowed} or required):
            raise ConfigError('a user, an item or a required value cannot be "unknown": use otherwise="drop" for them')
        self.ranges = {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
        self.allowed = {name: frozenset(values) for name, values in allowed.items()}
        self.required = tuple(required)
        self.otherwise = otherwise
        self._counts: Counter[str] = Counter()
        self._reasons = [f"{name}_missing" for name in self.required]
        self._reasons += [f"{name}_out_of_range" for name in self.ranges]
        self._reasons += [f"{name}_not_allowed" for name in self.allowed]

    @property
    def counts(self) -> Mapping[str, int]:
        """By field and reason: impressions dropped, or values taken as unknown. all are there at first."""
        return {reason: self._counts[reason] for reason in self._reasons}

    def push(self, events: Sequence[Event]) -> list[Event]:
        """The feedback, and the impressions as they are to go on, in order."""
        kept: list[Event] = []
        for event in events:
            if isinstance(event, Feedback):
                kept.append(event)
                continue
            shown = event.impression if isinstance(event, Labeled) else event
            faults = self._faults(shown)
            if not faults:
                kept.append(event)
            elif self.otherwise == "drop":
                self._counts[faults[0][1]] += 1
            else:
                self._counts.update(reason for _, reason in faults)
                wrong = {name for name, _ in faults}
                features = {name: value for name, value in shown.features.items() if name not in wrong}
                shown = Impression(shown.id, shown.time, shown.user, shown.item, features, shown.score)
                kept.append(
                    Labeled(shown, event.label, event.kind, event.weight) if isinstance(event, Labeled) else shown
                )
        return kept

    def _faults(self, shown: Impression) -> list[tuple[str, str]]:
        """The names of the values that are wrong, and why."""
        features = shown.features
        faults = [(name, f"{name}_missing") for name in self.required if _value(shown, features, name) is None]
        for name, (low, high) in self.ranges.items():
            value = _value(shown, features, name)
            if value is not None and not (isinstance(value, (int, float)) and low <= value <= high):
                faults.append((name, f"{name}_out_of_range"))
        for name, values in self.allowed.items():
            value = _value(shown, features, name)
            if value is not None and not _within(value, values):
                faults.append((name, f"{name}_not_allowed"))
        return faults

    def state_dict(self) -> State:
        """The counts."""
        return dict(self.counts)

    def load_state_dict(self, state: State) -> None:
        """Become what `state` was cut from."""
        self._counts = Counter({reason: int(count) for reason, count in state.items()})


def _value(shown: Impression, features: Mapping[str, Any], name: str) -> Any:
    if name == "user":
        return shown.user
    return shown.item if name == "item" else features.get(name)


def _within(value: Any, values: frozenset[Any]) -> bool:
    try:
        if isinstance(value, (list, tuple, set, frozenset, Mapping)):
            return all(one in values for one in value)
        return value in values
    except TypeError:  # a value that has no hash is none of them
        return False
