"""Impressions learned as non-clicks at once, clicks when they come, both weighed; and labels that are corrected."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

import streamrec as sr
from streamrec.errors import ConfigError
from streamrec.preprocessors import encode
from streamrec.protocols import LEARN, SCORE, WEIGH
from streamrec.testing._state import first_difference
from streamrec.trainers.in_order import InOrder

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"))


def rows(count: int = 60) -> sr.Batch:
    return encode(SCHEMA, [sr.Impression(f"i{n}", float(n), f"u{n % 5}", f"p{n % 7}") for n in range(count)]).batch


def test_the_gradient_is_that_of_the_weighted_loss() -> None:
    for label in (0.0, 1.0, 0.25):
        model = sr.FM(sr.Schema(sr.Id("user")), dim=0, optimizer=sr.SGD(lr=0.5))
        batch = encode(model.schema, [sr.Impression("i", 0.0, "u", "p")]).batch
        model.learn(batch, np.ones(1, dtype=np.float32))  # so that p is not a half
        bias = torch.tensor(float(model.bias.detach()), requires_grad=True)
        logit = bias + float(model.weights.detach()[0, 0])
        p = torch.sigmoid(logit)
        fixed = p.detach()
        loss = -label * (1 + fixed) * p.log() - (1 - label) * (1 - fixed) * (1 + fixed) * (1 - p).log()
        loss.backward()
        ops = np.array([LEARN | WEIGH], dtype=np.int8)
        given = np.array([label], dtype=np.float32)
        before = float(model.bias.detach())
        model.step(batch, np.zeros(1, dtype=np.int64), ops, given, np.ones(1, dtype=np.float32))
        assert bias.grad is not None
        assert float(model.bias.detach()) == pytest.approx(before - 0.5 * float(bias.grad), rel=1e-4, abs=1e-6)


def test_the_compiled_loop_does_what_predict_and_learn_would() -> None:
    batch, rng = rows(), np.random.default_rng(0)
    ops = rng.choice([SCORE, LEARN, SCORE | LEARN, LEARN | WEIGH, SCORE | LEARN | WEIGH], size=200).astype(np.int8)
    labels = rng.choice([0.0, 1.0, 0.3], size=200).astype(np.float32)
    weights = rng.choice([1.0, 2.5], size=200).astype(np.float32)
    which = rng.integers(0, 60, size=200)
    one, other = sr.FM(SCHEMA, dim=4), sr.FM(SCHEMA, dim=4)
    found = one.step(batch, which, ops, labels, weights)
    expected = InOrder(other).step(batch, which, ops, labels, weights)
    asked = (ops & SCORE) > 0
    np.testing.assert_allclose(found[asked], expected[asked], rtol=1e-4)


CHANGES: list[dict[str, Any]] = [
    {"early_negatives": True},
    {"early_negatives": True, "negatives": 0.5},
    {"negatives": 0.5},
]


@pytest.mark.parametrize("changed", CHANGES)
@pytest.mark.parametrize("kind", ["FM", "Logistic"])
def test_how_the_stream_is_cut_changes_nothing(
    kind: str, changed: dict[str, Any], make_stream: Any, make_trainer: Any, canonical: Any, Logistic: Any, schema: Any
) -> None:
    def trainer() -> sr.OnlineTrainer:
        windows = {"click": 60.0, "purchase": sr.After("click", 180.0)}
        join = sr.LabelJoin(
            windows=windows, lateness=20.0, values={"purchase": "weight"}, late="correct", keep=300.0, capacity=60
        )
        model = {} if kind == "FM" else {"model": Logistic(schema)}
        return make_trainer(join=join, **model, **changed)

    events = make_stream(5, 200)
    whole, ones = trainer(), trainer()
    together = whole.push(events)
    apart = [score for event in events for score in ones.push([event])]
    np.testing.assert_array_equal(together, apart)
    assert first_difference(canonical(whole.state_dict()), canonical(ones.state_dict())) is None
    counts = whole.report().counts
    assert counts["corrected"] > 0 and counts["learned"] > 100
    cut, resumed = trainer(), trainer()
    first = cut.push(events[:90])
    resumed.load_state_dict(cut.state_dict())
    np.testing.assert_array_equal(first + resumed.push(events[90:]), together)
    assert first_difference(canonical(whole.state_dict()), canonical(resumed.state_dict())) is None


def stream(count: int, delay: float) -> list[Any]:
    """Items with rates of their own, clicked after an exponential delay."""
    rng = random.Random(0)
    events: list[tuple[float, Any]] = []
    for n in range(count):
        item = rng.randrange(10)
        events.append((10.0 * n, sr.Impression(f"i{n}", 10.0 * n, "u", f"p{item}")))
        if rng.random() < 0.03 + 0.05 * item:
            at = 10.0 * n + rng.expovariate(1 / delay)
            events.append((at, sr.Feedback(f"f{n}", f"i{n}", at)))
    return [event for _, event in sorted(events, key=lambda one: one[0])]


def trained(events: list[Any], **changed: Any) -> sr.OnlineTrainer:
    trainer = sr.OnlineTrainer(
        model=sr.FM(SCHEMA, dim=0),
        join=sr.LabelJoin(windows={"click": 20_000.0}, capacity=100_000),
        metrics=[sr.Calibration(), sr.NormalizedEntropy()],
        **changed,
    )
    for begin in range(0, len(events), 256):
        trainer.push(events[begin : begin + 256])
    return trainer


def test_early_negatives_leave_the_scores_calibrated() -> None:
    trainer = trained(stream(40_000, 2_000.0), early_negatives=True)
    shown = [sr.Impression("x", 4e5, "u", f"p{item}") for item in range(10)]
    scores = trainer.model.predict(encode(SCHEMA, shown).batch)
    truth = 0.03 + 0.05 * np.arange(10)
    assert scores.mean() == pytest.approx(truth.mean(), rel=0.15)
    assert np.corrcoef(scores, truth)[0, 1] > 0.95
    counts = trainer.report().counts
    assert counts["learned"] == 40_000 + sum(isinstance(e, sr.Feedback) for e in stream(40_000, 2_000.0)) - (
        counts["outside_window"] + counts["late_feedback"] + counts["unmatched"]
    )


def test_they_know_of_an_impression_at_once() -> None:
    events = stream(1000, 100.0)  # no window of 20,000 s has closed
    assert trained(events).report().counts["learned"] == 0
    assert trained(events, early_negatives=True).report().counts["learned"] > 1000


def test_what_is_refused_is_not_learned() -> None:
    trainer = trained([], early_negatives=True)
    shown = sr.Impression("i", 100.0, "u", "p")
    trainer.push([shown, shown, sr.Impression("late", 50.0, "u", "p")])
    assert trainer.report().counts["learned"] == 1


def test_a_click_that_came_before_its_impression_is_learned_after_it_is_scored() -> None:
    shown, click = sr.Impression("i", 0.0, "u", "p"), sr.Feedback("f", "i", 1.0)
    first = trained([], early_negatives=True).push([shown])
    assert trained([], early_negatives=True).push([click, shown]) == first


def test_early_negatives_need_a_join() -> None:
    with pytest.raises(ConfigError, match="needs a join"):
        sr.OnlineTrainer(model=sr.FM(SCHEMA), early_negatives=True)


def test_corrections_are_learned_and_not_judged() -> None:
    join = sr.LabelJoin(windows={"click": 10.0}, late="correct", keep="1h")
    trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=0), join=join, metrics=[sr.CTR()])
    shown = [sr.Impression(f"i{n}", 20.0 * n, "u", "p") for n in range(4)]
    trainer.push(shown)
    before = trainer.report()
    low = trainer.model.predict(encode(SCHEMA, shown[:1]).batch)[0]
    trainer.push([sr.Feedback("f", "i0", 5.0)])
    after = trainer.report()
    assert after.counts["corrected"] == 1 and after.counts["learned"] == before.counts["learned"] + 1
    assert after.metrics["CTR"] == before.metrics["CTR"] == 0.0
    assert trainer.model.predict(encode(SCHEMA, shown[:1]).batch)[0] > low
