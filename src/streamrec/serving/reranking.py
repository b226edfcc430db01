"""What becomes of a ranking before it is shown: rules, diversity, and a search engine's own relevance.

Each takes what `rank` or `retrieve` gave, best first, and gives such a list back, so that they follow one another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from streamrec.errors import ConfigError
from streamrec.serving.candidates import Ranked

__all__ = ["Rules", "blended", "diversified"]


class Rules:
    """Which items may be shown, and how many of a category: what a merchant decides, not a model.

    `allow`: only these, if given. `deny`: none of these. `most`: at most so many of each category, and `category`: the
    category of an item, by mapping or function; an item without one (None, or not in the mapping) is not capped. Frozen
    sets are taken of what is given.

    >>> rules = Rules(deny=["p4"], most=1, category={"p1": "shoes", "p2": "shoes", "p3": "hats"})
    >>> [one.item for one in rules([Ranked("p1", 0.9), Ranked("p2", 0.8), Ranked("p4", 0.7), Ranked("p3", 0.6)])]
    ['p1', 'p3']
    """

    def __init__(
        self,
        *,
        allow: Collection[str] | None = None,
        deny: Collection[str] = (),
        most: int | Mapping[str, int] | None = None,
        category: Mapping[str, str] | Callable[[str], str | None] | None = None,
    ) -> None:
        for name, items in (("allow", allow), ("deny", deny)):
            if isinstance(items, str):
                raise ConfigError(f"{name} takes several items, got the one text {items!r}; pass [{items!r}]")
        if (most is None) != (category is None):
            raise ConfigError("most needs category, which says what category an item is of, and the other way round")
        for cap in most.values() if isinstance(most, Mapping) else [most]:
            if cap is not None and (not isinstance(cap, int) or cap < 0):
                raise ConfigError(f"most must be whole numbers >= 0, got {most!r}")
        self.allow = None if allow is None else frozenset(allow)
        self.deny = frozenset(deny)
        self._most = most
        self._category = category.get if isinstance(category, Mapping) else category

    def __call__(self, ranked: Sequence[Ranked], k: int | None = None) -> list[Ranked]:
        """The first `k` (all: None) of these that may be shown, in their order."""
        if k is not None and k < 0:
            raise ConfigError(f"k must be >= 0, got {k!r}")
        kept: list[Ranked] = []
        taken: Counter[str] = Counter()
        for one in ranked:
            if k is not None and len(kept) >= k:
                break
            if one.item in self.deny or (self.allow is not None and one.item not in self.allow):
                continue
            category = None if self._category is None else self._category(one.item)
            if category is not None:
                most = self._most.get(category) if isinstance(self._most, Mapping) else self._most
                if most is not None and taken[category] >= most:
                    continue
                taken[category] += 1
            kept.append(one)
        return kept


def diversified(
    ranked: Sequence[Ranked], vectors: ArrayLike, *, k: int | None = None, balance: float = 0.7
) -> list[Ranked]:
    """`k` of these (all: None) by maximal marginal relevance (Carbonell and Goldstein 1998), the first chosen first.

    The next is the one with the greatest `balance` * score - (1 - balance) * (its greatest cosine to those chosen).
    `vectors`: `(n, dim)`, of each in order, such as `View.vectors` gives; a vector of zeros is like none. Ties in the
    order given. Scores stay what they were. k n dim steps. Raises `ConfigError` for vectors that do not fit or are not
    finite.

    >>> alike = [Ranked("red", 0.9), Ranked("also red", 0.8), Ranked("blue", 0.6)]
    >>> [one.item for one in diversified(alike, [[1, 0], [1, 0], [0, 1]], k=2)]
    ['red', 'blue']
    """
    if not 0 <= balance <= 1:
        raise ConfigError(f"balance must be from 0 (diverse) to 1 (relevant), got {balance!r}")
    if k is not None and k < 0:
        raise ConfigError(f"k must be >= 0, got {k!r}")
    if not ranked:
        return []
    given = np.asarray(vectors, dtype=np.float64)
    if given.ndim != 2 or len(given) != len(ranked) or not np.isfinite(given).all():
        raise ConfigError(f"{len(ranked)} items need finite vectors ({len(ranked)}, dim), got {given.shape}")
    lengths = np.linalg.norm(given, axis=1, keepdims=True)
    directions = np.divide(given, lengths, out=np.zeros_like(given), where=lengths > 0)
    relevance = balance * np.array([one.score for one in ranked])
    nearest = np.zeros(len(ranked))
    left = np.ones(len(ranked), dtype=np.bool_)
    chosen: list[Ranked] = []
    for turn in range(len(ranked) if k is None else min(k, len(ranked))):
        place = int(np.argmax(np.where(left, relevance - (1 - balance) * nearest, -np.inf)))
        chosen.append(ranked[place])
        left[place] = False
        cosines = directions @ directions[place]
        nearest = cosines if turn == 0 else np.maximum(nearest, cosines)
    return chosen


def blended(ranked: Sequence[Ranked], relevance: Mapping[str, float], *, weight: float = 0.5) -> list[Ranked]:
    """These by their score and a relevance of another kind, such as BM25's, best first; the blend is the new score.

    (1 - weight) * score + weight * relevance, both brought to [0, 1] by the least and the greatest of this list: the
    convex combination of Bruch, Gai and Ingber 2023. Where all are equal they are 1. An item without a relevance, or
    with one that is not finite, has the least. The blend is no probability: an auction wants the score itself.

    >>> [one.item for one in blended([Ranked("p1", 0.9), Ranked("p2", 0.8)], {"p2": 7.5, "p1": 0.1}, weight=0.6)]
    ['p2', 'p1']
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"weight must be from 0 (clicks) to 1 (relevance), got {weight!r}")
    other = [relevance.get(one.item, math.nan) for one in ranked]
    scores = (1 - weight) * _scaled([one.score for one in ranked]) + weight * _scaled(other)
    return [Ranked(ranked[place].item, float(scores[place])) for place in np.argsort(-scores, kind="stable").tolist()]


def _scaled(values: Sequence[float]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """These from 0 to 1; what is not finite is 0."""
    given = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(given)
    if not finite.any():
        return np.zeros(len(given))
    low, high = given[finite].min(), given[finite].max()
    spread = high - low
    return np.where(finite, (given - low) / spread if spread > 0 else 1.0, 0.0)
