from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

import streamrec as sr
from streamrec.evaluators import formulas
from streamrec.evaluators._accumulate import BINS, bin_middles, bin_of, natural_log

counts = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=30)


@given(counts)
def test_auc_from_histograms_is_that_of_scikit_learn(bins: list[tuple[int, int]]) -> None:
    positives, negatives = np.array(bins, dtype=np.float64).T
    value = formulas.auc_from_histograms(positives, negatives)
    if not positives.sum() or not negatives.sum():
        assert math.isnan(value)
        return
    places = np.arange(len(bins))
    labels = np.repeat([1, 0], len(bins))
    weights = np.concatenate([positives, negatives])
    assert value == pytest.approx(roc_auc_score(labels, np.tile(places, 2), sample_weight=weights), abs=1e-12)


def test_normalized_entropy_is_the_ratio_to_the_average() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(500) * 0.98 + 0.01
    y = (rng.random(500) < p).astype(float)
    loss = sklearn_log_loss(y, p)
    average = sklearn_log_loss(y, np.full(500, y.mean()))
    assert formulas.normalized_entropy(loss * 500, y.sum(), 500) == pytest.approx(loss / average)


@pytest.mark.parametrize(("positives", "total"), [(0.0, 0.0), (0.0, 5.0), (5.0, 5.0)])
def test_normalized_entropy_is_undefined_for_one_label(positives: float, total: float) -> None:
    assert math.isnan(formulas.normalized_entropy(1.0, positives, total))


def test_nothing_seen_is_undefined() -> None:
    nothing = np.zeros(3)
    for value in (
        formulas.log_loss(0.0, 0.0),
        formulas.calibration(1.0, 0.0),
        formulas.rate(0.0, 0.0),
        formulas.auc_from_histograms(nothing, nothing),
        formulas.auc_error_bound(nothing, nothing),
    ):
        assert math.isnan(value)


@given(st.floats(1e-7, 1.0))
def test_natural_log_is_right_to_the_last_bits(x: float) -> None:
    assert natural_log(x) == pytest.approx(math.log(x), rel=4e-16, abs=1e-300)


def test_bins_keep_the_order_of_scores() -> None:
    rng = np.random.default_rng(0)
    octaves = np.float32(2.0) ** -np.arange(1, 20, dtype=np.float32)
    edges = np.concatenate([octaves, 1 - octaves, [0.0, 1.0]]).astype(np.float32)
    near = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(1))])
    scores = np.sort(
        np.concatenate([near, rng.random(5000, dtype=np.float32), rng.random(5000).astype(np.float32) ** 8])
    )
    places = np.array([bin_of(score) for score in scores])
    assert (np.diff(places) >= 0).all()
    assert places[0] == 0
    assert places[-1] == BINS - 1
    assert bin_of(np.float32(-0.0)) == 0


def test_bins_are_narrow_in_logit() -> None:
    logits = np.linspace(-11, 11, 20_001)
    places = np.array([bin_of(np.float32(1 / (1 + math.exp(-logit)))) for logit in logits])
    widths = np.bincount(places, minlength=BINS)[places.min() : places.max() + 1] * (logits[1] - logits[0])
    assert widths.max() < 0.004 + 2 * (logits[1] - logits[0])


@pytest.mark.parametrize("name", ["AUC", "CTR", "Calibration", "LogLoss", "NormalizedEntropy"])
def test_intervals_hold_what_they_are_of_as_often_as_they_say(name: str) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(-1.0, 1.0, (2000, 1000))
    rates = 1 / (1 + np.exp(-logits))
    labels = (rng.random(logits.shape) < rates).astype(np.float32)
    rates = 1 / (1 + np.exp(-1.4 * logits - 0.2))  # too sure: loss, label and base rate hang together otherwise, too
    whole = getattr(sr, name)()
    whole.update(labels.ravel(), np.float32(rates).ravel())  # a sample of two million: the value itself
    truth, held = whole.compute(), 0
    for row in range(400):
        metric = getattr(sr, name)()
        metric.update(labels[row], np.float32(rates[row]))
        low, high = metric.interval(0.9)
        held += low <= truth <= high
    # 90 % of 400, five deviations of a binomial below; calibration's may be wider, as its docstring says
    assert 330 <= held <= (390 if name != "Calibration" else 400)


def test_intervals_of_too_little_are_undefined() -> None:
    one = np.ones(1, dtype=np.float32)
    for name in (
        "AUC",
        "Calibration",
        "ConversionRate",
        "CTR",
        "LogLoss",
        "NormalizedEntropy",
        "GAUC",
        "NDCG",
        "Recall",
    ):
        assert np.isnan(getattr(sr, name)().interval()).all()
    assert np.isnan(sr.Coverage(size=3).interval()).all()
    auc = sr.AUC()
    auc.update(one, one / 2)
    assert np.isnan(auc.interval()).all()


@pytest.mark.parametrize(
    "metric", [sr.GAUC(), sr.NDCG(k=3, by="user"), sr.Recall(k=3, by="user")], ids=lambda m: m.name
)
def test_intervals_within_groups_are_of_groups_that_are_drawn(metric: Any) -> None:
    """Users whose clicks the scores tell apart well, or badly; some have ten times as many impressions."""
    rng = np.random.default_rng(1)
    users, longest = 40_000, 30
    sizes = np.where(rng.random(users) < 0.1, longest, 4)
    skill = rng.normal(0.5, 0.7, users)
    logits = rng.normal(-0.5, 1.0, (users, longest))
    labels = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    scores = np.float32(1 / (1 + np.exp(-skill[:, None] * logits - rng.normal(0, 0.5, logits.shape))))

    def over(chosen: range) -> Any:
        mine = metric.fresh()
        for user in chosen:
            rows = slice(0, int(sizes[user]))
            notes = np.full(sizes[user], user + 1)
            mine.update(labels[user, rows], scores[user, rows], None, "click", notes)
        return mine

    truth, held = over(range(users)).compute(), 0
    for begin in range(0, users, 100):
        low, high = over(range(begin, begin + 100)).interval(0.9)
        held += low <= truth <= high
    assert 330 <= held <= 390  # 90 % of 400; treating impressions as independent would hold some 60 % of them


def test_coverage_is_exact_until_it_is_a_sample() -> None:
    held = 0
    for seed in range(100):
        metric = sr.Coverage(size=20_000, capacity=500)
        items = np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, 8_000)
        one = np.ones(8_000, dtype=np.float32)
        metric.update(one[:300], one[:300] / 2, None, "click", items[:300])
        assert metric.interval() == (300 / 20_000, 300 / 20_000)
        metric.update(one, one / 2, None, "click", items)
        low, high = metric.interval(0.9)
        held += low <= 0.4 <= high
    assert metric.sampled > 1 and 80 <= held <= 98


def test_the_middles_of_bins_lie_in_them() -> None:
    middles = bin_middles()
    assert [bin_of(np.float32(middle)) for middle in middles[: BINS // 2]] == [*range(BINS // 2)]
    assert middles.tolist() == (1 - middles[::-1]).tolist() and len(middles) == BINS


def test_a_calibration_curve_is_what_was_predicted_and_what_happened() -> None:
    rng = np.random.default_rng(2)
    scores = np.float32(1 / (1 + np.exp(-rng.normal(-2, 1, 50_000))))
    labels = (rng.random(50_000) < scores**1.2).astype(np.float32)
    auc = sr.AUC()
    auc.update(labels, scores)
    curve = auc.calibration_curve(5)
    order = np.argsort(scores)
    for one, rows in zip(curve, np.array_split(order, 5), strict=True):
        assert one.predicted == pytest.approx(scores[rows].mean(), rel=0.01)
        assert one.actual == pytest.approx(labels[rows].mean(), rel=0.02)
        assert one.weight == pytest.approx(10_000, rel=0.02) and one.low < one.actual < one.high < one.predicted
    same = sr.AUC()
    same.update(labels[:100], np.full(100, 0.3, dtype=np.float32))
    assert [one.weight for one in same.calibration_curve()] == [100.0] and sr.AUC().calibration_curve() == []


def test_intervals_are_in_the_text_the_page_and_the_json() -> None:
    report = sr.Report({"CTR": 0.5}, {}, intervals={"CTR": (0.25, 0.75)})
    assert "(0.2500 to 0.7500)" in str(report) and "0.5000 (0.2500 to 0.7500)" in report.to_html()
    assert '"intervals": {"CTR": [0.25, 0.75]}' in report.to_json()
