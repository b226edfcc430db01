"""XXH64 (Collet, the specification at xxhash.com), compiled, over many short strings at once.

Ids must stay the same for as long as a checkpoint lives, so the hash is a published one with test vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec._compile import compiled

__all__ = ["end_of", "NO_CUTS", "hash_bytes", "hashes", "joined", "packed", "uniform", "xxh64"]

_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)


@compiled(inline=True)
def _rotated(x: Any, by: int) -> Any:
    return (x << np.uint64(by)) | (x >> np.uint64(64 - by))


@compiled(inline=True)
def _round(lane: Any, word: Any) -> Any:
    return _rotated(lane + word * _P2, 31) * _P1


@compiled(inline=True)
def _word(data: Any, at: int, size: int) -> Any:
    """`size` bytes as a little-endian number."""
    word = np.uint64(0)
    for i in range(size):
        word |= np.uint64(data[at + i]) << np.uint64(8 * i)
    return word


@compiled()
def xxh64(data: Any, start: int, end: int, seed: Any) -> Any:
    """uint64: the hash of the bytes `start` to `end` (excluded) of `data`, uint8."""
    length = end - start
    at = start
    if length >= 32:
        a, b, c, d = seed + _P1 + _P2, seed + _P2, seed, seed - _P1
        while end - at >= 32:
            a = _round(a, _word(data, at, 8))
            b = _round(b, _word(data, at + 8, 8))
            c = _round(c, _word(data, at + 16, 8))
            d = _round(d, _word(data, at + 24, 8))
            at += 32
        h = _rotated(a, 1) + _rotated(b, 7) + _rotated(c, 12) + _rotated(d, 18)
        h = (h ^ _round(np.uint64(0), a)) * _P1 + _P4
        h = (h ^ _round(np.uint64(0), b)) * _P1 + _P4
        h = (h ^ _round(np.uint64(0), c)) * _P1 + _P4
        h = (h ^ _round(np.uint64(0), d)) * _P1 + _P4
    else:
        h = seed + _P5
    h += np.uint64(length)
    while end - at >= 8:
        h = _rotated(h ^ _round(np.uint64(0), _word(data, at, 8)), 27) * _P1 + _P4
        at += 8
    if end - at >= 4:
        h = _rotated(h ^ (_word(data, at, 4) * _P1), 23) * _P2 + _P3
        at += 4
    while at < end:
        h = _rotated(h ^ (np.uint64(data[at]) * _P5), 11) * _P1
        at += 1
    h = (h ^ (h >> np.uint64(33))) * _P2
    h = (h ^ (h >> np.uint64(29))) * _P3
    return h ^ (h >> np.uint64(32))


def joined(strings: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """uint8: the strings in UTF-8, a zero byte after each; int64 `(n,)`: where those zero bytes are."""
    if not strings:
        return np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.int64)
    # "surrogatepass" takes every string, and no two to the same bytes
    data = np.frombuffer(("\0".join(strings) + "\0").encode("utf-8", "surrogatepass"), dtype=np.uint8)
    cuts = np.flatnonzero(data == 0)
    if len(cuts) == len(strings):
        return data, cuts
    lengths = [len(string.encode("utf-8", "surrogatepass")) + 1 for string in strings]  # one holds a zero byte
    return data, np.cumsum(lengths, dtype=np.int64) - 1


NO_CUTS = np.empty(0, dtype=np.int64)


def packed(strings: Sequence[str]) -> tuple[bytes, NDArray[np.int64]]:
    """`joined` as compiled loops take it in least time: the bytes, and the cuts only where a string holds a zero byte.

    `end_of` tells where each ends. Raises `TypeError` where a string is none.
    """
    data = ("\0".join(strings) + "\0").encode("utf-8", "surrogatepass")
    return data, NO_CUTS if data.count(0) == max(len(strings), 1) else joined(strings)[1]


@compiled()
def end_of(data: Any, begin: int, cuts: Any, n: int) -> int:
    """Where the n-th of the strings that `packed` gives ends, which starts at `begin`."""
    if len(cuts):
        return int(cuts[n])
    while data[begin]:
        begin += 1
    return begin


@compiled()
def _hashes(data: Any, cuts: Any, seed: Any) -> Any:
    found = np.empty(len(cuts), dtype=np.uint64)
    begin = 0
    for i in range(len(cuts)):
        found[i] = xxh64(data, begin, cuts[i], seed)
        begin = cuts[i] + 1
    return found


def hashes(strings: Sequence[str], seed: int = 0) -> NDArray[np.int64]:
    """int64 `(n,)`: XXH64 of each string.

    >>> hashes(["i1", "i2", "i1"]).tolist()
    [3410491466200771940, 6467775973143590155, 3410491466200771940]
    """
    found: NDArray[np.uint64] = _hashes(*joined(strings), np.uint64(seed))
    return found.view(np.int64)


def uniform(strings: Sequence[str], seed: int = 0) -> NDArray[np.float64]:
    """float64 `(n,)`: a number in [0, 1) for each string, the same wherever and whenever it is asked for.

    What is chosen by it is chosen alike by every process that sees the string.

    >>> uniform(["i1", "i2", "i1"]).round(3)
    array([0.185, 0.351, 0.185])
    """
    return (hashes(strings, seed).view(np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hash_bytes(value: bytes, seed: int = 0) -> int:
    """XXH64 of some bytes: an unsigned 64-bit integer.

    >>> hex(hash_bytes(b""))
    '0xef46db3751d8e999'
    """
    return int(xxh64(np.frombuffer(value, dtype=np.uint8), 0, len(value), np.uint64(seed)))


def id_of(field: str, value: str, seed: int = 0) -> int:
    """The id by which rows hold a value of a field: XXH64 of its UTF-8, seeded by XXH64 of the field's name, which is
    seeded by the schema's `seed`; as a signed 64-bit integer.

    >>> id_of("user", "u1")
    5213737755532190135
    """
    hashed = hash_bytes(value.encode("utf-8", "surrogatepass"), hash_bytes(field.encode(), seed))
    return hashed - 2**64 if hashed >= 2**63 else hashed
