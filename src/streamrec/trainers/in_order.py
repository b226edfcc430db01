"""Ordered operations for a model that can only predict and learn."""

from __future__ import annotations

from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from streamrec.batch import Batch
from streamrec.protocols import LEARN, WEIGH, Model

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
            for part in ([place] for place in places) if op & LEARN and op != LEARN else (places,):
                shown = batch.take(rows[part])
                if op & ~LEARN:
                    scores[part] = self.model.predict(shown)
                if op & WEIGH:
                    self.model.learn(shown, *_weighed(labels[part], weights[part], scores[part]))
                elif op & LEARN:
                    self.model.learn(shown, labels[part], weights[part])
        return scores


def _weighed(
    labels: NDArray[np.float32], weights: NDArray[np.float32], scores: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Label and weight by which the plain loss has the gradient of the fake-negative weighted one."""
    positive = labels * (1 + scores)
    whole = positive + (1 - labels) * (1 - scores) * (1 + scores)
    tiny = np.float32(np.finfo(np.float32).tiny)
    return (positive / np.maximum(whole, tiny)).astype(np.float32), whole * weights
