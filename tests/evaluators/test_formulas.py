from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

import streamrec as sr
from streamrec.evaluators import formulas
from streamrec.evaluators._accumulate import BINS, bin_of, natural_log

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


@pytest.mark.parametrize("name", ["AUC", "CTR", "Calibration"])
def test_intervals_hold_what_they_are_of_as_often_as_they_say(name: str) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(-1.0, 1.0, (2000, 1000))
    rates = 1 / (1 + np.exp(-logits))
    labels = (rng.random(logits.shape) < rates).astype(np.float32)
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
    for name in ("AUC", "Calibration", "ConversionRate", "CTR"):
        assert np.isnan(getattr(sr, name)().interval()).all()
    auc = sr.AUC()
    auc.update(one, one / 2)
    assert np.isnan(auc.interval()).all()
    report = sr.Report({"CTR": 0.5}, {}, intervals={"CTR": (0.25, 0.75)})
    assert "(0.2500 to 0.7500)" in str(report) and "0.5000 (0.2500 to 0.7500)" in report.to_html()
    assert '"intervals": {"CTR": [0.25, 0.75]}' in report.to_json()
