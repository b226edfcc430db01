from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import streamrec as sr
from streamrec.evaluators import LossDifference
from streamrec.evaluators.sequential import radius
from streamrec.trainers._compare import Comparison


def logistic(x: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-x))).astype(np.float32)


def streams(seed: int, worse: float, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, and the scores of two models that err alike; the first errs by `worse` more."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(-1.5, 1.0, count)
    labels = (rng.random(count) < logistic(truth)).astype(np.float32)
    first, second = (logistic(truth + rng.normal(0.0, 0.3, count) + more) for more in (worse, 0.0))
    return labels, first, second


def test_looking_after_every_hundred_events_errs_as_seldom_as_stated() -> None:
    """A thousand pairs of equally good models. A test for one look would say of many that one is better."""
    wrong = naive = 0
    for seed in range(1000):
        labels, first, second = streams(seed, 0.0, 2_000)
        difference = LossDifference(confidence=0.95)
        looked = naively = False
        for end in range(100, 2_001, 100):
            rows = slice(end - 100, end)
            difference.update(labels[rows], first[rows], second[rows])
            low, high = difference.interval()
            looked |= low > 0 or high < 0
            parts = loss(labels[:end], first[:end]) - loss(labels[:end], second[:end])
            naively |= abs(parts.mean()) > 1.96 * parts.std() / math.sqrt(end)
        wrong += looked
        naive += naively
    assert wrong <= 50  # it is far fewer: the promise is for every stream that may be, and for ever
    assert naive > 150


def loss(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    return -(labels * np.log(p) + (1 - labels) * np.log1p(-p))


@pytest.mark.parametrize(("worse", "within"), [(0.25, 50_000), (1.0, 5_000)])
def test_a_worse_model_is_found_out(worse: float, within: int) -> None:
    found = []
    for seed in range(20):
        labels, first, second = streams(seed, worse, within)
        difference = LossDifference()
        difference.update(labels, first, second)
        found.append(difference.interval()[0] > 0)
        assert difference.mean == pytest.approx(
            np.clip(loss(labels, first) - loss(labels, second), -1, 1).mean(), abs=1e-6
        )
    assert all(found)


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1, width=32), st.floats(0, 1, width=32)), max_size=30))
def test_a_cut_changes_no_bit_and_a_state_goes_on(rows: list[tuple[int, float, float]]) -> None:
    columns = [np.array([row[place] for row in rows], dtype=np.float32) for place in range(3)]
    whole, apart = LossDifference(bound=0.5), LossDifference(bound=0.5)
    whole.update(*columns)
    for n in range(len(rows)):
        apart.update(*(column[n : n + 1] for column in columns))
        other = apart.fresh()
        other.load_state_dict(apart.state_dict())
        apart = other
    assert whole.state_dict()["sums"].tobytes() == apart.state_dict()["sums"].tobytes()
    assert whole.interval() == apart.interval()
    assert whole.interval()[0] <= (whole.mean if rows else 0) <= whole.interval()[1]


def test_a_challenger_that_returns_nan_is_skipped_and_counted() -> None:
    difference = LossDifference()
    difference.update(np.float32([1, 0, 1]), np.float32([0.5, np.nan, 0.5]), np.float32([0.5, 0.5, 2.0]))
    assert (difference.count, difference.skipped, difference.mean) == (1, 2, 0.0)


@pytest.mark.parametrize("squares", [0.0, 1.0, 30.0, 1_000.0, 1e5, 1e9])
@pytest.mark.parametrize("alpha", [0.05, 1e-4])
def test_the_radius_is_where_the_mixture_is_one_in_alpha(squares: float, alpha: float) -> None:
    rates = 0.9 / np.sqrt(2) ** np.arange(34)
    weights = rates * np.exp(-100 * rates**2 / 2)
    reach = radius(squares * 0.25, 0.5, alpha) / 0.5
    terms = np.log(weights / weights.sum()) + rates * reach + (np.log1p(-rates) + rates) * squares
    assert np.logaddexp.reduce(terms) == pytest.approx(-math.log(alpha))
    # of one look at a normal sum the radius would be shorter, always
    assert reach > NormalDist().inv_cdf(1 - alpha) * math.sqrt(squares)


def test_what_is_mixed_is_a_supermartingale_whatever_the_differences() -> None:
    """Fan's inequality at its sharpest: for every x in [-1, 1] and every rate, exp(λx - ψx²) <= 1 + λx."""
    x = np.linspace(-1, 1, 2001)
    for rate in 0.9 / np.sqrt(2) ** np.arange(34):
        assert (np.exp(rate * x + (np.log1p(-rate) + rate) * x * x) <= 1 + rate * x + 1e-12).all()


def test_differences_as_skewed_as_can_be_err_as_seldom_as_stated() -> None:
    """Seldom large losses make up for many small gains; both ends err with 2.5 %, at 5,000 looks."""
    wrong = [0, 0]
    for seed in range(400):
        rng = np.random.default_rng(seed)
        rare = rng.random(5_000) < 0.02
        for side, sums in enumerate((np.cumsum(np.where(rare, 0.98, -0.02)), np.cumsum(np.where(rare, -0.98, 0.02)))):
            squares = np.cumsum(np.where(rare, 0.98**2, 0.02**2))
            looks = range(9, 5_000, 10)
            wrong[side] += any(sums[n] > radius(squares[n], 1.0, 0.025) for n in looks)
    assert max(wrong) <= 400 * 0.025


def test_the_radius_grows_slower_than_the_sum() -> None:
    rates = [radius(0.01 * n, 1.0, 0.025) / n for n in (10**3, 10**4, 10**5, 10**6)]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.001


def test_one_percent_of_normalized_entropy_is_found_within_50_000_events() -> None:
    shift, caught, after = 0.221, 0, []  # of the logit: 1 % more log loss, by a million events
    for seed in range(60):
        labels, first, second = streams(seed, shift, 50_000)
        comparison = Comparison(0.95)
        for begin in range(0, 50_000, 1_000):
            rows = slice(begin, begin + 1_000)
            comparison.update(labels[rows], first[rows], second[rows])
            if comparison.low > 0:
                caught += 1
                after.append(begin + 1_000)
                break
        assert comparison.high >= 0.01 or comparison.low > 0  # it is not taken for one that is not worse
    assert caught >= 59 and np.median(after) <= 20_000


@pytest.mark.parametrize("wrong", [{"bound": 0.0}, {"bound": math.nan}, {"confidence": 1.0}])
def test_what_cannot_work_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(sr.ConfigError):
        LossDifference(**wrong)
    with pytest.raises(sr.ConfigError, match="as many"):
        LossDifference().update(np.zeros(2, np.float32), np.zeros(2, np.float32), np.zeros(3, np.float32))
