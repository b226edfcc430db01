"""The lines of one file, as items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

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
from streamrec.sources._readers import DamagedGzip, Reader, unreadable

__all__ = ["Form", "Json", "Lines", "Taken", "letter", "read_one"]

_EVENTS = (Impression, Feedback, Labeled)
_MAX_REASON = 500


class Taken(list[Item]):
    """Items on their way out of a source. `sound`: all are as `Decoded` has them. `lines`: those that were events in
    JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.sound = True
        self.lines: list[bytes] = []

    def given(self) -> list[Item]:
        """What the source gives."""
        if not self.sound:
            return list(self)
        return Decoded(self, lines=self.lines if len(self.lines) == len(self) else None)


class Form(Protocol):
    """How a line becomes an event. `json`: it is one in the default JSON form, where `many` gives events."""

    json: bool

    def join(self, lines: list[bytes]) -> tuple[list[bytes], list[bytes]]:
        """What stands on lines, where that may be several; and the lines of what is not at its end yet."""
        ...

    def many(self, lines: Sequence[bytes]) -> Sequence[Item] | None:
        """The events of these lines, where all are in the default JSON form; None, and nothing done, where not."""
        ...

    def one(self, line: bytes) -> Any:
        """The event of a line. May raise whatever it likes: the line is a dead letter then."""
        ...


class Json:
    """A line is what `decode` reads."""

    json = True

    def __init__(self, decode: Callable[[bytes], Event]) -> None:
        self.one = decode

    def join(self, lines: list[bytes]) -> tuple[list[bytes], list[bytes]]:
        return lines, []

    def many(self, lines: Sequence[bytes]) -> Sequence[Item] | None:
        # nearly all are good; where not, the careful way finds which one it is, and why
        return decode_lines(lines) if self.one is decode_event else None


class Lines:
    """The lines of one file from an offset on. `offset` is where the next unread one stands, in decompressed bytes."""

    def __init__(self, path: str, reader: Reader, offset: int, *, chunk: int, form: Form) -> None:
        self.path = path
        self.reader = reader
        self.offset = offset
        self._chunk = chunk
        self._form = form
        self._lines: list[bytes] = []
        self._next = 0
        self._tail = b""  # the start of a line whose end has not been read yet
        self._unfinished = False  # the last of the lines has no newline
        self._damage: str | None = None

    @property
    def unfinished(self) -> bool:
        """Whether the start of a line is held whose end has not been written."""
        return bool(self._tail)

    def close(self) -> None:
        """Close the file."""
        self.reader.close()

    def ready(self) -> bool:
        """Whether there is a line, or damage; reads on where none is held."""
        return self._held() or self._fill(whole=False)

    def _held(self) -> bool:
        return self._next < len(self._lines) or self._damage is not None

    def first(self) -> bytes | None:
        """The next line, as it stands and not passed over; None where there is none."""
        return self._lines[self._next] if (self._held() or self._fill(whole=True)) and self._lines else None

    def take(self, items: Taken, limit: int, *, whole: bool = True) -> None:
        """Add items until there are `limit` of them or the file ends.

        `whole`: the file's end is the end of its last line, with or without a newline. A reader that raises leaves
        `offset` behind what was added, and the lines behind it to be read again.
        """
        while len(items) < limit and (self._held() or self._fill(whole=whole)):
            self._decode(items, limit)
            if self._damage is not None and self._next == len(self._lines):
                items.append(self._damaged())
                items.sound = False

    def _fill(self, *, whole: bool) -> bool:
        """Read on to the end of at least one line, or to damage; False at the end of the file."""
        parts = [self._tail]
        self._tail, self._lines, self._next = b"", [], 0
        while True:
            try:
                chunk = self.reader.read(self._chunk)
            except DamagedGzip as error:
                # What stands between the last newline and the damage belongs to the damage, even where it decodes:
                # a line cut short may well look whole to a `decode` of the user's.
                self._tail, self._damage = b"".join(parts), str(error)
                return True
            except OSError as error:
                raise unreadable(self.path, error) from error
            if not chunk:
                line = b"".join(parts)
                if not whole:
                    self._tail = line
                    return False
                self._lines, self._unfinished = ([line], True) if line else ([], False)
                return bool(line)
            end = chunk.rfind(b"\n")
            if end < 0:
                parts.append(chunk)  # joined once, at the line's end: a long line costs its length, not its square
                continue
            parts.append(chunk[:end])
            self._tail = chunk[end + 1 :]
            self._lines, begun = self._form.join(b"".join(parts).split(b"\n"))
            if begun:
                self._tail = b"\n".join([*begun, self._tail])
            if self._lines:
                return True
            parts, self._tail = [self._tail], b""

    def _decode(self, items: Taken, limit: int) -> None:
        """Decode lines that were read ahead until there are `limit` items."""
        offset, start = self.offset, self._next
        # One slice holds as many lines as are wanted; where some are blank, `take` comes back for more.
        lines = self._lines[start : start + limit - len(items)]
        events = self._form.many(lines)
        if events is not None:
            items += events
            if self._form.json:
                items.lines += lines
            offset += sum(map(len, lines)) + len(lines)
        else:
            items.sound = False
            offset = self._decode_each(items, lines, offset)
        self._next = start + len(lines)
        if self._unfinished and self._next == len(self._lines):
            offset -= 1
            self._unfinished = False
        self.offset = offset

    def _decode_each(self, items: list[Item], lines: list[bytes], offset: int) -> int:
        """Decode lines one by one, the first of which stands at `offset`; return where the next one stands."""
        for line in lines:
            if line and not line.isspace():
                items.append(read_one(self._form.one, line, {"path": self.path, "offset": offset}))
            offset += len(line) + 1
        return offset

    def _damaged(self) -> DeadLetter:
        """The letter for the damage that was found; the position goes behind it."""
        position = {"path": self.path, "offset": self.offset}
        reason = f"malformed: damaged gzip file {self.path!r}: {self._damage}"
        self.offset += len(self._tail) + 1
        raw, self._tail, self._damage = self._tail, b"", None
        return letter(position, reason, raw)


def read_one(decode: Callable[[bytes], Any], raw: bytes, position: Position) -> Item:
    """The event that `decode` reads, or a dead letter that says what is wrong."""
    try:
        event = decode(raw)
    except Exception as error:
        # Broad on purpose: `decode` may be the user's, and no bytes, however odd, may stop the stream.
        return letter(position, f"malformed: {error} ({type(error).__name__})", raw)
    if isinstance(event, _EVENTS):
        return event
    return letter(position, f"malformed: decode returned a {type(event).__name__}, which is no event", raw)


def letter(position: Position, reason: str, raw: bytes = b"") -> DeadLetter:
    """A dead letter, its reason no longer than is good for anybody."""
    return DeadLetter(position=position, reason=reason[:_MAX_REASON], raw=raw)
