"""JsonLines: events in files, one a line."""

from __future__ import annotations

import glob
import io
import os
import zlib
from bisect import bisect_left
from collections.abc import Callable
from types import TracebackType
from typing import Any, Union

from typing_extensions import Self

from streamrec.errors import ConfigError, SourceError
from streamrec.events import (
    DeadLetter,
    Decoded,
    Event,
    Feedback,
    Impression,
    Item,
    Labeled,
    Position,
    decode_event,
    decode_lines,
)

__all__ = ["JsonLines"]

_EVENTS = (Impression, Feedback, Labeled)
_MAX_REASON = 500


class JsonLines:
    """A source over local files that hold one event a line, resumable at every line.

    `path`: a file, or a pattern such as `"logs/*.jsonl.gz"`, whose files are read one after the other, sorted by
    name. Names that end in `.gz` are decompressed. `decode` reads one line, without its newline. Blank lines
    are skipped. A line on which `decode` raises is a `DeadLetter` in its place; a damaged or truncated gzip file is
    read up to the damage, a `DeadLetter` stands there, and the next file follows.

    A position is `{"path": ..., "offset": n}`: n bytes of that file, decompressed, have been read. (Damage counts as
    one byte, so that there is a position behind it.) Memory: about 1 MiB and the longest line, several times over.

    Raises `SourceError` where there is no such file, or no file fits the pattern.

    >>> JsonLines("clicks.jsonl")
    Traceback (most recent call last):
        ...
    streamrec.errors.SourceError: no file 'clicks.jsonl'; check the path
    """

    _chunk = 1 << 20

    # what __del__ needs, also where __init__ raised
    _reader: _Reader | None = None

    def __init__(self, path: str | os.PathLike[str], *, decode: Callable[[bytes], Event] = decode_event) -> None:
        self._paths = _find(path)
        self._decode = decode
        self._sizes = [_size(found) for found in self._paths]
        # The position, and all that is remembered: everything below is read again from here when need be.
        self._index = 0
        self._offset = 0
        self._ended = False
        self._packed = 0  # bytes on disk, of the file at hand
        self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the open file, if any. The position stays; a later `read` opens the file again."""
        if self._reader is not None:
            self._drop()

    @property
    def size(self) -> int:
        """The size of all files in bytes on disk, when the source was made."""
        return sum(self._sizes)

    def fraction(self) -> float | None:
        """The share of `size` read so far, in [0, 1]; None where the files are empty."""
        if not self.size:
            return None
        return min(1.0, (sum(self._sizes[: self._index]) + self._packed) / self.size)

    def read(self, limit: int) -> list[Item]:
        """The next events, at most `limit`, with a `DeadLetter` for what could not be read; an empty list at the end.

        Raises `SourceError` where a file cannot be opened or read any more; the position is then that before the call.
        """
        if limit < 1:
            raise ConfigError(f"limit must be >= 1, got {limit!r}")
        index, offset = self._index, self._offset
        items: list[Item] = []
        sound = True  # all in the default form
        try:
            while len(items) < limit and (self._next < len(self._lines) or self._fill()):
                sound &= self._take(items, limit)
                if self._damage is not None:  # then no line is left in front of it
                    items.append(self._damaged())
                    sound = False
        except BaseException:  # an interrupt too: nothing of this call is handed out, so nothing of it counts as read
            self._drop()
            self._index, self._offset, self._ended = index, offset, False
            raise
        return Decoded(items) if sound else items

    def position(self) -> Position:
        """Where the next unread line starts: `{"path": ..., "offset": n}`, n in the file's decompressed bytes."""
        return {"path": self._paths[self._index], "offset": self._offset}

    def seek(self, position: Position) -> None:
        """Go to a position. In a gzip file this decompresses what stands before.

        Raises `SourceError` where the path is not among the files, or the offset is behind the file's end.
        """
        path, offset = position.get("path"), position.get("offset")
        if not isinstance(path, str) or type(offset) is not int or offset < 0:
            raise SourceError(
                f'no position {dict(position)!r}: it needs a "path" and an "offset" in bytes, as position() gives them'
            )
        index = bisect_left(self._paths, path)
        if index == len(self._paths) or self._paths[index] != path:
            raise SourceError(
                f"{path!r} is not among the {len(self._paths)} files, {self._paths[0]!r} to {self._paths[-1]!r}: "
                "read with the path that the position is from, or start at the beginning"
            )
        reader = _open(path, offset, self._chunk)
        self._drop()
        self._reader, self._index, self._offset = reader, index, offset
        self._ended = False
        self._packed = reader.packed

    def _drop(self) -> None:
        """Forget what was read ahead."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None
        self._lines: list[bytes] = []
        self._next = 0
        self._tail = b""  # the start of a line whose end has not been read yet
        self._unfinished = False  # the last of the lines has no newline
        self._damage: str | None = None

    def _fill(self) -> bool:
        """Read lines ahead, into the next file where one ends; False at the end of the last one."""
        while not self._ended:
            if self._reader is None:
                self._reader = _open(self._paths[self._index], self._offset, self._chunk)
            if self._read_lines(self._reader):
                return True
            if self._index + 1 < len(self._paths):
                self._drop()
                self._index, self._offset, self._packed = self._index + 1, 0, 0
            else:
                # remembered, so that reading on at the end does not decompress the last file again
                self._drop()
                self._ended = True
        return False

    def _read_lines(self, reader: _Reader) -> bool:
        """Read on to the end of at least one line; False at the end of the file."""
        parts = [self._tail]
        self._tail, self._lines, self._next = b"", [], 0
        while True:
            try:
                chunk = reader.read(self._chunk)
            except _DamagedGzip as error:
                # What stands between the last newline and the damage belongs to the damage, even where it decodes:
                # a line cut short may well look whole to a `decode` of the user's.
                self._tail, self._damage = b"".join(parts), str(error)
                return True
            except OSError as error:
                raise _unreadable(self._paths[self._index], error) from error
            finally:
                self._packed = reader.packed
            if not chunk:
                line = b"".join(parts)
                self._lines, self._unfinished = ([line], True) if line else ([], False)
                return bool(line)
            end = chunk.rfind(b"\n")
            if end < 0:
                parts.append(chunk)  # joined once, at the line's end: a long line costs its length, not its square
                continue
            parts.append(chunk[:end])
            self._tail = chunk[end + 1 :]
            self._lines = b"".join(parts).split(b"\n")
            return True

    def _take(self, items: list[Item], limit: int) -> bool:
        """Decode lines that were read ahead until there are `limit` items; whether all are in the default form."""
        offset, start = self._offset, self._next
        # One slice holds as many lines as are wanted; where some are blank, `read` comes back for more.
        lines = self._lines[start : start + limit - len(items)]
        good = self._take_good(items, lines)
        if good:
            offset += sum(map(len, lines)) + len(lines)
        else:
            offset = self._take_each(items, lines, offset)
        self._next = start + len(lines)
        if self._unfinished and self._next == len(self._lines):
            offset -= 1
            self._unfinished = False
        self._offset = offset
        return good

    def _take_good(self, items: list[Item], lines: list[bytes]) -> bool:
        """Decode lines of the default form that are all good, as nearly all are; False, and nothing done, where not."""
        if self._decode is not decode_event:
            return False
        events = decode_lines(lines)
        if events is None:  # which line it is, and why, the careful way finds
            return False
        items += events
        return True

    def _take_each(self, items: list[Item], lines: list[bytes], offset: int) -> int:
        """Decode lines one by one, the first of which stands at `offset`; return where the next one stands."""
        for line in lines:
            if line and not line.isspace():
                try:
                    event: Any = self._decode(line)
                except Exception as error:
                    # Broad on purpose: `decode` may be the user's, and no line, however odd, may stop the stream.
                    items.append(self._letter(offset, f"{error} ({type(error).__name__})", line))
                else:
                    if isinstance(event, _EVENTS):
                        items.append(event)
                    else:
                        kind = type(event).__name__
                        items.append(self._letter(offset, f"decode returned a {kind}, which is no event", line))
            offset += len(line) + 1
        return offset

    def _damaged(self) -> DeadLetter:
        """The letter for the damage that was found; the position goes behind it."""
        path = self._paths[self._index]
        letter = self._letter(self._offset, f"damaged gzip file {path!r}: {self._damage}", self._tail)
        self._offset += len(self._tail) + 1
        self._tail, self._damage = b"", None
        return letter

    def _letter(self, offset: int, reason: str, raw: bytes) -> DeadLetter:
        position = {"path": self._paths[self._index], "offset": offset}
        return DeadLetter(position=position, reason=f"malformed: {reason}"[:_MAX_REASON], raw=raw)


class _DamagedGzip(Exception):
    """What follows cannot be decompressed."""


class _Plain:
    """A file as it is."""

    def __init__(self, path: str) -> None:
        self._file = io.FileIO(path)
        self.packed = 0

    def read(self, limit: int) -> bytes:
        chunk = self._file.read(limit) or b""
        self.packed += len(chunk)
        return chunk

    def skip(self, count: int, chunk: int) -> int:
        """Go forward `count` bytes; returns how many there were."""
        self.packed = self._file.seek(min(count, os.fstat(self._file.fileno()).st_size))
        return self.packed

    def close(self) -> None:
        self._file.close()


class _Gzip:
    """The decompressed bytes of a gzip file.

    Rather than `gzip.GzipFile`, which loses what it had decompressed when it meets damage.
    """

    def __init__(self, path: str) -> None:
        self._file = io.FileIO(path)
        self._input = b""
        self._inflate: zlib._Decompress | None = None  # None between two members
        self._members = 0
        self._damage: str | None = None
        self.packed = 0

    def read(self, limit: int) -> bytes:
        """At most `limit` bytes, none at the end. Raises `_DamagedGzip`, once, when all before the damage was given."""
        while self._damage is None:
            ended = False
            if not self._input:
                self._input = self._file.read(1 << 16) or b""
                self.packed += len(self._input)
                ended = not self._input
            if self._inflate is None:
                if self._members:  # as gzip does: zeros after a member are padding
                    self._input = self._input.lstrip(b"\0")
                if not self._input:
                    if ended:
                        return b""
                    continue
                self._inflate = zlib.decompressobj(wbits=31)  # 31: with the header and checksum of gzip
            inflate = self._inflate
            out = self._decompress(inflate, limit)
            if out:
                return out
            if ended and not inflate.eof:
                self._damage = "it ends too early"
        found = _DamagedGzip(self._damage)
        # told once; from here on, this is the file's end
        self._input, self._inflate, self._damage = b"", None, None
        self.packed = self._file.seek(0, os.SEEK_END)
        raise found

    def _decompress(self, inflate: zlib._Decompress, limit: int) -> bytes:
        before = inflate.copy()
        try:
            out = inflate.decompress(self._input, limit)
        except zlib.error as error:
            # zlib drops what it had decompressed of this piece: do it again byte by byte, as far as it goes
            self._damage = str(error)
            found = []
            try:
                for at in range(len(self._input)):
                    found.append(before.decompress(self._input[at : at + 1]))
            except zlib.error:
                pass
            return b"".join(found)
        self._input = inflate.unconsumed_tail
        if inflate.eof:
            self._input, self._inflate = inflate.unused_data, None
            self._members += 1
        return out

    def skip(self, count: int, chunk: int) -> int:
        """Go forward `count` bytes; returns how many there were, where damage counts as one byte."""
        left = count
        try:
            while left and (passed := self.read(min(left, chunk))):
                left -= len(passed)
        except _DamagedGzip:
            left -= 1
        return count - left

    def close(self) -> None:
        self._file.close()


_Reader = Union[_Plain, _Gzip]


def _open(path: str, offset: int, chunk: int) -> _Reader:
    """Open a file at an offset in its decompressed bytes."""
    reader: _Reader | None = None
    try:
        reader = _Gzip(path) if path.endswith(".gz") else _Plain(path)
        there = reader.skip(offset, chunk)
    except OSError as error:
        if reader is not None:
            reader.close()
        raise _unreadable(path, error) from error
    if there < offset:
        reader.close()
        raise SourceError(
            f"{path!r} ends at byte {there}, before the offset {offset}: it is shorter than when the position was "
            "taken; bring back the whole file, or start at the beginning"
        )
    return reader


def _find(path: str | os.PathLike[str]) -> list[str]:
    """The files of a path or a pattern, sorted by name."""
    name = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(name, str):
        raise ConfigError(f"path must be a str or an os.PathLike of str, got {path!r}")
    if os.path.isfile(name):  # first, so that a file with brackets in its name is found
        return [name]
    if os.path.isdir(name):
        raise SourceError(f"{name!r} is a folder; give a pattern, such as {os.path.join(name, '*.jsonl')!r}")
    if not glob.has_magic(name):
        raise SourceError(f"no file {name!r}; check the path")
    found = sorted(match for match in glob.glob(name, recursive=True) if os.path.isfile(match))
    if not found:
        raise SourceError(f"no file matches the pattern {name!r}; check the folder and the pattern")
    return found


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> SourceError:
    return SourceError(f"cannot read {path!r}: {error.strerror or error}; check that it is there and may be read")
