"""The contracts must catch parts that are broken on purpose: a check that cannot fail checks nothing."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from streamrec.events import Event, Feedback, Impression, Item
from streamrec.preprocessors.dedup import Dedup
from streamrec.preprocessors.filter import Filter
from streamrec.sources import Memory
from streamrec.testing import check_source, check_stage
from streamrec.testing._state import check_state_is_plain, copy_state, first_difference, same_state

EVENTS: list[Event] = [Feedback(id=str(n % 13), impression_id="i1", time=float(n)) for n in range(60)]


# Sources: each is a right one with one thing wrong.


class NoSeek:
    read = Memory([]).read
    position = Memory([]).position


class Overfull(Memory):
    def read(self, limit: int) -> list[Item]:
        return super().read(limit + 1)


class NoList(Memory):
    def read(self, limit: int) -> Any:
        return tuple(super().read(limit))


class RawLines(Memory):
    def read(self, limit: int) -> Any:
        return [msgspec.json.encode(item) for item in super().read(limit)]


class AtTheBatch(Memory):
    """Its position is that of the last full batch of four."""

    def position(self) -> Mapping[str, Any]:
        return {"index": self._index // 4 * 4}


class ReadAhead(Memory):
    """Its position is that of what it has read ahead."""

    def position(self) -> Mapping[str, Any]:
        return {"index": min(len(self), self._index + 1)}


class SeeksForwardOnly(Memory):
    def seek(self, position: Mapping[str, Any]) -> None:
        self._index = max(self._index, position["index"])


class KeepsReadAhead(Memory):
    """It forgets to drop what it has read ahead when it seeks."""

    def __init__(self, events: Sequence[Item]) -> None:
        super().__init__(events)
        self._ahead: deque[Item] = deque()

    def read(self, limit: int) -> list[Item]:
        if not self._ahead:
            self._ahead.extend(super().read(5))
        return [self._ahead.popleft() for _ in range(min(limit, len(self._ahead)))]

    def position(self) -> Mapping[str, Any]:
        return {"index": self._index - len(self._ahead)}


class LivePosition(Memory):
    """The position it hands out is the one it counts with."""

    def __init__(self, events: Sequence[Item]) -> None:
        super().__init__(events)
        self._live = {"index": 0}

    def position(self) -> Mapping[str, Any]:
        self._live["index"] = self._index
        return self._live

    def read(self, limit: int) -> list[Item]:
        items = super().read(limit)
        self._live["index"] = self._index
        return items


class NoJson(Memory):
    def position(self) -> Mapping[str, Any]:
        return {"index": np.int64(self._index)}


class TuplePosition(Memory):
    def position(self) -> Mapping[str, Any]:
        return {"index": self._index, "at": (1, 2)}


class PositionReads(Memory):
    def position(self) -> Mapping[str, Any]:
        self._index = min(len(self), self._index + 1)
        return {"index": self._index}


class EatsPosition(Memory):
    def seek(self, position: Any) -> None:
        self._index = position.pop("index")


class EndIsNoEnd(Memory):
    """It starts anew after its end."""

    def read(self, limit: int) -> list[Item]:
        items = super().read(limit)
        if not items:
            self._index = 0
        return items


class Endless(Memory):
    def read(self, limit: int) -> list[Item]:
        return list(EVENTS[:limit])


class DependsOnLimit(Memory):
    def read(self, limit: int) -> list[Item]:
        return super().read(limit)[:: 2 if limit == 3 else 1]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (NoSeek, r"has no \['seek'\]"),
        (Overfull, "returned 2 items|returned 60 items|limit"),
        (NoList, "must return a list, got a tuple"),
        (RawLines, "must return Impressions"),
        (AtTheBatch, "resumed at"),
        (ReadAhead, "resumed at"),
        (SeeksForwardOnly, "the same source went"),
        (KeepsReadAhead, "the same source went"),
        (LivePosition, "a position changed"),
        (NoJson, "JSON"),
        (TuplePosition, "comes back from JSON"),
        (PositionReads, "with no read between"),
        (EatsPosition, "seek changed the position"),
        (EndIsNoEnd, "after the empty list"),
        (Endless, "more than 10000 items"),
        (DependsOnLimit, "read with limit 3"),
    ],
)
def test_check_source_catches(broken: Any, words: str) -> None:
    make = broken if broken is NoSeek else lambda: broken(EVENTS)
    with pytest.raises(AssertionError, match=words):
        check_source(make)


def test_check_source_catches_a_source_that_differs_each_time() -> None:
    shift = itertools.count()
    with pytest.raises(AssertionError, match="item 0 should be"):
        check_source(lambda: Memory(EVENTS[next(shift) % 2 :]))


def test_check_source_needs_items_and_takes_nan() -> None:
    with pytest.raises(AssertionError, match="two or more"):
        check_source(lambda: Memory([]))
    check_source(lambda: Memory([Feedback("f", "i", float("nan")), Feedback("g", "i", 1.0)]))


def test_check_source_closes_what_it_opened() -> None:
    standing = Counter[str]()

    class Closing(Memory):
        def __init__(self) -> None:
            super().__init__(EVENTS)
            standing["opened"] += 1

        def close(self) -> None:
            standing["closed"] += 1

    check_source(Closing)
    assert standing["opened"] == standing["closed"] > 0


# Stages.


class Count:
    """A right stage: drops every third event."""

    def __init__(self) -> None:
        self.seen = 0
        self.dropped = 0
        self.log: list[float] = []

    @property
    def counts(self) -> Mapping[str, int]:
        return {"third": self.dropped}

    def push(self, events: Sequence[Event]) -> list[Any]:
        out: list[Any] = []
        for event in events:
            self.seen += 1
            if self.seen % 3:
                out.append(event)
            else:
                self.dropped += 1
                self.log.append(self.seen)
        return out

    def state_dict(self) -> Mapping[str, Any]:
        return {"seen": self.seen, "dropped": self.dropped, "log": list(self.log)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.dropped, self.log = state["seen"], state["dropped"], list(state["log"])


class NoCounts:
    push, state_dict, load_state_dict = Count.push, Count.state_dict, Count.load_state_dict


class PerPush(Count):
    """What it does depends on how the events are cut."""

    def push(self, events: Sequence[Event]) -> list[Any]:
        return [event for index, event in enumerate(events) if index % 3 < 2]


class EmptiesInput(Count):
    def push(self, events: Any) -> list[Any]:
        out = super().push(events)
        events.clear()
        return out


class EditsEvents(Count):
    def push(self, events: Any) -> list[Any]:
        for event in events:
            if isinstance(event, Impression):
                event.features["seen"] = True  # type: ignore[index]
        return super().push(events)


class NoListOut(Count):
    def push(self, events: Sequence[Event]) -> Any:
        return iter(super().push(events))


class SameList(Count):
    def push(self, events: Any) -> list[Any]:
        return events  # type: ignore[no-any-return]


class ForgetsState(Count):
    def state_dict(self) -> Mapping[str, Any]:
        return {"dropped": self.dropped, "log": list(self.log)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.dropped, self.log = state["dropped"], list(state["log"])


class ForgetsCounts(Count):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.log = state["seen"], list(state["log"])


class LiveState(Count):
    def state_dict(self) -> Mapping[str, Any]:
        return {"seen": self.seen, "dropped": self.dropped, "log": self.log}


class KeepsLoaded(Count):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.dropped, self.log = state["seen"], state["dropped"], state["log"]


class SharesWithCopies(Count):
    """What it remembers is found by something that a copy keeps, as an address is."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SharesWithCopies:
        twin = type(self)()
        twin.__dict__ = self.__dict__
        return twin


class AddsToState(Count):
    """Loading adds to what a used stage remembers."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.dropped = state["seen"], state["dropped"]
        self.log += state["log"]


class StateTakesAway(Count):
    """Looking changes it."""

    def state_dict(self) -> Mapping[str, Any]:
        state = super().state_dict()
        self.log.clear()
        return state


class SetState(Count):
    def state_dict(self) -> Mapping[str, Any]:
        return {**super().state_dict(), "ids": {1, 2}}


class EmptyPushCounts(Count):
    def push(self, events: Sequence[Event]) -> list[Any]:
        self.dropped += not events
        return super().push(events)


class CountsNoNumbers(Count):
    @property
    def counts(self) -> Any:
        return {"third": float(self.dropped)}


made = itertools.count()


class Moody(Count):
    """Two of them differ."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = next(made) % 3


@dataclass(frozen=True)
class Scored:
    values: Any


class Nans(Count):
    """A right one whose output holds arrays and nans."""

    def push(self, events: Sequence[Event]) -> list[Any]:
        return [Scored((np.array([np.nan, event.time]), float("nan"))) for event in super().push(events)]


class LastBits(Nans):
    """Its output differs in the last bit when events come one by one."""

    def push(self, events: Sequence[Event]) -> list[Any]:
        tiny = 1.0 if len(events) > 1 else np.nextafter(1.0, 2.0)
        return [Scored(np.array([tiny])) for _ in Count.push(self, events)]


@pytest.mark.parametrize(
    "right", [Count, Nans, lambda: Dedup(ttl=20.0, capacity=9), lambda: Filter(lambda event: True)]
)
def test_check_stage_passes(right: Any) -> None:
    check_stage(right, EVENTS)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (NoCounts, r"has no \['counts'\]"),
        (PerPush, "pushing one by one: "),
        (EmptiesInput, "push changed the list"),
        (EditsEvents, "push changed an event"),
        (NoListOut, "must return a list"),
        (SameList, "the very list"),
        (ForgetsState, "went on from a state"),
        (ForgetsCounts, "counts should be"),
        (LiveState, "changed later"),
        (KeepsLoaded, "changed the state it loaded"),
        (AddsToState, "a used stage that loaded a state"),
        (SharesWithCopies, "the original, while its copy went on"),
        (StateTakesAway, "state_dict called twice"),
        (SetState, r"state\['ids'\] is a set"),
        (EmptyPushCounts, "pushing no events"),
        (CountsNoNumbers, "whole numbers"),
        (Moody, "pushing the same again|the state differs"),
        (LastBits, "pushing one by one: output 0"),
    ],
)
def test_check_stage_catches(broken: Any, words: str) -> None:
    shown = Impression(id="i1", time=0.0, user="u1", item="p1", features={"a": 1})
    with pytest.raises(AssertionError, match=words):
        check_stage(broken, [shown, *EVENTS])


def test_check_stage_needs_events() -> None:
    with pytest.raises(AssertionError, match="two or more"):
        check_stage(Count, EVENTS[:1])


# States.


@pytest.mark.parametrize(
    "state",
    [
        {"a": {"b": [1, 2.0, None, True, "x", b"y", -(2**63), 2**64 - 1]}},
        {"a": np.zeros((2, 3)), "b": np.zeros(0, dtype=bool), "c": float("nan"), "d": {}, "e": []},
        {"a": torch.zeros(2, dtype=torch.bfloat16), "b": [torch.nn.Parameter(torch.zeros(1))]},
    ],
)
def test_plain_states(state: Any) -> None:
    check_state_is_plain(state)
    assert same_state(state, copy_state(state))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ([1], "a mapping with string keys, got a list"),
        ({1: 2}, "has the key 1, a int"),
        ({"a": {"b": {("x", 1): 2}}}, r"state\['a'\]\['b'\] has the key"),
        ({"a": (1, 2)}, "is a tuple.*use a list"),
        ({"a": [deque()]}, r"state\['a'\]\[0\] is a deque"),
        ({"a": np.float64(1.0)}, r"\.item\(\)"),
        ({"a": np.array([object()])}, "numpy array of object"),
        ({"a": np.array(["x"])}, "strings go in a list"),
        ({"a": 2**64}, "64 bits"),
        ({"a": EVENTS[0]}, "is a Feedback"),
    ],
)
def test_states_that_are_not_plain(state: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_state_is_plain(state)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.0), (1, True), (0.0, -0.0), ("x", b"x"), (None, 0), ([1], [1, 2]), ([1, 2], [2, 1]), ({"x": 1}, {}),
        (np.zeros(2), np.zeros(2, np.float32)), (np.zeros(2), np.zeros((2, 1))), (np.zeros(1), -np.zeros(1)),
        (np.zeros(1), [0.0]), (np.array([np.nan]), np.array([1.0])), (torch.zeros(2), torch.zeros(2).double()),
        (torch.zeros(2), torch.zeros(2, 1)), (torch.zeros(1), -torch.zeros(1)),
        (torch.zeros(1), np.zeros(1, np.float32)),
    ],
)  # fmt: skip
def test_states_that_differ(a: Any, b: Any) -> None:
    assert not same_state({"s": a}, {"s": b})
    assert "state['s']" in (first_difference({"s": a}, {"s": b}) or "")
    assert same_state({"s": a}, {"s": copy_state(a)})


def test_states_with_nan_are_the_same_and_copies_share_nothing() -> None:
    state = {"a": np.array([np.nan, 1.0]), "b": float("nan"), "c": torch.tensor([float("nan")]), "d": [{"e": [1]}]}
    copy = copy_state(state)
    assert same_state(state, copy)
    copy["a"][0], copy["c"][0] = 1.0, 1.0
    copy["d"][0]["e"].append(2)
    assert np.isnan(state["a"][0]) and torch.isnan(state["c"][0]) and state["d"] == [{"e": [1]}]
