"""Compiled open addressing: 64-bit id to row, exact. The memory belongs to `IdTable`; the FM's loop uses it too.

`slots`: int64 `(2^k,)`, the ids; `slot_rows`: int32, their rows, -1 where the slot is empty.
Ids are hashes already, so their low bits choose the slot; the next free one is taken where that is not empty.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamrec._compile import compiled

__all__ = ["find_all", "insert", "insert_all", "lookup", "place_all"]


@compiled(inline=True)
def lookup(key: Any, slots: Any, slot_rows: Any) -> Any:
    """The row of an id, or -1."""
    mask = len(slots) - 1
    at = key & mask
    while slots[at] != key and slot_rows[at] >= 0:
        at = (at + 1) & mask
    return np.int64(slot_rows[at])


@compiled(inline=True)
def insert(key: Any, slots: Any, slot_rows: Any, row_ids: Any, used: Any) -> Any:
    """The row of an id, a new one where it has none. There must be room."""
    mask = len(slots) - 1
    at = key & mask
    while slot_rows[at] >= 0:
        if slots[at] == key:
            return np.int64(slot_rows[at])
        at = (at + 1) & mask
    row = used[0]
    slots[at] = key
    slot_rows[at] = row
    row_ids[row] = key
    used[0] = row + 1
    return np.int64(row)


@compiled()
def find_all(ids: Any, slots: Any, slot_rows: Any) -> Any:
    """int64 `(n,)`: the rows of these ids, -1 where they have none."""
    rows = np.empty(len(ids), dtype=np.int64)
    for i in range(len(ids)):
        rows[i] = lookup(ids[i], slots, slot_rows)
    return rows


@compiled()
def insert_all(ids: Any, slots: Any, slot_rows: Any, row_ids: Any, used: Any) -> Any:
    """int64 `(n,)`: the rows of these ids, new ones where they have none."""
    rows = np.empty(len(ids), dtype=np.int64)
    for i in range(len(ids)):
        rows[i] = insert(ids[i], slots, slot_rows, row_ids, used)
    return rows


@compiled()
def place_all(row_ids: Any, count: int, slots: Any, slot_rows: Any) -> None:
    """Put the ids of rows 0 to `count`, no two the same, into empty slots."""
    mask = len(slots) - 1
    for row in range(count):
        at = row_ids[row] & mask
        while slot_rows[at] >= 0:
            at = (at + 1) & mask
        slots[at] = row_ids[row]
        slot_rows[at] = row
