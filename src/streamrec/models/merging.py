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
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamrec._compile import compiled
from streamrec._pointers import held_rows, pointers_to
from streamrec.models import _kernels
from streamrec.models._hash_table import SIGHTED
from streamrec.models._memory import Rows
from streamrec.models._updates import ADAGRAD, ADAM, FTRL, ROW_ADAGRAD, first_factor, updates_of
from streamrec.models.fm import CHECKPOINT, FM, PUBLISHED

__all__ = ["Changes", "Copy"]

Changes = Mapping[str, NDArray[Any]]
"""What one copy has learned: arrays by name."""

TRUST = np.array([1.0, 4.0], dtype=np.float32)
"""Of factors and of linear weights, for each further copy: how much further copies have gone to their own optima than
the squares of one parameter say, since all parameters of a row move at once."""


class Copy:
    """A copy of an FM, one of several that learn apart: what it has learned since the last merge, and the merge.

    All copies must have been the same when their `Copy` was made, and merge the same changes in the same order; then
    they are the same after it, bit for bit, but for the numbers of the rows. Keeps what the rows were and what was sent
    of them, each as much memory as the model's.

    >>> import copy
    >>> from streamrec import Id, Impression, Schema
    >>> from streamrec.preprocessors import encode
    >>> schema = Schema(Id("user"), Id("item"))
    >>> models = [FM(schema, dim=4) for _ in range(2)]
    >>> copies = [Copy(model) for model in models]
    >>> batches = [encode(schema, [Impression("i", 0.0, "u1", item)]).batch for item in ("p1", "p2")]
    >>> for model, batch in zip(models, batches):
    ...     model.learn(batch, np.ones(1, dtype=np.float32))
    >>> learned = [one.changes() for one in copies]
    >>> for one in copies:
    ...     one.merge(learned)
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
        """What has been learned since the last merge; its arrays are good until the next call."""
        model = self.model
        rows = np.flatnonzero(model._touched.array[: model.ids.used] & CHECKPOINT)
        if model._expires:
            rows = rows[self._live(rows)]
        counted = np.flatnonzero(model._sketch != self._other["sketch"])
        model._gather()
        if len(self._sent) < len(rows):  # kept from merge to merge: to be given memory takes longer than to fill it
            self._sent = np.empty((len(rows) + len(rows) // 4, self._rows.array.shape[1]), dtype=np.float32)
        return {
            "ids": model.ids.owners[rows],
            # these rows exist; by any other mode numpy takes memory of its own in between
            "rows": model._table.array.take(rows, axis=0, out=self._sent[: len(rows)], mode="clip"),
            "expiry": model._expiry.array[rows] if model._expires else np.zeros(0),
            "bias": np.append(model.bias.detach().numpy(), model.optimizer_bias.numpy()),
            "statistics": model.statistics.numpy().copy(),
            "clock": model._clock.copy(),
            "counts": np.array([model.left_out, model.ids.header[SIGHTED]]),
            "counted": counted,
            "sightings": model._sketch[counted],
        }

    def merge(self, parts: Sequence[Changes]) -> None:
        """Take in what the copies have learned, its own `changes` among them, in the order that all use."""
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
        model._map()  # gathers
        self._grow(table.used)
        lengths = np.array([0, *np.cumsum([len(part["ids"]) for part in parts])])
        union, members = _union(rows, lengths, self._places.array)
        owners = table.owners[union]
        origins = np.where((union < self._used) & (self._ids.array[union] == owners), union, -1)
        moved = self._moved(owners, origins) if model._expires else self._rows.array[:0]
        blocks = [np.ascontiguousarray(part["rows"]) for part in parts]
        trust = TRUST * (len(parts) - 1)
        memory = (
            model._table.array,
            self._rows.array,
            moved,
            np.zeros((len(parts) + 4, self._rows.array.shape[1]), dtype=np.float32),
        )
        _merge(
            *(union, members, pointers_to((*memory, *blocks)), origins, owners, self._rows.array.shape[1]),
            *(model.dim, self._linear_at, self._rules, model._numbers, trust, np.uint64(model.seed)),
            len(model._admit) > 0,
        )
        self._ids.array[union] = owners
        model._touched.array[: table.used] &= ~np.uint8(CHECKPOINT)
        model._touched.array[union] |= PUBLISHED
        if model._expires:
            latest = np.full(len(union), -math.inf)
            for number, part in enumerate(parts):
                there = members[:, number] > 0
                latest[there] = np.maximum(latest[there], part["expiry"][members[there, number] - 1])
            model._expiry.array[union] = latest
        self._used = table.used
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
            nothing, members = np.zeros(1, dtype=np.int64), np.array([moved], dtype=np.int32)
            was, now = before["bias"][None].copy(), np.zeros((1, len(before["bias"])), dtype=np.float32)
            memory = now, was, was[:0], np.zeros((len(parts) + 4, now.shape[1]), dtype=np.float32)
            _merge(
                *(nothing, members, pointers_to((*memory, *blocks)), nothing, nothing, now.shape[1]),
                *(0, 1, self._rules[[1, 1]], model._numbers, trust, np.uint64(0)),
                False,
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
    union: Any,
    members: Any,
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
    """Fill the rows `union` of a table, and of one that holds what they were, with what they are now.

    `members`: which row of each copy's is of it, plus 1, or 0. `pointers`: to the table, what it was, the rows of ids
    that have no row in it any more, room for `copies + 4` rows, and the rows of each copy. `origins`: the row
    that its id had in what the table was; -1: none; from -2 down: in those without. `owners`: its id. `rules`: of the
    factors and of the linear weight. `admits`: a new id may have begun elsewhere than at its first vector.
    """
    copies = members.shape[1]
    # by address: the slices below would each be counted, at more than the arithmetic costs
    table, before = held_rows(pointers, 0, width, np.float32), held_rows(pointers, 1, width, np.float32)
    moved_away, room = held_rows(pointers, 2, width, np.float32), held_rows(pointers, 3, width, np.float32)
    out, fresh, scratch, gathered = room[0], room[1], room[2:4], room[4:]
    factors, linear = numbers[1:6], numbers[6:11]
    for u in range(len(union)):
        count = 0
        for c in range(copies):
            at = members[u, c] - 1
            if at >= 0:
                theirs = held_rows(pointers, 4 + c, width, np.float32)[at]
                for column in range(width):
                    gathered[count, column] = theirs[column]
                count += 1
        origin = origins[u]
        if count == 1:
            now = gathered[0]
        else:
            now, rows, base = out, gathered[:count], fresh
            if origin >= 0:
                base = before[origin]
            elif origin < -1:
                base = moved_away[-2 - origin]
            else:
                _begin(fresh, owners[u], dim, linear_at, rules, numbers, seed)
            if origin == -1 and admits:
                _mean(out, rows, 0, width)
            else:
                _merge_span(out, base, rows, 0, dim + 1, dim, rules[0], factors, trust[0], scratch)
                _merge_span(out, base, rows, dim, linear_at, 1, rules[1], linear, trust[1], scratch)
        here, was = table[union[u]], before[union[u]]
        for column in range(width):
            here[column] = now[column]
            was[column] = now[column]
