"""RateLimit against token buckets in a dictionary."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec.errors import ConfigError
from streamrec.testing import check_stage

MOST, WITHIN, HOLD = 3, 10.0, 25.0


def oracle(events: list[Any], hold: float) -> list[Any]:
    """What is kept. A bucket that is full, whose user is not held, is as good as none."""
    buckets: dict[str, list[float]] = {}  # tokens, the time they stand at, held until
    kept, newest = [], 0.0
    for event in events:
        if not isinstance(event, sr.Impression):
            kept.append(event)
            continue
        newest = max(newest, event.time)
        tokens, at, until = buckets.get(event.user, [MOST, event.time, -1.0])
        if newest - at > max(WITHIN, hold):
            tokens, at, until = MOST, event.time, -1.0
        if event.time > at:
            tokens, at = min(MOST, tokens + (event.time - at) * (MOST / WITHIN)), event.time
        if event.time >= until and tokens >= 1:
            tokens -= 1
            kept.append(event)
        elif event.time >= until:
            until = event.time + hold
        buckets[event.user] = [tokens, at, until]
    return kept


@st.composite
def streams(draw: Any) -> list[Any]:
    events: list[Any] = []
    time = 100.0
    for n in range(draw(st.integers(2, 40))):
        time += draw(st.sampled_from([0.0, 0.5, 1.0, 4.0, 30.0]))
        at = time - draw(st.sampled_from([0.0, 0.0, 5.0, 40.0]))
        user = draw(st.sampled_from(["a", "a", "b", "c"]))
        feedback = draw(st.booleans()) and n % 4 == 0
        events.append(sr.Feedback(f"f{n}", "i", at) if feedback else sr.Impression(f"i{n}", at, user, "p"))
    return events


@settings(max_examples=60, deadline=None)
@given(streams(), st.sampled_from([0.0, HOLD]))
def test_it_keeps_what_buckets_of_tokens_keep(events: list[Any], hold: float) -> None:
    limit = sr.RateLimit(most=MOST, within=WITHIN, hold=hold)
    kept = limit.push(events)
    assert kept == oracle(events, hold)
    assert limit.counts == {"rate_limited": len(events) - len(kept)} and limit.evicted == 0


@settings(max_examples=5, deadline=None)
@given(streams())
def test_it_is_a_stage_also_where_its_memory_is_too_small(events: list[Any]) -> None:
    check_stage(lambda: sr.RateLimit(most=MOST, within=WITHIN, hold=HOLD, capacity=2), events)


def test_a_bot_among_people() -> None:
    people = [sr.Impression(f"i{n}", 1.0 * n, f"u{n % 50}", "p") for n in range(1000)]
    bot = [sr.Impression(f"b{n}", 0.1 * n, "bot", "p") for n in range(10_000)]
    limit = sr.RateLimit(most=60, within="1m", hold="1h", by="user")
    kept = limit.push(sorted([*people, *bot], key=lambda one: one.time))
    assert sum(one.user != "bot" for one in kept) == 1000
    assert sum(one.user == "bot" for one in kept) == pytest.approx(60 * 10 / 9, abs=2)  # filled while it is emptied


def test_memory_is_bounded_and_a_user_is_forgotten() -> None:
    limit = sr.RateLimit(most=1, within="1h", capacity=10)
    limit.push([sr.Impression(f"i{n}", float(n), f"u{n}", "p") for n in range(30)])
    assert len(limit) == 10 and limit.evicted == 20
    assert limit.forget("u29") == 1 and limit.forget("u29") == 0
    assert len(limit.push([sr.Impression("x", 30.0, user, "p") for user in ("u29", "u28")])) == 1


@pytest.mark.parametrize("wrong", [{"most": 0}, {"within": 0}, {"hold": -1.0}, {"capacity": 0}, {"by": ""}])
def test_settings_that_cannot_work(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        sr.RateLimit(**{"most": 1, "within": 1.0, **wrong})
