"""IdTable: 64-bit ids to rows, exact and growing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.errors import StoreError
from streamrec.models import _hash_table
from streamrec.models._hash_table import FREE, FREED, HEADER, MOVED, USED
from streamrec.models._memory import Rows
from streamrec.protocols import State

__all__ = ["IdTable"]

SMALLEST = 1024
AT_ONCE = 1 << 14  # slots; a table this small is moved in far less than a millisecond
NOTHING = np.zeros((0, 2), dtype=np.int64)

Ids = NDArray[np.int64]


class IdTable:
    """Which row each id has, one of its own. The n-th distinct id has row n - 1, but where a row was released: the row
    released last goes to the next new id.

    28 to 47 bytes an id, and up to 67 while the next table is made ready. `find` and `insert` are compiled loops over
    int64 `(n,)`. No call takes long because the table grows: a larger one is filled slice by slice by the calls that
    follow, while both are looked into.

    >>> import numpy as np
    >>> table = IdTable()
    >>> table.insert(np.array([7, -3, 7]))
    array([0, 1, 0])
    >>> table.find(np.array([-3, 5]))
    array([ 1, -1])
    """

    def __init__(self) -> None:
        self._clear(SMALLEST)

    def _clear(self, rows: int) -> None:
        """Empty, with room for so many ids."""
        self._owners = Rows((), np.int64, rows)
        self.header: Ids = np.zeros(HEADER, dtype=np.int64)
        self.header[FREE] = -1
        self.slots: Ids = Rows((2,), np.int64, _slots_for(rows)).array
        self.old: Ids = NOTHING
        self._next: Rows | None = None  # the larger table to come, which gets its memory bit by bit
        self._prepared = 0

    def __len__(self) -> int:
        """How many ids have a row."""
        return int(self.header[USED] - self.header[FREED])

    @property
    def used(self) -> int:
        """Rows that have been given away so far, those released among them."""
        return int(self.header[USED])

    @property
    def capacity(self) -> int:
        """Rows there is memory for."""
        return len(self.owners)

    @property
    def owners(self) -> Ids:
        """int64 `(capacity,)`: the id of each row."""
        return self._owners.array

    @property
    def ids(self) -> Ids:
        """int64 `(used,)`: the id of each row; of a free row nothing that means anything. A view."""
        return self.owners[: self.used]

    @property
    def free(self) -> Ids:
        """int64: the rows that were released, in that order."""
        rows: Ids = _hash_table.free_rows(self.owners, self.header)
        return rows

    def reserve(self, more: int) -> bool:
        """Make room for `more` new ids; true where `capacity` has grown."""
        live = len(self)
        if live + more > len(self.slots) * 13 // 16:
            self._finish_moving()
            size = max(_slots_for(live + more), 2 * len(self.slots))
            prepared = self._next.array if self._next is not None else NOTHING
            self.old, self.slots = self.slots, prepared if len(prepared) == size else Rows((2,), np.int64, size).array
            self._next, self.header[MOVED] = None, 0
            if len(self.old) <= AT_ONCE:
                self._finish_moving()
        if live + more <= self.capacity:
            return False
        self._owners.grow(self.used, 1 << (live + more - 1).bit_length())
        return True

    @property
    def behind(self) -> bool:
        """Whether `keep_up` has anything to do."""
        if len(self.old):
            return True
        ready = self._next is not None and self._prepared == len(self._next.array)
        return len(self.slots) > AT_ONCE and len(self) > len(self.slots) * 5 // 8 and not ready

    def keep_up(self, entries: int) -> bool:
        """Do what a call over so many ids owes: move slots out of the table before this one, make ready the next. True
        where the table before is done with."""
        if len(self.old):
            _hash_table.move(4 * entries, self.slots, self.old, self.header)
            if self.header[MOVED] < len(self.old):
                return False
            self.old = NOTHING
            return True
        if self.behind:
            if self._next is None:
                self._next, self._prepared = Rows((2,), np.int64, 2 * len(self.slots)), 0
            # ready before thirteen sixteenths are full
            count = min(12 * entries, len(self._next.array) - self._prepared)
            self._next.prepare(self._prepared, count)
            self._prepared += count
        return False

    def _finish_moving(self) -> None:
        _hash_table.move(len(self.old), self.slots, self.old, self.header)
        self.old = NOTHING

    def find(self, ids: Ids) -> Ids:
        """int64 `(n,)`: their rows, -1 for an id that has none. Changes nothing."""
        rows: Ids = _hash_table.find_all(ids, self.slots, self.old)
        return rows

    def insert(self, ids: Ids) -> Ids:
        """int64 `(n,)`: their rows, new ones where they have none yet."""
        self.reserve(len(ids))
        rows: Ids = _hash_table.insert_all(ids, self.slots, self.old, self.owners, self.header)
        self.keep_up(len(ids))
        return rows

    def release(self, ids: Ids) -> None:
        """Take their rows from these ids, where they have one; ids new from now on get those."""
        rows = self.find(np.unique(ids))
        _hash_table.release_all(rows[rows >= 0], self.slots, self.old, self.owners, self.header)

    def state_dict(self) -> State:
        """`ids`: int64 `(used,)`, in the order of their rows, 0 where a row is free; `free`: the free rows."""
        ids, free = self.ids.copy(), self.free
        ids[free] = 0
        return {"ids": ids, "free": free}

    def load_state_dict(self, state: State) -> None:
        """Give every saved id its row again. Raises `StoreError` where an id stands twice, or a free row is none."""
        ids: Any = np.asarray(state["ids"], dtype=np.int64)
        free: Any = np.asarray(state.get("free", ()), dtype=np.int64)
        if len(free) and not (free.min() >= 0 and free.max() < len(ids) and len(np.unique(free)) == len(free)):
            raise StoreError("a saved id table frees a row that is none: it was not written by streamrec, or changed")
        rows = np.delete(np.arange(len(ids), dtype=np.int64), free)
        fresh = IdTable()
        fresh._clear(max(SMALLEST, 1 << max(len(ids) - 1, 0).bit_length()))
        fresh.header[USED] = len(ids)
        _hash_table.chain(free, fresh.owners, fresh.header)
        if not _hash_table.give(rows, ids[rows], fresh.slots, fresh.owners):
            raise StoreError("a saved id table holds an id twice: it was not written by streamrec, or was changed")
        self.__dict__ = fresh.__dict__

    def copy_from(self, other: IdTable) -> None:
        """Become what `other` is, in memory of its own: faster than to load its state, which hashes every id anew."""
        self._clear(other.capacity)
        self.owners[: other.used] = other.ids
        self.header[:] = other.header
        self.slots = Rows((2,), np.int64, len(other.slots)).array
        self.slots[:] = other.slots
        self.old = other.old.copy()

    def change(self, rows: Ids, ids: Ids, used: int, free: Ids) -> None:
        """Become a table that differs from this one: `rows` belong to `ids`, `used` rows are used, `free` are free.

        Raises `StoreError` where an id would have two rows.
        """
        before, freed = self.used, self.free
        self.reserve(max(used - len(self), 0))
        if len(free) or len(freed):
            kept = ~np.isin(rows, free)
            rows, ids = rows[kept], ids[kept]
        known = rows < before
        live = known & ~np.isin(rows, freed) if len(freed) else known
        differ = ~live
        differ[live] = self.owners[rows[live]] != ids[live]
        leaving = rows[live & differ]
        if len(free):
            leaving = np.concatenate([leaving, np.setdiff1d(free[free < before], freed)])
        _hash_table.release_all(leaving, self.slots, self.old, self.owners, self.header)
        if len(self.old):  # `give` looks into one table only
            self._finish_moving()
        if not _hash_table.give(rows[differ], ids[differ], self.slots, self.owners):
            raise StoreError("a change of an id table gives an id a second row: it does not belong to this state")
        self.header[USED] = used
        _hash_table.chain(free, self.owners, self.header)


def _slots_for(ids: int) -> int:
    """At most thirteen sixteenths full, a power of two."""
    return 1 << max(ids * 16 // 13, 1).bit_length()
