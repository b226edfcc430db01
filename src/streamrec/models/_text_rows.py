"""Compiled loops of the text cache: texts in UTF-8 to rows, rows to vectors, rows given and taken back.

A text's key is two XXH64 of its normal form, seeded by the two halves of the encoder's version: 128 bits, as those of
the label join, so that two texts are taken for one with a chance of 2^-128 a pair, and a text by one encoder never has
the key that it has by another. Texts are kept beside, in pieces of 64 bytes, for `renew` computes them again.

Arrays: `rows` (records, `ROW`), `vectors` (a line for each row), `table` (as `_keyed_table` has it), `free` int32 (the
free rows, as many as the header says), `pieces` uint8 `(n, 64)` and `following` int32 `(n,)`, the piece after each,
also of the free ones. `header`: int64, the numbers named below.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic

from streamrec._compile import compiled
from streamrec._keyed_table import EMPTY, find, put, take_out
from streamrec._pointers import touch
from streamrec.hashing import end_of, xxh64

__all__ = [
    "BOOT",
    "CLOCK",
    "DIRTY",
    "FREE_PIECE",
    "FREE_PIECES",
    "FREE_ROWS",
    "HEADER",
    "LONGEST",
    "NOTHING",
    "PIECE",
    "ROW",
    "copy_halves",
    "copy_singles",
    "fetch_all",
    "find_all",
    "is_intact",
    "normal_forms",
    "rebuild",
    "release_all",
    "store_all",
    "text_of",
]

CLOCK, DIRTY, FREE_ROWS, FREE_PIECE, FREE_PIECES, BOOT, HEADER = range(7)
"""Calls so far; whether a change was begun and not ended; free rows; the first free piece; free pieces; of which start
of the machine the last process was. Last, how many numbers."""

NOTHING = -2
"""In place of a row: the text says nothing, and has the zero vector."""
AHEAD = 3  # rows that are fetched while others are copied
PIECE = 64
LONGEST = 4096
"""Bytes of the longest text that is kept. A longer one has its vector, and cannot be renewed."""

ROW = np.dtype(
    [
        ("high", np.uint64),
        ("low", np.uint64),
        ("version", np.uint64),  # of the encoder: the first half of its digest
        ("renewed", np.uint64),  # by which version this text has been computed again, 0 for none
        ("check", np.uint64),  # XXH64 of what is written once: key, version, vector and text
        ("used", np.int64),  # when last, by the header's clock
        ("uses", np.uint32),
        ("length", np.uint32),  # of the text in bytes; LONGEST + 1: it is not kept
        ("piece", np.int32),  # its first, -1 for none
        ("live", np.uint32),
    ]
)
_NO_SEED = np.uint64(0)


@compiled()
def _is_normal(data: Any, begin: int, end: int) -> bool:
    before = np.uint8(32)  # so that a space at the start is one too many
    for at in range(begin, end):
        byte = data[at]
        if byte < 32 or byte == 127 or (byte == 32 and before == 32) or (before == 0xED and byte >= 0xA0):
            return False
        before = byte
    return end == begin or before != 32


@compiled()
def _normal(data: Any, begin: int, end: int, out: Any, at: int) -> int:
    """Write the normal form of a text (`text_encoder.normalised`) to `out` from `at` on; where it ends."""
    first, owed, n = at, False, begin
    while n < end:
        byte = data[n]
        if byte == 32 or byte == 9 or byte == 10 or byte == 13:
            owed = at > first
        elif byte >= 32 and byte != 127:
            if owed:
                out[at] = 32
                at, owed = at + 1, False
            if byte == 0xED and data[n + 1] >= 0xA0:  # half of a surrogate pair
                out[at], out[at + 1], out[at + 2] = 0xEF, 0xBF, 0xBD
                at, n = at + 3, n + 2
            else:
                out[at] = byte
                at += 1
        n += 1
    return at


@compiled()
def normal_forms(data: Any, cuts: Any, count: int) -> Any:
    """The normal forms of texts as `hashing.packed` gives them, uint8; int64 `(count, 2)`, where each begins and ends;
    and the bytes of the longest as it was given. No bytes where all are normal already: they are those given."""
    spans = np.empty((count, 2), dtype=np.int64)
    begin, normal, most = 0, True, 0
    for n in range(count):
        end = end_of(data, begin, cuts, n)
        spans[n, 0], spans[n, 1] = begin, end
        most = max(most, end - begin)
        normal = normal and _is_normal(data, begin, end)
        begin = end + 1
    if normal:
        return np.zeros(0, dtype=np.uint8), spans, most
    out = np.empty(begin, dtype=np.uint8)
    at = 0
    for n in range(count):
        end = _normal(data, spans[n, 0], spans[n, 1], out, at)
        spans[n, 0], spans[n, 1] = at, end
        at = end
    return out, spans, most


@compiled()
def fetch_all(data: Any, spans: Any, high: Any, low: Any, keys: Any) -> None:
    """Write the key of each text to `keys`, uint64 `(n, 2)`."""
    for n in range(len(spans)):
        keys[n, 0] = xxh64(data, spans[n, 0], spans[n, 1], high)
        keys[n, 1] = xxh64(data, spans[n, 0], spans[n, 1], low)


@compiled()
def _checksum(row: int, rows: Any, vectors: Any, pieces: Any, following: Any) -> Any:
    """What `check` of an intact row is. Pieces that lead anywhere else are followed for the length of the text only."""
    one = rows[row]
    line = vectors[row]
    check = xxh64(line, 0, len(line), one.high ^ one.version)
    length = one.length
    check ^= np.uint64(length) * np.uint64(0x9E3779B97F4A7C15) ^ one.low
    if length > LONGEST:
        return check
    piece, left = one.piece, np.int64(length)
    while left > 0:
        if piece < 0 or piece >= len(following):
            return ~one.check
        check = xxh64(pieces[piece], 0, int(left if left < PIECE else PIECE), check)
        piece, left = following[piece], left - PIECE
    return check


@compiled()
def is_intact(row: int, rows: Any, lines: Any, pieces: Any, following: Any) -> bool:
    """Whether a row is as it was written. `lines`: the vectors' bytes, uint8 `(rows, bytes)`."""
    return bool(_checksum(row, rows, lines, pieces, following) == rows[row].check)


@compiled()
def find_all(
    spans: Any, keys: Any, table: Any, rows: Any, lines: Any, pieces: Any, following: Any, seen: Any, clock: int
) -> Any:
    """int64 `(n,)`: the rows of these keys, `EMPTY` where there is none, `NOTHING` for an empty text.

    `seen`: uint8 `(rows,)`, which rows this process has found intact: each is looked at once. One that is not is as if
    it were not there; it stays so until `store_all` writes it anew.
    """
    found = np.empty(len(spans), dtype=np.int64)
    for n in range(len(spans)):
        if spans[n, 0] == spans[n, 1]:
            found[n] = NOTHING
            continue
        row = find(keys[n, 0], keys[n, 1], table, rows)
        if row >= 0:
            if not seen[row]:
                if is_intact(row, rows, lines, pieces, following):
                    seen[row] = 1
                else:
                    row = EMPTY
            if row >= 0:
                rows[row].used = clock
                rows[row].uses += np.uint32(rows[row].uses != 0xFFFFFFFF)
        found[n] = row
    return found


def _as_single(typing: Any, bits: Any) -> Any:
    """The float32 of these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


_single: Any = intrinsic(_as_single)


@compiled()
def copy_halves(found: Any, vectors: Any, out: Any) -> None:
    """Vectors in float16, as uint16, to float32 `out`: exact.

    Sign and the other bits are put where float32 has them, and the product with 2^112 makes up for the other exponent.
    """
    for n in range(len(found)):
        row = found[n]
        ahead = found[min(n + AHEAD, len(found) - 1)]
        for line in range(0, out.shape[1], 32):  # of the cache: 64 bytes
            touch(vectors, max(ahead, 0), line)
        if row < 0:
            out[n] = 0
            continue
        halves, singles = vectors[row], out[n]
        for j in range(len(singles)):
            half = np.uint32(halves[j])
            bits = ((half & np.uint32(0x7FFF)) << np.uint32(13)) | ((half & np.uint32(0x8000)) << np.uint32(16))
            singles[j] = _single(np.uint32(bits)) * np.float32(2.0**112)


@compiled()
def copy_singles(found: Any, vectors: Any, out: Any) -> None:
    """Vectors in float32 to `out`."""
    for n in range(len(found)):
        if found[n] < 0:
            out[n] = 0
        else:
            out[n] = vectors[found[n]]


@compiled()
def _keep_text(row: int, data: Any, begin: int, end: int, header: Any, rows: Any, pieces: Any, following: Any) -> None:
    rows[row].length, rows[row].piece = min(end - begin, LONGEST + 1), -1
    if end - begin > LONGEST:
        return
    last = -1
    while begin < end:
        piece = header[FREE_PIECE]
        header[FREE_PIECE] = following[piece]
        header[FREE_PIECES] -= 1
        following[piece] = -1
        for n in range(min(end - begin, PIECE)):
            pieces[piece, n] = data[begin + n]
        begin += PIECE
        if last < 0:
            rows[row].piece = piece
        else:
            following[last] = piece
        last = piece


@compiled()
def _release(row: int, header: Any, table: Any, rows: Any, free: Any, following: Any) -> None:
    if find(rows[row].high, rows[row].low, table, rows) == row:  # not so where a disk has lost it
        take_out(row, table, rows)
    left = np.int64(rows[row].length) if rows[row].length <= LONGEST else 0
    piece = rows[row].piece
    while left > 0:
        after = following[piece]
        following[piece] = header[FREE_PIECE]
        header[FREE_PIECE] = piece
        header[FREE_PIECES] += 1
        piece, left = after, left - PIECE
    rows[row].live = 0
    free[header[FREE_ROWS]] = row
    header[FREE_ROWS] += 1


@compiled()
def release_all(chosen: Any, header: Any, table: Any, rows: Any, free: Any, following: Any) -> None:
    """Take these rows back."""
    for n in range(len(chosen)):
        _release(chosen[n], header, table, rows, free, following)


@compiled()
def store_all(
    data: Any,
    spans: Any,
    keys: Any,
    version: Any,
    made: Any,
    uses: Any,
    used: Any,
    header: Any,
    table: Any,
    rows: Any,
    lines: Any,
    free: Any,
    pieces: Any,
    following: Any,
    seen: Any,
) -> None:
    """Keep these texts' vectors, `made`, bytes as in `lines`. What is there already, and intact, stays, and is copied
    to `made`: what was stored first is the text's vector. There must be rows and pieces enough."""
    for n in range(len(spans)):
        row = find(keys[n, 0], keys[n, 1], table, rows)
        if row >= 0:
            if is_intact(row, rows, lines, pieces, following):
                made[n] = lines[row]
                continue
            _release(row, header, table, rows, free, following)
        header[FREE_ROWS] -= 1
        row = int(free[header[FREE_ROWS]])
        rows[row].high, rows[row].low, rows[row].version = keys[n, 0], keys[n, 1], version
        rows[row].renewed, rows[row].used, rows[row].uses = 0, used[n], uses[n]
        lines[row] = made[n]
        _keep_text(row, data, spans[n, 0], spans[n, 1], header, rows, pieces, following)
        rows[row].check = _checksum(row, rows, lines, pieces, following)
        rows[row].live = 1
        seen[row] = 1
        put(row, table, rows)


@compiled()
def text_of(row: int, rows: Any, pieces: Any, following: Any) -> Any:
    """uint8: the text of a row that keeps it."""
    left = int(rows[row].length)
    text = np.empty(left, dtype=np.uint8)
    piece = rows[row].piece
    for at in range(left):
        if at and at % PIECE == 0:
            piece = following[piece]
        text[at] = pieces[piece, at % PIECE]
    return text


@compiled()
def rebuild(header: Any, table: Any, rows: Any, lines: Any, free: Any, pieces: Any, following: Any, seen: Any) -> int:
    """Make table, free rows and free pieces from the rows alone, of which those stay that are intact; how many did not.

    For a file whose writer was killed, or of a machine that lost power, where what was written last may be torn.
    """
    damaged = 0
    owned = np.zeros(len(following), dtype=np.uint8)
    table[:] = EMPTY
    header[FREE_ROWS] = 0
    for turned in range(len(rows)):
        row = len(rows) - 1 - turned  # the first is the next to be given
        if rows[row].live == 1:
            whole = is_intact(row, rows, lines, pieces, following)
            whole = whole and find(rows[row].high, rows[row].low, table, rows) < 0
            whole = whole and _own(row, rows, following, owned)
            if whole:
                seen[row] = 1
                put(row, table, rows)
                continue
            damaged += 1
        rows[row].live, seen[row] = 0, 0
        free[header[FREE_ROWS]] = row
        header[FREE_ROWS] += 1
    header[FREE_PIECE], header[FREE_PIECES] = -1, 0
    for turned in range(len(following)):
        piece = len(following) - 1 - turned
        if not owned[piece]:
            following[piece] = header[FREE_PIECE]
            header[FREE_PIECE] = piece
            header[FREE_PIECES] += 1
    return damaged


@compiled()
def _own(row: int, rows: Any, following: Any, owned: Any) -> bool:
    """Mark the pieces of a row's text; false, and none marked, where another has one of them."""
    for mark in (0, 1):
        left = np.int64(rows[row].length) if rows[row].length <= LONGEST else 0
        piece = rows[row].piece
        while left > 0:
            if mark:
                owned[piece] = 1
            elif owned[piece]:
                return False
            piece, left = following[piece], left - PIECE
    return True
