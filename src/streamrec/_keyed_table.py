"""Compiled open addressing over records with keys of 128 bits: `Dedup`, `LabelJoin` and `TextCache` find rows by it.

Rows are numpy records with at least `high` and `low`, the key, which is a hash already. The table is int64 `(2^k,)`:
the row in each slot, -1 where it is empty; linear probing, no tombstones. There must always be an empty slot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec._compile import compiled

__all__ = ["EMPTY", "empty_table", "find", "put", "put_all", "take_out"]

EMPTY = -1


def empty_table(rows: int) -> NDArray[np.int64]:
    """A table for so many rows: half full at most, for short probes."""
    return np.full(1 << max(2 * rows - 1, 1).bit_length(), EMPTY, dtype=np.int64)


@compiled()
def find(high: Any, low: Any, table: Any, rows: Any) -> int:
    """The row of a key, or -1."""
    mask = len(table) - 1
    at = np.int64(low) & mask
    while table[at] >= 0:
        row = table[at]
        if rows[row].low == low and rows[row].high == high:
            return int(row)
        at = (at + 1) & mask
    return EMPTY


@compiled()
def put(row: int, table: Any, rows: Any) -> None:
    """Enter a row, whose key must not be in the table."""
    mask = len(table) - 1
    at = np.int64(rows[row].low) & mask
    while table[at] >= 0:
        at = (at + 1) & mask
    table[at] = row


@compiled()
def put_all(chosen: Any, table: Any, rows: Any) -> None:
    """Enter these rows."""
    for n in range(len(chosen)):
        put(chosen[n], table, rows)


@compiled()
def take_out(row: int, table: Any, rows: Any) -> None:
    """Take a row's entry out, and move those behind it up, so that no probe meets a gap (Knuth, 6.4, algorithm R)."""
    mask = len(table) - 1
    at = np.int64(rows[row].low) & mask
    while table[at] != row:
        at = (at + 1) & mask
    gap = at
    while True:
        at = (at + 1) & mask
        if table[at] < 0:
            break
        home = np.int64(rows[table[at]].low) & mask
        if ((at - home) & mask) >= ((at - gap) & mask):  # its home is not behind the gap
            table[gap] = table[at]
            gap = at
    table[gap] = EMPTY
