from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from streamrec.errors import ConfigError
from streamrec.evaluators import AUC, CTR, Calibration, ConversionRate, LogLoss, NormalizedEntropy
from streamrec.testing._metric import check_metric

Column = NDArray[np.float32]

ONE_KIND: list[Callable[..., Any]] = [AUC, LogLoss, NormalizedEntropy, Calibration, CTR]


def both_ways(labels: Column, scores: Column, weights: Column) -> tuple[Any, Any, Any]:
    """A fractional label is a part of a click and a part of a non-click."""
    y, w = labels.astype(np.float64), weights.astype(np.float64)
    return np.repeat([1, 0], len(y)), np.tile(scores.astype(np.float64), 2), np.concatenate([w * y, w * (1 - y)])


def auc(labels: Column, scores: Column, weights: Column) -> float:
    hard, twice, masses = both_ways(labels, scores, weights)
    return float(roc_auc_score(hard, twice, sample_weight=masses))


def log_loss(labels: Column, scores: Column, weights: Column) -> float:
    hard, twice, masses = both_ways(labels, np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7), weights)
    return float(sklearn_log_loss(hard, twice, sample_weight=masses))


def entropy(labels: Column, scores: Column, weights: Column) -> float:
    base = np.average(labels.astype(np.float64), weights=weights.astype(np.float64))
    return log_loss(labels, scores, weights) / -(base * math.log(base) + (1 - base) * math.log(1 - base))


def calibration(labels: Column, scores: Column, weights: Column) -> float:
    w = weights.astype(np.float64)
    return float((scores * w).sum() / (labels * w).sum())


def ctr(labels: Column, scores: Column, weights: Column) -> float:
    return float(np.average(labels.astype(np.float64), weights=weights.astype(np.float64)))


@pytest.mark.parametrize(
    ("make", "reference", "tolerance"),
    [
        (AUC, auc, 1e-3),  # binned; how near it is for many entries is tested below
        (LogLoss, log_loss, 1e-9),
        (NormalizedEntropy, entropy, 1e-9),
        (Calibration, calibration, 1e-6),
        (CTR, ctr, 1e-9),
    ],
)
def test_contract_and_reference(make: Callable[..., Any], reference: Any, tolerance: float) -> None:
    check_metric(make, reference=reference, tolerance=tolerance, kinds=("click",))
    check_metric(lambda: make(kind="purchase"), reference=reference, tolerance=tolerance, kinds=("purchase",))


def test_contract_of_the_conversion_rate() -> None:
    check_metric(ConversionRate, kinds=("click", "conversion"))
    check_metric(lambda: ConversionRate(of="refund", per="purchase"), kinds=("purchase", "refund"))


unit = st.floats(0, 1, width=32)
entries = st.integers(2, 60).flatmap(
    lambda n: st.tuples(
        arrays(np.float32, n, elements=st.one_of(st.sampled_from([0.0, 1.0]), unit)),
        arrays(np.float32, n, elements=st.one_of(unit, st.floats(0.25, 0.2501220703125, width=32))),
        arrays(np.float32, n, elements=st.floats(0.125, 100, width=32)),
    )
)


@settings(deadline=None)
@given(entries)
def test_exact_auc_lies_within_the_error_bound(columns: tuple[Column, Column, Column]) -> None:
    metric = AUC()
    metric.update(*columns)
    if math.isnan(metric.compute()):
        assert math.isnan(metric.error_bound())
        return
    hard, _, masses = both_ways(*columns)
    if not masses[hard == 1].sum() * masses[hard == 0].sum() > 1e-9:
        return  # the reference itself rounds here
    # scikit-learn drops points on a line but keeps the value; ties count half in both
    assert abs(metric.compute() - auc(*columns)) <= metric.error_bound() + 1e-9
    assert 0 <= metric.compute() <= 1


@settings(deadline=None)
@given(entries)
def test_sums_equal_the_reference(columns: tuple[Column, Column, Column]) -> None:
    labels, scores, weights = (column.astype(np.float64) for column in columns)
    made = [LogLoss(), Calibration(), CTR()]
    for metric in made:
        metric.update(*columns)
    p = np.clip(scores, 1e-7, 1 - 1e-7)
    loss = -(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    assert made[0].compute() == pytest.approx(np.average(loss, weights=weights), rel=1e-12)
    assert made[2].compute() == pytest.approx(np.average(labels, weights=weights), rel=1e-12)
    if (labels * weights).sum() > 0:
        assert made[1].compute() == pytest.approx((scores * weights).sum() / (labels * weights).sum(), rel=1e-12)


@pytest.mark.parametrize("low", [0.01, 0.3, 0.49, 0.9])
def test_auc_of_concentrated_scores(low: float) -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(low, low + 0.01, 100_000).astype(np.float32)
    labels = (rng.random(100_000) < scores).astype(np.float32)
    metric = AUC()
    metric.update(labels, scores)
    assert abs(metric.compute() - roc_auc_score(labels, scores)) < 1e-4


def test_auc_of_ties_and_of_order() -> None:
    metric = AUC()
    metric.update(np.float32([0, 1, 0, 1]), np.float32([0.3, 0.3, 0.3, 0.3]))
    assert metric.compute() == 0.5
    assert metric.error_bound() == 0.5
    ordered = AUC()
    ordered.update(np.float32([1, 0]), np.float32([0.0, 1.0]))
    assert ordered.compute() == 0.0
    assert ordered.error_bound() == 0.0


@pytest.mark.parametrize("make", ONE_KIND)
def test_what_cannot_be_judged_is_skipped_and_counted(make: Callable[..., Any]) -> None:
    labels, scores, weights = np.float32([1, 0, 1]), np.float32([0.7, 0.2, 0.4]), np.float32([1, 2, 3])
    clean, spoiled = make(), make()
    clean.update(labels, scores, weights)
    nan, inf = np.float32(np.nan), np.float32(np.inf)
    bad = [(nan, 0.5, 1), (2, 0.5, 1), (-1, 0.5, 1), (1, nan, 1), (1, 1.5, 1), (1, -0.5, 1), (1, inf, 1)]
    bad += [(1, 0.5, nan), (1, 0.5, -1), (1, 0.5, inf)]
    for label, score, weight in bad:
        spoiled.update(np.float32([label]), np.float32([score]), np.float32([weight]))
    spoiled.update(labels, scores, weights)
    assert spoiled.compute() == clean.compute()
    assert spoiled.skipped == len(bad)
    twin = make()
    twin.load_state_dict(spoiled.state_dict())
    twin.merge(spoiled)
    assert twin.skipped == 2 * len(bad)
    assert math.isfinite(twin.compute())


@pytest.mark.parametrize("make", ONE_KIND)
def test_scores_of_zero_and_one(make: Callable[..., Any]) -> None:
    metric = make()
    metric.update(np.float32([1, 0]), np.float32([0, 1]))
    assert math.isfinite(metric.compute())


@pytest.mark.parametrize("make", [*ONE_KIND, ConversionRate])
def test_other_layouts_and_types_give_the_same(make: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    labels, scores = (rng.random(20) < 0.5).astype(np.float32), rng.random(20, dtype=np.float32)
    weights = rng.random(20, dtype=np.float32)
    plain, strided, frozen, listed = make(), make(), make(), make()
    plain.update(labels, scores, weights)
    strided.update(np.repeat(labels, 2)[::2], np.repeat(scores, 2)[::2], np.repeat(weights, 2)[::2])
    columns = [labels.copy(), scores.copy(), weights.copy()]
    for column in columns:
        column.flags.writeable = False
    frozen.update(*columns)
    listed.update(labels.astype(np.float64), scores.tolist(), weights.astype(np.float64))
    for other in (strided, frozen, listed):
        np.testing.assert_equal(other.state_dict(), plain.state_dict())


@pytest.mark.parametrize("make", [*ONE_KIND, ConversionRate])
def test_columns_that_do_not_fit(make: Callable[..., Any]) -> None:
    two, three = np.float32([0, 1]), np.float32([0.5, 0.5, 0.5])
    empty = np.zeros(0, dtype=np.float32)
    for columns in ((two, three), (two, two, three), (two, two, empty)):
        with pytest.raises(ConfigError, match="as many"):
            make().update(*columns)
    with pytest.raises(ConfigError, match="shape"):
        make().update(two[:, None], two[:, None])
    untouched = make()
    untouched.update(empty, empty)
    np.testing.assert_equal(untouched.state_dict(), make().state_dict())


def test_names_kinds_and_settings() -> None:
    assert AUC().name == "AUC"
    assert AUC(kind="purchase").name == "AUC[purchase]"
    assert repr(AUC(kind="purchase")) == "AUC(kind='purchase')"
    assert ConversionRate().name == "ConversionRate"
    assert ConversionRate(of="purchase").name == "ConversionRate[purchase]"
    assert ConversionRate(of="refund", per="purchase").name == "ConversionRate[refund per purchase]"
    with pytest.raises(ConfigError, match="different kinds"):
        ConversionRate(of="click")
    with pytest.raises(ConfigError, match="kind"):
        AUC(kind="")
    with pytest.raises(ConfigError, match="cannot merge"):
        AUC().merge(AUC(kind="purchase"))
    with pytest.raises(ConfigError, match="shape"):
        LogLoss().load_state_dict(AUC().state_dict())


def test_conversion_rate_weighs_both_kinds() -> None:
    metric = ConversionRate()
    assert math.isnan(metric.compute())
    half = np.float32([0.5, 0.5])
    metric.update(np.float32([1, 1]), half, np.float32([3, 1]), "click")
    metric.update(np.float32([1, 0]), half, np.float32([3, 1]), "conversion")
    assert metric.compute() == 0.75


def test_import_loads_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, streamrec.evaluators; print([m for m in ('torch', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
