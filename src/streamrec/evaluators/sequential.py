"""Sequential comparison: is the challenger worse than the champion? Asked after every event, right at all of them.

A test made for a fixed number of events promises too much to one who looks again and again and stops when it pleases.
The intervals here hold at all times at once: with the probability `confidence`, none of them, from the first event to
the last, misses what it is of. So they may be looked at always, and acted upon when they say something.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from typing_extensions import Self

from streamrec._compile import compiled
from streamrec.errors import ConfigError
from streamrec.evaluators._accumulate import CLIP, Column, natural_log, usable

__all__ = ["LossDifference", "radius"]

# The rates that are mixed, in units of 1 / bound, and the logarithms of their weights: of a half-normal density of
# precision _RHO, which makes the intervals shortest when Σ difference² is some hundreds to thousands of bound².
_RHO = 100.0
_RATES = 0.9 * 2.0 ** (-0.5 * np.arange(34))
_WEIGHTS = np.log(_RATES) - _RHO * _RATES**2 / 2.0
_WEIGHTS -= np.log(np.exp(_WEIGHTS).sum())
_COSTS = -np.log1p(-_RATES) - _RATES


def radius(squares: float, bound: float, alpha: float) -> float:
    """How far a sum of bounded differences may ever be above the sum of their means, but with probability `alpha`.

    `squares` is Σ difference², where each lies within ±`bound`. For a rate λ in (0, 1), exp(λ S - (-log(1 - λ) - λ) Q)
    is a supermartingale that begins at 1, where S sums what the differences are above their means, and Q their squares,
    in units of `bound` (Fan, Grama and Liu 2015, lemma 4.1; Howard, Ramdas, McAuliffe and Sekhon 2021, theorem 4). So
    is a mixture over rates, and by Ville's inequality it ever reaches 1 / `alpha` with probability `alpha` at most. It
    needs no independence and no equal means.

    >>> round(radius(squares=100.0, bound=1.0, alpha=0.025), 1)
    38.4
    """
    return float(_solved(squares / (bound * bound), math.log(1.0 / alpha))) * bound


@compiled()
def _solved(squares: float, log: float) -> float:
    """The sum at which the mixture has the logarithm `log`. Newton from above, for it is convex in the sum."""
    found = np.inf
    for k in range(len(_RATES)):  # where one rate alone has it
        found = min(found, (log - _WEIGHTS[k] + _COSTS[k] * squares) / _RATES[k])
    for _ in range(50):
        top = -np.inf
        for k in range(len(_RATES)):
            top = max(top, _WEIGHTS[k] + _RATES[k] * found - _COSTS[k] * squares)
        total = slope = 0.0
        for k in range(len(_RATES)):
            part = math.exp(_WEIGHTS[k] + _RATES[k] * found - _COSTS[k] * squares - top)
            total += part
            slope += _RATES[k] * part
        step = (top + math.log(total) - log) * total / slope
        found -= step
        if step <= 1e-9 * found:
            break
    return found


class LossDifference:
    """The mean log loss of one model less that of another on the same events, with an interval that holds at all times.

    Each event's difference is cut to ±`bound` nats, so that no single event decides. A small bound cuts more from
    clicks than from the rest, and the mean is another one then: see docs/judging.md. `interval` is of the mean, over
    the events so far, of what the cut difference could be expected to be at each; it need not be the same at all. Each
    of its ends is wrong with probability (1 - `confidence`) / 2 at most.

    >>> difference = LossDifference()
    >>> labels = np.tile(np.float32([0, 1, 0]), 2000)
    >>> difference.update(labels, np.full(6000, 0.5, np.float32), np.full(6000, 1 / 3, np.float32))
    >>> round(difference.mean, 4), difference.interval()[0] > 0
    (0.0566, True)
    """

    def __init__(self, *, bound: float = 1.0, confidence: float = 0.95) -> None:
        if not 0 < bound < math.inf:
            raise ConfigError(f"bound must be > 0 nats, got {bound!r}")
        if not 0 < confidence < 1:
            raise ConfigError(f"confidence must be a probability in (0, 1), got {confidence!r}")
        self.bound = bound
        self.confidence = confidence
        self._sums = np.zeros(4)  # count, sum, Σ difference², skipped

    @property
    def count(self) -> int:
        """Events compared."""
        return int(self._sums[0])

    @property
    def skipped(self) -> int:
        """Events left out because their label or a score cannot be judged."""
        return int(self._sums[3])

    @property
    def mean(self) -> float:
        """Nats an event by which the first loses more than the second; nan while there is none."""
        return float(self._sums[1] / self._sums[0]) if self._sums[0] else math.nan

    def update(self, labels: Column, first: Column, second: Column) -> None:
        """Compare the scores of two models, all float32 `(n,)`, in order. A score that is nan is skipped and counted.

        Cutting a call in two changes no bit.
        """
        columns = [np.ascontiguousarray(column, dtype=np.float32) for column in (labels, first, second)]
        if len({column.shape for column in columns}) > 1 or columns[0].ndim != 1:
            raise ConfigError(f"all columns must be (n,) and as many, got {[column.shape for column in columns]}")
        _compare(columns[0], columns[1], columns[2], self.bound, self._sums)

    def interval(self, confidence: float | None = None) -> tuple[float, float]:
        """Between what the mean is, in nats, with the `confidence` (None: its own) at all times together.
        (-bound, bound) at first."""
        count, total, squares, _ = self._sums.tolist()
        if not count:
            return -self.bound, self.bound
        alpha = 1 - (self.confidence if confidence is None else confidence)
        reach = radius(squares, self.bound, alpha / 2) / count
        return max(total / count - reach, -self.bound), min(total / count + reach, self.bound)

    def fresh(self) -> Self:
        """Another of the same settings that has seen nothing."""
        return type(self)(bound=self.bound, confidence=self.confidence)

    def state_dict(self) -> dict[str, Any]:
        """The sums, float64 `(4,)`, cut now."""
        return {"sums": self._sums.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was cut from."""
        self._sums = np.array(state["sums"], dtype=np.float64)


@compiled()
def _compare(labels: Any, first: Any, second: Any, bound: float, sums: Any) -> None:
    for i in range(len(labels)):
        label = np.float64(labels[i])
        if not (usable(label, first[i], 1.0) and usable(label, second[i], 1.0)):
            sums[3] += 1.0
            continue
        difference = 0.0
        for side in range(2):
            score = first[i] if side == 0 else second[i]
            p = min(max(np.float64(score), CLIP), 1.0 - CLIP)
            loss = 0.0
            if label > 0.0:
                loss -= label * natural_log(p)
            if label < 1.0:
                loss -= (1.0 - label) * natural_log(1.0 - p)
            difference += loss if side == 0 else -loss
        difference = min(max(difference, -bound), bound)
        sums[0] += 1.0
        sums[1] += difference
        sums[2] += difference**2
