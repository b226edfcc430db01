"""Followed: the lines of a log that is being written, through rotation."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

from streamrec.errors import SourceError
from streamrec.events import DeadLetter, Item, Position
from streamrec.sources._lines import Form, Lines, Taken, letter
from streamrec.sources._readers import Gzip, Reader, unreadable
from streamrec.sources._rotated import (
    FIRST,
    NOTHING,
    Growing,
    LogFile,
    LogFiles,
    Mark,
    Moved,
    Replaced,
    first_of,
    intact,
    mark,
)
from streamrec.sources._waiting import Waiting

__all__ = ["Followed"]

_REMEMBERED = 16  # old files that a position knows to have been read
_MAX_LATE = 1 << 16  # bytes of a late letter
_TRIES = 10


class Place(NamedTuple):
    """Where the next line stands: the offset in a file, and by what that is known again. `NOTHING`: in the first file
    behind those that have been read."""

    offset: int = 0
    inode: int = 0
    mark: Mark = NOTHING


class Followed:
    """What `JsonLines(follow=True)` does."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        rotated: str | None,
        poll: float,
        idle: float | None,
        chunk: int,
        form: Form,
    ) -> None:
        self._files = LogFiles(path, rotated)
        self._waiting = Waiting(idle=idle, every=poll)
        self._chunk = chunk
        self._form = form
        self._reading = threading.Lock()
        # The position: `_place` while no file is open.
        self._place = Place()
        self._before: list[Mark] = []  # files read to their end, the newest last
        self._lines: Lines | None = None
        self._file = LogFile("", 0)  # the open one
        self._first = b""  # its first bytes, where it is compressed
        self._next: LogFile | None = None  # what follows the open one, which then gets no more lines
        self._left: tuple[Growing, str] | None = None  # the file before, in case somebody still writes to it
        self._gap: DeadLetter | None = None
        self._late: DeadLetter | None = None

    # -- a source ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        self._waiting.close()
        if self._reading.acquire(blocking=False):  # else the one who reads does it
            try:
                self._drop()
            finally:
                self._reading.release()

    @property
    def size(self) -> int:
        return os.path.getsize(self._files.path) if self._files.current() is not None else 0

    def fraction(self) -> float | None:
        return None

    def wait(self, seconds: float) -> bool:
        return self._waiting.until(self._look, seconds)

    def read(self, limit: int) -> list[Item]:
        before = self._here(), list(self._before)
        items = Taken()
        try:
            while not items and self._waiting.for_read(self._look):  # not so where all lines are blank
                with self._reading:
                    self._take(items, limit)
        except BaseException:  # nothing of this call is handed out, so nothing of it counts as read
            self._drop()
            self._place, self._before = before
            raise
        if self._waiting.closed:
            self._drop()
        return items.given()

    def position(self) -> Position:
        with self._reading:
            if self._lines is None and self._gap is None and not self._waiting.closed:
                self._again(self._find)  # of a new source too: what is removed from now on is known to be missing
            place = self._here()
            return {
                "path": self._files.path,
                "offset": place.offset,
                "inode": place.inode,
                "first": list(place.mark),
                "before": [list(one) for one in self._before],
            }

    def seek(self, path: str, offset: int, position: Mapping[str, Any]) -> None:
        inode, first, before = position.get("inode"), _mark_of(position.get("first")), position.get("before")
        known = [_mark_of(one) for one in before] if isinstance(before, list) else [None]
        if type(inode) is not int or first is None or None in known:
            raise SourceError(
                f"no position {dict(position)!r} of a log that is followed: seek to what position() of one gave"
            )
        if path != self._files.path:
            raise SourceError(f"the position is one of {path!r}, this follows {self._files.path!r}")
        self._drop()
        self._place, self._before = Place(offset, inode, first), [one for one in known if one is not None]
        self._waiting.open()

    # -- where the next line is ----------------------------------------------------------------------------------------

    def _take(self, items: Taken, limit: int) -> None:
        """Add items until there are `limit`, or no more for now."""
        while len(items) < limit and self._ready():
            if self._late is not None:
                items.append(self._late)
                self._late, items.sound = None, False
            elif self._gap is not None:
                items.append(self._gap)
                self._gap, items.sound = None, False
                self._pass(self._place.mark)
            elif self._lines is not None:
                try:
                    self._lines.take(items, limit, whole=self._next is not None)
                except Replaced:
                    self._drop()

    def _look(self) -> bool:
        with self._reading:
            return self._ready()

    def _ready(self) -> bool:
        """Whether there is something to hand out; goes on from file to file until there is."""
        return self._again(self._advance)

    def _again(self, step: Any) -> bool:
        for _ in range(_TRIES):
            try:
                found: bool = step()
            except Moved:
                continue
            return found
        return False  # amid a rotation: at the next look it is over

    def _advance(self) -> bool:
        while self._gap is None and self._late is None:
            if self._lines is None:
                if not self._find():
                    break
                continue
            try:
                if self._lines.ready():
                    return True
            except Replaced:
                self._drop()
                continue
            if self._next is None:
                # what follows is looked for first, and then this one read to its end: by then nobody writes to it
                self._look_back()
                self._next = self._successor()
                if self._next is None:
                    break
                continue
            offset = self._common(self._next)
            if offset == 0 and self._lines.unfinished:
                return True  # the last line of a file is a line, with or without a newline
            self._leave(self._next, offset)
        return self._gap is not None or self._late is not None

    def _find(self) -> bool:
        """Open the file of `_place`; False where there is none yet, or it is lost, of which `_gap` tells then."""
        files = self._files.present()
        place = self._place
        if place.mark == NOTHING:
            file = self._first_filled(files[self._behind_known(files) :])
            return file is not None and self._open(file, 0)
        for file in files:
            if file.inode == place.inode and self._holds(file, place):
                return self._open(file, place.offset)
        candidates = files[self._behind_known(files) :]
        for file in candidates:
            if self._holds(file, place) and self._open(file, place.offset):
                return True
        for file in candidates:
            if file.path != self._files.path and _begins(file, place.mark) and intact(file):
                # A copy that was made before the last of what was read was written. It holds nothing new.
                self._pass(mark(first_of(file.path)))
                return self._find()
        if files != self._files.present():
            raise Moved
        self._gap = letter(
            self._position_of_gap(),
            f"gap: the file of this position is gone: none of the {len(files)} files of {self._files.path!r} begins as "
            f"it did and has {place.offset} bytes; what it held behind them, and what came before the oldest of those, "
            "is lost, if there was any",
        )
        return False

    def _position_of_gap(self) -> Position:
        place = self._place
        return {"path": self._files.path, "offset": place.offset, "inode": place.inode}

    def _pass(self, read: Mark) -> None:
        """Go on with the first file behind one that begins so."""
        self._before = [*self._before, read][-_REMEMBERED:]
        self._place = Place()

    def _holds(self, file: LogFile, place: Place) -> bool:
        """Whether a file begins as the one of the place, and is long enough; a compressed one tells when it is read."""
        return _begins(file, place.mark) and (file.packed or file.size() >= place.offset)

    def _behind_known(self, files: list[LogFile]) -> int:
        """The number of the first file behind those that have been read."""
        known = {*self._before} - {NOTHING}  # all empty files begin alike, a log among them that was just truncated
        if not known:
            return 0
        for number in reversed(range(len(files))):
            first = first_of(files[number].path, FIRST + 1)
            if mark(first) in known or (len(first) > FIRST and mark(first[:FIRST]) in known):
                return number + 1
        return 0

    def _first_filled(self, files: list[LogFile]) -> LogFile | None:
        return next((file for file in files if file.size()), None)

    def _successor(self) -> LogFile | None:
        """The file behind the open one; None while there is none with anything in it."""
        if self._files.current() in (None, self._file.inode):
            return None
        files = self._files.present()
        here = [number for number, file in enumerate(files) if file.inode == self._file.inode]
        if not here:  # it was compressed, or removed, since it was opened
            own = self._here().mark
            here = [number for number, file in enumerate(files) if own != NOTHING and _begins(file, own)]
        rest = files[here[-1] + 1 :] if here else files[self._behind_known(files) :]
        return self._first_filled(rest)

    def _common(self, following: LogFile) -> int:
        """Where to go on in the file that follows.

        0, but where that is the log from which the open file is just being copied: then where we are.
        """
        lines = self._lines
        first = b"" if following.packed else first_of(following.path)
        ours = self._first_bytes()
        if lines is None or not first or not ours or not (first.startswith(ours) or ours.startswith(first)):
            return 0
        return lines.offset if following.size() >= lines.offset else 0

    def _leave(self, following: LogFile, offset: int) -> None:
        """Go on in the file that follows."""
        lines, path, own = self._lines, self._file.path, self._here().mark
        self._next = None  # it may have been renamed in the meantime, and is looked for again then
        if lines is None or not self._open(following, offset):
            raise Moved
        if offset == 0:
            self._before = [*self._before, own][-_REMEMBERED:]
        self._look_back()
        if self._left is not None:
            self._left[0].close()
            self._left = None
        if isinstance(lines.reader, Growing):
            self._left = lines.reader, path
        else:
            lines.close()

    def _look_back(self) -> None:
        """See whether somebody has written to the file before, after it had been left."""
        if self._left is None:
            return
        reader, path = self._left
        grown = reader.size() - reader.packed
        if grown <= 0:
            return
        where: Position = {"path": path, "offset": reader.packed}
        try:
            raw = reader.read(min(grown, _MAX_LATE))
        except Replaced:
            return
        reader.packed += grown - len(raw)
        reason = f"late: {grown} bytes were written to {path!r} after the log had gone on; let its writers reopen it"
        self._late = letter(where, reason, raw)

    # -- the open file -------------------------------------------------------------------------------------------------

    def _open(self, file: LogFile, offset: int) -> bool:
        """Open a file at an offset; False, and nothing done, where it ends before that. Raises `Moved` where it is
        another by now."""
        reader: Reader | None = None
        try:
            if file.packed:
                reader, first = Gzip(file.path), first_of(file.path)
            else:
                reader = growing = Growing(file.path)
                first = b""
                if growing.inode != file.inode:
                    raise Moved
            if reader.skip(offset, self._chunk) < offset:
                reader.close()
                return False
        except (FileNotFoundError, Replaced) as error:
            raise Moved from error
        except Moved:
            if reader is not None:
                reader.close()
            raise
        except OSError as error:
            raise unreadable(file.path, error) from error
        self._lines = Lines(file.path, reader, offset, chunk=self._chunk, form=self._form)
        self._file, self._first, self._next = file, first, None
        return True

    def _first_bytes(self) -> bytes:
        reader = self._lines.reader if self._lines is not None else None
        return reader.first if isinstance(reader, Growing) else self._first

    def _here(self) -> Place:
        if self._lines is None:
            return self._place
        return Place(self._lines.offset, self._file.inode, mark(self._first_bytes()))

    def _drop(self) -> None:
        """Close the files, and forget what was read ahead. The position stays."""
        self._place = self._here()
        if self._lines is not None:
            self._lines.close()
        if self._left is not None:
            self._left[0].close()
        self._lines, self._left, self._next, self._gap, self._late = None, None, None, None, None


def _begins(file: LogFile, how: Mark) -> bool:
    return mark(first_of(file.path, how.length)) == how


def _mark_of(value: Any) -> Mark | None:
    if isinstance(value, list) and len(value) == 2 and type(value[0]) is int and type(value[1]) is str:
        return Mark(value[0], value[1])
    return None
