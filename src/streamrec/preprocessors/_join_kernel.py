"""The loop of `LabelJoin`, compiled, over rows in arrays.

An open impression is a row of `opens`: first in the heap `recent`; behind the watermark, where none can come before it
any more, in the queue of the kind whose window closes next. So the heap is as small as the lateness, however long the
windows are. Feedback that waits for its impression, or for the feedback that its window begins with, is a row of
`earlies`: those of one impression are chained by `next` from the one in the table, and all are in the heap `expiring`.
Free rows are chained by `next` too. Where labels may be corrected there is one queue more, of what has all its labels
and is kept for that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamrec._compile import compiled
from streamrec._pointers import held, held_rows
from streamrec.hashing import end_of
from streamrec.preprocessors._keyed_rows import EMPTY, KEY, find, key_of, pop, push, put, remove, take_out

__all__ = [
    "ARRIVALS",
    "AS_LABEL",
    "AS_WEIGHT",
    "AT_ONCE",
    "BASE",
    "CLOSED",
    "CORRECTED",
    "CORRECTION",
    "EARLY",
    "FOREVER",
    "FREE_EARLY",
    "FREE_OPEN",
    "LABEL",
    "NUMBERS",
    "OPEN",
    "OPENED",
    "PASSED",
    "PLAIN",
    "REASONS",
    "RECENT",
    "SHOWN",
    "TIME_COLUMN",
    "UNKNOWN",
    "USE",
    "VALUE_COLUMN",
    "WAITING",
    "advance",
    "advance_one",
    "close_all",
    "in_queues",
    "keep_all",
]

OPEN = np.dtype(
    [
        *KEY,
        ("time", np.float64),
        ("arrival", np.int64),
        ("place", np.int32),
        ("stage", np.int32),  # the place of the next kind to close
        ("payload", np.int64),
        ("positive", np.int64),  # the kinds it has feedback of, as bits; from 32 on those that came after the label
        ("next", np.int64),
    ]
)
EARLY = np.dtype(
    [*KEY, ("time", np.float64), ("arrival", np.int64), ("place", np.int64), ("kind", np.int64), ("next", np.int64)]
)
CLOSED = np.dtype(
    [
        ("event", np.int64),
        ("payload", np.int64),
        ("time", np.float64),
        ("kind", np.int32),
        ("label", np.float32),
        ("last", np.bool_),
        ("weight", np.float32),
        ("what", np.int8),
    ]
)

LABEL, AT_ONCE, CORRECTION = range(3)
"""What a record is: a label whose window has closed, and where it is -1 no label; a positive, told when it comes; a
positive that comes after its label was given."""

PLAIN, AS_WEIGHT, AS_LABEL = range(3)
"""What the value of a kind's feedback is used for."""

BASE, USE, TIME_COLUMN, VALUE_COLUMN = range(4)
"""Columns of the rules of a kind: the kind that its window begins with, or -1; what values are for; where a row has the
time and the value of its first feedback, or -1."""

FOREVER = 1e300
"""Times and windows stay below it, so that their sums stay finite."""

UNKNOWN, SHOWN, PASSED = -1, -2, -3
"""What an event is, by its code: feedback of no kind, an impression, none of the join's; from 0: feedback by kind."""

REASONS = (
    "late_impression",
    "late_feedback",
    "duplicate_impression",
    "evicted_impression",
    "evicted_feedback",
    "evicted_kept",
    "bad_value",
    "outside_window",
    "repeated",
    "unknown_kind",
    "unmatched",
)
(
    _LATE_IMPRESSION,
    _LATE_FEEDBACK,
    _DUPLICATE_IMPRESSION,
    _EVICTED_IMPRESSION,
    _EVICTED_FEEDBACK,
    _EVICTED_KEPT,
    _BAD_VALUE,
    _OUTSIDE_WINDOW,
    _REPEATED,
    _UNKNOWN_KIND,
    _UNMATCHED,
) = range(len(REASONS))
# after the counts: arrivals, open impressions, those of them in `recent`, early feedback, the first free rows, labels
# corrected
NUMBERS = len(REASONS) + 7
ARRIVALS, OPENED, RECENT, WAITING, FREE_OPEN, FREE_EARLY, CORRECTED = range(len(REASONS), NUMBERS)


@compiled(inline=True)
def _memory(pointers: Any) -> Any:
    """What `LabelJoin` points to: windows and times; numbers; of open impressions their rows, table, heap and queues;
    of early feedback its rows, table and heap; records for what one event closes; of the kinds their rules and how long
    after its base each counts; of open impressions what the rules keep of them, and of early feedback its values.

    `windows`: by kind, seconds from the impression to the closing; where labels may be corrected, last, until it is let
    go. `times`: the watermark, then the lateness. `pointers` ends with the columns of what is kept, and the capacity.
    """
    windows, times, numbers = held(pointers, 0, np.float64), held(pointers, 1, np.float64), held(pointers, 2, np.int64)
    opens, open_table, recent = held(pointers, 3, OPEN), held(pointers, 4, np.int64), held(pointers, 5, np.int64)
    queues = held_rows(pointers, 6, 2, np.int64)
    earlies, early_table = held(pointers, 7, EARLY), held(pointers, 8, np.int64)
    expiring = held(pointers, 9, np.int64)
    rules, spans = held_rows(pointers, 11, 4, np.int64), held(pointers, 12, np.float64)
    extras, early_values = held_rows(pointers, 13, pointers[-2], np.float64), held(pointers, 14, np.float64)
    kept = rules, spans, extras, early_values
    return windows, times, numbers, opens, open_table, recent, queues, earlies, early_table, expiring, kept


@compiled()
def advance(
    begin: int,
    data: Any,
    cuts: Any,
    times: Any,
    codes: Any,
    payloads: Any,
    values: Any,
    at_once: bool,
    pointers: Any,
    closed: Any,
) -> Any:
    """Take the events from number `begin` on; write what their times close to `closed`, with `at_once` positives too.

    `values`: those of the feedback, nan where it has none; empty where no kind uses them.

    Returns the number of the event to go on with when there is room again, and how much is in `closed`.
    """
    memory = _memory(pointers)
    capacity = pointers[-1]
    count = 0
    first = 0
    for n in range(len(times)):
        end = end_of(data, first, cuts, n)
        if n >= begin and codes[n] != PASSED:
            high, low = key_of(data, first, end)
            value = values[n] if len(values) else np.nan
            done, count = _take(
                n, high, low, times[n], codes[n], payloads[n], value, at_once, capacity, memory, closed, count
            )
            if not done:
                return n, count
        first = end + 1
    return len(times), count


@compiled()
def advance_one(data: Any, time: float, code: int, payload: int, value: float, pointers: Any) -> Any:
    """`advance` with one event, `data` its id. Returns how much is in `closed`, the last of `pointers`: taking an array
    of records in takes longer than all the rest. Less than 0 where there was no room for all: -1 - count."""
    high, low = key_of(data, 0, len(data))
    closed = held(pointers, 10, CLOSED)
    done, count = _take(0, high, low, time, code, payload, value, False, pointers[-1], _memory(pointers), closed, 0)
    return count if done else -1 - count


@compiled()
def close_all(pointers: Any, closed: Any) -> int:
    """Close as if the watermark were infinite, into `closed`, which has room; returns how much is in it."""
    return _close(np.inf, 0, _memory(pointers), closed, 0)


# inlined: as a call it would count references to ten arrays, for each event
@compiled(inline=True)
def _take(
    n: int,
    high: Any,
    low: Any,
    time: float,
    code: int,
    payload: int,
    value: float,
    at_once: bool,
    capacity: int,
    memory: Any,
    closed: Any,
    count: int,
) -> Any:
    """Take an event, or as much of what it closes as there is room for; taken again, it goes on from there."""
    windows, times, numbers, opens, open_table, recent, queues, earlies, early_table, expiring, kept = memory
    rules, _, extras, early_values = kept
    if not (times[0] <= time < FOREVER):  # so nan is late too
        if len(closed) - count < len(windows):
            return False, count
        if code == SHOWN:
            numbers[_LATE_IMPRESSION] += 1
            return True, _let_go(n, payload, time, closed, count)
        if len(windows) > len(rules) and code >= 0 and time < FOREVER:
            row = find(high, low, open_table, opens)
            if row >= 0:
                count = _note(n, row, time, code, value, at_once, memory, closed, count)
                early = find(high, low, early_table, earlies)
                return True, count if early < 0 else _match(n, row, early, at_once, memory, closed, count)
        numbers[_LATE_FEEDBACK] += 1
        return True, count
    if time - times[1] > times[0]:
        times[0] = time - times[1]
    count = _close(times[0], n, memory, closed, count)
    # more may be due, and what follows needs room
    if len(closed) - count < len(windows) + 1 + max(0, numbers[OPENED] + 1 - capacity):
        return False, count
    if (code == SHOWN and numbers[FREE_OPEN] < 0) or (code >= 0 and numbers[FREE_EARLY] < 0):
        return False, count
    row = find(high, low, open_table, opens)
    if code == SHOWN:
        if row >= 0:
            numbers[_DUPLICATE_IMPRESSION] += 1
            return True, _let_go(n, payload, time, closed, count)
        row = numbers[FREE_OPEN]
        numbers[FREE_OPEN] = opens[row].next
        _enter(row, high, low, time, payload, numbers, opens, open_table)
        extras[row, :] = np.nan
        push(row, recent, numbers[RECENT], opens)
        numbers[RECENT] += 1
        early = find(high, low, early_table, earlies) if numbers[WAITING] else EMPTY
        if early >= 0:
            count = _match(n, row, early, at_once, memory, closed, count)
        while numbers[OPENED] > capacity:
            if len(windows) > len(rules) and queues[len(rules), 0] >= 0:  # it has its labels
                row = _shift(len(rules), queues, opens)
                numbers[_EVICTED_KEPT] += 1
            else:
                row = _take_first(windows, numbers, opens, recent, queues)
                numbers[_EVICTED_IMPRESSION] += 1
            count = _let_go(n, opens[row].payload, opens[row].time, closed, count)
            _free(row, numbers, opens, open_table)
    elif code == UNKNOWN:
        numbers[_UNKNOWN_KIND] += 1
    elif row >= 0 and not _must_wait(row, code, rules, opens):
        count = _note(n, row, time, code, value, at_once, memory, closed, count)
        early = find(high, low, early_table, earlies) if numbers[WAITING] else EMPTY
        if early >= 0:  # what its windows begin with may have come
            count = _match(n, row, early, at_once, memory, closed, count)
    else:
        early_values[numbers[FREE_EARLY]] = value
        _keep(high, low, time, code, numbers, earlies, early_table, expiring)
        while numbers[WAITING] > capacity:
            _forget(numbers, earlies, early_table, expiring)
            numbers[_EVICTED_FEEDBACK] += 1
    return True, count


@compiled(inline=True)
def _close(watermark: float, event: int, memory: Any, closed: Any, count: int) -> int:
    """Write what closes before `watermark` to `closed`, as much as it has room for; returns how much is in it."""
    windows, _, numbers, opens, open_table, recent, queues, earlies, early_table, expiring, kept = memory
    rules, _, extras, _ = kept
    while numbers[RECENT] and opens[recent[0]].time < watermark:
        row = pop(recent, numbers[RECENT], opens)
        numbers[RECENT] -= 1
        _append(row, 0, queues, opens)
    while numbers[WAITING] and earlies[expiring[0]].time < watermark:
        _forget(numbers, earlies, early_table, expiring)
        numbers[_UNMATCHED] += 1
    last = len(windows) - 1
    kinds = len(rules)
    while count + len(windows) <= len(closed):
        at, due = watermark, -1
        for kind in range(last, -1, -1):  # the widest first: where two close at one time, the impression there is older
            row = queues[kind, 0]
            if row >= 0 and opens[row].time + windows[kind] < at:
                at, due = opens[row].time + windows[kind], kind
        if due < 0:
            break
        row = _shift(due, queues, opens)
        if due == kinds:  # kept until now
            count = _let_go(event, opens[row].payload, opens[row].time, closed, count)
            _free(row, numbers, opens, open_table)
            continue
        count = _label(event, row, due, LABEL, rules, extras, opens, closed, count)
        following = due + 1
        if _nothing_can_follow(row, following, rules, opens):
            while following < kinds:
                count = _label(event, row, following, LABEL, rules, extras, opens, closed, count)
                following += 1
        opens[row].stage = following
        known = (opens[row].positive | (opens[row].positive >> 32)) & ((1 << kinds) - 1)
        if following == kinds and (last < kinds or known == (1 << kinds) - 1):
            closed[count - 1].last = True
            _free(row, numbers, opens, open_table)
        else:
            _append(row, following, queues, opens)
    return count


@compiled()
def _nothing_can_follow(row: int, following: int, rules: Any, opens: Any) -> bool:
    """Whether all windows that are open begin with feedback that has not come, and cannot any more."""
    for kind in range(following, len(rules)):
        base = rules[kind, BASE]
        if base < 0 or base >= following or _has(row, base, opens):
            return False
    return True


@compiled()
def _enter(row: int, high: Any, low: Any, time: float, payload: int, numbers: Any, opens: Any, open_table: Any) -> None:
    """Make a free row, taken off its chain, that of an open impression."""
    numbers[ARRIVALS] += 1
    numbers[OPENED] += 1
    opens[row].high, opens[row].low, opens[row].time = high, low, time
    opens[row].arrival, opens[row].payload, opens[row].positive = numbers[ARRIVALS], payload, 0
    opens[row].stage = 0
    put(row, open_table, opens)


@compiled()
def in_queues(queues: Any, opens: Any) -> Any:
    """int64: the rows in the queues, one queue after the other; int64 `(kinds,)`: how many in each."""
    lengths = np.zeros(len(queues), dtype=np.int64)
    rows = np.empty(len(opens), dtype=np.int64)
    count = 0
    for kind in range(len(queues)):
        row = queues[kind, 0]
        while row >= 0:
            rows[count] = row
            count += 1
            lengths[kind] += 1
            row = opens[row].next
    return rows[:count], lengths


@compiled()
def _write(event: int, payload: int, time: float, kind: int, label: Any, weight: Any, closed: Any, count: int) -> int:
    line = closed[count]
    line.event, line.payload, line.time, line.kind, line.last = event, payload, time, kind, False
    line.label, line.weight, line.what = np.float32(label), np.float32(weight), LABEL
    return count + 1


@compiled()
def _let_go(event: int, payload: int, time: float, closed: Any, count: int) -> int:
    """No label, or no more."""
    count = _write(event, payload, time, -1, np.nan, 1.0, closed, count)
    closed[count - 1].last = True
    return count


@compiled()
def _label(
    event: int, row: int, kind: int, what: int, rules: Any, extras: Any, opens: Any, closed: Any, count: int
) -> int:
    """The label of one kind as it stands."""
    label = 1.0 if what == CORRECTION else np.float64((opens[row].positive >> kind) & 1)
    weight = 1.0
    if label > 0.0 and rules[kind, USE] != PLAIN:
        value = extras[row, rules[kind, VALUE_COLUMN]]
        if rules[kind, USE] == AS_WEIGHT:
            weight = value
        else:
            label = value
    count = _write(event, opens[row].payload, opens[row].time, kind, label, weight, closed, count)
    closed[count - 1].what = what
    return count


@compiled()
def _append(row: int, kind: int, queues: Any, opens: Any) -> None:
    opens[row].next = EMPTY
    if queues[kind, 0] < 0:
        queues[kind, 0] = row
    else:
        opens[queues[kind, 1]].next = row
    queues[kind, 1] = row


@compiled()
def _shift(kind: int, queues: Any, opens: Any) -> int:
    row = queues[kind, 0]
    queues[kind, 0] = opens[row].next
    return int(row)


@compiled()
def _free(row: int, numbers: Any, opens: Any, open_table: Any) -> None:
    take_out(row, open_table, opens)
    opens[row].next = numbers[FREE_OPEN]
    numbers[FREE_OPEN] = row
    numbers[OPENED] -= 1


@compiled()
def _take_first(windows: Any, numbers: Any, opens: Any, recent: Any, queues: Any) -> int:
    """The open impression that closes first, out of its queue or heap."""
    at, due = np.inf, -1
    for kind in range(len(windows) - 1, -1, -1):
        row = queues[kind, 0]
        if row >= 0 and opens[row].time + windows[kind] < at:
            at, due = opens[row].time + windows[kind], kind
    if due < 0 or (numbers[RECENT] and opens[recent[0]].time + windows[0] < at):
        row = pop(recent, numbers[RECENT], opens)
        numbers[RECENT] -= 1
        return int(row)
    return int(_shift(due, queues, opens))


@compiled()
def _must_wait(row: int, kind: int, rules: Any, opens: Any) -> bool:
    """Whether feedback of this kind counts only after another that has not come."""
    base = rules[kind, BASE]
    return bool(base >= 0 and not _has(row, base, opens))


@compiled(inline=True)
def _has(row: int, kind: int, opens: Any) -> bool:
    """Whether it has feedback of this kind, before or after its label."""
    return bool(((opens[row].positive >> kind) | (opens[row].positive >> (kind + 32))) & 1)


@compiled()
def _note(
    event: int, row: int, time: float, kind: int, value: float, at_once: bool, memory: Any, closed: Any, count: int
) -> int:
    """Take feedback on an impression that is held; what it makes known at once goes to `closed`."""
    windows, times, numbers, opens = memory[0], memory[1], memory[2], memory[3]
    rules, spans, extras, _ = memory[-1]
    begin = opens[row].time
    base = rules[kind, BASE]
    if base >= 0:
        if not _has(row, base, opens):  # late: what it would have to wait for is later still
            numbers[_LATE_FEEDBACK] += 1
            return count
        begin = extras[row, rules[base, TIME_COLUMN]]
    kinds = len(rules)
    end = begin + spans[kind]
    corrected_until = end + (windows[kinds] - windows[kinds - 1] if len(windows) > kinds else 0.0)
    if not (begin <= time <= corrected_until):
        numbers[_OUTSIDE_WINDOW] += 1
        return count
    if _has(row, kind, opens):
        numbers[_REPEATED] += 1
        return count
    closes = opens[row].stage <= kind and time <= end
    if not closes and not times[0] <= opens[row].time + windows[len(windows) - 1]:
        numbers[_LATE_FEEDBACK] += 1  # it has been kept for longer than it need be
        return count
    if rules[kind, USE] != PLAIN:
        good = value > 0.0 if rules[kind, USE] == AS_WEIGHT else 0.0 <= value <= 1.0
        if not (good and value < FOREVER):
            numbers[_BAD_VALUE] += 1
            value = 1.0
        extras[row, rules[kind, VALUE_COLUMN]] = value
    if rules[kind, TIME_COLUMN] >= 0:
        extras[row, rules[kind, TIME_COLUMN]] = time
    opens[row].positive |= np.int64(1) << (kind if closes else kind + 32)
    if not closes:
        numbers[CORRECTED] += 1
        return int(_label(event, row, kind, CORRECTION, rules, extras, opens, closed, count))
    if at_once:
        return int(_label(event, row, kind, AT_ONCE, rules, extras, opens, closed, count))
    return count


@compiled()
def _keep(
    high: Any, low: Any, time: float, kind: int, numbers: Any, earlies: Any, early_table: Any, expiring: Any
) -> None:
    """Let feedback wait for its impression."""
    numbers[ARRIVALS] += 1
    row = numbers[FREE_EARLY]
    numbers[FREE_EARLY] = earlies[row].next
    earlies[row].high, earlies[row].low, earlies[row].time = high, low, time
    earlies[row].arrival, earlies[row].kind = numbers[ARRIVALS], kind
    same = find(high, low, early_table, earlies)
    if same >= 0:  # second in the chain, so that the table stays as it is
        earlies[row].next = earlies[same].next
        earlies[same].next = row
    else:
        earlies[row].next = EMPTY
        put(row, early_table, earlies)
    push(row, expiring, numbers[WAITING], earlies)
    numbers[WAITING] += 1


@compiled()
def keep_all(
    keys: Any,
    times: Any,
    kinds: Any,
    values: Any,
    early_values: Any,
    numbers: Any,
    earlies: Any,
    early_table: Any,
    expiring: Any,
) -> None:
    """Let all this feedback wait. There must be room."""
    for n in range(len(times)):
        early_values[numbers[FREE_EARLY]] = values[n]
        _keep(keys[n, 0], keys[n, 1], times[n], kinds[n], numbers, earlies, early_table, expiring)


@compiled()
def _match(event: int, row: int, early: int, at_once: bool, memory: Any, closed: Any, count: int) -> int:
    """Give an impression the feedback that waited for it; what waits for other feedback waits on.

    In which order changes neither labels nor counts, but that what windows begin with comes first.
    """
    numbers, opens, earlies, early_table, expiring = memory[2], memory[3], memory[7], memory[8], memory[9]
    rules, _, _, early_values = memory[-1]
    take_out(early, early_table, earlies)
    for dependent in range(2):
        waiting = EMPTY
        while early >= 0:
            after = earlies[early].next
            kind = earlies[early].kind
            if (rules[kind, BASE] >= 0) != (dependent == 1) or _must_wait(row, kind, rules, opens):
                earlies[early].next = waiting
                waiting = early
            else:
                time, value = earlies[early].time, early_values[early]
                count = _note(event, row, time, kind, value, at_once, memory, closed, count)
                remove(early, expiring, numbers[WAITING], earlies)
                numbers[WAITING] -= 1
                earlies[early].next = numbers[FREE_EARLY]
                numbers[FREE_EARLY] = early
            early = after
        early = waiting
    if early >= 0:
        put(early, early_table, earlies)
    return count


@compiled()
def _forget(numbers: Any, earlies: Any, early_table: Any, expiring: Any) -> None:
    """Give up the oldest early feedback."""
    row = pop(expiring, numbers[WAITING], earlies)
    numbers[WAITING] -= 1
    before = find(earlies[row].high, earlies[row].low, early_table, earlies)
    if before == row:
        take_out(row, early_table, earlies)
        if earlies[row].next >= 0:
            put(earlies[row].next, early_table, earlies)
    else:
        while earlies[before].next != row:
            before = earlies[before].next
        earlies[before].next = earlies[row].next
    earlies[row].next = numbers[FREE_EARLY]
    numbers[FREE_EARLY] = row
