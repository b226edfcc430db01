"""Judge: what is noted of an impression when it is shown, and who is told its labels when they are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.batch import Batch
from streamrec.evaluators import ProgressiveValidation
from streamrec.events import Impression
from streamrec.trainers.drift import Drift
from streamrec.trainers.gate import Gate
from streamrec.trainers.tuner import Tuner

__all__ = ["Judge"]


class Judge:
    """Gives labels to the metrics, and those of the kind `target` to the gate, the tuner and the watch for drift.

    What a tuner notes are its learners' scores, which are known only when the model has run: whoever runs it adds that
    column to those of `note`, as the last.
    """

    def __init__(
        self,
        validation: ProgressiveValidation,
        gate: Gate | None,
        tuner: Tuner | None,
        drift: Drift | None,
        target: str,
    ) -> None:
        self._validation, self._gate, self._tuner, self._drift = validation, gate, tuner, drift
        self._target = target

    @property
    def notes(self) -> list[np.dtype[Any]]:
        """The types of the columns that come back in `update`."""
        others = [one.notes for one in (self._gate, self._tuner) if one is not None]
        return [*self._validation.notes, *others]

    def note(self, shown: Sequence[Impression], batch: Batch) -> list[NDArray[Any]]:
        """What metrics and the gate want to know of these impressions when their labels come, `(n,)` each."""
        notes = self._validation.note(shown, batch)
        return notes if self._gate is None else [*notes, self._gate.note(batch)]

    def update(
        self,
        labels: NDArray[np.float32],
        served: NDArray[np.float32],
        weights: NDArray[np.float32],
        times: NDArray[np.float64],
        kinds: str | list[str],
        notes: list[NDArray[Any]],
    ) -> None:
        """Judge `served` scores by their labels, in order. All `(n,)`; `kinds`: one for all, or as many."""
        if not (self._gate is None and self._tuner is None and self._drift is None):
            wanted: Any = slice(None) if kinds == self._target else np.array([kind == self._target for kind in kinds])
            learned = not isinstance(kinds, str) or kinds == self._target
            if self._drift is not None and learned:
                self._drift.update(labels[wanted], served[wanted], times[wanted])
            if self._tuner is not None:
                *notes, scores = notes
                if learned:
                    self._tuner.judge(labels[wanted], weights[wanted], scores[wanted])
            if self._gate is not None:
                *notes, compared = notes
                if learned:
                    self._gate.update(labels[wanted], compared[wanted])
        self._validation.update(labels, served, weights, times, kinds, notes)
