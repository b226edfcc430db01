"""streamrec's rows: the same stream, encoded beforehand as the peers' is, but with ids still hashes to be looked up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import streamrec as sr
from benchmarks import _measure
from benchmarks._measure import Peer, Scores, Seconds, one_thread
from benchmarks.streams import Stream, encoded
from streamrec.protocols import LEARN, SCORE

TUNED = {"optimizer": sr.Adagrad(lr=0.05, l2=0.01), "linear_optimizer": sr.FTRL(lr=0.3, beta=0.5)}
"""The best of 80 random settings on MovieLens-100K; `python -m benchmarks.defaults` holds it against others."""


class OurFM:
    """Scores and learns event by event, whatever the size of a call."""

    def __init__(self, *, batch_size: int, tuned: bool = False) -> None:
        self.batch_size, self.tuned = batch_size, tuned
        self.name = f"streamrec FM{', tuned' if tuned else ''}, {batch_size} a call"
        self.timed_events = None if batch_size > 1 else 20_000

    def prepare(self, labeled: Sequence[sr.Labeled]) -> Stream:
        return encoded(labeled, "MovieLens-100K")

    def run(self, data: Stream, limit: int | None = None) -> tuple[Seconds, Scores]:
        model = sr.FM(data.schema, dim=16, seed=0, **(TUNED if self.tuned else {}))
        labels = data.labels[:limit]
        calls = []  # cut beforehand, as the peers' dicts and tensors are
        for begin in range(0, len(labels), self.batch_size):
            part = labels[begin : begin + self.batch_size]
            rows = np.arange(begin, begin + len(part), dtype=np.int64)
            calls.append((rows, np.full(len(part), SCORE | LEARN, dtype=np.int8), part, np.ones_like(part)))
        found = []
        with one_thread():
            start = _measure.clock()
            for call in calls:
                found.append(model.step(data.batch, *call))
            seconds = _measure.clock() - start
        return seconds, np.concatenate(found)


def ours() -> list[Peer]:
    """The default at two sizes of call, and the tuned settings."""
    return [OurFM(batch_size=256), OurFM(batch_size=1), OurFM(batch_size=256, tuned=True)]
