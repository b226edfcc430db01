from __future__ import annotations

import math
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import streamrec as sr
from streamrec.evaluators import GAUC, NDCG, Coverage, Recall
from streamrec.testing import check_metric

Column = NDArray[np.float32]


def gauc(labels: Column, scores: Column, weights: Column, groups: NDArray[np.int64]) -> float:
    """The definition, pair by pair."""
    area = total = 0.0
    for group in set(groups.tolist()) - {0}:
        rows = np.flatnonzero(groups == group)
        positive, negative = (weights[rows] * part for part in (labels[rows], 1 - labels[rows]))
        above = scores[rows][:, None] > scores[rows][None]
        tied = scores[rows][:, None] == scores[rows][None]
        pairs = float(positive.sum()) * float(negative.sum())
        if pairs > 0:
            won = float(positive @ (above + tied / 2) @ negative)
            area, total = area + won / pairs * float(weights[rows].sum()), total + float(weights[rows].sum())
    return area / total if total else math.nan


def mean_over_orders(labels: list[int], scores: list[float], k: int, discounts: list[float]) -> float:
    """The gain of the first k places, averaged over all orders in which the scores descend."""
    orders = [
        order for order in permutations(range(len(labels))) if all(scores[a] >= scores[b] for a, b in pairwise(order))
    ]
    gains = [sum(labels[row] * discounts[place] for place, row in enumerate(order[:k])) for order in orders]
    return sum(gains) / len(gains)


def test_the_value_is_that_of_the_definition() -> None:
    check_metric(lambda: GAUC(by="request", capacity=450), reference=gauc, tolerance=2e-3)  # scores are binned


@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.1, 0.3, 0.5, 0.7])), min_size=1, max_size=6),
)
def test_ties_count_as_the_mean_over_their_orders(k: int, rows: list[tuple[int, float]]) -> None:
    labels, scores = [row[0] for row in rows], [row[1] for row in rows]
    columns = np.float32(labels), np.float32(scores), None, "click", np.full(len(rows), 7)
    for metric, discounts in (
        (NDCG(k=k), [1 / math.log2(place + 2) for place in range(6)]),
        (Recall(k=k), [1.0] * 6),
    ):
        metric.update(*columns)
        hits = sum(labels)
        best = sum(discounts[: min(hits, k)]) if isinstance(metric, NDCG) else hits
        if not hits:
            assert math.isnan(metric.compute())
        else:
            assert metric.compute() == pytest.approx(mean_over_orders(labels, scores, k, discounts) / best)


@given(st.integers(0, 2**32), st.sampled_from([4, 16, 60]), st.integers(1, 4))
def test_the_sample_does_not_depend_on_order_or_parts(seed: int, capacity: int, parts: int) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.integers(-(2**63), 2**63 - 1, size=20)
    groups = rng.choice(keys, 200)
    labels, scores = rng.integers(2, size=200).astype(np.float32), (rng.integers(1, 8, 200) / 8).astype(np.float32)
    whole = GAUC(capacity=capacity)
    whole.update(labels, scores, None, "click", groups)
    order = rng.permutation(200)
    pieces = [GAUC(capacity=capacity) for _ in range(parts)]
    for piece, rows in zip(pieces, np.array_split(order, parts), strict=True):
        piece.update(labels[rows], scores[rows], None, "click", groups[rows])
    for piece in pieces[1:]:
        pieces[0].merge(piece)
    assert pieces[0].sampled == whole.sampled
    assert pieces[0].compute() == pytest.approx(whole.compute(), nan_ok=True)
    # what is kept is kept as a whole
    kept = np.isin(groups, whole._cells.sorted()[1])
    assert whole.compute() == pytest.approx(
        gauc(labels[kept], scores[kept], np.ones(int(kept.sum()), np.float32), groups[kept]), nan_ok=True
    )


def test_coverage_is_exact_while_it_fits_and_near_when_not() -> None:
    rng = np.random.default_rng(3)
    keys = rng.integers(-(2**63), 2**63 - 1, size=40_000)
    for capacity, tolerance in ((50_000, 0.0), (4_000, 4 * 1.2 / math.sqrt(4_000))):
        coverage = Coverage(size=80_000, capacity=capacity)
        for part in np.array_split(np.repeat(keys, 2), 7):
            ones = np.full(len(part), 0.5, dtype=np.float32)
            coverage.update(ones, ones, None, "click", part)
        assert coverage.compute() == pytest.approx(0.5, rel=tolerance, abs=1e-12)


def test_notes_are_asked_for() -> None:
    with pytest.raises(sr.ConfigError, match=r"GAUC needs what note\(\) gave .* got none"):
        GAUC().update(np.float32([1]), np.float32([0.5]))
    with pytest.raises(sr.ConfigError, match=r"Slices.* needs"):
        sr.Slices(by="country", metrics=[sr.AUC()]).update(np.float32([1]), np.float32([0.5]))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: GAUC(by=""),
        lambda: GAUC(capacity=0),
        lambda: NDCG(k=0),
        lambda: Coverage(size=0),
        lambda: sr.Slices(by="country", metrics=[]),
        lambda: sr.Slices(by="country", metrics=[sr.Slices(by="item", metrics=[sr.AUC()])]),
        lambda: sr.Slices(by="country", metrics=[sr.AUC()], limit=0),
    ],
)
def test_what_cannot_work_is_refused(wrong: Any) -> None:
    with pytest.raises(sr.ConfigError):
        wrong()


def test_slices_beyond_the_limit_are_pooled() -> None:
    slices = sr.Slices(by="country", metrics=[sr.CTR(), sr.CTR(kind="buy")], limit=2)
    shown = [sr.Impression(f"i{n}", 0.0, "u", "p", {"country": name}) for n, name in enumerate("ABCD")]
    shown.append(sr.Impression("i9", 0.0, "u", "p"))
    notes = slices.note(shown, None)  # type: ignore[arg-type]
    slices.update(np.float32([1, 0, 1, 0, 1]), np.full(5, 0.5, np.float32), None, "click", notes)
    found = {name: value for name, value in slices.compute().items() if not math.isnan(value)}
    assert found == {
        "CTR[country=A]": 1.0,
        "CTR[country=B]": 0.0,
        "CTR[country=(other)]": 0.5,
        "CTR[country=(none)]": 1.0,
    }
    assert "CTR[buy, country=A]" in slices.compute()


def test_a_slice_of_a_metric_within_groups_is_that_metric_of_the_slice_alone() -> None:
    rng = np.random.default_rng(4)
    lands = ["NO" if land else "IT" for land in rng.integers(2, size=600).tolist()]
    shown = [
        sr.Impression(
            f"i{n}", 0.0, f"u{rng.integers(9)}", f"p{rng.integers(30)}", {"land": land, "request": f"r{n // 6}"}
        )
        for n, land in enumerate(lands)
    ]
    metrics = [GAUC(), NDCG(k=2), sr.Recall(k=2), Coverage(size=40), sr.AUC()]
    slices = sr.Slices(by="land", metrics=metrics)
    labels, scores = (rng.random(600) < 0.3).astype(np.float32), rng.random(600, dtype=np.float32)
    slices.update(labels, scores, None, "click", slices.note(shown, None))  # type: ignore[arg-type]
    rows = [n for n, land in enumerate(lands) if land == "NO"]
    for metric in metrics:
        alone: Any = metric.fresh()
        columns: list[Any] = [labels[rows], scores[rows], None, "click"]
        if hasattr(alone, "note"):
            columns.append(alone.note([shown[row] for row in rows], None))
        alone.update(*columns)
        assert slices.compute()[f"{metric.name}[land=NO]"] == alone.compute()
        assert slices.interval()[f"{metric.name}[land=NO]"] == alone.interval()
