"""What is ranked, and what comes back: candidates, lists of them that are looked up once, and rankings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["Candidate", "Ranked", "Shortlist", "candidate_of", "item_of", "paired"]


class Candidate(msgspec.Struct, frozen=True):
    """An item that might be shown, with the features of its own."""

    item: str
    features: Mapping[str, Any] = {}


class Ranked(NamedTuple):
    """An item and its click probability."""

    item: str
    score: float


class Shortlist(Sequence[str]):
    """Items of a catalogue, looked up once: `Scorer.shortlist` makes it, `Scorer.rank` takes it for the names it holds.

    Good for as long as the scorer's catalogue is, also over refreshes. After another `set_catalogue`, or for another
    scorer, it ranks as the plain names do, which takes longer and is right too. `places`: int64 `(n,)`, where the
    items stand in the catalogue; `catalogue` is that one's mark.
    """

    __slots__ = ("catalogue", "items", "places")

    def __init__(self, items: Iterable[str], places: NDArray[np.int64], catalogue: object) -> None:
        self.items = tuple(items)
        self.places = places
        self.catalogue = catalogue

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[str]:
        return iter(self.items)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> Shortlist: ...

    def __getitem__(self, place: int | slice) -> str | Shortlist:
        if isinstance(place, slice):
            return Shortlist(self.items[place], self.places[place].copy(), self.catalogue)
        return self.items[place]

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.items[:3]))
        return f"Shortlist({len(self)} items: {shown}{', ...' if len(self) > 3 else ''})"


def candidate_of(one: str | Candidate) -> Candidate:
    """A name as a candidate without features of its own."""
    return Candidate(one) if isinstance(one, str) else one


def item_of(one: str | Candidate) -> str:
    """The name of a candidate."""
    return one if isinstance(one, str) else one.item


_ranked: Any = partial(tuple.__new__, Ranked)  # half the time of Ranked(item, score), which matters for 1,000


def paired(items: Iterable[str], scores: NDArray[np.float32]) -> list[Ranked]:
    """Each item with its score, float32 `(n,)`."""
    return list(map(_ranked, zip(items, scores.tolist(), strict=True)))
