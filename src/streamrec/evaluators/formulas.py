"""The arithmetic of the metrics, without memory: each takes sums and gives the value, nan where it is undefined."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "auc_error_bound",
    "auc_from_histograms",
    "auc_interval",
    "calibration",
    "calibration_interval",
    "log_loss",
    "normalized_entropy",
    "rate",
    "rate_interval",
]

_NOTHING = (math.nan, math.nan)


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


def deviations(confidence: float) -> float:
    """How many standard deviations to either side hold this share of a normal distribution."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def auc_interval(
    positives: NDArray[np.float64], negatives: NDArray[np.float64], confidence: float
) -> tuple[float, float]:
    """Where the AUC is that these are a sample of: DeLong, DeLong and Clarke-Pearson 1988, on the logit of the AUC, so
    that it stays in [0, 1].

    As `auc_from_histograms`; each unit of mass counts as one independent event. nan while there is one of either alone.

    >>> low, high = auc_interval(np.array([10.0, 40.0]), np.array([40.0, 10.0]), 0.95)
    >>> round(low, 3), round(high, 3)
    (0.709, 0.868)
    """
    p, n = float(positives.sum()), float(negatives.sum())
    if not (p > 1 and n > 1):
        return _NOTHING
    auc = auc_from_histograms(positives, negatives)
    won = (np.cumsum(negatives) - negatives / 2) / n  # by a positive in each bin
    lost = (p - np.cumsum(positives) + positives / 2) / p  # by a negative
    variance = float((positives * (won - auc) ** 2).sum()) / (p - 1) / p
    variance += float((negatives * (lost - auc) ** 2).sum()) / (n - 1) / n
    if not 0 < auc < 1:
        return auc, auc
    reach = deviations(confidence) * math.sqrt(variance) / (auc * (1 - auc))
    logit = math.log(auc / (1 - auc))
    return 1 / (1 + math.exp(reach - logit)), 1 / (1 + math.exp(-reach - logit))


def rate_interval(positives: float, total: float, confidence: float) -> tuple[float, float]:
    """Where the rate is that these are a sample of: Wilson 1927. Each unit of weight counts as one independent event.

    >>> low, high = rate_interval(positives=4.0, total=100.0, confidence=0.95)
    >>> round(low, 4), round(high, 4)
    (0.0157, 0.0984)
    """
    if not 0 <= positives <= total or not total > 0:
        return _NOTHING
    z, share = deviations(confidence), positives / total
    middle = share + z * z / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, (middle - reach) / (1 + z * z / total)), min(1.0, (middle + reach) / (1 + z * z / total))


def calibration_interval(predicted: float, positives: float, total: float, confidence: float) -> tuple[float, float]:
    """Where `calibration` is over repeated draws of the labels of these impressions; wider than it need be.

    The clicks are taken to be independent, and to vary as much as if all were as likely, which is more than they do.
    Each unit of weight counts as one event. The end above is infinite where there may be no click.

    >>> low, high = calibration_interval(predicted=110.0, positives=100.0, total=1000.0, confidence=0.95)
    >>> round(low, 3), round(high, 3)
    (0.916, 1.327)
    """
    low, high = rate_interval(positives, total, confidence)
    if math.isnan(low) or not positives > 0:
        return _NOTHING
    return predicted / (high * total), predicted / (low * total) if low > 0 else math.inf
