"""Uses of one score: rules, diversity, search, ads and exploration, each against its formula or a known answer."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec.evaluators import ips, snips
from streamrec.preprocessors import encode
from streamrec.serving import Ranked, Rules, auction, blended, diversified, epsilon_greedy, thompson

RANKED = st.lists(st.floats(0, 1), max_size=8).map(
    lambda scores: [Ranked(f"p{n}", score) for n, score in enumerate(sorted(scores, reverse=True))]
)


@given(RANKED, st.sets(st.integers(0, 8)), st.sets(st.integers(0, 8)), st.integers(0, 3), st.integers(0, 9))
def test_rules_keep_what_may_be_shown_in_order(
    ranked: list[Ranked], allow: set[int], deny: set[int], most: int, k: int
) -> None:
    kind = {f"p{n}": "ab"[n % 2] for n in range(6)}
    rules = Rules(allow=[f"p{n}" for n in allow], deny=[f"p{n}" for n in deny], most={"a": most}, category=kind)
    kept = rules(ranked, k)
    assert kept == [one for one in ranked if one in kept] and len(kept) <= k
    assert all(int(one.item[1:]) in allow - deny for one in kept)
    assert sum(kind.get(one.item) == "a" for one in kept) <= most
    if len(kept) < k:  # nothing was left out that could have been there
        for one in ranked:
            allowed = int(one.item[1:]) in allow - deny
            assert one in kept or not allowed or kind.get(one.item) == "a"
    assert Rules()(ranked) == ranked and Rules(most=1, category=lambda item: "one")(ranked) == ranked[:1]


@settings(deadline=None)
@given(RANKED, st.integers(0, 9), st.floats(0, 1), st.integers(0, 100))
def test_diversity_is_maximal_marginal_relevance(ranked: list[Ranked], k: int, balance: float, seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(len(ranked), 3))
    cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in vectors] for a in vectors])
    places = [ranked.index(one) for one in diversified(ranked, vectors, k=k, balance=balance)]
    assert len({*places}) == min(k, len(ranked))

    def value(n: int, before: list[int]) -> float:  # the formula, word for word
        return balance * ranked[n].score - (1 - balance) * max((cosine[n, m] for m in before), default=0.0)

    for turn, place in enumerate(places):
        before = places[:turn]
        best = max(value(n, before) for n in range(len(ranked)) if n not in before)
        assert value(place, before) == pytest.approx(best, abs=1e-9)


def test_search_blends_what_is_on_one_scale() -> None:
    ranked = [Ranked("a", 0.9), Ranked("b", 0.5), Ranked("c", 0.1)]
    assert [one.score for one in blended(ranked, {"a": 10.0, "b": 30.0, "c": 20.0}, weight=0.5)] == pytest.approx(
        [0.75, 0.5, 0.25]
    )
    assert [one.item for one in blended(ranked, {"c": 1.0, "b": math.nan}, weight=1.0)] == ["c", "a", "b"]
    assert [one.item for one in blended(ranked, {}, weight=0.5)] == ["a", "b", "c"]
    assert blended([], {}) == [] and diversified([], []) == [] and Rules()([]) == []


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 10)), max_size=7), st.integers(0, 4), st.floats(0, 3))
def test_a_winner_pays_the_least_that_would_have_won(
    ads: list[tuple[float, float]], places: int, reserve: float
) -> None:
    ranked = [Ranked(f"a{n}", score) for n, (score, _) in enumerate(ads)]
    bids = {f"a{n}": bid for n, (_, bid) in enumerate(ads)}
    won, refused = auction(ranked, bids, places=places, reserve=reserve)
    values = sorted((s * b for s, b in ads if b >= reserve), reverse=True)
    assert [one.value for one in won] == values[:places]
    assert len(refused) == sum(bid < reserve for _, bid in ads)
    for place, one in enumerate(won):
        assert reserve <= one.price <= one.bid
        below = values[place + 1] if place + 1 < len(values) else 0.0
        assert one.price * one.score == pytest.approx(max(below, reserve * one.score))


def test_what_cannot_bid_is_told_why() -> None:
    ranked = [Ranked(item, score) for item, score in (("a", 0.1), ("b", 0.2), ("c", 0.3), ("d", math.nan), ("e", 0.1))]
    bids = {"a": math.nan, "b": -1.0, "d": 1.0, "e": 2.0, "stranger": 5.0}
    won, refused = auction(ranked, bids, places=3, reserve=0.5)
    assert [(one.item, one.price) for one in won] == [("e", 0.5)]
    assert refused == {
        "a": "the bid is nan",
        "b": "the bid is -1.0",
        "c": "no bid",
        "d": "the score is nan",
        "stranger": "no candidate",
    }
    assert auction([], {}) == ([], {})


@pytest.mark.parametrize("policy", ["epsilon", "thompson"])
def test_a_log_with_propensities_tells_what_another_policy_would_earn(policy: str) -> None:
    rng = np.random.default_rng(7)
    rates = {"a": 0.30, "b": 0.10, "c": 0.20}  # of clicks, which nobody knows; the model believes in another order
    believed = [Ranked("b", 0.25), Ranked("a", 0.24), Ranked("c", 0.10)]
    log = []
    for number in range(6000):
        if policy == "epsilon":
            (one,) = epsilon_greedy(believed, rng=rng, epsilon=0.3)
        else:
            (one,) = thompson(believed, [0.5, 0.5, 1.0], rng=rng, draws=20, epsilon=0.1)
        shown = sr.Impression(f"i{number}", float(number), "u", one.item, {"propensity": one.propensity})
        log.append(sr.Labeled(shown, float(rng.random() < rates[one.item])))
    rewards = [one.label for one in log]
    logged = [one.impression.features["propensity"] for one in log]
    for item, rate in rates.items():  # had that item always been shown
        target = [float(one.impression.item == item) for one in log]
        for estimate in (
            snips(rewards, logged, target, confidence=0.999),
            ips(rewards, logged, target, confidence=0.999),
        ):
            assert estimate.low < rate < estimate.high and estimate.high - estimate.low < 0.2
    mixed = [1 / 3] * len(log)
    assert snips(rewards, logged, mixed).value == pytest.approx(0.2, abs=0.03)


def test_propensities_are_how_often_a_choice_is_made() -> None:
    ranked = [Ranked("a", 0.5), Ranked("b", 0.3), Ranked("c", 0.2)]
    rng = np.random.default_rng(0)
    times = 4000
    seen: dict[tuple[str, ...], int] = dict.fromkeys(itertools.permutations("abc", 2), 0)
    chance = dict.fromkeys(seen, 0.0)
    for _ in range(times):
        shown = epsilon_greedy(ranked, rng=rng, k=2, epsilon=0.4)
        order = tuple(one.item for one in shown)
        seen[order] += 1
        chance[order] = shown[0].propensity * shown[1].propensity
    assert sum(chance.values()) == pytest.approx(1.0)
    for order, count in seen.items():
        assert count / times == pytest.approx(chance[order], abs=0.03)
    odd = [Ranked("odd", math.nan), *ranked]
    assert [one.item for one in epsilon_greedy(odd, rng=rng, k=9, epsilon=0.0)] == ["a", "b", "c", "odd"]
    assert [one.item for one in thompson(odd, [0.0] * 4, rng=rng, k=9, epsilon=0.0)] == ["a", "b", "c", "odd"]
    assert epsilon_greedy([], rng=rng) == [] and thompson([], [], rng=rng) == []


SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Number("price", standardize=True))


def test_what_was_shown_often_is_sure_in_the_scorer_as_in_the_trainer() -> None:
    trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), store="memory://test-uses-deviations")

    def learn(items: list[str]) -> None:
        shown = [sr.Impression(f"i{n}", 0.0, f"u{n % 300}", item, {"price": n % 5}) for n, item in enumerate(items)]
        trainer.push([sr.Labeled(one, float(n % 2)) for n, one in enumerate(shown)])
        trainer.publish()

    learn([f"p{min(n % 40, 5)}" for n in range(2000)])
    scorer = sr.Scorer("memory://test-uses-deviations")
    asked = {"user": "u1", "candidates": ["p5", "p1", "never"], "features": {"price": 2.0}}
    shown = [sr.Impression("", 0.0, "u1", item, {"price": 2.0}) for item in ("p5", "p1", "never")]
    for turn in range(4):
        found = scorer.view().deviations(**asked)
        assert found[0] < found[1] < found[2] and found[2] > 1.0
        assert (found == trainer.model.deviation(trainer._encoder(shown)[0])).all()
        if turn < 3:
            learn(["p1"] * 20)
            assert scorer.refresh()
            assert scorer.view().deviations(**asked)[1] < found[1]
    assert np.diff(scorer.view().deviations(**asked, prior=3.0))[-1] > np.diff(found)[-1]
    vectors = scorer.view().vectors(["p5", "p1"])
    scorer.set_catalogue(["p1", "p5"])
    assert vectors.shape == (2, 4) and (scorer.view().vectors(["p5", "p1"]) == vectors).all()


def test_what_cannot_work_is_refused() -> None:
    rng = np.random.default_rng(0)
    one = [Ranked("a", 0.5)]
    for wrong in (
        lambda: Rules(allow="a"),
        lambda: Rules(most=1),
        lambda: Rules(most=-1, category={}),
        lambda: Rules()(one, -1),
        lambda: diversified(one, [[1.0]], balance=2.0),
        lambda: diversified(one, [[math.nan]]),
        lambda: diversified(one, [1.0]),
        lambda: blended(one, {}, weight=-1.0),
        lambda: auction(one, {}, places=-1),
        lambda: auction(one, {}, reserve=math.nan),
        lambda: epsilon_greedy(one, rng=rng, epsilon=1.5),
        lambda: epsilon_greedy(one, rng=rng, k=-1),
        lambda: thompson(one, [math.nan], rng=rng),
        lambda: thompson(one, [1.0, 2.0], rng=rng),
        lambda: thompson(one, [1.0], rng=rng, draws=0),
    ):
        with pytest.raises(sr.ConfigError):
            wrong()
    plain = sr.FM(SCHEMA, dim=4, optimizer=sr.SGD())
    with pytest.raises(sr.ConfigError, match="keeps no sum of squared gradients"):
        plain.deviation(encode(SCHEMA, []).batch)
