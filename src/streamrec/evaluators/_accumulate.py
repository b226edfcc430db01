"""The loops that add judged entries to sums, one after the other.

Sums are kept in float64 and taken entry by entry, never pairwise: so no cut of a call changes a bit. Each loop
returns how many entries it skipped, or -1 where the columns differ in length.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec._compile import compiled

__all__ = [
    "BINS",
    "CLIP",
    "Column",
    "add_loss",
    "add_rates",
    "add_to_bins",
    "bin_middles",
    "bin_of",
    "natural_log",
    "usable",
]

Column = NDArray[np.float32]
Sums = NDArray[np.float64]

CLIP = 1e-7
"""How near to 0 and 1 a probability may come before its logarithm is taken."""

# One half of the bins covers [0, 0.5): 12 octaves of 256 bins from 2**-17 to 2**-5, and from there on 1/8192 each.
# Both are 1/8192 wide around 2**-5, so the width never jumps up on the way to the middle.
_MIDDLE = 2.0**-5
_OCTAVES = 12 * 256
_HALF = _OCTAVES + 4096 - 256
BINS = 2 * _HALF

_LN2 = math.log(2.0)
_SQRT_HALF = math.sqrt(0.5)


@compiled()
def usable(label: Any, score: Any, weight: Any) -> bool:
    """Whether an entry can be judged; every comparison with nan is false."""
    return bool(0.0 <= label <= 1.0 and 0.0 <= score <= 1.0 and 0.0 <= weight < np.inf)


@compiled()
def natural_log(x: float) -> float:
    """The logarithm of 0 < x <= 1, from exact and correctly rounded operations alone.

    libm's differs between machines in the last bit, and a vectorised one between full lanes and the rest: then
    the cut of a call would show in the sum.
    """
    mantissa, exponent = math.frexp(x)
    if mantissa < _SQRT_HALF:
        mantissa *= 2.0
        exponent -= 1
    z = (mantissa - 1.0) / (mantissa + 1.0)  # |z| < 0.172, so z**22 is below a float64's last bit
    s = z * z
    tail = 1 / 15 + s * (1 / 17 + s * (1 / 19 + s * (1 / 21)))
    series = 1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * tail)))))
    return exponent * _LN2 + 2.0 * (z + z * s * series)


@compiled()
def bin_of(score: Any) -> int:
    """The bin of a float32 probability, from its bits: monotone, and the same on every machine."""
    near = score if score < np.float32(0.5) else np.float32(1.0) - score  # exact: both are within a factor of two
    if near >= _MIDDLE:
        place = min(_OCTAVES - 256 + int(near * 8192.0), _HALF - 1)
    else:
        place = max(int(np.float32(near).view(np.int32) >> 15) - (110 << 8), 0)  # 110: the exponent of 2**-17, biased
    return place if score < np.float32(0.5) else BINS - 1 - place


def bin_middles() -> NDArray[np.float64]:
    """float64 `(BINS,)`: the middle of each bin of `bin_of`."""
    octaves = ((np.arange(_OCTAVES + 1, dtype=np.int32) + (110 << 8)) << 15).view(np.float32).astype(np.float64)
    edges = np.concatenate([octaves, np.arange(257, 4097) / 8192.0])
    edges[0] = 0.0
    lower = (edges[1:] + edges[:-1]) / 2.0
    return np.concatenate([lower, 1.0 - lower[::-1]])


@compiled()
def add_to_bins(labels: Column, scores: Column, weights: Column, masses: Sums) -> int:
    """Add to `masses`, `(BINS, 2)`, the positive and the negative mass at each score. Empty `weights`: all 1."""
    n, weighted = scores.shape[0], weights.shape[0] > 0
    if labels.shape[0] != n or (weighted and weights.shape[0] != n):
        return -1
    skipped = 0
    for i in range(n):
        label, weight = np.float64(labels[i]), np.float64(weights[i]) if weighted else 1.0
        if usable(label, scores[i], weight):
            place = bin_of(scores[i])
            masses[place, 0] += weight * label
            masses[place, 1] += weight * (1.0 - label)
        else:
            skipped += 1
    return skipped


@compiled()
def add_loss(labels: Column, scores: Column, weights: Column, sums: Sums) -> int:
    """Add to `sums`, `(6,)`: the log loss l in nats, the positive weight, the weight, and, weighted, l², l y and y² for
    labels y. Empty `weights`: all 1."""
    n, weighted = scores.shape[0], weights.shape[0] > 0
    if labels.shape[0] != n or (weighted and weights.shape[0] != n):
        return -1
    skipped = 0
    for i in range(n):
        label, weight = np.float64(labels[i]), np.float64(weights[i]) if weighted else 1.0
        if usable(label, scores[i], weight):
            p = min(max(np.float64(scores[i]), CLIP), 1.0 - CLIP)
            loss = 0.0
            if label > 0.0:
                loss -= label * natural_log(p)
            if label < 1.0:
                loss -= (1.0 - label) * natural_log(1.0 - p)
            sums[0] += weight * loss
            sums[1] += weight * label
            sums[2] += weight
            sums[3] += weight * loss * loss
            sums[4] += weight * loss * label
            sums[5] += weight * label * label
        else:
            skipped += 1
    return skipped


@compiled()
def add_rates(labels: Column, scores: Column, weights: Column, sums: Sums) -> int:
    """Add to `sums`: the predicted positive weight, the positive weight, the weight. Empty `weights`: all 1."""
    n, weighted = scores.shape[0], weights.shape[0] > 0
    if labels.shape[0] != n or (weighted and weights.shape[0] != n):
        return -1
    skipped = 0
    for i in range(n):
        label, weight = np.float64(labels[i]), np.float64(weights[i]) if weighted else 1.0
        if usable(label, scores[i], weight):
            sums[0] += weight * np.float64(scores[i])
            sums[1] += weight * label
            sums[2] += weight
        else:
            skipped += 1
    return skipped
