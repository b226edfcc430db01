"""The files of a log that is rotated: which they are, in which order, and how one is known again under another name."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import stat
from collections.abc import Sequence
from typing import Any, NamedTuple

from streamrec.errors import ConfigError, SourceError
from streamrec.sources._readers import DamagedGzip, Gzip, unreadable

__all__ = [
    "FIRST",
    "NOTHING",
    "Growing",
    "LogFile",
    "LogFiles",
    "Mark",
    "Moved",
    "Replaced",
    "first_of",
    "intact",
    "mark",
]

FIRST = 1024
"""Bytes at the beginning of a file by which it is known again: some events, and so unlike any other's."""

_TRIES = 10


class Replaced(Exception):
    """A file no longer holds what it held: it was truncated, and perhaps written anew."""


class Moved(Exception):
    """A file was renamed or removed while it was looked at: look again."""


class Mark(NamedTuple):
    """How a file begins: the hash of its first `length` bytes, at most `FIRST`, decompressed."""

    length: int
    digest: str


NOTHING = Mark(0, "")


class LogFile(NamedTuple):
    """One file of a log, by name and inode."""

    path: str
    inode: int

    @property
    def packed(self) -> bool:
        return self.path.endswith(".gz")

    def size(self) -> int:
        """Its size on disk now. Raises `Moved` where it is not there."""
        try:
            return os.path.getsize(self.path)
        except OSError as error:
            raise Moved from error


def mark(first: bytes) -> Mark:
    """How a file begins, given its first bytes."""
    if not first:
        return NOTHING
    return Mark(len(first), hashlib.blake2b(first, digest_size=16).hexdigest())


def first_of(path: str, count: int = FIRST) -> bytes:
    """The first bytes of a file, decompressed. Raises `Moved` where it is not there, `SourceError` where it cannot be
    read."""
    try:
        if not path.endswith(".gz"):
            with io.FileIO(path) as file:
                return file.read(count) or b""
        packed = Gzip(path)
    except FileNotFoundError as error:
        raise Moved from error
    except OSError as error:
        raise unreadable(path, error) from error
    found = b""
    try:
        while len(found) < count and (more := packed.read(count - len(found))):
            found += more
    except DamagedGzip:
        pass  # as far as it goes; who reads on is told of the damage
    finally:
        packed.close()
    return found


def intact(file: LogFile) -> bool:
    """Whether all of a file can be read."""
    if not file.packed:
        return True
    packed = Gzip(file.path)
    try:
        while packed.read(1 << 20):
            pass
    except DamagedGzip:
        return False
    finally:
        packed.close()
    return True


class Growing:
    """A file that others write to. A read tells when it is no longer the file it was: it raises `Replaced` then."""

    def __init__(self, path: str) -> None:
        self._file = io.FileIO(path)
        self.inode = inode_of(os.fstat(self._file.fileno()))
        self.packed = 0
        self.first = b""
        self._look(0)

    def read(self, limit: int) -> bytes:
        self._file.seek(self.packed)
        chunk = self._file.read(limit) or b""
        # behind the read: were the file another by now, these bytes might be those of either
        self._look(self.packed + len(chunk))
        self.packed += len(chunk)
        return chunk

    def skip(self, count: int, chunk: int) -> int:
        self.packed = min(count, self.size())
        return self.packed

    def size(self) -> int:
        """Its size now."""
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()

    def _look(self, end: int) -> None:
        self._file.seek(0)
        first = self._file.read(FIRST) or b""
        if self.size() < end or not first.startswith(self.first):
            raise Replaced
        self.first = first


class LogFiles:
    """The old files of the log at `path`, and that itself.

    `rotated`: a pattern of the old ones; None: those whose names are the log's followed by "." or "-" and a number or
    a date. Where a file stands beside its compressed copy, the copy may be unfinished and is passed over.
    """

    def __init__(self, path: str | os.PathLike[str], rotated: str | None) -> None:
        name = os.fspath(path) if isinstance(path, os.PathLike) else path
        if not isinstance(name, str):
            raise ConfigError(f"path must be a str or an os.PathLike of str, got {path!r}")
        if os.path.isdir(name):
            raise SourceError(f"{name!r} is a folder; give the path of the log in it that is being written")
        if name.endswith(".gz") or (glob.has_magic(name) and not os.path.exists(name)):
            raise ConfigError(
                f"to follow needs the path of one log that is being written, got {name!r}; "
                "its old files, compressed or not, are told by rotated="
            )
        folder, base = os.path.split(name)
        if not os.path.isdir(folder or "."):
            raise SourceError(f"no folder {folder!r}; the log may come later, but its folder must be there")
        self.path = name
        self._pattern = rotated
        self._folder = folder
        self._usual = re.compile(re.escape(base) + r"[.-]\d[\d._:TZ+-]*(\.gz)?")
        self._numbered = re.compile(re.escape(name) + r"[.-](\d{1,3})")

    def present(self) -> list[LogFile]:
        """All that are there, oldest first, as they were at one moment."""
        found = self._list()
        for _ in range(_TRIES):  # while files are renamed, one may be missed or seen twice
            again = self._list()
            if again == found:
                return found
            found = again
        raise Moved

    def current(self) -> int | None:
        """The inode of the log itself; None where it is not there."""
        try:
            return inode_of(os.stat(self.path))
        except OSError:
            return None

    def _list(self) -> list[LogFile]:
        names = {name for name in self._old() if name != self.path}
        kept = [name for name in names if not (name.endswith(".gz") and name[:-3] in names | {self.path})]
        files = []
        for name in [*sorted(kept, key=self._age), self.path]:
            try:
                about = os.stat(name)
            except OSError:
                continue  # gone again, or, as to the log itself, not yet there
            if stat.S_ISREG(about.st_mode):
                files.append(LogFile(name, inode_of(about)))
        return files

    def _old(self) -> Sequence[str]:
        if self._pattern is not None:
            return glob.glob(self._pattern, recursive=True)
        try:
            names = os.listdir(self._folder or ".")
        except OSError as error:
            raise unreadable(self._folder, error) from error
        return [os.path.join(self._folder, name) for name in names if self._usual.fullmatch(name)]

    def _age(self, name: str) -> tuple[Any, ...]:
        """What sorts old files, oldest first."""
        name = name.removesuffix(".gz")
        numbered = self._numbered.fullmatch(name)
        if numbered is not None:  # 1 is the newest
            return (1, -int(numbered[1]))
        parts = re.split(r"(\d+)", name)
        return (0, *((int(part), "") if part.isdigit() else (-1, part) for part in parts))


def inode_of(about: os.stat_result) -> int:
    """What names a file whatever its name is, while it is there."""
    return about.st_ino & (2**63 - 1)  # some systems have longer ones than a checkpoint can hold
