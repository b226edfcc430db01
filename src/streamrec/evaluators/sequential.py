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

# Of the stitched boundary: each epoch of variance is twice the one before, and their errors sum to one by ζ(1.4).
_ETA, _POWER, _ZETA = 2.0, 1.4, 3.1055472779775815
_SHARP = 25.0  # in squares of the span: where the boundary begins to be sharp; less variance counts as so much
_K1 = (_ETA**0.25 + _ETA**-0.25) / math.sqrt(2.0)
_K2 = (math.sqrt(_ETA) + 1.0) / 2.0


def radius(variance: float, span: float, alpha: float) -> float:
    """How far a sum of bounded differences may ever be above the sum of their means, but with probability `alpha`.

    Howard, Ramdas, McAuliffe and Sekhon 2021, eq. 10 (the polynomial stitched boundary for sub-gamma processes, η = 2,
    s = 1.4), with their theorem 4: `variance` is Σ (difference - what was predicted of it before)², `span` the width of
    the range the differences lie in. It needs no independence and no equal means.

    >>> round(radius(variance=100.0, span=2.0, alpha=0.025), 1)
    45.2
    """
    begin = _SHARP * span * span
    v = max(variance, begin)
    log = _POWER * math.log(math.log(_ETA * v / begin) / math.log(_ETA)) + math.log(_ZETA / alpha)
    return math.sqrt(_K1**2 * v * log + (_K2 * span * log) ** 2) + _K2 * span * log


class LossDifference:
    """The mean log loss of one model less that of another on the same events, with an interval that holds at all times.

    Each event's difference is cut to ±`bound` nats, so that no single event decides. A small bound cuts more from
    clicks than from the rest, and the mean is another one then: see docs/judging.md. `interval` is of the mean, over
    the events so far, of what the cut difference could be expected to be at each; it need not be the same at all.

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
        self._sums = np.zeros(4)  # count, sum, Σ (difference - the mean before)², skipped

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

    def interval(self) -> tuple[float, float]:
        """Between what the mean is, in nats, with the `confidence` at all times together. (-bound, bound) at first."""
        count, total, variance, _ = self._sums.tolist()
        if not count:
            return -self.bound, self.bound
        reach = radius(variance, 2 * self.bound, (1 - self.confidence) / 2) / count
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
        before = sums[1] / sums[0] if sums[0] > 0.0 else 0.0
        sums[0] += 1.0
        sums[1] += difference
        sums[2] += (difference - before) ** 2
