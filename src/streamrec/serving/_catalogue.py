"""The items that stay, with what one version makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamrec.batch import Batch
from streamrec.errors import ConfigError
from streamrec.events import Impression
from streamrec.models import FM, ranking
from streamrec.preprocessors.encode import Problem
from streamrec.protocols import Model
from streamrec.serving._sides import Sides, encoded_in_blocks
from streamrec.serving.candidates import Candidate, Shortlist, candidate_of, item_of

__all__ = ["BLOCK", "Catalogue", "Parts", "with_parts"]

BLOCK = 8192  # items that are encoded or scored at once


class Parts(NamedTuple):
    """What an FM of one version makes of the items."""

    batch: Batch  # of the fields that are the items' own: knows no weights, so that it serves the next version too
    parts: NDArray[np.float32]  # (items, dim + 1)
    codes: ranking.Codes  # of them


class Catalogue(NamedTuple):
    """Items, each once, and where they stand."""

    candidates: Sequence[str | Candidate]
    items: Sequence[str]
    places: Mapping[str, int]
    mark: object  # the same for as long as the items stand where they stand
    names: frozenset[str]  # the fields that are the items' own
    by_fm: Parts | None = None  # None: the model is none

    @classmethod
    def of(cls, candidates: Sequence[str | Candidate]) -> Catalogue:
        """Raises `ConfigError` where an item stands twice."""
        items = list(map(item_of, candidates))
        places = {item: place for place, item in enumerate(items)}
        if len(places) < len(items):
            twice = next(item for place, item in enumerate(items) if places[item] != place)
            raise ConfigError(f"the catalogue holds {twice!r} twice: give each item once, with the features of both")
        brought = set[str]().union(*(one.features for one in candidates if not isinstance(one, str)))
        return cls(candidates, items, places, object(), frozenset(brought))

    def find(self, candidates: Sequence[str | Candidate]) -> NDArray[np.int64] | None:
        """int64 `(n,)`: where these stand, if all are names of the catalogue; None: they are not."""
        if isinstance(candidates, Shortlist) and candidates.catalogue is self.mark:
            return candidates.places
        try:
            if len(candidates) > 1:
                found = itemgetter(*candidates)(self.places)  # one look-up after the other without a step of Python
            else:  # of one, itemgetter makes no tuple
                found = [self.places[one] for one in candidates]  # type: ignore[index]
        except (KeyError, TypeError):  # one is not in it, or is a Candidate
            return None
        return np.fromiter(found, dtype=np.int64, count=len(found))

    def skipped(self, items: Iterable[str]) -> NDArray[np.int64]:
        """int64: the places of those that are in it, ascending, each once."""
        return np.array(sorted({self.places[item] for item in items if item in self.places}), dtype=np.int64)

    def candidate(self, item: str) -> Candidate | None:
        """The item with the features that it has here; None where it is not here."""
        place = self.places.get(item)
        return None if place is None else candidate_of(self.candidates[place])


def with_parts(
    catalogue: Catalogue, model: Model, sides: Callable[[frozenset[str]], Sides], batch: Batch | None
) -> tuple[Catalogue, Sequence[Problem]]:
    """The catalogue by this model; `batch`: as it was encoded before, if it was, by the same schema."""
    if not isinstance(model, FM):
        return catalogue._replace(by_fm=None), ()
    problems: Sequence[Problem] = ()
    if batch is None:
        every = catalogue.candidates
        blocks = (
            [
                Impression("", 0.0, "", one)
                if isinstance(one, str)
                else Impression("", 0.0, "", one.item, one.features)
                for one in every[begin : begin + BLOCK]
            ]
            for begin in range(0, len(every), BLOCK)
        )
        batch, problems = encoded_in_blocks(sides(catalogue.names).own, blocks)
    parts = model.parts(batch)
    return catalogue._replace(by_fm=Parts(batch, parts, ranking.coded(parts))), problems
