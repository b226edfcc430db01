"""The arithmetic of the metrics, without memory: each takes sums and gives the value, nan where it is undefined."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["auc_error_bound", "auc_from_histograms", "calibration", "log_loss", "normalized_entropy", "rate"]


def log_loss(loss: float, total: float) -> float:
    """Mean log loss in nats: the summed `loss` over the `total` weight.

    >>> log_loss(loss=1.5, total=3.0)
    0.5
    """
    return loss / total if total > 0 else math.nan


def normalized_entropy(loss: float, positives: float, total: float) -> float:
    """Mean log loss over the entropy of the base rate `positives / total`. Under 1 beats always predicting that rate.

    He et al. 2014, "Practical lessons from predicting clicks on ads at Facebook", eq. 1. `loss`: the summed log loss
    in nats. nan while only one of the two labels has been seen: then the entropy is 0.

    >>> always_the_average = -(math.log(0.25) + 3 * math.log(0.75))
    >>> round(normalized_entropy(always_the_average, positives=1.0, total=4.0), 12)
    1.0
    """
    if not 0 < positives < total:
        return math.nan
    base = positives / total
    entropy = -(base * math.log(base) + (1 - base) * math.log1p(-base))
    return loss / total / entropy if entropy > 0 else math.nan


def calibration(predicted: float, positives: float) -> float:
    """Predicted clicks over actual clicks; 1 is ideal, above 1 promises too much.

    >>> calibration(predicted=30.0, positives=20.0)
    1.5
    """
    return predicted / positives if positives > 0 else math.nan


def rate(positives: float, total: float) -> float:
    """The share of `positives` in `total`, both weighted.

    >>> rate(positives=1.0, total=4.0)
    0.25
    """
    return positives / total if total > 0 else math.nan


def auc_from_histograms(positives: NDArray[np.float64], negatives: NDArray[np.float64]) -> float:
    """The chance that a positive scores above a negative, ties counting half, from the mass of each in every bin.

    `positives`, `negatives`: float64 `(bins,)`, bins in ascending order of score. This is the Mann-Whitney U over
    the number of pairs, and the area under the ROC curve joined by straight lines (Fawcett 2006, section 7).

    >>> auc_from_histograms(np.array([0.0, 1.0, 2.0]), np.array([3.0, 1.0, 0.0]))
    0.9583333333333334
    """
    pairs = float(positives.sum()) * float(negatives.sum())
    if not pairs > 0:
        return math.nan
    below = np.cumsum(negatives) - negatives
    won = float((positives * (below + negatives / 2)).sum())
    return min(won / pairs, 1.0)  # rounding may pass 1 by a bit


def auc_error_bound(positives: NDArray[np.float64], negatives: NDArray[np.float64]) -> float:
    """How far `auc_from_histograms` can be from the AUC of the scores themselves: half the share of tied pairs.

    Two scores in different bins are in their true order. Of the `P_b N_b` pairs within bin b all, none or any part may
    be won, and half is counted: so each bin is wrong by at most `P_b N_b / 2` pairs of `P N`, P and N being the sums.

    >>> auc_error_bound(np.array([0.0, 1.0, 2.0]), np.array([3.0, 1.0, 0.0]))
    0.041666666666666664
    """
    pairs = float(positives.sum()) * float(negatives.sum())
    return float((positives * negatives).sum()) / pairs / 2 if pairs > 0 else math.nan
