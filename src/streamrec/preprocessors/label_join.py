"""Impressions and their late feedback, joined by event time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf, nan
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamrec._pointers import pointers_to
from streamrec.errors import ConfigError
from streamrec.events import Event, Feedback, Impression, Labeled
from streamrec.hashing import packed
from streamrec.preprocessors import _join_kernel
from streamrec.preprocessors._join_kernel import CLOSED, FOREVER, PASSED, SHOWN, UNKNOWN
from streamrec.preprocessors._join_rows import chained, free_rows, larger
from streamrec.preprocessors._join_rules import MOST_KINDS, After, Rules
from streamrec.preprocessors._keyed_rows import put_all
from streamrec.preprocessors._payloads import pack, unpack
from streamrec.protocols import State

__all__ = ["CLOSED", "PASSED", "SHOWN", "UNKNOWN", "After", "Closed", "LabelJoin", "event_codes"]

kernel: Any = _join_kernel  # its loops take more arguments, unpacked, than mypy can follow

_SMALLEST = 1024
_SPARE = 4096  # rows beyond the capacity, for the events of one call
_time_of = attrgetter("time")
_USUAL = {Impression, Feedback}


class Closed(NamedTuple):
    """What `LabelJoin.step` gives back for a payload: its label of one kind, or word that no label will come.

    `label` is 1.0 or 0.0. Where an impression was let go without a label, `kind` is "" and `label` is nan.
    `time` is the impression's. After `last` the payload does not come back: free what it stands for. `weight`: of the
    label. `corrects`: the label of this kind that it gave before was 0.0, and was wrong.
    """

    payload: Any
    kind: str
    label: float
    time: float
    last: bool
    weight: float = 1.0
    corrects: bool = False


_closed = tuple.__new__  # NamedTuple's own constructor takes twice the time
_NONE: tuple[Closed, ...] = ()


class LabelJoin:
    """Wait for the feedback on each impression; label it 1.0 or 0.0 when its attribution window closes.

    `windows`: by kind of feedback, seconds of event time, or text such as "30m"; feedback counts where
    `impression.time <= feedback.time <= impression.time + window`. Each kind gives a label of its own. With
    `After("click", "7d")` it counts where it comes so long after the first click that counts; its label comes when that
    can be no more: at the end of both windows, or, where there was no click and no other window is open, with the
    click's.
    `lateness`: seconds the watermark trails the newest event. An event behind the watermark is late and dropped; one
    from far in the future takes the watermark along, so check times first.
    `capacity`: impressions held at most; past that the one that closes first is let go without a label, for a label
    cut short would be a false negative. Early feedback, which waits for its impression, is held to the same number.
    `values`: by kind, what the `value` of its feedback is for: as the `"weight"` of a positive label (a price), or as
    its `"label"`, in [0, 1]. One that cannot be is 1, counted as `bad_value`.
    `late`: what becomes of feedback that comes after its window, or after its label was given: `"drop"`, or
    `"correct"`: the impression is kept for `keep` seconds more, in which such feedback gives the label 1.0 as well.

    A label comes out when its window closes, a positive one too. Were clicks learned at once and their absence a
    window later, the model would always have seen too many clicks.

    Labels come in order of closing time, then of impression time, then of arrival. Raises `ConfigError` for settings
    that cannot work.

    An id is remembered by a hash of 128 bits: two of a million open ones over a billion events are taken for one with a
    chance of 3e-24.

    >>> join = LabelJoin(windows={"click": 60.0})
    >>> shown = [Impression(id=f"i{n}", time=float(n), user="u1", item="p9") for n in range(2)]
    >>> join.push([*shown, Feedback(id="f1", impression_id="i1", time=5.0)])
    []
    >>> later = Impression(id="i2", time=90.0, user="u2", item="p9")
    >>> [(labeled.impression.id, labeled.label) for labeled in join.push([later])]
    [('i0', 0.0), ('i1', 1.0)]
    >>> join.pending, join.watermark
    (1, 90.0)

    What holds impressions elsewhere, under a number, uses `step` and `drain` instead of `push` and `flush`, and with
    many events at once `codes` and `steps`.
    """

    def __init__(
        self,
        *,
        windows: Mapping[str, float | str | After],
        lateness: float = 0.0,
        capacity: int = 1_000_000,
        values: Mapping[str, str] = {},
        late: str = "drop",
        keep: float | str = "1d",
    ) -> None:
        self._rules = Rules(windows, values, late, keep)
        if not 0.0 <= lateness < FOREVER:
            raise ConfigError(f"lateness must be >= 0 seconds and finite, got {lateness!r}")
        if not capacity >= 1:
            raise ConfigError(f"capacity must be >= 1, got {capacity!r}")
        self.windows: Mapping[str, float] = self._rules.windows
        """By kind, seconds from an impression until its label is known at the latest."""
        self.kinds: Sequence[str] = self._rules.kinds
        """In order of closing."""
        self.lateness = float(lateness)
        self.capacity = capacity
        self.late = late
        self.keep = self._rules.keep
        self._clear()

    def _clear(self, opens: int = _SMALLEST, earlies: int = _SMALLEST) -> None:
        self._times = np.array([-FOREVER, self.lateness])  # the watermark is the first
        self._pointers: NDArray[np.int64] | None = None
        self._numbers = np.zeros(kernel.NUMBERS, dtype=np.int64)
        self._opens, self._open_table, self._recent = free_rows(opens, kernel.OPEN)
        self._extras = np.zeros((opens, self._rules.columns))
        self._queues = np.full((len(self._rules.widths), 2), -1, dtype=np.int64)  # the first row and the last of each
        self._earlies, self._early_table, self._expiring = free_rows(earlies, kernel.EARLY)
        self._early_values = np.full(earlies, nan)
        # Payloads are numbers in the rows: one that is no number of its own has a negative one here.
        self._objects: dict[int, Any] = {}
        self._lowest = 0
        self._few: NDArray[Any] = np.empty(2 * MOST_KINDS + 2, dtype=CLOSED)  # for one event at a time

    def __repr__(self) -> str:
        return f"LabelJoin(windows={self.windows!r}, lateness={self.lateness!r}, capacity={self.capacity!r})"

    @property
    def pending(self) -> int:
        """How many impressions are open, or are kept for corrections."""
        return int(self._numbers[kernel.OPENED])

    @property
    def corrected(self) -> int:
        """How many labels were corrected."""
        return int(self._numbers[kernel.CORRECTED])

    @property
    def watermark(self) -> float:
        """The event time believed complete: `lateness` behind the newest event, -inf before the first."""
        return float(self._times[0]) if self._times[0] > -FOREVER else -inf

    @property
    def counts(self) -> Mapping[str, int]:
        """How many events were dropped, by reason; every reason is there from the start.

        Impressions: `late_impression`, `duplicate_impression` (its id is open), `evicted_impression`.
        Feedback: `late_feedback`, `unknown_kind` (no window for it), `outside_window`, `repeated` (a second of its
        kind on one impression), `unmatched` (its impression, or what its window begins with, did not come, or is gone),
        `evicted_feedback`. Not dropped, but to be known: `evicted_kept` (impressions that are labeled, and can be
        corrected no more), `bad_value`.
        """
        return dict(zip(kernel.REASONS, self._numbers.tolist(), strict=False))

    def push(self, events: Sequence[Event]) -> list[Labeled]:
        """Take impressions and feedback; return what their event time closes. `Labeled` items pass in their place."""
        if len(events) == 1 and not isinstance(events[0], Labeled):
            closed_now = self.step(events[0], events[0])
            return [Labeled(shown, label, kind, weight) for shown, kind, label, _, _, weight, _ in closed_now if kind]
        codes = self.codes(events)
        shown = np.flatnonzero(codes == SHOWN)
        first = self._lowest - 1
        self._lowest -= len(shown)
        numbers = np.zeros(len(codes), dtype=np.int64)
        numbers[shown] = np.arange(first, self._lowest - 1, -1)
        self._objects.update(
            zip(range(first, self._lowest - 1, -1), map(events.__getitem__, shown.tolist()), strict=True)
        )
        closed = self.steps(events, codes, numbers)
        labeled = self._labels(closed)
        passed = np.flatnonzero(codes == PASSED).tolist()
        if not passed:
            return labeled
        placed = list(zip(closed["event"][closed["kind"] >= 0].tolist(), labeled, strict=True))
        placed += [(place, events[place]) for place in passed]  # type: ignore[misc]
        return [one for _, one in sorted(placed, key=itemgetter(0))]

    def flush(self) -> list[Labeled]:
        """Close all that is open, at the end of a stream; see `drain`."""
        return self._labels(self._drained())

    def step(self, event: Impression | Feedback, payload: Any = None) -> Sequence[Closed]:
        """Take one event; return what its time closes: labels to learn before the event itself is scored.

        `payload` stands for an impression until its last label; feedback has none. To be saved, payloads must be all
        64-bit integers or all `Impression`s. Each comes back with `last` exactly once: with its last label or, where
        it was refused (late, duplicate) or evicted, in a `Closed` of kind "" after the labels.

        >>> join = LabelJoin(windows={"click": 60.0})
        >>> join.step(Impression(id="i1", time=0.0, user="u1", item="p9"), 7)
        ()
        >>> join.step(Feedback(id="f1", impression_id="i1", time=61.0))
        [Closed(payload=7, kind='click', label=0.0, time=0.0, last=True, weight=1.0, corrects=False)]
        >>> join.step(Impression(id="i2", time=1.0, user="u1", item="p9"), 8)  # late
        [Closed(payload=8, kind='', label=nan, time=1.0, last=True, weight=1.0, corrects=False)]
        """
        if isinstance(event, Impression):
            id, code, number, value = event.id, SHOWN, self._number(payload), nan
        else:
            id, code, number = event.impression_id, self._rules.code.get(event.kind, UNKNOWN), 0
            value = nan if event.value is None else float(event.value)
        data = id.encode("utf-8", "surrogatepass")
        count = kernel.advance_one(data, float(event.time), code, number, value, self._map())
        if not count:
            return _NONE
        found = []
        while count < 0:  # there was no room for all
            found += self._given_back(self._few[: -1 - count])
            self._few = self._room(1)
            count = kernel.advance_one(data, float(event.time), code, number, value, self._map())
        return found + self._given_back(self._few[:count])

    def codes(self, events: Sequence[Event]) -> NDArray[np.int64]:
        """int64 `(n,)`: what each event is to `steps`. From 0: feedback of `kinds[code]`; -1: of another kind; -2: an
        impression; -3: a labeled example.

        >>> LabelJoin(windows={"click": 60.0}).codes([Feedback(id="f1", impression_id="i1", time=1.0)])
        array([0])
        """
        return event_codes(events, self._rules.code)

    def steps(
        self,
        events: Sequence[Event],
        codes: NDArray[np.int64],
        payloads: NDArray[np.int64],
        *,
        at_once: bool = False,
    ) -> NDArray[Any]:
        """`step` for many events at once; labeled examples pass.

        `codes`: from `codes`. `payloads`: int64 `(n,)`, those of impressions are read; from 0 on. `at_once`: tell of
        each positive when it is known, too. Returns records `(closed,)` in order: `event`, the place of the event whose
        time closed it; `payload`; `time`; `kind`, the place in `kinds`, or -1 where there will be no label; `label` and
        `weight`, float32; `last`; `what`: 0, a label; 1, word of a positive, whose label will follow; 2, a correction.

        >>> join = LabelJoin(windows={"click": 60.0})
        >>> shown = [Impression(id=f"i{n}", time=61.0 * n, user="u1", item="p9") for n in range(2)]
        >>> join.steps(shown, join.codes(shown), np.array([7, 8]))[["event", "payload", "label"]]
        array([(1, 7, 0.)], dtype=...)
        """
        if not len(events):
            return np.empty(0, dtype=CLOSED)
        some: Any = events
        try:
            names = [event.id if type(event) is Impression else event.impression_id for event in some]
            times = np.fromiter(map(_time_of, some), dtype=np.float64, count=len(some))
        except AttributeError:  # labeled examples, or kinds of impressions
            some = [None if isinstance(event, Labeled) else event for event in events]
            names = [_id_of(event) for event in some]
            times = np.array([0.0 if event is None else event.time for event in some], dtype=np.float64)
        data, cuts = packed(names)
        values = _NO_VALUES
        if self._rules.valued:
            values = np.array([getattr(event, "value", None) for event in some], dtype=np.float64)  # None is nan
        done, parts = 0, []
        closed = np.empty(2 * len(events) + 64, dtype=CLOSED)
        while True:
            done, count = kernel.advance(done, data, cuts, times, codes, payloads, values, at_once, self._map(), closed)
            parts.append(closed[:count])
            if done == len(events):
                return parts[0] if len(parts) == 1 else np.concatenate(parts)
            closed = self._room(len(events) - done)

    def drain(self) -> Sequence[Closed]:
        """Close all that is open as if the watermark were infinite, in closing order.

        For the end of a stream: what is still open has had no full window. Early feedback is given up as unmatched.
        The watermark stays, and the stream may go on.
        """
        return self._given_back(self._drained())

    def _drained(self) -> NDArray[Any]:
        closed = np.empty((self.pending + 1) * len(self._rules.widths), dtype=CLOSED)
        count = kernel.close_all(self._map(), closed)
        return closed[:count]

    def _map(self) -> NDArray[np.int64]:
        """Where the loops find what is remembered; good until that moves."""
        if self._pointers is None:
            opens = self._opens, self._open_table, self._recent, self._queues
            earlies = self._earlies, self._early_table, self._expiring
            kept = self._rules.table, self._rules.spans, self._extras, self._early_values
            arrays = self._rules.widths, self._times, self._numbers, *opens, *earlies, self._few, *kept
            self._pointers = pointers_to(arrays, self._rules.columns, min(self.capacity, 2**62))
        return self._pointers

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pointers": None}  # a copy has memory of its own

    def _room(self, more: int) -> NDArray[Any]:
        """Free rows for `more` impressions and as much feedback, and records for what they may close."""
        numbers, self._pointers = self._numbers, None
        if numbers[kernel.OPENED] + more > len(self._opens):
            size = self._growth(int(numbers[kernel.OPENED]), more, len(self._opens))
            self._opens, self._open_table, self._recent = larger(self._opens, self._open_table, self._recent, size)
            numbers[kernel.FREE_OPEN] = chained(self._opens, int(numbers[kernel.FREE_OPEN]), size)
            extras = np.zeros((len(self._opens), self._rules.columns))
            extras[: len(self._extras)] = self._extras
            self._extras = extras
        if numbers[kernel.WAITING] + more > len(self._earlies):
            size = self._growth(int(numbers[kernel.WAITING]), more, len(self._earlies))
            self._earlies, self._early_table, self._expiring = larger(
                self._earlies, self._early_table, self._expiring, size
            )
            numbers[kernel.FREE_EARLY] = chained(self._earlies, int(numbers[kernel.FREE_EARLY]), size)
            self._early_values = np.append(self._early_values, np.full(size, nan))
        return np.empty(2 * more + 2 * MOST_KINDS + 2 + max(0, self.pending + more - self.capacity), dtype=CLOSED)

    def _growth(self, used: int, more: int, rows: int) -> int:
        """How many rows to add to these: to double them, but not far beyond what can ever be used."""
        doubled = 1 << (used + more).bit_length()
        return min(doubled, max(used, self.capacity) + max(more, _SPARE) - rows)

    def _number(self, payload: Any) -> int:
        if type(payload) is int and 0 <= payload < 2**63:
            return payload
        self._lowest -= 1
        self._objects[self._lowest] = payload
        return self._lowest

    def _payload(self, number: int, last: bool) -> Any:
        if number >= 0:
            return number
        return self._objects.pop(number) if last else self._objects[number]

    def hand_over(self, hold: Callable[[Sequence[Any]], Sequence[int] | NDArray[np.int64]]) -> None:
        """Let `hold` take the payloads that are no numbers, all in one call; what it returns, a number from 0 on for
        each, stands for them from now on. Where there are none, it is not called.

        So what `push` has left open goes on with `step`.

        >>> join = LabelJoin(windows={"click": 60.0})
        >>> join.push([Impression(id="i1", time=0.0, user="u1", item="p9")])
        []
        >>> join.hand_over(lambda shown: [7 for one in shown])
        >>> join.drain()
        [Closed(payload=7, kind='click', label=0.0, time=0.0, last=True, weight=1.0, corrects=False)]
        """
        if not self._objects:
            return
        payloads = dict(zip(self._objects, np.asarray(hold([*self._objects.values()])).tolist(), strict=True))
        column = self._opens["payload"]
        for row in np.flatnonzero(column < 0).tolist():  # rows that are free may hold old ones: nobody reads them
            column[row] = payloads.get(int(column[row]), 0)
        self._objects.clear()

    def forget(self, payloads: Sequence[int] | NDArray[np.int64]) -> None:
        """Let go of the impressions that these numbers stand for, without a label. They do not come back."""
        state: Any = self.state_dict()
        gone = np.isin(state["payloads"], payloads)
        queues = np.repeat(np.arange(len(state["stages"])), state["stages"])
        stages = np.bincount(queues[~gone], minlength=len(state["stages"]))
        rows = {name: state[name][~gone] for name in ("keys", "times", "payloads", "positive", "extras")}
        self.load_state_dict({**state, **rows, "stages": stages})

    def _given_back(self, closed: NDArray[Any]) -> list[Closed]:
        kinds = (*self.kinds, "")  # the last is that of -1
        return [
            _closed(
                Closed,
                (self._payload(number, last), kinds[kind], label, time, last, weight, what == kernel.CORRECTION),
            )
            for _, number, time, kind, label, last, weight, what in closed.tolist()
        ]

    def _labels(self, closed: NDArray[Any]) -> list[Labeled]:
        usual = len(self._rules.widths) == 1 and not self._rules.valued
        if usual and len(closed) and closed["payload"].max() < 0 and closed["kind"].min() >= 0:
            payloads, labels = closed["payload"].tolist(), closed["label"].tolist()  # the usual case: all is last
            return [
                Labeled(shown, label, self.kinds[0])
                for shown, label in zip(map(self._objects.pop, payloads), labels, strict=True)
            ]
        given = self._given_back(closed)
        return [Labeled(shown, label, kind, weight) for shown, kind, label, _, _, weight, _ in given if kind]

    def state_dict(self) -> State:
        """The open impressions with their payloads, the early feedback, the watermark and the counts.

        Raises `ConfigError` where payloads are neither all 64-bit integers nor all `Impression`s.
        """
        opens, earlies, numbers = self._opens, self._earlies, self._numbers
        recent = self._recent[: numbers[kernel.RECENT]]
        queued, lengths = kernel.in_queues(self._queues, opens)
        rows = np.concatenate([queued, recent[np.lexsort((opens["arrival"][recent], opens["time"][recent]))]])
        held = opens[rows]
        waiting = self._expiring[: numbers[kernel.WAITING]]
        waiting = waiting[np.lexsort((earlies["arrival"][waiting], earlies["time"][waiting]))]
        early = earlies[waiting]
        payloads = held["payload"].copy()
        return {
            "windows": dict(self.windows),
            "rules": self._rules.told,
            "corrected": self.corrected,
            "watermark": float(self._times[0]),
            "counts": dict(self.counts),
            "keys": np.stack([held["high"], held["low"]], axis=1),  # uint64 (open, 2)
            "times": held["time"].copy(),  # (open,)
            "payloads": pack([self._payload(number, False) for number in payloads.tolist()])
            if len(payloads) and payloads.min() < 0
            else payloads,
            "stages": np.append(lengths, len(recent)),  # (kinds + 1,) or one more, of those kept: how many in each
            "extras": self._extras[rows],  # float64 (open, columns): first times and values
            "positive": held["positive"].copy(),  # int64 (open,): bits
            "early": {
                "keys": np.stack([early["high"], early["low"]], axis=1),
                "times": early["time"].copy(),
                "kinds": early["kind"].copy(),  # places in the order of closing
                "values": self._early_values[waiting],
            },
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from what `state_dict` cut; other `lateness` and `capacity` hold from the next event.

        Raises `ConfigError` where it was cut with other windows.
        """
        windows, rules = dict(state["windows"]), state["rules"]
        if windows != self.windows or rules != self._rules.told:
            raise ConfigError(
                f"the state was cut with windows={windows!r} and {rules!r}, this join has windows={self.windows!r} and "
                f"{self._rules.told!r}: build it with the windows of the state, or start it without one"
            )
        held, early, payloads = np.asarray(state["times"]), state["early"], unpack(state["payloads"])
        count, waiting = len(held), len(early["times"])
        self._clear(max(_SMALLEST, 2 * count), max(_SMALLEST, 2 * waiting))
        self._times[0] = state["watermark"]
        numbers = self._numbers
        numbers[: len(kernel.REASONS)] = [state["counts"].get(reason, 0) for reason in kernel.REASONS]
        numbers[kernel.CORRECTED] = state["corrected"]
        self._extras[:count] = state["extras"]
        opens = self._opens
        opens["time"][:count] = held
        opens["high"][:count], opens["low"][:count] = np.asarray(state["keys"]).T
        opens["arrival"][:count] = np.arange(1, count + 1)
        opens["payload"][:count] = [self._number(payload) for payload in payloads]
        opens["positive"][:count] = state["positive"]
        lengths = np.asarray(state["stages"])
        ends = np.cumsum(lengths)
        for kind, (begin, end) in enumerate(zip(ends - lengths, ends, strict=True)):
            rows = np.arange(begin, end)
            if kind == len(self._rules.widths):  # sorted, so a heap
                self._recent[: len(rows)] = rows
                opens["place"][rows] = np.arange(len(rows))
            elif len(rows):
                opens["next"][rows] = [*rows[1:], -1]
                opens["stage"][rows] = kind
                self._queues[kind] = begin, end - 1
        put_all(np.arange(count), self._open_table, opens)
        numbers[[kernel.OPENED, kernel.RECENT, kernel.FREE_OPEN]] = count, lengths[-1], count
        # the feedback that waited, again as it came: in order of time, so that it expires as it would have
        keys, times, kinds = np.asarray(early["keys"]), np.asarray(early["times"]), np.asarray(early["kinds"])
        numbers[kernel.ARRIVALS] = count
        held_back = numbers, self._earlies, self._early_table, self._expiring
        kernel.keep_all(keys, times, kinds, np.asarray(early["values"]), self._early_values, *held_back)


_NO_VALUES = np.empty(0)


def _id_of(event: Impression | Feedback | None) -> str:
    """The id of an event's impression."""
    if event is None:
        return ""
    return event.impression_id if isinstance(event, Feedback) else event.id


def event_codes(events: Sequence[Event], codes: Mapping[str, int]) -> NDArray[np.int64]:
    """See `LabelJoin.codes`; `codes`: by kind of feedback."""
    known: list[int]
    if {*map(type, events)} <= _USUAL:
        plain: Any = events
        known = [SHOWN if type(event) is Impression else codes.get(event.kind, UNKNOWN) for event in plain]
    else:
        known = [
            SHOWN
            if isinstance(event, Impression)
            else codes.get(event.kind, UNKNOWN)
            if isinstance(event, Feedback)
            else PASSED
            for event in events
        ]
    return np.array(known, dtype=np.int64)
