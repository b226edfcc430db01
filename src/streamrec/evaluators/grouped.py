"""Metrics within groups: per-user AUC, and how good the ranking of a request was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from streamrec._compile import compiled
from streamrec.batch import Batch
from streamrec.errors import ConfigError
from streamrec.evaluators._accumulate import Column
from streamrec.evaluators._by import By, Rule
from streamrec.evaluators._cells import Cells
from streamrec.evaluators._entries import columns, kind_of
from streamrec.evaluators.formulas import deviations, mean_interval
from streamrec.events import Impression

__all__ = ["GAUC", "NDCG", "Coverage", "Recall"]


class _Grouped:
    """A metric that notes which group an impression belongs to, and remembers cells."""

    _binary = False

    def __init__(self, *, by: Rule, usual: Rule, capacity: int, kind: str, name: str) -> None:
        self._by = By(by)
        self._kind = kind_of("kind", kind)
        self._cells = Cells(capacity)
        self.kinds = (kind,)
        inner = [part for part in ("" if by == usual else self._by.name, "" if kind == "click" else kind) if part]
        self.name = f"{name}[{', '.join(inner)}]" if inner else name

    notes = np.dtype(np.int64)
    """What is noted of an impression: the hash of its group."""

    @property
    def skipped(self) -> int:
        """Entries left out because they cannot be judged."""
        return self._cells.skipped

    @property
    def ungrouped(self) -> int:
        """Entries left out because they belong to no group."""
        return self._cells.ungrouped

    @property
    def sampled(self) -> int:
        """One group in so many is judged: 1 while all fit into `capacity` cells, then 2, 4, ..."""
        return int(2**self._cells.level)

    def note(self, impressions: Sequence[Impression], batch: Batch) -> NDArray[np.int64]:
        """int64 `(n,)`: the group of each impression. Changes nothing."""
        return self._by.keys(impressions)

    def update(
        self,
        labels: Column,
        scores: Column,
        weights: Column | None = None,
        kind: str = "click",
        notes: NDArray[Any] | None = None,
    ) -> None:
        """Judge served `scores` by `labels`, of impressions of which `notes` were taken; other kinds are ignored.

        All `(n,)`. Raises `ConfigError` where the shapes do not fit or there are no notes.
        """
        if kind != self._kind:
            return
        labels, scores, weights = columns(labels, scores, weights)
        if notes is None or not len(labels) == len(scores) == len(notes):
            raise ConfigError(
                f"{self.name} needs what note() gave for each of {len(labels)} labels and {len(scores)} scores, got "
                f"{'none' if notes is None else len(notes)}; it works in an OnlineTrainer, which sees impressions"
            )
        scores = self._judged(scores)
        self._cells.add(np.ascontiguousarray(notes, dtype=np.int64), labels, scores, weights, self._binary)

    def _judged(self, scores: Column) -> Column:
        """The scores that tell the cells of a group apart."""
        return scores

    def _arguments(self) -> dict[str, Any]:
        return {"by": self._by.rule, "capacity": self._cells.capacity, "kind": self._kind}

    def fresh(self) -> Self:
        """Another of the same settings that has seen nothing."""
        return type(self)(**self._arguments())

    def merge(self, other: Self) -> None:
        """Take in what another of the same settings has seen. Raises `ConfigError` if the settings differ."""
        same = {**self._arguments(), "by": self._by.name} == {**other._arguments(), "by": other._by.name}
        if type(other) is not type(self) or not same:
            raise ConfigError(f"cannot merge {other!r} into {self!r}: both must have the same settings")
        self._cells.merge(other._cells)

    def state_dict(self) -> dict[str, Any]:
        """The cells, cut now."""
        return self._cells.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was cut from. Raises `ConfigError` where that does not fit."""
        self._cells.load_state_dict(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._arguments().items())})"


class GAUC(_Grouped):
    """The AUC within each group, a user mostly, averaged by the groups' weight (Zhou et al. 2018, DIN, eq. 7).

    What a user sees is a ranking of items for that user: a model that only tells eager users from others has a good AUC
    and a GAUC of a half. Groups with clicks alone, or without any, say nothing and are left out.

    `by`: `"user"`, `"item"`, a feature, or a function of the impression. At most `capacity` cells of a group and a
    score are held, some 40 bytes each; beyond, half of the groups are let go, chosen by hash: see `sampled`. An
    impression without a group is left out and counted in `ungrouped`. Scores are binned as in `AUC`.

    >>> from streamrec import Id, Labeled, Memory, OnlineTrainer, FM, Schema
    >>> shown = [Impression(f"i{n}", float(n), f"u{n % 3}", f"p{n % 2}") for n in range(120)]
    >>> trainer = OnlineTrainer(model=FM(Schema(Id("user"), Id("item"))), metrics=[GAUC()])
    >>> _ = trainer.push([Labeled(one, float(one.item == "p1")) for one in shown])
    >>> trainer.report().metrics["GAUC"] > 0.9
    True
    """

    def __init__(self, *, by: Rule = "user", capacity: int = 1_000_000, kind: str = "click") -> None:
        super().__init__(by=by, usual="user", capacity=capacity, kind=kind, name="GAUC")

    def compute(self) -> float:
        """In [0, 1]; nan until one group has both clicks and non-clicks."""
        return _mean(*self._of_groups())

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """See `formulas.mean_interval`: groups are drawn, not impressions."""
        return mean_interval(*self._of_groups(), confidence)

    def _of_groups(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        starts, _, _, mass = self._cells.sorted()
        values, weights = _auc_of_groups(starts, mass)
        return values[weights > 0], weights[weights > 0]


class _TopK(_Grouped):
    """Of each group, the ranking that its scores make, down to place `k`."""

    _binary = True
    _by_rank: bool
    """Whether a hit counts for less further down."""

    def __init__(self, *, k: int = 10, by: Rule = "request", capacity: int = 1_000_000, kind: str = "click") -> None:
        if not isinstance(k, int) or k < 1:
            raise ConfigError(f"k must be a number of places >= 1, got {k!r}")
        self.k = k
        super().__init__(by=by, usual="request", capacity=capacity, kind=kind, name=f"{type(self).__name__}@{k}")

    def _arguments(self) -> dict[str, Any]:
        return {"k": self.k, **super()._arguments()}

    def compute(self) -> float:
        """In [0, 1]; nan until one group has a hit."""
        return _mean(*self._of_groups())

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """See `formulas.mean_interval`: groups are drawn, not impressions."""
        return mean_interval(*self._of_groups(), confidence)

    def _of_groups(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        starts, _, _, mass = self._cells.sorted()
        discounts = 1 / np.log2(np.arange(2, self.k + 2)) if self._by_rank else np.ones(self.k)
        gains = _gain_of_groups(starts, mass, discounts, self._by_rank)
        gains = gains[gains >= 0]
        return gains, np.ones(len(gains))


class NDCG(_TopK):
    """Normalized discounted cumulative gain of the first `k` places, averaged over groups.

    Järvelin and Kekäläinen 2002. A group is what was ranked together: give the impressions of one request the same
    feature, `by`. A label of 0.5 and above is a hit; weights count for nothing here. Scores that tie share their
    places, so that the value is the mean over all orders of them (McSherry and Najork 2008). Groups without a hit are
    left out. `capacity`: as in `GAUC`.

    >>> NDCG(k=5).name, NDCG(k=3, by="session").name
    ('NDCG@5', 'NDCG@3[session]')
    """

    _by_rank = True


class Recall(_TopK):
    """The share of a group's hits that its scores put on the first `k` places, averaged over groups with hits.

    The arguments and the treatment of ties are those of `NDCG`.

    >>> Recall(k=20).name
    'Recall@20'
    """

    _by_rank = False


class Coverage(_Grouped):
    """The share of a catalogue of `size` items that was shown at all, among impressions whose label is known.

    Up to `capacity` different items it is exact; beyond, the number of items is estimated from a sample of their
    hashes, with a standard error of 1.2 / √capacity of itself (Flajolet 1990).

    >>> Coverage(size=100).name
    'Coverage'
    """

    _binary = True

    def __init__(self, *, size: int, by: Rule = "item", capacity: int = 100_000, kind: str = "click") -> None:
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"size must be the number of items there are, >= 1, got {size!r}")
        self.size = size
        super().__init__(by=by, usual="item", capacity=capacity, kind=kind, name="Coverage")

    def _arguments(self) -> dict[str, Any]:
        return {"size": self.size, **super()._arguments()}

    def _judged(self, scores: Column) -> Column:
        return np.where(np.isfinite(scores), np.float32(0.5), scores)  # one cell an item, whatever its score

    def compute(self) -> float:
        """The share, from 0; nan while nothing has been seen. More than 1 says that `size` is too small."""
        starts, _, _, _ = self._cells.sorted()
        shown = len(starts) - 1
        return shown * self.sampled / self.size if shown else math.nan

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Where the share is that was shown: the value itself while every item is counted; then, of how many of the
        hashes were drawn (binomial, by a normal distribution). Of what else the stream might have shown it says
        nothing. nan while nothing has been seen."""
        starts, _, _, _ = self._cells.sorted()
        shown, share = len(starts) - 1, self.compute()
        if not shown:
            return math.nan, math.nan
        reach = deviations(confidence) * share * math.sqrt((1 - 1 / self.sampled) / shown)
        return max(0.0, share - reach), share + reach


@compiled()
def _auc_of_groups(starts: Any, mass: Any) -> Any:
    """AUC and weight of each group, 0 where it has one label alone. The cells go from the highest score down."""
    values, weights = np.zeros(len(starts) - 1), np.zeros(len(starts) - 1)
    for g in range(len(starts) - 1):
        positives = negatives = won = 0.0
        for cell in range(starts[g], starts[g + 1]):
            # what was there before stands higher: its positives win against these negatives
            won += mass[cell, 1] * (positives + mass[cell, 0] / 2.0)
            positives += mass[cell, 0]
            negatives += mass[cell, 1]
        if positives > 0.0 and negatives > 0.0:
            values[g] = min(won / (positives * negatives), 1.0)
            weights[g] = positives + negatives
    return values, weights


@compiled()
def _gain_of_groups(starts: Any, mass: Any, discounts: Any, by_rank: bool) -> Any:
    """Each group's gain over the best there could be; -1 where it has no hit.

    Places that tie share the hits among them. The best: of the discounted gain, all hits first; else, all hits.
    """
    gains = np.full(len(starts) - 1, -1.0)
    k = len(discounts)
    for g in range(len(starts) - 1):
        hits = gain = 0.0
        place = 0
        for cell in range(starts[g], starts[g + 1]):
            tied = int(mass[cell, 0] + mass[cell, 1])
            share = mass[cell, 0] / tied
            for rank in range(place, min(place + tied, k)):
                gain += share * discounts[rank]
            place += tied
            hits += mass[cell, 0]
        if hits > 0.0:
            best = hits
            if by_rank:
                best = 0.0
                for rank in range(min(int(hits), k)):
                    best += discounts[rank]
            gains[g] = gain / best
    return gains


def _mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    return float((values * weights).sum() / weights.sum()) if len(values) else math.nan
