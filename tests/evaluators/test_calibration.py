"""Calibration online: true probabilities of a model that promises too much, in order, bit for bit, and as served."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec.evaluators import Isotonic, Platt
from streamrec.evaluators.calibration import Calibrator
from streamrec.preprocessors import encode
from streamrec.protocols import LEARN
from streamrec.testing._state import check_state_is_plain, copy_state, first_difference

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"))
KINDS: list[Any] = [lambda: Platt(memory=500), lambda: Isotonic(bins=16, every=7, memory=500)]


def calibrate(one: Calibrator, scores: Any, labels: Any) -> Any:
    """As a stream without delay does."""
    return one.advance(scores, np.arange(1, len(scores) + 1), labels, scores, np.ones(len(scores), np.float32))


def stream(count: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Scores of a model that is too bold and promises too much; labels; the true probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1.0, 1.0, count)
    true = 1 / (1 + np.exp(-logits))
    scores = (1 / (1 + np.exp(-(1.6 * logits + 1.5)))).astype(np.float32)
    return scores, (rng.random(count) < true).astype(np.float32), true


@pytest.mark.parametrize("make", [Platt, Isotonic])
def test_it_finds_the_true_probabilities(make: Any) -> None:
    scores, labels, true = stream(40_000)
    one = make()
    found = calibrate(one, scores, labels)
    late = slice(20_000, None)
    assert abs(scores[late] - true[late]).mean() > 0.15
    assert abs(found[late] - true[late]).mean() < 0.01
    assert labels[late].sum() / found[late].sum() == pytest.approx(1.0, abs=0.02)
    if isinstance(one, Platt):
        assert one.slope == pytest.approx(1 / 1.6, abs=0.05) and one.shift == pytest.approx(-1.5 / 1.6, abs=0.05)
    every = np.linspace(0, 1, 5000, dtype=np.float32)
    assert (np.diff(one.apply(every)) >= 0).all()  # what ranks above stays above


@pytest.mark.parametrize("make", KINDS)
@settings(deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(0, 60), max_size=5), seed=st.integers(0, 20), delay=st.integers(0, 30))
def test_no_cut_changes_a_bit_and_its_state_is_all_it_knows(make: Any, cuts: list[int], seed: int, delay: int) -> None:
    scores, labels, _ = stream(60, seed)
    scores[::17], labels[::13] = np.nan, 7.0  # which cannot be used
    ones = np.ones(60, np.float32)
    whole, parts = make(), make()
    known = 60 - delay
    after = np.arange(1, 61) + delay  # labels come when so many more were scored
    expected = whole.advance(scores, after[:known], labels[:known], scores[:known], ones[:known])
    found, edges = [], [0, *sorted(cuts), 60]
    for low, high in itertools.pairwise(edges):
        mine = np.flatnonzero((after > low) & (after <= high) & (np.arange(60) < known))
        piece = parts.advance(scores[low:high], after[mine] - low, labels[mine], scores[mine], ones[mine])
        found.append(piece)
        state = parts.state_dict()
        check_state_is_plain(state)
        parts = make()
        parts.load_state_dict(copy_state(state))
    assert np.concatenate(found).tobytes() == expected.tobytes()
    assert first_difference(whole.state_dict(), parts.state_dict()) is None
    assert np.isnan(expected[::17]).all() and np.isfinite(np.delete(expected, np.arange(0, 60, 17))).all()


def events(count: int, start: int = 0) -> list[Any]:
    """Impressions, and clicks one in eight, that come after a while."""
    rng = np.random.default_rng(start)
    found: list[tuple[float, Any]] = []
    for n in range(start, start + count):
        shown = sr.Impression(f"i{n}", 10.0 * n, f"u{n % 9}", f"p{rng.integers(12)}")
        found.append((shown.time, shown))
        if rng.random() < (0.3 if int(shown.item[1:]) < 4 else 0.04):
            found.append((shown.time + 25.0, sr.Feedback(f"f{n}", shown.id, shown.time + 25.0)))
        if n % 5 == 0:
            labeled = sr.Labeled(sr.Impression(f"l{n}", 10.0 * n, f"u{n % 9}", "p1"), float(n % 8 == 0))
            found.append((shown.time, labeled))
    return [event for _, event in sorted(found, key=lambda one: one[0])]


def trainer(kind: Calibrator | None, store: Any = None, **more: Any) -> sr.OnlineTrainer:
    return sr.OnlineTrainer(
        model=sr.FM(SCHEMA, dim=4),
        join=sr.LabelJoin(windows={"click": 60.0}, lateness=0.0),
        metrics=[sr.Calibration(), sr.AUC()],
        store=store,
        calibration=kind,
        background=False,
        **more,
    )


@pytest.mark.parametrize("make", KINDS)
def test_a_trainer_calibrates_in_the_order_of_the_stream_and_over_restarts(make: Any) -> None:
    shown = events(250)
    whole, single, killed = trainer(make()), trainer(make()), trainer(make())
    expected = whole.push(shown)
    assert [score for event in shown for score in single.push([event])] == expected
    first = killed.push(shown[:171])
    again = trainer(make())
    again.load_state_dict(copy_state(killed.state_dict()))
    assert first + again.push(shown[171:]) == expected
    for part in ("model", "metrics", "calibration"):
        for other in (single, again):
            assert first_difference(whole.state_dict()[part], other.state_dict()[part]) is None, part
    labeled = [event for event in shown if isinstance(event, sr.Labeled)]  # nothing waits: another way through
    twin = trainer(make())
    assert trainer(make()).push(labeled) == [score for event in labeled for score in twin.push([event])]


def test_what_is_served_is_what_the_trainer_says_bit_for_bit(tmp_path: Any) -> None:
    asked = [sr.Impression(f"q{n}", 0.0, f"u{n % 9}", f"p{n % 12}") for n in range(50)]
    items = [f"p{n}" for n in range(12)]
    for number, make in enumerate(KINDS):
        one = trainer(make(), tmp_path / str(number))
        one.push(events(300))
        one.publish()
        scorer = sr.Scorer(tmp_path / str(number))
        scorer.set_catalogue(items)
        for turn in range(3):
            raw = one.model.predict(encode(SCHEMA, asked).batch)
            says = one.calibration.apply(raw)  # type: ignore[union-attr]
            assert scorer.score(asked).tobytes() == says.tobytes() != raw.tobytes()
            gated = one._published(turn + 1)  # what a gate compares
            assert gated.predict(encode(SCHEMA, asked).batch).tobytes() == says.tobytes()
            scores = dict(scorer.rank(user="u1", candidates=items))
            shown = [sr.Impression("", 0.0, "u1", item) for item in items]
            assert list(map(scores.get, items)) == pytest.approx(scorer.score(shown).tolist(), abs=1e-5)
            assert scorer.retrieve(user="u1", k=3) == scorer.rank(user="u1", candidates=items, k=3)
            one.push(events(30, 1000 * (turn + 1)))
            one.publish()
            assert scorer.refresh()


def test_it_mends_a_stream_that_learns_too_few_non_clicks() -> None:
    """Nine of ten non-clicks are not learned, whosever they are, and nobody tells the model; all are judged."""

    class Few(sr.FM):
        def step(self, batch: Any, rows: Any, ops: Any, labels: Any, weights: Any) -> Any:
            some = (labels == 1) | (np.random.default_rng(1).random(len(rows)) < 0.1)
            return super().step(batch, rows, np.where(some, ops, ops & ~np.int8(LEARN)), labels, weights)

    judged = {}
    for name, kind in (
        ("none", None),
        ("Platt", Platt(memory=4000)),
        ("Isotonic", Isotonic(every=200, memory=4000)),
    ):
        rng = np.random.default_rng(0)
        rows = [sr.Impression(f"i{n}", float(n), f"u{n % 50}", f"p{rng.integers(20)}") for n in range(16_000)]
        shown = [sr.Labeled(one, float(rng.random() < (0.2 if int(one.item[1:]) < 5 else 0.03))) for one in rows]
        scores = sr.OnlineTrainer(model=Few(SCHEMA, dim=4), calibration=kind).push(shown)
        late = slice(8_000, None)
        judged[name] = [sr.Calibration(), sr.LogLoss(), sr.AUC()]
        for metric in judged[name]:
            metric.update(np.float32([one.label for one in shown[late]]), np.float32(scores[late]))
    values = {name: [metric.compute() for metric in metrics] for name, metrics in judged.items()}
    assert values["none"][0] > 3
    for name in ("Platt", "Isotonic"):
        assert values[name][0] == pytest.approx(1.0, abs=0.1)
        assert values[name][1] < values["none"][1] - 0.1
        assert values[name][2] > values["none"][2] - 0.02


def test_what_cannot_work_is_refused(tmp_path: Any) -> None:
    for wrong in (
        lambda: Platt(memory=3),
        lambda: Isotonic(bins=1),
        lambda: Isotonic(every=0),
        lambda: Isotonic(memory=9),
    ):
        with pytest.raises(sr.ConfigError):
            wrong()
    one = trainer(Platt(), tmp_path)
    one.push(events(30))
    one.checkpoint({"at": 30})
    with pytest.raises(sr.ConfigError, match="was cut with a calibration"):
        trainer(None, tmp_path).resume()
    with pytest.raises(sr.ConfigError, match="use its settings"):
        trainer(Isotonic(), tmp_path).resume()
