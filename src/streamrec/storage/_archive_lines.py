"""Lines of JSON that were read, as columns of strings: copied out of the lines, without Python's lock, and not decoded.

An archive stores what was read. So nothing has to be encoded again, which is the dearest part of taking an event apart,
and what is done here is done by the thread that writes, while the stream goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec._compile import compiled
from streamrec.events import decode_event

__all__ = ["COLUMNS", "text_columns"]

COLUMNS = ("id", "user", "item", "features", "impression_id")
_ID, _USER, _ITEM, _FEATURES, _IMPRESSION = range(5)
_SHOWN, _TOLD = (_ID, _USER, _ITEM, _FEATURES), (_ID, _IMPRESSION)
_NEEDED_SHOWN = 1 << _ID | 1 << _USER | 1 << _ITEM
_NEEDED_TOLD = 1 << _ID | 1 << _IMPRESSION

_QUOTE, _BACKSLASH, _COLON, _COMMA = 0x22, 0x5C, 0x3A, 0x2C
_OPEN, _CLOSE, _OPEN_LIST = 0x7B, 0x7D, 0x5B
_BIT = 0x20
_SPACE = 0x20
_NONE = b"{}"  # the features of a line that has none
_END = b'""'  # where a string stops, if nowhere else, also one that ends in a backslash
_1 = np.uint64(1)


def text_columns(
    parts: Sequence[bytes],
    lengths: NDArray[np.int64],
    shown: NDArray[np.bool_],
    features: Callable[[list[Any]], bytes],
) -> list[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Of lines one behind the other in `parts`, each an event in the default JSON form, those of `shown` impressions
    and the others feedback: of each of `COLUMNS` its bytes, and int64 `(lines + 1,)` where each line's begin, which are
    none where a line has none.

    `lengths`: of the lines. `features`: the JSON of some features, a line each.
    """
    count = len(shown)
    ends = np.cumsum(lengths)
    data = b"".join([*parts, _NONE, _END])
    whole = np.frombuffer(data, dtype=np.uint8)
    spans = np.zeros((len(COLUMNS), count, 2), dtype=np.int64)
    odd = np.zeros(count, dtype=np.bool_)
    _find(whole, ends, shown, spans, odd)
    if odd.any():  # an escape in an id, say: rare, and msgspec knows what it means
        whole = _decoded(data, ends, np.flatnonzero(odd).tolist(), shown, features, spans)
    found = []
    for column in range(len(COLUMNS)):
        starts = np.concatenate([[0], np.cumsum(spans[column, :, 1] - spans[column, :, 0])])
        held = np.empty(starts[-1], dtype=np.uint8)
        _copy(whole, spans[column], held)
        found.append((held, starts))
    return found


def _decoded(
    data: bytes,
    ends: NDArray[np.int64],
    odd: list[int],
    shown: NDArray[np.bool_],
    features: Callable[[list[Any]], bytes],
    spans: Any,
) -> NDArray[np.uint8]:
    """The lines, and behind them what stands in the odd ones, which `spans` then point to."""
    parts, end = [data], len(data)
    for row in odd:
        event: Any = decode_event(data[ends[row - 1] if row else 0 : ends[row]])
        texts: dict[int, bytes] = {_ID: event.id.encode()}
        if shown[row]:
            texts |= {_USER: event.user.encode(), _ITEM: event.item.encode()}
            texts[_FEATURES] = features([event.features]).rstrip(b"\n")
        else:
            texts[_IMPRESSION] = event.impression_id.encode()
        for column, text in texts.items():
            parts.append(text)
            spans[column, row] = end, end + len(text)
            end += len(text)
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


@compiled()
def _find(data: Any, ends: Any, shown: Any, spans: Any, odd: Any) -> None:
    """Where the strings of each line stand; or that it is not as it usually is."""
    none = ends[-1]  # behind the lines: features that are none
    begin = 0
    for row in range(len(shown)):
        for column in range(5):
            spans[column, row, 0] = spans[column, row, 1] = 0
        if shown[row]:
            spans[_FEATURES, row, 0], spans[_FEATURES, row, 1] = none, none + 2
        odd[row] = not _find_line(data, begin, ends[row], shown[row], spans, row)
        begin = ends[row]


@compiled()
def _find_line(data: Any, at: int, end: int, shown: bool, spans: Any, row: int) -> bool:
    """Where the strings of the line stand that begins at `at`; whether all is as usual. It is known to be an event."""
    at = _after_space(data, at, end)
    if at >= end or data[at] != _OPEN:
        return False
    seen = 0
    while True:
        at = _after_space(data, at + 1, end)
        if at >= end or data[at] != _QUOTE:
            return False
        key = at + 1
        at, plain = _after_string(data, at)
        column = _column(data, key, at - 1)
        at = _after_space(data, at, end)
        if not plain or at >= end or data[at] != _COLON:
            return False
        at = _after_space(data, at + 1, end)
        begin = at
        if at >= end:
            return False
        if data[at] == _QUOTE:
            at, plain = _after_string(data, at)
            if column >= 0:
                if not plain or column == _FEATURES:
                    return False
                spans[column, row, 0], spans[column, row, 1] = begin + 1, at - 1
        elif data[at] == _OPEN or data[at] == _OPEN_LIST:
            if column >= 0 and (column != _FEATURES or data[at] != _OPEN):
                return False
            at = _after_nested(data, at, end)
            if at > end:
                return False
            if column == _FEATURES and shown:
                spans[column, row, 0], spans[column, row, 1] = begin, at
        else:
            if column >= 0:
                return False
            while at < end and data[at] != _COMMA and data[at] != _CLOSE:
                at += 1
        if column >= 0:
            seen |= 1 << column  # of a key that is there twice the last counts, as for msgspec
        at = _after_space(data, at, end)
        if at >= end or (data[at] != _COMMA and data[at] != _CLOSE):
            return False
        if data[at] == _CLOSE:
            break
    if shown:
        spans[_IMPRESSION, row, 0] = spans[_IMPRESSION, row, 1] = 0
        return seen & _NEEDED_SHOWN == _NEEDED_SHOWN
    spans[_USER, row, 0] = spans[_USER, row, 1] = spans[_ITEM, row, 0] = spans[_ITEM, row, 1] = 0
    return seen & _NEEDED_TOLD == _NEEDED_TOLD


@compiled()
def _after_space(data: Any, at: int, end: int) -> int:
    while at < end and data[at] <= _SPACE:
        at += 1
    return at


@compiled()
def _after_string(data: Any, begin: int) -> Any:
    """Behind the string that begins there, at most behind the first quote of `_END`; and whether nothing in it is
    escaped."""
    plain = True
    at = np.uint64(begin) + _1  # unsigned, so that numba does not look whether it counts from the end
    while data[at] != _QUOTE:
        if data[at] == _BACKSLASH:
            plain = False
            at += _1
        at += _1
    return np.int64(at + _1), plain


@compiled()
def _after_nested(data: Any, begin: int, end: int) -> Any:
    """Behind the object or the list that begins there; behind `end` where it does not end."""
    depth = 0
    at, last = np.uint64(begin), np.uint64(end)
    while at < last:
        here = data[at]
        if here == _QUOTE:
            at += _1
            while data[at] != _QUOTE:
                if data[at] == _BACKSLASH:
                    at += _1
                at += _1
        elif here | _BIT == _OPEN:  # or that of a list, which has one bit less
            depth += 1
        elif here | _BIT == _CLOSE:
            depth -= 1
            if depth == 0:
                return np.int64(at + _1)
        at += _1
    return end + 1


_USER_NAME, _ITEM_NAME, _FEATURES_NAME, _IMPRESSION_NAME = b"user", b"item", b"features", b"impression_id"


@compiled()
def _column(data: Any, begin: int, end: int) -> int:
    """Which of the columns a key names, or -1."""
    size = end - begin
    if size == 2:
        return _ID if data[begin] == 0x69 and data[begin + 1] == 0x64 else -1
    if size == 4:
        if _same(data, begin, _USER_NAME):
            return _USER
        return _ITEM if _same(data, begin, _ITEM_NAME) else -1
    if size == 8:
        return _FEATURES if _same(data, begin, _FEATURES_NAME) else -1
    if size == 13:
        return _IMPRESSION if _same(data, begin, _IMPRESSION_NAME) else -1
    return -1


@compiled()
def _same(data: Any, begin: int, name: Any) -> bool:
    n = 0
    while n < len(name) and data[begin + n] == name[n]:
        n += 1
    return n == len(name)


@compiled()
def _copy(data: Any, spans: Any, held: Any) -> None:
    """These pieces, one behind the other."""
    to = 0
    for row in range(len(spans)):
        begin, size = spans[row, 0], spans[row, 1] - spans[row, 0]
        for n in range(size):
            held[to + n] = data[begin + n]
        to += size
