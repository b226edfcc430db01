"""Segments: events that were accepted, one a line in files of a folder, so that they outlive the process.

A file is named by the number of its first event. A line that was written only in part, by a process that was killed
amid it, was not accepted, and is cut off when the next one writes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from streamrec.errors import SourceError
from streamrec.events import DeadLetter, Event, Item, Position, decode_event, encode_lines
from streamrec.sources._lines import Json, Lines, Taken, letter
from streamrec.sources._readers import unreadable

__all__ = ["Segments"]

_CHUNK = 1 << 20
_SUFFIX = ".jsonl"


class _Upto:
    """A segment as far as it has been accepted: behind that, a batch may be half written."""

    def __init__(self, path: str, log: Segments, first: int) -> None:
        self._file = io.FileIO(path)
        self._log = log
        self._first = first
        self.packed = 0

    def read(self, limit: int) -> bytes:
        return self._read(min(limit, self._log.length(self._first) - self.packed))

    def _read(self, count: int) -> bytes:
        chunk = (self._file.read(count) or b"") if count > 0 else b""
        self.packed += len(chunk)
        return chunk

    def skip(self, count: int, chunk: int) -> int:
        self.packed = self._file.seek(min(count, self._log.length(self._first)))
        return self.packed

    def close(self) -> None:
        self._file.close()


class Segments:
    """A log of events in the folder `path`, made where it is not there. One process writes at a time, as its owner.

    `sync`: each batch is on the disk, not only with the system, before `append` returns. Raises `SourceError` where
    the folder cannot be used.
    """

    def __init__(self, path: str, *, size: int, sync: bool) -> None:
        self._path = path
        self._size = size
        self._sync = sync
        self._lock: io.FileIO | None = None  # held by the process that writes
        self._file: io.FileIO | None = None
        self._lines: Lines | None = None
        self._rolls = False  # the next event begins a segment
        self.lost: DeadLetter | None = None
        """What a `seek` found to be gone, until somebody takes it."""
        self._sought: Position = {}
        try:
            os.makedirs(path, exist_ok=True)
            names = sorted(name for name in os.listdir(path) if name.endswith(_SUFFIX))
            self._firsts = [int(name.removesuffix(_SUFFIX)) for name in names]
            self._lengths = {first: os.path.getsize(self._name(first)) for first in self._firsts}
            self.accepted = 0
            """The number of the next event."""
            if self._firsts:
                last = self._firsts[-1]
                lines, self._lengths[last] = _whole_lines(self._name(last))
                self.accepted = last + lines
        except (OSError, ValueError) as error:
            raise SourceError(
                f"cannot use {path!r} as a log of events: {error}; give it a folder of its own"
            ) from error
        self.index = self._firsts[0] if self._firsts else 0
        """The number of the next unread event."""
        self._at = (self.index, 0)

    def length(self, first: int) -> int:
        """How many bytes of a segment have been accepted."""
        return self._lengths[first]

    def close(self) -> None:
        """Close the files; a later `read` opens them again."""
        self.stop_writing()
        if self._lines is not None:
            self._at = (self._at[0], self._lines.offset)
            self._lines.close()
            self._lines = None

    def stop_writing(self) -> None:
        """Let another process write."""
        for file in (self._file, self._lock):
            if file is not None:
                file.close()
        self._file = self._lock = None

    # -- writing -------------------------------------------------------------------------------------------------------

    def append(self, events: Sequence[Event]) -> None:
        """Accept these, all or none. Raises `SourceError` where they cannot be written."""
        content = encode_lines(events)
        file = self._writer()
        first = self._firsts[-1]
        try:
            view = memoryview(content)
            while view:
                view = view[file.write(view) or 0 :]
            if self._sync:
                os.fsync(file.fileno())
        except OSError as error:
            length = self._lengths[first]
            os.ftruncate(file.fileno(), length)
            file.seek(length)
            raise SourceError(f"cannot write to {self._path!r}: {error}; nothing of this batch was accepted") from error
        self._lengths[first] += len(content)
        self.accepted += len(events)

    def _writer(self) -> io.FileIO:
        full = not self._firsts or self._rolls or self._lengths[self._firsts[-1]] >= self._size
        if self._file is not None and not full:
            return self._file
        try:
            if self._lock is None:
                self._lock = _locked(os.path.join(self._path, "lock"))
            if self._file is not None:
                self._file.close()
                self._file = None
            if full:
                first = self.accepted
                file = io.FileIO(self._name(first), "x+")
                self._firsts.append(first)
                self._lengths[first] = 0
                if self._sync:
                    _sync_folder(self._path)
            else:
                first = self._firsts[-1]
                file = io.FileIO(self._name(first), "r+")
                file.truncate(self._lengths[first])  # a line that was not accepted
                file.seek(self._lengths[first])
        except OSError as error:
            raise SourceError(f"cannot write to {self._path!r}: {error}") from error
        self._file, self._rolls = file, False
        return file

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, limit: int) -> list[Item]:
        """The next events, at most `limit` of those that were accepted."""
        items = Taken()
        while len(items) < limit and self._open():
            assert self._lines is not None
            self._lines.take(items, limit, whole=False)
            if len(items) < limit and not self._further():
                break
        self.index += len(items)
        return items.given()

    def _open(self) -> bool:
        if self._lines is None:
            first, offset = self._at
            if first not in self._lengths:
                return False  # nothing has been accepted yet
            path = self._name(first)
            try:
                reader = _Upto(path, self, first)
                reader.skip(offset, _CHUNK)
            except OSError as error:
                raise unreadable(path, error) from error
            self._lines = Lines(path, reader, offset, chunk=_CHUNK, form=Json(decode_event))
        return True

    def _further(self) -> bool:
        """Go to the next segment; False where there is none."""
        following = next((first for first in self._firsts if first > self._at[0]), None)
        if following is None or self._lines is None:
            return False
        self._lines.close()
        self._lines = None
        self._at = (following, 0)
        return True

    def position(self) -> Position:
        """`{"index": n, "segment": ..., "offset": ...}`: n events have been read, and where that is."""
        if self.lost is not None:
            return dict(self._sought)
        offset = self._at[1] if self._lines is None else self._lines.offset
        return {"index": self.index, "segment": self._at[0], "offset": offset}

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go to a position. Raises `SourceError` where it is none.

        Where the log begins behind it, a dead letter says what is gone. Where it ends before it, which is so when the
        machine failed and `sync` was off, there is nothing left to read, and numbers go on from the position.
        """
        index, segment, offset = (position.get(name) for name in ("index", "segment", "offset"))
        if not (type(index) is int and type(segment) is int and type(offset) is int and index >= segment >= 0):
            raise SourceError(f"no position {dict(position)!r} in the log {self._path!r}: seek to what position() gave")
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        self.lost = None
        if segment in self._lengths and 0 <= offset <= self._lengths[segment]:
            self.index, self._at = index, (segment, offset)
        elif index in self._lengths:
            self.index, self._at = index, (index, 0)
        elif index >= self.accepted:
            self.index = self.accepted = index
            self._at = (index, 0)
            self._rolls = True
        elif self._firsts and index < self._firsts[0]:
            first = self._firsts[0]
            reason = f"gap: events {index} to {first - 1} are no longer in {self._path!r}: the log was cut behind them"
            self.lost, self._sought = letter({"index": index}, reason), position
            self.index, self._at = first, (first, 0)
        else:
            raise SourceError(f"no position {dict(position)!r} in the log {self._path!r}: it is of another log")

    def release(self, position: Mapping[str, Any]) -> None:
        """Remove the segments that end before a position, and write on in another than the last: it would be kept, with
        all that is in it, for as long as it takes to fill it."""
        reached = position.get("segment")
        if type(reached) is not int or not self._firsts:
            return
        last = self._firsts[-1]
        self._rolls |= self._lengths[last] > 0
        if position == self.position() and self.index == self.accepted and self._lengths[last] > 0:
            with suppress(SourceError):  # another process writes here now: then it is its log to empty
                self._writer()  # all is read: an empty segment, which says where the numbers are
                self._open()
                self._further()
                reached = self._at[0]
        for first in [one for one in self._firsts if one < min(reached, self._at[0])]:
            os.remove(self._name(first))
            self._firsts.remove(first)
            del self._lengths[first]

    def _name(self, first: int) -> str:
        return os.path.join(self._path, f"{first:020d}{_SUFFIX}")


def _whole_lines(path: str) -> tuple[int, int]:
    """How many lines of a file are whole, and their bytes."""
    count = length = at = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            count += chunk.count(b"\n")
            end = chunk.rfind(b"\n")
            if end >= 0:
                length = at + end + 1
            at += len(chunk)
    return count, length


def _locked(path: str) -> io.FileIO:
    """Hold a file that another process cannot hold too. Let go when it is closed, also by a death."""
    file = io.FileIO(path, "a")
    try:
        import fcntl
    except ImportError:
        return file  # Windows has no such lock: there it is the user's to see to
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise SourceError(
            f"another process writes to this log, or another source of this one: it holds {path!r}"
        ) from error
    return file


def _sync_folder(path: str) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
