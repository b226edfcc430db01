"""What an FM learns about numbers, compiled: their mean and deviation, or their quantiles.

The statistics of a field are a row, float64: how many were seen, their mean, the sum of squared deviations; where some
field wants quantiles, then `MARKERS` heights and as many positions, by which P² (Jain & Chlamtac 1985; for several
quantiles at once, Raatikainen 1987) follows the quantiles of what was seen without keeping it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from streamrec._compile import compiled

__all__ = ["MARKERS", "MOMENTS", "QUANTILE", "STANDARDIZE", "as_seen", "normalized", "observe"]

STANDARDIZE, QUANTILE = 1, 2
"""What is done with the numbers of a field; 0: nothing."""
MOMENTS = 3
_PARTS = np.array([0.0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995, 1.0])
MARKERS = len(_PARTS)
"""Denser toward the ends, where numbers lie far apart. Ranks are off by 0.01 to 0.02 where numbers come in no order."""


@compiled(inline=True)
def as_seen(value: Any, how: Any, field: int, stats: Any) -> Any:
    """A number as the model sees it, by what was learned so far."""
    if not math.isfinite(value):
        return np.float32(np.nan)  # so that its row is left out
    if how == QUANTILE:
        return np.float32(_ranked(value, stats[field]))
    if stats[field, 0] < 2.0 or stats[field, 2] <= 0.0:
        return np.float32(0.0)
    scaled = (value - stats[field, 1]) / math.sqrt(stats[field, 2] / stats[field, 0])
    return np.float32(min(max(scaled, -10.0), 10.0))


@compiled()
def normalized(values: Any, fields: Any, how: Any, stats: Any) -> Any:
    """float32 `(entries,)`: values as the model sees them, those of some fields by their running statistics."""
    seen = values.copy()
    for i in range(len(values)):
        if how[fields[i]]:
            seen[i] = as_seen(values[i], how[fields[i]], fields[i], stats)
    return seen


@compiled(inline=True)
def observe(value: Any, how: Any, field: int, stats: Any) -> None:
    """Take a number into its field's statistics (the moments: Welford 1962)."""
    if how == QUANTILE:
        _mark(np.float64(value), stats[field])
    else:
        stats[field, 0] += 1.0
        before = value - stats[field, 1]
        stats[field, 1] += before / stats[field, 0]
        stats[field, 2] += before * (value - stats[field, 1])


@compiled(inline=True)
def _pressed(value: Any) -> Any:
    """Ranks stay, and a number that is far away does not take the markers along when they move toward it."""
    return math.copysign(math.log1p(abs(value)), value)


@compiled()
def _ranked(value: Any, row: Any) -> Any:
    """The share of numbers below, as a uniform variable of mean 0 and deviation 1; 0 while there are too few."""
    if row[0] < MARKERS:
        return 0.0
    value = _pressed(value)
    heights, positions = row[MOMENTS : MOMENTS + MARKERS], row[MOMENTS + MARKERS :]
    below = upto = 0
    for i in range(MARKERS):
        below += heights[i] < value
        upto += heights[i] <= value
    if upto > below:  # as high as some markers: in their middle
        position = 0.5 * (positions[below] + positions[upto - 1])
    elif below == 0:
        position = positions[0]
    elif below == MARKERS:
        position = positions[MARKERS - 1]
    else:
        share = (value - heights[below - 1]) / (heights[below] - heights[below - 1])
        position = positions[below - 1] + share * (positions[below] - positions[below - 1])
    return ((position - 1.0) / (row[0] - 1.0) - 0.5) * math.sqrt(12.0)


@compiled()
def _mark(value: Any, row: Any) -> None:
    """P²: move the markers by one number."""
    heights, positions = row[MOMENTS : MOMENTS + MARKERS], row[MOMENTS + MARKERS :]
    value = _pressed(value)
    count = int(row[0])
    row[0] += 1.0
    if count < MARKERS:  # the first are kept, in order
        at = count
        while at > 0 and heights[at - 1] > value:
            heights[at] = heights[at - 1]
            at -= 1
        heights[at] = value
        positions[count] = count + 1.0
        return
    if value < heights[0]:
        heights[0] = value
    if value > heights[MARKERS - 1]:
        heights[MARKERS - 1] = value
    cell = 0
    while cell < MARKERS - 2 and heights[cell + 1] <= value:
        cell += 1
    for i in range(cell + 1, MARKERS):
        positions[i] += 1.0
    for i in range(1, MARKERS - 1):
        off = 1.0 + count * _PARTS[i] - positions[i]
        ahead, behind = positions[i + 1] - positions[i], positions[i] - positions[i - 1]
        if (off >= 1.0 and ahead > 1.0) or (off <= -1.0 and behind > 1.0):
            step = 1.0 if off > 0.0 else -1.0
            up, down = (heights[i + 1] - heights[i]) / ahead, (heights[i] - heights[i - 1]) / behind
            moved = heights[i] + step / (ahead + behind) * ((behind + step) * up + (ahead - step) * down)
            if not heights[i - 1] < moved < heights[i + 1]:
                moved = heights[i] + step * (up if step > 0.0 else down)
            heights[i] = moved
            positions[i] += step
