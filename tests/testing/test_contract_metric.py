from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from streamrec.testing._metric import check_metric


class Mean:
    """A right metric in plain Python: the weighted mean label."""

    def __init__(self) -> None:
        self.kinds: Any = ("click",)
        self.name = "Mean"
        self.positives = 0.0
        self.total = 0.0

    def update(self, labels: Any, scores: Any, weights: Any = None, kind: str = "click") -> None:
        if kind not in self.kinds:
            return
        weights = np.ones_like(labels) if weights is None else weights
        for label, score, weight in zip(labels.tolist(), scores.tolist(), weights.tolist(), strict=True):
            if not math.isnan(score):
                self.add(label, weight)

    def add(self, label: float, weight: float) -> None:
        self.positives += label * weight
        self.total += weight

    def compute(self) -> float:
        return self.positives / self.total if self.total else math.nan

    def merge(self, other: Any) -> None:
        self.positives += other.positives
        self.total += other.total

    def fresh(self) -> Any:
        return type(self)()

    def state_dict(self) -> Any:
        return {"sums": np.array([self.positives, self.total])}

    def load_state_dict(self, state: Any) -> None:
        self.positives, self.total = state["sums"].tolist()


class Pairwise(Mean):
    def update(self, labels: Any, scores: Any, weights: Any = None, kind: str = "click") -> None:
        if kind in self.kinds:
            weights = np.ones_like(labels) if weights is None else weights
            self.add(float((labels.astype(float) * weights).sum() / max(weights.sum(), 1e-9)), float(weights.sum()))


class AnyKind(Mean):
    def update(self, labels: Any, scores: Any, weights: Any = None, kind: str = "click") -> None:
        super().update(labels, scores, weights, "click")


class Poisoned(Mean):
    def update(self, labels: Any, scores: Any, weights: Any = None, kind: str = "click") -> None:
        super().update(labels, np.zeros_like(scores), weights, kind)
        if kind in self.kinds:
            for score in scores.tolist():
                self.positives += 0 * score


class Forgetful(Mean):
    def load_state_dict(self, state: Any) -> None:
        self.positives = state["sums"].tolist()[0]


class SharedState(Mean):
    def __init__(self) -> None:
        super().__init__()
        self.sums = np.zeros(2)

    def add(self, label: float, weight: float) -> None:
        super().add(label, weight)
        self.sums[:] = self.positives, self.total

    def state_dict(self) -> Any:
        return {"sums": self.sums}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.sums = state["sums"].copy()


class Hoarder(Mean):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def add(self, label: float, weight: float) -> None:
        super().add(label, weight)
        self.seen.append(label)

    def state_dict(self) -> Any:
        return {**super().state_dict(), "seen": list(self.seen)}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.seen = list(state["seen"])


class Resetting(Mean):
    def compute(self) -> float:
        value = super().compute()
        self.positives = self.total = 0.0
        return value


class Restless(Mean):
    def fresh(self) -> Any:
        return self


class Averaging(Mean):
    def merge(self, other: Any) -> None:
        self.positives = (self.positives + other.positives) / 2


class Zero(Mean):
    def compute(self) -> float:
        return self.positives / self.total if self.total else 0.0


class NumpyValue(Mean):
    def state_dict(self) -> Any:
        return {"sums": (self.positives, self.total)}

    def load_state_dict(self, state: Any) -> None:
        self.positives, self.total = state["sums"]


class Scribbler(Mean):
    def update(self, labels: Any, scores: Any, weights: Any = None, kind: str = "click") -> None:
        super().update(labels, scores, weights, kind)
        scores[:] = 0.5


def weighted_mean(labels: Any, scores: Any, weights: Any) -> float:
    return float(np.average(labels.astype(float), weights=weights.astype(float)))


def test_a_right_metric_passes() -> None:
    check_metric(Mean, reference=weighted_mean, kinds=("click",))


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (Pairwise, "bit for bit"),
        (AnyKind, "must be ignored"),
        (Poisoned, "nan score"),
        (Forgetful, "twin"),
        (SharedState, "later updates"),
        (Hoarder, "must not grow"),
        (Resetting, "compute must change nothing|must have the value|must equal"),
        (Restless, "fresh"),
        (Averaging, "merged must equal"),
        (Zero, "must be nan"),
        (NumpyValue, "use a list"),
        (Scribbler, "bit for bit|arguments"),
    ],
)
def test_a_broken_metric_is_caught(broken: Any, promise: str) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_metric(broken)


def test_a_wrong_value_a_wrong_kind_and_no_metric_are_caught() -> None:
    with pytest.raises(AssertionError, match="reference"):
        check_metric(Mean, reference=lambda labels, scores, weights: float(labels.mean()))
    with pytest.raises(AssertionError, match="kinds must be"):
        check_metric(Mean, kinds=("purchase",))
    with pytest.raises(AssertionError, match="it has no kinds"):
        check_metric(object)  # type: ignore[arg-type]
