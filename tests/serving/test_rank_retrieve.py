"""Scorer.rank and Scorer.retrieve: what `score` says of the full impressions, however it is computed."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec.preprocessors import encode

FIELDS: Sequence[Any] = (
    sr.Id("user"),
    sr.Id("item"),
    sr.Id("device"),
    sr.Ids("genres"),
    sr.Number("price", log=True, standardize=True),
    sr.Number("age", scale=10.0),
)
SCHEMA = sr.Schema(*FIELDS)
NAMES = itertools.count()


def examples(count: int, start: int = 0) -> list[sr.Labeled]:
    return [
        sr.Labeled(
            sr.Impression(
                f"i{n}",
                1.7e9 + n,
                f"u{n % 6}",
                f"p{n % 10}",
                {
                    "device": "tv" if n % 4 else "phone",
                    "genres": ["abc"[n % 3], "d"],
                    "price": 1.0 + n % 11,
                    "age": n % 5,
                },
            ),
            float((n * 7) % 10 < n % 6),
        )
        for n in range(start, start + count)
    ]


def trained(schema: sr.Schema = SCHEMA, model: Any = None) -> sr.OnlineTrainer:
    trainer = sr.OnlineTrainer(model=model or sr.FM(schema, dim=4), store=f"memory://test-rank-retrieve/{next(NAMES)}")
    trainer.push(examples(200))
    trainer.publish()
    return trainer


def scorer_of(trainer: sr.OnlineTrainer, **given: Any) -> sr.Scorer:
    assert trainer.store is not None
    return sr.Scorer(trainer.store, **given)


def brute(
    scorer: sr.Scorer,
    user: str,
    candidates: Sequence[str | sr.Candidate],
    shared: Mapping[str, Any],
    catalogue: Sequence[str | sr.Candidate] = (),
) -> list[tuple[str, float]]:
    """By `score`, on impressions with all features: shared ones, the catalogue's on top, the candidate's on top."""
    whole = [sr.Candidate(one) if isinstance(one, str) else one for one in catalogue]
    listed = {one.item: one.features for one in whole}
    owned = {name for features in listed.values() for name in features}
    shown = []
    for one in candidates:
        item, own = (one, {}) if isinstance(one, str) else (one.item, one.features)
        below = {name: value for name, value in shared.items() if item not in listed or name not in owned}
        shown.append(sr.Impression("", 0.0, user, item, {**below, **listed.get(item, {}), **own}))
    return [(one.item, float(score)) for one, score in zip(shown, scorer.score(shown), strict=True)]


def same(found: Sequence[sr.Ranked], expected: Sequence[tuple[str, float]], k: int | None = None) -> None:
    """The best, in order, their scores to 1e-5; where two are that near, either may come first."""
    best = sorted((score for _, score in expected), reverse=True)[:k]
    assert [one.score for one in found] == pytest.approx(best, abs=1e-5)
    left = list(expected)
    for one in found:
        match = min((each for each in left if each[0] == one.item), key=lambda each: abs(each[1] - one.score))
        assert match[1] == pytest.approx(one.score, abs=1e-5)
        left.remove(match)


FEATURES = st.fixed_dictionaries(
    {},
    optional={
        "device": st.sampled_from(["tv", "phone", "new", None, 3.5]),
        "genres": st.sampled_from([["a"], ["a", "b", "z"], [], None, {"a": 2.0, "c": -0.5}]),
        "price": st.sampled_from([0.5, 4, 90.0, None, "cheap"]),
        "age": st.sampled_from([1, 30.5, None]),
        "item": st.just("ignored"),
        "elsewhere": st.just(1),
    },
)
ITEMS = st.integers(0, 14).map(lambda n: f"p{n}")
CANDIDATES = st.lists(st.one_of(ITEMS, st.builds(sr.Candidate, ITEMS, FEATURES)), max_size=12)
SCORERS: dict[tuple[str, ...], sr.Scorer] = {}


def made(fields: tuple[str, ...]) -> sr.Scorer:
    if fields not in SCORERS:
        SCORERS[fields] = scorer_of(trained(sr.Schema(*(f for f in FIELDS if f.name in fields), seed=len(fields))))
    return SCORERS[fields]


SCHEMAS = st.sampled_from(
    [
        SCHEMA.names,
        ("user", "item"),
        ("item",),
        ("user", "device"),
        ("genres", "price", "age"),
        ("item", "genres", "price"),
        ("user", "item", "device", "price"),
    ]
)


@settings(deadline=None, max_examples=150)
@given(SCHEMAS, CANDIDATES, FEATURES, st.one_of(st.none(), st.integers(0, 14)), st.sampled_from(["u1", "nobody"]))
def test_rank_is_score_in_order(fields: Any, candidates: Any, shared: Any, k: Any, user: str) -> None:
    scorer = made(tuple(fields))
    scorer._serving = scorer._serving._replace(catalogue=None)
    expected = brute(scorer, user, candidates, shared)
    same(scorer.rank(user=user, candidates=candidates, features=shared, k=k), expected, k)


@settings(deadline=None, max_examples=150)
@given(
    SCHEMAS,
    st.lists(st.builds(sr.Candidate, ITEMS, FEATURES), max_size=15, unique_by=lambda one: one.item),
    CANDIDATES,
    FEATURES,
    st.one_of(st.none(), st.integers(0, 16)),
    st.sets(ITEMS, max_size=4),
)
def test_with_a_catalogue_too(fields: Any, catalogue: Any, candidates: Any, shared: Any, k: Any, out: Any) -> None:
    scorer = made(tuple(fields))
    scorer.set_catalogue(catalogue)
    expected = brute(scorer, "u2", candidates, shared, catalogue)
    same(scorer.rank(user="u2", candidates=candidates, features=shared, k=k), expected, k)
    names = [one.item for one in catalogue]
    expected = brute(scorer, "u2", names, shared, catalogue)
    same(scorer.rank(user="u2", candidates=names, features=shared, k=k), expected, k)
    expected = [one for one in expected if one[0] not in out]
    same(scorer.retrieve(user="u2", k=k, features=shared, exclude=out), expected, k)


def test_ties_come_in_the_catalogue_s_order() -> None:
    scorer = made(("user", "device"))  # to which all items are one
    order = [f"p{(7 * n) % 101}" for n in range(101)]
    scorer.set_catalogue(order)
    for k in (0, 1, 3, 5, 50, 101, 500, None):
        assert [one.item for one in scorer.retrieve(user="u1", k=k)] == order[:k]
    assert [one.item for one in scorer.retrieve(user="u1", k=3, exclude=[order[0], order[2], "gone"])] == [
        order[n] for n in (1, 3, 4)
    ]
    assert scorer.rank(user="u1", candidates=order, k=0) == []
    assert all(type(one) is sr.Ranked and type(one.score) is float for one in scorer.retrieve(user="u1", k=2))


def test_an_empty_catalogue_and_mistakes() -> None:
    scorer = scorer_of(trained())
    with pytest.raises(sr.ConfigError, match=r"no catalogue to retrieve from: call set_catalogue\(candidates\) first"):
        scorer.retrieve(user="u1", k=3)
    scorer.set_catalogue([])
    assert scorer.retrieve(user="u1", k=3) == scorer.rank(user="u1", candidates=[]) == []
    assert [one.item for one in scorer.rank(user="u1", candidates=["p1"])] == ["p1"]
    with pytest.raises(sr.ConfigError, match="k must be >= 0, got -1"):
        scorer.retrieve(user="u1", k=-1)
    with pytest.raises(sr.ConfigError, match=r"the one text 'p1'; pass \['p1'\]"):
        scorer.retrieve(user="u1", k=1, exclude="p1")
    scorer.set_catalogue(["p1", "p2"])
    with pytest.raises(sr.ConfigError, match="the catalogue holds 'p7' twice: give each item once"):
        scorer.set_catalogue(["p7", "p3", sr.Candidate("p7", {"price": 3.0})])
    assert {one.item for one in scorer.retrieve(user="u1", k=None)} == {"p1", "p2"}  # the one before is kept


def test_what_is_unusable_is_counted() -> None:
    scorer = scorer_of(trained())
    scorer.set_catalogue([sr.Candidate("p1", {"price": "cheap"}), "p2"])
    assert scorer.counts == {"price": 1}
    scorer.retrieve(user="u1", k=1, features={"device": 3.5})
    assert scorer.counts == {"price": 1, "device": 1}
    scorer.rank(user="u1", candidates=["p1", "p2"], features={"device": 3.5})  # as score would: once a candidate
    assert scorer.counts == {"price": 1, "device": 3}


CATALOGUE = [sr.Candidate(f"p{n}", {"price": float(n), "genres": ["abc"[n % 3]]}) for n in range(30)]


def test_refresh_swaps_the_parts_with_the_version() -> None:
    trainer = trained()
    scorer = scorer_of(trainer)
    scorer.set_catalogue(CATALOGUE)
    before = scorer.retrieve(user="u1", k=5)
    trainer.push(examples(100, start=200))
    trainer.publish()
    assert scorer.retrieve(user="u1", k=5) == before
    assert scorer.refresh() is True
    after = scorer.retrieve(user="u1", k=5)
    assert after != before
    fresh = scorer_of(trainer)
    fresh.set_catalogue(CATALOGUE)
    assert after == fresh.retrieve(user="u1", k=5)
    same(after, brute(scorer, "u1", [one.item for one in CATALOGUE], {}, CATALOGUE), 5)


def test_requests_see_one_version_whole() -> None:
    trainer = trained()
    scorer = scorer_of(trainer)
    scorer.set_catalogue(CATALOGUE)
    names = [one.item for one in CATALOGUE]
    known, seen, errors = set(), set(), list[BaseException]()
    done = threading.Event()

    def expect() -> None:
        other = scorer_of(trainer)
        other.set_catalogue(CATALOGUE)
        known.add(tuple(other.retrieve(user="u1", k=None)))

    def work(retrieves: bool) -> None:
        try:
            while not done.is_set():
                found = scorer.retrieve(user="u1", k=None) if retrieves else scorer.rank(user="u1", candidates=names)
                seen.add(tuple(found))
        except BaseException as error:
            errors.append(error)

    expect()
    threads = [threading.Thread(target=work, args=(place > 0,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for number in range(8):
        trainer.push(examples(50, start=300 + 50 * number))
        trainer.publish()
        expect()
        assert scorer.refresh()
        done.wait(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert errors == [] and len(known) == 9 and len(seen) > 1 and seen <= known


class Mean:
    """A model that is no FM: each item's click rate, smoothed, with the price on top."""

    def __init__(self) -> None:
        self.schema = SCHEMA
        self.rate = 0.5

    def predict(self, batch: sr.Batch) -> Any:
        first = [batch.ids[start + 1] % 97 + batch.values[start + 3] for start in batch.starts]
        return (np.array(first, dtype=np.float32).reshape(-1) / 300 + np.float32(self.rate)) / 3

    def learn(self, batch: sr.Batch, labels: Any, weights: Any = None) -> None:
        self.rate = float(np.mean(labels))

    def state_dict(self) -> dict[str, Any]:
        return {"rate": self.rate}

    def load_state_dict(self, state: Any) -> None:
        self.rate = state["rate"]


def test_a_model_that_is_no_fm_scores_whole_impressions() -> None:
    trainer = trained(model=Mean())
    scorer = scorer_of(trainer, model=Mean)
    shared = {"device": "tv", "price": 9.0}
    mixed = ["p3", sr.Candidate("p1", {"price": 3.0}), "stranger"]
    same(scorer.rank(user="u1", candidates=mixed, features=shared), brute(scorer, "u1", mixed, shared))
    scorer.set_catalogue(CATALOGUE)
    expected = brute(scorer, "u1", mixed, shared, CATALOGUE)
    same(scorer.rank(user="u1", candidates=mixed, features=shared), expected)
    everything = brute(scorer, "u1", [one.item for one in CATALOGUE], shared, CATALOGUE)
    for k in (0, 4, 99, None):
        same(scorer.retrieve(user="u1", k=k, features=shared), everything, k)
    left = [one for one in everything if one[0] != "p4"]
    same(scorer.retrieve(user="u1", k=None, features=shared, exclude=["p4"]), left)
    trainer.push(examples(30, start=900))
    trainer.publish()
    assert scorer.refresh()
    same(scorer.retrieve(user="u1", k=5), brute(scorer, "u1", [one.item for one in CATALOGUE], {}, CATALOGUE), 5)


def test_ranking_is_warm_when_a_scorer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    import streamrec.models.ranking as ranking

    trainer = trained()
    ranking._kernels_of.cache_clear()
    scorer = scorer_of(trainer)
    kernels: Any = ranking._kernels_of(4)
    compiled = [len(kernel.signatures) for kernel in kernels]
    assert all(compiled)
    scorer.set_catalogue(CATALOGUE)
    scorer.rank(user="u1", candidates=["p1", "stranger", sr.Candidate("p2", {"price": 1.0})], k=2)
    scorer.rank(user="u1", candidates=["p1", "p2"])
    scorer.retrieve(user="u1", k=1, exclude=["p1"])
    assert [len(kernel.signatures) for kernel in kernels] == compiled


def test_reading_changes_nothing() -> None:
    trainer = trained()
    scorer = scorer_of(trainer)
    scorer.set_catalogue(CATALOGUE)
    shown = [one.impression for one in examples(20)]
    before = scorer.score(shown)
    shared = {"device": "tv"}
    scorer.rank(user="new", candidates=["p1", "never seen"], features=shared)
    scorer.retrieve(user="new", k=3, features=shared)
    assert shared == {"device": "tv"}
    assert scorer.score(shown).tobytes() == before.tobytes()
    assert before.tobytes() == trainer.model.predict(encode(SCHEMA, shown).batch).tobytes()
