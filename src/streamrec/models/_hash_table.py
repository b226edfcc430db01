"""Compiled open addressing: 64-bit id to row, exact. The memory belongs to `IdTable`; the FM's loop uses it too.

`slots`: int64 `(2^k, 2)`, an id and its row plus 1 side by side, so that a look-up touches one line of the cache; 0
where the slot is empty. Ids are hashes already: their low bits choose the slot, and the next free one is taken where
that is not empty. `old`: the slots before the table last grew, while they are being moved: nothing is added to it, and
an id that is removed leaves -1 for its row. It is empty at other times.

`owners`: int64 `(capacity,)`, the id of each row; of a free row, the next free one, or -1. `header`: int64, the numbers
named below.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamrec._compile import compiled
from streamrec._pointers import touch

__all__ = [
    "FREE",
    "FREED",
    "HAND",
    "HEADER",
    "MOVED",
    "SIGHTED",
    "USED",
    "chain",
    "find_all",
    "free_rows",
    "give",
    "insert",
    "insert_all",
    "lookup",
    "move",
    "release",
    "release_all",
    "room",
]

USED, FREE, FREED, MOVED, HAND, SIGHTED, HEADER = range(7)
"""Rows ever used; the first free one of them, or -1; how many are free; how many slots of `old` were looked at. Then of
the FM: the next row to look at for expiry; sightings since its sketch was last halved. Last, how many numbers."""

AHEAD = 16  # of a loop over ids: slots are on their way to the cache while the ids before them are looked up


@compiled(inline=True)
def _place(key: Any, slots: Any) -> Any:
    """Where an id stands, or else the empty slot where it would."""
    mask = len(slots) - 1
    at = key & mask
    while slots[at, 1] != 0 and slots[at, 0] != key:
        at = (at + 1) & mask
    return at


@compiled(inline=True)
def lookup(key: Any, slots: Any, old: Any) -> Any:
    """The row of an id, or a negative number."""
    row = slots[_place(key, slots), 1] - 1
    if row < 0 and len(old) > 0:
        row = old[_place(key, old), 1] - 1
    return row


@compiled(inline=True)
def room(slots: Any, owners: Any, header: Any) -> Any:
    """How many new ids there is room for."""
    live = header[USED] - header[FREED]
    return min(len(owners) - live, len(slots) * 13 // 16 - live)


@compiled(inline=True)
def insert(key: Any, slots: Any, old: Any, owners: Any, header: Any) -> Any:
    """The row of an id, a new one where it has none. There must be room."""
    at = _place(key, slots)
    row = slots[at, 1] - 1
    if row < 0:
        if len(old) > 0:
            row = old[_place(key, old), 1] - 1
        if row < 0:
            row = header[FREE]
            if row >= 0:
                header[FREE] = owners[row]
                header[FREED] -= 1
            else:
                row = header[USED]
                header[USED] = row + 1
            owners[row] = key
        slots[at, 0] = key
        slots[at, 1] = row + 1
    return row


@compiled(inline=True)
def release(row: int, slots: Any, old: Any, owners: Any, header: Any) -> None:
    """Take a row from its id; the next new id gets it."""
    key = owners[row]
    mask = len(slots) - 1
    gap = _place(key, slots)
    if slots[gap, 1] != 0:
        at = gap
        while True:  # what stands behind moves up, so that no search ends at the gap too early (Knuth 6.4, algorithm R)
            at = (at + 1) & mask
            if slots[at, 1] == 0:
                break
            if ((at - slots[at, 0]) & mask) >= ((at - gap) & mask):
                slots[gap, 0] = slots[at, 0]
                slots[gap, 1] = slots[at, 1]
                gap = at
        slots[gap, 1] = 0
    if len(old) > 0:
        there = _place(key, old)
        if old[there, 1] != 0:
            old[there, 1] = -1
    owners[row] = header[FREE]
    header[FREE] = row
    header[FREED] += 1


@compiled()
def find_all(ids: Any, slots: Any, old: Any) -> Any:
    """int64 `(n,)`: the rows of these ids, -1 where they have none."""
    rows = np.empty(len(ids), dtype=np.int64)
    mask = len(slots) - 1
    for i in range(len(ids)):
        if i + AHEAD < len(ids):
            touch(slots, ids[i + AHEAD] & mask, 0)
        rows[i] = max(lookup(ids[i], slots, old), -1)
    return rows


@compiled()
def insert_all(ids: Any, slots: Any, old: Any, owners: Any, header: Any) -> Any:
    """int64 `(n,)`: the rows of these ids, new ones where they have none."""
    rows = np.empty(len(ids), dtype=np.int64)
    mask, old_mask = len(slots) - 1, len(old) - 1
    for i in range(len(ids)):
        if i + AHEAD < len(ids):
            touch(slots, ids[i + AHEAD] & mask, 0)
            if old_mask > 0:
                touch(old, ids[i + AHEAD] & old_mask, 0)
        rows[i] = insert(ids[i], slots, old, owners, header)
    return rows


@compiled()
def release_all(rows: Any, slots: Any, old: Any, owners: Any, header: Any) -> None:
    """Take these rows from their ids, in this order."""
    for i in range(len(rows)):
        release(rows[i], slots, old, owners, header)


@compiled()
def give(rows: Any, ids: Any, slots: Any, owners: Any) -> Any:
    """Give these rows, which have no id, to these ids. False where an id has a row already."""
    for i in range(len(rows)):
        at = _place(ids[i], slots)
        if slots[at, 1] != 0:
            return False
        slots[at, 0] = ids[i]
        slots[at, 1] = rows[i] + 1
        owners[rows[i]] = ids[i]
    return True


@compiled()
def chain(free: Any, owners: Any, header: Any) -> None:
    """Make these the free rows, the last one the next to be given away."""
    header[FREE] = -1
    for i in range(len(free)):
        owners[free[i]] = header[FREE]
        header[FREE] = free[i]
    header[FREED] = len(free)


@compiled()
def free_rows(owners: Any, header: Any) -> Any:
    """int64 `(free,)`: the free rows, in the order in which they became so."""
    rows = np.empty(header[FREED], dtype=np.int64)
    row = header[FREE]
    for i in range(len(rows)):
        rows[len(rows) - 1 - i] = row
        row = owners[row]
    return rows


@compiled()
def move(count: int, slots: Any, old: Any, header: Any) -> None:
    """Take over so many more of the old slots."""
    mask = len(slots) - 1
    end = min(header[MOVED] + count, len(old))
    for place in range(header[MOVED], end):
        if place + AHEAD < end:
            touch(slots, old[place + AHEAD, 0] & mask, 0)
        if old[place, 1] > 0:
            at = _place(old[place, 0], slots)
            slots[at, 0] = old[place, 0]
            slots[at, 1] = old[place, 1]
    header[MOVED] = end
