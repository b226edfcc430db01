"""The arithmetic of the metrics, without memory: each takes sums and gives the value, nan where it is undefined."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "auc_error_bound",
    "auc_from_histograms",
    "Bin",
    "auc_interval",
    "calibration",
    "calibration_curve",
    "calibration_interval",
    "log_loss",
    "log_loss_interval",
    "mean_interval",
    "normalized_entropy",
    "normalized_entropy_interval",
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
    return _within_one(auc, variance, confidence)


def _within_one(value: float, variance: float, confidence: float) -> tuple[float, float]:
    """The interval of a normal distribution on the logit of a value in [0, 1], so that it stays there."""
    if not 0 < value < 1:
        return value, value
    reach = deviations(confidence) * math.sqrt(variance) / (value * (1 - value))
    logit = math.log(value / (1 - value))
    return 1 / (1 + math.exp(reach - logit)), 1 / (1 + math.exp(-reach - logit))


def mean_interval(values: NDArray[np.float64], weights: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """Where Σ weight x value / Σ weight is, of values in [0, 1], over groups that are drawn independently of each
    other: the variance of a ratio (Cochran 1977, eq. 6.13), on its logit.

    `values`, `weights`: float64 `(groups,)`. nan where there are less than two groups.

    >>> low, high = mean_interval(np.array([0.5, 0.7, 0.9, 0.6]), np.ones(4), 0.95)
    >>> round(low, 3), round(high, 3)
    (0.492, 0.817)
    """
    groups, total = len(values), float(weights.sum())
    if groups < 2 or not total > 0:
        return _NOTHING
    mean = float((weights * values).sum()) / total
    variance = float(((weights * (values - mean)) ** 2).sum()) / total**2 * groups / (groups - 1)
    return _within_one(mean, variance, confidence)


def log_loss_interval(loss: float, total: float, squares: float, confidence: float) -> tuple[float, float]:
    """Where the mean log loss is that these are a sample of: a normal distribution of the mean.

    `squares`: the summed square of the loss. Each unit of weight counts as one independent event.

    >>> low, high = log_loss_interval(loss=50.0, total=100.0, squares=50.0, confidence=0.95)
    >>> round(low, 3), round(high, 3)
    (0.402, 0.598)
    """
    if not total > 1:
        return _NOTHING
    mean = loss / total
    reach = deviations(confidence) * math.sqrt(max(squares / total - mean * mean, 0.0) / total)
    return max(0.0, mean - reach), mean + reach


def normalized_entropy_interval(
    loss: float,
    positives: float,
    total: float,
    squares: float,
    products: float,
    labels: float,
    confidence: float,
) -> tuple[float, float]:
    """Where the normalized entropy is that these are a sample of: the delta method, for loss and base rate together.

    `squares`, `products`, `labels`: the sums of the loss squared, of loss x label, and of the label squared. Each unit
    of weight counts as one independent event.
    """
    value = normalized_entropy(loss, positives, total)
    if math.isnan(value) or not total > 1:
        return _NOTHING
    base, mean = positives / total, loss / total
    entropy = mean / value if value > 0 else math.inf
    by_rate = value / entropy * math.log((1 - base) / base)  # what the entropy adds where the base rate grows
    variance = squares / total - mean * mean - 2 * by_rate * entropy * (products / total - mean * base)
    variance += (by_rate * entropy) ** 2 * (labels / total - base * base)
    reach = deviations(confidence) * math.sqrt(max(variance, 0.0) / total) / entropy
    return max(0.0, value - reach), value + reach


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


class Bin(NamedTuple):
    """Of impressions of like scores: the mean of what was predicted, the rate of clicks, where that rate is with 95 %
    confidence, and their weight."""

    predicted: float
    actual: float
    low: float
    high: float
    weight: float


def calibration_curve(
    scores: NDArray[np.float64], positives: NDArray[np.float64], negatives: NDArray[np.float64], bins: int = 10
) -> list[Bin]:
    """What was predicted against what happened, in about `bins` bins of like weight, from the lowest scores to the
    highest; intervals as of `rate_interval`.

    `scores`, `positives`, `negatives`: float64 `(fine bins,)`, the mass of either at each score, in ascending order.

    >>> curve = calibration_curve(np.array([0.1, 0.4]), np.array([10.0, 50.0]), np.array([90.0, 50.0]), bins=2)
    >>> [(one.predicted, one.actual, one.weight) for one in curve]
    [(0.1, 0.1, 100.0), (0.4, 0.5, 100.0)]
    """
    mass = positives + negatives
    total = float(mass.sum())
    if not total > 0:
        return []
    # by the middle of each fine bin's mass, so that one that holds much stands alone
    place = np.minimum((bins * (np.cumsum(mass) - mass / 2) / total).astype(np.int64), bins - 1)
    sums = np.array([np.bincount(place, weights=one, minlength=bins) for one in (mass, positives, mass * scores)])
    return [
        Bin(promised / weight, clicks / weight, *rate_interval(clicks, weight, 0.95), weight)
        for weight, clicks, promised in sums.T.tolist()
        if weight > 0
    ]
