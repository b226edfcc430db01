"""Events in columns: how the rows of a table become events, and events rows.

The default layout has one row an event: `type` ("impression", "feedback" or "labeled"), `time`, `id`, `user`, `item`,
`score`, `features` (a JSON object, a struct or a map), `impression_id`, `kind`, `value`, `label`, `weight`, each null
where it does not apply. A labeled row has the fields of its impression, too. Every other column is a feature of its
name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamrec.errors import ConfigError, SourceError
from streamrec.events import DeadLetter, Decoded, Event, Feedback, Impression, Item, Labeled

__all__ = ["FIELDS", "KINDS", "Layout", "Named", "Rows", "arrow", "seconds_of", "table_of", "time_of"]

FIELDS = (
    *("type", "time", "id", "user", "item", "score", "features"),
    *("impression_id", "kind", "value", "label", "weight"),
)
KINDS = ("impression", "feedback", "labeled")
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_NEEDED = {
    "impression": ("time", "id", "user", "item"),
    "feedback": ("time", "id", "impression_id"),
    "labeled": ("time", "id", "user", "item", "label"),
}
_decode_features = msgspec.json.Decoder(dict[str, Any]).decode


def arrow() -> Any:
    """pyarrow, or how to get it."""
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError('Parquet needs pyarrow: pip install "streamrec[parquet]"') from error
    return pyarrow


class Named(NamedTuple):
    """The columns of one table: which column each field is, which are features, and what kind of rows these are where
    no column says so."""

    fields: Mapping[str, str]
    features: tuple[str, ...]
    kind: str | None


class Layout:
    """How a user's columns are named.

    `columns`: the column of a field, where it is not called as the field. `features`: the columns that are features;
    None: all that are no fields. `kind`: what the rows are, where no column `type` says so; None: labeled with a column
    `label`, feedback with `impression_id`, else impressions. `unit`: of numbers in `time`.
    """

    def __init__(
        self, columns: Mapping[str, str] | None, features: Sequence[str] | None, kind: str | None, unit: str
    ) -> None:
        self.columns = dict(columns or {})
        unknown = sorted(set(self.columns) - set(FIELDS))
        if unknown:
            raise ConfigError(f"columns names {unknown[0]!r}, which is no field of an event: {', '.join(FIELDS)}")
        if isinstance(features, str):
            raise ConfigError(f"features must be names of columns, in a list, got {features!r}")
        if kind is not None and kind not in KINDS:
            raise ConfigError(f"kind must be one of {', '.join(KINDS)}, or None, got {kind!r}")
        if unit not in _UNITS:
            raise ConfigError(f"time_unit must be one of {', '.join(_UNITS)}, got {unit!r}")
        self.features = None if features is None else tuple(features)
        self.kind = kind
        self.scale = _UNITS[unit]

    def named(self, present: Sequence[str], where: str) -> Named:
        """The columns of a table that has these. Raises `SourceError` where one that is needed is not among them."""
        fields = {field: self.columns.get(field, field) for field in FIELDS}
        for field, column in fields.items():
            if field in self.columns and column not in present:
                raise SourceError(f"{where} has no column {column!r} for {field!r}; it has {', '.join(present)}")
        fields = {field: column for field, column in fields.items() if column in present}
        taken = set(fields.values())
        features = tuple(name for name in present if name not in taken) if self.features is None else self.features
        for name in features:
            if name not in present:
                raise SourceError(f"{where} has no column {name!r} for a feature; it has {', '.join(present)}")
        kind = self.kind
        if kind is None and "type" not in fields:
            kind = "labeled" if "label" in fields else "feedback" if "impression_id" in fields else "impression"
        if "time" not in fields:
            raise SourceError(
                f'{where} has no column "time"; name it, columns={{"time": ...}}; it has {", ".join(present)}'
            )
        if kind is not None:
            fields.pop("type", None)
            missing = [field for field in _NEEDED[kind] if field not in (*fields, "id")]
            if missing:
                raise SourceError(
                    f"{where} has no column {missing[0]!r}, which rows of {kind!r} need; name it, "
                    f"columns={{{missing[0]!r}: ...}}; it has {', '.join(present)}"
                )
        return Named(fields, features, kind)


def seconds_of(column: Any, scale: float) -> NDArray[np.float64]:
    """float64 `(rows,)`: the times of a column in POSIX seconds, nan where there is none."""
    pa = arrow()
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode() if not isinstance(column, pa.ChunkedArray) else column.combine_chunks()
        kind = column.type
    if pa.types.is_date(kind):
        column, kind = column.cast(pa.timestamp("ms")), pa.timestamp("ms")
    if pa.types.is_timestamp(kind):
        scale = _UNITS[kind.unit]
        column = column.cast(pa.int64())
    elif not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise SourceError(f"times must be numbers, dates or timestamps, the column is of {kind}")
    nulls = column.null_count
    valid = None if not nulls else column.is_valid().to_numpy(zero_copy_only=False)
    if nulls:
        column = column.fill_null(0)
    told = column.to_numpy(zero_copy_only=False)
    unit = round(1 / scale)
    if unit > 1 and told.dtype.kind in "iu":
        whole, part = np.divmod(told, unit)  # nanoseconds since 1970 are more than a float64 holds
        values: NDArray[np.float64] = whole.astype(np.float64) + part / unit
    else:
        values = told.astype(np.float64) / unit
    if valid is not None:
        values = np.where(valid, values, np.nan)
    return values


# -- rows to events ----------------------------------------------------------------------------------------------------

Place = Callable[[int], tuple[str, int]]
"""Of a row, its file and its number there."""


class Rows:
    """Rows of an arrow table whose columns are looked at as lists, None where there is none.

    `words`: of columns that are coded by a dictionary, its strings, looked up once for all slices of a table. Rows of
    several types are put apart at once, and not for each slice: of each type its rows, and which of all they are.
    """

    def __init__(self, table: Any, named: Named, scale: float, place: Place) -> None:
        self.count = table.num_rows
        self.named = named
        self.scale = scale
        self.place = place
        self.row = asdict_of(named.features)
        self._parts: list[tuple[NDArray[np.int64], Rows]] = []
        if named.kind is None:
            types = by_type(table.column(named.fields["type"]))
            if len(types) > 1 or not {*types} <= {*KINDS}:
                for kind, rows in types.items():
                    known = kind if kind in KINDS else repr(kind)  # what is none has a reason to be given
                    self._parts.append((rows, self._part(table.take(rows), named._replace(kind=known), rows)))
                return
            self.named = named = named._replace(kind=next(iter(types), "impression"))
        self.table = table
        pa = arrow()
        coded = [field.name for field in table.schema if pa.types.is_dictionary(field.type)]
        if coded:
            self.table = table = table.unify_dictionaries()
        self.words = {
            name: np.array(_strings(table.column(name).chunk(0).dictionary), dtype=object)
            for name in coded
            if table.column(name).num_chunks and not table.column(name).null_count
        }

    def _part(self, table: Any, named: Named, rows: NDArray[np.int64]) -> Rows:
        return Rows(table, named, self.scale, lambda row: self.place(int(rows[row])))

    def slice(self, start: int, end: int) -> Rows:
        """Some of them."""
        part = copy.copy(self)
        part.count, part.place = end - start, lambda row: self.place(start + row)
        if not self._parts:
            part.table = self.table.slice(start, end - start)
        part._parts = []
        for rows, of_type in self._parts:
            begin, stop = np.searchsorted(rows, [start, end]).tolist()
            if begin < stop:
                part._parts.append((rows[begin:stop] - start, of_type.slice(begin, stop)))
        return part

    def events(self) -> list[Item]:
        """Their events, a dead letter in the place of a row that is none."""
        if not self.count:
            return Decoded()
        if not self._parts:
            return self._of_kind(self.named.kind)
        out = np.empty(self.count, dtype=object)
        sound = True
        for rows, of_type in self._parts:
            found = of_type.events()
            sound &= type(found) is Decoded
            out[rows] = found
        return Decoded(out.tolist()) if sound else out.tolist()

    def strings(self, field: str) -> list[Any]:
        """The values of a field."""
        return self._strings(self.named.fields[field])

    def _strings(self, name: str) -> list[Any]:
        column, words = _whole(self.table.column(name)), self.words.get(name)
        if words is None:
            return _strings(column)
        found: list[Any] = words[column.indices.to_numpy()].tolist()
        return found

    def _floats(self, field: str, otherwise: float | None) -> list[Any]:
        if field not in self.named.fields:
            return [otherwise] * self.table.num_rows
        found = _floats(self.table.column(self.named.fields[field]))
        return found if otherwise is None else [otherwise if one is None else one for one in found]

    def _kinds(self) -> list[Any]:
        if "kind" not in self.named.fields:
            return ["click"] * self.table.num_rows
        return ["click" if one is None else one for one in self.strings("kind")]

    def _of_kind(self, kind: str | None) -> list[Item]:
        fields, rows = self.named.fields, self.table.num_rows
        if kind not in KINDS:
            return [self._letter(row, f"its type is {kind}, none of {', '.join(KINDS)}") for row in range(self.count)]
        times = seconds_of(self.table.column(fields["time"]), self.scale)
        reasons: dict[int, str] = {}
        if not np.isfinite(times).all():
            bad = np.flatnonzero(~np.isfinite(times)).tolist()
            reasons = dict.fromkeys(bad, "its time is missing or no finite number")
        columns: dict[str, list[Any]] = {"time": times.tolist()}
        columns["id"] = (
            self.strings("id") if "id" in fields else ["{}:{}".format(*self.place(row)) for row in range(rows)]
        )
        needed = [field for field in _NEEDED[kind] if field not in columns]
        for field in needed:
            columns[field] = self._floats(field, None) if field == "label" else self.strings(field)
        for field in ("id", *needed):
            if None in columns[field]:
                for row, value in enumerate(columns[field]):
                    if value is None:
                        reasons.setdefault(row, f"its {field} is missing")
        if kind == "feedback":
            number = self._floats("value", None)
            names = columns["id"], columns["impression_id"]
            made: list[Any] = [*map(Feedback, *names, columns["time"], self._kinds(), number)]
            sound = True
        else:
            features, sound = self._features(reasons)
            number = self._floats("score", None)
            names = columns["user"], columns["item"]
            made = [*map(Impression, columns["id"], columns["time"], *names, features, number)]
        known = [] if number.count(None) == len(number) else [one for one in number if one is not None]
        sound = sound and not reasons and all(map(math.isfinite, known))
        if kind == "labeled":
            made = [*map(Labeled, made, columns["label"], self._kinds(), self._floats("weight", 1.0))]
            sound = False  # what a label may be, nobody has checked
        for row, reason in reasons.items():
            made[row] = self._letter(row, reason)
        return Decoded(made) if sound else made

    def _features(self, reasons: dict[int, str]) -> tuple[list[Any], bool]:
        """The features of each row, and whether all of them are plain and finite."""
        rows, names = self.table.num_rows, self.named.features
        told: list[Any] | None = None
        plain = True
        if "features" in self.named.fields:
            whole = self.table.column(self.named.fields["features"])
            plain = not arrow().types.is_nested(whole.type)
            told = _decoded(self.strings("features"), reasons) if plain else _mappings(whole)
        if not names:
            return ([{} for _ in range(rows)] if told is None else told), plain
        columns, missing, sound = [], False, plain
        for name in names:
            column = self.table.column(name)
            if name in self.words:
                columns.append(self._strings(name))
            else:
                values, fine = _plain(column)
                columns.append(values)
                sound &= fine
                missing |= column.null_count > 0
        if missing:  # what is null is not known
            made = [
                {name: value for name, value in zip(names, row, strict=True) if value is not None}
                for row in zip(*columns, strict=True)
            ]
        else:
            made = self.row(columns)
        if told is not None:
            made = [{**one, **other} for one, other in zip(told, made, strict=True)]
        return made, sound

    def _letter(self, row: int, reason: str) -> DeadLetter:
        path, number = self.place(row)
        raw = repr(self.table.slice(row, 1).to_pylist()[0]).encode("utf-8", "replace")[:4096]
        return DeadLetter({"path": path, "row": number}, f"malformed: row {number} of {path!r}: {reason}"[:500], raw)


def by_type(column: Any) -> dict[str | None, NDArray[np.int64]]:
    """Of each string in a column, or None, its rows."""
    pa = arrow()
    column = _whole(column)
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    words: list[str | None] = [*_strings(column.dictionary), None]
    return {words[code]: np.flatnonzero(codes == code) for code in np.unique(codes).tolist()}


def asdict_of(names: Sequence[str]) -> Callable[[Sequence[list[Any]]], list[Any]]:
    """What makes one dict a row from columns of these names."""
    if len(set(names)) == len(names) and all(name.isidentifier() and name[:2] != "__" for name in names):
        # twice as fast as dict(zip()): msgspec makes the object, and the dict of it, in C
        kind = msgspec.defstruct("Row", [(name, Any) for name in names], gc=False)
        return lambda columns: [*map(msgspec.structs.asdict, map(kind, *columns))]
    return lambda columns: [dict(zip(names, row)) for row in zip(*columns)]  # noqa: B905  equally long


def _decoded(texts: list[str | None], reasons: dict[int, str]) -> list[Any]:
    """Features that are JSON objects; none where there is no text."""
    with suppress(TypeError, ValueError, RecursionError):  # which one it is, and why, the careful way finds
        if texts.count(None):
            return [{} if text is None else _decode_features(text) for text in texts]
        return [*map(_decode_features, texts)]  # type: ignore[arg-type]
    made: list[Any] = []
    for row, text in enumerate(texts):
        try:
            made.append({} if text is None else _decode_features(text))
        except (ValueError, RecursionError) as error:
            made.append({})
            reasons.setdefault(row, f"its features are no JSON object: {error}")
    return made


def _mappings(column: Any) -> list[Any]:
    """Features that are structs or maps; what is null is not known."""
    return [{name: value for name, value in dict(one or {}).items() if value is not None} for one in column.to_pylist()]


# -- columns to lists: pyarrow's own to_pylist makes an object of each value first -------------------------------------


def _whole(column: Any) -> Any:
    pa = arrow()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return column


def _strings(column: Any) -> list[Any]:
    """Strings, None where there is none; numbers become their text."""
    pa = arrow()
    column = _whole(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_integer(kind):
        return [None if one is None else str(one) for one in _plain(column)[0]]
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        column = column.cast(pa.string())
    values: list[Any] = column.to_numpy(zero_copy_only=False).tolist()
    return values


def _floats(column: Any) -> list[Any]:
    """Floats, None where there is none."""
    pa = arrow()
    column = _whole(column)
    if column.null_count == len(column):
        return [None] * len(column)
    return _plain(column.cast(pa.float64()))[0]


def _plain(column: Any) -> tuple[list[Any], bool]:
    """Values as JSON has them, None where there is none; and whether no float among them is nan or infinite."""
    pa = arrow()
    column = _whole(column)
    kind = column.type
    if pa.types.is_dictionary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _strings(column), True
    if pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        valid = column.is_valid().to_numpy(zero_copy_only=False) if column.null_count else None
        filled = column if valid is None else column.fill_null(False if pa.types.is_boolean(kind) else 0)
        values = filled.to_numpy(zero_copy_only=False)
        fine = not pa.types.is_floating(kind) or bool(np.isfinite(values).all())
        made: list[Any] = values.tolist()
        if valid is not None:
            made = [value if there else None for value, there in zip(made, valid.tolist(), strict=True)]
        return made, fine
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        times = seconds_of(column, 1.0).tolist()
        return [None if one != one else one for one in times], True
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        values, fine = _plain(column.flatten())
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        ends = np.cumsum(lengths).tolist()
        made = [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        if column.null_count:
            valid = column.is_valid().to_numpy(zero_copy_only=False)
            made = [value if there else None for value, there in zip(made, valid.tolist(), strict=True)]
        return made, fine
    return column.to_pylist(), False


# -- events to rows ----------------------------------------------------------------------------------------------------


def table_of(events: Sequence[Event]) -> Any:
    """An arrow table in the default layout; `Rows` gives back what stands in it."""
    pa = arrow()
    rows: dict[str, list[Any]] = {field: [] for field in FIELDS}
    for event in events:
        shown = event.impression if isinstance(event, Labeled) else event
        told: dict[str, Any] = {"type": type(event).__name__.lower(), "time": float(shown.time), "id": shown.id}
        if isinstance(shown, Impression):
            told |= {"user": shown.user, "item": shown.item, "score": shown.score}
            told["features"] = msgspec.json.encode(shown.features).decode() if shown.features else None
        else:
            told |= {"impression_id": shown.impression_id, "kind": shown.kind, "value": shown.value}
        if isinstance(event, Labeled):
            told |= {"label": event.label, "kind": event.kind, "weight": event.weight}
        for field in FIELDS:
            rows[field].append(told.get(field))
    floats = ("time", "score", "value", "label", "weight")
    return pa.table(
        {name: pa.array(each, pa.float64() if name in floats else pa.string()) for name, each in rows.items()}
    )


def time_of(value: Any) -> float:
    """POSIX seconds of a number or a time as pyarrow's statistics give them."""
    if isinstance(value, datetime):
        return (value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)).timestamp()
    return float(value)
