"""Showing now and then what is not believed best, to learn whether it is, with the probability of each choice.

Log the `propensity` of what is shown with the impression, as a feature, say: then `evaluators.snips` and its like can
tell what another policy would have earned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamrec.errors import ConfigError
from streamrec.serving.candidates import Ranked

__all__ = ["Shown", "epsilon_greedy", "thompson"]


class Shown(NamedTuple):
    """An item to show. `propensity`: the probability with which it was chosen for its place, given those before it."""

    item: str
    score: float
    propensity: float


def epsilon_greedy(
    ranked: Sequence[Ranked], *, rng: np.random.Generator, k: int = 1, epsilon: float = 0.05
) -> list[Shown]:
    """Fill `k` places: each with the best that is left, or, with the probability `epsilon`, with any of those left.

    The best has the propensity 1 - epsilon + epsilon / n, the others epsilon / n, of n that are left (Sutton and Barto
    2018, section 2.2). `ranked`: best first; one whose score is nan is never the best, and shown by chance alone.

    >>> shown = epsilon_greedy([Ranked("p1", 0.9), Ranked("p2", 0.1)], rng=np.random.default_rng(0), epsilon=0.2)
    >>> round(shown[0].propensity, 6)
    0.9
    """
    scores = np.array([one.score for one in ranked], dtype=np.float64)
    scores = np.where(np.isnan(scores), -np.inf, scores)

    def best(left: NDArray[np.int64]) -> NDArray[np.float64]:
        chances = np.zeros(len(left))
        chances[np.argmax(scores[left])] = 1.0
        return chances

    return _chosen(ranked, k, epsilon, rng, best)


def thompson(
    ranked: Sequence[Ranked],
    deviations: ArrayLike,
    *,
    rng: np.random.Generator,
    k: int = 1,
    draws: int = 100,
    epsilon: float = 0.01,
) -> list[Shown]:
    """Fill `k` places by Thompson sampling: each item is chosen as often as it may be the best that is left.

    `deviations`: `(n,)`, how unsure each logit is, such as `View.deviations` gives for the items of `ranked` in that
    order; the logits are drawn from normal distributions around those of the scores (Chapelle and Li 2011). The best of
    each of `draws` drawings is written down, and one of them is chosen: so the propensity, (1 - epsilon) * the share of
    the drawings that it has won + epsilon / n, is exact, where that of a single drawing would be an integral. `epsilon`
    gives every item a chance, without which no log can be asked about what was never tried. Raises `ConfigError` for
    deviations that are no finite numbers >= 0.

    >>> two = [Ranked("known", 0.30), Ranked("new", 0.25)]
    >>> shown = thompson(two, [0.01, 1.0], rng=np.random.default_rng(0), k=2)
    >>> 0.2 < shown[0].propensity < 0.8, shown[1].propensity
    (True, 1.0)
    """
    given = np.asarray(deviations, dtype=np.float64)
    if given.shape != (len(ranked),) or not (np.isfinite(given) & (given >= 0)).all():
        raise ConfigError(f"{len(ranked)} items need as many deviations, finite and >= 0, got {deviations!r}")
    if not isinstance(draws, int) or draws < 1:
        raise ConfigError(f"draws must be a whole number >= 1, got {draws!r}")
    scores = np.clip(np.array([one.score for one in ranked], dtype=np.float64), 1e-7, 1 - 1e-7)
    drawn = np.log(scores) - np.log1p(-scores) + given * rng.standard_normal((draws, len(ranked)))
    drawn = np.where(np.isnan(drawn), -np.inf, drawn)  # a score of nan: by epsilon alone

    def best(left: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.bincount(np.argmax(drawn[:, left], axis=1), minlength=len(left)) / draws

    return _chosen(ranked, k, epsilon, rng, best)


def _chosen(
    ranked: Sequence[Ranked],
    k: int,
    epsilon: float,
    rng: np.random.Generator,
    best: Callable[[NDArray[np.int64]], NDArray[Any]],
) -> list[Shown]:
    """One place after the other. `best`: the chances of those left, without exploration."""
    if not 0 <= epsilon <= 1:
        raise ConfigError(f"epsilon must be a probability from 0 to 1, got {epsilon!r}")
    if not isinstance(k, int) or k < 0:
        raise ConfigError(f"k must be a whole number >= 0, got {k!r}")
    left = np.arange(len(ranked))
    shown: list[Shown] = []
    while len(shown) < k and len(left):
        chances = (1 - epsilon) * best(left) + epsilon / len(left)
        chances /= chances.sum()
        place = int(rng.choice(len(left), p=chances))
        one = ranked[int(left[place])]
        shown.append(Shown(one.item, one.score, float(chances[place])))
        left = np.delete(left, place)
    return shown
