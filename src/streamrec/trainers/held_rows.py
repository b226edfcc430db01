"""HeldRows: encoded impressions that wait for their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec._compile import compiled
from streamrec.batch import Batch
from streamrec.errors import ConfigError
from streamrec.protocols import State

__all__ = ["HeldRows"]


class HeldRows:
    """Rows of batches in common columns, each under a slot number until it is freed, with the score it was served.

    So that a row is encoded once, when its impression comes, and learned as it was then. Memory follows what is held:
    freed space is used again. `notes`: the types of what else is kept of each row. `drawn`: whether ids draw numbers.
    """

    def __init__(self, text_fields: int = 0, notes: Sequence[np.dtype[Any]] = (), *, drawn: bool = True) -> None:
        self._drawn = drawn
        self._text_fields = text_fields
        self._note_types = tuple(notes)
        self._clear()

    def _clear(self) -> None:
        self._ids: NDArray[np.int64] = np.empty(4096, dtype=np.int64)
        self._values: NDArray[np.float32] = np.empty(4096, dtype=np.float32)
        self._fields: NDArray[np.int32] = np.empty(4096, dtype=np.int32)
        self._end = 0  # entries in use, those of freed rows among them
        self._starts: NDArray[np.int64] = np.zeros(512, dtype=np.int64)
        self._ends: NDArray[np.int64] = np.zeros(512, dtype=np.int64)
        self._refs: NDArray[np.int32] = np.full((512, self._text_fields), -1, dtype=np.int32)
        self.served: NDArray[np.float32] = np.zeros(512, dtype=np.float32)
        """float32 `(slots,)`: the score each held row was served with."""
        self.times: NDArray[np.float64] = np.zeros(512, dtype=np.float64)
        """float64 `(slots,)`: the time of the impression of each."""
        self.draws: NDArray[np.float64] = np.zeros(512 if self._drawn else 0, dtype=np.float64)
        """float64 `(slots,)`: a number in [0, 1) that its id drew, where non-clicks are sampled; else empty."""
        self.notes: list[NDArray[Any]] = [np.zeros(512, dtype=kind) for kind in self._note_types]
        """`(slots,)` each: what metrics have noted of each impression."""
        self._free: NDArray[np.int32] = np.arange(511, -1, -1, dtype=np.int32)  # a stack of slots
        self._free_count = 512
        self._texts: dict[str, int] = {}
        self._in_order: list[str] = []  # the same, by number

    def __len__(self) -> int:
        """How many rows are held."""
        return len(self._starts) - self._free_count

    @property
    def batch(self) -> Batch:
        """All slots as a batch: row r is slot r. A view, good until the next `add`."""
        columns = (self._ids, self._values, self._fields, self._starts, self._ends)
        return Batch(*columns, self._in_order, self._refs, self.times)

    def add(self, batch: Batch, times: Sequence[float] | NDArray[np.float64]) -> NDArray[np.int64]:
        """Hold these rows, which must be a compact batch, of impressions at `times`; return their slots, in order."""
        rows, entries = len(batch), len(batch.ids)
        # texts that nobody refers to any more: as many as could be held, then they go
        if self._end + entries > len(self._ids) or len(self._texts) > 2 * self._refs.size:
            self._make_room(entries)
        if self._free_count < rows:
            self._more_slots(rows)
        self._free_count -= rows
        slots = self._free[self._free_count : self._free_count + rows][::-1].astype(np.int64)
        columns = batch.ids, batch.values, batch.fields, batch.starts, batch.ends, np.asarray(times, dtype=np.float64)
        held = self._ids, self._values, self._fields, self._starts, self._ends, self.times
        _hold(*columns, slots, self._end, *held)
        self._end += entries
        if self._text_fields:
            for text in batch.texts:
                if text not in self._texts:
                    self._texts[text] = len(self._in_order)
                    self._in_order.append(text)
            known = np.array([*map(self._texts.__getitem__, batch.texts), -1], dtype=np.int32)
            self._refs[slots] = known[batch.text_refs]  # a reference of -1 reads the last, which is -1
        return slots

    def of(self, field: int, id: int) -> NDArray[np.int64]:
        """int64: the slots of the rows that hold this id in the field of this number."""
        held = self._held()
        batch = self.batch.take(held)
        places = batch.entries
        mine = (batch.ids[places] == id) & (batch.fields[places] == field)
        row_of = np.repeat(np.arange(len(held)), batch.ends - batch.starts)
        slots: NDArray[np.int64] = held[np.unique(row_of[mine])]
        return slots

    def free(self, slots: Sequence[int] | NDArray[np.int64]) -> None:
        """Let these rows go."""
        count = self._free_count + len(slots)
        self._free[self._free_count : count] = slots
        self._free_count = count

    def _held(self) -> NDArray[np.int64]:
        held = np.ones(len(self._starts), dtype=np.bool_)
        held[self._free[: self._free_count]] = False
        return np.flatnonzero(held)

    def _make_room(self, entries: int) -> None:
        """Move what is held to the front of the columns, make them longer if `entries` more would fill over half of
        them, and drop texts nobody refers to. In place, column by column: no more than one column is there twice."""
        held = self._held()
        order = held[np.argsort(self._starts[held], kind="stable")]
        columns = self._ids, self._values, self._fields
        self._end = _to_the_front(order, self._starts, self._ends, *columns)
        size = len(self._ids)
        while size < 2 * (self._end + entries):  # at most half full, so that the next move is far off
            size *= 2
        if size > len(self._ids):
            del columns
            for name in ("_ids", "_values", "_fields"):
                column = getattr(self, name)
                larger = np.empty(size, dtype=column.dtype)
                larger[: self._end] = column[: self._end]
                setattr(self, name, larger)
                del column
        if self._text_fields:
            used, refs = np.unique(self._refs[held], return_inverse=True)
            known = int(used.size and used[0] < 0)  # -1: no text
            self._refs[held] = refs.reshape(len(held), self._text_fields) - known
            self._in_order = [self._in_order[ref] for ref in used[known:].tolist()]
            self._texts = {text: ref for ref, text in enumerate(self._in_order)}

    def _more_slots(self, rows: int) -> None:
        before = len(self._starts)
        after = before
        while after - before + self._free_count < rows:
            after *= 2
        for name in ("_starts", "_ends", "_refs", "served", "times", *(["draws"] if self._drawn else [])):
            column = getattr(self, name)
            larger = np.full((after, *column.shape[1:]), -1, dtype=column.dtype)
            larger[:before] = column
            setattr(self, name, larger)
        self._starts[before:] = self._ends[before:] = 0
        self.notes = [np.append(column, np.zeros(after - before, dtype=column.dtype)) for column in self.notes]
        free = np.empty(after, dtype=np.int32)
        new = after - before
        free[:new] = np.arange(after - 1, before - 1, -1)
        free[new : new + self._free_count] = self._free[: self._free_count]
        self._free, self._free_count = free, new + self._free_count

    def state_dict(self) -> State:
        """The rows held, their slots, served scores and notes, of each note its bytes."""
        held = self._held()
        kept = self.batch.take(held).compact()
        return {
            "slots": held,
            "served": self.served[held],
            "times": self.times[held],
            "draws": self.draws[held] if self._drawn else self.draws,
            "notes": [column[held].view(np.uint8).reshape(len(held), column.dtype.itemsize) for column in self.notes],
            "ids": kept.ids,
            "values": kept.values,
            "fields": kept.fields,
            "lengths": kept.ends - kept.starts,
            "texts": list(kept.texts),
            "text_refs": kept.text_refs.reshape(len(held), self._text_fields),
        }

    def load_state_dict(self, state: State) -> None:
        """Hold what was held, under the same slots. Raises `ConfigError` where other notes were taken."""
        lengths = [np.asarray(notes).shape[1:] for notes in state["notes"]]
        if lengths != [(kind.itemsize,) for kind in self._note_types]:
            raise ConfigError("the saved rows have notes for other metrics: give the metrics they were saved with")
        self._clear()
        held: Any = np.asarray(state["slots"])
        ends = np.cumsum(state["lengths"])
        starts = ends - state["lengths"]
        batch = Batch(state["ids"], state["values"], state["fields"], starts, ends, state["texts"], state["text_refs"])
        if len(held):
            self._more_slots(int(held[-1]) + 1)
        free = self._free[: self._free_count]
        others = free[~np.isin(free, held)]
        self._free[: self._free_count] = np.append(others, held[::-1])  # so that `add` gives the rows their slots again
        self.add(batch, state["times"])
        self.served[held] = state["served"]
        if self._drawn:  # a row that was held when none drew is learned, whatever it is
            self.draws[held] = state["draws"] if len(state["draws"]) else 0.0
        for column, notes in zip(self.notes, state["notes"], strict=True):
            column[held] = np.ascontiguousarray(notes).view(column.dtype)[:, 0]


@compiled()
def _hold(
    ids: Any,
    values: Any,
    fields: Any,
    starts: Any,
    ends: Any,
    times: Any,
    slots: Any,
    begin: int,
    all_ids: Any,
    all_values: Any,
    all_fields: Any,
    all_starts: Any,
    all_ends: Any,
    all_times: Any,
) -> None:
    """Copy a batch behind what is held. One call: as many of numpy take ten times as long for a single row."""
    for entry in range(len(ids)):
        all_ids[begin + entry] = ids[entry]
        all_values[begin + entry] = values[entry]
        all_fields[begin + entry] = fields[entry]
    for n in range(len(slots)):
        all_starts[slots[n]] = begin + starts[n]
        all_ends[slots[n]] = begin + ends[n]
        all_times[slots[n]] = times[n]


@compiled()
def _to_the_front(order: Any, starts: Any, ends: Any, ids: Any, values: Any, fields: Any) -> int:
    """Close the gaps between these rows, which ascend; return where the last one ends."""
    end = 0
    for n in range(len(order)):
        row = order[n]
        begin = starts[row]
        count = ends[row] - begin
        if begin != end:
            for k in range(count):
                ids[end + k], values[end + k], fields[end + k] = ids[begin + k], values[begin + k], fields[begin + k]
        starts[row], ends[row] = end, end + count
        end += count
    return end
