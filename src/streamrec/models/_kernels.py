"""The compiled loop of the FM: operations in order over encoded rows, event by event.

One loop does all: scoring and learning share one forward pass, so that a score does not depend on what is done next,
on how many rows a call has, or on who calls. Nothing is allocated per event.

The parameters of an id are one row of `weights`: its `dim` factors, then its linear weight. What the optimizers
remember of them is one row of `state`: factors' slots (each `dim` wide), factors' row slot, linear slots, linear
row slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from streamrec._compile import compiled
from streamrec.models._hash_table import insert, lookup
from streamrec.protocols import LEARN

__all__ = ["MISFIT", "NO_ROOM", "first_factors", "normalized", "step_kernel"]

SGD, ADAGRAD, FTRL, ADAM, ROW_ADAGRAD = 0, 1, 2, 3, 4
REASSOCIATE = {"contract", "reassoc", "nsz", "arcp"}  # not "nnan": the guard against nan must stay
# What is finite is compared with this: math.isfinite is x - x == 0, which REASSOCIATE lets the compiler take as true.
MOST = np.finfo(np.float32).max
LARGEST = np.float32(1e9)  # of a gradient: nothing sensible comes near, and float32 holds the square, many times
MISFIT, NO_ROOM = -1, -2
NEAR_ROWS = 8192  # fewer rows are in the cache anyway: looking ahead would cost some 4 % and bring nothing
MAX_LOGIT = 15.0  # beyond it float32 probabilities are 0 or 1 to 3e-7, and their log loss is noise

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S40 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(40)


@compiled(inline=True)
def _first_factor(key: Any, factor: int, seed: Any, scale: float) -> Any:
    """Where factor number `factor` of an id starts: uniform in ±scale, a function of the id and the seed alone."""
    # SplitMix64 (Steele et al. 2014), so that an id's first vector does not depend on when it came
    mixed = np.uint64(key) ^ seed
    mixed += _GOLDEN * np.uint64(factor + 1)
    mixed = (mixed ^ (mixed >> _S30)) * _MIX_1
    mixed = (mixed ^ (mixed >> _S27)) * _MIX_2
    mixed ^= mixed >> _S31
    return np.float32((np.float32(mixed >> _S40) * np.float32(2.0**-23) - np.float32(1.0)) * scale)


@compiled()
def first_factors(ids: Any, dim: int, seed_number: int, scale: Any) -> Any:
    """float32 `(n, dim)`: the vectors at which these ids start."""
    seed = np.uint64(seed_number)
    vectors = np.empty((len(ids), dim), dtype=np.float32)
    for i in range(len(ids)):
        for f in range(dim):
            vectors[i, f] = _first_factor(ids[i], f, seed, scale)
    return vectors


@compiled(inline=True)
def _standardized(value: Any, field: int, stats: Any) -> Any:
    """(value - mean) / standard deviation, by what was learned so far; within ±10; 0 while there is no deviation."""
    if not abs(value) <= MOST:
        return np.float32(np.nan)  # so that its row is left out
    if stats[field, 0] < 2.0 or stats[field, 2] <= 0.0:
        return np.float32(0.0)
    scaled = (value - stats[field, 1]) / math.sqrt(stats[field, 2] / stats[field, 0])
    return np.float32(min(max(scaled, -10.0), 10.0))


@compiled()
def normalized(values: Any, fields: Any, standardize: Any, stats: Any) -> Any:
    """float32 `(entries,)`: values as the model sees them, those of standardised fields by their running statistics."""
    seen = values.copy()
    for i in range(len(values)):
        if standardize[fields[i]]:
            seen[i] = _standardized(values[i], fields[i], stats)
    return seen


@compiled(inline=True)
def _observe(value: Any, field: int, stats: Any) -> None:
    """Take a value into a field's running count, mean and sum of squares (Welford 1962)."""
    stats[field, 0] += 1.0
    before = value - stats[field, 1]
    stats[field, 1] += before / stats[field, 0]
    stats[field, 2] += before * (value - stats[field, 1])


@compiled(inline=True)
def _bounded(g: Any, most: Any) -> Any:
    return min(max(g, -most), most)


@compiled(inline=True)
def _sgd(w: Any, g: Any, numbers: Any) -> Any:
    # the one rule by which a weight can run away: lr l2 > 2
    return min(max(w - numbers[0] * (g + numbers[1] * w), -LARGEST), LARGEST)


@compiled(inline=True)
def _adagrad(w: Any, g: Any, n: Any, numbers: Any) -> Any:
    return w - numbers[0] * g / (math.sqrt(n) + numbers[2])


@compiled(inline=True)
def _ftrl_weight(z: Any, root: Any, numbers: Any) -> Any:
    """The weight at z and √n = root; `numbers`: 1 / lr, beta, l1, l2."""
    shrunk = max(z - numbers[2], np.float32(0.0)) + min(z + numbers[2], np.float32(0.0))
    return -shrunk / ((numbers[1] + root) * numbers[0] + numbers[3])


@compiled(inline=True)
def _ftrl_start(w: Any, numbers: Any) -> Any:
    """The z at which a weight that has seen no gradient is w."""
    return -w * (numbers[1] * numbers[0] + numbers[3]) - (numbers[2] if w > 0 else -numbers[2])


def _touch_line(typing: Any, array: Any, row: Any, column: Any) -> Any:
    """Ask for the line of the cache that holds array[row, column], of a two-dimensional array; do not wait for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        held = make_array(signature.args[0])(context, builder, arguments[0])  # type: ignore[no-untyped-call]
        stride = cgutils.unpack_tuple(builder, held.strides)[0]  # type: ignore[no-untyped-call]
        here = builder.add(builder.mul(arguments[1], stride), builder.mul(arguments[2], held.itemsize))
        address = builder.gep(builder.bitcast(held.data, cgutils.voidptr_t), [here])
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, *[cgutils.int32_t] * 3])
        name = "llvm.prefetch.p0"
        prefetch = cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
        builder.call(prefetch, [address, *(cgutils.int32_t(number) for number in (0, 3, 1))])  # to read, L1, data
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), generate


_touch: Any = intrinsic(_touch_line)


@cache
def step_kernel(dim: int, factor_rule: int, linear_rule: int) -> Callable[..., int]:
    """The loop for one number of factors and one pair of optimizers, which the compiler then knows."""
    if linear_rule == ROW_ADAGRAD:  # a linear weight is a part of one
        linear_rule = ADAGRAD
    factor_slots = (0, 1, 2, 2, 0)[factor_rule]
    linear_at = factor_slots * dim + (1 if factor_rule in (ADAM, ROW_ADAGRAD) else 0)
    share = np.float32(1.0 / max(dim, 1))
    touched = min(dim + 1, 64)  # columns; the processor fetches on by itself
    state_touched = min(linear_at + (1, 1, 2, 3)[linear_rule], 128)
    one = np.float32(1.0)
    zero = np.float32(0.0)
    half = np.float32(0.5)

    @compiled(inline=True)
    def begin_row(key: Any, w: Any, s: Any, seed: Any, scale: Any, fnum: Any, lnum: Any) -> None:
        for f in range(dim):
            w[f] = _first_factor(key, f, seed, scale)
        w[dim] = zero
        s[:] = zero  # for FTRL too: z = 0 is where a linear weight of 0 starts
        if factor_rule == FTRL:
            for f in range(dim):
                s[f] = _ftrl_start(w[f], fnum)

    @compiled(inline=True)
    def move_linear(w: Any, at: int, g: Any, s: Any, base: int, numbers: Any) -> None:
        if linear_rule == SGD:
            w[at] = _sgd(w[at], g, numbers)
        elif linear_rule == ADAGRAD:
            g += numbers[1] * w[at]
            s[base] += g * g
            w[at] = _adagrad(w[at], g, s[base], numbers)
        elif linear_rule == FTRL:
            n = s[base + 1]
            grown = n + g * g
            root = math.sqrt(grown)
            z = s[base] + g - (root - math.sqrt(n)) * numbers[0] * w[at]
            s[base] = z
            s[base + 1] = grown
            w[at] = _ftrl_weight(z, root, numbers)
        else:
            s[base + 2] += one
            s[base] = numbers[1] * s[base] + (one - numbers[1]) * g
            s[base + 1] = numbers[2] * s[base + 1] + (one - numbers[2]) * g * g
            rate = numbers[0] / (one - numbers[1] ** s[base + 2])
            root = math.sqrt(one - numbers[2] ** s[base + 2])
            w[at] -= rate * s[base] / (math.sqrt(s[base + 1]) / root + numbers[3])

    @compiled(inline=True)
    def move_factors(w: Any, sums: Any, gx: Any, x: Any, s: Any, numbers: Any, kept: Any) -> None:
        if factor_rule == SGD:
            for f in range(dim):
                w[f] = _sgd(w[f], gx * (sums[f] - w[f] * x), numbers)
        elif factor_rule == ADAGRAD:
            for f in range(dim):
                g = gx * (sums[f] - w[f] * x) + numbers[1] * w[f]
                n = s[f] + g * g
                s[f] = n
                w[f] = _adagrad(w[f], g, n, numbers)
        elif factor_rule == ROW_ADAGRAD:
            total = zero
            for f in range(dim):
                g = gx * (sums[f] - w[f] * x) + numbers[1] * w[f]
                kept[f] = g
                total += g * g
            n = s[0] + total * share
            s[0] = n
            rate = numbers[0] / (math.sqrt(n) + numbers[2])
            for f in range(dim):
                w[f] -= rate * kept[f]
        elif factor_rule == FTRL:
            for f in range(dim):
                g = gx * (sums[f] - w[f] * x)
                n = s[dim + f]
                grown = n + g * g
                root = math.sqrt(grown)
                z = s[f] + g - (root - math.sqrt(n)) * numbers[0] * w[f]
                s[f] = z
                s[dim + f] = grown
                w[f] = _ftrl_weight(z, root, numbers)
        else:
            s[2 * dim] += one
            rate = numbers[0] / (one - numbers[1] ** s[2 * dim])
            root = math.sqrt(one - numbers[2] ** s[2 * dim])
            for f in range(dim):
                g = gx * (sums[f] - w[f] * x)
                m = numbers[1] * s[f] + (one - numbers[1]) * g
                v = numbers[2] * s[dim + f] + (one - numbers[2]) * g * g
                s[f] = m
                s[dim + f] = v
                w[f] -= rate * m / (math.sqrt(v) / root + numbers[3])

    @compiled(inline=True)
    def touch_slots(ids: Any, start: int, end: int, slots: Any) -> None:
        mask = len(slots) - 1
        for e in range(start, end):
            _touch(slots, ids[e] & mask, 0)

    @compiled(inline=True)
    def find_and_touch(
        ids: Any, start: int, end: int, slots: Any, found: Any, table: Any, state: Any, learns: Any
    ) -> None:
        for e in range(start, end):
            at = lookup(ids[e], slots)
            found[e - start] = at
            if at >= 0:
                for column in range(0, touched, 16):
                    _touch(table, at, column)
                if learns:
                    for column in range(0, state_touched, 16):
                        _touch(state, at, column)

    @compiled(fastmath=REASSOCIATE)
    def step(
        ids: Any,
        values: Any,
        fields: Any,
        starts: Any,
        ends: Any,
        rows: Any,
        ops: Any,
        labels: Any,
        weights: Any,
        slots: Any,
        owners: Any,
        table: Any,
        state: Any,
        bias: Any,
        bias_state: Any,
        standardize: Any,
        stats: Any,
        seed_number: int,
        numbers: Any,
        scores: Any,
    ) -> int:
        """Fill `scores` (before learning); return how many rows were left out of learning because of a logit or
        a gradient that is not finite. Do nothing, and return `MISFIT`, where the columns are not equally long or there
        is no such row, and `NO_ROOM` where the table might not hold the new ids. `standardize` is empty where no field
        is; `numbers`: scale, factors', linear."""
        if not len(rows) == len(ops) == len(labels) == len(weights) == len(scores):
            return MISFIT
        any_standardized = len(standardize) > 0
        seed = np.uint64(seed_number)
        scale = numbers[0]
        fnum = numbers[1:5]
        lnum = numbers[5:9]
        longest = 1
        room = len(owners) - 1 - owners[-1]
        for k in range(len(rows)):
            if rows[k] < 0 or rows[k] >= len(starts):
                return MISFIT
            count = ends[rows[k]] - starts[rows[k]]
            longest = max(longest, count)
            if ops[k] & LEARN:
                room -= count
        if room < 0:
            return NO_ROOM
        places = np.empty((2, longest), dtype=np.int64)
        where, ahead = places[0], places[1]
        floats = np.empty(2 * dim + longest, dtype=np.float32)
        sums, squares, xs = floats[:dim], floats[dim : 2 * dim], floats[2 * dim :]
        left_out = 0
        # Memory is slow, not the arithmetic: while one event is computed, the rows of the next are on their way to the
        # cache, and the slots of the one after it.
        far = owners[-1] >= NEAR_ROWS
        for k in range(min(2, len(rows)) if far else 0):
            touch_slots(ids, starts[rows[k]], ends[rows[k]], slots)
        if far and len(rows) > 0:
            find_and_touch(ids, starts[rows[0]], ends[rows[0]], slots, ahead, table, state, (ops[0] & LEARN) != 0)
        for k in range(len(rows)):
            if far:
                where, ahead = ahead, where
            if far and k + 1 < len(rows):
                if k + 2 < len(rows):
                    touch_slots(ids, starts[rows[k + 2]], ends[rows[k + 2]], slots)
                then = rows[k + 1]
                find_and_touch(ids, starts[then], ends[then], slots, ahead, table, state, (ops[k + 1] & LEARN) != 0)
            row = rows[k]
            start = starts[row]
            count = ends[row] - start
            learns = (ops[k] & LEARN) != 0
            for f in range(dim):
                sums[f] = zero
                squares[f] = zero
            logit = bias[0]
            for i in range(count):
                key = ids[start + i]
                x = values[start + i]
                if any_standardized and standardize[fields[start + i]]:
                    x = _standardized(x, fields[start + i], stats)
                xs[i] = x
                at = where[i] if far else -1
                if at < 0:  # not looked up yet, or the event before brought it
                    at = lookup(key, slots)
                    where[i] = at
                if at >= 0:
                    w = table[at]
                    logit += w[dim] * x
                    for f in range(dim):
                        part = w[f] * x
                        sums[f] += part
                        squares[f] += part * part
                else:  # it starts at a known vector, so it need not be in the table to be scored
                    logit += zero * x  # nan for an x that is not finite, whatever dim is
                    for f in range(dim):
                        part = _first_factor(key, f, seed, scale) * x
                        sums[f] += part
                        squares[f] += part * part
            pairs = zero
            for f in range(dim):
                pairs += sums[f] * sums[f] - squares[f]
            logit += half * pairs
            if not abs(logit) <= MOST:
                scores[k] = np.float32(1.0 / (1.0 + math.exp(-min(max(bias[0], -MAX_LOGIT), MAX_LOGIT))))
                left_out += learns
                continue
            bounded = min(max(logit, -MAX_LOGIT), MAX_LOGIT)
            p = np.float32(1.0 / (1.0 + math.exp(-bounded)))
            scores[k] = p
            if not learns:
                continue
            g = (p - labels[k]) * weights[k]
            if not abs(g) <= MOST:
                left_out += 1
                continue
            move_linear(bias, 0, _bounded(g, LARGEST), bias_state, 0, lnum)
            spread = zero
            for f in range(dim):
                spread += squares[f]
            # A bound of g x, so that no factor's gradient is beyond ±LARGEST: |sum - w x| <= 2 √(count spread).
            most = LARGEST / np.float32(100.0)
            if count * spread > 2500.0:  # never, but for absurd values
                most = np.float32(LARGEST / (2.0 * math.sqrt(count * spread)))
            if count == 1:  # no pairs: sum - w x is the rounding error of w x, which Adagrad would make a whole step of
                most = zero
            for i in range(count):
                at = where[i]
                key = ids[start + i]
                if at < 0:
                    at = insert(key, slots, owners)
                    begin_row(key, table[at], state[at], seed, scale, fnum, lnum)
                x = xs[i]
                w = table[at]
                s = state[at]
                gx = g * x
                move_linear(w, dim, _bounded(gx, LARGEST), s, linear_at, lnum)
                move_factors(w, sums, _bounded(gx, most), x, s, fnum, squares)
                if any_standardized and standardize[fields[start + i]]:
                    _observe(values[start + i], fields[start + i], stats)
        return left_out

    kernel: Callable[..., int] = step
    return kernel
