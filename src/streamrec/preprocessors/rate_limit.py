"""RateLimit: no more impressions of a user than a person looks at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np

from streamrec._compile import compiled
from streamrec.errors import ConfigError
from streamrec.events import Event, Feedback, Labeled
from streamrec.hashing import packed
from streamrec.preprocessors._keyed_rows import find, keys_of
from streamrec.preprocessors._recency import Recent, enter, leave, renew
from streamrec.preprocessors.encode import texts_of
from streamrec.protocols import State
from streamrec.schema import seconds_of

__all__ = ["RateLimit"]

_LIMITED, _EVICTED = range(2)
_TOKENS, _HELD_UNTIL = range(2)


class RateLimit:
    """Drop the impressions of bots: of whoever sees more than `most` in `within` seconds of event time.

    A bucket of `most` tokens, filled evenly in `within` seconds, for each value of `by` (`"user"`, or a feature such as
    an address): an impression takes one. Where there is none, it is dropped, and so are all that follow within `hold`
    seconds; 0: only those over the rate. `within`, `hold`: seconds, or text such as `"1m"`. Feedback passes: that on
    what was dropped finds no impression. A labeled example is taken as its impression.

    Remembers at most `capacity` values; past that the one not seen for longest goes, and `evicted` counts them.

    >>> from streamrec import Impression
    >>> shown = [Impression(id=f"i{n}", time=0.1 * n, user="u1", item="p9") for n in range(5)]
    >>> limit = RateLimit(most=3, within="1m", hold="1h")
    >>> len(limit.push(shown)), limit.counts
    (3, {'rate_limited': 2})
    """

    def __init__(
        self,
        *,
        most: int,
        within: float | str,
        hold: float | str = 0.0,
        by: str = "user",
        capacity: int = 1_000_000,
    ) -> None:
        if not most >= 1:
            raise ConfigError(f"most must be >= 1 impression, got {most!r}")
        if capacity < 1:
            raise ConfigError(f"capacity must be >= 1 value, got {capacity!r}")
        if not isinstance(by, str) or not by:
            raise ConfigError(f'by must be "user", "item" or the name of a feature, got {by!r}')
        self.most = most
        self.within = seconds_of(within, "within")
        self.hold = 0.0 if hold == 0 else seconds_of(hold, "hold")
        self.by = by
        self.capacity = capacity
        self._memory = Recent(2, capacity)
        self._numbers = np.zeros(2, dtype=np.int64)
        self._newest = np.full(1, -math.inf)

    def __len__(self) -> int:
        """How many values are remembered, at most `capacity`."""
        return len(self._memory)

    @property
    def evicted(self) -> int:
        """How many values were forgotten before their time."""
        return int(self._numbers[_EVICTED])

    @property
    def counts(self) -> Mapping[str, int]:
        """`rate_limited`: impressions dropped."""
        return {"rate_limited": int(self._numbers[_LIMITED])}

    def push(self, events: Sequence[Event]) -> list[Event]:
        """The feedback, and the impressions within the rate, in order."""
        shown = [one.impression if isinstance(one, Labeled) else one for one in events if not isinstance(one, Feedback)]
        if not shown:
            return list(events)
        texts = texts_of(self.by, shown)
        times = np.array([one.time for one in shown], dtype=np.float64)
        self._memory.make_room(len(shown))
        kept = np.empty(len(shown), dtype=np.bool_)
        rate = float(self.most), self.within, self.hold
        _take(keys_of(*packed(texts), len(texts)), times, rate, self._memory.parts, self._newest, self._numbers, kept)
        if kept.all():
            return list(events)
        keep = iter(kept.tolist())
        return list(compress(events, [isinstance(one, Feedback) or next(keep) for one in events]))

    def forget(self, user: str) -> int:
        """Let go of what is kept of this user, if it is by users; return how many rows that were."""
        return self._memory.forget(int(keys_of(*packed([user]), 1)[0, 0])) if self.by == "user" else 0

    def state_dict(self) -> State:
        """What is remembered, and the counts."""
        newest = None if self._newest[0] == -math.inf else float(self._newest[0])
        return {"memory": self._memory.state_dict(), "newest": newest, "numbers": self._numbers.copy()}

    def load_state_dict(self, state: State) -> None:
        """Become what `state` was cut from. What is over this one's `capacity` is evicted."""
        self._numbers = np.array(state["numbers"], dtype=np.int64)
        self._numbers[_EVICTED] += self._memory.load_state_dict(state["memory"])
        self._newest[0] = -math.inf if state["newest"] is None else state["newest"]


@compiled()
def _take(keys: Any, times: Any, rate: Any, memory: Any, newest_seen: Any, numbers: Any, kept: Any) -> None:
    """Say of each impression whether it is within the rate. There must be room."""
    rows, values, table, ends = memory
    most, within, hold = rate
    newest = newest_seen[0]
    ttl = max(within, hold)  # after which a bucket is full and nobody is held
    for n in range(len(times)):
        time = times[n]
        newest = max(newest, time)
        while ends[0] >= 0 and newest - rows[ends[0]].time > ttl:
            leave(ends[0], rows, table, ends)
        row = find(keys[n, 0], keys[n, 1], table, rows)
        if row >= 0 and newest - rows[row].time > ttl:
            leave(row, rows, table, ends)
            row = -1
        if row < 0:
            if ends[2] < 0:
                numbers[_EVICTED] += 1
                leave(ends[0], rows, table, ends)
            row = enter(keys[n, 0], keys[n, 1], rows, table, ends)
            rows[row].time, rows[row].owner = time, keys[n, 0]
            values[row, _TOKENS], values[row, _HELD_UNTIL] = most, -np.inf
        else:
            renew(row, rows, ends)
        if time > rows[row].time:
            values[row, _TOKENS] = min(most, values[row, _TOKENS] + (time - rows[row].time) * (most / within))
            rows[row].time = time
        if time < values[row, _HELD_UNTIL]:
            kept[n] = False
        elif values[row, _TOKENS] >= 1.0:
            values[row, _TOKENS] -= 1.0
            kept[n] = True
        else:
            values[row, _HELD_UNTIL] = time + hold
            kept[n] = False
        numbers[_LIMITED] += not kept[n]
    newest_seen[0] = newest
