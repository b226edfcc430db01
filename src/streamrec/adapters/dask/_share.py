"""Share: what one of several copies of a model learns of a data set, and when the copies are to be merged."""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from streamrec.batch import LabeledRows
from streamrec.protocols import State
from streamrec.schema import Schema
from streamrec.storage import EncodedRows

__all__ = ["Cuts", "Share"]

COPIES_A_ROUND = 4
"""So many copies, or fewer, may be merged once an epoch; twice as many want to be twice."""
FIRST_STEP = 500
"""Rows that each copy of a new model learns before the first merge; then, of two, twice as many as it has learned by
then, and so on; half as many of four, a quarter of eight: what a model learns first moves it most, and the more the
more copies there are."""


class Cuts(NamedTuple):
    """How `rows` rows are dealt to `copies`: in rounds of neighbouring rows, each cut evenly, one part a copy.

    `window`: rows learned at a time; `apart`: rows that a copy learns between two merges, at most. One copy learns
    windows as a `BatchTrainer` reads them.
    """

    rows: int
    copies: int
    window: int
    apart: int

    @property
    def rounds(self) -> int:
        if self.copies == 1:
            return -(-self.rows // self.window)
        fewest = max(self.copies // COPIES_A_ROUND, 1)
        return max(-(-self.rows // (self.copies * self.apart)), min(fewest, self.rows))

    def begin(self, number: int) -> int:
        """The first row of a round."""
        if self.copies == 1:
            return min(self.rows, number * self.window)
        return self.rows * number // max(self.rounds, 1)

    def part(self, number: int, copy: int) -> tuple[int, int]:
        """The rows of a round that are one copy's."""
        begin, end = self.begin(number), self.begin(number + 1)
        return begin + (end - begin) * copy // self.copies, begin + (end - begin) * (copy + 1) // self.copies

    def longest(self, number: int) -> int:
        """Rows of the copy that has most of a round."""
        return -(-(self.begin(number + 1) - self.begin(number)) // self.copies)

    def blocks(self, number: int) -> list[int]:
        """Where in a round, in rows of the longest part, a copy's blocks of a window at most end: ascending from 0."""
        length = self.longest(number)
        count = max(1, -(-length // self.window))
        return [length * n // count for n in range(count + 1)]

    def steps(self, number: int, *, first: bool) -> list[int]:
        """Where in a round, in rows of the longest part, the copies merge: ascending from 0 to its length. `first`:
        of the first epoch, which begins with short ones."""
        length = self.longest(number)
        if not first or self.copies == 1:
            return [0, length]
        cuts, learned = [0], self.begin(number) // self.copies
        while cuts[-1] < length:
            more = 2 * (learned + cuts[-1]) // (self.copies if self.copies > 2 else 1)
            step = min(self.apart, max(FIRST_STEP, more))
            # what is left over goes to the last
            cuts.append(cuts[-1] + step if length - cuts[-1] - step >= step // 2 else length)
        return cuts


class Share:
    """A source of the rows that copy number `copy` learns, a window at a time.

    Reads them in blocks, as long as a window at most, which are what a later epoch learns at a time, and keeps these
    for it, up to `keep` bytes. Holds one more, however far merges are apart.
    """

    def __init__(self, rows: EncodedRows, cuts: Cuts, copy: int, *, keep: int) -> None:
        self._rows = rows
        self._cuts = cuts
        self._copy = copy
        self._keep = keep
        self._kept: dict[tuple[int, int], LabeledRows] = {}
        self._bytes = 0
        self._held: tuple[tuple[int, int], LabeledRows] | None = None
        self.first = False
        """Whether the epoch is the first."""
        self.merges = True
        """Whether what was read last ends at a merge."""
        self._round = self._step = self._window = 0

    @property
    def schema(self) -> Schema:
        """What the rows are encoded by."""
        return self._rows.schema

    def read(self, limit: int) -> LabeledRows | None:
        """The next window, which may be empty; None at the end. `limit`: rows of it, at most: those of a window."""
        cuts, number = self._cuts, self._round
        if number >= cuts.rounds:
            return None
        longest = max(cuts.longest(number), 1)
        first, last = cuts.part(number, self._copy)
        blocks, steps, window = cuts.blocks(number), cuts.steps(number, first=self.first), self._next()
        block = bisect_right(blocks, window[0]) - 1
        # as many windows in each copy, though their parts may differ by a row
        begin, end, here, there = (n * (last - first) // longest for n in (*blocks[block : block + 2], *window))
        self._window += 1
        self.merges = window[1] == steps[self._step + 1]
        if self.merges:
            self._window, self._step = 0, self._step + 1
            if self._step == len(steps) - 1:
                self._step, self._round = 0, self._round + 1
        rows = self._block((number, block), first + begin, first + end)
        return rows if there - here == end - begin else rows.take(slice(here - begin, there - begin))

    def _next(self) -> tuple[int, int]:
        """Where the next window lies in its round, in rows of the longest part: they end where blocks or steps do."""
        steps = self._cuts.steps(self._round, first=self.first)
        edges = sorted({*steps, *self._cuts.blocks(self._round)})
        place = edges.index(steps[self._step]) + self._window
        return edges[place], edges[place + 1]

    def _block(self, name: tuple[int, int], begin: int, end: int) -> LabeledRows:
        """The rows of the data set from `begin` to `end`."""
        if name in self._kept:
            return self._kept[name]
        if self._held is None or self._held[0] != name:
            self._held = None
            # what is left of a round for this copy may be nothing
            self._rows.load_state_dict({"row": min(begin, self._cuts.rows - 1)})
            found = self._rows.read(max(end - begin, 1))
            assert found is not None
            block = found if end > begin else found.take(slice(0, 0))
            size = _size(block)
            if self._bytes + size <= self._keep:
                self._kept[name] = block
                self._bytes += size
                return block
            self._held = name, block
        return self._held[1]

    def span(self) -> tuple[float, float] | None:
        """The event times of the first and the last of all rows of all copies; None where there is none."""
        return self._rows.span()

    def fraction(self) -> float:
        """The share that all copies have read; in all of them the same after as many reads."""
        if self._round >= self._cuts.rounds:
            return 1.0
        done = self._cuts.begin(self._round) + self._next()[0] * self._cuts.copies
        return min(1.0, done / self._cuts.rows)

    def state_dict(self) -> State:
        """Where it stands at a merge: the first `row` of the round, and the `step` in it."""
        return {"row": self._cuts.begin(self._round), "step": self._step}

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        row = int(state["row"])
        begins = [self._cuts.begin(number) for number in range(self._cuts.rounds + 1)]
        self._round = bisect_right(begins, row) - 1
        self._step, self._window = int(state.get("step", 0)), 0


def _size(rows: LabeledRows) -> int:
    """Bytes."""
    batch = rows.batch
    arrays = (batch.ids, batch.values, batch.fields, batch.starts, batch.ends, batch.times, batch.text_refs)
    return sum(array.nbytes for array in (*arrays, rows.labels, rows.weights)) + sum(map(len, batch.texts))
