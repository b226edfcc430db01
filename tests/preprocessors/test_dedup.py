from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamrec.errors import ConfigError
from streamrec.events import Event, Feedback, Impression, Labeled
from streamrec.preprocessors.dedup import Dedup
from streamrec.testing import check_stage


def shown(id: str, time: float) -> Impression:
    return Impression(id=id, time=time, user="u", item="p")


def reference(events: list[Event], ttl: float, capacity: int) -> tuple[list[Event], int, int]:
    """What went on, duplicates and evictions, by a list that is walked through for every event."""
    kept: list[tuple[object, float]] = []
    newest, fresh, duplicates, evicted = float("-inf"), [], 0, 0
    for event in events:
        base = event.impression if isinstance(event, Labeled) else event
        key = (type(event), base.id, event.kind if isinstance(event, Labeled) else "")
        newest = max(newest, base.time)
        while kept and newest - kept[0][1] > ttl:
            kept.pop(0)
        if any(other == key and newest - time <= ttl for other, time in kept):
            duplicates += 1
            continue
        kept = [entry for entry in kept if entry[0] != key]
        fresh.append(event)
        if newest - base.time <= ttl:
            if len(kept) == capacity:
                kept.pop(0)
                evicted += 1
            kept.append((key, base.time))
    return fresh, duplicates, evicted


ids = st.sampled_from("abcde")
times = st.integers(0, 30).map(float)
impressions = st.builds(shown, ids, times)
events = st.one_of(
    impressions,
    st.builds(Feedback, id=ids, impression_id=ids, time=times),
    st.builds(Labeled, impressions, label=st.just(1.0), kind=st.sampled_from(["click", "buy"])),
)


@settings(deadline=None)
@given(st.lists(events, max_size=40), st.integers(1, 20), st.integers(1, 8))
def test_dedup_is_the_walk_through_a_list(stream: list[Event], ttl: float, capacity: int) -> None:
    dedup = Dedup(ttl=ttl, capacity=capacity)
    fresh = [event for one in stream for event in dedup.push([one])]
    assert (fresh, dedup.counts["duplicate"], dedup.evicted) == reference(stream, ttl, capacity)
    whole = Dedup(ttl=ttl, capacity=capacity)
    assert whole.push(stream) == fresh and whole.evicted == dedup.evicted
    assert len(whole) <= capacity


@settings(deadline=None)
@given(st.lists(events, min_size=2, max_size=15), st.integers(1, 20), st.integers(1, 5))
def test_dedup_keeps_the_contract_of_stages(stream: list[Event], ttl: float, capacity: int) -> None:
    check_stage(lambda: Dedup(ttl=ttl, capacity=capacity), stream)


def test_dedup_keeps_the_contract_over_a_longer_stream() -> None:
    rng = random.Random(0)
    stream = [shown(str(rng.randrange(40)), t + rng.uniform(-15, 0)) for t in range(300)]
    check_stage(lambda: Dedup(ttl=20.0, capacity=12), stream)


def test_types_and_kinds_have_ids_of_their_own() -> None:
    one = shown("x", 1.0)
    stream = [one, Feedback("x", "x", 1.0), Labeled(one, 1.0), Labeled(one, 0.0, "buy")]
    dedup = Dedup(ttl=9.0, capacity=9)
    assert dedup.push([*stream, *stream]) == stream
    assert dedup.counts == {"duplicate": 4}
    # where a kind ends and an id begins is never in doubt
    assert len(dedup.push([Labeled(shown("bc", 1.0), 1.0, "a"), Labeled(shown("c", 1.0), 1.0, "ab")])) == 2


def test_an_id_is_forgotten_after_ttl_and_what_is_dropped_renews_nothing() -> None:
    dedup = Dedup(ttl=10.0, capacity=9)
    assert [len(dedup.push([shown("a", t)])) for t in (0.0, 9.0, 10.0, 10.5, 20.0, 20.6)] == [1, 0, 0, 1, 0, 1]
    assert dedup.evicted == 0


def test_late_events_are_forgotten_by_their_own_time() -> None:
    dedup = Dedup(ttl=10.0, capacity=9)
    assert len(dedup.push([shown("a", 100.0), shown("late", 89.0), shown("late", 89.0)])) == 3
    assert len(dedup.push([shown("b", 91.0), shown("b", 91.0), shown("c", 102.0), shown("b", 91.0)])) == 3
    assert len(dedup) == 2


def test_memory_is_bounded_and_the_first_to_arrive_goes_first() -> None:
    dedup = Dedup(ttl=1e9, capacity=100)
    dedup.push([shown(str(n), float(n)) for n in range(1000)])
    assert len(dedup) == 100 and dedup.evicted == 900
    assert len(dedup.push([shown("900", 0.0), shown("899", 899.0)])) == 1


def test_a_state_for_a_larger_capacity_is_cut() -> None:
    large, small = Dedup(ttl=1e9, capacity=10), Dedup(ttl=1e9, capacity=3)
    large.push([shown(str(n), float(n)) for n in range(5)])
    small.load_state_dict(large.state_dict())
    assert len(small) == 3 and small.evicted == 2
    assert small.push([shown("4", 4.0)]) == []


@pytest.mark.parametrize(("ttl", "capacity"), [(0.0, 1), (-1.0, 1), (float("nan"), 1), (1.0, 0)])
def test_what_cannot_work_is_refused(ttl: float, capacity: int) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Dedup(ttl=ttl, capacity=capacity)
