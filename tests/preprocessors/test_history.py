"""History against an oracle that goes through the whole past for each impression; and the service sees the same."""

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
from streamrec.testing import check_stage

WINDOW, TTL, HALF_LIFE, PRIOR = 50.0, 200.0, 40.0, 3.0
MAKE: dict[str, Any] = {
    "by": ["user", ("user", "item"), "genre"],
    "kinds": ["click", "buy"],
    "half_lives": ["ever", HALF_LIFE],
    "prior": PRIOR,
    "window": WINDOW,
    "ttl": TTL,
}


def key_of(shown: sr.Impression, group: Sequence[str]) -> Any:
    return tuple(getattr(shown, name, None) or shown.features.get(name) for name in group)


def oracle(events: Sequence[Any]) -> list[dict[str, float | None]]:
    """What each impression should be told: a look through all that came before it in the stream."""
    facts: list[tuple[float, str, sr.Impression]] = []  # when, what, of which impression: all that counts
    found, newest = [], -math.inf
    open_: dict[str, tuple[sr.Impression, set[str]]] = {}
    forgotten: dict[Any, int] = {}  # by key: where in `facts` it became new again
    touched: dict[Any, float] = {}

    def fact(time: float, what: str, shown: sr.Impression) -> None:
        for group in (("user",), ("user", "item"), ("genre",)):
            key = (group, key_of(shown, group))
            if key in touched and newest - touched[key] > TTL:
                forgotten[key], touched[key] = len(facts), time
            touched[key] = max(time, touched.get(key, time))
        facts.append((time, what, shown))

    for event in events:
        shown = event.impression if isinstance(event, sr.Labeled) else event
        newest = max(newest, shown.time)
        open_ = {id: one for id, one in open_.items() if newest - one[0].time <= WINDOW}
        if isinstance(shown, sr.Feedback):
            held = open_.get(shown.impression_id)
            if held and held[0].time <= shown.time and shown.kind in ("click", "buy") and shown.kind not in held[1]:
                held[1].add(shown.kind)
                fact(shown.time, shown.kind, held[0])
            continue
        told: dict[str, float | None] = {}
        for group in (("user",), ("user", "item"), ("genre",)):
            name, key = "_".join(group), key_of(shown, group)
            live = (group, key) in touched and newest - touched[group, key] <= TTL
            mine = facts[forgotten.get((group, key), 0) :] if live else []
            mine = [one for one in mine if key_of(one[2], group) == key]
            times = [time for time, what, _ in mine if what == "shown"]
            told[f"{name}_since"] = max(shown.time - max(times), 0.0) if times else None
            for end, life in (("", math.inf), ("_40s", HALF_LIFE)):
                stand = max([time for time, _, _ in mine], default=0.0)  # counts do not grow back for an earlier event

                def total(kind: str, some: Any, at: float, life: float = life) -> float:
                    return math.fsum(2.0 ** (-(at - time) / life) for time, what, _ in some if what == kind)

                at = max(shown.time, stand)
                overall = max([time for time, _, _ in facts], default=0.0)
                told[f"{name}_shown{end}"] = total("shown", mine, at)
                for kind in ("click", "buy"):
                    told[f"{name}_{kind}{end}"] = clicks = total(kind, mine, at)
                    base = total(kind, facts, overall) / total("shown", facts, overall) if facts else 0.0
                    told[f"{name}_{kind}_rate{end}"] = (clicks + PRIOR * base) / (total("shown", mine, at) + PRIOR)
        found.append(told)
        if shown.id not in open_:
            fact(shown.time, "shown", shown)
            if newest - shown.time <= WINDOW:
                open_[shown.id] = (shown, set())
        if isinstance(event, sr.Labeled) and event.label > 0:
            fact(shown.time, event.kind, shown)
            open_.get(shown.id, (shown, set()))[1].add(event.kind)
    return found


@st.composite
def streams(draw: Any) -> list[Any]:
    """Impressions of few users and items, feedback on them early, late, twice and on nothing, some time going back."""
    events: list[Any] = []
    time = 1000.0
    for n in range(draw(st.integers(2, 40))):
        time += draw(st.sampled_from([0.0, 1.0, 7.0, 20.0, 60.0, 250.0]))
        at = max(time - draw(st.sampled_from([0.0, 0.0, 0.0, 30.0, 300.0])), 0.0)
        what = draw(st.sampled_from(["shown", "shown", "click", "click", "buy", "like", "labeled"]))
        number = draw(st.integers(0, 12))
        features = draw(st.sampled_from([{"genre": "a"}, {"genre": "b"}]))
        shown = sr.Impression(f"i{number}", at, f"u{number % 3}", f"p{number % 2}", features)
        if what == "shown":
            events.append(shown)
        elif what == "labeled":
            events.append(sr.Labeled(shown, draw(st.sampled_from([0.0, 1.0]))))
        else:
            events.append(sr.Feedback(f"f{n}", f"i{number}", at, what))
    return events


def told(events: Sequence[Any]) -> list[dict[str, Any]]:
    shown = [one.impression if isinstance(one, sr.Labeled) else one for one in events]
    return [{**one.features} for one in shown if isinstance(one, sr.Impression)]


@settings(max_examples=40, deadline=None)
@given(streams())
def test_an_impression_is_told_what_had_happened_and_no_more(events: list[Any]) -> None:
    found = told(sr.History(**MAKE).push(events))
    expected = oracle(events)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert {*one} == {*other, "genre"}
        for name, value in other.items():
            assert one[name] == (None if value is None else pytest.approx(value, rel=1e-9, abs=1e-12)), name


@settings(max_examples=5, deadline=None)
@given(streams(), st.integers(1, 6))
def test_it_is_a_stage_also_where_its_memory_is_too_small(events: list[Any], capacity: int) -> None:
    check_stage(lambda: sr.History(**MAKE, capacity=capacity + 2), events)


@settings(max_examples=10, deadline=None)
@given(streams())
def test_what_comes_after_changes_nothing_before(events: list[Any]) -> None:
    whole = told(sr.History(**MAKE).push(events))
    for cut in range(0, len(events), 5):
        part = told(sr.History(**MAKE).push(events[:cut]))
        assert part == whole[: len(part)]


def test_memory_is_bounded_and_what_is_evicted_is_counted() -> None:
    history = sr.History(by=["user"], capacity=50, window=1e6)
    for n in range(300):
        history.push([sr.Impression(f"i{n}", float(n), f"u{n}", "p")])
    assert len(history) == 50
    assert history.counts["history_evicted"] == history.counts["history_evicted_impression"] == 250
    [again, gone] = told(history.push([sr.Impression("x", 300.0, "u299", "p"), sr.Impression("y", 300.0, "u0", "p")]))
    assert again["user_since"] == 1.0 and gone["user_since"] is None


def test_old_keys_expire() -> None:
    history = sr.History(by=["user"], ttl=100.0)
    for n in range(300):
        history.push([sr.Impression(f"i{n}", 10.0 * n, f"u{n}", "p")])
    assert len(history) == 11 and history.counts["history_evicted"] == 0


def test_features_that_were_served_are_believed() -> None:
    shown = sr.Impression("i", 0.0, "u", "p", {"user_shown_1d": 7.0})
    assert told(sr.History().push([shown]))[0]["user_shown_1d"] == 7.0


def test_a_user_is_forgotten() -> None:
    history = sr.History()
    history.push([sr.Impression(f"i{n}", float(n), f"u{n % 2}", f"p{n}") for n in range(10)])
    before = len(history)
    assert history.forget("u1") == 5 + 1 + 5  # its pairs, itself, its impressions; items stay, they are nobody's
    assert len(history) == before - 6 and history.forget("u1") == 0
    history.push([sr.Feedback("f", "i1", 10.0)])
    assert history.counts["history_unmatched"] == 1
    [first, second] = history.describe([sr.Impression("x", 20.0, user, "p1") for user in ("u0", "u1")])
    assert first.features["user_since"] == 12.0 and second.features["user_since"] is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"by": []},
        {"by": "user"},
        {"by": [()]},
        {"kinds": ["click", "click"]},
        {"half_lives": []},
        {"half_lives": ["1 day"]},
        {"prior": 0.0},
        {"capacity": 1},
        {"window": 0.0},
        {"ttl": -1.0},
        {"by": ["user_item", ("user", "item")]},
    ],
)
def test_settings_that_cannot_work(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        sr.History(**wrong)


def test_another_history_s_state_is_refused() -> None:
    with pytest.raises(ConfigError, match="user_click"):
        sr.History().load_state_dict(sr.History(kinds=["buy"]).state_dict())


def clicks(count: int = 600) -> list[Any]:
    """Users who differ in how often they click, and nothing else that tells."""
    rng = np.random.default_rng(0)
    events: list[Any] = []
    for n in range(count):
        user = int(rng.integers(20))
        events.append(sr.Impression(f"i{n}", 10.0 * n, f"u{user}", f"p{n % 7}"))
        if rng.random() < (0.7 if user % 2 else 0.1):
            events.append(sr.Feedback(f"f{n}", f"i{n}", 10.0 * n + 1.0))
    return events


def trainer_of(store: Any) -> sr.OnlineTrainer:
    history = sr.History(half_lives=["1h"], capacity=100)
    return sr.OnlineTrainer(
        model=sr.FM(sr.Schema(sr.Id("item"), *history.fields), dim=4),
        preprocessors=[history],
        join=sr.LabelJoin(windows={"click": 30.0}),
        metrics=[sr.AUC()],
        store=store,
    )


def test_a_model_learns_from_it_who_clicks() -> None:
    trainer = trainer_of(None)
    trainer.push(clicks(3000))
    assert trainer.report().metrics["AUC"] > 0.65


def test_a_service_sees_what_the_trainer_would(tmp_path: Any) -> None:
    trainer = trainer_of(tmp_path)
    events = clicks()
    trainer.push(events[:500])
    trainer.checkpoint()
    scorer = sr.Scorer(tmp_path)
    for begin in (500, 700):  # by a whole version, and by its changes
        shown = [sr.Impression(f"x{n}", 10_000.0, f"u{n}", "p1") for n in range(20)]
        served = scorer.score(shown)
        ranked = scorer.rank(user="u1", candidates=["p1", "p2"], time=10_000.0)
        assert {one.item: one.score for one in ranked}["p1"] == served[1]
        expected = [trainer_copy(trainer).push([one])[0] for one in shown[:3]]
        np.testing.assert_array_equal(served[:3], np.array(expected, dtype=np.float32))
        trainer.push(events[begin : begin + 200])
        trainer.checkpoint()
        assert scorer.refresh()
    with pytest.raises(ConfigError, match="pass time="):
        scorer.rank(user="u1", candidates=["p1"])
    scorer.set_catalogue(["p1", "p2"])
    assert scorer.retrieve(user="u1", k=2, time=10_000.0) == scorer.rank(
        user="u1", candidates=["p1", "p2"], time=10_000.0
    )


def trainer_copy(trainer: sr.OnlineTrainer) -> sr.OnlineTrainer:
    """Another in the same state, whose labels stay open: it scores what comes next as the first would."""
    twin = trainer_of(None)
    twin.model.load_state_dict(trainer.model.state_dict())
    twin.preprocessors[0].load_state_dict(trainer.preprocessors[0].state_dict())
    return twin
