"""IdTable: 64-bit ids to rows, exact and growing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.errors import StoreError
from streamrec.models import _hash_table
from streamrec.protocols import State

__all__ = ["IdTable"]

SMALLEST = 1024


class IdTable:
    """Which row each id has: the n-th distinct id has row n - 1, for ever, and no two ids share one.

    40 bytes an id, up to 80 just after growing. `find` and `insert` are compiled loops over int64 `(n,)`.

    >>> import numpy as np
    >>> table = IdTable()
    >>> table.insert(np.array([7, -3, 7]))
    array([0, 1, 0])
    >>> table.find(np.array([-3, 5]))
    array([ 1, -1])
    """

    def __init__(self) -> None:
        self._clear(SMALLEST)

    def _clear(self, capacity: int) -> None:
        self.owners: NDArray[np.int64] = np.zeros(capacity + 1, dtype=np.int64)
        self._empty_slots(capacity)

    def _empty_slots(self, capacity: int) -> None:
        self.slots: NDArray[np.int64] = np.full(
            (2 * capacity, 2), -1, dtype=np.int64
        )  # half full at most: short probes

    def __len__(self) -> int:
        return int(self.owners[-1])

    @property
    def capacity(self) -> int:
        """Rows there is memory for."""
        return len(self.owners) - 1

    @property
    def ids(self) -> NDArray[np.int64]:
        """int64 `(rows,)`: the id of each row. A view."""
        return self.owners[: len(self)]

    def reserve(self, more: int) -> bool:
        """Make room for `more` new ids; true where that moved the table into larger memory."""
        needed = len(self) + more
        if needed <= self.capacity:
            return False
        capacity = 1 << (needed - 1).bit_length()
        grown = np.zeros(capacity + 1, dtype=np.int64)
        grown[: len(self)] = self.ids
        grown[-1] = len(self)
        self.owners = grown
        self._empty_slots(capacity)
        _hash_table.place_all(self.owners, self.slots)
        return True

    def find(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 `(n,)`: their rows, -1 for an id that has none. Changes nothing."""
        rows: NDArray[np.int64] = _hash_table.find_all(ids, self.slots)
        return rows

    def insert(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 `(n,)`: their rows, new ones where they have none yet."""
        self.reserve(len(ids))
        rows: NDArray[np.int64] = _hash_table.insert_all(ids, self.slots, self.owners)
        return rows

    def state_dict(self) -> State:
        """`ids`: int64 `(rows,)`, in the order of their rows."""
        return {"ids": self.ids.copy()}

    def load_state_dict(self, state: State) -> None:
        """Give every saved id its row again. Raises `StoreError` where an id stands twice."""
        ids: Any = np.asarray(state["ids"], dtype=np.int64)
        if len(np.unique(ids)) != len(ids):
            raise StoreError("a saved id table holds an id twice: it was not written by streamrec, or was changed")
        self._clear(max(SMALLEST, 1 << max(len(ids) - 1, 0).bit_length()))
        self.insert(ids)
