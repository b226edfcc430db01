"""Scorer: the newest published version, read-only, in the service that shows the items."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamrec.batch import Batch
from streamrec.errors import ConfigError, StoreError
from streamrec.events import Impression
from streamrec.models import FM, ranking
from streamrec.preprocessors import Encoder
from streamrec.preprocessors.encode import Problem
from streamrec.protocols import Model
from streamrec.schema import Schema
from streamrec.serving._sides import Sides, encoded_in_blocks
from streamrec.storage import Store, Version

__all__ = ["Candidate", "Ranked", "Scorer"]

MODELS: Mapping[str, Callable[[Mapping[str, Any]], Model]] = {"FM": FM.from_config}
"""What a scorer can build from a version alone."""

BLOCK = 8192  # items of a catalogue that are encoded or scored at once


class Candidate(msgspec.Struct, frozen=True):
    """An item that might be shown, with the features of its own."""

    item: str
    features: Mapping[str, Any] = {}


class Ranked(NamedTuple):
    """An item and its click probability."""

    item: str
    score: float


class _Catalogue(NamedTuple):
    """Items that stay, with what one version makes of them."""

    candidates: Sequence[str | Candidate]
    items: Sequence[str]
    places: Mapping[str, int]
    names: frozenset[str]  # the fields that are the items' own
    batch: Batch | None  # of those fields; None where the model is no FM
    parts: NDArray[np.float32] | None  # (items, dim + 1), of this version

    def candidate(self, item: str) -> Candidate | None:
        place = self.places.get(item)
        return None if place is None else _candidate(self.candidates[place])


class _Serving(NamedTuple):
    """One version, loaded, and the catalogue by it: replaced as a whole, so that no request sees two."""

    version: Version
    model: Model
    encoder: Encoder
    sides: Callable[[frozenset[str]], Sides]
    catalogue: _Catalogue | None = None


class Scorer:
    """Scores and ranks with the newest version in a store; `refresh` swaps a newer one in between two requests.

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
        self._make = model
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()  # one at a time, so that a slow one brings no older version back
        serving = self._load()
        if serving is None:
            raise StoreError(
                f"nothing is published in {self.store.uri}: run a trainer on it first, or call its publish()"
            )
        self._serving = serving

    def _load(self) -> _Serving | None:
        found = self.store.versions.read()
        if found is None:
            return None
        version, state = found
        described = version.info["model"]
        if self._make is not None:
            model = self._make()
            model.schema.require(Schema.from_dict(described["schema"]), what=f"version {version.number}")
        elif described["type"] in MODELS:
            model = MODELS[described["type"]](described["config"])
        else:
            raise ConfigError(
                f"version {version.number} is of a {described['type']}, which a scorer cannot build by itself; "
                f"pass Scorer(..., model=a function that makes an empty one)"
            )
        model.load_state_dict(state["model"])
        schema = model.schema

        @lru_cache(maxsize=64)  # a set of fields each that candidates bring; more than a few are never in use
        def sides(names: frozenset[str]) -> Sides:
            return Sides(schema, names)

        serving = _Serving(version, model, Encoder(schema), sides)
        _warm(serving)
        return serving

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
        """Serve the newest version from now on; true where that is another one than before.

        The catalogue's parts are computed for it first and swapped in with it, meanwhile requests see the old version.
        """
        with self._refreshing:
            newest = self.store.versions.latest()
            before = self._serving
            if newest is None or newest.number == before.version.number:
                return False
            serving = self._load()
            if serving is None or serving.version.number == before.version.number:
                return False
            if before.catalogue is not None:
                # encoding knows no weights: by the same schema, the batch is the same
                same = before.model.schema == serving.model.schema
                catalogue, _ = _catalogue(
                    before.catalogue.candidates, serving, before.catalogue.batch if same else None
                )
                serving = serving._replace(catalogue=catalogue)
            self._serving = serving
            return True

    def score(self, impressions: Sequence[Impression]) -> NDArray[np.float32]:
        """float32 `(n,)`: click probabilities. Unseen and missing values are fine."""
        return self._score(self._serving, impressions)

    def _score(self, serving: _Serving, impressions: Sequence[Impression]) -> NDArray[np.float32]:
        batch, problems = serving.encoder(impressions)
        if problems:
            self._count(problems)
        return serving.model.predict(batch)

    def set_catalogue(self, candidates: Sequence[str | Candidate]) -> None:
        """The items there are, for `retrieve`, and for `rank` to know by their names; in place of those before.

        A field that any of them has features for is the items' own: an item without it has it unknown, whatever the
        `features` of a request say. For an FM an item takes 4 (dim + 1) bytes and 16 for each of its features, encoded
        once; a refresh computes only the weights' part again. Raises `ConfigError` where an item stands twice.
        """
        candidates = tuple(candidates)
        with self._refreshing:
            catalogue, problems = _catalogue(candidates, self._serving, None)
            self._serving = self._serving._replace(catalogue=catalogue)
        self._count(problems)

    def rank(
        self,
        *,
        user: str,
        candidates: Sequence[str | Candidate],
        k: int | None = None,
        features: Mapping[str, Any] | None = None,
    ) -> list[Ranked]:
        """The `k` candidates (all: None) this user would most probably click, best first; ties in the order given.

        `features`: those of the user and the moment, shared by all; a candidate's own come on top, also on top of those
        the catalogue has for it. Names of the catalogue alone, without features of their own, are ranked by what is
        kept of them. For an FM the order is by the logit, which tells apart what the float32 probability may not.
        """
        _check(k)
        serving = self._serving
        shared = dict(features or {})
        if type(serving.model) is not FM:
            shown = [_impression(serving.catalogue, user, candidate, shared) for candidate in candidates]
            scores = self._score(serving, shown)
            return _best([one.item for one in shown], scores, np.argsort(-scores, kind="stable")[:k])
        catalogue = serving.catalogue
        if catalogue is not None and catalogue.parts is not None:
            try:
                found = map(catalogue.places.__getitem__, candidates)  # type: ignore[arg-type]
                places = np.fromiter(found, dtype=np.int64, count=len(candidates))
            except (KeyError, TypeError):  # one is not in it, or is a Candidate
                pass
            else:
                part = self._shared(serving, catalogue.names, user, shared, len(candidates))
                logits = ranking.logits(serving.model, part, catalogue.parts, places)
                return _best_logits(candidates, logits, k)  # type: ignore[arg-type]
        items = [one if isinstance(one, str) else one.item for one in candidates]
        return _best_logits(items, self._logits(serving, user, candidates, shared), k)

    def _shared(
        self, serving: _Serving, names: frozenset[str], user: str, shared: Mapping[str, Any], times: int
    ) -> NDArray[np.float32]:
        """float32 `(dim + 1,)`: the part of the fields that are not the items' own."""
        shown = Impression(id="", time=0.0, user=user, item="", features=shared)
        batch, problems = serving.sides(names).shared([shown])
        if problems:
            self._count(problems, times)
        part: NDArray[np.float32] = ranking.parts(serving.model, batch)[0]  # type: ignore[arg-type]
        return part

    def _logits(
        self, serving: _Serving, user: str, candidates: Sequence[str | Candidate], shared: Mapping[str, Any]
    ) -> NDArray[np.float32]:
        """float32 `(n,)`: of candidates of which some bring what is not kept."""
        model, catalogue = serving.model, serving.catalogue
        brought: set[str] = set()
        for candidate in candidates:
            if not isinstance(candidate, str):
                brought.update(candidate.features)
        known = catalogue.names if catalogue is not None else frozenset[str]()
        names = known | brought.intersection(model.schema.names)
        # where a candidate brings a field that the catalogue has not, the kept parts lack it: then none is used
        kept = catalogue if names == known else None
        places = np.full(len(candidates), -1, dtype=np.int64)
        if catalogue is not None and kept is not None:
            get = catalogue.places.get
            for place, one in enumerate(candidates):
                if isinstance(one, str) or not one.features:
                    places[place] = get(one if isinstance(one, str) else one.item, -1)
        strangers = np.flatnonzero(places < 0)
        shown = [_impression(catalogue, user, candidates[place], shared) for place in strangers.tolist()]
        batch, problems = serving.sides(names).own(shown)
        if problems:
            self._count(problems)
        parts = ranking.parts(model, batch)  # type: ignore[arg-type]
        part = self._shared(serving, names, user, shared, len(candidates))
        if kept is None or kept.parts is None:
            return ranking.logits(model, part, parts, np.arange(len(parts)))  # type: ignore[arg-type]
        found = np.empty(len(candidates), dtype=np.float32)
        found[strangers] = ranking.logits(model, part, parts, np.arange(len(parts)))  # type: ignore[arg-type]
        rest = np.flatnonzero(places >= 0)
        found[rest] = ranking.logits(model, part, kept.parts, places[rest])  # type: ignore[arg-type]
        return found

    def retrieve(
        self,
        *,
        user: str,
        k: int | None,
        features: Mapping[str, Any] | None = None,
        exclude: Iterable[str] = (),
    ) -> list[Ranked]:
        """The `k` items (all: None) of the catalogue this user would most probably click, best first; exact.

        `features`: those of the user and the moment. `exclude`: items to leave out; what is not in the catalogue is
        no matter. Ties in the order of the catalogue. One pass over it, in the memory of `k` items, for an FM; any
        other model scores it all. Raises `ConfigError` where there is no catalogue.
        """
        _check(k)
        serving = self._serving
        catalogue = serving.catalogue
        if catalogue is None:
            raise ConfigError("there is no catalogue to retrieve from: call set_catalogue(candidates) first")
        if isinstance(exclude, str):
            raise ConfigError(f"exclude takes several items, got the one text {exclude!r}; pass [{exclude!r}]")
        found = {catalogue.places[item] for item in exclude if item in catalogue.places}
        skipped = np.array(sorted(found), dtype=np.int64)
        most = len(catalogue.items) - len(skipped)
        k = most if k is None else min(k, most)
        shared = dict(features or {})
        if catalogue.parts is None or type(serving.model) is not FM:
            scores = self._score_catalogue(serving, catalogue, user, shared)
            places = np.delete(np.arange(len(scores)), skipped)
            order = places[np.argsort(-scores[places], kind="stable")[:k]]
            return _best(catalogue.items, scores, order)
        part = self._shared(serving, catalogue.names, user, shared, 1)
        places, logits = ranking.top(serving.model, part, catalogue.parts, k, skipped)
        scores = ranking.probabilities(logits)
        items = map(catalogue.items.__getitem__, places.tolist())
        return list(map(Ranked._make, zip(items, scores.tolist(), strict=True)))

    def _score_catalogue(
        self, serving: _Serving, catalogue: _Catalogue, user: str, shared: Mapping[str, Any]
    ) -> NDArray[np.float32]:
        scores = [np.empty(0, dtype=np.float32)]
        for begin in range(0, len(catalogue.items), BLOCK):
            some = catalogue.items[begin : begin + BLOCK]
            scores.append(self._score(serving, [_impression(catalogue, user, one, shared) for one in some]))
        return np.concatenate(scores)


def _check(k: int | None) -> None:
    if k is not None and k < 0:
        raise ConfigError(f"k must be >= 0, got {k!r}")


def _candidate(one: str | Candidate) -> Candidate:
    return Candidate(one) if isinstance(one, str) else one


def _impression(catalogue: _Catalogue | None, user: str, one: str | Candidate, shared: Mapping[str, Any]) -> Impression:
    """What `score` would be given: shared features, on top those of the catalogue, on top the candidate's own."""
    candidate = _candidate(one)
    listed = None if catalogue is None else catalogue.candidate(candidate.item)
    if catalogue is not None and listed is not None:
        shared = {name: value for name, value in shared.items() if name not in catalogue.names}
        shared = {**shared, **listed.features}
    features = {**shared, **candidate.features} if candidate.features else shared
    return Impression(id="", time=0.0, user=user, item=candidate.item, features=features)


def _best(items: Sequence[str], scores: NDArray[np.float32], order: NDArray[np.int64]) -> list[Ranked]:
    return [Ranked(items[place], score) for place, score in zip(order.tolist(), scores[order].tolist(), strict=True)]


def _best_logits(items: Sequence[str], logits: NDArray[np.float32], k: int | None) -> list[Ranked]:
    order = np.argsort(-logits, kind="stable")[:k]
    scores = ranking.probabilities(logits[order]).tolist()
    return list(map(Ranked._make, zip(map(items.__getitem__, order.tolist()), scores, strict=True)))


def _catalogue(
    candidates: Sequence[str | Candidate], serving: _Serving, batch: Batch | None
) -> tuple[_Catalogue, Sequence[Problem]]:
    """The catalogue by the version of `serving`; `batch`: as it was encoded before, if it was, by the same schema."""
    items = [one if isinstance(one, str) else one.item for one in candidates]
    places = {item: place for place, item in enumerate(items)}
    if len(places) < len(items):
        twice = next(item for place, item in enumerate(items) if places[item] != place)
        raise ConfigError(f"the catalogue holds {twice!r} twice: give each item once, with the features of both")
    model, problems = serving.model, list[Problem]()
    brought: set[str] = set()
    for one in candidates:
        if not isinstance(one, str):
            brought.update(one.features)
    names = frozenset(brought.intersection(model.schema.names))
    if type(model) is not FM:
        return _Catalogue(candidates, items, places, names, None, None), problems
    if batch is None:
        own = serving.sides(names).own
        blocks = (
            [
                Impression("", 0.0, "", one)
                if isinstance(one, str)
                else Impression("", 0.0, "", one.item, one.features)
                for one in candidates[begin : begin + BLOCK]
            ]
            for begin in range(0, len(candidates), BLOCK)
        )
        batch, problems = encoded_in_blocks(own, blocks)
    return _Catalogue(candidates, items, places, names, batch, ranking.parts(model, batch)), problems


def _warm(serving: _Serving) -> None:
    """Run all that a request runs, so that no request waits for a compiler."""
    batch, _ = serving.encoder([Impression(id="", time=0.0, user="", item="")])
    model = serving.model
    model.predict(batch)
    if type(model) is FM:
        found = ranking.parts(model, batch)
        none = np.empty(0, dtype=np.int64)
        ranking.probabilities(ranking.logits(model, found[0], found, np.zeros(1, dtype=np.int64)))
        ranking.top(model, found[0], np.repeat(found, 32, axis=0), 1, none)
