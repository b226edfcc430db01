from __future__ import annotations

import math
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamrec.errors import ConfigError
from streamrec.evaluators import AUC, CTR, ConversionRate, LogLoss, ProgressiveValidation, Window
from streamrec.testing._state import check_state_is_plain, first_difference


def metrics() -> list[Any]:
    return [AUC(), LogLoss(), CTR(kind="conversion"), ConversionRate()]


def stream(seed: int, n: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    times = 1000.0 + np.cumsum(rng.exponential(2.0, n)) - rng.exponential(3.0, n)  # some come late
    times[rng.random(n) < 0.03] = rng.choice([np.nan, np.inf, -np.inf])
    kinds = np.where(rng.random(n) < 0.7, "click", "conversion").tolist()
    kinds[n // 2] = "like"  # which no metric wants
    labels = (rng.random(n) < 0.4).astype(np.float32)
    return labels, rng.random(n, dtype=np.float32), rng.random(n, dtype=np.float32), times, kinds


def plain(validation: ProgressiveValidation) -> list[dict[str, Any]]:
    return [asdict(window) for window in validation.windows()]


def feed(validation: ProgressiveValidation, columns: tuple[Any, ...], cuts: list[int]) -> ProgressiveValidation:
    n = len(columns[0])
    edges = [0, *sorted(min(cut, n) for cut in cuts), n]
    for start, end in pairwise(edges):
        validation.update(*(column[start:end] for column in columns))
    return validation


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 50), st.lists(st.integers(0, 120), max_size=30), st.sampled_from([3.0, 20.0, 1e6]))
def test_cuts_change_no_bit(seed: int, cuts: list[int], window: float) -> None:
    columns = stream(seed, 120)
    whole = feed(ProgressiveValidation(metrics(), window=window, keep=5), columns, [])
    cut = feed(ProgressiveValidation(metrics(), window=window, keep=5), columns, cuts)
    assert first_difference(whole.state_dict(), cut.state_dict()) is None
    assert first_difference(plain(whole), plain(cut)) is None


def test_one_entry_at_a_time_changes_no_bit() -> None:
    columns = stream(1, 200)
    whole = feed(ProgressiveValidation(metrics(), window=10.0), columns, [])
    cut = feed(ProgressiveValidation(metrics(), window=10.0), columns, list(range(1, 200)))
    assert first_difference(whole.state_dict(), cut.state_dict()) is None


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 50), st.integers(0, 120))
def test_resume_equals_no_interruption(seed: int, at: int) -> None:
    columns = stream(seed, 120)
    whole = feed(ProgressiveValidation(metrics(), window=7.0, keep=4), columns, [at])
    first = feed(ProgressiveValidation(metrics(), window=7.0, keep=4), tuple(column[:at] for column in columns), [])
    state = first.state_dict()
    check_state_is_plain(state)
    second = ProgressiveValidation(metrics()[::-1], window=7.0, keep=4)
    second.load_state_dict(state)
    feed(second, tuple(column[at:] for column in columns), [])
    assert first_difference(second.compute(), whole.compute()) is None  # in whatever order the metrics are given
    assert first_difference(plain(second), plain(whole)) is None
    assert second.dropped_windows == whole.dropped_windows


def test_a_state_is_a_cut() -> None:
    columns = stream(0, 120)
    validation = feed(ProgressiveValidation(metrics(), window=7.0), columns, [])
    state = validation.state_dict()
    twin = ProgressiveValidation(metrics(), window=7.0)
    twin.load_state_dict(state)
    feed(validation, columns, [])
    assert first_difference(twin.state_dict(), state) is None


def test_each_window_equals_its_metrics_alone() -> None:
    labels, scores, weights, times, _ = stream(2, 300)
    times = np.sort(np.nan_to_num(times, nan=1000.0, posinf=1000.0, neginf=1000.0))
    validation = ProgressiveValidation([AUC(), LogLoss()], window=50.0)
    for start in range(0, 300, 37):
        rows = slice(start, start + 37)
        validation.update(labels[rows], scores[rows], weights[rows], times[rows])
    windows = validation.windows()
    assert sum(window.count for window in windows) == 300
    for window in windows:
        rows = (times >= window.start) & (times < window.end)
        alone = [AUC(), LogLoss()]
        for metric in alone:
            metric.update(labels[rows], scores[rows], weights[rows])
        assert window.count == rows.sum()
        assert window.end - window.start == 50.0
        assert window.start % 50.0 == 0
        np.testing.assert_equal(window.metrics, {metric.name: metric.compute() for metric in alone})


def bare(validation: ProgressiveValidation) -> list[Window]:
    """The windows without the intervals of their metrics."""
    return [replace(window, intervals={}) for window in validation.windows()]


def test_windows_only_go_forward() -> None:
    validation = ProgressiveValidation([CTR()], window=10.0)
    half = np.float32([0.5] * 5)
    validation.update(np.float32([1, 0, 1, 1, 0]), half, None, np.array([5.0, 12.0, 3.0, np.nan, 40.0]))
    assert bare(validation) == [
        Window(0.0, 10.0, 1, {"CTR": 1.0}),
        Window(10.0, 20.0, 3, {"CTR": pytest.approx(2 / 3)}),  # the late one, and the one of no time
        Window(40.0, 50.0, 1, {"CTR": 0.0}),  # nothing fell into 20 to 40
    ]
    assert validation.compute() == {"CTR": pytest.approx(0.6)}


def test_no_time_before_the_first_window_counts_in_it() -> None:
    validation = ProgressiveValidation([CTR()], window=10.0)
    one = np.float32([1])
    validation.update(one, one, None, np.array([np.nan]))
    assert validation.windows() == []
    twin = ProgressiveValidation([CTR()], window=10.0)
    twin.load_state_dict(validation.state_dict())
    twin.update(one, one, None, np.array([-25.0]))
    assert bare(twin) == [Window(-30.0, -20.0, 2, {"CTR": 1.0})]


def test_old_windows_are_dropped_and_counted() -> None:
    validation = ProgressiveValidation([CTR()], window=1.0, keep=3)
    n = 10
    validation.update(np.ones(n, np.float32), np.ones(n, np.float32), None, np.arange(n, dtype=np.float64))
    assert [window.start for window in validation.windows()] == [6.0, 7.0, 8.0, 9.0]
    assert validation.dropped_windows == 6


def test_without_a_window_there_is_only_the_whole() -> None:
    validation = feed(ProgressiveValidation(metrics()), stream(0, 50), [20])
    assert validation.windows() == []
    assert set(validation.compute()) == {"AUC", "LogLoss", "CTR[conversion]", "ConversionRate"}
    twin = ProgressiveValidation(metrics())
    twin.load_state_dict(validation.state_dict())
    assert first_difference(twin.state_dict(), validation.state_dict()) is None


def test_a_metric_of_several_kinds_sees_them_in_order() -> None:
    seen: list[tuple[str, list[float]]] = []

    class Recorder(ConversionRate):
        def update(self, labels: Any, scores: Any, weights: Any = None, kind: str = "click") -> None:
            seen.append((kind, scores.tolist()))

    validation = ProgressiveValidation([Recorder()])
    scores = np.arange(6, dtype=np.float32)
    kinds = ["click", "click", "like", "conversion", "click", "click"]
    validation.update(scores, scores, None, scores.astype(np.float64), kinds)
    assert seen == [("click", [0, 1]), ("conversion", [3]), ("click", [4, 5])]


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="'AUC'"):
        ProgressiveValidation([AUC(), AUC()])
    with pytest.raises(ConfigError, match="AUC\\(\\)"):
        ProgressiveValidation([AUC])  # type: ignore[list-item]
    for window in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="window"):
            ProgressiveValidation([], window=window)
    with pytest.raises(ConfigError, match="keep"):
        ProgressiveValidation([], keep=-1)
    two = np.float32([0, 1])
    with pytest.raises(ConfigError, match="as many"):
        ProgressiveValidation([AUC()]).update(two, two, None, np.zeros(3))
    with pytest.raises(ConfigError, match="as many"):
        ProgressiveValidation([AUC()]).update(two, two, None, np.zeros(2), ["click"])
    with pytest.raises(ConfigError, match="of the metrics"):
        ProgressiveValidation([AUC()]).load_state_dict(ProgressiveValidation([CTR()]).state_dict())
    with pytest.raises(ConfigError, match="windows of"):
        ProgressiveValidation([CTR()]).load_state_dict(ProgressiveValidation([CTR()], window=5.0).state_dict())
