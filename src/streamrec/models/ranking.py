"""Ranking with an FM: what candidates share is computed once, and what an item brings can be kept.

A row that is cut in two, (a, b), has the logit bias + own(a) + own(b) + <sum(a), sum(b)>, where sum is Σ v_i x_i of the
entries of one part and own their linear weights and the pairs among themselves (Rendle 2010, lemma 3.1, of a sum of two
parts). So 1,000 candidates cost one shared part and 1,000 inner products, and the best of a catalogue is an exact
maximum inner product search.

That search reads one byte of a number instead of four: `coded` keeps the items' parts in steps of 1/127 of the largest
of their neighbours, and `top` computes in float32 only those that may be among the best, by a bound on what the steps
and the rounding of float32 can hide. What the bound lets through too much costs time, never a wrong answer.

Everything here is arithmetic over an FM, without the GIL, and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamrec._compile import compiled
from streamrec._pointers import touch
from streamrec.errors import ConfigError
from streamrec.models._kernels import MAX_LOGIT
from streamrec.models._sums import dot
from streamrec.models.fm import FM

__all__ = ["Codes", "best", "coded", "in_order", "logits", "probabilities", "top"]

Floats = NDArray[np.float32]
Places = NDArray[np.int64]

TILE = 256  # items whose codes share their steps, and lie together, factor by factor; their scores fit the first cache
SMALLEST_STEP = np.float32(1e-32)  # of a code: its inverse is an ordinary float32
SAFE = 1e37  # a sum of terms no larger in all is finite in float32, in whatever order
NO_SUCH_PLACE = -1
AHEAD = 12  # rows whose memory is on its way to the cache


def logits(model: FM, shared: Floats, items: Floats, places: Places) -> Floats:
    """float32 `(n,)`: the logits of `shared`, `(dim + 1,)`, with the parts `items[places]`.

    `items`: float32 `(rows, dim + 1)`; `places`: int64 `(n,)`, which of them. A logit that is not finite is the bias,
    as `FM.predict` has it. Raises `IndexError` where there is no such row.
    """
    found: Floats = _kernels_of(items.shape[1] - 1).logits(shared, items, places, np.float32(model.bias.item()))
    if len(found) != len(places):
        raise _no_such_place(items, places)
    return found


class Codes(NamedTuple):
    """Parts of items in a byte a number, for `top`: about a quarter of their memory on top.

    `codes`: int8 `(tiles, dim + 1, TILE)`, the last tile filled up with zeros; `steps`: float32 `(tiles, dim + 1)`,
    what a code of one is worth, infinite where a number is not finite.
    """

    codes: NDArray[np.int8]
    steps: Floats


def coded(items: Floats) -> Codes:
    """The codes of `items`, float32 `(rows, dim + 1)`, by which `top` finds its way.

    >>> codes = coded(np.array([[1.0, -2.0], [0.5, 0.25]], dtype=np.float32))
    >>> codes.codes[0, :, :2].tolist(), (127 * codes.steps).tolist()
    ([[127, 64], [-127, 16]], [[1.0, 2.0]])
    """
    return Codes(*_coded(items))


def best(model: FM, shared: Floats, items: Floats, places: Places, k: int | None) -> tuple[Places, Floats]:
    """The `k` largest (all: None) of `logits(model, shared, items, places)`, best first, equal ones in their order.

    Returns where they stand in `places`, int64 `(at most k,)`, and the logits, float32. Raises `IndexError` where there
    is no such row.
    """
    count = len(places)
    k = count if k is None else min(k, count)
    if _sorts(k, count):
        return in_order(logits(model, shared, items, places), k)
    held, where, found = _kernels_of(items.shape[1] - 1).best(shared, items, places, np.float32(model.bias.item()), k)
    if held == NO_SUCH_PLACE:
        raise _no_such_place(items, places)
    return where, found


def top(
    model: FM, shared: Floats, items: Floats, k: int, skipped: Places, codes: Codes | None = None
) -> tuple[Places, Floats]:
    """The `k` largest logits of `shared` with each of `items`, best first, equal ones in the order of `items`.

    `skipped`: int64, rows of `items` that are left out, ascending. `codes`: those of `items`; None: made here, which
    takes longer than to search. Returns the places, int64 `(at most k,)`, and their logits. One pass over the codes
    with a heap of `k`, which is all the memory it takes; where `k` is over a sixteenth of `items`, all logits are
    sorted. Raises `ConfigError` where `codes` are of other items.
    """
    if _sorts(k, len(items) - len(skipped)):
        places = np.delete(np.arange(len(items), dtype=np.int64), skipped)
        where, found = in_order(logits(model, shared, items, places), k)
        return places[where], found
    if codes is None:
        codes = coded(items)
    if codes.codes.shape != (-(-len(items) // TILE), items.shape[1], TILE):
        raise ConfigError(f"{len(items)} items have other codes than {codes.codes.shape}: pass coded(items)")
    places, found = _kernels_of(items.shape[1] - 1).top(
        shared, items, np.float32(model.bias.item()), k, skipped, *codes
    )
    return places, found


def _sorts(k: int, count: int) -> bool:
    return k > count // 16 or k == 0  # a heap this large is slower than to sort


def in_order(found: Floats, k: int | None) -> tuple[Places, Floats]:
    """Where the `k` largest (all: None) of these logits stand, best first, equal ones in their order; and the logits.

    >>> in_order(np.array([0.5, 2.0, -1.0, 2.0], dtype=np.float32), 3)[0].tolist()
    [1, 3, 0]
    """
    keys = _keys(found)
    keys.sort()  # no two are the same, so any sort will do: numpy's own for integers is many times as fast as a stable
    where = (keys[:k] & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return where, found[where]


def _no_such_place(items: Floats, places: Places) -> IndexError:
    return IndexError(f"places must be from 0 to {len(items) - 1}, got {places.min()} to {places.max()}")


@compiled()
def probabilities(found: Any) -> Any:
    """float32 `(n,)`: the click probabilities of these logits, cut as `FM.predict` cuts them."""
    scores = np.empty(len(found), dtype=np.float32)
    for k in range(len(found)):
        scores[k] = np.float32(1.0 / (1.0 + math.exp(-min(max(found[k], -MAX_LOGIT), MAX_LOGIT))))
    return scores


@compiled()
def _keys(found: Any) -> Any:
    """uint64 `(n,)`: numbers that rise as `found` falls and, where it is equal, with the place, which is their end."""
    keys = np.empty(len(found), dtype=np.uint64)
    bits = found.view(np.uint32)
    for place in range(len(found)):
        one = bits[place] if found[place] != 0 else np.uint32(0)  # -0 is 0
        rising = ~one if one >> np.uint32(31) else one | np.uint32(0x80000000)
        keys[place] = (np.uint64(~np.uint32(rising)) << np.uint64(32)) | np.uint64(place)
    return keys


@compiled()
def _coded(items: Any) -> Any:
    rows, width = items.shape
    tiles = (rows + TILE - 1) // TILE
    codes = np.zeros((tiles, width, TILE), dtype=np.int8)
    steps = np.empty((tiles, width), dtype=np.float32)
    largest = np.empty(width, dtype=np.float32)
    for tile in range(tiles):
        begin = tile * TILE
        end = min(begin + TILE, rows)
        largest[:] = np.float32(0.0)
        for row in range(begin, end):
            for f in range(width):
                size = abs(items[row, f])
                if not math.isfinite(size):
                    size = np.float32(np.inf)
                largest[f] = max(largest[f], size)
        for f in range(width):
            steps[tile, f] = max(largest[f] / np.float32(127.0), SMALLEST_STEP)
            if math.isfinite(largest[f]):
                by = np.float32(1.0) / steps[tile, f]
                for row in range(begin, end):
                    codes[tile, f, row - begin] = np.int8(np.rint(items[row, f] * by))
    return codes, steps


# A heap whose root is the worst: the smallest logit, and of equal ones the last.


@compiled()
def _rise(found: Any, places: Any, at: int, logit: Any, place: int) -> None:
    """Put one that comes after all others behind them, at `at`, and let it pass what is better."""
    while at > 0:
        above = (at - 1) >> 1
        if found[above] < logit:
            break
        found[at], places[at] = found[above], places[above]
        at = above
    found[at], places[at] = logit, place


@compiled()
def _sink(found: Any, places: Any, held: int, logit: Any, place: int) -> None:
    """Put one in the place of the root, of `held`, and let it pass what is worse."""
    at = 0
    while True:
        below = 2 * at + 1
        if below >= held:
            break
        right = below + 1
        if right < held and (
            found[right] < found[below] or (found[right] == found[below] and places[right] > places[below])
        ):
            below = right
        if found[below] > logit or (found[below] == logit and places[below] < place):
            break
        found[at], places[at] = found[below], places[below]
        at = below
    found[at], places[at] = logit, place


@compiled()
def _unheap(found: Any, places: Any, held: int) -> None:
    """Sort a heap, best first."""
    for end in range(held - 1, 0, -1):
        logit, place = found[end], places[end]
        found[end], places[end] = found[0], places[0]
        _sink(found, places, end, logit, place)


class _Kernels(NamedTuple):
    """The loops for one number of factors, which the compiler then knows."""

    logits: Callable[..., Any]
    best: Callable[..., Any]
    top: Callable[..., Any]


@cache
def _kernels_of(dim: int) -> _Kernels:
    zero, one = np.float32(0.0), np.float32(1.0)
    # Of a sum of products that is rounded on the way, to its size: gamma_n of Higham 2002, lemma 3.1, with n for the
    # factors, the bias and what a code is multiplied by; twice, for the rough sum is compared with another rounded one.
    rounding = 2.0 * 1.1 * (dim + 8) * 2.0**-24

    @compiled(inline=True)
    def with_item(shared: Any, items: Any, at: int, bias: Any) -> Any:
        item = items[np.uint64(at)]  # unsigned: no check for places from the end
        logit = dot(shared, item, dim) + (bias + shared[dim] + item[dim])
        return logit if math.isfinite(logit) else bias

    @compiled(made_of=(dim,))
    def logits(shared: Any, items: Any, places: Any, bias: Any) -> Any:
        found = np.empty(len(places), dtype=np.float32)
        for k in range(len(places)):
            if places[k] < 0 or places[k] >= len(items):
                return found[:0]
            found[k] = with_item(shared, items, places[k], bias)
        return found

    @compiled(made_of=(dim,))
    def best(shared: Any, items: Any, places: Any, bias: Any, k: int) -> Any:
        found = np.empty(k, dtype=np.float32)
        where = np.empty(k, dtype=np.int64)
        for n in range(len(places)):
            if places[n] < 0 or places[n] >= len(items):
                return NO_SUCH_PLACE, where, found
            if n + AHEAD < len(places):  # touching a place that is none does no harm
                touch(items, places[n + AHEAD], 0)
                touch(items, places[n + AHEAD], dim)
            logit = with_item(shared, items, places[n], bias)
            if n < k:
                _rise(found, where, n, logit, n)
            elif logit > found[0]:  # an equal one stays out: it comes later
                _sink(found, where, k, logit, n)
        _unheap(found, where, k)
        return k, where, found

    @compiled(made_of=(dim,))
    def threshold(shared: Any, bias: Any, steps: Any, weights: Any, worst: Any) -> Any:
        """What the rough sum of an item of this tile comes to at least, if its logit is over `worst`.

        `weights`: gets what each code is multiplied by. Minus infinity where nothing can be said.
        """
        step = 0.0
        for f in range(dim + 1):
            factor = shared[f] if f < dim else one
            weights[f] = factor * steps[f]
            step += abs(np.float64(factor)) * np.float64(steps[f])
        size = 127.0 * step + abs(np.float64(bias)) + abs(np.float64(shared[dim]))
        if not size <= SAFE:  # also where it is no number: then a logit may be the bias
            return np.float32(-np.inf)
        # a number is at most half a step from its code, and a thousandth for the rounding of the code itself;
        # 1e-30 for what is too small for float32
        hidden = 0.501 * step + rounding * size + 1e-30
        least = np.float64(worst) - np.float64(bias) - np.float64(shared[dim]) - hidden
        return np.float32(least - 2e-7 * abs(least))  # down, whatever the rounding to float32

    @compiled(made_of=(dim,))
    def top(shared: Any, items: Any, bias: Any, k: int, skipped: Any, codes: Any, steps: Any) -> Any:
        found = np.empty(k, dtype=np.float32)
        places = np.empty(k, dtype=np.int64)
        rough = np.empty(TILE, dtype=np.float32)
        weights = np.empty(dim + 1, dtype=np.float32)
        held = 0
        next_skipped = 0
        for tile in range(len(codes)):
            least = np.float32(-np.inf)
            if held == k:
                least = threshold(shared, bias, steps[tile], weights, found[0])
            filters = least > -np.inf
            if filters:
                for r in range(TILE):
                    rough[r] = zero
                for f in range(dim + 1):
                    weight = weights[f]
                    for r in range(TILE):
                        rough[r] += weight * np.float32(codes[tile, f, r])
                highest = rough[0]
                for r in range(TILE):
                    highest = max(highest, rough[r])
                if highest < least:
                    continue
            begin = tile * TILE
            for r in range(min(TILE, len(items) - begin)):
                if filters and rough[r] < least:
                    continue
                place = begin + r
                while next_skipped < len(skipped) and skipped[next_skipped] < place:
                    next_skipped += 1
                if next_skipped < len(skipped) and skipped[next_skipped] == place:
                    continue
                logit = with_item(shared, items, place, bias)
                if held < k:
                    _rise(found, places, held, logit, place)
                    held += 1
                elif logit > found[0]:  # an equal one stays out: it comes later
                    _sink(found, places, k, logit, place)
        _unheap(found, places, held)
        return places[:held], found[:held]

    return _Kernels(logits, best, top)
