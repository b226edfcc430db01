"""Files that are there, read one after the other."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from streamrec.errors import SourceError
from streamrec.events import Item, Position
from streamrec.sources._lines import Form, Lines, Taken
from streamrec.sources._readers import opened, size

__all__ = ["Files", "place"]


def place(position: Position) -> tuple[str, int]:
    """The path and the offset in a position. Raises `SourceError` where they are not there."""
    path, offset = position.get("path"), position.get("offset")
    if not isinstance(path, str) or type(offset) is not int or offset < 0:
        raise SourceError(
            f'no position {dict(position)!r}: it needs a "path" and an "offset" in bytes, as position() gives them'
        )
    return path, offset


class Files:
    """Files that are there, one after the other.

    `form`: of the path of a file, how its lines become events, and where the first of them begins.
    """

    def __init__(self, paths: list[str], *, chunk: int, form: Callable[[str], tuple[Form, int]]) -> None:
        self._paths = paths
        self._chunk = chunk
        self._form = form
        self._sizes = [size(path) for path in paths]
        # The position, and all that is remembered: what is read ahead is read again from here when need be.
        self._index = 0
        self._offset = 0  # while no file is open
        self._packed = 0
        self._ended = False
        self._lines: Lines | None = None

    def close(self) -> None:
        if self._lines is not None:
            self._offset, self._packed = self._lines.offset, self._lines.reader.packed
            self._lines.close()
            self._lines = None

    @property
    def size(self) -> int:
        return sum(self._sizes)

    def fraction(self) -> float | None:
        if not self.size:
            return None
        packed = self._packed if self._lines is None else self._lines.reader.packed
        return min(1.0, (sum(self._sizes[: self._index]) + packed) / self.size)

    def wait(self, seconds: float) -> bool:
        return True

    def read(self, limit: int) -> list[Item]:
        index, offset = self._index, self._at()
        items = Taken()
        try:
            while len(items) < limit and not self._ended:
                if self._lines is None:
                    self._lines = self._open(self._index, self._offset)
                self._lines.take(items, limit)
                if len(items) < limit:
                    self.close()
                    # remembered, so that reading on at the end does not decompress the last file again
                    self._ended = self._index + 1 == len(self._paths)
                    if not self._ended:
                        self._index, self._offset, self._packed = self._index + 1, 0, 0
        except BaseException:  # an interrupt too: nothing of this call is handed out, so nothing of it counts as read
            self.close()
            self._index, self._offset, self._ended = index, offset, False
            raise
        return items.given()

    def position(self) -> Position:
        return {"path": self._paths[self._index], "offset": self._at()}

    def seek(self, path: str, offset: int, position: Position) -> None:
        index = bisect_left(self._paths, path)
        if index == len(self._paths) or self._paths[index] != path:
            raise SourceError(
                f"{path!r} is not among the {len(self._paths)} files, {self._paths[0]!r} to {self._paths[-1]!r}: "
                "read with the path that the position is from, or start at the beginning"
            )
        lines = self._open(index, offset)
        self.close()
        self._index, self._lines, self._ended = index, lines, False

    def _at(self) -> int:
        return self._offset if self._lines is None else self._lines.offset

    def _open(self, index: int, offset: int) -> Lines:
        path = self._paths[index]
        form, begins = self._form(path)
        offset = max(offset, begins)
        return Lines(path, opened(path, offset, self._chunk), offset, chunk=self._chunk, form=form)
