"""Merging: copies of an FM that learn different rows at the same time, made one again.

What a copy has moved a parameter by is worth more or less where others have moved it too. The sum of the gradients'
squares, which Adagrad and FTRL remember, says how much: it is the step size's own measure, and, since for the log loss
its mean is the curvature, it says how near to its own optimum a copy has gone. With w and n before, w_c and n_c of the
copies that have moved it, n' = n + Σ (n_c - n), and s(n) the inverse of a step ((√n + eps) / lr; for FTRL
(beta + √n) / lr + l2):

    w' = w + Σ (w_c - w) · (s(n_c) + TRUST (n_c - n)) / (s(n') + TRUST (n' - n))

A parameter that few rows move, so that s outweighs the rest, moves by the sum of all steps, each as short as it would
be had one copy taken them all. One that many rows move has reached its optimum in each copy, and twice as far would be
beyond: there the formula becomes the mean, weighted by the squares of gradients. Where one copy alone has moved it,
w' = w_c.
The same for w = -z / s of FTRL, whose z is made of that. docs/why.md has the measurements.

SGD and Adam remember no such sum: their parameters are the means over the copies that have moved them, which is slow.

Each row is merged by one of the copies that have changed it, in turns: the others send it theirs, and it sends all what
the row is now. So what a copy computes, receives and holds for a merge is in proportion to the model, however many
copies there are (a reduce-scatter and an all-gather; Thakur, Rabenseifner & Gropp 2005).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from streamrec._compile import compiled
from streamrec._pointers import held_rows, pointers_to, touch
from streamrec.models import _kernels
from streamrec.models._hash_table import SIGHTED
from streamrec.models._memory import Rows
from streamrec.models._updates import ADAGRAD, ADAM, FTRL, ROW_ADAGRAD, first_factor, updates_of
from streamrec.models.fm import CHECKPOINT, FM, PUBLISHED

__all__ = ["Changes", "Copy", "Swap", "merge", "swapped"]

Changes = Mapping[str, NDArray[Any]]
"""What one copy has learned, but for the rows themselves: arrays by name."""


class Swap(NamedTuple):
    """Rows that a copy gives to each copy, and how many it gets from each, by the copies' numbers; of itself none."""

    give: Sequence[NDArray[np.float32]]
    """`(rows, width)` each; good until what came for them has been sent back to the merge."""
    want: Sequence[int]


TRUST = np.array([1.0, 4.0], dtype=np.float32)
"""Of factors and of linear weights, for each further copy: how much further copies have gone to their own optima than
the squares of one parameter say, since all parameters of a row move at once."""


AHEAD = 16
"""So many rows before a row is merged the cache is asked for it: they lie anywhere."""
LINE = 16
"""Numbers in a line of the cache."""


class Copy:
    """A copy of an FM, one of several that learn apart: what it has learned since the last merge, and the merge.

    All copies must have been the same when their `Copy` was made, and merge the same changes in the same order; then
    they are the same after it, bit for bit, but for the numbers of the rows. Keeps what the rows were and what is sent
    of them, each as much memory as the model's.

    >>> from streamrec import Id, Impression, Schema
    >>> from streamrec.preprocessors import encode
    >>> schema = Schema(Id("user"), Id("item"))
    >>> models = [FM(schema, dim=4) for _ in range(2)]
    >>> copies = [Copy(model) for model in models]
    >>> batches = [encode(schema, [Impression("i", 0.0, "u1", item)]).batch for item in ("p1", "p2")]
    >>> for model, batch in zip(models, batches):
    ...     model.learn(batch, np.ones(1, dtype=np.float32))
    >>> merge(copies)
    >>> bool(models[0].predict(batches[1]) == models[1].predict(batches[1]))
    True
    """

    def __init__(self, model: FM) -> None:
        self.model = model
        width = model._table.array.shape[1]
        linear = model.linear_optimizer.kind
        self._rules = np.array([model.optimizer.kind, ADAGRAD if linear == ROW_ADAGRAD else linear])
        self._linear_at = updates_of(model.dim, model.optimizer.kind, linear).linear_at
        model._gather()
        used = model.ids.used
        self._used = used
        self._rows = Rows((width,), np.float32, max(used, 1))
        self._rows.array[:used] = model._table.array[:used]
        self._ids = Rows((), np.int64, max(used, 1))
        self._ids.array[:used] = model.ids.ids
        self._sent = np.empty((0, width), dtype=np.float32)
        self._places = Rows((), np.int32, max(used, 1))  # of a row in the merge under way, plus 1; else 0
        self._remember()
        self._forget_expired()
        model.mark(False)

    def _forget_expired(self) -> None:
        """An id that has expired begins anew, in the copies whose row of it was taken back and in the others."""
        if self.model._expires:
            expired = self.model._expiry.array[: self._used] < self.model._clock[0]
            self._ids.array[: self._used][expired] = 0

    def _remember(self) -> None:
        """What is not in the rows."""
        model = self.model
        self._other = {
            "bias": np.append(model.bias.detach().numpy(), model.optimizer_bias.numpy()),
            "statistics": model.statistics.numpy().copy(),
            "clock": model._clock.copy(),
            "counts": np.array([model.left_out, model.ids.header[SIGHTED]]),
            "sketch": model._sketch.copy(),
        }

    def _live(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        alive: NDArray[np.bool_] = self.model._expiry.array[rows] != _kernels.FREE_ROW
        return alive

    def changes(self) -> Changes:
        """What has been learned since the last merge, but for the rows of the ids."""
        model = self.model
        rows = np.flatnonzero(model._touched.array[: model.ids.used] & CHECKPOINT)
        if model._expires:
            rows = rows[self._live(rows)]
        counted = np.flatnonzero(model._sketch != self._other["sketch"])
        return {
            "ids": model.ids.owners[rows],
            "expiry": model._expiry.array[rows] if model._expires else np.zeros(0),
            "bias": np.append(model.bias.detach().numpy(), model.optimizer_bias.numpy()),
            "statistics": model.statistics.numpy().copy(),
            "clock": model._clock.copy(),
            "counts": np.array([model.left_out, model.ids.header[SIGHTED]]),
            "counted": counted,
            "sightings": model._sketch[counted],
        }

    def merge(self, parts: Sequence[Changes], number: int) -> Generator[Swap, Sequence[NDArray[np.float32]], None]:
        """Take in what the copies have learned: their `changes`, of which this copy's own are the `number`-th.

        Yields what is to be swapped with the others, twice, and is to be sent what came for it, by the copies' numbers.
        """
        rows, members = self._joint(parts)
        dealt = _dealt(members)
        which = np.split(np.argsort(dealt, kind="stable"), np.cumsum(np.bincount(dealt, minlength=len(parts)))[:-1])
        mine, which[number] = which[number], which[number][:0]
        changed = members[:, number] > 0
        want = np.count_nonzero(members[mine], axis=0)
        want[number] = 0
        came = yield Swap(self._rows_of([rows[places[changed[places]]] for places in which]), want.tolist())
        merged = self._merge_mine(rows[mine], members[mine], came, number)
        give = [merged] * len(parts)
        give[number] = merged[:0]
        came = yield Swap(give, [len(places) for places in which])
        for places, block in zip(which, came, strict=True):
            _place(rows[places], block, self.model._table.array, self._rows.array)
        self._end(parts, rows, members)

    def _joint(self, parts: Sequence[Changes]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The rows that any copy has changed, in an order that is the same for all, and by which copies: see
        `_union`."""
        model, table = self.model, self.model.ids
        ids = np.concatenate([part["ids"] for part in parts])
        rows = table.find(ids)
        # in the order of their value, which does not depend on the numbers of the rows in other copies
        new = np.unique(ids[rows < 0])
        if len(new):
            model._make_room(len(new))
            table.insert(new)
            missing = rows < 0
            rows[missing] = table.find(ids[missing])
        model._gather()
        self._grow(table.used)
        lengths = np.array([0, *np.cumsum([len(part["ids"]) for part in parts])])
        found: tuple[NDArray[np.int64], NDArray[np.int32]] = _union(rows, lengths, self._places.array)
        return found

    def _room(self, count: int) -> NDArray[np.float32]:
        """For so many rows. Kept from merge to merge: to be given memory takes longer than to fill it."""
        if len(self._sent) < count:
            self._sent = np.empty((count + count // 4, self._rows.array.shape[1]), dtype=np.float32)
        return self._sent[:count]

    def _rows_of(self, which: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """What the model has in these rows."""
        ends = np.cumsum([len(rows) for rows in which])
        room, table = self._room(int(ends[-1])), self.model._table.array
        blocks = np.split(room, ends[:-1])
        for rows, block in zip(which, blocks, strict=True):
            table.take(rows, axis=0, out=block, mode="clip")  # by another mode numpy takes memory in between
        return blocks

    def _merge_mine(
        self,
        rows: NDArray[np.int64],
        members: NDArray[np.int32],
        came: Sequence[NDArray[np.float32]],
        number: int,
    ) -> NDArray[np.float32]:
        """Merge these rows with what came of them from the others, and return what they are now."""
        model, width = self.model, self._rows.array.shape[1]
        owners = model.ids.owners[rows]
        origins = np.where((rows < self._used) & (self._ids.array[rows] == owners), rows, -1)
        moved = self._moved(owners, origins) if model._expires else self._rows.array[:0]
        merged = self._room(len(rows))
        blocks = [np.ascontiguousarray(block) for block in came]
        scratch = np.zeros((len(came) + 4, width), dtype=np.float32)
        memory = model._table.array, self._rows.array, moved, scratch, merged
        _merge(
            *(rows, members, number, pointers_to((*memory, *blocks)), origins, owners, width),
            *(model.dim, self._linear_at, self._rules, model._numbers, TRUST * (len(came) - 1)),
            *(np.uint64(model.seed), len(model._admit) > 0),
        )
        return merged

    def _end(self, parts: Sequence[Changes], rows: NDArray[np.int64], members: NDArray[np.int32]) -> None:
        """All but the rows."""
        model = self.model
        self._ids.array[rows] = model.ids.owners[rows]
        model._touched.array[: model.ids.used] &= ~np.uint8(CHECKPOINT)
        model._touched.array[rows] |= PUBLISHED
        if model._expires:
            latest = np.full(len(rows), -math.inf)
            for number, part in enumerate(parts):
                there = members[:, number] > 0
                latest[there] = np.maximum(latest[there], part["expiry"][members[there, number] - 1])
            model._expiry.array[rows] = latest
        self._used = model.ids.used
        self._merge_others(parts)
        self._forget_expired()
        model._pointers = None

    def _grow(self, used: int) -> None:
        for memory in (self._rows, self._ids, self._places):
            if used > len(memory.array):
                memory.grow(len(memory.array), max(used, 2 * len(memory.array)))

    def _moved(self, owners: NDArray[np.int64], origins: NDArray[np.int64]) -> NDArray[np.float32]:
        """What the rows were of ids that stand in another row now, or in one anew, for theirs was taken back since the
        last merge; `origins` of them becomes -2, -3, ..."""
        model = self.model
        touched = np.flatnonzero(model._touched.array[: self._used] & CHECKPOINT)
        gone = touched[(self._ids.array[touched] != model.ids.owners[touched]) | ~self._live(touched)]
        kept: NDArray[np.float32] = self._rows.array[gone]
        order = np.argsort(self._ids.array[gone], kind="stable")
        left = self._ids.array[gone][order]
        if len(left):
            place = np.minimum(np.searchsorted(left, owners), len(left) - 1)
            found = (left[place] == owners) & (origins < 0)
            origins[found] = -2 - order[place[found]]
        return kept

    def _merge_others(self, parts: Sequence[Changes]) -> None:
        """Bias, statistics, clock, counts and sketch."""
        model, before = self.model, self._other
        trust = TRUST * (len(parts) - 1)
        # the bias is a row without factors: its weight, and what the optimizer remembers of it
        blocks = [part["bias"][None] for part in parts]
        moved = [bool(np.any(part["bias"] != before["bias"])) for part in parts]
        if any(moved):
            first, members = np.zeros(1, dtype=np.int64), np.array([moved], dtype=np.int32)
            was, now, merged = before["bias"][None].copy(), np.zeros_like(blocks[0]), np.zeros_like(blocks[0])
            memory = now, was, was[:0], np.zeros((len(parts) + 4, now.shape[1]), dtype=np.float32), merged
            _merge(
                *(first, members, -1, pointers_to((*memory, *blocks)), first, first, now.shape[1]),
                *(0, 1, self._rules[[1, 1]], model._numbers, trust),
                *(np.uint64(0), False),
            )
            with torch.no_grad():
                model.bias[0] = float(now[0, 0])
                model.optimizer_bias.copy_(torch.from_numpy(now[0, 1:]))
        model.statistics.numpy()[:] = _joint_statistics(before["statistics"], [part["statistics"] for part in parts])
        model._clock[:] = max(before["clock"][0], *(part["clock"][0] for part in parts))
        counts = before["counts"] + sum(part["counts"] - before["counts"] for part in parts)
        model.left_out = int(counts[0])
        if len(model._sketch):
            sightings = before["sketch"].astype(np.int64)
            for part in parts:
                at = part["counted"]
                sightings[at] += part["sightings"].astype(np.int64) - before["sketch"][at]
            model._sketch[:] = np.clip(sightings, 0, 255)
            # a copy that has halved its sketch counts from 0 again
            model.ids.header[SIGHTED] = int(counts[1]) % (len(model._sketch) >> 3)
        self._remember()


def merge(copies: Sequence[Copy]) -> None:
    """Make copies that are all in this process the same again."""
    parts = [one.changes() for one in copies]
    merges = [one.merge(parts, number) for number, one in enumerate(copies)]
    swaps = [next(one) for one in merges]
    while swaps:
        came, swaps = swapped(swaps), []
        for one, rows in zip(merges, came, strict=True):
            with suppress(StopIteration):
                swaps.append(one.send(rows))


def swapped(swaps: Sequence[Swap]) -> list[list[NDArray[np.float32]]]:
    """What comes to each of the copies whose swaps these are, from each; copied, as on a way from process to process,
    for what one gives it fills anew before the others have taken it."""
    return [[swap.give[number].copy() for swap in swaps] for number in range(len(swaps))]


def _joint_statistics(before: NDArray[np.float64], parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Counts, means and sums of squared deviations `(fields, 3)` of all that was seen, each part's own on top of what
    was seen before (Chan, Golub & LeVeque 1979, forth and back)."""
    joint = before.copy()
    for part in parts:
        count = part[:, 0] - before[:, 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            own = np.where(count > 0, (part[:, 0] * part[:, 1] - before[:, 0] * before[:, 1]) / count, 0.0)
            shared = before[:, 0] * count / part[:, 0]
            spread = np.where(count > 0, part[:, 2] - before[:, 2] - (own - before[:, 1]) ** 2 * shared, 0.0)
            total = joint[:, 0] + count
            apart = np.where(count > 0, own - joint[:, 1], 0.0)
            joint[:, 2] += np.where(count > 0, np.maximum(spread, 0.0) + apart**2 * joint[:, 0] * count / total, 0.0)
            joint[:, 1] += np.where(count > 0, apart * count / total, 0.0)
        joint[:, 0] = total
    return joint


@compiled()
def _union(rows: Any, lengths: Any, places: Any) -> Any:
    """The rows that any copy has changed, int64 `(n,)`, in the order of their first; and int32 `(n, copies)`: which of
    each copy's changes is of it, plus 1, or 0. `lengths`: where the rows of each copy begin. `places` is 0 before and
    after."""
    copies = len(lengths) - 1
    count = 0
    for i in range(len(rows)):
        if places[rows[i]] == 0:
            count += 1
            places[rows[i]] = count
    union = np.empty(count, dtype=np.int64)
    members = np.zeros((count, copies), dtype=np.int32)
    for c in range(copies):
        for i in range(lengths[c], lengths[c + 1]):
            at = places[rows[i]] - 1
            union[at] = rows[i]
            members[at, c] = i - lengths[c] + 1
    for at in range(count):
        places[union[at]] = 0
    return union, members


@compiled()
def _dealt(members: Any) -> Any:
    """int16 `(n,)`: the copy that merges each row, of those that have changed it, in turns."""
    dealt = np.zeros(len(members), dtype=np.int16)  # which numpy sorts in one pass
    turn = 0
    for u in range(len(members)):
        count = 0
        for c in range(members.shape[1]):
            if members[u, c] > 0:
                count += 1
        # a row that one copy has changed is that one's, and takes no turn
        nth = turn % count
        turn += count > 1
        for c in range(members.shape[1]):
            if members[u, c] > 0:
                if nth == 0:
                    dealt[u] = c
                nth -= 1
    return dealt


@compiled(inline=True)
def _touch_row(table: Any, row: int) -> None:
    """Ask for a row. The FM's loop has these lines once more: with a function for both it takes 4 % longer."""
    last = table.shape[1] - 1
    for column in range(0, last, LINE):
        touch(table, row, column)
    touch(table, row, last)


@compiled()
def _place(rows: Any, block: Any, table: Any, before: Any) -> None:
    """Put these rows of the block into a table, and into one that holds what they were."""
    for i in range(len(rows)):
        if i + AHEAD < len(rows):
            _touch_row(table, rows[i + AHEAD])
            _touch_row(before, rows[i + AHEAD])
        for column in range(block.shape[1]):
            table[rows[i], column] = block[i, column]
            before[rows[i], column] = block[i, column]


@compiled()
def _inverse_step(n: Any, rule: int, numbers: Any) -> Any:
    """The inverse of a step; of Adagrad's, times its learning rate."""
    root = np.float32(math.sqrt(n))
    if rule == FTRL:
        return (numbers[1] + root) * numbers[0] + numbers[3]
    return root + numbers[2]


@compiled()
def _mean(out: Any, rows: Any, first: int, size: int) -> None:
    for f in range(first, first + size):
        total = np.float32(0.0)
        for c in range(len(rows)):
            total += rows[c, f]
        out[f] = total / np.float32(len(rows))


@compiled()
def _merge_span(
    out: Any, base: Any, rows: Any, w: int, m: int, size: int, rule: int, numbers: Any, trust: Any, scratch: Any
) -> None:
    """`size` parameters from `w` on, whose memory begins at `m`: what they are in `out`, were in `base` and became in
    `rows`. `scratch`: room for so many numbers, twice."""
    zero = np.float32(0.0)
    # by slices, so that the compiler sees that no index is negative, and by loops with few arrays each, so that it can
    # tell them apart and computes several numbers at a time
    moved, total = scratch[0, :size], scratch[1, :size]
    moved[:] = zero
    total[:] = zero
    out_w, base_w, out_m, base_m = out[w : w + size], base[w : w + size], out[m : m + size], base[m : m + size]
    if rule == ADAGRAD:
        eps, near = numbers[2], trust * numbers[0]
        for c in range(len(rows)):
            row_w, row_n = rows[c, w : w + size], rows[c, m : m + size]
            for f in range(size):
                grown = row_n[f] - base_m[f]
                total[f] += grown if grown > zero else zero
            for f in range(size):
                grown = row_n[f] - base_m[f]
                grown = grown if grown > zero else zero
                step = np.float32(math.sqrt(base_m[f] + grown)) + eps
                moved[f] += (row_w[f] - base_w[f]) * (step + near * grown)
        for f in range(size):
            out_m[f] = base_m[f] + total[f]
        for f in range(size):
            out_w[f] = base_w[f] + moved[f] / (np.float32(math.sqrt(out_m[f])) + eps + near * total[f])
    elif rule == FTRL:
        out_n, base_n = out[m + size : m + 2 * size], base[m + size : m + 2 * size]
        per_lr, beta, l1, l2 = numbers[0], numbers[1], numbers[2], numbers[3]
        for c in range(len(rows)):
            row_z, row_n = rows[c, m : m + size], rows[c, m + size : m + 2 * size]
            for f in range(size):
                grown = row_n[f] - base_n[f]
                grown = grown if grown > zero else zero
                total[f] += grown
                before = (beta + np.float32(math.sqrt(base_n[f]))) * per_lr + l2
                now = (beta + np.float32(math.sqrt(row_n[f]))) * per_lr + l2
                step = (beta + np.float32(math.sqrt(base_n[f] + grown))) * per_lr + l2
                moved[f] += (base_m[f] / before - row_z[f] / now) * (step + trust * grown)
        for f in range(size):
            n = base_n[f] + total[f]
            before = (beta + np.float32(math.sqrt(base_n[f]))) * per_lr + l2
            step = (beta + np.float32(math.sqrt(n))) * per_lr + l2
            z = (base_m[f] / before - moved[f] / (step + trust * total[f])) * step
            out_n[f] = n
            out_m[f] = z
            out_w[f] = -(max(z - l1, zero) + min(z + l1, zero)) / step
    elif rule == ROW_ADAGRAD:
        eps, near, before, together = numbers[2], trust * numbers[0], base[m], zero
        for c in range(len(rows)):
            row_w = rows[c, w : w + size]
            grown = max(rows[c, m] - before, zero)
            together += grown
            share = np.float32(math.sqrt(before + grown)) + eps + near * grown
            for f in range(size):
                moved[f] += share * (row_w[f] - base_w[f])
        out[m] = before + together
        all_ = np.float32(math.sqrt(before + together)) + eps + near * together
        for f in range(size):
            out_w[f] = base_w[f] + moved[f] / all_
    else:
        _mean(out, rows, w, size)
        if rule == ADAM:
            _mean(out, rows, m, 2 * size)
            out[m + 2 * size] = zero  # the number of steps corrects the means, of which each has made its own
            for c in range(len(rows)):
                out[m + 2 * size] = max(out[m + 2 * size], rows[c, m + 2 * size])


@compiled()
def _begin(row: Any, key: Any, dim: int, linear_at: int, rules: Any, numbers: Any, seed: Any) -> None:
    """A row at its first vector, as learning begins it."""
    row[:] = np.float32(0.0)
    for f in range(dim):
        row[f] = first_factor(key, f, seed, numbers[0])
        if rules[0] == FTRL:
            row[dim + 1 + f] = -row[f] * _inverse_step(np.float32(0.0), FTRL, numbers[1:6])


@compiled()
def _merge(
    rows: Any,
    members: Any,
    number: int,
    pointers: Any,
    origins: Any,
    owners: Any,
    width: int,
    dim: int,
    linear_at: int,
    rules: Any,
    numbers: Any,
    trust: Any,
    seed: Any,
    admits: bool,
) -> None:
    """Make these rows of a table what they are now, those of one that holds what they were, and a block of them.

    `members`: positive where a copy has changed a row. `number`: of the copy whose table it is; -1: of none.
    `pointers`: to the table, what it was, the rows of ids that have no row in it any more, room for `copies + 4` rows,
    the block, and of each copy those of the rows that it has changed, in their order; none of the copy whose table it
    is. `origins`: the row that its id had in what the table was; -1: none; from -2 down: in those without. `owners`:
    its id. `rules`: of the factors and of the linear weight. `admits`: a new id may have begun elsewhere than at its
    first vector.
    """
    copies = members.shape[1]
    # by address: the slices below would each be counted, at more than the arithmetic costs
    table, before = held_rows(pointers, 0, width, np.float32), held_rows(pointers, 1, width, np.float32)
    moved_away, room = held_rows(pointers, 2, width, np.float32), held_rows(pointers, 3, width, np.float32)
    block = held_rows(pointers, 4, width, np.float32)
    out, fresh, scratch, gathered = room[0], room[1], room[2:4], room[4:]
    factors, linear = numbers[1:6], numbers[6:11]
    taken = np.zeros(copies, dtype=np.int64)
    for u in range(len(rows)):
        if u + AHEAD < len(rows):
            _touch_row(table, rows[u + AHEAD])
            _touch_row(before, rows[u + AHEAD])
        here, was, count = table[rows[u]], before[rows[u]], 0
        for c in range(copies):
            if members[u, c] > 0:
                theirs = here
                if c != number:
                    theirs = held_rows(pointers, 5 + c, width, np.float32)[taken[c]]
                    taken[c] += 1
                for column in range(width):
                    gathered[count, column] = theirs[column]
                count += 1
        origin = origins[u]
        if count == 1:
            now = gathered[0]
        else:
            now, changed, base = out, gathered[:count], fresh
            if origin >= 0:
                base = before[origin]
            elif origin < -1:
                base = moved_away[-2 - origin]
            else:
                _begin(fresh, owners[u], dim, linear_at, rules, numbers, seed)
            if origin == -1 and admits:
                _mean(out, changed, 0, width)
            else:
                _merge_span(out, base, changed, 0, dim + 1, dim, rules[0], factors, trust[0], scratch)
                _merge_span(out, base, changed, dim, linear_at, 1, rules[1], linear, trust[1], scratch)
        merged = block[u]
        for column in range(width):
            here[column] = now[column]
            was[column] = now[column]
            merged[column] = now[column]
