"""JsonLines: events in files, one a line."""

from __future__ import annotations

import os
from collections.abc import Callable

from streamrec.errors import ConfigError
from streamrec.events import Event, Item, Position, decode_event
from streamrec.sources._closing import ClosedAtItsEnd
from streamrec.sources._files import Files, place
from streamrec.sources._follow import Followed
from streamrec.sources._lines import Json
from streamrec.sources._readers import find

__all__ = ["JsonLines"]


class JsonLines(ClosedAtItsEnd):
    """A source over local files that hold one event a line, resumable at every line.

    `path`: a file, or a pattern such as `"logs/*.jsonl.gz"`, whose files are read one after the other, sorted by
    name. Names that end in `.gz` are decompressed. `decode` reads one line, without its newline. Blank lines
    are skipped. A line on which `decode` raises is a `DeadLetter` in its place; a damaged or truncated gzip file is
    read up to the damage, a `DeadLetter` stands there, and the next file follows.

    A position is `{"path": ..., "offset": n}`: n bytes of that file, decompressed, have been read. (Damage counts as
    one byte, so that there is a position behind it.) Memory: about 1 MiB and the longest line, several times over.

    `follow`: `path` is one log that is being written. Its old files are read first, oldest first, then the log itself;
    at its end a `read` waits, looking every `poll` seconds, until there is more; it ends, with an empty list, after
    `idle` seconds without any (None: never), when `close` is called, or when SIGTERM or SIGINT comes (in the main
    thread). A last line is an event when its newline has come. Rotation is followed through: by rename, by copying
    and truncating, with old files that are compressed, once or several times also while nobody reads. `rotated`: a
    pattern of the old files, `"logs/clicks-*.jsonl.gz"`; None: the log's name followed by "." or "-" and a number or a
    date, and by ".gz" or not. Numbers of up to three digits right behind the log's name count backwards, as logrotate's
    do; else names are in order.

    Following, a position also says by what its file is known again: inode and a hash of its first KiB, for names
    move. What can have been lost is never passed over in silence, it is a `DeadLetter` of category "gap": where the
    file of a position is gone, or a log was truncated and no copy is there; and what is written to an old file when the
    log has gone on is one of category "late", with those bytes. docs/sources.md has what cannot be known.

    Raises `SourceError` where there is no such file, or no file fits the pattern; following, where the folder is not
    there: the log may come later.

    >>> JsonLines("clicks.jsonl")
    Traceback (most recent call last):
        ...
    streamrec.errors.SourceError: no file 'clicks.jsonl'; check the path
    """

    _chunk = 1 << 20

    # what __del__ needs, also where __init__ raised
    _source: Files | Followed | None = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        decode: Callable[[bytes], Event] = decode_event,
        follow: bool = False,
        rotated: str | None = None,
        poll: float = 0.1,
        idle: float | None = None,
    ) -> None:
        form = Json(decode)
        if follow:
            self._source = Followed(path, rotated=rotated, poll=poll, idle=idle, chunk=self._chunk, form=form)
            return
        for name, value in (("rotated", rotated), ("idle", idle)):
            if value is not None:
                raise ConfigError(f"{name}={value!r} is for a log that is followed: add follow=True")
        self._source = Files(find(path), chunk=self._chunk, form=lambda path: (form, 0))

    def close(self) -> None:
        """Close the open file, if any. The position stays; a later `read` opens the file again.

        Following, it ends a `read` that waits in another thread, and later ones return the empty list until `seek`.
        """
        if self._source is not None:
            self._source.close()

    @property
    def size(self) -> int:
        """The size of all files in bytes on disk, when the source was made; of a log that is followed, now."""
        return self._kind.size

    def fraction(self) -> float | None:
        """The share of `size` read so far, in [0, 1]; None where the files are empty, or followed."""
        return self._kind.fraction()

    def wait(self, seconds: float) -> bool:
        """Wait until the next `read` returns at once; False where that has not come in so many seconds."""
        return self._kind.wait(seconds)

    def read(self, limit: int) -> list[Item]:
        """The next events, at most `limit`, with a `DeadLetter` for what could not be read; an empty list at the end.

        Raises `SourceError` where a file cannot be opened or read any more; the position is then that before the call.
        """
        if limit < 1:
            raise ConfigError(f"limit must be >= 1, got {limit!r}")
        return self._kind.read(limit)

    def position(self) -> Position:
        """Where the next unread line starts: `{"path": ..., "offset": n}`, n in the file's decompressed bytes; and,
        following, by what that file is known."""
        return self._kind.position()

    def seek(self, position: Position) -> None:
        """Go to a position. In a gzip file this decompresses what stands before.

        Raises `SourceError` where the path is not among the files, or the offset is behind the file's end.
        """
        self._kind.seek(*place(position), position)

    @property
    def _kind(self) -> Files | Followed:
        assert self._source is not None
        return self._source
