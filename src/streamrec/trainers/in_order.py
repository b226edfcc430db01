"""Ordered operations for a model that can only predict and learn."""

from __future__ import annotations

from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from streamrec.batch import Batch
from streamrec.protocols import LEARN, SCORE, Model

__all__ = ["InOrder"]


class InOrder:
    """Gives a model a `step`: one call of `predict` or `learn` for each run of the same operation."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def step(
        self,
        batch: Batch,
        rows: NDArray[np.int64],
        ops: NDArray[np.int8],
        labels: NDArray[np.float32],
        weights: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """See `streamrec.protocols.OrderedModel`."""
        scores = np.full(len(rows), np.nan, dtype=np.float32)
        for op, run in groupby(range(len(rows)), key=ops.__getitem__):
            places = list(run)
            # a row that is scored and learned must be learned before the next one is scored
            for part in ([place] for place in places) if op == SCORE | LEARN else (places,):
                shown = batch.take(rows[part])
                if op & SCORE:
                    scores[part] = self.model.predict(shown)
                if op & LEARN:
                    self.model.learn(shown, labels[part], weights[part])
        return scores
