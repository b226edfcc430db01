"""Sampled non-clicks: fewer rows learned, the same calibration, nothing left to chance."""

from __future__ import annotations

import random

import numpy as np
import pytest

import streamrec as sr
from streamrec.hashing import uniform
from streamrec.testing._state import first_difference

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"))


def stream(count: int) -> list[sr.Labeled]:
    rng = random.Random(0)
    examples = []
    for n in range(count):
        user, item = rng.randrange(20), rng.randrange(20)
        rate = 0.02 + 0.2 * (user % 2 == item % 2)
        shown = sr.Impression(id=f"i{n}", time=float(n), user=f"u{user}", item=f"p{item}")
        examples.append(sr.Labeled(shown, label=float(rng.random() < rate)))
    return examples


def trained(events: list[sr.Labeled], negatives: float, cut: int = 256) -> sr.OnlineTrainer:
    metrics = [sr.Calibration(), sr.CTR(), sr.AUC()]
    trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), metrics=metrics, negatives=negatives)
    for start in range(0, len(events), cut):
        trainer.push(events[start : start + cut])
    return trainer


def test_calibration_is_preserved() -> None:
    events = stream(60_000)
    whole, sampled = trained(events, 1.0).report(), trained(events, 0.1).report()
    clicks = sum(example.label for example in events)
    kept = sampled.counts["learned"] - clicks
    assert kept == pytest.approx(0.1 * (len(events) - clicks), rel=0.05)
    assert sampled.counts["learned"] + sampled.counts["sampled_out"] == len(events)
    assert sampled.metrics["Calibration"] == pytest.approx(1.0, abs=0.06)
    assert whole.metrics["Calibration"] == pytest.approx(1.0, abs=0.06)
    assert sampled.metrics["CTR"] == whole.metrics["CTR"]  # every label is judged
    assert sampled.metrics["AUC"] > 0.7


def test_the_choice_is_that_of_the_ids() -> None:
    events = stream(500)
    draws = uniform([example.impression.id for example in events], 0x6E656761)
    model = sr.FM(SCHEMA, dim=4)
    by_hand = sr.OnlineTrainer(model=model)
    for example, draw in zip(events, draws, strict=True):
        if example.label:
            by_hand.push([example])
        elif draw < 0.25:
            by_hand.push([sr.Labeled(example.impression, label=0.0, weight=4.0)])
    assert first_difference(model.state_dict(), trained(events, 0.25).model.state_dict()) is None


@pytest.mark.parametrize("cut", [1, 7])
def test_it_does_not_depend_on_the_cut(cut: int) -> None:
    events = stream(600)
    one, other = trained(events, 0.3, cut), trained(events, 0.3)
    assert first_difference(one.model.state_dict(), other.model.state_dict()) is None
    assert one.report().metrics == other.report().metrics
    assert one.report().counts == other.report().counts


def test_late_labels_and_a_restart_make_the_same_choice() -> None:
    examples = stream(2_000)
    events: list[sr.Impression | sr.Feedback] = []
    for example in examples:
        events.append(example.impression)
        if example.label:
            shown = example.impression
            events.append(sr.Feedback(id=f"c{shown.id}", impression_id=shown.id, time=shown.time + 0.5))

    def make(store: str | None) -> sr.OnlineTrainer:
        join = sr.LabelJoin(windows={"click": 100.0})
        return sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), join=join, negatives=0.2, store=store)

    whole = make(None)
    whole.run(sr.Memory(events))
    make("memory://test-negatives").run(sr.Memory(events), limit=900)
    resumed = make("memory://test-negatives")
    resumed.run(sr.Memory(events))
    assert first_difference(whole.model.state_dict(), resumed.model.state_dict()) is None
    assert whole.report().counts == resumed.report().counts
    assert 0 < whole.report().counts["sampled_out"] < 2_000


def test_draws_are_uniform() -> None:
    draws = uniform([f"i{n}" for n in range(20_000)])
    assert np.abs(np.sort(draws) - np.linspace(0, 1, len(draws))).max() < 0.02
    assert uniform([]).shape == (0,)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(sr.ConfigError, match="negatives must be a share"):
        sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), negatives=share)
