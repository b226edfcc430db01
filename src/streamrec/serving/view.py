"""View: one version for as long as a request lasts, and the arithmetic of scoring, ranking and retrieving with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.errors import ConfigError
from streamrec.events import Impression
from streamrec.models import FM, ranking
from streamrec.preprocessors.encode import Problem
from streamrec.protocols import Model
from streamrec.serving._catalogue import BLOCK, Catalogue
from streamrec.serving._loader import Serving
from streamrec.serving.candidates import Candidate, Ranked, Shortlist, candidate_of, item_of, paired
from streamrec.storage import Version

__all__ = ["View"]


class View:
    """What a `Scorer` serves at one moment: everything it is asked is answered by `version`, whatever is swapped in.

    `Scorer.view()` makes one for a request that asks twice, or that tells with which version it was answered. It costs
    nothing; the version stays in memory for as long as it is held. Safe to call from several threads.

    >>> from streamrec import FM, Id, OnlineTrainer, Schema, Scorer
    >>> trainer = OnlineTrainer(model=FM(Schema(Id("user"), Id("item"))), store="memory://view-doctest")
    >>> _ = trainer.publish()
    >>> scorer = Scorer("memory://view-doctest")
    >>> now = scorer.view()
    >>> _ = trainer.publish()
    >>> scorer.refresh(), now.version.number, scorer.version.number
    (True, 1, 2)
    """

    __slots__ = ("_count", "_serving")

    def __init__(self, serving: Serving, count: Callable[[Iterable[Problem], int], None]) -> None:
        self._serving = serving
        self._count = count

    @property
    def version(self) -> Version:
        """The version that answers."""
        return self._serving.version

    def score(self, impressions: Sequence[Impression]) -> NDArray[np.float32]:
        """float32 `(n,)`: click probabilities. Unseen and missing values are fine.

        What the trainer's preprocessors added to its impressions, such as a `History`, is added here as it was known
        when the version was published; a feature that an impression brings already stays.
        """
        serving = self._serving
        batch, problems = serving.encoder(serving.described(impressions))
        if problems:
            self._count(problems, 1)
        return serving.calibrated(serving.model.predict(batch))

    def rank(
        self,
        *,
        user: str,
        candidates: Sequence[str | Candidate],
        k: int | None = None,
        features: Mapping[str, Any] | None = None,
        time: float | None = None,
    ) -> list[Ranked]:
        """The `k` candidates (all: None) this user would most probably click, best first; ties in the order given.

        `features`: those of the user and the moment, shared by all; a candidate's own come on top, also on top of those
        the catalogue has for it. Names of the catalogue alone, without features of their own, are ranked by what is
        kept of them; fastest as a `shortlist`. For an FM the order is by the logit, which tells apart what the float32
        probability may not. `time`: now, in POSIX seconds, where the model or its preprocessors read it; then each
        candidate is scored as an impression of its own, for what is known of it and the user together. Raises
        `ConfigError` where it is needed and not given.
        """
        _check(k)
        serving = self._serving
        model, catalogue = serving.model, serving.catalogue
        shared = {} if features is None else features
        now = _now(serving, time)
        if not isinstance(model, FM) or serving.apart:
            scores = self.score(self._shown(user, candidates, features, time))
            order = np.argsort(-scores, kind="stable")[:k]
            return paired((item_of(candidates[place]) for place in order.tolist()), scores[order])
        if catalogue is not None and catalogue.by_fm is not None:
            places = catalogue.find(candidates)
            if places is not None:
                part = self._shared(catalogue.names, user, shared, len(candidates), now)
                order, logits = ranking.best(model, part, catalogue.by_fm.parts, places, k)
                names: Any = candidates.items if isinstance(candidates, Shortlist) else candidates
                return paired(map(names.__getitem__, order.tolist()), serving.calibrated(ranking.probabilities(logits)))
        order, logits = ranking.in_order(self._logits(model, user, candidates, shared, now), k)
        return paired(
            (item_of(candidates[place]) for place in order.tolist()), serving.calibrated(ranking.probabilities(logits))
        )

    def _shared(
        self, names: frozenset[str], user: str, shared: Mapping[str, Any], times: int, now: float
    ) -> NDArray[np.float32]:
        """float32 `(dim + 1,)`: the part of the fields that are not the items' own."""
        serving = self._serving
        batch, problems = serving.sides(names).shared.one(
            Impression(id="", time=now, user=user, item="", features=shared)
        )
        if problems:
            self._count(problems, times)
        part: NDArray[np.float32] = serving.model.parts(batch)[0]  # type: ignore[attr-defined]
        return part

    def _logits(
        self,
        model: FM,
        user: str,
        candidates: Sequence[str | Candidate],
        shared: Mapping[str, Any],
        now: float,
    ) -> NDArray[np.float32]:
        """float32 `(n,)`: of candidates of which some bring what is not kept."""
        serving = self._serving
        catalogue = serving.catalogue
        brought = set[str]().union(*[one.features for one in candidates if not isinstance(one, str)])
        known = catalogue.names if catalogue is not None else frozenset[str]()
        names = known | brought.intersection(model.schema.names)
        # where a candidate brings a field that the catalogue has not, the kept parts lack it: then none is used
        kept = catalogue.by_fm if catalogue is not None and names == known else None
        places = np.full(len(candidates), -1, dtype=np.int64)
        if catalogue is not None and kept is not None:
            get = catalogue.places.get
            for place, one in enumerate(candidates):
                if isinstance(one, str) or not one.features:
                    places[place] = get(item_of(one), -1)
        strangers = np.flatnonzero(places < 0)
        if catalogue is None and names.isdisjoint(
            shared
        ):  # what is the items' own is in the candidates, and only there
            whole = map(candidate_of, candidates)
            shown = [Impression("", 0.0, user, one.item, one.features) for one in whole]
        else:
            shown = [_impression(catalogue, user, candidates[place], shared) for place in strangers.tolist()]
        batch, problems = serving.sides(names).own(shown)
        if problems:
            self._count(problems, 1)
        parts = model.parts(batch)
        part = self._shared(names, user, shared, len(candidates), now)
        if kept is None:
            return ranking.logits(model, part, parts, np.arange(len(parts)))
        found = np.empty(len(candidates), dtype=np.float32)
        found[strangers] = ranking.logits(model, part, parts, np.arange(len(parts)))
        rest = np.flatnonzero(places >= 0)
        found[rest] = ranking.logits(model, part, kept.parts, places[rest])
        return found

    def retrieve(
        self,
        *,
        user: str,
        k: int | None,
        features: Mapping[str, Any] | None = None,
        exclude: Iterable[str] = (),
        time: float | None = None,
    ) -> list[Ranked]:
        """The `k` items (all: None) of the catalogue this user would most probably click, best first; exact.

        `features`: those of the user and the moment. `exclude`: items to leave out; what is not in the catalogue is
        no matter. Ties in the order of the catalogue. One pass over it, in the memory of `k` items, for an FM; any
        other model, and one whose preprocessors add features, scores it all. `time`: as in `rank`. Raises `ConfigError`
        where there is no catalogue.
        """
        places, scores = self.retrieve_places(user=user, k=k, features=features, exclude=exclude, time=time)
        return paired(map(self.catalogue.__getitem__, places.tolist()), scores)

    def retrieve_places(
        self,
        *,
        user: str,
        k: int | None,
        features: Mapping[str, Any] | None = None,
        exclude: Iterable[str] = (),
        time: float | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """What `retrieve` finds, as columns for many users' lists: int64 `(found,)`, where the items stand in
        `catalogue`, best first, and float32 `(found,)`, their click probabilities."""
        _check(k)
        serving = self._serving
        catalogue = serving.catalogue
        if catalogue is None:
            raise ConfigError("there is no catalogue to retrieve from: call set_catalogue(candidates) first")
        if isinstance(exclude, str):
            raise ConfigError(f"exclude takes several items, got the one text {exclude!r}; pass [{exclude!r}]")
        skipped = catalogue.skipped(exclude)
        most = len(catalogue.items) - len(skipped)
        k = most if k is None else min(k, most)
        shared = {} if features is None else features
        now = _now(serving, time)
        if catalogue.by_fm is None or not isinstance(serving.model, FM) or serving.apart:
            scores = self._score_catalogue(catalogue, user, shared, now)
            places = np.delete(np.arange(len(scores)), skipped)
            places = places[np.argsort(-scores[places], kind="stable")[:k]]
            return places, scores[places]
        part = self._shared(catalogue.names, user, shared, 1, now)
        _, parts, codes = catalogue.by_fm
        places, logits = ranking.top(serving.model, part, parts, k, skipped, codes)
        return places, serving.calibrated(ranking.probabilities(logits))

    @property
    def catalogue(self) -> Sequence[str]:
        """The names of the catalogue's items, in its order; none where there is no catalogue."""
        return () if self._serving.catalogue is None else self._serving.catalogue.items

    def deviations(
        self,
        *,
        user: str,
        candidates: Sequence[str | Candidate],
        features: Mapping[str, Any] | None = None,
        time: float | None = None,
        prior: float = 1.0,
    ) -> NDArray[np.float32]:
        """float32 `(n,)`: how unsure the logit of each candidate is; see `FM.deviation`. For `serving.thompson`.

        Raises `ConfigError` for another model.
        """
        serving = self._serving
        batch, _ = serving.encoder(serving.described(self._shown(user, candidates, features, time)))
        return _fm(serving.model).deviation(batch, prior)

    def vectors(self, candidates: Sequence[str | Candidate]) -> NDArray[np.float32]:
        """float32 `(n, dim)`: the sum of the factors of the item and of what it brings, for `serving.diversified`.

        Raises `ConfigError` for a model other than an FM.
        """
        serving = self._serving
        model, catalogue = _fm(serving.model), serving.catalogue
        if catalogue is not None and catalogue.by_fm is not None:
            places = catalogue.find(candidates)
            if places is not None:
                return catalogue.by_fm.parts[places, : model.dim]
        shown = [_impression(catalogue, "", one, {}) for one in candidates]
        names = frozenset[str]().union(*(one.features for one in shown)) & frozenset(model.schema.names)
        return model.parts(serving.sides(names).own(shown)[0])[:, : model.dim]

    def _shown(
        self,
        user: str,
        candidates: Sequence[str | Candidate],
        features: Mapping[str, Any] | None,
        time: float | None,
    ) -> list[Impression]:
        """An impression of each candidate."""
        shared = {} if features is None else features
        now = _now(self._serving, time)
        return [_impression(self._serving.catalogue, user, one, shared, now) for one in candidates]

    def _score_catalogue(
        self, catalogue: Catalogue, user: str, shared: Mapping[str, Any], now: float
    ) -> NDArray[np.float32]:
        scores = [np.empty(0, dtype=np.float32)]
        for begin in range(0, len(catalogue.items), BLOCK):
            some = catalogue.items[begin : begin + BLOCK]
            scores.append(self.score([_impression(catalogue, user, one, shared, now) for one in some]))
        return np.concatenate(scores)


def _fm(model: Model) -> FM:
    if not isinstance(model, FM):
        raise ConfigError(f"this needs an FM, the version is of a {type(model).__name__}")
    return model


def _check(k: int | None) -> None:
    if k is not None and k < 0:
        raise ConfigError(f"k must be >= 0, got {k!r}")


def _now(serving: Serving, time: float | None) -> float:
    if time is None and (serving.stages or serving.model.schema.timed):
        names = ", ".join([*(type(stage).__name__ for stage in serving.stages), *serving.model.schema.timed])
        raise ConfigError(f"the values of {names} depend on the time: pass time=, now in POSIX seconds")
    return 0.0 if time is None else float(time)


def _impression(
    catalogue: Catalogue | None, user: str, one: str | Candidate, shared: Mapping[str, Any], now: float = 0.0
) -> Impression:
    """What `score` would be given: shared features, on top those of the catalogue, on top the candidate's own."""
    candidate = candidate_of(one)
    listed = None if catalogue is None else catalogue.candidate(candidate.item)
    if catalogue is not None and listed is not None:
        shared = {name: value for name, value in shared.items() if name not in catalogue.names}
        shared = {**shared, **listed.features}
    features = {**shared, **candidate.features} if candidate.features else shared
    return Impression(id="", time=now, user=user, item=candidate.item, features=features)
