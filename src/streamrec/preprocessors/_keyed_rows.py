"""Compiled tables over rows with keys of 128 bits: what `Dedup` and `LabelJoin` remember ids by.

A key is two XXH64 of the id's UTF-8 under two seeds, so a table takes two ids for one with a chance of 2^-128 a pair:
a million ids remembered over a billion events, 10^15 pairs, make 3 * 10^-24. Rows are numpy records with at least
`high` and `low`, the key; the table is int64 `(2^k,)`, the row in each slot, -1 where it is empty: open addressing,
linear probing, no tombstones. A heap is int64 `(rows,)`, rows by `time`, then `arrival`; `place` is where each stands.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamrec._compile import compiled
from streamrec._keyed_table import EMPTY, empty_table, find, put, put_all, take_out
from streamrec.hashing import end_of, xxh64

__all__ = [
    "EMPTY",
    "KEY",
    "empty_table",
    "find",
    "key_of",
    "keys_of",
    "pop",
    "put",
    "put_all",
    "push",
    "remove",
    "take_out",
]

KEY = [("high", np.uint64), ("low", np.uint64)]

_HIGH, _LOW = np.uint64(0x6B6579A1), np.uint64(0x6B6579B2)


@compiled()
def key_of(data: Any, start: int, end: int) -> Any:
    """The key of the bytes `start` to `end` (excluded) of `data`."""
    return xxh64(data, start, end, _HIGH), xxh64(data, start, end, _LOW)


@compiled()
def keys_of(data: Any, cuts: Any, count: int) -> Any:
    """uint64 `(count, 2)`: the keys of strings as `hashing.packed` gives them."""
    keys = np.empty((count, 2), dtype=np.uint64)
    begin = 0
    for n in range(count):
        end = end_of(data, begin, cuts, n)
        keys[n, 0], keys[n, 1] = key_of(data, begin, end)
        begin = end + 1
    return keys


@compiled()
def _before(a: int, b: int, rows: Any) -> bool:
    if rows[a].time != rows[b].time:
        return bool(rows[a].time < rows[b].time)
    return bool(rows[a].arrival < rows[b].arrival)


@compiled()
def _rise(row: int, at: int, heap: Any, rows: Any) -> None:
    while at > 0:
        above = (at - 1) >> 1
        if not _before(row, heap[above], rows):
            break
        heap[at] = heap[above]
        rows[heap[at]].place = at
        at = above
    heap[at] = row
    rows[row].place = at


@compiled()
def _sink(row: int, at: int, heap: Any, size: int, rows: Any) -> None:
    while 2 * at + 1 < size:
        below = 2 * at + 1
        if below + 1 < size and _before(heap[below + 1], heap[below], rows):
            below += 1
        if not _before(heap[below], row, rows):
            break
        heap[at] = heap[below]
        rows[heap[at]].place = at
        at = below
    heap[at] = row
    rows[row].place = at


@compiled()
def push(row: int, heap: Any, size: int, rows: Any) -> None:
    """Add a row to a heap of `size` rows."""
    _rise(row, size, heap, rows)


@compiled()
def pop(heap: Any, size: int, rows: Any) -> int:
    """Take the first row off a heap of `size` rows, at least 1."""
    first = heap[0]
    if size > 1:
        _sink(heap[size - 1], 0, heap, size - 1, rows)
    return int(first)


@compiled()
def remove(row: int, heap: Any, size: int, rows: Any) -> None:
    """Take any row out of a heap of `size` rows."""
    at = rows[row].place
    last = heap[size - 1]
    if last != row:
        if _before(last, row, rows):
            _rise(last, at, heap, rows)
        else:
            _sink(last, at, heap, size - 1, rows)
