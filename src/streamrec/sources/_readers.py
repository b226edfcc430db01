"""Files as bytes: plain and gzip, read on from an offset in what they hold, decompressed."""

from __future__ import annotations

import glob
import io
import os
import zlib
from typing import Protocol

from streamrec.errors import ConfigError, SourceError

__all__ = ["DamagedGzip", "Gzip", "Plain", "Reader", "find", "opened", "size", "unreadable"]


class DamagedGzip(Exception):
    """What follows cannot be decompressed."""


class Reader(Protocol):
    """The bytes of a file, from the beginning."""

    packed: int
    """How many bytes of it, on disk, have been read."""

    def read(self, limit: int) -> bytes:
        """At most `limit` bytes, none at the end. Raises `DamagedGzip`, once, when all before the damage was given."""
        ...

    def skip(self, count: int, chunk: int) -> int:
        """Go forward `count` bytes; returns how many there were, where damage counts as one byte."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class Plain:
    """A file as it is."""

    def __init__(self, path: str) -> None:
        self._file = io.FileIO(path)
        self.packed = 0

    def read(self, limit: int) -> bytes:
        chunk = self._file.read(limit) or b""
        self.packed += len(chunk)
        return chunk

    def skip(self, count: int, chunk: int) -> int:
        self.packed = self._file.seek(min(count, os.fstat(self._file.fileno()).st_size))
        return self.packed

    def close(self) -> None:
        self._file.close()


class Gzip:
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
        found = DamagedGzip(self._damage)
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
        left = count
        try:
            while left and (passed := self.read(min(left, chunk))):
                left -= len(passed)
        except DamagedGzip:
            left -= 1
        return count - left

    def close(self) -> None:
        self._file.close()


def opened(path: str, offset: int, chunk: int) -> Reader:
    """Open a file at an offset in its decompressed bytes."""
    reader: Reader | None = None
    try:
        reader = Gzip(path) if path.endswith(".gz") else Plain(path)
        there = reader.skip(offset, chunk)
    except OSError as error:
        if reader is not None:
            reader.close()
        raise unreadable(path, error) from error
    if there < offset:
        reader.close()
        raise SourceError(
            f"{path!r} ends at byte {there}, before the offset {offset}: it is shorter than when the position was "
            "taken; bring back the whole file, or start at the beginning"
        )
    return reader


def find(path: str | os.PathLike[str]) -> list[str]:
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


def size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: str, error: OSError) -> SourceError:
    return SourceError(f"cannot read {path!r}: {error.strerror or error}; check that it is there and may be read")
