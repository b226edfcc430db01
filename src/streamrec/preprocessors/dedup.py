"""Dedup: each event once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec._compile import compiled
from streamrec.errors import ConfigError
from streamrec.events import Event, Feedback, Impression, Labeled
from streamrec.hashing import packed
from streamrec.preprocessors._generations import Generations, known_by, remember_in
from streamrec.preprocessors._keyed_rows import KEY, empty_table, find, keys_of, put, put_all, take_out
from streamrec.protocols import State

__all__ = ["Dedup"]

_NEVER = float("-inf")
_ROW = np.dtype([*KEY, ("time", np.float64)])
_FIRST, _END, _LIVE, _DUPLICATES, _EVICTED, _PROBABLE = range(6)
_SMALLEST = 1024
_WITH_TIME = {Impression, Feedback}


class Dedup:
    """Drop events whose id was seen in the last `ttl` seconds of event time.

    An impression and a feedback may share an id; a labeled example is known by its impression's id and its kind.
    An id is forgotten when the newest event time seen is more than `ttl` seconds later than the event it came with.
    What is dropped renews nothing. Remembers at most `capacity` ids; past that the one that came first goes first,
    and `evicted` counts them. An id is remembered by a hash of 128 bits, in 40 to 80 bytes: two of a million ids over a
    billion events are taken for one with a chance of 3e-24.

    >>> click = Feedback(id="c1", impression_id="i1", time=1.0)
    >>> dedup = Dedup(ttl=60.0, capacity=10_000)
    >>> len(dedup.push([click, click])), dedup.counts
    (1, {'duplicate': 1})
    """

    def __init__(self, *, ttl: float, capacity: int, beyond: int = 0, error: float = 1e-6) -> None:
        if not ttl > 0:
            raise ConfigError(f"ttl must be > 0 seconds of event time, got {ttl!r}")
        if capacity < 1:
            raise ConfigError(f"capacity must be >= 1 id, got {capacity!r}")
        if beyond < 0:
            raise ConfigError(f"beyond must be >= 0 ids, got {beyond!r}")
        if not 1e-12 <= error < 1:
            raise ConfigError(f"error must be a chance in [1e-12, 1), got {error!r}")
        self.ttl = ttl
        self.capacity = capacity
        self.beyond = beyond
        self.error = error
        self._generations = Generations(beyond, error)
        # What is remembered, in order of arrival: a ring, from `_FIRST` to `_END` (excluded). A row with the time nan
        # has been taken out.
        self._ring: NDArray[Any] = np.zeros(_SMALLEST, dtype=_ROW)
        self._table = empty_table(_SMALLEST)
        self._numbers = np.zeros(6, dtype=np.int64)
        self._newest = np.full(1, _NEVER)

    def __len__(self) -> int:
        """How many ids are remembered exactly, at most `capacity`."""
        return int(self._numbers[_LIVE])

    @property
    def evicted(self) -> int:
        """How many ids were forgotten before their time: there was no room for them, not even in `beyond`."""
        return int(self._numbers[_EVICTED]) + self._generations.forgotten

    @property
    def counts(self) -> Mapping[str, int]:
        """`duplicate`: events dropped. With `beyond`, `probable_duplicate`: those that the approximate memory knew."""
        counts = {"duplicate": int(self._numbers[_DUPLICATES])}
        if self.beyond:
            counts["probable_duplicate"] = int(self._numbers[_PROBABLE])
        return counts

    def push(self, events: Sequence[Event]) -> list[Event]:
        """The events that were not seen before, in order."""
        if not events:
            return []
        # a letter in front, so that an impression and a feedback may share an id
        names = [
            "i" + event.id if type(event) is Impression else "f" + event.id if type(event) is Feedback else _name(event)
            for event in events
        ]
        if {*map(type, events)} <= _WITH_TIME:
            times = np.array([event.time for event in events], dtype=np.float64)  # type: ignore[union-attr]
        else:
            times = np.array([_time(event) for event in events], dtype=np.float64)
        self._make_room(len(events))
        fresh = np.empty(len(events), dtype=np.bool_)
        remembered = self._ring, self._table, self._numbers, self._newest
        beyond = self._generations.bits, self._generations.times, self._generations.numbers
        _take(keys_of(*packed(names), len(names)), times, float(self.ttl), self.capacity, *remembered, *beyond, fresh)
        if fresh.all():
            return list(events)
        return list(compress(events, fresh.tolist()))

    def _make_room(self, more: int) -> None:
        """Move what is remembered into a ring with room for `more`: a larger one if this one is more than half full."""
        if self._numbers[_END] - self._numbers[_FIRST] + more <= len(self._ring):
            return
        self._remember(self._live(), more)

    def _live(self) -> NDArray[Any]:
        """The rows that are remembered, in order of arrival."""
        numbers = np.arange(self._numbers[_FIRST], self._numbers[_END])
        rows = self._ring[numbers & (len(self._ring) - 1)]
        live: NDArray[Any] = rows[~np.isnan(rows["time"])]
        return live

    def _remember(self, live: NDArray[Any], more: int = 0) -> None:
        size = max(_SMALLEST, 1 << (2 * len(live) + more - 1).bit_length())
        self._ring = np.zeros(size, dtype=_ROW)
        self._ring[: len(live)] = live
        self._table = empty_table(size)
        put_all(np.arange(len(live)), self._table, self._ring)
        self._numbers[[_FIRST, _END, _LIVE]] = 0, len(live), len(live)

    def state_dict(self) -> State:
        """What is remembered, in order of arrival: `keys`, uint64 `(n, 2)`, and `times`, float64 `(n,)`."""
        live = self._live()
        return {
            "keys": np.stack([live["high"], live["low"]], axis=1),
            "times": live["time"].copy(),
            "newest": None if self._newest[0] == _NEVER else float(self._newest[0]),
            "evicted": int(self._numbers[_EVICTED]),
            "duplicate": int(self._numbers[_DUPLICATES]),
            "probable_duplicate": int(self._numbers[_PROBABLE]),
            "beyond": self._generations.state_dict() if self.beyond else None,
        }

    def load_state_dict(self, state: State) -> None:
        """Become what `state` was cut from. What is over this one's `capacity` is evicted.

        Raises `ConfigError` where it was cut with another `beyond` or `error`.
        """
        beyond = state.get("beyond")
        if beyond is not None and not self.beyond:
            raise ConfigError("the state was cut with beyond=..., this Dedup has none: give it that of the state")
        self._generations = Generations(self.beyond, self.error)
        if beyond is not None:
            self._generations.load_state_dict(beyond)
        over = max(0, len(state["times"]) - self.capacity)
        live = np.zeros(len(state["times"]) - over, dtype=_ROW)
        live["high"], live["low"] = np.asarray(state["keys"])[over:].T
        live["time"] = state["times"][over:]
        self._remember(live)
        self._newest[0] = _NEVER if state["newest"] is None else state["newest"]
        self._numbers[_EVICTED] = state["evicted"] + over
        self._numbers[_DUPLICATES] = state["duplicate"]
        self._numbers[_PROBABLE] = state.get("probable_duplicate", 0)


def _name(event: Event) -> str:
    if isinstance(event, Labeled):  # where the kind ends and the id begins is never in doubt
        return f"l{len(event.kind)}:{event.kind}{event.impression.id}"
    return f"{'i' if isinstance(event, Impression) else 'f'}{event.id}"


def _time(event: Event) -> float:
    return event.impression.time if isinstance(event, Labeled) else event.time


@compiled()
def _take(
    keys: Any,
    times: Any,
    ttl: float,
    capacity: int,
    ring: Any,
    table: Any,
    numbers: Any,
    newest_seen: Any,
    beyond: Any,
    beyond_times: Any,
    beyond_numbers: Any,
    fresh: Any,
) -> None:
    """Say of each event whether it is `fresh`, and remember it. There must be room in the ring."""
    mask = len(ring) - 1
    newest = newest_seen[0]
    for n in range(len(times)):
        time = times[n]
        if time > newest:
            newest = time
        known = find(keys[n, 0], keys[n, 1], table, ring)
        if known >= 0:
            if newest - ring[known].time <= ttl:
                numbers[_DUPLICATES] += 1
                fresh[n] = False
                continue
            # it was forgotten, and is taken out so late only because those before it were not: it arrives anew
            take_out(known, table, ring)
            ring[known].time = np.nan
            numbers[_LIVE] -= 1
        elif len(beyond) and known_by(keys[n, 0], keys[n, 1], newest - ttl, beyond, beyond_times, beyond_numbers):
            numbers[_PROBABLE] += 1
            fresh[n] = False
            continue
        fresh[n] = True
        if not newest - time <= ttl:
            continue  # so late that it is forgotten at once
        if numbers[_LIVE] >= capacity:
            while np.isnan(ring[numbers[_FIRST] & mask].time):
                numbers[_FIRST] += 1
            first = numbers[_FIRST] & mask
            gone = ring[first]
            if newest - gone.time <= ttl:
                if len(beyond):
                    remember_in(gone.high, gone.low, gone.time, newest, ttl, beyond, beyond_times, beyond_numbers)
                else:
                    numbers[_EVICTED] += 1
            take_out(first, table, ring)
            numbers[_FIRST] += 1
            numbers[_LIVE] -= 1
        row = numbers[_END] & mask
        ring[row].high, ring[row].low, ring[row].time = keys[n, 0], keys[n, 1], time
        put(row, table, ring)
        numbers[_END] += 1
        numbers[_LIVE] += 1
    newest_seen[0] = newest
    # Forgotten ids that came before all others go: O(1) an id, and when it is done changes no result. Where events come
    # out of order, some may stand behind one that is remembered: they wait for it.
    while numbers[_FIRST] < numbers[_END]:
        first = numbers[_FIRST] & mask
        if not np.isnan(ring[first].time):
            if newest - ring[first].time <= ttl:
                break
            take_out(first, table, ring)
            numbers[_LIVE] -= 1
        numbers[_FIRST] += 1
