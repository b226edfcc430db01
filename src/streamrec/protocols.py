"""What streamrec asks of its parts. Any object with these methods will do; nothing needs to be inherited.

`streamrec.testing` holds a contract test for each: run it on a part of your own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from streamrec.batch import Batch
from streamrec.events import Event, Item, Position
from streamrec.schema import Schema

__all__ = ["LEARN", "SCORE", "Metric", "Model", "OrderedModel", "Source", "Stage", "State", "Stateful"]

State = Mapping[str, Any]
"""Nested mappings with string keys, and lists; the leaves are numpy arrays, torch tensors, strings, bytes, numbers,
booleans and None."""


@runtime_checkable
class Stateful(Protocol):
    """Something that remembers: `load_state_dict(state_dict())` on a twin makes it go on as if it were the first."""

    def state_dict(self) -> State:
        """All that is remembered, cut now: later changes of the object do not change it."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Become what `state` was cut from."""
        ...


@runtime_checkable
class Source(Protocol):
    """Where events come from, resumable at any event."""

    def read(self, limit: int) -> list[Item]:
        """The next events, in order, at most `limit`; an empty list where there are none left.

        What cannot be decoded is a `DeadLetter` in its place.
        """
        ...

    def position(self) -> Position:
        """Where the next unread event stands."""
        ...

    def seek(self, position: Position) -> None:
        """Go to a position: the next `read` gives what it would have given there. Raises `SourceError` if it cannot."""
        ...


@runtime_checkable
class Stage(Stateful, Protocol):
    """A step in front of the model: takes events in order and passes on those that shall go on, in order.

    `push([a, b])` equals `push([a]) + push([b])`. No I/O, no clock.
    """

    @property
    def counts(self) -> Mapping[str, int]:
        """How many events were dropped, by reason."""
        ...

    def push(self, events: Sequence[Event]) -> list[Any]:
        """Take these events; return what goes on."""
        ...


@runtime_checkable
class Model(Stateful, Protocol):
    """Click probabilities that learn.

    A model may also have `published()`, the part of its state that a scorer needs, and `config()` with `from_config()`,
    by which a scorer builds it; without them the whole state is published, and a scorer is given a model to fill.
    """

    @property
    def schema(self) -> Schema:
        """What its batches are encoded by."""
        ...

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        """float32 `(rows,)`: each row's click probability. Changes nothing."""
        ...

    def learn(self, batch: Batch, labels: NDArray[np.float32], weights: NDArray[np.float32] | None = None) -> None:
        """Learn these rows one after the other. `labels`, `weights`: float32 `(rows,)`; no weights: all 1."""
        ...


SCORE, LEARN = 1, 2
"""What `OrderedModel.step` does with a row: bits of its `ops`; 3 is score, then learn."""


@runtime_checkable
class OrderedModel(Model, Protocol):
    """A model that runs an ordered list of operations in one call. The trainer uses it where a model has it."""

    def step(
        self,
        batch: Batch,
        rows: NDArray[np.int64],
        ops: NDArray[np.int8],
        labels: NDArray[np.float32],
        weights: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Carry out `ops[k]` (`SCORE`, `LEARN`, or both) on row `rows[k]`, for k in order.

        All are `(operations,)`. Returns float32 `(operations,)`: the probability before learning.
        Equals one call of `predict` or `learn` per operation, bit for bit.
        """
        ...


@runtime_checkable
class Metric(Stateful, Protocol):
    """A running measure of scores against labels, in O(1) memory. Parts merge into the whole."""

    @property
    def kinds(self) -> Sequence[str]:
        """The kinds of feedback whose labels it wants, such as `("click",)`."""
        ...

    @property
    def name(self) -> str:
        """Its key in a report: the class name, with the kind where that is not "click"."""
        ...

    def update(
        self,
        labels: NDArray[np.float32],
        scores: NDArray[np.float32],
        weights: NDArray[np.float32] | None = None,
        kind: str = "click",
    ) -> None:
        """Judge served `scores` by `labels` of one kind, all `(n,)`. Cutting a call in two changes no bit."""
        ...

    def compute(self) -> float:
        """Its value now; nan while there is nothing to tell from."""
        ...

    def merge(self, other: Self) -> None:
        """Take in what another of the same settings has seen."""
        ...

    def fresh(self) -> Self:
        """Another of the same settings that has seen nothing."""
        ...
