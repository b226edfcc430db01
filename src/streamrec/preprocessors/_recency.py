"""Keyed rows in the order in which they were last renewed: a table over a chain, compiled, so that the first to go is
at hand.

`ends`, int64: the row renewed longest ago, the one renewed last, the first free one, how many are live.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from streamrec._compile import compiled
from streamrec.preprocessors._keyed_rows import EMPTY, KEY, empty_table, find, put, put_all, take_out
from streamrec.protocols import State

__all__ = ["LIVE", "OLDEST", "Recent", "enter", "find", "leave", "renew"]

_ROW = np.dtype(
    [
        *KEY,
        ("time", np.float64),
        ("owner", np.uint64),  # whose it is: 0 is nobody's
        ("marks", np.int64),
        ("older", np.int64),
        ("newer", np.int64),
    ]
)
OLDEST, NEWEST, FREE, LIVE = range(4)
_SMALLEST = 1024


class Recent:
    """The memory of the loops: at most `capacity` rows, each with `width` numbers of `dtype`; see `parts`."""

    def __init__(self, width: int, capacity: int, dtype: DTypeLike = np.float64) -> None:
        self.width = width
        self.capacity = capacity
        self._dtype = dtype
        self._clear(min(_SMALLEST, capacity))

    def _clear(self, size: int) -> None:
        self.rows: NDArray[Any] = np.zeros(size, dtype=_ROW)
        self.values: NDArray[Any] = np.zeros((size, self.width), dtype=self._dtype)
        self.table = empty_table(size)
        self.ends = np.array([EMPTY, EMPTY, EMPTY, 0], dtype=np.int64)
        self._chain(0)

    def _chain(self, begin: int) -> None:
        """Put the rows from `begin` on in front of the free ones."""
        older = self.rows["older"]
        older[begin:] = np.arange(begin + 1, len(older) + 1)
        older[-1:] = self.ends[FREE]
        self.ends[FREE] = begin if begin < len(older) else self.ends[FREE]

    def __len__(self) -> int:
        """How many rows are live."""
        return int(self.ends[LIVE])

    @property
    def parts(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        """What the loops take: rows; their numbers, `(rows, width)`; the table; the ends."""
        return self.rows, self.values, self.table, self.ends

    def make_room(self, more: int) -> None:
        """Free rows for so many more, or as many as the capacity leaves."""
        wanted = min(len(self) + more, self.capacity)
        before = len(self.rows)
        if wanted <= before:
            return
        size = min(1 << (wanted - 1).bit_length(), self.capacity)
        rows, values = np.zeros(size, dtype=_ROW), np.zeros((size, self.width), dtype=self._dtype)
        rows[:before], values[:before] = self.rows, self.values
        wider = empty_table(size)
        put_all(self.table[self.table >= 0], wider, rows)
        self.rows, self.values, self.table = rows, values, wider
        self._chain(before)

    def forget(self, owner: int) -> int:
        """Let all rows of this owner go; return how many there were."""
        mine = self._in_order()
        mine = mine[self.rows["owner"][mine] == np.uint64(owner)]
        for row in mine.tolist():
            leave(row, self.rows, self.table, self.ends)
        return len(mine)

    def _in_order(self) -> NDArray[np.int64]:
        found: NDArray[np.int64] = _order(self.rows, self.ends)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The live rows, the one renewed longest ago first: uint64 `(n, 2)`, float64 `(n,)`, ..., `(n, width)`."""
        order = self._in_order()
        held = self.rows[order]
        return {
            "keys": np.stack([held["high"], held["low"]], axis=1),
            "times": held["time"].copy(),
            "owners": held["owner"].copy(),
            "marks": held["marks"].copy(),
            "values": self.values[order],
        }

    def load_state_dict(self, state: State) -> int:
        """Become what `state` was cut from; return how many rows were over the capacity, and went."""
        over = max(0, len(state["times"]) - self.capacity)
        count = len(state["times"]) - over
        self._clear(min(max(_SMALLEST, 1 << max(count - 1, 1).bit_length()), self.capacity))
        held = self.rows[:count]
        held["high"], held["low"] = np.asarray(state["keys"])[over:].T
        held["time"], held["owner"] = state["times"][over:], state["owners"][over:]
        held["marks"] = state["marks"][over:]
        self.values[:count] = state["values"][over:]
        held["older"], held["newer"] = np.arange(-1, count - 1), np.arange(1, count + 1)
        held["newer"][-1:] = EMPTY
        put_all(np.arange(count), self.table, self.rows)
        self.ends[:] = (0 if count else EMPTY), count - 1, (count if count < len(self.rows) else EMPTY), count
        return over


@compiled()
def _order(rows: Any, ends: Any) -> Any:
    found = np.empty(ends[3], dtype=np.int64)
    row = ends[0]
    for n in range(len(found)):
        found[n] = row
        row = rows[row].newer
    return found


@compiled()
def enter(high: Any, low: Any, rows: Any, table: Any, ends: Any) -> int:
    """A row for a key that has none, as the one renewed last. There must be a free one."""
    row = ends[2]
    ends[2] = rows[row].older
    rows[row].high, rows[row].low, rows[row].owner, rows[row].marks = high, low, 0, 0
    put(row, table, rows)
    rows[row].older, rows[row].newer = ends[1], EMPTY
    if ends[1] >= 0:
        rows[ends[1]].newer = row
    else:
        ends[0] = row
    ends[1] = row
    ends[3] += 1
    return int(row)


@compiled()
def _unchain(row: int, rows: Any, ends: Any) -> None:
    older, newer = rows[row].older, rows[row].newer
    if older >= 0:
        rows[older].newer = newer
    else:
        ends[0] = newer
    if newer >= 0:
        rows[newer].older = older
    else:
        ends[1] = older


@compiled()
def leave(row: int, rows: Any, table: Any, ends: Any) -> None:
    """Let a row go."""
    take_out(row, table, rows)
    _unchain(row, rows, ends)
    rows[row].older = ends[2]
    ends[2] = row
    ends[3] -= 1


@compiled()
def renew(row: int, rows: Any, ends: Any) -> None:
    """Make a row the one renewed last."""
    if ends[1] == row:
        return
    _unchain(row, rows, ends)
    rows[row].older, rows[row].newer = ends[1], EMPTY
    rows[ends[1]].newer = row
    ends[1] = row
