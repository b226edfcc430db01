"""The loop of `History`, compiled: what is known of each impression's keys, and then that it was shown, or clicked.

A row of counts holds the time at which they stand, the time its key was last shown, and for each half-life how often it
was shown, then each kind of feedback. A row of impressions holds the keys that it counted for.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from streamrec._compile import compiled
from streamrec.preprocessors._join_kernel import PASSED, SHOWN, UNKNOWN
from streamrec.preprocessors._recency import enter, find, leave, renew

__all__ = ["DUPLICATE", "EVICTED", "EVICTED_IMPRESSIONS", "REPEATED", "UNMATCHED", "group_keys", "look", "take"]

DUPLICATE, UNMATCHED, REPEATED, EVICTED, EVICTED_IMPRESSIONS = range(5)
TIME, LAST, COUNTS = range(3)


@compiled(inline=True)
def _mixed(x: Any) -> Any:
    """The finalizer of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled()
def group_keys(keys: Any, shown: int, groups: Any) -> Any:
    """uint64 `(shown, 2 * groups)`: the key of each impression in each group.

    `keys`: uint64 `(names * shown, 2)`, of the values, name after name; `groups`: int64 `(groups, longest)`, the names
    of each, -1 where there are no more.
    """
    found = np.empty((shown, 2 * len(groups)), dtype=np.uint64)
    for n in range(shown):
        for g in range(len(groups)):
            high = low = _mixed(np.uint64(g + 1) * np.uint64(0x9E3779B97F4A7C15))
            for name in groups[g]:
                if name >= 0:
                    high = _mixed(high ^ keys[name * shown + n, 0])
                    low = _mixed(low ^ keys[name * shown + n, 1])
            found[n, 2 * g], found[n, 2 * g + 1] = high, low
    return found


@compiled(inline=True)
def _left(seconds: Any, half_life: Any) -> Any:
    """The share of a count that is left after so many seconds."""
    return 2.0 ** (-seconds / half_life) if seconds > 0.0 else 1.0


@compiled()
def _describe(time: float, newest: float, keys: Any, n: int, counts: Any, totals: Any, settings: Any, out: Any) -> None:
    """Fill `out`, float64 `(groups * width,)`, with what is known now of the keys of impression `n`."""
    rows, values, table, _ = counts
    half_lives, kinds, ttl, prior, _ = settings
    at = 0
    for g in range(keys.shape[1] // 2):
        row = find(keys[n, 2 * g], keys[n, 2 * g + 1], table, rows)
        known = row >= 0 and newest - rows[row].time <= ttl
        out[at] = np.nan
        if known and not math.isnan(values[row, LAST]):
            out[at] = max(time - values[row, LAST], 0.0)
        at += 1
        column = COUNTS
        for h in range(len(half_lives)):
            left = _left(time - values[row, TIME], half_lives[h]) if known else 0.0
            shown = values[row, column] * left if known else 0.0
            out[at] = shown
            at += 1
            for k in range(kinds):
                count = values[row, column + 1 + k] * left if known else 0.0
                base = totals[column + 1 + k] / totals[column] if totals[column] > 0.0 else 0.0
                out[at] = count
                out[at + 1] = (count + prior * base) / (shown + prior)
                at += 2
            column += 1 + kinds


@compiled(inline=True)
def _add(time: float, place: int, amount: float, counts: Any, half_lives: Any, kinds: int) -> None:
    """Add to a row of counts: at `place` of each half-life, 0 for shown, then the kinds."""
    moved = time - counts[TIME]
    column = COUNTS
    for h in range(len(half_lives)):
        if moved > 0.0:
            left = _left(moved, half_lives[h])
            for k in range(1 + kinds):
                counts[column + k] *= left
            counts[column + place] += amount
        else:  # from before the time at which the counts stand
            counts[column + place] += amount * _left(-moved, half_lives[h])
        column += 1 + kinds
    if moved > 0.0:
        counts[TIME] = time


@compiled()
def _count(
    time: float,
    newest: float,
    place: int,
    amount: float,
    keys: Any,
    owner: Any,
    owned: Any,
    counts: Any,
    totals: Any,
    settings: Any,
    numbers: Any,
) -> None:
    """Count something for each of the keys, uint64 `(2 * groups,)`."""
    rows, values, table, ends = counts
    half_lives, kinds, ttl, _, _ = settings
    for g in range(len(keys) // 2):
        row = find(keys[2 * g], keys[2 * g + 1], table, rows)
        if row >= 0 and newest - rows[row].time > ttl:
            leave(row, rows, table, ends)
            row = -1
        if row < 0:
            if ends[2] < 0:  # full
                if newest - rows[ends[0]].time <= ttl:
                    numbers[EVICTED] += 1
                leave(ends[0], rows, table, ends)
            row = enter(keys[2 * g], keys[2 * g + 1], rows, table, ends)
            values[row, :] = 0.0
            values[row, TIME], values[row, LAST] = time, np.nan
            rows[row].owner = owner if owned[g] else np.uint64(0)
        else:
            renew(row, rows, ends)
        _add(time, place, amount, values[row], half_lives, kinds)
        if place == 0 and not values[row, LAST] >= time:
            values[row, LAST] = time
        rows[row].time = values[row, TIME]
    _add(time, place, amount, totals, half_lives, kinds)


@compiled()
def take(
    codes: Any,
    times: Any,
    labels: Any,
    kinds_given: Any,
    ids: Any,
    keys: Any,
    owners: Any,
    owned: Any,
    counts: Any,
    impressions: Any,
    totals: Any,
    newest_seen: Any,
    numbers: Any,
    settings: Any,
    out: Any,
) -> None:
    """Take these events in order; fill `out`, float64 `(shown, groups * width)`.

    `codes`: of each event, as in `LabelJoin.codes`; `ids`: the keys of their impressions' ids; `keys`, `owners`: of
    those that are shown; `labels`, `kinds_given`: of the labeled ones. There must be room.
    """
    count_rows, _, count_table, count_ends = counts
    rows, held_keys, table, ends = impressions
    _, _, ttl, _, window = settings
    newest = newest_seen[0]
    shown = 0
    for n in range(len(codes)):
        time, code = times[n], codes[n]
        if time > newest:
            newest = time
        # what is forgotten goes, and when that is done changes no result
        while ends[0] >= 0 and newest - rows[ends[0]].time > window:
            leave(ends[0], rows, table, ends)
        while count_ends[0] >= 0 and newest - count_rows[count_ends[0]].time > ttl:
            leave(count_ends[0], count_rows, count_table, count_ends)
        row = find(ids[n, 0], ids[n, 1], table, rows)
        if row >= 0 and newest - rows[row].time > window:
            leave(row, rows, table, ends)
            row = -1
        if code in (SHOWN, PASSED):
            _describe(time, newest, keys, shown, counts, totals, settings, out[shown])
            if row < 0:
                mine = keys[shown]
                _count(time, newest, 0, 1.0, mine, owners[shown], owned, counts, totals, settings, numbers)
                if newest - time <= window:
                    if ends[2] < 0:
                        numbers[EVICTED_IMPRESSIONS] += 1
                        leave(ends[0], rows, table, ends)
                    row = enter(ids[n, 0], ids[n, 1], rows, table, ends)
                    rows[row].time, rows[row].owner = time, owners[shown]
                    held_keys[row, :] = mine
            elif code == SHOWN:
                numbers[DUPLICATE] += 1
            if code == PASSED and kinds_given[n] >= 0 and labels[n] > 0.0:
                mine = keys[shown]
                place = 1 + kinds_given[n]
                _count(time, newest, place, labels[n], mine, owners[shown], owned, counts, totals, settings, numbers)
                if row >= 0:
                    rows[row].marks |= 1 << kinds_given[n]
            shown += 1
        elif code != UNKNOWN:
            if row < 0 or time < rows[row].time:
                numbers[UNMATCHED] += 1
            elif (rows[row].marks >> code) & 1:
                numbers[REPEATED] += 1
            else:
                rows[row].marks |= 1 << code
                mine = held_keys[row]
                owner = rows[row].owner
                _count(time, newest, 1 + code, 1.0, mine, owner, owned, counts, totals, settings, numbers)
    newest_seen[0] = newest


@compiled()
def look(times: Any, keys: Any, counts: Any, totals: Any, newest: float, settings: Any, out: Any) -> None:
    """Fill `out` as `take` would for each of these impressions, were it the next event. Changes nothing."""
    for n in range(len(times)):
        _describe(times[n], max(newest, times[n]), keys, n, counts, totals, settings, out[n])
