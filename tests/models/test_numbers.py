"""Numbers as a model sees them: by rank, by time, and by the clock."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec.errors import ConfigError, SchemaError
from streamrec.models._numbers import MARKERS, QUANTILE, normalized, observe
from streamrec.preprocessors import Encoder, encode
from streamrec.testing import check_model

ROOT12 = 12**0.5


@numba.njit
def _one(x: Any, stats: Any) -> None:
    observe(x, QUANTILE, 0, stats)


START = 1_700_000_000.0


def ranks(learned: Any, asked: Any) -> Any:
    """In [0, 1]: the rank of each number asked for, after these have been learned."""
    how, stats = np.array([QUANTILE, 0], dtype=np.uint8), np.zeros((1, 3 + 2 * MARKERS))
    for x in learned:
        _one(np.float32(x), stats)
    zeros = np.zeros(len(asked), dtype=np.int32)
    return normalized(np.array(asked, dtype=np.float32), zeros, how, stats) / ROOT12 + 0.5


@pytest.mark.parametrize("kind", ["normal", "exponential", "lognormal", "uniform"])
def test_ranks_are_those_of_all_that_was_learned(kind: str) -> None:
    rng = np.random.default_rng(1)
    learned = getattr(rng, kind)(size=5000).astype(np.float32)
    asked = np.quantile(learned, np.linspace(0.01, 0.99, 50))
    exact = np.searchsorted(np.sort(learned), asked) / len(learned)
    assert np.abs(ranks(learned, asked) - exact).max() < 0.02


def test_an_outlier_moves_nothing() -> None:
    rng = np.random.default_rng(1)
    learned = rng.normal(size=2000)
    with_outliers = np.where(np.arange(2000) % 100 == 50, 1e12, learned)
    asked = [-1.0, 0.0, 1.0]
    assert np.abs(ranks(with_outliers, asked) - ranks(learned, asked)).max() < 0.03
    assert ranks(learned, [-1e30, 1e30]).tolist() == [0.0, 1.0]


def test_few_values_and_few_numbers() -> None:
    assert ranks([1.0] * (MARKERS - 1), [0.0, 1.0, 2.0]).tolist() == [0.5, 0.5, 0.5]  # too few to tell
    found = ranks([0.0, 1.0, 1.0, 2.0] * 500, [0.0, 1.0, 2.0])
    assert 0.0 <= found[0] < 0.3 and abs(found[1] - 0.5) < 0.15 and 0.7 < found[2] <= 1.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([-3.0, 0.0, 0.5, 2.0, 7.5, 1e6]), min_size=MARKERS, max_size=200))
def test_ranks_ascend_whatever_was_learned(learned: list[float]) -> None:
    stats, how = np.zeros((1, 3 + 2 * MARKERS)), np.array([QUANTILE, 0], dtype=np.uint8)
    for x in learned:
        observe(np.float32(x), QUANTILE, 0, stats)
        heights, positions = stats[0, 3 : 3 + MARKERS], stats[0, 3 + MARKERS :]
        if stats[0, 0] >= MARKERS:
            assert (np.diff(heights) >= 0).all() and (np.diff(positions) > 0).all()
    asked = np.array([-5.0, -3.0, 0.0, 0.25, 0.5, 1.0, 2.0, 7.5, 100.0, 1e6, 1e7], dtype=np.float32)
    found = normalized(asked, np.zeros(len(asked), dtype=np.int32), how, stats)
    assert (np.diff(found) >= -1e-6).all() and np.abs(found).max() <= ROOT12 / 2 + 1e-6


def test_a_model_with_quantiles_is_a_model() -> None:
    schema = sr.Schema(sr.Id("user"), sr.Number("x", quantile=True), sr.Number("y", standardize=True), sr.Hour())
    rng = np.random.default_rng(0)
    shown = [
        sr.Impression(f"i{n}", START + 999.0 * n, f"u{n % 3}", "p", {"x": rng.normal(), "y": rng.normal()})
        for n in range(40)
    ]
    labels = np.array([n % 3 == 0 for n in range(40)], dtype=np.float32)
    check_model(lambda: sr.FM(schema, dim=4), encode(schema, shown).batch, labels)


def test_a_number_is_standardized_or_ranked() -> None:
    with pytest.raises(SchemaError, match="not both"):
        sr.Number("x", standardize=True, quantile=True)


SCHEMA = sr.Schema(
    sr.Hour(),
    sr.Id("user"),
    sr.Weekday("day", zone="America/St_Johns"),
    sr.Hour("local", zone="Europe/Berlin"),
    sr.Id("country"),
    sr.Number("listed_at", since=True),
    sr.Ids("tags"),
)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 4e9), st.floats(0, 4e9))
def test_hours_days_and_ages_are_those_of_the_calendar(time: float, listed: float) -> None:
    features = {"listed_at": listed, "tags": ["a"], "country": "de", "hour": "no", "local": 5}
    shown = sr.Impression("i", time, "u", "p", features)
    berlin, john = datetime.fromtimestamp(time, ZoneInfo("Europe/Berlin")), ZoneInfo("America/St_Johns")
    told = {
        "hour": str(int(time // 3600) % 24),
        "day": datetime.fromtimestamp(time, john).strftime("%a"),
        "local": str(berlin.hour),
    }
    plain = sr.Schema(*(sr.Id(f.name) if f.name in told else f for f in SCHEMA if f.name != "listed_at"))
    expected = encode(plain, [sr.Impression("i", time, "u", "p", {**features, **told})]).batch
    encoder = Encoder(SCHEMA)
    for batch in (encoder([shown]).batch, encoder([shown, shown]).batch, encoder.one(shown).batch):
        row = slice(0, batch.ends[0])
        age = batch.fields[row] == SCHEMA.names.index("listed_at")
        np.testing.assert_array_equal(np.sort(batch.ids[row][~age]), np.sort(expected.ids))
        assert batch.values[row][age] == np.float32(time - listed)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sr.Hour(zone="Berlin"),
        lambda: sr.Hour(zone="+25:00"),
        lambda: sr.Weekday(zone="../etc"),
        lambda: sr.Schema(sr.Hour("user")),
    ],
)
def test_zones_and_names_that_cannot_be(make: Any) -> None:
    with pytest.raises(SchemaError):
        make()


def test_offsets() -> None:
    assert sr.Hour(zone="+05:30").text(0.0) == "5" and sr.Weekday(zone="-01:00").text(0.0) == "Wed"


def test_a_scorer_needs_the_time_where_the_model_reads_it(tmp_path: Any) -> None:
    for name, field in (("hour", sr.Hour()), ("age", sr.Number("listed_at", since=True))):
        trainer = sr.OnlineTrainer(model=sr.FM(sr.Schema(sr.Id("item"), field), dim=4), store=tmp_path / name)
        rng = np.random.default_rng(0)
        for n in range(400):
            time = START + 1800.0 * n
            shown = sr.Impression(f"i{n}", time, "u", f"p{n % 3}", {"listed_at": time - rng.random() * 10})
            trainer.push([sr.Labeled(shown, float(n % 4 == 0))])
        trainer.publish()
        scorer = sr.Scorer(tmp_path / name)
        names = ["p0", "p1", sr.Candidate("p2", {"listed_at": START})]
        with pytest.raises(ConfigError, match="pass time="):
            scorer.rank(user="u", candidates=names)
        for listed in (False, True):
            if listed:
                scorer.set_catalogue(names)
            now = START + 5.0
            found = {one.item: one.score for one in scorer.rank(user="u", candidates=names, time=now)}
            features = [{}, {}, {"listed_at": START}]
            shown_now = [sr.Impression("", now, "u", f"p{n}", features[n]) for n in range(3)]
            expected = scorer.score(shown_now)
            assert [found[f"p{n}"] for n in range(3)] == pytest.approx(expected.tolist(), abs=1e-5)
        assert len(scorer.retrieve(user="u", k=2, time=now)) == 2
