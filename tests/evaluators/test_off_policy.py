from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import streamrec as sr
from streamrec.evaluators import Estimate, doubly_robust, ips, snips

ITEMS = 6


class Shop:
    """A simulator: contexts, items with known click rates, a policy that wrote the log and one to be judged."""

    def __init__(self, seed: int, impressions: int = 4_000) -> None:
        rng = np.random.default_rng(seed)
        context = rng.normal(size=(impressions, 3))
        taste = np.random.default_rng(77).normal(size=(3, ITEMS))
        self.rates = 1 / (1 + np.exp(-(context @ taste - 1)))
        self.logging, self.judged = (self.policy(context @ taste * sharp) for sharp in (-0.3, 0.8))
        rows = np.arange(impressions)
        shown = (self.logging.cumsum(axis=1) < rng.random(impressions)[:, None]).sum(axis=1).clip(max=ITEMS - 1)
        self.rewards = (rng.random(impressions) < self.rates[rows, shown]).astype(np.float64)
        self.columns = self.rewards, self.logging[rows, shown], self.judged[rows, shown]
        self.truth = float((self.judged * self.rates).sum(axis=1).mean())
        noisy = np.clip(self.rates + rng.normal(0.1, 0.1, self.rates.shape), 0, 1)  # a model that is biased
        self.model = {"predicted": noisy[rows, shown], "expected": (self.judged * noisy).sum(axis=1)}

    @staticmethod
    def policy(logits: np.ndarray) -> np.ndarray:
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)


ESTIMATORS: dict[str, Callable[[Shop], Estimate]] = {
    "ips": lambda shop: ips(*shop.columns),
    "snips": lambda shop: snips(*shop.columns),
    "doubly robust": lambda shop: doubly_robust(*shop.columns, **shop.model),
}


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_intervals_hold_the_known_answer_as_often_as_they_say(name: str) -> None:
    held, errors = 0, []
    for seed in range(300):
        shop = Shop(seed)
        found = ESTIMATORS[name](shop)
        held += found.low <= shop.truth <= found.high
        errors.append(found.value - shop.truth)
    assert 0.91 <= held / 300 <= 0.99
    assert abs(np.mean(errors)) < 3 * np.std(errors) / math.sqrt(300)


def test_the_mean_of_the_log_would_have_been_wrong_and_a_model_narrows_the_interval() -> None:
    shop = Shop(0)
    assert abs(shop.rewards.mean() - shop.truth) > 0.1
    widths = {name: find(shop).high - find(shop).low for name, find in ESTIMATORS.items()}
    assert widths["doubly robust"] < widths["snips"] < widths["ips"]


def test_judging_the_policy_that_wrote_the_log_gives_the_mean() -> None:
    rewards, logged, _ = Shop(1).columns
    for found in (ips(rewards, logged, logged), snips(rewards, logged, logged)):
        assert found.value == pytest.approx(rewards.mean())
        assert found.effective == pytest.approx(len(rewards))


def test_clipping_bounds_the_ratio() -> None:
    found = ips([1.0, 1.0], logged=[0.01, 1.0], target=[1.0, 1.0], clip=10.0)
    assert found.value == 5.5


def test_what_cannot_be_used_is_left_out_and_counted() -> None:
    columns: Any = [1.0, 1.0, math.nan, 1.0], [0.5, 0.0, 0.5, 1.5], [0.5] * 4
    for find in (ips, snips):
        assert (find(*columns).value, find(*columns).count, find(*columns).skipped) == (1.0, 1, 3)
    assert math.isnan(ips([], [], []).value) and math.isnan(snips([1.0], [0.5], [0.0]).value)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0], [0.5], [0.5, 0.5]), {}, "as many"),
        (([1.0], [0.5], [0.5]), {"clip": 0.0}, "clip"),
        (([1.0], [0.5], [0.5]), {"confidence": 1.0}, "confidence"),
    ],
)
def test_what_cannot_work_is_refused(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(sr.ConfigError, match=message):
        ips(*arguments, **options)
