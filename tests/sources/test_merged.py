"""Several sources as one: in event time, the same each time, and no one stopped by one that stands still."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec.errors import SourceError
from streamrec.events import DeadLetter, Item, encode_event
from streamrec.sources import Memory, Merged, Push
from streamrec.testing import check_source


def click(time: float, id: str = "f") -> sr.Feedback:
    return sr.Feedback(id, "i1", time)


def lane(name: str, times: Sequence[float | None]) -> list[Item]:
    """Events at these times; None is a dead letter."""
    return [
        DeadLetter({"n": n}, f"{name}{n}") if time is None else click(time, f"{name}{n}")
        for n, time in enumerate(times)
    ]


def rest(source: Any, limit: int = 100) -> list[Item]:
    items: list[Item] = []
    while more := source.read(limit):
        items += more
    return items


def by_definition(lanes: Sequence[Sequence[Item]]) -> list[Item]:
    """The ten lines that are obviously right: each item at the newest time of its source so far, then a stable sort."""
    placed = []
    for number, items in enumerate(lanes):
        newest = float("-inf")
        for item in items:
            if isinstance(item, sr.Feedback):
                newest = max(newest, item.time)
            placed.append((newest, number, item))
    return [item for _, _, item in sorted(placed, key=lambda one: one[:2])]


times = st.lists(st.one_of(st.none(), st.integers(0, 12).map(float)), max_size=9)


@settings(max_examples=150, deadline=None)
@given(st.lists(times, min_size=1, max_size=4), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_the_order_is_that_of_event_time_however_it_is_read_and_resumed(
    all_times: list[list[float | None]], limits: list[int], data: st.DataObject
) -> None:
    lanes = [lane("abcd"[n], some) for n, some in enumerate(all_times)]

    def new() -> Merged:
        return Merged({"abcd"[n]: Memory(items) for n, items in enumerate(lanes)})

    source, found, step = new(), [], 0
    while items := source.read(limits[step % len(limits)]):
        found += items
        step += 1
        if data.draw(st.booleans()):
            saved = json.dumps(source.position())
            source = new()
            source.seek(json.loads(saved))
    assert found == by_definition(lanes)
    assert source.idle == []


def test_contract(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(encode_event(click(n)) + b"\n" for n in (1.0, 5.0, 4.0, 9.0)) + b"{\n")
    check_source(
        lambda: Merged(
            {
                "file": sr.JsonLines(tmp_path / "a.jsonl"),
                "followed": sr.JsonLines(tmp_path / "a.jsonl", follow=True, idle=0.0),
                "memory": Memory(lane("m", [2.0, None, 3.0, 4.0, 4.0])),
            }
        )
    )


class Shuffled(Memory):
    """Gives its items in another order after each seek, as the partitions of a topic do."""

    repeatable = False

    def __init__(self, items: Sequence[Item]) -> None:
        super().__init__(items)
        self.given: list[int] = []
        self.turns = 0

    def read(self, limit: int) -> list[Item]:
        left = [n for n in range(len(self)) if n not in self.given]
        chosen = left[::-1][:limit] if self.turns % 2 else left[:limit]
        self.given += chosen
        return [self._items[n] for n in chosen]

    def position(self) -> Any:
        return {"given": sorted(self.given)}

    def seek(self, position: Any) -> None:
        self.given = list(position["given"])
        self.turns += 1


def test_a_source_that_cannot_repeat_loses_and_doubles_nothing() -> None:
    items = lane("s", [float(n) for n in range(12)])
    source = Merged({"shuffled": Shuffled(items), "other": Memory(lane("o", [3.0, 6.0, 20.0]))})
    found: list[Item] = []
    while more := source.read(2):
        found += more
        source.seek(json.loads(json.dumps(source.position())))
    assert sorted(event.id for event in found) == sorted(  # type: ignore[union-attr]
        event.id
        for event in [*items, *lane("o", [3.0, 6.0, 20.0])]  # type: ignore[union-attr]
    )


def test_a_source_that_stalls_holds_the_others_up_only_so_long() -> None:
    slow, quick = Push(), Push()
    now = 0.0
    source = Merged({"slow": slow, "quick": quick}, stall=5.0, clock=lambda: now)
    quick.put([click(1.0, "q1"), click(2.0, "q2")])
    assert not source.wait(0.0)  # the slow one may have something earlier
    slow.put(click(1.5, "s1"))
    assert [event.id for event in source.read(10)] == ["q1", "s1"]  # type: ignore[union-attr]
    assert source.watermarks == {"slow": 1.5, "quick": 1.0}
    now = 4.9
    assert not source.wait(0.0)
    now = 5.0
    assert [event.id for event in source.read(10)] == ["q2"]  # type: ignore[union-attr]
    assert source.idle == ["slow"]
    quick.put(click(3.0, "q3"))
    assert source.wait(0.0) and [event.id for event in source.read(10)] == ["q3"]  # type: ignore[union-attr]
    slow.put([click(1.6, "s2"), click(4.0, "s3")])
    assert [event.id for event in source.read(10)] == ["s2"]  # type: ignore[union-attr]  # late, and at once
    assert source.idle == []
    quick.close()  # what has ended holds nobody up
    assert [event.id for event in source.read(10)] == ["s3"]  # type: ignore[union-attr]
    slow.close()
    assert source.read(10) == []


def test_closing_ends_a_read_that_waits() -> None:
    source = Merged({"a": Push(), "b": Push()})
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(source.read(5)))
    reader.start()
    source.close()
    reader.join(timeout=30)
    assert found == [[]]


def test_what_is_kept_is_released(tmp_path: Path) -> None:
    kept = Push(log=tmp_path, segment=1, idle=0.0)
    kept.put([click(1.0)])
    kept.put([click(2.0)])
    source = Merged({"kept": kept, "memory": Memory([click(3.0)])})
    assert len(source.read(2)) == 2
    source.release(source.position())
    assert len(list(tmp_path.glob("*.jsonl"))) == 1
    assert rest(source) == [click(3.0)]


def test_what_it_refuses() -> None:
    for words, sources, stall in (
        ("one at least", {}, 1.0),
        ("mapping of name to source", {"a": 3}, 1.0),
        ("stall must", {"a": Memory([])}, -1.0),
    ):
        with pytest.raises(sr.ConfigError, match=words):
            Merged(sources, stall=stall)  # type: ignore[arg-type]
    source = Merged({"a": Memory([click(1.0)])})
    for words, position in (
        ("names the source 'b'", {"b": {}}),
        ("no position", {"a": {"at": {"index": 0}}}),
        ("fewer items than before", {"a": {"at": {"index": 0}, "skip": 2, "watermark": 1.0}}),
    ):
        with pytest.raises(sr.SourceError, match=words):
            source.seek(position)
    source = Merged({"a": Memory([click(1.0)]), "new": Memory([click(0.0)])})
    source.seek({"a": {"at": {"index": 1}, "skip": 0, "watermark": 1.0}})
    assert source.fraction() == 0.5 and rest(source) == [click(0.0)]


def test_with_closes_the_sources_and_its_end_does_not() -> None:
    clicks = sr.Push(capacity=10)
    merged = Merged({"clicks": clicks})
    del merged  # whoever made the source may still hand events in
    clicks.put(sr.Feedback("c1", "i1", 1.0))
    with Merged({"clicks": clicks}) as again:
        assert [item.id for item in again.read(10) if isinstance(item, sr.Feedback)] == ["c1"]
    with pytest.raises(SourceError, match="closed"):
        clicks.put(sr.Feedback("c2", "i1", 2.0))


def test_events_keep_the_lines_they_were_read_from(tmp_path: Path) -> None:
    logs = {}
    for name, times in (("a", (1.0, 4.0)), ("b", (2.0, 3.0))):
        (tmp_path / name).write_bytes(b"".join(encode_event(one) + b"\n" for one in lane(name, times)))
        logs[name] = sr.JsonLines(tmp_path / name)
    items: Any = Merged(logs).read(10)
    assert [item.id for item in items] == ["a0", "b0", "b1", "a1"]
    assert items.lines == [encode_event(item) for item in items]
    mixed: Any = Merged({"a": sr.JsonLines(tmp_path / "a"), "c": Memory(lane("c", (2.0,)))}).read(10)
    assert len(mixed) == 3 and not hasattr(mixed, "lines")
