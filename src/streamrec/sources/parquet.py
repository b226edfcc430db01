"""Parquet: events in the rows of Parquet files, in event-time order."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from fsspec.core import url_to_fs

from streamrec._event_columns import Layout, Named, Rows, arrow, seconds_of, time_of
from streamrec.errors import ConfigError, SourceError
from streamrec.events import DeadLetter, Decoded, Item, Position
from streamrec.sources._lines import letter

__all__ = ["Parquet"]

_SLICE = 1_024  # rows made into events at a time: a call costs as much as a hundred of them
_SMALL = 3.0  # bytes a string of a column whose strings repeat, so that a dictionary of them is worth it


class Group(NamedTuple):
    """A row group: its file, its number there, its rows, and its first and last time."""

    path: str
    number: int
    rows: int
    first: float
    last: float


class Parquet:
    """A source over the rows of Parquet files, in event-time order, resumable at every row.

    `uri`: a file, a folder (its `.parquet` files, also those in folders in it, such as `date=2026-01-31/hour=07`), or a
    pattern; a path or any fsspec URI. Names that begin with "_" or "." are passed over.

    One row is one event. Columns are named as the fields of events are: `type`, `time`, `id`, `user`, `item`, `score`,
    `features` (JSON, a struct or a map), `impression_id`, `kind`, `value`, `label`, `weight`; all others are features;
    null is none. `columns`: where a column is called otherwise, `{"user": "customer_id"}`. `features`: only these
    columns. `kind`: what the rows are, `"impression"`, `"feedback"` or `"labeled"`, where no column `type` says so;
    None: labeled with a column `label`, feedback with `impression_id`, else impressions. `time_unit`: of a time that is
    a number. Without a column `id` the file and the row are the id. Users and items that are numbers become their text.
    A row that is no event is a `DeadLetter` in its place. The keys of folders are no features.

    Row groups are read one at a time, ordered by the times in their footers; those that overlap are read and sorted
    together, rows of the same time in the order of their files: at most `max_rows` rows, beyond which `SourceError`
    says which files to sort. `order="file"`: as they stand, files by name.

    A position names a row group, by its path below `uri`, and a row; files that are added behind it in time are read by
    a source made later. Rows that were added before it are not: a `DeadLetter` of category "gap" says how many.
    Needs pyarrow: `pip install "streamrec[parquet]"`. Memory: what `max_rows` bounds,
    twice while rows of several types are put apart, and 1,024 events.
    """

    def __init__(
        self,
        uri: str,
        *,
        columns: Mapping[str, str] | None = None,
        features: Sequence[str] | None = None,
        kind: str | None = None,
        time_unit: str = "s",
        order: str = "time",
        max_rows: int = 4_000_000,
    ) -> None:
        if order not in ("time", "file"):
            raise ConfigError(f'order must be "time" or "file", got {order!r}')
        if max_rows < 1:
            raise ConfigError(f"max_rows must be >= 1, got {max_rows!r}")
        arrow()
        self.uri = str(uri)
        self._sorts = order == "time"
        self._layout = Layout(columns, features, kind, time_unit)
        self._fs, root = url_to_fs(self.uri)
        self._root, paths = self._find(root.rstrip("/"))
        groups = [group for path in paths for group in self._groups(path, order)]
        self._blocks = _blocks(groups, order, max_rows)
        self._ends = list(accumulate(sum(group.rows for group in block) for block in self._blocks))
        self._row = 0
        self._held: tuple[int, Rows] | None = None  # the number of a block, and its rows
        self._ahead: tuple[int, list[Item]] = 0, []  # number of the first one's row
        self._gap: DeadLetter | None = None
        self._sought: Position = {}

    def __len__(self) -> int:
        """How many rows."""
        return self._ends[-1] if self._ends else 0

    def __repr__(self) -> str:
        return f"Parquet({self.uri!r})"

    def fraction(self) -> float | None:
        """The share of the rows read so far, in [0, 1]; None where there are none."""
        return self._row / len(self) if len(self) else None

    def read(self, limit: int) -> list[Item]:
        """The next events, at most `limit`, with a `DeadLetter` for a row that is none; an empty list at the end.

        Raises `SourceError` where a file cannot be read any more; the position is then that before the call.
        """
        if limit < 1:
            raise ConfigError(f"limit must be >= 1, got {limit!r}")
        if self._gap is not None:
            gap, self._gap = self._gap, None
            return [gap]
        if self._row >= len(self):
            return []
        first, ahead = self._ahead
        if not first <= self._row < first + len(ahead):
            del ahead
            self._ahead = 0, []  # first, so that its memory, which is in the cache, is used again
            first, ahead = self._ahead = self._row, self._make(self._row)
        start = self._row - first
        items = ahead[start : start + limit]
        self._row += len(items)
        return Decoded(items) if type(ahead) is Decoded else items

    def position(self) -> Position:
        """Where the next unread row stands: the `path` and the number, `group`, of its row group, its number `row` in
        what is read together with that, `rows` rows, and how many rows come `before` those."""
        if self._gap is not None:
            return dict(self._sought)
        if not self._blocks:
            return {"path": "", "group": 0, "rows": 0, "row": 0, "before": 0}
        block = max(0, bisect_right(self._ends, max(self._row - 1, 0)))
        before = self._ends[block - 1] if block else 0
        group = self._blocks[block][0]
        rows = self._ends[block] - before
        return {"path": group.path, "group": group.number, "rows": rows, "row": self._row - before, "before": before}

    def seek(self, position: Position) -> None:
        """Go to a position. Raises `SourceError` where it is none, or what is read together there has changed."""
        path, group, rows, row, before = (position.get(name) for name in ("path", "group", "rows", "row", "before"))
        numbers = [one for one in (group, rows, row, before) if type(one) is int]
        if not isinstance(path, str) or len(numbers) < 4 or not 0 <= numbers[2] <= numbers[1]:
            raise SourceError(f"no position {dict(position)!r} in {self.uri!r}: seek to what position() gave")
        number, rows, row, before = numbers
        self._gap = None
        if not path:
            self._row = 0  # of a source that had no rows: all there are now are new
            return
        found = next(
            (at for at, block in enumerate(self._blocks) if (block[0].path, block[0].number) == (path, number)), None
        )
        begins = 0 if not found else self._ends[found - 1]
        if found is None or self._ends[found] - begins != rows:
            raise SourceError(
                f"the rows at {dict(position)!r} are no longer read together in {self.uri!r}: its files have changed; "
                "bring them back, or begin anew"
            )
        self._row = begins + row
        if begins > before:
            reason = f"gap: {begins - before} rows were added to {self.uri!r} before the position; they are not read"
            self._gap, self._sought = letter(position, reason), position

    # -- files ---------------------------------------------------------------------------------------------------------

    def _find(self, root: str) -> tuple[str, list[str]]:
        """The folder that paths in positions are below, and the files, by name."""
        fs = self._fs
        try:
            if fs.isfile(root):
                return root.rpartition("/")[0], [root]
            if any(sign in root for sign in "*?["):
                found = [path for path in fs.glob(root) if fs.isfile(path)]
                root = root[: min(root.index(sign) for sign in "*?[" if sign in root)].rpartition("/")[0]
            elif fs.exists(root):
                found = [path for path in fs.find(root) if path.endswith(".parquet")]
            else:
                raise SourceError(f"no file or folder {self.uri!r}; check the path")
        except SourceError:
            raise
        except OSError as error:
            raise SourceError(f"cannot read {self.uri!r}: {error}") from error
        within = len(root) + 1
        kept = sorted(p for p in found if not any(part[:1] in ("_", ".") for part in p[within:].split("/")))
        if not kept:
            raise SourceError(f"no Parquet file in {self.uri!r}; check the folder")
        return root, kept

    def _groups(self, path: str, order: str) -> list[Group]:
        try:
            with opened(self._fs, path) as file:
                named = self._layout.named(file.schema_arrow.names, repr(path))
                below = path[len(self._root) :].lstrip("/")
                about = file.metadata
                paths = [about.schema.column(n).path for n in range(about.num_columns)]
                column = paths.index(named.fields["time"])
                found = []
                for number in range(about.num_row_groups):
                    rows = about.row_group(number).num_rows
                    if rows:
                        span = (0.0, 0.0) if order == "file" else self._span(file, number, column, named)
                        found.append(Group(below, number, rows, *span))
                return found
        except SourceError:
            raise
        except Exception as error:  # broad on purpose: a damaged file raises whatever its first odd byte leads to
            raise SourceError(f"cannot read {path!r} as Parquet: {error}") from error

    def _span(self, file: Any, number: int, column: int, named: Named) -> tuple[float, float]:
        told = file.metadata.row_group(number).column(column).statistics
        pa = arrow()
        kind = file.schema_arrow.field(named.fields["time"]).type
        plain = pa.types.is_floating(kind) or pa.types.is_integer(kind)
        if told is not None and told.has_min_max and plain:
            unit = round(1 / self._layout.scale)
            return time_of(told.min) / unit, time_of(told.max) / unit
        times = seconds_of(file.read_row_group(number, columns=[named.fields["time"]]).column(0), self._layout.scale)
        times = times[np.isfinite(times)]
        return (float(times.min()), float(times.max())) if len(times) else (-math.inf, -math.inf)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _make(self, row: int) -> list[Item]:
        """Some events from a row on, of its block."""
        block = bisect_right(self._ends, row)
        begins = self._ends[block - 1] if block else 0
        if self._held is None or self._held[0] != block:
            self._held = None  # first, so that two are never in memory
            self._held = (block, self._load(self._blocks[block]))
        rows = self._held[1]
        return rows.slice(row - begins, min(row - begins + _SLICE, self._ends[block] - begins)).events()

    def _load(self, groups: Sequence[Group]) -> Rows:
        """The rows of groups that are read together, sorted by time."""
        pa = arrow()
        tables, firsts = [], []
        for group in groups:
            path = f"{self._root}/{group.path}" if self._root else group.path
            try:
                with opened(self._fs, path, group.number) as file:
                    firsts.append(sum(file.metadata.row_group(n).num_rows for n in range(group.number)))
                    named = self._layout.named(file.schema_arrow.names, repr(path))
                    wanted = [*named.fields.values(), *named.features]
                    tables.append(file.read_row_group(group.number, columns=wanted))
            except Exception as error:  # broad on purpose, as above
                raise SourceError(f"cannot read {path!r}: {error}; bring back the file") from error
            if tables[-1].num_rows != group.rows:
                raise SourceError(f"{path!r} has changed while it was read; begin anew")
        table = tables[0]
        if len(tables) > 1:
            table = pa.concat_tables([_decoded(one) for one in tables], promote_options="permissive")
        named = self._layout.named(table.column_names, repr(self.uri))
        times = seconds_of(table.column(named.fields["time"]), self._layout.scale)
        times = np.where(np.isfinite(times), times, -np.inf)
        ends = np.cumsum([group.rows for group in groups])
        order = np.arange(len(times))
        if self._sorts and (times[1:] < times[:-1]).any():
            order = np.argsort(times, kind="stable")
            table = table.take(order)

        def place(row: int) -> tuple[str, int]:
            at = int(order[row])
            which = int(np.searchsorted(ends, at, side="right"))
            return groups[which].path, firsts[which] + at - (int(ends[which - 1]) if which else 0)

        return Rows(table.combine_chunks(), named, self._layout.scale, place)


@contextmanager
def opened(fs: Any, path: str, group: int | None = None) -> Iterator[Any]:
    """A file; to read a row group in which some columns repeat few strings, with those by their dictionaries."""
    from pyarrow import parquet

    with fs.open(path, "rb") as raw:
        with parquet.ParquetFile(raw) as file:
            repeating = [] if group is None else _repeating(file, group)
            if not repeating:
                yield file
                return
        with parquet.ParquetFile(raw, metadata=file.metadata, read_dictionary=repeating) as file:
            yield file


def _repeating(file: Any, group: int) -> list[str]:
    """The columns of strings that take next to nothing in a row group."""
    pa = arrow()
    about = file.metadata.row_group(group)
    columns = [about.column(number) for number in range(about.num_columns)]
    strings = {field.name for field in file.schema_arrow if pa.types.is_string(field.type)}
    return [
        one.path_in_schema
        for one in columns
        if one.path_in_schema in strings and one.total_uncompressed_size < _SMALL * one.num_values
    ]


def _decoded(table: Any) -> Any:
    """A table without dictionaries: those of several files differ."""
    pa = arrow()
    kinds = [field.type.value_type if pa.types.is_dictionary(field.type) else field.type for field in table.schema]
    fields = [pa.field(field.name, kind) for field, kind in zip(table.schema, kinds, strict=True)]
    return table.cast(pa.schema(fields))


def _blocks(groups: list[Group], order: str, max_rows: int) -> list[list[Group]]:
    """Row groups in order, those together whose times overlap."""
    if order == "file":
        return [[group] for group in groups]
    groups = sorted(groups, key=lambda group: group.first)  # stable: else by file and number
    blocks: list[list[Group]] = []
    last = -math.inf
    for group in groups:
        if blocks and group.first < last:
            blocks[-1].append(group)
        else:
            blocks.append([group])
        last = max(last, group.last)
    for block in blocks:
        if len(block) > 1 and sum(group.rows for group in block) > max_rows:
            rows = sum(group.rows for group in block)
            raise SourceError(
                f"the times of {len(block)} row groups from {block[0].path!r} on overlap, {rows:,} rows, more "
                f"than max_rows = {max_rows:,}: write files that are sorted by time, or read them as they "
                'stand with order="file"'
            )
    return blocks
