"""Encode: impressions to a `Batch`, by a schema and nothing else.

Encoding remembers nothing, so that trainer, service and archive see the same batch for the same impression. It
never fails either: a value that cannot be used counts as unknown (or, in a list, not at all), and is reported as a
`Problem`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamrec._compile import compiled
from streamrec.batch import Batch
from streamrec.events import Impression
from streamrec.preprocessors.hashing import hash_bytes, joined, xxh64
from streamrec.schema import Field, Id, Ids, Number, Schema, Text

NoneType = type(None)

__all__ = ["Encoded", "Encoder", "Problem", "encode"]

# A lone surrogate, which no text holds; its bytes, ed b3 bf, are in no UTF-8: "unknown" cannot be somebody's value.
UNKNOWN = "\udcff"


class Problem(NamedTuple):
    """A value that could not be used: the row of its impression, its field, and what was wrong and done."""

    row: int
    field: str
    reason: str


class Encoded(NamedTuple):
    """A batch, and the values that could not be used in it."""

    batch: Batch
    problems: Sequence[Problem]


class Encoder:
    """Turns impressions into batches by a schema.

    The id of a value is XXH64 of its UTF-8 bytes, seeded by XXH64 of the field's name, seeded by the schema's seed.
    A row holds one entry for each `Id` and `Number`, in the schema's order, then those of its `Ids`.

    >>> from streamrec import Id, Ids, Impression, Schema
    >>> encoder = Encoder(Schema(Id("user"), Ids("genres")))
    >>> shown = Impression(id="i1", time=0.0, user="u1", item="p9", features={"genres": ["a", "b"]})
    >>> encoder([shown]).batch.values
    array([1. , 0.5, 0.5], dtype=float32)
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        seeds = {f.name: hash_bytes(f.name.encode(), schema.seed) for f in schema}
        places = {f.name: place for place, f in enumerate(schema)}
        self._columns = [(f, _column(f)) for f in schema if isinstance(f, Id)]
        self._numbers = [(f, _column(f)) for f in schema if isinstance(f, Number)]
        self._lists = [(f, _column(f)) for f in schema if isinstance(f, Ids)]
        self._texts = [(f, _column(f)) for f in schema if isinstance(f, Text)]
        single = [f for f in schema if isinstance(f, (Id, Number))]
        offsets = {f.name: offset for offset, f in enumerate(single)}

        def seeds_of(fields: Sequence[tuple[Field, Any]]) -> NDArray[np.uint64]:
            return np.array([seeds[f.name] for f, _ in fields], dtype=np.uint64)

        def places_of(fields: Sequence[tuple[Field, Any]]) -> NDArray[np.int32]:
            return np.array([places[f.name] for f, _ in fields], dtype=np.int32)

        def offsets_of(fields: Sequence[tuple[Field, Any]]) -> NDArray[np.int64]:
            return np.array([offsets[f.name] for f, _ in fields], dtype=np.int64)

        numbers = [f for f, _ in self._numbers]
        self._plan = (
            *(seeds_of(self._columns), places_of(self._columns), offsets_of(self._columns)),
            *(len(schema), places_of(self._numbers), offsets_of(self._numbers)),
            *(_ids_of_numbers(b"", numbers, seeds), _ids_of_numbers(b"\xff", numbers, seeds)),
            *(np.array([f.log for f in numbers], dtype=np.bool_), np.array([f.scale for f in numbers], dtype=float)),
            *(seeds_of(self._lists), places_of(self._lists)),
        )

    def __call__(self, impressions: Sequence[Impression]) -> Encoded:
        """Encode these impressions, a row each, in their order."""
        problems: list[Problem] = []
        count = len(impressions)
        features = [shown.features for shown in impressions]
        strings: list[str] = []
        for field, column in self._columns:
            strings += _strings(column(impressions, features), field.name, problems)
        numbers = np.empty((len(self._numbers), count))
        for place, (number, column) in enumerate(self._numbers):
            numbers[place] = _floats(column(impressions, features), number.name, problems)
        lengths = np.empty((len(self._lists), count), dtype=np.int64)
        uneven: list[tuple[int, int, list[float]]] = []  # list, row and weights, where those are not all 1/n
        for place, (several, column) in enumerate(self._lists):
            lengths[place], rows = _flatten(column(impressions, features), several, strings, problems)
            uneven += [(place, row, weights) for row, weights in rows]
        data, cuts = joined(strings)
        assembled = _assemble(count, data, cuts, numbers, lengths, *self._plan)
        ids, values, fields, starts, ends = assembled
        for place, row, weights in uneven:
            behind = int(ends[row] - lengths[place:, row].sum())
            values[behind : behind + len(weights)] = weights
        times = np.array([shown.time for shown in impressions], dtype=np.float64)
        if not self._texts:
            return Encoded(Batch(ids, values, fields, starts, ends, times=times), problems)
        texts, refs = self._read_texts(impressions, features, problems)
        return Encoded(Batch(ids, values, fields, starts, ends, texts, refs, times), problems)

    def _read_texts(
        self, impressions: Sequence[Impression], features: Sequence[Mapping[str, Any]], problems: list[Problem]
    ) -> tuple[Sequence[str], NDArray[np.int32]]:
        distinct: dict[str, int] = {}
        refs = np.full((len(impressions), len(self._texts)), -1, dtype=np.int32)
        for place, (field, column) in enumerate(self._texts):
            for row, value in enumerate(column(impressions, features)):
                if isinstance(value, str):
                    refs[row, place] = distinct.setdefault(value, len(distinct))
                elif value is not None:
                    problems.append(Problem(row, field.name, f"not a text: {_short(value)}; taken as unknown"))
        return tuple(distinct), refs


def encode(schema: Schema, impressions: Sequence[Impression]) -> Encoded:
    """Encode once. To encode again and again, keep an `Encoder`."""
    return Encoder(schema)(impressions)


def _column(field: Field) -> Callable[[Sequence[Impression], Sequence[Mapping[str, Any]]], list[Any]]:
    """What reads a field's values, a row each: from the impressions for "user" and "item", else from the features."""
    name = field.name
    if name == "user":
        return lambda impressions, _: [shown.user for shown in impressions]
    if name == "item":
        return lambda impressions, _: [shown.item for shown in impressions]
    return lambda _, features: [known.get(name) for known in features]


def _ids_of_numbers(value: bytes, fields: Sequence[Number], seeds: Mapping[str, int]) -> NDArray[np.int64]:
    return np.array([hash_bytes(value, seeds[f.name]) for f in fields], dtype=np.uint64).view(np.int64)


def _short(value: object) -> str:
    try:
        shown = repr(value)
    except ValueError:  # an integer of over 4300 digits
        shown = f"a {type(value).__name__} too long to print"
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _string(value: object) -> str | None:
    """An id's text: strings as they are, integers and booleans as they print; None for what cannot be an id."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (int, np.integer, np.bool_)):
        return None
    try:
        return str(value)
    except ValueError:  # over 4300 digits
        return None


def _strings(column: list[Any], name: str, problems: list[Problem]) -> list[str]:
    """The texts of a column of single ids, unknown ones marked."""
    if set(map(type, column)) <= {str}:
        return column
    strings = []
    for row, value in enumerate(column):
        text = UNKNOWN if value is None else _string(value)
        if text is None:
            problems.append(Problem(row, name, f"not an id: {_short(value)}; taken as unknown"))
            text = UNKNOWN
        strings.append(text)
    return strings


def _floats(column: list[Any], name: str, problems: list[Problem]) -> NDArray[np.float64]:
    """The numbers of a column, nan where unknown."""
    if set(map(type, column)) <= {float, int}:
        try:
            floats = np.array(column, dtype=np.float64)
            if np.isfinite(floats).all():
                return floats
        except OverflowError:  # an integer beyond float64
            pass
    floats = np.full(len(column), math.nan)
    for row, value in enumerate(column):
        if value is None:
            continue
        number = math.nan
        if isinstance(value, (int, float, np.integer, np.floating, np.bool_)):
            with contextlib.suppress(OverflowError):
                number = float(value)
        if math.isfinite(number):
            floats[row] = number
        else:
            problems.append(Problem(row, name, f"not a finite number: {_short(value)}; taken as unknown"))
    return floats


def _flatten(
    column: list[Any], field: Ids, strings: list[str], problems: list[Problem]
) -> tuple[list[int], list[tuple[int, list[float]]]]:
    """Append a column's values to `strings`; return how many each row has, and the weights where they are not 1/n."""
    if set(map(type, column)) <= {list, NoneType}:  # nearly always
        lists = [value or [] for value in column]
        flat = list(chain.from_iterable(lists))
        if set(map(type, flat)) <= {str}:
            lengths = list(map(len, lists))
            if max(lengths, default=0) <= field.limit and lengths == list(map(len, map(set, lists))):
                strings += flat
                return lengths, []
    lengths, uneven = [], []
    for row, value in enumerate(column):
        shares = _shares(value, row, field, problems) if value is not None else {}
        strings += shares
        lengths.append(len(shares))
        uneven.append((row, list(shares.values())))
    return lengths, uneven


def _shares(value: Any, row: int, field: Ids, problems: list[Problem]) -> dict[str, float]:
    """The weight of each distinct id in one row's value."""

    def problem(reason: str) -> None:
        problems.append(Problem(row, field.name, reason))

    if isinstance(value, str):
        value = [value]
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=lambda member: _string(member) or "")  # its own order differs between processes
    if not isinstance(value, (list, tuple, Mapping)):
        problem(f"not a list or mapping of ids: {_short(value)}; left out")
        return {}
    if len(value) > field.limit:
        problem(f"{len(value)} values, over the limit of {field.limit}; the first {field.limit} were used")
    items = list(value.items() if isinstance(value, Mapping) else ((member, 1.0) for member in value))[: field.limit]
    shares: dict[str, float] = {}
    for member, given in items:
        text = _string(member)
        if text is None:
            problem(f"not an id: {_short(member)}; left out")
        elif not isinstance(given, (int, float, np.integer, np.floating)) or not -1e30 <= given <= 1e30:
            problem(f"not a finite weight: {_short(given)} of {_short(member)}; left out")
        else:
            shares[text] = shares.get(text, 0.0) + float(given)
    if isinstance(value, Mapping) or not shares:
        return shares
    total = sum(shares.values())
    return {text: count / total for text, count in shares.items()}


@compiled()
def _assemble(
    rows: int,
    data: Any,
    cuts: Any,
    numbers: Any,
    counts: Any,
    column_seeds: Any,
    column_fields: Any,
    column_offsets: Any,
    field_count: int,
    number_fields: Any,
    number_offsets: Any,
    number_ids: Any,
    unknown_ids: Any,
    logs: Any,
    scales: Any,
    list_seeds: Any,
    list_fields: Any,
) -> Any:
    """The columns of a batch, row after row, from the texts and numbers, field after field."""
    single = len(column_seeds) + len(number_fields)
    starts = np.empty(rows, dtype=np.int64)
    ends = np.empty(rows, dtype=np.int64)
    at = 0
    for row in range(rows):
        starts[row] = at
        at += single
        for k in range(len(list_seeds)):
            at += counts[k, row]
        ends[row] = at
    ids = np.empty(at, dtype=np.int64)
    values = np.empty(at, dtype=np.float32)
    fields = np.empty(at, dtype=np.int32)
    text = 0
    begin = 0
    for k in range(len(column_seeds)):
        for row in range(rows):
            entry = starts[row] + column_offsets[k]
            ids[entry] = np.int64(xxh64(data, begin, cuts[text], column_seeds[k]))
            values[entry] = 1.0
            fields[entry] = column_fields[k]
            begin = cuts[text] + 1
            text += 1
    for k in range(len(number_fields)):
        for row in range(rows):
            entry = starts[row] + number_offsets[k]
            x = numbers[k, row]
            fields[entry] = number_fields[k]
            if math.isnan(x):
                fields[entry] += field_count
                ids[entry] = unknown_ids[k]
                values[entry] = 1.0
            else:
                if logs[k]:
                    x = math.copysign(math.log1p(abs(x)), x)
                ids[entry] = number_ids[k]
                values[entry] = min(max(x / scales[k], -1e30), 1e30)  # so that float32 holds it
    filled = starts + single
    for k in range(len(list_seeds)):
        for row in range(rows):
            for entry in range(filled[row], filled[row] + counts[k, row]):
                ids[entry] = np.int64(xxh64(data, begin, cuts[text], list_seeds[k]))
                values[entry] = 1.0 / counts[k, row]
                fields[entry] = list_fields[k]
                begin = cuts[text] + 1
                text += 1
            filled[row] += counts[k, row]
    return ids, values, fields, starts, ends
