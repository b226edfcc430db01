"""Off-policy evaluation: what another ranking would have earned, from a log that says how likely each item was shown.

Each takes arrays `(n,)`, an entry for each logged impression: `rewards`, what came of it (the label, or its value);
`logged`, the probability with which the policy that wrote the log chose the item that was shown, given the moment;
`target`, the probability with which the policy in question would have. An entry that cannot be used (a probability
outside (0, 1], a reward that is not finite) is left out and counted in `skipped`. The policy that wrote the log must
have shown, now and then, all that the other one would show: nobody can tell what was never tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamrec.errors import ConfigError

__all__ = ["Estimate", "doubly_robust", "ips", "snips"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean reward per impression, and how sure it is.

    `low`, `high`: its interval of the confidence asked for, by the normal approximation, which wants some dozens of
    rewards. `count`: the entries used; `effective`: how many entries of equal weight would say as much,
    (Σw)² / Σw² (Kish 1965): where that is small, few entries decide. `skipped`: those that cannot be used.
    """

    value: float
    low: float
    high: float
    count: int
    effective: float
    skipped: int


def ips(
    rewards: ArrayLike, logged: ArrayLike, target: ArrayLike, *, clip: float = math.inf, confidence: float = 0.95
) -> Estimate:
    """Inverse propensity scoring: the mean of `target / logged * reward` (Horvitz and Thompson 1952).

    Right on average, whatever the policies. Where their ratio is large, so is the spread: `clip` bounds the ratio, at
    the price of an estimate that is too small for rewards >= 0 (Ionides 2008).

    >>> ips([1.0, 0.0, 1.0, 0.0], logged=[0.5] * 4, target=[1.0, 0.0, 0.5, 0.5]).value
    0.75
    """
    reward, weight, skipped = _entries(rewards, logged, target, clip)
    return _mean(weight * reward, weight, skipped, confidence)


def snips(
    rewards: ArrayLike, logged: ArrayLike, target: ArrayLike, *, clip: float = math.inf, confidence: float = 0.95
) -> Estimate:
    """Self-normalized: Σ `ratio * reward` / Σ `ratio` (Swaminathan and Joachims 2015).

    Always within the range of the rewards, and of less spread than `ips` mostly; its bias goes down as 1 / n. The
    interval is by the delta method.

    >>> round(snips([1.0, 0.0, 1.0, 0.0], logged=[0.5] * 4, target=[1.0, 0.0, 0.5, 0.5]).value, 6)
    0.75
    """
    reward, weight, skipped = _entries(rewards, logged, target, clip)
    total = float(weight.sum())
    if not total > 0:
        return Estimate(math.nan, math.nan, math.nan, len(weight), 0.0, skipped)
    value = float((weight * reward).sum()) / total
    error = math.sqrt(float((weight**2 * (reward - value) ** 2).sum())) / total
    return _around(value, error, weight, skipped, confidence)


def doubly_robust(
    rewards: ArrayLike,
    logged: ArrayLike,
    target: ArrayLike,
    *,
    predicted: ArrayLike,
    expected: ArrayLike,
    clip: float = math.inf,
    confidence: float = 0.95,
) -> Estimate:
    """A model's answer, corrected where the log contradicts it (Dudík, Langford and Li 2011, eq. 4).

    `predicted`: the model's reward of the item that was shown; `expected`: its mean reward of the items that the target
    policy would show, Σ probability x prediction. Right on average if the propensities are right or the model
    is; the better the model, the smaller the spread. The model must not have learned from these entries: the served
    score of progressive validation has not.

    >>> doubly_robust([1.0, 0.0], logged=[0.5, 0.5], target=[1.0, 1.0], predicted=[0.9, 0.1], expected=[0.9, 0.1]).value
    0.5
    """
    reward, weight, skipped = _entries(rewards, logged, target, clip, predicted, expected)
    model, mean = reward[1], reward[2]
    return _mean(mean + weight * (reward[0] - model), weight, skipped, confidence)


def _entries(
    rewards: ArrayLike, logged: ArrayLike, target: ArrayLike, clip: float, *more: ArrayLike
) -> tuple[Floats, Floats, int]:
    """The rewards that can be used, the ratio of probabilities of each, and how many cannot; with `more` columns beside
    the rewards, all of them as `(columns, n)`."""
    if not clip > 0:
        raise ConfigError(f"clip must be a ratio of probabilities > 0, got {clip!r}")
    columns = [np.asarray(column, dtype=np.float64) for column in (rewards, logged, target, *more)]
    if any(column.shape != columns[0].shape or column.ndim != 1 for column in columns):
        raise ConfigError(f"all columns must be (n,) and as many, got {[column.shape for column in columns]}")
    values = np.stack([columns[0], *columns[3:]])
    before, after = columns[1], columns[2]
    usable = np.isfinite(values).all(axis=0) & (before > 0) & (before <= 1) & (after >= 0) & (after <= 1)
    ratio = np.minimum(after[usable] / before[usable], clip)
    chosen: Any = values[:, usable]
    return (chosen if more else chosen[0]), ratio, int(len(usable) - np.count_nonzero(usable))


def _mean(parts: Floats, weight: Floats, skipped: int, confidence: float) -> Estimate:
    count = len(parts)
    if not count:
        return _around(math.nan, math.nan, weight, skipped, confidence)
    error = float(parts.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return _around(float(parts.mean()), error, weight, skipped, confidence)


def _around(value: float, error: float, weight: Floats, skipped: int, confidence: float) -> Estimate:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must be a probability in (0, 1), got {confidence!r}")
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * error
    squares = float((weight**2).sum())
    effective = float(weight.sum()) ** 2 / squares if squares > 0 else 0.0
    return Estimate(value, value - reach, value + reach, len(weight), effective, skipped)
