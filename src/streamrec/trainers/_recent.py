"""Recent: the last rows whose labels are known, to ask of any model how it would have done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.batch import Batch, LabeledRows

__all__ = ["Recent"]


class Recent:
    """The last `capacity` rows with their labels; up to twice as many for a moment."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._parts: list[LabeledRows] = []
        self._count = 0

    def add(self, batch: Batch, labels: NDArray[np.float32]) -> None:
        """These rows are the last ones."""
        if not len(labels):
            return
        self._parts.append(LabeledRows(batch.compact(), labels, np.ones(len(labels), dtype=np.float32)))
        self._count += len(labels)
        if self._count > 2 * self._capacity:
            self.last(self._capacity)

    def last(self, count: int) -> LabeledRows | None:
        """The last `count` of them, or as many as there are; None where there are none."""
        if not self._parts:
            return None
        whole = LabeledRows.concatenated(self._parts).take(slice(max(0, self._count - self._capacity), None))
        whole = whole._replace(batch=whole.batch.compact())
        self._parts, self._count = [whole], len(whole.labels)
        return whole.take(slice(max(0, self._count - count), None))

    def clear(self) -> None:
        """Forget all."""
        self._parts, self._count = [], 0

    def state_dict(self) -> dict[str, Any]:
        """The last `capacity` rows, cut now."""
        found = self.last(self._capacity)
        if found is None:
            return {"labels": np.empty(0, dtype=np.float32)}
        return {"labels": found.labels.copy(), "rows": found.batch.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was cut from."""
        self.clear()
        labels = np.array(state["labels"], dtype=np.float32)
        if len(labels):
            self.add(Batch.from_dict(state["rows"]), labels)
