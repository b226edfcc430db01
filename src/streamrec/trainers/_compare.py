"""Comparisons of two models by their losses on the same labels: of a trial, and of a watch that begins anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.evaluators import LogLoss, LossDifference, NormalizedEntropy

__all__ = ["Comparison", "Watch"]

Column = NDArray[np.float32]


class Comparison:
    """Of two models, as shares of the second one's log loss. `number`: which one it is, so that notes find theirs.

    `confidence`: that of `low`, at all times together. `high` is wrong half as often, for who is promoted by it is
    served.
    """

    def __init__(self, confidence: float) -> None:
        self._difference = LossDifference(confidence=confidence)
        self._loss = LogLoss()  # of the second
        self._entropy = NormalizedEntropy()
        self.number = 1
        self.last: int | None = None
        """The version tried last."""

    @property
    def seen(self) -> int:
        """Labels so far, those that could not be judged among them."""
        return self._difference.count + self._difference.skipped

    @property
    def low(self) -> float:
        """The share of log loss that the first loses more, at least."""
        return self._share(self._difference.interval(2 * self._difference.confidence - 1)[0])

    @property
    def high(self) -> float:
        """The same, at most."""
        return self._share(self._difference.interval()[1])

    def _share(self, nats: float) -> float:
        loss = self._loss.compute()
        return nats / loss if loss > 0 else (np.inf if nats > 0 else -np.inf)

    def update(self, labels: Column, first: Column, second: Column) -> None:
        """Compare the scores of both, in order."""
        self._difference.update(labels, first, second)
        self._loss.update(labels, second)
        self._entropy.update(labels, second)

    @property
    def fits(self) -> bool:
        """Whether the second says more of these labels than their mean would."""
        return self._entropy.compute() < 1

    def again(self) -> None:
        """Forget the labels so far."""
        self._difference = self._difference.fresh()
        self._loss, self._entropy = self._loss.fresh(), self._entropy.fresh()

    def begin(self) -> None:
        """The next one: notes taken until now are of none."""
        self.again()
        self.number += 1

    def state_dict(self) -> dict[str, Any]:
        """The sums, and which one it is; cut now."""
        return {
            "difference": self._difference.state_dict(),
            "loss": self._loss.state_dict(),
            "entropy": self._entropy.state_dict(),
            "number": self.number,
            "last": self.last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was cut from."""
        self._difference.load_state_dict(state["difference"])
        self._loss.load_state_dict(state["loss"])
        self._entropy.load_state_dict(state["entropy"])
        self.number, self.last = int(state["number"]), state["last"]


class Watch:
    """Whether the first of two models has become worse than the second by more than a share of its log loss.

    Looked at over pieces of `every` labels, so that what went well for long does not hide what goes wrong now, and over
    pieces of `whole` labels, in which a small loss shows. Over `whole` labels both together are wrong with a
    probability of at most 1 - `confidence`. Labels of which the second says less than their mean would are no reason to
    go back to it: where they are wrong, the one that knows less loses less.
    """

    def __init__(self, worse: float, confidence: float, every: int, whole: int) -> None:
        alpha = (1 - confidence) / 2
        self._worse = worse
        self._parts = [(Comparison(1 - alpha / -(-whole // every)), every), (Comparison(1 - alpha), whole)]
        self._found = [-np.inf, 0.0]  # at the end of a piece that has said so: by how much, over how many labels

    @property
    def number(self) -> int:
        """Which one it is, so that notes find theirs."""
        return self._parts[0][0].number

    def update(self, labels: Column, first: Column, second: Column) -> None:
        """Compare the scores of both, in order; cutting a call in two changes no bit."""
        for comparison, length in self._parts:
            begin = 0
            while begin < len(labels):
                rows = slice(begin, begin + length - comparison.seen)
                comparison.update(labels[rows], first[rows], second[rows])
                begin = rows.stop
                if comparison.seen == length:
                    if comparison.low > max(self._worse, self._found[0]) and comparison.fits:
                        self._found = [comparison.low, float(length)]
                    comparison.again()

    @property
    def regressed(self) -> bool:
        """Whether it certainly is."""
        return self.found[0] > self._worse

    @property
    def found(self) -> tuple[float, int]:
        """The share of the log loss that the first loses more, at least, and over how many labels that was seen."""
        low, seen = self._found
        for comparison, _ in self._parts:
            if comparison.low > low and comparison.fits:
                low, seen = comparison.low, float(comparison.seen)
        return low, int(seen)

    def begin(self) -> None:
        """The next one: notes taken until now are of none."""
        self._found = [-np.inf, 0.0]
        for comparison, _ in self._parts:
            comparison.begin()

    def state_dict(self) -> dict[str, Any]:
        """Both comparisons and what they have found; cut now."""
        return {"parts": [one.state_dict() for one, _ in self._parts], "found": np.array(self._found)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was cut from."""
        for (one, _), saved in zip(self._parts, state["parts"], strict=True):
            one.load_state_dict(saved)
        self._found = np.asarray(state["found"]).tolist()
