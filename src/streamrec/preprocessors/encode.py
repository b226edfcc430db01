"""Encode: impressions to a `Batch`, by a schema and nothing else.

Encoding remembers nothing, so that trainer, service and archive see the same batch for the same impression. It
never fails either: a value that cannot be used counts as unknown (or, in a list, not at all), and is reported as a
`Problem`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamrec.batch import Batch
from streamrec.events import Impression
from streamrec.hashing import hash_bytes, packed
from streamrec.preprocessors._assemble import UNKNOWN, assemble
from streamrec.preprocessors._one_row import Rows
from streamrec.schema import Field, Hour, Id, Ids, Number, Schema, Text, Weekday

NoneType = type(None)

__all__ = ["Encoded", "Encoder", "Problem", "encode", "texts_of"]

_OWN = ("user", "item")  # read from the impression itself
_NO_REFS = np.zeros((0, 0), dtype=np.int32)


_Reader = Callable[[Sequence[Impression], Sequence[Mapping[str, Any]]], Sequence[Any]]


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
    A row holds one entry for each `Id` and `Number`, in the schema's order, then those of its `Ids`. `only`: the fields
    to encode, by name; None: all. The entries are those that the whole row would have of them.

    >>> from streamrec import Id, Ids, Impression, Schema
    >>> encoder = Encoder(Schema(Id("user"), Ids("genres")))
    >>> shown = Impression(id="i1", time=0.0, user="u1", item="p9", features={"genres": ["a", "b"]})
    >>> encoder([shown]).batch.values
    array([1. , 0.5, 0.5], dtype=float32)
    """

    def __init__(self, schema: Schema, *, only: Collection[str] | None = None) -> None:
        self.schema = schema
        chosen = [f for f in schema if only is None or f.name in only]
        seeds = {f.name: hash_bytes(f.name.encode(), schema.seed) for f in schema}
        places = {f.name: place for place, f in enumerate(schema)}
        self._columns = [(f, _column(f)) for f in chosen if isinstance(f, Id)]
        self._numbers = [(f, _column(f)) for f in chosen if isinstance(f, Number)]
        self._lists = [(f, _column(f)) for f in chosen if isinstance(f, Ids)]
        every = [f for f in schema if isinstance(f, Text)]
        self._texts = [(place, f, _column(f)) for place, f in enumerate(every) if f in chosen]
        self._text_fields = len(every)
        single = [f for f in chosen if isinstance(f, (Id, Number))]
        offsets = {f.name: offset for offset, f in enumerate(single)}
        numbers = [f for f, _ in self._numbers]
        ids = [f for f, _ in self._columns]
        lists = [f for f, _ in self._lists]
        own: list[Any] = [*numbers, *lists]
        # uint64 (ids, 3), (numbers, 5), (lists, 2) and float64 (numbers,): what `_assemble` has to know of each field
        self._plan = (
            _table([(seeds[f.name], places[f.name], offsets[f.name]) for f in ids], 3),
            _table(
                [
                    *(
                        (
                            *(places[f.name], offsets[f.name], hash_bytes(b"", seeds[f.name])),
                            *(hash_bytes(b"\xff", seeds[f.name]), f.log),
                        )
                        for f in numbers
                    )
                ],
                5,
            ),
            np.array([f.scale for f in numbers], dtype=np.float64),
            _table([(seeds[f.name], places[f.name]) for f in lists], 2),
            len(schema),
        )
        self._single = len(single)
        self._since = [place for place, f in enumerate(numbers) if f.since]
        names = [f.name for f in (*ids, *own) if not _is_own(f)]
        self._pick = itemgetter(*names) if len(names) > 1 else None
        # numpy is slow with single values
        plain = not self._texts and not any(f.name in _OWN for f in own)
        self._rows = Rows(chosen, self._plan, _faultless) if plain else None

    def __call__(self, impressions: Sequence[Impression]) -> Encoded:
        """Encode these impressions, a row each, in their order."""
        if self._rows is not None and len(impressions) == 1:
            alone = self._rows.row
            if alone.take(impressions[0]):
                return Encoded(alone.copy(), [])
        problems: list[Problem] = []
        count = len(impressions)
        features = [shown.features for shown in impressions]
        strings: list[str] = []
        columns = self._read_columns(impressions, features)
        for field, _ in self._columns:
            strings += _strings(next(columns), field.name, problems)
        numbers = np.empty((len(self._numbers), count))
        for place, (number, _) in enumerate(self._numbers):
            numbers[place] = _floats(next(columns), number.name, problems)
        times = np.array([shown.time for shown in impressions], dtype=np.float64)
        for place in self._since:
            numbers[place] = times - numbers[place]
        lengths = np.empty((len(self._lists), count), dtype=np.int64)
        uneven: list[tuple[int, int, list[float]]] = []  # list, row and weights, where those are not all 1/n
        for place, (several, _) in enumerate(self._lists):
            lengths[place], rows = _flatten(next(columns), several, strings, problems)
            uneven += [(place, row, weights) for row, weights in rows]
        entries = count * self._single + int(lengths.sum())
        ids, values, fields, starts, ends = self._assembled(count, entries, strings, numbers, lengths)
        for place, row, weights in uneven:
            behind = int(ends[row] - lengths[place:, row].sum())
            values[behind : behind + len(weights)] = weights
        if not self._texts:
            return Encoded(Batch(ids, values, fields, starts, ends, (), _NO_REFS, times), problems)
        texts, refs = self._read_texts(impressions, features, problems)
        return Encoded(Batch(ids, values, fields, starts, ends, texts, refs, times), problems)

    def one(self, impression: Impression) -> Encoded:
        """Encode one impression, in memory that the next call in this thread takes again: half the time of a call with
        a list of one, for what is done with the batch before the next comes.

        >>> from streamrec import Id, Schema
        >>> encoder = Encoder(Schema(Id("user")))
        >>> len(encoder.one(Impression("i1", time=0.0, user="u1", item="p9")).batch)
        1
        """
        rows = self._rows
        if rows is not None and rows.row.take(impression):
            encoded: Encoded = rows.result
            return encoded
        return self([impression])

    def _read_columns(
        self, impressions: Sequence[Impression], features: Sequence[Mapping[str, Any]]
    ) -> Iterator[Sequence[Any]]:
        """The values of the ids, the numbers and the lists, field after field."""
        fields: list[tuple[Any, _Reader]] = [*self._columns, *self._numbers, *self._lists]
        if self._pick is not None and {*map(type, features)} <= {dict}:  # others may add what they are asked for
            try:  # all features of a row in one call
                found = zip(*map(self._pick, features), strict=True)
                columns = [None if _is_own(f) else next(found, ()) for f, _ in fields]
            except KeyError:  # one is missing somewhere
                pass
            else:
                return (
                    read(impressions, features) if column is None else column
                    for column, (_, read) in zip(columns, fields, strict=True)
                )
        return (read(impressions, features) for _, read in fields)

    def _assembled(
        self, rows: int, entries: int, strings: Sequence[str], numbers: NDArray[np.float64], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """The columns of a batch. Raises `TypeError` where a string is none."""
        data, cuts = packed(strings)
        columns = (
            *(np.empty(entries, dtype=np.int64), np.empty(entries, dtype=np.float32)),
            *(np.empty(entries, dtype=np.int32), np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.int64)),
        )
        assemble(data, cuts, numbers, lengths, *self._plan, *columns)
        return columns

    def _read_texts(
        self, impressions: Sequence[Impression], features: Sequence[Mapping[str, Any]], problems: list[Problem]
    ) -> tuple[Sequence[str], NDArray[np.int32]]:
        distinct: dict[str, int] = {}
        refs = np.full((len(impressions), self._text_fields), -1, dtype=np.int32)
        for place, field, column in self._texts:
            for row, value in enumerate(column(impressions, features)):
                if isinstance(value, str):
                    refs[row, place] = distinct.setdefault(value, len(distinct))
                elif value is not None:
                    problems.append(Problem(row, field.name, f"not a text: {_short(value)}; taken as unknown"))
        return tuple(distinct), refs


def encode(schema: Schema, impressions: Sequence[Impression]) -> Encoded:
    """Encode once. To encode again and again, keep an `Encoder`."""
    return Encoder(schema)(impressions)


def texts_of(name: str, impressions: Sequence[Impression]) -> Sequence[str]:
    """The value of each impression under this name, as the text that an `Id` would hash; what is no id is unknown."""
    return _strings(_reader_of(name)(impressions, [shown.features for shown in impressions]), name, [])


def _column(field: Field) -> _Reader:
    """What reads a field's values, a row each."""
    if isinstance(field, (Hour, Weekday)):
        text = field.text
        return lambda impressions, _: [text(shown.time) for shown in impressions]
    return _reader_of(field.name)


def _is_own(field: Field) -> bool:
    """Whether it is read from the impression itself, not from its features."""
    return field.name in _OWN or isinstance(field, (Hour, Weekday))


def _reader_of(name: str) -> _Reader:
    """What reads values by their name: from the impressions for "user" and "item", else from the features."""
    if name == "user":
        return lambda impressions, _: [shown.user for shown in impressions]
    if name == "item":
        return lambda impressions, _: [shown.item for shown in impressions]
    return lambda _, features: [known.get(name) for known in features]


def _faultless(batch: Batch) -> Encoded:
    return Encoded(batch, ())


def _table(rows: Sequence[Sequence[int]], width: int) -> NDArray[np.uint64]:
    return np.array(rows, dtype=np.uint64).reshape(len(rows), width)


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


def _strings(column: Sequence[Any], name: str, problems: list[Problem]) -> Sequence[str]:
    """The texts of a column of single ids, unknown ones marked."""
    if set(map(type, column)) <= {str}:
        return column
    strings: list[str] = []
    for row, value in enumerate(column):
        text = UNKNOWN if value is None else _string(value)
        if text is None:
            problems.append(Problem(row, name, f"not an id: {_short(value)}; taken as unknown"))
            text = UNKNOWN
        strings.append(text)
    return strings


def _floats(column: Sequence[Any], name: str, problems: list[Problem]) -> NDArray[np.float64]:
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
    column: Sequence[Any], field: Ids, strings: list[str], problems: list[Problem]
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
