"""Windows that begin with other feedback, values, corrections and word at once, against an oracle that sees all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec.errors import ConfigError
from streamrec.preprocessors import Closed
from streamrec.testing import check_stage

CLICK, SPAN, LIKE, LATENESS, KEEP = 10.0, 25.0, 40.0, 4.0, 30.0
WINDOWS = {"click": CLICK, "buy": sr.After("click", SPAN), "like": LIKE}


def shown(number: int, time: float) -> sr.Impression:
    return sr.Impression(f"i{number}", time, "u", "p")


def told(number: int, time: float, kind: str = "click", value: float | None = None) -> sr.Feedback:
    return sr.Feedback(f"{kind}{number}-{time}", f"i{number}", time, kind, value)


def join(**more: Any) -> sr.LabelJoin:
    return sr.LabelJoin(**{"windows": WINDOWS, "lateness": LATENESS, **more})


@st.composite
def streams(draw: Any) -> list[Any]:
    """Impressions and feedback of three kinds, each delayed by less than the lateness, so that nothing is late."""
    arriving: list[tuple[float, int, Any]] = []
    for number in range(draw(st.integers(1, 8))):
        time = draw(st.integers(0, 60)) / 2
        arriving.append((time + draw(st.integers(0, 7)) / 2, len(arriving), shown(number, time)))
        for kind in draw(st.lists(st.sampled_from(["click", "buy", "like"]), max_size=5)):
            at = time + draw(st.integers(-2, 90)) / 2
            event = told(number, at, kind, draw(st.sampled_from([None, 0.25, 0.5, 3.0])))
            arriving.append((at + draw(st.integers(0, 7)) / 2, len(arriving), event))
    arriving.append((1e4, len(arriving), shown(99, 1e4)))
    return [event for _, _, event in sorted(arriving, key=lambda one: one[:2])]


def oracle(events: Sequence[Any]) -> dict[tuple[str, str], tuple[float, float]]:
    """By impression and kind: the label, and the value of the feedback that made it (the first in the stream)."""
    found = {}
    for one in events[:-1]:
        if not isinstance(one, sr.Impression):
            continue
        mine = [f for f in events if isinstance(f, sr.Feedback) and f.impression_id == one.id]
        clicks = [f for f in mine if f.kind == "click" and one.time <= f.time <= one.time + CLICK]
        likes = [f for f in mine if f.kind == "like" and one.time <= f.time <= one.time + LIKE]
        after = clicks[0].time if clicks else math.inf
        buys = [f for f in mine if f.kind == "buy" and after <= f.time <= after + SPAN]
        for kind, some in (("click", clicks), ("like", likes), ("buy", buys)):
            found[one.id, kind] = (float(bool(some)), math.nan if not some or some[0].value is None else some[0].value)
    return found


def alone(events: Sequence[Any]) -> bool:
    """Whether there is one feedback of a kind on an impression at most: which is the first then is no question."""
    keys = [(f.impression_id, f.kind) for f in events if isinstance(f, sr.Feedback)]
    return len(keys) == len(set(keys))


@settings(max_examples=40, deadline=None)
@given(streams())
def test_each_kind_gives_the_label_that_one_who_sees_all_would_give(events: list[Any]) -> None:
    labels = join().push(events)
    expected = oracle(events)
    assert len(labels) == len(expected)
    for one in labels:
        if one.kind != "buy" or alone(events):
            assert one.label == expected[one.impression.id, one.kind][0]


@settings(max_examples=20, deadline=None)
@given(streams(), st.sampled_from(["weight", "label"]))
def test_values_weigh_or_are_labels(events: list[Any], use: str) -> None:
    for one in join(values={"like": use}).push(events):
        label, value = oracle(events)[one.impression.id, one.kind]
        if one.kind != "like" or not alone(events) or not label:
            continue
        if use == "weight":
            assert (one.label, one.weight) == (1.0, 1.0 if math.isnan(value) else value)
        else:
            assert (one.label, one.weight) == (value if value <= 1.0 else 1.0, 1.0)


@settings(max_examples=2, deadline=None)
@given(streams(), st.integers(2, 5))
def test_it_is_a_stage(events: list[Any], capacity: int) -> None:
    late = [event for n, event in enumerate(events) if n % 5 == 2]
    values = {"buy": "weight", "like": "label"}
    for stream in (events, [*events[:-1], *late, events[-1]]):
        check_stage(lambda: join(values=values, late="correct", keep=KEEP, capacity=capacity), stream)


def test_a_purchase_counts_from_its_click() -> None:
    one = join(windows={"click": CLICK, "buy": sr.After("click", "25s")})
    one.push([shown(1, 0.0), told(1, 9.0), told(1, 34.0, "buy"), shown(2, 0.5 + 30.0)])
    assert one.windows["buy"] == 35.0
    assert [(x.kind, x.label) for x in one.push([shown(3, 100.0)]) if x.impression.id == "i1"] == [("buy", 1.0)]
    late = join(windows={"click": CLICK, "buy": sr.After("click", 25.0)})
    late.push([shown(1, 0.0), told(1, 1.0), told(1, 27.0, "buy")])
    assert late.counts["outside_window"] == 1


def test_without_a_click_nothing_waits_for_a_purchase() -> None:
    one = join(windows={"click": CLICK, "buy": sr.After("click", "7d")}, lateness=0.0)
    labels = one.push([shown(1, 0.0), shown(2, 0.0), told(2, 1.0), shown(3, 11.0)])
    assert [(x.impression.id, x.kind, x.label) for x in labels] == [
        ("i1", "click", 0.0),
        ("i1", "buy", 0.0),
        ("i2", "click", 1.0),
    ]
    assert one.pending == 2


def test_a_purchase_that_overtakes_its_click_waits_for_it() -> None:
    one = join()
    one.push([shown(1, 0.0), told(1, 3.0, "buy"), told(1, 2.0)])
    assert {x.kind: x.label for x in one.push([shown(9, 1000.0)])} == {"click": 1.0, "buy": 1.0, "like": 0.0}


def test_what_cannot_be_a_value_is_counted() -> None:
    one = join(values={"click": "weight", "like": "label"}, lateness=0.0)
    one.push([shown(1, 0.0), told(1, 1.0, "click", -5.0), told(1, 1.0, "like", 1.5)])
    assert one.counts["bad_value"] == 2
    labels = {x.kind: (x.label, x.weight) for x in one.push([shown(9, 1000.0)])}
    assert labels == {"click": (1.0, 1.0), "like": (1.0, 1.0), "buy": (0.0, 1.0)}


def correcting(**more: Any) -> sr.LabelJoin:
    return sr.LabelJoin(windows={"click": CLICK}, late="correct", keep=KEEP, **more)


def test_a_late_positive_corrects_its_label_once() -> None:
    one = correcting()
    assert one.push([shown(1, 0.0), shown(2, 0.0), shown(3, 20.0)]) == [sr.Labeled(shown(n, 0.0), 0.0) for n in (1, 2)]
    assert one.push([told(1, 5.0), told(1, 6.0)]) == [sr.Labeled(shown(1, 0.0), 1.0)]
    assert one.push([told(2, 15.0)]) == [sr.Labeled(shown(2, 0.0), 1.0)]  # after the window
    assert one.corrected == 2 and one.counts["repeated"] == 1 and one.pending == 3
    one.push([shown(4, 61.0)])  # the third is kept until 20 + 10 + 30
    assert one.push([told(3, 25.0)]) == [] and one.counts["late_feedback"] == 1 and one.pending == 1


def test_a_positive_after_the_window_leaves_the_label_as_it_is() -> None:
    one = correcting(lateness=20.0)
    assert one.push([shown(1, 0.0), told(1, 15.0)]) == [sr.Labeled(shown(1, 0.0), 1.0)]  # a correction before it
    assert one.push([told(1, 5.0), shown(2, 40.0)]) == [sr.Labeled(shown(1, 0.0), 0.0)]
    assert one.counts["repeated"] == 1


def test_what_is_dropped_late_is_what_is_corrected() -> None:
    events = [shown(1, 0.0), shown(2, 20.0), told(1, 5.0)]
    assert sum(x.label for x in sr.LabelJoin(windows={"click": CLICK}).push(events)) == 0
    assert sum(x.label for x in correcting().push(events)) == 1


def test_what_is_kept_goes_first_where_there_is_no_room() -> None:
    one = correcting(capacity=2)
    one.push([shown(1, 0.0), shown(2, 20.0), shown(3, 20.0)])
    assert one.counts["evicted_kept"] == 1 and one.counts["evicted_impression"] == 0 and one.pending == 2


def test_each_payload_comes_back_once() -> None:
    one = correcting()
    found: list[Closed] = []
    for n, event in enumerate([shown(1, 0.0), shown(2, 0.0), told(2, 1.0), shown(3, 20.0), told(1, 5.0)]):
        found += one.step(event, n)
    found += one.drain()
    assert sorted(x.payload for x in found if x.last) == [0, 1, 3]
    assert [(x.payload, x.label) for x in found if x.corrects] == [(0, 1.0)]


def test_word_at_once() -> None:
    one = join(lateness=0.0)
    events: list[Any] = [told(1, 1.0), shown(1, 0.5), told(1, 2.0, "buy"), told(1, 3.0, "buy"), shown(2, 60.0)]
    events[0], events[1] = events[1], events[0]
    closed = one.steps(events, one.codes(events), np.arange(len(events)), at_once=True)
    heard = [(int(x["event"]), one.kinds[x["kind"]], float(x["label"])) for x in closed if x["what"] == 1]
    assert heard == [(1, "click", 1.0), (2, "buy", 1.0)]
    assert [float(x["label"]) for x in closed if x["what"] == 0] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"windows": {"buy": sr.After("click", 1.0)}},
        {"windows": {"click": 1.0, "buy": sr.After("click", 1.0), "return": sr.After("buy", 1.0)}},
        {"windows": {"click": 1.0, "buy": sr.After("click", -1.0)}},
        {"windows": {"click": "soon"}},
        {"values": {"click": "price"}},
        {"values": {"nobody": "weight"}},
        {"late": "learn"},
    ],
)
def test_settings_that_cannot_work(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        join(**wrong)


def test_a_state_of_other_rules_is_refused() -> None:
    for other in (join(values={"click": "weight"}), join(late="correct"), correcting()):
        with pytest.raises(ConfigError, match="the state was cut with"):
            join().load_state_dict(other.state_dict())
