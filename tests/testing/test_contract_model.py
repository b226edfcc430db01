"""Models that break one promise each, and what check_model says of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import streamrec.testing
from streamrec.batch import Batch
from streamrec.events import Impression
from streamrec.preprocessors import encode
from streamrec.protocols import Changed
from streamrec.schema import Id, Schema
from streamrec.testing import check_metric, check_model, check_source, check_stage

SCHEMA = Schema(Id("user"), Id("item"))
BATCH = encode(SCHEMA, [Impression(id=str(n), time=0.0, user=str(n % 5), item=str(n * n % 7)) for n in range(24)]).batch
LABELS = [n % 5 == 0 for n in range(24)]


class Rates:
    """The click rate of each id, averaged over a row's ids: the smallest model that keeps every promise."""

    def __init__(self) -> None:
        self.schema = SCHEMA
        self.sums: dict[str, list[float]] = {}

    def _known(self, i: int) -> list[float]:
        return self.sums.get(str(i), [0.5, 1.0])

    def predict(self, batch: Batch) -> Any:
        scores = np.empty(len(batch), dtype=np.float32)
        for row, (start, end) in enumerate(zip(batch.starts, batch.ends, strict=True)):
            rates = [clicks / seen for clicks, seen in map(self._known, batch.ids[start:end].tolist())]
            scores[row] = sum(rates) / len(rates)
        return scores

    def learn(self, batch: Batch, labels: Any, weights: Any = None) -> None:
        for row, (start, end) in enumerate(zip(batch.starts, batch.ends, strict=True)):
            weight = 1.0 if weights is None else float(weights[row])
            for i in batch.ids[start:end].tolist():
                clicks, seen = self._known(i)
                self.sums[str(i)] = [clicks + weight * float(labels[row]), seen + weight]

    def state_dict(self) -> Any:
        return {"sums": {key: list(pair) for key, pair in self.sums.items()}}

    def load_state_dict(self, state: Any) -> None:
        self.sums = {key: list(pair) for key, pair in state["sums"].items()}


class Ordered(Rates):
    """With the parts a model may have besides."""

    def step(self, batch: Batch, rows: Any, ops: Any, labels: Any, weights: Any) -> Any:
        scores = np.zeros(len(rows), dtype=np.float32)
        for k, row in enumerate(rows):
            shown = batch.take([row])
            scores[k] = self.predict(shown)[0]
            if ops[k] & 2:
                self.learn(shown, labels[k : k + 1], weights[k : k + 1])
        return scores

    def published(self) -> Any:
        return self.state_dict()

    def config(self) -> Any:
        return {"schema": self.schema.to_dict()}

    @classmethod
    def from_config(cls, config: Any) -> Any:
        model = cls()
        model.schema = Schema.from_dict(config["schema"])
        return model


class Tabled(Ordered):
    """Saved by changes: rates in an array, which knows what rows have changed since its two marks."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: Any = np.empty(0, dtype=np.int64)
        self.table: Any = np.empty((0, 2))
        self.touched: dict[bool, set[int]] = {False: set(), True: set()}

    def learn(self, batch: Batch, labels: Any, weights: Any = None) -> None:
        super().learn(batch, labels, weights)
        rows = {i: row for row, i in enumerate(self.sums)}  # in the order in which they came
        self.ids = np.array(list(map(int, rows)), dtype=np.int64)
        if len(rows) > len(self.table):
            self.table = np.concatenate([self.table, np.zeros((len(rows) - len(self.table), 2))])
        for i in map(str, batch.ids[batch.entries].tolist()):
            self.table[rows[i]] = self.sums[i]
            for touched in self.touched.values():
                touched.add(rows[i])

    def state_dict(self) -> Any:
        return {"ids": self.ids.copy(), "table": self.table.copy()}

    def live(self, published: bool = False) -> Any:
        return self._leaves()

    def _leaves(self) -> Any:
        return {"ids": self.ids, "table": self.table}

    def mark(self, published: bool = False) -> None:
        self.touched[published].clear()

    def changes(self, published: bool = False) -> Any:
        return self._changes(np.array(sorted(self.touched[published]), dtype=np.int64))

    def _changes(self, rows: Any) -> Any:
        return {name: Changed(rows, leaf[rows], len(leaf)) for name, leaf in self._leaves().items()}

    def load_state_dict(self, state: Any) -> None:
        self.ids, self.table = np.array(state["ids"]), np.array(state["table"])
        self.sums = {str(i): rates for i, rates in zip(self.ids.tolist(), self.table.tolist(), strict=True)}

    def load_changes(self, changes: Any) -> None:
        self.load_state_dict({name: changes[name].applied_to(leaf) for name, leaf in self._leaves().items()})


class WithoutLive(Tabled):
    live = property()  # type: ignore[assignment]


class OneMark(Tabled):
    def mark(self, published: bool = False) -> None:
        super().mark(True)
        super().mark(False)


class ForgetsARow(Tabled):
    def changes(self, published: bool = False) -> Any:
        return self._changes(np.array(sorted(self.touched[published])[1:], dtype=np.int64))


class ChangesThatGoOn(Tabled):
    def changes(self, published: bool = False) -> Any:
        return {name: Changed(np.arange(len(leaf)), leaf, len(leaf)) for name, leaf in self._leaves().items()}


class LoadsHalf(Tabled):
    def load_changes(self, changes: Any) -> None:
        some = {name: Changed(one.rows[:-1], one.values[:-1], one.length) for name, one in changes.items()}
        super().load_changes(some)


class LiveOfAnotherDay(Tabled):
    def live(self, published: bool = False) -> Any:
        return {"ids": self.ids.copy(), "table": np.zeros_like(self.table)}


@pytest.mark.parametrize("model", [Rates, Ordered, Tabled])
def test_models_that_keep_their_promises_pass(model: Any) -> None:
    check_model(model, BATCH, LABELS)


class Nameless(Rates):
    learn = None  # type: ignore[assignment]

    def __getattribute__(self, name: str) -> Any:
        if name == "learn":
            raise AttributeError(name)
        return super().__getattribute__(name)


class Doubles(Rates):
    def predict(self, batch: Batch) -> Any:
        return super().predict(batch).astype(np.float64)


class TooShort(Rates):
    def predict(self, batch: Batch) -> Any:
        return super().predict(batch)[:1]


class Logits(Rates):
    def predict(self, batch: Batch) -> Any:
        return super().predict(batch) * 4 - 1


class Nans(Rates):
    def predict(self, batch: Batch) -> Any:
        return super().predict(batch) * np.float32("nan")


class WritesOnReading(Rates):
    def predict(self, batch: Batch) -> Any:
        for i in batch.ids.tolist():
            self.sums.setdefault(str(i), [0.5, 1.0])
        return super().predict(batch)


class Centred(Rates):
    def predict(self, batch: Batch) -> Any:
        scores = super().predict(batch)
        return np.clip(scores - scores.mean() + 0.3, 0, 1).astype(np.float32) if len(scores) else scores


class Unlucky(Rates):
    made = 0

    def __init__(self) -> None:
        super().__init__()
        Unlucky.made += 1
        self.start = 0.5 + Unlucky.made * 1e-3

    def _known(self, i: int) -> list[float]:
        return self.sums.get(str(i), [self.start, 1.0])


class MeanOfTheBatch(Rates):
    def learn(self, batch: Batch, labels: Any, weights: Any = None) -> None:
        if len(batch):
            super().learn(batch, np.full(len(batch), np.mean(labels)), weights)


class Stubborn(Rates):
    def learn(self, batch: Batch, labels: Any, weights: Any = None) -> None:
        super().learn(batch, 1 - np.asarray(labels), weights)


class EditsTheBatch(Rates):
    def learn(self, batch: Batch, labels: Any, weights: Any = None) -> None:
        super().learn(batch, labels, weights)
        batch.values[:] = 0.5


class EditsTheLabels(Rates):
    def learn(self, batch: Batch, labels: Any, weights: Any = None) -> None:
        super().learn(batch, labels, weights)
        labels[:] = 0.25


class CountsCalls(Rates):
    calls = 0

    def learn(self, batch: Batch, labels: Any, weights: Any = None) -> None:
        super().learn(batch, labels, weights)
        self.calls += 1

    def state_dict(self) -> Any:
        return {**super().state_dict(), "calls": self.calls}


class NoEmptyBatch(Rates):
    def learn(self, batch: Batch, labels: Any, weights: Any = None) -> None:
        super().learn(batch, labels, weights)
        if not len(batch):
            self.sums["empty"] = [0.0, 1.0]


class Pickled(Rates):
    def state_dict(self) -> Any:
        return {**super().state_dict(), "schema": self.schema}


class LiveState(Rates):
    def state_dict(self) -> Any:
        return {"sums": self.sums}

    def load_state_dict(self, state: Any) -> None:
        self.sums = {key: list(pair) for key, pair in state["sums"].items()}


class Adopts(Rates):
    def load_state_dict(self, state: Any) -> None:
        self.sums = state["sums"]


class Forgets(Rates):
    def load_state_dict(self, state: Any) -> None:
        self.sums.update({key: list(pair) for key, pair in state["sums"].items()})


class ScoresAfterwards(Ordered):
    def step(self, batch: Batch, rows: Any, ops: Any, labels: Any, weights: Any) -> Any:
        super().step(batch, rows, ops, labels, weights)
        return self.predict(batch.take(rows))


class ForgetsWeights(Ordered):
    def step(self, batch: Batch, rows: Any, ops: Any, labels: Any, weights: Any) -> Any:
        return super().step(batch, rows, ops, labels, np.ones_like(weights))


class PublishesNothing(Ordered):
    def published(self) -> Any:
        return {"sums": {}}


class BeginsAnew(Ordered):
    """Publishes its rates; where it learns on from those alone, it starts at the beginning."""

    stale = False

    def state_dict(self) -> Any:
        return {**super().state_dict(), "counts": True}

    def published(self) -> Any:
        return super().state_dict()

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.stale = "counts" not in state

    def learn(self, batch: Batch, labels: Any, weights: Any = None) -> None:
        if self.stale:
            self.sums.clear()
        super().learn(batch, labels, weights)


class Amnesiac(Ordered):
    @classmethod
    def from_config(cls, config: Any) -> Any:
        model = super().from_config(config)
        model.schema = Schema(Id("user"))
        return model


class OddConfig(Ordered):
    def config(self) -> Any:
        return {"schema": self.schema}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Nameless, r"Nameless has no \['learn'\]"),
        (Doubles, r"float32 \(24,\), got float64 \(24,\)"),
        (TooShort, r"float32 \(24,\), got float32 \(1,\)"),
        (Logits, "probabilities are from 0 to 1"),
        (Nans, "probabilities are from 0 to 1, got .*nan"),
        (WritesOnReading, "predict changed the state"),
        (Centred, "predicting row by row"),
        (Unlucky, "two new models that learned the same"),
        (MeanOfTheBatch, "learning row by row: the state"),
        (Stubborn, "which is no nearer"),
        (EditsTheBatch, "the values of the batch"),
        (EditsTheLabels, "the labels, which no model may change"),
        (CountsCalls, r"learning row by row: the state: it\['calls'\] is"),
        (NoEmptyBatch, "learning an empty batch: the state"),
        (Pickled, "cannot be stored without pickle"),
        (LiveState, "changed later; copy what is cut"),
        (Adopts, "a model that loaded a state changed it"),
        (Forgets, "a used model that loaded a state"),
        (ScoresAfterwards, "random order, 0: the scores"),
        (ForgetsWeights, "step with operations in random order"),
        (PublishesNothing, "loaded what was published: the probabilities"),
        (BeginsAnew, "go on from the published weights, do not begin anew"),
        (WithoutLive, r"saved by changes needs changes, mark, live, load_changes; this has no \['live'\]"),
        (OneMark, "in a store: the state"),
        (ForgetsARow, "in a store: the state"),
        (ChangesThatGoOn, "changes that were cut changed later; copy what is cut"),
        (LoadsHalf, "loaded in place: the state"),
        (LiveOfAnotherDay, r"over a copy of live\(\) made meanwhile"),
        (Amnesiac, "the config of a model made by from_config"),
        (OddConfig, r"config\['schema'\] is a Schema, which JSON cannot hold"),
    ],
)
def test_broken_models_are_caught(model: Any, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_model(model, BATCH, LABELS)


@pytest.mark.parametrize("labels", [[1.0] * 24, [0, 1], np.zeros((24, 1))])
def test_inputs_that_tell_nothing_are_refused(labels: Any) -> None:
    with pytest.raises(AssertionError, match="give check_model four rows or more"):
        check_model(Rates, BATCH, labels)


def test_all_contracts_are_public() -> None:
    contracts = {check_metric, check_model, check_source, check_stage}
    assert {getattr(streamrec.testing, name) for name in streamrec.testing.__all__} >= contracts
