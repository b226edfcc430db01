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


def test_beyond_its_memory_no_duplicate_passes_and_few_others_are_dropped() -> None:
    error, count = 1e-2, 40_000
    dedup = Dedup(ttl=1_000.0, capacity=1_000, beyond=count, error=error)
    first = [shown(f"i{n}", 0.01 * n) for n in range(count)]
    passed = dedup.push(first)
    assert len(passed) >= (1 - 1.3 * error) * count and dedup.evicted == 0 and len(dedup) == 1_000
    again = dedup.push([shown(one.id, 500.0) for one in passed if isinstance(one, Impression)])
    assert again == [] and dedup.counts["duplicate"] == 1_000
    # what is new, now that it is as full as it may be: the error that was stated, by counting
    before = dedup.counts["probable_duplicate"]
    tried = 100_000
    twin = Dedup(ttl=1_000.0, capacity=1_000, beyond=count, error=error)
    twin.load_state_dict(dedup.state_dict())
    fresh = 0
    for begin in range(0, tried, 500):  # each from the same memory: it must not grow
        twin.load_state_dict(dedup.state_dict()) if begin % 5_000 == 0 else None
        fresh += len(twin.push([shown(f"new{n}", 500.0) for n in range(begin, begin + 500)]))
    wrong = (tried - fresh) / tried
    assert 0 < wrong < 1.2 * error, wrong
    assert dedup.counts["probable_duplicate"] == before
    late = dedup.push([shown(one.id, 500.0 + 1_300.0) for one in passed if isinstance(one, Impression)])
    assert len(late) > (1 - 1.3 * error) * len(passed)  # all has been forgotten


def test_what_finds_no_room_beyond_is_counted() -> None:
    dedup = Dedup(ttl=1e9, capacity=10, beyond=1_000, error=1e-3)
    dedup.push([shown(f"i{n}", float(n)) for n in range(10_000)])
    held = len(dedup._generations)
    assert 1_000 <= held <= 1_600 and dedup.evicted + held + 10 == 10_000 - dedup.counts["probable_duplicate"]
    with pytest.raises(ConfigError, match="another beyond"):
        Dedup(ttl=1e9, capacity=10, beyond=999_999, error=1e-3).load_state_dict(dedup.state_dict())
    with pytest.raises(ConfigError, match="has none"):
        Dedup(ttl=1e9, capacity=10).load_state_dict(dedup.state_dict())


@pytest.mark.parametrize(("beyond", "error"), [(-1, 0.1), (10, 0.0), (10, 1.0), (2**40, 1e-6)])
def test_beyond_that_cannot_be(beyond: int, error: float) -> None:
    with pytest.raises(ConfigError, match=r"beyond|error"):
        Dedup(ttl=1.0, capacity=1, beyond=beyond, error=error)


@settings(deadline=None, max_examples=30)
@given(st.lists(events, max_size=60), st.integers(1, 60), st.integers(0, 60))
def test_beyond_is_the_same_however_the_stream_is_cut(stream: list[Event], ttl: int, cut: int) -> None:
    whole, parts = (Dedup(ttl=float(ttl), capacity=2, beyond=4, error=0.2) for _ in range(2))
    found = whole.push(stream)
    kept = parts.push(stream[:cut])
    resumed = Dedup(ttl=float(ttl), capacity=2, beyond=4, error=0.2)
    resumed.load_state_dict(parts.state_dict())
    assert kept + [one for event in stream[cut:] for one in resumed.push([event])] == found
    assert resumed.counts == whole.counts and resumed.evicted == whole.evicted
