"""LabelJoin against a brute-force oracle, under any order, duplication and lateness."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamrec.errors import ConfigError
from streamrec.events import Feedback, Impression, Labeled
from streamrec.preprocessors.label_join import Closed, LabelJoin
from streamrec.testing import check_stage
from streamrec.testing._state import check_state_is_plain, copy_state, first_difference

Either = Impression | Feedback

KINDS = ("click", "buy", "like")  # "like" has no window, mostly


def impression(id: str, time: float, **features: Any) -> Impression:
    return Impression(id=id, time=time, user="u1", item="p9", features=features)


def click(id: str, time: float, kind: str = "click") -> Feedback:
    return Feedback(id=f"{id}-{kind}-{time}", impression_id=id, time=time, kind=kind)


class Oracle:
    """What a stream in this order of arrival must give, computed offline, every event against every other.

    `labels[i]`: what event i closes, as (impression's index, kind, label, last); `rest`: what the end closes.
    """

    def __init__(self, events: Sequence[Either], windows: Mapping[str, float], lateness: float) -> None:
        self.counts: Counter[str] = Counter()
        self.labels: list[list[tuple[int, str, float, bool]]] = [[] for _ in events]
        self.rest: list[tuple[int, str, float, bool]] = []
        self.refused: set[int] = set()
        kinds = sorted(windows, key=lambda kind: (windows[kind], kind))
        widest = windows[kinds[-1]]

        before = [max((e.time for e in events[:i]), default=-math.inf) - lateness for i in range(len(events))]
        after = [max(e.time for e in events[: i + 1]) - lateness for i in range(len(events))]
        end = len(events)

        def passed(time: float) -> int:  # the event whose watermark is the first beyond this time
            return next((i for i in range(end) if after[i] > time), end)

        late = {i for i in range(end) if events[i].time < before[i]}
        taken: list[int] = []
        for i, event in enumerate(events):
            if not isinstance(event, Impression):
                continue
            if i in late:
                self.counts["late_impression"] += 1
                self.refused.add(i)
            elif any(events[j].id == event.id and passed(events[j].time + widest) > i for j in taken):
                self.counts["duplicate_impression"] += 1
                self.refused.add(i)
            else:
                taken.append(i)

        positive: set[tuple[int, str]] = set()
        for i, event in enumerate(events):
            if not isinstance(event, Feedback):
                continue
            same = [j for j in taken if events[j].id == event.impression_id]
            meets = next((j for j in same if j < i < passed(events[j].time + widest)), None)
            if meets is None:  # early: the next one, unless it expires before
                meets = next((j for j in same if i < j < passed(event.time)), None)
            if i in late:
                self.counts["late_feedback"] += 1
            elif event.kind not in windows:
                self.counts["unknown_kind"] += 1
            elif meets is None:
                self.counts["unmatched"] += passed(event.time) < end
            elif not events[meets].time <= event.time <= events[meets].time + windows[event.kind]:
                self.counts["outside_window"] += 1
            elif (meets, event.kind) in positive:
                self.counts["repeated"] += 1
            else:
                positive.add((meets, event.kind))

        order = sorted(
            (events[j].time + windows[kind], events[j].time, j, kinds.index(kind)) for j in taken for kind in kinds
        )
        for closing, _, j, k in order:
            label = (j, kinds[k], float((j, kinds[k]) in positive), k == len(kinds) - 1)
            i = passed(closing)
            (self.labels[i] if i < end else self.rest).append(label)


def truth(events: Iterable[Either], windows: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """Labels by impression id and kind, of a stream in any order in which nothing comes too late."""
    events = list(events)
    return {
        (shown.id, kind): float(
            any(
                f.impression_id == shown.id and f.kind == kind and shown.time <= f.time <= shown.time + window
                for f in events
                if isinstance(f, Feedback)
            )
        )
        for shown in events
        if isinstance(shown, Impression)
        for kind, window in windows.items()
    }


def nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in counts.items() if count}


# A narrow range of times, in steps: ties and events exactly on a boundary come up all the time. Tenths do not add up
# exactly, halves do.
grids = st.sampled_from([0.5, 0.1])
steps = st.integers(0, 40)


@st.composite
def settings_of_joins(draw: st.DrawFn) -> dict[str, Any]:
    grid = draw(grids)
    kinds = draw(st.sampled_from([["click"], ["click", "buy"], ["buy", "click", "like"]]))
    return {
        "windows": {kind: draw(st.integers(1, 20)) * grid for kind in kinds},
        "lateness": draw(st.integers(0, 10)) * grid,
        "grid": grid,
    }


@st.composite
def streams(draw: st.DrawFn, ids: int = 5, most: int = 30) -> tuple[list[Either], dict[str, Any]]:
    """Events in any order at all, with duplicates that may differ, and the settings of a join."""
    config = draw(settings_of_joins())
    grid = config.pop("grid")
    names = st.sampled_from([f"i{n}" for n in range(ids)])
    times = steps.map(lambda step: step * grid)
    events = st.one_of(
        st.builds(impression, names, times),
        st.builds(click, names, times, st.sampled_from(KINDS)),
    )
    stream = draw(st.lists(events, max_size=most))
    if draw(st.booleans()):  # about in order: by chance alone nearly all would be late
        delays = {id(event): draw(st.integers(0, 15)) * grid for event in stream}
        stream.sort(key=lambda event: event.time + delays[id(event)])
    return stream, config


@st.composite
def bounded_streams(draw: st.DrawFn) -> tuple[list[Either], dict[str, Any]]:
    """Events that arrive at most `lateness` behind the newest, each once or more, whole impressions only."""
    config = draw(settings_of_joins())
    grid, lateness = config.pop("grid"), config["lateness"]
    shown = {f"i{n}": draw(steps) * grid for n in range(draw(st.integers(0, 6)))}
    events: list[Either] = [impression(id, time) for id, time in shown.items()]
    if shown:
        for _ in range(draw(st.integers(0, 10))):
            id = draw(st.sampled_from(sorted(shown)))
            time = shown[id] + draw(st.integers(-5, 22)) * grid
            events.append(click(id, time, draw(st.sampled_from(KINDS))))
        events += draw(st.lists(st.sampled_from(events), max_size=6))
    delays = [draw(st.integers(0, 4)) * lateness / 4 for _ in events]
    # Whoever came before has time <= its arrival <= this arrival <= this time + lateness.
    order = sorted(range(len(events)), key=lambda i: events[i].time + delays[i])
    newest, kept = -math.inf, []
    for i in order:
        if events[i].time >= newest - lateness:  # tenths: by rounding, one may be a hair too late
            newest = max(newest, events[i].time)
            kept.append(events[i])
    return kept, config


def labels_of(labeled: Iterable[Labeled]) -> dict[tuple[str, str], float]:
    out: dict[tuple[str, str], float] = {}
    for one in labeled:
        key = one.impression.id, one.kind
        assert key not in out, f"labelled twice: {key}"
        out[key] = one.label
    return out


@given(bounded_streams())
@settings(deadline=None)
def test_labels_are_those_of_the_whole_stream_in_any_order_within_the_lateness(case: Any) -> None:
    events, config = case
    join = LabelJoin(**config)
    labeled = join.push(events) + join.flush()
    assert labels_of(labeled) == truth(events, config["windows"])
    assert not join.counts["late_impression"] and not join.counts["late_feedback"]
    assert join.pending == 0


@given(streams())
@settings(deadline=None)
def test_every_closing_and_every_count_is_the_oracles_in_any_order_at_all(case: Any) -> None:
    events, config = case
    oracle = Oracle(events, **config)
    join = LabelJoin(**config)

    def labels(closed: Sequence[Closed]) -> list[tuple[int, str, float, bool]]:
        assert all(events[one.payload].time == one.time for one in closed)
        return [(one.payload, one.kind, one.label, one.last) for one in closed if one.kind]

    refused = set()
    for i, event in enumerate(events):
        closed = join.step(event, i)
        assert labels(closed) == oracle.labels[i]
        for one in closed[len(oracle.labels[i]) :]:
            assert one.kind == "" and math.isnan(one.label) and one.last
            refused.add(one.payload)
    assert refused == oracle.refused
    assert nonzero(join.counts) == nonzero(oracle.counts)

    taken = sum(isinstance(event, Impression) for event in events) - len(refused)
    assert taken == sum(last for closed in oracle.labels for *_, last in closed) + join.pending
    assert labels(join.drain()) == oracle.rest
    assert join.pending == 0


@given(streams(), st.integers(1, 4))
@settings(deadline=None)
def test_each_payload_comes_back_last_exactly_once_and_never_after(case: Any, capacity: int) -> None:
    events, config = case
    join = LabelJoin(**config, capacity=capacity)
    freed: set[int] = set()
    kinds: dict[int, list[str]] = {}
    let_go = 0
    for i, event in enumerate([*events, None]):
        for one in join.step(event, i) if event is not None else join.drain():
            assert one.payload not in freed
            let_go += not one.kind
            if one.kind:
                kinds.setdefault(one.payload, []).append(one.kind)
            if one.last:
                freed.add(one.payload)
                in_order = sorted(config["windows"], key=lambda kind: (config["windows"][kind], kind))
                labelled = kinds.get(one.payload, [])
                assert labelled == in_order if one.kind else labelled == in_order[: len(labelled)]
    assert freed == {i for i, event in enumerate(events) if isinstance(event, Impression)}
    assert let_go == sum(join.counts[f"{why}_impression"] for why in ("late", "duplicate", "evicted"))


@given(streams(), st.integers(1, 4))
@settings(deadline=None)
def test_past_the_capacity_the_one_that_closes_first_goes_without_a_label(case: Any, capacity: int) -> None:
    events, config = case
    join = LabelJoin(**config, capacity=capacity)
    spans = sorted(config["windows"].values())
    open_: dict[int, tuple[float, int]] = {}  # by payload: time, kinds closed
    for i, event in enumerate(events):
        evicted = join.counts["evicted_impression"]
        closed = join.step(event, i)
        if isinstance(event, Impression) and event.time >= join.watermark:
            open_[i] = event.time, 0
        for one in closed:
            if one.kind:
                open_[one.payload] = one.time, open_[one.payload][1] + 1
            elif join.counts["evicted_impression"] > evicted:
                closings = {payload: time + spans[done] for payload, (time, done) in open_.items()}
                assert closings[one.payload] == min(closings.values())
            if one.last:
                open_.pop(one.payload, None)
        assert len(open_) == join.pending <= capacity
        assert len(join.state_dict()["early"]["kinds"]) <= capacity


@given(streams(), st.lists(st.integers(0, 30), max_size=5))
@settings(deadline=None)
def test_micro_batches_have_no_meaning(case: Any, cuts: list[int]) -> None:
    events, config = case
    whole, parts = LabelJoin(**config), LabelJoin(**config)
    pieces = [0, *sorted(cuts), len(events)]
    out = [parts.push(events[a:b]) for a, b in pairwise(pieces)]
    assert [one for piece in out for one in piece] == whole.push(events)
    assert first_difference(whole.state_dict(), parts.state_dict()) is None


@given(streams(most=15), st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_resumed_run_equals_an_uninterrupted_one_at_every_cut(case: Any, capacity: int, slots: bool) -> None:
    events, config = case

    def run(join: LabelJoin, start: int) -> list[Sequence[Any]]:
        if slots:
            return [*(map(repr, join.step(event, start + i)) for i, event in enumerate(events[start:]))]
        return [join.push([event]) for event in events[start:]]

    for cut in range(len(events) + 1):
        first = LabelJoin(**config, capacity=capacity)
        for i, event in enumerate(events[:cut]):
            if slots:
                first.step(event, i)
            else:
                first.push([event])
        state = first.state_dict()
        check_state_is_plain(state)
        kept = copy_state(state)
        second = LabelJoin(**config, capacity=capacity)
        second.load_state_dict(kept)
        assert first_difference(second.state_dict(), state) is None
        assert list(map(list, run(first, cut))) == list(map(list, run(second, cut)))
        assert first_difference(first.state_dict(), second.state_dict()) is None
        assert first_difference(state, kept) is None, "what came after the cut changed it"
        assert repr(first.drain()) == repr(second.drain())
        assert first.counts == second.counts


def test_it_is_a_stage() -> None:
    rng = np.random.default_rng(0)
    events: list[Any] = []
    for n in range(60):
        events.append(impression(f"i{n}", n / 4 + rng.random()))
        if rng.random() < 0.5:
            kind = ("click", "buy")[int(rng.integers(2))]
            events.append(click(f"i{rng.integers(max(0, n - 5), n + 3)}", n / 4 + 2 * rng.random(), kind))
        if n % 20 == 0:
            events.append(Labeled(impression(f"l{n}", 1e6), 1.0))
    check_stage(lambda: LabelJoin(windows={"click": 2.0, "buy": 5.0}, lateness=1.0, capacity=10), events)


def test_a_click_on_either_boundary_counts_and_one_beyond_does_not() -> None:
    join = LabelJoin(windows={"click": 10.0}, lateness=5.0)
    shown = [impression(id, 0.0) for id in ("at", "end", "before", "after")]
    clicks = [click("before", -1.0), click("at", 0.0), click("end", 10.0), click("after", math.nextafter(10.0, 11.0))]
    assert join.push([*shown, *clicks]) == []
    assert labels_of(join.flush()) == {
        ("at", "click"): 1.0,
        ("end", "click"): 1.0,
        ("before", "click"): 0.0,
        ("after", "click"): 0.0,
    }
    assert nonzero(join.counts) == {"outside_window": 2}


def test_a_window_stays_open_while_the_watermark_stands_on_its_end() -> None:
    join = LabelJoin(windows={"click": 10.0}, lateness=5.0)
    assert join.push([impression("i1", 0.0), impression("i2", 15.0)]) == []
    assert join.watermark == 10.0
    assert join.push([click("i1", 10.0)]) == []
    assert labels_of(join.push([click("i2", math.nextafter(15.0, 16.0))])) == {("i1", "click"): 1.0}


def test_a_positive_label_waits_for_its_window_too() -> None:
    join = LabelJoin(windows={"click": 10.0})
    assert join.push([impression("i1", 0.0), click("i1", 1.0), impression("i2", 9.0)]) == []


def test_what_the_event_closes_comes_before_the_event_is_taken_in() -> None:
    join = LabelJoin(windows={"click": 10.0}, capacity=1)
    join.step(impression("i1", 0.0), 1)
    closed = join.step(impression("i2", 11.0), 2)  # not evicted: it is closed by then
    assert closed == [Closed(1, "click", 0.0, 0.0, True)]
    assert join.step(click("i2", 11.0)) is join.step(click("i2", 11.0)) == ()


def test_kinds_close_each_in_its_time_and_only_the_last_frees_the_payload() -> None:
    join = LabelJoin(windows={"buy": 100.0, "click": 10.0})
    join.step(impression("i1", 0.0), 7)
    join.step(click("i1", 3.0))
    assert join.step(click("i1", 50.0, "buy")) == [Closed(7, "click", 1.0, 0.0, False)]
    assert join.pending == 1
    assert join.step(impression("i2", 101.0), 8) == [Closed(7, "buy", 1.0, 0.0, True)]


def test_what_closes_at_one_time_comes_by_impression_time_then_arrival() -> None:
    join = LabelJoin(windows={"click": 10.0, "like": 10.0, "buy": 20.0}, lateness=10.0)
    for payload, time in enumerate([10.0, 0.0, 10.0]):
        join.step(impression(f"i{payload}", time), payload)
    closed = join.step(impression("i9", 31.0), 9)
    assert [(one.payload, one.kind) for one in closed] == [
        (1, "click"), (1, "like"),  # at 10
        (1, "buy"), (0, "click"), (0, "like"), (2, "click"), (2, "like"),  # at 20
    ]  # fmt: skip


def test_labeled_items_pass_in_their_place_and_move_no_time() -> None:
    join = LabelJoin(windows={"click": 10.0})
    known = Labeled(impression("i0", 1e9), 1.0)
    out = join.push([known, impression("i1", 0.0), known, impression("i2", 11.0), known])
    assert [one.impression.id for one in out] == ["i0", "i0", "i1", "i0"]
    assert join.watermark == 11.0 and join.pending == 1


def test_events_behind_the_watermark_are_counted_and_dropped() -> None:
    join = LabelJoin(windows={"click": 10.0}, lateness=5.0)
    assert join.watermark == -math.inf
    join.step(impression("i1", 100.0), 1)
    assert join.step(impression("i2", 95.0), 2) == ()  # on it: in time
    (refused,) = join.step(impression("i3", 94.0), 3)
    assert (refused.payload, refused.kind, refused.time, refused.last) == (3, "", 94.0, True)
    assert join.step(click("i1", 94.0)) == ()
    assert nonzero(join.counts) == {"late_impression": 1, "late_feedback": 1}
    assert join.watermark == 95.0


@pytest.mark.parametrize("time", [math.nan, math.inf, -math.inf])
def test_a_time_that_is_no_number_is_late_even_as_the_first(time: float) -> None:
    join = LabelJoin(windows={"click": 10.0})
    assert join.push([impression("i1", time), click("i1", time)]) == []
    assert join.push([impression("i2", 0.0), impression("i3", time), click("i2", time)]) == []
    assert nonzero(join.counts) == {"late_impression": 2, "late_feedback": 2}
    assert join.watermark == 0.0 and join.pending == 1


def test_feedback_waits_for_its_impression_until_none_can_match() -> None:
    join = LabelJoin(windows={"click": 10.0}, lateness=5.0)
    join.push([click("i1", 4.0), click("i2", 4.0), impression("i1", 3.0), impression("i0", 9.0)])
    assert join.counts["unmatched"] == 0  # the watermark stands on it
    join.push([impression("i3", 9.5)])
    assert join.counts["unmatched"] == 1
    assert labels_of(join.flush())["i1", "click"] == 1.0


def test_the_first_of_two_impressions_of_one_id_stays() -> None:
    join = LabelJoin(windows={"click": 10.0}, lateness=5.0)
    assert join.step(impression("i1", 3.0), 1) == ()
    (refused,) = join.step(impression("i1", 2.0), 2)
    assert refused.payload == 2 and refused.last and not refused.kind
    assert join.drain() == [Closed(1, "click", 0.0, 3.0, True)]
    assert nonzero(join.counts) == {"duplicate_impression": 1}


def test_feedback_is_counted_by_what_became_of_it() -> None:
    join = LabelJoin(windows={"click": 10.0}, lateness=5.0)
    join.push([impression("i1", 0.0), click("i1", 1.0), click("i1", 2.0), click("i1", 3.0, "like")])
    assert nonzero(join.counts) == {"repeated": 1, "unknown_kind": 1}


def test_early_feedback_is_bounded_oldest_first_out() -> None:
    join = LabelJoin(windows={"click": 10.0}, lateness=100.0, capacity=2)
    join.push([click("i1", 5.0), click("i2", 3.0), click("i3", 4.0)])
    assert join.counts["evicted_feedback"] == 1
    assert labels_of(join.push([impression("i2", 3.0), impression("i1", 4.0)]) + join.flush()) == {
        ("i2", "click"): 0.0,
        ("i1", "click"): 1.0,
    }


def test_feedback_that_found_its_impression_leaves_nothing_behind() -> None:
    join = LabelJoin(windows={"click": 10.0}, lateness=100.0, capacity=10)
    for n in range(1_000):  # event time stands still: nothing expires
        join.push([click(f"i{n}", 5.0), impression(f"i{n}", 5.0)])
    assert not len(join.state_dict()["early"]["kinds"]) and len(join._expiring) <= 1024
    assert nonzero(join.counts) == {"evicted_impression": 990}


def test_an_id_shown_again_starts_without_the_feedback_of_the_one_before() -> None:
    join = LabelJoin(windows={"click": 10.0}, lateness=10.0, capacity=1)
    join.push([impression("i1", 0.0), click("i1", 0.0), impression("i2", 1.0), impression("i1", 2.0)])
    assert join.counts["evicted_impression"] == 2
    assert labels_of(join.flush()) == {("i1", "click"): 0.0}
    join.push([impression("i1", 2.0), click("i1", 3.0)])
    assert labels_of(join.push([impression("i1", 30.0)])) == {("i1", "click"): 1.0}
    assert labels_of(join.flush()) == {("i1", "click"): 0.0}


def test_flush_closes_what_is_open_and_the_stream_may_go_on() -> None:
    join = LabelJoin(windows={"click": 10.0}, lateness=5.0)
    join.push([impression("i1", 0.0), click("i1", 1.0), click("i9", 2.0), impression("i2", 1.0)])
    assert [(one.impression.id, one.label) for one in join.flush()] == [("i1", 1.0), ("i2", 0.0)]
    assert (join.pending, join.watermark, join.counts["unmatched"], join.flush()) == (0, -3.0, 1, [])
    join.push([impression("i3", 2.0), click("i3", 2.0)])
    assert labels_of(join.flush()) == {("i3", "click"): 1.0}


def test_a_saved_impression_keeps_its_features_to_the_bit() -> None:
    features = {"price": math.nan, "rate": 0.1, "n": 3, "genres": ["a", "b"], "near": {"x": 0.5}, "none": None}
    join = LabelJoin(windows={"click": 10.0})
    join.push([impression("i1", 0.0, **features, fresh=np.float32(0.5), vector=np.arange(2))])
    twin = LabelJoin(windows={"click": 10.0})
    twin.load_state_dict(join.state_dict())
    (labeled,) = twin.flush()
    assert repr(labeled.impression.features) == repr({**features, "fresh": 0.5, "vector": [0, 1]})


@pytest.mark.parametrize("payloads", [["a"], [1, None], [1, impression("i1", 0.0)]])
def test_payloads_that_cannot_be_saved_are_named(payloads: list[Any]) -> None:
    join = LabelJoin(windows={"click": 10.0})
    for n, payload in enumerate(payloads):
        join.step(impression(f"i{n}", 0.0), payload)
    with pytest.raises(ConfigError, match=f"all 64-bit integers or all Impressions.*{type(payloads[-1]).__name__}"):
        join.state_dict()


def test_a_state_of_other_windows_is_refused_and_changes_nothing() -> None:
    join = LabelJoin(windows={"click": 10.0})
    join.push([impression("i1", 0.0)])
    other = LabelJoin(windows={"click": 20.0})
    with pytest.raises(ConfigError, match=r"\{'click': 10.0\}.*\{'click': 20.0\}"):
        other.load_state_dict(join.state_dict())
    assert other.pending == 0


def test_other_lateness_and_capacity_hold_from_the_next_event() -> None:
    join = LabelJoin(windows={"buy": 20, "click": 10}, lateness=5.0)
    join.push([impression(f"i{n}", float(n)) for n in range(8)])
    twin = LabelJoin(windows={"click": 10, "buy": 20}, lateness=1.0, capacity=3)
    twin.load_state_dict(join.state_dict())
    assert twin.watermark == 2.0 and twin.pending == 8
    twin.push([impression("i8", 8.0)])
    assert twin.watermark == 7.0 and twin.pending == 3
    assert [one.impression.id for one in twin.flush() if one.kind == "buy"] == ["i6", "i7", "i8"]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"windows": {}}, "windows must map kinds to seconds"),
        ({"windows": 60.0}, "windows must map kinds to seconds"),
        ({"windows": {"": 60.0}}, "keyed by the kind"),
        ({"windows": {"click": 0.0}}, "'click' must be > 0 seconds and finite, got 0.0"),
        ({"windows": {"click": -1.0}}, "got -1.0"),
        ({"windows": {"click": math.inf}}, "got inf"),
        ({"windows": {"click": math.nan}}, "got nan"),
        ({"lateness": -1.0}, "lateness must be >= 0 seconds and finite, got -1.0"),
        ({"lateness": math.nan}, "got nan"),
        ({"lateness": math.inf}, "got inf"),
        ({"capacity": 0}, "capacity must be >= 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LabelJoin(**{"windows": {"click": 60.0}, **bad})
