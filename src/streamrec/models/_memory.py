"""Memory for rows that never stop coming: it grows in place, without copying what it holds."""

from __future__ import annotations

import mmap
import os
import sys
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["Rows"]

MANY = 1 << 16
"""Rows from which on address space is reserved. Fewer are copied, which takes a few milliseconds at the most."""
HUGE_PAGE = 1 << 21


class Rows:
    """An array of rows, `array`, that grows. Rows not written yet are zero and take no memory.

    Beyond `MANY` rows, address space is reserved for as many rows as this machine's whole memory could hold, and given
    memory page by page as it is first written: growing is then a matter of taking a longer view. So no stream ever
    waits for a table to be copied. Where a system does not give address space like that, larger memory is taken and
    the rows are copied.

    >>> rows = Rows((3,), np.float32, 2)
    >>> rows.array[1] = 7
    >>> rows.grow(2, 200_000)
    >>> rows.array.shape, rows.array[1].tolist()
    ((200000, 3), [7.0, 7.0, 7.0])
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, rows: int) -> None:
        self._whole: NDArray[Any] = _zeros((rows, *shape), np.dtype(dtype))
        self.array: NDArray[Any] = self._whole

    def prepare(self, first: int, count: int) -> None:
        """Give memory now to these rows, which must be zero still: a system may take milliseconds for every large
        page, so a table that is written at random from its first moment wants it before."""
        if count > 0 and len(self.array):
            row = self.array[0].nbytes
            self.array[first : first + count : max(4096 // row, 1)] = 0

    def grow(self, used: int, rows: int) -> None:
        """Make `array` this many rows long; the first `used` of them stay as they are. Views taken before stay good,
        but may be of the memory before."""
        if rows > len(self._whole):
            before, shape, dtype = self._whole, self._whole.shape[1:], self._whole.dtype
            self._whole = _reserved(rows, shape, dtype) if rows > MANY else _zeros((rows, *shape), dtype)
            self._whole[:used] = before[:used]
        self.array = self._whole[:rows]


def _reserved(rows: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    width = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    more = _memory_of_machine() // width
    while more > rows:
        try:
            return _zeros((more, *shape), dtype)
        except (OSError, MemoryError):  # a limit of the process, or a system that counts what is not used yet
            more //= 2
    return _zeros((rows, *shape), dtype)


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros; of large pages where the system has them, since rows are read at random."""
    size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if size < 2 * HUGE_PAGE or sys.platform == "win32":
        return np.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=dtype).reshape(shape)


def _memory_of_machine() -> int:
    """Bytes; 0 where that cannot be told, or address space would be charged as memory."""
    if sys.platform == "win32":
        return 0
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0
