"""OneRow: one impression encoded at a time, without numpy, which is slow with single values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec._pointers import pointers_to
from streamrec.batch import Batch
from streamrec.events import Impression
from streamrec.preprocessors._assemble import UNKNOWN, assemble_row
from streamrec.schema import Field, Hour, Id, Ids, Number, Weekday

__all__ = ["OneRow", "Rows"]

_OWN = ("user", "item")
_LONGEST = 4096  # entries there is room for; more go the usual way
_LARGEST = float(np.finfo(np.float64).max)
_NO_REFS = np.zeros((0, 0), dtype=np.int32)


class OneRow:
    """Memory for one row, which each impression takes again.

    `plan`: what `assemble` has to know of the fields: numbers and lists are read from features, of texts there are
    none.
    """

    def __init__(self, fields: Sequence[Field], plan: Any) -> None:
        ids = [f.name for f in fields if isinstance(f, Id)]
        numbers = [f for f in fields if isinstance(f, Number)]
        lists = [f for f in fields if isinstance(f, Ids)]
        clocks = [f for f in fields if isinstance(f, (Hour, Weekday))]
        timed = [f.name for f in clocks]
        own = [name for name in ids if name in _OWN]
        rest = [name for name in ids if name not in _OWN and name not in timed]
        self._clocks = [f.text for f in clocks]
        self._read_own = _reader(attrgetter, own)
        self._read = _reader(itemgetter, rest)
        self._ids = rest
        self._numbers = [(place, f.name, f.since) for place, f in enumerate(numbers)]
        self._lists = [(place, f.name, f.limit) for place, f in enumerate(lists)]
        self._single = len(ids) + len(numbers)
        self._room = min(self._single + sum(f.limit for f in lists), max(_LONGEST, self._single))
        self._floats = np.empty((len(numbers), 1))
        self._counts = np.empty((len(lists), 1), dtype=np.int64)
        columns = np.empty(self._room, np.int64), np.empty(self._room, np.float32), np.empty(self._room, np.int32)
        starts, ends, self._time = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1)
        of_ids, *of_others, count = plan
        # what the pointers are to; ids in the order in which they are read
        self._arrays = (of_ids[[ids.index(name) for name in (*own, *rest, *timed)]], *of_others)
        inputs = self._floats, self._counts, *self._arrays
        self._pointers: NDArray[np.int64] = pointers_to((*inputs, *columns, starts, ends), count)
        self.batch = Batch(*columns, starts, ends, (), _NO_REFS, self._time)

    def take(self, shown: Impression) -> bool:
        """Encode it; False where a value is not of the usual types, or there are too many."""
        features = shown.features
        try:
            if type(features) is not dict:  # a defaultdict would be filled
                raise KeyError
            strings = [*self._read_own(shown), *self._read(features)]
        except KeyError:
            strings = [*self._read_own(shown), *map(features.get, self._ids)]
        strings += [text(shown.time) for text in self._clocks]
        entries = self._single
        try:
            for place, name, since in self._numbers:
                number = features.get(name)
                if number is None:
                    number = np.nan
                elif not (type(number) in (float, int) and -_LARGEST <= number <= _LARGEST):
                    return False
                self._floats[place, 0] = shown.time - number if since else number
            for place, name, limit in self._lists:
                several = features.get(name)
                size = 0
                if several is not None:
                    size = len(several)
                    if type(several) is not list or size > limit or len({*several}) < size or None in several:
                        return False
                    strings += several
                    entries += size
                self._counts[place, 0] = size
            try:
                text = "\0".join(strings)
            except TypeError:
                text = "\0".join([UNKNOWN if value is None else value for value in strings])
        except (TypeError, OverflowError):  # a value of another type: the careful way finds which
            return False
        if entries > self._room or not assemble_row((text + "\0").encode("utf-8", "surrogatepass"), self._pointers):
            return False
        self._time[0] = shown.time
        self.batch.__dict__.pop("entries", None)  # it may have been asked for those of the row before
        return True

    def copy(self) -> Batch:
        """What was taken last, in memory of its own."""
        row = self.batch
        end = row.ends[0]
        columns = row.ids[:end].copy(), row.values[:end].copy(), row.fields[:end].copy()
        return Batch(*columns, row.starts.copy(), row.ends.copy(), (), _NO_REFS, self._time.copy())


class Rows(threading.local):
    """A `OneRow` for each thread, and what `result` makes of its batch."""

    def __init__(self, fields: Sequence[Field], plan: Any, result: Callable[[Batch], Any]) -> None:
        self.row = OneRow(fields, plan)
        self.result = result(self.row.batch)
        self._made_by = fields, plan, result

    def __reduce__(self) -> Any:
        return Rows, self._made_by  # a copy, as of a trainer, has memory of its own


def _reader(getter: Any, names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """What gives the values of these names, all at once."""
    if len(names) > 1:
        return getter(*names)  # type: ignore[no-any-return]
    each = [getter(name) for name in names]
    return lambda holder: tuple(get(holder) for get in each)
