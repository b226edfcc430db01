"""The rows of a join: free ones are chained, and there are more when they are needed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.preprocessors._keyed_rows import empty_table, put_all

__all__ = ["chained", "free_rows", "larger"]


def free_rows(count: int, kind: Any) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """Free rows, chained; an empty table and an empty heap for them."""
    rows = np.zeros(count, dtype=kind)
    chained(rows, -1, count)
    return rows, empty_table(count), np.empty(count, dtype=np.int64)


def chained(rows: NDArray[Any], first: int, new: int) -> int:
    """Chain the last `new` of the rows, in front of the free row `first`; returns the first of them."""
    begin = len(rows) - new
    rows["next"][begin:] = np.arange(begin + 1, len(rows) + 1)
    rows["next"][-1] = first
    return begin


def larger(
    rows: NDArray[Any], table: NDArray[np.int64], heap: NDArray[np.int64], more: int
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """The same with room for `more` rows beyond."""
    grown = np.zeros(len(rows) + more, dtype=rows.dtype)
    grown[: len(rows)] = rows
    wider = empty_table(len(grown))
    put_all(table[table >= 0], wider, grown)
    longer = np.empty(len(grown), dtype=np.int64)
    longer[: len(heap)] = heap
    return grown, wider, longer
