"""Cells: the positive and negative mass of each group at each score, in bounded memory.

A group (a user, a request) is there as a whole or not at all. While there is room, all are; when their cells would
be too many, those stay whose hash begins with a zero bit, then with two, and so on (adaptive sampling, Flajolet 1990):
a sample of the groups by their names. Which ones stay depends on what was seen, not on its order, so parts merge into
the whole, and what stays has been seen from its first entry on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec._compile import compiled
from streamrec.errors import ConfigError
from streamrec.evaluators._accumulate import bin_of, usable

__all__ = ["Cells"]

_USED, _LEVEL, _UNGROUPED, _SKIPPED = range(4)
_FIRST = 64  # slots at first; always a power of two, and at most half of them are taken


class Cells:
    """At most `capacity` cells `(group, bin of the score)`, each with the mass of positives and negatives in it."""

    def __init__(self, capacity: int) -> None:
        if not isinstance(capacity, int) or capacity < 1:
            raise ConfigError(f"capacity must be a number of cells >= 1, got {capacity!r}")
        self.capacity = capacity
        self._begin(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32), np.empty((0, 2)))
        self._header = np.zeros(4, dtype=np.int64)

    @property
    def level(self) -> int:
        """One group in 2**level is kept."""
        return int(self._header[_LEVEL])

    @property
    def ungrouped(self) -> int:
        """Entries left out because they belong to no group."""
        return int(self._header[_UNGROUPED])

    @property
    def skipped(self) -> int:
        """Entries left out because they cannot be judged."""
        return int(self._header[_SKIPPED])

    def add(
        self,
        groups: NDArray[np.int64],
        labels: NDArray[np.float32],
        scores: NDArray[np.float32],
        weights: NDArray[np.float32],
        binary: bool = False,
    ) -> None:
        """Take in entries, all `(n,)`; empty `weights`: all 1. `binary`: a label of 0.5 and above is one positive of
        mass 1, any other one negative, whatever its weight."""
        at = 0
        while True:
            columns = (groups, labels, scores, weights, binary, at)
            at = _add(*columns, self._slots, self._groups, self._bins, self._mass, self._header)
            if at == len(groups):
                break
            self._make_room()

    def merge(self, other: Cells) -> None:
        """Take in what another has seen."""
        used = int(other._header[_USED])
        self._header[_LEVEL] = max(self._header[_LEVEL], other._header[_LEVEL])
        self._keep(self.level)
        at = 0
        while at < used:
            at = _merge(
                *(other._groups[:used], other._bins[:used], other._mass[:used], at),
                *(self._slots, self._groups, self._bins, self._mass, self._header),
            )
            if at < used:
                self._make_room()
        self._header[_UNGROUPED:] += other._header[_UNGROUPED:]

    def sorted(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]:
        """Where each group begins and the last ends, int64 `(groups + 1,)`; then the cells, by group and from the
        highest score down: group int64, bin int32, `(cells,)`, and mass float64 `(cells, 2)`."""
        used = int(self._header[_USED])
        groups, bins = self._groups[:used], self._bins[:used]
        order = np.lexsort((-bins, groups))
        groups = groups[order]
        changes = np.flatnonzero(groups[1:] != groups[:-1]) + 1
        starts = np.concatenate([[0], changes, [used]]) if used else np.zeros(1)
        return starts.astype(np.int64), groups, bins[order], self._mass[:used][order]

    def state_dict(self) -> dict[str, Any]:
        """The cells in the order in which they came, and the counts; cut now."""
        used = int(self._header[_USED])
        return {
            "groups": self._groups[:used].copy(),
            "bins": self._bins[:used].copy(),
            "mass": self._mass[:used].copy(),
            "header": self._header.copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was cut from. Raises `ConfigError` where it has more cells than there may be."""
        groups = np.asarray(state["groups"])
        if len(groups) > self.capacity:
            raise ConfigError(f"the state has {len(groups)} cells, capacity is {self.capacity}: give it the same")
        self._begin(groups, np.asarray(state["bins"]), np.asarray(state["mass"]))
        self._header = np.array(state["header"], dtype=np.int64)

    def _begin(self, groups: NDArray[np.int64], bins: NDArray[np.int32], mass: NDArray[np.float64]) -> None:
        """Hold these cells alone, with room for as many again."""
        size = _FIRST
        while size < 4 * len(groups):
            size *= 2
        self._slots = np.full(size, -1, dtype=np.int32)
        room = min(size // 2, self.capacity)
        self._groups = np.empty(room, dtype=np.int64)
        self._bins = np.empty(room, dtype=np.int32)
        self._mass = np.zeros((room, 2))
        used = len(groups)
        self._groups[:used], self._bins[:used], self._mass[:used] = groups, bins, mass
        _index(self._slots, self._groups[:used], self._bins[:used])

    def _make_room(self) -> None:
        """For more cells: by more memory or by fewer groups, of which the half that goes may have had none."""
        if int(self._header[_USED]) == self.capacity:
            self._header[_LEVEL] += 1
        self._keep(self.level)

    def _keep(self, level: int) -> None:
        used = int(self._header[_USED])
        kept = _chosen(self._groups[:used], level)
        self._begin(self._groups[:used][kept], self._bins[:used][kept], self._mass[:used][kept])
        self._header[_USED] = np.count_nonzero(kept)


@compiled(inline=True)
def _is_chosen(group: Any, level: int) -> bool:
    return level < 64 and (np.uint64(group) >> np.uint64(1)) >> np.uint64(63 - level) == 0  # no shift is by 64


@compiled()
def _chosen(groups: Any, level: int) -> Any:
    found = np.empty(len(groups), dtype=np.bool_)
    for i in range(len(groups)):
        found[i] = _is_chosen(groups[i], level)
    return found


@compiled(inline=True)
def _find(slots: Any, all_groups: Any, all_bins: Any, group: Any, place: Any) -> Any:
    """The slot of a cell, or the free one where it belongs."""
    mask = len(slots) - 1
    mixed = (np.uint64(group) ^ np.uint64(place) * np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xC2B2AE3D27D4EB4F)
    slot = np.int64(mixed >> np.uint64(32)) & mask
    while slots[slot] >= 0 and (all_groups[slots[slot]] != group or all_bins[slots[slot]] != place):
        slot = (slot + 1) & mask
    return slot


@compiled()
def _index(slots: Any, groups: Any, bins: Any) -> None:
    for cell in range(len(groups)):
        slots[_find(slots, groups, bins, groups[cell], bins[cell])] = cell


@compiled(inline=True)
def _put(
    group: Any, place: Any, positive: Any, negative: Any, slots: Any, groups: Any, bins: Any, mass: Any, header: Any
) -> bool:
    """Add to a cell; false where it is a new one and there is no room."""
    slot = _find(slots, groups, bins, group, place)
    cell = slots[slot]
    if cell < 0:
        cell = header[_USED]
        if cell == len(groups):
            return False
        slots[slot] = cell
        groups[cell], bins[cell] = group, place
        mass[cell, 0] = mass[cell, 1] = 0.0
        header[_USED] += 1
    mass[cell, 0] += positive
    mass[cell, 1] += negative
    return True


@compiled()
def _add(
    keys: Any,
    labels: Any,
    scores: Any,
    weights: Any,
    binary: bool,
    at: int,
    slots: Any,
    groups: Any,
    bins: Any,
    mass: Any,
    header: Any,
) -> int:
    weighted = len(weights) > 0
    while at < len(keys):
        label, weight = np.float64(labels[at]), np.float64(weights[at]) if weighted else 1.0
        if not usable(label, scores[at], weight):
            header[_SKIPPED] += 1
        elif keys[at] == 0:
            header[_UNGROUPED] += 1
        elif _is_chosen(keys[at], header[_LEVEL]):
            if binary:
                label, weight = np.float64(label >= 0.5), 1.0
            positive, negative = weight * label, weight * (1.0 - label)
            place = np.int32(bin_of(scores[at]))
            if not _put(keys[at], place, positive, negative, slots, groups, bins, mass, header):
                return at
        at += 1
    return at


@compiled()
def _merge(
    keys: Any, places: Any, parts: Any, at: int, slots: Any, groups: Any, bins: Any, mass: Any, header: Any
) -> int:
    while at < len(keys):
        positive, negative = parts[at, 0], parts[at, 1]
        if _is_chosen(keys[at], header[_LEVEL]) and not _put(
            keys[at], places[at], positive, negative, slots, groups, bins, mass, header
        ):
            return at
        at += 1
    return at
