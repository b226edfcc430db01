"""The loop of `LabelJoin`, compiled, over rows in arrays.

An open impression is a row of `opens`: first in the heap `recent`; behind the watermark, where none can come before it
any more, in the queue of the kind whose window closes next. So the heap is as small as the lateness, however long the
windows are. Feedback that waits for its impression is a row of `earlies`: those of one impression are chained by `next`
from the one in the table, and all are in the heap `expiring`. Free rows are chained by `next` too.
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
    "CLOSED",
    "EARLY",
    "FOREVER",
    "FREE_EARLY",
    "FREE_OPEN",
    "NUMBERS",
    "OPEN",
    "OPENED",
    "PASSED",
    "REASONS",
    "RECENT",
    "SHOWN",
    "UNKNOWN",
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
        ("place", np.int64),
        ("payload", np.int64),
        ("positive", np.int64),  # the kinds it has feedback of, as bits
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
    ]
)

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
    _OUTSIDE_WINDOW,
    _REPEATED,
    _UNKNOWN_KIND,
    _UNMATCHED,
) = range(len(REASONS))
# after the counts: arrivals, open impressions, those of them in `recent`, early feedback, the first free rows
NUMBERS = len(REASONS) + 6
ARRIVALS, OPENED, RECENT, WAITING, FREE_OPEN, FREE_EARLY = range(len(REASONS), NUMBERS)


@compiled(inline=True)
def _memory(pointers: Any) -> Any:
    """What `LabelJoin` points to: windows and times; numbers; of open impressions their rows, table, heap and queues;
    of early feedback its rows, table and heap; records for what one event closes.

    `times`: the watermark, then the lateness. `pointers` ends with the capacity.
    """
    windows, times, numbers = held(pointers, 0, np.float64), held(pointers, 1, np.float64), held(pointers, 2, np.int64)
    opens, open_table, recent = held(pointers, 3, OPEN), held(pointers, 4, np.int64), held(pointers, 5, np.int64)
    queues = held_rows(pointers, 6, 2, np.int64)
    earlies, early_table = held(pointers, 7, EARLY), held(pointers, 8, np.int64)
    expiring = held(pointers, 9, np.int64)
    return windows, times, numbers, opens, open_table, recent, queues, earlies, early_table, expiring


@compiled()
def advance(begin: int, data: Any, cuts: Any, times: Any, codes: Any, payloads: Any, pointers: Any, closed: Any) -> Any:
    """Take the events from number `begin` on; write what their times close to `closed`.

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
            done, count = _take(n, high, low, times[n], codes[n], payloads[n], capacity, memory, closed, count)
            if not done:
                return n, count
        first = end + 1
    return len(times), count


@compiled()
def advance_one(data: Any, time: float, code: int, payload: int, pointers: Any) -> Any:
    """`advance` with one event, `data` its id. Returns how much is in `closed`, the last of `pointers`: taking an array
    of records in takes longer than all the rest. Less than 0 where there was no room for all: -1 - count."""
    high, low = key_of(data, 0, len(data))
    closed = held(pointers, 10, CLOSED)
    done, count = _take(0, high, low, time, code, payload, pointers[-1], _memory(pointers), closed, 0)
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
    capacity: int,
    memory: Any,
    closed: Any,
    count: int,
) -> Any:
    """Take an event, or as much of what it closes as there is room for; taken again, it goes on from there."""
    windows, times, numbers, opens, open_table, recent, queues, earlies, early_table, expiring = memory
    if not (times[0] <= time < FOREVER):  # so nan is late too
        if code == SHOWN:
            if count == len(closed):
                return False, count
            numbers[_LATE_IMPRESSION] += 1
            count = _write(n, payload, time, -1, False, True, closed, count)
        else:
            numbers[_LATE_FEEDBACK] += 1
        return True, count
    if time - times[1] > times[0]:
        times[0] = time - times[1]
    count = _close(times[0], n, memory, closed, count)
    # more may be due, and what follows needs room
    if len(closed) - count < 1 + max(0, numbers[OPENED] + 1 - capacity):
        return False, count
    if (code == SHOWN and numbers[FREE_OPEN] < 0) or (code >= 0 and numbers[FREE_EARLY] < 0):
        return False, count
    row = find(high, low, open_table, opens)
    if code == SHOWN:
        if row >= 0:
            numbers[_DUPLICATE_IMPRESSION] += 1
            return True, _write(n, payload, time, -1, False, True, closed, count)
        row = numbers[FREE_OPEN]
        numbers[FREE_OPEN] = opens[row].next
        _enter(row, high, low, time, payload, numbers, opens, open_table)
        push(row, recent, numbers[RECENT], opens)
        numbers[RECENT] += 1
        early = find(high, low, early_table, earlies) if numbers[WAITING] else EMPTY
        if early >= 0:
            _match(row, early, windows, numbers, opens, earlies, early_table, expiring)
        while numbers[OPENED] > capacity:
            row = _take_first(windows, numbers, opens, recent, queues)
            count = _write(n, opens[row].payload, opens[row].time, -1, False, True, closed, count)
            _free(row, numbers, opens, open_table)
            numbers[_EVICTED_IMPRESSION] += 1
    elif code == UNKNOWN:
        numbers[_UNKNOWN_KIND] += 1
    elif row >= 0:
        _note(row, time, code, windows, numbers, opens)
    else:
        _keep(high, low, time, code, numbers, earlies, early_table, expiring)
        while numbers[WAITING] > capacity:
            _forget(numbers, earlies, early_table, expiring)
            numbers[_EVICTED_FEEDBACK] += 1
    return True, count


@compiled(inline=True)
def _close(watermark: float, event: int, memory: Any, closed: Any, count: int) -> int:
    """Write what closes before `watermark` to `closed`, as much as it has room for; returns how much is in it."""
    windows, _, numbers, opens, open_table, recent, queues, earlies, early_table, expiring = memory
    while numbers[RECENT] and opens[recent[0]].time < watermark:
        row = pop(recent, numbers[RECENT], opens)
        numbers[RECENT] -= 1
        _append(row, 0, queues, opens)
    while numbers[WAITING] and earlies[expiring[0]].time < watermark:
        _forget(numbers, earlies, early_table, expiring)
        numbers[_UNMATCHED] += 1
    last = len(windows) - 1
    while count < len(closed):
        at, due = watermark, -1
        for kind in range(last, -1, -1):  # the widest first: where two close at one time, the impression there is older
            row = queues[kind, 0]
            if row >= 0 and opens[row].time + windows[kind] < at:
                at, due = opens[row].time + windows[kind], kind
        if due < 0:
            break
        row = _shift(due, queues, opens)
        label = (opens[row].positive >> due) & 1
        count = _write(event, opens[row].payload, opens[row].time, due, label, due == last, closed, count)
        if due == last:
            _free(row, numbers, opens, open_table)
        else:
            _append(row, due + 1, queues, opens)
    return count


@compiled()
def _enter(row: int, high: Any, low: Any, time: float, payload: int, numbers: Any, opens: Any, open_table: Any) -> None:
    """Make a free row, taken off its chain, that of an open impression."""
    numbers[ARRIVALS] += 1
    numbers[OPENED] += 1
    opens[row].high, opens[row].low, opens[row].time = high, low, time
    opens[row].arrival, opens[row].payload, opens[row].positive = numbers[ARRIVALS], payload, 0
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
def _write(event: int, payload: int, time: float, kind: int, label: Any, last: bool, closed: Any, count: int) -> int:
    line = closed[count]
    line.event, line.payload, line.time, line.kind, line.last = event, payload, time, kind, last
    line.label = np.float32(label) if kind >= 0 else np.float32(np.nan)
    return count + 1


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
def _note(row: int, time: float, kind: int, windows: Any, numbers: Any, opens: Any) -> None:
    shown = opens[row].time
    if not (shown <= time <= shown + windows[kind]):
        numbers[_OUTSIDE_WINDOW] += 1
    elif (opens[row].positive >> kind) & 1:
        numbers[_REPEATED] += 1
    else:
        opens[row].positive |= 1 << kind


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
def keep_all(keys: Any, times: Any, kinds: Any, numbers: Any, earlies: Any, early_table: Any, expiring: Any) -> None:
    """Let all this feedback wait. There must be room."""
    for n in range(len(times)):
        _keep(keys[n, 0], keys[n, 1], times[n], kinds[n], numbers, earlies, early_table, expiring)


@compiled()
def _match(
    row: int, early: int, windows: Any, numbers: Any, opens: Any, earlies: Any, early_table: Any, expiring: Any
) -> None:
    """Give an impression the feedback that waited for it. In which order changes neither labels nor counts."""
    take_out(early, early_table, earlies)
    while early >= 0:
        _note(row, earlies[early].time, earlies[early].kind, windows, numbers, opens)
        remove(early, expiring, numbers[WAITING], earlies)
        numbers[WAITING] -= 1
        after = earlies[early].next
        earlies[early].next = numbers[FREE_EARLY]
        numbers[FREE_EARLY] = early
        early = after


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
