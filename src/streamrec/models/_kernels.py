"""The compiled loops of the FM: operations in order over encoded rows, event by event.

One loop does all: scoring and learning share one forward pass, so that a score does not depend on what is done next,
on how many rows a call has, or on who calls. Nothing is allocated per event.

All that belongs to an id is one row of the table: its `dim` factors, its linear weight, what the optimizers remember of
them (see `_updates`), and nothing up to a multiple of 16 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from streamrec._compile import compiled
from streamrec._pointers import held, held_rows, touch
from streamrec.models._hash_table import FREED, HAND, SIGHTED, USED, insert, lookup, release, room
from streamrec.models._numbers import as_seen, observe
from streamrec.models._sums import dot, total
from streamrec.models._text_kernels import NO_SHAPE, Shape, texts_of
from streamrec.models._updates import LARGEST, bounded, first_factor, updates_of
from streamrec.protocols import LEARN, WEIGH

__all__ = ["MISFIT", "NO_ROOM", "Kernels", "first_factors", "kernels_of", "located", "width_of"]

MISFIT = -1
NO_ROOM = -3.0
NEAR_ROWS = 8192  # fewer rows are in the cache anyway: looking ahead would cost some 4 % and bring nothing
MAX_LOGIT = 15.0  # beyond it float32 probabilities are 0 or 1 to 3e-7, and their log loss is noise
FREE_ROW = -np.inf  # in place of the time at which a row expires

# Places in the list of pointers that all loops are given.
SLOTS, OLD, OWNERS, HEAD, TABLE, TOUCHED, EXPIRY, BIAS, BIAS_MEMORY, STANDARDIZE, STATISTICS, CLOCK = range(12)
ADMIT, TTL, NEW_IDS, SKETCH, NUMBERS, ARRAYS = range(12, 18)
SEED, WIDTH = 2 * ARRAYS, 2 * ARRAYS + 1  # WIDTH: columns of the statistics


@compiled()
def first_factors(ids: Any, dim: int, seed_number: int, scale: Any) -> Any:
    """float32 `(n, dim)`: the vectors at which these ids start."""
    seed = np.uint64(seed_number)
    vectors = np.empty((len(ids), dim), dtype=np.float32)
    for i in range(len(ids)):
        for f in range(dim):
            vectors[i, f] = first_factor(ids[i], f, seed, scale)
    return vectors


@compiled()
def located(ids: Any, fields: Any, slots: Any, old: Any, expiry: Any, now: float, admit: Any, new_ids: Any) -> Any:
    """int64 `(2, entries)`: the rows that count for these entries, -1 where there is none, and the ids they are of."""
    found = np.empty((2, len(ids)), dtype=np.int64)
    for i in range(len(ids)):
        key = ids[i]
        row = lookup(key, slots, old)
        if row >= 0 and len(expiry) > 0 and expiry[row] < now:
            row = -1
        if row < 0 and len(admit) > 0 and admit[fields[i]] > 1:
            key = new_ids[fields[i]]
            row = lookup(key, slots, old)
        found[0, i] = max(row, -1)
        found[1, i] = key
    return found


@compiled(inline=True)
def _sight(key: Any, sketch: Any, header: Any) -> Any:
    """Count a sighting of an id that has no row; return how many there were: never too few since the last halving.

    A count-min sketch of two counters an id, of which the smaller are raised (Estan & Varghese 2002), all halved after
    every len(sketch) / 8 sightings (TinyLFU, Einziger et al. 2017).
    """
    mask = len(sketch) - 1
    one, other = key & mask, (key >> 32) & mask
    least = min(sketch[one], sketch[other])
    if least < 255:
        if sketch[one] == least:
            sketch[one] = least + 1
        if sketch[other] == least:
            sketch[other] = least + 1
    header[SIGHTED] += 1
    if header[SIGHTED] >= len(sketch) >> 3:
        header[SIGHTED] = 0
        for i in range(len(sketch)):
            sketch[i] = sketch[i] >> 1
    return least + 1


class Kernels(NamedTuple):
    """The loops for one kind of FM."""

    step: Callable[..., tuple[int, int]]
    one: Callable[..., float]
    parts: Callable[..., Any]


def width_of(dim: int, factor_rule: int, linear_rule: int) -> int:
    """Numbers in a row of the table."""
    return (updates_of(dim, factor_rule, linear_rule).end + 3) // 4 * 4


@cache
def kernels_of(
    dim: int, factor_rule: int, linear_rule: int, admits: bool, expires: bool, shape: Shape = NO_SHAPE
) -> Kernels:
    """The loops for one number of factors and one pair of optimizers, which the compiler then knows.

    `admits`, `expires`: whether ids of some field share a row until they are admitted, or expire. `shape`: of texts.
    """
    read_texts, learn_texts, part_of_texts = texts_of(dim, shape)
    inputs, hidden, taste_field, extra = shape.inputs, shape.hidden, shape.by, shape.extra
    begin_memory, move_linear, move_factors, linear_at, _ = updates_of(dim, factor_rule, linear_rule)
    width = width_of(dim, factor_rule, linear_rule)
    made_of = (dim, factor_rule, linear_rule, admits, expires, *(shape if shape.texts else ()))
    weights_end = dim + 1
    zero = np.float32(0.0)
    half = np.float32(0.5)

    @compiled(inline=True)
    def read_only(pointers: Any) -> Any:
        """The arrays that the forward pass reads, and its seed, of a list of pointers."""
        return (
            held_rows(pointers, SLOTS, 2, np.int64),
            held_rows(pointers, OLD, 2, np.int64),
            held_rows(pointers, TABLE, width, np.float32),
            held(pointers, EXPIRY, np.float64),
            held(pointers, CLOCK, np.float64),
            held(pointers, ADMIT, np.int64),
            held(pointers, NEW_IDS, np.int64),
            held(pointers, STANDARDIZE, np.uint8),
            held_rows(pointers, STATISTICS, pointers[WIDTH], np.float64),
            held(pointers, NUMBERS, np.float32),
            np.uint64(pointers[SEED]),
        )

    @compiled(inline=True)
    def touch_slots(ids: Any, start: int, end: int, slots: Any) -> None:
        mask = len(slots) - 1
        for e in range(start, end):
            touch(slots, ids[e] & mask, 0)

    @compiled(inline=True)
    def find_and_touch(
        ids: Any, start: int, end: int, slots: Any, old: Any, found: Any, table: Any, learns: Any
    ) -> None:
        for e in range(start, end):
            at = lookup(ids[e], slots, old)
            found[e - start] = at
            if at >= 0:
                last = width - 1 if learns else weights_end - 1
                for column in range(0, last, 16):
                    touch(table, at, column)
                touch(table, at, last)

    @compiled(inline=True)
    def forward(
        ids: Any,
        values: Any,
        fields: Any,
        start: int,
        count: int,
        known: Any,
        where: Any,
        shared: Any,
        xs: Any,
        sums: Any,
        squares: Any,
        slots: Any,
        old: Any,
        table: Any,
        expiry: Any,
        now: Any,
        admit: Any,
        new_ids: Any,
        standardize: Any,
        stats: Any,
        seed: Any,
        scale: Any,
    ) -> Any:
        """Σ v x in `sums`, Σ (v x)² in `squares`, both set anew; returns Σ w x.

        Fills `where`, the row of each entry, or a negative number; `shared`, 1 where that is its field's row for new
        ids; and `xs`, what each is multiplied by. `known`: what `where` holds was found before, by and large.
        """
        linear = zero
        for f in range(dim):
            sums[f] = zero
            squares[f] = zero
        for i in range(count):
            key = ids[start + i]
            x = values[start + i]
            if len(standardize) > 0 and standardize[fields[start + i]]:
                x = as_seen(x, standardize[fields[start + i]], fields[start + i], stats)
            xs[i] = x
            at = where[i] if known else -1
            if expires and at >= 0 and expiry[at] < now:
                at = -1
            if at < 0:  # not looked up yet, or the event before brought it
                at = lookup(key, slots, old)
                if expires and at >= 0 and expiry[at] < now:
                    at = -1
            if admits:
                shared[i] = 0
                if at < 0 and admit[fields[start + i]] > 1:
                    shared[i] = 1
                    key = new_ids[fields[start + i]]
                    at = lookup(key, slots, old)
            where[i] = at
            if at >= 0:
                w = table[at]
                linear += w[dim] * x
                for f in range(dim):
                    part = w[f] * x
                    sums[f] += part
                    squares[f] += part * part
            else:  # it starts at a known vector, so it need not be in the table to be scored
                linear += zero * x  # nan for an x that is not finite, whatever dim is
                for f in range(dim):
                    part = first_factor(key, f, seed, scale) * x
                    sums[f] += part
                    squares[f] += part * part
        return linear

    @compiled(inline=True)
    def pairs_of(sums: Any, squares: Any) -> Any:
        """Σ <v_i, v_j> x_i x_j of all pairs."""
        return half * (dot(sums, sums, dim) - total(squares, dim))

    @compiled(inline=True)
    def tasting(ids: Any, fields: Any, start: int, count: int) -> Any:
        """Whose taste counts in this row, and whether anybody's does."""
        if taste_field >= 0:
            for e in range(start, start + count):
                if fields[e] == taste_field:
                    return ids[e], True
        return np.int64(0), False

    @compiled(inline=True)
    def begin_row(key: Any, row: Any, seed: Any, scale: Any, fnum: Any, lnum: Any) -> None:
        for f in range(dim):
            row[f] = first_factor(key, f, seed, scale)
        row[dim] = zero
        begin_memory(row, fnum, lnum)

    @compiled(inline=True)
    def room_for_texts() -> Any:
        return (
            np.empty((inputs + 1, hidden), dtype=np.float32),
            np.empty((inputs, dim), dtype=np.float32),
            np.empty(inputs + 1, dtype=np.int64),
        )

    @compiled(made_of=made_of)
    def step(
        ids: Any,
        values: Any,
        fields: Any,
        starts: Any,
        ends: Any,
        times: Any,
        rows: Any,
        ops: Any,
        labels: Any,
        weights: Any,
        pointers: Any,
        texts: Any,
        first: int,
        scores: Any,
    ) -> tuple[int, int]:
        """Fill `scores` (before learning) from operation `first` on. Return how far it came, which is the end unless
        the table may lack room for the next one; and how many rows were left out of learning because of a logit or a
        gradient that is not finite. Do nothing, and return `MISFIT`, where the columns are not equally long or there is
        no such row."""
        if not len(rows) == len(ops) == len(labels) == len(weights) == len(scores):
            return MISFIT, 0
        slots, old, table, expiry, clock, admit, new_ids, standardize, stats, numbers, seed = read_only(pointers)
        owners = held(pointers, OWNERS, np.int64)
        header = held(pointers, HEAD, np.int64)
        touched = held(pointers, TOUCHED, np.uint8)
        bias = held(pointers, BIAS, np.float32)
        bias_memory = held(pointers, BIAS_MEMORY, np.float32)
        ttl = held(pointers, TTL, np.float64)
        sketch = held(pointers, SKETCH, np.uint8)
        scale = numbers[0]
        fnum = numbers[1:6]
        lnum = numbers[6:11]
        longest = 1
        for k in range(first, len(rows)):
            if rows[k] < 0 or rows[k] >= len(starts):
                return MISFIT, 0
            longest = max(longest, ends[rows[k]] - starts[rows[k]])
        places = np.empty((3, longest), dtype=np.int64)
        where, ahead, shared = places[0], places[1], places[2]
        floats = np.empty(2 * dim + longest, dtype=np.float32)
        sums, squares, xs = floats[:dim], floats[dim : 2 * dim], floats[2 * dim :]
        text_xs, text_vs, flags = room_for_texts()
        left_out = 0
        # Memory is slow, not the arithmetic: while one event is computed, the rows of the next are on their way to the
        # cache, and the slots of the one after it.
        far = header[USED] >= NEAR_ROWS
        for k in range(first, min(first + 2, len(rows)) if far else first):
            touch_slots(ids, starts[rows[k]], ends[rows[k]], slots)
        if far and first < len(rows):
            then, learns = rows[first], (ops[first] & LEARN) != 0
            find_and_touch(ids, starts[then], ends[then], slots, old, ahead, table, learns)
        for k in range(first, len(rows)):
            row = rows[k]
            start = starts[row]
            count = ends[row] - start
            learns = (ops[k] & LEARN) != 0
            if learns and room(slots, owners, header) < count:
                return k, left_out
            if far:
                where, ahead = ahead, where
            if far and k + 1 < len(rows):
                if k + 2 < len(rows):
                    touch_slots(ids, starts[rows[k + 2]], ends[rows[k + 2]], slots)
                then = rows[k + 1]
                learns_then = (ops[k + 1] & LEARN) != 0
                find_and_touch(ids, starts[then], ends[then], slots, old, ahead, table, learns_then)
            linear = forward(
                ids,
                values,
                fields,
                start,
                count,
                far,
                where,
                shared,
                xs,
                sums,
                squares,
                slots,
                old,
                table,
                expiry,
                clock[0],
                admit,
                new_ids,
                standardize,
                stats,
                seed,
                scale,
            )
            user, knows = tasting(ids, fields, start, count)
            linear += read_texts(k, user, knows, texts, text_xs, text_vs, flags, sums, squares)
            logit = bias[0] + linear + pairs_of(sums, squares)
            if not math.isfinite(logit):
                scores[k] = np.float32(1.0 / (1.0 + math.exp(-min(max(bias[0], -MAX_LOGIT), MAX_LOGIT))))
                left_out += learns
                continue
            clipped = min(max(logit, -MAX_LOGIT), MAX_LOGIT)
            p = np.float32(1.0 / (1.0 + math.exp(-clipped)))
            scores[k] = p
            if not learns:
                continue
            g = (p - labels[k]) * weights[k]
            if ops[k] & WEIGH:
                one = np.float32(1.0)
                g = (one - p) * (one + p) * (p - labels[k] * (one + p)) * weights[k]
            if not math.isfinite(g):
                left_out += 1
                continue
            move_linear(bias, 0, bounded(g, LARGEST), bias_memory, 0, lnum)
            spread = total(squares, dim)
            parts = count
            for n in range(inputs):
                parts += flags[n]
            # A bound of g x, so that no factor's gradient is beyond ±LARGEST: |sum - w x| <= 2 √(parts spread).
            most = LARGEST / np.float32(100.0)
            if parts * spread > 2500.0:  # never, but for absurd values
                most = np.float32(LARGEST / (2.0 * math.sqrt(parts * spread)))
            if parts == 1:  # no pairs: sum - w x is the rounding error of w x, which Adagrad would make a whole step of
                most = zero
            learn_texts(k, user, knows, g, labels[k], parts == 1, texts, text_xs, text_vs, flags, sums)
            now = clock[0]
            if expires:
                now = max(now, times[row])
            for i in range(count):
                at = where[i]
                key = ids[start + i]
                field = fields[start + i]
                own = not (admits and shared[i] == 1)
                if not own and _sight(key, sketch, header) >= admit[field]:
                    # admitted: it goes on from where the row that it shared stands, with an optimizer that is new
                    own = True
                    common = at
                    at = insert(key, slots, old, owners, header)
                    begin_row(new_ids[field], table[at], seed, scale, fnum, lnum)
                    if common >= 0:
                        for f in range(weights_end):
                            table[at, f] = table[common, f]
                        begin_memory(table[at], fnum, lnum)
                elif at < 0:
                    if not own:
                        key = new_ids[field]
                    live = header[USED] - header[FREED]
                    at = insert(key, slots, old, owners, header)
                    if header[USED] - header[FREED] > live or (expires and expiry[at] < clock[0]):
                        begin_row(key, table[at], seed, scale, fnum, lnum)
                touched[at] = 3
                if expires:
                    expiry[at] = now + ttl[field] if own else np.inf
                x = xs[i]
                w = table[at]
                gx = g * x
                move_linear(w, dim, bounded(gx, LARGEST), w, linear_at, lnum)
                move_factors(w, sums, bounded(gx, most), x, fnum, squares)
                if len(standardize) > 0 and standardize[field]:
                    observe(values[start + i], standardize[field], field, stats)
            if expires:
                clock[0] = now
                # a slice of the table for every event, so that what expires does not depend on how calls are cut
                for _ in range(2 * count):
                    at = header[HAND]
                    header[HAND] = at + 1 if at + 1 < header[USED] else 0
                    if FREE_ROW < expiry[at] < now:
                        release(at, slots, old, owners, header)
                        expiry[at] = FREE_ROW
                        touched[at] = 3
        return len(rows), left_out

    @compiled(made_of=made_of)
    def one(columns: Any, pointers: Any, learns: bool, label: float, weight: float) -> float:
        """`step` with one operation on the one row that `columns` points to: the score, less than 0 where it is not
        done: `NO_ROOM`, or -1 - score where the row was left out of learning. At the end of `columns`: row 0; the two
        operations there are."""
        ids, values, fields = held(columns, 0, np.int64), held(columns, 1, np.float32), held(columns, 2, np.int32)
        starts, ends, times = held(columns, 3, np.int64), held(columns, 4, np.int64), held(columns, 5, np.float64)
        rows, ops = held(columns, 6, np.int64), held(columns, 7, np.int8)
        op = ops[1:] if learns else ops[:1]
        floats = np.empty(3, dtype=np.float32)
        labels, weights, scores = floats[:1], floats[1:2], floats[2:]
        labels[0], weights[0] = label, weight
        texts = columns[:0]
        done, left_out = step(
            ids, values, fields, starts, ends, times, rows, op, labels, weights, pointers, texts, 0, scores
        )
        if done == 0:
            return NO_ROOM
        return float(-1 - scores[0] if left_out else scores[0])

    @compiled(made_of=made_of)
    def parts(ids: Any, values: Any, fields: Any, starts: Any, ends: Any, pointers: Any, texts: Any) -> Any:
        """float32 `(rows, dim + 1)`: Σ v x, and last, Σ w x and the pairs among the entries. The bias is not in it.
        Between them, where there are tastes, what the similarity is the inner product of: `hidden` numbers."""
        slots, old, table, expiry, clock, admit, new_ids, standardize, stats, numbers, seed = read_only(pointers)
        longest = 1
        for row in range(len(starts)):
            longest = max(longest, ends[row] - starts[row])
        places = np.empty((2, longest), dtype=np.int64)
        where, shared = places[0], places[1]
        floats = np.empty(dim + longest, dtype=np.float32)
        squares, xs = floats[:dim], floats[dim:]
        text_xs, text_vs, flags = room_for_texts()
        found = np.empty((len(starts), dim + extra + 1), dtype=np.float32)
        for row in range(len(starts)):
            sums = found[row]
            linear = forward(
                ids,
                values,
                fields,
                starts[row],
                ends[row] - starts[row],
                False,
                where,
                shared,
                xs,
                sums,
                squares,
                slots,
                old,
                table,
                expiry,
                clock[0],
                admit,
                new_ids,
                standardize,
                stats,
                seed,
                numbers[0],
            )
            user, knows = tasting(ids, fields, starts[row], ends[row] - starts[row])
            linear += read_texts(row, user, knows, texts, text_xs, text_vs, flags, sums, squares)
            part_of_texts(texts, text_xs, flags, sums[dim:])
            found[row, dim + extra] = linear + pairs_of(sums, squares)
        return found

    return Kernels(step, one, parts)
