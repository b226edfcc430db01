"""Drift: detectors that say when the mean of a stream of numbers has changed. Their state can be saved.

Both look at one number after the other, in constant or logarithmic memory, and begin anew where they found a change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Self

from streamrec._compile import compiled
from streamrec.errors import ConfigError

__all__ = ["ADWIN", "PageHinkley"]

_LEVELS, _MOST = 48, 5  # buckets of 2^level numbers, at most so many of each level: 2^48 numbers and more
_WIDTH, _TOTAL, _VARIANCE, _TICKS = range(4)


class _Detector:
    _state: NDArray[np.float64]

    def update(self, values: ArrayLike) -> NDArray[np.int64]:
        """Look at these numbers, `(n,)`, in order; int64: the places of those at which a change was found.

        A number that is not finite is passed over. Cutting a call in two changes no bit.
        """
        return np.flatnonzero(self.changes(values))

    def changes(self, values: ArrayLike) -> NDArray[np.int8]:
        """As `update`; int8 `(n,)`: 1 where the mean was found to have risen, -1 where to have fallen, else 0."""
        numbers = np.ascontiguousarray(values, dtype=np.float64)
        found = np.zeros(len(numbers), dtype=np.int8)
        self._look(numbers, found)
        return found

    def _look(self, numbers: NDArray[np.float64], found: NDArray[np.int8]) -> None:
        raise NotImplementedError

    def _settings(self) -> dict[str, Any]:
        raise NotImplementedError

    def fresh(self) -> Self:
        """Another of the same settings that has seen nothing."""
        return type(self)(**self._settings())

    def state_dict(self) -> dict[str, Any]:
        """All it remembers, cut now."""
        return {"state": self._state.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was cut from. Raises `ConfigError` where it is not of such a detector."""
        saved = np.array(state["state"], dtype=np.float64)
        if saved.shape != self._state.shape:
            raise ConfigError(f"{self!r} has a state of shape {self._state.shape}, got {saved.shape}")
        self._state[...] = saved

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._settings().items())})"


class PageHinkley(_Detector):
    """Page 1954, as Gama et al. 2013 have it: the mean has risen, or fallen, when what the numbers were above, or
    below, their mean by more than `delta` each, adds up to more than `threshold`.

    `alpha`: by what the sums are multiplied at each number, so that they forget. `least`: numbers before the first
    alarm. It rises to the alarm in about threshold / (change - delta) numbers. By default, it is for numbers in [0, 1].

    >>> detector = PageHinkley(threshold=5.0)
    >>> detector.update(np.zeros(100)).tolist(), detector.update(np.ones(20)).tolist()
    ([], [5])
    """

    def __init__(self, *, delta: float = 0.02, threshold: float = 50.0, alpha: float = 0.9999, least: int = 30) -> None:
        if not 0 <= delta < math.inf:
            raise ConfigError(f"delta must be >= 0, got {delta!r}")
        if not 0 < threshold < math.inf:
            raise ConfigError(f"threshold must be > 0, got {threshold!r}")
        if not 0 < alpha <= 1:
            raise ConfigError(f"alpha must be in (0, 1], got {alpha!r}")
        if least < 1:
            raise ConfigError(f"least must be >= 1 number, got {least!r}")
        self.delta, self.threshold, self.alpha, self.least = delta, threshold, alpha, least
        self._state = np.zeros(6)  # count, mean, risen, the least of that, fallen, the most of that

    def _settings(self) -> dict[str, Any]:
        return {"delta": self.delta, "threshold": self.threshold, "alpha": self.alpha, "least": self.least}

    def _look(self, numbers: NDArray[np.float64], found: NDArray[np.int8]) -> None:
        _page_hinkley(numbers, self.delta, self.threshold, self.alpha, self.least, self._state, found)


class ADWIN(_Detector):
    """Bifet & Gavaldà 2007, ADWIN2: keeps the longest window of one mean, and says when it drops an older part.

    At each `clock`-th number all ways to cut the window in two are tried, along buckets that grow exponentially with
    age; where the means of both parts differ by more than chance allows with probability `delta`, the older is dropped,
    bucket by bucket. The numbers should lie in [0, 1]. Memory: some 6 kB, whatever the window.

    >>> rng = np.random.default_rng(0)
    >>> detector = ADWIN()
    >>> steady, changed = rng.random(5000) < 0.2, rng.random(2000) < 0.3
    >>> len(detector.update(steady)), len(detector.update(changed)) > 0, 0.25 < detector.mean < 0.35
    (0, True, True)
    """

    def __init__(self, *, delta: float = 0.002, clock: int = 32, least: int = 5) -> None:
        if not 0 < delta < 1:
            raise ConfigError(f"delta must be a probability in (0, 1), got {delta!r}")
        for name, value in (("clock", clock), ("least", least)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number >= 1, got {value!r}")
        self.delta, self.clock, self.least = delta, clock, least
        # row 0: the window; then, of each level, how many buckets, their sums, oldest first, and their variances
        self._state = np.zeros((1 + _LEVELS, 1 + 2 * (_MOST + 1)))

    def _settings(self) -> dict[str, Any]:
        return {"delta": self.delta, "clock": self.clock, "least": self.least}

    @property
    def width(self) -> int:
        """How many numbers the window has."""
        return int(self._state[0, _WIDTH])

    @property
    def mean(self) -> float:
        """Of the window; nan while there is none."""
        return float(self._state[0, _TOTAL] / self._state[0, _WIDTH]) if self.width else math.nan

    def _look(self, numbers: NDArray[np.float64], found: NDArray[np.int8]) -> None:
        _adwin(numbers, self.delta, self.clock, self.least, self._state, found)


@compiled()
def _page_hinkley(
    values: Any, delta: float, threshold: float, alpha: float, least: int, state: Any, found: Any
) -> None:
    for i in range(len(values)):
        x = values[i]
        if not np.isfinite(x):
            continue
        state[0] += 1.0
        state[1] += (x - state[1]) / state[0]
        state[2] = alpha * state[2] + (x - state[1] - delta)
        state[3] = min(state[3], state[2])
        state[4] = alpha * state[4] + (x - state[1] + delta)
        state[5] = max(state[5], state[4])
        if state[0] >= least and (state[2] - state[3] > threshold or state[5] - state[4] > threshold):
            found[i] = 1 if state[2] - state[3] > threshold else -1
            for k in range(6):
                state[k] = 0.0


@compiled()
def _adwin(values: Any, delta: float, clock: int, least: int, state: Any, found: Any) -> None:
    window = state[0]
    variances = 2 + _MOST  # where they begin in a row
    for i in range(len(values)):
        x = values[i]
        if not np.isfinite(x):
            continue
        n = window[_WIDTH]
        if n > 0.0:
            window[_VARIANCE] += n * (x - window[_TOTAL] / n) ** 2 / (n + 1.0)
        window[_WIDTH] += 1.0
        window[_TOTAL] += x
        window[_TICKS] += 1.0
        first = state[1]
        first[1 + int(first[0])] = x
        first[variances + int(first[0])] = 0.0
        first[0] += 1.0
        for level in range(_LEVELS - 1):  # the two oldest of a level that is too many become one of the next
            row, above = state[1 + level], state[2 + level]
            if row[0] <= _MOST:
                break
            size = 2.0**level
            at = int(above[0])
            above[1 + at] = row[1] + row[2]
            above[variances + at] = row[variances] + row[variances + 1] + (row[1] - row[2]) ** 2 / (2.0 * size)
            above[0] += 1.0
            for k in range(int(row[0]) - 2):
                row[1 + k], row[variances + k] = row[3 + k], row[variances + 2 + k]
            row[0] -= 2.0
        if int(window[_TICKS]) % clock != 0:
            continue
        before = window[_TOTAL] / window[_WIDTH]
        changed = False
        while _differs(state, delta, least):
            changed = True
            _drop_oldest(state)
        if changed:
            found[i] = 1 if window[_TOTAL] / window[_WIDTH] > before else -1


@compiled()
def _differs(state: Any, delta: float, least: int) -> bool:
    """Whether there is a cut on both sides of which the means differ by more than chance allows."""
    width, total, variance = state[0, _WIDTH], state[0, _TOTAL], state[0, _VARIANCE]
    if width < 2.0 * least:
        return False
    log = math.log(2.0 * math.log(width) / delta)
    spread = max(variance, 0.0) / width
    n0 = sum0 = 0.0
    for level in range(_LEVELS - 1, -1, -1):
        row = state[1 + level]
        for k in range(int(row[0])):
            n0 += 2.0**level
            sum0 += row[1 + k]
            n1 = width - n0
            if n1 < least:
                return False
            if n0 < least:
                continue
            share = 1.0 / (n0 - least + 1.0) + 1.0 / (n1 - least + 1.0)
            bound = math.sqrt(2.0 * share * spread * log) + 2.0 / 3.0 * share * log
            if abs(sum0 / n0 - (total - sum0) / n1) > bound:
                return True
    return False


@compiled()
def _drop_oldest(state: Any) -> None:
    window = state[0]
    variances = 2 + _MOST
    for level in range(_LEVELS - 1, -1, -1):
        row = state[1 + level]
        if row[0] == 0.0:
            continue
        size = 2.0**level
        window[_WIDTH] -= size
        window[_TOTAL] -= row[1]
        n = window[_WIDTH]
        apart = row[1] / size - window[_TOTAL] / n
        window[_VARIANCE] -= row[variances] + size * n * apart * apart / (size + n)
        for k in range(int(row[0]) - 1):
            row[1 + k], row[variances + k] = row[2 + k], row[variances + 1 + k]
        row[0] -= 1.0
        return
