"""Impressions and their late feedback, joined by event time."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import chain
from math import inf, nan
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamrec.errors import ConfigError
from streamrec.events import Event, Feedback, Impression, Labeled
from streamrec.protocols import State

__all__ = ["Closed", "LabelJoin"]

_FOREVER = 1e300
"""Times and windows stay below it, so that their sums stay finite."""

_REASONS = (
    "late_impression",
    "late_feedback",
    "duplicate_impression",
    "evicted_impression",
    "evicted_feedback",
    "outside_window",
    "repeated",
    "unknown_kind",
    "unmatched",
)


class Closed(NamedTuple):
    """What `LabelJoin.step` gives back for a payload: its label of one kind, or word that no label will come.

    `label` is 1.0 or 0.0. Where an impression was let go without a label, `kind` is "" and `label` is nan.
    `time` is the impression's. After `last` the payload does not come back: free what it stands for.
    """

    payload: Any
    kind: str
    label: float
    time: float
    last: bool


class _Wait(NamedTuple):
    """The impressions whose next window to close is that of `kind`, in order of time."""

    queue: deque[_Open]
    window: float
    kind: str
    bit: int
    then: deque[_Open] | None  # where they wait next; None: this is their last window


_Open = tuple[float, int, str, Any]  # time, arrival, id, payload: in this order, for the heap
_Early = tuple[float, int, str, str]  # time, arrival, impression id, kind
_closed = tuple.__new__  # NamedTuple's own constructor takes twice the time
_NONE: tuple[Closed, ...] = ()


class LabelJoin:
    """Wait for the feedback on each impression; label it 1.0 or 0.0 when its attribution window closes.

    `windows`: by kind of feedback, seconds of event time; feedback counts where
    `impression.time <= feedback.time <= impression.time + window`. Each kind gives a label of its own.
    `lateness`: seconds the watermark trails the newest event. An event behind the watermark is late and dropped; one
    from far in the future takes the watermark along, so check times first.
    `capacity`: impressions held at most; past that the one that closes first is let go without a label, for a label
    cut short would be a false negative. Early feedback, which waits for its impression, is held to the same number.

    A label comes out when its window closes, a positive one too. Were clicks learned at once and their absence a
    window later, the model would always have seen too many clicks.

    Labels come in order of closing time, then of impression time, then of arrival. Raises `ConfigError` for settings
    that cannot work.

    >>> join = LabelJoin(windows={"click": 60.0})
    >>> shown = [Impression(id=f"i{n}", time=float(n), user="u1", item="p9") for n in range(2)]
    >>> join.push([*shown, Feedback(id="f1", impression_id="i1", time=5.0)])
    []
    >>> later = Impression(id="i2", time=90.0, user="u2", item="p9")
    >>> [(labeled.impression.id, labeled.label) for labeled in join.push([later])]
    [('i0', 0.0), ('i1', 1.0)]
    >>> join.pending, join.watermark
    (1, 90.0)

    What holds impressions elsewhere, under a number, uses `step` and `drain` instead of `push` and `flush`.
    """

    def __init__(self, *, windows: Mapping[str, float], lateness: float = 0.0, capacity: int = 1_000_000) -> None:
        if not isinstance(windows, Mapping) or not windows:
            raise ConfigError(f'windows must map kinds to seconds, such as {{"click": 1800.0}}, got {windows!r}')
        for kind, window in windows.items():
            if not isinstance(kind, str) or not kind:
                raise ConfigError(f"windows must be keyed by the kind of feedback, a string, got {kind!r}")
            if not 0.0 < window < _FOREVER:
                raise ConfigError(f"the window of {kind!r} must be > 0 seconds and finite, got {window!r}")
        if not 0.0 <= lateness < _FOREVER:
            raise ConfigError(f"lateness must be >= 0 seconds and finite, got {lateness!r}")
        if not capacity >= 1:
            raise ConfigError(f"capacity must be >= 1, got {capacity!r}")
        self.windows: Mapping[str, float] = {kind: float(window) for kind, window in windows.items()}
        self.lateness = float(lateness)
        self.capacity = capacity

        # In order of closing, whatever the order of the mapping.
        self._kinds = sorted(self.windows, key=lambda kind: (self.windows[kind], kind))
        self._rules = {kind: (1 << index, self.windows[kind]) for index, kind in enumerate(self._kinds)}
        self._watermark = -_FOREVER
        self._counts = dict.fromkeys(_REASONS, 0)
        self._arrivals = 0
        # An open impression is first in `_recent`; behind the watermark, where none can come before it any more, it
        # goes to a plain queue. So the heap is as small as the lateness, however long the windows are.
        self._shown: dict[str, float] = {}  # the time of each open impression
        self._positive: dict[str, int] = {}  # the kinds it has feedback of, as bits
        self._recent: list[_Open] = []
        self._queues: list[deque[_Open]] = [deque() for _ in self._kinds]
        self._waits = self._lay_out()
        self._early: dict[str, dict[int, _Early]] = {}  # by impression, by arrival
        self._early_total = 0
        self._expiring: list[_Early] = []  # a heap; matched feedback stays in it until it expires or is swept

    def __repr__(self) -> str:
        return f"LabelJoin(windows={self.windows!r}, lateness={self.lateness!r}, capacity={self.capacity!r})"

    @property
    def pending(self) -> int:
        """How many impressions are open."""
        return len(self._shown)

    @property
    def watermark(self) -> float:
        """The event time believed complete: `lateness` behind the newest event, -inf before the first."""
        return self._watermark if self._watermark > -_FOREVER else -inf

    @property
    def counts(self) -> Mapping[str, int]:
        """How many events were dropped, by reason; every reason is there from the start.

        Impressions: `late_impression`, `duplicate_impression` (its id is open), `evicted_impression`.
        Feedback: `late_feedback`, `unknown_kind` (no window for it), `outside_window`, `repeated` (a second of its
        kind on one impression), `unmatched` (its impression did not come, or is gone), `evicted_feedback`.
        """
        return dict(self._counts)

    def push(self, events: Sequence[Event]) -> list[Labeled]:
        """Take impressions and feedback; return what their event time closes. `Labeled` items pass in their place."""
        labeled: list[Labeled] = []
        for event in events:
            if isinstance(event, Labeled):
                labeled.append(event)
            else:
                closed = self.step(event, event)
                if closed:
                    labeled += _labels(closed)
        return labeled

    def flush(self) -> list[Labeled]:
        """Close all that is open, at the end of a stream; see `drain`."""
        return _labels(self.drain())

    def step(self, event: Impression | Feedback, payload: Any = None) -> Sequence[Closed]:
        """Take one event; return what its time closes: labels to learn before the event itself is scored.

        `payload` stands for an impression until its last label; feedback has none. To be saved, payloads must be all
        64-bit integers or all `Impression`s. Each comes back with `last` exactly once: with its last label or, where
        it was refused (late, duplicate) or evicted, in a `Closed` of kind "" after the labels.

        >>> join = LabelJoin(windows={"click": 60.0})
        >>> join.step(Impression(id="i1", time=0.0, user="u1", item="p9"), 7)
        ()
        >>> join.step(Feedback(id="f1", impression_id="i1", time=61.0))
        [Closed(payload=7, kind='click', label=0.0, time=0.0, last=True)]
        >>> join.step(Impression(id="i2", time=1.0, user="u1", item="p9"), 8)  # late
        [Closed(payload=8, kind='', label=nan, time=1.0, last=True)]
        """
        time = event.time
        if not self._watermark <= time < _FOREVER:  # so nan is late too
            if isinstance(event, Impression):
                self._counts["late_impression"] += 1
                return [Closed(payload, "", nan, time, True)]
            self._counts["late_feedback"] += 1
            return _NONE

        closed: Sequence[Closed] = _NONE
        watermark = time - self.lateness
        if watermark > self._watermark:
            self._watermark = watermark
            closed = self._close(watermark)

        if isinstance(event, Impression):
            id = event.id
            if id in self._shown:
                self._counts["duplicate_impression"] += 1
                return [*closed, Closed(payload, "", nan, time, True)]
            self._shown[id] = time
            self._arrivals = arrival = self._arrivals + 1
            heappush(self._recent, (time, arrival, id, payload))
            if id in self._early:
                self._match(id, time)
            if len(self._shown) > self.capacity:
                return [*closed, *self._evict()]
            return closed

        kind = event.kind
        if kind not in self._rules:
            self._counts["unknown_kind"] += 1
            return closed
        id = event.impression_id
        shown = self._shown.get(id)
        if shown is None:
            self._keep(id, time, kind)
        else:
            self._note(id, shown, time, kind)
        return closed

    def drain(self) -> Sequence[Closed]:
        """Close all that is open as if the watermark were infinite, in closing order.

        For the end of a stream: what is still open has had no full window. Early feedback is given up as unmatched.
        The watermark stays, and the stream may go on.
        """
        return self._close(inf)

    def state_dict(self) -> State:
        """The open impressions with their payloads, the early feedback, the watermark and the counts.

        Raises `ConfigError` where payloads are neither all 64-bit integers nor all `Impression`s.
        """
        stages = [*self._queues, sorted(self._recent)]
        held = list(chain.from_iterable(stages))
        bits = [self._positive.get(id, 0) for _, _, id, _ in held]
        early = sorted(waiting for by_arrival in self._early.values() for waiting in by_arrival.values())
        return {
            "windows": dict(self.windows),
            "watermark": self._watermark,
            "counts": dict(self._counts),
            "ids": [id for _, _, id, _ in held],
            "times": np.array([time for time, _, _, _ in held], dtype=np.float64),  # (open,)
            "payloads": _pack([payload for _, _, _, payload in held]),
            "stages": np.array([len(stage) for stage in stages], dtype=np.int64),  # (kinds + 1,): open in each
            "positive": np.array([[b >> k & 1 for k in range(len(self._kinds))] for b in bits], dtype=np.bool_).reshape(
                len(held), len(self._kinds)
            ),
            "early": {
                "impression_ids": [id for _, _, id, _ in early],
                "times": np.array([time for time, _, _, _ in early], dtype=np.float64),
                "kinds": [kind for _, _, _, kind in early],
            },
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from what `state_dict` cut; other `lateness` and `capacity` hold from the next event.

        Raises `ConfigError` where it was cut with other windows.
        """
        windows = dict(state["windows"])
        if windows != self.windows:
            raise ConfigError(
                f"the state was cut with windows={windows!r}, this join has windows={self.windows!r}: "
                "build it with the windows of the state, or start it without one"
            )
        ids, times, payloads = state["ids"], state["times"].tolist(), _unpack(state["payloads"])
        bits = [sum(1 << k for k, there in enumerate(row) if there) for row in state["positive"].tolist()]
        held = iter(list(zip(times, range(1, len(ids) + 1), ids, payloads, strict=True)))
        stages = [[next(held) for _ in range(length)] for length in state["stages"].tolist()]
        early = state["early"]
        expiring = list(
            zip(
                early["times"].tolist(),
                range(len(ids) + 1, len(ids) + len(early["kinds"]) + 1),
                early["impression_ids"],
                early["kinds"],
                strict=True,
            )
        )
        by_impression: dict[str, dict[int, _Early]] = {}
        for waiting in expiring:
            by_impression.setdefault(waiting[2], {})[waiting[1]] = waiting

        self._watermark = float(state["watermark"])
        self._counts = {**dict.fromkeys(_REASONS, 0), **state["counts"]}
        self._arrivals = len(ids) + len(expiring)
        self._shown = dict(zip(ids, times, strict=True))
        self._positive = {id: b for id, b in zip(ids, bits, strict=True) if b}
        self._recent = stages.pop()  # sorted, so a heap
        self._queues = [deque(stage) for stage in stages]
        self._waits = self._lay_out()
        self._early = by_impression
        self._early_total = len(expiring)
        self._expiring = expiring

    def _lay_out(self) -> list[_Wait]:
        """The widest window first: where two close at one time, the impression there is the older one."""
        queues = self._queues
        return [
            _Wait(queue, self.windows[kind], kind, self._rules[kind][0], then)
            for kind, queue, then in zip(self._kinds, queues, [*queues[1:], None], strict=True)
        ][::-1]

    def _close(self, watermark: float) -> Sequence[Closed]:
        recent, first = self._recent, self._queues[0]
        while recent and recent[0][0] < watermark:
            first.append(heappop(recent))
        expiring = self._expiring
        while expiring and expiring[0][0] < watermark:
            self._counts["unmatched"] += self._forget()

        closed: list[Closed] = []
        while True:
            at, due = watermark, None
            for wait in self._waits:
                queue = wait[0]
                if queue and (closing := queue[0][0] + wait[1]) < at:
                    at, due = closing, wait
            if due is None:
                return closed or _NONE
            queue, _, kind, bit, then = due
            opened = queue.popleft()
            time, _, id, payload = opened
            if then is None:
                del self._shown[id]
                bits = self._positive.pop(id, 0)
            else:
                then.append(opened)
                bits = self._positive.get(id, 0)
            closed.append(_closed(Closed, (payload, kind, 1.0 if bits & bit else 0.0, time, then is None)))

    def _note(self, id: str, shown: float, time: float, kind: str) -> None:
        bit, window = self._rules[kind]
        bits = self._positive.get(id, 0)
        if not shown <= time <= shown + window:
            self._counts["outside_window"] += 1
        elif bits & bit:
            self._counts["repeated"] += 1
        else:
            self._positive[id] = bits | bit

    def _evict(self) -> list[Closed]:
        gone: list[Closed] = []
        while len(self._shown) > self.capacity:
            at, due = inf, None
            for wait in self._waits:
                if wait.queue and (closing := wait.queue[0][0] + wait.window) < at:
                    at, due = closing, wait.queue
            recent = self._recent
            if due is None or (recent and recent[0][0] + self._waits[-1].window < at):
                time, _, id, payload = heappop(recent)
            else:
                time, _, id, payload = due.popleft()
            del self._shown[id]
            self._positive.pop(id, None)
            self._counts["evicted_impression"] += 1
            gone.append(Closed(payload, "", nan, time, True))
        return gone

    def _keep(self, id: str, time: float, kind: str) -> None:
        self._arrivals += 1
        early = (time, self._arrivals, id, kind)
        self._early.setdefault(id, {})[self._arrivals] = early
        heappush(self._expiring, early)
        self._early_total += 1
        while self._early_total > self.capacity:
            self._counts["evicted_feedback"] += self._forget()

    def _match(self, id: str, shown: float) -> None:
        matched = self._early.pop(id)
        for time, _, _, kind in matched.values():
            self._note(id, shown, time, kind)
        self._early_total -= len(matched)
        if len(self._expiring) > 2 * self._early_total + 64:  # more matched than waiting: sweep
            self._expiring[:] = [early for waiting in self._early.values() for early in waiting.values()]
            heapify(self._expiring)

    def _forget(self) -> int:
        """Take the oldest early feedback off the heap: 1 if it still waited, 0 if it was matched long since."""
        _, arrival, id, _ = heappop(self._expiring)
        waiting = self._early.get(id)
        if waiting is None or waiting.pop(arrival, None) is None:
            return 0
        if not waiting:
            del self._early[id]
        self._early_total -= 1
        return 1


def _labels(closed: Sequence[Closed]) -> list[Labeled]:
    return [Labeled(impression, label, kind) for impression, kind, label, _, _ in closed if kind]


def _pack(payloads: list[Any]) -> NDArray[np.int64] | bytes:
    if all(isinstance(payload, (int, np.integer)) for payload in payloads):
        return np.array(payloads, dtype=np.int64)
    if all(isinstance(payload, Impression) for payload in payloads):
        # MessagePack: JSON would turn the nan of a feature into null.
        return msgspec.msgpack.encode(payloads, enc_hook=_plain)
    found = ", ".join(sorted({type(payload).__name__ for payload in payloads}))
    raise ConfigError(f"payloads must be all 64-bit integers or all Impressions to be saved, got {found}")


def _unpack(packed: NDArray[np.int64] | bytes) -> list[Any]:
    if isinstance(packed, bytes):
        return msgspec.msgpack.decode(packed, type=list[Impression])
    unpacked: list[Any] = packed.tolist()
    return unpacked


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):  # a feature straight from a computation
        return value.tolist()
    raise TypeError(f"cannot save a feature of type {type(value).__name__}: use strings, numbers, lists or mappings")
