"""Compiled open addressing: 64-bit id to row, exact. The memory belongs to `IdTable`; the FM's loop uses it too.

`slots`: int64 `(2^k, 2)`, an id and its row side by side, so that a look-up touches one line of the cache; the row is
-1 where the slot is empty. Ids are hashes already: their low bits choose the slot, and the next free one is taken where
that is not empty. `owners`: int64 `(capacity + 1,)`, the id of each row, and last, how many rows have one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamrec._compile import compiled

__all__ = ["find_all", "insert", "insert_all", "lookup", "place_all"]


@compiled(inline=True)
def lookup(key: Any, slots: Any) -> Any:
    """The row of an id, or -1."""
    mask = len(slots) - 1
    at = key & mask
    while slots[at, 0] != key and slots[at, 1] >= 0:
        at = (at + 1) & mask
    return slots[at, 1]


@compiled(inline=True)
def insert(key: Any, slots: Any, owners: Any) -> Any:
    """The row of an id, a new one where it has none. There must be room."""
    mask = len(slots) - 1
    at = key & mask
    while slots[at, 1] >= 0:
        if slots[at, 0] == key:
            return slots[at, 1]
        at = (at + 1) & mask
    row = owners[-1]
    slots[at, 0] = key
    slots[at, 1] = row
    owners[row] = key
    owners[-1] = row + 1
    return row


@compiled()
def find_all(ids: Any, slots: Any) -> Any:
    """int64 `(n,)`: the rows of these ids, -1 where they have none."""
    rows = np.empty(len(ids), dtype=np.int64)
    for i in range(len(ids)):
        rows[i] = lookup(ids[i], slots)
    return rows


@compiled()
def insert_all(ids: Any, slots: Any, owners: Any) -> Any:
    """int64 `(n,)`: the rows of these ids, new ones where they have none."""
    rows = np.empty(len(ids), dtype=np.int64)
    for i in range(len(ids)):
        rows[i] = insert(ids[i], slots, owners)
    return rows


@compiled()
def place_all(owners: Any, slots: Any) -> None:
    """Put the ids of all rows, no two the same, into empty slots."""
    mask = len(slots) - 1
    for row in range(owners[-1]):
        at = owners[row] & mask
        while slots[at, 1] >= 0:
            at = (at + 1) & mask
        slots[at, 0] = owners[row]
        slots[at, 1] = row
