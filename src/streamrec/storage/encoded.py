"""EncodedRows: labeled rows in Parquet files, encoded once and read in every epoch.

The files lie in the folder `rows` of a URI. They are written first, each under a name of its own, and then `rows.json`,
which names them in order and holds the schema: only that makes them a data set. So whoever writes a part twice, as a
cluster does when it has lost a worker, leaves a file that nobody reads.

A row is the columns `ids`, `values` and `fields` (lists of its entries), `time`, `label`, `weight`, and `texts` where
the schema has text fields (a list with null where there is none).
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import msgspec
import numpy as np
from fsspec.core import url_to_fs
from numpy.typing import NDArray

from streamrec.batch import Batch, LabeledRows
from streamrec.errors import ConfigError, DamagedError, StoreError
from streamrec.protocols import State
from streamrec.schema import Schema, Text
from streamrec.storage._folders import Folder, folder

__all__ = ["EncodedRows", "Part", "commit_rows", "write_part"]

FORMAT = 1
GROUP = 65_536  # rows of a row group: what is in memory at a time
_INDEX = "rows.json"


class Part(msgspec.Struct, frozen=True):
    """One file: its name, its rows, and the event times of the first and the last of them (0 where it has none)."""

    name: str
    rows: int
    first: float = 0.0
    last: float = 0.0


class _Index(msgspec.Struct):
    format: int
    schema: dict[str, Any]
    parts: list[Part]
    counts: dict[str, int]


class EncodedRows:
    """A source of labeled rows over a data set of encoded ones, as `streamrec.adapters.dask.prepare` makes it.

    `uri`: a path or any fsspec URI. Needs pyarrow: `pip install "streamrec[dask]"`. Holds one row group of one file in
    memory, 65,536 rows. Raises `StoreError` where there is no such data set and `DamagedError` where it cannot be read.

    >>> from streamrec import EncodedRows, Id, Impression, Schema
    >>> from streamrec.batch import LabeledRows
    >>> from streamrec.preprocessors import encode
    >>> schema, one = Schema(Id("user")), np.ones(1, dtype=np.float32)
    >>> shown = encode(schema, [Impression("i1", 5.0, "u1", "p9")]).batch
    >>> commit_rows("memory://rows", schema, [write_part("memory://rows", "part-0", [LabeledRows(shown, one, one)])])
    >>> rows = EncodedRows("memory://rows")
    >>> len(rows), rows.span(), rows.read(10).labels
    (1, (5.0, 5.0), array([1.], dtype=float32))
    """

    def __init__(self, uri: str) -> None:
        _arrow()
        self.uri = uri
        self._folder = folder(uri, "rows")
        index = _index(self._folder)
        self.schema = Schema.from_dict(index.schema)
        """What the rows are encoded by."""
        self.counts: Mapping[str, int] = index.counts
        """What became of the events they were made of, where that is known."""
        self.parts: Sequence[Part] = tuple(index.parts)
        """The files, in order."""
        self._select(range(len(self.parts)))

    def _select(self, places: Sequence[int]) -> None:
        self._chosen = [self.parts[place] for place in places]
        self._ends = list(accumulate(part.rows for part in self._chosen))
        self._row = 0
        self._held: tuple[int, int, LabeledRows] | None = None  # number of the first row, of the one after the last

    def __len__(self) -> int:
        """How many rows."""
        return self._ends[-1] if self._ends else 0

    def __repr__(self) -> str:
        return f"<EncodedRows {self.uri}: {len(self):,} rows in {len(self._chosen)} files>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.uri, [self.parts.index(part) for part in self._chosen])

    def only(self, places: Sequence[int]) -> EncodedRows:
        """A source over these of its files alone, at its first row."""
        return _reopened(self.uri, places)

    def since(self, time: float) -> EncodedRows:
        """A source over those of its files that have rows of this event time or later, at its first row."""
        return _reopened(self.uri, [self.parts.index(part) for part in self._chosen if part.last >= time])

    def by_file(self) -> list[EncodedRows]:
        """A source over each of its files, in order."""
        return [_reopened(self.uri, [self.parts.index(part)]) for part in self._chosen]

    def read(self, limit: int) -> LabeledRows | None:
        """The next rows, `limit` of them unless it ends before; None at the end."""
        if limit < 1:
            raise ConfigError(f"limit must be >= 1 row, got {limit!r}")
        found: list[LabeledRows] = []
        while limit and self._row < len(self):
            first, end, group = self._group()
            many = min(limit, end - self._row)
            found.append(group.take(slice(self._row - first, self._row - first + many)))
            self._row += many
            limit -= many
        # never arrow's own memory: it is read-only, for which the loops would be compiled anew
        return LabeledRows.concatenated(found) if len(found) > 1 else found[0].compact() if found else None

    def _group(self) -> tuple[int, int, LabeledRows]:
        """The row group that holds the next row."""
        if self._held is None or not self._held[0] <= self._row < self._held[1]:
            parquet = _arrow()
            place = int(np.searchsorted(self._ends, self._row, side="right"))
            part = self._chosen[place]
            first = self._ends[place] - part.rows
            try:
                with self._open(part.name) as file:
                    content = parquet.ParquetFile(file)
                    for number in range(content.num_row_groups):
                        rows = content.metadata.row_group(number).num_rows
                        if self._row < first + rows:
                            group = _rows(content.read_row_group(number), len(_texts(self.schema)))
                            self._held = first, first + rows, group
                            return self._held
                        first += rows
            except FileNotFoundError as error:
                raise DamagedError(f"{self.uri} lacks the file {part.name}: prepare it again") from error
            except (OSError, ValueError, KeyError) as error:  # arrow's errors are these
                raise DamagedError(f"{self.uri}: {part.name} cannot be read: {error}; prepare it again") from error
            raise DamagedError(f"{self.uri}: {part.name} has fewer rows than it should have; prepare it again")
        return self._held

    def _open(self, name: str) -> Any:
        fs, path = url_to_fs(self._folder.uri)
        return fs.open(f"{path.rstrip('/')}/{name}", "rb")

    def span(self) -> tuple[float, float] | None:
        """The event times of the first and the last of all rows; None where there is none."""
        filled = [part for part in self._chosen if part.rows]
        return (min(part.first for part in filled), max(part.last for part in filled)) if filled else None

    def fraction(self) -> float:
        """The share of the rows that has been read."""
        return self._row / len(self) if len(self) else 1.0

    def state_dict(self) -> State:
        """`row`: how many have been read."""
        return {"row": self._row}

    def load_state_dict(self, state: State) -> None:
        """Go on from there. Raises `StoreError` where there are not so many rows."""
        if not 0 <= state["row"] <= len(self):
            raise StoreError(
                f"{self.uri} has {len(self)} rows, the state is of row {state['row']}: it is of another data set"
            )
        self._row = int(state["row"])


def write_part(uri: str, name: str, parts: Sequence[LabeledRows]) -> Part:
    """Write these rows as one Parquet file of the data set at `uri`, whole or not at all; returns what it is.

    `name`: what its file name begins with; the rest is random. Raises `StoreError` where it cannot be written.
    """
    parquet = _arrow()
    rows = LabeledRows.concatenated(parts) if parts else None
    target = folder(uri, "rows")
    token = secrets.token_hex(4)
    file = f"{name}-{token}.parquet"
    if rows is None or not len(rows.labels):
        return Part(file, 0)
    content = io.BytesIO()
    parquet.write_table(_table(rows), content, compression="zstd", row_group_size=GROUP)
    try:
        target.make()
        target.write(file, [content.getbuffer()], token)
    except OSError as error:
        raise StoreError(f"cannot write to {target.uri}: {error}") from error
    times = rows.batch.times
    return Part(file, len(rows.labels), float(times.min()), float(times.max()))


def commit_rows(uri: str, schema: Schema, parts: Sequence[Part], counts: Mapping[str, int] = {}) -> None:
    """Make these files, in this order, the data set at `uri`, in place of what was there; other files are removed."""
    target = folder(uri, "rows")
    kept = [part for part in parts if part.rows]
    try:
        target.make()
        content = msgspec.json.encode(_Index(FORMAT, schema.to_dict(), kept, dict(counts)))
        target.write(_INDEX, [content], secrets.token_hex(4))
        names = {part.name for part in kept}
        for name in target.names():
            if name.endswith(".parquet") and name not in names:
                target.remove(name)
    except OSError as error:
        raise StoreError(f"cannot write to {target.uri}: {error}") from error


def _index(where: Folder) -> _Index:
    try:
        content = where.read(_INDEX).tobytes()
    except FileNotFoundError as error:
        raise StoreError(
            f"there is no data set of encoded rows in {where.uri}: streamrec.adapters.dask.prepare makes one"
        ) from error
    except OSError as error:
        raise StoreError(f"cannot read {where.uri}: {error}") from error
    try:
        index = msgspec.json.decode(content, type=_Index)
    except msgspec.MsgspecError as error:
        raise DamagedError(f"{where.uri}/{_INDEX} is damaged: {error}") from error
    if index.format != FORMAT:
        raise StoreError(f"{where.uri} has format {index.format}, this streamrec reads {FORMAT}: prepare it again")
    return index


def _reopened(uri: str, places: Sequence[int]) -> EncodedRows:
    rows = EncodedRows(uri)
    rows._select(places)
    return rows


def _arrow() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError('encoded rows are Parquet files: pip install "streamrec[dask]"') from error
    return parquet


def _texts(schema: Schema) -> list[Text]:
    return [field for field in schema if isinstance(field, Text)]


def _table(rows: LabeledRows) -> Any:
    import pyarrow

    batch = rows.batch.compact()
    offsets = np.append(batch.starts, len(batch.ids)).astype(np.int32)
    columns: dict[str, Any] = {}
    for name in ("ids", "values", "fields"):
        entries = pyarrow.array(getattr(batch, name))
        kind = pyarrow.list_(pyarrow.field("element", entries.type, nullable=False))
        columns[name] = pyarrow.ListArray.from_arrays(offsets, entries, type=kind)
    columns |= {"time": batch.times, "label": rows.labels, "weight": rows.weights}
    columns = {name: pyarrow.array(column) for name, column in columns.items()}
    # said of each column and entry that none is null, for else Parquet keeps and reads of each entry whether it is
    fields = [pyarrow.field(name, column.type, nullable=False) for name, column in columns.items()]
    if batch.text_refs.size:
        texts = [*batch.texts, None]  # a reference of -1 reads the last
        columns["texts"] = pyarrow.array(
            [[texts[ref] for ref in refs] for refs in batch.text_refs.tolist()], pyarrow.list_(pyarrow.string())
        )
        fields.append(pyarrow.field("texts", columns["texts"].type))
    return pyarrow.table(columns, schema=pyarrow.schema(fields))


def _rows(table: Any, text_fields: int) -> LabeledRows:
    """Views of the table, which nobody may write to."""

    def column(name: str) -> Any:
        return table.column(name).combine_chunks()

    ids = column("ids")
    offsets: NDArray[np.int64] = ids.offsets.to_numpy().astype(np.int64)
    cut = slice(int(offsets[0]), int(offsets[-1]))
    offsets -= offsets[0]
    flat = [column(name).values.to_numpy()[cut] for name in ("ids", "values", "fields")]
    label, weight, time = (column(name).to_numpy() for name in ("label", "weight", "time"))
    texts: dict[str, int] = {}
    refs = np.zeros((0, 0), dtype=np.int32)
    if text_fields:
        refs = np.array(
            [
                [-1 if text is None else texts.setdefault(text, len(texts)) for text in row]
                for row in column("texts").to_pylist()
            ],
            dtype=np.int32,
        ).reshape(len(label), text_fields)
    batch = Batch(flat[0], flat[1], flat[2], offsets[:-1], offsets[1:], [*texts], refs, time)
    return LabeledRows(batch, label, weight)
