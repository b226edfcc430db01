from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamrec.batch import Batch


def batch_of(lengths: list[int], texts: bool = False) -> Batch:
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(sum(lengths))
    refs = np.array([[n % 3 - 1, n % 2] for n in range(len(lengths))], dtype=np.int32).reshape(len(lengths), 2)
    return Batch(
        np.arange(total) * 3 - 7,
        np.arange(total, dtype=np.float32) / 2,
        (np.arange(total) % 4).astype(np.int32),
        ends - lengths,
        ends,
        *((("a", "b"), refs) if texts else ()),
        times=np.arange(len(lengths)) / 4,
    )


def read(batch: Batch, row: int) -> tuple[object, ...]:
    at = slice(batch.starts[row], batch.ends[row])
    refs = batch.text_refs[row].tolist() if batch.text_refs.size else []
    words = [batch.texts[ref] if ref >= 0 else None for ref in refs]
    return batch.ids[at].tolist(), batch.values[at].tolist(), batch.fields[at].tolist(), words, batch.times[row]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.booleans(), st.data())
def test_take_and_compact_are_the_rows(lengths: list[int], texts: bool, data: st.DataObject) -> None:
    batch = batch_of(lengths, texts)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=12))
    taken = batch.take(rows)
    assert len(taken) == len(rows) and taken.ids is batch.ids
    compact = taken.compact()
    assert [read(taken, n) for n in range(len(rows))] == [read(batch, row) for row in rows]
    assert [read(compact, n) for n in range(len(rows))] == [read(batch, row) for row in rows]
    assert len(compact.ids) == sum(lengths[row] for row in rows)
    assert compact.starts.tolist() == [0, *compact.ends.tolist()][: len(rows)]
    assert set(compact.texts) == {word for row in rows for word in read(batch, row)[3] if word is not None}  # type: ignore[attr-defined]
    for name in ("ids", "values", "fields", "starts", "ends", "text_refs", "times"):
        assert getattr(compact, name).dtype == getattr(batch, name).dtype
        assert not np.shares_memory(getattr(compact, name), getattr(batch, name))
    assert batch.ids[taken.entries].tolist() == compact.ids.tolist()


def test_slices_are_views() -> None:
    batch = batch_of([1, 2, 0, 3], texts=True)
    part = batch.take(slice(1, 3))
    assert [read(part, n) for n in range(2)] == [read(batch, 1), read(batch, 2)]
    assert np.shares_memory(part.starts, batch.starts)
    assert len(batch.take([])) == 0 and len(batch.take([]).compact().ids) == 0


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch_of([1]).ids = np.zeros(1, dtype=np.int64)  # type: ignore[misc]
