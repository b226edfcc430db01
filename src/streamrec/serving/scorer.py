"""Scorer: the version that is to be served, read-only, in the service that shows the items."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.errors import ConfigError, StoreError
from streamrec.events import Impression
from streamrec.models import FM, ranking
from streamrec.preprocessors.encode import Problem
from streamrec.protocols import Model
from streamrec.serving._catalogue import BLOCK, Catalogue, with_parts
from streamrec.serving._loader import Loader, Serving
from streamrec.serving.candidates import Candidate, Ranked, Shortlist, candidate_of, item_of, paired
from streamrec.storage import Store, Version

__all__ = ["Scorer"]


class Scorer:
    """Scores and ranks with the newest version in a store; `refresh` swaps a newer one in between two requests.

    Where `store.served` was told to serve another version, by a rollback, say, it is that one.

    `model`: makes an empty model to load a version into. Only needed for a model of your own; an FM is built from what
    was published with it. Safe to call from several threads. Raises `StoreError` where nothing is published yet.

    For an FM, `rank` and `retrieve` compute what the candidates share once, and keep what the items of the catalogue
    bring. Their scores are those of `score` but for the order in which float32 numbers are added: to 1e-5, where the
    features' values are of ordinary size. What is compiled is compiled when a scorer is made, not in its first request.

    >>> from streamrec import FM, Id, Labeled, OnlineTrainer, Schema
    >>> store = Store("memory://scorer-doctest")
    >>> trainer = OnlineTrainer(model=FM(Schema(Id("user"), Id("item"))), store=store)
    >>> shown = [Impression(id=f"i{n}", time=float(n), user="u1", item=f"p{n % 3}") for n in range(99)]
    >>> _ = trainer.push([Labeled(one, label=float(one.item == "p2")) for one in shown])
    >>> _ = trainer.publish()
    >>> scorer = Scorer(store)
    >>> [ranked.item for ranked in scorer.rank(user="u1", candidates=["p0", "p1", "p2"], k=1)]
    ['p2']
    >>> scorer.set_catalogue(["p0", "p1", "p2"])
    >>> [ranked.item for ranked in scorer.retrieve(user="u1", k=1)]
    ['p2']
    """

    def __init__(self, store: Store | str | os.PathLike[str], *, model: Callable[[], Model] | None = None) -> None:
        self.store = Store(store) if isinstance(store, (str, os.PathLike)) else store
        self._loader = Loader(self.store.versions, model)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()  # one at a time, so that a slow one brings no older version back
        serving = self._loader.whole(self.store.served.pinned())
        if serving is None:
            raise StoreError(
                f"nothing is published in {self.store.uri}: run a trainer on it first, or call its publish()"
            )
        self._serving = serving

    @property
    def version(self) -> Version:
        """The version that is served."""
        return self._serving.version

    @property
    def counts(self) -> Mapping[str, int]:
        """Feature values that could not be used and counted as unknown, by field."""
        with self._lock:
            return dict(self._counts)

    def _count(self, problems: Iterable[Problem], times: int = 1) -> None:
        with self._lock:
            for problem in problems:
                self._counts[problem.field] += times

    def refresh(self) -> bool:
        """Serve the newest version from now on, or the one that `store.served` was told; true where that is another one
        than before.

        Meanwhile requests see the old version; the catalogue's parts are computed for the new one first and swapped in
        with it. Where the store has it as changes of the one that is served, only they are read, and they go into a
        second model, which is kept for that: a scorer that follows a trainer holds its model twice.
        """
        with self._refreshing:
            pinned = self.store.served.pinned()
            before = self._serving
            newest = self.store.versions.latest() if pinned is None else None
            number = pinned if newest is None else newest.number
            if number is None or number == before.version.number:
                return False
            serving = self._loader.after(before) if pinned is None else self._loader.whole(pinned)
            if serving is None or serving.version.number == before.version.number:
                return False
            if before.catalogue is not None:
                # encoding knows no weights: by the same schema, the batch is the same
                kept = before.catalogue.by_fm if before.model.schema == serving.model.schema else None
                batch = None if kept is None else kept.batch
                catalogue, _ = with_parts(before.catalogue, serving.model, serving.sides, batch)
                serving = serving._replace(catalogue=catalogue)
            self._serving = serving
            return True

    def score(self, impressions: Sequence[Impression]) -> NDArray[np.float32]:
        """float32 `(n,)`: click probabilities. Unseen and missing values are fine.

        What the trainer's preprocessors added to its impressions, such as a `History`, is added here as it was known
        when the version was published; a feature that an impression brings already stays.
        """
        return self._score(self._serving, impressions)

    def _score(self, serving: Serving, impressions: Sequence[Impression]) -> NDArray[np.float32]:
        batch, problems = serving.encoder(serving.described(impressions))
        if problems:
            self._count(problems)
        return serving.model.predict(batch)

    def set_catalogue(self, candidates: Sequence[str | Candidate]) -> None:
        """The items there are, for `retrieve`, and for `rank` to know by their names; in place of those before.

        A field that any of them has features for is the items' own: an item without it has it unknown, whatever the
        `features` of a request say. For an FM an item takes 5 (dim + 1) bytes and 16 for each of its features, encoded
        once; a refresh computes only the weights' part again. Raises `ConfigError` where an item stands twice.
        """
        catalogue = Catalogue.of(tuple(candidates))
        with self._refreshing:
            serving = self._serving
            catalogue, problems = with_parts(catalogue, serving.model, serving.sides, None)
            self._serving = serving._replace(catalogue=catalogue)
        self._count(problems)

    def shortlist(self, items: Iterable[str]) -> Shortlist:
        """These items of the catalogue, looked up once, for a service that ranks the same ones again and again.

        `rank` takes it in place of the names, and finds without a dictionary what is kept of them. Raises `ConfigError`
        where there is no catalogue, or one of them is not in it.

        >>> from streamrec import FM, Id, OnlineTrainer, Schema
        >>> trainer = OnlineTrainer(model=FM(Schema(Id("user"), Id("item"))), store="memory://shortlist-doctest")
        >>> _ = trainer.publish()
        >>> scorer = Scorer("memory://shortlist-doctest")
        >>> scorer.set_catalogue(["p0", "p1", "p2"])
        >>> front_page = scorer.shortlist(["p2", "p0"])
        >>> len(scorer.rank(user="u1", candidates=front_page)), front_page.places.tolist()
        (2, [2, 0])
        """
        catalogue = self._serving.catalogue
        if catalogue is None:
            raise ConfigError("there is no catalogue to look items up in: call set_catalogue(candidates) first")
        if isinstance(items, str):
            raise ConfigError(f"shortlist takes several items, got the one text {items!r}; pass [{items!r}]")
        items = tuple(items)
        places = catalogue.find(items)
        if places is None:
            stranger = next(item for item in items if item not in catalogue.places)
            raise ConfigError(f"{stranger!r} is not in the catalogue: leave it out, or set a catalogue that has it")
        return Shortlist(items, places, catalogue.mark)

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
            scores = self._score(serving, [_impression(catalogue, user, one, shared, now) for one in candidates])
            order = np.argsort(-scores, kind="stable")[:k]
            return paired((item_of(candidates[place]) for place in order.tolist()), scores[order])
        if catalogue is not None and catalogue.by_fm is not None:
            places = catalogue.find(candidates)
            if places is not None:
                part = self._shared(serving, catalogue.names, user, shared, len(candidates), now)
                order, logits = ranking.best(model, part, catalogue.by_fm.parts, places, k)
                names: Any = candidates.items if isinstance(candidates, Shortlist) else candidates
                return paired(map(names.__getitem__, order.tolist()), ranking.probabilities(logits))
        order, logits = ranking.in_order(self._logits(serving, model, user, candidates, shared, now), k)
        return paired((item_of(candidates[place]) for place in order.tolist()), ranking.probabilities(logits))

    def _shared(
        self, serving: Serving, names: frozenset[str], user: str, shared: Mapping[str, Any], times: int, now: float
    ) -> NDArray[np.float32]:
        """float32 `(dim + 1,)`: the part of the fields that are not the items' own."""
        batch, problems = serving.sides(names).shared.one(
            Impression(id="", time=now, user=user, item="", features=shared)
        )
        if problems:
            self._count(problems, times)
        part: NDArray[np.float32] = serving.model.parts(batch)[0]  # type: ignore[attr-defined]
        return part

    def _logits(
        self,
        serving: Serving,
        model: FM,
        user: str,
        candidates: Sequence[str | Candidate],
        shared: Mapping[str, Any],
        now: float,
    ) -> NDArray[np.float32]:
        """float32 `(n,)`: of candidates of which some bring what is not kept."""
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
            self._count(problems)
        parts = model.parts(batch)
        part = self._shared(serving, names, user, shared, len(candidates), now)
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
            scores = self._score_catalogue(serving, catalogue, user, shared, now)
            places = np.delete(np.arange(len(scores)), skipped)
            places = places[np.argsort(-scores[places], kind="stable")[:k]]
            return paired(map(catalogue.items.__getitem__, places.tolist()), scores[places])
        part = self._shared(serving, catalogue.names, user, shared, 1, now)
        _, parts, codes = catalogue.by_fm
        places, logits = ranking.top(serving.model, part, parts, k, skipped, codes)
        return paired(map(catalogue.items.__getitem__, places.tolist()), ranking.probabilities(logits))

    def _score_catalogue(
        self, serving: Serving, catalogue: Catalogue, user: str, shared: Mapping[str, Any], now: float
    ) -> NDArray[np.float32]:
        scores = [np.empty(0, dtype=np.float32)]
        for begin in range(0, len(catalogue.items), BLOCK):
            some = catalogue.items[begin : begin + BLOCK]
            scores.append(self._score(serving, [_impression(catalogue, user, one, shared, now) for one in some]))
        return np.concatenate(scores)


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
