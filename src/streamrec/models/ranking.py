"""Ranking with an FM: what candidates share is computed once, and what an item brings can be kept.

A row that is cut in two, (a, b), has the logit bias + own(a) + own(b) + <sum(a), sum(b)>, where sum is Σ v_i x_i of the
entries of one part and own their linear weights and the pairs among themselves (Rendle 2010, lemma 3.1, of a sum of two
parts). So 1,000 candidates cost one shared part and 1,000 inner products, and the best of a catalogue is an exact
maximum inner product search.

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
from streamrec.batch import Batch
from streamrec.errors import ConfigError
from streamrec.models._hash_table import lookup
from streamrec.models._kernels import MAX_LOGIT, MOST, REASSOCIATE, _first_factor, _standardized
from streamrec.models.fm import FM

__all__ = ["logits", "parts", "probabilities", "top"]

Floats = NDArray[np.float32]
Places = NDArray[np.int64]


def parts(model: FM, batch: Batch) -> Floats:
    """float32 `(rows, dim + 1)`: of the entries of each row Σ v_i x_i, and last, Σ w_i x_i and the pairs among them.

    The bias is not in it. Ids without a row count with their first vectors, numbers that are standardised by the
    running statistics, as in `FM.predict`.

    >>> from streamrec import Id, Impression, Schema
    >>> from streamrec.preprocessors import encode
    >>> schema = Schema(Id("user"), Id("item"))
    >>> batch = encode(schema, [Impression(id="i1", time=0.0, user="u1", item="p9")]).batch
    >>> parts(FM(schema, dim=4), batch).shape
    (1, 5)
    """
    if model.weights.device.type != "cpu":
        raise ConfigError(
            f"ranking runs on the CPU, but the parameters are on {model.weights.device}: call model.cpu()"
        )
    tables = (model.weights.detach().numpy(), model.statistics.numpy())
    scale = np.float32(model.init * 3**0.5)  # of the first vectors, as in FM
    kernel = _kernels_of(model.dim).parts
    found: Floats = kernel(
        *(batch.ids, batch.values, batch.fields, batch.starts, batch.ends),
        *(model.ids.slots, *tables, model._standardize, model.seed, scale),
    )
    return found


def logits(model: FM, shared: Floats, items: Floats, places: Places) -> Floats:
    """float32 `(n,)`: the logits of `shared`, `(dim + 1,)`, with the parts `items[places]`.

    `items`: float32 `(rows, dim + 1)`; `places`: int64 `(n,)`, which of them. A logit that is not finite is the bias,
    as `FM.predict` has it. Raises `IndexError` where there is no such row.
    """
    found: Floats = _kernels_of(model.dim).logits(shared, items, places, np.float32(model.bias.item()))
    if len(found) != len(places):
        raise IndexError(f"places must be from 0 to {len(items) - 1}, got {places.min()} to {places.max()}")
    return found


def top(model: FM, shared: Floats, items: Floats, k: int, skipped: Places) -> tuple[Places, Floats]:
    """The `k` largest logits of `shared` with each of `items`, best first, equal ones in the order of `items`.

    `skipped`: int64, rows of `items` that are left out, ascending. Returns their places, int64 `(at most k,)`, and
    their logits. One pass over `items` with a heap of `k`, which is all the memory it takes; where
    `k` is over a sixteenth of `items`, all logits are sorted.
    """
    if k > (len(items) - len(skipped)) // 16 or k == 0:  # a heap this large is slower than to sort
        places = np.delete(np.arange(len(items), dtype=np.int64), skipped)
        found = logits(model, shared, items, places)
        order = np.argsort(-found, kind="stable")[:k]
        return places[order], found[order]
    places, found = _kernels_of(model.dim).top(shared, items, np.float32(model.bias.item()), k, skipped)
    order = np.lexsort((places, -found))
    return places[order], found[order]


@compiled()
def probabilities(found: Any) -> Any:
    """float32 `(n,)`: the click probabilities of these logits, cut as `FM.predict` cuts them."""
    scores = np.empty(len(found), dtype=np.float32)
    for k in range(len(found)):
        scores[k] = np.float32(1.0 / (1.0 + math.exp(-min(max(found[k], -MAX_LOGIT), MAX_LOGIT))))
    return scores


class _Kernels(NamedTuple):
    """The loops for one number of factors, which the compiler then knows."""

    parts: Callable[..., Any]
    logits: Callable[..., Any]
    top: Callable[..., Any]


@cache
def _kernels_of(dim: int) -> _Kernels:
    zero, half = np.float32(0.0), np.float32(0.5)

    @compiled(inline=True)
    def with_item(shared: Any, items: Any, at: int, bias: Any) -> Any:
        row = np.uint64(at)  # unsigned: no check for places from the end
        logit = zero
        for f in range(dim):
            logit += shared[np.uint64(f)] * items[row, np.uint64(f)]
        logit += bias + shared[dim] + items[row, np.uint64(dim)]
        return logit if abs(logit) <= MOST else bias

    @compiled(fastmath=REASSOCIATE)
    def parts(
        ids: Any,
        values: Any,
        fields: Any,
        starts: Any,
        ends: Any,
        slots: Any,
        table: Any,
        stats: Any,
        standardize: Any,
        seed_number: int,
        scale: Any,
    ) -> Any:
        seed = np.uint64(seed_number)
        found = np.zeros((len(starts), dim + 1), dtype=np.float32)
        squares = np.empty(max(dim, 1), dtype=np.float32)
        for row in range(len(starts)):
            sums = found[row]
            linear = zero
            for f in range(dim):
                squares[f] = zero
            for i in range(starts[row], ends[row]):
                x = values[i]
                if standardize[fields[i]]:
                    x = _standardized(x, fields[i], stats)
                at = lookup(ids[i], slots)
                if at >= 0:
                    w = table[at]
                    linear += w[dim] * x
                    for f in range(dim):
                        part = w[f] * x
                        sums[f] += part
                        squares[f] += part * part
                else:  # as in FM: it starts at a known vector
                    linear += zero * x
                    for f in range(dim):
                        part = _first_factor(ids[i], f, seed, scale) * x
                        sums[f] += part
                        squares[f] += part * part
            pairs = zero
            for f in range(dim):
                pairs += sums[f] * sums[f] - squares[f]
            sums[dim] = linear + half * pairs
        return found

    @compiled(fastmath=REASSOCIATE)
    def logits(shared: Any, items: Any, places: Any, bias: Any) -> Any:
        found = np.empty(len(places), dtype=np.float32)
        for k in range(len(places)):
            if places[k] < 0 or places[k] >= len(items):
                return found[:0]
            found[k] = with_item(shared, items, places[k], bias)
        return found

    @compiled(fastmath=REASSOCIATE)
    def top(shared: Any, items: Any, bias: Any, k: int, skipped: Any) -> Any:
        # a heap whose root is the worst: the smallest logit, and of equal ones the last
        found = np.empty(k, dtype=np.float32)
        places = np.empty(k, dtype=np.int64)
        held = 0
        next_skipped = 0
        for place in range(len(items)):
            if next_skipped < len(skipped) and skipped[next_skipped] == place:
                next_skipped += 1
                continue
            logit = with_item(shared, items, place, bias)
            if held < k:
                at = held
                held += 1
                while at > 0:  # up, past what is better
                    above = (at - 1) >> 1
                    # this place is the last so far: among equals it is the worst
                    if found[above] < logit:
                        break
                    found[at], places[at] = found[above], places[above]
                    at = above
                found[at], places[at] = logit, place
            elif logit > found[0]:  # an equal one stays out: it comes later
                at = 0
                while True:  # down, past what is worse; an equal one came before and is better
                    below = 2 * at + 1
                    if below >= k:
                        break
                    right = below + 1
                    if right < k and (
                        found[right] < found[below] or (found[right] == found[below] and places[right] > places[below])
                    ):
                        below = right
                    if found[below] >= logit:
                        break
                    found[at], places[at] = found[below], places[below]
                    at = below
                found[at], places[at] = logit, place
        return places[:held], found[:held]

    return _Kernels(parts, logits, top)
