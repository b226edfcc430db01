"""Calibration: what a score must be for its probability to be true, learned from served scores as their labels come.

A model that learns from a sample of the non-clicks, or trails a stream that moves, ranks well and promises too much or
too little. A calibrator is a rising function from its score to a probability: what ranks above stays above. It learns
in order, as models do: each score is calibrated by all labels known before it, and by none after.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec._compile import compiled
from streamrec.batch import Batch
from streamrec.errors import ConfigError
from streamrec.evaluators._accumulate import CLIP, natural_log, usable

__all__ = ["Calibrated", "Calibrator", "Isotonic", "Platt", "calibrator_from"]

Column = NDArray[np.float32]
_NO_COLUMN, _NO_PLACES = np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64)

_STEEP = 0.01  # the least slope of a Platt map: so that it always rises
_LOWEST, _HIGHEST = -12.0, 12.0  # logits between which an isotonic map has its bins; beyond, they count as these
_WEIGHT, _CLICKS, _LOGITS = 0, 1, 2  # the columns of its sums


class Calibrator:
    """What `Platt` and `Isotonic` share."""

    memory: int
    _state: NDArray[np.float64]

    def apply(self, scores: Column) -> Column:
        """float32 `(n,)`: the probabilities for these scores now. Changes nothing; nan stays nan."""
        return self._advance(scores, _NO_PLACES, _NO_COLUMN, _NO_COLUMN, _NO_COLUMN, self._state)

    def advance(
        self, scores: Column, after: NDArray[np.int64], labels: Column, served: Column, weights: Column
    ) -> Column:
        """Calibrate `scores` and learn, in order: float32 `(n,)`, and changes what it knows.

        `labels`, the scores they are of as the model gave them, `served`, and `weights`, `(m,)` in the order they were
        known; `after`: before how many of the `scores` that was not. Labels and scores that cannot be used are left
        out. Cutting a call in two changes no bit.
        """
        y, of, w = (np.ascontiguousarray(column, dtype=np.float32) for column in (labels, served, weights))
        return self._advance(scores, np.ascontiguousarray(after, dtype=np.int64), y, of, w, self._state)

    @abstractmethod
    def _advance(
        self, scores: Column, after: Any, labels: Column, served: Column, weights: Column, state: Any
    ) -> Column:
        raise NotImplementedError

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What it knows, cut now."""
        return {"state": self._state.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was cut from."""
        found = np.array(state["state"], dtype=np.float64)
        if found.shape != self._state.shape:
            raise ConfigError(f"the saved calibration is {found.shape}, not {self._state.shape}: use its settings")
        self._state = found


class Platt(Calibrator):
    """A line through the logits: σ(a logit + b) (Platt 1999), which mends what is shifted or too bold.

    a and b are learned label by label: each moves them by one Newton step of the log loss with what is known of its
    curvature, the recursive least squares of logistic regression, whose certainty wears off over `memory` labels. At
    first a = 1 and b = 0, with a deviation of 1 each. a stays above 0.

    >>> platt = Platt()
    >>> scores = np.full(2000, 0.5, dtype=np.float32)  # promised; kept, one of ten
    >>> labels = (np.arange(2000) % 10 == 0).astype(np.float32)
    >>> after = np.arange(1, 2001)
    >>> found = platt.advance(scores, after, labels, scores, np.ones(2000, np.float32))
    >>> float(found[0]), round(float(found[-1]), 2)
    (0.5, 0.1)
    """

    def __init__(self, *, memory: int = 100_000) -> None:
        if not isinstance(memory, int) or memory < 100:
            raise ConfigError(f"memory must be a number of labels >= 100, got {memory!r}")
        self.memory = memory
        self._state = np.array([1.0, 0.0, 1.0, 0.0, 1.0])  # a, b, and their covariance: aa, ab, bb

    def __repr__(self) -> str:
        return f"Platt(memory={self.memory})"

    @property
    def slope(self) -> float:
        """a: under 1 where the model is too bold."""
        return float(self._state[0])

    @property
    def shift(self) -> float:
        """b: under 0 where the model promises too much."""
        return float(self._state[1])

    def config(self) -> dict[str, Any]:
        return {"memory": self.memory}

    def _advance(
        self, scores: Column, after: Any, labels: Column, served: Column, weights: Column, state: Any
    ) -> Column:
        found = np.empty(len(scores), dtype=np.float32)
        keep = 1.0 - 1.0 / self.memory
        _platt(np.ascontiguousarray(scores, dtype=np.float32), after, labels, served, weights, keep, state, found)
        return found


class Isotonic(Calibrator):
    """Any rising function: the monotone regression of labels on scores (Zadrozny and Elkan 2002).

    Labels are counted in `bins` by their score's logit, with a weight that wears off over `memory` labels; after every
    `every` of them the counts are pooled until they rise (Ayer et al. 1955), and the map goes straight, in logits, from
    pool to pool. A bin begins as if two labels had been as promised. Until the first time scores stay as they are.

    >>> isotonic = Isotonic(every=500)
    >>> scores = np.tile(np.float32([0.2, 0.4]), 2000)  # kept: one of ten, and four of ten
    >>> labels = np.tile(np.float32([0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]), 200)
    >>> _ = isotonic.advance(scores, np.arange(1, 4001), labels, scores, np.ones(4000, np.float32))
    >>> [round(float(one), 2) for one in isotonic.apply(np.float32([0.2, 0.4]))]
    [0.1, 0.4]
    """

    def __init__(self, *, bins: int = 96, every: int = 1000, memory: int = 100_000) -> None:
        for name, value, least in (("bins", bins, 8), ("every", every, 1), ("memory", memory, every)):
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number >= {least}, got {value!r}")
        self.bins = bins
        self.every = every
        self.memory = memory
        # a row a bin: weight, clicks, logits; then the map's points, logit and logit; at last, labels and points so far
        self._state = np.zeros((bins + 1, 5))

    def __repr__(self) -> str:
        return f"Isotonic(bins={self.bins}, every={self.every}, memory={self.memory})"

    def config(self) -> dict[str, Any]:
        return {"bins": self.bins, "every": self.every, "memory": self.memory}

    def _advance(
        self, scores: Column, after: Any, labels: Column, served: Column, weights: Column, state: Any
    ) -> Column:
        found = np.empty(len(scores), dtype=np.float32)
        numbers = self.every, 1.0 - self.every / self.memory
        _isotonic(
            np.ascontiguousarray(scores, dtype=np.float32), after, labels, served, weights, *numbers, state, found
        )
        return found


class Calibrated:
    """A model whose probabilities are calibrated, to predict with."""

    def __init__(self, model: Any, calibrator: Calibrator) -> None:
        self._model, self._calibrator = model, calibrator

    def predict(self, batch: Batch) -> Column:
        """float32 `(rows,)`: calibrated click probabilities. Changes nothing."""
        return self._calibrator.apply(self._model.predict(batch))


_KINDS: Mapping[str, Any] = {"Platt": Platt, "Isotonic": Isotonic}


def calibrator_from(described: Mapping[str, Any], state: Mapping[str, Any]) -> Calibrator:
    """The calibrator of a version. Raises `ConfigError` for one that a newer release has written."""
    if described["type"] not in _KINDS:
        raise ConfigError(f"a calibration of the type {described['type']!r} is not known: upgrade streamrec")
    made: Calibrator = _KINDS[described["type"]](**described["config"])
    made.load_state_dict(state)
    return made


@compiled()
def _logit(score: Any) -> Any:
    p = min(max(np.float64(score), CLIP), 1.0 - CLIP)
    return natural_log(p) - natural_log(1.0 - p)


@compiled()
def _sigmoid(logit: Any) -> Any:
    return 1.0 / (1.0 + math.exp(-logit))


@compiled()
def _platt(
    scores: Any, after: Any, labels: Any, served: Any, weights: Any, keep: float, state: Any, found: Any
) -> None:
    at = 0
    for i in range(len(scores) + 1):
        while at < len(labels) and after[at] <= i:
            y, u = np.float64(labels[at]), np.float64(weights[at])
            if usable(y, served[at], u):
                x = _logit(served[at])
                # what was known wears off, but never beyond what was known at first
                if state[2] <= keep and state[4] <= keep:
                    for n in range(2, 5):
                        state[n] /= keep
                p = _sigmoid(state[0] * x + state[1])
                pa, pb = state[2] * x + state[3], state[3] * x + state[4]  # covariance times (x, 1)
                curve = u * max(p * (1.0 - p), 1e-6)
                share = curve / (1.0 + curve * (pa * x + pb))
                state[2] -= share * pa * pa
                state[3] -= share * pa * pb
                state[4] -= share * pb * pb
                step = u * (y - p)
                state[0] = max(state[0] + step * (state[2] * x + state[3]), _STEEP)
                state[1] += step * (state[3] * x + state[4])
            at += 1
        if i < len(scores):
            if 0.0 <= scores[i] <= 1.0:
                found[i] = np.float32(_sigmoid(state[0] * _logit(scores[i]) + state[1]))
            else:
                found[i] = np.float32(np.nan)


@compiled()
def _isotonic(
    scores: Any, after: Any, labels: Any, served: Any, weights: Any, every: int, keep: float, state: Any, found: Any
) -> None:
    bins = len(state) - 1
    at = 0
    for i in range(len(scores) + 1):
        while at < len(labels) and after[at] <= i:
            y, u = np.float64(labels[at]), np.float64(weights[at])
            if usable(y, served[at], u):
                x = min(max(_logit(served[at]), _LOWEST), _HIGHEST)
                place = min(int((x - _LOWEST) * bins / (_HIGHEST - _LOWEST)), bins - 1)
                state[place, _WEIGHT] += u
                state[place, _CLICKS] += u * y
                state[place, _LOGITS] += u * x
                state[bins, 0] += 1.0
                if state[bins, 0] >= every:
                    _pool(state, bins)
                    state[bins, 0] = 0.0
                    for n in range(bins):
                        for column in range(3):
                            state[n, column] *= keep
            at += 1
        if i < len(scores):
            if 0.0 <= scores[i] <= 1.0:
                found[i] = (
                    scores[i] if state[bins, 1] == 0.0 else np.float32(_sigmoid(_at(state, bins, _logit(scores[i]))))
                )
            else:
                found[i] = np.float32(np.nan)


@compiled()
def _pool(state: Any, bins: int) -> None:
    """Make the map of the counts: pools of neighbours whose rates rise."""
    pools = np.empty((bins, 3))
    held = 0
    for n in range(bins):
        weight = state[n, _WEIGHT]
        if weight <= 1e-3:
            continue
        mean = state[n, _LOGITS] / weight
        pools[held, _WEIGHT] = weight + 2.0
        pools[held, _CLICKS] = state[n, _CLICKS] + 2.0 * _sigmoid(mean)
        pools[held, _LOGITS] = (weight + 2.0) * mean
        held += 1
        while held > 1 and (
            pools[held - 2, _CLICKS] * pools[held - 1, _WEIGHT] >= pools[held - 1, _CLICKS] * pools[held - 2, _WEIGHT]
        ):
            for column in range(3):
                pools[held - 2, column] += pools[held - 1, column]
            held -= 1
    for n in range(held):
        state[n, 3] = pools[n, _LOGITS] / pools[n, _WEIGHT]
        state[n, 4] = _logit(pools[n, _CLICKS] / pools[n, _WEIGHT])
    state[bins, 1] = held


@compiled()
def _at(state: Any, bins: int, x: Any) -> Any:
    """The map at a logit: straight between two points; beyond the outer ones as far from them as x is."""
    count = int(state[bins, 1])
    if x <= state[0, 3]:
        return state[0, 4] + x - state[0, 3]
    low, high = 0, count - 1
    if x >= state[high, 3]:
        return state[high, 4] + x - state[high, 3]
    while high - low > 1:
        middle = (low + high) // 2
        if state[middle, 3] <= x:
            low = middle
        else:
            high = middle
    share = (x - state[low, 3]) / (state[high, 3] - state[low, 3])
    return state[low, 4] + share * (state[high, 4] - state[low, 4])
