"""What streamrec asks of its parts. Any object with these methods will do; nothing needs to be inherited.

`streamrec.testing` holds a contract test for each: run it on a part of your own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from streamrec.batch import Batch, LabeledRows
from streamrec.errors import ConfigError
from streamrec.events import Event, Impression, Item, Position
from streamrec.schema import Schema

__all__ = [
    "LEARN",
    "SCORE",
    "WEIGH",
    "Changed",
    "Metric",
    "Model",
    "NotedMetric",
    "OrderedModel",
    "RowSource",
    "Source",
    "Stage",
    "State",
    "Stateful",
]

State = Mapping[str, Any]
"""Nested mappings with string keys, and lists; the leaves are numpy arrays, torch tensors, strings, bytes, numbers,
booleans and None. In one that is written as changes of another, some are `Changed`."""


@dataclass(frozen=True, eq=False)
class Changed:
    """A leaf that stands for an array of the state before: the same but for some rows.

    `rows`: int64 `(m,)`, ascending and distinct; `values`: their new values, an array or tensor `(m, ...)`; `length`:
    how many rows there are now. The array before is cut to `length` rows, or grown to them: new rows that are not
    among `rows` are zero. Raises `ConfigError` where the three do not fit together.

    >>> Changed(np.array([1, 3]), np.array([7.0, 9.0]), length=5).applied_to(np.ones(3))
    array([1., 7., 1., 9., 0.])
    """

    rows: NDArray[np.int64]
    values: Any
    length: int

    def __post_init__(self) -> None:
        rows = self.rows
        if not isinstance(rows, np.ndarray) or rows.dtype != np.int64 or rows.ndim != 1:
            raise ConfigError(f"rows must be an int64 array (m,), got {_kind(rows)}")
        if _kind(self.values).endswith("()") or len(self.values) != len(rows):
            raise ConfigError(f"{len(rows)} rows need as many values, got {_kind(self.values)}")
        if len(rows) and not (rows[0] >= 0 and rows[-1] < self.length and bool(np.all(rows[1:] > rows[:-1]))):
            raise ConfigError(
                f"rows must ascend without doubles from 0 to at most {self.length - 1}, got {rows.min()} to "
                f"{rows.max()}; sort them with np.unique"
            )

    def applied_to(self, before: Any) -> Any:
        """The array now, given the one `before`: a new one. Raises `ConfigError` where it is of another kind."""
        room = room_for(before, self.length)
        self.put(room, len(before))
        return room[: self.length]

    def put(self, room: Any, used: int) -> None:
        """As `applied_to`, in place, which takes no longer than the changed rows need.

        `room`: an array or tensor of which the first `used` rows are the array before and the others are zero, at
        least `length` rows of them. Its first `length` rows become the array now, the others stay or become zero.
        """
        in_numpy = isinstance(room, np.ndarray)
        alike = in_numpy == isinstance(self.values, np.ndarray) and room.dtype == self.values.dtype
        if not alike or len(room) < self.length:
            raise ConfigError(f"cannot put {self.length} rows of {_kind(self.values)} into {_kind(room)}")
        if tuple(room.shape[1:]) != tuple(self.values.shape[1:]):
            raise ConfigError(f"the rows of {_kind(self.values)} are not as long as those of {_kind(room)}")
        if in_numpy:
            room[self.length : used] = 0
            room[self.rows] = self.values
        else:
            import torch

            with torch.no_grad():
                room[self.length : used] = 0
                room.index_copy_(0, torch.from_numpy(self.rows), self.values)


def room_for(before: Any, rows: int) -> Any:
    """A copy of an array or tensor with room for `rows` rows at least; those it has not are zero."""
    longest = max(len(before), rows)
    shape = (longest, *before.shape[1:])
    room = np.empty(shape, dtype=before.dtype) if isinstance(before, np.ndarray) else before.new_empty(shape)
    room[: len(before)] = before
    room[len(before) :] = 0
    return room


def _kind(value: Any) -> str:
    if not hasattr(value, "dtype"):
        return type(value).__name__
    return f"{type(value).__name__} of {value.dtype} {tuple(value.shape)}"


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
    """Where events come from, resumable at any event.

    One that waits for events that have not happened yet may also have `wait(seconds) -> bool`: it waits until the next
    `read` returns at once, with events or because there are none left, and is false where that has not come in so many
    seconds. Nothing that a position tells is changed. `OnlineTrainer.run` calls it, so that nothing waits for an event
    that should not: signals, and checkpoints that are due.

    One that keeps events until they are learned may have `release(position) -> None`: nobody will seek to what lies
    before it any more. `OnlineTrainer.run` calls it with the position of the oldest checkpoint that its store keeps.
    """

    def read(self, limit: int) -> list[Item]:
        """The next events, in order, at most `limit`; an empty list where there are none left.

        What cannot be decoded is a `DeadLetter` in its place. A `streamrec.events.Placed` list also says where each
        item stood, for what is refused later.
        """
        ...

    def position(self) -> Position:
        """Where the next unread event stands."""
        ...

    def seek(self, position: Position) -> None:
        """Go to a position: the next `read` gives what it would have given there. Raises `SourceError` if it cannot."""
        ...


@runtime_checkable
class RowSource(Stateful, Protocol):
    """Where labeled rows come from, in order and resumable: what a `BatchTrainer` reads, once an epoch.

    Its state is where it stands; the state it had at first, loaded again, makes it begin again.
    """

    @property
    def schema(self) -> Schema:
        """What its rows are encoded by."""
        ...

    def read(self, limit: int) -> LabeledRows | None:
        """What the next `limit` rows or events bring, which may be no row; None at the end."""
        ...

    def span(self) -> tuple[float, float] | None:
        """The event times of the first and the last of all rows; None where there is none. Changes nothing."""
        ...

    def fraction(self) -> float | None:
        """The share that has been read so far, in [0, 1]; None where nobody knows."""
        ...


@runtime_checkable
class Stage(Stateful, Protocol):
    """A step in front of the model: takes events in order and passes on those that shall go on, in order.

    `push([a, b])` equals `push([a]) + push([b])`. No I/O, no clock.

    One that adds features a service must add as well has three more, and its state is published with the model:
    `describe(impressions)`, which returns them with those features and remembers nothing; `published()`, the part of
    the state that needs; `config()`, with `from_config()`, by which a scorer builds it.
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

    A large model may have four more, so that what is saved every minute is what a minute has changed:

    - `changes(published: bool = False) -> State`: what `state_dict()`, or `published()`, would give now, as changes
      since the last `mark(published)`: large arrays as `Changed` leaves under the same names, the rest whole. Where
      most rows have changed, whole arrays are shorter, and allowed. A copy, as all states are.
    - `mark(published: bool = False) -> None`: from now on `changes` is about what changes after this. The trainer calls
      it when it has cut a state, whole or as changes, or has loaded one. The two marks are apart.
    - `live(published: bool = False) -> State`: as `state_dict()` or `published()`, but its large arrays not copied: a
      thread copies them while the model goes on learning. So all that is learned after `mark` must be in `changes`, and
      arrays that the model leaves for larger ones must stay readable.
    - `load_changes(changes: State) -> None`: in place, a model that holds the state that was marked becomes the one
      from which `changes(published)` was cut.
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
WEIGH = 4
"""With `LEARN`: weigh by the score p before learning, without a gradient through it, a positive by 1 + p and a negative
by (1 - p)(1 + p), so that negatives learned before their positives came leave no bias: the fake-negative weighted loss
(Ktena et al. 2019). A label y between them counts as y of the one and 1 - y of the other."""


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

        All are `(operations,)`. Returns float32 `(operations,)`: the probability before learning. A model that knows
        the bit `WEIGH` has an attribute `weighs` that is true; it is not given to others.
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

    def compute(self) -> Any:
        """Its value now, a float; nan while there is nothing to tell from. A `NotedMetric` may give several, by
        name."""
        ...

    def merge(self, other: Self) -> None:
        """Take in what another of the same settings has seen."""
        ...

    def fresh(self) -> Self:
        """Another of the same settings that has seen nothing."""
        ...


@runtime_checkable
class NotedMetric(Metric, Protocol):
    """A metric that looks at the impression, too: at its user, its request, its slice, at what another model says.

    It takes a note of each impression when that is shown. The note waits with the row, is saved with it, and comes back
    in `update(labels, scores, weights, kind, notes)` when a label is known.
    """

    @property
    def notes(self) -> np.dtype[Any]:
        """The type of a note; of one length, whatever the impression."""
        ...

    def note(self, impressions: Sequence[Impression], batch: Batch) -> NDArray[Any]:
        """`(n,)` of the type `notes`: a note of each of these impressions, which are the rows of `batch`. Changes
        nothing and depends on nothing that labels change, so that how the stream is cut does not show."""
        ...
