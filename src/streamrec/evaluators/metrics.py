"""Running metrics of served scores: sums under the formulas, so that parts merge into the whole by addition.

All judge by the same rules. Labels are probabilities in [0, 1]: a label y of weight w is w*y positive and w*(1-y)
negative mass. An entry that cannot be judged (a label or score that is nan or outside [0, 1], a weight that is
negative or not finite) is left out of every metric and counted in `skipped`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from streamrec.errors import ConfigError
from streamrec.evaluators import formulas
from streamrec.evaluators._accumulate import BINS, Column, add_loss, add_rates, add_to_bins, bin_middles
from streamrec.evaluators._entries import columns, kind_of, unequal

__all__ = ["AUC", "CTR", "Calibration", "ConversionRate", "LogLoss", "NormalizedEntropy"]

Sums = NDArray[np.float64]


class _Sums:
    """Sums that a compiled loop adds to, and a count of what it skipped: all that these metrics remember."""

    kinds: tuple[str, ...]
    name: str
    skipped: int
    """Entries left out because they cannot be judged."""
    _sums: Sums

    def _arguments(self) -> dict[str, str]:
        raise NotImplementedError

    def fresh(self) -> Self:
        """Another of the same settings that has seen nothing."""
        return type(self)(**self._arguments())

    def merge(self, other: Self) -> None:
        """Take in what another of the same settings has seen. Raises `ConfigError` if the settings differ."""
        if type(other) is not type(self) or other.kinds != self.kinds:
            raise ConfigError(f"cannot merge {other!r} into {self!r}: both must be of the same class and kind")
        self._sums += other._sums
        self.skipped += other.skipped

    def state_dict(self) -> dict[str, Any]:
        """The sums, float64, and the count of skipped entries, cut now."""
        return {"sums": self._sums.copy(), "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was cut from. Raises `ConfigError` if it is not a state of this metric."""
        sums = np.array(state["sums"], dtype=np.float64)
        if sums.shape != self._sums.shape:
            raise ConfigError(f"{self!r} has sums of shape {self._sums.shape}, the state has {sums.shape}")
        self._sums[...] = sums
        self.skipped = int(state["skipped"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._arguments().items())})"


class _OneKind(_Sums):
    """A metric of the labels of one kind."""

    _add: Callable[[Column, Column, Column, Sums], int]
    _shape: ClassVar[tuple[int, ...]] = (3,)

    def __init__(self, *, kind: str = "click") -> None:
        self._kind = kind_of("kind", kind)
        self.kinds = (kind,)
        self.name = type(self).__name__ if kind == "click" else f"{type(self).__name__}[{kind}]"
        self.skipped = 0
        self._sums = np.zeros(self._shape)

    def _arguments(self) -> dict[str, str]:
        return {"kind": self._kind}

    def update(self, labels: Column, scores: Column, weights: Column | None = None, kind: str = "click") -> None:
        """Judge served `scores` by `labels`; labels of another `kind` are ignored.

        All float32 `(n,)`; no `weights`: all 1. Cutting a call in two changes no bit. Raises `ConfigError` where the
        shapes do not fit.
        """
        if kind != self._kind:
            return
        labels, scores, weights = columns(labels, scores, weights)
        skipped = self._add(labels, scores, weights, self._sums)
        if skipped < 0:
            raise unequal(labels, scores, weights)
        self.skipped += skipped


class AUC(_OneKind):
    """Area under the ROC curve: the chance that a click was scored above a non-click, ties counting half.

    Mann-Whitney U over the number of pairs (Fawcett 2006, section 7). Scores are put into 13,824 bins, 1/8192 wide
    between 1/32 and 31/32 and 1/256 of an octave towards 0 and 1, down to 2**-17 from either end: at most 0.004 in
    logit. 221 kB of memory, whatever the stream. `error_bound()` tells how exact it is.

    >>> auc = AUC()
    >>> auc.update(np.float32([0, 1, 0, 1]), np.float32([0.1, 0.4, 0.35, 0.8]))
    >>> auc.compute()
    1.0
    """

    _add = staticmethod(add_to_bins)
    _shape = (BINS, 2)

    def compute(self) -> float:
        """The AUC in [0, 1]; nan until both clicks and non-clicks have been seen."""
        return formulas.auc_from_histograms(self._sums[:, 0], self._sums[:, 1])

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """See `formulas.auc_interval`."""
        return formulas.auc_interval(self._sums[:, 0], self._sums[:, 1], confidence)

    def calibration_curve(self, bins: int = 10) -> list[formulas.Bin]:
        """What was predicted against what happened; see `formulas.calibration_curve`. Scores are known as exactly as
        the bins are narrow."""
        return formulas.calibration_curve(bin_middles(), self._sums[:, 0], self._sums[:, 1], bins)

    def error_bound(self) -> float:
        """How far `compute()` can be from the AUC of the unbinned scores: never further than this.

        Scores in different bins are compared rightly, since the bins keep the order. The `P_b N_b` pairs within bin
        b count half, where any part of them may be won: so the error is at most half of `sum_b P_b N_b / (P N)`.
        It is the worst case; where scores do not conspire with the bins, the error is a hundredth of it.
        """
        return formulas.auc_error_bound(self._sums[:, 0], self._sums[:, 1])


class LogLoss(_OneKind):
    """Mean weighted log loss in nats, scores clipped to [1e-7, 1 - 1e-7].

    >>> loss = LogLoss()
    >>> loss.update(np.float32([1, 0]), np.float32([0.5, 0.5]))
    >>> round(loss.compute(), 4)
    0.6931
    """

    _add = staticmethod(add_loss)
    _shape = (6,)

    def compute(self) -> float:
        """Nats per unit of weight; nan while nothing has been seen."""
        loss, _, total, *_ = self._sums.tolist()
        return formulas.log_loss(loss, total)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """See `formulas.log_loss_interval`."""
        loss, _, total, squares, *_ = self._sums.tolist()
        return formulas.log_loss_interval(loss, total, squares, confidence)


class NormalizedEntropy(_OneKind):
    """Log loss over the entropy of the base rate (He et al. 2014): under 1 beats always predicting the average.

    Unlike the log loss itself it can be compared between streams of different click rates. Scores are clipped to
    [1e-7, 1 - 1e-7].

    >>> entropy = NormalizedEntropy()
    >>> entropy.update(np.float32([1, 0]), np.float32([0.5, 0.5]))
    >>> entropy.compute()
    1.0
    """

    _add = staticmethod(add_loss)
    _shape = (6,)

    def compute(self) -> float:
        """The ratio, from 0; nan until both clicks and non-clicks have been seen."""
        return formulas.normalized_entropy(*self._sums[:3].tolist())

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """See `formulas.normalized_entropy_interval`."""
        loss, positives, total, squares, products, labels = self._sums.tolist()
        return formulas.normalized_entropy_interval(loss, positives, total, squares, products, labels, confidence)


class Calibration(_OneKind):
    """Predicted clicks over actual clicks, weighted: 1 is ideal, 1.1 promises a tenth too many.

    >>> calibration = Calibration()
    >>> calibration.update(np.float32([1, 0]), np.float32([0.75, 0.5]))
    >>> calibration.compute()
    1.25
    """

    _add = staticmethod(add_rates)

    def compute(self) -> float:
        """The ratio, from 0; nan while there is no click."""
        predicted, positives, _ = self._sums.tolist()
        return formulas.calibration(predicted, positives)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """See `formulas.calibration_interval`."""
        predicted, positives, total = self._sums.tolist()
        return formulas.calibration_interval(predicted, positives, total, confidence)


class CTR(_OneKind):
    """Click-through rate: the weighted mean of the labels of the entries the other metrics judge.

    >>> ctr = CTR()
    >>> ctr.update(np.float32([1, 0, 0, 0]), np.float32([0.5, 0.5, 0.5, 0.5]))
    >>> ctr.compute()
    0.25
    """

    _add = staticmethod(add_rates)

    def compute(self) -> float:
        """The rate in [0, 1]; nan while nothing has been seen."""
        _, positives, total = self._sums.tolist()
        return formulas.rate(positives, total)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """See `formulas.rate_interval`."""
        _, positives, total = self._sums.tolist()
        return formulas.rate_interval(positives, total, confidence)


class ConversionRate(_Sums):
    """Conversions per click: the positive weight of the kind `of` over that of the kind `per`.

    Either may arrive long after the other; the rate counts what has come in so far.

    >>> rate = ConversionRate()
    >>> rate.update(np.float32([1, 1, 1, 1, 0]), np.float32([0.5] * 5), kind="click")
    >>> rate.update(np.float32([1, 0, 0, 0]), np.float32([0.5] * 4), kind="conversion")
    >>> rate.compute()
    0.25
    """

    def __init__(self, *, of: str = "conversion", per: str = "click") -> None:
        self._of, self._per = kind_of("of", of), kind_of("per", per)
        if of == per:
            raise ConfigError(f"of and per must be different kinds, got {of!r} for both")
        self.kinds = (per, of)
        what = of if per == "click" else f"{of} per {per}"
        self.name = "ConversionRate" if what == "conversion" else f"ConversionRate[{what}]"
        self.skipped = 0
        self._sums = np.zeros((2, 3))

    def _arguments(self) -> dict[str, str]:
        return {"of": self._of, "per": self._per}

    def update(self, labels: Column, scores: Column, weights: Column | None = None, kind: str = "click") -> None:
        """Count the positive weight of `labels` of one of its kinds; labels of another `kind` are ignored.

        All float32 `(n,)`; no `weights`: all 1. Cutting a call in two changes no bit. Raises `ConfigError` where the
        shapes do not fit.
        """
        if kind not in self.kinds:
            return
        labels, scores, weights = columns(labels, scores, weights)
        skipped = add_rates(labels, scores, weights, self._sums[self.kinds.index(kind)])
        if skipped < 0:
            raise unequal(labels, scores, weights)
        self.skipped += skipped

    def compute(self) -> float:
        """The rate, from 0; nan while there is no positive of the kind `per`."""
        return formulas.rate(float(self._sums[1, 1]), float(self._sums[0, 1]))

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """See `formulas.rate_interval`; nan where there are more conversions than clicks."""
        return formulas.rate_interval(float(self._sums[1, 1]), float(self._sums[0, 1]), confidence)
