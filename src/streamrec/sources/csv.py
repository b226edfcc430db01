"""Csv: events in the rows of files of comma-separated values."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import msgspec

from streamrec._event_columns import Layout, Named
from streamrec.errors import ConfigError, SourceError
from streamrec.events import Event, Feedback, Impression, Item, Labeled, Position
from streamrec.sources._closing import ClosedAtItsEnd
from streamrec.sources._files import Files, place
from streamrec.sources._lines import Lines
from streamrec.sources._readers import DamagedGzip, find, opened

__all__ = ["Csv"]

_MAX_RECORD = 1 << 20


class Csv(ClosedAtItsEnd):
    """A source over local files of comma-separated values, in UTF-8, resumable at every row.

    `path`: a file, or a pattern such as `"exports/*.csv.gz"`, whose files are read one after the other, sorted by name;
    the first line of each names its columns. Which of them is what: as in `Parquet`, by `columns`, `features`, `kind`
    and `time_unit`; a column `id` is needed. A value that is empty is none. Times are numbers or ISO 8601, in UTC where
    they name no zone. Features are strings, but for the columns `numbers`, and those of `lists`, which gives what
    separates their strings: `{"genres": "|"}`. Values may be quoted and then hold `delimiter` and newlines, a row up to
    1 MiB.

    A row that is no event is a `DeadLetter` in its place. Positions and memory are those of `JsonLines`.
    """

    _chunk = 1 << 20

    # what __del__ needs, also where __init__ raised
    _files: Files | None = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        columns: Mapping[str, str] | None = None,
        features: Sequence[str] | None = None,
        numbers: Sequence[str] = (),
        lists: Mapping[str, str] | None = None,
        kind: str | None = None,
        time_unit: str = "s",
        delimiter: str = ",",
    ) -> None:
        if not (isinstance(delimiter, str) and len(delimiter) == 1 and delimiter not in '"\r\n'):
            raise ConfigError(f"delimiter must be one character, got {delimiter!r}")
        if isinstance(numbers, str):
            raise ConfigError(f"numbers must be names of columns, in a list, got {numbers!r}")
        self._layout = Layout(columns, features, kind, time_unit)
        self._numbers = frozenset(numbers)
        self._lists = dict(lists or {})
        self._delimiter = delimiter
        self._source = self._files = Files(find(path), chunk=self._chunk, form=self._form)

    def close(self) -> None:
        """Close the open file, if any. The position stays; a later `read` opens the file again."""
        if self._files is not None:
            self._files.close()

    def fraction(self) -> float | None:
        """The share of the bytes read so far, in [0, 1]; None where the files are empty."""
        return self._source.fraction()

    def read(self, limit: int) -> list[Item]:
        """The next events, at most `limit`, with a `DeadLetter` for a row that is none; an empty list at the end.

        Raises `SourceError` where a file cannot be read, or has not the columns it needs; the position is then that
        before the call.
        """
        if limit < 1:
            raise ConfigError(f"limit must be >= 1, got {limit!r}")
        return self._source.read(limit)

    def position(self) -> Position:
        """Where the next unread row starts: `{"path": ..., "offset": n}`, n in the file's decompressed bytes."""
        return self._source.position()

    def seek(self, position: Position) -> None:
        """Go to a position. Raises `SourceError` where its path is not among the files, or it is behind the end."""
        self._source.seek(*place(position), position)

    def _form(self, path: str) -> tuple[_Rows, int]:
        """How the rows of a file become events, and where the first one begins."""
        head = _Rows(self._delimiter)
        lines = Lines(path, opened(path, 0, self._chunk), 0, chunk=self._chunk, form=head)
        try:
            first = lines.first()
        except DamagedGzip:
            first = None
        finally:
            lines.close()
        if first is None:
            return head, 0  # an empty file
        names = head.cells([first.decode("utf-8-sig", "replace")])[0]
        named = self._layout.named(names, repr(path))
        if "id" not in named.fields:
            raise SourceError(f'{path!r} has no column "id"; name it, columns={{"id": ...}}; it has {", ".join(names)}')
        unknown = [name for name in (*self._numbers, *self._lists) if name not in named.features]
        if unknown:
            raise SourceError(f"{path!r} has no feature {unknown[0]!r}; it has {', '.join(named.features)}")
        form = _Rows(self._delimiter, names, named, round(1 / self._layout.scale), self._numbers, self._lists)
        return form, len(first) + 1


class _Rows:
    """How records become events."""

    json = False

    def __init__(
        self,
        delimiter: str,
        names: Sequence[str] = (),
        named: Named | None = None,
        unit: int = 1,
        numbers: frozenset[str] = frozenset(),
        lists: Mapping[str, str] | None = None,
    ) -> None:
        self._delimiter = delimiter
        self._count = len(names)
        self._unit = unit
        self._kind = named.kind if named is not None else None
        fields = named.fields if named is not None else {}
        self._fields = {field: names.index(column) for field, column in fields.items()}
        self._features = [
            (name, names.index(name), name in numbers, (lists or {}).get(name))
            for name in (named.features if named is not None else ())
        ]

    def join(self, lines: list[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Records: a line with an odd number of quotes goes on in the next one."""
        if not any(b'"' in line for line in lines):
            return lines, []
        records: list[bytes] = []
        begun: list[bytes] = []
        at = 0
        while at < len(lines):
            line = lines[at]
            at += 1
            odd = line.count(b'"') % 2 == 1
            if not begun and not odd:
                records.append(line)
                continue
            begun.append(line)
            if odd and len(begun) > 1:
                records.append(b"\n".join(begun))
                begun = []
            elif (
                sum(map(len, begun)) > _MAX_RECORD
            ):  # a quote that nobody has closed: its line is bad, not all behind it
                records.append(begun[0])
                at -= len(begun) - 1
                begun = []
        return records, begun

    def cells(self, texts: Sequence[str]) -> list[list[str]]:
        return list(csv.reader(texts, delimiter=self._delimiter, strict=True))

    def many(self, lines: Sequence[bytes]) -> Sequence[Item] | None:
        try:
            rows = self.cells([line.decode() for line in lines])
            return [*map(self._event, rows)] if len(rows) == len(lines) else None
        except (ValueError, RecursionError, csv.Error):
            return None  # which one it is, and why, the careful way finds

    def one(self, line: bytes) -> Event:
        (row,) = self.cells([line.decode()])
        return self._event(row)

    def _event(self, row: Sequence[str]) -> Event:
        if len(row) != self._count:
            raise ValueError(f"{len(row)} values for {self._count} columns")
        fields = self._fields
        kind = self._kind or row[fields["type"]]
        time = _time(self._text(row, "time"), self._unit)
        id = self._text(row, "id")
        if kind == "feedback":
            shown_id = self._text(row, "impression_id")
            return Feedback(id, shown_id, time, self._text(row, "kind", "click"), self._number(row, "value"))
        if kind not in ("impression", "labeled"):
            raise ValueError(f"type {kind!r} is none of impression, feedback, labeled")
        features: dict[str, Any] = {}
        told = self._text(row, "features", "")
        if told:
            features = msgspec.json.decode(told, type=dict[str, Any])
        for name, at, number, separator in self._features:
            if text := row[at]:
                features[name] = _finite(text) if number else text.split(separator) if separator else text
        user, item = self._text(row, "user"), self._text(row, "item")
        shown = Impression(id, time, user, item, features, self._number(row, "score"))
        if kind == "impression":
            return shown
        label, weight = self._number(row, "label"), self._number(row, "weight")
        if label is None:
            raise ValueError("its label is missing")
        return Labeled(shown, label, self._text(row, "kind", "click"), 1.0 if weight is None else weight)

    def _text(self, row: Sequence[str], field: str, otherwise: str | None = None) -> str:
        at = self._fields.get(field)
        text = row[at] if at is not None else ""
        if text:
            return text
        if otherwise is None:
            raise ValueError(f"its {field} is missing")
        return otherwise

    def _number(self, row: Sequence[str], field: str) -> float | None:
        text = self._text(row, field, "")
        return _finite(text) if text else None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is no finite number")
    return value


def _time(text: str, unit: int) -> float:
    try:
        return _finite(text) / unit
    except ValueError:
        told = datetime.fromisoformat(text[:-1] + "+00:00" if text[-1:] in "Zz" else text)
        return (told if told.tzinfo is not None else told.replace(tzinfo=timezone.utc)).timestamp()
