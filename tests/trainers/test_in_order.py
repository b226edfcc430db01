from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streamrec.batch import Batch
from streamrec.protocols import LEARN, SCORE
from streamrec.schema import Id, Schema
from streamrec.trainers.in_order import InOrder


class Rate:
    """Predicts what it has learned so far of each id, and writes down how it was called."""

    schema = Schema(Id("user"))

    def __init__(self) -> None:
        self.sums: dict[int, list[float]] = {}
        self.calls: list[tuple[str, int]] = []

    def predict(self, batch: Batch) -> np.ndarray:
        self.calls.append(("predict", len(batch)))
        found = [self.sums.get(i, [1.0, 2.0]) for i in batch.ids[batch.entries].tolist()]
        return np.array([clicks / seen for clicks, seen in found], dtype=np.float32)

    def learn(self, batch: Batch, labels: np.ndarray, weights: np.ndarray | None = None) -> None:
        assert weights is not None
        self.calls.append(("learn", len(batch)))
        for i, label, weight in zip(batch.ids[batch.entries].tolist(), labels, weights, strict=True):
            clicks, seen = self.sums.get(i, [1.0, 2.0])
            self.sums[i] = [clicks + float(label * weight), seen + float(weight)]

    def state_dict(self) -> Mapping[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


BATCH = Batch(np.array([10, 20, 30]), np.ones(3, np.float32), np.zeros(3, np.int32), np.arange(3), np.arange(3) + 1)


def step(model: Rate, operations: list[tuple[int, int, float, float]]) -> np.ndarray:
    rows, ops, labels, weights = zip(*operations, strict=True) if operations else ((), (), (), ())
    return InOrder(model).step(
        BATCH,
        np.array(rows, dtype=np.int64),
        np.array(ops, dtype=np.int8),
        np.array(labels, dtype=np.float32),
        np.array(weights, dtype=np.float32),
    )


operation = st.tuples(
    st.integers(0, 2),
    st.sampled_from([SCORE, LEARN, SCORE | LEARN]),
    st.sampled_from([0.0, 1.0]),
    st.floats(0.5, 2.0, width=32),
)


@given(st.lists(operation, max_size=15))
def test_a_call_for_each_operation_gives_the_same(operations: list[tuple[int, int, float, float]]) -> None:
    model, single = Rate(), Rate()
    scores = step(model, operations)
    assert scores.dtype == np.float32 and scores.shape == (len(operations),)
    for k, (row, op, label, weight) in enumerate(operations):
        shown = BATCH.take([row])
        if op & SCORE:
            assert scores[k] == single.predict(shown)[0]
        else:
            assert np.isnan(scores[k])
        if op & LEARN:
            single.learn(shown, np.array([label], np.float32), np.array([weight], np.float32))
    assert model.sums == single.sums


def test_a_run_of_the_same_operation_is_one_call() -> None:
    model = Rate()
    step(model, [(0, SCORE, 0, 1), (1, SCORE, 0, 1), (0, LEARN, 1, 1), (0, LEARN, 1, 1), (0, 3, 1, 1), (1, 3, 1, 1)])
    both = [("predict", 1), ("learn", 1)]
    assert model.calls == [("predict", 2), ("learn", 2), *both, *both]
    model.calls.clear()
    assert len(step(model, [])) == 0 and model.calls == []
