"""Arrow columns of strings and numbers that came some at a time."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.errors import ConfigError
from streamrec.storage._archive_json import sound

__all__ = ["Reals", "Strings", "Words", "arrow", "between", "strings_of"]


def arrow() -> Any:
    """pyarrow. Raises `ConfigError`, saying what to type, where it is not there."""
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError('an archive needs pyarrow: pip install "streamrec[dask]"') from error
    return pyarrow


class Strings:
    """A column of strings."""

    def __init__(self) -> None:
        self._parts: list[str] = []  # of each, strings with a zero between two
        self._odd: list[list[Any]] | None = None  # all of them, once one has a zero in it, or is None

    def add(self, strings: list[Any]) -> None:
        """Take these, behind those before."""
        if not strings:
            return
        if self._odd is None:
            with suppress(TypeError):  # there is a None
                part = "\0".join(strings)
                if part.count("\0") == len(strings) - 1:
                    self._parts.append(part)
                    return
            self._odd = [part.split("\0") for part in self._parts]
            self._parts = []
        self._odd.append(strings)

    def column(self, there: NDArray[np.bool_] | None = None) -> Any:
        """An Arrow column; with `there`, only these of its rows are strings."""
        if self._odd is None:
            whole = "\0".join(self._parts).encode("utf-8", "replace")
            return between(whole + b"\0" if self._parts else whole, 0, there)
        values = [None if one is None else sound(one) for part in self._odd for one in part]
        if there is not None:
            given = iter(values)
            values = [next(given) if one else None for one in there.tolist()]
        return arrow().array(values, arrow().large_string())


def between(data: bytes, mark: int, there: NDArray[np.bool_] | None) -> Any:
    """An Arrow column of the strings that each end at a byte `mark`, which stands nowhere else."""
    ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == mark)
    ends -= np.arange(len(ends))  # without the marks
    starts = np.concatenate([[0], ends])
    if there is not None:  # a row without a string ends where the one before it did
        starts = starts[np.concatenate([[0], np.cumsum(there)])]
    return strings_of(data.translate(None, bytes([mark])), starts, there)


def strings_of(data: Any, starts: NDArray[np.int64], there: NDArray[np.bool_] | None) -> Any:
    """An Arrow column of strings, the bytes of which are one behind the other, and end at the last of `starts`; with
    `there`, only these of its rows are strings."""
    pa = arrow()
    valid = None if there is None else pa.py_buffer(np.packbits(there, bitorder="little"))
    return pa.LargeStringArray.from_buffers(len(starts) - 1, pa.py_buffer(starts), pa.py_buffer(data), valid)


class Words:
    """A column of strings of which there are few."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}
        self._parts: list[tuple[int, int] | NDArray[np.int32]] = []  # a word's number and how often, or those of some

    def add(self, words: list[str]) -> None:
        """Take these, behind those before."""
        if words.count(words[0]) == len(words):
            self.add_one(words[0], len(words))
            return
        codes = self._codes
        for word in {*words} - codes.keys():
            codes[word] = len(codes)
        self._parts.append(np.array([codes[word] for word in words], dtype=np.int32))

    def add_one(self, word: str, times: int) -> None:
        """Take this one so many times."""
        self._parts.append((self._codes.setdefault(word, len(self._codes)), times))

    def column(self, there: NDArray[np.bool_] | None = None) -> Any:
        """An Arrow column; with `there`, only these of its rows are strings."""
        pa = arrow()
        parts = [np.full(one[1], one[0], np.int32) if isinstance(one, tuple) else one for one in self._parts]
        codes = np.concatenate([np.empty(0, dtype=np.int32), *parts])
        if there is not None:
            codes = _spread(codes, there, 0)
        mask = None if there is None else ~there
        found = pa.DictionaryArray.from_arrays(pa.array(codes, mask=mask), [sound(word) for word in self._codes])
        return found.cast(pa.string())


class Reals:
    """A column of numbers, many of which there are not."""

    def __init__(self) -> None:
        self._parts: list[int | NDArray[np.float64]] = []  # how many that are not there, or some

    def add(self, numbers: list[float | None]) -> None:
        """Take these, behind those before."""
        if numbers.count(None) == len(numbers):  # numpy makes nan of None, but takes its time for it
            self._parts.append(len(numbers))
        else:
            self._parts.append(np.array(numbers, dtype=np.float64))

    def column(self, there: NDArray[np.bool_]) -> Any:
        """An Arrow column of which only these rows are numbers, and not all of them: nan is none."""
        parts = [np.full(one, np.nan) if isinstance(one, int) else one for one in self._parts]
        return arrow().array(_spread(np.concatenate([np.empty(0), *parts]), there, np.nan), from_pandas=True)


def _spread(values: NDArray[Any], there: NDArray[np.bool_], otherwise: Any) -> NDArray[Any]:
    spread = np.full(len(there), otherwise, dtype=values.dtype)
    spread[there] = values
    return spread
