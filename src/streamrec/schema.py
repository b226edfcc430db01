"""Schema and its fields: which parts of an impression a model sees, and how each becomes numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timedelta, timezone, tzinfo
from functools import lru_cache
from typing import Any, Union
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from streamrec.errors import SchemaError

__all__ = ["Field", "Hour", "Id", "Ids", "Number", "Schema", "Text", "Weekday", "seconds_of"]


class _Values(msgspec.Struct, frozen=True, tag_field="field", repr_omit_defaults=True):
    """What fields of categorical values have in common."""

    name: str

    def _check(self, admit: int, ttl: float | str | None) -> None:
        what = f"{type(self).__name__}({self.name!r})"
        if not (isinstance(admit, int) and 1 <= admit <= 255):
            raise SchemaError(f"{what}: admit must be a number of sightings from 1 to 255, got {admit!r}")
        msgspec.structs.force_setattr(self, "ttl", None if ttl is None else seconds_of(ttl, f"{what}: ttl"))


class Id(_Values, frozen=True, tag="id"):
    """One categorical value: a user, an item, a country. Strings, integers and booleans; 5 and "5" are the same.

    `name`: `"user"` and `"item"` are read from the impression itself, every other name from its `features`.
    An absent value or None is a value of its own, "unknown".

    `admit`: a value gets parameters of its own when it is learned from for the `admit`-th time; until then it shares
    those of all new values of its field. `ttl`: a value not learned from for so long, in event time, is forgotten:
    seconds, or text such as `"30d"` (`s`, `m`, `h`, `d`, `w`). None: never.

    >>> Id("user", admit=2, ttl="30d")
    Id(name='user', admit=2, ttl=2592000.0)
    """

    admit: int = 1
    ttl: float | str | None = None

    def __post_init__(self) -> None:
        self._check(self.admit, self.ttl)


class Hour(Id, frozen=True, tag="hour"):
    """The hour of the day of the impression, of 24, as an id: read from its time, whatever its features say.

    `zone`: "UTC", an offset such as "+05:30", or a place with its summer times, "Europe/Berlin".

    >>> Hour(zone="Europe/Berlin").text(1_700_000_000.0)
    '23'
    """

    name: str = "hour"
    zone: str = "UTC"

    def __post_init__(self) -> None:
        super().__post_init__()
        _zone(self.zone)

    def text(self, time: float) -> str:
        """The value at a time, POSIX seconds: "0" to "23"."""
        return _quarter(int(time // 900), self.zone)[0]


class Weekday(Id, frozen=True, tag="weekday"):
    """The day of the week of the impression as an id: read from its time, whatever its features say. `zone`: as in
    `Hour`.

    >>> Weekday().text(1_700_000_000.0)
    'Tue'
    """

    name: str = "weekday"
    zone: str = "UTC"

    def __post_init__(self) -> None:
        super().__post_init__()
        _zone(self.zone)

    def text(self, time: float) -> str:
        """The value at a time, POSIX seconds: "Mon" to "Sun"."""
        return _quarter(int(time // 900), self.zone)[1]


class Ids(_Values, frozen=True, tag="ids"):
    """Several categorical values: genres, tags.

    A list of n values gives each the weight 1/n; a mapping `{value: weight}` is taken as given. Absent, None and
    empty contribute nothing. At most `limit` values are used, the first ones; what is cut is reported. `admit`, `ttl`:
    as in `Id`.
    """

    limit: int = 1000
    admit: int = 1
    ttl: float | str | None = None

    def __post_init__(self) -> None:
        self._check(self.admit, self.ttl)
        if self.limit < 1:
            raise SchemaError(f"Ids({self.name!r}): limit must be >= 1, got {self.limit!r}")


class Number(msgspec.Struct, frozen=True, tag_field="field", tag="number"):
    """One number x. Absent and None are fine: "unknown" has a weight of its own.

    `since`: x is a time, POSIX seconds; use the seconds from it to the impression: the age of an item, the time since
    a visit. `log`: use sign(x) log(1 + |x|). `scale`: divide by this. `standardize`: subtract the mean and divide by
    the standard deviation of what the model has learned from so far. `quantile`: use its rank among them instead, from
    -1.73 to 1.73, so that outliers move nothing. Those statistics are the model's state, saved and published with it,
    so that encoding itself remembers nothing.

    >>> Number("listed_at", since=True, log=True, quantile=True)
    Number(name='listed_at', log=True, scale=1.0, standardize=False, since=True, quantile=True)
    """

    name: str
    log: bool = False
    scale: float = 1.0
    standardize: bool = False
    since: bool = False
    quantile: bool = False

    def __post_init__(self) -> None:
        if self.standardize and self.quantile:
            raise SchemaError(f"Number({self.name!r}): standardize or quantile, not both")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise SchemaError(f"Number({self.name!r}): scale must be a finite number > 0, got {self.scale!r}")


class Text(msgspec.Struct, frozen=True, tag_field="field", tag="text"):
    """A text, kept in the batch for the models that read it; models that do not, ignore it."""

    name: str


_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}


def seconds_of(given: float | str, what: str) -> float:
    """Seconds, of a number or of text such as "30d". Raises `SchemaError`, naming `what`, where it is neither."""
    seconds = given
    if isinstance(given, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", given)
        seconds = float(match[1]) * _UNITS[match[2]] if match else math.nan
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise SchemaError(f'{what} must be seconds > 0 or text such as "30d", "12h" or "90m", got {given!r}')
    return float(seconds)


_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


@lru_cache(maxsize=256)
def _zone(name: str) -> tzinfo:
    offset = re.fullmatch(r"([+-])(\d\d):(\d\d)", name) if isinstance(name, str) else None
    if offset:
        minutes = int(offset[2]) * 60 + int(offset[3])
        if minutes < 24 * 60:
            return timezone(timedelta(minutes=-minutes if offset[1] == "-" else minutes))
    elif name == "UTC":
        return timezone.utc
    else:
        with suppress(ZoneInfoNotFoundError, ValueError, TypeError, OSError):
            return ZoneInfo(name)
    raise SchemaError(
        f'zone must be "UTC", an offset such as "+05:30", or a place such as "Europe/Berlin", got {name!r}; where this '
        "system knows no places: pip install tzdata"
    )


@lru_cache(maxsize=4096)  # zones change by the quarter of an hour at the finest
def _quarter(number: int, zone: str) -> tuple[str, str]:
    """The hour and the day of the week in the n-th quarter of an hour since 1970."""
    there = datetime.fromtimestamp(number * 900, _zone(zone))
    return str(there.hour), _DAYS[there.weekday()]


Field = Union[Id, Hour, Weekday, Ids, Number, Text]


class _Saved(msgspec.Struct, frozen=True):
    fields: list[Field]
    seed: int


class Schema:
    """The fields of a model, in order. `seed` seeds the 64-bit hashes that turn values into ids.

    Raises `SchemaError` where two fields share a name or there is none.

    >>> schema = Schema(Id("user"), Id("item"), Number("price", log=True))
    >>> len(schema), schema.names
    (3, ('user', 'item', 'price'))
    """

    __slots__ = ("fields", "seed")

    def __init__(self, *fields: Field, seed: int = 0) -> None:
        if not fields:
            raise SchemaError('a schema needs at least one field, such as Id("user")')
        for field in fields:
            if not isinstance(field, (Id, Ids, Number, Text)):
                raise SchemaError(f"a field is an Id, Ids, Number or Text, got {field!r}")
            if not isinstance(field.name, str) or not field.name:
                raise SchemaError(f"a field needs a name, got {field!r}")
            if isinstance(field, (Hour, Weekday)) and field.name in ("user", "item"):
                raise SchemaError(f"{field!r}: {field.name!r} is read from the impression; take another name")
        names = [field.name for field in fields]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SchemaError(f"two fields share a name: {', '.join(twice)}; give each field a name of its own")
        if not 0 <= seed < 2**64:
            raise SchemaError(f"seed must be an unsigned 64-bit integer, got {seed!r}")
        self.fields: tuple[Field, ...] = fields
        self.seed = seed

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the fields, in order."""
        return tuple(field.name for field in self.fields)

    @property
    def timed(self) -> tuple[str, ...]:
        """The names of the fields whose values depend on the time of the impression."""
        return tuple(
            field.name
            for field in self.fields
            if isinstance(field, (Hour, Weekday)) or (isinstance(field, Number) and field.since)
        )

    def __len__(self) -> int:
        return len(self.fields)

    def __iter__(self) -> Iterator[Field]:
        return iter(self.fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and (self.fields, self.seed) == (other.fields, other.seed)

    def __hash__(self) -> int:
        return hash((self.fields, self.seed))

    def __repr__(self) -> str:
        inside = [repr(field) for field in self.fields] + ([f"seed={self.seed}"] if self.seed else [])
        return f"Schema({', '.join(inside)})"

    def to_dict(self) -> dict[str, Any]:
        """This schema as what JSON can hold; `from_dict` reads it back."""
        saved: dict[str, Any] = msgspec.to_builtins(_Saved(list(self.fields), self.seed))
        return saved

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Schema:
        """The schema that `to_dict` wrote. Raises `SchemaError` where that is not what it is given."""
        try:
            read = msgspec.convert(saved, _Saved)
        except msgspec.ValidationError as error:
            raise SchemaError(f"not a saved schema: {error}") from error
        return cls(*read.fields, seed=read.seed)

    def require(self, other: Schema, *, what: str) -> None:
        """Raise `SchemaError`, naming the fields, unless `other`, the schema of `what`, equals this one.

        >>> Schema(Id("user")).require(Schema(Id("item")), what="the checkpoint")
        Traceback (most recent call last):
            ...
        streamrec.errors.SchemaError: the schema differs from that of the checkpoint: 'user' is only here; \
'item' is only there. Use the same fields, or start from an empty store.
        """
        if self == other:
            return
        mine = {field.name: field for field in self.fields}
        theirs = {field.name: field for field in other.fields}
        found = [f"{name!r} is only here" for name in mine if name not in theirs]
        found += [f"{name!r} is only there" for name in theirs if name not in mine]
        found += [
            f"{name!r} is {field!r} here and {theirs[name]!r} there"
            for name, field in mine.items()
            if name in theirs and theirs[name] != field
        ]
        if not found and self.seed != other.seed:
            found = [f"the seed is {self.seed} here and {other.seed} there"]
        if not found:
            found = [f"the order is {', '.join(mine)} here and {', '.join(theirs)} there"]
        raise SchemaError(
            f"the schema differs from that of {what}: {'; '.join(found)}. "
            "Use the same fields, or start from an empty store."
        )
