"""Lines of JSON that were read, as columns of strings: copied out of the lines, without Python's lock, and not decoded.

An archive stores what was read. So nothing has to be encoded again, which is the dearest part of taking an event apart,
and what is done here is done by the thread that writes, while the stream goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamrec._compile import compiled
from streamrec.events import Impression, decode_event

__all__ = ["NUMBERS", "TEXTS", "Found", "found_in"]

# in this order: of both, of an impression, of feedback, and numbers between
_ID, _USER, _ITEM, _FEATURES, _SCORE, _VALUE, _IMPRESSION, _KIND, _TYPE = range(9)
TEXTS = {"id": _ID, "user": _USER, "item": _ITEM, "features": _FEATURES, "impression_id": _IMPRESSION, "kind": _KIND}
NUMBERS = {"score": _SCORE, "value": _VALUE}
_OF_SHOWN = 1 << _ID | 1 << _USER | 1 << _ITEM | 1 << _TYPE  # what there must be
_OF_TOLD = 1 << _ID | 1 << _IMPRESSION | 1 << _TYPE

_QUOTE, _BACKSLASH, _COLON, _COMMA = 0x22, 0x5C, 0x3A, 0x2C
_OPEN, _CLOSE, _OPEN_LIST = 0x7B, 0x7D, 0x5B
_BIT = 0x20
_SPACE = 0x20
_I, _N = 0x69, 0x6E
_NONE = b"{}click"  # the features and the kind of a line that names none
_END = b'""'  # where a string stops, if nowhere else, also one that ends in a backslash
_1 = np.uint64(1)


class Found(NamedTuple):
    """What stands in some lines. `shown`: which are impressions. Of each of `TEXTS` its bytes, and int64
    `(lines + 1,)` where each line's begin; of each of `NUMBERS` float64 `(lines,)`. A line has no bytes, or nan, of
    what its type has not."""

    shown: NDArray[np.bool_]
    texts: list[tuple[NDArray[np.uint8], NDArray[np.int64]]]
    numbers: list[NDArray[np.float64]]


def found_in(parts: Sequence[bytes], lengths: NDArray[np.int64], features: Callable[[list[Any]], bytes]) -> Found:
    """What stands in lines, one behind the other in `parts`, each an impression or feedback in the default JSON form.

    `lengths`: of the lines. `features`: the JSON of some features, a line each.
    """
    count = len(lengths)
    ends = np.cumsum(lengths)
    data = b"".join([*parts, _NONE, _END])
    whole = np.frombuffer(data, dtype=np.uint8)
    spans = np.empty((_TYPE, count, 2), dtype=np.int64)
    shown, odd = np.empty(count, dtype=np.bool_), np.empty(count, dtype=np.bool_)
    _find(whole, ends, spans, shown, odd)
    if odd.any():  # an escape in an id, say: rare, and msgspec knows what it means
        data = _decoded(data, ends, np.flatnonzero(odd).tolist(), features, spans, shown)
        whole = np.frombuffer(data, dtype=np.uint8)
    texts = []
    for column in TEXTS.values():
        starts = np.concatenate([[0], np.cumsum(spans[column, :, 1] - spans[column, :, 0])])
        held = np.empty(starts[-1], dtype=np.uint8)
        _copy(whole, spans[column], held)
        texts.append((held, starts))
    numbers = []
    for column in NUMBERS.values():
        found = np.full(count, np.nan)
        there = np.flatnonzero(spans[column, :, 0] < spans[column, :, 1])
        found[there] = [float(data[begin:end]) for begin, end in spans[column, there].tolist()]
        numbers.append(found)
    return Found(shown, texts, numbers)


def _decoded(
    data: bytes,
    ends: NDArray[np.int64],
    odd: list[int],
    features: Callable[[list[Any]], bytes],
    spans: Any,
    shown: NDArray[np.bool_],
) -> bytes:
    """The lines, and behind them what stands in the odd ones, which `spans` then point to."""
    parts, end = [data], len(data)
    for row in odd:
        event: Any = decode_event(data[ends[row - 1] if row else 0 : ends[row]])
        shown[row] = isinstance(event, Impression)
        texts: dict[int, bytes] = {_ID: event.id.encode()}
        if shown[row]:
            texts |= {_USER: event.user.encode(), _ITEM: event.item.encode()}
            texts[_FEATURES] = features([event.features]).rstrip(b"\n")
            number = _SCORE, event.score
        else:
            texts |= {_IMPRESSION: event.impression_id.encode(), _KIND: event.kind.encode()}
            number = _VALUE, event.value
        if number[1] is not None:
            texts[number[0]] = repr(float(number[1])).encode()
        spans[:, row] = 0
        for column, text in texts.items():
            parts.append(text)
            spans[column, row] = end, end + len(text)
            end += len(text)
    return b"".join(parts)


@compiled()
def _find(data: Any, ends: Any, spans: Any, shown: Any, odd: Any) -> None:
    """Where the strings and the numbers of each line stand; or that it is not as it usually is."""
    none = ends[-1]  # behind the lines
    begin = 0
    for row in range(len(ends)):
        for column in range(_TYPE):
            spans[column, row, 0] = spans[column, row, 1] = 0
        spans[_FEATURES, row, 0], spans[_FEATURES, row, 1] = none, none + 2
        spans[_KIND, row, 0], spans[_KIND, row, 1] = none + 2, none + 7
        seen = _find_line(data, begin, ends[row], spans, row, shown)
        needed = _OF_SHOWN if shown[row] else _OF_TOLD
        odd[row] = seen & needed != needed
        for column in range(_ID + 1, _TYPE):
            if (column <= _SCORE) != shown[row]:  # what may be there and means nothing
                spans[column, row, 0] = spans[column, row, 1] = 0
        begin = ends[row]


@compiled()
def _find_line(data: Any, at: int, end: int, spans: Any, row: int, shown: Any) -> int:
    """Where the strings of the line stand that begins at `at`, which is known to be an event; which keys there are, as
    bits, or 0 where it is not as usual."""
    shown[row] = False
    at = _after_space(data, at, end)
    if at >= end or data[at] != _OPEN:
        return 0
    seen = 0
    while True:
        at = _after_space(data, at + 1, end)
        if at >= end or data[at] != _QUOTE:
            return 0
        key = at + 1
        at, plain = _after_string(data, at)
        column = _column(data, key, at - 1)
        at = _after_space(data, at, end)
        if not plain or at >= end or data[at] != _COLON:
            return 0
        at = _after_space(data, at + 1, end)
        begin = at
        if at >= end:
            return 0
        is_text = data[at] == _QUOTE
        is_nested = data[at] == _OPEN or data[at] == _OPEN_LIST
        if is_text:
            at, plain = _after_string(data, at)
            begin, stop = begin + 1, at - 1
        elif is_nested:
            at = _after_nested(data, at, end)
            stop = at
        else:
            while at < end and data[at] > _SPACE and data[at] != _COMMA and data[at] != _CLOSE:
                at += 1
            stop = at
        if at > end:
            return 0
        if column == _TYPE:
            if not plain or seen & (1 << _TYPE):
                return 0
            shown[row] = data[begin] == _I
        elif column == _FEATURES:
            if not is_nested or data[begin] != _OPEN:
                return 0
        elif _SCORE <= column <= _VALUE:
            if is_text or is_nested:
                return 0
            if data[begin] == _N:  # null
                stop = begin
        elif column >= 0 and not (is_text and plain):
            return 0
        if column >= 0:
            seen |= 1 << column  # of a key that is there twice the last counts, as for msgspec
            if column != _TYPE:
                spans[column, row, 0], spans[column, row, 1] = begin, stop
        at = _after_space(data, at, end)
        if at >= end or (data[at] != _COMMA and data[at] != _CLOSE):
            return 0
        if data[at] == _CLOSE:
            return seen


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


@compiled()
def _column(data: Any, begin: int, end: int) -> int:
    """Which of the columns a key names, or -1."""
    size = end - begin
    if size == 2:
        return _ID if _same(data, begin, b"id") else -1
    if size == 4:
        if _same(data, begin, b"user"):
            return _USER
        if _same(data, begin, b"item"):
            return _ITEM
        if _same(data, begin, b"type"):
            return _TYPE
        return _KIND if _same(data, begin, b"kind") else -1
    if size == 5:
        if _same(data, begin, b"score"):
            return _SCORE
        return _VALUE if _same(data, begin, b"value") else -1
    if size == 8:
        return _FEATURES if _same(data, begin, b"features") else -1
    return _IMPRESSION if size == 13 and _same(data, begin, b"impression_id") else -1


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
