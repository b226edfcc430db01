"""Pieces: an archive of events, cut where it can be read from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Union

import fsspec
import msgspec
from fsspec.core import url_to_fs

from streamrec._event_columns import Layout, Named, Rows, seconds_of
from streamrec.errors import ConfigError, SourceError
from streamrec.events import DeadLetter, Decoded, Event, Item, decode_event, decode_lines
from streamrec.sources.parquet import opened

__all__ = ["Piece", "pieces_of"]

AT_ONCE = 4096
_MAX_RAW = 4096


class JsonPiece(msgspec.Struct, frozen=True):
    """The lines of a file that begin at `begin` or later and before `end`; of a packed file, all."""

    uri: str
    begin: int
    end: int

    def events(self, decode: Callable[[bytes], Event]) -> Iterator[Sequence[Item]]:
        for lines, start in self._lines():
            yield from _decoded(lines, self.uri, start, decode)

    def spans(self, decode: Callable[[bytes], Event]) -> Iterator[tuple[float, float]] | None:
        """The first and the last time of some events, then of the next ones, as far as can be told without a look at
        their features. None where that takes `decode`; raises a `ValueError` where it does for some line."""
        if decode is not decode_event:
            return None
        chunks = (lines[n : n + AT_ONCE] for lines, _ in self._lines() for n in range(0, len(lines), AT_ONCE))
        times = ([one.time for one in map(_timed.decode, chunk)] for chunk in chunks)
        return ((min(some), max(some)) for some in times)

    def _lines(self) -> Iterator[tuple[list[bytes], int]]:
        """Lines, and where the first of them begins."""
        with fsspec.open(self.uri, "rb", compression="infer") as file:
            if self.begin:
                file.seek(self.begin - 1)
                file.readline()  # the line that the piece before has begun
            at, rest, more = file.tell(), b"", True
            while more and (at < self.end or self.end < 0):
                block = file.read(1 << 20)  # readlines(hint) is not known to all file systems
                more = bool(block)
                lines = (rest + block).split(b"\n") if more else [rest] if rest else []
                rest = lines.pop() if more else b""
                kept, start = [], at
                for line in lines:
                    if at >= self.end >= 0:
                        break
                    kept.append(line)
                    at += len(line) + more  # its newline
                yield kept, start


class _Shown(msgspec.Struct, frozen=True, tag_field="type", tag="impression", gc=False):
    time: float


class _Clicked(msgspec.Struct, frozen=True, tag_field="type", tag="feedback", gc=False):
    time: float


_timed = msgspec.json.Decoder(Union[_Shown, _Clicked])


def _decoded(lines: list[bytes], uri: str, at: int, decode: Callable[[bytes], Event]) -> Iterator[Sequence[Item]]:
    for begin in range(0, len(lines), AT_ONCE):
        some = lines[begin : begin + AT_ONCE]
        good = decode_lines(some) if decode is decode_event else None  # blank lines are not good: below
        if good is not None:
            yield Decoded(good)
            at += sum(map(len, some)) + len(some)
            continue
        items: list[Item] = []
        for line in some:
            content = line.strip()
            if content:
                try:
                    items.append(decode(content))
                except Exception as error:  # whatever a user's own decode raises
                    items.append(_letter({"path": uri, "offset": at}, error, content))
            at += len(line) + 1
        yield items


def _letter(position: Mapping[str, Any], error: Exception, raw: bytes) -> DeadLetter:
    return DeadLetter(position, f"malformed: {error}"[:500], raw[:_MAX_RAW])


_LAYOUT = Layout(None, None, None, "s")


class ParquetPiece(msgspec.Struct, frozen=True):
    """One row group of a Parquet file of events, laid out as `streamrec.sources.Parquet` has it."""

    uri: str
    group: int

    def events(self, decode: Callable[[bytes], Event]) -> Iterator[Sequence[Item]]:
        with self._opened() as (file, named):
            table = file.read_row_group(self.group, columns=[*named.fields.values(), *named.features])
            first = sum(file.metadata.row_group(number).num_rows for number in range(self.group))
        rows = Rows(table.combine_chunks(), named, _LAYOUT.scale, lambda row: (self.uri, first + row))
        for begin in range(0, table.num_rows, AT_ONCE):
            yield rows.slice(begin, min(begin + AT_ONCE, table.num_rows)).events()

    def spans(self, decode: Callable[[bytes], Event]) -> Iterator[tuple[float, float]] | None:
        """As of a `JsonPiece`. None where there is no row."""
        with self._opened() as (file, named):
            column = file.read_row_group(self.group, columns=[named.fields["time"]]).column(0)
        times = seconds_of(column, _LAYOUT.scale)
        return iter([(float(times.min()), float(times.max()))]) if len(times) else None

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Named]]:
        """The file, and what its columns are. Raises `SourceError`."""
        fs, path = url_to_fs(self.uri)
        try:
            with opened(fs, path, self.group) as file:
                yield file, _LAYOUT.named(file.schema_arrow.names, repr(self.uri))
        except SourceError:
            raise
        except Exception as error:  # broad on purpose: a damaged file raises whatever its first odd byte leads to
            raise SourceError(f"cannot read {self.uri!r} as Parquet: {error}") from error


class ListPiece(msgspec.Struct, frozen=True):
    """The items of one partition of a bag: events, mappings, or lines of JSON."""

    items: list[Any]

    def spans(self, decode: Callable[[bytes], Event]) -> None:
        """None: it takes a look at each."""

    def events(self, decode: Callable[[bytes], Event]) -> Iterator[Sequence[Item]]:
        for begin in range(0, len(self.items), AT_ONCE):
            some = self.items[begin : begin + AT_ONCE]
            yield [_item(one, {"row": begin + n}, decode) for n, one in enumerate(some)]


def _item(one: Any, position: Mapping[str, Any], decode: Callable[[bytes], Event]) -> Any:
    if isinstance(one, Mapping):
        return event_of(one, position)
    if isinstance(one, (str, bytes)):
        line = one.encode("utf-8", "surrogatepass") if isinstance(one, str) else one
        try:
            return decode(line)
        except Exception as error:  # whatever a user's own decode raises
            return _letter(position, error, line)
    return one  # an event, or something that `Validate` will put aside


_FIELDS = {
    *("type", "id", "time", "user", "item", "features", "score"),
    *("impression_id", "kind", "value", "impression", "label", "weight"),
}


def event_of(row: Mapping[str, Any], position: Mapping[str, Any]) -> Item:
    """A row of a table as an event: columns by the names of its fields, every other column a feature; null is absent.

    >>> event_of({"type": "impression", "id": "i1", "time": 0.0, "user": "u1", "item": "p1", "price": 5.0}, {}).features
    {'price': 5.0}
    """
    known = {name: value for name, value in row.items() if value is not None}
    features = known.pop("features", {})
    try:
        if isinstance(features, (str, bytes)):
            features = json.loads(features)
        elif isinstance(features, list):  # a map column
            features = dict(features)
        others = {name: known.pop(name) for name in [*known] if name not in _FIELDS}
        if known.get("type") == "impression":
            known["features"] = {**{n: v for n, v in features.items() if v is not None}, **others}
        event: Event = msgspec.convert(known, Event, strict=False)
    except (ValueError, TypeError, RecursionError, AttributeError) as error:
        return _letter(position, error, repr(row).encode("utf-8", "replace"))
    return event


Piece = Union[JsonPiece, ParquetPiece, ListPiece]


def pieces_of(archive: Any, size: int) -> list[Any]:
    """The pieces of files, in order, of about `size` bytes each where they are lines of JSON; a bag's partitions, as
    delayed lists, and a DataFrame's are returned as they are. Raises `SourceError` or `ConfigError`."""
    if hasattr(archive, "to_delayed"):
        return list(archive.to_delayed())
    uris = [archive] if isinstance(archive, str) else list(archive)
    if not uris or not all(isinstance(uri, str) for uri in uris):
        raise ConfigError(f"the archive must be a URI or a list of them, or a Dask bag or DataFrame, got {archive!r}")
    found: list[Any] = []
    for uri in uris:
        try:
            fs, path = url_to_fs(uri)
            names = sorted(fs.glob(path)) if "*" in path or "?" in path else [path]
            files = [one for name in names for one in (sorted(fs.find(name)) if fs.isdir(name) else [name])]
            for name in files:
                found += _file(fs, name, str(fs.unstrip_protocol(name)), size)
        except (OSError, ValueError) as error:
            raise SourceError(f"cannot read {uri!r}: {error}; check the URI") from error
    if not found:
        raise SourceError(f"there is nothing in {archive!r}; check the URI")
    return found


def _file(fs: Any, name: str, uri: str, size: int) -> list[Any]:
    if name.endswith(".parquet"):
        from pyarrow import parquet

        with fs.open(name, "rb") as file:
            return [ParquetPiece(uri, group) for group in range(parquet.ParquetFile(file).num_row_groups)]
    if name.endswith((".gz", ".bz2", ".xz", ".zip")):
        return [JsonPiece(uri, 0, -1)]
    total = int(fs.size(name))
    count = max(1, round(total / size))
    cuts = [total * n // count for n in range(count + 1)]
    return [JsonPiece(uri, begin, end) for begin, end in pairwise(cuts)]
