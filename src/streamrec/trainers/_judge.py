"""Judge: what is noted of an impression when it is shown, and who is told its labels when they are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.batch import Batch
from streamrec.evaluators import ProgressiveValidation
from streamrec.events import Impression
from streamrec.trainers.gate import Gate

__all__ = ["Judge"]


class Judge:
    """Gives labels to the metrics, and those of the kind `target` to the gate."""

    def __init__(self, validation: ProgressiveValidation, gate: Gate | None, target: str) -> None:
        self._validation, self._gate, self._target = validation, gate, target

    @property
    def notes(self) -> list[np.dtype[Any]]:
        """The types of what `note` gives."""
        return self._validation.notes if self._gate is None else [*self._validation.notes, self._gate.notes]

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
        if self._gate is not None:
            *notes, compared = notes
            if isinstance(kinds, list):
                wanted = np.array([kind == self._target for kind in kinds])
                self._gate.update(labels[wanted], compared[wanted])
            elif kinds == self._target:
                self._gate.update(labels, compared)
        self._validation.update(labels, served, weights, times, kinds, notes)
