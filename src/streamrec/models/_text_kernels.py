"""What texts add to the FM's loops: read in the forward pass, learned from in the same event.

Each text of a row is a vector x: its embedding at length 1, less the mean of all learned from, at length 1 again. So a
step on one text moves its own score as a step on an id moves that id's, whatever the encoder's scale. A projection
makes of it a vector of the FM, P x, and a linear weight, w·x.

A *taste* is the running mean of the embeddings of what one user clicked, the last `span` clicks by and large, and is
read the same way. Its inner product with the row's text, by a weight of its own, is the similarity of the two.

P lies factor by factor, so that all loops go along an embedding, which is long.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from streamrec._compile import compiled
from streamrec._pointers import held, held_rows
from streamrec.models._lanes import long_dot
from streamrec.models._updates import LARGEST, bounded

__all__ = ["NO_SHAPE", "WAYS", "Shape", "Texts", "texts_of"]

WAYS = 8  # places where a user's taste may lie, side by side; of these the one not updated for longest gives way
SHORTEST = np.float32(1e-12)  # squared length under which a vector says nothing
LONGEST_MEAN = 1 << 20  # texts in a mean; after so many it forgets as it learns

# Places in the list of pointers.
REFS, VECTORS, PROJECTIONS, WEIGHTS, MEMORY, MEANS, SEEN, NUMBERS = range(8)
SIMILARITY, KEYS, STAMPS, CLICKS, TASTES, TOUCHED, HEADER = range(8, 15)
CLOCK, EVICTED = 0, 1  # of the header


class Shape(NamedTuple):
    """What the compiler knows of an FM's texts."""

    hidden: int
    """Numbers in an embedding."""
    texts: int
    """Texts in a row."""
    tasted: int
    """The text of which tastes are, -1 where there are none."""
    by: int
    """The field whose ids have the tastes."""

    @property
    def inputs(self) -> int:
        """Vectors that are projected: the texts and then the taste."""
        return self.texts + (self.tasted >= 0)

    @property
    def extra(self) -> int:
        """Numbers that a part of a row has besides those of an FM: see `part` below."""
        return self.hidden if self.tasted >= 0 else 0


NO_SHAPE = Shape(0, 0, -1, -1)


class Texts(NamedTuple):
    """The loops for one number of factors and one shape."""

    read: Callable[..., Any]
    learn: Callable[..., Any]
    part: Callable[..., Any]


def _reads_nothing(
    k: Any, user: Any, knows: Any, texts: Any, xs: Any, vs: Any, flags: Any, sums: Any, squares: Any
) -> Any:
    return np.float32(0.0)


def _learns_nothing(
    k: Any, user: Any, knows: Any, g: Any, label: Any, alone: Any, texts: Any, xs: Any, vs: Any, flags: Any, sums: Any
) -> None:
    pass


def _no_part(texts: Any, xs: Any, flags: Any, found: Any) -> None:
    pass


@cache
def texts_of(dim: int, shape: Shape) -> Texts:
    """The loops for one number of factors and one shape, which the compiler then knows."""
    inline = compiled(inline=True)
    if not shape.texts:
        return Texts(inline(_reads_nothing), inline(_learns_nothing), inline(_no_part))
    hidden, texts_, tasted, _ = shape
    inputs = shape.inputs
    made_of = (dim, *shape[:3])
    zero, one = np.float32(0.0), np.float32(1.0)

    @compiled(inline=True)
    def raised(x: Any) -> Any:
        """Bring x to length 1, in place; false where it has none."""
        size = long_dot(x, x, hidden)
        if not math.isfinite(size) or size < SHORTEST:
            return False
        by = np.float32(one / math.sqrt(size))
        for h in range(hidden):
            x[h] *= by
        return True

    @compiled(inline=True)
    def place_of(user: Any, keys: Any) -> Any:
        """Where this user's taste lies; -1: nowhere."""
        first = (user & (len(keys) // WAYS - 1)) * WAYS
        for at in range(first, first + WAYS):
            if keys[at] == user:
                return at
        return -1

    @compiled(inline=True)
    def place_for(user: Any, keys: Any, stamps: Any, clicks: Any, header: Any) -> Any:
        """The same, and where it is nowhere, a place for it, of which the taste is to begin."""
        first = (user & (len(keys) // WAYS - 1)) * WAYS
        oldest = first
        for at in range(first, first + WAYS):
            if keys[at] == user and stamps[at] > 0:
                return at
            if stamps[at] < stamps[oldest]:
                oldest = at
        header[EVICTED] += stamps[oldest] > 0
        keys[oldest] = user
        clicks[oldest] = zero
        return oldest

    @compiled(made_of=made_of)
    def read(k: int, user: Any, knows: Any, texts: Any, xs: Any, vs: Any, flags: Any, sums: Any, squares: Any) -> Any:
        """Add the vectors of operation `k` to `sums` and `squares`; return what is linear in them.

        `user`: whose taste, where it `knows`. Fills `xs` `(inputs + 1, hidden)`, `vs` `(inputs, dim)` and `flags`:
        which inputs there are, and whether there is a similarity, which is the first number of the last row of `xs`.
        """
        refs = held_rows(texts, REFS, texts_, np.int32)
        vectors = held_rows(texts, VECTORS, hidden, np.float32)
        projections = held_rows(texts, PROJECTIONS, hidden, np.float32)
        weights = held(texts, WEIGHTS, np.float32)
        means = held_rows(texts, MEANS, hidden, np.float32)
        linear = zero
        for t in range(inputs):
            flags[t] = 0
            x = xs[t]
            if t < texts_:
                at = refs[k, t]
                if at < 0:
                    continue
                vector = vectors[at]
                for h in range(hidden):
                    x[h] = vector[h]
                if not raised(x):
                    continue
                mean = means[t]
                for h in range(hidden):
                    x[h] -= mean[h]
            else:
                if not knows:
                    continue
                at = place_of(user, held(texts, KEYS, np.int64))
                if at < 0 or held(texts, STAMPS, np.int64)[at] == 0:
                    continue
                taste = held_rows(texts, TASTES, hidden, np.float32)[at]
                mean = means[tasted]
                for h in range(hidden):
                    x[h] = taste[h] - mean[h]
            if not raised(x):
                continue
            flags[t] = 1
            begin = t * hidden
            linear += long_dot(x, weights[begin : begin + hidden], hidden)
            for f in range(dim):
                v = long_dot(x, projections[t * dim + f], hidden)
                vs[t, f] = v
                sums[f] += v
                squares[f] += v * v
        flags[inputs] = 0
        if tasted >= 0 and flags[inputs - 1] == 1 and flags[tasted] == 1:
            flags[inputs] = 1
            xs[inputs, 0] = long_dot(xs[inputs - 1], xs[tasted], hidden)
            linear += held(texts, SIMILARITY, np.float32)[0] * xs[inputs, 0]
        return linear

    @compiled(inline=True)
    def step_of(g: Any, memory: Any, at: int, rate: Any, eps: Any) -> Any:
        """Adagrad's step by this gradient, with one number remembered."""
        memory[at] += g * g
        return np.float32(rate * g / (math.sqrt(memory[at]) + eps))

    @compiled(made_of=made_of)
    def learn(
        k: int,
        user: Any,
        knows: Any,
        g: Any,
        label: Any,
        alone: Any,
        texts: Any,
        xs: Any,
        vs: Any,
        flags: Any,
        sums: Any,
    ) -> None:
        """Move all that `read` has read, of which `xs`, `vs` and `flags` are, by the logit's gradient `g`; then take
        the texts into their means, and where it was a click, into the user's taste. `alone`: there are no entries."""
        refs = held_rows(texts, REFS, texts_, np.int32)
        vectors = held_rows(texts, VECTORS, hidden, np.float32)
        projections = held_rows(texts, PROJECTIONS, hidden, np.float32)
        weights = held(texts, WEIGHTS, np.float32)
        memory = held(texts, MEMORY, np.float32)
        means = held_rows(texts, MEANS, hidden, np.float32)
        seen = held(texts, SEEN, np.int64)
        numbers = held(texts, NUMBERS, np.float32)
        rate, eps, span = numbers[0], numbers[1], numbers[2]
        g = bounded(g, LARGEST)
        present = 0
        for t in range(inputs):
            present += flags[t]
        for t in range(inputs):
            if flags[t] == 0:
                continue
            x, begin, own = xs[t], t * hidden, t * (dim + 1)
            step = step_of(g, memory, own + dim, rate, eps)
            weight = weights[begin : begin + hidden]
            for h in range(hidden):
                weight[h] -= step * x[h]
            if alone and present == 1:  # no pairs: sum - v would be a rounding error
                continue
            for f in range(dim):
                step = step_of(bounded(g * (sums[f] - vs[t, f]), LARGEST), memory, own + f, rate, eps)
                row = projections[t * dim + f]
                for h in range(hidden):
                    row[h] -= step * x[h]
        if flags[inputs] == 1:
            similarity = held(texts, SIMILARITY, np.float32)
            similarity[0] -= step_of(g * xs[inputs, 0], memory, inputs * (dim + 1), rate, eps)
        for t in range(texts_):
            at = refs[k, t]
            if at < 0:
                continue
            x, vector = xs[t], vectors[at]
            for h in range(hidden):
                x[h] = vector[h]
            if not raised(x):
                continue
            seen[t] = min(seen[t] + 1, LONGEST_MEAN)
            share, mean = one / np.float32(seen[t]), means[t]
            for h in range(hidden):
                mean[h] += share * (x[h] - mean[h])
            if t == tasted and knows and label > zero:
                keys, stamps = held(texts, KEYS, np.int64), held(texts, STAMPS, np.int64)
                clicks, header = held(texts, CLICKS, np.float32), held(texts, HEADER, np.int64)
                place = place_for(user, keys, stamps, clicks, header)
                header[CLOCK] += 1
                stamps[place] = header[CLOCK]
                clicks[place] = min(clicks[place] + one, span)
                held(texts, TOUCHED, np.uint8)[place] = 3
                share, taste = one / clicks[place], held_rows(texts, TASTES, hidden, np.float32)[place]
                if clicks[place] == one:
                    for h in range(hidden):
                        taste[h] = x[h]
                else:
                    for h in range(hidden):
                        taste[h] += share * (x[h] - taste[h])

    @compiled(inline=True)
    def part(texts: Any, xs: Any, flags: Any, found: Any) -> None:
        """What the similarity is the inner product of: of a row with a taste, that by its weight, else the text."""
        if tasted < 0:
            return
        source, by = -1, one
        if flags[inputs - 1] == 1:
            source, by = inputs - 1, held(texts, SIMILARITY, np.float32)[0]
        elif flags[tasted] == 1:
            source = tasted
        for h in range(hidden):
            found[h] = by * xs[source, h] if source >= 0 else zero

    return Texts(read, learn, part)
