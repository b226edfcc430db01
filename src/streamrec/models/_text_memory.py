"""Where the text cache keeps its rows: a block of memory, or of a file that processes share."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamrec.errors import ConfigError, StoreError
from streamrec.models import _text_rows as loops
from streamrec.models._text_rows import BOOT, DIRTY, FREE_PIECE, FREE_PIECES, FREE_ROWS, HEADER, PIECE, ROW

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

__all__ = ["TextMemory"]

MAGIC = b"streamrec texts, 1".ljust(32, b"\0")
PAGE = 4096
FEWEST = 64
EVICTED = 64
"""One row in so many is given up at once where none is free: to find the oldest takes a look at all."""


class Layout(NamedTuple):
    """How many there are of what, in the order of a file's first numbers."""

    hidden: int
    width: int
    rows: int
    slots: int
    pieces: int

    @classmethod
    def within(cls, max_bytes: int, hidden: int, width: int) -> Layout:
        """The most rows that `max_bytes` have room for, with 80 bytes of text a row."""
        rows, step = 0, 1 << 40
        while step:
            step >>= 1
            more = cls.of(hidden, width, rows + step)
            rows += step if more.size <= max_bytes else 0
        return cls.of(hidden, width, rows)

    @classmethod
    def of(cls, hidden: int, width: int, rows: int) -> Layout:
        """With so many rows."""
        return cls(hidden, width, rows, 1 << max(rows * 4 // 3, 1).bit_length(), max(rows * 5 // 4, 2 * FEWEST))

    def parts(self) -> list[tuple[str, Any, tuple[int, ...]]]:
        """Name, type and shape of each array, in order."""
        return [
            ("rows", ROW, (self.rows,)),
            ("table", np.int64, (self.slots,)),
            ("lines", np.uint8, (self.rows, self.hidden * self.width)),
            ("pieces", np.uint8, (self.pieces, PIECE)),
            ("following", np.int32, (self.pieces,)),
            ("free", np.int32, (self.rows,)),
        ]

    @property
    def size(self) -> int:
        """Bytes of all."""
        sizes = [int(np.dtype(kind).itemsize * np.prod(shape, dtype=np.int64)) for _, kind, shape in self.parts()]
        return PAGE + sum(-(-size // 64) * 64 for size in sizes)


class TextMemory:
    """Rows of vectors and their texts in one block of `max_bytes`, found by 128-bit keys.

    With a `path` the block is a file, mapped into memory and shared by all processes that open it. They take turns to
    write (`flock`), and a writer marks the block before and after: whoever finds the mark of one that was killed makes
    the tables again from the rows, each of which has a checksum. So does who opens it first after the machine started.
    """

    def __init__(self, hidden: int, dtype: np.dtype[Any], max_bytes: int, path: str | None) -> None:
        self.dtype, self.path = dtype, path
        wanted = Layout.within(max_bytes, hidden, dtype.itemsize)
        if wanted.rows < FEWEST:
            least = Layout.of(hidden, dtype.itemsize, FEWEST).size
            raise ConfigError(f"max_bytes must be {least} at least for vectors of {hidden} numbers, got {max_bytes!r}")
        self.damaged = 0
        self.evicted = 0
        self._lock = threading.RLock()
        self._file = -1
        if path is None:
            self._view(np.zeros(wanted.size, dtype=np.uint8), wanted)
            self._begin()
        else:
            self._open(path, wanted)

    # The block.

    def _view(self, block: Any, layout: Layout) -> None:
        self.layout = layout
        self.header: NDArray[np.int64] = np.frombuffer(block, np.int64, HEADER, offset=512)
        at = PAGE
        for name, kind, shape in layout.parts():
            count = int(np.prod(shape, dtype=np.int64))
            setattr(self, name, np.frombuffer(block, kind, count, offset=at).reshape(shape))
            at += -(-(np.dtype(kind).itemsize * count) // 64) * 64
        self.rows: NDArray[Any]
        self.table: NDArray[np.int64]
        self.lines: NDArray[np.uint8]
        self.pieces: NDArray[np.uint8]
        self.following: NDArray[np.int32]
        self.free: NDArray[np.int32]
        kind = np.uint16 if self.dtype.itemsize == 2 else np.float32
        self.vectors: NDArray[Any] = self.lines.view(kind)
        self.seen = np.zeros(layout.rows, dtype=np.uint8)

    def _begin(self) -> None:
        """An empty block, whose memory is zero."""
        self.table[:] = -1
        self.free[:] = np.arange(len(self.free))[::-1]
        self.following[:] = np.arange(1, len(self.following) + 1)
        self.following[-1] = -1
        self.header[FREE_ROWS], self.header[FREE_PIECE] = len(self.free), 0
        self.header[FREE_PIECES], self.header[BOOT] = len(self.following), _boot()

    def _open(self, path: str, wanted: Layout) -> None:
        if fcntl is None:
            raise ConfigError(
                "a text cache in a file needs POSIX file locks, which this system has not: leave path out"
            )
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            self._closing = weakref.finalize(self, os.close, self._file)
            self._pid = os.getpid()
            fcntl.flock(self._file, fcntl.LOCK_EX)
            made = os.pread(self._file, PAGE, 0)
            if not made.strip(b"\0"):  # nothing, or what a process left that was killed while it made it
                os.ftruncate(self._file, 0)
                _reserve(self._file, wanted.size)
                self._view(mmap.mmap(self._file, wanted.size), wanted)
                self._begin()
                start = MAGIC + np.array([*wanted, 0], dtype=np.int64).tobytes()
                os.pwrite(self._file, start, 0)
            else:
                layout = self._made_for(made, wanted)
                self._view(mmap.mmap(self._file, layout.size), layout)
                if self.header[DIRTY] or self.header[BOOT] != _boot() or not _boot() or not self._is_sound():
                    self._rebuild()
        except StoreError:
            raise
        except (OSError, ValueError) as error:
            raise StoreError(f"cannot keep texts in {path}: {error}") from error
        finally:
            self._give()

    def _made_for(self, made: bytes, wanted: Layout) -> Layout:
        size = os.fstat(self._file).st_size
        if len(made) < PAGE or made[:32] != MAGIC:
            raise StoreError(
                f"{self.path} is no text cache of this version of streamrec: delete it, or give another path"
            )
        layout = Layout(*(int(number) for number in np.frombuffer(made, np.int64, 5, offset=32)))
        if (layout.hidden, layout.width) != (wanted.hidden, wanted.width):
            raise StoreError(
                f"{self.path} holds vectors of {layout.hidden} numbers of {layout.width} bytes, not of "
                f"{wanted.hidden} of {wanted.width}: give each encoder and dtype a path of its own"
            )
        if layout != Layout.of(layout.hidden, layout.width, layout.rows) or layout.size != size:
            raise StoreError(f"{self.path} has {size:,} bytes and not those it was made with: delete it")
        return layout

    def _is_sound(self) -> bool:
        """Whether all that loops follow leads somewhere: what they are not told to check, they do not."""
        rows, pieces = self.layout.rows, self.layout.pieces
        ends: list[tuple[NDArray[Any], int]] = [
            (self.table, rows),
            (self.following, pieces),
            (self.rows["piece"], pieces),
            (self.free, rows),
        ]
        counts = [(FREE_ROWS, rows), (FREE_PIECES, pieces), (FREE_PIECE, pieces - 1)]
        return (
            all(bool(((array >= -1) & (array < end)).all()) for array, end in ends)
            and all(-1 <= self.header[number] <= most for number, most in counts)
            and int(np.count_nonzero(self.table >= 0)) == rows - self.header[FREE_ROWS]
            and int(np.count_nonzero(self.rows["live"] == 1)) == rows - self.header[FREE_ROWS]
        )

    def _rebuild(self) -> None:
        parts = (self.rows, self.lines, self.free, self.pieces, self.following, self.seen)
        self.damaged += int(loops.rebuild(self.header, self.table, *parts))
        self.header[BOOT], self.header[DIRTY] = _boot(), 0

    # Turns.

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, nobody writes. When a row was used last may be noted all the same."""
        with self._lock:
            self._take(exclusive=False)
            try:
                yield
            finally:
                self._give()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, nobody else reads or writes. What is left by an exception is made sound again by who comes next."""
        with self._lock:
            self._take(exclusive=True)
            try:
                self.header[DIRTY] = 1
                yield
                self.header[DIRTY] = 0
            finally:
                self._give()

    def _take(self, exclusive: bool) -> None:
        if self._file < 0:
            if self.header[DIRTY]:
                self._rebuild()
            return
        if self._pid != os.getpid():  # forked: a lock of the same open file would be the parent's too
            self._closing()
            self._open(str(self.path), self.layout)
        fcntl.flock(self._file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        while self.header[DIRTY]:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            if self.header[DIRTY]:  # nobody was faster
                self._rebuild()
            if not exclusive:
                fcntl.flock(self._file, fcntl.LOCK_SH)

    def _give(self) -> None:
        if self._file >= 0:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    # Rows.

    def __len__(self) -> int:
        return self.layout.rows - int(self.header[FREE_ROWS])

    def find(self, spans: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """int64 `(n,)`: the rows of these texts, or `_keyed_table.EMPTY`, or `NOTHING`; noted as used. In `reading`."""
        self.header[loops.CLOCK] += 1
        parts = (self.table, self.rows, self.lines, self.pieces, self.following, self.seen)
        found: NDArray[np.int64] = loops.find_all(spans, keys, *parts, int(self.header[loops.CLOCK]))
        return found

    def copy(self, found: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """Write the vectors of these rows to `out`, zeros where there is none. In `reading`."""
        if self.dtype.itemsize == 2:
            loops.copy_halves(found, self.vectors, out)
        else:
            loops.copy_singles(found, self.vectors, out)

    def store(
        self,
        data: Any,
        spans: NDArray[np.int64],
        keys: NDArray[np.uint64],
        made: NDArray[Any],
        version: int,
        kept: NDArray[np.uint64],
        history: NDArray[np.int64] | None = None,
    ) -> None:
        """Keep these vectors, `made`, `(n, hidden)` of the dtype, of distinct texts; `made` becomes what is there
        already. `kept`: versions that are given up last. `history`: int64 `(n, 2)`: when each text was used
        last, and how often; None: now, once."""
        bytes_made = made.view(np.uint8)
        most = max(min(self.layout.rows // 2, self.layout.pieces // (2 * loops.LONGEST // PIECE)), 1)
        for start in range(0, len(spans), most):
            part = slice(start, start + most)
            lengths = spans[part, 1] - spans[part, 0]
            pieces = int((-(-lengths[lengths <= loops.LONGEST] // PIECE)).sum())
            with self.writing():
                used = np.full(len(lengths), self.header[loops.CLOCK]) if history is None else history[part, 0]
                uses = np.ones(len(lengths), dtype=np.uint32) if history is None else history[part, 1].astype(np.uint32)
                self._make_room(len(lengths), pieces, kept)
                loops.store_all(
                    data,
                    spans[part],
                    keys[part],
                    np.uint64(version),
                    bytes_made[part],
                    uses,
                    used,
                    self.header,
                    self.table,
                    self.rows,
                    self.lines,
                    self.free,
                    self.pieces,
                    self.following,
                    self.seen,
                )

    def _make_room(self, rows: int, pieces: int, kept: NDArray[np.uint64]) -> None:
        while self.header[FREE_ROWS] < rows or self.header[FREE_PIECES] < pieces:
            live = np.flatnonzero(self.rows["live"])
            count = min(max(rows - int(self.header[FREE_ROWS]), self.layout.rows // EVICTED, 1), len(live))
            age = self.rows["used"][live] + (np.isin(self.rows["version"][live], kept).astype(np.int64) << 62)
            oldest = live[np.argpartition(age, count - 1)[:count]]
            loops.release_all(oldest, self.header, self.table, self.rows, self.free, self.following)
            self.evicted += count

    def text(self, row: int) -> str:
        """The text of a row that keeps it."""
        return bytes(loops.text_of(row, self.rows, self.pieces, self.following)).decode("utf-8")

    def flush(self) -> None:
        """Have the system write the file to disk now."""
        if self._file >= 0:
            with self.reading():
                os.fsync(self._file)


def _reserve(file: int, size: int) -> None:
    """So many bytes on the disk, now: a page of a mapped file for which there is no room would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


def _boot() -> int:
    """Which start of this machine this is; 0 where the system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as told:
            return int(told.read().replace("-", "")[:15], 16)
    except (OSError, ValueError):
        return 0
