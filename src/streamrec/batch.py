"""Batch: encoded impressions, columnar; and with their labels, what a model learns from an archive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamrec.errors import ConfigError

__all__ = ["Batch", "LabeledRows"]

_SAVED = ("ids", "values", "fields", "text_refs", "times")
_T = TypeVar("_T", bound=np.generic)


def _no_text() -> NDArray[np.int32]:
    return np.zeros((0, 0), dtype=np.int32)


def _no_times() -> NDArray[np.float64]:
    return np.zeros(0, dtype=np.float64)


@dataclass(frozen=True, eq=False)  # arrays have no one truth value
class Batch:
    """Encoded impressions. Row r holds the entries `starts[r]` to `ends[r]` (excluded) of the three columns.

    `ids`: int64 `(entries,)`, hashes; `values`: float32 `(entries,)`, what each id is multiplied by;
    `fields`: int32 `(entries,)`, the index of each entry's field in the schema, plus the number of fields where the
    entry stands for an unknown number (so that no model takes its value, 1, for a number); `starts`, `ends`: int64
    `(rows,)`.
    Within a row no id stands twice. Several batches may be views of the same columns, so that `take` copies none.

    `text_refs`: int32 `(rows, text fields)`, references into `texts`, the distinct texts; -1 where there is none.

    `times`: float64 `(rows,)`, the event time of each impression in POSIX seconds; empty where no times are known.
    """

    ids: NDArray[np.int64]
    values: NDArray[np.float32]
    fields: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    texts: Sequence[str] = ()
    text_refs: NDArray[np.int32] = field(default_factory=_no_text)
    times: NDArray[np.float64] = field(default_factory=_no_times)

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, rows: Sequence[int] | NDArray[np.int64] | slice) -> Batch:
        """These rows, in this order, over the same columns."""
        chosen = rows if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
        refs = self.text_refs[chosen] if self.text_refs.size else self.text_refs
        times = self.times[chosen] if self.times.size else self.times
        columns = (self.ids, self.values, self.fields)
        return Batch(*columns, self.starts[chosen], self.ends[chosen], self.texts, refs, times)

    @cached_property
    def entries(self) -> NDArray[np.int64]:
        """int64: where the rows' entries stand in the columns, row after row."""
        lengths = self.ends - self.starts
        firsts = np.repeat(self.starts - (np.cumsum(lengths) - lengths), lengths)
        return firsts + np.arange(int(lengths.sum()), dtype=np.int64)

    def _columns(self) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int32]]:
        """The three columns with nothing but these rows, row after row; views where they stand like that already, as in
        what is cut from an archive."""
        if len(self) and np.array_equal(self.starts[1:], self.ends[:-1]):
            cut = slice(int(self.starts[0]), int(self.ends[-1]))
            return self.ids[cut], self.values[cut], self.fields[cut]
        where = self.entries
        return self.ids[where], self.values[where], self.fields[where]

    def _used_texts(self) -> tuple[Sequence[str], NDArray[np.int32]]:
        """The texts of these rows alone, as they come, and the references into them."""
        used, first, refs = np.unique(self.text_refs, return_index=True, return_inverse=True)
        none = 1 if used.size and used[0] < 0 else 0
        order = np.argsort(first[none:])
        places = np.full(len(used), -1, dtype=np.int32)
        places[none + order] = np.arange(len(order), dtype=np.int32)
        return [self.texts[ref] for ref in used[none:][order]], places[refs.reshape(self.text_refs.shape)]

    def compact(self) -> Batch:
        """The same rows over columns of their own that hold nothing else, row after row."""
        ids, values, fields = self._columns()
        texts, refs = self._used_texts()
        lengths = self.ends - self.starts
        ends = np.cumsum(lengths)
        columns = _own(ids), _own(values), _own(fields)
        return Batch(*columns, ends - lengths, ends, texts, refs, self.times.copy())

    def to_dict(self) -> dict[str, Any]:
        """These rows as a state holds them, arrays of their own; `from_dict` reads them back."""
        rows = self.compact()
        columns = {name: getattr(rows, name) for name in _SAVED}
        return {**columns, "lengths": rows.ends - rows.starts, "texts": list(rows.texts)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Batch:
        """The rows that `to_dict` gave."""
        columns = {name: np.array(saved[name]) for name in _SAVED}
        ends = np.cumsum(saved["lengths"], dtype=np.int64)
        return cls(starts=ends - saved["lengths"], ends=ends, texts=list(saved["texts"]), **columns)

    @staticmethod
    def concatenated(batches: Sequence[Batch]) -> Batch:
        """The rows of these batches, one after the other, over columns of their own. There must be one at least."""
        if len(batches) == 1:
            return batches[0]
        ids, values, fields = map(np.concatenate, zip(*(batch._columns() for batch in batches), strict=True))
        lengths = np.concatenate([batch.ends - batch.starts for batch in batches])
        ends = np.cumsum(lengths, dtype=np.int64)
        places: dict[str, int] = {}
        refs = []
        for texts, own in (batch._used_texts() for batch in batches):
            known = np.array([*(places.setdefault(text, len(places)) for text in texts), -1], dtype=np.int32)
            refs.append(known[own])  # a reference of -1 reads the last, which is -1
        times = np.concatenate([batch.times for batch in batches])
        return Batch(ids, values, fields, ends - lengths, ends, [*places], np.concatenate(refs), times)


def _own(column: NDArray[_T]) -> NDArray[_T]:
    return column if column.base is None else column.copy()


class LabeledRows(NamedTuple):
    """Encoded impressions whose labels are known, in the order in which they are to be learned.

    `labels`, `weights`: float32 `(rows,)`.
    """

    batch: Batch
    labels: NDArray[np.float32]
    weights: NDArray[np.float32]

    @staticmethod
    def of(batch: Batch, labels: NDArray[Any], weights: NDArray[Any] | None = None) -> LabeledRows:
        """As `Model.learn` takes them; `weights`: None: 1 each. Raises `ConfigError` where their numbers differ."""
        labels = np.ascontiguousarray(labels, dtype=np.float32)
        weights = np.ascontiguousarray(np.ones(len(batch)) if weights is None else weights, dtype=np.float32)
        if not len(labels) == len(weights) == len(batch):
            raise ConfigError(
                f"{len(batch)} rows need as many labels and weights, got {len(labels)} and {len(weights)}"
            )
        return LabeledRows(batch, labels, weights)

    def take(self, rows: NDArray[np.int64] | slice) -> LabeledRows:
        """These rows, in this order, over the same columns."""
        return LabeledRows(self.batch.take(rows), self.labels[rows], self.weights[rows])

    def compact(self) -> LabeledRows:
        """The same rows over columns of their own that hold nothing else."""
        return LabeledRows(self.batch.compact(), self.labels.copy(), self.weights.copy())

    @staticmethod
    def concatenated(parts: Sequence[LabeledRows]) -> LabeledRows:
        """One after the other. There must be one at least."""
        if len(parts) == 1:
            return parts[0]
        batch = Batch.concatenated([part.batch for part in parts])
        return LabeledRows(
            batch, np.concatenate([part.labels for part in parts]), np.concatenate([part.weights for part in parts])
        )
