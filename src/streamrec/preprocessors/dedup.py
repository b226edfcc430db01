"""Dedup: each event once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import takewhile

import numpy as np

from streamrec.errors import ConfigError
from streamrec.events import Event, Feedback, Impression
from streamrec.protocols import State

__all__ = ["Dedup"]

_NEVER = float("-inf")


class Dedup:
    """Drop events whose id was seen in the last `ttl` seconds of event time.

    An impression and a feedback may share an id; a labeled example is known by its impression's id and its kind.
    An id is forgotten when the newest event time seen is more than `ttl` seconds later than the event it came with.
    What is dropped renews nothing. Remembers at most `capacity` ids; past that the one that came first goes first,
    and `evicted` counts them.

    >>> click = Feedback(id="c1", impression_id="i1", time=1.0)
    >>> dedup = Dedup(ttl=60.0, capacity=10_000)
    >>> len(dedup.push([click, click])), dedup.counts
    (1, {'duplicate': 1})
    """

    def __init__(self, *, ttl: float, capacity: int) -> None:
        if not ttl > 0:
            raise ConfigError(f"ttl must be > 0 seconds of event time, got {ttl!r}")
        if capacity < 1:
            raise ConfigError(f"capacity must be >= 1 id, got {capacity!r}")
        self.ttl = ttl
        self.capacity = capacity
        self.evicted = 0
        self._duplicates = 0
        self._newest = _NEVER
        # Key to event time, in order of arrival. No dict: taking the first out of one again and again is quadratic.
        self._seen: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        """How many ids are remembered, at most `capacity`."""
        return len(self._seen)

    @property
    def counts(self) -> Mapping[str, int]:
        """`duplicate`: events dropped."""
        return {"duplicate": self._duplicates}

    def push(self, events: Sequence[Event]) -> list[Event]:
        """The events that were not seen before, in order."""
        seen, ttl, capacity, newest = self._seen, self.ttl, self.capacity, self._newest
        fresh: list[Event] = []
        for event in events:
            # A letter in front, so that an impression and a feedback may share an id. One string and not a tuple:
            # the garbage collector would walk over a million tuples time and again.
            if isinstance(event, Impression):
                key, time = "i" + event.id, event.time
            elif isinstance(event, Feedback):
                key, time = "f" + event.id, event.time
            else:
                kind = event.kind
                key, time = f"l{len(kind)}:{kind}{event.impression.id}", event.impression.time
            if time > newest:
                newest = time
            known = seen.get(key)
            if known is not None:
                # What counts is the time, not the presence: forgotten ids are taken out later, in bulk.
                if newest - known <= ttl:
                    self._duplicates += 1
                    continue
                del seen[key]  # it arrives anew, behind all others
            fresh.append(event)
            if newest - time > ttl:
                continue  # so late that it is forgotten at once
            if len(seen) >= capacity:
                _, gone = seen.popitem(last=False)
                if newest - gone <= ttl:
                    self.evicted += 1
            seen[key] = time
        self._newest = newest
        self._forget()
        return fresh

    def _forget(self) -> None:
        """Take out the forgotten ids that came before all others: O(1) an id, and when it is done changes no result.

        Where events come out of order, forgotten ids may stand behind one that is remembered. They wait for it.
        """
        seen = self._seen
        for key in list(takewhile(lambda key: self._newest - seen[key] > self.ttl, seen)):
            del seen[key]

    def state_dict(self) -> State:
        """What is remembered, in order of arrival: `keys`, a list of n strings, and `times`, float64 `(n,)`."""
        return {
            "keys": list(self._seen),
            "times": np.fromiter(self._seen.values(), np.float64, len(self._seen)),
            "newest": None if self._newest == _NEVER else float(self._newest),
            "evicted": self.evicted,
            "duplicate": self._duplicates,
        }

    def load_state_dict(self, state: State) -> None:
        """Become what `state` was cut from. What is over this one's `capacity` is evicted."""
        self._seen = OrderedDict(zip(state["keys"], state["times"].tolist(), strict=True))
        self._newest = _NEVER if state["newest"] is None else state["newest"]
        self.evicted = state["evicted"]
        self._duplicates = state["duplicate"]
        while len(self._seen) > self.capacity:
            self._seen.popitem(last=False)
            self.evicted += 1
