"""Judge: what is noted of an impression when it is shown, and who is told its labels when they are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.batch import Batch
from streamrec.evaluators import ProgressiveValidation
from streamrec.evaluators.calibration import Calibrator
from streamrec.events import Impression
from streamrec.trainers.drift import Drift
from streamrec.trainers.gate import Gate
from streamrec.trainers.tuner import Tuner

__all__ = ["Judge"]

Scores = NDArray[np.float32]
Rows = Any  # which rows of the columns of notes: their numbers, or a slice

_RAW = np.dtype([("raw", np.float32)])


class Judge:
    """Gives labels to the metrics, and those of the kind `target` to the gate, the tuner and the watch for drift.

    Each of them notes of an impression what it wants to know when its label comes, in a column of its own. What the
    metrics and the gate note is known when it is shown; what the learners of a tuner say of it (`said`), what the
    model said before that was calibrated, and after (`calibrated`), when the model has run.
    """

    def __init__(
        self,
        validation: ProgressiveValidation,
        target: str,
        *,
        gate: Gate | None = None,
        tuner: Tuner | None = None,
        drift: Drift | None = None,
        calibration: Calibrator | None = None,
    ) -> None:
        self._validation, self._target = validation, target
        self._gate, self._tuner, self._drift, self._calibration = gate, tuner, drift, calibration
        self.notes: list[np.dtype[Any]] = [*validation.notes]
        """The types of the columns that come back in `update`."""
        self._gate_s = self._place(None if gate is None else gate.notes)
        self._tuner_s = self._place(None if tuner is None else tuner.notes)
        self._raw = self._place(None if calibration is None else _RAW)

    def _place(self, kind: np.dtype[Any] | None) -> int:
        if kind is not None:
            self.notes.append(kind)
        return len(self.notes) - 1

    def note(self, shown: Sequence[Impression], batch: Batch) -> list[NDArray[Any]]:
        """What is known of these impressions before the model has run, `(n,)` each: the first of `notes`. The others
        are what `said` and `calibrated` write."""
        notes = self._validation.note(shown, batch)
        return notes if self._gate is None else [*notes, self._gate.note(batch)]

    def noted(self, shown: Sequence[Impression], batch: Batch) -> list[NDArray[Any]]:
        """All columns of `notes`, with what `note` gives, and with room for the others."""
        notes = self.note(shown, batch)
        return [*notes, *(np.empty(len(batch), dtype=kind) for kind in self.notes[len(notes) :])]

    def said(self, scores: NDArray[np.float32], notes: list[NDArray[Any]], rows: Rows) -> Scores:
        """What the model says of these rows: of the `scores` of a tuner's learners, those of the one that serves."""
        if self._tuner is not None:
            notes[self._tuner_s][rows] = self._tuner.noted(scores)
            scores = self._tuner.served(scores)
        if self._calibration is not None:
            notes[self._raw]["raw"][rows] = scores
        return scores

    def raw(self, notes: list[NDArray[Any]], rows: Rows) -> Scores:
        """What the model said of these rows before that was calibrated."""
        found: Scores = notes[self._raw]["raw"][rows]
        return found

    def calibrated(self, scores: Scores, notes: list[NDArray[Any]], rows: Rows) -> None:
        """These are the learner's scores of these rows, as it would have served them."""
        if self._gate is not None:
            notes[self._gate_s]["learner"][rows] = scores

    def update(
        self,
        labels: NDArray[np.float32],
        served: NDArray[np.float32],
        weights: NDArray[np.float32],
        times: NDArray[np.float64],
        kinds: str | list[str],
        notes: list[NDArray[Any]],
        shown: Batch,
        rows: NDArray[np.int64],
    ) -> None:
        """Judge `served` scores by their labels, in order. All `(n,)`; `kinds`: one for all, or as many; `rows`: those
        of `shown` that the labels are of."""
        if not (self._gate is None and self._tuner is None and self._drift is None):
            wanted: Any = slice(None) if kinds == self._target else np.array([kind == self._target for kind in kinds])
            if not isinstance(kinds, str) or kinds == self._target:
                if self._drift is not None:
                    self._drift.update(labels[wanted], served[wanted], times[wanted])
                if self._tuner is not None:
                    self._tuner.judge(labels[wanted], weights[wanted], notes[self._tuner_s][wanted])
                if self._gate is not None:
                    self._gate.update(labels[wanted], notes[self._gate_s][wanted], shown.take(rows[wanted]))
        self._validation.update(labels, served, weights, times, kinds, notes[: len(self._validation.notes)])
